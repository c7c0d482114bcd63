/*-------------------------------------------------------------------------
 *
 * task.c
 *	  Requests that may take longer than one turn of the shard's loop.
 *
 * There is one list.  es_task_run takes ready tasks from its head and puts
 * them at its tail after a slice, so that they take turns; those that wait for their
 * reader stay where they are and are passed over.  A task waits while it has no
 * credit, or while the connection still has parked bytes: then the reader has not
 * taken what it got, and more would only fill the shard's memory.
 *
 * A slice may raise an ERROR (no memory; CLOG that cannot be read).  It ends the task, not
 * the shard: the client gets the error as its last answer, and locks are let go of.  So what a slice
 * changes outside of its task must be whole, or go on where it was, wherever memory is asked for: the index of a
 * MemTable (memtable.c), cached heads (heads.c), verdicts (txn.c), filters of event ids (event_filter.c).
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "pgstat.h"
#include "portability/instr_time.h"
#include "storage/lwlock.h"
#include "utils/memutils.h"

#include "ipc/fault.h"
#include "shard/shard.h"
#include "shard/task.h"

/* µs that a task gets in one go. */
#define FIRST_SLICE 1000 /* in the handler of its request */
#define SLICE		2000

static dlist_head tasks = DLIST_STATIC_INIT(tasks);

int64
es_task_clock(void)
{
	instr_time now;

	INSTR_TIME_SET_CURRENT(now);
	return (int64) INSTR_TIME_GET_MICROSEC(now);
}

EsTask *
es_task_create(EsConn *conn, const EsRequest *req, Size size, const char *name)
{
	MemoryContext context;
	EsTask		 *task;

	context = AllocSetContextCreateInternal(TopMemoryContext, name, ALLOCSET_DEFAULT_SIZES);
	task = MemoryContextAllocZero(context, size);
	task->context = context;
	task->conn = conn;
	task->id = req->id;
	task->type = req->type;
	return task;
}

static void
release(EsTask *task)
{
	if (task->release != NULL)
		task->release(task);
	MemoryContextDelete(task->context);
}

void
es_task_discard(EsTask *task)
{
	release(task);
}

/* One slice.  false: the task is no more. */
static bool
run_slice(EsTask *task, int64 slice)
{
	MemoryContext caller = CurrentMemoryContext;
	EsTaskState volatile state = ES_TASK_DONE;

	task->running = true;
	MemoryContextSwitchTo(task->context);
	PG_TRY();
	{
		ES_FAULT_ERROR("scan-before-slice");
		state = task->run(task, es_task_clock() + slice);
	}
	PG_CATCH();
	{
		ErrorData *error;

		MemoryContextSwitchTo(task->context);
		HOLD_INTERRUPTS();
		error = CopyErrorData();
		FlushErrorState();
		LWLockReleaseAll();
		pgstat_report_wait_end();
		RESUME_INTERRUPTS();
		ereport(LOG,
				(errcode(error->sqlerrcode),
				 errmsg("event store shard %d could not answer a request: %s", es_shard_id, error->message)));
		es_conn_send_error(task->conn, task->type, task->id, error->sqlerrcode, error->message,
						   error->detail ? error->detail : "", error->hint ? error->hint : "");
		state = ES_TASK_DONE;
	}
	PG_END_TRY();
	MemoryContextSwitchTo(caller);
	task->running = false;

	if (state == ES_TASK_DONE)
	{
		if (task->node.next != NULL)
			dlist_delete(&task->node);
		release(task);
		return false;
	}
	task->waits = state == ES_TASK_WAITS;
	return true;
}

void
es_task_start(EsTask *task)
{
	if (run_slice(task, FIRST_SLICE))
		dlist_push_tail(&tasks, &task->node);
}

EsTask *
es_task_find(EsConn *conn, uint64 id)
{
	dlist_iter iter;

	dlist_foreach(iter, &tasks)
	{
		EsTask *task = dlist_container(EsTask, node, iter.cur);

		if (task->conn == conn && task->id == id)
			return task;
	}
	return NULL;
}

void
es_task_wake(EsTask *task)
{
	task->waits = false;
	if (es_conn_parked(task->conn) == 0)
		(void) run_slice(task, FIRST_SLICE);
}

void
es_task_close(EsConn *conn, uint64 id)
{
	dlist_mutable_iter iter;

	dlist_foreach_modify(iter, &tasks)
	{
		EsTask *task = dlist_container(EsTask, node, iter.cur);

		if (task->conn != conn || (id != 0 && task->id != id))
			continue;
		Assert(!task->running);
		dlist_delete(&task->node);
		release(task);
	}
}

bool
es_task_run(int64 max_us)
{
	int64	   end;
	dlist_iter iter;

	if (dlist_is_empty(&tasks))
		return false;

	end = es_task_clock() + max_us;
	for (;;)
	{
		EsTask *ready = NULL;

		dlist_foreach(iter, &tasks)
		{
			EsTask *task = dlist_container(EsTask, node, iter.cur);

			if (!task->waits && es_conn_parked(task->conn) == 0)
			{
				ready = task;
				break;
			}
		}
		if (ready == NULL)
			return false;
		if (es_task_clock() >= end)
			return true;
		dlist_delete(&ready->node);
		dlist_push_tail(&tasks, &ready->node);
		(void) run_slice(ready, SLICE);
	}
}
