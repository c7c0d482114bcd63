/*-------------------------------------------------------------------------
 *
 * collect.h
 *	  What a drain of the queues brings, handled in the order that the protocol wants.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_COLLECT_H
#define ES_SHARD_COLLECT_H

#include "postgres.h"

extern void es_collect_init(void);

/*
 * Takes what the queues hold and handles it.  True if the drain was complete and everything was
 * handled: then all that was sent before the call has been applied.
 */
extern bool es_collect_drain(void);

/* Goes on with what was taken but could not be handled; true if nothing is left. */
extern bool es_collect_apply(void);

/* Answers SYNC requests that are served. */
extern void es_collect_syncs(void);

#endif /* ES_SHARD_COLLECT_H */
