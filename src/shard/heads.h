/*-------------------------------------------------------------------------
 *
 * heads.h
 *	  What heads.c, event_ids.c and the PREPARE files share.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_HEADS_H
#define ES_SHARD_HEADS_H

#include "postgres.h"

#include "shard/engine.h"

/* A context as it is looked for. */
typedef struct EsContextId
{
	const EsTableKey *table;
	uint64			  hash;
	const void		 *bytes;
	Size			  len;
} EsContextId;

/* Where damage was met. */
typedef struct EsDamage
{
	EsError		err;
	const char *path;
} EsDamage;

/* A committed event with an id. */
typedef struct EsEventFound
{
	int64		 version;
	EsPosition	 position;
	EsFxid		 fxid;
	const uint8 *content; /* 16 bytes; NULL = none */
} EsEventFound;

/*
 * Calls found() for every committed event of the context whose id wanted() wants.  ids are those
 * that may be wanted.  false: damage.
 */
typedef struct EsEventProbe
{
	bool (*wanted)(void *arg, const uint8 *event_id);
	void (*found)(void *arg, const uint8 *event_id, const EsEventFound *event);
	void			   *arg;
	const uint8 *const *ids;
	uint64				nids;
} EsEventProbe;

extern bool es_event_ids_probe(const EsContextId *context, const EsEventProbe *probe, EsDamage *damage);

/* Calls back for every row of the context in the segment that has an event id; hidden: ES_WANT_* to
 * be read with it.  row: its number in the segment.  false: damage. */
typedef void (*EsEventIdCallback)(void *arg, uint64 row, const uint8 *id, const EsRowBlock *block, uint32 r);
extern bool es_event_ids_walk(const EsContextId *context, EsSegmentRef *ref, uint32 hidden,
							  EsEventIdCallback callback, void *arg, EsDamage *damage);

/* ---- event_filter.c ---- */

/* Begins a filter for a context with about nids event ids. */
extern void es_event_filter_make(const EsContextId *c, uint64 nids);

/* *absent: the context certainly has none of the ids.  false: damage. */
extern bool es_event_filter_absent(const EsContextId *c, const uint8 *const *ids, uint64 nids, bool *absent,
								   EsDamage *damage);

/* Is the segment's row range one of committed rows?  (Adopted or finished ones have a transaction.) */
extern EsVerdict es_segment_verdict(EsSegmentRef *ref);

#endif /* ES_SHARD_HEADS_H */
