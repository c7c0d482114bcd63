/*-------------------------------------------------------------------------
 *
 * memtable.c
 *	  MemTables: the list of them, their stores by table, adding batches.
 *
 * A MemTable only grows until it turns passive (flush.c), then only shrinks as a
 * whole: when its rows are in segments it leaves the list, and when the last scan
 * that sees it lets go, its batches lose their reference and its memory context goes.
 *
 * The index from context to rows is filled lazily: a look-up first indexes the batches that came since the
 * last one.  So that no look-up stalls the loop, es_memtable_tick keeps the arrears of the active MemTable small, a
 * slice per turn.  What turns passive before its slice comes, as a bulk load does at once, is indexed only
 * if somebody asks.
 *
 * nbytes counts what a MemTable holds in all: arena, batch and transaction
 * structs, index; the flush decides by it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "core/route.h"
#include "shard/memindex.h"
#include "shard/memtable.h"
#include "shard/shard.h"

/* Rows of a store that may wait to be indexed, and that are indexed in one turn: some 0.3 ms of work. */
#define INDEX_ARREARS 4096

typedef struct StoreEntry
{
	EsTableKey	key;
	EsMemStore *store;
	char		status;
} StoreEntry;

static inline uint32
key_hash(EsTableKey key)
{
	return (uint32) (((key.storage_id ^ ((uint64) key.database << 32)) * UINT64CONST(0x9E3779B97F4A7C15)) >>
					 32);
}

#define SH_PREFIX		   stores
#define SH_ELEMENT_TYPE	   StoreEntry
#define SH_KEY_TYPE		   EsTableKey
#define SH_KEY			   key
#define SH_HASH_KEY(tb, k) key_hash(k)
#define SH_EQUAL(tb, a, b) es_table_key_equal(&(a), &(b))
#define SH_SCOPE		   static inline
#define SH_DECLARE
#define SH_DEFINE
#include "lib/simplehash.h"

struct EsMemStores
{
	stores_hash *hash;
	/* in the order of creation, for es_memtable_each */
	EsMemStore **array;
	uint32		 n;
	uint32		 allocated;
	EsMemStore	*last; /* of the last look-up */
};

/* What memtable.c keeps behind a store. */
typedef struct Store
{
	EsMemStore	store;
	uint32		nindexed;	 /* batches below this number are in the index */
	uint32		next_row;	 /* of the next batch: rows below it are, too */
	uint64		arrears;	 /* rows that are not */
	Size		index_bytes; /* as counted in the MemTable's nbytes */
	EsMemTable *memtable;
} Store;

EsMemTable *es_memtable_oldest = NULL;
EsMemTable *es_memtable_active = NULL;

static uint64 last_id = 0;
static bool	  active_arrears = false; /* some store of the active MemTable has INDEX_ARREARS */

/* MemTables that nobody sees any more, to be freed. */
static EsMemTable *dead = NULL;

EsMemTable *
es_memtable_create(void)
{
	MemoryContext context =
		AllocSetContextCreate(TopMemoryContext, "event_store MemTable", ALLOCSET_DEFAULT_SIZES);
	EsMemTable *mt = MemoryContextAllocZero(context, sizeof(EsMemTable));

	mt->context = context;
	mt->id = ++last_id;
	mt->refs = 1;
	mt->listed = true;
	mt->created = GetCurrentTimestamp();
	mt->stores = MemoryContextAllocZero(context, sizeof(struct EsMemStores));
	mt->stores->hash = stores_create(context, 16, NULL);

	if (es_memtable_active != NULL)
		es_memtable_active->next = mt;
	else
		es_memtable_oldest = mt;
	es_memtable_active = mt;
	active_arrears = false;
	return mt;
}

void
es_memtable_ref(EsMemTable *mt)
{
	mt->refs++;
}

void
es_memtable_unref(EsMemTable *mt)
{
	Assert(mt->refs > 0);
	if (--mt->refs > 0)
		return;
	Assert(!mt->listed);
	ES_COUNT(memtable_rows, -(int64) mt->nrows);
	ES_COUNT(memtable_bytes, -(int64) mt->nbytes);
	mt->next = dead;
	dead = mt;
}

bool
es_memtable_reap(uint32 max)
{
	while (dead != NULL)
	{
		EsMemTable *mt = dead;

		while (mt->stores->n > 0)
		{
			EsMemStore *store = mt->stores->array[mt->stores->n - 1];

			while (store->nbatches > 0)
			{
				if (max-- == 0)
					return true;
				es_membatch_unref(store->batches[--store->nbatches]);
			}
			mt->stores->n--;
		}
		dead = mt->next;
		MemoryContextDelete(mt->context);
	}
	return false;
}

void
es_memtable_retire(EsMemTable *mt)
{
	EsMemTable **link = &es_memtable_oldest;

	Assert(mt->listed && mt != es_memtable_active);
	while (*link != mt)
		link = &(*link)->next;
	*link = mt->next;
	mt->listed = false;
	es_memtable_unref(mt);
}

EsMemStore *
es_memtable_store(EsMemTable *mt, const EsTableKey *key, bool create)
{
	struct EsMemStores *stores = mt->stores;
	StoreEntry		   *e;
	Store			   *s;
	bool				found;

	if (stores->last != NULL && es_table_key_equal(&stores->last->key, key))
		return stores->last;
	e = stores_lookup(stores->hash, *key);
	if (e != NULL)
		return stores->last = e->store;
	if (!create)
		return NULL;

	if (stores->n == stores->allocated)
	{
		uint32 allocated = Max(16, stores->allocated * 2);

		if (stores->array == NULL)
			stores->array = MemoryContextAlloc(mt->context, allocated * sizeof(EsMemStore *));
		else
			stores->array = repalloc(stores->array, allocated * sizeof(EsMemStore *));
		stores->allocated = allocated;
	}
	s = MemoryContextAllocZero(mt->context, sizeof(Store));
	s->store.key = *key;
	s->memtable = mt;
	e = stores_insert(stores->hash, *key, &found);
	e->store = &s->store;
	stores->array[stores->n++] = &s->store;
	return stores->last = &s->store;
}

/* Indexes batches until there is none left or about max_rows rows were done.  After an ERROR it goes on with the same row. */
static void
index_catch_up(Store *s, uint64 max_rows)
{
	EsMemStore *store = &s->store;
	EsMemTable *mt = s->memtable;
	Size		bytes;

	if (store->index == NULL)
		store->index = es_memindex_create(mt->context);
	for (uint64 done = 0; s->nindexed < store->nbatches && done < max_rows;)
	{
		EsMemBatch *b = store->batches[s->nindexed];
		uint32		nrows = b->view.header->nrows;

		for (; s->next_row < nrows; s->next_row++)
			if (!es_membatch_skipped(b, s->next_row))
				es_memindex_add(store->index, es_batch_context_hash(&b->view, s->next_row), s->nindexed,
								s->next_row);
		s->next_row = 0;
		s->nindexed++;
		s->arrears -= nrows;
		done += nrows;
	}

	bytes = es_memindex_bytes(store->index);
	mt->nbytes += bytes - s->index_bytes;
	store->nbytes += bytes - s->index_bytes;
	ES_COUNT(memtable_bytes, (int64) bytes - (int64) s->index_bytes);
	s->index_bytes = bytes;
}

void
es_memtable_add(EsMemTable *mt, EsMemBatch *batch)
{
	const EsBatchHeader *header = batch->view.header;
	EsMemStore			*store = es_memtable_store(mt, &header->table, true);
	Store				*s = (Store *) store;
	/* the transaction's struct is counted once per batch: most have but one */
	Size bytes = batch->memory + sizeof(EsTxn) + sizeof(EsMemBatch *);

	if (store->nbatches == store->allocated)
	{
		uint32 allocated = Max(64, store->allocated * 2);

		if (store->batches == NULL)
			store->batches = MemoryContextAlloc(mt->context, allocated * sizeof(EsMemBatch *));
		else
			store->batches = repalloc_huge(store->batches, (Size) allocated * sizeof(EsMemBatch *));
		store->allocated = allocated;
	}
	store->roles = header->roles;
	store->relid = header->relid;
	es_membatch_ref(batch);
	store->batches[store->nbatches++] = batch;
	store->nrows += header->nrows;
	store->nbytes += bytes;
	mt->nrows += header->nrows;
	mt->nbytes += bytes;
	if (mt->first_row == 0)
		mt->first_row = GetCurrentTimestamp();
	ES_COUNT(memtable_rows, header->nrows);
	ES_COUNT(memtable_bytes, bytes);

	s->arrears += header->nrows;
	if (s->arrears >= INDEX_ARREARS)
		active_arrears = true;
}

bool
es_memtable_tick(void)
{
	struct EsMemStores *stores = es_memtable_active->stores;

	if (!active_arrears)
		return false;
	for (uint32 i = 0; i < stores->n; i++)
	{
		Store *s = (Store *) stores->array[i];

		if (s->arrears < INDEX_ARREARS)
			continue;
		index_catch_up(s, INDEX_ARREARS);
		return true;
	}
	active_arrears = false;
	return false;
}

EsMemStore *
es_memtable_each(EsMemTable *mt, uint32 *state)
{
	return *state < mt->stores->n ? mt->stores->array[(*state)++] : NULL;
}

bool
es_memstore_next(EsMemStore *store, uint64 hash, uint32 limit, uint64 *cursor, EsMemBatch **batch,
				 uint32 *batch_number, uint32 *row)
{
	Store *s = (Store *) store;

	if (*cursor == 0 && s->nindexed < Min(store->nbatches, limit))
		index_catch_up(s, PG_UINT64_MAX);
	if (store->index == NULL)
		return false;
	while (es_memindex_next(store->index, hash, cursor, batch_number, row))
	{
		if (*batch_number >= limit)
			return false;
		*batch = store->batches[*batch_number];
		return true;
	}
	return false;
}

bool
es_membatch_in_context(const EsMemBatch *b, uint32 row, const void *bytes, size_t len)
{
	int64		scratch;
	const void *own;
	size_t		own_len;

	return es_batch_context(&b->view, row, &scratch, &own, &own_len) && own_len == len &&
		   memcmp(own, bytes, len) == 0;
}
