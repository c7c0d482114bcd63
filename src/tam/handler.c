/*-------------------------------------------------------------------------
 *
 * handler.c
 *	  The table access method's routine: which callback goes where, and those that say
 *	  no.
 *
 * Events are immutable and live in the shards, so everything that changes, locks or
 * indexes a row is refused with feature_not_supported and a hint.  Most of it is
 * refused earlier, when a statement starts (hooks.c), so that it does not depend on whether a row
 * is met; the callbacks here are for what gets past that.
 *
 * scan_bitmap_* and scan_set_tidrange stay NULL: the planner then avoids them.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/multixact.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/heap.h"
#include "catalog/index.h"
#include "catalog/pg_am.h"
#include "catalog/storage.h"
#include "catalog/storage_xlog.h"
#include "catalog/toasting.h"
#include "commands/progress.h"
#include "executor/tuptable.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "storage/bufmgr.h"
#include "storage/smgr.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

#include "compat.h"
#include "event_store.h"
#include "ipc/shmem.h"
#include "tam/estimate.h"
#include "tam/roles.h"
#include "tam/scan.h"
#include "tam/tam.h"
#include "tam/vacuum.h"
#include "tam/xact.h"

PG_FUNCTION_INFO_V1(event_store_handler);

pg_attribute_noreturn() static void refuse(Relation rel, const char *what, const char *hint)
{
	ereport(ERROR, (errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
					errmsg("cannot %s event_store table \"%s\"", what, RelationGetRelationName(rel)),
					errhint("%s", hint)));
	pg_unreachable();
}

#define HINT_IMMUTABLE "Events are immutable: append an event that corrects the earlier one."

/* ---- slots: virtual ones, but for two things ---- */

static TupleTableSlotOps slot_ops;

static Datum
slot_system_attribute(TupleTableSlot *slot, int attnum, bool *isnull)
{
	const FormData_pg_attribute *att = SystemAttributeDefinition(attnum);

	ereport(ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
			 errmsg("rows of an event_store table have no system column \"%s\"", NameStr(att->attname)),
			 errhint("Events are never updated: \"position\" and \"version\" tell them apart; "
					 "ctid and tableoid can be selected.")));
	return (Datum) 0;
}

/* ANALYZE copies its sample out of the slot as heap tuples and sorts them by t_self. */
static HeapTuple
slot_copy_heap_tuple(TupleTableSlot *slot)
{
	HeapTuple tuple = TTSOpsVirtual.copy_heap_tuple(slot);

	tuple->t_self = slot->tts_tid;
	tuple->t_tableOid = slot->tts_tableOid;
	return tuple;
}

static const TupleTableSlotOps *
es_slot_callbacks(Relation rel)
{
	if (slot_ops.getsysattr == NULL)
	{
		slot_ops = TTSOpsVirtual;
		slot_ops.copy_heap_tuple = slot_copy_heap_tuple;
		slot_ops.getsysattr = slot_system_attribute;
	}
	return &slot_ops;
}

/* ---- index fetches: there are no indexes ---- */

static IndexFetchTableData *
es_index_fetch_begin(Relation rel)
{
	refuse(rel, "use an index on", ES_HINT_INDEX);
}

static void
es_index_fetch_reset(IndexFetchTableData *data)
{
}

static void
es_index_fetch_end(IndexFetchTableData *data)
{
}

static bool
es_index_fetch_tuple(IndexFetchTableData *data, ItemPointer tid, Snapshot snapshot, TupleTableSlot *slot,
					 bool *call_again, bool *all_dead)
{
	refuse(data->rel, "use an index on", ES_HINT_INDEX);
}

static TransactionId
es_index_delete_tuples(Relation rel, TM_IndexDeleteOp *delstate)
{
	refuse(rel, "use an index on", ES_HINT_INDEX);
}

static double
es_index_build_range_scan(Relation rel, Relation index_rel, IndexInfo *index_info, bool allow_sync,
						  bool anyvisible, bool progress, BlockNumber start_blockno, BlockNumber numblocks,
						  IndexBuildCallback callback, void *callback_state, TableScanDesc scan)
{
	refuse(rel, "create an index on", ES_HINT_INDEX);
}

static void
es_index_validate_scan(Relation rel, Relation index_rel, IndexInfo *index_info, Snapshot snapshot,
					   ValidateIndexState *state)
{
	refuse(rel, "create an index on", ES_HINT_INDEX);
}

/* ---- single rows ---- */

static bool
es_tuple_fetch_row_version(Relation rel, ItemPointer tid, Snapshot snapshot, TupleTableSlot *slot)
{
	return es_fetch_row(rel, tid, snapshot, slot);
}

static bool
es_tuple_tid_valid(TableScanDesc scan, ItemPointer tid)
{
	return ItemPointerIsValid(tid);
}

/* Rows have one version. */
static void
es_tuple_get_latest_tid(TableScanDesc scan, ItemPointer tid)
{
}

static bool
es_tuple_satisfies_snapshot(Relation rel, TupleTableSlot *slot, Snapshot snapshot)
{
	TupleTableSlot *copy = table_slot_create(rel, NULL);
	ItemPointerData tid = slot->tts_tid;
	bool			visible;
	bool			own;

	(void) es_tid_decode(&tid, &own);
	visible = own || es_fetch_row(rel, &tid, snapshot, copy);
	ExecDropSingleTupleTableSlot(copy);
	return visible;
}

static void
es_tuple_insert(Relation rel, TupleTableSlot *slot, CommandId cid, int options,
				struct BulkInsertStateData *bistate)
{
	(void) es_xact_insert(rel, slot, cid, false);
	pgstat_count_heap_insert(rel, 1);
}

static void
es_multi_insert(Relation rel, TupleTableSlot **slots, int nslots, CommandId cid, int options,
				struct BulkInsertStateData *bistate)
{
	for (int i = 0; i < nslots; i++)
		(void) es_xact_insert(rel, slots[i], cid, false);
	pgstat_count_heap_insert(rel, nslots);
}

static void
es_tuple_insert_speculative(Relation rel, TupleTableSlot *slot, CommandId cid, int options,
							struct BulkInsertStateData *bistate, uint32 token)
{
	refuse(rel, "use ON CONFLICT with",
		   "Use \"event_id\": an event whose id is already in its context is not stored twice.");
}

static void
es_tuple_complete_speculative(Relation rel, TupleTableSlot *slot, uint32 token, bool succeeded)
{
	refuse(rel, "use ON CONFLICT with",
		   "Use \"event_id\": an event whose id is already in its context is not stored twice.");
}

static TM_Result
es_tuple_delete(Relation rel, ItemPointer tid, CommandId cid, Snapshot snapshot, Snapshot crosscheck,
				bool wait, TM_FailureData *tmfd, bool changing_part)
{
	refuse(rel, "delete from", HINT_IMMUTABLE);
}

static TM_Result
es_tuple_update(Relation rel, ItemPointer otid, TupleTableSlot *slot, CommandId cid, Snapshot snapshot,
				Snapshot crosscheck, bool wait, TM_FailureData *tmfd, LockTupleMode *lockmode,
				EsUpdateIndexes *update_indexes)
{
	refuse(rel, "update", HINT_IMMUTABLE);
}

static TM_Result
es_tuple_lock(Relation rel, ItemPointer tid, Snapshot snapshot, TupleTableSlot *slot, CommandId cid,
			  LockTupleMode mode, LockWaitPolicy wait_policy, uint8 flags, TM_FailureData *tmfd)
{
	/* what FOR KEY SHARE asks for holds for ever; foreign keys that point to a heap table do ask */
	if (mode == LockTupleKeyShare)
	{
		tmfd->traversed = false;
		return es_fetch_row(rel, tid, snapshot, slot) ? TM_Ok : TM_Deleted;
	}
	refuse(rel, "lock rows of",
		   "Events are immutable; to serialise writers of a context use an expected version.");
}

/* ---- storage ---- */

static void
es_relation_set_new_filelocator(Relation rel, const RelFileLocator *newrlocator, char persistence,
								TransactionId *freezeXid, MultiXactId *minmulti)
{
	RelFileLocator locator = *newrlocator;
	Oid			   relid = es_visible_relid(rel);

	/* SET ACCESS METHOD makes a table that its files are swapped with */
	if (rel->rd_rel->relkind == RELKIND_MATVIEW || get_rel_relkind(relid) == RELKIND_MATVIEW)
		ereport(ERROR, (errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
						errmsg("materialized view \"%s\" cannot use access method event_store",
							   es_visible_name(rel)),
						errhint("Create it USING heap.")));
	if (persistence != RELPERSISTENCE_PERMANENT)
		ereport(ERROR, (errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
						errmsg("%s table \"%s\" cannot use access method event_store",
							   persistence == RELPERSISTENCE_TEMP ? "temporary" : "unlogged",
							   RelationGetRelationName(rel)),
						errhint("Create it USING heap.")));

	if (relid != RelationGetRelid(rel))
		es_roles_rewrite(relid);

	*freezeXid = RecentXmin;
	*minmulti = GetOldestMultiXactId();
	es_metapage_create(rel, &locator, persistence);
}

/*
 * Called for TRUNCATE in the transaction that created the storage: PostgreSQL then
 * empties the file in place.  Ours must become another storage, so the metapage gets a
 * new id: as nothing of the old one can be seen by anybody else, that is safe.
 */
static void
es_relation_nontransactional_truncate(Relation rel)
{
	es_metapage_renew(rel);
}

/* SET TABLESPACE: the file moves with its metapage, the storage stays the same. */
static void
es_relation_copy_data(Relation rel, const RelFileLocator *newrlocator)
{
	SMgrRelation   dst;
	RelFileLocator locator = *newrlocator;

	FlushRelationBuffers(rel);
	dst = RelationCreateStorage(locator, rel->rd_rel->relpersistence, true);
	RelationCopyStorage(RelationGetSmgr(rel), dst, MAIN_FORKNUM, rel->rd_rel->relpersistence);
	RelationDropStorage(rel);
	smgrclose(dst);
}

/* VACUUM FULL; CLUSTER would need an index. */
static void
es_relation_copy_for_cluster(Relation old_table, Relation new_table, Relation old_index, bool use_sort,
							 TransactionId oldest_xmin, TransactionId *xid_cutoff, MultiXactId *multi_cutoff,
							 double *num_tuples, double *tups_vacuumed, double *tups_recently_dead)
{
	es_vacuum_full(old_table, new_table, xid_cutoff, num_tuples);
	*tups_vacuumed = 0;
	*tups_recently_dead = 0;
}

static void
es_relation_vacuum(Relation rel, EsVacuumParams params, BufferAccessStrategy bstrategy)
{
	es_vacuum(rel);
}

#if PG_VERSION_NUM >= 170000
static bool
es_scan_analyze_next_block(TableScanDesc scan, ReadStream *stream)
{
	Buffer buffer = read_stream_next_buffer(stream, NULL);

	if (!BufferIsValid(buffer))
		return false;
	ReleaseBuffer(buffer);
	return es_analyze_take_block(scan);
}
#else
static bool
es_scan_analyze_next_block(TableScanDesc scan, BlockNumber blockno, BufferAccessStrategy bstrategy)
{
	return es_analyze_take_block(scan);
}
#endif

static bool
es_scan_analyze_next_tuple(TableScanDesc scan, TransactionId oldest_xmin, double *liverows, double *deadrows,
						   TupleTableSlot *slot)
{
	return es_analyze_next_tuple(scan, liverows, slot);
}

/* The table that es_make_toast_table makes one for. */
static Oid toast_wanted = InvalidOid;

static bool
es_relation_needs_toast_table(Relation rel)
{
	/* large values lie in the shards' files */
	if (RelationGetRelid(rel) != toast_wanted)
		return false;
	return GetHeapamTableAmRoutine()->relation_needs_toast_table(rel);
}

static Oid
es_relation_toast_am(Relation rel)
{
	return HEAP_TABLE_AM_OID;
}

void
es_make_toast_table(Oid relid)
{
	toast_wanted = relid;
	PG_TRY();
	{
		NewHeapCreateToastTable(relid, (Datum) 0, AccessExclusiveLock, InvalidOid);
	}
	PG_FINALLY();
	{
		toast_wanted = InvalidOid;
	}
	PG_END_TRY();
}

static const TableAmRoutine es_routine = {.type = T_TableAmRoutine,

										  .slot_callbacks = es_slot_callbacks,

										  .scan_begin = es_scan_begin,
										  .scan_end = es_scan_end,
										  .scan_rescan = es_scan_rescan,
										  .scan_getnextslot = es_scan_getnextslot,

										  .parallelscan_estimate = es_parallelscan_estimate,
										  .parallelscan_initialize = es_parallelscan_initialize,
										  .parallelscan_reinitialize = es_parallelscan_reinitialize,

										  .index_fetch_begin = es_index_fetch_begin,
										  .index_fetch_reset = es_index_fetch_reset,
										  .index_fetch_end = es_index_fetch_end,
										  .index_fetch_tuple = es_index_fetch_tuple,

										  .tuple_fetch_row_version = es_tuple_fetch_row_version,
										  .tuple_tid_valid = es_tuple_tid_valid,
										  .tuple_get_latest_tid = es_tuple_get_latest_tid,
										  .tuple_satisfies_snapshot = es_tuple_satisfies_snapshot,
										  .index_delete_tuples = es_index_delete_tuples,

										  .tuple_insert = es_tuple_insert,
										  .tuple_insert_speculative = es_tuple_insert_speculative,
										  .tuple_complete_speculative = es_tuple_complete_speculative,
										  .multi_insert = es_multi_insert,
										  .tuple_delete = es_tuple_delete,
										  .tuple_update = es_tuple_update,
										  .tuple_lock = es_tuple_lock,

										  .relation_set_new_filelocator = es_relation_set_new_filelocator,
										  .relation_nontransactional_truncate =
											  es_relation_nontransactional_truncate,
										  .relation_copy_data = es_relation_copy_data,
										  .relation_copy_for_cluster = es_relation_copy_for_cluster,
										  .relation_vacuum = es_relation_vacuum,
										  .scan_analyze_next_block = es_scan_analyze_next_block,
										  .scan_analyze_next_tuple = es_scan_analyze_next_tuple,
										  .index_build_range_scan = es_index_build_range_scan,
										  .index_validate_scan = es_index_validate_scan,

										  .relation_size = es_relation_size,
										  .relation_needs_toast_table = es_relation_needs_toast_table,
										  .relation_toast_am = es_relation_toast_am,

										  .relation_estimate_size = es_relation_estimate_size,

										  .scan_sample_next_block = es_sample_next_block,
										  .scan_sample_next_tuple = es_sample_next_tuple};

const TableAmRoutine *
es_tam_routine(void)
{
	return &es_routine;
}

Datum
event_store_handler(PG_FUNCTION_ARGS)
{
	es_require_preload();
	PG_RETURN_POINTER(&es_routine);
}
