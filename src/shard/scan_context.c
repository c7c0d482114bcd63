/*-------------------------------------------------------------------------
 *
 * scan_context.c
 *	  Rows of one context: a replay.
 *
 * In memory the context's rows are found by the MemTables' index and noted with their keys,
 * then sorted; they are visible already, filters come when a chunk is made.  In a
 * segment they are one range, in the order of positions already, which is read in
 * blocks that begin small and grow: half a page for a short replay, a zone for a long one.
 * Where bounds on positions are given and the range is long its ends are found by
 * bisection.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "shard/scan.h"

#define FIRST_BLOCK	  128 /* rows */
#define BISECT_ROWS	  512 /* shorter ranges are just read */
#define ROWS_PER_LOOK 512
#define SPARE_BLOCKS  16		   /* kept for the next replay */
#define SPARE_MEMORY  (256 * 1024) /* bytes of each, at most */

/* Rows in memory lie far from each other: their cache lines are asked for some rows ahead. */
#define PREFETCH_ROW	6
#define PREFETCH_VALUES 3

typedef struct RowRef
{
	uint64		key;
	EsMemBatch *batch;
	uint32		row;
} RowRef;

typedef struct RowsStream
{
	EsStream stream; /* first */
	bool	 own;
	RowRef	*rows;
	uint32	 nrows;
	uint32	 next;
} RowsStream;

/* Rows in memory being noted. */
typedef struct EsCollect
{
	int		mem;
	uint64	cursor; /* of its index */
	RowRef *rows;
	uint32	nrows;
	uint32	allocated;
	int		segment;
} EsCollect;

/* ---- rows in memory ---- */

static int
compare_refs(const void *a, const void *b)
{
	uint64 x = ((const RowRef *) a)->key;
	uint64 y = ((const RowRef *) b)->key;

	return x < y ? -1 : x > y;
}

static inline ES_PREFETCHING void
prefetch(const EsScan *scan, const RowsStream *s)
{
	if (s->next + PREFETCH_ROW < s->nrows)
	{
		const RowRef *r = &s->rows[s->next + PREFETCH_ROW];

		for (int i = 0; i < scan->ncolumns && scan->columns[i] < r->batch->view.header->ncols; i++)
			es_batch_prefetch_place(&r->batch->view, scan->columns[i], r->row);
		if (r->batch->versions_local != NULL)
			__builtin_prefetch(&r->batch->versions_local[r->row]);
	}
	if (s->next + PREFETCH_VALUES < s->nrows)
	{
		const RowRef *r = &s->rows[s->next + PREFETCH_VALUES];

		for (int i = 0; i < scan->ncolumns && scan->columns[i] < r->batch->view.header->ncols; i++)
			es_batch_prefetch_value(&r->batch->view, scan->columns[i], r->row);
	}
}

static EsTaskState
fill_from_rows(EsScan *scan, EsStream *stream, uint64 limit, EsChunk *chunk)
{
	RowsStream *s = (RowsStream *) stream;
	EsMemBatch *b = s->rows[s->next].batch;

	es_chunk_of_batch(chunk, b, s->own);
	do
	{
		prefetch(scan, s);
		chunk->rows[chunk->n++] = s->rows[s->next++].row;
	} while (s->next < s->nrows && s->rows[s->next].batch == b && s->rows[s->next].key <= limit &&
			 chunk->n < ES_CHUNK_ROWS);
	stream->key = s->next < s->nrows ? s->rows[s->next].key : UINT64_MAX;
	es_scan_thin_chunk(scan, chunk);
	return ES_TASK_DONE;
}

static void
note_row(EsScan *scan, EsCollect *c, EsMemBatch *b, uint32 row, EsPosition key)
{
	if (c->nrows == c->allocated)
	{
		c->allocated = Max(64, c->allocated * 2);
		if (c->rows == NULL)
			c->rows = MemoryContextAlloc(scan->task.context, c->allocated * sizeof(RowRef));
		else
			c->rows = repalloc_huge(c->rows, c->allocated * sizeof(RowRef));
	}
	c->rows[c->nrows++] = (RowRef){.key = es_scan_key(scan, key), .batch = b, .row = row};
}

/* There are never more than spill_after bytes of them. */
static EsTaskState
collect_own(EsScan *scan, EsCollect *c, const EsScanMem *m)
{
	for (uint32 i = 0; i < m->nbatches; i++)
	{
		EsMemBatch *b = m->own[i];
		uint32		nrows = b->view.header->nrows;

		for (uint32 row = 0; row < nrows; row++)
			if (es_membatch_in_context(b, row, scan->context, scan->context_len))
				note_row(scan, c, b, row, es_batch_ordinal(&b->view, row) + 1);
	}
	return ES_TASK_DONE;
}

/* Rows that the index has for the hash. */
typedef struct Candidate
{
	EsMemBatch *batch;
	uint32		row;
} Candidate;

static void
note_candidates(EsScan *scan, EsCollect *c, const EsScanMem *m, const Candidate *candidates, int n)
{
	for (int i = 0; i < n; i++)
	{
		EsMemBatch *b = candidates[i].batch;
		uint32		row = candidates[i].row;
		EsPosition	position;

		if (i + PREFETCH_VALUES < n)
		{
			const Candidate *next = &candidates[i + PREFETCH_VALUES];

			es_batch_prefetch_value(&next->batch->view, next->batch->view.header->roles.context - 1,
									next->row);
		}
		if (!es_scan_batch_here(m, b) || es_membatch_skipped(b, row) ||
			!es_membatch_in_context(b, row, scan->context, scan->context_len))
			continue;
		position = es_membatch_position(b, row);
		if (position > scan->after && position < scan->below && es_scan_batch_visible(scan, b))
			note_row(scan, c, b, row, position);
	}
}

static EsTaskState
collect_memtable(EsScan *scan, EsCollect *c, const EsScanMem *m)
{
	Candidate candidates[ROWS_PER_LOOK];
	uint32	  number;
	int		  n;

	do
	{
		Candidate *next = candidates;

		while (next < candidates + ROWS_PER_LOOK &&
			   es_memstore_next(m->store, scan->context_hash, m->nbatches, &c->cursor, &next->batch, &number,
								&next->row))
		{
			es_batch_prefetch_place(&next->batch->view, next->batch->view.header->roles.context - 1,
									next->row);
			next++;
		}
		n = next - candidates;
		note_candidates(scan, c, m, candidates, n);
		if (n == ROWS_PER_LOOK && es_task_clock() >= scan->deadline)
			return ES_TASK_MORE;
	} while (n == ROWS_PER_LOOK);
	return ES_TASK_DONE;
}

static EsTaskState
collect_rows(EsScan *scan, EsCollect *c)
{
	RowsStream *s;
	bool		sorted = true;

	for (; c->mem < scan->nmems; c->mem++)
	{
		const EsScanMem *m = &scan->mems[c->mem];

		if ((m->memtable == NULL) != scan->own_phase)
			continue;
		if ((scan->own_phase ? collect_own(scan, c, m) : collect_memtable(scan, c, m)) == ES_TASK_MORE)
			return ES_TASK_MORE;
		c->cursor = 0;
	}
	if (c->nrows == 0)
		return ES_TASK_DONE;
	for (uint32 i = 1; i < c->nrows && sorted; i++)
		sorted = c->rows[i - 1].key <= c->rows[i].key;
	if (!sorted)
		qsort(c->rows, c->nrows, sizeof(RowRef), compare_refs);
	s = MemoryContextAllocZero(scan->task.context, sizeof(RowsStream));
	s->stream.fill = fill_from_rows;
	s->stream.key = c->rows[0].key;
	s->own = scan->own_phase;
	s->rows = c->rows;
	s->nrows = c->nrows;
	c->rows = NULL;
	c->nrows = c->allocated = 0;
	es_scan_add_stream(scan, &s->stream);
	return ES_TASK_DONE;
}

/* ---- the range of a segment ---- */

/* Blocks of replays that have ended, with the memory that they have grown. */
static EsRowBlock *spare_blocks[SPARE_BLOCKS];
static int		   nspare_blocks;

static EsRowBlock *
take_block(void)
{
	EsRowBlock *block = nspare_blocks > 0 ? spare_blocks[--nspare_blocks] : es_block_create();

	if (block == NULL)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
	return block;
}

static void
give_block(EsRowBlock *block)
{
	if (block != NULL)
		es_block_clear(block);
	if (block != NULL && nspare_blocks < SPARE_BLOCKS && es_block_memory(block) <= SPARE_MEMORY)
		spare_blocks[nspare_blocks++] = block;
	else
		es_block_free(block);
}

typedef struct RangeStream
{
	EsStream	   stream; /* first */
	EsScanSegment *s;
	EsRowBlock	  *block;
	uint64		   low; /* rows [low, high) are not read yet */
	uint64		   high;
	uint32		   size; /* rows of the next block */
	uint64		   block_first;
	uint32		   block_rows;
	uint32		   next; /* in the block, counted in the order of the scan */
} RangeStream;

static bool
read_failed(EsScan *scan, EsScanSegment *s, EsStatus status, EsError *err)
{
	if (status == ES_OK)
		return false;
	err->status = status;
	es_segment_damaged(s->ref, err);
	es_scan_damage(scan, s->ref, err);
	return true;
}

static inline uint32
row_in_block(const EsScan *scan, const RangeStream *r, uint32 i)
{
	return scan->descending ? r->block_rows - 1 - i : i;
}

static uint64
key_in_block(const EsScan *scan, const RangeStream *r, uint32 i)
{
	EsPosition p = es_segment_row_position(r->s->ref, es_block_position(r->block, row_in_block(scan, r, i)));

	return es_scan_key(scan, r->s->own ? p + 1 : p);
}

/* The part of [row, row + n) that lies in the zone of its first (descending: last) row. */
static EsZoneInfo
zone_of(const EsScanSegment *s, uint64 row)
{
	uint32	   number = Min((uint32) (row / ES_ZONE_ROWS), s->info->nzones - 1);
	EsZoneInfo z = es_segment_zone(s->segment, number);

	while (row < z.first_row && number > 0)
		z = es_segment_zone(s->segment, --number);
	while (row >= z.first_row + z.nrows && number + 1 < s->info->nzones)
		z = es_segment_zone(s->segment, ++number);
	return z;
}

static bool
read_block(EsScan *scan, RangeStream *r)
{
	EsScanSegment *s = r->s;
	EsError		   err = {0};
	EsZoneInfo	   z = zone_of(s, scan->descending ? r->high - 1 : r->low);
	uint64		   first = Max(r->low, z.first_row);
	uint64		   end = Min(r->high, z.first_row + z.nrows);
	uint64		   n = Min(Min(r->size, s->read_rows), end - first);

	if (scan->nfilters == 0)
		n = Min(n, Max(scan->max_rows - scan->rows_out, 1));
	if (scan->descending)
		first = end - n;
	if (read_failed(scan, s,
					es_segment_read(s->segment, first, (uint32) n, s->wanted, s->hidden | ES_WANT_POSITION,
									r->block, &err),
					&err))
		return false;
	if (scan->descending)
		r->high = first;
	else
		r->low = first + n;
	r->block_first = first;
	r->block_rows = (uint32) n;
	r->next = 0;
	r->size = Min(r->size * 4, ES_CHUNK_ROWS);
	r->stream.key = key_in_block(scan, r, 0);
	return true;
}

static EsTaskState
fill_from_range(EsScan *scan, EsStream *stream, uint64 limit, EsChunk *chunk)
{
	RangeStream *r = (RangeStream *) stream;

	if (r->next >= r->block_rows)
	{
		(void) read_block(scan, r);
		return ES_TASK_DONE;
	}
	es_chunk_of_block(chunk, r->s, r->block, r->block_first);
	do
	{
		chunk->rows[chunk->n++] = row_in_block(scan, r, r->next++);
	} while (r->next < r->block_rows && key_in_block(scan, r, r->next) <= limit);
	if (r->next < r->block_rows)
		stream->key = key_in_block(scan, r, r->next);
	else if (r->low >= r->high)
		stream->key = UINT64_MAX;
	/* else the last row's key is a bound for what is not read yet */
	es_scan_thin_chunk(scan, chunk);
	return ES_TASK_DONE;
}

static void
release_range(EsStream *stream)
{
	RangeStream *r = (RangeStream *) stream;

	give_block(r->block);
	r->block = NULL;
}

/* First row of [low, high) whose position is above `after`. */
static bool
bisect(EsScan *scan, EsScanSegment *s, EsRowBlock *block, const bool *nothing, EsPosition after, uint64 low,
	   uint64 high, uint64 *found)
{
	while (low < high)
	{
		uint64	mid = low + (high - low) / 2;
		EsError err = {0};

		if (read_failed(scan, s, es_segment_read(s->segment, mid, 1, nothing, ES_WANT_POSITION, block, &err),
						&err))
			return false;
		if (es_segment_row_position(s->ref, es_block_position(block, 0)) > after)
			high = mid;
		else
			low = mid + 1;
	}
	*found = low;
	return true;
}

static bool
add_range(EsScan *scan, EsScanSegment *s)
{
	RangeStream *r;
	uint64		 first;
	uint64		 n;
	uint32		 entry;
	EsError		 err = {0};

	if (!es_scan_open_segment(scan, s))
		return false;
	if (read_failed(scan, s,
					es_segment_find_context(s->segment, scan->context_hash, scan->context, scan->context_len,
											&first, &n, &entry, &err),
					&err))
		return false;
	if (n == 0)
	{
		scan->rows_pruned += s->info->summary.nrows;
		return true;
	}
	r = MemoryContextAllocZero(scan->task.context, sizeof(RangeStream));
	r->s = s;
	r->stream.fill = fill_from_range;
	r->stream.release = release_range;
	r->low = first;
	r->high = first + n;
	r->size = FIRST_BLOCK;
	r->block = take_block();
	es_scan_add_stream(scan, &r->stream);
	if (scan->bounded && !s->own && n > BISECT_ROWS)
	{
		bool *nothing = MemoryContextAllocZero(scan->task.context, Max(s->info->ncols, 1) * sizeof(bool));

		if (scan->after > 0 && !bisect(scan, s, r->block, nothing, scan->after, r->low, r->high, &r->low))
			return false;
		if (scan->below != UINT64_MAX &&
			!bisect(scan, s, r->block, nothing, scan->below - 1, r->low, r->high, &r->high))
			return false;
	}
	scan->rows_pruned += s->info->summary.nrows - (r->high - r->low);
	if (r->low >= r->high)
		r->stream.key = UINT64_MAX;
	else if (!s->own && s->ref->entry.segment.min_position != 0)
		r->stream.key = es_scan_key(scan, scan->descending ? s->ref->entry.segment.max_position
														   : s->ref->entry.segment.min_position);
	return true;
}

EsTaskState
es_scan_context_streams(EsScan *scan)
{
	EsCollect *c = scan->collect;

	if (c == NULL)
		c = scan->collect = MemoryContextAllocZero(scan->task.context, sizeof(EsCollect));
	if (c->mem < scan->nmems)
	{
		if (collect_rows(scan, c) == ES_TASK_MORE)
			return ES_TASK_MORE;
	}
	for (; c->segment < scan->nsegments; c->segment++)
	{
		if (scan->segments[c->segment].own != scan->own_phase)
			continue;
		if (!add_range(scan, &scan->segments[c->segment]))
			return ES_TASK_DONE;
		if (es_task_clock() >= scan->deadline)
		{
			c->segment++;
			return ES_TASK_MORE;
		}
	}
	/* the next phase begins anew */
	c->mem = 0;
	c->segment = 0;
	c->cursor = 0;
	return ES_TASK_DONE;
}
