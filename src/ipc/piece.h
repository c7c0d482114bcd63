/*-------------------------------------------------------------------------
 *
 * piece.h
 *	  How messages lie in a queue; used by both ends of a channel only.
 *
 * A message that fits into the ring is one shm_mq message, as it is.  A larger one is
 * cut into pieces of a quarter of the ring, each a shm_mq message of its own: EsPiece, then
 * bytes.  So nothing that shm_mq sees is larger than the ring, nothing blocks
 * inside of shm_mq, and its limit of 1 GB does not concern us.
 *
 * The first piece brings the length of the whole.  A sender that gives up half-way
 * (cancel, time-out) says so by a piece with ES_PIECE_ABANDONED; he always has room for it,
 * because pieces leave ES_PIECE_RESERVE bytes of the ring free.
 *
 * Ring bytes of a shm_mq message of n bytes: its length word and n, each MAXALIGNed.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_IPC_PIECE_H
#define ES_IPC_PIECE_H

#include "postgres.h"

#include "storage/shm_mq.h"

#include "core/message.h"
#include "ipc/protocol.h"

/* Longest message, header included. */
#define ES_MESSAGE_MAX_LEN ((Size) PG_INT32_MAX)

/* Takes the place of EsRequest.type and EsAnswer.type. */
#define ES_PIECE_TYPE 0xffff

#define ES_PIECE_FIRST	   0x0001
#define ES_PIECE_LAST	   0x0002
#define ES_PIECE_ABANDONED 0x0004 /* what came of this message is to be forgotten */

typedef struct EsPiece
{
	uint16 type; /* ES_PIECE_TYPE */
	uint16 flags;
	uint32 reserved;
	uint64 offset; /* of its bytes in the message */
	uint64 total;  /* length of the message */
				   /* bytes follow */
} EsPiece;

static inline Size
es_ring_bytes(Size len)
{
	return MAXALIGN(sizeof(Size)) + MAXALIGN(len);
}

/* Ring bytes that pieces leave free for one without bytes. */
#define ES_PIECE_RESERVE es_ring_bytes(sizeof(EsPiece))

/* Bytes of a message that one piece carries. */
static inline Size
es_piece_room(Size ring)
{
	return MAXALIGN_DOWN(ring / 4) - es_ring_bytes(sizeof(EsPiece));
}

/* Memory that a shm_mq needs for a ring of `ring` bytes. */
static inline Size
es_queue_memory(Size ring)
{
	return MAXALIGN(ring) + (shm_mq_minimum_size - MAXIMUM_ALIGNOF);
}

/* Length of the parts, rounded up to 8; error-free. */
extern Size es_parts_len(const EsPart *parts, int nparts);

/*
 * Fills iov with bytes [offset, offset + len) of the joined parts, zeros behind their end (at
 * most 7); returns the number of entries, at most nparts + 1.
 */
extern int es_parts_slice(const EsPart *parts, int nparts, Size offset, Size len, shm_mq_iovec *iov);

/* A message being joined.  All zero = none. */
typedef struct EsJoin
{
	char *data; /* total bytes, palloc'd; NULL = nothing is being joined */
	Size  total;
	Size  have;
} EsJoin;

typedef enum EsJoinResult
{
	ES_JOIN_MORE,  /* not whole yet, or abandoned */
	ES_JOIN_WHOLE, /* join->data is the message; the caller takes or resets it */
	ES_JOIN_NO_MEMORY,
	ES_JOIN_BROKEN /* does not fit to what came before: a bug of the sender */
} EsJoinResult;

extern EsJoinResult es_join_add(EsJoin *join, MemoryContext context, const EsPiece *piece, Size len);
extern void			es_join_reset(EsJoin *join); /* frees data */

#endif /* ES_IPC_PIECE_H */
