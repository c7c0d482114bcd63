/*-------------------------------------------------------------------------
 *
 * segment_block.c
 *	  Row blocks: the wanted columns of a range of rows, ready to be looked at.
 *
 * A column of a block is one of
 *	 NOTHING	not wanted, or NULL in all rows
 *	 CONSTANT	one value for all rows
 *	 ARRAY		integers, unpacked side by side, with a byte per row for NULL if
 *				there may be any
 *	 POINTERS	into decoded pages, which the block holds references to, or to values
 *				that were put together from overflow pages; NULL for NULL
 *
 * Arrays come from an arena that the block keeps from read to read; it grows to
 * the largest read, which a zone bounds.  Overflow values are freed by the next read.
 *
 *-------------------------------------------------------------------------
 */
#include "core/segment_reader.h"

#include <stdlib.h>
#include <string.h>

#define ARENA_CHUNK (64 * 1024)

typedef enum BlockColumnKind
{
	COLUMN_NOTHING = 0,
	COLUMN_CONSTANT,
	COLUMN_ARRAY,
	COLUMN_POINTERS
} BlockColumnKind;

typedef struct BlockColumn
{
	BlockColumnKind kind;
	uint32_t		stride;
	const uint8_t  *data;	  /* CONSTANT, ARRAY */
	const uint8_t  *nulls;	  /* ARRAY: byte per row, NULL = none */
	const void	  **pointers; /* POINTERS */
} BlockColumn;

typedef struct ArenaChunk
{
	struct ArenaChunk *next;
	size_t			   room;
	size_t			   used;
	uint64_t		   bytes[];
} ArenaChunk;

struct EsRowBlock
{
	uint32_t	 nrows;
	int			 ncols; /* the table's; the hidden ones follow */
	uint32_t	 columns_room;
	BlockColumn *columns;

	ArenaChunk *chunks; /* all of them; those before `chunk` are full */
	ArenaChunk *chunk;
	size_t		arena_bytes;

	EsPage **pages; /* references held */
	uint32_t npages;
	uint32_t pages_room;
	size_t	 pages_bytes;

	void   **values; /* overflow values */
	uint32_t nvalues;
	uint32_t values_room;
	size_t	 values_bytes;
};

/* ---- memory ---- */

EsRowBlock *
es_block_create(void)
{
	return calloc(1, sizeof(EsRowBlock));
}

void
es_block_clear(EsRowBlock *b)
{
	for (uint32_t i = 0; i < b->npages; i++)
		es_page_unref(b->pages[i]);
	for (uint32_t i = 0; i < b->nvalues; i++)
		free(b->values[i]);
	for (ArenaChunk *c = b->chunks; c != NULL; c = c->next)
		c->used = 0;
	b->chunk = b->chunks;
	b->npages = 0;
	b->pages_bytes = 0;
	b->nvalues = 0;
	b->values_bytes = 0;
	b->nrows = 0;
	b->ncols = 0;
}

void
es_block_free(EsRowBlock *b)
{
	if (b == NULL)
		return;
	es_block_clear(b);
	while (b->chunks != NULL)
	{
		ArenaChunk *next = b->chunks->next;

		free(b->chunks);
		b->chunks = next;
	}
	free(b->columns);
	free(b->pages);
	free(b->values);
	free(b);
}

size_t
es_block_memory(const EsRowBlock *b)
{
	return sizeof(*b) + sizeof(BlockColumn) * b->columns_room + b->arena_bytes +
		   sizeof(EsPage *) * b->pages_room + b->pages_bytes + sizeof(void *) * b->values_room +
		   b->values_bytes;
}

/* len bytes, 8-byte aligned, until the next read. */
static void *
arena_alloc(EsRowBlock *b, size_t len)
{
	ArenaChunk **link = &b->chunks;
	void		*p;

	len = ES_PAD8(len);
	if (b->chunk != NULL)
	{
		/* The next chunks may be too small: they are passed over. */
		while (b->chunk->room - b->chunk->used < len && b->chunk->next != NULL)
			b->chunk = b->chunk->next;
		link = &b->chunk->next;
	}
	if (b->chunk == NULL || b->chunk->room - b->chunk->used < len)
	{
		size_t		room = len < ARENA_CHUNK ? ARENA_CHUNK : len;
		ArenaChunk *c = malloc(sizeof(*c) + room);

		if (c == NULL)
			return NULL;
		c->next = NULL;
		c->room = room;
		c->used = 0;
		*link = c;
		b->chunk = c;
		b->arena_bytes += sizeof(*c) + room;
	}
	p = (uint8_t *) b->chunk->bytes + b->chunk->used;
	b->chunk->used += len;
	return p;
}

static bool
reserve(void **array, uint32_t *room, uint32_t n, size_t size)
{
	uint32_t wanted = *room < 16 ? 16 : *room;
	void	*p;

	if (n <= *room)
		return true;
	while (wanted < n)
		wanted *= 2;
	p = realloc(*array, wanted * size);
	if (p == NULL)
		return false;
	*array = p;
	*room = wanted;
	return true;
}

static EsStatus
no_memory(EsError *err)
{
	return es_fail(err, ES_ERR_NOMEM, 0, "out of memory for rows of a segment");
}

/* ---- reading a column ---- */

/* The rows of the zone that are wanted. */
typedef struct Range
{
	uint32_t zone;
	uint32_t first;
	uint32_t n;
} Range;

/* Rows of the range that are in the page: from *page_row on, to *out_row on. */
static uint32_t
rows_in_page(const EsPage *page, const Range *range, uint32_t *page_row, uint32_t *out_row)
{
	uint32_t begin = range->first > page->first_row ? range->first : page->first_row;
	uint32_t page_end = (uint32_t) page->first_row + page->nrows;
	uint32_t end = range->first + range->n < page_end ? range->first + range->n : page_end;

	*page_row = begin - page->first_row;
	*out_row = begin - range->first;
	return end - begin;
}

static void
fill_array(const EsPage *page, const Range *range, BlockColumn *c, uint8_t *data, uint8_t *nulls)
{
	uint32_t page_row;
	uint32_t out_row;
	uint32_t n = rows_in_page(page, range, &page_row, &out_row);

	es_page_ints(page, page_row, n, c->stride, data + (size_t) out_row * c->stride);
	if (nulls != NULL)
		for (uint32_t i = 0; i < n; i++)
			nulls[out_row + i] = es_page_is_null(page, page_row + i);
}

/* Puts values of overflow pages in the place of their references. */
static EsStatus
fetch_overflow(EsSegment *seg, uint32_t zone, uint32_t column, const EsPage *page, uint32_t page_row,
			   uint32_t n, const void **pointers, EsRowBlock *b, EsError *err)
{
	for (uint32_t i = 0; i < n; i++)
	{
		EsOverflowRef ref;
		uint8_t		 *value;
		EsStatus	  status;

		if (pointers[i] == NULL || *(const uint8_t *) pointers[i] != ES_OVERFLOW_MARKER)
			continue;
		memcpy(&ref, pointers[i], sizeof(ref));
		status = es_segment_check_overflow(seg, &ref, page->offset, err);
		if (status != ES_OK)
			return status;
		if (!reserve((void **) &b->values, &b->values_room, b->nvalues + 1, sizeof(void *)))
			return no_memory(err);
		value = malloc(ref.raw_len);
		if (value == NULL)
			return es_fail(err, ES_ERR_NOMEM, ref.offset, "out of memory for a value of %u bytes",
						   ref.raw_len);
		b->values[b->nvalues++] = value;
		b->values_bytes += ref.raw_len;
		status =
			es_segment_read_overflow(seg, &ref, zone, page->first_row + page_row + i, column, value, err);
		if (status != ES_OK)
			return status;
		pointers[i] = value;
	}
	return ES_OK;
}

static EsStatus
fill_pointers(EsSegment *seg, uint32_t column, const EsPage *page, const Range *range, const void **pointers,
			  EsRowBlock *b, EsError *err)
{
	uint32_t page_row;
	uint32_t out_row;
	uint32_t n = rows_in_page(page, range, &page_row, &out_row);

	if (!es_page_pointers(page, page_row, n, pointers + out_row))
		return es_fail(err, ES_ERR_CORRUPT, page->offset, "segment page names a dictionary entry it has not");
	if (!page->has_overflow)
		return ES_OK;
	return fetch_overflow(seg, range->zone, column, page, page_row, n, pointers + out_row, b, err);
}

static EsStatus
read_pages(EsSegment *seg, const Range *range, uint32_t column, EsRowBlock *b, EsError *err)
{
	const EsChunkEntry *chunk = es_segment_chunk(seg, range->zone, column);
	const EsColumnDesc *desc = &seg->physical[column];
	BlockColumn		   *c = &b->columns[column];
	bool				is_array = es_page_is_int(desc);
	uint32_t			first = es_segment_page_of(seg, chunk, range->first);
	uint32_t			n = es_segment_page_of(seg, chunk, range->first + range->n - 1) - first + 1;
	uint8_t			   *data = NULL;
	uint8_t			   *nulls = NULL;
	const void		  **pointers = NULL;
	EsPage			  **pages;
	EsStatus			status;

	c->stride = is_array ? es_page_stride(desc) : 0;
	if (is_array)
		data = arena_alloc(b, (size_t) range->n * c->stride);
	else
		pointers = arena_alloc(b, sizeof(void *) * range->n);
	if (is_array && chunk->nnulls > 0 && (nulls = arena_alloc(b, range->n)) == NULL)
		return no_memory(err);
	if ((data == NULL && pointers == NULL) ||
		!reserve((void **) &b->pages, &b->pages_room, b->npages + n, sizeof(EsPage *)))
		return no_memory(err);

	pages = b->pages + b->npages;
	status = es_segment_data_pages(seg, range->zone, column, first, n, pages, err);
	if (status != ES_OK)
		return status;
	for (uint32_t i = 0; i < n; i++)
	{
		if (is_array)
		{
			fill_array(pages[i], range, c, data, nulls);
			es_page_unref(pages[i]);
		}
		else
		{
			b->npages++;
			b->pages_bytes += pages[i]->memory;
			if (status == ES_OK)
				status = fill_pointers(seg, column, pages[i], range, pointers, b, err);
		}
	}
	c->kind = is_array ? COLUMN_ARRAY : COLUMN_POINTERS;
	c->data = data;
	c->nulls = nulls;
	c->pointers = pointers;
	return status;
}

static EsStatus
read_column(EsSegment *seg, const Range *range, uint32_t column, EsRowBlock *b, EsError *err)
{
	const EsChunkEntry *chunk = es_segment_chunk(seg, range->zone, column);
	BlockColumn		   *c = &b->columns[column];

	if (chunk->flags & ES_CHUNK_CONSTANT)
	{
		uint8_t *value = arena_alloc(b, chunk->stored_len);

		if (value == NULL)
			return no_memory(err);
		memcpy(value, seg->constants + chunk->first_page, chunk->stored_len);
		c->kind = COLUMN_CONSTANT;
		c->data = value;
		return ES_OK;
	}
	if (!es_chunk_has_pages(chunk))
		return ES_OK;
	return read_pages(seg, range, column, b, err);
}

EsStatus
es_segment_read(EsSegment *seg, uint64_t first_row, uint32_t nrows, const bool *wanted, uint32_t hidden,
				EsRowBlock *b, EsError *err)
{
	static const uint32_t hidden_bits[ES_HIDDEN_COLUMNS] = {
		[ES_HIDDEN_CONTENT_HASH] = ES_WANT_CONTENT_HASH,
		[ES_HIDDEN_POSITION] = ES_WANT_POSITION,
		[ES_HIDDEN_VERSION] = ES_WANT_VERSION,
		[ES_HIDDEN_FXID] = ES_WANT_FXID,
	};
	uint32_t ncols = (uint32_t) seg->info.ncols;
	Range	 range;
	EsStatus status = ES_OK;

	es_block_clear(b);
	if (nrows == 0)
		return ES_OK;
	if (first_row >= seg->footer->nrows)
		return es_fail(err, ES_ERR_ARGUMENT, 0, "segment has no row %llu", (unsigned long long) first_row);
	range.zone = es_segment_zone_of(seg, first_row);
	range.first = (uint32_t) (first_row - seg->zones[range.zone].first_row);
	range.n = nrows;
	if (nrows > seg->zones[range.zone].nrows - range.first)
		return es_fail(err, ES_ERR_ARGUMENT, 0, "rows %llu + %u of a segment are not in one zone",
					   (unsigned long long) first_row, nrows);

	if (!reserve((void **) &b->columns, &b->columns_room, seg->nphysical, sizeof(BlockColumn)))
		return no_memory(err);
	memset(b->columns, 0, sizeof(BlockColumn) * seg->nphysical);
	for (uint32_t i = 0; i < seg->nphysical && status == ES_OK; i++)
		if (i < ncols ? wanted == NULL || wanted[i] : (hidden & hidden_bits[i - ncols]) != 0)
			status = read_column(seg, &range, i, b, err);
	if (status != ES_OK)
	{
		es_block_clear(b);
		return status;
	}
	b->ncols = (int) ncols;
	b->nrows = nrows;
	return ES_OK;
}

/* ---- looking ---- */

static inline const void *
value_of(const BlockColumn *c, uint32_t r)
{
	switch (c->kind)
	{
		case COLUMN_POINTERS:
			return c->pointers[r];
		case COLUMN_ARRAY:
			return c->nulls != NULL && c->nulls[r] ? NULL : c->data + (size_t) r * c->stride;
		case COLUMN_CONSTANT:
			return c->data;
		default:
			return NULL;
	}
}

const void *
es_block_value(const EsRowBlock *b, int column, uint32_t r)
{
	if (column < 0 || column >= b->ncols || r >= b->nrows)
		return NULL;
	return value_of(&b->columns[column], r);
}

static uint64_t
hidden_number(const EsRowBlock *b, int column, uint32_t r)
{
	const void *p = r < b->nrows ? value_of(&b->columns[b->ncols + column], r) : NULL;
	uint64_t	v = 0;

	if (p != NULL)
		memcpy(&v, p, sizeof(v));
	return v;
}

uint64_t
es_block_position(const EsRowBlock *b, uint32_t r)
{
	return hidden_number(b, ES_HIDDEN_POSITION, r);
}

uint64_t
es_block_version(const EsRowBlock *b, uint32_t r)
{
	return hidden_number(b, ES_HIDDEN_VERSION, r);
}

EsFxid
es_block_fxid(const EsRowBlock *b, uint32_t r)
{
	return hidden_number(b, ES_HIDDEN_FXID, r);
}

const void *
es_block_content_hash(const EsRowBlock *b, uint32_t r)
{
	return r < b->nrows ? value_of(&b->columns[b->ncols + ES_HIDDEN_CONTENT_HASH], r) : NULL;
}
