/*-------------------------------------------------------------------------
 *
 * segment_writer.c
 *	  Writing side of segment.h.
 *
 * Rows gather in one buffer per column until the zone is full (ES_ZONE_ROWS, or its
 * raw bytes pass a limit); then each column's chunk is encoded page by page and
 * appended.  A value larger than a page goes out at once as overflow pages, so
 * that what is held is one zone of small values, one index page, the hashes of one
 * filter page, and the footer's arrays (some 50 bytes per column and zone, 8 per
 * page).  Nothing is ever written twice or out of order.
 *
 * After an error the writer only repeats it: the file is unusable.
 *
 *-------------------------------------------------------------------------
 */
#include "core/segment.h"

#include <stdlib.h>
#include <string.h>

#include "core/filter.h"
#include "core/page.h"
#include "core/route.h"
#include "core/segment_writer.h"

#define ZONE_BYTES			  (UINT64_C(8) << 20)
#define ZONE_BYTES_PER_COLUMN (UINT64_C(16) << 10) /* so that wide tables still fill pages */

/* ---- small things ---- */

EsStatus
es_segment_no_memory(EsError *err)
{
	return es_fail(err, ES_ERR_NOMEM, 0, "out of memory while writing a segment");
}

static EsStatus
flush_out(EsSegmentWriter *w, EsError *err)
{
	EsStatus status = ES_OK;

	if (w->out_used > 0)
		status = w->append(w->arg, w->out, w->out_used, err);
	w->out_used = 0;
	return status;
}

static EsStatus
put(EsSegmentWriter *w, const void *bytes, size_t len, EsError *err)
{
	w->offset += len;
	if (len > ES_SEGMENT_OUT_LEN - w->out_used)
	{
		EsStatus status = flush_out(w, err);

		if (status != ES_OK)
			return status;
		if (len > ES_SEGMENT_OUT_LEN)
			return w->append(w->arg, bytes, len, err);
	}
	memcpy(w->out + w->out_used, bytes, len);
	w->out_used += len;
	return ES_OK;
}

/* Appends a page; its header says all but lengths, codec and CRC. */
EsStatus
es_segment_put_page(EsSegmentWriter *w, EsPageKind kind, EsPageHeader *header, const EsEncodedPage *page,
					EsError *err)
{
	EsStatus status;

	header->stored_len = page->stored_len;
	header->raw_len = page->raw_len;
	header->kind_codec = (uint8_t) (kind << 4 | page->codec);
	es_page_seal(header, page->stored, w->spec.id, w->offset);
	status = put(w, header, sizeof(*header), err);
	if (status == ES_OK)
		status = put(w, page->stored, page->stored_len, err);
	return status;
}

/* ---- life ---- */

EsStatus
es_segment_writer_create(EsSegmentWriter **writer, const EsSegmentSpec *spec, EsAppendFn append, void *arg)
{
	EsSegmentWriter *w;
	EsColumnDesc	*columns;

	*writer = NULL;
	if (!es_segment_shape_valid(spec->columns, spec->ncols, &spec->roles) || spec->codec > ES_CODEC_ZSTD)
		return ES_ERR_ARGUMENT;

	w = calloc(1, sizeof(*w));
	if (w == NULL)
		return ES_ERR_NOMEM;
	w->spec = *spec;
	w->spec.columns = NULL;
	w->append = append;
	w->arg = arg;
	w->ncols_physical = (uint32_t) spec->ncols + ES_HIDDEN_COLUMNS;
	w->zone_limit = (uint64_t) spec->ncols * ZONE_BYTES_PER_COLUMN;
	if (w->zone_limit < ZONE_BYTES)
		w->zone_limit = ZONE_BYTES;

	columns = malloc(sizeof(EsColumnDesc) * (size_t) spec->ncols);
	w->columns = calloc(w->ncols_physical, sizeof(EsZoneColumn));
	w->encoder = es_page_encoder_create(spec->codec, spec->zstd_level);
	w->spec.columns = columns;
	if (columns == NULL || w->columns == NULL || w->encoder == NULL)
	{
		es_segment_writer_free(w);
		return ES_ERR_NOMEM;
	}
	memcpy(columns, spec->columns, sizeof(EsColumnDesc) * (size_t) spec->ncols);
	for (int i = 0; i < spec->ncols; i++)
	{
		w->columns[i].desc = columns[i];
		w->columns[i].absent = (columns[i].flags & ES_COLUMN_DROPPED) != 0 || i + 1 == spec->roles.position ||
							   i + 1 == spec->roles.version;
	}
	for (int i = 0; i < ES_HIDDEN_COLUMNS; i++)
		w->columns[spec->ncols + i].desc = es_segment_hidden_columns[i];
	w->columns[spec->ncols + ES_HIDDEN_CONTENT_HASH].absent = !spec->has_content_hash;
	*writer = w;
	return ES_OK;
}

void
es_segment_writer_free(EsSegmentWriter *w)
{
	if (w == NULL)
		return;
	for (uint32_t i = 0; w->columns != NULL && i < w->ncols_physical; i++)
	{
		free(w->columns[i].data.data);
		free(w->columns[i].offsets);
		free(w->columns[i].nulls);
	}
	free(w->columns);
	free((void *) w->spec.columns);
	es_page_encoder_free(w->encoder);
	free(w->context.data);
	free(w->zones.data);
	free(w->chunks.data);
	free(w->pages.data);
	free(w->index.data);
	free(w->filters.data);
	free(w->constants.data);
	free(w);
}

/* The file begins when the first row comes. */
static EsStatus
put_header(EsSegmentWriter *w, EsError *err)
{
	EsSegmentHeader h = {
		.magic = ES_SEGMENT_MAGIC,
		.version = ES_FORMAT_VERSION,
		.len = sizeof(h),
		.identity = w->spec.identity,
		.id = w->spec.id,
		.table = w->spec.table,
		.roles = w->spec.roles,
		.relid = w->spec.relid,
		.flags = w->spec.flags,
		.ncols = (uint16_t) w->spec.ncols,
		.has_content_hash = w->spec.has_content_hash,
	};

	h.crc = es_crc32c(0, &h, sizeof(h));
	w->header_crc = h.crc;
	return put(w, &h, sizeof(h), err);
}

/* ---- context index and filter ---- */

static EsStatus
put_index_page(EsSegmentWriter *w, EsError *err)
{
	EsIntVecPlan  hashes;
	EsIntVecPlan  rows;
	EsEncodedPage page;
	EsIndexEntry  entry = {.offset = w->offset,
						   .first_hash = w->index_hashes[0],
						   .first_row = w->index_rows[0],
						   .nentries = w->nindex};
	EsPageHeader  header = {.zone = w->footer.nindex, .nrows = (uint16_t) w->nindex};
	uint8_t		 *raw;
	EsStatus	  status;

	if (w->nindex == 0)
		return ES_OK;
	es_intvec_plan(w->index_hashes, w->nindex, false, &hashes);
	es_intvec_plan(w->index_rows, w->nindex, false, &rows);
	raw = malloc(hashes.size + rows.size);
	if (raw == NULL)
		return es_segment_no_memory(err);
	es_intvec_encode(w->index_hashes, &hashes, raw);
	es_intvec_encode(w->index_rows, &rows, raw + hashes.size);
	status = es_page_compress(w->encoder, raw, (uint32_t) (hashes.size + rows.size), false, &page);
	if (status == ES_OK)
		status = es_segment_put_page(w, ES_PAGE_INDEX, &header, &page, err);
	else
		es_segment_no_memory(err);
	free(raw);
	entry.stored_len = (uint32_t) (w->offset - entry.offset);
	if (status == ES_OK && !es_array_add(&w->index, &entry, sizeof(entry)))
		status = es_segment_no_memory(err);
	w->footer.nindex++;
	w->nindex = 0;
	return status;
}

static EsStatus
put_filter_page(EsSegmentWriter *w, EsError *err)
{
	uint32_t	   nblocks = es_filter_nblocks(w->nkeys);
	EsFilterBlock *blocks;
	EsFilterEntry  entry = {.offset = w->offset, .first_hash = w->keys[0]};
	EsPageHeader   header = {.zone = w->footer.nfilters};
	EsEncodedPage  page;
	EsStatus	   status;

	if (w->nkeys == 0)
		return ES_OK;
	blocks = calloc(nblocks, sizeof(*blocks));
	if (blocks == NULL)
		return es_segment_no_memory(err);
	for (uint32_t i = 0; i < w->nkeys; i++)
		es_filter_add(blocks, nblocks, w->keys[i]);
	page.codec = ES_CODEC_NONE; /* a filter is as dense as it gets */
	page.raw_len = page.stored_len = nblocks * (uint32_t) sizeof(*blocks);
	page.stored = (const uint8_t *) blocks;
	status = es_segment_put_page(w, ES_PAGE_FILTER, &header, &page, err);
	free(blocks);
	entry.stored_len = (uint32_t) (w->offset - entry.offset);
	if (status == ES_OK && !es_array_add(&w->filters, &entry, sizeof(entry)))
		status = es_segment_no_memory(err);
	w->footer.nfilters++;
	w->nkeys = 0;
	return status;
}

/* A row that begins a new context. */
static EsStatus
add_context(EsSegmentWriter *w, uint64_t hash, const void *bytes, size_t len, EsError *err)
{
	EsStatus status = ES_OK;

	if (w->nindex == ES_INDEX_PAGE_ENTRIES)
		status = put_index_page(w, err);
	/* Equal hashes are one key, so that they never lie in two filter pages. */
	if (status == ES_OK && (w->footer.ncontexts == 0 || hash != w->context_hash))
	{
		if (w->nkeys == ES_FILTER_PAGE_KEYS)
			status = put_filter_page(w, err);
		w->keys[w->nkeys++] = hash;
	}
	if (status != ES_OK)
		return status;
	w->index_hashes[w->nindex] = hash;
	w->index_rows[w->nindex] = w->footer.nrows;
	w->nindex++;
	w->footer.ncontexts++;
	w->context.len = 0;
	return es_array_add(&w->context, bytes, len) ? ES_OK : es_segment_no_memory(err);
}

/* ---- rows ---- */

/* Is the varlena one that we can keep: neither external nor compressed? */
static bool
varlena_ok(const uint8_t *p)
{
	if (p[0] & 0x01)
		return p[0] != ES_OVERFLOW_MARKER;
	return (p[0] & 0x03) == 0 && es_page_varlena_size(p) >= 4 && es_page_varlena_size(p) <= ES_VALUE_MAX;
}

static EsStatus
check_row(EsSegmentWriter *w, const EsSegmentRow *row, const void **bytes, size_t *len, int64_t *scratch,
		  bool *new_context, EsError *err)
{
	const EsSegmentSpec *spec = &w->spec;
	int					 context = spec->roles.context - 1;
	int					 cmp;

	for (int i = 0; i < spec->ncols; i++)
		if (spec->columns[i].len < 0 && !w->columns[i].absent && row->values[i] != NULL &&
			!varlena_ok(row->values[i]))
			return es_fail(err, ES_ERR_ARGUMENT, 0, "value of column %d is not a plain varlena", i + 1);
	if (row->values[context] == NULL)
		return es_fail(err, ES_ERR_ARGUMENT, 0, "row %llu has no context",
					   (unsigned long long) w->footer.nrows);
	es_context_bytes((EsContextClass) spec->roles.context_class, spec->columns[context].len,
					 row->values[context], scratch, bytes, len);

	*new_context = true;
	if (w->footer.nrows == 0)
		return ES_OK;
	if (row->context_hash == w->context_hash)
	{
		cmp = memcmp(w->context.data, *bytes, w->context.len < *len ? w->context.len : *len);
		if (cmp == 0 && w->context.len != *len)
			cmp = w->context.len < *len ? -1 : 1;
		*new_context = cmp != 0;
		if (cmp < 0 || (cmp == 0 && row->position > w->position))
			return ES_OK;
	}
	else if (row->context_hash > w->context_hash)
		return ES_OK;
	return es_fail(err, ES_ERR_ARGUMENT, 0, "row %llu of the segment is not in sort order",
				   (unsigned long long) w->footer.nrows);
}

static void
note_row(EsSegmentWriter *w, const EsSegmentRow *row)
{
	EsZoneEntry		*z = &w->zone;
	EsSegmentFooter *f = &w->footer;

	if (z->nrows == 0)
	{
		z->min_position = z->max_position = row->position;
		z->min_fxid = z->max_fxid = row->fxid;
		z->first_hash = row->context_hash;
	}
	z->min_position = row->position < z->min_position ? row->position : z->min_position;
	z->max_position = row->position > z->max_position ? row->position : z->max_position;
	z->min_fxid = row->fxid < z->min_fxid ? row->fxid : z->min_fxid;
	z->max_fxid = row->fxid > z->max_fxid ? row->fxid : z->max_fxid;
	z->last_hash = row->context_hash;
	z->nrows++;

	if (f->nrows == 0)
	{
		f->min_position = f->max_position = row->position;
		f->min_fxid = f->max_fxid = row->fxid;
	}
	f->min_position = row->position < f->min_position ? row->position : f->min_position;
	f->max_position = row->position > f->max_position ? row->position : f->max_position;
	f->min_fxid = row->fxid < f->min_fxid ? row->fxid : f->min_fxid;
	f->max_fxid = row->fxid > f->max_fxid ? row->fxid : f->max_fxid;
	f->nrows++;

	w->context_hash = row->context_hash;
	w->position = row->position;
}

static EsStatus
add_row(EsSegmentWriter *w, const EsSegmentRow *row, EsError *err)
{
	uint32_t	ncols = (uint32_t) w->spec.ncols;
	const void *hidden[ES_HIDDEN_COLUMNS] = {
		[ES_HIDDEN_CONTENT_HASH] = row->content_hash,
		[ES_HIDDEN_POSITION] = &row->position,
		[ES_HIDDEN_VERSION] = &row->version,
		[ES_HIDDEN_FXID] = &row->fxid,
	};
	const void *bytes;
	size_t		len;
	int64_t		scratch;
	bool		new_context = false;
	EsStatus	status;

	status = check_row(w, row, &bytes, &len, &scratch, &new_context, err);
	if (status == ES_OK && w->footer.nrows == 0)
		status = put_header(w, err);
	if (status == ES_OK && (w->zone.nrows == ES_ZONE_ROWS || w->zone_bytes >= w->zone_limit))
		status = es_segment_flush_zone(w, err);
	if (status == ES_OK && new_context)
		status = add_context(w, row->context_hash, bytes, len, err);
	for (uint32_t i = 0; status == ES_OK && i < ncols; i++)
		status = es_segment_add_value(w, i, row->values[i], err);
	for (uint32_t i = 0; status == ES_OK && i < ES_HIDDEN_COLUMNS; i++)
		status = es_segment_add_value(w, ncols + i, hidden[i], err);
	if (status == ES_OK)
		note_row(w, row);
	return status;
}

EsStatus
es_segment_writer_add(EsSegmentWriter *w, const EsSegmentRow *row, EsError *err)
{
	if (w->failed != ES_OK)
		return es_fail(err, w->failed, 0, "the segment could not be written before");
	w->failed = add_row(w, row, err);
	return w->failed;
}

/* ---- the end ---- */

static EsStatus
put_footer(EsSegmentWriter *w, EsError *err)
{
	EsSegmentFooter *f = &w->footer;
	size_t			 desc_len = sizeof(EsColumnDesc) * (size_t) w->spec.ncols;
	EsArray			*parts[] = {&w->zones, &w->chunks, &w->pages, &w->index, &w->filters, &w->constants};
	size_t			 len = sizeof(*f) + ES_PAD8(desc_len);
	EsPageHeader	 header = {0};
	EsEncodedPage	 page;
	EsSegmentTrailer trailer = {
		.footer_offset = w->offset,
		.version = ES_FORMAT_VERSION,
		.len = sizeof(trailer),
		.magic = ES_SEGMENT_MAGIC,
	};
	uint8_t *raw;
	uint8_t *pos;
	EsStatus status;

	f->id = w->spec.id;
	f->header_crc = w->header_crc;
	f->ncols = (uint32_t) w->spec.ncols;
	f->const_len = (uint32_t) w->constants.len;
	for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++)
		len += ES_PAD8(parts[i]->len);
	if (len > INT32_MAX)
		return es_fail(err, ES_ERR_TOO_LARGE, w->offset, "footer of %zu bytes is too large", len);
	raw = calloc(1, len);
	if (raw == NULL)
		return es_segment_no_memory(err);
	memcpy(raw, f, sizeof(*f));
	pos = raw + sizeof(*f);
	memcpy(pos, w->spec.columns, desc_len);
	pos += ES_PAD8(desc_len);
	for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++)
	{
		if (parts[i]->len > 0)
			memcpy(pos, parts[i]->data, parts[i]->len);
		pos += ES_PAD8(parts[i]->len);
	}

	status = es_page_compress(w->encoder, raw, (uint32_t) len, true, &page);
	if (status == ES_OK)
		status = es_segment_put_page(w, ES_PAGE_FOOTER, &header, &page, err);
	else
		es_segment_no_memory(err);
	free(raw);
	if (status != ES_OK)
		return status;
	trailer.footer_len = (uint32_t) (w->offset - trailer.footer_offset);
	trailer.footer_crc = w->footer_crc = header.crc;
	trailer.crc = es_crc32c(0, &trailer, sizeof(trailer));
	status = put(w, &trailer, sizeof(trailer), err);
	return status == ES_OK ? flush_out(w, err) : status;
}

EsStatus
es_segment_writer_finish(EsSegmentWriter *w, EsSegmentSummary *summary, EsError *err)
{
	EsStatus status = w->failed;

	memset(summary, 0, sizeof(*summary));
	if (status != ES_OK)
		return es_fail(err, status, 0, "the segment could not be written before");
	if (w->footer.nrows == 0)
		return es_fail(err, ES_ERR_ARGUMENT, 0, "a segment without rows cannot be written");
	status = es_segment_flush_zone(w, err);
	if (status == ES_OK)
		status = put_index_page(w, err);
	if (status == ES_OK)
		status = put_filter_page(w, err);
	if (status == ES_OK)
		status = put_footer(w, err);
	w->failed = status == ES_OK ? ES_ERR_ARGUMENT : status; /* nothing can follow */
	if (status != ES_OK)
		return status;

	summary->file_len = w->offset;
	summary->nrows = w->footer.nrows;
	summary->ncontexts = w->footer.ncontexts;
	summary->raw_bytes = w->footer.raw_bytes;
	summary->min_position = w->footer.min_position;
	summary->max_position = w->footer.max_position;
	summary->min_fxid = w->footer.min_fxid;
	summary->max_fxid = w->footer.max_fxid;
	summary->footer_crc = w->footer_crc;
	return ES_OK;
}
