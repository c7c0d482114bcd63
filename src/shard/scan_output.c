/*-------------------------------------------------------------------------
 *
 * scan_output.c
 *	  From chunks to answers.
 *
 * Rows go into a batch builder until the batch has about the size that the reader wants.
 * The builder has the columns of the rows' source, which are fewer than the table's if
 * columns were added since: the reader knows by their number which values are missing.  When
 * a source with other columns comes, or own rows follow committed ones (an answer
 * holds either), the batch is sent as it is and a builder is made anew.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "shard/scan.h"
#include "shard/shard.h"

/* Larger answers have a buffer of their own. */
#define KEEP_BUFFER (256 * 1024)

static char *send_buffer = NULL;

/*
 * The builder of the scan that ended last, with the memory that it has grown: replays of one table
 * follow each other, and most of what a small answer costs is growing a builder.
 */
static struct
{
	EsBatchBuilder *builder; /* NULL = none */
	int				ndescs;
	EsColumnDesc   *descs;
	bool		   *wanted;
	int				allocated;
} spare;

static const EsColumnDesc *
source_desc(const EsChunk *chunk, int column)
{
	return chunk->kind == ES_CHUNK_MEM ? &chunk->batch->view.columns[column].desc
									   : &chunk->segment->info->columns[column];
}

/* Can the chunk's rows go into the builder as it is? */
static bool
builder_fits(const EsScan *scan, const EsChunk *chunk)
{
	if (scan->builder == NULL || scan->builder_own != chunk->own)
		return false;
	if (Min(chunk->ncols, scan->natts) != scan->ndescs)
		return false;
	for (int i = 0; i < scan->ncolumns; i++)
	{
		int					column = scan->columns[i];
		const EsColumnDesc *desc;

		if (column >= chunk->ncols)
			continue;
		desc = source_desc(chunk, column);
		if (desc->len != scan->descs[column].len || desc->align != scan->descs[column].align ||
			((desc->flags ^ scan->descs[column].flags) & ES_COLUMN_DROPPED))
			return false;
	}
	return true;
}

static bool
spare_fits(const EsScan *scan)
{
	return spare.builder != NULL && spare.ndescs == scan->ndescs &&
		   memcmp(spare.descs, scan->descs, scan->ndescs * sizeof(EsColumnDesc)) == 0 &&
		   memcmp(spare.wanted, scan->wanted, scan->ndescs * sizeof(bool)) == 0;
}

/* Takes the scan's builder: it becomes the spare one. */
static void
release_builder(EsScan *scan)
{
	EsBatchBuilder *builder = scan->builder;

	scan->builder = NULL;
	if (builder == NULL)
		return;
	es_batch_free(spare.builder);
	spare.builder = NULL;
	memcpy(spare.descs, scan->descs, scan->ndescs * sizeof(EsColumnDesc));
	memcpy(spare.wanted, scan->wanted, scan->ndescs * sizeof(bool));
	spare.ndescs = scan->ndescs;
	es_batch_reset(builder, &scan->builder_meta); /* gives back what is much */
	spare.builder = builder;
}

static void
make_builder(EsScan *scan, const EsChunk *chunk)
{
	EsBatchMeta meta = {0};

	release_builder(scan);
	if (scan->descs == NULL)
		scan->descs = MemoryContextAlloc(scan->task.context, Max(scan->natts, 1) * sizeof(EsColumnDesc));
	scan->ndescs = Min(chunk->ncols, scan->natts);
	for (int i = 0; i < scan->ndescs; i++)
		scan->descs[i] = *source_desc(chunk, i);
	if (spare.allocated < scan->ndescs)
	{
		es_batch_free(spare.builder);
		spare.builder = NULL;
		spare.allocated = 0;
		if (spare.descs != NULL)
			pfree(spare.descs);
		if (spare.wanted != NULL)
			pfree(spare.wanted);
		spare.descs = NULL;
		spare.wanted = NULL;
		spare.descs = MemoryContextAlloc(TopMemoryContext, scan->ndescs * sizeof(EsColumnDesc));
		spare.wanted = MemoryContextAlloc(TopMemoryContext, scan->ndescs * sizeof(bool));
		spare.allocated = scan->ndescs;
	}
	if (spare_fits(scan))
	{
		scan->builder = spare.builder;
		spare.builder = NULL;
	}
	else
		scan->builder = es_batch_create(scan->descs, scan->ndescs, scan->wanted);
	if (scan->builder == NULL)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
	scan->builder_own = chunk->own;

	meta.table = scan->table;
	meta.roles = *chunk->roles;
	meta.relid = chunk->relid;
	meta.flags = chunk->own ? ES_BATCH_OWN_ROWS : 0;
	meta.with_positions = true;
	es_batch_reset(scan->builder, &meta);
	scan->builder_meta = meta;
	scan->next_check = 1;
}

/* Fills scan->values with the row's wanted columns. */
static void
row_values(EsScan *scan, const EsChunk *chunk, uint32 row, int64 *position, int64 *version, bool has_position,
		   bool has_version)
{
	int position_column = chunk->roles->position - 1;
	int version_column = chunk->roles->version - 1;

	for (int i = 0; i < scan->ncolumns; i++)
	{
		int			column = scan->columns[i];
		const void *value;

		if (chunk->kind == ES_CHUNK_WINDOW)
			value = chunk->window->rows[row].values[i];
		else if (column == position_column)
			value = has_position ? position : NULL;
		else if (column == version_column)
			value = has_version ? version : NULL;
		else
			value = es_chunk_value(chunk, column, row);
		scan->values[column] = value;
	}
}

static EsStatus
put_row(EsScan *scan, const EsChunk *chunk, uint32 row)
{
	EsPosition position = es_chunk_position(scan, chunk, row);
	int64	   version = es_chunk_version(scan, chunk, row);
	int64	   shown_position = (int64) position;
	int64	   shown_version = version;
	bool	   has_position = true;
	bool	   has_version = version != 0;

	if (chunk->own && chunk->kind != ES_CHUNK_WINDOW)
	{
		has_position =
			chunk->roles->position > 0 && es_chunk_role_value(scan, chunk, true, row, &shown_position);
		has_version =
			chunk->roles->version > 0 && es_chunk_role_value(scan, chunk, false, row, &shown_version);
	}
	row_values(scan, chunk, row, &shown_position, &shown_version, has_position, has_version);
	return es_batch_add(scan->builder, scan->values, es_batch_nrows(scan->builder), 0, position,
						(uint64) version);
}

EsOutput
es_scan_put_chunk(EsScan *scan, EsChunk *chunk)
{
	if (chunk->n > scan->max_rows - scan->rows_out)
		chunk->n = (uint32) (scan->max_rows - scan->rows_out);
	if (scan->flags & ES_OPEN_COUNT_ONLY)
	{
		scan->counted += chunk->n;
		scan->rows_out += chunk->n;
		chunk->n = 0;
		return scan->counted + ES_CHUNK_ROWS > ES_BATCH_MAX_ROWS ? ES_OUTPUT_FULL : ES_OUTPUT_ROOM;
	}
	if (chunk->n == 0)
		return ES_OUTPUT_ROOM;

	if (!builder_fits(scan, chunk))
	{
		if (scan->builder != NULL && es_batch_nrows(scan->builder) > 0)
			return ES_OUTPUT_FULL;
		make_builder(scan, chunk);
	}
	while (chunk->n > 0)
	{
		uint32	 nrows = es_batch_nrows(scan->builder);
		EsStatus status;

		if (nrows >= scan->next_check)
		{
			Size size = es_batch_size(scan->builder);
			Size per_row = size / nrows + 1;

			if (size >= scan->batch_bytes)
				return ES_OUTPUT_FULL;
			/* look again half-way to where the average says that it is full */
			scan->next_check = nrows + 1 + (uint32) Min((scan->batch_bytes - size) / per_row / 2, 65536);
		}
		status = put_row(scan, chunk, chunk->rows[chunk->next]);
		if (status == ES_ERR_TOO_LARGE && nrows > 0)
			return ES_OUTPUT_FULL;
		if (status == ES_ERR_NOMEM)
			ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
		if (status != ES_OK)
			ereport(ERROR, (errcode(status == ES_ERR_TOO_LARGE ? ERRCODE_PROGRAM_LIMIT_EXCEEDED
															   : ERRCODE_INTERNAL_ERROR),
							errmsg("a row of event storage " UINT64_FORMAT " does not fit into an answer",
								   scan->table.storage_id)));
		chunk->next++;
		chunk->n--;
		scan->rows_out++;
	}
	return ES_OUTPUT_ROOM;
}

bool
es_scan_output_pending(const EsScan *scan)
{
	return scan->counted > 0 || (scan->builder != NULL && es_batch_nrows(scan->builder) > 0);
}

void
es_scan_send(EsScan *scan, bool last)
{
	EsDataAnswer  answer = {0};
	EsBatchHeader counted = {0};
	EsPart		  parts[3];
	int			  nparts = 0;
	void		 *buffer = NULL;

	answer.answer.type = ES_REQ_OPEN;
	answer.answer.id = scan->task.id;
	answer.answer.flags = last ? ES_ANSWER_LAST : 0;
	answer.rows_scanned = scan->rows_scanned;
	answer.rows_pruned = scan->rows_pruned;
	parts[nparts++] = (EsPart){&answer, sizeof(answer)};

	if (scan->flags & ES_OPEN_COUNT_ONLY)
	{
		if (scan->counted > 0)
		{
			counted.magic = ES_BATCH_MAGIC;
			counted.total_len = sizeof(counted);
			counted.nrows = (uint32) scan->counted;
			counted.table = scan->table;
			answer.nrows = scan->counted;
			answer.batch_len = sizeof(counted);
			parts[nparts++] = (EsPart){&counted, sizeof(counted)};
			scan->counted = 0;
		}
	}
	else if (scan->builder != NULL && es_batch_nrows(scan->builder) > 0)
	{
		Size	 size = es_batch_size(scan->builder);
		EsStatus status;

		if (size > KEEP_BUFFER)
			buffer = MemoryContextAllocHuge(scan->task.context, size);
		else if (send_buffer == NULL)
			send_buffer = MemoryContextAlloc(TopMemoryContext, KEEP_BUFFER);
		status = es_batch_finish(scan->builder, buffer != NULL ? buffer : send_buffer, size);
		if (status != ES_OK)
			ereport(ERROR, (errcode(ERRCODE_INTERNAL_ERROR),
							errmsg("could not build an answer: status %d", (int) status)));
		answer.nrows = es_batch_nrows(scan->builder);
		answer.batch_len = size;
		parts[nparts++] = (EsPart){buffer != NULL ? buffer : send_buffer, size};
		es_batch_reset(scan->builder, &scan->builder_meta);
		scan->next_check = 1;
	}
	if (last && scan->nskipped > 0)
	{
		es_scan_skip_sort(scan);
		answer.nskipped = scan->nskipped;
		parts[nparts++] = (EsPart){scan->skipped, scan->nskipped * sizeof(EsFxid)};
	}
	ES_COUNT(rows_sent, answer.nrows);
	es_conn_send(scan->task.conn, &answer.answer, parts, nparts);
	if (buffer != NULL)
		pfree(buffer);
	if (scan->credit > 0)
		scan->credit--;
}

void
es_scan_output_free(EsScan *scan)
{
	release_builder(scan);
}
