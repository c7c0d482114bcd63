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

/* A row of a restore: its version is checked with those of its context's other rows. */
typedef struct EsRestored
{
	EsPosition position; /* 0 = a new event */
	uint64	   number;
	int64	   version; /* 0 = NULL */
} EsRestored;

/* ---- errors ---- */

void
es_prepare_fail(EsPrepare *p, int code, const char *message, const char *detail, const char *hint)
{
	es_conn_send_error(p->task.conn, ES_REQ_PREPARE, p->task.id, code, message, detail, hint);
	p->failed = true;
}

/* An event of the context is refused; in the message ES_REFUSAL_CONTEXT stands for the context. */
static void
refuse_row(EsPrepare *p, const EsPrepareRow *row, int code, const char *message, const char *detail,
		   const char *hint)
{
	static const char zeros[8] = {0};
	EsRefusal		  r = {
				.answer = {.type = ES_REQ_PREPARE, .flags = ES_ANSWER_LAST | ES_ANSWER_REFUSED, .id = p->task.id},
				.sqlerrcode = code,
				.context_class = p->group.klass,
				.table = p->view.table->table,
				.context_len = row->len,
				.context_sent = Min(row->len, 1024)};
	EsPart parts[6] = {{&r, sizeof(r)},
					   {row->bytes, r.context_sent},
					   {zeros, MAXALIGN(r.context_sent) - r.context_sent},
					   {message, strlen(message) + 1},
					   {detail, strlen(detail) + 1},
					   {hint, strlen(hint) + 1}};

	es_conn_send(p->task.conn, &r.answer, parts, 6);
	p->failed = true;
}

static void
fail_event_id(EsPrepare *p, const EsPrepareRow *row, const EsPrepareId *e)
{
	const uint8 *b = row->event_id;
	char		 message[256];
	char		 detail[256];

	snprintf(
		message, sizeof(message),
		"event id %02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x already exists in context \"%s\" with other content",
		b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15],
		ES_REFUSAL_CONTEXT);
	if (!e->committed)
		strcpy(detail, "An earlier row of the same transaction has it.");
	else if (e->version > 0)
		snprintf(detail, sizeof(detail),
				 "It is the event with version " INT64_FORMAT " at position " UINT64_FORMAT ".", e->version,
				 e->position);
	else
		snprintf(detail, sizeof(detail), "It is the event at position " UINT64_FORMAT ".", e->position);
	refuse_row(p, row, ERRCODE_UNIQUE_VIOLATION, message, detail,
			   "An event that is sent again must be the same in all columns, or have a new id.");
}

static void
fail_version(EsPrepare *p, const EsPrepareRow *row, int64 actual)
{
	char message[384];
	char detail[384];

	snprintf(message, sizeof(message), "version " INT64_FORMAT " is not the next one of context \"%s\"",
			 row->version, ES_REFUSAL_CONTEXT);
	snprintf(detail, sizeof(detail),
			 "Its actual version is " INT64_FORMAT ", so the next one is " INT64_FORMAT ".", actual,
			 actual + 1);
	refuse_row(p, row, ERRCODE_UNIQUE_VIOLATION, message, detail, "Replay the context and decide again.");
}

static void
fail_restored_version(EsPrepare *p, const EsPrepareRow *row, const EsRestored *r, int64 next)
{
	char message[384];
	char detail[384];

	snprintf(message, sizeof(message), "version " INT64_FORMAT " is not the next one of context \"%s\"",
			 r->version, ES_REFUSAL_CONTEXT);
	if (r->position != 0)
		snprintf(detail, sizeof(detail),
				 "In the order of positions the event at position " UINT64_FORMAT
				 " would be version " INT64_FORMAT ".",
				 r->position, next);
	else
		snprintf(detail, sizeof(detail),
				 "Behind the restored events of the transaction the next one is " INT64_FORMAT ".", next);
	refuse_row(p, row, ERRCODE_UNIQUE_VIOLATION, message, detail,
			   "Restore all events of a context together, with their positions and versions.");
}

static void
fail_restored_order(EsPrepare *p, const EsPrepareRow *row)
{
	char message[384];
	char detail[384];

	snprintf(message, sizeof(message),
			 "event at position " UINT64_FORMAT " of context \"%s\" comes without version and out of order",
			 row->position, ES_REFUSAL_CONTEXT);
	snprintf(detail, sizeof(detail),
			 "An earlier event of the context has position " UINT64_FORMAT
			 ", and versions are given in the order in which events come.",
			 p->context.last_position);
	refuse_row(p, row, ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, message, detail,
			   "Restore events in the order of their positions, or with their versions.");
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

/* In the order that the rows will have: those without a position last. */
static int
compare_restored(const void *a, const void *b)
{
	const EsRestored *x = a;
	const EsRestored *y = b;

	if (x->position != y->position)
		return x->position - 1 < y->position - 1 ? -1 : 1;
	return x->number < y->number ? -1 : x->number > y->number;
}

static void
check_restored(EsPrepare *p, const EsPrepareRow *row)
{
	EsPrepareContext *c = &p->context;
	int64			  next = c->head.version + 1;

	for (uint64 i = 1; i < c->nrestored; i++)
		if (compare_restored(&c->restored[i - 1], &c->restored[i]) > 0)
		{
			qsort(c->restored, c->nrestored, sizeof(EsRestored), compare_restored);
			break;
		}
	for (uint64 i = 0; i < c->nrestored; i++, next++)
	{
		const EsRestored *r = &c->restored[i];

		/* new events may come without */
		if (r->version != next && (r->version != 0 || r->position != 0))
		{
			fail_restored_version(p, row, r, next);
			return;
		}
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
	c->last_position = 0;
	if (p->restore && p->given_versions && c->versioned)
		c->restored = MemoryContextAllocHuge(p->group.context, (c->end - c->begin) * sizeof(EsRestored));
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
	if (c->restored != NULL)
	{
		c->restored[c->nrestored++] = (EsRestored){row->position, row->number, row->version};
		return true;
	}
	if (row->position != 0 && row->position <= c->last_position)
	{
		fail_restored_order(p, row);
		return false;
	}
	c->last_position = Max(c->last_position, row->position);
	if (row->version != 0 && row->version != c->next_version)
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
