/*-------------------------------------------------------------------------
 *
 * memtable.h
 *	  MemTables: batches of finished transactions by table, with a hash from
 *	  context to rows.  One is active; passive ones are being written to segments.
 *
 * Rows of undecided and aborted transactions are in it too: readers ask the
 * batch's transaction.  When a MemTable turns passive, the batches that may not go
 * into a segment yet (undecided, or commit record not flushed) are added to the
 * active one as well, a moment later and all at once, and get moved_to = its id: a reader who begins
 * after that leaves them out of the older one.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_MEMTABLE_H
#define ES_SHARD_MEMTABLE_H

#include "postgres.h"

#include "datatype/timestamp.h"

#include "core/format.h"
#include "shard/txn.h"

/* A table's rows in one MemTable. */
typedef struct EsMemStore
{
	EsTableKey		   key; /* hash key */
	EsRoles			   roles;
	uint32			   relid;
	EsMemBatch		 **batches; /* in the order of adoption; grows */
	uint32			   nbatches;
	uint32			   allocated;
	uint64			   nrows;
	Size			   nbytes;
	struct EsMemIndex *index; /* context hash -> rows */
	struct EsMemOrder *order; /* of batches by position; private to scan_mem.c, lies in the
								 * MemTable's context */
} EsMemStore;

typedef struct EsMemTable
{
	uint64				id;		 /* 1, 2, 3 … in this process */
	int					refs;	 /* the shard's list, scans */
	struct EsMemStores *stores;	 /* hash: EsTableKey -> EsMemStore */
	MemoryContext		context; /* index, arrays */
	Size				nbytes;
	uint64				nrows;
	TimestampTz			created;
	TimestampTz			first_row; /* when its first row came, 0 = none */
	bool				passive;
	bool				carried; /* batches that may not go into a segment were added to a newer one:
								 * their moved_to is set */
	bool				listed;	 /* in the list, which holds one ref */
	struct EsMemTable  *next;	 /* newer one */
} EsMemTable;

extern EsMemTable *es_memtable_oldest; /* list, oldest first; the last one is active */
extern EsMemTable *es_memtable_active;

extern EsMemTable *es_memtable_create(void);
extern void		   es_memtable_ref(EsMemTable *mt);
extern void		   es_memtable_unref(EsMemTable *mt);
/* Frees MemTables without references, up to so many of their batches (there may be very many, and none of
 * this is urgent); true if some are left. */
extern bool es_memtable_reap(uint32 max);
/* Takes a passive MemTable whose rows are in segments out of the list. */
extern void es_memtable_retire(EsMemTable *mt);

extern EsMemStore *es_memtable_store(EsMemTable *mt, const EsTableKey *key, bool create);
extern void		   es_memtable_add(EsMemTable *mt, EsMemBatch *batch);

/* A slice of index work on the active MemTable; true if there is more.  The loop calls it. */
extern bool es_memtable_tick(void);

/* Iterates over a MemTable's stores: start with *state = 0; NULL at the end. */
extern EsMemStore *es_memtable_each(EsMemTable *mt, uint32 *state);

/*
 * Rows of a context hash in the order of adoption: *cursor = 0 to begin; false at the end.
 * Only batches with number < limit (EsMemStore.nbatches when the reader began; UINT32_MAX =
 * all).  Callers compare the context's bytes.
 */
extern bool es_memstore_next(EsMemStore *store, uint64 hash, uint32 limit, uint64 *cursor, EsMemBatch **batch,
							 uint32 *batch_number, uint32 *row);

/* Does batch row `row` belong to the context with these bytes? */
extern bool es_membatch_in_context(const EsMemBatch *b, uint32 row, const void *bytes, size_t len);

#endif /* ES_SHARD_MEMTABLE_H */
