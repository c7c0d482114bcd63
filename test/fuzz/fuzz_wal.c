/*
 * fuzz_wal: frames of a shard's own WAL, control blocks and the store file.
 *
 * The first byte chooses: 0 = a log as it is, 1 = a log whose frames' checksums are made right so that what is
 * behind them is reached, 2 = a control block, 3 = a store file (checksums made right), 4 = blocks as they are.
 */
#include <stdlib.h>
#include <string.h>

#include "core/wal.h"

#define OWN_LSN(offset) (UINT64_C(7) << 32 | (offset))

static volatile uint64_t sink;

static void
read_log(char *data, size_t size, bool reseal)
{
	size_t	 at = 0;
	uint32_t crc = 0;

	while (at <= size)
	{
		const EsFrameHeader *h;
		const void			*payload;
		EsFrameHeader		*raw = (EsFrameHeader *) (data + at);
		EsStatus			 status;

		if (reseal && size - at >= sizeof(*raw) && raw->magic == ES_FRAME_MAGIC)
		{
			raw->version = ES_FORMAT_VERSION;
			raw->own_lsn = OWN_LSN(at);
			raw->payload_len %= 5000;
			raw->shard = 3;
			if (es_frame_size(raw->payload_len) <= size - at)
			{
				EsFrameHeader copy = *raw;

				copy.crc = 0;
				raw->crc = es_crc32c(es_crc32c(es_crc32c(0, &copy, sizeof(copy)), raw + 1, raw->payload_len),
									 &crc, 4);
			}
		}
		status = es_frame_decode(data + at, size - at, OWN_LSN(at), 3, crc, &h, &payload, &crc, NULL);
		if (status == ES_ERR_TRUNCATED)
		{
			at = (at / ES_WAL_BLOCK + 1) * ES_WAL_BLOCK;
			continue;
		}
		if (status != ES_OK)
			break;
		if (h->payload_len > 0)
			sink += ((const uint8_t *) payload)[h->payload_len - 1];
		if (h->flags & ES_FRAME_LZ4)
		{
			void  *unpacked;
			size_t len;

			if (es_frame_unpack(h, payload, &unpacked, &len, NULL) == ES_OK)
			{
				sink += ((uint8_t *) unpacked)[len - 1];
				free(unpacked);
			}
		}
		at += es_frame_size(h->payload_len);
	}
}

static void
read_block(const uint8_t *data, size_t size, uint8_t mode)
{
	char	   *block = calloc(1, ES_WAL_BLOCK);
	EsControl	control;
	EsStoreFile store;

	memcpy(block, data, size < ES_WAL_BLOCK ? size : ES_WAL_BLOCK);
	if (mode == 2)
		((EsControl *) block)->crc = es_crc32c(0, block, offsetof(EsControl, crc));
	if (mode == 3)
		((EsStoreFile *) block)->crc = es_crc32c(0, block, offsetof(EsStoreFile, crc));
	if (es_control_decode(block, &control, NULL) == ES_OK)
	{
		char *again = malloc(ES_WAL_BLOCK);

		es_control_encode(&control, again);
		/* reserved may have held something */
		if (control.identity.shard >= control.identity.nshards)
			abort();
		free(again);
	}
	if (es_store_decode(block, &store, NULL) == ES_OK)
		for (int i = 0; i < ES_ROUTING_SLOTS; i++)
			if (store.slot_map[i] >= store.nshards)
				abort();
	free(block);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	char *copy;

	if (size == 0)
		return 0;
	if (data[0] >= 2)
	{
		read_block(data + 1, size - 1, data[0]);
		return 0;
	}
	copy = malloc(size - 1 ? size - 1 : 1);
	memcpy(copy, data + 1, size - 1);
	read_log(copy, size - 1, data[0] == 1);
	free(copy);
	return 0;
}
