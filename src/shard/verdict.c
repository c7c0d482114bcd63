/*-------------------------------------------------------------------------
 *
 * verdict.c
 *	  From "undecided" to "settled": what a shard does when a transaction has ended.
 *
 * RESOLVE is a hint that makes it quick; the poll, once a second, makes it sure.
 * Either way the verdict is CLOG's (txn.c).  Then
 *	 - aborted: staged batches go at once, MemTable batches with their MemTable;
 *	 - committed and finished: readers have seen it since CLOG knew;
 *	 - committed and not finished: FINISH lies in a queue, or no row of this shard
 *	   lives (all were in rolled-back savepoints).  The sender set the ready bit before its
 *	   commit record, so the first complete drain that begins after the verdict
 *	   was read has FINISH if there is one; what is still staged then is dead.
 *	   Only drains that began later count, hence the "+ 2" below: the drain that
 *	   es_complete_drains counts next may have begun already.
 *
 * When the commit record is flushed, a transaction that left a FINISH in own WAL gets
 * its RESOLVED frame, pending segments are adopted or dropped (flush.c), and the list
 * lets go of it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "ipc/fault.h"
#include "shard/apply.h"
#include "shard/log.h"
#include "shard/shard.h"

uint64 es_complete_drains = 0;

static bool changed = false;

/* Transactions that committed, but whose commit record was not flushed when last looked at. */
static uint32 unflushed = 0;

void
es_verdict_settle(EsTxn *txn)
{
	bool   known = txn->verdict != ES_VERDICT_UNKNOWN;
	uint64 ticket = 0;

	if (!txn->listed)
		return;
	switch (es_txn_verdict(txn))
	{
		case ES_VERDICT_UNKNOWN:
			return;
		case ES_VERDICT_ABORTED:
			es_apply_drop_staged(txn);
			break;
		case ES_VERDICT_COMMITTED:
			if (!txn->finished)
			{
				if (txn->commit_drain == 0)
					txn->commit_drain = es_complete_drains + 2;
				if (es_complete_drains < txn->commit_drain)
					return;
				es_apply_drop_staged(txn);
			}
			break;
	}
	if (!known || !txn->finished)
		changed = true;
	if (!es_txn_verdict_durable(txn))
	{
		unflushed++;
		return;
	}

	if (txn->finished && !txn->resolved_logged && (txn->finish_ticket != 0 || txn->finish_start != 0))
	{
		EsResolved resolved = {.commit_lsn = txn->verdict == ES_VERDICT_COMMITTED ? txn->commit_end : 0,
							   .committed = txn->verdict == ES_VERDICT_COMMITTED};

		/* The commit record is flushed, so the frame need not wait. */
		ticket = es_log_append(ES_FRAME_RESOLVED, txn->fxid, 0, 0, &resolved, sizeof(resolved));
		txn->resolved_logged = true;
		ES_FAULT("verdict-logged");
	}
	if (txn->verdict == ES_VERDICT_COMMITTED)
		ES_COUNT(commits, 1);
	else
		ES_COUNT(aborts, 1);
	if (txn->pending != NIL || txn->spilling)
		es_flush_txn_decided(txn);
	changed = true;
	es_txn_settle(txn, ticket);
}

void
es_apply_resolve(EsFxid fxid, bool committed, EsLsn commit_end)
{
	EsTxn *txn = es_txn_find(fxid);

	if (txn == NULL || !txn->listed)
		return;
	/* A hint only: where its commit record ends spares CLOG's rougher answer. */
	if (committed && txn->verdict == ES_VERDICT_UNKNOWN)
		txn->commit_end = commit_end;
	if (committed)
		es_apply_highest_end = Max(es_apply_highest_end, commit_end);
	es_verdict_settle(txn);
}

void
es_apply_poll_verdicts(bool all)
{
	dlist_mutable_iter iter;

	unflushed = 0;
	dlist_foreach_modify(iter, &es_txn_undecided)
	{
		EsTxn *txn = dlist_container(EsTxn, node, iter.cur);

		if (all || txn->verdict != ES_VERDICT_UNKNOWN)
			es_verdict_settle(txn);
	}
}

bool
es_verdicts_changed(void)
{
	bool result = changed;

	changed = false;
	return result;
}

bool
es_verdicts_unflushed(void)
{
	return unflushed > 0;
}
