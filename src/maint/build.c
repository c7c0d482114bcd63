/*-------------------------------------------------------------------------
 *
 * build.c
 *	  From the batches of a job to a segment file.
 *
 * Rows stay where they are, in the shard's arena: what is sorted is one entry of 16
 * bytes per row (context hash, batch, row).  Batches are first put in the order
 * of their first positions, so that entries sorted by (hash, batch, row) are nearly always in
 * sort order already.  Only in a run of equal hashes it is looked whether the contexts are
 * the same and the positions ascend; if not (two contexts with one hash, or given
 * positions), that run is sorted by what really counts.
 *
 * A SPILL job's segment has ES_PENDING_COLUMNS columns more than its table, and
 * ordinals for positions unless they are given: see shard/segments.h.
 *
 * The arena is only read.  The shard holds a reference on every batch of the job until
 * the job is finished; if the shard dies, the memory stays as long as we are attached,
 * and the job is given up at the next look at the generation.
 *
 * The file has a temporary name and O_EXCL.  Whatever fails, a failed fsync included, the file
 * is removed and the shard starts again with a new one: pages that failed to
 * reach the disk are never tried a second time.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <fcntl.h>
#include <unistd.h>

#include "miscadmin.h"
#include "pgstat.h"
#include "storage/fd.h"

#include "core/batch.h"
#include "core/route.h"
#include "core/segment.h"
#include "guc.h"
#include "ipc/fault.h"
#include "ipc/shmem.h"
#include "maint/maint.h"
#include "shard/files.h"
#include "shard/segments.h"

#define WRITE_BUFFER   (256 * 1024)
#define WRITEBACK_STEP (4 * 1024 * 1024) /* the kernel is asked to begin writing this often */
#define INTERRUPT_ROWS 1024

/* A batch of the job, in the worker's own memory. */
typedef struct Source
{
	EsBatchView	 view;
	const int64 *versions; /* NULL = by the column, or none */
	const uint8 *skip;	   /* NULL = all rows */
	EsPosition	 base;
	EsFxid		 fxid;
	EsPosition	 first_position; /* what sources are ordered by */
	uint32		 number;		 /* in the job */
	bool		 given_positions;
	bool		 given_versions;
	bool		 has_hash;
} Source;

typedef struct Entry
{
	uint64 hash;
	uint32 source;
	uint32 row;
} Entry;

typedef struct Output
{
	const char *path;
	int			fd;
	char	   *buffer;
	Size		used;
	uint64		written;   /* bytes given to the kernel */
	uint64		writeback; /* bytes it was asked to write */
	int			error;	   /* errno of a failed write */
} Output;

typedef struct Builder
{
	const EsJob	 *job;
	bool		  pending;
	Source		 *sources;
	uint32		  nsources;
	Entry		 *entries;
	uint64		  nentries;
	EsRoles		  roles;
	uint32		  relid;
	EsColumnDesc *columns; /* of the segment: the table's, then those of a pending one */
	int			  ntable;  /* the table's */
	int			  ncols;
	bool		  has_hash;
} Builder;

/* ---- sorting ---- */

static inline int
compare_entries(const Entry *a, const Entry *b)
{
	if (a->hash != b->hash)
		return a->hash < b->hash ? -1 : 1;
	if (a->source != b->source)
		return a->source < b->source ? -1 : 1;
	return a->row < b->row ? -1 : a->row > b->row;
}

#define ST_SORT			 sort_entries
#define ST_ELEMENT_TYPE	 Entry
#define ST_COMPARE(a, b) compare_entries(a, b)
#define ST_SCOPE		 static
#define ST_CHECK_FOR_INTERRUPTS
#define ST_DEFINE
#define ST_DECLARE
#include "lib/sort_template.h"

static inline int64
source_int64(const Source *s, int attno, uint32 row)
{
	return *(const int64 *) es_batch_value(&s->view, attno - 1, row);
}

/* What the segment sorts by and keeps as position: the ordinal in a pending one. */
static inline EsPosition
row_position(const Builder *b, const Source *s, uint32 row)
{
	int column = s->view.header->roles.position - 1;

	/* a rewrite copies rows of its own transaction, too, and they have none yet */
	if (s->given_positions && !es_batch_is_null(&s->view, column, row))
		return (EsPosition) source_int64(s, s->view.header->roles.position, row);
	return s->base + es_batch_ordinal(&s->view, row);
}

static int
compare_contexts(const Builder *b, const Entry *x, const Entry *y)
{
	int64		scratch[2];
	const void *bytes[2];
	size_t		len[2];
	int			c;

	/* a NULL context never gets here: es_batch_open's caller, the shard, refuses it */
	if (!es_batch_context(&b->sources[x->source].view, x->row, &scratch[0], &bytes[0], &len[0]) ||
		!es_batch_context(&b->sources[y->source].view, y->row, &scratch[1], &bytes[1], &len[1]))
		elog(ERROR, "a row of segment %016llx has no context", (unsigned long long) b->job->segment_id);
	c = memcmp(bytes[0], bytes[1], Min(len[0], len[1]));
	if (c != 0)
		return c;
	return len[0] < len[1] ? -1 : len[0] > len[1];
}

/* The sort order itself; rows of one hash. */
static int
compare_rows(const void *x, const void *y, void *arg)
{
	const Builder *b = arg;
	const Entry	  *ex = x;
	const Entry	  *ey = y;
	EsPosition	   px;
	EsPosition	   py;
	int			   c = compare_contexts(b, ex, ey);

	if (c != 0)
		return c;
	px = row_position(b, &b->sources[ex->source], ex->row);
	py = row_position(b, &b->sources[ey->source], ey->row);
	return px < py ? -1 : px > py;
}

/* Brings the run of equal hashes that begins at `from` in order; returns its end. */
static uint64
settle_run(Builder *b, uint64 from)
{
	Entry *e = b->entries;
	uint64 to = from + 1;
	bool   sorted = true;

	while (to < b->nentries && e[to].hash == e[from].hash)
	{
		if (sorted && compare_rows(&e[to - 1], &e[to], b) >= 0)
			sorted = false;
		to++;
	}
	if (!sorted)
		qsort_arg(&e[from], to - from, sizeof(Entry), compare_rows, b);
	return to;
}

/* ---- gathering ---- */

static int
compare_sources(const void *x, const void *y)
{
	const Source *a = x;
	const Source *b = y;

	if (a->first_position != b->first_position)
		return a->first_position < b->first_position ? -1 : 1;
	return a->number < b->number ? -1 : 1;
}

static inline bool
row_skipped(const Source *s, uint32 row)
{
	return s->skip != NULL && (s->skip[row >> 3] >> (row & 7)) & 1;
}

static void
open_sources(Builder *b, dsa_area *arena)
{
	const EsJob		 *job = b->job;
	const EsJobBatch *list = dsa_get_address(arena, job->batches);

	b->nsources = job->nbatches;
	b->sources = palloc_extended(sizeof(Source) * Max(b->nsources, 1), MCXT_ALLOC_HUGE);
	for (uint32 i = 0; i < b->nsources; i++)
	{
		Source				*s = &b->sources[i];
		const EsJobBatch	*jb = &list[i];
		const EsBatchHeader *h;

		memset(s, 0, sizeof(*s));
		es_batch_open_trusted(dsa_get_address(arena, jb->batch), &s->view);
		h = s->view.header;
		if (DsaPointerIsValid(jb->versions))
			s->versions = dsa_get_address(arena, jb->versions);
		if (DsaPointerIsValid(jb->skip))
			s->skip = dsa_get_address(arena, jb->skip);
		s->base = b->pending ? 0 : jb->base;
		s->fxid = jb->fxid;
		s->number = i;
		s->has_hash = (h->flags & ES_BATCH_HAS_CONTENT_HASH) != 0;
		/* a staged batch has no FINISH yet: its own flag says what the FINISH will */
		s->given_positions = b->pending ? (h->flags & ES_BATCH_GIVEN_POSITIONS) != 0
										: (jb->flags & ES_FINISH_GIVEN_POSITIONS) != 0;
		s->given_versions = b->pending || (jb->flags & ES_FINISH_GIVEN_VERSIONS) != 0;
		if (h->roles.version == 0)
			s->given_versions = false;
		s->first_position = h->nrows > 0 ? row_position(b, s, 0) : 0;
		if (i % INTERRUPT_ROWS == 0)
			CHECK_FOR_INTERRUPTS();
	}
	qsort(b->sources, b->nsources, sizeof(Source), compare_sources);
}

/*
 * The segment's columns: those of the batch that has most.  Batches of one storage differ when
 * columns were added or dropped in between; the physical shape of a column never changes
 * without a rewrite, unless a savepoint is rolled back with its DDL.  The rows from before that are
 * dead then: no flush has them, and a spill keeps other shapes in files of their own.  A column that
 * is dropped in some batches still has its values in the others: a transaction may take the
 * DROP COLUMN back.
 */
static void
gather_columns(Builder *b)
{
	for (uint32 i = 0; i < b->nsources; i++)
	{
		const EsBatchHeader *h = b->sources[i].view.header;

		b->ntable = Max(b->ntable, h->ncols - (b->sources[i].has_hash ? 1 : 0));
		b->has_hash |= b->sources[i].has_hash;
		b->roles = h->roles;
		b->relid = h->relid;
	}
	b->ncols = b->ntable + (b->pending ? ES_PENDING_COLUMNS : 0);
	b->columns = palloc0(sizeof(EsColumnDesc) * (b->ncols + 1));
	for (uint32 i = 0; i < b->nsources; i++)
	{
		const EsBatchView *v = &b->sources[i].view;
		int				   n = v->header->ncols - (b->sources[i].has_hash ? 1 : 0);

		for (int col = 0; col < n; col++)
		{
			EsColumnDesc	   *to = &b->columns[col];
			const EsColumnDesc *from = &v->columns[col].desc;

			if (to->len == 0)
				*to = *from;
			else if (to->len != from->len || to->align != from->align)
				elog(ERROR, "column %d of storage %llu has two shapes", col + 1,
					 (unsigned long long) b->job->table.storage_id);
			else
			{
				if ((from->flags & ES_COLUMN_DROPPED) == 0)
					to->flags &= ~ES_COLUMN_DROPPED;
				to->flags |= from->flags & ES_COLUMN_PLAIN;
			}
		}
	}
	if (b->pending)
		memcpy(b->columns + b->ntable, es_pending_columns, sizeof(EsColumnDesc) * ES_PENDING_COLUMNS);
}

static void
gather_entries(Builder *b)
{
	uint64 n = 0;

	for (uint32 i = 0; i < b->nsources; i++)
		n += b->sources[i].view.header->nrows;
	b->entries = palloc_extended(sizeof(Entry) * Max(n, 1), MCXT_ALLOC_HUGE);
	for (uint32 i = 0; i < b->nsources; i++)
	{
		const Source *s = &b->sources[i];
		uint32		  nrows = s->view.header->nrows;

		for (uint32 row = 0; row < nrows; row++)
		{
			if (row_skipped(s, row))
				continue;
			b->entries[b->nentries++] =
				(Entry){.hash = es_batch_context_hash(&s->view, row), .source = i, .row = row};
		}
		CHECK_FOR_INTERRUPTS();
	}
	sort_entries(b->entries, b->nentries);
}

/* ---- the file ---- */

static EsStatus
output_flush(Output *out, EsError *err)
{
	Size at = 0;

	while (at < out->used)
	{
		ssize_t n;

		errno = ES_FAULT_IO("segment-write");
		n = errno != 0 ? -1 : write(out->fd, out->buffer + at, out->used - at);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
		{
			/* a write of nothing without an error is a full disk */
			out->error = n < 0 ? errno : ENOSPC;
			return es_fail(err, ES_ERR_IO, out->written + at, "could not write");
		}
		at += n;
	}
	out->written += out->used;
	out->used = 0;
	if (out->written - out->writeback >= WRITEBACK_STEP)
	{
		/* so that the fsync at the end finds little left to write */
		pg_flush_data(out->fd, out->writeback, out->written - out->writeback);
		out->writeback = out->written;
	}
	return ES_OK;
}

static EsStatus
output_append(void *arg, const void *buf, size_t len, EsError *err)
{
	Output *out = arg;

	while (len > 0)
	{
		Size n = Min(len, WRITE_BUFFER - out->used);

		memcpy(out->buffer + out->used, buf, n);
		out->used += n;
		buf = (const char *) buf + n;
		len -= n;
		if (out->used == WRITE_BUFFER)
		{
			EsStatus status = output_flush(out, err);

			if (status != ES_OK)
				return status;
		}
	}
	return ES_OK;
}

/* Throws for a status of the segment writer that is not ES_OK. */
static void
check_writer(EsStatus status, const Output *out, const EsError *err)
{
	if (status == ES_OK)
		return;
	if (status == ES_ERR_IO)
		es_file_error(ERROR, out->error, "write", out->path);
	if (status == ES_ERR_NOMEM)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory"),
						errdetail("Writing file \"%s\".", out->path)));
	ereport(ERROR, (errcode(ERRCODE_INTERNAL_ERROR),
					errmsg("could not build segment \"%s\": %s", out->path, err->what)));
}

static void
write_rows(Builder *b, EsSegmentWriter *writer, const Output *out)
{
	const void **values = palloc0(sizeof(void *) * (b->ncols + 1));
	uint64		 settled = 0;
	EsError		 err = {0};

	for (uint64 i = 0; i < b->nentries; i++)
	{
		const Entry		  *e;
		const Source	  *s;
		const EsBatchView *v;
		EsSegmentRow	   row = {.values = values};
		int64			   place;
		int64			   ordinal;
		int32			   cid;
		int				   ncols;

		if (i % INTERRUPT_ROWS == 0)
		{
			CHECK_FOR_INTERRUPTS();
			if (es_generation_gone(b->job->shard, b->job->shard_generation))
				ereport(ERROR,
						(errcode(ERRCODE_ADMIN_SHUTDOWN), errmsg("shard %d was restarted", b->job->shard)));
		}
		if (i == settled)
			settled = settle_run(b, i);
		e = &b->entries[i];
		s = &b->sources[e->source];
		v = &s->view;

		ncols = v->header->ncols - (s->has_hash ? 1 : 0);
		for (int col = 0; col < b->ntable; col++)
			values[col] =
				col >= ncols || es_batch_is_null(v, col, e->row) ? NULL : es_batch_value(v, col, e->row);
		if (s->has_hash && !es_batch_is_null(v, ncols, e->row))
			row.content_hash = es_batch_value(v, ncols, e->row);
		row.context_hash = e->hash;
		row.position = row_position(b, s, e->row);
		row.fxid = s->fxid;
		if (s->versions != NULL)
			row.version = (uint64) s->versions[e->row];
		else if (s->given_versions && !es_batch_is_null(v, v->header->roles.version - 1, e->row))
			row.version = (uint64) source_int64(s, v->header->roles.version, e->row);
		if (b->pending)
		{
			place = (int64) (((uint64) s->number << ES_PENDING_ROW_BITS) | e->row);
			cid = (int32) es_batch_cid(v, e->row);
			ordinal = (int64) es_batch_ordinal(v, e->row);
			values[b->ntable + ES_PENDING_PLACE] = &place;
			values[b->ntable + ES_PENDING_CID] = &cid;
			values[b->ntable + ES_PENDING_ORDINAL] = s->given_positions ? &ordinal : NULL;
		}
		check_writer(es_segment_writer_add(writer, &row, &err), out, &err);
	}
}

void
es_build_segment(const EsJob *job, dsa_area *arena, EsSegmentSummary *summary)
{
	Builder		  b = {.job = job, .pending = job->kind == ES_JOB_SPILL};
	EsSegmentSpec spec = {0};
	EsSegmentWriter *volatile writer = NULL;
	Output	out = {.fd = -1};
	EsError err = {0};

	open_sources(&b, arena);
	gather_columns(&b);
	gather_entries(&b);

	spec.identity = job->identity;
	spec.id = job->segment_id;
	spec.table = job->table;
	spec.roles = b.roles;
	spec.relid = b.relid;
	spec.flags = job->spec_flags;
	spec.columns = b.columns;
	spec.ncols = b.ncols;
	spec.has_content_hash = b.has_hash;
	spec.codec = es_guc_compression;
	spec.zstd_level = 3;

	out.path = es_path_segment_tmp(job->shard, job->segment_id);
	out.buffer = palloc(WRITE_BUFFER);
	errno = ES_FAULT_IO("segment-create");
	if (errno == 0)
		out.fd = BasicOpenFile(out.path, O_CREAT | O_EXCL | O_WRONLY | PG_BINARY);
	if (out.fd < 0)
		es_file_error(ERROR, errno, "create", out.path);

	PG_TRY();
	{
		EsSegmentWriter *w = NULL;

		check_writer(es_segment_writer_create(&w, &spec, output_append, &out), &out, &err);
		writer = w;
		write_rows(&b, w, &out);
		ES_FAULT_ERROR("segment-rows-written");
		check_writer(es_segment_writer_finish(w, summary, &err), &out, &err);
		check_writer(output_flush(&out, &err), &out, &err);
		ES_FAULT("segment-before-sync");
		/* The rows go from memory and own WAL when the manifest names this file, so it must be on disk. */
		errno = ES_FAULT_IO("segment-sync");
		if (errno != 0 || pg_fsync(out.fd) != 0)
			es_file_error(ERROR, errno, "fsync", out.path);
		ES_FAULT("segment-synced");
	}
	PG_CATCH();
	{
		close(out.fd);
		unlink(out.path);
		es_segment_writer_free(writer);
		PG_RE_THROW();
	}
	PG_END_TRY();
	es_segment_writer_free(writer);
	if (close(out.fd) != 0)
	{
		int save_errno = errno;

		unlink(out.path);
		es_file_error(ERROR, save_errno, "close", out.path);
	}
}
