/*-------------------------------------------------------------------------
 *
 * store.c
 *	  The store file, and the decision whether this cluster may open the store;
 *	  in the keeper, before any shard opens.
 *
 * First start.  Directory and files of every shard are made and synced under
 * temporary names and get their names; then the store file comes into being, by one rename, and with
 * it the store; then the replication slot.  A crash between any two of these steps is
 * recognised: without store file and slot, shard directories that hold nothing but what
 * es_files_make made are remains of such a start and made anew.  With a store file and
 * without slot, all shards are clean, and a clean store gets its slot back.  So later
 * anything that is missing has been lost: a store file missing while the slot or a used shard is
 * there, a directory missing while the store file is there, are refusals and never a
 * reason to begin with an empty store.
 *
 * Later starts.  The store file names the number of shards and the cluster.  A shard that was
 * stopped cleanly has everything in its own files.  One that was not needs PostgreSQL's WAL from
 * its restart_lsn on, and the slot has kept that: a slot that is absent means a
 * restored base backup (which copies no slots, and whose files are of different moments) or a promoted
 * standby, and opening would lose events.  For the same reason another timeline or system
 * identifier is refused, unless the administrator says by
 * event_store.adopt_system_id that nothing was written since the clean stop.
 *
 * What is wrong with one shard only (its control blocks are damaged, its directory
 * is missing, its files are older than those it had last: control.c) is that shard's own
 * refusal: the others open.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "access/xlog.h"
#include "common/file_perm.h"
#include "miscadmin.h"
#include "replication/slot.h"
#include "storage/fd.h"
#include "utils/memutils.h"

#include "core/route.h"
#include "guc.h"
#include "ipc/fault.h"
#include "ipc/shmem.h"
#include "shard/control.h"
#include "shard/files.h"

#define STORE_NAME "store"
#define STORE_PATH ES_STORE_DIR "/" STORE_NAME

/* What the control blocks of one shard say. */
typedef struct ShardFound
{
	bool	  readable;
	EsControl control;
} ShardFound;

/* ---- the store file ---- */

int
es_store_peek_nshards(void)
{
	char		block[ES_WAL_BLOCK] __attribute__((aligned(8)));
	EsStoreFile store;
	int			nshards = 0;
	int			fd = open(STORE_PATH, O_RDONLY);

	if (fd < 0)
		return 0;
	if (read(fd, block, sizeof(block)) == sizeof(block) && es_store_decode(block, &store, NULL) == ES_OK)
		nshards = (int) store.nshards;
	close(fd);
	return nshards;
}

/* False if there is none. */
static bool
read_store(EsStoreFile *store)
{
	size_t	len;
	void   *data = es_read_file(STORE_PATH, &len);
	EsError err;

	if (data == NULL)
		return false;
	if (len != ES_WAL_BLOCK)
	{
		es_fail(&err, ES_ERR_CORRUPT, len, "the file has %zu bytes instead of %d", len, ES_WAL_BLOCK);
		es_corruption(ERROR, STORE_PATH, &err);
	}
	if (es_store_decode(data, store, &err) != ES_OK)
		es_corruption(ERROR, STORE_PATH, &err);
	pfree(data);
	return true;
}

static void
write_store(EsStoreFile *store)
{
	char block[ES_WAL_BLOCK];

	es_store_encode(store, block);
	es_replace_file(ES_STORE_DIR, STORE_NAME, block, sizeof(block));
}

void
es_store_set_detached(bool detached)
{
	EsStoreFile store;

	if (!read_store(&store) || ((store.flags & ES_STORE_DETACHED) != 0) == detached)
		return;
	if (detached)
		store.flags |= ES_STORE_DETACHED;
	else
		store.flags &= ~ES_STORE_DETACHED;
	write_store(&store);
}

/* ---- first start ---- */

/*
 * Is the shard's directory what a first start leaves that was interrupted before the
 * store file came?  Any file but the first three, or a control block that a shard has
 * written, says no.
 */
static bool
shard_is_unused(int shard)
{
	char		  *path = es_path_shard(shard);
	DIR			  *dir = AllocateDir(path);
	struct dirent *entry;
	bool		   unused = true;

	while (unused && (entry = ReadDir(dir, path)) != NULL)
	{
		const char *name = entry->d_name;

		if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0 || strcmp(name, "manifest") == 0 ||
			strncmp(name, ES_TMP_PREFIX, strlen(ES_TMP_PREFIX)) == 0)
			continue;
		if (strcmp(name, "control.0") == 0 || strcmp(name, "control.1") == 0)
		{
			char	 *file = psprintf("%s/%s", path, name);
			size_t	  len;
			void	 *data = es_read_file(file, &len);
			EsControl control;

			unused = data != NULL && len == ES_WAL_BLOCK &&
					 es_control_decode(data, &control, NULL) == ES_OK && control.incarnation == 0;
		}
		else
			unused = false;
	}
	FreeDir(dir);
	return unused;
}

/*
 * No store file: is there anything that says that there was one?  Removes what an interrupted
 * first start left.
 */
static void
check_nothing_was_here(void)
{
	DIR			  *dir;
	struct dirent *entry;
	struct stat	   st;

	if (SearchNamedReplicationSlot(ES_SLOT_NAME, true) != NULL)
		ereport(
			ERROR,
			(errcode(ERRCODE_DATA_CORRUPTED), errmsg("file \"%s\" is missing", STORE_PATH),
			 errdetail("Replication slot \"%s\" says that this cluster has an event store.", ES_SLOT_NAME),
			 errhint(
				 "Restore the data directory from a backup. If this cluster never had an event store, drop the slot with pg_drop_replication_slot.")));

	if (stat(ES_STORE_DIR, &st) != 0)
	{
		if (errno == ENOENT)
			return;
		es_file_error(ERROR, errno, "stat", ES_STORE_DIR);
	}
	dir = AllocateDir(ES_STORE_DIR);
	while ((entry = ReadDir(dir, ES_STORE_DIR)) != NULL)
	{
		char *path = psprintf("%s/%s", ES_STORE_DIR, entry->d_name);
		int	  shard;

		if (strncmp(entry->d_name, ES_TMP_PREFIX, strlen(ES_TMP_PREFIX)) == 0)
		{
			if (stat(path, &st) == 0 && S_ISDIR(st.st_mode))
				rmtree(path, true);
			else
				unlink(path);
		}
		else if (sscanf(entry->d_name, "shard_%d", &shard) == 1)
		{
			if (!shard_is_unused(shard))
				ereport(
					ERROR,
					(errcode(ERRCODE_DATA_CORRUPTED), errmsg("file \"%s\" is missing", STORE_PATH),
					 errdetail("Directory \"%s\" holds files of an event store.", path),
					 errhint(
						 "Restore the data directory from a backup. To give up all events, remove directory \"%s\" while the server is stopped.",
						 ES_STORE_DIR)));
			rmtree(path, true);
		}
		pfree(path);
	}
	FreeDir(dir);
}

static void
make_directory(const char *path)
{
	if (MakePGDirectory(path) != 0 && errno != EEXIST)
		es_file_error(ERROR, errno, "create", path);
}

static void
make_store(EsStoreFile *store)
{
	EsFileIdentity identity;

	memset(store, 0, sizeof(*store));
	if (!pg_strong_random(store->store_uuid, ES_UUID_LEN))
		ereport(ERROR, (errcode(ERRCODE_INTERNAL_ERROR),
						errmsg("could not generate random values for the event store")));
	store->system_identifier = GetSystemIdentifier();
	store->nshards = (uint32) es_shared->nshards;
	store->created_at = es_unix_micros();
	es_slot_map_init(store->slot_map, es_shared->nshards);

	make_directory(ES_STORE_DIR);
	es_fsync_dir(".");

	memset(&identity, 0, sizeof(identity));
	memcpy(identity.store_uuid, store->store_uuid, ES_UUID_LEN);
	identity.system_identifier = store->system_identifier;
	identity.timeline = GetWALInsertionTimeLine();
	identity.nshards = (uint16) store->nshards;
	for (int shard = 0; shard < es_shared->nshards; shard++)
	{
		char *path = es_path_shard(shard);
		char *tmp = psprintf("%s/" ES_TMP_PREFIX "shard_%d", ES_STORE_DIR, shard);

		make_directory(tmp);
		identity.shard = (uint16) shard;
		es_files_make(tmp, &identity);
		if (rename(tmp, path) != 0)
			es_file_error(ERROR, errno, "rename", tmp);
		ES_FAULT("store-shard-made");
		pfree(tmp);
		pfree(path);
	}
	es_fsync_dir(ES_STORE_DIR);
	ES_FAULT("store-before-file");
	write_store(store);
	ES_FAULT("store-made");

	ereport(LOG, (errmsg_plural("event_store made a new store with %d shard in directory \"%s\"",
								"event_store made a new store with %d shards in directory \"%s\"",
								es_shared->nshards, es_shared->nshards, ES_STORE_DIR)));
}

/* ---- may this cluster open it? ---- */

static bool
adoption_allowed(const EsStoreFile *store)
{
	char			  *end;
	unsigned long long id;

	if (es_guc_adopt_system_id == NULL || es_guc_adopt_system_id[0] == '\0')
		return false;
	errno = 0;
	id = strtoull(es_guc_adopt_system_id, &end, 10);
	return errno == 0 && *end == '\0' && id == store->system_identifier;
}

static void
check_shard_count(const EsStoreFile *store)
{
	if ((int) store->nshards == es_shared->nshards)
		return;
	ereport(
		ERROR,
		(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
		 errmsg_plural("event_store.shards is %d, but the store has %u shard",
					   "event_store.shards is %d, but the store has %u shards", store->nshards,
					   es_shared->nshards, store->nshards),
		 errdetail("The number of shards is fixed when the store is made."),
		 errhint(
			 "Set \"event_store.shards = %u\" in postgresql.conf and restart the server. To change the number, dump the event tables, remove the store and restore them.",
			 store->nshards)));
}

/* Damage is the shard's own refusal: it will find it, and say so. */
static bool
try_read_control(int shard, EsControl *control)
{
	MemoryContext caller = CurrentMemoryContext;
	volatile bool readable = true;

	PG_TRY();
	{
		es_control_read(shard, control);
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(caller);
		FlushErrorState();
		readable = false;
	}
	PG_END_TRY();
	return readable;
}

static void
read_controls(const EsStoreFile *store, ShardFound *found)
{
	for (int i = 0; i < es_shared->nshards; i++)
		found[i].readable = try_read_control(i, &found[i].control) &&
							memcmp(found[i].control.identity.store_uuid, store->store_uuid, ES_UUID_LEN) == 0;
}

/*
 * Files of another cluster or timeline: refused, or taken over if that was asked for and
 * every shard was stopped cleanly.
 */
static void
check_cluster(EsStoreFile *store, ShardFound *found)
{
	uint64	   sysid = GetSystemIdentifier();
	TimeLineID timeline = GetWALInsertionTimeLine();
	bool	   other_cluster = store->system_identifier != sysid;
	TimeLineID other_timeline = 0;
	bool	   clean = true;

	for (int i = 0; i < es_shared->nshards; i++)
	{
		if (found[i].readable && found[i].control.identity.timeline != timeline)
			other_timeline = found[i].control.identity.timeline;
		clean = clean && found[i].readable && (found[i].control.flags & ES_CONTROL_CLEAN) != 0;
	}
	if (!other_cluster && other_timeline == 0)
		return;

	if (!adoption_allowed(store))
	{
		if (other_cluster)
			ereport(
				ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("the event store in directory \"%s\" belongs to another cluster", ES_STORE_DIR),
				 errdetail("Its system identifier is %llu, this cluster's is %llu.",
						   (unsigned long long) store->system_identifier, (unsigned long long) sysid),
				 errhint(
					 "A store cannot be copied from one cluster to another. After pg_upgrade of a server that was stopped cleanly, set \"event_store.adopt_system_id = '%llu'\" in postgresql.conf.",
					 (unsigned long long) store->system_identifier)));
		ereport(
			ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("the event store was written on timeline %u, but the cluster is on timeline %u",
					other_timeline, timeline),
			 errdetail(
				 "Promoted standbys and clusters recovered from an archive may hold events in PostgreSQL's write-ahead log that the store's own files have not."),
			 clean
				 ? errhint(
					   "Use the server that wrote the store. If no events were written since this copy of it was made, which is of a store that was stopped cleanly, set \"event_store.adopt_system_id = '%llu'\" in postgresql.conf.",
					   (unsigned long long) store->system_identifier)
				 : errhint(
					   "Use the server that wrote the store. A standby and a restored base backup can open it only if it was stopped cleanly before they were made.")));
	}

	for (int i = 0; i < es_shared->nshards; i++)
		if (!found[i].readable || !(found[i].control.flags & ES_CONTROL_CLEAN))
			ereport(
				ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("the event store of system identifier %llu cannot be adopted",
						(unsigned long long) store->system_identifier),
				 errdetail("Its shard %d was not stopped cleanly.", i),
				 errhint(
					 "Start the server that wrote the store, stop it with pg_ctl stop -m fast, and copy or upgrade it then.")));

	/* the shards first: until the store file says so too, every start comes here again */
	for (int i = 0; i < es_shared->nshards; i++)
	{
		EsControl *c = &found[i].control;

		c->identity.system_identifier = sysid;
		c->identity.timeline = timeline;
		c->restart_lsn = GetFlushRecPtr(NULL);
		es_control_replace(i, c);
		ES_FAULT("store-shard-adopted");
	}
	if (other_cluster)
	{
		store->system_identifier = sysid;
		write_store(store);
	}
	ereport(LOG, (errmsg("event_store adopted the store of system identifier %s", es_guc_adopt_system_id)));
}

/* Without the slot nobody has kept PostgreSQL's WAL for shards that need it. */
static void
check_slot(const ShardFound *found)
{
	if (SearchNamedReplicationSlot(ES_SLOT_NAME, true) != NULL)
		return;
	for (int i = 0; i < es_shared->nshards; i++)
	{
		if (found[i].readable && (found[i].control.flags & ES_CONTROL_CLEAN))
			continue;
		if (pg_atomic_read_u32(&es_shared->shards[i].release_wal) != 0)
			continue;
		ereport(
			ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("replication slot \"%s\" is missing, but shard %d was not stopped cleanly", ES_SLOT_NAME,
					i),
			 found[i].readable
				 ? errdetail(
					   "The shard needs PostgreSQL's write-ahead log from %X/%X on. A restored base backup and a promoted standby look like this.",
					   LSN_FORMAT_ARGS(found[i].control.restart_lsn))
				 : errdetail(
					   "The shard's control blocks cannot be read. A restored base backup and a promoted standby look like this."),
			 errhint(
				 "Restore a file-system snapshot or a copy of the cleanly stopped server. event_store.release_wal(%d) opens the shard with what its own files hold and gives up the rest.",
				 i)));
	}
}

static void
publish(const EsStoreFile *store, const ShardFound *found)
{
	memcpy(es_shared->store_uuid, store->store_uuid, ES_UUID_LEN);
	es_shared->system_identifier = store->system_identifier;
	memcpy(es_shared->slot_map, store->slot_map, ES_ROUTING_SLOTS);
	for (int i = 0; i < es_shared->nshards; i++)
	{
		EsShardShared *s = &es_shared->shards[i];
		bool		   clean = found[i].readable && (found[i].control.flags & ES_CONTROL_CLEAN) != 0;

		pg_atomic_write_u64(&s->restart_lsn, found[i].readable ? found[i].control.restart_lsn : 0);
		pg_atomic_write_u32(&s->clean, clean ? 1 : 0);

		/* the shard that stopped last has seen the highest position */
		if (found[i].readable)
			es_counter_max(&es_shared->position_start,
						   clean ? found[i].control.next_position : found[i].control.reserved_below);
	}
}

void
es_store_open(void)
{
	EsStoreFile store;
	ShardFound	found[ES_MAX_SHARDS];

	if (!read_store(&store))
	{
		check_nothing_was_here();
		make_store(&store);
	}
	check_shard_count(&store);
	read_controls(&store, found);
	check_cluster(&store, found);
	check_slot(found);
	if (store.flags & ES_STORE_DETACHED)
	{
		ereport(LOG, (errmsg("the event store, which was detached, is in use again")));
		es_store_set_detached(false);
	}
	publish(&store, found);
}
