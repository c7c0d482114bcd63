/*-------------------------------------------------------------------------
 *
 * server.c
 *	  The shard's end of all channels: taking messages.  Answers are in
 *	  server_send.c.
 *
 * A connection is made when the ready bitmap shows a slot whose channel has a
 * generation that this process has not seen, and ends when its owner has let go of the
 * generation (reconnect or exit), after all that he had sent was delivered.  Then
 * the memory is unmapped, closed = generation tells the owner, and his latch is set.
 *
 * A connection that cannot be answered (no memory to park an answer) has failed, but its queue may
 * hold messages that commits rest on, acknowledged ones and such as are about to be sent.  So failed =
 * generation tells the owner to let go of it, and until he does BATCH, FINISH and RESOLVE are taken as ever.
 * A message that cannot be taken at all ends the process: it is in PostgreSQL's WAL, and recovery finds it.
 *
 * Giving ring space back.  shm_mq publishes what was consumed when a receive begins
 * with more than a quarter of the ring consumed and unpublished, or finds no
 * whole message.  `unpublished` follows the first rule; taken_bytes is what is
 * certainly published.  Only for a sender who waits for room do we look at an empty
 * queue (the second rule): each look that publishes wakes the sender.
 *
 * Messages of one connection are delivered in the order in which they were sent; what that
 * says about those of different ones is for the caller to find out (server.h).
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "utils/memutils.h"

#include "compat.h"
#include "ipc/fault.h"
#include "ipc/server_internal.h"

int			  es_server_shard = -1;
MemoryContext es_server_context = NULL;

static EsShardShared	*shard_shared;
static EsServerCallbacks callbacks;
static EsConnection	   **connections; /* by slot number; NULL = none */

void
es_server_wake(const EsConnection *c)
{
	SetLatch(&GetPGProcByNumber(c->conn.slot)->procLatch);
}

void
es_server_fail(EsConnection *c)
{
	c->failed = true;
	pg_atomic_write_u32(&c->shared->failed, c->conn.generation);
	es_server_wake(c);
	es_set_ready(es_server_shard, c->conn.slot);
	SetLatch(MyLatch);
}

/* ---- start and end ---- */

static void
server_exit(int code, Datum arg)
{
	uint32 state = pg_atomic_read_u32(&shard_shared->state);

	SpinLockAcquire(&shard_shared->mutex);
	if (shard_shared->proc == MyProc)
	{
		shard_shared->proc = NULL;
		shard_shared->pid = 0;
	}
	SpinLockRelease(&shard_shared->mutex);
	if (state != ES_SHARD_CLEAN && state != ES_SHARD_FAILED)
		pg_atomic_write_u32(&shard_shared->state, ES_SHARD_ABSENT);
	ConditionVariableBroadcast(&shard_shared->changed);

	/* the queues are detached; those who wait for an answer shall look */
	for (int i = 0; i < es_shared->nslots; i++)
	{
		if (connections[i] != NULL)
			es_server_wake(connections[i]);
	}
}

void
es_server_init(int shard, const EsServerCallbacks *cb)
{
	Assert(es_server_shard < 0);
	es_server_shard = shard;
	shard_shared = &es_shared->shards[shard];
	callbacks = *cb;
	es_server_context =
		AllocSetContextCreate(TopMemoryContext, "event_store connections", ALLOCSET_DEFAULT_SIZES);
	connections = MemoryContextAllocZero(es_server_context, sizeof(EsConnection *) * es_shared->nslots);

	SpinLockAcquire(&shard_shared->mutex);
	shard_shared->proc = MyProc;
	shard_shared->pid = MyProcPid;
	SpinLockRelease(&shard_shared->mutex);
	on_shmem_exit(server_exit, (Datum) 0);
}

/* ---- connections ---- */

static void
let_go(int slot, uint32 generation)
{
	EsChannelShared *shared = &es_shared->slots[slot].channels[es_server_shard];

	/* the memory is unmapped before its owner learns that he may use it anew */
	pg_memory_barrier();
	pg_atomic_write_u32(&shared->closed, generation);
	SetLatch(&GetPGProcByNumber(slot)->procLatch);
}

/* Maps the queues and attaches; false if that fails. */
static bool
map_queues(EsConnection *c, dsm_handle handle, Size offset)
{
	MemoryContext old = MemoryContextSwitchTo(es_server_context);
	volatile bool done = false;

	PG_TRY();
	{
		c->segment = dsm_attach(handle);
		if (c->segment != NULL)
		{
			char   *memory = (char *) dsm_segment_address(c->segment) + offset;
			shm_mq *requests = (shm_mq *) memory;
			shm_mq *answers = (shm_mq *) (memory + CACHELINEALIGN(es_queue_memory(es_request_ring())));

			dsm_pin_mapping(c->segment);
			shm_mq_set_sender(answers, MyProc);
			shm_mq_set_receiver(requests, MyProc);
			c->answers = shm_mq_attach(answers, c->segment, NULL);
			c->requests = shm_mq_attach(requests, c->segment, NULL);
			done = true;
		}
	}
	PG_CATCH();
	{
		/* out of memory or address space: the session's trouble, not the shard's */
		MemoryContextSwitchTo(old);
		EmitErrorReport();
		FlushErrorState();
	}
	PG_END_TRY();
	MemoryContextSwitchTo(old);
	if (!done && c->segment != NULL)
	{
		dsm_detach(c->segment);
		c->segment = NULL;
	}
	return done;
}

/* A new generation of a slot's channel: attaches to it, or lets go of it at once. */
static EsConnection *
open_connection(int slot)
{
	EsChannelShared *shared = &es_shared->slots[slot].channels[es_server_shard];
	uint32			 generation = pg_atomic_read_u32(&shared->generation);
	uint32			 shard_generation;
	dsm_handle		 handle;
	Size			 offset;
	EsConnection	*c;

	/*
	 * The fields belong to a generation that is not closed: its owner closes the old one
	 * before he touches them, so if it is still open after they were read, they are its.
	 */
	if (generation == 0)
		return NULL;
	pg_read_barrier();
	shard_generation = shared->shard_generation;
	handle = shared->segment;
	offset = shared->offset;
	pg_read_barrier();
	if (pg_atomic_read_u32(&shared->closed) == generation ||
		pg_atomic_read_u32(&shared->generation) != generation)
		return NULL; /* if a new one comes, so does its ready bit */
	if (shard_generation != pg_atomic_read_u32(&shard_shared->generation))
		return NULL; /* for a predecessor of ours */

	ES_FAULT("server-before-attach");
	c = MemoryContextAllocExtended(es_server_context, sizeof(EsConnection),
								   MCXT_ALLOC_ZERO | MCXT_ALLOC_NO_OOM);
	if (c == NULL || !map_queues(c, handle, offset))
	{
		if (c != NULL)
			pfree(c);
		let_go(slot, generation);
		return NULL;
	}
	c->conn.slot = slot;
	c->conn.generation = generation;
	c->shared = shared;
	dlist_init(&c->parked);
	connections[slot] = c;

	pg_write_barrier();
	pg_atomic_write_u32(&shared->attached, generation);
	es_server_wake(c);
	return c;
}

static void
close_connection(EsConnection *c)
{
	int	   slot = c->conn.slot;
	uint32 generation = c->conn.generation;

	callbacks.closed(&c->conn);
	connections[slot] = NULL;
	es_join_reset(&c->join);
	es_server_drop_parked(c);
	shm_mq_detach(c->requests);
	shm_mq_detach(c->answers);
	dsm_detach(c->segment);
	pfree(c);
	let_go(slot, generation);
}

/* ---- taking messages ---- */

/* One shm_mq message, or false if there is none. */
static bool
receive_piece(EsConnection *c, void **data, Size *len)
{
	if (c->unpublished > es_request_ring() / 4)
	{
		/* shm_mq_receive begins with publishing it */
		c->published += c->unpublished;
		c->unpublished = 0;
	}
	switch (shm_mq_receive(c->requests, len, data, true))
	{
		case SHM_MQ_SUCCESS:
			c->taken_messages++;
			c->unpublished += es_ring_bytes(*len);
			return true;
		case SHM_MQ_WOULD_BLOCK:
			c->published += c->unpublished;
			c->unpublished = 0;
			return false;
		case SHM_MQ_DETACHED:
			return false;
	}
	return false;
}

/* Nobody's commit rests on it. */
static bool
is_question(const EsRequest *req)
{
	return req->type != ES_REQ_BATCH && req->type != ES_REQ_FINISH && req->type != ES_REQ_RESOLVE;
}

static void
deliver(EsConnection *c, const EsRequest *req, Size len)
{
	ES_FAULT("server-before-message");
	if (len < sizeof(EsRequest) || req->len != len)
		elog(ERROR, "event_store: broken request of backend slot %d", c->conn.slot);
	if (c->failed && is_question(req))
		return;
	callbacks.message(&c->conn, req, len);
}

/*
 * Takes one message and delivers it.  Returns how many were delivered.
 * Sets *more to whether the queue may be asked for another one.
 */
static int
take_one(EsConnection *c, bool *more)
{
	void *data;
	Size  len;

	*more = receive_piece(c, &data, &len);
	if (!*more)
		return 0;
	if (len >= sizeof(EsPiece) && ((EsPiece *) data)->type == ES_PIECE_TYPE)
	{
		EsJoinResult result = es_join_add(&c->join, es_server_context, data, len);

		if (result == ES_JOIN_MORE)
			return 0;
		if (result != ES_JOIN_WHOLE)
			ereport(ERROR,
					(errcode(result == ES_JOIN_NO_MEMORY ? ERRCODE_OUT_OF_MEMORY : ERRCODE_INTERNAL_ERROR),
					 errmsg("shard %d cannot take a message: %s", es_server_shard,
							result == ES_JOIN_NO_MEMORY ? "out of memory" : "it is broken"),
					 errdetail("The message has " UINT64_FORMAT " bytes.", ((EsPiece *) data)->total),
					 errhint("The shard restarts and reads it from PostgreSQL's WAL.")));
		data = c->join.data;
		len = c->join.total;
	}

	deliver(c, data, len);
	if (data == c->join.data)
		es_join_reset(&c->join);
	return 1;
}

/* Tells the sender what room there is, and wakes him if he waits for some. */
static void
give_room(EsConnection *c, int *count)
{
	bool wanted = pg_atomic_read_u32(&c->shared->room_wanted) != 0;

	/* look at the empty queue, so that shm_mq publishes all; a racing message is taken as well */
	while (wanted && c->unpublished > 0)
	{
		bool more;

		*count += take_one(c, &more);
		if (!more)
			break;
	}
	if (c->published != c->published_told)
	{
		c->published_told = c->published;
		pg_atomic_write_u64(&c->shared->taken_bytes, c->published);
	}
	pg_memory_barrier();
	if (wanted || pg_atomic_read_u32(&c->shared->room_wanted) != 0)
	{
		pg_atomic_write_u32(&c->shared->room_wanted, 0);
		es_server_wake(c);
	}
}

/*
 * Takes what the queue holds now.  May close the connection.  Returns the number of
 * messages delivered.
 */
static int
take_messages(EsConnection *c)
{
	int	   count = 0;
	bool   detached = pg_atomic_read_u32(&c->shared->detached) == c->conn.generation;
	uint64 limit;
	bool   more = true;

	pg_read_barrier();
	limit = pg_atomic_read_u64(&c->shared->sent_messages);
	pg_read_barrier();

	if (c->failed && !c->ignored)
	{
		callbacks.closed(&c->conn);
		es_server_drop_parked(c);
		c->ignored = true;
	}
	while (more && c->taken_messages < limit)
		count += take_one(c, &more);

	if (detached)
	{
		close_connection(c);
		return count;
	}
	give_room(c, &count);
	pg_atomic_write_u64(&c->shared->taken_messages, c->taken_messages);

	/* its sender has announced it and is about to flush it, which sets our latch */
	if (c->taken_messages < limit)
		es_set_ready(es_server_shard, c->conn.slot);
	return count;
}

/* Looks after a slot whose ready bit was set. */
static int
visit(int slot)
{
	EsConnection *c = connections[slot];
	int			  count = 0;

	if (c == NULL)
		c = open_connection(slot);
	if (c != NULL)
		count = take_messages(c);
	return count;
}

int
es_server_take(void)
{
	int count = 0;

	for (int w = 0; w < ES_READY_WORDS(es_shared->nslots); w++)
	{
		uint64 bits;

		if (w > 0)
			ES_FAULT("server-between-words");
		bits = pg_atomic_read_u64(&shard_shared->ready[w]);
		if (bits == 0)
			continue;
		bits = pg_atomic_exchange_u64(&shard_shared->ready[w], 0);
		for (; bits != 0; bits &= bits - 1)
			count += visit(w * 64 + __builtin_ctzll(bits));
	}
	if (count > 0)
		es_counter_add(shard_shared->counters.messages, count);
	return count;
}

void
es_server_sweep(void)
{
	int count = 0;

	if (pg_atomic_read_u32(&shard_shared->paused) != 0)
		return;
	for (int i = 0; i < es_shared->nslots; i++)
		count += visit(i);
	if (count > 0)
	{
		es_counter_add(shard_shared->counters.messages, count);
		SetLatch(MyLatch);
	}
}

void
es_server_close_all(void)
{
	for (int i = 0; i < es_shared->nslots; i++)
		if (connections[i] != NULL)
			close_connection(connections[i]);
}
