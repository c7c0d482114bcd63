/*-------------------------------------------------------------------------
 *
 * scan_filter.c
 *	  From the rows of a chunk to those that the reader wants: visibility, bounds,
 *	  filters; and which zones need not be read at all.
 *
 * A chunk holds row numbers.  Each test runs over all of them and keeps those that
 * pass, so that what is the same for all rows (column, operator, where
 * values lie) is decided outside its loop.  The tests that cost least and drop
 * most come first.
 *
 * Filters are exact: a row is left out if and only if the condition is not true, NULL
 * included.  Zones are left out only if their statistics prove that no row passes.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "core/route.h"
#include "shard/scan.h"

/* ---- parsing ---- */

static int
compare_int64(const void *a, const void *b)
{
	int64 x = *(const int64 *) a;
	int64 y = *(const int64 *) b;

	return x < y ? -1 : x > y;
}

static inline int
compare_lengths_and_bytes(const void *a, Size alen, const void *b, Size blen)
{
	if (alen != blen)
		return alen < blen ? -1 : 1;
	return memcmp(a, b, alen);
}

static int
compare_bytes(const void *a, const void *b)
{
	const struct EsFilterBytes *x = a;
	const struct EsFilterBytes *y = b;

	return compare_lengths_and_bytes(x->data, x->len, y->data, y->len);
}

bool
es_scan_parse_filters(EsScan *scan, const char *p, Size len, uint32 n)
{
	if (n > len / sizeof(EsFilter))
		return false;
	scan->filters = palloc0(Max(n, 1) * sizeof(EsScanFilter));
	for (uint32 i = 0; i < n; i++)
	{
		EsFilter	  head;
		EsScanFilter *f = &scan->filters[i];
		Size		  body;
		const char	 *v;

		if (len < sizeof(head))
			return false;
		memcpy(&head, p, sizeof(head));
		if (head.len < sizeof(head) || head.len > len || head.len % 8 != 0 || head.column >= scan->natts ||
			head.op < ES_FILTER_EQ || head.op > ES_FILTER_NOT_NULL || head.kind < ES_FILTER_BYTES ||
			head.kind > ES_FILTER_INT64)
			return false;
		body = head.len - sizeof(head);
		v = p + sizeof(head);
		f->column = head.column;
		f->op = head.op;
		f->kind = head.kind;
		f->nvalues = head.nvalues;
		if (f->op == ES_FILTER_IS_NULL || f->op == ES_FILTER_NOT_NULL)
			f->nvalues = 0;
		else if (f->op != ES_FILTER_IN && f->nvalues != 1)
			return false;
		else if (f->kind == ES_FILTER_INT64)
		{
			if (f->nvalues > body / sizeof(int64))
				return false;
			f->ints = palloc(Max(f->nvalues, 1) * sizeof(int64));
			memcpy(f->ints, v, f->nvalues * sizeof(int64));
			qsort(f->ints, f->nvalues, sizeof(int64), compare_int64);
		}
		else
		{
			if ((f->op != ES_FILTER_EQ && f->op != ES_FILTER_IN) || f->nvalues > body / sizeof(uint64))
				return false;
			f->bytes = palloc(Max(f->nvalues, 1) * sizeof(struct EsFilterBytes));
			for (uint32 j = 0; j < f->nvalues; j++)
			{
				uint64 vlen;

				if (body < sizeof(vlen))
					return false;
				memcpy(&vlen, v, sizeof(vlen));
				v += sizeof(vlen);
				body -= sizeof(vlen);
				if (vlen > body || MAXALIGN64(vlen) > body)
					return false;
				f->bytes[j].data = v;
				f->bytes[j].len = vlen;
				v += MAXALIGN64(vlen);
				body -= MAXALIGN64(vlen);
			}
			qsort(f->bytes, f->nvalues, sizeof(struct EsFilterBytes), compare_bytes);
		}
		scan->needed[f->column] = true;
		p += head.len;
		len -= head.len;
		scan->nfilters++;
	}
	return true;
}

/* ---- chunks ---- */

void
es_chunk_of_batch(EsChunk *chunk, const EsMemBatch *b, bool own)
{
	const EsBatchHeader *h = b->view.header;

	chunk->kind = ES_CHUNK_MEM;
	chunk->own = own;
	chunk->ncols = es_batch_table_columns(&b->view);
	chunk->roles = &h->roles;
	chunk->relid = h->relid;
	chunk->batch = b;
	chunk->n = 0;
	chunk->next = 0;
}

void
es_chunk_of_block(EsChunk *chunk, EsScanSegment *s, const EsRowBlock *block, uint64 first_row)
{
	chunk->kind = ES_CHUNK_SEGMENT;
	chunk->own = s->own;
	chunk->ncols = s->ncols;
	chunk->roles = &s->info->roles;
	chunk->relid = s->info->relid;
	chunk->segment = s;
	chunk->block = block;
	chunk->first_row = first_row;
	chunk->n = 0;
	chunk->next = 0;
}

/* Of own rows: the ordinal. */
EsPosition
es_chunk_position(const EsScan *scan, const EsChunk *chunk, uint32 row)
{
	switch (chunk->kind)
	{
		case ES_CHUNK_MEM:
			return chunk->own ? es_batch_ordinal(&chunk->batch->view, row)
							  : es_membatch_position(chunk->batch, row);
		case ES_CHUNK_SEGMENT:
			if (chunk->own)
			{
				const int64 *ordinal =
					es_block_value(chunk->block, chunk->segment->ncols + ES_PENDING_ORDINAL, row);

				if (ordinal != NULL)
					return (EsPosition) *ordinal;
			}
			if ((chunk->segment->hidden & ES_WANT_POSITION) == 0)
				return 0;
			return es_segment_row_position(chunk->segment->ref, es_block_position(chunk->block, row));
		case ES_CHUNK_WINDOW:
			return chunk->window->rows[row].position;
	}
	return 0;
}

/* 0 = none. */
int64
es_chunk_version(const EsScan *scan, const EsChunk *chunk, uint32 row)
{
	switch (chunk->kind)
	{
		case ES_CHUNK_MEM:
			return chunk->own ? 0 : es_membatch_version(chunk->batch, row);
		case ES_CHUNK_SEGMENT:
			if (chunk->own || (chunk->segment->hidden & ES_WANT_VERSION) == 0)
				return 0;
			if (chunk->segment->ref->entry.first_versions != NULL)
				return es_segment_row_version(chunk->segment->ref, chunk->first_row + row);
			return (int64) es_block_version(chunk->block, row);
		case ES_CHUNK_WINDOW:
			return chunk->window->rows[row].version;
	}
	return 0;
}

/*
 * The value of a role column that readers see: what was assigned, and in own rows, which have
 * nothing assigned yet, what was given.
 */
bool
es_chunk_role_value(const EsScan *scan, const EsChunk *c, bool is_position, uint32 row, int64 *value)
{
	if (!c->own)
	{
		*value = is_position ? (int64) es_chunk_position(scan, c, row) : es_chunk_version(scan, c, row);
		return *value != 0;
	}
	if (c->kind == ES_CHUNK_MEM)
	{
		const int64 *given =
			es_chunk_value(c, (is_position ? c->roles->position : c->roles->version) - 1, row);

		if (given == NULL)
			return false;
		*value = *given;
		return true;
	}
	if (!is_position)
	{
		*value = (c->segment->hidden & ES_WANT_VERSION) ? (int64) es_block_version(c->block, row) : 0;
		return *value != 0;
	}
	/* the ordinal stands apart where the position is given */
	if (es_block_value(c->block, c->segment->ncols + ES_PENDING_ORDINAL, row) == NULL)
		return false;
	*value = (int64) es_block_position(c->block, row);
	return true;
}

/* ---- tests ---- */

#define KEEP_ROWS(chunk, condition)                \
	do                                             \
	{                                              \
		uint32 kept_ = 0;                          \
		for (uint32 i_ = 0; i_ < (chunk)->n; i_++) \
		{                                          \
			uint32 row = (chunk)->rows[i_];        \
			(chunk)->rows[kept_] = row;            \
			kept_ += (condition) ? 1 : 0;          \
		}                                          \
		(chunk)->n = kept_;                        \
	} while (0)

static bool
segment_row_visible(EsScan *scan, const EsChunk *c, uint32 row)
{
	EsFxid fxid = es_block_fxid(c->block, row);

	if (!es_snapshot_running(&scan->snapshot, fxid))
		return true;
	if (scan->flags & ES_OPEN_REPORT_SKIPPED)
		es_scan_skip(scan, fxid);
	return false;
}

static bool
pending_row_visible(const EsScan *scan, const EsChunk *c, uint32 row)
{
	const EsScanSegment *s = c->segment;
	const int32			*cid = es_block_value(c->block, s->ncols + ES_PENDING_CID, row);
	const int64			*place = es_block_value(c->block, s->ncols + ES_PENDING_PLACE, row);

	if (cid == NULL || !es_own_row_visible(&scan->snapshot, (uint32) *cid))
		return false;
	return s->dead_batches == NULL || place == NULL ||
		   !s->dead_batches[(uint64) *place >> ES_PENDING_ROW_BITS];
}

static void
keep_visible(EsScan *scan, EsChunk *c)
{
	if (c->kind == ES_CHUNK_MEM)
	{
		const EsMemBatch *b = c->batch;

		if (b->skip_local != NULL && !c->own)
			KEEP_ROWS(c, !es_membatch_skipped(b, row));
		if (b->txn->fxid == scan->snapshot.own)
		{
			if (b->view.cids != NULL)
				KEEP_ROWS(c, es_own_row_visible(&scan->snapshot, b->view.cids[row]));
			else if (!es_own_row_visible(&scan->snapshot, b->view.header->cid))
				c->n = 0;
		}
	}
	else
	{
		EsScanSegment *s = c->segment;

		if (s->ref->entry.dead_bitmap != NULL && !s->own)
			KEEP_ROWS(c, !es_segment_row_dead(s->ref, c->first_row + row));
		if (s->own || s->own_finished)
			KEEP_ROWS(c, pending_row_visible(scan, c, row));
		else if (!s->all_visible)
			KEEP_ROWS(c, segment_row_visible(scan, c, row));
	}
}

static inline int64
read_int(const void *p, int len)
{
	switch (len)
	{
		case 1:
			return *(const int8 *) p;
		case 2:
			return *(const int16 *) p;
		case 4:
			return *(const int32 *) p;
		default:
			return *(const int64 *) p;
	}
}

/* Width of a column in the chunk's source. */
static int
column_len(const EsChunk *c, int column)
{
	if (c->kind == ES_CHUNK_MEM)
		return c->batch->view.columns[column].desc.len;
	return c->segment->info->columns[column].len;
}

static bool
int_passes(const EsScanFilter *f, int64 v)
{
	switch (f->op)
	{
		case ES_FILTER_EQ:
			return v == f->ints[0];
		case ES_FILTER_LT:
			return v < f->ints[0];
		case ES_FILTER_LE:
			return v <= f->ints[0];
		case ES_FILTER_GT:
			return v > f->ints[0];
		case ES_FILTER_GE:
			return v >= f->ints[0];
		case ES_FILTER_IN:
			return f->nvalues > 0 && bsearch(&v, f->ints, f->nvalues, sizeof(int64), compare_int64) != NULL;
		default:
			return true;
	}
}

static bool
role_passes(const EsScan *scan, const EsChunk *c, const EsScanFilter *f, bool is_position, uint32 row)
{
	int64 v;
	bool  present = es_chunk_role_value(scan, c, is_position, row, &v);

	if (f->op == ES_FILTER_IS_NULL)
		return !present;
	if (!present)
		return false;
	if (f->kind == ES_FILTER_INT64 || f->op == ES_FILTER_NOT_NULL)
		return int_passes(f, v);
	for (uint32 i = 0; i < f->nvalues; i++)
		if (f->bytes[i].len == sizeof(v) && memcmp(f->bytes[i].data, &v, sizeof(v)) == 0)
			return true;
	return false;
}

static bool
bytes_pass(const EsScanFilter *f, const void *data, Size len)
{
	struct EsFilterBytes key = {data, len};

	if (f->nvalues == 1)
		return f->bytes[0].len == len && memcmp(f->bytes[0].data, data, len) == 0;
	return f->nvalues > 0 && bsearch(&key, f->bytes, f->nvalues, sizeof(key), compare_bytes) != NULL;
}

static bool
varlena_passes(const EsScanFilter *f, const void *value)
{
	const char *data;
	size_t		len;

	es_varlena_data(value, &data, &len);
	return bytes_pass(f, data, len);
}

static void
keep_passing(EsScan *scan, EsChunk *c, const EsScanFilter *f)
{
	int column = f->column;
	int len;

	if (column + 1 == c->roles->position || column + 1 == c->roles->version)
	{
		bool is_position = column + 1 == c->roles->position;

		KEEP_ROWS(c, role_passes(scan, c, f, is_position, row));
		return;
	}
	if (column >= c->ncols)
	{
		if (f->op != ES_FILTER_IS_NULL)
			c->n = 0;
		return;
	}

	len = column_len(c, column);
	switch (f->op)
	{
		case ES_FILTER_IS_NULL:
			KEEP_ROWS(c, es_chunk_value(c, column, row) == NULL);
			return;
		case ES_FILTER_NOT_NULL:
			KEEP_ROWS(c, es_chunk_value(c, column, row) != NULL);
			return;
		default:
			break;
	}

	if (f->kind == ES_FILTER_BYTES)
	{
		const void *v;

		if (len > 0)
			KEEP_ROWS(c, (v = es_chunk_value(c, column, row)) != NULL && bytes_pass(f, v, len));
		else
			KEEP_ROWS(c, (v = es_chunk_value(c, column, row)) != NULL && varlena_passes(f, v));
	}
	else
	{
		const void *v;
		int64		x = f->nvalues > 0 ? f->ints[0] : 0;

#define KEEP_INTS(op) KEEP_ROWS(c, (v = es_chunk_value(c, column, row)) != NULL && read_int(v, len) op x)

		switch (f->op)
		{
			case ES_FILTER_EQ:
				KEEP_INTS(==);
				break;
			case ES_FILTER_LT:
				KEEP_INTS(<);
				break;
			case ES_FILTER_LE:
				KEEP_INTS(<=);
				break;
			case ES_FILTER_GT:
				KEEP_INTS(>);
				break;
			case ES_FILTER_GE:
				KEEP_INTS(>=);
				break;
			default:
				KEEP_ROWS(c, (v = es_chunk_value(c, column, row)) != NULL && int_passes(f, read_int(v, len)));
				break;
		}
#undef KEEP_INTS
	}
}

void
es_scan_thin_chunk(EsScan *scan, EsChunk *chunk)
{
	scan->rows_scanned += chunk->n;
	keep_visible(scan, chunk);
	if (scan->bounded && !chunk->own && chunk->n > 0)
	{
		EsPosition p;

		KEEP_ROWS(chunk, (p = es_chunk_position(scan, chunk, row)) > scan->after && p < scan->below);
	}
	for (int i = 0; i < scan->nfilters && chunk->n > 0; i++)
		keep_passing(scan, chunk, &scan->filters[i]);
}

/* ---- zones ---- */

/* No value in [min, max] passes. */
static bool
range_excluded(const EsScanFilter *f, int64 min, int64 max)
{
	switch (f->op)
	{
		case ES_FILTER_EQ:
			return f->ints[0] < min || f->ints[0] > max;
		case ES_FILTER_LT:
			return min >= f->ints[0];
		case ES_FILTER_LE:
			return min > f->ints[0];
		case ES_FILTER_GT:
			return max <= f->ints[0];
		case ES_FILTER_GE:
			return max < f->ints[0];
		case ES_FILTER_IN:
			for (uint32 i = 0; i < f->nvalues; i++)
				if (f->ints[i] >= min && f->ints[i] <= max)
					return false;
			return true;
		default:
			return false;
	}
}

static bool
filter_excludes(const EsScanSegment *s, uint32 zone, const EsZoneInfo *z, const EsScanFilter *f)
{
	EsZoneColumnStats	stats;
	const EsColumnDesc *desc;

	if (f->column + 1 == s->info->roles.version)
		return false;
	if (f->column + 1 == s->info->roles.position)
		return !s->own && f->kind == ES_FILTER_INT64 &&
			   range_excluded(f, (int64) es_segment_row_position(s->ref, z->min_position),
							  (int64) es_segment_row_position(s->ref, z->max_position));
	if (f->column >= s->ncols)
		return f->op != ES_FILTER_IS_NULL;

	desc = &s->info->columns[f->column];
	if (desc->flags & ES_COLUMN_DROPPED)
		return false;
	stats = es_segment_column_stats(s->segment, zone, f->column);
	if (f->op == ES_FILTER_IS_NULL)
		return stats.nnulls == 0;
	if (stats.nnulls == z->nrows)
		return true;
	return f->kind == ES_FILTER_INT64 && f->nvalues > 0 && stats.has_minmax &&
		   range_excluded(f, stats.min, stats.max);
}

bool
es_scan_zone_excluded(EsScan *scan, const EsScanSegment *s, uint32 zone)
{
	EsZoneInfo z = es_segment_zone(s->segment, zone);

	if (scan->bounded && !s->own &&
		(es_segment_row_position(s->ref, z.max_position) <= scan->after ||
		 es_segment_row_position(s->ref, z.min_position) >= scan->below))
		return true;
	/* who reports what it skipped must look at rows that are not visible */
	if (scan->flags & ES_OPEN_REPORT_SKIPPED)
	{
		if (!s->all_visible && !es_all_visible(&scan->snapshot, z.max_fxid))
			return false;
	}
	else if (!s->all_visible && !s->own && !s->own_finished && z.min_fxid >= scan->snapshot.xmax)
		return true;
	for (int i = 0; i < scan->nfilters; i++)
		if (filter_excludes(s, zone, &z, &scan->filters[i]))
			return true;
	return false;
}
