/*-------------------------------------------------------------------------
 *
 * versions.c
 *	  FINISH gives the rows of a table their versions: 1, 2, 3 … within each context.
 *
 * The first version of a context is one more than its committed head (heads.c), the
 * rows of the transaction follow in the order of their ordinals, rows that are not
 * taken are left out.  The context locks make sure that whoever wrote to the context before
 * is decided, so the head is the same now, at PREPARE, and when the FINISH is
 * applied once more in recovery.  The FINISH repeats what PREPARE answered for up
 * to ES_FINISH_MAX_VERSIONS contexts; if that differs, something is broken and the shard
 * stops before it hands a version out twice.
 *
 * The common FINISH has rows of one context, so a context at work is kept aside and a
 * hash table is made only when the second one appears.
 *
 * With GIVEN_VERSIONS (restores) the rows that bring a position have their versions; the head moves to the
 * highest.  Rows without a position come behind them, and are numbered on from there.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "common/hashfn.h"
#include "utils/memutils.h"

#include "core/route.h"
#include "shard/apply.h"
#include "shard/files.h"
#include "shard/segments.h"
#include "shard/shard.h"

/* Contexts of integer classes are kept by value: their bytes lie in the caller's scratch. */
typedef struct ContextKey
{
	uint64		hash;
	uint64		len;
	const void *bytes; /* NULL = value */
	int64		value;
} ContextKey;

typedef struct Context
{
	ContextKey key;
	int64	   version;	 /* last one given */
	EsPosition position; /* of that row */
	char	   status;
} Context;

static inline const void *
key_bytes(const ContextKey *key)
{
	return key->bytes ? key->bytes : &key->value;
}

static inline bool
key_equal(const ContextKey *a, const ContextKey *b)
{
	return a->hash == b->hash && a->len == b->len && memcmp(key_bytes(a), key_bytes(b), a->len) == 0;
}

#define SH_PREFIX		   contexts
#define SH_ELEMENT_TYPE	   Context
#define SH_KEY_TYPE		   ContextKey
#define SH_KEY			   key
#define SH_HASH_KEY(tb, k) ((uint32) (k).hash)
#define SH_EQUAL(tb, a, b) key_equal(&(a), &(b))
#define SH_SCOPE		   static inline
#define SH_DECLARE
#define SH_DEFINE
#include "lib/simplehash.h"

/* What PREPARE said, by hash, when there are too many to look through. */
typedef struct Check
{
	uint64 hash;
	int64  version;
	char   status;
} Check;

#define SH_PREFIX		   checks
#define SH_ELEMENT_TYPE	   Check
#define SH_KEY_TYPE		   uint64
#define SH_KEY			   hash
#define SH_HASH_KEY(tb, k) ((uint32) (k))
#define SH_EQUAL(tb, a, b) ((a) == (b))
#define SH_SCOPE		   static inline
#define SH_DECLARE
#define SH_DEFINE
#include "lib/simplehash.h"

#define FEW_CHECKS 16

bool es_versions_as_promised = false;

typedef struct Work
{
	EsTxn					*txn;
	const EsFinishTableView *view;
	const EsTableKey		*table;
	checks_hash				*checks; /* NULL = look through the array */
} Work;

/*
 * Does the FINISH agree that the context begins with this version?  Two contexts
 * may share a hash, so one entry that agrees is enough.
 */
static bool
agrees(Work *w, uint64 hash, int64 first)
{
	const EsFinishTableView *view = w->view;
	bool					 seen = false;

	if (view->table->nversions > FEW_CHECKS)
	{
		Check *c;

		if (w->checks == NULL)
		{
			bool found;

			w->checks = checks_create(CurrentMemoryContext, view->table->nversions, NULL);
			for (uint32 i = 0; i < view->table->nversions; i++)
			{
				c = checks_insert(w->checks, view->versions[i].context_hash, &found);
				c->version = found ? -1 : view->versions[i].first_version;
			}
		}
		c = checks_lookup(w->checks, hash);
		if (c == NULL || c->version == first)
			return true;
		if (c->version != -1)
			return false;
	}
	for (uint32 i = 0; i < view->table->nversions; i++)
		if (view->versions[i].context_hash == hash)
		{
			if (view->versions[i].first_version == first)
				return true;
			seen = true;
		}
	return !seen;
}

static int64
first_promised(const Work *w, uint64 hash)
{
	for (uint32 i = 0; i < w->view->table->nversions; i++)
		if (w->view->versions[i].context_hash == hash)
			return w->view->versions[i].first_version;
	return 0;
}

/* The last version that the transaction's own pending segments gave to the context, or 0. */
static int64
version_in_pending(Work *w, const ContextKey *key)
{
	int64 restored = 0;

	/*
	 * They hold the rows in the order of ordinals: the last one that has the context has its last version.  Only
	 * restored rows, which precede all others, come in any order.
	 */
	for (int i = list_length(w->txn->pending) - 1; i >= 0; i--)
	{
		EsSegmentRef *ref = list_nth(w->txn->pending, i);
		EsSegment	 *segment;
		EsError		  err;
		uint64		  first_row;
		uint64		  nrows;
		uint32		  entry;
		int64		  live;

		if (!es_table_key_equal(&ref->entry.segment.table, w->table) || ref->entry.nlive == 0)
			continue;
		segment = es_segment_handle(ref, &err);
		if (segment == NULL || es_segment_find_context(segment, key->hash, key_bytes(key), key->len,
													   &first_row, &nrows, &entry, &err) != ES_OK)
			es_corruption(ERROR, es_segment_path(ref), &err);
		if (nrows == 0)
			continue;
		live = (int64) es_segment_live_rows(ref, first_row, first_row + nrows);
		if (live > 0 && entry >= ref->entry.nfirst_versions)
		{
			int64 version;

			if (!es_segment_last_version(ref, segment, first_row, first_row + nrows, &version, &err))
				es_corruption(ERROR, es_segment_path(ref), &err);
			restored = Max(restored, version);
		}
		else if (live > 0)
			return es_manifest_first_version(&ref->entry, entry) + live - 1;
	}
	return restored;
}

/* Begins a context: the version before the transaction's next row of it. */
static int64
version_before(Work *w, const ContextKey *key)
{
	EsHead		head;
	EsError		err;
	const char *path;

	if (w->txn->pending != NIL)
	{
		int64 own = version_in_pending(w, key);

		if (own > 0)
			return own;
	}
	if (!es_head_lookup(w->table, key->hash, key_bytes(key), key->len, &head, &err, &path))
		es_corruption(ERROR, path, &err);
	if (!agrees(w, key->hash, head.version + 1))
	{
		int64 promised = first_promised(w, key->hash);

		if (es_versions_as_promised && promised > head.version)
			return promised - 1;
		ES_COUNT(corruptions, 1);
		ereport(
			ERROR,
			(errcode(ERRCODE_DATA_CORRUPTED),
			 errmsg("shard %d would give version %lld where transaction %llu was promised another one",
					es_shard_id, (long long) head.version + 1, (unsigned long long) w->txn->fxid),
			 errdetail(
				 "Context hash %016llx, storage %llu of database %u, FINISH at %X/%X of PostgreSQL's WAL.",
				 (unsigned long long) key->hash, (unsigned long long) w->table->storage_id,
				 w->table->database, LSN_FORMAT_ARGS(w->txn->finish_start)),
			 errhint("The shard stops so that no version is used twice. Please report this.")));
	}
	return head.version;
}

static void
advance(Work *w, const Context *c)
{
	if (c->version > 0)
		es_head_advance(w->table, c->key.hash, key_bytes(&c->key), c->key.len, w->txn, c->version,
						c->position);
}

void
es_assign_versions(EsTxn *txn, const EsFinishTableView *view, EsLive *live, uint32 nlive)
{
	bool		   given = (view->table->flags & ES_FINISH_GIVEN_VERSIONS) != 0;
	Work		   w = {.txn = txn, .view = view, .table = &view->table->table};
	contexts_hash *others = NULL;
	Context		   only; /* the one context, as long as there is no second */
	Context		  *current = NULL;

	for (uint32 i = 0; i < nlive; i++)
	{
		EsMemBatch *b = live[i].batch;
		uint32		nrows = b->view.header->nrows;

		for (uint32 row = 0; row < nrows; row++)
		{
			ContextKey	key;
			int64		scratch;
			const void *bytes;
			size_t		len;

			if (live[i].skip && (live[i].skip[row >> 3] >> (row & 7)) & 1)
			{
				if (live[i].versions)
					live[i].versions[row] = 0;
				continue;
			}

			if (!es_batch_context(&b->view, row, &scratch, &bytes, &len))
				ereport(ERROR, (errcode(ERRCODE_DATA_CORRUPTED),
								errmsg("shard %d found a row without context in transaction %llu",
									   es_shard_id, (unsigned long long) txn->fxid)));
			key.len = len;
			key.bytes = bytes == &scratch ? NULL : bytes;
			key.value = bytes == &scratch ? scratch : 0;

			/* Rows of one context tend to come one behind the other. */
			if (current == NULL || current->key.len != len ||
				memcmp(key_bytes(&current->key), bytes, len) != 0)
			{
				bool found = false;

				key.hash = es_batch_context_hash(&b->view, row);
				if (current == NULL)
					current = &only;
				else
				{
					if (others == NULL)
					{
						Context *first;

						others = contexts_create(CurrentMemoryContext, 64, NULL);
						first = contexts_insert(others, only.key, &found);
						first->version = only.version;
						first->position = only.position;
					}
					current = contexts_insert(others, key, &found);
				}
				if (!found)
				{
					current->key = key;
					current->position = 0;
					current->version = 0;
					current->version = version_before(&w, &key);
				}
			}

			if (given && (b->view.header->flags & ES_BATCH_GIVEN_POSITIONS) != 0)
			{
				int	  column = b->view.header->roles.version - 1;
				int64 version = 0;

				if (!es_batch_is_null(&b->view, column, row))
					memcpy(&version, es_batch_value(&b->view, column, row), sizeof(version));
				live[i].versions[row] = version;
				if (version >= current->version)
				{
					current->version = version;
					current->position = es_membatch_position(b, row);
				}
			}
			else
			{
				live[i].versions[row] = ++current->version;
				current->position = es_membatch_position(b, row);
			}
		}
	}

	if (others == NULL)
	{
		if (current != NULL)
			advance(&w, current);
	}
	else
	{
		contexts_iterator it;
		Context			 *c;

		contexts_start_iterate(others, &it);
		while ((c = contexts_iterate(others, &it)) != NULL)
			advance(&w, c);
		contexts_destroy(others);
	}
	if (w.checks != NULL)
		checks_destroy(w.checks);
}
