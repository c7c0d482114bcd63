/*-------------------------------------------------------------------------
 *
 * event_filter.c
 *	  Which event ids a busy context certainly does not have.
 *
 * An event id is looked for among the rows of its context, and almost always it is new.
 * In a context with very many events that look would be long, for nothing.  So once such a
 * context was walked a Bloom filter of its ids is kept: if it says no, the id is new; if it says
 * maybe, which a new id is in less than one of a thousand cases, the rows are walked.
 *
 * The filter is of all ids that any row of the context ever had here, whatever became of
 * their transactions: a superset can only cost a walk.  It is brought up to
 * date before each use: rows that came into MemTables since are found by the
 * index's cursor, one per MemTable; rows that moved from a MemTable to a segment before
 * they were seen are found because each segment has a number that grows as
 * segments become live, and the range of the context is read in those above the last number
 * seen.  When it has taken twice the ids it was made for, it is made anew.
 *
 * Filters of all contexts take at most an eighth of cache_size; least recently used first out.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "core/filter.h"
#include "guc.h"
#include "shard/heads.h"

#define MAX_MEMTABLES 16
#define FIRST_IDS	  4096
#define BITS_PER_ID	  16

typedef struct Cursor
{
	uint64 memtable;
	uint64 at; /* of its index */
} Cursor;

typedef struct Filter
{
	struct Filter *chain;
	dlist_node	   lru;
	EsTableKey	   table;
	uint64		   hash;
	uint32		   len;
	uint64		   segments_seen; /* EsSegmentRef.number */
	Cursor		   cursors[MAX_MEMTABLES];
	int			   ncursors;
	uint64		   nids;
	uint64		   capacity;
	uint32		   nblocks;
	EsFilterBlock *blocks;
	char		   bytes[FLEXIBLE_ARRAY_MEMBER];
} Filter;

#define NBUCKETS 4096

static MemoryContext filter_context = NULL;
static Filter		*buckets[NBUCKETS];
static dlist_head	 lru = DLIST_STATIC_INIT(lru);
static Size			 used_bytes = 0;

static inline Filter **
bucket_of(const EsContextId *c)
{
	return &buckets[((c->hash ^ c->table->storage_id) * UINT64CONST(0x9E3779B97F4A7C15)) >> 52];
}

static Filter *
find_filter(const EsContextId *c)
{
	for (Filter *f = *bucket_of(c); f != NULL; f = f->chain)
		if (f->hash == c->hash && f->len == c->len && es_table_key_equal(&f->table, c->table) &&
			memcmp(f->bytes, c->bytes, c->len) == 0)
			return f;
	return NULL;
}

static inline Size
block_bytes(uint64 capacity)
{
	return Max(capacity * BITS_PER_ID / 8 / sizeof(EsFilterBlock), 1) * sizeof(EsFilterBlock);
}

static void
remove_filter(Filter *f)
{
	EsContextId c = {&f->table, f->hash, f->bytes, f->len};
	Filter	  **link = bucket_of(&c);

	while (*link != f)
		link = &(*link)->chain;
	*link = f->chain;
	dlist_delete(&f->lru);
	used_bytes -= block_bytes(f->capacity);
	pfree(f->blocks);
	pfree(f);
}

static inline uint64
id_hash(const uint8 *id)
{
	uint64 a;
	uint64 b;

	memcpy(&a, id, 8);
	memcpy(&b, id + 8, 8);
	/* ids may be counted up: mix both halves well */
	a = (a ^ (b * UINT64CONST(0x9E3779B97F4A7C15))) * UINT64CONST(0xD6E8FEB86659FD93);
	a ^= a >> 32;
	a *= UINT64CONST(0xD6E8FEB86659FD93);
	return a ^ (a >> 29);
}

static inline void
add_id(Filter *f, const uint8 *id)
{
	es_filter_add(f->blocks, f->nblocks, id_hash(id));
	f->nids++;
}

/* ---- bringing it up to date ---- */

static Cursor *
cursor_of(Filter *f, uint64 memtable)
{
	for (int i = 0; i < f->ncursors; i++)
		if (f->cursors[i].memtable == memtable)
			return &f->cursors[i];
	if (f->ncursors == MAX_MEMTABLES)
	{
		/* the oldest ones are in segments by now, or are walked once more */
		memmove(f->cursors, f->cursors + 1, (MAX_MEMTABLES - 1) * sizeof(Cursor));
		f->ncursors--;
	}
	f->cursors[f->ncursors] = (Cursor){memtable, 0};
	return &f->cursors[f->ncursors++];
}

static void
take_memtables(Filter *f)
{
	for (EsMemTable *mt = es_memtable_oldest; mt != NULL; mt = mt->next)
	{
		EsMemStore *store = es_memtable_store(mt, &f->table, false);
		Cursor	   *cursor;
		uint64		begin = 0;
		EsMemBatch *b;
		uint32		number;
		uint32		row;

		/* only a look-up from the beginning brings the index up to all batches */
		if (store == NULL || !es_memstore_next(store, f->hash, UINT32_MAX, &begin, &b, &number, &row))
			continue;
		cursor = cursor_of(f, mt->id);
		while (es_memstore_next(store, f->hash, UINT32_MAX, &cursor->at, &b, &number, &row))
		{
			int column = b->view.header->roles.event_id - 1;

			if (column >= 0 && !es_batch_is_null(&b->view, column, row))
				add_id(f, es_batch_value(&b->view, column, row));
		}
	}
}

static void
take_id(void *arg, uint64 row, const uint8 *id, const EsRowBlock *block, uint32 r)
{
	add_id(arg, id);
}

static bool
take_segments(Filter *f, EsDamage *damage)
{
	EsContextId	   c = {&f->table, f->hash, f->bytes, f->len};
	int			   n;
	EsSegmentRef **refs = es_segments_of(&f->table, &n);
	uint64		   seen = f->segments_seen;
	bool		   ok = true;

	for (int i = 0; i < n; i++)
	{
		/* staged rows of pending ones as well: nobody tells when they are finished */
		if (ok && refs[i]->number > f->segments_seen)
		{
			ok = es_event_ids_walk(&c, refs[i], 0, take_id, f, damage);
			seen = Max(seen, refs[i]->number);
		}
		es_segment_unref(refs[i]);
	}
	if (refs != NULL)
		pfree(refs);
	if (ok)
		f->segments_seen = seen;
	return ok;
}

static bool
bring_up(Filter *f, EsDamage *damage)
{
	take_memtables(f);
	return take_segments(f, damage);
}

/* ---- what event_ids.c calls ---- */

void
es_event_filter_make(const EsContextId *c, uint64 nids)
{
	Size	 limit = Max((Size) es_guc_cache_size * 1024 / 8, 1024 * 1024);
	uint64	 capacity = FIRST_IDS;
	Filter	*f = find_filter(c);
	Filter **bucket;

	if (f != NULL)
		remove_filter(f);
	while (capacity < nids * 2)
		capacity *= 2;
	if (block_bytes(capacity) > limit / 2)
		capacity = nids;
	if (block_bytes(capacity) > limit)
		return;
	while (used_bytes + block_bytes(capacity) > limit && !dlist_is_empty(&lru))
		remove_filter(dlist_container(Filter, lru, lru.head.prev));

	if (filter_context == NULL)
		filter_context =
			AllocSetContextCreate(TopMemoryContext, "event_store event id filters", ALLOCSET_DEFAULT_SIZES);
	f = MemoryContextAllocZero(filter_context, offsetof(Filter, bytes) + c->len);
	f->table = *c->table;
	f->hash = c->hash;
	f->len = (uint32) c->len;
	memcpy(f->bytes, c->bytes, c->len);
	f->capacity = capacity;
	f->nblocks = (uint32) (block_bytes(capacity) / sizeof(EsFilterBlock));
	f->blocks = MemoryContextAllocExtended(filter_context, block_bytes(capacity),
										   MCXT_ALLOC_HUGE | MCXT_ALLOC_ZERO | MCXT_ALLOC_NO_OOM);
	if (f->blocks == NULL)
	{
		pfree(f);
		return;
	}
	bucket = bucket_of(c);
	f->chain = *bucket;
	*bucket = f;
	dlist_push_head(&lru, &f->lru);
	used_bytes += block_bytes(capacity);
}

bool
es_event_filter_absent(const EsContextId *c, const uint8 *const *ids, uint64 nids, bool *absent,
					   EsDamage *damage)
{
	Filter *f = find_filter(c);

	*absent = false;
	if (f == NULL)
		return true;
	dlist_move_head(&lru, &f->lru);
	if (!bring_up(f, damage))
		return false;
	if (f->nids > f->capacity)
	{
		es_event_filter_make(c, f->nids);
		f = find_filter(c);
		if (f == NULL)
			return true;
		if (!bring_up(f, damage))
			return false;
	}
	for (uint64 i = 0; i < nids; i++)
		if (es_filter_maybe(f->blocks, f->nblocks, id_hash(ids[i])))
			return true;
	*absent = true;
	return true;
}
