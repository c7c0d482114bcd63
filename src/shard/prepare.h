/*-------------------------------------------------------------------------
 *
 * prepare.h
 *	  What prepare.c, prepare_rows.c and prepare_check.c share.
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
	EsPosition	 position; /* given; 0 = NULL */
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
extern EsTaskState
es_prepare_find_checks(EsPrepareSource *source, int64 deadline, bool *found, EsDamage *damage, bool *failed);

/* Roles of the table, once that is known; all 0 if there are no rows. */
extern const EsRoles *es_prepare_roles(const EsPrepareSource *source);

/*
 * Gathers the rows with the next hash into group.  MORE: time is up, call again; DONE with
 * group->nrows = 0: no more, or *failed: damage.
 */
extern EsTaskState es_prepare_next_group(EsPrepareSource *source, int64 deadline, EsPrepareGroup *group,
										 EsDamage *damage, bool *failed);

/* ---- prepare_check.c: one context ---- */

typedef enum EsPrepareStage
{
	ES_CHECK_GROUP = 0, /* a group begins */
	ES_CHECK_CONTEXT,	/* a context of it begins */
	ES_CHECK_IDS,		/* its event ids are gathered */
	ES_CHECK_ROWS
} EsPrepareStage;

/* The context at work. */
typedef struct EsPrepareContext
{
	EsPrepareStage		stage;
	uint64				begin; /* rows of the group */
	uint64				end;
	uint64				at;
	bool				versioned;	   /* the table has versions */
	bool				notes_version; /* the first version goes into the answer */
	EsHead				head;
	int64				next_version;
	EsPosition			last_position; /* of the restored row before */
	struct EsRestored  *restored; /* rows with their versions to be checked together; NULL = one by one */
	uint64				nrestored;
	struct EsPrepareId *ids;	  /* distinct event ids; */
	const uint8		  **distinct; /* the ids themselves */
	uint64			   *slots;	  /* hash table of them; NULL = none */
	uint64				slot_mask;
	uint64				nids;
} EsPrepareContext;

typedef struct EsPrepare
{
	EsTask				   task; /* first */
	EsTxn				  *txn;	 /* with a reference; NULL = no batch was logged */
	const EsSectionHeader *section;
	const EsFinishTable	  *table; /* at work; NULL = done */
	EsFinishTableView	   view;
	EsPrepareSource		  *source;
	EsPrepareGroup		   group;
	bool				   gathered; /* group is complete */
	int					   groups_since_reset;
	EsPrepareContext	   context;
	bool				   restore; /* positions are given */
	bool				   given_versions;

	/* of the table at work */
	uint8		   *bitmap; /* rows not taken; NULL = all taken so far */
	Size			bitmap_len;
	uint64			nskipped;
	EsFirstVersion *versions;
	uint32			nversions;
	uint32			versions_allocated;

	/* the answer's tables so far */
	char  *answer;
	Size   answer_len;
	Size   answer_allocated;
	uint64 ntables;
	bool   failed; /* an error was sent */
} EsPrepare;

/* Checks p->group.  DONE: all right, or p->failed, or *failed: damage. */
extern EsTaskState es_prepare_check_group(EsPrepare *p, int64 deadline, EsDamage *damage, bool *failed);
extern void
es_prepare_fail(EsPrepare *p, int code, const char *message, const char *detail, const char *hint);

#endif /* ES_SHARD_PREPARE_H */
