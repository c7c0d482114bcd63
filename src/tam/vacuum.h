/*-------------------------------------------------------------------------
 *
 * vacuum.h
 *	  VACUUM of an event table (vacuum.c).
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_TAM_VACUUM_H
#define ES_TAM_VACUUM_H

#include "postgres.h"

#include "utils/relcache.h"

#include "core/format.h"

extern void es_vacuum(Relation rel);

/* Oldest full xid without durable verdict over all shards. */
extern EsFxid es_oldest_undecided(void);

#endif /* ES_TAM_VACUUM_H */
