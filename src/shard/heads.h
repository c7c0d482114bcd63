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
	uint64		hash;
	const void *bytes;
	Size		len;
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
	int64		version;
	EsPosition	position;
	EsFxid		fxid;
	const uint8 *content;		/* 16 bytes; NULL = none */
} EsEventFound;

/*
 * Calls found() for every committed event of the context whose id wanted() wants.
 * false: damage.
 */
typedef struct EsEventProbe
{
	bool		(*wanted) (void *arg, const uint8 *event_id);
	void		(*found) (void *arg, const uint8 *event_id, const EsEventFound *event);
	void	   *arg;
} EsEventProbe;

extern bool es_event_ids_probe(const EsContextId *context, const EsEventProbe *probe,
							   EsDamage *damage);

/* Is the segment's row range one of committed rows?  (Adopted or finished ones have a transaction.) */
extern EsVerdict es_segment_verdict(EsSegmentRef *ref);

#endif							/* ES_SHARD_HEADS_H */
