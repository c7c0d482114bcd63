/*-------------------------------------------------------------------------
 *
 * carry.c
 *	  Logs again what a flush may not write to segments yet, so that the files before
 *	  its boundary can go (PROTOCOL.md 5.4).
 *
 * Two kinds of batches outlive a MemTable's flush.
 *
 * Staged ones, whose transaction has not finished.  They are logged again (CARRY_BATCH)
 * at the moment of the boundary, at once with it, because a FINISH that comes a
 * moment later must find them before it in the log.  Not all of them: one whose frame
 * is younger than the boundary before this one may wait for the next boundary,
 * if own WAL is only released up to the boundary before this one.  So what
 * stays staged for long is logged once per flush, and a transaction that happens to be
 * under way at a boundary costs nothing.
 *
 * Finished ones, whose verdict is not known.  Their batches go on to the active MemTable
 * as clones (memory is shared), and to the log as one unit: CARRY_BATCH for each
 * batch that was logged by itself, then CARRY_FINISH, a section made from what is
 * in memory: base, live batches, inline batches, rows not taken.  Versions are not in it. Who
 * replays it computes them again and gets the same: the transaction is undecided, so
 * it holds the locks of its contexts, and nobody can have written to them
 * since its FINISH.
 *
 * A frame keeps start and end of the message in PostgreSQL's WAL, by which a batch is known;
 * for an inline one that is the FINISH's start.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "guc.h"
#include "ipc/fault.h"
#include "shard/engine.h"
#include "shard/flush.h"
#include "shard/log.h"
#include "shard/shard.h"

/* Staged bytes that are worth carrying at once, as a fraction of the MemTable's size. */
#define LITTLE_STAGED 16

/* Batches of a transaction that is to spill have none: PostgreSQL's WAL keeps them. */
static inline bool
has_frame(const EsMemBatch *b)
{
	return !b->unframed;
}

static void
log_batch(EsFrameType type, EsMemBatch *b)
{
	b->ticket =
		es_log_append(type, b->txn->fxid, b->start, b->end, b->view.header, b->view.header->total_len);
}

/* ---- staged batches ---- */

bool
es_carry_staged(uint64 ticket)
{
	uint64	   last = es_log_last_ticket();
	Size	   bytes = 0;
	bool	   all;
	bool	   left = false;
	dlist_iter txns;
	dlist_iter iter;

	dlist_foreach(txns, &es_txn_undecided)
	{
		EsTxn *txn = dlist_container(EsTxn, node, txns.cur);

		dlist_foreach(iter, &txn->staged)
		{
			EsMemBatch *b = dlist_container(EsMemBatch, node, iter.cur);

			if (has_frame(b))
				bytes += b->view.header->total_len;
		}
	}
	all = bytes <= (Size) es_guc_memtable_size * 1024 / LITTLE_STAGED;

	dlist_foreach(txns, &es_txn_undecided)
	{
		EsTxn *txn = dlist_container(EsTxn, node, txns.cur);

		if (txn->verdict == ES_VERDICT_ABORTED)
			continue;
		dlist_foreach(iter, &txn->staged)
		{
			EsMemBatch *b = dlist_container(EsMemBatch, node, iter.cur);

			if (!has_frame(b) || b->ticket > last)
				continue;
			if (all || b->ticket <= ticket)
				log_batch(ES_FRAME_CARRY_BATCH, b);
			else
				left = true;
		}
	}
	ES_FAULT("flush-staged-carried");
	return left;
}

void
es_frame_staged(EsTxn *txn)
{
	dlist_iter iter;

	dlist_foreach(iter, &txn->staged)
	{
		EsMemBatch *b = dlist_container(EsMemBatch, node, iter.cur);

		if (has_frame(b))
			continue;
		log_batch(ES_FRAME_BATCH, b);
		b->unframed = false;
		dlist_delete(&b->unframed_node);
	}
}

/* ---- finished batches ---- */

static int
compare_carried(const void *x, const void *y)
{
	const EsCarried *a = x;
	const EsCarried *b = y;

	if (a->txn->fxid != b->txn->fxid)
		return a->txn->fxid < b->txn->fxid ? -1 : 1;
	if (a->store != b->store)
		return a->store < b->store ? -1 : 1;
	return a->number < b->number ? -1 : 1;
}

/* The batch's memory under a second struct, so that each of the two MemTables has a moved_to of its own. */
static EsMemBatch *
clone_batch(EsMemBatch *b)
{
	EsMemBatch *clone = MemoryContextAlloc(TopMemoryContext, sizeof(EsMemBatch));

	*clone = *b;
	clone->refs = 1;
	clone->moved_to = 0;
	clone->in_staging = false;
	clone->unframed = false;
	clone->origin = b;
	es_membatch_ref(b);
	es_txn_ref(clone->txn);
	return clone;
}

static void
finish_check(EsStatus status)
{
	if (status == ES_OK)
		return;
	ereport(ERROR, (errcode(status == ES_ERR_NOMEM ? ERRCODE_OUT_OF_MEMORY : ERRCODE_PROGRAM_LIMIT_EXCEEDED),
					errmsg("shard %d could not carry a transaction over to its next log file", es_shard_id)));
}

/* Adds the table of batches [from, to) of one transaction. */
static void
add_table(EsFinishBuilder *f, const EsCarried *c, uint32 n)
{
	const EsBatchHeader *h = c[0].batch->view.header;
	EsLsn				*starts = palloc(sizeof(EsLsn) * n);
	EsPart				*inlines = palloc(sizeof(EsPart) * n);
	uint8				*not_taken = NULL;
	uint32				 nlogged = 0;
	uint32				 ninline = 0;
	uint64				 nrows = 0;

	for (uint32 i = 0; i < n; i++)
		nrows += c[i].batch->view.header->nrows;
	for (uint32 i = 0; i < n; i++)
		if (c[i].batch->skip_local != NULL && not_taken == NULL)
			not_taken = palloc0((nrows + 63) / 64 * 8);

	nrows = 0;
	for (uint32 i = 0; i < n; i++)
	{
		EsMemBatch *b = c[i].batch;

		if (b->inline_index == 0)
			starts[nlogged++] = b->start;
		else
			inlines[ninline++] = (EsPart){b->view.header, b->view.header->total_len};
		for (uint32 row = 0; row < b->view.header->nrows; row++, nrows++)
			if (es_membatch_skipped(b, row))
				not_taken[nrows >> 3] |= 1 << (nrows & 7);
	}
	finish_check(es_finish_add_table(f, &h->table, h->relid,
									 (c[0].batch->finish_flags & ~ES_FINISH_NOT_TAKEN) |
										 (not_taken ? ES_FINISH_NOT_TAKEN : 0),
									 nrows, starts, nlogged, inlines, ninline, not_taken, NULL, 0));
	pfree(starts);
	pfree(inlines);
	if (not_taken)
		pfree(not_taken);
}

/* All batches of one transaction. */
static void
carry_transaction(EsFinishBuilder *f, const EsCarried *c, uint32 n)
{
	EsTxn				  *txn = c[0].txn;
	EsPosition			   last = txn->base;
	const void			  *payload;
	const EsSectionHeader *section;
	size_t				   len;

	for (uint32 i = 0; i < n; i++)
	{
		const EsBatchView *v = &c[i].batch->view;

		if (c[i].batch->inline_index == 0)
			log_batch(ES_FRAME_CARRY_BATCH, c[i].batch);
		last = Max(last, txn->base + es_batch_ordinal(v, v->header->nrows - 1));
	}

	/* the section as it came names the batches of the pending segments, and these */
	if (txn->pending != NIL)
	{
		es_adopt_carry_txn(txn);
		return;
	}

	es_finish_reset(f, txn->base, last + 1 - txn->base);
	finish_check(es_finish_begin_section(f, es_shard_id));
	for (uint32 i = 0, j; i < n; i = j)
	{
		for (j = i + 1; j < n && c[j].store == c[i].store; j++)
			;
		add_table(f, c + i, j - i);
	}
	finish_check(es_finish_end(f, &payload, &len));
	section = es_finish_section(payload, es_shard_id);
	txn->finish_ticket = es_log_append(ES_FRAME_CARRY_FINISH, txn->fxid, txn->finish_start, txn->finish_end,
									   section, section->len);
}

void
es_carry_finished(EsCarried *carried, uint32 n)
{
	EsFinishBuilder *f;

	if (n == 0)
		return;
	f = es_finish_create();
	if (f == NULL)
		finish_check(ES_ERR_NOMEM);
	qsort(carried, n, sizeof(EsCarried), compare_carried);
	for (uint32 i = 0, j; i < n; i = j)
	{
		for (j = i + 1; j < n && carried[j].txn == carried[i].txn; j++)
			;
		carry_transaction(f, carried + i, j - i);
	}
	es_finish_free(f);

	/* Readers that begin from here on find them in the active MemTable only. */
	for (uint32 i = 0; i < n; i++)
	{
		EsMemBatch *clone = clone_batch(carried[i].batch);

		es_memtable_add(es_memtable_active, clone);
		carried[i].batch->moved_to = es_memtable_active->id;
		es_membatch_unref(clone);
	}
	ES_FAULT("flush-finished-carried");
}
