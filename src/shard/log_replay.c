/*-------------------------------------------------------------------------
 *
 * log_replay.c
 *	  Reading a shard's own WAL at start.
 *
 * The control block names the durable end: file, offset and checksum of the last
 * frame that counts.  Each file begins with a frame that says where the log ended before
 * it, so the files that count, and how far each of them does, follow from the durable end
 * backwards.  This matters because an incarnation that died leaves frames
 * behind the end it had announced, whole or torn, and perhaps files without any
 * frame that counts: none of that is believed, and it is never mistaken for damage.
 *
 * Forwards then, file by file, every frame up to its file's end must be there: own LSN,
 * checksum and the chain to the frame before it.  Anything else is an ERROR with
 * file and offset, and so is a log that ends early or does not end with the checksum that
 * the control block (or the next file) remembers.
 *
 * A window of the file is kept in memory, large enough for the frame at hand.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "nodes/pg_list.h"
#include "storage/fd.h"

#include "ipc/fault.h"
#include "shard/log.h"
#include "shard/log_file.h"
#include "shard/shard.h"

#define WINDOW (1024 * 1024)

/* A file of the chain and how far it counts. */
typedef struct ReplayFile
{
	uint32 number;
	uint32 end; /* offset behind its last frame that counts */
	uint32 crc; /* of that frame */
} ReplayFile;

typedef struct Window
{
	const char *path;
	int			fd;
	uint64		limit; /* what lies behind is never read */
	uint64		from;  /* file offset of data */
	size_t		len;
	size_t		allocated;
	char	   *data;
} Window;

bool es_log_replayed = false;

static void
window_open(Window *w, const char *path)
{
	struct stat st;
	EsError		err;

	memset(w, 0, sizeof(*w));
	w->path = path;
	w->fd = OpenTransientFile(path, O_RDONLY | PG_BINARY);
	if (w->fd < 0)
	{
		if (errno != ENOENT)
			es_file_error(ERROR, errno, "open", path);
		es_fail(&err, ES_ERR_CORRUPT, 0, "the file is missing");
		es_corruption(ERROR, path, &err);
	}
	if (fstat(w->fd, &st) != 0)
		es_file_error(ERROR, errno, "stat", path);
	w->limit = (uint64) st.st_size;
}

static void
window_close(Window *w)
{
	CloseTransientFile(w->fd);
	if (w->data != NULL)
		pfree(w->data);
}

/*
 * Bytes at offset `at` (a multiple of 8): as many as are wanted or as there are before the
 * limit; at least one page ahead is read anyway.
 */
static const char *
window_at(Window *w, uint64 at, size_t want, size_t *available)
{
	size_t need = Min(want, w->limit - at);

	if (at < w->from || at + need > w->from + w->len)
	{
		size_t len = Min(Max(need, WINDOW), w->limit - at);
		size_t done = 0;

		if (len > w->allocated)
		{
			if (w->data != NULL)
				pfree(w->data);
			w->data = NULL;
			w->data = MemoryContextAllocHuge(CurrentMemoryContext, len);
			w->allocated = len;
		}
		while (done < len)
		{
			ssize_t n = pg_pread(w->fd, w->data + done, len - done, (off_t) (at + done));

			if (n < 0 && errno == EINTR)
				continue;
			if (n < 0)
				es_file_error(ERROR, errno, "read", w->path);
			if (n == 0)
				break;
			done += n;
		}
		w->from = at;
		w->len = done;
	}
	*available = w->from + w->len - at;
	return w->data + (at - w->from);
}

/* Decodes the frame at an offset, with as much of the file in memory as that takes. */
static EsStatus
frame_at(Window *w, uint32 number, uint64 at, uint16 shard, uint32 prev_crc, const EsFrameHeader **header,
		 const void **payload, uint32 *crc, EsError *err)
{
	size_t		available;
	const char *p = window_at(w, at, ES_WAL_BLOCK, &available);

	if (available >= sizeof(EsFrameHeader))
	{
		const EsFrameHeader *h = (const EsFrameHeader *) p;

		/* a length that is nonsense asks for nothing: decoding refuses it */
		if (h->magic == ES_FRAME_MAGIC && h->payload_len <= ES_FRAME_MAX_PAYLOAD &&
			es_frame_size(h->payload_len) <= w->limit - at)
			p = window_at(w, at, es_frame_size(h->payload_len), &available);
	}
	return es_frame_decode(p, available, ES_OWN_LSN(number, at), shard, prev_crc, header, payload, crc, err);
}

/*
 * The frame that says what a file is.  System identifier and timeline are those of the cluster that
 * wrote it: not this one's after an adoption.  The control block is checked for that, and the chain of
 * checksums ties the files to it.
 */
static void
check_file_header(const char *path, const EsFrameHeader *header, const void *payload,
				  const EsFileIdentity *identity, uint32 number, EsWalFileHeader *file)
{
	EsError err;

	if (header->type != ES_FRAME_FILE || header->payload_len != sizeof(*file))
	{
		es_fail(&err, ES_ERR_CORRUPT, 0, "the file does not begin with its identity");
		es_corruption(ERROR, path, &err);
	}
	memcpy(file, payload, sizeof(*file));
	if (memcmp(file->identity.store_uuid, identity->store_uuid, ES_UUID_LEN) != 0 ||
		file->identity.shard != identity->shard || file->identity.nshards != identity->nshards)
	{
		es_fail(&err, ES_ERR_FOREIGN, 0, "the file is of another store or shard");
		es_corruption(ERROR, path, &err);
	}
	if (file->file_number != number)
	{
		es_fail(&err, ES_ERR_CORRUPT, 0, "the file says that it has number %llx",
				(unsigned long long) file->file_number);
		es_corruption(ERROR, path, &err);
	}
}

/* Files that count, oldest first. */
static List *
find_chain(const EsShardFiles *files)
{
	const EsControl *control = &files->control;
	int				 shard = files->identity.shard;
	EsOwnLsn		 end = control->durable_end;
	uint32			 crc = control->durable_crc;
	List			*chain = NIL;

	while (control->first_file != 0 && end != 0 && ES_OWN_FILE(end) >= ES_OWN_FILE(control->first_file))
	{
		ReplayFile			*f = palloc(sizeof(ReplayFile));
		char				*path = es_log_file_path(shard, ES_OWN_FILE(end));
		Window				 w;
		const EsFrameHeader *header;
		const void			*payload;
		uint32				 header_crc;
		EsWalFileHeader		 file;
		EsError				 err;

		f->number = ES_OWN_FILE(end);
		f->end = ES_OWN_OFFSET(end);
		f->crc = crc;
		chain = lcons(f, chain);

		window_open(&w, path);
		if (frame_at(&w, f->number, 0, shard, 0, &header, &payload, &header_crc, &err) != ES_OK)
		{
			err.status = err.status == ES_ERR_TRUNCATED ? ES_ERR_CORRUPT : err.status;
			es_corruption(ERROR, path, &err);
		}
		check_file_header(path, header, payload, &control->identity, f->number, &file);
		window_close(&w);

		if (f->number == ES_OWN_FILE(control->first_file) || file.previous_end == 0)
			break;
		if (ES_OWN_FILE(file.previous_end) >= f->number)
		{
			es_fail(&err, ES_ERR_CORRUPT, 0, "the file says that the log ended at %llx before it",
					(unsigned long long) file.previous_end);
			es_corruption(ERROR, path, &err);
		}
		end = file.previous_end;
		crc = file.previous_crc;
		pfree(path);
	}
	return chain;
}

static void
call_back(EsFrameCallback callback, const char *path, const EsFrameHeader *header, const void *payload,
		  EsOwnLsn end)
{
	EsFrameHeader plain;
	void		 *raw;
	size_t		  raw_len;
	EsError		  err;

	if (!(header->flags & ES_FRAME_LZ4))
	{
		callback(header, payload, end);
		return;
	}
	if (es_frame_unpack(header, payload, &raw, &raw_len, &err) != ES_OK)
		es_corruption(ERROR, path, &err);
	plain = *header;
	plain.flags &= ~ES_FRAME_LZ4;
	plain.payload_len = (uint32) raw_len;
	PG_TRY();
	{
		callback(&plain, raw, end);
	}
	PG_FINALLY();
	{
		free(raw);
	}
	PG_END_TRY();
}

static void
replay_file(const EsShardFiles *files, const ReplayFile *f, EsFrameCallback callback)
{
	int		   shard = files->identity.shard;
	char	  *path = es_log_file_path(shard, f->number);
	EsLogFile *known = es_log_file_add(f->number);
	Window	   w;
	uint64	   at = 0;
	uint64	   last_end = 0;
	uint32	   crc = 0;
	EsError	   err;

	window_open(&w, path);
	known->size = w.limit;
	if (w.limit < f->end)
	{
		es_fail(&err, ES_ERR_CORRUPT, w.limit, "the file ends before offset %u, up to which it was durable",
				f->end);
		es_corruption(ERROR, path, &err);
	}
	w.limit = f->end;

	while (at < f->end)
	{
		const EsFrameHeader *header;
		const void			*payload;
		EsStatus			 status = frame_at(&w, f->number, at, shard, crc, &header, &payload, &crc, &err);

		if (status == ES_ERR_TRUNCATED)
		{
			/* padding: the next group begins with the next block */
			at = TYPEALIGN64(ES_WAL_BLOCK, at + 1);
			continue;
		}
		if (status != ES_OK)
			es_corruption(ERROR, path, &err);

		at += es_frame_size(header->payload_len);
		last_end = at;
		known->max_start = Max(known->max_start, header->pg_start);
		if (header->type != ES_FRAME_FILE && callback != NULL)
			call_back(callback, path, header, payload, ES_OWN_LSN(f->number, at));
		es_shard_interrupts();
	}
	if (last_end != f->end || crc != f->crc)
	{
		if (last_end == f->end)
			es_fail_crc(&err, last_end, f->crc, crc, "the last durable frame");
		else
			es_fail(&err, ES_ERR_CORRUPT, last_end, "the log ends here, but was durable up to offset %u",
					f->end);
		es_corruption(ERROR, path, &err);
	}
	window_close(&w);
	pfree(path);
}

void
es_log_replay(const EsShardFiles *files, EsFrameCallback callback)
{
	List	 *chain = find_chain(files);
	ListCell *cell;

	dlist_init(&es_log_files);
	foreach(cell, chain)
		replay_file(files, lfirst(cell), callback);
	list_free_deep(chain);
	es_log_replayed = true;
}
