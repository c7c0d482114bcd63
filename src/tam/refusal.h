/*-------------------------------------------------------------------------
 *
 * refusal.h
 *	  Errors that name a context.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_TAM_REFUSAL_H
#define ES_TAM_REFUSAL_H

#include "postgres.h"

#include "compat.h"
#include "ipc/protocol.h"

/* What PREPARE refuses, as the error that it is. */
extern void es_raise_refusal(const EsRefusal *r) pg_attribute_noreturn();

/* A context as text, cut short where it is long: it may have any size. */
extern char *es_context_for_message(const char *text);

/* May the current user be told which versions a context of the table has?  Not if row security hides rows. */
extern bool es_may_tell_versions(Oid relid);

#endif /* ES_TAM_REFUSAL_H */
