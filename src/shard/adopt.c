/*-------------------------------------------------------------------------
 *
 * adopt.c
 *	  Pending segments when their transaction ends: FINISH, then ADOPT or DROP in the
 *	  manifest.
 *
 * FINISH puts base, dead rows and first versions into the live segments at once
 * (finish_pending.c), and readers judge their rows by the transaction from then on, exactly as those in a
 * MemTable.
 *
 * When the commit record is flushed and the FINISH frame durable, one manifest record
 * adopts all segments of the transaction; those that FINISH does not name, and those of an
 * aborted transaction, are dropped.  Until then FINISH must stay in own WAL, so
 * a flush waits for adoptions of committed transactions (es_adopt_settled) and logs
 * the sections of undecided ones again (es_adopt_carry).
 *
 * As long as the FINISH frame is there to be replayed, each batch that it names must be, too: without one,
 * recovery could not apply it, nor any FINISH behind it.  So a segment of which no row was taken
 * (events that were there already) is adopted all the same, and goes with the flush that lets go of
 * the frame (es_adopt_drop_empty); and a dropped storage stays that long (drop.c).
 *
 * After a crash between ADOPT and the flush that lets go of the FINISH frame, recovery sees
 * that frame, and perhaps frames of batches that the segment holds.  es_adopt_recall gives
 * the transaction its adopted segments back for that time, so that their batches are
 * known and not adopted a second time into the MemTable; until its FINISH is replayed, its rows do
 * not count for those of earlier FINISHes (es_adopt_ahead).
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "ipc/fault.h"
#include "shard/engine.h"
#include "shard/flush.h"
#include "shard/log.h"
#include "shard/shard.h"

/* A transaction with pending segments. */
typedef struct Adoption
{
	dlist_node		 node;
	EsTxn			*txn;	   /* with a reference */
	EsSectionHeader *section;  /* of its FINISH; NULL = not finished */
	uint64			 memtable; /* active one when the FINISH frame was logged last */
	uint64			 edit;	   /* ticket of the manifest record; 0 = none */
} Adoption;

static dlist_head adoptions = DLIST_STATIC_INIT(adoptions);

/* Adopted segments of transactions that recovery may meet, by fxid; only while it runs. */
typedef struct Recallable
{
	EsFxid		  fxid;
	EsSegmentRef *ref;
} Recallable;

static Recallable *recallable;
static uint32	   nrecallable;
static bool		   recovered;

/* ---- registration ---- */

static Adoption *
find_adoption(EsTxn *txn)
{
	dlist_iter iter;

	dlist_foreach(iter, &adoptions)
	{
		Adoption *a = dlist_container(Adoption, node, iter.cur);

		if (a->txn == txn)
			return a;
	}
	return NULL;
}

static Adoption *
get_adoption(EsTxn *txn)
{
	Adoption *a = find_adoption(txn);

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
	uint32		  state = 0;
	uint32		  allocated = 0;
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
			recallable = recallable == NULL
							 ? MemoryContextAlloc(TopMemoryContext, allocated * sizeof(Recallable))
							 : repalloc_huge(recallable, (Size) allocated * sizeof(Recallable));
		}
		recallable[nrecallable++] = (Recallable){.fxid = ref->entry.segment.min_fxid, .ref = ref};
	}
	if (nrecallable > 0)
		qsort(recallable, nrecallable, sizeof(Recallable), compare_recallable);
}

void
es_adopt_recall(EsTxn *txn)
{
	uint32		  low = 0;
	uint32		  high = nrecallable;
	MemoryContext old;

	if (nrecallable == 0 || txn->pending != NIL)
		return;
	while (low < high)
	{
		uint32 middle = low + (high - low) / 2;

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

void
es_adopt_recovered(void)
{
	if (recallable != NULL)
		pfree(recallable);
	recallable = NULL;
	nrecallable = 0;
	recovered = true;
}

/*
 * While recovery replays FINISHes, an adopted segment may belong to one that comes later than
 * the one at work: its rows are not there yet for a context's head.
 */
bool
es_adopt_ahead(const EsSegmentRef *ref)
{
	EsTxn *txn;

	if (nrecallable == 0 || !ref->entry.adopted)
		return false;
	txn = es_txn_find(ref->entry.segment.min_fxid);
	return txn != NULL && !txn->finished && list_member_ptr(txn->pending, ref);
}

/* ---- FINISH ---- */

void
es_flush_finish_pending(EsTxn *txn, const EsSectionHeader *section)
{
	Adoption *a = get_adoption(txn);

	(void) es_finish_pending(txn, section, 0);
	if (a->section == NULL)
	{
		a->section = MemoryContextAllocHuge(TopMemoryContext, section->len);
		memcpy(a->section, section, section->len);
		a->memtable = es_memtable_active->id;
	}
	ES_FAULT("adopt-finished");
}

/* ---- verdict ---- */

/* Does FINISH name a batch of it? */
static bool
is_named(const EsSegmentRef *ref)
{
	return ref->finished && (ref->entry.nlive > 0 || ref->entry.dead_bitmap != NULL);
}

static void
end_adoption(Adoption *a)
{
	ListCell *lc;

	foreach(lc, a->txn->pending)
		((EsSegmentRef *) lfirst(lc))->needed = a->section != NULL ? a->memtable : 0;
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
	ListCell *lc;

	ES_FAULT("adopt-manifest-durable");
	foreach(lc, a->txn->pending)
	{
		EsSegmentRef *ref = lfirst(lc);

		if (ref->entry.adopted)
			continue;
		if (committed && is_named(ref))
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
	bool			some = false;
	ListCell	   *lc;

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
		EsSegmentRef		  *ref = lfirst(lc);
		const EsManifestEntry *e = &ref->entry;

		if (e->adopted)
			continue;
		if (committed && is_named(ref))
		{
			EsManifestAdopt adopt = {.id = e->segment.id,
									 .fxid = a->txn->fxid,
									 .base = e->base,
									 .min_position = e->segment.min_position,
									 .max_position = e->segment.max_position,
									 .nlive = e->nlive,
									 .dead_bitmap_len = e->dead_bitmap ? (e->segment.nrows + 63) / 64 * 8 : 0,
									 .nfirst_versions = e->nfirst_versions,
									 .version_base = e->version_base,
									 .version_width = e->version_width};

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
		Adoption *a = dlist_container(Adoption, node, iter.cur);
		bool	  committed = a->txn->verdict == ES_VERDICT_COMMITTED;

		if (a->edit != 0)
		{
			if (es_edit_done(a->edit))
				settle(a, committed);
			continue;
		}
		if (!decided(a->txn) || a->txn->spilling)
			continue;
		if (committed && (!es_txn_verdict_durable(a->txn) || es_log_durable_ticket() < a->txn->finish_ticket))
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
	dlist_iter iter;

	dlist_foreach(iter, &adoptions)
	{
		Adoption *a = dlist_container(Adoption, node, iter.cur);

		if (a->section != NULL && a->memtable <= memtable && a->txn->verdict != ES_VERDICT_ABORTED)
			return false;
	}
	return true;
}

bool
es_adopt_committed(uint64 memtable)
{
	dlist_iter iter;

	dlist_foreach(iter, &adoptions)
	{
		Adoption *a = dlist_container(Adoption, node, iter.cur);

		if (a->section != NULL && a->memtable <= memtable && a->txn->verdict == ES_VERDICT_COMMITTED)
			return false;
	}
	return true;
}

/* Has recovery given it back to its transaction, and not taken it away again? */
static bool
in_adoption(EsSegmentRef *ref)
{
	EsTxn *txn = es_txn_find(ref->entry.segment.min_fxid);

	return txn != NULL && list_member_ptr(txn->pending, ref);
}

/*
 * Drops in a flush's manifest record the adopted segments without a live row that no replay needs behind
 * it.  Returns their ids, palloc'd in the current context, for es_segments_drop when it is durable.
 */
uint64 *
es_adopt_drop_empty(EsManifestEdit *edit, uint64 memtable, uint32 *n)
{
	uint64		 *ids = NULL;
	uint32		  allocated = 0;
	uint32		  state = 0;
	EsSegmentRef *ref;

	*n = 0;
	/* while recovery runs, FINISHes of own WAL may still come that need them */
	while (recovered && (ref = es_segments_each(&state)) != NULL)
	{
		if (!ref->entry.adopted || ref->entry.nlive > 0 || ref->needed > memtable || in_adoption(ref))
			continue;
		if (*n == allocated)
		{
			allocated = Max(16, allocated * 2);
			ids = ids == NULL ? palloc(allocated * sizeof(uint64))
							  : repalloc_huge(ids, (Size) allocated * sizeof(uint64));
		}
		ids[(*n)++] = ref->entry.segment.id;
		es_edit_check(es_manifest_edit_drop(edit, ref->entry.segment.id));
	}
	return ids;
}

bool
es_adopt_needed(EsSegmentRef *ref, uint64 *memtable)
{
	*memtable = 0;
	if (ref->entry.pending)
		return ref->txn == NULL || ref->txn->verdict != ES_VERDICT_ABORTED;
	if (!ref->entry.adopted)
		return false;
	if (in_adoption(ref))
		return true;
	*memtable = ref->needed;
	return !es_flush_retired(ref->needed);
}

static void
carry(Adoption *a)
{
	EsTxn *txn = a->txn;

	txn->finish_ticket = es_log_append(ES_FRAME_CARRY_FINISH, txn->fxid, txn->finish_start, txn->finish_end,
									   a->section, a->section->len);
	a->memtable = es_memtable_active->id;
}

void
es_adopt_carry_txn(EsTxn *txn)
{
	Adoption *a = find_adoption(txn);

	Assert(a != NULL && a->section != NULL);
	carry(a);
}

void
es_adopt_carry(uint64 memtable)
{
	dlist_iter iter;

	dlist_foreach(iter, &adoptions)
	{
		Adoption *a = dlist_container(Adoption, node, iter.cur);

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
