/*-------------------------------------------------------------------------
 *
 * xact.c
 *	  The events of the current transaction: rows on their way into batches.
 *
 * A row is deformed once, into the batch builder of its (table, shard).  A
 * builder holds rows of one subtransaction; when another one inserts, or when
 * the batch is full, the builder is closed and its batch waits to be logged and
 * sent (send.c), or goes inside FINISH when the transaction is small.  Ordinals
 * number the rows of the transaction over all tables and shards: position = base +
 * ordinal, so the order inside the transaction is the order of its statements.
 *
 * Savepoints: SubTransactionIds grow, and everything that began after a subtransaction
 * did while it was open is its descendant.  So rolling back subtransaction s kills
 * exactly what is marked with an id >= s, and releasing one needs nothing.
 *
 * Memory: the state lives in a child of TopTransactionContext; builders are malloc'd
 * (core/ knows no palloc) and kept between transactions, so that a
 * single-row transaction allocates next to nothing.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/detoast.h"
#include "access/parallel.h"
#include "access/xact.h"
#include "miscadmin.h"
#include "storage/predicate.h"
#include "utils/fmgrprotos.h"
#include "utils/memutils.h"
#include "utils/rel.h"

#include "core/route.h"
#include "ipc/channel.h"
#include "ipc/shmem.h"
#include "tam/tam.h"
#include "tam/vacuum.h"
#include "tam/xact.h"

#define BUILDER_CACHE_SIZE 16

EsXact	 *es_xact = NULL;
EsPromise es_promise;

/* Builders that no transaction uses, for the next one that has the same columns. */
typedef struct CachedBuilder
{
	EsBatchBuilder *builder;
	int				ncols;
	EsColumnDesc   *columns; /* malloc'd copy */
} CachedBuilder;

static CachedBuilder builder_cache[BUILDER_CACHE_SIZE];
static int			 builder_cache_next;

/* Detoasted values of the row being inserted. */
static MemoryContext row_context;

/* Our part of COMMIT (or PREPARE) is done: what a callback of another library inserts now nobody would finish,
 * also if the transaction had no events before. */
static bool past_commit = false;

static EsBatchBuilder *
take_builder(const EsColumnDesc *columns, int ncols)
{
	EsBatchBuilder *b;

	for (int i = 0; i < BUILDER_CACHE_SIZE; i++)
	{
		CachedBuilder *c = &builder_cache[i];

		if (c->builder != NULL && c->ncols == ncols &&
			memcmp(c->columns, columns, sizeof(EsColumnDesc) * ncols) == 0)
		{
			b = c->builder;
			c->builder = NULL;
			return b;
		}
	}

	b = es_batch_create(columns, ncols, NULL);
	if (b == NULL)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
	return b;
}

static void
give_builder(EsBatchBuilder *b, const EsColumnDesc *columns, int ncols)
{
	CachedBuilder *c = &builder_cache[builder_cache_next];
	EsColumnDesc  *copy;

	/* a builder that grew with a bulk load is not worth keeping */
	copy = es_batch_size(b) > 2 * ES_BATCH_TARGET ? NULL : malloc(sizeof(EsColumnDesc) * Max(ncols, 1));
	if (copy == NULL)
	{
		es_batch_free(b);
		return;
	}
	memcpy(copy, columns, sizeof(EsColumnDesc) * ncols);

	builder_cache_next = (builder_cache_next + 1) % BUILDER_CACHE_SIZE;
	if (c->builder != NULL)
		es_batch_free(c->builder);
	free(c->columns);
	c->builder = b;
	c->ncols = ncols;
	c->columns = copy;
}

static EsXact *
xact_get(void)
{
	if (es_xact == NULL)
	{
		MemoryContext context;
		EsXact		 *x;

		(void) es_join_store();
		context =
			AllocSetContextCreate(TopTransactionContext, "event_store transaction", ALLOCSET_SMALL_SIZES);
		x = MemoryContextAllocZero(context, sizeof(EsXact));
		x->context = context;
		dlist_init(&x->tables);
		es_xact = x;
	}
	return es_xact;
}

EsXactTable *
es_xact_table(const EsTableKey *key)
{
	dlist_iter iter;

	if (es_xact == NULL)
		return NULL;
	dlist_foreach(iter, &es_xact->tables)
	{
		EsXactTable *t = dlist_container(EsXactTable, node, iter.cur);

		if (es_table_key_equal(&t->key, key))
			return t;
	}
	return NULL;
}

/* Takes over the relation's columns; open builders have the old ones, so they are closed. */
static void
set_columns(EsXactTable *t, const EsTableInfo *info)
{
	for (int i = 0; i < es_shared->nshards; i++)
	{
		if (t->builders[i] == NULL)
			continue;
		es_close_builder(t, i);
		give_builder(t->builders[i], t->columns, t->ncols);
		t->builders[i] = NULL;
		t->builder_subids[i] = InvalidSubTransactionId;
	}
	t->natts = info->natts;
	t->ncols = info->ncols;
	t->columns = MemoryContextAlloc(es_xact->context, sizeof(EsColumnDesc) * Max(info->ncols, 1));
	memcpy(t->columns, info->columns, sizeof(EsColumnDesc) * info->ncols);
}

/*
 * A role that DDL has taken away (the column was dropped) comes back when the savepoint is rolled back.  Rows from
 * before the DDL may be there, and those of a table are finished alike, so a role is only ever gained: what is left of a lost
 * one is a column of NULLs.
 */
static void
gain_roles(EsXactTable *t, const EsRoles *roles)
{
	t->roles.context = roles->context;
	t->roles.context_class = roles->context_class;
	t->roles.position = Max(t->roles.position, roles->position);
	t->roles.version = Max(t->roles.version, roles->version);
	t->roles.event_id = Max(t->roles.event_id, roles->event_id);
	t->roles.event_type = Max(t->roles.event_type, roles->event_type);
	t->locking = t->roles.version != 0 || t->roles.event_id != 0;
}

EsXactTable *
es_xact_table_get(Relation rel)
{
	const EsTableInfo *info = es_table_info(rel);
	EsXact			  *x = xact_get();
	EsXactTable		  *t = es_xact_table(&info->key);

	if (t == NULL)
	{
		t = MemoryContextAllocZero(x->context, sizeof(EsXactTable));
		t->key = info->key;
		t->relid = RelationGetRelid(rel);
		t->serial = info->serial;
		t->created = GetCurrentSubTransactionId();
		t->builders = MemoryContextAllocZero(x->context, sizeof(EsBatchBuilder *) * es_shared->nshards);
		t->builder_subids = MemoryContextAllocZero(x->context, sizeof(SubTransactionId) * es_shared->nshards);
		t->ndead = MemoryContextAllocZero(x->context, sizeof(uint32) * es_shared->nshards);
		dlist_init(&t->pending);
		dlist_init(&t->batches);
		gain_roles(t, &info->roles);
		set_columns(t, info);
		dlist_push_head(&x->tables, &t->node);
		x->ntables++;
	}
	else
	{
		if (t->serial != info->serial)
		{
			if (t->ncols != info->ncols || memcmp(&t->roles, &info->roles, sizeof(EsRoles)) != 0 ||
				memcmp(t->columns, info->columns, sizeof(EsColumnDesc) * info->ncols) != 0)
			{
				/* rows in a builder go with the roles that they came with */
				set_columns(t, info);
				gain_roles(t, &info->roles);
			}
			t->serial = info->serial;
		}
		if (dlist_head_node(&x->tables) != &t->node)
			dlist_move_head(&x->tables, &t->node);
	}
	return t;
}

/* Pointers to a row's values as es_batch_add wants them; detoasts into the current context. */
static void
row_values(TupleTableSlot *slot, const EsColumnDesc *columns, int natts, const void **values)
{
	slot_getallattrs(slot);
	for (int i = 0; i < natts; i++)
	{
		if (slot->tts_isnull[i] || (columns[i].flags & ES_COLUMN_DROPPED))
			values[i] = NULL;
		else if (columns[i].len == -1)
			values[i] = PG_DETOAST_DATUM_PACKED(slot->tts_values[i]);
		else if (columns[i].flags & ES_COLUMN_BYVAL)
			values[i] = &slot->tts_values[i]; /* little-endian: the low bytes come first */
		else
			values[i] = DatumGetPointer(slot->tts_values[i]);
	}
}

void
es_content_hash(Relation rel, TupleTableSlot *slot, uint64 result[2])
{
	const EsTableInfo *info = es_table_info(rel);
	const void		 **values = palloc(sizeof(void *) * Max(info->natts, 1));
	EsColumnDesc	  *columns = palloc(sizeof(EsColumnDesc) * Max(info->natts, 1));

	memcpy(columns, info->columns, sizeof(EsColumnDesc) * info->natts);
	row_values(slot, columns, info->natts, values);
	es_hash_content(RelationGetDescr(rel), info, columns, values, result);
	pfree(columns);
	pfree(values);
}

static void
batch_failed(EsStatus status, Relation rel)
{
	if (status == ES_ERR_TOO_LARGE)
		ereport(ERROR, (errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
						errmsg("row is too large for table \"%s\"", RelationGetRelationName(rel)),
						errdetail("A row of an event_store table can have up to %u bytes.",
								  (unsigned) ES_BATCH_MAX_BYTES / 2)));
	ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
}

/*
 * What append() has promised, for a row that may be its own.  Triggers came in between.  One may have appended to the
 * same context: then the row comes behind that.  One may have given the row another context: then the
 * version, which append() put there, means nothing and is left out, as it is if rows have come of which it is
 * not known whether they will be taken.  True: the row is as promised.
 */
static bool
take_promise(EsXactTable *t, Relation rel, TupleTableSlot *slot, const void **values, uint64 hash)
{
	static int64  version;
	EsPromise	 *p = &es_promise;
	int			  att = t->roles.version - 1;
	const uint8	 *id;
	EsOwnContext *own;

	if (!p->active || p->inserted || p->relid != RelationGetRelid(rel) ||
		p->depth != DatumGetInt32(DirectFunctionCall1(pg_trigger_depth, (Datum) 0)))
		return false;
	id = t->roles.event_id != 0 ? values[t->roles.event_id - 1] : NULL;
	if (p->probe)
	{
		p->inserted = hash == p->hash && id != NULL && memcmp(id, p->event_id, ES_UUID_LEN) == 0;
		return p->inserted;
	}
	if (att >= 0 && (values[att] == NULL || DatumGetInt64(slot->tts_values[att]) != p->version))
		return false;
	own = hash == p->hash ? es_xact_context(t, hash) : NULL;
	if (own == NULL || (att >= 0 && es_own_unsure(own) > 0))
	{
		if (att >= 0)
		{
			values[att] = NULL;
			slot->tts_isnull[att] = true;
		}
		return false;
	}
	p->look_again = id != NULL && (p->event_id == NULL || memcmp(id, p->event_id, ES_UUID_LEN) != 0 ||
								   es_own_rows(own) != p->own_rows);
	if (p->look_again)
		memcpy(p->row_id, id, ES_UUID_LEN);
	if (att >= 0)
	{
		version = p->head + es_own_rows(own) + 1;
		p->version = version;
		values[att] = &version;
		slot->tts_values[att] = Int64GetDatum(version);
	}
	p->inserted = true;
	p->ordinal = es_xact->next_ordinal;
	return true;
}

uint64
es_xact_insert(Relation rel, TupleTableSlot *slot, CommandId cid, bool checked)
{
	TupleDesc		   desc = RelationGetDescr(rel);
	SubTransactionId   subid = GetCurrentSubTransactionId();
	const void		  *values[ES_MAX_COLUMNS + 1];
	uint64			   hash_value[2];
	const EsTableInfo *info;
	EsXactTable		  *t;
	EsXact			  *x;
	EsBatchBuilder	  *b;
	MemoryContext	   old;
	const void		  *bytes;
	size_t			   len;
	int64			   scratch;
	uint64			   hash;
	uint64			   ordinal;
	uint16			   flags = 0;
	bool			   promised;
	int				   shard;
	EsStatus		   status;

	if (IsParallelWorker())
		ereport(ERROR, (errcode(ERRCODE_INVALID_TRANSACTION_STATE),
						errmsg("cannot insert tuples in a parallel worker")));

	es_wait_store_ready();
	if (past_commit)
		ereport(
			ERROR,
			(errcode(ERRCODE_INVALID_TRANSACTION_STATE),
			 errmsg("cannot insert into table \"%s\" while the transaction commits",
					RelationGetRelationName(rel)),
			 errdetail(
				 "A commit callback of another library inserted events after event_store had finished the transaction.")));
	t = es_xact_table_get(rel);
	x = es_xact;

	CheckForSerializableConflictIn(rel, NULL, InvalidBlockNumber);

	old = MemoryContextSwitchTo(row_context);
	row_values(slot, t->columns, t->natts, values);

	if (values[t->roles.context - 1] == NULL)
	{
		es_check_has_context(rel);
		ereport(ERROR,
				(errcode(ERRCODE_NOT_NULL_VIOLATION),
				 errmsg("null value in column \"%s\" of relation \"%s\" violates not-null constraint",
						NameStr(TupleDescAttr(desc, t->roles.context - 1)->attname), es_visible_name(rel)),
				 errdetail("The context routes an event to its shard."), errtable(rel)));
	}
	es_context_bytes(t->roles.context_class, t->columns[t->roles.context - 1].len,
					 values[t->roles.context - 1], &scratch, &bytes, &len);
	hash = es_context_hash(t->roles.context_class, bytes, len);
	shard = es_shard_of_hash(hash);
	promised = take_promise(t, rel, slot, values, hash);
	checked = checked || promised;

	if (t->roles.position != 0)
	{
		int att = t->roles.position - 1;

		es_given_note(t, rel, !slot->tts_isnull[att], DatumGetInt64(slot->tts_values[att]),
					  t->roles.version != 0 && values[t->roles.version - 1] != NULL);
		if (!slot->tts_isnull[att])
			flags |= ES_BATCH_GIVEN_POSITIONS;
	}
	else if (!t->assigned)
	{
		t->assigned = true;
		t->assigned_subid = subid;
	}
	if (t->roles.version != 0 && values[t->roles.version - 1] != NULL)
	{
		if (DatumGetInt64(slot->tts_values[t->roles.version - 1]) < 1)
			ereport(ERROR, (errcode(ERRCODE_UNIQUE_VIOLATION),
							errmsg("version " INT64_FORMAT " cannot be the next version of a context",
								   DatumGetInt64(slot->tts_values[t->roles.version - 1])),
							errdetail("Versions begin with 1."), errtable(rel)));
		flags |= ES_BATCH_GIVEN_VERSIONS;
	}

	/* info may go away with the next invalidation, so it is read as late as here */
	if (t->ncols > t->natts)
	{
		values[t->natts] = NULL;
		if (values[t->roles.event_id - 1] != NULL)
		{
			info = es_table_info(rel);
			es_hash_content(desc, info, t->columns, values, hash_value);
			values[t->natts] = hash_value;
			if (promised)
				memcpy(es_promise.content, hash_value, sizeof(hash_value));
			flags |= ES_BATCH_HAS_EVENT_IDS;
		}
	}

	b = t->builders[shard];
	if (b == NULL)
		b = t->builders[shard] = take_builder(t->columns, t->ncols);
	else if (t->builder_subids[shard] != subid)
		es_close_builder(t, shard); /* does nothing if it is empty */
	if (t->builder_subids[shard] != subid)
	{
		EsBatchMeta meta = {.table = t->key,
							.roles = t->roles,
							.relid = RelationGetRelid(rel),
							.subid = subid,
							.flags = t->ncols > t->natts ? ES_BATCH_HAS_CONTENT_HASH : 0,
							.with_positions = false};

		/* batches of one row, when each comes in a savepoint of its own: they do not pile up until COMMIT */
		if (x->pending_bytes > ES_INLINE_LIMIT)
			es_send_pending();
		es_batch_reset(b, &meta);
		t->builder_subids[shard] = subid;
	}

	ordinal = x->next_ordinal;
	status = es_batch_add(b, values, ordinal, cid, 0, 0);
	MemoryContextSwitchTo(old);
	MemoryContextReset(row_context);
	if (status != ES_OK)
		batch_failed(status, rel);
	x->next_ordinal++;
	if (flags != 0)
		es_batch_add_flags(b, flags);

	if (t->locking)
	{
		EsOwnContext *own = es_xact_context(t, hash);
		bool		  look = promised ? es_promise.look_again : !checked;

		es_note_context(t, hash);
		/* beyond the limit nobody asks */
		if (own != NULL)
		{
			es_own_count(own, 1, look && (flags & ES_BATCH_HAS_EVENT_IDS));
			own->changes++;
			if (promised)
				es_promise.changes = own->changes;
		}
		if (!checked && (flags & (ES_BATCH_GIVEN_VERSIONS | ES_BATCH_HAS_EVENT_IDS)))
			t->unchecked = true;
	}

	slot->tts_tableOid = RelationGetRelid(rel);
	es_tid_encode(&slot->tts_tid, ordinal, true);
	if (rel->trigdesc != NULL && rel->trigdesc->trig_insert_after_row)
		es_kept_add(t, ordinal, slot);

	if (es_batch_size(b) >= ES_BATCH_TARGET || es_batch_nrows(b) >= ES_BATCH_MAX_ROWS)
	{
		es_send_shard(t, shard);
	}
	return ordinal;
}

EsFxid
es_xact_own_fxid(void)
{
	/* a parallel worker has the leader's xid but not its es_xact */
	if (es_xact == NULL && !IsParallelWorker())
		return 0;
	return U64FromFullTransactionId(GetTopFullTransactionIdIfAny());
}

static void
drop_batch(EsXactBatch *b)
{
	dlist_delete(&b->node);
	pfree(b->bytes);
	pfree(b);
}

static dlist_node *
last_of(dlist_head *list)
{
	return dlist_is_empty(list) ? NULL : dlist_tail_node(list);
}

static dlist_node *
before(dlist_head *list, dlist_node *node)
{
	return dlist_has_prev(list, node) ? dlist_prev_node(list, node) : NULL;
}

/*
 * Everything that began in the rolled-back subtransaction or in a descendant of it dies.  It lies at
 * the end of the lists, so that no savepoint has to walk over all that came before it.
 */
static void
subxact_abort(SubTransactionId subid)
{
	dlist_iter titer;

	if (es_xact == NULL)
		return;
	dlist_foreach(titer, &es_xact->tables)
	{
		EsXactTable *t = dlist_container(EsXactTable, node, titer.cur);

		for (int s = 0; s < es_shared->nshards; s++)
		{
			EsBatchMeta meta = {.table = t->key};

			if (t->builders[s] != NULL && es_batch_nrows(t->builders[s]) > 0 && t->builder_subids[s] >= subid)
			{
				es_batch_reset(t->builders[s], &meta);
				t->builder_subids[s] = InvalidSubTransactionId;
			}
		}

		for (dlist_node *node = last_of(&t->pending); node != NULL;)
		{
			EsXactBatch *b = dlist_container(EsXactBatch, node, node);

			if (b->newest < subid)
				break;
			node = before(&t->pending, node);
			if (b->subid < subid)
				continue;
			es_xact->pending_bytes -= b->size;
			drop_batch(b);
		}

		for (dlist_node *node = last_of(&t->batches); node != NULL;)
		{
			EsXactBatch *b = dlist_container(EsXactBatch, node, node);

			if (b->newest < subid)
				break;
			node = before(&t->batches, node);
			if (b->subid < subid || b->dead)
				continue;
			if (b->sent)
			{
				b->dead = true;
				t->ndead[b->shard]++;
				continue;
			}

			/*
			 * Never sent: nobody will ask for it.  The floor stays until the
			 * next send or the end of the transaction (PROTOCOL.md 2.2).
			 */
			es_xact->nunsent--;
			drop_batch(b);
		}

		es_given_rollback(t, subid);
		es_locks_rollback(t, subid);
		es_kept_rollback(t, subid);

		for (uint32 i = 0; i < t->ncontexts; i++)
		{
			EsOwnContext *c = &t->contexts[i];

			while (c->ncounts > 0 && c->counts[c->ncounts - 1].subid >= subid)
				c->ncounts--;
		}
	}
}

/* Forgets the transaction; memory goes with TopTransactionContext, builders go back. */
static void
xact_forget(void)
{
	dlist_iter iter;

	if (es_xact == NULL)
		return;
	dlist_foreach(iter, &es_xact->tables)
	{
		EsXactTable *t = dlist_container(EsXactTable, node, iter.cur);

		for (int s = 0; s < es_shared->nshards; s++)
		{
			if (t->builders[s] != NULL)
				give_builder(t->builders[s], t->columns, t->ncols);
			t->builders[s] = NULL;
		}
		es_kept_free(t);
		es_given_free(t);
	}
	es_xact = NULL;
}

/* The last that shards hear of the transaction is sent: a detach need not wait for it any longer. */
static void
end_transaction(void)
{
	es_channel_end_transaction();
	xact_forget();
	es_leave_store();
}

/* Storages of tables that this transaction made, dropped or emptied may be dead now. */
static void
hint_collector(void)
{
	if (es_storages_changed && es_shared != NULL)
		pg_atomic_fetch_add_u32(&es_shared->collect_hint, 1);
	es_storages_changed = false;
}

static void
xact_callback(XactEvent event, void *arg)
{
	past_commit = false;
	switch (event)
	{
		case XACT_EVENT_PRE_COMMIT:
			es_vacuum_precommit();
			es_xact_precommit();
			past_commit = true;
			break;
		case XACT_EVENT_COMMIT:
			es_xact_commit();
			end_transaction();
			hint_collector();
			break;
		case XACT_EVENT_ABORT:
			es_xact_abort();
			end_transaction();
			es_vacuum_end();
			hint_collector();
			break;
		case XACT_EVENT_PRE_PREPARE:
			if (es_xact != NULL && es_xact->next_ordinal > 0)
				ereport(ERROR,
						(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
						 errmsg("cannot PREPARE a transaction that has inserted into an event_store table"),
						 errhint("Commit the events in a transaction of their own.")));
			past_commit = true;
			break;
		case XACT_EVENT_PREPARE:
		case XACT_EVENT_PARALLEL_COMMIT:
		case XACT_EVENT_PARALLEL_ABORT:
			es_xact_abort();
			end_transaction();
			hint_collector();
			break;
		case XACT_EVENT_PARALLEL_PRE_COMMIT:
			break;
	}
}

static void
subxact_callback(SubXactEvent event, SubTransactionId subid, SubTransactionId parent, void *arg)
{
	if (event == SUBXACT_EVENT_ABORT_SUB)
		subxact_abort(subid);
}

void
es_xact_init(void)
{
	row_context = AllocSetContextCreate(TopMemoryContext, "event_store row", ALLOCSET_DEFAULT_SIZES);
	RegisterXactCallback(xact_callback, NULL);
	RegisterSubXactCallback(subxact_callback, NULL);
}
