/*-------------------------------------------------------------------------
 *
 * flush_request.c
 *	  FLUSH: answered when all that was committed before lies in segments.
 *
 * The request marks the active MemTable, if it has rows, to be flushed at once.  It is answered
 * when that one and all before it are gone, and when the pending segments of transactions that
 * have committed by then are adopted.  Rows of transactions that are not decided go on
 * to later MemTables and are not waited for.
 *
 * While files cannot be written the answer is an error that says why: somebody should know.
 * The shard goes on trying all the same, and a failure that was over before the request
 * came is none: it is tried at least once for it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "shard/apply.h"
#include "shard/engine.h"
#include "shard/flush.h"
#include "shard/shard.h"

#define FLUSH_PATIENCE (2 * ES_FLUSH_RETRY) /* ms until a failure is told */

typedef struct Waiter
{
	dlist_node	node;
	EsConn	   *conn;
	uint64		id;
	uint64		memtable; /* this one and all older ones must be in segments */
	uint64		active;	  /* ... and pending segments adopted that finished up to this one */
	TimestampTz since;
} Waiter;

static dlist_head waiters = DLIST_STATIC_INIT(waiters);

static void
answer(Waiter *w, int sqlerrcode, const char *message, const char *detail)
{
	if (sqlerrcode != 0)
		es_conn_send_error(w->conn, ES_REQ_FLUSH, w->id, sqlerrcode, message, detail,
						   "Events stay in memory and in the shard's own log, and the shard goes on trying.");
	else
	{
		EsAnswer a = {.type = ES_REQ_FLUSH, .flags = ES_ANSWER_LAST, .len = sizeof(a), .id = w->id};

		es_conn_send(w->conn, &a, NULL, 0);
	}
	dlist_delete(&w->node);
	pfree(w);
}

void
es_flush_answer(TimestampTz now)
{
	dlist_mutable_iter iter;
	int				   sqlerrcode;
	char			   detail[320];

	dlist_foreach_modify(iter, &waiters)
	{
		Waiter *w = dlist_container(Waiter, node, iter.cur);

		if (es_flush_retired(w->memtable) && es_adopt_committed(w->active))
			answer(w, 0, NULL, NULL);
	}
	if (!dlist_is_empty(&waiters) && es_flush_trouble(&sqlerrcode, detail, sizeof(detail)))
	{
		char message[96];

		snprintf(message, sizeof(message), "shard %d cannot write its events to segments", es_shard_id);
		dlist_foreach_modify(iter, &waiters)
		{
			Waiter *w = dlist_container(Waiter, node, iter.cur);

			/* what failed before the request came is tried once more for it */
			if (TimestampDifferenceExceeds(w->since, now, FLUSH_PATIENCE))
				answer(w, sqlerrcode, message, detail);
		}
	}
}

void
es_handle_flush(EsConn *conn, const EsFlushRequest *req)
{
	Waiter *w = MemoryContextAllocZero(TopMemoryContext, sizeof(Waiter));

	/* what has committed by now is known as such, also where the hint was lost */
	es_apply_poll_verdicts(true);
	w->conn = conn;
	w->id = req->req.id;
	w->memtable = es_flush_ask();
	w->active = es_memtable_active->id;
	w->since = GetCurrentTimestamp();
	dlist_push_tail(&waiters, &w->node);
	es_flush_tick();
}

void
es_flush_conn_closed(EsConn *conn)
{
	dlist_mutable_iter iter;

	dlist_foreach_modify(iter, &waiters)
	{
		Waiter *w = dlist_container(Waiter, node, iter.cur);

		if (w->conn != conn)
			continue;
		dlist_delete(&w->node);
		pfree(w);
	}
	es_drop_conn_closed(conn);
}
