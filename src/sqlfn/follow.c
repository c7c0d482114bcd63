/*-------------------------------------------------------------------------
 *
 * follow.c
 *	  CALL wait_for_events(): sleeps until an event can be read.
 *
 * A procedure, because a function holds the snapshot that its portal pushed: this one ends its
 * transaction first, so a waiting follower holds nothing back.  It parks in the shard
 * that owns the context, or in all shards for a table; shards wake it after commit, when
 * the horizon has passed the row.
 *
 * Without a snapshot and without a lock the table may become another one meanwhile: TRUNCATE and rewrites give it
 * a new storage, in which the wait goes on (positions are never reused, so `after` means the same there), and
 * DROP ends it.  Nobody tells a waiter of it, so it looks once a second.
 *
 * Under row security shards know no policies.  What woke the waiter is looked for with a query, under them; if it
 * shows nothing, the wait goes on behind it.  So who waits for what is hidden learns what it would learn if
 * nothing were there.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/relation.h"
#include "access/table.h"
#include "access/xact.h"
#include "executor/spi.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "storage/latch.h"
#include "storage/lmgr.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "ipc/channel.h"
#include "ipc/position.h"
#include "ipc/shmem.h"
#include "sqlfn/args.h"
#include "tam/tam.h"

PG_FUNCTION_INFO_V1(es_wait_for_events);

#define LOOK_MS 1000 /* between two looks at the table */

typedef struct Wait
{
	Oid			relid;
	char	   *context_text; /* NULL = the whole table */
	EsTableKey	key;
	bool		has_context;
	int			shard;
	uint64		hash;
	void	   *context;
	uint32		context_len;
	EsPosition	after;
	TimestampTz deadline; /* PG_INT64_MAX = none */
	uint64		ids[ES_MAX_SHARDS];
} Wait;

static void
park(Wait *w, int shard)
{
	static const char zeros[8] = {0};
	EsWaitRequest	  req = {.req = {.type = ES_REQ_WAIT},
							 .table = w->key,
							 .after = w->after,
							 .deadline = w->deadline,
							 .context_hash = w->hash,
							 .context_len = w->has_context ? w->context_len : 0,
							 .has_context = w->has_context};
	EsPart			  parts[3] = {{&req, sizeof(req)},
								  {w->context, req.context_len},
								  {zeros, MAXALIGN(req.context_len) - req.context_len}};

	w->ids[shard] = req.req.id = es_request_id();
	es_channel_connect(shard);
	es_channel_wait_room(shard, sizeof(req) + MAXALIGN(req.context_len));
	es_channel_expect(shard, req.req.id);
	es_channel_send(shard, &req.req, parts, 3, true);
}

static void
leave(Wait *w)
{
	for (int s = 0; s < es_shared->nshards; s++)
	{
		EsRequest req = {.type = ES_REQ_CLOSE, .id = w->ids[s]};
		EsPart	  part = {&req, sizeof(req)};

		if (w->ids[s] == 0)
			continue;
		es_channel_forget(s, w->ids[s]);
		(void) es_channel_hint(s, &req, &part, 1, true);
		w->ids[s] = 0;
	}
}

/* Parks in the shards concerned; returns how many. */
static int
park_all(Wait *w)
{
	int waiting = 0;

	for (int s = 0; s < es_shared->nshards; s++)
	{
		if (w->has_context && s != w->shard)
			continue;
		park(w, s);
		waiting++;
	}
	return waiting;
}

/* What the table's present storage is called, and where the context lies in it. */
static void
take_storage(Wait *w, Relation rel)
{
	w->key = es_table_info(rel)->key;
	if (w->context_text != NULL)
	{
		EsContextArg arg;

		es_context_arg(rel, w->context_text, &arg);
		w->has_context = true;
		w->shard = arg.shard;
		w->hash = arg.hash;
		w->context_len = arg.len;
		w->context = palloc(Max(arg.len, 1));
		memcpy(w->context, arg.bytes, arg.len);
	}
}

/*
 * Has the table another storage than the one that is waited for?  If so, *w names it now.  Holds nothing back
 * when it returns.
 */
static bool
storage_changed(Wait *w)
{
	Relation   rel;
	EsTableKey key;
	bool	   changed = false;

	/* while somebody rewrites or drops it, nothing can be said; we look again */
	if (!ConditionalLockRelationOid(w->relid, AccessShareLock))
		return false;
	rel = try_relation_open(w->relid, NoLock);
	if (rel == NULL)
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_TABLE),
						errmsg("the table whose events were waited for was dropped")));
	if (!es_is_event_table(rel))
		ereport(ERROR, (errcode(ERRCODE_WRONG_OBJECT_TYPE),
						errmsg("\"%s\" is not an event_store table any more", RelationGetRelationName(rel))));
	key = es_table_info(rel)->key;
	if (!es_table_key_equal(&key, &w->key))
	{
		es_check_store_acl(w->relid, ACL_SELECT);
		/* the type of context_id may be another one, and its input function may look at tables */
		PushActiveSnapshot(GetTransactionSnapshot());
		take_storage(w, rel);
		PopActiveSnapshot();
		changed = true;
	}
	relation_close(rel, AccessShareLock);
	InvalidateCatalogSnapshot();
	return changed;
}

/* Sleeps until a shard says that there is something, or all say that time is over. */
static bool
wait_for(Wait *w)
{
	static uint32 wait_event = 0;
	int			  waiting = park_all(w);
	TimestampTz	  next_look = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), LOOK_MS);
	bool		  found = false;

	while (waiting > 0 && !found)
	{
		for (int s = 0; s < es_shared->nshards && !found; s++)
		{
			const EsWaitAnswer *answer;

			if (w->ids[s] == 0)
				continue;
			answer = (const EsWaitAnswer *) es_channel_answer_timeout(s, w->ids[s], 0);
			if (answer == NULL)
				continue;
			found = answer->found != 0;
			es_channel_forget(s, w->ids[s]);
			w->ids[s] = 0;
			waiting--;
		}
		if (waiting == 0 || found)
			break;
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, LOOK_MS,
						 es_wait_event(&wait_event, "EventStoreWaitForEvents"));
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
		if (GetCurrentTimestamp() >= next_look)
		{
			if (storage_changed(w))
			{
				leave(w);
				/* lets go of a snapshot that the transaction would keep */
				SPI_commit();
				waiting = park_all(w);
			}
			next_look = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), LOOK_MS);
		}
	}
	leave(w);
	return found;
}

/* Under row security events are found by their positions. */
static void
check_position(Relation rel)
{
	if (es_table_info(rel)->roles.position == 0)
		ereport(
			ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
			 errmsg(
				 "wait_for_events() on table \"%s\" with row security needs a column \"position\" of type bigint",
				 RelationGetRelationName(rel))));
}

/*
 * Something is there: may the caller see any of it?  If not, it is left behind.  Ends the transaction, so that
 * nothing is held back.
 */
static bool
sees_event(Wait *w)
{
	Relation	   rel;
	EsPosition	   horizon;
	StringInfoData where;
	bool		   sees;

	if (!es_rls_applies(w->relid))
		return true;
	es_check_store_acl(w->relid, ACL_SELECT);
	rel = es_table_open(w->relid, AccessShareLock);
	es_check_has_context(rel);
	check_position(rel);
	/* in this order: what is below the horizon is visible to the snapshot, in whatever isolation level */
	horizon = es_horizon_newest(es_table_info(rel)->key.storage_id);
	pg_memory_barrier();
	PushActiveSnapshot(GetTransactionSnapshot());
	initStringInfo(&where);
	appendStringInfo(&where,
					 "\"position\" OPERATOR(pg_catalog.>) " UINT64_FORMAT
					 " AND \"position\" OPERATOR(pg_catalog.<) " UINT64_FORMAT,
					 w->after, horizon);
	if (w->context_text != NULL)
	{
		int attno = es_table_info(rel)->roles.context;

		appendStringInfo(&where, " AND %s OPERATOR(pg_catalog.=) %s",
						 quote_identifier(NameStr(TupleDescAttr(RelationGetDescr(rel), attno - 1)->attname)),
						 quote_literal_cstr(w->context_text));
	}
	sees = es_sees_any(rel, where.data, true);
	w->after = Max(w->after, horizon - 1);
	pfree(where.data);
	PopActiveSnapshot();
	relation_close(rel, NoLock);
	SPI_commit();
	return sees;
}

Datum
es_wait_for_events(PG_FUNCTION_ARGS)
{
	MemoryContext context = AllocSetContextCreate(TopMemoryContext, "event_store wait", ALLOCSET_SMALL_SIZES);
	MemoryContext old;
	bool		  nonatomic = fcinfo->context != NULL && IsA(fcinfo->context, CallContext) &&
					 !castNode(CallContext, fcinfo->context)->atomic;
	Relation	  rel;
	TupleDesc	  desc;
	Wait		 *w;
	Datum		  value;
	bool		  null = false;
	volatile bool found;
	HeapTuple	  tuple;

	if (!nonatomic)
	{
		MemoryContextDelete(context);
		ereport(ERROR, (errcode(ERRCODE_INVALID_TRANSACTION_TERMINATION),
						errmsg("wait_for_events cannot run inside a transaction block"),
						errdetail("It ends its transaction, so that a waiting follower holds no snapshot."),
						errhint("CALL it outside of BEGIN … COMMIT.")));
	}

	PG_TRY();
	{
		old = MemoryContextSwitchTo(context);
		w = palloc0(sizeof(Wait));
		rel = es_open_store(fcinfo, 3, AccessShareLock, ACL_SELECT);
		w->relid = RelationGetRelid(rel);
		if (!PG_ARGISNULL(1))
			w->context_text = text_to_cstring(PG_GETARG_TEXT_PP(1));
		take_storage(w, rel);
		if (es_rls_applies(w->relid))
			check_position(rel);
		if (PG_ARGISNULL(0))
			w->after = es_horizon_newest(w->key.storage_id) - 1;
		else
			w->after = PG_GETARG_INT64(0) < 0 ? 0 : PG_GETARG_INT64(0);
		w->deadline = PG_INT64_MAX;
		if (!PG_ARGISNULL(2))
			w->deadline = DatumGetTimestampTz(DirectFunctionCall2(
				timestamptz_pl_interval, TimestampTzGetDatum(GetCurrentTimestamp()), PG_GETARG_DATUM(2)));
		table_close(rel, AccessShareLock);
		MemoryContextSwitchTo(old);

		SPI_connect_ext(SPI_OPT_NONATOMIC);
		SPI_commit();
		while ((found = wait_for(w)) && !sees_event(w))
		{
			found = false;
			if (GetCurrentTimestamp() >= w->deadline)
				break;
		}
		SPI_finish();
	}
	PG_FINALLY();
	{
		MemoryContextDelete(context);
	}
	PG_END_TRY();

	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	value = BoolGetDatum(found);
	tuple = heap_form_tuple(BlessTupleDesc(desc), &value, &null);
	PG_RETURN_DATUM(HeapTupleGetDatum(tuple));
}
