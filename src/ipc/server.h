/*-------------------------------------------------------------------------
 *
 * server.h
 *	  The shard's end of all channels.
 *
 * A shard never waits for a backend: answers that do not fit into a queue are
 * parked in the shard's memory and go on when the reader has made room (its
 * reading sets the shard's latch).
 *
 * Order.  Whoever sends a message sets his ready bit before anybody can know that he did.  So
 * when the bitmap has been taken and what it shows was delivered, everything is delivered that was
 * sent before any message of an *earlier* es_server_take; of what the same call delivers, one
 * message may be there without another that came before it by a different queue (its
 * sender's part of the bitmap had been taken already).  shard/collect.c builds on it.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_IPC_SERVER_H
#define ES_IPC_SERVER_H

#include "postgres.h"

#include "ipc/protocol.h"
#include "ipc/shmem.h"

/* One connected backend. */
typedef struct EsConn EsConn;

struct EsConn
{
	int	   slot; /* number of the backend slot */
	uint32 generation;
	void  *user; /* the engine's */
				 /* private fields follow in server.c: EsConn is the first member there */
};

typedef struct EsServerCallbacks
{
	/* A message; req points into the queue or a copy, 8-byte aligned, valid only during
	 * the call.  Must not throw for anything a client can cause. */
	void (*message)(EsConn *conn, const EsRequest *req, Size len);
	/* The backend is gone or has let go of this generation. */
	void (*closed)(EsConn *conn);
} EsServerCallbacks;

/*
 * Once, in the shard's process, after its generation was set: makes this process
 * the one that es_wake_shard wakes, until it exits.  Then its state is ABSENT unless it
 * had become CLEAN or FAILED.
 */
extern void es_server_init(int shard, const EsServerCallbacks *callbacks);

/*
 * Takes the ready bitmap once and delivers what every queue that it shows held
 * (whole messages: sent_messages), calling back for each.  Connects new backends,
 * notices those that are gone.  Returns the number of messages (and keeps the
 * counter `messages`).
 *
 * A message that is only partly there (its sender streams it) is not waited for: nobody's
 * commit can rest on it, and its sender may take for ever.
 */
extern int es_server_take(void);

/*
 * Looks at all connections, not only the ready ones, for backends that are gone.  What it finds in
 * their queues it delivers, in no order that says anything, and sets the latch.
 */
extern void es_server_sweep(void);

/* Lets go of all connections: who waits for an answer gets an error. */
extern void es_server_close_all(void);

/* Sends or parks an answer; parts are copied if need be. */
extern void es_conn_send(EsConn *conn, EsAnswer *answer, const EsPart *parts, int nparts);
extern void es_conn_send_error(EsConn *conn, uint16 type, uint64 id, int sqlerrcode, const char *message,
							   const char *detail, const char *hint);

/* Bytes parked for this reader: the engine makes no more DATA for it while > 0. */
extern Size es_conn_parked(const EsConn *conn);

/* Goes on with parked answers; returns whether any are left. */
extern bool es_server_push_parked(void);

#endif /* ES_IPC_SERVER_H */
