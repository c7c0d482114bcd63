/*-------------------------------------------------------------------------
 *
 * jobs.h
 *	  Work that a shard hands to the maintenance workers: a small table in fixed
 *	  shared memory.  A job's description (which rows) lies in the shard's
 *	  arena (a DSA area that both attach); what comes back is a finished,
 *	  fsynced file whose name begins with pgsql_tmp and a summary, which the shard renames and
 *	  names in its manifest.
 *
 * States: FREE -> POSTED (by the shard, under lock) -> RUNNING (by a worker) ->
 * DONE or FAILED (by the worker) -> FREE (by the shard).  A worker that dies
 * leaves RUNNING: the shard sees that the worker's pid is gone, or another
 * worker starting up finds its own slot's job, and the job is FAILED.  A shard
 * that dies: its new incarnation frees its jobs (a worker notices the
 * generation and gives up).
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_IPC_JOBS_H
#define ES_IPC_JOBS_H

#include "postgres.h"

#include "storage/lwlock.h"
#include "storage/proc.h"
#include "utils/dsa.h"

#include "core/segment.h"

#define ES_MAX_JOBS		   64
#define ES_MAX_MAINTENANCE 8

typedef enum EsJobState
{
	ES_JOB_FREE = 0,
	ES_JOB_POSTED,
	ES_JOB_RUNNING,
	ES_JOB_DONE,
	ES_JOB_FAILED
} EsJobState;

typedef enum EsJobKind
{
	ES_JOB_FLUSH = 1, /* rows of a passive MemTable -> segments */
	ES_JOB_SPILL = 2  /* staged batches of one transaction -> a pending segment; it has
								 * columns of its own: see shard/segments.h */
} EsJobKind;

/* One batch (or part of one) that goes into the segment; array in the arena. */
typedef struct EsJobBatch
{
	dsa_pointer batch;	  /* core/batch.h, in the arena */
	dsa_pointer versions; /* int64[nrows] assigned versions, or 0 */
	dsa_pointer skip;	  /* bitmap of rows to leave out, or 0 */
	EsPosition	base;	  /* position = base + ordinal; with given positions unused */
	EsFxid		fxid;
	uint32		flags; /* ES_FINISH_GIVEN_POSITIONS, ES_FINISH_GIVEN_VERSIONS */
	uint32		reserved;
} EsJobBatch;

typedef struct EsJob
{
	/* written by the shard before POSTED, constant until FREE */
	int			   shard;
	uint32		   shard_generation;
	EsJobKind	   kind;
	EsTableKey	   table;
	uint64		   segment_id; /* name of the file to make: pgsql_tmp.seg.<id> */
	EsFileIdentity identity;   /* of the shard's files */
	dsa_handle	   arena;
	dsa_pointer	   batches; /* EsJobBatch[nbatches] */
	uint32		   nbatches;
	uint32		   spec_flags; /* ES_SEGMENT_* */

	/* under the queue's lock */
	EsJobState state;
	int		   worker_pid;
	uint64	   number; /* in the order of posting; es_job_post fills it */

	/* written by the worker before DONE or FAILED */
	EsSegmentSummary summary;
	int				 sqlerrcode;
	char			 error[256];
} EsJob;

typedef struct EsJobQueue
{
	LWLock *lock;
	PGPROC *workers[ES_MAX_MAINTENANCE]; /* to wake; NULL = not running; under lock */
	uint64	posted;						 /* jobs ever; under lock */
	EsJob	jobs[ES_MAX_JOBS];
} EsJobQueue;

/* Shard: takes a free entry (NULL if there is none), fills it, posts it and wakes a worker. */
extern EsJob *es_job_post(const EsJob *description);
/* Shard: DONE or FAILED?  Then the caller reads it and calls es_job_free. */
extern EsJobState es_job_state(EsJob *job);
extern void		  es_job_free(EsJob *job);
/* Shard at start: frees jobs of its dead incarnations. */
extern void es_jobs_reset_shard(int shard);

/* Worker: registers in slot w; marks a job that a dead predecessor left RUNNING as FAILED. */
extern void es_jobs_register_worker(int w);
/* Worker: takes the oldest POSTED job, or NULL. */
extern EsJob *es_job_take(void);
extern void	  es_job_finish(EsJob *job, EsJobState state); /* wakes the shard */

#endif /* ES_IPC_JOBS_H */
