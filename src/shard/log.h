/*-------------------------------------------------------------------------
 *
 * log.h
 *	  A shard's own WAL and its control blocks: frames go into a queue in memory, are
 *	  written in groups when PostgreSQL's WAL is flushed past them, synced,
 *	  and then a control block says so (PROTOCOL.md 5).
 *
 * Frames have tickets 1, 2, 3 …; "durable" always means: a synced control block's
 * durable end covers the frame.  All is asynchronous (uring.h); the engine's
 * loop drives it:
 *
 *		if (es_log_sync_due())		timer, es_log_want_sync, or 16 MB of PostgreSQL's WAL
 *			es_log_sync_begin();	reads F, then all floors
 *		es_collect_drain();		what the queues held becomes frames
 *		es_log_sync_fix(oldest);	only if the drain was complete; oldest: start of the oldest message that
 *									the engine holds and that is in no frame (spilling), 0 = none
 *		es_log_tick();				issues groups, syncs, control blocks
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_LOG_H
#define ES_SHARD_LOG_H

#include "postgres.h"

#include "shard/files.h"

/*
 * Reads own WAL from the oldest needed file to the durable end and calls back for each
 * frame with its own LSN's end.  A bad frame before the durable end is an ERROR (XX001,
 * file and offset).
 */
typedef void (*EsFrameCallback)(const EsFrameHeader *header, const void *payload, EsOwnLsn end);
extern void es_log_replay(const EsShardFiles *files, EsFrameCallback callback);

/*
 * Starts writing: a new file (never an old one), and a synced "not clean" control block
 * before it returns.  incarnation is the shard's generation.
 */
extern void es_log_open(const EsShardFiles *files, uint64 incarnation);

/*
 * Queues a frame; copies the payload.  pg_end must be flushed before it is written
 * (0 = at once).  Returns its ticket.
 */
extern uint64
es_log_append(EsFrameType type, EsFxid fxid, EsLsn pg_start, EsLsn pg_end, const void *payload, uint32 len);

extern uint64 es_log_last_ticket(void);
extern uint64 es_log_durable_ticket(void);

/*
 * A boundary between what was appended so far and what comes: returns an id;
 * es_log_boundary_lsn(id) is the own LSN of the boundary once everything before it is durable,
 * else 0.  The boundary falls between two groups.
 */
extern uint64	es_log_boundary(void);
extern EsOwnLsn es_log_boundary_lsn(uint64 id);

/* A sync soon (flush, SYNC, stopping) instead of at the next interval. */
extern void es_log_want_sync(void);
extern bool es_log_sync_due(void);
extern void es_log_sync_begin(void);
extern void es_log_sync_fix(EsLsn oldest_unframed);
/* Number of syncs that were completed; a sync that begins after now has number
 * es_log_syncs_begun() + 1. */
extern uint64 es_log_syncs_begun(void);
extern uint64 es_log_syncs_done(void);

extern void es_log_tick(void);
/* ms until the log wants to be called again although nothing happens, -1 = never */
extern long es_log_timeout(void);

/*
 * Recovery: PostgreSQL's WAL below `upto` was given up (release_wal).  restart_lsn
 * moves there with the next sync, and the control block keeps a note until a clean stop.
 */
extern void es_log_give_up(EsLsn upto);

/* Restart LSN and durable end of the last synced control block. */
extern EsLsn es_log_restart_lsn(void);
extern EsLsn es_log_flush_distance(EsLsn flushed);

/*
 * The engine no longer needs frames before own LSN `from` (they are in segments
 * or carried over behind it); files are recycled or removed once they also
 * have no frame with a start at or above the durable restart_lsn.
 */
extern void es_log_release(EsOwnLsn from);

/* Bytes of frames that wait for PostgreSQL's flush or for the disk. */
extern Size es_log_queued_bytes(void);

/* 0, or the errno that keeps the log from writing (ENOSPC...); it retries by itself each second. */
extern int es_log_stuck_errno(void);

/*
 * Stopping: everything is durable, writes a clean control block (blocking).  False: the log was stuck for 10 s, and
 * nothing is clean; to be called again, unless the server does not wait.
 */
extern bool es_log_close_clean(EsPosition next_position);

#endif /* ES_SHARD_LOG_H */
