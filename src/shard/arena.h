/*-------------------------------------------------------------------------
 *
 * arena.h
 *	  Memory for rows that maintenance workers can read: the shard's DSA area, and
 *	  small pieces carved from chunks of it.
 *
 * A piece belongs to its chunk; the chunk goes back to the area when all its
 * pieces were released.  Staged rows and rows of finished transactions have
 * chunks of their own, so that the few staged rows of an idle
 * transaction do not hold memory that a flush would free.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_ARENA_H
#define ES_SHARD_ARENA_H

#include "postgres.h"

#include "utils/dsa.h"

typedef struct EsArenaChunk EsArenaChunk;

typedef enum EsArenaKind
{
	ES_ARENA_STAGED = 0,
	ES_ARENA_FINISHED = 1
} EsArenaKind;

/* Makes the area of this incarnation and publishes its handle. */
extern void es_arena_init(void);

/*
 * `size` bytes, aligned to 8, not zeroed.  *chunk is what es_arena_release wants
 * back.  NULL when memory is short.
 */
extern void *es_arena_carve(EsArenaKind kind, Size size, dsa_pointer *pointer, EsArenaChunk **chunk);
extern void	 es_arena_release(dsa_pointer pointer, EsArenaChunk *chunk);

#endif /* ES_SHARD_ARENA_H */
