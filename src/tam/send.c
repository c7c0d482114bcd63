/*-------------------------------------------------------------------------
 *
 * send.c
 *	  Batches on their way out of the backend: into PostgreSQL's WAL, then to
 *	  the shard (PROTOCOL.md 2).
 *
 * The order is fixed: room in the queue is waited for first (cancel and
 * time-outs are taken there, when nothing is logged), then the floor is published, then
 * the batch is logged, then it is sent.  From the floor's publication to the
 * flushing send a shard that computes its restart_lsn stays at or below the
 * batch's start, so PostgreSQL keeps the WAL that only this backend knows of.
 *
 * An ERROR between logging and sending (cancel in the middle of a message that is larger than the
 * ring) leaves the batch "unsent": its bytes stay here, and before
 * anything else is sent to that shard it is sent again; shards know a message by its
 * start and take it once.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "miscadmin.h"
#include "port/atomics.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "guc.h"
#include "ipc/channel.h"
#include "ipc/fault.h"
#include "ipc/logmsg.h"
#include "ipc/shmem.h"
#include "tam/xact.h"

void
es_floor_set(void)
{
	EsBackendSlot *slot = es_my_slot();

	if (pg_atomic_read_u64(&slot->floor) != 0)
		return;
	pg_atomic_write_u64(&slot->floor, GetFlushRecPtr(NULL));
	/* a shard that reads floors after F must not miss ours once our message is logged */
	pg_memory_barrier();
}

void
es_floor_clear(void)
{
	if (es_xact == NULL || es_xact->nunsent == 0)
		pg_atomic_write_u64(&es_my_slot()->floor, 0);
}

static void
append_batch(dlist_head *list, EsXactBatch *b)
{
	SubTransactionId before =
		dlist_is_empty(list) ? InvalidSubTransactionId : dlist_tail_element(EsXactBatch, node, list)->newest;

	b->newest = Max(b->subid, before);
	dlist_push_tail(list, &b->node);
}

void
es_close_builder(EsXactTable *t, int shard)
{
	EsBatchBuilder		*builder = t->builders[shard];
	EsBatchMeta			 meta = {.table = t->key};
	EsXactBatch			*b;
	const EsBatchHeader *header;

	if (builder == NULL || es_batch_nrows(builder) == 0)
		return;

	b = MemoryContextAllocZero(es_xact->context, sizeof(EsXactBatch));
	b->size = es_batch_size(builder);
	b->bytes = MemoryContextAllocHuge(es_xact->context, b->size);
	if (es_batch_finish(builder, b->bytes, b->size) != ES_OK)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
	header = (const EsBatchHeader *) b->bytes;
	b->subid = t->builder_subids[shard];
	b->shard = shard;
	b->nrows = header->nrows;
	append_batch(&t->pending, b);
	es_xact->pending_bytes += b->size;

	es_batch_reset(builder, &meta);
	t->builder_subids[shard] = InvalidSubTransactionId;
}

static void
queue_batch(EsXactTable *t, EsXactBatch *b)
{
	EsBatchRequest req = {
		.req = {.type = ES_REQ_BATCH}, .fxid = es_xact->fxid, .start = b->start, .end = b->end};
	EsPart parts[2] = {{&req, sizeof(req)}, {b->bytes, b->size}};

	es_channel_send(b->shard, &req.req, parts, 2, false);
	b->sent = true;
	es_xact->nunsent--;
	es_xact->shards_used |= UINT32_C(1) << b->shard;
	pfree(b->bytes);
	b->bytes = NULL;
	if (b->dead)
		t->ndead[b->shard]++;
}

void
es_send_unsent(void)
{
	dlist_iter titer;

	if (es_xact == NULL || es_xact->nunsent == 0)
		return;
	dlist_foreach(titer, &es_xact->tables)
	{
		EsXactTable *t = dlist_container(EsXactTable, node, titer.cur);
		dlist_iter	 biter;

		dlist_foreach(biter, &t->batches)
		{
			EsXactBatch *b = dlist_container(EsXactBatch, node, biter.cur);

			if (b->sent)
				continue;
			es_channel_connect(b->shard);
			es_channel_wait_room(b->shard, sizeof(EsBatchRequest) + b->size);
			queue_batch(t, b);
		}
	}
	es_floor_clear();
}

/* Has the shard so many files of this transaction that it could not adopt more? */
static void
check_too_large(int shard)
{
	EsFxid fxid = es_xact->fxid;

	if (fxid == 0 || pg_atomic_read_u64(&es_shared->shards[shard].too_large[fxid % ES_TOO_LARGE]) != fxid)
		return;
	ereport(ERROR, (errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED), errmsg("the transaction has too many events"),
					errdetail("Shard %d has as many files of it as it can adopt in one commit.", shard),
					errhint("Insert the events in several transactions, or raise event_store.spill_after, so "
							"that its files are fewer and larger.")));
}

/*
 * May events be logged for the shard?  Not while it cannot write its files: nothing
 * would ever leave its memory.  And writers stop before PostgreSQL would have to give
 * up WAL that a shard needs: half of max_slot_wal_keep_size is theirs, the rest is for
 * everybody else's WAL.
 */
void
es_send_wait_writable(int shard)
{
	TimestampTz start = 0;
	int			err = (int) pg_atomic_read_u32(&es_shared->shards[shard].stuck_errno);

	check_too_large(shard);
	if (err == ENOMEM)
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("shard %d has no shared memory for more events", shard),
				 errdetail("Writing events to segments has not helped so far; reads go on.  With "
						   "event_store.memtable_size and event_store.staging_size as they are, each shard, "
						   "of %d, may need %zu MB.",
						   es_shared->nshards, es_guc_shard_memory()),
				 errhint("Give the server more shared memory (in a container /dev/shm), or lower "
						 "event_store.memtable_size and event_store.staging_size.")));
	if (err != 0)
	{
		errno = err;
		ereport(ERROR, (errcode(err == ENOSPC || err == EDQUOT ? ERRCODE_DISK_FULL : ERRCODE_IO_ERROR),
						errmsg("shard %d cannot write its files: %m", shard),
						errdetail("It tries again each second; reads go on."),
						errhint("Free disk space, or check the device, of the data directory.")));
	}
	if (max_slot_wal_keep_size_mb < 0)
		return;
	for (;;)
	{
		uint64 restart = pg_atomic_read_u64(&es_shared->shards[shard].restart_lsn);
		uint64 limit = (uint64) max_slot_wal_keep_size_mb * 1024 * 1024 / 2;

		if (restart == 0 || GetXLogInsertRecPtr() < restart + limit)
			return;
		if (start == 0)
			start = GetCurrentTimestamp();
		else if (es_guc_enqueue_timeout > 0 &&
				 TimestampDifferenceExceeds(start, GetCurrentTimestamp(), es_guc_enqueue_timeout))
			ereport(
				ERROR,
				(errcode(ERRCODE_INSUFFICIENT_RESOURCES),
				 errmsg("shard %d is too far behind to take more events", shard),
				 errdetail(
					 "It needs PostgreSQL's WAL from %X/%X on, and half of max_slot_wal_keep_size is used up.",
					 LSN_FORMAT_ARGS(restart)),
				 errhint(
					 "See event_store.stat_shards for what holds the shard up, or raise max_slot_wal_keep_size.")));
		pg_atomic_fetch_add_u32(&es_shared->shards[shard].sync_request, 1);
		es_wake_shard(shard);
		CHECK_FOR_INTERRUPTS();
		pg_usleep(10 * 1000L);
	}
}

static void
send_batch(EsXactTable *t, EsXactBatch *b)
{
	EsPart part = {b->bytes, b->size};

	Assert(!b->logged && !b->dead);
	es_channel_connect(b->shard);
	es_channel_wait_room(b->shard, sizeof(EsBatchRequest) + b->size);
	es_send_wait_writable(b->shard);

	ES_FAULT_ERROR("append-before-log");
	if (es_xact->fxid == 0)
		es_xact->fxid = U64FromFullTransactionId(GetTopFullTransactionId());
	es_floor_set();
	PG_TRY();
	{
		es_log_message(ES_MESSAGE_BATCH, es_xact->fxid, b->shard, &part, 1, &b->start, &b->end);
	}
	PG_CATCH();
	{
		/* cancelled between pieces: no FINISH will name it, and the transaction may stay idle for long */
		es_floor_clear();
		PG_RE_THROW();
	}
	PG_END_TRY();
	b->logged = true;
	dlist_delete(&b->node);
	append_batch(&t->batches, b);
	es_xact->pending_bytes -= b->size;
	es_xact->nunsent++;
	ES_FAULT_ERROR("append-after-log");
	queue_batch(t, b);
	ES_FAULT_ERROR("append-after-send");
	es_floor_clear();
}

/* In the order of ordinals: the closed batches first, then what the builder holds. */
void
es_send_shard(EsXactTable *t, int shard)
{
	dlist_mutable_iter iter;

	es_send_unsent();
	es_close_builder(t, shard);
	dlist_foreach_modify(iter, &t->pending)
	{
		EsXactBatch *b = dlist_container(EsXactBatch, node, iter.cur);

		if (b->shard == shard)
			send_batch(t, b);
	}
}

/* Builders that are being filled stay; so do their rows' places behind what is sent. */
void
es_send_pending(void)
{
	dlist_iter titer;

	es_send_unsent();
	dlist_foreach(titer, &es_xact->tables)
	{
		EsXactTable		  *t = dlist_container(EsXactTable, node, titer.cur);
		dlist_mutable_iter iter;

		dlist_foreach_modify(iter, &t->pending)
			send_batch(t, dlist_container(EsXactBatch, node, iter.cur));
	}
}

void
es_xact_send_table(const EsTableKey *key)
{
	EsXactTable *t = es_xact_table(key);

	if (t == NULL)
		return;
	for (int s = 0; s < es_shared->nshards; s++)
		es_send_shard(t, s);
}

void
es_xact_send_all(void)
{
	dlist_iter iter;

	if (es_xact == NULL)
		return;
	dlist_foreach(iter, &es_xact->tables)
	{
		EsXactTable *t = dlist_container(EsXactTable, node, iter.cur);

		for (int s = 0; s < es_shared->nshards; s++)
			es_send_shard(t, s);
	}
}
