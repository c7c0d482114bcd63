/*-------------------------------------------------------------------------
 *
 * event_store_test.h
 *	  What the files of event_store_test share.
 *
 *-------------------------------------------------------------------------
 */
#ifndef EVENT_STORE_TEST_H
#define EVENT_STORE_TEST_H

#include "postgres.h"

#include "ipc/shmem.h"

/* Superuser, and event_store preloaded; else an ERROR. */
extern void est_check(void);

/* The same, and the shard exists. */
extern int est_shard(int32 shard);

#endif /* EVENT_STORE_TEST_H */
