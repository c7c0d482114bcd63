/*-------------------------------------------------------------------------
 *
 * stat.c
 *	  Functions behind the views stat_shards, stat_tables and stat_segments.
 *
 * stat_shards reads shared memory only, so it answers when a shard does not.  The others ask
 * the shards; one that is not open contributes no rows (and stat_shards says why), nor does a paused one
 * (with a WARNING), since who looks for what is wrong shall not wait for it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/table.h"
#include "access/xlog.h"
#include "catalog/pg_type.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "replication/slot.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/pg_lsn.h"
#include "utils/rel.h"

#include "core/segment.h"
#include "ipc/channel.h"
#include "ipc/shmem.h"
#include "sqlfn/args.h"
#include "tam/tam.h"

PG_FUNCTION_INFO_V1(es_stat_shards);
PG_FUNCTION_INFO_V1(es_stat_tables);
PG_FUNCTION_INFO_V1(es_stat_segments);

#define SHARD_COLUMNS 50

void
es_check_view_acl(FunctionCallInfo fcinfo, const char *view)
{
	Oid relid = get_relname_relid(view, get_func_namespace(fcinfo->flinfo->fn_oid));

	if (OidIsValid(relid) ? pg_class_aclcheck(relid, GetUserId(), ACL_SELECT) != ACLCHECK_OK : !superuser())
		aclcheck_error(ACLCHECK_NO_PRIV, OBJECT_VIEW, view);
}

/* store_refused: the keeper does not open the store, so a shard that waits for it does not start. */
static const char *
state_name(uint32 state, bool store_refused)
{
	switch ((EsShardState) state)
	{
		case ES_SHARD_ABSENT:
			return store_refused ? "refused" : "absent";
		case ES_SHARD_STARTING:
			return store_refused ? "refused" : "starting";
		case ES_SHARD_RECOVERING:
			return "recovering";
		case ES_SHARD_OPEN:
			return "open";
		case ES_SHARD_STOPPING:
			return "stopping";
		case ES_SHARD_CLEAN:
			return "stopped";
		case ES_SHARD_FAILED:
			return "failed";
	}
	return "unknown";
}

static Datum
histogram_array(pg_atomic_uint64 *buckets, int n)
{
	Datum elems[16];

	for (int i = 0; i < n; i++)
		elems[i] = Int64GetDatum((int64) pg_atomic_read_u64(&buckets[i]));
	return PointerGetDatum(
		construct_array(elems, n, INT8OID, sizeof(int64), FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
}

/* Messages that wait in the shard's queues now; a long one counts as its pieces. */
static uint64
queue_depth(int s)
{
	uint32 shard_generation = pg_atomic_read_u32(&es_shared->shards[s].generation);
	uint64 depth = 0;

	for (int i = 0; i < es_shared->nslots; i++)
	{
		EsChannelShared *c = &es_shared->slots[i].channels[s];
		uint32			 generation = pg_atomic_read_u32(&c->generation);
		uint64			 taken;
		uint64			 sent;

		if (generation == 0 || generation == pg_atomic_read_u32(&c->closed) ||
			c->shard_generation != shard_generation)
			continue;
		/* in this order nothing counts as taken that was not sent, but for a queue made anew meanwhile */
		taken = pg_atomic_read_u64(&c->taken_messages);
		pg_read_barrier();
		sent = pg_atomic_read_u64(&c->sent_messages);
		if (sent > taken)
			depth += sent - taken;
	}
	return depth;
}

/* Message, hint and detail, with newlines between, as a text for one column; NULL = there is no reason. */
static text *
reason_text(char *reason)
{
	char		  *hint = strchr(reason, '\n');
	char		  *detail = hint == NULL ? NULL : strchr(hint + 1, '\n');
	StringInfoData text;

	if (reason[0] == '\0')
		return NULL;
	if (hint != NULL)
		*hint++ = '\0';
	if (detail != NULL)
		*detail++ = '\0';
	initStringInfo(&text);
	appendStringInfoString(&text, reason);
	if (detail != NULL && *detail != '\0')
		appendStringInfo(&text, ": %s", detail);
	if (hint != NULL && *hint != '\0')
		appendStringInfo(&text, "\n%s", hint);
	return cstring_to_text_with_len(text.data, text.len);
}

static XLogRecPtr
slot_restart_lsn(void)
{
	ReplicationSlot *slot = SearchNamedReplicationSlot(ES_SLOT_NAME, true);
	XLogRecPtr		 lsn = InvalidXLogRecPtr;

	if (slot == NULL)
		return lsn;
	SpinLockAcquire(&slot->mutex);
	if (slot->in_use)
		lsn = slot->data.restart_lsn;
	SpinLockRelease(&slot->mutex);
	return lsn;
}

Datum
es_stat_shards(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;

	char  store_reason[sizeof(es_shared->store_reason)] = "";
	bool  store_refused;
	text *refusal;

	es_check_view_acl(fcinfo, "stat_shards");
	InitMaterializedSRF(fcinfo, 0);
	if (es_shared == NULL)
		return (Datum) 0;
	if (pg_atomic_read_u32(&es_shared->store_ready) == 0 && pg_atomic_read_u32(&es_shared->store_failed) != 0)
	{
		SpinLockAcquire(&es_shared->mutex);
		memcpy(store_reason, es_shared->store_reason, sizeof(store_reason));
		SpinLockRelease(&es_shared->mutex);
	}
	else if (RecoveryInProgress())
		strlcpy(store_reason, "event tables are not available while the server is a standby or recovers",
				sizeof(store_reason));
	store_refused =
		store_reason[0] != '\0' && pg_atomic_read_u32(&es_shared->store_failed) == ES_STORE_REFUSED;
	for (int s = 0; s < es_shared->nshards; s++)
	{
		EsShardShared	*shard = &es_shared->shards[s];
		EsShardCounters *c = &shard->counters;
		Datum			 values[SHARD_COLUMNS];
		bool			 nulls[SHARD_COLUMNS] = {false};
		char			 reason[sizeof(shard->reason)];
		uint64			 restart = pg_atomic_read_u64(&shard->restart_lsn);
		uint32			 state = pg_atomic_read_u32(&shard->state);
		XLogRecPtr		 held;
		XLogRecPtr		 insert = RecoveryInProgress() ? InvalidXLogRecPtr : GetXLogInsertRecPtr();
		int				 n = 0;
		int				 pid;

		SpinLockAcquire(&shard->mutex);
		pid = shard->pid;
		memcpy(reason, shard->reason, sizeof(reason));
		SpinLockRelease(&shard->mutex);

#define PUT(name) values[n++] = Int64GetDatum((int64) pg_atomic_read_u64(&c->name))
		values[n++] = Int32GetDatum(s);
		nulls[n] = pid == 0;
		values[n++] = Int32GetDatum(pid);
		values[n++] = CStringGetTextDatum(state_name(state, store_refused));
		/* the shard's own, or why nobody may use the store */
		refusal = reason_text(pstrdup(state == ES_SHARD_FAILED ? reason : store_reason));
		nulls[n] = refusal == NULL;
		values[n++] = PointerGetDatum(refusal);
		values[n++] = BoolGetDatum(pg_atomic_read_u32(&shard->paused) != 0);
		values[n++] = Int64GetDatum(pg_atomic_read_u32(&shard->generation));
		values[n++] = CStringGetTextDatum(pg_atomic_read_u32(&shard->uses_uring) ? "io_uring" : "sync");
		PUT(messages);
		PUT(batches);
		PUT(rows);
		PUT(commits);
		PUT(aborts);
		PUT(duplicates);
		values[n++] = Int64GetDatum((int64) queue_depth(s));
		PUT(queue_high_water);
		PUT(queue_full_waits);
		PUT(queue_full_wait_us);
		PUT(queue_timeouts);
		PUT(staged_transactions);
		PUT(staged_rows);
		PUT(staged_bytes);
		PUT(memtable_rows);
		PUT(memtable_bytes);
		PUT(segments);
		PUT(segment_rows);
		PUT(segment_bytes);
		PUT(pending_segments);
		PUT(flushes);
		PUT(wal_direct_writes);
		PUT(wal_staged_writes);
		PUT(wal_groups);
		PUT(wal_frames);
		PUT(wal_bytes);
		PUT(wal_files);
		PUT(fsyncs);
		PUT(fsync_us);
		values[n++] = histogram_array(c->fsync_histogram, lengthof(c->fsync_histogram));
		PUT(control_writes);
		PUT(manifest_records);
		PUT(last_position);
		PUT(durable_position);
		PUT(flush_distance);
		nulls[n] = restart == 0;
		values[n++] = LSNGetDatum(restart);
		/* a shard that cannot read what it needs holds all that the slot keeps */
		held = restart != 0 ? restart : slot_restart_lsn();
		nulls[n] = held == InvalidXLogRecPtr || insert == InvalidXLogRecPtr;
		values[n++] = Int64GetDatum(insert > held ? (int64) (insert - held) : 0);
		PUT(scans);
		PUT(replays);
		PUT(rows_sent);
		PUT(waiters);
		PUT(io_errors);
		PUT(corruptions);
#undef PUT
		Assert(n == rsinfo->setDesc->natts);
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	}
	return (Datum) 0;
}

/* Asks a shard that is open; NULL if it is not. */
static EsAnswer *
ask(int shard, EsStatKind kind)
{
	EsStatRequest req = {.req = {.type = ES_REQ_STAT}, .kind = kind};
	EsPart		  part = {&req, sizeof(req)};

	if (pg_atomic_read_u32(&es_shared->shards[shard].state) != ES_SHARD_OPEN)
		return NULL;
	if (pg_atomic_read_u32(&es_shared->shards[shard].paused) != 0)
	{
		ereport(WARNING, (errmsg("shard %d is paused and not asked for what it holds", shard),
						  errhint("event_store.resume_shard(%d) ends the pause.", shard)));
		return NULL;
	}
	return es_channel_call(shard, &req.req, &part, 1);
}

/* Positions that do not exist (an empty table) are NULL. */
static void
put_range(Datum *values, bool *nulls, int n, EsPosition min, EsPosition max)
{
	values[n] = Int64GetDatum((int64) min);
	nulls[n] = min == 0;
	values[n + 1] = Int64GetDatum((int64) max);
	nulls[n + 1] = max == 0;
}

Datum
es_stat_tables(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;

	es_check_view_acl(fcinfo, "stat_tables");
	InitMaterializedSRF(fcinfo, 0);
	es_wait_store_ready();
	for (int s = 0; s < es_shared->nshards; s++)
	{
		EsAnswer		  *answer = ask(s, ES_STAT_TABLES);
		const EsTableStat *stat = (const EsTableStat *) (answer + 1);
		uint64			   n = answer ? (answer->len - sizeof(EsAnswer)) / sizeof(EsTableStat) : 0;

		for (uint64 i = 0; i < n; i++)
		{
			Datum values[13];
			bool  nulls[13] = {false};

			if (stat[i].table.database != MyDatabaseId)
				continue;
			values[0] = ObjectIdGetDatum(stat[i].relid);
			values[1] = Int64GetDatum((int64) stat[i].table.storage_id);
			values[2] = Int32GetDatum(s);
			values[3] = Int64GetDatum((int64) stat[i].segments);
			values[4] = Int64GetDatum((int64) stat[i].segment_rows);
			values[5] = Int64GetDatum((int64) stat[i].segment_bytes);
			values[6] = Int64GetDatum((int64) stat[i].raw_bytes);
			values[7] = Int64GetDatum((int64) stat[i].memtable_rows);
			values[8] = Int64GetDatum((int64) stat[i].memtable_bytes);
			values[9] = Int64GetDatum((int64) stat[i].staged_rows);
			values[10] = Int64GetDatum((int64) stat[i].pending_rows);
			put_range(values, nulls, 11, stat[i].min_position, stat[i].max_position);
			tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
		}
		if (answer)
			pfree(answer);
	}
	return (Datum) 0;
}

Datum
es_stat_segments(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;

	es_check_view_acl(fcinfo, "stat_segments");
	InitMaterializedSRF(fcinfo, 0);
	es_wait_store_ready();
	for (int s = 0; s < es_shared->nshards; s++)
	{
		EsAnswer			*answer = ask(s, ES_STAT_SEGMENTS);
		const EsSegmentStat *stat = (const EsSegmentStat *) (answer + 1);
		uint64				 n = answer ? (answer->len - sizeof(EsAnswer)) / sizeof(EsSegmentStat) : 0;

		for (uint64 i = 0; i < n; i++)
		{
			Datum values[12];
			bool  nulls[12] = {false};

			if (stat[i].table.database != MyDatabaseId)
				continue;
			values[0] = ObjectIdGetDatum(stat[i].relid);
			values[1] = Int64GetDatum((int64) stat[i].table.storage_id);
			values[2] = Int32GetDatum(s);
			values[3] = CStringGetTextDatum(psprintf("seg.%016llx", (unsigned long long) stat[i].id));
			values[4] = Int64GetDatum((int64) stat[i].nrows);
			values[5] = Int64GetDatum((int64) stat[i].contexts);
			values[6] = Int32GetDatum((int32) stat[i].zones);
			values[7] = Int64GetDatum((int64) stat[i].bytes);
			values[8] = Int64GetDatum((int64) stat[i].raw_bytes);
			put_range(values, nulls, 9, stat[i].min_position, stat[i].max_position);
			values[11] =
				BoolGetDatum((stat[i].flags & ES_SEGMENT_PENDING) != 0 && (stat[i].flags & 0x100) == 0);
			tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
		}
		if (answer)
			pfree(answer);
	}
	return (Datum) 0;
}
