/*-------------------------------------------------------------------------
 *
 * server_internal.h
 *	  What the two files of the shard's end share: server.c (connections and
 *	  requests) and server_send.c (answers).
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_IPC_SERVER_INTERNAL_H
#define ES_IPC_SERVER_INTERNAL_H

#include "postgres.h"

#include "lib/ilist.h"
#include "storage/dsm.h"

#include "guc.h"
#include "ipc/piece.h"
#include "ipc/server.h"

typedef struct EsConnection
{
	EsConn			 conn; /* first */
	EsChannelShared *shared;
	dsm_segment		*segment;
	shm_mq_handle	*requests;
	shm_mq_handle	*answers;
	bool			 failed;  /* it gets no answers any more */
	bool			 ignored; /* and its questions are forgotten */

	/* requests */
	uint64 taken_messages; /* pieces */
	uint64 published;	   /* ring bytes that shm_mq has certainly given back */
	uint64 published_told; /* and what taken_bytes says */
	uint64 unpublished;	   /* consumed, but not given back */
	EsJoin join;

	/* answers */
	uint64	   answers_sent; /* pieces */
	dlist_head parked;		 /* Parked */
	Size	   parked_bytes;
	dlist_node parked_node; /* in the list of connections with parked answers, if there are any */
} EsConnection;

extern int			 es_server_shard; /* number of this process's shard */
extern MemoryContext es_server_context;

static inline Size
es_request_ring(void)
{
	return (Size) es_guc_queue_size * 1024;
}

static inline Size
es_answer_ring(void)
{
	return (Size) es_guc_result_queue_size * 1024;
}

/* Sets the latch of the connection's owner. */
extern void es_server_wake(const EsConnection *c);

/*
 * Nothing more can be sent over it.  What commits rest on is still taken, until its owner, who is told, lets
 * go of it.
 */
extern void es_server_fail(EsConnection *c);

/* Frees what is parked. */
extern void es_server_drop_parked(EsConnection *c);

#endif /* ES_IPC_SERVER_INTERNAL_H */
