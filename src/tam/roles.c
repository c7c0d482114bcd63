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
 *	 - context_id stays, with or without rows.
 *
 * It is done behind the statement because only then it is known which tables are left, and are event tables.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/relation.h"
#include "catalog/namespace.h"
#include "catalog/pg_class.h"
#include "catalog/pg_inherits.h"
#include "storage/lmgr.h"
#include "utils/builtins.h"
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

/* The table has rows, and one of its roles was at another column before. */
static void
check_kept(Relation rel, const char *role, int old_att, int new_att, bool rename)
{
	Form_pg_attribute att;

	if (old_att == new_att)
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

/* `before`: the roles that the table had when the statement began, NULL = those of the metapage. */
static void
check_table(Oid relid, const EsRoles *before, bool rename)
{
	Relation rel;
	EsRoles	 now;
	EsRoles	 meta;
	EsRoles	 old;

	/* what the statement changed, it has locked; what others hold, it has not changed */
	if (!ConditionalLockRelationOid(relid, AccessShareLock))
		return;
	rel = try_relation_open(relid, NoLock);
	if (rel == NULL)
	{
		UnlockRelationOid(relid, AccessShareLock);
		return;
	}
	if (es_is_event_table(rel) && rel->rd_rel->relkind == RELKIND_RELATION)
	{
		check_context(rel);
		es_roles_from_desc(RelationGetDescr(rel), &now);
		es_check_not_null(RelationGetDescr(rel), &now);
		meta = es_table_info(rel)->roles;
		old = before != NULL ? *before : meta;

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
			check_kept(rel, "position", old.position, now.position, rename);
			check_kept(rel, "version", old.version, now.version, rename);
			check_kept(rel, "event_id", old.event_id, now.event_id, rename);
			check_kept(rel, "event_type", old.event_type, now.event_type, rename);
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
			check_table(lfirst_oid(lc), t != NULL && t->has_roles ? &t->roles : NULL, rename);
			if (t != NULL)
				t->checked = true;
		}
	}
	foreach(lc, w->touched)
	{
		TouchedTable *t = lfirst(lc);

		if (!t->checked && es_relid_is_event_table(t->relid))
			check_table(t->relid, t->has_roles ? &t->roles : NULL, rename);
	}
}
