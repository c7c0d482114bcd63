/*-------------------------------------------------------------------------
 *
 * append.h
 *	  What append.c and append_plan.c share.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SQLFN_APPEND_H
#define ES_SQLFN_APPEND_H

#include "postgres.h"

#include "executor/spi.h"
#include "utils/relcache.h"

/* Columns of append()'s INSERT besides the context; parameters come in this order behind it. */
#define ES_INSERT_EVENT_TYPE 0x01
#define ES_INSERT_PAYLOAD	 0x02
#define ES_INSERT_EVENT_ID	 0x04
#define ES_INSERT_METADATA	 0x08
#define ES_INSERT_VERSION	 0x10

typedef struct EsInsertPlan EsInsertPlan;

/*
 * The plan of INSERT into the columns, made if there is none.  *used = what the caller releases behind its
 * execution, whatever happens; NULL: nothing, the plan is gone with SPI_finish.
 */
extern SPIPlanPtr
es_insert_plan(Relation rel, AttrNumber context, int columns, Oid *argtypes, EsInsertPlan *volatile *used);
extern void es_insert_plan_release(EsInsertPlan *plan);

#endif /* ES_SQLFN_APPEND_H */
