/*-------------------------------------------------------------------------
 *
 * spool.c
 *	  Bytes that a transaction notes one behind the other (spool.h).
 *
 * The file holds [0, in_file), the buffer what follows it.  Only a full buffer is written, as a whole
 * and in front of nothing else; in_file moves when the write has succeeded.  So an ERROR in between leaves
 * bytes in the file that the next write overwrites, and nothing to be repaired.
 *
 * Of what was written last one piece is read ahead, for rows are fetched in the order in which
 * they came.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "commands/tablespace.h"
#include "storage/fd.h"
#include "utils/resowner.h"
#include "utils/wait_event.h"

#include "tam/spool.h"

#define FIRST_BUFFER 1024
#define BUFFER_BYTES (64 * 1024) /* at most in memory */
#define AHEAD_BYTES	 (16 * 1024)

struct EsSpool
{
	MemoryContext context;
	File		  file; /* 0 = never needed */
	uint64		  in_file;
	char		 *buffer;
	Size		  used;
	Size		  allocated;
	char		 *ahead; /* file's [ahead_start, + ahead_len) */
	uint64		  ahead_start;
	Size		  ahead_len;
};

EsSpool *
es_spool_create(MemoryContext context)
{
	EsSpool *s = MemoryContextAllocZero(context, sizeof(EsSpool));

	s->context = context;
	return s;
}

static void
open_file(EsSpool *s)
{
	ResourceOwner owner = CurrentResourceOwner;

	/* the file must outlive a subtransaction; after an ERROR PostgreSQL sets the owner itself */
	PrepareTempTablespaces();
	CurrentResourceOwner = TopTransactionResourceOwner;
	s->file = OpenTemporaryFile(false); /* layers: temporary, as that of a BufFile */
	CurrentResourceOwner = owner;
}

/* Behind what the file holds. */
static void
write_file(EsSpool *s, const char *bytes, Size len)
{
	Size done = 0;

	if (s->file == 0)
		open_file(s);
	s->ahead_len = 0;
	while (done < len)
	{
		int n = FileWrite(s->file, unconstify(char *, bytes) + done, Min(len - done, (Size) 1 << 30),
						  (off_t) (s->in_file + done), WAIT_EVENT_BUFFILE_WRITE);

		if (n <= 0)
			ereport(ERROR,
					(errcode_for_file_access(), errmsg("could not write temporary file of event_store: %m"),
					 errhint("Free space where temp_tablespaces are, or split the transaction.")));
		done += n;
	}
	s->in_file += len;
}

/* Makes room in the buffer. */
static void
grow_buffer(EsSpool *s, Size wanted)
{
	Size size = Max(s->allocated, FIRST_BUFFER);

	while (size < wanted)
		size *= 2;
	s->buffer = s->buffer == NULL ? MemoryContextAlloc(s->context, size) : repalloc(s->buffer, size);
	s->allocated = size;
}

uint64
es_spool_add(EsSpool *s, const void *bytes, Size len)
{
	uint64 start;

	if (s->used + len > s->allocated)
	{
		if (s->used + len > BUFFER_BYTES && s->used > 0)
		{
			write_file(s, s->buffer, s->used);
			s->used = 0;
		}
		if (len > BUFFER_BYTES)
		{
			start = s->in_file;
			write_file(s, bytes, len);
			return start;
		}
		if (s->used + len > s->allocated)
			grow_buffer(s, s->used + len);
	}
	start = s->in_file + s->used;
	memcpy(s->buffer + s->used, bytes, len);
	s->used += len;
	return start;
}

/* Returns how many bytes came, less than asked for only at the end of what was written. */
static Size
read_file(EsSpool *s, uint64 offset, char *bytes, Size len)
{
	Size done = 0;

	while (done < len)
	{
		int n = FileRead(s->file, bytes + done, Min(len - done, (Size) 1 << 30), (off_t) (offset + done),
						 WAIT_EVENT_BUFFILE_READ);

		if (n < 0)
			ereport(ERROR,
					(errcode_for_file_access(), errmsg("could not read temporary file of event_store: %m")));
		if (n == 0)
			break;
		done += n;
	}
	return done;
}

static void
read_ahead(EsSpool *s, uint64 offset)
{
	if (s->ahead == NULL)
		s->ahead = MemoryContextAlloc(s->context, AHEAD_BYTES);
	s->ahead_len = 0;
	s->ahead_len = read_file(s, offset, s->ahead, Min(AHEAD_BYTES, s->in_file - offset));
	s->ahead_start = offset;
}

void
es_spool_read(EsSpool *s, uint64 offset, void *bytes, Size len)
{
	char *p = bytes;

	while (len > 0)
	{
		Size n;

		if (offset >= s->in_file)
		{
			if (offset + len > s->in_file + s->used)
				elog(ERROR, "event_store reads behind the end of a temporary file");
			memcpy(p, s->buffer + (offset - s->in_file), len);
			return;
		}
		n = Min(len, s->in_file - offset);
		if (n > AHEAD_BYTES / 2)
		{
			if (read_file(s, offset, p, n) != n)
				ereport(ERROR, (errcode(ERRCODE_DATA_CORRUPTED),
								errmsg("temporary file of event_store is too short")));
		}
		else
		{
			if (offset < s->ahead_start || offset + n > s->ahead_start + s->ahead_len)
				read_ahead(s, offset);
			if (n > s->ahead_len)
				ereport(ERROR, (errcode(ERRCODE_DATA_CORRUPTED),
								errmsg("temporary file of event_store is too short")));
			memcpy(p, s->ahead + (offset - s->ahead_start), n);
		}
		p += n;
		offset += n;
		len -= n;
	}
}

void
es_spool_truncate(EsSpool *s, uint64 end)
{
	if (end >= s->in_file)
	{
		s->used = Min(s->used, end - s->in_file);
		return;
	}
	s->in_file = end;
	s->used = 0;
	s->ahead_len = 0;
}

void
es_spool_drop(EsSpool *s)
{
	/* closing a File writes nothing, and that of a temporary one says at LOG what goes wrong */
	if (s->file != 0)
		FileClose(s->file);
	s->file = 0;
}
