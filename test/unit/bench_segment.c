/*
 * What a segment of typical events costs: bytes per row and column, rows/s written and
 * scanned, µs per context read, all in CPU time (files are in the page cache). Not part of `make unit`:
 *
 *	 gcc -O2 -DFRONTEND -D_GNU_SOURCE -Isrc -I$(pg_config --includedir-server) -o /tmp/bench_segment \
 *		 test/unit/bench_segment.c $(make -s print-CORE_OBJS | sed "s/\.o/.c/g") -L$(pg_config --pkglibdir) -L$(pg_config --libdir) \
 *		 -lpgcommon -lpgport -llz4 -lzstd -lm
 *	 /tmp/bench_segment [rows [rows per context [lz4|zstd|none [zstd level]]]]
 */
#include <time.h>

#include "segment_model.h"

#include "core/segment_reader.h"

#include <fcntl.h>
#include <unistd.h>

static double
now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
	return (double) t.tv_sec + (double) t.tv_nsec * 1e-9;
}

/* ---- files ---- */

static EsStatus
file_append(void *arg, const void *buf, size_t len, EsError *err)
{
	if (write(*(int *) arg, buf, len) != (ssize_t) len)
		return es_fail(err, ES_ERR_IO, 0, "write failed");
	return ES_OK;
}

static uint64_t nreads;
static uint64_t read_bytes;

static EsStatus
file_read(void *arg, void *buf, size_t len, uint64_t offset, EsError *err)
{
	nreads++;
	read_bytes += len;
	if (pread(*(int *) arg, buf, len, (off_t) offset) != (ssize_t) len)
		return es_fail(err, ES_ERR_IO, offset, "pread failed");
	return ES_OK;
}

/* ---- jsonb as PostgreSQL lays it out ---- */

typedef struct Jsonb
{
	uint32_t entries[64];
	uint8_t	 data[1024];
	uint32_t used;
	uint32_t nkeys;
	uint32_t nvalues;
} Jsonb;

#define JENTRY_STRING  0x00000000u
#define JENTRY_NUMERIC 0x10000000u
#define JENTRY_TRUE	   0x30000000u
#define JENTRY_HAS_OFF 0x80000000u

static void
jsonb_put(Jsonb *j, uint32_t index, uint32_t type, const void *bytes, uint32_t len, bool align)
{
	uint32_t start = j->used;

	while (align && j->used % 4 != 0)
		j->data[j->used++] = 0;
	memcpy(j->data + j->used, bytes, len);
	j->used += len;
	if (index % 32 == 31)
		j->entries[index] = type | JENTRY_HAS_OFF | j->used;
	else
		j->entries[index] = type | (j->used - start);
}

static void
jsonb_key(Jsonb *j, const char *key)
{
	jsonb_put(j, j->nkeys++, JENTRY_STRING, key, (uint32_t) strlen(key), false);
}

static void
jsonb_string(Jsonb *j, const char *s)
{
	jsonb_put(j, j->nkeys + j->nvalues++, JENTRY_STRING, s, (uint32_t) strlen(s), false);
}

/* cents / 100 as a numeric with a short header inside a 4-byte varlena */
static void
jsonb_numeric(Jsonb *j, uint32_t cents)
{
	uint16_t digits[8];
	uint32_t n = 0;
	uint32_t whole = cents / 100;
	uint32_t fraction = cents % 100 * 100;
	int		 weight = whole >= 10000 ? 1 : whole > 0 ? 0 : -1;
	uint8_t	 buf[32];
	uint32_t header;

	digits[n++] = (uint16_t) (0x8000 | (fraction ? 2 << 7 : 0) | (weight & 0x3f) | (weight < 0 ? 0x40 : 0));
	if (whole >= 10000)
		digits[n++] = (uint16_t) (whole / 10000);
	if (whole > 0)
		digits[n++] = (uint16_t) (whole % 10000);
	if (fraction)
		digits[n++] = (uint16_t) fraction;
	header = (4 + 2 * n) << 2;
	memcpy(buf, &header, 4);
	memcpy(buf + 4, digits, 2 * n);
	jsonb_put(j, j->nkeys + j->nvalues++, JENTRY_NUMERIC, buf, 4 + 2 * n, true);
}

static void *
jsonb_finish(Jsonb *j, uint8_t *out)
{
	uint32_t n = j->nkeys * 2;
	uint32_t len = 4 + 4 * n + j->used;
	uint32_t header = j->nkeys | 0x20000000u;
	uint8_t *pos = out;

	if (len <= 126)
		*pos++ = (uint8_t) ((len + 1) << 1 | 1);
	else
	{
		uint32_t size = (len + 4) << 2;

		memcpy(pos, &size, 4);
		pos += 4;
	}
	memcpy(pos, &header, 4);
	memcpy(pos + 4, j->entries, 4 * n);
	memcpy(pos + 4 + 4 * n, j->data, j->used);
	return out;
}

/* ---- events ---- */

static const char *const event_types[20] = {
	"order_placed",		"order_paid",	   "order_shipped",	  "order_delivered",  "order_cancelled",
	"item_added",		"item_removed",	   "address_changed", "payment_failed",	  "payment_retried",
	"refund_requested", "refund_paid",	   "coupon_applied",  "invoice_sent",	  "invoice_paid",
	"reminder_sent",	"customer_called", "package_scanned", "package_returned", "order_closed"};
static const char *const statuses[6] = {"new", "paid", "packed", "shipped", "delivered", "cancelled"};
static const char *const names[12] = {"Anna",  "Bernd", "Carla", "Dieter", "Elena", "Frank",
									  "Gerda", "Heinz", "Irina", "Jonas",  "Klara", "Lukas"};
static const char *const channels[4] = {"web", "app", "store", "phone"};
static const char *const words[16] = {"urgent",	  "gift",  "fragile", "please", "leave", "at",
									  "the",	  "door",  "ring",	  "twice",	"call",	 "before",
									  "delivery", "thank", "you",	  "soon"};

enum
{
	C_CONTEXT,
	C_TYPE,
	C_RECORDED,
	C_AMOUNT,
	C_STATUS,
	C_PAYLOAD,
	C_VERSION,
	C_POSITION,
	NCOLS
};
static const char *const  column_names[NCOLS + 4] = {"context",		 "event_type", "recorded_at", "amount",
													 "status",		 "payload",	   "(version)",	  "(position)",
													 "content hash", "position",   "version",	  "fxid"};
static const EsColumnDesc columns[NCOLS] = {
	{-1, 4, 0}, {-1, 4, 0}, {8, 8, ES_COLUMN_BYVAL}, {8, 8, ES_COLUMN_BYVAL},
	{-1, 4, 0}, {-1, 4, 0}, {8, 8, ES_COLUMN_BYVAL}, {8, 8, ES_COLUMN_BYVAL}};

typedef struct Event
{
	uint64_t hash;
	uint32_t context;
	uint32_t position;
	uint32_t version;
	uint32_t fxid;
	int64_t	 recorded;
	uint64_t seed;
} Event;

static void *
text(uint8_t *out, const char *s)
{
	size_t len = strlen(s);

	out[0] = (uint8_t) ((len + 1) << 1 | 1);
	memcpy(out + 1, s, len);
	return out;
}

static void *
payload(uint64_t seed, uint32_t cents, const char *status, uint8_t *out)
{
	Jsonb j = {0};
	char  buf[64];

	/* keys by length, then bytes */
	jsonb_key(&j, "note");
	jsonb_key(&j, "items");
	jsonb_key(&j, "amount");
	jsonb_key(&j, "status");
	jsonb_key(&j, "channel");
	jsonb_key(&j, "currency");
	jsonb_key(&j, "customer");
	snprintf(buf, sizeof(buf), "%s %s %s", words[seed & 15], words[seed >> 4 & 15], words[seed >> 8 & 15]);
	jsonb_string(&j, buf);
	jsonb_numeric(&j, 100 * (1 + (uint32_t) (seed >> 12 & 7)));
	jsonb_numeric(&j, cents);
	jsonb_string(&j, status);
	jsonb_string(&j, channels[seed >> 15 & 3]);
	jsonb_string(&j, "EUR");
	snprintf(buf, sizeof(buf), "%s-%05u", names[seed >> 20 & 0x7fff ? (seed >> 20) % 12 : 0],
			 (uint32_t) (seed >> 24 & 0xffff));
	jsonb_string(&j, buf);
	return jsonb_finish(&j, out);
}

static int
compare_events(const void *a, const void *b)
{
	const Event *x = a;
	const Event *y = b;

	if (x->hash != y->hash)
		return x->hash < y->hash ? -1 : 1;
	return x->position < y->position ? -1 : 1;
}

typedef struct Buffers
{
	uint8_t		context[64];
	uint8_t		type[64];
	uint8_t		status[64];
	uint8_t		payload[2048] __attribute__((aligned(8)));
	int64_t		recorded;
	double		amount;
	const void *values[NCOLS];
} Buffers;

static size_t
fill(const Event *e, Buffers *b, EsSegmentRow *row)
{
	char	 name[32];
	uint32_t cents = (uint32_t) (e->seed >> 40) % 100000;

	snprintf(name, sizeof(name), "order-%08u", e->context);
	b->recorded = e->recorded;
	b->amount = cents / 100.0;
	b->values[C_CONTEXT] = text(b->context, name);
	b->values[C_TYPE] = text(b->type, event_types[(e->seed >> 3) % 20]);
	b->values[C_RECORDED] = &b->recorded;
	b->values[C_AMOUNT] = &b->amount;
	b->values[C_STATUS] = text(b->status, statuses[(e->seed >> 7) % 6]);
	b->values[C_PAYLOAD] = payload(e->seed, cents, statuses[(e->seed >> 7) % 6], b->payload);
	b->values[C_VERSION] = NULL;
	b->values[C_POSITION] = NULL;
	*row = (EsSegmentRow){.values = b->values,
						  .context_hash = e->hash,
						  .position = e->position,
						  .version = e->version,
						  .fxid = e->fxid};
	return es_varlena_size(b->values[C_PAYLOAD]);
}

static uint64_t
touch(const EsRowBlock *b, int column, uint32_t n)
{
	uint64_t sum = 0;

	for (uint32_t r = 0; r < n; r++)
		sum += *(const uint8_t *) es_block_value(b, column, r);
	return sum;
}

static void
scan(EsSegment *seg, const char *what, const bool *wanted, uint32_t hidden)
{
	EsRowBlock *b = es_block_create();
	double		start = now();
	uint64_t	rows = 0;
	uint64_t	sum = 0;
	EsError		err;

	while (now() - start < 1.0)
		for (uint32_t z = 0; z < es_segment_info(seg)->nzones; z++)
		{
			EsZoneInfo zone = es_segment_zone(seg, z);

			if (es_segment_read(seg, zone.first_row, zone.nrows, wanted, hidden, b, &err) != ES_OK)
				abort();
			for (int c = 0; c < NCOLS; c++)
				if (wanted[c] && c != C_VERSION && c != C_POSITION)
					sum += touch(b, c, zone.nrows);
			if (hidden & ES_WANT_POSITION)
				for (uint32_t r = 0; r < zone.nrows; r++)
					sum += es_block_position(b, r);
			rows += zone.nrows;
		}
	printf("scan %-32s %8.2f M rows/s   (%llu)\n", what, (double) rows / (now() - start) * 1e-6,
		   (unsigned long long) sum % 10);
	es_block_free(b);
}

static void
read_contexts(EsSegment *seg, const Event *events, uint32_t nevents, size_t cache, const char *what)
{
	EsRowBlock *b = es_block_create();
	uint32_t	n = 20000;
	uint64_t	rows = 0;
	uint64_t	sum = 0;
	double		start;
	EsError		err;

	es_segment_set_cache(seg, 0);
	es_segment_set_cache(seg, cache);
	nreads = read_bytes = 0;
	start = now();
	for (uint32_t i = 0; i < n; i++)
	{
		const Event *e = &events[rnd_below(nevents)];
		char		 name[32];
		int			 len = snprintf(name, sizeof(name), "order-%08u", e->context);
		uint64_t	 first;
		uint64_t	 nrows;
		uint32_t	 entry;

		if (es_segment_find_context(seg, e->hash, name, (size_t) len, &first, &nrows, &entry, &err) !=
				ES_OK ||
			nrows == 0)
			abort();
		while (nrows > 0)
		{
			uint32_t   z = es_segment_zone_of(seg, first);
			EsZoneInfo zone = es_segment_zone(seg, z);
			uint64_t   count = zone.first_row + zone.nrows - first;

			count = count < nrows ? count : nrows;
			if (es_segment_read(seg, first, (uint32_t) count, NULL, ES_WANT_ALL, b, &err) != ES_OK)
				abort();
			for (int c = 0; c < C_VERSION; c++)
				sum += touch(b, c, (uint32_t) count);
			rows += count;
			first += count;
			nrows -= count;
		}
	}
	printf("context %-29s %8.1f us, %4.1f rows, %4.1f reads, %6.1f KB read   (%llu)\n", what,
		   (now() - start) / n * 1e6, (double) rows / n, (double) nreads / n, (double) read_bytes / n / 1024,
		   (unsigned long long) sum % 10);
	es_block_free(b);
}

static void
miss_contexts(EsSegment *seg)
{
	uint32_t n = 1000000;
	double	 start = now();
	EsError	 err;

	es_segment_set_cache(seg, 64 << 20);
	for (uint32_t i = 0; i < n; i++)
	{
		uint64_t first;
		uint64_t nrows;
		uint32_t entry;

		if (es_segment_find_context(seg, rnd(), "x", 1, &first, &nrows, &entry, &err) != ES_OK || nrows != 0)
			abort();
	}
	printf("absent context %31.3f us\n", (now() - start) / n * 1e6);
}

int
main(int argc, char **argv)
{
	uint32_t		 n = argc > 1 ? (uint32_t) atoi(argv[1]) : 1000000;
	uint32_t		 per_context = argc > 2 ? (uint32_t) atoi(argv[2]) : 50;
	EsCodec			 codec = argc > 3 ? (argv[3][0] == 'z'	 ? ES_CODEC_ZSTD
										 : argv[3][0] == 'n' ? ES_CODEC_NONE
															 : ES_CODEC_LZ4)
									  : ES_CODEC_LZ4;
	int				 level = argc > 4 ? atoi(argv[4]) : 0;
	uint32_t		 ncontexts = n / per_context > 0 ? n / per_context : 1;
	Event			*events = calloc(n, sizeof(Event));
	uint32_t		*versions = calloc(ncontexts, sizeof(uint32_t));
	EsSegmentSpec	 spec = {.id = 1,
							 .columns = columns,
							 .ncols = NCOLS,
							 .codec = codec,
							 .zstd_level = level,
							 .roles = {.context = C_CONTEXT + 1,
									   .position = C_POSITION + 1,
									   .version = C_VERSION + 1,
									   .context_class = ES_CONTEXT_STRING}};
	char			 path[] = "/tmp/bench_segment.XXXXXX";
	int				 fd = mkstemp(path);
	EsSegmentWriter *w;
	EsSegmentSummary summary;
	EsSegment		*seg;
	EsSegmentRow	 row;
	Buffers			 b;
	EsError			 err;
	double			 start;
	double			 made;
	uint64_t		 payload_bytes = 0;
	bool			 wanted[NCOLS] = {false};
	int64_t			 t = INT64_C(780000000000000);

	unlink(path);
	for (uint32_t i = 0; i < n; i++)
	{
		Event *e = &events[i];
		char   name[32];
		int	   len;

		e->context = (uint32_t) rnd_below(ncontexts);
		len = snprintf(name, sizeof(name), "order-%08u", e->context);
		e->hash = es_context_hash(ES_CONTEXT_STRING, name, (size_t) len);
		e->position = 5000000 + i;
		e->version = ++versions[e->context];
		e->fxid = 90000 + i / 3;
		e->recorded = t += (int64_t) rnd_below(2000);
		e->seed = rnd();
	}
	qsort(events, n, sizeof(Event), compare_events);

	start = now();
	for (uint32_t i = 0; i < n; i++)
		payload_bytes += fill(&events[i], &b, &row);
	made = now() - start;

	start = now();
	if (es_segment_writer_create(&w, &spec, file_append, &fd) != ES_OK)
		abort();
	for (uint32_t i = 0; i < n; i++)
	{
		fill(&events[i], &b, &row);
		if (es_segment_writer_add(w, &row, &err) != ES_OK)
			abort();
	}
	if (es_segment_writer_finish(w, &summary, &err) != ES_OK)
		abort();
	es_segment_writer_free(w);
	printf("write %39.2f M rows/s, payload of %.0f bytes\n", n / (now() - start - made) * 1e-6,
		   (double) payload_bytes / n);

	start = now();
	if (es_segment_open(&seg, file_read, &fd, summary.file_len, &err) != ES_OK)
		abort();
	printf("open %38.0f us, %zu KB held\n", (now() - start) * 1e6, es_segment_memory(seg) / 1024);
	printf("%u rows, %llu contexts, raw %.1f bytes/row, file %.2f bytes/row\n", n,
		   (unsigned long long) summary.ncontexts, (double) summary.raw_bytes / n,
		   (double) summary.file_len / n);
	{
		uint64_t data = 0;
		uint64_t index = 0;
		uint64_t filter = 0;

		for (uint32_t c = 0; c < seg->nphysical; c++)
		{
			uint64_t bytes = 0;
			uint64_t pages = 0;

			for (uint32_t z = 0; z < seg->footer->nzones; z++)
			{
				const EsChunkEntry *chunk = es_segment_chunk(seg, z, c);

				if (es_chunk_has_pages(chunk))
				{
					bytes += chunk->stored_len;
					pages += chunk->npages;
				}
			}
			data += bytes;
			printf("  %-14s %8.3f bytes/row %6.1f pages/zone\n", column_names[c], (double) bytes / n,
				   (double) pages / seg->footer->nzones);
		}
		for (uint32_t i = 0; i < seg->footer->nindex; i++)
			index += seg->index[i].stored_len;
		for (uint32_t i = 0; i < seg->footer->nfilters; i++)
			filter += seg->filters[i].stored_len;
		printf("  %-14s %8.3f bytes/row\n  %-14s %8.3f bytes/row\n  %-14s %8.3f bytes/row\n", "index",
			   (double) index / n, "filter", (double) filter / n, "footer",
			   (double) (summary.file_len - data - index - filter) / n);
	}

	wanted[C_TYPE] = true;
	scan(seg, "event_type", wanted, 0);
	wanted[C_AMOUNT] = true;
	scan(seg, "event_type, amount", wanted, 0);
	wanted[C_STATUS] = wanted[C_RECORDED] = true;
	scan(seg, "4 columns, position", wanted, ES_WANT_POSITION);
	memset(wanted, true, sizeof(wanted));
	scan(seg, "all columns", wanted, ES_WANT_ALL);
	read_contexts(seg, events, n, 0, "without cache");
	read_contexts(seg, events, n, 1 << 20, "cache of 1 MB");
	read_contexts(seg, events, n, (size_t) 2 << 30, "all cached in the end");
	read_contexts(seg, events, n, (size_t) 2 << 30, "all cached in the end");
	miss_contexts(seg);
	es_segment_close(seg);
	close(fd);
	free(events);
	free(versions);
	return 0;
}
