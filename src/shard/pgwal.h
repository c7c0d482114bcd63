/*-------------------------------------------------------------------------
 *
 * pgwal.h
 *	  Reading our messages back from PostgreSQL's WAL.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_PGWAL_H
#define ES_SHARD_PGWAL_H

#include "postgres.h"

#include "core/message.h"

/* payload is checked as far as CRCs go (es_message_check), not its structure. */
typedef void (*EsMessageCallback)(void *arg, const EsMessageHeader *header, const void *payload, size_t len,
								  EsLsn start, EsLsn end);

/*
 * Calls back for every whole message of this store whose last piece ends at or before
 * `upto` and whose first piece starts at or after `from`, in the order of their ends.
 * BATCH of other shards are skipped before they are assembled (shard = ES_SHARD_NONE:
 * none is).  ERROR 58P01/55000 "…WAL that shard N needs is gone" with LSN, slot and hint if a
 * WAL file is missing.  Reports progress in recovery_at and takes interrupts (ProcessInterrupts-like
 * callback of the shard: es_shard_interrupts()).
 */
extern void es_pgwal_read(uint16 shard, EsLsn from, EsLsn upto, EsMessageCallback callback, void *arg);

/* One message by the start of its first piece; malloc'd payload.  Pieces are looked for up to `upto`. */
extern void es_pgwal_read_one(EsLsn start, EsLsn upto, EsMessageHeader *header, void **payload, size_t *len);

#endif /* ES_SHARD_PGWAL_H */
