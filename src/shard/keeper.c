/*-------------------------------------------------------------------------
 *
 * keeper.c
 *	  The worker that opens the store and holds the replication slot that keeps PostgreSQL's
 *	  WAL for the shards (PROTOCOL.md 6).
 *
 * It opens the store file, acquires or makes the slot, and then says that the store is
 * ready; shards wait for that, so nothing of ours is logged before the slot keeps it.
 * If the store must not be opened the reason lies in shared memory for everybody who asks, and
 * the keeper tries again, slowly: the reason may go away (a release of WAL, a free slot).
 *
 * The slot's restart_lsn follows the minimum of what the synced control blocks of all
 * configured shards say.  A shard that does not run counts with its last one; a clean one
 * needs nothing and does not count until it opens.  The minimum is taken first and
 * the clean flags are read after it: a shard that opens clears its flag before it
 * reads the F it begins with, so whoever was seen as clean begins above every
 * minimum that left it out.  Nothing ever moves back.
 *
 * A keeper that was terminated (the checkpointer does that when the slot exceeds
 * max_slot_wal_keep_size, to invalidate it) exits with 1 and is started again.  If the slot is lost
 * then and the shards live, they still have in memory what they had not written: a new slot is
 * made and all are asked to force everything to their own files at once.
 *
 * When the server stops the keeper stays until the last shard is gone and moves the slot to
 * its final place, which the shutdown checkpoint saves.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <sys/stat.h>

#include "access/xlog.h"
#include "access/xlog_internal.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "replication/slot.h"
#include "storage/fd.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/lwlock.h"
#include "storage/proc.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "ipc/fault.h"
#include "ipc/shmem.h"
#include "shard/files.h"
#include "shard/shard.h"

#define RETRY_MS  5000
#define REPORT_US (60 * USECS_PER_SEC)

/* ---- what others see ---- */

static void
publish_process(PGPROC *proc)
{
	SpinLockAcquire(&es_shared->mutex);
	es_shared->keeper = proc;
	SpinLockRelease(&es_shared->mutex);
}

static void
on_exit_unpublish(int code, Datum arg)
{
	publish_process(NULL);
}

static void
set_ready(void)
{
	pg_atomic_write_u32(&es_shared->store_failed, ES_STORE_NOT_FAILED);
	pg_write_barrier(); /* the constants come before the flag */
	pg_atomic_write_u32(&es_shared->store_ready, 1);
	ConditionVariableBroadcast(&es_shared->store_changed);
}

/* Everybody who asks gets this reason; the log gets it once. */
static void
set_failed(EsStoreFailure failure, int code, const char *message, const char *detail, const char *hint)
{
	char reason[sizeof(es_shared->store_reason)];
	bool told;

	snprintf(reason, sizeof(reason), "%s\n%s\n%s", message, hint ? hint : "", detail ? detail : "");

	SpinLockAcquire(&es_shared->mutex);
	told = pg_atomic_read_u32(&es_shared->store_failed) != 0 && strcmp(es_shared->store_reason, reason) == 0;
	strlcpy(es_shared->store_reason, reason, sizeof(es_shared->store_reason));
	es_shared->store_reason_code = code;
	SpinLockRelease(&es_shared->mutex);
	pg_atomic_write_u32(&es_shared->store_failed, failure);
	ConditionVariableBroadcast(&es_shared->store_changed);

	ereport(told ? DEBUG1 : LOG,
			(errcode(code), errmsg("event_store does not open the store: %s", message),
			 detail ? errdetail_internal("%s", detail) : 0, hint ? errhint("%s", hint) : 0));
}

/* ---- waiting and signals ---- */

/* Exits if the server does not stop: the postmaster starts the next keeper. */
static void
take_interrupts(void)
{
	CHECK_FOR_INTERRUPTS();
	if (ConfigReloadPending)
	{
		ConfigReloadPending = false;
		ProcessConfigFile(PGC_SIGHUP);
	}
	if (ShutdownRequestPending && !es_server_stopping())
	{
		ereport(LOG, (errmsg("event_store keeper was terminated and will be started again")));
		proc_exit(1);
	}
}

static void
keeper_wait(long ms)
{
	static uint32 wait_event = 0;

	(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, ms,
					 es_wait_event(&wait_event, "EventStoreKeeper"));
	ResetLatch(MyLatch);
	take_interrupts();
}

/* ---- the slot ---- */

/* Is the segment with this LSN still there? */
static bool
wal_exists(XLogRecPtr lsn)
{
	char		path[MAXPGPATH];
	XLogSegNo	segno;
	struct stat st;

	XLByteToSeg(lsn, segno, wal_segment_size);
	XLogFilePath(path, GetWALInsertionTimeLine(), segno, wal_segment_size);
	return stat(path, &st) == 0;
}

/*
 * The LSN from which on shards need PostgreSQL's WAL; 0 = nothing moves, because one is not
 * known, or nobody needs anything.  See the head of this file for the order.
 */
static XLogRecPtr
needed_lsn(bool *all_clean)
{
	XLogRecPtr lsn[ES_MAX_SHARDS];
	XLogRecPtr min = InvalidXLogRecPtr;

	*all_clean = true;
	for (int i = 0; i < es_shared->nshards; i++)
		lsn[i] = pg_atomic_read_u64(&es_shared->shards[i].restart_lsn);
	pg_memory_barrier();
	for (int i = 0; i < es_shared->nshards; i++)
	{
		if (pg_atomic_read_u32(&es_shared->shards[i].clean) != 0)
			continue;
		*all_clean = false;
		if (lsn[i] == InvalidXLogRecPtr)
			return InvalidXLogRecPtr;
		if (min == InvalidXLogRecPtr || lsn[i] < min)
			min = lsn[i];
	}
	return min;
}

static void
set_restart_lsn(XLogRecPtr lsn)
{
	ReplicationSlot *slot = MyReplicationSlot;

	SpinLockAcquire(&slot->mutex);
	slot->data.restart_lsn = lsn;
	SpinLockRelease(&slot->mutex);
	ReplicationSlotMarkDirty();
	ReplicationSlotsComputeRequiredLSN();
}

/* Said in our words: PostgreSQL's own refusal names neither who needs the slot nor what to write. */
static void
check_slot_free(void)
{
	bool is_free = false;

	LWLockAcquire(ReplicationSlotControlLock, LW_SHARED);
	for (int i = 0; i < max_replication_slots && !is_free; i++)
		is_free = !ReplicationSlotCtl->replication_slots[i].in_use;
	LWLockRelease(ReplicationSlotControlLock);
	if (!is_free)
		ereport(
			ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("event_store needs a replication slot, but all of them are in use"),
			 errdetail("max_replication_slots is %d.", max_replication_slots),
			 errhint(
				 "Set \"max_replication_slots = %d\" in postgresql.conf and restart the server, or drop a slot that nobody uses any more with pg_drop_replication_slot.",
				 max_replication_slots + 1)));
}

/*
 * A new slot.  It is ephemeral until it keeps something, so that a crash leaves none or a
 * good one.  Where the WAL that the shards need is still there, though nobody
 * kept it, the slot keeps it from now on.
 */
static void
make_slot(void)
{
	XLogRecPtr needed;
	bool	   all_clean;

	check_slot_free();
	es_slot_create(ES_SLOT_NAME, RS_EPHEMERAL);
	ES_FAULT("slot-created");
	ReplicationSlotReserveWal();
	needed = needed_lsn(&all_clean);
	if (needed != InvalidXLogRecPtr && needed < MyReplicationSlot->data.restart_lsn && wal_exists(needed))
		set_restart_lsn(needed);
	ES_FAULT("slot-reserved");
	ReplicationSlotPersist();
	ES_FAULT("slot-persisted");
}

/* The slot is ours when this returns.  live: the shards run, or ran, under an earlier keeper. */
static void
hold_slot(bool live)
{
	bool exists = SearchNamedReplicationSlot(ES_SLOT_NAME, true) != NULL;
	bool lost = live && !exists;

	CheckSlotRequirements();
	if (exists)
	{
		es_slot_acquire(ES_SLOT_NAME);
		if (SlotIsLogical(MyReplicationSlot))
		{
			ReplicationSlotRelease();
			ereport(
				ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("replication slot \"%s\" is a logical one", ES_SLOT_NAME),
				 errhint(
					 "Drop it with pg_drop_replication_slot: event_store needs the name for a physical slot of its own.")));
		}
		if (!es_slot_is_lost(MyReplicationSlot))
			return;
		ReplicationSlotRelease();
		ReplicationSlotDrop(ES_SLOT_NAME, true);
		ES_FAULT("slot-dropped");
		lost = true;
	}
	make_slot();
	if (!lost)
	{
		ereport(LOG, (errmsg("event_store made replication slot \"%s\" at %X/%X", ES_SLOT_NAME,
							 LSN_FORMAT_ARGS(MyReplicationSlot->data.restart_lsn))));
		return;
	}

	ereport(
		WARNING,
		(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
		 errmsg("replication slot \"%s\" was lost; event_store made a new one at %X/%X", ES_SLOT_NAME,
				LSN_FORMAT_ARGS(MyReplicationSlot->data.restart_lsn)),
		 errdetail(
			 "Until every shard has written its own files, a crash may find PostgreSQL's write-ahead log gone."),
		 errhint("Raise max_slot_wal_keep_size, and do not drop the slot.")));
	for (int i = 0; live && i < es_shared->nshards; i++)
	{
		pg_atomic_fetch_add_u32(&es_shared->shards[i].sync_request, 1);
		es_wake_shard(i);
	}
}

/* Moves the slot forward to what the shards need. */
static void
move_slot(void)
{
	bool	   all_clean;
	XLogRecPtr needed = needed_lsn(&all_clean);

	/* all stopped cleanly: what they begin with next time is not before any of these */
	if (all_clean)
	{
		needed = InvalidXLogRecPtr;
		for (int i = 0; i < es_shared->nshards; i++)
		{
			XLogRecPtr lsn = pg_atomic_read_u64(&es_shared->shards[i].restart_lsn);

			if (i == 0 || lsn < needed)
				needed = lsn;
		}
	}
	if (needed != InvalidXLogRecPtr && needed > MyReplicationSlot->data.restart_lsn)
	{
		ES_FAULT("slot-before-move");
		set_restart_lsn(needed);
	}
}

static bool
report_is_due(void)
{
	static TimestampTz last = 0;
	TimestampTz		   now = GetCurrentTimestamp();

	if (last == 0)
		last = now; /* a start takes its time */
	if (now - last < REPORT_US)
		return false;
	last = now;
	return true;
}

/* Tells, once a minute, how much WAL is kept for a store that is not opened. */
static void
report_refused(void)
{
	ReplicationSlot *slot = SearchNamedReplicationSlot(ES_SLOT_NAME, true);
	XLogRecPtr		 flushed = GetFlushRecPtr(NULL);
	XLogRecPtr		 lsn = InvalidXLogRecPtr;

	if (slot == NULL || !report_is_due())
		return;
	SpinLockAcquire(&slot->mutex);
	if (slot->in_use)
		lsn = slot->data.restart_lsn;
	SpinLockRelease(&slot->mutex);
	if (lsn != InvalidXLogRecPtr)
		ereport(LOG, (errmsg("the event store is not open and holds back %llu bytes of write-ahead log",
							 (unsigned long long) (flushed > lsn ? flushed - lsn : 0)),
					  errhint("See the log for the reason why it does not open.")));
}

/*
 * Tells, once a minute, which shards hold WAL back although they take no events.
 */
static void
report_holders(void)
{
	XLogRecPtr flushed;

	if (!report_is_due())
		return;
	flushed = GetFlushRecPtr(NULL);
	for (int i = 0; i < es_shared->nshards; i++)
	{
		EsShardShared *s = &es_shared->shards[i];
		XLogRecPtr	   lsn = pg_atomic_read_u64(&s->restart_lsn);

		if (es_shard_is_open(i) || pg_atomic_read_u32(&s->clean) != 0)
			continue;
		if (lsn == InvalidXLogRecPtr)
			lsn = MyReplicationSlot->data.restart_lsn;
		ereport(
			LOG,
			(errmsg("event_store shard %d is not open and holds back %llu bytes of write-ahead log", i,
					(unsigned long long) (flushed > lsn ? flushed - lsn : 0)),
			 errdetail("PostgreSQL keeps its write-ahead log from %X/%X on until the shard opens.",
					   LSN_FORMAT_ARGS(lsn)),
			 errhint(
				 "See the log for the reason why it does not open. event_store.release_wal(%d) gives up what it has not in its own files.",
				 i)));
	}
}

/* ---- event_store.detach() ---- */

static bool
detaching(void)
{
	EsDetachState state = (EsDetachState) pg_atomic_read_u32(&es_shared->detach);

	return state == ES_DETACH_ASKED || state == ES_DETACH_STOPPING;
}

/* Statements are refused from here on, but those of transactions that have events. */
static void
close_store(void)
{
	for (int i = 0; i < es_shared->nshards; i++)
		pg_atomic_write_u32(&es_shared->shards[i].may_detach, 0);
	pg_memory_barrier(); /* shards say so only after they have seen it closed */
	pg_atomic_write_u32(&es_shared->store_ready, 0);
	set_failed(ES_STORE_CLOSED, ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, "the event store is being detached",
			   "event_store.detach() was called, and waits for transactions that have inserted events.",
			   "Restart the server when it is done, to use it again; or cancel the call.");
}

static bool
shards_may_stop(void)
{
	for (int i = 0; i < es_shared->nshards; i++)
		if (pg_atomic_read_u32(&es_shared->shards[i].may_detach) == 0)
			return false;
	return true;
}

static void
detach_if_asked(void)
{
	uint32 asked = ES_DETACH_ASKED;

	switch ((EsDetachState) pg_atomic_read_u32(&es_shared->detach))
	{
		case ES_ATTACHED:
			/* whoever asked for it has thought better of it */
			if (pg_atomic_read_u32(&es_shared->store_ready) == 0)
			{
				set_ready();
				ereport(LOG, (errmsg("the event store is not detached: event_store.detach() was cancelled")));
			}
			return;
		case ES_DETACH_ASKED:
			if (pg_atomic_read_u32(&es_shared->store_ready) != 0)
				close_store();
			else if (shards_may_stop())
				(void) pg_atomic_compare_exchange_u32(&es_shared->detach, &asked, ES_DETACH_STOPPING);
			for (int i = 0; i < es_shared->nshards; i++)
				es_wake_shard(i);
			return;
		case ES_DETACH_STOPPING:
			break;
		case ES_DETACHED:
			return;
	}

	for (int i = 0; i < es_shared->nshards; i++)
		if (pg_atomic_read_u32(&es_shared->shards[i].state) != ES_SHARD_CLEAN ||
			pg_atomic_read_u32(&es_shared->shards[i].clean) == 0)
			return;

	move_slot();
	es_store_set_detached(true);
	ES_FAULT("detach-before-drop");
	ReplicationSlotRelease();
	ReplicationSlotDrop(ES_SLOT_NAME, true);
	pg_atomic_write_u32(&es_shared->detach, ES_DETACHED);
	set_failed(ES_STORE_REFUSED, ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, "the event store is detached",
			   "event_store.detach() was called.", "Restart the server to use it again.");
	ereport(
		LOG,
		(errmsg("the event store is detached: it is stopped cleanly and replication slot \"%s\" is dropped",
				ES_SLOT_NAME)));
}

/* ---- main ---- */

/* After an ERROR outside of any transaction. */
static void
clean_up(void)
{
	HOLD_INTERRUPTS();
	LWLockReleaseAll();
	ConditionVariableCancelSleep();
	pgstat_report_wait_end();
	AtEOXact_Files(false);
	if (MyReplicationSlot != NULL)
		ReplicationSlotRelease();
	RESUME_INTERRUPTS();
}

/* Opens the store and takes the slot; false if that is refused, with the reason published. */
static bool
try_open(MemoryContext context)
{
	volatile bool opened = false;
	volatile bool live = pg_atomic_read_u32(&es_shared->store_ready) != 0 ||
						 pg_atomic_read_u32(&es_shared->detach) != ES_ATTACHED;

	PG_TRY();
	{
		/* an earlier keeper did it */
		if (!live)
			es_store_open();
		hold_slot(live);
		opened = true;
	}
	PG_CATCH();
	{
		ErrorData *error;

		MemoryContextSwitchTo(context);
		error = CopyErrorData();
		FlushErrorState();
		clean_up();

		/*
		 * While shards live nobody is turned away: they work, but nothing keeps WAL for
		 * them.
		 */
		if (live)
			ereport(WARNING, (errcode(error->sqlerrcode),
							  errmsg("event_store cannot hold its replication slot: %s", error->message),
							  error->detail ? errdetail_internal("%s", error->detail) : 0,
							  error->hint ? errhint("%s", error->hint) : 0));
		else
			set_failed(ES_STORE_REFUSED, error->sqlerrcode, error->message, error->detail, error->hint);
	}
	PG_END_TRY();
	return opened;
}

static void
open_store(void)
{
	MemoryContext context =
		AllocSetContextCreate(TopMemoryContext, "event_store keeper", ALLOCSET_DEFAULT_SIZES);
	MemoryContext old = MemoryContextSwitchTo(context);

	while (!try_open(context))
	{
		MemoryContextReset(context);
		report_refused();
		keeper_wait(RETRY_MS);
		if (ShutdownRequestPending)
			proc_exit(0);
	}
	MemoryContextSwitchTo(old);
	MemoryContextDelete(context);
}

static bool
shards_running(void)
{
	for (int i = 0; i < es_shared->nshards; i++)
	{
		EsShardShared *s = &es_shared->shards[i];
		bool		   running;

		SpinLockAcquire(&s->mutex);
		running = s->proc != NULL;
		SpinLockRelease(&s->mutex);
		if (running)
			return true;
	}
	return false;
}

void
es_keeper_main(Datum arg)
{
	pqsignal(SIGINT, SIG_IGN);
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, SignalHandlerForShutdownRequest);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnection(NULL, NULL, 0);
	before_shmem_exit(on_exit_unpublish, (Datum) 0);
	publish_process(MyProc);

	/* a store that was detached stays so until the server is restarted */
	if (pg_atomic_read_u32(&es_shared->detach) != ES_DETACHED)
	{
		open_store();
		if (pg_atomic_read_u32(&es_shared->detach) == ES_ATTACHED)
			set_ready();
	}

	while (!ShutdownRequestPending)
	{
		if (MyReplicationSlot != NULL)
		{
			move_slot();
			report_holders();
			detach_if_asked();
		}
		/* shards that stop for a detach tell nobody */
		keeper_wait(detaching() ? 100 : 10000);
	}

	/* the server stops: shards finish, and the slot with them */
	while (shards_running())
	{
		if (MyReplicationSlot != NULL)
			move_slot();
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, 100, PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
	if (MyReplicationSlot != NULL)
	{
		move_slot();
		ReplicationSlotRelease();
	}
	ES_FAULT("keeper-before-exit");
	proc_exit(0);
}
