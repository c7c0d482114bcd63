/*-------------------------------------------------------------------------
 *
 * estimate.h
 *	  How large a table is: for the planner, VACUUM, and people (estimate.c).
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_TAM_ESTIMATE_H
#define ES_TAM_ESTIMATE_H

#include "postgres.h"

#include "common/relpath.h"
#include "storage/block.h"
#include "utils/relcache.h"

typedef struct EsTableTotals
{
	uint64 rows;  /* in segments and MemTables */
	uint64 bytes; /* of its segment files, the metapage and the MemTables' rows */
	uint64 segment_bytes;
	uint64 raw_bytes; /* of the segments, uncompressed */
	uint64 max_position;
} EsTableTotals;

/* Asks all shards.  Waits for shards that start. */
extern void es_table_totals(Relation rel, EsTableTotals *totals);

extern void es_relation_estimate_size(Relation rel, int32 *attr_widths, BlockNumber *pages, double *tuples,
									  double *allvisfrac);

/* The relation_size callback: the file's, or while ANALYZE weighs the children of a parent, the rows'. */
extern uint64 es_relation_size(Relation rel, ForkNumber fork);

#endif /* ES_TAM_ESTIMATE_H */
