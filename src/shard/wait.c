/*-------------------------------------------------------------------------
 *
 * wait.c
 *	  WAIT: a reader parks here until a row that it has not read may be read.
 *
 * A waiter wants a row of its table, or of one context, with a position above
 * `after` that is committed and below the horizon.  For each waiter the shard keeps a
 * candidate, the lowest committed such position it knows, and the rows of transactions
 * that are not decided yet, one (the lowest) per transaction and batch.
 *
 *	 - WAIT looks once through MemTables and segments for what is there already.
 *	 - FINISH adds the rows that it brings (es_wait_batch, es_wait_pending); with nobody
 *	   waiting this costs one comparison.
 *	 - A verdict turns an undecided row into a candidate, or drops it.
 *	 - The waiter is answered when the horizon has passed its candidate.  Who clears the slot
 *	   that was the horizon wakes all shards as long as es_shared->table_waiters is
 *	   not 0; the barrier between counting the waiter and looking at the horizon
 *	   makes sure that one of both sees the other.
 *
 * From segments it is enough to know some row above `after`: the highest one, which
 * costs one read.  It may wake a waiter a moment later than the lowest
 * would, never too early.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "lib/ilist.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "core/route.h"
#include "ipc/position.h"
#include "shard/apply.h"
#include "shard/segments.h"
#include "shard/shard.h"

/* ms between two looks at the horizon, in case that a wake-up was lost */
#define HORIZON_RECHECK 200

typedef struct UndecidedRow
{
	EsTxn	  *txn; /* holds a ref */
	EsPosition position;
} UndecidedRow;

typedef struct Waiter
{
	dlist_node	  node;
	EsConn		 *conn;
	uint64		  id;
	EsTableKey	  table;
	EsPosition	  after;
	TimestampTz	  deadline;
	uint64		  hash;
	bool		  has_context; /* false = the whole table */
	uint32		  context_len;
	EsPosition	  candidate; /* 0 = none */
	UndecidedRow *rows;
	uint32		  nrows;
	uint32		  allocated;
	char		  context[FLEXIBLE_ARRAY_MEMBER];
} Waiter;

int es_wait_count = 0;

static dlist_head waiters = DLIST_STATIC_INIT(waiters);

static void
remove_waiter(Waiter *w)
{
	for (uint32 i = 0; i < w->nrows; i++)
		es_txn_unref(w->rows[i].txn);
	if (w->rows != NULL)
		pfree(w->rows);
	dlist_delete(&w->node);
	pfree(w);
	es_wait_count--;
	pg_atomic_fetch_sub_u32(&es_shared->table_waiters, 1);
	ES_SET(waiters, es_wait_count);
}

static void
answer(Waiter *w, bool found)
{
	EsWaitAnswer a = {.answer = {.type = ES_REQ_WAIT, .flags = ES_ANSWER_LAST, .id = w->id}, .found = found};
	EsPart		 part = {&a, sizeof(a)};

	es_conn_send(w->conn, &a.answer, &part, 1);
	remove_waiter(w);
}

static void
add_candidate(Waiter *w, EsPosition position)
{
	if (w->candidate == 0 || position < w->candidate)
		w->candidate = position;
}

/* A row of a finished transaction. */
static void
add_row(Waiter *w, EsTxn *txn, EsPosition position)
{
	switch (es_txn_verdict(txn))
	{
		case ES_VERDICT_ABORTED:
			return;
		case ES_VERDICT_COMMITTED:
			add_candidate(w, position);
			return;
		case ES_VERDICT_UNKNOWN:
			break;
	}
	if (w->nrows == w->allocated)
	{
		w->allocated = Max(4, w->allocated * 2);
		if (w->rows == NULL)
			w->rows = MemoryContextAlloc(TopMemoryContext, w->allocated * sizeof(UndecidedRow));
		else
			w->rows = repalloc(w->rows, w->allocated * sizeof(UndecidedRow));
	}
	es_txn_ref(txn);
	w->rows[w->nrows++] = (UndecidedRow){.txn = txn, .position = position};
}

/* The lowest row of the batch that the waiter wants, 0 = none. */
static EsPosition
wanted_in_batch(const Waiter *w, const EsMemBatch *b)
{
	EsPosition lowest = 0;
	uint32	   nrows = b->view.header->nrows;

	for (uint32 row = 0; row < nrows; row++)
	{
		EsPosition position = es_membatch_position(b, row);

		if (position <= w->after || (lowest != 0 && position >= lowest) || es_membatch_skipped(b, row))
			continue;
		if (w->has_context && (es_batch_context_hash(&b->view, row) != w->hash ||
							   !es_membatch_in_context(b, row, w->context, w->context_len)))
			continue;
		lowest = position;
	}
	return lowest;
}

/*
 * Some row above `after` in a segment, 0 = none.  False: damage, and the waiter was answered.
 */
static bool
wanted_in_segment(Waiter *w, EsSegmentRef *ref, EsPosition *position)
{
	EsSegment  *segment;
	EsRowBlock *block;
	EsError		err;
	EsStatus	status = ES_OK;
	uint64		first = 0;
	uint64		nrows = ref->entry.segment.nrows;
	uint32		index_entry;

	*position = 0;
	if ((ref->finished || ref->entry.adopted) && ref->entry.nlive == 0)
		return true;
	if (ref->entry.segment.max_position != 0 && ref->entry.segment.max_position <= w->after)
		return true;
	if (!w->has_context && !ref->entry.pending && ref->entry.segment.max_position != 0)
	{
		*position = ref->entry.segment.min_position > w->after ? ref->entry.segment.min_position
															   : ref->entry.segment.max_position;
		return true;
	}

	memset(&err, 0, sizeof(err));
	segment = es_segment_handle(ref, &err);
	if (segment == NULL)
		status = ES_ERR_CORRUPT;
	else if (w->has_context)
		status = es_segment_find_context(segment, w->hash, w->context, w->context_len, &first, &nrows,
										 &index_entry, &err);
	if (status == ES_OK && nrows > 0)
	{
		/* From the end, since a context's rows stand in the order of their positions. */
		block = es_block_create();
		if (block == NULL)
			status = es_fail(&err, ES_ERR_NOMEM, 0, "out of memory");
		for (uint64 row = first + nrows; status == ES_OK && row-- > first && *position == 0;)
		{
			EsPosition p;

			if (es_segment_row_dead(ref, row))
				continue;
			status = es_segment_read(segment, row, 1, NULL, ES_WANT_POSITION, block, &err);
			if (status != ES_OK)
				break;
			p = es_segment_row_position(ref, es_block_position(block, 0));
			if (p > w->after)
				*position = p;
			else if (w->has_context)
				break;
		}
		es_block_free(block);
	}
	if (status == ES_OK)
		return true;
	es_segment_send_error(w->conn, ES_REQ_WAIT, w->id, es_segment_path(ref), &err);
	remove_waiter(w);
	return false;
}

/* A segment, which may be one of a transaction that is not decided.  False: as above. */
static bool
look_at_segment(Waiter *w, EsSegmentRef *ref)
{
	EsPosition position;

	if (ref->entry.pending && !ref->finished)
		return true;
	if (!wanted_in_segment(w, ref, &position))
		return false;
	if (position == 0)
		return true;
	if (ref->txn != NULL)
		add_row(w, ref->txn, position);
	else
		add_candidate(w, position);
	return true;
}

/* What is there already.  False: damage, the waiter is gone. */
static bool
look_at_all(Waiter *w)
{
	EsSegmentRef **refs;
	int			   nrefs;
	bool		   alive = true;

	for (EsMemTable *mt = es_memtable_oldest; mt != NULL; mt = mt->next)
	{
		EsMemStore *store = es_memtable_store(mt, &w->table, false);

		if (store == NULL)
			continue;
		if (w->has_context)
		{
			uint64		cursor = 0;
			EsMemBatch *b;
			uint32		number;
			uint32		row;

			while (es_memstore_next(store, w->hash, UINT32_MAX, &cursor, &b, &number, &row))
			{
				EsPosition position = es_membatch_position(b, row);

				if (position > w->after && (w->candidate == 0 || position < w->candidate) &&
					es_membatch_in_context(b, row, w->context, w->context_len))
					add_row(w, b->txn, position);
			}
			continue;
		}
		for (uint32 i = 0; i < store->nbatches; i++)
		{
			EsMemBatch *b = store->batches[i];
			EsPosition	position = wanted_in_batch(w, b);

			if (position != 0 && (w->candidate == 0 || position < w->candidate))
				add_row(w, b->txn, position);
		}
	}

	if (w->candidate != 0)
		return true;
	refs = es_segments_of(&w->table, &nrefs);
	for (int i = nrefs - 1; i >= 0; i--)
	{
		if (alive && w->candidate == 0)
			alive = look_at_segment(w, refs[i]);
		es_segment_unref(refs[i]);
	}
	if (refs != NULL)
		pfree(refs);
	return alive;
}

/* Verdicts that came since.  Answers the waiter if it can be. */
static void
look_again(Waiter *w)
{
	uint32 kept = 0;

	for (uint32 i = 0; i < w->nrows; i++)
	{
		UndecidedRow r = w->rows[i];

		if (es_txn_verdict(r.txn) == ES_VERDICT_UNKNOWN)
		{
			w->rows[kept++] = r;
			continue;
		}
		if (r.txn->verdict == ES_VERDICT_COMMITTED)
			add_candidate(w, r.position);
		es_txn_unref(r.txn);
	}
	w->nrows = kept;
	if (w->candidate != 0 && w->candidate < es_horizon_newest(w->table.storage_id))
		answer(w, true);
}

void
es_handle_wait(EsConn *conn, const EsWaitRequest *req, Size len)
{
	Waiter *w;

	if (len < sizeof(EsWaitRequest) || req->context_len > len - sizeof(EsWaitRequest))
	{
		es_conn_send_error(conn, ES_REQ_WAIT, req->req.id, ERRCODE_PROTOCOL_VIOLATION,
						   "malformed request to wait", "", "");
		return;
	}
	w = MemoryContextAllocZero(TopMemoryContext, offsetof(Waiter, context) + req->context_len);
	w->conn = conn;
	w->id = req->req.id;
	w->table = req->table;
	w->after = req->after;
	w->deadline = req->deadline;
	w->hash = req->context_hash;
	w->has_context = req->has_context != 0;
	w->context_len = req->context_len;
	memcpy(w->context, req + 1, req->context_len);
	dlist_push_tail(&waiters, &w->node);
	es_wait_count++;
	ES_SET(waiters, es_wait_count);

	/* a full barrier: from here on whoever clears a slot wakes us */
	pg_atomic_fetch_add_u32(&es_shared->table_waiters, 1);

	if (look_at_all(w))
		look_again(w);
}

void
es_wait_close(EsConn *conn, uint64 id)
{
	dlist_mutable_iter iter;

	if (es_wait_count == 0)
		return;
	dlist_foreach_modify(iter, &waiters)
	{
		Waiter *w = dlist_container(Waiter, node, iter.cur);

		if (w->conn == conn && (id == 0 || w->id == id))
			remove_waiter(w);
	}
}

void
es_wait_batch(EsMemBatch *b)
{
	dlist_iter iter;

	dlist_foreach(iter, &waiters)
	{
		Waiter *w = dlist_container(Waiter, node, iter.cur);

		if (es_table_key_equal(&w->table, &b->view.header->table))
		{
			EsPosition position = wanted_in_batch(w, b);

			if (position != 0)
				add_row(w, b->txn, position);
		}
	}
}

void
es_wait_pending(EsTxn *txn)
{
	dlist_mutable_iter iter;
	ListCell		  *lc;

	dlist_foreach_modify(iter, &waiters)
	{
		Waiter *w = dlist_container(Waiter, node, iter.cur);

		foreach(lc, txn->pending)
		{
			EsSegmentRef *ref = lfirst(lc);

			if (es_table_key_equal(&w->table, &ref->entry.segment.table) && !look_at_segment(w, ref))
				break;
		}
	}
}

void
es_wait_notice(void)
{
	dlist_mutable_iter iter;

	if (es_wait_count == 0)
		return;
	dlist_foreach_modify(iter, &waiters)
		look_again(dlist_container(Waiter, node, iter.cur));
}

long
es_wait_tick(void)
{
	dlist_mutable_iter iter;
	TimestampTz		   now;
	long			   timeout = -1;

	if (es_wait_count == 0)
		return -1;
	now = GetCurrentTimestamp();
	dlist_foreach_modify(iter, &waiters)
	{
		Waiter *w = dlist_container(Waiter, node, iter.cur);
		long	ms = -1;

		/* the horizon may have moved: whoever moved it has set our latch */
		if (w->candidate != 0 && w->candidate < es_horizon_newest(w->table.storage_id))
		{
			answer(w, true);
			continue;
		}
		if (w->deadline <= now)
		{
			answer(w, false);
			continue;
		}
		if (w->deadline != PG_INT64_MAX)
			ms = TimestampDifferenceMilliseconds(now, w->deadline);
		if (w->candidate != 0)
			ms = ms < 0 ? HORIZON_RECHECK : Min(ms, HORIZON_RECHECK);
		if (ms >= 0)
			timeout = timeout < 0 ? ms : Min(timeout, ms);
	}
	return timeout;
}
