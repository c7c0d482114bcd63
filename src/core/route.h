/*-------------------------------------------------------------------------
 *
 * route.h
 *	  From a context to its shard: canonical bytes, hash, slot, shard.
 *
 * The hash is PostgreSQL's hash_bytes_extended() (Bob Jenkins' lookup3, in
 * common/hashfn.c) with the context class as seed; frozen with the format and
 * pinned by test vectors.  slot = upper 10 bits of the hash; the store file maps
 * slots to shards, so that slots can move later.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_CORE_ROUTE_H
#define ES_CORE_ROUTE_H

#include "core/format.h"

extern uint64_t es_context_hash(EsContextClass klass, const void *bytes, size_t len);

static inline uint32_t
es_hash_slot(uint64_t hash)
{
	return (uint32_t) (hash >> 54);
}

/* The initial map: slots in nshards runs of (almost) equal length. */
extern void es_slot_map_init(uint8_t map[ES_ROUTING_SLOTS], int nshards);

/*
 * The canonical bytes of a context value as stored in a column.
 *	 value: for varlena classes the varlena itself, for name the NUL-padded 64
 *	 bytes, else the fixed-width value in memory; scratch: 8 bytes for classes
 *	 that are widened.  The result points into value or scratch.
 */
extern void es_context_bytes(EsContextClass klass, int16_t attlen, const void *value, int64_t *scratch,
							 const void **bytes, size_t *len);

/* Data part of a varlena value that is neither external nor compressed. */
extern void es_varlena_data(const void *value, const char **data, size_t *len);

/* Whole size of such a value with its header. */
extern size_t es_varlena_size(const void *value);

#endif /* ES_CORE_ROUTE_H */
