/*-------------------------------------------------------------------------
 *
 * txn.h
 *	  Transactions as a shard knows them: staged batches, FINISH, verdict.
 *
 * Life: first BATCH or FINISH makes the entry (RUNNING: rows are staged); FINISH
 * moves the live batches to the active MemTable (FINISHED: undecided); the
 * verdict comes from CLOG (DECIDED).  An aborted transaction's staged batches and
 * MemTable batches are dead.  The entry is freed when it is decided, its verdict is durable
 * in own WAL (or it left nothing there), and no MemTable batch, pending segment or scan refers
 * to it (refs).
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_TXN_H
#define ES_SHARD_TXN_H

#include "postgres.h"

#include "lib/ilist.h"
#include "nodes/pg_list.h"
#include "utils/dsa.h"

#include "core/arith.h"
#include "core/batch.h"
#include "core/message.h"

struct EsTxn;

/*
 * A batch in the arena: staged, or adopted into a MemTable.  Shared by reference
 * count between the transaction's staging list, MemTables and jobs.
 */
typedef struct EsMemBatch
{
	int			  refs;
	dsa_pointer	  pointer; /* the batch's bytes in the arena; 0 = they are private memory */
	EsBatchView	  view;	   /* trusted */
	struct EsTxn *txn;	   /* holds one of its refs */
	EsLsn		  start;   /* of its message; an inline batch has the FINISH's start */
	EsLsn		  end;
	uint32		  inline_index; /* 0 = logged by itself, else 1 + index in the FINISH's table */
	uint64		  ticket;		/* of its frame in own WAL; 0 = none (yet, or spilled) */

	/* set by FINISH */
	EsPosition	 base;		   /* position = base + ordinal unless GIVEN_POSITIONS */
	uint32		 finish_flags; /* ES_FINISH_* of its table */
	dsa_pointer	 versions;	   /* int64[nrows], 0 = table without versions, or private memory */
	const int64 *versions_local;
	dsa_pointer	 skip; /* bitmap of rows not taken; 0 = all taken, or private memory */
	const uint8 *skip_local;

	uint64			   moved_to; /* id of the MemTable it was carried over to; 0 = none */
	struct EsMemBatch *origin;	 /* carried over: whose memory this one shows, with a reference; else NULL */
	dlist_node		   node;	 /* in EsTxn.staged */

	/* private to txn.c, arena.c, apply.c and finish.c */
	bool				 in_staging;  /* in EsTxn.staged, which holds one ref */
	bool				 unframed;	  /* in es_txn_unframed: no frame in own WAL yet */
	Size				 memory;	  /* bytes it takes, structs and arrays included */
	struct EsArenaChunk *chunk;		  /* of pointer; NULL = allocated by itself */
	void				*extra_local; /* versions and skip of a batch that was staged first */
	dsa_pointer			 extra;
	struct EsArenaChunk *extra_chunk;
	dlist_node			 unframed_node;
} EsMemBatch;

typedef struct EsTxn
{
	EsFxid	   fxid; /* hash key */
	int		   refs;
	EsVerdict  verdict;
	bool	   finished;		/* FINISH was applied */
	bool	   verdict_durable; /* commit record flushed (committed) */
	bool	   resolved_logged; /* RESOLVED frame appended */
	EsLsn	   commit_end;		/* from RESOLVE or CLOG; 0 = unknown */
	EsPosition base;
	EsLsn	   finish_start;
	EsLsn	   finish_end;
	dlist_head staged; /* EsMemBatch, in the order of their ordinals per table */
	Size	   staged_bytes;
	uint64	   staged_rows;
	bool	   spilling;	/* a SPILL job runs */
	List	  *pending;		/* EsSegmentRef * of its pending segments (segments.h) */
	Size	   adopt_bytes; /* at most, of a manifest record that adopts those made by this incarnation */
	dlist_node node;		/* in the list of undecided ones */

	/* private to txn.c, apply.c, finish.c and verdict.c */
	bool   listed;		  /* in es_txn_undecided, which holds one ref */
	bool   big;			  /* passed spill_after: its batches get no frames */
	bool   counted;		  /* in staged_transactions */
	uint64 finish_ticket; /* of the FINISH frame in own WAL; 0 = none */
	uint64 commit_drain;  /* committed, not finished: complete drains until then */
	bool   forgotten;	  /* older than what CLOG has: aborted, or of a storage that is dead */
} EsTxn;

extern void	  es_txn_init(void);
extern EsTxn *es_txn_find(EsFxid fxid); /* NULL if unknown */
extern EsTxn *es_txn_get(EsFxid fxid);	/* made if need be */
extern void	  es_txn_ref(EsTxn *txn);
extern void	  es_txn_unref(EsTxn *txn);

/* The verdict as known now: asks CLOG (in progress first, oldestClogXid under XactTruncationLock)
 * if it is not known yet.  A transaction that is still in progress is UNKNOWN. */
extern EsVerdict es_txn_verdict(EsTxn *txn);

/* Is the verdict durable (commit record flushed)?  Nudges PostgreSQL's WAL writer if not. */
extern bool es_txn_verdict_durable(EsTxn *txn);

extern void es_membatch_ref(EsMemBatch *b);
extern void es_membatch_unref(EsMemBatch *b);

/*
 * Takes a batch out of its transaction's staging (adopted, spilled or dead): counters and
 * the staging's reference go.  The caller holds a reference of its own if it goes on using it.
 */
extern void es_txn_unstage(EsMemBatch *b);

/* Staged batches that have no frame in own WAL: restart_lsn waits for them. */
extern dlist_head es_txn_unframed;

/* A verdict came true elsewhere than in es_txn_verdict: RESOLVED frames of own WAL. */
extern void es_txn_set_verdict(EsTxn *txn, bool committed, EsLsn commit_end);

/*
 * The transaction is settled but for the frame with this ticket: until that is durable
 * es_txn_oldest_undecided stays at or below it.  Takes it out of es_txn_undecided.
 */
extern void es_txn_settle(EsTxn *txn, uint64 ticket);

/* PostgreSQL's flush pointer, as read at most once per turn of the loop. */
extern EsLsn es_flushed_lsn(void);
extern void	 es_flushed_lsn_refresh(void);

static inline bool
es_membatch_skipped(const EsMemBatch *b, uint32 row)
{
	return b->skip_local != NULL && (b->skip_local[row >> 3] >> (row & 7)) & 1;
}

/* Of a finished batch. */
extern EsPosition es_membatch_position(const EsMemBatch *b, uint32 row);
/* 0 = the table has no versions. */
extern int64 es_membatch_version(const EsMemBatch *b, uint32 row);

/* Undecided transactions, oldest first; the oldest fxid without durable verdict. */
extern dlist_head es_txn_undecided;
extern EsFxid	  es_txn_oldest_undecided(void);

/* Is start among these, which ascend: batches of a pending segment, or those that a reader says are dead? */
extern bool es_start_in(const EsLsn *starts, uint32 n, EsLsn start);

#endif /* ES_SHARD_TXN_H */
