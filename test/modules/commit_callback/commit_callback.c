/*-------------------------------------------------------------------------
 *
 * commit_callback.c
 *	  Another library with a transaction callback.
 *
 * At PRE_COMMIT, or before PREPARE TRANSACTION, it runs the statement in
 * commit_callback.statement, which may insert or fail.  PostgreSQL calls the callback that was
 * registered last first: in shared_preload_libraries before event_store it runs after
 * event_store's, behind event_store before it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "utils/guc.h"
#include "utils/snapmgr.h"

PG_MODULE_MAGIC;

void _PG_init(void);

static char *statement = NULL;
static bool	 running = false;

static void
run_statement(void)
{
	PushActiveSnapshot(GetTransactionSnapshot());
	SPI_connect();
	if (SPI_execute(statement, false, 0) < 0)
		elog(ERROR, "commit_callback.statement failed");
	SPI_finish();
	PopActiveSnapshot();
}

static void
xact_callback(XactEvent event, void *arg)
{
	switch (event)
	{
		case XACT_EVENT_PRE_COMMIT:
		case XACT_EVENT_PRE_PREPARE:
			if (statement != NULL && statement[0] != '\0' && !running)
			{
				running = true;
				run_statement();
			}
			break;
		default:
			break;
	}
	running = false;
}

void
_PG_init(void)
{
	DefineCustomStringVariable("commit_callback.statement", "What is run when a transaction commits.", NULL,
							   &statement, "", PGC_SUSET, 0, NULL, NULL, NULL);
	RegisterXactCallback(xact_callback, NULL);
}
