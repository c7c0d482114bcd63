/*-------------------------------------------------------------------------
 *
 * stat.c
 *	  STAT, VERIFY, UNDECIDED: what a shard tells about itself.
 *
 * STAT adds up what MemTables, staging and the live set say of each storage; only the contexts,
 * zones and raw bytes of segments stand in their footers, so a segment that was never
 * read is opened for it (and one that cannot be opened is listed without them).
 *
 * VERIFY reads every page of every live segment, one segment per slice, through a reader of
 * its own that keeps no page, and reports each damage.  It goes on after damage; other
 * requests are served between segments.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/hsearch.h"
#include "utils/memutils.h"

#include "shard/engine.h"
#include "shard/shard.h"
#include "shard/task.h"

/* ---- STAT ---- */

typedef struct Stats
{
	MemoryContext context;
	HTAB		 *tables; /* EsTableStat by key */
	bool		  one;	  /* only this table: */
	EsTableKey	  key;
} Stats;

static EsTableStat *
stat_of(Stats *s, const EsTableKey *key)
{
	EsTableStat *t;
	bool		 found;

	if (s->one && !es_table_key_equal(key, &s->key))
		return NULL;
	t = hash_search(s->tables, key, HASH_ENTER, &found);
	if (!found)
	{
		memset(t, 0, sizeof(*t));
		t->table = *key;
	}
	return t;
}

static void
note_positions(EsTableStat *t, EsPosition min, EsPosition max)
{
	if (max == 0)
		return;
	if (t->min_position == 0 || min < t->min_position)
		t->min_position = min;
	t->max_position = Max(t->max_position, max);
}

static void
note_batch(Stats *s, const EsMemBatch *b)
{
	const EsBatchHeader *h = b->view.header;
	EsTableStat			*t;

	/* carried over: counted where it is now */
	if (b->moved_to != 0 || h->nrows == 0)
		return;
	t = stat_of(s, &h->table);
	if (t == NULL)
		return;
	if (b->txn->verdict == ES_VERDICT_ABORTED)
		return;
	t->memtable_rows += h->nrows;
	if (b->finish_flags & ES_FINISH_GIVEN_POSITIONS)
	{
		for (uint32 row = 0; row < h->nrows; row++)
		{
			EsPosition p = es_membatch_position(b, row);

			note_positions(t, p, p);
		}
	}
	else
		note_positions(t, es_membatch_position(b, 0), es_membatch_position(b, h->nrows - 1));
}

static void
note_memtables(Stats *s)
{
	dlist_iter iter;
	dlist_iter at;

	for (EsMemTable *mt = es_memtable_oldest; mt != NULL; mt = mt->next)
	{
		uint32		state = 0;
		EsMemStore *store;

		while ((store = es_memtable_each(mt, &state)) != NULL)
		{
			EsTableStat *t = stat_of(s, &store->key);

			if (t == NULL)
				continue;
			t->relid = store->relid;
			t->memtable_bytes += store->nbytes;
			for (uint32 i = 0; i < store->nbatches; i++)
				note_batch(s, store->batches[i]);
		}
	}
	dlist_foreach(iter, &es_txn_undecided)
	{
		EsTxn *txn = dlist_container(EsTxn, node, iter.cur);

		dlist_foreach(at, &txn->staged)
		{
			const EsMemBatch *b = dlist_container(EsMemBatch, node, at.cur);
			EsTableStat		 *t = stat_of(s, &b->view.header->table);

			if (t == NULL)
				continue;
			t->relid = b->view.header->relid;
			t->staged_rows += b->view.header->nrows;
		}
	}
}

static void
note_segments(Stats *s)
{
	uint32		  state = 0;
	EsSegmentRef *ref;

	while ((ref = es_segments_each(&state)) != NULL)
	{
		const EsManifestEntry *e = &ref->entry;
		EsTableStat			  *t = stat_of(s, &e->segment.table);
		EsSegment			  *seg;
		EsError				   err;

		if (t == NULL)
			continue;
		if (e->pending)
		{
			t->pending_rows += ref->finished ? e->nlive : e->segment.nrows;
			t->segment_bytes += e->segment.file_len;
			if (ref->finished && e->nlive > 0)
				note_positions(t, e->segment.min_position, e->segment.max_position);
			continue;
		}
		t->segments++;
		t->segment_rows += e->adopted ? e->nlive : e->segment.nrows;
		t->segment_bytes += e->segment.file_len;
		if (!e->adopted || e->nlive > 0)
			note_positions(t, e->segment.min_position, e->segment.max_position);
		seg = es_segment_handle(ref, &err);
		if (seg != NULL)
		{
			t->raw_bytes += es_segment_info(seg)->summary.raw_bytes;
			if (t->relid == 0)
				t->relid = es_segment_info(seg)->relid;
		}
	}
}

static void
send_array(EsConn *conn, const EsRequest *req, const void *array, Size len)
{
	EsAnswer answer = {0};
	EsPart	 parts[2];

	answer.type = ES_REQ_STAT;
	answer.flags = ES_ANSWER_LAST;
	answer.id = req->id;
	parts[0] = (EsPart){&answer, sizeof(answer)};
	parts[1] = (EsPart){array, len};
	es_conn_send(conn, &answer, parts, len > 0 ? 2 : 1);
}

static void
send_tables(EsConn *conn, const EsStatRequest *req, Stats *s)
{
	long			n = hash_get_num_entries(s->tables);
	HASH_SEQ_STATUS seq;
	EsTableStat	   *t;
	EsTableStat	   *stats = palloc(Max(n, 1) * sizeof(EsTableStat));
	EsTableKey	   *keys = palloc(Max(n, 1) * sizeof(EsTableKey));
	int				i = 0;

	hash_seq_init(&seq, s->tables);
	while ((t = hash_seq_search(&seq)) != NULL)
	{
		stats[i] = *t;
		keys[i++] = t->table;
	}
	if (req->kind == ES_STAT_STORAGES)
		send_array(conn, &req->req, keys, i * sizeof(EsTableKey));
	else if (req->kind == ES_STAT_TABLE && i == 0)
	{
		memset(stats, 0, sizeof(*stats));
		stats->table = req->table;
		send_array(conn, &req->req, stats, sizeof(EsTableStat));
	}
	else
		send_array(conn, &req->req, stats, i * sizeof(EsTableStat));
}

static void
send_segments(EsConn *conn, const EsStatRequest *req)
{
	uint32		   state = 0;
	uint32		   n = 0;
	uint32		   allocated = 64;
	EsSegmentStat *stats = palloc(allocated * sizeof(EsSegmentStat));
	EsSegmentRef  *ref;

	while ((ref = es_segments_each(&state)) != NULL)
	{
		const EsManifestEntry *e = &ref->entry;
		EsSegmentStat		  *t;
		EsSegment			  *seg;
		EsError				   err;

		if (req->table.storage_id != 0 && !es_table_key_equal(&req->table, &e->segment.table))
			continue;
		if (n == allocated)
		{
			allocated *= 2;
			stats = repalloc_huge(stats, allocated * sizeof(EsSegmentStat));
		}
		t = &stats[n++];
		memset(t, 0, sizeof(*t));
		t->table = e->segment.table;
		t->flags = (e->pending ? ES_SEGMENT_PENDING : 0) | (e->adopted ? 0x100 : 0);
		t->id = e->segment.id;
		t->nrows = e->adopted ? e->nlive : e->segment.nrows;
		t->bytes = e->segment.file_len;
		t->min_position = e->segment.min_position;
		t->max_position = e->segment.max_position;
		seg = es_segment_handle(ref, &err);
		if (seg != NULL)
		{
			const EsSegmentInfo *info = es_segment_info(seg);

			t->relid = info->relid;
			t->raw_bytes = info->summary.raw_bytes;
			t->contexts = info->summary.ncontexts;
			t->zones = info->nzones;
		}
	}
	send_array(conn, &req->req, stats, n * sizeof(EsSegmentStat));
}

void
es_handle_stat(EsConn *conn, const EsStatRequest *req)
{
	MemoryContext context =
		AllocSetContextCreate(CurrentMemoryContext, "event_store statistics", ALLOCSET_DEFAULT_SIZES);
	MemoryContext old = MemoryContextSwitchTo(context);

	if (req->kind == ES_STAT_SEGMENTS)
		send_segments(conn, req);
	else if (req->kind >= ES_STAT_TABLE && req->kind <= ES_STAT_STORAGES)
	{
		Stats	s = {.context = context};
		HASHCTL ctl = {0};

		ctl.keysize = sizeof(EsTableKey);
		ctl.entrysize = sizeof(EsTableStat);
		ctl.hcxt = context;
		s.tables = hash_create("event_store statistics", 64, &ctl, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
		s.one = req->kind == ES_STAT_TABLE;
		s.key = req->table;
		s.key.reserved = 0;
		note_memtables(&s);
		note_segments(&s);
		send_tables(conn, req, &s);
	}
	else
		es_conn_send_error(conn, ES_REQ_STAT, req->req.id, ERRCODE_PROTOCOL_VIOLATION,
						   "unknown kind of statistics", "", "");
	MemoryContextSwitchTo(old);
	MemoryContextDelete(context);
}

/* ---- VERIFY ---- */

typedef struct VerifyTask
{
	EsTask		  task;		/* first */
	uint64		  last_id;	/* segments up to this one are done, or at work */
	EsSegmentRef *ref;		/* the one at work; NULL = none */
	EsVerifier	 *verifier; /* of it */
	const char	 *path;
} VerifyTask;

static void
report(void *arg, const EsError *err)
{
	VerifyTask	  *v = arg;
	EsVerifyAnswer answer = {0};
	EsPart		   parts[3];

	answer.answer.type = ES_REQ_VERIFY;
	answer.answer.id = v->task.id;
	answer.offset = err->offset;
	answer.expected_crc = err->expected_crc;
	answer.found_crc = err->found_crc;
	parts[0] = (EsPart){&answer, sizeof(answer)};
	parts[1] = (EsPart){v->path, strlen(v->path) + 1};
	parts[2] = (EsPart){err->what, strlen(err->what) + 1};
	es_conn_send(v->task.conn, &answer.answer, parts, 3);
	if (err->status != ES_ERR_IO && err->status != ES_ERR_NOMEM)
		ES_COUNT(corruptions, 1);
}

static EsSegmentRef *
next_segment(const VerifyTask *v)
{
	uint32		  state = 0;
	EsSegmentRef *ref;

	while ((ref = es_segments_each(&state)) != NULL)
		if (ref->entry.segment.id > v->last_id)
			return ref;
	return NULL;
}

static void
release_verify(EsTask *task)
{
	VerifyTask *v = (VerifyTask *) task;

	(void) es_verifier_free(v->verifier);
	v->verifier = NULL;
	if (v->ref != NULL)
		es_segment_unref(v->ref);
	v->ref = NULL;
}

/* A step of the segment at work; false: it is done. */
static bool
verify_step(VerifyTask *v)
{
	EsError	   err = {0};
	EsSegment *seg = es_segment_handle(v->ref, &err);

	if (seg == NULL)
	{
		report(v, &err);
		return false;
	}
	return es_verifier_step(v->verifier, seg);
}

static EsTaskState
run_verify(EsTask *task, int64 deadline)
{
	VerifyTask *v = (VerifyTask *) task;
	EsAnswer	answer = {0};

	for (;;)
	{
		if (v->ref == NULL)
		{
			v->ref = next_segment(v);
			if (v->ref == NULL)
				break;
			es_segment_ref(v->ref);
			v->last_id = v->ref->entry.segment.id;
			v->path = es_segment_path(v->ref);
			v->verifier = es_verifier_create(report, v);
			if (v->verifier == NULL)
				ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
		}
		if (!verify_step(v))
			release_verify(task);
		if (es_task_clock() >= deadline || es_conn_parked(task->conn) > 0)
			return ES_TASK_MORE;
	}
	answer.type = ES_REQ_VERIFY;
	answer.flags = ES_ANSWER_LAST;
	answer.id = task->id;
	es_conn_send(task->conn, &answer, NULL, 0);
	return ES_TASK_DONE;
}

void
es_handle_verify(EsConn *conn, const EsRequest *req)
{
	VerifyTask *v = (VerifyTask *) es_task_create(conn, req, sizeof(VerifyTask), "event_store verify");

	v->task.run = run_verify;
	v->task.release = release_verify;
	es_task_start(&v->task);
}

/* ---- UNDECIDED ---- */

void
es_handle_undecided(EsConn *conn, const EsRequest *req)
{
	EsUndecidedAnswer answer = {0};
	EsPart			  part = {&answer, sizeof(answer)};

	answer.answer.type = ES_REQ_UNDECIDED;
	answer.answer.flags = ES_ANSWER_LAST;
	answer.answer.id = req->id;
	answer.oldest = es_txn_oldest_undecided();
	es_conn_send(conn, &answer.answer, &part, 1);
}
