/*-------------------------------------------------------------------------
 *
 * guc.h
 *	  Every setting of event_store (guc.c has them in one sorted table).
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_GUC_H
#define ES_GUC_H

#include "postgres.h"

typedef enum EsIoMethod
{
	ES_IO_AUTO, /* io_uring, or sync with one LOG line where it is forbidden */
	ES_IO_URING,
	ES_IO_SYNC
} EsIoMethod;

extern int	 es_guc_cache_size;		 /* kB, decoded pages per shard */
extern int	 es_guc_compression;	 /* EsCodec */
extern int	 es_guc_enqueue_timeout; /* ms, 0 = none */
extern int	 es_guc_io_method;		 /* EsIoMethod */
extern int	 es_guc_maintenance_workers;
extern int	 es_guc_memtable_age;  /* s: an active MemTable older than this is flushed; 0 = never by age */
extern int	 es_guc_memtable_size; /* kB per shard */
extern int	 es_guc_obsolete_retention; /* s */
extern int	 es_guc_queue_size;			/* kB, towards the shard */
extern int	 es_guc_result_queue_size;	/* kB */
extern int	 es_guc_segment_rows;
extern int	 es_guc_shards;
extern int	 es_guc_spill_after;	   /* kB */
extern int	 es_guc_staging_size;	   /* kB per shard */
extern int	 es_guc_startup_timeout;   /* ms */
extern int	 es_guc_wal_file_size;	   /* kB */
extern int	 es_guc_wal_sync_interval; /* ms */
extern char *es_guc_adopt_system_id;

extern void es_guc_define(void);

/* MB of shared memory that a shard may need with these settings. */
extern Size es_guc_shard_memory(void);

#endif /* ES_GUC_H */
