/*-------------------------------------------------------------------------
 *
 * prepare_check.c
 *	  PREPARE's checks of the rows of one context.
 *
 *	 1. event ids: a row whose id is there already, in a committed event or in an earlier row of
 *		the transaction, with the same content, is not taken (its bit is set in the
 *		bitmap); with other content it is an error.  This comes first: a retry of what
 *		succeeded is no error, whatever version it expects.
 *	 2. given versions: each must be one more than that of the row before it, the first one more
 *		than the committed head.  Restored rows (given positions) come in any order:
 *		their versions must only be above the head and differ.
 *	 3. the first version is noted for the answer.
 *
 * The rows of a group are sorted by context and number.  The checks stop when the time is up
 * and go on from there; only the look among the context's committed events, which a
 * filter (event_filter.c) mostly spares, is done in one go.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "shard/prepare.h"

#define ROWS_PER_LOOK 4096

/* A distinct event id of a context's rows, and whether it is there already. */
typedef struct EsPrepareId
{
	const EsPrepareRow *row; /* first one with this id */
	bool				committed;
	bool				has_content;
	uint8				content[16]; /* of the committed event */
	EsPosition			position;
	int64				version;
} EsPrepareId;

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

void
es_prepare_fail(EsPrepare *p, int code, const char *message, const char *detail, const char *hint)
{
	es_conn_send_error(p->task.conn, ES_REQ_PREPARE, p->task.id, code, message, detail, hint);
	p->failed = true;
}

static void
fail_event_id(EsPrepare *p, const EsPrepareRow *row, const EsPrepareId *e)
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
	es_prepare_fail(p, ERRCODE_UNIQUE_VIOLATION, message, detail,
					"An event that is sent again must be the same in all columns, or have a new id.");
}

static void
fail_version(EsPrepare *p, const EsPrepareRow *row, int64 actual)
{
	char		message[384];
	char		detail[384];
	const char *context = context_text(p->group.klass, row->bytes, row->len);

	snprintf(message, sizeof(message), "version " INT64_FORMAT " is not the next one of context \"%s\"",
			 row->version, context);
	snprintf(detail, sizeof(detail),
			 "Its actual version is " INT64_FORMAT ", so the next one is " INT64_FORMAT ".", actual,
			 actual + 1);
	es_prepare_fail(p, ERRCODE_UNIQUE_VIOLATION, message, detail, "Replay the context and decide again.");
}

static void
fail_restored_version(EsPrepare *p, const EsPrepareRow *row, int64 version, int64 head)
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
	es_prepare_fail(p, ERRCODE_UNIQUE_VIOLATION, message, detail, "");
}

/* ---- event ids ---- */

static inline uint64
id_hash(const uint8 *id)
{
	uint64 a;
	uint64 b;

	memcpy(&a, id, 8);
	memcpy(&b, id + 8, 8);
	a = (a ^ (b * UINT64CONST(0x9E3779B97F4A7C15))) * UINT64CONST(0xD6E8FEB86659FD93);
	return a ^ (a >> 32);
}

/*
 * The slot of an id: where it is, or the empty one where it would be.  A slot holds 32 bits of the hash, which spare
 * most comparisons, and 1 + the number of an entry.
 */
static uint64 *
id_slot(const EsPrepareContext *c, const uint8 *id)
{
	uint64 hash = id_hash(id);
	uint64 i = hash & c->slot_mask;

	for (;;)
	{
		uint64 slot = c->slots[i];

		if (slot == 0)
			return &c->slots[i];
		if (slot >> 32 == hash >> 32 && memcmp(c->ids[(uint32) slot - 1].row->event_id, id, 16) == 0)
			return &c->slots[i];
		i = (i + 1) & c->slot_mask;
	}
}

static EsPrepareId *
find_id(const EsPrepareContext *c, const uint8 *id)
{
	uint64 slot = *id_slot(c, id);

	return slot == 0 ? NULL : &c->ids[(uint32) slot - 1];
}

static bool
id_wanted(void *arg, const uint8 *event_id)
{
	return *id_slot(arg, event_id) != 0;
}

static void
id_found(void *arg, const uint8 *event_id, const EsEventFound *event)
{
	EsPrepareId *e = find_id(arg, event_id);

	e->committed = true;
	e->has_content = event->content != NULL;
	if (event->content != NULL)
		memcpy(e->content, event->content, 16);
	e->position = event->position;
	e->version = event->version;
}

static void
begin_ids(EsPrepare *p, uint64 n)
{
	EsPrepareContext *c = &p->context;
	uint64			  nslots = 8;

	if (n >= PG_UINT32_MAX / 2)
		ereport(ERROR, (errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
						errmsg("a transaction has too many event ids in one context")));
	while (nslots < n * 2)
		nslots *= 2;
	c->ids = MemoryContextAllocHuge(p->group.context, n * sizeof(EsPrepareId));
	c->distinct = MemoryContextAllocHuge(p->group.context, n * sizeof(uint8 *));
	c->slots = MemoryContextAllocExtended(p->group.context, nslots * sizeof(uint64),
										  MCXT_ALLOC_HUGE | MCXT_ALLOC_ZERO);
	c->slot_mask = nslots - 1;
	c->nids = 0;
}

static void
add_id(EsPrepareContext *c, const EsPrepareRow *row)
{
	uint64		*slot = id_slot(c, row->event_id);
	EsPrepareId *e;

	if (*slot != 0)
		return;
	e = &c->ids[c->nids];
	memset(e, 0, sizeof(*e));
	e->row = row;
	c->distinct[c->nids++] = row->event_id;
	*slot = (id_hash(row->event_id) >> 32) << 32 | c->nids;
}

static bool
probe_ids(EsPrepare *p, const EsContextId *context, EsDamage *damage)
{
	EsPrepareContext *c = &p->context;
	EsEventProbe	  probe = {id_wanted, id_found, c, c->distinct, c->nids};

	return es_event_ids_probe(context, &probe, damage);
}

static bool
same_content(const uint8 *a, const uint8 *b)
{
	return a == NULL || b == NULL ? a == b : memcmp(a, b, 16) == 0;
}

/* ---- versions ---- */

static void
note_version(EsPrepare *p, uint64 hash, int64 version)
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
check_restored(EsPrepare *p, const EsPrepareRow *row)
{
	EsPrepareContext *c = &p->context;

	if (c->nrestored > 1)
		qsort(c->restored, c->nrestored, sizeof(int64), compare_int64);
	if (c->nrestored > 0 && c->restored[0] <= c->head.version)
	{
		fail_restored_version(p, row, c->restored[0], c->head.version);
		return;
	}
	for (uint64 i = 1; i < c->nrestored; i++)
		if (c->restored[i] == c->restored[i - 1])
		{
			fail_restored_version(p, row, c->restored[i], c->head.version);
			return;
		}
}

/* ---- one context ---- */

static void
skip_row(EsPrepare *p, const EsPrepareRow *row)
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

/* Finds out what is needed of the context that begins at c->begin. */
static bool
begin_context(EsPrepare *p, const EsContextId *context, EsDamage *damage)
{
	EsPrepareContext   *c = &p->context;
	const EsPrepareRow *rows = p->group.rows;
	uint64				nids = 0;
	bool				versions = false;

	c->end = c->begin;
	do
	{
		nids += rows[c->end].event_id != NULL;
		versions = versions || rows[c->end].version != 0;
		c->end++;
	} while (c->end < p->group.nrows && rows[c->end].len == rows[c->begin].len &&
			 (rows[c->end].bytes == rows[c->begin].bytes ||
			  memcmp(rows[c->end].bytes, rows[c->begin].bytes, rows[c->begin].len) == 0));

	c->versioned = es_prepare_roles(p->source)->version != 0;
	c->notes_version = c->versioned && !p->given_versions && p->nversions < ES_FINISH_MAX_VERSIONS;
	memset(&c->head, 0, sizeof(c->head));
	if (c->notes_version || (c->versioned && versions))
	{
		if (!es_head_lookup(context->table, context->hash, context->bytes, context->len, &c->head,
							&damage->err, &damage->path))
			return false;
	}
	c->next_version = c->head.version + 1;
	c->nrestored = 0;
	c->restored = NULL;
	if (p->restore && c->versioned)
		c->restored = MemoryContextAllocHuge(p->group.context, (c->end - c->begin) * sizeof(int64));
	c->nids = 0;
	if (es_prepare_roles(p->source)->event_id != 0 && nids > 0)
		begin_ids(p, nids);
	else
		c->slots = NULL;
	c->at = c->begin;
	return true;
}

/* false: an error was sent. */
static bool
check_row(EsPrepare *p, const EsPrepareRow *row)
{
	EsPrepareContext *c = &p->context;

	if (row->number >= p->view.table->nrows)
	{
		es_prepare_fail(p, ERRCODE_INTERNAL_ERROR, "a transaction's rows are more than it says", "", "");
		return false;
	}
	if (row->event_id != NULL && c->slots != NULL)
	{
		const EsPrepareId *e = find_id(c, row->event_id);

		if (e->committed || e->row != row)
		{
			const uint8 *content = e->row->content;

			if (e->committed)
				content = e->has_content ? e->content : NULL;
			if (!same_content(row->content, content))
			{
				fail_event_id(p, row, e);
				return false;
			}
			skip_row(p, row);
			return true;
		}
	}
	if (!c->versioned)
		return true;
	if (p->restore)
	{
		if (row->version != 0)
			c->restored[c->nrestored++] = row->version;
	}
	else if (row->version != 0 && row->version != c->next_version)
	{
		fail_version(p, row, c->next_version - 1);
		return false;
	}
	if (c->notes_version)
	{
		note_version(p, p->group.hash, c->next_version);
		c->notes_version = false;
	}
	c->next_version++;
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

static void
sort_group(EsPrepareGroup *g)
{
	for (uint64 i = 1; i < g->nrows; i++)
		if (compare_rows(&g->rows[i - 1], &g->rows[i]) >= 0)
		{
			qsort(g->rows, g->nrows, sizeof(EsPrepareRow), compare_rows);
			break;
		}
}

EsTaskState
es_prepare_check_group(EsPrepare *p, int64 deadline, EsDamage *damage, bool *failed)
{
	EsPrepareContext *c = &p->context;
	uint64			  looked = 0;

	*failed = false;
	if (c->stage == ES_CHECK_GROUP)
	{
		sort_group(&p->group);
		c->begin = 0;
		c->stage = ES_CHECK_CONTEXT;
	}
	while (c->begin < p->group.nrows)
	{
		const EsPrepareRow *rows = p->group.rows;
		EsContextId			context = {&p->view.table->table, p->group.hash, rows[c->begin].bytes,
									   rows[c->begin].len};

		switch (c->stage)
		{
			case ES_CHECK_GROUP:
			case ES_CHECK_CONTEXT:
				if (!begin_context(p, &context, damage))
				{
					*failed = true;
					return ES_TASK_DONE;
				}
				c->stage = c->slots != NULL ? ES_CHECK_IDS : ES_CHECK_ROWS;
				break;

			case ES_CHECK_IDS:
				for (; c->at < c->end; c->at++)
				{
					if (++looked % ROWS_PER_LOOK == 0 && es_task_clock() >= deadline)
						return ES_TASK_MORE;
					if (rows[c->at].event_id != NULL)
						add_id(c, &rows[c->at]);
				}
				if (!probe_ids(p, &context, damage))
				{
					*failed = true;
					return ES_TASK_DONE;
				}
				c->at = c->begin;
				c->stage = ES_CHECK_ROWS;
				break;

			case ES_CHECK_ROWS:
				for (; c->at < c->end; c->at++)
				{
					if (++looked % ROWS_PER_LOOK == 0 && es_task_clock() >= deadline)
						return ES_TASK_MORE;
					if (!check_row(p, &rows[c->at]))
						return ES_TASK_DONE;
				}
				if (c->restored != NULL)
					check_restored(p, &rows[c->begin]);
				if (p->failed)
					return ES_TASK_DONE;
				c->begin = c->end;
				c->stage = ES_CHECK_CONTEXT;
				break;
		}
	}
	c->stage = ES_CHECK_GROUP;
	return ES_TASK_DONE;
}
