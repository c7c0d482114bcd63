/*
 * Segments: what goes in comes out for every range and projection, contexts are found,
 * memory is bounded, and writers that break the contract are told.
 */
#include "segment_model.h"

#include "core/segment_format.h"

/* ---- helpers ---- */

static EsSegment *
open_file(MemFile *file, EsError *err)
{
	EsSegment *seg;

	memset(err, 0, sizeof(*err));
	if (es_segment_open(&seg, mem_read, file, file->len, err) != ES_OK)
		printf("# open: %s at %llu\n", err->what, (unsigned long long) err->offset);
	return seg;
}

static unsigned reported;

static void
count_damage(void *arg, const EsError *err)
{
	reported++;
	if (arg != NULL)
		printf("# %s at %llu\n", err->what, (unsigned long long) err->offset);
}

/* Every context of the model is found with all its rows; absent ones are not. */
static bool
contexts_agree(const Model *m, EsSegment *seg)
{
	uint32_t entry = 0;
	EsError	 err;

	for (uint32_t r = 0; r < m->nrows;)
	{
		const ModelRow *row = &m->rows[r];
		uint32_t		n = 1;
		uint64_t		first;
		uint64_t		nrows;
		uint32_t		found;
		uint8_t			other[200];

		while (r + n < m->nrows && m->rows[r + n].hash == row->hash &&
			   m->rows[r + n].context_len == row->context_len &&
			   memcmp(m->rows[r + n].context, row->context, row->context_len) == 0)
			n++;
		if (es_segment_find_context(seg, row->hash, row->context, row->context_len, &first, &nrows, &found,
									&err) != ES_OK ||
			first != r || nrows != n || found != entry)
			return false;

		/* The same hash with other bytes, other hashes with the same bytes. */
		if (row->context_len < sizeof(other))
		{
			memcpy(other, row->context, row->context_len);
			other[row->context_len] = 0xff;
			if (es_segment_find_context(seg, row->hash, other, row->context_len + 1, &first, &nrows, &found,
										&err) != ES_OK ||
				nrows != 0)
				return false;
		}
		if (es_segment_find_context(seg, rnd(), row->context, row->context_len, &first, &nrows, &found,
									&err) != ES_OK ||
			nrows != 0)
			return false;
		entry++;
		r += n;
	}
	return entry == es_segment_info(seg)->summary.ncontexts;
}

typedef struct Walk
{
	const Model *m;
	uint32_t	 entries;
	uint64_t	 rows;
	bool		 right;
} Walk;

static EsStatus
walk_step(void *arg, uint32_t entry, uint64_t hash, uint64_t first_row, uint64_t nrows)
{
	Walk *w = arg;

	w->right = w->right && entry == w->entries && first_row == w->rows && hash == w->m->rows[first_row].hash;
	w->entries++;
	w->rows += nrows;
	return ES_OK;
}

static bool
zones_agree(const Model *m, EsSegment *seg)
{
	const EsSegmentInfo *info = es_segment_info(seg);
	uint64_t			 row = 0;

	for (uint32_t z = 0; z < info->nzones; z++)
	{
		EsZoneInfo zone = es_segment_zone(seg, z);
		uint64_t   min_position = UINT64_MAX;
		uint64_t   max_position = 0;
		uint64_t   min_fxid = UINT64_MAX;
		uint64_t   max_fxid = 0;

		if (zone.first_row != row || zone.nrows == 0 || zone.nrows > ES_ZONE_ROWS)
			return false;
		row += zone.nrows;
		for (uint64_t r = zone.first_row; r < row; r++)
		{
			const ModelRow *x = &m->rows[r];

			min_position = x->position < min_position ? x->position : min_position;
			max_position = x->position > max_position ? x->position : max_position;
			min_fxid = x->fxid < min_fxid ? x->fxid : min_fxid;
			max_fxid = x->fxid > max_fxid ? x->fxid : max_fxid;
		}
		if (zone.min_position != min_position || zone.max_position != max_position ||
			zone.min_fxid != min_fxid || zone.max_fxid != max_fxid ||
			zone.first_hash != m->rows[zone.first_row].hash || zone.last_hash != m->rows[row - 1].hash)
			return false;
		for (int c = 0; c < m->ncols; c++)
		{
			EsZoneColumnStats	s = es_segment_column_stats(seg, z, c);
			const EsColumnDesc *d = &m->columns[c];
			uint32_t			nnulls = 0;
			int64_t				min = INT64_MAX;
			int64_t				max = INT64_MIN;
			bool				numbers = (d->flags & ES_COLUMN_BYVAL) != 0;
			bool				position = c + 1 == m->spec.roles.position;
			bool				version = c + 1 == m->spec.roles.version;

			for (uint64_t r = zone.first_row; r < row; r++)
			{
				const void *value = m->rows[r].values[c];
				int64_t		v = 0;

				if (position || version)
					value = position ? &m->rows[r].position : &m->rows[r].version;
				else if (value == NULL || (d->flags & ES_COLUMN_DROPPED) != 0)
				{
					nnulls++;
					continue;
				}
				if (!numbers)
					continue;
				memcpy(&v, value, (size_t) d->len);
				v = (int64_t) ((uint64_t) v << (64 - 8 * d->len)) >> (64 - 8 * d->len);
				min = v < min ? v : min;
				max = v > max ? v : max;
			}
			if (s.nnulls != nnulls || s.has_minmax != (numbers && nnulls < zone.nrows) ||
				(s.has_minmax && (s.min != min || s.max != max)))
				return false;
		}
	}
	return row == m->nrows;
}

/* Random ranges and projections. */
static bool
ranges_agree(const Model *m, EsSegment *seg, int rounds, EsError *err)
{
	EsRowBlock *b = es_block_create();
	bool	   *wanted = calloc((size_t) m->ncols, sizeof(bool));
	bool		right = true;

	for (int i = 0; i < rounds && right; i++)
	{
		EsZoneInfo zone = es_segment_zone(seg, (uint32_t) rnd_below(es_segment_info(seg)->nzones));
		uint32_t   first = (uint32_t) rnd_below(zone.nrows);
		uint32_t   n = (uint32_t) rnd_below(zone.nrows - first) + 1;

		if (rnd_below(4) != 0 && n > 60)
			n = (uint32_t) rnd_below(60) + 1;
		for (int c = 0; c < m->ncols; c++)
			wanted[c] = rnd_below(3) == 0;
		right = same_rows(m, seg, zone.first_row + first, n, rnd_below(4) ? wanted : NULL,
						  (uint32_t) rnd_below(16), b, err);
		if (rnd_below(20) == 0)
			es_segment_set_cache(seg, (size_t) rnd_below(3) * 40000);
	}
	es_block_free(b);
	free(wanted);
	return right;
}

static bool
all_rows_agree(const Model *m, EsSegment *seg, EsError *err)
{
	EsRowBlock *b = es_block_create();
	bool		right = true;

	for (uint32_t z = 0; z < es_segment_info(seg)->nzones && right; z++)
	{
		EsZoneInfo zone = es_segment_zone(seg, z);

		right = same_rows(m, seg, zone.first_row, zone.nrows, NULL, ES_WANT_ALL, b, err);
	}
	es_block_free(b);
	return right;
}

static void
check_model(const Model *m, int rounds)
{
	MemFile			 file = {0};
	EsSegmentSummary summary;
	EsSegment		*seg;
	EsError			 err = {0};
	Walk			 walk = {.m = m, .right = true};

	if (!CHECK(model_write(m, &file, &summary, &err) == ES_OK))
	{
		printf("# write: %s\n", err.what);
		mem_free(&file);
		return;
	}
	CHECK(summary.file_len == file.len);
	CHECK(summary.nrows == m->nrows);
	seg = open_file(&file, &err);
	if (CHECK(seg != NULL))
	{
		const EsSegmentInfo *info = es_segment_info(seg);

		CHECK(memcmp(&info->summary, &summary, sizeof(summary)) == 0);
		CHECK(memcmp(&info->identity, &m->spec.identity, sizeof(info->identity)) == 0);
		CHECK(info->id == m->spec.id && info->relid == m->spec.relid && info->ncols == m->ncols);
		CHECK(es_table_key_equal(&info->table, &m->spec.table));
		CHECK(memcmp(&info->roles, &m->spec.roles, sizeof(EsRoles)) == 0);
		CHECK(memcmp(info->columns, m->columns, sizeof(EsColumnDesc) * (size_t) m->ncols) == 0);
		CHECK(zones_agree(m, seg));
		CHECK(all_rows_agree(m, seg, &err));
		CHECK(ranges_agree(m, seg, rounds, &err));
		CHECK(contexts_agree(m, seg));
		CHECK(es_segment_walk_contexts(seg, walk_step, &walk, &err) == ES_OK);
		CHECK(walk.right && walk.rows == m->nrows && walk.entries == summary.ncontexts);
		reported = 0;
		CHECK(es_segment_verify(seg, count_damage, "") == ES_OK);
		CHECK(reported == 0);
		es_segment_close(seg);
	}
	mem_free(&file);
}

/* ---- promises ---- */

static void
test_round_trip(void)
{
	PROMISE("random tables come back value by value, for all ranges and projections");
	for (int i = 0; i < 60; i++)
	{
		static const uint64_t masks[] = {UINT64_MAX, UINT64_MAX, UINT64_C(0xff00000000000000), 0x7};
		uint32_t			  nrows = (uint32_t) (rnd_below(3) ? rnd_below(300) : rnd_below(20000)) + 1;
		uint32_t			  ncontexts = (uint32_t) rnd_below(rnd_below(2) ? 20 : nrows) + 1;
		Model m = model_create((int) rnd_below(10) + 1, nrows, ncontexts, masks[rnd_below(4)], 0);

		check_model(&m, 40);
		model_free(&m);
	}
}

static void
test_wide(void)
{
	PROMISE("a table of 1600 columns comes back");
	Model m = model_create(1600, 200, 10, UINT64_MAX, 0);

	check_model(&m, 10);
	model_free(&m);
}

static void
test_many_contexts(void)
{
	PROMISE("contexts of one row each are all found, across index and filter pages");
	Model m = model_create(2, 30000, 30000, UINT64_MAX, 1);

	m.spec.codec = ES_CODEC_LZ4;
	check_model(&m, 10);
	model_free(&m);
}

static void
test_one_context(void)
{
	PROMISE("one context of 100000 rows, over many zones, comes back in order");
	Model m = model_create(4, 100000, 1, UINT64_MAX, 1);

	check_model(&m, 30);
	model_free(&m);
}

static void
test_collisions(void)
{
	PROMISE("contexts with equal hashes are told apart by their bytes, also across index pages");
	Model m = model_create(2, 3000, 1500, 0x3, 1);

	check_model(&m, 10);
	model_free(&m);
	m = model_create(1, 1500, 1100, 0, 1);
	check_model(&m, 10);
	model_free(&m);
}

static void
test_one_hash(void)
{
	PROMISE(
		"more contexts of one hash than a filter page has keys still make a segment that opens and finds them");
	Model			 m = model_create(1, ES_FILTER_PAGE_KEYS + 100, ES_FILTER_PAGE_KEYS + 100, 0, 1);
	MemFile			 file = {0};
	EsSegmentSummary summary;
	EsSegment		*seg;
	EsError			 err;
	uint64_t		 first;
	uint64_t		 nrows;
	uint32_t		 entry;

	CHECK(model_write(&m, &file, &summary, &err) == ES_OK);
	seg = open_file(&file, &err);
	if (CHECK(seg != NULL))
	{
		for (uint32_t r = 0; r < m.nrows; r += 1500)
			CHECK(es_segment_find_context(seg, 0, m.rows[r].context, m.rows[r].context_len, &first, &nrows,
										  &entry, &err) == ES_OK &&
				  first == r && nrows == 1 && entry == r);
		es_segment_close(seg);
	}
	mem_free(&file);
	model_free(&m);
}

/* A model of a text context and one varlena column with the lengths given. */
static Model
overflow_model(const size_t *lens, uint32_t n)
{
	Model m = model_create(2, n, n, UINT64_MAX, 1);
	int	  c = m.spec.roles.context == 1 ? 1 : 0;

	m.columns[c] = (EsColumnDesc){-1, 8, 0};
	for (uint32_t i = 0; i < n; i++)
	{
		uint8_t *data = malloc(lens[i] + 1);

		for (size_t k = 0; k < lens[i]; k++)
			data[k] = (uint8_t) (k % 251 + (k >> 16) + i);
		if (lens[i] < 2000000)
			rnd_bytes(data, lens[i] / 2);
		free(m.rows[i].values[c]);
		m.rows[i].values[c] = make_varlena(data, lens[i], false);
		free(data);
	}
	return m;
}

/* Raw bytes of the largest data page. */
static uint32_t
largest_data_page(const Model *m)
{
	MemFile			 file = {0};
	EsSegmentSummary summary;
	EsSegmentTrailer t;
	EsPageHeader	 h;
	EsError			 err;
	uint32_t		 largest = 0;

	CHECK(model_write(m, &file, &summary, &err) == ES_OK);
	memcpy(&t, file.data + file.len - sizeof(t), sizeof(t));
	for (uint64_t o = sizeof(EsSegmentHeader); o < t.footer_offset; o += sizeof(h) + h.stored_len)
	{
		memcpy(&h, file.data + o, sizeof(h));
		if (h.kind_codec >> 4 == ES_PAGE_DATA && h.raw_len > largest)
			largest = h.raw_len;
	}
	mem_free(&file);
	return largest;
}

static void
test_overflow(void)
{
	PROMISE("values of 16 KB to 100 MB come back, and the zone around them too");
	static const size_t lens[] = {10, 16379,		 16380,			16381,	   17000,	  5,	 1000000,
								  0,  48 * 1024 - 4, 48 * 1024 - 3, 96 * 1024, 100000000, 20000, 3};
	Model				m = overflow_model(lens, sizeof(lens) / sizeof(lens[0]));

	check_model(&m, 40);
	CHECK(largest_data_page(&m) <= ES_PAGE_RAW + 8);
	model_free(&m);
}

static void
test_overflow_context(void)
{
	PROMISE("a context larger than a page is found by its bytes");
	Model	 m = model_create(1, 4, 4, 0, 1);
	uint8_t *data = malloc(40000);

	memset(data, 'x', 40000);
	for (uint32_t i = 0; i < 4; i++)
	{
		data[39999] = (uint8_t) i;
		free(m.rows[i].values[0]);
		m.rows[i].values[0] = make_varlena(data, 40000, false);
		set_context_bytes(&m, &m.rows[i]);
	}
	free(data);
	check_model(&m, 10);
	model_free(&m);
}

static void
test_pending(void)
{
	PROMISE("a pending segment keeps its flag and ordinals from 0, and says nothing of positions");
	Model			 m = model_create(4, 100, 10, UINT64_MAX, 1);
	MemFile			 file = {0};
	EsSegmentSummary summary;
	EsSegment		*seg;
	EsError			 err;

	m.spec.flags = ES_SEGMENT_PENDING;
	m.spec.roles.position = (int16_t) (m.spec.roles.context % 4 + 1);
	m.columns[m.spec.roles.position - 1] = (EsColumnDesc){8, 8, ES_COLUMN_BYVAL};
	for (uint32_t r = 0; r < 100; r++)
	{
		m.rows[r].position = (m.rows[r].position - 1000) / 3;
		m.rows[r].version = 0;
	}
	CHECK(model_write(&m, &file, &summary, &err) == ES_OK);
	CHECK(summary.min_position == 0 && summary.max_position == 99);
	seg = open_file(&file, &err);
	if (CHECK(seg != NULL))
	{
		CHECK(es_segment_info(seg)->flags == ES_SEGMENT_PENDING);
		CHECK(!es_segment_column_stats(seg, 0, m.spec.roles.position - 1).has_minmax);
		CHECK(all_rows_agree(&m, seg, &err));
		es_segment_close(seg);
	}
	mem_free(&file);
	model_free(&m);
}

static void
test_contract(void)
{
	PROMISE("rows out of order, without context or with foreign varlenas are refused, and stay refused");
	Model				 m = model_create(2, 50, 10, UINT64_MAX, 1);
	MemFile				 file = {0};
	EsSegmentWriter		*w;
	EsSegmentSummary	 summary;
	EsSegmentRow		 row;
	EsError				 err;
	int					 context = m.spec.roles.context - 1;
	void				*values[2] = {m.rows[5].values[0], m.rows[5].values[1]};
	static const uint8_t external[18] = {0x01, 18};
	static const uint8_t compressed[8] = {0x22, 0, 0, 0, 0, 0, 0, 0};
	uint32_t			 last;

	for (int what = 0; what < 8; what++)
	{
		CHECK(es_segment_writer_create(&w, &m.spec, mem_append, &file) == ES_OK);
		row = model_row(&m, 4);
		CHECK(es_segment_writer_add(w, &row, &err) == ES_OK);
		row = model_row(&m, 5);
		row.values = (const void *const *) values;
		memcpy(values, m.rows[5].values, sizeof(values));
		switch (what)
		{
			case 0:
				row = model_row(&m, 3);
				break;
			case 1:
				row = model_row(&m, 4); /* the same position again */
				break;
			case 2:
				row.context_hash = m.rows[4].hash - 1;
				break;
			case 3:
				values[context] = NULL;
				break;
			case 4:
				values[context] = (void *) external;
				break;
			case 5:
				values[context] = (void *) compressed;
				break;
			case 6:
				/* equal hash, smaller bytes */
				row = model_row(&m, 4);
				values[1 - context] = NULL;
				values[context] = make_varlena("", 0, true);
				row.values = (const void *const *) values;
				break;
			default:
				for (last = 5; last + 1 < m.nrows && m.rows[last + 1].hash == m.rows[last].hash; last++)
					continue;
				row = model_row(&m, last);
				CHECK(es_segment_writer_add(w, &row, &err) == ES_OK);
				row.position--;
				break;
		}
		CHECK(es_segment_writer_add(w, &row, &err) == ES_ERR_ARGUMENT);
		CHECK(err.status == ES_ERR_ARGUMENT && err.what[0] != '\0');
		row = model_row(&m, m.nrows - 1);
		CHECK(es_segment_writer_add(w, &row, &err) == ES_ERR_ARGUMENT);
		CHECK(es_segment_writer_finish(w, &summary, &err) == ES_ERR_ARGUMENT);
		es_segment_writer_free(w);
		if (what == 6)
			free(values[context]);
	}
	mem_free(&file);
	model_free(&m);
}

static void
test_empty(void)
{
	PROMISE("a segment without rows is refused at its end");
	Model			 m = model_create(1, 1, 1, UINT64_MAX, 1);
	MemFile			 file = {0};
	EsSegmentWriter *w;
	EsSegmentSummary summary;
	EsError			 err;

	CHECK(es_segment_writer_create(&w, &m.spec, mem_append, &file) == ES_OK);
	CHECK(es_segment_writer_finish(w, &summary, &err) == ES_ERR_ARGUMENT);
	es_segment_writer_free(w);
	CHECK(file.len == 0);
	m.spec.roles.context = 0;
	CHECK(es_segment_writer_create(&w, &m.spec, mem_append, &file) == ES_ERR_ARGUMENT);
	CHECK(w == NULL);
	m.spec.roles.context = 1;
	m.spec.roles.context_class = ES_CONTEXT_UUID;
	CHECK(es_segment_writer_create(&w, &m.spec, mem_append, &file) == ES_ERR_ARGUMENT);
	model_free(&m);
}

static void
test_disk_full(void)
{
	PROMISE("a failed append fails the segment wherever it happens");
	Model			 m = model_create(5, 20000, 100, UINT64_MAX, 1);
	MemFile			 whole = {0};
	EsSegmentSummary summary;
	EsError			 err;

	CHECK(model_write(&m, &whole, &summary, &err) == ES_OK);
	for (int i = 0; i < 20; i++)
	{
		MemFile file = {.fail_at = 1 + rnd_below(whole.len - 1)};

		CHECK(model_write(&m, &file, &summary, &err) == ES_ERR_IO);
		mem_free(&file);
	}
	mem_free(&whole);
	model_free(&m);
}

static void
test_block_outlives(void)
{
	PROMISE("what a block points to stays when the cache is emptied and the segment closed");
	Model			 m = model_create(6, 9000, 50, UINT64_MAX, 1);
	MemFile			 file = {0};
	EsSegmentSummary summary;
	EsSegment		*seg;
	EsRowBlock		*b = es_block_create();
	EsError			 err;

	CHECK(model_write(&m, &file, &summary, &err) == ES_OK);
	seg = open_file(&file, &err);
	CHECK(es_segment_read(seg, 100, 50, NULL, ES_WANT_ALL, b, &err) == ES_OK);
	CHECK(es_block_memory(b) > 0);
	es_segment_set_cache(seg, 0);
	es_segment_close(seg);
	mem_free(&file);
	for (uint32_t i = 0; i < 50; i++)
		for (int c = 0; c < m.ncols; c++)
			CHECK(same_value(&m, b, c, i, 100 + i, true));
	es_block_free(b);
	model_free(&m);
}

static void
test_arguments(void)
{
	PROMISE("ranges beyond a zone or the segment are refused, and leave an empty block");
	Model			 m = model_create(3, 9000, 50, UINT64_MAX, 1);
	MemFile			 file = {0};
	EsSegmentSummary summary;
	EsSegment		*seg;
	EsRowBlock		*b = es_block_create();
	EsError			 err;
	uint32_t		 n;

	CHECK(model_write(&m, &file, &summary, &err) == ES_OK);
	seg = open_file(&file, &err);
	n = es_segment_zone(seg, 0).nrows;
	CHECK(es_segment_read(seg, 0, n, NULL, 0, b, &err) == ES_OK);
	CHECK(es_segment_read(seg, 0, n + 1, NULL, 0, b, &err) == ES_ERR_ARGUMENT);
	CHECK(es_block_value(b, m.spec.roles.context - 1, 0) == NULL);
	CHECK(es_segment_read(seg, 9000, 1, NULL, 0, b, &err) == ES_ERR_ARGUMENT);
	CHECK(es_segment_read(seg, UINT64_MAX, 1, NULL, 0, b, &err) == ES_ERR_ARGUMENT);
	CHECK(es_segment_read(seg, 8999, UINT32_MAX, NULL, 0, b, &err) == ES_ERR_ARGUMENT);
	CHECK(es_segment_read(seg, 0, 0, NULL, 0, b, &err) == ES_OK);
	CHECK(es_block_value(b, m.spec.roles.context - 1, 0) == NULL);
	CHECK(es_segment_read(seg, 10, 2, NULL, 0, b, &err) == ES_OK);
	CHECK(es_block_value(b, m.spec.roles.context - 1, 1) != NULL);
	CHECK(es_block_value(b, m.spec.roles.context - 1, 2) == NULL);
	CHECK(es_block_value(b, -1, 0) == NULL && es_block_value(b, 3, 0) == NULL);
	es_block_free(b);
	es_segment_close(seg);
	mem_free(&file);
	model_free(&m);
}

static void
test_cache(void)
{
	PROMISE("the cache saves reads, stays within its limit, and is none when it is 0");
	Model			 m = model_create(6, 9000, 50, UINT64_MAX, 1);
	MemFile			 file = {0};
	EsSegmentSummary summary;
	EsSegment		*seg;
	EsRowBlock		*b = es_block_create();
	EsError			 err;
	uint64_t		 reads;
	size_t			 bare;

	CHECK(model_write(&m, &file, &summary, &err) == ES_OK);
	seg = open_file(&file, &err);
	bare = es_segment_memory(seg);
	es_segment_set_cache(seg, 64 << 20);
	CHECK(es_segment_read(seg, 100, 50, NULL, ES_WANT_ALL, b, &err) == ES_OK);
	CHECK(es_segment_memory(seg) > bare);
	reads = file.reads;
	CHECK(es_segment_read(seg, 110, 20, NULL, ES_WANT_ALL, b, &err) == ES_OK);
	CHECK(file.reads == reads);
	es_segment_set_cache(seg, 0);
	CHECK(es_segment_read(seg, 110, 20, NULL, ES_WANT_ALL, b, &err) == ES_OK);
	CHECK(file.reads > reads);
	reads = file.reads;
	CHECK(es_segment_read(seg, 110, 20, NULL, ES_WANT_ALL, b, &err) == ES_OK);
	CHECK(file.reads > reads);
	es_segment_set_cache(seg, 100000);
	for (int i = 0; i < 50; i++)
	{
		CHECK(same_rows(&m, seg, rnd_below(8000), 100, NULL, ES_WANT_ALL, b, &err));
		CHECK(es_segment_memory(seg) < bare + 100000 + 300000);
	}
	es_block_free(b);
	es_segment_close(seg);
	mem_free(&file);
	model_free(&m);
}

int
main(void)
{
	test_round_trip();
	test_wide();
	test_many_contexts();
	test_one_context();
	test_collisions();
	test_one_hash();
	test_overflow();
	test_overflow_context();
	test_pending();
	test_contract();
	test_empty();
	test_disk_full();
	test_block_outlives();
	test_arguments();
	test_cache();
	return done();
}
