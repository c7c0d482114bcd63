/*-------------------------------------------------------------------------
 *
 * scan_any.c
 *	  Rows in the order in which they lie: batch by batch, zone by zone.
 *
 * Where the scan stands is a number of a source, of a batch or zone in it, and of a row in
 * that; so it can stop after any chunk.  Only the columns that are wanted or filtered by are
 * read, and of a zone that no filter can exclude everything at once, unless its rows are large.
 *
 * Counting rows without filters reads nothing of a segment whose rows are all
 * visible.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "shard/scan.h"

/* Batches that may be passed over between two looks at the clock. */
#define BATCHES_PER_LOOK 256

static void
all_rows(EsChunk *chunk, uint32 first, uint32 n)
{
	for (uint32 i = 0; i < n; i++)
		chunk->rows[i] = first + i;
	chunk->n = n;
	chunk->next = 0;
}

/* MORE: the chunk has rows, or the time is up. */
static EsTaskState
next_of_mem(EsScan *scan, const EsScanMem *m, EsChunk *chunk)
{
	uint32 passed = 0;

	while (scan->at_batch < m->nbatches)
	{
		const EsMemBatch *b = es_scan_mem_batch(m, scan->at_batch);
		uint32			  nrows = b->view.header->nrows;
		uint32			  n;

		if (++passed % BATCHES_PER_LOOK == 0 && es_task_clock() >= scan->deadline)
			return ES_TASK_MORE;
		if (scan->at_row == 0 && (!es_scan_batch_here(m, b) || !es_scan_batch_visible(scan, b)))
		{
			scan->at_batch++;
			continue;
		}
		n = Min(nrows - scan->at_row, ES_CHUNK_ROWS);
		es_chunk_of_batch(chunk, b, m->memtable == NULL);
		all_rows(chunk, scan->at_row, n);
		scan->at_row += n;
		if (scan->at_row >= nrows)
		{
			scan->at_batch++;
			scan->at_row = 0;
		}
		es_scan_thin_chunk(scan, chunk);
		if (chunk->n > 0)
			return ES_TASK_MORE;
	}
	return ES_TASK_DONE;
}

/* Counts the zone's rows without reading it, if that can be. */
static bool
count_zone(EsScan *scan, const EsScanSegment *s, const EsZoneInfo *z)
{
	uint64 n;

	if (!(scan->flags & ES_OPEN_COUNT_ONLY) || scan->nfilters > 0 || scan->bounded || !s->all_visible)
		return false;
	n = es_segment_live_rows(s->ref, z->first_row, z->first_row + z->nrows);
	n = Min(n, scan->max_rows - scan->rows_out);
	scan->rows_scanned += n;
	scan->rows_out += n;
	scan->counted += n;
	return true;
}

static EsTaskState
next_of_segment(EsScan *scan, EsScanSegment *s, EsChunk *chunk)
{
	if (!es_scan_open_segment(scan, s))
		return ES_TASK_DONE;
	if (scan->block == NULL && (scan->block = es_block_create()) == NULL)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));

	while (scan->at_batch < s->info->nzones)
	{
		EsZoneInfo z = es_segment_zone(s->segment, scan->at_batch);
		EsError	   err = {0};
		EsStatus   status;
		uint32	   n;

		if (scan->at_row == 0 && es_scan_zone_excluded(scan, s, scan->at_batch))
		{
			scan->rows_pruned += z.nrows;
			scan->at_batch++;
			continue;
		}
		if (scan->at_row == 0 && count_zone(scan, s, &z))
		{
			scan->at_batch++;
			if (scan->counted + ES_ZONE_ROWS > ES_BATCH_MAX_ROWS || scan->rows_out >= scan->max_rows)
				return ES_TASK_MORE;
			continue;
		}

		n = Min(z.nrows - scan->at_row, s->read_rows);
		status = es_segment_read(s->segment, z.first_row + scan->at_row, n, s->wanted, s->hidden, scan->block,
								 &err);
		if (status != ES_OK)
		{
			err.status = status;
			es_segment_damaged(s->ref, &err);
			es_scan_damage(scan, s->ref, &err);
			return ES_TASK_DONE;
		}
		es_chunk_of_block(chunk, s, scan->block, z.first_row + scan->at_row);
		all_rows(chunk, 0, n);
		scan->at_row += n;
		if (scan->at_row >= z.nrows)
		{
			scan->at_batch++;
			scan->at_row = 0;
		}
		es_scan_thin_chunk(scan, chunk);
		if (chunk->n > 0 || es_task_clock() >= scan->deadline)
			return ES_TASK_MORE;
	}
	return ES_TASK_DONE;
}

EsTaskState
es_scan_any_next(EsScan *scan, EsChunk *chunk)
{
	if (!scan->phase_ready)
	{
		scan->at_mem = scan->at_segment = 0;
		scan->at_batch = scan->at_row = 0;
		scan->phase_ready = true;
	}
	chunk->n = 0;
	for (; scan->at_mem < scan->nmems; scan->at_mem++)
	{
		const EsScanMem *m = &scan->mems[scan->at_mem];

		if ((m->memtable == NULL) != scan->own_phase)
			continue;
		if (next_of_mem(scan, m, chunk) == ES_TASK_MORE)
			return ES_TASK_MORE;
		scan->at_batch = scan->at_row = 0;
	}
	for (; scan->at_segment < scan->nsegments; scan->at_segment++)
	{
		EsScanSegment *s = &scan->segments[scan->at_segment];

		if (s->own != scan->own_phase)
			continue;
		if (next_of_segment(scan, s, chunk) == ES_TASK_MORE)
			return ES_TASK_MORE;
		if (scan->failed)
			return ES_TASK_DONE;
		scan->at_batch = scan->at_row = 0;
	}
	return ES_TASK_DONE;
}
