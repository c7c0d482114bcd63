/*-------------------------------------------------------------------------
 *
 * flush.c
 *	  From a MemTable to segments.
 *
 * The order is fixed (DESIGN: "segment written, fsync file, fsync directory, manifest
 * record, fsync, new view, WAL retired"; PROTOCOL.md 5.3 to 5.5), and each step waits
 * for the one before, never the loop for a step:
 *
 *	 boundary	the log is cut at X; the MemTable turns passive, a new one takes over.
 *				Every FINISH frame before X is of a transaction in this MemTable or an older one.
 *	 verdicts	commit records that are not flushed yet are waited for.  Transactions that
 *				are still in progress a moment later are carried over (carry.c).
 *	 build		the rows of committed transactions become segments, at most segment_rows
 *				in each, cut by position so that time prunes them.  Aborted ones are left out.
 *	 publish	the files get their names; the directory is synced.
 *	 log		X, and what was carried over behind it, is durable in own WAL, says a
 *				synced control block; pending segments of committed transactions are
 *				adopted.  So nothing the manifest will refer to can be lost.
 *	 manifest	one record: all segments of this MemTable, and "FINISH frames up to X are in
 *				segments or were carried over".
 *	 retire		segments live, MemTable leaves the list, files of own WAL may go.
 *
 * A crash before the manifest's record is durable leaves files that nobody names and a log
 * that has everything; after it the log's frames up to X are not applied.
 *
 * Passive MemTables wait in line: only the oldest is under way, so no flush
 * overtakes another.  When more than MAX_PASSIVE wait, es_flush_overloaded() tells the
 * loop to leave BATCH and FINISH in their queues: memory stays bounded, and writers wait.
 *
 * What own WAL must keep.  A batch in a MemTable that is not flushed has its frame behind
 * the boundary before the MemTable's own (es_carry_staged saw to it), or behind
 * the MemTable's own if nothing staged was left at that boundary.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "guc.h"
#include "ipc/fault.h"
#include "shard/apply.h"
#include "shard/arena.h"
#include "shard/engine.h"
#include "shard/flush.h"
#include "shard/log.h"
#include "shard/shard.h"

#define MAX_PASSIVE	  2 /* that wait for size or age; FLUSH may add some */
#define MAX_ASKED	  8
#define COLLECT_SLICE 2048 /* batches that are looked at in one turn of the loop */
#define REAP_SLICE	  2048 /* batches of retired MemTables that are freed in one */
#define VERDICT_GRACE 100  /* ms until a transaction in progress is carried over */
#define VERDICT_POLL  10   /* ms between two looks at verdicts */

typedef enum FlushStage
{
	STAGE_VERDICTS,
	STAGE_COLLECT,
	STAGE_BUILD,
	STAGE_DIRECTORY,
	STAGE_LOG,
	STAGE_MANIFEST
} FlushStage;

/* A batch that goes into a segment. */
typedef struct Placed
{
	EsPosition	position;
	EsMemBatch *batch;
	uint64		nrows;
} Placed;

/* A passive MemTable on its way. */
typedef struct Flush
{
	dlist_node	node;
	EsMemTable *memtable;
	FlushStage	stage;
	uint64		boundary;	 /* of the log */
	uint64		last_ticket; /* of the log at the boundary */
	bool		left;		 /* staged batches with frames before the boundary stayed as they were */
	TimestampTz since;		 /* passive */
	TimestampTz looked;		 /* at verdicts */
	EsTxn	  **undecided;	 /* each with a reference; shrinks */
	uint32		nundecided;
	EsBuild	  **builds;
	uint32		nbuilds;
	uint32		builds_allocated;
	uint32		store_state; /* of es_memtable_each */
	EsMemStore *store;		 /* whose batches are being collected */
	uint32		next_batch;
	Placed	   *placed;
	uint32		nplaced;
	uint32		placed_allocated;
	uint64		carry_ticket; /* last frame that was carried over */
	uint64		directory;	  /* ticket of the fsync */
	uint64		edit;		  /* ticket of the manifest record */
	uint64	   *empty;		  /* segments that it drops */
	uint32		nempty;
	EsOwnLsn	lsn; /* of the boundary */
} Flush;

static dlist_head flushes = DLIST_STATIC_INIT(flushes); /* oldest first */
static int		  nflushes;

static uint64	asked;		  /* MemTables up to this id are to be flushed, if they have rows */
static uint64	asked_empty;  /* ... also if they have none */
static uint64	last_retired; /* MemTable */
static uint64	last_ticket;  /* of the log at the last boundary */
static EsOwnLsn last_lsn;	  /* of the boundary of the last flush */
static uint64	wal_bytes;	  /* counter at the last boundary */

static bool reaping; /* memory of retired MemTables is being freed */

void
es_flush_init(void)
{
	if (es_memtable_active == NULL)
		(void) es_memtable_create();
	es_adopt_init();
}

/* ---- boundary ---- */

static bool
wants_to_turn(TimestampTz now)
{
	EsMemTable *mt = es_memtable_active;
	Size		size = (Size) es_guc_memtable_size * 1024;

	if ((mt->id <= asked && mt->nrows > 0) || mt->id <= asked_empty)
		return nflushes < MAX_ASKED;
	if (nflushes >= MAX_PASSIVE)
		return false;
	if (mt->nbytes >= size || (es_arena_short && mt->nrows > 0))
		return true;
	if (es_guc_memtable_age > 0 && mt->first_row != 0 &&
		TimestampDifferenceExceeds(mt->first_row, now, es_guc_memtable_age * 1000))
		return true;
	/* frames of aborted transactions fill own WAL, but no MemTable */
	return pg_atomic_read_u64(&es_shard->counters.wal_bytes) - wal_bytes > 4 * size;
}

static void
collect_undecided(Flush *f)
{
	uint32		allocated = 16;
	uint32		state = 0;
	EsMemStore *store;
	EsTxn	   *last = NULL;

	f->undecided = palloc(allocated * sizeof(EsTxn *));
	while ((store = es_memtable_each(f->memtable, &state)) != NULL)
		for (uint32 i = 0; i < store->nbatches; i++)
		{
			EsTxn *txn = store->batches[i]->txn;

			/* one that was carried on from here to a later MemTable is that one's business */
			if (txn == last || txn->verdict_durable)
				continue;
			last = txn;
			if (f->nundecided == allocated)
			{
				allocated *= 2;
				f->undecided = repalloc_huge(f->undecided, (Size) allocated * sizeof(EsTxn *));
			}
			es_txn_ref(txn);
			f->undecided[f->nundecided++] = txn;
		}
}

static void
turn_passive(TimestampTz now)
{
	MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);
	Flush		 *f = palloc0(sizeof(Flush));
	EsMemTable	 *mt = es_memtable_active;

	ES_FAULT("flush-before-boundary");
	f->memtable = mt;
	f->since = now;
	f->stage = STAGE_VERDICTS;
	(void) es_memtable_create();
	mt->passive = true;
	f->boundary = es_log_boundary();
	f->last_ticket = es_log_last_ticket();
	f->left = es_carry_staged(es_recovery_carry() ? PG_UINT64_MAX : last_ticket);
	last_ticket = f->last_ticket;
	wal_bytes = pg_atomic_read_u64(&es_shard->counters.wal_bytes);
	collect_undecided(f);
	dlist_push_tail(&flushes, &f->node);
	nflushes++;
	MemoryContextSwitchTo(old);
	ES_FAULT("flush-after-boundary");
}

/* ---- verdicts ---- */

/*
 * Everything that has committed is durable?  Transactions in progress do not count
 * after a moment: they stay in f->undecided, to be carried over.
 */
static bool
verdicts_known(Flush *f, TimestampTz now)
{
	bool   unflushed = false;
	uint32 n = 0;

	if (f->nundecided > 0 && f->looked != 0 && !TimestampDifferenceExceeds(f->looked, now, VERDICT_POLL))
		return false;
	f->looked = now;
	for (uint32 i = 0; i < f->nundecided; i++)
	{
		EsTxn *txn = f->undecided[i];

		if (es_txn_verdict_durable(txn))
		{
			es_txn_unref(txn);
			continue;
		}
		if (txn->verdict == ES_VERDICT_COMMITTED)
			unflushed = true;
		f->undecided[n++] = txn;
	}
	f->nundecided = n;
	return n == 0 || (!unflushed && TimestampDifferenceExceeds(f->since, now, VERDICT_GRACE));
}

static inline bool
is_carried(const EsMemBatch *b)
{
	return b->txn->verdict == ES_VERDICT_UNKNOWN;
}

static void
carry_over(Flush *f)
{
	EsCarried  *carried = NULL;
	uint32		n = 0;
	uint32		allocated = 0;
	uint32		state = 0;
	uint32		number = 0;
	EsMemStore *store;

	for (; f->nundecided > 0 && (store = es_memtable_each(f->memtable, &state)) != NULL; number++)
	{
		if (es_storage_dropped(&store->key))
			continue;
		for (uint32 i = 0; i < store->nbatches; i++)
		{
			EsMemBatch *b = store->batches[i];

			if (!is_carried(b))
				continue;
			if (n == allocated)
			{
				allocated = Max(64, allocated * 2);
				carried = carried == NULL ? palloc(allocated * sizeof(EsCarried))
										  : repalloc_huge(carried, (Size) allocated * sizeof(EsCarried));
			}
			carried[n++] = (EsCarried){.txn = b->txn, .batch = b, .store = number, .number = i};
		}
	}
	es_carry_finished(carried, n);
	f->memtable->carried = true;
	es_adopt_carry(f->memtable->id);
	f->carry_ticket = es_log_last_ticket();
	if (carried != NULL)
		pfree(carried);
	for (uint32 i = 0; i < f->nundecided; i++)
		es_txn_unref(f->undecided[i]);
	pfree(f->undecided);
	f->undecided = NULL;
	f->nundecided = 0;
}

/* ---- build ---- */

static int
compare_placed(const void *x, const void *y)
{
	const Placed *a = x;
	const Placed *b = y;

	return a->position < b->position ? -1 : a->position > b->position;
}

static uint32
taken_rows(const EsMemBatch *b)
{
	uint32 n = b->view.header->nrows;

	if (b->skip_local != NULL)
		for (uint32 row = 0; row < b->view.header->nrows; row++)
			n -= es_membatch_skipped(b, row);
	return n;
}

static void
add_build(Flush *f, EsBuild *build)
{
	if (f->nbuilds == f->builds_allocated)
	{
		f->builds_allocated = Max(16, f->builds_allocated * 2);
		f->builds = f->builds == NULL
						? MemoryContextAlloc(TopMemoryContext, f->builds_allocated * sizeof(EsBuild *))
						: repalloc(f->builds, f->builds_allocated * sizeof(EsBuild *));
	}
	f->builds[f->nbuilds++] = build;
}

/* Cuts the store's batches into builds, in the order of positions. */
static void
cut_store(Flush *f)
{
	EsMemBatch **batches = palloc_extended(Max(f->nplaced, 1) * sizeof(EsMemBatch *), MCXT_ALLOC_HUGE);

	qsort(f->placed, f->nplaced, sizeof(Placed), compare_placed);
	for (uint32 i = 0; i < f->nplaced;)
	{
		uint64 nrows = 0;
		uint32 k = 0;

		do
		{
			nrows += f->placed[i].nrows;
			batches[k++] = f->placed[i++].batch;
		} while (i < f->nplaced && nrows + f->placed[i].nrows <= es_guc_segment_rows &&
				 es_batch_table_columns(&f->placed[i].batch->view) ==
					 es_batch_table_columns(&batches[0]->view));
		add_build(f, es_build_create(ES_JOB_FLUSH, &f->store->key, batches, k, f->memtable));
	}
	pfree(batches);
}

static void
collect_batch(Flush *f, EsMemBatch *b)
{
	uint32 nrows;

	if (b->moved_to != 0 || b->txn->verdict != ES_VERDICT_COMMITTED)
		return;
	nrows = taken_rows(b);
	if (nrows == 0)
		return;
	if (f->nplaced == f->placed_allocated)
	{
		f->placed_allocated = Max(1024, f->placed_allocated * 2);
		f->placed = f->placed == NULL
						? MemoryContextAlloc(TopMemoryContext, f->placed_allocated * sizeof(Placed))
						: repalloc_huge(f->placed, (Size) f->placed_allocated * sizeof(Placed));
	}
	f->placed[f->nplaced++] = (Placed){.position = es_membatch_position(b, 0), .batch = b, .nrows = nrows};
}

/* Makes the builds, in slices.  False: not all of them yet. */
static bool
create_builds(Flush *f)
{
	uint32 left = COLLECT_SLICE;

	for (;;)
	{
		if (f->store == NULL)
		{
			f->store = es_memtable_each(f->memtable, &f->store_state);
			if (f->store == NULL)
				break;
			f->next_batch = 0;
			f->nplaced = 0;
		}
		if (!es_storage_dropped(&f->store->key))
		{
			while (f->next_batch < f->store->nbatches)
			{
				if (left-- == 0)
					return false;
				collect_batch(f, f->store->batches[f->next_batch++]);
			}
			cut_store(f);
		}
		f->store = NULL;
	}
	if (f->placed != NULL)
		pfree(f->placed);
	f->placed = NULL;
	return true;
}

static bool
builds_finished(Flush *f)
{
	bool all = true;

	for (uint32 i = 0; i < f->nbuilds; i++)
	{
		EsBuild *second;

		all &= es_build_tick(f->builds[i]);
		second = es_build_split(f->builds[i]);
		if (second != NULL)
			add_build(f, second);
	}
	return all;
}

static bool
publish(Flush *f)
{
	bool all = true;

	for (uint32 i = 0; i < f->nbuilds; i++)
		if (!f->builds[i]->published)
			all &= es_build_publish(f->builds[i]);
	return all;
}

/* ---- manifest ---- */

static bool
submit_record(Flush *f)
{
	EsManifestEdit *edit = es_edit_begin();
	MemoryContext	old;

	if (edit == NULL)
		return false;
	ES_FAULT("flush-before-manifest");
	for (uint32 i = 0; i < f->nbuilds; i++)
	{
		EsManifestSegment entry = es_build_segment_entry(f->builds[i]);

		if (!es_storage_dropped(&entry.table))
			es_edit_check(es_manifest_edit_segment(edit, &entry));
	}
	old = MemoryContextSwitchTo(TopMemoryContext);
	f->empty = es_adopt_drop_empty(edit, f->memtable->id, &f->nempty);
	MemoryContextSwitchTo(old);
	es_edit_check(es_manifest_edit_flushed(edit, f->lsn));
	f->edit = es_edit_submit(edit);
	return true;
}

/* The record is durable: nothing between here and the end of this function can fail but for memory. */
static void
retire(Flush *f)
{
	ES_FAULT("flush-manifest-durable");
	for (uint32 i = 0; i < f->nbuilds; i++)
	{
		EsBuild		   *build = f->builds[i];
		EsManifestEntry entry = {0};

		/* a storage is never dropped while a record of ours is under way (es_edit_begin) */
		entry.segment = es_build_segment_entry(build);
		if (es_storage_dropped(&entry.segment.table))
		{
			es_build_give_up(build);
			continue;
		}
		entry.nlive = entry.segment.nrows;
		(void) es_segments_add(&entry, NULL);
		es_build_free(build);
	}
	for (uint32 i = 0; i < f->nempty; i++)
		es_segments_drop(f->empty[i]);
	if (f->empty != NULL)
		pfree(f->empty);
	last_retired = f->memtable->id;
	es_memtable_retire(f->memtable);
	if (!f->left)
		es_log_release(f->lsn);
	else if (last_lsn != 0)
		es_log_release(last_lsn);
	last_lsn = f->lsn;
	ES_COUNT(flushes, 1);
	es_arena_freed();

	dlist_delete(&f->node);
	nflushes--;
	if (f->builds != NULL)
		pfree(f->builds);
	pfree(f);
	es_drop_retired(last_retired);
	ES_FAULT("flush-retired");
}

/* ---- the state machine ---- */

/* One step of the oldest flush; false: it waits. */
static bool
advance(Flush *f, TimestampTz now)
{
	switch (f->stage)
	{
		case STAGE_VERDICTS:
			if (!verdicts_known(f, now))
				return false;
			carry_over(f);
			f->stage = STAGE_COLLECT;
			return true;

		case STAGE_COLLECT:
			if (!create_builds(f))
				return false;
			f->stage = STAGE_BUILD;
			return true;

		case STAGE_BUILD:
			if (!builds_finished(f) || !publish(f))
				return false;
			if (f->nbuilds > 0)
				f->directory = es_dir_sync();
			es_log_want_sync();
			f->stage = STAGE_DIRECTORY;
			return true;

		case STAGE_DIRECTORY:
			if (!es_dir_synced(f->directory))
				return false;
			f->stage = STAGE_LOG;
			return true;

		case STAGE_LOG:
			f->lsn = es_log_boundary_lsn(f->boundary);
			if (f->lsn == 0 || es_log_durable_ticket() < f->carry_ticket)
			{
				es_log_want_sync();
				return false;
			}
			if (es_spill_taking_back() || !es_adopt_settled(f->memtable->id) || !submit_record(f))
				return false;
			f->stage = STAGE_MANIFEST;
			return true;

		case STAGE_MANIFEST:
			if (!es_edit_done(f->edit))
				return false;
			retire(f);
			return true;
	}
	return false;
}

/* ---- what others ask ---- */

bool
es_flush_trouble(int *sqlerrcode, char *detail, Size len)
{
	int			   err = es_log_stuck_errno();
	const EsBuild *failed;

	if (err == 0)
		err = es_manifest_stuck_errno();
	if (err != 0)
	{
		*sqlerrcode = err == ENOSPC || err == EDQUOT ? ERRCODE_DISK_FULL : ERRCODE_IO_ERROR;
		snprintf(detail, len, "The shard's own log or manifest cannot be written: %s.", strerror(err));
		return true;
	}
	failed = es_spill_failed();
	if (!dlist_is_empty(&flushes))
	{
		Flush *f = dlist_head_element(Flush, node, &flushes);

		for (uint32 i = 0; i < f->nbuilds; i++)
			if (f->builds[i]->failures > 0)
				failed = f->builds[i];
	}
	if (failed == NULL)
		return false;
	*sqlerrcode = failed->sqlerrcode;
	snprintf(detail, len, "%s.", failed->error);
	return true;
}

uint64
es_flush_ask(void)
{
	if (es_memtable_active->nrows > 0)
		asked = es_memtable_active->id;
	else if (!dlist_is_empty(&flushes))
		return dlist_tail_element(Flush, node, &flushes)->memtable->id;
	else
		return 0;
	return asked;
}

void
es_flush_ask_past(uint64 memtable)
{
	asked_empty = Max(asked_empty, memtable);
}

void
es_flush_soon(void)
{
	(void) es_flush_ask();
}

bool
es_flush_retired(uint64 memtable)
{
	return last_retired >= memtable;
}

/* ---- the loop ---- */

void
es_flush_tick(void)
{
	TimestampTz now = GetCurrentTimestamp();

	es_arena_tick(now);
	if (es_arena_short)
		es_apply_limit_staging();
	es_builds_tick();
	es_drop_tick();
	es_spill_tick();
	es_adopt_tick();
	if (wants_to_turn(now))
		turn_passive(now);
	while (!dlist_is_empty(&flushes) && advance(dlist_head_element(Flush, node, &flushes), now))
		;
	reaping = es_memtable_reap(REAP_SLICE);
	es_flush_answer(now);
}

long
es_flush_timeout(void)
{
	long timeout = Min(es_spill_timeout(), es_adopt_timeout());

	if (es_flush_finishing() || reaping)
		return 0;
	if (es_arena_short)
		timeout = Min(timeout, 100);

	if (es_guc_memtable_age > 0 && es_memtable_active->first_row != 0)
		timeout = Min(timeout, TimestampDifferenceMilliseconds(
								   GetCurrentTimestamp(),
								   TimestampTzPlusMilliseconds(es_memtable_active->first_row,
															   (int64) es_guc_memtable_age * 1000)) +
								   1);
	if (!dlist_is_empty(&flushes))
	{
		Flush *f = dlist_head_element(Flush, node, &flushes);

		if (f->stage == STAGE_VERDICTS)
			timeout = Min(timeout, VERDICT_POLL);
		else if (f->stage == STAGE_COLLECT)
			return 0;
		else if (f->stage == STAGE_BUILD)
		{
			/* jobs wake the shard; a failed one, or one for which there is no place, does not */
			for (uint32 i = 0; i < f->nbuilds; i++)
				if (!f->builds[i]->finished && f->builds[i]->job == NULL)
					timeout = Min(timeout, es_build_hurries(f->builds[i]) ? 0 : 100);
		}
		else
			timeout = Min(timeout, 100);
	}
	return timeout == LONG_MAX ? -1 : timeout;
}

bool
es_flush_overloaded(void)
{
	if (es_arena_short)
		return true;
	if (nflushes >= MAX_PASSIVE && es_memtable_active->nbytes >= (Size) es_guc_memtable_size * 1024)
		return true;
	return pg_atomic_read_u64(&es_shard->counters.staged_bytes) > (Size) es_guc_staging_size * 1024 &&
		   !es_spill_idle();
}

/* Overloaded, and it will not get better by itself: errno for those who want to write, else 0. */
int
es_flush_stuck_errno(void)
{
	int	 sqlerrcode;
	char detail[320];

	if (!es_flush_overloaded())
		return 0;
	if (es_flush_trouble(&sqlerrcode, detail, sizeof(detail)) &&
		(sqlerrcode != ERRCODE_OUT_OF_MEMORY || (!es_arena_short && es_arena_private == 0)))
		return sqlerrcode == ERRCODE_DISK_FULL ? ENOSPC : EIO;
	return es_arena_stuck(dlist_is_empty(&flushes) && es_spill_idle()) ? ENOMEM : 0;
}

/*
 * Without a maintenance worker nothing can go into segments any more (the server stops and it
 * has crashed): own WAL has everything, the next start goes on from there.
 */
static bool
worker_alive(void)
{
	bool alive = false;

	LWLockAcquire(es_shared->jobs->lock, LW_SHARED);
	for (int i = 0; i < ES_MAX_MAINTENANCE; i++)
		alive |= es_shared->jobs->workers[i] != NULL;
	LWLockRelease(es_shared->jobs->lock);
	return alive;
}

bool
es_flush_idle(void)
{
	int	 sqlerrcode;
	char detail[320];

	(void) es_flush_ask();
	if (dlist_is_empty(&flushes) && es_memtable_active->nrows == 0 && es_spill_idle() && es_adopt_idle())
		return true;
	return !worker_alive() || es_flush_trouble(&sqlerrcode, detail, sizeof(detail));
}
