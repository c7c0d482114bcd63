/*-------------------------------------------------------------------------
 *
 * append.c
 *	  event_store.append(): one event, with its version and its idempotency
 *	  settled before it returns.
 *
 * The row goes through INSERT (SPI), so defaults, triggers, constraints, privileges and row
 * security mean what they mean.  Before that the context's lock is taken and its
 * shard asked for the committed version and the event id: under the lock nobody else can
 * commit to the context, so what is returned is final if the transaction commits.
 *
 * A version says how many events lie before it.  Under row security it is told to whom replay() would show the
 * event, and to who has named it: an expected version is right or it is an error.
 *
 * From its 17th context on, a transaction takes no more locks at the statement
 * (PROTOCOL.md 3): version is then NULL and COMMIT makes the check.  So it is when INSERT has put more events
 * with ids into the context than append() looks at.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/table.h"
#include "access/transam.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/uuid.h"

#include "compat.h"
#include "core/arith.h"
#include "ipc/channel.h"
#include "ipc/shmem.h"
#include "sqlfn/append.h"
#include "sqlfn/args.h"
#include "tam/reader.h"
#include "tam/refusal.h"
#include "tam/tam.h"
#include "tam/xact.h"

PG_FUNCTION_INFO_V1(es_append);

typedef struct AppendCall
{
	Relation		 rel;
	EsRoles			 roles;
	char			*context_text;
	EsContextArg	 context;
	bool			 has_event_id;
	pg_uuid_t		*event_id;
	ItemPointerData	 there; /* the event: stored now, or before */
	FunctionCallInfo fcinfo;
} AppendCall;

/* Events of the own transaction in a context that append() looks at to tell a version. */
#define MAX_SETTLED 1000

/*
 * Runs the INSERT with the promise, in which it notes what became of it; returns whether a row was stored (a
 * trigger may say no).
 */
static bool
insert_row(AppendCall *a, EsPromise *promise)
{
	FunctionCallInfo fcinfo = a->fcinfo;
	TupleDesc		 desc = RelationGetDescr(a->rel);
	int				 payload = es_column_number(a->rel, "payload");
	int				 metadata = es_column_number(a->rel, "metadata");
	Oid				 types[6];
	Datum			 args[6];
	int				 columns = 0;
	int				 n = 0;
	volatile int	 result = 0;
	bool			 stored;
	EsPromise		 outer; /* of an append() whose trigger calls this one */
	EsInsertPlan *volatile plan = NULL;

	types[n] = TupleDescAttr(desc, a->roles.context - 1)->atttypid;
	args[n++] = a->context.value;
	if (!PG_ARGISNULL(1))
	{
		Form_pg_attribute att;

		if (a->roles.event_type == 0)
			ereport(ERROR, (errcode(ERRCODE_UNDEFINED_COLUMN),
							errmsg("table \"%s\" has no column \"event_type\" of type text or an enum",
								   RelationGetRelationName(a->rel))));
		att = TupleDescAttr(desc, a->roles.event_type - 1);
		columns |= ES_INSERT_EVENT_TYPE;
		types[n] = att->atttypid;
		if (att->atttypid == TEXTOID)
			args[n++] = PG_GETARG_DATUM(1);
		else
		{
			Oid input;
			Oid ioparam;

			getTypeInputInfo(att->atttypid, &input, &ioparam);
			args[n++] =
				OidInputFunctionCall(input, TextDatumGetCString(PG_GETARG_DATUM(1)), ioparam, att->atttypmod);
		}
	}
	if (!PG_ARGISNULL(2))
	{
		if (payload == 0 || TupleDescAttr(desc, payload - 1)->atttypid != JSONBOID)
			ereport(ERROR, (errcode(ERRCODE_UNDEFINED_COLUMN),
							errmsg("table \"%s\" has no column \"payload\" of type jsonb",
								   RelationGetRelationName(a->rel)),
							errhint("INSERT writes to tables of any shape.")));
		columns |= ES_INSERT_PAYLOAD;
		types[n] = JSONBOID;
		args[n++] = PG_GETARG_DATUM(2);
	}
	if (a->has_event_id)
	{
		columns |= ES_INSERT_EVENT_ID;
		types[n] = UUIDOID;
		args[n++] = UUIDPGetDatum(a->event_id);
	}
	if (!PG_ARGISNULL(5))
	{
		if (metadata == 0 || TupleDescAttr(desc, metadata - 1)->atttypid != JSONBOID)
			ereport(ERROR, (errcode(ERRCODE_UNDEFINED_COLUMN),
							errmsg("table \"%s\" has no column \"metadata\" of type jsonb",
								   RelationGetRelationName(a->rel))));
		columns |= ES_INSERT_METADATA;
		types[n] = JSONBOID;
		args[n++] = PG_GETARG_DATUM(5);
	}
	if (promise->version > 0)
	{
		columns |= ES_INSERT_VERSION;
		types[n] = INT8OID;
		args[n++] = Int64GetDatum(promise->version);
	}

	promise->relid = RelationGetRelid(a->rel);
	promise->hash = a->context.hash;
	promise->event_id = a->has_event_id ? a->event_id->data : NULL;
	promise->depth = DatumGetInt32(DirectFunctionCall1(pg_trigger_depth, (Datum) 0));
	outer = es_promise;
	SPI_connect();
	PG_TRY();
	{
		es_promise = *promise;
		result = SPI_execute_plan(es_insert_plan(a->rel, a->roles.context, columns, types, &plan), args, NULL,
								  false, 0);
	}
	PG_FINALLY();
	{
		*promise = es_promise;
		es_promise = outer;
		if (plan != NULL)
			es_insert_plan_release(plan);
	}
	PG_END_TRY();
	/* rewritten: a rule does something else instead */
	if (result != SPI_OK_INSERT && result != SPI_OK_REWRITTEN)
		elog(ERROR, "unexpected result of INSERT: %s", SPI_result_code_string(result));
	stored = result == SPI_OK_INSERT && SPI_processed > 0;
	SPI_finish();
	return stored;
}

/*
 * What would this row's content hash be?  Only defaults, triggers and generated columns know, so
 * the row is inserted in a subtransaction, which is rolled back.  promise->inserted is false if triggers have given
 * it another context or event id.  Returns whether it would be stored.
 */
static bool
probe_row(AppendCall *a, EsPromise *promise)
{
	MemoryContext old = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	volatile bool stored = false;

	memset(promise, 0, sizeof(*promise));
	promise->active = true;
	promise->probe = true;
	BeginInternalSubTransaction(NULL);
	PG_TRY();
	{
		stored = insert_row(a, promise);
		RollbackAndReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(old);
		CurrentResourceOwner = owner;
	}
	PG_CATCH();
	{
		ErrorData *error;

		MemoryContextSwitchTo(old);
		error = CopyErrorData();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(old);
		CurrentResourceOwner = owner;
		ReThrowError(error);
	}
	PG_END_TRY();
	return stored;
}

pg_attribute_noreturn() static void version_conflict(const AppendCall *a, int64 expected, int64 actual)
{
	ereport(ERROR, (errcode(ERRCODE_UNIQUE_VIOLATION),
					errmsg("unexpected version of context \"%s\"", es_context_for_message(a->context_text)),
					!es_may_tell_versions(RelationGetRelid(a->rel)) ? 0
					: expected == -1
						? errdetail("Expected an existing context, but it has no event.")
						: errdetail("Expected version " INT64_FORMAT ", actual version " INT64_FORMAT ".",
									expected, actual),
					errhint("Replay the context and decide again."), errtable(a->rel)));
	pg_unreachable();
}

pg_attribute_noreturn() static void content_conflict(const AppendCall *a)
{
	ereport(ERROR, (errcode(ERRCODE_UNIQUE_VIOLATION),
					errmsg("event id %s already exists in context \"%s\" with other content",
						   DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(a->event_id))),
						   es_context_for_message(a->context_text)),
					errtable(a->rel)));
	pg_unreachable();
}

static void
check_snapshot_sees(const AppendCall *a, EsFxid fxid)
{
	Snapshot snapshot;
	EsFxid	 next;

	if (!IsolationUsesXactSnapshot() || fxid == 0)
		return;
	snapshot = GetTransactionSnapshot();
	next = U64FromFullTransactionId(ReadNextFullTransactionId());
	/* an old one, cut to 32 bits, may look as if it were yet to come */
	if (fxid >= es_widen_xid(next, snapshot->xmin) &&
		XidInMVCCSnapshot(XidFromFullTransactionId(FullTransactionIdFromU64(fxid)), snapshot))
		ereport(ERROR, (errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
						errmsg("could not serialize access due to a concurrent append to context \"%s\"",
							   es_context_for_message(a->context_text)),
						errhint("The transaction might succeed if retried.")));
}

/* Reads the context, its events of the own transaction first, up to the last command. */
static EsReader *
read_own_events(AppendCall *a, EsReaderSpec *spec, Snapshot *snapshot)
{
	spec->order = ES_ORDER_POSITION_DESC;
	spec->has_context = true;
	spec->context = a->context.bytes;
	spec->context_len = a->context.len;
	spec->context_hash = a->context.hash;

	CommandCounterIncrement();
	*snapshot = RegisterSnapshot(GetLatestSnapshot());
	(*snapshot)->curcid = GetCurrentCommandId(false);
	return es_reader_begin(a->rel, *snapshot, spec);
}

/* Has the own transaction an event in this context? */
static bool
has_own_event(AppendCall *a)
{
	EsReaderSpec spec;
	EsReader	*reader;
	EsPosition	 position;
	Snapshot	 snapshot;
	bool		 found;

	es_reader_spec_init(&spec);
	spec.max_rows = 1;
	reader = read_own_events(a, &spec, &snapshot);
	found = es_reader_skip(reader, &position) && position == 0;
	es_reader_end(reader);
	UnregisterSnapshot(snapshot);
	return found;
}

/*
 * The newest but `skip` of the own transaction's events with this id in this context: its version (0 = NULL), and
 * the hash of its content.
 */
static bool
find_own_event(AppendCall *a, int skip, int64 *version, uint64 hash[2])
{
	StringInfoData	filters;
	EsReaderSpec	spec;
	EsReader	   *reader;
	TupleTableSlot *slot;
	const void	   *value = a->event_id;
	size_t			len = UUID_LEN;
	Snapshot		snapshot;
	bool			found = false;

	initStringInfo(&filters);
	es_filter_bytes(&filters, a->roles.event_id - 1, &value, &len, 1);
	es_reader_spec_init(&spec);
	spec.nfilters = 1;
	spec.filters = filters.data;
	spec.filters_len = filters.len;
	reader = read_own_events(a, &spec, &snapshot);
	slot = table_slot_create(a->rel, NULL);
	do
		found = es_reader_next(reader, slot) && es_reader_position(reader) == 0;
	while (found && skip-- > 0);
	if (found)
	{
		a->there = slot->tts_tid;
		*version = 0;
		if (a->roles.version != 0 && !slot->tts_isnull[a->roles.version - 1])
			*version = DatumGetInt64(slot->tts_values[a->roles.version - 1]);
		es_content_hash(a->rel, slot, hash);
	}
	ExecDropSingleTupleTableSlot(slot);
	es_reader_end(reader);
	UnregisterSnapshot(snapshot);
	return found;
}

static int
compare_ids(const void *x, const void *y)
{
	return memcmp(x, y, sizeof(pg_uuid_t));
}

static EsHeadAnswer *
ask_head(const AppendCall *a)
{
	static const char zeros[8] = {0};
	EsHeadRequest	  req = {.req = {.type = ES_REQ_HEAD},
							 .table = es_table_info(a->rel)->key,
							 .hash = a->context.hash,
							 .context_len = a->context.len,
							 .has_event_id = a->has_event_id};
	EsPart			  parts[3] = {{&req, sizeof(req)},
								  {a->context.bytes, a->context.len},
								  {zeros, MAXALIGN(a->context.len) - a->context.len}};

	if (a->has_event_id)
		memcpy(req.event_id, a->event_id->data, UUID_LEN);
	return (EsHeadAnswer *) es_channel_call(a->context.shard, &req.req, parts, 3);
}

/* The version of the event, or 0 if the caller may not know it. */
static int64
version_to_tell(const AppendCall *a, int64 version)
{
	FunctionCallInfo fcinfo = a->fcinfo;
	char			*where;

	if (version <= 0 || es_may_tell_versions(RelationGetRelid(a->rel)))
		return version;
	if (!PG_ARGISNULL(3) && PG_GETARG_INT64(3) == version - 1)
		return version;
	where =
		psprintf("ctid OPERATOR(pg_catalog.=) '(%u,%u)'::pg_catalog.tid",
				 ItemPointerGetBlockNumberNoCheck(&a->there), ItemPointerGetOffsetNumberNoCheck(&a->there));
	return es_sees_any(a->rel, where, false) ? version : 0;
}

/*
 * Events of the own transaction that INSERT has put into the context with ids: if an id is there already, the row
 * will not be taken, and versions do not count it.  false: they are too many to find that out.
 */
static bool
settle_own_rows(AppendCall *a, EsXactTable *t, EsOwnContext *own)
{
	int				att = a->roles.event_id - 1;
	AppendCall		one = *a;
	EsReaderSpec	spec;
	EsReader	   *reader;
	TupleTableSlot *slot;
	Snapshot		snapshot;
	pg_uuid_t	   *ids;
	bool		   *wanted;
	uint32			unsure = es_own_unsure(own);
	uint32			nrows = 0;
	uint32			nids = 0;
	uint32			taken;

	if (unsure == 0)
		return true;
	ids = palloc(sizeof(pg_uuid_t) * MAX_SETTLED);
	wanted = palloc0(sizeof(bool) * RelationGetNumberOfAttributes(a->rel));
	wanted[att] = true;
	es_reader_spec_init(&spec);
	spec.wanted = wanted;
	spec.max_rows = MAX_SETTLED;
	reader = read_own_events(a, &spec, &snapshot);
	slot = table_slot_create(a->rel, NULL);
	while (es_reader_next(reader, slot) && es_reader_position(reader) == 0)
	{
		nrows++;
		if (!slot->tts_isnull[att])
			ids[nids++] = *DatumGetUUIDP(slot->tts_values[att]);
	}
	ExecDropSingleTupleTableSlot(slot);
	es_reader_end(reader);
	UnregisterSnapshot(snapshot);
	if (nrows == MAX_SETTLED)
		return false;

	/* an id is taken once, unless it was committed before */
	taken = nrows - nids;
	qsort(ids, nids, sizeof(pg_uuid_t), compare_ids);
	one.has_event_id = true;
	for (uint32 i = 0; i < nids; i++)
	{
		EsHeadAnswer *head;

		if (i > 0 && compare_ids(&ids[i - 1], &ids[i]) == 0)
			continue;
		one.event_id = &ids[i];
		head = ask_head(&one);
		taken += !head->event_found;
		pfree(head);
	}
	es_own_settle(t, own, unsure, es_own_rows(own) - taken);
	return true;
}

/*
 * The inserted row has an id that was not looked for before it: from a trigger or a default, or while triggers
 * inserted more into the context.  false: the event is there already, with *version; the row will not be taken.
 */
static bool
is_new_event(AppendCall *a, EsXactTable *t, EsPromise *promise, int64 *version)
{
	EsOwnContext *own = es_xact_context(t, a->context.hash);
	bool		  last = own != NULL && own->changes == promise->changes;
	AppendCall	  row = *a;
	EsHeadAnswer *head;
	int64		  found_version = 0;
	uint64		  hash[2];
	bool		  found;

	row.has_event_id = true;
	row.event_id = (pg_uuid_t *) promise->row_id;
	head = ask_head(&row);
	found = head->event_found;
	if (found)
	{
		check_snapshot_sees(&row, head->event_fxid);
		es_tid_encode(&row.there, head->event_position, false);
		found_version = head->event_version;
		memcpy(hash, head->event_content, sizeof(hash));
	}
	else if (own == NULL || es_own_rows(own) > 1)
		found = find_own_event(&row, 1, &found_version, hash);

	if (last)
		es_own_settle(t, own, 1, found);
	else
		t->unchecked = true; /* also triggers behind it have inserted */
	if (!found)
		return true;
	if (!last && !head->event_found)
	{
		/* which of the transaction's rows is the first with this id is found out at COMMIT */
		*version = 0;
		return true;
	}
	if (memcmp(hash, promise->content, sizeof(hash)) != 0)
		content_conflict(&row);
	a->there = row.there;
	*version = found_version;
	pg_atomic_fetch_add_u64(&es_shared->shards[a->context.shard].counters.duplicates, 1);
	return false;
}

static Datum
result_row(FunctionCallInfo fcinfo, int64 version, const char *outcome)
{
	TupleDesc desc;
	Datum	  values[2];
	bool	  nulls[2] = {version <= 0, false};

	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	values[0] = Int64GetDatum(version);
	values[1] = CStringGetTextDatum(outcome);
	return HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls));
}

Datum
es_append(PG_FUNCTION_ARGS)
{
	AppendCall	  a;
	EsXactTable	 *t;
	EsOwnContext *own;
	EsHeadAnswer *head = NULL;
	bool		  has_expected = !PG_ARGISNULL(3);
	int64		  expected = has_expected ? PG_GETARG_INT64(3) : 0;
	int64		  actual = 0;
	int64		  version;
	EsPromise	  promise = {0};
	bool		  locked;
	bool		  stored;
	const char	 *outcome;

	if (PG_ARGISNULL(0))
		ereport(ERROR, (errcode(ERRCODE_NOT_NULL_VIOLATION), errmsg("context_id must not be NULL")));
	if (has_expected && expected < -1)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("expected_version must be -1, 0 or a version"),
						errdetail("0 = no event yet, -1 = some event, NULL = any.")));

	memset(&a, 0, sizeof(a));
	a.fcinfo = fcinfo;
	a.rel = es_open_store(fcinfo, 6, RowExclusiveLock, ACL_INSERT);
	a.roles = es_table_info(a.rel)->roles;
	a.context_text = text_to_cstring(PG_GETARG_TEXT_PP(0));
	es_context_arg(a.rel, a.context_text, &a.context);
	a.has_event_id = !PG_ARGISNULL(4);
	if (a.has_event_id)
		a.event_id = PG_GETARG_UUID_P(4);

	if (has_expected && a.roles.version == 0)
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_COLUMN),
						errmsg("table \"%s\" has no column \"version\" of type bigint",
							   RelationGetRelationName(a.rel)),
						errhint("Expected versions need one.")));
	if (a.has_event_id && a.roles.event_id == 0)
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_COLUMN),
						errmsg("table \"%s\" has no column \"event_id\" of type uuid",
							   RelationGetRelationName(a.rel))));

	if (a.roles.version == 0 && a.roles.event_id == 0)
	{
		stored = insert_row(&a, &promise);
		table_close(a.rel, NoLock);
		PG_RETURN_DATUM(result_row(fcinfo, 0, stored ? "appended" : "not_stored"));
	}

	t = es_xact_table_get(a.rel);
	locked = es_lock_context(t, a.context.hash);
	own = locked ? es_xact_context(t, a.context.hash) : NULL;
	locked = own != NULL;

	if (locked || a.has_event_id || expected == -1)
		head = ask_head(&a);

	if (a.has_event_id)
	{
		uint64 found_hash[2];
		int64  found_version = 0;
		bool   found = false;

		if (head->event_found)
		{
			check_snapshot_sees(&a, head->event_fxid);
			found = true;
			es_tid_encode(&a.there, head->event_position, false);
			found_version = head->event_version;
			memcpy(found_hash, head->event_content, sizeof(found_hash));
		}
		else if (own == NULL || es_own_rows(own) > 0)
			found = find_own_event(&a, 0, &found_version, found_hash);
		if (found)
		{
			EsPromise probe;

			if (!probe_row(&a, &probe))
			{
				table_close(a.rel, NoLock);
				PG_RETURN_DATUM(result_row(fcinfo, 0, "not_stored"));
			}
			/* else triggers make another event of it */
			if (probe.inserted)
			{
				if (memcmp(found_hash, probe.content, sizeof(found_hash)) != 0)
					content_conflict(&a);
				pg_atomic_fetch_add_u64(&es_shared->shards[a.context.shard].counters.duplicates, 1);
				found_version = version_to_tell(&a, found_version);
				table_close(a.rel, NoLock);
				PG_RETURN_DATUM(result_row(fcinfo, found_version, "already_there"));
			}
		}
	}

	if (locked)
	{
		check_snapshot_sees(&a, head->fxid);
		/* triggers may have needed its place */
		own = es_xact_context(t, a.context.hash);
		locked = own != NULL;
	}
	if (locked && a.roles.version != 0 && !settle_own_rows(&a, t, own))
		locked = false;
	if (locked)
	{
		actual = head->version + es_own_rows(own);
		if (has_expected && (expected == -1 ? actual == 0 : actual != expected))
			version_conflict(&a, expected, actual);
		if (a.roles.version != 0)
			promise.version = actual + 1;
	}
	else if (has_expected)
	{
		/* no context has so many, and its successor is not a number */
		if (expected == PG_INT64_MAX)
			version_conflict(&a, expected, ask_head(&a)->version);
		if (expected >= 0)
			promise.version = expected + 1; /* PREPARE checks it at COMMIT */
		else if (head->version == 0 && !has_own_event(&a))
			version_conflict(&a, expected, 0);
	}

	if (locked)
	{
		promise.active = true;
		promise.head = head->version;
		promise.own_rows = es_own_rows(own);
	}
	stored = insert_row(&a, &promise);
	/* a trigger may have given the event another context, whose version is known at COMMIT */
	version = stored && promise.inserted ? promise.version : 0;
	es_tid_encode(&a.there, promise.ordinal, true);
	outcome = stored ? "appended" : "not_stored";
	if (stored && promise.look_again && !is_new_event(&a, t, &promise, &version))
		outcome = "already_there";

	version = version_to_tell(&a, version);
	table_close(a.rel, NoLock);
	PG_RETURN_DATUM(result_row(fcinfo, version, outcome));
}
