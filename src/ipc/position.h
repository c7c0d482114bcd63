/*-------------------------------------------------------------------------
 *
 * position.h
 *	  The one counter of positions, its log-ahead reservation, and the horizon
 *	  (PROTOCOL.md 1.4 RESERVE, 4).
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_IPC_POSITION_H
#define ES_IPC_POSITION_H

#include "postgres.h"

#include "utils/snapshot.h"

#include "ipc/shmem.h"

/*
 * Publishes the horizon slot of this backend (lower bound = counter, the
 * tables), then takes n positions; returns the first.  Logs and flushes a
 * RESERVE when needed: may throw, and waits until the counter is known.
 */
extern EsPosition es_positions_reserve(uint64 n, const uint64 *tables, uint32 ntables, EsFxid fxid);

/* For restores: publishes the slot with lower bound `lowest`, then moves the counter
 * above `highest`.  ERROR if highest is beyond ES_MAX_POSITION, or the user is no superuser and it is
 * more than 2^32 above the counter, or above the counter and 2^46. */
extern void
es_positions_given(EsPosition lowest, EsPosition highest, const uint64 *tables, uint32 ntables, EsFxid fxid);

/* One position for something that is no event (a storage id): no slot. */
extern uint64 es_positions_take_id(void);

/* After ProcArrayEndTransaction: pushes (L, fxid, base) to the ring, clears the slot; wakes
 * waiters.  Never throws. */
extern void es_horizon_committed(void);
/* Abort or exit: clears the slot only; wakes waiters. Never throws. */
extern void es_horizon_aborted(void);

/* Horizon of a snapshot for a table (its storage id; 0 = all tables). */
extern EsPosition es_horizon_of(Snapshot snapshot, uint64 storage_id);

/* The newest horizon, as a shard sees it for its waiters: min(counter, lower bounds of
 * slots of that table that are set). */
extern EsPosition es_horizon_newest(uint64 storage_id);

/* A snapshot as core/arith.h wants it; s->xip is palloc'd. */
extern void es_widen_snapshot(Snapshot snapshot, EsSnapshot *s);

/* Recovery: the counter is at least next; positions below reserved_below may be in use. */
extern void es_positions_recovered(EsPosition next, EsPosition reserved_below);

/* ---- between position.c, horizon.c and shmem.c ---- */

/* Sets the slot, or widens it if this transaction has set it before. */
extern void es_horizon_publish(EsPosition lower_bound, const uint64 *tables, uint32 ntables, EsFxid fxid);
/* The first position that was really taken. */
extern void es_horizon_note_base(EsPosition base);
/* Clears a slot and wakes waiters.  Never throws. */
extern void es_horizon_clear(EsBackendSlot *slot);

#endif /* ES_IPC_POSITION_H */
