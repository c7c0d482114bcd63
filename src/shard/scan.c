/*-------------------------------------------------------------------------
 *
 * scan.c
 *	  OPEN, FETCH, CLOSE: the life of a scan.
 *
 * OPEN copies what it needs out of the request, takes a view of the table (scan_view.c)
 * and runs the first slice at once: a short replay is answered before the handler
 * returns.  What is longer goes on as a task, in slices.
 *
 * A scan has two phases: committed rows, and the reader's own uncommitted ones, which come
 * last (descending: first).  In each it fills chunks, in any order (scan_any.c) or merged by
 * position (scan_order.c), and puts their rows into answers (scan_output.c).
 *
 * Flow.  Each DATA answer takes one credit; FETCH gives one.  Without credit, or while
 * earlier answers are still parked for the reader, the scan stands still with its view, so
 * a slow reader costs references, not copies.  The answer that ends the scan has LAST and
 * may be empty.  A SERIALIZABLE reader who wants no more rows asks for it with FETCH's STOP: what
 * was skipped up to there has had its part in what he has seen.
 *
 * Damage ends the scan that met it with an error that names file and offset.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "core/batch.h"
#include "shard/engine.h"
#include "shard/scan.h"
#include "shard/shard.h"

#define DEFAULT_BATCH_BYTES (64 * 1024)
#define MAX_BATCH_BYTES		(16 * 1024 * 1024)

/* ---- running ---- */

static bool
next_phase(EsScan *scan)
{
	if (++scan->phase > 1)
		return false;
	scan->own_phase = !scan->own_phase;
	scan->phase_ready = false;
	return true;
}

static EsTaskState
run_scan(EsTask *task, int64 deadline)
{
	EsScan *scan = (EsScan *) task;

	scan->deadline = deadline;
	for (;;)
	{
		EsTaskState state;

		if (scan->full)
		{
			if (scan->credit == 0)
				return ES_TASK_WAITS;
			es_scan_send(scan, false);
			scan->full = false;
			if (es_conn_parked(task->conn) > 0)
				return ES_TASK_MORE;
		}
		if (scan->chunk.n > 0)
		{
			scan->full = es_scan_put_chunk(scan, &scan->chunk) == ES_OUTPUT_FULL;
			if (scan->full)
				continue;
		}
		if (scan->rows_out >= scan->max_rows)
			scan->phase = 2;
		if (scan->phase > 1)
		{
			if (scan->credit == 0)
				return ES_TASK_WAITS;
			es_scan_send(scan, true);
			return ES_TASK_DONE;
		}
		if (es_task_clock() >= deadline)
			return ES_TASK_MORE;

		state =
			scan->ordered ? es_scan_ordered_next(scan, &scan->chunk) : es_scan_any_next(scan, &scan->chunk);
		if (scan->failed)
			return ES_TASK_DONE;
		if (scan->counted + ES_CHUNK_ROWS > ES_BATCH_MAX_ROWS)
			scan->full = true;
		if (state == ES_TASK_DONE)
			(void) next_phase(scan);
	}
}

static void
release_scan(EsTask *task)
{
	EsScan *scan = (EsScan *) task;

	es_scan_close_streams(scan);
	es_block_free(scan->block);
	scan->block = NULL;
	es_scan_output_free(scan);
	es_scan_close_view(scan);
}

/* ---- OPEN ---- */

/* Takes `len` bytes of the request's variable part, padded to 8. */
static const char *
take(const char **p, Size *left, Size len)
{
	const char *at = *p;

	if (len > *left || MAXALIGN64(len) > *left)
		return NULL;
	*p += MAXALIGN64(len);
	*left -= MAXALIGN64(len);
	return at;
}

static const void *
copy(const char *from, Size len)
{
	void *to = palloc(Max(len, 1));

	memcpy(to, from, len);
	return to;
}

/* false: malformed. */
static bool
parse_request(EsScan *scan, const EsOpenRequest *req, Size len)
{
	const char *p = (const char *) (req + 1);
	Size		left = len - sizeof(EsOpenRequest);
	const char *xip;
	const char *dead;
	const char *wanted;
	const char *filters;
	const char *context;

	scan->table = req->table;
	scan->table.reserved = 0;
	scan->flags = req->flags;
	/* a number has no order */
	scan->ordered = (req->order != ES_ORDER_ANY && !(req->flags & ES_OPEN_COUNT_ONLY)) ||
					(req->flags & ES_OPEN_HAS_CONTEXT) != 0;
	scan->descending = req->order == ES_ORDER_POSITION_DESC;
	scan->after = req->after;
	scan->below = req->below != 0 ? req->below : UINT64_MAX;
	scan->bounded = req->after != 0 || req->below != 0;
	scan->max_rows = req->max_rows != 0 ? req->max_rows : UINT64_MAX;
	scan->batch_bytes = req->batch_bytes == 0 ? DEFAULT_BATCH_BYTES : Min(req->batch_bytes, MAX_BATCH_BYTES);
	scan->credit = req->credit;
	scan->natts = req->natts;
	if (req->natts > ES_MAX_COLUMNS)
		return false;

	if ((xip = take(&p, &left, req->nxip * sizeof(EsFxid))) == NULL ||
		(dead = take(&p, &left, req->ndead * sizeof(EsLsn))) == NULL ||
		(wanted = take(&p, &left, (req->natts + 7) / 8)) == NULL ||
		(filters = take(&p, &left, req->filters_len)) == NULL ||
		(context = take(&p, &left, req->context_len)) == NULL)
		return false;

	scan->snapshot.xmin = req->xmin;
	scan->snapshot.xmax = req->xmax;
	scan->snapshot.own = req->own;
	scan->snapshot.curcid = req->curcid;
	scan->snapshot.nxip = req->nxip;
	scan->snapshot.xip = copy(xip, req->nxip * sizeof(EsFxid));
	scan->ndead = req->ndead;
	scan->dead = copy(dead, req->ndead * sizeof(EsLsn));

	scan->wanted = palloc0(Max(req->natts, 1) * sizeof(bool));
	scan->needed = palloc0(Max(req->natts, 1) * sizeof(bool));
	scan->columns = palloc(Max(req->natts, 1) * sizeof(int));
	scan->values = palloc0(Max(req->natts, 1) * sizeof(void *));
	if ((req->flags & ES_OPEN_COUNT_ONLY) == 0)
		for (uint32 i = 0; i < req->natts; i++)
		{
			if (!((wanted[i >> 3] >> (i & 7)) & 1))
				continue;
			scan->wanted[i] = scan->needed[i] = true;
			scan->columns[scan->ncolumns++] = i;
		}
	if (!es_scan_parse_filters(scan, copy(filters, req->filters_len), req->filters_len, req->nfilters))
		return false;
	if (req->flags & ES_OPEN_HAS_CONTEXT)
	{
		scan->context = copy(context, req->context_len);
		scan->context_len = req->context_len;
		scan->context_hash = req->context_hash;
	}
	return true;
}

void
es_handle_open(EsConn *conn, const EsOpenRequest *req, Size len)
{
	MemoryContext old;
	EsScan		 *scan;

	scan = (EsScan *) es_task_create(conn, &req->req, sizeof(EsScan), "event_store scan");
	scan->task.run = run_scan;
	scan->task.release = release_scan;
	old = MemoryContextSwitchTo(scan->task.context);
	if (len < sizeof(EsOpenRequest) || !parse_request(scan, req, len))
	{
		MemoryContextSwitchTo(old);
		es_conn_send_error(conn, ES_REQ_OPEN, req->req.id, ERRCODE_PROTOCOL_VIOLATION,
						   "malformed scan request", "", "");
		es_task_discard(&scan->task);
		return;
	}
	es_scan_open_view(scan);
	scan->own_phase = scan->descending;
	scan->chunk.rows = palloc(ES_CHUNK_ROWS * sizeof(uint32));
	MemoryContextSwitchTo(old);

	if (scan->flags & ES_OPEN_HAS_CONTEXT)
		ES_COUNT(replays, 1);
	else
		ES_COUNT(scans, 1);
	es_task_start(&scan->task);
}

/* ---- FETCH, CLOSE ---- */

void
es_handle_fetch(EsConn *conn, const EsRequest *req)
{
	EsTask *task = es_task_find(conn, req->id);
	EsScan *scan = (EsScan *) task;

	/* it may have ended meanwhile, by its last answer or by an error */
	if (task == NULL || task->type != ES_REQ_OPEN)
		return;
	scan->credit++;
	if (req->flags & ES_FETCH_STOP)
	{
		/* what is built goes with the last answer: the reader throws it away */
		scan->full = false;
		scan->chunk.n = 0;
		scan->max_rows = scan->rows_out;
	}
	es_task_wake(task);
}

void
es_scan_close(EsConn *conn, uint64 id)
{
	es_task_close(conn, id);
}

bool
es_scan_run(int64 max_us)
{
	return es_task_run(max_us);
}
