/*-------------------------------------------------------------------------
 *
 * refusal.c
 *	  Errors that name a context: what a shard refuses at PREPARE, said in the words of the
 *	  session that hears it.
 *
 * A shard knows a context as bytes of a class (core/route.h).  Dates depend on the session's settings and enums on a
 * catalog, so the text is made here.  Where row security hides rows from the user, the detail, which
 * tells the context's actual version, is left out, as PostgreSQL does for the keys of unique indexes.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/relation.h"
#include "mb/pg_wchar.h"
#include "utils/date.h"
#include "utils/fmgrprotos.h"
#include "utils/rel.h"
#include "utils/rls.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"

#include "compat.h"
#include "core/format.h"
#include "tam/refusal.h"
#include "tam/xact.h"

#define MAX_SHOWN 200 /* bytes of a context */

bool
es_may_tell_versions(Oid relid)
{
	return check_enable_rls(relid, InvalidOid, true) != RLS_ENABLED;
}

/* `sent` bytes of a text of `len` bytes. */
static char *
clipped(const char *text, size_t sent, size_t len)
{
	size_t n = sent <= MAX_SHOWN ? sent : pg_mbcliplen(text, sent, MAX_SHOWN);

	return psprintf("%.*s%s", (int) n, text, n < len ? "..." : "");
}

char *
es_context_for_message(const char *text)
{
	return clipped(text, strlen(text), strlen(text));
}

static char *
hex(const uint8 *bytes, size_t sent, size_t len)
{
	StringInfoData text;

	initStringInfo(&text);
	appendStringInfoString(&text, "\\x");
	for (size_t i = 0; i < Min(sent, MAX_SHOWN / 2); i++)
		appendStringInfo(&text, "%02x", bytes[i]);
	if (len > MAX_SHOWN / 2)
		appendStringInfoString(&text, "...");
	return text.data;
}

static char *
context_text(const EsRefusal *r)
{
	const char *bytes = (const char *) (r + 1);
	int64		n = 0;
	Datum		text = (Datum) 0;

	if (r->context_class == ES_CONTEXT_STRING)
		return clipped(bytes, r->context_sent, r->context_len);
	if (r->context_class == ES_CONTEXT_UUID && r->context_len == UUID_LEN)
		return DatumGetCString(DirectFunctionCall1(uuid_out, PointerGetDatum(bytes)));
	if (r->context_len != sizeof(n))
		return hex((const uint8 *) bytes, r->context_sent, r->context_len);

	memcpy(&n, bytes, sizeof(n));
	switch ((EsContextClass) r->context_class)
	{
		case ES_CONTEXT_DATE:
			text = DirectFunctionCall1(date_out, DateADTGetDatum((DateADT) n));
			break;
		case ES_CONTEXT_TIMESTAMPTZ:
			text = DirectFunctionCall1(timestamptz_out, TimestampTzGetDatum(n));
			break;
		case ES_CONTEXT_BOOL:
			return pstrdup(n != 0 ? "t" : "f");
		case ES_CONTEXT_ENUM:
			text = DirectFunctionCall1(enum_out, ObjectIdGetDatum((Oid) n));
			break;
		case ES_CONTEXT_INTEGER:
			return psprintf(INT64_FORMAT, n);
		case ES_CONTEXT_BYTEA:
		case ES_CONTEXT_STRING:
		case ES_CONTEXT_UUID:
			return hex((const uint8 *) bytes, r->context_sent, r->context_len);
	}
	return DatumGetCString(text);
}

void
es_raise_refusal(const EsRefusal *r)
{
	const char	*message = (const char *) (r + 1) + MAXALIGN(r->context_sent);
	const char	*detail = message + strlen(message) + 1;
	const char	*hint = detail + strlen(detail) + 1;
	const char	*place = strstr(message, ES_REFUSAL_CONTEXT);
	EsXactTable *t = es_xact_table(&r->table);
	/* locked by the transaction; gone if it was a rewrite's transient one, or was dropped */
	Relation	   rel = t != NULL ? try_relation_open(t->relid, NoLock) : NULL;
	StringInfoData text;

	initStringInfo(&text);
	if (place != NULL)
		appendStringInfo(&text, "%.*s%s%s", (int) (place - message), message, context_text(r),
						 place + strlen(ES_REFUSAL_CONTEXT));
	else
		appendStringInfoString(&text, message);
	ereport(ERROR, (errcode(r->sqlerrcode), errmsg_internal("%s", text.data),
					detail[0] != '\0' && (rel == NULL || es_may_tell_versions(RelationGetRelid(rel)))
						? errdetail_internal("%s", detail)
						: 0,
					hint[0] != '\0' ? errhint("%s", hint) : 0, rel != NULL ? errtable(rel) : 0));
}
