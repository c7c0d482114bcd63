/*-------------------------------------------------------------------------
 *
 * message.c
 *	  The payload of our logical messages in PostgreSQL's WAL; what a FINISH says is
 *	  in finish.c.
 *
 * Writing.  A writer keeps pointers to the caller's parts, which therefore must stay
 * until es_message_end(), and copies them straight into the records.  Only a
 * payload that is worth compressing and comes in several parts is joined
 * first, because LZ4 wants its input in one piece.  The last writer ended is
 * kept with its buffers for the next es_message_begin(): a process logs one
 * message at a time, and a small one then costs no malloc.  (Hence this part is
 * for one thread only.)
 *
 * Reading.  A record is checked by itself: es_message_check().  What it claims
 * about the whole message (stored_len up to 2 GB) is believed only as far as
 * pieces really come: the assembler's buffer grows with them, and the memory for the
 * uncompressed payload, at most 255 times what came, is asked for at the end.
 *
 *-------------------------------------------------------------------------
 */
#include <stdlib.h>
#include <string.h>

#include <lz4.h>

#include "core/message.h"

#define MAX_PAYLOAD UINT32_C(0x7fffffff)
#define PIECE_ROOM	(ES_MESSAGE_MAX_RECORD - sizeof(EsMessageHeader))

/* An LZ4 sequence yields at most 255 bytes for each byte of its own. */
#define LZ4_MAX_RATIO 255

/* Buffers larger than this are not kept for the next message. */
#define KEEP_MEMORY (256 * 1024)

/* ---- writing ---- */

struct EsMessageWriter
{
	EsMessageHeader header; /* what all pieces share */
	uint32_t		npieces;
	const EsPart   *parts; /* the stored payload: the caller's parts or `whole` */
	int				nparts;
	EsPart			whole;
	EsPart		   *own_parts; /* copy of the caller's array */
	int				own_parts_cap;
	char		   *buffer; /* joined and compressed payload */
	size_t			buffer_cap;
	LZ4_stream_t   *lz4; /* its table is cleared once, not for each of many small messages */
};

static EsMessageWriter *spare_writer = NULL;

static void
writer_free(EsMessageWriter *w)
{
	if (w == NULL)
		return;
	free(w->own_parts);
	free(w->buffer);
	LZ4_freeStream(w->lz4);
	free(w);
}

void
es_message_end(EsMessageWriter *w)
{
	if (w == NULL)
		return;
	if (spare_writer != NULL || w->buffer_cap > KEEP_MEMORY || w->own_parts_cap > 1024)
		writer_free(w);
	else
		spare_writer = w;
}

static bool
kind_valid(int kind)
{
	return kind >= ES_MESSAGE_BATCH && kind <= ES_MESSAGE_MARK;
}

static EsStatus
compress_payload(EsMessageWriter *w)
{
	size_t		raw_len = w->header.raw_len;
	size_t		room = raw_len - 1; /* more would not be smaller */
	size_t		need = w->nparts == 1 ? room : raw_len + room;
	const char *raw;
	int			stored_len;

	if (need > w->buffer_cap)
	{
		free(w->buffer);
		w->buffer_cap = 0;
		w->buffer = malloc(need);
		if (w->buffer == NULL)
			return ES_ERR_NOMEM;
		w->buffer_cap = need;
	}
	if (w->nparts == 1)
		raw = w->parts[0].data;
	else
	{
		char *joined = w->buffer + room;

		raw = joined;
		for (int i = 0; i < w->nparts; i++)
		{
			if (w->parts[i].len == 0)
				continue;
			memcpy(joined, w->parts[i].data, w->parts[i].len);
			joined += w->parts[i].len;
		}
	}
	if (w->lz4 == NULL && (w->lz4 = LZ4_createStream()) == NULL)
		return ES_ERR_NOMEM;
	LZ4_resetStream_fast(w->lz4);
	stored_len = LZ4_compress_fast_continue(w->lz4, raw, w->buffer, (int) raw_len, (int) room, 1);
	if (stored_len <= 0)
		(void) LZ4_initStream(w->lz4, sizeof(*w->lz4)); /* it did not fit: the stream is undefined now */
	else
	{
		w->header.flags = ES_MESSAGE_LZ4;
		w->header.stored_len = (uint32_t) stored_len;
		w->whole = (EsPart){w->buffer, (size_t) stored_len};
		w->parts = &w->whole;
		w->nparts = 1;
	}
	return ES_OK;
}

EsStatus
es_message_begin(EsMessageWriter **writer, EsMessageKind kind, const uint8_t uuid[ES_UUID_LEN], EsFxid fxid,
				 uint16_t shard, const EsPart *parts, int nparts)
{
	EsMessageWriter *w = spare_writer;
	size_t			 total = 0;
	EsStatus		 status;

	*writer = NULL;
	if (!kind_valid(kind) || nparts < 0)
		return ES_ERR_ARGUMENT;
	for (int i = 0; i < nparts; i++)
	{
		if (parts[i].len > MAX_PAYLOAD - total)
			return ES_ERR_TOO_LARGE;
		total += parts[i].len;
	}

	if (w != NULL)
		spare_writer = NULL;
	else if ((w = calloc(1, sizeof(*w))) == NULL)
		return ES_ERR_NOMEM;
	if (nparts > w->own_parts_cap)
	{
		free(w->own_parts);
		w->own_parts_cap = 0;
		w->own_parts = malloc((size_t) nparts * sizeof(EsPart));
		if (w->own_parts == NULL)
		{
			writer_free(w);
			return ES_ERR_NOMEM;
		}
		w->own_parts_cap = nparts;
	}
	if (nparts > 0)
		memcpy(w->own_parts, parts, (size_t) nparts * sizeof(EsPart));
	w->parts = w->own_parts;
	w->nparts = nparts;

	memset(&w->header, 0, sizeof(w->header));
	w->header.magic = ES_MESSAGE_MAGIC;
	w->header.version = ES_FORMAT_VERSION;
	w->header.kind = (uint8_t) kind;
	memcpy(w->header.store_uuid, uuid, ES_UUID_LEN);
	w->header.fxid = fxid;
	w->header.shard = shard;
	w->header.raw_len = (uint32_t) total;
	w->header.stored_len = (uint32_t) total;
	if (total >= ES_MESSAGE_COMPRESS_MIN && total <= LZ4_MAX_INPUT_SIZE)
	{
		status = compress_payload(w);
		if (status != ES_OK)
		{
			writer_free(w);
			return status;
		}
	}
	w->npieces = (uint32_t) ((w->header.stored_len + PIECE_ROOM - 1) / PIECE_ROOM);
	if (w->npieces == 0)
		w->npieces = 1;
	*writer = w;
	return ES_OK;
}

uint32_t
es_message_npieces(const EsMessageWriter *w)
{
	return w->npieces;
}

/* CRC of a message's header, with its crc taken as 0, and the bytes behind. */
static uint32_t
message_crc(const EsMessageHeader *header, const void *piece)
{
	EsMessageHeader h = *header;

	h.crc = 0;
	return es_crc32c(es_crc32c(0, &h, sizeof(h)), piece, h.piece_len);
}

EsStatus
es_message_piece(EsMessageWriter *w, uint32_t piece, EsLsn first_start, void *buf, size_t *len)
{
	EsMessageHeader h = w->header;
	size_t			skip = (size_t) piece * PIECE_ROOM;
	size_t			left;
	char		   *out = (char *) buf + sizeof(h);

	if (piece >= w->npieces || (piece == 0) != (first_start == 0))
		return ES_ERR_ARGUMENT;

	left = h.stored_len - skip < PIECE_ROOM ? h.stored_len - skip : PIECE_ROOM;
	h.first_start = first_start;
	h.piece = piece;
	h.npieces = piece == w->npieces - 1 ? w->npieces : 0;
	h.piece_len = (uint32_t) left;
	*len = sizeof(h) + left;

	for (int i = 0; i < w->nparts && left > 0; i++)
	{
		const EsPart *p = &w->parts[i];
		size_t		  n;

		if (skip >= p->len)
		{
			skip -= p->len;
			continue;
		}
		n = p->len - skip < left ? p->len - skip : left;
		memcpy(out, (const char *) p->data + skip, n);
		out += n;
		left -= n;
		skip = 0;
	}
	h.crc = message_crc(&h, (char *) buf + sizeof(h));
	memcpy(buf, &h, sizeof(h));
	return ES_OK;
}

/* ---- reading ---- */

EsStatus
es_message_check(const void *buf, size_t len, const EsMessageHeader **header, const void **piece,
				 EsError *err)
{
	const EsMessageHeader *h = buf;
	const char			  *bytes = (const char *) buf + sizeof(*h);
	uint32_t			   crc;
	bool				   lengths_fit;
	bool				   piece_fits;

	if ((uintptr_t) buf % 8 != 0)
		return es_fail(err, ES_ERR_ARGUMENT, 0, "message is not aligned");
	if (len < sizeof(*h))
		return es_fail(err, ES_ERR_TRUNCATED, len, "message ends in its header");
	if (h->magic != ES_MESSAGE_MAGIC)
		return es_fail(err, ES_ERR_CORRUPT, 0, "message has magic %08x instead of %08x", h->magic,
					   ES_MESSAGE_MAGIC);
	if (h->version != ES_FORMAT_VERSION)
		return es_fail(err, ES_ERR_VERSION, 0, "message has format version %u, this program knows %u",
					   h->version, ES_FORMAT_VERSION);
	if (h->piece_len != len - sizeof(*h))
		return es_fail(err, ES_ERR_CORRUPT, 0, "message with %u bytes of payload lies in a record of %zu",
					   h->piece_len, len);
	crc = message_crc(h, bytes);
	if (crc != h->crc)
		return es_fail_crc(err, 0, h->crc, crc, "message");

	/* The checksum says that a program of ours wrote this; the rest holds what readers rely on. */
	if (!kind_valid(h->kind) || (h->flags & ~ES_MESSAGE_LZ4) != 0)
		return es_fail(err, ES_ERR_CORRUPT, 0, "message has unknown kind %u or flags %02x", h->kind,
					   h->flags);
	if (h->flags & ES_MESSAGE_LZ4)
		lengths_fit = h->stored_len > 0 && h->stored_len < h->raw_len && h->raw_len <= MAX_PAYLOAD &&
					  h->raw_len / LZ4_MAX_RATIO <= h->stored_len;
	else
		lengths_fit = h->stored_len == h->raw_len && h->raw_len <= MAX_PAYLOAD;
	if (!lengths_fit)
		return es_fail(err, ES_ERR_CORRUPT, 0, "message has %u bytes, stored as %u", h->raw_len,
					   h->stored_len);

	/* npieces is given in the last piece, which is the whole payload if it is the first one as well */
	if (h->npieces != 0)
		piece_fits = h->npieces - 1 == h->piece && (h->piece == 0) == (h->piece_len == h->stored_len);
	else
		piece_fits = h->piece_len < h->stored_len;
	if (!piece_fits || len > ES_MESSAGE_MAX_RECORD || h->piece_len > h->stored_len ||
		(h->piece_len == 0 && h->stored_len != 0) || (h->piece == 0) != (h->first_start == 0))
		return es_fail(err, ES_ERR_CORRUPT, 0, "piece %u of %u of a message has %u of %u bytes", h->piece,
					   h->npieces, h->piece_len, h->stored_len);

	*header = h;
	*piece = bytes;
	return ES_OK;
}

struct EsMessageAssembler
{
	EsMessageHeader first;		 /* header of piece 0 */
	EsLsn			first_start; /* as the later pieces say */
	uint32_t		next_piece;
	bool			closed; /* complete, or failed */
	char		   *stored;
	size_t			stored_len;
	size_t			stored_cap;
};

EsMessageAssembler *
es_assembler_create(void)
{
	return calloc(1, sizeof(EsMessageAssembler));
}

void
es_assembler_free(EsMessageAssembler *a)
{
	if (a == NULL)
		return;
	free(a->stored);
	free(a);
}

/* Does the piece continue the message? */
static bool
piece_continues(const EsMessageAssembler *a, const EsMessageHeader *h)
{
	const EsMessageHeader *f = &a->first;

	if (h->piece != a->next_piece)
		return false;
	if (h->piece > 0)
	{
		if (h->kind != f->kind || h->flags != f->flags || h->fxid != f->fxid || h->shard != f->shard ||
			h->raw_len != f->raw_len || h->stored_len != f->stored_len ||
			memcmp(h->store_uuid, f->store_uuid, ES_UUID_LEN) != 0)
			return false;
		if (h->piece > 1 && h->first_start != a->first_start)
			return false;
	}
	if (h->piece_len > h->stored_len - a->stored_len)
		return false;
	/* the last piece, and no other one, ends the payload */
	return (h->npieces != 0) == (a->stored_len + h->piece_len == h->stored_len);
}

static EsStatus
append_piece(EsMessageAssembler *a, const void *piece, size_t len, size_t total)
{
	size_t need = a->stored_len + len;

	if (need > a->stored_cap || a->stored == NULL)
	{
		size_t cap = a->stored_cap * 2 > need ? a->stored_cap * 2 : need;
		char  *grown;

		if (cap > total)
			cap = total;
		if (cap == 0)
			cap = 1; /* an empty payload is not NULL */
		grown = realloc(a->stored, cap);
		if (grown == NULL)
			return ES_ERR_NOMEM;
		a->stored = grown;
		a->stored_cap = cap;
	}
	memcpy(a->stored + a->stored_len, piece, len);
	a->stored_len += len;
	return ES_OK;
}

static EsStatus
decompress(const EsMessageHeader *h, const char *stored, void **payload, EsError *err)
{
	char *raw = malloc(h->raw_len);
	int	  n;

	if (raw == NULL)
		return es_fail(err, ES_ERR_NOMEM, 0, "no memory for a message of %u bytes", h->raw_len);
	n = LZ4_decompress_safe(stored, raw, (int) h->stored_len, (int) h->raw_len);
	if (n < 0 || (uint32_t) n != h->raw_len)
	{
		free(raw);
		return es_fail(err, ES_ERR_CORRUPT, 0, "message of %u bytes does not decompress to %u", h->stored_len,
					   h->raw_len);
	}
	*payload = raw;
	return ES_OK;
}

/* After the last piece, and after a failure, the assembler takes nothing more. */
EsStatus
es_assembler_add(EsMessageAssembler *a, const EsMessageHeader *header, const void *piece, void **payload,
				 size_t *payload_len, EsError *err)
{
	const char *stored = piece;
	EsStatus	status;

	*payload = NULL;
	*payload_len = 0;
	if (a->closed)
		return es_fail(err, ES_ERR_ARGUMENT, 0, "a piece comes after the message's end");
	if (!piece_continues(a, header))
	{
		a->closed = true;
		return es_fail(err, ES_ERR_CORRUPT, 0, "piece %u of a message comes where piece %u should",
					   header->piece, a->next_piece);
	}
	if (header->piece == 0)
		a->first = *header;
	else
		a->first_start = header->first_start;
	a->next_piece++;

	/* a compressed message in one piece is used where it lies */
	if (header->npieces != 1 || !(header->flags & ES_MESSAGE_LZ4))
	{
		if (append_piece(a, piece, header->piece_len, header->stored_len) != ES_OK)
		{
			a->closed = true;
			return es_fail(err, ES_ERR_NOMEM, 0, "no memory for a message of %u bytes", header->stored_len);
		}
		stored = a->stored;
	}
	if (header->npieces == 0)
		return ES_OK;

	a->closed = true;
	if (header->flags & ES_MESSAGE_LZ4)
	{
		status = decompress(header, stored, payload, err);
		if (status != ES_OK)
			return status;
		free(a->stored);
	}
	else
		*payload = a->stored;
	a->stored = NULL;
	*payload_len = header->raw_len;
	return ES_OK;
}
