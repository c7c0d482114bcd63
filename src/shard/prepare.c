/*-------------------------------------------------------------------------
 *
 * prepare.c
 *	  PREPARE: may the transaction's rows go into their contexts as they are?
 *
 * The backend holds the locks of all contexts that it wrote, so whoever wrote to them before
 * is decided and nobody writes to them until this transaction ends: what is
 * found here is still so when FINISH is applied.
 *
 * Table by table the rows come context by context (prepare_rows.c), and each context is checked by
 * itself (prepare_check.c).  The answer has, per table, the bitmap of rows that are not taken
 * and the first versions of up to ES_FINISH_MAX_VERSIONS contexts.
 *
 * A PREPARE runs as a task, in slices: a small one is answered at once, a large one lets others
 * in between.  What it holds in memory is the rows of one context at a time, 64 bytes each
 * (88 in a restore) and some 90 more with an event id, and one bit for each row of the transaction.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "ipc/fault.h"
#include "shard/prepare.h"
#include "shard/shard.h"

/* ---- tables ---- */

static void
put(EsPrepare *p, const void *data, Size len)
{
	if (p->answer_len + len > p->answer_allocated)
	{
		Size allocated = Max(p->answer_len + len, Max(256, p->answer_allocated * 2));

		if (p->answer == NULL)
			p->answer = MemoryContextAllocHuge(p->task.context, allocated);
		else
			p->answer = repalloc_huge(p->answer, allocated);
		p->answer_allocated = allocated;
	}
	memcpy(p->answer + p->answer_len, data, len);
	p->answer_len += len;
}

static void
end_table(EsPrepare *p)
{
	EsPrepareTable t = {0};

	t.table = p->view.table->table;
	t.nrows = p->view.table->nrows;
	t.nskipped = p->nskipped;
	t.bitmap_len = p->bitmap != NULL ? (uint32) p->bitmap_len : 0;
	t.nversions = p->nversions;
	t.len = sizeof(t) + t.bitmap_len + (Size) p->nversions * sizeof(EsFirstVersion);
	put(p, &t, sizeof(t));
	if (p->bitmap != NULL)
	{
		put(p, p->bitmap, p->bitmap_len);
		pfree(p->bitmap);
		p->bitmap = NULL;
	}
	put(p, p->versions, (Size) p->nversions * sizeof(EsFirstVersion));
	p->nskipped = 0;
	p->nversions = 0;
	p->ntables++;
	es_prepare_source_free(p->source);
	p->source = NULL;
}

static bool
begin_table(EsPrepare *p)
{
	EsLsn missing;

	es_finish_table_view(p->table, &p->view);
	p->restore = (p->table->flags & ES_FINISH_GIVEN_POSITIONS) != 0;
	p->given_versions = (p->table->flags & ES_FINISH_GIVEN_VERSIONS) != 0;
	p->source = es_prepare_source(p->txn, &p->view, p->task.context);
	missing = es_prepare_missing(p->source);
	if (missing != 0)
	{
		char detail[128];

		snprintf(detail, sizeof(detail), "The batch logged at %X/%X has not arrived.",
				 LSN_FORMAT_ARGS(missing));
		es_prepare_fail(p, ERRCODE_INTERNAL_ERROR,
						"a shard of the event store misses rows of this transaction", detail,
						"Try the transaction again.");
		return false;
	}
	return true;
}

/* DONE: the table is done, or it failed. */
static EsTaskState
run_table(EsPrepare *p, int64 deadline)
{
	EsDamage damage;
	bool	 failed;
	bool	 checks;

	if (es_prepare_find_checks(p->source, deadline, &checks, &damage, &failed) == ES_TASK_MORE)
		return ES_TASK_MORE;
	if (failed)
	{
		es_segment_send_error(p->task.conn, ES_REQ_PREPARE, p->task.id, damage.path, &damage.err);
		p->failed = true;
		return ES_TASK_DONE;
	}

	/* versions must grow with given positions */
	checks = checks || (p->restore && es_prepare_roles(p->source)->version != 0);
	for (;;)
	{
		/* nothing can be wrong with it: first versions are wanted, as far as they go */
		if (!checks && (p->given_versions || es_prepare_roles(p->source)->version == 0 ||
						p->nversions >= ES_FINISH_MAX_VERSIONS))
			break;
		if (p->context.stage == ES_CHECK_GROUP)
		{
			if (!p->gathered &&
				es_prepare_next_group(p->source, deadline, &p->group, &damage, &failed) == ES_TASK_MORE)
				return ES_TASK_MORE;
			p->gathered = true;
			if (!failed && p->group.nrows == 0)
				break;
		}
		if (!failed && es_prepare_check_group(p, deadline, &damage, &failed) == ES_TASK_MORE)
			return ES_TASK_MORE;
		if (failed)
		{
			es_segment_send_error(p->task.conn, ES_REQ_PREPARE, p->task.id, damage.path, &damage.err);
			p->failed = true;
		}
		if (p->failed)
			return ES_TASK_DONE;
		p->gathered = false;

		/* small groups share the memory for a while */
		if (p->group.allocated > 1024 || ++p->groups_since_reset >= 256)
		{
			p->groups_since_reset = 0;
			p->group.rows = NULL;
			p->group.allocated = 0;
			MemoryContextReset(p->group.context);
		}
		p->group.nrows = 0;
		if (es_task_clock() >= deadline)
			return ES_TASK_MORE;
	}
	p->gathered = false;
	end_table(p);
	return ES_TASK_DONE;
}

static EsTaskState
run_prepare(EsTask *task, int64 deadline)
{
	EsPrepare	   *p = (EsPrepare *) task;
	EsPrepareAnswer answer = {0};
	EsPart			parts[2];

	while (p->table != NULL)
	{
		if (p->source == NULL && !begin_table(p))
			return ES_TASK_DONE;
		if (run_table(p, deadline) == ES_TASK_MORE)
			return ES_TASK_MORE;
		if (p->failed)
			return ES_TASK_DONE;
		p->table = es_section_next(p->section, p->table);
	}
	answer.answer.type = ES_REQ_PREPARE;
	answer.answer.flags = ES_ANSWER_LAST;
	answer.answer.id = task->id;
	answer.ntables = p->ntables;
	parts[0] = (EsPart){&answer, sizeof(answer)};
	parts[1] = (EsPart){p->answer, p->answer_len};
	ES_FAULT("prepare-before-answer");
	es_conn_send(task->conn, &answer.answer, parts, 2);
	return ES_TASK_DONE;
}

static void
release_prepare(EsTask *task)
{
	EsPrepare *p = (EsPrepare *) task;

	if (p->source != NULL)
		es_prepare_source_free(p->source);
	if (p->txn != NULL)
		es_txn_unref(p->txn);
}

void
es_handle_prepare(EsConn *conn, const EsPrepareRequest *req, Size len)
{
	EsPrepare *p;
	Size	   section_len = len - sizeof(EsPrepareRequest);
	char	  *section;
	EsError	   err = {0};

	if (len < sizeof(EsPrepareRequest) + sizeof(EsSectionHeader) ||
		es_section_check(req + 1, section_len, &err) != ES_OK)
	{
		es_conn_send_error(conn, ES_REQ_PREPARE, req->req.id, ERRCODE_PROTOCOL_VIOLATION,
						   "malformed request to check a transaction", err.what, "");
		return;
	}
	p = (EsPrepare *) es_task_create(conn, &req->req, sizeof(EsPrepare), "event_store prepare");
	p->task.run = run_prepare;
	p->task.release = release_prepare;
	section = MemoryContextAllocHuge(p->task.context, section_len);
	memcpy(section, req + 1, section_len);
	p->section = (const EsSectionHeader *) section;
	p->table = es_section_first(p->section);
	p->txn = es_txn_find(req->fxid);
	if (p->txn != NULL)
		es_txn_ref(p->txn);
	p->group.context =
		AllocSetContextCreate(p->task.context, "event_store prepare group", ALLOCSET_DEFAULT_SIZES);
	es_task_start(&p->task);
}
