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
 * The hash is stored with the rows, so it belongs to the format.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/tupdesc_details.h"
#include "common/hashfn.h"
#include "fmgr.h"

#include "core/route.h"
#include "tam/tam.h"
#include "tam/xact.h"

/* Is it the value that rows have from before the column was added? */
static bool
is_missing_value(TupleDesc desc, int att, const EsColumnDesc *column, const void *value)
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
	es_varlena_data(PG_DETOAST_DATUM_PACKED(missing), &data[1], &len[1]);
	return len[0] == len[1] && memcmp(data[0], data[1], len[0]) == 0;
}

void
es_hash_content(TupleDesc desc, const EsTableInfo *info, const EsColumnDesc *columns,
				const void *const *values, uint64 result[2])
{
	const bool *hashed = es_table_hashed(info);

	result[0] = UINT64CONST(0x6576656e745f7374);
	result[1] = UINT64CONST(0x6f72655f636f6e74);
	for (int i = 0; i < info->natts; i++)
	{
		const char *data = "";
		size_t		len = 0;

		if (!hashed[i] || is_missing_value(desc, i, &columns[i], values[i]))
			continue;
		if (values[i] != NULL)
		{
			if (columns[i].len > 0)
			{
				data = values[i];
				len = columns[i].len;
			}
			else
				es_varlena_data(values[i], &data, &len);
		}
		for (int k = 0; k < 2; k++)
			result[k] = hash_bytes_extended((const unsigned char *) data, (int) len,
											result[k] * 31 + (uint64) i * 2 + (values[i] != NULL));
	}
}
