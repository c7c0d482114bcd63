/*-------------------------------------------------------------------------
 *
 * log_file.c
 *	  The files of a shard's own WAL.
 *
 * A running log only ever overwrites bytes of a file that is there at its whole size,
 * so that making a group durable is a write and an fdatasync without any
 * metadata.  Hence the next file is made while the current one fills: under a temporary
 * name it gets its space (fallocate) and real zeros in slices through the ring, one
 * slice in flight, is synced, gets its name, and the directory is synced through the
 * ring as well.  Files that the log needs no more are kept as spares, under temporary
 * names, and become the next file by a rename alone: what stands in them carries the
 * own LSNs of its former life and is never taken for a frame.
 *
 * Only files that this very process made are used again.  A dead incarnation's
 * write may still be on its way to a file it had open (io_uring); it must find
 * its old file, removed or not, and nothing of ours.  For the same reason a
 * new incarnation begins a new file, numbered above everything in the directory.
 *
 * O_DIRECT saves the page cache and the copy, and makes errors come with the
 * write that met them.  Where the file system refuses it on open, or first on write,
 * the file goes on without.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "storage/fd.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "guc.h"
#include "ipc/fault.h"
#include "shard/log_file.h"
#include "shard/shard.h"
#include "shard/uring.h"

#define SLICE	   (1024 * 1024)
#define NEXT_NAME  ES_TMP_PREFIX "wal.next"
#define MAX_SPARES 16

#ifndef O_DIRECT
#define O_DIRECT 0
#endif

typedef enum Preparing
{
	PREPARE_NONE,
	PREPARE_FILL, /* a slice of zeros is being written */
	PREPARE_SYNC,
	PREPARE_DIRECTORY, /* has its name, the directory is being synced */
	PREPARE_READY
} Preparing;

dlist_head es_log_files = DLIST_STATIC_INIT(es_log_files);

static int	  my_shard;
static uint64 standard_size;
static char	 *zeros = NULL; /* SLICE bytes, aligned for O_DIRECT */
static int	  dir_fd = -1;

static Preparing   preparing = PREPARE_NONE;
static EsLogFile  *next = NULL;
static uint64	   filled; /* bytes of it that are there */
static uint64	   target; /* bytes it is to have */
static int		   prepare_errno = 0;
static TimestampTz retry_at = 0;

static EsLogFile *spares[MAX_SPARES];
static int		  nspares = 0;
static uint32	  spare_names = 0;

char *
es_log_file_path(int shard, uint32 number)
{
	return psprintf("%s/shard_%d/wal.%08x", ES_STORE_DIR, shard, number);
}

static char *
spare_path(uint32 name)
{
	return psprintf("%s/shard_%d/" ES_TMP_PREFIX "wal.spare.%u", ES_STORE_DIR, my_shard, name);
}

static EsLogFile *
new_file(uint32 number)
{
	EsLogFile *file = MemoryContextAllocZero(TopMemoryContext, sizeof(EsLogFile));

	file->number = number;
	file->fd = -1;
	return file;
}

static void
free_file(EsLogFile *file)
{
	if (file->fd >= 0)
	{
		close(file->fd);
		ReleaseExternalFD();
	}
	pfree(file);
}

EsLogFile *
es_log_file_add(uint32 number)
{
	EsLogFile *file = new_file(number);

	dlist_push_tail(&es_log_files, &file->node);
	return file;
}

EsLogFile *
es_log_file_current(void)
{
	return dlist_tail_element(EsLogFile, node, &es_log_files);
}

int
es_log_file_count(void)
{
	int		   n = nspares + (next != NULL ? 1 : 0);
	dlist_iter iter;

	dlist_foreach(iter, &es_log_files)
		n++;
	return n;
}

/* Makes the file's inode under its temporary name; returns an errno. */
static int
create_file(EsLogFile *file)
{
	char *path = es_path_in_shard(my_shard, NEXT_NAME);
	int	  flags = O_RDWR | O_CREAT | O_EXCL | PG_BINARY;
	int	  err = 0;

	if (unlink(path) != 0 && errno != ENOENT)
		err = errno;
	else
	{
		file->direct = O_DIRECT != 0;
		file->fd = BasicOpenFile(path, flags | O_DIRECT);
		if (file->fd < 0 && errno == EINVAL && O_DIRECT != 0)
		{
			unlink(path); /* some systems refuse after they made it */
			file->direct = false;
			file->fd = BasicOpenFile(path, flags);
		}
		if (file->fd < 0)
			err = errno;
		else
			ReserveExternalFD();
	}
	pfree(path);
	return err;
}

/* Reserves space; where the file system cannot, writing the zeros does it. */
static int
reserve_space(EsLogFile *file, uint64 from, uint64 size)
{
	int rc;

	do
		rc = fallocate(file->fd, 0, (off_t) from, (off_t) (size - from));
	while (rc != 0 && errno == EINTR);
	if (rc != 0 && (errno == ENOSPC || errno == EDQUOT || errno == EIO))
		return errno;
	return 0;
}

/* ---- start ---- */

/* Highest number of a WAL file in the directory, 0 = there is none. */
static uint32
highest_number(void)
{
	char		  *path = es_path_shard(my_shard);
	DIR			  *dir = AllocateDir(path);
	struct dirent *entry;
	uint32		   highest = 0;

	while ((entry = ReadDir(dir, path)) != NULL)
	{
		unsigned int number;
		int			 end = 0;

		if (sscanf(entry->d_name, "wal.%8x%n", &number, &end) == 1 && entry->d_name[end] == '\0')
			highest = Max(highest, number);
	}
	FreeDir(dir);
	pfree(path);
	return highest;
}

void
es_log_file_start(int shard, uint32 floor)
{
	char	  *dir = es_path_shard(shard);
	char	  *tmp;
	char	  *path;
	EsLogFile *file;
	int		   err;

	my_shard = shard;
	standard_size = (uint64) es_guc_wal_file_size * 1024;
	if (zeros == NULL)
	{
		zeros = (char *) TYPEALIGN(ES_WAL_BLOCK, MemoryContextAlloc(TopMemoryContext, SLICE + ES_WAL_BLOCK));
		memset(zeros, 0, SLICE);
	}
	if (dir_fd < 0)
	{
		dir_fd = BasicOpenFile(dir, O_RDONLY);
		if (dir_fd < 0)
			es_file_error(ERROR, errno, "open", dir);
		ReserveExternalFD();
	}

	file = new_file(Max(highest_number(), floor) + 1);
	file->size = standard_size;
	tmp = es_path_in_shard(shard, NEXT_NAME);
	path = es_log_file_path(shard, file->number);
	err = create_file(file);
	if (err != 0)
	{
		free_file(file);
		es_file_error(ERROR, err, "create", tmp);
	}
	err = ES_FAULT_IO("wal-prepare-write");
	if (err == 0)
		err = reserve_space(file, 0, file->size);
	for (uint64 at = 0; err == 0 && at < file->size;)
	{
		ssize_t n = pwrite(file->fd, zeros, Min(SLICE, file->size - at), (off_t) at);

		if (n > 0)
			at += n;
		else if (n < 0 && errno == EINVAL && file->direct)
		{
			fcntl(file->fd, F_SETFL, fcntl(file->fd, F_GETFL) & ~O_DIRECT);
			file->direct = false;
		}
		else if (n == 0 || errno != EINTR)
			err = n == 0 ? ENOSPC : errno;
	}
	if (err != 0)
	{
		free_file(file);
		unlink(tmp);
		es_file_error(ERROR, err, "write", tmp);
	}
	err = ES_FAULT_IO("wal-prepare-sync");
	if (err == 0 && pg_fsync(file->fd) != 0)
		err = errno;
	if (err != 0)
	{
		free_file(file);
		unlink(tmp);
		es_file_error(ERROR, err, "fsync", tmp);
	}
	ES_FAULT("wal-first-made");
	if (rename(tmp, path) != 0)
	{
		err = errno;
		free_file(file);
		es_file_error(ERROR, err, "rename", tmp);
	}
	ES_FAULT("wal-first-renamed");
	es_fsync_dir(dir);
	dlist_push_tail(&es_log_files, &file->node);
	pfree(tmp);
	pfree(path);
	pfree(dir);
}

void
es_log_file_sweep(void)
{
	char		  *dir_path = es_path_shard(my_shard);
	DIR			  *dir = AllocateDir(dir_path);
	struct dirent *entry;

	while ((entry = ReadDir(dir, dir_path)) != NULL)
	{
		unsigned int number;
		int			 end = 0;
		bool		 counts = false;
		dlist_iter	 iter;
		char		*path;

		if (sscanf(entry->d_name, "wal.%8x%n", &number, &end) != 1 || entry->d_name[end] != '\0')
			continue;
		dlist_foreach(iter, &es_log_files)
		{
			if (dlist_container(EsLogFile, node, iter.cur)->number == number)
				counts = true;
		}
		if (counts)
			continue;
		path = psprintf("%s/%s", dir_path, entry->d_name);
		if (unlink(path) != 0 && errno != ENOENT)
			es_file_error(LOG, errno, "remove", path);
		pfree(path);
	}
	FreeDir(dir);
	pfree(dir_path);
}

/* ---- preparing the next file ---- */

static void slice_written(void *arg, int result);
static void next_synced(void *arg, int result);
static void directory_synced(void *arg, int result);

/*
 * Something failed before the file was in use: it is thrown away and a second later made
 * anew, so no failed sync is ever asked again on the same pages.
 */
static void
prepare_failed(int err, const char *operation)
{
	char *path = es_path_in_shard(my_shard, NEXT_NAME);

	if (prepare_errno == 0)
		es_file_error(LOG, err, operation, path);
	ES_COUNT(io_errors, 1);
	prepare_errno = err;
	retry_at = GetCurrentTimestamp() + USECS_PER_SEC;
	if (next != NULL)
	{
		/* it may have its name already */
		if (next->number != 0)
		{
			char *named = es_log_file_path(my_shard, next->number);

			unlink(named);
			pfree(named);
		}
		free_file(next);
	}
	next = NULL;
	unlink(path);
	pfree(path);
	preparing = PREPARE_NONE;
}

static void
write_slice(void)
{
	int err = ES_FAULT_IO("wal-prepare-write");

	if (err != 0)
		es_uring_result(-err, slice_written, NULL);
	else
		es_uring_write(next->fd, zeros, Min(SLICE, target - filled), filled, slice_written, NULL);
}

static void
sync_directory(void)
{
	int err = ES_FAULT_IO("directory-sync");

	preparing = PREPARE_DIRECTORY;
	if (err != 0)
		es_uring_result(-err, directory_synced, NULL);
	else
		es_uring_fsync(dir_fd, directory_synced, NULL);
}

/* Gives the next file its name, which is a promise of zeros or of another number's frames. */
static void
name_next(const char *from)
{
	char *path;

	next->number = es_log_file_current()->number + 1;
	path = es_log_file_path(my_shard, next->number);
	if (rename(from, path) != 0)
	{
		int err = errno;

		unlink(from);
		next->number = 0;
		prepare_failed(err, "rename");
	}
	else
	{
		ES_FAULT("wal-next-renamed");
		sync_directory();
	}
	pfree(path);
}

static void
slice_written(void *arg, int result)
{
	int err;

	if (result == -EINVAL && next->direct)
	{
		fcntl(next->fd, F_SETFL, fcntl(next->fd, F_GETFL) & ~O_DIRECT);
		next->direct = false;
		write_slice();
		return;
	}
	if (result < 0)
	{
		prepare_failed(-result, "write");
		return;
	}
	filled += result;
	if (filled < target)
	{
		write_slice();
		return;
	}
	ES_FAULT("wal-next-filled");
	preparing = PREPARE_SYNC;
	err = ES_FAULT_IO("wal-prepare-sync");
	if (err != 0)
		es_uring_result(-err, next_synced, NULL);
	else
		es_uring_fsync(next->fd, next_synced, NULL);
}

static void
next_synced(void *arg, int result)
{
	char *path;

	if (result < 0)
	{
		prepare_failed(-result, "fsync");
		return;
	}
	next->size = filled;
	if (next->number != 0)
	{
		/* was enlarged under its name */
		preparing = PREPARE_READY;
		return;
	}
	path = es_path_in_shard(my_shard, NEXT_NAME);
	name_next(path);
	pfree(path);
}

static void
directory_synced(void *arg, int result)
{
	if (result < 0)
	{
		prepare_failed(-result, "fsync the directory of");
		return;
	}
	ES_FAULT("wal-next-ready");
	if (prepare_errno != 0)
		ereport(LOG, (errmsg("shard %d makes files for its log again", my_shard)));
	prepare_errno = 0;
	retry_at = 0;
	preparing = PREPARE_READY;
}

static void
fill_from(uint64 from, uint64 size)
{
	int err;

	preparing = PREPARE_FILL;
	filled = from;
	target = size;
	err = reserve_space(next, from, size);
	if (err != 0)
		prepare_failed(err, "allocate");
	else
		write_slice();
}

void
es_log_file_tick(void)
{
	int err;

	if (preparing != PREPARE_NONE || dlist_is_empty(&es_log_files))
		return;
	if (retry_at != 0 && GetCurrentTimestamp() < retry_at)
		return;
	retry_at = 0;

	if (nspares > 0)
	{
		char *path;

		next = spares[--nspares];
		path = spare_path(next->number);
		next->number = 0;
		name_next(path);
		pfree(path);
		return;
	}
	next = new_file(0);
	err = create_file(next);
	if (err != 0)
		prepare_failed(err, "create");
	else
		fill_from(0, standard_size);
}

long
es_log_file_timeout(void)
{
	if (retry_at == 0 || preparing != PREPARE_NONE)
		return -1;
	return Max((retry_at - GetCurrentTimestamp()) / 1000 + 1, 0);
}

int
es_log_file_errno(void)
{
	return prepare_errno;
}

bool
es_log_file_idle(void)
{
	return preparing == PREPARE_NONE || preparing == PREPARE_READY;
}

EsLogFile *
es_log_file_switch(uint64 need)
{
	EsLogFile *file = next;

	if (preparing == PREPARE_NONE)
		es_log_file_tick();
	if (preparing != PREPARE_READY)
		return NULL;
	if (next->size < need)
	{
		/* a frame larger than a file has one of its own size */
		fill_from(next->size, TYPEALIGN64(ES_WAL_BLOCK, need));
		return NULL;
	}
	file = next;
	next = NULL;
	preparing = PREPARE_NONE;
	file->max_start = 0;
	dlist_push_tail(&es_log_files, &file->node);
	return file;
}

/* ---- end of a file's life ---- */

/* Enough spares that a shard which flushes regularly never has to make files. */
static int
spare_limit(void)
{
	return Min(Max(es_guc_memtable_size / es_guc_wal_file_size + 1, 2), MAX_SPARES);
}

void
es_log_file_retire(uint32 number)
{
	while (!dlist_is_empty(&es_log_files))
	{
		EsLogFile *file = dlist_head_element(EsLogFile, node, &es_log_files);
		char	  *path;

		if (file->number >= number)
			break;
		dlist_delete(&file->node);
		path = es_log_file_path(my_shard, file->number);
		if (file->fd >= 0 && file->size == standard_size && nspares < spare_limit())
		{
			uint32 name = ++spare_names;
			char  *spare = spare_path(name);

			if (rename(path, spare) == 0)
			{
				file->number = name;
				file->dirty = false;
				spares[nspares++] = file;
				file = NULL;
			}
			pfree(spare);
		}
		if (file != NULL)
		{
			if (unlink(path) != 0 && errno != ENOENT)
				es_file_error(LOG, errno, "remove", path);
			free_file(file);
		}
		ES_FAULT("wal-file-retired");
		pfree(path);
	}
}
