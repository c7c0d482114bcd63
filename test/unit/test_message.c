/*
 * Messages in PostgreSQL's WAL: pieces come together again or are refused, and a FINISH is checked to its
 * last byte.
 */
#include "core/message.h"

#include "tap.h"

/* Larger allocations fail: the assembler must not trust a header's lengths. */
const char *__asan_default_options(void);

const char *
__asan_default_options(void)
{
	return "allocator_may_return_null=1:max_allocation_size_mb=256";
}

static const uint8_t uuid[ES_UUID_LEN] = {'s', 't', 'o', 'r', 'e', ' ', 'u', 'u',
										  'i', 'd', ' ', '1', '6', ' ', 'b', 'y'};

/* ---- messages as lists of records ---- */

typedef struct Records
{
	uint32_t n;
	void   **record; /* each in memory of exactly its length */
	size_t	*len;
} Records;

static Records
write_message(EsMessageKind kind, const EsPart *parts, int nparts, EsLsn first_start)
{
	Records			 r;
	EsMessageWriter *w = NULL;
	char			*buf = malloc(ES_MESSAGE_MAX_RECORD);

	CHECK(es_message_begin(&w, kind, uuid, 1234, 3, parts, nparts) == ES_OK);
	r.n = es_message_npieces(w);
	r.record = malloc(r.n * sizeof(*r.record));
	r.len = malloc(r.n * sizeof(*r.len));
	for (uint32_t i = 0; i < r.n; i++)
	{
		CHECK(es_message_piece(w, i, i == 0 ? 0 : first_start, buf, &r.len[i]) == ES_OK);
		r.record[i] = exact_copy(buf, r.len[i]);
	}
	if (r.n > 1)
	{
		size_t len;

		CHECK(es_message_piece(w, 0, first_start, buf, &len) == ES_ERR_ARGUMENT);
		CHECK(es_message_piece(w, 1, 0, buf, &len) == ES_ERR_ARGUMENT);
		CHECK(es_message_piece(w, r.n, first_start, buf, &len) == ES_ERR_ARGUMENT);
	}
	es_message_end(w);
	free(buf);
	return r;
}

static void
records_free(Records *r)
{
	for (uint32_t i = 0; i < r->n; i++)
		free(r->record[i]);
	free(r->record);
	free(r->len);
}

/* Checks a record and gives it to the assembler. */
static EsStatus
feed(EsMessageAssembler *a, const void *record, size_t len, void **payload, size_t *payload_len)
{
	const EsMessageHeader *h;
	const void			  *piece;
	EsStatus			   status = es_message_check(record, len, &h, &piece, NULL);

	*payload = NULL;
	if (status != ES_OK)
		return status;
	return es_assembler_add(a, h, piece, payload, payload_len, NULL);
}

/* The payload of the whole message, or NULL. */
static void *
read_message(const Records *r, size_t *len)
{
	EsMessageAssembler *a = es_assembler_create();
	void			   *payload = NULL;

	for (uint32_t i = 0; i < r->n; i++)
	{
		CHECK(payload == NULL);
		if (!CHECK(feed(a, r->record[i], r->len[i], &payload, len) == ES_OK))
			break;
	}
	es_assembler_free(a);
	return payload;
}

static void *
random_payload(size_t len, bool compressible)
{
	unsigned char *p = malloc(len + 1);

	rnd_bytes(p, len);
	if (compressible)
		for (size_t i = 0; i < len; i++)
			p[i] = i % 64 < 48 ? (unsigned char) (i % 7) : p[i];
	return p;
}

/* Makes a record's checksum right again after a change of its header. */
static void
reseal(void *record)
{
	EsMessageHeader *h = record;

	h->crc = 0;
	h->crc = es_crc32c(es_crc32c(0, h, sizeof(*h)), h + 1, h->piece_len);
}

/* ---- promises about messages ---- */

static void
test_prefix(void)
{
	PROMISE("the prefix of our records holds NULs, which no prefix given in SQL can");
	CHECK(sizeof(ES_MESSAGE_PREFIX) - 1 == ES_MESSAGE_PREFIX_LEN);
	CHECK(strlen(ES_MESSAGE_PREFIX) + 1 < ES_MESSAGE_PREFIX_LEN);
}

static void
test_round_trip(void)
{
	static const size_t lengths[] = {0,
									 1,
									 7,
									 8,
									 511,
									 512,
									 513,
									 4096,
									 ES_MESSAGE_MAX_RECORD - sizeof(EsMessageHeader) - 1,
									 ES_MESSAGE_MAX_RECORD - sizeof(EsMessageHeader),
									 ES_MESSAGE_MAX_RECORD - sizeof(EsMessageHeader) + 1,
									 ES_MESSAGE_MAX_RECORD,
									 2 * (ES_MESSAGE_MAX_RECORD - sizeof(EsMessageHeader)),
									 1000000,
									 5000000};

	PROMISE("a payload of any length comes back from its records, whatever its parts are");
	for (size_t i = 0; i < 4 * sizeof(lengths) / sizeof(lengths[0]); i++)
	{
		size_t		   len = lengths[i / 4];
		bool		   compressible = i & 1;
		unsigned char *payload = random_payload(len, compressible);
		EsPart		   parts[20];
		int			   nparts = 0;
		size_t		   at = 0;
		Records		   r;
		size_t		   got_len = 1;
		void		  *got;

		if (i & 2)
		{
			/* cut into parts, empty ones among them */
			while (nparts < 19)
			{
				size_t n = rnd_below(4) ? rnd_below(len - at + 1) : 0;

				parts[nparts++] = (EsPart){n ? payload + at : NULL, n};
				at += n;
			}
		}
		parts[nparts++] = (EsPart){payload + at, len - at};
		r = write_message(ES_MESSAGE_BATCH, parts, nparts, 99);
		got = read_message(&r, &got_len);
		CHECK(got != NULL && got_len == len && memcmp(got, payload, len) == 0);
		for (uint32_t k = 0; k < r.n; k++)
		{
			const EsMessageHeader *h = r.record[k];

			CHECK(r.len[k] <= ES_MESSAGE_MAX_RECORD);
			CHECK(h->fxid == 1234 && h->shard == 3 && h->kind == ES_MESSAGE_BATCH && h->raw_len == len);
			CHECK(((h->flags & ES_MESSAGE_LZ4) != 0) == (compressible && len >= ES_MESSAGE_COMPRESS_MIN));
			CHECK((h->flags & ES_MESSAGE_LZ4) ? h->stored_len < len : h->stored_len == len);
			CHECK(memcmp(h->store_uuid, uuid, ES_UUID_LEN) == 0);
		}
		records_free(&r);
		free(got);
		free(payload);
	}
}

static void
test_too_large(void)
{
	EsPart			 parts[2] = {{NULL, 0x40000000}, {NULL, 0x40000000}};
	EsMessageWriter *w;

	PROMISE("a payload of 2 GB is refused before anything is read of it");
	CHECK(es_message_begin(&w, ES_MESSAGE_BATCH, uuid, 1, 0, parts, 2) == ES_ERR_TOO_LARGE);
	CHECK(es_message_begin(&w, (EsMessageKind) 5, uuid, 1, 0, parts, 0) == ES_ERR_ARGUMENT);
}

static void
test_every_byte(void)
{
	PROMISE("a record with any byte changed is refused");
	for (int i = 0; i < 4; i++)
	{
		size_t		   len = i * 400;
		void		  *payload = random_payload(len, i & 1);
		Records		   r = write_message(ES_MESSAGE_FINISH, &(EsPart){payload, len}, 1, 0);
		unsigned char *record = r.record[0];

		CHECK(r.n == 1);
		for (size_t at = 0; at < r.len[0]; at++)
			for (int bit = 0; bit < 8; bit++)
			{
				const EsMessageHeader *h;
				const void			  *piece;
				EsStatus			   status;

				record[at] ^= (unsigned char) (1 << bit);
				status = es_message_check(record, r.len[0], &h, &piece, NULL);
				CHECK(status == ES_ERR_CORRUPT ||
					  (status == ES_ERR_VERSION && at / 2 == offsetof(EsMessageHeader, version) / 2));
				record[at] ^= (unsigned char) (1 << bit);
			}
		records_free(&r);
		free(payload);
	}
}

static void
test_every_length(void)
{
	void   *payload = random_payload(700, true);
	Records r = write_message(ES_MESSAGE_BATCH, &(EsPart){payload, 700}, 1, 0);

	PROMISE("a record that is cut off anywhere, or has a byte too many, is refused");
	for (size_t len = 0; len <= r.len[0] + 1; len++)
	{
		const EsMessageHeader *h;
		const void			  *piece;
		char				  *record = malloc(len + 1);

		if (len == r.len[0])
		{
			free(record);
			continue;
		}
		memset(record, 0, len + 1);
		memcpy(record, r.record[0], len < r.len[0] ? len : r.len[0]);
		record = realloc(record, len ? len : 1);
		CHECK(es_message_check(record, len, &h, &piece, NULL) ==
			  (len < sizeof(EsMessageHeader) ? ES_ERR_TRUNCATED : ES_ERR_CORRUPT));
		free(record);
	}
	records_free(&r);
	free(payload);
}

static void
test_lying_header(void)
{
	void				  *payload = random_payload(700, true);
	Records				   good = write_message(ES_MESSAGE_BATCH, &(EsPart){payload, 700}, 1, 0);
	void				  *record;
	EsMessageHeader		  *h;
	const EsMessageHeader *checked;
	const void			  *piece;

	PROMISE("lengths, pieces, kinds and flags that cannot be are refused although the checksum is right");
#define LIES(change)                                                                            \
	do                                                                                          \
	{                                                                                           \
		record = exact_copy(good.record[0], good.len[0]);                                       \
		h = record;                                                                             \
		change;                                                                                 \
		reseal(record);                                                                         \
		CHECK(es_message_check(record, good.len[0], &checked, &piece, NULL) == ES_ERR_CORRUPT); \
		free(record);                                                                           \
	} while (0)

	LIES(h->kind = 0);
	LIES(h->kind = 5);
	LIES(h->flags |= 2);
	LIES(h->flags = 0); /* then stored and raw length differ */
	LIES(h->stored_len = 0);
	LIES(h->stored_len = h->raw_len);
	LIES(h->raw_len = h->stored_len); /* compressed, but not smaller */
	LIES(h->stored_len++);			  /* the only piece is not all */
	LIES(h->stored_len--);
	LIES(h->raw_len = UINT32_C(0x80000000));
	LIES((h->raw_len = UINT32_C(0x80000000), h->stored_len = UINT32_C(0x7fffffff), h->npieces = 0));
	LIES(h->raw_len = h->stored_len * 256); /* more than LZ4 can */
	LIES(h->npieces = 0);
	LIES(h->npieces = 2);
	LIES(h->piece = 1);
	LIES(h->first_start = 1);
	LIES((h->piece = 1, h->npieces = 2)); /* a later piece without the first's start */
	LIES((h->piece = UINT32_MAX, h->npieces = 0, h->first_start = 1));
#undef LIES

	record = exact_copy(good.record[0], good.len[0]);
	h = record;
	h->version++;
	reseal(record);
	CHECK(es_message_check(record, good.len[0], &checked, &piece, NULL) == ES_ERR_VERSION);
	free(record);

	/* a record longer than any of ours */
	record = calloc(1, ES_MESSAGE_MAX_RECORD + 8);
	h = record;
	*h = *(EsMessageHeader *) good.record[0];
	h->flags = 0;
	h->raw_len = h->stored_len = h->piece_len = ES_MESSAGE_MAX_RECORD + 8 - sizeof(*h);
	reseal(record);
	CHECK(es_message_check(record, ES_MESSAGE_MAX_RECORD + 8, &checked, &piece, NULL) == ES_ERR_CORRUPT);
	CHECK(es_message_check((char *) record + 4, 1000, &checked, &piece, NULL) == ES_ERR_ARGUMENT);
	free(record);
	records_free(&good);
	free(payload);
}

/* A record of `len` bytes of an uncompressed payload of 300. */
static void
cut_by_hand(EsMessageHeader *record, uint32_t piece, uint32_t len, uint32_t npieces)
{
	memset(record, 0, sizeof(*record) + len);
	record->magic = ES_MESSAGE_MAGIC;
	record->version = ES_FORMAT_VERSION;
	record->kind = ES_MESSAGE_BATCH;
	record->raw_len = record->stored_len = 300;
	record->piece = piece;
	record->npieces = npieces;
	record->piece_len = len;
	record->first_start = piece ? 77 : 0;
	reseal(record);
}

static void
test_lengths_of_pieces(void)
{
	static const struct
	{
		uint32_t len; /* of the second piece; the first has 200 */
		uint32_t npieces;
		EsStatus status;
	} second[] = {{100, 2, ES_OK},		   {99, 0, ES_OK},			 {100, 0, ES_ERR_CORRUPT},
				  {99, 2, ES_ERR_CORRUPT}, {101, 2, ES_ERR_CORRUPT}, {101, 0, ES_ERR_CORRUPT},
				  {299, 0, ES_ERR_CORRUPT}};

	PROMISE("pieces end where the payload does, and with the last one");
	for (size_t i = 0; i < sizeof(second) / sizeof(second[0]); i++)
	{
		EsMessageAssembler *a = es_assembler_create();
		EsMessageHeader	   *record = malloc(sizeof(*record) + 300);
		void			   *got;
		size_t				len;

		cut_by_hand(record, 0, 200, 0);
		CHECK(feed(a, record, sizeof(*record) + 200, &got, &len) == ES_OK && got == NULL);
		cut_by_hand(record, 1, second[i].len, second[i].npieces);
		CHECK(feed(a, record, sizeof(*record) + second[i].len, &got, &len) == second[i].status);
		CHECK((got != NULL) == (i == 0));
		free(got);
		free(record);
		es_assembler_free(a);
	}
}

static void
test_pieces_of_one(void)
{
	void *payload = random_payload(3000000, true);

	PROMISE("a piece that differs from the first in anything but its place is not taken");
	for (int field = 0; field < 8; field++)
	{
		Records				r = write_message(ES_MESSAGE_BATCH, &(EsPart){payload, 3000000}, 1, 77);
		EsMessageAssembler *a = es_assembler_create();
		EsMessageHeader	   *h;
		void			   *got;
		size_t				len;

		if (!CHECK(r.n > 2))
			return;
		h = r.record[1];
		CHECK(feed(a, r.record[0], r.len[0], &got, &len) == ES_OK);
		switch (field)
		{
			case 1:
				h->kind = ES_MESSAGE_FINISH;
				break;
			case 2:
				h->flags = 0;
				h->raw_len = h->stored_len;
				break;
			case 3:
				h->store_uuid[15]++;
				break;
			case 4:
				h->fxid++;
				break;
			case 5:
				h->raw_len--;
				break;
			case 6:
				h->stored_len--;
				break;
			case 7:
				h->shard++;
				break;
		}
		reseal(h);
		CHECK(feed(a, h, r.len[1], &got, &len) == (field == 0 ? ES_OK : ES_ERR_CORRUPT));
		es_assembler_free(a);
		records_free(&r);
	}
	free(payload);
}

static void
test_false_raw_length(void)
{
	void *payload = random_payload(5000, true);

	PROMISE("a compressed message gives as many bytes as it says, or is refused");
	for (int i = -1; i <= 1; i++)
	{
		Records				r = write_message(ES_MESSAGE_BATCH, &(EsPart){payload, 5000}, 1, 0);
		EsMessageAssembler *a = es_assembler_create();
		EsMessageHeader	   *h = r.record[0];
		void			   *got;
		size_t				len;

		h->raw_len = (uint32_t) (5000 + i);
		reseal(h);
		CHECK(feed(a, h, r.len[0], &got, &len) == (i == 0 ? ES_OK : ES_ERR_CORRUPT));
		free(got);
		es_assembler_free(a);
		records_free(&r);
	}
	free(payload);
}

static void
test_order(void)
{
	size_t	len = 5 * ES_MESSAGE_MAX_RECORD;
	void   *payload = random_payload(len, false);
	void   *other_payload = random_payload(len, false);
	Records r = write_message(ES_MESSAGE_BATCH, &(EsPart){payload, len}, 1, 77);
	Records other = write_message(ES_MESSAGE_FINISH, &(EsPart){other_payload, len - 1}, 1, 78);
	Records elsewhere = write_message(ES_MESSAGE_BATCH, &(EsPart){payload, len}, 1, 79);

	PROMISE("pieces are taken only in order, complete, and of one message");
	CHECK(r.n == 6);
	for (uint32_t good = 0; good < r.n; good++)
		for (uint32_t next = 0; next < r.n + 2; next++)
		{
			EsMessageAssembler *a = es_assembler_create();
			void			   *got;
			size_t				got_len;
			const Records	   *from = next < r.n ? &r : next == r.n ? &other : &elsewhere;
			uint32_t			i = next < r.n ? next : good;
			EsStatus			expected = ES_ERR_CORRUPT;

			for (uint32_t k = 0; k < good; k++)
				CHECK(feed(a, r.record[k], r.len[k], &got, &got_len) == ES_OK && got == NULL);
			/* a message can begin with the first piece of any, and go on with what differs in nothing but
			 * the start of a first piece that nobody has named before */
			if (next == good || (good == 0 && next >= r.n) || (good == 1 && next == r.n + 1))
				expected = ES_OK;
			CHECK(feed(a, from->record[i], from->len[i], &got, &got_len) == expected);
			CHECK((got != NULL) == (expected == ES_OK && i == r.n - 1));
			free(got);

			/* neither a message that failed nor one that is complete goes on */
			if (expected != ES_OK || i == r.n - 1)
				CHECK(feed(a, r.record[i], r.len[i], &got, &got_len) == ES_ERR_ARGUMENT && got == NULL);
			es_assembler_free(a);
		}
	records_free(&r);
	records_free(&other);
	records_free(&elsewhere);
	free(payload);
	free(other_payload);
}

static void
test_bounded_memory(void)
{
	/* malloc gives 256 MB at most here */
	size_t				len = 1000;
	void			   *payload = random_payload(len, false);
	EsMessageAssembler *a = es_assembler_create();
	Records				r = write_message(ES_MESSAGE_BATCH, &(EsPart){payload, len}, 1, 0);
	EsMessageHeader	   *h = r.record[0];
	void			   *got;
	size_t				got_len;

	PROMISE("a header that claims 2 GB costs no more memory than what came");
	h->raw_len = h->stored_len = UINT32_C(0x7fffffff);
	h->npieces = 0;
	reseal(h);
	for (int i = 0; i < 100; i++)
	{
		CHECK(feed(a, h, r.len[0], &got, &got_len) == ES_OK && got == NULL);
		h->piece++;
		h->first_start = 5;
		reseal(h);
	}
	es_assembler_free(a);

	/* and one that claims as much as LZ4 could give is refused when there is no memory, or the data do not say so */
	free(payload);
	records_free(&r);
	payload = random_payload(2000000, false);
	for (int i = 0; i < 2; i++)
	{
		uint32_t npieces;

		r = write_message(ES_MESSAGE_BATCH, &(EsPart){payload, 2000000}, 1, 5);
		npieces = r.n;
		a = es_assembler_create();
		for (uint32_t k = 0; k < npieces; k++)
		{
			EsStatus expected = k < npieces - 1 ? ES_OK : i == 0 ? ES_ERR_NOMEM : ES_ERR_CORRUPT;

			h = r.record[k];
			h->flags = ES_MESSAGE_LZ4;
			h->raw_len = i == 0 ? 500000000 : 2000001;
			reseal(h);
			CHECK(feed(a, h, r.len[k], &got, &got_len) == expected && got == NULL);
		}
		es_assembler_free(a);
		records_free(&r);
	}
	free(payload);
}

static void
test_writers_side_by_side(void)
{
	char			 text[3000];
	EsMessageWriter *w[3];
	char			*buf = malloc(ES_MESSAGE_MAX_RECORD);
	size_t			 len;
	void			*got;
	size_t			 got_len;

	PROMISE("a writer is reused after its end and never before");
	for (int round = 0; round < 3; round++)
	{
		for (int i = 0; i < 3; i++)
		{
			memset(text, 'a' + i, sizeof(text));
			/* two parts, so that the writer keeps nothing but its own copy, compressed */
			CHECK(es_message_begin(&w[i], ES_MESSAGE_BATCH, uuid, 1, 0,
								   (EsPart[]){{text, 1000}, {text, 2000}}, 2) == ES_OK);
		}
		for (int i = 0; i < 3; i++)
		{
			EsMessageAssembler *a = es_assembler_create();

			CHECK(es_message_piece(w[i], 0, 0, buf, &len) == ES_OK);
			CHECK(feed(a, buf, len, &got, &got_len) == ES_OK && got_len == 3000);
			memset(text, 'a' + i, sizeof(text));
			CHECK(got != NULL && memcmp(got, text, 3000) == 0);
			free(got);
			es_assembler_free(a);
		}
		for (int i = 0; i < 3; i++)
			es_message_end(w[i]);
	}
	free(buf);
}

static void
test_frozen_message(void)
{
	EsReserve reserve = {.below = 1 << 20};
	Records	  r = write_message(ES_MESSAGE_RESERVE, &(EsPart){&reserve, sizeof(reserve)}, 1, 0);
	uint32_t  crc = es_crc32c(0, r.record[0], r.len[0]);

	PROMISE("the bytes of a message are frozen with the format");
	if (!CHECK(r.len[0] == 80 && crc == UINT32_C(0x69ceeaf3)))
		printf("# UINT32_C(0x%08x)\n", crc);
	records_free(&r);
}

/* ---- FINISH ---- */

/* A batch of nrows rows of one int8 column, from the ordinal on. */
static EsPart
make_batch(uint64_t storage, uint64_t ordinal, uint32_t nrows)
{
	EsColumnDesc	column = {8, 8, ES_COLUMN_BYVAL};
	EsBatchBuilder *b = es_batch_create(&column, 1, NULL);
	EsBatchMeta		meta = {.table.storage_id = storage,
							.roles = {.context = 1, .context_class = ES_CONTEXT_INTEGER}};
	EsPart			part;
	void		   *buf;

	es_batch_reset(b, &meta);
	for (uint32_t i = 0; i < nrows; i++)
	{
		uint64_t	value = rnd();
		const void *values[1] = {&value};

		CHECK(es_batch_add(b, values, ordinal + i, 0, 0, 0) == ES_OK);
	}
	part.len = es_batch_size(b);
	buf = malloc(part.len);
	CHECK(es_batch_finish(b, buf, part.len) == ES_OK);
	part.data = buf;
	es_batch_free(b);
	return part;
}

typedef struct ModelTable
{
	EsTableKey	   key;
	uint32_t	   flags;
	uint64_t	   nrows;
	uint32_t	   nlogged;
	uint32_t	   ninline;
	uint32_t	   nversions;
	bool		   bitmap;
	uint64_t	   starts[5];
	EsPart		   batches[4];
	uint8_t		   not_taken[32];
	EsFirstVersion versions[10];
} ModelTable;

#define MODEL_POSITIONS 1000

static ModelTable
random_table(uint64_t storage)
{
	ModelTable t = {.key = {.storage_id = storage, .database = 5}};
	uint64_t   ordinal = rnd_below(100);

	t.flags = rnd_below(2) ? ES_FINISH_GIVEN_VERSIONS : 0;
	t.nlogged = (uint32_t) rnd_below(6);
	t.ninline = (uint32_t) rnd_below(5);
	t.nversions = (uint32_t) rnd_below(11);
	t.bitmap = rnd_below(2);
	for (uint32_t i = 0; i < t.nlogged; i++)
		t.starts[i] = 1 + rnd();
	if (t.nlogged)
		t.nrows = rnd_below(100);
	for (uint32_t i = 0; i < t.ninline; i++)
	{
		uint32_t n = (uint32_t) rnd_below(5);

		t.batches[i] = make_batch(storage, ordinal, n);
		((EsBatchHeader *) t.batches[i].data)->table.database = 5;
		ordinal += n + rnd_below(3);
		t.nrows += n;
	}
	rnd_bytes(t.not_taken, sizeof(t.not_taken));
	for (uint32_t i = 0; i < t.nversions; i++)
		t.versions[i] = (EsFirstVersion){rnd(), 1 + (int64_t) rnd_below(1000)};
	return t;
}

static EsStatus
add_model_table(EsFinishBuilder *f, const ModelTable *t)
{
	return es_finish_add_table(f, &t->key, 4711, t->flags, t->nrows, t->starts, t->nlogged, t->batches,
							   t->ninline, t->bitmap ? t->not_taken : NULL, t->versions, t->nversions);
}

static void
check_table(const ModelTable *t, const EsFinishTable *got)
{
	EsFinishTableView v;
	const char		 *at;

	es_finish_table_view(got, &v);
	CHECK(es_table_key_equal(&got->table, &t->key) && got->relid == 4711 && got->nrows == t->nrows);
	CHECK(got->flags == (t->flags | (t->bitmap ? ES_FINISH_NOT_TAKEN : 0)));
	CHECK(got->nlogged == t->nlogged && got->ninline == t->ninline && got->nversions == t->nversions);
	CHECK(memcmp(v.batch_starts, t->starts, t->nlogged * sizeof(uint64_t)) == 0);
	at = v.inline_batches;
	for (uint32_t i = 0; i < t->ninline; i++)
	{
		CHECK(memcmp(at, t->batches[i].data, t->batches[i].len) == 0);
		CHECK((uintptr_t) at % 8 == 0);
		at += t->batches[i].len;
	}
	CHECK((v.not_taken != NULL) == t->bitmap);
	if (v.not_taken)
		CHECK(memcmp(v.not_taken, t->not_taken, (t->nrows + 7) / 8) == 0);
	CHECK(memcmp(v.versions, t->versions, t->nversions * sizeof(EsFirstVersion)) == 0);
}

/* A FINISH of random tables, malloc'd; in tables[shard][i] what it was made of, if given. */
static void *
random_finish(EsFinishBuilder *f, size_t *len, ModelTable tables[][3], int *ntables)
{
	const void *payload;

	es_finish_reset(f, 5000, MODEL_POSITIONS);
	for (uint16_t shard = 0; shard < 3; shard++)
	{
		ntables[shard] = (int) rnd_below(4);
		CHECK(es_finish_begin_section(f, shard) == ES_OK);
		for (int i = 0; i < ntables[shard]; i++)
		{
			tables[shard][i] = random_table(1 + (uint64_t) i);
			CHECK(add_model_table(f, &tables[shard][i]) == ES_OK);
		}
	}
	CHECK(es_finish_end(f, &payload, len) == ES_OK);
	return exact_copy(payload, *len);
}

static void
tables_free(ModelTable tables[][3], const int *ntables)
{
	for (int shard = 0; shard < 3; shard++)
		for (int i = 0; i < ntables[shard]; i++)
			for (uint32_t k = 0; k < tables[shard][i].ninline; k++)
				free((void *) tables[shard][i].batches[k].data);
}

static void
test_finish_round_trip(void)
{
	EsFinishBuilder *f = es_finish_create();

	PROMISE("a FINISH gives back its sections, tables, batches, bitmaps and versions");
	for (int i = 0; i < 200; i++)
	{
		ModelTable tables[3][3];
		int		   ntables[3];
		size_t	   len;
		void	  *finish = random_finish(f, &len, tables, ntables);
		EsError	   err;

		if (!CHECK(es_finish_check(finish, len, &err) == ES_OK))
			printf("# %s\n", err.what);
		CHECK(es_finish_section(finish, 3) == NULL);
		for (uint16_t shard = 0; shard < 3; shard++)
		{
			const EsSectionHeader *s = es_finish_section(finish, shard);
			const EsFinishTable	  *t;
			int					   n = 0;
			void				  *alone;

			if (!CHECK(s != NULL && s->shard == shard && s->base == 5000 && s->npositions == MODEL_POSITIONS))
				break;
			for (t = es_section_first(s); t != NULL; t = es_section_next(s, t))
				if (CHECK(n < ntables[shard]))
					check_table(&tables[shard][n++], t);
			CHECK(n == ntables[shard]);

			/* a section stands alone in a shard's own WAL */
			alone = exact_copy(s, s->len);
			CHECK(es_section_check(alone, s->len, NULL) == ES_OK);
			free(alone);
		}
		free(finish);
		tables_free(tables, ntables);
	}
	es_finish_free(f);
}

/* Reads all that the accessors of a checked FINISH give. */
static uint64_t
walk_finish(const void *finish)
{
	uint64_t sum = 0;

	for (uint16_t shard = 0; shard < ES_MAX_SHARDS; shard++)
	{
		const EsSectionHeader *s = es_finish_section(finish, shard);

		if (s == NULL)
			continue;
		for (const EsFinishTable *t = es_section_first(s); t != NULL; t = es_section_next(s, t))
		{
			EsFinishTableView v;
			const char		 *at;

			es_finish_table_view(t, &v);
			for (uint32_t i = 0; i < t->nlogged; i++)
				sum += v.batch_starts[i];
			at = v.inline_batches;
			for (uint32_t i = 0; i < t->ninline; i++)
			{
				EsBatchView b;

				es_batch_open_trusted(at, &b);
				for (uint32_t r = 0; r < b.header->nrows; r++)
					sum += es_batch_context_hash(&b, r) + es_batch_ordinal(&b, r);
				at += b.header->total_len;
			}
			for (uint64_t r = 0; v.not_taken && r < t->nrows; r++)
				sum += v.not_taken[r / 8];
			for (uint32_t i = 0; i < t->nversions; i++)
				sum += v.versions[i].context_hash;
		}
	}
	return sum;
}

static void
test_finish_malformed(void)
{
	EsFinishBuilder *f = es_finish_create();
	uint64_t		 sum = 0;
	unsigned		 taken = 0;
	unsigned		 refused = 0;

	PROMISE("a FINISH with changed bytes, or cut off, is refused or can be read without leaving it");
	for (int i = 0; i < 30; i++)
	{
		ModelTable tables[3][3];
		int		   ntables[3];
		size_t	   len;
		void	  *finish = random_finish(f, &len, tables, ntables);

		for (size_t at = 0; at < len; at++)
		{
			unsigned char *copy = exact_copy(finish, len);
			void		  *cut = exact_copy(finish, at);
			EsError		   err;
			EsStatus	   status;

			CHECK(es_finish_check(cut, at, NULL) != ES_OK);
			free(cut);
			copy[at] ^= (unsigned char) (1 << rnd_below(8));
			status = es_finish_check(copy, len, &err);
			if (status == ES_OK)
			{
				sum += walk_finish(copy);
				taken++;
			}
			else
			{
				CHECK(err.status == status && err.what[0] != 0 && err.offset <= len);
				refused++;
			}
			free(copy);
		}
		free(finish);
		tables_free(tables, ntables);
	}
	CHECK(taken > 1000 && refused > 1000 && sum != 1);
	es_finish_free(f);
}

static void
test_finish_refused(void)
{
	EsFinishBuilder *f = es_finish_create();
	EsPart			 batches[2] = {make_batch(7, 10, 3), make_batch(7, 13, 2)};
	EsTableKey		 key = {.storage_id = 7};
	uint64_t		 start = 1000;
	uint8_t			 not_taken = 1;
	EsFirstVersion	 version = {1, 1};
	const void		*payload;
	void			*good;
	size_t			 len;

	PROMISE("a FINISH is refused whose positions, order, row counts, tables or shards do not agree");
	es_finish_reset(f, 100, 15);
	CHECK(es_finish_begin_section(f, 2) == ES_OK);
	CHECK(es_finish_add_table(f, &key, 1, 0, 5, &start, 0, batches, 2, &not_taken, &version, 1) == ES_OK);
	CHECK(es_finish_begin_section(f, 1) == ES_OK);
	CHECK(es_finish_add_table(f, &key, 1, 0, 8, &start, 1, batches, 2, NULL, NULL, 0) == ES_OK);
	CHECK(es_finish_end(f, &payload, &len) == ES_OK);
	good = exact_copy(payload, len);
	CHECK(es_finish_check(good, len, NULL) == ES_OK);

#define DAMAGED(change)                                                        \
	do                                                                         \
	{                                                                          \
		char			*buf = exact_copy(good, len);                          \
		EsFinishHeader	*h = (EsFinishHeader *) buf;                           \
		EsSectionHeader *s = (EsSectionHeader *) (h + 1);                      \
		EsFinishTable	*t = (EsFinishTable *) (s + 1);                        \
		EsBatchHeader	*b1 = (EsBatchHeader *) (t + 1);                       \
		EsBatchHeader	*b2 = (EsBatchHeader *) ((char *) b1 + b1->total_len); \
		EsSectionHeader *s2 = (EsSectionHeader *) ((char *) s + s->len);       \
		EsFinishTable	*t2 = (EsFinishTable *) (s2 + 1);                      \
		EsFirstVersion	*v = (EsFirstVersion *) s2 - 1;                        \
		(void) h, (void) t, (void) b2, (void) t2, (void) v;                    \
		change;                                                                \
		CHECK(es_finish_check(buf, len, NULL) == ES_ERR_CORRUPT);              \
		free(buf);                                                             \
	} while (0)

	DAMAGED(h->base = ES_MAX_POSITION + 1);
	DAMAGED(h->npositions = UINT64_MAX);
	DAMAGED(h->npositions++);  /* the sections say otherwise */
	DAMAGED(h->nsections = 1); /* bytes are left */
	DAMAGED(h->reserved = 1);
	DAMAGED(s->base = ES_MAX_POSITION + 1);
	DAMAGED(s->npositions = ES_MAX_POSITION);
	DAMAGED((h->npositions = s->npositions = s2->npositions = 14)); /* fewer than ordinals */
	DAMAGED(s->shard = 1);											/* twice */
	DAMAGED(s->shard = ES_MAX_SHARDS);
	DAMAGED(s->ntables = 0);
	DAMAGED(s->ntables = 2);
	DAMAGED(s->len = 0);
	DAMAGED(s->len = UINT32_C(0xfffffff8));
	DAMAGED(t->len = 0);
	DAMAGED(t->len -= 8);
	DAMAGED(t->len += 8);
	DAMAGED(t->len = UINT32_C(0xfffffff8));
	/* what these claim would lie behind the end */
	DAMAGED((t2->len += 16, t2->nversions = 1));
	DAMAGED((t2->len = 0, t2->nlogged = 1000000));
	DAMAGED(t->table.reserved = 1);
	DAMAGED((h->base = s->base = s2->base = ES_MAX_POSITION + 1, t->flags |= 1, t2->flags |= 1));
	DAMAGED((h->base = s->base = s2->base = ES_MAX_POSITION - 13, t->flags |= 1, t2->flags |= 1));
	DAMAGED(t->nlogged = 1);
	DAMAGED(t->nlogged = UINT32_MAX);
	DAMAGED(t->ninline = 1);
	DAMAGED(t->ninline = UINT32_MAX);
	DAMAGED(t->nrows = 4);
	DAMAGED(t->nrows = 6);
	DAMAGED(t->nrows = UINT64_MAX);
	DAMAGED(t->nversions = 0);
	DAMAGED(t->nversions = ES_FINISH_MAX_VERSIONS + 1);
	DAMAGED(t->flags = 0);
	DAMAGED(t->flags |= 8);
	DAMAGED(t->table.storage_id = 8);
	DAMAGED(v->first_version = 0);
	DAMAGED(b1->magic = 0);
	DAMAGED(b1->total_len = 8);
	DAMAGED(b2->total_len = (uint32_t) len);
	DAMAGED(b2->first_ordinal = 12);	 /* not behind the first batch */
	DAMAGED(*(uint64_t *) (t2 + 1) = 0); /* a logged batch without a start */
	DAMAGED(t2->nrows = 5 + ES_BATCH_MAX_ROWS + 1);
	DAMAGED(t2->nrows = 4);
#undef DAMAGED
	CHECK(es_finish_check((char *) good + 4, len - 4, NULL) == ES_ERR_ARGUMENT);
	CHECK(es_section_check((char *) good + 4, len - 4, NULL) == ES_ERR_ARGUMENT);
	{
		/* a section alone: longer or shorter than it says, or with false positions */
		EsSectionHeader *s = (EsSectionHeader *) ((char *) good + sizeof(EsFinishHeader));

		CHECK(es_section_check(s, s->len, NULL) == ES_OK);
		CHECK(es_section_check(s, s->len + 8, NULL) == ES_ERR_CORRUPT);
		CHECK(es_section_check(s, s->len - 8, NULL) == ES_ERR_CORRUPT);
		s->base = ES_MAX_POSITION + 1;
		CHECK(es_section_check(s, s->len, NULL) == ES_ERR_CORRUPT);
	}
	free(good);

	/* with given positions ordinals say nothing about positions */
	es_finish_reset(f, 0, 0);
	CHECK(es_finish_begin_section(f, 2) == ES_OK);
	CHECK(es_finish_add_table(f, &key, 1, ES_FINISH_GIVEN_POSITIONS, 5, NULL, 0, batches, 2, NULL, NULL, 0) ==
		  ES_OK);
	CHECK(es_finish_end(f, &payload, &len) == ES_OK);
	good = exact_copy(payload, len);
	CHECK(es_finish_check(good, len, NULL) == ES_OK);
	free(good);
	free((void *) batches[0].data);
	free((void *) batches[1].data);
	es_finish_free(f);
}

static void
test_finish_builder(void)
{
	EsFinishBuilder *f = es_finish_create();
	EsPart			 batch = make_batch(1, 0, 2);
	EsPart			 huge = {batch.data, UINT32_C(0x7ffffff8)};
	EsPart			 odd = {batch.data, batch.len - 4};
	EsTableKey		 key = {.storage_id = 1};
	const void		*payload;
	size_t			 before;
	size_t			 len;

	PROMISE("what the builder of a FINISH refuses leaves no trace in it");
	es_finish_reset(f, 1, 2);
	CHECK(es_finish_add_table(f, &key, 1, 0, 2, NULL, 0, &batch, 1, NULL, NULL, 0) == ES_ERR_ARGUMENT);
	CHECK(es_finish_begin_section(f, ES_MAX_SHARDS) == ES_ERR_ARGUMENT);
	CHECK(es_finish_begin_section(f, 0) == ES_OK);
	CHECK(es_finish_begin_section(f, 0) == ES_ERR_ARGUMENT);
	CHECK(es_finish_end(f, &payload, &before) == ES_OK);
	CHECK(es_finish_add_table(f, &key, 1, 0, 2, NULL, 0, &huge, 1, NULL, NULL, 0) == ES_ERR_TOO_LARGE);
	CHECK(es_finish_add_table(f, &key, 1, 0, 2, NULL, 0, (EsPart[]){huge, huge, huge}, 3, NULL, NULL, 0) ==
		  ES_ERR_TOO_LARGE);
	CHECK(es_finish_add_table(f, &key, 1, 0, 2, NULL, 0, &odd, 1, NULL, NULL, 0) == ES_ERR_ARGUMENT);
	CHECK(es_finish_add_table(f, &key, 1, 0, 2, NULL, 0, &batch, 1, NULL, NULL, ES_FINISH_MAX_VERSIONS + 1) ==
		  ES_ERR_ARGUMENT);
	CHECK(es_finish_end(f, &payload, &len) == ES_OK && len == before);
	CHECK(es_finish_check(payload, len, NULL) == ES_OK);
	{
		/* the most versions there may be, and one more put there by hand */
		EsFirstVersion	*versions = calloc(ES_FINISH_MAX_VERSIONS, sizeof(*versions));
		EsFinishHeader	*copy;
		EsSectionHeader *s;
		EsFinishTable	*t;

		for (int i = 0; i < ES_FINISH_MAX_VERSIONS; i++)
			versions[i].first_version = 1;
		CHECK(es_finish_add_table(f, &key, 1, 0, 2, NULL, 0, &batch, 1, NULL, versions,
								  ES_FINISH_MAX_VERSIONS) == ES_OK);
		CHECK(es_finish_end(f, &payload, &len) == ES_OK && es_finish_check(payload, len, NULL) == ES_OK);
		copy = realloc(exact_copy(payload, len), len + sizeof(*versions));
		memcpy((char *) copy + len, versions, sizeof(*versions));
		s = (EsSectionHeader *) (copy + 1);
		t = (EsFinishTable *) (s + 1);
		s->len += sizeof(*versions);
		t->len += sizeof(*versions);
		t->nversions++;
		CHECK(es_finish_check(copy, len + sizeof(*versions), NULL) == ES_ERR_CORRUPT);
		free(copy);
		free(versions);
	}
	CHECK(es_finish_add_table(f, &key, 1, ES_FINISH_NOT_TAKEN, 2, NULL, 0, &batch, 1, NULL, NULL, 0) ==
		  ES_OK);
	CHECK(es_finish_end(f, &payload, &len) == ES_OK && es_finish_check(payload, len, NULL) == ES_OK);
	free((void *) batch.data);
	es_finish_free(f);
}

static void
test_frozen_finish(void)
{
	EsFinishBuilder *f = es_finish_create();
	EsTableKey		 key = {.storage_id = 7, .database = 5};
	uint64_t		 starts[2] = {1000, 2000};
	uint8_t			 not_taken[2] = {0x80, 0x01};
	EsFirstVersion	 version = {UINT64_C(0x0123456789abcdef), 3};
	const void		*payload;
	size_t			 len;
	uint32_t		 crc;

	PROMISE("the bytes of a FINISH are frozen with the format");
	es_finish_reset(f, 100, 20);
	CHECK(es_finish_begin_section(f, 2) == ES_OK);
	CHECK(es_finish_add_table(f, &key, 16384, ES_FINISH_GIVEN_VERSIONS, 9, starts, 2, NULL, 0, not_taken,
							  &version, 1) == ES_OK);
	CHECK(es_finish_end(f, &payload, &len) == ES_OK && es_finish_check(payload, len, NULL) == ES_OK);
	crc = es_crc32c(0, payload, len);
	if (!CHECK(len == 136 && crc == UINT32_C(0x5b8625eb)))
		printf("# len == %zu && crc == UINT32_C(0x%08x)\n", len, crc);
	es_finish_free(f);
}

int
main(void)
{
	test_prefix();
	test_round_trip();
	test_too_large();
	test_every_byte();
	test_every_length();
	test_lying_header();
	test_order();
	test_lengths_of_pieces();
	test_pieces_of_one();
	test_false_raw_length();
	test_bounded_memory();
	test_writers_side_by_side();
	test_frozen_message();
	test_finish_round_trip();
	test_finish_malformed();
	test_finish_refused();
	test_finish_builder();
	test_frozen_finish();
	return done();
}
