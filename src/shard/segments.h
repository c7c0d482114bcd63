/*-------------------------------------------------------------------------
 *
 * segments.h
 *	  The shard's live segments by table: references for readers, lookups of
 *	  contexts, removal of files when the last reader is done.
 *
 * A pending segment (ES_SEGMENT_PENDING) has ES_PENDING_COLUMNS columns more than its table,
 * behind the table's own (EsSegmentSpec.ncols counts them; attributes ncols, ncols + 1 ...),
 * which a segment adopted in place keeps until it is compacted:
 *	 ES_PENDING_PLACE	int8: number of the batch in EsManifestPending's starts (= in the job's
 *						array) << ES_PENDING_ROW_BITS | row in the batch
 *	 ES_PENDING_CID		int4: command id of the row
 *	 ES_PENDING_ORDINAL	int8: the row's ordinal if positions are given, else NULL
 * From the first follow the row's batch and, with the number of rows of the batches
 * before, its number in FINISH's bitmap.  Its hidden position is the ordinal, or, for a batch with
 * ES_BATCH_GIVEN_POSITIONS, the given position (adopted with base 0).  Its hidden version is what its
 * version column says, 0 = NULL; it counts after adoption only if there are no first versions.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_SEGMENTS_H
#define ES_SHARD_SEGMENTS_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "lib/ilist.h"

#include "core/manifest.h"
#include "core/segment.h"
#include "ipc/server.h"
#include "shard/txn.h"

#define ES_PENDING_PLACE	0
#define ES_PENDING_CID		1
#define ES_PENDING_ORDINAL	2
#define ES_PENDING_COLUMNS	3
#define ES_PENDING_ROW_BITS 20

/* The shapes of those columns, for the writer. */
extern const EsColumnDesc es_pending_columns[ES_PENDING_COLUMNS];

typedef struct EsSegmentRef
{
	int				refs;	  /* the live set, readers */
	EsManifestEntry entry;	  /* deep copy, arrays malloc'd; while finished but not yet adopted in the
								 * manifest the adoption data (base, bitmap, first versions) is here
								 * already */
	EsTxn		   *txn;	  /* of a pending or just finished one; NULL once its commit is durable
								 * and every older snapshot can judge by fxid */
	bool			finished; /* pending: FINISH applied; readers judge by txn */
	bool			dropped;  /* no longer live: unlink at the last unref */
	uint64			needed;	  /* adopted: a replay needs it until this MemTable is flushed; 0 = no more */
	uint64		   *starts;	  /* entry.starts: pending: the batches it holds */
	EsSegment	   *segment;  /* opened lazily */
	int				fd;		  /* a File of PostgreSQL's fd.h; -1 = not open */

	uint64 number; /* grows as segments become live in this process; from 1 */

	/* private to segments.c and segment_rows.c */
	char					 *path;
	TimestampTz				  dropped_at;
	Size					  memory;	/* as last counted in the cache */
	dlist_node				  lru;		/* in the list of open segments; next is NULL if it is in none */
	dlist_node				  node;		/* in the list of dropped ones */
	struct EsSegmentOrder	 *order;	/* rows by position, NULL = not made */
	struct EsSegmentContexts *contexts; /* first rows of its contexts, NULL = not made */
} EsSegmentRef;

/*
 * At start, from the manifest; later through the calls below.  A pending segment gets its
 * transaction (made if need be) and stands in its list.
 */
extern void es_segments_load(const EsManifestState *manifest);

/* Makes a segment live (its manifest record is durable).  txn of a pending one, else NULL; the caller
 * puts the segment into txn->pending.  Takes a reference to txn. */
extern EsSegmentRef *es_segments_add(const EsManifestEntry *entry, EsTxn *txn);
/* No longer live; its file goes when the last reader is done and obsolete_retention is over. */
extern void			 es_segments_drop(uint64 id);
extern void			 es_segments_drop_storage(const EsTableKey *table);
extern EsSegmentRef *es_segments_find(uint64 id);
extern void			 es_segments_tick(void); /* unlinks what is due */

/* Live segments of a table, palloc'd array, each with a reference taken; ascending id. */
extern EsSegmentRef **es_segments_of(const EsTableKey *table, int *n);
extern void			  es_segment_ref(EsSegmentRef *ref);
extern void			  es_segment_unref(EsSegmentRef *ref);

/* Every live segment: start with *state = 0; NULL at the end; no reference is taken. */
extern EsSegmentRef *es_segments_each(uint32 *state);

/* To be called after ref->entry, ->finished or ->txn of a live one changed: recounts the shard's
 * counters. */
extern void es_segments_changed(void);

/* The verdict is durable and every snapshot can judge by fxid: lets go of ref->txn. */
extern void es_segment_forget_txn(EsSegmentRef *ref);

/*
 * Opens the file if need be.  NULL if it is damaged or unreadable: *err says how (and the
 * corruption is counted); the caller answers XX001 with es_segment_path(ref).  Valid as long as the
 * caller has a reference to ref, or until the next call here.
 */
extern EsSegment  *es_segment_handle(EsSegmentRef *ref, EsError *err);
extern const char *es_segment_path(const EsSegmentRef *ref);

/* Damage was found by a read through the handle: counts and logs it. */
extern void es_segment_damaged(EsSegmentRef *ref, const EsError *err);

/* Sends the error that this damage is for a client. */
extern void es_segment_send_error(EsConn *conn, uint16 type, uint64 id, const char *path, const EsError *err);

/* The table's columns in the segment (without those of a pending one). */
static inline int
es_segment_ncols(const EsSegmentInfo *info)
{
	return info->ncols - ((info->flags & ES_SEGMENT_PENDING) ? ES_PENDING_COLUMNS : 0);
}

/* Do the rows of this pending segment bring their positions?  All do or none. */
extern bool es_segment_given_positions(const EsSegment *segment);
/* Stored version of the last live row in [first, end), 0 = none; false: damage. */
extern bool es_segment_last_version(const EsSegmentRef *ref, EsSegment *segment, uint64 first, uint64 end,
									int64 *version, EsError *err);

/* Position and version of a row as readers see it (pending segments that were adopted in place: base,
 * first versions); dead: not live after adoption. */
static inline EsPosition
es_segment_row_position(const EsSegmentRef *ref, EsPosition stored)
{
	return stored + ref->entry.base;
}

extern bool es_segment_row_dead(const EsSegmentRef *ref, uint64 row);

/* Live rows among [first, end). */
extern uint64 es_segment_live_rows(const EsSegmentRef *ref, uint64 first, uint64 end);

/* Only if ref->entry.first_versions: version of a live row; es_segment_contexts was called. */
extern int64 es_segment_row_version(EsSegmentRef *ref, uint64 row);
extern bool	 es_segment_contexts(EsSegmentRef *ref, EsSegment *seg, EsError *err);

/*
 * Row numbers in the order of stored positions (of ordinals, while it is pending).  Built in steps
 * until deadline (es_task_clock): ES_ORDER_BUILDING = call again.  Kept, within the cache, until
 * all readers of the segment are gone and memory is short.
 */
typedef enum EsOrderState
{
	ES_ORDER_FAILED, /* *err */
	ES_ORDER_BUILDING,
	ES_ORDER_READY
} EsOrderState;

extern EsOrderState es_segment_order(EsSegmentRef *ref, EsSegment *seg, int64 deadline, EsError *err);
extern void			es_segment_order_at(const EsSegmentRef *ref, uint64 i, EsPosition *stored, uint64 *row);
/* First index whose stored position is above `after`. */
extern uint64 es_segment_order_above(const EsSegmentRef *ref, EsPosition after);

extern Size es_segment_rows_memory(const EsSegmentRef *ref);
extern void es_segment_rows_free(EsSegmentRef *ref);

/* Decoded pages of all segments stay within cache_size together. */
extern void es_segments_set_cache(Size bytes);

#endif /* ES_SHARD_SEGMENTS_H */
