/*-------------------------------------------------------------------------
 *
 * estimate.c
 *	  How large a table is (estimate.h).
 *
 * The planner's pages are the table's segment bytes in blocks of 8 kB plus what its rows in
 * memory would take: a scan reads about that much.  The number of rows is known
 * exactly from the shards, up to transactions that are under way.  Planning may ask often,
 * so answers are kept for a second per table in this backend.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "storage/bufmgr.h"
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

void
es_table_totals(Relation rel, EsTableTotals *totals)
{
	EsTableKey key = es_table_info(rel)->key;

	memset(totals, 0, sizeof(*totals));
	totals->bytes = (uint64) RelationGetNumberOfBlocks(rel) * BLCKSZ;
	for (int s = 0; s < es_shared->nshards; s++)
	{
		EsStatRequest	   req = {.req = {.type = ES_REQ_STAT}, .table = key, .kind = ES_STAT_TABLE};
		EsPart			   part = {&req, sizeof(req)};
		EsAnswer		  *answer = es_channel_call(s, &req.req, &part, 1);
		const EsTableStat *stat = (const EsTableStat *) (answer + 1);

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
	es_table_totals(rel, totals);
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
	EsTableTotals totals;

	cached_totals(rel, &totals);
	*tuples = (double) totals.rows;
	*pages = (BlockNumber) Min((totals.bytes + BLCKSZ - 1) / BLCKSZ, MaxBlockNumber);
	*allvisfrac = 1.0;
}
