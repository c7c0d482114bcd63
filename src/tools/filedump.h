/*-------------------------------------------------------------------------
 *
 * filedump.h
 *	  What the files of es_filedump share.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_TOOLS_FILEDUMP_H
#define ES_TOOLS_FILEDUMP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/format.h"
#include "core/wal.h"

extern bool verbose;	 /* --verbose */
extern int	exit_status; /* 0 = all good, 1 = damage found, 2 = a file could not be read */

/* A file to be printed; data is all of it, or its beginning (segments). */
typedef struct Input
{
	const char *path;
	int			fd;
	uint64_t	size;
	char	   *data;
	size_t		len;
} Input;

/* ---- es_filedump.c ---- */

/* All of len bytes at offset, or an error; arg is an Input. */
extern EsStatus read_file(void *arg, void *buf, size_t len, uint64_t offset, EsError *err);

/* ---- words.c: texts stay until the function's next calls ---- */

/* Says what is damaged, and sets exit_status.  of: what the offset counts from, "" = the file. */
extern void damaged_part(const EsError *err, const char *of);
extern void damaged(const EsError *err);

extern const char *uuid_text(const uint8_t *uuid);
extern const char *lsn_text(EsLsn lsn);		   /* up to four in one printf */
extern const char *own_lsn_text(EsOwnLsn lsn); /* the same */
extern const char *time_text(uint64_t microseconds);
extern const char *table_text(const EsTableKey *t);
extern void		   print_identity(const EsFileIdentity *i);
extern void		   print_roles(const EsRoles *r);

/* ---- print_log.c ---- */

extern void print_store(const Input *in);
extern void print_control(const Input *in);
extern void print_wal(const Input *in);

/*
 * A file that was made ahead holds zeros, or frames of its former life, until its
 * turn comes.  Prints this one if it is such, unless the control blocks know better.
 */
extern bool print_unused_wal(const Input *in);

/* The current control block in the directory of path; false if there is none. */
extern bool find_control(const char *path, EsControl *control);

/* ---- print_manifest.c, print_segment.c ---- */

extern void print_manifest(const Input *in);
extern void print_segment(Input *in);

#endif /* ES_TOOLS_FILEDUMP_H */
