/*-------------------------------------------------------------------------
 *
 * engine.h
 *	  What the shard's modules call of each other; each block names its file.
 *	  Handlers of requests answer through es_conn_send and never throw for what
 *	  a client can cause.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_ENGINE_H
#define ES_SHARD_ENGINE_H

#include "postgres.h"

#include "core/message.h"
#include "ipc/protocol.h"
#include "ipc/server.h"
#include "shard/memtable.h"
#include "shard/segments.h"
#include "shard/txn.h"

/* ---- apply.c: BATCH, FINISH, verdicts; used by the queues and by recovery ---- */

/* Stages a batch (copied into the arena).  Known by start: the second time is a no-op.  own WAL gets
 * a frame unless from_own_wal, or the transaction spills.  False: no memory (queues: the message is
 * retried after memory is there). */
extern bool
es_apply_batch(EsFxid fxid, EsLsn start, EsLsn end, const void *batch, size_t len, bool from_own_wal);

/*
 * Applies FINISHes.  Within one drain they are collected and applied in the order of
 * their starts: per context that is the order of the locks.  Assigns versions, moves
 * live batches to the active MemTable, drops the dead ones.
 */
extern bool es_apply_finish(EsFxid fxid, EsLsn start, EsLsn end, const EsSectionHeader *section, size_t len,
							bool from_own_wal);

extern void es_apply_resolve(EsFxid fxid, bool committed, EsLsn commit_end);

/* Once a second: asks CLOG for every undecided transaction, appends RESOLVED frames for
 * those whose verdict is durable, frees what is dead. */
extern void es_apply_poll_verdicts(bool all);

/* Start of the oldest message that is held in memory only and will not get a frame (spilling);
 * 0 = none. */
extern EsLsn es_apply_oldest_unframed(void);

/* ---- recovery.c ---- */

/* Own files, own WAL, PostgreSQL's WAL; when it returns the shard may open its queues.
 * ERROR (caught by worker.c: the shard becomes FAILED with the reason) if it must not open. */
extern void	 es_recover(void);
extern bool	 es_recovery_carry(void); /* at a flush's boundary: FINISHes that recovery has not applied yet */
extern EsLsn es_recovery_end;		  /* E: messages that end at or before are dropped from queues */

/* ---- heads.c: last version and position of contexts, event ids; PREPARE and HEAD ---- */

typedef struct EsHead
{
	int64	   version; /* 0 = no committed event */
	EsPosition position;
	EsFxid	   fxid; /* 0 = older than any snapshot may care */
} EsHead;

/*
 * Last committed version of a context.  An undecided transaction that wrote to it is asked for
 * (the context's lock makes sure that it is decided, but for a reader's own); one that is still in progress
 * does not count.  Memory-bounded cache in front of MemTables and segments.  False: damage, *err and *path say where.
 */
extern bool es_head_lookup(const EsTableKey *table, uint64 hash, const void *bytes, size_t len, EsHead *head,
						   EsError *err, const char **path);

/* The same for one of very many contexts: what is found is not kept in the cache. */
extern bool es_head_search(const EsTableKey *table, uint64 hash, const void *bytes, size_t len, EsHead *head,
						   EsError *err, const char **path);

/* FINISH gave versions up to `version` to the context; remembered under the transaction until it
 * is decided. */
extern void es_head_advance(const EsTableKey *table, uint64 hash, const void *bytes, size_t len, EsTxn *txn,
							int64 version, EsPosition position);
extern void es_heads_forget_storage(const EsTableKey *table);

extern void es_handle_prepare(EsConn *conn, const EsPrepareRequest *req, Size len);
extern void es_handle_head(EsConn *conn, const EsHeadRequest *req, Size len);

/* ---- scan.c: OPEN, FETCH, CLOSE ---- */

extern void es_handle_open(EsConn *conn, const EsOpenRequest *req, Size len);
extern void es_handle_fetch(EsConn *conn, const EsRequest *req);
/* Closes scan or wait `id` of this connection (0 = all). */
extern void es_scan_close(EsConn *conn, uint64 id);
/* Runs ready scans for at most about max_us microseconds; true if some still have work that
 * does not wait for their reader. */
extern bool es_scan_run(int64 max_us);

/* ---- stat.c: STAT, VERIFY, UNDECIDED ---- */

extern void es_handle_stat(EsConn *conn, const EsStatRequest *req);
extern void es_handle_verify(EsConn *conn, const EsRequest *req);
extern void es_handle_undecided(EsConn *conn, const EsRequest *req);

/* ---- wait.c ---- */

extern void es_handle_wait(EsConn *conn, const EsWaitRequest *req, Size len);
extern void es_wait_close(EsConn *conn, uint64 id);
/* Rows of a transaction became decided: looks at waiters; returns ms to the next deadline, -1 = none. */
extern void es_wait_notice(void);
extern long es_wait_tick(void);

/* ---- flush.c: MemTable -> segments, spills, adoption, storages that are dead ---- */

extern void es_flush_init(void);
/* Goes on with whatever is under way: turns a full or old MemTable passive, posts jobs, takes finished ones,
 * manifest records, new views, releases own WAL.  The loop calls it. */
extern void es_flush_tick(void);
extern long es_flush_timeout(void);
/* FLUSH request: answered when all that was committed before lies in segments. */
extern void es_handle_flush(EsConn *conn, const EsFlushRequest *req);
/* Transaction `txn` has more staged than it may: spill. */
extern void es_flush_consider_spill(EsTxn *txn);
/* FINISH of a transaction with pending segments: computes adoption data (apply.c calls it);
 * on commit (durable) the manifest gets ADOPT, on abort DROP. */
extern void es_flush_finish_pending(EsTxn *txn, const EsSectionHeader *section);
/* A slice of that work, before anything else of the FINISH is done.  False: not yet, the FINISH waits and
 * comes again.  Is one at work? */
extern bool es_flush_finish_slice(EsTxn *txn, const EsSectionHeader *section);
extern bool es_flush_finishing(void);
extern void es_flush_txn_decided(EsTxn *txn);
/* Recovery, for the transaction of each frame: gives it back segments that were adopted already, so that their
 * batches are not adopted again. */
extern void es_adopt_recall(EsTxn *txn);
/* Recovery is done. */
extern void es_adopt_recovered(void);
/* Recovery: belongs an adopted segment to a FINISH that has not been replayed yet? */
extern bool es_adopt_ahead(const EsSegmentRef *ref);
extern void es_handle_drop_storage(EsConn *conn, const EsDropRequest *req);
extern void es_flush_conn_closed(EsConn *conn);
/* Memory is short of what flushes and spills free: leave BATCH and FINISH in their queues. */
/* Turns the active MemTable passive although it is neither full nor old. */
extern void es_flush_soon(void);
extern bool es_flush_overloaded(void);
extern int	es_flush_stuck_errno(void);
/* Stopping: is everything that may be in segments there? */
extern bool es_flush_idle(void);

#endif /* ES_SHARD_ENGINE_H */
