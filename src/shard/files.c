/*-------------------------------------------------------------------------
 *
 * files.c
 *	  Names of a shard's files, whole-file reads and replacements, errors, and what
 *	  a shard finds at start.
 *
 * A file comes into being under a name that begins with pgsql_tmp (which base
 * backups leave out), is synced, gets its name, and then the directory is
 * synced.  So what has its name is complete, and a start may remove whatever
 * has not.
 *
 * At start everything is read and checked before anything is changed: control
 * blocks, then the manifest up to what the control block knows to be synced.
 * The keeper made directory, control blocks and manifest of every shard before the store
 * file said that there is a store; so a shard that finds one of them missing has
 * lost it, and never begins anew.  Only then the manifest goes to a new file
 * (an io_uring write of a dead process cannot reach that), and files go that
 * no manifest names.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "access/xlog.h"
#include "miscadmin.h"
#include "storage/fd.h"
#include "utils/pidfile.h"
#include "utils/timestamp.h"

#include "ipc/fault.h"
#include "shard/control.h"
#include "shard/files.h"
#include "shard/shard.h"

/* ---- names ---- */

char *
es_path_shard(int shard)
{
	return psprintf("%s/shard_%d", ES_STORE_DIR, shard);
}

char *
es_path_in_shard(int shard, const char *name)
{
	return psprintf("%s/shard_%d/%s", ES_STORE_DIR, shard, name);
}

char *
es_path_segment(int shard, uint64 id)
{
	return psprintf("%s/shard_%d/seg."
					"%016llx",
					ES_STORE_DIR, shard, (unsigned long long) id);
}

char *
es_path_segment_tmp(int shard, uint64 id)
{
	return psprintf("%s/shard_%d/" ES_TMP_PREFIX "seg.%016llx", ES_STORE_DIR, shard, (unsigned long long) id);
}

void
es_identity(int shard, EsFileIdentity *identity)
{
	memset(identity, 0, sizeof(*identity));
	memcpy(identity->store_uuid, es_shared->store_uuid, ES_UUID_LEN);
	identity->system_identifier = es_shared->system_identifier;
	identity->timeline = GetWALInsertionTimeLine();
	identity->shard = (uint16) shard;
	identity->nshards = (uint16) es_shared->nshards;
}

/* ---- errors ---- */

void
es_file_error(int elevel, int err, const char *operation, const char *path)
{
	bool full = err == ENOSPC || err == EDQUOT;

	errno = err;
	ereport(
		elevel,
		(errcode(full ? ERRCODE_DISK_FULL : ERRCODE_IO_ERROR),
		 errmsg("could not %s file \"%s\": %m", operation, path),
		 full
			 ? errhint(
				   "Free disk space, or raise the quota, of the file system that holds the data directory.")
			 : errhint(
				   "Check the file system and the device below it, and the permissions of the data directory.")));
}

void
es_corruption(int elevel, const char *path, const EsError *err)
{
	if (es_shard != NULL)
		ES_COUNT(corruptions, 1);

	if (err->status == ES_ERR_VERSION)
		ereport(elevel, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						 errmsg("file \"%s\" was made by another version of event_store", path),
						 errdetail("At offset %llu: %s.", (unsigned long long) err->offset, err->what),
						 errhint("Install the version of event_store that made the file, or a newer one.")));
	else if (err->status == ES_ERR_FOREIGN)
		ereport(elevel, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						 errmsg("file \"%s\" belongs to another event store", path),
						 errdetail("At offset %llu: %s.", (unsigned long long) err->offset, err->what),
						 errhint("Files of event_store cannot be copied from one cluster to another.")));
	else if (err->status == ES_ERR_NOMEM)
		ereport(elevel,
				(errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory while reading file \"%s\"", path),
				 errdetail("At offset %llu: %s.", (unsigned long long) err->offset, err->what)));
	else if (err->expected_crc != 0 || err->found_crc != 0)
		ereport(elevel,
				(errcode(ERRCODE_DATA_CORRUPTED),
				 errmsg("file \"%s\" is damaged at offset %llu: %s", path, (unsigned long long) err->offset,
						err->what),
				 errdetail("Expected checksum %08X, found %08X.", err->expected_crc, err->found_crc),
				 errhint("Check the storage for errors, then restore the data directory from a backup.")));
	else
		ereport(elevel,
				(errcode(ERRCODE_DATA_CORRUPTED),
				 errmsg("file \"%s\" is damaged at offset %llu: %s", path, (unsigned long long) err->offset,
						err->what),
				 errhint("Check the storage for errors, then restore the data directory from a backup.")));
}

/* ---- whole files ---- */

void
es_fsync_dir(const char *path)
{
	int err = ES_FAULT_IO("directory-sync");
	int fd;

	if (err == 0)
	{
		fd = OpenTransientFile(path, O_RDONLY);
		if (fd < 0)
			es_file_error(ERROR, errno, "open", path);
		if (pg_fsync(fd) != 0)
			err = errno;
		CloseTransientFile(fd);
	}
	if (err != 0)
		es_file_error(ERROR, err, "fsync", path);
}

void
es_replace_file(const char *dir, const char *name, const void *data, size_t len)
{
	char  *path = psprintf("%s/%s", dir, name);
	char  *tmp = psprintf("%s/" ES_TMP_PREFIX "%s", dir, name);
	size_t done = 0;
	int	   err;
	int	   fd;

	if (unlink(tmp) != 0 && errno != ENOENT)
		es_file_error(ERROR, errno, "remove", tmp);
	fd = OpenTransientFile(tmp, O_RDWR | O_CREAT | O_EXCL | PG_BINARY);
	if (fd < 0)
		es_file_error(ERROR, errno, "create", tmp);
	err = ES_FAULT_IO("file-write");
	while (err == 0 && done < len)
	{
		ssize_t n = pg_pwrite(fd, (const char *) data + done, len - done, (off_t) done);

		if (n > 0)
			done += n;
		else if (n == 0)
			err = ENOSPC;
		else if (errno != EINTR)
			err = errno;
	}
	if (err != 0)
	{
		CloseTransientFile(fd);
		unlink(tmp);
		es_file_error(ERROR, err, "write", tmp);
	}
	ES_FAULT("file-written");

	/* the file is thrown away if this fails: nothing relies on its pages */
	err = ES_FAULT_IO("file-sync");
	if (err == 0 && pg_fsync(fd) != 0)
		err = errno;
	if (err != 0)
	{
		CloseTransientFile(fd);
		unlink(tmp);
		es_file_error(ERROR, err, "fsync", tmp);
	}
	if (CloseTransientFile(fd) != 0)
		es_file_error(ERROR, errno, "close", tmp);
	ES_FAULT("file-synced");
	if (rename(tmp, path) != 0)
		es_file_error(ERROR, errno, "rename", tmp);
	ES_FAULT("file-renamed");
	es_fsync_dir(dir);
	pfree(path);
	pfree(tmp);
}

void *
es_read_file(const char *path, size_t *len)
{
	struct stat st;
	char	   *data;
	size_t		done = 0;
	int			fd;

	*len = 0;
	fd = OpenTransientFile(path, O_RDONLY | PG_BINARY);
	if (fd < 0)
	{
		if (errno == ENOENT)
			return NULL;
		es_file_error(ERROR, errno, "open", path);
	}
	if (fstat(fd, &st) != 0)
		es_file_error(ERROR, errno, "stat", path);
	data = MemoryContextAllocHuge(CurrentMemoryContext, (Size) st.st_size + 1);
	while (done < (size_t) st.st_size)
	{
		ssize_t n = pg_pread(fd, data + done, (size_t) st.st_size - done, (off_t) done);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			es_file_error(ERROR, errno, "read", path);
		if (n == 0)
			break;
		done += n;
	}
	CloseTransientFile(fd);
	*len = done;
	return data;
}

/* ---- small things that several modules of the shard need ---- */

bool
es_server_stopping(void)
{
	char  line[MAXPGPATH];
	bool  stopping = false;
	FILE *file;

	file = AllocateFile("postmaster.pid", "r");
	if (file == NULL)
		return errno == ENOENT; /* the postmaster is gone */
	for (int i = 1; fgets(line, sizeof(line), file) != NULL; i++)
		if (i == LOCK_FILE_LINE_PM_STATUS)
			stopping = strncmp(line, PM_STATUS_STOPPING, strlen(PM_STATUS_STOPPING)) == 0;
	FreeFile(file);
	return stopping;
}

void
es_count_fsync(int64 start)
{
	uint64 us = (uint64) Max(GetCurrentTimestamp() - start, 0);
	int	   bucket = 0;

	if (es_shard == NULL)
		return;
	while (bucket < 15 && us >= (UINT64_C(64) << bucket))
		bucket++;
	ES_COUNT(fsyncs, 1);
	ES_COUNT(fsync_us, us);
	ES_COUNT(fsync_histogram[bucket], 1);
}

/* ---- a shard's files at start ---- */

void
es_files_make(const char *dir, const EsFileIdentity *identity)
{
	EsControl control;
	char	  block[ES_WAL_BLOCK];

	memset(&control, 0, sizeof(control));
	control.manifest_len = es_manifest_make(dir, identity);
	control.flags = ES_CONTROL_CLEAN;
	control.sequence = 1;
	control.identity = *identity;
	control.manifest_generation = 1;
	control.written_at = es_unix_micros();
	es_control_encode(&control, block);
	es_replace_file(dir, "control.0", block, sizeof(block));
	control.sequence = 2;
	es_control_encode(&control, block);
	es_replace_file(dir, "control.1", block, sizeof(block));
}

/*
 * Removes what no manifest names: files that were never finished, segments that were
 * finished but not adopted, or dropped but not yet unlinked.  Own WAL is not
 * looked at here: log_file.c knows which of its files count.
 */
static void
remove_unnamed(int shard, EsManifestState *manifest)
{
	char		  *dir_path = es_path_shard(shard);
	DIR			  *dir = AllocateDir(dir_path);
	struct dirent *entry;
	uint64		   highest = 0;

	while ((entry = ReadDir(dir, dir_path)) != NULL)
	{
		bool			   named = true;
		unsigned long long id;
		int				   end = 0;
		char			  *path;

		if (strncmp(entry->d_name, ES_TMP_PREFIX, strlen(ES_TMP_PREFIX)) == 0)
		{
			named = false;
			if (sscanf(entry->d_name, ES_TMP_PREFIX "seg.%16llx", &id) == 1)
				highest = Max(highest, id);
		}
		else if (sscanf(entry->d_name, "seg.%16llx%n", &id, &end) == 1 && entry->d_name[end] == '\0')
		{
			highest = Max(highest, id);
			named = es_manifest_find(manifest, id) != NULL;
		}
		if (named)
			continue;

		path = psprintf("%s/%s", dir_path, entry->d_name);
		if (unlink(path) != 0 && errno != ENOENT)
			es_file_error(LOG, errno, "remove", path);
		pfree(path);
	}
	FreeDir(dir);

	/*
	 * A worker may still be writing a file for the incarnation that died: leave room
	 * for the ids that it handed out.
	 */
	manifest->head.next_segment_id = Max(manifest->head.next_segment_id, highest + 1) + 1000;
}

/*
 * A shard that was stopped cleanly, and was opened again after that, comes with what it
 * had then (control.c): what it has taken since would be missing without a word.
 */
static void
check_not_older(int shard, EsShardFiles *files)
{
	EsLsn stopped = files->control.restart_lsn;
	EsLsn opened;

	if (!(files->control.flags & ES_CONTROL_CLEAN))
		return;
	opened = es_opened_lsn(&files->identity);
	if (opened <= stopped || opened > GetFlushRecPtr(NULL))
		return;

	files->older = pg_atomic_read_u32(&es_shard->release_wal) != 0;
	if (files->older)
		ereport(
			WARNING,
			(errcode(ERRCODE_DATA_CORRUPTED),
			 errmsg("shard %d opens with files that are older than those it had last", shard),
			 errdetail(
				 "event_store.release_wal(%d) was called. The files are of a stop at %X/%X, and the shard was opened again at %X/%X: events since the stop are lost.",
				 shard, LSN_FORMAT_ARGS(stopped), LSN_FORMAT_ARGS(opened))));
	else
		ereport(
			ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("the files of shard %d are older than those it had last", shard),
			 errdetail("They are of a clean stop at %X/%X, but by file \"" ES_STORE_DIR
					   ".opened\" the shard was opened again at %X/%X.",
					   LSN_FORMAT_ARGS(stopped), LSN_FORMAT_ARGS(opened)),
			 errhint(
				 "Stop the server, and put the newer directory back or restore the whole data directory. event_store.release_wal(%d) opens the shard with these files and gives up later events.",
				 shard)));
}

void
es_files_open(int shard, EsShardFiles *files)
{
	char	   *dir = es_path_shard(shard);
	struct stat st;

	memset(files, 0, sizeof(*files));
	es_identity(shard, &files->identity);

	if (stat(dir, &st) != 0)
	{
		if (errno != ENOENT)
			es_file_error(ERROR, errno, "stat", dir);
		ereport(ERROR, (errcode(ERRCODE_DATA_CORRUPTED),
						errmsg("directory \"%s\" of shard %d is missing", dir, shard),
						errdetail_plural("The store file says that the store has %d shard.",
										 "The store file says that the store has %d shards.",
										 es_shared->nshards, es_shared->nshards),
						errhint("Restore the data directory from a backup.")));
	}

	es_control_read(shard, &files->control);
	es_control_check(shard, &files->control, &files->identity);
	check_not_older(shard, files);
	files->fresh = files->control.incarnation == 0;
	es_manifest_load(shard, &files->control, &files->manifest);

	/* all is well: from here on things change */
	remove_unnamed(shard, &files->manifest);
	es_manifest_open(shard, &files->identity, &files->manifest);
}
