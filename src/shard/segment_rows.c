/*-------------------------------------------------------------------------
 *
 * segment_rows.c
 *	  Rows of a segment as readers see them: which live, their versions, their order
 *	  by position.
 *
 * Adopted in place.  A pending segment becomes live without being written anew: its
 * rows have ordinals to which the base is added, a bitmap names those that were not
 * taken, and a version is the first version of its context plus the live rows of the
 * context before it.  To find the context of a row the first rows of all contexts are
 * read from the segment's context index once and kept.  Readers ask for versions
 * in ascending order of rows, so the count goes on from the last one asked for.
 *
 * Order.  A segment is sorted by context.  Who reads by position needs the
 * permutation: one 64-bit key per row, the distance to the lowest position above the row's
 * number, sorted by radix.  Where that does not fit (positions given by a user
 * may lie 2^47 apart) the pairs are kept as they are.  It is made zone by zone within the
 * caller's time and kept for the next reader, for a follower polls again and again.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "port/pg_bitutils.h"

#include "shard/segments.h"
#include "shard/task.h"

typedef struct EsSegmentContexts
{
	uint32	n;
	uint64 *first_rows;
	/* the row asked for last: its context, and the live rows of the context before it */
	uint32 context;
	uint64 row;
	uint64 rank;
} EsSegmentContexts;

typedef struct Pair
{
	uint64 position;
	uint64 row;
} Pair;

typedef struct EsSegmentOrder
{
	uint64	   nrows;
	EsPosition min;
	int		   row_bits;
	uint32	   next_zone;
	bool	   ready;
	uint64	  *keys; /* (position - min) << row_bits | row; or */
	Pair	  *pairs;
} EsSegmentOrder;

/* ---- live rows ---- */

bool
es_segment_row_dead(const EsSegmentRef *ref, uint64 row)
{
	const uint8 *bitmap = ref->entry.dead_bitmap;

	return bitmap != NULL && (bitmap[row >> 3] >> (row & 7)) & 1;
}

uint64
es_segment_live_rows(const EsSegmentRef *ref, uint64 first, uint64 end)
{
	const uint8 *bitmap = ref->entry.dead_bitmap;
	uint64		 dead = 0;
	uint64		 row = first;

	if (end <= first)
		return 0;
	if (bitmap == NULL)
		return end - first;
	for (; row < end && (row & 7) != 0; row++)
		dead += (bitmap[row >> 3] >> (row & 7)) & 1;
	while (end - row >= 8)
	{
		uint64 bytes = Min((end - row) / 8, 1 << 20);

		dead += pg_popcount((const char *) bitmap + (row >> 3), (int) bytes);
		row += bytes * 8;
	}
	for (; row < end; row++)
		dead += (bitmap[row >> 3] >> (row & 7)) & 1;
	return end - first - dead;
}

/* ---- restored rows ---- */

bool
es_segment_given_positions(const EsSegment *segment)
{
	const EsSegmentInfo *info = es_segment_info(segment);
	int					 column = es_segment_ncols(info) + ES_PENDING_ORDINAL;

	/* all of its rows or none */
	return info->nzones > 0 &&
		   es_segment_column_stats(segment, 0, column).nnulls < es_segment_zone(segment, 0).nrows;
}

bool
es_segment_last_version(const EsSegmentRef *ref, EsSegment *segment, uint64 first, uint64 end, int64 *version,
						EsError *err)
{
	const uint8 *dead = ref->entry.dead_bitmap;
	EsRowBlock	*block;
	bool		*nothing;
	EsStatus	 status;

	*version = 0;
	while (end > first && dead != NULL && (dead[(end - 1) >> 3] >> ((end - 1) & 7)) & 1)
		end--;
	if (end == first)
		return true;
	block = es_block_create();
	if (block == NULL)
		return es_fail(err, ES_ERR_NOMEM, 0, "out of memory") == ES_OK;
	nothing = palloc0(Max(es_segment_info(segment)->ncols, 1) * sizeof(bool));
	status = es_segment_read(segment, end - 1, 1, nothing, ES_WANT_VERSION, block, err);
	if (status == ES_OK)
		*version = (int64) es_block_version(block, 0);
	pfree(nothing);
	es_block_free(block);
	return status == ES_OK;
}

/* ---- versions ---- */

static EsStatus
add_context(void *arg, uint32_t entry, uint64_t hash, uint64_t first_row, uint64_t nrows)
{
	EsSegmentContexts *c = arg;

	if (entry >= c->n)
		return ES_ERR_CORRUPT;
	c->first_rows[entry] = first_row;
	return ES_OK;
}

bool
es_segment_contexts(EsSegmentRef *ref, EsSegment *seg, EsError *err)
{
	EsSegmentContexts *c;
	EsStatus		   status;
	uint64			   n = es_segment_info(seg)->summary.ncontexts;

	if (ref->contexts != NULL)
		return true;
	memset(err, 0, sizeof(*err));
	if (n == 0 || n > UINT32_MAX || n != ref->entry.nfirst_versions)
	{
		es_fail(err, ES_ERR_CORRUPT, 0, "segment has %llu contexts, the manifest first versions of %u",
				(unsigned long long) n, ref->entry.nfirst_versions);
		es_segment_damaged(ref, err);
		return false;
	}
	c = malloc(sizeof(EsSegmentContexts));
	if (c != NULL && (c->first_rows = malloc(n * sizeof(uint64))) == NULL)
	{
		free(c);
		c = NULL;
	}
	if (c == NULL)
	{
		es_fail(err, ES_ERR_NOMEM, 0, "out of memory");
		return false;
	}
	c->n = (uint32) n;
	c->context = 0;
	c->row = 0;
	c->rank = 0;
	status = es_segment_walk_contexts(seg, add_context, c, err);
	if (status != ES_OK)
	{
		if (err->status == ES_OK)
			es_fail(err, status, 0, "context index has more entries than the segment contexts");
		free(c->first_rows);
		free(c);
		es_segment_damaged(ref, err);
		return false;
	}
	ref->contexts = c;
	return true;
}

int64
es_segment_row_version(EsSegmentRef *ref, uint64 row)
{
	EsSegmentContexts *c = ref->contexts;
	uint32			   context = c->context;

	if (row < c->first_rows[context] || (context + 1 < c->n && row >= c->first_rows[context + 1]))
	{
		uint32 low = 0;
		uint32 high = c->n - 1;

		if (context + 1 < c->n && row >= c->first_rows[context + 1])
		{
			/* mostly the next one */
			low = context + 1;
			if (low + 1 == c->n || row < c->first_rows[low + 1])
				high = low;
		}
		while (low < high)
		{
			uint32 mid = low + (high - low + 1) / 2;

			if (c->first_rows[mid] <= row)
				low = mid;
			else
				high = mid - 1;
		}
		c->context = context = low;
		c->row = c->first_rows[context];
		c->rank = 0;
	}
	else if (row < c->row)
	{
		c->row = c->first_rows[context];
		c->rank = 0;
	}
	c->rank += es_segment_live_rows(ref, c->row, row);
	c->row = row;
	return es_manifest_first_version(&ref->entry, context) + (int64) c->rank;
}

/* ---- order by position ---- */

static int
compare_pairs(const void *a, const void *b)
{
	uint64 x = ((const Pair *) a)->position;
	uint64 y = ((const Pair *) b)->position;

	return x < y ? -1 : x > y;
}

/* Least significant digits first; rows come in ascending order of their low bits already. */
static bool
radix_sort(uint64 **keys, uint64 n, int low_bit, uint64 max_key)
{
	const int digit = 11;
	uint64	 *from = *keys;
	uint64	 *to = malloc(Max(n, 1) * sizeof(uint64));

	if (to == NULL)
		return false;
	for (int shift = low_bit; shift < 64 && (max_key >> shift) != 0; shift += digit)
	{
		uint64	count[1 << 11];
		uint64	sum = 0;
		uint64 *swap;

		memset(count, 0, sizeof(count));
		for (uint64 i = 0; i < n; i++)
			count[(from[i] >> shift) & ((1 << digit) - 1)]++;
		for (int i = 0; i < 1 << digit; i++)
		{
			uint64 c = count[i];

			count[i] = sum;
			sum += c;
		}
		for (uint64 i = 0; i < n; i++)
			to[count[(from[i] >> shift) & ((1 << digit) - 1)]++] = from[i];
		swap = from;
		from = to;
		to = swap;
	}
	free(to);
	*keys = from;
	return true;
}

static EsSegmentOrder *
begin_order(const EsSegmentInfo *info)
{
	EsSegmentOrder *o = calloc(1, sizeof(EsSegmentOrder));
	uint64			nrows = info->summary.nrows;
	uint64			span = info->summary.max_position - info->summary.min_position;

	if (o == NULL)
		return NULL;
	o->nrows = nrows;
	o->min = info->summary.min_position;
	while (o->row_bits < 63 && (nrows >> o->row_bits) != 0)
		o->row_bits++;
	if (info->summary.max_position >= info->summary.min_position && (span >> (63 - o->row_bits)) == 0)
		o->keys = malloc(Max(nrows, 1) * sizeof(uint64));
	else
		o->pairs = malloc(Max(nrows, 1) * sizeof(Pair));
	if (o->keys == NULL && o->pairs == NULL)
	{
		free(o);
		return NULL;
	}
	return o;
}

EsOrderState
es_segment_order(EsSegmentRef *ref, EsSegment *seg, int64 deadline, EsError *err)
{
	const EsSegmentInfo *info = es_segment_info(seg);
	EsSegmentOrder		*o = ref->order;
	EsRowBlock			*block;
	bool				*nothing;
	EsOrderState		 state = ES_ORDER_READY;

	if (o != NULL && o->ready)
		return ES_ORDER_READY;
	memset(err, 0, sizeof(*err));
	if (o == NULL)
		o = ref->order = begin_order(info);
	block = es_block_create();
	if (o == NULL || block == NULL)
	{
		es_block_free(block);
		es_fail(err, ES_ERR_NOMEM, 0, "out of memory");
		return ES_ORDER_FAILED;
	}

	nothing = palloc0(info->ncols * sizeof(bool));
	while (o->next_zone < info->nzones)
	{
		EsZoneInfo zone = es_segment_zone(seg, o->next_zone);
		EsStatus   status;

		status = es_segment_read(seg, zone.first_row, zone.nrows, nothing, ES_WANT_POSITION, block, err);
		if (status == ES_OK && zone.first_row + zone.nrows > o->nrows)
			status = es_fail(err, ES_ERR_CORRUPT, 0, "zone %u ends behind the last row", o->next_zone);
		if (status != ES_OK)
		{
			err->status = status;
			es_segment_damaged(ref, err);
			state = ES_ORDER_FAILED;
			break;
		}
		for (uint32 r = 0; r < zone.nrows; r++)
		{
			uint64 row = zone.first_row + r;
			uint64 position = es_block_position(block, r);

			if (o->keys != NULL)
				o->keys[row] = (position - o->min) << o->row_bits | row;
			else
			{
				o->pairs[row].position = position;
				o->pairs[row].row = row;
			}
		}
		o->next_zone++;
		if (es_task_clock() >= deadline)
		{
			state = ES_ORDER_BUILDING;
			break;
		}
	}
	pfree(nothing);
	es_block_free(block);
	if (state != ES_ORDER_READY)
		return state;

	if (o->pairs != NULL)
		qsort(o->pairs, o->nrows, sizeof(Pair), compare_pairs);
	else if (!radix_sort(&o->keys, o->nrows, o->row_bits,
						 (info->summary.max_position - o->min) << o->row_bits))
	{
		es_fail(err, ES_ERR_NOMEM, 0, "out of memory");
		return ES_ORDER_FAILED;
	}
	o->ready = true;
	return ES_ORDER_READY;
}

void
es_segment_order_at(const EsSegmentRef *ref, uint64 i, EsPosition *stored, uint64 *row)
{
	const EsSegmentOrder *o = ref->order;

	if (o->pairs != NULL)
	{
		*stored = o->pairs[i].position;
		*row = o->pairs[i].row;
	}
	else
	{
		*stored = o->min + (o->keys[i] >> o->row_bits);
		*row = o->keys[i] & ((UINT64CONST(1) << o->row_bits) - 1);
	}
}

uint64
es_segment_order_above(const EsSegmentRef *ref, EsPosition after)
{
	uint64 low = 0;
	uint64 high = ref->order->nrows;

	while (low < high)
	{
		uint64	   mid = low + (high - low) / 2;
		EsPosition position;
		uint64	   row;

		es_segment_order_at(ref, mid, &position, &row);
		if (position > after)
			high = mid;
		else
			low = mid + 1;
	}
	return low;
}

/* ---- memory ---- */

Size
es_segment_rows_memory(const EsSegmentRef *ref)
{
	Size memory = 0;

	if (ref->order != NULL)
		memory += ref->order->nrows * (ref->order->keys != NULL ? sizeof(uint64) : sizeof(Pair));
	if (ref->contexts != NULL)
		memory += (Size) ref->contexts->n * sizeof(uint64);
	return memory;
}

void
es_segment_rows_free(EsSegmentRef *ref)
{
	if (ref->order != NULL)
	{
		free(ref->order->keys);
		free(ref->order->pairs);
		free(ref->order);
		ref->order = NULL;
	}
	if (ref->contexts != NULL)
	{
		free(ref->contexts->first_rows);
		free(ref->contexts);
		ref->contexts = NULL;
	}
}
