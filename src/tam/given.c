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
 * all of them are noted, 8 bytes each: in memory while they are few, then in a temporary
 * file.  Only if they did not come in order they are sorted at COMMIT, within work_mem.
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
#include "storage/buffile.h"
#include "storage/lmgr.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/resowner.h"
#include "utils/tuplesort.h"

#include "compat.h"
#include "ipc/shmem.h"
#include "tam/xact.h"

#define BUFFER_POSITIONS 1024

/* How many positions there were when the subtransaction, or one released into it, noted its first. */
typedef struct Mark
{
	SubTransactionId subid;
	uint64			 n;
} Mark;

typedef struct EsGiven
{
	char	*table;	 /* its name, for messages: at COMMIT the transient table of a rewrite is gone */
	uint64	*buffer; /* positions [in_file, n) */
	uint32	 allocated;
	uint64	 n;
	BufFile *file; /* positions [0, in_file); NULL = never needed */
	uint64	 in_file;
	bool	 ascending; /* all that were ever noted */
	uint64	 last;
	Mark	*marks; /* subids ascending: one for each open subtransaction that has rows */
	uint32	 nmarks;
	uint32	 marks_allocated;
} EsGiven;

static void
seek_failed(void)
{
	ereport(ERROR,
			(errcode_for_file_access(), errmsg("could not seek in temporary file of event_store: %m")));
}

static void
write_buffer(EsGiven *g)
{
	if (g->file == NULL)
	{
		MemoryContext old = MemoryContextSwitchTo(es_xact->context);
		ResourceOwner owner = CurrentResourceOwner;

		/* the file must outlive a subtransaction */
		CurrentResourceOwner = TopTransactionResourceOwner;
		g->file = BufFileCreateTemp(false);
		CurrentResourceOwner = owner;
		MemoryContextSwitchTo(old);
	}
	if (BufFileSeek(g->file, 0, (off_t) (g->in_file * sizeof(uint64)), SEEK_SET) != 0)
		seek_failed();
	BufFileWrite(g->file, (void *) g->buffer, (g->n - g->in_file) * sizeof(uint64));
	g->in_file = g->n;
}

static void
mark_subtransaction(EsGiven *g, SubTransactionId subid)
{
	uint64 n = g->n;

	/* what is above has been released: it goes when this one goes */
	while (g->nmarks > 0 && g->marks[g->nmarks - 1].subid > subid)
		n = g->marks[--g->nmarks].n;
	if (g->nmarks > 0 && g->marks[g->nmarks - 1].subid == subid)
		return;
	if (g->nmarks == g->marks_allocated)
	{
		g->marks_allocated = Max(4, g->marks_allocated * 2);
		g->marks = g->marks == NULL ? MemoryContextAlloc(es_xact->context, g->marks_allocated * sizeof(Mark))
									: repalloc_huge(g->marks, g->marks_allocated * sizeof(Mark));
	}
	g->marks[g->nmarks++] = (Mark){subid, n};
}

static void
note(EsXactTable *t, Relation rel, SubTransactionId subid, uint64 position)
{
	EsGiven *g = t->positions;

	if (g == NULL)
	{
		g = t->positions = MemoryContextAllocZero(es_xact->context, sizeof(EsGiven));
		g->table = MemoryContextStrdup(es_xact->context, es_visible_name(rel));
		g->ascending = true;
	}
	mark_subtransaction(g, subid);
	if (g->n - g->in_file == BUFFER_POSITIONS)
		write_buffer(g);
	if (g->n - g->in_file == g->allocated)
	{
		g->allocated = Max(16, g->allocated * 4);
		g->buffer = g->buffer == NULL ? MemoryContextAlloc(es_xact->context, g->allocated * sizeof(uint64))
									  : repalloc(g->buffer, g->allocated * sizeof(uint64));
	}
	g->buffer[g->n++ - g->in_file] = position;
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
	if ((uint64) position < t->given_lowest)
		t->given_lowest = position;
	if ((uint64) position > t->given_highest)
		t->given_highest = position;
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
		g->n = g->marks[--g->nmarks].n;
	g->in_file = Min(g->in_file, g->n);
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
	uint64 *page = palloc(BUFFER_POSITIONS * sizeof(uint64));
	uint64	last = 0;
	Datum	value;
	bool	is_null;

	if (BufFileSeek(g->file, 0, 0, SEEK_SET) != 0)
		seek_failed();
	for (uint64 done = 0; done < g->in_file;)
	{
		uint64 count = Min(BUFFER_POSITIONS, g->in_file - done);

		if (BufFileRead(g->file, page, count * sizeof(uint64)) != count * sizeof(uint64))
			ereport(ERROR,
					(errcode_for_file_access(), errmsg("could not read temporary file of event_store: %m")));
		for (uint64 i = 0; i < count; i++)
			tuplesort_putdatum(sort, Int64GetDatum((int64) page[i]), false);
		done += count;
		CHECK_FOR_INTERRUPTS();
	}
	for (uint64 i = g->in_file; i < g->n; i++)
		tuplesort_putdatum(sort, Int64GetDatum((int64) g->buffer[i - g->in_file]), false);
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

	if (g == NULL || g->ascending)
		return;
	if (g->in_file > 0)
	{
		check_sorted(g);
		return;
	}
	/* nothing is noted any more, so the notes themselves may be sorted */
	qsort(g->buffer, g->n, sizeof(uint64), compare_positions);
	for (uint64 i = 1; i < g->n; i++)
		if (g->buffer[i] == g->buffer[i - 1])
			given_twice(g, g->buffer[i]);
}

void
es_given_free(EsXactTable *t)
{
	/* called by the transaction's callbacks, before its resource owner lets go of the file */
	if (t->positions != NULL && t->positions->file != NULL)
		BufFileClose(t->positions->file);
	t->positions = NULL;
}
