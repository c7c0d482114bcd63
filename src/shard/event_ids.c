/*-------------------------------------------------------------------------
 *
 * event_ids.c
 *	  Committed events of a context by their event ids.
 *
 * An event id is unique within its context, so only the context's rows are looked at:
 * in MemTables by the index, in segments the one range that the context index names,
 * of which nothing but ids and what belongs to them is read.  For a context with many
 * events a filter (event_filter.c) mostly says at once that there is no such id.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "shard/heads.h"

/* A context in which so many rows were looked at gets a filter. */
#define MANY_ROWS 1000

static EsRowBlock *block;

/* Returns the number of ids looked at. */
static uint64
probe_memtables(const EsContextId *c, const EsEventProbe *probe)
{
	uint64 looked = 0;

	for (EsMemTable *mt = es_memtable_oldest; mt != NULL; mt = mt->next)
	{
		EsMemStore *store = es_memtable_store(mt, c->table, false);
		uint64		cursor = 0;
		EsMemBatch *b;
		uint32		number;
		uint32		row;

		if (store == NULL || store->roles.event_id == 0)
			continue;
		while (es_memstore_next(store, c->hash, UINT32_MAX, &cursor, &b, &number, &row))
		{
			const EsBatchHeader *h = b->view.header;
			int					 column = h->roles.event_id - 1;
			const uint8			*id;
			EsEventFound		 found;

			if (column < 0 || es_batch_is_null(&b->view, column, row))
				continue;
			looked++;
			id = es_batch_value(&b->view, column, row);
			if (!probe->wanted(probe->arg, id) || es_membatch_skipped(b, row) ||
				!es_membatch_in_context(b, row, c->bytes, c->len) ||
				es_txn_verdict(b->txn) != ES_VERDICT_COMMITTED)
				continue;
			found.version = es_membatch_version(b, row);
			found.position = es_membatch_position(b, row);
			found.fxid = b->txn->fxid;
			found.content =
				(h->flags & ES_BATCH_HAS_CONTENT_HASH) == 0 || es_batch_is_null(&b->view, h->ncols - 1, row)
					? NULL
					: es_batch_value(&b->view, h->ncols - 1, row);
			probe->found(probe->arg, id, &found);
		}
	}
	return looked;
}

/* Rows [first, first + n), all of one context. */
static EsStatus
walk_range(EsSegment *seg, uint64 first, uint64 n, uint32 hidden, EsEventIdCallback callback, void *arg,
		   EsError *err)
{
	const EsSegmentInfo *info = es_segment_info(seg);
	int					 column = info->roles.event_id - 1;
	bool				*wanted = palloc0(info->ncols * sizeof(bool));
	uint64				 end = first + n;
	uint64				 row = first;
	EsStatus			 status = ES_OK;

	wanted[column] = true;
	while (row < end && status == ES_OK)
	{
		uint32	   number = Min((uint32) (row / ES_ZONE_ROWS), info->nzones - 1);
		EsZoneInfo z = es_segment_zone(seg, number);
		uint32	   rows;

		while (row < z.first_row && number > 0)
			z = es_segment_zone(seg, --number);
		while (row >= z.first_row + z.nrows && number + 1 < info->nzones)
			z = es_segment_zone(seg, ++number);
		rows = (uint32) (Min(end, z.first_row + z.nrows) - row);
		if (es_segment_column_stats(seg, number, column).nnulls < z.nrows)
		{
			status = es_segment_read(seg, row, rows, wanted, hidden, block, err);
			for (uint32 r = 0; r < rows && status == ES_OK; r++)
			{
				const uint8 *id = es_block_value(block, column, r);

				if (id != NULL)
					callback(arg, row + r, id, block, r);
			}
		}
		row += rows;
	}
	pfree(wanted);
	return status;
}

bool
es_event_ids_walk(const EsContextId *c, EsSegmentRef *ref, uint32 hidden, EsEventIdCallback callback,
				  void *arg, EsDamage *damage)
{
	EsError	  *err = &damage->err;
	EsSegment *seg;
	uint64	   first;
	uint64	   n;
	uint32	   entry;
	EsStatus   status;

	damage->path = es_segment_path(ref);
	memset(err, 0, sizeof(*err));
	seg = es_segment_handle(ref, err);
	if (seg == NULL)
		return false;
	if (es_segment_info(seg)->roles.event_id == 0)
		return true;
	if (block == NULL && (block = es_block_create()) == NULL)
	{
		es_fail(err, ES_ERR_NOMEM, 0, "out of memory");
		return false;
	}
	status = es_segment_find_context(seg, c->hash, c->bytes, c->len, &first, &n, &entry, err);
	if (status == ES_OK && n > 0)
		status = walk_range(seg, first, n, hidden, callback, arg, err);
	if (status != ES_OK)
	{
		err->status = status;
		es_segment_damaged(ref, err);
		return false;
	}
	return true;
}

/* A segment that is being probed. */
typedef struct SegmentProbe
{
	const EsEventProbe *probe;
	EsSegmentRef	   *ref;
	uint64				looked;
} SegmentProbe;

static void
probe_row(void *arg, uint64 row, const uint8 *id, const EsRowBlock *b, uint32 r)
{
	SegmentProbe *p = arg;
	EsEventFound  found;

	p->looked++;
	if (!p->probe->wanted(p->probe->arg, id) || es_segment_row_dead(p->ref, row))
		return;
	/* adopted in place: es_segment_contexts was called */
	found.version = p->ref->entry.first_versions != NULL ? es_segment_row_version(p->ref, row)
														 : (int64) es_block_version(b, r);
	found.position = es_segment_row_position(p->ref, es_block_position(b, r));
	found.fxid = es_block_fxid(b, r);
	found.content = es_block_content_hash(b, r);
	p->probe->found(p->probe->arg, id, &found);
}

static bool
probe_segment(const EsContextId *c, SegmentProbe *p, EsDamage *damage)
{
	if (p->ref->entry.first_versions != NULL)
	{
		EsSegment *seg;

		damage->path = es_segment_path(p->ref);
		seg = es_segment_handle(p->ref, &damage->err);
		if (seg == NULL || !es_segment_contexts(p->ref, seg, &damage->err))
			return false;
	}
	return es_event_ids_walk(c, p->ref,
							 ES_WANT_CONTENT_HASH | ES_WANT_POSITION | ES_WANT_VERSION | ES_WANT_FXID,
							 probe_row, p, damage);
}

bool
es_event_ids_probe(const EsContextId *context, const EsEventProbe *probe, EsDamage *damage)
{
	SegmentProbe   p = {.probe = probe};
	EsSegmentRef **refs;
	int			   n;
	bool		   ok = true;
	bool		   absent;

	if (!es_event_filter_absent(context, probe->ids, probe->nids, &absent, damage))
		return false;
	if (absent)
		return true;

	p.looked = probe_memtables(context, probe);
	refs = es_segments_of(context->table, &n);
	for (int i = 0; i < n; i++)
	{
		p.ref = refs[i];
		if (ok && (!p.ref->entry.pending || p.ref->finished) &&
			es_segment_verdict(p.ref) == ES_VERDICT_COMMITTED)
			ok = probe_segment(context, &p, damage);
		es_segment_unref(p.ref);
	}
	if (refs != NULL)
		pfree(refs);
	if (ok && p.looked >= MANY_ROWS)
		es_event_filter_make(context, p.looked);
	return ok;
}
