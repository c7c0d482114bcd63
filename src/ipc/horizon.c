/*-------------------------------------------------------------------------
 *
 * horizon.c
 *	  Who is between taking positions and being visible: slots and ring
 *	  (PROTOCOL.md 4).  The argument why it holds is at es_horizon() in core/arith.c;
 *	  here are the orders that it relies on.
 *
 *	 writer		tables, fxid -> lower bound (counter) -> barrier -> takes positions
 *				... commits, is visible to new snapshots ...
 *				push to the ring, L read under its lock -> clears the slot
 *	 reader		snapshot, or horizon first and snapshot after; counter -> slots -> ring
 *
 * A slot's fields are not read as one.  A reader who mixes two transactions of
 * one process has read the lower bound of the earlier one, which was cleared since: so it
 * is in the ring by now (or aborted), where the reader comes next.
 *
 * The ring keeps the last 1024 commits; L never falls from entry to entry, so a
 * reader stops at the first that every snapshot like his has seen.  Older entries
 * are folded into one pair, but only if some snapshot may still need them: once
 * in a quarter turn the oldest xid that any snapshot considers running is asked for.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/transam.h"
#include "access/xact.h"
#include "storage/procarray.h"
#include "utils/snapmgr.h"

#include "compat.h"
#include "ipc/fault.h"
#include "ipc/position.h"

/* Xids between two consecutive ones: those below 3 of an epoch are never handed out. */
#define XID_GAP 4

/* This process's slot is published; its lowest position, as the ring gets it. */
static bool		  published = false;
static bool		  base_known = false; /* else my_base is but the slot's bound */
static EsPosition my_base = 0;

/* ---- writers ---- */

/* Adds tables to those of the slot.  A reader sees each one before the count says so. */
static void
add_tables(EsBackendSlot *slot, const uint64 *tables, uint32 ntables, uint32 have)
{
	for (uint32 i = 0; i < ntables && have <= ES_SLOT_TABLES; i++)
	{
		uint32 k = 0;

		while (k < have && pg_atomic_read_u64(&slot->tables[k]) != tables[i])
			k++;
		if (k < have)
			continue;
		if (have < ES_SLOT_TABLES)
			pg_atomic_write_u64(&slot->tables[have], tables[i]);
		have++; /* one too many: all tables */
	}
	pg_write_barrier();
	pg_atomic_write_u32(&slot->ntables, have);
}

void
es_horizon_publish(EsPosition lower_bound, const uint64 *tables, uint32 ntables, EsFxid fxid)
{
	EsBackendSlot *slot = es_my_slot();

	Assert(lower_bound > 0 && fxid != 0);
	if (!published)
	{
		Assert(pg_atomic_read_u64(&slot->lower_bound) == 0);
		pg_atomic_write_u64(&slot->fxid, fxid);
		add_tables(slot, tables, ntables, 0);
		my_base = lower_bound;
		base_known = false;
		published = true;
		pg_write_barrier();
		pg_atomic_write_u64(&slot->lower_bound, lower_bound);
		return;
	}

	/* the same transaction once more, with other tables (some rows restored, some new) */
	Assert(pg_atomic_read_u64(&slot->fxid) == fxid);
	add_tables(slot, tables, ntables, pg_atomic_read_u32(&slot->ntables));
	my_base = Min(my_base, lower_bound);
	if (lower_bound < pg_atomic_read_u64(&slot->lower_bound))
	{
		pg_write_barrier();
		pg_atomic_write_u64(&slot->lower_bound, lower_bound);
	}
}

void
es_horizon_note_base(EsPosition base)
{
	Assert(published);
	/* the bound was the counter of a moment before; the ring gets what was really taken */
	my_base = base_known ? Min(my_base, base) : base;
	base_known = true;
}

void
es_horizon_clear(EsBackendSlot *slot)
{
	pg_memory_barrier();
	pg_atomic_write_u64(&slot->lower_bound, 0);
	pg_memory_barrier();

	/* this may have been the horizon that somebody waits behind */
	if (pg_atomic_read_u32(&es_shared->table_waiters) > 0)
	{
		for (int i = 0; i < es_shared->nshards; i++)
			es_wake_shard(i);
	}
}

/* Makes room in the ring for one more.  ring_lock is held. */
static void
retire_oldest(void)
{
	EsHorizonEntry *overflow = &es_shared->ring_overflow;
	EsHorizonEntry *oldest;

	/* all snapshots have an xmax above ring_oldest_running: the pair counts for none of them */
	if (overflow->base != 0 && overflow->latest_completed + XID_GAP < es_shared->ring_oldest_running)
		memset(overflow, 0, sizeof(*overflow));

	if (es_shared->ring_next < ES_RING_ENTRIES)
		return;
	oldest = &es_shared->ring[es_shared->ring_next % ES_RING_ENTRIES].entry;
	/* what no snapshot considers running, all of them see */
	if (oldest->fxid >= es_shared->ring_oldest_running)
		es_horizon_fold(overflow, oldest);
}

void
es_horizon_committed(void)
{
	EsBackendSlot *slot;
	EsRingEntry	  *e;
	uint64		   oldest = 0;

	if (!published)
		return;
	slot = es_my_slot();

	/* read without the lock: if it is missed, or done twice, nothing is wrong */
	if (es_shared->ring_next % (ES_RING_ENTRIES / 4) == 0)
		oldest = es_widen_xid(es_latest_completed_fxid(), GetOldestTransactionIdConsideredRunning());

	ES_FAULT("horizon-before-push");
	LWLockAcquire(es_shared->ring_lock, LW_EXCLUSIVE);
	if (oldest > es_shared->ring_oldest_running)
		es_shared->ring_oldest_running = oldest;
	retire_oldest();
	e = &es_shared->ring[es_shared->ring_next % ES_RING_ENTRIES];
	e->entry.latest_completed = es_latest_completed_fxid();
	e->entry.fxid = pg_atomic_read_u64(&slot->fxid);
	e->entry.base = my_base;
	e->ntables = pg_atomic_read_u32(&slot->ntables);
	for (uint32 i = 0; i < Min(e->ntables, ES_SLOT_TABLES); i++)
		e->tables[i] = pg_atomic_read_u64(&slot->tables[i]);
	es_shared->ring_next++;
	if (es_shared->ring_next == 2 * ES_RING_ENTRIES)
		es_shared->ring_next = ES_RING_ENTRIES; /* full is full; the count must not wrap */
	LWLockRelease(es_shared->ring_lock);
	ES_FAULT("horizon-after-push");

	published = false;
	es_horizon_clear(slot);
}

void
es_horizon_aborted(void)
{
	if (!published)
		return;
	published = false;
	es_horizon_clear(es_my_slot());
}

/* ---- readers ---- */

/* Has slot i taken, or may it take, positions of the table?  Returns its lower bound, 0 = no. */
static EsPosition
slot_bound(int i, uint64 storage_id, EsFxid *fxid)
{
	EsBackendSlot *slot = &es_shared->slots[i];
	EsPosition	   bound = pg_atomic_read_u64(&slot->lower_bound);
	uint32		   ntables;

	if (bound == 0)
		return 0;
	pg_read_barrier();
	if (fxid != NULL)
		*fxid = pg_atomic_read_u64(&slot->fxid);
	ntables = pg_atomic_read_u32(&slot->ntables);
	if (storage_id == 0 || ntables > ES_SLOT_TABLES)
		return bound;
	pg_read_barrier();
	for (uint32 k = 0; k < ntables; k++)
	{
		if (pg_atomic_read_u64(&slot->tables[k]) == storage_id)
			return bound;
	}
	return 0;
}

EsPosition
es_horizon_newest(uint64 storage_id)
{
	EsPosition horizon = pg_atomic_read_u64(&es_shared->position_counter);

	pg_memory_barrier();
	for (int i = 0; i < es_shared->nslots; i++)
	{
		EsPosition bound = slot_bound(i, storage_id, NULL);

		if (bound != 0 && bound < horizon)
			horizon = bound;
	}
	return horizon;
}

static int
compare_fxids(const void *a, const void *b)
{
	EsFxid x = *(const EsFxid *) a;
	EsFxid y = *(const EsFxid *) b;

	return x < y ? -1 : x > y;
}

void
es_widen_snapshot(Snapshot snapshot, EsSnapshot *s)
{
	EsFxid	reference = es_latest_completed_fxid();
	EsFxid *xip = palloc(sizeof(EsFxid) * Max(snapshot->xcnt, 1));

	s->xmin = es_widen_xid(reference, snapshot->xmin);
	s->xmax = es_widen_xid(reference, snapshot->xmax);
	s->own = U64FromFullTransactionId(GetTopFullTransactionIdIfAny());
	s->curcid = snapshot->curcid;
	if (snapshot->takenDuringRecovery)
	{
		/* it has no list of top-level xids: whoever is not below xmin may have been running */
		s->xmax = s->xmin;
		s->nxip = 0;
	}
	else
	{
		s->nxip = snapshot->xcnt;
		for (uint32 i = 0; i < s->nxip; i++)
			xip[i] = es_widen_xid(reference, snapshot->xip[i]);
		qsort(xip, s->nxip, sizeof(EsFxid), compare_fxids);
	}
	s->xip = xip;
}

/* Entries of the ring that may count for the snapshot; returns their number. */
static uint32
collect_entries(const EsSnapshot *s, uint64 storage_id, EsHorizonEntry *entries, EsHorizonEntry *overflow)
{
	uint32 n = 0;
	uint32 have;

	LWLockAcquire(es_shared->ring_lock, LW_SHARED);
	*overflow = es_shared->ring_overflow;
	have = Min(es_shared->ring_next, ES_RING_ENTRIES);
	for (uint32 i = 0; i < have; i++)
	{
		EsRingEntry *e = &es_shared->ring[(es_shared->ring_next - 1 - i) % ES_RING_ENTRIES];
		bool		 concerned = storage_id == 0 || e->ntables > ES_SLOT_TABLES;

		if (e->entry.latest_completed + XID_GAP < s->xmax)
			break; /* and all older ones */
		for (uint32 k = 0; k < e->ntables && !concerned; k++)
			concerned = e->tables[k] == storage_id;
		if (concerned)
			entries[n++] = e->entry;
	}
	LWLockRelease(es_shared->ring_lock);
	return n;
}

EsPosition
es_horizon_of(Snapshot snapshot, uint64 storage_id)
{
	static EsHorizonEntry entries[ES_RING_ENTRIES];
	EsHorizonEntry		  overflow;
	EsHorizonSlot		 *slots;
	bool				 *committed;
	EsSnapshot			  s;
	EsPosition			  counter;
	EsPosition			  horizon;
	uint32				  nslots = 0;
	uint32				  nentries;

	if (!IsMVCCSnapshot(snapshot))
		return es_horizon_newest(storage_id);

	es_widen_snapshot(snapshot, &s);
	slots = palloc(sizeof(EsHorizonSlot) * es_shared->nslots);
	committed = palloc(sizeof(bool) * es_shared->nslots);

	counter = pg_atomic_read_u64(&es_shared->position_counter);
	pg_memory_barrier();
	for (int i = 0; i < es_shared->nslots; i++)
	{
		EsHorizonSlot *h = &slots[nslots];

		h->lower_bound = slot_bound(i, storage_id, &h->fxid);
		if (h->lower_bound != 0)
			nslots++;
	}
	pg_memory_barrier();
	nentries = collect_entries(&s, storage_id, entries, &overflow);

	/* an xid that was finished for the snapshot is in CLOG, whatever its slot says */
	for (uint32 i = 0; i < nslots; i++)
		committed[i] =
			!es_snapshot_running(&s, slots[i].fxid) &&
			TransactionIdDidCommit(XidFromFullTransactionId(FullTransactionIdFromU64(slots[i].fxid)));

	horizon = es_horizon(&s, counter, slots, committed, nslots, entries, nentries, &overflow);
	pfree(slots);
	pfree(committed);
	pfree(unconstify(EsFxid *, s.xip));
	return horizon;
}
