/*-------------------------------------------------------------------------
 *
 * dead.c
 *	  Which batches of the own transaction are dead: those of savepoints that were rolled back.
 *
 * Every OPEN carries their starts (PROTOCOL.md 2.4), for the shards learn of them only by FINISH.  A
 * parallel worker sees the transaction's rows but has no list of its batches.  A parallel-aware scan
 * brings it along in its shared descriptor (scan.c); any other scan that a worker makes, such as the inner
 * side of a join or a query in a function, takes it from the leader: before a parallel plan runs the leader puts the
 * list of all its tables into a dynamic segment and the segment's handle into its backend slot.
 * Nothing is inserted or rolled back to a savepoint while workers run, so the list holds as long as the plan runs.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/parallel.h"
#include "access/xact.h"
#include "storage/dsm.h"
#include "storage/proc.h"

#include "compat.h"
#include "ipc/shmem.h"
#include "tam/dead.h"
#include "tam/xact.h"

typedef struct SharedTable
{
	EsTableKey key;
	uint32	   n[ES_MAX_SHARDS];
	uint64	   first; /* index in starts, which lie shard by shard */
} SharedTable;

/* The segment: then SharedTable[ntables], EsLsn starts[]. */
typedef struct SharedDead
{
	uint64 ntables;
} SharedDead;

static dsm_segment *published; /* leader: lives until the plan has run */
static dsm_segment *attached;  /* worker: as long as the process */

static uint32
count_table(const EsXactTable *t)
{
	uint32 n = 0;

	for (int s = 0; s < es_shared->nshards; s++)
		n += t->ndead[s];
	return n;
}

/* What is dead in the table; returns the memory of all starts, or NULL if there are none. */
static EsLsn *
own_dead(const EsXactTable *t, EsDeadStarts *dead)
{
	uint32	   total = t == NULL ? 0 : count_table(t);
	EsLsn	  *all;
	EsLsn	  *next;
	dlist_iter iter;

	memset(dead, 0, sizeof(*dead));
	if (total == 0)
		return NULL;
	all = next = MemoryContextAllocHuge(CurrentMemoryContext, sizeof(EsLsn) * total);
	for (int s = 0; s < es_shared->nshards; s++)
	{
		dead->starts[s] = next;
		next += t->ndead[s];
	}
	dlist_foreach(iter, unconstify(dlist_head *, &t->batches))
	{
		EsXactBatch *b = dlist_container(EsXactBatch, node, iter.cur);

		if (b->dead)
			dead->starts[b->shard][dead->n[b->shard]++] = b->start;
	}
	return all;
}

/* ---- worker ---- */

static void
attach_leader(void)
{
	PGPROC	  *leader = MyProc->lockGroupLeader;
	dsm_handle handle;

	if (attached != NULL || leader == NULL)
		return;
	handle = pg_atomic_read_u32(&es_shared->slots[es_proc_number(leader)].dead);
	if (handle == DSM_HANDLE_INVALID)
		return; /* the leader has none */
	attached = dsm_attach(handle);
	if (attached == NULL)
		ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						errmsg("the leader of parallel worker %d has ended its query", MyProcPid)));
	dsm_pin_mapping(attached);
}

static void
leader_dead(const EsTableKey *key, EsDeadStarts *dead)
{
	SharedDead	*shared;
	SharedTable *tables;
	EsLsn		*starts;

	memset(dead, 0, sizeof(*dead));
	attach_leader();
	if (attached == NULL)
		return;
	shared = dsm_segment_address(attached);
	tables = (SharedTable *) (shared + 1);
	starts = (EsLsn *) (tables + shared->ntables);
	for (uint64 i = 0; i < shared->ntables; i++)
	{
		EsLsn *next = starts + tables[i].first;

		if (!es_table_key_equal(&tables[i].key, key))
			continue;
		for (int s = 0; s < es_shared->nshards; s++)
		{
			dead->n[s] = tables[i].n[s];
			dead->starts[s] = next;
			next += dead->n[s];
		}
		return;
	}
}

EsLsn *
es_dead_starts(const EsTableKey *key, EsDeadStarts *dead)
{
	if (IsParallelWorker())
	{
		leader_dead(key, dead);
		return NULL;
	}
	return own_dead(es_xact_table(key), dead);
}

/* ---- leader ---- */

bool
es_dead_publish(dsm_segment **outer)
{
	uint64		 ntables = 0;
	uint64		 nstarts = 0;
	dsm_segment *segment;
	SharedDead	*shared;
	SharedTable *table;
	EsLsn		*starts;
	dlist_iter	 iter;

	/* within a plan that runs in parallel nothing has changed since, and its workers may be about to look */
	if (es_xact == NULL || (published != NULL && IsInParallelMode()))
		return false;
	dlist_foreach(iter, &es_xact->tables)
	{
		uint32 n = count_table(dlist_container(EsXactTable, node, iter.cur));

		nstarts += n;
		ntables += n > 0;
	}
	if (nstarts == 0)
		return false;

	segment = dsm_create(sizeof(SharedDead) + ntables * sizeof(SharedTable) + nstarts * sizeof(EsLsn), 0);
	shared = dsm_segment_address(segment);
	shared->ntables = ntables;
	table = (SharedTable *) (shared + 1);
	starts = (EsLsn *) (table + ntables);
	nstarts = 0;
	dlist_foreach(iter, &es_xact->tables)
	{
		EsXactTable *t = dlist_container(EsXactTable, node, iter.cur);
		EsDeadStarts dead;
		EsLsn		*all = own_dead(t, &dead);

		if (all == NULL)
			continue;
		table->key = t->key;
		memcpy(table->n, dead.n, sizeof(table->n));
		table->first = nstarts;
		memcpy(starts + nstarts, all, sizeof(EsLsn) * count_table(t));
		nstarts += count_table(t);
		table++;
		pfree(all);
	}
	*outer = published;
	published = segment;
	pg_atomic_write_u32(&es_my_slot()->dead, dsm_segment_handle(segment));
	return true;
}

void
es_dead_withdraw(dsm_segment *outer)
{
	dsm_segment *segment = published;

	published = outer;
	pg_atomic_write_u32(&es_my_slot()->dead, outer == NULL ? DSM_HANDLE_INVALID : dsm_segment_handle(outer));
	dsm_detach(segment);
}
