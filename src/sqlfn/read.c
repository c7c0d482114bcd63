/*-------------------------------------------------------------------------
 *
 * read.c
 *	  replay() and read_all(): events of one context from its shard, and of all of them in the
 *	  global order.
 *
 * Rows stream: they come from a reader, which holds two answers at most.
 * Under row security the executor reads the table instead, through a query that says
 * the same, so policies apply.
 *
 * read_all takes its own snapshot in READ COMMITTED: first the horizon, then the snapshot,
 * so that everything below the horizon is visible to it.  In the higher isolation
 * levels the transaction's snapshot stays, and the horizon is that snapshot's.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "executor/executor.h"
#include "executor/spi.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "ipc/position.h"
#include "ipc/shmem.h"
#include "sqlfn/args.h"
#include "tam/reader.h"
#include "tam/tam.h"

PG_FUNCTION_INFO_V1(es_replay);
PG_FUNCTION_INFO_V1(es_read_all);
PG_FUNCTION_INFO_V1(es_horizon_fn);

typedef struct ReadState
{
	Relation		rel;
	EsReader	   *reader;
	TupleTableSlot *slot;
	EsEventMap	   *map;
	TupleDesc		desc;
	Datum		   *values; /* of desc's columns */
	bool		   *nulls;
	MemoryContext	row_context;
} ReadState;

static void
close_read(Datum arg)
{
	ReadState *state = (ReadState *) DatumGetPointer(arg);

	if (state->reader != NULL)
		es_reader_end(state->reader);
	state->reader = NULL;
	if (state->slot != NULL)
		ExecDropSingleTupleTableSlot(state->slot);
	state->slot = NULL;
	if (state->rel != NULL)
		table_close(state->rel, NoLock);
	state->rel = NULL;
}

/*
 * In FROM the executor puts all rows into a tuplestore before it goes on; then they go there
 * directly.  Elsewhere each call returns one.
 */
static bool
wants_all(FunctionCallInfo fcinfo)
{
	const ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	int					 all = SFRM_Materialize | SFRM_Materialize_Preferred;

	return rsinfo != NULL && IsA(rsinfo, ReturnSetInfo) && (rsinfo->allowedModes & all) == all;
}

static ReadState *
begin_read(FunctionCallInfo fcinfo, Relation rel, Snapshot snapshot, const EsReaderSpec *spec)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	ReadState	  *state = palloc0(sizeof(ReadState));

	/* first: shards work on it while the rest is prepared */
	state->rel = rel;
	state->reader = es_reader_begin(rel, snapshot, spec);
	if (get_call_result_type(fcinfo, NULL, &state->desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	state->desc = BlessTupleDesc(state->desc);
	state->map = es_event_map(rel, state->desc);
	state->values = palloc(sizeof(Datum) * Max(state->desc->natts, 1));
	state->nulls = palloc(sizeof(bool) * Max(state->desc->natts, 1));
	state->slot = table_slot_create(rel, NULL);
	state->row_context =
		AllocSetContextCreate(CurrentMemoryContext, "event_store row", ALLOCSET_DEFAULT_SIZES);
	RegisterExprContextCallback(rsinfo->econtext, close_read, PointerGetDatum(state));
	return state;
}

static void
end_read(FunctionCallInfo fcinfo, ReadState *state)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;

	UnregisterExprContextCallback(rsinfo->econtext, close_read, PointerGetDatum(state));
	close_read(PointerGetDatum(state));
}

/* The next row's values; false behind the last one. */
static bool
read_values(ReadState *state)
{
	MemoryContext old;

	if (!es_reader_next(state->reader, state->slot))
		return false;
	MemoryContextReset(state->row_context);
	old = MemoryContextSwitchTo(state->row_context);
	es_event_values(state->map, state->slot, state->values, state->nulls);
	MemoryContextSwitchTo(old);
	return true;
}

static Datum
all_rows(FunctionCallInfo fcinfo, ReadState *state)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;

	while (read_values(state))
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, state->values, state->nulls);
	end_read(fcinfo, state);
	return (Datum) 0;
}

static Datum
next_row(FunctionCallInfo fcinfo)
{
	FuncCallContext *funcctx = SRF_PERCALL_SETUP();
	ReadState		*state = funcctx->user_fctx;
	HeapTuple		 tuple;

	if (state == NULL || !read_values(state))
	{
		if (state != NULL)
			end_read(fcinfo, state);
		SRF_RETURN_DONE(funcctx);
	}
	tuple = heap_form_tuple(state->desc, state->values, state->nulls);
	SRF_RETURN_NEXT(funcctx, HeapTupleGetDatum(tuple));
}

/*
 * Begins to read, or closes the relation if there is `nothing` to read; in FROM returns all rows at once.
 * Everything that the caller made is in the context of the call, or of all calls.
 */
static Datum
first_rows(FunctionCallInfo fcinfo, FuncCallContext *funcctx, Relation rel, Snapshot snapshot,
		   const EsReaderSpec *spec, bool nothing)
{
	if (funcctx == NULL)
	{
		InitMaterializedSRF(fcinfo, 0);
		if (nothing)
			table_close(rel, NoLock);
		else
			(void) all_rows(fcinfo, begin_read(fcinfo, rel, snapshot, spec));
		return (Datum) 0;
	}
	if (nothing)
		table_close(rel, NoLock);
	else
	{
		MemoryContext old = MemoryContextSwitchTo(funcctx->multi_call_memory_ctx);

		funcctx->user_fctx = begin_read(fcinfo, rel, snapshot, spec);
		MemoryContextSwitchTo(old);
	}
	return next_row(fcinfo);
}

/*
 * ---- under row security: a query of the same meaning, materialized ----
 *
 * Its operators are named with their schema: an operator of the caller's search path, made for the very type
 * of a column, must not take their place.
 */

static Datum
read_by_query(FunctionCallInfo fcinfo, Relation rel, const char *where, const char *order, int64 max_count,
			  bool read_only)
{
	ReturnSetInfo  *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	StringInfoData	sql;
	EsEventMap	   *map;
	TupleTableSlot *slot;
	Datum		   *values;
	bool		   *nulls;
	MemoryContext	row_context;
	Portal			portal;
	SPIPlanPtr		plan;

	InitMaterializedSRF(fcinfo, 0);
	map = es_event_map(rel, rsinfo->setDesc);
	values = palloc(sizeof(Datum) * Max(rsinfo->setDesc->natts, 1));
	nulls = palloc(sizeof(bool) * Max(rsinfo->setDesc->natts, 1));
	row_context = AllocSetContextCreate(CurrentMemoryContext, "event_store row", ALLOCSET_DEFAULT_SIZES);
	initStringInfo(&sql);
	/* the table itself: rows of tables that inherit from it are theirs */
	appendStringInfo(&sql, "SELECT * FROM ONLY %s WHERE %s %s",
					 quote_qualified_identifier(get_namespace_name(RelationGetNamespace(rel)),
												RelationGetRelationName(rel)),
					 where, order);
	if (max_count >= 0)
		appendStringInfo(&sql, " LIMIT " INT64_FORMAT, max_count);

	SPI_connect();
	plan = SPI_prepare(sql.data, 0, NULL);
	if (plan == NULL)
		elog(ERROR, "SPI_prepare failed: %s", SPI_result_code_string(SPI_result));
	portal = SPI_cursor_open(NULL, plan, NULL, NULL, read_only);
	slot = MakeSingleTupleTableSlot(RelationGetDescr(rel), &TTSOpsVirtual);
	for (;;)
	{
		SPI_cursor_fetch(portal, true, 1000);
		if (SPI_processed == 0)
			break;
		for (uint64 i = 0; i < SPI_processed; i++)
		{
			HeapTuple	  row = SPI_tuptable->vals[i];
			TupleDesc	  desc = SPI_tuptable->tupdesc;
			int			  col = 0;
			MemoryContext old;

			/* SELECT * leaves dropped columns out */
			ExecClearTuple(slot);
			for (int att = 0; att < slot->tts_tupleDescriptor->natts; att++)
			{
				if (TupleDescAttr(slot->tts_tupleDescriptor, att)->attisdropped)
				{
					slot->tts_isnull[att] = true;
					continue;
				}
				col++;
				slot->tts_values[att] = SPI_getbinval(row, desc, col, &slot->tts_isnull[att]);
			}
			ExecStoreVirtualTuple(slot);
			old = MemoryContextSwitchTo(row_context);
			es_event_values(map, slot, values, nulls);
			MemoryContextSwitchTo(old);
			tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
			MemoryContextReset(row_context);
		}
		SPI_freetuptable(SPI_tuptable);
		CHECK_FOR_INTERRUPTS();
	}
	SPI_cursor_close(portal);
	ExecDropSingleTupleTableSlot(slot);
	SPI_finish();
	table_close(rel, NoLock);
	return (Datum) 0;
}

/* ---- replay ---- */

typedef struct ReplayArgs
{
	char	   *context;
	char	   *event_type; /* NULL = any */
	bool		has_from, has_to, has_since;
	int64		from_version;
	int64		to_version;
	TimestampTz since;
	bool		backward;
	int64		max_count; /* -1 = all */
	int			since_column;
} ReplayArgs;

static int64
max_count_arg(FunctionCallInfo fcinfo, int arg)
{
	int64 n;

	if (PG_ARGISNULL(arg))
		return -1;
	n = PG_GETARG_INT64(arg);
	if (n < 0)
		ereport(ERROR, (errcode(ERRCODE_INVALID_ROW_COUNT_IN_LIMIT_CLAUSE),
						errmsg("max_count must not be negative")));
	return n;
}

static void
replay_args(FunctionCallInfo fcinfo, Relation rel, ReplayArgs *a)
{
	EsRoles roles = es_table_info(rel)->roles;

	memset(a, 0, sizeof(*a));
	a->context = text_to_cstring(PG_GETARG_TEXT_PP(0));
	if (!PG_ARGISNULL(1))
		a->event_type = text_to_cstring(PG_GETARG_TEXT_PP(1));
	a->has_from = !PG_ARGISNULL(2);
	a->from_version = a->has_from ? PG_GETARG_INT64(2) : 0;
	a->has_to = !PG_ARGISNULL(3);
	a->to_version = a->has_to ? PG_GETARG_INT64(3) : 0;
	a->has_since = !PG_ARGISNULL(4);
	a->since = a->has_since ? PG_GETARG_TIMESTAMPTZ(4) : 0;
	a->backward = !PG_ARGISNULL(5) && PG_GETARG_BOOL(5);
	a->max_count = max_count_arg(fcinfo, 6);

	if (a->event_type != NULL && roles.event_type == 0)
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_COLUMN),
						errmsg("table \"%s\" has no column \"event_type\" of type text or an enum",
							   RelationGetRelationName(rel))));
	if ((a->has_from || a->has_to) && roles.version == 0)
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_COLUMN),
						errmsg("table \"%s\" has no column \"version\" of type bigint",
							   RelationGetRelationName(rel))));
	a->since_column = es_column_number(rel, "recorded_at");
	if (a->has_since &&
		(a->since_column == 0 ||
		 TupleDescAttr(RelationGetDescr(rel), a->since_column - 1)->atttypid != TIMESTAMPTZOID))
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_COLUMN),
						errmsg("table \"%s\" has no column \"recorded_at\" of type timestamptz",
							   RelationGetRelationName(rel)),
						errhint("\"since\" needs it.")));
}

static Datum
replay_by_query(FunctionCallInfo fcinfo, Relation rel, const ReplayArgs *a)
{
	TupleDesc	   desc = RelationGetDescr(rel);
	EsRoles		   roles = es_table_info(rel)->roles;
	StringInfoData where;
	StringInfoData order;
	const char	  *direction = a->backward ? "DESC" : "ASC";

	initStringInfo(&where);
	appendStringInfo(&where, "%s OPERATOR(pg_catalog.=) %s",
					 quote_identifier(NameStr(TupleDescAttr(desc, roles.context - 1)->attname)),
					 quote_literal_cstr(a->context));
	if (a->event_type != NULL)
		appendStringInfo(&where, " AND event_type OPERATOR(pg_catalog.=) %s",
						 quote_literal_cstr(a->event_type));
	if (a->has_from)
		appendStringInfo(&where, " AND version OPERATOR(pg_catalog.>=) " INT64_FORMAT, a->from_version);
	if (a->has_to)
		appendStringInfo(&where, " AND version OPERATOR(pg_catalog.<=) " INT64_FORMAT, a->to_version);
	if (a->has_since)
		appendStringInfo(&where, " AND recorded_at OPERATOR(pg_catalog.>=) %s",
						 quote_literal_cstr(timestamptz_to_str(a->since)));

	/* the TID is the position, and for own rows, which have none yet, their order behind all others */
	initStringInfo(&order);
	appendStringInfo(&order, "ORDER BY ctid %s", direction);
	return read_by_query(fcinfo, rel, where.data, order.data, a->max_count, true);
}

Datum
es_replay(PG_FUNCTION_ARGS)
{
	if (SRF_IS_FIRSTCALL())
	{
		FuncCallContext *funcctx = NULL;
		MemoryContext	 old = CurrentMemoryContext;
		Relation		 rel;
		EsRoles			 roles;
		ReplayArgs		 a;
		EsContextArg	 context;
		EsReaderSpec	 spec;
		StringInfoData	 filters;

		if (PG_ARGISNULL(0))
			ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("context_id must not be NULL")));
		rel = es_open_store(fcinfo, 7, AccessShareLock, ACL_SELECT);
		replay_args(fcinfo, rel, &a);
		/* shards do not know the value that an added column has in older rows */
		if (es_rls_applies(RelationGetRelid(rel)) ||
			(a.has_since && TupleDescAttr(RelationGetDescr(rel), a.since_column - 1)->atthasmissing))
			return replay_by_query(fcinfo, rel, &a);

		if (!wants_all(fcinfo))
		{
			funcctx = SRF_FIRSTCALL_INIT();
			MemoryContextSwitchTo(funcctx->multi_call_memory_ctx);
		}
		roles = es_table_info(rel)->roles;
		es_context_arg(rel, a.context, &context);

		es_reader_spec_init(&spec);
		spec.order = a.backward ? ES_ORDER_POSITION_DESC : ES_ORDER_POSITION;
		spec.has_context = true;
		spec.context = context.bytes;
		spec.context_len = context.len;
		spec.context_hash = context.hash;
		spec.max_rows = a.max_count > 0 ? a.max_count : 0;

		initStringInfo(&filters);
		if (a.has_from)
		{
			es_filter_int64(&filters, roles.version - 1, ES_FILTER_GE, a.from_version);
			spec.nfilters++;
		}
		if (a.has_to)
		{
			es_filter_int64(&filters, roles.version - 1, ES_FILTER_LE, a.to_version);
			spec.nfilters++;
		}
		if (a.has_since)
		{
			es_filter_int64(&filters, a.since_column - 1, ES_FILTER_GE, a.since);
			spec.nfilters++;
		}
		if (a.event_type != NULL)
		{
			const void **values;
			size_t		*lens;
			int			 n = es_event_type_values(rel, NULL, PG_GETARG_DATUM(1), true, &values, &lens);

			es_filter_bytes(&filters, roles.event_type - 1, values, lens, n);
			spec.nfilters++;
		}
		spec.filters = filters.data;
		spec.filters_len = filters.len;

		MemoryContextSwitchTo(old);
		return first_rows(fcinfo, funcctx, rel, GetActiveSnapshot(), &spec, a.max_count == 0);
	}
	return next_row(fcinfo);
}

/* ---- read_all ---- */

/*
 * Under SERIALIZABLE: what lies at the horizon and behind it has no part in the result because it was not there for
 * the snapshot, so whoever wrote it meanwhile is a conflict, also if there is nothing before it.
 */
static void
look_behind_horizon(Relation rel, Snapshot snapshot, const EsReaderSpec *what, EsPosition after,
					EsPosition horizon)
{
	EsReaderSpec spec = *what;
	EsReader	*reader;

	spec.order = ES_ORDER_POSITION;
	spec.flags = ES_OPEN_NO_OWN;
	spec.after = Max(after, horizon - 1);
	reader = es_reader_begin(rel, snapshot, &spec);
	while (es_reader_skip(reader, NULL))
		;
	es_reader_end(reader);
}

Datum
es_read_all(PG_FUNCTION_ARGS)
{
	if (SRF_IS_FIRSTCALL())
	{
		FuncCallContext *funcctx = NULL;
		MemoryContext	 old = CurrentMemoryContext;
		Relation		 rel;
		EsTableKey		 key;
		EsRoles			 roles;
		EsReaderSpec	 spec;
		Snapshot		 snapshot;
		EsPosition		 horizon;
		StringInfoData	 filters;
		int64			 after = PG_ARGISNULL(0) ? 0 : PG_GETARG_INT64(0);
		int64			 max_count = max_count_arg(fcinfo, 1);
		bool			 nothing;

		rel = es_open_store(fcinfo, 3, AccessShareLock, ACL_SELECT);
		key = es_table_info(rel)->key;
		roles = es_table_info(rel)->roles;

		if (!wants_all(fcinfo))
		{
			funcctx = SRF_FIRSTCALL_INIT();
			MemoryContextSwitchTo(funcctx->multi_call_memory_ctx);
		}
		es_reader_spec_init(&spec);
		initStringInfo(&filters);
		nothing = max_count == 0;
		if (!PG_ARGISNULL(2))
		{
			const void **values;
			size_t		*lens;
			int n = es_event_type_values(rel, PG_GETARG_ARRAYTYPE_P(2), (Datum) 0, false, &values, &lens);

			if (n == 0)
				nothing = true;
			else
			{
				es_filter_bytes(&filters, roles.event_type - 1, values, lens, n);
				spec.nfilters++;
			}
		}

		if (IsolationUsesXactSnapshot())
		{
			snapshot = GetTransactionSnapshot();
			horizon = es_horizon_of(snapshot, key.storage_id);
		}
		else
		{
			horizon = es_horizon_newest(key.storage_id);
			pg_memory_barrier();
			snapshot = GetLatestSnapshot();
		}
		spec.filters = filters.data;
		spec.filters_len = filters.len;
		if (IsolationIsSerializable() && !nothing)
			look_behind_horizon(rel, snapshot, &spec, after < 0 ? 0 : after, horizon);

		if (es_rls_applies(RelationGetRelid(rel)))
		{
			StringInfoData where;

			MemoryContextSwitchTo(old);
			if (roles.position == 0)
				ereport(
					ERROR,
					(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
					 errmsg(
						 "read_all() on table \"%s\" with row security needs a column \"position\" of type bigint",
						 RelationGetRelationName(rel))));
			initStringInfo(&where);
			appendStringInfo(&where,
							 "\"position\" OPERATOR(pg_catalog.>) " INT64_FORMAT
							 " AND \"position\" OPERATOR(pg_catalog.<) " UINT64_FORMAT,
							 after, horizon);
			if (!PG_ARGISNULL(2))
				appendStringInfo(
					&where,
					" AND event_type::pg_catalog.text OPERATOR(pg_catalog.=) ANY (%s::pg_catalog.text[])",
					quote_literal_cstr(OidOutputFunctionCall(F_ARRAY_OUT, PG_GETARG_DATUM(2))));
			if (funcctx != NULL)
				end_MultiFuncCall(fcinfo, funcctx);
			/* not read-only: SPI then takes a new snapshot, which is behind the horizon's reading */
			return read_by_query(fcinfo, rel, where.data, "ORDER BY \"position\"", nothing ? 0 : max_count,
								 false);
		}

		spec.order = ES_ORDER_POSITION;
		spec.flags = ES_OPEN_NO_OWN;
		spec.after = after < 0 ? 0 : after;
		spec.below = horizon;
		spec.max_rows = max_count > 0 ? max_count : 0;

		MemoryContextSwitchTo(old);
		return first_rows(fcinfo, funcctx, rel, snapshot, &spec, nothing || horizon <= spec.after + 1);
	}
	return next_row(fcinfo);
}

Datum
es_horizon_fn(PG_FUNCTION_ARGS)
{
	Relation   rel = es_open_store(fcinfo, 0, AccessShareLock, ACL_SELECT);
	EsTableKey key = es_table_info(rel)->key;
	EsPosition horizon = es_horizon_of(GetActiveSnapshot(), key.storage_id);

	table_close(rel, NoLock);
	PG_RETURN_INT64((int64) horizon);
}
