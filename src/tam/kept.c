/*-------------------------------------------------------------------------
 *
 * kept.c
 *	  The backend's own copy of rows that AFTER ROW triggers and foreign keys come back for.
 *
 * Such triggers remember a row's TID and fetch it at the end of the statement, or of the
 * transaction if deferred.  The rows are in a shard by then, perhaps in a pending
 * segment, so the backend keeps a copy: minimal tuples one behind the other in a spool,
 * and where they begin by ordinal.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "executor/tuptable.h"
#include "utils/memutils.h"

#include "tam/spool.h"
#include "tam/xact.h"

/* Where a row is; ordinals grow, so the array is sorted. */
typedef struct KeptRow
{
	uint64 ordinal;
	uint64 offset;
	uint32 len;
} KeptRow;

typedef struct EsKeptRows
{
	EsSpool *spool;
	KeptRow *rows;
	uint64	 nrows;
	uint64	 allocated;
} EsKeptRows;

void
es_kept_add(EsXactTable *t, uint64 ordinal, TupleTableSlot *slot)
{
	EsKeptRows	*k = t->kept;
	MinimalTuple tuple;
	bool		 free_tuple;
	KeptRow		*row;

	if (k == NULL)
	{
		k = MemoryContextAllocZero(es_xact->context, sizeof(EsKeptRows));
		k->spool = es_spool_create(es_xact->context);
		t->kept = k;
	}
	if (k->nrows == k->allocated)
	{
		uint64 allocated = Max(16, k->allocated * 2);

		k->rows = k->rows == NULL ? MemoryContextAlloc(es_xact->context, sizeof(KeptRow) * allocated)
								  : repalloc_huge(k->rows, sizeof(KeptRow) * allocated);
		k->allocated = allocated;
	}

	tuple = ExecFetchSlotMinimalTuple(slot, &free_tuple);
	row = &k->rows[k->nrows];
	row->ordinal = ordinal;
	row->len = tuple->t_len;
	row->offset = es_spool_add(k->spool, tuple, tuple->t_len);
	k->nrows++;
	if (free_tuple)
		heap_free_minimal_tuple(tuple);
}

bool
es_kept_fetch(EsXactTable *t, uint64 ordinal, TupleTableSlot *slot)
{
	EsKeptRows	*k = t->kept;
	uint64		 lo = 0;
	uint64		 hi = k ? k->nrows : 0;
	KeptRow		*row;
	MinimalTuple tuple;

	while (lo < hi)
	{
		uint64 mid = lo + (hi - lo) / 2;

		if (k->rows[mid].ordinal < ordinal)
			lo = mid + 1;
		else
			hi = mid;
	}
	if (k == NULL || lo >= k->nrows || k->rows[lo].ordinal != ordinal)
		return false;
	row = &k->rows[lo];

	tuple = palloc(row->len);
	es_spool_read(k->spool, row->offset, tuple, row->len);
	ExecForceStoreMinimalTuple(tuple, slot, true);
	slot->tts_tableOid = t->relid;
	es_tid_encode(&slot->tts_tid, ordinal, true);
	return true;
}

void
es_kept_free(EsXactTable *t)
{
	if (t->kept != NULL)
		es_spool_drop(t->kept->spool);
	t->kept = NULL;
}
