/*-------------------------------------------------------------------------
 *
 * apply.h
 *	  What apply.c, finish.c, versions.c, verdict.c, recovery.c and worker.c share.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_APPLY_H
#define ES_SHARD_APPLY_H

#include "postgres.h"

#include "shard/engine.h"

/* One live batch of a FINISH. */
typedef struct EsLive
{
	EsMemBatch *batch;	  /* the caller holds a ref */
	int64	   *versions; /* to be filled; NULL = none wanted */
	uint8	   *skip;	  /* filled already; NULL = all taken */
} EsLive;

/* A batch struct around bytes in the arena; refs = 1. */
extern EsMemBatch *es_membatch_create(EsTxn *txn, EsLsn start, EsLsn end, void *local, dsa_pointer pointer,
									  struct EsArenaChunk *chunk, Size memory);

/* versions.c: gives the rows of one table their versions, checks them against what
 * PREPARE said, tells heads.c. */
extern void es_assign_versions(EsTxn *txn, const EsFinishTableView *view, EsLive *live, uint32 nlive);

/* Is the batch held by one of the transaction's pending segments?  Quick for one that is younger than they are. */
extern bool es_txn_pending_has(EsTxn *txn, EsLsn start);
/* The same for many batches of one transaction, as a FINISH lists them; with an index, to be forgotten then. */
extern bool es_txn_pending_find(EsTxn *txn, EsLsn start);
extern void es_txn_pending_forget(void);

/*
 * Are all batches that the FINISH lists staged or in pending segments?  Not after a crash, if they were
 * to spill: PostgreSQL's WAL has them, and the FINISH behind them.
 */
extern bool es_finish_complete(EsTxn *txn, const EsSectionHeader *section, size_t len);

/* release_wal: earlier events are lost, so versions are what FINISH promised. */
extern bool es_versions_as_promised;

/* Drops what is staged: dead batches. */
extern void es_apply_drop_staged(EsTxn *txn);

/* Total staged bytes are beyond the limit: spills the largest transactions. */
extern void es_apply_limit_staging(void);

/* Verdicts (verdict.c). */

/* Number of drains that were complete and whose FINISHes are all applied; worker.c. */
extern uint64 es_complete_drains;

/* Something was decided since the last call? */
extern bool es_verdicts_changed(void);
/* Some transaction committed, but its commit record is not flushed. */
extern bool es_verdicts_unflushed(void);
/* One transaction, right after RESOLVE. */
extern void es_verdict_settle(EsTxn *txn);

/* Highest position seen in any FINISH; highest end of any message or commit record. */
extern EsPosition es_apply_highest_position;
extern EsLsn	  es_apply_highest_end;

/* wait.c: rows were adopted that someone may wait for. */
extern int	es_wait_count;
extern void es_wait_batch(EsMemBatch *b);
extern void es_wait_pending(EsTxn *txn);

/* worker.c: one turn of everything but the queues, for recovery. */
extern void es_worker_housekeeping(void);
/* The same in a loop until memory is below its limits. */
extern void es_worker_make_room(void);
extern bool es_worker_overloaded(void);

#endif /* ES_SHARD_APPLY_H */
