/*-------------------------------------------------------------------------
 *
 * arith.c
 *	  The pure functions of the commit protocol.
 *
 * Each has its argument at its head.  What they rely on is the order in which
 * their inputs were read, and that order is the caller's duty; the model in
 * test/unit/test_arith.c enumerates the interleavings, and breaks each of the
 * orders to see that it matters.
 *
 *-------------------------------------------------------------------------
 */
#include "core/arith.h"

/* PostgreSQL hands out no xid below 3 of any epoch. */
#define FIRST_NORMAL_XID 3

/* ---- visibility ---- */

/*
 * What GetSnapshotData() guarantees: all below xmin was finished, nothing at or
 * above xmax was, and of those between the ones in xip were running.  Rows
 * carry top-level xids only, and xip holds all top-level xids whether or not the
 * subxids overflowed; so xip alone decides.
 */
bool
es_snapshot_running(const EsSnapshot *s, EsFxid fxid)
{
	uint32_t low = 0;
	uint32_t high = s->nxip;

	if (fxid == s->own && fxid != 0)
		return false;
	if (fxid >= s->xmax)
		return true;
	if (fxid < s->xmin)
		return false;
	while (low < high)
	{
		uint32_t mid = low + (high - low) / 2;

		if (s->xip[mid] < fxid)
			low = mid + 1;
		else
			high = mid;
	}
	return low < s->nxip && s->xip[low] == fxid;
}

/*
 * The snapshot comes first: who was running then stays invisible, whatever
 * became of it since.  Who was finished then is visible if it committed, and a
 * verdict, once known, never changes; so a cached one serves every snapshot.
 */
EsVisibility
es_row_visibility(const EsSnapshot *s, EsFxid fxid, EsVerdict verdict)
{
	if (es_snapshot_running(s, fxid))
		return ES_INVISIBLE;
	switch (verdict)
	{
		case ES_VERDICT_COMMITTED:
			return ES_VISIBLE;
		case ES_VERDICT_ABORTED:
			return ES_INVISIBLE;
		case ES_VERDICT_UNKNOWN:
			break;
	}
	return ES_ASK_VERDICT;
}

/*
 * All of them were finished when no xid up to max_fxid was running: it is below
 * xmax and below the first of the sorted xip.  (xmin alone would be right, but
 * too careful: it is also held back by the reader's own xid.)
 */
bool
es_all_visible(const EsSnapshot *s, EsFxid max_fxid)
{
	return max_fxid < s->xmax && (s->nxip == 0 || max_fxid < s->xip[0]);
}

/*
 * Xids live on a circle of 2^32; of the full xids that end in xid the one within
 * 2^31 of the reference is meant.  Those below 3 stand outside the circle.
 */
EsFxid
es_widen_xid(EsFxid reference, uint32_t xid)
{
	int32_t distance = (int32_t) (xid - (uint32_t) reference);

	if (xid < FIRST_NORMAL_XID)
		return xid;
	if (distance < 0 && reference < (uint64_t) - (int64_t) distance)
		return xid; /* there is no epoch before the first */
	return reference + (uint64_t) (int64_t) distance;
}

/* ---- horizon ---- */

/*
 * Had a transaction whose commit was followed by reading latestCompletedXid = L
 * certainly finished before the snapshot was taken?  xmax is latestCompletedXid + 1
 * as of the snapshot, in steps that leave out the xids nobody gets: behind
 * 2^32 - 1 comes 2^32 + 3.  (Plain xmax - 1 would forget an entry there.)
 */
static bool
completed_before(const EsSnapshot *s, EsFxid latest_completed)
{
	EsFxid next = latest_completed + 1;

	if ((uint32_t) next < FIRST_NORMAL_XID)
		next += FIRST_NORMAL_XID - (uint32_t) next;
	return next < s->xmax;
}

static inline EsPosition
lower(EsPosition a, EsPosition b)
{
	return a < b ? a : b;
}

/*
 * Claim: an event below the result that s does not see never becomes visible.
 *
 * Take a writer T with base b that s does not see and that commits at any time.
 * To show: the result is at most b.  T does, in this order: publish its slot with a
 * bound that the counter has not passed; take b from the counter; commit; read L; push
 * (L, T, b); clear the slot.  The reader took s, then read counter, slots, ring; of a
 * slot bound and xid together.
 *
 *	 1. T takes b after the reader read the counter: counter <= b.
 *	 2. Else T's slot was published before.  If the reader finds it set, it counts:
 *		its bound is at most b, and s does not see T.
 *	 3. Else T cleared it before; it committed, so it pushed its entry before that,
 *		and the reader, who comes to the ring later, finds it there or folded
 *		into the overflow pair.  s does not see T, so T's entry in the ring counts if L
 *		does: T committed after s was taken, L was read still later, and
 *		latestCompletedXid only grows, so L >= xmax - 1.  Folded, the pair's L is at
 *		least this L and its base at most b, so it counts too.
 *
 * A slot whose transaction is known to be committed, and seen by s, holds nobody
 * back; likewise an entry that s sees.  An aborted transaction's slot counts until it is
 * cleared, which is careful and short.
 *
 * All transactions in the overflow pair have xids up to its L, since
 * latestCompletedXid is at least the xid of whoever completed; so it does not count
 * for a snapshot whose xmin is above L.  Hence, when nobody writes, the result is the
 * counter: slots are clear, a new snapshot sees every entry, and the pair's L is
 * below xmin if no xid is running at all.  If some are (idle ones, or elsewhere in
 * the cluster), it is below xmax - 1, provided that the ring holds more entries than
 * there are backends: of the entries behind a folded one two are then of one backend,
 * the later of its two transactions began after the folded L was read, so its xid
 * is above L, and it completed.
 */
EsPosition
es_horizon(const EsSnapshot *s, EsPosition counter, const EsHorizonSlot *slots, const bool *slot_committed,
		   uint32_t nslots, const EsHorizonEntry *entries, uint32_t nentries, const EsHorizonEntry *overflow)
{
	EsPosition horizon = counter;

	for (uint32_t i = 0; i < nslots; i++)
	{
		if (slots[i].lower_bound == 0)
			continue;
		if (slot_committed[i] && !es_snapshot_running(s, slots[i].fxid))
			continue;
		horizon = lower(horizon, slots[i].lower_bound);
	}
	for (uint32_t i = 0; i < nentries; i++)
	{
		if (completed_before(s, entries[i].latest_completed) || !es_snapshot_running(s, entries[i].fxid))
			continue;
		horizon = lower(horizon, entries[i].base);
	}
	if (overflow->base != 0 && overflow->latest_completed >= s->xmin &&
		!completed_before(s, overflow->latest_completed))
		horizon = lower(horizon, overflow->base);
	return horizon;
}

/*
 * The pair must count whenever one of the entries in it would, and its base must
 * be no higher than theirs: the largest L and the smallest base.  Nothing ever
 * raises the base again, so that an old snapshot's horizon may fall far back; the
 * owner may set base to 0 whenever latest_completed is below the oldest xmin of
 * the cluster, since then every snapshot sees all that was folded.
 */
void
es_horizon_fold(EsHorizonEntry *overflow, const EsHorizonEntry *entry)
{
	if (overflow->base == 0)
	{
		*overflow = *entry;
		return;
	}
	if (entry->latest_completed > overflow->latest_completed)
		overflow->latest_completed = entry->latest_completed;
	overflow->base = lower(overflow->base, entry->base);
}

/* ---- restart LSN ---- */

/*
 * Claim: every message that is not durable in the shard's files starts at or
 * behind the result, so that reading PostgreSQL's WAL from there finds it.
 *
 * The shard reads F, then the floors, then drains the queues to what they held.
 * Take such a message M with start m.  If M was logged after F was read then
 * F <= m, because what is flushed was inserted before.  Else M's backend had stored
 * its floor, a flush position read before M was inserted and therefore at most m, before
 * that.  If the floor is found set it counts.  If it was cleared, M's last byte had
 * been flushed into the queue before, so draining found M, and it is among
 * those whose starts the caller gives.
 *
 * previous was right when it was computed.  The messages that are not durable now
 * were there then, or were logged after the F of that time was read, and so start at
 * or behind previous: never going back keeps the claim.
 */
EsLsn
es_restart_lsn(EsLsn previous, EsLsn flushed, const EsLsn *floors, uint32_t nfloors,
			   EsLsn oldest_undurable_start)
{
	EsLsn lsn = flushed;

	for (uint32_t i = 0; i < nfloors; i++)
		if (floors[i] != 0 && floors[i] < lsn)
			lsn = floors[i];
	if (oldest_undurable_start != 0 && oldest_undurable_start < lsn)
		lsn = oldest_undurable_start;
	return lsn > previous ? lsn : previous;
}
