/*-------------------------------------------------------------------------
 *
 * template.c
 *	  CREATE DATABASE: events lie outside the template's directory and would not be copied, so a template
 *	  whose event tables hold rows is refused.
 *
 * That is asked when createdb() has made the new database's row.  All of PostgreSQL's own checks are behind it
 * then, privileges first; nobody else is connected to the template, and a lock on it keeps everybody out until
 * it is copied, so what is answered stays true.
 *
 * Which storages hold rows, shards know.  They are asked only if pg_class of the template has a table of any other
 * access method than heap, so that a paused or failed shard is in nobody's way without reason; where they
 * must be asked and one cannot answer, the statement is refused rather than held up with its locks.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/heapam.h"
#include "access/htup_details.h"
#include "catalog/pg_am.h"
#include "catalog/pg_class.h"
#include "catalog/pg_database.h"
#include "commands/dbcommands.h"
#include "commands/defrem.h"
#include "miscadmin.h"
#include "storage/bufmgr.h"
#include "storage/lmgr.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

#include "compat.h"
#include "ipc/channel.h"
#include "ipc/shmem.h"
#include "tam/template.h"

/* Of the CREATE DATABASE that runs; "" = none does. */
static char template_name[NAMEDATALEN];

void
es_template_begin(const CreatedbStmt *stmt)
{
	ListCell *lc;

	strlcpy(template_name, "template1", sizeof(template_name));
	foreach(lc, stmt->options)
	{
		DefElem *def = lfirst_node(DefElem, lc);

		if (strcmp(def->defname, "template") == 0 && def->arg != NULL)
			strlcpy(template_name, defGetString(def), sizeof(template_name));
	}
}

void
es_template_end(void)
{
	template_name[0] = '\0';
}

/* Has the page of a pg_class a table that is not a heap? */
static bool
page_has_table(Page page, Buffer buffer, Snapshot snapshot)
{
	OffsetNumber max = PageIsNew(page) ? 0 : PageGetMaxOffsetNumber(page);

	for (OffsetNumber offset = FirstOffsetNumber; offset <= max; offset = OffsetNumberNext(offset))
	{
		ItemId		  item = PageGetItemId(page, offset);
		HeapTupleData tuple;
		Form_pg_class form;

		if (!ItemIdIsNormal(item))
			continue;
		ItemPointerSet(&tuple.t_self, BufferGetBlockNumber(buffer), offset);
		tuple.t_data = (HeapTupleHeader) PageGetItem(page, item);
		tuple.t_len = ItemIdGetLength(item);
		tuple.t_tableOid = RelationRelationId;
		if (!HeapTupleSatisfiesVisibility(&tuple, snapshot, buffer))
			continue;
		form = (Form_pg_class) GETSTRUCT(&tuple);
		if (form->relkind == RELKIND_RELATION && form->relam != HEAP_TABLE_AM_OID)
			return true;
	}
	return false;
}

/* Reads pg_class of a database that this session need not be connected to, as createdb() itself does. */
static bool
may_have_event_tables(Oid database, Oid tablespace)
{
	LockRelId			 lock = {.relId = RelationRelationId, .dbId = database};
	RelFileLocator		 locator = es_pg_class_locator(database, tablespace);
	BufferAccessStrategy strategy = GetAccessStrategy(BAS_BULKREAD);
	BlockNumber			 nblocks;
	Snapshot			 snapshot;
	bool				 found = false;

	LockRelationId(&lock, AccessShareLock);
	nblocks = es_nblocks(locator);
	snapshot = RegisterSnapshot(GetLatestSnapshot());
	for (BlockNumber block = 0; block < nblocks && !found; block++)
	{
		Buffer buffer;

		CHECK_FOR_INTERRUPTS();
		buffer = ReadBufferWithoutRelcache(locator, MAIN_FORKNUM, block, RBM_NORMAL, strategy, true);
		LockBuffer(buffer, BUFFER_LOCK_SHARE);
		found = page_has_table(BufferGetPage(buffer), buffer, snapshot);
		UnlockReleaseBuffer(buffer);
	}
	UnregisterSnapshot(snapshot);
	FreeAccessStrategy(strategy);
	UnlockRelationId(&lock, AccessShareLock);
	return found;
}

static void
check_shard_answers(int shard)
{
	bool paused = pg_atomic_read_u32(&es_shared->shards[shard].paused) != 0;

	if (!paused && pg_atomic_read_u32(&es_shared->shards[shard].state) != ES_SHARD_FAILED)
		return;
	ereport(
		ERROR,
		(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
		 errmsg("cannot tell whether event_store tables of template \"%s\" hold rows", template_name),
		 errdetail(paused ? "Shard %d is paused." : "Shard %d could not open.", shard),
		 errhint(
			 "The view event_store.stat_shards shows what shards do.  Templates without event_store tables, such as template0, can be used meanwhile.")));
}

static void
check_shard(int shard, Oid database)
{
	EsStatRequest	   req = {.req = {.type = ES_REQ_STAT}, .kind = ES_STAT_TABLES};
	EsPart			   part = {&req, sizeof(req)};
	EsAnswer		  *answer;
	const EsTableStat *stat;
	uint64			   n;

	check_shard_answers(shard);
	answer = es_channel_call(shard, &req.req, &part, 1);
	stat = (const EsTableStat *) (answer + 1);
	n = (answer->len - sizeof(EsAnswer)) / sizeof(EsTableStat);
	for (uint64 i = 0; i < n; i++)
	{
		/* pending segments: a large transaction may have committed a moment ago */
		if (stat[i].table.database != database ||
			stat[i].segment_rows + stat[i].memtable_rows + stat[i].pending_rows == 0)
			continue;
		ereport(
			ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
			 errmsg("cannot create a database from template \"%s\", whose event_store tables hold rows",
					template_name),
			 errdetail("Events lie outside the database's directory and would not be copied."),
			 errhint(
				 "Copy it with pg_dump, or empty its event tables (rows of dropped tables count until they are collected).")));
	}
	pfree(answer);
}

void
es_template_check(void)
{
	HeapTuple tuple;
	Oid		  database;
	Oid		  tablespace;

	if (template_name[0] == '\0')
		return;
	/* it is locked: the name is still that of the database that is copied */
	database = get_database_oid(template_name, false);
	tuple = SearchSysCache1(DATABASEOID, ObjectIdGetDatum(database));
	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for database %u", database);
	tablespace = ((Form_pg_database) GETSTRUCT(tuple))->dattablespace;
	ReleaseSysCache(tuple);
	if (!may_have_event_tables(database, tablespace))
		return;

	es_wait_store_ready();
	for (int s = 0; s < es_shared->nshards; s++)
		check_shard(s, database);
}
