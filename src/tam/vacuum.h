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

/* What VACUUM FULL calls copying.  relfrozenxid moves to *frozen at most; *rows: how many there are. */
extern void es_vacuum_full(Relation old_table, Relation new_table, TransactionId *frozen, double *rows);
/* At PRE_COMMIT: the end of VACUUM FULL. */
extern void es_vacuum_precommit(void);
/* At ABORT.  Does not throw. */
extern void es_vacuum_end(void);

/* Oldest full xid without durable verdict over all shards. */
extern EsFxid es_oldest_undecided(void);

#endif /* ES_TAM_VACUUM_H */
