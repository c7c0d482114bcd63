/*-------------------------------------------------------------------------
 *
 * prepare.c
 *	  PREPARE: may the transaction's rows go into their contexts as they are?
 *
 * The backend holds the locks of all contexts that it wrote, so whoever wrote to them before
 * is decided and nobody writes to them until this transaction ends: what is
 * found here is still so when FINISH is applied.
 *
 * The rows come context by context (prepare_rows.c).  For each context
 *	 1. event ids: a row whose id is there already, in a committed event or in an earlier row of
 *		the transaction, with the same content, is not taken (its bit is set in the
 *		bitmap); with other content it is an error.  This comes first: a retry of what
 *		succeeded is no error, whatever version it expects.
 *	 2. given versions: each must be one more than that of the row before it, the first one more
 *		than the committed head.  Restored rows (given positions) come in any order:
 *		their versions must only be above the head and differ.
 *	 3. the first version is noted for the answer, for up to ES_FINISH_MAX_VERSIONS
 *		contexts.
 *
 * A PREPARE of a large transaction runs as a task, in slices.  What it holds in memory is
 * the rows of one context at a time, 56 bytes each and 32 more with an event id, and one bit for
 * each row of the transaction.  A slice is longer only where one context alone has very many events
 * with ids to compare with.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "ipc/fault.h"
#include "shard/prepare.h"
#include "shard/shard.h"

/* An event id of a context's rows, and whether it is there already. */
typedef struct IdEntry
{
	const uint8		   *id;
	const EsPrepareRow *row; /* first one with this id */
	bool				committed;
	bool				has_content;
	uint8				content[16]; /* of the committed event */
	EsPosition			position;
	int64				version;
} IdEntry;

typedef struct IdTable
{
	IdEntry *entries; /* ascending by id */
	uint64	 n;
} IdTable;

typedef struct PrepareTask
{
	EsTask				   task; /* first */
	EsTxn				  *txn;	 /* with a reference; NULL = no batch was logged */
	const EsSectionHeader *section;
	const EsFinishTable	  *table; /* at work; NULL = done */
	EsFinishTableView	   view;
	EsPrepareSource		  *source;
	EsPrepareGroup		   group;
	int					   groups_since_reset;
	bool				   restore; /* positions are given */
	bool				   given_versions;

	/* of the table at work */
	uint8		   *bitmap; /* NULL = all taken so far */
	Size			bitmap_len;
	uint64			nskipped;
	EsFirstVersion *versions;
	uint32			nversions;
	uint32			versions_allocated;

	/* the answer's tables so far */
	char  *answer;
	Size   answer_len;
	Size   answer_allocated;
	uint64 ntables;
	bool   failed; /* an error was sent */
} PrepareTask;

/* ---- errors ---- */

static const char *
context_text(EsContextClass klass, const void *bytes, Size len)
{
	static char	 text[256];
	const uint8 *b = bytes;
	int64		 number;

	switch (klass)
	{
		case ES_CONTEXT_STRING:
		{
			Size n = Min(len, 200);

			/* not in the middle of a character */
			while (n < len && n > 0 && (b[n] & 0xc0) == 0x80)
				n--;
			snprintf(text, sizeof(text), "%.*s%s", (int) n, (const char *) bytes, n < len ? "…" : "");
			return text;
		}
		case ES_CONTEXT_UUID:
			if (len == 16)
			{
				snprintf(text, sizeof(text),
						 "%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", b[0], b[1],
						 b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14],
						 b[15]);
				return text;
			}
			break;
		case ES_CONTEXT_BYTEA:
			break;
		default:
			if (len == sizeof(number))
			{
				memcpy(&number, bytes, sizeof(number));
				snprintf(text, sizeof(text), INT64_FORMAT, number);
				return text;
			}
	}
	{
		Size n = Min(len, 64);

		strcpy(text, "\\x");
		for (Size i = 0; i < n; i++)
			snprintf(text + 2 + 2 * i, 3, "%02x", b[i]);
		if (n < len)
			strcat(text, "…");
	}
	return text;
}

static void
fail(PrepareTask *p, int code, const char *message, const char *detail, const char *hint)
{
	es_conn_send_error(p->task.conn, ES_REQ_PREPARE, p->task.id, code, message, detail, hint);
	p->failed = true;
}

static void
fail_event_id(PrepareTask *p, const EsPrepareRow *row, const IdEntry *e)
{
	char id[64];
	char message[512];
	char detail[256];

	strlcpy(id, context_text(ES_CONTEXT_UUID, row->event_id, 16), sizeof(id));
	snprintf(message, sizeof(message), "event id %s already exists in context \"%s\" with other content", id,
			 context_text(p->group.klass, row->bytes, row->len));
	if (!e->committed)
		strcpy(detail, "An earlier row of the same transaction has it.");
	else if (e->version > 0)
		snprintf(detail, sizeof(detail),
				 "It is the event with version " INT64_FORMAT " at position " UINT64_FORMAT ".", e->version,
				 e->position);
	else
		snprintf(detail, sizeof(detail), "It is the event at position " UINT64_FORMAT ".", e->position);
	fail(p, ERRCODE_UNIQUE_VIOLATION, message, detail,
		 "An event that is sent again must be the same in all columns, or have a new id.");
}

static void
fail_version(PrepareTask *p, const EsPrepareRow *row, int64 actual)
{
	char		message[384];
	char		detail[384];
	const char *context = context_text(p->group.klass, row->bytes, row->len);

	snprintf(message, sizeof(message), "version " INT64_FORMAT " is not the next one of context \"%s\"",
			 row->version, context);
	snprintf(detail, sizeof(detail),
			 "Its actual version is " INT64_FORMAT ", so the next one is " INT64_FORMAT ".", actual,
			 actual + 1);
	fail(p, ERRCODE_UNIQUE_VIOLATION, message, detail, "Replay the context and decide again.");
}

static void
fail_restored_version(PrepareTask *p, const EsPrepareRow *row, int64 version, int64 head)
{
	char		message[384];
	char		detail[384];
	const char *context = context_text(p->group.klass, row->bytes, row->len);

	snprintf(message, sizeof(message), "version " INT64_FORMAT " of context \"%s\" is there already", version,
			 context);
	if (version <= head)
		snprintf(detail, sizeof(detail),
				 "Its actual version is " INT64_FORMAT "; restored rows must be above it.", head);
	else
		snprintf(detail, sizeof(detail), "Two restored rows of the context have it.");
	fail(p, ERRCODE_UNIQUE_VIOLATION, message, detail, "");
}

/* ---- event ids ---- */

static int
compare_ids(const void *a, const void *b)
{
	const IdEntry *x = a;
	const IdEntry *y = b;
	int			   c = memcmp(x->id, y->id, 16);

	if (c != 0)
		return c;
	if (x->row == NULL || y->row == NULL)
		return 0;
	return x->row->number < y->row->number ? -1 : x->row->number > y->row->number;
}

static IdEntry *
find_id(const IdTable *t, const uint8 *id)
{
	uint64 low = 0;
	uint64 high = t->n;

	while (low < high)
	{
		uint64 mid = low + (high - low) / 2;
		int	   c = memcmp(t->entries[mid].id, id, 16);

		if (c == 0)
			return &t->entries[mid];
		if (c < 0)
			low = mid + 1;
		else
			high = mid;
	}
	return NULL;
}

static bool
id_wanted(void *arg, const uint8 *event_id)
{
	return find_id(arg, event_id) != NULL;
}

static void
id_found(void *arg, const uint8 *event_id, const EsEventFound *event)
{
	IdEntry *e = find_id(arg, event_id);

	e->committed = true;
	e->has_content = event->content != NULL;
	if (event->content != NULL)
		memcpy(e->content, event->content, 16);
	e->position = event->position;
	e->version = event->version;
}

/* The distinct ids of the rows, each with the committed event that has it; false = damage. */
static bool
gather_ids(PrepareTask *p, const EsContextId *context, const EsPrepareRow *rows, uint64 n, IdTable *t,
		   EsDamage *damage)
{
	EsEventProbe  probe = {id_wanted, id_found, t};
	const uint8 **distinct;
	uint64		  kept = 0;

	t->n = 0;
	for (uint64 i = 0; i < n; i++)
		t->n += rows[i].event_id != NULL;
	if (t->n == 0)
		return true;
	t->entries = MemoryContextAllocHuge(p->group.context, t->n * sizeof(IdEntry));
	memset(t->entries, 0, t->n * sizeof(IdEntry));
	for (uint64 i = 0; i < n; i++)
		if (rows[i].event_id != NULL)
		{
			t->entries[kept].id = rows[i].event_id;
			t->entries[kept++].row = &rows[i];
		}
	if (t->n > 1)
	{
		qsort(t->entries, t->n, sizeof(IdEntry), compare_ids);
		kept = 0;
		for (uint64 i = 1; i < t->n; i++)
			if (memcmp(t->entries[i].id, t->entries[kept].id, 16) != 0)
				t->entries[++kept] = t->entries[i];
		t->n = kept + 1;
	}
	distinct = MemoryContextAllocHuge(p->group.context, t->n * sizeof(uint8 *));
	for (uint64 i = 0; i < t->n; i++)
		distinct[i] = t->entries[i].id;
	probe.ids = distinct;
	probe.nids = t->n;
	return es_event_ids_probe(context, &probe, damage);
}

static bool
same_content(const uint8 *a, const uint8 *b)
{
	return a == NULL || b == NULL ? a == b : memcmp(a, b, 16) == 0;
}

/* ---- one context ---- */

static void
skip_row(PrepareTask *p, const EsPrepareRow *row)
{
	if (p->bitmap == NULL)
	{
		p->bitmap_len = (p->view.table->nrows + 63) / 64 * 8;
		p->bitmap =
			MemoryContextAllocExtended(p->task.context, p->bitmap_len, MCXT_ALLOC_HUGE | MCXT_ALLOC_ZERO);
	}
	p->bitmap[row->number >> 3] |= 1 << (row->number & 7);
	p->nskipped++;
}

static void
note_version(PrepareTask *p, uint64 hash, int64 version)
{
	if (p->nversions == p->versions_allocated)
	{
		p->versions_allocated = Max(8, p->versions_allocated * 2);
		if (p->versions == NULL)
			p->versions = MemoryContextAlloc(p->task.context, p->versions_allocated * sizeof(EsFirstVersion));
		else
			p->versions = repalloc(p->versions, p->versions_allocated * sizeof(EsFirstVersion));
	}
	p->versions[p->nversions++] = (EsFirstVersion){hash, version};
}

static int
compare_int64(const void *a, const void *b)
{
	int64 x = *(const int64 *) a;
	int64 y = *(const int64 *) b;

	return x < y ? -1 : x > y;
}

static void
check_restored(PrepareTask *p, const EsPrepareRow *rows, const int64 *given, uint64 n, int64 head)
{
	int64 *versions = unconstify(int64 *, given);

	if (n > 1)
		qsort(versions, n, sizeof(int64), compare_int64);
	if (n > 0 && versions[0] <= head)
	{
		fail_restored_version(p, rows, versions[0], head);
		return;
	}
	for (uint64 i = 1; i < n; i++)
		if (versions[i] == versions[i - 1])
		{
			fail_restored_version(p, rows, versions[i], head);
			return;
		}
}

/* Rows of one context in the order of their numbers. */
static bool
check_context(PrepareTask *p, const EsPrepareRow *rows, uint64 n, EsDamage *damage)
{
	const EsRoles *roles = es_prepare_roles(p->source);
	EsContextId	   context = {&p->view.table->table, p->group.hash, rows[0].bytes, rows[0].len};
	IdTable		   ids = {0};
	EsHead		   head = {0};
	bool		   versioned = roles->version != 0;
	bool		   wants_head = false;
	int64		   next;
	int64		  *restored = NULL;
	uint64		   nrestored = 0;
	bool		   first = true;

	if (roles->event_id != 0 && !gather_ids(p, &context, rows, n, &ids, damage))
		return false;
	if (versioned)
	{
		wants_head = !p->given_versions && p->nversions < ES_FINISH_MAX_VERSIONS;
		for (uint64 i = 0; i < n && !wants_head; i++)
			wants_head = rows[i].version != 0;
		if (wants_head && !es_head_lookup(context.table, context.hash, context.bytes, context.len, &head,
										  &damage->err, &damage->path))
			return false;
		if (p->restore)
			restored = MemoryContextAllocHuge(p->group.context, n * sizeof(int64));
	}

	next = head.version + 1;
	for (uint64 i = 0; i < n; i++)
	{
		const EsPrepareRow *row = &rows[i];

		if (row->number >= p->view.table->nrows)
		{
			fail(p, ERRCODE_INTERNAL_ERROR, "a transaction's rows are more than it says", "", "");
			return true;
		}
		if (row->event_id != NULL)
		{
			const IdEntry *e = find_id(&ids, row->event_id);

			if (e->committed || e->row != row)
			{
				if (same_content(row->content,
								 e->committed ? (e->has_content ? e->content : NULL) : e->row->content))
				{
					skip_row(p, row);
					continue;
				}
				fail_event_id(p, row, e);
				return true;
			}
		}
		if (!versioned)
			continue;
		if (p->restore)
		{
			if (row->version != 0)
				restored[nrestored++] = row->version;
		}
		else if (row->version != 0 && row->version != next)
		{
			fail_version(p, row, next - 1);
			return true;
		}
		if (first && wants_head && !p->given_versions && p->nversions < ES_FINISH_MAX_VERSIONS)
			note_version(p, context.hash, next);
		first = false;
		next++;
	}
	if (p->restore && versioned)
		check_restored(p, rows, restored, nrestored, head.version);
	return true;
}

static int
compare_rows(const void *a, const void *b)
{
	const EsPrepareRow *x = a;
	const EsPrepareRow *y = b;

	if (x->len != y->len)
		return x->len < y->len ? -1 : 1;
	if (x->bytes != y->bytes)
	{
		int c = memcmp(x->bytes, y->bytes, x->len);

		if (c != 0)
			return c;
	}
	return x->number < y->number ? -1 : x->number > y->number;
}

/* All rows of one hash; false = damage. */
static bool
check_group(PrepareTask *p, EsDamage *damage)
{
	EsPrepareGroup *g = &p->group;
	bool			sorted = true;
	uint64			begin = 0;

	for (uint64 i = 1; i < g->nrows && sorted; i++)
		sorted = compare_rows(&g->rows[i - 1], &g->rows[i]) < 0;
	if (!sorted)
		qsort(g->rows, g->nrows, sizeof(EsPrepareRow), compare_rows);
	for (uint64 i = 1; i <= g->nrows && !p->failed; i++)
	{
		if (i < g->nrows && g->rows[i].len == g->rows[begin].len &&
			memcmp(g->rows[i].bytes, g->rows[begin].bytes, g->rows[i].len) == 0)
			continue;
		if (!check_context(p, &g->rows[begin], i - begin, damage))
			return false;
		begin = i;
	}
	return true;
}

/* ---- tables ---- */

static void
put(PrepareTask *p, const void *data, Size len)
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
end_table(PrepareTask *p)
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
begin_table(PrepareTask *p)
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
		fail(p, ERRCODE_INTERNAL_ERROR, "a shard of the event store misses rows of this transaction", detail,
			 "Try the transaction again.");
		return false;
	}
	return true;
}

/* DONE: the table is done, or it failed. */
static EsTaskState
run_table(PrepareTask *p, int64 deadline)
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

	for (;;)
	{
		/* nothing can be wrong with it: first versions are wanted, as far as they go */
		if (!checks && (p->given_versions || es_prepare_roles(p->source)->version == 0 ||
						p->nversions >= ES_FINISH_MAX_VERSIONS))
			break;
		if (es_prepare_next_group(p->source, deadline, &p->group, &damage, &failed) == ES_TASK_MORE)
			return ES_TASK_MORE;
		if (!failed && p->group.nrows == 0)
			break;
		if (failed || !check_group(p, &damage))
		{
			es_segment_send_error(p->task.conn, ES_REQ_PREPARE, p->task.id, damage.path, &damage.err);
			p->failed = true;
		}
		if (p->failed)
			return ES_TASK_DONE;

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
	end_table(p);
	return ES_TASK_DONE;
}

static EsTaskState
run_prepare(EsTask *task, int64 deadline)
{
	PrepareTask	   *p = (PrepareTask *) task;
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
	PrepareTask *p = (PrepareTask *) task;

	if (p->source != NULL)
		es_prepare_source_free(p->source);
	if (p->txn != NULL)
		es_txn_unref(p->txn);
}

void
es_handle_prepare(EsConn *conn, const EsPrepareRequest *req, Size len)
{
	PrepareTask *p;
	Size		 section_len = len - sizeof(EsPrepareRequest);
	char		*section;
	EsError		 err = {0};

	if (len < sizeof(EsPrepareRequest) + sizeof(EsSectionHeader) ||
		es_section_check(req + 1, section_len, &err) != ES_OK)
	{
		es_conn_send_error(conn, ES_REQ_PREPARE, req->req.id, ERRCODE_PROTOCOL_VIOLATION,
						   "malformed request to check a transaction", err.what, "");
		return;
	}
	p = (PrepareTask *) es_task_create(conn, &req->req, sizeof(PrepareTask), "event_store prepare");
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
