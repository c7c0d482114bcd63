/*-------------------------------------------------------------------------
 *
 * event_store.c
 *	  Module start: settings, shared memory, background workers, and the errors
 *	  of a configuration with which the store cannot work.
 *
 * The library must be preloaded: shared memory and static workers can be asked for
 * at server start only.  Loaded later it defines nothing, and each of its
 * functions says what to do (es_wait_store_ready).  A configuration in which no
 * statement could ever succeed stops the server start: it is the one moment at
 * which somebody looks, and every message ends with the line to write.
 *
 * Under pg_upgrade and in single-user mode there are no workers: tables can be dropped,
 * events can be neither written nor read.  pg_upgrade makes tables as well, without their metapages,
 * which it transfers with the old cluster's files; until then they have no rows (tam/).
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <unistd.h>

#include "access/xlog.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "replication/slot.h"
#include "replication/syncrep.h"
#include "storage/ipc.h"

#include "event_store.h"
#include "guc.h"
#include "ipc/shmem.h"
#include "shard/files.h"

PG_MODULE_MAGIC;

extern PGDLLEXPORT void _PG_init(void);

int	 es_configured_shards = 0;
bool es_has_workers = false;

static shmem_request_hook_type prev_shmem_request_hook = NULL;
static shmem_startup_hook_type prev_shmem_startup_hook = NULL;

static void
shmem_request(void)
{
	if (prev_shmem_request_hook)
		prev_shmem_request_hook();
	es_shmem_request();
}

static void
shmem_startup(void)
{
	if (prev_shmem_startup_hook)
		prev_shmem_startup_hook();
	es_shmem_startup();
}

static int
count_shards(void)
{
	long cores;
	int	 made_with;

	if (es_guc_shards > 0)
		return es_guc_shards;
	/* a store keeps its number when it moves to a machine with other cores */
	made_with = es_store_peek_nshards();
	if (made_with > 0)
		return made_with;
	cores = sysconf(_SC_NPROCESSORS_ONLN);
	return (int) Min(Max(cores / 2, 1), ES_MAX_SHARDS);
}

/* What makes the store impossible is FATAL, what makes it unsafe a WARNING. */
static void
check_configuration(void)
{
	int needed = es_configured_shards + es_guc_maintenance_workers + 1;

	if (wal_level < WAL_LEVEL_REPLICA)
		ereport(
			FATAL,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("event_store needs wal_level to be \"replica\" or \"logical\""),
			 errdetail(
				 "Its shards recover from PostgreSQL's write-ahead log, which a replication slot keeps for them."),
			 errhint("Set \"wal_level = replica\" in postgresql.conf.")));
	if (max_replication_slots == 0)
		ereport(FATAL, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						errmsg("event_store needs a replication slot, but max_replication_slots is 0"),
						errhint("Set \"max_replication_slots = 10\" in postgresql.conf.")));
	if (needed > max_worker_processes)
		ereport(
			FATAL,
			(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
			 errmsg("event_store needs %d background workers, but max_worker_processes is %d", needed,
					max_worker_processes),
			 errdetail(
				 "One is its keeper; event_store.shards is %d and event_store.maintenance_workers is %d.",
				 es_configured_shards, es_guc_maintenance_workers),
			 errhint(
				 "Set \"max_worker_processes = %d\" in postgresql.conf, or more if other extensions and parallel queries need workers as well.",
				 needed + 8)));

	if (SyncRepStandbyNames != NULL && SyncRepStandbyNames[0] != '\0')
		ereport(
			WARNING,
			(errcode(ERRCODE_WARNING), errmsg("event_store does not run on standbys"),
			 errdetail(
				 "synchronous_standby_names is set, but a promoted standby refuses to open the store unless it was stopped cleanly before.")));
	if (max_slot_wal_keep_size_mb >= 0 && max_slot_wal_keep_size_mb < 1024)
		ereport(WARNING, (errcode(ERRCODE_WARNING),
						  errmsg("max_slot_wal_keep_size is %d MB", max_slot_wal_keep_size_mb),
						  errdetail("Writers of events wait when a shard falls half of that behind."),
						  errhint("Set \"max_slot_wal_keep_size = 1GB\" or more in postgresql.conf.")));
}

static void
register_worker(const char *function, const char *name, int number)
{
	BackgroundWorker worker;

	memset(&worker, 0, sizeof(worker));
	worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = 1;
	worker.bgw_main_arg = Int32GetDatum(Max(number, 0));
	strlcpy(worker.bgw_library_name, "event_store", sizeof(worker.bgw_library_name));
	strlcpy(worker.bgw_function_name, function, sizeof(worker.bgw_function_name));
	if (number >= 0)
		snprintf(worker.bgw_name, sizeof(worker.bgw_name), "%s %d", name, number);
	else
		strlcpy(worker.bgw_name, name, sizeof(worker.bgw_name));
	/* pg_stat_activity shows the type only, and the number is worth seeing */
	strlcpy(worker.bgw_type, worker.bgw_name, sizeof(worker.bgw_type));
	RegisterBackgroundWorker(&worker);
}

void
_PG_init(void)
{
	if (!process_shared_preload_libraries_in_progress)
	{
		/* pg_upgrade --check loads every library that it will need, before anything is changed */
		if (IsBinaryUpgrade)
			es_require_preload();
		return;
	}

	es_guc_define();
	es_configured_shards = count_shards();

	prev_shmem_request_hook = shmem_request_hook;
	shmem_request_hook = shmem_request;
	prev_shmem_startup_hook = shmem_startup_hook;
	shmem_startup_hook = shmem_startup;

	es_tam_init();

	if (IsBinaryUpgrade || !IsPostmasterEnvironment)
		return;

	check_configuration();
	es_has_workers = true;
	/* the keeper first: shards wait for the store file that it reads or makes */
	register_worker("es_keeper_main", "event_store keeper", -1);
	for (int i = 0; i < es_configured_shards; i++)
		register_worker("es_shard_main", "event_store shard", i);
	for (int i = 0; i < es_guc_maintenance_workers; i++)
		register_worker("es_maintenance_main", "event_store maintenance", i);
}
