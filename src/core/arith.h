/*-------------------------------------------------------------------------
 *
 * arith.h
 *	  The pure functions of the commit protocol: visibility of a row, the
 *	  horizon of a snapshot, the restart LSN of a shard.  No I/O, no shared
 *	  memory: callers gather the inputs in the order that PROTOCOL.md fixes.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_CORE_ARITH_H
#define ES_CORE_ARITH_H

#include "core/format.h"

/*
 * A snapshot as a reader sends it.  xids are full; xip holds the top-level xids
 * in progress, sorted ascending.  Nothing at or above xmax is visible, all
 * below xmin is decided.
 */
typedef struct EsSnapshot
{
	EsFxid		  xmin;
	EsFxid		  xmax;
	EsFxid		  own;	  /* reader's top-level xid, 0 = none */
	uint32_t	  curcid; /* own rows with cid < curcid are visible */
	uint32_t	  nxip;
	const EsFxid *xip;
} EsSnapshot;

typedef enum EsVerdict
{
	ES_VERDICT_UNKNOWN = 0, /* not asked yet, or still in progress */
	ES_VERDICT_COMMITTED = 1,
	ES_VERDICT_ABORTED = 2
} EsVerdict;

typedef enum EsVisibility
{
	ES_INVISIBLE = 0,
	ES_VISIBLE = 1,
	ES_ASK_VERDICT = 2 /* the snapshot says it was finished: CLOG decides */
} EsVisibility;

/* Was fxid still running (or not begun) for this snapshot?  Own xid: not running. */
extern bool es_snapshot_running(const EsSnapshot *s, EsFxid fxid);

/*
 * A row of another transaction (fxid != s->own) with what is known of its
 * verdict.  An own row after its FINISH is visible by cid only.
 */
extern EsVisibility es_row_visibility(const EsSnapshot *s, EsFxid fxid, EsVerdict verdict);

/* An own row: staged, batch alive, cid below curcid. */
static inline bool
es_own_row_visible(const EsSnapshot *s, uint32_t cid)
{
	return cid < s->curcid;
}

/* Are all transactions in [min_fxid, max_fxid], known to be committed, visible? */
extern bool es_all_visible(const EsSnapshot *s, EsFxid max_fxid);

/* Full xid of a 32-bit xid that is within 2^31 of a reference full xid. */
extern EsFxid es_widen_xid(EsFxid reference, uint32_t xid);

/* ---- horizon (PROTOCOL.md section 4) ---- */

typedef struct EsHorizonSlot
{
	EsPosition lower_bound; /* 0 = the slot is clear */
	EsFxid	   fxid;
} EsHorizonSlot;

typedef struct EsHorizonEntry
{
	EsFxid	   latest_completed; /* L: latestCompletedXid read after the commit was visible */
	EsFxid	   fxid;
	EsPosition base;
} EsHorizonEntry;

/*
 * Smallest position that may still become visible to someone who has read
 * below it with snapshot s.
 *	 counter		next position to be handed out, read first
 *	 slots			of writers, read second; committed(i) says whether slot i's xid is
 *					known committed
 *	 entries		of the ring, read third
 *	 overflow		folded entries: (max L, min base); base 0 = none
 */
extern EsPosition
es_horizon(const EsSnapshot *s, EsPosition counter, const EsHorizonSlot *slots, const bool *slot_committed,
		   uint32_t nslots, const EsHorizonEntry *entries, uint32_t nentries, const EsHorizonEntry *overflow);

/* Folds an entry that leaves the ring into the overflow pair. */
extern void es_horizon_fold(EsHorizonEntry *overflow, const EsHorizonEntry *entry);

/* ---- restart LSN (PROTOCOL.md section 5.2) ---- */

/*
 * min(flushed, floors that are not 0, starts of messages not yet durable in the
 * shard's own files), never below previous.
 */
extern EsLsn es_restart_lsn(EsLsn previous, EsLsn flushed, const EsLsn *floors, uint32_t nfloors,
							EsLsn oldest_undurable_start);

#endif /* ES_CORE_ARITH_H */
