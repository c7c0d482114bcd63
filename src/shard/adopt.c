/*-------------------------------------------------------------------------
 *
 * adopt.c
 *	  Pending segments when their transaction ends: FINISH, then ADOPT or DROP in the
 *	  manifest.
 *
 * FINISH says which batches live and which of their rows are not taken; a row of the
 * segment tells its batch and its row in it (ES_PENDING_PLACE).  From that follow, per
 * segment, the base position, a bitmap of dead rows (none if all live, then no row is
 * read), and for a table with versions the first version of each context: one more
 * than what an earlier segment of the same transaction gave it, or than its committed
 * head.  All this is put into the live segment at once, and readers judge its
 * rows by the transaction from then on, exactly as those in a MemTable.  A pending segment precedes
 * all batches of its table that are still in memory, in the order of ordinals, so
 * it is done before they get their versions.
 *
 * When the commit record is flushed and the FINISH frame durable, one manifest record
 * adopts all segments of the transaction; those without a live row, and those of an
 * aborted transaction, are dropped.  Until then FINISH must stay in own WAL, so
 * a flush waits for adoptions of committed transactions (es_adopt_settled) and logs
 * the sections of undecided ones again (es_adopt_carry).
 *
 * After a crash between ADOPT and the flush that lets go of the FINISH frame, recovery sees
 * that frame, and perhaps frames of batches that the segment holds.  es_adopt_recall gives
 * the transaction its adopted segments back for that time, so that their batches are
 * known and not adopted a second time into the MemTable.
 *
 * The first versions are computed at once, in the loop: some µs per context that the
 * transaction wrote.  A bulk load into a table without versions costs nothing here.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <stdlib.h>

#include "utils/memutils.h"

#include "core/route.h"
#include "ipc/fault.h"
#include "shard/engine.h"
#include "shard/files.h"
#include "shard/flush.h"
#include "shard/log.h"
#include "shard/shard.h"

/* Contexts between two looks at interrupts. */
#define INTERRUPT_CONTEXTS	4096

/* A transaction with pending segments. */
typedef struct Adoption
{
	dlist_node	node;
	EsTxn	   *txn;			/* with a reference */
	EsSectionHeader *section;	/* of its FINISH; NULL = not finished */
	uint64		memtable;		/* active one when the FINISH frame was logged last */
	uint64		edit;			/* ticket of the manifest record; 0 = none */
} Adoption;

static dlist_head adoptions = DLIST_STATIC_INIT(adoptions);

/* Adopted segments of transactions that recovery may meet, by fxid; only while it runs. */
typedef struct Recallable
{
	EsFxid		fxid;
	EsSegmentRef *ref;
} Recallable;

static Recallable *recallable;
static uint32 nrecallable;

/* ---- registration ---- */

static Adoption *
find_adoption(EsTxn *txn)
{
	dlist_iter	iter;

	dlist_foreach(iter, &adoptions)
	{
		Adoption   *a = dlist_container(Adoption, node, iter.cur);

		if (a->txn == txn)
			return a;
	}
	return NULL;
}

static Adoption *
get_adoption(EsTxn *txn)
{
	Adoption   *a = find_adoption(txn);

	if (a == NULL)
	{
		a = MemoryContextAllocZero(TopMemoryContext, sizeof(Adoption));
		a->txn = txn;
		es_txn_ref(txn);
		dlist_push_tail(&adoptions, &a->node);
	}
	return a;
}

void
es_adopt_register(EsTxn *txn)
{
	(void) get_adoption(txn);
}

static int
compare_recallable(const void *x, const void *y)
{
	const Recallable *a = x;
	const Recallable *b = y;

	if (a->fxid != b->fxid)
		return a->fxid < b->fxid ? -1 : 1;
	if (a->ref->entry.segment.id != b->ref->entry.segment.id)
		return a->ref->entry.segment.id < b->ref->entry.segment.id ? -1 : 1;
	return 0;
}

void
es_adopt_init(void)
{
	uint32		state = 0;
	uint32		allocated = 0;
	EsSegmentRef *ref;

	while ((ref = es_segments_each(&state)) != NULL)
	{
		if (ref->entry.pending)
			es_adopt_register(ref->txn);
		if (!ref->entry.adopted || ref->entry.nstarts == 0)
			continue;
		if (nrecallable == allocated)
		{
			allocated = Max(64, allocated * 2);
			recallable = recallable == NULL ?
				MemoryContextAlloc(TopMemoryContext, allocated * sizeof(Recallable)) :
				repalloc_huge(recallable, (Size) allocated * sizeof(Recallable));
		}
		recallable[nrecallable++] = (Recallable) {.fxid = ref->entry.segment.min_fxid,.ref = ref};
	}
	if (nrecallable > 0)
		qsort(recallable, nrecallable, sizeof(Recallable), compare_recallable);
}

void
es_adopt_recall(EsTxn *txn)
{
	uint32		low = 0;
	uint32		high = nrecallable;
	MemoryContext old;

	if (nrecallable == 0 || txn->pending != NIL)
		return;
	while (low < high)
	{
		uint32		middle = low + (high - low) / 2;

		if (recallable[middle].fxid < txn->fxid)
			low = middle + 1;
		else
			high = middle;
	}
	old = MemoryContextSwitchTo(TopMemoryContext);
	for (; low < nrecallable && recallable[low].fxid == txn->fxid; low++)
		txn->pending = lappend(txn->pending, recallable[low].ref);
	MemoryContextSwitchTo(old);
	if (txn->pending != NIL)
		es_adopt_register(txn);
}

/* ---- FINISH: which rows live ---- */

typedef struct Table
{
	EsFinishTableView view;
	uint64	   *starts;			/* of the live batches, ascending */
	uint64		nrows;			/* of live batches before the segment at work */
	EsFirstVersion *versions;	/* what PREPARE answered, by hash */
} Table;

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

/* The place (batch and row in it) of every row of the segment. */
static int64 *
read_places(EsSegmentRef *ref, EsSegment *segment)
{
	const EsSegmentInfo *info = es_segment_info(segment);
	int			column = es_segment_ncols(info) + ES_PENDING_PLACE;
	bool	   *wanted = palloc0(info->ncols * sizeof(bool));
	int64	   *places = palloc_extended(Max(info->summary.nrows, 1) * sizeof(int64), MCXT_ALLOC_HUGE);
	EsRowBlock *block = es_block_create();
	EsError		err = {0};

	wanted[column] = true;
	for (uint32 z = 0; z < info->nzones; z++)
	{
		EsZoneInfo	zone = es_segment_zone(segment, z);

		if (block == NULL || es_segment_read(segment, zone.first_row, zone.nrows, wanted, 0, block, &err) != ES_OK)
			damaged(ref, &err);
		for (uint32 r = 0; r < zone.nrows; r++)
		{
			const int64 *value = es_block_value(block, column, r);

			places[zone.first_row + r] = value != NULL ? *value : -1;
		}
		es_shard_interrupts();
	}
	es_block_free(block);
	pfree(wanted);
	return places;
}

/* Fills entry.nlive and entry.dead_bitmap; t = NULL: no batch of the table lives. */
static void
find_dead_rows(EsSegmentRef *ref, Table *t)
{
	EsManifestEntry *e = &ref->entry;
	uint64		nrows = e->segment.nrows;
	bool		all = t != NULL && t->view.not_taken == NULL;
	bool		none = true;
	int64	   *places;
	uint64	   *first;
	uint64	   *counts;

	for (uint32 i = 0; i < e->nstarts; i++)
	{
		bool		live = is_live(t, e->starts[i]);

		all &= live;
		none &= !live;
	}
	e->nlive = none ? 0 : nrows;
	if (none)
		return;
	if (all)
	{
		t->nrows += nrows;
		return;
	}

	/* rows of live batches are numbered through in FINISH's bitmap */
	places = read_places(ref, open_segment(ref));
	first = palloc0((e->nstarts + 1) * sizeof(uint64));
	counts = palloc0((e->nstarts + 1) * sizeof(uint64));
	for (uint64 row = 0; row < nrows; row++)
	{
		uint64		batch = (uint64) places[row] >> ES_PENDING_ROW_BITS;

		if (batch >= e->nstarts)
		{
			EsError		err = {0};

			es_fail(&err, ES_ERR_CORRUPT, 0, "row %llu names batch %llu of %u",
					(unsigned long long) row, (unsigned long long) batch, e->nstarts);
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

	e->dead_bitmap = zeroed((nrows + 63) / 64 * 8);
	for (uint64 row = 0; row < nrows; row++)
	{
		uint64		n = first[(uint64) places[row] >> ES_PENDING_ROW_BITS];
		bool		dead = n == UINT64_MAX;

		if (!dead && t->view.not_taken != NULL)
		{
			n += places[row] & ((1 << ES_PENDING_ROW_BITS) - 1);
			dead = n < t->view.table->nrows && (t->view.not_taken[n >> 3] >> (n & 7)) & 1;
		}
		if (dead)
		{
			e->dead_bitmap[row >> 3] |= 1 << (row & 7);
			e->nlive--;
		}
	}
	pfree(places);
	pfree(first);
	pfree(counts);
}

/* ---- FINISH: first versions ---- */

typedef struct Contexts
{
	uint64	   *hashes;
	uint64	   *first_rows;
	uint64	   *nrows;
	uint32		n;
	uint32		allocated;
} Contexts;

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

/* The last version that an earlier pending segment of the transaction gave to the context, or 0. */
static int64
version_in_earlier(EsTxn *txn, EsSegmentRef *ref, uint64 hash, const void *bytes, size_t len)
{
	int			at = list_length(txn->pending) - 1;

	while (at >= 0 && list_nth(txn->pending, at) != ref)
		at--;
	while (--at >= 0)
	{
		EsSegmentRef *earlier = list_nth(txn->pending, at);
		EsError		err = {0};
		uint64		first_row;
		uint64		nrows;
		uint64		live;
		uint32		entry;

		if (earlier->entry.nfirst_versions == 0 ||
			!es_table_key_equal(&earlier->entry.segment.table, &ref->entry.segment.table))
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
check_promise(EsTxn *txn, const Table *t, uint64 hash, int64 version)
{
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
					es_shard_id, (long long) version, (unsigned long long) txn->fxid),
			 errdetail("Context hash %016llx, storage %llu of database %u, FINISH at %X/%X of PostgreSQL's WAL.",
					   (unsigned long long) hash,
					   (unsigned long long) t->view.table->table.storage_id, t->view.table->table.database,
					   LSN_FORMAT_ARGS(txn->finish_start)),
			 errhint("The shard stops so that no version is used twice. Please report this.")));
}

static void
find_first_versions(EsTxn *txn, EsSegmentRef *ref, Table *t)
{
	EsSegment  *segment = open_segment(ref);
	const EsSegmentInfo *info = es_segment_info(segment);
	int			column = info->roles.context - 1;
	bool	   *wanted = palloc0(info->ncols * sizeof(bool));
	EsRowBlock *block = es_block_create();
	Contexts	c = {.allocated = 1024};
	EsZoneInfo	zone = {0};
	uint32		next_zone = 0;
	int64	   *first;
	EsError		err = {0};

	c.hashes = palloc(c.allocated * sizeof(uint64));
	c.first_rows = palloc(c.allocated * sizeof(uint64));
	c.nrows = palloc(c.allocated * sizeof(uint64));
	if (block == NULL || es_segment_walk_contexts(segment, collect_context, &c, &err) != ES_OK)
		damaged(ref, &err);

	wanted[column] = true;
	first = zeroed(c.n * sizeof(int64));
	ref->entry.first_versions = first;
	for (uint32 i = 0; i < c.n; i++)
	{
		const void *value;
		const void *bytes;
		size_t		len;
		int64		scratch;
		int64		last;

		if (i % INTERRUPT_CONTEXTS == 0)
			es_shard_interrupts();
		if (es_segment_live_rows(ref, c.first_rows[i], c.first_rows[i] + c.nrows[i]) == 0)
			continue;
		while (c.first_rows[i] >= zone.first_row + zone.nrows)
		{
			zone = es_segment_zone(segment, next_zone++);
			if (c.first_rows[i] < zone.first_row + zone.nrows &&
				es_segment_read(segment, zone.first_row, zone.nrows, wanted, 0, block, &err) != ES_OK)
				damaged(ref, &err);
		}
		value = es_block_value(block, column, (uint32) (c.first_rows[i] - zone.first_row));
		if (value == NULL)
		{
			es_fail(&err, ES_ERR_CORRUPT, 0, "row %llu has no context", (unsigned long long) c.first_rows[i]);
			damaged(ref, &err);
		}
		es_context_bytes(info->roles.context_class, info->columns[column].len, value, &scratch,
						 &bytes, &len);
		last = version_in_earlier(txn, ref, c.hashes[i], bytes, len);
		if (last == 0)
		{
			EsHead		head;
			const char *path;

			if (!es_head_lookup(&ref->entry.segment.table, c.hashes[i], bytes, len, &head, &err, &path))
				es_corruption(ERROR, path, &err);
			last = head.version;
			check_promise(txn, t, c.hashes[i], last + 1);
		}
		first[i] = last + 1;
	}
	ref->entry.nfirst_versions = c.n;
	es_block_free(block);
	pfree(wanted);
	pfree(c.hashes);
	pfree(c.first_rows);
	pfree(c.nrows);
}

static void
finish_segment(EsTxn *txn, EsSegmentRef *ref, Table *t, EsPosition base)
{
	EsManifestEntry *e = &ref->entry;
	const EsSegmentInfo *info;

	find_dead_rows(ref, t);
	if (e->nlive > 0)
	{
		uint32		flags = t->view.table->flags;

		info = es_segment_info(open_segment(ref));
		e->base = (flags & ES_FINISH_GIVEN_POSITIONS) ? 0 : base;
		e->segment.min_position = e->base + info->summary.min_position;
		e->segment.max_position = e->base + info->summary.max_position;
		if (info->roles.version != 0 && !(flags & ES_FINISH_GIVEN_VERSIONS))
			find_first_versions(txn, ref, t);
	}
	ref->finished = true;
}

void
es_flush_finish_pending(EsTxn *txn, const EsSectionHeader *section)
{
	Adoption   *a = get_adoption(txn);
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "event_store adoption",
												  ALLOCSET_DEFAULT_SIZES);
	MemoryContext old = MemoryContextSwitchTo(context);
	Table	   *tables = palloc0(Max(section->ntables, 1) * sizeof(Table));
	const EsFinishTable *table;
	uint32		n = 0;
	ListCell   *lc;

	for (table = es_section_first(section); table != NULL; table = es_section_next(section, table))
	{
		Table	   *t = &tables[n++];

		es_finish_table_view(table, &t->view);
		t->starts = palloc(Max(table->nlogged, 1) * sizeof(uint64));
		memcpy(t->starts, t->view.batch_starts, table->nlogged * sizeof(uint64));
		qsort(t->starts, table->nlogged, sizeof(uint64), compare_uint64);
		t->versions = palloc(Max(table->nversions, 1) * sizeof(EsFirstVersion));
		memcpy(t->versions, t->view.versions, table->nversions * sizeof(EsFirstVersion));
		qsort(t->versions, table->nversions, sizeof(EsFirstVersion), compare_versions);
	}
	foreach(lc, txn->pending)
	{
		EsSegmentRef *ref = lfirst(lc);
		Table	   *mine = NULL;

		/* adopted before a crash: all of it is there */
		if (ref->entry.adopted)
			continue;
		for (uint32 i = 0; i < n; i++)
			if (es_table_key_equal(&tables[i].view.table->table, &ref->entry.segment.table))
				mine = &tables[i];
		es_segment_ref(ref);
		finish_segment(txn, ref, mine, section->base);
		es_segment_unref(ref);
	}
	/* what is cached of these tables' heads knows nothing of the segments */
	foreach(lc, txn->pending)
		es_heads_forget_storage(&((EsSegmentRef *) lfirst(lc))->entry.segment.table);
	es_segments_changed();

	/* cached heads do not know what the segments gave to their contexts */
	for (uint32 i = 0; i < n; i++)
		es_heads_forget_storage(&tables[i].view.table->table);

	if (a->section == NULL)
	{
		a->section = MemoryContextAllocHuge(TopMemoryContext, section->len);
		memcpy(a->section, section, section->len);
		a->memtable = es_memtable_active->id;
	}
	MemoryContextSwitchTo(old);
	MemoryContextDelete(context);
	ES_FAULT("adopt-finished");
}

/* ---- verdict ---- */

static void
end_adoption(Adoption *a)
{
	list_free(a->txn->pending);
	a->txn->pending = NIL;
	dlist_delete(&a->node);
	es_txn_unref(a->txn);
	if (a->section != NULL)
		pfree(a->section);
	pfree(a);
}

/* The manifest's record is durable: the same in memory. */
static void
settle(Adoption *a, bool committed)
{
	ListCell   *lc;

	ES_FAULT("adopt-manifest-durable");
	foreach(lc, a->txn->pending)
	{
		EsSegmentRef *ref = lfirst(lc);

		if (ref->entry.adopted)
			continue;
		if (committed && ref->finished && ref->entry.nlive > 0)
		{
			ref->entry.pending = false;
			ref->entry.adopted = true;
			es_segment_forget_txn(ref);
		}
		else
			es_segments_drop(ref->entry.segment.id);
	}
	es_segments_changed();
	end_adoption(a);
}

/* False: another record is under way. */
static bool
submit(Adoption *a, bool committed)
{
	EsManifestEdit *edit;
	bool		some = false;
	ListCell   *lc;

	foreach(lc, a->txn->pending)
		some |= !((EsSegmentRef *) lfirst(lc))->entry.adopted;
	if (!some)
	{
		end_adoption(a);
		return true;
	}
	edit = es_edit_begin();
	if (edit == NULL)
		return false;
	ES_FAULT("adopt-before-manifest");
	foreach(lc, a->txn->pending)
	{
		EsSegmentRef *ref = lfirst(lc);
		const EsManifestEntry *e = &ref->entry;

		if (e->adopted)
			continue;
		if (committed && ref->finished && e->nlive > 0)
		{
			EsManifestAdopt adopt = {
				.id = e->segment.id,
				.fxid = a->txn->fxid,
				.base = e->base,
				.min_position = e->segment.min_position,
				.max_position = e->segment.max_position,
				.nlive = e->nlive,
				.dead_bitmap_len = e->dead_bitmap ? (e->segment.nrows + 63) / 64 * 8 : 0,
				.nfirst_versions = e->nfirst_versions
			};

			es_edit_check(es_manifest_edit_adopt(edit, &adopt, e->dead_bitmap, e->first_versions));
		}
		else
			es_edit_check(es_manifest_edit_drop(edit, e->segment.id));
	}
	a->edit = es_edit_submit(edit);
	return true;
}

/*
 * Decided for good?  A transaction that committed without a FINISH for this shard
 * left no live row here; verdict.c knows when that is sure and takes it off its list.
 */
static bool
decided(const EsTxn *txn)
{
	switch (txn->verdict)
	{
		case ES_VERDICT_UNKNOWN:
			return false;
		case ES_VERDICT_ABORTED:
			return true;
		case ES_VERDICT_COMMITTED:
			return txn->finished || !txn->listed;
	}
	return false;
}

void
es_adopt_tick(void)
{
	dlist_mutable_iter iter;

	dlist_foreach_modify(iter, &adoptions)
	{
		Adoption   *a = dlist_container(Adoption, node, iter.cur);
		bool		committed = a->txn->verdict == ES_VERDICT_COMMITTED;

		if (a->edit != 0)
		{
			if (es_edit_done(a->edit))
				settle(a, committed);
			continue;
		}
		if (!decided(a->txn) || a->txn->spilling)
			continue;
		if (committed &&
			(!es_txn_verdict_durable(a->txn) || es_log_durable_ticket() < a->txn->finish_ticket))
		{
			es_log_want_sync();
			continue;
		}
		(void) submit(a, committed);
	}
}

/* All that is to be done is done by the tick, which the loop calls in the same turn. */
void
es_flush_txn_decided(EsTxn *txn)
{
}

/* ---- what flushes ask ---- */

bool
es_adopt_settled(uint64 memtable)
{
	dlist_iter	iter;

	dlist_foreach(iter, &adoptions)
	{
		Adoption   *a = dlist_container(Adoption, node, iter.cur);

		if (a->section != NULL && a->memtable <= memtable && a->txn->verdict != ES_VERDICT_ABORTED)
			return false;
	}
	return true;
}

bool
es_adopt_committed(uint64 memtable)
{
	dlist_iter	iter;

	dlist_foreach(iter, &adoptions)
	{
		Adoption   *a = dlist_container(Adoption, node, iter.cur);

		if (a->section != NULL && a->memtable <= memtable && a->txn->verdict == ES_VERDICT_COMMITTED)
			return false;
	}
	return true;
}

static void
carry(Adoption *a)
{
	EsTxn	   *txn = a->txn;

	txn->finish_ticket = es_log_append(ES_FRAME_CARRY_FINISH, txn->fxid, txn->finish_start,
									   txn->finish_end, a->section, a->section->len);
	a->memtable = es_memtable_active->id;
}

void
es_adopt_carry_txn(EsTxn *txn)
{
	Adoption   *a = find_adoption(txn);

	Assert(a != NULL && a->section != NULL);
	carry(a);
}

void
es_adopt_carry(uint64 memtable)
{
	dlist_iter	iter;

	dlist_foreach(iter, &adoptions)
	{
		Adoption   *a = dlist_container(Adoption, node, iter.cur);

		if (a->section != NULL && a->memtable <= memtable && a->txn->verdict == ES_VERDICT_UNKNOWN)
			carry(a);
	}
}

bool
es_adopt_idle(void)
{
	return dlist_is_empty(&adoptions);
}

long
es_adopt_timeout(void)
{
	return dlist_is_empty(&adoptions) ? LONG_MAX : 100;
}
