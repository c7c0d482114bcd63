/*-------------------------------------------------------------------------
 *
 * hooks.c
 *	  What is said when a statement starts, rather than when it meets a row, and
 *	  what follows DDL.
 *
 * ExecutorStart: UPDATE, DELETE, MERGE that changes rows, ON CONFLICT and row locks on event
 * tables are refused whether or not there are rows.
 *
 * ExecutorRun: table scans are told whether the order of rows matters (scan.h).  Before a parallel plan the
 * transaction's pending events are logged and sent, because no xid can be assigned in parallel mode
 * (PROTOCOL.md 1.6), and workers are told what is dead of it (dead.h).  Not at ExecutorStart: another portal may insert
 * before this one runs.
 *
 * ProcessUtility: behind DDL the roles of columns are looked at (roles.c), and publications of event tables
 * are warned about (publication.c).  CREATE DATABASE from a template whose event tables hold rows is
 * refused (template.c), and so is CREATE INDEX CONCURRENTLY, whose own refusal would come behind a commit.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/objectaccess.h"
#include "catalog/pg_class.h"
#include "catalog/pg_database.h"
#include "catalog/pg_inherits.h"
#include "commands/defrem.h"
#include "commands/tablecmds.h"
#include "executor/executor.h"
#include "miscadmin.h"
#include "nodes/plannodes.h"
#include "parser/parsetree.h"
#include "tcop/pquery.h"
#include "tcop/utility.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"

#include "compat.h"
#include "ipc/shmem.h"
#include "tam/dead.h"
#include "tam/publication.h"
#include "tam/roles.h"
#include "tam/scan.h"
#include "tam/tam.h"
#include "tam/template.h"
#include "tam/xact.h"

static ExecutorStart_hook_type	previous_executor_start;
static ExecutorRun_hook_type	previous_executor_run;
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

/* The table, or a partition that its rows may go to; InvalidOid = they go to no event table. */
static Oid
event_table_among(Oid relid)
{
	ListCell *lc;

	if (get_rel_relkind(relid) != RELKIND_PARTITIONED_TABLE)
		return relid;
	foreach(lc, find_all_inheritors(relid, NoLock, NULL))
	{
		if (es_relid_is_event_table(lfirst_oid(lc)))
			return lfirst_oid(lc);
	}
	return InvalidOid;
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

		if (node->operation == CMD_INSERT)
		{
			if (node->onConflictAction == ONCONFLICT_NONE)
				continue;
			relid = event_table_among(relid);
		}
		if (!OidIsValid(relid) || !es_relid_is_event_table(relid))
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

	if (previous_executor_start)
		previous_executor_start(query, eflags);
	else
		standard_ExecutorStart(query, eflags);
}

/*
 * Does nobody store rows in the order in which the query reads others?  A cursor may be pg_dump's (--inserts), or a
 * loop's that inserts what it fetches.
 */
static bool
only_reads(const QueryDesc *query)
{
	if (ActivePortal != NULL && ActivePortal->queryDesc == query && ActivePortal->name[0] != '\0')
		return false;
	if (query->operation == CMD_INSERT || query->operation == CMD_MERGE ||
		query->plannedstmt->hasModifyingCTE)
		return false;
	switch (query->dest->mydest)
	{
		case DestIntoRel:
		case DestTransientRel:
		case DestCopyOut:
			return false;
		default:
			return true;
	}
}

static void
run_next(ES_EXECUTOR_RUN_PARAMS)
{
	if (previous_executor_run)
		previous_executor_run(ES_EXECUTOR_RUN_ARGS);
	else
		standard_ExecutorRun(ES_EXECUTOR_RUN_ARGS);
}

static void
run_query(ES_EXECUTOR_RUN_PARAMS)
{
	dsm_segment *outer;

	if (query->plannedstmt->parallelModeNeeded)
		es_xact_send_all();
	if (!query->plannedstmt->parallelModeNeeded || !es_dead_publish(&outer))
	{
		run_next(ES_EXECUTOR_RUN_ARGS);
		return;
	}
	PG_TRY();
	{
		run_next(ES_EXECUTOR_RUN_ARGS);
	}
	PG_FINALLY();
	{
		es_dead_withdraw(outer);
	}
	PG_END_TRY();
}

static void
es_executor_run(ES_EXECUTOR_RUN_PARAMS)
{
	/* a query is at work to which order matters: so it does to those of functions that it calls */
	static bool order_matters = false;
	bool		outer = es_scan_any_order;
	bool		wanted = !order_matters && only_reads(query);

	if (order_matters || (wanted && outer))
	{
		run_query(ES_EXECUTOR_RUN_ARGS);
		return;
	}
	order_matters = !wanted;
	es_scan_any_order = wanted;
	PG_TRY();
	{
		run_query(ES_EXECUTOR_RUN_ARGS);
	}
	PG_FINALLY();
	{
		order_matters = false;
		es_scan_any_order = outer;
	}
	PG_END_TRY();
}

/* ---- utility statements ---- */

/* An index built concurrently would be there, invalid, when its building is refused. */
static void
check_index(IndexStmt *stmt)
{
	Oid relid;

	if (!stmt->concurrent || stmt->relation == NULL)
		return;
	relid = RangeVarGetRelid(stmt->relation, NoLock, true);
	if (OidIsValid(relid) && es_relid_is_event_table(relid) && es_owns_relation(relid))
		refuse(relid, "create an index on", ES_HINT_INDEX);
}

/* ALTER TABLE … SET UNLOGGED, and SET ACCESS METHOD of an unlogged table: said before a transient table is made. */
static void
check_unlogged(AlterTableStmt *stmt)
{
	bool	  unlogged = false;
	bool	  logged = false;
	bool	  to_event_store = false;
	Oid		  relid;
	ListCell *lc;

	if (stmt->objtype != OBJECT_TABLE)
		return;
	foreach(lc, stmt->cmds)
	{
		AlterTableCmd *cmd = lfirst_node(AlterTableCmd, lc);

		unlogged = unlogged || cmd->subtype == AT_SetUnLogged;
		logged = logged || cmd->subtype == AT_SetLogged;
		if (cmd->subtype == AT_SetAccessMethod && cmd->name != NULL)
			to_event_store = OidIsValid(es_am_oid()) && get_table_am_oid(cmd->name, true) == es_am_oid();
	}
	if (!unlogged && (!to_event_store || logged))
		return;
	relid = RangeVarGetRelid(stmt->relation, NoLock, true);
	if (!OidIsValid(relid) || get_rel_relkind(relid) != RELKIND_RELATION || !es_owns_relation(relid))
		return;
	if (unlogged && (to_event_store || es_relid_is_event_table(relid)))
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("event_store table \"%s\" cannot be unlogged", get_rel_name(relid)),
				 errhint("Events are as durable as any row; unlogged tables can be made USING heap.")));
	if (!unlogged && to_event_store && get_rel_persistence(relid) == RELPERSISTENCE_UNLOGGED)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("unlogged table \"%s\" cannot use access method event_store", get_rel_name(relid)),
				 errhint("Make it a logged one first, with ALTER TABLE … SET LOGGED.")));
}

/*
 * ALTER TABLE … SET ACCESS METHOD away from event_store: the new table may need a TOAST table, which the
 * rewrite makes only for a table that has one.
 */
static void
prepare_toast(AlterTableStmt *stmt)
{
	ListCell *lc;

	if (stmt->objtype != OBJECT_TABLE || !IsTransactionState() || !OidIsValid(es_am_oid()))
		return;
	foreach(lc, stmt->cmds)
	{
		AlterTableCmd *cmd = lfirst_node(AlterTableCmd, lc);
		Oid			   relid;

		if (cmd->subtype != AT_SetAccessMethod ||
			(cmd->name != NULL && get_table_am_oid(cmd->name, true) == es_am_oid()))
			continue;
		/* the lock that the command takes, with its check of who may */
		relid = RangeVarGetRelidExtended(stmt->relation, AccessExclusiveLock, RVR_MISSING_OK,
										 RangeVarCallbackOwnsRelation, NULL);
		if (OidIsValid(relid) && es_relid_is_event_table(relid))
			es_make_toast_table(relid);
	}
}

/* What follows a statement that has succeeded; `node` is a copy of its tree if it is one of those. */
static void
after_utility(Node *node, EsRolesWatch *watch)
{
	const RangeVar *altered = NULL;
	bool			rename = false;
	ListCell	   *lc;

	if (node != NULL)
	{
		switch (nodeTag(node))
		{
			case T_AlterTableStmt:
				altered = ((AlterTableStmt *) node)->relation;
				break;
			case T_RenameStmt:
				rename = true;
				break;
			default:
				break;
		}
	}
	es_roles_check(watch, altered, rename);
	if (node == NULL)
		return;

	switch (nodeTag(node))
	{
		case T_CreatePublicationStmt:
			es_publication_made(((CreatePublicationStmt *) node)->pubname);
			break;
		case T_AlterPublicationStmt:
			es_publication_made(((AlterPublicationStmt *) node)->pubname);
			break;
		case T_CreateStmt:
			es_roles_created(((CreateStmt *) node)->relation);
			es_publication_table_made(((CreateStmt *) node)->relation);
			break;
		case T_CreateTableAsStmt:
			es_publication_table_made(((CreateTableAsStmt *) node)->into->rel);
			break;
		case T_AlterObjectSchemaStmt:
			if (((AlterObjectSchemaStmt *) node)->objectType == OBJECT_TABLE)
				es_publication_table_moved(((AlterObjectSchemaStmt *) node)->relation,
										   ((AlterObjectSchemaStmt *) node)->newschema);
			break;
		case T_AlterTableStmt:
			foreach(lc, ((AlterTableStmt *) node)->cmds)
			{
				AlterTableCmd *cmd = lfirst_node(AlterTableCmd, lc);

				if (cmd->subtype == AT_SetAccessMethod)
					es_publication_table_made(altered);
				else if (cmd->subtype == AT_AttachPartition)
					es_publication_table_made(castNode(PartitionCmd, cmd->def)->name);
			}
			break;
		default:
			break;
	}
}

static void
run_utility(PlannedStmt *pstmt, const char *query_string, bool read_only, ProcessUtilityContext context,
			ParamListInfo params, QueryEnvironment *env, DestReceiver *dest, QueryCompletion *qc,
			EsRolesWatch *watch)
{
	bool any_order = es_scan_any_order;

	/* a rewrite, COPY and the like */
	es_scan_any_order = false;
	PG_TRY();
	{
		if (previous_process_utility)
			previous_process_utility(pstmt, query_string, read_only, context, params, env, dest, qc);
		else
			standard_ProcessUtility(pstmt, query_string, read_only, context, params, env, dest, qc);
	}
	PG_CATCH();
	{
		es_scan_any_order = any_order;
		es_roles_unwatch(watch);
		es_template_end();
		PG_RE_THROW();
	}
	PG_END_TRY();
	es_scan_any_order = any_order;
	es_roles_unwatch(watch);
	es_template_end();
}

static void
es_process_utility(PlannedStmt *pstmt, const char *query_string, bool read_only,
				   ProcessUtilityContext context, ParamListInfo params, QueryEnvironment *env,
				   DestReceiver *dest, QueryCompletion *qc)
{
	Node		*node = pstmt->utilityStmt;
	Node		*copy = NULL;
	EsRolesWatch watch;

	if (es_shared != NULL)
	{
		/* the statement's own tree may be changed while it runs */
		switch (nodeTag(node))
		{
			case T_CreatedbStmt:
				es_template_begin((CreatedbStmt *) node);
				break;
			case T_IndexStmt:
				check_index((IndexStmt *) node);
				break;
			case T_AlterTableStmt:
				check_unlogged((AlterTableStmt *) node);
				prepare_toast((AlterTableStmt *) node);
				copy = copyObject(node);
				break;
			case T_RenameStmt:
			case T_CreatePublicationStmt:
			case T_AlterPublicationStmt:
			case T_CreateStmt:
			case T_AlterObjectSchemaStmt:
				copy = copyObject(node);
				break;
			case T_CreateTableAsStmt:
				/* its query is large, and not needed */
				copy = (Node *) makeNode(CreateTableAsStmt);
				((CreateTableAsStmt *) copy)->into = copyObject(((CreateTableAsStmt *) node)->into);
				break;
			default:
				break;
		}
	}

	es_roles_watch(&watch);
	run_utility(pstmt, query_string, read_only, context, params, env, dest, qc, &watch);
	if (es_shared != NULL && (copy != NULL || watch.touched != NIL) && IsTransactionState() &&
		OidIsValid(es_am_oid()))
		after_utility(copy, &watch);
}

/* Tables and databases that go leave storages behind; columns may have a role; databases are made of others. */
static void
es_object_access(ObjectAccessType access, Oid class_id, Oid object_id, int sub_id, void *arg)
{
	if (previous_object_access)
		previous_object_access(access, class_id, object_id, sub_id, arg);
	if (es_shared == NULL)
		return;
	if (class_id == RelationRelationId && sub_id > 0 &&
		(access == OAT_POST_CREATE || access == OAT_POST_ALTER || access == OAT_DROP))
		es_roles_touch(object_id, access == OAT_POST_ALTER);
	if (access == OAT_DROP && sub_id == 0 &&
		(class_id == DatabaseRelationId ||
		 (class_id == RelationRelationId && es_relid_is_event_table(object_id))))
		es_storages_changed = true;
	if (access == OAT_POST_CREATE && class_id == DatabaseRelationId)
		es_template_check();
}

void
es_tam_init(void)
{
	es_xact_init();
	/* nothing is said of what pg_upgrade makes again: it was when it was made */
	if (IsBinaryUpgrade)
		return;
	previous_object_access = object_access_hook;
	object_access_hook = es_object_access;
	previous_executor_start = ExecutorStart_hook;
	ExecutorStart_hook = es_executor_start;
	previous_executor_run = ExecutorRun_hook;
	ExecutorRun_hook = es_executor_run;
	previous_process_utility = ProcessUtility_hook;
	ProcessUtility_hook = es_process_utility;
}
