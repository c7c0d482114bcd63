/*-------------------------------------------------------------------------
 *
 * recovery.c
 *	  What a shard does before it opens its queues; the same after a crash of the server
 *	  and after its own restart (PROTOCOL.md 7).
 *
 *	 1. Files: control block, manifest, segments.
 *	 2. Own WAL up to the durable end.  Batches are staged as they come; FINISHes are kept
 *		and applied after the last frame, in the order of their starts.  They have to wait
 *		because a batch that was carried over into a newer file may stand behind its FINISH,
 *		and because a verdict (RESOLVED) spares asking CLOG, which may have
 *		forgotten the transaction.  FINISHes that the manifest says are in segments are only
 *		remembered: their batches are dropped.  Own WAL is as large as a few MemTables, so
 *		all this is bounded.
 *		A FINISH of own WAL may list batches that were on their way to a segment and are in
 *		PostgreSQL's WAL only.  It and all later ones are left to 5, where they come again
 *		in their order.
 *	 3. A new file for own WAL, and the control block says "not clean".
 *	 4. MARK goes into PostgreSQL's WAL and is flushed; its end is E.  The shard's
 *		generation was advanced before: whoever logs a message behind MARK
 *		finds the new generation and sends it by a new queue, and what was logged before
 *		ends at or before E.
 *	 5. PostgreSQL's WAL from restart_lsn to E.  Messages whose start is known from 2 or
 *		from a pending segment are skipped; all others are applied as if they came
 *		by a queue, frames included.
 *	 6. The position counter.
 *
 * A message is known by its start.  Which starts are known matters only from restart_lsn
 * on, since nothing older is read.  A batch of a pending segment that was adopted is in no
 * list any more, but its transaction's FINISH is in own WAL, and batches of a
 * finished transaction are ignored.
 *
 * During 5 memory is bounded as in normal running: flushes and spills go on, and reading
 * waits for them.  restart_lsn stays where it is until the end, because a
 * message of several pieces may begin before what was read last.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/transam.h"
#include "access/xlog.h"
#include "utils/memutils.h"

#include "guc.h"
#include "ipc/fault.h"
#include "ipc/logmsg.h"
#include "ipc/position.h"
#include "shard/apply.h"
#include "shard/files.h"
#include "shard/log.h"
#include "shard/pgwal.h"
#include "shard/segments.h"
#include "shard/shard.h"

/* Messages between two looks at verdicts, log, flush. */
#define HOUSEKEEPING_MESSAGES 256
#define VERDICT_MESSAGES	  16384
/* More than were ever taken between an older copy of a shard's files and now. */
#define OLDER_POSITIONS (UINT64CONST(1) << 40)

EsLsn es_recovery_end = 0;

/* A FINISH of own WAL. */
typedef struct HeldFinish
{
	EsFxid			 fxid;
	EsLsn			 start;
	EsLsn			 end;
	EsSectionHeader *section;
	size_t			 len;
} HeldFinish;

typedef struct KnownStart
{
	EsLsn start;
	char  status;
} KnownStart;

#define SH_PREFIX		   known
#define SH_ELEMENT_TYPE	   KnownStart
#define SH_KEY_TYPE		   EsLsn
#define SH_KEY			   start
#define SH_HASH_KEY(tb, k) ((uint32) (((k) *UINT64CONST(0x9E3779B97F4A7C15)) >> 32))
#define SH_EQUAL(tb, a, b) ((a) == (b))
#define SH_SCOPE		   static inline
#define SH_DECLARE
#define SH_DEFINE
#include "lib/simplehash.h"

/* All of this lives in recovery_context and goes with it. */
static MemoryContext recovery_context;
static MemoryContext scratch_context; /* of one message; reset now and then */
static known_hash	*known;
static HeldFinish	*held;
static uint32		 nheld;
static uint32		 held_allocated;
static uint32		 held_done; /* applied */
static EsLsn		 restart_lsn;
static EsOwnLsn		 flushed_up_to;
static EsPosition	 reserved_below;
static uint64		 nmessages;

static void
remember(EsLsn start)
{
	bool found;

	if (start >= restart_lsn && start != 0)
		known_insert(known, start, &found);
}

/* ---- own WAL ---- */

static void
no_memory(void)
{
	ereport(
		ERROR,
		(errcode(ERRCODE_OUT_OF_MEMORY),
		 errmsg("shard %d has no shared memory for what its own write-ahead log holds", es_shard_id),
		 errdetail(
			 "With event_store.memtable_size and event_store.staging_size as they are, each shard, of %d, may need %zu MB.",
			 es_shared->nshards, es_guc_shard_memory()),
		 errhint("Give the server more shared memory (in a container /dev/shm).")));
}

static void
hold_finish(const EsFrameHeader *h, const void *payload)
{
	HeldFinish *f;

	if (nheld == held_allocated)
	{
		held_allocated = Max(1024, held_allocated * 2);
		if (held == NULL)
			held = MemoryContextAlloc(recovery_context, held_allocated * sizeof(HeldFinish));
		else
			held = repalloc_huge(held, (Size) held_allocated * sizeof(HeldFinish));
	}
	f = &held[nheld++];
	f->fxid = h->fxid;
	f->start = h->pg_start;
	f->end = h->pg_end;
	f->len = h->payload_len;
	f->section = MemoryContextAllocHuge(recovery_context, h->payload_len);
	memcpy(f->section, payload, h->payload_len);
}

/*
 * One frame.  While own WAL is read, EsTxn.finished means: its FINISH is in segments.
 */
static void
own_frame(const EsFrameHeader *h, const void *payload, EsOwnLsn end)
{
	MemoryContext	  old = MemoryContextSwitchTo(scratch_context);
	EsTxn			 *txn;
	const EsResolved *resolved;

	/*
	 * A verdict may stand in a file that is kept while the FINISH was let go of with an older one: then the
	 * transaction's segments are history, and count for all FINISHes that are replayed.
	 */
	if (h->type != ES_FRAME_FILE && h->type != ES_FRAME_RESOLVED)
		es_adopt_recall(es_txn_get(h->fxid));
	switch ((EsFrameType) h->type)
	{
		case ES_FRAME_FILE:
			break;

		case ES_FRAME_CARRY_BATCH:
			if (end > flushed_up_to)
				es_txn_get(h->fxid)->finished = false;
			/* FALLTHROUGH */
		case ES_FRAME_BATCH:
			remember(h->pg_start);
			if (!es_apply_batch(h->fxid, h->pg_start, h->pg_end, payload, h->payload_len, true))
				no_memory();
			break;

		case ES_FRAME_FINISH:
		case ES_FRAME_CARRY_FINISH:
			remember(h->pg_start);
			txn = es_txn_get(h->fxid);
			if (end > flushed_up_to)
			{
				txn->finished = false;
				hold_finish(h, payload);
			}
			else
			{
				txn->finished = true;
				es_apply_drop_staged(txn);
			}
			break;

		case ES_FRAME_RESOLVED:
			resolved = payload;
			txn = es_txn_get(h->fxid);
			es_txn_set_verdict(txn, resolved->committed != 0, resolved->commit_lsn);
			txn->resolved_logged = true;
			if (!resolved->committed)
				es_apply_drop_staged(txn);
			break;
	}
	if (++nmessages % HOUSEKEEPING_MESSAGES == 0)
	{
		es_shard_interrupts();
		MemoryContextReset(scratch_context);
	}
	MemoryContextSwitchTo(old);
}

/*
 * The verdict, before a FINISH is applied.  One that CLOG has forgotten is legal only if VACUUM did not have to
 * ask us, because the table is dropped; say so, in case that it is not.
 */
static EsVerdict
finish_verdict(EsTxn *txn, EsLsn start)
{
	EsVerdict verdict = es_txn_verdict(txn);

	if (txn->forgotten && !txn->finished)
		ereport(LOG, (errmsg("shard %d leaves out transaction %llu, which is older than the commit log",
							 es_shard_id, (unsigned long long) txn->fxid),
					  errdetail("Its FINISH is at %X/%X. The tables that it wrote to have been dropped.",
								LSN_FORMAT_ARGS(start))));
	return verdict;
}

static int
compare_held(const void *a, const void *b)
{
	EsLsn x = ((const HeldFinish *) a)->start;
	EsLsn y = ((const HeldFinish *) b)->start;

	return x < y ? -1 : x > y;
}

/*
 * Applies what own WAL holds, up to the first FINISH that lacks a batch.  With lossy (release_wal,
 * and PostgreSQL's WAL is gone) only those are left out, for good.
 */
static void
apply_held(bool lossy)
{
	MemoryContext old = MemoryContextSwitchTo(scratch_context);

	for (; held_done < nheld; held_done++)
	{
		HeldFinish *f = &held[held_done];
		EsTxn	   *txn;

		if (held_done % HOUSEKEEPING_MESSAGES == 0)
		{
			es_shard_interrupts();
			MemoryContextReset(scratch_context);
		}

		/* logged a second time by a flush: the first one did it */
		if (held_done > 0 && f->start == held[held_done - 1].start)
			continue;
		/* has come again from PostgreSQL's WAL */
		if (lossy && known_lookup(known, f->start) != NULL)
			continue;
		txn = es_txn_get(f->fxid);
		if (finish_verdict(txn, f->start) != ES_VERDICT_ABORTED && !txn->finished &&
			!es_finish_complete(txn, f->section, f->len))
		{
			if (!lossy)
				break;
			ereport(WARNING,
					(errcode(ERRCODE_DATA_CORRUPTED),
					 errmsg("shard %d gives up transaction %llu", es_shard_id, (unsigned long long) f->fxid),
					 errdetail("Its FINISH at %X/%X lists rows that are in no file any more.",
							   LSN_FORMAT_ARGS(f->start))));
			es_apply_drop_staged(txn);
			txn->finished = true;
			continue;
		}
		if (!es_apply_finish(f->fxid, f->start, f->end, f->section, f->len, true))
			no_memory();
	}
	MemoryContextSwitchTo(old);
}

/* For release_wal. */
static void
apply_what_is_there(void)
{
	es_versions_as_promised = true;
	apply_held(true);
	es_versions_as_promised = false;
}

static void
lacks_rows(const HeldFinish *f, const char *detail)
{
	ereport(
		ERROR,
		(errcode(ERRCODE_DATA_CORRUPTED),
		 errmsg("own write-ahead log of shard %d lacks rows of transaction %llu, whose FINISH is at %X/%X",
				es_shard_id, (unsigned long long) f->fxid, LSN_FORMAT_ARGS(f->start)),
		 errdetail_internal("%s", detail),
		 errhint(
			 "Restore a file-system snapshot. event_store.release_wal(%d) opens the shard without the events that are in no file any more.",
			 es_shard_id)));
}

static void
apply_own_wal(bool clean)
{
	qsort(held, nheld, sizeof(HeldFinish), compare_held);
	apply_held(false);

	if (clean && held_done < nheld && pg_atomic_read_u32(&es_shard->release_wal) == 0)
		lacks_rows(&held[held_done],
				   "The shard was stopped cleanly, so it should have everything in its own files.");

	/* the rest comes again from PostgreSQL's WAL: its starts lie behind that of a batch that does */
	for (uint32 i = held_done; i < nheld; i++)
		(void) known_delete(known, held[i].start);
	if (clean && held_done < nheld)
		apply_what_is_there();
}

/*
 * A flush says of all FINISH frames before its boundary that they are in segments or logged behind it, and those
 * that were left to PostgreSQL's WAL and have not come from there are neither: logs them again.  True: there are
 * some, and what is staged must follow.
 */
bool
es_recovery_carry(void)
{
	bool some = false;

	for (uint32 i = held_done; i < nheld; i++)
	{
		const HeldFinish *f = &held[i];
		EsTxn			 *txn = es_txn_find(f->fxid);

		if (txn == NULL || txn->finished || txn->verdict == ES_VERDICT_ABORTED ||
			(i > held_done && f->start == held[i - 1].start))
			continue;
		(void) es_log_append(ES_FRAME_CARRY_FINISH, f->fxid, f->start, f->end, f->section, (uint32) f->len);
		some = true;
	}
	return some;
}

/*
 * What was left to PostgreSQL's WAL has come from there?  A FINISH that has not is a commit that would be
 * lost without a word.
 */
static void
check_held(void)
{
	for (uint32 i = held_done; i < nheld; i++)
	{
		const HeldFinish *f = &held[i];

		if (known_lookup(known, f->start) == NULL &&
			es_txn_verdict(es_txn_get(f->fxid)) != ES_VERDICT_ABORTED)
			lacks_rows(f, "Its FINISH is older than what was read of PostgreSQL's WAL.");
	}
}

/* ---- PostgreSQL's WAL ---- */

static void
pg_message(void *arg, const EsMessageHeader *h, const void *payload, size_t len, EsLsn start, EsLsn end)
{
	MemoryContext		   old = MemoryContextSwitchTo(scratch_context);
	const EsSectionHeader *section;
	EsError				   err;

	switch ((EsMessageKind) h->kind)
	{
		case ES_MESSAGE_MARK:
			break;

		case ES_MESSAGE_RESERVE:
			if (len >= sizeof(EsReserve))
				reserved_below = Max(reserved_below, ((const EsReserve *) payload)->below);
			break;

		case ES_MESSAGE_BATCH:
			if (h->shard != es_shard_id || known_lookup(known, start) != NULL ||
				es_txn_verdict(es_txn_get(h->fxid)) == ES_VERDICT_ABORTED)
				break;
			while (!es_apply_batch(h->fxid, start, end, payload, len, false))
				es_worker_make_room();
			break;

		case ES_MESSAGE_FINISH:
			if (es_finish_check(payload, len, &err) != ES_OK)
				ereport(ERROR, (errcode(ERRCODE_DATA_CORRUPTED),
								errmsg("shard %d found a malformed FINISH at %X/%X of PostgreSQL's WAL",
									   es_shard_id, LSN_FORMAT_ARGS(start)),
								errdetail("%s.", err.what)));
			section = es_finish_section(payload, (uint16) es_shard_id);
			if (section == NULL || known_lookup(known, start) != NULL)
				break;
			finish_verdict(es_txn_get(h->fxid), start);
			remember(start);
			while (!es_apply_finish(h->fxid, start, end, section, section->len, false))
				es_worker_make_room();
			break;
	}

	nmessages++;
	if (nmessages % VERDICT_MESSAGES == 0)
		es_apply_poll_verdicts(true);
	if (nmessages % HOUSEKEEPING_MESSAGES == 0)
	{
		es_worker_housekeeping();
		if (es_worker_overloaded())
			es_worker_make_room();
		MemoryContextReset(scratch_context);
		ES_FAULT("recovery-reading");
	}
	MemoryContextSwitchTo(old);
}

/*
 * Reads PostgreSQL's WAL, or, if that is gone and somebody who may has said so, does
 * without it: then it returns false.
 */
static bool
read_available_pg_wal(void)
{
	MemoryContext caller = CurrentMemoryContext;
	volatile bool lost = false;

	PG_TRY();
	{
		es_pgwal_read((uint16) es_shard_id, restart_lsn, es_recovery_end, pg_message, NULL);
	}
	PG_CATCH();
	{
		ErrorData *error;

		if (geterrcode() == ERRCODE_DATA_CORRUPTED)
			PG_RE_THROW();
		MemoryContextSwitchTo(caller);
		error = CopyErrorData();
		FlushErrorState();
		ereport(
			WARNING,
			(errcode(ERRCODE_DATA_CORRUPTED),
			 errmsg("shard %d opens without PostgreSQL's WAL from %X/%X to %X/%X", es_shard_id,
					LSN_FORMAT_ARGS(restart_lsn), LSN_FORMAT_ARGS(es_recovery_end)),
			 errdetail(
				 "event_store.release_wal(%d) was called; events logged there and not durable in the shard's own files are lost. The reason was: %s",
				 es_shard_id, error->message)));
		FreeErrorData(error);
		lost = true;
	}
	PG_END_TRY();

	if (lost)
	{
		EsLsn  unframed = es_apply_oldest_unframed();
		uint64 syncs = es_log_syncs_begun() + 1;

		/* durable before anybody relies on it: a crash must not ask for that WAL again */
		es_log_give_up(unframed != 0 ? Min(unframed, es_recovery_end) : es_recovery_end);
		while (es_log_syncs_done() < syncs)
			es_worker_make_room();
	}
	return !lost;
}

/* released: WAL was given up at an earlier start, and own files have lived with that since. */
static void
read_pg_wal(bool released)
{
	if (pg_atomic_read_u32(&es_shard->release_wal) == 0)
		es_pgwal_read((uint16) es_shard_id, restart_lsn, es_recovery_end, pg_message, NULL);
	else
	{
		(void) read_available_pg_wal();
		released = true;
	}

	if (released)
		apply_what_is_there();
	else
		check_held();
}

/* ---- positions ---- */

static void
recover_positions(const EsControl *control, bool clean, bool older)
{
	EsPosition next = es_apply_highest_position + 1;

	/*
	 * While the server lives its counter does.  At its start the counter
	 * begins where nobody can have been: at the exact value that a clean stop
	 * has noted (the highest of all shards: one may have stopped after this one), or
	 * after a crash above everything that was reserved.
	 */
	if (pg_atomic_read_u64(&es_shared->position_counter) == 0)
	{
		next = Max(next, clean ? control->next_position : reserved_below);
		next = Max(next, pg_atomic_read_u64(&es_shared->position_start));
		/* nobody knows how many were taken since; storages made since have ids of the same counter */
		if (older && next < ES_MAX_POSITION - OLDER_POSITIONS)
			next += OLDER_POSITIONS;
	}
	es_positions_recovered(next, Max(reserved_below, next));
}

/* ---- all of it ---- */

void
es_recover(void)
{
	EsShardFiles  files;
	uint32		  state = 0;
	EsSegmentRef *ref;
	EsLsn		  mark_start;
	bool		  clean;

	recovery_context =
		AllocSetContextCreate(TopMemoryContext, "event_store recovery", ALLOCSET_DEFAULT_SIZES);
	scratch_context =
		AllocSetContextCreate(recovery_context, "event_store recovery of a message", ALLOCSET_DEFAULT_SIZES);

	/* 1 */
	es_files_open(es_shard_id, &files);
	clean = (files.control.flags & ES_CONTROL_CLEAN) != 0;
	restart_lsn = files.control.restart_lsn;
	flushed_up_to = files.manifest.flushed_up_to;
	reserved_below = files.control.reserved_below;
	known = known_create(recovery_context, 1024, NULL);
	es_segments_load(&files.manifest);
	while ((ref = es_segments_each(&state)) != NULL)
	{
		es_apply_highest_position = Max(es_apply_highest_position, ref->entry.segment.max_position);
		for (uint32 i = 0; i < ref->entry.nstarts; i++)
			remember(ref->entry.starts[i]);
	}
	es_manifest_state_slim(&files.manifest);
	es_flush_init();
	ES_FAULT("recovery-files-open");

	/* 2 */
	es_log_replay(&files, own_frame);
	apply_own_wal(clean);
	pg_atomic_write_u32(&es_shard->state, ES_SHARD_RECOVERING);
	ConditionVariableBroadcast(&es_shard->changed);
	ES_FAULT("recovery-own-wal-read");

	/* 3 */
	es_log_open(&files, pg_atomic_read_u32(&es_shard->generation));
	ES_FAULT("recovery-log-open");

	/* 4 */
	es_log_message(ES_MESSAGE_MARK, 0, ES_SHARD_NONE, NULL, 0, &mark_start, &es_recovery_end);
	XLogFlush(es_recovery_end);
	es_flushed_lsn_refresh();

	/* 5: a shard that stopped cleanly had everything in its own files */
	pg_atomic_write_u64(&es_shard->recovery_start, clean ? es_recovery_end : restart_lsn);
	pg_atomic_write_u64(&es_shard->recovery_at, clean ? es_recovery_end : restart_lsn);
	pg_atomic_write_u64(&es_shard->recovery_end, es_recovery_end);
	if (!clean)
	{
		read_pg_wal((files.control.flags & ES_CONTROL_RELEASED) != 0);
		/* what was read, which may be much, is held back until the next sync; a quiet shard would wait minutes */
		es_log_want_sync();
	}
	es_apply_poll_verdicts(true);
	ES_FAULT("recovery-pg-wal-read");

	/* 6 */
	recover_positions(&files.control, clean, files.older);
	ES_SET(last_position, es_apply_highest_position);

	ereport(
		LOG,
		(errmsg("event_store shard %d is open", es_shard_id),
		 errdetail(
			 "Own write-ahead log: %u of %u FINISH frames; PostgreSQL's WAL: %X/%X to %X/%X; rows in memory: %llu.",
			 held_done, nheld, LSN_FORMAT_ARGS(clean ? es_recovery_end : restart_lsn),
			 LSN_FORMAT_ARGS(es_recovery_end),
			 (unsigned long long) pg_atomic_read_u64(&es_shard->counters.memtable_rows))));

	es_adopt_recovered();
	MemoryContextDelete(recovery_context);
	known = NULL;
	held = NULL;
	nheld = held_done = held_allocated = 0;
}
