/*-------------------------------------------------------------------------
 *
 * worker.c
 *	  A maintenance worker: takes jobs of shards and does them, one at a time;
 *	  worker 0 also looks for dead storages while there are none.
 *
 * The worker owns nothing that lasts.  A job that fails, or whose worker dies, is posted
 * again by its shard with a new segment id; the rows are in the shard's memory until
 * the manifest names the finished file.
 *
 * The arena of a shard is attached for the length of a run of jobs and let go when there is
 * nothing to do, so that memory which the shard has given back returns to the system.
 *
 * When the server stops, shards still want their last MemTables written.  Workers get SIGTERM at the same
 * time as everybody else, so they go on until no shard is left that could post a
 * job.  A SIGTERM at any other time (pg_terminate_backend) ends the worker after its
 * job, with status 1, and the postmaster starts another.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <signal.h>

#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/procsignal.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/wait_event.h"

#include "compat.h"
#include "ipc/fault.h"
#include "ipc/jobs.h"
#include "ipc/shmem.h"
#include "maint/maint.h"
#include "shard/files.h"
#include "shard/shard.h"

static volatile sig_atomic_t got_sigterm = false;

/* Attached arenas, one per shard. */
typedef struct Attached
{
	dsa_area  *area;
	dsa_handle handle;
	uint32	   generation;
} Attached;

static Attached attached[ES_MAX_SHARDS];

bool
es_generation_gone(int shard, uint32 generation)
{
	return pg_atomic_read_u32(&es_shared->shards[shard].generation) != generation;
}

static void
handle_sigterm(SIGNAL_ARGS)
{
	int save_errno = errno;

	got_sigterm = true;
	SetLatch(MyLatch);
	errno = save_errno;
}

static void
detach_arena(int shard)
{
	Attached *a = &attached[shard];

	if (a->area != NULL)
		dsa_detach(a->area);
	a->area = NULL;
}

static dsa_area *
attach_arena(int shard, uint32 generation, dsa_handle handle)
{
	Attached *a = &attached[shard];

	if (a->area != NULL && (a->handle != handle || a->generation != generation))
		detach_arena(shard);
	if (a->area == NULL)
	{
		MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);

		a->area = dsa_attach(handle);
		dsa_pin_mapping(a->area);
		a->handle = handle;
		a->generation = generation;
		MemoryContextSwitchTo(old);
	}
	return a->area;
}

static void
run_job(EsJob *job, MemoryContext context)
{
	EsJob		  mine = *job; /* constant until FREE; after a restart of the shard it may become another */
	MemoryContext old = MemoryContextSwitchTo(context);
	char		  activity[96];

	snprintf(activity, sizeof(activity), "shard %d: %s segment %016llx", mine.shard,
			 mine.kind == ES_JOB_SPILL ? "spilling to" : "flushing to", (unsigned long long) mine.segment_id);
	pgstat_report_activity(STATE_RUNNING, activity);
	PG_TRY();
	{
		if (es_generation_gone(mine.shard, mine.shard_generation))
			ereport(ERROR, (errcode(ERRCODE_ADMIN_SHUTDOWN), errmsg("shard %d was restarted", mine.shard)));
		es_build_segment(&mine, attach_arena(mine.shard, mine.shard_generation, mine.arena), &mine.summary);
		ES_FAULT("segment-built");
		job->summary = mine.summary;
		job->sqlerrcode = 0;
		job->error[0] = '\0';
		es_job_finish(job, ES_JOB_DONE);
	}
	PG_CATCH();
	{
		ErrorData *edata;

		MemoryContextSwitchTo(context);
		HOLD_INTERRUPTS();
		edata = CopyErrorData();
		/* a shard that is gone wants no answer, and a new one says itself what went wrong */
		edata->elevel = LOG;
		FlushErrorState();
		job->sqlerrcode = edata->sqlerrcode;
		strlcpy(job->error, edata->message ? edata->message : "unknown error", sizeof(job->error));
		es_job_finish(job, ES_JOB_FAILED);
		if (edata->sqlerrcode != ERRCODE_ADMIN_SHUTDOWN)
			ThrowErrorData(edata);
		RESUME_INTERRUPTS();
	}
	PG_END_TRY();
	pgstat_report_activity(STATE_IDLE, NULL);
	MemoryContextSwitchTo(old);
	MemoryContextReset(context);
}

static bool
shards_left(void)
{
	for (int i = 0; i < es_shared->nshards; i++)
	{
		EsShardShared *shard = &es_shared->shards[i];
		bool		   alive;

		SpinLockAcquire(&shard->mutex);
		alive = shard->proc != NULL;
		SpinLockRelease(&shard->mutex);
		if (alive)
			switch ((EsShardState) pg_atomic_read_u32(&shard->state))
			{
				case ES_SHARD_STARTING:
				case ES_SHARD_RECOVERING:
				case ES_SHARD_OPEN:
				case ES_SHARD_STOPPING:
					return true;
				case ES_SHARD_ABSENT:
				case ES_SHARD_CLEAN:
				case ES_SHARD_FAILED:
					break;
			}
	}
	return false;
}

void
es_maintenance_main(Datum arg)
{
	static uint32 wait_event = 0;
	int			  worker = DatumGetInt32(arg);
	MemoryContext context;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, handle_sigterm);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnection(NULL, NULL, 0);

	/* DSM mappings live until we let go of them; there is no transaction that could own them */
	CurrentResourceOwner = NULL;
	context = AllocSetContextCreate(TopMemoryContext, "event_store job", ALLOCSET_DEFAULT_SIZES);
	es_jobs_register_worker(worker);
	pgstat_report_activity(STATE_IDLE, NULL);

	for (;;)
	{
		EsJob *job;
		long   timeout = 60000;

		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending)
		{
			ConfigReloadPending = false;
			ProcessConfigFile(PGC_SIGHUP);
		}
		if (got_sigterm)
		{
			if (!es_server_stopping())
				proc_exit(1);
			if (!shards_left())
				proc_exit(0);
			timeout = 100;
		}
		job = es_job_take();
		if (job != NULL)
		{
			run_job(job, context);
			continue;
		}
		for (int i = 0; i < ES_MAX_SHARDS; i++)
			detach_arena(i);
		if (worker == 0 && !got_sigterm)
		{
			long wanted = es_collect_tick();

			timeout = Min(timeout, wanted);
		}
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, timeout,
						 es_wait_event(&wait_event, "EventStoreMaintenance"));
	}
}
