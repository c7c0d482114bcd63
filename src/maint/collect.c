/*-------------------------------------------------------------------------
 *
 * collect.c
 *	  Storages that no relation has any more are found and dropped.
 *
 * PostgreSQL tells nobody when a relation's file goes: DROP, TRUNCATE, a rewrite, and the abort of
 * a transaction that created a table just unlink it, and SET TABLESPACE moves a
 * file elsewhere without a word.  So nobody keeps count; instead somebody looks.
 *
 * Maintenance worker 0 starts the collector, a short-lived worker of its own, every
 * COLLECT_INTERVAL, and soon after es_shared->collect_hint moved.  The collector
 *	 1. asks every shard for the storages that it holds rows of;
 *	 2. takes those whose database is gone as dead;
 *	 3. has a worker in each other database read the metapages of all tables there
 *		(collect_database.c), and notes the next xid before: candidates are those
 *		that no table has;
 *	 4. waits until every transaction that ran at that look is over and no snapshot is
 *		older (OldestXmin has passed the xid), and looks again for the candidates: a
 *		table whose creation was not visible at the first look is at the second, or
 *		never will be;
 *	 5. tells every shard to drop what was found in neither look.
 *
 * Whatever goes wrong on the way (a table is locked, a database cannot be connected to, a shard
 * restarts, no worker slot is free) ends the round without a verdict, and the next one
 * begins from nothing.  The list of storages is always older than the looks, so a
 * storage that is made meanwhile is in no danger.
 *
 * A worker in a database would be in the way of DROP DATABASE and of CREATE DATABASE
 * from it, so it only lives for its look; the waiting is done here, without a database.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/transam.h"
#include "access/xact.h"
#include "catalog/pg_database.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/dsm.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/procarray.h"
#include "tcop/tcopprot.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#include "compat.h"
#include "ipc/channel.h"
#include "ipc/fault.h"
#include "ipc/shmem.h"
#include "maint/maint.h"

#define COLLECT_INTERVAL 300000 /* ms between two rounds without a hint */
#define FIRST_ROUND		 60000	/* ms after the start */
#define HINT_DELAY		 1000	/* ms from a hint to its round */
#define HINT_GAP		 5000	/* ms between two rounds at least */
#define XMIN_POLL		 1000	/* ms */
#define XMIN_PATIENCE	 600000 /* ms; after that the next round begins anew */

/* ---- in maintenance worker 0 ---- */

static BackgroundWorkerHandle *
start_worker(const char *function, const char *name, Oid database, dsm_handle segment)
{
	BackgroundWorker		worker;
	BackgroundWorkerHandle *handle;

	memset(&worker, 0, sizeof(worker));
	worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = BGW_NEVER_RESTART;
	worker.bgw_main_arg = ObjectIdGetDatum(database);
	worker.bgw_notify_pid = MyProcPid;
	strlcpy(worker.bgw_library_name, "event_store", sizeof(worker.bgw_library_name));
	strlcpy(worker.bgw_function_name, function, sizeof(worker.bgw_function_name));
	strlcpy(worker.bgw_name, name, sizeof(worker.bgw_name));
	strlcpy(worker.bgw_type, "event_store collector", sizeof(worker.bgw_type));
	memcpy(worker.bgw_extra, &segment, sizeof(segment));
	return RegisterDynamicBackgroundWorker(&worker, &handle) ? handle : NULL;
}

/* Storages are only asked for when every shard can answer. */
static bool
shards_open(void)
{
	for (int i = 0; i < es_shared->nshards; i++)
		if (pg_atomic_read_u32(&es_shared->shards[i].state) != ES_SHARD_OPEN)
			return false;
	return true;
}

long
es_collect_tick(void)
{
	static BackgroundWorkerHandle *collector = NULL;
	static TimestampTz			   next = 0;
	static TimestampTz			   last = 0;
	static uint32				   seen = 0;
	TimestampTz					   now = GetCurrentTimestamp();
	uint32						   hint = pg_atomic_read_u32(&es_shared->collect_hint);
	pid_t						   pid;

	if (next == 0)
		next = TimestampTzPlusMilliseconds(now, FIRST_ROUND);
	if (collector != NULL)
	{
		switch (GetBackgroundWorkerPid(collector, &pid))
		{
			case BGWH_NOT_YET_STARTED:
			case BGWH_STARTED:
				return XMIN_POLL;
			case BGWH_STOPPED:
			case BGWH_POSTMASTER_DIED:
				break;
		}
		pfree(collector);
		collector = NULL;
	}
	if (hint != seen)
	{
		TimestampTz soon = TimestampTzPlusMilliseconds(now, HINT_DELAY);

		if (last != 0)
			soon = Max(soon, TimestampTzPlusMilliseconds(last, HINT_GAP));
		next = Min(next, soon);
		seen = hint;
	}
	if (now >= next && shards_open())
	{
		MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);

		collector = start_worker("es_collect_main", "event_store collector", InvalidOid, 0);
		MemoryContextSwitchTo(old);
		last = now;
		next = TimestampTzPlusMilliseconds(now, COLLECT_INTERVAL);
	}
	/* nobody wakes us for a hint */
	return Min(XMIN_POLL, Max(1, TimestampDifferenceMilliseconds(now, next)));
}

/* ---- in the collector ---- */

/* A storage that a shard holds rows of. */
typedef struct Candidate
{
	EsTableKey key;
	bool	   dead;	/* its database is gone */
	bool	   missing; /* in no table so far */
} Candidate;

static Candidate *candidates;
static uint32	  ncandidates;

static int
compare_candidates(const void *x, const void *y)
{
	const EsTableKey *a = &((const Candidate *) x)->key;
	const EsTableKey *b = &((const Candidate *) y)->key;

	if (a->database != b->database)
		return a->database < b->database ? -1 : 1;
	if (a->storage_id != b->storage_id)
		return a->storage_id < b->storage_id ? -1 : 1;
	return 0;
}

static void
ask_shards(void)
{
	uint32 allocated = 1024;
	uint32 n = 0;

	candidates = palloc(allocated * sizeof(Candidate));
	for (int shard = 0; shard < es_shared->nshards; shard++)
	{
		EsStatRequest	req;
		const EsAnswer *answer;
		uint64			id = es_request_id();

		memset(&req, 0, sizeof(req));
		req.req.type = ES_REQ_STAT;
		req.req.id = id;
		req.kind = ES_STAT_STORAGES;
		es_channel_connect(shard);
		es_channel_expect(shard, id);
		es_channel_wait_room(shard, sizeof(req));
		es_channel_send(shard, &req.req, &(EsPart){&req, sizeof(req)}, 1, true);
		do
		{
			const EsTableKey *keys;
			uint64			  nkeys;

			answer = es_channel_answer(shard, id);
			keys = (const EsTableKey *) (answer + 1);
			nkeys = (answer->len - sizeof(EsAnswer)) / sizeof(EsTableKey);
			for (uint64 i = 0; i < nkeys; i++)
			{
				if (n == allocated)
				{
					allocated *= 2;
					candidates = repalloc_huge(candidates, (Size) allocated * sizeof(Candidate));
				}
				candidates[n++] = (Candidate){.key = keys[i]};
			}
		} while ((answer->flags & ES_ANSWER_LAST) == 0);
		es_channel_forget(shard, id);
	}

	/* each once */
	qsort(candidates, n, sizeof(Candidate), compare_candidates);
	ncandidates = 0;
	for (uint32 i = 0; i < n; i++)
		if (i == 0 || compare_candidates(&candidates[i - 1], &candidates[i]) != 0)
			candidates[ncandidates++] = candidates[i];
}

/* Databases that are there, ascending. */
static Oid *
list_databases(int *n)
{
	Relation	  rel;
	TableScanDesc scan;
	HeapTuple	  tuple;
	int			  allocated = 64;
	Oid			 *oids = palloc(allocated * sizeof(Oid));
	MemoryContext context = CurrentMemoryContext;

	*n = 0;
	StartTransactionCommand();
	(void) GetTransactionSnapshot();
	rel = table_open(DatabaseRelationId, AccessShareLock);
	scan = table_beginscan_catalog(rel, 0, NULL);
	while (HeapTupleIsValid(tuple = heap_getnext(scan, ForwardScanDirection)))
	{
		if (*n == allocated)
		{
			allocated *= 2;
			oids = repalloc(oids, allocated * sizeof(Oid));
		}
		oids[(*n)++] = ((Form_pg_database) GETSTRUCT(tuple))->oid;
	}
	table_endscan(scan);
	table_close(rel, AccessShareLock);
	CommitTransactionCommand();
	MemoryContextSwitchTo(context);
	CurrentResourceOwner = NULL;
	return oids;
}

/* Removes candidates that are known to be in use. */
static void
keep_missing(void)
{
	uint32 n = 0;

	for (uint32 i = 0; i < ncandidates; i++)
		if (candidates[i].dead || candidates[i].missing)
			candidates[n++] = candidates[i];
	ncandidates = n;
}

static void
mark_dead_databases(void)
{
	int	 n;
	Oid *oids = list_databases(&n);

	for (uint32 i = 0; i < ncandidates; i++)
	{
		candidates[i].dead = true;
		for (int k = 0; k < n; k++)
			if (oids[k] == candidates[i].key.database)
				candidates[i].dead = false;
	}
	pfree(oids);
}

/*
 * A look at the database of candidates [from, to).  False: nothing is known; the
 * candidates then count as in use.
 */
static bool
look_at_database(uint32 from, uint32 to)
{
	uint32					n = to - from;
	dsm_segment			   *segment;
	EsLook				   *look;
	BackgroundWorkerHandle *worker;
	char					name[BGW_MAXLEN];
	bool					complete = false;

	segment = dsm_create(offsetof(EsLook, ids) + n * sizeof(look->ids[0]), DSM_CREATE_NULL_IF_MAXSEGMENTS);
	if (segment == NULL)
		return false;
	look = dsm_segment_address(segment);
	look->database = candidates[from].key.database;
	pg_atomic_init_u32(&look->state, ES_LOOK_RUNNING);
	look->nids = n;
	for (uint32 i = 0; i < n; i++)
	{
		look->ids[i].id = candidates[from + i].key.storage_id;
		look->ids[i].found = 0;
	}
	snprintf(name, sizeof(name), "event_store collector for database %u", look->database);
	worker = start_worker("es_collect_database_main", name, look->database, dsm_segment_handle(segment));
	if (worker != NULL)
	{
		if (WaitForBackgroundWorkerShutdown(worker) == BGWH_POSTMASTER_DIED)
			proc_exit(1);
		complete = pg_atomic_read_u32(&look->state) == ES_LOOK_COMPLETE;
		pfree(worker);
	}
	for (uint32 i = 0; i < n; i++)
		candidates[from + i].missing = complete && look->ids[i].found == 0;
	dsm_detach(segment);
	return complete;
}

static void
look_at_all(void)
{
	for (uint32 i = 0, j; i < ncandidates; i = j)
	{
		for (j = i + 1; j < ncandidates && candidates[j].key.database == candidates[i].key.database; j++)
			;
		if (!candidates[i].dead)
			(void) look_at_database(i, j);
		CHECK_FOR_INTERRUPTS();
	}
	keep_missing();
}

/* Waits until no transaction or snapshot is left that is older than xid. */
static bool
wait_for_xmin(FullTransactionId xid)
{
	static uint32 wait_event = 0;
	TimestampTz	  give_up = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), XMIN_PATIENCE);

	for (;;)
	{
		TransactionId oldest = GetOldestNonRemovableTransactionId(NULL);
		EsFxid		  full = es_widen_xid(U64FromFullTransactionId(ReadNextFullTransactionId()), oldest);

		if (full >= U64FromFullTransactionId(xid))
			return true;
		if (GetCurrentTimestamp() >= give_up)
			return false;
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, XMIN_POLL,
						 es_wait_event(&wait_event, "EventStoreCollector"));
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
}

static void
drop_candidates(void)
{
	Size		   len = offsetof(EsDropRequest, keys) + ncandidates * sizeof(EsTableKey);
	EsDropRequest *req;

	if (ncandidates == 0)
		return;
	req = palloc0(len);
	req->nkeys = ncandidates;
	for (uint32 i = 0; i < ncandidates; i++)
		req->keys[i] = candidates[i].key;
	ES_FAULT("collect-before-drop");
	for (int shard = 0; shard < es_shared->nshards; shard++)
	{
		req->req.type = ES_REQ_DROP_STORAGE;
		req->req.flags = 0;
		pfree(es_channel_call(shard, &req->req, &(EsPart){req, len}, 1));
	}
	ereport(LOG, (errmsg_plural("event_store dropped %u storage that no table has any more",
								"event_store dropped %u storages that no table has any more", ncandidates,
								ncandidates)));
	pfree(req);
}

void
es_collect_main(Datum arg)
{
	FullTransactionId first_look;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnection(NULL, NULL, 0);
	CurrentResourceOwner = NULL;
	MemoryContextSwitchTo(
		AllocSetContextCreate(TopMemoryContext, "event_store collector", ALLOCSET_DEFAULT_SIZES));

	ask_shards();
	mark_dead_databases();
	first_look = ReadNextFullTransactionId();
	look_at_all();
	if (ncandidates > 0)
	{
		ES_FAULT("collect-between-looks");
		if (!wait_for_xmin(first_look))
			proc_exit(0);
		look_at_all();
		drop_candidates();
	}
	proc_exit(0);
}
