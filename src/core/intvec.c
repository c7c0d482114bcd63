/*-------------------------------------------------------------------------
 *
 * intvec.c
 *	  See intvec.h.
 *
 * A plan looks at the values once: range of the values, range of the
 * differences, and how often a difference is not 0 (runs of equal values:
 * contexts, indexes of a sorted dictionary) or not 1 (versions, which count up
 * within each context).  Widths above 56 bits become 64, so that any value can
 * be had from one unaligned 8-byte load.
 *
 *-------------------------------------------------------------------------
 */
#include "core/intvec.h"

#include <string.h>

#define PAD8(n) (((size_t) (n) + 7) & ~(size_t) 7)

static inline uint64_t
load64(const uint8_t *p)
{
	uint64_t v;

	memcpy(&v, p, sizeof(v));
	return v;
}

static inline uint32_t
load16(const uint8_t *p)
{
	uint16_t v;

	memcpy(&v, p, sizeof(v));
	return v;
}

static inline uint64_t
width_mask(uint8_t width)
{
	return width >= 64 ? UINT64_MAX : (UINT64_C(1) << width) - 1;
}

static inline uint64_t
unpack(const uint8_t *packed, uint8_t width, uint32_t i)
{
	uint64_t bit = (uint64_t) i * width;

	return (load64(packed + (bit >> 3)) >> (bit & 7)) & width_mask(width);
}

static uint8_t
bits_for(uint64_t range, bool whole_bytes)
{
	uint8_t bits = range == 0 ? 0 : (uint8_t) (64 - __builtin_clzll(range));

	if (whole_bytes)
		bits = (uint8_t) ((bits + 7) & ~7);
	return bits > 56 ? 64 : bits;
}

static inline size_t
packed_size(uint32_t n, uint8_t width)
{
	return PAD8(((uint64_t) n * width + 7) / 8);
}

static inline uint32_t
block_count(uint32_t n)
{
	return (n + ES_INTVEC_BLOCK - 1) / ES_INTVEC_BLOCK;
}

/* ---- encoding ---- */

static size_t
frame_size(uint32_t n, uint8_t width)
{
	return sizeof(EsIntVecHeader) + packed_size(n, width);
}

static size_t
delta_size(uint32_t n, uint8_t width)
{
	return sizeof(EsIntVecHeader) + 8 * (size_t) block_count(n) + packed_size(n, width);
}

static size_t
runs_size(uint32_t nruns, uint8_t width)
{
	return sizeof(EsIntVecHeader) + PAD8(2 * (size_t) nruns) + packed_size(nruns, width);
}

void
es_intvec_plan(const uint64_t *values, uint32_t n, bool whole_bytes, EsIntVecPlan *plan)
{
	int64_t	 min = (int64_t) values[0];
	int64_t	 max = min;
	int64_t	 dmin = INT64_MAX;
	int64_t	 dmax = INT64_MIN;
	uint32_t breaks[2] = {0, 0};
	uint8_t	 width;
	size_t	 size;

	for (uint32_t i = 1; i < n; i++)
	{
		int64_t v = (int64_t) values[i];
		int64_t d = (int64_t) (values[i] - values[i - 1]);

		min = v < min ? v : min;
		max = v > max ? v : max;
		dmin = d < dmin ? d : dmin;
		dmax = d > dmax ? d : dmax;
		breaks[0] += d != 0;
		breaks[1] += d != 1;
	}

	memset(plan, 0, sizeof(*plan));
	plan->n = n;
	width = bits_for((uint64_t) max - (uint64_t) min, whole_bytes);
	plan->header.mode = ES_INTVEC_FRAME;
	plan->header.width = width;
	plan->header.base = (uint64_t) min;
	plan->size = frame_size(n, width);
	if (n < 2 || width == 0)
		return;

	/* Deltas must pay for the slower access. */
	width = bits_for((uint64_t) dmax - (uint64_t) dmin, whole_bytes);
	size = delta_size(n, width);
	if (size < plan->size - plan->size / 8)
	{
		plan->header.mode = ES_INTVEC_DELTA;
		plan->header.width = width;
		plan->header.base = (uint64_t) dmin;
		plan->size = size;
	}

	for (uint8_t step = 0; step <= 1; step++)
	{
		uint32_t nruns = breaks[step] + 1;

		if (runs_size(nruns, 0) >= plan->size)
			continue;
		min = max = (int64_t) values[0];
		for (uint32_t i = 1; i < n; i++)
		{
			int64_t v = (int64_t) values[i];

			if (values[i] - values[i - 1] == step)
				continue;
			min = v < min ? v : min;
			max = v > max ? v : max;
		}
		width = bits_for((uint64_t) max - (uint64_t) min, whole_bytes);
		size = runs_size(nruns, width);
		if (size < plan->size)
		{
			plan->header.mode = ES_INTVEC_RUNS;
			plan->header.width = width;
			plan->header.step = step;
			plan->header.nruns = nruns;
			plan->header.base = (uint64_t) min;
			plan->size = size;
		}
	}
}

/* Bits go out through a 64-bit accumulator. */
typedef struct BitWriter
{
	uint8_t *out;
	uint64_t bits;
	uint32_t nbits;
	uint8_t	 width;
} BitWriter;

static inline void
put_bits(BitWriter *w, uint64_t v)
{
	if (w->width == 64)
	{
		memcpy(w->out, &v, 8);
		w->out += 8;
		return;
	}
	w->bits |= v << w->nbits;
	if (w->nbits + w->width >= 64)
	{
		memcpy(w->out, &w->bits, 8);
		w->out += 8;
		w->bits = w->nbits == 0 ? 0 : v >> (64 - w->nbits);
		w->nbits = w->nbits + w->width - 64;
	}
	else
		w->nbits += w->width;
}

static void
flush_bits(BitWriter *w)
{
	if (w->nbits > 0)
		memcpy(w->out, &w->bits, 8);
}

void
es_intvec_encode(const uint64_t *values, const EsIntVecPlan *plan, uint8_t *out)
{
	const EsIntVecHeader *h = &plan->header;
	BitWriter			  w = {.width = h->width};
	uint8_t				 *side = out + sizeof(*h);

	memcpy(out, h, sizeof(*h));
	if (h->mode == ES_INTVEC_RUNS)
	{
		uint32_t run = 0;

		memset(side, 0, PAD8(2 * (size_t) h->nruns));
		w.out = side + PAD8(2 * (size_t) h->nruns);
		for (uint32_t i = 0; i < plan->n; i++)
		{
			uint16_t end = (uint16_t) (i + 1);

			if (i == 0 || values[i] - values[i - 1] != h->step)
			{
				put_bits(&w, values[i] - h->base);
				run++;
			}
			memcpy(side + 2 * (size_t) (run - 1), &end, 2);
		}
	}
	else if (h->mode == ES_INTVEC_DELTA)
	{
		w.out = side + 8 * (size_t) block_count(plan->n);
		for (uint32_t i = 0; i < plan->n; i++)
		{
			if (i % ES_INTVEC_BLOCK == 0)
			{
				memcpy(side + 8 * (size_t) (i / ES_INTVEC_BLOCK), &values[i], 8);
				put_bits(&w, 0);
			}
			else
				put_bits(&w, values[i] - values[i - 1] - h->base);
		}
	}
	else
	{
		w.out = side;
		for (uint32_t i = 0; i < plan->n; i++)
			put_bits(&w, values[i] - h->base);
	}
	flush_bits(&w);
}

/* ---- decoding ---- */

bool
es_intvec_open(EsIntVec *iv, const uint8_t *buf, size_t len, uint32_t n)
{
	EsIntVecHeader h;
	size_t		   side_len = 0;
	uint32_t	   npacked = n;

	if (len < sizeof(h) || n > ES_INTVEC_MAX)
		return false;
	memcpy(&h, buf, sizeof(h));
	if (h.width > 64 || (h.width > 56 && h.width < 64))
		return false;
	if (h.mode == ES_INTVEC_RUNS)
	{
		if (h.nruns == 0 || h.nruns > n || h.step > 1)
			return false;
		npacked = h.nruns;
		side_len = PAD8(2 * (size_t) h.nruns);
	}
	else if (h.mode == ES_INTVEC_DELTA)
		side_len = 8 * (size_t) block_count(n);
	else if (h.mode != ES_INTVEC_FRAME)
		return false;

	iv->size = sizeof(h) + side_len + packed_size(npacked, h.width);
	if (iv->size > len)
		return false;
	iv->mode = h.mode;
	iv->width = h.width;
	iv->step = h.step;
	iv->n = n;
	iv->nruns = h.nruns;
	iv->base = h.base;
	iv->side = buf + sizeof(h);
	iv->packed = iv->side + side_len;

	if (h.mode == ES_INTVEC_RUNS)
	{
		uint32_t prev = 0;

		for (uint32_t r = 0; r < h.nruns; r++)
		{
			uint32_t end = load16(iv->side + 2 * (size_t) r);

			if (end <= prev)
				return false;
			prev = end;
		}
		if (prev != n)
			return false;
	}
	return true;
}

/* The run that index i is in. */
static uint32_t
find_run(const EsIntVec *iv, uint32_t i)
{
	uint32_t lo = 0;
	uint32_t hi = iv->nruns - 1;

	while (lo < hi)
	{
		uint32_t mid = (lo + hi) / 2;

		if (load16(iv->side + 2 * (size_t) mid) > i)
			hi = mid;
		else
			lo = mid + 1;
	}
	return lo;
}

static void
decode_runs(const EsIntVec *iv, uint32_t first, uint32_t n, uint64_t *out)
{
	uint32_t run = find_run(iv, first);
	uint32_t i = first;
	uint32_t stop = first + n;

	while (i < stop)
	{
		uint32_t start = run == 0 ? 0 : load16(iv->side + 2 * (size_t) (run - 1));
		uint32_t end = load16(iv->side + 2 * (size_t) run);
		uint64_t v = iv->base + unpack(iv->packed, iv->width, run);

		if (end > stop)
			end = stop;
		v += (uint64_t) iv->step * (i - start);
		for (; i < end; i++, v += iv->step)
			*out++ = v;
		run++;
	}
}

static void
decode_deltas(const EsIntVec *iv, uint32_t first, uint32_t n, uint64_t *out)
{
	uint32_t i = first - first % ES_INTVEC_BLOCK;
	uint32_t stop = first + n;
	uint64_t v = 0;

	for (; i < stop; i++)
	{
		if (i % ES_INTVEC_BLOCK == 0)
			v = load64(iv->side + 8 * (size_t) (i / ES_INTVEC_BLOCK));
		else
			v += iv->base + unpack(iv->packed, iv->width, i);
		if (i >= first)
			*out++ = v;
	}
}

void
es_intvec_decode(const EsIntVec *iv, uint32_t first, uint32_t n, uint64_t *out)
{
	if (n == 0)
		return;
	if (iv->mode == ES_INTVEC_RUNS)
		decode_runs(iv, first, n, out);
	else if (iv->mode == ES_INTVEC_DELTA)
		decode_deltas(iv, first, n, out);
	else if (iv->width == 0)
		for (uint32_t i = 0; i < n; i++)
			out[i] = iv->base;
	else
	{
		const uint8_t *packed = iv->packed;
		uint64_t	   base = iv->base;
		uint64_t	   mask = width_mask(iv->width);
		uint64_t	   bit = (uint64_t) first * iv->width;

		for (uint32_t i = 0; i < n; i++, bit += iv->width)
			out[i] = base + ((load64(packed + (bit >> 3)) >> (bit & 7)) & mask);
	}
}

uint64_t
es_intvec_get(const EsIntVec *iv, uint32_t i)
{
	uint64_t v;

	if (iv->mode == ES_INTVEC_FRAME)
		return iv->base + unpack(iv->packed, iv->width, i);
	es_intvec_decode(iv, i, 1, &v);
	return v;
}
