/*-------------------------------------------------------------------------
 *
 * flush.h
 *	  What the modules that write segments share: flush.c (MemTables), carry.c (what a
 *	  flush may not write yet), build.c (files that maintenance makes), spill.c (pending
 *	  segments), adopt.c (their FINISH and verdict), drop.c (dead storages).
 *	  What the rest of the shard calls is in engine.h.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_FLUSH_H
#define ES_SHARD_FLUSH_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "lib/ilist.h"

#include "core/manifest.h"
#include "ipc/jobs.h"
#include "ipc/server.h"
#include "shard/memtable.h"
#include "shard/segments.h"
#include "shard/txn.h"

/* ms after which a step that failed is tried again. */
#define ES_FLUSH_RETRY 1000

/* ---- flush.c ---- */

/* Has the active MemTable flushed soon; returns the newest one that has rows to flush, 0 = none has. */
extern uint64 es_flush_ask(void);
/* The same for MemTables up to this id, with rows or without. */
extern void es_flush_ask_past(uint64 memtable);
/* Are this MemTable and all older ones gone? */
extern bool es_flush_retired(uint64 memtable);
/* What keeps flushes and spills from going on, if it is something that a client should hear of. */
extern bool es_flush_trouble(int *sqlerrcode, char *detail, Size len);

/* ---- flush_request.c ---- */

extern void es_flush_answer(TimestampTz now);

/* ---- build.c: segment files, made by a maintenance worker ---- */

typedef struct EsBuild
{
	EsJobKind	 kind;
	EsTableKey	 table;
	EsMemBatch **batches;
	uint32		 nbatches;
	EsMemTable	*memtable;	 /* that has the batches, with a reference; NULL = a reference to each */
	dsa_pointer	 list;		 /* EsJobBatch[nbatches], 0 = not made */
	uint32		 listed;	 /* how many are in it */
	Size		 list_bytes; /* what of it is used by them and copies of private memory */
	bool		 too_large;	 /* there is no memory for the list, and what is kept for one is too small */

	uint64			 id;		/* of this attempt's segment; 0 = none under way */
	EsJob			*job;		/* NULL = not posted, or finished */
	bool			 finished;	/* the file is complete, under its temporary name */
	bool			 published; /* ... under its own name */
	EsSegmentSummary summary;

	uint32		failures;
	int			sqlerrcode; /* of the last failure */
	char		error[256];
	TimestampTz retry_at;
	dlist_node	node; /* in the list of those given up */
} EsBuild;

/* memtable: the one that has the batches, NULL = staged ones.  Nothing is posted yet. */
extern EsBuild *es_build_create(EsJobKind kind, const EsTableKey *table, EsMemBatch **batches,
								uint32 nbatches, EsMemTable *memtable);
/* Bytes of shared memory that the job needs for this batch. */
extern Size es_build_needs(const EsMemBatch *b, EsJobKind kind);
/* If it is too large: leaves it the first half of its batches.  The other half, or NULL. */
extern EsBuild *es_build_split(EsBuild *build);
/* Has it more to do than one turn of the loop allows? */
extern bool es_build_hurries(const EsBuild *build);
/* Posts the job, looks after it, posts it again if it failed.  True when the file is there. */
extern bool es_build_tick(EsBuild *build);
/* Renames the file to seg.<id>.  False: it failed, and is built anew. */
extern bool es_build_publish(EsBuild *build);
/* What the manifest says of it. */
extern EsManifestSegment es_build_segment_entry(const EsBuild *build);
/* Done with it: its file is the manifest's. */
extern void es_build_free(EsBuild *build);
/* Given up: its file goes, as soon as no worker writes it. */
extern void es_build_give_up(EsBuild *build);
extern void es_builds_tick(void);

/* fsync of the shard's directory, without waiting: covers what was renamed before the call. */
extern uint64 es_dir_sync(void);
extern bool	  es_dir_synced(uint64 ticket);

/*
 * One manifest record of these modules at a time, so that each is made from what the
 * last one left.  es_edit_begin: NULL if another one is under way.  After
 * es_edit_submit the owner asks es_edit_done until it is true, and must then bring the
 * shard's memory up to it at once: that frees the gate.
 */
extern EsManifestEdit *es_edit_begin(void);
extern void			   es_edit_cancel(EsManifestEdit *edit);
extern uint64		   es_edit_submit(EsManifestEdit *edit);
extern bool			   es_edit_done(uint64 ticket);
/* ERROR for what es_manifest_edit_* said. */
extern void es_edit_check(EsStatus status);

/* ---- carry.c ---- */

/*
 * At a boundary: logs staged batches again whose frames lie before `ticket`, all of them if that is
 * little.  True if some were left whose frames lie before the boundary.
 */
extern bool es_carry_staged(uint64 ticket);

/* A transaction whose verdict is not known: its batches in mt go on to the active MemTable,
 * and into own WAL behind everything else. */
typedef struct EsCarried
{
	EsTxn	   *txn;
	EsMemBatch *batch;
	uint32		store;	/* number of its store in the MemTable */
	uint32		number; /* in the store */
} EsCarried;

extern void es_carry_finished(EsCarried *carried, uint32 n);

/* Staged batches of one transaction get frames that they do not have yet. */
extern void es_frame_staged(EsTxn *txn);

/* ---- spill.c ---- */

extern void es_spill_tick(void);
extern bool es_spill_idle(void);
extern long es_spill_timeout(void);
/* One whose file could not be written at the last attempt, or NULL. */
extern const EsBuild *es_spill_failed(void);
/* Was one given up whose manifest record is not taken back yet? */
extern bool es_spill_taking_back(void);

/* ---- adopt.c ---- */

/* At start, when the segments are loaded. */
extern void es_adopt_init(void);
/* The transaction has pending segments from now on. */
extern void es_adopt_register(EsTxn *txn);
extern void es_adopt_tick(void);
extern long es_adopt_timeout(void);
/*
 * May the FINISH frames of MemTables up to this id go from own WAL, as far as pending segments are
 * concerned?  Not while one of a committed transaction is not adopted.
 */
extern bool es_adopt_settled(uint64 memtable);
/* Logs FINISHes of undecided transactions again that came before MemTables up to this id turned
 * passive: those that es_carry_finished has not logged. */
extern void es_adopt_carry(uint64 memtable);
/* The same for one transaction, behind its batches. */
extern void es_adopt_carry_txn(EsTxn *txn);
/* Are all committed transactions that finished in MemTables up to this id adopted? */
extern bool es_adopt_committed(uint64 memtable);
/* Segments without a live row, in the manifest record of the flush that no replay goes behind. */
extern uint64 *es_adopt_drop_empty(EsManifestEdit *edit, uint64 memtable, uint32 *n);
/* Might a replay need this segment?  *memtable is to be flushed before it may go. */
extern bool es_adopt_needed(EsSegmentRef *ref, uint64 *memtable);
extern bool es_adopt_idle(void);

/* ---- finish_pending.c ---- */

/*
 * Computes base, dead rows and first versions of the transaction's pending segments, until
 * deadline (es_task_clock; 0 = none).  False: not yet, to be called again with the same FINISH.  The
 * last call for a FINISH is one without a deadline.
 */
extern bool es_finish_pending(EsTxn *txn, const EsSectionHeader *section, int64 deadline);
/* Has that begun for the transaction? */
extern bool es_finishing(const EsTxn *txn);

/* ---- drop.c ---- */

/* Was the storage dropped while this MemTable was there? */
extern bool es_storage_dropped(const EsTableKey *key);
extern void es_drop_tick(void);
/* MemTables up to this id are gone. */
extern void es_drop_retired(uint64 memtable);
extern void es_drop_conn_closed(EsConn *conn);

#endif /* ES_SHARD_FLUSH_H */
