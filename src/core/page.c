/*-------------------------------------------------------------------------
 *
 * page.c
 *	  Reading side of page.h: check, decompress, decode.
 *
 * A decoded page is one allocation: the struct, the raw bytes, and for varlenas
 * the uint16 starts that the walk over the values finds.  Values are handed
 * out as pointers into it.  The walk checks every length, so the accessors
 * need no checks but one: entry numbers of a dictionary are compared when used.
 *
 *-------------------------------------------------------------------------
 */
#include "core/page.h"

#include <lz4.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

/* Raw bytes per stored byte: LZ4 cannot do more. */
#define LZ4_MAX_RATIO 255

static uint32_t
page_crc(const EsPageHeader *header, const void *stored, size_t stored_len, uint64_t segment_id,
		 uint64_t offset)
{
	EsPageHeader h = *header;
	uint64_t	 place[2] = {segment_id, offset};
	uint32_t	 crc;

	h.crc = 0;
	crc = es_crc32c(0, place, sizeof(place));
	crc = es_crc32c(crc, &h, sizeof(h));
	return es_crc32c(crc, stored, stored_len);
}

void
es_page_seal(EsPageHeader *header, const void *stored, uint64_t segment_id, uint64_t offset)
{
	header->crc = page_crc(header, stored, header->stored_len, segment_id, offset);
}

EsStatus
es_page_check(const uint8_t *buf, size_t len, EsPageKind kind, uint64_t segment_id, uint64_t offset,
			  EsPageHeader *header, EsError *err)
{
	EsPageHeader h;
	uint32_t	 crc;
	int			 codec;

	if (len < sizeof(h))
		return es_fail(err, ES_ERR_CORRUPT, offset, "page of %zu bytes is shorter than its header", len);
	memcpy(&h, buf, sizeof(h));

	/* The length is the caller's: a damaged one must not lead the CRC astray. */
	crc = page_crc(&h, buf + sizeof(h), len - sizeof(h), segment_id, offset);
	if (crc != h.crc)
		return es_fail_crc(err, offset, h.crc, crc, "segment page");
	if (h.stored_len != len - sizeof(h))
		return es_fail(err, ES_ERR_CORRUPT, offset, "segment page has %u bytes where %zu belong",
					   h.stored_len, len - sizeof(h));

	codec = h.kind_codec & 0x0f;
	if (h.kind_codec >> 4 != (int) kind)
		return es_fail(err, ES_ERR_CORRUPT, offset, "segment page has kind %d where %d belongs",
					   h.kind_codec >> 4, (int) kind);
	if (codec == ES_CODEC_NONE	? h.raw_len != h.stored_len
		: codec == ES_CODEC_LZ4 ? h.raw_len / LZ4_MAX_RATIO > h.stored_len
								: codec != ES_CODEC_ZSTD || kind == ES_PAGE_FOOTER)
		return es_fail(err, ES_ERR_CORRUPT, offset,
					   "segment page with codec %d claims %u raw bytes in %u stored", codec, h.raw_len,
					   h.stored_len);
	if (kind != ES_PAGE_FOOTER && h.raw_len > ES_PAGE_RAW_MAX)
		return es_fail(err, ES_ERR_CORRUPT, offset, "segment page claims %u raw bytes", h.raw_len);
	*header = h;
	return ES_OK;
}

void
es_page_decoder_free(EsPageDecoder *d)
{
	ZSTD_freeDCtx(d->zstd);
	d->zstd = NULL;
}

EsStatus
es_page_decompress(EsPageDecoder *d, const EsPageHeader *h, const uint8_t *stored, void *raw, uint64_t offset,
				   EsError *err)
{
	switch (h->kind_codec & 0x0f)
	{
		case ES_CODEC_NONE:
			memcpy(raw, stored, h->raw_len);
			return ES_OK;

		case ES_CODEC_LZ4:
			if (h->raw_len <= LZ4_MAX_INPUT_SIZE && h->stored_len <= INT32_MAX &&
				LZ4_decompress_safe((const char *) stored, raw, (int) h->stored_len, (int) h->raw_len) ==
					(int) h->raw_len)
				return ES_OK;
			return es_fail(err, ES_ERR_CORRUPT, offset, "segment page does not decompress with LZ4");

		default:
			if (d->zstd == NULL && (d->zstd = ZSTD_createDCtx()) == NULL)
				return es_fail(err, ES_ERR_NOMEM, offset, "out of memory for a Zstandard context");
			if (ZSTD_decompressDCtx(d->zstd, raw, h->raw_len, stored, h->stored_len) == h->raw_len)
				return ES_OK;
			return es_fail(err, ES_ERR_CORRUPT, offset, "segment page does not decompress with Zstandard");
	}
}

/*
 * Finds where the varlenas in values[0..len) begin: one for each row that is not
 * NULL (nulls may be NULL).  false if they do not fit.
 */
static bool
walk_varlenas(EsPage *p, const uint8_t *values, uint32_t len, uint32_t n, const uint8_t *nulls,
			  uint16_t *starts)
{
	uint32_t align = p->desc.align;
	uint32_t pos = 0;

	for (uint32_t i = 0; i < n; i++)
	{
		uint32_t size;
		uint8_t	 first;

		starts[i] = 0;
		if (nulls != NULL && (nulls[i >> 3] >> (i & 7) & 1) != 0)
			continue;
		if (pos >= len)
			return false;
		first = values[pos];
		if (first == ES_OVERFLOW_MARKER)
		{
			size = sizeof(EsOverflowRef);
			p->has_overflow = true;
		}
		else if (first & 0x01)
			size = first >> 1;
		else
		{
			pos = (pos + align - 1) & ~(align - 1);
			if (pos > len || len - pos < 4 || (values[pos] & 0x03) != 0)
				return false;
			size = es_page_varlena_size(values + pos);
			if (size < 4)
				return false;
		}
		if (size > len - pos)
			return false;
		starts[i] = (uint16_t) pos;
		pos += size;
	}
	return true;
}

/* Where things of a data page lie; p->raw is decompressed. */
static bool
decode_data(EsPage *p, uint16_t *starts)
{
	const uint8_t *pos = p->nulls ? p->nulls + ES_PAD8((p->nrows + 7) / 8) : p->raw;
	size_t		   left = p->raw_len - (size_t) (pos - p->raw);
	bool		   is_int = es_page_is_int(&p->desc);
	uint32_t	   n = p->nrows;

	if (p->encoding == ES_ENCODING_INTS && is_int)
		return es_intvec_open(&p->ints, pos, left, n) && p->ints.size == left;

	if (p->encoding == ES_ENCODING_DECIMAL && p->desc.len == 8)
	{
		EsDecimalHeader h;
		size_t			rows_len;
		uint32_t		prev = 0;

		if (left < sizeof(h))
			return false;
		memcpy(&h, pos, sizeof(h));
		if (h.exponent > ES_DECIMAL_MAX || h.nexceptions > n)
			return false;
		pos += sizeof(h);
		left -= sizeof(h);
		rows_len = ES_PAD8(2 * (size_t) h.nexceptions);
		if (rows_len + 8 * (size_t) h.nexceptions > left)
			return false;
		p->exponent = h.exponent;
		p->nentries = h.nexceptions;
		p->exceptions = pos;
		p->values = pos + rows_len;
		for (uint32_t i = 0; i < h.nexceptions; i++)
		{
			uint16_t row;

			memcpy(&row, p->exceptions + 2 * (size_t) i, 2);
			if (row >= n || (i > 0 && row <= prev))
				return false;
			prev = row;
		}
		pos += rows_len + 8 * (size_t) h.nexceptions;
		left -= rows_len + 8 * (size_t) h.nexceptions;
		return es_intvec_open(&p->ints, pos, left, n) && p->ints.size == left;
	}

	if (is_int)
		return false;

	if (p->encoding == ES_ENCODING_PLAIN)
	{
		p->values = pos;
		if (p->desc.len > 0)
			return left == (size_t) n * es_page_stride(&p->desc);
		p->starts = starts;
		return walk_varlenas(p, pos, (uint32_t) left, n, p->nulls, starts);
	}

	if (p->encoding == ES_ENCODING_DICTIONARY)
	{
		uint32_t head[2];

		if (left < sizeof(head))
			return false;
		memcpy(head, pos, sizeof(head));
		pos += sizeof(head);
		left -= sizeof(head);
		if (head[0] > n || head[1] > left || head[1] % 8 != 0)
			return false;
		p->nentries = head[0];
		p->values = pos;
		if (p->desc.len > 0)
		{
			if ((size_t) head[0] * es_page_stride(&p->desc) > head[1])
				return false;
		}
		else
		{
			p->starts = starts;
			if (!walk_varlenas(p, pos, head[1], head[0], NULL, starts))
				return false;
		}
		pos += head[1];
		left -= head[1];
		return es_intvec_open(&p->ints, pos, left, n) && p->ints.size == left;
	}
	return false;
}

EsStatus
es_page_decode(EsPageDecoder *d, const EsPageHeader *h, const uint8_t *stored, const EsColumnDesc *desc,
			   uint64_t offset, EsPage **page, EsError *err)
{
	bool	 has_nulls = desc != NULL && (h->encoding & ES_PAGE_HAS_NULLS) != 0;
	size_t	 head = (sizeof(EsPage) + 15) & ~(size_t) 15;
	size_t	 raw_room = ES_PAD8((size_t) h->raw_len + ES_INTVEC_SLACK);
	size_t	 memory = head + raw_room;
	bool	 ok;
	EsPage	*p;
	uint8_t *raw;
	EsStatus status;

	*page = NULL;
	if (desc != NULL && desc->len < 0)
		memory += sizeof(uint16_t) * (size_t) h->nrows;
	if (has_nulls && ES_PAD8((h->nrows + 7) / 8) > h->raw_len)
		return es_fail(err, ES_ERR_CORRUPT, offset, "segment page has no room for its null bitmap");
	p = aligned_alloc(16, (memory + 15) & ~(size_t) 15);
	if (p == NULL)
		return es_fail(err, ES_ERR_NOMEM, offset, "out of memory for a page of %zu bytes", memory);

	memset(p, 0, sizeof(*p));
	raw = (uint8_t *) p + head;
	p->refs = 1;
	p->raw_len = h->raw_len;
	p->memory = memory;
	p->offset = offset;
	p->zone = h->zone;
	p->first_row = h->first_row;
	p->nrows = h->nrows;
	p->column = h->column;
	p->kind = h->kind_codec >> 4;
	p->encoding = h->encoding & ES_PAGE_ENCODING;
	p->raw = raw;
	if (has_nulls)
		p->nulls = raw;
	if (desc != NULL)
		p->desc = *desc;
	memset(raw + h->raw_len, 0, raw_room - h->raw_len);

	status = es_page_decompress(d, h, stored, raw, offset, err);
	if (status != ES_OK)
	{
		free(p);
		return status;
	}
	if (desc != NULL)
		ok = decode_data(p, (uint16_t *) (raw + raw_room));
	else if (h->kind_codec >> 4 == ES_PAGE_INDEX)
		ok = h->nrows > 0 && es_intvec_open(&p->ints, raw, h->raw_len, h->nrows) &&
			 es_intvec_open(&p->rows, raw + p->ints.size, h->raw_len - p->ints.size, h->nrows);
	else
		ok = h->raw_len > 0 && h->raw_len % 32 == 0;
	if (!ok)
	{
		free(p);
		return es_fail(err, ES_ERR_CORRUPT, offset,
					   "segment page with encoding %d and %u rows has a wrong structure", h->encoding,
					   h->nrows);
	}
	*page = p;
	return ES_OK;
}

void
es_page_unref(EsPage *p)
{
	if (--p->refs == 0)
		free(p);
}

/* ---- values ---- */

static void
decimals(const EsPage *p, uint32_t first, uint32_t n, uint64_t *v)
{
	static const double powers[ES_DECIMAL_MAX + 1] = {1, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6};
	double				divisor = powers[p->exponent];

	for (uint32_t i = 0; i < n; i++)
	{
		double x = (double) (int64_t) v[i] / divisor;

		memcpy(&v[i], &x, sizeof(x));
	}
	for (uint32_t e = 0; e < p->nentries; e++)
	{
		uint16_t row;

		memcpy(&row, p->exceptions + 2 * (size_t) e, 2);
		if (row >= first && row < first + n)
			memcpy(&v[row - first], p->values + 8 * (size_t) e, 8);
	}
}

void
es_page_ints(const EsPage *p, uint32_t first, uint32_t n, uint32_t stride, uint8_t *out)
{
	uint64_t v[512];

	while (n > 0)
	{
		uint32_t count = n < 512 ? n : 512;

		es_intvec_decode(&p->ints, first, count, v);
		if (p->encoding == ES_ENCODING_DECIMAL)
			decimals(p, first, count, v);
		if (stride == (uint32_t) p->desc.len && stride == 8)
			memcpy(out, v, 8 * (size_t) count);
		else if (stride == (uint32_t) p->desc.len && stride == 4)
			for (uint32_t i = 0; i < count; i++)
			{
				uint32_t x = (uint32_t) v[i];

				memcpy(out + 4 * (size_t) i, &x, 4);
			}
		else
			for (uint32_t i = 0; i < count; i++)
				memcpy(out + (size_t) i * stride, &v[i], (size_t) p->desc.len); /* little-endian */
		first += count;
		n -= count;
		out += (size_t) count * stride;
	}
}

/* Entry numbers become pointers; those of NULL rows may be anything. */
static bool
dictionary_pointers(const EsPage *p, uint32_t first, uint32_t n, const void **out)
{
	uint32_t stride = p->desc.len > 0 ? es_page_stride(&p->desc) : 0;
	uint64_t entry[512];

	while (n > 0)
	{
		uint32_t count = n < 512 ? n : 512;

		es_intvec_decode(&p->ints, first, count, entry);
		for (uint32_t i = 0; i < count; i++)
		{
			if (entry[i] < p->nentries)
				out[i] = p->values + (stride ? entry[i] * stride : p->starts[entry[i]]);
			else if (!es_page_is_null(p, first + i))
				return false;
		}
		first += count;
		n -= count;
		out += count;
	}
	return true;
}

bool
es_page_pointers(const EsPage *p, uint32_t first, uint32_t n, const void **out)
{
	if (p->encoding == ES_ENCODING_DICTIONARY)
	{
		if (!dictionary_pointers(p, first, n, out))
			return false;
	}
	else if (p->desc.len > 0)
	{
		uint32_t stride = es_page_stride(&p->desc);

		for (uint32_t i = 0; i < n; i++)
			out[i] = p->values + (size_t) (first + i) * stride;
	}
	else
		for (uint32_t i = 0; i < n; i++)
			out[i] = p->values + p->starts[first + i];

	if (p->nulls != NULL)
		for (uint32_t i = 0; i < n; i++)
			if (es_page_is_null(p, first + i))
				out[i] = NULL;
	return true;
}
