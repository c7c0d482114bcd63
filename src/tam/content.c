/*-------------------------------------------------------------------------
 *
 * content.c
 *	  The hash of an event's content, by which an event id that comes again is told from one that is
 *	  used twice.
 *
 * 128 bits over the columns that make up the content: two runs of hash_bytes_extended (Bob
 * Jenkins's lookup3, as in PostgreSQL's hash functions) with different seeds, chained from column to
 * column, each with its number.  A column that has the value which it would have in a row from before it
 * was added, mostly NULL, counts for nothing: so an event that is sent again is still the same
 * after ADD COLUMN.
 *
 * A composite value keeps its fields as they came, compressed or not: it is formed anew from plain ones
 * before it is hashed.
 *
 * The hash is stored with the rows, so it belongs to the format.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/tupdesc_details.h"
#include "common/hashfn.h"
#include "fmgr.h"
#include "funcapi.h"
#include "utils/array.h"
#include "utils/lsyscache.h"
#include "utils/typcache.h"

#include "core/route.h"
#include "tam/tam.h"
#include "tam/xact.h"

bool
es_type_has_rows(Oid type)
{
	Oid base = getBaseType(type);
	Oid element = get_element_type(base);

	return type_is_rowtype(base) || (OidIsValid(element) && es_type_has_rows(element));
}

static Datum plain_value(Datum value, Oid type);

static Datum
plain_row(Datum value)
{
	HeapTupleHeader header = DatumGetHeapTupleHeader(value);
	TupleDesc		desc =
		lookup_rowtype_tupdesc(HeapTupleHeaderGetTypeId(header), HeapTupleHeaderGetTypMod(header));
	HeapTupleData tuple = {.t_len = HeapTupleHeaderGetDatumLength(header), .t_data = header};
	Datum		 *values = palloc(sizeof(Datum) * desc->natts);
	bool		 *nulls = palloc(sizeof(bool) * desc->natts);
	HeapTuple	  result;

	heap_deform_tuple(&tuple, desc, values, nulls);
	for (int i = 0; i < desc->natts; i++)
	{
		Form_pg_attribute att = TupleDescAttr(desc, i);

		nulls[i] = nulls[i] || att->attisdropped;
		if (!nulls[i] && att->attlen == -1)
			values[i] = plain_value(values[i], att->atttypid);
	}
	result = heap_form_tuple(desc, values, nulls);
	ReleaseTupleDesc(desc);
	return HeapTupleGetDatum(result);
}

static Datum
plain_array(Datum value, Oid element)
{
	ArrayType *array = DatumGetArrayTypeP(value);
	int16	   len;
	bool	   byval;
	char	   align;
	Datum	  *values;
	bool	  *nulls;
	int		   n;

	get_typlenbyvalalign(element, &len, &byval, &align);
	deconstruct_array(array, element, len, byval, align, &values, &nulls, &n);
	for (int i = 0; i < n; i++)
	{
		if (!nulls[i])
			values[i] = plain_value(values[i], element);
	}
	return PointerGetDatum(construct_md_array(values, nulls, ARR_NDIM(array), ARR_DIMS(array),
											  ARR_LBOUND(array), element, len, byval, align));
}

/* A value of variable length as it would be if nothing in it had been compressed. */
static Datum
plain_value(Datum value, Oid type)
{
	Oid base = getBaseType(type);

	if (type_is_rowtype(base))
		return plain_row(value);
	if (es_type_has_rows(base))
		return plain_array(value, get_element_type(base));
	return PointerGetDatum(PG_DETOAST_DATUM_PACKED(value));
}

/* Is it the value that rows have from before the column was added? */
static bool
is_missing_value(TupleDesc desc, int att, const EsColumnDesc *column, uint8 hashed, const void *value)
{
	Datum		missing;
	const void *other;
	const char *data[2];
	size_t		len[2];

	if (desc->constr == NULL || desc->constr->missing == NULL || !desc->constr->missing[att].am_present)
		return value == NULL;
	if (value == NULL)
		return false;
	missing = desc->constr->missing[att].am_value;
	if (column->len > 0)
	{
		other = (column->flags & ES_COLUMN_BYVAL) ? (const void *) &missing : DatumGetPointer(missing);
		return memcmp(value, other, column->len) == 0;
	}
	es_varlena_data(value, &data[0], &len[0]);
	if (hashed == ES_HASHED_ROWS)
		missing = plain_value(missing, TupleDescAttr(desc, att)->atttypid);
	es_varlena_data(PG_DETOAST_DATUM_PACKED(missing), &data[1], &len[1]);
	return len[0] == len[1] && memcmp(data[0], data[1], len[0]) == 0;
}

void
es_hash_content(TupleDesc desc, const EsTableInfo *info, const EsColumnDesc *columns,
				const void *const *values, uint64 result[2])
{
	int	  natts = info->natts;
	uint8 hashed[ES_MAX_COLUMNS];

	/* looking up types may invalidate info */
	memcpy(hashed, es_table_hashed(info), natts);
	result[0] = UINT64CONST(0x6576656e745f7374);
	result[1] = UINT64CONST(0x6f72655f636f6e74);
	for (int i = 0; i < natts; i++)
	{
		const void *value = values[i];
		const char *data = "";
		size_t		len = 0;

		if (hashed[i] == ES_HASHED_ROWS && value != NULL)
			value = DatumGetPointer(plain_value(PointerGetDatum(value), TupleDescAttr(desc, i)->atttypid));
		if (!hashed[i] || is_missing_value(desc, i, &columns[i], hashed[i], value))
			continue;
		if (value != NULL)
		{
			if (columns[i].len > 0)
			{
				data = value;
				len = columns[i].len;
			}
			else
				es_varlena_data(value, &data, &len);
		}
		for (int k = 0; k < 2; k++)
			result[k] = hash_bytes_extended((const unsigned char *) data, (int) len,
											result[k] * 31 + (uint64) i * 2 + (value != NULL));
	}
}
