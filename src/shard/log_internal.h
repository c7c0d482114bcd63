/*-------------------------------------------------------------------------
 *
 * log_internal.h
 *	  What the two halves of a running log share: log_write.c, which turns frames into
 *	  groups in a file, and log.c, which makes them durable.  One process, nothing is locked.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_LOG_INTERNAL_H
#define ES_SHARD_LOG_INTERNAL_H

#include "postgres.h"

#include "datatype/timestamp.h"

#include "shard/log.h"
#include "shard/log_file.h"

/* A place in the log: behind which frame we are. */
typedef struct EsLogEnd
{
	uint64	 ticket;
	EsOwnLsn lsn; /* byte after the last frame; 0 = there never was one */
	uint32	 crc; /* of that frame */
} EsLogEnd;

typedef struct EsLog
{
	bool		   opened;		/* log.c */
	MemoryContext  context;		/* log.c; everything below lives in it */
	EsFileIdentity identity;	/* log.c, at start */
	uint64		   incarnation; /* log.c, at start */

	EsLogFile *file;		/* the current one; log_write.c */
	uint64	   last_ticket; /* log_write.c */
	EsLsn	   newest_end;	/* highest pg_end ever appended; log_write.c */
	EsLogEnd   encoded;		/* behind the last frame that has a place; log_write.c */
	EsLogEnd   written;		/* behind the last frame that was written; log_write.c */
	EsLogEnd   durable;		/* what the last synced control block says; log.c */
} EsLog;

extern EsLog es_log;

/* ---- log_write.c ---- */

extern void es_log_writer_open(void);

/*
 * Issues the next group if there is one and it is worth it; hurry: somebody waits for it, so
 * it does not wait for company.
 */
extern void es_log_write_tick(TimestampTz now, bool hurry);

/* Last ticket that F covers, in the queue or before it. */
extern uint64 es_log_covered_by(EsLsn flushed);

/* Nothing is queued or in flight. */
extern bool es_log_written_all(void);
/* A frame waits that F covers. */
extern bool es_log_can_write(EsLsn flushed);
/* ms until the writer wants to be called again, -1 = never */
extern long es_log_write_timeout(TimestampTz now, bool hurry);
/* errno that keeps groups from being written, 0 = none */
extern int es_log_write_errno(void);

extern void es_log_forget_boundaries(void);

/* ---- log.c ---- */

/* Messages of frames hold restart_lsn back until they are durable. */
extern void es_log_remember_undurable(uint64 ticket, EsLsn start);

#endif /* ES_SHARD_LOG_INTERNAL_H */
