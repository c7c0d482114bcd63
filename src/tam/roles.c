/*-------------------------------------------------------------------------
 *
 * roles.c
 *	  What DDL means for the roles of columns (DESIGN.md 1).
 *
 * Names and types give columns their roles when a table gets its first row; from then on the
 * metapage has them.  DDL comes by many ways to a table's columns: ALTER TABLE, RENAME, ALTER TYPE of a
 * typed table's type, DROP … CASCADE of a column's type, each of them perhaps by way of parents and perhaps with a
 * rewrite, whose new metapage knows only the new columns.  So nothing of the statement is interpreted.
 * While it runs, the object access hook notes each event table whose columns it touches, with the roles from before;
 * behind it the roles that names and types give now are compared with those noted and with those of the metapage:
 *
 *	 - a table without rows gets a new storage with the new roles;
 *	 - with rows a role is not lost (but with its own column) nor moved to another column by a new name;
 *	 - with rows a column that would get a role, and did not get it by a rewrite, is a plain one: NOTICE;
 *	 - context_id stays, with or without rows;
 *	 - nothing that is computed at insert, before the store fills position and version, may be computed from them: stored
 *	   generated columns, CHECK constraints, foreign keys (NOT NULL: table.c).
 *
 * It is done behind the statement because only then it is known which tables are left, and are event tables.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/relation.h"
#include "access/sysattr.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/indexing.h"
#include "catalog/namespace.h"
#include "catalog/pg_attrdef.h"
#include "catalog/pg_class.h"
#include "catalog/pg_constraint.h"
#include "catalog/pg_inherits.h"
#include "miscadmin.h"
#include "optimizer/optimizer.h"
#include "storage/lmgr.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/relcache.h"

#include "compat.h"
#include "ipc/shmem.h"
#include "tam/reader.h"
#include "tam/roles.h"
#include "tam/tam.h"

/* A table whose columns the statement has touched. */
typedef struct TouchedTable
{
	Oid		relid;
	bool	has_roles;
	EsRoles roles; /* from before, if something may be lost */
	EsRoles named; /* what names and types gave before: plain columns, too */
	bool	checked;
} TouchedTable;

static EsRolesWatch *watch = NULL;

void
es_roles_watch(EsRolesWatch *w)
{
	w->previous = watch;
	w->context = CurrentMemoryContext;
	w->touched = NIL;
	watch = w;
}

void
es_roles_unwatch(EsRolesWatch *w)
{
	watch = w->previous;
}

static TouchedTable *
find_touched(EsRolesWatch *w, Oid relid)
{
	ListCell *lc;

	foreach(lc, w->touched)
	{
		TouchedTable *t = lfirst(lc);

		if (t->relid == relid)
			return t;
	}
	return NULL;
}

void
es_roles_touch(Oid relid, bool changed)
{
	TouchedTable *t;
	Relation	  rel;

	if (watch == NULL || !es_relid_is_event_table(relid))
		return;
	t = find_touched(watch, relid);
	if (t == NULL)
	{
		MemoryContext old = MemoryContextSwitchTo(watch->context);

		t = palloc0(sizeof(TouchedTable));
		t->relid = relid;
		watch->touched = lappend(watch->touched, t);
		MemoryContextSwitchTo(old);
	}
	/* a dropped column takes its role along, and the whole table may go: its metapage may be unreadable */
	if (!changed || t->has_roles)
		return;

	/* whoever changes a column has locked its table */
	rel = try_relation_open(relid, NoLock);
	if (rel == NULL)
		return;
	t->roles = es_table_info(rel)->roles;
	/* the catalog has the change, what the server has cached of it has not */
	es_roles_from_desc(RelationGetDescr(rel), &t->named);
	t->has_roles = true;
	relation_close(rel, NoLock);
}

static bool
table_has_rows(Relation rel)
{
	EsReaderSpec spec;
	EsReader	*reader;
	bool		 found;

	es_reader_spec_init(&spec);
	spec.flags = ES_OPEN_COUNT_ONLY;
	spec.max_rows = 1;
	reader = es_reader_begin(rel, NULL, &spec);
	found = es_reader_skip(reader, NULL);
	es_reader_end(reader);
	return found;
}

static void
check_context(Relation rel)
{
	TupleDesc desc = RelationGetDescr(rel);

	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);

		if (!att->attisdropped && strcmp(NameStr(att->attname), "context_id") == 0)
			return;
	}
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_TABLE_DEFINITION),
			 errmsg("event_store table \"%s\" needs its column \"context_id\"", RelationGetRelationName(rel)),
			 errdetail("It names the stream, aggregate or case that an event belongs to."),
			 errhint("Drop the whole table, or move its rows to another one.")));
}

/* Do these columns (AttrNumbers in an array; a constraint's conkey) have one of `late`?  0 = no. */
static AttrNumber
first_late(HeapTuple tuple, TupleDesc desc, const Bitmapset *late)
{
	bool	   isnull;
	Datum	   value = heap_getattr(tuple, Anum_pg_constraint_conkey, desc, &isnull);
	ArrayType *array;
	int16	  *atts;

	if (isnull)
		return 0;
	array = DatumGetArrayTypeP(value);
	atts = (int16 *) ARR_DATA_PTR(array);
	for (int i = 0; i < ArrayGetNItems(ARR_NDIM(array), ARR_DIMS(array)); i++)
		if (atts[i] > 0 && bms_is_member(atts[i], late))
			return atts[i];
	return 0;
}

/* A row of a catalog that this transaction has written? */
static bool
is_new(HeapTuple tuple)
{
	return TransactionIdIsCurrentTransactionId(HeapTupleHeaderGetXmin(tuple->t_data));
}

static void
check_constraint(Relation rel, HeapTuple tuple, TupleDesc desc, const Bitmapset *late)
{
	Form_pg_constraint c = (Form_pg_constraint) GETSTRUCT(tuple);
	AttrNumber		   att;

	if ((c->contype != CONSTRAINT_CHECK && c->contype != CONSTRAINT_FOREIGN) ||
		(att = first_late(tuple, desc, late)) == 0)
		return;
	ereport(
		ERROR,
		(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
		 errmsg("constraint \"%s\" of event_store table \"%s\" cannot use column \"%s\"", NameStr(c->conname),
				RelationGetRelationName(rel),
				NameStr(TupleDescAttr(RelationGetDescr(rel), att - 1)->attname)),
		 errdetail(
			 "The store fills it at commit, after constraints were checked: committed events might violate the constraint, and a dump of them could not be restored."),
		 errhint(
			 "Use other columns only, or drop the constraint.  Versions that are given are checked without one.")));
}

/* *late gains a virtual generated column, which is as good as the columns that it is computed from. */
static void
check_generated(Relation rel, HeapTuple tuple, TupleDesc desc, const EsRoles *roles, bool refuse,
				Bitmapset **late)
{
	AttrNumber		  number = ((Form_pg_attrdef) GETSTRUCT(tuple))->adnum;
	Form_pg_attribute att = TupleDescAttr(RelationGetDescr(rel), number - 1);
	Bitmapset		 *used = NULL;
	AttrNumber		  from;
	bool			  isnull;

	if (att->attgenerated == '\0')
		return;
	pull_varattnos(
		stringToNode(TextDatumGetCString(heap_getattr(tuple, Anum_pg_attrdef_adbin, desc, &isnull))), 1,
		&used);
	if (roles->position > 0 && bms_is_member(roles->position - FirstLowInvalidHeapAttributeNumber, used))
		from = roles->position;
	else if (roles->version > 0 && bms_is_member(roles->version - FirstLowInvalidHeapAttributeNumber, used))
		from = roles->version;
	else
		return;
	if (att->attgenerated != ATTRIBUTE_GENERATED_STORED)
		*late = bms_add_member(*late, number);
	else if (refuse)
		ereport(
			ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
			 errmsg("column \"%s\" of event_store table \"%s\" cannot be generated from column \"%s\"",
					NameStr(att->attname), RelationGetRelationName(rel),
					NameStr(TupleDescAttr(RelationGetDescr(rel), from - 1)->attname)),
			 errdetail(
				 "The store fills it at commit, after generated columns were computed: they would be computed from NULL."),
			 errhint("Compute the value when it is read, for example in a view.")));
}

/*
 * Whatever PostgreSQL computes from position and version when a row is inserted, it computes from NULL.  only_new: a table
 * that has such a thing already goes on with it.
 */
static void
check_late(Relation rel, const EsRoles *roles, bool only_new)
{
	static const struct
	{
		Oid		   catalog;
		Oid		   index;
		AttrNumber relid;
	} sources[2] = {{AttrDefaultRelationId, AttrDefaultIndexId, Anum_pg_attrdef_adrelid},
					{ConstraintRelationId, ConstraintRelidTypidNameIndexId, Anum_pg_constraint_conrelid}};
	Bitmapset *late = NULL;

	if (IsBinaryUpgrade)
		return;
	if (roles->position > 0)
		late = bms_add_member(late, roles->position);
	if (roles->version > 0)
		late = bms_add_member(late, roles->version);
	if (late == NULL)
		return;

	for (int i = 0; i < 2; i++)
	{
		Relation	catalog = table_open(sources[i].catalog, AccessShareLock);
		ScanKeyData key;
		SysScanDesc scan;
		HeapTuple	tuple;

		ScanKeyInit(&key, sources[i].relid, BTEqualStrategyNumber, F_OIDEQ,
					ObjectIdGetDatum(RelationGetRelid(rel)));
		scan = systable_beginscan(catalog, sources[i].index, true, NULL, 1, &key);
		while (HeapTupleIsValid(tuple = systable_getnext(scan)))
		{
			if (i == 0)
				check_generated(rel, tuple, RelationGetDescr(catalog), roles, !only_new || is_new(tuple),
								&late);
			else if (!only_new || is_new(tuple))
				check_constraint(rel, tuple, RelationGetDescr(catalog), late);
		}
		systable_endscan(scan);
		table_close(catalog, AccessShareLock);
	}
}

/* The table has rows, and one of its roles was at another column before. */
static void
check_kept(Relation rel, const char *role, int old_att, int named_att, int new_att, bool rename)
{
	Form_pg_attribute att;

	/* a plain column of that name was there before: another one has been renamed */
	if (old_att == new_att || (rename && named_att == new_att))
		return;
	if (rename)
		ereport(
			ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
			 errmsg("cannot rename a column from or to \"%s\" in event_store table \"%s\", which has rows",
					role, RelationGetRelationName(rel)),
			 errdetail("The name gives the column its role, and roles are fixed once there are rows.")));
	if (old_att == 0)
		return;
	/* the role's column was dropped: the role is gone with it */
	att = TupleDescAttr(RelationGetDescr(rel), old_att - 1);
	if (att->attisdropped)
		return;
	ereport(
		ERROR,
		(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
		 errmsg("cannot change the type of column \"%s\" of event_store table \"%s\", which has rows, to %s",
				role, RelationGetRelationName(rel), format_type_with_typemod(att->atttypid, att->atttypmod)),
		 errdetail(
			 "Name and type give the column its role, which it would lose, and roles are fixed once there are rows."),
		 errhint(
			 "\"position\" and \"version\" are bigint, \"event_id\" is uuid, \"event_type\" is text or an enum.  Add a column of the other type, or copy the rows into a new table.")));
}

static void
notice_plain(Relation rel, const char *role, int meta_att, int new_att)
{
	if (new_att == 0 || new_att == meta_att)
		return;
	ereport(NOTICE,
			(errmsg("column \"%s\" of event_store table \"%s\" is a plain column", role,
					RelationGetRelationName(rel)),
			 errdetail("Roles are fixed when a table gets its first row, and it has rows."),
			 errhint("A rewrite with the rows' own values, or a new table, gives the column its role.")));
}

/* What the statement changed, it has locked; what others hold, it has not changed: NULL. */
static Relation
open_changed(Oid relid)
{
	Relation rel;

	if (!ConditionalLockRelationOid(relid, AccessShareLock))
		return NULL;
	rel = try_relation_open(relid, NoLock);
	if (rel == NULL)
		UnlockRelationOid(relid, AccessShareLock);
	return rel;
}

/* `before`: what the table was when the statement began, NULL = what the metapage says. */
static void
check_table(Oid relid, const TouchedTable *before, bool rename)
{
	Relation rel = open_changed(relid);
	EsRoles	 now;
	EsRoles	 meta;
	EsRoles	 old;
	EsRoles	 named;

	if (rel == NULL)
		return;
	if (es_is_event_table(rel) && rel->rd_rel->relkind == RELKIND_RELATION)
	{
		check_context(rel);
		es_roles_from_desc(RelationGetDescr(rel), &now);
		es_check_not_null(RelationGetDescr(rel), &now);
		check_late(rel, &now, !rename);
		meta = es_table_info(rel)->roles;
		old = before != NULL && before->has_roles ? before->roles : meta;
		named = before != NULL && before->has_roles ? before->named : meta;

		if (memcmp(&now, &meta, sizeof(EsRoles)) == 0 && memcmp(&now, &old, sizeof(EsRoles)) == 0)
			/* nothing has changed */;
		else if (table_has_rows(rel))
		{
			if (old.context != now.context)
				ereport(
					ERROR,
					(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
					 errmsg(
						 "cannot change which column is \"context_id\" in event_store table \"%s\", which has rows",
						 RelationGetRelationName(rel)),
					 errdetail("The context routes rows to their shards.")));
			check_kept(rel, "position", old.position, named.position, now.position, rename);
			check_kept(rel, "version", old.version, named.version, now.version, rename);
			check_kept(rel, "event_id", old.event_id, named.event_id, now.event_id, rename);
			check_kept(rel, "event_type", old.event_type, named.event_type, now.event_type, rename);
			notice_plain(rel, "position", meta.position, now.position);
			notice_plain(rel, "version", meta.version, now.version);
			notice_plain(rel, "event_id", meta.event_id, now.event_id);
			notice_plain(rel, "event_type", meta.event_type, now.event_type);
		}
		else if (memcmp(&now, &meta, sizeof(EsRoles)) != 0)
		{
			RelationSetNewRelfilenumber(rel, rel->rd_rel->relpersistence);
			CommandCounterIncrement();
		}
	}
	relation_close(rel, AccessShareLock);
}

void
es_roles_check(EsRolesWatch *w, const RangeVar *altered, bool rename)
{
	ListCell *lc;

	/* its event tables may have become what they are by this statement, or have a constraint now */
	if (altered != NULL)
	{
		Oid	  relid = RangeVarGetRelid(altered, NoLock, true);
		char  kind = OidIsValid(relid) ? get_rel_relkind(relid) : '\0';
		List *relids = NIL;

		if (kind == RELKIND_RELATION || kind == RELKIND_PARTITIONED_TABLE)
			relids = find_all_inheritors(relid, NoLock, NULL);
		foreach(lc, relids)
		{
			TouchedTable *t = find_touched(w, lfirst_oid(lc));

			if (!es_relid_is_event_table(lfirst_oid(lc)))
				continue;
			check_table(lfirst_oid(lc), t, rename);
			if (t != NULL)
				t->checked = true;
		}
	}
	foreach(lc, w->touched)
	{
		TouchedTable *t = lfirst(lc);

		if (!t->checked && es_relid_is_event_table(t->relid))
			check_table(t->relid, t, rename);
	}
}

static void
check_new(Relation rel)
{
	EsRoles roles;

	es_roles_from_desc(RelationGetDescr(rel), &roles);
	check_late(rel, &roles, false);
}

void
es_roles_created(const RangeVar *created)
{
	Oid		 relid = RangeVarGetRelid(created, NoLock, true);
	Relation rel;

	if (!OidIsValid(relid) || !es_relid_is_event_table(relid) || (rel = open_changed(relid)) == NULL)
		return;
	check_new(rel);
	relation_close(rel, AccessShareLock);
}

void
es_roles_rewrite(Oid relid)
{
	Relation rel;

	if (es_relid_is_event_table(relid))
		return;
	rel = relation_open(relid, NoLock);
	check_new(rel);
	relation_close(rel, NoLock);
}
