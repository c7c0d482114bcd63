/*-------------------------------------------------------------------------
 *
 * prepare.h
 *	  What prepare.c and prepare_rows.c share.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_PREPARE_H
#define ES_SHARD_PREPARE_H

#include "postgres.h"

#include "shard/heads.h"
#include "shard/task.h"

/* A row of the transaction, as the checks see it. */
typedef struct EsPrepareRow
{
	uint64		 number; /* among the table's rows in live batches, in order */
	const void	*bytes;	 /* its context */
	Size		 len;
	int64		 version;  /* given; 0 = NULL */
	const uint8 *event_id; /* NULL = none */
	const uint8 *content;  /* NULL = none */
} EsPrepareRow;

/* All rows of the transaction whose contexts have one hash. */
typedef struct EsPrepareGroup
{
	uint64		   hash;
	EsContextClass klass;
	EsPrepareRow  *rows;
	uint64		   nrows;
	uint64		   allocated;
	MemoryContext  context; /* of what rows point to, if it was copied */
} EsPrepareGroup;

/* ---- prepare_rows.c: rows of a table, by hash ---- */

typedef struct EsPrepareSource EsPrepareSource;

/* A live batch in memory: staged, or inline in the request. */
typedef struct EsPrepareBatch
{
	EsBatchView view;
	EsMemBatch *staged; /* with a reference; NULL = inline */
	EsLsn		start;	/* of a logged one */
	uint64		nrows;
	uint64		first_number;
	bool		pending; /* its rows are in pending segments */
} EsPrepareBatch;

/*
 * Takes the live batches of the table in order: in memory, or in pending segments of txn.
 * false: one is missing.
 */
extern EsPrepareSource *es_prepare_source(EsTxn *txn, const EsFinishTableView *view, MemoryContext context);
extern EsLsn
es_prepare_missing(const EsPrepareSource *source); /* start of a batch that is missing, 0 = none */
extern void es_prepare_source_free(EsPrepareSource *source);

/*
 * Has any row a given version or an event id?  DONE: *found says so, or *failed: damage.  MORE: time is
 * up, call again.
 */
extern EsTaskState es_prepare_find_checks(EsPrepareSource *source, int64 deadline, bool *found,
										  EsDamage *damage, bool *failed);

/* Roles of the table, once that is known; all 0 if there are no rows. */
extern const EsRoles *es_prepare_roles(const EsPrepareSource *source);

/*
 * Gathers the rows with the next hash into group.  MORE: time is up, call again; DONE with
 * group->nrows = 0: no more, or *failed: damage.
 */
extern EsTaskState es_prepare_next_group(EsPrepareSource *source, int64 deadline, EsPrepareGroup *group,
										 EsDamage *damage, bool *failed);

#endif /* ES_SHARD_PREPARE_H */
