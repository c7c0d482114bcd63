/*-------------------------------------------------------------------------
 *
 * scan.h
 *	  Table scans of the access method (scan.c); callbacks for handler.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_TAM_SCAN_H
#define ES_TAM_SCAN_H

#include "postgres.h"

#include "access/tableam.h"

struct SampleScanState;

extern TableScanDesc es_scan_begin(Relation rel, Snapshot snapshot, int nkeys, struct ScanKeyData *key,
								   ParallelTableScanDesc pscan, uint32 flags);
extern void			 es_scan_end(TableScanDesc scan);
extern void es_scan_rescan(TableScanDesc scan, struct ScanKeyData *key, bool set_params, bool allow_strat,
						   bool allow_sync, bool allow_pagemode);
extern bool es_scan_getnextslot(TableScanDesc scan, ScanDirection direction, TupleTableSlot *slot);

/*
 * True while a query runs that stores no rows: the order in which it reads others, which nobody asked
 * for, does not matter.  Set by hooks.c.
 */
extern bool es_scan_any_order;

extern Size es_parallelscan_estimate(Relation rel);
extern Size es_parallelscan_initialize(Relation rel, ParallelTableScanDesc pscan);
extern void es_parallelscan_reinitialize(Relation rel, ParallelTableScanDesc pscan);

/* By TID: own rows from the backend's copy, committed ones from the shards. */
extern bool es_fetch_row(Relation rel, ItemPointer tid, Snapshot snapshot, TupleTableSlot *slot);

extern bool es_analyze_take_block(TableScanDesc scan);
extern bool es_analyze_next_tuple(TableScanDesc scan, double *liverows, TupleTableSlot *slot);

extern bool es_sample_next_block(TableScanDesc scan, struct SampleScanState *scanstate);
extern bool es_sample_next_tuple(TableScanDesc scan, struct SampleScanState *scanstate, TupleTableSlot *slot);

#endif /* ES_TAM_SCAN_H */
