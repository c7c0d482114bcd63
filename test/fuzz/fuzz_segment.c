/*
 * Segments whose bytes were changed by someone who can compute checksums. The input is a list of
 * edits to one of a few segments; after the edits all CRCs are made right again, and everything that
 * a reader can do is done. Input that begins with 0xff is taken for a file as it is.
 */
#include <stdlib.h>
#include <string.h>

#include "core/route.h"
#include "core/segment.h"
#include "core/segment_format.h"

extern int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

typedef struct File
{
	uint8_t *data;
	size_t	 len;
} File;

typedef struct Base
{
	File	  file;
	uint64_t *pages; /* offsets of all pages, the footer's last, then the trailer's */
	uint32_t  npages;
} Base;

#define NBASES 4
static Base				bases[NBASES];
static volatile uint8_t sink;

static EsStatus
append(void *arg, const void *buf, size_t len, EsError *err)
{
	File *f = arg;

	f->data = realloc(f->data, f->len + len);
	memcpy(f->data + f->len, buf, len);
	f->len += len;
	return ES_OK;
}

static EsStatus
read_file(void *arg, void *buf, size_t len, uint64_t offset, EsError *err)
{
	File *f = arg;

	if (offset > f->len || len > f->len - offset)
		return es_fail(err, ES_ERR_TRUNCATED, offset, "file ends");
	memcpy(buf, f->data + offset, len);
	return ES_OK;
}

static const EsColumnDesc columns[] = {
	{-1, 4, 0}, {8, 8, ES_COLUMN_BYVAL}, {-1, 4, 0}, {16, 1, 0}, {8, 8, ES_COLUMN_BYVAL},
	{-1, 8, 0}, {4, 4, ES_COLUMN_BYVAL}};

/* nrows rows in contexts of per_context; overflow: with a large value. */
static void
make_base(Base *b, uint32_t nrows, uint32_t per_context, bool overflow)
{
	EsSegmentSpec	 spec = {.id = 7,
							 .columns = columns,
							 .ncols = 7,
							 .has_content_hash = true,
							 .codec = ES_CODEC_NONE, /* so that edits hit what they aim at */
							 .roles = {.context = 1, .version = 2, .context_class = ES_CONTEXT_STRING}};
	EsSegmentWriter *w;
	EsSegmentSummary summary;
	uint8_t			*large = calloc(1, 60000);
	uint32_t		 header = 60000 << 2;
	EsSegmentTrailer t;

	memcpy(large, &header, 4);
	if (es_segment_writer_create(&w, &spec, append, &b->file) != ES_OK)
		abort();
	for (uint32_t i = 0; i < nrows; i++)
	{
		uint32_t k = i / per_context;
		uint8_t	 context[6] = {5 << 1 | 1, (uint8_t) ('a' + k % 26), (uint8_t) (k >> 8), (uint8_t) k, 'x', 0};
		uint8_t	 text[8] = {8 << 1 | 1, (uint8_t) (i % 5), 1, 2, 3, 4, 5, 6};
		uint8_t	 uuid[16] = {(uint8_t) i, (uint8_t) (i >> 8), 3};
		double	 price = i * 0.25;
		uint8_t	 aligned[12] = {12 << 2, 0, 0, 0, (uint8_t) i, 1, 2, 3, 4, 5, 6, 7};
		int32_t	 number = (int32_t) (i * 77);
		const void	*values[7] = {context, NULL, text, uuid, &price, aligned, i % 3 ? &number : NULL};
		EsSegmentRow row = {.values = values,
							.content_hash = i % 2 ? uuid : NULL,
							.context_hash = (uint64_t) k / 2 << 40,
							.position = i + 1,
							.version = i % per_context + 1,
							.fxid = 50 + i / 7};

		if (overflow && i == 3)
			values[5] = large;
		context[1] = k % 2 ? 'z' : 'a'; /* pairs of contexts have the same hash */
		if (es_segment_writer_add(w, &row, NULL) != ES_OK)
			abort();
	}
	if (es_segment_writer_finish(w, &summary, NULL) != ES_OK)
		abort();
	es_segment_writer_free(w);
	free(large);

	memcpy(&t, b->file.data + b->file.len - sizeof(t), sizeof(t));
	for (uint64_t o = sizeof(EsSegmentHeader); o <= t.footer_offset;)
	{
		EsPageHeader h;

		memcpy(&h, b->file.data + o, sizeof(h));
		b->pages = realloc(b->pages, (b->npages + 2) * sizeof(uint64_t));
		b->pages[b->npages++] = o;
		o += sizeof(h) + h.stored_len;
		b->pages[b->npages] = o;
	}
}

/* Makes all CRCs right, for the pages where they were. */
static void
fix_crcs(const Base *b, uint8_t *data)
{
	EsSegmentHeader	 h;
	EsSegmentTrailer t;
	uint64_t		 id;
	uint64_t		 footer = b->pages[b->npages - 1];

	memcpy(&h, data, sizeof(h));
	h.crc = 0;
	h.crc = es_crc32c(0, &h, sizeof(h));
	memcpy(data, &h, sizeof(h));
	id = h.id;
	memcpy(data + footer + sizeof(EsPageHeader) + offsetof(EsSegmentFooter, header_crc), &h.crc, 4);
	for (uint32_t i = 0; i < b->npages; i++)
	{
		uint64_t o = b->pages[i];
		uint64_t place[2] = {id, o};
		uint32_t crc;

		memset(data + o, 0, 4);
		crc = es_crc32c(0, place, sizeof(place));
		crc = es_crc32c(crc, data + o, b->pages[i + 1] - o);
		memcpy(data + o, &crc, 4);
	}
	memcpy(&t, data + b->file.len - sizeof(t), sizeof(t));
	memcpy(&t.footer_crc, data + footer, 4);
	t.crc = 0;
	t.crc = es_crc32c(0, &t, sizeof(t));
	memcpy(data + b->file.len - sizeof(t), &t, sizeof(t));
}

static void
touch(const void *value, size_t len)
{
	const uint8_t *p = value;

	for (size_t i = 0; i < len; i++)
		sink = (uint8_t) (sink + p[i]);
}

static EsStatus
note_context(void *arg, uint32_t entry, uint64_t hash, uint64_t first_row, uint64_t nrows)
{
	uint64_t *hashes = arg;

	hashes[entry % 8] = hash;
	sink = (uint8_t) (sink + first_row + nrows);
	return ES_OK;
}

static void
note_damage(void *arg, const EsError *err)
{
	touch(err->what, strlen(err->what));
}

static void
look_at(File *f)
{
	EsSegment			*seg;
	EsRowBlock			*b = es_block_create();
	const EsSegmentInfo *info;
	EsError				 err;
	uint64_t			 hashes[8] = {0};

	if (es_segment_open(&seg, read_file, f, f->len, &err) != ES_OK)
	{
		es_block_free(b);
		return;
	}
	info = es_segment_info(seg);
	for (uint32_t z = 0; z < info->nzones; z++)
	{
		EsZoneInfo zone = es_segment_zone(seg, z);

		for (uint32_t half = 0; half < 2; half++)
		{
			uint64_t first = zone.first_row + half * (zone.nrows / 2);
			uint32_t n = zone.nrows - half * (zone.nrows / 2);

			if (es_segment_read(seg, first, n, NULL, 15, b, &err) != ES_OK)
				continue;
			for (uint32_t r = 0; r < n; r++)
			{
				for (int c = 0; c < info->ncols; c++)
				{
					const void *value = es_block_value(b, c, r);

					if (value != NULL)
						touch(value, info->columns[c].len > 0 ? (size_t) info->columns[c].len
															  : es_varlena_size(value));
				}
				sink =
					(uint8_t) (sink + es_block_position(b, r) + es_block_version(b, r) + es_block_fxid(b, r));
				if (es_block_content_hash(b, r) != NULL)
					touch(es_block_content_hash(b, r), 16);
			}
		}
		for (int c = 0; c < info->ncols; c++)
			sink = (uint8_t) (sink + es_segment_column_stats(seg, z, c).min);
	}
	es_segment_walk_contexts(seg, note_context, hashes, &err);
	for (int i = 0; i < 8; i++)
	{
		uint64_t first;
		uint64_t n;
		uint32_t entry;

		es_segment_find_context(seg, hashes[i], "abcd", 4, &first, &n, &entry, &err);
	}
	es_segment_verify(seg, note_damage, NULL);
	es_segment_close(seg);
	es_block_free(b);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const Base *base;
	File		file;

	if (bases[0].file.data == NULL)
	{
		make_base(&bases[0], 10, 3, true);
		make_base(&bases[1], 60, 1, false);
		make_base(&bases[2], 1500, 1, false);
		make_base(&bases[3], 1, 1, false);
	}
	if (size == 0)
		return 0;
	if (data[0] == 0xff)
	{
		file.data = (uint8_t *) data + 1;
		file.len = size - 1;
		look_at(&file);
		return 0;
	}

	base = &bases[data[0] % 16 == 2	 ? 2
				  : data[0] % 4 == 2 ? 0
									 : data[0] % NBASES]; /* the large one is slow */
	file.len = base->file.len;
	file.data = malloc(file.len);
	memcpy(file.data, base->file.data, file.len);
	for (size_t i = 1; i + 6 <= size; i += 6)
	{
		static const uint64_t interesting[8] = {0, 1, UINT64_MAX, 0x7fffffff, 0xffff, 8192, 0x80, 0xffffffff};
		uint32_t			  where = (uint32_t) (data[i] | data[i + 1] << 8 | data[i + 2] << 16);
		uint8_t				  op = data[i + 3];
		uint64_t			  v = interesting[data[i + 4] & 7];
		size_t				  width = (size_t) 1 << (data[i + 4] >> 3 & 3);
		size_t				  at;

		/* Most things to be wrong about are in the footer; headers of pages come next. */
		if (op & 0x80)
			at = base->pages[base->npages - 1] + where % (file.len - base->pages[base->npages - 1]);
		else if (op & 0x40)
			at = base->pages[where % base->npages] + (op & 0x3f) + data[i + 5] % 40u;
		else
			at = where % file.len;
		if (at + 8 > file.len)
			continue;
		if (op & 1)
			memcpy(file.data + at, &v, width);
		else
			file.data[at] = (uint8_t) (file.data[at] + data[i + 5]);
	}
	fix_crcs(base, file.data);
	look_at(&file);
	free(file.data);
	return 0;
}
