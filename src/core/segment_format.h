/*-------------------------------------------------------------------------
 *
 * segment_format.h
 *	  The structs of a segment file as they lie on disk.  Private to
 *	  segment_*.c, page.c and their tests: others go through segment.h.
 *
 *	 EsSegmentHeader
 *	 pages			each EsPageHeader + stored bytes, one behind the other, no gaps: data pages
 *					zone by zone and column by column; overflow, index and
 *					filter pages lie between them, where they became full
 *	 footer			a page too: its raw bytes are EsSegmentFooter, then the arrays
 *						EsColumnDesc	[ncols]				padded to 8
 *						EsZoneEntry		[nzones]
 *						EsChunkEntry	[nzones][nphys]
 *						EsPageEntry		[npages]
 *						EsIndexEntry	[nindex]
 *						EsFilterEntry	[nfilters]
 *						bytes			[const_len]			padded to 8
 *	 EsSegmentTrailer
 *
 * A chunk is one column of one zone: its pages lie side by side.  A chunk whose
 * rows all have the same (small) value has no page at all: the value is among
 * the footer's bytes.
 *
 * Physical columns are the table's ncols, then the hidden ones (ES_HIDDEN_*).
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_CORE_SEGMENT_FORMAT_H
#define ES_CORE_SEGMENT_FORMAT_H

#include "core/segment.h"

/* Physical numbers of the hidden columns: ncols + these. */
#define ES_HIDDEN_CONTENT_HASH 0
#define ES_HIDDEN_POSITION	   1
#define ES_HIDDEN_VERSION	   2
#define ES_HIDDEN_FXID		   3
#define ES_HIDDEN_COLUMNS	   4

/* Their shapes (segment_reader.c). */
extern const EsColumnDesc es_segment_hidden_columns[ES_HIDDEN_COLUMNS];

/* Limits that readers check before they allocate. */
#define ES_PAGE_RAW_MAX		  (64 * 1024 - 1)	   /* any page but the footer: offsets are uint16 */
#define ES_OVERFLOW_RAW		  (48 * 1024)		   /* of each page of a chain but the last */
#define ES_VALUE_MAX		  UINT32_C(0x3fffffff) /* a varlena with its header */
#define ES_CONST_MAX		  64				   /* larger equal values have a page */
#define ES_INDEX_PAGE_ENTRIES 1024
#define ES_FILTER_PAGE_KEYS	  8192

/*
 * magic, version and crc stay where they are in every later version.
 */
typedef struct EsSegmentHeader
{
	uint64_t	   magic;	/* ES_SEGMENT_MAGIC */
	uint16_t	   version; /* ES_FORMAT_VERSION */
	uint16_t	   len;		/* of this struct */
	uint32_t	   crc;		/* of this struct with crc = 0 */
	EsFileIdentity identity;
	uint64_t	   id;
	EsTableKey	   table;
	EsRoles		   roles;
	uint32_t	   relid;
	uint32_t	   flags; /* ES_SEGMENT_* */
	uint16_t	   ncols;
	uint8_t		   has_content_hash;
	uint8_t		   reserved;
} EsSegmentHeader;

_Static_assert(sizeof(EsSegmentHeader) == 96, "EsSegmentHeader is on disk");

typedef enum EsPageKind
{
	ES_PAGE_DATA = 0,	  /* zone, column, rows */
	ES_PAGE_OVERFLOW = 1, /* zone, column, first_row: whose value it is part of */
	ES_PAGE_INDEX = 2,	  /* zone: its number; nrows: entries */
	ES_PAGE_FILTER = 3,	  /* zone: its number */
	ES_PAGE_FOOTER = 4
} EsPageKind;

/*
 * The CRC covers header (crc = 0) and stored bytes and starts from one over
 * {segment id, file offset of the page}: a page at the wrong place is as bad as a
 * damaged one.
 */
typedef struct EsPageHeader
{
	uint32_t crc;
	uint32_t stored_len; /* bytes behind this header */
	uint32_t raw_len;	 /* bytes when decompressed */
	uint32_t zone;
	uint16_t first_row; /* in its zone */
	uint16_t nrows;
	uint16_t column;	 /* physical */
	uint8_t	 kind_codec; /* EsPageKind << 4 | EsCodec */
	uint8_t	 encoding;	 /* EsPageEncoding, with ES_PAGE_HAS_NULLS */
} EsPageHeader;

_Static_assert(sizeof(EsPageHeader) == 24, "EsPageHeader is on disk");

/* Stands in a varlena page for a value that lies in overflow pages. */
typedef struct EsOverflowRef
{
	uint8_t	 marker; /* 0x01: a short header of length 0, which no value has */
	uint8_t	 reserved[3];
	uint32_t raw_len;	 /* of the value with its header */
	uint64_t offset;	 /* of the first page of the chain */
	uint64_t stored_len; /* of the chain with its page headers */
} EsOverflowRef;

_Static_assert(sizeof(EsOverflowRef) == 24, "EsOverflowRef is on disk");

#define ES_OVERFLOW_MARKER 0x01

typedef struct EsZoneEntry
{
	uint64_t   first_row;
	uint32_t   nrows;
	uint32_t   reserved;
	EsPosition min_position;
	EsPosition max_position;
	EsFxid	   min_fxid;
	EsFxid	   max_fxid;
	uint64_t   first_hash;
	uint64_t   last_hash;
} EsZoneEntry;

_Static_assert(sizeof(EsZoneEntry) == 64, "EsZoneEntry is on disk");

/* EsChunkEntry.flags */
#define ES_CHUNK_ALL_NULL 0x01 /* no page: also absent hidden columns */
#define ES_CHUNK_CONSTANT \
	0x02 /* no page: first_page is the offset of the value in the
									 * footer's bytes, stored_len its length */
#define ES_CHUNK_MINMAX 0x04
#define ES_CHUNK_ROLE \
	0x08 /* no page: position or version, whose values the hidden
									 * column has; nnulls, min and max are theirs */

typedef struct EsChunkEntry
{
	uint64_t offset;	 /* of its first page */
	uint32_t stored_len; /* of its pages with their headers */
	uint32_t first_page; /* in the page array; its pages end where the next
								 * chunk's with pages begin */
	uint32_t nnulls;
	uint16_t npages;
	uint16_t flags;
	int64_t	 min;
	int64_t	 max;
} EsChunkEntry;

_Static_assert(sizeof(EsChunkEntry) == 40, "EsChunkEntry is on disk");

typedef struct EsPageEntry
{
	uint32_t offset;	/* from the chunk's */
	uint16_t first_row; /* in its zone */
	uint16_t reserved;
} EsPageEntry;

_Static_assert(sizeof(EsPageEntry) == 8, "EsPageEntry is on disk");

typedef struct EsIndexEntry
{
	uint64_t offset;
	uint64_t first_hash;
	uint64_t first_row;	 /* of its first context */
	uint32_t stored_len; /* with the page header */
	uint32_t nentries;
} EsIndexEntry;

_Static_assert(sizeof(EsIndexEntry) == 32, "EsIndexEntry is on disk");

/* Covers the hashes from first_hash up to, not including, the next one's. */
typedef struct EsFilterEntry
{
	uint64_t offset;
	uint64_t first_hash;
	uint32_t stored_len;
	uint32_t reserved;
} EsFilterEntry;

_Static_assert(sizeof(EsFilterEntry) == 24, "EsFilterEntry is on disk");

typedef struct EsSegmentFooter
{
	uint64_t   id;		   /* repeats the header's */
	uint32_t   header_crc; /* ties the footer to its header */
	uint32_t   const_len;
	uint64_t   nrows;
	uint64_t   ncontexts;
	uint64_t   raw_bytes;
	EsPosition min_position;
	EsPosition max_position;
	EsFxid	   min_fxid;
	EsFxid	   max_fxid;
	uint32_t   nzones;
	uint32_t   npages;
	uint32_t   nindex;
	uint32_t   nfilters;
	uint32_t   ncols;
	uint32_t   reserved;
} EsSegmentFooter;

_Static_assert(sizeof(EsSegmentFooter) == 96, "EsSegmentFooter is on disk");

typedef struct EsSegmentTrailer
{
	uint64_t footer_offset;
	uint32_t footer_len; /* with its page header */
	uint32_t footer_crc; /* the one in its page header */
	uint32_t reserved;
	uint16_t version;
	uint16_t len; /* of this struct */
	uint32_t reserved2;
	uint32_t crc; /* of this struct with crc = 0 */
	uint64_t magic;
} EsSegmentTrailer;

_Static_assert(sizeof(EsSegmentTrailer) == 40, "EsSegmentTrailer is on disk");

/*
 * Columns and roles that a segment can have: widths, alignments, roles that name columns
 * of the right shape.  Writer and reader ask the same.
 */
extern bool es_segment_shape_valid(const EsColumnDesc *columns, int ncols, const EsRoles *roles);

#define ES_PAD8(n) (((size_t) (n) + 7) & ~(size_t) 7)

#endif /* ES_CORE_SEGMENT_FORMAT_H */
