/*-------------------------------------------------------------------------
 *
 * log.c
 *	  A shard's own WAL while it runs: what was written (log_write.c) becomes es_log.durable.
 *
 * A sync goes through these states:
 *
 *		BEGUN	F was read, then all floors; the engine drains its queues
 *		FIXED	what is to be written before the sync is known (what F covers)
 *		FILES	fdatasync of every file that was written
 *		CONTROL	a control block with durable end and restart_lsn is on its way
 *
 * restart_lsn is computed when the control block is made, from the F and the floors
 * of BEGUN and from the starts of all frames that the sync does not cover.  Messages
 * that came to the queue after FIXED cannot be older: each was either logged after F
 * was read (start >= F), or unsent when the floors were read (a floor stands below it), or
 * in a queue that was drained before FIXED.  Groups go on being written during FILES and
 * CONTROL; they count with the next sync.
 *
 * Only when a control block is synced its content becomes true for others: es_shard's
 * restart_lsn, own LSNs of boundaries, files that may be used again.
 *
 * A sync that failed is a PANIC: the pages may be gone, and the next sync would not say so.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xlog.h"
#include "miscadmin.h"
#include "storage/fd.h"
#include "storage/latch.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#include "core/arith.h"
#include "guc.h"
#include "ipc/fault.h"
#include "shard/control.h"
#include "shard/log_internal.h"
#include "shard/shard.h"
#include "shard/uring.h"

#define WANT_US		10000 /* between syncs that somebody waits for */
#define QUIET_BYTES (UINT64CONST(16) * 1024 * 1024)
#define QUIET_US	(300 * USECS_PER_SEC)

/* A frame that is not durable and holds restart_lsn back. */
typedef struct Undurable
{
	uint64 ticket;
	EsLsn  start;
} Undurable;

typedef enum SyncState
{
	SYNC_IDLE,
	SYNC_BEGUN,
	SYNC_FIXED,
	SYNC_FILES,
	SYNC_CONTROL
} SyncState;

EsLog es_log;

static uint16 kept_flags; /* of the control block */
static bool	  closing = false;

static Undurable *undurable = NULL;
static uint64	  undurable_first = 0; /* the array is a ring: numbers of entries, not indexes */
static uint64	  undurable_next = 0;
static uint64	  undurable_size = 0; /* a power of two */

/* syncing */
static SyncState   sync_state = SYNC_IDLE;
static uint64	   syncs_begun = 0;
static uint64	   syncs_done = 0;
static bool		   wanted = false;	  /* a sync that begins from now on */
static uint64	   wanted_ticket = 0; /* and more until this frame is durable */
static bool		   waited_for = false;
static TimestampTz last_sync = 0;
static EsLsn	   last_sync_flushed = 0; /* F of the last sync that was done */
static EsLsn	   sync_flushed;		  /* F of this one */
static EsLsn	  *floors;				  /* es_shared->nslots */
static uint32	   nfloors;
static uint64	   sync_target; /* frames to be written first */
static EsLsn	   sync_unframed;
static EsLogEnd	   sync_end; /* what the sync covers */
static int		   files_in_sync;
static uint32	   sync_request; /* es_shard->sync_request when it began */
static TimestampTz sync_started;
static EsControl   control; /* the one being written */

/* durable: what the last synced control block says */
static EsLsn	  restart_lsn;
static EsOwnLsn	  first_file;
static EsPosition reserved_below;
static EsOwnLsn	  released = 0;

/* ---- start ---- */

static EsPosition
known_reserve(void)
{
	return Max(reserved_below, (EsPosition) pg_atomic_read_u64(&es_shared->reserve_announced));
}

static void
publish(void)
{
	pg_atomic_write_u64(&es_shard->restart_lsn, restart_lsn);
	es_wake_keeper();
}

static void
fill_control(EsControl *c)
{
	memset(c, 0, sizeof(*c));
	c->flags = kept_flags;
	c->identity = es_log.identity;
	c->incarnation = es_log.incarnation;
	c->durable_end = es_log.durable.lsn;
	c->durable_crc = es_log.durable.crc;
	c->first_file = first_file;
	c->restart_lsn = restart_lsn;
	c->reserved_below = reserved_below = known_reserve();
	es_manifest_position(&c->manifest_generation, &c->manifest_len);
}

/*
 * A shard that was stopped cleanly needs nothing of PostgreSQL's WAL up to now.  It
 * says so in two steps, for the keeper's sake: first it counts again (clean = 0,
 * with a place that is not beyond anybody's), then it reads the F it begins with.
 */
static void
begin_restart_lsn(const EsControl *last)
{
	if (!(last->flags & ES_CONTROL_CLEAN))
	{
		restart_lsn = last->restart_lsn;
		return;
	}
	pg_atomic_write_u64(&es_shard->restart_lsn, Max(GetFlushRecPtr(NULL), last->restart_lsn));
	pg_memory_barrier();
	pg_atomic_write_u32(&es_shard->clean, 0);
	pg_memory_barrier();
	restart_lsn = Max(GetFlushRecPtr(NULL), last->restart_lsn);
}

void
es_log_open(const EsShardFiles *files, uint64 incarnation)
{
	const EsControl *last = &files->control;
	EsControl		 c;
	uint32			 floor;

	Assert(!es_log.opened);
	if (es_log.context == NULL)
		es_log.context = AllocSetContextCreate(TopMemoryContext, "event_store log", ALLOCSET_DEFAULT_SIZES);
	if (!es_log_replayed)
		es_log_replay(files, NULL); /* the files that count must be known */

	es_log.identity = files->identity;
	es_log.incarnation = Max(last->incarnation + 1, incarnation);
	kept_flags = last->flags & ES_CONTROL_RELEASED;
	es_log.durable.ticket = 0;
	es_log.durable.lsn = last->durable_end;
	es_log.durable.crc = last->durable_crc;
	first_file = last->first_file;
	reserved_below = last->reserved_below;
	es_log.encoded = es_log.written = es_log.durable;
	begin_restart_lsn(last);

	floor = Max(ES_OWN_FILE(last->durable_end), ES_OWN_FILE(files->manifest.flushed_up_to));
	floor = Max(floor, ES_OWN_FILE(last->first_file));
	es_log_file_start(es_log.identity.shard, floor);
	es_log_writer_open();
	floors = MemoryContextAllocZero(es_log.context, sizeof(EsLsn) * es_shared->nslots);

	ES_FAULT("log-before-unclean");
	fill_control(&c);
	c.sequence = last->sequence;
	es_control_replace(es_log.identity.shard, &c);
	es_control_own(es_log.identity.shard, &c);
	ES_FAULT("log-unclean");
	es_opened_note(es_log.identity.shard, &c);
	publish();
	pg_memory_barrier();
	pg_atomic_write_u32(&es_shard->clean, 0);

	es_log_file_sweep();
	last_sync = GetCurrentTimestamp();
	last_sync_flushed = GetFlushRecPtr(NULL);
	es_log.opened = true;
}

/* ---- what is not durable ---- */

static inline Undurable *
undurable_entry(uint64 n)
{
	return &undurable[n & (undurable_size - 1)];
}

void
es_log_remember_undurable(uint64 ticket, EsLsn start)
{
	if (undurable_next - undurable_first == undurable_size)
	{
		uint64	   size = undurable_size == 0 ? 1024 : undurable_size * 2;
		Undurable *grown = MemoryContextAllocHuge(es_log.context, size * sizeof(Undurable));

		for (uint64 n = undurable_first; n < undurable_next; n++)
			grown[n & (size - 1)] = *undurable_entry(n);
		if (undurable != NULL)
			pfree(undurable);
		undurable = grown;
		undurable_size = size;
	}
	undurable_entry(undurable_next)->ticket = ticket;
	undurable_entry(undurable_next)->start = start;
	undurable_next++;
}

uint64
es_log_durable_ticket(void)
{
	return es_log.durable.ticket;
}

EsLsn
es_log_restart_lsn(void)
{
	return restart_lsn;
}

int
es_log_stuck_errno(void)
{
	int err = es_log_write_errno();

	return err != 0 ? err : es_control_stuck_errno();
}

/* ---- syncs ---- */

void
es_log_want_sync(void)
{
	wanted = true;
	waited_for = true;
	wanted_ticket = es_log.last_ticket;
}

void
es_log_give_up(EsLsn upto)
{
	restart_lsn = Max(restart_lsn, upto);
	kept_flags |= ES_CONTROL_RELEASED;
	es_log_want_sync();
}

uint64
es_log_syncs_begun(void)
{
	return syncs_begun;
}

uint64
es_log_syncs_done(void)
{
	return syncs_done;
}

/* Number below which no file is needed any more, by what is durable. */
static uint32
first_needed(void)
{
	dlist_iter iter;

	dlist_foreach(iter, &es_log_files)
	{
		EsLogFile *f = dlist_container(EsLogFile, node, iter.cur);

		if (f == es_log.file || f->dirty || f->number >= ES_OWN_FILE(released) || f->max_start >= restart_lsn)
			return f->number;
	}
	return es_log.file->number;
}

bool
es_log_sync_due(void)
{
	TimestampTz now;
	EsLsn		flushed;
	bool		active;

	if (!es_log.opened)
		return false;
	if (sync_state == SYNC_BEGUN)
		return true; /* the drain was not complete: begin again */
	if (sync_state != SYNC_IDLE)
		return false;
	if (wanted || pg_atomic_read_u32(&es_shard->sync_request) != pg_atomic_read_u32(&es_shard->sync_done))
		return true;

	now = GetCurrentTimestamp();
	if (waited_for && es_log.durable.ticket < wanted_ticket && now - last_sync >= WANT_US &&
		(es_log.encoded.ticket > es_log.durable.ticket || es_log_can_write(GetFlushRecPtr(NULL))))
		return true;

	/* an interval that was set to less than the time a sync takes does not make it a busy loop */
	if (now - last_sync < (int64) es_guc_wal_sync_interval * 1000)
		return false;
	active = es_log.encoded.ticket > es_log.durable.ticket;
	if (active || first_needed() > ES_OWN_FILE(first_file))
		return true;
	flushed = GetFlushRecPtr(NULL);
	if (es_log_can_write(flushed))
		return true;
	return flushed - last_sync_flushed >= QUIET_BYTES ||
		   (flushed != last_sync_flushed && now - last_sync >= QUIET_US);
}

void
es_log_sync_begin(void)
{
	EsLsn floor;

	Assert(sync_state == SYNC_IDLE || sync_state == SYNC_BEGUN);
	if (sync_state == SYNC_IDLE)
	{
		syncs_begun++;
		wanted = false;
		sync_request = pg_atomic_read_u32(&es_shard->sync_request);
	}
	sync_state = SYNC_BEGUN;

	/* F, then the floors, then (the caller) the queues: PROTOCOL.md 5.2 */
	sync_flushed = GetFlushRecPtr(NULL);
	pg_memory_barrier();
	nfloors = 0;
	for (int i = 0; i < es_shared->nslots; i++)
	{
		floor = pg_atomic_read_u64(&es_shared->slots[i].floor);
		if (floor != 0)
			floors[nfloors++] = floor;
	}
	pg_memory_barrier();
	ES_FAULT("sync-begun");
}

void
es_log_sync_fix(EsLsn oldest_unframed)
{
	if (sync_state != SYNC_BEGUN)
		return;
	sync_unframed = oldest_unframed;
	sync_target = es_log_covered_by(sync_flushed);
	sync_state = SYNC_FIXED;
	ES_FAULT("sync-fixed");
}

static void file_synced(void *arg, int result);
static void control_done(void);

static void
sync_files(void)
{
	dlist_iter iter;

	sync_state = SYNC_FILES;
	sync_end = es_log.written;
	files_in_sync = 1; /* ours: nothing below may end the state before all are asked */
	sync_started = GetCurrentTimestamp();
	ES_FAULT("wal-before-sync");
	dlist_foreach(iter, &es_log_files)
	{
		EsLogFile *f = dlist_container(EsLogFile, node, iter.cur);
		int		   err;

		if (!f->dirty)
			continue;
		f->dirty = false;
		files_in_sync++;
		err = ES_FAULT_IO("wal-sync");
		if (err != 0)
			es_uring_result(-err, file_synced, f);
		else
			es_uring_fdatasync(f->fd, file_synced, f);
	}
	files_in_sync--;
}

static void
file_synced(void *arg, int result)
{
	EsLogFile *f = arg;

	if (result < 0)
		es_file_error(data_sync_elevel(PANIC), -result, "fsync",
					  es_log_file_path(es_log.identity.shard, f->number));
	es_count_fsync(sync_started);
	ES_FAULT("wal-synced");
	files_in_sync--;
}

/* Start of the oldest message that will not be durable with this sync, 0 = none. */
static EsLsn
oldest_undurable(void)
{
	EsLsn oldest = sync_unframed;

	for (uint64 n = undurable_first; n < undurable_next; n++)
	{
		const Undurable *u = undurable_entry(n);

		if (u->ticket > sync_end.ticket && (oldest == 0 || u->start < oldest))
			oldest = u->start;
	}
	return oldest;
}

static void
write_control(void)
{
	sync_state = SYNC_CONTROL;
	fill_control(&control);
	control.durable_end = sync_end.lsn;
	control.durable_crc = sync_end.crc;
	control.restart_lsn = es_restart_lsn(restart_lsn, sync_flushed, floors, nfloors, oldest_undurable());
	control.first_file = ES_OWN_LSN(first_needed(), 0);
	es_control_write(&control, control_done);
}

static void
control_done(void)
{
	es_log.durable = sync_end;
	restart_lsn = control.restart_lsn;
	first_file = control.first_file;
	while (undurable_first < undurable_next &&
		   undurable_entry(undurable_first)->ticket <= es_log.durable.ticket)
		undurable_first++;
	publish();
	ES_FAULT("restart-published");
	es_log_file_retire(ES_OWN_FILE(first_file));
	es_log_forget_boundaries();

	last_sync = GetCurrentTimestamp();
	last_sync_flushed = sync_flushed;
	syncs_done++;
	if (!wanted && es_log.durable.ticket >= wanted_ticket)
		waited_for = false;
	pg_atomic_write_u32(&es_shard->sync_done, sync_request);
	sync_state = SYNC_IDLE;
}

static void
sync_tick(void)
{
	if (sync_state == SYNC_FIXED && es_log.written.ticket >= sync_target)
		sync_files();
	if (sync_state == SYNC_FILES && files_in_sync == 0)
		write_control();
}

void
es_log_release(EsOwnLsn from)
{
	released = Max(released, from);
}

/* ---- the loop's calls ---- */

/* Then groups do not wait for company. */
static bool
somebody_waits(void)
{
	return waited_for || closing || (sync_state == SYNC_FIXED && es_log.written.ticket < sync_target);
}

void
es_log_tick(void)
{
	TimestampTz now;

	if (!es_log.opened)
		return;
	now = GetCurrentTimestamp();
	es_control_tick();
	es_log_file_tick();
	es_log_write_tick(now, somebody_waits());
	sync_tick();
	ES_SET(wal_files, es_log_file_count());
}

static long
earlier(long timeout, int64 us)
{
	long ms = us <= 0 ? 0 : (long) (us / 1000 + 1);

	return timeout < 0 ? ms : Min(timeout, ms);
}

long
es_log_timeout(void)
{
	TimestampTz now = GetCurrentTimestamp();
	long		timeout;
	long		prepare = es_log_file_timeout();

	if (!es_log.opened)
		return -1;
	if ((sync_state == SYNC_FIXED && es_log.written.ticket >= sync_target) ||
		(sync_state == SYNC_FILES && files_in_sync == 0))
		return 0;
	timeout = es_log_write_timeout(now, somebody_waits());
	if (sync_state == SYNC_BEGUN)
		timeout = earlier(timeout, 10000); /* the drain was not complete */
	if (prepare >= 0)
		timeout = earlier(timeout, prepare * 1000);
	if (es_control_stuck_errno() != 0)
		timeout = earlier(timeout, 100000);
	if (sync_state == SYNC_IDLE)
	{
		if (wanted)
			return 0;
		if (waited_for)
			timeout = earlier(timeout, last_sync + WANT_US - now);
		if (es_log.last_ticket > es_log.durable.ticket)
			timeout = earlier(timeout, Max(last_sync + (int64) es_guc_wal_sync_interval * 1000 - now, 1000));
		/* quiet: is there much new in PostgreSQL's WAL? */
		timeout = earlier(timeout, USECS_PER_SEC);
	}
	return timeout;
}

/* ---- stopping ---- */

/* Waits for something to complete, at most 100 ms. */
static void
wait_for_io(void)
{
	pgsocket fd = es_uring_event_fd();

	if (es_uring_reap() > 0)
		return;
	if (fd != PGINVALID_SOCKET)
		(void) WaitLatchOrSocket(MyLatch,
								 WL_LATCH_SET | WL_SOCKET_READABLE | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, fd,
								 100, PG_WAIT_EXTENSION);
	else
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, 100, PG_WAIT_EXTENSION);
	ResetLatch(MyLatch);
	es_uring_reap();
}

/* One whole sync of everything; false if the log stays stuck. */
static bool
sync_everything(void)
{
	TimestampTz give_up = GetCurrentTimestamp() + 10 * USECS_PER_SEC;

	/* one that is under way may not cover the last frames */
	while (sync_state != SYNC_IDLE || !es_log_written_all() || es_log.durable.ticket < es_log.last_ticket ||
		   es_log.durable.lsn != es_log.written.lsn)
	{
		if (sync_state == SYNC_IDLE || sync_state == SYNC_BEGUN)
		{
			es_log_sync_begin();
			es_log_sync_fix(0);
		}
		es_log_tick();
		wait_for_io();
		if (es_log_stuck_errno() == 0)
			give_up = GetCurrentTimestamp() + 10 * USECS_PER_SEC;
		else if (GetCurrentTimestamp() > give_up)
			return false;
	}
	return true;
}

bool
es_log_close_clean(EsPosition next_position)
{
	if (!es_log.opened)
		return true;
	closing = true;
	if (es_log.newest_end != 0)
		XLogFlush(es_log.newest_end);
	if (!sync_everything())
		return false;

	/*
	 * Nothing of ours can be logged any more: all that PostgreSQL's WAL holds for this
	 * shard is here.  F may even lie before the last messages (it does not: they
	 * were flushed above), so the block is true without reading floors.
	 */
	ES_FAULT("log-before-clean");
	fill_control(&control);
	control.flags |= ES_CONTROL_CLEAN;
	control.flags &= ~ES_CONTROL_RELEASED;
	control.restart_lsn = Max(restart_lsn, GetFlushRecPtr(NULL));
	control.next_position = next_position;
	if (es_log.durable.lsn == 0 || released >= es_log.durable.lsn)
		control.first_file = 0;
	else
		control.first_file = ES_OWN_LSN(first_needed(), 0);
	sync_end = es_log.durable;
	sync_flushed = control.restart_lsn;
	sync_state = SYNC_CONTROL;
	es_control_write(&control, control_done);
	while (sync_state != SYNC_IDLE)
	{
		es_control_tick();
		wait_for_io();
	}
	while (!es_log_file_idle())
		wait_for_io();
	pg_atomic_write_u32(&es_shard->clean, 1);
	es_wake_keeper();
	ES_FAULT("log-clean");
	es_log.opened = false;
	return true;
}
