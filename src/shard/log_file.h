/*-------------------------------------------------------------------------
 *
 * log_file.h
 *	  The files of a shard's own WAL: which there are, which count, the next one made ahead,
 *	  old ones recycled.  Used by log.c and log_replay.c only.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_LOG_FILE_H
#define ES_SHARD_LOG_FILE_H

#include "postgres.h"

#include "lib/ilist.h"

#include "shard/files.h"

#define ES_OWN_LSN(number, offset) (((EsOwnLsn) (number) << 32) | (uint32) (offset))
#define ES_OWN_FILE(lsn)		   ((uint32) ((lsn) >> 32))
#define ES_OWN_OFFSET(lsn)		   ((uint32) (lsn))

typedef struct EsLogFile
{
	dlist_node node; /* in es_log_files, ascending numbers */
	uint32	   number;
	uint64	   size;
	int		   fd;		  /* -1 = made by an earlier incarnation */
	bool	   direct;	  /* opened with O_DIRECT */
	bool	   dirty;	  /* written since its last sync */
	EsLsn	   max_start; /* highest pg_start of its frames */
} EsLogFile;

/* Files with frames that count or will: those of the replayed chain, then own ones; the last is
 * being written. */
extern dlist_head es_log_files;

extern char *es_log_file_path(int shard, uint32 number);

/* Remembers an old file that is part of the log. */
extern EsLogFile *es_log_file_add(uint32 number);
extern EsLogFile *es_log_file_current(void);

/*
 * Blocking, at start: makes the first file of this incarnation, with a number above
 * everything in the directory and above `floor`; it becomes the current one.
 */
extern void es_log_file_start(int shard, uint32 floor);

/* Removes files of the log that are not in the list; once a control block says so. */
extern void es_log_file_sweep(void);

/*
 * Makes the prepared file the current one if it has room for `need` bytes and returns it;
 * NULL if it is not ready: call again after es_log_file_tick.
 */
extern EsLogFile *es_log_file_switch(uint64 need);

/* Goes on preparing. */
extern void es_log_file_tick(void);
extern long es_log_file_timeout(void);
/* errno that keeps the next file from being made, 0 = none */
extern int es_log_file_errno(void);
/* Nothing of preparing is in the kernel's hands. */
extern bool es_log_file_idle(void);

/* Takes files below `number` out of the list and recycles or removes them. */
extern void es_log_file_retire(uint32 number);

/* Files there are, prepared and spare ones included. */
extern int es_log_file_count(void);

/* log_replay.c: did es_log_replay fill the list? */
extern bool es_log_replayed;

#endif /* ES_SHARD_LOG_FILE_H */
