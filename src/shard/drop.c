/*-------------------------------------------------------------------------
 *
 * drop.c
 *	  Storages that no relation has any more leave the shard: segments, MemTable
 *	  rows, heads.
 *
 * Who asks (maint/collect.c) is sure: no transaction that is or will be running can read or write
 * the storage.  So nothing is checked here, and asking twice does no harm.
 *
 * One manifest record says it for all keys of a request.  When that is durable the segments go.
 * Not before every MemTable with rows of the storage is flushed, and every one at whose time a
 * FINISH came that names batches in its segments: as long as own WAL is replayed for them, the versions that
 * its FINISHes were promised follow from the rows in its segments, and a FINISH without its batches
 * cannot be applied, nor any behind it; a shard that finds that does not open.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "ipc/fault.h"
#include "shard/engine.h"
#include "shard/flush.h"
#include "shard/shard.h"

typedef struct Request
{
	dlist_node node;
	EsConn	  *conn; /* NULL = closed */
	uint64	   id;
	uint64	   edit; /* ticket, 0 = not submitted */
	uint64	   nkeys;
	EsTableKey keys[FLEXIBLE_ARRAY_MEMBER];
} Request;

/* A storage whose rows may still be in MemTables up to this one. */
typedef struct Dropped
{
	EsTableKey key;
	uint64	   memtable;
} Dropped;

static dlist_head requests = DLIST_STATIC_INIT(requests);
static Dropped	 *dropped;
static uint32	  ndropped;
static uint32	  dropped_allocated;

bool
es_storage_dropped(const EsTableKey *key)
{
	for (uint32 i = 0; i < ndropped; i++)
		if (es_table_key_equal(&dropped[i].key, key))
			return true;
	return false;
}

void
es_drop_retired(uint64 memtable)
{
	uint32 n = 0;

	for (uint32 i = 0; i < ndropped; i++)
		if (dropped[i].memtable > memtable)
			dropped[n++] = dropped[i];
	ndropped = n;
}

static bool
in_memtables(const EsTableKey *key)
{
	for (EsMemTable *mt = es_memtable_oldest; mt != NULL; mt = mt->next)
		if (es_memtable_store(mt, key, false) != NULL)
			return true;
	return false;
}

static void
forget(const EsTableKey *key)
{
	int			   n;
	EsSegmentRef **refs = es_segments_of(key, &n);

	/* a list of pending segments holds no reference */
	for (int i = 0; i < n; i++)
	{
		if (refs[i]->txn != NULL)
			refs[i]->txn->pending = list_delete_ptr(refs[i]->txn->pending, refs[i]);
		es_segment_unref(refs[i]);
	}
	if (refs != NULL)
		pfree(refs);
	es_segments_drop_storage(key);
	es_heads_forget_storage(key);

	if (in_memtables(key) && !es_storage_dropped(key))
	{
		if (ndropped == dropped_allocated)
		{
			dropped_allocated = Max(16, dropped_allocated * 2);
			dropped = dropped == NULL
						  ? MemoryContextAlloc(TopMemoryContext, dropped_allocated * sizeof(Dropped))
						  : repalloc(dropped, dropped_allocated * sizeof(Dropped));
		}
		dropped[ndropped++] = (Dropped){.key = *key, .memtable = es_memtable_active->id};
	}
}

static void
complete(Request *r)
{
	for (uint64 i = 0; i < r->nkeys; i++)
		forget(&r->keys[i]);
	if (r->conn != NULL)
	{
		EsAnswer a = {.type = ES_REQ_DROP_STORAGE, .flags = ES_ANSWER_LAST, .len = sizeof(a), .id = r->id};

		es_conn_send(r->conn, &a, NULL, 0);
	}
	dlist_delete(&r->node);
	pfree(r);
}

/* Asks for the flushes behind which the storage may go.  True: they are not done yet. */
static bool
is_needed(const EsTableKey *key)
{
	bool		   needed = in_memtables(key);
	int			   n;
	EsSegmentRef **refs;

	if (needed)
		(void) es_flush_ask();
	refs = es_segments_of(key, &n);
	for (int i = 0; i < n; i++)
	{
		uint64 memtable;

		if (es_adopt_needed(refs[i], &memtable))
		{
			needed = true;
			es_flush_ask_past(memtable);
		}
		es_segment_unref(refs[i]);
	}
	if (refs != NULL)
		pfree(refs);
	return needed;
}

static bool
in_use(const Request *r)
{
	bool needed = false;

	for (uint64 i = 0; i < r->nkeys; i++)
		needed |= is_needed(&r->keys[i]);
	return needed;
}

/* False: another record is under way. */
static bool
submit(Request *r)
{
	EsManifestEdit *edit = es_edit_begin();
	bool			some = false;

	if (edit == NULL)
		return false;
	for (uint64 i = 0; i < r->nkeys; i++)
	{
		int			   n;
		EsSegmentRef **refs = es_segments_of(&r->keys[i], &n);

		for (int k = 0; k < n; k++)
			es_segment_unref(refs[k]);
		if (refs != NULL)
			pfree(refs);
		if (n == 0)
			continue;
		es_edit_check(es_manifest_edit_drop_storage(edit, &r->keys[i]));
		some = true;
	}
	if (some)
	{
		ES_FAULT("drop-before-manifest");
		r->edit = es_edit_submit(edit);
	}
	else
	{
		es_edit_cancel(edit);
		complete(r);
	}
	return true;
}

void
es_drop_tick(void)
{
	while (!dlist_is_empty(&requests))
	{
		Request *r = dlist_head_element(Request, node, &requests);

		if (r->edit == 0)
		{
			if (in_use(r) || !submit(r))
				return;
		}
		else if (es_edit_done(r->edit))
		{
			ES_FAULT("drop-manifest-durable");
			complete(r);
		}
		else
			return;
	}
}

void
es_handle_drop_storage(EsConn *conn, const EsDropRequest *req)
{
	uint64	 most = (req->req.len - offsetof(EsDropRequest, keys)) / sizeof(EsTableKey);
	uint64	 nkeys = Min(req->nkeys, most);
	Request *r =
		MemoryContextAllocZero(TopMemoryContext, offsetof(Request, keys) + nkeys * sizeof(EsTableKey));

	r->conn = conn;
	r->id = req->req.id;
	r->nkeys = nkeys;
	memcpy(r->keys, req->keys, nkeys * sizeof(EsTableKey));
	for (uint64 i = 0; i < nkeys; i++)
		r->keys[i].reserved = 0;
	dlist_push_tail(&requests, &r->node);
	es_drop_tick();
}

void
es_drop_conn_closed(EsConn *conn)
{
	dlist_iter iter;

	dlist_foreach(iter, &requests)
	{
		Request *r = dlist_container(Request, node, iter.cur);

		if (r->conn == conn)
			r->conn = NULL;
	}
}
