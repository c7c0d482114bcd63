/*-------------------------------------------------------------------------
 *
 * worker.c
 *	  The main function of a shard: signals, attach, recovery, the loop, last work, exit.
 *
 * One process, one thread, one event loop.  A turn of the loop takes what the
 * queues hold, applies it, moves log, flush and scans on by a step each, and then waits
 * for the latch, the ring's eventfd or the next timer; the only wait is there.
 *
 * What a drain brings is handled in an order of its own (collect.c): BATCHes
 * at once, FINISHes sorted by start, RESOLVEs, and then whatever has to see all
 * that the ready bitmap showed.
 *
 * How it ends.
 *	 - SIGTERM while the server stops (postmaster.pid says so; workers get the signal
 *	   together with the backends): the shard serves until every backend is gone, flushes
 *	   what is undecided, marks itself clean and exits 0.
 *	 - event_store.detach(): it marks itself clean and waits for the server's end.
 *	 - SIGTERM otherwise, or an ERROR that escapes: exit 1.  The postmaster starts a new
 *	   incarnation, which recovers by itself; the server and other shards go on.
 *	 - It must not open (es_recover raised an ERROR): state FAILED with the reason, which statements
 *	   raise.  The process waits and exits 1, to be tried again; the state stays FAILED until
 *	   a later incarnation gets further.
 *	 - SIGQUIT, SIGKILL, postmaster's death: no last work; the next start recovers.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xlog.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "replication/walsender.h"
#include "replication/walsender_private.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/pmsignal.h"
#include "storage/procarray.h"
#include "storage/procsignal.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/ps_status.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "guc.h"
#include "ipc/fault.h"
#include "ipc/jobs.h"
#include "shard/apply.h"
#include "shard/arena.h"
#include "shard/collect.h"
#include "shard/files.h"
#include "shard/log.h"
#include "shard/segments.h"
#include "shard/shard.h"
#include "shard/uring.h"

/* µs of scanning per turn while other work waits */
#define SCAN_SLICE 1000
#define NAP		   1000L /* µs between two looks at the queues while only commits come */
/* ms between two polls of verdicts, sweeps of connections and the like */
#define POLL_INTERVAL 1000
/* ms until a shard that must not open tries again */
#define RETRY_INTERVAL 10000
/* ms that a stopping server is kept waiting for the last flush: own WAL has it all anyway */
#define LAST_FLUSH 15000
/* ms after which a sync no longer waits for a complete drain */
#define SYNC_PATIENCE 1000

int			   es_shard_id = -1;
EsShardShared *es_shard = NULL;
bool		   es_shard_stopping = false;

static bool			 in_loop = false; /* SIGTERM is looked at by the loop */
static WaitEventSet *wait_set;
static MemoryContext turn_context;

/* ---- state that others see ---- */

static void
set_state(EsShardState state)
{
	pg_atomic_write_u32(&es_shard->state, state);
	ConditionVariableBroadcast(&es_shard->changed);
}

static void
publish_process(PGPROC *proc)
{
	SpinLockAcquire(&es_shard->mutex);
	es_shard->proc = proc;
	es_shard->pid = proc ? MyProcPid : 0;
	SpinLockRelease(&es_shard->mutex);
}

/* However the process ends: nobody sends to it, and nobody waits for what it had. */
static void
on_exit_unpublish(int code, Datum arg)
{
	EsShardState state = pg_atomic_read_u32(&es_shard->state);

	publish_process(NULL);
	pg_atomic_write_u32(&es_shard->arena, DSM_HANDLE_INVALID);
	pg_atomic_write_u32(&es_shard->stuck_errno, 0);
	pg_atomic_fetch_sub_u32(&es_shared->table_waiters, es_wait_count);
	if (state != ES_SHARD_CLEAN && state != ES_SHARD_FAILED)
		set_state(ES_SHARD_ABSENT);
}

void
es_shard_interrupts(void)
{
	if (ProcSignalBarrierPending)
		ProcessProcSignalBarrier();
	if (LogMemoryContextPending)
		ProcessLogMemoryContextInterrupt();
	if (ConfigReloadPending)
	{
		ConfigReloadPending = false;
		ProcessConfigFile(PGC_SIGHUP);
		es_segments_set_cache((Size) es_guc_cache_size * 1024);
	}
	if (ShutdownRequestPending && !in_loop)
		proc_exit(1);
}

/* ---- start ---- */

static void
attach(Datum arg)
{
	es_shard_id = DatumGetInt32(arg);

	/* pg_cancel_backend has nothing to cancel here */
	pqsignal(SIGINT, SIG_IGN);
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, SignalHandlerForShutdownRequest);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnection(NULL, NULL, 0);

	es_shard = &es_shared->shards[es_shard_id];
	turn_context = AllocSetContextCreate(TopMemoryContext, "event_store turn", ALLOCSET_DEFAULT_SIZES);

	before_shmem_exit(on_exit_unpublish, (Datum) 0);
	publish_process(MyProc);
	if (pg_atomic_read_u32(&es_shard->state) != ES_SHARD_FAILED)
		set_state(ES_SHARD_STARTING);

	/* queues and jobs of the last incarnation are dead from here on */
	pg_atomic_fetch_add_u32(&es_shard->generation, 1);
	es_jobs_reset_shard(es_shard_id);
}

/* The store was open and is closed for a detach, which waits for transactions that need this shard, and for it. */
static bool
detach_waits(void)
{
	EsDetachState state = (EsDetachState) pg_atomic_read_u32(&es_shared->detach);

	return state == ES_DETACH_ASKED || state == ES_DETACH_STOPPING;
}

/* The keeper reads or makes the store file first.  It says itself why it cannot. */
static void
wait_for_store(void)
{
	static uint32 wait_event = 0;

	while (pg_atomic_read_u32(&es_shared->store_ready) == 0 && !detach_waits())
	{
		es_shard_interrupts();
		(void) ConditionVariableTimedSleep(&es_shared->store_changed, 1000,
										   es_wait_event(&wait_event, "EventStoreStart"));
	}
	ConditionVariableCancelSleep();
}

/* What this incarnation counts begins at nothing. */
static void
reset_gauges(void)
{
	ES_SET(staged_rows, 0);
	ES_SET(staged_bytes, 0);
	ES_SET(staged_transactions, 0);
	ES_SET(memtable_rows, 0);
	ES_SET(memtable_bytes, 0);
	ES_SET(waiters, 0);
	ES_SET(last_drain, 0);
}

/* The shard must not open: says why, waits, and lets the next incarnation try again. */
static void
refuse(const ErrorData *error)
{
	TimestampTz retry = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), RETRY_INTERVAL);
	char		reason[sizeof(es_shard->reason)];
	bool		told;

	snprintf(reason, sizeof(reason), "%s\n%s\n%s", error->message, error->hint ? error->hint : "",
			 error->detail ? error->detail : "");

	/* a reader copies it under the mutex */
	SpinLockAcquire(&es_shard->mutex);
	told = pg_atomic_read_u32(&es_shard->state) == ES_SHARD_FAILED && strcmp(es_shard->reason, reason) == 0;
	strlcpy(es_shard->reason, reason, sizeof(es_shard->reason));
	es_shard->reason_code = error->sqlerrcode;
	SpinLockRelease(&es_shard->mutex);
	set_state(ES_SHARD_FAILED);

	/* once, not every few seconds */
	ereport(told ? DEBUG1 : LOG,
			(errcode(error->sqlerrcode),
			 errmsg("event_store shard %d does not open: %s", es_shard_id, error->message),
			 error->detail ? errdetail_internal("%s", error->detail) : 0,
			 error->hint ? errhint("%s", error->hint) : 0));

	while (GetCurrentTimestamp() < retry)
	{
		uint32 released = pg_atomic_read_u32(&es_shard->release_wal);

		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, 500, PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
		if (ConfigReloadPending || ShutdownRequestPending ||
			pg_atomic_read_u32(&es_shard->release_wal) != released)
			break;
		es_shard_interrupts();
	}
	proc_exit(1);
}

/* A step of the start; what it throws is why the shard does not open. */
static void
start_step(void (*step)(void))
{
	PG_TRY();
	{
		step();
	}
	PG_CATCH();
	{
		ErrorData *error;

		MemoryContextSwitchTo(TopMemoryContext);
		HOLD_INTERRUPTS();
		error = CopyErrorData();
		FlushErrorState();
		LWLockReleaseAll();
		RESUME_INTERRUPTS();
		refuse(error);
	}
	PG_END_TRY();
}

/* ---- the loop ---- */

static TimestampTz next_poll = 0;
static bool		   sync_begun = false;
static TimestampTz sync_begun_at;

/* Log, disk, manifest, flush: whatever goes on by itself. */
static void
go_on(void)
{
	es_uring_reap();
	es_log_tick();
	es_manifest_tick();
	es_flush_tick();
	es_log_tick();
}

/* Why nothing can be written, 0 = it can. */
static int
stuck_errno(void)
{
	int err = es_log_stuck_errno();

	if (err == 0)
		err = es_manifest_stuck_errno();
	return err != 0 ? err : es_flush_stuck_errno();
}

/* Beyond this the shard takes nothing more until flushes and spills have caught up. */
bool
es_worker_overloaded(void)
{
	return es_flush_overloaded() || es_log_queued_bytes() > (Size) es_guc_memtable_size * 1024;
}

/*
 * A sync of the log reads F and the floors, then the queues are drained, then it is fixed what
 * was taken.  When the drain cannot be completed for long (paused, no memory, a sender that
 * was stopped in the middle of a message), frames become durable all the same,
 * but restart_lsn stays.
 */
static void
sync_begin(TimestampTz now)
{
	if (!sync_begun && es_log_sync_due())
	{
		es_log_sync_begin();
		sync_begun = true;
		sync_begun_at = now;
	}
}

static void
sync_fix(TimestampTz now, bool complete)
{
	if (!sync_begun)
		return;
	if (complete)
		es_log_sync_fix(es_apply_oldest_unframed());
	else if (TimestampDifferenceExceeds(sync_begun_at, now, SYNC_PATIENCE))
		es_log_sync_fix(Max(es_log_restart_lsn(), 1));
	else
		return;
	sync_begun = false;
}

void
es_worker_housekeeping(void)
{
	es_shard_interrupts();
	es_flushed_lsn_refresh();

	/* no queues yet: restart_lsn stays until recovery is over */
	if (es_log_sync_due())
	{
		es_log_sync_begin();
		es_log_sync_fix(Max(es_log_restart_lsn(), 1));
	}
	go_on();
}

/* Waits until something has completed, or timeout ms. */
static void
wait_for_events(long timeout)
{
	static uint32 wait_event = 0;
	WaitEvent	  events[3];

	(void) WaitEventSetWait(wait_set, timeout, events, lengthof(events),
							es_wait_event(&wait_event, "EventStoreShard"));
}

void
es_worker_make_room(void)
{
	do
	{
		ResetLatch(MyLatch);
		es_worker_housekeeping();
		es_apply_poll_verdicts(true);
		es_apply_limit_staging();
		wait_for_events(10);
	} while (es_worker_overloaded() && stuck_errno() != ENOMEM);
}

/*
 * After a turn that took only what needs no answer (commits): sleeps a moment without
 * the latch, so that those who commit meanwhile find a latch that is set or that nobody
 * sleeps on, and need no system call; the next turn takes all of them at once.
 * es_wake_shard ends it with a signal.
 */
static void
nap(long timeout)
{
	pg_atomic_write_u32(&es_shard->napping, 1);
	pg_memory_barrier();
	if (pg_atomic_read_u32(&es_shard->urgent) == 0)
		pg_usleep(Min(timeout * 1000L, NAP));
	pg_atomic_write_u32(&es_shard->napping, 0);
}

static long
earlier(long a, long b)
{
	if (a < 0)
		return b;
	return b < 0 ? a : Min(a, b);
}

/* What everybody may read of us without asking. */
static void
publish(void)
{
	static uint64	  position_ticket = 0;
	static EsPosition position = 0;

	pg_atomic_write_u64(&es_shard->oldest_undecided, es_txn_oldest_undecided());
	ES_SET(flush_distance, es_log_flush_distance(es_flushed_lsn()));
	if (es_log_durable_ticket() >= position_ticket)
	{
		ES_SET(durable_position, position);
		position_ticket = es_log_last_ticket();
		position = es_apply_highest_position;
	}
}

/* Things that are done now and then. */
static void
poll(TimestampTz now)
{
	static TimestampTz next_publish = 0;
	static EsLsn	   polled = 0; /* PostgreSQL's flush pointer then */

	if (now >= next_poll)
	{
		es_apply_poll_verdicts(true);
		es_apply_limit_staging();
		es_server_sweep();
		es_segments_tick();
		next_poll = TimestampTzPlusMilliseconds(now, POLL_INTERVAL);
	}
	else if (es_verdicts_unflushed() && es_flushed_lsn() > polled)
	{
		polled = es_flushed_lsn();
		es_apply_poll_verdicts(false);
	}
	if (es_verdicts_changed())
		es_wait_notice();
	if (now >= next_publish)
	{
		publish();
		next_publish = TimestampTzPlusMilliseconds(now, 100);
	}
}

/*
 * One turn; returns ms that may be waited before the next, 0 = none.  Sets *idle if the
 * queues were seen empty and nothing taken from them is left to do.
 */
static long
turn(bool *idle)
{
	TimestampTz now = GetCurrentTimestamp();
	bool		paused = pg_atomic_read_u32(&es_shard->paused) != 0;
	bool		complete = false;
	bool		busy;
	bool		parked;
	long		timeout;

	es_shard_interrupts();
	es_flushed_lsn_refresh();
	sync_begin(now);

	/* while nothing can be written, writers are refused before they log: reads go on */
	if (!paused && (!es_worker_overloaded() || stuck_errno() != 0))
		complete = es_collect_drain();
	else
		(void) es_collect_apply();
	if (complete)
		es_complete_drains++;
	sync_fix(now, complete);

	go_on();
	pg_atomic_write_u32(&es_shard->stuck_errno, (uint32) stuck_errno());
	es_collect_syncs();
	busy = es_scan_run(SCAN_SLICE);
	busy |= es_memtable_tick();
	parked = es_server_push_parked();
	poll(now);
	timeout = es_wait_tick();

	*idle = complete && !busy && !parked;
	if (busy)
		return 0;
	timeout = earlier(timeout, es_log_timeout());
	timeout = earlier(timeout, es_manifest_timeout());
	timeout = earlier(timeout, es_flush_timeout());
	if (es_verdicts_unflushed())
		timeout = earlier(timeout, 10);
	if (!complete)
		timeout = earlier(timeout, 10);
	if (sync_begun)
		timeout = earlier(timeout, 10);
	return earlier(timeout, Max(TimestampDifferenceMilliseconds(now, next_poll), 1));
}

/* ---- the end ---- */

static bool
is_walsender(int pid)
{
	bool found = false;

	for (int i = 0; i < max_wal_senders && !found; i++)
	{
		WalSnd *walsnd = &WalSndCtl->walsnds[i];

		SpinLockAcquire(&walsnd->mutex);
		found = walsnd->pid == pid;
		SpinLockRelease(&walsnd->mutex);
	}
	return found;
}

/*
 * Is somebody left who may have taken positions or may still send to us?  Whoever is connected to a
 * database: backends, parallel and autovacuum workers, background workers of other
 * libraries; all were told to end.  Walsenders stay until after the last
 * checkpoint and are waited for only as long as they have a transaction.
 * A PGPROC that nobody owns any more may still name its last owner, so the process
 * array is asked.
 */
static bool
backends_left(void)
{
	for (int i = 0; i < MaxBackends; i++)
	{
		PGPROC *proc = GetPGProcByNumber(i);
		int		pid = proc->pid;

		if (pid == 0 || proc == MyProc || !OidIsValid(proc->databaseId) || BackendPidGetProc(pid) != proc)
			continue;
		if (TransactionIdIsValid(proc->xid) || !is_walsender(pid))
			return true;
	}
	for (int i = 0; i < es_shared->nslots; i++)
		if (pg_atomic_read_u64(&es_shared->slots[i].floor) != 0)
			return true;
	return false;
}

/* A turn of the loop and the wait behind it, while nobody is left to be served. */
static void
last_turn(void)
{
	bool idle;
	long timeout;

	ResetLatch(MyLatch);
	timeout = turn(&idle);
	MemoryContextReset(turn_context);
	if (timeout != 0)
		wait_for_events(timeout);
}

/*
 * Everything is taken: makes it durable and says so.  Then there is nothing to recover.  A server that stops does not
 * wait for a full disk; a detach does, for it cannot be taken back any more.
 */
static void
stop_cleanly(void)
{
	TimestampTz		   give_up = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), LAST_FLUSH);
	EsPosition		   next = pg_atomic_read_u64(&es_shared->position_counter);
	dlist_mutable_iter iter;

	/* the walwriter may be gone by now */
	if (es_apply_highest_end > 0)
		XLogFlush(es_apply_highest_end);
	es_flushed_lsn_refresh();
	es_apply_poll_verdicts(true);

	while (!es_flush_idle() && GetCurrentTimestamp() < give_up)
		last_turn();

	/* of transactions that are not decided: only a walsender's can be left */
	dlist_foreach_modify(iter, &es_txn_unframed)
	{
		EsMemBatch *b = dlist_container(EsMemBatch, unframed_node, iter.cur);

		b->unframed = false;
		dlist_delete(&b->unframed_node);
		b->ticket = es_log_append(ES_FRAME_BATCH, b->txn->fxid, b->start, b->end, b->view.base,
								  b->view.header->total_len);
	}

	ES_FAULT("stop-before-clean");
	while (!es_log_close_clean(next))
	{
		es_shard_interrupts();
		if (ShutdownRequestPending && es_server_stopping())
		{
			ereport(LOG, (errmsg("shard %d stops without having written everything", es_shard_id),
						  errdetail("It recovers from PostgreSQL's write-ahead log at the next start.")));
			es_uring_shutdown();
			return;
		}
		ereport(LOG,
				(errmsg("shard %d cannot write what is to be durable before it is detached", es_shard_id),
				 errdetail("It tries again."), errhint("Make room on the disk.")));
	}
	es_uring_shutdown();
	set_state(ES_SHARD_CLEAN);
}

/*
 * The store is closed, nothing is undecided, and no transaction has events, sent or not.  What the last ones sent is
 * taken before the shard stops: by the turn after the one in which it said that it may.
 */
static bool
nothing_to_come(bool idle)
{
	if (!idle || pg_atomic_read_u32(&es_shared->store_ready) != 0 || !dlist_is_empty(&es_txn_undecided))
		return false;
	pg_memory_barrier(); /* es_join_store() */
	for (int i = 0; i < es_shared->nslots; i++)
		if (pg_atomic_read_u32(&es_shared->slots[i].has_events) != 0 ||
			pg_atomic_read_u64(&es_shared->slots[i].floor) != 0 ||
			pg_atomic_read_u64(&es_shared->slots[i].lower_bound) != 0)
			return false;
	return true;
}

/*
 * event_store.detach(): the keeper has closed the store.  Every shard says when it has nothing to wait for any
 * more; when all do the keeper tells them to stop.  Till then it can be taken back.
 */
static bool
may_detach(bool idle)
{
	switch ((EsDetachState) pg_atomic_read_u32(&es_shared->detach))
	{
		case ES_DETACH_ASKED:
			if (pg_atomic_read_u32(&es_shard->may_detach) == 0 && nothing_to_come(idle))
			{
				pg_atomic_write_u32(&es_shard->may_detach, 1);
				es_wake_keeper();
			}
			return false;
		case ES_DETACH_STOPPING:
			return nothing_to_come(idle);
		case ES_ATTACHED:
		case ES_DETACHED:
			break;
	}
	return false;
}

/*
 * Detached, with nothing to do.  But a static worker that exits with 0 is forgotten by the postmaster, and if
 * the server crashes after that the store would be in use again without its shards.
 */
static void
stay_detached(void)
{
	es_server_close_all();
	publish_process(NULL);
	for (;;)
	{
		es_shard_interrupts();
		if (ShutdownRequestPending)
		{
			if (es_server_stopping())
				proc_exit(0);
			/* until then the keeper counts on our being clean */
			if (pg_atomic_read_u32(&es_shared->detach) == ES_DETACHED)
				proc_exit(1);
		}
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 ShutdownRequestPending ? 100 : 60000, PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
	}
}

/* ---- main ---- */

void
es_shard_main(Datum arg)
{
	attach(arg);
	wait_for_store();
	reset_gauges();

	start_step(es_uring_init);
	wait_set = es_create_wait_event_set(3);
	AddWaitEventToSet(wait_set, WL_LATCH_SET, PGINVALID_SOCKET, MyLatch, NULL);
	AddWaitEventToSet(wait_set, WL_EXIT_ON_PM_DEATH, PGINVALID_SOCKET, NULL, NULL);
	if (es_uring_event_fd() != PGINVALID_SOCKET)
		AddWaitEventToSet(wait_set, WL_SOCKET_READABLE, es_uring_event_fd(), NULL, NULL);

	es_arena_init();
	es_txn_init();
	es_memtable_create();
	start_step(es_recover);
	pg_atomic_write_u32(&es_shard->release_wal, 0);

	es_collect_init();
	in_loop = true;
	set_state(ES_SHARD_OPEN);

	/* an ERROR from here on ends the process: bgworker.c reports it and exits with 1 */
	MemoryContextSwitchTo(turn_context);
	for (;;)
	{
		bool   idle;
		long   timeout;
		uint64 taken;
		bool   urgent;

		ResetLatch(MyLatch);
		urgent = pg_atomic_exchange_u32(&es_shard->urgent, 0) != 0;
		taken = pg_atomic_read_u64(&es_shard->counters.messages);
		timeout = turn(&idle);
		taken = pg_atomic_read_u64(&es_shard->counters.messages) - taken;
		MemoryContextReset(turn_context);

		if (ShutdownRequestPending)
		{
			if (!es_shard_stopping)
			{
				if (!es_server_stopping())
					proc_exit(1);
				es_shard_stopping = true;
				set_state(ES_SHARD_STOPPING);
			}
			/* asked before the turn whose drain finds what they sent last */
			if (!backends_left())
			{
				ResetLatch(MyLatch);
				(void) turn(&idle);
				if (idle)
				{
					stop_cleanly();
					proc_exit(0);
				}
			}
			timeout = earlier(timeout, 20);
		}
		else if (may_detach(idle))
		{
			stop_cleanly();
			stay_detached();
		}
		if (timeout != 0 && taken > 0 && idle && !urgent)
			nap(timeout < 0 ? 1 : timeout);
		else if (timeout != 0)
			wait_for_events(timeout);
		else if (!PostmasterIsAlive())
			proc_exit(1);
	}
}
