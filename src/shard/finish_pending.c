/*-------------------------------------------------------------------------
 *
 * finish_pending.c
 *	  What a FINISH means for the pending segments of its transaction: base position,
 *	  dead rows, first versions.
 *
 * FINISH says which batches live and which of their rows are not taken; a row of the
 * segment tells its batch and its row in it (ES_PENDING_PLACE).  If all batches of a
 * segment live and all rows are taken, no row has to be read.  Otherwise one column is,
 * and a bitmap of dead rows comes from it.
 *
 * In a table with versions each context of the segment gets the version of its first live
 * row: one more than the last one in an earlier pending segment of the same transaction, or
 * than the committed head of the context.  A pending segment precedes, in the order
 * of ordinals, all later ones of its table and all batches that are still in memory, so
 * segments are done in the order of their ids, and before the batches.
 *
 * This takes some µs per context, and a bulk load may have millions.  So it is done in
 * slices: es_apply_finish returns "not yet" after a slice, and whoever called it comes
 * again in the next turn of the loop.  Meanwhile no other FINISH is applied, so heads do not move, and
 * requests that have to see this FINISH wait, while scans that have begun, the log and
 * flushes go on.  What was computed stays here from call to call; there is one FINISH
 * at work at a time.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <stdlib.h>

#include "utils/memutils.h"

#include "core/route.h"
#include "shard/engine.h"
#include "shard/files.h"
#include "shard/flush.h"
#include "shard/shard.h"
#include "shard/task.h"

/* Contexts between two looks at the clock. */
#define CONTEXTS_PER_LOOK	64
#define SLICE				5000	/* µs */

/* A table of the FINISH. */
typedef struct Table
{
	EsFinishTableView view;
	uint64	   *starts;			/* of the live batches, ascending */
	uint64		nrows;			/* of live batches in the segments that are done */
	EsFirstVersion *versions;	/* what PREPARE answered, by hash */
} Table;

/* Contexts of the segment at work, by number of their index entry. */
typedef struct Contexts
{
	uint64	   *hashes;
	uint64	   *first_rows;
	uint64	   *nrows;
	uint32		n;
	uint32		allocated;
} Contexts;

typedef enum Phase
{
	PHASE_BEGIN,
	PHASE_PLACES,				/* reading the places of rows */
	PHASE_VERSIONS
} Phase;

/* The FINISH at work. */
typedef struct Finishing
{
	MemoryContext context;
	EsTxn	   *txn;			/* with a reference */
	EsSectionHeader *section;
	Table	   *tables;
	uint32		ntables;

	/* the segment at work */
	EsSegmentRef *ref;			/* with a reference; NULL = none */
	MemoryContext segment_context;
	Table	   *table;			/* NULL = no batch of its table lives */
	Phase		phase;
	EsSegment  *segment;
	EsRowBlock *block;
	bool	   *wanted;
	uint32		next_zone;
	int64	   *places;
	Contexts	contexts;
	uint32		next_context;
	EsZoneInfo	zone;			/* in block */
} Finishing;

static Finishing *work = NULL;

/* ---- small things ---- */

static int
compare_uint64(const void *x, const void *y)
{
	uint64		a = *(const uint64 *) x;
	uint64		b = *(const uint64 *) y;

	return a < b ? -1 : a > b;
}

static int
compare_versions(const void *x, const void *y)
{
	return compare_uint64(&((const EsFirstVersion *) x)->context_hash,
						  &((const EsFirstVersion *) y)->context_hash);
}

static bool
is_live(const Table *t, uint64 start)
{
	return t != NULL &&
		bsearch(&start, t->starts, t->view.table->nlogged, sizeof(uint64), compare_uint64) != NULL;
}

static void
damaged(EsSegmentRef *ref, const EsError *err)
{
	es_segment_damaged(ref, err);
	es_corruption(ERROR, es_segment_path(ref), err);
}

static EsSegment *
open_segment(EsSegmentRef *ref)
{
	EsError		err = {0};
	EsSegment  *segment = es_segment_handle(ref, &err);

	if (segment == NULL)
		es_corruption(ERROR, es_segment_path(ref), &err);
	return segment;
}

/* What becomes part of an EsManifestEntry is malloc'd. */
static void *
zeroed(Size len)
{
	void	   *p = calloc(1, Max(len, 1));

	if (p == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("out of memory")));
	return p;
}

static void
read_zone(Finishing *f, const EsZoneInfo *zone)
{
	EsError		err = {0};

	if (es_segment_read(f->segment, zone->first_row, zone->nrows, f->wanted, 0, f->block, &err) != ES_OK)
		damaged(f->ref, &err);
}

/* Makes the block ready for reading one column. */
static void
want_column(Finishing *f, int column)
{
	const EsSegmentInfo *info = es_segment_info(f->segment);

	f->wanted = palloc0(info->ncols * sizeof(bool));
	f->wanted[column] = true;
	if (f->block == NULL)
		f->block = es_block_create();
	if (f->block == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("out of memory")));
	f->next_zone = 0;
}

/* ---- which rows live ---- */

/* Reads the place (batch and row in it) of every row.  False: the slice is over. */
static bool
read_places(Finishing *f, int64 deadline)
{
	const EsSegmentInfo *info = es_segment_info(f->segment);
	int			column = es_segment_ncols(info) + ES_PENDING_PLACE;

	while (f->next_zone < info->nzones)
	{
		EsZoneInfo	zone = es_segment_zone(f->segment, f->next_zone++);

		read_zone(f, &zone);
		for (uint32 r = 0; r < zone.nrows; r++)
		{
			const int64 *value = es_block_value(f->block, column, r);

			f->places[zone.first_row + r] = value != NULL ? *value : -1;
		}
		es_shard_interrupts();
		if (deadline != 0 && es_task_clock() >= deadline)
			return false;
	}
	return true;
}

/* Rows of live batches are numbered through in FINISH's bitmap: by batch the first one's number. */
static uint64 *
number_rows(Finishing *f)
{
	const EsManifestEntry *e = &f->ref->entry;
	uint64	   *first = palloc0((e->nstarts + 1) * sizeof(uint64));
	uint64	   *counts = palloc0((e->nstarts + 1) * sizeof(uint64));

	for (uint64 row = 0; row < e->segment.nrows; row++)
	{
		uint64		batch = (uint64) f->places[row] >> ES_PENDING_ROW_BITS;

		if (batch >= e->nstarts)
		{
			EsError		err = {0};

			es_fail(&err, ES_ERR_CORRUPT, 0, "row %llu names batch %llu of %u",
					(unsigned long long) row, (unsigned long long) batch, e->nstarts);
			damaged(f->ref, &err);
		}
		counts[batch]++;
	}
	for (uint32 i = 0; i < e->nstarts; i++)
		if (is_live(f->table, e->starts[i]))
		{
			first[i] = f->table->nrows;
			f->table->nrows += counts[i];
		}
		else
			first[i] = UINT64_MAX;
	return first;
}

static void
mark_dead_rows(Finishing *f)
{
	EsManifestEntry *e = &f->ref->entry;
	const EsFinishTableView *view = &f->table->view;
	uint64	   *first = number_rows(f);

	e->dead_bitmap = zeroed((e->segment.nrows + 63) / 64 * 8);
	for (uint64 row = 0; row < e->segment.nrows; row++)
	{
		uint64		n = first[(uint64) f->places[row] >> ES_PENDING_ROW_BITS];
		bool		dead = n == UINT64_MAX;

		if (!dead && view->not_taken != NULL)
		{
			n += f->places[row] & ((1 << ES_PENDING_ROW_BITS) - 1);
			dead = n < view->table->nrows && (view->not_taken[n >> 3] >> (n & 7)) & 1;
		}
		if (dead)
		{
			e->dead_bitmap[row >> 3] |= 1 << (row & 7);
			e->nlive--;
		}
	}
}

/* Sets nlive as far as batches tell.  Must rows be read? */
static bool
begin_dead_rows(Finishing *f)
{
	EsManifestEntry *e = &f->ref->entry;
	bool		all = f->table != NULL && f->table->view.not_taken == NULL;
	bool		none = true;

	for (uint32 i = 0; i < e->nstarts; i++)
	{
		bool		live = is_live(f->table, e->starts[i]);

		all &= live;
		none &= !live;
	}
	e->nlive = none ? 0 : e->segment.nrows;
	if (all && !none)
		f->table->nrows += e->segment.nrows;
	return !all && !none;
}

/* ---- first versions ---- */

static EsStatus
collect_context(void *arg, uint32 entry, uint64 hash, uint64 first_row, uint64 nrows)
{
	Contexts   *c = arg;

	if (c->n == c->allocated)
	{
		c->allocated *= 2;
		c->hashes = repalloc_huge(c->hashes, c->allocated * sizeof(uint64));
		c->first_rows = repalloc_huge(c->first_rows, c->allocated * sizeof(uint64));
		c->nrows = repalloc_huge(c->nrows, c->allocated * sizeof(uint64));
	}
	c->hashes[c->n] = hash;
	c->first_rows[c->n] = first_row;
	c->nrows[c->n++] = nrows;
	return ES_OK;
}

static void
begin_versions(Finishing *f)
{
	Contexts   *c = &f->contexts;
	EsError		err = {0};

	memset(c, 0, sizeof(*c));
	c->allocated = 1024;
	c->hashes = palloc(c->allocated * sizeof(uint64));
	c->first_rows = palloc(c->allocated * sizeof(uint64));
	c->nrows = palloc(c->allocated * sizeof(uint64));
	if (es_segment_walk_contexts(f->segment, collect_context, c, &err) != ES_OK)
		damaged(f->ref, &err);
	f->ref->entry.first_versions = zeroed(c->n * sizeof(int64));
	want_column(f, es_segment_info(f->segment)->roles.context - 1);
	f->next_context = 0;
	memset(&f->zone, 0, sizeof(f->zone));
}

/* The last version that an earlier pending segment of the transaction gave to the context, or 0. */
static int64
version_in_earlier(Finishing *f, uint64 hash, const void *bytes, size_t len)
{
	List	   *pending = f->txn->pending;
	int			at = list_length(pending) - 1;

	while (at >= 0 && list_nth(pending, at) != f->ref)
		at--;
	while (--at >= 0)
	{
		EsSegmentRef *earlier = list_nth(pending, at);
		EsError		err = {0};
		uint64		first_row;
		uint64		nrows;
		uint64		live;
		uint32		entry;

		if (earlier->entry.nfirst_versions == 0 ||
			!es_table_key_equal(&earlier->entry.segment.table, &f->ref->entry.segment.table))
			continue;
		if (es_segment_find_context(open_segment(earlier), hash, bytes, len, &first_row, &nrows,
									&entry, &err) != ES_OK)
			damaged(earlier, &err);
		if (nrows == 0 || entry >= earlier->entry.nfirst_versions)
			continue;
		live = es_segment_live_rows(earlier, first_row, first_row + nrows);
		if (live > 0)
			return earlier->entry.first_versions[entry] + (int64) live - 1;
	}
	return 0;
}

/* Throws if PREPARE promised another version.  Two contexts may share a hash: one that agrees is enough. */
static void
check_promise(Finishing *f, uint64 hash, int64 version)
{
	const Table *t = f->table;
	uint32		n = t->view.table->nversions;
	EsFirstVersion key = {.context_hash = hash};
	const EsFirstVersion *found = NULL;
	const EsFirstVersion *end = t->versions + n;

	if (n > 0)
		found = bsearch(&key, t->versions, n, sizeof(key), compare_versions);
	if (found == NULL)
		return;
	while (found > t->versions && found[-1].context_hash == hash)
		found--;
	for (; found < end && found->context_hash == hash; found++)
		if (found->first_version == version)
			return;
	ES_COUNT(corruptions, 1);
	ereport(ERROR,
			(errcode(ERRCODE_DATA_CORRUPTED),
			 errmsg("shard %d would give version %lld where transaction %llu was promised another one",
					es_shard_id, (long long) version, (unsigned long long) f->txn->fxid),
			 errdetail("Context hash %016llx, storage %llu of database %u.",
					   (unsigned long long) hash,
					   (unsigned long long) t->view.table->table.storage_id,
					   t->view.table->table.database),
			 errhint("The shard stops so that no version is used twice. Please report this.")));
}

/* The version before the first live row of a context. */
static int64
version_before(Finishing *f, uint64 hash, uint64 first_row)
{
	const EsSegmentInfo *info = es_segment_info(f->segment);
	int			column = info->roles.context - 1;
	const void *value;
	const void *bytes;
	const char *path;
	size_t		len;
	int64		scratch;
	int64		last;
	EsHead		head;
	EsError		err = {0};

	/* contexts come in the order of rows: a zone is read once */
	if (first_row >= f->zone.first_row + f->zone.nrows)
	{
		do
			f->zone = es_segment_zone(f->segment, f->next_zone++);
		while (first_row >= f->zone.first_row + f->zone.nrows);
		read_zone(f, &f->zone);
	}
	value = es_block_value(f->block, column, (uint32) (first_row - f->zone.first_row));
	if (value == NULL)
	{
		es_fail(&err, ES_ERR_CORRUPT, 0, "row %llu has no context", (unsigned long long) first_row);
		damaged(f->ref, &err);
	}
	es_context_bytes(info->roles.context_class, info->columns[column].len, value, &scratch, &bytes, &len);

	last = version_in_earlier(f, hash, bytes, len);
	if (last > 0)
		return last;
	if (!es_head_lookup(&f->ref->entry.segment.table, hash, bytes, len, &head, &err, &path))
		es_corruption(ERROR, path, &err);
	check_promise(f, hash, head.version + 1);
	return head.version;
}

/* False: the slice is over. */
static bool
find_first_versions(Finishing *f, int64 deadline)
{
	Contexts   *c = &f->contexts;

	while (f->next_context < c->n)
	{
		uint32		i = f->next_context++;
		uint64		first_row = c->first_rows[i];

		if (es_segment_live_rows(f->ref, first_row, first_row + c->nrows[i]) > 0)
			f->ref->entry.first_versions[i] = version_before(f, c->hashes[i], first_row) + 1;
		if (i % CONTEXTS_PER_LOOK == 0)
		{
			es_shard_interrupts();
			if (deadline != 0 && es_task_clock() >= deadline)
				return false;
		}
	}
	f->ref->entry.nfirst_versions = c->n;
	return true;
}

/* ---- a segment ---- */

static void
begin_segment(Finishing *f, EsSegmentRef *ref)
{
	es_segment_ref(ref);
	f->ref = ref;
	f->segment_context = AllocSetContextCreate(f->context, "event_store pending segment",
											   ALLOCSET_DEFAULT_SIZES);
	f->phase = PHASE_BEGIN;
	f->segment = NULL;
	f->table = NULL;
	for (uint32 i = 0; i < f->ntables; i++)
		if (es_table_key_equal(&f->tables[i].view.table->table, &ref->entry.segment.table))
			f->table = &f->tables[i];
}

static void
end_segment(Finishing *f)
{
	f->ref->finished = true;
	es_segment_unref(f->ref);
	f->ref = NULL;
	MemoryContextDelete(f->segment_context);
}

/* False: the slice is over. */
static bool
run_segment(Finishing *f, int64 deadline)
{
	EsManifestEntry *e = &f->ref->entry;
	MemoryContext old = MemoryContextSwitchTo(f->segment_context);
	bool		done = true;

	if (f->phase == PHASE_BEGIN && begin_dead_rows(f))
	{
		f->segment = open_segment(f->ref);
		f->places = palloc_extended(Max(e->segment.nrows, 1) * sizeof(int64), MCXT_ALLOC_HUGE);
		want_column(f, es_segment_ncols(es_segment_info(f->segment)) + ES_PENDING_PLACE);
		f->phase = PHASE_PLACES;
	}
	if (f->phase == PHASE_PLACES)
	{
		done = read_places(f, deadline);
		if (done)
			mark_dead_rows(f);
	}
	if (done && f->phase != PHASE_VERSIONS && e->nlive > 0)
	{
		const EsSegmentInfo *info;
		uint32		flags = f->table->view.table->flags;

		f->segment = open_segment(f->ref);
		info = es_segment_info(f->segment);
		e->base = (flags & ES_FINISH_GIVEN_POSITIONS) ? 0 : f->section->base;
		e->segment.min_position = e->base + info->summary.min_position;
		e->segment.max_position = e->base + info->summary.max_position;
		if (info->roles.version != 0 && !(flags & ES_FINISH_GIVEN_VERSIONS))
		{
			begin_versions(f);
			f->phase = PHASE_VERSIONS;
		}
	}
	if (done && f->phase == PHASE_VERSIONS)
		done = find_first_versions(f, deadline);
	MemoryContextSwitchTo(old);
	return done;
}

/* ---- a FINISH ---- */

static void
begin(EsTxn *txn, const EsSectionHeader *section)
{
	MemoryContext context = AllocSetContextCreate(TopMemoryContext, "event_store FINISH of pending segments",
												  ALLOCSET_DEFAULT_SIZES);
	MemoryContext old = MemoryContextSwitchTo(context);
	const EsFinishTable *table;

	work = palloc0(sizeof(Finishing));
	work->context = context;
	work->txn = txn;
	es_txn_ref(txn);
	work->section = MemoryContextAllocHuge(context, section->len);
	memcpy(work->section, section, section->len);
	section = work->section;
	work->tables = palloc0(Max(section->ntables, 1) * sizeof(Table));
	for (table = es_section_first(section); table != NULL; table = es_section_next(section, table))
	{
		Table	   *t = &work->tables[work->ntables++];

		es_finish_table_view(table, &t->view);
		t->starts = palloc(Max(table->nlogged, 1) * sizeof(uint64));
		memcpy(t->starts, t->view.batch_starts, table->nlogged * sizeof(uint64));
		qsort(t->starts, table->nlogged, sizeof(uint64), compare_uint64);
		t->versions = palloc(Max(table->nversions, 1) * sizeof(EsFirstVersion));
		memcpy(t->versions, t->view.versions, table->nversions * sizeof(EsFirstVersion));
		qsort(t->versions, table->nversions, sizeof(EsFirstVersion), compare_versions);
	}
	MemoryContextSwitchTo(old);
}

static void
end(void)
{
	Finishing  *f = work;
	ListCell   *lc;

	if (f->ref != NULL)
		es_segment_unref(f->ref);

	/* what is cached of these tables' heads knows nothing of the segments */
	foreach(lc, f->txn->pending)
		es_heads_forget_storage(&((EsSegmentRef *) lfirst(lc))->entry.segment.table);
	es_segments_changed();
	work = NULL;
	es_block_free(f->block);
	es_txn_unref(f->txn);
	MemoryContextDelete(f->context);
}

bool
es_finish_pending(EsTxn *txn, const EsSectionHeader *section, int64 deadline)
{
	ListCell   *lc;

	if (work == NULL)
		begin(txn, section);
	Assert(work->txn == txn);
	foreach(lc, txn->pending)
	{
		EsSegmentRef *ref = lfirst(lc);

		/* done in an earlier slice, or before a crash */
		if (ref->finished || ref->entry.adopted)
			continue;
		if (work->ref == NULL)
			begin_segment(work, ref);
		Assert(work->ref == ref);
		if (!run_segment(work, deadline))
			return false;
		end_segment(work);
	}
	/* the caller's last call, without a deadline, comes when nothing can stop the FINISH any more */
	if (deadline == 0)
		end();
	return true;
}

bool
es_flush_finish_slice(EsTxn *txn, const EsSectionHeader *section)
{
	return es_finish_pending(txn, section, es_task_clock() + SLICE);
}

bool
es_flush_finishing(void)
{
	/* a transaction that aborts after it has sent its FINISH: nobody will come for the next slice */
	if (work != NULL && work->txn->verdict == ES_VERDICT_ABORTED)
		end();
	return work != NULL;
}
