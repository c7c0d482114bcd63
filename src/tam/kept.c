/*-------------------------------------------------------------------------
 *
 * kept.c
 *	  The backend's own copy of rows that AFTER ROW triggers and foreign keys come back for.
 *
 * Such triggers remember a row's TID and fetch it at the end of the statement, or of the
 * transaction if deferred.  The rows are in a shard by then, perhaps in a pending
 * segment, so the backend keeps a copy: minimal tuples one behind the other in a temporary file
 * (BufFile, which stays in memory while it is small), and their offsets by ordinal.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "executor/tuptable.h"
#include "storage/buffile.h"
#include "utils/memutils.h"
#include "utils/resowner.h"

#include "tam/xact.h"

/* Where a row is; ordinals grow, so the array is sorted. */
typedef struct KeptRow
{
	uint64 ordinal;
	uint32 len;
	int	   fileno;
	off_t  offset;
} KeptRow;

typedef struct EsKeptRows
{
	BufFile *file;
	KeptRow *rows;
	uint64	 nrows;
	uint64	 allocated;
	int		 end_fileno; /* where the next row goes */
	off_t	 end_offset;
	bool	 positioned; /* the file stands there */
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
		MemoryContext old = MemoryContextSwitchTo(es_xact->context);
		ResourceOwner owner = CurrentResourceOwner;

		/* the file must outlive a subtransaction */
		CurrentResourceOwner = TopTransactionResourceOwner;
		k = palloc0(sizeof(EsKeptRows));
		k->file = BufFileCreateTemp(false);
		k->positioned = true;
		k->allocated = 64;
		k->rows = palloc(sizeof(KeptRow) * k->allocated);
		CurrentResourceOwner = owner;
		MemoryContextSwitchTo(old);
		t->kept = k;
	}
	if (!k->positioned)
	{
		if (BufFileSeek(k->file, k->end_fileno, k->end_offset, SEEK_SET) != 0)
			ereport(ERROR, (errcode_for_file_access(),
							errmsg("could not seek in temporary file of event_store: %m")));
		k->positioned = true;
	}
	if (k->nrows == k->allocated)
	{
		k->allocated *= 2;
		k->rows = repalloc_huge(k->rows, sizeof(KeptRow) * k->allocated);
	}

	tuple = ExecFetchSlotMinimalTuple(slot, &free_tuple);
	row = &k->rows[k->nrows];
	row->ordinal = ordinal;
	row->len = tuple->t_len;
	row->fileno = k->end_fileno;
	row->offset = k->end_offset;
	BufFileWrite(k->file, (void *) tuple, tuple->t_len);
	BufFileTell(k->file, &k->end_fileno, &k->end_offset);
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

	k->positioned = false;
	if (BufFileSeek(k->file, row->fileno, row->offset, SEEK_SET) != 0)
		ereport(ERROR,
				(errcode_for_file_access(), errmsg("could not seek in temporary file of event_store: %m")));
	tuple = palloc(row->len);
	if (BufFileRead(k->file, tuple, row->len) != row->len)
		ereport(ERROR,
				(errcode_for_file_access(), errmsg("could not read temporary file of event_store: %m")));
	ExecForceStoreMinimalTuple(tuple, slot, true);
	slot->tts_tableOid = t->relid;
	es_tid_encode(&slot->tts_tid, ordinal, true);
	return true;
}

void
es_kept_free(EsXactTable *t)
{
	/* called by the transaction's callbacks, before its resource owner lets go of the file */
	if (t->kept != NULL)
		BufFileClose(t->kept->file);
	t->kept = NULL;
}
