/*
 * es_limits.c
 *		Two table access methods for measuring what bounds event_store from above.
 *
 * es_limit_nothing takes rows and forgets them: what is left is the client, the protocol, parsing and the
 * transaction. es_limit_log writes each row to PostgreSQL's WAL as one transactional logical message, so that
 * commits wait for the disk: what is left to pay is everything that makes the rows readable again.
 *
 * Everything but INSERT and COPY is heap's code, which finds an empty table.
 */
#include "postgres.h"

#include "access/heapam.h"
#include "access/tableam.h"
#include "fmgr.h"
#include "replication/message.h"

PG_MODULE_MAGIC;

PG_FUNCTION_INFO_V1(es_limit_nothing_handler);
PG_FUNCTION_INFO_V1(es_limit_log_handler);

static void
log_row(TupleTableSlot *slot)
{
	bool	  should_free;
	HeapTuple tuple = ExecFetchSlotHeapTuple(slot, false, &should_free);

#if PG_VERSION_NUM >= 170000
	LogLogicalMessage("es_limit", (char *) tuple->t_data, tuple->t_len, true, false);
#else
	LogLogicalMessage("es_limit", (char *) tuple->t_data, tuple->t_len, true);
#endif
	if (should_free)
		heap_freetuple(tuple);
}

/* The executor wants every row to have a place. */
static void
place_row(Relation rel, TupleTableSlot *slot)
{
	slot->tts_tableOid = RelationGetRelid(rel);
	ItemPointerSet(&slot->tts_tid, 0, FirstOffsetNumber);
}

static void
nothing_insert(Relation rel, TupleTableSlot *slot, CommandId cid, int options,
			   struct BulkInsertStateData *bistate)
{
	place_row(rel, slot);
}

static void
nothing_multi_insert(Relation rel, TupleTableSlot **slots, int nslots, CommandId cid, int options,
					 struct BulkInsertStateData *bistate)
{
	for (int i = 0; i < nslots; i++)
		place_row(rel, slots[i]);
}

static void
log_insert(Relation rel, TupleTableSlot *slot, CommandId cid, int options,
		   struct BulkInsertStateData *bistate)
{
	log_row(slot);
	place_row(rel, slot);
}

static void
log_multi_insert(Relation rel, TupleTableSlot **slots, int nslots, CommandId cid, int options,
				 struct BulkInsertStateData *bistate)
{
	for (int i = 0; i < nslots; i++)
	{
		log_row(slots[i]);
		place_row(rel, slots[i]);
	}
}

static bool
no_toast_table(Relation rel)
{
	return false;
}

/* Heap's routine with insert and multi_insert replaced; `routine` lives as long as the process. */
static Datum
heap_but(TableAmRoutine *routine, typeof(nothing_insert) *insert, typeof(nothing_multi_insert) *multi_insert)
{
	*routine = *GetHeapamTableAmRoutine();
	routine->tuple_insert = insert;
	routine->multi_insert = multi_insert;
	routine->relation_needs_toast_table = no_toast_table;
	return PointerGetDatum(routine);
}

Datum
es_limit_nothing_handler(PG_FUNCTION_ARGS)
{
	static TableAmRoutine routine;

	return heap_but(&routine, nothing_insert, nothing_multi_insert);
}

Datum
es_limit_log_handler(PG_FUNCTION_ARGS)
{
	static TableAmRoutine routine;

	return heap_but(&routine, log_insert, log_multi_insert);
}
