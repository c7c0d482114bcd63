/*-------------------------------------------------------------------------
 *
 * scan.c
 *	  Scans as a shard answers them: any filters, orders and bounds.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/table.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "portability/instr_time.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/tuplestore.h"

#include "core/batch.h"
#include "core/route.h"
#include "event_store_test.h"
#include "ipc/channel.h"
#include "tam/reader.h"
#include "tam/tam.h"
#include "tam/xact.h"

PG_FUNCTION_INFO_V1(est_scan);
PG_FUNCTION_INFO_V1(est_scan_stats);

typedef struct ScanResult
{
	uint64 rows;
	uint64 answers;
	uint64 scanned;
	uint64 pruned;
	uint64 largest; /* bytes of an answer */
} ScanResult;

/* 'column op kind value value ...': op eq in lt le gt ge isnull notnull; kind i or b (bytes as hex) */
static void
add_filter(StringInfo buf, char *text)
{
	static const char *const ops[] = {"", "eq", "in", "lt", "le", "gt", "ge", "isnull", "notnull"};
	EsFilter				 f = {0};
	int						 at = buf->len;
	char					*save = NULL;
	char					*word = strtok_r(text, " ", &save);

	f.column = (uint16) (atoi(word) - 1);
	word = strtok_r(NULL, " ", &save);
	for (int i = 1; i < lengthof(ops); i++)
		if (strcmp(word, ops[i]) == 0)
			f.op = i;
	word = strtok_r(NULL, " ", &save);
	f.kind = word != NULL && word[0] == 'b' ? ES_FILTER_BYTES : ES_FILTER_INT64;
	appendBinaryStringInfo(buf, (char *) &f, sizeof(f));
	while (word != NULL && (word = strtok_r(NULL, " ", &save)) != NULL)
	{
		if (f.kind == ES_FILTER_INT64)
		{
			int64 v = strtoll(word, NULL, 10);

			appendBinaryStringInfo(buf, (char *) &v, sizeof(v));
		}
		else
		{
			uint64			  n = strcmp(word, "-") == 0 ? 0 : strlen(word) / 2;
			static const char zeros[8] = {0};

			appendBinaryStringInfo(buf, (char *) &n, sizeof(n));
			for (uint64 i = 0; i < n; i++)
			{
				unsigned int byte;

				sscanf(word + 2 * i, "%2x", &byte);
				appendStringInfoChar(buf, (char) byte);
			}
			appendBinaryStringInfo(buf, zeros, MAXALIGN(n) - n);
		}
		f.nvalues++;
	}
	f.len = buf->len - at;
	memcpy(buf->data + at, &f, sizeof(f));
}

static void
put_rows(const EsDataAnswer *a, Tuplestorestate *store, TupleDesc desc)
{
	EsBatchView v;
	EsError		err;

	if (es_batch_open(a + 1, a->batch_len, &v, &err) != ES_OK)
		elog(ERROR, "malformed batch in an answer: %s", err.what);
	if (v.header->nrows != a->nrows)
		elog(ERROR, "an answer says %lu rows, its batch %u", (unsigned long) a->nrows, v.header->nrows);
	for (uint32 row = 0; row < v.header->nrows && store != NULL; row++)
	{
		bool  own = (v.header->flags & ES_BATCH_OWN_ROWS) != 0;
		Datum values[3];
		bool  nulls[3] = {false, false, false};

		values[0] = Int64GetDatum(v.positions ? (int64) v.positions[row] : 0);
		values[1] = Int64GetDatum(v.versions ? (int64) v.versions[row] : 0);
		values[2] = BoolGetDatum(own);
		tuplestore_putvalues(store, desc, values, nulls);
	}
}

static void
scan_shard(FunctionCallInfo fcinfo, Relation rel, int shard, const EsSnapshot *snap,
		   const StringInfoData *filters, int nfilters, const void *context, Size context_len, uint64 hash,
		   Tuplestorestate *store, TupleDesc desc, ScanResult *result)
{
	const EsTableInfo *info = es_table_info(rel);
	static const char  zeros[8] = {0};
	EsOpenRequest	   req = {0};
	EsPart			   parts[8];
	int				   n = 0;
	EsDeadStarts	   dead;
	uint8			   bitmap[256] = {0};
	char			  *order = text_to_cstring(PG_GETARG_TEXT_PP(2));
	bool			   last = false;

	req.req.type = ES_REQ_OPEN;
	req.req.id = es_request_id();
	req.table = info->key;
	req.flags = (context != NULL ? ES_OPEN_HAS_CONTEXT : 0) | (PG_GETARG_BOOL(9) ? ES_OPEN_COUNT_ONLY : 0);
	req.order = strcmp(order, "asc") == 0	 ? ES_ORDER_POSITION
				: strcmp(order, "desc") == 0 ? ES_ORDER_POSITION_DESC
											 : ES_ORDER_ANY;
	req.credit = 1;
	req.xmin = snap->xmin;
	req.xmax = snap->xmax;
	req.own = snap->own;
	req.curcid = snap->curcid;
	req.nxip = snap->nxip;
	(void) es_dead_starts(&info->key, &dead);
	req.ndead = dead.n[shard];
	req.natts = info->natts;
	req.nfilters = nfilters;
	req.filters_len = filters->len;
	req.after = PG_GETARG_INT64(3);
	req.below = PG_GETARG_INT64(4);
	req.max_rows = PG_GETARG_INT64(5);
	req.batch_bytes = PG_GETARG_INT32(7);
	req.context_hash = hash;
	req.context_len = (uint32) context_len;
	if (PG_ARGISNULL(8))
		memset(bitmap, 0xff, sizeof(bitmap));
	else
	{
		ArrayType *wanted = PG_GETARG_ARRAYTYPE_P(8);

		for (int i = 0; i < ArrayGetNItems(ARR_NDIM(wanted), ARR_DIMS(wanted)); i++)
		{
			int c = ((int32 *) ARR_DATA_PTR(wanted))[i] - 1;

			bitmap[c / 8] |= 1 << (c % 8);
		}
	}
	parts[n++] = (EsPart){&req, sizeof(req)};
	parts[n++] = (EsPart){snap->xip, sizeof(EsFxid) * snap->nxip};
	parts[n++] = (EsPart){dead.starts[shard], sizeof(EsLsn) * req.ndead};
	parts[n++] = (EsPart){bitmap, MAXALIGN((info->natts + 7) / 8)};
	parts[n++] = (EsPart){filters->data, filters->len};
	parts[n++] = (EsPart){context, context_len};
	parts[n++] = (EsPart){zeros, MAXALIGN(context_len) - context_len};
	for (int i = 0; i < n; i++)
		req.req.len += parts[i].len;

	es_channel_connect(shard);
	es_channel_wait_room(shard, req.req.len);
	es_channel_expect(shard, req.req.id);
	es_channel_send(shard, &req.req, parts, n, true);
	while (!last)
	{
		const EsDataAnswer *a = (const EsDataAnswer *) es_channel_answer(shard, req.req.id);
		EsRequest			fetch = {.type = ES_REQ_FETCH, .id = req.req.id};
		EsPart				part = {&fetch, sizeof(fetch)};

		last = (a->answer.flags & ES_ANSWER_LAST) != 0;
		result->rows += a->nrows;
		result->answers++;
		result->largest = Max(result->largest, a->answer.len);
		if (a->batch_len > 0)
			put_rows(a, store, desc);
		if (last)
		{
			result->scanned += a->rows_scanned;
			result->pruned += a->rows_pruned;
		}
		else
		{
			es_channel_wait_room(shard, sizeof(fetch));
			es_channel_send(shard, &fetch, &part, 1, true);
		}
	}
	es_channel_forget(shard, req.req.id);
}

static void
scan(FunctionCallInfo fcinfo, Tuplestorestate *store, TupleDesc desc, ScanResult *result)
{
	Relation	   rel = es_table_open(PG_GETARG_OID(0), AccessShareLock);
	StringInfoData filters;
	Datum		  *texts;
	int			   n;
	EsSnapshot	   snap;
	const void	  *context = NULL;
	size_t		   context_len = 0;
	uint64		   hash = 0;
	int64		   scratch;

	initStringInfo(&filters);
	deconstruct_array(PG_GETARG_ARRAYTYPE_P(1), TEXTOID, -1, false, TYPALIGN_INT, &texts, NULL, &n);
	for (int i = 0; i < n; i++)
		add_filter(&filters, TextDatumGetCString(texts[i]));
	if (es_xact != NULL)
		es_xact_send_table(&es_table_info(rel)->key);
	es_snapshot_fill(GetActiveSnapshot(), &snap);
	if (!PG_ARGISNULL(6))
	{
		/* tables with a text context only */
		es_context_bytes(ES_CONTEXT_STRING, -1, PG_GETARG_TEXT_PP(6), &scratch, &context, &context_len);
		hash = es_context_hash(ES_CONTEXT_STRING, context, context_len);
	}
	for (int s = 0; s < es_shared->nshards; s++)
		if (context == NULL || es_shard_of_hash(hash) == s)
			scan_shard(fcinfo, rel, s, &snap, &filters, n, context, context_len, hash, store, desc, result);
	table_close(rel, AccessShareLock);
}

Datum
est_scan(PG_FUNCTION_ARGS)
{
	ReturnSetInfo	*rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	ScanResult		 result = {0};
	Tuplestorestate *store;
	TupleDesc		 desc;
	MemoryContext	 old;

	est_check();
	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	old = MemoryContextSwitchTo(rsinfo->econtext->ecxt_per_query_memory);
	desc = CreateTupleDescCopy(desc);
	store = tuplestore_begin_heap(true, false, work_mem);
	MemoryContextSwitchTo(old);
	scan(fcinfo, store, desc, &result);
	rsinfo->returnMode = SFRM_Materialize;
	rsinfo->setResult = store;
	rsinfo->setDesc = desc;
	PG_RETURN_NULL();
}

Datum
est_scan_stats(PG_FUNCTION_ARGS)
{
	int		   times = PG_GETARG_INT32(10);
	ScanResult result = {0};
	TupleDesc  desc;
	Datum	   values[6];
	bool	   nulls[6] = {false};
	instr_time start;
	instr_time end;

	est_check();
	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	INSTR_TIME_SET_CURRENT(start);
	for (int i = 0; i < times; i++)
	{
		memset(&result, 0, sizeof(result));
		scan(fcinfo, NULL, NULL, &result);
	}
	INSTR_TIME_SET_CURRENT(end);
	INSTR_TIME_SUBTRACT(end, start);
	values[0] = Int64GetDatum(result.rows);
	values[1] = Int64GetDatum(result.answers);
	values[2] = Int64GetDatum(result.scanned);
	values[3] = Int64GetDatum(result.pruned);
	values[4] = Int64GetDatum(result.largest);
	values[5] = Float8GetDatum(INSTR_TIME_GET_MICROSEC(end) / (double) Max(times, 1));
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls)));
}
