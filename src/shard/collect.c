/*-------------------------------------------------------------------------
 *
 * collect.c
 *	  What a drain of the queues brings, handled in the order that the protocol wants.
 *
 *	 1. BATCHes are staged during the drain, straight from the queue.
 *	 2. FINISHes are copied aside and applied after it, sorted by start.  Two FINISHes
 *		of one context come by different queues, and the bitmap may show the later
 *		one first; by the time the later one was logged the earlier was in its queue
 *		with the ready bit set, so a drain that finds the later finds both.
 *	 3. RESOLVEs.
 *	 4. All other requests, in the order in which they came, and only if the
 *		drain was complete: a reader who saw a commit has its rows (PROTOCOL.md 2.3).
 *
 * Otherwise they wait, together with what came later, for the next drain.  When the
 * arena has no memory for a BATCH or FINISH, everything from there on waits
 * and no more is taken from the queues until it was applied.
 *
 * Copies of each kind lie in a buffer that grows and is used again; entries refer to it
 * by offset.  Requests have askers that wait, so that what is kept of
 * them is bounded even if a drain stays incomplete for long.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xlog.h"
#include "utils/memutils.h"

#include "ipc/fault.h"
#include "ipc/server.h"
#include "shard/apply.h"
#include "shard/collect.h"
#include "shard/log.h"
#include "shard/shard.h"

/* A buffer that grew beyond this is given back when it is empty. */
#define KEEP_BUFFER (4 * 1024 * 1024)

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

static bool complete = true; /* the last drain was */

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

bool
es_collect_apply(void)
{
	for (; batches.done < batches.n; batches.done++)
		if (!stage(content(&batches, batches.done), batches.array[batches.done].len))
			return false;
	reset(&batches);

	if (!finishes.sorted && finishes.n - finishes.done > 1)
		qsort(finishes.array + finishes.done, finishes.n - finishes.done, sizeof(Entry), compare_starts);
	finishes.sorted = true;
	for (; finishes.done < finishes.n; finishes.done++)
	{
		const EsFinishRequest *r = content(&finishes, finishes.done);

		if (!es_apply_finish(r->fxid, r->start, r->end, (const EsSectionHeader *) (r + 1),
							 finishes.array[finishes.done].len - sizeof(*r), false))
			return false;
	}
	reset(&finishes);

	for (; resolves.done < resolves.n; resolves.done++)
	{
		const EsResolveRequest *r = content(&resolves, resolves.done);

		es_apply_resolve(r->fxid, r->committed != 0, r->commit_end);
	}
	reset(&resolves);

	if (!complete)
		return false;
	while (requests.done < requests.n)
	{
		uint32 i = requests.done++;

		if (requests.array[i].conn != NULL)
			handle(requests.array[i].conn, content(&requests, i), requests.array[i].len);
	}
	reset(&requests);
	return true;
}

bool
es_collect_drain(void)
{
	/* No memory: first what was taken, lest the copies grow without bound. */
	if (batches.n > 0 || finishes.n > 0)
	{
		(void) es_collect_apply();
		if (batches.n > 0 || finishes.n > 0)
			return false;
	}
	es_server_drain(&complete);
	return es_collect_apply();
}
