/*-------------------------------------------------------------------------
 *
 * event_store_test.c
 *	  Fault points, for tests.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/builtins.h"

#include "ipc/fault.h"
#include "event_store_test.h"

PG_MODULE_MAGIC;

PG_FUNCTION_INFO_V1(est_fault_points_compiled);
PG_FUNCTION_INFO_V1(est_inject_fault);
PG_FUNCTION_INFO_V1(est_disarm_faults);
PG_FUNCTION_INFO_V1(est_fault_points);
PG_FUNCTION_INFO_V1(est_fault_point_info);
PG_FUNCTION_INFO_V1(est_fault_hits);

void
est_check(void)
{
	if (!superuser())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE), errmsg("event_store_test is for superusers only")));
	es_require_preload();
}

int
est_shard(int32 shard)
{
	est_check();
	if (shard < 0 || shard >= es_shared->nshards)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("there is no shard %d", shard)));
	return shard;
}

Datum
est_fault_points_compiled(PG_FUNCTION_ARGS)
{
#ifdef ES_FAULT_POINTS
	PG_RETURN_BOOL(true);
#else
	PG_RETURN_BOOL(false);
#endif
}

#ifdef ES_FAULT_POINTS

Datum
est_inject_fault(PG_FUNCTION_ARGS)
{
	est_check();
	es_fault_arm(text_to_cstring(PG_GETARG_TEXT_PP(0)), text_to_cstring(PG_GETARG_TEXT_PP(1)),
				 PG_GETARG_INT32(2));
	PG_RETURN_VOID();
}

Datum
est_disarm_faults(PG_FUNCTION_ARGS)
{
	est_check();
	es_fault_disarm_all();
	PG_RETURN_VOID();
}

Datum
est_fault_points(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;

	est_check();
	InitMaterializedSRF(fcinfo, MAT_SRF_USE_EXPECTED_DESC);
	for (const EsFaultPoint *p = es_fault_points; p->name != NULL; p++)
	{
		Datum value = CStringGetTextDatum(p->name);
		bool  null = false;

		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, &value, &null);
	}
	PG_RETURN_NULL();
}

Datum
est_fault_point_info(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;

	est_check();
	InitMaterializedSRF(fcinfo, 0);
	for (const EsFaultPoint *p = es_fault_points; p->name != NULL; p++)
	{
		Datum values[4];
		bool  nulls[4] = {false};

		values[0] = CStringGetTextDatum(p->name);
		values[1] = BoolGetDatum((p->flags & ES_FAULT_MAY_THROW) != 0);
		values[2] = BoolGetDatum((p->flags & ES_FAULT_MAY_FAIL) != 0);
		values[3] = CStringGetTextDatum(p->process);
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	}
	PG_RETURN_NULL();
}

Datum
est_fault_hits(PG_FUNCTION_ARGS)
{
	est_check();
	PG_RETURN_INT64((int64) es_fault_hits(text_to_cstring(PG_GETARG_TEXT_PP(0))));
}

#else

static Datum
no_fault_points(void)
{
	ereport(ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED), errmsg("event_store was built without fault points"),
			 errhint("Build with \"make FAULTS=1\".")));
	return (Datum) 0;
}

Datum
est_inject_fault(PG_FUNCTION_ARGS)
{
	return no_fault_points();
}

Datum
est_disarm_faults(PG_FUNCTION_ARGS)
{
	return no_fault_points();
}

Datum
est_fault_points(PG_FUNCTION_ARGS)
{
	return no_fault_points();
}

Datum
est_fault_point_info(PG_FUNCTION_ARGS)
{
	return no_fault_points();
}

Datum
est_fault_hits(PG_FUNCTION_ARGS)
{
	return no_fault_points();
}

#endif
