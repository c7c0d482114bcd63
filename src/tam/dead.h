/*-------------------------------------------------------------------------
 *
 * dead.h
 *	  Dead batches of the own transaction, for those who open scans (dead.c).
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_TAM_DEAD_H
#define ES_TAM_DEAD_H

#include "postgres.h"

#include "storage/dsm.h"

#include "core/format.h"

/* Of one table, per shard; the shards' starts lie one behind the other. */
typedef struct EsDeadStarts
{
	uint32 n[ES_MAX_SHARDS];
	EsLsn *starts[ES_MAX_SHARDS];
} EsDeadStarts;

/*
 * Those of the table; in a parallel worker the leader's.  Returns what is to be pfreed when
 * they have been sent, or NULL.
 */
extern EsLsn *es_dead_starts(const EsTableKey *key, EsDeadStarts *dead);

/*
 * Before a parallel plan runs: lets workers see them.  False if there are none, or they see them already; else
 * es_dead_withdraw follows when it has run, also if that fails.
 */
extern bool es_dead_publish(dsm_segment **outer);
extern void es_dead_withdraw(dsm_segment *outer);

#endif /* ES_TAM_DEAD_H */
