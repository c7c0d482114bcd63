/*-------------------------------------------------------------------------
 *
 * commit.c
 *	  The commit protocol of PROTOCOL.md 3, in this order:
 *
 *		last batches logged and sent (a small transaction keeps them for FINISH)
 *		context locks
 *		PREPARE answered: expected versions and event ids are checked
 *		room on all queues
 *		horizon slot published, positions reserved
 *		FINISH logged
 *		FINISH sent
 *
 * An ERROR anywhere aborts the transaction cleanly, also after FINISH: CLOG is the only judge
 * of a transaction, and it says aborted then.  The locks are held until PostgreSQL
 * releases all locks of the transaction, which is after the COMMIT and ABORT
 * callbacks; so the next writer of a context meets decided versions only.
 *
 * What is published in shared memory (floor, horizon slot) is cleared in the COMMIT or ABORT
 * callback, which cannot throw, or when the process exits; it cannot leak.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/relation.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "miscadmin.h"
#include "storage/predicate.h"
#include "storage/proc.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/timeout.h"
#include "utils/timestamp.h"

#include "ipc/channel.h"
#include "ipc/fault.h"
#include "ipc/logmsg.h"
#include "ipc/position.h"
#include "ipc/shmem.h"
#include "tam/refusal.h"
#include "tam/xact.h"

/* What PREPARE answered for one (table, shard). */
typedef struct Prepared
{
	const EsPrepareTable *table;
	const uint8			 *not_taken;
	const EsFirstVersion *versions;
} Prepared;

static EsFinishBuilder *finish_builder; /* kept between transactions */

static void
check_status(EsStatus status)
{
	if (status == ES_OK)
		return;
	if (status == ES_ERR_TOO_LARGE)
		ereport(ERROR, (errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED), errmsg("transaction has too many events")));
	ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
}

static bool
table_has_shard(EsXactTable *t, int shard)
{
	dlist_iter iter;

	dlist_foreach(iter, &t->batches)
	{
		EsXactBatch *b = dlist_container(EsXactBatch, node, iter.cur);

		if (b->shard == shard && !b->dead)
			return true;
	}
	dlist_foreach(iter, &t->pending)
	{
		EsXactBatch *b = dlist_container(EsXactBatch, node, iter.cur);

		if (b->shard == shard)
			return true;
	}
	return false;
}

/* Adds what the table has in the shard to the section being built. */
static void
add_table(EsFinishBuilder *f, EsXactTable *t, int shard, const Prepared *prepared)
{
	EsLsn	  *starts;
	EsPart	  *parts;
	uint32	   nstarts = 0;
	uint32	   nparts = 0;
	uint64	   nrows = 0;
	uint32	   flags = 0;
	dlist_iter iter;

	dlist_foreach(iter, &t->batches)
		nstarts++;
	dlist_foreach(iter, &t->pending)
		nparts++;
	starts = MemoryContextAllocHuge(es_xact->context, sizeof(EsLsn) * Max(nstarts, 1));
	parts = MemoryContextAlloc(es_xact->context, sizeof(EsPart) * Max(nparts, 1));
	nstarts = nparts = 0;

	dlist_foreach(iter, &t->batches)
	{
		EsXactBatch *b = dlist_container(EsXactBatch, node, iter.cur);

		if (b->shard != shard || b->dead)
			continue;
		starts[nstarts++] = b->start;
		nrows += b->nrows;
	}
	dlist_foreach(iter, &t->pending)
	{
		EsXactBatch *b = dlist_container(EsXactBatch, node, iter.cur);

		if (b->shard != shard)
			continue;
		parts[nparts].data = b->bytes;
		parts[nparts].len = b->size;
		nparts++;
		nrows += b->nrows;
	}

	if (t->given)
	{
		flags |= ES_FINISH_GIVEN_POSITIONS;
		if (t->roles.version != 0 && t->given_versions)
			flags |= ES_FINISH_GIVEN_VERSIONS;
	}
	if (prepared != NULL && prepared->not_taken != NULL)
		flags |= ES_FINISH_NOT_TAKEN;

	check_status(es_finish_add_table(f, &t->key, t->relid, flags, nrows, starts, nstarts, parts, nparts,
									 prepared ? prepared->not_taken : NULL,
									 prepared ? prepared->versions : NULL,
									 prepared ? Min(prepared->table->nversions, ES_FINISH_MAX_VERSIONS) : 0));
	pfree(starts);
	pfree(parts);
}

/* The answer's part for a table. */
static bool
find_prepared(const EsPrepareAnswer *answer, const EsTableKey *key, Prepared *result)
{
	const char *p = (const char *) (answer + 1);

	for (uint64 i = 0; i < answer->ntables; i++)
	{
		const EsPrepareTable *pt = (const EsPrepareTable *) p;

		if (es_table_key_equal(&pt->table, key))
		{
			result->table = pt;
			result->not_taken = pt->bitmap_len > 0 ? (const uint8 *) (pt + 1) : NULL;
			result->versions = (const EsFirstVersion *) ((const char *) (pt + 1) + pt->bitmap_len);
			return true;
		}
		p += pt->len;
	}
	return false;
}

/*
 * Builds sections for the shards in `shards` (bits).  prepared: per shard the answer of
 * PREPARE, or NULL.
 */
static void
build_sections(uint32 shards, bool only_locking, EsPosition base, uint64 npositions,
			   const EsPrepareAnswer *const *answers, const void **payload, size_t *len)
{
	if (finish_builder == NULL)
		finish_builder = es_finish_create();
	if (finish_builder == NULL)
		check_status(ES_ERR_NOMEM);
	es_finish_reset(finish_builder, base, npositions);

	for (int s = 0; s < es_shared->nshards; s++)
	{
		dlist_iter iter;

		if ((shards & (UINT32_C(1) << s)) == 0)
			continue;
		check_status(es_finish_begin_section(finish_builder, s));
		dlist_foreach(iter, &es_xact->tables)
		{
			EsXactTable *t = dlist_container(EsXactTable, node, iter.cur);
			Prepared	 prepared;
			bool		 has = false;

			if (!table_has_shard(t, s) || (only_locking && !t->locking))
				continue;
			if (answers != NULL && answers[s] != NULL)
				has = find_prepared(answers[s], &t->key, &prepared);
			add_table(finish_builder, t, s, has ? &prepared : NULL);
		}
	}
	check_status(es_finish_end(finish_builder, payload, len));
}

/* Asks all concerned shards at once, then takes their answers. */
static void
prepare(uint32 shards, const EsPrepareAnswer **answers)
{
	uint64		ids[ES_MAX_SHARDS];
	const void *payload;
	size_t		len;

	build_sections(shards, true, 0, es_xact->next_ordinal, NULL, &payload, &len);
	for (int s = 0; s < es_shared->nshards; s++)
	{
		const EsSectionHeader *section = es_finish_section(payload, s);
		EsPrepareRequest	   req = {.req = {.type = ES_REQ_PREPARE}, .fxid = es_xact->fxid};
		EsPart				   parts[2] = {{&req, sizeof(req)}, {section, section ? section->len : 0}};

		answers[s] = NULL;
		ids[s] = 0;
		if (section == NULL)
			continue;
		ids[s] = req.req.id = es_request_id();
		es_channel_connect(s);
		es_channel_expect(s, ids[s]);
		es_channel_wait_room(s, sizeof(req) + section->len);
		es_channel_send(s, &req.req, parts, 2, true);
	}
	for (int s = 0; s < es_shared->nshards; s++)
	{
		const EsAnswer *answer;
		EsAnswer	   *copy;

		if (ids[s] == 0)
			continue;
		answer = es_channel_answer(s, ids[s]);
		if (answer->flags & ES_ANSWER_REFUSED)
			es_raise_refusal((const EsRefusal *) answer);
		copy = MemoryContextAllocHuge(es_xact->context, answer->len);
		memcpy(copy, answer, answer->len);
		answers[s] = (const EsPrepareAnswer *) copy;
		es_channel_forget(s, ids[s]);
	}
}

/*
 * Positions are given only to restore what was: above everything that the table holds.  Asked
 * at the first such row, and again at COMMIT about the lowest of all; nobody else writes into the
 * table meanwhile (given.c).
 */
void
es_check_given(const EsXactTable *t)
{
	EsPosition highest = 0;

	for (int s = 0; s < es_shared->nshards; s++)
	{
		EsStatRequest	   req = {.req = {.type = ES_REQ_STAT}, .table = t->key, .kind = ES_STAT_TABLE};
		EsPart			   part = {&req, sizeof(req)};
		EsAnswer		  *answer = es_channel_call(s, &req.req, &part, 1);
		const EsTableStat *stat = (const EsTableStat *) (answer + 1);

		if (answer->len >= sizeof(EsAnswer) + sizeof(EsTableStat))
			highest = Max(highest, stat->max_position);
		pfree(answer);
	}
	if (t->given_lowest <= highest)
		ereport(
			ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("position " UINT64_FORMAT " is not above the last one of the table, " UINT64_FORMAT,
					t->given_lowest, highest),
			 errdetail(
				 "Positions can be given only to restore events into an empty table, or behind all that it holds."),
			 errhint(
				 "Leave \"position\" out: the store fills it at commit.  Restore a dump made with --inserts in one transaction (psql -1).")));
}

/*
 * Positions for everything that does not bring its own; the slot's lower bound covers both.
 */
static EsPosition
reserve_positions(void)
{
	uint64	   ids[ES_SLOT_TABLES];
	uint32	   nids = 0;
	EsPosition lowest = 0;
	EsPosition highest = 0;
	bool	   reserve = false;
	EsPosition base = 0;
	dlist_iter iter;

	dlist_foreach(iter, &es_xact->tables)
	{
		EsXactTable *t = dlist_container(EsXactTable, node, iter.cur);

		if (nids < ES_SLOT_TABLES)
			ids[nids] = t->key.storage_id;
		nids++;
		if (t->assigned)
			reserve = true;
		if (t->given)
		{
			if (lowest == 0 || t->given_lowest < lowest)
				lowest = t->given_lowest;
			highest = Max(highest, t->given_highest);
		}
	}

	es_xact->has_slot = true;
	if (highest > 0)
		es_positions_given(lowest, highest, ids, nids, es_xact->fxid);
	if (reserve)
		base = es_positions_reserve(es_xact->next_ordinal, ids, nids, es_xact->fxid);
	return base;
}

static bool
has_live_rows(const EsXactTable *t)
{
	dlist_iter iter;

	if (!dlist_is_empty((dlist_head *) &t->pending))
		return true;
	dlist_foreach(iter, (dlist_head *) &t->batches)
	{
		if (!dlist_container(EsXactBatch, node, iter.cur)->dead)
			return true;
	}
	return false;
}

/* After the last send (PROTOCOL.md 3): a reader that came in between is a conflict. */
static void
check_serializable(void)
{
	dlist_iter iter;

	if (!IsolationIsSerializable())
		return;
	dlist_foreach(iter, &es_xact->tables)
	{
		EsXactTable *t = dlist_container(EsXactTable, node, iter.cur);
		Relation	 rel;

		/* rolled-back savepoints have taken their rows and their lock along */
		if (!has_live_rows(t))
			continue;
		rel = try_relation_open(t->relid, NoLock);
		/* gone if the transaction dropped it, or was a rewrite's transient table */
		if (rel == NULL)
			continue;
		CheckForSerializableConflictIn(rel, NULL, InvalidBlockNumber);
		relation_close(rel, NoLock);
	}
}

static EsLsn finish_start, finish_end;

static void
precommit(void)
{
	const EsPrepareAnswer *answers[ES_MAX_SHARDS] = {NULL};
	EsXact				  *x = es_xact;
	const void			  *payload;
	size_t				   len;
	EsPart				   part;
	EsPosition			   base;
	uint32				   live = 0;
	uint32				   check = 0;
	bool				   locking = false;
	dlist_iter			   iter;

	/* last batches: closed, and sent unless FINISH can carry them */
	dlist_foreach(iter, &x->tables)
	{
		EsXactTable *t = dlist_container(EsXactTable, node, iter.cur);

		for (int s = 0; s < es_shared->nshards; s++)
			es_close_builder(t, s);
	}
	if (x->pending_bytes > ES_INLINE_LIMIT)
		es_xact_send_all();
	else
		es_send_unsent();

	dlist_foreach(iter, &x->tables)
	{
		EsXactTable *t = dlist_container(EsXactTable, node, iter.cur);

		for (int s = 0; s < es_shared->nshards; s++)
		{
			if (!table_has_shard(t, s))
				continue;
			live |= UINT32_C(1) << s;
			locking |= t->locking;
			if (t->unchecked || (t->given && t->locking))
				check |= UINT32_C(1) << s;
		}
	}
	if (live == 0)
	{
		/* all rolled back to savepoints: what was sent is dropped at the verdict */
		x->finished = true;
		return;
	}
	if (x->fxid == 0)
		x->fxid = U64FromFullTransactionId(GetTopFullTransactionId());

	ES_FAULT_ERROR("commit-before-locks");
	if (locking)
		es_lock_precommit();
	ES_FAULT_ERROR("commit-after-locks");
	dlist_foreach(iter, &x->tables)
	{
		EsXactTable *t = dlist_container(EsXactTable, node, iter.cur);

		if (!t->given)
			continue;
		es_check_given(t);
		es_given_check_unique(t);
	}
	if (check != 0)
		prepare(check, answers);
	ES_FAULT_ERROR("commit-after-prepare");

	/* connects and waits for room: the sizes do not depend on the positions */
	build_sections(live, false, 0, x->next_ordinal, answers, &payload, &len);
	for (int s = 0; s < es_shared->nshards; s++)
	{
		const EsSectionHeader *section = es_finish_section(payload, s);

		if (section == NULL)
			continue;
		es_channel_connect(s);
		es_channel_wait_room(s, sizeof(EsFinishRequest) + section->len);
		es_send_wait_writable(s);
	}

	base = reserve_positions();
	ES_FAULT_ERROR("commit-after-reserve");
	build_sections(live, false, base, x->next_ordinal, answers, &payload, &len);

	es_floor_set();
	part.data = payload;
	part.len = len;
	es_log_message(ES_MESSAGE_FINISH, x->fxid, ES_SHARD_NONE, &part, 1, &finish_start, &finish_end);
	x->nunsent++;
	x->finished = true;
	ES_FAULT_ERROR("commit-after-log");

	for (int s = 0; s < es_shared->nshards; s++)
	{
		const EsSectionHeader *section = es_finish_section(payload, s);
		EsFinishRequest		   req = {
				   .req = {.type = ES_REQ_FINISH}, .fxid = x->fxid, .start = finish_start, .end = finish_end};
		EsPart parts[2] = {{&req, sizeof(req)}, {section, section ? section->len : 0}};

		if (section == NULL)
			continue;
		es_channel_send(s, &req.req, parts, 2, false);
		x->shards_used |= UINT32_C(1) << s;
		ES_FAULT_ERROR("commit-between-sends");
	}
	x->nunsent--;
	es_floor_clear();
	ES_FAULT_ERROR("commit-after-send");

	check_serializable();
}

/*
 * PostgreSQL disarms statement_timeout before it commits, because nothing in its commit waits for others.
 * Ours does (contexts, a shard's room), so it is armed again: with what the statement has left, as far as that
 * is known, else in full.  False: there is nothing to arm, or a procedure commits, whose statement is still
 * being timed.
 */
static bool
arm_timeout(void)
{
	TimestampTz now;
	TimestampTz whole;
	TimestampTz left;

	if (StatementTimeout <= 0 || MyBackendType != B_BACKEND || get_timeout_active(STATEMENT_TIMEOUT))
		return false;
	now = GetCurrentTimestamp();
	whole = TimestampTzPlusMilliseconds(now, StatementTimeout);
	left = get_timeout_finish_time(STATEMENT_TIMEOUT);
	enable_timeout_at(STATEMENT_TIMEOUT, left > now && left < whole ? left : whole);
	return true;
}

void
es_xact_precommit(void)
{
	bool armed;

	if (es_xact == NULL || es_xact->finished)
		return;
	armed = arm_timeout();
	PG_TRY();
	{
		precommit();
	}
	PG_CATCH();
	{
		if (armed)
			disable_timeout(STATEMENT_TIMEOUT, false);
		PG_RE_THROW();
	}
	PG_END_TRY();
	if (armed)
	{
		/* if it went off just now it must not hit what comes behind the commit */
		disable_timeout(STATEMENT_TIMEOUT, true);
		if (get_timeout_indicator(STATEMENT_TIMEOUT, false))
			CHECK_FOR_INTERRUPTS();
	}
}

/* A hint only: a shard that misses it asks CLOG.  Never throws. */
static void
send_verdict(bool committed)
{
	for (int s = 0; s < es_shared->nshards; s++)
	{
		EsResolveRequest req = {.req = {.type = ES_REQ_RESOLVE},
								.fxid = es_xact->fxid,
								.commit_end = committed ? XactLastCommitEnd : 0,
								.committed = committed};
		EsPart			 part = {&req, sizeof(req)};
		bool			 wake;

		if ((es_xact->shards_used & (UINT32_C(1) << s)) == 0)
			continue;
		wake = pg_atomic_read_u64(&es_shared->shards[s].counters.waiters) > 0;
		(void) es_channel_hint(s, &req.req, &part, 1, wake);
	}
}

void
es_xact_commit(void)
{
	if (es_xact == NULL)
		return;
	ES_FAULT("commit-after-commit");
	if (es_xact->has_slot)
		es_horizon_committed();
	pg_atomic_write_u64(&es_my_slot()->floor, 0);
	send_verdict(true);
}

void
es_xact_abort(void)
{
	if (es_xact == NULL)
		return;
	ES_FAULT("abort");
	if (es_xact->has_slot)
		es_horizon_aborted();
	pg_atomic_write_u64(&es_my_slot()->floor, 0);
	if (es_xact->shards_used != 0)
		send_verdict(false);
}
