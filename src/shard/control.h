/*-------------------------------------------------------------------------
 *
 * control.h
 *	  The two alternating control blocks of a shard: reading them, and writing the next.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_CONTROL_H
#define ES_SHARD_CONTROL_H

#include "postgres.h"

#include "core/wal.h"

/* The current control block of a shard, by any process.  ERROR XX001 if neither is valid. */
extern void es_control_read(int shard, EsControl *control);

/* ERROR if it belongs to another store, cluster, timeline or shard. */
extern void es_control_check(int shard, const EsControl *control, const EsFileIdentity *identity);

/*
 * Blocking: makes both files anew with this content (sequence is advanced), older one first,
 * so that no write of a dead process can reach them.
 */
extern void es_control_replace(int shard, EsControl *control);

/* The process that replaced them writes them from now on. */
extern void es_control_own(int shard, const EsControl *control);

/*
 * Asynchronous: writes the next block and syncs it, then done() is called from es_uring_reap.  One at a
 * time.  control is copied; its sequence is set.  A failed write is tried again each second
 * (es_control_tick), a failed sync is a PANIC.
 */
extern void es_control_write(const EsControl *control, void (*done)(void));
extern void es_control_tick(void);
extern int	es_control_stuck_errno(void);

/*
 * Notes, outside the store's directory, with which control block the shard has opened.  A failure
 * is logged, no more: a note that is older, or missing, says less and nothing wrong.
 */
extern void es_opened_note(int shard, const EsControl *control);

/* restart_lsn of the last note of this shard, store, cluster and timeline; 0 = none, or it cannot be read. */
extern EsLsn es_opened_lsn(const EsFileIdentity *identity);

extern uint64 es_unix_micros(void);

#endif /* ES_SHARD_CONTROL_H */
