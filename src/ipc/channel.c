/*-------------------------------------------------------------------------
 *
 * channel.c
 *	  The backend's end of its channels: connecting, room, sending.
 *
 * Connecting.  A pair of queues belongs to one generation of the channel.  The owner
 * makes it in memory that no shard process uses any more, announces it
 * (generation, ready bit) and waits until the shard has attached.  The
 * wait matters: what lies in a queue that nobody else has mapped is gone when this
 * process exits, although its transaction may have committed.  Once attached, the
 * shard's mapping keeps what was sent until the shard has taken it.
 *
 * Room.  shm_mq gives ring space back late: the receiver publishes what it has consumed
 * only beyond a quarter of the ring, or when it finds the queue empty.  So the
 * shard counts in taken_bytes what shm_mq has certainly published (server.c), and sent - taken
 * is never less than what shm_mq holds: what has room by this count is sent at
 * once.  A sender who needs more sets room_wanted and the ready bit; the shard then takes
 * what is there, publishes all, and sets his latch once.
 *
 * Sending.  See piece.h for long messages.  Counts and ready bit move before the bytes are
 * flushed, and so before the message counts as sent.  What is in the queue of a
 * dead incarnation is lost, and may be: it was logged before that one's
 * successor logged its MARK, so it is found in PostgreSQL's WAL; or else the sender has seen the
 * new generation and sends it there (the shard's generation moves before the MARK).
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "utils/memutils.h"

#include "compat.h"
#include "guc.h"
#include "ipc/channel_internal.h"
#include "ipc/fault.h"

/* Pairs per DSM segment: a backend takes five segments at most, and one for the first shard that it meets. */
static const int group_sizes[] = {1, 1, 2, 4, 8};

MemoryContext es_channel_context = NULL;

static EsChannel channels[ES_MAX_SHARDS];

static int			ngroups = 0;
static int			npairs_made = 0;
static dsm_segment *group_segment = NULL; /* the last one */
static int			group_left = 0;		  /* pairs in it that have no channel yet */

static uint32 wait_connect = 0;
static uint32 wait_room = 0;

static inline Size
request_ring(void)
{
	return (Size) es_guc_queue_size * 1024;
}

static inline Size
answer_ring(void)
{
	return (Size) es_guc_result_queue_size * 1024;
}

/* Bytes of a pair in its segment. */
static Size
pair_memory(void)
{
	return CACHELINEALIGN(es_queue_memory(request_ring())) + CACHELINEALIGN(es_queue_memory(answer_ring()));
}

EsChannel *
es_channel_get(int shard)
{
	EsChannel *ch = &channels[shard];

	Assert(shard >= 0 && shard < es_shared->nshards);
	if (ch->shared == NULL)
	{
		if (es_channel_context == NULL)
			es_channel_context =
				AllocSetContextCreate(TopMemoryContext, "event_store channels", ALLOCSET_SMALL_SIZES);
		ch->shared = &es_my_slot()->channels[shard];
		ch->shard = shard;
	}
	return ch;
}

static inline uint32
current_generation(int shard)
{
	return pg_atomic_read_u32(&es_shared->shards[shard].generation);
}

bool
es_channel_usable(const EsChannel *ch)
{
	return ch->attached && !ch->broken && ch->shard_generation == current_generation(ch->shard) &&
		   pg_atomic_read_u32(&ch->shared->closed) != ch->generation && !es_channel_failed(ch);
}

void
es_channel_sleep(TimestampTz deadline, uint32 wait_event)
{
	long timeout = 1000;

	if (deadline != 0)
		timeout = Min(timeout, TimestampDifferenceMilliseconds(GetCurrentTimestamp(), deadline));
	(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, timeout, wait_event);
	ResetLatch(MyLatch);
	CHECK_FOR_INTERRUPTS();
}

/* ---- connecting ---- */

/* 0 = none */
static TimestampTz
enqueue_deadline(void)
{
	if (es_guc_enqueue_timeout == 0)
		return 0;
	return TimestampTzPlusMilliseconds(GetCurrentTimestamp(), (int64) es_guc_enqueue_timeout);
}

static void
check_deadline(const EsChannel *ch, TimestampTz deadline, const char *what)
{
	if (deadline == 0 || GetCurrentTimestamp() < deadline)
		return;
	pg_atomic_fetch_add_u64(&es_shared->shards[ch->shard].counters.queue_timeouts, 1);
	ereport(
		ERROR,
		(errcode(ERRCODE_INSUFFICIENT_RESOURCES), errmsg("shard %d is busy", ch->shard),
		 errdetail("It did not %s within event_store.enqueue_timeout (%d ms).", what, es_guc_enqueue_timeout),
		 errhint(
			 "Try again, or raise event_store.enqueue_timeout.  The view event_store.stat_shards shows what shards do.")));
}

static void
poke(const EsChannel *ch)
{
	es_set_ready(ch->shard, es_my_slot_number());
	es_wake_shard(ch->shard);
}

/* A new segment for the next group of pairs. */
static void
make_group(void)
{
	int			  npairs = Min(group_sizes[ngroups], es_shared->nshards - npairs_made);
	Size		  size = mul_size(npairs, pair_memory());
	MemoryContext context = CurrentMemoryContext;
	dsm_segment *volatile segment = NULL;
	char *volatile why = "There are too many dynamic shared memory segments.";

	PG_TRY();
	{
		segment = dsm_create(size, DSM_CREATE_NULL_IF_MAXSEGMENTS);
	}
	PG_CATCH();
	{
		ErrorData *error;

		MemoryContextSwitchTo(context);
		error = CopyErrorData();
		if (error->sqlerrcode != ERRCODE_OUT_OF_MEMORY && error->sqlerrcode != ERRCODE_DISK_FULL)
			PG_RE_THROW();
		FlushErrorState();
		why = psprintf("The system says: %s.", error->message);
	}
	PG_END_TRY();

	if (segment == NULL)
		ereport(
			ERROR,
			(errcode(ERRCODE_OUT_OF_MEMORY),
			 errmsg(
				 "no shared memory for the queues between this session and the shards: %zu bytes are needed",
				 size),
			 errdetail("%s", why),
			 errhint(
				 "Give the server more shared memory (a container's /dev/shm), or reduce event_store.queue_size (%d kB), event_store.result_queue_size (%d kB) or the number of sessions.",
				 es_guc_queue_size, es_guc_result_queue_size)));
	dsm_pin_mapping(segment);
	group_segment = segment;
	group_left = npairs;
	npairs_made += npairs;
	ngroups++;
}

/* Lets go of the current queues, if there are any. */
static void
disconnect(EsChannel *ch)
{
	if (ch->requests == NULL)
		return;
	shm_mq_detach(ch->requests);
	shm_mq_detach(ch->answers);
	ch->requests = NULL;
	ch->answers = NULL;
	ch->attached = false;
	ch->half_sent = false;
	es_join_reset(&ch->join);
	pg_atomic_write_u32(&ch->shared->detached, ch->generation);
	poke(ch);
}

/* Has the process that made them, or the shard, still an eye on queues of an earlier generation? */
static bool
is_free(const EsChannel *ch)
{
	uint32 generation = pg_atomic_read_u32(&ch->shared->generation);

	return generation == 0 || pg_atomic_read_u32(&ch->shared->closed) == generation ||
		   ch->shared->shard_generation != current_generation(ch->shard);
}

static void
make_queues(EsChannel *ch)
{
	EsChannelShared *s = ch->shared;
	char			*memory;
	shm_mq			*requests;
	shm_mq			*answers;
	MemoryContext	 old;

	if (ch->segment == NULL)
	{
		if (group_left == 0)
			make_group();
		group_left--;
		ch->segment = group_segment;
		ch->offset = group_left * pair_memory();
	}
	memory = (char *) dsm_segment_address(ch->segment) + ch->offset;
	requests = shm_mq_create(memory, es_queue_memory(request_ring()));
	shm_mq_set_sender(requests, MyProc);
	memory += CACHELINEALIGN(es_queue_memory(request_ring()));
	answers = shm_mq_create(memory, es_queue_memory(answer_ring()));
	shm_mq_set_receiver(answers, MyProc);

	/* should the second one throw, the first is detached with the segment; that does no harm */
	old = MemoryContextSwitchTo(es_channel_context);
	ch->answers = shm_mq_attach(answers, ch->segment, NULL);
	ch->requests = shm_mq_attach(requests, ch->segment, NULL);
	MemoryContextSwitchTo(old);

	ch->shard_generation = current_generation(ch->shard);
	ch->generation = pg_atomic_read_u32(&s->generation) + 1;
	if (ch->generation == 0)
		ch->generation = 1; /* 0 means never */
	ch->attached = false;
	ch->broken = false;
	ch->half_sent = false;
	ch->sent_messages = 0;
	ch->sent_bytes = 0;
	ch->answers_taken = 0;

	s->shard_generation = ch->shard_generation;
	s->segment = dsm_segment_handle(ch->segment);
	s->offset = ch->offset;
	s->length = pair_memory();
	pg_atomic_write_u64(&s->sent_messages, 0);
	pg_atomic_write_u64(&s->sent_bytes, 0);
	pg_atomic_write_u64(&s->taken_bytes, 0);
	pg_atomic_write_u64(&s->taken_messages, 0);
	pg_atomic_write_u32(&s->room_wanted, 0);
	pg_atomic_write_u32(&s->answers_parked, 0);
	pg_atomic_write_u64(&s->answers, 0);
	ES_FAULT_ERROR("channel-before-publish");
	pg_write_barrier();
	pg_atomic_write_u32(&s->generation, ch->generation);
}

void
es_channel_raise_dropped(const EsChannel *ch)
{
	ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY),
					errmsg("shard %d has dropped the connection of this session", ch->shard),
					errdetail("It had no memory for its queues or for an answer."),
					errhint("See the server's log.  The session can go on.")));
}

static void
connect_channel(EsChannel *ch)
{
	TimestampTz deadline = enqueue_deadline();
	uint32		wait_event = es_wait_event(&wait_connect, "EventStoreConnect");

	for (;;)
	{
		es_wait_shard_open(ch->shard);
		disconnect(ch);

		/* a predecessor of ours with the same PGPROC may have left something to be taken */
		pg_atomic_write_u32(&ch->shared->detached, pg_atomic_read_u32(&ch->shared->generation));
		if (!is_free(ch))
			poke(ch);
		while (!is_free(ch))
		{
			check_deadline(ch, deadline, "take what was sent before");
			es_channel_sleep(deadline, wait_event);
		}

		/* a dead incarnation could not say it: no successor may attach while we change the fields */
		pg_atomic_write_u32(&ch->shared->closed, pg_atomic_read_u32(&ch->shared->generation));
		pg_write_barrier();

		make_queues(ch);
		ES_FAULT_ERROR("channel-before-attach");
		poke(ch);
		for (;;)
		{
			if (pg_atomic_read_u32(&ch->shared->attached) == ch->generation)
			{
				ch->attached = true;
				break;
			}
			if (pg_atomic_read_u32(&ch->shared->closed) == ch->generation)
				es_channel_raise_dropped(ch);
			if (ch->shard_generation != current_generation(ch->shard) || !es_shard_is_open(ch->shard))
				break;
			check_deadline(ch, deadline, "attach to this session's queues");
			es_channel_sleep(deadline, wait_event);
		}
		if (es_channel_usable(ch))
			return;
	}
}

uint32
es_channel_connect(int shard)
{
	EsChannel *ch;

	es_require_preload();
	es_wait_store_ready();
	ch = es_channel_get(shard);
	if (!es_channel_usable(ch))
		connect_channel(ch);
	return ch->shard_generation;
}

/* ---- room ---- */

static inline Size
room_left(const EsChannel *ch)
{
	return request_ring() - (Size) (ch->sent_bytes - pg_atomic_read_u64(&ch->shared->taken_bytes));
}

/*
 * Waits for `need` bytes of the ring.  False if the channel is of no use any
 * more.  The time-out runs from the last progress that the shard made.
 */
static bool
wait_for_room(EsChannel *ch, Size need)
{
	EsShardCounters *counters = &es_shared->shards[ch->shard].counters;
	TimestampTz		 start;
	uint32			 wait_event;

	if (room_left(ch) >= need)
		return true;

	start = GetCurrentTimestamp();
	wait_event = es_wait_event(&wait_room, "EventStoreQueueRoom");
	pg_atomic_fetch_add_u64(&counters->queue_full_waits, 1);
	PG_TRY();
	{
		TimestampTz deadline = enqueue_deadline();
		Size		last_room = room_left(ch);

		while (es_channel_usable(ch))
		{
			Size room;

			pg_atomic_write_u32(&ch->shared->room_wanted, 1);
			pg_memory_barrier();
			room = room_left(ch);
			if (room >= need)
				break;
			if (room > last_room)
				deadline = enqueue_deadline();
			last_room = room;
			poke(ch);
			check_deadline(ch, deadline, "make room in its queue");
			es_channel_sleep(deadline, wait_event);
		}
	}
	PG_FINALLY();
	{
		pg_atomic_write_u32(&ch->shared->room_wanted, 0);
		pg_atomic_fetch_add_u64(&counters->queue_full_wait_us, Max(GetCurrentTimestamp() - start, 0));
	}
	PG_END_TRY();
	return room_left(ch) >= need && es_channel_usable(ch);
}

/* ---- sending ---- */

/*
 * Sends one shm_mq message for which there is room.  False: the channel is broken.
 *
 * The flush is what wakes the shard, so that the count and the ready bit come before
 * it, and one wake-up is enough.  A shard that is awake and finds the bit before the bytes
 * keeps the bit.
 */
static bool
send_piece(EsChannel *ch, shm_mq_iovec *iov, int niov, Size len)
{
	ch->sent_bytes += es_ring_bytes(len);
	ch->sent_messages++;
	pg_atomic_write_u64(&ch->shared->sent_bytes, ch->sent_bytes);
	pg_atomic_write_u64(&ch->shared->sent_messages, ch->sent_messages);
	es_set_ready(ch->shard, es_my_slot_number());
	ES_FAULT("channel-before-flush");
	if (shm_mq_sendv(ch->requests, iov, niov, true, true) != SHM_MQ_SUCCESS)
	{
		/* detached; or half of it is in the queue, which our counting excludes */
		ch->broken = true;
		return false;
	}
	es_counter_max(&es_shared->shards[ch->shard].counters.queue_high_water, request_ring() - room_left(ch));
	return true;
}

/* Tells the shard to forget the pieces of a message whose rest will not come. */
static bool
abandon(EsChannel *ch)
{
	EsPiece		 piece = {.type = ES_PIECE_TYPE, .flags = ES_PIECE_ABANDONED};
	shm_mq_iovec iov = {(const char *) &piece, sizeof(piece)};

	if (!ch->half_sent)
		return true;
	if (!send_piece(ch, &iov, 1, sizeof(piece)))
		return false;
	ch->half_sent = false;
	return true;
}

/* Sends a message that is larger than the ring.  May throw between pieces. */
static bool
send_pieces(EsChannel *ch, const EsPart *parts, int nparts, Size len, shm_mq_iovec *iov)
{
	Size most = es_piece_room(request_ring());

	for (Size offset = 0; offset < len;)
	{
		Size	bytes = Min(most, len - offset);
		EsPiece piece = {.type = ES_PIECE_TYPE, .offset = offset, .total = len};
		int		niov;

		if (offset == 0)
			piece.flags |= ES_PIECE_FIRST;
		else
			ES_FAULT_ERROR("channel-mid-message");
		if (offset + bytes == len)
			piece.flags |= ES_PIECE_LAST;

		if (!wait_for_room(ch, es_ring_bytes(sizeof(piece) + bytes) + ES_PIECE_RESERVE))
			return false;
		CHECK_FOR_INTERRUPTS();
		iov[0].data = (const char *) &piece;
		iov[0].len = sizeof(piece);
		niov = 1 + es_parts_slice(parts, nparts, offset, bytes, iov + 1);
		ch->half_sent = true;
		if (!send_piece(ch, iov, niov, sizeof(piece) + bytes))
			return false;
		offset += bytes;
		if (offset == len)
			ch->half_sent = false;
	}
	return true;
}

/*
 * The message as parts: the request is the beginning of the first one, or, if it is not, goes
 * before them.  Sets its length.
 */
static int
message_parts(EsRequest *req, const EsPart *parts, int nparts, EsPart *message, Size *len)
{
	int n = 0;

	if (nparts == 0 || parts[0].data != req)
	{
		message[n].data = req;
		message[n++].len = sizeof(EsRequest);
	}
	for (int i = 0; i < nparts; i++)
		message[n++] = parts[i];
	*len = es_parts_len(message, n);
	req->len = *len;
	return n;
}

void
es_channel_wait_room(int shard, Size len)
{
	EsChannel *ch = es_channel_get(shard);
	Size	   need = Min(es_ring_bytes(MAXALIGN(len)), request_ring());

	for (;;)
	{
		(void) es_channel_connect(shard);
		if (abandon(ch) && wait_for_room(ch, need))
			return;
		if (ch->shard_generation == current_generation(shard) &&
			pg_atomic_read_u32(&ch->shared->closed) == ch->generation)
			es_channel_raise_dropped(ch);
	}
}

bool
es_channel_has_room(int shard, Size len)
{
	EsChannel *ch = es_channel_get(shard);

	return es_channel_usable(ch) && !ch->half_sent &&
		   room_left(ch) >= Min(es_ring_bytes(MAXALIGN(len)), request_ring());
}

void
es_channel_send(int shard, EsRequest *req, const EsPart *parts, int nparts, bool wake)
{
	EsChannel	 *ch = es_channel_get(shard);
	EsPart		 *message = palloc(sizeof(EsPart) * (nparts + 1));
	shm_mq_iovec *iov = palloc(sizeof(shm_mq_iovec) * (nparts + 3));
	Size		  len;

	nparts = message_parts(req, parts, nparts, message, &len);
	if (len > ES_MESSAGE_MAX_LEN)
		ereport(ERROR, (errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
						errmsg("a message to shard %d would have %zu bytes, more than %zu", shard, len,
							   ES_MESSAGE_MAX_LEN)));

	for (;;)
	{
		bool sent;

		(void) es_channel_connect(shard);
		if (!es_answer_may_send(ch, req))
			break;
		if (!abandon(ch))
			sent = false;
		else if (es_ring_bytes(len) > request_ring())
			sent = send_pieces(ch, message, nparts, len, iov);
		else
			sent = wait_for_room(ch, es_ring_bytes(len)) &&
				   send_piece(ch, iov, es_parts_slice(message, nparts, 0, len, iov), len);
		if (sent)
		{
			es_answer_sent(ch, req);
			/* the queue has set its latch, on which it may not be looking */
			if (wake)
				es_wake_shard(shard);
			break;
		}

		/* again with a new incarnation; but not with one that does not want us */
		if (ch->shard_generation == current_generation(shard) &&
			pg_atomic_read_u32(&ch->shared->closed) == ch->generation)
			es_channel_raise_dropped(ch);
	}
	pfree(iov);
	pfree(message);
}

bool
es_channel_hint(int shard, EsRequest *req, const EsPart *parts, int nparts, bool wake)
{
	EsPart		 message[ES_HINT_PARTS + 1];
	shm_mq_iovec iov[ES_HINT_PARTS + 2];
	EsChannel	*ch;
	Size		 len;

	/* nobody hints to a shard that he has not spoken to */
	if (es_shared == NULL || es_channel_context == NULL)
		return false;
	ch = &channels[shard];
	Assert(nparts <= ES_HINT_PARTS);
	nparts = message_parts(req, parts, nparts, message, &len);
	if (!es_channel_usable(ch) || es_ring_bytes(len) > request_ring() || !es_answer_may_send(ch, req) ||
		!abandon(ch) || room_left(ch) < es_ring_bytes(len))
		return false;
	if (!send_piece(ch, iov, es_parts_slice(message, nparts, 0, len, iov), len))
		return false;
	es_answer_sent(ch, req);
	if (wake)
		es_wake_shard(shard);
	return true;
}

void
es_channel_abandon_all(void)
{
	if (es_channel_context == NULL)
		return;
	for (int i = 0; i < es_shared->nshards; i++)
	{
		if (channels[i].half_sent && es_channel_usable(&channels[i]))
			(void) abandon(&channels[i]);
	}
}
