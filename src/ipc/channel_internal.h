/*-------------------------------------------------------------------------
 *
 * channel_internal.h
 *	  What the two files of the backend's end share: channel.c (connecting and
 *	  sending) and answer.c (receiving).
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_IPC_CHANNEL_INTERNAL_H
#define ES_IPC_CHANNEL_INTERNAL_H

#include "postgres.h"

#include "storage/dsm.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "ipc/channel.h"
#include "ipc/piece.h"

/* This process's end of its channel to one shard. */
typedef struct EsChannel
{
	int				 shard;
	dsm_segment		*segment; /* where the pair lies; NULL = it has no memory yet */
	Size			 offset;
	EsChannelShared *shared;

	/* the current generation */
	shm_mq_handle *requests; /* NULL = no queues */
	shm_mq_handle *answers;
	uint32		   generation;
	uint32		   shard_generation;
	bool		   attached;  /* the shard has its end */
	bool		   broken;	  /* shm_mq said no in the middle: not to be used any more */
	bool		   half_sent; /* pieces of a message are out, its last one is not */
	uint64		   sent_messages;
	uint64		   sent_bytes;
	uint64		   answers_taken;
	EsJoin		   join; /* an answer that came in pieces */
} EsChannel;

/* Lives as long as the process. */
extern MemoryContext es_channel_context;

/* The channel, connected or not. */
extern EsChannel *es_channel_get(int shard);

/* Can the channel be used: attached, not broken, to the shard's present incarnation? */
extern bool es_channel_usable(const EsChannel *ch);

/* Has the shard, which lives, given up answering on it? */
static inline bool
es_channel_failed(const EsChannel *ch)
{
	return ch->attached && pg_atomic_read_u32(&ch->shared->failed) == ch->generation;
}

/* The error of a session whose connection the shard has given up. */
pg_attribute_noreturn() extern void es_channel_raise_dropped(const EsChannel *ch);

/* Sleeps until the latch is set or the deadline (0 = none), at most a second; takes interrupts. */
extern void es_channel_sleep(TimestampTz deadline, uint32 wait_event);

/* End of transaction: no message stays half-sent.  Never throws. */
extern void es_channel_abandon_all(void);

/* Parts that a hint may have. */
#define ES_HINT_PARTS 4

/* ---- answer.c, for channel.c ---- */

/* A request is about to be sent: false if it belongs to a scan of a dead incarnation of the shard, or closes
 * what is not open. */
extern bool es_answer_may_send(const EsChannel *ch, const EsRequest *req);
/* It was sent. */
extern void es_answer_sent(const EsChannel *ch, const EsRequest *req);

#endif /* ES_IPC_CHANNEL_INTERNAL_H */
