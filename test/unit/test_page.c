/*
 * Pages: integer vectors and encodings give back what they got, no byte changes unnoticed,
 * and damage that has a right checksum does no harm.
 */
#include "core/page.h"

#include <math.h>

#include "tap.h"

/* ---- integer vectors ---- */

/* Values of one of several kinds. */
static void
make_ints(uint64_t *v, uint32_t n, int kind)
{
	uint64_t base = rnd();
	uint8_t	 bits = (uint8_t) rnd_below(65);
	uint64_t mask = bits == 64 ? UINT64_MAX : (UINT64_C(1) << bits) - 1;
	uint64_t last = base;

	for (uint32_t i = 0; i < n; i++)
	{
		switch (kind)
		{
			case 0:
				v[i] = base + (rnd() & mask);
				break;
			case 1: /* growing */
				v[i] = last += rnd() & (mask >> 16);
				break;
			case 2: /* runs */
				v[i] = last = rnd_below(30) ? last : base + (rnd() & mask);
				break;
			case 3: /* counting, from 1 now and then */
				v[i] = last = rnd_below(30) ? last + 1 : 1;
				break;
			case 4:
				v[i] = base;
				break;
			case 5: /* counting without end, across the wrap */
				v[i] = UINT64_MAX - n / 2 + i;
				break;
			default: /* the ends of the range */
				v[i] =
					rnd_below(2) ? (uint64_t) INT64_MIN + rnd_below(3) : (uint64_t) INT64_MAX - rnd_below(3);
				break;
		}
	}
}

static void
test_intvec(void)
{
	PROMISE("integer vectors of all widths and modes come back at every index and range");
	bool seen[3] = {false};

	for (int round = 0; round < 3000; round++)
	{
		uint32_t	 n = (uint32_t) rnd_below(round % 10 ? 700 : 8192) + 1;
		uint64_t	*v = malloc(n * sizeof(*v));
		uint64_t	*out = malloc(n * sizeof(*out));
		uint8_t		*buf;
		EsIntVecPlan plan;
		EsIntVec	 iv;
		uint32_t	 first = (uint32_t) rnd_below(n);
		uint32_t	 count = (uint32_t) rnd_below(n - first + 1);

		make_ints(v, n, round % 7);
		es_intvec_plan(v, n, rnd_below(2), &plan);
		seen[plan.header.mode] = true;
		buf = calloc(1, plan.size + ES_INTVEC_SLACK);
		es_intvec_encode(v, &plan, buf);
		CHECK(plan.size % 8 == 0);
		CHECK(plan.size <= sizeof(EsIntVecHeader) + 8 * (size_t) n);
		if (CHECK(es_intvec_open(&iv, buf, plan.size, n)))
		{
			CHECK(iv.size == plan.size);
			es_intvec_decode(&iv, 0, n, out);
			CHECK(memcmp(out, v, n * sizeof(*v)) == 0);
			es_intvec_decode(&iv, first, count, out);
			CHECK(memcmp(out, v + first, count * sizeof(*v)) == 0);
			for (int i = 0; i < 20; i++)
			{
				uint32_t k = (uint32_t) rnd_below(n);

				CHECK(es_intvec_get(&iv, k) == v[k]);
			}
		}
		CHECK(!es_intvec_open(&iv, buf, plan.size - 1, n));
		free(buf);
		free(out);
		free(v);
	}
	CHECK(seen[0] && seen[1] && seen[2]);
}

static void
test_intvec_sizes(void)
{
	PROMISE("versions, positions and constants take the few bytes they should");
	uint64_t	 v[8192];
	EsIntVecPlan plan;

	for (uint32_t i = 0; i < 8192; i++)
		v[i] = i % 64 + 1;
	es_intvec_plan(v, 8192, false, &plan);
	CHECK(plan.header.mode == ES_INTVEC_RUNS && plan.header.step == 1 && plan.size <= 16 + 128 * 2);
	for (uint32_t i = 0; i < 8192; i++)
		v[i] = UINT64_C(1000000000000) + i / 64;
	es_intvec_plan(v, 8192, false, &plan);
	CHECK(plan.size <= 16 + 128 * 3);
	for (uint32_t i = 0; i < 8192; i++)
		v[i] = UINT64_C(1000000000000) + i * 1000 + rnd_below(100);
	es_intvec_plan(v, 8192, false, &plan);
	CHECK(plan.header.mode == ES_INTVEC_DELTA && plan.size < 8192 * 9 / 8 + 300);
	for (uint32_t i = 0; i < 8192; i++)
		v[i] = 42;
	es_intvec_plan(v, 8192, false, &plan);
	CHECK(plan.size == 16);
}

/* ---- pages ---- */

#define SEGMENT_ID UINT64_C(77)
#define OFFSET	   UINT64_C(4096)

/* A zone's column in the shape that the encoder takes. */
typedef struct Column
{
	EsPageSource source;
	uint32_t	 n;
	uint8_t		*nulls;
	uint8_t		*data;
	uint32_t	*offsets;
	size_t		 used;
} Column;

static void
column_init(Column *c, EsColumnDesc desc, uint32_t n)
{
	memset(c, 0, sizeof(*c));
	c->n = n;
	c->source.desc = desc;
	c->nulls = calloc(1, ES_ZONE_ROWS / 8);
	c->data = calloc(1, (size_t) n * (desc.len > 0 ? (size_t) desc.len : 6000));
	c->offsets = calloc(n, sizeof(uint32_t));
	c->source.data = c->data;
	c->source.offsets = c->offsets;
}

static void
column_free(Column *c)
{
	free(c->nulls);
	free(c->data);
	free(c->offsets);
}

static void
column_set_null(Column *c, uint32_t row)
{
	c->nulls[row >> 3] |= (uint8_t) (1 << (row & 7));
	c->source.nulls = c->nulls;
}

static bool
column_is_null(const Column *c, uint32_t row)
{
	return (c->nulls[row >> 3] >> (row & 7)) & 1;
}

static void
column_add_varlena(Column *c, uint32_t row, const void *bytes, size_t len)
{
	c->offsets[row] = (uint32_t) c->used;
	if (len <= 126)
		c->data[c->used++] = (uint8_t) ((len + 1) << 1 | 1);
	else
	{
		uint32_t header = (uint32_t) (len + 4) << 2;

		memcpy(c->data + c->used, &header, 4);
		c->used += 4;
	}
	memcpy(c->data + c->used, bytes, len);
	c->used += len;
}

static const uint8_t *
column_value(const Column *c, uint32_t row)
{
	if (c->source.desc.len > 0)
		return c->data + (size_t) row * (size_t) c->source.desc.len;
	return c->data + c->offsets[row];
}

/* Page as it would lie in a file: header and stored bytes in a buffer of their exact size. */
static uint8_t *
seal_page(const EsEncodedPage *page, uint32_t first, size_t *len)
{
	EsPageHeader h = {.stored_len = page->stored_len,
					  .raw_len = page->raw_len,
					  .zone = 3,
					  .first_row = (uint16_t) first,
					  .nrows = (uint16_t) page->nrows,
					  .column = 5,
					  .kind_codec = (uint8_t) (ES_PAGE_DATA << 4 | page->codec),
					  .encoding = page->encoding};
	uint8_t		*buf = malloc(sizeof(h) + page->stored_len);

	es_page_seal(&h, page->stored, SEGMENT_ID, OFFSET);
	memcpy(buf, &h, sizeof(h));
	memcpy(buf + sizeof(h), page->stored, page->stored_len);
	*len = sizeof(h) + page->stored_len;
	return buf;
}

static bool
page_agrees(const Column *c, uint32_t first, const EsPage *p)
{
	const EsColumnDesc *d = &c->source.desc;
	uint32_t			stride = d->len > 0 ? es_page_stride(d) : 0;
	uint32_t			from = (uint32_t) rnd_below(p->nrows);
	uint32_t			n = p->nrows - from;
	uint8_t			   *ints = malloc((size_t) n * (stride + 1));
	const void		  **pointers = malloc(n * sizeof(void *));
	bool				right = true;

	if (es_page_is_int(d))
		es_page_ints(p, from, n, stride, ints);
	else
		right = es_page_pointers(p, from, n, pointers);
	for (uint32_t i = 0; i < n && right; i++)
	{
		uint32_t	   row = first + from + i;
		const uint8_t *model = column_value(c, row);
		const uint8_t *value;

		if (es_page_is_null(p, from + i) != column_is_null(c, row))
			right = false;
		if (column_is_null(c, row))
			continue;
		value = es_page_is_int(d) ? ints + (size_t) i * stride : pointers[i];
		if (d->len > 0)
			right = right && memcmp(value, model, (size_t) d->len) == 0;
		else
			right = right && es_page_varlena_size(value) == es_page_varlena_size(model) &&
					memcmp(value, model, es_page_varlena_size(model)) == 0;
		if (!es_page_is_int(d) && (d->len > 0 || (value[0] & 1) == 0))
			right = right && (uintptr_t) value % d->align == 0;
	}
	free(ints);
	free(pointers);
	return right;
}

/* Encodes the column, decodes and compares all pages; the first page's encoding. */
static int
check_column(Column *c, EsPageEncoder *enc, EsPageDecoder *dec, size_t *stored, uint32_t *npages)
{
	int		encoding = -1;
	EsError err;

	*stored = 0;
	*npages = 0;
	for (uint32_t row = 0; row < c->n;)
	{
		EsEncodedPage page;
		EsPageHeader  h;
		EsPage		 *p;
		uint8_t		 *buf;
		size_t		  len;

		if (!CHECK(es_page_encode(enc, &c->source, row, c->n, &page) == ES_OK))
			return -1;
		CHECK(page.nrows > 0 && page.nrows <= c->n - row);
		CHECK(page.raw_len <= ES_PAGE_RAW_MAX && page.stored_len <= page.raw_len);
		CHECK(page.nrows == 1 || (page.encoding & ES_PAGE_ENCODING) != ES_ENCODING_PLAIN ||
			  page.raw_len <= ES_PAGE_RAW + 1024);
		buf = seal_page(&page, row, &len);
		*stored += len;
		(*npages)++;
		if (encoding < 0)
			encoding = page.encoding & ES_PAGE_ENCODING;
		if (CHECK(es_page_check(buf, len, ES_PAGE_DATA, SEGMENT_ID, OFFSET, &h, &err) == ES_OK) &&
			CHECK(es_page_decode(dec, &h, buf + sizeof(h), &c->source.desc, OFFSET, &p, &err) == ES_OK))
		{
			CHECK(p->nrows == page.nrows);
			CHECK(page_agrees(c, row, p));
			es_page_unref(p);
		}
		free(buf);
		row += page.nrows;
		if (page.nrows == 0)
			break;
	}
	return encoding;
}

static const EsColumnDesc shapes[] = {{8, 8, ES_COLUMN_BYVAL},
									  {4, 4, ES_COLUMN_BYVAL},
									  {2, 2, ES_COLUMN_BYVAL},
									  {1, 1, ES_COLUMN_BYVAL},
									  {16, 1, 0},
									  {64, 1, 0},
									  {12, 8, 0},
									  {3, 1, 0},
									  {-1, 4, 0},
									  {-1, 8, 0},
									  {-1, 1, 0},
									  {300, 2, 0},
									  {32000, 8, 0}};

static void
random_column(Column *c)
{
	EsColumnDesc desc = shapes[rnd_below(sizeof(shapes) / sizeof(shapes[0]))];
	uint32_t	 n = (uint32_t) rnd_below(desc.len > 1000 ? 20 : rnd_below(3) ? 500 : 8192) + 1;
	int			 kind = (int) rnd_below(7);
	unsigned	 null_percent = (unsigned) (rnd_below(2) ? 0 : rnd_below(101));
	size_t		 max_len = (size_t) 1 << rnd_below(12);
	uint64_t	*v = malloc(n * sizeof(*v));

	column_init(c, desc, n);
	make_ints(v, n, kind);
	for (uint32_t i = 0; i < n; i++)
	{
		uint8_t bytes[4096];
		size_t	len = kind == 0 ? rnd_below(max_len + 1) : v[i] % max_len;

		if (rnd_below(100) < null_percent)
		{
			column_set_null(c, i);
			continue;
		}
		if (desc.len > 0)
			for (int k = 0; k < desc.len; k++)
				c->data[(size_t) i * (size_t) desc.len + (size_t) k] = (uint8_t) (v[i] >> (k % 8 * 8));
		else
		{
			for (size_t k = 0; k < len; k++)
				bytes[k] = (uint8_t) (v[i] >> (k % 8 * 8));
			column_add_varlena(c, i, bytes, len);
		}
	}
	free(v);
}

static void
test_round_trip(void)
{
	PROMISE("columns of every shape, with and without NULLs, come back from their pages with every codec");
	EsPageDecoder dec = {0};

	for (int round = 0; round < 1500; round++)
	{
		EsPageEncoder *enc = es_page_encoder_create((EsCodec) (round % 3), round % 2);
		Column		   c;
		size_t		   stored;
		uint32_t	   npages;

		random_column(&c);
		check_column(&c, enc, &dec, &stored, &npages);
		column_free(&c);
		es_page_encoder_free(enc);
	}
	es_page_decoder_free(&dec);
}

static void
test_choices(void)
{
	PROMISE("few values become a dictionary, prices decimals, numbers packed integers, each well compressed");
	EsPageEncoder *enc = es_page_encoder_create(ES_CODEC_LZ4, 0);
	EsPageDecoder  dec = {0};
	Column		   c;
	size_t		   stored;
	uint32_t	   npages;
	char		   text[64];

	/* six statuses */
	column_init(&c, (EsColumnDesc){-1, 4, 0}, 8192);
	for (uint32_t i = 0; i < c.n; i++)
		column_add_varlena(&c, i, text,
						   (size_t) snprintf(text, sizeof(text), "status-%d", (int) rnd_below(6)));
	CHECK(check_column(&c, enc, &dec, &stored, &npages) == ES_ENCODING_DICTIONARY);
	CHECK(npages == 1 && stored < 8192 * 3 / 8 + 200);
	column_free(&c);

	/* contexts of 50 rows */
	column_init(&c, (EsColumnDesc){16, 1, 0}, 8192);
	rnd_bytes(c.data, 16);
	for (uint32_t i = 1; i < c.n; i++)
		if (i % 50 == 0)
			rnd_bytes(c.data + (size_t) i * 16, 16);
		else
			memcpy(c.data + (size_t) i * 16, c.data + (size_t) i * 16 - 16, 16);
	CHECK(check_column(&c, enc, &dec, &stored, &npages) == ES_ENCODING_DICTIONARY);
	CHECK(npages == 1 && stored < 164 * 20 + 200);
	column_free(&c);

	/* prices */
	column_init(&c, (EsColumnDesc){8, 8, ES_COLUMN_BYVAL}, 8192);
	for (uint32_t i = 0; i < c.n; i++)
	{
		double d = (double) rnd_below(100000) / 100.0;

		memcpy(c.data + 8 * (size_t) i, &d, 8);
	}
	CHECK(check_column(&c, enc, &dec, &stored, &npages) == ES_ENCODING_DECIMAL);
	CHECK(stored < 8192 * 18 / 8);
	/* NaN, -0 and the like among them */
	for (uint32_t i = 0; i < c.n; i += 100)
	{
		static const double odd[] = {-0.0, NAN, INFINITY, -INFINITY, 1e300, 1e-300, 0.1 + 0.2};

		memcpy(c.data + 8 * (size_t) i, &odd[rnd_below(7)], 8);
	}
	CHECK(check_column(&c, enc, &dec, &stored, &npages) == ES_ENCODING_DECIMAL);
	CHECK(stored < 8192 * 20 / 8);
	column_free(&c);

	/* doubles that are none */
	column_init(&c, (EsColumnDesc){8, 8, ES_COLUMN_BYVAL}, 8192);
	for (uint32_t i = 0; i < c.n; i++)
	{
		double d = (double) rnd() / 7.0;

		memcpy(c.data + 8 * (size_t) i, &d, 8);
	}
	CHECK(check_column(&c, enc, &dec, &stored, &npages) == ES_ENCODING_INTS);
	CHECK(stored < 8192 * 8 + 500);
	column_free(&c);

	/* distinct texts */
	column_init(&c, (EsColumnDesc){-1, 4, 0}, 2000);
	for (uint32_t i = 0; i < c.n; i++)
	{
		rnd_bytes(text, 40);
		column_add_varlena(&c, i, text, 40);
	}
	CHECK(check_column(&c, enc, &dec, &stored, &npages) == ES_ENCODING_PLAIN);
	CHECK(stored < 2000 * 41 + 500);
	column_free(&c);
	es_page_decoder_free(&dec);
	es_page_encoder_free(enc);
}

static void
test_flips(void)
{
	PROMISE("no byte of a page can change, be cut off or move to another place unnoticed");
	EsPageEncoder *enc = es_page_encoder_create(ES_CODEC_LZ4, 1);

	for (int round = 0; round < 20; round++)
	{
		Column		  c;
		EsEncodedPage page;
		EsPageHeader  h;
		EsError		  err;
		uint8_t		 *buf;
		size_t		  len;
		unsigned	  unnoticed = 0;

		random_column(&c);
		CHECK(es_page_encode(enc, &c.source, 0, c.n, &page) == ES_OK);
		buf = seal_page(&page, 0, &len);
		for (size_t i = 0; i < len; i++)
		{
			uint8_t flip = (uint8_t) (1 << rnd_below(8));

			buf[i] ^= flip;
			unnoticed += es_page_check(buf, len, ES_PAGE_DATA, SEGMENT_ID, OFFSET, &h, &err) == ES_OK;
			CHECK(err.status == ES_ERR_CORRUPT && err.offset == OFFSET);
			buf[i] ^= flip;
		}
		CHECK(unnoticed == 0);
		for (size_t i = 0; i < len; i += 1 + len / 100)
		{
			uint8_t *cut = exact_copy(buf, i);

			CHECK(es_page_check(cut, i, ES_PAGE_DATA, SEGMENT_ID, OFFSET, &h, &err) != ES_OK);
			free(cut);
		}
		CHECK(es_page_check(buf, len, ES_PAGE_DATA, SEGMENT_ID + 1, OFFSET, &h, &err) == ES_ERR_CORRUPT);
		CHECK(err.expected_crc != err.found_crc);
		CHECK(es_page_check(buf, len, ES_PAGE_DATA, SEGMENT_ID, OFFSET + 8, &h, &err) == ES_ERR_CORRUPT);
		CHECK(es_page_check(buf, len, ES_PAGE_INDEX, SEGMENT_ID, OFFSET, &h, &err) == ES_ERR_CORRUPT);
		CHECK(es_page_check(buf, len, ES_PAGE_DATA, SEGMENT_ID, OFFSET, &h, &err) == ES_OK);

		/* A length that is wrong although the checksum, over what is there, is right. */
		{
			uint64_t place[2] = {SEGMENT_ID, OFFSET};

			h.crc = 0;
			h.stored_len++;
			h.crc = es_crc32c(es_crc32c(es_crc32c(0, place, sizeof(place)), &h, sizeof(h)), buf + sizeof(h),
							  len - sizeof(h));
			memcpy(buf, &h, sizeof(h));
			CHECK(es_page_check(buf, len, ES_PAGE_DATA, SEGMENT_ID, OFFSET, &h, &err) == ES_ERR_CORRUPT);
		}
		free(buf);
		column_free(&c);
	}
	es_page_encoder_free(enc);
}

static void
test_malicious(void)
{
	PROMISE("a page whose bytes are wrong under a right checksum is refused or read without harm");
	EsPageEncoder *enc = es_page_encoder_create(ES_CODEC_NONE, 0);
	EsPageDecoder  dec = {0};
	unsigned	   refused = 0;

	for (int round = 0; round < 300; round++)
	{
		Column		  c;
		EsEncodedPage page;

		random_column(&c);
		CHECK(es_page_encode(enc, &c.source, 0, c.n, &page) == ES_OK);
		for (int k = 0; k < 30; k++)
		{
			EsPageHeader h = {.stored_len = page.stored_len,
							  .raw_len = page.raw_len,
							  .nrows = (uint16_t) page.nrows,
							  .kind_codec = ES_CODEC_NONE,
							  .encoding = page.encoding};
			uint8_t		*stored = exact_copy(page.stored, page.stored_len);
			EsPage		*p;
			EsError		 err;

			for (int flips = 0; flips < 3; flips++)
				stored[rnd_below(rnd_below(2) && page.stored_len > 40 ? 40 : page.stored_len)] =
					(uint8_t) rnd();
			if (rnd_below(10) == 0)
				h.nrows = (uint16_t) rnd();
			if (rnd_below(10) == 0)
				h.encoding = (uint8_t) rnd();
			if (rnd_below(10) == 0)
				h.kind_codec = (uint8_t) rnd_below(3);
			if (es_page_decode(&dec, &h, stored, &c.source.desc, 0, &p, &err) == ES_OK)
			{
				const void **pointers = malloc((p->nrows + 1u) * sizeof(void *));
				uint8_t		*ints = malloc((size_t) p->nrows * 8 + 1);

				if (es_page_is_int(&c.source.desc))
					es_page_ints(p, 0, p->nrows, (uint32_t) c.source.desc.len, ints);
				else if (es_page_pointers(p, 0, p->nrows, pointers))
				{
					volatile uint8_t sum = 0;

					for (uint32_t i = 0; i < p->nrows; i++)
						if (pointers[i] != NULL)
						{
							const uint8_t *x = pointers[i];
							uint32_t	   size =
								  p->desc.len > 0 ? (uint32_t) p->desc.len : es_page_varlena_size(x);

							for (uint32_t b = 0; b < size; b++)
								sum = (uint8_t) (sum + x[b]);
						}
				}
				free(ints);
				free(pointers);
				es_page_unref(p);
			}
			else
				refused++;
			free(stored);
		}
		column_free(&c);
	}
	CHECK(refused > 100);
	es_page_decoder_free(&dec);
	es_page_encoder_free(enc);
}

int
main(void)
{
	test_intvec();
	test_intvec_sizes();
	test_round_trip();
	test_choices();
	test_flips();
	test_malicious();
	return done();
}
