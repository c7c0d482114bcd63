/*-------------------------------------------------------------------------
 *
 * position.c
 *	  The one counter of positions and its log-ahead reservation.
 *
 * A position is taken with one atomic addition; nothing serialises writers.  What
 * makes positions unique for ever is H (reserved_below): all that were ever handed
 * out lie below it, and a RESERVE with H is durable in PostgreSQL's WAL before the first
 * position above the old H is handed out.  After a crash the counter goes on at
 * H.  H moves in steps of 2^20, the next one at half of a step, so that no writer
 * waits for it but one in half a million, and that one would flush at its commit anyway.
 *
 * Whoever takes positions has published a lower bound before (horizon.c).
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xlog.h"
#include "miscadmin.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "guc.h"
#include "ipc/fault.h"
#include "ipc/logmsg.h"
#include "ipc/position.h"

/*
 * There are only 2^47 positions, for all databases.  Who is no superuser may not skip more than
 * JUMP_LIMIT of them at once, which is enough to restore what another cluster has written, and none
 * at all beyond CEILING: however often tables' owners skip, half of all positions stay for events.
 */
#define GIVEN_JUMP_LIMIT (UINT64CONST(1) << 32)
#define GIVEN_CEILING	 (UINT64CONST(1) << 46)

static void
raise_to(pg_atomic_uint64 *field, uint64 value)
{
	es_counter_max(field, value);
}

/*
 * The counter is not known until the first shard has recovered.  Waits for it as for
 * a shard that opens.
 */
static uint64
known_counter(void)
{
	static uint32 wait_event = 0;
	uint64		  counter = pg_atomic_read_u64(&es_shared->position_counter);
	TimestampTz	  deadline;

	if (counter != 0)
		return counter;

	es_wait_store_ready();
	deadline = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), (int64) es_guc_startup_timeout);
	ConditionVariablePrepareToSleep(&es_shared->store_changed);
	while ((counter = pg_atomic_read_u64(&es_shared->position_counter)) == 0)
	{
		TimestampTz now = GetCurrentTimestamp();

		if (now >= deadline)
		{
			ConditionVariableCancelSleep();
			ereport(ERROR, (errcode(ERRCODE_CANNOT_CONNECT_NOW), errmsg("event_store is recovering"),
							errdetail("No shard has recovered yet, so the next position is not known."),
							errhint("Try again later, or raise event_store.startup_timeout.")));
		}
		(void) ConditionVariableTimedSleep(&es_shared->store_changed,
										   Min(TimestampDifferenceMilliseconds(now, deadline), 1000),
										   es_wait_event(&wait_event, "EventStoreStart"));
	}
	ConditionVariableCancelSleep();
	return counter;
}

/* Makes H durable above `end`, a step ahead.  reserve_lock is held. */
static void
reserve_step(EsPosition end)
{
	EsReserve reserve;
	EsPart	  part = {&reserve, sizeof(reserve)};
	EsLsn	  lsn_start;
	EsLsn	  lsn_end;

	reserve.below = Max(end, pg_atomic_read_u64(&es_shared->reserved_below)) + ES_POSITION_STEP;

	/*
	 * A control block that moves restart_lsn past the RESERVE must hold this H, so
	 * it is announced before the record exists.
	 */
	raise_to(&es_shared->reserve_announced, reserve.below);
	pg_memory_barrier();
	ES_FAULT_ERROR("reserve-before-log");
	es_log_message(ES_MESSAGE_RESERVE, 0, ES_SHARD_NONE, &part, 1, &lsn_start, &lsn_end);
	ES_FAULT_ERROR("reserve-before-flush");
	XLogFlush(lsn_end);
	ES_FAULT_ERROR("reserve-after-flush");
	raise_to(&es_shared->reserved_below, reserve.below);
}

/* Positions below `end` were taken: none is used before it lies below H. */
static void
ensure_reserved(EsPosition end)
{
	EsPosition reserved = pg_atomic_read_u64(&es_shared->reserved_below);

	if (end + ES_POSITION_STEP / 2 <= reserved)
		return;
	if (end <= reserved)
	{
		/* not urgent: one of those who come by does it, the others go on */
		if (!LWLockConditionalAcquire(es_shared->reserve_lock, LW_EXCLUSIVE))
			return;
	}
	else
		LWLockAcquire(es_shared->reserve_lock, LW_EXCLUSIVE);

	if (end + ES_POSITION_STEP / 2 > pg_atomic_read_u64(&es_shared->reserved_below))
		reserve_step(end);
	LWLockRelease(es_shared->reserve_lock);
}

/* n positions from the counter.  Asked before and after, so that it cannot run away. */
static EsPosition
take(uint64 n)
{
	EsPosition base = pg_atomic_read_u64(&es_shared->position_counter);

	Assert(n > 0);
	if (n <= ES_MAX_POSITION && base <= ES_MAX_POSITION - n + 1)
	{
		base = pg_atomic_fetch_add_u64(&es_shared->position_counter, n);
		if (base <= ES_MAX_POSITION - n + 1)
			return base;
	}
	ereport(ERROR,
			(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED), errmsg("the positions of this cluster are used up"),
			 errdetail("The next position is " UINT64_FORMAT ", the last possible one " UINT64_FORMAT ".",
					   base, ES_MAX_POSITION)));
}

EsPosition
es_positions_reserve(uint64 n, const uint64 *tables, uint32 ntables, EsFxid fxid)
{
	EsPosition base;

	(void) known_counter();
	es_horizon_publish(pg_atomic_read_u64(&es_shared->position_counter), tables, ntables, fxid);
	ES_FAULT_ERROR("reserve-after-publish");

	/* a reader who finds the counter beyond our base finds the slot, too: full barrier */
	pg_memory_barrier();
	base = take(n);
	es_horizon_note_base(base);
	ES_FAULT_ERROR("reserve-after-take");
	ensure_reserved(base + n);
	return base;
}

void
es_positions_given(EsPosition lowest, EsPosition highest, const uint64 *tables, uint32 ntables, EsFxid fxid)
{
	uint64 counter = known_counter();

	Assert(lowest > 0 && lowest <= highest);
	if (highest > ES_MAX_POSITION)
		ereport(ERROR, (errcode(ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE),
						errmsg("position " UINT64_FORMAT " is out of range", highest),
						errdetail("The last possible position is " UINT64_FORMAT ".", ES_MAX_POSITION)));
	if (highest > counter && highest > GIVEN_CEILING && !superuser())
		ereport(
			ERROR,
			(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
			 errmsg_plural("permission denied to skip " UINT64_FORMAT " position",
						   "permission denied to skip " UINT64_FORMAT " positions",
						   (unsigned long) (highest - counter), highest - counter),
			 errdetail("Position " UINT64_FORMAT " was given, and the next one is " UINT64_FORMAT
					   ".  Of the cluster's " UINT64_FORMAT " positions the upper half is not skipped.",
					   highest, counter, ES_MAX_POSITION),
			 errhint(
				 "Leave \"position\" out: the store fills it at commit.  Only a superuser may give a position above " UINT64_FORMAT
				 ".",
				 GIVEN_CEILING)));
	if (highest > counter && highest - counter > GIVEN_JUMP_LIMIT && !superuser())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied to skip " UINT64_FORMAT " positions", highest - counter),
				 errdetail("Position " UINT64_FORMAT " was given, and the next one is " UINT64_FORMAT ".",
						   highest, counter),
				 errhint("Only a superuser may give a position that is more than " UINT64_FORMAT
						 " above the next one.",
						 GIVEN_JUMP_LIMIT)));

	es_horizon_publish(lowest, tables, ntables, fxid);
	pg_memory_barrier();
	raise_to(&es_shared->position_counter, highest + 1);
	es_horizon_note_base(lowest);
	ensure_reserved(highest + 1);
}

uint64
es_positions_take_id(void)
{
	EsPosition id;
	bool	   joined;

	(void) known_counter();
	/* a shard that stops for a detach notes the counter, so it waits for who is about to move it */
	joined = es_join_store();
	ES_FAULT_ERROR("reserve-before-id");
	id = take(1);
	ensure_reserved(id + 1);
	if (joined)
		es_leave_store();
	return id;
}

void
es_positions_recovered(EsPosition next, EsPosition reserved_below)
{
	LWLockAcquire(es_shared->reserve_lock, LW_EXCLUSIVE);
	raise_to(&es_shared->reserve_announced, reserved_below);
	raise_to(&es_shared->reserved_below, reserved_below);
	/* last: from here on positions are handed out */
	pg_memory_barrier();
	raise_to(&es_shared->position_counter, Max(next, 1));
	LWLockRelease(es_shared->reserve_lock);
	ConditionVariableBroadcast(&es_shared->store_changed);
}
