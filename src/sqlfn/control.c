/*-------------------------------------------------------------------------
 *
 * control.c
 *	  Operating the store: flush, sync, pause and resume, release_wal, verify, and
 *	  small questions (shard_of, relation_size, table_roles).
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/relation.h"
#include "access/table.h"
#include "access/xlog.h"
#include "access/xlog_internal.h"
#include "catalog/objectaddress.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_class.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/lmgr.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"

#include "compat.h"
#include "ipc/channel.h"
#include "ipc/shmem.h"
#include "sqlfn/args.h"
#include "tam/estimate.h"
#include "tam/tam.h"
#include "tam/xact.h"

PG_FUNCTION_INFO_V1(es_flush);
PG_FUNCTION_INFO_V1(es_sync);
PG_FUNCTION_INFO_V1(es_pause_shard);
PG_FUNCTION_INFO_V1(es_resume_shard);
PG_FUNCTION_INFO_V1(es_release_wal);
PG_FUNCTION_INFO_V1(es_verify);
PG_FUNCTION_INFO_V1(es_detach);
PG_FUNCTION_INFO_V1(es_shard_of);
PG_FUNCTION_INFO_V1(es_relation_size_fn);
PG_FUNCTION_INFO_V1(es_table_roles);

/* Sends the request to all shards at once and waits for all of them. */
static void
ask_all(EsRequest *req, Size len)
{
	uint64 ids[ES_MAX_SHARDS];
	EsPart part = {req, len};

	for (int s = 0; s < es_shared->nshards; s++)
	{
		ids[s] = req->id = es_request_id();
		es_channel_connect(s);
		es_channel_wait_room(s, len);
		es_channel_expect(s, ids[s]);
		es_channel_send(s, req, &part, 1, true);
	}
	for (int s = 0; s < es_shared->nshards; s++)
	{
		(void) es_channel_answer(s, ids[s]);
		es_channel_forget(s, ids[s]);
	}
}

/*
 * End of the last record that was inserted.  At a page's end PostgreSQL names the place behind the next
 * page's header, where no record ends, and XLogFlush takes that for an LSN from the future.
 */
static XLogRecPtr
insert_end(void)
{
	XLogRecPtr insert = GetXLogInsertRecPtr();

	if (XLogSegmentOffset(insert, wal_segment_size) == SizeOfXLogLongPHD)
		insert -= SizeOfXLogLongPHD;
	else if (insert % XLOG_BLCKSZ == SizeOfXLogShortPHD)
		insert -= SizeOfXLogShortPHD;
	return insert;
}

Datum
es_flush(PG_FUNCTION_ARGS)
{
	EsFlushRequest req = {.req = {.type = ES_REQ_FLUSH}};

	if (!PG_ARGISNULL(0))
	{
		Relation rel;
		Oid		 relid = PG_GETARG_OID(0);

		/* before it is locked; that it is there at all is said below */
		if (!has_privs_of_role(GetUserId(), ROLE_PG_CHECKPOINT) && get_rel_relkind(relid) != '\0' &&
			!es_owns_relation(relid))
			aclcheck_error(ACLCHECK_NOT_OWNER, OBJECT_TABLE, get_rel_name(relid));
		rel = es_open_store(fcinfo, 0, AccessShareLock, 0);
		req.table = es_table_info(rel)->key;
		table_close(rel, AccessShareLock);
	}
	else if (!has_privs_of_role(GetUserId(), ROLE_PG_CHECKPOINT))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied to flush all event_store tables"),
				 errhint("The owner of a table may flush it; members of pg_checkpoint may flush all.")));
	es_wait_store_ready();
	/* rows go to segments when their commit is durable: the shards could only ask the walwriter for that */
	XLogFlush(insert_end());
	ask_all(&req.req, sizeof(req));
	PG_RETURN_VOID();
}

Datum
es_sync(PG_FUNCTION_ARGS)
{
	EsRequest req = {.type = ES_REQ_SYNC};

	es_wait_store_ready();
	/* what was acknowledged asynchronously is behind the flush pointer */
	XLogFlush(insert_end());
	ask_all(&req, sizeof(req));
	PG_RETURN_VOID();
}

static int
shard_arg(FunctionCallInfo fcinfo, const char *function)
{
	int shard = PG_GETARG_INT32(0);

	if (!superuser())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE), errmsg("must be superuser to call %s", function)));
	es_require_preload();
	if (shard < 0 || shard >= es_shared->nshards)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("there is no shard %d", shard),
						errdetail("The highest number of a shard is %d.", es_shared->nshards - 1)));
	return shard;
}

Datum
es_pause_shard(PG_FUNCTION_ARGS)
{
	int shard = shard_arg(fcinfo, "pause_shard");

	pg_atomic_write_u32(&es_shared->shards[shard].paused, 1);
	es_wake_shard(shard);
	PG_RETURN_VOID();
}

Datum
es_resume_shard(PG_FUNCTION_ARGS)
{
	int shard = shard_arg(fcinfo, "resume_shard");

	pg_atomic_write_u32(&es_shared->shards[shard].paused, 0);
	es_wake_shard(shard);
	PG_RETURN_VOID();
}

Datum
es_release_wal(PG_FUNCTION_ARGS)
{
	int shard = shard_arg(fcinfo, "release_wal");

	/* the keeper refuses the whole store if it sees that WAL which shards need was not kept */
	if (pg_atomic_read_u32(&es_shared->shards[shard].state) != ES_SHARD_FAILED &&
		pg_atomic_read_u32(&es_shared->store_failed) == 0)
		ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						errmsg("shard %d does not need to give up any WAL", shard),
						errdetail("Only a shard that cannot open holds WAL back for good.")));
	ereport(WARNING, (errmsg("shard %d opens without the WAL it still needs: events in it are lost", shard)));
	pg_atomic_write_u32(&es_shared->shards[shard].release_wal, 1);
	es_wake_shard(shard);
	es_wake_keeper();
	PG_RETURN_VOID();
}

/* The caller goes, by cancel or for good, before it is done: takes it back, if that is still possible. */
static void
undo_detach(int code, Datum arg)
{
	uint32 asked = ES_DETACH_ASKED;

	ConditionVariableCancelSleep();
	if (pg_atomic_compare_exchange_u32(&es_shared->detach, &asked, ES_ATTACHED))
		es_wake_keeper();
	else if (asked == ES_DETACH_STOPPING)
		ereport(WARNING, (errmsg("the event store will be detached all the same"),
						  errdetail("Its shards have begun to stop, and are waited for no longer."),
						  errhint("The server's log says when it is detached.")));
	else if (asked == ES_DETACHED)
		ereport(WARNING,
				(errmsg("the event store is detached all the same"),
				 errdetail("Its shards had begun to stop."), errhint("Restart the server to use it again.")));
}

Datum
es_detach(PG_FUNCTION_ARGS)
{
	static uint32 wait_event = 0;

	if (!superuser())
		ereport(ERROR, (errcode(ERRCODE_INSUFFICIENT_PRIVILEGE), errmsg("must be superuser to call detach")));
	es_wait_store_ready();
	/* it would wait for itself */
	if (es_xact != NULL)
		ereport(ERROR, (errcode(ERRCODE_ACTIVE_SQL_TRANSACTION),
						errmsg("cannot detach the event store in a transaction that has inserted events")));

	PG_ENSURE_ERROR_CLEANUP(undo_detach, (Datum) 0);
	{
		ConditionVariablePrepareToSleep(&es_shared->store_changed);
		while (pg_atomic_read_u32(&es_shared->detach) != ES_DETACHED)
		{
			uint32 attached = ES_ATTACHED;

			/* asked for again if another session, which asked as well, took it back */
			(void) pg_atomic_compare_exchange_u32(&es_shared->detach, &attached, ES_DETACH_ASKED);
			/* whoever still has a transaction with events is waited for */
			for (int s = 0; s < es_shared->nshards; s++)
				es_wake_shard(s);
			es_wake_keeper();
			(void) ConditionVariableTimedSleep(&es_shared->store_changed, 200,
											   es_wait_event(&wait_event, "EventStoreDetach"));
		}
		ConditionVariableCancelSleep();
	}
	PG_END_ENSURE_ERROR_CLEANUP(undo_detach, (Datum) 0);
	PG_RETURN_VOID();
}

Datum
es_verify(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;

	/* nothing of what it reads is shown: who was given EXECUTE may */
	InitMaterializedSRF(fcinfo, 0);
	es_wait_store_ready();
	for (int s = 0; s < es_shared->nshards; s++)
	{
		EsRequest		req = {.type = ES_REQ_VERIFY, .id = es_request_id()};
		EsPart			part = {&req, sizeof(req)};
		const EsAnswer *answer;

		es_channel_connect(s);
		es_channel_wait_room(s, sizeof(req));
		es_channel_expect(s, req.id);
		es_channel_send(s, &req, &part, 1, true);
		for (;;)
		{
			const EsVerifyAnswer *v;
			const char			 *file;
			Datum				  values[6];
			bool				  nulls[6] = {false};

			answer = es_channel_answer(s, req.id);
			if (answer->len > sizeof(EsVerifyAnswer))
			{
				v = (const EsVerifyAnswer *) answer;
				file = (const char *) (v + 1);
				values[0] = Int32GetDatum(s);
				values[1] = CStringGetTextDatum(file);
				values[2] = Int64GetDatum((int64) v->offset);
				values[3] = CStringGetTextDatum(file + strlen(file) + 1);
				nulls[4] = nulls[5] = v->expected_crc == 0 && v->found_crc == 0;
				values[4] = CStringGetTextDatum(psprintf("%08x", v->expected_crc));
				values[5] = CStringGetTextDatum(psprintf("%08x", v->found_crc));
				tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
			}
			if (answer->flags & ES_ANSWER_LAST)
				break;
		}
		es_channel_forget(s, req.id);
	}
	return (Datum) 0;
}

/* These two are as open to everybody as pg_relation_size(), and keep no lock either. */
Datum
es_shard_of(PG_FUNCTION_ARGS)
{
	Relation	 rel = es_open_store(fcinfo, 1, AccessShareLock, 0);
	EsContextArg context;

	es_context_arg(rel, text_to_cstring(PG_GETARG_TEXT_PP(0)), &context);
	table_close(rel, AccessShareLock);
	PG_RETURN_INT32(context.shard);
}

Datum
es_relation_size_fn(PG_FUNCTION_ARGS)
{
	Relation	  rel = es_open_store(fcinfo, 0, AccessShareLock, 0);
	EsTableTotals totals;

	es_table_totals(rel, &totals);
	table_close(rel, AccessShareLock);
	PG_RETURN_INT64((int64) totals.bytes);
}

Datum
es_table_roles(PG_FUNCTION_ARGS)
{
	Relation		   rel;
	const EsTableInfo *info;
	uint64			   storage_id;
	int				   atts[5];
	TupleDesc		   desc;
	Datum			   values[7];
	bool			   nulls[7] = {false};
	NameData		   names[5];
	Oid				   relid = PG_GETARG_OID(0);

	es_check_view_acl(fcinfo, "stat_tables");
	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	desc = BlessTupleDesc(desc);

	/* a view does not queue behind DDL, and nobody behind it */
	if (!ConditionalLockRelationOid(relid, AccessShareLock))
	{
		memset(nulls, true, 6);
		values[6] = BoolGetDatum(true);
		PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(desc, values, nulls)));
	}
	/* stat_tables asks for the tables of its snapshot: one that was dropped or rewritten as a heap has no roles */
	rel = try_relation_open(relid, NoLock);
	if (rel == NULL)
	{
		UnlockRelationOid(relid, AccessShareLock);
		PG_RETURN_NULL();
	}
	if (!es_is_event_table(rel))
	{
		relation_close(rel, AccessShareLock);
		PG_RETURN_NULL();
	}
	es_wait_store_ready();
	info = es_table_info(rel);
	storage_id = info->key.storage_id;
	atts[0] = info->roles.context;
	atts[1] = info->roles.position;
	atts[2] = info->roles.version;
	atts[3] = info->roles.event_id;
	atts[4] = info->roles.event_type;

	for (int i = 0; i < 5; i++)
	{
		nulls[i] = atts[i] == 0;
		if (nulls[i])
			continue;
		names[i] = TupleDescAttr(RelationGetDescr(rel), atts[i] - 1)->attname;
		values[i] = NameGetDatum(&names[i]);
	}
	values[5] = Int64GetDatum((int64) storage_id);
	values[6] = BoolGetDatum(false);
	table_close(rel, AccessShareLock);
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(desc, values, nulls)));
}
