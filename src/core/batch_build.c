/*-------------------------------------------------------------------------
 *
 * batch_build.c
 *	  Building row batches.
 *
 * A row costs one pass over its columns and no allocation once the vectors have
 * grown.  Every column keeps the rows' values in one vector (the values of a
 * fixed width, or offsets) and, if it is a varlena, the values' bytes in another,
 * the heap.  All row vectors of a builder hold the same number of rows, row_cap, so
 * that one comparison per row is enough.  What most columns of most batches do not
 * need is made late: a column that was NULL so far has no vectors at all, and one
 * without NULLs no bitmap.  When the first value comes after NULLs, or the first
 * NULL after values, the rows before are filled in.
 *
 * The offsets of a heap count from its own start while it grows.  The finished
 * column puts the array of offsets in front, at a length rounded up to the
 * column's alignment, so that adding this length to each offset is all that
 * is left to do, and es_batch_size() is a sum over the columns.
 *
 * A row that fails in its column i has changed columns 0 to i - 1.  It is taken
 * back by undoing what was counted: the bytes behind the counters are dead.
 *
 * First vectors come from an arena that is part of the builder's own
 * allocation; so a builder for one small row is one malloc.
 *
 *-------------------------------------------------------------------------
 */
#include <stdlib.h>
#include <string.h>

#include "core/batch_layout.h"

#define FIRST_ROWS 4	/* rows for which a column's first vector is made */
#define FIRST_HEAP 64	/* bytes of a varlena column's first heap */
#define ARENA_MAX  8192 /* first vectors beyond come from malloc */

/* A builder that holds more memory gives it back in es_batch_reset(). */
#define KEEP_MEMORY (1024 * 1024)

static inline size_t
align_up(size_t n, size_t align)
{
	return (n + align - 1) & ~(align - 1);
}

typedef enum ColumnKind
{
	KIND_NONE, /* absent, or dropped: values are ignored */
	KIND_FIXED,
	KIND_VARLENA
} ColumnKind;

typedef struct Column
{
	EsColumnDesc desc;
	uint8_t		 kind; /* ColumnKind */
	bool		 absent;
	uint32_t	 stride; /* bytes per row in rows[] */
	uint32_t	 nnulls;
	char		*rows;	/* values or uint32 offsets into the heap; NULL = none made yet */
	uint8_t		*nulls; /* means something only while 0 < nnulls < nrows */
	char		*heap;
	uint32_t	 heap_used;
	uint32_t	 heap_before; /* heap_used before the row that is being added */
	size_t		 heap_cap;
} Column;

struct EsBatchBuilder
{
	EsBatchMeta meta;
	uint32_t	nrows;
	uint32_t	row_cap;
	uint32_t	cid_changes; /* rows whose cid is not the first row's */
	uint32_t	ncols;
	uint64_t	first_ordinal;
	uint64_t	last_ordinal;
	uint64_t	heap_total; /* sum of heap_used */
	uint64_t	base_bound; /* no batch is larger than base_bound + */
	uint64_t	row_bound;	/* nrows * row_bound + heap_total */
	size_t		memory;		/* malloc'd bytes, arena not counted */
	uint32_t   *ordinals;	/* minus first_ordinal */
	uint32_t   *cids;
	uint64_t   *positions;
	uint64_t   *versions;
	char	   *arena;
	size_t		arena_size;
	size_t		arena_used;
	Column		columns[];
};

/* ---- memory of a builder ---- */

static inline bool
in_arena(const EsBatchBuilder *b, const void *p)
{
	return (const char *) p >= b->arena && (const char *) p < b->arena + b->arena_size;
}

/* Makes *vector, of old_size bytes (0 = none), larger; false if there is no memory. */
static bool
vector_resize(EsBatchBuilder *b, void *vector, size_t old_size, size_t new_size)
{
	char *old;
	char *fresh;

	memcpy(&old, vector, sizeof(old));
	if (old == NULL && new_size <= b->arena_size - b->arena_used)
	{
		fresh = b->arena + b->arena_used;
		b->arena_used = align_up(b->arena_used + new_size, 8);
		if (b->arena_used > b->arena_size)
			b->arena_used = b->arena_size;
	}
	else if (old == NULL || in_arena(b, old))
	{
		fresh = malloc(new_size);
		if (fresh == NULL)
			return false;
		if (old != NULL)
			memcpy(fresh, old, old_size);
		b->memory += new_size;
	}
	else
	{
		fresh = realloc(old, new_size);
		if (fresh == NULL)
			return false;
		b->memory += new_size - old_size;
	}
	memcpy(vector, &fresh, sizeof(fresh));
	return true;
}

static void
vector_free(EsBatchBuilder *b, void *vector)
{
	char *old;
	char *none = NULL;

	memcpy(&old, vector, sizeof(old));
	if (old != NULL && !in_arena(b, old))
		free(old);
	memcpy(vector, &none, sizeof(none));
}

static void
release_vectors(EsBatchBuilder *b)
{
	vector_free(b, &b->ordinals);
	vector_free(b, &b->cids);
	vector_free(b, &b->positions);
	vector_free(b, &b->versions);
	for (uint32_t i = 0; i < b->ncols; i++)
	{
		Column *c = &b->columns[i];

		vector_free(b, &c->rows);
		vector_free(b, &c->nulls);
		vector_free(b, &c->heap);
		c->heap_cap = 0;
	}
	b->memory = 0;
	b->arena_used = 0;
	b->row_cap = FIRST_ROWS;
}

/*
 * Doubles all row vectors.  If memory ends half-way those done are larger
 * than row_cap says, which the next attempt finds harmless.
 */
static EsStatus
grow_rows(EsBatchBuilder *b)
{
	uint32_t old = b->row_cap;
	uint32_t cap = old * 2;

#define GROW(vector, width) \
	((vector) == NULL || vector_resize(b, &(vector), (size_t) old * (width), (size_t) cap * (width)))

	if (!GROW(b->ordinals, sizeof(uint32_t)) || !GROW(b->cids, sizeof(uint32_t)) ||
		!GROW(b->positions, sizeof(uint64_t)) || !GROW(b->versions, sizeof(uint64_t)))
		return ES_ERR_NOMEM;
	for (uint32_t i = 0; i < b->ncols; i++)
	{
		Column *c = &b->columns[i];

		if (!GROW(c->rows, c->stride))
			return ES_ERR_NOMEM;
		if (c->nulls != NULL &&
			!vector_resize(b, &c->nulls, es_batch_bitmap_len(old), es_batch_bitmap_len(cap)))
			return ES_ERR_NOMEM;
	}
#undef GROW
	b->row_cap = cap;
	return ES_OK;
}

static EsStatus
grow_heap(EsBatchBuilder *b, Column *c, size_t need)
{
	size_t cap = c->heap_cap;

	/* a large value gets room for itself, not for its double */
	cap = cap < 64 * 1024 * 1024 ? cap * 2 : cap + cap / 8;
	if (cap < FIRST_HEAP)
		cap = FIRST_HEAP;
	if (cap < need)
		cap = need;
	if (!vector_resize(b, &c->heap, c->heap_cap, cap))
		return ES_ERR_NOMEM;
	c->heap_cap = cap;
	return ES_OK;
}

/* ---- life of a builder ---- */

EsBatchBuilder *
es_batch_create(const EsColumnDesc *columns, int ncols, const bool *wanted)
{
	EsBatchBuilder *b;
	size_t			arena = FIRST_ROWS * (2 * sizeof(uint32_t) + 2 * sizeof(uint64_t));
	size_t			head;

	if (ncols < 0 || ncols > ES_MAX_COLUMNS + 1)
		return NULL;
	for (int i = 0; i < ncols; i++)
	{
		if (!es_column_desc_valid(&columns[i]))
			return NULL;
		if (wanted != NULL && !wanted[i])
			continue;
		if (columns[i].len > 0)
			arena += align_up(FIRST_ROWS * (size_t) es_column_stride(&columns[i]), 8);
		else
			arena += FIRST_ROWS * sizeof(uint32_t) + FIRST_HEAP;
	}
	if (arena > ARENA_MAX)
		arena = ARENA_MAX;

	head = align_up(sizeof(EsBatchBuilder) + (size_t) ncols * sizeof(Column), 8);
	b = malloc(head + arena);
	if (b == NULL)
		return NULL;
	memset(b, 0, head);
	b->arena = (char *) b + head;
	b->arena_size = arena;
	b->row_cap = FIRST_ROWS;
	b->ncols = (uint32_t) ncols;
	b->base_bound = sizeof(EsBatchHeader) + 64;
	b->row_bound = 2 * sizeof(uint32_t) + 2 * sizeof(uint64_t);
	for (int i = 0; i < ncols; i++)
	{
		Column *c = &b->columns[i];

		c->desc = columns[i];
		c->absent = wanted != NULL && !wanted[i];
		if (c->absent || (c->desc.flags & ES_COLUMN_DROPPED))
			c->kind = KIND_NONE;
		else if (c->desc.len > 0)
		{
			c->kind = KIND_FIXED;
			c->stride = es_column_stride(&c->desc);
		}
		else
		{
			c->kind = KIND_VARLENA;
			c->stride = sizeof(uint32_t);
		}
		b->base_bound += sizeof(EsBatchColumn) + 3 * 8;
		b->row_bound += c->stride + 1;
	}
	return b;
}

void
es_batch_free(EsBatchBuilder *b)
{
	if (b == NULL)
		return;
	release_vectors(b);
	free(b);
}

void
es_batch_reset(EsBatchBuilder *b, const EsBatchMeta *meta)
{
	if (b->memory > KEEP_MEMORY)
		release_vectors(b);
	b->meta = *meta;
	b->meta.table.reserved = 0;
	b->meta.roles.reserved = 0;
	b->nrows = 0;
	b->cid_changes = 0;
	b->first_ordinal = 0;
	b->last_ordinal = 0;
	b->heap_total = 0;
	for (uint32_t i = 0; i < b->ncols; i++)
	{
		b->columns[i].nnulls = 0;
		b->columns[i].heap_used = 0;
	}
}

/* ---- adding a row ---- */

/* Constant lengths become single moves; dst is aligned as the type wants, src may be anywhere. */
static inline void
copy_fixed(char *dst, const void *src, uint32_t len, uint32_t stride)
{
	switch (len)
	{
		case 1:
			*dst = *(const char *) src;
			break;
		case 2:
			memcpy(dst, src, 2);
			break;
		case 4:
			memcpy(dst, src, 4);
			break;
		case 8:
			memcpy(dst, src, 8);
			break;
		case 16:
			memcpy(dst, src, 16);
			break;
		default:
			memcpy(dst, src, len);
	}
	if (stride > len)
		memset(dst + len, 0, stride - len);
}

static inline void
set_offset(Column *c, uint32_t row, uint32_t offset)
{
	memcpy(c->rows + (size_t) row * sizeof(uint32_t), &offset, sizeof(offset));
}

static EsStatus
add_null(EsBatchBuilder *b, Column *c, uint32_t row)
{
	if (c->nnulls != row)
	{
		/* there are values: the row takes its place among them */
		if (c->nulls == NULL && !vector_resize(b, &c->nulls, 0, es_batch_bitmap_len(b->row_cap)))
			return ES_ERR_NOMEM;
		if (c->nnulls == 0)
			memset(c->nulls, 0, row / 8 + 1);
		else if (row % 8 == 0)
			c->nulls[row / 8] = 0;
		c->nulls[row / 8] |= (uint8_t) (1 << (row % 8));
		memset(c->rows + (size_t) row * c->stride, 0, c->stride);
	}
	c->nnulls++;
	return ES_OK;
}

/* A value comes into a column that has NULLs, or no vectors yet. */
static EsStatus
prepare_value(EsBatchBuilder *b, Column *c, uint32_t row)
{
	if (c->rows == NULL && !vector_resize(b, &c->rows, 0, (size_t) b->row_cap * c->stride))
		return ES_ERR_NOMEM;
	if (c->nnulls == 0)
		return ES_OK;

	if (c->nulls == NULL && !vector_resize(b, &c->nulls, 0, es_batch_bitmap_len(b->row_cap)))
		return ES_ERR_NOMEM;
	if (c->nnulls == row)
	{
		/* the first value: what was all NULL gets its rows */
		memset(c->nulls, 0xff, row / 8);
		c->nulls[row / 8] = (uint8_t) ((1 << (row % 8)) - 1);
		memset(c->rows, 0, (size_t) row * c->stride);
	}
	else if (row % 8 == 0)
		c->nulls[row / 8] = 0;
	else
		c->nulls[row / 8] &= (uint8_t) ~(1 << (row % 8));
	return ES_OK;
}

static EsStatus
add_varlena(EsBatchBuilder *b, Column *c, uint32_t row, const void *value)
{
	uint8_t	 first = *(const uint8_t *) value;
	uint32_t header;
	size_t	 start = c->heap_used;
	size_t	 size; /* with its header, as it is stored */
	bool	 shorten = false;
	char	*dst;

	if (first & 0x01)
	{
		/* 0x01 alone says external */
		size = first >> 1;
		if (size == 0)
			return ES_ERR_ARGUMENT;
	}
	else
	{
		memcpy(&header, value, sizeof(header));
		size = header >> 2;
		if ((header & 0x03) != 0 || size < sizeof(header))
			return ES_ERR_ARGUMENT;
		shorten = size - 4 <= 126 && !(c->desc.flags & ES_COLUMN_PLAIN);
		if (shorten)
			size -= 3;
		else
			start = align_up(start, c->desc.align);
	}

	if (b->heap_total + (start - c->heap_used) + size > ES_BATCH_MAX_BYTES)
		return ES_ERR_TOO_LARGE;
	if (start + size > c->heap_cap && grow_heap(b, c, start + size) != ES_OK)
		return ES_ERR_NOMEM;

	if (start > c->heap_used)
		memset(c->heap + c->heap_used, 0, start - c->heap_used);
	dst = c->heap + start;
	if (shorten)
	{
		*dst = (char) (size << 1 | 0x01);
		memcpy(dst + 1, (const char *) value + 4, size - 1);
	}
	else
		memcpy(dst, value, size);
	set_offset(c, row, (uint32_t) start);
	b->heap_total += start + size - c->heap_used;
	c->heap_before = c->heap_used;
	c->heap_used = (uint32_t) (start + size);
	return ES_OK;
}

/* Takes the values of the row being added out of columns 0 to n - 1. */
static void
undo_columns(EsBatchBuilder *b, const void *const *values, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
	{
		Column *c = &b->columns[i];

		if (c->kind == KIND_NONE)
			continue;
		if (values[i] == NULL)
			c->nnulls--;
		else if (c->kind == KIND_VARLENA)
		{
			b->heap_total -= c->heap_used - c->heap_before;
			c->heap_used = c->heap_before;
		}
	}
}

/*
 * ES_ERR_TOO_LARGE says that the batch, not necessarily the row, is full: by
 * rows, by bytes, or because the ordinal is too far from the first one.
 */
EsStatus
es_batch_add(EsBatchBuilder *b, const void *const *values, uint64_t ordinal, uint32_t cid, uint64_t position,
			 uint64_t version)
{
	uint32_t row = b->nrows;
	uint64_t last_ordinal;
	EsStatus status;

	if (row > 0 && ordinal <= b->last_ordinal)
		return ES_ERR_ARGUMENT;
	if (row >= ES_BATCH_MAX_ROWS || (row > 0 && ordinal - b->first_ordinal > UINT32_MAX))
		return ES_ERR_TOO_LARGE;
	if (row == b->row_cap && (status = grow_rows(b)) != ES_OK)
		return status;
	if (b->ordinals == NULL && !vector_resize(b, &b->ordinals, 0, b->row_cap * sizeof(uint32_t)))
		return ES_ERR_NOMEM;
	if (b->cids == NULL && !vector_resize(b, &b->cids, 0, b->row_cap * sizeof(uint32_t)))
		return ES_ERR_NOMEM;
	if (b->meta.with_positions)
	{
		if (b->positions == NULL && !vector_resize(b, &b->positions, 0, b->row_cap * sizeof(uint64_t)))
			return ES_ERR_NOMEM;
		if (b->versions == NULL && !vector_resize(b, &b->versions, 0, b->row_cap * sizeof(uint64_t)))
			return ES_ERR_NOMEM;
	}

	for (uint32_t i = 0; i < b->ncols; i++)
	{
		Column	   *c = &b->columns[i];
		const void *value;

		if (c->kind == KIND_NONE)
			continue;
		value = values[i];
		status = ES_OK;
		if (value == NULL)
			status = add_null(b, c, row);
		else
		{
			if (c->nnulls > 0 || c->rows == NULL)
				status = prepare_value(b, c, row);
			if (status == ES_OK)
			{
				if (c->kind == KIND_FIXED)
					copy_fixed(c->rows + (size_t) row * c->stride, value, (uint32_t) c->desc.len, c->stride);
				else
					status = add_varlena(b, c, row, value);
			}
		}
		if (status != ES_OK)
		{
			undo_columns(b, values, i);
			return status;
		}
	}

	if (row == 0)
		b->first_ordinal = ordinal;
	b->ordinals[row] = (uint32_t) (ordinal - b->first_ordinal);
	b->cids[row] = cid;
	if (b->meta.with_positions)
	{
		b->positions[row] = position;
		b->versions[row] = version;
	}

	last_ordinal = b->last_ordinal;
	b->nrows++;
	b->last_ordinal = ordinal;
	b->cid_changes += cid != b->cids[0];

	/* the exact size only where the bound says that it may matter */
	if (b->base_bound + b->nrows * b->row_bound + b->heap_total > ES_BATCH_MAX_BYTES &&
		es_batch_size(b) > ES_BATCH_MAX_BYTES)
	{
		b->nrows--;
		b->last_ordinal = last_ordinal;
		b->cid_changes -= cid != b->cids[0];
		undo_columns(b, values, b->ncols);
		return ES_ERR_TOO_LARGE;
	}
	return ES_OK;
}

void
es_batch_add_flags(EsBatchBuilder *b, uint16_t flags)
{
	b->meta.flags |= flags;
}

uint32_t
es_batch_nrows(const EsBatchBuilder *b)
{
	return b->nrows;
}

/* ---- finishing ---- */

static inline bool
ordinals_consecutive(const EsBatchBuilder *b)
{
	return b->nrows == 0 || b->last_ordinal - b->first_ordinal == b->nrows - 1;
}

/* Length of the offsets in front of a varlena column's values. */
static inline size_t
offsets_len(const EsBatchBuilder *b, const Column *c)
{
	return align_up(b->nrows * sizeof(uint32_t), c->desc.align);
}

/* Where a column's parts go, from *offset on, which is moved behind them. */
static inline EsBatchColumn
place_column(const EsBatchBuilder *b, const Column *c, size_t *offset)
{
	EsBatchColumn out = {.desc = c->desc};
	size_t		  data_len;

	if (c->absent)
		out.flags = ES_BATCH_COLUMN_ABSENT;
	else if (c->kind == KIND_NONE || c->nnulls == b->nrows)
		out.flags = ES_BATCH_COLUMN_ALL_NULL;
	else
	{
		if (c->nnulls > 0)
		{
			out.off_nulls = (uint32_t) *offset;
			*offset += es_batch_bitmap_len(b->nrows);
		}
		*offset = align_up(*offset, es_batch_data_align(&c->desc));
		if (c->kind == KIND_FIXED)
			data_len = (size_t) b->nrows * c->stride;
		else
			data_len = offsets_len(b, c) + c->heap_used;
		out.off_data = (uint32_t) *offset;
		out.data_len = (uint32_t) data_len;
		*offset += data_len;
	}
	return out;
}

/* Where the per-row arrays go; returns the offset behind them. */
static size_t
place_rows(const EsBatchBuilder *b, EsBatchHeader *h)
{
	size_t offset = sizeof(EsBatchHeader) + b->ncols * sizeof(EsBatchColumn);

	if (!ordinals_consecutive(b))
	{
		h->off_ordinals = (uint32_t) offset;
		offset += b->nrows * sizeof(uint32_t);
	}
	if (b->cid_changes > 0)
	{
		h->off_cids = (uint32_t) offset;
		offset += b->nrows * sizeof(uint32_t);
	}
	if (b->meta.with_positions)
	{
		offset = align_up(offset, 8);
		h->off_positions = (uint32_t) offset;
		offset += b->nrows * sizeof(uint64_t);
		h->off_versions = (uint32_t) offset;
		offset += b->nrows * sizeof(uint64_t);
	}
	return offset;
}

size_t
es_batch_size(const EsBatchBuilder *b)
{
	EsBatchHeader h;
	size_t		  offset = place_rows(b, &h);

	for (uint32_t i = 0; i < b->ncols; i++)
		place_column(b, &b->columns[i], &offset);
	return align_up(offset, 8);
}

/* Copies len bytes to buf + offset and zeroes the gap in front; returns the end. */
static size_t
put(char *buf, size_t end, size_t offset, const void *src, size_t len)
{
	if (offset > end)
		memset(buf + end, 0, offset - end);
	if (len > 0)
		memcpy(buf + offset, src, len);
	return offset + len;
}

EsStatus
es_batch_finish(EsBatchBuilder *b, void *buf, size_t len)
{
	EsBatchHeader  h = {0};
	EsBatchColumn *directory;
	char		  *out = buf;
	size_t		   total = es_batch_size(b);
	size_t		   offset;
	size_t		   end;

	if (len < total || (uintptr_t) buf % 8 != 0)
		return ES_ERR_ARGUMENT;
	if (total > ES_BATCH_MAX_BYTES)
		return ES_ERR_TOO_LARGE;

	offset = place_rows(b, &h);
	h.magic = ES_BATCH_MAGIC;
	h.total_len = (uint32_t) total;
	h.nrows = b->nrows;
	h.ncols = (uint16_t) b->ncols;
	h.flags = b->meta.flags;
	h.table = b->meta.table;
	h.roles = b->meta.roles;
	h.relid = b->meta.relid;
	h.subid = b->meta.subid;
	h.cid = b->nrows > 0 ? b->cids[0] : 0;
	h.first_ordinal = b->first_ordinal;
	memcpy(out, &h, sizeof(h));
	directory = (EsBatchColumn *) (out + sizeof(h));
	end = sizeof(h) + b->ncols * sizeof(EsBatchColumn);

	if (h.off_ordinals != 0)
		end = put(out, end, h.off_ordinals, b->ordinals, b->nrows * sizeof(uint32_t));
	if (h.off_cids != 0)
		end = put(out, end, h.off_cids, b->cids, b->nrows * sizeof(uint32_t));
	if (h.off_positions != 0)
	{
		end = put(out, end, h.off_positions, b->positions, b->nrows * sizeof(uint64_t));
		end = put(out, end, h.off_versions, b->versions, b->nrows * sizeof(uint64_t));
	}

	for (uint32_t i = 0; i < b->ncols; i++)
	{
		const Column  *c = &b->columns[i];
		EsBatchColumn *d = &directory[i];

		*d = place_column(b, c, &offset);
		if (d->off_nulls != 0)
			end = put(out, end, d->off_nulls, c->nulls, es_batch_bitmap_len(b->nrows));
		if (d->off_data == 0)
			continue;
		if (c->kind == KIND_FIXED)
			end = put(out, end, d->off_data, c->rows, d->data_len);
		else
		{
			const uint32_t *from = (const uint32_t *) c->rows;
			uint32_t	   *to = (uint32_t *) (out + d->off_data);
			uint32_t		values = (uint32_t) offsets_len(b, c);

			end = put(out, end, d->off_data, NULL, 0);
			for (uint32_t row = 0; row < b->nrows; row++)
				to[row] = from[row] + values;
			end += b->nrows * sizeof(uint32_t);
			end = put(out, end, (size_t) d->off_data + values, c->heap, c->heap_used);
		}
	}
	put(out, end, total, NULL, 0);
	return ES_OK;
}
