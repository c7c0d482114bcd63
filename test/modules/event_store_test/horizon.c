/*-------------------------------------------------------------------------
 *
 * horizon.c
 *	  Positions and horizon without events: a transaction takes positions, and its
 *	  end does what the end of one with events does.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "funcapi.h"
#include "utils/array.h"
#include "utils/pg_lsn.h"
#include "utils/snapmgr.h"

#include "event_store_test.h"
#include "ipc/logmsg.h"
#include "ipc/position.h"

PG_FUNCTION_INFO_V1(est_reserve_positions);
PG_FUNCTION_INFO_V1(est_given_positions);
PG_FUNCTION_INFO_V1(est_horizon);
PG_FUNCTION_INFO_V1(est_newest_horizon);
PG_FUNCTION_INFO_V1(est_position_state);
PG_FUNCTION_INFO_V1(est_log_message);

static bool took_positions = false;

static void
end_of_transaction(XactEvent event, void *arg)
{
	if (!took_positions)
		return;
	if (event == XACT_EVENT_COMMIT)
		es_horizon_committed();
	else if (event == XACT_EVENT_ABORT)
		es_horizon_aborted();
	else
		return;
	took_positions = false;
}

static EsFxid
begin(ArrayType *array, Datum **tables, int *ntables)
{
	static bool registered = false;

	est_check();
	es_wait_store_ready();
	if (!registered)
	{
		RegisterXactCallback(end_of_transaction, NULL);
		registered = true;
	}
	took_positions = true;
	deconstruct_array(array, INT8OID, 8, FLOAT8PASSBYVAL, TYPALIGN_DOUBLE, tables, NULL, ntables);
	return U64FromFullTransactionId(GetTopFullTransactionId());
}

Datum
est_reserve_positions(PG_FUNCTION_ARGS)
{
	Datum *tables;
	int	   ntables;
	EsFxid fxid = begin(PG_GETARG_ARRAYTYPE_P(1), &tables, &ntables);

	PG_RETURN_INT64((int64) es_positions_reserve(PG_GETARG_INT64(0), (uint64 *) tables, ntables, fxid));
}

Datum
est_given_positions(PG_FUNCTION_ARGS)
{
	Datum *tables;
	int	   ntables;
	EsFxid fxid = begin(PG_GETARG_ARRAYTYPE_P(2), &tables, &ntables);

	es_positions_given(PG_GETARG_INT64(0), PG_GETARG_INT64(1), (uint64 *) tables, ntables, fxid);
	PG_RETURN_VOID();
}

Datum
est_horizon(PG_FUNCTION_ARGS)
{
	est_check();
	es_wait_store_ready();
	PG_RETURN_INT64((int64) es_horizon_of(GetActiveSnapshot(), PG_GETARG_INT64(0)));
}

Datum
est_newest_horizon(PG_FUNCTION_ARGS)
{
	est_check();
	PG_RETURN_INT64((int64) es_horizon_newest(PG_GETARG_INT64(0)));
}

Datum
est_position_state(PG_FUNCTION_ARGS)
{
	TupleDesc desc;
	Datum	  values[5];
	bool	  nulls[5] = {false};

	est_check();
	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	values[0] = Int64GetDatum(pg_atomic_read_u64(&es_shared->position_counter));
	values[1] = Int64GetDatum(pg_atomic_read_u64(&es_shared->reserved_below));
	values[2] = Int64GetDatum(pg_atomic_read_u64(&es_shared->reserve_announced));
	LWLockAcquire(es_shared->ring_lock, LW_SHARED);
	values[3] = Int64GetDatum(Min(es_shared->ring_next, ES_RING_ENTRIES));
	values[4] = Int64GetDatum(es_shared->ring_overflow.base);
	LWLockRelease(es_shared->ring_lock);
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls)));
}

Datum
est_log_message(PG_FUNCTION_ARGS)
{
	Size	  len = PG_GETARG_INT64(0);
	TupleDesc desc;
	Datum	  values[2];
	bool	  nulls[2] = {false};
	EsPart	  part;
	EsLsn	  start;
	EsLsn	  end;

	est_check();
	es_wait_store_ready();
	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	part.data = MemoryContextAllocHuge(CurrentMemoryContext, len);
	part.len = len;
	for (Size i = 0; i < len; i++)
		((char *) part.data)[i] = (char) (random() >> 8); /* does not compress */
	es_log_message(ES_MESSAGE_BATCH, U64FromFullTransactionId(GetTopFullTransactionId()), 0, &part, 1, &start,
				   &end);
	values[0] = LSNGetDatum(start);
	values[1] = LSNGetDatum(end);
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls)));
}
