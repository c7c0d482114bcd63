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
 *	 small	takes the gate shared, then its slots in ascending order;
 *	 big	takes the gate exclusively, so that no slot can be taken any more, and
 *			no slots; if somebody still holds one of those it needs, it opens
 *			the gate again, waits for that transaction, and starts over.
 * A statement (append) holds the gate only while it takes its slot.  So nobody waits for the
 * gate behind an idle transaction, and nobody upgrades.
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

	if (!has_slot(t, k) &&
		(t->big || t->nslots == ES_TABLE_MAX_SLOTS || es_xact->nslots == ES_XACT_MAX_SLOTS))
		return false;
	if (t->big)
		return false;

	lock_slot(t, 0, ShareLock);
	lock_slot(t, k, ExclusiveLock);
	unlock_slot(t, 0, ShareLock);
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

/* Somebody else who holds slot k, or an invalid id. */
static VirtualTransactionId
slot_holder(const EsXactTable *t, uint16 k)
{
	VirtualTransactionId  none;
	VirtualTransactionId *holders;
	LOCKTAG				  tag;
	int					  n;

	set_tag(&tag, t, k);
	holders = GetLockConflicts(&tag, ExclusiveLock, &n);
	if (n > 0)
		return holders[0];
	SetInvalidVirtualTransactionId(none);
	return none;
}

static void
lock_big(EsXactTable *t)
{
	for (;;)
	{
		VirtualTransactionId holder;

		SetInvalidVirtualTransactionId(holder);
		lock_slot(t, 0, ExclusiveLock);
		for (int w = 0; w < BITMAP_WORDS && !VirtualTransactionIdIsValid(holder); w++)
		{
			for (uint64 bits = t->slot_bitmap[w]; bits != 0; bits &= bits - 1)
			{
				holder = slot_holder(t, w * 64 + __builtin_ctzll(bits));
				if (VirtualTransactionIdIsValid(holder))
					break;
			}
		}
		if (!VirtualTransactionIdIsValid(holder))
			return;
		unlock_slot(t, 0, ExclusiveLock);
		(void) VirtualXactLock(holder, true);
		CHECK_FOR_INTERRUPTS();
	}
}

static int
compare_tables(const void *a, const void *b)
{
	const EsXactTable *x = *(EsXactTable *const *) a;
	const EsXactTable *y = *(EsXactTable *const *) b;

	return x->relid < y->relid ? -1 : x->relid > y->relid;
}

void
es_lock_precommit(void)
{
	EsXactTable **tables = palloc(sizeof(EsXactTable *) * Max(es_xact->ntables, 1));
	uint32		  n = 0;
	dlist_iter	  iter;

	dlist_foreach(iter, &es_xact->tables)
	{
		EsXactTable *t = dlist_container(EsXactTable, node, iter.cur);

		if (t->locking && (t->nslots > 0 || t->big))
			tables[n++] = t;
	}
	qsort(tables, n, sizeof(EsXactTable *), compare_tables);

	for (uint32 i = 0; i < n; i++)
	{
		EsXactTable *t = tables[i];

		if (t->big)
		{
			lock_big(t);
			continue;
		}
		lock_slot(t, 0, ShareLock);
		qsort(t->slots, t->nslots, sizeof(uint16), compare_slots);
		for (uint32 k = 0; k < t->nslots; k++)
			lock_slot(t, t->slots[k], ExclusiveLock);
	}
	pfree(tables);
}
