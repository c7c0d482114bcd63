/*-------------------------------------------------------------------------
 *
 * answer.c
 *	  The backend's end of its channels: receiving answers.
 *
 * An id is expected from es_channel_expect to es_channel_forget.  Whoever waits for one id
 * takes whatever comes on that channel: answers to other expected ids are kept for
 * them (how many there can be is their credit), the rest is thrown away.
 *
 * An answer is copied out of the ring, so that it stays valid while others are
 * received.  The queue is looked at only when the shard's count says that there is something,
 * or when answers are parked: a look at an empty queue gives back what was consumed and
 * wakes the shard, which is what a parked answer needs and nobody else.
 *
 * An id belongs to the generation of the channel over which its request went.  With the
 * generation its answers are lost, and who waits for them gets an error.
 *
 * Who expects an id in a subtransaction or portal that fails does not come back to forget it; so an id
 * belongs to the resource owner that was current, and is forgotten when that one is released.
 *
 * A scan that ends before its last answer must be closed in the shard.  CLOSE is a
 * hint; if there is no room for it the id is kept aside until there is.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <unistd.h>

#include "lib/ilist.h"
#include "storage/latch.h"
#include "storage/spin.h"
#include "utils/memutils.h"
#include "utils/resowner.h"

#include "compat.h"
#include "ipc/channel_internal.h"

#define SPIN_ROUNDS 1000 /* some 50 µs */

/* An answer that came while another one was waited for. */
typedef struct Kept
{
	dlist_node node;
	EsAnswer  *answer;
} Kept;

typedef struct Expected
{
	uint64	   id;
	int		   shard;
	uint32	   generation; /* of the channel its request went over; 0 = not sent yet */
	bool	   open;	   /* the shard has a scan or wait of this id */
	dlist_node node;	   /* in expected, or in closing */
	dlist_head kept;
	EsAnswer  *current;		 /* the last one given out */
	Size	   current_size; /* bytes allocated */

	ResourceOwner owner; /* only to be compared: it may be gone */
} Expected;

typedef struct IdEntry
{
	uint64	  id;
	char	  status;
	Expected *e;
} IdEntry;

#define SH_PREFIX			 ids
#define SH_ELEMENT_TYPE		 IdEntry
#define SH_KEY_TYPE			 uint64
#define SH_KEY				 id
#define SH_HASH_KEY(tb, key) ((uint32) ((key) *UINT64CONST(0x9E3779B97F4A7C15) >> 32))
#define SH_EQUAL(tb, a, b)	 ((a) == (b))
#define SH_SCOPE			 static inline
#define SH_DECLARE
#define SH_DEFINE
#include "lib/simplehash.h"

static ids_hash	 *by_id = NULL;
static dlist_head expected = DLIST_STATIC_INIT(expected);
static dlist_head closing = DLIST_STATIC_INIT(closing); /* forgotten, but CLOSE found no room */

static uint64 last_id = 0;
static bool	  sending_close = false; /* CLOSE is ours */
static uint32 wait_answer = 0;

uint64
es_request_id(void)
{
	return ++last_id;
}

static Expected *
find_expected(uint64 id)
{
	IdEntry *entry = by_id == NULL ? NULL : ids_lookup(by_id, id);

	return entry == NULL ? NULL : entry->e;
}

static void
free_expected(Expected *e)
{
	dlist_mutable_iter iter;

	dlist_foreach_modify(iter, &e->kept)
	{
		Kept *k = dlist_container(Kept, node, iter.cur);

		pfree(k->answer);
		pfree(k);
	}
	if (e->current != NULL)
		pfree(e->current);
	pfree(e);
}

/* ---- CLOSE ---- */

/* Has the shard still something open under this id?  Not if its incarnation is gone. */
static bool
is_open(const Expected *e)
{
	const EsChannel *ch = es_channel_get(e->shard);

	return e->open && e->generation == ch->generation && es_channel_usable(ch);
}

static bool
send_close(Expected *e)
{
	EsRequest req = {.type = ES_REQ_CLOSE, .id = e->id};
	bool	  sent;

	sending_close = true;
	sent = es_channel_hint(e->shard, &req, NULL, 0, true);
	sending_close = false;
	return sent;
}

static void
retry_closing(void)
{
	dlist_mutable_iter iter;

	dlist_foreach_modify(iter, &closing)
	{
		Expected *e = dlist_container(Expected, node, iter.cur);

		if (is_open(e) && !send_close(e))
			continue;
		dlist_delete(&e->node);
		free_expected(e);
	}
}

/* Takes an id out; its memory goes now, or when its CLOSE has found room. */
static void
forget(Expected *e)
{
	ids_delete(by_id, e->id);
	dlist_delete(&e->node);
	if (is_open(e) && !send_close(e))
		dlist_push_tail(&closing, &e->node);
	else
		free_expected(e);
}

/* ---- for channel.c ---- */

bool
es_answer_may_send(const EsChannel *ch, const EsRequest *req)
{
	Expected *e;

	if ((req->type != ES_REQ_FETCH && req->type != ES_REQ_CLOSE) || sending_close)
		return true;
	e = find_expected(req->id);
	/* there is nothing to close, or forget() has done it */
	if (req->type == ES_REQ_CLOSE && (e == NULL || !e->open))
		return false;
	/* a scan of a dead incarnation: whoever waits for its answers will be told */
	return e == NULL || e->generation == 0 || e->generation == ch->generation;
}

void
es_answer_sent(const EsChannel *ch, const EsRequest *req)
{
	Expected *e;

	if (dlist_is_empty(&expected) || (e = find_expected(req->id)) == NULL)
		return;
	e->generation = ch->generation;
	if (req->type == ES_REQ_OPEN || req->type == ES_REQ_WAIT)
		e->open = true;
	else if (req->type == ES_REQ_CLOSE)
		e->open = false;
}

/* ---- expecting ---- */

/* Does not throw: transactions that abort come here, too. */
static void
owner_released(ResourceReleasePhase phase, bool commit, bool top_level, void *arg)
{
	dlist_mutable_iter iter;

	if (phase != RESOURCE_RELEASE_BEFORE_LOCKS || dlist_is_empty(&expected))
		return;
	dlist_foreach_modify(iter, &expected)
	{
		Expected *e = dlist_container(Expected, node, iter.cur);

		if (e->owner == CurrentResourceOwner)
			forget(e);
	}
}

void
es_channel_expect(int shard, uint64 id)
{
	EsChannel *ch = es_channel_get(shard);
	Expected  *e;
	bool	   found;

	if (by_id == NULL)
	{
		by_id = ids_create(es_channel_context, 16, NULL);
		RegisterResourceReleaseCallback(owner_released, NULL);
	}
	if (!dlist_is_empty(&closing))
		retry_closing();

	e = MemoryContextAllocZero(es_channel_context, sizeof(Expected));
	e->id = id;
	e->shard = ch->shard;
	e->owner = CurrentResourceOwner;
	dlist_init(&e->kept);
	ids_insert(by_id, id, &found)->e = e;
	Assert(!found);
	dlist_push_tail(&expected, &e->node);
}

void
es_channel_forget(int shard, uint64 id)
{
	Expected *e = find_expected(id);

	if (e != NULL)
		forget(e);
}

void
es_channel_end_transaction(void)
{
	dlist_mutable_iter iter;

	es_channel_abandon_all();
	dlist_foreach_modify(iter, &expected)
		forget(dlist_container(Expected, node, iter.cur));
	if (!dlist_is_empty(&closing))
		retry_closing();
}

/* ---- receiving ---- */

/* Puts the answer where es_channel_answer's caller may look at it. */
static const EsAnswer *
give_out(Expected *e, const EsAnswer *answer, Size len)
{
	if (e->current_size < len)
	{
		if (e->current != NULL)
			pfree(e->current);
		e->current = NULL;
		e->current_size = 0;
		e->current = MemoryContextAllocHuge(es_channel_context, len);
		e->current_size = len;
	}
	memcpy(e->current, answer, len);
	return e->current;
}

/* The same for an answer in memory of its own, which becomes ours. */
static const EsAnswer *
give_over(Expected *e, EsAnswer *answer)
{
	if (e->current != NULL)
		pfree(e->current);
	e->current = answer;
	e->current_size = answer->len;
	return answer;
}

static void
keep(Expected *e, EsAnswer *answer)
{
	Kept *k = MemoryContextAlloc(es_channel_context, sizeof(Kept));

	k->answer = answer;
	dlist_push_tail(&e->kept, &k->node);
}

/* One shm_mq message, if the queue has one. */
static bool
receive_piece(EsChannel *ch, void **data, Size *len)
{
	bool parked;
	bool received;

	if (ch->answers == NULL)
		return false;
	parked = pg_atomic_read_u32(&ch->shared->answers_parked) != 0;
	if ((int64) (pg_atomic_read_u64(&ch->shared->answers) - ch->answers_taken) <= 0 && !parked)
		return false;
	received = shm_mq_receive(ch->answers, len, data, true) == SHM_MQ_SUCCESS;
	if (received)
		ch->answers_taken++;
	if (parked)
	{
		uint32 expected_value = 1;

		/* there may be room now */
		if (pg_atomic_compare_exchange_u32(&ch->shared->answers_parked, &expected_value, 2))
			es_wake_shard(ch->shard);
	}
	return received;
}

/*
 * Takes answers until one is for `wanted`; keeps those for others.  NULL: nothing
 * is there now.
 */
static const EsAnswer *
receive(EsChannel *ch, Expected *wanted)
{
	void *data;
	Size  len;

	while (receive_piece(ch, &data, &len))
	{
		EsAnswer *answer = data;
		EsAnswer *own = NULL; /* if it is in memory of its own */
		Expected *e;

		if (answer->type == ES_PIECE_TYPE)
		{
			EsJoinResult result = es_join_add(&ch->join, es_channel_context, data, len);

			if (result == ES_JOIN_MORE)
				continue;
			if (result != ES_JOIN_WHOLE)
			{
				Size total = ((const EsPiece *) data)->total;

				/* the rest of it would be taken for garbage: this channel is done */
				ch->broken = true;
				es_join_reset(&ch->join);
				if (result == ES_JOIN_NO_MEMORY)
					ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory"),
									errdetail("An answer of shard %d could not be taken (%zu bytes).",
											  ch->shard, total)));
				elog(ERROR, "event_store: broken answer of shard %d", ch->shard);
			}
			own = answer = (EsAnswer *) ch->join.data;
			len = ch->join.total;
			ch->join.data = NULL;
			es_join_reset(&ch->join);
		}
		Assert(len >= sizeof(EsAnswer) && answer->len == len);

		e = find_expected(answer->id);
		if (e == NULL || e->generation != ch->generation)
		{
			if (own != NULL)
				pfree(own);
			continue;
		}
		if ((answer->flags & ES_ANSWER_LAST) || answer->sqlerrcode != 0)
			e->open = false;
		if (e == wanted)
			return own != NULL ? give_over(e, own) : give_out(e, answer, len);

		if (own == NULL)
		{
			own = MemoryContextAllocHuge(es_channel_context, len);
			memcpy(own, answer, len);
		}
		keep(e, own);
	}
	return NULL;
}

/* Raises the error that an answer brings, if it does. */
static const EsAnswer *
check_answer(const EsAnswer *answer)
{
	const char *strings[3];
	const char *p = (const char *) (answer + 1);
	const char *end = (const char *) answer + answer->len;

	if (answer->sqlerrcode == 0)
		return answer;
	for (int i = 0; i < 3; i++)
	{
		Size len = strnlen(p, end - p);

		strings[i] = pnstrdup(p, len);
		p += Min(len + 1, end - p);
	}
	ereport(ERROR, (errcode(answer->sqlerrcode), errmsg_internal("%s", strings[0]),
					strings[1][0] != '\0' ? errdetail_internal("%s", strings[1]) : 0,
					strings[2][0] != '\0' ? errhint("%s", strings[2]) : 0));
}

/*
 * Sleeping costs two switches of context, more than the shard takes for a small answer.  So one who is
 * alone spins for a moment first, if there is a core for it.
 */
static bool
spin_for_answer(const EsChannel *ch)
{
	static int cores = 0;
	bool	   found = false;

	if (cores == 0)
		cores = (int) sysconf(_SC_NPROCESSORS_ONLN);
	if (cores < 2 || pg_atomic_read_u64(&es_shared->shards[ch->shard].counters.last_drain) > 1)
		return false;
	if (pg_atomic_fetch_add_u32(&es_shared->spinners, 1) == 0)
	{
		for (int i = 0; i < SPIN_ROUNDS && !found; i++)
		{
			SPIN_DELAY();
			found = (int64) (pg_atomic_read_u64(&ch->shared->answers) - ch->answers_taken) > 0;
		}
	}
	pg_atomic_fetch_sub_u32(&es_shared->spinners, 1);
	return found;
}

const EsAnswer *
es_channel_answer_timeout(int shard, uint64 id, long timeout_ms)
{
	EsChannel  *ch = es_channel_get(shard);
	Expected   *e = find_expected(id);
	TimestampTz deadline = 0;
	uint32		wait_event = es_wait_event(&wait_answer, "EventStoreAnswer");
	bool		spin = timeout_ms != 0;

	if (e == NULL)
		elog(ERROR, "event_store: nobody expects an answer to request " UINT64_FORMAT, id);
	if (timeout_ms >= 0)
		deadline = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), timeout_ms);

	for (;;)
	{
		const EsAnswer *answer;

		if (!dlist_is_empty(&e->kept))
		{
			Kept *k = dlist_head_element(Kept, node, &e->kept);

			dlist_delete(&k->node);
			answer = k->answer;
			pfree(k);
			return check_answer(give_over(e, unconstify(EsAnswer *, answer)));
		}
		answer = receive(ch, e);
		if (answer != NULL)
			return check_answer(answer);

		/* what a dead incarnation has sent completely was taken above; more will not come */
		if (e->generation != ch->generation || !es_channel_usable(ch) ||
			es_shared->shards[shard].proc == NULL)
		{
			e->open = false;
			if (e->generation == ch->generation && es_channel_failed(ch))
				es_channel_raise_dropped(ch);
			ereport(ERROR, (errcode(ERRCODE_CANNOT_CONNECT_NOW), errmsg("shard %d was restarted", shard),
							errdetail("The answer to a request of this statement is lost."),
							errhint("Run the transaction again.")));
		}
		if (deadline != 0 && GetCurrentTimestamp() >= deadline)
			return NULL;
		if (spin)
		{
			spin = false;
			if (spin_for_answer(ch))
				continue;
		}
		es_channel_sleep(deadline, wait_event);
	}
}

const EsAnswer *
es_channel_answer(int shard, uint64 id)
{
	return es_channel_answer_timeout(shard, id, -1);
}

EsAnswer *
es_channel_call(int shard, EsRequest *req, const EsPart *parts, int nparts)
{
	const EsAnswer *answer;
	EsAnswer	   *copy;

	if (req->id == 0)
		req->id = es_request_id();
	es_channel_expect(shard, req->id);
	es_channel_wait_room(shard, es_parts_len(parts, nparts) + sizeof(EsRequest));
	es_channel_send(shard, req, parts, nparts, true);
	answer = es_channel_answer(shard, req->id);
	copy = MemoryContextAllocHuge(CurrentMemoryContext, answer->len);
	memcpy(copy, answer, answer->len);
	es_channel_forget(shard, req->id);
	return copy;
}
