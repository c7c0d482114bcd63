/*-------------------------------------------------------------------------
 *
 * batch.h
 *	  The row batch: rows of one table, one shard and one subtransaction, as
 *	  column vectors.  It is the unit everywhere: what crosses a queue is what
 *	  both WALs store, what the MemTable keeps and what a scan answers.
 *
 * Layout (all offsets from the start of the batch, which is 8-byte aligned):
 *
 *	 EsBatchHeader
 *	 EsBatchColumn[ncols]			directory
 *	 per-row arrays that are present: ordinal deltas uint32[nrows], command ids
 *	 uint32[nrows], positions uint64[nrows], versions uint64[nrows]
 *	 per column: null bitmap (bit set = NULL; present only if some are NULL),
 *	 then the data:
 *		 fixed width:	nrows values of `len` bytes, each aligned to `align`
 *						(es_column_stride apart; NULLs take their place, zeroed)
 *		 varlena:		uint32 offsets[nrows] relative to the column's data
 *						start, then the values, each with its header (1-byte
 *						header unaligned, 4-byte header aligned to `align`)
 *	 A column that is NULL in all rows has no data at all.
 *
 * A reader may point Datums straight into a batch: values are aligned as their
 * types want provided that the batch is 8-byte aligned.
 *
 * Columns are the table's attributes 1..natts in order.  A projected batch
 * (scan answer) leaves the columns that were not asked for out by the flag
 * ES_BATCH_COLUMN_ABSENT.  A table with event_id has one hidden column more at
 * the end (ES_BATCH_HAS_CONTENT_HASH): 16 fixed bytes, the content hash.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_CORE_BATCH_H
#define ES_CORE_BATCH_H

#include "core/format.h"

#define ES_BATCH_MAGIC	   UINT32_C(0x31425345) /* "ESB1" */
#define ES_BATCH_MAX_ROWS  (1 << 20)
#define ES_BATCH_MAX_BYTES (UINT32_C(0x7fffffff))

/* EsBatchHeader.flags */
#define ES_BATCH_HAS_CONTENT_HASH 0x0001
#define ES_BATCH_GIVEN_POSITIONS  0x0002 /* every row's position column is given (restore) */
#define ES_BATCH_GIVEN_VERSIONS	  0x0004 /* some row's version column is not NULL */
#define ES_BATCH_HAS_EVENT_IDS	  0x0008 /* some row's event_id is not NULL */
#define ES_BATCH_OWN_ROWS \
	0x0010 /* in an answer: rows of the reader's own
											 * transaction; positions[] holds ordinals */

/* EsBatchColumn.flags */
#define ES_BATCH_COLUMN_ABSENT	 0x01
#define ES_BATCH_COLUMN_ALL_NULL 0x02

typedef struct EsBatchHeader
{
	uint32_t   magic;
	uint32_t   total_len; /* bytes, header included, multiple of 8 */
	uint32_t   nrows;
	uint16_t   ncols; /* directory entries, hidden column included */
	uint16_t   flags;
	EsTableKey table;
	EsRoles	   roles;
	uint32_t   relid;		  /* OID of the table, for messages and waiters */
	uint32_t   subid;		  /* SubTransactionId of the rows */
	uint32_t   cid;			  /* command id of all rows if off_cids is 0 */
	uint64_t   first_ordinal; /* place in the transaction, from 0 */
	uint32_t   off_ordinals;  /* uint32 deltas to first_ordinal; 0 = row i has first_ordinal + i */
	uint32_t   off_cids;	  /* 0 = all cid */
	uint32_t   off_positions; /* uint64; only in answers */
	uint32_t   off_versions;  /* uint64, 0 = unknown; only in answers */
	uint64_t   reserved;
} EsBatchHeader;

_Static_assert(sizeof(EsBatchHeader) == 88, "EsBatchHeader is on disk");

typedef struct EsBatchColumn
{
	EsColumnDesc desc;
	uint32_t	 flags;		/* ES_BATCH_COLUMN_* */
	uint32_t	 off_nulls; /* 0 = no NULLs */
	uint32_t	 off_data;	/* 0 with ABSENT or ALL_NULL */
	uint32_t	 data_len;	/* bytes from off_data, offsets array included */
	uint32_t	 reserved;
} EsBatchColumn;

_Static_assert(sizeof(EsBatchColumn) == 24, "EsBatchColumn is on disk");

/* ---- reading ---- */

typedef struct EsBatchView
{
	const EsBatchHeader *header;
	const EsBatchColumn *columns;
	const char			*base;
	const uint32_t		*ordinals;	/* NULL = consecutive */
	const uint32_t		*cids;		/* NULL = header->cid */
	const uint64_t		*positions; /* NULL = none */
	const uint64_t		*versions;	/* NULL = none */
} EsBatchView;

/*
 * Checks all of the batch's structure, every varlena included, so that the
 * accessors below need no checks.  buf must be 8-byte aligned and stays
 * owned by the caller; len may be larger than the batch.
 */
extern EsStatus es_batch_open(const void *buf, size_t len, EsBatchView *view, EsError *err);

/* The same for a batch that was checked before (MemTable): no walk over the values. */
extern void es_batch_open_trusted(const void *buf, EsBatchView *view);

static inline uint64_t
es_batch_ordinal(const EsBatchView *v, uint32_t row)
{
	return v->header->first_ordinal + (v->ordinals ? v->ordinals[row] : row);
}

static inline uint32_t
es_batch_cid(const EsBatchView *v, uint32_t row)
{
	return v->cids ? v->cids[row] : v->header->cid;
}

/* Columns of the table, without the hidden one. */
static inline int
es_batch_table_columns(const EsBatchView *v)
{
	return v->header->ncols - ((v->header->flags & ES_BATCH_HAS_CONTENT_HASH) ? 1 : 0);
}

/* Have both the same roles and the same columns but for the hidden one, dropped ones in the same places? */
extern bool es_batch_same_shape(const EsBatchView *a, const EsBatchView *b);

/* true also for absent and all-null columns and for columns beyond ncols (col counts from 0) */
static inline bool
es_batch_is_null(const EsBatchView *v, int col, uint32_t row)
{
	const EsBatchColumn *c;

	if (col >= v->header->ncols)
		return true;
	c = &v->columns[col];
	if (c->flags & (ES_BATCH_COLUMN_ABSENT | ES_BATCH_COLUMN_ALL_NULL))
		return true;
	if (c->off_nulls == 0)
		return false;
	return (((const uint8_t *) v->base)[c->off_nulls + (row >> 3)] >> (row & 7)) & 1;
}

/* Pointer to the value; only if it is not NULL. */
static inline const void *
es_batch_value(const EsBatchView *v, int col, uint32_t row)
{
	const EsBatchColumn *c = &v->columns[col];
	const char			*data = v->base + c->off_data;

	if (c->desc.len > 0)
		return data + (size_t) row * es_column_stride(&c->desc);
	return data + ((const uint32_t *) data)[row];
}

/* A call of a function that only prefetches is removed by GCC as one without effect, unless it is inlined early. */
#define ES_PREFETCHING __attribute__((always_inline))

/*
 * Asks for the cache line that says where a value is, and a moment later for those of the value, so
 * that reading rows which lie far from each other does not wait for memory one by one.
 */
static inline ES_PREFETCHING void
es_batch_prefetch_place(const EsBatchView *v, int col, uint32_t row)
{
	const EsBatchColumn *c = &v->columns[col];

	if (c->off_data != 0)
		__builtin_prefetch(v->base + c->off_data +
						   (size_t) row * (c->desc.len > 0 ? es_column_stride(&c->desc) : sizeof(uint32_t)));
}

static inline ES_PREFETCHING void
es_batch_prefetch_value(const EsBatchView *v, int col, uint32_t row)
{
	const EsBatchColumn *c = &v->columns[col];

	if (c->off_data != 0 && c->desc.len < 0)
	{
		const char *value = es_batch_value(v, col, row);

		__builtin_prefetch(value);
		__builtin_prefetch(value + 64);
		__builtin_prefetch(value + 128);
	}
}

/* Canonical bytes of the row's context (core/route.h); false if it is NULL. */
extern bool
es_batch_context(const EsBatchView *v, uint32_t row, int64_t *scratch, const void **bytes, size_t *len);
extern uint64_t es_batch_context_hash(const EsBatchView *v, uint32_t row);

/* ---- writing ---- */

/*
 * Builds one batch row by row.  Opaque: vectors grow with realloc.  A builder
 * is reused by es_batch_reset.  "wanted" (ncols booleans, NULL = all) names the
 * columns of a projected batch.
 */
typedef struct EsBatchBuilder EsBatchBuilder;

typedef struct EsBatchMeta
{
	EsTableKey table;
	EsRoles	   roles;
	uint32_t   relid;
	uint32_t   subid;
	uint16_t   flags;		   /* initial EsBatchHeader.flags */
	bool	   with_positions; /* keep positions[] and versions[] (answers) */
} EsBatchMeta;

extern EsBatchBuilder *es_batch_create(const EsColumnDesc *columns, int ncols, const bool *wanted);
extern void			   es_batch_free(EsBatchBuilder *b);
extern void			   es_batch_reset(EsBatchBuilder *b, const EsBatchMeta *meta);

/*
 * Adds a row.  values[i] points to the value of column i (for fixed width: len
 * bytes; for varlena: the value with a 1-byte or 4-byte uncompressed header;
 * a 4-byte header of up to 126 bytes of data is stored short), NULL = NULL.
 * Ordinals must grow.  On failure the builder is as before the call.
 */
extern EsStatus es_batch_add(EsBatchBuilder *b, const void *const *values, uint64_t ordinal, uint32_t cid,
							 uint64_t position, uint64_t version);

/* ORs flags into the header of the batch being built. */
extern void es_batch_add_flags(EsBatchBuilder *b, uint16_t flags);

extern uint32_t es_batch_nrows(const EsBatchBuilder *b);

/* Bytes the finished batch will have (exact). */
extern size_t es_batch_size(const EsBatchBuilder *b);

/* Writes the batch into buf of es_batch_size() bytes, 8-byte aligned. */
extern EsStatus es_batch_finish(EsBatchBuilder *b, void *buf, size_t len);

#endif /* ES_CORE_BATCH_H */
