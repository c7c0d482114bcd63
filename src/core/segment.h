/*-------------------------------------------------------------------------
 *
 * segment.h
 *	  Codec of segment files: rows of one table and shard, sorted by context
 *	  and then by position, in columns, zones and pages.
 *
 * Sort order: (context hash, context bytes, position); in a pending segment
 * the ordinal stands for the position.  Rows are numbered from 0 in this order.
 *
 * File layout
 *	 header		one block: magic, version, identity, segment id, table, kind
 *	 pages		per zone (ES_ZONE_ROWS rows) and column: data in pages of at most
 *				ES_PAGE_RAW raw bytes, each with its own header {column, zone, raw and
 *				stored length, codec, encoding, first row, rows, CRC-32C}.  Encodings:
 *				constant, frame-of-reference bit-packing (fixed-width integers up to 8
 *				bytes), dictionary (varlena), plain.  A page is compressed with
 *				LZ4 (or Zstandard) where that makes it smaller.
 *	 overflow	values that are larger than a page lie in a chain of overflow pages of
 *				their own, written when the value arrives (so memory stays bounded);
 *				the data page holds a reference
 *	 context index	one entry per context: hash, first row; in pages, with the first
 *				hash of each page in the footer
 *	 filter		of context hashes (split-block Bloom)
 *	 footer		schema, roles, zone directory (per zone and column: page offsets, null
 *				count, min/max where the type has a fixed width and is an integer, min
 *				and max fxid and position of the zone), offsets of all of the above
 *	 trailer	fixed size: footer offset and length, CRC of the footer, magic; last
 *
 * Hidden columns behind the table's columns: content hash (if the table has event_id),
 * position (or ordinal), version (if the table has it) and fxid.  The role columns
 * position and version are not stored a second time: their values in answers come
 * from the hidden ones.
 *
 * Single-threaded; a reader may be used by one process only.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_CORE_SEGMENT_H
#define ES_CORE_SEGMENT_H

#include "core/batch.h"
#include "core/format.h"
#include "core/wal.h"

#define ES_SEGMENT_MAGIC UINT64_C(0x3130474553545345) /* "ESTSEG01" */
#define ES_PAGE_RAW		 (16 * 1024)

/* EsManifestSegment.flags and header */
#define ES_SEGMENT_PENDING 0x01 /* ordinals instead of positions */

typedef enum EsCodec
{
	ES_CODEC_NONE = 0,
	ES_CODEC_LZ4 = 1,
	ES_CODEC_ZSTD = 2
} EsCodec;

/* ---- writing ---- */

/* Appends len bytes to the file; the writer calls it in order, from offset 0. */
typedef EsStatus (*EsAppendFn)(void *arg, const void *buf, size_t len, EsError *err);

typedef struct EsSegmentSpec
{
	EsFileIdentity		identity;
	uint64_t			id;
	EsTableKey			table;
	EsRoles				roles;
	uint32_t			relid;
	uint32_t			flags;	 /* ES_SEGMENT_PENDING */
	const EsColumnDesc *columns; /* the table's attributes */
	int					ncols;
	bool				has_content_hash;
	EsCodec				codec;		/* of each page that it makes smaller */
	int					zstd_level; /* with LZ4: 0 = LZ4 only, else a page is Zstandard's of this
								 * level where that saves a quarter over LZ4 */
} EsSegmentSpec;

typedef struct EsSegmentRow
{
	const void *const *values;		 /* ncols pointers as for es_batch_add; those of
								 * position and version are ignored */
	const void		  *content_hash; /* 16 bytes or NULL */
	uint64_t		   context_hash;
	uint64_t		   position; /* or ordinal */
	uint64_t		   version;	 /* 0 = none */
	EsFxid			   fxid;
} EsSegmentRow;

typedef struct EsSegmentSummary
{
	uint64_t   file_len;
	uint64_t   nrows;
	uint64_t   ncontexts;
	uint64_t   raw_bytes;
	EsPosition min_position;
	EsPosition max_position;
	EsFxid	   min_fxid;
	EsFxid	   max_fxid;
	uint32_t   footer_crc;
} EsSegmentSummary;

typedef struct EsSegmentWriter EsSegmentWriter;

extern EsStatus
es_segment_writer_create(EsSegmentWriter **w, const EsSegmentSpec *spec, EsAppendFn append, void *arg);
/* Rows must come in sort order; ES_ERR_ARGUMENT otherwise. */
extern EsStatus es_segment_writer_add(EsSegmentWriter *w, const EsSegmentRow *row, EsError *err);
extern EsStatus es_segment_writer_finish(EsSegmentWriter *w, EsSegmentSummary *summary, EsError *err);
extern void		es_segment_writer_free(EsSegmentWriter *w);

/* ---- reading ---- */

/* Reads exactly len bytes at offset; fewer is ES_ERR_TRUNCATED. */
typedef EsStatus (*EsReadFn)(void *arg, void *buf, size_t len, uint64_t offset, EsError *err);

typedef struct EsSegment EsSegment;

/* Reads header, trailer and footer and checks them; pages are read when needed. */
extern EsStatus es_segment_open(EsSegment **seg, EsReadFn read, void *arg, uint64_t file_len, EsError *err);
extern void		es_segment_close(EsSegment *seg);

typedef struct EsSegmentInfo
{
	EsFileIdentity		identity;
	uint64_t			id;
	EsTableKey			table;
	EsRoles				roles;
	uint32_t			relid;
	uint32_t			flags;
	const EsColumnDesc *columns;
	int					ncols; /* the table's attributes */
	bool				has_content_hash;
	uint32_t			nzones;
	EsSegmentSummary	summary;
} EsSegmentInfo;

extern const EsSegmentInfo *es_segment_info(const EsSegment *seg);

/* Heap bytes that the open segment holds (footer, caches). */
extern size_t es_segment_memory(const EsSegment *seg);

/* Bounds the decoded pages that the segment keeps for its next reads (bytes, least
 * recently used goes first; 0 = keep none; 1 MB until it is called). */
extern void es_segment_set_cache(EsSegment *seg, size_t bytes);

typedef struct EsZoneInfo
{
	uint64_t   first_row;
	uint32_t   nrows;
	EsPosition min_position;
	EsPosition max_position;
	EsFxid	   min_fxid;
	EsFxid	   max_fxid;
	uint64_t   first_hash; /* of its first and last row */
	uint64_t   last_hash;
} EsZoneInfo;

extern EsZoneInfo es_segment_zone(const EsSegment *seg, uint32_t zone);

/*
 * Per zone and column (from 0): null count, and min/max as int64 if known.  Those of the
 * role columns position and version are of the hidden columns' values (version 0 is NULL);
 * of a pending segment they say nothing (0 NULLs, no min/max): do not prune by them.
 */
typedef struct EsZoneColumnStats
{
	uint32_t nnulls;
	bool	 has_minmax; /* integers of 1, 2, 4, 8 bytes that are by value */
	int64_t	 min;
	int64_t	 max;
} EsZoneColumnStats;

extern EsZoneColumnStats es_segment_column_stats(const EsSegment *seg, uint32_t zone, int column);

/* Rows of a context; *nrows = 0 if there are none.  index_entry: its number in
 * the context index (for EsManifestAdopt.first_versions). */
extern EsStatus
es_segment_find_context(EsSegment *seg, uint64_t hash, const void *bytes, size_t len, uint64_t *first_row,
						uint64_t *nrows, uint32_t *index_entry, EsError *err);

/* All entries of the context index in order: callback(arg, entry, hash, first_row, nrows). */
extern EsStatus es_segment_walk_contexts(EsSegment *seg,
										 EsStatus (*callback)(void *arg, uint32_t entry, uint64_t hash,
															  uint64_t first_row, uint64_t nrows),
										 void *arg, EsError *err);

/*
 * The same by pages, for who walks several segments side by side: entries of the page with
 * this number (from 0), ES_CONTEXT_PAGE of them but for the last page; *n = 0 behind it.
 */
#define ES_CONTEXT_PAGE 1024

typedef struct EsContextEntry
{
	uint64_t hash;
	uint64_t first_row;
	uint64_t nrows;
} EsContextEntry;

extern EsStatus es_segment_context_page(EsSegment *seg, uint32_t number,
										EsContextEntry entries[ES_CONTEXT_PAGE], uint32_t *n, EsError *err);

/* Canonical bytes of a row's context (core/route.h), valid until the next call for this segment. */
extern EsStatus es_segment_context(EsSegment *seg, uint64_t row, int64_t *scratch, const void **bytes,
								   size_t *len, EsError *err);

/*
 * Reads the wanted columns of rows [first_row, first_row + nrows), which must
 * lie in one zone.  Only pages that hold one of the rows are read and decoded.
 * The block owns what it points to until it is read into again or freed.
 */
typedef struct EsRowBlock EsRowBlock;

#define ES_WANT_POSITION	 0x01 /* es_block_position */
#define ES_WANT_VERSION		 0x02
#define ES_WANT_FXID		 0x04
#define ES_WANT_CONTENT_HASH 0x08

extern EsRowBlock *es_block_create(void);
extern void		   es_block_free(EsRowBlock *b);
/* Lets go of the rows of the last read, and of the pages they lie in; memory is kept for the next. */
extern void	  es_block_clear(EsRowBlock *b);
extern size_t es_block_memory(const EsRowBlock *b);

/* wanted: ncols booleans (NULL = all columns); hidden: ES_WANT_*. */
extern EsStatus es_segment_read(EsSegment *seg, uint64_t first_row, uint32_t nrows, const bool *wanted,
								uint32_t hidden, EsRowBlock *block, EsError *err);

/* Row r counts from the block's first row.  NULL = SQL NULL or not wanted. Values
 * are aligned as es_batch_value's are.  Role columns position and version
 * give NULL here. */
extern const void *es_block_value(const EsRowBlock *b, int column, uint32_t r);
extern uint64_t	   es_block_position(const EsRowBlock *b, uint32_t r);
extern uint64_t	   es_block_version(const EsRowBlock *b, uint32_t r); /* 0 = none */
extern EsFxid	   es_block_fxid(const EsRowBlock *b, uint32_t r);
extern const void *es_block_content_hash(const EsRowBlock *b, uint32_t r);

/*
 * Reads and checks every page, in steps of some milliseconds; calls report for each damage found and
 * goes on.  es_verifier_step: false = that was the last one; seg is the same segment each time, but
 * may have been closed and opened again.  es_verifier_free: status of the first damage.
 */
typedef struct EsVerifier EsVerifier;

extern EsVerifier *es_verifier_create(void (*report)(void *arg, const EsError *err), void *arg);
extern bool		   es_verifier_step(EsVerifier *v, EsSegment *seg);
extern EsStatus	   es_verifier_free(EsVerifier *v);

/* All of it at once. */
extern EsStatus es_segment_verify(EsSegment *seg, void (*report)(void *arg, const EsError *err), void *arg);

#endif /* ES_CORE_SEGMENT_H */
