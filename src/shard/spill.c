/*-------------------------------------------------------------------------
 *
 * spill.c
 *	  Staged batches of a large transaction become pending segments.
 *
 * A transaction that has staged more than twice event_store.spill_after, or the largest one
 * when all staging is beyond its limit, has what it staged written to one pending segment per
 * table by maintenance.  When the manifest names them, the batches leave memory.  More
 * batches come in the meantime; they are the next spill's, which begins when this one is
 * done: so a table's pending segments hold its batches in the order of their
 * ordinals, and their ids ascend in that order.
 *
 * Of a transaction with many tables only those with much in memory are spilled, so
 * that few large files result; the rest stays staged.
 *
 * The rules are those of a flush.  A job is posted when PostgreSQL's WAL is flushed past all
 * its batches, so that no file ever names an xid which a crash could hand out
 * again; the manifest's record comes when the frames of the batches that have some are durable.
 *
 * FINISH does not wait for a spill that is under way, since all other commits of the shard
 * would wait with it, but overtakes it: the staged batches move to the MemTable,
 * which is flushed at once if they are many, and the segment is thrown away.  If the manifest's record
 * is already on its way, it is taken back by the next one, and until that is durable no flush is recorded:
 * a recovery in between finds the segment and the FINISH, knows the batches by their starts, and takes
 * them from the segment.
 *
 * What stays unframed and is not spilled holds back restart_lsn.  When PostgreSQL's WAL has
 * moved on by UNFRAMED_LIMIT since, it gets its frames.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xlog.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "guc.h"
#include "ipc/fault.h"
#include "shard/arena.h"
#include "shard/engine.h"
#include "shard/flush.h"
#include "shard/log.h"
#include "shard/shard.h"

#define MAX_TABLES	   32			 /* that one spill takes */
#define WORTH_A_FILE   (1024 * 1024) /* bytes; tables with less are only spilled if nothing else is there */
#define UNFRAMED_LIMIT (64 * 1024 * 1024) /* bytes of PostgreSQL's WAL */
#define LOOK_INTERVAL  1000				  /* ms */
#define MAX_PENDING	   49152			  /* segments of a transaction: a manifest record has 65,535 parts */
#define MAX_ADOPT	   ((Size) 1 << 30) /* bytes of the record that adopts them: it may have twice as many */

typedef enum SpillStage
{
	STAGE_FLUSHED, /* PostgreSQL's WAL, past all batches */
	STAGE_BUILD,
	STAGE_DIRECTORY,
	STAGE_LOG,
	STAGE_MANIFEST,
	STAGE_TAKE_BACK, /* the record is durable, and was overtaken */
	STAGE_TAKING_BACK
} SpillStage;

typedef struct Spill
{
	dlist_node	node;
	EsTxn	   *txn; /* with a reference */
	SpillStage	stage;
	EsBuild	  **builds; /* one per table */
	uint32		nbuilds;
	uint64		last_ticket; /* of the batches that have frames */
	EsLsn		last_end;
	TimestampTz nudged;
	uint64		directory;
	uint64		edit;
} Spill;

static dlist_head  spills = DLIST_STATIC_INIT(spills);
static TimestampTz looked;

/* ---- what to spill ---- */

static Size
chunk_size(void)
{
	Size after = (Size) es_guc_spill_after * 1024;

	return Min(2 * after, Max(after, (Size) es_guc_staging_size * 1024 / 2));
}

static bool
staging_full(void)
{
	return es_arena_short ||
		   pg_atomic_read_u64(&es_shard->counters.staged_bytes) > (Size) es_guc_staging_size * 1024;
}

static inline bool
given(const EsMemBatch *b)
{
	return (b->view.header->flags & ES_BATCH_GIVEN_POSITIONS) != 0;
}

typedef struct Staged
{
	EsMemBatch *batch;
	uint32		number; /* in the order of starts */
} Staged;

typedef struct Group
{
	uint32 first; /* in the array of Staged */
	uint32 n;
	Size   bytes;
} Group;

static int
compare_staged(const void *x, const void *y)
{
	const Staged *a = x;
	const Staged *b = y;
	int c = memcmp(&a->batch->view.header->table, &b->batch->view.header->table, sizeof(EsTableKey));

	if (c != 0)
		return c;
	return a->number < b->number ? -1 : 1;
}

static int
compare_groups(const void *x, const void *y)
{
	const Group *a = x;
	const Group *b = y;

	return a->bytes > b->bytes ? -1 : a->bytes < b->bytes;
}

static inline bool
same_group(const EsMemBatch *a, const EsMemBatch *b)
{
	return es_table_key_equal(&a->view.header->table, &b->view.header->table);
}

/* The transaction's staged batches by table; returns the number of groups, largest first. */
static uint32
group_staged(EsTxn *txn, Staged **staged, Group **groups)
{
	uint32	   n = 0;
	uint32	   ngroups = 0;
	dlist_iter iter;
	Staged	  *s;
	Group	  *g;

	dlist_foreach(iter, &txn->staged)
		n++;
	s = palloc_extended(Max(n, 1) * sizeof(Staged), MCXT_ALLOC_HUGE);
	g = palloc_extended(Max(n, 1) * sizeof(Group), MCXT_ALLOC_HUGE);
	n = 0;
	dlist_foreach(iter, &txn->staged)
	{
		s[n] = (Staged){.batch = dlist_container(EsMemBatch, node, iter.cur), .number = n};
		n++;
	}
	qsort(s, n, sizeof(Staged), compare_staged);
	for (uint32 i = 0; i < n;)
	{
		Group  group = {.first = i};
		uint64 nrows = 0;
		bool   full = false;
		Size   needs = 0;

		/*
		 * Rows beyond segment_rows are the next spill's; and so are those from behind ADD COLUMN,
		 * since readers must know that the ones before lack the column, and from behind a rollback to a
		 * savepoint that takes DDL back, since a segment has one shape; and those without a position behind
		 * those that bring one, since the file of these is adopted with base 0.  While shared memory is short the
		 * job must do with what is kept for one.
		 */
		for (; i < n && same_group(s[group.first].batch, s[i].batch); i++)
		{
			nrows += s[i].batch->view.header->nrows;
			needs += es_build_needs(s[i].batch, ES_JOB_SPILL);
			full =
				full || (i > group.first &&
						 (nrows > es_guc_segment_rows || given(s[i].batch) != given(s[group.first].batch) ||
						  ((es_arena_short || es_arena_private > 0) && needs > ES_ARENA_RESERVE) ||
						  !es_batch_same_shape(&s[i].batch->view, &s[group.first].batch->view)));
			if (full)
				continue;
			group.n++;
			group.bytes += s[i].batch->memory;
		}
		g[ngroups++] = group;
	}
	qsort(g, ngroups, sizeof(Group), compare_groups);
	*staged = s;
	*groups = g;
	return ngroups;
}

/*
 * The largest tables, until three quarters are taken; of those with little none after half
 * is.  When memory is not short, a transaction that has little in each of many tables waits.
 */
static uint32
choose_groups(const Group *groups, uint32 ngroups, Size total)
{
	Size   taken = 0;
	uint32 n = 0;

	while (n < ngroups && n < MAX_TABLES && taken < total / 4 * 3)
	{
		if (n > 0 && groups[n].bytes < WORTH_A_FILE && taken >= total / 2)
			break;
		taken += groups[n++].bytes;
	}
	return n;
}

static void
start_spill(EsTxn *txn)
{
	MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);
	Staged		 *staged;
	Group		 *groups;
	uint32		  ngroups = group_staged(txn, &staged, &groups);
	uint32		  n = choose_groups(groups, ngroups, txn->staged_bytes);

	if (n > 0 && (staging_full() || groups[0].bytes >= WORTH_A_FILE || ngroups <= MAX_TABLES))
	{
		Spill *s = palloc0(sizeof(Spill));

		s->txn = txn;
		es_txn_ref(txn);
		s->builds = palloc(n * sizeof(EsBuild *));
		for (uint32 i = 0; i < n; i++)
		{
			Group		*g = &groups[i];
			EsMemBatch **batches = palloc_extended(g->n * sizeof(EsMemBatch *), MCXT_ALLOC_HUGE);

			for (uint32 k = 0; k < g->n; k++)
			{
				batches[k] = staged[g->first + k].batch;
				s->last_end = Max(s->last_end, batches[k]->end);
				s->last_ticket = Max(s->last_ticket, batches[k]->ticket);
			}
			s->builds[s->nbuilds++] =
				es_build_create(ES_JOB_SPILL, &batches[0]->view.header->table, batches, g->n, NULL);
			pfree(batches);
		}
		txn->spilling = true;
		dlist_push_tail(&spills, &s->node);
		ES_FAULT("spill-begun");
	}
	pfree(staged);
	pfree(groups);
	MemoryContextSwitchTo(old);
}

void
es_flush_consider_spill(EsTxn *txn)
{
	if (txn->spilling || txn->finished || txn->verdict != ES_VERDICT_UNKNOWN || !txn->listed ||
		dlist_is_empty(&txn->staged))
		return;
	if (txn->staged_bytes >= chunk_size() || staging_full())
		start_spill(txn);
}

/* ---- the state machine ---- */

static bool
overtaken(const Spill *s)
{
	return s->txn->finished || s->txn->verdict == ES_VERDICT_ABORTED || !s->txn->listed ||
		   es_finishing(s->txn);
}

static void
end_spill(Spill *s)
{
	EsTxn *txn = s->txn;

	txn->spilling = false;
	dlist_delete(&s->node);
	pfree(s->builds);
	pfree(s);
	es_flush_consider_spill(txn);
	es_txn_unref(txn);
}

static void
throw_away(Spill *s)
{
	for (uint32 i = 0; i < s->nbuilds; i++)
		es_build_give_up(s->builds[i]);
	end_spill(s);
}

static bool
submit_pending(Spill *s)
{
	EsManifestEdit *edit = es_edit_begin();

	if (edit == NULL)
		return false;
	ES_FAULT("spill-before-manifest");
	for (uint32 i = 0; i < s->nbuilds; i++)
	{
		EsBuild			 *b = s->builds[i];
		EsManifestPending p = {.segment = es_build_segment_entry(b), .nstarts = b->nbatches};
		uint64			 *starts = palloc_extended(b->nbatches * sizeof(uint64), MCXT_ALLOC_HUGE);

		for (uint32 k = 0; k < b->nbatches; k++)
			starts[k] = b->batches[k]->start;
		es_edit_check(es_manifest_edit_pending(edit, &p, starts));
		pfree(starts);
	}
	s->edit = es_edit_submit(edit);
	return true;
}

static bool
submit_take_back(Spill *s)
{
	EsManifestEdit *edit = es_edit_begin();

	if (edit == NULL)
		return false;
	for (uint32 i = 0; i < s->nbuilds; i++)
		es_edit_check(es_manifest_edit_drop(edit, s->builds[i]->id));
	s->edit = es_edit_submit(edit);
	return true;
}

/*
 * One manifest record adopts or drops all segments of a transaction, so that there is a limit to them.  Who passes it
 * is refused when it sends its next batch or FINISH; what it has sent by then still finds room.
 */
static void
refuse_too_large(EsTxn *txn)
{
	if (list_length(txn->pending) < MAX_PENDING && txn->adopt_bytes < MAX_ADOPT &&
		ES_FAULT_IO("spill-too-large") == 0)
		return;
	pg_atomic_write_u64(&es_shard->too_large[txn->fxid % ES_TOO_LARGE], txn->fxid);
}

/* The manifest names the segments: they take the place of the staged batches. */
static void
replace_staged(Spill *s)
{
	EsTxn *txn = s->txn;

	ES_FAULT("spill-manifest-durable");
	for (uint32 i = 0; i < s->nbuilds; i++)
	{
		EsBuild		   *build = s->builds[i];
		uint64		   *starts = palloc_extended(build->nbatches * sizeof(uint64), MCXT_ALLOC_HUGE);
		EsManifestEntry entry = {.segment = es_build_segment_entry(build),
								 .pending = true,
								 .nlive = build->summary.nrows,
								 .starts = starts,
								 .nstarts = build->nbatches};
		EsSegmentRef   *ref;
		MemoryContext	old;

		for (uint32 k = 0; k < build->nbatches; k++)
			starts[k] = build->batches[k]->start;
		ref = es_segments_add(&entry, txn);
		pfree(starts);
		old = MemoryContextSwitchTo(TopMemoryContext);
		txn->pending = lappend(txn->pending, ref);
		txn->adopt_bytes +=
			sizeof(EsManifestAdopt) + build->summary.nrows / 8 + build->summary.ncontexts * sizeof(int64);
		MemoryContextSwitchTo(old);
		for (uint32 k = 0; k < build->nbatches; k++)
		{
			EsMemBatch *b = build->batches[k];

			if (b->unframed)
			{
				b->unframed = false;
				dlist_delete(&b->unframed_node);
			}
			if (b->in_staging)
				es_txn_unstage(b);
		}
		es_build_free(build);
	}
	es_arena_freed();
	refuse_too_large(txn);
	es_adopt_register(txn);
	end_spill(s);
}

/* One step; false: it waits. */
static bool
advance(Spill *s, TimestampTz now)
{
	bool all = true;

	if (s->stage < STAGE_MANIFEST && overtaken(s))
	{
		throw_away(s);
		return false;
	}
	switch (s->stage)
	{
		case STAGE_FLUSHED:
			if (es_flushed_lsn() < s->last_end)
			{
				if (s->nudged == 0 || TimestampDifferenceExceeds(s->nudged, now, LOOK_INTERVAL))
				{
					XLogSetAsyncXactLSN(s->last_end);
					s->nudged = now;
				}
				return false;
			}
			s->stage = STAGE_BUILD;
			return true;

		case STAGE_BUILD:
			for (uint32 i = 0; i < s->nbuilds; i++)
				all &= es_build_tick(s->builds[i]);
			if (!all)
				return false;
			for (uint32 i = 0; i < s->nbuilds; i++)
				if (!s->builds[i]->published)
					all &= es_build_publish(s->builds[i]);
			if (!all)
				return false;
			s->directory = es_dir_sync();
			s->stage = STAGE_DIRECTORY;
			return true;

		case STAGE_DIRECTORY:
			if (!es_dir_synced(s->directory))
				return false;
			s->stage = STAGE_LOG;
			return true;

		case STAGE_LOG:
			if (es_log_durable_ticket() < s->last_ticket)
			{
				es_log_want_sync();
				return false;
			}
			if (!submit_pending(s))
				return false;
			s->stage = STAGE_MANIFEST;
			return true;

		case STAGE_MANIFEST:
			if (!es_edit_done(s->edit))
				return false;
			if (overtaken(s))
			{
				s->stage = STAGE_TAKE_BACK;
				return true;
			}
			replace_staged(s);
			return false;

		case STAGE_TAKE_BACK:
			ES_FAULT("spill-before-take-back");
			if (!submit_take_back(s))
				return false;
			s->stage = STAGE_TAKING_BACK;
			return true;

		case STAGE_TAKING_BACK:
			if (!es_edit_done(s->edit))
				return false;
			throw_away(s);
			return false;
	}
	return false;
}

/* Batches that nobody spills and that hold back restart_lsn by too much. */
static void
look_at_unframed(void)
{
	EsLsn		flushed = es_flushed_lsn();
	dlist_node *at = es_txn_unframed.head.next;

	if (dlist_is_empty(&es_txn_unframed))
		return;
	while (at != &es_txn_unframed.head)
	{
		EsMemBatch *b = dlist_container(EsMemBatch, unframed_node, at);

		if (!b->in_staging || b->txn->spilling || b->start + UNFRAMED_LIMIT > flushed)
		{
			at = at->next;
			continue;
		}
		es_frame_staged(b->txn);
		/* that took any number of nodes out of the list */
		at = es_txn_unframed.head.next;
	}
}

void
es_spill_tick(void)
{
	TimestampTz		   now;
	dlist_mutable_iter iter;

	if (dlist_is_empty(&spills) && dlist_is_empty(&es_txn_unframed))
		return;
	now = GetCurrentTimestamp();
	dlist_foreach_modify(iter, &spills)
	{
		Spill *s = dlist_container(Spill, node, iter.cur);

		while (advance(s, now))
			;
	}
	if (TimestampDifferenceExceeds(looked, now, LOOK_INTERVAL))
	{
		looked = now;
		look_at_unframed();
	}
}

bool
es_spill_idle(void)
{
	return dlist_is_empty(&spills);
}

const EsBuild *
es_spill_failed(void)
{
	dlist_iter iter;

	dlist_foreach(iter, &spills)
	{
		Spill *s = dlist_container(Spill, node, iter.cur);

		for (uint32 i = 0; i < s->nbuilds; i++)
			if (s->builds[i]->failures > 0)
				return s->builds[i];
	}
	return NULL;
}

bool
es_spill_taking_back(void)
{
	dlist_iter iter;

	dlist_foreach(iter, &spills)
	{
		Spill *s = dlist_container(Spill, node, iter.cur);

		if (s->stage >= STAGE_MANIFEST && overtaken(s))
			return true;
	}
	return false;
}

long
es_spill_timeout(void)
{
	if (!dlist_is_empty(&spills))
	{
		Spill *s = dlist_head_element(Spill, node, &spills);

		return s->stage == STAGE_FLUSHED ? 10 : 100;
	}
	return dlist_is_empty(&es_txn_unframed) ? LONG_MAX : LOOK_INTERVAL;
}
