/*
 * Row batches: what goes in comes out, sizes are exact, nothing malformed is opened.
 */
#include <sys/wait.h>
#include <unistd.h>

#include "core/batch.h"
#include "core/route.h"

#include "tap.h"

/* ---- rows to be compared with ---- */

/* A table of random rows; values as a caller of es_batch_add() has them. */
typedef struct Model
{
	int			  ncols;
	uint32_t	  nrows;
	uint32_t	  allocated; /* rows there are values for */
	EsColumnDesc *columns;
	bool		 *wanted;
	void		**values; /* nrows * ncols, NULL = NULL */
	uint64_t	 *ordinals;
	uint32_t	 *cids;
	uint64_t	 *positions;
	uint64_t	 *versions;
	EsBatchMeta	  meta;
} Model;

static void *
make_varlena(size_t len, bool short_header)
{
	char	*value = malloc(len + 4);
	uint32_t header = (uint32_t) (len + 4) << 2;

	if (short_header)
	{
		value[0] = (char) ((len + 1) << 1 | 1);
		rnd_bytes(value + 1, len);
	}
	else
	{
		memcpy(value, &header, 4);
		rnd_bytes(value + 4, len);
	}
	return value;
}

static void *
random_value(const EsColumnDesc *desc)
{
	size_t len;
	void  *value;

	if (desc->len > 0)
	{
		value = malloc((size_t) desc->len);
		rnd_bytes(value, (size_t) desc->len);
		return value;
	}
	switch (rnd_below(8))
	{
		case 0:
			len = 0;
			break;
		case 1:
			len = 120 + rnd_below(20); /* around the limit of short headers */
			break;
		case 2:
			len = rnd_below(5000);
			break;
		default:
			len = rnd_below(40);
	}
	return make_varlena(len, len <= 126 && rnd_below(2));
}

static EsColumnDesc
random_column(void)
{
	/* among them a timetz (12, 8), a macaddr (6, 4) and a name */
	static const EsColumnDesc shapes[] = {
		{1, 1, ES_COLUMN_BYVAL},
		{2, 2, ES_COLUMN_BYVAL},
		{4, 4, ES_COLUMN_BYVAL},
		{8, 8, ES_COLUMN_BYVAL},
		{16, 1, 0},
		{12, 8, 0},
		{6, 4, 0},
		{64, 1, 0},
		{24, 8, 0},
		{4, 8, 0},
		{3, 1, 0},
		{-1, 4, 0},
		{-1, 8, 0},
		{-1, 1, 0},
		{-1, 2, 0},
		{-1, 4, ES_COLUMN_PLAIN},
	};
	EsColumnDesc desc = shapes[rnd_below(sizeof(shapes) / sizeof(shapes[0]))];

	if (rnd_below(3) == 0)
		desc = rnd_below(2) ? (EsColumnDesc){-1, 4, 0} : (EsColumnDesc){8, 8, ES_COLUMN_BYVAL};
	if (rnd_below(12) == 0)
		desc.flags |= ES_COLUMN_DROPPED;
	return desc;
}

static Model *
model_create(int ncols, uint32_t nrows)
{
	Model	*m = calloc(1, sizeof(*m));
	int		 gaps = (int) rnd_below(2);
	uint64_t ordinal = rnd_below(2) ? 0 : rnd() >> 2;
	uint32_t cid = (uint32_t) rnd_below(5);

	m->ncols = ncols;
	m->nrows = nrows;
	m->allocated = nrows;
	m->columns = calloc((size_t) ncols + 1, sizeof(*m->columns));
	m->values = calloc((size_t) ncols * nrows + 1, sizeof(*m->values));
	m->ordinals = calloc(nrows + 1, sizeof(uint64_t));
	m->cids = calloc(nrows + 1, sizeof(uint32_t));
	m->positions = calloc(nrows + 1, sizeof(uint64_t));
	m->versions = calloc(nrows + 1, sizeof(uint64_t));
	if (rnd_below(3) == 0)
	{
		m->wanted = calloc((size_t) ncols + 1, sizeof(bool));
		for (int c = 0; c < ncols; c++)
			m->wanted[c] = rnd_below(2);
	}
	for (int c = 0; c < ncols; c++)
	{
		uint64_t pattern = rnd_below(8);

		m->columns[c] = random_column();
		for (uint32_t r = 0; r < nrows; r++)
		{
			bool null;

			switch (pattern)
			{
				case 0:
					null = true;
					break;
				case 1:
					null = rnd_below(2);
					break;
				case 2:
					null = r == 0;
					break;
				case 3:
					null = r == nrows - 1;
					break;
				case 4:
					null = r < nrows / 2;
					break;
				case 5:
					null = r % 16 < 8;
					break;
				default:
					null = false;
			}
			if (!null)
				m->values[(size_t) r * ncols + c] = random_value(&m->columns[c]);
		}
	}
	for (uint32_t r = 0; r < nrows; r++)
	{
		m->ordinals[r] = ordinal;
		ordinal += 1 + (gaps ? rnd_below(3) : 0);
		m->cids[r] = cid;
		if (rnd_below(20) == 0)
			cid += (uint32_t) rnd_below(2);
		m->positions[r] = rnd();
		m->versions[r] = rnd();
	}
	m->meta.table = (EsTableKey){.storage_id = rnd(), .database = (uint32_t) rnd()};
	m->meta.relid = (uint32_t) rnd();
	m->meta.subid = (uint32_t) rnd();
	m->meta.flags = ES_BATCH_HAS_EVENT_IDS;
	m->meta.with_positions = rnd_below(2);
	return m;
}

static void
model_free(Model *m)
{
	for (size_t i = 0; i < (size_t) m->ncols * m->allocated; i++)
		free(m->values[i]);
	free(m->columns);
	free(m->wanted);
	free(m->values);
	free(m->ordinals);
	free(m->cids);
	free(m->positions);
	free(m->versions);
	free(m);
}

static EsStatus
model_add(const Model *m, EsBatchBuilder *b, uint32_t row)
{
	return es_batch_add(b, (const void *const *) m->values + (size_t) row * m->ncols, m->ordinals[row],
						m->cids[row], m->positions[row], m->versions[row]);
}

/* The finished batch, in memory of exactly its size. */
static void *
finish(EsBatchBuilder *b, size_t *len)
{
	void *buf;

	*len = es_batch_size(b);
	buf = malloc(*len);
	memset(buf, 0xa5, *len < 1000000 ? *len : 1000000);
	CHECK(es_batch_finish(b, buf, *len) == ES_OK);
	return buf;
}

static void *
model_batch(const Model *m, EsBatchBuilder *b, size_t *len)
{
	es_batch_reset(b, &m->meta);
	for (uint32_t r = 0; r < m->nrows; r++)
		CHECK(model_add(m, b, r) == ES_OK);
	return finish(b, len);
}

/* Are the two values the same data, with the header that the batch should have made of it? */
static bool
value_matches(const EsColumnDesc *desc, const void *given, const void *stored)
{
	const char *data1;
	const char *data2;
	size_t		len1;
	size_t		len2;
	bool		short_header;

	if (desc->len > 0)
		return (uintptr_t) stored % desc->align == 0 && memcmp(given, stored, (size_t) desc->len) == 0;
	es_varlena_data(given, &data1, &len1);
	es_varlena_data(stored, &data2, &len2);
	short_header = es_varlena_is_short(given) || (len1 <= 126 && !(desc->flags & ES_COLUMN_PLAIN));
	return len1 == len2 && memcmp(data1, data2, len1) == 0 && es_varlena_is_short(stored) == short_header &&
		   (short_header || (uintptr_t) stored % desc->align == 0);
}

static void
check_batch(const Model *m, const void *buf, size_t len)
{
	EsBatchView v;
	EsBatchView trusted;
	EsError		err;

	if (!CHECK(es_batch_open(buf, len, &v, &err) == ES_OK))
	{
		printf("# %s\n", err.what);
		return;
	}
	es_batch_open_trusted(buf, &trusted);
	CHECK(v.header == trusted.header && v.columns == trusted.columns && v.base == trusted.base &&
		  v.ordinals == trusted.ordinals && v.cids == trusted.cids && v.positions == trusted.positions &&
		  v.versions == trusted.versions);
	CHECK(v.header->nrows == m->nrows && v.header->ncols == m->ncols && v.header->total_len == len);
	CHECK(es_table_key_equal(&v.header->table, &m->meta.table));
	CHECK(v.header->relid == m->meta.relid && v.header->subid == m->meta.subid &&
		  v.header->flags == m->meta.flags);
	CHECK((v.positions != NULL) == m->meta.with_positions);
	CHECK(es_batch_is_null(&v, m->ncols, 0));
	for (uint32_t r = 0; r < m->nrows; r++)
	{
		CHECK(es_batch_ordinal(&v, r) == m->ordinals[r] && es_batch_cid(&v, r) == m->cids[r]);
		if (m->meta.with_positions)
			CHECK(v.positions[r] == m->positions[r] && v.versions[r] == m->versions[r]);
		for (int c = 0; c < m->ncols; c++)
		{
			const void *given = m->values[(size_t) r * m->ncols + c];

			if ((m->wanted && !m->wanted[c]) || (m->columns[c].flags & ES_COLUMN_DROPPED))
				given = NULL;
			if (CHECK(es_batch_is_null(&v, c, r) == (given == NULL)) && given != NULL)
				CHECK(value_matches(&m->columns[c], given, es_batch_value(&v, c, r)));
		}
	}
	for (int c = 0; c < m->ncols; c++)
		CHECK(((v.columns[c].flags & ES_BATCH_COLUMN_ABSENT) != 0) == (m->wanted && !m->wanted[c]));
}

/* ---- promises ---- */

static void
test_round_trip(void)
{
	PROMISE(
		"rows come out of a batch as they went in: all widths, NULL patterns, projections, dropped columns");
	for (int i = 0; i < 400; i++)
	{
		Model		   *m = model_create((int) rnd_below(24), (uint32_t) rnd_below(i % 20 == 0 ? 700 : 40));
		EsBatchBuilder *b = es_batch_create(m->columns, m->ncols, m->wanted);
		size_t			len;
		void		   *buf = model_batch(m, b, &len);

		check_batch(m, buf, len);
		free(buf);
		es_batch_free(b);
		model_free(m);
	}
}

static void
test_many_columns(void)
{
	PROMISE("a batch takes 1600 columns and the hidden one");
	for (uint32_t nrows = 1; nrows < 20; nrows += 6)
	{
		Model		   *m = model_create(ES_MAX_COLUMNS + 1, nrows);
		EsBatchBuilder *b = es_batch_create(m->columns, m->ncols, m->wanted);
		size_t			len;
		void		   *buf = model_batch(m, b, &len);

		check_batch(m, buf, len);
		free(buf);
		es_batch_free(b);
		model_free(m);
	}
	CHECK(es_batch_create(&(EsColumnDesc){8, 8, 0}, ES_MAX_COLUMNS + 2, NULL) == NULL);

	/* one more, put there by hand */
	for (uint16_t ncols = ES_MAX_COLUMNS + 1; ncols <= ES_MAX_COLUMNS + 2; ncols++)
	{
		size_t		   len = sizeof(EsBatchHeader) + ncols * sizeof(EsBatchColumn);
		EsBatchHeader *h = calloc(1, len);
		EsBatchColumn *c = (EsBatchColumn *) (h + 1);
		EsBatchView	   v;

		h->magic = ES_BATCH_MAGIC;
		h->total_len = (uint32_t) len;
		h->ncols = ncols;
		for (int i = 0; i < ncols; i++)
			c[i] = (EsBatchColumn){.desc = {8, 8, 0}, .flags = ES_BATCH_COLUMN_ABSENT};
		CHECK(es_batch_open(h, len, &v, NULL) == (ncols <= ES_MAX_COLUMNS + 1 ? ES_OK : ES_ERR_CORRUPT));
		free(h);
	}
}

static void
test_many_rows(void)
{
	Model		   *m;
	EsBatchBuilder *b;
	size_t			len;
	void		   *buf;

	PROMISE("a batch takes 100,000 rows");
	m = model_create(6, 100000);
	b = es_batch_create(m->columns, m->ncols, m->wanted);
	buf = model_batch(m, b, &len);
	check_batch(m, buf, len);
	free(buf);
	es_batch_free(b);
	model_free(m);
}

static void
test_exact_size(void)
{
	PROMISE("es_batch_size says after each row what es_batch_finish will write, and finish writes no more");
	for (int i = 0; i < 60; i++)
	{
		Model		   *m = model_create((int) rnd_below(12), (uint32_t) rnd_below(30));
		EsBatchBuilder *b = es_batch_create(m->columns, m->ncols, m->wanted);

		es_batch_reset(b, &m->meta);
		for (uint32_t r = 0; r <= m->nrows; r++)
		{
			size_t len;
			void  *buf = finish(b, &len); /* ASan sees one byte too many */

			CHECK(((EsBatchHeader *) buf)->total_len == len && len % 8 == 0);
			CHECK(es_batch_nrows(b) == r);
			CHECK(es_batch_finish(b, buf, len - 1) == ES_ERR_ARGUMENT);
			free(buf);
			if (r < m->nrows)
				CHECK(model_add(m, b, r) == ES_OK);
		}
		es_batch_free(b);
		model_free(m);
	}
}

static void
test_reuse(void)
{
	PROMISE("a builder that is used again builds the same bytes as a new one");
	for (int i = 0; i < 40; i++)
	{
		Model		   *m = model_create((int) rnd_below(12), (uint32_t) rnd_below(300));
		EsBatchBuilder *used = es_batch_create(m->columns, m->ncols, NULL);
		EsBatchBuilder *fresh = es_batch_create(m->columns, m->ncols, NULL);
		size_t			len1;
		size_t			len2;
		void		   *buf1;
		void		   *buf2;

		free(model_batch(m, used, &len1));
		m->nrows = m->nrows / 3;
		buf1 = model_batch(m, used, &len1);
		buf2 = model_batch(m, fresh, &len2);
		CHECK(len1 == len2 && memcmp(buf1, buf2, len1) == 0);
		free(buf1);
		free(buf2);
		es_batch_free(used);
		es_batch_free(fresh);
		model_free(m);
	}
}

static void
test_memory_returned(void)
{
	EsColumnDesc	text = {-1, 4, 0};
	EsBatchBuilder *b = es_batch_create(&text, 1, NULL);
	EsBatchMeta		meta = {0};
	const void	   *value;
	void		   *large;

	PROMISE("a builder that held a large value works on after giving its memory back");
	large = make_varlena(3000000, false);
	for (int i = 0; i < 3; i++)
	{
		size_t len;
		void  *buf;

		es_batch_reset(b, &meta);
		value = large;
		CHECK(es_batch_add(b, &value, 0, 0, 0, 0) == ES_OK);
		es_batch_reset(b, &meta);
		for (uint64_t r = 0; r < 100; r++)
		{
			value = r % 3 ? "\x09"
							"abc"
						  : NULL;
			CHECK(es_batch_add(b, &value, r, 0, 0, 0) == ES_OK);
		}
		buf = finish(b, &len);
		CHECK(len < 2000);
		free(buf);
	}
	free(large);
	es_batch_free(b);
}

static void
test_failed_add(void)
{
	PROMISE("a row that is refused leaves the builder as it was");
	for (int i = 0; i < 150; i++)
	{
		Model				 *m = model_create(1 + (int) rnd_below(12), 1 + (uint32_t) rnd_below(40));
		EsBatchBuilder		 *disturbed;
		EsBatchBuilder		 *plain;
		const void			**bad = malloc((size_t) m->ncols * sizeof(*bad));
		int					  victim = (int) rnd_below((uint64_t) m->ncols);
		size_t				  len1;
		size_t				  len2;
		void				 *buf1;
		void				 *buf2;
		static const uint32_t malformed[] = {
			0x01,		  /* external */
			100 << 2 | 2, /* compressed */
			3 << 2,		  /* shorter than its header */
			0,
		};

		free(m->wanted);
		m->wanted = NULL;
		m->columns[victim] = (EsColumnDesc){-1, 4, 0};
		for (uint32_t r = 0; r < m->nrows; r++)
		{
			void **value = &m->values[(size_t) r * m->ncols + victim];

			free(*value);
			*value = r % 5 ? random_value(&m->columns[victim]) : NULL;
		}
		disturbed = es_batch_create(m->columns, m->ncols, NULL);
		plain = es_batch_create(m->columns, m->ncols, NULL);
		es_batch_reset(disturbed, &m->meta);
		for (uint32_t r = 0; r < m->nrows; r++)
		{
			for (uint64_t tries = rnd_below(3); tries > 0; tries--)
			{
				for (int c = 0; c < m->ncols; c++)
					bad[c] = m->values[rnd_below(m->nrows) * m->ncols + c];
				bad[victim] = &malformed[rnd_below(4)];
				CHECK(es_batch_add(disturbed, bad, m->ordinals[r], m->cids[r] + 1, 0, 0) == ES_ERR_ARGUMENT);
			}
			CHECK(model_add(m, disturbed, r) == ES_OK);
			CHECK(model_add(m, disturbed, r) == ES_ERR_ARGUMENT); /* ordinals grow */
		}
		buf1 = finish(disturbed, &len1);
		buf2 = model_batch(m, plain, &len2);
		CHECK(len1 == len2 && memcmp(buf1, buf2, len1) == 0);
		check_batch(m, buf1, len1);
		free(buf1);
		free(buf2);
		free(bad);
		es_batch_free(disturbed);
		es_batch_free(plain);
		model_free(m);
	}
}

static void
test_limits(void)
{
	EsColumnDesc	columns[3] = {{-1, 4, 0}, {-1, 4, 0}, {1, 1, 0}};
	EsBatchBuilder *b = es_batch_create(columns, 3, NULL);
	EsBatchMeta		meta = {0};
	uint32_t		header = UINT32_C(0x3fffffff) << 2;
	const void	   *values[3];
	char		   *gigabyte = calloc(1, 0x3fffffff);
	EsBatchView		v;
	void		   *buf;
	size_t			len;

	PROMISE(
		"a batch takes the largest value there is, stops at 2 GB, at 2^20 rows and where ordinals are too far apart");
	memcpy(gigabyte, &header, 4);
	gigabyte[0x3ffffffe] = 'z';
	es_batch_reset(b, &meta);
	values[0] = gigabyte;
	values[1] = NULL;
	values[2] = "x";

	/* rows that were refused do not count */
	values[1] = "\x01";
	for (int i = 0; i < 3; i++)
		CHECK(es_batch_add(b, values, 0, 0, 0, 0) == ES_ERR_ARGUMENT);
	values[1] = NULL;
	CHECK(es_batch_add(b, values, 0, 0, 0, 0) == ES_OK);
	len = es_batch_size(b);
	/* each of the two would fit alone: it is their sum that does not */
	CHECK(es_batch_add(b, values, 1, 0, 0, 0) == ES_ERR_TOO_LARGE);
	values[0] = NULL;
	values[1] = gigabyte;
	CHECK(es_batch_add(b, values, 1, 0, 0, 0) == ES_ERR_TOO_LARGE);
	CHECK(es_batch_nrows(b) == 1 && es_batch_size(b) == len);
	buf = finish(b, &len);
	CHECK(es_batch_open(buf, len, &v, NULL) == ES_OK);
	CHECK(memcmp(es_batch_value(&v, 0, 0), gigabyte, 0x3fffffff) == 0);
	free(buf);
	free(gigabyte);

	es_batch_reset(b, &meta);
	values[0] = values[1] = NULL;
	for (uint64_t r = 0; r < ES_BATCH_MAX_ROWS; r++)
		if (!CHECK(es_batch_add(b, values, r, 0, 0, 0) == ES_OK))
			break;
	CHECK(es_batch_add(b, values, ES_BATCH_MAX_ROWS, 0, 0, 0) == ES_ERR_TOO_LARGE);
	buf = finish(b, &len);
	CHECK(es_batch_open(buf, len, &v, NULL) == ES_OK && v.header->nrows == ES_BATCH_MAX_ROWS);
	free(buf);

	es_batch_reset(b, &meta);
	CHECK(es_batch_add(b, values, 7, 0, 0, 0) == ES_OK);
	CHECK(es_batch_add(b, values, UINT64_C(8) + UINT32_MAX, 0, 0, 0) == ES_ERR_TOO_LARGE);
	CHECK(es_batch_add(b, values, UINT64_C(7) + UINT32_MAX, 0, 0, 0) == ES_OK);
	es_batch_free(b);
}

/* The part of test_out_of_memory that runs where malloc gives no more than 8 MB at once. */
static int
out_of_memory(void)
{
	EsColumnDesc	columns[3] = {{8, 8, 0}, {-1, 4, 0}, {4, 4, 0}};
	EsBatchBuilder *b = es_batch_create(columns, 3, NULL);
	EsBatchMeta		meta = {0};
	void		   *large = make_varlena(1000000, false);
	uint64_t		eight = 8;
	uint32_t		four = 4;
	const void	   *values[3] = {&eight, large, &four};
	uint64_t		rows = 0;
	EsStatus		status = ES_OK;
	EsBatchView		v;
	void		   *buf;
	size_t			len;

	es_batch_reset(b, &meta);
	while (rows < 100 && (status = es_batch_add(b, values, rows, 0, 0, 0)) == ES_OK)
		rows++;
	if (status != ES_ERR_NOMEM || rows < 4 || es_batch_nrows(b) != rows)
		return 2;
	/* a small row still fits */
	values[1] = NULL;
	if (es_batch_add(b, values, rows, 0, 0, 0) != ES_OK)
		return 3;
	len = es_batch_size(b);
	buf = malloc(len);
	if (buf == NULL || es_batch_finish(b, buf, len) != ES_OK || es_batch_open(buf, len, &v, NULL) != ES_OK)
		return 4;
	for (uint32_t r = 0; r < rows; r++)
		if (memcmp(es_batch_value(&v, 1, r), large, 1000004) != 0)
			return 5;
	free(buf);
	free(large);
	es_batch_free(b);
	return 0;
}

static void
test_out_of_memory(const char *program)
{
	pid_t child;
	int	  status = -1;

	PROMISE("a row for which there is no memory leaves the builder as it was");
	fflush(stdout);
	child = fork();
	if (child == 0)
	{
		setenv("ASAN_OPTIONS", "allocator_may_return_null=1:max_allocation_size_mb=8", 1);
		execl(program, program, "--out-of-memory", (char *) NULL);
		_exit(99);
	}
	CHECK(waitpid(child, &status, 0) == child && status == 0);
}

/* Follows everything that the accessors give; ASan sees a step outside. */
static uint64_t
walk(const EsBatchView *v)
{
	uint64_t sum = 0;

	for (uint32_t r = 0; r < v->header->nrows; r++)
	{
		sum += es_batch_ordinal(v, r) + es_batch_cid(v, r) + es_batch_context_hash(v, r);
		if (v->positions)
			sum += v->positions[r];
		if (v->versions)
			sum += v->versions[r];
		for (int c = 0; c < v->header->ncols; c++)
		{
			const unsigned char *value;
			size_t				 len;

			if (es_batch_is_null(v, c, r))
				continue;
			value = es_batch_value(v, c, r);
			len = v->columns[c].desc.len > 0 ? (size_t) v->columns[c].desc.len : es_varlena_size(value);
			for (size_t i = 0; i < len; i++)
				sum = sum * 31 + value[i];
			if (v->columns[c].desc.len > 0 || !es_varlena_is_short(value))
				CHECK((uintptr_t) value % v->columns[c].desc.align == 0);
		}
	}
	return sum;
}

static Model *
model_with_roles(uint32_t nrows)
{
	Model *m = model_create(7, nrows);

	m->columns[0] = (EsColumnDesc){-1, 4, 0};
	m->columns[1] = (EsColumnDesc){8, 8, ES_COLUMN_BYVAL};
	m->columns[2] = (EsColumnDesc){16, 1, 0};
	for (size_t i = 0; i < (size_t) nrows * 7; i++)
	{
		free(m->values[i]);
		m->values[i] = i % 7 == 0 || rnd_below(4) ? random_value(&m->columns[i % 7]) : NULL;
	}
	m->meta.roles = (EsRoles){.context = 1, .position = 2, .event_id = 3, .context_class = ES_CONTEXT_STRING};
	return m;
}

static void
test_malformed(void)
{
	uint64_t sum = 0;
	unsigned opened = 0;
	unsigned refused = 0;

	PROMISE("a batch with changed bytes is refused or can be read without leaving it");
	for (int i = 0; i < 30; i++)
	{
		Model		   *m = model_with_roles(1 + (uint32_t) rnd_below(12));
		EsBatchBuilder *b = es_batch_create(m->columns, m->ncols, m->wanted);
		size_t			len;
		unsigned char  *buf = model_batch(m, b, &len);
		EsBatchView		v;

		CHECK(es_batch_open(buf, len, &v, NULL) == ES_OK);
		for (size_t at = 0; at < len + 3000; at++)
		{
			unsigned char *copy = exact_copy(buf, len);

			if (at < len)
				copy[at] ^= (unsigned char) (1 << rnd_below(8));
			else
				for (uint64_t n = 1 + rnd_below(4); n > 0; n--)
				{
					/* offsets and lengths are what matters: small and large numbers */
					uint32_t word = rnd_below(2) ? (uint32_t) rnd_below(len + 8) : (uint32_t) rnd();

					memcpy(copy + rnd_below(len / 4) * 4, &word, 4);
				}
			if (es_batch_open(copy, len, &v, NULL) == ES_OK)
			{
				sum += walk(&v);
				opened++;
			}
			else
				refused++;
			free(copy);
		}
		free(buf);
		es_batch_free(b);
		model_free(m);
	}
	/* both must happen, or the test is none */
	CHECK(opened > 1000 && refused > 1000 && sum != 1);
}

static void
test_truncated(void)
{
	PROMISE("a batch that ends too early is refused at every length");
	for (int i = 0; i < 20; i++)
	{
		Model		   *m = model_with_roles((uint32_t) rnd_below(12));
		EsBatchBuilder *b = es_batch_create(m->columns, m->ncols, m->wanted);
		size_t			len;
		void		   *buf = model_batch(m, b, &len);

		for (size_t n = 0; n < len; n++)
		{
			void	   *copy = exact_copy(buf, n);
			EsBatchView v;

			CHECK(es_batch_open(copy, n, &v, NULL) == ES_ERR_TRUNCATED);

			/* also if it says itself that it is so short */
			if (n >= sizeof(EsBatchHeader))
			{
				((EsBatchHeader *) copy)->total_len = (uint32_t) n;
				if (n % 8 != 0)
					CHECK(es_batch_open(copy, n, &v, NULL) == ES_ERR_CORRUPT);
				else if (es_batch_open(copy, n, &v, NULL) == ES_OK)
					walk(&v);
			}
			free(copy);
		}
		free(buf);
		es_batch_free(b);
		model_free(m);
	}
}

/* A batch of one column and two rows with known offsets, to be damaged on purpose. */
static void
test_refused(void)
{
	EsColumnDesc	text = {-1, 4, 0};
	EsBatchBuilder *b = es_batch_create(&text, 1, NULL);
	EsBatchMeta		meta = {.roles = {.context = 1, .context_class = ES_CONTEXT_STRING}};
	char			value4[256 + 4];
	const void	   *value;
	uint32_t		header = (256 + 4) << 2;
	size_t			len;
	void		   *good;
	EsBatchView		v;

	PROMISE(
		"external, compressed, misaligned and overlong values, false roles, flags and ordinals are refused");
	memset(value4, 'v', sizeof(value4));
	memcpy(value4, &header, 4);
	es_batch_reset(b, &meta);
	value = "\x07"
			"ab";
	CHECK(es_batch_add(b, &value, 5, 0, 0, 0) == ES_OK);
	value = value4;
	CHECK(es_batch_add(b, &value, 9, 0, 0, 0) == ES_OK);
	good = finish(b, &len);
	CHECK(es_batch_open(good, len, &v, NULL) == ES_OK);

	/* Changes a copy by `change` and says what opening it gives. */
#define DAMAGED(change)                                                          \
	do                                                                           \
	{                                                                            \
		char		  *buf = exact_copy(good, len);                              \
		EsBatchHeader *h = (EsBatchHeader *) buf;                                \
		EsBatchColumn *c = (EsBatchColumn *) (h + 1);                            \
		uint32_t	  *offsets = (uint32_t *) (buf + c->off_data);               \
		unsigned char *first = (unsigned char *) buf + c->off_data + offsets[0]; \
		uint32_t	  *second = (uint32_t *) (buf + c->off_data + offsets[1]);   \
		uint32_t	  *ordinals = (uint32_t *) (buf + h->off_ordinals);          \
		(void) h, (void) first, (void) second, (void) ordinals;                  \
		change;                                                                  \
		CHECK(es_batch_open(buf, len, &v, NULL) == ES_ERR_CORRUPT);              \
		free(buf);                                                               \
	} while (0)

	DAMAGED(*first = 0x01);
	DAMAGED(*second = *second | 2);
	DAMAGED(*second = 3 << 2);
	DAMAGED(*second = *second + (1 << 2));
	DAMAGED(*second = UINT32_C(0xfffffffc));
	DAMAGED(offsets[0] = 7);				   /* among the offsets */
	DAMAGED((offsets[0] = 4, offsets[1] = 9)); /* among the offsets, where a short value seems to be */
	DAMAGED(offsets[0] = c->data_len);
	/* read, these would be behind the end of the batch */
	DAMAGED((c->off_data = (uint32_t) len, c->data_len = 0));
	DAMAGED((c->desc.align = 1, offsets[1] = c->data_len - 1, buf[len - 1] = 16));
	DAMAGED(offsets[0] = UINT32_MAX);
	DAMAGED((offsets[1] = c->data_len - 1, buf[c->off_data + offsets[1]] = 2 << 1 | 1));
	DAMAGED((memmove((char *) second - 1, second, 260), offsets[1] -= 1));
	DAMAGED(c->off_data += 2);
	DAMAGED(c->off_data = 0);
	DAMAGED(c->data_len = 7);
	DAMAGED(c->data_len = UINT32_MAX);
	DAMAGED(c->off_nulls = (uint32_t) len);
	DAMAGED(c->flags = ES_BATCH_COLUMN_ALL_NULL);
	DAMAGED(c->flags = 4);
	DAMAGED(c->desc.align = 3);
	DAMAGED(c->desc.align = 0);
	DAMAGED(c->desc.len = 0);
	DAMAGED(c->desc.len = -2);
	DAMAGED(h->magic++);
	DAMAGED(h->flags = 0x8000);
	DAMAGED(h->flags = ES_BATCH_HAS_CONTENT_HASH);
	DAMAGED(h->nrows = ES_BATCH_MAX_ROWS + 1);
	DAMAGED((h->ncols = 0, h->off_ordinals = 0, memset(&h->roles, 0, sizeof(h->roles)),
			 h->nrows = ES_BATCH_MAX_ROWS + 1));
	DAMAGED(h->nrows++);
	DAMAGED(h->ncols = UINT16_MAX);
	DAMAGED(h->roles.context = 2);
	DAMAGED(h->roles.context = -1);
	DAMAGED(h->roles.context_class = 9);
	DAMAGED(h->roles.context_class = ES_CONTEXT_UUID);
	DAMAGED(h->roles.reserved = 1);
	DAMAGED(h->roles.position = 1);
	DAMAGED(h->roles.version = 1);
	DAMAGED(h->roles.event_id = 1);
	DAMAGED(h->reserved = 1);
	DAMAGED(h->table.reserved = 1);
	DAMAGED(h->off_cids = (uint32_t) len - 4);
	DAMAGED(h->off_positions = h->off_ordinals + 4);
	DAMAGED(h->off_versions = 8);
	DAMAGED(h->first_ordinal = UINT64_MAX);
	DAMAGED(ordinals[1] = ordinals[0]);
#undef DAMAGED
	CHECK(es_batch_open((char *) good + 4, len, &v, NULL) == ES_ERR_ARGUMENT);
	free(good);
	es_batch_free(b);
}

static void
test_context(void)
{
	EsColumnDesc	columns[2] = {{4, 4, ES_COLUMN_BYVAL}, {-1, 4, 0}};
	EsBatchBuilder *b = es_batch_create(columns, 2, NULL);
	EsBatchMeta		meta = {0};
	int32_t			number = 17;
	int64_t			wide = 17;
	const void	   *values[2] = {&number, "\x0b"
											  "abcd"};
	EsBatchView		v;
	size_t			len;
	void		   *buf;

	PROMISE("a row's context hash is that of its context's canonical bytes");
	for (int pass = 0; pass < 3; pass++)
	{
		if (pass == 1)
			meta.roles = (EsRoles){.context = 1, .context_class = ES_CONTEXT_INTEGER};
		if (pass == 2)
			meta.roles = (EsRoles){.context = 2, .context_class = ES_CONTEXT_STRING};
		es_batch_reset(b, &meta);
		CHECK(es_batch_add(b, values, 0, 0, 0, 0) == ES_OK);
		buf = finish(b, &len);
		CHECK(es_batch_open(buf, len, &v, NULL) == ES_OK);
		if (pass == 0)
			CHECK(es_batch_context_hash(&v, 0) == 0);
		if (pass == 1)
			CHECK(es_batch_context_hash(&v, 0) == es_context_hash(ES_CONTEXT_INTEGER, &wide, 8));
		if (pass == 2)
			CHECK(es_batch_context_hash(&v, 0) == es_context_hash(ES_CONTEXT_STRING, "abcd", 4));
		free(buf);
	}
	es_batch_free(b);
}

static void
test_context_widths(void)
{
	static const int16_t	 widths[] = {-1, 1, 2, 4, 8, 16, 64};
	static const char *const fits[] = {/* -1, 1, 2, 4, 8, 16, 64 for each class from 1 */
									   "yyyyyyy", "ynnnnnn", "nnyyynn", "nnnnnyn",
									   "nnnynnn", "nnnnynn", "nynnnnn", "nnnynnn"};

	PROMISE("a batch whose context column has not the width of its class is refused");
	for (int klass = ES_CONTEXT_STRING; klass <= ES_CONTEXT_ENUM; klass++)
		for (int i = 0; i < 7; i++)
		{
			EsColumnDesc	column = {widths[i], 1, 0};
			EsBatchBuilder *b = es_batch_create(&column, 1, NULL);
			EsBatchMeta		meta = {.roles = {.context = 1, .context_class = (uint8_t) klass}};
			EsBatchView		v;
			size_t			len;
			void		   *buf;

			es_batch_reset(b, &meta);
			buf = finish(b, &len);
			CHECK(es_batch_open(buf, len, &v, NULL) == (fits[klass - 1][i] == 'y' ? ES_OK : ES_ERR_CORRUPT));
			free(buf);
			es_batch_free(b);
		}
}

static void
test_frozen(void)
{
	EsColumnDesc columns[5] = {
		{-1, 4, 0}, {8, 8, ES_COLUMN_BYVAL}, {16, 1, 0}, {4, 4, ES_COLUMN_BYVAL}, {-1, 4, 0}};
	EsBatchBuilder *b = es_batch_create(columns, 5, NULL);
	EsBatchMeta		meta = {
			.table = {.storage_id = 77, .database = 5},
			.roles = {.context = 1, .position = 2, .event_id = 3, .context_class = ES_CONTEXT_STRING},
			.relid = 16384,
			.subid = 1,
			.flags = ES_BATCH_HAS_EVENT_IDS};
	char		text[300];
	uint32_t	header = sizeof(text) << 2;
	int32_t		number = -2;
	const void *row1[5] = {"\x13"
						   "order-17",
						   NULL, "0123456789abcdef", &number, NULL};
	const void *row2[5] = {"\x13"
						   "order-18",
						   NULL, NULL, &number, text};
	size_t		len;
	void	   *buf;
	EsBatchView v;
	uint32_t	crc;

	PROMISE("the bytes of a batch are frozen with the format, and the frozen ones can be read");
	memset(text, 't', sizeof(text));
	memcpy(text, &header, 4);
	es_batch_reset(b, &meta);
	CHECK(es_batch_add(b, row1, 3, 1, 0, 0) == ES_OK);
	CHECK(es_batch_add(b, row2, 5, 2, 0, 0) == ES_OK);
	buf = finish(b, &len);
	crc = es_crc32c(0, buf, len);
	if (!CHECK(len == 608 && crc == UINT32_C(0xeecf1df3)))
		printf("# len == %zu && crc == UINT32_C(0x%08x)\n", len, crc);
	CHECK(es_batch_open(buf, len, &v, NULL) == ES_OK);
	free(buf);
	es_batch_free(b);
}

int
main(int argc, char **argv)
{
	if (argc > 1)
		return out_of_memory();
	test_round_trip();
	test_many_columns();
	test_many_rows();
	test_exact_size();
	test_reuse();
	test_memory_returned();
	test_failed_add();
	test_limits();
	test_out_of_memory(argv[0]);
	test_malformed();
	test_truncated();
	test_refused();
	test_context();
	test_context_widths();
	test_frozen();
	return done();
}
