/*-------------------------------------------------------------------------
 *
 * scan_order.c
 *	  Rows in the order of positions: a merge of streams.
 *
 * Each source of the view is a stream that knows a key at or below that of its next row.  The
 * stream with the smallest key fills a chunk with all its rows up to the second smallest
 * key; since sources hardly overlap (a segment holds what was flushed
 * together) most chunks are long.  A stream whose key is only a bound learns the real one when
 * it is asked to fill, and the merge looks again; so a segment is not opened before the
 * merge has come to its lowest position.
 *
 * Keys are positions, or their complement when descending; own rows, which have none, are
 * merged by ordinal in a phase of their own.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "shard/scan.h"

void
es_scan_add_stream(EsScan *scan, EsStream *stream)
{
	if (scan->streams == NULL)
		scan->streams =
			MemoryContextAlloc(scan->task.context, (scan->nmems + scan->nsegments + 2) * sizeof(EsStream *));
	scan->streams[scan->nstreams++] = stream;
}

void
es_scan_close_streams(EsScan *scan)
{
	for (int i = 0; i < scan->nstreams; i++)
		if (scan->streams[i]->release != NULL)
			scan->streams[i]->release(scan->streams[i]);
	scan->nstreams = 0;
}

static EsTaskState
make_streams(EsScan *scan)
{
	if (scan->flags & ES_OPEN_HAS_CONTEXT)
		return es_scan_context_streams(scan);
	for (int i = 0; i < scan->nmems; i++)
		if ((scan->mems[i].memtable == NULL) == scan->own_phase)
			es_scan_add_stream(scan, es_stream_of_mem(scan, &scan->mems[i]));
	for (int i = 0; i < scan->nsegments; i++)
		if (scan->segments[i].own == scan->own_phase)
			es_scan_add_stream(scan, es_stream_of_segment(scan, &scan->segments[i]));
	return ES_TASK_DONE;
}

EsTaskState
es_scan_ordered_next(EsScan *scan, EsChunk *chunk)
{
	chunk->n = 0;
	if (!scan->phase_ready)
	{
		if (make_streams(scan) == ES_TASK_MORE)
			return ES_TASK_MORE;
		if (scan->failed)
			return ES_TASK_DONE;
		scan->phase_ready = true;
	}

	for (;;)
	{
		EsStream   *first = NULL;
		uint64		limit = UINT64_MAX;
		EsTaskState state;

		for (int i = 0; i < scan->nstreams; i++)
		{
			EsStream *s = scan->streams[i];

			if (s->key == UINT64_MAX)
				continue;
			if (first == NULL || s->key < first->key)
			{
				if (first != NULL)
					limit = first->key;
				first = s;
			}
			else if (s->key < limit)
				limit = s->key;
		}
		if (first == NULL)
		{
			es_scan_close_streams(scan);
			return ES_TASK_DONE;
		}

		state = first->fill(scan, first, limit, chunk);
		if (scan->failed)
			return ES_TASK_DONE;
		if (chunk->n > 0 || state == ES_TASK_MORE)
			return ES_TASK_MORE;
		if (es_task_clock() >= scan->deadline)
			return ES_TASK_MORE;
	}
}
