/*-------------------------------------------------------------------------
 *
 * collect.c
 *	  What a drain of the queues brings, handled in the order that the protocol wants.
 *
 * A drain takes the ready bitmap until a pass brings nothing that depends on what others have
 * sent.  What comes is handled so:
 *
 *	 1. BATCHes are staged at once, straight from the queue.
 *	 2. FINISHes are copied aside and applied after the passes, sorted by start.  Two FINISHes
 *		of one context come by different queues, and a pass may bring the later one alone
 *		(server.h).  When it was sent, the earlier was in its queue with the ready bit set, so
 *		the next pass brings it; the same holds for whatever starts below the later one.  So
 *		after each pass all FINISHes up to the highest start that was known before the pass are
 *		complete (finish_bound), and no other is applied.
 *	 3. RESOLVEs, when their FINISH was applied.
 *	 4. All other requests, in the order in which they came, when the bitmap was taken once
 *		more since and no FINISH is left: a reader who saw a commit has its rows, and who asks for
 *		a version gets the one behind the last committed (PROTOCOL.md 2.3).
 *
 * So FINISH and BATCH overtake requests of their own connection.  That does no harm: a request that is
 * not answered yet when its transaction commits has nobody who waits for it, and rows
 * of later commands are told by their command ids.
 *
 * What is left when the passes do not come to an end waits for the next drain, and so does
 * everything from a BATCH or FINISH on for which there is no memory; nothing
 * more is taken from the queues until that was applied.
 *
 * Copies of each kind lie in a buffer that grows and is used again; entries refer to it
 * by offset.  Requests have askers that wait, so that what is kept of
 * them is bounded even if a drain stays incomplete for long.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xlog.h"
#include "miscadmin.h"
#include "storage/latch.h"
#include "utils/memutils.h"

#include "ipc/fault.h"
#include "ipc/server.h"
#include "shard/apply.h"
#include "shard/collect.h"
#include "shard/log.h"
#include "shard/shard.h"

/* A buffer that grew beyond this is given back when it is empty. */
#define KEEP_BUFFER (4 * 1024 * 1024)

/* Passes of one drain. */
#define MAX_PASSES 8

typedef struct Entry
{
	EsConn *conn; /* NULL = the connection is gone */
	Size	offset;
	Size	len;
	EsLsn	start; /* of a FINISH */
} Entry;

typedef struct Entries
{
	Entry *array;
	uint32 n;
	uint32 done; /* handled */
	uint32 allocated;
	bool   sorted;
	char  *buffer;
	Size   used;
	Size   size;
} Entries;

/* A SYNC that is not durable yet. */
typedef struct SyncRequest
{
	EsConn *conn; /* NULL = es_shard->sync_request */
	uint64	id;
	uint32	request; /* value of sync_request */
	uint64	ticket;
	uint64	sync;
	EsLsn	end; /* PostgreSQL's WAL must be flushed so far first */
} SyncRequest;

static Entries batches; /* only when memory was short */
static Entries finishes;
static Entries resolves;
static Entries requests;

static EsLsn  finish_seen;	   /* highest start of a FINISH that was taken */
static EsLsn  finish_bound;	   /* FINISHes with starts up to here are complete */
static uint32 requests_due;	   /* of requests: since they came the bitmap was taken once more */
static bool	  complete = true; /* the last drain was: the shard is not paused */

static SyncRequest *syncs;
static int			nsyncs;
static int			syncs_allocated;
static uint32		sync_request_seen;

static void
keep(Entries *e, EsConn *conn, const EsRequest *req, Size len, EsLsn start)
{
	if (e->n == e->allocated)
	{
		e->allocated = Max(64, e->allocated * 2);
		if (e->array == NULL)
			e->array = MemoryContextAlloc(TopMemoryContext, e->allocated * sizeof(Entry));
		else
			e->array = repalloc_huge(e->array, (Size) e->allocated * sizeof(Entry));
	}
	if (MAXALIGN(len) > e->size - e->used)
	{
		Size size = Max(e->size, 64 * 1024);

		while (MAXALIGN(len) > size - e->used)
			size *= 2;
		if (e->buffer == NULL)
			e->buffer = MemoryContextAllocHuge(TopMemoryContext, size);
		else
			e->buffer = repalloc_huge(e->buffer, size);
		e->size = size;
	}
	memcpy(e->buffer + e->used, req, len);
	e->array[e->n++] = (Entry){.conn = conn, .offset = e->used, .len = len, .start = start};
	e->used += MAXALIGN(len);
	e->sorted = false;
}

/*
 * Entries are numbered by array index, and a handler may lead to closed(), which
 * clears conn.  Nothing is added while they are handled: handlers do not drain.
 */
static inline const void *
content(const Entries *e, uint32 i)
{
	return e->buffer + e->array[i].offset;
}

/* All of them are handled. */
static void
reset(Entries *e)
{
	e->n = e->done = 0;
	e->used = 0;
	if (e->size > KEEP_BUFFER)
	{
		pfree(e->buffer);
		e->buffer = NULL;
		e->size = 0;
	}
}

/* ---- the drain ---- */

static bool
stage(const EsBatchRequest *r, Size len)
{
	return es_apply_batch(r->fxid, r->start, r->end, r + 1, len - sizeof(*r), false);
}

static void
on_message(EsConn *conn, const EsRequest *req, Size len)
{
	switch ((EsRequestType) req->type)
	{
		case ES_REQ_BATCH:
		{
			const EsBatchRequest *r = (const EsBatchRequest *) req;

			/* recovery has read it from PostgreSQL's WAL */
			if (r->end <= es_recovery_end)
				return;
			if (batches.n > 0 || !stage(r, len))
				keep(&batches, conn, req, len, 0);
			return;
		}
		case ES_REQ_FINISH:
		{
			const EsFinishRequest *r = (const EsFinishRequest *) req;

			if (r->end <= es_recovery_end)
				return;
			keep(&finishes, conn, req, len, r->start);
			finish_seen = Max(finish_seen, r->start);
			return;
		}
		case ES_REQ_RESOLVE:
			keep(&resolves, conn, req, len, 0);
			return;
		default:
			keep(&requests, conn, req, len, 0);
			return;
	}
}

static void
forget_conn(Entries *e, EsConn *conn)
{
	for (uint32 i = e->done; i < e->n; i++)
		if (e->array[i].conn == conn)
			e->array[i].conn = NULL;
}

/* What was sent before counts all the same: only questions lose their asker. */
static void
on_closed(EsConn *conn)
{
	forget_conn(&batches, conn);
	forget_conn(&finishes, conn);
	forget_conn(&resolves, conn);
	forget_conn(&requests, conn);
	for (int i = 0; i < nsyncs; i++)
		if (syncs[i].conn == conn)
			syncs[i--] = syncs[--nsyncs];
	es_scan_close(conn, 0);
	es_wait_close(conn, 0);
	es_flush_conn_closed(conn);
}

void
es_collect_init(void)
{
	static const EsServerCallbacks callbacks = {.message = on_message, .closed = on_closed};

	sync_request_seen = pg_atomic_read_u32(&es_shard->sync_done);
	es_server_init(es_shard_id, &callbacks);
}

/* ---- SYNC ---- */

static void
add_sync(EsConn *conn, uint64 id, uint32 request)
{
	if (nsyncs == syncs_allocated)
	{
		syncs_allocated = Max(8, syncs_allocated * 2);
		if (syncs == NULL)
			syncs = MemoryContextAlloc(TopMemoryContext, syncs_allocated * sizeof(SyncRequest));
		else
			syncs = repalloc(syncs, syncs_allocated * sizeof(SyncRequest));
	}
	/* frames wait for PostgreSQL's flush: ask for it */
	if (es_apply_highest_end > es_flushed_lsn())
		XLogSetAsyncXactLSN(es_apply_highest_end);
	es_log_want_sync();
	syncs[nsyncs++] = (SyncRequest){.conn = conn,
									.id = id,
									.request = request,
									.ticket = es_log_last_ticket(),
									.sync = es_log_syncs_begun() + 1,
									.end = es_apply_highest_end};
}

void
es_collect_syncs(void)
{
	uint32 request = pg_atomic_read_u32(&es_shard->sync_request);

	/* everything drained so far: the caller has sent what he wants to be durable before */
	if (request != sync_request_seen && complete && batches.n == 0 && finishes.n == 0)
	{
		sync_request_seen = request;
		add_sync(NULL, 0, request);
	}
	for (int i = 0; i < nsyncs; i++)
	{
		SyncRequest *s = &syncs[i];

		if (es_log_syncs_done() < s->sync)
			continue;
		if (es_log_durable_ticket() < s->ticket)
		{
			/* frames that PostgreSQL had not flushed were left out: once more when it has */
			if (es_flushed_lsn() >= s->end)
			{
				s->sync = es_log_syncs_begun() + 1;
				es_log_want_sync();
			}
			continue;
		}
		if (s->conn == NULL)
			pg_atomic_write_u32(&es_shard->sync_done, s->request);
		else
		{
			EsAnswer a = {.type = ES_REQ_SYNC, .flags = ES_ANSWER_LAST, .id = s->id};
			EsPart	 part = {&a, sizeof(a)};

			es_conn_send(s->conn, &a, &part, 1);
		}
		syncs[i--] = syncs[--nsyncs];
	}
}

/* ---- requests ---- */

static void
handle(EsConn *conn, const EsRequest *req, Size len)
{
	switch ((EsRequestType) req->type)
	{
		case ES_REQ_PREPARE:
			es_handle_prepare(conn, (const EsPrepareRequest *) req, len);
			break;
		case ES_REQ_HEAD:
			es_handle_head(conn, (const EsHeadRequest *) req, len);
			break;
		case ES_REQ_OPEN:
			es_handle_open(conn, (const EsOpenRequest *) req, len);
			break;
		case ES_REQ_FETCH:
			es_handle_fetch(conn, req);
			break;
		case ES_REQ_CLOSE:
			es_scan_close(conn, req->id);
			es_wait_close(conn, req->id);
			break;
		case ES_REQ_WAIT:
			es_handle_wait(conn, (const EsWaitRequest *) req, len);
			break;
		case ES_REQ_FLUSH:
			es_handle_flush(conn, (const EsFlushRequest *) req);
			break;
		case ES_REQ_SYNC:
			add_sync(conn, req->id, 0);
			break;
		case ES_REQ_STAT:
			es_handle_stat(conn, (const EsStatRequest *) req);
			break;
		case ES_REQ_UNDECIDED:
			es_handle_undecided(conn, req);
			break;
		case ES_REQ_DROP_STORAGE:
			es_handle_drop_storage(conn, (const EsDropRequest *) req);
			break;
		case ES_REQ_VERIFY:
			es_handle_verify(conn, req);
			break;
		case ES_REQ_ECHO:
		{
			EsAnswer a = {.type = ES_REQ_ECHO, .flags = ES_ANSWER_LAST, .id = req->id};
			EsPart	 parts[2] = {{&a, sizeof(a)}, {req + 1, len - sizeof(EsRequest)}};

			es_conn_send(conn, &a, parts, 2);
			break;
		}
		case ES_REQ_BATCH:
		case ES_REQ_FINISH:
		case ES_REQ_RESOLVE:
			break;
	}
}

/* ---- after the drain ---- */

static int
compare_starts(const void *a, const void *b)
{
	EsLsn x = ((const Entry *) a)->start;
	EsLsn y = ((const Entry *) b)->start;

	return x < y ? -1 : x > y;
}

/* Has the transaction a FINISH that was taken, but not applied? */
static bool
finish_waits(EsFxid fxid)
{
	for (uint32 i = finishes.done; i < finishes.n; i++)
		if (((const EsFinishRequest *) content(&finishes, i))->fxid == fxid)
			return true;
	return false;
}

/* Leaves only what is not handled, so that the buffer does not grow while there always is something. */
static void
compact(Entries *e)
{
	Entries left = {0};

	for (uint32 i = e->done; i < e->n; i++)
		keep(&left, e->array[i].conn, content(e, i), e->array[i].len, e->array[i].start);
	pfree(e->array);
	pfree(e->buffer);
	*e = left;
}

/* False: not all of them. */
static bool
apply_finishes(void)
{
	if (!finishes.sorted && finishes.n - finishes.done > 1)
		qsort(finishes.array + finishes.done, finishes.n - finishes.done, sizeof(Entry), compare_starts);
	finishes.sorted = true;
	for (; finishes.done < finishes.n; finishes.done++)
	{
		const EsFinishRequest *r = content(&finishes, finishes.done);

		if (r->start > finish_bound)
		{
			if (finishes.done > 0)
				compact(&finishes);
			return false;
		}
		if (!es_apply_finish(r->fxid, r->start, r->end, (const EsSectionHeader *) (r + 1),
							 finishes.array[finishes.done].len - sizeof(*r), false))
			return false;
	}
	reset(&finishes);
	return true;
}

static void
apply_resolves(bool all)
{
	Entries left = {0};

	for (; resolves.done < resolves.n; resolves.done++)
	{
		const EsResolveRequest *r = content(&resolves, resolves.done);

		/* an aborted transaction is forgotten by its RESOLVE */
		if (!all && finish_waits(r->fxid))
			keep(&left, resolves.array[resolves.done].conn, &r->req, resolves.array[resolves.done].len, 0);
		else
			es_apply_resolve(r->fxid, r->committed != 0, r->commit_end);
	}
	reset(&resolves);
	if (left.n > 0)
	{
		pfree(resolves.array);
		if (resolves.buffer != NULL)
			pfree(resolves.buffer);
		resolves = left;
	}
}

bool
es_collect_apply(void)
{
	bool all;

	for (; batches.done < batches.n; batches.done++)
		if (!stage(content(&batches, batches.done), batches.array[batches.done].len))
			return false;
	reset(&batches);

	all = apply_finishes();
	apply_resolves(all);
	if (!all || !complete)
		return false;

	while (requests.done < requests_due)
	{
		uint32 i = requests.done++;

		if (requests.array[i].conn != NULL)
			handle(requests.array[i].conn, content(&requests, i), requests.array[i].len);
	}
	if (requests.done == requests.n)
		reset(&requests);
	else if (requests.done > 0)
		compact(&requests);
	requests_due = 0;
	return true;
}

bool
es_collect_drain(void)
{
	bool settled = false;
	int	 count = 0;

	/* No memory: first what was taken, lest the copies grow without bound. */
	if (batches.n > 0 || finishes.n > 0)
	{
		(void) es_collect_apply();
		if (batches.n > 0 || (finishes.n > 0 && finishes.array[finishes.done].start <= finish_bound))
			return false;
	}

	complete = pg_atomic_read_u32(&es_shard->paused) == 0;
	if (!complete)
		return es_collect_apply();
	for (int pass = 0; pass < MAX_PASSES && !settled; pass++)
	{
		uint32 due = requests.n;
		EsLsn  seen = finish_seen;

		count += es_server_take();
		requests_due = due;
		finish_bound = seen;
		settled = requests.n == due && finish_seen == seen;
	}
	if (!settled)
		SetLatch(MyLatch);
	ES_SET(last_drain, count);
	return es_collect_apply();
}
