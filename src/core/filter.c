/*-------------------------------------------------------------------------
 *
 * filter.c
 *	  See filter.h.
 *
 * Callers give sorted runs of hashes, whose upper bits are alike, so the hash is
 * mixed once more (the finalizer of MurmurHash3) before it is split into
 * block (upper half) and bits (lower half times eight odd constants).  All of
 * this is frozen with the file format.
 *
 *-------------------------------------------------------------------------
 */
#include "core/filter.h"

static const uint32_t salts[8] = {0x47b6137b, 0x44974d91, 0x8824ad5b, 0xa2b7289d,
								  0x705495c7, 0x2df1424b, 0x9efc4947, 0x5c6bfb31};

static inline uint64_t
mix(uint64_t h)
{
	h ^= h >> 33;
	h *= UINT64_C(0xff51afd7ed558ccd);
	h ^= h >> 33;
	h *= UINT64_C(0xc4ceb9fe1a85ec53);
	h ^= h >> 33;
	return h;
}

uint32_t
es_filter_nblocks(uint64_t nkeys)
{
	uint64_t bits = nkeys * ES_FILTER_BITS_PER_KEY;
	uint64_t blocks = (bits + 255) / 256;

	if (blocks == 0)
		return 1;
	return blocks > UINT32_MAX ? UINT32_MAX : (uint32_t) blocks;
}

void
es_filter_add(EsFilterBlock *blocks, uint32_t nblocks, uint64_t hash)
{
	uint64_t  h = mix(hash);
	uint32_t *words = blocks[((h >> 32) * nblocks) >> 32].words;

	for (int i = 0; i < 8; i++)
		words[i] |= UINT32_C(1) << (((uint32_t) h * salts[i]) >> 27);
}

bool
es_filter_maybe(const EsFilterBlock *blocks, uint32_t nblocks, uint64_t hash)
{
	uint64_t		h = mix(hash);
	const uint32_t *words = blocks[((h >> 32) * nblocks) >> 32].words;

	for (int i = 0; i < 8; i++)
		if ((words[i] & (UINT32_C(1) << (((uint32_t) h * salts[i]) >> 27))) == 0)
			return false;
	return true;
}
