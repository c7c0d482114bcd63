/*-------------------------------------------------------------------------
 *
 * apply.c
 *	  BATCH: rows of a transaction that has not finished are staged.
 *
 * A batch is copied once, into the arena, and its bytes stay there until its rows
 * are in a segment or dead: staging, MemTable and maintenance jobs pass the same
 * copy on by reference.  Staged batches stand in the order of their starts, which is the
 * order in which the backend logged them, so that FINISH finds them by
 * bisection and a message that comes twice is noticed.
 *
 * A batch gets its frame in own WAL when it arrives, unless its transaction is big:
 * beyond event_store.spill_after staged bytes the following batches go to a
 * pending segment and never to own WAL, so that a bulk load is written once.  Until the manifest names
 * that segment the only durable copy is in PostgreSQL's WAL, and restart_lsn waits
 * for the oldest of them (es_apply_oldest_unframed).
 *
 * Staging as a whole is bounded by event_store.staging_size: beyond it the
 * largest transaction spills although it is not big by itself.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <stdlib.h>

#include "utils/memutils.h"

#include "guc.h"
#include "ipc/fault.h"
#include "shard/apply.h"
#include "shard/arena.h"
#include "shard/log.h"
#include "shard/segments.h"
#include "shard/shard.h"

EsLsn es_apply_highest_end = 0;

static MemoryContext batch_context;

EsMemBatch *
es_membatch_create(EsTxn *txn, EsLsn start, EsLsn end, void *local, dsa_pointer pointer,
				   struct EsArenaChunk *chunk, Size memory)
{
	EsMemBatch *b;

	if (batch_context == NULL)
		batch_context = SlabContextCreate(TopMemoryContext, "event_store batches", SLAB_LARGE_BLOCK_SIZE / 16,
										  sizeof(EsMemBatch));
	b = MemoryContextAllocZero(batch_context, sizeof(EsMemBatch));
	b->refs = 1;
	b->txn = txn;
	es_txn_ref(txn);
	b->start = start;
	b->end = end;
	b->pointer = pointer;
	b->chunk = chunk;
	b->memory = memory + sizeof(EsMemBatch);
	es_batch_open_trusted(local, &b->view);
	return b;
}

/*
 * A structure that the sender's own process made does not fit: a bug or bad
 * memory.  Never adopt it; the restarted shard reads PostgreSQL's WAL, whose CRCs tell.
 */
static void
malformed(const char *what, EsFxid fxid, EsLsn start, const EsError *err)
{
	ereport(ERROR, (errcode(ERRCODE_DATA_CORRUPTED),
					errmsg("shard %d got a malformed %s of transaction %llu", es_shard_id, what,
						   (unsigned long long) fxid),
					errdetail("Message at %X/%X of PostgreSQL's WAL, offset %llu: %s.",
							  LSN_FORMAT_ARGS(start), (unsigned long long) err->offset, err->what)));
}

static int
compare_starts(const void *x, const void *y)
{
	uint64 a = *(const uint64 *) x;
	uint64 b = *(const uint64 *) y;

	return a < b ? -1 : a > b;
}

bool
es_txn_pending_has(EsTxn *txn, EsLsn start)
{
	ListCell *lc;

	foreach(lc, txn->pending)
	{
		const EsManifestEntry *e = &((EsSegmentRef *) lfirst(lc))->entry;

		/* a spill takes them in their order; almost always this batch is the youngest */
		if (es_start_in(e->starts, e->nstarts, start))
			return true;
	}
	return false;
}

/* Starts of the batches in one transaction's pending segments, ascending. */
static struct
{
	EsFxid	fxid;
	int		nrefs; /* how many segments it had then */
	uint64 *starts;
	uint32	n;
} found;

void
es_txn_pending_forget(void)
{
	if (found.starts != NULL)
		pfree(found.starts);
	memset(&found, 0, sizeof(found));
}

bool
es_txn_pending_find(EsTxn *txn, EsLsn start)
{
	if (found.starts == NULL || found.fxid != txn->fxid || found.nrefs != list_length(txn->pending))
	{
		Size	  n = 0;
		ListCell *lc;

		es_txn_pending_forget();
		foreach(lc, txn->pending)
			n += ((EsSegmentRef *) lfirst(lc))->entry.nstarts;
		found.starts = MemoryContextAllocHuge(TopMemoryContext, Max(n, 1) * sizeof(uint64));
		found.fxid = txn->fxid;
		found.nrefs = list_length(txn->pending);
		foreach(lc, txn->pending)
		{
			const EsManifestEntry *e = &((EsSegmentRef *) lfirst(lc))->entry;

			if (e->nstarts > 0)
				memcpy(found.starts + found.n, e->starts, e->nstarts * sizeof(uint64));
			found.n += e->nstarts;
		}
		qsort(found.starts, found.n, sizeof(uint64), compare_starts);
	}
	return es_start_in(found.starts, found.n, start);
}

bool
es_apply_batch(EsFxid fxid, EsLsn start, EsLsn end, const void *batch, size_t len, bool from_own_wal)
{
	EsTxn				*txn = es_txn_get(fxid);
	EsMemBatch			*b;
	EsBatchView			 view;
	EsError				 err;
	dlist_node			*after = NULL;
	struct EsArenaChunk *chunk;
	dsa_pointer			 pointer;
	void				*local;
	Size				 size;

	es_apply_highest_end = Max(es_apply_highest_end, end);

	/* FINISH names the batches that live: what comes after it is not among them or is known. */
	if (txn->finished || txn->verdict == ES_VERDICT_ABORTED)
		return true;

	if (!dlist_is_empty(&txn->staged))
		for (after = txn->staged.head.prev; after != &txn->staged.head; after = after->prev)
		{
			EsMemBatch *other = dlist_container(EsMemBatch, node, after);

			if (other->start == start)
				return true;
			if (other->start < start)
				break;
		}
	if (txn->pending != NIL && es_txn_pending_has(txn, start))
		return true;

	if (es_batch_open(batch, len, &view, &err) != ES_OK)
		malformed("batch", fxid, start, &err);
	size = view.header->total_len;

	local = es_arena_carve(ES_ARENA_STAGED, size, &pointer, &chunk);
	if (local == NULL)
		return false;
	memcpy(local, batch, size);
	b = es_membatch_create(txn, start, end, local, pointer, chunk, size);

	if (after == NULL || after == &txn->staged.head)
		dlist_push_head(&txn->staged, &b->node);
	else
		dlist_insert_after(after, &b->node);
	b->in_staging = true;
	if (!txn->counted)
	{
		txn->counted = true;
		ES_COUNT(staged_transactions, 1);
	}
	txn->staged_bytes += b->memory;
	txn->staged_rows += view.header->nrows;
	ES_COUNT(staged_rows, view.header->nrows);
	ES_COUNT(staged_bytes, b->memory);
	ES_COUNT(batches, 1);
	ES_COUNT(rows, view.header->nrows);

	/* Durability: a frame, or a pending segment soon. */
	if (!from_own_wal)
	{
		if (txn->big || txn->staged_bytes > (Size) es_guc_spill_after * 1024)
		{
			txn->big = true;
			b->unframed = true;
			dlist_push_tail(&es_txn_unframed, &b->unframed_node);
		}
		else
			b->ticket = es_log_append(ES_FRAME_BATCH, fxid, start, end, local, size);
	}
	ES_FAULT("apply-batch");

	/* while own WAL is read nothing can be written yet; it holds little of each transaction */
	if (!from_own_wal)
	{
		if (txn->staged_bytes > (Size) es_guc_spill_after * 1024)
			es_flush_consider_spill(txn);
		es_apply_limit_staging();
	}
	return true;
}

/*
 * Beyond the limit of all staging, and while shared memory is short, the largest transaction becomes big.  One
 * victim per call: what it has staged leaves memory when its job is done.
 */
void
es_apply_limit_staging(void)
{
	dlist_iter iter;
	EsTxn	  *largest = NULL;
	Size	   spilling = 0;
	Size	   limit = es_arena_short ? 0 : (Size) es_guc_staging_size * 1024;

	if (pg_atomic_read_u64(&es_shard->counters.staged_bytes) <= limit)
		return;
	dlist_foreach(iter, &es_txn_undecided)
	{
		EsTxn *txn = dlist_container(EsTxn, node, iter.cur);

		if (txn->finished || txn->staged_bytes == 0)
			continue;
		if (txn->spilling)
			spilling += txn->staged_bytes;
		else if (largest == NULL || txn->staged_bytes > largest->staged_bytes)
			largest = txn;
	}
	if (largest == NULL || pg_atomic_read_u64(&es_shard->counters.staged_bytes) - spilling <= limit)
		return;
	largest->big = true;
	es_flush_consider_spill(largest);
}

void
es_apply_drop_staged(EsTxn *txn)
{
	while (!dlist_is_empty(&txn->staged))
		es_txn_unstage(dlist_head_element(EsMemBatch, node, &txn->staged));
}

EsLsn
es_apply_oldest_unframed(void)
{
	dlist_iter iter;
	EsLsn	   oldest = 0;

	dlist_foreach(iter, &es_txn_unframed)
	{
		EsMemBatch *b = dlist_container(EsMemBatch, unframed_node, iter.cur);

		if (oldest == 0 || b->start < oldest)
			oldest = b->start;
	}
	return oldest;
}
