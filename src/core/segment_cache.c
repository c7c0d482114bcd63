/*-------------------------------------------------------------------------
 *
 * segment_cache.c
 *	  Pages of an open segment: read, checked, decoded, kept.
 *
 * The cache is a hash table of decoded pages by file offset with a list in the order
 * in which they came.  The oldest goes first, but one that was used since gets a second chance at the
 * other end (the clock algorithm): so a look-up writes to no page but its own.  The cache holds one
 * reference to each page, readers hold more: a page that is thrown out while a block points into it lives
 * until the block lets it go.
 *
 * Pages of a chunk lie side by side; those that are missing are read together, up
 * to ES_SEGMENT_READ_LEN at a time.
 *
 *-------------------------------------------------------------------------
 */
#include "core/segment_reader.h"

#include <stdlib.h>
#include <string.h>

/* ---- the cache ---- */

static inline uint32_t
bucket_of(const EsPageCache *c, uint64_t offset)
{
	return (uint32_t) ((offset * UINT64_C(0x9e3779b97f4a7c15)) >> 32) & (c->nbuckets - 1);
}

static void
unlink_page(EsPageCache *c, EsPage *p)
{
	if (p->newer)
		p->newer->older = p->older;
	else
		c->newest = p->older;
	if (p->older)
		p->older->newer = p->newer;
	else
		c->oldest = p->newer;
}

static void
link_newest(EsPageCache *c, EsPage *p)
{
	p->newer = NULL;
	p->older = c->newest;
	if (c->newest)
		c->newest->newer = p;
	else
		c->oldest = p;
	c->newest = p;
}

/*
 * What is at an offset must also be what is wanted: a footer with a right checksum could
 * name the same place twice, for pages of different shapes.
 */
static EsPage *
cache_find(EsPageCache *c, uint64_t offset, EsPageKind kind, uint32_t zone, uint32_t column)
{
	EsPage *p;

	if (c->npages == 0)
		return NULL;
	for (p = c->buckets[bucket_of(c, offset)]; p != NULL; p = p->hash_next)
		if (p->offset == offset && p->kind == (uint8_t) kind && p->zone == zone && p->column == column)
			break;
	if (p != NULL)
		p->used = true;
	return p;
}

static void
cache_drop_oldest(EsPageCache *c)
{
	EsPage	*p;
	EsPage **link;

	/* ends: each round clears one mark */
	while ((p = c->oldest)->used && p != c->newest)
	{
		p->used = false;
		unlink_page(c, p);
		link_newest(c, p);
	}
	link = &c->buckets[bucket_of(c, p->offset)];
	while (*link != p)
		link = &(*link)->hash_next;
	*link = p->hash_next;
	unlink_page(c, p);
	c->npages--;
	c->bytes -= p->memory;
	es_page_unref(p);
}

static bool
cache_grow(EsPageCache *c)
{
	uint32_t nbuckets = c->nbuckets ? c->nbuckets * 2 : 64;
	EsPage **buckets = calloc(nbuckets, sizeof(*buckets));

	if (buckets == NULL)
		return c->nbuckets != 0;
	free(c->buckets);
	c->buckets = buckets;
	c->nbuckets = nbuckets;
	for (EsPage *p = c->newest; p != NULL; p = p->older)
	{
		EsPage **bucket = &buckets[bucket_of(c, p->offset)];

		p->hash_next = *bucket;
		*bucket = p;
	}
	return true;
}

/* Keeps the page if there is room for it; that it cannot be kept is no error. */
static void
cache_keep(EsPageCache *c, EsPage *p)
{
	EsPage **bucket;

	if (p->memory > c->limit)
		return;
	if (c->npages >= c->nbuckets && !cache_grow(c))
		return;
	while (c->bytes + p->memory > c->limit)
		cache_drop_oldest(c);
	bucket = &c->buckets[bucket_of(c, p->offset)];
	p->hash_next = *bucket;
	*bucket = p;
	p->used = false;
	link_newest(c, p);
	c->npages++;
	c->bytes += p->memory;
	es_page_ref(p);
}

void
es_segment_set_cache(EsSegment *seg, size_t bytes)
{
	seg->cache.limit = bytes;
	while (seg->cache.bytes > bytes)
		cache_drop_oldest(&seg->cache);
}

void
es_segment_cache_free(EsSegment *seg)
{
	while (seg->cache.npages > 0)
		cache_drop_oldest(&seg->cache);
	free(seg->cache.buckets);
	free(seg->io);
	es_page_decoder_free(&seg->decoder);
}

/* ---- reading ---- */

/* Reads bytes that lie inside the file into seg->io. */
static EsStatus
read_bytes(EsSegment *seg, uint64_t offset, size_t len, EsError *err)
{
	if (len > seg->io_room)
	{
		size_t	 room = len < ES_PAGE_RAW ? ES_PAGE_RAW : len;
		uint8_t *io = realloc(seg->io, room);

		if (io == NULL)
			return es_fail(err, ES_ERR_NOMEM, offset, "out of memory for reading %zu bytes", len);
		seg->io = io;
		seg->io_room = room;
	}
	return seg->read(seg->arg, seg->io, len, offset, err);
}

/* Where page `number` of a chunk lies.  es_segment_open has checked the directory. */
static void
page_place(const EsSegment *seg, const EsChunkEntry *chunk, uint32_t number, uint64_t *offset, uint32_t *len)
{
	const EsPageEntry *entry = &seg->pages[chunk->first_page + number];
	uint32_t		   stop = number + 1 < chunk->npages ? entry[1].offset : chunk->stored_len;

	*offset = chunk->offset + entry->offset;
	*len = stop - entry->offset;
}

uint32_t
es_segment_page_of(const EsSegment *seg, const EsChunkEntry *chunk, uint32_t row)
{
	const EsPageEntry *entries = &seg->pages[chunk->first_page];
	uint32_t		   lo = 0;
	uint32_t		   hi = chunk->npages - 1u;

	while (lo < hi)
	{
		uint32_t mid = (lo + hi + 1) / 2;

		if (entries[mid].first_row <= row)
			lo = mid;
		else
			hi = mid - 1;
	}
	return lo;
}

/* Decodes the page of a chunk whose bytes were read, and keeps it. */
static EsStatus
decode_data_page(EsSegment *seg, uint32_t zone, uint32_t column, uint32_t number, const uint8_t *buf,
				 uint64_t offset, uint32_t len, EsPage **page, EsError *err)
{
	const EsChunkEntry *chunk = es_segment_chunk(seg, zone, column);
	const EsPageEntry  *entry = &seg->pages[chunk->first_page + number];
	uint32_t			stop = number + 1u < chunk->npages ? entry[1].first_row : seg->zones[zone].nrows;
	EsPageHeader		h;
	EsStatus			status;

	status = es_page_check(buf, len, ES_PAGE_DATA, seg->info.id, offset, &h, err);
	if (status != ES_OK)
		return status;
	if (h.zone != zone || h.column != column || h.first_row != entry->first_row ||
		h.nrows != stop - entry->first_row)
		return es_fail(err, ES_ERR_CORRUPT, offset,
					   "segment page is of zone %u column %u rows %u+%u, not of zone %u column %u rows %u+%u",
					   h.zone, h.column, h.first_row, h.nrows, zone, column, entry->first_row,
					   stop - entry->first_row);
	status = es_page_decode(&seg->decoder, &h, buf + sizeof(h), &seg->physical[column], offset, page, err);
	if (status == ES_OK)
		cache_keep(&seg->cache, *page);
	return status;
}

EsStatus
es_segment_data_pages(EsSegment *seg, uint32_t zone, uint32_t column, uint32_t first, uint32_t n,
					  EsPage **pages, EsError *err)
{
	const EsChunkEntry *chunk = es_segment_chunk(seg, zone, column);
	EsStatus			status = ES_OK;
	uint32_t			done = 0;

	while (done < n && status == ES_OK)
	{
		uint64_t start;
		uint64_t offset;
		uint32_t len;
		size_t	 total;
		uint32_t count = 1;

		page_place(seg, chunk, first + done, &start, &len);
		pages[done] = cache_find(&seg->cache, start, ES_PAGE_DATA, zone, column);
		if (pages[done] != NULL)
		{
			es_page_ref(pages[done]);
			done++;
			continue;
		}

		/* A run of pages that are not there. */
		for (total = len; done + count < n; count++, total += len)
		{
			page_place(seg, chunk, first + done + count, &offset, &len);
			if (total + len > ES_SEGMENT_READ_LEN ||
				cache_find(&seg->cache, offset, ES_PAGE_DATA, zone, column) != NULL)
				break;
		}
		status = read_bytes(seg, start, total, err);
		for (uint32_t i = 0; i < count && status == ES_OK; i++)
		{
			page_place(seg, chunk, first + done, &offset, &len);
			status = decode_data_page(seg, zone, column, first + done, seg->io + (offset - start), offset,
									  len, &pages[done], err);
			if (status == ES_OK)
				done++;
		}
	}
	if (status != ES_OK)
		while (done > 0)
			es_page_unref(pages[--done]);
	return status;
}

/* A page that is not of a column. */
static EsStatus
plain_page(EsSegment *seg, EsPageKind kind, uint32_t number, uint64_t offset, uint32_t len, EsPage **page,
		   EsError *err)
{
	EsPageHeader h;
	EsStatus	 status;

	*page = cache_find(&seg->cache, offset, kind, number, 0);
	if (*page != NULL)
	{
		es_page_ref(*page);
		return ES_OK;
	}
	status = read_bytes(seg, offset, len, err);
	if (status == ES_OK)
		status = es_page_check(seg->io, len, kind, seg->info.id, offset, &h, err);
	if (status == ES_OK && (h.zone != number || h.column != 0))
		status = es_fail(err, ES_ERR_CORRUPT, offset, "segment page has number %u where %u belongs", h.zone,
						 number);
	if (status == ES_OK)
		status = es_page_decode(&seg->decoder, &h, seg->io + sizeof(h), NULL, offset, page, err);
	return status;
}

EsStatus
es_segment_index_page(EsSegment *seg, uint32_t number, EsPage **page, EsError *err)
{
	const EsIndexEntry *entry = &seg->index[number];
	EsStatus			status;
	bool				fresh;

	status = plain_page(seg, ES_PAGE_INDEX, number, entry->offset, entry->stored_len, page, err);
	if (status != ES_OK)
		return status;
	fresh = (*page)->refs == 1;
	if (fresh &&
		((*page)->rows.n != entry->nentries || es_intvec_get(&(*page)->ints, 0) != entry->first_hash ||
		 es_intvec_get(&(*page)->rows, 0) != entry->first_row))
	{
		es_page_unref(*page);
		return es_fail(err, ES_ERR_CORRUPT, entry->offset, "context index page %u does not fit the footer",
					   number);
	}
	if (fresh)
		cache_keep(&seg->cache, *page);
	return ES_OK;
}

EsStatus
es_segment_filter_page(EsSegment *seg, uint32_t number, EsPage **page, EsError *err)
{
	const EsFilterEntry *entry = &seg->filters[number];
	EsStatus			 status;

	status = plain_page(seg, ES_PAGE_FILTER, number, entry->offset, entry->stored_len, page, err);
	if (status == ES_OK && (*page)->refs == 1)
		cache_keep(&seg->cache, *page);
	return status;
}

/* ---- overflow ---- */

EsStatus
es_segment_check_overflow(const EsSegment *seg, const EsOverflowRef *ref, uint64_t page_offset, EsError *err)
{
	uint64_t npages = ((uint64_t) ref->raw_len + ES_OVERFLOW_RAW - 1) / ES_OVERFLOW_RAW;

	/* Each page of a chain has a header and a byte at least: that bounds what is allocated. */
	if (ref->raw_len <= ES_PAGE_RAW || ref->raw_len > ES_VALUE_MAX || ref->offset < sizeof(EsSegmentHeader) ||
		ref->offset > seg->footer_offset || ref->stored_len > seg->footer_offset - ref->offset ||
		ref->stored_len < npages * (sizeof(EsPageHeader) + 1))
		return es_fail(err, ES_ERR_CORRUPT, page_offset,
					   "overflow reference to %u bytes at %llu does not fit the file", ref->raw_len,
					   (unsigned long long) ref->offset);
	return ES_OK;
}

EsStatus
es_segment_read_overflow(EsSegment *seg, const EsOverflowRef *ref, uint32_t zone, uint32_t row,
						 uint32_t column, uint8_t *value, EsError *err)
{
	uint64_t end = ref->offset + ref->stored_len;
	uint64_t offset = ref->offset;
	uint64_t io_start = offset; /* file range that seg->io holds */
	uint64_t io_end = offset;
	uint32_t done = 0;

	while (done < ref->raw_len)
	{
		uint32_t	   want = ref->raw_len - done < ES_OVERFLOW_RAW ? ref->raw_len - done : ES_OVERFLOW_RAW;
		EsPageHeader   h;
		const uint8_t *page;
		EsStatus	   status;

		if (end - offset < sizeof(h))
			return es_fail(err, ES_ERR_CORRUPT, offset, "overflow chain ends early");

		/* The longest page that can be here, or what is left of the chain. */
		if (io_end < end && io_end - offset < sizeof(h) + ES_PAGE_RAW_MAX)
		{
			size_t len = end - offset < ES_SEGMENT_READ_LEN ? end - offset : ES_SEGMENT_READ_LEN;

			status = read_bytes(seg, offset, len, err);
			if (status != ES_OK)
				return status;
			io_start = offset;
			io_end = offset + len;
		}
		page = seg->io + (offset - io_start);
		memcpy(&h, page, sizeof(h));
		if (h.stored_len > io_end - offset - sizeof(h))
			return es_fail(err, ES_ERR_CORRUPT, offset, "overflow page claims %u bytes", h.stored_len);
		status =
			es_page_check(page, sizeof(h) + h.stored_len, ES_PAGE_OVERFLOW, seg->info.id, offset, &h, err);
		if (status != ES_OK)
			return status;
		if (h.zone != zone || h.first_row != row || h.column != column || h.raw_len != want)
			return es_fail(err, ES_ERR_CORRUPT, offset,
						   "overflow page is of zone %u row %u column %u, not of zone %u row %u column %u",
						   h.zone, h.first_row, h.column, zone, row, column);
		status = es_page_decompress(&seg->decoder, &h, page + sizeof(h), value + done, offset, err);
		if (status != ES_OK)
			return status;
		done += want;
		offset += sizeof(h) + h.stored_len;
	}
	if (offset != end || (value[0] & 0x03) != 0 || es_page_varlena_size(value) != ref->raw_len)
		return es_fail(err, ES_ERR_CORRUPT, ref->offset, "overflow value is not %u bytes long", ref->raw_len);
	return ES_OK;
}
