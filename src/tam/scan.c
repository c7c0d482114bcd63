/*-------------------------------------------------------------------------
 *
 * scan.c
 *	  Table scans: sequential, parallel, sampling, ANALYZE, and fetching a row by its TID.
 *
 * A sequential scan is a reader over all shards.  In a parallel scan each worker
 * takes the next shard that nobody has taken; the leader's dead batches (rolled-back
 * savepoints) travel in the shared scan descriptor.
 *
 * Rows come in no particular order if they bring their positions: whoever stores them again (a rewrite, a
 * dump, INSERT … SELECT) keeps the order with the position.  Those of a table without the role have their place
 * only in the order in which they come, so a sequential scan gives them by position; and so it does
 * when the transaction has rows of its own there, which have no position yet and follow all others.
 * That costs a multiple, so a query that only reads (es_scan_any_order) is spared.  In a parallel scan rows come by
 * position within a shard, and so within a context.
 *
 * Cursors that can go back: while a portal with SCROLL runs, a scan keeps what it gave out in a
 * tuplestore (which spills to disk beyond work_mem), and going back or starting over reads from
 * there; so the order stays what it was although a flush may have moved rows meanwhile.
 *
 * ANALYZE and TABLESAMPLE see the table as one block, the metapage: ANALYZE's reservoir samples
 * all rows that we offer, TABLESAMPLE's methods choose from virtual pages.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/parallel.h"
#include "access/relscan.h"
#include "access/skey.h"
#include "access/tableam.h"
#include "access/tsmapi.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "executor/executor.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "nodes/execnodes.h"
#include "storage/bufmgr.h"
#include "tcop/pquery.h"
#include "utils/memutils.h"
#include "utils/portal.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/tuplestore.h"

#include "compat.h"
#include "ipc/shmem.h"
#include "tam/reader.h"
#include "tam/scan.h"
#include "tam/xact.h"

bool es_scan_any_order = false;

#define SAMPLE_PAGE_ROWS 128 /* rows of a virtual page for TABLESAMPLE */

/* Shared state of a parallel scan. */
typedef struct EsParallelScanData
{
	ParallelTableScanDescData base;
	pg_atomic_uint32		  next_shard;
	EsScanOrder				  order; /* workers do not know what the query is for */
	uint32					  ndead[ES_MAX_SHARDS];
	EsLsn					  starts[FLEXIBLE_ARRAY_MEMBER]; /* shard by shard */
} EsParallelScanData;

typedef struct EsScanData
{
	TableScanDescData base;
	MemoryContext	  context;
	EsReader		 *reader;
	bool			  done; /* the reader has come to its end */

	/* SCROLL */
	bool			 keep;
	Tuplestorestate *store;
	TupleTableSlot	*store_slot; /* minimal: columns + TID as bigint */
	TupleDesc		 store_desc;
	bool			 at_end; /* the scan stands behind its last row */
	int64			 kept;	 /* rows in the store */
	int64			 at;	 /* rows before the scan's position */

	/* parallel */
	EsDeadStarts dead;

	/* ANALYZE, TABLESAMPLE */
	bool   block_done;
	uint64 sample_base; /* number of the virtual page's first row */
	uint64 sample_rows; /* rows of the table */
	uint64 sample_next; /* number of the reader's next row */
} EsScanData;

typedef EsScanData *EsScan;

static bool
portal_may_go_back(void)
{
	return ActivePortal != NULL && (ActivePortal->cursorOptions & CURSOR_OPT_SCROLL) != 0;
}

/* For pg_stat_user_tables.seq_scan, which counts as for a heap: each begin and each start over. */
static void
count_scan(EsScan scan)
{
	if ((scan->base.rs_flags & SO_TYPE_SEQSCAN) != 0)
		pgstat_count_heap_scan(scan->base.rs_rd);
}

TableScanDesc
es_scan_begin(Relation rel, Snapshot snapshot, int nkeys, struct ScanKeyData *key,
			  ParallelTableScanDesc pscan, uint32 flags)
{
	EsScan scan = palloc0(sizeof(EsScanData));

	RelationIncrementReferenceCount(rel);
	scan->base.rs_rd = rel;
	scan->base.rs_snapshot = snapshot;
	scan->base.rs_nkeys = nkeys;
	if (nkeys > 0)
	{
		scan->base.rs_key = palloc(sizeof(ScanKeyData) * nkeys);
		memcpy(scan->base.rs_key, key, sizeof(ScanKeyData) * nkeys);
	}
	scan->base.rs_flags = flags;
	scan->base.rs_parallel = pscan;
	scan->context = CurrentMemoryContext;
	scan->keep = pscan == NULL && (flags & SO_TYPE_SEQSCAN) != 0 && portal_may_go_back();
	if (pscan != NULL)
	{
		EsParallelScanData *shared = (EsParallelScanData *) pscan;
		EsLsn			   *p = shared->starts;

		for (int s = 0; s < es_shared->nshards; s++)
		{
			scan->dead.n[s] = shared->ndead[s];
			scan->dead.starts[s] = p;
			p += shared->ndead[s];
		}
	}
	count_scan(scan);
	return &scan->base;
}

static void
close_reader(EsScan scan)
{
	if (scan->reader == NULL)
		return;
	/* seq_tup_read: all rows at once, by the macro that takes a number */
	if ((scan->base.rs_flags & SO_TYPE_SEQSCAN) != 0)
		pgstat_count_index_tuples(scan->base.rs_rd, (PgStat_Counter) es_reader_given_out(scan->reader));
	es_reader_end(scan->reader);
	scan->reader = NULL;
}

static void
close_store(EsScan scan)
{
	if (scan->store != NULL)
		tuplestore_end(scan->store);
	if (scan->store_slot != NULL)
		ExecDropSingleTupleTableSlot(scan->store_slot);
	scan->store = NULL;
	scan->store_slot = NULL;
}

void
es_scan_end(TableScanDesc sscan)
{
	EsScan scan = (EsScan) sscan;

	close_reader(scan);
	close_store(scan);
	RelationDecrementReferenceCount(scan->base.rs_rd);
	if (scan->base.rs_key)
		pfree(scan->base.rs_key);
	if (scan->base.rs_flags & SO_TEMP_SNAPSHOT)
		UnregisterSnapshot(scan->base.rs_snapshot);
	pfree(scan);
}

void
es_scan_rescan(TableScanDesc sscan, struct ScanKeyData *key, bool set_params, bool allow_strat,
			   bool allow_sync, bool allow_pagemode)
{
	EsScan scan = (EsScan) sscan;

	if (key != NULL && scan->base.rs_nkeys > 0)
		memcpy(scan->base.rs_key, key, sizeof(ScanKeyData) * scan->base.rs_nkeys);

	if (scan->keep && scan->store != NULL)
	{
		/* the same rows in the same order: from the store, then from the reader that still runs */
		tuplestore_rescan(scan->store);
		scan->at = 0;
		scan->at_end = false;
		return;
	}
	close_reader(scan);
	count_scan(scan);
	scan->done = false;
	scan->block_done = false;
	scan->sample_next = 0;
}

/* A column that will have the role once the table is rewritten. */
static bool
version_to_be(TupleDesc desc)
{
	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);

		if (!att->attisdropped && att->atttypid == INT8OID && strcmp(NameStr(att->attname), "version") == 0)
			return true;
	}
	return false;
}

static EsScanOrder
scan_order(Relation rel)
{
	const EsTableInfo *info;

	if (es_scan_any_order || IsBinaryUpgrade)
		return ES_ORDER_ANY;
	es_wait_store_ready();
	info = es_table_info(rel);
	if (info->roles.position == 0 || es_xact_table(&info->key) != NULL)
		return ES_ORDER_POSITION;
	/* a rewrite numbers rows as they come */
	return info->roles.version == 0 && version_to_be(RelationGetDescr(rel)) ? ES_ORDER_POSITION
																			: ES_ORDER_ANY;
}

/* Opens the next reader: the whole table, or in a parallel scan the next free shard. */
static bool
open_reader(EsScan scan)
{
	MemoryContext old;
	EsReaderSpec  spec;

	if (scan->done)
		return false;
	es_reader_spec_init(&spec);
	if (scan->base.rs_parallel != NULL)
		spec.order = ((EsParallelScanData *) scan->base.rs_parallel)->order;
	else if ((scan->base.rs_flags & SO_TYPE_SEQSCAN) != 0)
		spec.order = scan_order(scan->base.rs_rd);
	old = MemoryContextSwitchTo(scan->context);
	if (scan->base.rs_parallel != NULL)
	{
		EsParallelScanData *shared = (EsParallelScanData *) scan->base.rs_parallel;
		uint32				shard = pg_atomic_fetch_add_u32(&shared->next_shard, 1);

		if (shard < (uint32) es_shared->nshards)
		{
			spec.only_shard = shard;
			scan->reader = es_reader_begin_with(scan->base.rs_rd, scan->base.rs_snapshot, &spec, &scan->dead);
		}
		else
			scan->done = true;
	}
	else
		scan->reader = es_reader_begin(scan->base.rs_rd, scan->base.rs_snapshot, &spec);
	MemoryContextSwitchTo(old);
	return scan->reader != NULL;
}

/* The next row of the reader, or of the next one. */
static bool
read_row(EsScan scan, TupleTableSlot *slot)
{
	for (;;)
	{
		if (scan->reader == NULL && !open_reader(scan))
			return false;
		if (es_reader_next(scan->reader, slot))
			return true;
		close_reader(scan);
		if (scan->base.rs_parallel == NULL)
		{
			scan->done = true;
			return false;
		}
	}
}

/* ---- rows that a SCROLL cursor may come back to ---- */

static void
open_store(EsScan scan)
{
	MemoryContext old = MemoryContextSwitchTo(scan->context);
	TupleDesc	  desc = RelationGetDescr(scan->base.rs_rd);
	TupleDesc	  copy = CreateTemplateTupleDesc(desc->natts + 1);

	for (int i = 1; i <= desc->natts; i++)
		TupleDescCopyEntry(copy, i, desc, i);
	TupleDescInitEntry(copy, desc->natts + 1, "ctid", TIDOID, -1, 0);
	scan->store_desc = copy;
	scan->store = tuplestore_begin_heap(true, false, work_mem);
	scan->store_slot = MakeSingleTupleTableSlot(copy, &TTSOpsMinimalTuple);
	MemoryContextSwitchTo(old);
}

static void
keep_row(EsScan scan, TupleTableSlot *slot)
{
	int	   natts = scan->store_desc->natts;
	Datum *values = palloc(sizeof(Datum) * natts);
	bool  *isnull = palloc(sizeof(bool) * natts);

	memcpy(values, slot->tts_values, sizeof(Datum) * (natts - 1));
	memcpy(isnull, slot->tts_isnull, sizeof(bool) * (natts - 1));
	values[natts - 1] = PointerGetDatum(&slot->tts_tid);
	isnull[natts - 1] = false;
	tuplestore_putvalues(scan->store, scan->store_desc, values, isnull);
	scan->kept++;
	pfree(values);
	pfree(isnull);
}

static bool
kept_row(EsScan scan, bool forward, TupleTableSlot *slot)
{
	int natts = scan->store_desc->natts;

	ExecClearTuple(slot);
	if (!tuplestore_gettupleslot(scan->store, forward, false, scan->store_slot))
		return false;
	slot_getallattrs(scan->store_slot);
	memcpy(slot->tts_values, scan->store_slot->tts_values, sizeof(Datum) * (natts - 1));
	memcpy(slot->tts_isnull, scan->store_slot->tts_isnull, sizeof(bool) * (natts - 1));
	slot->tts_tid = *(ItemPointer) DatumGetPointer(scan->store_slot->tts_values[natts - 1]);
	slot->tts_tableOid = RelationGetRelid(scan->base.rs_rd);
	ExecStoreVirtualTuple(slot);
	return true;
}

/*
 * The store's read pointer stands between rows `at - 1` and `at` (or behind the last row once the
 * scan has come to its end: a tuplestore then steps back onto the last row first).
 */
static bool
scroll_row(EsScan scan, ScanDirection direction, TupleTableSlot *slot)
{
	if (scan->store == NULL)
		open_store(scan);

	if (ScanDirectionIsForward(direction))
	{
		if (scan->at < scan->kept)
		{
			scan->at++;
			return kept_row(scan, true, slot);
		}
		if (!read_row(scan, slot))
		{
			ExecClearTuple(slot);
			scan->at_end = true;
			return false;
		}
		keep_row(scan, slot);
		/* the read pointer follows what was just put in */
		(void) tuplestore_advance(scan->store, true);
		scan->at++;
		return true;
	}

	/*
	 * Going back: the executor wants the row before the one it had last, which
	 * is row at - 2, but for a scan that is behind its end: there it is the last one.
	 */
	if (scan->at_end)
	{
		scan->at_end = false;
		tuplestore_rescan(scan->store);
		if (scan->kept == 0)
		{
			ExecClearTuple(slot);
			return false;
		}
		(void) tuplestore_skiptuples(scan->store, scan->kept - 1, true);
		scan->at = scan->kept;
		return kept_row(scan, true, slot);
	}
	if (scan->at <= 1)
	{
		tuplestore_rescan(scan->store);
		scan->at = 0;
		ExecClearTuple(slot);
		return false;
	}
	/* a tuplestore steps back over the row that it gave last, as the executor wants it */
	scan->at--;
	return kept_row(scan, false, slot);
}

bool
es_scan_getnextslot(TableScanDesc sscan, ScanDirection direction, TupleTableSlot *slot)
{
	EsScan scan = (EsScan) sscan;

	if (scan->keep)
		return scroll_row(scan, direction, slot);
	if (!ScanDirectionIsForward(direction))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE), errmsg("cursor can only scan forward"),
				 errhint("Declare it with SCROLL option to enable backward scan.")));
	return read_row(scan, slot);
}

/* ---- parallel scans ---- */

/* Dead batches of the leader's transaction, counted; starts follow if wanted. */
static uint64
collect_dead(Relation rel, uint32 *counts, EsLsn *starts)
{
	EsTableKey	 key = es_table_info(rel)->key;
	EsDeadStarts dead;
	EsLsn		*memory = es_dead_starts(&key, &dead);
	uint64		 total = 0;

	for (int s = 0; s < es_shared->nshards; s++)
		total += dead.n[s];
	if (counts != NULL)
	{
		memcpy(counts, dead.n, sizeof(dead.n));
		if (total > 0)
			memcpy(starts, dead.starts[0], sizeof(EsLsn) * total);
	}
	if (memory != NULL)
		pfree(memory);
	return total;
}

Size
es_parallelscan_estimate(Relation rel)
{
	EsTableKey key = es_table_info(rel)->key;

	/* workers read what the leader has sent */
	es_xact_send_table(&key);
	return offsetof(EsParallelScanData, starts) + sizeof(EsLsn) * collect_dead(rel, NULL, NULL);
}

Size
es_parallelscan_initialize(Relation rel, ParallelTableScanDesc pscan)
{
	EsParallelScanData *shared = (EsParallelScanData *) pscan;
	uint64				n;

#if PG_VERSION_NUM >= 180000
	shared->base.phs_locator = rel->rd_locator;
#else
	shared->base.phs_relid = RelationGetRelid(rel);
#endif
	shared->base.phs_syncscan = false;
	pg_atomic_init_u32(&shared->next_shard, 0);
	shared->order = scan_order(rel);
	n = collect_dead(rel, shared->ndead, shared->starts);
	return offsetof(EsParallelScanData, starts) + sizeof(EsLsn) * n;
}

void
es_parallelscan_reinitialize(Relation rel, ParallelTableScanDesc pscan)
{
	pg_atomic_write_u32(&((EsParallelScanData *) pscan)->next_shard, 0);
}

/* ---- one row by its TID ---- */

/* An own uncommitted row that no trigger wanted to be kept: looks through all that the snapshot sees. */
static bool
fetch_own_row(Relation rel, ItemPointer tid, Snapshot snapshot, TupleTableSlot *slot)
{
	MemoryContext context =
		AllocSetContextCreate(CurrentMemoryContext, "event_store fetch", ALLOCSET_DEFAULT_SIZES);
	MemoryContext	old = MemoryContextSwitchTo(context);
	TupleTableSlot *row = MakeSingleTupleTableSlot(RelationGetDescr(rel), &TTSOpsVirtual);
	EsReaderSpec	spec;
	EsReader	   *reader;
	bool			found = false;

	es_reader_spec_init(&spec);
	spec.order = ES_ORDER_POSITION_DESC; /* own rows come first */
	reader = es_reader_begin(rel, snapshot, &spec);
	MemoryContextSwitchTo(old);
	while (!found && es_reader_next(reader, row) && es_reader_position(reader) == 0)
		found = ItemPointerEquals(&row->tts_tid, tid);
	if (found)
	{
		ExecCopySlot(slot, row);
		slot->tts_tid = *tid;
		slot->tts_tableOid = RelationGetRelid(rel);
	}
	ExecDropSingleTupleTableSlot(row);
	es_reader_end(reader);
	MemoryContextDelete(context);
	return found;
}

bool
es_fetch_row(Relation rel, ItemPointer tid, Snapshot snapshot, TupleTableSlot *slot)
{
	EsReaderSpec	spec;
	EsReader	   *reader;
	TupleTableSlot *row;
	MemoryContext	old;
	MemoryContext	context;
	bool			own;
	uint64			n = es_tid_decode(tid, &own);
	bool			found;

	ExecClearTuple(slot);
	if (own)
	{
		EsTableKey	 key = es_table_info(rel)->key;
		EsXactTable *t = es_xact_table(&key);

		/* a parallel worker knows nothing of the leader's tables */
		if (t == NULL && !IsParallelWorker())
			return false;
		/* a query is given what its snapshot sees, a trigger what was inserted */
		if (IsMVCCSnapshot(snapshot))
			return fetch_own_row(rel, tid, snapshot, slot);
		return t != NULL && (es_kept_fetch(t, n, slot) || fetch_own_row(rel, tid, snapshot, slot));
	}

	es_reader_spec_init(&spec);
	spec.after = n - 1;
	spec.below = n + 1;
	spec.order = ES_ORDER_POSITION;
	spec.flags = ES_OPEN_NO_OWN;

	context = AllocSetContextCreate(CurrentMemoryContext, "event_store fetch", ALLOCSET_DEFAULT_SIZES);
	old = MemoryContextSwitchTo(context);
	reader = es_reader_begin(rel, snapshot, &spec);
	row = MakeSingleTupleTableSlot(RelationGetDescr(rel), &TTSOpsVirtual);
	MemoryContextSwitchTo(old);

	found = es_reader_next(reader, row);
	if (found)
	{
		ExecCopySlot(slot, row);
		slot->tts_tid = *tid;
		slot->tts_tableOid = RelationGetRelid(rel);
	}
	ExecDropSingleTupleTableSlot(row);
	es_reader_end(reader);
	MemoryContextDelete(context);
	return found;
}

/* ---- ANALYZE: one block, all rows ---- */

bool
es_analyze_next_tuple(TableScanDesc sscan, double *liverows, TupleTableSlot *slot)
{
	EsScan scan = (EsScan) sscan;

	if (!read_row(scan, slot))
		return false;
	*liverows += 1;
	return true;
}

/*
 * Offers the metapage once.  Before 17 ANALYZE brings block numbers, of which there is one;
 * since 17 a stream of buffers.
 */
bool
es_analyze_take_block(TableScanDesc sscan)
{
	EsScan scan = (EsScan) sscan;

	if (scan->block_done)
		return false;
	scan->block_done = true;
	return true;
}

/* ---- TABLESAMPLE: virtual pages of SAMPLE_PAGE_ROWS rows in the scan's order ---- */

bool
es_sample_next_block(TableScanDesc sscan, struct SampleScanState *scanstate)
{
	EsScan		scan = (EsScan) sscan;
	TsmRoutine *tsm = scanstate->tsmroutine;
	BlockNumber nblocks;
	BlockNumber block;

	if (!scan->block_done)
	{
		/* counts first: the methods want to know how many pages there are */
		EsReaderSpec spec;
		EsReader	*reader;

		scan->block_done = true;
		es_reader_spec_init(&spec);
		spec.flags = ES_OPEN_COUNT_ONLY;
		reader = es_reader_begin(scan->base.rs_rd, scan->base.rs_snapshot, &spec);
		scan->sample_rows = 0;
		while (es_reader_skip(reader, NULL))
			scan->sample_rows++;
		es_reader_end(reader);
		scan->sample_next = 0;
		scan->sample_base = 0;
		scan->at = -1; /* virtual page before the first */
	}

	nblocks = (BlockNumber) ((scan->sample_rows + SAMPLE_PAGE_ROWS - 1) / SAMPLE_PAGE_ROWS);
	if (tsm->NextSampleBlock != NULL)
		block = tsm->NextSampleBlock(scanstate, nblocks);
	else
		block = scan->at + 1 < (int64) nblocks ? (BlockNumber) (scan->at + 1) : InvalidBlockNumber;
	if (!BlockNumberIsValid(block) || block >= nblocks)
		return false;

	/* methods may go back (system_rows does): then the scan starts over */
	scan->sample_base = (uint64) block * SAMPLE_PAGE_ROWS;
	if (scan->sample_base < scan->sample_next)
	{
		close_reader(scan);
		scan->done = false;
		scan->sample_next = 0;
	}
	scan->at = block;
	return true;
}

bool
es_sample_next_tuple(TableScanDesc sscan, struct SampleScanState *scanstate, TupleTableSlot *slot)
{
	EsScan		 scan = (EsScan) sscan;
	TsmRoutine	*tsm = scanstate->tsmroutine;
	uint64		 left = scan->sample_rows - scan->sample_base;
	OffsetNumber max = (OffsetNumber) Min(left, SAMPLE_PAGE_ROWS);
	OffsetNumber offset;

	ExecClearTuple(slot);
	offset = tsm->NextSampleTuple(scanstate, (BlockNumber) scan->at, max);
	if (!OffsetNumberIsValid(offset))
		return false;
	while (scan->sample_next < scan->sample_base + offset)
	{
		if (!read_row(scan, slot))
			return false;
		scan->sample_next++;
	}
	return true;
}
