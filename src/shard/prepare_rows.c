/*-------------------------------------------------------------------------
 *
 * prepare_rows.c
 *	  The rows of a transaction in one table, context by context.
 *
 * Checks are made per context, so the rows are needed by context; and by number within it, for
 * that is the order in which versions are given.  Rows in memory, bounded by
 * spill_after, are sorted by hash.  Pending segments are sorted by hash already and are
 * walked side by side; so a group, all rows with one hash, comes from the heads of all
 * sources, and no more than a group is in memory at a time.
 *
 * The number of a row counts the rows of the live batches in their order.  In memory it
 * follows from the batch; a pending segment tells batch and row (ES_PENDING_PLACE), and how
 * many rows a batch there has is counted first, over that column alone.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "core/route.h"
#include "shard/prepare.h"

#define ROWS_PER_LOOK 2048

typedef struct MemRow
{
	uint64 hash;
	uint32 batch;
	uint32 row;
} MemRow;

/* A pending segment being walked. */
typedef struct Walk
{
	EsSegmentRef		*ref; /* one reference */
	EsSegment			*segment;
	const EsSegmentInfo *info;
	bool				*wanted;
	EsRowBlock			*block;
	uint32				*batches; /* numbers in source->batches by those of the segment; UINT32_MAX = dead */
	uint32				 next_zone;
	uint32				 zone_rows;
	uint32				 row;  /* in the block */
	uint64				 hash; /* of that row, if it was computed */
	bool				 has_hash;
	bool				 counted; /* all zones of the first walk are done */
} Walk;

struct EsPrepareSource
{
	MemoryContext	context;
	EsTxn		   *txn;
	EsRoles			roles;
	EsPrepareBatch *batches;
	uint32			nbatches;
	EsLsn			missing;
	MemRow		   *rows;
	uint64			nrows;
	uint64			next;
	bool			sorted;
	bool			flagged; /* some batch in memory has given versions or event ids */
	Walk		   *walks;
	int				nwalks;
	uint32			hashed; /* batches whose rows are in rows */
	int				looked; /* walks that were looked through for checks */
	bool			numbered;
};

/* ---- gathering batches ---- */

static int
compare_starts(const void *a, const void *b)
{
	EsLsn x = (*(EsPrepareBatch *const *) a)->start;
	EsLsn y = (*(EsPrepareBatch *const *) b)->start;

	return x < y ? -1 : x > y;
}

static EsPrepareBatch *
find_start(EsPrepareBatch **sorted, uint32 n, EsLsn start)
{
	uint32 low = 0;
	uint32 high = n;

	while (low < high)
	{
		uint32 mid = low + (high - low) / 2;

		if (sorted[mid]->start < start)
			low = mid + 1;
		else
			high = mid;
	}
	return low < n && sorted[low]->start == start ? sorted[low] : NULL;
}

static void
take_flags(EsPrepareSource *s, const EsBatchHeader *h)
{
	s->roles = h->roles;
	s->flagged |= (h->flags & (ES_BATCH_GIVEN_VERSIONS | ES_BATCH_HAS_EVENT_IDS)) != 0;
}

static void
take_staged(EsPrepareSource *s, const EsTableKey *table, EsPrepareBatch **sorted, uint32 n)
{
	dlist_iter iter;

	dlist_foreach(iter, &s->txn->staged)
	{
		EsMemBatch	   *b = dlist_container(EsMemBatch, node, iter.cur);
		EsPrepareBatch *p = find_start(sorted, n, b->start);

		if (p == NULL || p->staged != NULL || !es_table_key_equal(&b->view.header->table, table))
			continue;
		es_membatch_ref(b);
		p->staged = b;
		p->view = b->view;
		p->nrows = b->view.header->nrows;
		take_flags(s, b->view.header);
	}
}

static void
take_pending(EsPrepareSource *s, const EsTableKey *table, EsPrepareBatch **sorted, uint32 n)
{
	ListCell *lc;

	foreach(lc, s->txn->pending)
	{
		EsSegmentRef		  *ref = lfirst(lc);
		const EsManifestEntry *e = &ref->entry;
		Walk				  *w = &s->walks[s->nwalks];
		bool				   any = false;

		if (!es_table_key_equal(&e->segment.table, table))
			continue;
		memset(w, 0, sizeof(*w));
		w->batches = palloc(Max(e->nstarts, 1) * sizeof(uint32));
		for (uint32 i = 0; i < e->nstarts; i++)
		{
			EsPrepareBatch *p = find_start(sorted, n, e->starts[i]);

			w->batches[i] = UINT32_MAX;
			if (p == NULL || p->staged != NULL)
				continue;
			p->pending = true;
			w->batches[i] = (uint32) (p - s->batches);
			any = true;
		}
		if (!any)
			continue;
		w->ref = ref;
		es_segment_ref(ref);
		s->nwalks++;
	}
}

EsPrepareSource *
es_prepare_source(EsTxn *txn, const EsFinishTableView *view, MemoryContext context)
{
	MemoryContext		 old = MemoryContextSwitchTo(context);
	EsPrepareSource		*s = palloc0(sizeof(EsPrepareSource));
	const EsFinishTable *table = view->table;
	const char			*at = view->inline_batches;

	s->context = context;
	s->txn = txn;
	s->nbatches = table->nlogged + table->ninline;
	s->batches = palloc0(Max(s->nbatches, 1) * sizeof(EsPrepareBatch));
	for (uint32 i = 0; i < table->nlogged; i++)
		s->batches[i].start = view->batch_starts[i];
	if (table->nlogged > 0 && txn != NULL)
	{
		EsPrepareBatch **sorted = palloc(table->nlogged * sizeof(EsPrepareBatch *));

		for (uint32 i = 0; i < table->nlogged; i++)
			sorted[i] = &s->batches[i];
		qsort(sorted, table->nlogged, sizeof(EsPrepareBatch *), compare_starts);
		take_staged(s, &table->table, sorted, table->nlogged);
		s->walks = palloc0(Max(list_length(txn->pending), 1) * sizeof(Walk));
		take_pending(s, &table->table, sorted, table->nlogged);
		pfree(sorted);
	}
	for (uint32 i = 0; i < table->nlogged && s->missing == 0; i++)
		if (s->batches[i].staged == NULL && !s->batches[i].pending)
			s->missing = s->batches[i].start;
	for (uint32 i = 0; i < table->ninline; i++)
	{
		EsPrepareBatch *p = &s->batches[table->nlogged + i];

		es_batch_open_trusted(at, &p->view);
		p->nrows = p->view.header->nrows;
		take_flags(s, p->view.header);
		at += p->view.header->total_len;
	}
	MemoryContextSwitchTo(old);
	return s;
}

EsLsn
es_prepare_missing(const EsPrepareSource *source)
{
	return source->missing;
}

void
es_prepare_source_free(EsPrepareSource *s)
{
	for (uint32 i = 0; i < s->nbatches; i++)
		if (s->batches[i].staged != NULL)
			es_membatch_unref(s->batches[i].staged);
	s->nbatches = 0;
	for (int i = 0; i < s->nwalks; i++)
	{
		es_block_free(s->walks[i].block);
		es_segment_unref(s->walks[i].ref);
	}
	s->nwalks = 0;
}

const EsRoles *
es_prepare_roles(const EsPrepareSource *source)
{
	return &source->roles;
}

/* ---- rows in memory ---- */

static inline int
compare_mem_rows(const MemRow *x, const MemRow *y)
{
	if (x->hash != y->hash)
		return x->hash < y->hash ? -1 : 1;
	if (x->batch != y->batch)
		return x->batch < y->batch ? -1 : 1;
	return x->row < y->row ? -1 : x->row > y->row;
}

#define ST_SORT			 sort_rows
#define ST_ELEMENT_TYPE	 MemRow
#define ST_COMPARE(a, b) compare_mem_rows(a, b)
#define ST_SCOPE		 static
#define ST_DEFINE
#define ST_DECLARE
#include "lib/sort_template.h"

static EsTaskState
sort_mem_rows(EsPrepareSource *s, int64 deadline)
{
	if (s->rows == NULL)
	{
		uint64 n = 0;

		for (uint32 i = 0; i < s->nbatches; i++)
			if (!s->batches[i].pending)
				n += s->batches[i].nrows;
		s->rows = MemoryContextAllocHuge(s->context, Max(n, 1) * sizeof(MemRow));
	}
	for (; s->hashed < s->nbatches; s->hashed++)
	{
		const EsPrepareBatch *p = &s->batches[s->hashed];

		if (p->pending)
			continue;
		if (s->nrows > 0 && es_task_clock() >= deadline)
			return ES_TASK_MORE;
		for (uint32 row = 0; row < p->nrows; row++)
			s->rows[s->nrows++] = (MemRow){es_batch_context_hash(&p->view, row), s->hashed, row};
	}
	if (s->nrows > 1)
		sort_rows(s->rows, s->nrows);
	s->sorted = true;
	return ES_TASK_DONE;
}

static EsPrepareRow *
add_row(EsPrepareGroup *g)
{
	if (g->nrows == g->allocated)
	{
		MemoryContext old = MemoryContextSwitchTo(g->context);

		g->allocated = Max(8, g->allocated * 2);
		if (g->rows == NULL)
			g->rows = palloc(g->allocated * sizeof(EsPrepareRow));
		else
			g->rows = repalloc_huge(g->rows, g->allocated * sizeof(EsPrepareRow));
		MemoryContextSwitchTo(old);
	}
	return &g->rows[g->nrows++];
}

static void
add_mem_row(EsPrepareSource *s, EsPrepareGroup *g, const MemRow *m)
{
	const EsPrepareBatch *p = &s->batches[m->batch];
	const EsBatchView	 *v = &p->view;
	const EsRoles		 *roles = &v->header->roles;
	EsPrepareRow		 *r = add_row(g);
	int64				  scratch;
	size_t				  len;

	memset(r, 0, sizeof(*r));
	r->number = p->first_number + m->row;
	if (!es_batch_context(v, m->row, &scratch, &r->bytes, &len))
		r->bytes = "", len = 0;
	r->len = len;
	if (r->bytes == &scratch)
	{
		void *copy = MemoryContextAlloc(g->context, sizeof(scratch));

		r->bytes = memcpy(copy, &scratch, sizeof(scratch));
	}
	if (roles->position > 0 && !es_batch_is_null(v, roles->position - 1, m->row))
		memcpy(&r->position, es_batch_value(v, roles->position - 1, m->row), sizeof(r->position));
	if (roles->version > 0 && !es_batch_is_null(v, roles->version - 1, m->row))
		memcpy(&r->version, es_batch_value(v, roles->version - 1, m->row), sizeof(int64));
	if (roles->event_id > 0 && !es_batch_is_null(v, roles->event_id - 1, m->row))
	{
		r->event_id = es_batch_value(v, roles->event_id - 1, m->row);
		if ((v->header->flags & ES_BATCH_HAS_CONTENT_HASH) &&
			!es_batch_is_null(v, v->header->ncols - 1, m->row))
			r->content = es_batch_value(v, v->header->ncols - 1, m->row);
	}
}

/* ---- rows in pending segments ---- */

static bool
walk_failed(Walk *w, EsStatus status, EsDamage *damage, bool counted)
{
	if (status == ES_OK)
		return false;
	damage->err.status = status;
	damage->path = es_segment_path(w->ref);
	if (!counted)
		es_segment_damaged(w->ref, &damage->err);
	return true;
}

static bool
open_walk(EsPrepareSource *s, Walk *w, EsDamage *damage)
{
	memset(damage, 0, sizeof(*damage));
	if (w->segment != NULL)
	{
		(void) es_segment_handle(w->ref, &damage->err);
		return true;
	}
	w->segment = es_segment_handle(w->ref, &damage->err);
	if (w->segment == NULL)
		return !walk_failed(w, damage->err.status, damage, true);
	w->info = es_segment_info(w->segment);
	w->block = es_block_create();
	if (w->block == NULL)
	{
		es_fail(&damage->err, ES_ERR_NOMEM, 0, "out of memory");
		return !walk_failed(w, ES_ERR_NOMEM, damage, true);
	}
	w->wanted = MemoryContextAllocZero(s->context, w->info->ncols * sizeof(bool));
	s->roles = w->info->roles;
	return true;
}

static int64
place_of(const Walk *w, uint32 row)
{
	const int64 *place = es_block_value(w->block, es_segment_ncols(w->info) + ES_PENDING_PLACE, row);

	return place != NULL ? *place : -1;
}

static bool
bad_place(Walk *w, int64 place, EsDamage *damage)
{
	if (place >= 0 && (uint64) place >> ES_PENDING_ROW_BITS < w->ref->entry.nstarts)
		return false;
	es_fail(&damage->err, ES_ERR_CORRUPT, 0, "a row names batch %lld of %u",
			(long long) (place >> ES_PENDING_ROW_BITS), w->ref->entry.nstarts);
	return walk_failed(w, ES_ERR_CORRUPT, damage, false);
}

/* First walk: how many rows each batch has. */
static EsTaskState
count_rows(EsPrepareSource *s, Walk *w, int64 deadline, EsDamage *damage, bool *failed)
{
	*failed = true;
	if (!open_walk(s, w, damage))
		return ES_TASK_DONE;
	w->wanted[es_segment_ncols(w->info) + ES_PENDING_PLACE] = true;
	while (w->next_zone < w->info->nzones)
	{
		EsZoneInfo z = es_segment_zone(w->segment, w->next_zone);

		if (walk_failed(
				w, es_segment_read(w->segment, z.first_row, z.nrows, w->wanted, 0, w->block, &damage->err),
				damage, false))
			return ES_TASK_DONE;
		for (uint32 r = 0; r < z.nrows; r++)
		{
			int64  place = place_of(w, r);
			uint32 batch;

			if (bad_place(w, place, damage))
				return ES_TASK_DONE;
			batch = w->batches[(uint64) place >> ES_PENDING_ROW_BITS];
			if (batch != UINT32_MAX)
				s->batches[batch].nrows++;
		}
		w->next_zone++;
		if (es_task_clock() >= deadline && w->next_zone < w->info->nzones)
		{
			*failed = false;
			return ES_TASK_MORE;
		}
	}
	w->counted = true;
	w->next_zone = 0;
	if (w->info->roles.context > 0)
		w->wanted[w->info->roles.context - 1] = true;
	if (w->info->roles.event_id > 0)
		w->wanted[w->info->roles.event_id - 1] = true;
	w->wanted[es_segment_ncols(w->info) + ES_PENDING_ORDINAL] = true;
	*failed = false;
	return ES_TASK_DONE;
}

/* Are all event ids and given versions of the zone NULL? */
static EsStatus
zone_has_checks(Walk *w, uint32 zone, bool *found, EsError *err)
{
	EsZoneInfo	   z = es_segment_zone(w->segment, zone);
	const EsRoles *roles = &w->info->roles;
	EsStatus	   status;

	if (roles->event_id > 0 &&
		es_segment_column_stats(w->segment, zone, roles->event_id - 1).nnulls < z.nrows)
	{
		*found = true;
		return ES_OK;
	}
	if (roles->version == 0)
		return ES_OK;
	status = es_segment_read(w->segment, z.first_row, z.nrows, w->wanted, ES_WANT_VERSION, w->block, err);
	for (uint32 r = 0; r < z.nrows && status == ES_OK && !*found; r++)
		*found = es_block_version(w->block, r) != 0;
	return status;
}

EsTaskState
es_prepare_find_checks(EsPrepareSource *s, int64 deadline, bool *found, EsDamage *damage, bool *failed)
{
	*failed = false;
	*found = s->flagged;
	for (; s->looked < s->nwalks && !*found; s->looked++)
	{
		Walk *w = &s->walks[s->looked];

		if (!open_walk(s, w, damage))
		{
			*failed = true;
			return ES_TASK_DONE;
		}
		while (w->next_zone < w->info->nzones && !*found)
		{
			if (walk_failed(w, zone_has_checks(w, w->next_zone, found, &damage->err), damage, false))
			{
				*failed = true;
				return ES_TASK_DONE;
			}
			w->next_zone++;
			if (es_task_clock() >= deadline && w->next_zone < w->info->nzones)
				return ES_TASK_MORE;
		}
		w->next_zone = 0;
	}
	s->flagged = *found;
	return ES_TASK_DONE;
}

/* Second walk: the row at hand, reading the next zone if need be; false: at the end, or failed. */
static bool
walk_row(EsPrepareSource *s, Walk *w, EsDamage *damage, bool *failed)
{
	for (;;)
	{
		while (w->row < w->zone_rows)
		{
			const EsRoles *roles = &w->info->roles;
			int64		   place = place_of(w, w->row);
			const void	  *value;
			const void	  *bytes;
			size_t		   len;
			int64		   scratch;

			if (bad_place(w, place, damage))
			{
				*failed = true;
				return false;
			}
			if (w->batches[(uint64) place >> ES_PENDING_ROW_BITS] == UINT32_MAX)
			{
				w->row++;
				w->has_hash = false;
				continue;
			}
			if (!w->has_hash)
			{
				value = es_block_value(w->block, roles->context - 1, w->row);
				w->hash = 0;
				if (value != NULL)
				{
					es_context_bytes(roles->context_class, w->info->columns[roles->context - 1].len, value,
									 &scratch, &bytes, &len);
					w->hash = es_context_hash(roles->context_class, bytes, len);
				}
				w->has_hash = true;
			}
			return true;
		}
		if (w->next_zone >= w->info->nzones)
			return false;
		if (!open_walk(s, w, damage))
			*failed = true;
		else
		{
			EsZoneInfo z = es_segment_zone(w->segment, w->next_zone++);

			*failed = walk_failed(w,
								  es_segment_read(w->segment, z.first_row, z.nrows, w->wanted,
												  ES_WANT_POSITION | ES_WANT_VERSION | ES_WANT_CONTENT_HASH,
												  w->block, &damage->err),
								  damage, false);
			w->zone_rows = z.nrows;
			w->row = 0;
			w->has_hash = false;
		}
		if (*failed)
			return false;
	}
}

static void
add_walk_row(EsPrepareSource *s, EsPrepareGroup *g, Walk *w)
{
	const EsRoles		 *roles = &w->info->roles;
	const EsPrepareRow	 *last = g->nrows > 0 ? &g->rows[g->nrows - 1] : NULL;
	EsPrepareRow		  row = {0};
	int64				  place = place_of(w, w->row);
	const EsPrepareBatch *p = &s->batches[w->batches[(uint64) place >> ES_PENDING_ROW_BITS]];
	const void			 *value = es_block_value(w->block, roles->context - 1, w->row);
	const void			 *bytes = "";
	size_t				  len = 0;
	int64				  scratch;

	row.number = p->first_number + (place & ((1 << ES_PENDING_ROW_BITS) - 1));
	if (value != NULL)
		es_context_bytes(roles->context_class, w->info->columns[roles->context - 1].len, value, &scratch,
						 &bytes, &len);
	row.len = len;
	if (last != NULL && last->len == len && memcmp(last->bytes, bytes, len) == 0)
		row.bytes = last->bytes;
	else
		row.bytes = memcpy(MemoryContextAlloc(g->context, Max(len, 1)), bytes, len);
	row.version = (int64) es_block_version(w->block, w->row);
	if (es_block_value(w->block, es_segment_ncols(w->info) + ES_PENDING_ORDINAL, w->row) != NULL)
		row.position = es_block_position(w->block, w->row);
	if (roles->event_id > 0)
		value = es_block_value(w->block, roles->event_id - 1, w->row);
	if (roles->event_id > 0 && value != NULL)
	{
		uint8	   *copy = MemoryContextAlloc(g->context, 32);
		const void *content = es_block_content_hash(w->block, w->row);

		row.event_id = memcpy(copy, value, 16);
		if (content != NULL)
			row.content = memcpy(copy + 16, content, 16);
	}
	*add_row(g) = row;
}

/* ---- groups ---- */

static EsTaskState
number_batches(EsPrepareSource *s, int64 deadline, EsDamage *damage, bool *failed)
{
	uint64 n = 0;

	for (int i = 0; i < s->nwalks; i++)
	{
		if (s->walks[i].counted)
			continue;
		if (count_rows(s, &s->walks[i], deadline, damage, failed) == ES_TASK_MORE)
			return ES_TASK_MORE;
		if (*failed)
			return ES_TASK_DONE;
	}
	for (uint32 i = 0; i < s->nbatches; i++)
	{
		s->batches[i].first_number = n;
		n += s->batches[i].nrows;
	}
	s->numbered = true;
	return ES_TASK_DONE;
}

/* group->nrows = 0 at the first call for a group; kept when it returns MORE. */
EsTaskState
es_prepare_next_group(EsPrepareSource *s, int64 deadline, EsPrepareGroup *g, EsDamage *damage, bool *failed)
{
	uint32 looked = 0;

	*failed = false;
	if (!s->numbered)
	{
		if (number_batches(s, deadline, damage, failed) == ES_TASK_MORE)
			return ES_TASK_MORE;
		if (*failed)
			return ES_TASK_DONE;
	}
	if (!s->sorted && sort_mem_rows(s, deadline) == ES_TASK_MORE)
		return ES_TASK_MORE;

	if (g->nrows == 0)
	{
		bool found = false;

		if (s->next < s->nrows)
		{
			g->hash = s->rows[s->next].hash;
			found = true;
		}
		for (int i = 0; i < s->nwalks; i++)
		{
			Walk *w = &s->walks[i];

			if (!walk_row(s, w, damage, failed))
			{
				if (*failed)
					return ES_TASK_DONE;
				continue;
			}
			if (!found || w->hash < g->hash)
				g->hash = w->hash;
			found = true;
		}
		if (!found)
			return ES_TASK_DONE;
		g->klass = (EsContextClass) s->roles.context_class;
	}

	/* in the order of numbers, mostly: what is in memory came last */
	for (int i = 0; i < s->nwalks; i++)
	{
		Walk *w = &s->walks[i];

		while (walk_row(s, w, damage, failed) && w->hash == g->hash)
		{
			add_walk_row(s, g, w);
			w->row++;
			w->has_hash = false;
			if (++looked % ROWS_PER_LOOK == 0 && es_task_clock() >= deadline)
				return ES_TASK_MORE;
		}
		if (*failed)
			return ES_TASK_DONE;
	}
	while (s->next < s->nrows && s->rows[s->next].hash == g->hash)
	{
		add_mem_row(s, g, &s->rows[s->next++]);
		if (++looked % ROWS_PER_LOOK == 0 && es_task_clock() >= deadline)
			return ES_TASK_MORE;
	}
	return ES_TASK_DONE;
}
