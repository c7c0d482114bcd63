/*-------------------------------------------------------------------------
 *
 * channel.h
 *	  The backend's end of its queue pairs to the shards.
 *
 * One pair of shm_mq per (backend, shard), made on first use: a request queue of
 * event_store.queue_size, an answer queue of event_store.result_queue_size.  Pairs
 * lie in DSM segments of the backend, in groups that grow (1, 1, 2, 4, 8 pairs),
 * so that a backend takes at most five DSM slots.  on_dsm_detach detaches the
 * queues, after the transaction is over.
 *
 * A message that is larger than the ring is sent in pieces (piece.h).  An ERROR in the
 * middle of one costs the shard nothing but the pieces: the next use of the channel
 * tells it to forget them.  A channel that shm_mq has broken, or whose shard was
 * restarted, is built anew with the next generation number, after the shard has let go of
 * the old one.
 *
 * PROTOCOL.md 2.1 in terms of these functions:
 *		es_channel_wait_room(...)	may throw, nothing logged yet
 *		floor is set, message is logged
 *		es_channel_send(...)		may throw only for messages larger than the ring
 *		floor is cleared
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_IPC_CHANNEL_H
#define ES_IPC_CHANNEL_H

#include "postgres.h"

#include "ipc/protocol.h"
#include "ipc/shmem.h"

/*
 * Makes sure that there is a working channel to the shard's current generation.
 * Waits for a shard that starts (startup_timeout).  Returns the shard's
 * generation.  Throws 57P03, 53200 (no shared memory, with setting and size) ...
 */
extern uint32 es_channel_connect(int shard);

/*
 * Waits until a message of len bytes fits whole (or, if it is larger than the
 * ring, until the ring is empty).  Cancel and event_store.enqueue_timeout (53000,
 * "shard 3 is busy") are taken here, with nothing half-sent.
 */
extern void es_channel_wait_room(int shard, Size len);

/* The same without waiting. */
extern bool es_channel_has_room(int shard, Size len);

/*
 * Sends one message (parts joined; the first begins with EsRequest, whose len it
 * fills), sets the ready bit and flushes it into the queue, which wakes the shard (shm_mq
 * does so with each flush, whatever `wake` says).  Parts may have any length; zeros fill
 * the message up to a multiple of 8.  If the shard's generation has changed since the
 * channel was made, it connects anew first (so a message that was logged before the new
 * generation's MARK comes twice, which the shard drops).  Messages that fit never block
 * after wait_room; larger ones stream, taking interrupts.
 */
extern void es_channel_send(int shard, EsRequest *req, const EsPart *parts, int nparts, bool wake);

/*
 * For hints: sends only if there is a live channel and room; never throws, never
 * waits.  Returns whether it was sent.
 */
extern bool es_channel_hint(int shard, EsRequest *req, const EsPart *parts, int nparts, bool wake);

/* A fresh request id (never 0, unique in this backend). */
extern uint64 es_request_id(void);

/*
 * Answers.  An id is expected from es_channel_expect until es_channel_forget; answers to
 * ids that nobody expects are thrown away.  es_channel_answer waits for the next
 * answer to id; it stays valid until the next call for the same id (or
 * forget).  Answers to other expected ids that come in between are kept, in memory
 * of the backend (bounded by their credit).
 * Throws the shard's error if the answer is one; 57P03 "shard 3 was restarted" if the
 * generation changed while waiting; takes cancel.
 */
extern void			   es_channel_expect(int shard, uint64 id);
extern const EsAnswer *es_channel_answer(int shard, uint64 id);
/* The same with a time limit in ms (-1 = none); NULL on time-out. */
extern const EsAnswer *es_channel_answer_timeout(int shard, uint64 id, long timeout_ms);

/*
 * If OPEN or WAIT was sent under this id and its last answer has not come, the shard is
 * told to CLOSE it, now or when there is room.  (A CLOSE that somebody sends for an
 * id that is not open is left out.)  Never throws.
 */
extern void es_channel_forget(int shard, uint64 id);

/* One request, one answer, the id forgotten after; the answer is palloc'd. */
extern EsAnswer *es_channel_call(int shard, EsRequest *req, const EsPart *parts, int nparts);

/* At the end of a transaction: forgets all ids that are still expected.  Never throws. */
extern void es_channel_end_transaction(void);

#endif /* ES_IPC_CHANNEL_H */
