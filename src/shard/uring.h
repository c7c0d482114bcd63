/*-------------------------------------------------------------------------
 *
 * uring.h
 *	  Asynchronous file writes and syncs for a shard's event loop; the only
 *	  file that knows that io_uring exists.
 *
 * Operations complete in es_uring_reap, which calls back in the loop, never
 * elsewhere.  With io_method = sync (or the fallback of auto) they are done at once and
 * called back by the next reap.  The ring is made after fork; its eventfd sits in the
 * shard's WaitEventSet; nothing here ever waits.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_URING_H
#define ES_SHARD_URING_H

#include "postgres.h"

/* result: bytes written, 0 for a sync, or -errno */
typedef void (*EsIoDone)(void *arg, int result);

extern void es_uring_init(void);
extern void es_uring_shutdown(void); /* waits for what is in flight */

/* eventfd that is readable when something completed, or PGINVALID_SOCKET (sync method) */
extern pgsocket es_uring_event_fd(void);

/* Whether this process uses io_uring ("io_uring") or not ("sync"): for the views. */
extern const char *es_uring_method(void);

/* buf must stay until done is called.  A short write is continued inside: done sees the whole
 * length or an error. */
extern void es_uring_write(int fd, const void *buf, size_t len, uint64 offset, EsIoDone done, void *arg);
extern void es_uring_fdatasync(int fd, EsIoDone done, void *arg);
extern void es_uring_fsync(int fd, EsIoDone done, void *arg); /* for directories */

/* Nothing is asked of the kernel: done is called with this result by the next reap (injected
 * faults). */
extern void es_uring_result(int result, EsIoDone done, void *arg);

extern int es_uring_in_flight(void);

/* Calls back for everything that completed; returns how many. */
extern int es_uring_reap(void);

#endif /* ES_SHARD_URING_H */
