/*-------------------------------------------------------------------------
 *
 * segment_model.h
 *	  Tables of random rows in plain memory, and segments made from them in
 *	  memory files: what the tests of segments compare with.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_TEST_SEGMENT_MODEL_H
#define ES_TEST_SEGMENT_MODEL_H

#include "core/route.h"
#include "core/segment.h"

#include "tap.h"

/* ---- files in memory ---- */

typedef struct MemFile
{
	uint8_t *data;
	size_t	 len;
	size_t	 room;
	size_t	 fail_at; /* appends beyond this fail; 0 = none */
	uint64_t reads;
	uint64_t bytes_read;
} MemFile;

static inline EsStatus
mem_append(void *arg, const void *buf, size_t len, EsError *err)
{
	MemFile *f = arg;

	if (f->fail_at != 0 && f->len + len > f->fail_at)
		return es_fail(err, ES_ERR_IO, f->len, "no space left in memory file");
	if (f->len + len > f->room)
	{
		f->room = (f->len + len) * 2;
		f->data = realloc(f->data, f->room);
		if (f->data == NULL)
			abort();
	}
	memcpy(f->data + f->len, buf, len);
	f->len += len;
	return ES_OK;
}

static inline EsStatus
mem_read(void *arg, void *buf, size_t len, uint64_t offset, EsError *err)
{
	MemFile *f = arg;

	if (offset > f->len || len > f->len - offset)
		return es_fail(err, ES_ERR_TRUNCATED, offset, "memory file ends");
	memcpy(buf, f->data + offset, len);
	f->reads++;
	f->bytes_read += len;
	return ES_OK;
}

static inline void
mem_free(MemFile *f)
{
	free(f->data);
	memset(f, 0, sizeof(*f));
}

/* ---- rows ---- */

typedef struct ModelRow
{
	void   **values; /* ncols, malloc'd, NULL = NULL */
	uint64_t hash;
	uint8_t *context; /* canonical bytes */
	size_t	 context_len;
	uint64_t position;
	uint64_t version;
	uint64_t fxid;
	uint8_t	 content_hash[16];
	bool	 has_content_hash;
} ModelRow;

typedef struct Model
{
	EsSegmentSpec spec;
	EsColumnDesc *columns;
	int			  ncols;
	ModelRow	 *rows;
	uint32_t	  nrows;
} Model;

/* A varlena of len bytes of data; short header if asked for and possible. */
static inline void *
make_varlena(const void *data, size_t len, bool short_header)
{
	uint8_t *value;

	if (short_header && len <= 126)
	{
		value = malloc(len + 1);
		value[0] = (uint8_t) ((len + 1) << 1 | 1);
		memcpy(value + 1, data, len);
	}
	else
	{
		uint32_t header = (uint32_t) (len + 4) << 2;

		value = malloc(len + 4);
		memcpy(value, &header, 4);
		if (len > 0)
			memcpy(value + 4, data, len);
	}
	return value;
}

static inline size_t
model_value_size(const EsColumnDesc *desc, const void *value)
{
	return desc->len > 0 ? (size_t) desc->len : es_varlena_size(value);
}

/* The value of context number k. */
static inline void *
make_context(EsContextClass klass, const EsColumnDesc *desc, uint64_t k)
{
	uint8_t	 bytes[64] = {0};
	uint64_t mixed = k * UINT64_C(0x9e3779b97f4a7c15);
	int		 len;
	void	*value;

	if (desc->len < 0)
	{
		if (k % 3)
			len = snprintf((char *) bytes, sizeof(bytes), "order-%llu", (unsigned long long) k);
		else
			len = snprintf((char *) bytes, sizeof(bytes), "%0*llu", (int) (k % 40), (unsigned long long) k);
		return make_varlena(bytes, (size_t) len, k % 7 != 0);
	}
	value = calloc(1, (size_t) desc->len);
	if (klass == ES_CONTEXT_STRING)
		snprintf(value, (size_t) desc->len, "name-%llu", (unsigned long long) k);
	else if (desc->len == 16)
	{
		memcpy(value, &mixed, 8);
		memcpy((uint8_t *) value + 8, &k, 8);
	}
	else
		memcpy(value, &k, (size_t) desc->len); /* little-endian */
	return value;
}

/* How the values of one column are made. */
typedef struct ColumnStyle
{
	int		 shape;
	unsigned null_percent;
	uint64_t base;
	uint64_t range;
	uint64_t last;
	bool	 short_headers;
	size_t	 max_len;
} ColumnStyle;

static inline ColumnStyle
random_style(const EsColumnDesc *desc)
{
	static const unsigned percents[] = {0, 0, 0, 3, 50, 97, 100};
	static const size_t	  lens[] = {5, 30, 126, 200, 1000, 5000};
	ColumnStyle			  s = {0};

	s.shape = (int) rnd_below(desc->len == 8 ? 8 : 6);
	s.null_percent = percents[rnd_below(7)];
	s.base = rnd();
	s.range = UINT64_C(1) << rnd_below(64);
	s.short_headers = rnd_below(4) != 0;
	s.max_len = lens[rnd_below(6)];
	return s;
}

static inline void *
styled_value(const EsColumnDesc *desc, ColumnStyle *s)
{
	uint8_t	 bytes[8192];
	uint64_t v;
	size_t	 len;
	void	*value;

	switch (s->shape)
	{
		case 0: /* constant */
			v = s->base;
			break;
		case 1: /* few */
			v = s->base + rnd_below(6) * s->range;
			break;
		case 2: /* a range */
			v = s->base + rnd() % s->range;
			break;
		case 3: /* growing, sometimes starting again */
			v = s->last = rnd_below(50) == 0 ? s->base : s->last + 1;
			break;
		case 4: /* runs */
			v = s->last = rnd_below(20) == 0 ? rnd() : s->last;
			break;
		case 6: /* doubles with two decimals, now and then another one */
		case 7:
		{
			double d = (double) (int64_t) rnd_below(100000) / 100.0 - 100;

			if (s->shape == 7 && rnd_below(40) == 0)
				d = (double) rnd() / 3.0;
			memcpy(&v, &d, 8);
			break;
		}
		default:
			v = rnd();
			break;
	}

	if (desc->len < 0)
	{
		if (s->shape <= 1)
			len = (size_t) (v % (s->max_len < 60 ? s->max_len : 60));
		else
			len = (size_t) rnd_below(s->max_len + 1);
		for (size_t i = 0; i < len; i++)
			bytes[i] = s->shape <= 1   ? (uint8_t) (v >> (i % 8))
					   : s->shape == 2 ? (uint8_t) rnd()
									   : (uint8_t) (i + v);
		return make_varlena(bytes, len, s->short_headers || s->shape == 5);
	}
	value = malloc((size_t) desc->len);
	for (int i = 0; i < desc->len; i++)
		((uint8_t *) value)[i] = (uint8_t) (v >> (8 * (i % 8)));
	return value;
}

static inline int
compare_rows(const void *a, const void *b)
{
	const ModelRow *x = a;
	const ModelRow *y = b;
	size_t			len = x->context_len < y->context_len ? x->context_len : y->context_len;
	int				c;

	if (x->hash != y->hash)
		return x->hash < y->hash ? -1 : 1;
	c = memcmp(x->context, y->context, len);
	if (c != 0)
		return c;
	if (x->context_len != y->context_len)
		return x->context_len < y->context_len ? -1 : 1;
	return x->position < y->position ? -1 : x->position > y->position;
}

static inline void
set_context_bytes(Model *m, ModelRow *r)
{
	int			c = m->spec.roles.context - 1;
	int64_t		scratch;
	const void *bytes;

	es_context_bytes((EsContextClass) m->spec.roles.context_class, m->columns[c].len, r->values[c], &scratch,
					 &bytes, &r->context_len);
	free(r->context);
	r->context = exact_copy(bytes, r->context_len);
}

static inline EsColumnDesc
random_column(void)
{
	static const EsColumnDesc shapes[] = {
		{8, 8, ES_COLUMN_BYVAL},
		{4, 4, ES_COLUMN_BYVAL},
		{2, 2, ES_COLUMN_BYVAL},
		{1, 1, ES_COLUMN_BYVAL},
		{8, 8, ES_COLUMN_BYVAL},
		{16, 1, 0},
		{64, 1, 0},
		{16, 8, 0},
		{3, 1, 0},
		{12, 8, 0},
		{8, 1, 0},
		{-1, 4, 0},
		{-1, 4, 0},
		{-1, 8, 0},
		{-1, 1, 0},
		{-1, 4, 0},
		{-1, 2, 0},
		{6, 4, 0},
		{300, 2, 0},
	};

	return shapes[rnd_below(sizeof(shapes) / sizeof(shapes[0]))];
}

static inline void
random_context_shape(EsColumnDesc *desc, uint8_t *klass)
{
	static const struct
	{
		EsColumnDesc desc;
		uint8_t		 klass;
	} shapes[] = {
		{{-1, 4, 0}, ES_CONTEXT_STRING},
		{{64, 1, 0}, ES_CONTEXT_STRING},
		{{-1, 4, 0}, ES_CONTEXT_BYTEA},
		{{2, 2, ES_COLUMN_BYVAL}, ES_CONTEXT_INTEGER},
		{{4, 4, ES_COLUMN_BYVAL}, ES_CONTEXT_INTEGER},
		{{8, 8, ES_COLUMN_BYVAL}, ES_CONTEXT_INTEGER},
		{{16, 1, 0}, ES_CONTEXT_UUID},
		{{4, 4, ES_COLUMN_BYVAL}, ES_CONTEXT_DATE},
		{{8, 8, ES_COLUMN_BYVAL}, ES_CONTEXT_TIMESTAMPTZ},
		{{1, 1, ES_COLUMN_BYVAL}, ES_CONTEXT_BOOL},
		{{4, 4, ES_COLUMN_BYVAL}, ES_CONTEXT_ENUM},
	};
	size_t i = rnd_below(sizeof(shapes) / sizeof(shapes[0]));

	*desc = shapes[i].desc;
	*klass = shapes[i].klass;
}

/* Mask of the hash's bits that are kept: few bits make collisions. */
static inline Model
model_create(int ncols, uint32_t nrows, uint32_t ncontexts, uint64_t hash_mask, int context_shape_text)
{
	Model		 m = {0};
	ColumnStyle *styles = calloc((size_t) ncols, sizeof(*styles));
	EsRoles		*roles = &m.spec.roles;
	int			 context = (int) rnd_below((uint64_t) ncols);
	uint64_t	*versions;

	m.ncols = ncols;
	m.nrows = nrows;
	m.columns = calloc((size_t) ncols, sizeof(EsColumnDesc));
	m.rows = calloc(nrows, sizeof(ModelRow));
	for (int i = 0; i < ncols; i++)
	{
		m.columns[i] = random_column();
		if (rnd_below(12) == 0)
			m.columns[i].flags |= ES_COLUMN_DROPPED;
		styles[i] = random_style(&m.columns[i]);
	}
	if (context_shape_text)
	{
		m.columns[context] = (EsColumnDesc){-1, 4, 0};
		roles->context_class = ES_CONTEXT_STRING;
	}
	else
		random_context_shape(&m.columns[context], &roles->context_class);
	if (roles->context_class == ES_CONTEXT_BOOL && ncontexts > 2)
		ncontexts = 2;
	if (m.columns[context].len == 2 && ncontexts > 60000)
		ncontexts = 60000;
	roles->context = (int16_t) (context + 1);
	if (ncols > 2 && rnd_below(2))
	{
		int p = (context + 1) % ncols;

		m.columns[p] = (EsColumnDesc){8, 8, ES_COLUMN_BYVAL};
		roles->position = (int16_t) (p + 1);
		if (ncols > 3)
		{
			p = (context + 2) % ncols;
			m.columns[p] = (EsColumnDesc){8, 8, ES_COLUMN_BYVAL};
			roles->version = (int16_t) (p + 1);
		}
	}

	m.spec.id = rnd();
	m.spec.table.storage_id = rnd();
	m.spec.table.database = (uint32_t) rnd();
	m.spec.relid = (uint32_t) rnd();
	rnd_bytes(&m.spec.identity, sizeof(m.spec.identity));
	m.spec.columns = m.columns;
	m.spec.ncols = ncols;
	m.spec.has_content_hash = rnd_below(2);
	m.spec.codec = (EsCodec) rnd_below(3);
	m.spec.zstd_level = (int) rnd_below(3);

	versions = calloc(ncontexts, sizeof(uint64_t));
	for (uint32_t r = 0; r < nrows; r++)
	{
		ModelRow *row = &m.rows[r];
		uint64_t  k = r < ncontexts ? r : rnd_below(ncontexts);

		row->values = calloc((size_t) ncols, sizeof(void *));
		for (int i = 0; i < ncols; i++)
		{
			if (i == context)
				row->values[i] = make_context((EsContextClass) roles->context_class, &m.columns[i], k);
			else if (rnd_below(100) >= styles[i].null_percent)
				row->values[i] = styled_value(&m.columns[i], &styles[i]);
		}
		set_context_bytes(&m, row);
		row->hash = es_context_hash((EsContextClass) roles->context_class, row->context, row->context_len) &
					hash_mask;
		row->position = 1000 + (uint64_t) r * 3;
		row->version = ++versions[k];
		row->fxid = 700 + r / 10;
		row->has_content_hash = m.spec.has_content_hash && rnd_below(3) != 0;
		rnd_bytes(row->content_hash, 16);
	}
	qsort(m.rows, nrows, sizeof(ModelRow), compare_rows);
	free(versions);
	free(styles);
	return m;
}

static inline void
model_free(Model *m)
{
	for (uint32_t r = 0; r < m->nrows; r++)
	{
		for (int i = 0; i < m->ncols; i++)
			free(m->rows[r].values[i]);
		free(m->rows[r].values);
		free(m->rows[r].context);
	}
	free(m->rows);
	free(m->columns);
}

static inline EsSegmentRow
model_row(const Model *m, uint32_t r)
{
	const ModelRow *row = &m->rows[r];

	return (EsSegmentRow){
		.values = (const void *const *) row->values,
		.content_hash = row->has_content_hash ? row->content_hash : NULL,
		.context_hash = row->hash,
		.position = row->position,
		.version = row->version,
		.fxid = row->fxid,
	};
}

/* Writes the model's rows; the first status that is not ES_OK. */
static inline EsStatus
model_write(const Model *m, MemFile *file, EsSegmentSummary *summary, EsError *err)
{
	EsSegmentWriter *w;
	EsStatus		 status = es_segment_writer_create(&w, &m->spec, mem_append, file);

	if (status != ES_OK)
		return status;
	for (uint32_t r = 0; r < m->nrows && status == ES_OK; r++)
	{
		EsSegmentRow row = model_row(m, r);

		status = es_segment_writer_add(w, &row, err);
	}
	if (status == ES_OK)
		status = es_segment_writer_finish(w, summary, err);
	es_segment_writer_free(w);
	return status;
}

/* ---- comparing ---- */

/* Is the block's value what the model has, and aligned? */
static inline bool
same_value(const Model *m, const EsRowBlock *b, int column, uint32_t block_row, uint32_t row, bool wanted)
{
	const EsColumnDesc *desc = &m->columns[column];
	const void		   *value = es_block_value(b, column, block_row);
	const void		   *model = m->rows[row].values[column];
	uintptr_t			align = desc->align;

	if (!wanted || (desc->flags & ES_COLUMN_DROPPED) != 0 || column + 1 == m->spec.roles.position ||
		column + 1 == m->spec.roles.version)
		model = NULL;
	if (value == NULL || model == NULL)
		return value == model;
	if (desc->len < 0 && es_varlena_is_short(value))
		align = 1;
	return (uintptr_t) value % align == 0 && model_value_size(desc, value) == model_value_size(desc, model) &&
		   memcmp(value, model, model_value_size(desc, model)) == 0;
}

/* Reads rows [first, first + n) and compares all; false if anything differs. */
static inline bool
same_rows(const Model *m, EsSegment *seg, uint64_t first, uint32_t n, const bool *wanted, uint32_t hidden,
		  EsRowBlock *b, EsError *err)
{
	if (es_segment_read(seg, first, n, wanted, hidden, b, err) != ES_OK)
		return false;
	for (uint32_t i = 0; i < n; i++)
	{
		const ModelRow *row = &m->rows[first + i];
		const void	   *hash = es_block_content_hash(b, i);

		for (int c = 0; c < m->ncols; c++)
			if (!same_value(m, b, c, i, (uint32_t) first + i, wanted == NULL || wanted[c]))
				return false;
		if (es_block_position(b, i) != (hidden & ES_WANT_POSITION ? row->position : 0) ||
			es_block_version(b, i) != (hidden & ES_WANT_VERSION ? row->version : 0) ||
			es_block_fxid(b, i) != (hidden & ES_WANT_FXID ? row->fxid : 0))
			return false;
		if ((hash != NULL) != ((hidden & ES_WANT_CONTENT_HASH) && row->has_content_hash) ||
			(hash != NULL && memcmp(hash, row->content_hash, 16) != 0))
			return false;
	}
	return true;
}

#define ES_WANT_ALL (ES_WANT_POSITION | ES_WANT_VERSION | ES_WANT_FXID | ES_WANT_CONTENT_HASH)

#endif /* ES_TEST_SEGMENT_MODEL_H */
