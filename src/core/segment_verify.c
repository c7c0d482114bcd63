/*-------------------------------------------------------------------------
 *
 * segment_verify.c
 *	  Reads a whole segment and says all that is wrong with it.
 *
 * Each page is read from the file (the cache is emptied first: what is in it later was read,
 * and checked, since), each value decoded, each overflow chain followed; then what pages say is
 * compared with what others say: the bytes of all pages fill the file, the footer's ranges hold
 * the rows' values, every context is in filter and index and its rows have its bytes.
 *
 * The work is cut into steps of some milliseconds: one column of a zone, one page of the context
 * index.  Between steps the caller may use the segment, or close it and open it again.
 *
 *-------------------------------------------------------------------------
 */
#include "core/segment_reader.h"

#include <stdlib.h>
#include <string.h>

#include "core/filter.h"
#include "core/route.h"

typedef enum Phase
{
	PHASE_FRAME,
	PHASE_ZONES,
	PHASE_INDEX,
	PHASE_CONTEXTS,
	PHASE_DONE
} Phase;

struct EsVerifier
{
	EsSegment *seg; /* during a step */
	void (*report)(void *arg, const EsError *err);
	void	   *arg;
	EsStatus	first; /* status of the first damage */
	uint64_t	bytes; /* of pages seen */
	EsRowBlock *block;
	EsError		err;

	Phase	 phase;
	uint32_t zone;
	uint32_t column;
	uint32_t index_page;
	bool	 index_whole; /* no page of index and filters is damaged */
	bool	 any_context;
	uint64_t last_hash;
};

typedef struct EsVerifier Verifier;

/* Reports v->err. */
static void
damage(Verifier *v)
{
	if (v->first == ES_OK)
		v->first = v->err.status;
	if (v->report != NULL)
		v->report(v->arg, &v->err);
}

/* Adds up the chains that a page refers to; their pages are checked by reading the rows. */
static void
count_overflow(Verifier *v, const EsPage *page)
{
	const void **pointers = malloc(sizeof(void *) * page->nrows);

	if (pointers == NULL)
	{
		es_fail(&v->err, ES_ERR_NOMEM, page->offset, "out of memory while verifying a segment");
		damage(v);
		return;
	}
	if (es_page_pointers(page, 0, page->nrows, pointers))
		for (uint32_t i = 0; i < page->nrows; i++)
		{
			EsOverflowRef ref;

			if (pointers[i] == NULL || *(const uint8_t *) pointers[i] != ES_OVERFLOW_MARKER)
				continue;
			memcpy(&ref, pointers[i], sizeof(ref));
			v->bytes += ref.stored_len;
		}
	free(pointers);
}

/* One column of a zone, page by page, so that each damaged page is named. */
static void
verify_chunk(Verifier *v, uint32_t zone, uint32_t column)
{
	EsSegment		   *seg = v->seg;
	const EsChunkEntry *chunk = es_segment_chunk(seg, zone, column);
	bool			   *wanted;
	uint32_t			hidden = 0;
	int64_t				nnulls = 0;
	bool				complete = true;

	if (!es_chunk_has_pages(chunk))
		return;
	v->bytes += chunk->stored_len;
	wanted = calloc((size_t) seg->info.ncols, sizeof(bool));
	if (wanted == NULL)
	{
		es_fail(&v->err, ES_ERR_NOMEM, chunk->offset, "out of memory while verifying a segment");
		damage(v);
		return;
	}
	if (column < (uint32_t) seg->info.ncols)
		wanted[column] = true;
	else
		hidden = ES_WANT_POSITION | ES_WANT_VERSION | ES_WANT_FXID | ES_WANT_CONTENT_HASH;

	for (uint32_t p = 0; p < chunk->npages; p++)
	{
		const EsPageEntry *e = &seg->pages[chunk->first_page + p];
		uint32_t		   stop = p + 1u < chunk->npages ? e[1].first_row : seg->zones[zone].nrows;
		EsPage			  *page;

		if (es_segment_data_pages(seg, zone, column, p, 1, &page, &v->err) != ES_OK)
		{
			damage(v);
			complete = false;
			continue;
		}
		if (page->has_overflow)
			count_overflow(v, page);
		for (uint32_t i = 0; i < page->nrows; i++)
			nnulls += es_page_is_null(page, i);
		es_page_unref(page);
		if (column < (uint32_t) seg->info.ncols &&
			es_segment_read(seg, seg->zones[zone].first_row + e->first_row, stop - e->first_row, wanted,
							hidden, v->block, &v->err) != ES_OK)
			damage(v);
	}
	free(wanted);
	if (complete && nnulls != (int64_t) chunk->nnulls)
	{
		es_fail(&v->err, ES_ERR_CORRUPT, chunk->offset, "column %u of zone %u has %lld NULLs, not %u", column,
				zone, (long long) nnulls, chunk->nnulls);
		damage(v);
	}
}

/* Hidden columns against the footer's ranges; order inside contexts is checked with them. */
static void
verify_zone(Verifier *v, uint32_t zone)
{
	EsSegment		  *seg = v->seg;
	const EsZoneEntry *z = &seg->zones[zone];
	bool			  *none = calloc((size_t) seg->info.ncols, sizeof(bool));
	EsStatus		   status;

	if (none == NULL)
	{
		es_fail(&v->err, ES_ERR_NOMEM, 0, "out of memory while verifying a segment");
		damage(v);
		return;
	}
	status = es_segment_read(seg, z->first_row, z->nrows, none, ES_WANT_POSITION | ES_WANT_FXID, v->block,
							 &v->err);
	free(none);
	if (status != ES_OK)
		return; /* the page was reported */
	for (uint32_t r = 0; r < z->nrows; r++)
	{
		uint64_t position = es_block_position(v->block, r);
		EsFxid	 fxid = es_block_fxid(v->block, r);

		if (position < z->min_position || position > z->max_position || fxid < z->min_fxid ||
			fxid > z->max_fxid)
		{
			es_fail(&v->err, ES_ERR_CORRUPT, seg->footer_offset,
					"row %llu has position %llu, xid %llu outside its zone's range",
					(unsigned long long) (z->first_row + r), (unsigned long long) position,
					(unsigned long long) fxid);
			damage(v);
			return;
		}
	}
}

/* A context's entry: is it found by its own bytes, and in order? */
static void
verify_context(Verifier *v, uint32_t entry, const EsContextEntry *e)
{
	EsSegment  *seg = v->seg;
	int64_t		scratch;
	const void *bytes;
	size_t		len;
	EsPage	   *page;
	uint64_t	found_row;
	uint64_t	found_nrows;
	uint32_t	found_entry;
	EsStatus	status;
	void	   *copy;

	if (v->any_context && e->hash < v->last_hash)
	{
		es_fail(&v->err, ES_ERR_CORRUPT, seg->footer_offset, "context index entry %u is out of order", entry);
		damage(v);
	}
	v->any_context = true;
	v->last_hash = e->hash;

	status = es_segment_context_of(seg, e->first_row, &scratch, &bytes, &len, &page, &v->err);
	if (status != ES_OK)
		return; /* the page was reported */
	copy = malloc(len + 1);
	if (copy != NULL)
		memcpy(copy, bytes, len);
	if (page != NULL)
		es_page_unref(page);
	if (copy == NULL)
	{
		es_fail(&v->err, ES_ERR_NOMEM, 0, "out of memory while verifying a segment");
		damage(v);
		return;
	}

	status =
		es_segment_find_context(seg, e->hash, copy, len, &found_row, &found_nrows, &found_entry, &v->err);
	free(copy);
	if (status == ES_OK && (found_row != e->first_row || found_nrows != e->nrows || found_entry != entry))
	{
		es_fail(&v->err, ES_ERR_CORRUPT, seg->footer_offset,
				"context index entry %u is not found by its context", entry);
		damage(v);
	}
}

/* One page of the context index; false behind the last one. */
static bool
verify_context_page(Verifier *v)
{
	EsContextEntry entries[ES_CONTEXT_PAGE];
	uint32_t	   n;

	if (!v->index_whole || v->index_page >= v->seg->footer->nindex)
		return false;
	if (es_segment_context_page(v->seg, v->index_page, entries, &n, &v->err) != ES_OK)
	{
		damage(v);
		return false;
	}
	for (uint32_t i = 0; i < n; i++)
		verify_context(v, v->index_page * ES_CONTEXT_PAGE + i, &entries[i]);
	v->index_page++;
	return true;
}

static void
verify_index(Verifier *v)
{
	EsSegment *seg = v->seg;
	EsPage	  *page;

	v->index_whole = true;
	for (uint32_t i = 0; i < seg->footer->nindex; i++)
	{
		v->bytes += seg->index[i].stored_len;
		if (es_segment_index_page(seg, i, &page, &v->err) == ES_OK)
			es_page_unref(page);
		else
		{
			damage(v);
			v->index_whole = false;
		}
	}
	for (uint32_t i = 0; i < seg->footer->nfilters; i++)
	{
		v->bytes += seg->filters[i].stored_len;
		if (es_segment_filter_page(seg, i, &page, &v->err) == ES_OK)
			es_page_unref(page);
		else
		{
			damage(v);
			v->index_whole = false;
		}
	}
}

/* Header, trailer and footer once more: they may have changed since the segment was opened. */
static void
verify_frame(Verifier *v)
{
	EsSegment *again;

	if (es_segment_open(&again, v->seg->read, v->seg->arg, v->seg->file_len, &v->err) != ES_OK)
		damage(v);
	else if (again->info.summary.footer_crc != v->seg->info.summary.footer_crc)
	{
		es_fail_crc(&v->err, v->seg->footer_offset, v->seg->info.summary.footer_crc,
					again->info.summary.footer_crc, "segment footer");
		damage(v);
	}
	es_segment_close(again);
}

EsVerifier *
es_verifier_create(void (*report)(void *arg, const EsError *err), void *arg)
{
	EsVerifier *v = calloc(1, sizeof(EsVerifier));

	if (v == NULL)
		return NULL;
	v->report = report;
	v->arg = arg;
	v->block = es_block_create();
	if (v->block == NULL)
	{
		free(v);
		return NULL;
	}
	return v;
}

bool
es_verifier_step(EsVerifier *v, EsSegment *seg)
{
	size_t limit = seg->cache.limit;

	v->seg = seg;
	if (v->phase == PHASE_FRAME)
		es_segment_set_cache(seg, 0);
	if (limit < ES_SEGMENT_CACHE_DEFAULT)
		es_segment_set_cache(seg, ES_SEGMENT_CACHE_DEFAULT);
	switch (v->phase)
	{
		case PHASE_FRAME:
			verify_frame(v);
			v->phase = PHASE_ZONES;
			break;
		case PHASE_ZONES:
			if (v->column < seg->nphysical)
				verify_chunk(v, v->zone, v->column++);
			else
			{
				verify_zone(v, v->zone++);
				v->column = 0;
			}
			if (v->zone >= seg->footer->nzones)
				v->phase = PHASE_INDEX;
			break;
		case PHASE_INDEX:
			verify_index(v);
			v->phase = PHASE_CONTEXTS;
			break;
		case PHASE_CONTEXTS:
			if (verify_context_page(v))
				break;
			if (v->first == ES_OK && v->bytes != seg->footer_offset - sizeof(EsSegmentHeader))
			{
				es_fail(&v->err, ES_ERR_CORRUPT, seg->footer_offset,
						"pages of %llu bytes do not fill the file", (unsigned long long) v->bytes);
				damage(v);
			}
			v->phase = PHASE_DONE;
			break;
		case PHASE_DONE:
			break;
	}
	es_block_clear(v->block); /* it refers to pages of the segment */
	es_segment_set_cache(seg, limit);
	v->seg = NULL;
	return v->phase != PHASE_DONE;
}

EsStatus
es_verifier_free(EsVerifier *v)
{
	EsStatus status;

	if (v == NULL)
		return ES_OK;
	status = v->first;
	es_block_free(v->block);
	free(v);
	return status;
}

EsStatus
es_segment_verify(EsSegment *seg, void (*report)(void *arg, const EsError *err), void *arg)
{
	EsVerifier *v = es_verifier_create(report, arg);

	if (v == NULL)
		return ES_ERR_NOMEM;
	while (es_verifier_step(v, seg))
		;
	return es_verifier_free(v);
}
