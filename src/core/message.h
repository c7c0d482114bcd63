/*-------------------------------------------------------------------------
 *
 * message.h
 *	  What event_store writes into PostgreSQL's WAL: the payload of logical
 *	  messages, and the FINISH section that the queue and a shard's own WAL
 *	  carry as well.
 *
 * A message is one logical WAL record of at most ES_MESSAGE_MAX_RECORD bytes,
 * or several ("pieces") when its payload is longer.  A message is known by
 * the start LSN of its first piece.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_CORE_MESSAGE_H
#define ES_CORE_MESSAGE_H

#include "core/format.h"
#include "core/batch.h"

/* Prefix of the record with its embedded NULs: SQL cannot write it. */
#define ES_MESSAGE_PREFIX	  "event_store\0\1\0"
#define ES_MESSAGE_PREFIX_LEN 14

#define ES_MESSAGE_MAGIC UINT32_C(0x4d425345) /* "ESBM" */
#define ES_MESSAGE_MAX_RECORD \
	(256 * 1024)					/* payload bytes of one record,
												 * EsMessageHeader included */
#define ES_MESSAGE_COMPRESS_MIN 512 /* payloads below are stored as they are */

typedef enum EsMessageKind
{
	ES_MESSAGE_BATCH = 1,
	ES_MESSAGE_FINISH = 2,
	ES_MESSAGE_RESERVE = 3, /* payload: EsReserve */
	ES_MESSAGE_MARK = 4		/* no payload */
} EsMessageKind;

#define ES_MESSAGE_LZ4 0x01 /* the joined payload is one LZ4 block */

#define ES_SHARD_NONE 0xffff

typedef struct EsMessageHeader
{
	uint32_t magic;
	uint16_t version; /* ES_FORMAT_VERSION */
	uint8_t	 kind;
	uint8_t	 flags;
	uint8_t	 store_uuid[ES_UUID_LEN];
	EsFxid	 fxid;		  /* top-level; 0 for RESERVE and MARK */
	EsLsn	 first_start; /* in pieces after the first: start of the first */
	uint32_t raw_len;	  /* of the joined payload, uncompressed */
	uint32_t stored_len;  /* of the joined payload, as stored */
	uint32_t piece;		  /* from 0 */
	uint32_t npieces;	  /* in the last piece: how many there are; else 0 */
	uint32_t piece_len;	  /* payload bytes in this record */
	uint16_t shard;		  /* BATCH: its shard; else ES_SHARD_NONE */
	uint16_t reserved;
	uint32_t crc; /* of this header with crc = 0, then the piece */
	uint32_t reserved2;
} EsMessageHeader;

_Static_assert(sizeof(EsMessageHeader) == 72, "EsMessageHeader is on disk");

typedef struct EsReserve
{
	EsPosition below; /* positions below this may be in use */
} EsReserve;

/*
 * Plans a message: decides about compression.  The payload is given as up to
 * `nparts` parts that are joined (so that callers need not copy).  Then
 * es_message_piece fills out the record of piece i (header + bytes, at most
 * ES_MESSAGE_MAX_RECORD) into buf and returns its length through *len;
 * first_start is 0 for piece 0.  The parts' bytes stay the caller's and must
 * stay in place until es_message_end.  One thread only: the writer ended last is
 * kept for the next message.
 */
typedef struct EsMessageWriter EsMessageWriter;
typedef struct EsPart
{
	const void *data;
	size_t		len;
} EsPart;

extern EsStatus es_message_begin(EsMessageWriter **w, EsMessageKind kind, const uint8_t uuid[ES_UUID_LEN],
								 EsFxid fxid, uint16_t shard, const EsPart *parts, int nparts);
extern uint32_t es_message_npieces(const EsMessageWriter *w);
extern EsStatus
			es_message_piece(EsMessageWriter *w, uint32_t piece, EsLsn first_start, void *buf, size_t *len);
extern void es_message_end(EsMessageWriter *w);

/*
 * Checks one record's payload (after the prefix): magic, version, lengths, CRC.
 * *header and *piece point into buf, which must be 8-byte aligned: behind its
 * prefix a record's payload is not, so the reader of PostgreSQL's WAL copies it.
 */
extern EsStatus es_message_check(const void *buf, size_t len, const EsMessageHeader **header,
								 const void **piece, EsError *err);

/*
 * Joins pieces: feed the checked pieces of one message in order; when the last
 * one came, *payload (malloc'd, 8-byte aligned, to be freed by the caller) and
 * *payload_len are set, else *payload is NULL.  One assembler per message.
 */
typedef struct EsMessageAssembler EsMessageAssembler;

extern EsMessageAssembler *es_assembler_create(void);
extern void				   es_assembler_free(EsMessageAssembler *a);
extern EsStatus es_assembler_add(EsMessageAssembler *a, const EsMessageHeader *header, const void *piece,
								 void **payload, size_t *payload_len, EsError *err);

/*
 * ---- FINISH ----
 *
 * EsFinishHeader, then nsections sections.  A section is all that one shard
 * needs: EsSectionHeader and ntables tables.  A table is EsFinishTable, then
 * uint64 batch_starts[nlogged], then the inline batches (each 8-byte aligned,
 * as core/batch.h), then the bitmap of rows not taken (bit r set = row r is not
 * taken, r counting the rows of the live batches in order; padded to 8 bytes;
 * present if flag), then EsFirstVersion[nversions].
 *
 * Batches of a table stand in the order of their ordinals: the logged ones
 * first, then the inline ones.
 * A row's position is base + ordinal, or, with ES_FINISH_GIVEN_POSITIONS, its
 * own position column where that is not NULL.  With ES_FINISH_GIVEN_VERSIONS its
 * version is what the version column says (a restore) where that is not NULL, else
 * the next of its context in the order of ordinals, after all given ones.
 */
typedef struct EsFinishHeader
{
	EsPosition base;
	uint64_t   npositions; /* positions reserved from base */
	uint32_t   nsections;
	uint32_t   reserved;
} EsFinishHeader;

typedef struct EsSectionHeader
{
	uint32_t   len; /* bytes, this header included, multiple of 8 */
	uint16_t   shard;
	uint16_t   ntables;
	EsPosition base; /* repeated: a section stands alone in own WAL */
	uint64_t   npositions;
} EsSectionHeader;

#define ES_FINISH_GIVEN_POSITIONS 0x01
#define ES_FINISH_GIVEN_VERSIONS  0x02
#define ES_FINISH_NOT_TAKEN		  0x04 /* the bitmap is there */

typedef struct EsFinishTable
{
	EsTableKey table;
	uint32_t   len; /* bytes, this header included, multiple of 8 */
	uint32_t   relid;
	uint32_t   nlogged;	  /* live batches logged before */
	uint32_t   ninline;	  /* batches that follow here */
	uint64_t   nrows;	  /* of all live batches, taken or not */
	uint32_t   nversions; /* EsFirstVersion entries, at most ES_FINISH_MAX_VERSIONS */
	uint32_t   flags;	  /* ES_FINISH_* */
} EsFinishTable;

#define ES_FINISH_MAX_VERSIONS 1000

typedef struct EsFirstVersion
{
	uint64_t context_hash;
	int64_t	 first_version; /* of the transaction's first row of the context */
} EsFirstVersion;

_Static_assert(sizeof(EsFinishHeader) == 24, "on disk");
_Static_assert(sizeof(EsSectionHeader) == 24, "on disk");
_Static_assert(sizeof(EsFinishTable) == 48, "on disk");

/* Checks a section (or the whole FINISH payload) to its last byte, inline batches
 * included (es_batch_open). */
extern EsStatus es_section_check(const void *buf, size_t len, EsError *err);
extern EsStatus es_finish_check(const void *buf, size_t len, EsError *err);

/* The section of a shard in a checked FINISH payload; NULL = none. */
extern const EsSectionHeader *es_finish_section(const void *finish, uint16_t shard);

/* Iteration over a checked section's tables. */
typedef struct EsFinishTableView
{
	const EsFinishTable	 *table;
	const uint64_t		 *batch_starts;	  /* nlogged */
	const char			 *inline_batches; /* first one; the next total_len behind */
	const uint8_t		 *not_taken;	  /* NULL = all taken */
	const EsFirstVersion *versions;		  /* nversions */
} EsFinishTableView;

extern const EsFinishTable *es_section_first(const EsSectionHeader *section);
extern const EsFinishTable *es_section_next(const EsSectionHeader *section, const EsFinishTable *table);
extern void					es_finish_table_view(const EsFinishTable *table, EsFinishTableView *view);

/* Writing: a growing buffer; es_finish_* return ES_ERR_NOMEM or ES_ERR_TOO_LARGE. */
typedef struct EsFinishBuilder EsFinishBuilder;

extern EsFinishBuilder *es_finish_create(void);
extern void				es_finish_free(EsFinishBuilder *f);
extern void				es_finish_reset(EsFinishBuilder *f, EsPosition base, uint64_t npositions);
extern EsStatus			es_finish_begin_section(EsFinishBuilder *f, uint16_t shard);
extern EsStatus
es_finish_add_table(EsFinishBuilder *f, const EsTableKey *table, uint32_t relid, uint32_t flags,
					uint64_t nrows, const uint64_t *batch_starts, uint32_t nlogged,
					const EsPart *inline_batches, uint32_t ninline, const uint8_t *not_taken,
					const EsFirstVersion *versions, uint32_t nversions);
extern EsStatus es_finish_end(EsFinishBuilder *f, const void **payload, size_t *len);

#endif /* ES_CORE_MESSAGE_H */
