/*-------------------------------------------------------------------------
 *
 * given.c
 *	  Positions that rows bring along: restores and rewrites.
 *
 * What holds for them within a table and a transaction:
 *
 *	 - no two rows have the same;
 *	 - nobody else writes into the table: what brings a position holds ShareRowExclusiveLock on it
 *	   to the end of the transaction, which conflicts with the lock that every writer has.  Else
 *	   positions could be given that another transaction has just reserved, or lower ones
 *	   become visible behind the horizon of those who have seen higher ones;
 *	 - rows that bring one come before those that do not, which are new events and get positions
 *	   above all given ones, so that the order of rows is that of positions;
 *	 - in a table with versions either all rows that bring a position bring their version,
 *	   too, or none does.  The shard then checks at PREPARE that versions go on where
 *	   the context ends and grow with the positions, or that the rows of a
 *	   context come in the order of their positions, to be numbered so.
 *
 * Positions mostly come in ascending order, and then are distinct.  Since any row may end that,
 * all of them are noted, 8 bytes each, in a spool.  Only if they did not come in order they are sorted at COMMIT, within work_mem.
 *
 * A savepoint that is rolled back takes away what was noted last, for all rows that are
 * inserted while it is open are its own or its descendants'.  So the notes are a stack,
 * and marks say how high it was when a subtransaction's first row came.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_operator.h"
#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "storage/lmgr.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/tuplesort.h"

#include "compat.h"
#include "ipc/shmem.h"
#include "tam/spool.h"
#include "tam/xact.h"

#define PAGE_POSITIONS 1024

/* How many positions there were, and which, when the subtransaction, or one released into it, noted its first. */
typedef struct Mark
{
	SubTransactionId subid;
	uint64			 n;
	EsPosition		 lowest;
	EsPosition		 highest;
} Mark;

typedef struct EsGiven
{
	char	*table; /* its name, for messages: at COMMIT the transient table of a rewrite is gone */
	EsSpool *spool; /* positions, 8 bytes each */
	uint64	 n;
	bool	 ascending; /* all that were ever noted */
	uint64	 last;
	Mark	*marks; /* subids ascending: one for each open subtransaction that has rows */
	uint32	 nmarks;
	uint32	 marks_allocated;
} EsGiven;

static void
mark_subtransaction(const EsXactTable *t, SubTransactionId subid)
{
	EsGiven *g = t->positions;
	Mark	 mark = {subid, g->n, t->given_lowest, t->given_highest};

	/* what is above has been released: it goes when this one goes */
	while (g->nmarks > 0 && g->marks[g->nmarks - 1].subid > subid)
	{
		mark = g->marks[--g->nmarks];
		mark.subid = subid;
	}
	if (g->nmarks > 0 && g->marks[g->nmarks - 1].subid == subid)
		return;
	if (g->nmarks == g->marks_allocated)
	{
		uint32 allocated = Max(4, g->marks_allocated * 2);

		g->marks = g->marks == NULL ? MemoryContextAlloc(es_xact->context, allocated * sizeof(Mark))
									: repalloc_huge(g->marks, allocated * sizeof(Mark));
		g->marks_allocated = allocated;
	}
	g->marks[g->nmarks++] = mark;
}

static void
note(EsXactTable *t, Relation rel, SubTransactionId subid, uint64 position)
{
	EsGiven *g = t->positions;

	if (g == NULL)
	{
		g = t->positions = MemoryContextAllocZero(es_xact->context, sizeof(EsGiven));
		g->table = MemoryContextStrdup(es_xact->context, es_visible_name(rel));
		g->spool = es_spool_create(es_xact->context);
		g->ascending = true;
	}
	mark_subtransaction(t, subid);
	(void) es_spool_add(g->spool, &position, sizeof(uint64));
	g->n++;
	t->given_lowest = Min(t->given_lowest, position);
	t->given_highest = Max(t->given_highest, position);
	g->ascending = g->ascending && position > g->last;
	g->last = position;
}

void
es_given_note(EsXactTable *t, Relation rel, bool given, int64 position, bool has_version)
{
	SubTransactionId subid = GetCurrentSubTransactionId();

	if (!given)
	{
		if (!t->assigned)
		{
			/* a batch has rows of one sort only */
			for (int s = 0; t->given && s < es_shared->nshards; s++)
				es_close_builder(t, s);
			t->assigned = true;
			t->assigned_subid = subid;
		}
		return;
	}

	if (position < 1)
		ereport(ERROR, (errcode(ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE),
						errmsg("position " INT64_FORMAT " is out of range", position),
						errdetail("Positions begin with 1."),
						errhint("Leave \"position\" out: the store fills it at commit.")));
	if (t->assigned)
		ereport(
			ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("cannot restore position " INT64_FORMAT " after new events of the same transaction",
					position),
			 errdetail("Events without a position come behind all that have one."),
			 errhint(
				 "Restore events first, in the order of their positions, those without one last: for example with INSERT ... SELECT ... ORDER BY \"position\" NULLS LAST."),
			 errtable(rel)));
	if (!t->given)
	{
		LockRelation(rel, ShareRowExclusiveLock);
		t->given_lowest = t->given_highest = position;
		es_check_given(t);
		t->given = true;
		t->given_subid = subid;
		t->given_versions = has_version;
	}
	if (t->roles.version != 0 && has_version != t->given_versions)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 has_version ? errmsg("event at position " INT64_FORMAT
									  " comes with a version, and those before it came without",
									  position)
							 : errmsg("event at position " INT64_FORMAT
									  " comes without a version, and those before it came with one",
									  position),
				 errdetail("Restored events keep their versions, or are numbered in the order of their "
						   "positions: all of a transaction or none."),
				 errtable(rel)));
	note(t, rel, subid, position);
}

void
es_given_rollback(EsXactTable *t, SubTransactionId subid)
{
	EsGiven *g = t->positions;

	/* what came after the first such row goes with it */
	if (t->assigned && t->assigned_subid >= subid)
		t->assigned = false;
	if (t->given && t->given_subid >= subid)
		t->given = false;
	if (g == NULL)
		return;
	while (g->nmarks > 0 && g->marks[g->nmarks - 1].subid >= subid)
	{
		const Mark *mark = &g->marks[--g->nmarks];

		g->n = mark->n;
		t->given_lowest = mark->lowest;
		t->given_highest = mark->highest;
	}
	es_spool_truncate(g->spool, g->n * sizeof(uint64));
	if (g->n == 0)
	{
		g->ascending = true;
		g->last = 0;
	}
}

/* ---- at COMMIT ---- */

pg_attribute_noreturn() static void given_twice(const EsGiven *g, uint64 position)
{
	ereport(ERROR,
			(errcode(ERRCODE_UNIQUE_VIOLATION),
			 errmsg("position " UINT64_FORMAT " is given twice in table \"%s\"", position, g->table),
			 errdetail(
				 "A position is an event's place in the order of all events: no two events have the same.")));
	pg_unreachable();
}

static int
compare_positions(const void *x, const void *y)
{
	uint64 a = *(const uint64 *) x;
	uint64 b = *(const uint64 *) y;

	return a < b ? -1 : a > b;
}

static void
check_sorted(EsGiven *g)
{
	Tuplesortstate *sort =
		tuplesort_begin_datum(INT8OID, Int8LessOperator, InvalidOid, false, work_mem, NULL, TUPLESORT_NONE);
	uint64 *page = palloc(PAGE_POSITIONS * sizeof(uint64));
	uint64	last = 0;
	Datum	value;
	bool	is_null;

	for (uint64 done = 0; done < g->n;)
	{
		uint64 count = Min(PAGE_POSITIONS, g->n - done);

		es_spool_read(g->spool, done * sizeof(uint64), page, count * sizeof(uint64));
		for (uint64 i = 0; i < count; i++)
			tuplesort_putdatum(sort, Int64GetDatum((int64) page[i]), false);
		done += count;
		CHECK_FOR_INTERRUPTS();
	}
	tuplesort_performsort(sort);
	while (es_tuplesort_getdatum(sort, &value, &is_null))
	{
		if ((uint64) DatumGetInt64(value) == last)
			given_twice(g, last);
		last = (uint64) DatumGetInt64(value);
		CHECK_FOR_INTERRUPTS();
	}
	tuplesort_end(sort);
	pfree(page);
}

void
es_given_check_unique(const EsXactTable *t)
{
	EsGiven *g = t->positions;
	uint64	*all;

	if (g == NULL || g->ascending)
		return;
	if (g->n > PAGE_POSITIONS)
	{
		check_sorted(g);
		return;
	}
	all = palloc(PAGE_POSITIONS * sizeof(uint64));
	es_spool_read(g->spool, 0, all, g->n * sizeof(uint64));
	qsort(all, g->n, sizeof(uint64), compare_positions);
	for (uint64 i = 1; i < g->n; i++)
		if (all[i] == all[i - 1])
			given_twice(g, all[i]);
	pfree(all);
}

void
es_given_free(EsXactTable *t)
{
	if (t->positions != NULL)
		es_spool_drop(t->positions->spool);
	t->positions = NULL;
}
