/*-------------------------------------------------------------------------
 *
 * estimate.c
 *	  How large a table is (estimate.h).
 *
 * The planner's pages are the table's segment bytes in blocks of 8 kB plus what its rows in
 * memory would take: a scan reads about that much.  The number of rows is known
 * exactly from the shards, up to transactions that are under way.  Planning may ask often,
 * so answers are kept for a second per table in this backend.  Paused shards are not asked for
 * an estimate: EXPLAIN needs none of them.
 *
 * ANALYZE of a parent draws from each child in proportion to its file's size, and then samples the
 * blocks of just that file.  Ours is one block, so it is weighed by what its rows would take in a heap table;
 * which of both ANALYZE is about is seen in the progress that it reports of itself.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/tableam.h"
#include "access/xlog.h"
#include "commands/progress.h"
#include "miscadmin.h"
#include "storage/bufmgr.h"
#include "utils/backend_progress.h"
#include "utils/backend_status.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/timestamp.h"

#include "ipc/channel.h"
#include "ipc/shmem.h"
#include "tam/estimate.h"
#include "tam/tam.h"

#define CACHE_MS 1000

typedef struct CachedTotals
{
	EsTableKey	  key;
	TimestampTz	  asked;
	EsTableTotals totals;
} CachedTotals;

static HTAB *cache;

/* Returns how many shards were asked: all, or those that are not paused. */
static int
ask_totals(Relation rel, EsTableTotals *totals, bool paused_too)
{
	EsTableKey key = es_table_info(rel)->key;
	int		   asked = 0;

	memset(totals, 0, sizeof(*totals));
	totals->bytes = table_block_relation_size(rel, MAIN_FORKNUM);
	for (int s = 0; s < es_shared->nshards; s++)
	{
		EsStatRequest	   req = {.req = {.type = ES_REQ_STAT}, .table = key, .kind = ES_STAT_TABLE};
		EsPart			   part = {&req, sizeof(req)};
		EsAnswer		  *answer;
		const EsTableStat *stat;

		if (!paused_too && pg_atomic_read_u32(&es_shared->shards[s].paused) != 0)
			continue;
		asked++;
		answer = es_channel_call(s, &req.req, &part, 1);
		stat = (const EsTableStat *) (answer + 1);
		if (answer->len >= sizeof(EsAnswer) + sizeof(EsTableStat))
		{
			totals->rows += stat->segment_rows + stat->memtable_rows;
			totals->segment_bytes += stat->segment_bytes;
			totals->bytes += stat->segment_bytes + stat->memtable_bytes;
			totals->raw_bytes += stat->raw_bytes;
			totals->max_position = Max(totals->max_position, stat->max_position);
		}
		pfree(answer);
	}
	return asked;
}

void
es_table_totals(Relation rel, EsTableTotals *totals)
{
	(void) ask_totals(rel, totals, true);
}

/* As of the last VACUUM or ANALYZE. */
static void
catalog_totals(Relation rel, EsTableTotals *totals)
{
	totals->rows = (uint64) Max(rel->rd_rel->reltuples, 0);
	totals->bytes = (uint64) Max(rel->rd_rel->relpages, 1) * BLCKSZ;
}

/* Without the paused shards: contexts spread evenly, so the others stand for them. */
static void
estimate_totals(Relation rel, EsTableTotals *totals)
{
	int asked = ask_totals(rel, totals, false);

	if (asked == 0)
		catalog_totals(rel, totals);
	else if (asked < es_shared->nshards)
	{
		totals->rows = totals->rows * es_shared->nshards / asked;
		totals->bytes = totals->bytes * es_shared->nshards / asked;
		totals->raw_bytes = totals->raw_bytes * es_shared->nshards / asked;
		totals->segment_bytes = totals->segment_bytes * es_shared->nshards / asked;
	}
}

static void
cached_totals(Relation rel, EsTableTotals *totals)
{
	EsTableKey	  key = es_table_info(rel)->key;
	TimestampTz	  now = GetCurrentTimestamp();
	CachedTotals *entry;
	bool		  found;

	if (cache == NULL)
	{
		HASHCTL ctl = {.keysize = sizeof(EsTableKey), .entrysize = sizeof(CachedTotals)};

		cache = hash_create("event_store table sizes", 64, &ctl, HASH_ELEM | HASH_BLOBS);
	}
	entry = hash_search(cache, &key, HASH_FIND, NULL);
	if (entry != NULL && now - entry->asked < CACHE_MS * INT64CONST(1000) && now >= entry->asked)
	{
		*totals = entry->totals;
		return;
	}
	estimate_totals(rel, totals);
	if (hash_get_num_entries(cache) > 1000)
	{
		hash_destroy(cache);
		cache = NULL;
		return;
	}
	entry = hash_search(cache, &key, HASH_ENTER, &found);
	entry->asked = now;
	entry->totals = *totals;
}

void
es_relation_estimate_size(Relation rel, int32 *attr_widths, BlockNumber *pages, double *tuples,
						  double *allvisfrac)
{
	EsTableTotals totals = {0};

	/* a standby has no shards to ask; it can explain what would be done */
	if (RecoveryInProgress())
		catalog_totals(rel, &totals);
	else if (!IsBinaryUpgrade)
		cached_totals(rel, &totals);
	*tuples = (double) totals.rows;
	*pages = (BlockNumber) Min((totals.bytes + BLCKSZ - 1) / BLCKSZ, MaxBlockNumber);
	*allvisfrac = 1.0;
}

/* Does this backend ANALYZE a parent, and is it at finding out how large this child is? */
static bool
is_being_weighed(Oid relid)
{
	volatile PgBackendStatus *me = MyBEEntry;

	return me != NULL && me->st_progress_command == PROGRESS_COMMAND_ANALYZE &&
		   me->st_progress_param[PROGRESS_ANALYZE_PHASE] == PROGRESS_ANALYZE_PHASE_ACQUIRE_SAMPLE_ROWS_INH &&
		   me->st_progress_param[PROGRESS_ANALYZE_CURRENT_CHILD_TABLE_RELID] != (int64) relid;
}

uint64
es_relation_size(Relation rel, ForkNumber fork)
{
	EsTableTotals totals;

	if (fork != MAIN_FORKNUM || !is_being_weighed(RelationGetRelid(rel)))
		return table_block_relation_size(rel, fork);
	cached_totals(rel, &totals);
	return Max(totals.raw_bytes + totals.bytes - totals.segment_bytes, BLCKSZ);
}
