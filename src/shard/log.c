/*-------------------------------------------------------------------------
 *
 * log.c
 *	  A shard's own WAL while it runs: frames become groups, groups become durable.
 *
 * Frames wait in a queue, in the order of their tickets.  A group is the longest
 * prefix of the queue whose messages PostgreSQL has flushed (their end <= F), cut at a
 * boundary that the engine asked for, at the end of the file and at GROUP_MAX.  It is
 * encoded into an aligned buffer, padded to a block and written at once; one group is in
 * flight, and what comes meanwhile gathers behind it (counted as staged; groups that found
 * the log idle are direct).  The shard's log lags behind PostgreSQL's by design, so an idle
 * log waits up to GATHER_US or GATHER_BYTES for company before it spends an I/O.
 *
 * A sync makes what was written count:
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
 * A group that could not be written keeps its place: the same bytes go to the same
 * offset a second later, and es_log_stuck_errno tells the engine to refuse new writes
 * meanwhile.  A sync that failed is a PANIC.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <fcntl.h>

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
#include "shard/log.h"
#include "shard/log_file.h"
#include "shard/shard.h"
#include "shard/uring.h"

#define GROUP_MAX		(1024 * 1024)
#define GATHER_BYTES	(64 * 1024)
#define GATHER_US		5000
#define WANT_US			10000	/* between syncs that somebody waits for */
#define QUIET_BYTES		(UINT64CONST(16) * 1024 * 1024)
#define QUIET_US		(300 * USECS_PER_SEC)
#define NUDGE_US		USECS_PER_SEC
#define RETRY_US		USECS_PER_SEC

typedef struct Frame
{
	struct Frame *next;
	uint64		ticket;
	TimestampTz appended;
	bool		staged;			/* came while a group was in flight */
	EsFrameHeader header;
	char		payload[FLEXIBLE_ARRAY_MEMBER];
} Frame;

/* A frame that is not durable and holds restart_lsn back. */
typedef struct Undurable
{
	uint64		ticket;
	EsLsn		start;
} Undurable;

typedef struct Boundary
{
	dlist_node	node;
	uint64		id;
	uint64		ticket;			/* last frame before it */
	EsOwnLsn	lsn;			/* 0 = its last frame has no place yet */
} Boundary;

/* A place in the log: behind which frame we are. */
typedef struct LogEnd
{
	uint64		ticket;
	EsOwnLsn	lsn;			/* byte after the last frame; 0 = there never was one */
	uint32		crc;
} LogEnd;

typedef enum SyncState
{
	SYNC_IDLE,
	SYNC_BEGUN,
	SYNC_FIXED,
	SYNC_FILES,
	SYNC_CONTROL
} SyncState;

static bool opened = false;
static MemoryContext log_context;
static EsFileIdentity identity;
static uint64 my_incarnation;
static uint16 kept_flags;		/* of the control block */

/* the queue */
static Frame *queue_head = NULL;
static Frame *queue_tail = NULL;
static Size queued_bytes = 0;
static uint64 last_ticket = 0;
static EsLsn newest_end = 0;	/* highest pg_end ever appended */
static EsLsn nudged = 0;
static TimestampTz nudged_at = 0;

static Undurable *undurable = NULL;
static uint64 undurable_first = 0;	/* the array is a ring: numbers of entries, not indexes */
static uint64 undurable_next = 0;
static uint64 undurable_size = 0;	/* a power of two */

static dlist_head boundaries = DLIST_STATIC_INIT(boundaries);
static uint64 last_boundary = 0;

/* writing */
static EsLogFile *file;			/* the current one */
static uint64 file_pos;			/* offset of the next group */
static LogEnd encoded;			/* behind the last frame that has a place */
static LogEnd written;			/* behind the last frame of the last group that was written */
static bool writing = false;
static char *group_buf;			/* aligned, group_size bytes */
static void *group_alloc;
static Size group_size;
static Size group_len;			/* padded */
static int	group_frames;
static int	write_errno = 0;
static TimestampTz write_retry_at = 0;
static bool wants_file = false; /* the next group needs the next file */
static bool urgent = false;		/* no gathering */

/* syncing */
static SyncState sync_state = SYNC_IDLE;
static uint64 syncs_begun = 0;
static uint64 syncs_done = 0;
static bool wanted = false;		/* a sync that begins from now on */
static uint64 wanted_ticket = 0;	/* and more until this frame is durable */
static bool waited_for = false;
static TimestampTz last_sync = 0;
static EsLsn last_sync_flushed = 0; /* F of the last sync that was done */
static EsLsn sync_flushed;		/* F of this one */
static EsLsn *floors;			/* es_shared->nslots */
static uint32 nfloors;
static uint64 sync_target;		/* frames to be written first */
static EsLsn sync_unframed;
static LogEnd sync_end;			/* what the sync covers */
static int	files_in_sync;
static uint32 sync_request;		/* es_shard->sync_request when it began */
static TimestampTz sync_started;
static EsControl control;		/* the one being written */

/* durable: what the last synced control block says */
static LogEnd durable;
static EsLsn restart_lsn;
static EsOwnLsn first_file;
static EsPosition reserved_below;
static EsOwnLsn released = 0;

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
	c->identity = identity;
	c->incarnation = my_incarnation;
	c->durable_end = durable.lsn;
	c->durable_crc = durable.crc;
	c->first_file = first_file;
	c->restart_lsn = restart_lsn;
	c->reserved_below = reserved_below = known_reserve();
	es_manifest_position(&c->manifest_generation, &c->manifest_len);
}

static void
make_group_buffer(Size size)
{
	if (group_alloc != NULL)
		pfree(group_alloc);
	group_alloc = NULL;
	group_alloc = MemoryContextAllocHuge(log_context, size + ES_WAL_BLOCK);
	group_buf = (char *) TYPEALIGN(ES_WAL_BLOCK, group_alloc);
	group_size = size;
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
	EsControl	c;
	uint32		floor;

	Assert(!opened);
	if (log_context == NULL)
		log_context = AllocSetContextCreate(TopMemoryContext, "event_store log", ALLOCSET_DEFAULT_SIZES);
	if (!es_log_replayed)
		es_log_replay(files, NULL); /* the files that count must be known */

	identity = files->identity;
	my_incarnation = Max(last->incarnation + 1, incarnation);
	kept_flags = last->flags & ES_CONTROL_RELEASED;
	durable.ticket = 0;
	durable.lsn = last->durable_end;
	durable.crc = last->durable_crc;
	first_file = last->first_file;
	reserved_below = last->reserved_below;
	encoded = written = durable;
	begin_restart_lsn(last);

	floor = Max(ES_OWN_FILE(last->durable_end), ES_OWN_FILE(files->manifest.flushed_up_to));
	floor = Max(floor, ES_OWN_FILE(last->first_file));
	es_log_file_start(identity.shard, floor);
	file = es_log_file_current();
	file_pos = 0;
	make_group_buffer(GROUP_MAX);
	floors = MemoryContextAllocZero(log_context, sizeof(EsLsn) * es_shared->nslots);

	ES_FAULT("log-before-unclean");
	fill_control(&c);
	c.sequence = last->sequence;
	es_control_replace(identity.shard, &c);
	es_control_own(identity.shard, &c);
	ES_FAULT("log-unclean");
	publish();
	pg_memory_barrier();
	pg_atomic_write_u32(&es_shard->clean, 0);

	es_log_file_sweep();
	last_sync = GetCurrentTimestamp();
	last_sync_flushed = GetFlushRecPtr(NULL);
	opened = true;
}

/* ---- frames ---- */

static inline Undurable *
undurable_entry(uint64 n)
{
	return &undurable[n & (undurable_size - 1)];
}

static void
remember_undurable(uint64 ticket, EsLsn start)
{
	if (undurable_next - undurable_first == undurable_size)
	{
		uint64		size = undurable_size == 0 ? 1024 : undurable_size * 2;
		Undurable  *grown = MemoryContextAllocHuge(log_context, size * sizeof(Undurable));

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
es_log_append(EsFrameType type, EsFxid fxid, EsLsn pg_start, EsLsn pg_end,
			  const void *payload, uint32 len)
{
	Frame	   *f;

	Assert(opened);
	if (len > ES_FRAME_MAX_PAYLOAD)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("a frame of %u bytes is too large for the log of shard %d", len, es_shard_id)));
	f = MemoryContextAllocHuge(log_context, offsetof(Frame, payload) + len);

	/*
	 * Carried-over frames hold nothing back: what they repeat is durable in an older
	 * file, or waits further ahead in this queue.  Verdicts come from CLOG again.
	 */
	if (pg_start != 0 && (type == ES_FRAME_BATCH || type == ES_FRAME_FINISH))
		remember_undurable(last_ticket + 1, pg_start);

	memset(f, 0, offsetof(Frame, payload));
	f->ticket = ++last_ticket;
	f->appended = GetCurrentTimestamp();
	f->staged = writing;
	f->header.type = (uint8) type;
	f->header.shard = identity.shard;
	f->header.payload_len = len;
	f->header.pg_start = pg_start;
	f->header.pg_end = pg_end;
	f->header.fxid = fxid;
	if (len > 0)
		memcpy(f->payload, payload, len);
	if (queue_tail != NULL)
		queue_tail->next = f;
	else
		queue_head = f;
	queue_tail = f;
	queued_bytes += es_frame_size(len);
	newest_end = Max(newest_end, pg_end);
	return f->ticket;
}

uint64
es_log_last_ticket(void)
{
	return last_ticket;
}

uint64
es_log_durable_ticket(void)
{
	return durable.ticket;
}

Size
es_log_queued_bytes(void)
{
	return queued_bytes;
}

EsLsn
es_log_restart_lsn(void)
{
	return restart_lsn;
}

EsLsn
es_log_flush_distance(EsLsn flushed)
{
	return newest_end > flushed ? newest_end - flushed : 0;
}

int
es_log_stuck_errno(void)
{
	if (write_errno != 0)
		return write_errno;
	if (wants_file && es_log_file_errno() != 0)
		return es_log_file_errno();
	return es_control_stuck_errno();
}

/* ---- boundaries ---- */

/*
 * Where the log stands behind the last frame that has a place.  While the current file has none
 * that is the file's start, so that a boundary leaves the older files behind it.
 */
static EsOwnLsn
encoded_place(void)
{
	return Max(encoded.lsn, ES_OWN_LSN(file->number, 0));
}

uint64
es_log_boundary(void)
{
	Boundary   *b = MemoryContextAllocZero(log_context, sizeof(Boundary));

	b->id = ++last_boundary;
	b->ticket = last_ticket;
	if (encoded.ticket == last_ticket)
		b->lsn = encoded_place();
	dlist_push_tail(&boundaries, &b->node);
	return b->id;
}

EsOwnLsn
es_log_boundary_lsn(uint64 id)
{
	dlist_mutable_iter iter;

	dlist_foreach_modify(iter, &boundaries)
	{
		Boundary   *b = dlist_container(Boundary, node, iter.cur);

		if (b->id == id)
			return b->lsn != 0 && b->ticket <= durable.ticket ? b->lsn : 0;
	}
	return 0;
}

/* Nobody asks any more for what was answered a thousand boundaries ago. */
static void
forget_boundaries(void)
{
	while (!dlist_is_empty(&boundaries))
	{
		Boundary   *b = dlist_head_element(Boundary, node, &boundaries);

		if (b->id + 1000 > last_boundary || b->lsn == 0 || b->ticket > durable.ticket)
			break;
		dlist_delete(&b->node);
		pfree(b);
	}
}

/* Ticket of the frame behind which the group must end, 0 = none. */
static uint64
next_boundary_ticket(void)
{
	dlist_iter	iter;

	dlist_foreach(iter, &boundaries)
	{
		Boundary   *b = dlist_container(Boundary, node, iter.cur);

		if (b->lsn == 0)
			return b->ticket;
	}
	return 0;
}

static void
place_boundaries(void)
{
	dlist_iter	iter;

	dlist_foreach(iter, &boundaries)
	{
		Boundary   *b = dlist_container(Boundary, node, iter.cur);

		if (b->lsn == 0 && b->ticket <= encoded.ticket)
			b->lsn = encoded_place();
	}
}

/* ---- groups ---- */

static void group_written(void *arg, int result);

static void
issue_group(void)
{
	int			err = ES_FAULT_IO("wal-write");

	write_retry_at = 0;
	if (err != 0)
		es_uring_result(-err, group_written, NULL);
	else
		es_uring_write(file->fd, group_buf, group_len, file_pos, group_written, NULL);
}

/* Encodes one frame at `at` in the buffer. */
static Size
encode(EsFrameHeader *header, const void *payload, Size at)
{
	header->own_lsn = ES_OWN_LSN(file->number, file_pos + at);
	encoded.crc = es_frame_encode(header, payload, encoded.crc, group_buf + at);
	at += es_frame_size(header->payload_len);
	encoded.lsn = ES_OWN_LSN(file->number, file_pos + at);
	return at;
}

/* The first frame of a file: what it is, and where the log ended before. */
static Size
encode_file_header(void)
{
	EsFrameHeader header;
	EsWalFileHeader payload;

	memset(&payload, 0, sizeof(payload));
	payload.identity = identity;
	payload.file_number = file->number;
	payload.incarnation = my_incarnation;
	payload.previous_end = encoded.lsn;
	payload.previous_crc = encoded.crc;
	memset(&header, 0, sizeof(header));
	header.type = ES_FRAME_FILE;
	header.shard = identity.shard;
	header.payload_len = sizeof(payload);
	encoded.crc = 0;
	return encode(&header, &payload, 0);
}

static inline Size
padded(Size len)
{
	return TYPEALIGN(ES_WAL_BLOCK, len);
}

/*
 * Takes frames off the queue, up to `limit` (ticket), and writes them.  False if the next
 * frame needs a file that is not ready.
 */
static bool
start_group(uint64 limit)
{
	Size		header_size = es_frame_size(sizeof(EsWalFileHeader));
	Size		first = es_frame_size(queue_head->header.payload_len);
	Size		room;
	Size		at = 0;

	if ((file_pos == 0 ? header_size : 0) + first > file->size - file_pos)
	{
		EsLogFile  *next = es_log_file_switch(header_size + first);

		wants_file = next == NULL;
		if (next == NULL)
			return false;
		file = next;
		file_pos = 0;
	}
	wants_file = false;

	room = Min(Max(GROUP_MAX, padded(header_size + first)), file->size - file_pos);
	if (room > group_size || (group_size > GROUP_MAX && room <= GROUP_MAX))
		make_group_buffer(Max(room, GROUP_MAX));

	group_frames = 0;
	if (file_pos == 0)
		at = encode_file_header();
	if (queue_head->staged)
		ES_COUNT(wal_staged_writes, 1);
	else
		ES_COUNT(wal_direct_writes, 1);
	while (queue_head != NULL && queue_head->ticket <= limit)
	{
		Frame	   *f = queue_head;
		Size		size = es_frame_size(f->header.payload_len);

		if (at + size > room)
			break;
		at = encode(&f->header, f->payload, at);
		encoded.ticket = f->ticket;
		file->max_start = Max(file->max_start, f->header.pg_start);
		group_frames++;
		queued_bytes -= size;
		queue_head = f->next;
		if (queue_head == NULL)
			queue_tail = NULL;
		pfree(f);
	}
	group_len = padded(at);
	memset(group_buf + at, 0, group_len - at);
	place_boundaries();

	writing = true;
	ES_FAULT("wal-before-write");
	issue_group();
	return true;
}

static void
group_written(void *arg, int result)
{
	if (result == -EINVAL && file->direct)
	{
		/* it took O_DIRECT when it was opened, but does not mean it */
		fcntl(file->fd, F_SETFL, fcntl(file->fd, F_GETFL) & ~O_DIRECT);
		file->direct = false;
		issue_group();
		return;
	}
	if (result < 0)
	{
		if (write_errno == 0)
			es_file_error(LOG, -result, "write", es_log_file_path(identity.shard, file->number));
		write_errno = -result;
		ES_COUNT(io_errors, 1);
		write_retry_at = GetCurrentTimestamp() + RETRY_US;
		return;
	}
	if (write_errno != 0)
		ereport(LOG, (errmsg("shard %d writes its log again", es_shard_id)));
	write_errno = 0;
	ES_FAULT("wal-written");

	writing = false;
	written = encoded;
	file_pos += group_len;
	file->dirty = true;
	ES_COUNT(wal_groups, 1);
	ES_COUNT(wal_frames, group_frames);
	ES_COUNT(wal_bytes, group_len);
}

/* Last ticket of the queue's prefix that may be written now, with its bytes; 0 = none. */
static uint64
eligible(EsLsn flushed, Size enough, Size *bytes)
{
	uint64		cut = next_boundary_ticket();
	uint64		last = 0;

	*bytes = 0;
	for (Frame *f = queue_head; f != NULL && f->header.pg_end <= flushed; f = f->next)
	{
		last = f->ticket;
		*bytes += es_frame_size(f->header.payload_len);
		if (last == cut || *bytes >= enough)
			break;
	}
	return last;
}

/*
 * Frames that wait for PostgreSQL's flush for long: asynchronous commits with nobody
 * behind them, or a walwriter that sleeps.  At a fast stop there is no walwriter.
 */
static void
nudge(EsLsn flushed, TimestampTz now, bool at_once)
{
	EsLsn		want;

	if (queue_head == NULL || queue_head->header.pg_end <= flushed)
		return;
	if (!at_once && now - queue_head->appended < NUDGE_US)
		return;
	want = at_once ? newest_end : queue_head->header.pg_end;
	if (es_shard_stopping)
	{
		XLogFlush(want);
		return;
	}
	if (want <= nudged && now - nudged_at < NUDGE_US)
		return;
	XLogSetAsyncXactLSN(want);
	nudged = want;
	nudged_at = now;
}

static void
write_tick(TimestampTz now)
{
	EsLsn		flushed;
	uint64		limit;
	Size		bytes;

	if (write_retry_at != 0 && now >= write_retry_at)
		issue_group();
	if (queue_head == NULL)
		return;

	flushed = GetFlushRecPtr(NULL);
	ES_SET(flush_distance, es_log_flush_distance(flushed));
	nudge(flushed, now, waited_for);
	if (writing)
		return;
	limit = eligible(flushed, GROUP_MAX, &bytes);
	if (limit == 0)
		return;
	if (!urgent && !waited_for && bytes < GATHER_BYTES && now - queue_head->appended < GATHER_US &&
		!(sync_state == SYNC_FIXED && written.ticket < sync_target))
		return;
	start_group(limit);
}

/* ---- syncs ---- */

void
es_log_want_sync(void)
{
	wanted = true;
	waited_for = true;
	wanted_ticket = last_ticket;
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
	dlist_iter	iter;

	dlist_foreach(iter, &es_log_files)
	{
		EsLogFile  *f = dlist_container(EsLogFile, node, iter.cur);

		if (f == file || f->dirty || f->number >= ES_OWN_FILE(released) ||
			f->max_start >= restart_lsn)
			return f->number;
	}
	return file->number;
}

bool
es_log_sync_due(void)
{
	TimestampTz now;
	EsLsn		flushed;
	bool		active;

	if (!opened)
		return false;
	if (sync_state == SYNC_BEGUN)
		return true;			/* the drain was not complete: begin again */
	if (sync_state != SYNC_IDLE)
		return false;
	if (wanted || pg_atomic_read_u32(&es_shard->sync_request) != pg_atomic_read_u32(&es_shard->sync_done))
		return true;

	now = GetCurrentTimestamp();
	if (waited_for && durable.ticket < wanted_ticket && now - last_sync >= WANT_US &&
		(written.ticket > durable.ticket || writing ||
		 (queue_head != NULL && queue_head->header.pg_end <= GetFlushRecPtr(NULL))))
		return true;

	/* an interval that was set to less than the time a sync takes does not make it a busy loop */
	if (now - last_sync < (int64) es_guc_wal_sync_interval * 1000)
		return false;
	active = written.ticket > durable.ticket || encoded.ticket > written.ticket;
	if (active || first_needed() > ES_OWN_FILE(first_file))
		return true;
	flushed = GetFlushRecPtr(NULL);
	if (queue_head != NULL && queue_head->header.pg_end <= flushed)
		return true;
	return flushed - last_sync_flushed >= QUIET_BYTES ||
		(flushed != last_sync_flushed && now - last_sync >= QUIET_US);
}

void
es_log_sync_begin(void)
{
	EsLsn		floor;

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
	sync_target = encoded.ticket;
	for (Frame *f = queue_head; f != NULL && f->header.pg_end <= sync_flushed; f = f->next)
		sync_target = f->ticket;
	sync_state = SYNC_FIXED;
	ES_FAULT("sync-fixed");
}

static void file_synced(void *arg, int result);
static void control_done(void);

static void
sync_files(void)
{
	dlist_iter	iter;

	sync_state = SYNC_FILES;
	sync_end = written;
	files_in_sync = 1;			/* ours: nothing below may end the state before all are asked */
	sync_started = GetCurrentTimestamp();
	ES_FAULT("wal-before-sync");
	dlist_foreach(iter, &es_log_files)
	{
		EsLogFile  *f = dlist_container(EsLogFile, node, iter.cur);
		int			err;

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
	EsLogFile  *f = arg;

	if (result < 0)
		es_file_error(data_sync_elevel(PANIC), -result, "fsync",
					  es_log_file_path(identity.shard, f->number));
	es_count_fsync(sync_started);
	ES_FAULT("wal-synced");
	files_in_sync--;
}

/* Start of the oldest message that will not be durable with this sync, 0 = none. */
static EsLsn
oldest_undurable(void)
{
	EsLsn		oldest = sync_unframed;

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
	durable = sync_end;
	restart_lsn = control.restart_lsn;
	first_file = control.first_file;
	while (undurable_first < undurable_next &&
		   undurable_entry(undurable_first)->ticket <= durable.ticket)
		undurable_first++;
	publish();
	ES_FAULT("restart-published");
	es_log_file_retire(ES_OWN_FILE(first_file));
	forget_boundaries();

	last_sync = GetCurrentTimestamp();
	last_sync_flushed = sync_flushed;
	syncs_done++;
	if (!wanted && durable.ticket >= wanted_ticket)
		waited_for = false;
	pg_atomic_write_u32(&es_shard->sync_done, sync_request);
	sync_state = SYNC_IDLE;
}

static void
sync_tick(void)
{
	if (sync_state == SYNC_FIXED && written.ticket >= sync_target)
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

void
es_log_tick(void)
{
	TimestampTz now;

	if (!opened)
		return;
	now = GetCurrentTimestamp();
	es_control_tick();
	es_log_file_tick();
	write_tick(now);
	sync_tick();
	ES_SET(wal_files, es_log_file_count());
}

static long
earlier(long timeout, int64 us)
{
	long		ms = us <= 0 ? 0 : (long) (us / 1000 + 1);

	return timeout < 0 ? ms : Min(timeout, ms);
}

long
es_log_timeout(void)
{
	TimestampTz now = GetCurrentTimestamp();
	long		timeout = -1;
	long		prepare = es_log_file_timeout();

	if (!opened)
		return -1;
	if ((sync_state == SYNC_FIXED && written.ticket >= sync_target) ||
		(sync_state == SYNC_FILES && files_in_sync == 0))
		return 0;
	if (sync_state == SYNC_BEGUN)
		timeout = 10;			/* the drain was not complete */
	if (prepare >= 0)
		timeout = earlier(timeout, prepare * 1000);
	if (write_retry_at != 0)
		timeout = earlier(timeout, write_retry_at - now);
	if (es_control_stuck_errno() != 0)
		timeout = earlier(timeout, 100000);
	if (queue_head != NULL && !writing)
	{
		if (queue_head->header.pg_end > GetFlushRecPtr(NULL))
			timeout = earlier(timeout, waited_for ? WANT_US : 50000);
		else if (wants_file)
			timeout = earlier(timeout, 50000);
		else
			timeout = earlier(timeout, queue_head->appended + GATHER_US - now);
	}
	if (sync_state == SYNC_IDLE)
	{
		if (wanted)
			return 0;
		if (waited_for)
			timeout = earlier(timeout, last_sync + WANT_US - now);
		if (written.ticket > durable.ticket || encoded.ticket > written.ticket || queue_head != NULL)
			timeout = earlier(timeout,
							  Max(last_sync + (int64) es_guc_wal_sync_interval * 1000 - now, 1000));
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
	pgsocket	fd = es_uring_event_fd();

	if (es_uring_reap() > 0)
		return;
	if (fd != PGINVALID_SOCKET)
		(void) WaitLatchOrSocket(MyLatch,
								 WL_LATCH_SET | WL_SOCKET_READABLE | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
								 fd, 100, PG_WAIT_EXTENSION);
	else
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, 100,
						 PG_WAIT_EXTENSION);
	ResetLatch(MyLatch);
	es_uring_reap();
}

/* One whole sync of everything; false if the log stays stuck. */
static bool
sync_everything(void)
{
	TimestampTz give_up = GetCurrentTimestamp() + 10 * USECS_PER_SEC;

	/* one that is under way may not cover the last frames */
	while (sync_state != SYNC_IDLE || writing || queue_head != NULL || durable.ticket < last_ticket ||
		   durable.lsn != written.lsn)
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

void
es_log_close_clean(EsPosition next_position)
{
	if (!opened)
		return;
	urgent = true;
	if (newest_end != 0)
		XLogFlush(newest_end);
	if (!sync_everything())
	{
		ereport(LOG,
				(errmsg("shard %d stops without having written everything", es_shard_id),
				 errdetail("It recovers from PostgreSQL's write-ahead log at the next start.")));
		return;
	}

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
	if (durable.lsn == 0 || released >= durable.lsn)
		control.first_file = 0;
	else
		control.first_file = ES_OWN_LSN(first_needed(), 0);
	sync_end = durable;
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
	opened = false;
}
