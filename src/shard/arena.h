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
 * When the system has no more shared memory, pieces are private memory of the shard, so that what was
 * committed can always be applied and read.  A job gets copies of them (build.c).  Meanwhile es_arena_short is true:
 * the shard flushes and spills, and takes nothing more until there is memory again or
 * es_arena_stuck says that this does not help.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_ARENA_H
#define ES_SHARD_ARENA_H

#include "postgres.h"

#include "datatype/timestamp.h"
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
 * `size` bytes, aligned to 8, not zeroed.  Address, *pointer and *chunk are what es_arena_release wants
 * back; *pointer is invalid if it is private memory.  NULL when there is none of that either, or when a
 * large piece had better wait for a flush.
 */
extern void *es_arena_carve(EsArenaKind kind, Size size, dsa_pointer *pointer, EsArenaChunk **chunk);
extern void	 es_arena_release(void *address, dsa_pointer pointer, EsArenaChunk *chunk);

/* Pieces that are private memory now. */
extern uint64 es_arena_private;

/*
 * Memory for a job.  Up to ES_ARENA_RESERVE bytes there always is some, for one job at a time: what was kept
 * for it.  Invalid: not now.
 */
#define ES_ARENA_RESERVE ((Size) 512 * 1024)
extern dsa_pointer es_arena_job_alloc(Size size);
extern void		   es_arena_job_free(dsa_pointer pointer);

/* Is there no shared memory? */
extern bool es_arena_short;
/* Looks now and then whether there is some again. */
extern void es_arena_tick(TimestampTz now);
/* A flush or a spill has freed memory: it may go on helping. */
extern void es_arena_freed(void);
/* Has nothing helped for long?  idle: nothing is under way that could. */
extern bool es_arena_stuck(bool idle);

#endif /* ES_SHARD_ARENA_H */
