/*-------------------------------------------------------------------------
 *
 * args.c
 *	  What the SQL functions share (args.h).
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/rls.h"
#include "utils/typcache.h"

#include "core/route.h"
#include "ipc/protocol.h"
#include "ipc/shmem.h"
#include "sqlfn/args.h"
#include "tam/tam.h"

void
es_check_store_acl(Oid relid, AclMode mode)
{
	AclResult acl = pg_class_aclcheck(relid, GetUserId(), mode);

	if (acl != ACLCHECK_OK)
		aclcheck_error(acl, OBJECT_TABLE, get_rel_name(relid));
}

Relation
es_open_store(FunctionCallInfo fcinfo, int arg, LOCKMODE lock, AclMode mode)
{
	Relation rel;

	if (PG_ARGISNULL(arg))
		ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("store must not be NULL")));
	/* before the lock: who may not read a table shall not queue for it either */
	if (mode != 0)
		es_check_store_acl(PG_GETARG_OID(arg), mode);
	rel = es_table_open(PG_GETARG_OID(arg), lock);
	es_wait_store_ready();
	es_check_has_context(rel);
	return rel;
}

bool
es_rls_applies(Oid relid)
{
	return check_enable_rls(relid, InvalidOid, false) == RLS_ENABLED;
}

bool
es_sees_any(Relation rel, const char *where, bool read_only)
{
	char *sql;
	bool  sees;
	int	  result;

	if (pg_class_aclcheck(RelationGetRelid(rel), GetUserId(), ACL_SELECT) != ACLCHECK_OK)
		return false;
	sql = psprintf("SELECT FROM ONLY %s WHERE %s LIMIT 1",
				   quote_qualified_identifier(get_namespace_name(RelationGetNamespace(rel)),
											  RelationGetRelationName(rel)),
				   where);
	SPI_connect();
	result = SPI_execute(sql, read_only, 1);
	if (result != SPI_OK_SELECT)
		elog(ERROR, "unexpected result of SELECT: %s", SPI_result_code_string(result));
	sees = SPI_processed > 0;
	SPI_finish();
	pfree(sql);
	return sees;
}

int
es_column_number(Relation rel, const char *name)
{
	TupleDesc desc = RelationGetDescr(rel);

	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);

		if (!att->attisdropped && strcmp(NameStr(att->attname), name) == 0)
			return i + 1;
	}
	return 0;
}

static Datum
input_value(Relation rel, int attno, const char *text)
{
	Form_pg_attribute att = TupleDescAttr(RelationGetDescr(rel), attno - 1);
	Oid				  input;
	Oid				  ioparam;

	getTypeInputInfo(att->atttypid, &input, &ioparam);
	return OidInputFunctionCall(input, unconstify(char *, text), ioparam, att->atttypmod);
}

void
es_context_arg(Relation rel, const char *text, EsContextArg *result)
{
	EsRoles			  roles = es_table_info(rel)->roles;
	Form_pg_attribute att = TupleDescAttr(RelationGetDescr(rel), roles.context - 1);
	const void		 *value;

	memset(result, 0, sizeof(*result));
	result->value = input_value(rel, roles.context, text);
	value = att->attbyval ? (const void *) &result->value : DatumGetPointer(result->value);
	es_context_bytes(roles.context_class, att->attlen, value, &result->scratch, &result->bytes, &result->len);
	result->hash = es_context_hash(roles.context_class, result->bytes, result->len);
	result->shard = es_shard_of_hash(result->hash);
}

static void
append_padded(StringInfo buf, const void *data, size_t len)
{
	static const char zeros[8] = {0};

	if (len > 0)
		appendBinaryStringInfo(buf, data, len);
	appendBinaryStringInfo(buf, zeros, MAXALIGN(len) - len);
}

static size_t
begin_filter(StringInfo buf, int column, int op, int kind, int nvalues)
{
	EsFilter f = {.column = column, .op = op, .kind = kind, .nvalues = nvalues};
	size_t	 at = buf->len;

	append_padded(buf, &f, sizeof(f));
	return at;
}

static void
end_filter(StringInfo buf, size_t at)
{
	uint64 len = buf->len - at;

	memcpy(buf->data + at + offsetof(EsFilter, len), &len, sizeof(len));
}

void
es_filter_int64(StringInfo buf, int column, int op, int64 value)
{
	size_t at = begin_filter(buf, column, op, ES_FILTER_INT64, 1);

	append_padded(buf, &value, sizeof(value));
	end_filter(buf, at);
}

void
es_filter_bytes(StringInfo buf, int column, const void *const *values, const size_t *lens, int nvalues)
{
	size_t at =
		begin_filter(buf, column, nvalues == 1 ? ES_FILTER_EQ : ES_FILTER_IN, ES_FILTER_BYTES, nvalues);

	for (int i = 0; i < nvalues; i++)
	{
		uint64 len = lens[i];

		append_padded(buf, &len, sizeof(len));
		append_padded(buf, values[i], lens[i]);
	}
	end_filter(buf, at);
}

int
es_event_type_values(Relation rel, ArrayType *types, Datum single, bool has_single, const void ***values,
					 size_t **lens)
{
	int				  attno = es_table_info(rel)->roles.event_type;
	Form_pg_attribute att;
	Datum			 *elems;
	bool			 *nulls;
	int				  n;
	int				  used = 0;

	if (attno == 0)
		ereport(ERROR, (errcode(ERRCODE_UNDEFINED_COLUMN),
						errmsg("table \"%s\" has no column \"event_type\" of type text or an enum",
							   RelationGetRelationName(rel))));
	att = TupleDescAttr(RelationGetDescr(rel), attno - 1);
	if (has_single)
	{
		elems = &single;
		n = 1;
		nulls = NULL;
	}
	else
		deconstruct_array(types, TEXTOID, -1, false, TYPALIGN_INT, &elems, &nulls, &n);

	*values = palloc(sizeof(void *) * Max(n, 1));
	*lens = palloc(sizeof(size_t) * Max(n, 1));
	for (int i = 0; i < n; i++)
	{
		Datum value;

		if (nulls != NULL && nulls[i])
			continue; /* equal to no event type */
		if (att->atttypid == TEXTOID)
		{
			text *t = DatumGetTextPP(elems[i]);

			(*values)[used] = VARDATA_ANY(t);
			(*lens)[used] = VARSIZE_ANY_EXHDR(t);
		}
		else
		{
			Oid *oid = palloc(sizeof(Oid));

			value = input_value(rel, attno, TextDatumGetCString(elems[i]));
			*oid = DatumGetObjectId(value);
			(*values)[used] = oid;
			(*lens)[used] = sizeof(Oid);
		}
		used++;
	}
	return used;
}
