/*
 * Filters: a key that was added is never denied, and few absent keys are taken for present.
 */
#include "core/filter.h"

#include "tap.h"

static void
test_no_false_negatives(void)
{
	PROMISE("a key that was added is always found, for random, sorted and adjacent keys");
	for (int round = 0; round < 60; round++)
	{
		uint32_t	   n = (uint32_t) rnd_below(5000) + 1;
		uint32_t	   nblocks = es_filter_nblocks(rnd_below(4) ? n : n / 50);
		EsFilterBlock *blocks = calloc(nblocks, sizeof(*blocks));
		uint64_t	   base = rnd();
		uint64_t	  *keys = malloc(n * sizeof(*keys));
		uint32_t	   denied = 0;

		for (uint32_t i = 0; i < n; i++)
		{
			keys[i] = round % 3 == 0 ? rnd() : round % 3 == 1 ? base + i : base + ((uint64_t) i << 40);
			es_filter_add(blocks, nblocks, keys[i]);
		}
		for (uint32_t i = 0; i < n; i++)
			denied += !es_filter_maybe(blocks, nblocks, keys[i]);
		CHECK(denied == 0);
		free(keys);
		free(blocks);
	}
}

static void
test_false_positives(void)
{
	PROMISE("less than 1.5 % of absent keys are taken for present, also when keys share their upper bits");
	for (int shift = 0; shift <= 40; shift += 20)
	{
		uint32_t	   n = 8192;
		uint32_t	   nblocks = es_filter_nblocks(n);
		EsFilterBlock *blocks = calloc(nblocks, sizeof(*blocks));
		uint64_t	   prefix = UINT64_C(0xabcdef0123456789) & ~(UINT64_MAX >> shift);
		uint32_t	   positives = 0;

		for (uint32_t i = 0; i < n; i++)
			es_filter_add(blocks, nblocks, prefix | rnd() >> shift);
		for (uint32_t i = 0; i < 100000; i++)
			positives += es_filter_maybe(blocks, nblocks, prefix | rnd() >> shift);
		if (shift < 40)
			CHECK(positives < 1500);
		else
			CHECK(positives < 1600); /* 24 bits are left: some of these were added */
		free(blocks);
	}
}

static void
test_empty(void)
{
	PROMISE("an empty filter denies everything, and has a block");
	EsFilterBlock block = {{0}};

	CHECK(es_filter_nblocks(0) == 1);
	for (int i = 0; i < 1000; i++)
		CHECK(!es_filter_maybe(&block, 1, rnd()));
}

static void
test_frozen(void)
{
	PROMISE("blocks and bits of a key are those of format version 1");
	EsFilterBlock		  blocks[4] = {{{0}}};
	static const uint32_t expected[8] = {0x04000000, 0x10000000, 0x02000000, 0x00020000,
										 0x10000000, 0x00000008, 0x00000100, 0x00000080};

	es_filter_add(blocks, 4, UINT64_C(0x0123456789abcdef));
	CHECK(memcmp(blocks[2].words, expected, sizeof(expected)) == 0);
	for (int i = 0; i < 4; i++)
		for (int k = 0; k < 8; k++)
			CHECK(i == 2 || blocks[i].words[k] == 0);
	CHECK(es_filter_nblocks(8192) == 320 && es_filter_nblocks(1) == 1 && es_filter_nblocks(26) == 2);
}

int
main(void)
{
	test_no_false_negatives();
	test_false_positives();
	test_empty();
	test_frozen();
	return done();
}
