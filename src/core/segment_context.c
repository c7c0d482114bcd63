/*-------------------------------------------------------------------------
 *
 * segment_context.c
 *	  Contexts of an open segment: their bytes, and where their rows are.
 *
 * A context is found by its hash: the filter page that covers the hash says whether
 * it may be here, the index page has its entries, and since contexts may
 * share a hash, the bytes of each candidate's first row decide.  Entries with equal
 * hashes lie side by side, possibly across index pages, never across filter pages.
 *
 *-------------------------------------------------------------------------
 */
#include "core/segment_reader.h"

#include <stdlib.h>
#include <string.h>

#include "core/filter.h"
#include "core/route.h"

/* The context's value in memory; *page holds it, or seg->context. */
static EsStatus
context_value(EsSegment *seg, uint64_t row, uint64_t *number, const void **value, EsPage **page, EsError *err)
{
	uint32_t			column = (uint32_t) seg->info.roles.context - 1;
	uint32_t			zone = es_segment_zone_of(seg, row);
	uint32_t			zone_row = (uint32_t) (row - seg->zones[zone].first_row);
	const EsChunkEntry *chunk = es_segment_chunk(seg, zone, column);
	EsOverflowRef		ref;
	EsStatus			status;

	*page = NULL;
	if (chunk->flags & ES_CHUNK_CONSTANT)
	{
		*value = seg->constants + chunk->first_page;
		return ES_OK;
	}
	if (!es_chunk_has_pages(chunk))
		return es_fail(err, ES_ERR_CORRUPT, seg->footer_offset, "segment row has no context");
	status = es_segment_data_pages(seg, zone, column, es_segment_page_of(seg, chunk, zone_row), 1, page, err);
	if (status != ES_OK)
		return status;
	zone_row -= (*page)->first_row;
	if (es_page_is_int(&seg->physical[column]))
	{
		*value = number;
		es_page_ints(*page, zone_row, 1, (uint32_t) seg->physical[column].len, (uint8_t *) number);
	}
	else if (!es_page_pointers(*page, zone_row, 1, value))
		*value = NULL;
	if (*value == NULL || es_page_is_null(*page, zone_row))
	{
		status = es_fail(err, ES_ERR_CORRUPT, (*page)->offset, "segment row has no context");
		es_page_unref(*page);
		*page = NULL;
		return status;
	}
	if (seg->physical[column].len > 0 || *(const uint8_t *) *value != ES_OVERFLOW_MARKER)
		return ES_OK;

	/* A context larger than a page. */
	memcpy(&ref, *value, sizeof(ref));
	status = es_segment_check_overflow(seg, &ref, (*page)->offset, err);
	zone_row += (*page)->first_row;
	es_page_unref(*page);
	*page = NULL;
	if (status != ES_OK)
		return status;
	if (seg->context_room < ref.raw_len)
	{
		uint8_t *p = realloc(seg->context, ref.raw_len);

		if (p == NULL)
			return es_fail(err, ES_ERR_NOMEM, ref.offset, "out of memory for a context of %u bytes",
						   ref.raw_len);
		seg->context = p;
		seg->context_room = ref.raw_len;
	}
	*value = seg->context;
	return es_segment_read_overflow(seg, &ref, zone, zone_row, column, seg->context, err);
}

EsStatus
es_segment_context_of(EsSegment *seg, uint64_t row, int64_t *scratch, const void **bytes, size_t *len,
					  EsPage **page, EsError *err)
{
	uint64_t	number = 0;
	const void *value;
	EsStatus	status = context_value(seg, row, &number, &value, page, err);

	/* An integer becomes *scratch, so that number may go. */
	if (status == ES_OK)
		es_context_bytes((EsContextClass) seg->info.roles.context_class,
						 seg->physical[seg->info.roles.context - 1].len, value, scratch, bytes, len);
	return status;
}

/* Number of the last filter page whose first hash is <= hash; -1 = none. */
static int64_t
filter_page_of(const EsSegment *seg, uint64_t hash)
{
	int64_t lo = -1;
	int64_t hi = (int64_t) seg->footer->nfilters - 1;

	while (lo < hi)
	{
		int64_t mid = lo + (hi - lo + 1) / 2;

		if (seg->filters[mid].first_hash <= hash)
			lo = mid;
		else
			hi = mid - 1;
	}
	return lo;
}

/* First index page that can have the hash: the last that begins below it. */
static uint32_t
index_page_of(const EsSegment *seg, uint64_t hash)
{
	uint32_t lo = 0;
	uint32_t hi = seg->footer->nindex - 1;

	while (lo < hi)
	{
		uint32_t mid = lo + (hi - lo + 1) / 2;

		if (seg->index[mid].first_hash < hash)
			lo = mid;
		else
			hi = mid - 1;
	}
	return lo;
}

/*
 * First entry of an index page with at least this hash.  The first value of a block
 * of the vector is at hand, others cost the block; so blocks are searched first.
 */
static uint32_t
lower_bound(const EsPage *page, uint64_t hash)
{
	uint64_t values[ES_INTVEC_BLOCK];
	uint32_t n = page->ints.n;
	uint32_t lo = 0;
	uint32_t hi = (n + ES_INTVEC_BLOCK - 1) / ES_INTVEC_BLOCK;
	uint32_t first;

	/* blocks before lo begin below the hash, those from hi on do not */
	while (lo < hi)
	{
		uint32_t mid = (lo + hi) / 2;

		if (es_intvec_get(&page->ints, mid * ES_INTVEC_BLOCK) < hash)
			lo = mid + 1;
		else
			hi = mid;
	}
	if (lo == 0)
		return 0;
	first = (lo - 1) * ES_INTVEC_BLOCK;
	hi = n - first < ES_INTVEC_BLOCK ? n - first : ES_INTVEC_BLOCK;
	es_intvec_decode(&page->ints, first, hi, values);
	lo = 0;
	while (lo < hi)
	{
		uint32_t mid = (lo + hi) / 2;

		if (values[mid] < hash)
			lo = mid + 1;
		else
			hi = mid;
	}
	return first + lo;
}

/* Rows of an entry; the next one may be on the next page. */
static EsStatus
entry_rows(const EsSegment *seg, const EsPage *page, uint32_t number, uint32_t entry, uint64_t *first_row,
		   uint64_t *nrows, EsError *err)
{
	uint64_t end;

	if (entry + 1 < page->rows.n)
	{
		uint64_t both[2];

		es_intvec_decode(&page->rows, entry, 2, both);
		*first_row = both[0];
		end = both[1];
	}
	else
	{
		*first_row = es_intvec_get(&page->rows, entry);
		if (number + 1 < seg->footer->nindex)
			end = seg->index[number + 1].first_row;
		else
			end = seg->footer->nrows;
	}
	if (*first_row >= end || end > seg->footer->nrows)
		return es_fail(err, ES_ERR_CORRUPT, page->offset, "context index entry %u has rows %llu to %llu",
					   entry, (unsigned long long) *first_row, (unsigned long long) end);
	*nrows = end - *first_row;
	return ES_OK;
}

/* Has the context whose first row this is the wanted bytes? */
static EsStatus
same_context(EsSegment *seg, uint64_t row, const void *bytes, size_t len, bool *same, EsError *err)
{
	int64_t		scratch;
	const void *found;
	size_t		found_len;
	EsPage	   *page;
	EsStatus	status = es_segment_context_of(seg, row, &scratch, &found, &found_len, &page, err);

	if (status != ES_OK)
		return status;
	*same = found_len == len && (len == 0 || memcmp(found, bytes, len) == 0);
	if (page != NULL)
		es_page_unref(page);
	return ES_OK;
}

EsStatus
es_segment_find_context(EsSegment *seg, uint64_t hash, const void *bytes, size_t len, uint64_t *first_row,
						uint64_t *nrows, uint32_t *index_entry, EsError *err)
{
	int64_t	 filter = filter_page_of(seg, hash);
	EsPage	*page;
	bool	 found;
	EsStatus status;

	*first_row = 0;
	*nrows = 0;
	*index_entry = 0;
	if (filter < 0)
		return ES_OK;
	status = es_segment_filter_page(seg, (uint32_t) filter, &page, err);
	if (status != ES_OK)
		return status;
	found = es_filter_maybe((const EsFilterBlock *) page->raw,
							page->raw_len / (uint32_t) sizeof(EsFilterBlock), hash);
	es_page_unref(page);

	for (uint32_t p = index_page_of(seg, hash); found && p < seg->footer->nindex; p++)
	{
		if (seg->index[p].first_hash > hash)
			break;
		status = es_segment_index_page(seg, p, &page, err);
		if (status != ES_OK)
			return status;
		for (uint32_t e = lower_bound(page, hash); e < page->ints.n; e++)
		{
			bool	 same = false;
			uint64_t row;
			uint64_t n;

			found = es_intvec_get(&page->ints, e) == hash;
			if (!found)
				break;
			status = entry_rows(seg, page, p, e, &row, &n, err);
			if (status == ES_OK)
				status = same_context(seg, row, bytes, len, &same, err);
			if (status != ES_OK || same)
			{
				es_page_unref(page);
				if (status == ES_OK)
				{
					*first_row = row;
					*nrows = n;
					*index_entry = p * ES_INDEX_PAGE_ENTRIES + e;
				}
				return status;
			}
		}
		es_page_unref(page);
	}
	return ES_OK;
}

EsStatus
es_segment_walk_contexts(EsSegment *seg,
						 EsStatus (*callback)(void *arg, uint32_t entry, uint64_t hash, uint64_t first_row,
											  uint64_t nrows),
						 void *arg, EsError *err)
{
	EsStatus status = ES_OK;

	for (uint32_t p = 0; p < seg->footer->nindex && status == ES_OK; p++)
	{
		EsPage *page;

		status = es_segment_index_page(seg, p, &page, err);
		if (status != ES_OK)
			return status;
		for (uint32_t e = 0; e < page->ints.n && status == ES_OK; e++)
		{
			uint64_t first_row;
			uint64_t nrows;

			status = entry_rows(seg, page, p, e, &first_row, &nrows, err);
			if (status == ES_OK)
				status = callback(arg, p * ES_INDEX_PAGE_ENTRIES + e, es_intvec_get(&page->ints, e),
								  first_row, nrows);
		}
		es_page_unref(page);
	}
	return status;
}

_Static_assert(ES_CONTEXT_PAGE == ES_INDEX_PAGE_ENTRIES, "a page of entries is a page of the index");

EsStatus
es_segment_context_page(EsSegment *seg, uint32_t number, EsContextEntry entries[ES_CONTEXT_PAGE], uint32_t *n,
						EsError *err)
{
	uint64_t hashes[ES_INTVEC_BLOCK];
	uint64_t rows[ES_INTVEC_BLOCK];
	EsPage	*page;
	EsStatus status;
	uint32_t count;

	*n = 0;
	if (number >= seg->footer->nindex)
		return ES_OK;
	status = es_segment_index_page(seg, number, &page, err);
	if (status != ES_OK)
		return status;
	count = page->ints.n;
	if (count > ES_CONTEXT_PAGE || page->rows.n != count)
		status = es_fail(err, ES_ERR_CORRUPT, page->offset, "context index page has %u entries", count);
	for (uint32_t e = 0; e < count && status == ES_OK; e += ES_INTVEC_BLOCK)
	{
		uint32_t block = count - e < ES_INTVEC_BLOCK ? count - e : ES_INTVEC_BLOCK;

		es_intvec_decode(&page->ints, e, block, hashes);
		es_intvec_decode(&page->rows, e, block, rows);
		for (uint32_t i = 0; i < block; i++)
		{
			entries[e + i].hash = hashes[i];
			entries[e + i].first_row = rows[i];
			if (e + i > 0)
				entries[e + i - 1].nrows = rows[i] - entries[e + i - 1].first_row;
		}
	}
	if (status == ES_OK && count > 0)
	{
		uint64_t end =
			number + 1 < seg->footer->nindex ? seg->index[number + 1].first_row : seg->footer->nrows;

		entries[count - 1].nrows = end - entries[count - 1].first_row;
		for (uint32_t e = 0; e < count && status == ES_OK; e++)
			if (entries[e].nrows == 0 || entries[e].nrows > seg->footer->nrows ||
				entries[e].first_row > seg->footer->nrows - entries[e].nrows)
				status = es_fail(
					err, ES_ERR_CORRUPT, page->offset, "context index entry %u has %llu rows from %llu on", e,
					(unsigned long long) entries[e].nrows, (unsigned long long) entries[e].first_row);
	}
	es_page_unref(page);
	if (status == ES_OK)
		*n = count;
	return status;
}

EsStatus
es_segment_context(EsSegment *seg, uint64_t row, int64_t *scratch, const void **bytes, size_t *len,
				   EsError *err)
{
	EsPage	*page;
	EsStatus status;

	if (row >= seg->footer->nrows)
		return es_fail(err, ES_ERR_ARGUMENT, 0, "segment has no row %llu", (unsigned long long) row);
	status = es_segment_context_of(seg, row, scratch, bytes, len, &page, err);
	if (status != ES_OK || page == NULL)
		return status;
	if (*bytes != scratch)
	{
		if (seg->context_room < *len)
		{
			uint8_t *p = realloc(seg->context, *len);

			if (p == NULL)
			{
				es_page_unref(page);
				return es_fail(err, ES_ERR_NOMEM, 0, "out of memory for a context of %zu bytes", *len);
			}
			seg->context = p;
			seg->context_room = *len;
		}
		memcpy(seg->context, *bytes, *len);
		*bytes = seg->context;
	}
	es_page_unref(page);
	return ES_OK;
}
