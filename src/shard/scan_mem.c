/*-------------------------------------------------------------------------
 *
 * scan_mem.c
 *	  Rows of a MemTable in the order of positions.
 *
 * Batches stand in the order of adoption, which is nearly that of positions: a
 * transaction's positions are one range, and ranges are adopted in the order of FINISH messages,
 * which is not always that in which they were reserved.  Restored rows may have any
 * order, also within a batch.
 *
 * For each batch its lowest and highest position is noted, and with them two things that
 * only ever change towards caution as batches are added: the highest position up to this batch,
 * and the lowest from this batch on.  Both ascend, so the first batch with
 * something above `after` is found by bisection, and merging goes on from there with a
 * heap of only those batches that overlap: before a row with key k is handed out, batches are
 * taken in as long as some batch from there on may have a key at or below k.  A
 * follower who polls at the end of a large MemTable thus touches what is new.
 * The notes belong to the MemTable, are made when first asked for, and grow with it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "shard/scan.h"
#include "shard/shard.h"

typedef struct OrderEntry
{
	EsPosition min;			   /* UINT64_MAX if it has no rows */
	EsPosition max;			   /* 0 if it has none; UNSORTED */
	EsPosition highest_before; /* of this and all before */
	EsPosition lowest_behind;  /* of this and all behind */
} OrderEntry;

#define UNSORTED (UINT64CONST(1) << 63) /* rows do not ascend */

typedef struct EsMemOrder
{
	uint32		n;
	uint32		allocated;
	OrderEntry *entries;
} EsMemOrder;

typedef struct HeapItem
{
	uint64	key; /* of its next row */
	uint32	batch;
	uint32	next; /* rows handed out */
	uint32 *rows; /* in the order of positions; NULL = as they are */
} HeapItem;

typedef struct MemStream
{
	EsStream	stream; /* first */
	EsScanMem  *m;
	EsMemOrder *order;
	int64		at; /* next batch to take in; descending: downwards */
	HeapItem   *heap;
	int			nheap;
	int			allocated;
} MemStream;

/* ---- notes about batches ---- */

/* Keys of own rows are ordinals + 1: 0 has no complement that is not the end. */
static inline EsPosition
row_position(const EsScanMem *m, const EsMemBatch *b, uint32 row)
{
	return m->memtable == NULL ? es_batch_ordinal(&b->view, row) + 1 : es_membatch_position(b, row);
}

static void
note_batch(const EsScanMem *m, const EsMemBatch *b, OrderEntry *e)
{
	uint32 nrows = b->view.header->nrows;

	e->min = UINT64_MAX;
	e->max = 0;
	if (nrows == 0)
		return;
	if (m->memtable == NULL || (b->finish_flags & ES_FINISH_GIVEN_POSITIONS) == 0)
	{
		e->min = row_position(m, b, 0);
		e->max = row_position(m, b, nrows - 1);
	}
	else
	{
		bool	   sorted = true;
		EsPosition last = 0;

		for (uint32 row = 0; row < nrows; row++)
		{
			EsPosition p = row_position(m, b, row);

			sorted = sorted && p > last;
			last = p;
			e->min = Min(e->min, p);
			e->max = Max(e->max, p);
		}
		if (!sorted)
			e->max |= UNSORTED;
	}
}

static EsMemOrder *
order_of(EsScan *scan, const EsScanMem *m)
{
	MemoryContext context = m->memtable != NULL ? m->memtable->context : scan->task.context;
	EsMemOrder	 *o = m->memtable != NULL ? m->store->order : NULL;
	Size		  before;

	if (o == NULL)
	{
		o = MemoryContextAllocZero(context, sizeof(EsMemOrder));
		if (m->memtable != NULL)
			m->store->order = o;
	}
	if (o->allocated < m->nbatches)
	{
		uint32 allocated = Max(Max(64, o->allocated * 2), m->nbatches);

		before = o->allocated * sizeof(OrderEntry);
		if (o->entries == NULL)
			o->entries = MemoryContextAllocHuge(context, allocated * sizeof(OrderEntry));
		else
			o->entries = repalloc_huge(o->entries, allocated * sizeof(OrderEntry));
		o->allocated = allocated;
		if (m->memtable != NULL)
		{
			Size more = allocated * sizeof(OrderEntry) - before;

			m->memtable->nbytes += more;
			m->store->nbytes += more;
			ES_COUNT(memtable_bytes, more);
		}
	}
	while (o->n < m->nbatches)
	{
		OrderEntry *e = &o->entries[o->n];

		note_batch(m, es_scan_mem_batch(m, o->n), e);
		e->highest_before = e->max & ~UNSORTED;
		if (o->n > 0)
			e->highest_before = Max(e->highest_before, e[-1].highest_before);
		e->lowest_behind = e->min;
		for (OrderEntry *p = e; p > o->entries && p[-1].lowest_behind > e->min; p--)
			p[-1].lowest_behind = e->min;
		o->n++;
	}
	return o;
}

/* ---- the heap ---- */

static void
sift_down(HeapItem *heap, int n, int i)
{
	HeapItem item = heap[i];

	for (;;)
	{
		int child = 2 * i + 1;

		if (child >= n)
			break;
		if (child + 1 < n && heap[child + 1].key < heap[child].key)
			child++;
		if (heap[child].key >= item.key)
			break;
		heap[i] = heap[child];
		i = child;
	}
	heap[i] = item;
}

static void
heap_push(EsScan *scan, MemStream *s, HeapItem item)
{
	int i;

	if (s->nheap == s->allocated)
	{
		s->allocated = Max(16, s->allocated * 2);
		if (s->heap == NULL)
			s->heap = MemoryContextAlloc(scan->task.context, s->allocated * sizeof(HeapItem));
		else
			s->heap = repalloc_huge(s->heap, s->allocated * sizeof(HeapItem));
	}
	for (i = s->nheap++; i > 0 && s->heap[(i - 1) / 2].key > item.key; i = (i - 1) / 2)
		s->heap[i] = s->heap[(i - 1) / 2];
	s->heap[i] = item;
}

/* ---- the stream ---- */

typedef struct SortArg
{
	const EsScanMem	 *m;
	const EsMemBatch *b;
	bool			  descending;
} SortArg;

static int
compare_rows(const void *a, const void *b, void *arg)
{
	const SortArg *s = arg;
	EsPosition	   x = row_position(s->m, s->b, *(const uint32 *) a);
	EsPosition	   y = row_position(s->m, s->b, *(const uint32 *) b);

	if (s->descending)
		return x > y ? -1 : x < y;
	return x < y ? -1 : x > y;
}

static inline uint32
item_row(const EsScan *scan, const HeapItem *item, uint32 nrows, uint32 i)
{
	if (item->rows != NULL)
		return item->rows[i];
	return scan->descending ? nrows - 1 - i : i;
}

/* Key below which no batch that is not in the heap yet has a row. */
static uint64
bound_of_rest(const EsScan *scan, const MemStream *s)
{
	if (scan->descending)
		return s->at < 0 ? UINT64_MAX : ~s->order->entries[s->at].highest_before;
	return s->at >= s->m->nbatches ? UINT64_MAX : s->order->entries[s->at].lowest_behind;
}

static void
take_batch(EsScan *scan, MemStream *s, uint32 number)
{
	const EsMemBatch *b = es_scan_mem_batch(s->m, number);
	const OrderEntry *e = &s->order->entries[number];
	uint32			  nrows = b->view.header->nrows;
	HeapItem		  item = {.batch = number};

	if (nrows == 0 || !es_scan_batch_here(s->m, b))
		return;
	if (scan->bounded && s->m->memtable != NULL &&
		((e->max & ~UNSORTED) <= scan->after || e->min >= scan->below))
		return;
	if (s->m->memtable != NULL && !es_scan_batch_visible(scan, b))
		return;
	if (e->max & UNSORTED)
	{
		SortArg arg = {s->m, b, scan->descending};

		item.rows = MemoryContextAllocHuge(scan->task.context, nrows * sizeof(uint32));
		for (uint32 i = 0; i < nrows; i++)
			item.rows[i] = i;
		qsort_arg(item.rows, nrows, sizeof(uint32), compare_rows, &arg);
	}
	item.key = es_scan_key(scan, scan->descending ? e->max & ~UNSORTED : e->min);
	heap_push(scan, s, item);
}

/* Takes in all batches that may come before the heap's first row. */
static void
refill(EsScan *scan, MemStream *s)
{
	for (;;)
	{
		uint64 bound = bound_of_rest(scan, s);

		if (bound == UINT64_MAX || (s->nheap > 0 && bound > s->heap[0].key))
			break;
		/* nothing of what is left lies within the bounds */
		if (scan->bounded && s->m->memtable != NULL &&
			(scan->descending ? ~bound <= scan->after : bound >= scan->below))
		{
			s->at = scan->descending ? -1 : s->m->nbatches;
			break;
		}
		take_batch(scan, s, (uint32) s->at);
		s->at += scan->descending ? -1 : 1;
	}
	s->stream.key = s->nheap > 0 ? s->heap[0].key : UINT64_MAX;
}

static EsTaskState
fill_from_mem(EsScan *scan, EsStream *stream, uint64 limit, EsChunk *chunk)
{
	MemStream		 *s = (MemStream *) stream;
	HeapItem		 *item = &s->heap[0];
	const EsMemBatch *b = es_scan_mem_batch(s->m, item->batch);
	uint32			  nrows = b->view.header->nrows;

	limit = Min(limit, bound_of_rest(scan, s));
	for (int child = 1; child <= 2 && child < s->nheap; child++)
		limit = Min(limit, s->heap[child].key);
	limit = Max(limit, item->key);

	es_chunk_of_batch(chunk, b, s->m->memtable == NULL);
	while (item->next < nrows && chunk->n < ES_CHUNK_ROWS)
	{
		uint32 row = item_row(scan, item, nrows, item->next);

		item->key = es_scan_key(scan, row_position(s->m, b, row));
		if (item->key > limit)
			break;
		chunk->rows[chunk->n++] = row;
		item->next++;
	}
	if (item->next < nrows)
		item->key = es_scan_key(scan, row_position(s->m, b, item_row(scan, item, nrows, item->next)));
	else
	{
		if (item->rows != NULL)
			pfree(item->rows);
		*item = s->heap[--s->nheap];
	}
	if (s->nheap > 1)
		sift_down(s->heap, s->nheap, 0);
	refill(scan, s);
	es_scan_thin_chunk(scan, chunk);
	return ES_TASK_DONE;
}

EsStream *
es_stream_of_mem(EsScan *scan, EsScanMem *m)
{
	MemStream *s = MemoryContextAllocZero(scan->task.context, sizeof(MemStream));
	int64	   low = 0;
	int64	   high = m->nbatches;

	s->m = m;
	s->stream.fill = fill_from_mem;
	s->order = order_of(scan, m);
	if (m->memtable == NULL || !scan->bounded)
		low = scan->descending ? high : 0;
	else
		while (low < high)
		{
			/* ascending: the first batch up to which there is something above `after`; descending: the
			 * first from which on nothing is below `below` */
			int64			  mid = low + (high - low) / 2;
			const OrderEntry *e = &s->order->entries[mid];

			if (scan->descending ? e->lowest_behind < scan->below : e->highest_before <= scan->after)
				low = mid + 1;
			else
				high = mid;
		}
	s->at = scan->descending ? low - 1 : low;
	refill(scan, s);
	return &s->stream;
}
