/*
 * fuzz_batch: whatever es_batch_open() accepts can be read through the accessors, and whatever the builder
 * accepts is opened again.
 *
 * The first byte chooses: even = the rest is a batch, odd = the rest drives a builder.
 */
#include <stdlib.h>
#include <string.h>

#include "core/batch.h"
#include "core/route.h"

static volatile uint64_t sink;

static void
walk(const EsBatchView *v)
{
	uint64_t sum = 0;

	for (uint32_t r = 0; r < v->header->nrows; r++)
	{
		sum += es_batch_ordinal(v, r) + es_batch_cid(v, r) + es_batch_context_hash(v, r);
		sum += v->positions ? v->positions[r] : 0;
		sum += v->versions ? v->versions[r] : 0;
		for (int c = 0; c < v->header->ncols && r < 100; c++)
		{
			const uint8_t *value;
			size_t		   len;

			if (es_batch_is_null(v, c, r))
				continue;
			value = es_batch_value(v, c, r);
			len = v->columns[c].desc.len > 0 ? (size_t) v->columns[c].desc.len : es_varlena_size(value);
			sum += value[0];
			sum += value[len - 1];
		}
	}
	sink += sum;
}

static void
fuzz_open(const uint8_t *data, size_t size)
{
	void	   *buf = malloc(size ? size : 1);
	EsBatchView v;
	EsError		err;

	memcpy(buf, data, size);
	if (es_batch_open(buf, size, &v, &err) == ES_OK)
		walk(&v);
	free(buf);
}

/* Columns, then rows of values that lie in the input itself. */
static void
fuzz_build(const uint8_t *data, size_t size)
{
	EsColumnDesc	columns[8] = {0};
	bool			wanted[8];
	const void	   *values[8];
	int				ncols;
	EsBatchBuilder *b;
	EsBatchMeta		meta = {.subid = 1};
	uint64_t		ordinal = 0;
	uint64_t		last_ordinal = 0;
	EsBatchView		v;
	void		   *buf;
	size_t			len;
	uint32_t		nrows = 0;

	if (size < 1 + 3 * 8)
		return;
	ncols = data[0] % 9;
	meta.with_positions = data[0] & 0x80;
	for (int c = 0; c < ncols; c++)
	{
		const uint8_t *d = data + 1 + 3 * c;

		columns[c].len = d[0] & 1 ? -1 : (int16_t) (1 + d[0] / 2);
		columns[c].align = (uint8_t) (1 << (d[1] & 3));
		columns[c].flags = d[2] & (ES_COLUMN_DROPPED | ES_COLUMN_PLAIN);
		wanted[c] = (d[1] & 0x10) == 0;
	}
	data += 1 + 3 * 8;
	size -= 1 + 3 * 8;

	b = es_batch_create(columns, ncols, wanted);
	if (b == NULL)
		abort();
	es_batch_reset(b, &meta);
	while (size >= 12)
	{
		uint8_t	 step = data[0];
		uint8_t	 nulls = data[1];
		EsStatus status;
		bool	 taken = true;

		for (int c = 0; c < ncols; c++)
		{
			size_t at = 2 + data[2 + c] % (size - 11);
			size_t left = size - at;

			values[c] = NULL;
			if (nulls >> c & 1)
				continue;
			/* the builder trusts its caller that the value is there */
			if (columns[c].len > 0 ? left < (size_t) columns[c].len
								   : left < 4 || es_varlena_size(data + at) > left)
				continue;
			values[c] = data + at;
			/* but it must refuse the kinds of varlena that are not for it */
			if (columns[c].len < 0 && wanted[c] && !(columns[c].flags & ES_COLUMN_DROPPED))
				taken = taken && (es_varlena_is_short(data + at)
									  ? data[at] != 1
									  : (data[at] & 3) == 0 && es_varlena_size(data + at) >= 4);
		}
		ordinal += step;
		status = es_batch_add(b, values, ordinal, step, ordinal, 1);
		if (nrows > 0 && ordinal <= last_ordinal)
			taken = false;
		if ((status == ES_OK) != taken)
			abort();
		nrows += taken;
		if (taken)
			last_ordinal = ordinal;
		if (es_batch_nrows(b) != nrows)
			abort();
		data += 10;
		size -= 10;
	}
	len = es_batch_size(b);
	buf = malloc(len);
	if (es_batch_finish(b, buf, len) != ES_OK || es_batch_open(buf, len, &v, NULL) != ES_OK)
		abort();
	walk(&v);
	free(buf);
	es_batch_free(b);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (size == 0)
		return 0;
	if (data[0] & 1)
		fuzz_build(data + 1, size - 1);
	else
		fuzz_open(data + 1, size - 1);
	return 0;
}
