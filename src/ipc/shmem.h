/*-------------------------------------------------------------------------
 *
 * shmem.h
 *	  The fixed shared memory of event_store: one EsShared, one EsShardShared per
 *	  shard, one EsBackendSlot per PGPROC.  Allocated at server start; nothing
 *	  in it is ever freed.
 *
 * Each field says who may change it and under what.  "owner" of a backend slot
 * is the process whose PGPROC number is the slot's index; "shard" is the shard's
 * process of the current generation.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_IPC_SHMEM_H
#define ES_IPC_SHMEM_H

#include "postgres.h"

#include "access/xlogdefs.h"
#include "port/atomics.h"
#include "storage/condition_variable.h"
#include "storage/dsm.h"
#include "storage/latch.h"
#include "storage/lwlock.h"
#include "storage/proc.h"
#include "storage/spin.h"
#include "utils/dsa.h"

#include "core/arith.h"
#include "core/format.h"
#include "core/wal.h"

typedef enum EsShardState
{
	ES_SHARD_ABSENT = 0, /* no process yet, or between two */
	ES_SHARD_STARTING,	 /* process runs, files not open */
	ES_SHARD_RECOVERING,
	ES_SHARD_OPEN,	   /* takes messages */
	ES_SHARD_STOPPING, /* server stops: serves until backends are gone */
	ES_SHARD_CLEAN,	   /* stopped cleanly */
	ES_SHARD_FAILED	   /* refuses to open; reason says why, process waits or retries */
} EsShardState;

/* Counters of a shard, shown by stat_shards.  Each is written by one process
 * (the shard) unless marked; read by anybody without a lock. */
typedef struct EsShardCounters
{
	pg_atomic_uint64 messages; /* requests taken from queues */
	pg_atomic_uint64 batches;
	pg_atomic_uint64 rows;
	pg_atomic_uint64 commits; /* transactions resolved as committed */
	pg_atomic_uint64 aborts;
	pg_atomic_uint64 duplicates;		  /* rows not taken: event id already there */
	pg_atomic_uint64 last_drain;		  /* messages found in the last drain */
	pg_atomic_uint64 queue_high_water;	  /* most bytes ever waiting in one queue; by senders, atomic max */
	pg_atomic_uint64 queue_full_waits;	  /* by senders, fetch_add */
	pg_atomic_uint64 queue_full_wait_us;  /* by senders, fetch_add */
	pg_atomic_uint64 queue_timeouts;	  /* by senders, fetch_add */
	pg_atomic_uint64 staged_rows;		  /* now */
	pg_atomic_uint64 staged_bytes;		  /* now */
	pg_atomic_uint64 staged_transactions; /* now */
	pg_atomic_uint64 memtable_rows;		  /* now, active and passive */
	pg_atomic_uint64 memtable_bytes;	  /* now */
	pg_atomic_uint64 segments;			  /* now */
	pg_atomic_uint64 segment_rows;		  /* now */
	pg_atomic_uint64 segment_bytes;		  /* now */
	pg_atomic_uint64 pending_segments;	  /* now */
	pg_atomic_uint64 flushes;
	pg_atomic_uint64 wal_direct_writes;
	pg_atomic_uint64 wal_staged_writes;
	pg_atomic_uint64 wal_groups;
	pg_atomic_uint64 wal_frames;
	pg_atomic_uint64 wal_bytes;
	pg_atomic_uint64 wal_files; /* now */
	pg_atomic_uint64 fsyncs;
	pg_atomic_uint64 fsync_us;
	pg_atomic_uint64 fsync_histogram[16]; /* bucket i: below 64 << i µs */
	pg_atomic_uint64 control_writes;
	pg_atomic_uint64 manifest_records;
	pg_atomic_uint64 last_position;	   /* highest position adopted */
	pg_atomic_uint64 durable_position; /* highest position durable in the shard's own files */
	pg_atomic_uint64 flush_distance;   /* bytes between what it took and PostgreSQL's flush pointer */
	pg_atomic_uint64 scans;
	pg_atomic_uint64 replays;
	pg_atomic_uint64 rows_sent;
	pg_atomic_uint64 io_errors;
	pg_atomic_uint64 corruptions;
	pg_atomic_uint64 waiters; /* now */
} EsShardCounters;

#define ES_READY_WORDS(nslots) (((nslots) + 63) / 64)

/* Transactions that a shard can call too large at a time. */
#define ES_TOO_LARGE 16

typedef struct EsShardShared
{
	slock_t mutex; /* guards proc, pid, reason, reason_code */
	PGPROC *proc;  /* NULL = no process */
	int		pid;
	int		reason_code; /* SQLSTATE of a refusal */
	char	reason[512]; /* why it does not open: message, hint, detail, with newlines between */

	pg_atomic_uint32  state;	   /* EsShardState; shard */
	pg_atomic_uint32  generation;  /* +1 by a new shard process before it logs its MARK;
									 * queues of older generations are dead */
	pg_atomic_uint32  paused;	   /* 1 = takes nothing from its queues; any superuser */
	pg_atomic_uint32  may_detach;  /* 1 = has nothing undecided while the store is closed for a detach; shard,
									 * keeper sets 0 */
	pg_atomic_uint32  release_wal; /* 1 = asked to open without the WAL it needs; superuser */
	pg_atomic_uint32  stuck_errno; /* why it cannot write its files now, 0 = it can: writers
									 * refuse before they log; shard */
	pg_atomic_uint32  sync_request; /* +1 = force everything to own files now; anybody */
	pg_atomic_uint32  sync_done;	/* value of sync_request that was served; shard */
	ConditionVariable changed;		/* broadcast when state changes */

	pg_atomic_uint64 recovery_start; /* PostgreSQL LSNs, for progress; shard */
	pg_atomic_uint64 recovery_at;
	pg_atomic_uint64 recovery_end;

	pg_atomic_uint64 restart_lsn;	   /* of the last synced control block, 0 = unknown; shard
									 * (keeper before the shard has opened) */
	pg_atomic_uint32 clean;			   /* that control block says clean; same */
	pg_atomic_uint64 oldest_undecided; /* oldest fxid without durable verdict, or next fxid; shard */
	/* fxids, by their last bits: they have as many pending segments as can be adopted at once, and must not go
	 * on; what is left of ended ones does no harm; shard */
	pg_atomic_uint64 too_large[ES_TOO_LARGE];
	pg_atomic_uint32 napping;	 /* 1 = sleeps a moment without looking at its latch: one who needs it now
								 * sends a signal; shard */
	pg_atomic_uint32 urgent;	 /* 1 = somebody needs it now; set by es_wake_shard, cleared by the shard */
	pg_atomic_uint32 uses_uring; /* 1 = its files are written through io_uring; shard */
	pg_atomic_uint32 arena;		 /* dsa_handle of the memory that maintenance reads; shard */

	EsShardCounters counters;

	/* bit = number of a backend slot whose queue holds something; set by senders,
	 * taken by the shard with exchange */
	pg_atomic_uint64 *ready;
} EsShardShared;

/*
 * The shared side of one channel; the queues lie in `segment` at `offset`.
 *
 * Life of a generation: the owner waits until the shard has let go of the
 * one before (closed == generation, or shard_generation is dead), makes the queues,
 * fills the fields, writes generation; the shard attaches.  The owner lets go
 * by detached = generation, the shard by closed = generation, which frees the memory.
 */
typedef struct EsChannelShared
{
	pg_atomic_uint32 generation;	   /* of this channel, +1 per (re)connect, 0 = never; owner,
									 * written last */
	pg_atomic_uint32 closed;		   /* generation the shard has let go of; shard */
	pg_atomic_uint32 detached;		   /* generation the owner has let go of; owner */
	pg_atomic_uint32 attached;		   /* generation the shard has attached to; shard */
	pg_atomic_uint32 failed;		   /* generation that gets no answers any more: the shard still takes
									 * what was sent, and waits until its owner lets go; shard */
	uint32			 shard_generation; /* incarnation it was made for; owner, before generation */
	dsm_handle		 segment;		   /* owner, before generation */
	Size			 offset;		   /* owner, before generation */
	Size			 length;		   /* of request queue and answer queue; owner, before generation */
	pg_atomic_uint64 sent_messages;	   /* pieces put into the request queue (a message that fits is
									 * one), the last perhaps not flushed yet; owner */
	pg_atomic_uint64 sent_bytes;	   /* ring bytes of those; owner */
	pg_atomic_uint64 taken_bytes;	   /* ring bytes that the shard has given back; shard */
	pg_atomic_uint64 taken_messages;   /* pieces taken from the request queue; shard */
	pg_atomic_uint32 room_wanted;	   /* 1 = the owner sleeps until taken_bytes moves; set by the
									 * owner, cleared by the shard, which then sets its latch */
	pg_atomic_uint32 answers_parked;   /* 1 = answers wait for room in the answer queue, 2 = and the
										 * owner has read since; shard, but 1 -> 2 by the owner */
	pg_atomic_uint64 answers;		   /* pieces put into the answer queue, likewise; shard */
} EsChannelShared;

#define ES_SLOT_TABLES 4

typedef struct EsBackendSlot
{
	/* PROTOCOL.md 2.2: F before an unsent message was logged; 0 = nothing unsent; owner */
	pg_atomic_uint64 floor;

	/* 1 = its transaction has events, or is about to: a detach waits for it, and it may go on meanwhile; owner */
	pg_atomic_uint32 has_events;

	/* dsm_handle of its transaction's dead batches (tam/dead.c), for its parallel workers; owner */
	pg_atomic_uint32 dead;

	/* PROTOCOL.md 4: written fxid, tables, then lower_bound (which makes it count); owner */
	pg_atomic_uint64 lower_bound;
	pg_atomic_uint64 fxid;
	pg_atomic_uint32 ntables;				 /* > ES_SLOT_TABLES = all tables */
	pg_atomic_uint64 tables[ES_SLOT_TABLES]; /* storage ids */

	EsChannelShared channels[ES_MAX_SHARDS];
} EsBackendSlot;

/* The replication slot that keeps PostgreSQL's WAL for the shards. */
#define ES_SLOT_NAME "event_store"

#define ES_RING_ENTRIES 1024

typedef struct EsRingEntry
{
	EsHorizonEntry entry;
	uint32		   ntables; /* as in EsBackendSlot */
	uint64		   tables[ES_SLOT_TABLES];
} EsRingEntry;

/* Why statements are refused while the store is not ready. */
typedef enum EsStoreFailure
{
	ES_STORE_NOT_FAILED = 0,
	ES_STORE_REFUSED,
	ES_STORE_CLOSED /* for a detach; opens again when that is taken back */
} EsStoreFailure;

/* event_store.detach(): asked for by a superuser, done by the shards and the keeper. */
typedef enum EsDetachState
{
	ES_ATTACHED = 0,
	ES_DETACH_ASKED, /* only transactions that have events go on; waits until there are none, and nothing is
						 * undecided in any shard.  Whoever asked may take it back */
	ES_DETACH_STOPPING, /* shards stop cleanly: there is no way back */
	ES_DETACHED			/* store file says so, slot is dropped; until the server's restart */
} EsDetachState;

typedef struct EsShared
{
	/* --- the store; keeper writes before store_ready is set, constant after --- */
	uint8			  store_uuid[ES_UUID_LEN];
	uint64			  system_identifier;
	uint8			  slot_map[ES_ROUTING_SLOTS];
	pg_atomic_uint32  store_ready;	/* 1 = store file read or made, slot there; keeper */
	pg_atomic_uint32  store_failed; /* EsStoreFailure; store_reason says why; keeper */
	slock_t			  mutex;		/* guards store_reason, store_reason_code, keeper */
	int				  store_reason_code;
	char			  store_reason[512]; /* as a shard's */
	PGPROC			 *keeper;
	ConditionVariable store_changed;
	pg_atomic_uint32  detach; /* EsDetachState; ATTACHED -> ASKED and back by a superuser who wakes
								 * keeper and shards; ASKED -> STOPPING -> DETACHED by the keeper, who
								 * broadcasts store_changed; all by compare and exchange */

	int nshards; /* constant */
	int nslots;	 /* backend slots; constant */

	/* --- positions --- */
	pg_atomic_uint64 position_start;	/* the counter begins here or above, by the control blocks of
										 * all shards at the server's start; keeper, before store_ready */
	pg_atomic_uint64 position_counter;	/* next position to hand out; 0 = not known yet;
										 * fetch_add by anybody below reserved_below,
										 * raised by recovery and by given positions */
	pg_atomic_uint64 reserved_below;	/* H: may be handed out below this; under reserve_lock */
	pg_atomic_uint64 reserve_announced; /* H about to be logged: what control blocks keep; under
										 * reserve_lock, before the RESERVE is logged */
	LWLock			*reserve_lock;

	/* --- commits that some snapshots do not see yet; under ring_lock --- */
	LWLock		  *ring_lock;
	uint32		   ring_next; /* entry i is in ring[i % ES_RING_ENTRIES]; below
								 * ES_RING_ENTRIES only until the ring is full */
	EsRingEntry	   ring[ES_RING_ENTRIES];
	EsHorizonEntry ring_overflow;		/* folded entries, of all tables */
	uint64		   ring_oldest_running; /* no snapshot considers an older fxid running */

	pg_atomic_uint32 spinners; /* backends that spin for an answer; at most one does */

	/* --- waiting (wait_for_events) --- */
	pg_atomic_uint32 table_waiters; /* how many wait for a table: who clears the slot that was the
									 * horizon wakes all shards */

	/* +1 when a table was dropped, truncated or rewritten: dead storages may be looked for soon;
	 * anybody, at commit */
	pg_atomic_uint32 collect_hint;

	/* --- jobs for maintenance workers: see ipc/jobs.h --- */
	struct EsJobQueue *jobs;

	EsShardShared  shards[ES_MAX_SHARDS];
	EsBackendSlot *slots; /* nslots */
} EsShared;

extern EsShared *es_shared;

/* Called from _PG_init's shmem_request hook and shmem_startup hook. */
extern void es_shmem_request(void);
extern void es_shmem_startup(void);

/* Number of this process's backend slot, and the slot. */
extern int			  es_my_slot_number(void);
extern EsBackendSlot *es_my_slot(void);

/* Wakes a shard's process, if there is one.  Never throws. */
extern void es_wake_shard(int shard);
extern void es_wake_keeper(void);

/* Tells a shard to look at the queue of a slot.  A full barrier before; never throws. */
extern void es_set_ready(int shard, int slot_number);

/* Shard of a context hash. */
static inline int
es_shard_of_hash(uint64 hash)
{
	return es_shared->slot_map[hash >> 54];
}

#define es_counter_add(c, n) ((void) pg_atomic_fetch_add_u64(&(c), (n)))
#define es_counter_set(c, n) pg_atomic_write_u64(&(c), (n))
extern void es_counter_max(pg_atomic_uint64 *c, uint64 n); /* many writers */

/* Does the shard take messages?  (A stopping one serves until the backends are gone.) */
static inline bool
es_shard_is_open(int shard)
{
	uint32 state = pg_atomic_read_u32(&es_shared->shards[shard].state);

	return state == ES_SHARD_OPEN || state == ES_SHARD_STOPPING;
}

/* ERROR 55000 unless the library was preloaded; everything below does it as well. */
extern void es_require_preload(void);

/*
 * Waits until the store is ready and the shard takes messages, at most
 * event_store.startup_timeout; ERROR 57P03 with progress, 55000/XX001/... with
 * the shard's reason if it refuses to open, 57P03 on a standby.  Transactions that have events pass
 * also while the store is closed for a detach.
 */
extern void es_wait_store_ready(void);
extern void es_wait_shard_open(int shard);

/*
 * The transaction is about to have its first event: from here to es_leave_store() a detach waits for it.  Waits as
 * es_wait_store_ready() does; false: it has joined already.  Leaving never throws.
 */
extern bool es_join_store(void);
extern void es_leave_store(void);

#endif /* ES_IPC_SHMEM_H */
