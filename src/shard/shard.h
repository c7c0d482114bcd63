/*-------------------------------------------------------------------------
 *
 * shard.h
 *	  The state of a shard's process that its modules share, and its entry
 *	  points.  One process, one thread, one event loop: nothing here is locked.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_SHARD_H
#define ES_SHARD_SHARD_H

#include "postgres.h"

#include "utils/dsa.h"

#include "core/arith.h"
#include "ipc/server.h"
#include "ipc/shmem.h"

extern int			  es_shard_id;		 /* of this process; -1 elsewhere */
extern EsShardShared *es_shard;			 /* its shared part */
extern dsa_area		 *es_arena;			 /* memory that maintenance workers can read */
extern bool			  es_shard_stopping; /* the server stops */

#define ES_COUNT(name, n) es_counter_add(es_shard->counters.name, (n))
#define ES_SET(name, n)	  es_counter_set(es_shard->counters.name, (n))

/* Config reload, barriers, SIGTERM; called where a loop may take long. */
extern void es_shard_interrupts(void);

/* Allocation in the arena; NULL/Invalid when memory is short: the caller answers 53200. */
extern dsa_pointer es_arena_alloc(Size size);

extern PGDLLEXPORT void es_shard_main(Datum arg);
extern PGDLLEXPORT void es_keeper_main(Datum arg);
extern PGDLLEXPORT void es_maintenance_main(Datum arg);

#endif /* ES_SHARD_SHARD_H */
