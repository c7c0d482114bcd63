/*-------------------------------------------------------------------------
 *
 * locks.c
 *	  Context locks: writers of one context commit one after the other, so that the next
 *	  one meets only decided versions (PROTOCOL.md 3).
 *
 * Locks are PostgreSQL's heavyweight locks on (database, pg_class, table, k): k = 0 is the
 * table's gate, k = 1 … 16383 a slot that the context's hash picks.  They are released after the
 * transaction's callbacks, so a waiter sees the holder's verdict; deadlock
 * detection, lock_timeout, cancel and pg_locks come for free.
 *
 * A transaction holds at most 16 slots of a table and 256 in all:
 *	 small	tries its slots in ascending order, with the gate held shared;
 *	 big	takes the gate exclusively, so that no slot can be taken any more, and
 *			no slots; it must find nobody who holds one of those that it needs.
 * At PRE_COMMIT tables come in the order of their ids and gates are kept to the end of the transaction; a statement
 * (append) holds its gate only while it tries its slot.
 *
 * Who has to wait for another transaction, which may be idle, opens all its gates first.  It
 * waits for the slot: a small one has it then, a big one lets go of it at once.  Then both pass the gates
 * again.  So gates are held only by those who commit, or wait for a gate of a higher table, and
 * nobody waits for a gate behind an idle transaction.
 *
 * Exclusion.  Two small ones have the slot between them.  A big B and a small S that both need slot k:
 *	 - S has k when B, behind its gate, looks for holders: B sees it, opens the gate and waits for S.
 *	 - S tries k later: it waits for the gate, which B holds until it has ended.
 *	 - S waited for k without the gate, and gets it after B's look, when a former holder that B did not need to see
 *	   any more has ended: it still has to pass the gate, and so waits for B's end before it asks for
 *	   heads (append) or lets the shards check (PRE_COMMIT).
 *	 - S has k and has passed the gate: whoever becomes big from now on sees it, until S has ended.
 *
 * Deadlocks.  All waits are PostgreSQL's lock waits, so that its detector sees each cycle.  Gates are no part of
 * one, since their holders wait for nothing but higher gates.  Transactions that take all
 * locks at PRE_COMMIT wait for a slot with none but lower ones (by table, then slot) in hand, so they make no
 * cycle: a big table has to be looked at again after each wait, and if there is a wait for it then, slots of
 * higher tables are given back before.  Slots that statements took come in any order; there a deadlock can be.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_class.h"
#include "miscadmin.h"
#include "storage/lmgr.h"
#include "storage/lock.h"

#include "tam/xact.h"

#define BITMAP_WORDS ((ES_LOCK_SLOTS + 1 + 63) / 64)

uint16
es_lock_slot_of(uint64 context_hash)
{
	/* the upper bits choose the shard, so that the lower ones still spread within it */
	return (uint16) (1 + (context_hash & UINT64CONST(0xffffffff)) % ES_LOCK_SLOTS);
}

static void
set_tag(LOCKTAG *tag, const EsXactTable *t, uint16 k)
{
	SET_LOCKTAG_OBJECT(*tag, MyDatabaseId, RelationRelationId, t->relid, k);
}

static void
lock_slot(const EsXactTable *t, uint16 k, LOCKMODE mode)
{
	LOCKTAG tag;

	set_tag(&tag, t, k);
	(void) LockAcquire(&tag, mode, false, false);
}

static bool
try_slot(const EsXactTable *t, uint16 k)
{
	LOCKTAG tag;

	set_tag(&tag, t, k);
	return LockAcquire(&tag, ExclusiveLock, false, true) != LOCKACQUIRE_NOT_AVAIL;
}

static void
unlock_slot(const EsXactTable *t, uint16 k, LOCKMODE mode)
{
	LOCKTAG tag;

	set_tag(&tag, t, k);
	LockRelease(&tag, mode, false);
}

static bool
has_slot(const EsXactTable *t, uint16 k)
{
	if (t->slot_bitmap != NULL)
		return (t->slot_bitmap[k / 64] >> (k % 64)) & 1;
	for (uint32 i = 0; i < t->nslots; i++)
	{
		if (t->slots[i] == k)
			return true;
	}
	return false;
}

static void
note_slot(EsXactTable *t, uint16 k)
{
	if (has_slot(t, k))
		return;

	if (!t->big && (t->nslots == ES_TABLE_MAX_SLOTS || es_xact->nslots == ES_XACT_MAX_SLOTS))
	{
		t->slot_bitmap = MemoryContextAllocZero(es_xact->context, BITMAP_WORDS * sizeof(uint64));
		for (uint32 i = 0; i < t->nslots; i++)
			t->slot_bitmap[t->slots[i] / 64] |= UINT64CONST(1) << (t->slots[i] % 64);
		t->big = true;
		t->big_subid = GetCurrentSubTransactionId();
	}
	if (t->big)
		t->slot_bitmap[k / 64] |= UINT64CONST(1) << (k % 64);
	else
	{
		t->slot_subids[t->nslots] = GetCurrentSubTransactionId();
		t->slots[t->nslots++] = k;
		es_xact->nslots++;
	}
}

void
es_note_context(EsXactTable *t, uint64 context_hash)
{
	note_slot(t, es_lock_slot_of(context_hash));
}

bool
es_lock_context(EsXactTable *t, uint64 context_hash)
{
	uint16 k = es_lock_slot_of(context_hash);
	bool   taken;

	if (!has_slot(t, k) &&
		(t->big || t->nslots == ES_TABLE_MAX_SLOTS || es_xact->nslots == ES_XACT_MAX_SLOTS))
		return false;
	if (t->big)
		return false;

	lock_slot(t, 0, ShareLock);
	taken = try_slot(t, k);
	unlock_slot(t, 0, ShareLock);
	if (!taken)
	{
		lock_slot(t, k, ExclusiveLock);
		/* a big transaction may not have seen us: past its gate it has ended */
		lock_slot(t, 0, ShareLock);
		unlock_slot(t, 0, ShareLock);
	}
	note_slot(t, k);
	return true;
}

void
es_locks_rollback(EsXactTable *t, SubTransactionId subid)
{
	uint32 n = 0;

	/* slots of a big one stay in its bitmap: it waits for more than it must */
	for (uint32 i = 0; i < t->nslots; i++)
	{
		if (t->slot_subids[i] >= subid)
			continue;
		t->slots[n] = t->slots[i];
		t->slot_subids[n++] = t->slot_subids[i];
	}
	es_xact->nslots -= t->nslots - n;
	t->nslots = n;
	if (t->big && t->big_subid >= subid)
	{
		t->big = false;
		pfree(t->slot_bitmap);
		t->slot_bitmap = NULL;
	}
}

static int
compare_slots(const void *a, const void *b)
{
	return (int) *(const uint16 *) a - (int) *(const uint16 *) b;
}

/* Does somebody else hold slot k?  Not one who has ended, and only has to give back his locks. */
static bool
slot_is_held(const EsXactTable *t, uint16 k)
{
	VirtualTransactionId *holders;
	LOCKTAG				  tag;
	int					  n;

	set_tag(&tag, t, k);
	holders = GetLockConflicts(&tag, ExclusiveLock, &n);
	/* it has room for all backends, and is asked for thousands of slots */
	pfree(holders);
	return n > 0;
}

/* A slot that the big transaction needs and somebody else holds, or 0. */
static uint16
find_held_slot(const EsXactTable *t)
{
	for (int w = 0; w < BITMAP_WORDS; w++)
	{
		for (uint64 bits = t->slot_bitmap[w]; bits != 0; bits &= bits - 1)
		{
			uint16 k = w * 64 + __builtin_ctzll(bits);

			if (slot_is_held(t, k))
				return k;
		}
	}
	return 0;
}

/* A table at PRE_COMMIT. */
typedef struct Locking
{
	EsXactTable *table;
	uint32		 taken; /* slots, the first ones */
} Locking;

static LOCKMODE
gate_mode(const Locking *l)
{
	return l->table->big ? ExclusiveLock : ShareLock;
}

static void
open_gates(const Locking *tables, uint32 n)
{
	for (uint32 i = 0; i < n; i++)
		unlock_slot(tables[i].table, 0, gate_mode(&tables[i]));
}

/*
 * Takes all gates and slots.  False: somebody was waited for, with no gate held; now from
 * the beginning.
 */
static bool
lock_tables(Locking *tables, uint32 n)
{
	for (uint32 i = 0; i < n; i++)
	{
		Locking		*l = &tables[i];
		EsXactTable *t = l->table;

		lock_slot(t, 0, gate_mode(l));
		if (t->big)
		{
			uint16 k = find_held_slot(t);

			if (k == 0)
				continue;
			open_gates(tables, i + 1);
			for (uint32 higher = i + 1; higher < n; higher++)
			{
				while (tables[higher].taken > 0)
					unlock_slot(tables[higher].table, tables[higher].table->slots[--tables[higher].taken],
								ExclusiveLock);
			}
			/* not for the holder's end: it may give the slot back in just this way */
			lock_slot(t, k, ShareLock);
			unlock_slot(t, k, ShareLock);
			CHECK_FOR_INTERRUPTS();
			return false;
		}
		for (; l->taken < t->nslots; l->taken++)
		{
			uint16 k = t->slots[l->taken];

			if (try_slot(t, k))
				continue;
			open_gates(tables, i + 1);
			lock_slot(t, k, ExclusiveLock);
			l->taken++;
			return false;
		}
	}
	return true;
}

static int
compare_tables(const void *a, const void *b)
{
	const EsXactTable *x = ((const Locking *) a)->table;
	const EsXactTable *y = ((const Locking *) b)->table;

	return x->relid < y->relid ? -1 : x->relid > y->relid;
}

void
es_lock_precommit(void)
{
	Locking	  *tables = palloc0(sizeof(Locking) * Max(es_xact->ntables, 1));
	uint32	   n = 0;
	dlist_iter iter;

	dlist_foreach(iter, &es_xact->tables)
	{
		EsXactTable *t = dlist_container(EsXactTable, node, iter.cur);

		if (!t->locking || (t->nslots == 0 && !t->big))
			continue;
		if (!t->big)
			qsort(t->slots, t->nslots, sizeof(uint16), compare_slots);
		tables[n++].table = t;
	}
	qsort(tables, n, sizeof(Locking), compare_tables);

	while (!lock_tables(tables, n))
		;
	pfree(tables);
}
