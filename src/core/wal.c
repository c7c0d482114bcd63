/*-------------------------------------------------------------------------
 *
 * wal.c
 *	  Codecs of a shard's own WAL, of its control blocks and of the store file.
 *
 * A frame is believed when it stands where it says it does (own LSN: a recycled
 * file holds frames of its former life), when its checksum is right, and when the
 * checksum that it continues is that of the frame before.  The chain is what
 * tells a log with a hole from one without: a block that reads as zeros between
 * two good ones looks like padding, but the frame behind it does not continue
 * the frame in front.  Padding must be zero up to the end of its block, so that a
 * frame whose magic was wiped out is not taken for it.
 *
 * Control blocks and the store file are one block each.  The checksum covers
 * the struct and the rest of the block must be zero: so no byte of it can
 * change unnoticed.
 *
 *-------------------------------------------------------------------------
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include <lz4.h>

#include "core/wal.h"

/* An LZ4 sequence yields at most 255 bytes for each byte of its own. */
#define LZ4_MAX_RATIO 255

static bool
all_zero(const void *buf, size_t len)
{
	const uint8_t *p = buf;

	/* each byte equals the one before it, and the first is 0 */
	return len == 0 || (p[0] == 0 && memcmp(p, p + 1, len - 1) == 0);
}

/* ---- frames ---- */

static uint32_t
frame_crc(const EsFrameHeader *header, const void *payload, uint32_t prev_crc)
{
	EsFrameHeader h = *header;
	uint32_t	  crc;

	h.crc = 0;
	crc = es_crc32c(0, &h, sizeof(h));
	crc = es_crc32c(crc, payload, h.payload_len);
	return es_crc32c(crc, &prev_crc, sizeof(prev_crc));
}

uint32_t
es_frame_encode(EsFrameHeader *header, const void *payload, uint32_t prev_crc, void *buf)
{
	char  *out = buf;
	size_t used = sizeof(*header) + header->payload_len;

	header->magic = ES_FRAME_MAGIC;
	header->version = ES_FORMAT_VERSION;
	header->reserved = 0;
	header->reserved2 = 0;
	header->crc = frame_crc(header, payload, prev_crc);
	memcpy(out, header, sizeof(*header));
	if (header->payload_len > 0)
		memcpy(out + sizeof(*header), payload, header->payload_len);
	memset(out + used, 0, es_frame_size(header->payload_len) - used);
	return header->crc;
}

EsStatus
es_frame_decode(const void *buf, size_t len, EsOwnLsn own_lsn, uint16_t shard, uint32_t prev_crc,
				const EsFrameHeader **header, const void **payload, uint32_t *crc, EsError *err)
{
	const EsFrameHeader *h = buf;
	const char			*bytes = (const char *) buf + sizeof(*h);
	uint64_t			 where = own_lsn & UINT32_MAX;
	size_t				 size;
	uint32_t			 found;

	if ((uintptr_t) buf % 8 != 0 || own_lsn % 8 != 0)
		return es_fail(err, ES_ERR_ARGUMENT, where, "frame is not aligned");
	if (len < sizeof(uint32_t) || h->magic == 0)
	{
		size_t rest = ES_WAL_BLOCK - own_lsn % ES_WAL_BLOCK;

		if (all_zero(buf, rest < len ? rest : len))
			return es_fail(err, ES_ERR_TRUNCATED, where, "no frame, but padding");
		return es_fail(err, ES_ERR_CORRUPT, where, "padding between frames is not zero");
	}
	if (h->magic != ES_FRAME_MAGIC)
		return es_fail(err, ES_ERR_CORRUPT, where, "frame has magic %08x instead of %08x", h->magic,
					   ES_FRAME_MAGIC);
	if (len < sizeof(*h))
		return es_fail(err, ES_ERR_CORRUPT, where, "frame ends in its header");
	if (h->version != ES_FORMAT_VERSION)
		return es_fail(err, ES_ERR_VERSION, where, "frame has format version %u, this program knows %u",
					   h->version, ES_FORMAT_VERSION);
	if (h->own_lsn != own_lsn)
		return es_fail(err, ES_ERR_CORRUPT, where, "frame at %" PRIx64 " says that it stands at %" PRIx64,
					   own_lsn, h->own_lsn);
	size = es_frame_size(h->payload_len);
	if (h->payload_len > ES_FRAME_MAX_PAYLOAD || size > len)
		return es_fail(err, ES_ERR_CORRUPT, where, "frame has %u bytes of payload where %zu are left",
					   h->payload_len, len - sizeof(*h));
	found = frame_crc(h, bytes, prev_crc);
	if (found != h->crc)
		return es_fail_crc(err, where, h->crc, found, "frame");
	if (!all_zero(bytes + h->payload_len, size - sizeof(*h) - h->payload_len))
		return es_fail(err, ES_ERR_CORRUPT, where, "padding of a frame is not zero");
	if (h->type < ES_FRAME_FILE || h->type > ES_FRAME_CARRY_FINISH || (h->flags & ~ES_FRAME_LZ4) != 0 ||
		h->reserved != 0 || h->reserved2 != 0)
		return es_fail(err, ES_ERR_CORRUPT, where, "frame has unknown type %u or flags %02x", h->type,
					   h->flags);
	if (h->shard != shard)
		return es_fail(err, ES_ERR_FOREIGN, where, "frame of shard %u in the log of shard %u", h->shard,
					   shard);

	*header = h;
	*payload = bytes;
	*crc = h->crc;
	return ES_OK;
}

EsStatus
es_frame_unpack(const EsFrameHeader *header, const void *payload, void **raw, size_t *raw_len, EsError *err)
{
	uint64_t where = header->own_lsn & UINT32_MAX;
	uint64_t len;
	uint32_t stored_len;
	char	*out;

	if (!(header->flags & ES_FRAME_LZ4))
		return es_fail(err, ES_ERR_ARGUMENT, where, "frame is not compressed");
	if (header->payload_len < sizeof(len))
		return es_fail(err, ES_ERR_CORRUPT, where, "compressed frame has no length");
	memcpy(&len, payload, sizeof(len));
	stored_len = header->payload_len - (uint32_t) sizeof(len);
	if (len == 0 || len > INT32_MAX || len / LZ4_MAX_RATIO > stored_len)
		return es_fail(err, ES_ERR_CORRUPT, where, "frame of %u bytes claims %" PRIu64 " uncompressed",
					   stored_len, len);
	out = malloc(len);
	if (out == NULL)
		return es_fail(err, ES_ERR_NOMEM, where, "no memory for a frame of %" PRIu64 " bytes", len);
	if (LZ4_decompress_safe((const char *) payload + sizeof(len), out, (int) stored_len, (int) len) !=
		(int) len)
	{
		free(out);
		return es_fail(err, ES_ERR_CORRUPT, where, "frame of %u bytes does not decompress to %" PRIu64,
					   stored_len, len);
	}
	*raw = out;
	*raw_len = len;
	return ES_OK;
}

/* ---- files of one block ---- */

/*
 * Magic and version of a block, in front, and its checksum, crc_at bytes from
 * the start, over all before it; used bytes of the block are in use.
 */
static EsStatus
check_block(const void *block, uint32_t magic, size_t crc_at, size_t used, const char *what, EsError *err)
{
	const char *bytes = block;
	uint32_t	found_magic;
	uint16_t	version;
	uint32_t	expected;
	uint32_t	found;

	memcpy(&found_magic, bytes, sizeof(found_magic));
	memcpy(&version, bytes + sizeof(found_magic), sizeof(version));
	memcpy(&expected, bytes + crc_at, sizeof(expected));

	/* a version 0 was never written, but a block torn behind its magic may read so */
	if (found_magic != magic || version == 0)
		return es_fail(err, ES_ERR_CORRUPT, 0, "%s has magic %08x instead of %08x, or no version", what,
					   found_magic, magic);
	if (version != ES_FORMAT_VERSION)
		return es_fail(err, ES_ERR_VERSION, 0, "%s has format version %u, this program knows %u", what,
					   version, ES_FORMAT_VERSION);
	found = es_crc32c(0, bytes, crc_at);
	if (found != expected)
		return es_fail_crc(err, crc_at, expected, found, what);
	if (!all_zero(bytes + crc_at + sizeof(expected), ES_WAL_BLOCK - crc_at - sizeof(expected)))
		return es_fail(err, ES_ERR_CORRUPT, used, "%s has bytes behind its end", what);
	return ES_OK;
}

void
es_control_encode(EsControl *control, void *block)
{
	control->magic = ES_CONTROL_MAGIC;
	control->version = ES_FORMAT_VERSION;
	control->reserved = 0;
	control->reserved2 = 0;
	control->crc = es_crc32c(0, control, offsetof(EsControl, crc));
	memset(block, 0, ES_WAL_BLOCK);
	memcpy(block, control, sizeof(*control));
}

EsStatus
es_control_decode(const void *block, EsControl *control, EsError *err)
{
	EsStatus status = check_block(block, ES_CONTROL_MAGIC, offsetof(EsControl, crc), sizeof(*control),
								  "control block", err);

	if (status != ES_OK)
		return status;
	memcpy(control, block, sizeof(*control));
	if ((control->flags & ~(ES_CONTROL_CLEAN | ES_CONTROL_RELEASED)) != 0)
		return es_fail(err, ES_ERR_CORRUPT, 0, "control block has unknown flags %04x", control->flags);
	if (control->identity.nshards < 1 || control->identity.nshards > ES_MAX_SHARDS ||
		control->identity.shard >= control->identity.nshards)
		return es_fail(err, ES_ERR_CORRUPT, 0, "control block is of shard %u of %u", control->identity.shard,
					   control->identity.nshards);
	return ES_OK;
}

/*
 * A block that was torn while it was written fails its checksum, and then the
 * other one is the last that counted.  One of another version is different: it
 * may be the current one, and going by the older would forget what it says.
 */
int
es_control_current(EsStatus status0, const EsControl *c0, EsStatus status1, const EsControl *c1)
{
	if (status0 == ES_ERR_VERSION || status1 == ES_ERR_VERSION)
		return -1;
	if (status0 == ES_OK && status1 == ES_OK)
		return c1->sequence > c0->sequence ? 1 : 0;
	if (status0 == ES_OK)
		return 0;
	return status1 == ES_OK ? 1 : -1;
}

void
es_store_encode(EsStoreFile *store, void *block)
{
	store->magic = ES_STORE_MAGIC;
	store->version = ES_FORMAT_VERSION;
	store->reserved = 0;
	store->reserved2 = 0;
	store->crc = es_crc32c(0, store, offsetof(EsStoreFile, crc));
	memset(block, 0, ES_WAL_BLOCK);
	memcpy(block, store, sizeof(*store));
}

EsStatus
es_store_decode(const void *block, EsStoreFile *store, EsError *err)
{
	EsStatus status =
		check_block(block, ES_STORE_MAGIC, offsetof(EsStoreFile, crc), sizeof(*store), "store file", err);

	if (status != ES_OK)
		return status;
	memcpy(store, block, sizeof(*store));
	if ((store->flags & ~ES_STORE_DETACHED) != 0)
		return es_fail(err, ES_ERR_CORRUPT, 0, "store file has unknown flags %04x", store->flags);
	if (store->nshards < 1 || store->nshards > ES_MAX_SHARDS)
		return es_fail(err, ES_ERR_CORRUPT, 0, "store file names %u shards", store->nshards);
	for (int slot = 0; slot < ES_ROUTING_SLOTS; slot++)
		if (store->slot_map[slot] >= store->nshards)
			return es_fail(err, ES_ERR_CORRUPT, offsetof(EsStoreFile, slot_map) + (size_t) slot,
						   "slot %d of the store file belongs to shard %u of %u", slot, store->slot_map[slot],
						   store->nshards);
	return ES_OK;
}
