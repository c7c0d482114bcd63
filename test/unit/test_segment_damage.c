/*
 * Damaged segments: every changed, missing or moved byte is detected before it is used, and
 * nothing wrong is ever read.
 */
#include "segment_model.h"

#include "core/page.h"

typedef struct Damage
{
	unsigned count;
	EsError	 first;
} Damage;

static void
note_damage(void *arg, const EsError *err)
{
	Damage *d = arg;

	if (d->count++ == 0)
		d->first = *err;
}

/* What became of looking at a damaged file. */
typedef struct Outcome
{
	EsStatus open;
	EsError	 error;	   /* of open, else of the first read that failed */
	bool	 detected; /* by open or read */
	bool	 wrong;	   /* something was read that the model has not */
	Damage	 verify;
	EsStatus verified;
} Outcome;

/* Opens, reads everything, looks for all contexts, verifies. */
static Outcome
look_at(const Model *m, MemFile *file)
{
	Outcome		o = {0};
	EsSegment  *seg;
	EsRowBlock *b = es_block_create();
	EsError		err;

	o.open = es_segment_open(&seg, mem_read, file, file->len, &o.error);
	o.detected = o.open != ES_OK;
	if (seg != NULL)
	{
		for (uint32_t z = 0; z < es_segment_info(seg)->nzones; z++)
		{
			EsZoneInfo zone = es_segment_zone(seg, z);
			EsStatus   status = es_segment_read(seg, zone.first_row, zone.nrows, NULL, ES_WANT_ALL, b, &err);

			if (status != ES_OK)
			{
				if (!o.detected)
					o.error = err;
				o.detected = true;
				o.wrong |= es_block_value(b, m->spec.roles.context - 1, 0) != NULL;
			}
			else
				o.wrong |= !same_rows(m, seg, zone.first_row, zone.nrows, NULL, ES_WANT_ALL, b, &err);
			for (int c = 0; c < m->ncols; c++)
			{
				EsZoneColumnStats stats = es_segment_column_stats(seg, z, c);

				o.wrong |= stats.nnulls > zone.nrows;
			}
		}
		for (uint32_t r = 0; r < m->nrows; r++)
		{
			const ModelRow *row = &m->rows[r];
			uint64_t		first;
			uint64_t		n;
			uint32_t		entry;

			if (es_segment_find_context(seg, row->hash, row->context, row->context_len, &first, &n, &entry,
										&err) != ES_OK)
				o.detected = true;
			else if (n == 0 || first > r || first + n <= r)
				o.wrong = true;
		}
		o.verified = es_segment_verify(seg, note_damage, &o.verify);
		es_segment_close(seg);
	}
	es_block_free(b);
	return o;
}

/* A small table with NULLs, a dictionary, overflow and hidden columns. */
static Model
small_model(void)
{
	Model	 m = model_create(7, 60, 12, UINT64_MAX, 1);
	int		 c = (m.spec.roles.context + 3) % 7;
	uint8_t *data = malloc(20000);

	m.spec.codec = ES_CODEC_LZ4;
	m.spec.zstd_level = 1;
	m.columns[c] = (EsColumnDesc){-1, 4, 0};
	for (uint32_t r = 0; r < m.nrows; r++)
	{
		size_t len = r == 30 ? 20000 : rnd_below(30);

		memset(data, 'a' + (int) (r % 26), len);
		rnd_bytes(data, len / 50);
		free(m.rows[r].values[c]);
		m.rows[r].values[c] = r % 5 == 0 ? NULL : make_varlena(data, len, true);
	}
	/* row 30 has the large one */
	free(m.rows[30].values[c]);
	memset(data, 'q', 20000);
	rnd_bytes(data, 300);
	m.rows[30].values[c] = make_varlena(data, 20000, false);
	free(data);
	return m;
}

static void
test_flips(void)
{
	PROMISE("every changed byte is found by open, read or verify, and nothing wrong is read");
	for (int round = 0; round < 3; round++)
	{
		Model			 m = small_model();
		MemFile			 file = {0};
		EsSegmentSummary summary;
		EsError			 err;
		Outcome			 o;
		unsigned		 unnoticed = 0;
		unsigned		 wrong = 0;
		unsigned		 misplaced = 0;

		CHECK(model_write(&m, &file, &summary, &err) == ES_OK);
		o = look_at(&m, &file);
		CHECK(!o.detected && !o.wrong && o.verified == ES_OK && o.verify.count == 0);
		for (size_t i = 0; i < file.len; i++)
		{
			uint8_t flip = (uint8_t) (round ? 1 << rnd_below(8) : 0xff);

			file.data[i] ^= flip;
			o = look_at(&m, &file);
			unnoticed += o.open == ES_OK && o.verified == ES_OK;
			unnoticed += o.open == ES_OK && o.verify.count == 0;
			wrong += o.wrong;
			/* the place that is named is the page's (or struct's) that has the byte */
			misplaced += o.open == ES_OK && (o.verify.first.offset > i || i - o.verify.first.offset > 60000);
			file.data[i] ^= flip;
		}
		CHECK(unnoticed == 0);
		CHECK(wrong == 0);
		CHECK(misplaced == 0);
		mem_free(&file);
		model_free(&m);
	}
}

static void
test_truncation(void)
{
	PROMISE("a segment cut off at any byte, or with bytes behind its end, does not open");
	Model			 m = small_model();
	MemFile			 file = {0};
	EsSegmentSummary summary;
	EsError			 err;
	EsSegment		*seg;
	unsigned		 opened = 0;

	CHECK(model_write(&m, &file, &summary, &err) == ES_OK);
	for (size_t len = 0; len < file.len; len++)
	{
		MemFile cut = {.data = exact_copy(file.data, len), .len = len};

		opened += es_segment_open(&seg, mem_read, &cut, len, &err) == ES_OK;
		opened += seg != NULL || err.what[0] == '\0';
		/* the length says more than there is */
		CHECK(es_segment_open(&seg, mem_read, &cut, file.len, &err) == ES_ERR_TRUNCATED);
		mem_free(&cut);
	}
	CHECK(opened == 0);
	for (size_t more = 1; more < 100; more++)
	{
		MemFile longer = {.data = calloc(1, file.len + more), .len = file.len + more};

		memcpy(longer.data, file.data, file.len);
		CHECK(es_segment_open(&seg, mem_read, &longer, longer.len, &err) != ES_OK);
		mem_free(&longer);
	}
	mem_free(&file);
	model_free(&m);
}

static void
test_version(void)
{
	PROMISE("a segment of another format version is refused as such");
	Model			 m = small_model();
	MemFile			 file = {0};
	EsSegmentSummary summary;
	EsSegmentHeader	 h;
	EsSegmentTrailer t;
	EsError			 err;
	EsSegment		*seg;

	CHECK(model_write(&m, &file, &summary, &err) == ES_OK);
	memcpy(&h, file.data, sizeof(h));
	h.version = ES_FORMAT_VERSION + 1;
	h.crc = 0;
	h.crc = es_crc32c(0, &h, sizeof(h));
	memcpy(file.data, &h, sizeof(h));
	CHECK(es_segment_open(&seg, mem_read, &file, file.len, &err) == ES_ERR_VERSION);
	CHECK(err.status == ES_ERR_VERSION && seg == NULL);
	/* a longer header, whose CRC we cannot know */
	h.len += 8;
	memcpy(file.data, &h, sizeof(h));
	CHECK(es_segment_open(&seg, mem_read, &file, file.len, &err) == ES_ERR_VERSION);

	h.version = ES_FORMAT_VERSION;
	h.len = sizeof(h);
	h.crc = 0;
	h.crc = es_crc32c(0, &h, sizeof(h));
	memcpy(file.data, &h, sizeof(h));
	CHECK(es_segment_open(&seg, mem_read, &file, file.len, &err) == ES_OK);
	es_segment_close(seg);

	memcpy(&t, file.data + file.len - sizeof(t), sizeof(t));
	t.version = ES_FORMAT_VERSION + 1;
	t.crc = 0;
	t.crc = es_crc32c(0, &t, sizeof(t));
	memcpy(file.data + file.len - sizeof(t), &t, sizeof(t));
	CHECK(es_segment_open(&seg, mem_read, &file, file.len, &err) == ES_ERR_VERSION);
	mem_free(&file);
	model_free(&m);
}

static void
test_foreign_parts(void)
{
	PROMISE("header and footer of different segments do not open together");
	Model			 m = small_model();
	MemFile			 file = {0};
	EsSegmentSummary summary;
	EsSegmentHeader	 h;
	EsError			 err;
	EsSegment		*seg;

	CHECK(model_write(&m, &file, &summary, &err) == ES_OK);
	memcpy(&h, file.data, sizeof(h));
	h.table.storage_id++;
	h.crc = 0;
	h.crc = es_crc32c(0, &h, sizeof(h));
	memcpy(file.data, &h, sizeof(h));
	CHECK(es_segment_open(&seg, mem_read, &file, file.len, &err) == ES_ERR_CORRUPT);
	h.table.storage_id--;
	h.id++;
	h.crc = 0;
	h.crc = es_crc32c(0, &h, sizeof(h));
	memcpy(file.data, &h, sizeof(h));
	CHECK(es_segment_open(&seg, mem_read, &file, file.len, &err) == ES_ERR_CORRUPT);
	mem_free(&file);
	model_free(&m);
}

static EsStatus
ignore_context(void *arg, uint32_t entry, uint64_t hash, uint64_t first_row, uint64_t nrows)
{
	return ES_OK;
}

static void
test_page_named_twice(void)
{
	PROMISE("a footer that names one page in two places is found out, also when the page is in the cache");
	Model			 m = model_create(3, 50, 10, UINT64_MAX, 1);
	MemFile			 file = {0};
	EsSegmentSummary summary;
	EsSegmentTrailer t;
	EsPageHeader	 h;
	EsSegmentFooter	 f;
	EsIndexEntry	 index;
	EsFilterEntry	 filter;
	EsError			 err;
	EsSegment		*seg;
	size_t			 at;
	uint64_t		 first;
	uint64_t		 n;
	uint32_t		 entry;

	m.spec.codec = ES_CODEC_NONE;
	CHECK(model_write(&m, &file, &summary, &err) == ES_OK);
	memcpy(&t, file.data + file.len - sizeof(t), sizeof(t));
	memcpy(&h, file.data + t.footer_offset, sizeof(h));
	at = t.footer_offset + sizeof(h);
	memcpy(&f, file.data + at, sizeof(f));
	at += sizeof(f) + ES_PAD8(3 * sizeof(EsColumnDesc)) + f.nzones * sizeof(EsZoneEntry) +
		  f.nzones * (3 + ES_HIDDEN_COLUMNS) * sizeof(EsChunkEntry) + f.npages * sizeof(EsPageEntry);
	memcpy(&index, file.data + at, sizeof(index));
	at += f.nindex * sizeof(index);
	memcpy(&filter, file.data + at, sizeof(filter));
	filter.offset = index.offset;
	filter.stored_len = index.stored_len;
	memcpy(file.data + at, &filter, sizeof(filter));

	es_page_seal(&h, file.data + t.footer_offset + sizeof(h), m.spec.id, t.footer_offset);
	memcpy(file.data + t.footer_offset, &h, sizeof(h));
	t.footer_crc = h.crc;
	t.crc = 0;
	t.crc = es_crc32c(0, &t, sizeof(t));
	memcpy(file.data + file.len - sizeof(t), &t, sizeof(t));

	CHECK(es_segment_open(&seg, mem_read, &file, file.len, &err) == ES_OK);
	for (int i = 0; i < 2; i++)
	{
		CHECK(es_segment_find_context(seg, m.rows[0].hash, m.rows[0].context, m.rows[0].context_len, &first,
									  &n, &entry, &err) == ES_ERR_CORRUPT);
		CHECK(err.offset == index.offset);
		CHECK(es_segment_walk_contexts(seg, ignore_context, NULL, &err) == ES_OK);
	}
	es_segment_close(seg);
	mem_free(&file);
	model_free(&m);
}

static void
test_swapped_pages(void)
{
	PROMISE("two pages that changed places are found, although each is whole");
	Model			 m = model_create(2, 20000, 50, UINT64_MAX, 1);
	MemFile			 file = {0};
	EsSegmentSummary summary;
	EsError			 err;
	int				 swaps = 0;
	uint64_t		 offsets[4096];
	uint32_t		 lens[4096];
	uint32_t		 n = 0;
	EsSegmentTrailer t;
	int				 c = m.spec.roles.context == 1 ? 1 : 0;

	/* fixed-width noise: many pages of equal length */
	m.columns[c] = (EsColumnDesc){16, 1, 0};
	for (uint32_t r = 0; r < m.nrows; r++)
	{
		free(m.rows[r].values[c]);
		m.rows[r].values[c] = malloc(16);
		rnd_bytes(m.rows[r].values[c], 16);
	}
	CHECK(model_write(&m, &file, &summary, &err) == ES_OK);
	memcpy(&t, file.data + file.len - sizeof(t), sizeof(t));
	for (uint64_t o = sizeof(EsSegmentHeader); o < t.footer_offset && n < 4096; n++)
	{
		EsPageHeader h;

		memcpy(&h, file.data + o, sizeof(h));
		offsets[n] = o;
		lens[n] = (uint32_t) sizeof(h) + h.stored_len;
		o += lens[n];
	}
	for (uint32_t i = 0; i + 1 < n && swaps < 5; i++)
	{
		if (lens[i] != lens[i + 1] || lens[i] < 10000)
			continue;
		for (int back = 0; back < 2; back++)
		{
			uint8_t *copy = exact_copy(file.data + offsets[i], lens[i]);
			Outcome	 o;

			memcpy(file.data + offsets[i], file.data + offsets[i + 1], lens[i]);
			memcpy(file.data + offsets[i + 1], copy, lens[i]);
			free(copy);
			o = look_at(&m, &file);
			if (back == 0)
			{
				CHECK(o.open == ES_OK && o.detected && !o.wrong && o.verify.count == 2);
				CHECK(o.verify.first.offset == offsets[i]);
				swaps++;
			}
			else
				CHECK(!o.detected && !o.wrong && o.verified == ES_OK);
		}
	}
	CHECK(swaps > 0);
	mem_free(&file);
	model_free(&m);
}

static void
test_pruned_reads(void)
{
	PROMISE("damage in one column leaves reads of the others alone, and is named with its place and sums");
	Model			 m = small_model();
	MemFile			 file = {0};
	EsSegmentSummary summary;
	EsError			 err;
	EsSegment		*seg;
	EsRowBlock		*b = es_block_create();
	bool			 wanted[7] = {false};
	EsPageHeader	 h;
	uint64_t		 o = sizeof(EsSegmentHeader);
	EsZoneInfo		 zone;

	CHECK(model_write(&m, &file, &summary, &err) == ES_OK);
	/* the first data page of a column that is not the context's */
	for (;; o += sizeof(h) + h.stored_len)
	{
		memcpy(&h, file.data + o, sizeof(h));
		if (h.kind_codec >> 4 == ES_PAGE_DATA && h.column < 7 && h.column + 1 != m.spec.roles.context)
			break;
	}
	file.data[o + sizeof(h) + h.stored_len / 2] ^= 1;
	CHECK(es_segment_open(&seg, mem_read, &file, file.len, &err) == ES_OK);
	zone = es_segment_zone(seg, h.zone);
	for (int c = 0; c < 7; c++)
		wanted[c] = c != h.column;
	CHECK(same_rows(&m, seg, zone.first_row, zone.nrows, wanted, ES_WANT_ALL, b, &err));
	wanted[h.column] = true;
	CHECK(es_segment_read(seg, zone.first_row, zone.nrows, wanted, 0, b, &err) == ES_ERR_CORRUPT);
	CHECK(err.status == ES_ERR_CORRUPT && err.offset == o);
	CHECK(err.expected_crc == h.crc && err.found_crc != h.crc);
	es_segment_close(seg);
	es_block_free(b);
	mem_free(&file);
	model_free(&m);
}

/* Fails the nth read. */
typedef struct FailingFile
{
	MemFile *file;
	int		 left;
} FailingFile;

static EsStatus
failing_read(void *arg, void *buf, size_t len, uint64_t offset, EsError *err)
{
	FailingFile *f = arg;

	if (f->left-- == 0)
		return es_fail(err, ES_ERR_IO, offset, "the disk does not answer");
	return mem_read(f->file, buf, len, offset, err);
}

static void
test_read_errors(void)
{
	PROMISE("a read that fails fails the call and nothing else: the next call works");
	Model			 m = small_model();
	MemFile			 file = {0};
	EsSegmentSummary summary;
	EsError			 err;
	EsRowBlock		*b = es_block_create();

	CHECK(model_write(&m, &file, &summary, &err) == ES_OK);
	for (int n = 0; n < 60; n++)
	{
		FailingFile f = {&file, n};
		EsSegment  *seg;
		EsStatus	status = es_segment_open(&seg, failing_read, &f, file.len, &err);

		if (status != ES_OK)
		{
			CHECK(status == ES_ERR_IO && err.status == ES_ERR_IO);
			continue;
		}
		es_segment_set_cache(seg, n % 2 ? 0 : 1 << 20);
		for (uint32_t z = 0; z < es_segment_info(seg)->nzones; z++)
		{
			EsZoneInfo zone = es_segment_zone(seg, z);

			status = es_segment_read(seg, zone.first_row, zone.nrows, NULL, ES_WANT_ALL, b, &err);
			if (status != ES_OK)
			{
				CHECK(status == ES_ERR_IO);
				CHECK(same_rows(&m, seg, zone.first_row, zone.nrows, NULL, ES_WANT_ALL, b, &err));
			}
		}
		es_segment_close(seg);
	}
	es_block_free(b);
	mem_free(&file);
	model_free(&m);
}

int
main(void)
{
	test_flips();
	test_truncation();
	test_version();
	test_foreign_parts();
	test_page_named_twice();
	test_swapped_pages();
	test_pruned_reads();
	test_read_errors();
	return done();
}
