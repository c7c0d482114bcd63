/*-------------------------------------------------------------------------
 *
 * format.h
 *	  Names, limits and small types that every file, message and module of
 *	  event_store shares.  Server-free: plain C11, no PostgreSQL header but
 *	  the CRC and hash functions that the .c files of core/ include.
 *
 * Everything that reaches a disk or a queue is little-endian and is written
 * as the structs below lie in memory on a 64-bit little-endian machine; each
 * on-disk struct has a static assertion on its size.  A change of any of them
 * is a new version constant and a test that reads the old one.
 *
 * Conventions of core/:
 *	 - functions return EsStatus (0 = ES_OK); details go to an optional EsError
 *	   (may be NULL), never to a log;
 *	 - lengths in bytes are size_t or uint32, counts of rows uint32/uint64,
 *	   LSNs are PostgreSQL's XLogRecPtr as uint64 (EsLsn), 0 = none;
 *	 - memory comes from malloc/realloc/free unless a function says that the
 *	   caller gives the buffer; out of memory is ES_ERR_NOMEM, not an abort;
 *	 - input that comes from a disk or a queue is never trusted: every length
 *	   and offset is checked before it is used and before anything of its size
 *	   is allocated.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_CORE_FORMAT_H
#define ES_CORE_FORMAT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "event_store's files are little-endian and this machine is not"
#endif

typedef uint64_t EsLsn;		 /* a position in PostgreSQL's WAL; 0 = none */
typedef uint64_t EsOwnLsn;	 /* a position in a shard's own WAL: file number
								 * in the upper 32 bits, byte offset below */
typedef uint64_t EsFxid;	 /* a full (64 bit) top-level transaction id */
typedef uint64_t EsPosition; /* place in the total order; 1 is the first */

/* Version of everything on disk and in PostgreSQL's WAL. */
#define ES_FORMAT_VERSION 1

#define ES_MAX_SHARDS		16
#define ES_ROUTING_SLOTS	1024
#define ES_MAX_COLUMNS		1600 /* MaxHeapAttributeNumber */
#define ES_MAX_POSITION		((UINT64_C(1) << 47) - 1)
#define ES_POSITION_STEP	(UINT64_C(1) << 20) /* positions per RESERVE */
#define ES_ZONE_ROWS		8192
#define ES_UUID_LEN			16
#define ES_CONTENT_HASH_LEN 16

typedef enum EsStatus
{
	ES_OK = 0,
	ES_ERR_NOMEM,	  /* malloc said no */
	ES_ERR_CORRUPT,	  /* checksum or structure is wrong */
	ES_ERR_VERSION,	  /* made by a newer or foreign format */
	ES_ERR_FOREIGN,	  /* another store, shard or system identifier */
	ES_ERR_TRUNCATED, /* ends before it should: for a reader of a log
								 * the difference to CORRUPT is decided by the
								 * durable end, not by this code */
	ES_ERR_TOO_LARGE, /* a value, row or message beyond its limit */
	ES_ERR_ARGUMENT,  /* the caller broke the contract */
	ES_ERR_IO		  /* a callback of the caller failed */
} EsStatus;

/* What was wrong, where.  offset is in the file or buffer the caller named. */
typedef struct EsError
{
	EsStatus status;
	uint64_t offset;
	uint32_t expected_crc; /* both 0 when no checksum is concerned */
	uint32_t found_crc;
	char	 what[160]; /* English, lower case, no final period */
} EsError;

/* Fills *err (if not NULL) and returns status. */
extern EsStatus es_fail(EsError *err, EsStatus status, uint64_t offset, const char *fmt, ...)
	__attribute__((format(printf, 4, 5)));
extern EsStatus
es_fail_crc(EsError *err, uint64_t offset, uint32_t expected, uint32_t found, const char *what);

/* CRC-32C (Castagnoli) as PostgreSQL computes it; start with crc = 0 to get
 * the CRC of buf alone, or with the result for what came before. */
extern uint32_t es_crc32c(uint32_t crc, const void *buf, size_t len);

/*
 * A storage: what one relfilenode of an event table holds.  Its id comes from
 * the position counter and is kept in the relation's metapage; the database
 * is part of the key, so that a copied database sees empty storages.
 */
typedef struct EsTableKey
{
	uint64_t storage_id;
	uint32_t database; /* OID */
	uint32_t reserved; /* 0 */
} EsTableKey;

_Static_assert(sizeof(EsTableKey) == 16, "EsTableKey is on disk");

static inline bool
es_table_key_equal(const EsTableKey *a, const EsTableKey *b)
{
	return a->storage_id == b->storage_id && a->database == b->database;
}

/* How a context's value becomes bytes and a hash: by class, not by type, so
 * that varchar -> text or int4 -> int8 keep their routing. */
typedef enum EsContextClass
{
	ES_CONTEXT_STRING = 1, /* text, varchar, name: the characters */
	ES_CONTEXT_BYTEA = 2,
	ES_CONTEXT_INTEGER = 3,		/* int2/4/8: as int64, 8 bytes */
	ES_CONTEXT_UUID = 4,		/* 16 bytes */
	ES_CONTEXT_DATE = 5,		/* int32 as int64 */
	ES_CONTEXT_TIMESTAMPTZ = 6, /* int64 */
	ES_CONTEXT_BOOL = 7,		/* as int64 */
	ES_CONTEXT_ENUM = 8			/* OID as int64 */
} EsContextClass;

/*
 * Roles of columns, as attribute numbers from 1; 0 = the table has no such
 * column.  Kept in the metapage and repeated in every batch and segment.
 */
typedef struct EsRoles
{
	int16_t context;
	int16_t position;
	int16_t version;
	int16_t event_id;
	int16_t event_type;
	uint8_t context_class; /* EsContextClass */
	uint8_t reserved;
} EsRoles;

_Static_assert(sizeof(EsRoles) == 12, "EsRoles is on disk");

/* The physical shape of a column, from pg_attribute. */
typedef struct EsColumnDesc
{
	int16_t len;   /* attlen: > 0 fixed width, -1 varlena */
	uint8_t align; /* 1, 2, 4 or 8 */
	uint8_t flags; /* ES_COLUMN_* */
} EsColumnDesc;

#define ES_COLUMN_BYVAL	  0x01
#define ES_COLUMN_DROPPED 0x02 /* all NULL from here on */
#define ES_COLUMN_PLAIN \
	0x04 /* attstorage 'p': values keep their 4-byte header,
									 * for functions of such types (tsquery, int2vector)
									 * do not look for a short one */

_Static_assert(sizeof(EsColumnDesc) == 4, "EsColumnDesc is on disk");

/*
 * Distance in bytes of two fixed-width values in a vector: len rounded up to
 * align, so that each of them is aligned (timetz is 12 bytes wide, aligned to 8).
 */
static inline uint32_t
es_column_stride(const EsColumnDesc *desc)
{
	return ((uint32_t) desc->len + desc->align - 1) & ~((uint32_t) desc->align - 1);
}

/*
 * Lengths of varlena values, read without PostgreSQL's headers.  Values that
 * we keep are never external and never compressed: a 1-byte header (length
 * in the upper 7 bits, lowest bit 1) for up to 126 bytes of data, unaligned,
 * or a 4-byte header (length << 2), aligned as the type wants.
 */
static inline bool
es_varlena_is_short(const void *p)
{
	return (*(const uint8_t *) p & 0x01) != 0;
}

#endif /* ES_CORE_FORMAT_H */
