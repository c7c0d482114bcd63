/*-------------------------------------------------------------------------
 *
 * maint.h
 *	  What maintenance workers do: write segments for shards, and look for storages
 *	  that no relation has any more.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_MAINT_MAINT_H
#define ES_MAINT_MAINT_H

#include "postgres.h"

#include "utils/dsa.h"

#include "ipc/jobs.h"

/* ---- build.c ---- */

/*
 * Writes the job's rows to pgsql_tmp.seg.<id> in its shard's directory and syncs the file.
 * ERROR if that fails; the file is gone then.  Memory is the caller's current context,
 * some 20 bytes per row and 100 per batch beside what the segment writer holds.
 */
extern void es_build_segment(const EsJob *job, dsa_area *arena, EsSegmentSummary *summary);

/* ---- worker.c ---- */

/* The shard's incarnation that wanted something is no more. */
extern bool es_generation_gone(int shard, uint32 generation);

/* ---- collect.c, in maintenance worker 0 ---- */

/* Looks for dead storages if it is time to; returns ms until it wants to be called again. */
extern long es_collect_tick(void);

/* ---- collect.c, a worker of its own; collect_database.c, one in a database ---- */

/*
 * A look at one database: the shared part that the collector makes and the worker fills.
 * Lies at the start of a DSM segment that both attach; the worker writes found[] and then
 * state, the collector reads them when the worker is gone.
 */
typedef enum EsLookState
{
	ES_LOOK_RUNNING = 0,
	ES_LOOK_COMPLETE,	/* every event table's metapage was read */
	ES_LOOK_INCOMPLETE, /* some table was locked or damaged: nothing is known */
} EsLookState;

typedef struct EsLook
{
	Oid				 database;
	pg_atomic_uint32 state;
	uint32			 nids;
	struct
	{
		uint64 id;
		uint64 found;			  /* 1 = a relation has it */
	} ids[FLEXIBLE_ARRAY_MEMBER]; /* ascending */
} EsLook;

extern PGDLLEXPORT void es_collect_main(Datum arg);
extern PGDLLEXPORT void es_collect_database_main(Datum arg);

#endif /* ES_MAINT_MAINT_H */
