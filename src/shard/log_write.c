/*-------------------------------------------------------------------------
 *
 * log_write.c
 *	  The writing half of a shard's own WAL: frames wait in a queue and become groups in a file.
 *
 * Frames stand in the order of their tickets.  A group is the longest prefix of the
 * queue whose messages PostgreSQL has flushed (their end <= F), cut at a boundary that
 * the engine asked for, at the end of the file and at GROUP_MAX.  It is encoded into an
 * aligned buffer, padded to a block and written at once; one group is in flight, and what
 * comes meanwhile gathers behind it (counted as staged; groups that found the log idle are
 * direct).  The shard's log lags behind PostgreSQL's by design, so an idle log waits up
 * to GATHER_US or GATHER_BYTES for company before it spends an I/O.
 *
 * A group that could not be written keeps its place: the same bytes go to the same
 * offset a second later, and es_log_stuck_errno tells the engine to refuse new writes
 * meanwhile.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <fcntl.h>

#include "access/xlog.h"
#include "lib/ilist.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "ipc/fault.h"
#include "shard/log_internal.h"
#include "shard/shard.h"
#include "shard/uring.h"

#define GROUP_MAX	 (1024 * 1024)
#define GATHER_BYTES (64 * 1024)
#define GATHER_US	 5000
#define NUDGE_US	 USECS_PER_SEC
#define RETRY_US	 USECS_PER_SEC

typedef struct Frame
{
	struct Frame *next;
	uint64		  ticket;
	TimestampTz	  appended;
	bool		  staged; /* came while a group was in flight */
	EsFrameHeader header;
	char		  payload[FLEXIBLE_ARRAY_MEMBER];
} Frame;

typedef struct Boundary
{
	dlist_node node;
	uint64	   id;
	uint64	   ticket; /* last frame before it */
	EsOwnLsn   lsn;	   /* 0 = its last frame has no place yet */
} Boundary;

/* the queue */
static Frame	  *queue_head = NULL;
static Frame	  *queue_tail = NULL;
static Size		   queued_bytes = 0;
static EsLsn	   nudged = 0;
static TimestampTz nudged_at = 0;

static dlist_head boundaries = DLIST_STATIC_INIT(boundaries);
static uint64	  last_boundary = 0;

/* the group */
static uint64	   file_pos; /* offset of the next one, or the one in flight */
static bool		   writing = false;
static char		  *group_buf; /* aligned, group_size bytes */
static void		  *group_alloc = NULL;
static Size		   group_size;
static Size		   group_len; /* padded */
static int		   group_frames;
static int		   write_errno = 0;
static TimestampTz retry_at = 0;
static bool		   wants_file = false; /* the next group needs the next file */

/* ---- frames ---- */

uint64
es_log_append(EsFrameType type, EsFxid fxid, EsLsn pg_start, EsLsn pg_end, const void *payload, uint32 len)
{
	Frame *f;

	Assert(es_log.opened);
	/* a group, with its header and padding, is one write */
	if (len > ES_FRAME_MAX_PAYLOAD - 2 * ES_WAL_BLOCK)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("a frame of %u bytes is too large for the log of shard %d", len, es_shard_id)));
	f = MemoryContextAllocHuge(es_log.context, offsetof(Frame, payload) + len);

	/*
	 * Carried-over frames hold nothing back: what they repeat is durable in an older
	 * file, or waits further ahead in this queue.  Verdicts come from CLOG again.
	 */
	if (pg_start != 0 && (type == ES_FRAME_BATCH || type == ES_FRAME_FINISH))
		es_log_remember_undurable(es_log.last_ticket + 1, pg_start);

	memset(f, 0, offsetof(Frame, payload));
	f->ticket = ++es_log.last_ticket;
	f->appended = GetCurrentTimestamp();
	f->staged = writing;
	f->header.type = (uint8) type;
	f->header.shard = es_log.identity.shard;
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
	es_log.newest_end = Max(es_log.newest_end, pg_end);
	return f->ticket;
}

uint64
es_log_last_ticket(void)
{
	return es_log.last_ticket;
}

Size
es_log_queued_bytes(void)
{
	return queued_bytes;
}

EsLsn
es_log_flush_distance(EsLsn flushed)
{
	return es_log.newest_end > flushed ? es_log.newest_end - flushed : 0;
}

/* ---- boundaries ---- */

/*
 * Where the log stands behind the last frame that has a place.  While the current file has none
 * that is the file's start, so that a boundary leaves the older files behind it.
 */
static EsOwnLsn
encoded_place(void)
{
	return Max(es_log.encoded.lsn, ES_OWN_LSN(es_log.file->number, 0));
}

uint64
es_log_boundary(void)
{
	Boundary *b = MemoryContextAllocZero(es_log.context, sizeof(Boundary));

	b->id = ++last_boundary;
	b->ticket = es_log.last_ticket;
	if (es_log.encoded.ticket == es_log.last_ticket)
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
		Boundary *b = dlist_container(Boundary, node, iter.cur);

		if (b->id == id)
			return b->lsn != 0 && b->ticket <= es_log.durable.ticket ? b->lsn : 0;
	}
	return 0;
}

/* Nobody asks any more for what was answered a thousand boundaries ago. */
void
es_log_forget_boundaries(void)
{
	while (!dlist_is_empty(&boundaries))
	{
		Boundary *b = dlist_head_element(Boundary, node, &boundaries);

		if (b->id + 1000 > last_boundary || b->lsn == 0 || b->ticket > es_log.durable.ticket)
			break;
		dlist_delete(&b->node);
		pfree(b);
	}
}

/* Ticket of the frame behind which the group must end, 0 = none. */
static uint64
next_boundary_ticket(void)
{
	dlist_iter iter;

	dlist_foreach(iter, &boundaries)
	{
		Boundary *b = dlist_container(Boundary, node, iter.cur);

		if (b->lsn == 0)
			return b->ticket;
	}
	return 0;
}

static void
place_boundaries(void)
{
	dlist_iter iter;

	dlist_foreach(iter, &boundaries)
	{
		Boundary *b = dlist_container(Boundary, node, iter.cur);

		if (b->lsn == 0 && b->ticket <= es_log.encoded.ticket)
			b->lsn = encoded_place();
	}
}

/* ---- groups ---- */

static void group_written(void *arg, int result);

static void
make_group_buffer(Size size)
{
	if (group_alloc != NULL)
		pfree(group_alloc);
	group_alloc = NULL;
	group_alloc = MemoryContextAllocHuge(es_log.context, size + ES_WAL_BLOCK);
	group_buf = (char *) TYPEALIGN(ES_WAL_BLOCK, group_alloc);
	group_size = size;
}

static void
issue_group(void)
{
	int err = ES_FAULT_IO("wal-write");

	retry_at = 0;
	if (err != 0)
		es_uring_result(-err, group_written, NULL);
	else
		es_uring_write(es_log.file->fd, group_buf, group_len, file_pos, group_written, NULL);
}

/* Encodes one frame at `at` in the buffer. */
static Size
encode(EsFrameHeader *header, const void *payload, Size at)
{
	header->own_lsn = ES_OWN_LSN(es_log.file->number, file_pos + at);
	es_log.encoded.crc = es_frame_encode(header, payload, es_log.encoded.crc, group_buf + at);
	at += es_frame_size(header->payload_len);
	es_log.encoded.lsn = ES_OWN_LSN(es_log.file->number, file_pos + at);
	return at;
}

/* The first frame of a file: what it is, and where the log ended before. */
static Size
encode_file_header(void)
{
	EsFrameHeader	header;
	EsWalFileHeader payload;

	memset(&payload, 0, sizeof(payload));
	payload.identity = es_log.identity;
	payload.file_number = es_log.file->number;
	payload.incarnation = es_log.incarnation;
	payload.previous_end = es_log.encoded.lsn;
	payload.previous_crc = es_log.encoded.crc;
	memset(&header, 0, sizeof(header));
	header.type = ES_FRAME_FILE;
	header.shard = es_log.identity.shard;
	header.payload_len = sizeof(payload);
	es_log.encoded.crc = 0;
	return encode(&header, &payload, 0);
}

static inline Size
padded(Size len)
{
	return TYPEALIGN(ES_WAL_BLOCK, len);
}

/*
 * Takes frames off the queue, up to `limit` (ticket), and writes them; not if the next
 * one needs a file that is not ready.
 */
static void
start_group(uint64 limit)
{
	Size header_size = es_frame_size(sizeof(EsWalFileHeader));
	Size first = es_frame_size(queue_head->header.payload_len);
	Size room;
	Size at = 0;

	if ((file_pos == 0 ? header_size : 0) + first > es_log.file->size - file_pos)
	{
		EsLogFile *next = es_log_file_switch(header_size + first);

		wants_file = next == NULL;
		if (next == NULL)
			return;
		es_log.file = next;
		file_pos = 0;
	}
	wants_file = false;

	room = Min(Max(GROUP_MAX, padded(header_size + first)), es_log.file->size - file_pos);
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
		Frame *f = queue_head;
		Size   size = es_frame_size(f->header.payload_len);

		if (at + size > room)
			break;
		at = encode(&f->header, f->payload, at);
		es_log.encoded.ticket = f->ticket;
		es_log.file->max_start = Max(es_log.file->max_start, f->header.pg_start);
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
}

static void
group_written(void *arg, int result)
{
	if (result == -EINVAL && es_log.file->direct)
	{
		/* it took O_DIRECT when it was es_log.opened, but does not mean it */
		fcntl(es_log.file->fd, F_SETFL, fcntl(es_log.file->fd, F_GETFL) & ~O_DIRECT);
		es_log.file->direct = false;
		issue_group();
		return;
	}
	if (result < 0)
	{
		if (write_errno == 0)
			es_file_error(LOG, -result, "write",
						  es_log_file_path(es_log.identity.shard, es_log.file->number));
		write_errno = -result;
		ES_COUNT(io_errors, 1);
		retry_at = GetCurrentTimestamp() + RETRY_US;
		return;
	}
	if (write_errno != 0)
		ereport(LOG, (errmsg("shard %d writes its log again", es_shard_id)));
	write_errno = 0;
	ES_FAULT("wal-written");

	writing = false;
	es_log.written = es_log.encoded;
	file_pos += group_len;
	es_log.file->dirty = true;
	ES_COUNT(wal_groups, 1);
	ES_COUNT(wal_frames, group_frames);
	ES_COUNT(wal_bytes, group_len);
}

/* Last ticket of the queue's prefix that may be written now, with its bytes; 0 = none. */
static uint64
eligible(EsLsn flushed, Size enough, Size *bytes)
{
	uint64 cut = next_boundary_ticket();
	uint64 last = 0;

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
	EsLsn want;

	if (queue_head == NULL || queue_head->header.pg_end <= flushed)
		return;
	if (!at_once && now - queue_head->appended < NUDGE_US)
		return;
	want = at_once ? es_log.newest_end : queue_head->header.pg_end;
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

void
es_log_write_tick(TimestampTz now, bool hurry)
{
	EsLsn  flushed;
	uint64 limit;
	Size   bytes;

	if (retry_at != 0 && now >= retry_at)
		issue_group();
	if (queue_head == NULL)
		return;

	flushed = GetFlushRecPtr(NULL);
	nudge(flushed, now, hurry);
	if (writing)
		return;
	limit = eligible(flushed, GROUP_MAX, &bytes);
	if (limit == 0)
		return;
	if (!hurry && bytes < GATHER_BYTES && now - queue_head->appended < GATHER_US)
		return;
	start_group(limit);
}

/* ---- what log.c asks ---- */

void
es_log_writer_open(void)
{
	es_log.file = es_log_file_current();
	file_pos = 0;
	make_group_buffer(GROUP_MAX);
}

uint64
es_log_covered_by(EsLsn flushed)
{
	uint64 ticket = es_log.encoded.ticket;

	for (Frame *f = queue_head; f != NULL && f->header.pg_end <= flushed; f = f->next)
		ticket = f->ticket;
	return ticket;
}

bool
es_log_written_all(void)
{
	return queue_head == NULL && !writing;
}

bool
es_log_can_write(EsLsn flushed)
{
	return queue_head != NULL && queue_head->header.pg_end <= flushed;
}

int
es_log_write_errno(void)
{
	if (write_errno != 0)
		return write_errno;
	return wants_file ? es_log_file_errno() : 0;
}

long
es_log_write_timeout(TimestampTz now, bool hurry)
{
	TimestampTz at;

	if (retry_at != 0)
		at = retry_at;
	else if (queue_head == NULL || writing)
		return -1;
	else if (queue_head->header.pg_end > GetFlushRecPtr(NULL))
		at = now + (hurry ? 10000 : 50000); /* PostgreSQL tells nobody when it has flushed */
	else if (wants_file)
		at = now + 50000; /* its completion wakes the loop earlier */
	else
		at = queue_head->appended + GATHER_US;
	return at <= now ? 0 : (long) ((at - now) / 1000 + 1);
}
