/*-------------------------------------------------------------------------
 *
 * heads.c
 *	  The last committed version and position of contexts; HEAD.
 *
 * The truth is in MemTables and segments.  In front of it is a cache of bounded size, least
 * recently used first out, so that the writer of a busy context finds its head at
 * once.  An entry is a settled head and a short chain of tails: what transactions that
 * were undecided at the time gave to the context.  A tail is asked for its verdict
 * when the entry is looked at; committed it becomes the head, aborted it goes, and while its
 * transaction is in progress it does not count.  So a version that was given to a
 * transaction that aborted is given again.
 *
 * The cache must never be wrong by omission: every FINISH tells es_head_advance, which
 * only touches what is cached, and a look-up that fills an entry also notes tails for
 * the undecided transactions it meets.  Tables without versions have no es_head_advance, so their
 * heads are not cached.
 *
 * A look-up without the cache goes through the context's rows in all MemTables, and then
 * through the segments, highest positions first, as long as a segment may hold a higher
 * position than what was found: position and version have the same order within a
 * context.  A segment's filter answers for almost all that do not have it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "shard/heads.h"
#include "shard/shard.h"

#define CACHE_BYTES		(16 * 1024 * 1024)
#define FIRST_BUCKETS	1024
#define SETTLE_PER_CALL 4

typedef struct Tail
{
	struct Tail *next; /* older */
	EsTxn		*txn;  /* one reference */
	int64		 version;
	EsPosition	 position;
} Tail;

typedef struct Entry
{
	struct Entry *chain;
	dlist_node	  lru;
	dlist_node	  unsettled; /* in the list of those with tails; next is NULL if in none */
	EsTableKey	  table;
	uint64		  hash;
	uint32		  len;
	EsHead		  head;
	Tail		 *tails;
	char		  bytes[FLEXIBLE_ARRAY_MEMBER];
} Entry;

static MemoryContext heads_context = NULL;
static Entry	   **buckets;
static uint32		 nbuckets; /* a power of two */
static uint32		 nentries;
static Size			 used_bytes;
static dlist_head	 lru = DLIST_STATIC_INIT(lru); /* most recently used first */
static dlist_head	 unsettled = DLIST_STATIC_INIT(unsettled);
static EsRowBlock	*block;

/* ---- the cache ---- */

static inline uint32
bucket_of(const EsTableKey *table, uint64 hash)
{
	uint64 h = (hash ^ table->storage_id * UINT64CONST(0x9E3779B97F4A7C15)) * UINT64CONST(0xD6E8FEB86659FD93);

	return (uint32) (h >> 32) & (nbuckets - 1);
}

static Entry *
find_entry(const EsContextId *c)
{
	if (nbuckets == 0)
		return NULL;
	for (Entry *e = buckets[bucket_of(c->table, c->hash)]; e != NULL; e = e->chain)
		if (e->hash == c->hash && e->len == c->len && es_table_key_equal(&e->table, c->table) &&
			memcmp(e->bytes, c->bytes, c->len) == 0)
			return e;
	return NULL;
}

static void
drop_tail(Tail **link)
{
	Tail *t = *link;

	*link = t->next;
	es_txn_unref(t->txn);
	pfree(t);
}

static inline Size
entry_bytes(const Entry *e)
{
	return MAXALIGN(offsetof(Entry, bytes) + e->len) + 32;
}

static void
remove_entry(Entry *e)
{
	Entry **link = &buckets[bucket_of(&e->table, e->hash)];

	while (*link != e)
		link = &(*link)->chain;
	*link = e->chain;
	while (e->tails != NULL)
		drop_tail(&e->tails);
	if (e->unsettled.next != NULL)
		dlist_delete(&e->unsettled);
	dlist_delete(&e->lru);
	used_bytes -= entry_bytes(e);
	nentries--;
	pfree(e);
}

static void
grow_buckets(void)
{
	uint32	old = nbuckets;
	Entry **from = buckets;

	if (heads_context == NULL)
		heads_context = AllocSetContextCreate(TopMemoryContext, "event_store heads", ALLOCSET_DEFAULT_SIZES);
	buckets = MemoryContextAllocZero(heads_context, Max(FIRST_BUCKETS, old * 2) * sizeof(Entry *));
	nbuckets = Max(FIRST_BUCKETS, old * 2);
	for (uint32 i = 0; i < old; i++)
	{
		Entry *next;

		for (Entry *e = from[i]; e != NULL; e = next)
		{
			Entry **bucket = &buckets[bucket_of(&e->table, e->hash)];

			next = e->chain;
			e->chain = *bucket;
			*bucket = e;
		}
	}
	if (from != NULL)
		pfree(from);
}

static Entry *
add_entry(const EsContextId *c)
{
	Entry  *e;
	Entry **bucket;

	if (nentries >= nbuckets)
		grow_buckets();
	while (used_bytes > CACHE_BYTES && !dlist_is_empty(&lru))
		remove_entry(dlist_container(Entry, lru, lru.head.prev));
	e = MemoryContextAllocZero(heads_context, offsetof(Entry, bytes) + c->len);
	e->table = *c->table;
	e->hash = c->hash;
	e->len = (uint32) c->len;
	memcpy(e->bytes, c->bytes, c->len);
	bucket = &buckets[bucket_of(c->table, c->hash)];
	e->chain = *bucket;
	*bucket = e;
	dlist_push_head(&lru, &e->lru);
	used_bytes += entry_bytes(e);
	nentries++;
	return e;
}

/* False: no memory, and the entry is not cached any more, for it would be wrong by omission. */
static bool
add_tail(Entry *e, EsTxn *txn, int64 version, EsPosition position)
{
	Tail *t;

	for (t = e->tails; t != NULL; t = t->next)
		if (t->txn == txn)
		{
			t->version = Max(t->version, version);
			t->position = Max(t->position, position);
			return true;
		}
	t = MemoryContextAllocExtended(heads_context, sizeof(Tail), MCXT_ALLOC_NO_OOM);
	if (t == NULL)
	{
		remove_entry(e);
		return false;
	}
	es_txn_ref(txn);
	t->txn = txn;
	t->version = version;
	t->position = position;
	t->next = e->tails;
	e->tails = t;
	if (e->unsettled.next == NULL)
		dlist_push_tail(&unsettled, &e->unsettled);
	return true;
}

static void
raise_head(EsHead *head, int64 version, EsPosition position, EsFxid fxid)
{
	if (version < head->version || (version == head->version && position <= head->position))
		return;
	head->version = version;
	head->position = position;
	head->fxid = fxid;
}

/* Verdicts that are there (ask: or can be had) move tails into the head. */
static void
settle(Entry *e, bool ask)
{
	Tail **link = &e->tails;

	while (*link != NULL)
	{
		Tail *t = *link;

		switch (ask ? es_txn_verdict(t->txn) : t->txn->verdict)
		{
			case ES_VERDICT_UNKNOWN:
				link = &t->next;
				continue;
			case ES_VERDICT_COMMITTED:
				raise_head(&e->head, t->version, t->position, t->txn->fxid);
				break;
			case ES_VERDICT_ABORTED:
				break;
		}
		drop_tail(link);
	}
	if (e->tails == NULL && e->unsettled.next != NULL)
	{
		dlist_delete(&e->unsettled);
		e->unsettled.next = NULL;
	}
}

/* Entries nobody asks for would hold their transactions' structs: settles a few old ones. */
static void
settle_some(void)
{
	for (int i = 0; i < SETTLE_PER_CALL && !dlist_is_empty(&unsettled); i++)
	{
		Entry *e = dlist_head_element(Entry, unsettled, &unsettled);

		settle(e, false);
		if (e->tails != NULL)
		{
			dlist_delete(&e->unsettled);
			dlist_push_tail(&unsettled, &e->unsettled);
			break;
		}
	}
}

/* ---- the truth ---- */

/* Undecided transactions that a look-up met. */
typedef struct Met
{
	EsTxn	  *txn;
	int64	   version;
	EsPosition position;
} Met;

typedef struct Search
{
	const EsContextId *context;
	EsHead			   head;
	Met				  *met;
	int				   nmet;
	int				   met_allocated;
	bool			   any;		  /* some row was there: */
	bool			   versioned; /* its table has versions */
	EsDamage		  *damage;
} Search;

static void
note_row(Search *s, EsTxn *txn, EsVerdict verdict, int64 version, EsPosition position, EsFxid fxid)
{
	if (verdict == ES_VERDICT_COMMITTED)
		raise_head(&s->head, version, position, fxid);
	else if (verdict == ES_VERDICT_UNKNOWN && txn != NULL)
	{
		for (int i = 0; i < s->nmet; i++)
			if (s->met[i].txn == txn)
			{
				s->met[i].version = Max(s->met[i].version, version);
				s->met[i].position = Max(s->met[i].position, position);
				return;
			}
		if (s->nmet == s->met_allocated)
		{
			s->met_allocated = Max(8, s->met_allocated * 2);
			s->met = s->met == NULL ? palloc(s->met_allocated * sizeof(Met))
									: repalloc(s->met, s->met_allocated * sizeof(Met));
		}
		s->met[s->nmet++] = (Met){txn, version, position};
	}
}

static void
search_memtables(Search *s)
{
	const EsContextId *c = s->context;

	for (EsMemTable *mt = es_memtable_oldest; mt != NULL; mt = mt->next)
	{
		EsMemStore *store = es_memtable_store(mt, c->table, false);
		uint64		cursor = 0;
		EsMemBatch *b;
		uint32		number;
		uint32		row;

		if (store == NULL)
			continue;
		while (es_memstore_next(store, c->hash, UINT32_MAX, &cursor, &b, &number, &row))
		{
			if (es_membatch_skipped(b, row) || !es_membatch_in_context(b, row, c->bytes, c->len))
				continue;
			s->any = true;
			s->versioned = b->view.header->roles.version != 0;
			note_row(s, b->txn, es_txn_verdict(b->txn), es_membatch_version(b, row),
					 es_membatch_position(b, row), b->txn->fxid);
		}
	}
}

EsVerdict
es_segment_verdict(EsSegmentRef *ref)
{
	/* finished without a live row: it goes when no replay needs it any more */
	if ((ref->finished || ref->entry.adopted) && ref->entry.nlive == 0)
		return ES_VERDICT_ABORTED;
	if (ref->txn != NULL)
		return es_txn_verdict(ref->txn);
	return ref->entry.pending ? ES_VERDICT_UNKNOWN : ES_VERDICT_COMMITTED;
}

static bool
damaged(Search *s, EsSegmentRef *ref, bool counted)
{
	if (!counted)
		es_segment_damaged(ref, &s->damage->err);
	s->damage->path = es_segment_path(ref);
	return false;
}

static bool
search_segment(Search *s, EsSegmentRef *ref)
{
	const EsContextId	*c = s->context;
	EsError				*err = &s->damage->err;
	EsSegment			*seg;
	const EsSegmentInfo *info;
	static const bool	 nothing[ES_MAX_COLUMNS + ES_PENDING_COLUMNS];
	uint64				 first;
	uint64				 n;
	uint64				 last;
	uint32				 entry;
	int64				 version;
	EsStatus			 status;

	memset(err, 0, sizeof(*err));
	seg = es_segment_handle(ref, err);
	if (seg == NULL)
		return damaged(s, ref, true);
	info = es_segment_info(seg);
	status = es_segment_find_context(seg, c->hash, c->bytes, c->len, &first, &n, &entry, err);
	if (status != ES_OK)
	{
		err->status = status;
		return damaged(s, ref, false);
	}
	for (last = first + n; last > first && es_segment_row_dead(ref, last - 1); last--)
		;
	if (last == first)
		return true;
	last--;

	if (block == NULL && (block = es_block_create()) == NULL)
	{
		es_fail(err, ES_ERR_NOMEM, 0, "out of memory");
		return damaged(s, ref, true);
	}
	status =
		es_segment_read(seg, last, 1, nothing, ES_WANT_POSITION | ES_WANT_VERSION | ES_WANT_FXID, block, err);
	if (status != ES_OK)
	{
		err->status = status;
		return damaged(s, ref, false);
	}
	version = (int64) es_block_version(block, 0);
	if (ref->entry.first_versions != NULL && entry < ref->entry.nfirst_versions)
		version =
			es_manifest_first_version(&ref->entry, entry) + (int64) es_segment_live_rows(ref, first, last);
	s->any = true;
	s->versioned = info->roles.version != 0;
	note_row(s, ref->txn, es_segment_verdict(ref), version,
			 es_segment_row_position(ref, es_block_position(block, 0)), es_block_fxid(block, 0));
	return true;
}

static int
compare_max_positions(const void *a, const void *b)
{
	EsPosition x = (*(EsSegmentRef *const *) a)->entry.segment.max_position;
	EsPosition y = (*(EsSegmentRef *const *) b)->entry.segment.max_position;

	return x > y ? -1 : x < y;
}

static bool
search_segments(Search *s)
{
	int			   n;
	EsSegmentRef **refs = es_segments_of(s->context->table, &n);
	bool		   ok = true;

	if (n == 0)
		return true;
	qsort(refs, n, sizeof(EsSegmentRef *), compare_max_positions);
	for (int i = 0; i < n && ok; i++)
	{
		EsSegmentRef *ref = refs[i];

		/* staged rows, written to a file: not finished */
		if (ref->entry.pending && !ref->finished)
			continue;
		if (es_adopt_ahead(ref))
			continue;
		if (es_segment_verdict(ref) == ES_VERDICT_ABORTED)
			continue;
		if (!ref->entry.pending && ref->entry.segment.max_position < s->head.position)
			continue;
		ok = search_segment(s, ref);
	}
	for (int i = 0; i < n; i++)
		es_segment_unref(refs[i]);
	pfree(refs);
	return ok;
}

/* keep: in the cache, if the table has versions. */
static bool
lookup(const EsContextId *c, bool versioned, bool keep, EsHead *head, EsDamage *damage)
{
	Entry *e = find_entry(c);
	Search s = {.context = c, .damage = damage};

	if (e != NULL)
	{
		if (e->tails != NULL)
			settle(e, true);
		dlist_move_head(&lru, &e->lru);
		*head = e->head;
		return true;
	}

	search_memtables(&s);
	if (!search_segments(&s))
	{
		if (s.met != NULL)
			pfree(s.met);
		return false;
	}
	*head = s.head;
	if (keep && (s.any ? s.versioned : versioned))
	{
		e = add_entry(c);
		e->head = s.head;
		for (int i = 0; i < s.nmet; i++)
			if (!add_tail(e, s.met[i].txn, s.met[i].version, s.met[i].position))
				break;
	}
	if (s.met != NULL)
		pfree(s.met);
	return true;
}

bool
es_head_lookup(const EsTableKey *table, uint64 hash, const void *bytes, size_t len, EsHead *head,
			   EsError *err, const char **path)
{
	EsContextId c = {table, hash, bytes, len};
	EsDamage	damage;

	/* who asks has rows with versions */
	if (lookup(&c, true, true, head, &damage))
		return true;
	*err = damage.err;
	*path = damage.path;
	return false;
}

bool
es_head_search(const EsTableKey *table, uint64 hash, const void *bytes, size_t len, EsHead *head,
			   EsError *err, const char **path)
{
	EsContextId c = {table, hash, bytes, len};
	EsDamage	damage;

	if (lookup(&c, true, false, head, &damage))
		return true;
	*err = damage.err;
	*path = damage.path;
	return false;
}

void
es_head_advance(const EsTableKey *table, uint64 hash, const void *bytes, size_t len, EsTxn *txn,
				int64 version, EsPosition position)
{
	EsContextId c = {table, hash, bytes, len};
	Entry	   *e = find_entry(&c);

	if (e != NULL)
	{
		settle(e, false);
		(void) add_tail(e, txn, version, position);
	}
	settle_some();
}

void
es_heads_forget_storage(const EsTableKey *table)
{
	for (uint32 i = 0; i < nbuckets; i++)
	{
		Entry *next;

		for (Entry *e = buckets[i]; e != NULL; e = next)
		{
			next = e->chain;
			if (es_table_key_equal(&e->table, table))
				remove_entry(e);
		}
	}
}

/* ---- HEAD ---- */

typedef struct OneEvent
{
	const uint8	 *id;
	EsHeadAnswer *answer;
} OneEvent;

static bool
is_wanted(void *arg, const uint8 *event_id)
{
	return memcmp(((OneEvent *) arg)->id, event_id, 16) == 0;
}

static void
note_event(void *arg, const uint8 *event_id, const EsEventFound *event)
{
	EsHeadAnswer *a = ((OneEvent *) arg)->answer;

	a->event_found = 1;
	a->event_version = event->version;
	a->event_position = event->position;
	a->event_fxid = event->fxid;
	if (event->content != NULL)
		memcpy(a->event_content, event->content, 16);
}

void
es_handle_head(EsConn *conn, const EsHeadRequest *req, Size len)
{
	EsHeadAnswer answer = {0};
	EsContextId	 c;
	EsHead		 head;
	EsDamage	 damage;
	EsPart		 part = {&answer, sizeof(answer)};

	if (len < sizeof(EsHeadRequest) || req->context_len > len - sizeof(EsHeadRequest))
	{
		es_conn_send_error(conn, ES_REQ_HEAD, req->req.id, ERRCODE_PROTOCOL_VIOLATION,
						   "malformed request for the head of a context", "", "");
		return;
	}
	c.table = &req->table;
	c.hash = req->hash;
	c.bytes = req + 1;
	c.len = req->context_len;
	answer.answer.type = ES_REQ_HEAD;
	answer.answer.flags = ES_ANSWER_LAST;
	answer.answer.id = req->req.id;

	/* nothing is known of a table without rows: its head is not cached */
	if (!lookup(&c, false, true, &head, &damage))
	{
		es_segment_send_error(conn, ES_REQ_HEAD, req->req.id, damage.path, &damage.err);
		return;
	}
	answer.version = head.version;
	answer.position = head.position;
	answer.fxid = head.fxid;
	if (req->has_event_id)
	{
		OneEvent	 one = {req->event_id, &answer};
		const uint8 *id = req->event_id;
		EsEventProbe probe = {is_wanted, note_event, &one, &id, 1};

		if (!es_event_ids_probe(&c, &probe, &damage))
		{
			es_segment_send_error(conn, ES_REQ_HEAD, req->req.id, damage.path, &damage.err);
			return;
		}
	}
	es_conn_send(conn, &answer.answer, &part, 1);
}
