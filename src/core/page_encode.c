/*-------------------------------------------------------------------------
 *
 * page_encode.c
 *	  Writing side of page.h: choice of encoding, page boundaries, compression.
 *
 * Integers: the plan of intvec.h says how large the rest of the zone would be; if
 * that is more than a page, it is cut into equal parts.  A column of 8 bytes that
 * is expensive as integers is tried as doubles with few decimals.  The packed
 * form and one with whole bytes per value are compressed both; the smaller
 * stays.
 *
 * Others: plain and dictionary forms are filled side by side, row by row, until
 * neither takes more; the one that took more rows wins, for equal rows the smaller.
 * A dictionary whose values hardly repeat is given up early.
 *
 * Compression: what does not save a sixteenth is stored as it is, since reading it
 * is free.  With LZ4 and a Zstandard level both are tried, and Zstandard is
 * taken where it saves a quarter over LZ4: it decompresses at a third of the speed.
 *
 *-------------------------------------------------------------------------
 */
#include "core/page.h"

#include <lz4.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#define BUFFER_LEN	   (ES_PAGE_RAW_MAX + 1 + 1024)
#define DICT_SLOTS	   (2 * ES_ZONE_ROWS)
#define DICT_SAMPLE	   64 /* rows after which a dictionary must have paid */
#define DECIMAL_SAMPLE 32

struct EsPageEncoder
{
	EsCodec	   codec;
	int		   zstd_level;
	ZSTD_CCtx *zstd;
	void	  *lz4;
	size_t	   out_len;			   /* room in out[] */
	uint8_t	  *out[2];			   /* compressed: LZ4, Zstandard */
	uint8_t	  *kept;			   /* compressed packed integers, while whole bytes are tried */
	uint64_t   ints[ES_ZONE_ROWS]; /* values or entry numbers */
	uint64_t   scaled[ES_ZONE_ROWS];
	uint16_t   exceptions[ES_ZONE_ROWS];
	uint16_t   slots[DICT_SLOTS]; /* hash table of entry + 1 */
	uint32_t   entry_hash[ES_ZONE_ROWS];
	uint16_t   entry_start[ES_ZONE_ROWS];
	uint8_t	   plain[BUFFER_LEN];
	uint8_t	   dict[BUFFER_LEN];
	uint8_t	   raw[2][2 * BUFFER_LEN];
};

EsPageEncoder *
es_page_encoder_create(EsCodec codec, int zstd_level)
{
	EsPageEncoder *enc = calloc(1, sizeof(*enc));

	if (enc == NULL)
		return NULL;
	enc->codec = codec;
	enc->zstd_level = zstd_level;
	if (codec == ES_CODEC_ZSTD && zstd_level == 0)
		enc->zstd_level = 1;
	enc->out_len = 2 * BUFFER_LEN;
	enc->out[0] = malloc(enc->out_len);
	enc->out[1] = malloc(enc->out_len);
	enc->kept = malloc(enc->out_len);
	enc->lz4 = malloc((size_t) LZ4_sizeofState());
	if (codec == ES_CODEC_ZSTD || zstd_level != 0)
		enc->zstd = ZSTD_createCCtx();
	if (enc->out[0] == NULL || enc->out[1] == NULL || enc->kept == NULL || enc->lz4 == NULL ||
		((codec == ES_CODEC_ZSTD || zstd_level != 0) && enc->zstd == NULL))
	{
		es_page_encoder_free(enc);
		return NULL;
	}
	return enc;
}

void
es_page_encoder_free(EsPageEncoder *enc)
{
	if (enc == NULL)
		return;
	free(enc->out[0]);
	free(enc->out[1]);
	free(enc->kept);
	free(enc->lz4);
	ZSTD_freeCCtx(enc->zstd);
	free(enc);
}

/* ---- compression ---- */

EsStatus
es_page_compress(EsPageEncoder *enc, const void *raw, uint32_t raw_len, bool footer, EsEncodedPage *page)
{
	EsCodec codec = footer && enc->codec == ES_CODEC_ZSTD ? ES_CODEC_LZ4 : enc->codec;
	size_t	best = raw_len - raw_len / 16;

	page->codec = ES_CODEC_NONE;
	page->raw_len = raw_len;
	page->stored_len = raw_len;
	page->stored = raw;
	if (codec == ES_CODEC_NONE || raw_len < 32)
		return ES_OK;
	if (raw_len > enc->out_len) /* a footer */
	{
		for (int i = 0; i < 2; i++)
		{
			uint8_t *p = realloc(enc->out[i], raw_len);

			if (p == NULL)
				return ES_ERR_NOMEM;
			enc->out[i] = p;
		}
		enc->out_len = raw_len;
	}

	if (codec == ES_CODEC_LZ4 && raw_len <= LZ4_MAX_INPUT_SIZE)
	{
		int n = LZ4_compress_fast_extState(enc->lz4, raw, (char *) enc->out[0], (int) raw_len, (int) best, 1);

		if (n > 0 && (size_t) n < best)
		{
			best = (size_t) n;
			page->codec = ES_CODEC_LZ4;
			page->stored_len = (uint32_t) n;
			page->stored = enc->out[0];
		}
	}
	if (enc->zstd != NULL && !footer)
	{
		size_t n;

		if (codec == ES_CODEC_LZ4)
			best -= best / 4;
		n = ZSTD_compressCCtx(enc->zstd, enc->out[1], best, raw, raw_len, enc->zstd_level);
		if (!ZSTD_isError(n) && n < best)
		{
			page->codec = ES_CODEC_ZSTD;
			page->stored_len = (uint32_t) n;
			page->stored = enc->out[1];
		}
	}
	return ES_OK;
}

/*
 * Compresses the first len0 bytes of raw[0] and len1 of raw[1] (0 = there are
 * none), two forms of the same rows.  The second must be clearly smaller.
 */
static EsStatus
compress_smaller(EsPageEncoder *enc, uint32_t len0, uint32_t len1, EsEncodedPage *page)
{
	EsStatus	  status = es_page_compress(enc, enc->raw[0], len0, false, page);
	EsEncodedPage second = *page;

	if (status != ES_OK || len1 == 0)
		return status;
	if (page->codec != ES_CODEC_NONE)
	{
		memcpy(enc->kept, page->stored, page->stored_len);
		page->stored = enc->kept;
	}
	status = es_page_compress(enc, enc->raw[1], len1, false, &second);
	if (status == ES_OK && second.stored_len < page->stored_len - page->stored_len / 8)
		*page = second;
	return status;
}

/* ---- what all encodings share ---- */

static inline bool
source_null(const EsPageSource *s, uint32_t row)
{
	return s->nulls != NULL && ((s->nulls[row >> 3] >> (row & 7)) & 1) != 0;
}

static bool
any_null(const EsPageSource *s, uint32_t first, uint32_t n)
{
	if (s->nulls != NULL)
		for (uint32_t i = 0; i < n; i++)
			if (source_null(s, first + i))
				return true;
	return false;
}

/* Writes the null bitmap if there is any NULL; its bytes. */
static size_t
put_nulls(const EsPageSource *s, uint32_t first, uint32_t n, uint8_t *out)
{
	size_t len = ES_PAD8((n + 7) / 8);

	if (!any_null(s, first, n))
		return 0;
	memset(out, 0, len);
	for (uint32_t i = 0; i < n; i++)
		if (source_null(s, first + i))
			out[i >> 3] |= (uint8_t) (1 << (i & 7));
	return len;
}

/* ---- integers and decimals ---- */

/* Values as int64 to enc->ints; NULLs take the value before them. */
static void
gather_ints(EsPageEncoder *enc, const EsPageSource *s, uint32_t first, uint32_t n)
{
	const uint8_t *p = s->data + (size_t) first * (size_t) s->desc.len;
	uint64_t	  *v = enc->ints;

	switch (s->desc.len)
	{
		case 8:
			memcpy(v, p, 8 * (size_t) n);
			break;
		case 4:
			for (uint32_t i = 0; i < n; i++)
			{
				int32_t x;

				memcpy(&x, p + 4 * (size_t) i, 4);
				v[i] = (uint64_t) (int64_t) x;
			}
			break;
		case 2:
			for (uint32_t i = 0; i < n; i++)
			{
				int16_t x;

				memcpy(&x, p + 2 * (size_t) i, 2);
				v[i] = (uint64_t) (int64_t) x;
			}
			break;
		default:
			for (uint32_t i = 0; i < n; i++)
				v[i] = (uint64_t) (int64_t) (int8_t) p[i];
			break;
	}
	if (s->nulls != NULL)
	{
		uint32_t i = 0;

		while (i < n && source_null(s, first + i))
			i++;
		for (uint32_t j = 0; j < i; j++)
			v[j] = i < n ? v[i] : 0;
		for (; i < n; i++)
			if (source_null(s, first + i))
				v[i] = v[i - 1];
	}
}

/* Is the double with these bits an integer / 10^exponent? */
static inline bool
as_decimal(uint64_t bits, double power, uint64_t *scaled)
{
	double	x;
	double	scaled_x;
	int64_t i;

	memcpy(&x, &bits, sizeof(x));
	scaled_x = x * power;
	if (!(fabs(scaled_x) < 1e15))
		return false;
	i = llrint(scaled_x);
	scaled_x = (double) i / power;
	*scaled = (uint64_t) i;
	return memcmp(&scaled_x, &x, sizeof(x)) == 0;
}

/*
 * Tries enc->ints as doubles: enc->scaled, the rows that are none in
 * enc->exceptions.  false if it is not worth while.
 */
static bool
gather_decimals(EsPageEncoder *enc, uint32_t n, uint32_t *exponent, uint32_t *nexceptions)
{
	uint32_t step = n / DECIMAL_SAMPLE + 1;
	uint32_t best_hits = 0;
	uint32_t samples = 0;
	double	 power = 1;
	uint64_t last = 0;
	uint64_t scaled;

	for (uint32_t e = 0; e <= ES_DECIMAL_MAX; e++)
	{
		uint32_t hits = 0;

		samples = 0;
		for (uint32_t i = 0; i < n; i += step, samples++)
			hits += as_decimal(enc->ints[i], power, &scaled);
		if (hits > best_hits)
		{
			best_hits = hits;
			*exponent = e;
		}
		power *= 10;
	}
	if (best_hits < samples - samples / 8)
		return false;

	power = 1;
	for (uint32_t e = 0; e < *exponent; e++)
		power *= 10;
	*nexceptions = 0;
	for (uint32_t i = 0; i < n; i++)
	{
		if (as_decimal(enc->ints[i], power, &scaled))
			last = scaled;
		else
		{
			if (*nexceptions > n / 8)
				return false;
			enc->exceptions[(*nexceptions)++] = (uint16_t) i;
		}
		enc->scaled[i] = last;
	}
	return true;
}

static uint32_t
exceptions_below(const EsPageEncoder *enc, uint32_t nexceptions, uint32_t n)
{
	while (nexceptions > 0 && enc->exceptions[nexceptions - 1] >= n)
		nexceptions--;
	return nexceptions;
}

static size_t
decimal_size(uint32_t nexceptions)
{
	return sizeof(EsDecimalHeader) + ES_PAD8(2 * (size_t) nexceptions) + 8 * (size_t) nexceptions;
}

static uint32_t
write_ints(EsPageEncoder *enc, const EsPageSource *s, uint32_t first, const EsIntVecPlan *plan, bool decimal,
		   uint32_t exponent, uint32_t nexceptions, uint8_t *out)
{
	uint8_t *pos = out + put_nulls(s, first, plan->n, out);

	if (decimal)
	{
		EsDecimalHeader h = {exponent, nexceptions};

		memset(pos, 0, decimal_size(nexceptions));
		memcpy(pos, &h, sizeof(h));
		pos += sizeof(h);
		memcpy(pos, enc->exceptions, 2 * (size_t) nexceptions);
		pos += ES_PAD8(2 * (size_t) nexceptions);
		for (uint32_t i = 0; i < nexceptions; i++, pos += 8)
			memcpy(pos, &enc->ints[enc->exceptions[i]], 8);
	}
	es_intvec_encode(decimal ? enc->scaled : enc->ints, plan, pos);
	return (uint32_t) (pos - out + plan->size);
}

static EsStatus
encode_ints(EsPageEncoder *enc, const EsPageSource *s, uint32_t first, uint32_t end, EsEncodedPage *page)
{
	uint32_t	 n = end - first;
	uint32_t	 exponent = 0;
	uint32_t	 nexceptions = 0;
	bool		 decimal = false;
	size_t		 extra = s->nulls ? ES_PAD8((n + 7) / 8) : 0;
	EsIntVecPlan plan;
	uint32_t	 raw_len;
	uint32_t	 bytes_len = 0;

	gather_ints(enc, s, first, n);
	es_intvec_plan(enc->ints, n, false, &plan);
	if (s->desc.len == 8 && plan.size / 2 > n && gather_decimals(enc, n, &exponent, &nexceptions))
	{
		EsIntVecPlan other;

		es_intvec_plan(enc->scaled, n, false, &other);
		if (other.size + decimal_size(nexceptions) < plan.size - plan.size / 8)
		{
			decimal = true;
			plan = other;
		}
	}

	for (;;)
	{
		size_t	 size = extra + plan.size + (decimal ? decimal_size(nexceptions) : 0);
		uint32_t parts;

		if (size <= ES_PAGE_RAW || n == 1)
			break;
		parts = (uint32_t) (size / ES_PAGE_RAW + 1);
		n = parts > 1 && n == end - first ? (n + parts - 1) / parts : n - (n + 7) / 8;
		nexceptions = exceptions_below(enc, nexceptions, n);
		es_intvec_plan(decimal ? enc->scaled : enc->ints, n, false, &plan);
	}

	page->nrows = n;
	page->encoding = (uint8_t) ((decimal ? ES_ENCODING_DECIMAL : ES_ENCODING_INTS) |
								(any_null(s, first, n) ? ES_PAGE_HAS_NULLS : 0));
	raw_len = write_ints(enc, s, first, &plan, decimal, exponent, nexceptions, enc->raw[0]);
	if (plan.header.width % 8 != 0 && enc->codec != ES_CODEC_NONE)
	{
		es_intvec_plan(decimal ? enc->scaled : enc->ints, n, true, &plan);
		if (plan.size + extra + decimal_size(nexceptions) <= ES_PAGE_RAW_MAX)
			bytes_len = write_ints(enc, s, first, &plan, decimal, exponent, nexceptions, enc->raw[1]);
	}
	return compress_smaller(enc, raw_len, bytes_len, page);
}

/* ---- values that are not integers ---- */

static inline uint32_t
hash_value(const uint8_t *p, uint32_t len)
{
	uint64_t h = len * UINT64_C(0x9e3779b97f4a7c15);
	uint64_t v;

	for (; len >= 8; p += 8, len -= 8)
	{
		memcpy(&v, p, 8);
		h = (h ^ v) * UINT64_C(0xff51afd7ed558ccd);
		h ^= h >> 32;
	}
	v = 0;
	memcpy(&v, p, len);
	h = (h ^ v) * UINT64_C(0xc4ceb9fe1a85ec53);
	return (uint32_t) (h >> 32);
}

/* Where a value of this size goes behind pos. */
static inline uint32_t
value_place(const EsColumnDesc *desc, const uint8_t *value, uint32_t pos)
{
	if (desc->len < 0 && (value[0] & 0x01) != 0)
		return pos;
	return (pos + desc->align - 1) & ~((uint32_t) desc->align - 1);
}

/* Appends a value; false if it does not fit below limit. */
static bool
append_value(const EsColumnDesc *desc, const uint8_t *value, uint32_t size, uint32_t limit, uint8_t *out,
			 uint32_t *pos)
{
	uint32_t place = value_place(desc, value, *pos);
	uint32_t stop = place + (desc->len > 0 ? es_page_stride(desc) : size);

	if (stop > limit)
		return false;
	memset(out + *pos, 0, place - *pos);
	memcpy(out + place, value, size);
	memset(out + place + size, 0, stop - place - size);
	*pos = stop;
	return true;
}

typedef struct Dictionary
{
	uint32_t nentries;
	uint32_t used; /* bytes of entries */
	uint32_t nruns;
	uint32_t rows;
	bool	 alive;
} Dictionary;

static inline uint32_t
bits_of(uint32_t n)
{
	return n <= 1 ? 0 : 32 - (uint32_t) __builtin_clz(n - 1);
}

/* Raw bytes of a dictionary page without its null bitmap, about. */
static uint32_t
dict_size(const Dictionary *d, uint32_t rows)
{
	uint32_t bits = bits_of(d->nentries);
	uint32_t packed = (rows * bits + 7) / 8;
	uint32_t runs = d->nruns * 2 + (d->nruns * bits + 7) / 8;

	return d->used + (runs < packed ? runs : packed) + 48;
}

/* Enters a value; false if the page is full. */
static bool
dict_add(EsPageEncoder *enc, Dictionary *d, const EsColumnDesc *desc, const uint8_t *value, uint32_t size,
		 uint32_t row, uint32_t limit)
{
	uint32_t hash = hash_value(value, size);
	uint32_t slot = hash % DICT_SLOTS;
	uint32_t entry;

	for (; enc->slots[slot] != 0; slot = (slot + 1) % DICT_SLOTS)
	{
		const uint8_t *other;

		entry = enc->slots[slot] - 1u;
		other = enc->dict + enc->entry_start[entry];
		if (enc->entry_hash[entry] == hash &&
			(desc->len > 0 || (((other[0] ^ value[0]) & 0x01) == 0 && es_page_varlena_size(other) == size)) &&
			memcmp(other, value, size) == 0)
			break;
	}
	if (enc->slots[slot] == 0)
	{
		uint32_t place = value_place(desc, value, d->used);

		entry = d->nentries;
		if (!append_value(desc, value, size, limit, enc->dict, &d->used))
			return false;
		enc->slots[slot] = (uint16_t) (entry + 1);
		enc->entry_hash[entry] = hash;
		enc->entry_start[entry] = (uint16_t) place;
		d->nentries++;
	}
	else
		entry = enc->slots[slot] - 1u;
	if (row == 0 || enc->ints[row - 1] != entry)
		d->nruns++;
	enc->ints[row] = entry;
	return true;
}

static uint32_t
write_dict(EsPageEncoder *enc, const EsPageSource *s, uint32_t first, const Dictionary *d,
		   const EsIntVecPlan *plan, uint8_t *out)
{
	uint8_t *pos = out + put_nulls(s, first, plan->n, out);
	uint32_t head[2] = {d->nentries, (uint32_t) ES_PAD8(d->used)};

	memcpy(pos, head, sizeof(head));
	pos += sizeof(head);
	memcpy(pos, enc->dict, d->used);
	memset(pos + d->used, 0, head[1] - d->used);
	pos += head[1];
	es_intvec_encode(enc->ints, plan, pos);
	return (uint32_t) (pos - out + plan->size);
}

static EsStatus
encode_values(EsPageEncoder *enc, const EsPageSource *s, uint32_t first, uint32_t end, EsEncodedPage *page)
{
	const EsColumnDesc *desc = &s->desc;
	Dictionary			dict = {.alive = true};
	uint32_t			plain_pos = 0;
	uint32_t			plain_rows = 0;
	bool				plain_alive = true;
	uint32_t			n = end - first;
	const uint8_t	   *prev = NULL;
	uint32_t			prev_size = 0;
	uint32_t			raw_len;

	memset(enc->slots, 0, sizeof(enc->slots));
	for (uint32_t i = 0; i < n && (plain_alive || dict.alive); i++)
	{
		uint32_t	   row = first + i;
		uint32_t	   nulls = s->nulls ? (uint32_t) ES_PAD8(i / 8 + 1) : 0;
		uint32_t	   limit;
		const uint8_t *value;
		uint32_t	   size;

		/* One value alone may take more than a page's worth. */
		limit = i == 0 ? ES_PAGE_RAW_MAX - 1024 : ES_PAGE_RAW - nulls;
		if (source_null(s, row))
		{
			enc->ints[i] = i == 0 ? 0 : enc->ints[i - 1];
			if (plain_alive && desc->len > 0)
			{
				if (plain_pos + es_page_stride(desc) > limit)
					plain_alive = false;
				else
				{
					memset(enc->plain + plain_pos, 0, es_page_stride(desc));
					plain_pos += es_page_stride(desc);
				}
			}
			plain_rows += plain_alive;
			dict.rows += dict.alive;
			continue;
		}

		value = s->data + (desc->len > 0 ? (size_t) row * (size_t) desc->len : s->offsets[row]);
		size = desc->len > 0 ? (uint32_t) desc->len : es_page_varlena_size(value);
		if (plain_alive)
		{
			plain_alive = append_value(desc, value, size, limit, enc->plain, &plain_pos);
			plain_rows += plain_alive;
		}
		if (dict.alive)
		{
			Dictionary before = dict;

			if (prev != NULL && prev_size == size && memcmp(prev, value, size) == 0)
				enc->ints[i] = enc->ints[i - 1];
			else
				dict.alive = dict_add(enc, &dict, desc, value, size, i, limit);
			if (i > 0 && dict_size(&dict, i + 1) > limit)
				dict.alive = false;
			if (!dict.alive)
			{
				dict = before;
				dict.alive = false;
			}
			else if (i >= DICT_SAMPLE && dict.nentries > i - i / 4)
			{
				dict.alive = false;
				dict.rows = 0;
			}
			dict.rows += dict.alive;
			prev = value;
			prev_size = size;
		}
	}

	if (dict.rows > plain_rows || (dict.rows == plain_rows && dict_size(&dict, dict.rows) < plain_pos))
	{
		EsIntVecPlan plan;
		uint32_t	 bytes_len = 0;

		page->nrows = n = dict.rows;
		page->encoding = (uint8_t) (ES_ENCODING_DICTIONARY | (any_null(s, first, n) ? ES_PAGE_HAS_NULLS : 0));
		es_intvec_plan(enc->ints, n, false, &plan);
		raw_len = write_dict(enc, s, first, &dict, &plan, enc->raw[0]);
		if (plan.header.width % 8 != 0 && enc->codec != ES_CODEC_NONE)
		{
			es_intvec_plan(enc->ints, n, true, &plan);
			bytes_len = write_dict(enc, s, first, &dict, &plan, enc->raw[1]);
		}
		return compress_smaller(enc, raw_len, bytes_len, page);
	}

	page->nrows = plain_rows;
	page->encoding = (uint8_t) (ES_ENCODING_PLAIN | (any_null(s, first, plain_rows) ? ES_PAGE_HAS_NULLS : 0));
	raw_len = (uint32_t) put_nulls(s, first, plain_rows, enc->raw[0]);
	memcpy(enc->raw[0] + raw_len, enc->plain, plain_pos);
	return es_page_compress(enc, enc->raw[0], raw_len + plain_pos, false, page);
}

EsStatus
es_page_encode(EsPageEncoder *enc, const EsPageSource *source, uint32_t first, uint32_t end,
			   EsEncodedPage *page)
{
	if (es_page_is_int(&source->desc))
		return encode_ints(enc, source, first, end, page);
	return encode_values(enc, source, first, end, page);
}
