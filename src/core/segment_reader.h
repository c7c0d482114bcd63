/*-------------------------------------------------------------------------
 *
 * segment_reader.h
 *	  The open segment, as segment_reader.c (open), segment_cache.c (pages),
 *	  segment_context.c (contexts), segment_block.c (rows) and segment_verify.c see it.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_CORE_SEGMENT_READER_H
#define ES_CORE_SEGMENT_READER_H

#include "core/page.h"

/* Decoded pages by file offset; each counts as one reference. */
typedef struct EsPageCache
{
	EsPage **buckets;
	uint32_t nbuckets; /* power of two, 0 = none yet */
	uint32_t npages;
	EsPage	*newest;
	EsPage	*oldest;
	size_t	 bytes;
	size_t	 limit;
} EsPageCache;

struct EsSegment
{
	EsReadFn	  read;
	void		 *arg;
	uint64_t	  file_len;
	EsSegmentInfo info;
	uint32_t	  nphysical;
	EsColumnDesc *physical; /* the table's columns and the hidden ones */
	uint64_t	  footer_offset;

	/* The footer's raw bytes (8-byte aligned) and what lies in them. */
	uint8_t				  *raw;
	size_t				   raw_len;
	const EsSegmentFooter *footer;
	const EsZoneEntry	  *zones;
	const EsChunkEntry	  *chunks; /* [nzones][nphysical] */
	const EsPageEntry	  *pages;
	const EsIndexEntry	  *index;
	const EsFilterEntry	  *filters;
	const uint8_t		  *constants;

	EsPageDecoder decoder;
	EsPageCache	  cache;
	uint8_t		 *io; /* what was read last */
	size_t		  io_room;
	uint8_t		 *context; /* an overflow value that was compared */
	size_t		  context_room;
};

static inline const EsChunkEntry *
es_segment_chunk(const EsSegment *seg, uint32_t zone, uint32_t column)
{
	return &seg->chunks[(size_t) zone * seg->nphysical + column];
}

static inline bool
es_chunk_has_pages(const EsChunkEntry *chunk)
{
	return (chunk->flags & (ES_CHUNK_ALL_NULL | ES_CHUNK_CONSTANT | ES_CHUNK_ROLE)) == 0;
}

/* ---- segment_cache.c ---- */

#define ES_SEGMENT_CACHE_DEFAULT (1024 * 1024)
#define ES_SEGMENT_READ_LEN		 (256 * 1024) /* pages that lie side by side are read together */

extern void es_segment_cache_free(EsSegment *seg);

/* Pages [first, first + n) of a chunk, each with a reference for the caller. */
extern EsStatus es_segment_data_pages(EsSegment *seg, uint32_t zone, uint32_t column, uint32_t first,
									  uint32_t n, EsPage **pages, EsError *err);
extern EsStatus es_segment_index_page(EsSegment *seg, uint32_t number, EsPage **page, EsError *err);
extern EsStatus es_segment_filter_page(EsSegment *seg, uint32_t number, EsPage **page, EsError *err);

/* Number of the chunk's page that holds a row of the zone. */
extern uint32_t es_segment_page_of(const EsSegment *seg, const EsChunkEntry *chunk, uint32_t row);

/* Is the reference one that may be followed (and its value allocated)? */
extern EsStatus
es_segment_check_overflow(const EsSegment *seg, const EsOverflowRef *ref, uint64_t page_offset, EsError *err);

/* Reads the value of a checked reference: ref->raw_len bytes. */
extern EsStatus es_segment_read_overflow(EsSegment *seg, const EsOverflowRef *ref, uint32_t zone,
										 uint32_t row, uint32_t column, uint8_t *value, EsError *err);

/* ---- segment_reader.c ---- */

extern uint32_t es_segment_zone_of(const EsSegment *seg, uint64_t row);

/* ---- segment_context.c ---- */

/* Canonical bytes of a row's context; they live until the next call or until
 * *page (may be NULL) is given back. */
extern EsStatus es_segment_context_of(EsSegment *seg, uint64_t row, int64_t *scratch, const void **bytes,
									  size_t *len, EsPage **page, EsError *err);

#endif /* ES_CORE_SEGMENT_READER_H */
