/*-------------------------------------------------------------------------
 *
 * scan_window.c
 *	  Rows of a segment in the order of positions.
 *
 * A segment is sorted by context.  Its rows in position order lie all over it, so reading
 * them one by one would decode a page for each.  Instead a window of the next rows
 * in position order is gathered at once: their row numbers are sorted, neighbours are
 * read together, what passes visibility and filters is copied, and the copies are sorted
 * by position.  The first window of a scan is small, so that a poll for a few rows stays cheap;
 * each further one is larger, up to a part of cache_size, so that a reader of everything
 * decodes the segment only a few times.
 *
 * Gathering goes on over several slices.  If the values turn out much larger than their
 * average the window starts again with fewer rows.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "core/route.h"
#include "guc.h"
#include "shard/scan.h"

#define FIRST_WINDOW	 256		 /* rows */
#define FOLLOWER_WINDOW	 (16 * 1024) /* who says how many rows he wants gets them in one window */
#define LAST_WINDOW		 (256 * 1024)
#define MIN_WINDOW_BYTES (1024 * 1024)
#define MAX_WINDOW_BYTES (32 * 1024 * 1024)

/* Rows that are not wanted between two that are, for which one read is better than two. */
#define GAP 24

#define BUMP_BLOCK (128 * 1024)

typedef enum SegmentStage
{
	STAGE_CLOSED,
	STAGE_ORDERING,
	STAGE_OPEN
} SegmentStage;

typedef struct SegmentStream
{
	EsStream	   stream; /* first */
	EsScanSegment *s;
	SegmentStage   stage;
	/* in the order of positions: rows [low, high) are left */
	uint64 low;
	uint64 high;
	uint32 size; /* rows of the next window */

	EsWindow	window;
	bool		gathering;
	uint64	   *rows; /* ascending row numbers of the window being gathered */
	uint32		nrows;
	uint32		done;
	uint32		allocated; /* of window.rows */
	Size		bytes;
	char	   *bump;
	Size		bump_left;
	EsRowBlock *block;
	EsChunk		part; /* of one read */
} SegmentStream;

static int
compare_uint64(const void *a, const void *b)
{
	uint64 x = *(const uint64 *) a;
	uint64 y = *(const uint64 *) b;

	return x < y ? -1 : x > y;
}

#define ST_SORT			 sort_ascending
#define ST_ELEMENT_TYPE	 EsWindowRow
#define ST_COMPARE(a, b) ((a)->position < (b)->position ? -1 : (a)->position > (b)->position)
#define ST_SCOPE		 static
#define ST_DEFINE
#define ST_DECLARE
#include "lib/sort_template.h"

#define ST_SORT			 sort_descending
#define ST_ELEMENT_TYPE	 EsWindowRow
#define ST_COMPARE(a, b) ((a)->position > (b)->position ? -1 : (a)->position < (b)->position)
#define ST_SCOPE		 static
#define ST_DEFINE
#define ST_DECLARE
#include "lib/sort_template.h"

/* Own rows are merged by ordinal + 1, like those in memory. */
static inline uint64
key_of(const EsScan *scan, const SegmentStream *s, EsPosition position)
{
	return es_scan_key(scan, s->s->own ? position + 1 : position);
}

static Size
window_bytes(void)
{
	Size bytes = (Size) es_guc_cache_size * 1024 / 4;

	return Max(MIN_WINDOW_BYTES, Min(bytes, MAX_WINDOW_BYTES));
}

/* ---- copying ---- */

static void *
bump_alloc(SegmentStream *s, Size len)
{
	void *p;

	len = MAXALIGN(len);
	if (len > BUMP_BLOCK / 4)
		p = MemoryContextAllocHuge(s->window.context, len);
	else
	{
		if (len > s->bump_left)
		{
			s->bump = MemoryContextAlloc(s->window.context, BUMP_BLOCK);
			s->bump_left = BUMP_BLOCK;
		}
		p = s->bump;
		s->bump += len;
		s->bump_left -= len;
	}
	s->bytes += len;
	return p;
}

static void
copy_row(EsScan *scan, SegmentStream *s, uint32 row)
{
	const EsChunk *part = &s->part;
	EsWindowRow	  *out;

	if (s->window.nrows == s->allocated)
	{
		s->allocated = Max(256, s->allocated * 2);
		if (s->window.rows == NULL)
			s->window.rows = MemoryContextAlloc(s->window.context, s->allocated * sizeof(EsWindowRow));
		else
			s->window.rows = repalloc_huge(s->window.rows, s->allocated * sizeof(EsWindowRow));
	}
	out = &s->window.rows[s->window.nrows++];
	out->position = es_chunk_position(scan, part, row);
	out->version = es_chunk_version(scan, part, row);
	out->values = bump_alloc(s, Max(scan->ncolumns, 1) * sizeof(void *));
	for (int i = 0; i < scan->ncolumns; i++)
	{
		int			column = scan->columns[i];
		const void *value;
		Size		len;
		int64		role;

		out->values[i] = NULL;
		if (column + 1 == part->roles->position || column + 1 == part->roles->version)
		{
			if (!es_chunk_role_value(scan, part, column + 1 == part->roles->position, row, &role))
				continue;
			value = &role;
			len = sizeof(role);
		}
		else
		{
			value = es_chunk_value(part, column, row);
			if (value == NULL)
				continue;
			len = part->segment->info->columns[column].len > 0 ? part->segment->info->columns[column].len
															   : es_varlena_size(value);
		}
		out->values[i] = memcpy(bump_alloc(s, len), value, len);
	}
}

/* ---- gathering ---- */

static void
empty_window(SegmentStream *s)
{
	MemoryContextReset(s->window.context);
	s->window.rows = NULL;
	s->window.nrows = 0;
	s->window.next = 0;
	s->allocated = 0;
	s->bump = NULL;
	s->bump_left = 0;
	s->bytes = 0;
}

static void
begin_window(EsScan *scan, SegmentStream *s)
{
	uint64	   n = Min(s->size, s->high - s->low);
	EsPosition stored;

	if (scan->nfilters == 0)
		n = Min(n, Max(scan->max_rows - scan->rows_out, 16));
	empty_window(s);
	s->rows = MemoryContextAllocHuge(s->window.context, n * sizeof(uint64));
	for (uint64 i = 0; i < n; i++)
		es_segment_order_at(s->s->ref, scan->descending ? s->high - 1 - i : s->low + i, &stored, &s->rows[i]);
	qsort(s->rows, n, sizeof(uint64), compare_uint64);
	s->nrows = (uint32) n;
	s->done = 0;
	s->gathering = true;
}

/* Reads the rows of the window that lie together from s->done on. */
static bool
gather_some(EsScan *scan, SegmentStream *s)
{
	EsScanSegment *seg = s->s;
	uint64		   first = s->rows[s->done];
	uint32		   zone_number = (uint32) (first / ES_ZONE_ROWS);
	EsZoneInfo	   zone;
	uint32		   end = s->done + 1;
	EsError		   err = {0};
	EsStatus	   status;

	/* zones are full but for the last; a file that does it otherwise is found by walking */
	zone = es_segment_zone(seg->segment, Min(zone_number, seg->info->nzones - 1));
	while (first < zone.first_row && zone_number > 0)
		zone = es_segment_zone(seg->segment, --zone_number);
	while (first >= zone.first_row + zone.nrows && zone_number + 1 < seg->info->nzones)
		zone = es_segment_zone(seg->segment, ++zone_number);

	if (es_scan_zone_excluded(scan, seg, zone_number))
	{
		while (end < s->nrows && s->rows[end] < zone.first_row + zone.nrows)
			end++;
		scan->rows_pruned += end - s->done;
		s->done = end;
		return true;
	}

	while (end < s->nrows && s->rows[end] < zone.first_row + zone.nrows &&
		   s->rows[end] - s->rows[end - 1] <= GAP && s->rows[end] - first < seg->read_rows)
		end++;
	status = es_segment_read(seg->segment, first, (uint32) (s->rows[end - 1] - first + 1), seg->wanted,
							 seg->hidden, s->block, &err);
	if (status != ES_OK)
	{
		err.status = status;
		es_segment_damaged(seg->ref, &err);
		es_scan_damage(scan, seg->ref, &err);
		return false;
	}
	es_chunk_of_block(&s->part, seg, s->block, first);
	for (uint32 i = s->done; i < end; i++)
		s->part.rows[s->part.n++] = (uint32) (s->rows[i] - first);
	s->done = end;
	es_scan_thin_chunk(scan, &s->part);
	for (uint32 i = 0; i < s->part.n; i++)
		copy_row(scan, s, s->part.rows[i]);
	return true;
}

/* DONE: the window is there (or failed). */
static EsTaskState
gather(EsScan *scan, SegmentStream *s)
{
	Size room = window_bytes();

	if (!s->gathering)
		begin_window(scan, s);
	while (s->done < s->nrows)
	{
		if (!gather_some(scan, s))
			return ES_TASK_DONE;
		if (s->bytes > 2 * room && s->nrows > 16)
		{
			s->size = Max(16, s->nrows / 4);
			begin_window(scan, s);
		}
		if (es_task_clock() >= scan->deadline)
			return ES_TASK_MORE;
	}
	s->gathering = false;
	if (scan->descending)
		s->high -= s->nrows;
	else
		s->low += s->nrows;
	if (s->bytes < room / 2)
		s->size = Min(s->size * 4, LAST_WINDOW);
	if (scan->descending)
		sort_descending(s->window.rows, s->window.nrows);
	else
		sort_ascending(s->window.rows, s->window.nrows);
	return ES_TASK_DONE;
}

/* ---- the stream ---- */

/* Key of the next row, exact if the window has one. */
static void
set_key(EsScan *scan, SegmentStream *s)
{
	EsPosition stored;
	uint64	   row;

	if (s->window.next < s->window.nrows)
		s->stream.key = key_of(scan, s, s->window.rows[s->window.next].position);
	else if (s->low >= s->high)
		s->stream.key = UINT64_MAX;
	else
	{
		es_segment_order_at(s->s->ref, scan->descending ? s->high - 1 : s->low, &stored, &row);
		s->stream.key = key_of(scan, s, es_segment_row_position(s->s->ref, stored));
	}
}

static EsTaskState
open_stream(EsScan *scan, SegmentStream *s)
{
	EsSegmentRef *ref = s->s->ref;
	EsPosition	  base = ref->entry.base;
	EsError		  err;

	if (s->stage == STAGE_CLOSED)
	{
		if (!es_scan_open_segment(scan, s->s))
			return ES_TASK_DONE;
		s->stage = STAGE_ORDERING;
	}
	switch (es_segment_order(ref, s->s->segment, scan->deadline, &err))
	{
		case ES_ORDER_FAILED:
			es_scan_damage(scan, ref, &err);
			return ES_TASK_DONE;
		case ES_ORDER_BUILDING:
			return ES_TASK_MORE;
		case ES_ORDER_READY:
			break;
	}

	s->low = 0;
	s->high = s->s->info->summary.nrows;
	if (scan->bounded && !s->s->own)
	{
		if (scan->after >= base)
			s->low = es_segment_order_above(ref, scan->after - base);
		if (scan->below != UINT64_MAX)
			s->high = scan->below > base ? es_segment_order_above(ref, scan->below - base - 1) : 0;
		if (s->high < s->low)
			s->high = s->low;
	}
	scan->rows_pruned += s->s->info->summary.nrows - (s->high - s->low);
	s->block = es_block_create();
	if (s->block == NULL)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
	s->window.context =
		AllocSetContextCreate(scan->task.context, "event_store window", ALLOCSET_DEFAULT_SIZES);
	s->part.rows = MemoryContextAlloc(scan->task.context, ES_CHUNK_ROWS * sizeof(uint32));
	s->stage = STAGE_OPEN;
	set_key(scan, s);
	return ES_TASK_DONE;
}

static EsTaskState
fill_from_segment(EsScan *scan, EsStream *stream, uint64 limit, EsChunk *chunk)
{
	SegmentStream *s = (SegmentStream *) stream;
	EsWindow	  *w = &s->window;

	if (s->stage != STAGE_OPEN)
		return open_stream(scan, s);
	if (w->next >= w->nrows || s->gathering)
	{
		EsTaskState state = gather(scan, s);

		if (!scan->failed && state == ES_TASK_DONE)
			set_key(scan, s);
		return state;
	}

	chunk->kind = ES_CHUNK_WINDOW;
	chunk->own = s->s->own;
	chunk->ncols = s->s->ncols;
	chunk->roles = &s->s->info->roles;
	chunk->relid = s->s->info->relid;
	chunk->segment = s->s;
	chunk->window = w;
	chunk->next = 0;
	while (w->next < w->nrows && chunk->n < ES_CHUNK_ROWS &&
		   (chunk->n == 0 || key_of(scan, s, w->rows[w->next].position) <= limit))
		chunk->rows[chunk->n++] = w->next++;
	/* the window's memory goes only when the next one begins, after this chunk was sent */
	set_key(scan, s);
	return ES_TASK_DONE;
}

static void
release_segment(EsStream *stream)
{
	SegmentStream *s = (SegmentStream *) stream;

	es_block_free(s->block);
	s->block = NULL;
}

EsStream *
es_stream_of_segment(EsScan *scan, EsScanSegment *segment)
{
	SegmentStream			*s = MemoryContextAllocZero(scan->task.context, sizeof(SegmentStream));
	const EsManifestSegment *m = &segment->ref->entry.segment;

	s->s = segment;
	s->size = FIRST_WINDOW;
	if (scan->nfilters == 0 && scan->max_rows != UINT64_MAX)
		s->size = (uint32) Max(FIRST_WINDOW, Min(scan->max_rows, FOLLOWER_WINDOW));
	s->stream.fill = fill_from_segment;
	s->stream.release = release_segment;
	/* a bound; positions of 0 say that they are not known */
	if (!segment->own && m->min_position != 0 && m->max_position != 0)
		s->stream.key = es_scan_key(scan, scan->descending ? m->max_position : m->min_position);
	return &s->stream;
}
