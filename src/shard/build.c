/*-------------------------------------------------------------------------
 *
 * build.c
 *	  The shard's side of a segment file that a maintenance worker makes: posts the
 *	  job, takes the file, renames it; the fsync of the directory; the gate to
 *	  the manifest.
 *
 * A build holds a reference on each of its batches, or on the MemTable that has them, from its
 * beginning to its end, so nothing the worker reads goes away.  Each attempt has a segment id
 * of its own, because a file that could not be written whole is never touched
 * again.  An attempt fails with the disk, or because its worker has exited; both are
 * tried again after a pause for as long as the build is wanted: the rows are in memory and
 * in own WAL, so nothing is lost by waiting.
 *
 * The job's description is made in the arena.  Rows that are the shard's private memory, because there was no shared
 * memory when they came, are copied behind it.  If the arena has no memory for it either, a small one gets what is kept
 * for that (arena.h); flush.c splits a large one.
 *
 * A build that is given up while a worker is at it stays in a list until the
 * worker is done; only then its file is removed and its batches are let go.
 *
 * A renamed file counts when the directory is synced.  That is one asynchronous fsync
 * for all renames that came before it; the next one begins when it is done.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <fcntl.h>
#include <unistd.h>

#include "storage/fd.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "guc.h"
#include "ipc/fault.h"
#include "shard/arena.h"
#include "shard/engine.h"
#include "shard/files.h"
#include "shard/flush.h"
#include "shard/shard.h"
#include "shard/uring.h"

/* Jobs of one shard that may be posted at once, of the ES_MAX_JOBS that all share. */
#define MAX_POSTED (ES_MAX_JOBS / ES_MAX_SHARDS)

/* Batches of a job that are described in one turn of the loop. */
#define LIST_SLICE 2048

static dlist_head given_up = DLIST_STATIC_INIT(given_up);
static int		  posted;

/* ---- builds ---- */

EsBuild *
es_build_create(EsJobKind kind, const EsTableKey *table, EsMemBatch **batches, uint32 nbatches,
				EsMemTable *memtable)
{
	MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);
	EsBuild		 *b = palloc0(sizeof(EsBuild));

	b->kind = kind;
	b->table = *table;
	b->nbatches = nbatches;
	b->batches = palloc_extended(sizeof(EsMemBatch *) * Max(nbatches, 1), MCXT_ALLOC_HUGE);
	memcpy(b->batches, batches, sizeof(EsMemBatch *) * nbatches);
	b->memtable = memtable;
	if (memtable != NULL)
		es_memtable_ref(memtable);
	else
		for (uint32 i = 0; i < nbatches; i++)
			es_membatch_ref(batches[i]);
	MemoryContextSwitchTo(old);
	return b;
}

static inline Size
skip_bytes(const EsMemBatch *b)
{
	return MAXALIGN((b->view.header->nrows + 7) / 8);
}

Size
es_build_needs(const EsMemBatch *b, EsJobKind kind)
{
	Size bytes = sizeof(EsJobBatch);

	if (!DsaPointerIsValid(b->pointer))
		bytes += MAXALIGN(b->view.header->total_len);
	if (kind == ES_JOB_FLUSH && b->versions_local != NULL && !DsaPointerIsValid(b->versions))
		bytes += b->view.header->nrows * sizeof(int64);
	if (kind == ES_JOB_FLUSH && b->skip_local != NULL && !DsaPointerIsValid(b->skip))
		bytes += skip_bytes(b);
	return bytes;
}

/* The piece's place in the arena: its own, or that of a copy. */
static dsa_pointer
place(EsBuild *build, dsa_pointer pointer, const void *address, Size len)
{
	if (DsaPointerIsValid(pointer) || address == NULL)
		return pointer;
	pointer = build->list + build->list_bytes;
	memcpy(dsa_get_address(es_arena, pointer), address, len);
	build->list_bytes += MAXALIGN(len);
	return pointer;
}

static void
free_list(EsBuild *build)
{
	if (DsaPointerIsValid(build->list))
		es_arena_job_free(build->list);
	build->list = InvalidDsaPointer;
	build->listed = 0;
}

static bool
alloc_list(EsBuild *build)
{
	Size bytes = sizeof(EsJobBatch) * Max(build->nbatches, 1);

	build->list_bytes = bytes;
	if (es_arena_private > 0)
	{
		bytes = 0;
		for (uint32 i = 0; i < build->nbatches; i++)
			bytes += es_build_needs(build->batches[i], build->kind);
	}
	build->list = es_arena_job_alloc(Max(bytes, sizeof(EsJobBatch)));
	build->too_large = !DsaPointerIsValid(build->list) && bytes > ES_ARENA_RESERVE;
	if (DsaPointerIsValid(build->list))
		return true;
	if (build->too_large && build->nbatches == 1 && es_arena_stuck(false))
	{
		build->failures = 1;
		build->sqlerrcode = ERRCODE_OUT_OF_MEMORY;
		snprintf(build->error, sizeof(build->error), "There is no shared memory for %zu bytes of rows",
				 bytes);
	}
	return false;
}

/* The job's description in the arena, in slices.  False: not yet, or no memory. */
static bool
make_list(EsBuild *build)
{
	EsJobBatch *list;
	uint32		end = Min(build->nbatches, build->listed + LIST_SLICE);

	if (!DsaPointerIsValid(build->list) && !alloc_list(build))
		return false;
	list = dsa_get_address(es_arena, build->list);
	for (; build->listed < end; build->listed++)
	{
		const EsMemBatch *b = build->batches[build->listed];
		EsJobBatch		 *l = &list[build->listed];

		memset(l, 0, sizeof(*l));
		l->batch = place(build, b->pointer, b->view.base, b->view.header->total_len);
		l->fxid = b->txn->fxid;
		if (build->kind == ES_JOB_FLUSH)
		{
			l->versions = place(build, b->versions, b->versions_local, b->view.header->nrows * sizeof(int64));
			l->skip = place(build, b->skip, b->skip_local, skip_bytes(b));
			l->base = b->base;
			l->flags = b->finish_flags;
		}
	}
	return build->listed == build->nbatches;
}

EsBuild *
es_build_split(EsBuild *build)
{
	uint32	 half = build->nbatches / 2;
	EsBuild *second;

	if (!build->too_large || half == 0)
		return NULL;
	second = es_build_create(build->kind, &build->table, build->batches + half, build->nbatches - half,
							 build->memtable);
	if (build->memtable == NULL)
		for (uint32 i = half; i < build->nbatches; i++)
			es_membatch_unref(build->batches[i]);
	build->nbatches = half;
	build->too_large = false;
	return second;
}

bool
es_build_hurries(const EsBuild *build)
{
	return DsaPointerIsValid(build->list) && build->listed < build->nbatches;
}

static void
remove_file(uint64 id, bool published)
{
	char *path = published ? es_path_segment(es_shard_id, id) : es_path_segment_tmp(es_shard_id, id);

	/* What cannot be removed now is removed by the next start: no manifest names it. */
	if (unlink(path) != 0 && errno != ENOENT)
		ereport(LOG, (errcode_for_file_access(), errmsg("could not remove file \"%s\": %m", path)));
	pfree(path);
}

static void
note_failure(EsBuild *build, int sqlerrcode, const char *error)
{
	remove_file(build->id, build->published);
	build->id = 0;
	build->finished = false;
	build->published = false;
	build->sqlerrcode = sqlerrcode;
	strlcpy(build->error, error, sizeof(build->error));
	/* a worker that was ended says nothing about the next one */
	if (sqlerrcode == ERRCODE_ADMIN_SHUTDOWN)
		build->retry_at = 0;
	else
	{
		build->failures++;
		build->retry_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), ES_FLUSH_RETRY);
		ES_COUNT(io_errors, 1);
		ereport(LOG,
				(errcode(sqlerrcode), errmsg("shard %d could not write a segment: %s", es_shard_id, error),
				 errdetail("Its events stay in memory and in the shard's own log; it is tried again.")));
	}
}

bool
es_build_tick(EsBuild *build)
{
	EsJob job;

	if (build->finished)
		return true;
	if (build->job != NULL)
	{
		switch (es_job_state(build->job))
		{
			case ES_JOB_DONE:
				build->summary = build->job->summary;
				es_job_free(build->job);
				build->job = NULL;
				posted--;
				build->finished = true;
				build->failures = 0;
				free_list(build);
				return true;
			case ES_JOB_FAILED:
				job = *build->job;
				es_job_free(build->job);
				build->job = NULL;
				posted--;
				note_failure(build, job.sqlerrcode, job.error);
				break;
			case ES_JOB_FREE:
			case ES_JOB_POSTED:
			case ES_JOB_RUNNING:
				return false;
		}
	}
	if (posted >= MAX_POSTED || (build->retry_at != 0 && GetCurrentTimestamp() < build->retry_at))
		return false;
	if ((build->listed < build->nbatches || !DsaPointerIsValid(build->list)) && !make_list(build))
		return false;

	memset(&job, 0, sizeof(job));
	job.shard = es_shard_id;
	job.shard_generation = pg_atomic_read_u32(&es_shard->generation);
	job.kind = build->kind;
	job.table = build->table;
	job.identity = es_manifest_state()->head.identity;
	job.arena = pg_atomic_read_u32(&es_shard->arena);
	job.batches = build->list;
	job.nbatches = build->nbatches;
	job.spec_flags = build->kind == ES_JOB_SPILL ? ES_SEGMENT_PENDING : 0;
	job.segment_id = build->id = es_manifest_next_segment_id();
	ES_FAULT("flush-before-post");
	build->job = es_job_post(&job);
	if (build->job != NULL)
		posted++;
	return false;
}

bool
es_build_publish(EsBuild *build)
{
	char *from = es_path_segment_tmp(es_shard_id, build->id);
	char *to = es_path_segment(es_shard_id, build->id);

	Assert(build->finished && !build->published);
	ES_FAULT("flush-before-rename");
	errno = ES_FAULT_IO("flush-rename");
	if (errno != 0 || rename(from, to) != 0)
	{
		int	 save_errno = errno;
		char error[256];

		snprintf(error, sizeof(error), "could not rename file \"%s\" to \"%s\": %s", from, to,
				 strerror(save_errno));
		note_failure(build, save_errno == ENOSPC ? ERRCODE_DISK_FULL : ERRCODE_IO_ERROR, error);
	}
	else
		build->published = true;
	pfree(from);
	pfree(to);
	return build->published;
}

EsManifestSegment
es_build_segment_entry(const EsBuild *build)
{
	const EsSegmentSummary *s = &build->summary;
	EsManifestSegment		m;

	memset(&m, 0, sizeof(m));
	m.id = build->id;
	m.table = build->table;
	m.file_len = s->file_len;
	m.nrows = s->nrows;
	m.footer_crc = s->footer_crc;
	if (build->kind == ES_JOB_SPILL)
	{
		m.min_fxid = m.max_fxid = build->batches[0]->txn->fxid;
		m.flags = ES_SEGMENT_PENDING;
	}
	else
	{
		m.min_position = s->min_position;
		m.max_position = s->max_position;
		m.min_fxid = s->min_fxid;
		m.max_fxid = s->max_fxid;
	}
	return m;
}

void
es_build_free(EsBuild *build)
{
	Assert(build->job == NULL);
	if (build->memtable != NULL)
		es_memtable_unref(build->memtable);
	else
		for (uint32 i = 0; i < build->nbatches; i++)
			es_membatch_unref(build->batches[i]);
	free_list(build);
	pfree(build->batches);
	pfree(build);
}

void
es_build_give_up(EsBuild *build)
{
	if (build->job != NULL)
	{
		dlist_push_tail(&given_up, &build->node);
		return;
	}
	if (build->id != 0)
		remove_file(build->id, build->published);
	es_build_free(build);
}

void
es_builds_tick(void)
{
	dlist_mutable_iter iter;

	dlist_foreach_modify(iter, &given_up)
	{
		EsBuild	  *build = dlist_container(EsBuild, node, iter.cur);
		EsJobState state = es_job_state(build->job);

		if (state != ES_JOB_DONE && state != ES_JOB_FAILED)
			continue;
		es_job_free(build->job);
		build->job = NULL;
		posted--;
		dlist_delete(&build->node);
		es_build_give_up(build);
	}
}

/* ---- the directory ---- */

static int	  dir_fd = -1;
static uint64 dir_wanted;  /* tickets handed out */
static uint64 dir_running; /* what the fsync under way covers; 0 = none is */
static uint64 dir_done;

static void dir_sync_done(void *arg, int result);

static void
dir_sync_start(void)
{
	if (dir_fd < 0)
	{
		char *path = es_path_shard(es_shard_id);

		dir_fd = BasicOpenFile(path, O_RDONLY | PG_BINARY);
		if (dir_fd < 0)
			es_file_error(ERROR, errno, "open", path);
		pfree(path);
	}
	dir_running = dir_wanted;
	es_uring_fsync(dir_fd, dir_sync_done, NULL);
}

static void
dir_sync_done(void *arg, int result)
{
	int fault = ES_FAULT_IO("flush-dir-sync");

	if (fault != 0)
		result = -fault;
	/* some file systems have no fsync for directories, and need none */
	if (result < 0 && result != -EBADF && result != -EINVAL)
	{
		char *path = es_path_shard(es_shard_id);

		es_file_error(data_sync_elevel(ERROR), -result, "fsync", path);
		pfree(path);
	}
	dir_done = dir_running;
	dir_running = 0;
	if (dir_wanted > dir_done)
		dir_sync_start();
}

uint64
es_dir_sync(void)
{
	dir_wanted++;
	if (dir_running == 0)
		dir_sync_start();
	return dir_wanted;
}

bool
es_dir_synced(uint64 ticket)
{
	return dir_done >= ticket;
}

/* ---- the gate to the manifest ---- */

static bool edit_open;

EsManifestEdit *
es_edit_begin(void)
{
	EsManifestEdit *edit;

	if (edit_open)
		return NULL;
	edit = es_manifest_edit_create();
	if (edit == NULL)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
	edit_open = true;
	return edit;
}

void
es_edit_cancel(EsManifestEdit *edit)
{
	es_manifest_edit_free(edit);
	edit_open = false;
}

uint64
es_edit_submit(EsManifestEdit *edit)
{
	return es_manifest_submit(edit);
}

bool
es_edit_done(uint64 ticket)
{
	if (!es_manifest_done(ticket))
		return false;
	Assert(edit_open);
	edit_open = false;
	return true;
}

void
es_edit_check(EsStatus status)
{
	if (status == ES_OK)
		return;
	if (status == ES_ERR_NOMEM)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
	elog(ERROR, "shard %d: a manifest record is not valid (%d)", es_shard_id, status);
}
