/*-------------------------------------------------------------------------
 *
 * idle.h
 *	  The moment after a turn of the shard's loop, before it sleeps.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_IDLE_H
#define ES_SHARD_IDLE_H

#include "postgres.h"

/* A message of the session with this slot was taken. */
extern void es_idle_message(int slot);

/* After a turn that took only what needs no answer: sleeps, timeout ms at most. */
extern void es_idle_nap(long timeout);

/* After a turn that answered: true if more was asked for meanwhile, so there is no need to sleep. */
extern bool es_idle_spin(void);

#endif /* ES_SHARD_IDLE_H */
