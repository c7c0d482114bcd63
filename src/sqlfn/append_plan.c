/*-------------------------------------------------------------------------
 *
 * append_plan.c
 *	  The plans of append()'s INSERTs.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "lib/stringinfo.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"

#include "sqlfn/append.h"

/*
 * Plans of INSERT per table and set of columns, for the life of the backend.  A trigger that calls
 * append() runs while the outer call's plan does: what is in use is not freed.
 */
struct EsInsertPlan
{
	Oid		   relid;	/* hash key */
	int		   columns; /* bits: event_type, payload, event_id, metadata, version */
	SPIPlanPtr plan;
	int		   users; /* calls that execute it */
};

#define MAX_PLANS 64
static EsInsertPlan plans[MAX_PLANS];
static int			next_plan;

/* NULL: all slots are in use. */
static EsInsertPlan *
free_slot(void)
{
	for (int i = 0; i < MAX_PLANS; i++)
	{
		EsInsertPlan *p = &plans[next_plan];

		next_plan = (next_plan + 1) % MAX_PLANS;
		if (p->users == 0)
			return p;
	}
	return NULL;
}

SPIPlanPtr
es_insert_plan(Relation rel, AttrNumber context_att, int columns, Oid *argtypes, EsInsertPlan *volatile *used)
{
	static const char *const names[] = {"event_type", "payload", "event_id", "metadata", "version"};
	Oid						 relid = RelationGetRelid(rel);
	Form_pg_attribute		 context = TupleDescAttr(RelationGetDescr(rel), context_att - 1);
	StringInfoData			 sql;
	StringInfoData			 values;
	EsInsertPlan			*p;
	SPIPlanPtr				 plan;
	int						 n = 1;

	for (int i = 0; i < MAX_PLANS; i++)
	{
		p = &plans[i];
		if (p->relid == relid && p->columns == columns && p->plan != NULL && SPI_plan_is_valid(p->plan))
		{
			p->users++;
			*used = p;
			return p->plan;
		}
	}

	initStringInfo(&sql);
	initStringInfo(&values);
	appendStringInfo(&sql, "INSERT INTO %s (%s",
					 quote_qualified_identifier(get_namespace_name(RelationGetNamespace(rel)),
												RelationGetRelationName(rel)),
					 quote_identifier(NameStr(context->attname)));
	appendStringInfoString(&values, "$1");
	for (int i = 0; i < (int) lengthof(names); i++)
	{
		if ((columns & (1 << i)) == 0)
			continue;
		n++;
		appendStringInfo(&sql, ", %s", names[i]);
		appendStringInfo(&values, ", $%d", n);
	}
	appendStringInfo(&sql, ") VALUES (%s)", values.data);

	plan = SPI_prepare(sql.data, n, argtypes);
	if (plan == NULL)
		elog(ERROR, "SPI_prepare failed: %s", SPI_result_code_string(SPI_result));
	p = free_slot();
	if (p == NULL)
		return plan;
	if (p->plan != NULL)
		SPI_freeplan(p->plan);
	p->plan = NULL;
	SPI_keepplan(plan);
	p->relid = relid;
	p->columns = columns;
	p->plan = plan;
	p->users = 1;
	*used = p;
	return plan;
}

void
es_insert_plan_release(EsInsertPlan *plan)
{
	plan->users--;
}
