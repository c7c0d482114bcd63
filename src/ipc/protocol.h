/*-------------------------------------------------------------------------
 *
 * protocol.h
 *	  The typed messages between a backend and a shard.  They never leave the
 *	  machine nor survive the server, so they have no version of their own.
 *
 * All are 8-byte aligned with lengths that are multiples of 8.  A request has
 * an id that its sender chose; answers repeat it.  Requests marked "hint" have no
 * answer and may be lost.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_IPC_PROTOCOL_H
#define ES_IPC_PROTOCOL_H

#include "postgres.h"

#include "core/arith.h"
#include "core/batch.h"
#include "core/format.h"
#include "core/message.h"

typedef enum EsRequestType
{
	ES_REQ_BATCH = 1,	 /* EsBatchRequest, batch; no answer */
	ES_REQ_FINISH,		 /* EsFinishRequest, section; no answer */
	ES_REQ_RESOLVE,		 /* EsResolveRequest; hint */
	ES_REQ_PREPARE,		 /* EsPrepareRequest, section (base 0) */
	ES_REQ_HEAD,		 /* EsHeadRequest, context bytes */
	ES_REQ_OPEN,		 /* EsOpenRequest, variable parts; begins a scan */
	ES_REQ_FETCH,		 /* EsRequest: one more DATA answer may be sent; flags ES_FETCH_STOP */
	ES_REQ_CLOSE,		 /* EsRequest; hint: scan or wait `id` is over */
	ES_REQ_WAIT,		 /* EsWaitRequest, context bytes */
	ES_REQ_FLUSH,		 /* EsFlushRequest */
	ES_REQ_SYNC,		 /* EsRequest */
	ES_REQ_STAT,		 /* EsStatRequest */
	ES_REQ_UNDECIDED,	 /* EsRequest: VACUUM's question */
	ES_REQ_DROP_STORAGE, /* EsDropRequest: storages that are dead for sure */
	ES_REQ_VERIFY,		 /* EsRequest */
	ES_REQ_ECHO			 /* EsRequest, bytes: answered with the same bytes (tests) */
} EsRequestType;

typedef struct EsRequest
{
	uint16 type;
	uint16 flags;
	uint32 reserved;
	uint64 len; /* whole message */
	uint64 id;
} EsRequest;

typedef struct EsBatchRequest
{
	EsRequest req;
	EsFxid	  fxid;
	EsLsn	  start;
	EsLsn	  end;
	/* the batch follows */
} EsBatchRequest;

typedef struct EsFinishRequest
{
	EsRequest req;
	EsFxid	  fxid;
	EsLsn	  start;
	EsLsn	  end;
	/* EsSectionHeader ... follows */
} EsFinishRequest;

typedef struct EsResolveRequest
{
	EsRequest req;
	EsFxid	  fxid;
	EsLsn	  commit_end; /* XactLastCommitEnd; 0 if aborted */
	uint64	  committed;
} EsResolveRequest;

/*
 * PREPARE: check versions and event ids of a transaction's live rows against
 * the committed heads, assign nothing.  Section as in FINISH with base 0: the
 * logged batches by start, the unsent ones inline.
 * Answer (ok): EsPrepareAnswer, per table EsPrepareTable + bitmap (of rows not taken,
 * multiple of 8 bytes, or none) + EsFirstVersion[].
 */
typedef struct EsPrepareRequest
{
	EsRequest req;
	EsFxid	  fxid;
	/* EsSectionHeader ... follows */
} EsPrepareRequest;

typedef struct EsHeadRequest
{
	EsRequest  req;
	EsTableKey table;
	uint64	   hash;
	uint32	   context_len;
	uint32	   has_event_id;
	uint8	   event_id[16];
	/* context bytes follow, padded */
} EsHeadRequest;

/* ---- scans ---- */

typedef enum EsScanOrder
{
	ES_ORDER_ANY = 0,
	ES_ORDER_POSITION,	   /* ascending; own rows last */
	ES_ORDER_POSITION_DESC /* own rows first, latest first */
} EsScanOrder;

#define ES_OPEN_HAS_CONTEXT	   0x0001 /* rows of one context only */
#define ES_OPEN_NO_OWN		   0x0002 /* leave own uncommitted rows out */
#define ES_OPEN_REPORT_SKIPPED 0x0004 /* SERIALIZABLE: list xids of rows skipped */
#define ES_OPEN_COUNT_ONLY	   0x0008 /* batches carry no columns, only rows */

/* Of a FETCH: no more rows are wanted, but the last answer, with the xids of rows skipped so far. */
#define ES_FETCH_STOP 0x0001

typedef enum EsFilterOp
{
	ES_FILTER_EQ = 1,
	ES_FILTER_IN,
	ES_FILTER_LT,
	ES_FILTER_LE,
	ES_FILTER_GT,
	ES_FILTER_GE,
	ES_FILTER_IS_NULL,
	ES_FILTER_NOT_NULL
} EsFilterOp;

typedef enum EsFilterKind
{
	ES_FILTER_BYTES = 1, /* varlena data or fixed-width bytes: EQ and IN only */
	ES_FILTER_INT64 = 2	 /* by-value signed integers, timestamps, dates */
} EsFilterKind;

/* A conjunct; rows for which it is not true are left out.  On the position and version
 * roles it sees the assigned values.  A column that was added after a row was written is NULL to
 * it: no filters on columns with a missing value (atthasmissing).  Values follow: INT64: int64[]; BYTES: per
 * value uint64 length, bytes padded to 8. */
typedef struct EsFilter
{
	uint16 column; /* from 0 */
	uint8  op;
	uint8  kind;
	uint32 nvalues;
	/* bytes, header included, multiple of 8 */
	uint64 len;
} EsFilter;

typedef struct EsOpenRequest
{
	EsRequest  req;
	EsTableKey table;
	uint16	   flags;  /* ES_OPEN_* */
	uint16	   order;  /* EsScanOrder */
	uint32	   credit; /* DATA answers that may be sent at once */
	EsFxid	   xmin;   /* snapshot, widened */
	EsFxid	   xmax;
	EsFxid	   own;
	uint32	   curcid;
	uint32	   nxip;
	uint32	   ndead; /* starts of dead batches of the own transaction */
	uint32	   natts; /* bits in the bitmap of wanted columns */
	uint32	   nfilters;
	uint32	   filters_len;
	EsPosition after;		/* rows with position > after */
	EsPosition below;		/* and position < below; 0 = no bound (own rows then too) */
	uint64	   max_rows;	/* 0 = all */
	uint64	   batch_bytes; /* wanted size of a DATA answer */
	uint64	   context_hash;
	uint32	   context_len;
	uint32	   reserved;
	/* then: EsFxid xip[nxip] ascending; EsLsn dead[ndead] ascending; wanted bitmap padded to 8;
	 * filters; context bytes padded to 8 */
} EsOpenRequest;

typedef struct EsWaitRequest
{
	EsRequest  req;
	EsTableKey table;
	EsPosition after;	 /* wake when a row > after is below the horizon */
	int64	   deadline; /* TimestampTz; PG_INT64_MAX = none */
	uint64	   context_hash;
	uint32	   context_len;
	uint32	   has_context; /* 0 = the whole table */
							/* context bytes padded to 8 */
} EsWaitRequest;

typedef struct EsFlushRequest
{
	EsRequest  req;
	EsTableKey table; /* storage_id 0 = all */
} EsFlushRequest;

typedef enum EsStatKind
{
	ES_STAT_TABLE = 1, /* one table: EsTableStat */
	ES_STAT_TABLES,	   /* all: EsTableStat[] */
	ES_STAT_SEGMENTS,  /* EsSegmentStat[] */
	ES_STAT_STORAGES   /* EsTableKey[] */
} EsStatKind;

typedef struct EsStatRequest
{
	EsRequest  req;
	EsTableKey table;
	uint64	   kind;
} EsStatRequest;

typedef struct EsDropRequest
{
	EsRequest  req;
	uint64	   nkeys;
	EsTableKey keys[FLEXIBLE_ARRAY_MEMBER];
} EsDropRequest;

/* ---- answers ---- */

#define ES_ANSWER_LAST	  0x0001 /* no more answers to this id */
#define ES_ANSWER_REFUSED 0x0002 /* to PREPARE: it is an EsRefusal */

typedef struct EsAnswer
{
	uint16 type; /* of the request */
	uint16 flags;
	int32  sqlerrcode; /* 0 = ok; else the body is message, detail, hint: three
								 * NUL-terminated strings, empty = none */
	uint64 len;		   /* whole message */
	uint64 id;
} EsAnswer;

typedef struct EsPrepareAnswer
{
	EsAnswer answer;
	uint64	 ntables;
} EsPrepareAnswer;

typedef struct EsPrepareTable
{
	EsTableKey table;
	uint64	   len;		   /* bytes, header included, multiple of 8 */
	uint64	   nrows;	   /* live rows of the table in this shard */
	uint64	   nskipped;   /* of them not taken */
	uint32	   bitmap_len; /* 0 = all taken */
	uint32	   nversions;
} EsPrepareTable;

/*
 * PREPARE refuses an event.  The backend makes an error of it, since a shard can name neither the table nor
 * a context whose type needs a catalog or a session's settings.
 */
typedef struct EsRefusal
{
	EsAnswer   answer;
	int32	   sqlerrcode;
	uint32	   context_class; /* EsContextClass */
	EsTableKey table;
	uint64	   context_len;	 /* of the context; */
	uint64	   context_sent; /* of it, what is here */
	/* context_sent bytes padded to 8, then message, detail, hint: NUL-terminated, the latter two may be empty;
	 * ES_REFUSAL_CONTEXT stands in the message for the context */
} EsRefusal;

#define ES_REFUSAL_CONTEXT "\001"

typedef struct EsHeadAnswer
{
	EsAnswer   answer;
	int64	   version;		/* last committed version of the context; 0 = none */
	EsPosition position;	/* its position */
	EsFxid	   fxid;		/* who wrote it; 0 = older than any snapshot */
	uint64	   event_found; /* the event id is there: */
	int64	   event_version;
	EsPosition event_position;
	EsFxid	   event_fxid;
	uint8	   event_content[16]; /* its content hash */
} EsHeadAnswer;

/* DATA: answers to OPEN and FETCH.  nrows may be 0.  The batch is projected
 * (core/batch.h) and has positions[] and versions[].  The last one has
 * ES_ANSWER_LAST and nskipped xids behind the batch. */
typedef struct EsDataAnswer
{
	EsAnswer answer;
	uint64	 nrows;
	uint64	 batch_len; /* 0 = no batch */
	uint64	 nskipped;
	uint64	 rows_scanned; /* since the scan began: looked at, */
	uint64	 rows_pruned;  /* and left out without looking */
						   /* batch, then EsFxid skipped[] */
} EsDataAnswer;

typedef struct EsWaitAnswer
{
	EsAnswer answer;
	uint64	 found; /* 0 = deadline passed */
} EsWaitAnswer;

typedef struct EsUndecidedAnswer
{
	EsAnswer answer;
	EsFxid	 oldest; /* oldest fxid without durable verdict; all below it that
								 * wrote events are settled in the shard's files */
} EsUndecidedAnswer;

typedef struct EsTableStat
{
	EsTableKey table;
	uint32	   relid; /* as last seen in a batch */
	uint32	   reserved;
	uint64	   segments;
	uint64	   segment_rows;
	uint64	   segment_bytes;
	uint64	   memtable_rows;
	uint64	   memtable_bytes;
	uint64	   staged_rows;
	uint64	   pending_rows;
	EsPosition min_position;
	EsPosition max_position;
	uint64	   raw_bytes; /* of the segments, uncompressed */
} EsTableStat;

typedef struct EsSegmentStat
{
	EsTableKey table;
	uint32	   relid;
	uint32	   flags; /* ES_SEGMENT_* of the manifest; 0x100 = adopted in place */
	uint64	   id;
	uint64	   nrows;
	uint64	   bytes;
	uint64	   raw_bytes;
	uint64	   contexts;
	EsPosition min_position;
	EsPosition max_position;
	uint32	   zones;
	uint32	   reserved;
} EsSegmentStat;

/* VERIFY: zero or more answers with one EsVerifyAnswer + text; then LAST. */
typedef struct EsVerifyAnswer
{
	EsAnswer answer;
	uint64	 offset;
	uint32	 expected_crc;
	uint32	 found_crc;
	/* two NUL-terminated strings: file, what */
} EsVerifyAnswer;

#endif /* ES_IPC_PROTOCOL_H */
