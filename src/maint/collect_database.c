/*-------------------------------------------------------------------------
 *
 * collect_database.c
 *	  One look at one database: which of these storages does a relation have?
 *
 * A worker that lives for this.  It reads block 0 of every table and materialised view that is
 * not a plain heap, whatever its access method calls itself, and takes for an event
 * table what has a metapage of this store: rather a table too many than one too few.
 *
 * Each relation is opened normally, under AccessShareLock, so that its file is the one that
 * a committed transaction left there; but nobody is waited for.  If a lock
 * is held by somebody who drops, truncates, rewrites or moves the table, or if a
 * metapage cannot be read, the look is incomplete and says nothing at all.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/relation.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/pg_am.h"
#include "catalog/pg_class.h"
#include "commands/defrem.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "storage/bufmgr.h"
#include "storage/dsm.h"
#include "storage/ipc.h"
#include "storage/lmgr.h"
#include "storage/smgr.h"
#include "tcop/tcopprot.h"
#include "utils/rel.h"
#include "utils/resowner.h"
#include "utils/snapmgr.h"

#include "core/metapage.h"
#include "ipc/shmem.h"
#include "maint/maint.h"

typedef struct Table
{
	Oid	 oid;
	bool ours; /* of the access method event_store */
} Table;

static Table *
list_tables(int *n)
{
	Oid			am = get_table_am_oid("event_store", true);
	int			allocated = 256;
	Table	   *tables = palloc(allocated * sizeof(Table));
	Relation	rel = table_open(RelationRelationId, AccessShareLock);
	SysScanDesc scan = systable_beginscan(rel, InvalidOid, false, NULL, 0, NULL);
	HeapTuple	tuple;

	*n = 0;
	while (HeapTupleIsValid(tuple = systable_getnext(scan)))
	{
		Form_pg_class form = (Form_pg_class) GETSTRUCT(tuple);

		if ((form->relkind != RELKIND_RELATION && form->relkind != RELKIND_MATVIEW) ||
			form->relam == HEAP_TABLE_AM_OID)
			continue;
		if (*n == allocated)
		{
			allocated *= 2;
			tables = repalloc_huge(tables, (Size) allocated * sizeof(Table));
		}
		tables[(*n)++] = (Table){.oid = form->oid, .ours = form->relam == am};
	}
	systable_endscan(scan);
	table_close(rel, AccessShareLock);
	return tables;
}

static int
compare_ids(const void *x, const void *y)
{
	uint64 a = *(const uint64 *) x;
	uint64 b = *(const uint64 *) y;

	return a < b ? -1 : a > b;
}

/* Marks the relation's storage.  False: it cannot be known. */
static bool
look_at_table(EsLook *look, const Table *table)
{
	Relation rel;
	bool	 known = true;

	if (!ConditionalLockRelationOid(table->oid, AccessShareLock))
		return false;
	rel = try_relation_open(table->oid, NoLock);
	if (rel == NULL)
	{
		/* dropped since we listed it */
		UnlockRelationOid(table->oid, AccessShareLock);
		return true;
	}
	/* the access method's own size of the relation would be that of its rows */
	if (!smgrexists(RelationGetSmgr(rel), MAIN_FORKNUM) ||
		smgrnblocks(RelationGetSmgr(rel), MAIN_FORKNUM) == 0)
		known = !table->ours;
	else
	{
		Buffer	   buffer = ReadBuffer(rel, 0);
		Page	   page;
		EsMetapage meta;
		EsError	   err;

		LockBuffer(buffer, BUFFER_LOCK_SHARE);
		page = BufferGetPage(buffer);
		if (PageIsNew(page) ||
			es_metapage_decode(PageGetContents(page), BLCKSZ - MAXALIGN(SizeOfPageHeaderData), &meta, &err) !=
				ES_OK ||
			memcmp(meta.store_uuid, es_shared->store_uuid, ES_UUID_LEN) != 0)
		{
			known = !table->ours;
			if (!known)
				ereport(LOG,
						(errcode(ERRCODE_DATA_CORRUPTED),
						 errmsg("the metapage of table \"%s\" is damaged or of another store",
								RelationGetRelationName(rel)),
						 errdetail("Dead storages of this database are kept as long as it cannot be read.")));
		}
		else
		{
			void *found = bsearch(&meta.storage_id, look->ids, look->nids, sizeof(look->ids[0]), compare_ids);

			if (found != NULL)
				((uint64 *) found)[1] = 1;
		}
		UnlockReleaseBuffer(buffer);
	}
	relation_close(rel, AccessShareLock);
	return known;
}

void
es_collect_database_main(Datum arg)
{
	Oid			 database = DatumGetObjectId(arg);
	dsm_handle	 handle;
	dsm_segment *segment;
	EsLook		*look;
	Table		*tables;
	int			 n;
	bool		 complete = true;

	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	memcpy(&handle, MyBgworkerEntry->bgw_extra, sizeof(handle));
	CurrentResourceOwner = NULL;
	segment = dsm_attach(handle);
	if (segment == NULL)
		proc_exit(0);
	look = dsm_segment_address(segment);
	BackgroundWorkerInitializeConnectionByOid(database, InvalidOid, BGWORKER_BYPASS_ALLOWCONN);

	StartTransactionCommand();
	PushActiveSnapshot(GetTransactionSnapshot());
	pgstat_report_activity(STATE_RUNNING, "looking for storages that no table has any more");
	tables = list_tables(&n);
	for (int i = 0; i < n && complete; i++)
	{
		CHECK_FOR_INTERRUPTS();
		complete = look_at_table(look, &tables[i]);
	}
	PopActiveSnapshot();
	CommitTransactionCommand();
	pg_write_barrier();
	pg_atomic_write_u32(&look->state, complete ? ES_LOOK_COMPLETE : ES_LOOK_INCOMPLETE);
	proc_exit(0);
}
