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
 * In a table with versions each context of a segment gets the version of its first live
 * row.  All segments of the table are walked side by side, in the order of context
 * hashes, which is that of their context indexes.  So a context's entries in all of them are
 * met together: the first one begins behind the committed head, which is looked for once, and
 * each following one behind the one before, for segments hold the rows in the order of
 * ordinals.  They precede all batches of the table that are still in memory.  Restored rows have
 * their versions already, and precede the new ones of their transaction, which go on where they end.
 *
 * This takes some µs per context, and a bulk load may have millions.  So it is done in
 * slices: es_apply_finish returns "not yet" after a slice, and whoever called it comes
 * again in the next turn of the loop.  Meanwhile no other FINISH is applied, so heads do not move, and
 * requests that have to see this FINISH wait, while scans that have begun, the log and
 * flushes go on.  What was computed stays here from call to call; there is one FINISH
 * at work at a time, and no spill of its transaction is recorded any more.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <stdlib.h>

#include "lib/binaryheap.h"
#include "utils/memutils.h"

#include "ipc/fault.h"
#include "shard/apply.h"
#include "shard/engine.h"
#include "shard/files.h"
#include "shard/flush.h"
#include "shard/shard.h"
#include "shard/task.h"

/* Contexts between two looks at the clock. */
#define CONTEXTS_PER_LOOK 64
#define SLICE			  5000 /* µs */

/* A segment whose context index is being walked. */
typedef struct Walk
{
	EsSegmentRef   *ref;
	EsSegment	   *segment;
	uint32			number;	  /* in the order of ordinals */
	bool			given;	  /* restored rows, with their versions */
	EsContextEntry *entries;  /* a page of them */
	int64		   *versions; /* first ones, by number of the entry */
	uint32			nversions;
	uint32			n;
	uint32			at;
	uint32			page; /* its number */
} Walk;

/* A context of the hash at work. */
typedef struct Context
{
	char  *bytes;
	size_t len;
	int64  version; /* last one given */
} Context;

/* A table of the FINISH. */
typedef struct Table
{
	EsFinishTableView view;
	uint64			 *starts;	/* of the live batches, ascending */
	uint64			  nrows;	/* of live batches in the segments that are done */
	EsFirstVersion	 *versions; /* what PREPARE answered, by hash */
} Table;

typedef enum Phase
{
	PHASE_DEAD_ROWS, /* segment by segment */
	PHASE_VERSIONS,	 /* table by table */
	PHASE_DONE
} Phase;

/* The FINISH at work. */
typedef struct Finishing
{
	MemoryContext	 context;
	EsTxn			*txn; /* with a reference */
	EsSectionHeader *section;
	Table			*tables;
	uint32			 ntables;
	EsSegmentRef   **refs;	   /* the pending segments, each with a reference */
	Table		   **table_of; /* NULL = no batch of that table lives */
	uint32			 nrefs;
	Phase			 phase;
	uint32			 at; /* number of the segment, or of the table */
	EsRowBlock		*block;

	/* the segment or table at work */
	MemoryContext step; /* NULL = not begun */
	EsSegment	 *segment;
	bool		 *wanted;
	uint32		  next_zone;
	int64		 *places;
	Walk		 *walks;
	uint32		  nwalks;
	binaryheap	 *heap;		/* of Walk, lowest hash first */
	Context		 *contexts; /* of one hash */
	uint32		  ncontexts;
	uint32		  contexts_allocated;
} Finishing;

static Finishing *work = NULL;

/* ---- small things ---- */

static int
compare_uint64(const void *x, const void *y)
{
	uint64 a = *(const uint64 *) x;
	uint64 b = *(const uint64 *) y;

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
	EsError	   err = {0};
	EsSegment *segment = es_segment_handle(ref, &err);

	if (segment == NULL)
		es_corruption(ERROR, es_segment_path(ref), &err);
	return segment;
}

/* What becomes part of an EsManifestEntry is malloc'd. */
static void *
zeroed(Size len)
{
	void *p = calloc(1, Max(len, 1));

	if (p == NULL)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
	return p;
}

static bool
slice_over(int64 deadline)
{
	es_shard_interrupts();
	return deadline != 0 && es_task_clock() >= deadline;
}

/* ---- which rows live ---- */

/* Reads the place (batch and row in it) of every row.  False: the slice is over. */
static bool
read_places(Finishing *f, EsSegmentRef *ref, int64 deadline)
{
	const EsSegmentInfo *info = es_segment_info(f->segment);
	int					 column = es_segment_ncols(info) + ES_PENDING_PLACE;

	while (f->next_zone < info->nzones)
	{
		EsZoneInfo zone = es_segment_zone(f->segment, f->next_zone++);
		EsError	   err = {0};

		if (es_segment_read(f->segment, zone.first_row, zone.nrows, f->wanted, 0, f->block, &err) != ES_OK)
			damaged(ref, &err);
		for (uint32 r = 0; r < zone.nrows; r++)
		{
			const int64 *value = es_block_value(f->block, column, r);

			f->places[zone.first_row + r] = value != NULL ? *value : -1;
		}
		if (slice_over(deadline))
			return false;
	}
	return true;
}

/* Rows of live batches are numbered through in FINISH's bitmap: by batch the first one's number. */
static uint64 *
number_rows(Finishing *f, EsSegmentRef *ref, Table *t)
{
	const EsManifestEntry *e = &ref->entry;
	uint64				  *first = palloc0((e->nstarts + 1) * sizeof(uint64));
	uint64				  *counts = palloc0((e->nstarts + 1) * sizeof(uint64));

	for (uint64 row = 0; row < e->segment.nrows; row++)
	{
		uint64 batch = (uint64) f->places[row] >> ES_PENDING_ROW_BITS;

		if (batch >= e->nstarts)
		{
			EsError err = {0};

			es_fail(&err, ES_ERR_CORRUPT, 0, "row %llu names batch %llu of %u", (unsigned long long) row,
					(unsigned long long) batch, e->nstarts);
			damaged(ref, &err);
		}
		counts[batch]++;
	}
	for (uint32 i = 0; i < e->nstarts; i++)
		if (is_live(t, e->starts[i]))
		{
			first[i] = t->nrows;
			t->nrows += counts[i];
		}
		else
			first[i] = UINT64_MAX;
	return first;
}

static void
mark_dead_rows(Finishing *f, EsSegmentRef *ref, Table *t)
{
	EsManifestEntry			*e = &ref->entry;
	const EsFinishTableView *view = &t->view;
	uint64					*first = number_rows(f, ref, t);

	e->dead_bitmap = zeroed((e->segment.nrows + 63) / 64 * 8);
	for (uint64 row = 0; row < e->segment.nrows; row++)
	{
		uint64 n = first[(uint64) f->places[row] >> ES_PENDING_ROW_BITS];
		bool   dead = n == UINT64_MAX;

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
look_at_batches(EsSegmentRef *ref, Table *t)
{
	EsManifestEntry *e = &ref->entry;
	bool			 all = t != NULL && t->view.not_taken == NULL;
	bool			 none = true;

	for (uint32 i = 0; i < e->nstarts; i++)
	{
		bool live = is_live(t, e->starts[i]);

		all &= live;
		none &= !live;
	}
	e->nlive = none ? 0 : e->segment.nrows;
	if (all && !none)
		t->nrows += e->segment.nrows;
	return !all && !none;
}

/* All about a segment but versions.  False: the slice is over. */
static bool
find_dead_rows(Finishing *f, EsSegmentRef *ref, Table *t, int64 deadline)
{
	EsManifestEntry *e = &ref->entry;

	if (f->next_zone == 0 && look_at_batches(ref, t))
	{
		f->segment = open_segment(ref);
		f->places = palloc_extended(Max(e->segment.nrows, 1) * sizeof(int64), MCXT_ALLOC_HUGE);
		f->wanted = palloc0(es_segment_info(f->segment)->ncols * sizeof(bool));
		f->wanted[es_segment_ncols(es_segment_info(f->segment)) + ES_PENDING_PLACE] = true;
	}
	if (f->places != NULL)
	{
		if (!read_places(f, ref, deadline))
			return false;
		mark_dead_rows(f, ref, t);
	}
	if (e->nlive > 0 || e->dead_bitmap != NULL)
	{
		const EsSegmentInfo *info = es_segment_info(open_segment(ref));

		e->base = es_segment_given_positions(open_segment(ref)) ? 0 : f->section->base;
		e->segment.min_position = e->base + info->summary.min_position;
		e->segment.max_position = e->base + info->summary.max_position;
	}
	return true;
}

/* ---- first versions ---- */

static int
compare_walks(Datum x, Datum y, void *arg)
{
	const Walk *a = (const Walk *) DatumGetPointer(x);
	const Walk *b = (const Walk *) DatumGetPointer(y);
	uint64		ha = a->entries[a->at].hash;
	uint64		hb = b->entries[b->at].hash;

	/* the heap has its largest on top */
	if (ha != hb)
		return ha < hb ? 1 : -1;
	return a->number < b->number ? 1 : -1;
}

/* Makes the walk's next entry ready; false at the end. */
static bool
next_entry(Walk *w, bool first)
{
	EsError err = {0};

	if (!first && ++w->at < w->n)
		return true;
	if (!first)
		w->page++;
	if (es_segment_context_page(w->segment, w->page, w->entries, &w->n, &err) != ES_OK)
		damaged(w->ref, &err);
	w->at = 0;
	return w->n > 0;
}

static void
begin_versions(Finishing *f, Table *t)
{
	bool restore = (t->view.table->flags & ES_FINISH_GIVEN_VERSIONS) != 0;

	f->walks = palloc0(f->nrefs * sizeof(Walk));
	f->nwalks = 0;
	f->heap = binaryheap_allocate(Max(f->nrefs, 1), compare_walks, NULL);
	f->contexts = NULL;
	f->contexts_allocated = 0;
	if (restore)
	{
		/* mostly there is nothing but restored rows, and nothing to do */
		bool all_given = true;

		for (uint32 i = 0; i < f->nrefs; i++)
			if (f->table_of[i] == t && f->refs[i]->entry.nlive > 0)
				all_given = all_given && es_segment_given_positions(open_segment(f->refs[i]));
		if (all_given)
			return;
	}
	for (uint32 i = 0; i < f->nrefs; i++)
	{
		EsSegmentRef *ref = f->refs[i];
		Walk		 *w;

		if (f->table_of[i] != t || ref->entry.nlive == 0)
			continue;
		w = &f->walks[f->nwalks];
		w->ref = ref;
		w->segment = open_segment(ref);
		if (es_segment_info(w->segment)->roles.version == 0)
			continue;
		w->number = f->nwalks++;
		w->given = restore && es_segment_given_positions(w->segment);
		w->entries = palloc(sizeof(EsContextEntry) * ES_CONTEXT_PAGE);
		w->nversions = (uint32) es_segment_info(w->segment)->summary.ncontexts;
		w->versions =
			palloc_extended(Max(w->nversions, 1) * sizeof(int64), MCXT_ALLOC_HUGE | MCXT_ALLOC_ZERO);
		if (next_entry(w, true))
			binaryheap_add(f->heap, PointerGetDatum(w));
	}
}

/*
 * The context's first version, or throws if PREPARE promised another one.  After release_wal rows before it may
 * be lost: then the promise holds.  Two contexts may share a hash: one that agrees is enough.
 */
static int64
first_version(Finishing *f, const Table *t, uint64 hash, int64 version)
{
	uint32				  n = t->view.table->nversions;
	EsFirstVersion		  key = {.context_hash = hash};
	const EsFirstVersion *found = NULL;
	const EsFirstVersion *end = t->versions + n;

	if (n > 0)
		found = bsearch(&key, t->versions, n, sizeof(key), compare_versions);
	if (found == NULL)
		return version;
	while (found > t->versions && found[-1].context_hash == hash)
		found--;
	for (; found < end && found->context_hash == hash; found++)
		if (found->first_version == version)
			return version;
	/* what was met last is one of this hash */
	if (es_versions_as_promised && found[-1].first_version > version)
		return found[-1].first_version;
	ES_COUNT(corruptions, 1);
	ereport(ERROR,
			(errcode(ERRCODE_DATA_CORRUPTED),
			 errmsg("shard %d would give version %lld where transaction %llu was promised another one",
					es_shard_id, (long long) version, (unsigned long long) f->txn->fxid),
			 errdetail("Context hash %016llx, storage %llu of database %u.", (unsigned long long) hash,
					   (unsigned long long) t->view.table->table.storage_id, t->view.table->table.database),
			 errhint("The shard stops so that no version is used twice. Please report this.")));
}

/* The context of the walk's entry among those of its hash; looks for its head if it is new. */
static Context *
get_context(Finishing *f, const Table *t, Walk *w)
{
	const EsContextEntry *entry = &w->entries[w->at];
	const void			 *bytes;
	size_t				  len;
	int64				  scratch;
	Context				 *c;
	EsHead				  head;
	EsError				  err = {0};
	const char			 *path;

	if (es_segment_context(w->segment, entry->first_row, &scratch, &bytes, &len, &err) != ES_OK)
		damaged(w->ref, &err);
	for (uint32 i = 0; i < f->ncontexts; i++)
	{
		c = &f->contexts[i];
		if (c->len == len && memcmp(c->bytes, bytes, len) == 0)
			return c;
	}

	/* bytes and structs are used again for the next hash: there is hardly ever more than one */
	if (f->ncontexts == f->contexts_allocated)
	{
		uint32 n = Max(4, f->contexts_allocated * 2);

		f->contexts =
			f->contexts == NULL ? palloc0(n * sizeof(Context)) : repalloc(f->contexts, n * sizeof(Context));
		memset(f->contexts + f->contexts_allocated, 0, (n - f->contexts_allocated) * sizeof(Context));
		f->contexts_allocated = n;
	}
	c = &f->contexts[f->ncontexts++];
	if (c->bytes != NULL)
		pfree(c->bytes);
	c->bytes = palloc(Max(len, 1));
	memcpy(c->bytes, bytes, len);
	c->len = len;
	if (!es_head_search(&t->view.table->table, entry->hash, c->bytes, len, &head, &err, &path))
		es_corruption(ERROR, path, &err);
	c->version = first_version(f, t, entry->hash, head.version + 1) - 1;
	return c;
}

static void
pack_versions(Walk *w)
{
	int64 lowest = PG_INT64_MAX;

	/* contexts without a live row have none: any value that does not widen the others will do */
	for (uint32 i = 0; i < w->nversions; i++)
		if (w->versions[i] != 0)
			lowest = Min(lowest, w->versions[i]);
	for (uint32 i = 0; i < w->nversions; i++)
		if (w->versions[i] == 0)
			w->versions[i] = lowest;
	if (es_manifest_pack_versions(&w->ref->entry, w->versions, w->nversions) != ES_OK)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
}

/* False: the slice is over. */
static bool
find_first_versions(Finishing *f, Table *t, int64 deadline)
{
	uint64 hash = 0;
	uint32 done = 0;

	f->ncontexts = 0;
	while (!binaryheap_empty(f->heap))
	{
		Walk				 *w = (Walk *) DatumGetPointer(binaryheap_first(f->heap));
		const EsContextEntry *e = &w->entries[w->at];
		uint64				  live;

		/* a slice ends between two hashes, so that a context's entries are met in one */
		if (e->hash != hash)
		{
			if (++done % CONTEXTS_PER_LOOK == 0 && slice_over(deadline))
				return false;
			f->ncontexts = 0;
			hash = e->hash;
		}
		live = es_segment_live_rows(w->ref, e->first_row, e->first_row + e->nrows);
		if (live > 0)
		{
			Context *c = get_context(f, t, w);

			if (w->given)
			{
				EsError err = {0};
				int64	version;

				if (!es_segment_last_version(w->ref, w->segment, e->first_row, e->first_row + e->nrows,
											 &version, &err))
					damaged(w->ref, &err);
				c->version = Max(c->version, version);
			}
			else
			{
				w->versions[w->page * ES_CONTEXT_PAGE + w->at] = c->version + 1;
				c->version += (int64) live;
			}
		}
		if (next_entry(w, false))
			binaryheap_replace_first(f->heap, PointerGetDatum(w));
		else
			(void) binaryheap_remove_first(f->heap);
	}
	for (uint32 i = 0; i < f->nwalks; i++)
		if (!f->walks[i].given)
			pack_versions(&f->walks[i]);
	return true;
}

/* ---- a FINISH ---- */

static void
begin(EsTxn *txn, const EsSectionHeader *section)
{
	MemoryContext context = AllocSetContextCreate(TopMemoryContext, "event_store FINISH of pending segments",
												  ALLOCSET_DEFAULT_SIZES);
	MemoryContext old = MemoryContextSwitchTo(context);
	Finishing	 *f = palloc0(sizeof(Finishing));
	const EsFinishTable *table;
	ListCell			*lc;

	f->context = context;
	f->txn = txn;
	es_txn_ref(txn);
	f->section = MemoryContextAllocHuge(context, section->len);
	memcpy(f->section, section, section->len);
	f->tables = palloc0(Max(section->ntables, 1) * sizeof(Table));
	for (table = es_section_first(f->section); table != NULL; table = es_section_next(f->section, table))
	{
		Table *t = &f->tables[f->ntables++];

		es_finish_table_view(table, &t->view);
		t->starts = palloc(Max(table->nlogged, 1) * sizeof(uint64));
		memcpy(t->starts, t->view.batch_starts, table->nlogged * sizeof(uint64));
		qsort(t->starts, table->nlogged, sizeof(uint64), compare_uint64);
		t->versions = palloc(Max(table->nversions, 1) * sizeof(EsFirstVersion));
		memcpy(t->versions, t->view.versions, table->nversions * sizeof(EsFirstVersion));
		qsort(t->versions, table->nversions, sizeof(EsFirstVersion), compare_versions);
	}
	f->refs = palloc(list_length(txn->pending) * sizeof(EsSegmentRef *));
	f->table_of = palloc0(list_length(txn->pending) * sizeof(Table *));
	foreach(lc, txn->pending)
	{
		EsSegmentRef *ref = lfirst(lc);

		/* adopted before a crash: all of it is there */
		if (ref->entry.adopted)
			continue;
		for (uint32 i = 0; i < f->ntables; i++)
			if (es_table_key_equal(&f->tables[i].view.table->table, &ref->entry.segment.table))
				f->table_of[f->nrefs] = &f->tables[i];
		es_segment_ref(ref);
		f->refs[f->nrefs++] = ref;
	}
	f->block = es_block_create();
	if (f->block == NULL)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
	work = f;
	MemoryContextSwitchTo(old);
}

static void
end(void)
{
	Finishing *f = work;

	work = NULL;
	es_segments_changed();
	for (uint32 i = 0; i < f->nrefs; i++)
		es_segment_unref(f->refs[i]);
	es_block_free(f->block);
	es_txn_unref(f->txn);
	MemoryContextDelete(f->context);
}

/* One segment or table.  False: the slice is over. */
static bool
run_step(Finishing *f, int64 deadline)
{
	bool		  begun = f->step != NULL;
	MemoryContext old;
	bool		  done;

	if (!begun)
		f->step = AllocSetContextCreate(f->context, "event_store pending segment", ALLOCSET_DEFAULT_SIZES);
	old = MemoryContextSwitchTo(f->step);
	if (f->phase == PHASE_DEAD_ROWS)
	{
		if (!begun)
		{
			f->next_zone = 0;
			f->places = NULL;
		}
		done = find_dead_rows(f, f->refs[f->at], f->table_of[f->at], deadline);
	}
	else
	{
		if (!begun)
			begin_versions(f, &f->tables[f->at]);
		done = find_first_versions(f, &f->tables[f->at], deadline);
	}
	MemoryContextSwitchTo(old);
	if (done)
	{
		MemoryContextDelete(f->step);
		f->step = NULL;
	}
	return done;
}

bool
es_finish_pending(EsTxn *txn, const EsSectionHeader *section, int64 deadline)
{
	/* the one before aborted after it had sent its FINISH: nobody comes for the rest of its slices */
	if (work != NULL && work->txn != txn)
		end();
	if (work == NULL)
		begin(txn, section);
	while (work->phase != PHASE_DONE)
	{
		if (work->at == (work->phase == PHASE_DEAD_ROWS ? work->nrefs : work->ntables))
		{
			work->phase++;
			work->at = 0;
			continue;
		}
		ES_FAULT("adopt-finishing");
		if (!run_step(work, deadline))
			return false;
		work->at++;
	}
	/* the caller's last call, without a deadline, comes when nothing can stop the FINISH any more */
	if (deadline == 0)
	{
		const EsTableKey *last = NULL;
		ListCell		 *lc;

		for (uint32 i = 0; i < work->nrefs; i++)
			work->refs[i]->finished = true;
		/*
		 * What is cached of the tables' heads knows nothing of the segments, nor of those adopted before a crash: they
		 * did not count up to here (es_adopt_ahead).
		 */
		foreach(lc, txn->pending)
		{
			const EsTableKey *table = &((EsSegmentRef *) lfirst(lc))->entry.segment.table;

			if (last == NULL || !es_table_key_equal(last, table))
				es_heads_forget_storage(table);
			last = table;
		}
		end();
	}
	return true;
}

bool
es_flush_finish_slice(EsTxn *txn, const EsSectionHeader *section)
{
	if (txn->pending == NIL)
		return true;
	return es_finish_pending(txn, section, es_task_clock() + SLICE);
}

bool
es_finishing(const EsTxn *txn)
{
	return work != NULL && work->txn == txn;
}

bool
es_flush_finishing(void)
{
	/* a transaction that aborts after it has sent its FINISH: nobody will come for the next slice */
	if (work != NULL && work->txn->verdict == ES_VERDICT_ABORTED)
		end();
	return work != NULL;
}
