/*-------------------------------------------------------------------------
 *
 * channel.c
 *	  Channels from the outside: echoes of any size, and how fast they are.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "portability/instr_time.h"
#include "storage/lwlock.h"
#include "utils/builtins.h"
#include "utils/memutils.h"

#include "event_store_test.h"
#include "ipc/channel_internal.h"

PG_FUNCTION_INFO_V1(est_echo);
PG_FUNCTION_INFO_V1(est_echo_window);
PG_FUNCTION_INFO_V1(est_send_only);
PG_FUNCTION_INFO_V1(est_send_without_waiting);
PG_FUNCTION_INFO_V1(est_hint);
PG_FUNCTION_INFO_V1(est_reconnect);
PG_FUNCTION_INFO_V1(est_channel);
PG_FUNCTION_INFO_V1(est_pause_shard);
PG_FUNCTION_INFO_V1(est_clog_lock_is_free);
PG_FUNCTION_INFO_V1(est_shard_pid);
PG_FUNCTION_INFO_V1(est_shard_counter);

/* Bytes whose neighbours differ, so that a piece in the wrong place shows. */
static char *
make_body(Size len)
{
	char  *body = MemoryContextAllocHuge(CurrentMemoryContext, Max(len, 1));
	uint32 x = 2463534242u;

	for (Size i = 0; i < len; i++)
	{
		x ^= x << 13;
		x ^= x >> 17;
		x ^= x << 5;
		body[i] = (char) x;
	}
	return body;
}

static void
check_echo(const EsAnswer *answer, const char *body, Size len)
{
	if (answer->len != MAXALIGN(sizeof(EsAnswer) + len))
		elog(ERROR, "echo of %zu bytes has length " UINT64_FORMAT, len, answer->len);
	if (memcmp(answer + 1, body, len) != 0)
		elog(ERROR, "echo of %zu bytes has other bytes", len);
}

static uint64
send_echo(int shard, const char *body, Size len)
{
	EsRequest req = {.type = ES_REQ_ECHO, .id = es_request_id()};
	EsPart	  parts[2] = {{&req, sizeof(req)}, {body, len}};

	es_channel_expect(shard, req.id);
	es_channel_wait_room(shard, sizeof(req) + len);
	es_channel_send(shard, &req, parts, 2, true);
	return req.id;
}

static double
seconds_since(instr_time start)
{
	instr_time now;

	INSTR_TIME_SET_CURRENT(now);
	INSTR_TIME_SUBTRACT(now, start);
	return INSTR_TIME_GET_DOUBLE(now);
}

Datum
est_echo(PG_FUNCTION_ARGS)
{
	int		   shard = est_shard(PG_GETARG_INT32(0));
	Size	   len = PG_GETARG_INT64(1);
	int		   times = PG_GETARG_INT32(2);
	char	  *body = make_body(len);
	instr_time start;

	es_channel_connect(shard);
	INSTR_TIME_SET_CURRENT(start);
	for (int i = 0; i < times; i++)
	{
		uint64 id = send_echo(shard, body, len);

		check_echo(es_channel_answer(shard, id), body, len);
		es_channel_forget(shard, id);
	}
	PG_RETURN_FLOAT8(seconds_since(start) * 1e6 / Max(times, 1));
}

Datum
est_echo_window(PG_FUNCTION_ARGS)
{
	int		   shard = est_shard(PG_GETARG_INT32(0));
	Size	   len = PG_GETARG_INT64(1);
	int		   times = PG_GETARG_INT32(2);
	int		   window = Max(PG_GETARG_INT32(3), 1);
	uint64	  *ids = palloc(sizeof(uint64) * window);
	char	  *body = make_body(len);
	instr_time start;
	int		   received = 0;

	es_channel_connect(shard);
	INSTR_TIME_SET_CURRENT(start);
	for (int sent = 0; received < times;)
	{
		uint64 id;

		if (sent < times && sent - received < window)
		{
			ids[sent % window] = send_echo(shard, body, len);
			sent++;
			continue;
		}
		id = ids[received % window];
		check_echo(es_channel_answer(shard, id), body, len);
		es_channel_forget(shard, id);
		received++;
	}
	PG_RETURN_FLOAT8(times / seconds_since(start));
}

/* FETCHes of ids that the shard has never heard of: it does nothing. */
static void
send_many(int shard, const char *body, Size len, int times)
{
	for (int i = 0; i < times; i++)
	{
		EsRequest req = {.type = ES_REQ_FETCH, .id = es_request_id()};
		EsPart	  parts[2] = {{&req, sizeof(req)}, {body, len}};

		es_channel_wait_room(shard, sizeof(req) + len);
		es_channel_send(shard, &req, parts, 2, true);
	}
}

Datum
est_send_only(PG_FUNCTION_ARGS)
{
	int		   shard = est_shard(PG_GETARG_INT32(0));
	Size	   len = PG_GETARG_INT64(1);
	int		   times = PG_GETARG_INT32(2);
	char	  *body = make_body(len);
	instr_time start;
	uint64	   id;

	es_channel_connect(shard);
	INSTR_TIME_SET_CURRENT(start);
	send_many(shard, body, len, times);
	/* until all of it was taken */
	id = send_echo(shard, body, 0);
	(void) es_channel_answer(shard, id);
	es_channel_forget(shard, id);
	PG_RETURN_FLOAT8(times / seconds_since(start));
}

Datum
est_send_without_waiting(PG_FUNCTION_ARGS)
{
	int	 shard = est_shard(PG_GETARG_INT32(0));
	Size len = PG_GETARG_INT64(1);

	send_many(shard, make_body(len), len, PG_GETARG_INT32(2));
	PG_RETURN_VOID();
}

Datum
est_hint(PG_FUNCTION_ARGS)
{
	EsRequest req = {.type = ES_REQ_FETCH, .id = es_request_id()};

	PG_RETURN_BOOL(es_channel_hint(est_shard(PG_GETARG_INT32(0)), &req, NULL, 0, true));
}

Datum
est_reconnect(PG_FUNCTION_ARGS)
{
	int		   shard = est_shard(PG_GETARG_INT32(0));
	EsChannel *ch = es_channel_get(shard);

	ch->broken = true;
	es_channel_connect(shard);
	PG_RETURN_INT64(ch->generation);
}

Datum
est_channel(PG_FUNCTION_ARGS)
{
	EsChannel *ch = es_channel_get(est_shard(PG_GETARG_INT32(0)));
	TupleDesc  desc;
	Datum	   values[10];
	bool	   nulls[10] = {false};

	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	values[0] = Int32GetDatum(es_my_slot_number());
	values[1] = Int64GetDatum(ch->generation);
	values[2] = Int64GetDatum(ch->shard_generation);
	values[3] = BoolGetDatum(es_channel_usable(ch));
	values[4] = BoolGetDatum(ch->half_sent);
	values[5] = Int64GetDatum(ch->sent_messages);
	values[6] = Int64GetDatum(ch->sent_bytes);
	values[7] = Int64GetDatum(pg_atomic_read_u64(&ch->shared->taken_bytes));
	values[8] = Int64GetDatum(pg_atomic_read_u32(&ch->shared->closed));
	values[9] = Int32GetDatum(pg_atomic_read_u32(&ch->shared->answers_parked));
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls)));
}

Datum
est_pause_shard(PG_FUNCTION_ARGS)
{
	int shard = est_shard(PG_GETARG_INT32(0));

	pg_atomic_write_u32(&es_shared->shards[shard].paused, PG_GETARG_BOOL(1));
	es_wake_shard(shard);
	PG_RETURN_VOID();
}

Datum
est_clog_lock_is_free(PG_FUNCTION_ARGS)
{
	bool is_free = LWLockConditionalAcquire(XactTruncationLock, LW_EXCLUSIVE);

	if (is_free)
		LWLockRelease(XactTruncationLock);
	PG_RETURN_BOOL(is_free);
}

Datum
est_shard_pid(PG_FUNCTION_ARGS)
{
	EsShardShared *s = &es_shared->shards[est_shard(PG_GETARG_INT32(0))];
	int			   pid;

	SpinLockAcquire(&s->mutex);
	pid = s->pid;
	SpinLockRelease(&s->mutex);
	PG_RETURN_INT32(pid);
}

Datum
est_shard_counter(PG_FUNCTION_ARGS)
{
	EsShardCounters *counters = &es_shared->shards[est_shard(PG_GETARG_INT32(0))].counters;
	char			*name = text_to_cstring(PG_GETARG_TEXT_PP(1));
	const struct
	{
		const char		 *name;
		pg_atomic_uint64 *counter;
	} known[] = {{"messages", &counters->messages},
				 {"last_drain", &counters->last_drain},
				 {"queue_high_water", &counters->queue_high_water},
				 {"queue_full_waits", &counters->queue_full_waits},
				 {"queue_full_wait_us", &counters->queue_full_wait_us},
				 {"queue_timeouts", &counters->queue_timeouts}};

	for (int i = 0; i < (int) lengthof(known); i++)
	{
		if (strcmp(known[i].name, name) == 0)
			PG_RETURN_INT64((int64) pg_atomic_read_u64(known[i].counter));
	}
	ereport(ERROR, (errcode(ERRCODE_UNDEFINED_OBJECT), errmsg("there is no counter \"%s\"", name)));
}
