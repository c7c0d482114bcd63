/*-------------------------------------------------------------------------
 *
 * finish.c
 *	  FINISH: a transaction's live batches get positions and versions and move to
 *	  the active MemTable.
 *
 * FINISH lists, per table, the live batches: those logged before by their starts, small
 * ones inline.  A shard never adopts short.  A listed batch is staged, or in a
 * pending segment of the transaction, or is read from PostgreSQL's WAL; if that has
 * forgotten it the shard stops with XX001.  Staged batches that are not listed belong to
 * rolled-back savepoints and are dropped.
 *
 * The work has two halves.  Everything that needs memory in the arena, which may be
 * short, comes first and can be undone; the caller then keeps the message and
 * tries again.  After that nothing fails but on damage, which stops the shard.
 *
 * Order of the log: batches that have no frame because their transaction was about to
 * spill (which the FINISH has overtaken) get one now if they are little, then comes the
 * FINISH frame.  If they are much, they stay without: the MemTable is flushed
 * at once, so that a bulk load is written only once, and restart_lsn waits for that.  So whoever
 * finds a FINISH in own WAL finds its batches before it, in a pending segment, or behind
 * restart_lsn in PostgreSQL's WAL (es_finish_complete tells recovery, which then takes
 * the FINISH from there, too).
 *
 * Versions follow the order of FINISHes (versions.c), which is that of the context
 * locks.  The caller applies what one drain has brought sorted by start.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xlog.h"
#include "utils/memutils.h"

#include "guc.h"
#include "ipc/fault.h"
#include "shard/apply.h"
#include "shard/arena.h"
#include "shard/log.h"
#include "shard/pgwal.h"
#include "shard/segments.h"
#include "shard/shard.h"

EsPosition es_apply_highest_position = 0;

/* The live batches of the FINISH at work, all tables one behind the other; reused. */
static EsLive *live;
static uint32  nlive;
static uint32  live_allocated;

static EsLive *
add_live(EsMemBatch *b)
{
	if (nlive == live_allocated)
	{
		live_allocated = Max(64, live_allocated * 2);
		if (live == NULL)
			live = MemoryContextAlloc(TopMemoryContext, live_allocated * sizeof(EsLive));
		else
			live = repalloc_huge(live, (Size) live_allocated * sizeof(EsLive));
	}
	live[nlive] = (EsLive){.batch = b};
	return &live[nlive++];
}

/* Lets go of what was prepared. */
static void
forget_live(void)
{
	for (uint32 i = 0; i < nlive; i++)
		es_membatch_unref(live[i].batch);
	nlive = 0;
}

/* Staged batches of the transaction in the order of their starts. */
static EsMemBatch **
staged_array(EsTxn *txn, uint32 *n)
{
	EsMemBatch **array;
	dlist_iter	 iter;
	uint32		 count = 0;

	dlist_foreach(iter, &txn->staged)
		count++;
	array = palloc(Max(count, 1) * sizeof(EsMemBatch *));
	count = 0;
	dlist_foreach(iter, &txn->staged)
		array[count++] = dlist_container(EsMemBatch, node, iter.cur);
	*n = count;
	return array;
}

static EsMemBatch *
find_staged(EsMemBatch **array, uint32 n, EsLsn start)
{
	uint32 low = 0, high = n;

	while (low < high)
	{
		uint32 middle = low + (high - low) / 2;

		if (array[middle]->start < start)
			low = middle + 1;
		else
			high = middle;
	}
	return low < n && array[low]->start == start ? array[low] : NULL;
}

/*
 * A listed batch that never came (its sender was cancelled between logging and
 * sending and sent it to a dead queue, say): it is in PostgreSQL's WAL.  False: no memory.
 */
static bool
fetch_missing(EsTxn *txn, EsLsn start, EsLsn finish_start)
{
	EsMessageHeader header;
	void		   *payload;
	size_t			len;
	bool			done;

	/* what is to be read must have left PostgreSQL's buffers */
	XLogFlush(finish_start);
	es_pgwal_read_one(start, finish_start, &header, &payload, &len);
	if (payload == NULL || header.kind != ES_MESSAGE_BATCH || header.fxid != txn->fxid ||
		header.shard != es_shard_id)
		ereport(
			ERROR,
			(errcode(ERRCODE_DATA_CORRUPTED),
			 errmsg("shard %d misses rows of transaction %llu", es_shard_id, (unsigned long long) txn->fxid),
			 errdetail("Its FINISH at %X/%X lists a batch at %X/%X, where PostgreSQL's WAL has none.",
					   LSN_FORMAT_ARGS(finish_start), LSN_FORMAT_ARGS(start))));
	done = es_apply_batch(txn->fxid, start, finish_start, payload, len, false);
	free(payload);
	return done;
}

static inline bool
bit_set(const uint8 *bitmap, uint64 i)
{
	return (bitmap[i >> 3] >> (i & 7)) & 1;
}

/* The part of the FINISH's bitmap that concerns rows [first, first + n); false: none of them. */
static bool
some_not_taken(const uint8 *not_taken, uint64 first, uint32 n)
{
	for (uint64 i = first; i < first + n; i++)
		if (bit_set(not_taken, i))
			return true;
	return false;
}

static void
copy_not_taken(uint8 *skip, const uint8 *not_taken, uint64 first, uint32 n)
{
	memset(skip, 0, MAXALIGN((n + 7) / 8));
	for (uint32 i = 0; i < n; i++)
		if (bit_set(not_taken, first + i))
			skip[i >> 3] |= 1 << (i & 7);
}

/* Does FINISH assign versions to this table's rows? */
static inline bool
wants_versions(const EsFinishTable *table, const EsBatchHeader *header)
{
	(void) table; /* given versions are kept there as well: some of its rows may come without */
	return header->roles.version != 0;
}

static inline dsa_pointer
in_arena(dsa_pointer piece, Size offset)
{
	return DsaPointerIsValid(piece) ? piece + offset : InvalidDsaPointer;
}

/*
 * A live batch that is staged: takes a reference and gets memory for versions and skip
 * bitmap.  first_row: its first row among the table's live rows.
 */
static bool
prepare_staged(EsMemBatch *b, const EsFinishTableView *view, uint64 first_row)
{
	uint32 nrows = b->view.header->nrows;
	Size   nversions = wants_versions(view->table, b->view.header) ? (Size) nrows * sizeof(int64) : 0;
	Size   nskip =
		  view->not_taken && some_not_taken(view->not_taken, first_row, nrows) ? MAXALIGN((nrows + 7) / 8) : 0;
	EsLive *l;
	char   *extra;

	es_membatch_ref(b);
	l = add_live(b);
	if (nversions + nskip == 0)
		return true;
	/* memory from an attempt that failed for a later batch is still there */
	if (b->extra_local == NULL)
		b->extra_local = es_arena_carve(ES_ARENA_FINISHED, nversions + nskip, &b->extra, &b->extra_chunk);
	extra = b->extra_local;
	if (extra == NULL)
		return false;
	if (nversions)
	{
		l->versions = (int64 *) extra;
		b->versions = in_arena(b->extra, 0);
		b->versions_local = l->versions;
	}
	if (nskip)
	{
		l->skip = (uint8 *) extra + nversions;
		copy_not_taken(l->skip, view->not_taken, first_row, nrows);
		b->skip = in_arena(b->extra, nversions);
		b->skip_local = l->skip;
	}
	return true;
}

/* A live inline batch: one piece of the arena for the rows, their versions, their bitmap. */
static bool
prepare_inline(EsTxn *txn, const EsBatchHeader *header, uint32 index, EsLsn start, EsLsn end,
			   const EsFinishTableView *view, uint64 first_row)
{
	uint32 nrows = header->nrows;
	Size   nbatch = header->total_len;
	Size   nversions = wants_versions(view->table, header) ? (Size) nrows * sizeof(int64) : 0;
	Size   nskip =
		  view->not_taken && some_not_taken(view->not_taken, first_row, nrows) ? MAXALIGN((nrows + 7) / 8) : 0;
	Size				 size = nbatch + nversions + nskip;
	struct EsArenaChunk *chunk;
	dsa_pointer			 pointer;
	EsMemBatch			*b;
	EsLive				*l;
	char				*local;

	local = es_arena_carve(ES_ARENA_FINISHED, size, &pointer, &chunk);
	if (local == NULL)
		return false;
	memcpy(local, header, nbatch);
	b = es_membatch_create(txn, start, end, local, pointer, chunk, size);
	b->inline_index = index + 1;
	l = add_live(b);
	if (nversions)
	{
		l->versions = (int64 *) (local + nbatch);
		b->versions = in_arena(pointer, nbatch);
		b->versions_local = l->versions;
	}
	if (nskip)
	{
		l->skip = (uint8 *) (local + nbatch + nversions);
		copy_not_taken(l->skip, view->not_taken, first_row, nrows);
		b->skip = in_arena(pointer, nbatch + nversions);
		b->skip_local = l->skip;
	}
	return true;
}

/*
 * Collects a table's live batches, with all memory they need.  Rows in pending segments come first in the
 * order of ordinals (a spill takes all that is staged), so the table's count of rows tells
 * with which row the batches in memory begin.
 */
static bool
prepare_table(EsTxn *txn, const EsFinishTable *table, EsLsn start, EsLsn end)
{
	EsFinishTableView view;
	EsMemBatch		**listed = NULL;
	uint32			  nlisted = 0;
	uint64			  nrows = 0;
	const char		 *at;

	es_finish_table_view(table, &view);

	if (table->nlogged > 0)
	{
		uint32		 nstaged;
		EsMemBatch **staged = staged_array(txn, &nstaged);

		listed = palloc(table->nlogged * sizeof(EsMemBatch *));
		for (uint32 i = 0; i < table->nlogged; i++)
		{
			EsLsn		wanted = view.batch_starts[i];
			EsMemBatch *b = find_staged(staged, nstaged, wanted);

			if (b == NULL && txn->pending != NIL && es_txn_pending_find(txn, wanted))
				continue;
			if (b == NULL)
			{
				if (!fetch_missing(txn, wanted, start))
				{
					pfree(staged);
					pfree(listed);
					return false;
				}
				pfree(staged);
				staged = staged_array(txn, &nstaged);
				b = find_staged(staged, nstaged, wanted);
				Assert(b != NULL);
			}
			listed[nlisted++] = b;
			nrows += b->view.header->nrows;
		}
		pfree(staged);
	}

	at = view.inline_batches;
	for (uint32 i = 0; i < table->ninline; i++)
	{
		const EsBatchHeader *header = (const EsBatchHeader *) at;

		nrows += header->nrows;
		at += header->total_len;
	}
	if (nrows > table->nrows || (nrows < table->nrows && txn->pending == NIL))
		ereport(
			ERROR,
			(errcode(ERRCODE_DATA_CORRUPTED),
			 errmsg("shard %d has not as many rows of transaction %llu as its FINISH counts", es_shard_id,
					(unsigned long long) txn->fxid),
			 errdetail(
				 "Found: %llu, counted: %llu. FINISH at %X/%X of PostgreSQL's WAL, storage %llu of database %u.",
				 (unsigned long long) nrows, (unsigned long long) table->nrows, LSN_FORMAT_ARGS(start),
				 (unsigned long long) table->table.storage_id, table->table.database)));

	/* rows in pending segments come first */
	nrows = table->nrows - nrows;
	for (uint32 i = 0; i < nlisted; i++)
	{
		if (!prepare_staged(listed[i], &view, nrows))
		{
			pfree(listed);
			return false;
		}
		nrows += listed[i]->view.header->nrows;
	}
	if (listed != NULL)
		pfree(listed);
	at = view.inline_batches;
	for (uint32 i = 0; i < table->ninline; i++)
	{
		const EsBatchHeader *header = (const EsBatchHeader *) at;

		if (!prepare_inline(txn, header, i, start, end, &view, nrows))
			return false;
		nrows += header->nrows;
		at += header->total_len;
	}
	return true;
}

/* Highest position of a finished batch. */
static EsPosition
last_position(const EsMemBatch *b)
{
	uint32	   nrows = b->view.header->nrows;
	EsPosition last = 0;

	if (!(b->finish_flags & ES_FINISH_GIVEN_POSITIONS))
		return es_membatch_position(b, nrows - 1);
	for (uint32 row = 0; row < nrows; row++)
		last = Max(last, es_membatch_position(b, row));
	return last;
}

/* A table's batches, live[first .. first + n), become rows of the active MemTable. */
static void
adopt_table(EsTxn *txn, const EsFinishTable *table, EsPosition base, EsLive *first, uint32 n)
{
	EsFinishTableView view;

	es_finish_table_view(table, &view);
	for (uint32 i = 0; i < n; i++)
	{
		EsMemBatch *b = first[i].batch;

		b->base = base;
		b->finish_flags = table->flags;
	}
	if (n > 0 && first[0].batch->view.header->roles.version != 0)
		es_assign_versions(txn, &view, first, n);

	for (uint32 i = 0; i < n; i++)
	{
		EsMemBatch *b = first[i].batch;

		if (b->in_staging)
		{
			es_txn_unstage(b);
			if (b->extra_local != NULL)
				b->memory += b->view.header->nrows * sizeof(int64);
		}
		else
		{
			ES_COUNT(rows, b->view.header->nrows);
			b->ticket = txn->finish_ticket;
		}
		if (b->view.header->nrows > 0)
			es_apply_highest_position = Max(es_apply_highest_position, last_position(b));
		es_memtable_add(es_memtable_active, b);
		if (es_wait_count > 0)
			es_wait_batch(b);
	}
	if (view.not_taken != NULL)
	{
		uint64 skipped = 0;

		for (uint64 i = 0; i < table->nrows; i++)
			skipped += bit_set(view.not_taken, i);
		ES_COUNT(duplicates, skipped);
	}
}

/* Live batches that were to spill get frames after all. */
static void
frame_live(void)
{
	for (uint32 i = 0; i < nlive; i++)
	{
		EsMemBatch *b = live[i].batch;

		if (!b->unframed)
			continue;
		b->unframed = false;
		dlist_delete(&b->unframed_node);
		b->ticket = es_log_append(ES_FRAME_BATCH, b->txn->fxid, b->start, b->end, b->view.base,
								  b->view.header->total_len);
	}
}

bool
es_finish_complete(EsTxn *txn, const EsSectionHeader *section, size_t len)
{
	uint32				 nstaged;
	EsMemBatch		   **staged;
	const EsFinishTable *table;
	bool				 complete = true;
	EsError				 err;

	if (es_section_check(section, len, &err) != ES_OK)
		return true; /* es_apply_finish says so */
	staged = staged_array(txn, &nstaged);
	for (table = es_section_first(section); table != NULL && complete;
		 table = es_section_next(section, table))
	{
		EsFinishTableView view;

		es_finish_table_view(table, &view);
		for (uint32 i = 0; i < table->nlogged && complete; i++)
			complete = find_staged(staged, nstaged, view.batch_starts[i]) != NULL ||
					   (txn->pending != NIL && es_txn_pending_find(txn, view.batch_starts[i]));
	}
	pfree(staged);
	return complete;
}

bool
es_apply_finish(EsFxid fxid, EsLsn start, EsLsn end, const EsSectionHeader *section, size_t len,
				bool from_own_wal)
{
	EsTxn				*txn = es_txn_get(fxid);
	const EsFinishTable *table;
	uint32				*ntable_batches;
	uint32				 counts[16];
	Size				 unframed = 0;
	uint32				 i;
	uint32				 done;
	EsError				 err;

	es_apply_highest_end = Max(es_apply_highest_end, end);
	if (txn->finished)
		return true;

	if (es_section_check(section, len, &err) != ES_OK || section->shard != es_shard_id)
		ereport(ERROR, (errcode(ERRCODE_DATA_CORRUPTED),
						errmsg("shard %d got a malformed FINISH of transaction %llu", es_shard_id,
							   (unsigned long long) fxid),
						errdetail("Message at %X/%X of PostgreSQL's WAL: %s.", LSN_FORMAT_ARGS(start),
								  section->shard == es_shard_id ? err.what : "of another shard")));

	if (section->npositions > 0)
		es_apply_highest_position = Max(es_apply_highest_position, section->base + section->npositions - 1);

	/* Only recovery knows so early: nothing of it is needed, not even a frame. */
	if (txn->verdict == ES_VERDICT_ABORTED)
	{
		es_apply_drop_staged(txn);
		txn->finished = true;
		return true;
	}

	/* What takes long, in slices; in recovery nobody waits. */
	if (txn->pending != NIL && !from_own_wal && !es_flush_finish_slice(txn, section))
		return false;

	/* First half: memory. */
	ntable_batches =
		section->ntables <= lengthof(counts) ? counts : palloc(section->ntables * sizeof(uint32));
	nlive = 0;
	for (table = es_section_first(section), i = 0; table != NULL;
		 table = es_section_next(section, table), i++)
	{
		uint32 before = nlive;

		if (!prepare_table(txn, table, start, end))
		{
			forget_live();
			if (ntable_batches != counts)
				pfree(ntable_batches);
			return false;
		}
		ntable_batches[i] = nlive - before;
	}

	/* Second half. */
	for (i = 0; i < nlive; i++)
		if (live[i].batch->unframed)
			unframed += live[i].batch->view.header->total_len;
	if (unframed > 0 && unframed <= (Size) es_guc_spill_after * 1024 / 2)
	{
		frame_live();
		unframed = 0;
	}
	ES_FAULT("finish-before-frame");
	if (!from_own_wal)
	{
		txn->finish_ticket = es_log_append(ES_FRAME_FINISH, fxid, start, end, section, section->len);
		/* recovery may have read one, in a file that goes before this one's */
		txn->resolved_logged = false;
	}
	txn->base = section->base;
	txn->finish_start = start;
	txn->finish_end = end;

	/* Earlier rows first, since versions are given in the order of ordinals. */
	if (txn->pending != NIL)
		es_flush_finish_pending(txn, section);
	done = 0;
	for (table = es_section_first(section), i = 0; table != NULL;
		 table = es_section_next(section, table), i++)
	{
		adopt_table(txn, table, section->base, live + done, ntable_batches[i]);
		done += ntable_batches[i];
	}
	txn->finished = true;
	es_txn_pending_forget();
	es_apply_drop_staged(txn);
	if (txn->pending != NIL && es_wait_count > 0)
		es_wait_pending(txn);
	forget_live();
	if (unframed > 0)
		es_flush_soon();
	if (ntable_batches != counts)
		pfree(ntable_batches);

	ES_SET(last_position, es_apply_highest_position);
	ES_FAULT("finish-applied");
	return true;
}
