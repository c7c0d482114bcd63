/*-------------------------------------------------------------------------
 *
 * manifest_file.c
 *	  A shard's manifest as a file: reading it at start, rewriting it, and appending
 *	  edits while the shard runs.
 *
 * Reading.  What the control block knows to be synced must be good to the last
 * byte; behind it the log ends at the first record that is not.  A manifest of a
 * later generation than the control block's was made at a start that died before
 * its first control block: nothing was appended to it, it came into being complete, so all
 * of it counts.  One of an earlier generation is damage.
 *
 * Appending.  Edits that wait are joined and go out as one write and one fdatasync; then
 * their tickets are done and the state moves.  Two states are kept: `ahead` has taken
 * every record that was given a place in the file, `durable` what is
 * synced.  A record is applied to `ahead` before it is written: one that does not fit
 * (a mistake in the caller) is an ERROR there and never reaches the file.
 *
 * A failed write is tried again at the same place each second (stuck); a failed fsync
 * is data_sync_elevel(PANIC), since the pages may be gone and a second
 * fsync would say otherwise.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <fcntl.h>
#include <limits.h>
#include <unistd.h>

#include "storage/fd.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "ipc/fault.h"
#include "shard/files.h"
#include "shard/shard.h"
#include "shard/uring.h"

#define MANIFEST_NAME "manifest"

typedef struct QueuedEdit
{
	EsManifestEdit	  *edit;
	struct QueuedEdit *next;
} QueuedEdit;

static int	 my_shard = -1;
static char *path;
static int	 fd = -1;

static EsManifestState durable;
static EsManifestState ahead;
static uint64		   next_segment_id;

static QueuedEdit *queue_head = NULL;
static QueuedEdit *queue_tail = NULL;
static uint64	   last_ticket = 0;
static uint64	   done_ticket = 0;

static uint64 durable_len; /* where the next group is appended */
static uint32 last_crc;	   /* of the last record that has a place in the file */

/* the group under way */
static bool		   busy = false;
static char		  *group; /* malloc'd: records hand over core's memory rules */
static size_t	   group_len;
static uint64	   group_ticket; /* last ticket in it */
static int		   group_records;
static int		   stuck_errno = 0;
static TimestampTz retry_at = 0;
static TimestampTz sync_started;

/* ---- start ---- */

/* The generation of a manifest's image, 0 if its head is not readable. */
static uint64
generation_of(const void *image, size_t len)
{
	const EsManifestRecord *record = image;
	const EsManifestPart   *part = (const EsManifestPart *) (record + 1);
	EsManifestHead			head;

	if (len < sizeof(*record) + sizeof(*part) + sizeof(head) || part->type != ES_PART_HEAD)
		return 0;
	memcpy(&head, part + 1, sizeof(head));
	return head.generation;
}

void
es_manifest_load(int shard, const EsControl *control, EsManifestState *state)
{
	char				 *name = es_path_in_shard(shard, MANIFEST_NAME);
	size_t				  len;
	void				 *image = es_read_file(name, &len);
	uint64				  must_be_good;
	uint64				  valid_len;
	uint32				  crc;
	EsError				  err;
	const EsFileIdentity *found;

	if (image == NULL)
	{
		es_fail(&err, ES_ERR_CORRUPT, 0, "the file is missing");
		es_corruption(ERROR, name, &err);
	}
	must_be_good = generation_of(image, len) == control->manifest_generation ? control->manifest_len : len;

	es_manifest_state_init(state);
	if (es_manifest_read(state, image, len, must_be_good, &valid_len, &crc, &err) != ES_OK)
	{
		es_manifest_state_free(state);
		es_corruption(ERROR, name, &err);
	}
	pfree(image);

	found = &state->head.identity;
	if (state->head.generation < control->manifest_generation)
		es_fail(&err, ES_ERR_CORRUPT, 0, "its generation is %llu, but %llu was in use",
				(unsigned long long) state->head.generation,
				(unsigned long long) control->manifest_generation);
	else if (memcmp(found->store_uuid, control->identity.store_uuid, ES_UUID_LEN) != 0 ||
			 found->shard != control->identity.shard || found->nshards != control->identity.nshards)
		es_fail(&err, ES_ERR_FOREIGN, 0, "it is of another store, or of another shard of this one");
	else
	{
		pfree(name);
		return;
	}
	es_manifest_state_free(state);
	es_corruption(ERROR, name, &err);
}

static void
read_state(EsManifestState *state, const void *image, size_t len)
{
	uint64	valid_len;
	uint32	crc;
	EsError err;

	es_manifest_state_free(state);
	es_manifest_state_init(state);
	if (es_manifest_read(state, image, len, len, &valid_len, &crc, &err) != ES_OK)
		es_corruption(ERROR, path, &err);
}

static void
out_of_memory(void)
{
	ereport(ERROR,
			(errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory for the manifest of shard %d", my_shard)));
}

/*
 * Writes the state to a new file, which becomes the manifest, and gets ready to append to
 * it.  The caller's state stays the caller's.
 */
void
es_manifest_open(int shard, const EsFileIdentity *identity, EsManifestState *state)
{
	char  *dir = es_path_shard(shard);
	void  *image;
	void  *aligned;
	size_t len;

	my_shard = shard;
	if (path == NULL)
		path = MemoryContextStrdup(TopMemoryContext, es_path_in_shard(shard, MANIFEST_NAME));

	state->head.identity = *identity;
	state->head.generation++;
	if (es_manifest_rewrite(state, &image, &len, &last_crc) != ES_OK)
		out_of_memory();
	/* on an error below `image` must not leak into a loop of retries */
	aligned = MemoryContextAllocHuge(CurrentMemoryContext, len);
	memcpy(aligned, image, len);
	free(image);

	ES_FAULT("manifest-before-rewrite");
	es_replace_file(dir, MANIFEST_NAME, aligned, len);
	ES_FAULT("manifest-rewritten");
	read_state(&durable, aligned, len);
	read_state(&ahead, aligned, len);
	/* bitmaps and the like are used where the segments are (segments.c), not here */
	es_manifest_state_slim(&durable);
	es_manifest_state_slim(&ahead);
	pfree(aligned);
	pfree(dir);

	durable_len = len;
	next_segment_id = Max(state->head.next_segment_id, 1);
	if (fd >= 0)
	{
		close(fd);
		ReleaseExternalFD();
	}
	fd = BasicOpenFile(path, O_RDWR | PG_BINARY);
	if (fd < 0)
		es_file_error(ERROR, errno, "open", path);
	ReserveExternalFD();
}

size_t
es_manifest_make(const char *dir, const EsFileIdentity *identity)
{
	EsManifestState state;
	void		   *image;
	void		   *copy;
	size_t			len;
	uint32			crc;

	es_manifest_state_init(&state);
	state.head.identity = *identity;
	state.head.generation = 1;
	state.head.next_segment_id = 1;
	if (es_manifest_rewrite(&state, &image, &len, &crc) != ES_OK)
		out_of_memory();
	copy = palloc(len);
	memcpy(copy, image, len);
	free(image);
	es_manifest_state_free(&state);
	es_replace_file(dir, MANIFEST_NAME, copy, len);
	pfree(copy);
	return len;
}

/* ---- what the engine asks ---- */

EsManifestState *
es_manifest_state(void)
{
	return &durable;
}

uint64
es_manifest_next_segment_id(void)
{
	return next_segment_id++;
}

void
es_manifest_position(uint64 *generation, uint64 *len)
{
	*generation = durable.head.generation;
	*len = durable_len;
}

bool
es_manifest_done(uint64 ticket)
{
	return ticket <= done_ticket;
}

int
es_manifest_stuck_errno(void)
{
	return stuck_errno;
}

uint64
es_manifest_submit(EsManifestEdit *edit)
{
	QueuedEdit *q = MemoryContextAlloc(TopMemoryContext, sizeof(QueuedEdit));

	q->edit = edit;
	q->next = NULL;
	if (queue_tail != NULL)
		queue_tail->next = q;
	else
		queue_head = q;
	queue_tail = q;
	last_ticket++;
	es_manifest_tick();
	return last_ticket;
}

/* ---- appending ---- */

static void manifest_written(void *arg, int result);
static void manifest_synced(void *arg, int result);

static void
issue_write(void)
{
	int err = ES_FAULT_IO("manifest-write");

	retry_at = 0;
	if (err != 0)
		es_uring_result(-err, manifest_written, NULL);
	else
		es_uring_write(fd, group, group_len, durable_len, manifest_written, NULL);
}

/*
 * Makes the next group of everything that waits.  An edit that does not fit is taken
 * out of the queue first, so that the error is raised once.
 */
static void
start_group(void)
{
	uint64 ticket = done_ticket;

	group_len = 0;
	group_records = 0;
	while (queue_head != NULL)
	{
		QueuedEdit *q = queue_head;
		const void *record;
		size_t		len;
		uint32		crc;
		EsError		err;
		char	   *grown;

		if (es_manifest_edit_record(q->edit, last_crc, &record, &len, &crc) != ES_OK)
			out_of_memory();
		if (group_records > 0 && group_len + len > INT_MAX)
			break;
		grown = realloc(group, group_len + len);
		if (grown == NULL)
			out_of_memory();
		group = grown;

		queue_head = q->next;
		if (queue_head == NULL)
			queue_tail = NULL;
		ticket++;
		if (es_manifest_apply(&ahead, record, len, &err) != ES_OK)
		{
			es_manifest_edit_free(q->edit);
			pfree(q);
			if (err.status == ES_ERR_NOMEM)
				out_of_memory();

			/*
			 * Tickets are numbers of places in the queue, so the shard cannot go on without
			 * this one; its next incarnation reads what is on disk.
			 */
			ereport(FATAL, (errcode(ERRCODE_INTERNAL_ERROR),
							errmsg("shard %d made a manifest record that does not fit its manifest: %s",
								   my_shard, err.what)));
		}
		es_manifest_state_slim(&ahead);
		memcpy(group + group_len, record, len);
		group_len += len;
		group_records++;
		last_crc = crc;
		es_manifest_edit_free(q->edit);
		pfree(q);
	}
	group_ticket = ticket;
	busy = true;
	ES_FAULT("manifest-before-write");
	issue_write();
}

static void
manifest_written(void *arg, int result)
{
	int err;

	if (result < 0)
	{
		if (stuck_errno == 0)
			es_file_error(LOG, -result, "write", path);
		stuck_errno = -result;
		ES_COUNT(io_errors, 1);
		retry_at = GetCurrentTimestamp() + USECS_PER_SEC;
		return;
	}
	if (stuck_errno != 0)
		ereport(LOG, (errmsg("shard %d writes its manifest again", my_shard)));
	stuck_errno = 0;
	ES_FAULT("manifest-written");

	sync_started = GetCurrentTimestamp();
	err = ES_FAULT_IO("manifest-sync");
	if (err != 0)
		es_uring_result(-err, manifest_synced, NULL);
	else
		es_uring_fdatasync(fd, manifest_synced, NULL);
}

static void
manifest_synced(void *arg, int result)
{
	size_t at = 0;

	if (result < 0)
		es_file_error(data_sync_elevel(PANIC), -result, "fsync", path);
	es_count_fsync(sync_started);
	ES_FAULT("manifest-synced");

	while (at < group_len)
	{
		const EsManifestRecord *record = (const EsManifestRecord *) (group + at);
		EsError					err;

		if (es_manifest_apply(&durable, record, record->len, &err) != ES_OK)
			ereport(FATAL,
					(errcode(ERRCODE_OUT_OF_MEMORY),
					 errmsg("shard %d cannot take over a record of its manifest: %s", my_shard, err.what)));
		at += record->len;
	}
	es_manifest_state_slim(&durable);
	ES_COUNT(manifest_records, group_records);
	durable_len += group_len;
	done_ticket = group_ticket;
	busy = false;
	/* whoever waits for a ticket is asked again by the loop */
}

void
es_manifest_tick(void)
{
	if (busy)
	{
		if (retry_at != 0 && GetCurrentTimestamp() >= retry_at)
			issue_write();
	}
	else if (queue_head != NULL)
		start_group();
}

long
es_manifest_timeout(void)
{
	if (retry_at == 0)
		return -1;
	return Max((retry_at - GetCurrentTimestamp()) / 1000 + 1, 0);
}
