/*-------------------------------------------------------------------------
 *
 * pgwal.c
 *	  Reading our messages back from PostgreSQL's WAL.
 *
 * PostgreSQL's own reader takes the WAL apart; what is ours here is where the pages come
 * from and what happens when they do not.  Pages are read in chunks of a
 * segment file.  Nothing beyond `upto` is ever looked at: it is flushed up to there, and what
 * follows may be half of a record.  A segment that is not there is the one error
 * that a user can run into, so it says which shard, which LSN and what to do; any other
 * record that cannot be read before `upto` is damage.
 *
 * A record is ours when it is a logical message with our prefix, all 14 bytes of
 * it (SQL's pg_logical_emit_message cannot make one), and our store's uuid; such a record
 * must then pass its check, or the reading ends with XX001.  Messages in several
 * pieces are assembled by the start of the first one, which the later ones
 * carry; those whose first piece lies before `from` are not asked for, and
 * those that never ended (the backend was cancelled, its transaction aborted) are dropped at the end.
 *
 * One timeline: the one the server writes to.  A promoted server does not come here, it
 * was refused when the store was opened.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <fcntl.h>
#include <unistd.h>

#include "access/rmgr.h"
#include "access/xlog.h"
#include "access/xlog_internal.h"
#include "access/xlogreader.h"
#include "miscadmin.h"
#include "replication/message.h"
#include "storage/fd.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"

#include "ipc/fault.h"
#include "ipc/shmem.h"
#include "shard/files.h"
#include "shard/pgwal.h"
#include "shard/shard.h"

#define CHUNK (256 * 1024) /* a divisor of every segment size */

typedef struct Source
{
	TimeLineID	  timeline;
	EsLsn		  from;
	EsLsn		  upto;
	bool		  at_end; /* the reader asked for what lies behind upto */
	int			  fd;
	XLogSegNo	  segno;
	char		  path[MAXPGPATH];
	MemoryContext caller;	/* callbacks run in it */
	EsLsn		  chunk_at; /* LSN of the first byte in chunk */
	uint32		  chunk_len;
	char		 *chunk;
} Source;

/* A message in several pieces, by the start of its first one. */
typedef struct Assembly
{
	EsLsn				start; /* hash key */
	EsMessageAssembler *assembler;
} Assembly;

/* ---- pages ---- */

static void
segment_missing(const Source *src, EsLsn at)
{
	ereport(
		ERROR,
		(errcode(ERRCODE_UNDEFINED_FILE),
		 errmsg("PostgreSQL's write-ahead log that shard %d needs is gone", es_shard_id),
		 errdetail(
			 "It needs everything from %X/%X on, but file \"%s\" with %X/%X does not exist. Replication slot \"%s\" should have kept it.",
			 LSN_FORMAT_ARGS(src->from), src->path, LSN_FORMAT_ARGS(at), ES_SLOT_NAME),
		 errhint(
			 "Put the file back from the WAL archive and restart the server, or give up what the shard has not in its own files with event_store.release_wal(%d).",
			 es_shard_id)));
}

static void
close_segment(Source *src)
{
	if (src->fd >= 0)
		CloseTransientFile(src->fd);
	src->fd = -1;
}

static void
open_segment_of(Source *src, EsLsn at)
{
	XLogSegNo segno;

	XLByteToSeg(at, segno, wal_segment_size);
	if (src->fd >= 0 && src->segno == segno)
		return;
	close_segment(src);
	XLogFilePath(src->path, src->timeline, segno, wal_segment_size);
	src->segno = segno;
	src->fd = OpenTransientFile(src->path, O_RDONLY | PG_BINARY);
	if (src->fd < 0)
	{
		if (errno == ENOENT)
			segment_missing(src, at);
		es_file_error(ERROR, errno, "open", src->path);
	}
	es_shard_interrupts();
}

/* Reads the chunk that holds the page, as far as upto lets it. */
static void
read_chunk(Source *src, EsLsn page)
{
	EsLsn  at = page - page % CHUNK;
	uint32 len = (uint32) Min(CHUNK, src->upto - at);
	uint32 offset = XLogSegmentOffset(at, wal_segment_size);
	uint32 done = 0;

	open_segment_of(src, at);
	src->chunk_len = 0;
	while (done < len)
	{
		ssize_t n = pg_pread(src->fd, src->chunk + done, len - done, (off_t) (offset + done));

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			es_file_error(ERROR, errno, "read", src->path);
		if (n == 0)
			ereport(ERROR, (errcode(ERRCODE_DATA_CORRUPTED),
							errmsg("file \"%s\" ends at offset %u, before the write-ahead log does",
								   src->path, offset + done)));
		done += n;
	}
	src->chunk_at = at;
	src->chunk_len = len;
	if (es_shard != NULL)
		pg_atomic_write_u64(&es_shard->recovery_at, at);
}

static int
page_read(XLogReaderState *reader, XLogRecPtr page, int wanted, XLogRecPtr record, char *buf)
{
	Source *src = reader->private_data;
	uint32	len;

	if (page + wanted > src->upto)
	{
		src->at_end = true;
		return -1;
	}
	len = (uint32) Min(XLOG_BLCKSZ, src->upto - page);
	if (page < src->chunk_at || page + len > src->chunk_at + src->chunk_len)
		read_chunk(src, page);
	memcpy(buf, src->chunk + (page - src->chunk_at), len);
	reader->seg.ws_tli = src->timeline;
	return (int) len;
}

/* The reader never opens files: page_read does. */
static void
segment_open(XLogReaderState *reader, XLogSegNo segno, TimeLineID *timeline)
{
	elog(ERROR, "unexpected opening of a WAL segment");
}

static void
segment_close(XLogReaderState *reader)
{
	reader->seg.ws_file = -1;
}

static XLogReaderState *
open_reader(Source *src, EsLsn from, EsLsn upto)
{
	XLogReaderState *reader;

	memset(src, 0, sizeof(*src));
	src->timeline = GetWALInsertionTimeLine();
	src->from = from;
	src->upto = upto;
	src->fd = -1;
	src->chunk = palloc(CHUNK);

	reader = XLogReaderAllocate(
		wal_segment_size, NULL,
		XL_ROUTINE(.page_read = page_read, .segment_open = segment_open, .segment_close = segment_close),
		src);
	if (reader == NULL)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory"),
						errdetail("Failed while allocating a WAL reading processor.")));
	reader->system_identifier = GetSystemIdentifier();
	return reader;
}

static void
unreadable(const Source *src, EsLsn at, const char *what)
{
	ereport(ERROR, (errcode(ERRCODE_DATA_CORRUPTED),
					errmsg("could not read PostgreSQL's write-ahead log at %X/%X", LSN_FORMAT_ARGS(at)),
					what != NULL ? errdetail("In file \"%s\": %s.", src->path, what) : 0,
					errhint("Check the storage for errors, or put the file back from the WAL archive.")));
}

/* ---- messages ---- */

/*
 * Is the reader's record a message of this store?  Then its header and its piece, in a copy that is
 * aligned (the record's data is not).
 */
static bool
our_message(XLogReaderState *reader, const Source *src, StringInfo copy, const EsMessageHeader **header,
			const void **piece)
{
	xl_logical_message *message;
	const char		   *data;
	size_t				len;
	EsMessageHeader		h;
	EsError				err;

	if (XLogRecGetRmid(reader) != RM_LOGICALMSG_ID ||
		(XLogRecGetInfo(reader) & ~XLR_INFO_MASK) != XLOG_LOGICAL_MESSAGE ||
		XLogRecGetDataLen(reader) < SizeOfLogicalMessage)
		return false;
	message = (xl_logical_message *) XLogRecGetData(reader);
	if (message->prefix_size != ES_MESSAGE_PREFIX_LEN ||
		XLogRecGetDataLen(reader) < SizeOfLogicalMessage + ES_MESSAGE_PREFIX_LEN ||
		memcmp(message->message, ES_MESSAGE_PREFIX, ES_MESSAGE_PREFIX_LEN) != 0)
		return false;

	data = message->message + ES_MESSAGE_PREFIX_LEN;
	len = XLogRecGetDataLen(reader) - SizeOfLogicalMessage - ES_MESSAGE_PREFIX_LEN;
	if (len >= sizeof(h))
	{
		memcpy(&h, data, sizeof(h));
		if (memcmp(h.store_uuid, es_shared->store_uuid, ES_UUID_LEN) != 0)
			return false; /* of a store that was here before */
	}
	resetStringInfo(copy);
	appendBinaryStringInfo(copy, data, (int) len);
	if (es_message_check(copy->data, len, header, piece, &err) == ES_OK)
		return true;

	ereport(ERROR, (errcode(ERRCODE_DATA_CORRUPTED),
					errmsg("a message of event_store at %X/%X in PostgreSQL's write-ahead log is damaged: %s",
						   LSN_FORMAT_ARGS(reader->ReadRecPtr), err.what),
					errdetail("In file \"%s\", expected checksum %08X, found %08X.", src->path,
							  err.expected_crc, err.found_crc),
					errhint("Check the storage for errors, or put the file back from the WAL archive.")));
	return false;
}

static void
message_damaged(EsLsn start, const EsError *err)
{
	ereport(ERROR, (errcode(err->status == ES_ERR_NOMEM ? ERRCODE_OUT_OF_MEMORY : ERRCODE_DATA_CORRUPTED),
					errmsg("could not put together the message of event_store that starts at %X/%X: %s",
						   LSN_FORMAT_ARGS(start), err->what)));
}

static EsMessageAssembler *
new_assembler(void)
{
	EsMessageAssembler *a = es_assembler_create();

	if (a == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory while reading the write-ahead log")));
	return a;
}

/*
 * Adds a piece; calls back if it was the last.  Of another shard's batches nothing is
 * kept: every piece names the shard.
 */
static void
take_piece(const Source *src, HTAB *assemblies, const EsMessageHeader *header, const void *piece, EsLsn start,
		   EsLsn end, EsMessageCallback callback, void *arg)
{
	EsLsn				first = header->piece == 0 ? start : header->first_start;
	bool				single = header->piece == 0 && header->npieces == 1;
	EsMessageAssembler *assembler = NULL;
	Assembly		   *entry = NULL;
	bool				found = false;
	void			   *payload;
	size_t				len;
	EsError				err;

	if (first < src->from)
		return;
	if (single)
		assembler = new_assembler();
	else
	{
		entry = hash_search(assemblies, &first, header->piece == 0 ? HASH_ENTER : HASH_FIND, &found);
		if (entry == NULL)
		{
			es_fail(&err, ES_ERR_CORRUPT, 0, "its first piece is missing");
			message_damaged(first, &err);
		}
		if (!found)
		{
			entry->assembler = NULL;
			entry->assembler = new_assembler();
		}
		assembler = entry->assembler;
	}

	if (es_assembler_add(assembler, header, piece, &payload, &len, &err) != ES_OK)
	{
		if (single)
			es_assembler_free(assembler);
		message_damaged(first, &err);
	}
	if (single || payload != NULL || header->npieces != 0)
	{
		es_assembler_free(assembler);
		if (entry != NULL)
			hash_search(assemblies, &first, HASH_REMOVE, NULL);
		PG_TRY();
		{
			MemoryContext old = MemoryContextSwitchTo(src->caller);

			callback(arg, header, payload, len, first, end);
			MemoryContextSwitchTo(old);
		}
		PG_FINALLY();
		{
			free(payload);
		}
		PG_END_TRY();
	}
}

static void
free_assemblies(HTAB *assemblies)
{
	HASH_SEQ_STATUS seq;
	Assembly	   *entry;

	hash_seq_init(&seq, assemblies);
	while ((entry = hash_seq_search(&seq)) != NULL)
		if (entry->assembler != NULL)
			es_assembler_free(entry->assembler);
	hash_destroy(assemblies);
}

static void
read_messages(Source *src, XLogReaderState *reader, HTAB *assemblies, uint16 shard,
			  EsMessageCallback callback, void *arg)
{
	StringInfoData copy;
	char		  *error;
	uint32		   n = 0;
	EsLsn		   reached = src->from;

	/* a record ends at upto, so that one which wants to be read beyond it has a damaged length */
	initStringInfo(&copy);
	if (XLogRecPtrIsInvalid(XLogFindNextRecord(reader, src->from)))
	{
		if (src->at_end)
			unreadable(src, src->from, "no record begins where one should");
		unreadable(src, src->from, reader->errormsg_buf[0] != '\0' ? reader->errormsg_buf : NULL);
	}
	for (;;)
	{
		const EsMessageHeader *header;
		const void			  *piece;

		if (XLogReadRecord(reader, &error) == NULL)
		{
			if (src->at_end && reached == src->upto)
				return;
			unreadable(src, reached, src->at_end ? "a record is longer than the log" : error);
		}
		if (reader->EndRecPtr > src->upto)
			unreadable(src, reached, "a record is longer than the log");
		reached = reader->EndRecPtr;
		if ((++n & 0x3ff) == 0)
			es_shard_interrupts();
		if (!our_message(reader, src, &copy, &header, &piece))
			continue;
		if (header->kind == ES_MESSAGE_BATCH && header->shard != shard)
			continue;
		take_piece(src, assemblies, header, piece, reader->ReadRecPtr, reader->EndRecPtr, callback, arg);
		ES_FAULT_ERROR("pgwal-message");
	}
}

void
es_pgwal_read(uint16 shard, EsLsn from, EsLsn upto, EsMessageCallback callback, void *arg)
{
	MemoryContext	 context;
	MemoryContext	 caller;
	HASHCTL			 ctl;
	HTAB			*assemblies;
	Source			*src;
	XLogReaderState *reader;

	if (from >= upto)
		return;
	context = AllocSetContextCreate(CurrentMemoryContext, "event_store WAL reader", ALLOCSET_DEFAULT_SIZES);
	caller = MemoryContextSwitchTo(context);
	memset(&ctl, 0, sizeof(ctl));
	ctl.keysize = sizeof(EsLsn);
	ctl.entrysize = sizeof(Assembly);
	ctl.hcxt = context;
	assemblies = hash_create("event_store messages", 64, &ctl, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	src = palloc(sizeof(Source));
	reader = open_reader(src, from, upto);
	src->caller = caller;

	PG_TRY();
	{
		read_messages(src, reader, assemblies, shard, callback, arg);
	}
	PG_FINALLY();
	{
		close_segment(src);
		free_assemblies(assemblies); /* their memory is malloc's */
	}
	PG_END_TRY();
	XLogReaderFree(reader);
	MemoryContextSwitchTo(caller);
	MemoryContextDelete(context);
}

/* ---- one message ---- */

typedef struct Wanted
{
	EsLsn				start;
	EsMessageHeader	   *header;
	void			  **payload;
	size_t			   *len;
	EsMessageAssembler *assembler;
} Wanted;

static void
read_wanted(Source *src, XLogReaderState *reader, Wanted *w)
{
	StringInfoData copy;
	char		  *error;
	EsError		   err;

	initStringInfo(&copy);
	XLogBeginRead(reader, w->start);
	while (*w->payload == NULL)
	{
		const EsMessageHeader *header;
		const void			  *piece;
		bool				   first;

		if (XLogReadRecord(reader, &error) == NULL || reader->EndRecPtr > src->upto)
		{
			es_fail(&err, ES_ERR_CORRUPT, 0, "%s",
					src->at_end		? "it does not end before the write-ahead log does"
					: error != NULL ? error
									: "a record cannot be read");
			message_damaged(w->start, &err);
		}
		first = reader->ReadRecPtr == w->start;
		if (!our_message(reader, src, &copy, &header, &piece))
		{
			if (first)
			{
				es_fail(&err, ES_ERR_CORRUPT, 0, "there is another record");
				message_damaged(w->start, &err);
			}
			continue;
		}
		if (!first && header->first_start != w->start)
			continue;
		if (es_assembler_add(w->assembler, header, piece, w->payload, w->len, &err) != ES_OK)
			message_damaged(w->start, &err);
		*w->header = *header;
		if (header->npieces != 0)
			return;
	}
}

void
es_pgwal_read_one(EsLsn start, EsLsn upto, EsMessageHeader *header, void **payload, size_t *len)
{
	MemoryContext	 context;
	MemoryContext	 caller;
	Source			*src;
	XLogReaderState *reader;
	Wanted			 w;

	context = AllocSetContextCreate(CurrentMemoryContext, "event_store WAL reader", ALLOCSET_DEFAULT_SIZES);
	caller = MemoryContextSwitchTo(context);
	src = palloc(sizeof(Source));
	reader = open_reader(src, start, upto);
	*payload = NULL;
	*len = 0;
	w.start = start;
	w.header = header;
	w.payload = payload;
	w.len = len;
	w.assembler = new_assembler();

	PG_TRY();
	{
		read_wanted(src, reader, &w);
	}
	PG_FINALLY();
	{
		close_segment(src);
		es_assembler_free(w.assembler);
	}
	PG_END_TRY();
	XLogReaderFree(reader);
	MemoryContextSwitchTo(caller);
	MemoryContextDelete(context);
}
