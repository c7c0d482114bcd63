/*-------------------------------------------------------------------------
 *
 * vacuum.c
 *	  VACUUM of an event table: nothing is dead, but CLOG may be forgotten.
 *
 * Rows carry the xid of their transaction until a segment holds them below every xmin, and a
 * shard asks CLOG for a transaction until its verdict is durable in the shard's own
 * files.  So relfrozenxid may move to the oldest xid that some shard has no
 * durable verdict for, which is what the shards answer; PostgreSQL then truncates CLOG below the
 * minimum over all tables.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/multixact.h"
#include "access/transam.h"
#include "commands/vacuum.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "storage/bufmgr.h"
#include "storage/procarray.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

#include "compat.h"
#include "ipc/channel.h"
#include "ipc/shmem.h"
#include "tam/estimate.h"
#include "tam/tam.h"
#include "tam/vacuum.h"

EsFxid
es_oldest_undecided(void)
{
	EsFxid oldest = U64FromFullTransactionId(ReadNextFullTransactionId());

	for (int s = 0; s < es_shared->nshards; s++)
	{
		EsRequest		   req = {.type = ES_REQ_UNDECIDED};
		EsPart			   part = {&req, sizeof(req)};
		EsUndecidedAnswer *answer;

		answer = (EsUndecidedAnswer *) es_channel_call(s, &req, &part, 1);
		oldest = Min(oldest, answer->oldest);
		pfree(answer);
	}
	return oldest;
}

void
es_vacuum(Relation rel)
{
	TransactionId frozen;
	TransactionId oldest_xmin;
	MultiXactId	  minmulti = GetOldestMultiXactId();
	EsTableTotals totals;
	EsFxid		  undecided;

	es_wait_store_ready();
	oldest_xmin = GetOldestNonRemovableTransactionId(rel);
	undecided = es_oldest_undecided();
	frozen = XidFromFullTransactionId(FullTransactionIdFromU64(undecided));
	if (TransactionIdPrecedes(oldest_xmin, frozen))
		frozen = oldest_xmin;

	es_table_totals(rel, &totals);
	es_vac_update_relstats(rel, RelationGetNumberOfBlocks(rel), (double) totals.rows, frozen, minmulti);
	es_pgstat_report_vacuum(rel, (int64) totals.rows);
}
