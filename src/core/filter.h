/*-------------------------------------------------------------------------
 *
 * filter.h
 *	  Split-block Bloom filter of 64-bit hashes (Putze, Sanders, Singler;
 *	  the variant of Apache Impala and Parquet): a key sets one bit in each of
 *	  the eight 32-bit words of one 32-byte block.
 *
 * With ES_FILTER_BITS_PER_KEY bits some 0.9 % of absent keys are taken for present.
 * The blocks are plain memory owned by the caller, little-endian.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_CORE_FILTER_H
#define ES_CORE_FILTER_H

#include "core/format.h"

#define ES_FILTER_BITS_PER_KEY 10

typedef struct EsFilterBlock
{
	uint32_t words[8];
} EsFilterBlock;

_Static_assert(sizeof(EsFilterBlock) == 32, "EsFilterBlock is on disk");

/* Blocks that nkeys keys want; at least one. */
extern uint32_t es_filter_nblocks(uint64_t nkeys);

/* The blocks must be zeroed before the first key is added. */
extern void es_filter_add(EsFilterBlock *blocks, uint32_t nblocks, uint64_t hash);

/* false: the key was certainly not added. */
extern bool es_filter_maybe(const EsFilterBlock *blocks, uint32_t nblocks, uint64_t hash);

#endif /* ES_CORE_FILTER_H */
