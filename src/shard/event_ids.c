/*-------------------------------------------------------------------------
 *
 * event_ids.c
 *	  Committed events of a context by their event ids.
 *
 * An event id is unique within its context, so only the context's rows are looked at:
 * in MemTables by the index, in segments the one range that the context index names,
 * of which nothing but ids and content hashes is read, and versions only where an id matches.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "shard/heads.h"

static EsRowBlock *block;

static void
probe_memtables(const EsContextId *c, const EsEventProbe *probe)
{
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
			int			column = h->roles.event_id - 1;
			const uint8 *id;
			EsEventFound found;

			if (column < 0 || es_batch_is_null(&b->view, column, row))
				continue;
			id = es_batch_value(&b->view, column, row);
			if (!probe->wanted(probe->arg, id) || es_membatch_skipped(b, row) ||
				!es_membatch_in_context(b, row, c->bytes, c->len) ||
				es_txn_verdict(b->txn) != ES_VERDICT_COMMITTED)
				continue;
			found.version = es_membatch_version(b, row);
			found.position = es_membatch_position(b, row);
			found.fxid = b->txn->fxid;
			found.content = (h->flags & ES_BATCH_HAS_CONTENT_HASH) == 0 ||
				es_batch_is_null(&b->view, h->ncols - 1, row) ? NULL :
				es_batch_value(&b->view, h->ncols - 1, row);
			probe->found(probe->arg, id, &found);
		}
	}
}

/* Rows [first, first + n), all of one context. */
static EsStatus
probe_range(EsSegmentRef *ref, EsSegment *seg, const EsEventProbe *probe, uint64 first, uint64 n,
			uint32 entry, EsError *err)
{
	const EsSegmentInfo *info = es_segment_info(seg);
	bool	   *wanted = palloc0(info->ncols * sizeof(bool));
	uint64		end = first + n;
	uint64		row = first;
	EsStatus	status = ES_OK;

	wanted[info->roles.event_id - 1] = true;
	while (row < end && status == ES_OK)
	{
		uint32		number = Min((uint32) (row / ES_ZONE_ROWS), info->nzones - 1);
		EsZoneInfo	z = es_segment_zone(seg, number);
		uint32		rows;

		while (row < z.first_row && number > 0)
			z = es_segment_zone(seg, --number);
		while (row >= z.first_row + z.nrows && number + 1 < info->nzones)
			z = es_segment_zone(seg, ++number);
		rows = (uint32) (Min(end, z.first_row + z.nrows) - row);
		if (es_segment_column_stats(seg, number, info->roles.event_id - 1).nnulls == z.nrows)
		{
			row += rows;
			continue;
		}
		status = es_segment_read(seg, row, rows, wanted,
								 ES_WANT_CONTENT_HASH | ES_WANT_POSITION | ES_WANT_VERSION | ES_WANT_FXID,
								 block, err);
		for (uint32 r = 0; r < rows && status == ES_OK; r++)
		{
			const uint8 *id = es_block_value(block, info->roles.event_id - 1, r);
			EsEventFound found;

			if (id == NULL || !probe->wanted(probe->arg, id) || es_segment_row_dead(ref, row + r))
				continue;
			found.version = (int64) es_block_version(block, r);
			if (ref->entry.first_versions != NULL && entry < ref->entry.nfirst_versions)
				found.version = ref->entry.first_versions[entry] +
					(int64) es_segment_live_rows(ref, first, row + r);
			found.position = es_segment_row_position(ref, es_block_position(block, r));
			found.fxid = es_block_fxid(block, r);
			found.content = es_block_content_hash(block, r);
			probe->found(probe->arg, id, &found);
		}
		row += rows;
	}
	pfree(wanted);
	return status;
}

static bool
probe_segment(const EsContextId *c, const EsEventProbe *probe, EsSegmentRef *ref, EsDamage *damage)
{
	EsError    *err = &damage->err;
	EsSegment  *seg;
	uint64		first;
	uint64		n;
	uint32		entry;
	EsStatus	status;

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
		status = probe_range(ref, seg, probe, first, n, entry, err);
	if (status != ES_OK)
	{
		err->status = status;
		es_segment_damaged(ref, err);
		return false;
	}
	return true;
}

bool
es_event_ids_probe(const EsContextId *context, const EsEventProbe *probe, EsDamage *damage)
{
	int			n;
	EsSegmentRef **refs;
	bool		ok = true;

	probe_memtables(context, probe);
	refs = es_segments_of(context->table, &n);
	for (int i = 0; i < n; i++)
	{
		EsSegmentRef *ref = refs[i];

		if (ok && (!ref->entry.pending || ref->finished) &&
			es_segment_verdict(ref) == ES_VERDICT_COMMITTED)
			ok = probe_segment(context, probe, ref, damage);
		es_segment_unref(ref);
	}
	if (refs != NULL)
		pfree(refs);
	return ok;
}
