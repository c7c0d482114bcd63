/*-------------------------------------------------------------------------
 *
 * args.h
 *	  What the SQL functions share: opening the table they work on, reading a
 *	  context from text, building filters, turning rows into events.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SQLFN_ARGS_H
#define ES_SQLFN_ARGS_H

#include "postgres.h"

#include "executor/tuptable.h"
#include "fmgr.h"
#include "lib/stringinfo.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/relcache.h"

#include "core/format.h"

/* ERROR unless the current user has the privilege on the table. */
extern void es_check_store_acl(Oid relid, AclMode mode);

/* Checks the privilege on the store argument (NULL: ERROR), 0 = none is needed, and opens it with the lock. */
extern Relation es_open_store(FunctionCallInfo fcinfo, int arg, LOCKMODE lock, AclMode mode);

/*
 * ERROR unless the current user may SELECT from the view that the function is for.  A view's functions are called
 * with the rights of who reads it, so everybody may call these, and the view's privileges decide.
 */
extern void es_check_view_acl(FunctionCallInfo fcinfo, const char *view);

/* Is the current user under row security in this table?  ERROR if so and it is off (row_security). */
extern bool es_rls_applies(Oid relid);

/*
 * Do the policies show the current user any row of the table (not of those that inherit from it) of which `where`
 * is true?  Its operators and types must be named with their schema.  read_only: asks with the active
 * snapshot, else with a new one.  False without the privilege to SELECT.
 */
extern bool es_sees_any(Relation rel, const char *where, bool read_only);

/* A context given as text: read by the column's input function. */
typedef struct EsContextArg
{
	Datum		value; /* of the column's type */
	const void *bytes; /* canonical */
	size_t		len;
	int64		scratch;
	uint64		hash;
	int			shard;
} EsContextArg;

extern void es_context_arg(Relation rel, const char *text, EsContextArg *result);

/* Appends a filter (ipc/protocol.h) to the buffer; column counts from 0. */
extern void es_filter_int64(StringInfo buf, int column, int op, int64 value);
extern void
es_filter_bytes(StringInfo buf, int column, const void *const *values, const size_t *lens, int nvalues);

/* The column's canonical bytes for event types given as text; number of values. */
extern int es_event_type_values(Relation rel, ArrayType *types, Datum single, bool has_single,
								const void ***values, size_t **lens);

/* ---- event_map.c: rows of any event table in the shape of event_store.events ---- */

typedef struct EsEventMap EsEventMap;

/*
 * result: what the function returns, event_store.events as it is now.  Allocated in the current memory context;
 * names the columns of rel as they are, whose lock is held as long as it is used.
 */
extern EsEventMap *es_event_map(Relation rel, TupleDesc result);

/* The row as values of result's columns (arrays of its natts), in the current memory context. */
extern void es_event_values(const EsEventMap *map, TupleTableSlot *slot, Datum *values, bool *nulls);

extern int es_column_number(Relation rel, const char *name); /* 0 = there is none */

#endif /* ES_SQLFN_ARGS_H */
