/*
 * Pages from hostile bytes: either a page is decoded from the input as it is, and all its values
 * looked at, or a column is made from the input, and must come back from its pages.
 */
#include <stdlib.h>
#include <string.h>

#include "core/page.h"

extern int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const EsColumnDesc shapes[] = {{8, 8, ES_COLUMN_BYVAL},
									  {4, 4, ES_COLUMN_BYVAL},
									  {2, 2, ES_COLUMN_BYVAL},
									  {1, 1, ES_COLUMN_BYVAL},
									  {16, 1, 0},
									  {12, 8, 0},
									  {3, 1, 0},
									  {-1, 4, 0},
									  {-1, 8, 0},
									  {-1, 1, 0}};

#define NSHAPES (sizeof(shapes) / sizeof(shapes[0]))

static volatile uint8_t sink;

static void
touch(const void *value, size_t len)
{
	const uint8_t *p = value;

	for (size_t i = 0; i < len; i++)
		sink = (uint8_t) (sink + p[i]);
}

/* Looks at every value, in one go and from the middle on. */
static void
look_at(const EsPage *p)
{
	for (uint32_t first = 0; first < p->nrows; first += p->nrows / 2 + 1)
	{
		uint32_t n = p->nrows - first;

		if (es_page_is_int(&p->desc))
		{
			uint8_t *ints = malloc((size_t) n * (size_t) p->desc.len);

			es_page_ints(p, first, n, (uint32_t) p->desc.len, ints);
			touch(ints, (size_t) n * (size_t) p->desc.len);
			free(ints);
		}
		else
		{
			const void **pointers = malloc(n * sizeof(void *));

			if (es_page_pointers(p, first, n, pointers))
				for (uint32_t i = 0; i < n; i++)
					if (pointers[i] != NULL)
						touch(pointers[i],
							  p->desc.len > 0 ? (size_t) p->desc.len : es_page_varlena_size(pointers[i]));
			free(pointers);
		}
	}
}

static void
decode(const uint8_t *data, size_t size)
{
	static EsPageDecoder dec;
	EsPageHeader		 h = {0};
	EsPage				*p;
	EsError				 err;
	uint8_t				*stored;

	if (size < 8)
		return;
	es_page_check(data, size, (EsPageKind) (data[0] % 5), 1, 2, &h, &err);
	memset(&h, 0, sizeof(h));
	h.kind_codec = (uint8_t) ((data[1] & 0x30) | (data[1] & 0x03) % 3);
	h.encoding = data[2];
	h.nrows = (uint16_t) (data[3] | data[4] << 8);
	h.raw_len = (uint32_t) (data[5] | data[6] << 8);
	h.stored_len = (uint32_t) (size - 8);
	if ((h.kind_codec & 0x0f) == ES_CODEC_NONE)
		h.raw_len = h.stored_len;
	if (h.raw_len > ES_PAGE_RAW_MAX)
		return;
	stored = malloc(size - 8 + 1);
	memcpy(stored, data + 8, size - 8);
	if (es_page_decode(&dec, &h, stored, h.kind_codec >> 4 ? NULL : &shapes[data[7] % NSHAPES], 0, &p,
					   &err) == ES_OK)
	{
		if (h.kind_codec >> 4 == ES_PAGE_DATA)
			look_at(p);
		else if (h.kind_codec >> 4 == ES_PAGE_INDEX)
			for (uint32_t i = 0; i < p->ints.n; i++)
				sink = (uint8_t) (sink + es_intvec_get(&p->ints, i) + es_intvec_get(&p->rows, i));
		es_page_unref(p);
	}
	free(stored);
}

#define REQUIRE(c)   \
	do               \
	{                \
		if (!(c))    \
			abort(); \
	} while (0)

static void
round_trip(const uint8_t *data, size_t size)
{
	static EsPageDecoder  dec;
	EsColumnDesc		  desc = shapes[data[0] % NSHAPES];
	static EsPageEncoder *encoders[6];
	EsPageEncoder		**enc = &encoders[data[1] % 6];
	uint32_t			  n = 0;
	static uint8_t		  nulls[ES_ZONE_ROWS / 8];
	static uint32_t		  offsets[ES_ZONE_ROWS];
	static uint8_t		  values[ES_ZONE_ROWS * 256];
	size_t				  used = 0;
	bool				  any = false;
	EsPageSource		  source = {.desc = desc, .data = values, .offsets = offsets};

	if (*enc == NULL)
		*enc = es_page_encoder_create((EsCodec) (data[1] % 3), data[1] % 6 >= 3);
	memset(nulls, 0, sizeof(nulls));
	/* Each row: a byte that says NULL, again, or how many bytes follow. */
	for (size_t pos = 2; pos < size && n < ES_ZONE_ROWS;)
	{
		uint8_t	 what = data[pos++];
		uint32_t repeat = what >= 250 ? 1u << (what - 244) : 1;

		for (; repeat > 0 && n < ES_ZONE_ROWS; repeat--, n++)
		{
			size_t len = desc.len > 0 ? (size_t) desc.len : what % 160u;
			size_t have = size - pos < len ? size - pos : len; /* the rest is as it is */

			if (what < 20)
			{
				nulls[n >> 3] |= (uint8_t) (1 << (n & 7));
				any = true;
				memset(values + used, 0, desc.len > 0 ? (size_t) desc.len : 0);
				used += desc.len > 0 ? (size_t) desc.len : 0;
				continue;
			}
			offsets[n] = (uint32_t) used;
			if (desc.len < 0 && len <= 126)
				values[used++] = (uint8_t) ((len + 1) << 1 | 1);
			else if (desc.len < 0)
			{
				uint32_t header = (uint32_t) (len + 4) << 2;

				memcpy(values + used, &header, 4);
				used += 4;
			}
			memcpy(values + used, data + pos, have);
			used += len;
			if (repeat == 1)
				pos += have;
		}
	}
	if (any)
		source.nulls = nulls;

	for (uint32_t row = 0; row < n;)
	{
		EsEncodedPage page;
		EsPageHeader  h = {0};
		EsPage		 *p;
		uint8_t		 *stored;

		REQUIRE(es_page_encode(*enc, &source, row, n, &page) == ES_OK);
		REQUIRE(page.nrows > 0 && page.nrows <= n - row && page.raw_len <= ES_PAGE_RAW_MAX);
		h.stored_len = page.stored_len;
		h.raw_len = page.raw_len;
		h.nrows = (uint16_t) page.nrows;
		h.kind_codec = page.codec;
		h.encoding = page.encoding;
		stored = malloc(page.stored_len);
		memcpy(stored, page.stored, page.stored_len);
		REQUIRE(es_page_decode(&dec, &h, stored, &desc, 0, &p, NULL) == ES_OK);
		for (uint32_t i = 0; i < page.nrows; i++)
		{
			bool		   null = (nulls[(row + i) >> 3] >> ((row + i) & 7)) & 1;
			const uint8_t *model =
				values + (desc.len > 0 ? (size_t) (row + i) * (size_t) desc.len : offsets[row + i]);
			uint8_t		number[8];
			const void *value = number;

			REQUIRE(es_page_is_null(p, i) == null);
			if (es_page_is_int(&desc))
				es_page_ints(p, i, 1, (uint32_t) desc.len, number);
			else
				REQUIRE(es_page_pointers(p, i, 1, &value));
			if (!null)
				REQUIRE(memcmp(value, model,
							   desc.len > 0 ? (size_t) desc.len : es_page_varlena_size(model)) == 0);
		}
		es_page_unref(p);
		free(stored);
		row += page.nrows;
	}
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (size < 4)
		return 0;
	if (data[0] & 1)
		decode(data + 1, size - 1);
	else
		round_trip(data + 1, size - 1);
	return 0;
}
