/*-------------------------------------------------------------------------
 *
 * manifest.h
 *	  Which segment files live, what they hold, and how far the shard's own
 *	  WAL is contained in them: codec of the records and the state they build.
 *
 * File "manifest": a record of type ES_MANIFEST_HEAD, then records.  A record is
 * one atomic edit (its parts apply together or not at all): EsManifestRecord,
 * then parts one behind the other.  The CRC covers the record's header with crc = 0,
 * its parts and the CRC of the record before it.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_CORE_MANIFEST_H
#define ES_CORE_MANIFEST_H

#include "core/format.h"
#include "core/wal.h"

#define ES_MANIFEST_MAGIC UINT32_C(0x4e425345) /* "ESBN" */

typedef struct EsManifestRecord
{
	uint32_t magic;
	uint16_t version;
	uint16_t nparts;
	uint32_t len; /* bytes, header included, multiple of 8 */
	uint32_t crc;
} EsManifestRecord;

typedef enum EsManifestPartType
{
	ES_PART_HEAD = 1,	 /* EsManifestHead: first record of a file */
	ES_PART_SEGMENT = 2, /* EsManifestSegment: a flushed or compacted segment */
	ES_PART_PENDING = 3, /* EsManifestPending + uint64 starts[]: a pending segment and the batches in it */
	ES_PART_ADOPT = 4,	 /* EsManifestAdopt + bitmap + uint64 versions[] */
	ES_PART_DROP = 5,	 /* EsManifestDrop: a segment file is no more */
	ES_PART_FLUSHED = 6, /* EsManifestFlushed: how far own WAL is in segments */
	ES_PART_DROP_STORAGE = 7 /* EsTableKey: all segments of a storage are no more */
} EsManifestPartType;

typedef struct EsManifestPart
{
	uint32_t type;
	uint32_t len; /* bytes, this header included, multiple of 8 */
} EsManifestPart;

typedef struct EsManifestHead
{
	EsFileIdentity identity;
	uint64_t	   generation;		/* grows with each rewrite of the file */
	uint64_t	   next_segment_id; /* ids never return */
} EsManifestHead;

/* What the manifest says of a segment; also what readers prune by. */
typedef struct EsManifestSegment
{
	uint64_t   id; /* file "seg.<id, 16 hex digits>" */
	EsTableKey table;
	uint64_t   file_len; /* bytes */
	uint64_t   nrows;
	EsPosition min_position; /* 0 while pending */
	EsPosition max_position;
	EsFxid	   min_fxid;
	EsFxid	   max_fxid;
	uint32_t   footer_crc; /* must match the file's footer */
	uint32_t   flags;	   /* ES_SEGMENT_* of segment.h */
} EsManifestSegment;

typedef struct EsManifestPending
{
	EsManifestSegment segment; /* positions 0; min = max = the transaction's fxid */
	uint32_t		  nstarts; /* batches it holds, in the order of their ordinals */
	uint32_t		  reserved;
} EsManifestPending;

/*
 * A pending segment's transaction committed.  Row's position = base + its
 * ordinal.  A row that is not live (rolled-back savepoint, duplicate event id)
 * has its bit set in the bitmap (by row number in the segment).  first_versions:
 * one per entry of the segment's context index, the version of the context's
 * first live row; absent (0) if the table has no version.
 */
typedef struct EsManifestAdopt
{
	uint64_t   id;
	EsFxid	   fxid;
	EsPosition base;
	EsPosition min_position;
	EsPosition max_position;
	uint64_t   nlive;
	uint32_t   dead_bitmap_len; /* bytes, multiple of 8; 0 = all live */
	uint32_t   nfirst_versions;
	int64_t	   version_base;  /* first versions are kept as what they are more than this, */
	uint32_t   version_width; /* in 0 (all the same), 1, 2, 4 or 8 bytes each */
	uint32_t   reserved;
} EsManifestAdopt;

typedef struct EsManifestDrop
{
	uint64_t id;
} EsManifestDrop;

typedef struct EsManifestFlushed
{
	EsOwnLsn up_to; /* FINISH frames that end at or before this are in segments
								 * or were carried over behind it */
} EsManifestFlushed;

_Static_assert(sizeof(EsManifestSegment) == 80, "on disk");
_Static_assert(sizeof(EsManifestAdopt) == 72, "on disk");

/* ---- building a record ---- */

typedef struct EsManifestEdit EsManifestEdit;

extern EsManifestEdit *es_manifest_edit_create(void);
extern void			   es_manifest_edit_free(EsManifestEdit *e);
extern EsStatus		   es_manifest_edit_segment(EsManifestEdit *e, const EsManifestSegment *s);
extern EsStatus
es_manifest_edit_pending(EsManifestEdit *e, const EsManifestPending *p, const uint64_t *starts);
extern EsStatus es_manifest_edit_adopt(EsManifestEdit *e, const EsManifestAdopt *a,
									   const uint8_t *dead_bitmap, const uint8_t *first_versions);
extern EsStatus es_manifest_edit_drop(EsManifestEdit *e, uint64_t id);
extern EsStatus es_manifest_edit_flushed(EsManifestEdit *e, EsOwnLsn up_to);
extern EsStatus es_manifest_edit_drop_storage(EsManifestEdit *e, const EsTableKey *table);

/* The finished record, owned by the edit; *crc chains to the next. */
extern EsStatus es_manifest_edit_record(EsManifestEdit *e, uint32_t prev_crc, const void **record,
										size_t *len, uint32_t *crc);

/* ---- the state that records build ---- */

typedef struct EsManifestEntry
{
	EsManifestSegment segment;
	bool			  pending; /* not adopted: belongs to segment.min_fxid */
	bool			  adopted; /* was pending once: base etc. below count */
	EsPosition		  base;
	uint64_t		  nlive;
	uint8_t			 *dead_bitmap;	  /* NULL = all live */
	uint8_t			 *first_versions; /* packed: es_manifest_first_version; NULL = none */
	uint32_t		  nfirst_versions;
	uint32_t		  version_width;
	int64_t			  version_base;
	uint64_t		 *starts; /* batches of a pending segment; kept when it is adopted, for a
								 * recovery that sees its FINISH again */
	uint32_t		  nstarts;
} EsManifestEntry;

typedef struct EsManifestState
{
	EsManifestHead	 head;
	EsOwnLsn		 flushed_up_to;
	EsManifestEntry *entries; /* live segments, ascending id */
	uint32_t		 nentries;
	uint32_t		 allocated;
	bool			 slim; /* see es_manifest_state_slim */
} EsManifestState;

extern void es_manifest_state_init(EsManifestState *state);
extern void es_manifest_state_free(EsManifestState *state);

/*
 * Frees what is only needed to use or to rewrite the entries: batches, bitmaps, first versions.
 * What remains still checks and takes records, and cannot be rewritten.
 */
extern void es_manifest_state_slim(EsManifestState *state);

/* Applies a record's parts (checked); ES_ERR_CORRUPT if they do not fit the state. */
extern EsStatus es_manifest_apply(EsManifestState *state, const void *record, size_t len, EsError *err);

/*
 * Reads a whole manifest file image.  durable_len is what the control block
 * knows to be synced: a bad record before it is ES_ERR_CORRUPT, behind it the
 * end of the log.  *valid_len and *last_crc say where appending goes on.
 */
extern EsStatus es_manifest_read(EsManifestState *state, const void *file, size_t len, uint64_t durable_len,
								 uint64_t *valid_len, uint32_t *last_crc, EsError *err);

/*
 * The image of a fresh manifest file that says what state says, with
 * head.generation as set by the caller; malloc'd.
 */
extern EsStatus
es_manifest_rewrite(const EsManifestState *state, void **file, size_t *len, uint32_t *last_crc);

extern EsManifestEntry *es_manifest_find(EsManifestState *state, uint64_t id);

/* ---- first versions ---- */

/*
 * A bulk load may begin in millions of contexts, most of them at versions close to each
 * other: they take a byte or two, on disk and in memory.
 */

/* Bytes of the packed array, a multiple of 8 and never 0. */
static inline size_t
es_manifest_versions_len(uint32_t n, uint32_t width)
{
	return n == 0 ? 0 : width == 0 ? 8 : ((size_t) n * width + 7) & ~(size_t) 7;
}

static inline int64_t
es_manifest_first_version(const EsManifestEntry *entry, uint32_t i)
{
	const uint8_t *at = entry->first_versions + (size_t) i * entry->version_width;

	switch (entry->version_width)
	{
		case 1:
			return entry->version_base + *at;
		case 2:
			return entry->version_base + *(const uint16_t *) at;
		case 4:
			return entry->version_base + *(const uint32_t *) at;
		case 8:
			return (int64_t) ((uint64_t) entry->version_base + *(const uint64_t *) at);
		default:
			return entry->version_base;
	}
}

/* Puts them into the entry, which has none so far. */
extern EsStatus es_manifest_pack_versions(EsManifestEntry *entry, const int64_t *versions, uint32_t n);

#endif /* ES_CORE_MANIFEST_H */
