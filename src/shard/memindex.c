/*-------------------------------------------------------------------------
 *
 * memindex.c
 *	  From context hash to the rows of one table in one MemTable.
 *
 * An open-addressing table with one entry per hash.  The entry holds the first
 * row itself, since most contexts have few rows in a MemTable; further rows lie in a
 * chain of chunks whose size doubles from 4 to 512 rows.  Nothing is ever
 * removed: the whole index goes with its MemTable's memory context.
 *
 * A cursor is 0 before the first row, 1 behind the first row, else the address of
 * a chunk with the number of the next row in it in the upper 16 bits (user-space
 * addresses have 47 bits).  Chunks never move, so a cursor stays good while rows are added.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "shard/memindex.h"

#define FIRST_CHUNK	  4
#define LARGEST_CHUNK 512

typedef struct IndexRow
{
	uint32 batch;
	uint32 row;
} IndexRow;

typedef struct IndexChunk
{
	struct IndexChunk *next;
	uint16			   nrows;
	uint16			   size;
	IndexRow		   rows[FLEXIBLE_ARRAY_MEMBER];
} IndexChunk;

typedef struct IndexEntry
{
	uint64		hash;
	IndexRow	first;
	IndexChunk *chunks;
	IndexChunk *last;
	char		status;
} IndexEntry;

/* Contexts of one shard share the upper bits of the hash, which choose the slot. */
#define SH_PREFIX			 memhash
#define SH_ELEMENT_TYPE		 IndexEntry
#define SH_KEY_TYPE			 uint64
#define SH_KEY				 hash
#define SH_HASH_KEY(tb, key) ((uint32) (key))
#define SH_EQUAL(tb, a, b)	 ((a) == (b))
#define SH_SCOPE			 static inline
#define SH_DECLARE
#define SH_DEFINE
#include "lib/simplehash.h"

struct EsMemIndex
{
	memhash_hash *table;
	MemoryContext context;
	Size		  chunk_bytes;
};

EsMemIndex *
es_memindex_create(MemoryContext context)
{
	EsMemIndex *index = MemoryContextAlloc(context, sizeof(EsMemIndex));

	index->table = memhash_create(context, 64, NULL);
	index->context = context;
	index->chunk_bytes = 0;
	return index;
}

void
es_memindex_add(EsMemIndex *index, uint64 hash, uint32 batch, uint32 row)
{
	bool		found;
	IndexEntry *e = memhash_insert(index->table, hash, &found);
	IndexChunk *chunk;

	if (!found)
	{
		e->first.batch = batch;
		e->first.row = row;
		e->chunks = e->last = NULL;
		return;
	}
	chunk = e->last;
	if (chunk == NULL || chunk->nrows == chunk->size)
	{
		int	 size = chunk == NULL ? FIRST_CHUNK : Min(chunk->size * 2, LARGEST_CHUNK);
		Size bytes = offsetof(IndexChunk, rows) + size * sizeof(IndexRow);

		chunk = MemoryContextAlloc(index->context, bytes);
		chunk->next = NULL;
		chunk->nrows = 0;
		chunk->size = size;
		index->chunk_bytes += bytes;
		if (e->last != NULL)
			e->last->next = chunk;
		else
			e->chunks = chunk;
		e->last = chunk;
	}
	chunk->rows[chunk->nrows].batch = batch;
	chunk->rows[chunk->nrows].row = row;
	chunk->nrows++;
}

bool
es_memindex_next(EsMemIndex *index, uint64 hash, uint64 *cursor, uint32 *batch, uint32 *row)
{
	IndexChunk *chunk;
	uint32		i;

	if (*cursor <= 1)
	{
		IndexEntry *e = memhash_lookup(index->table, hash);

		if (e == NULL)
			return false;
		if (*cursor == 0)
		{
			*batch = e->first.batch;
			*row = e->first.row;
			*cursor = 1;
			return true;
		}
		chunk = e->chunks;
		if (chunk == NULL)
			return false;
		i = 0;
	}
	else
	{
		chunk = (IndexChunk *) (uintptr_t) (*cursor & ((UINT64CONST(1) << 48) - 1));
		i = (uint32) (*cursor >> 48);
		if (i == chunk->nrows)
		{
			if (chunk->nrows < chunk->size || chunk->next == NULL)
				return false;
			chunk = chunk->next;
			i = 0;
		}
	}
	*batch = chunk->rows[i].batch;
	*row = chunk->rows[i].row;
	*cursor = ((uint64) (i + 1) << 48) | (uint64) (uintptr_t) chunk;
	return true;
}

Size
es_memindex_bytes(const EsMemIndex *index)
{
	return index->chunk_bytes + index->table->size * sizeof(IndexEntry);
}
