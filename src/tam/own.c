/*-------------------------------------------------------------------------
 *
 * own.c
 *	  How many rows the transaction itself has in a context: what append() adds to the committed version.
 *
 * Kept for ES_TABLE_MAX_SLOTS contexts of a table, per subtransaction, so that rolling one back takes
 * its rows out.  Rows that INSERT brought with event ids may be there already, and are then not taken at COMMIT:
 * they are "unsure" until append() has looked for them under the context's lock, and those that are not taken are
 * subtracted.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"

#include "tam/xact.h"

/*
 * When all entries are taken, one whose rows were all rolled back is given away.  A row that finds none is
 * not counted; but then all entries have rows older than it, which no savepoint takes back without it.
 */
EsOwnContext *
es_xact_context(EsXactTable *t, uint64 hash)
{
	EsOwnContext *c = NULL;

	for (uint32 i = 0; i < t->ncontexts; i++)
	{
		if (t->contexts[i].hash == hash)
			return &t->contexts[i];
		if (t->contexts[i].ncounts == 0)
			c = &t->contexts[i];
	}
	if (t->ncontexts < ES_TABLE_MAX_SLOTS)
		c = &t->contexts[t->ncontexts++];
	if (c != NULL)
		c->hash = hash;
	return c;
}

uint32
es_own_rows(const EsOwnContext *c)
{
	int32 rows = 0;

	for (uint32 i = 0; i < c->ncounts; i++)
		rows += c->counts[i].rows;
	return rows;
}

uint32
es_own_unsure(const EsOwnContext *c)
{
	int32 unsure = 0;

	for (uint32 i = 0; i < c->ncounts; i++)
		unsure += c->counts[i].unsure;
	return unsure;
}

void
es_own_count(EsOwnContext *c, int32 rows, int32 unsure)
{
	SubTransactionId subid = GetCurrentSubTransactionId();

	if (c->ncounts == 0 || c->counts[c->ncounts - 1].subid != subid)
	{
		if (c->ncounts == c->allocated)
		{
			c->allocated = Max(4, c->allocated * 2);
			c->counts = c->counts == NULL
							? MemoryContextAlloc(es_xact->context, c->allocated * sizeof(EsOwnCount))
							: repalloc(c->counts, c->allocated * sizeof(EsOwnCount));
		}
		c->counts[c->ncounts++] = (EsOwnCount){subid, 0, 0};
	}
	c->counts[c->ncounts - 1].rows += rows;
	c->counts[c->ncounts - 1].unsure += unsure;
}

/* What was found out is forgotten with the subtransaction, whose rollback may give up the context's lock. */
void
es_own_settle(EsXactTable *t, EsOwnContext *c, uint32 unsure, uint32 not_taken)
{
	if (not_taken > 0)
		t->unchecked = true;
	es_own_count(c, -(int32) not_taken, -(int32) unsure);
}
