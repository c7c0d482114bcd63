/*-------------------------------------------------------------------------
 *
 * files.h
 *	  Names and opening of a shard's files; the store file; what a shard finds
 *	  at start.
 *
 * $PGDATA/event_store/store, $PGDATA/event_store/shard_N/{control.0, control.1, manifest, wal.*, seg.*}
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_FILES_H
#define ES_SHARD_FILES_H

#include "postgres.h"

#include "core/manifest.h"
#include "core/wal.h"

#define ES_STORE_DIR "event_store"

/* Paths relative to the data directory, palloc'd. */
extern char *es_path_shard(int shard);
extern char *es_path_in_shard(int shard, const char *name);
extern char *es_path_segment(int shard, uint64 id);
extern char *es_path_segment_tmp(int shard, uint64 id);

/* fsync of a directory; ERROR on failure. */
extern void es_fsync_dir(const char *path);

/*
 * Makes dir/name hold exactly these bytes, durably and at once: a new file pgsql_tmp.name, fsync,
 * rename, fsync of the directory.  ERROR on failure.
 */
extern void es_replace_file(const char *dir, const char *name, const void *data, size_t len);

/* A whole file, palloc'd; NULL if it does not exist.  ERROR if it cannot be read. */
extern void *es_read_file(const char *path, size_t *len);

/* Name of a file that is not finished: a base backup leaves it out, the next start removes it. */
#define ES_TMP_PREFIX "pgsql_tmp."

/* Is this server on its way down (from postmaster.pid)?  A worker cannot tell by SIGTERM alone. */
extern bool es_server_stopping(void);

/* Counts an fsync of the shard that began at `start` (GetCurrentTimestamp). */
extern void es_count_fsync(int64 start);

/* Who this shard is: store, cluster, timeline, shard. */
extern void es_identity(int shard, EsFileIdentity *identity);

/*
 * ereport(ERROR) for a failed file operation: SQLSTATE from errno (53100 for
 * ENOSPC/EDQUOT, 58030 otherwise), with the file's name and a hint.
 */
extern void es_file_error(int elevel, int err, const char *operation, const char *path);

/* ereport for damage: XX001 with file, offset, expected and found checksum. */
extern void es_corruption(int elevel, const char *path, const EsError *err);

/* ---- store file; keeper only ---- */

/* Number of shards of this data directory's store, 0 if there is none (or it cannot be read: the keeper
 * will say why).  For _PG_init, which has to know how many workers to start. */
extern int es_store_peek_nshards(void);

/* Notes in the store file that it was stopped by event_store.detach() or (false) that it is in use. */
extern void es_store_set_detached(bool detached);

/* Reads the store file, or makes it (first start); publishes it in es_shared.  Raises the
 * refusals of DESIGN §10 and PROTOCOL §6 (changed shard count, foreign, newer,
 * missing while the slot exists...). */
extern void es_store_open(void);

/* ---- a shard's files at start ---- */

typedef struct EsShardFiles
{
	EsFileIdentity	identity;
	bool			fresh;	 /* there was nothing: a new shard */
	bool			older;	 /* not what the shard had last, and to be opened all the same (release_wal) */
	EsControl		control; /* current one */
	EsManifestState manifest;
} EsShardFiles;

/*
 * Opens (or, the first time, makes) the shard's directory, reads control blocks
 * and manifest, rewrites the manifest to a new file, removes files that no
 * manifest names.  ERROR if anything is damaged or foreign; nothing is changed
 * in that case.
 */
extern void es_files_open(int shard, EsShardFiles *files);

/* The files that a shard begins with, in a directory that exists: control blocks that say "clean, nothing
 * here", an empty manifest.  Keeper, when the store is made. */
extern void es_files_make(const char *dir, const EsFileIdentity *identity);

/* manifest_file.c: reads and checks (nothing is changed), then takes over with a new file. */
extern void	  es_manifest_load(int shard, const EsControl *control, EsManifestState *state);
extern void	  es_manifest_open(int shard, const EsFileIdentity *identity, EsManifestState *state);
extern long	  es_manifest_timeout(void);										 /* as es_log_timeout */
extern int	  es_manifest_stuck_errno(void);									 /* as es_log_stuck_errno */
extern size_t es_manifest_make(const char *dir, const EsFileIdentity *identity); /* its length */

/*
 * Manifest edits, one at a time, asynchronous: appended, synced; then done is
 * true.  An I/O error is PANIC-or-FATAL by data_sync_elevel for fsync, and a retry later for
 * ENOSPC on the write (the record is written again at the same place).
 */
extern uint64			es_manifest_submit(EsManifestEdit *edit); /* takes ownership; returns a ticket */
extern bool				es_manifest_done(uint64 ticket);
extern void				es_manifest_tick(void);							   /* goes on; the loop calls it */
extern EsManifestState *es_manifest_state(void);						   /* as of the last durable record */
extern uint64			es_manifest_next_segment_id(void);				   /* a fresh id */
extern void es_manifest_position(uint64 *generation, uint64 *durable_len); /* for control blocks */

#endif /* ES_SHARD_FILES_H */
