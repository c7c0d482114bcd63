/*-------------------------------------------------------------------------
 *
 * segment_writer.h
 *	  The segment being written, as segment_writer.c (file, rows, contexts) and
 *	  segment_zone.c (the zone that fills up) see it.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_CORE_SEGMENT_WRITER_H
#define ES_CORE_SEGMENT_WRITER_H

#include "core/page.h"

#define ES_SEGMENT_OUT_LEN (128 * 1024) /* bytes gathered for one append */

/* An array that grows; data is never NULL once something, however short, was added. */
typedef struct EsArray
{
	uint8_t *data;
	size_t	 len; /* bytes */
	size_t	 room;
} EsArray;

/* The rows of the zone in one physical column. */
typedef struct EsZoneColumn
{
	EsColumnDesc desc;
	bool		 absent; /* dropped, or a role whose values come from a hidden column */
	uint32_t	 nnulls;
	EsArray		 data;	  /* nothing while all rows are NULL */
	uint32_t	*offsets; /* ES_ZONE_ROWS, varlena only, made with the first value */
	uint8_t		*nulls;	  /* ES_ZONE_ROWS bits, made with the first NULL after a value */
} EsZoneColumn;

struct EsSegmentWriter
{
	EsSegmentSpec  spec;
	EsAppendFn	   append;
	void		  *arg;
	EsStatus	   failed;
	uint64_t	   offset; /* of what is appended next, out[] included */
	uint32_t	   header_crc;
	uint32_t	   footer_crc;
	EsPageEncoder *encoder;

	uint32_t	  ncols_physical;
	EsZoneColumn *columns;
	uint64_t	  zone_limit;
	uint64_t	  zone_bytes;
	EsZoneEntry	  zone; /* being filled */

	uint64_t context_hash; /* of the last row */
	uint64_t position;
	EsArray	 context;

	uint32_t nindex; /* entries waiting */
	uint64_t index_hashes[ES_INDEX_PAGE_ENTRIES];
	uint64_t index_rows[ES_INDEX_PAGE_ENTRIES];
	uint32_t nkeys; /* hashes waiting */
	uint64_t keys[ES_FILTER_PAGE_KEYS];

	EsSegmentFooter footer;
	EsArray			zones; /* the footer's arrays */
	EsArray			chunks;
	EsArray			pages;
	EsArray			index;
	EsArray			filters;
	EsArray			constants;

	size_t	out_used;
	uint8_t out[ES_SEGMENT_OUT_LEN];
};

/* ---- segment_writer.c ---- */

/* Appends a page; its header says all but lengths, codec and CRC. */
extern EsStatus es_segment_put_page(EsSegmentWriter *w, EsPageKind kind, EsPageHeader *header,
									const EsEncodedPage *page, EsError *err);
extern EsStatus es_segment_no_memory(EsError *err);

/* ---- segment_zone.c ---- */

extern bool es_array_reserve(EsArray *a, size_t more);
extern bool es_array_add(EsArray *a, const void *bytes, size_t len);

/* The next row's value in a physical column; NULL = NULL. */
extern EsStatus es_segment_add_value(EsSegmentWriter *w, uint32_t number, const uint8_t *value, EsError *err);

/* Encodes and appends the rows gathered, as one zone. */
extern EsStatus es_segment_flush_zone(EsSegmentWriter *w, EsError *err);

#endif /* ES_CORE_SEGMENT_WRITER_H */
