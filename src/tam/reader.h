/*-------------------------------------------------------------------------
 *
 * reader.h
 *	  Reading events from the shards: what table scans, replay and read_all stand on.
 *
 * A reader opens a scan in one shard (a context is given) or in all of them, takes
 * columnar answers with one ahead per shard, and gives out row after row: shard by
 * shard, or merged by position.  Values point into the current answer and are valid
 * until the next call.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_TAM_READER_H
#define ES_TAM_READER_H

#include "postgres.h"

#include "executor/tuptable.h"
#include "utils/relcache.h"
#include "utils/snapshot.h"

#include "ipc/protocol.h"
#include "tam/dead.h"
#include "tam/tam.h"

typedef struct EsReaderSpec
{
	EsScanOrder order;
	uint16		flags;	/* ES_OPEN_NO_OWN, ES_OPEN_COUNT_ONLY */
	const bool *wanted; /* natts, NULL = all columns */
	EsPosition	after;
	EsPosition	below;	  /* 0 = no bound */
	uint64		max_rows; /* 0 = all; per reader */
	bool		has_context;
	uint64		context_hash;
	const void *context; /* canonical bytes */
	uint32		context_len;
	uint32		nfilters;
	const void *filters; /* EsFilter one behind the other */
	uint32		filters_len;
	uint64		batch_bytes; /* 0 = default */
	int			only_shard;	 /* -1 = all, or the context's */
} EsReaderSpec;

extern void es_reader_spec_init(EsReaderSpec *spec);

typedef struct EsReader EsReader;

/*
 * Sends the transaction's own pending rows of the table first; takes the predicate lock
 * under SERIALIZABLE.  The snapshot must be MVCC; others are replaced by the latest.
 * Allocated in the current memory context, which must outlive it.  Under pg_upgrade it finds no rows, and
 * needs neither metapage nor shards: the files are transferred behind all that is done in SQL.
 */
extern EsReader *es_reader_begin(Relation rel, Snapshot snapshot, const EsReaderSpec *spec);

/* The same with dead batches of the own transaction given (parallel-aware scans). */
extern EsReader *
es_reader_begin_with(Relation rel, Snapshot snapshot, const EsReaderSpec *spec, const EsDeadStarts *dead);

/* Next row into a virtual slot (all columns; columns not wanted are NULL), tts_tid set. */
extern bool es_reader_next(EsReader *r, TupleTableSlot *slot);

/* Advances without a slot: for counting; *position is 0 for an own uncommitted row. */
extern bool es_reader_skip(EsReader *r, EsPosition *position);

/* Of the row that next gave: position (0 = own, not committed) and version (0 = none). */
extern EsPosition es_reader_position(const EsReader *r);
extern int64	  es_reader_version(const EsReader *r);

/* How many rows it has given so far. */
extern uint64 es_reader_given_out(const EsReader *r);

/* Under SERIALIZABLE it may throw, as es_reader_next: what was skipped is looked at here at the latest. */
extern void es_reader_end(EsReader *r);

/* Full xids of a snapshot (palloc'd xip, ascending). */
extern void es_snapshot_fill(Snapshot snapshot, EsSnapshot *result);

#endif /* ES_TAM_READER_H */
