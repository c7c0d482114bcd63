/*-------------------------------------------------------------------------
 *
 * jobs.c
 *	  The table of work between shards and maintenance workers.
 *
 * All transitions are under one LWLock, held for a look at 64 entries at most.
 * A worker that exits, however it does, fails the job that it was running: an
 * exit callback, so that the shard need not guess.  (A worker that is killed hard takes
 * the whole server down, and the table begins empty.)
 *
 * A job whose shard has died is of no use to anybody: its batches lie in an
 * arena that nobody will describe again.  It is freed by the shard's next incarnation;
 * one that is running is freed by its worker when it is done.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/procarray.h"

#include "ipc/fault.h"
#include "ipc/jobs.h"
#include "ipc/shmem.h"

static int my_worker = -1;

static uint32
generation_of(int shard)
{
	return pg_atomic_read_u32(&es_shared->shards[shard].generation);
}

/*
 * Wakes the workers that run no job: all of them, since one that was woken a moment
 * ago for another job looks just as idle.  Busy ones look for the next job by themselves.
 */
static void
wake_idle_workers(EsJobQueue *q)
{
	for (int w = 0; w < ES_MAX_MAINTENANCE; w++)
	{
		PGPROC *proc = q->workers[w];
		bool	busy = false;

		if (proc == NULL)
			continue;
		for (int i = 0; i < ES_MAX_JOBS && !busy; i++)
			busy = q->jobs[i].state == ES_JOB_RUNNING && q->jobs[i].worker_pid == proc->pid;
		if (!busy)
			SetLatch(&proc->procLatch);
	}
}

EsJob *
es_job_post(const EsJob *description)
{
	EsJobQueue *q = es_shared->jobs;
	EsJob	   *job = NULL;

	LWLockAcquire(q->lock, LW_EXCLUSIVE);
	for (int i = 0; i < ES_MAX_JOBS && job == NULL; i++)
	{
		if (q->jobs[i].state == ES_JOB_FREE)
			job = &q->jobs[i];
	}
	if (job != NULL)
	{
		*job = *description;
		job->worker_pid = 0;
		job->sqlerrcode = 0;
		job->error[0] = '\0';
		job->number = ++q->posted;
		job->state = ES_JOB_POSTED;
		wake_idle_workers(q);
	}
	LWLockRelease(q->lock);
	return job;
}

EsJobState
es_job_state(EsJob *job)
{
	EsJobQueue *q = es_shared->jobs;
	EsJobState	state;

	LWLockAcquire(q->lock, LW_SHARED);
	state = job->state;
	LWLockRelease(q->lock);
	return state;
}

void
es_job_free(EsJob *job)
{
	EsJobQueue *q = es_shared->jobs;

	LWLockAcquire(q->lock, LW_EXCLUSIVE);
	Assert(job->state != ES_JOB_RUNNING && job->state != ES_JOB_FREE);
	job->state = ES_JOB_FREE;
	LWLockRelease(q->lock);
}

void
es_jobs_reset_shard(int shard)
{
	EsJobQueue *q = es_shared->jobs;

	LWLockAcquire(q->lock, LW_EXCLUSIVE);
	for (int i = 0; i < ES_MAX_JOBS; i++)
	{
		EsJob *job = &q->jobs[i];

		if (job->state != ES_JOB_FREE && job->state != ES_JOB_RUNNING && job->shard == shard &&
			job->shard_generation != generation_of(shard))
			job->state = ES_JOB_FREE;
	}
	LWLockRelease(q->lock);
}

/* ---- workers ---- */

/* Sets the state of a job that runs no more; frees it if nobody is there to look.  Lock held. */
static void
end_job(EsJob *job, EsJobState state)
{
	if (job->shard_generation != generation_of(job->shard))
		job->state = ES_JOB_FREE;
	else
		job->state = state;
}

static void
fail_running_jobs(EsJobQueue *q, int pid)
{
	for (int i = 0; i < ES_MAX_JOBS; i++)
	{
		EsJob *job = &q->jobs[i];

		if (job->state != ES_JOB_RUNNING || job->worker_pid != pid)
			continue;
		job->sqlerrcode = ERRCODE_ADMIN_SHUTDOWN;
		strlcpy(job->error, "the maintenance worker has exited", sizeof(job->error));
		end_job(job, ES_JOB_FAILED);
		es_wake_shard(job->shard);
	}
}

static void
worker_exit(int code, Datum arg)
{
	EsJobQueue *q = es_shared->jobs;

	LWLockAcquire(q->lock, LW_EXCLUSIVE);
	fail_running_jobs(q, MyProcPid);
	if (q->workers[my_worker] == MyProc)
		q->workers[my_worker] = NULL;
	/* what was posted to us may have to be done by another one */
	wake_idle_workers(q);
	LWLockRelease(q->lock);
}

void
es_jobs_register_worker(int w)
{
	EsJobQueue *q = es_shared->jobs;

	Assert(w >= 0 && w < ES_MAX_MAINTENANCE && my_worker < 0);
	LWLockAcquire(q->lock, LW_EXCLUSIVE);
	/* our own pid cannot run a job yet: what says so was left by a predecessor of the same pid */
	fail_running_jobs(q, MyProcPid);
	for (int i = 0; i < ES_MAX_JOBS; i++)
	{
		EsJob *job = &q->jobs[i];

		if (job->state == ES_JOB_RUNNING && BackendPidGetProc(job->worker_pid) == NULL)
			fail_running_jobs(q, job->worker_pid);
	}
	q->workers[w] = MyProc;
	my_worker = w;
	LWLockRelease(q->lock);
	on_shmem_exit(worker_exit, (Datum) 0);
}

EsJob *
es_job_take(void)
{
	EsJobQueue *q = es_shared->jobs;
	EsJob	   *oldest = NULL;

	LWLockAcquire(q->lock, LW_EXCLUSIVE);
	for (int i = 0; i < ES_MAX_JOBS; i++)
	{
		EsJob *job = &q->jobs[i];

		if (job->state != ES_JOB_POSTED)
			continue;
		if (job->shard_generation != generation_of(job->shard))
		{
			job->state = ES_JOB_FREE;
			continue;
		}
		if (oldest == NULL || job->number < oldest->number)
			oldest = job;
	}
	if (oldest != NULL)
	{
		oldest->state = ES_JOB_RUNNING;
		oldest->worker_pid = MyProcPid;
	}
	LWLockRelease(q->lock);
	if (oldest != NULL)
		ES_FAULT_ERROR("job-after-take");
	return oldest;
}

void
es_job_finish(EsJob *job, EsJobState state)
{
	EsJobQueue *q = es_shared->jobs;
	int			shard = job->shard;

	Assert(state == ES_JOB_DONE || state == ES_JOB_FAILED);
	ES_FAULT_ERROR("job-before-finish");
	LWLockAcquire(q->lock, LW_EXCLUSIVE);
	Assert(job->state == ES_JOB_RUNNING && job->worker_pid == MyProcPid);
	end_job(job, state);
	LWLockRelease(q->lock);
	es_wake_shard(shard);
}
