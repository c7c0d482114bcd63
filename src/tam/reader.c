/*-------------------------------------------------------------------------
 *
 * reader.c
 *	  Reading events from the shards (reader.h).
 *
 * OPEN goes to all shards at once with a credit of two answers, and each answer that is
 * used up sends FETCH for one more: every shard works ahead by one answer, and
 * no more than two answers per shard lie in this backend's memory, whatever
 * the table's size.
 *
 * Order by position merges the shards' streams, which each come in position order with
 * the own uncommitted rows last (ascending) or first (descending), by ordinal.
 *
 * Under SERIALIZABLE each shard's last answer says whose rows it has skipped.  A reader that stops before, after
 * max_rows or because its caller has enough, asks for that answer when it ends: what it has given
 * out, "the last event" say, may be so because of what was skipped.
 *
 * Rows written before a column was added have fewer columns than the table:
 * the value is then the attribute's missing value, as in a heap tuple.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/transam.h"
#include "access/xact.h"
#include "miscadmin.h"
#include "storage/predicate.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

#include "ipc/channel.h"
#include "ipc/shmem.h"
#include "tam/reader.h"
#include "tam/xact.h"

#define DEFAULT_BATCH_BYTES (128 * 1024)

/* One shard's stream. */
typedef struct Stream
{
	int					shard;
	uint64				id;		/* request, 0 = closed */
	const EsDataAnswer *answer; /* current one */
	EsBatchView			view;
	uint32				row;  /* next row of the view */
	bool				last; /* current answer is the last one */
} Stream;

struct EsReader
{
	Relation		   rel;
	MemoryContext	   context;
	Snapshot		   snapshot; /* registered if it is ours */
	bool			   own_snapshot;
	EsReaderSpec	   spec;
	bool			   serializable;
	uint64			   given_out;
	int				   nstreams;
	int				   current;	 /* stream of the current row */
	const EsBatchView *row_view; /* of the current row */
	uint32			   row;
	Stream			   streams[ES_MAX_SHARDS];
};

void
es_reader_spec_init(EsReaderSpec *spec)
{
	memset(spec, 0, sizeof(*spec));
	spec->only_shard = -1;
}

static int
compare_fxid(const void *a, const void *b)
{
	EsFxid x = *(const EsFxid *) a;
	EsFxid y = *(const EsFxid *) b;

	return x < y ? -1 : x > y;
}

void
es_snapshot_fill(Snapshot snapshot, EsSnapshot *result)
{
	EsFxid	next = U64FromFullTransactionId(ReadNextFullTransactionId());
	EsFxid *xip = palloc(sizeof(EsFxid) * Max(snapshot->xcnt, 1));

	/* all xids of a snapshot are within 2^31 of the next one */
	for (uint32 i = 0; i < snapshot->xcnt; i++)
		xip[i] = es_widen_xid(next, snapshot->xip[i]);
	qsort(xip, snapshot->xcnt, sizeof(EsFxid), compare_fxid);

	result->xmin = es_widen_xid(next, snapshot->xmin);
	result->xmax = es_widen_xid(next, snapshot->xmax);
	result->own = es_xact_own_fxid();
	result->curcid = snapshot->curcid;
	result->nxip = snapshot->xcnt;
	result->xip = xip;
}

static void
open_stream(EsReader *r, Stream *s, int shard, const EsTableInfo *info, const EsSnapshot *snap,
			const EsDeadStarts *dead)
{
	static const char zeros[8] = {0};
	EsOpenRequest	  req;
	EsPart			  parts[8];
	int				  n = 0;
	uint32			  natts = info->natts;
	Size			  bitmap_len = MAXALIGN((natts + 7) / 8);
	uint8			 *bitmap = palloc0(Max(bitmap_len, 8));

	memset(&req, 0, sizeof(req));
	req.req.type = ES_REQ_OPEN;
	req.req.id = es_request_id();
	req.table = info->key;
	req.flags = r->spec.flags | (r->spec.has_context ? ES_OPEN_HAS_CONTEXT : 0) |
				(r->serializable ? ES_OPEN_REPORT_SKIPPED : 0);
	req.order = r->spec.order;
	req.credit = 2;
	req.xmin = snap->xmin;
	req.xmax = snap->xmax;
	req.own = (r->spec.flags & ES_OPEN_NO_OWN) ? 0 : snap->own;
	req.curcid = snap->curcid;
	req.nxip = snap->nxip;
	req.ndead = dead->n[shard];
	req.natts = natts;
	req.nfilters = r->spec.nfilters;
	req.filters_len = r->spec.filters_len;
	req.after = r->spec.after;
	req.below = r->spec.below;
	req.max_rows = r->spec.max_rows;
	req.batch_bytes = r->spec.batch_bytes ? r->spec.batch_bytes : DEFAULT_BATCH_BYTES;
	req.context_hash = r->spec.context_hash;
	req.context_len = r->spec.has_context ? r->spec.context_len : 0;

	for (uint32 i = 0; i < natts; i++)
	{
		if ((r->spec.flags & ES_OPEN_COUNT_ONLY) == 0 && (r->spec.wanted == NULL || r->spec.wanted[i]))
			bitmap[i / 8] |= 1 << (i % 8);
	}

	parts[n++] = (EsPart){&req, sizeof(req)};
	parts[n++] = (EsPart){snap->xip, sizeof(EsFxid) * snap->nxip};
	parts[n++] = (EsPart){dead->starts[shard], sizeof(EsLsn) * dead->n[shard]};
	parts[n++] = (EsPart){bitmap, bitmap_len};
	parts[n++] = (EsPart){r->spec.filters, r->spec.filters_len};
	parts[n++] = (EsPart){r->spec.context, req.context_len};
	parts[n++] = (EsPart){zeros, MAXALIGN(req.context_len) - req.context_len};

	req.req.len = 0;
	for (int i = 0; i < n; i++)
		req.req.len += parts[i].len;

	memset(s, 0, sizeof(*s));
	s->shard = shard;
	es_channel_connect(shard);
	es_channel_wait_room(shard, req.req.len);
	es_channel_expect(shard, req.req.id);
	s->id = req.req.id;
	es_channel_send(shard, &req.req, parts, n, true);
	pfree(bitmap);
}

EsReader *
es_reader_begin_with(Relation rel, Snapshot snapshot, const EsReaderSpec *spec, const EsDeadStarts *dead)
{
	const EsTableInfo *info;
	EsTableInfo		  *copy;
	EsReader		  *r = palloc0(sizeof(EsReader));
	EsSnapshot		   snap;

	r->rel = rel;
	r->context = CurrentMemoryContext;
	r->spec = *spec;
	if (IsBinaryUpgrade)
		return r;

	if (snapshot == NULL || !IsMVCCSnapshot(snapshot))
	{
		/* SnapshotAny, SnapshotSelf and the like: everything that is committed, and own rows */
		snapshot = GetLatestSnapshot();
		r->own_snapshot = true;
	}
	r->snapshot = RegisterSnapshot(snapshot);

	PredicateLockRelation(rel, r->snapshot);
	r->serializable = IsolationIsSerializable();

	info = es_table_info(rel);
	copy = palloc(offsetof(EsTableInfo, columns));
	memcpy(copy, info, offsetof(EsTableInfo, columns));

	es_snapshot_fill(r->snapshot, &snap);
	if (r->own_snapshot)
		snap.curcid = GetCurrentCommandId(false) + 1;

	if (spec->has_context)
	{
		open_stream(r, &r->streams[0], es_shard_of_hash(spec->context_hash), copy, &snap, dead);
		r->nstreams = 1;
	}
	else
	{
		for (int s = 0; s < es_shared->nshards; s++)
		{
			if (spec->only_shard >= 0 && spec->only_shard != s)
				continue;
			open_stream(r, &r->streams[r->nstreams], s, copy, &snap, dead);
			r->nstreams++;
		}
	}
	pfree(unconstify(EsFxid *, snap.xip));
	pfree(copy);
	return r;
}

EsReader *
es_reader_begin(Relation rel, Snapshot snapshot, const EsReaderSpec *spec)
{
	EsDeadStarts dead;
	EsLsn		*memory;
	EsTableKey	 key;
	EsReader	*r;

	if (IsBinaryUpgrade)
		return es_reader_begin_with(rel, snapshot, spec, NULL);
	es_wait_store_ready();
	key = es_table_info(rel)->key;
	if (es_xact != NULL)
		es_xact_send_table(&key);
	memory = es_dead_starts(&key, &dead);
	r = es_reader_begin_with(rel, snapshot, spec, &dead);
	if (memory != NULL)
		pfree(memory);
	return r;
}

/* The shard says which transactions' rows it left out: each is a read-write conflict. */
static void
report_skipped(EsReader *r, const EsDataAnswer *answer)
{
	const EsFxid *xids = (const EsFxid *) ((const char *) (answer + 1) + answer->batch_len);

	for (uint64 i = 0; i < answer->nskipped; i++)
	{
		TransactionId xid = XidFromFullTransactionId(FullTransactionIdFromU64(xids[i]));

		if (CheckForSerializableConflictOutNeeded(r->rel, r->snapshot))
			CheckForSerializableConflictOut(r->rel, xid, r->snapshot);
	}
}

static void
send_fetch(Stream *s, uint16 flags)
{
	EsRequest req = {.type = ES_REQ_FETCH, .flags = flags, .id = s->id};
	EsPart	  part = {&req, sizeof(req)};

	es_channel_wait_room(s->shard, sizeof(req));
	es_channel_send(s->shard, &req, &part, 1, true);
}

static void
take_answer(Stream *s)
{
	s->answer = (const EsDataAnswer *) es_channel_answer(s->shard, s->id);
	s->last = (s->answer->answer.flags & ES_ANSWER_LAST) != 0;
	s->row = 0;
}

static void
end_stream(EsReader *r, Stream *s)
{
	report_skipped(r, s->answer);
	es_channel_forget(s->shard, s->id);
	s->id = 0;
	s->answer = NULL;
}

/* Ends the streams that have not come to their last answers, all shards at once. */
static void
stop_streams(EsReader *r)
{
	for (int i = 0; i < r->nstreams; i++)
	{
		if (r->streams[i].id != 0 && !r->streams[i].last)
			send_fetch(&r->streams[i], ES_FETCH_STOP);
	}
	for (int i = 0; i < r->nstreams; i++)
	{
		Stream *s = &r->streams[i];

		if (s->id == 0)
			continue;
		while (!s->last)
			take_answer(s);
		end_stream(r, s);
	}
}

/* Makes sure that the stream stands on a row; false at its end. */
static bool
stream_ready(EsReader *r, Stream *s)
{
	while (s->answer == NULL || s->row >= s->answer->nrows)
	{
		if (s->id == 0)
			return false;
		if (s->last)
		{
			end_stream(r, s);
			return false;
		}
		if (s->answer != NULL)
			send_fetch(s, 0);
		take_answer(s);
		if (s->answer->batch_len > 0)
			es_batch_open_trusted(s->answer + 1, &s->view);
		CHECK_FOR_INTERRUPTS();
	}
	return true;
}

static bool
stream_own(const Stream *s)
{
	return (s->view.header->flags & ES_BATCH_OWN_ROWS) != 0;
}

/* Does a's row come before b's? */
static bool
stream_before(const EsReader *r, const Stream *a, const Stream *b)
{
	uint64 pa = a->view.positions[a->row] | (stream_own(a) ? UINT64CONST(1) << 63 : 0);
	uint64 pb = b->view.positions[b->row] | (stream_own(b) ? UINT64CONST(1) << 63 : 0);

	return r->spec.order == ES_ORDER_POSITION_DESC ? pa > pb : pa < pb;
}

static bool
advance(EsReader *r)
{
	Stream *best = NULL;

	if (r->spec.max_rows > 0 && r->given_out >= r->spec.max_rows)
		return false;

	if (r->spec.order == ES_ORDER_ANY)
	{
		while (r->current < r->nstreams && !stream_ready(r, &r->streams[r->current]))
			r->current++;
		if (r->current < r->nstreams)
			best = &r->streams[r->current];
	}
	else
	{
		for (int i = 0; i < r->nstreams; i++)
		{
			Stream *s = &r->streams[i];

			if (!stream_ready(r, s))
				continue;
			if (best == NULL || stream_before(r, s, best))
				best = s;
		}
	}
	if (best == NULL)
		return false;
	r->row_view = &best->view;
	r->row = best->row++;
	r->given_out++;
	return true;
}

bool
es_reader_skip(EsReader *r, EsPosition *position)
{
	if (!advance(r))
		return false;
	if (position != NULL)
		*position = es_reader_position(r);
	return true;
}

EsPosition
es_reader_position(const EsReader *r)
{
	if (r->row_view->header->flags & ES_BATCH_OWN_ROWS)
		return 0;
	return r->row_view->positions[r->row];
}

int64
es_reader_version(const EsReader *r)
{
	return r->row_view->versions ? (int64) r->row_view->versions[r->row] : 0;
}

bool
es_reader_next(EsReader *r, TupleTableSlot *slot)
{
	/* the slot's: ALTER TABLE reads with the columns as they were, when the catalog has the new ones */
	TupleDesc		   desc = slot->tts_tupleDescriptor;
	const EsBatchView *v;
	uint32			   row;

	ExecClearTuple(slot);
	if (!advance(r))
		return false;
	v = r->row_view;
	row = r->row;

	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);
		const void		 *value;

		if (i >= v->header->ncols)
		{
			/* written before the column was added */
			if (att->atthasmissing && !att->attisdropped)
				slot->tts_values[i] = getmissingattr(desc, i + 1, &slot->tts_isnull[i]);
			else
			{
				slot->tts_values[i] = (Datum) 0;
				slot->tts_isnull[i] = true;
			}
			continue;
		}
		if (es_batch_is_null(v, i, row) || att->attisdropped)
		{
			slot->tts_values[i] = (Datum) 0;
			slot->tts_isnull[i] = true;
			continue;
		}
		value = es_batch_value(v, i, row);
		slot->tts_isnull[i] = false;
		slot->tts_values[i] = fetch_att(value, att->attbyval, att->attlen);
	}

	slot->tts_tableOid = RelationGetRelid(r->rel);
	es_tid_encode(&slot->tts_tid, v->positions[row], (v->header->flags & ES_BATCH_OWN_ROWS) != 0);
	ExecStoreVirtualTuple(slot);
	return true;
}

uint64
es_reader_given_out(const EsReader *r)
{
	return r->given_out;
}

void
es_reader_end(EsReader *r)
{
	if (r->serializable && CheckForSerializableConflictOutNeeded(r->rel, r->snapshot))
		stop_streams(r);
	for (int i = 0; i < r->nstreams; i++)
	{
		Stream	 *s = &r->streams[i];
		EsRequest req = {.type = ES_REQ_CLOSE, .id = s->id};
		EsPart	  part = {&req, sizeof(req)};

		if (s->id == 0)
			continue;
		es_channel_forget(s->shard, s->id);
		(void) es_channel_hint(s->shard, &req, &part, 1, false);
		s->id = 0;
	}
	UnregisterSnapshot(r->snapshot);
	pfree(r);
}
