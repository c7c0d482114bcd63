/*
 * Large segments: two million rows and values of 100 MB are written and read in bounded memory.
 */
#include <fcntl.h>
#include <malloc.h>
#include <unistd.h>

#include "core/route.h"
#include "core/segment.h"

#include "tap.h"

#ifdef __SANITIZE_ADDRESS__
extern size_t __sanitizer_get_current_allocated_bytes(void);
#endif

static size_t
heap_bytes(void)
{
#ifdef __SANITIZE_ADDRESS__
	return __sanitizer_get_current_allocated_bytes();
#else
	struct mallinfo2 m = mallinfo2();

	return m.uordblks + m.hblkhd;
#endif
}

typedef struct File
{
	int	   fd;
	size_t peak; /* heap bytes seen while appending or reading */
} File;

static void
file_open(File *f)
{
	char path[] = "/tmp/test_segment.XXXXXX";

	f->peak = 0;
	f->fd = mkstemp(path);
	if (f->fd < 0)
		abort();
	unlink(path);
}

static void
note_peak(File *f)
{
	size_t bytes = heap_bytes();

	f->peak = bytes > f->peak ? bytes : f->peak;
}

static EsStatus
file_append(void *arg, const void *buf, size_t len, EsError *err)
{
	File *f = arg;

	note_peak(f);
	return write(f->fd, buf, len) == (ssize_t) len ? ES_OK : es_fail(err, ES_ERR_IO, 0, "write failed");
}

static EsStatus
file_read(void *arg, void *buf, size_t len, uint64_t offset, EsError *err)
{
	File *f = arg;

	note_peak(f);
	return pread(f->fd, buf, len, (off_t) offset) == (ssize_t) len
			   ? ES_OK
			   : es_fail(err, ES_ERR_IO, offset, "read failed");
}

static const EsColumnDesc  columns[3] = {{-1, 4, 0}, {8, 8, ES_COLUMN_BYVAL}, {-1, 4, 0}};
static const EsSegmentSpec spec = {.id = 9,
								   .columns = columns,
								   .ncols = 3,
								   .codec = ES_CODEC_LZ4,
								   .roles = {.context = 1, .context_class = ES_CONTEXT_STRING}};

/* Hash, position and values of row i, if each context has per_context rows. */
static void
make_row(uint32_t i, uint32_t per_context, EsSegmentRow *row, const void **values, uint8_t *context,
		 int64_t *number, uint8_t *text)
{
	uint32_t k = i / per_context;
	int		 len = snprintf((char *) context + 1, 30, "context-%u", k);

	context[0] = (uint8_t) ((len + 1) << 1 | 1);
	*number = (int64_t) i * 7919;
	len = snprintf((char *) text + 1, 60, "some words about %u and %u", i, i % 13);
	text[0] = (uint8_t) ((len + 1) << 1 | 1);
	values[0] = context;
	values[1] = number;
	values[2] = text;
	*row = (EsSegmentRow){.values = values,
						  .context_hash = (uint64_t) k << 40,
						  .position = (uint64_t) i % per_context * 100000 + k,
						  .version = i % per_context + 1,
						  .fxid = 1000 + i % 100};
}

static void
large(uint32_t n, uint32_t per_context)
{
	EsSegmentWriter *w;
	EsSegmentSummary summary;
	EsSegment		*seg;
	EsRowBlock		*b;
	EsSegmentRow	 row;
	const void		*values[3];
	uint8_t			 context[32];
	uint8_t			 text[64];
	int64_t			 number;
	File			 file;
	EsError			 err;
	size_t			 before = heap_bytes();
	size_t			 opened;
	unsigned		 wrong = 0;

	file_open(&file);
	CHECK(es_segment_writer_create(&w, &spec, file_append, &file) == ES_OK);
	for (uint32_t i = 0; i < n; i++)
	{
		make_row(i, per_context, &row, values, context, &number, text);
		if (!CHECK(es_segment_writer_add(w, &row, &err) == ES_OK))
			return;
	}
	CHECK(es_segment_writer_finish(w, &summary, &err) == ES_OK);
	es_segment_writer_free(w);
	CHECK(summary.nrows == n && summary.ncontexts == (n + per_context - 1) / per_context);
	CHECK(file.peak - before < 8 << 20);
	CHECK(heap_bytes() <= before + 65536);

	file.peak = 0;
	before = heap_bytes();
	if (!CHECK(es_segment_open(&seg, file_read, &file, summary.file_len, &err) == ES_OK))
		return;
	opened = heap_bytes() - before;
	CHECK(opened < 3 << 20);
	CHECK(es_segment_memory(seg) <= opened && es_segment_memory(seg) > opened - 4096);
	b = es_block_create();
	for (uint32_t i = 0; i < 20000; i++)
	{
		uint32_t k = (uint32_t) rnd_below(n);
		uint64_t first;
		uint64_t nrows;
		uint32_t entry;

		make_row(k, per_context, &row, values, context, &number, text);
		if (es_segment_find_context(seg, row.context_hash, context + 1, (context[0] >> 1) - 1u, &first,
									&nrows, &entry, &err) != ES_OK ||
			entry != k / per_context || first != k / per_context * per_context || nrows != per_context ||
			es_segment_read(seg, k, 1, NULL, ES_WANT_POSITION, b, &err) != ES_OK ||
			memcmp(es_block_value(b, 0, 0), context, context[0] >> 1) != 0 ||
			memcmp(es_block_value(b, 1, 0), &number, 8) != 0 ||
			memcmp(es_block_value(b, 2, 0), text, text[0] >> 1) != 0 ||
			es_block_position(b, 0) != row.position)
			wrong++;
	}
	CHECK(wrong == 0);
	/* footer, 1 MB of cache, read buffer, block */
	CHECK(file.peak - before < opened + (3 << 20));
	CHECK(es_segment_memory(seg) < opened + (2 << 20));
	es_block_free(b);
	es_segment_close(seg);
	CHECK(heap_bytes() <= before + 65536);
	close(file.fd);
}

static void
test_many_contexts(void)
{
	PROMISE("2,000,000 contexts of one row are written in 8 MB and read in 6");
	large(2000000, 1);
}

static void
test_long_contexts(void)
{
	PROMISE("1,000,000 rows in contexts of 50 are written in 8 MB and read in 6");
	large(1000000, 50);
}

static void
test_huge_value(void)
{
	PROMISE("a value of 100 MB costs the writer no memory and the reader its own size");
	size_t			 len = 100000000;
	uint8_t			*value = malloc(len + 4);
	uint32_t		 header = (uint32_t) (len + 4) << 2;
	const void		*values[3] = {"\x07"
									   "ab",
								  NULL, value};
	EsSegmentRow	 row = {.values = values, .context_hash = 1, .position = 1, .fxid = 5};
	EsSegmentWriter *w;
	EsSegmentSummary summary;
	EsSegment		*seg;
	EsRowBlock		*b;
	File			 file;
	EsError			 err;
	size_t			 before;

	memcpy(value, &header, 4);
	for (size_t i = 0; i < len; i++)
		value[4 + i] = (uint8_t) (i * 31 >> 5);
	file_open(&file);
	before = heap_bytes();
	CHECK(es_segment_writer_create(&w, &spec, file_append, &file) == ES_OK);
	CHECK(es_segment_writer_add(w, &row, &err) == ES_OK);
	row.position = 2;
	CHECK(es_segment_writer_add(w, &row, &err) == ES_OK);
	CHECK(es_segment_writer_finish(w, &summary, &err) == ES_OK);
	es_segment_writer_free(w);
	CHECK(file.peak - before < 4 << 20);

	file.peak = 0;
	before = heap_bytes();
	CHECK(es_segment_open(&seg, file_read, &file, summary.file_len, &err) == ES_OK);
	b = es_block_create();
	CHECK(es_segment_info(seg)->nzones == 2);
	CHECK(es_segment_read(seg, 1, 1, NULL, 0, b, &err) == ES_OK);
	CHECK(memcmp(es_block_value(b, 2, 0), value, len + 4) == 0);
	CHECK(es_block_memory(b) >= len && es_block_memory(b) < len + 200000);
	CHECK(file.peak - before < len + (2 << 20));
	CHECK(es_segment_read(seg, 0, 1, NULL, 0, b, &err) == ES_OK);
	CHECK(file.peak - before < len + (2 << 20));
	CHECK(es_segment_read(seg, 0, 0, NULL, 0, b, &err) == ES_OK);
	CHECK(es_block_memory(b) < 200000);
	es_block_free(b);
	es_segment_close(seg);
	close(file.fd);
	free(value);
}

int
main(void)
{
	test_many_contexts();
	test_long_contexts();
	test_huge_value();
	return done();
}
