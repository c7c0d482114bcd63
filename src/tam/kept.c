/*-------------------------------------------------------------------------
 *
 * kept.c
 *	  The backend's own copy of rows that AFTER ROW triggers and foreign keys come back for.
 *
 * Such triggers remember a row's TID and fetch it at the end of the statement, or of the
 * transaction if deferred.  The rows are in a shard by then, perhaps in a pending
 * segment, so the backend keeps a copy: minimal tuples one behind the other in a spool,
 * and where they begin by ordinal.  They hold no pointers into TOAST tables: the row that a value was
 * taken from may be gone when a deferred trigger wants it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/detoast.h"
#include "access/htup_details.h"
#include "access/xact.h"
#include "executor/tuptable.h"
#include "utils/memutils.h"

#include "compat.h"
#include "tam/spool.h"
#include "tam/xact.h"

/* Where a row is; ordinals grow, so the array is sorted. */
typedef struct KeptRow
{
	uint64			 ordinal;
	uint64			 offset;
	uint32			 len;
	SubTransactionId subid;
} KeptRow;

typedef struct EsKeptRows
{
	EsSpool *spool;
	KeptRow *rows;
	uint64	 nrows;
	uint64	 allocated;
} EsKeptRows;

/* Values that lie elsewhere are fetched, as they are stored there.  NULL = the row has none. */
static MinimalTuple
without_pointers(TupleTableSlot *slot)
{
	TupleDesc	 desc = slot->tts_tupleDescriptor;
	Datum		*values = NULL;
	bool		*fetched = NULL;
	MinimalTuple tuple;

	slot_getallattrs(slot);
	for (int i = 0; i < desc->natts; i++)
	{
		struct varlena *value;

		if (slot->tts_isnull[i] || TupleDescAttr(desc, i)->attlen != -1)
			continue;
		value = (struct varlena *) DatumGetPointer(slot->tts_values[i]);
		if (!VARATT_IS_EXTERNAL(value))
			continue;
		if (values == NULL)
		{
			values = palloc(sizeof(Datum) * desc->natts);
			memcpy(values, slot->tts_values, sizeof(Datum) * desc->natts);
			fetched = palloc0(sizeof(bool) * desc->natts);
		}
		values[i] = PointerGetDatum(detoast_external_attr(value));
		fetched[i] = true;
	}
	if (values == NULL)
		return NULL;

	tuple = es_form_minimal_tuple(desc, values, slot->tts_isnull);
	for (int i = 0; i < desc->natts; i++)
		if (fetched[i])
			pfree(DatumGetPointer(values[i]));
	pfree(values);
	pfree(fetched);
	return tuple;
}

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

	tuple = without_pointers(slot);
	free_tuple = tuple != NULL;
	if (tuple == NULL)
		tuple = ExecFetchSlotMinimalTuple(slot, &free_tuple);
	row = &k->rows[k->nrows];
	row->ordinal = ordinal;
	row->len = tuple->t_len;
	row->subid = GetCurrentSubTransactionId();
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
es_kept_rollback(EsXactTable *t, SubTransactionId subid)
{
	EsKeptRows *k = t->kept;

	/* rows that came while the subtransaction was open are its own or its descendants', so they are the last ones */
	while (k != NULL && k->nrows > 0 && k->rows[k->nrows - 1].subid >= subid)
		es_spool_truncate(k->spool, k->rows[--k->nrows].offset);
}

void
es_kept_free(EsXactTable *t)
{
	if (t->kept != NULL)
		es_spool_drop(t->kept->spool);
	t->kept = NULL;
}
