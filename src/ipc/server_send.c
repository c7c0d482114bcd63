/*-------------------------------------------------------------------------
 *
 * server_send.c
 *	  The shard's end of all channels: answers.
 *
 * An answer goes straight into the queue as long as nothing is parked before it.  What
 * does not fit is copied and parked; shm_mq may hold the first part of a piece then, and the
 * same bytes are offered again until it has taken all of them.
 *
 * answers_parked = 1 tells the reader that we wait for him: he then gives back the
 * ring space that he has consumed, also where shm_mq alone would not yet, says 2 and sets
 * our latch.  Without his 2 we do not try again: each try would wake him.  A
 * reader who sleeps when the flag is raised is woken once for it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "storage/latch.h"
#include "utils/memutils.h"

#include "ipc/fault.h"
#include "ipc/server_internal.h"

#define MAX_PARTS 16

typedef struct Parked
{
	dlist_node node;
	Size	   len;
	Size	   offset; /* of the piece that is next, or half-sent */
	char	   data[FLEXIBLE_ARRAY_MEMBER];
} Parked;

static dlist_head parked_list = DLIST_STATIC_INIT(parked_list);

/*
 * Sends the message from *offset on, as far as there is room; true if all of it
 * is gone.
 */
static bool
send_from(EsConnection *c, const EsPart *parts, int nparts, Size len, Size *offset)
{
	Size		 ring = es_answer_ring();
	bool		 whole = es_ring_bytes(len) <= ring;
	shm_mq_iovec iov[MAX_PARTS + 2];

	do
	{
		Size	bytes = whole ? len : Min(es_piece_room(ring), len - *offset);
		EsPiece piece = {.type = ES_PIECE_TYPE, .offset = *offset, .total = len};
		int		n = 0;

		if (!whole)
		{
			piece.flags = (*offset == 0 ? ES_PIECE_FIRST : 0) | (*offset + bytes == len ? ES_PIECE_LAST : 0);
			iov[n].data = (const char *) &piece;
			iov[n++].len = sizeof(piece);
		}
		n += es_parts_slice(parts, nparts, *offset, bytes, iov + n);
		/* announced first: the flush wakes the reader, who then finds both; see send_piece() */
		pg_atomic_write_u64(&c->shared->answers, c->answers_sent + 1);
		if (shm_mq_sendv(c->answers, iov, n, true, true) != SHM_MQ_SUCCESS)
			return false;
		c->answers_sent++;
		*offset += bytes;
	} while (*offset < len);
	return true;
}

static void
park(EsConnection *c, const EsPart *parts, int nparts, Size len, Size offset)
{
	Parked *p = MemoryContextAllocExtended(es_server_context, offsetof(Parked, data) + len,
										   MCXT_ALLOC_HUGE | MCXT_ALLOC_NO_OOM);
	char   *out;

	if (p == NULL)
	{
		ereport(LOG, (errcode(ERRCODE_OUT_OF_MEMORY),
					  errmsg("shard %d drops the connection of a session: no memory for an answer",
							 es_server_shard),
					  errdetail("The answer has %zu bytes.", len)));
		es_server_fail(c);
		return;
	}
	p->len = len;
	p->offset = offset;
	out = p->data;
	for (int i = 0; i < nparts; i++)
	{
		memcpy(out, parts[i].data, parts[i].len);
		out += parts[i].len;
	}
	memset(out, 0, p->data + len - out);

	if (dlist_is_empty(&c->parked))
		dlist_push_tail(&parked_list, &c->parked_node);
	dlist_push_tail(&c->parked, &p->node);
	c->parked_bytes += len;

	if (pg_atomic_read_u32(&c->shared->answers_parked) == 0)
	{
		pg_atomic_write_u32(&c->shared->answers_parked, 1);
		es_server_wake(c);
	}
}

void
es_conn_send(EsConn *conn, EsAnswer *answer, const EsPart *parts, int nparts)
{
	EsConnection *c = (EsConnection *) conn;
	EsPart		  message[MAX_PARTS + 1];
	Size		  offset = 0;
	Size		  len;
	int			  n = 0;

	Assert(nparts <= MAX_PARTS - 1);
	if (nparts == 0 || parts[0].data != answer)
	{
		message[n].data = answer;
		message[n++].len = sizeof(EsAnswer);
	}
	for (int i = 0; i < nparts; i++)
		message[n++] = parts[i];
	len = es_parts_len(message, n);
	answer->len = len;

	if (c->failed)
		return;
	if (ES_FAULT_IO("server-answer") != 0)
	{
		es_server_fail(c);
		return;
	}
	if (len > ES_MESSAGE_MAX_LEN)
	{
		es_conn_send_error(conn, answer->type, answer->id, ERRCODE_PROGRAM_LIMIT_EXCEEDED,
						   "an answer of a shard is too large", NULL, NULL);
		return;
	}
	if (!dlist_is_empty(&c->parked) || !send_from(c, message, n, len, &offset))
		park(c, message, n, len, offset);
}

void
es_conn_send_error(EsConn *conn, uint16 type, uint64 id, int sqlerrcode, const char *message,
				   const char *detail, const char *hint)
{
	EsAnswer	answer = {.type = type, .flags = ES_ANSWER_LAST, .sqlerrcode = sqlerrcode, .id = id};
	const char *strings[3] = {message, detail, hint};
	EsPart		parts[4] = {{&answer, sizeof(answer)}};

	for (int i = 0; i < 3; i++)
	{
		parts[i + 1].data = strings[i] != NULL ? strings[i] : "";
		parts[i + 1].len = strlen(parts[i + 1].data) + 1;
	}
	es_conn_send(conn, &answer, parts, 4);
}

Size
es_conn_parked(const EsConn *conn)
{
	return ((const EsConnection *) conn)->parked_bytes;
}

/* Goes on with one connection; true if nothing is parked any more. */
static bool
push(EsConnection *c)
{
	while (!dlist_is_empty(&c->parked))
	{
		Parked *p = dlist_head_element(Parked, node, &c->parked);
		EsPart	part = {p->data, p->len};

		if (!send_from(c, &part, 1, p->len, &p->offset))
			return false;
		dlist_delete(&p->node);
		c->parked_bytes -= p->len;
		pfree(p);
	}
	pg_atomic_write_u32(&c->shared->answers_parked, 0);
	return true;
}

bool
es_server_push_parked(void)
{
	dlist_mutable_iter iter;

	dlist_foreach_modify(iter, &parked_list)
	{
		EsConnection *c = dlist_container(EsConnection, parked_node, iter.cur);
		uint32		  has_read = 2;

		if (!pg_atomic_compare_exchange_u32(&c->shared->answers_parked, &has_read, 1))
			continue;
		if (push(c))
			dlist_delete(&c->parked_node);
	}
	return !dlist_is_empty(&parked_list);
}

void
es_server_drop_parked(EsConnection *c)
{
	if (dlist_is_empty(&c->parked))
		return;
	dlist_delete(&c->parked_node);
	while (!dlist_is_empty(&c->parked))
		pfree(dlist_container(Parked, node, dlist_pop_head_node(&c->parked)));
	c->parked_bytes = 0;
}
