/*-------------------------------------------------------------------------
 *
 * guc.c
 *	  Every setting of event_store, in one table sorted by name.
 *
 * Settings that fix memory or processes at server start are PGC_POSTMASTER;
 * what a shard may change while it runs is PGC_SIGHUP; what concerns one
 * client's statements is PGC_USERSET.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <limits.h>

#include "utils/guc.h"

#include "core/format.h"
#include "core/segment.h"
#include "guc.h"

int	  es_guc_cache_size;
int	  es_guc_compression;
int	  es_guc_enqueue_timeout;
int	  es_guc_io_method;
int	  es_guc_maintenance_workers;
int	  es_guc_memtable_age;
int	  es_guc_memtable_size;
int	  es_guc_obsolete_retention;
int	  es_guc_queue_size;
int	  es_guc_result_queue_size;
int	  es_guc_segment_rows;
int	  es_guc_shards;
int	  es_guc_spill_after;
int	  es_guc_staging_size;
int	  es_guc_startup_timeout;
int	  es_guc_wal_file_size;
int	  es_guc_wal_sync_interval;
char *es_guc_adopt_system_id;

static const struct config_enum_entry compression_options[] = {{"none", ES_CODEC_NONE, false},
															   {"lz4", ES_CODEC_LZ4, false},
															   {"zstd", ES_CODEC_ZSTD, false},
															   {NULL, 0, false}};

static const struct config_enum_entry shard_io_options[] = {{"auto", ES_IO_AUTO, false},
															{"io_uring", ES_IO_URING, false},
															{"sync", ES_IO_SYNC, false},
															{NULL, 0, false}};

typedef struct IntSetting
{
	const char *name;
	const char *description;
	const char *detail;
	int		   *variable;
	int			boot;
	int			min;
	int			max;
	GucContext	context;
	int			flags;
} IntSetting;

static const IntSetting int_settings[] = {
	{"event_store.cache_size", "Memory of each shard for decoded pages of segments.", NULL,
	 &es_guc_cache_size, 256 * 1024, 0, INT_MAX / 2, PGC_SIGHUP, GUC_UNIT_KB},
	{"event_store.enqueue_timeout", "How long a statement waits for room in a shard's queue.",
	 "Zero waits until the statement is cancelled.", &es_guc_enqueue_timeout, 30000, 0, INT_MAX, PGC_USERSET,
	 GUC_UNIT_MS},
	{"event_store.maintenance_workers", "Number of processes that write and rewrite segments.", NULL,
	 &es_guc_maintenance_workers, 1, 1, 8, PGC_POSTMASTER, 0},
	{"event_store.memtable_age",
	 "Age at which a shard's MemTable is written to segments although it is not full.",
	 "Zero flushes by size only.", &es_guc_memtable_age, 300, 0, INT_MAX / 1000, PGC_SIGHUP, GUC_UNIT_S},
	{"event_store.memtable_size", "Size of each shard's MemTable at which it is written to segments.", NULL,
	 &es_guc_memtable_size, 64 * 1024, 1024, INT_MAX / 2, PGC_SIGHUP, GUC_UNIT_KB},
	{"event_store.obsolete_retention",
	 "How long files that no manifest names any more are kept for a base backup that still copies them.",
	 NULL, &es_guc_obsolete_retention, 0, 0, INT_MAX / 1000, PGC_SIGHUP, GUC_UNIT_S},
	{"event_store.queue_size", "Size of the queue from one backend to one shard.", NULL, &es_guc_queue_size,
	 256, 64, 1024 * 1024, PGC_POSTMASTER, GUC_UNIT_KB},
	{"event_store.result_queue_size", "Size of the queue from one shard to one backend.", NULL,
	 &es_guc_result_queue_size, 1024, 64, 1024 * 1024, PGC_POSTMASTER, GUC_UNIT_KB},
	{"event_store.segment_rows", "Largest number of rows in one segment.", NULL, &es_guc_segment_rows,
	 2000000, ES_ZONE_ROWS, 100000000, PGC_SIGHUP, 0},
	{"event_store.shards", "Number of shards; fixed for a cluster when its first shard starts.",
	 "Zero takes half the processors, between 1 and 16.", &es_guc_shards, 0, 0, ES_MAX_SHARDS, PGC_POSTMASTER,
	 0},
	{"event_store.spill_after",
	 "Rows of one transaction in one shard beyond this size are written to a pending segment before it commits.",
	 NULL, &es_guc_spill_after, 8 * 1024, 64, INT_MAX / 2, PGC_SIGHUP, GUC_UNIT_KB},
	{"event_store.staging_size",
	 "Memory of each shard for rows of transactions that have not committed; beyond it the largest is written to a pending segment.",
	 NULL, &es_guc_staging_size, 64 * 1024, 1024, INT_MAX / 2, PGC_SIGHUP, GUC_UNIT_KB},
	{"event_store.startup_timeout", "How long a statement waits for a shard that is starting or recovering.",
	 NULL, &es_guc_startup_timeout, 60000, 0, INT_MAX, PGC_USERSET, GUC_UNIT_MS},
	{"event_store.wal_file_size", "Size of the files of a shard's own write-ahead log.", NULL,
	 &es_guc_wal_file_size, 16 * 1024, 1024, 1024 * 1024, PGC_POSTMASTER, GUC_UNIT_KB},
	{"event_store.wal_sync_interval", "How often a shard that takes events makes its own files durable.",
	 NULL, &es_guc_wal_sync_interval, 200, 1, 60000, PGC_SIGHUP, GUC_UNIT_MS},
};

/* What pg_controldata prints as "Database system identifier", or nothing. */
static bool
check_system_id(char **newval, void **extra, GucSource source)
{
	const char *id = *newval;

	if (id == NULL || id[0] == '\0')
		return true;
	errno = 0;
	if (strspn(id, "0123456789") == strlen(id) && strtoull(id, NULL, 10) > 0 && errno == 0)
		return true;
	GUC_check_errdetail("A system identifier is a number of 64 bits that is not 0.");
	GUC_check_errhint(
		"pg_controldata prints it, and so does the message that refuses another cluster's store.");
	return false;
}

void
es_guc_define(void)
{
	for (int i = 0; i < (int) lengthof(int_settings); i++)
	{
		const IntSetting *s = &int_settings[i];

		DefineCustomIntVariable(s->name, s->description, s->detail, s->variable, s->boot, s->min, s->max,
								s->context, s->flags, NULL, NULL, NULL);
	}

	DefineCustomStringVariable(
		"event_store.adopt_system_id",
		"System identifier of another cluster whose cleanly stopped store this cluster takes over (pg_upgrade).",
		NULL, &es_guc_adopt_system_id, "", PGC_POSTMASTER, 0, check_system_id, NULL, NULL);
	DefineCustomEnumVariable("event_store.compression", "Compression of segment pages.", NULL,
							 &es_guc_compression, ES_CODEC_LZ4, compression_options, PGC_SIGHUP, 0, NULL,
							 NULL, NULL);
	DefineCustomEnumVariable("event_store.io_method", "How shards write their files.",
							 "auto takes io_uring where the kernel and the container allow it.",
							 &es_guc_io_method, ES_IO_AUTO, shard_io_options, PGC_POSTMASTER, 0, NULL, NULL,
							 NULL);

	MarkGUCPrefixReserved("event_store");
}

Size
es_guc_shard_memory(void)
{
	/* a MemTable that takes rows, two that are flushed, and what is staged */
	return ((Size) 3 * es_guc_memtable_size + es_guc_staging_size) / 1024;
}
