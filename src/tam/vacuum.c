/*-------------------------------------------------------------------------
 *
 * vacuum.c
 *	  VACUUM of an event table: nothing is dead, but CLOG may be forgotten.
 *
 * Rows carry the xid of their transaction until a segment holds them below every xmin, and a
 * shard asks CLOG for a transaction until its verdict is durable in the shard's own
 * files.  So relfrozenxid may move to the oldest xid that some shard has no
 * durable verdict for, which is what the shards answer; PostgreSQL then truncates CLOG below the
 * minimum over all tables.
 *
 * VACUUM FULL has nothing to gain from writing the rows again, and copies would have its own xid: an older snapshot,
 * which may come to the table only after it, would see no row at all.  So the rows stay where they are: the new file gets the
 * old one's metapage, and thereby its storage.  Whether it commits, is rolled back or cut off by a crash, the table has one file
 * that names this storage.  PostgreSQL takes the rows for rewritten and clears the missing values of columns that were
 * added later, which the rows still need; they are put back before the transaction, which nothing else is
 * part of, commits.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/multixact.h"
#include "access/table.h"
#include "access/transam.h"
#include "access/xact.h"
#include "catalog/indexing.h"
#include "catalog/pg_attribute.h"
#include "commands/vacuum.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "storage/bufmgr.h"
#include "storage/procarray.h"
#include "utils/datum.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

#include "compat.h"
#include "ipc/channel.h"
#include "ipc/shmem.h"
#include "tam/estimate.h"
#include "tam/tam.h"
#include "tam/vacuum.h"

/* A missing value that VACUUM FULL takes from its table. */
typedef struct MissingValue
{
	Oid		   relid;
	AttrNumber att;
	Datum	   value; /* the array in attmissingval */
} MissingValue;

static List *missing_values = NIL; /* in TopTransactionContext */

EsFxid
es_oldest_undecided(void)
{
	EsFxid oldest = U64FromFullTransactionId(ReadNextFullTransactionId());

	for (int s = 0; s < es_shared->nshards; s++)
	{
		EsRequest		   req = {.type = ES_REQ_UNDECIDED};
		EsPart			   part = {&req, sizeof(req)};
		EsUndecidedAnswer *answer;

		answer = (EsUndecidedAnswer *) es_channel_call(s, &req, &part, 1);
		oldest = Min(oldest, answer->oldest);
		pfree(answer);
	}
	return oldest;
}

/* What relfrozenxid may be, limit at most. */
static TransactionId
frozen_xid(TransactionId limit)
{
	TransactionId frozen = XidFromFullTransactionId(FullTransactionIdFromU64(es_oldest_undecided()));

	return TransactionIdPrecedes(limit, frozen) ? limit : frozen;
}

void
es_vacuum(Relation rel)
{
	TransactionId frozen;
	MultiXactId	  minmulti = GetOldestMultiXactId();
	EsTableTotals totals;

	es_wait_store_ready();
	frozen = frozen_xid(GetOldestNonRemovableTransactionId(rel));

	es_table_totals(rel, &totals);
	es_vac_update_relstats(rel, RelationGetNumberOfBlocks(rel), (double) totals.rows, frozen, minmulti);
	es_pgstat_report_vacuum(rel, (int64) totals.rows);
}

static void
save_missing_values(Relation rel)
{
	TupleDesc	  desc = RelationGetDescr(rel);
	MemoryContext old = MemoryContextSwitchTo(TopTransactionContext);

	for (int i = 0; i < desc->natts; i++)
	{
		AttrNumber	  att = i + 1;
		HeapTuple	  tuple;
		MissingValue *m;
		Datum		  value;
		bool		  isnull;

		if (!TupleDescAttr(desc, i)->atthasmissing)
			continue;
		tuple = SearchSysCache2(ATTNUM, ObjectIdGetDatum(RelationGetRelid(rel)), Int16GetDatum(att));
		if (!HeapTupleIsValid(tuple))
			elog(ERROR, "cache lookup failed for attribute %d of relation %u", att, RelationGetRelid(rel));
		value = SysCacheGetAttr(ATTNUM, tuple, Anum_pg_attribute_attmissingval, &isnull);
		if (!isnull)
		{
			m = palloc(sizeof(MissingValue));
			m->relid = RelationGetRelid(rel);
			m->att = att;
			m->value = datumCopy(value, false, -1);
			missing_values = lappend(missing_values, m);
		}
		ReleaseSysCache(tuple);
	}
	MemoryContextSwitchTo(old);
}

void
es_vacuum_full(Relation old_table, Relation new_table, TransactionId *frozen, double *rows)
{
	TransactionId old_frozen = old_table->rd_rel->relfrozenxid;
	EsTableTotals totals;

	es_wait_store_ready();
	es_table_totals(old_table, &totals);
	*rows = (double) totals.rows;
	*frozen = frozen_xid(*frozen);
	if (TransactionIdIsValid(old_frozen) && TransactionIdPrecedes(*frozen, old_frozen))
		*frozen = old_frozen;
	save_missing_values(old_table);
	es_metapage_copy(old_table, new_table);
}

void
es_vacuum_precommit(void)
{
	Relation  rel;
	ListCell *lc;

	if (missing_values == NIL)
		return;
	CommandCounterIncrement();
	rel = table_open(AttributeRelationId, RowExclusiveLock);
	foreach(lc, missing_values)
	{
		MissingValue *m = lfirst(lc);
		HeapTuple	  tuple = SearchSysCache2(ATTNUM, ObjectIdGetDatum(m->relid), Int16GetDatum(m->att));
		HeapTuple	  changed;
		Datum		  values[Natts_pg_attribute] = {0};
		bool		  nulls[Natts_pg_attribute] = {0};
		bool		  replace[Natts_pg_attribute] = {0};

		if (!HeapTupleIsValid(tuple))
			elog(ERROR, "cache lookup failed for attribute %d of relation %u", m->att, m->relid);
		values[Anum_pg_attribute_atthasmissing - 1] = BoolGetDatum(true);
		replace[Anum_pg_attribute_atthasmissing - 1] = true;
		values[Anum_pg_attribute_attmissingval - 1] = m->value;
		replace[Anum_pg_attribute_attmissingval - 1] = true;
		changed = heap_modify_tuple(tuple, RelationGetDescr(rel), values, nulls, replace);
		CatalogTupleUpdate(rel, &changed->t_self, changed);
		heap_freetuple(changed);
		ReleaseSysCache(tuple);
	}
	table_close(rel, RowExclusiveLock);
	missing_values = NIL;
}

void
es_vacuum_end(void)
{
	missing_values = NIL;
}
