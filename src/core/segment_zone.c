/*-------------------------------------------------------------------------
 *
 * segment_zone.c
 *	  The zone being filled: values gather in a buffer per column, and become
 *	  chunks when the zone is full.
 *
 * A column that has been NULL so far in the zone has no buffer at all (dropped columns,
 * wide tables); its NULLs take their places when the first value comes.  A value
 * larger than a page is appended to the file at once, as overflow pages, and
 * only a reference stays in the buffer.
 *
 *-------------------------------------------------------------------------
 */
#include <stdlib.h>
#include <string.h>

#include "core/segment_writer.h"

bool
es_array_reserve(EsArray *a, size_t more)
{
	size_t	 room = a->room < 256 ? 256 : a->room;
	uint8_t *p;

	if (a->data != NULL && a->room - a->len >= more)
		return true;
	while (room - a->len < more)
		room *= 2;
	p = realloc(a->data, room);
	if (p == NULL)
		return false;
	a->data = p;
	a->room = room;
	return true;
}

bool
es_array_add(EsArray *a, const void *bytes, size_t len)
{
	if (!es_array_reserve(a, len))
		return false;
	memcpy(a->data + a->len, bytes, len);
	a->len += len;
	return true;
}

/* ---- values ---- */

static inline const uint8_t *
column_value(const EsZoneColumn *c, uint32_t row)
{
	if (c->desc.len > 0)
		return c->data.data + (size_t) row * (size_t) c->desc.len;
	return c->data.data + c->offsets[row];
}

static inline uint32_t
value_size(const EsZoneColumn *c, const uint8_t *value)
{
	return c->desc.len > 0 ? (uint32_t) c->desc.len : es_page_varlena_size(value);
}

/* Writes a large value as overflow pages. */
static EsStatus
put_overflow(EsSegmentWriter *w, uint32_t number, const uint8_t *value, uint32_t size, EsOverflowRef *ref,
			 EsError *err)
{
	memset(ref, 0, sizeof(*ref));
	ref->marker = ES_OVERFLOW_MARKER;
	ref->raw_len = size;
	ref->offset = w->offset;
	for (uint32_t done = 0; done < size;)
	{
		uint32_t	 len = size - done < ES_OVERFLOW_RAW ? size - done : ES_OVERFLOW_RAW;
		EsPageHeader header = {
			.zone = w->footer.nzones, .first_row = (uint16_t) w->zone.nrows, .column = (uint16_t) number};
		EsEncodedPage page;
		EsStatus	  status = es_page_compress(w->encoder, value + done, len, false, &page);

		if (status != ES_OK)
			return es_segment_no_memory(err);
		status = es_segment_put_page(w, ES_PAGE_OVERFLOW, &header, &page, err);
		if (status != ES_OK)
			return status;
		done += len;
	}
	ref->stored_len = w->offset - ref->offset;
	return ES_OK;
}

static EsStatus
add_null(EsSegmentWriter *w, EsZoneColumn *c, EsError *err)
{
	uint32_t row = w->zone.nrows;

	if (c->nnulls++ < row)
	{
		if (c->nulls == NULL && (c->nulls = calloc(1, ES_ZONE_ROWS / 8)) == NULL)
			return es_segment_no_memory(err);
		c->nulls[row >> 3] |= (uint8_t) (1 << (row & 7));
		if (c->desc.len > 0)
		{
			if (!es_array_reserve(&c->data, (size_t) c->desc.len))
				return es_segment_no_memory(err);
			memset(c->data.data + c->data.len, 0, (size_t) c->desc.len);
			c->data.len += (size_t) c->desc.len;
		}
	}
	w->zone_bytes++;
	return ES_OK;
}

/* The first value after row NULLs: they take their places now. */
static EsStatus
materialize_nulls(EsZoneColumn *c, uint32_t row, EsError *err)
{
	if (row == 0)
		return ES_OK;
	if (c->nulls == NULL && (c->nulls = calloc(1, ES_ZONE_ROWS / 8)) == NULL)
		return es_segment_no_memory(err);
	for (uint32_t i = 0; i < row; i++)
		c->nulls[i >> 3] |= (uint8_t) (1 << (i & 7));
	if (c->desc.len > 0)
	{
		size_t len = (size_t) row * (size_t) c->desc.len;

		if (!es_array_reserve(&c->data, len))
			return es_segment_no_memory(err);
		memset(c->data.data, 0, len);
		c->data.len = len;
	}
	return ES_OK;
}

EsStatus
es_segment_add_value(EsSegmentWriter *w, uint32_t number, const uint8_t *value, EsError *err)
{
	EsZoneColumn *c = &w->columns[number];
	uint32_t	  row = w->zone.nrows;
	uint32_t	  size;
	EsOverflowRef ref;
	EsStatus	  status;

	if (value == NULL || c->absent)
		return add_null(w, c, err);
	if (c->nnulls == row && (status = materialize_nulls(c, row, err)) != ES_OK)
		return status;

	size = value_size(c, value);
	w->footer.raw_bytes += size;
	w->zone_bytes += size;
	if (c->desc.len < 0)
	{
		if (c->offsets == NULL && (c->offsets = calloc(ES_ZONE_ROWS, sizeof(uint32_t))) == NULL)
			return es_segment_no_memory(err);
		c->offsets[row] = (uint32_t) c->data.len;
		if (size > ES_PAGE_RAW)
		{
			status = put_overflow(w, number, value, size, &ref, err);
			if (status != ES_OK)
				return status;
			value = (const uint8_t *) &ref;
			size = sizeof(ref);
		}
	}
	return es_array_add(&c->data, value, size) ? ES_OK : es_segment_no_memory(err);
}

/* ---- chunks and zones ---- */

static bool
is_constant(const EsZoneColumn *c, uint32_t nrows)
{
	const uint8_t *first = column_value(c, 0);
	uint32_t	   size = value_size(c, first);

	if (c->nnulls > 0 || size > ES_CONST_MAX || (c->desc.len < 0 && first[0] == ES_OVERFLOW_MARKER))
		return false;
	for (uint32_t i = 1; i < nrows; i++)
	{
		const uint8_t *value = column_value(c, i);

		if (value_size(c, value) != size || memcmp(value, first, size) != 0)
			return false;
	}
	return true;
}

static int64_t
int_value(const EsZoneColumn *c, uint32_t row)
{
	const uint8_t *p = column_value(c, row);
	int16_t		   v2;
	int32_t		   v4;
	int64_t		   v8;

	switch (c->desc.len)
	{
		case 1:
			return (int8_t) *p;
		case 2:
			memcpy(&v2, p, sizeof(v2));
			return v2;
		case 4:
			memcpy(&v4, p, sizeof(v4));
			return v4;
		default:
			memcpy(&v8, p, sizeof(v8));
			return v8;
	}
}

static void
min_max(const EsZoneColumn *c, uint32_t nrows, EsChunkEntry *chunk)
{
	bool any = false;

	for (uint32_t i = 0; i < nrows; i++)
	{
		int64_t v;

		if (c->nnulls > 0 && (c->nulls[i >> 3] >> (i & 7) & 1) != 0)
			continue;
		v = int_value(c, i);
		if (!any || v < chunk->min)
			chunk->min = v;
		if (!any || v > chunk->max)
			chunk->max = v;
		any = true;
	}
	chunk->flags |= ES_CHUNK_MINMAX;
}

static EsStatus
put_chunk_pages(EsSegmentWriter *w, uint32_t number, EsChunkEntry *chunk, EsError *err)
{
	EsZoneColumn *c = &w->columns[number];
	EsPageSource  source = {
		 .desc = c->desc,
		 .nulls = c->nnulls > 0 ? c->nulls : NULL,
		 .data = c->data.data,
		 .offsets = c->offsets,
	 };
	uint32_t row = 0;

	chunk->offset = w->offset;
	while (row < w->zone.nrows)
	{
		EsEncodedPage page;
		EsPageEntry	  entry = {.offset = (uint32_t) (w->offset - chunk->offset), .first_row = (uint16_t) row};
		EsPageHeader  header = {
			 .zone = w->footer.nzones, .first_row = (uint16_t) row, .column = (uint16_t) number};
		EsStatus status = es_page_encode(w->encoder, &source, row, w->zone.nrows, &page);

		if (status != ES_OK)
			return es_fail(err, status, w->offset, "could not encode a segment page");
		header.nrows = (uint16_t) page.nrows;
		header.encoding = page.encoding;
		status = es_segment_put_page(w, ES_PAGE_DATA, &header, &page, err);
		if (status != ES_OK)
			return status;
		if (!es_array_add(&w->pages, &entry, sizeof(entry)))
			return es_segment_no_memory(err);
		chunk->npages++;
		row += page.nrows;
	}
	chunk->stored_len = (uint32_t) (w->offset - chunk->offset);
	w->footer.npages += chunk->npages;
	return ES_OK;
}

/*
 * Statistics of a role column, from the hidden one that has its values (version 0
 * is NULL).  Those of a pending segment are not known yet.
 */
static void
role_stats(const EsSegmentWriter *w, const EsZoneColumn *hidden, EsChunkEntry *chunk)
{
	chunk->flags = ES_CHUNK_ROLE;
	chunk->nnulls = 0;
	if (w->spec.flags & ES_SEGMENT_PENDING)
		return;
	for (uint32_t i = 0; i < w->zone.nrows; i++)
	{
		int64_t v = int_value(hidden, i);

		if (v == 0)
		{
			chunk->nnulls++;
			continue;
		}
		if (!(chunk->flags & ES_CHUNK_MINMAX) || v < chunk->min)
			chunk->min = v;
		if (!(chunk->flags & ES_CHUNK_MINMAX) || v > chunk->max)
			chunk->max = v;
		chunk->flags |= ES_CHUNK_MINMAX;
	}
}

static EsStatus
put_chunk(EsSegmentWriter *w, uint32_t number, EsError *err)
{
	EsZoneColumn *c = &w->columns[number];
	EsChunkEntry  chunk = {.first_page = w->footer.npages, .nnulls = c->nnulls};
	EsStatus	  status = ES_OK;

	if ((int) number + 1 == w->spec.roles.position)
		role_stats(w, &w->columns[w->spec.ncols + ES_HIDDEN_POSITION], &chunk);
	else if ((int) number + 1 == w->spec.roles.version)
		role_stats(w, &w->columns[w->spec.ncols + ES_HIDDEN_VERSION], &chunk);
	else if (c->nnulls == w->zone.nrows)
		chunk.flags = ES_CHUNK_ALL_NULL;
	else
	{
		if ((c->desc.flags & ES_COLUMN_BYVAL) != 0 && es_page_is_int(&c->desc))
			min_max(c, w->zone.nrows, &chunk);
		if (is_constant(c, w->zone.nrows))
		{
			const uint8_t *value = column_value(c, 0);

			chunk.flags |= ES_CHUNK_CONSTANT;
			chunk.first_page = (uint32_t) w->constants.len;
			chunk.stored_len = value_size(c, value);
			if (!es_array_add(&w->constants, value, chunk.stored_len))
				return es_segment_no_memory(err);
		}
		else
			status = put_chunk_pages(w, number, &chunk, err);
	}
	if (status == ES_OK && !es_array_add(&w->chunks, &chunk, sizeof(chunk)))
		status = es_segment_no_memory(err);

	c->data.len = 0;
	c->nnulls = 0;
	if (c->nulls != NULL)
		memset(c->nulls, 0, ES_ZONE_ROWS / 8);
	return status;
}

EsStatus
es_segment_flush_zone(EsSegmentWriter *w, EsError *err)
{
	for (uint32_t i = 0; i < w->ncols_physical; i++)
	{
		EsStatus status = put_chunk(w, i, err);

		if (status != ES_OK)
			return status;
	}
	if (!es_array_add(&w->zones, &w->zone, sizeof(w->zone)))
		return es_segment_no_memory(err);
	w->footer.nzones++;
	memset(&w->zone, 0, sizeof(w->zone));
	w->zone.first_row = w->footer.nrows;
	w->zone_bytes = 0;
	return ES_OK;
}
