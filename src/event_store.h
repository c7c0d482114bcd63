/*-------------------------------------------------------------------------
 *
 * event_store.h
 *	  Module start: what _PG_init calls, and what it leaves behind for others.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_EVENT_STORE_H
#define ES_EVENT_STORE_H

#include "postgres.h"

/* Hooks and callbacks of the table access method; tam/. */
extern void es_tam_init(void);

/* Number of shards that this server runs; set by _PG_init, 0 without preload. */
extern int es_configured_shards;

/* False in binary upgrade and single-user mode: no shard will ever come. */
extern bool es_has_workers;

#endif /* ES_EVENT_STORE_H */
