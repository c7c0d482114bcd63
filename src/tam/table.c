/*-------------------------------------------------------------------------
 *
 * table.c
 *	  What the access method knows of a table: its metapage, roles, columns; TIDs.
 *
 * The metapage is block 0 of the relation's main fork and its only block.  It names the
 * storage (an id that is never used again) that the shards know, and fixes the roles
 * of columns by attribute number.  Because it lies in the relation's own
 * file, rollback, DROP, TRUNCATE, rewrites and CREATE DATABASE treat an event table as they treat any
 * other: a new file is a new, empty storage.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/generic_xlog.h"
#include "access/sysattr.h"
#include "access/table.h"
#include "access/xloginsert.h"
#include "catalog/pg_am.h"
#include "catalog/pg_attrdef.h"
#include "catalog/pg_collation.h"
#include "catalog/pg_type.h"
#include "catalog/storage.h"
#include "catalog/storage_xlog.h"
#include "commands/defrem.h"
#include "common/relpath.h"
#include "miscadmin.h"
#include "nodes/nodeFuncs.h"
#include "optimizer/optimizer.h"
#include "rewrite/rewriteHandler.h"
#include "storage/bufmgr.h"
#include "storage/bufpage.h"
#include "storage/smgr.h"
#include "utils/builtins.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/syscache.h"

#include "compat.h"
#include "core/metapage.h"
#include "ipc/position.h"
#include "ipc/shmem.h"
#include "tam/tam.h"
#include "tam/xact.h"

#define ROWS_PER_BLOCK 65535
#define OWN_BLOCK	   UINT32_C(0x80000000)

void
es_tid_encode(ItemPointer tid, uint64 n, bool own)
{
	BlockNumber block = (BlockNumber) (n / ROWS_PER_BLOCK);

	ItemPointerSet(tid, own ? (block | OWN_BLOCK) : block, (OffsetNumber) (n % ROWS_PER_BLOCK + 1));
}

uint64
es_tid_decode(const ItemPointerData *tid, bool *own)
{
	BlockNumber block = ItemPointerGetBlockNumberNoCheck(tid);

	*own = (block & OWN_BLOCK) != 0;
	return (uint64) (block & ~OWN_BLOCK) * ROWS_PER_BLOCK + ItemPointerGetOffsetNumberNoCheck(tid) - 1;
}

EsColumnDesc
es_column_desc(Form_pg_attribute att)
{
	EsColumnDesc d;

	d.len = att->attlen;
	switch (att->attalign)
	{
		case TYPALIGN_CHAR:
			d.align = 1;
			break;
		case TYPALIGN_SHORT:
			d.align = 2;
			break;
		case TYPALIGN_INT:
			d.align = 4;
			break;
		default:
			d.align = 8;
			break;
	}
	d.flags = (att->attbyval ? ES_COLUMN_BYVAL : 0) | (att->attisdropped ? ES_COLUMN_DROPPED : 0) |
			  (att->attlen == -1 && att->attstorage == TYPSTORAGE_PLAIN ? ES_COLUMN_PLAIN : 0);
	return d;
}

/* ---- roles ---- */

/* Class of a context of this type; 0 = it cannot be one. */
static uint8
context_class(Oid type)
{
	switch (type)
	{
		case TEXTOID:
		case VARCHAROID:
		case NAMEOID:
			return ES_CONTEXT_STRING;
		case BYTEAOID:
			return ES_CONTEXT_BYTEA;
		case INT2OID:
		case INT4OID:
		case INT8OID:
			return ES_CONTEXT_INTEGER;
		case UUIDOID:
			return ES_CONTEXT_UUID;
		case DATEOID:
			return ES_CONTEXT_DATE;
		case TIMESTAMPTZOID:
			return ES_CONTEXT_TIMESTAMPTZ;
		case BOOLOID:
			return ES_CONTEXT_BOOL;
		default:
			return type_is_enum(type) ? ES_CONTEXT_ENUM : 0;
	}
}

static void
check_context_column(Form_pg_attribute att, EsRoles *roles)
{
	Oid type = getBaseType(att->atttypid);

	roles->context_class = context_class(type);
	if (roles->context_class == 0)
		ereport(
			ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
			 errmsg("column \"context_id\" of an event_store table cannot have type %s",
					format_type_be(att->atttypid)),
			 errdetail(
				 "A context is the bytes of its value: text, varchar, name, bytea, uuid, integers, date, timestamptz, bool and enums are possible."),
			 errhint("Cast it, for example to text.")));
	if (OidIsValid(att->attcollation) && !get_collation_isdeterministic(att->attcollation))
		ereport(
			ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
			 errmsg(
				 "column \"context_id\" of an event_store table cannot have the nondeterministic collation \"%s\"",
				 get_collation_name(att->attcollation)),
			 errhint("Use COLLATE \"C\".")));
}

/* The roles that the columns' names and types give. */
void
es_roles_from_desc(TupleDesc desc, EsRoles *roles)
{
	memset(roles, 0, sizeof(*roles));
	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);
		const char		 *name = NameStr(att->attname);

		if (att->attisdropped)
			continue;
		if (att->attlen < -1)
			ereport(ERROR, (errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
							errmsg("column \"%s\" of an event_store table cannot have type %s", name,
								   format_type_be(att->atttypid)),
							errdetail("Its values are C strings, without a length."),
							errhint("Use a type of variable length, such as text.")));
		if (strcmp(name, "context_id") == 0)
		{
			roles->context = i + 1;
			check_context_column(att, roles);
		}
		else if (strcmp(name, "position") == 0 && att->atttypid == INT8OID)
			roles->position = i + 1;
		else if (strcmp(name, "version") == 0 && att->atttypid == INT8OID)
			roles->version = i + 1;
		else if (strcmp(name, "event_id") == 0 && att->atttypid == UUIDOID)
			roles->event_id = i + 1;
		else if (strcmp(name, "event_type") == 0 && (att->atttypid == TEXTOID || type_is_enum(att->atttypid)))
			roles->event_type = i + 1;
	}
	if (roles->context == 0)
		ereport(
			ERROR,
			(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
			 errmsg("an event_store table needs a column \"context_id\""),
			 errhint(
				 "It names the stream, aggregate or case that an event belongs to: for example context_id text.")));
}

/* position and version are filled at commit, so they are NULL when constraints are checked. */
void
es_check_not_null(TupleDesc desc, const EsRoles *roles)
{
	int atts[2] = {roles->position, roles->version};

	for (int i = 0; i < 2; i++)
	{
		Form_pg_attribute att;

		if (atts[i] == 0 || atts[i] > desc->natts)
			continue;
		att = TupleDescAttr(desc, atts[i] - 1);
		if (att->attnotnull && !att->attisdropped)
			ereport(ERROR, (errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
							errmsg("column \"%s\" of an event_store table cannot be NOT NULL",
								   NameStr(att->attname)),
							errdetail("The store fills it at commit, after constraints were checked."),
							errhint("Leave NOT NULL out: committed events always have it.")));
	}
}

/* DDL keeps the column (roles.c); who drops it without a statement has a table that can only be read. */
void
es_check_has_context(Relation rel)
{
	int attno = es_table_info(rel)->roles.context;

	if (attno > RelationGetNumberOfAttributes(rel) ||
		TupleDescAttr(RelationGetDescr(rel), attno - 1)->attisdropped)
		ereport(ERROR, (errcode(ERRCODE_INVALID_TABLE_DEFINITION),
						errmsg("event_store table \"%s\" has lost its column \"context_id\"",
							   RelationGetRelationName(rel)),
						errhint("Move its rows to another table, and drop it.")));
}

/* Only the name tells while its storage is made: relrewrite is set behind that. */
Oid
es_visible_relid(Relation rel)
{
	unsigned oid;
	int		 n = 0;

	if (sscanf(RelationGetRelationName(rel), "pg_temp_%u%n", &oid, &n) == 1 &&
		RelationGetRelationName(rel)[n] == '\0' && get_rel_relkind(oid) != '\0')
		return oid;
	return RelationGetRelid(rel);
}

const char *
es_visible_name(Relation rel)
{
	Oid oid = es_visible_relid(rel);

	return oid == RelationGetRelid(rel) ? RelationGetRelationName(rel) : get_rel_name(oid);
}

/* ---- metapage ---- */

bool es_storages_changed = false;

void
es_metapage_create(Relation rel, void *newrlocator, char persistence)
{
	RelFileLocator *locator = newrlocator;
	SMgrRelation	srel;
	PGAlignedBlock	block;
	Page			page = (Page) block.data;
	EsMetapage		meta;

	/* pg_upgrade puts the old cluster's file in its place, whose metapage names the storage */
	if (IsBinaryUpgrade)
	{
		(void) RelationCreateStorage(*locator, persistence, true);
		return;
	}

	memset(&meta, 0, sizeof(meta));
	es_roles_from_desc(RelationGetDescr(rel), &meta.roles);
	es_check_not_null(RelationGetDescr(rel), &meta.roles);

	es_wait_store_ready();
	es_storages_changed = true;
	meta.storage_id = es_positions_take_id();
	memcpy(meta.store_uuid, es_shared->store_uuid, ES_UUID_LEN);
	es_metapage_seal(&meta);

	PageInit(page, BLCKSZ, 0);
	memcpy(PageGetContents(page), &meta, sizeof(meta));
	((PageHeader) page)->pd_lower = (PageGetContents(page) - (char *) page) + sizeof(meta);

	srel = RelationCreateStorage(*locator, persistence, true);
	log_newpage(locator, MAIN_FORKNUM, 0, page, true);
	PageSetChecksumInplace(page, 0);
	smgrextend(srel, MAIN_FORKNUM, 0, block.data, true);

	/*
	 * The write did not go through shared buffers, so a checkpoint that began
	 * behind our record does not know of it.
	 */
	smgrimmedsync(srel, MAIN_FORKNUM);
}

static void
overwrite_metapage(Relation rel, const EsMetapage *meta)
{
	GenericXLogState *state;
	Buffer			  buffer;
	Page			  page;

	buffer = ReadBuffer(rel, 0);
	LockBuffer(buffer, BUFFER_LOCK_EXCLUSIVE);
	state = GenericXLogStart(rel);
	page = GenericXLogRegisterBuffer(state, buffer, GENERIC_XLOG_FULL_IMAGE);
	memcpy(PageGetContents(page), meta, sizeof(*meta));
	GenericXLogFinish(state);
	UnlockReleaseBuffer(buffer);
	CacheInvalidateRelcache(rel);
	if (rel->rd_amcache != NULL)
		pfree(rel->rd_amcache);
	rel->rd_amcache = NULL;
}

void
es_metapage_renew(Relation rel)
{
	EsMetapage meta;

	memset(&meta, 0, sizeof(meta));
	es_roles_from_desc(RelationGetDescr(rel), &meta.roles);
	es_wait_store_ready();
	es_storages_changed = true;
	meta.storage_id = es_positions_take_id();
	memcpy(meta.store_uuid, es_shared->store_uuid, ES_UUID_LEN);
	es_metapage_seal(&meta);
	overwrite_metapage(rel, &meta);
}

static void
read_metapage(Relation rel, EsMetapage *meta)
{
	Buffer	 buffer;
	EsError	 err;
	EsStatus status;

	/* first: pg_upgrade's files are empty */
	es_wait_store_ready();
	/* the file's size, not what our own callback says */
	if (table_block_relation_size(rel, MAIN_FORKNUM) == 0)
		ereport(ERROR, (errcode(ERRCODE_DATA_CORRUPTED),
						errmsg("table \"%s\" has no metapage", RelationGetRelationName(rel)),
						errdetail("Its file \"%s\" is empty.", es_relation_path(rel))));
	buffer = ReadBuffer(rel, 0);
	LockBuffer(buffer, BUFFER_LOCK_SHARE);
	status = es_metapage_decode(PageGetContents(BufferGetPage(buffer)),
								BLCKSZ - MAXALIGN(SizeOfPageHeaderData), meta, &err);
	UnlockReleaseBuffer(buffer);
	if (status == ES_ERR_VERSION)
		ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
						errmsg("table \"%s\" was made by another version of event_store",
							   RelationGetRelationName(rel)),
						errdetail("File \"%s\": %s.", es_relation_path(rel), err.what),
						errhint("Install the version of event_store that made the table, or a newer one.")));
	if (status != ES_OK)
		ereport(ERROR,
				(errcode(ERRCODE_DATA_CORRUPTED),
				 errmsg("metapage of table \"%s\" is damaged: %s", RelationGetRelationName(rel), err.what),
				 err.expected_crc != 0 || err.found_crc != 0
					 ? errdetail("File \"%s\", offset %d: expected checksum %08X, found %08X.",
								 es_relation_path(rel), (int) MAXALIGN(SizeOfPageHeaderData),
								 err.expected_crc, err.found_crc)
					 : errdetail("File \"%s\", offset %d.", es_relation_path(rel),
								 (int) MAXALIGN(SizeOfPageHeaderData)),
				 errhint("Check the storage for errors, then restore the data directory from a backup.")));
	if (memcmp(meta->store_uuid, es_shared->store_uuid, ES_UUID_LEN) != 0)
		ereport(
			ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("table \"%s\" belongs to another event store", RelationGetRelationName(rel)),
			 errdetail("Its metapage names a store that is not this cluster's."),
			 errhint(
				 "pg_upgrade does not copy the store: stop the server, replace directory \"event_store\" in its data directory by the old cluster's, and set event_store.adopt_system_id to the old cluster's system identifier.")));
}

/* The default of the column, or what it is generated from; NULL = none. */
static Node *
column_expression(TupleDesc desc, int attno)
{
	TupleConstr *constr = desc->constr;

	for (int i = 0; constr != NULL && i < constr->num_defval; i++)
	{
		if (constr->defval[i].adnum == attno)
			return stringToNode(constr->defval[i].adbin);
	}
	return NULL;
}

void
es_metapage_copy(Relation from, Relation to)
{
	EsMetapage meta;

	read_metapage(from, &meta);
	overwrite_metapage(to, &meta);
}

/* A default that may give another value for the same event: not part of its content. */
static bool
has_mutable_default(TupleDesc desc, int attno)
{
	Form_pg_attribute att = TupleDescAttr(desc, attno - 1);

	if (att->attidentity != '\0')
		return true;
	return att->atthasdef && att->attgenerated == '\0' &&
		   contain_mutable_functions(column_expression(desc, attno));
}

static bool
is_role(const EsRoles *roles, int attno)
{
	return attno == roles->context || attno == roles->position || attno == roles->version ||
		   attno == roles->event_id;
}

/*
 * Is a generated column made from columns that may differ when the same event comes again?  `hashed` tells of the
 * others already.
 */
static bool
generated_from_other(TupleDesc desc, const EsRoles *roles, int attno, const uint8 *hashed)
{
	Bitmapset *from = NULL;
	int		   member = -1;
	bool	   result = false;

	pull_varattnos(column_expression(desc, attno), 1, &from);
	while ((member = bms_next_member(from, member)) >= 0)
	{
		int source = member + FirstLowInvalidHeapAttributeNumber;

		result = result ||
				 (source > 0 && !hashed[source - 1] && source != roles->context && source != roles->event_id);
	}
	bms_free(from);
	return result;
}

const EsTableInfo *
es_table_info(Relation rel)
{
	static uint64 serial = 0;
	TupleDesc	  desc = RelationGetDescr(rel);
	EsTableInfo	 *info = rel->rd_amcache;
	EsMetapage	  meta;
	uint8		 *hashed;
	bool		  has_hash;
	int			  natts = desc->natts;
	int			  ncols;
	Size		  size;

	if (info != NULL && info->natts == natts)
		return info;

	read_metapage(rel, &meta);

	/* a dropped column has no role any more */
	if (meta.roles.position > natts ||
		(meta.roles.position && TupleDescAttr(desc, meta.roles.position - 1)->attisdropped))
		meta.roles.position = 0;
	if (meta.roles.version > natts ||
		(meta.roles.version && TupleDescAttr(desc, meta.roles.version - 1)->attisdropped))
		meta.roles.version = 0;
	if (meta.roles.event_id > natts ||
		(meta.roles.event_id && TupleDescAttr(desc, meta.roles.event_id - 1)->attisdropped))
		meta.roles.event_id = 0;
	if (meta.roles.event_type > natts ||
		(meta.roles.event_type && TupleDescAttr(desc, meta.roles.event_type - 1)->attisdropped))
		meta.roles.event_type = 0;

	has_hash = meta.roles.event_id != 0;
	ncols = natts + (has_hash ? 1 : 0);
	size = offsetof(EsTableInfo, columns) + ncols * sizeof(EsColumnDesc) + natts * sizeof(uint8);
	info = palloc0(size);
	info->key.storage_id = meta.storage_id;
	info->key.database = MyDatabaseId;
	info->serial = ++serial;
	info->roles = meta.roles;
	info->has_content_hash = has_hash;
	info->keep_rows = rel->trigdesc != NULL && rel->trigdesc->trig_insert_after_row;
	info->natts = natts;
	info->ncols = ncols;
	hashed = (uint8 *) &info->columns[ncols];
	for (int i = 0; i < natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);

		info->columns[i] = es_column_desc(att);
		if (has_hash)
			hashed[i] =
				!att->attisdropped && !is_role(&meta.roles, i + 1) && !has_mutable_default(desc, i + 1);
	}
	for (int i = 0; i < natts; i++)
	{
		if (hashed[i] && TupleDescAttr(desc, i)->attgenerated != '\0')
			hashed[i] = !generated_from_other(desc, &meta.roles, i + 1, hashed);
		if (hashed[i] && es_type_has_rows(TupleDescAttr(desc, i)->atttypid))
			hashed[i] = ES_HASHED_ROWS;
	}
	if (has_hash)
	{
		info->columns[natts].len = ES_CONTENT_HASH_LEN;
		info->columns[natts].align = 8;
	}

	/* everything above may have processed invalidations: the cache is filled at once */
	if (rel->rd_amcache != NULL)
		pfree(rel->rd_amcache);
	rel->rd_amcache = MemoryContextAlloc(CacheMemoryContext, size);
	memcpy(rel->rd_amcache, info, size);
	pfree(info);
	return rel->rd_amcache;
}

/* ---- which tables are ours ---- */

bool
es_is_event_table(Relation rel)
{
	return rel->rd_tableam == es_tam_routine();
}

Oid
es_am_oid(void)
{
	return get_table_am_oid("event_store", true);
}

bool
es_relid_is_event_table(Oid relid)
{
	HeapTuple tuple = SearchSysCache1(RELOID, ObjectIdGetDatum(relid));
	bool	  result = false;

	if (HeapTupleIsValid(tuple))
	{
		Form_pg_class form = (Form_pg_class) GETSTRUCT(tuple);

		result = form->relkind == RELKIND_RELATION && OidIsValid(form->relam) && form->relam == es_am_oid();
		ReleaseSysCache(tuple);
	}
	return result;
}

Relation
es_table_open(Oid relid, LOCKMODE lockmode)
{
	Relation rel = try_table_open(relid, lockmode);

	if (rel == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE), errmsg("relation with OID %u does not exist", relid)));
	if (!es_is_event_table(rel))
		ereport(ERROR, (errcode(ERRCODE_WRONG_OBJECT_TYPE),
						errmsg("\"%s\" is not an event_store table", RelationGetRelationName(rel)),
						errhint("CREATE TABLE … USING event_store makes one.")));
	return rel;
}
