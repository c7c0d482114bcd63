/*-------------------------------------------------------------------------
 *
 * txn.c
 *	  Transactions as a shard knows them, and their batches in memory: the table
 *	  of transactions, reference counts, verdicts.
 *
 * References.  An EsTxn is held by the list of undecided transactions until it is
 * settled, by each of its batches in memory, by its pending segments and by scans.
 * The last one to let go frees it.  An EsMemBatch is held by the transaction's staging,
 * by each MemTable that has it, and by scans and jobs that read it.
 *
 * Verdicts.  CLOG is the only judge (PROTOCOL.md 3, 5.5).  First the process array is
 * asked whether the transaction runs, then CLOG whether it committed: the other
 * order would take a commit that happens in between for an abort.  A shard
 * has no snapshot, so two things that backends get for free are done here:
 *	 - TransactionIdIsInProgress trusts RecentXmin, which only snapshots move.  A
 *	   value that is 2^31 transactions old would declare running transactions
 *	   ended, so it is set to the xid in question, which switches the short cut off.
 *	 - CLOG may have been truncated past a quiet xid, so the look-up
 *	   happens under XactTruncationLock after a comparison with oldestClogXid in full xids.
 *	   What is older never committed with events of a living table, because
 *	   VACUUM asks the shards before it moves relfrozenxid.
 *
 * A verdict is durable when the commit record is flushed; an abort always is, since
 * a crash turns a transaction without commit record into an aborted one.
 *
 * Settling.  A transaction that left a FINISH in own WAL is settled when its RESOLVED
 * frame is durable: only then may CLOG forget it.  Between the append and
 * that moment it waits in a queue ordered by ticket, as a pair (xid, ticket), while the
 * EsTxn itself may already be gone.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/clog.h"
#include "access/transam.h"
#include "access/xlog.h"
#include "storage/lwlock.h"
#include "storage/procarray.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "ipc/fault.h"
#include "shard/arena.h"
#include "shard/log.h"
#include "shard/segments.h"
#include "shard/shard.h"
#include "shard/txn.h"

/* ms */
#define NUDGE_INTERVAL 50

typedef struct TxnEntry
{
	EsFxid fxid;
	EsTxn *txn;
	char   status;
} TxnEntry;

static inline uint32
txn_hash(EsFxid fxid)
{
	return (uint32) ((fxid * UINT64CONST(0x9E3779B97F4A7C15)) >> 32);
}

#define SH_PREFIX			 txntable
#define SH_ELEMENT_TYPE		 TxnEntry
#define SH_KEY_TYPE			 EsFxid
#define SH_KEY				 fxid
#define SH_HASH_KEY(tb, key) txn_hash(key)
#define SH_EQUAL(tb, a, b)	 ((a) == (b))
#define SH_SCOPE			 static inline
#define SH_DECLARE
#define SH_DEFINE
#include "lib/simplehash.h"

/* A transaction whose RESOLVED frame is not durable yet. */
typedef struct Settling
{
	EsFxid fxid;
	uint64 ticket;
} Settling;

dlist_head es_txn_undecided = DLIST_STATIC_INIT(es_txn_undecided);
dlist_head es_txn_unframed = DLIST_STATIC_INIT(es_txn_unframed);

static txntable_hash *txns;
static MemoryContext  txn_context;

/* A ring of Settling, oldest first. */
static Settling *settling;
static uint32	 settling_size; /* power of two */
static uint32	 settling_first;
static uint32	 settling_count;

static XLogRecPtr flushed_lsn;

void
es_txn_init(void)
{
	txn_context = SlabContextCreate(TopMemoryContext, "event_store transactions", SLAB_LARGE_BLOCK_SIZE / 16,
									sizeof(EsTxn));
	txns = txntable_create(TopMemoryContext, 1024, NULL);
	settling_size = 1024;
	settling = MemoryContextAlloc(TopMemoryContext, settling_size * sizeof(Settling));
}

EsTxn *
es_txn_find(EsFxid fxid)
{
	TxnEntry *e = txntable_lookup(txns, fxid);

	return e ? e->txn : NULL;
}

EsTxn *
es_txn_get(EsFxid fxid)
{
	bool		found;
	TxnEntry   *e;
	EsTxn	   *txn;
	dlist_node *after;

	/* Nothing that can fail stands between entering the key and giving it a value. */
	txn = es_txn_find(fxid);
	if (txn != NULL)
		return txn;
	txn = MemoryContextAllocZero(txn_context, sizeof(EsTxn));
	e = txntable_insert(txns, fxid, &found);
	Assert(!found);
	e->txn = txn;

	txn->fxid = fxid;
	txn->refs = 1; /* of the list */
	txn->listed = true;
	dlist_init(&txn->staged);

	/* Oldest first; almost always it is the youngest. */
	after = &es_txn_undecided.head;
	if (!dlist_is_empty(&es_txn_undecided))
		for (after = es_txn_undecided.head.prev;
			 after != &es_txn_undecided.head && dlist_container(EsTxn, node, after)->fxid > fxid;
			 after = after->prev)
			;
	if (after == &es_txn_undecided.head)
		dlist_push_head(&es_txn_undecided, &txn->node);
	else
		dlist_insert_after(after, &txn->node);
	return txn;
}

void
es_txn_ref(EsTxn *txn)
{
	txn->refs++;
}

void
es_txn_unref(EsTxn *txn)
{
	Assert(txn->refs > 0);
	if (--txn->refs > 0)
		return;
	Assert(!txn->listed);
	Assert(dlist_is_empty(&txn->staged));
	txntable_delete(txns, txn->fxid);
	list_free(txn->pending);
	pfree(txn);
}

/* ---- verdicts ---- */

/*
 * Is fxid behind the horizon of CLOG?  Caller holds XactTruncationLock.
 * oldestClogXid lies within 2^31 of the next xid, so that its epoch is known.
 */
static bool
clog_forgot(EsFxid fxid)
{
	FullTransactionId next = ReadNextFullTransactionId();
	EsFxid			  oldest = es_widen_xid(U64FromFullTransactionId(next), es_oldest_clog_xid());

	return fxid < oldest;
}

EsVerdict
es_txn_verdict(EsTxn *txn)
{
	TransactionId xid = (TransactionId) txn->fxid;

	if (txn->verdict != ES_VERDICT_UNKNOWN)
		return txn->verdict;

	RecentXmin = xid;
	if (TransactionIdIsInProgress(xid))
		return ES_VERDICT_UNKNOWN;

	LWLockAcquire(XactTruncationLock, LW_SHARED);
	ES_FAULT_ERROR("verdict-asked");
	if (clog_forgot(txn->fxid))
	{
		txn->verdict = ES_VERDICT_ABORTED;
		txn->forgotten = true;
	}
	else if (TransactionIdDidCommit(xid))
	{
		/* 0 if the page went to disk since, which flushed WAL first; this may read the page again, and throw */
		if (txn->commit_end == 0)
		{
			txn->commit_end = TransactionIdGetCommitLSN(xid);
			if (txn->commit_end == 0)
				txn->verdict_durable = true;
		}
		txn->verdict = ES_VERDICT_COMMITTED;
	}
	else
		txn->verdict = ES_VERDICT_ABORTED;
	LWLockRelease(XactTruncationLock);

	return txn->verdict;
}

void
es_txn_set_verdict(EsTxn *txn, bool committed, EsLsn commit_end)
{
	txn->verdict = committed ? ES_VERDICT_COMMITTED : ES_VERDICT_ABORTED;
	txn->commit_end = commit_end;
	txn->verdict_durable = true;
}

/*
 * Asks the WAL writer to flush.  The committing backend has done so already; this is
 * for a WAL writer that did not listen, so now and then is enough.
 */
static void
nudge_flush(EsLsn end)
{
	static TimestampTz nudged = 0;
	TimestampTz		   now = GetCurrentTimestamp();

	if (!TimestampDifferenceExceeds(nudged, now, NUDGE_INTERVAL))
		return;
	nudged = now;
	XLogSetAsyncXactLSN(end);
}

bool
es_txn_verdict_durable(EsTxn *txn)
{
	if (txn->verdict_durable)
		return true;
	switch (es_txn_verdict(txn))
	{
		case ES_VERDICT_UNKNOWN:
			return false;
		case ES_VERDICT_ABORTED:
			txn->verdict_durable = true;
			return true;
		case ES_VERDICT_COMMITTED:
			break;
	}
	if (txn->verdict_durable || txn->commit_end <= es_flushed_lsn())
	{
		txn->verdict_durable = true;
		return true;
	}
	nudge_flush(txn->commit_end);
	return false;
}

EsLsn
es_flushed_lsn(void)
{
	if (flushed_lsn == 0)
		flushed_lsn = GetFlushRecPtr(NULL);
	return flushed_lsn;
}

void
es_flushed_lsn_refresh(void)
{
	flushed_lsn = 0;
}

/* ---- settling ---- */

void
es_txn_settle(EsTxn *txn, uint64 ticket)
{
	if (ticket != 0)
	{
		if (settling_count == settling_size)
		{
			Settling *larger =
				MemoryContextAllocHuge(TopMemoryContext, (Size) settling_size * 2 * sizeof(Settling));

			for (uint32 i = 0; i < settling_count; i++)
				larger[i] = settling[(settling_first + i) & (settling_size - 1)];
			pfree(settling);
			settling = larger;
			settling_size *= 2;
			settling_first = 0;
		}
		settling[(settling_first + settling_count) & (settling_size - 1)] =
			(Settling){.fxid = txn->fxid, .ticket = ticket};
		settling_count++;
	}
	Assert(txn->listed);
	txn->listed = false;
	dlist_delete(&txn->node);
	es_txn_unref(txn);
}

EsFxid
es_txn_oldest_undecided(void)
{
	EsFxid oldest = U64FromFullTransactionId(ReadNextFullTransactionId());
	uint64 durable = es_log_durable_ticket();

	if (!dlist_is_empty(&es_txn_undecided))
		oldest = Min(oldest, dlist_head_element(EsTxn, node, &es_txn_undecided)->fxid);

	while (settling_count > 0 && settling[settling_first].ticket <= durable)
	{
		settling_first = (settling_first + 1) & (settling_size - 1);
		settling_count--;
	}
	for (uint32 i = 0; i < settling_count; i++)
		oldest = Min(oldest, settling[(settling_first + i) & (settling_size - 1)].fxid);
	return oldest;
}

/* ---- batches ---- */

void
es_membatch_ref(EsMemBatch *b)
{
	b->refs++;
}

void
es_membatch_unref(EsMemBatch *b)
{
	Assert(b->refs > 0);
	if (--b->refs > 0)
		return;
	Assert(!b->in_staging);
	if (b->unframed)
		dlist_delete(&b->unframed_node);
	if (b->origin != NULL)
		es_membatch_unref(b->origin);
	else
	{
		es_arena_release((void *) b->view.base, b->pointer, b->chunk);
		if (b->extra_local != NULL)
			es_arena_release(b->extra_local, b->extra, b->extra_chunk);
	}
	es_txn_unref(b->txn);
	pfree(b);
}

void
es_txn_unstage(EsMemBatch *b)
{
	EsTxn *txn = b->txn;
	uint32 nrows = b->view.header->nrows;

	Assert(b->in_staging);
	b->in_staging = false;
	dlist_delete(&b->node);
	txn->staged_bytes -= b->memory;
	txn->staged_rows -= nrows;
	ES_COUNT(staged_rows, -(int64) nrows);
	ES_COUNT(staged_bytes, -(int64) b->memory);
	if (txn->counted && dlist_is_empty(&txn->staged))
	{
		txn->counted = false;
		ES_COUNT(staged_transactions, -1);
	}
	es_membatch_unref(b);
}

EsPosition
es_membatch_position(const EsMemBatch *b, uint32 row)
{
	if (b->finish_flags & ES_FINISH_GIVEN_POSITIONS)
	{
		int	  column = b->view.header->roles.position - 1;
		int64 given;

		/* a rewrite copies rows of its own transaction, too, and they have none yet */
		if (column >= 0 && !es_batch_is_null(&b->view, column, row))
		{
			memcpy(&given, es_batch_value(&b->view, column, row), sizeof(given));
			return (EsPosition) given;
		}
	}
	return b->base + es_batch_ordinal(&b->view, row);
}

int64
es_membatch_version(const EsMemBatch *b, uint32 row)
{
	if (b->versions_local)
		return b->versions_local[row];
	if (b->finish_flags & ES_FINISH_GIVEN_VERSIONS)
	{
		int	  column = b->view.header->roles.version - 1;
		int64 given;

		if (column < 0 || es_batch_is_null(&b->view, column, row))
			return 0;
		memcpy(&given, es_batch_value(&b->view, column, row), sizeof(given));
		return given;
	}
	return 0;
}

bool
es_start_in(const EsLsn *starts, uint32 n, EsLsn start)
{
	uint32 low = 0;
	uint32 high = n;

	/* mostly it is not there: the next batch of a transaction starts behind all that it has spilled */
	if (n == 0 || start < starts[0] || start > starts[n - 1])
		return false;
	while (low < high)
	{
		uint32 middle = low + (high - low) / 2;

		if (starts[middle] < start)
			low = middle + 1;
		else
			high = middle;
	}
	return starts[low] == start;
}
