/*-------------------------------------------------------------------------
 *
 * batch.c
 *	  Checking and reading row batches; batch_build.c makes them.
 *
 * es_batch_open() looks at everything that an accessor will follow: each array
 * against the end of the batch, each varlena of a row that is not NULL against the
 * end of its column, each role against the width that its readers rely on.
 * Ranges may overlap, which harms nobody.
 *
 *-------------------------------------------------------------------------
 */
#include <string.h>

#include "core/batch_layout.h"
#include "core/route.h"

static bool
role_fits(const EsBatchView *v, int16_t attno, int16_t len, int16_t other_len)
{
	const EsColumnDesc *desc;

	if (attno == 0)
		return true;
	if (attno < 0 || attno > v->header->ncols)
		return false;
	desc = &v->columns[attno - 1].desc;
	return desc->len == len || desc->len == other_len;
}

/* Do the roles name columns of the widths that the accessors will read? */
static bool
roles_valid(const EsBatchView *v)
{
	const EsRoles *r = &v->header->roles;
	int16_t		   len;
	int16_t		   other_len;

	if (!role_fits(v, r->position, 8, 8) || !role_fits(v, r->version, 8, 8) ||
		!role_fits(v, r->event_id, ES_UUID_LEN, ES_UUID_LEN) || !role_fits(v, r->event_type, -1, 4) ||
		r->reserved != 0)
		return false;
	if (r->context == 0)
		return true;
	switch ((EsContextClass) r->context_class)
	{
		case ES_CONTEXT_STRING:
			/* varlena, or a name of whatever width */
			return r->context > 0 && r->context <= v->header->ncols;
		case ES_CONTEXT_BYTEA:
			len = other_len = -1;
			break;
		case ES_CONTEXT_INTEGER:
			if (role_fits(v, r->context, 2, 2))
				return true;
			len = 4;
			other_len = 8;
			break;
		case ES_CONTEXT_UUID:
			len = other_len = ES_UUID_LEN;
			break;
		case ES_CONTEXT_DATE:
		case ES_CONTEXT_ENUM:
			len = other_len = 4;
			break;
		case ES_CONTEXT_TIMESTAMPTZ:
			len = other_len = 8;
			break;
		case ES_CONTEXT_BOOL:
			len = other_len = 1;
			break;
		default:
			return false;
	}
	return role_fits(v, r->context, len, other_len);
}

/* Are width bytes for each of the rows at offset inside, and aligned? */
static bool
array_valid(const EsBatchHeader *h, uint32_t offset, size_t len, size_t align)
{
	return offset >= sizeof(EsBatchHeader) + h->ncols * sizeof(EsBatchColumn) && offset <= h->total_len &&
		   len <= h->total_len - offset && offset % align == 0;
}

/*
 * Checks the value at offset of a varlena column of data_len bytes.
 * data is aligned as the column wants, so offsets tell about alignment.
 */
static inline bool
varlena_valid(const char *data, uint32_t offset, uint32_t first, uint32_t data_len, uint32_t align)
{
	uint8_t	 byte;
	uint32_t header;
	uint32_t size;

	if (offset < first || offset >= data_len)
		return false;
	byte = (uint8_t) data[offset];
	if (byte & 0x01)
		return (size = byte >> 1) != 0 && size <= data_len - offset;
	if (data_len - offset < sizeof(header) || offset % align != 0)
		return false;
	memcpy(&header, data + offset, sizeof(header));
	size = header >> 2;
	return (header & 0x03) == 0 && size >= sizeof(header) && size <= data_len - offset;
}

static EsStatus
check_column(const EsBatchView *v, int col, EsError *err)
{
	const EsBatchHeader *h = v->header;
	const EsBatchColumn *c = &v->columns[col];
	uint64_t			 where = (uint64_t) ((const char *) c - v->base);
	const char			*data;
	const uint32_t		*offsets;
	uint32_t			 first;

	if (!es_column_desc_valid(&c->desc))
		return es_fail(err, ES_ERR_CORRUPT, where, "column %d of the batch has width %d and alignment %d",
					   col + 1, c->desc.len, c->desc.align);
	if ((c->flags & ~(uint32_t) (ES_BATCH_COLUMN_ABSENT | ES_BATCH_COLUMN_ALL_NULL)) != 0 || c->reserved != 0)
		return es_fail(err, ES_ERR_CORRUPT, where, "column %d of the batch has unknown flags", col + 1);
	if (c->flags != 0)
	{
		if (c->off_nulls != 0 || c->off_data != 0 || c->data_len != 0)
			return es_fail(err, ES_ERR_CORRUPT, where, "column %d of the batch has no values but data",
						   col + 1);
		return ES_OK;
	}
	if (c->off_nulls != 0 && !array_valid(h, c->off_nulls, es_batch_bitmap_len(h->nrows), 1))
		return es_fail(err, ES_ERR_CORRUPT, where, "null bitmap of column %d lies outside the batch",
					   col + 1);
	if (!array_valid(h, c->off_data, c->data_len, es_batch_data_align(&c->desc)))
		return es_fail(err, ES_ERR_CORRUPT, where, "data of column %d lies outside the batch", col + 1);
	if (c->desc.len > 0)
	{
		if (c->data_len != (uint64_t) h->nrows * es_column_stride(&c->desc))
			return es_fail(err, ES_ERR_CORRUPT, where, "data of column %d has %u bytes for %u rows", col + 1,
						   c->data_len, h->nrows);
		return ES_OK;
	}

	first = h->nrows * (uint32_t) sizeof(uint32_t);
	if (c->data_len < first)
		return es_fail(err, ES_ERR_CORRUPT, where, "data of column %d has %u bytes for %u rows", col + 1,
					   c->data_len, h->nrows);
	data = v->base + c->off_data;
	offsets = (const uint32_t *) data;
	for (uint32_t row = 0; row < h->nrows; row++)
	{
		if (c->off_nulls != 0 && es_batch_is_null(v, col, row))
			continue;
		if (!varlena_valid(data, offsets[row], first, c->data_len, c->desc.align))
			return es_fail(err, ES_ERR_CORRUPT, (uint64_t) c->off_data + offsets[row],
						   "value of column %d, row %u is malformed", col + 1, row);
	}
	return ES_OK;
}

void
es_batch_open_trusted(const void *buf, EsBatchView *view)
{
	const char			*base = buf;
	const EsBatchHeader *h = buf;

	view->header = h;
	view->columns = (const EsBatchColumn *) (base + sizeof(EsBatchHeader));
	view->base = base;
	view->ordinals = h->off_ordinals ? (const uint32_t *) (base + h->off_ordinals) : NULL;
	view->cids = h->off_cids ? (const uint32_t *) (base + h->off_cids) : NULL;
	view->positions = h->off_positions ? (const uint64_t *) (base + h->off_positions) : NULL;
	view->versions = h->off_versions ? (const uint64_t *) (base + h->off_versions) : NULL;
}

EsStatus
es_batch_open(const void *buf, size_t len, EsBatchView *view, EsError *err)
{
	const EsBatchHeader *h = buf;
	EsStatus			 status;

	if ((uintptr_t) buf % 8 != 0)
		return es_fail(err, ES_ERR_ARGUMENT, 0, "batch is not aligned");
	if (len < sizeof(EsBatchHeader))
		return es_fail(err, ES_ERR_TRUNCATED, len, "batch ends in its header");
	if (h->magic != ES_BATCH_MAGIC)
		return es_fail(err, ES_ERR_CORRUPT, 0, "batch has magic %08x instead of %08x", h->magic,
					   ES_BATCH_MAGIC);
	if (h->total_len > len)
		return es_fail(err, ES_ERR_TRUNCATED, len, "batch of %u bytes ends after %zu", h->total_len, len);
	if (h->total_len > ES_BATCH_MAX_BYTES || h->total_len % 8 != 0 || h->ncols > ES_MAX_COLUMNS + 1 ||
		h->total_len < sizeof(EsBatchHeader) + h->ncols * sizeof(EsBatchColumn))
		return es_fail(err, ES_ERR_CORRUPT, 0, "batch has %u bytes and %u columns", h->total_len, h->ncols);
	if (h->nrows > ES_BATCH_MAX_ROWS)
		return es_fail(err, ES_ERR_CORRUPT, 0, "batch has %u rows", h->nrows);
	if ((h->flags & ~(ES_BATCH_HAS_CONTENT_HASH | ES_BATCH_GIVEN_POSITIONS | ES_BATCH_GIVEN_VERSIONS |
					  ES_BATCH_HAS_EVENT_IDS | ES_BATCH_OWN_ROWS)) != 0 ||
		h->reserved != 0 || h->table.reserved != 0)
		return es_fail(err, ES_ERR_CORRUPT, 0, "batch has unknown flags %04x", h->flags);
	if ((h->off_ordinals && !array_valid(h, h->off_ordinals, h->nrows * sizeof(uint32_t), 4)) ||
		(h->off_cids && !array_valid(h, h->off_cids, h->nrows * sizeof(uint32_t), 4)) ||
		(h->off_positions && !array_valid(h, h->off_positions, h->nrows * sizeof(uint64_t), 8)) ||
		(h->off_versions && !array_valid(h, h->off_versions, h->nrows * sizeof(uint64_t), 8)))
		return es_fail(err, ES_ERR_CORRUPT, 0, "row arrays lie outside the batch");

	es_batch_open_trusted(buf, view);
	if (!roles_valid(view))
		return es_fail(err, ES_ERR_CORRUPT, 0, "roles of the batch do not fit its columns");
	if (h->flags & ES_BATCH_HAS_CONTENT_HASH)
	{
		if (h->ncols == 0 || view->columns[h->ncols - 1].desc.len != ES_CONTENT_HASH_LEN)
			return es_fail(err, ES_ERR_CORRUPT, 0, "batch has no column for its content hashes");
	}
	if (h->first_ordinal > UINT64_MAX - UINT32_MAX)
		return es_fail(err, ES_ERR_CORRUPT, 0, "first ordinal of the batch is out of range");
	if (view->ordinals != NULL)
	{
		for (uint32_t row = 1; row < h->nrows; row++)
			if (view->ordinals[row] <= view->ordinals[row - 1])
				return es_fail(err, ES_ERR_CORRUPT, h->off_ordinals + row * sizeof(uint32_t),
							   "ordinal of row %u is not above the one before", row);
	}
	for (int col = 0; col < h->ncols; col++)
	{
		status = check_column(view, col, err);
		if (status != ES_OK)
			return status;
	}
	return ES_OK;
}

bool
es_batch_same_shape(const EsBatchView *a, const EsBatchView *b)
{
	int n = es_batch_table_columns(a);

	if (n != es_batch_table_columns(b) || memcmp(&a->header->roles, &b->header->roles, sizeof(EsRoles)) != 0)
		return false;
	for (int col = 0; col < n; col++)
		if (memcmp(&a->columns[col].desc, &b->columns[col].desc, sizeof(EsColumnDesc)) != 0)
			return false;
	return true;
}

bool
es_batch_context(const EsBatchView *v, uint32_t row, int64_t *scratch, const void **bytes, size_t *len)
{
	const EsRoles *roles = &v->header->roles;
	int			   col = roles->context - 1;

	if (col < 0 || es_batch_is_null(v, col, row))
		return false;
	es_context_bytes((EsContextClass) roles->context_class, v->columns[col].desc.len,
					 es_batch_value(v, col, row), scratch, bytes, len);
	return true;
}

/* 0 if the row has no context. */
uint64_t
es_batch_context_hash(const EsBatchView *v, uint32_t row)
{
	int64_t		scratch;
	const void *bytes;
	size_t		len;

	if (!es_batch_context(v, row, &scratch, &bytes, &len))
		return 0;
	return es_context_hash((EsContextClass) v->header->roles.context_class, bytes, len);
}
