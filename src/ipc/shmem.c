/*-------------------------------------------------------------------------
 *
 * shmem.c
 *	  Makes the fixed shared memory, gives each process its slot in it, and waits
 *	  for the store and its shards to open.
 *
 * A backend slot belongs to whoever has the PGPROC of its number.  A process
 * clears its slot when it exits: after its transaction was aborted and its DSM
 * segments were detached, before its PGPROC is given back.  So a new owner
 * finds a clear slot; channels alone outlive their owner until the shard has
 * taken what he sent (channel.c).
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xlog.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/shmem.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "event_store.h"
#include "guc.h"
#include "ipc/fault.h"
#include "ipc/jobs.h"
#include "ipc/position.h"
#include "ipc/shmem.h"

/* LWLock tranches, one lock each, so that pg_stat_activity names the lock. */
#define TRANCHE_RESERVE "event_store_reserve"
#define TRANCHE_RING	"event_store_ring"
#define TRANCHE_JOBS	"event_store_jobs"

EsShared *es_shared = NULL;

static EsBackendSlot *my_slot = NULL;

/* ---- size and start ---- */

/* One per process that can ever wait or send: all PGPROCs but those of prepared transactions. */
static int
count_slots(void)
{
	return MaxBackends + NUM_AUXILIARY_PROCS;
}

static Size
shared_size(void)
{
	Size size = CACHELINEALIGN(sizeof(EsShared));

	size = add_size(size, CACHELINEALIGN(sizeof(EsJobQueue)));
	size = add_size(size, mul_size(es_configured_shards,
								   CACHELINEALIGN(ES_READY_WORDS(count_slots()) * sizeof(pg_atomic_uint64))));
	size = add_size(size, mul_size(count_slots(), sizeof(EsBackendSlot)));
	return size;
}

void
es_shmem_request(void)
{
	RequestAddinShmemSpace(shared_size());
	RequestNamedLWLockTranche(TRANCHE_RESERVE, 1);
	RequestNamedLWLockTranche(TRANCHE_RING, 1);
	RequestNamedLWLockTranche(TRANCHE_JOBS, 1);
#ifdef ES_FAULT_POINTS
	es_fault_shmem_request();
#endif
}

static void
init_counters(EsShardCounters *counters)
{
	/* EsShardCounters consists of pg_atomic_uint64 only */
	pg_atomic_uint64 *c = (pg_atomic_uint64 *) counters;

	for (Size i = 0; i < sizeof(EsShardCounters) / sizeof(pg_atomic_uint64); i++)
		pg_atomic_init_u64(&c[i], 0);
}

static void
init_shard(EsShardShared *s, pg_atomic_uint64 *ready)
{
	SpinLockInit(&s->mutex);
	pg_atomic_init_u32(&s->state, ES_SHARD_ABSENT);
	pg_atomic_init_u32(&s->generation, 0);
	pg_atomic_init_u32(&s->paused, 0);
	pg_atomic_init_u32(&s->napping, 0);
	pg_atomic_init_u32(&s->urgent, 0);
	pg_atomic_init_u32(&s->may_detach, 0);
	pg_atomic_init_u32(&s->release_wal, 0);
	pg_atomic_init_u32(&s->stuck_errno, 0);
	pg_atomic_init_u32(&s->sync_request, 0);
	pg_atomic_init_u32(&s->sync_done, 0);
	ConditionVariableInit(&s->changed);
	pg_atomic_init_u64(&s->recovery_start, 0);
	pg_atomic_init_u64(&s->recovery_at, 0);
	pg_atomic_init_u64(&s->recovery_end, 0);
	pg_atomic_init_u64(&s->restart_lsn, 0);
	pg_atomic_init_u32(&s->clean, 0);
	pg_atomic_init_u64(&s->oldest_undecided, 0);
	for (int i = 0; i < ES_TOO_LARGE; i++)
		pg_atomic_init_u64(&s->too_large[i], 0);
	pg_atomic_init_u32(&s->arena, DSM_HANDLE_INVALID);
	init_counters(&s->counters);
	s->ready = ready;
	if (ready != NULL)
	{
		for (int i = 0; i < ES_READY_WORDS(count_slots()); i++)
			pg_atomic_init_u64(&ready[i], 0);
	}
}

static void
init_channel(EsChannelShared *c)
{
	pg_atomic_init_u32(&c->generation, 0);
	pg_atomic_init_u32(&c->closed, 0);
	pg_atomic_init_u32(&c->detached, 0);
	pg_atomic_init_u32(&c->attached, 0);
	pg_atomic_init_u32(&c->failed, 0);
	pg_atomic_init_u64(&c->sent_messages, 0);
	pg_atomic_init_u64(&c->sent_bytes, 0);
	pg_atomic_init_u64(&c->taken_bytes, 0);
	pg_atomic_init_u64(&c->taken_messages, 0);
	pg_atomic_init_u32(&c->room_wanted, 0);
	pg_atomic_init_u32(&c->answers_parked, 0);
	pg_atomic_init_u64(&c->answers, 0);
}

static void
init_slot(EsBackendSlot *slot)
{
	pg_atomic_init_u64(&slot->floor, 0);
	pg_atomic_init_u32(&slot->has_events, 0);
	pg_atomic_init_u32(&slot->dead, DSM_HANDLE_INVALID);
	pg_atomic_init_u64(&slot->lower_bound, 0);
	pg_atomic_init_u64(&slot->fxid, 0);
	pg_atomic_init_u32(&slot->ntables, 0);
	for (int i = 0; i < ES_SLOT_TABLES; i++)
		pg_atomic_init_u64(&slot->tables[i], 0);
	for (int i = 0; i < ES_MAX_SHARDS; i++)
		init_channel(&slot->channels[i]);
}

void
es_shmem_startup(void)
{
	bool  found;
	char *memory;

	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	memory = ShmemInitStruct("event_store", shared_size(), &found);
	es_shared = (EsShared *) memory;
	if (!found)
	{
		memset(memory, 0, shared_size());
		memory += CACHELINEALIGN(sizeof(EsShared));

		pg_atomic_init_u32(&es_shared->store_ready, 0);
		pg_atomic_init_u32(&es_shared->store_failed, 0);
		pg_atomic_init_u32(&es_shared->detach, ES_ATTACHED);
		SpinLockInit(&es_shared->mutex);
		ConditionVariableInit(&es_shared->store_changed);
		es_shared->nshards = es_configured_shards;
		es_shared->nslots = count_slots();

		pg_atomic_init_u64(&es_shared->position_start, 0);
		pg_atomic_init_u64(&es_shared->position_counter, 0);
		pg_atomic_init_u64(&es_shared->reserved_below, 0);
		pg_atomic_init_u64(&es_shared->reserve_announced, 0);
		es_shared->reserve_lock = &GetNamedLWLockTranche(TRANCHE_RESERVE)->lock;
		es_shared->ring_lock = &GetNamedLWLockTranche(TRANCHE_RING)->lock;
		pg_atomic_init_u32(&es_shared->table_waiters, 0);
		pg_atomic_init_u32(&es_shared->spinners, 0);

		es_shared->jobs = (EsJobQueue *) memory;
		es_shared->jobs->lock = &GetNamedLWLockTranche(TRANCHE_JOBS)->lock;
		memory += CACHELINEALIGN(sizeof(EsJobQueue));

		for (int i = 0; i < ES_MAX_SHARDS; i++)
		{
			bool runs = i < es_shared->nshards;

			init_shard(&es_shared->shards[i], runs ? (pg_atomic_uint64 *) memory : NULL);
			if (runs)
				memory += CACHELINEALIGN(ES_READY_WORDS(es_shared->nslots) * sizeof(pg_atomic_uint64));
		}
		es_shared->slots = (EsBackendSlot *) memory;
		for (int i = 0; i < es_shared->nslots; i++)
			init_slot(&es_shared->slots[i]);
	}
#ifdef ES_FAULT_POINTS
	es_fault_shmem_startup();
#endif
	LWLockRelease(AddinShmemInitLock);
}

/* ---- slots ---- */

static void
slot_exit(int code, Datum arg)
{
	EsBackendSlot *slot = my_slot;

	my_slot = NULL;
	if (slot == NULL)
		return;
	if (pg_atomic_read_u64(&slot->lower_bound) != 0)
		es_horizon_clear(slot);
	pg_atomic_write_u64(&slot->floor, 0);
	pg_atomic_write_u32(&slot->dead, DSM_HANDLE_INVALID);

	/* our queues are detached by now; have the shards take what is left and let go */
	for (int i = 0; i < es_shared->nshards; i++)
	{
		EsChannelShared *c = &slot->channels[i];
		uint32			 generation = pg_atomic_read_u32(&c->generation);

		if (generation == pg_atomic_read_u32(&c->detached))
			continue;
		pg_atomic_write_u32(&c->detached, generation);
		es_set_ready(i, slot - es_shared->slots);
		es_wake_shard(i);
	}
	pg_atomic_write_u32(&slot->has_events, 0);
}

int
es_my_slot_number(void)
{
	return es_my_slot() - es_shared->slots;
}

EsBackendSlot *
es_my_slot(void)
{
	if (my_slot == NULL)
	{
		EsBackendSlot *slot;

		Assert(es_shared != NULL && MyProc != NULL);
		Assert(es_proc_number(MyProc) < es_shared->nslots);
		slot = &es_shared->slots[es_proc_number(MyProc)];

		on_shmem_exit(slot_exit, (Datum) 0);
		/* nothing should be left of the PGPROC's last owner; if there were, nobody else would clear it */
		if (pg_atomic_read_u64(&slot->lower_bound) != 0)
			es_horizon_clear(slot);
		pg_atomic_write_u64(&slot->floor, 0);
		pg_atomic_write_u32(&slot->has_events, 0);
		pg_atomic_write_u32(&slot->dead, DSM_HANDLE_INVALID);
		my_slot = slot;
	}
	return my_slot;
}

/* ---- waking ---- */

void
es_set_ready(int shard, int slot_number)
{
	pg_atomic_uint64 *word = &es_shared->shards[shard].ready[slot_number / 64];
	uint64			  bit = UINT64CONST(1) << (slot_number % 64);

	/*
	 * If the bit is still set, the shard will take it and look at the queue after that.
	 * The barrier: what it is to find there was written before we look.
	 */
	pg_memory_barrier();
	if ((pg_atomic_read_u64(word) & bit) == 0)
		pg_atomic_fetch_or_u64(word, bit);
}

/*
 * A pointer is read atomically, and a PGPROC never goes away: if it has another
 * owner by now, that one wakes up once for nothing.
 */
static void
wake(PGPROC *volatile *proc)
{
	PGPROC *p = *proc;

	if (p != NULL)
		SetLatch(&p->procLatch);
}

/*
 * A shard that only takes what needs no answer naps between two looks at its queues, so
 * that writers need no system call to wake it.  It says so before it looks at
 * `urgent` for the last time, and we set that before we ask whether it naps.
 */
void
es_wake_shard(int shard)
{
	EsShardShared *s = &es_shared->shards[shard];
	int			   pid;

	pg_atomic_write_u32(&s->urgent, 1);
	pg_memory_barrier();
	wake(&s->proc);
	if (pg_atomic_read_u32(&s->napping) != 0 && (pid = s->pid) > 0)
		kill(pid, SIGUSR1);
}

void
es_wake_keeper(void)
{
	wake(&es_shared->keeper);
}

void
es_counter_max(pg_atomic_uint64 *c, uint64 n)
{
	uint64 old = pg_atomic_read_u64(c);

	while (old < n && !pg_atomic_compare_exchange_u64(c, &old, n))
		/* old is fresh now */;
}

/* ---- waiting for the store and its shards ---- */

/* A refusal: message, hint and detail, with newlines between. */
pg_attribute_noreturn() static void raise_reason(slock_t *mutex, const int *code_field,
												 const char *reason_field)
{
	char  reason[sizeof(es_shared->store_reason)];
	int	  code;
	char *hint;
	char *detail;

	StaticAssertStmt(sizeof(es_shared->store_reason) == sizeof(es_shared->shards[0].reason),
					 "both reasons fit");
	SpinLockAcquire(mutex);
	code = *code_field;
	memcpy(reason, reason_field, sizeof(reason));
	SpinLockRelease(mutex);

	reason[sizeof(reason) - 1] = '\0';
	hint = strchr(reason, '\n');
	if (hint != NULL)
		*hint++ = '\0';
	detail = hint == NULL ? NULL : strchr(hint, '\n');
	if (detail != NULL)
		*detail++ = '\0';
	ereport(ERROR, (errcode(code != 0 ? code : ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					errmsg_internal("%s", reason[0] != '\0' ? reason : "event_store does not open"),
					detail != NULL && *detail != '\0' ? errdetail_internal("%s", detail) : 0,
					hint != NULL && *hint != '\0' ? errhint("%s", hint) : 0));
}

void
es_require_preload(void)
{
	const char *others = shared_preload_libraries_string;

	if (es_shared != NULL)
		return;
	if (others == NULL)
		others = "";
	ereport(
		ERROR,
		(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE), errmsg("event_store is not loaded"),
		 errhint(
			 "Set \"shared_preload_libraries = '%s%sevent_store'\" in postgresql.conf and restart the server.",
			 others, others[0] != '\0' ? ", " : "")));
}

/* Milliseconds left, at most 1 s so that a lost wake-up costs no more; < 0 = none left. */
static long
time_left(TimestampTz deadline)
{
	TimestampTz now = GetCurrentTimestamp();

	if (now >= deadline)
		return -1;
	return Min(TimestampDifferenceMilliseconds(now, deadline), 1000);
}

static TimestampTz
startup_deadline(void)
{
	return TimestampTzPlusMilliseconds(GetCurrentTimestamp(), (int64) es_guc_startup_timeout);
}

/* Has the own transaction, a parallel worker's leader's, events? */
static bool
has_joined(void)
{
	PGPROC *owner = MyProc->lockGroupLeader != NULL ? MyProc->lockGroupLeader : MyProc;

	return pg_atomic_read_u32(&es_shared->slots[es_proc_number(owner)].has_events) != 0;
}

/* A detach that was taken back is no reason any more: the keeper is about to open the store again. */
static bool
store_refuses(void)
{
	switch ((EsStoreFailure) pg_atomic_read_u32(&es_shared->store_failed))
	{
		case ES_STORE_NOT_FAILED:
			return false;
		case ES_STORE_REFUSED:
			return true;
		case ES_STORE_CLOSED:
			return pg_atomic_read_u32(&es_shared->detach) != ES_ATTACHED;
	}
	return true;
}

void
es_wait_store_ready(void)
{
	static uint32 wait_event = 0;
	TimestampTz	  deadline;
	long		  left;

	if (es_shared != NULL && pg_atomic_read_u32(&es_shared->store_ready) != 0)
	{
		pg_read_barrier(); /* before the constants that store_ready announces */
		return;
	}

	es_require_preload();
	if (RecoveryInProgress())
		ereport(ERROR, (errcode(ERRCODE_CANNOT_CONNECT_NOW),
						errmsg("event tables are not available while the server is a standby or recovers"),
						errhint("Events are written and read on the primary server.")));
	if (!es_has_workers)
		ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						errmsg("events are not available in single-user mode and during pg_upgrade"),
						errhint("Start the server in the usual way.")));
	if (has_joined())
		return; /* it was ready when they came, and is closed for a detach, which waits for us */

	deadline = startup_deadline();
	ConditionVariablePrepareToSleep(&es_shared->store_changed);
	while (pg_atomic_read_u32(&es_shared->store_ready) == 0)
	{
		if (store_refuses())
		{
			ConditionVariableCancelSleep();
			raise_reason(&es_shared->mutex, &es_shared->store_reason_code, es_shared->store_reason);
		}
		left = time_left(deadline);
		if (left < 0)
		{
			ConditionVariableCancelSleep();
			ereport(
				ERROR,
				(errcode(ERRCODE_CANNOT_CONNECT_NOW), errmsg("event_store is starting"),
				 errdetail("Its keeper has not opened the store within event_store.startup_timeout (%d ms).",
						   es_guc_startup_timeout),
				 errhint("Try again, or see the server's log.")));
		}
		(void) ConditionVariableTimedSleep(&es_shared->store_changed, left,
										   es_wait_event(&wait_event, "EventStoreStart"));
	}
	ConditionVariableCancelSleep();
	pg_read_barrier();
}

bool
es_join_store(void)
{
	EsBackendSlot *slot = es_my_slot();

	if (pg_atomic_read_u32(&slot->has_events) != 0)
		return false;
	for (;;)
	{
		pg_atomic_write_u32(&slot->has_events, 1);
		/* either we see that the store was closed, or the shards, which ask after that, see us */
		pg_memory_barrier();
		if (pg_atomic_read_u32(&es_shared->store_ready) != 0)
			return true;
		pg_atomic_write_u32(&slot->has_events, 0);
		es_wait_store_ready();
	}
}

void
es_leave_store(void)
{
	if (my_slot == NULL || pg_atomic_read_u32(&my_slot->has_events) == 0)
		return;
	pg_write_barrier(); /* behind what was sent */
	pg_atomic_write_u32(&my_slot->has_events, 0);
}

/* Why a shard is not open after all the time that we had. */
pg_attribute_noreturn() static void raise_not_open(int shard, EsShardState state)
{
	EsShardShared *s = &es_shared->shards[shard];
	uint64		   start = pg_atomic_read_u64(&s->recovery_start);
	uint64		   at = pg_atomic_read_u64(&s->recovery_at);
	uint64		   end = pg_atomic_read_u64(&s->recovery_end);

	if (state == ES_SHARD_RECOVERING && start != 0 && end > start)
		ereport(
			ERROR,
			(errcode(ERRCODE_CANNOT_CONNECT_NOW), errmsg("shard %d is recovering", shard),
			 errdetail(
				 "It has read PostgreSQL's write-ahead log from %X/%X to %X/%X, %d%% of the way to %X/%X.",
				 LSN_FORMAT_ARGS(start), LSN_FORMAT_ARGS(Max(at, start)),
				 (int) ((Min(Max(at, start), end) - start) * 100 / (end - start)), LSN_FORMAT_ARGS(end)),
			 errhint("Try again later, or raise event_store.startup_timeout.")));
	ereport(ERROR, (errcode(ERRCODE_CANNOT_CONNECT_NOW),
					errmsg("shard %d is %s", shard,
						   state == ES_SHARD_ABSENT		  ? "not running"
						   : state == ES_SHARD_CLEAN	  ? "stopped"
						   : state == ES_SHARD_RECOVERING ? "recovering"
														  : "starting"),
					errhint("Try again later, or see the server's log.")));
}

void
es_wait_shard_open(int shard)
{
	static uint32  wait_event = 0;
	EsShardShared *s;
	TimestampTz	   deadline;

	es_wait_store_ready();
	Assert(shard >= 0 && shard < es_shared->nshards);
	s = &es_shared->shards[shard];
	if (es_shard_is_open(shard))
		return;

	deadline = startup_deadline();
	ConditionVariablePrepareToSleep(&s->changed);
	while (!es_shard_is_open(shard))
	{
		EsShardState state = (EsShardState) pg_atomic_read_u32(&s->state);
		long		 left = time_left(deadline);

		if (state == ES_SHARD_FAILED)
		{
			ConditionVariableCancelSleep();
			raise_reason(&s->mutex, &s->reason_code, s->reason);
		}
		if (left < 0 || state == ES_SHARD_CLEAN)
		{
			ConditionVariableCancelSleep();
			raise_not_open(shard, state);
		}
		(void) ConditionVariableTimedSleep(&s->changed, left,
										   es_wait_event(&wait_event, "EventStoreShardStart"));
	}
	ConditionVariableCancelSleep();
}
