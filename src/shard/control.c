/*-------------------------------------------------------------------------
 *
 * control.c
 *	  A shard's two control blocks.
 *
 * The blocks are written in turn, each in a file of its own, so that a write that
 * is torn, or refused half-way, only ever damages the one that did not count
 * yet.  The valid one with the higher sequence number is current.  If one is
 * invalid that is what a crash leaves behind: its sync had not returned, so nobody
 * had acted upon it.  If both are, the shard does not open.
 *
 * A new incarnation makes both files anew before it takes its first message, for two
 * reasons.  A write that its predecessor left in flight reaches an inode that
 * has no name any more.  And both say "not clean" then: were only one
 * of them overwritten, damage to it would bring the older "clean" one back and
 * with it the belief that nothing has to be recovered.
 *
 * What happens to the write (PROTOCOL.md 5): an error on write means that the
 * block is written again, at the same place, a second later; an error on sync is a PANIC,
 * for a later sync of the same pages would report success.
 *
 * An older copy of the store's directory beside a newer cluster.  One that was not stopped cleanly asks for
 * PostgreSQL's WAL, and is refused if that is gone.  One that was asks for nothing; so there is
 * a witness that such a copy does not bring along: file "event_store.opened" beside the
 * directory, with a block for each shard, a copy of the control block with which the shard opened last.
 *		When a clean shard is opened, restart_lsn of its control block is not below that of the note.
 * A control block's restart_lsn never moves back, and the note is written after both of the shard's
 * blocks were replaced and synced with what it says.  So a crash, a full disk or a lost write between
 * them leaves a note that is older than it could be, and older notes refuse less.  A clean
 * stop notes F, and the next start of the server, which has written a checkpoint since, F
 * again: so every older clean copy is below.  A clean shard that is not opened for long, because
 * it cannot or because the server stopped before, has an old block and an old note.
 *		The slot could not be that witness.  It moves on without shards that are clean (while others
 * stop, or run), it is made anew at a checkpoint behind a clean stop, and anybody may move
 * it while the library is not loaded.
 *		A note counts for its store, cluster, timeline and shard only: a new store in the place of
 * one that was given up has no note, nor has one that was adopted, whose control blocks
 * have F of the adoption, besides.  And it counts only if it lies in the cluster's past: where
 * PostgreSQL's files are the older ones (a backup was put over a newer data directory that held
 * this file) it is the note that is wrong.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <fcntl.h>
#include <sys/time.h>
#include <unistd.h>

#include "storage/fd.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "ipc/fault.h"
#include "shard/control.h"
#include "shard/files.h"
#include "shard/shard.h"
#include "shard/uring.h"

#define RETRY_US USECS_PER_SEC

static const char *const names[2] = {"control.0", "control.1"};

/* of the owning process */
static int	  owned_shard = -1;
static int	  fds[2] = {-1, -1};
static int	  last_replaced; /* file with the newer of the two */
static int	  current;		 /* file of the last block that was synced */
static uint64 sequence;		 /* of that block */
static char	 *block;		 /* the next one */
static bool	  busy = false;	 /* block is on its way */
static void (*when_done)(void);
static int		   stuck_errno = 0;
static TimestampTz retry_at = 0; /* 0 = nothing to try again */
static TimestampTz sync_started;

uint64
es_unix_micros(void)
{
	struct timeval tv;

	gettimeofday(&tv, NULL);
	return (uint64) tv.tv_sec * 1000000 + tv.tv_usec;
}

/* ---- reading ---- */

static EsStatus
read_block(int shard, int which, EsControl *control, EsError *err)
{
	char	*path = es_path_in_shard(shard, names[which]);
	size_t	 len;
	char	*data = es_read_file(path, &len);
	EsStatus status;

	if (data == NULL)
		status = es_fail(err, ES_ERR_CORRUPT, 0, "the file is missing");
	else if (len != ES_WAL_BLOCK)
		status = es_fail(err, ES_ERR_CORRUPT, len, "the file has %zu bytes instead of %d", len, ES_WAL_BLOCK);
	else
		status = es_control_decode(data, control, err);
	if (data != NULL)
		pfree(data);
	pfree(path);
	return status;
}

void
es_control_read(int shard, EsControl *control)
{
	EsControl c[2];
	EsError	  err[2];
	EsStatus  status[2];
	int		  which;

	for (int i = 0; i < 2; i++)
		status[i] = read_block(shard, i, &c[i], &err[i]);
	which = es_control_current(status[0], &c[0], status[1], &c[1]);
	if (which < 0)
	{
		int bad = status[1] == ES_ERR_VERSION || status[0] == ES_OK ? 1 : 0;

		es_corruption(ERROR, es_path_in_shard(shard, names[bad]), &err[bad]);
	}
	if (status[1 - which] != ES_OK)
		ereport(LOG, (errcode(ERRCODE_DATA_CORRUPTED),
					  errmsg("shard %d goes by its control block \"%s\"", shard, names[which]),
					  errdetail("The other one is not valid, as after a crash while it was written: %s.",
								err[1 - which].what)));
	*control = c[which];
}

void
es_control_check(int shard, const EsControl *control, const EsFileIdentity *identity)
{
	const EsFileIdentity *found = &control->identity;
	EsError				  err;

	if (memcmp(found->store_uuid, identity->store_uuid, ES_UUID_LEN) != 0)
		es_fail(&err, ES_ERR_FOREIGN, offsetof(EsControl, identity), "the store's uuid is another one");
	else if (found->shard != identity->shard || found->nshards != identity->nshards)
		es_fail(&err, ES_ERR_FOREIGN, offsetof(EsControl, identity),
				"it is of shard %u of %u, not of shard %u of %u", found->shard, found->nshards,
				identity->shard, identity->nshards);
	else if (found->system_identifier != identity->system_identifier)
		es_fail(&err, ES_ERR_FOREIGN, offsetof(EsControl, identity),
				"its system identifier is %llu, this cluster's is %llu",
				(unsigned long long) found->system_identifier,
				(unsigned long long) identity->system_identifier);
	else if (found->timeline != identity->timeline)
		es_fail(&err, ES_ERR_FOREIGN, offsetof(EsControl, identity),
				"it was written on timeline %u, the cluster is on timeline %u", found->timeline,
				identity->timeline);
	else
		return;
	es_corruption(ERROR, es_path_in_shard(shard, names[control->sequence % 2]), &err);
}

/* ---- with what shards opened last ---- */

#define OPENED_NAME ES_STORE_DIR ".opened"

void
es_opened_note(int shard, const EsControl *control)
{
	EsControl c = *control;
	char	  buf[ES_WAL_BLOCK];
	int		  fd = OpenTransientFile(OPENED_NAME, O_RDWR | O_CREAT | PG_BINARY);

	if (fd < 0)
	{
		es_file_error(LOG, errno, "open", OPENED_NAME);
		return;
	}
	es_control_encode(&c, buf);
	errno = 0;
	if (pg_pwrite(fd, buf, sizeof(buf), (off_t) shard * ES_WAL_BLOCK) != sizeof(buf))
		es_file_error(LOG, errno ? errno : ENOSPC, "write", OPENED_NAME);
	else if (pg_fsync(fd) != 0)
		es_file_error(LOG, errno, "fsync", OPENED_NAME);
	else
		(void) fsync_fname_ext(".", true, false, LOG);
	CloseTransientFile(fd);
}

EsLsn
es_opened_lsn(const EsFileIdentity *identity)
{
	static const char nothing[ES_WAL_BLOCK];
	char			  buf[ES_WAL_BLOCK];
	EsControl		  c;
	EsError			  err;
	ssize_t			  len;
	int				  fd = OpenTransientFile(OPENED_NAME, O_RDONLY | PG_BINARY);

	if (fd < 0)
	{
		if (errno != ENOENT)
			es_file_error(LOG, errno, "open", OPENED_NAME);
		return 0;
	}
	len = pg_pread(fd, buf, sizeof(buf), (off_t) identity->shard * ES_WAL_BLOCK);
	if (len < 0)
		es_file_error(LOG, errno, "read", OPENED_NAME);
	CloseTransientFile(fd);

	/* it ends there, or has a hole, if the shard has never opened */
	if (len != sizeof(buf) || memcmp(buf, nothing, sizeof(buf)) == 0)
		return 0;
	if (es_control_decode(buf, &c, &err) != ES_OK)
	{
		ereport(LOG,
				(errcode(ERRCODE_DATA_CORRUPTED),
				 errmsg("file \"%s\" does not tell whether the files of shard %d are those that it had last",
						OPENED_NAME, identity->shard),
				 errdetail("Its block at offset %d is not valid: %s.", identity->shard * ES_WAL_BLOCK,
						   err.what)));
		return 0;
	}
	return memcmp(&c.identity, identity, sizeof(*identity)) == 0 ? c.restart_lsn : 0;
}

/* ---- writing ---- */

static void
open_files(int shard)
{
	for (int i = 0; i < 2; i++)
	{
		char *path = es_path_in_shard(shard, names[i]);

		if (fds[i] >= 0)
		{
			close(fds[i]);
			ReleaseExternalFD();
		}
		fds[i] = BasicOpenFile(path, O_RDWR | PG_BINARY);
		if (fds[i] < 0)
			es_file_error(ERROR, errno, "open", path);
		ReserveExternalFD();
		pfree(path);
	}
	if (block == NULL)
		block = (char *) TYPEALIGN(ES_WAL_BLOCK, MemoryContextAlloc(TopMemoryContext, 2 * ES_WAL_BLOCK));
}

void
es_control_replace(int shard, EsControl *control)
{
	EsControl c[2];
	EsError	  err;
	EsStatus  status[2];
	char	 *dir = es_path_shard(shard);
	char	  buf[ES_WAL_BLOCK];
	int		  which;

	for (int i = 0; i < 2; i++)
		status[i] = read_block(shard, i, &c[i], &err);
	which = es_control_current(status[0], &c[0], status[1], &c[1]);
	if (which >= 0 && control->sequence < c[which].sequence)
		control->sequence = c[which].sequence;
	if (which < 0)
		which = 0;

	for (int i = 0; i < 2; i++)
	{
		which = 1 - which;
		control->sequence++;
		control->written_at = es_unix_micros();
		es_control_encode(control, buf);
		es_replace_file(dir, names[which], buf, sizeof(buf));
		ES_FAULT("control-replaced");
	}
	last_replaced = which;
	pfree(dir);
}

void
es_control_own(int shard, const EsControl *control)
{
	open_files(shard);
	owned_shard = shard;
	current = last_replaced;
	sequence = control->sequence;
}

static void control_written(void *arg, int result);
static void control_synced(void *arg, int result);

static void
issue_write(void)
{
	int err = ES_FAULT_IO("control-write");

	retry_at = 0;
	if (err != 0)
		es_uring_result(-err, control_written, NULL);
	else
		es_uring_write(fds[1 - current], block, ES_WAL_BLOCK, 0, control_written, NULL);
}

void
es_control_write(const EsControl *control, void (*done)(void))
{
	EsControl c = *control;

	Assert(!busy && owned_shard >= 0);
	c.sequence = sequence + 1;
	c.written_at = es_unix_micros();
	es_control_encode(&c, block);
	busy = true;
	when_done = done;
	ES_FAULT("control-before-write");
	issue_write();
}

static void
control_written(void *arg, int result)
{
	int err;

	if (result < 0)
	{
		if (stuck_errno == 0)
			es_file_error(LOG, -result, "write", es_path_in_shard(owned_shard, names[1 - current]));
		stuck_errno = -result;
		ES_COUNT(io_errors, 1);
		retry_at = GetCurrentTimestamp() + RETRY_US;
		return;
	}
	if (stuck_errno != 0)
		ereport(LOG, (errmsg("shard %d writes its control blocks again", owned_shard)));
	stuck_errno = 0;
	ES_FAULT("control-written");

	sync_started = GetCurrentTimestamp();
	err = ES_FAULT_IO("control-sync");
	if (err != 0)
		es_uring_result(-err, control_synced, NULL);
	else
		es_uring_fdatasync(fds[1 - current], control_synced, NULL);
}

static void
control_synced(void *arg, int result)
{
	if (result < 0)
		es_file_error(data_sync_elevel(PANIC), -result, "fsync",
					  es_path_in_shard(owned_shard, names[1 - current]));
	es_count_fsync(sync_started);
	ES_FAULT("control-synced");
	ES_COUNT(control_writes, 1);
	current = 1 - current;
	sequence++;
	busy = false;
	when_done();
}

void
es_control_tick(void)
{
	if (retry_at != 0 && GetCurrentTimestamp() >= retry_at)
		issue_write();
}

int
es_control_stuck_errno(void)
{
	return stuck_errno;
}
