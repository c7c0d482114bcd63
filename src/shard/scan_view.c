/*-------------------------------------------------------------------------
 *
 * scan_view.c
 *	  What a scan reads: own rows, MemTables, segments, as they are when it opens.
 *
 * The loop is single-threaded and OPEN comes after everything that the ready bitmap showed
 * was taken, so one look at the shard's lists is a consistent view.  It stays readable by
 * references: on the staged batches of the reader's own transaction, on MemTables
 * (whose arrays only grow: the number of batches is noted) and on segments.
 *
 * Nothing that becomes true later can matter to the scan: a transaction that
 * finishes after OPEN was running for the snapshot.  Hence a pending
 * segment of another transaction that has no FINISH yet is left out at once.
 *
 * A batch that may not go into a segment when its MemTable is flushed is added to the active
 * MemTable as well (memtable.h), all of them at once.  Who opens after that finds them there and
 * leaves them out of the older one; who opens before reads them where they were,
 * whatever happens meanwhile.
 *
 * Visibility is PostgreSQL's: es_row_visibility with the verdict of the row's transaction.  One
 * answer holds for all rows of a transaction, except its own reader's, which go by
 * command id.  Segments hold committed rows only; whether their transactions
 * were finished for the snapshot is asked once per segment if the newest was, else per row.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "shard/scan.h"
#include "shard/shard.h"

/* Rows of a block are bounded by this, whatever their size. */
#define BLOCK_BYTES (2 * 1024 * 1024)

/* ---- visibility ---- */

void
es_scan_skip(EsScan *scan, EsFxid fxid)
{
	if (scan->nskipped > 0 && scan->skipped[scan->nskipped - 1] == fxid)
		return;
	if (scan->nskipped == scan->skipped_allocated)
	{
		/* rows of many transactions come interleaved: only distinct xids are kept */
		es_scan_skip_sort(scan);
		if (scan->nskipped * 2 >= scan->skipped_allocated)
		{
			uint32 allocated = Max(64, scan->skipped_allocated * 2);

			if (scan->skipped == NULL)
				scan->skipped = MemoryContextAlloc(scan->task.context, allocated * sizeof(EsFxid));
			else
				scan->skipped = repalloc_huge(scan->skipped, (Size) allocated * sizeof(EsFxid));
			scan->skipped_allocated = allocated;
		}
	}
	scan->skipped[scan->nskipped++] = fxid;
}

static int
compare_fxids(const void *a, const void *b)
{
	EsFxid x = *(const EsFxid *) a;
	EsFxid y = *(const EsFxid *) b;

	return x < y ? -1 : x > y;
}

void
es_scan_skip_sort(EsScan *scan)
{
	uint32 kept = 0;

	if (scan->nskipped == 0)
		return;
	qsort(scan->skipped, scan->nskipped, sizeof(EsFxid), compare_fxids);
	for (uint32 i = 1; i < scan->nskipped; i++)
		if (scan->skipped[i] != scan->skipped[kept])
			scan->skipped[++kept] = scan->skipped[i];
	scan->nskipped = kept + 1;
}

/* A finished transaction that is not the reader's. */
static bool
txn_visible(EsScan *scan, EsTxn *txn)
{
	EsVisibility v = es_row_visibility(&scan->snapshot, txn->fxid, txn->verdict);

	/*
	 * A transaction that was finished for the snapshot has left the process array, so a verdict
	 * is there.  UNKNOWN could only mean that the reader's snapshot is not one of this server.
	 */
	if (v == ES_ASK_VERDICT)
		v = es_txn_verdict(txn) == ES_VERDICT_COMMITTED ? ES_VISIBLE : ES_INVISIBLE;
	if (v == ES_INVISIBLE && (scan->flags & ES_OPEN_REPORT_SKIPPED) &&
		es_txn_verdict(txn) != ES_VERDICT_ABORTED)
		es_scan_skip(scan, txn->fxid);
	return v == ES_VISIBLE;
}

bool
es_scan_batch_visible(EsScan *scan, const EsMemBatch *b)
{
	if (b->txn->fxid == scan->snapshot.own)
		return (scan->flags & ES_OPEN_NO_OWN) == 0;
	if (b->txn != scan->asked)
	{
		scan->asked_visible = txn_visible(scan, b->txn);
		scan->asked = b->txn;
	}
	return scan->asked_visible;
}

/* ---- own rows ---- */

static void
open_own(EsScan *scan)
{
	EsTxn	  *txn;
	EsScanMem *m;
	uint32	   n = 0;
	dlist_iter iter;

	if (scan->snapshot.own == 0 || (scan->flags & ES_OPEN_NO_OWN) || scan->below != UINT64_MAX)
		return;
	txn = es_txn_find(scan->snapshot.own);
	if (txn == NULL)
		return;
	dlist_foreach(iter, &txn->staged)
	{
		const EsMemBatch *b = dlist_container(EsMemBatch, node, iter.cur);

		n += es_table_key_equal(&b->view.header->table, &scan->table);
	}
	if (n == 0)
		return;

	m = &scan->mems[scan->nmems];
	memset(m, 0, sizeof(*m));
	m->own = palloc(n * sizeof(EsMemBatch *));
	dlist_foreach(iter, &txn->staged)
	{
		EsMemBatch *b = dlist_container(EsMemBatch, node, iter.cur);

		if (!es_table_key_equal(&b->view.header->table, &scan->table) ||
			es_start_in(scan->dead, scan->ndead, b->start))
			continue;
		es_membatch_ref(b);
		m->own[m->nbatches++] = b;
	}
	scan->has_own = true;
	scan->nmems++;
}

/* Rows that others have staged: a SERIALIZABLE reader conflicts with them as with
 * uncommitted rows in a heap. */
static void
report_staged(EsScan *scan)
{
	dlist_iter iter;
	dlist_iter at;

	dlist_foreach(iter, &es_txn_undecided)
	{
		EsTxn *txn = dlist_container(EsTxn, node, iter.cur);
		bool   conflict = false;

		if (txn->finished || txn->fxid == scan->snapshot.own || txn->verdict == ES_VERDICT_ABORTED)
			continue;
		dlist_foreach(at, &txn->staged)
		{
			const EsMemBatch *b = dlist_container(EsMemBatch, node, at.cur);
			uint32			  nrows = b->view.header->nrows;

			if (!es_table_key_equal(&b->view.header->table, &scan->table))
				continue;
			if (scan->context == NULL)
				conflict = true;
			for (uint32 row = 0; row < nrows && !conflict; row++)
				conflict = es_membatch_in_context(b, row, scan->context, scan->context_len);
			if (conflict)
				break;
		}
		if (conflict)
			es_scan_skip(scan, txn->fxid);
	}
}

/* ---- segments ---- */

/* Own rows of a pending segment: which batches count. */
static void
judge_own_batches(EsScan *scan, EsScanSegment *s)
{
	const EsManifestEntry *e = &s->ref->entry;

	if (scan->ndead == 0)
		return;
	for (uint32 i = 0; i < e->nstarts; i++)
	{
		if (!es_start_in(scan->dead, scan->ndead, e->starts[i]))
			continue;
		if (s->dead_batches == NULL)
			s->dead_batches = palloc0(e->nstarts * sizeof(bool));
		s->dead_batches[i] = true;
	}
}

/* Is there anything to read in it for this snapshot? */
static bool
judge_segment(EsScan *scan, EsScanSegment *s)
{
	EsSegmentRef			*ref = s->ref;
	const EsManifestSegment *m = &ref->entry.segment;
	EsFxid					 own = scan->snapshot.own;

	/* finished without a live row: it goes when no replay needs it any more */
	if ((ref->finished || ref->entry.adopted) && ref->entry.nlive == 0)
		return false;
	if (ref->txn != NULL || ref->entry.pending)
	{
		/* one transaction */
		if (own != 0 && m->min_fxid == own)
		{
			if (scan->flags & ES_OPEN_NO_OWN)
				return false;
			if (ref->finished || !ref->entry.pending)
				s->own_finished = true;
			else if (scan->below != UINT64_MAX)
				return false;
			else
			{
				s->own = true;
				judge_own_batches(scan, s);
			}
			return true;
		}
		if (ref->entry.pending && !ref->finished)
		{
			if ((scan->flags & ES_OPEN_REPORT_SKIPPED) &&
				(ref->txn == NULL || ref->txn->verdict != ES_VERDICT_ABORTED))
				es_scan_skip(scan, m->min_fxid);
			return false;
		}
		s->all_visible = true;
		return ref->txn != NULL ? txn_visible(scan, ref->txn)
								: !es_snapshot_running(&scan->snapshot, m->min_fxid);
	}
	if (es_all_visible(&scan->snapshot, m->max_fxid))
		s->all_visible = true;
	else if (m->min_fxid >= scan->snapshot.xmax && (scan->flags & ES_OPEN_REPORT_SKIPPED) == 0)
		return false;
	return true;
}

/* Do the bounds on positions leave anything of it? */
static bool
segment_in_bounds(const EsScan *scan, const EsScanSegment *s)
{
	const EsManifestEntry *e = &s->ref->entry;

	if (!scan->bounded || s->own || e->segment.max_position == 0)
		return true;
	return e->segment.max_position > scan->after && e->segment.min_position < scan->below;
}

static void
open_segments(EsScan *scan)
{
	EsSegmentRef **refs;
	int			   n;

	refs = es_segments_of(&scan->table, &n);
	if (n == 0)
		return;
	scan->segments = palloc0(n * sizeof(EsScanSegment));
	for (int i = 0; i < n; i++)
	{
		EsScanSegment *s = &scan->segments[scan->nsegments];

		memset(s, 0, sizeof(*s));
		s->ref = refs[i];
		if (!segment_in_bounds(scan, s))
			scan->rows_pruned += refs[i]->entry.segment.nrows;
		else if (judge_segment(scan, s))
		{
			scan->nsegments++;
			continue;
		}
		es_segment_unref(refs[i]);
	}
	pfree(refs);
}

void
es_scan_open_view(EsScan *scan)
{
	int n = 1;

	for (EsMemTable *mt = es_memtable_oldest; mt != NULL; mt = mt->next)
		n++;
	scan->mems = palloc(n * sizeof(EsScanMem));
	for (EsMemTable *mt = es_memtable_oldest; mt != NULL; mt = mt->next)
	{
		EsMemStore *store = es_memtable_store(mt, &scan->table, false);

		if (store == NULL || store->nbatches == 0)
			continue;
		es_memtable_ref(mt);
		scan->mems[scan->nmems++] =
			(EsScanMem){.memtable = mt, .store = store, .nbatches = store->nbatches, .carried = mt->carried};
	}
	open_own(scan);
	open_segments(scan);
	if (scan->flags & ES_OPEN_REPORT_SKIPPED)
		report_staged(scan);
}

void
es_scan_close_view(EsScan *scan)
{
	for (int i = 0; i < scan->nmems; i++)
	{
		EsScanMem *m = &scan->mems[i];

		if (m->memtable != NULL)
			es_memtable_unref(m->memtable);
		else
			for (uint32 b = 0; b < m->nbatches; b++)
				es_membatch_unref(m->own[b]);
	}
	scan->nmems = 0;
	for (int i = 0; i < scan->nsegments; i++)
		es_segment_unref(scan->segments[i].ref);
	scan->nsegments = 0;
}

/* ---- reading a segment ---- */

void
es_scan_damage(EsScan *scan, EsSegmentRef *ref, const EsError *err)
{
	es_segment_send_error(scan->task.conn, ES_REQ_OPEN, scan->task.id, es_segment_path(ref), err);
	scan->failed = true;
}

static bool
column_needed(const EsScan *scan, int column)
{
	return column < scan->natts && scan->needed[column];
}

bool
es_scan_open_segment(EsScan *scan, EsScanSegment *s)
{
	EsError				 err;
	MemoryContext		 old;
	const EsSegmentInfo *info;
	uint64				 row_bytes;
	bool				 versions;

	if (s->segment != NULL)
	{
		/* tells the cache that it is in use */
		(void) es_segment_handle(s->ref, &err);
		return true;
	}
	s->segment = es_segment_handle(s->ref, &err);
	if (s->segment == NULL)
	{
		es_scan_damage(scan, s->ref, &err);
		return false;
	}
	s->info = info = es_segment_info(s->segment);
	s->ncols = es_segment_ncols(info);

	old = MemoryContextSwitchTo(scan->task.context);
	s->wanted = palloc0(Max(info->ncols, 1) * sizeof(bool));
	MemoryContextSwitchTo(old);
	for (int i = 0; i < s->ncols; i++)
		s->wanted[i] = column_needed(scan, i);
	if (s->own || s->own_finished)
	{
		s->wanted[s->ncols + ES_PENDING_PLACE] = true;
		s->wanted[s->ncols + ES_PENDING_CID] = true;
		s->wanted[s->ncols + ES_PENDING_ORDINAL] = true;
	}

	versions = info->roles.version > 0 && ((scan->ordered && !(scan->flags & ES_OPEN_COUNT_ONLY)) ||
										   column_needed(scan, info->roles.version - 1));
	if (!(scan->flags & ES_OPEN_COUNT_ONLY) || scan->bounded || scan->ordered ||
		(info->roles.position > 0 && column_needed(scan, info->roles.position - 1)))
		s->hidden |= ES_WANT_POSITION;
	if (versions)
	{
		s->hidden |= ES_WANT_VERSION;
		if (s->ref->entry.first_versions != NULL && !es_segment_contexts(s->ref, s->segment, &err))
		{
			es_scan_damage(scan, s->ref, &err);
			return false;
		}
	}
	if (!s->all_visible && !s->own && !s->own_finished)
		s->hidden |= ES_WANT_FXID;

	row_bytes = info->summary.nrows > 0 ? info->summary.raw_bytes / info->summary.nrows : 0;
	s->read_rows = (uint32) Max(16, Min(ES_CHUNK_ROWS, BLOCK_BYTES / Max(row_bytes, 1)));
	return true;
}
