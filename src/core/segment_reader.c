/*-------------------------------------------------------------------------
 *
 * segment_reader.c
 *	  Reading side of segment.h: open, and what the footer knows.
 *
 * Opening reads header, trailer and footer, checks their CRCs, and then every number
 * in the footer: offsets that lie in the file, arrays that fit, rows and pages that
 * follow each other without gaps.  Everything behind may use the footer without
 * looking again.  Pages are checked when they are read (segment_cache.c).
 *
 *-------------------------------------------------------------------------
 */
#include "core/segment_reader.h"

#include <stdlib.h>
#include <string.h>

/* ---- what a segment may look like ---- */

const EsColumnDesc es_segment_hidden_columns[ES_HIDDEN_COLUMNS] = {
	[ES_HIDDEN_CONTENT_HASH] = {ES_CONTENT_HASH_LEN, 8, 0},
	[ES_HIDDEN_POSITION] = {8, 8, ES_COLUMN_BYVAL},
	[ES_HIDDEN_VERSION] = {8, 8, ES_COLUMN_BYVAL},
	[ES_HIDDEN_FXID] = {8, 8, ES_COLUMN_BYVAL},
};

static bool
column_valid(const EsColumnDesc *c)
{
	return (c->len > 0 || c->len == -1) && (c->align == 1 || c->align == 2 || c->align == 4 || c->align == 8);
}

static bool
context_shape_valid(const EsColumnDesc *c, int klass)
{
	if (c->flags & ES_COLUMN_DROPPED)
		return false;
	switch (klass)
	{
		case ES_CONTEXT_STRING:
			return c->len == -1 || c->len > 8; /* name */
		case ES_CONTEXT_BYTEA:
			return c->len == -1;
		case ES_CONTEXT_INTEGER:
			return c->len == 2 || c->len == 4 || c->len == 8;
		case ES_CONTEXT_UUID:
			return c->len == ES_UUID_LEN;
		case ES_CONTEXT_DATE:
		case ES_CONTEXT_ENUM:
			return c->len == 4;
		case ES_CONTEXT_TIMESTAMPTZ:
			return c->len == 8;
		case ES_CONTEXT_BOOL:
			return c->len == 1;
		default:
			return false;
	}
}

bool
es_segment_shape_valid(const EsColumnDesc *columns, int ncols, const EsRoles *roles)
{
	const int16_t attributes[] = {roles->position, roles->version, roles->event_id, roles->event_type};

	if (ncols < 1 || ncols > ES_MAX_COLUMNS || roles->context < 1 || roles->context > ncols)
		return false;
	for (int i = 0; i < ncols; i++)
		if (!column_valid(&columns[i]))
			return false;
	for (size_t i = 0; i < sizeof(attributes) / sizeof(attributes[0]); i++)
		if (attributes[i] < 0 || attributes[i] > ncols)
			return false;
	if (roles->position == roles->context || roles->version == roles->context)
		return false;
	return context_shape_valid(&columns[roles->context - 1], roles->context_class);
}

/* ---- open ---- */

static EsStatus
read_header(EsSegment *seg, uint32_t *header_crc, EsError *err)
{
	EsSegmentHeader h;
	uint32_t		crc;
	EsStatus		status = seg->read(seg->arg, &h, sizeof(h), 0, err);

	if (status != ES_OK)
		return status;
	if (h.magic != ES_SEGMENT_MAGIC)
		return es_fail(err, ES_ERR_CORRUPT, 0, "not a segment file: magic is %016llx",
					   (unsigned long long) h.magic);
	*header_crc = h.crc;
	h.crc = 0;
	crc = es_crc32c(0, &h, sizeof(h));
	if (crc != *header_crc)
	{
		/* A later version may have a longer header: its CRC says nothing here. */
		if (h.version > ES_FORMAT_VERSION && h.len != sizeof(h))
			return es_fail(err, ES_ERR_VERSION, 0, "segment has format version %u, this is version %u",
						   h.version, ES_FORMAT_VERSION);
		return es_fail_crc(err, 0, *header_crc, crc, "segment header");
	}
	if (h.version != ES_FORMAT_VERSION || h.len != sizeof(h))
		return es_fail(err, ES_ERR_VERSION, 0, "segment has format version %u, this is version %u", h.version,
					   ES_FORMAT_VERSION);
	seg->info.identity = h.identity;
	seg->info.id = h.id;
	seg->info.table = h.table;
	seg->info.roles = h.roles;
	seg->info.relid = h.relid;
	seg->info.flags = h.flags;
	seg->info.ncols = h.ncols;
	seg->info.has_content_hash = h.has_content_hash != 0;
	return ES_OK;
}

static EsStatus
read_trailer(EsSegment *seg, EsSegmentTrailer *t, EsError *err)
{
	uint64_t offset = seg->file_len - sizeof(*t);
	uint32_t found;
	EsStatus status = seg->read(seg->arg, t, sizeof(*t), offset, err);

	if (status != ES_OK)
		return status;
	if (t->magic != ES_SEGMENT_MAGIC)
		return es_fail(err, ES_ERR_CORRUPT, offset, "segment file does not end with its trailer");
	found = t->crc;
	t->crc = 0;
	t->crc = es_crc32c(0, t, sizeof(*t));
	if (t->crc != found)
		return es_fail_crc(err, offset, found, t->crc, "segment trailer");
	if (t->version != ES_FORMAT_VERSION || t->len != sizeof(*t))
		return es_fail(err, ES_ERR_VERSION, offset,
					   "segment trailer has format version %u, this is version %u", t->version,
					   ES_FORMAT_VERSION);
	if (t->footer_offset < sizeof(EsSegmentHeader) || t->footer_offset > offset ||
		t->footer_len != offset - t->footer_offset || t->footer_len < sizeof(EsPageHeader))
		return es_fail(err, ES_ERR_CORRUPT, offset, "segment trailer names a footer outside the file");
	return ES_OK;
}

/* Reads the footer's page and decompresses it to seg->raw. */
static EsStatus
read_footer(EsSegment *seg, const EsSegmentTrailer *t, EsError *err)
{
	EsPageHeader h;
	uint8_t		*buf = malloc(t->footer_len);
	EsStatus	 status;

	if (buf == NULL)
		return es_fail(err, ES_ERR_NOMEM, t->footer_offset, "out of memory for a footer of %u bytes",
					   t->footer_len);
	status = seg->read(seg->arg, buf, t->footer_len, t->footer_offset, err);
	if (status == ES_OK)
		status = es_page_check(buf, t->footer_len, ES_PAGE_FOOTER, seg->info.id, t->footer_offset, &h, err);
	if (status == ES_OK && h.crc != t->footer_crc)
		status = es_fail_crc(err, t->footer_offset, t->footer_crc, h.crc, "segment footer");
	if (status == ES_OK)
	{
		seg->raw_len = h.raw_len;
		seg->raw = malloc(ES_PAD8((size_t) h.raw_len + 1));
		if (seg->raw == NULL)
			status = es_fail(err, ES_ERR_NOMEM, t->footer_offset, "out of memory for a footer of %u bytes",
							 h.raw_len);
		else
			status = es_page_decompress(&seg->decoder, &h, buf + sizeof(h), seg->raw, t->footer_offset, err);
	}
	free(buf);
	return status;
}

/* Takes n items of size bytes from the footer; NULL if they are not there. */
static const void *
take(EsSegment *seg, size_t *pos, uint64_t n, size_t size)
{
	const void *items = seg->raw + *pos;
	uint64_t	len;

	if (n > UINT32_MAX * (uint64_t) ES_MAX_COLUMNS * 2)
		return NULL;
	len = ES_PAD8(n * size);
	if (len > seg->raw_len - *pos)
		return NULL;
	*pos += len;
	return items;
}

/* Points seg's arrays into the footer; false if they do not fill it exactly. */
static bool
place_arrays(EsSegment *seg)
{
	const EsSegmentFooter *f;
	size_t				   pos = 0;
	uint64_t			   nphysical;

	seg->footer = f = take(seg, &pos, 1, sizeof(*f));
	if (f == NULL)
		return false;
	nphysical = (uint64_t) f->ncols + ES_HIDDEN_COLUMNS;
	if (f->ncols != (uint32_t) seg->info.ncols || f->nzones == 0 || f->nindex == 0 || f->nfilters == 0)
		return false;
	seg->nphysical = (uint32_t) nphysical;
	return (seg->info.columns = take(seg, &pos, f->ncols, sizeof(EsColumnDesc))) != NULL &&
		   (seg->zones = take(seg, &pos, f->nzones, sizeof(EsZoneEntry))) != NULL &&
		   (seg->chunks = take(seg, &pos, f->nzones * nphysical, sizeof(EsChunkEntry))) != NULL &&
		   (seg->pages = take(seg, &pos, f->npages, sizeof(EsPageEntry))) != NULL &&
		   (seg->index = take(seg, &pos, f->nindex, sizeof(EsIndexEntry))) != NULL &&
		   (seg->filters = take(seg, &pos, f->nfilters, sizeof(EsFilterEntry))) != NULL &&
		   (seg->constants = take(seg, &pos, f->const_len, 1)) != NULL && pos == seg->raw_len;
}

/* Do len bytes at offset lie among the pages? */
static bool
in_pages(const EsSegment *seg, uint64_t offset, uint64_t len)
{
	return offset >= sizeof(EsSegmentHeader) && offset <= seg->footer_offset &&
		   len <= seg->footer_offset - offset;
}

static bool
check_constant(const EsSegment *seg, const EsChunkEntry *c, const EsColumnDesc *desc)
{
	const uint8_t *value = seg->constants + c->first_page;

	if (c->nnulls != 0 || c->stored_len == 0 || c->stored_len > ES_CONST_MAX ||
		c->first_page > seg->footer->const_len || c->stored_len > seg->footer->const_len - c->first_page)
		return false;
	if (desc->len > 0)
		return c->stored_len == (uint32_t) desc->len;
	if (value[0] & 0x01)
		return value[0] >> 1 == c->stored_len;
	return c->stored_len >= 4 && (value[0] & 0x03) == 0 && es_page_varlena_size(value) == c->stored_len;
}

static bool
check_chunk(const EsSegment *seg, uint32_t zone, uint32_t column, uint32_t *npages)
{
	const EsChunkEntry *c = es_segment_chunk(seg, zone, column);
	uint32_t			nrows = seg->zones[zone].nrows;
	int					kinds = c->flags & (ES_CHUNK_ALL_NULL | ES_CHUNK_CONSTANT | ES_CHUNK_ROLE);
	bool is_role = (int) column < seg->info.ncols && ((int) column + 1 == seg->info.roles.position ||
													  (int) column + 1 == seg->info.roles.version);

	if (c->nnulls > nrows || is_role != (kinds == ES_CHUNK_ROLE))
		return false;
	if (kinds == ES_CHUNK_ROLE)
		return true;
	if (kinds == ES_CHUNK_ALL_NULL)
		return c->nnulls == nrows;
	if (kinds == ES_CHUNK_CONSTANT)
		return check_constant(seg, c, &seg->physical[column]);
	if (kinds != 0)
		return false;

	if (c->npages == 0 || c->first_page != *npages || c->npages > seg->footer->npages - *npages ||
		!in_pages(seg, c->offset, c->stored_len))
		return false;
	*npages += c->npages;
	for (uint32_t i = 0; i < c->npages; i++)
	{
		const EsPageEntry *e = &seg->pages[c->first_page + i];
		bool			   last = i + 1u == c->npages;
		uint32_t		   stop = last ? c->stored_len : e[1].offset;
		uint32_t		   stop_row = last ? nrows : e[1].first_row;

		if ((i == 0 && (e->offset != 0 || e->first_row != 0)) || stop < e->offset ||
			stop - e->offset <= sizeof(EsPageHeader) ||
			stop - e->offset > sizeof(EsPageHeader) + ES_PAGE_RAW_MAX || stop_row <= e->first_row)
			return false;
	}
	return true;
}

static bool
check_zones(const EsSegment *seg)
{
	const EsSegmentFooter *f = seg->footer;
	uint64_t			   row = 0;
	uint32_t			   npages = 0;

	for (uint32_t z = 0; z < f->nzones; z++)
	{
		const EsZoneEntry *zone = &seg->zones[z];

		if (zone->first_row != row || zone->nrows == 0 || zone->nrows > ES_ZONE_ROWS ||
			zone->first_hash > zone->last_hash || (z > 0 && zone->first_hash < zone[-1].last_hash))
			return false;
		row += zone->nrows;
		for (uint32_t c = 0; c < seg->nphysical; c++)
			if (!check_chunk(seg, z, c, &npages))
				return false;
	}
	return row == f->nrows && npages == f->npages;
}

static bool
check_index(const EsSegment *seg)
{
	const EsSegmentFooter *f = seg->footer;
	uint64_t			   ncontexts = 0;

	for (uint32_t i = 0; i < f->nindex; i++)
	{
		const EsIndexEntry *e = &seg->index[i];

		if (e->nentries == 0 || e->nentries > ES_INDEX_PAGE_ENTRIES ||
			(i + 1 < f->nindex && e->nentries != ES_INDEX_PAGE_ENTRIES) ||
			e->stored_len <= sizeof(EsPageHeader) || e->stored_len > sizeof(EsPageHeader) + ES_PAGE_RAW_MAX ||
			!in_pages(seg, e->offset, e->stored_len) || e->first_row >= f->nrows ||
			(i == 0 ? e->first_row != 0
					: e->first_row <= e[-1].first_row || e->first_hash < e[-1].first_hash))
			return false;
		ncontexts += e->nentries;
	}
	for (uint32_t i = 0; i < f->nfilters; i++)
	{
		const EsFilterEntry *e = &seg->filters[i];

		if (e->stored_len <= sizeof(EsPageHeader) || e->stored_len > sizeof(EsPageHeader) + ES_PAGE_RAW_MAX ||
			!in_pages(seg, e->offset, e->stored_len) || (i > 0 && e->first_hash <= e[-1].first_hash))
			return false;
	}
	return ncontexts == f->ncontexts && seg->index[0].first_hash == seg->zones[0].first_hash &&
		   seg->filters[0].first_hash == seg->zones[0].first_hash;
}

static EsStatus
check_footer(EsSegment *seg, uint32_t header_crc, EsError *err)
{
	uint64_t offset = seg->footer_offset;
	int		 ncols = seg->info.ncols;

	if (!place_arrays(seg))
		return es_fail(err, ES_ERR_CORRUPT, offset, "segment footer of %zu bytes does not hold what it names",
					   seg->raw_len);
	if (seg->footer->header_crc != header_crc || seg->footer->id != seg->info.id)
		return es_fail(err, ES_ERR_CORRUPT, offset, "segment footer belongs to another header");
	if (!es_segment_shape_valid(seg->info.columns, ncols, &seg->info.roles))
		return es_fail(err, ES_ERR_CORRUPT, offset, "segment footer describes impossible columns");

	seg->physical = malloc(sizeof(EsColumnDesc) * seg->nphysical);
	if (seg->physical == NULL)
		return es_fail(err, ES_ERR_NOMEM, offset, "out of memory for %u columns", seg->nphysical);
	memcpy(seg->physical, seg->info.columns, sizeof(EsColumnDesc) * (size_t) ncols);
	memcpy(seg->physical + ncols, es_segment_hidden_columns, sizeof(es_segment_hidden_columns));

	if (!check_zones(seg) || !check_index(seg))
		return es_fail(err, ES_ERR_CORRUPT, offset, "segment footer contradicts itself");
	return ES_OK;
}

EsStatus
es_segment_open(EsSegment **segment, EsReadFn read, void *arg, uint64_t file_len, EsError *err)
{
	EsSegment			  *seg;
	EsSegmentTrailer	   trailer;
	uint32_t			   header_crc = 0;
	const EsSegmentFooter *f;
	EsStatus			   status;

	*segment = NULL;
	if (file_len < sizeof(EsSegmentHeader) + sizeof(EsPageHeader) + sizeof(EsSegmentTrailer))
		return es_fail(err, ES_ERR_TRUNCATED, file_len, "segment file of %llu bytes is too short",
					   (unsigned long long) file_len);
	seg = calloc(1, sizeof(*seg));
	if (seg == NULL)
		return es_fail(err, ES_ERR_NOMEM, 0, "out of memory for opening a segment");
	seg->read = read;
	seg->arg = arg;
	seg->file_len = file_len;
	seg->cache.limit = ES_SEGMENT_CACHE_DEFAULT;

	status = read_header(seg, &header_crc, err);
	if (status == ES_OK)
		status = read_trailer(seg, &trailer, err);
	if (status == ES_OK)
	{
		seg->footer_offset = trailer.footer_offset;
		status = read_footer(seg, &trailer, err);
	}
	if (status == ES_OK)
		status = check_footer(seg, header_crc, err);
	if (status != ES_OK)
	{
		es_segment_close(seg);
		return status;
	}

	f = seg->footer;
	seg->info.nzones = f->nzones;
	seg->info.summary = (EsSegmentSummary){
		.file_len = file_len,
		.nrows = f->nrows,
		.ncontexts = f->ncontexts,
		.raw_bytes = f->raw_bytes,
		.min_position = f->min_position,
		.max_position = f->max_position,
		.min_fxid = f->min_fxid,
		.max_fxid = f->max_fxid,
		.footer_crc = trailer.footer_crc,
	};
	*segment = seg;
	return ES_OK;
}

void
es_segment_close(EsSegment *seg)
{
	if (seg == NULL)
		return;
	es_segment_cache_free(seg);
	free(seg->context);
	free(seg->physical);
	free(seg->raw);
	free(seg);
}

/* ---- what the footer knows ---- */

const EsSegmentInfo *
es_segment_info(const EsSegment *seg)
{
	return &seg->info;
}

size_t
es_segment_memory(const EsSegment *seg)
{
	return sizeof(*seg) + seg->raw_len + sizeof(EsColumnDesc) * seg->nphysical + seg->cache.bytes +
		   sizeof(EsPage *) * seg->cache.nbuckets + seg->io_room + seg->context_room;
}

EsZoneInfo
es_segment_zone(const EsSegment *seg, uint32_t zone)
{
	const EsZoneEntry *z = &seg->zones[zone];

	return (EsZoneInfo){
		.first_row = z->first_row,
		.nrows = z->nrows,
		.min_position = z->min_position,
		.max_position = z->max_position,
		.min_fxid = z->min_fxid,
		.max_fxid = z->max_fxid,
		.first_hash = z->first_hash,
		.last_hash = z->last_hash,
	};
}

EsZoneColumnStats
es_segment_column_stats(const EsSegment *seg, uint32_t zone, int column)
{
	const EsChunkEntry *c = es_segment_chunk(seg, zone, (uint32_t) column);
	EsZoneColumnStats	stats = {.nnulls = c->nnulls, .has_minmax = (c->flags & ES_CHUNK_MINMAX) != 0};

	if (stats.has_minmax)
	{
		stats.min = c->min;
		stats.max = c->max;
	}
	return stats;
}

uint32_t
es_segment_zone_of(const EsSegment *seg, uint64_t row)
{
	uint32_t lo = 0;
	uint32_t hi = seg->footer->nzones - 1;

	while (lo < hi)
	{
		uint32_t mid = lo + (hi - lo + 1) / 2;

		if (seg->zones[mid].first_row <= row)
			lo = mid;
		else
			hi = mid - 1;
	}
	return lo;
}
