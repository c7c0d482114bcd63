/*-------------------------------------------------------------------------
 *
 * roles.h
 *	  What DDL means for the roles of columns.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_TAM_ROLES_H
#define ES_TAM_ROLES_H

#include "postgres.h"

#include "nodes/pg_list.h"
#include "nodes/primnodes.h"

/* Event tables whose columns a utility statement touches; on the stack of whoever runs it. */
typedef struct EsRolesWatch
{
	struct EsRolesWatch *previous; /* of the statement that this one is a part of */
	MemoryContext		 context;
	List				*touched;
} EsRolesWatch;

/* A statement begins, and ends, also by an ERROR. */
extern void es_roles_watch(EsRolesWatch *w);
extern void es_roles_unwatch(EsRolesWatch *w);

/*
 * A column of the relation was added, or was changed (its table is locked, its file is still the
 * old one), or will be dropped; from the object access hook.
 */
extern void es_roles_touch(Oid relid, bool changed);

/*
 * Behind the statement: ERROR if a table with rows has lost a role.  altered: the table that an ALTER
 * TABLE names, or NULL.  rename: columns have new names.
 */
extern void es_roles_check(EsRolesWatch *w, const RangeVar *altered, bool rename);

/*
 * ERROR if something would be computed from position or version before the store fills them: in a table that CREATE TABLE
 * has made, and in one (locked) that is rewritten, if that makes it an event table.
 */
extern void es_roles_created(const RangeVar *created);
extern void es_roles_rewrite(Oid relid);

#endif /* ES_TAM_ROLES_H */
