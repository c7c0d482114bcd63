/*-------------------------------------------------------------------------
 *
 * hooks.c
 *	  What is said when a statement starts, rather than when it meets a row; and
 *	  what DDL means for roles.
 *
 * ExecutorStart: UPDATE, DELETE, MERGE that changes rows, ON CONFLICT and row locks on event
 * tables are refused whether or not there are rows.  Before a parallel plan the transaction's
 * pending events are logged and sent, because no xid can be assigned in parallel
 * mode (PROTOCOL.md 1.6).
 *
 * ProcessUtility: after ALTER TABLE and RENAME the roles that names and types give are compared
 * with those of the metapage.  Without rows the table gets a new storage with the new
 * roles; with rows a rename from or to a role is refused, and an added column is a plain one, with a
 * NOTICE.  Publications of event tables are warned about; CREATE DATABASE from a
 * template whose event tables hold rows is refused.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/relation.h"
#include "access/table.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/objectaccess.h"
#include "catalog/pg_class.h"
#include "catalog/pg_database.h"
#include "catalog/pg_inherits.h"
#include "commands/dbcommands.h"
#include "commands/defrem.h"
#include "executor/executor.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "nodes/plannodes.h"
#include "parser/parsetree.h"
#include "tcop/utility.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/relcache.h"
#include "utils/snapmgr.h"

#include "compat.h"
#include "ipc/channel.h"
#include "ipc/shmem.h"
#include "tam/reader.h"
#include "tam/tam.h"
#include "tam/xact.h"

static ExecutorStart_hook_type	previous_executor_start;
static ProcessUtility_hook_type previous_process_utility;
static object_access_hook_type	previous_object_access;

/* ---- statements ---- */

pg_attribute_noreturn() static void refuse(Oid relid, const char *what, const char *hint)
{
	ereport(ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
			 errmsg("cannot %s event_store table \"%s\"", what, get_rel_name(relid)), errhint("%s", hint)));
	pg_unreachable();
}

static bool
merge_changes_rows(const ModifyTable *node)
{
	ListCell *outer;

	foreach(outer, node->mergeActionLists)
	{
		ListCell *inner;

		foreach(inner, (List *) lfirst(outer))
		{
			MergeAction *action = lfirst_node(MergeAction, inner);

			if (action->commandType == CMD_UPDATE || action->commandType == CMD_DELETE)
				return true;
		}
	}
	return false;
}

static void
check_modify(const ModifyTable *node, List *rtable)
{
	static const char *const immutable =
		"Events are immutable: append an event that corrects the earlier one.";
	ListCell *lc;

	foreach(lc, node->resultRelations)
	{
		Oid relid = rt_fetch(lfirst_int(lc), rtable)->relid;

		if (node->operation == CMD_INSERT && node->onConflictAction == ONCONFLICT_NONE)
			continue;
		if (!es_relid_is_event_table(relid))
			continue;
		switch (node->operation)
		{
			case CMD_UPDATE:
				refuse(relid, "update", immutable);
			case CMD_DELETE:
				refuse(relid, "delete from", immutable);
			case CMD_MERGE:
				if (merge_changes_rows(node))
					refuse(relid, "update or delete in", immutable);
				break;
			default:
				refuse(relid, "use ON CONFLICT with",
					   "Use \"event_id\": an event whose id is already in its context is not stored twice.");
		}
	}
}

static void
es_executor_start(QueryDesc *query, int eflags)
{
	PlannedStmt *stmt = query->plannedstmt;
	ListCell	*lc;

	if (IsA(stmt->planTree, ModifyTable))
		check_modify((ModifyTable *) stmt->planTree, stmt->rtable);
	foreach(lc, stmt->subplans)
	{
		Plan *plan = lfirst(lc);

		if (plan != NULL && IsA(plan, ModifyTable))
			check_modify((ModifyTable *) plan, stmt->rtable);
	}
	foreach(lc, stmt->rowMarks)
	{
		PlanRowMark *mark = lfirst_node(PlanRowMark, lc);
		Oid			 relid;

		/* FOR KEY SHARE keeps others from deleting a row, which nobody can: foreign keys ask for it */
		if (mark->isParent || mark->markType == ROW_MARK_KEYSHARE ||
			!RowMarkRequiresRowShareLock(mark->markType))
			continue;
		relid = rt_fetch(mark->rti, stmt->rtable)->relid;
		if (OidIsValid(relid) && es_relid_is_event_table(relid))
			refuse(relid, "lock rows of",
				   "Events are immutable; to serialise writers of a context use an expected version.");
	}

	if (stmt->parallelModeNeeded && (eflags & EXEC_FLAG_EXPLAIN_ONLY) == 0)
		es_xact_send_all();

	if (previous_executor_start)
		previous_executor_start(query, eflags);
	else
		standard_ExecutorStart(query, eflags);
}

/* ---- roles after DDL ---- */

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
notice_plain(Relation rel, int attno, const char *role)
{
	ereport(NOTICE,
			(errmsg("column \"%s\" of event_store table \"%s\" is a plain column", role,
					RelationGetRelationName(rel)),
			 errdetail("Roles are fixed when a table gets its first row, and it has rows."),
			 errhint("A rewrite with the rows' own values, or a new table, gives the column its role.")));
}

/* One role: old and new attribute number differ, and the table has rows. */
static void
role_changed(Relation rel, const char *role, int old_att, int new_att, bool rename)
{
	TupleDesc desc = RelationGetDescr(rel);

	if (old_att == new_att)
		return;
	/* the role's column was dropped: the role is gone with it */
	if (old_att != 0 && new_att == 0 && TupleDescAttr(desc, old_att - 1)->attisdropped)
		return;
	if (rename)
		ereport(
			ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
			 errmsg("cannot rename a column from or to \"%s\" in event_store table \"%s\", which has rows",
					role, RelationGetRelationName(rel)),
			 errdetail("The name gives the column its role, and roles are fixed once there are rows.")));
	if (new_att != 0)
		notice_plain(rel, new_att, role);
}

static void
recheck_roles(Oid relid, bool rename)
{
	Relation rel = try_relation_open(relid, NoLock);
	EsRoles	 roles;
	EsRoles	 old;

	if (rel == NULL)
		return;
	if (!es_is_event_table(rel) || rel->rd_rel->relkind != RELKIND_RELATION)
	{
		relation_close(rel, NoLock);
		return;
	}

	es_roles_from_desc(RelationGetDescr(rel), &roles);
	es_check_not_null(RelationGetDescr(rel), &roles);
	old = es_table_info(rel)->roles;
	if (memcmp(&roles, &old, sizeof(roles)) != 0)
	{
		if (!table_has_rows(rel))
		{
			RelationSetNewRelfilenumber(rel, rel->rd_rel->relpersistence);
			CommandCounterIncrement();
		}
		else
		{
			if (old.context != roles.context)
				ereport(
					ERROR,
					(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
					 errmsg(
						 "cannot change which column is \"context_id\" in event_store table \"%s\", which has rows",
						 RelationGetRelationName(rel)),
					 errdetail("The context routes rows to their shards.")));
			role_changed(rel, "position", old.position, roles.position, rename);
			role_changed(rel, "version", old.version, roles.version, rename);
			role_changed(rel, "event_id", old.event_id, roles.event_id, rename);
			role_changed(rel, "event_type", old.event_type, roles.event_type, rename);
		}
	}
	relation_close(rel, NoLock);
}

static void
recheck_with_children(RangeVar *relation, bool rename)
{
	Oid		  relid = RangeVarGetRelid(relation, NoLock, true);
	List	 *relids;
	ListCell *lc;

	if (!OidIsValid(relid) ||
		(get_rel_relkind(relid) != RELKIND_RELATION && get_rel_relkind(relid) != RELKIND_PARTITIONED_TABLE))
		return;
	relids = find_all_inheritors(relid, NoLock, NULL);
	foreach(lc, relids)
	{
		if (es_relid_is_event_table(lfirst_oid(lc)))
			recheck_roles(lfirst_oid(lc), rename);
	}
}

/* ---- publications ---- */

static void
warn_about_publication(const char *name)
{
	StringInfoData query;
	Oid			   am = es_am_oid();

	if (!OidIsValid(am))
		return;
	initStringInfo(&query);
	appendStringInfo(&query,
					 "SELECT count(*) FROM pg_catalog.pg_publication_tables p"
					 " JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=)"
					 " pg_catalog.format('%%I.%%I', p.schemaname, p.tablename)::pg_catalog.regclass"
					 " WHERE p.pubname OPERATOR(pg_catalog.=) %s AND c.relam OPERATOR(pg_catalog.=) %u",
					 quote_literal_cstr(name), am);
	CommandCounterIncrement();
	SPI_connect();
	if (SPI_execute(query.data, false, 1) == SPI_OK_SELECT && SPI_processed == 1)
	{
		bool  isnull;
		int64 n = DatumGetInt64(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));

		if (n > 0)
			ereport(WARNING,
					(errmsg("publication \"%s\" contains event_store tables, and carries none of their rows",
							name),
					 errhint("Followers read events with event_store.read_all() and wait_for_events().")));
	}
	SPI_finish();
}

/* ---- CREATE DATABASE ---- */

static void
check_template(CreatedbStmt *stmt)
{
	const char *template = "template1";
	Oid		  dbid;
	ListCell *lc;

	foreach(lc, stmt->options)
	{
		DefElem *def = lfirst_node(DefElem, lc);

		if (strcmp(def->defname, "template") == 0 && def->arg != NULL)
			template = defGetString(def);
	}
	dbid = get_database_oid(template, true);
	if (!OidIsValid(dbid) || pg_atomic_read_u32(&es_shared->store_ready) == 0)
		return;

	for (int s = 0; s < es_shared->nshards; s++)
	{
		EsStatRequest	   req = {.req = {.type = ES_REQ_STAT}, .kind = ES_STAT_TABLES};
		EsPart			   part = {&req, sizeof(req)};
		EsAnswer		  *answer = es_channel_call(s, &req.req, &part, 1);
		const EsTableStat *stat = (const EsTableStat *) (answer + 1);
		uint64			   n = (answer->len - sizeof(EsAnswer)) / sizeof(EsTableStat);

		for (uint64 i = 0; i < n; i++)
		{
			if (stat[i].table.database != dbid || stat[i].segment_rows + stat[i].memtable_rows == 0)
				continue;
			ereport(
				ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("cannot create a database from template \"%s\", whose event_store tables hold rows",
						template),
				 errdetail("Events lie outside the database's directory and would not be copied."),
				 errhint(
					 "Copy it with pg_dump, or empty its event tables (rows of dropped tables count until they are collected).")));
		}
		pfree(answer);
	}
}

static void
es_process_utility(PlannedStmt *pstmt, const char *query_string, bool read_only,
				   ProcessUtilityContext context, ParamListInfo params, QueryEnvironment *env,
				   DestReceiver *dest, QueryCompletion *qc)
{
	Node *node = pstmt->utilityStmt;
	Node *copy = NULL;

	if (es_shared != NULL)
	{
		if (IsA(node, CreatedbStmt))
			check_template((CreatedbStmt *) node);
		/* the statement's own tree may be changed while it runs */
		if (IsA(node, AlterTableStmt) || IsA(node, RenameStmt) || IsA(node, CreatePublicationStmt) ||
			IsA(node, AlterPublicationStmt))
			copy = copyObject(node);
	}

	if (previous_process_utility)
		previous_process_utility(pstmt, query_string, read_only, context, params, env, dest, qc);
	else
		standard_ProcessUtility(pstmt, query_string, read_only, context, params, env, dest, qc);

	if (es_shared == NULL || !IsTransactionState())
		return;
	if (copy == NULL || !OidIsValid(es_am_oid()))
		return;
	if (IsA(copy, AlterTableStmt))
		recheck_with_children(((AlterTableStmt *) copy)->relation, false);
	else if (IsA(copy, RenameStmt))
	{
		RenameStmt *stmt = (RenameStmt *) copy;

		if (stmt->renameType == OBJECT_COLUMN && stmt->relation != NULL)
			recheck_with_children(stmt->relation, true);
	}
	else if (IsA(copy, CreatePublicationStmt))
		warn_about_publication(((CreatePublicationStmt *) copy)->pubname);
	else
		warn_about_publication(((AlterPublicationStmt *) copy)->pubname);
}

/* Tables and databases that go leave storages behind. */
static void
es_object_access(ObjectAccessType access, Oid class_id, Oid object_id, int sub_id, void *arg)
{
	if (previous_object_access)
		previous_object_access(access, class_id, object_id, sub_id, arg);
	if (access != OAT_DROP || sub_id != 0 || es_shared == NULL)
		return;
	if (class_id == DatabaseRelationId ||
		(class_id == RelationRelationId && es_relid_is_event_table(object_id)))
		es_storages_changed = true;
}

void
es_tam_init(void)
{
	es_xact_init();
	previous_object_access = object_access_hook;
	object_access_hook = es_object_access;
	previous_executor_start = ExecutorStart_hook;
	ExecutorStart_hook = es_executor_start;
	previous_process_utility = ProcessUtility_hook;
	ProcessUtility_hook = es_process_utility;
}
