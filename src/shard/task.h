/*-------------------------------------------------------------------------
 *
 * task.h
 *	  Requests that may take longer than one turn of the shard's loop: scans,
 *	  PREPARE of large transactions, VERIFY.
 *
 * A task runs in slices until it is done or waits for its reader; ready tasks take turns.
 * It belongs to one request of one connection and dies with it.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_TASK_H
#define ES_SHARD_TASK_H

#include "postgres.h"

#include "lib/ilist.h"

#include "ipc/server.h"

typedef enum EsTaskState
{
	ES_TASK_MORE,  /* its slice is over */
	ES_TASK_WAITS, /* until es_task_wake, or its reader makes room */
	ES_TASK_DONE   /* all answers are sent: it is released */
} EsTaskState;

typedef struct EsTask EsTask;

struct EsTask
{
	dlist_node	  node;
	EsConn		 *conn;
	uint64		  id;	/* of the request */
	uint16		  type; /* EsRequestType */
	bool		  waits;
	bool		  running;
	MemoryContext context;							  /* the task itself and all its palloc'd memory */
	EsTaskState (*run)(EsTask *task, int64 deadline); /* deadline: es_task_clock() */
	void (*release)(EsTask *task);					  /* what does not lie in context */
};

/* µs of a clock that only goes forward. */
extern int64 es_task_clock(void);

/* Makes a task of `size` bytes (EsTask is its first member), zeroed, in a context of its own. */
extern EsTask *es_task_create(EsConn *conn, const EsRequest *req, Size size, const char *name);

/* Runs the first slice; what is not done then goes on in es_task_run. */
extern void es_task_start(EsTask *task);
/* Releases a task that was not started. */
extern void	   es_task_discard(EsTask *task);
extern EsTask *es_task_find(EsConn *conn, uint64 id);
/* It need not wait any longer: runs a slice. */
extern void es_task_wake(EsTask *task);
/* Ends tasks of a connection (id 0 = all of them); no answer. */
extern void es_task_close(EsConn *conn, uint64 id);
/* Ready tasks take turns for about max_us; true if some are not finished and do not wait. */
extern bool es_task_run(int64 max_us);

#endif /* ES_SHARD_TASK_H */
