/*-------------------------------------------------------------------------
 *
 * spool.h
 *	  Bytes that a transaction notes one behind the other, in memory while they are few, then in a
 *	  temporary file.
 *
 * Like a BufFile, but for two things.  It can be let go of in the callbacks of COMMIT and ABORT: closing
 * a BufFile writes what is still in its buffer and may throw there, which the server does not
 * survive.  And a write that fails leaves it as it was before.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_TAM_SPOOL_H
#define ES_TAM_SPOOL_H

#include "postgres.h"

typedef struct EsSpool EsSpool;

/* In the context, which must live as long as the transaction. */
extern EsSpool *es_spool_create(MemoryContext context);

/* Returns where the bytes begin.  If it throws, nothing was added. */
extern uint64 es_spool_add(EsSpool *s, const void *bytes, Size len);

/* Throws unless all of the bytes were added before. */
extern void es_spool_read(EsSpool *s, uint64 offset, void *bytes, Size len);

/* Forgets what lies at `end` and behind.  Does not throw. */
extern void es_spool_truncate(EsSpool *s, uint64 end);

/* To be called before the transaction's resource owner lets go of the file, also if it fails.  Does not
 * throw; the memory goes with its context. */
extern void es_spool_drop(EsSpool *s);

#endif /* ES_TAM_SPOOL_H */
