/*-------------------------------------------------------------------------
 *
 * event_map.c
 *	  Rows of any event table in the shape of event_store.events, which replay() and
 *	  read_all() return.
 *
 * The shape is looked at when the function is called, since users add columns to event_store.events and
 * change their types.  Each column of the result comes from
 *	 the table's column of that role (context_id, position ...),
 *	 else from the table's column of the same name, for recorded_at, payload and metadata if it has the type
 *	 that event_store.events began with or has now, for added ones if the types are equal,
 *	 else it is NULL.
 * Where types differ the value goes through its text.
 *
 * What the table has beyond that is not lost: if it has columns without a place in the result, or no
 * payload, all its plain columns come as the payload, {"column": value, ...}.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/pg_type.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"

#include "sqlfn/args.h"
#include "tam/tam.h"

/* Where a column of the result comes from. */
typedef struct Source
{
	int		 attno; /* of the table; 0 = NULL */
	Oid		 from;	/* its type */
	Oid		 to;
	bool	 through_text;
	FmgrInfo output;
	FmgrInfo input;
	Oid		 ioparam;
	int32	 typmod;
} Source;

struct EsEventMap
{
	Relation rel;
	int		 natts;	  /* of the result */
	Source	*sources; /* natts */
	int		 payload; /* column of the result that takes the plain ones, from 0; -1 = they have places */
	Source	 to_payload;
	Datum	 placed; /* text[]: names of columns that do not go into it */
};

static void
set_source(Source *s, TupleDesc desc, int attno, Form_pg_attribute to)
{
	Oid	 output;
	Oid	 input;
	bool varlena;

	memset(s, 0, sizeof(*s));
	s->attno = attno;
	s->from = attno > 0 ? TupleDescAttr(desc, attno - 1)->atttypid : JSONBOID;
	s->to = to->atttypid;
	s->typmod = to->atttypmod;
	s->through_text =
		s->from != s->to ||
		(s->typmod >= 0 && (attno <= 0 || TupleDescAttr(desc, attno - 1)->atttypmod != s->typmod));
	if (!s->through_text)
		return;
	getTypeOutputInfo(s->from, &output, &varlena);
	fmgr_info(output, &s->output);
	getTypeInputInfo(s->to, &input, &s->ioparam);
	fmgr_info(input, &s->input);
}

static Datum
convert(const Source *s, Datum value)
{
	if (!s->through_text)
		return value;
	return InputFunctionCall(unconstify(FmgrInfo *, &s->input),
							 OutputFunctionCall(unconstify(FmgrInfo *, &s->output), value), s->ioparam,
							 s->typmod);
}

/* The table's column for one of the result, 0 = none. */
static int
find_column(Relation rel, const EsRoles *roles, Form_pg_attribute to)
{
	const char *name = NameStr(to->attname);
	int			attno;
	Oid			type;

	if (strcmp(name, "position") == 0)
		return roles->position;
	if (strcmp(name, "context_id") == 0)
		return roles->context;
	if (strcmp(name, "version") == 0)
		return roles->version;
	if (strcmp(name, "event_id") == 0)
		return roles->event_id;
	if (strcmp(name, "event_type") == 0)
		return roles->event_type;
	attno = es_column_number(rel, name);
	if (attno == 0)
		return 0;
	type = TupleDescAttr(RelationGetDescr(rel), attno - 1)->atttypid;
	if (type == to->atttypid)
		return attno;
	if (strcmp(name, "recorded_at") == 0)
		return type == TIMESTAMPTZOID ? attno : 0;
	if (strcmp(name, "payload") == 0 || strcmp(name, "metadata") == 0)
		return type == JSONBOID ? attno : 0;
	return 0;
}

EsEventMap *
es_event_map(Relation rel, TupleDesc result)
{
	TupleDesc	desc = RelationGetDescr(rel);
	EsRoles		roles = es_table_info(rel)->roles;
	EsEventMap *map = palloc0(sizeof(EsEventMap));
	bool	   *placed = palloc0(sizeof(bool) * desc->natts);
	Datum	   *names = palloc(sizeof(Datum) * desc->natts);
	bool		all_placed = true;
	int			n = 0;

	map->rel = rel;
	map->natts = result->natts;
	map->sources = palloc0(sizeof(Source) * result->natts);
	map->payload = -1;
	for (int i = 0; i < result->natts; i++)
	{
		Form_pg_attribute to = TupleDescAttr(result, i);
		bool			  is_payload;

		if (to->attisdropped)
			continue;
		is_payload = strcmp(NameStr(to->attname), "payload") == 0;
		if (is_payload)
			map->payload = i;
		set_source(&map->sources[i], desc, find_column(rel, &roles, to), to);
		if (map->sources[i].attno > 0)
			placed[map->sources[i].attno - 1] = true;
		else if (is_payload)
			all_placed = false;
	}
	for (int i = 0; i < desc->natts; i++)
		all_placed = all_placed && (placed[i] || TupleDescAttr(desc, i)->attisdropped);
	if (all_placed)
		map->payload = -1;
	if (map->payload < 0)
		return map;

	/* a payload of the table's own is one of its plain columns then */
	if (map->sources[map->payload].attno > 0)
		placed[map->sources[map->payload].attno - 1] = false;
	for (int i = 0; i < desc->natts; i++)
		if (placed[i])
			names[n++] = CStringGetTextDatum(NameStr(TupleDescAttr(desc, i)->attname));
	map->placed = PointerGetDatum(construct_array(names, n, TEXTOID, -1, false, TYPALIGN_INT));
	set_source(&map->to_payload, desc, 0, TupleDescAttr(result, map->payload));
	return map;
}

static int
hex_of(const char *p)
{
	int value = 0;

	for (int i = 0; i < 4; i++)
	{
		int c = (unsigned char) p[i];

		if (!isxdigit(c))
			return -1;
		value = value * 16 + (c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10);
	}
	return value;
}

/*
 * json has escapes that jsonb cannot have, since they are no characters: \u0000 and halves of surrogate pairs.
 * They come as the characters of the escape.  Returns text itself if there are none.
 */
static char *
without_noncharacters(char *text)
{
	StringInfoData buf;
	const char	  *done = text;

	if (strstr(text, "\\u") == NULL)
		return text;
	initStringInfo(&buf);
	for (const char *p = text; *p != '\0'; p++)
	{
		int code;
		int low;

		if (*p != '\\')
			continue;
		/* the escaped character itself is never the beginning of an escape */
		if (p[1] != 'u')
		{
			p++;
			continue;
		}
		code = hex_of(p + 2);
		if (code >= 0xd800 && code <= 0xdbff)
		{
			low = p[6] == '\\' && p[7] == 'u' ? hex_of(p + 8) : -1;
			if (low >= 0xdc00 && low <= 0xdfff)
			{
				p += 11;
				continue;
			}
		}
		if (code == 0 || (code >= 0xd800 && code <= 0xdfff))
		{
			appendBinaryStringInfo(&buf, done, p - done);
			appendStringInfoChar(&buf, '\\');
			done = p;
		}
		p += 5;
	}
	appendStringInfoString(&buf, done);
	return buf.data;
}

/* The table's columns that have no place of their own, as row_to_json makes it. */
static Datum
plain_columns(const EsEventMap *map, TupleTableSlot *slot)
{
	TupleDesc desc = RelationGetDescr(map->rel);
	HeapTuple tuple = heap_form_tuple(desc, slot->tts_values, slot->tts_isnull);
	Datum	  whole = heap_copy_tuple_as_datum(tuple, desc);
	char	 *json = TextDatumGetCString(DirectFunctionCall1(row_to_json, whole));

	return DirectFunctionCall2(jsonb_delete_array,
							   DirectFunctionCall1(jsonb_in, CStringGetDatum(without_noncharacters(json))),
							   map->placed);
}

void
es_event_values(const EsEventMap *map, TupleTableSlot *slot, Datum *values, bool *nulls)
{
	for (int i = 0; i < map->natts; i++)
	{
		const Source *s = &map->sources[i];

		nulls[i] = s->attno == 0 || slot->tts_isnull[s->attno - 1];
		if (i == map->payload)
		{
			values[i] = convert(&map->to_payload, plain_columns(map, slot));
			nulls[i] = false;
		}
		else
			values[i] = nulls[i] ? (Datum) 0 : convert(s, slot->tts_values[s->attno - 1]);
	}
}
