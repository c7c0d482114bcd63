/*
 * fuzz_message: records from PostgreSQL's WAL, the payloads that they join to, FINISH and its sections.
 *
 * The first byte chooses: 0 = the rest is one record as it is; 1 = records, each behind two bytes of length,
 * whose checksums are made right so that what is behind them is reached; 2 = a FINISH; 3 = a section.
 */
#include <stdlib.h>
#include <string.h>

#include "core/message.h"

static volatile uint64_t sink;

static void
walk_section(const EsSectionHeader *s)
{
	for (const EsFinishTable *t = es_section_first(s); t != NULL; t = es_section_next(s, t))
	{
		EsFinishTableView v;
		const char		 *at;

		es_finish_table_view(t, &v);
		for (uint32_t i = 0; i < t->nlogged; i++)
			sink += v.batch_starts[i];
		at = v.inline_batches;
		for (uint32_t i = 0; i < t->ninline; i++)
		{
			EsBatchView b;

			es_batch_open_trusted(at, &b);
			for (uint32_t r = 0; r < b.header->nrows; r++)
				sink += es_batch_context_hash(&b, r) + es_batch_ordinal(&b, r);
			at += b.header->total_len;
		}
		if (v.not_taken && t->nrows > 0)
			sink += v.not_taken[(t->nrows - 1) / 8];
		for (uint32_t i = 0; i < t->nversions; i++)
			sink += v.versions[i].context_hash;
	}
}

static void
fuzz_finish(const void *payload, size_t len)
{
	if (es_finish_check(payload, len, NULL) != ES_OK)
		return;
	for (uint16_t shard = 0; shard < ES_MAX_SHARDS; shard++)
	{
		const EsSectionHeader *s = es_finish_section(payload, shard);

		if (s == NULL)
			continue;
		/* what is good inside a FINISH is good alone */
		if (es_section_check(s, s->len, NULL) != ES_OK)
			abort();
		walk_section(s);
	}
}

static void
fuzz_records(const uint8_t *data, size_t size)
{
	EsMessageAssembler *a = es_assembler_create();

	while (size >= 2)
	{
		size_t				   len = data[0] | data[1] << 8;
		EsMessageHeader		  *record;
		const EsMessageHeader *h;
		const void			  *piece;
		void				  *payload;
		size_t				   payload_len;

		data += 2;
		size -= 2;
		if (len > size)
			len = size;
		record = malloc(len ? len : 1);
		memcpy(record, data, len);
		data += len;
		size -= len;
		if (len >= sizeof(*record))
		{
			record->magic = ES_MESSAGE_MAGIC;
			record->version = ES_FORMAT_VERSION;
			record->piece_len = (uint32_t) (len - sizeof(*record));
			record->crc = 0;
			record->crc = es_crc32c(0, record, len);
		}
		if (es_message_check(record, len, &h, &piece, NULL) == ES_OK &&
			es_assembler_add(a, h, piece, &payload, &payload_len, NULL) == ES_OK && payload != NULL)
		{
			EsBatchView v;

			if (payload_len != h->raw_len)
				abort();
			if (h->kind == ES_MESSAGE_FINISH)
				fuzz_finish(payload, payload_len);
			else if (h->kind == ES_MESSAGE_BATCH && es_batch_open(payload, payload_len, &v, NULL) == ES_OK &&
					 v.header->nrows > 0)
				sink += es_batch_context_hash(&v, v.header->nrows - 1);
			free(payload);
		}
		free(record);
	}
	es_assembler_free(a);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const EsMessageHeader *h;
	const void			  *piece;
	void				  *copy;

	if (size == 0)
		return 0;
	if (data[0] == 1)
	{
		fuzz_records(data + 1, size - 1);
		return 0;
	}
	copy = malloc(size);
	memcpy(copy, data + 1, --size);
	/* ends where its memory ends */
	copy = realloc(copy, size ? size : 1);
	if (data[0] == 0)
		es_message_check(copy, size, &h, &piece, NULL);
	else if (data[0] == 2)
		fuzz_finish(copy, size);
	else if (es_section_check(copy, size, NULL) == ES_OK)
		walk_section(copy);
	free(copy);
	return 0;
}
