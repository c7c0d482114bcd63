/*-------------------------------------------------------------------------
 *
 * finish.c
 *	  The payload of FINISH messages, and the sections that they consist of.
 *
 * A FINISH is written into one growing buffer; lengths and counts are put into
 * the headers when what they count is complete.  The check follows the same
 * order and insists that each table, section and payload ends where its
 * header says, so that the accessors need not look.
 *
 *-------------------------------------------------------------------------
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "core/message.h"

#define MAX_PAYLOAD UINT32_C(0x7fffffff)

/* A larger buffer is given back when the next FINISH begins. */
#define KEEP_MEMORY (256 * 1024)

/* ---- checking a FINISH ---- */

static inline uint64_t
bitmap_len(uint64_t nrows)
{
	return (nrows + 63) / 64 * 8;
}

/*
 * Checks the table at buf, of which len bytes are left; where is its offset
 * for messages.
 */
static EsStatus
check_table(const EsSectionHeader *section, const char *buf, size_t len, uint64_t where, EsError *err)
{
	const EsFinishTable	 *t = (const EsFinishTable *) buf;
	const uint64_t		 *starts = (const uint64_t *) (t + 1);
	const EsFirstVersion *versions;
	size_t				  at = sizeof(*t);
	uint64_t			  nrows = 0;
	uint64_t			  next_ordinal = 0;
	EsStatus			  status;

	if (len < sizeof(*t) || t->len < sizeof(*t) || t->len > len || t->len % 8 != 0)
		return es_fail(err, ES_ERR_CORRUPT, where, "table in FINISH does not fit its section");
	len = t->len;
	if (t->table.reserved != 0 ||
		(t->flags &
		 ~(uint32_t) (ES_FINISH_GIVEN_POSITIONS | ES_FINISH_GIVEN_VERSIONS | ES_FINISH_NOT_TAKEN)) != 0)
		return es_fail(err, ES_ERR_CORRUPT, where, "table in FINISH has unknown flags %x", t->flags);

	if (t->nlogged > (len - at) / sizeof(uint64_t))
		return es_fail(err, ES_ERR_CORRUPT, where, "table in FINISH has no room for %u logged batches",
					   t->nlogged);
	for (uint32_t i = 0; i < t->nlogged; i++)
		if (starts[i] == 0)
			return es_fail(err, ES_ERR_CORRUPT, where, "logged batch %u of a FINISH has no start", i);
	at += t->nlogged * sizeof(uint64_t);

	for (uint32_t i = 0; i < t->ninline; i++)
	{
		EsBatchView v;
		uint64_t	last;

		status = es_batch_open(buf + at, len - at, &v, err);
		if (status != ES_OK)
		{
			/* what lies in something complete is not cut off, but damaged */
			if (status == ES_ERR_TRUNCATED)
				status = ES_ERR_CORRUPT;
			if (err != NULL)
			{
				err->status = status;
				err->offset += where + at;
			}
			return status;
		}
		if (!es_table_key_equal(&v.header->table, &t->table))
			return es_fail(err, ES_ERR_CORRUPT, where + at, "batch in FINISH belongs to another table");
		if (v.header->nrows > 0)
		{
			last = es_batch_ordinal(&v, v.header->nrows - 1);
			if (es_batch_ordinal(&v, 0) < next_ordinal)
				return es_fail(err, ES_ERR_CORRUPT, where + at, "batches in FINISH are not in order");
			if (!(t->flags & ES_FINISH_GIVEN_POSITIONS) && last >= section->npositions)
				return es_fail(err, ES_ERR_CORRUPT, where + at,
							   "ordinal %" PRIu64 " in FINISH is beyond its %" PRIu64 " positions", last,
							   section->npositions);
			next_ordinal = last + 1;
		}
		nrows += v.header->nrows;
		at += v.header->total_len;
	}
	if (nrows > t->nrows || t->nrows - nrows > (uint64_t) t->nlogged * ES_BATCH_MAX_ROWS)
		return es_fail(err, ES_ERR_CORRUPT, where,
					   "FINISH counts %" PRIu64 " rows, but has %" PRIu64 " in %u batches", t->nrows, nrows,
					   t->ninline);

	if (t->flags & ES_FINISH_NOT_TAKEN)
	{
		if (bitmap_len(t->nrows) > len - at)
			return es_fail(err, ES_ERR_CORRUPT, where, "table in FINISH has no room for its bitmap");
		at += bitmap_len(t->nrows);
	}
	if (t->nversions > ES_FINISH_MAX_VERSIONS || t->nversions * sizeof(EsFirstVersion) != len - at)
		return es_fail(err, ES_ERR_CORRUPT, where, "table in FINISH has %zu bytes for %u versions", len - at,
					   t->nversions);
	versions = (const EsFirstVersion *) (buf + at);
	for (uint32_t i = 0; i < t->nversions; i++)
		if (versions[i].first_version <= 0)
			return es_fail(err, ES_ERR_CORRUPT, where + at, "FINISH has a first version below 1");
	return ES_OK;
}

static bool
positions_valid(EsPosition base, uint64_t npositions)
{
	return base <= ES_MAX_POSITION && npositions <= ES_MAX_POSITION + 1 - base;
}

/* where: offset of the section, for messages. */
static EsStatus
check_section(const char *buf, size_t len, uint64_t where, EsError *err)
{
	const EsSectionHeader *s = (const EsSectionHeader *) buf;
	size_t				   at = sizeof(*s);
	EsStatus			   status;

	if (len < sizeof(*s))
		return es_fail(err, ES_ERR_TRUNCATED, where + len, "section of FINISH ends in its header");
	if (s->len != len || s->len % 8 != 0)
		return es_fail(err, ES_ERR_CORRUPT, where, "section of FINISH has %u bytes where there are %zu",
					   s->len, len);
	if (s->shard >= ES_MAX_SHARDS)
		return es_fail(err, ES_ERR_CORRUPT, where, "section of FINISH is for shard %u", s->shard);
	if (!positions_valid(s->base, s->npositions))
		return es_fail(err, ES_ERR_CORRUPT, where, "positions of FINISH are out of range");
	for (uint32_t i = 0; i < s->ntables; i++)
	{
		status = check_table(s, buf + at, len - at, where + at, err);
		if (status != ES_OK)
			return status;
		at += ((const EsFinishTable *) (buf + at))->len;
	}
	if (at != len)
		return es_fail(err, ES_ERR_CORRUPT, where + at, "section of FINISH has %zu bytes behind its tables",
					   len - at);
	return ES_OK;
}

EsStatus
es_section_check(const void *buf, size_t len, EsError *err)
{
	if ((uintptr_t) buf % 8 != 0)
		return es_fail(err, ES_ERR_ARGUMENT, 0, "section is not aligned");
	return check_section(buf, len, 0, err);
}

EsStatus
es_finish_check(const void *buf, size_t len, EsError *err)
{
	const EsFinishHeader *f = buf;
	const char			 *base = buf;
	size_t				  at = sizeof(*f);
	uint32_t			  shards = 0;
	EsStatus			  status;

	if ((uintptr_t) buf % 8 != 0)
		return es_fail(err, ES_ERR_ARGUMENT, 0, "FINISH is not aligned");
	if (len < sizeof(*f))
		return es_fail(err, ES_ERR_TRUNCATED, len, "FINISH ends in its header");
	if (!positions_valid(f->base, f->npositions) || f->reserved != 0)
		return es_fail(err, ES_ERR_CORRUPT, 0, "positions of FINISH are out of range");
	for (uint32_t i = 0; i < f->nsections; i++)
	{
		const EsSectionHeader *s = (const EsSectionHeader *) (base + at);

		if (len - at < sizeof(*s))
			return es_fail(err, ES_ERR_TRUNCATED, len, "FINISH ends in section %u", i);
		if (s->len > len - at || s->len < sizeof(*s))
			return es_fail(err, ES_ERR_CORRUPT, at, "section %u of FINISH has %u bytes where %zu are left", i,
						   s->len, len - at);
		status = check_section(base + at, s->len, at, err);
		if (status != ES_OK)
			return status;
		if (s->base != f->base || s->npositions != f->npositions)
			return es_fail(err, ES_ERR_CORRUPT, at, "section %u of FINISH names other positions", i);
		if (shards & (UINT32_C(1) << s->shard))
			return es_fail(err, ES_ERR_CORRUPT, at, "FINISH has two sections for shard %u", s->shard);
		shards |= UINT32_C(1) << s->shard;
		at += s->len;
	}
	if (at != len)
		return es_fail(err, ES_ERR_CORRUPT, at, "FINISH has %zu bytes behind its sections", len - at);
	return ES_OK;
}

/* ---- reading a checked FINISH ---- */

const EsSectionHeader *
es_finish_section(const void *finish, uint16_t shard)
{
	const EsFinishHeader *f = finish;
	const char			 *at = (const char *) (f + 1);

	for (uint32_t i = 0; i < f->nsections; i++)
	{
		const EsSectionHeader *s = (const EsSectionHeader *) at;

		if (s->shard == shard)
			return s;
		at += s->len;
	}
	return NULL;
}

const EsFinishTable *
es_section_first(const EsSectionHeader *section)
{
	return section->ntables > 0 ? (const EsFinishTable *) (section + 1) : NULL;
}

const EsFinishTable *
es_section_next(const EsSectionHeader *section, const EsFinishTable *table)
{
	const char *next = (const char *) table + table->len;

	return next < (const char *) section + section->len ? (const EsFinishTable *) next : NULL;
}

void
es_finish_table_view(const EsFinishTable *table, EsFinishTableView *view)
{
	const char *at = (const char *) (table + 1);

	view->table = table;
	view->batch_starts = (const uint64_t *) at;
	at += table->nlogged * sizeof(uint64_t);
	view->inline_batches = at;
	for (uint32_t i = 0; i < table->ninline; i++)
		at += ((const EsBatchHeader *) at)->total_len;
	view->not_taken = NULL;
	if (table->flags & ES_FINISH_NOT_TAKEN)
	{
		view->not_taken = (const uint8_t *) at;
		at += bitmap_len(table->nrows);
	}
	view->versions = (const EsFirstVersion *) at;
}

/* ---- writing a FINISH ---- */

struct EsFinishBuilder
{
	char	*buffer;
	size_t	 len;
	size_t	 cap;
	size_t	 section; /* offset of the open section, 0 = none */
	uint32_t shards;  /* bit k = shard k has its section */
};

EsFinishBuilder *
es_finish_create(void)
{
	EsFinishBuilder *f = calloc(1, sizeof(EsFinishBuilder));

	if (f == NULL)
		return NULL;
	f->cap = 1024;
	f->buffer = malloc(f->cap);
	if (f->buffer == NULL)
	{
		free(f);
		return NULL;
	}
	es_finish_reset(f, 0, 0);
	return f;
}

void
es_finish_free(EsFinishBuilder *f)
{
	if (f == NULL)
		return;
	free(f->buffer);
	free(f);
}

void
es_finish_reset(EsFinishBuilder *f, EsPosition base, uint64_t npositions)
{
	EsFinishHeader h = {.base = base, .npositions = npositions};

	if (f->cap > KEEP_MEMORY)
	{
		char *smaller = realloc(f->buffer, KEEP_MEMORY);

		if (smaller != NULL)
		{
			f->buffer = smaller;
			f->cap = KEEP_MEMORY;
		}
	}
	memcpy(f->buffer, &h, sizeof(h));
	f->len = sizeof(h);
	f->section = 0;
	f->shards = 0;
}

/* Makes room for len bytes more. */
static EsStatus
finish_room(EsFinishBuilder *f, size_t len)
{
	if (len > MAX_PAYLOAD - f->len)
		return ES_ERR_TOO_LARGE;
	if (f->len + len > f->cap)
	{
		size_t cap = f->cap * 2 > f->len + len ? f->cap * 2 : f->len + len;
		char  *grown = realloc(f->buffer, cap);

		if (grown == NULL)
			return ES_ERR_NOMEM;
		f->buffer = grown;
		f->cap = cap;
	}
	return ES_OK;
}

static void
finish_put(EsFinishBuilder *f, const void *data, size_t len)
{
	if (len > 0)
		memcpy(f->buffer + f->len, data, len);
	f->len += len;
}

EsStatus
es_finish_begin_section(EsFinishBuilder *f, uint16_t shard)
{
	EsFinishHeader *h;
	EsSectionHeader s = {.len = sizeof(s), .shard = shard};
	EsStatus		status;

	if (shard >= ES_MAX_SHARDS || (f->shards & (UINT32_C(1) << shard)))
		return ES_ERR_ARGUMENT;
	status = finish_room(f, sizeof(s));
	if (status != ES_OK)
		return status;
	h = (EsFinishHeader *) f->buffer;
	h->nsections++;
	s.base = h->base;
	s.npositions = h->npositions;
	f->section = f->len;
	f->shards |= UINT32_C(1) << shard;
	finish_put(f, &s, sizeof(s));
	return ES_OK;
}

/*
 * A bitmap sets ES_FINISH_NOT_TAKEN by itself.  Each part of inline_batches is
 * one finished batch.  On failure the builder is as before the call.
 */
EsStatus
es_finish_add_table(EsFinishBuilder *f, const EsTableKey *table, uint32_t relid, uint32_t flags,
					uint64_t nrows, const uint64_t *batch_starts, uint32_t nlogged,
					const EsPart *inline_batches, uint32_t ninline, const uint8_t *not_taken,
					const EsFirstVersion *versions, uint32_t nversions)
{
	EsFinishTable	 t = {.table = *table,
						  .relid = relid,
						  .nlogged = nlogged,
						  .ninline = ninline,
						  .nrows = nrows,
						  .nversions = nversions};
	EsSectionHeader *section = (EsSectionHeader *) (f->buffer + f->section);
	uint64_t		 len = sizeof(t) + nlogged * (uint64_t) sizeof(uint64_t);
	EsStatus		 status;

	if (f->section == 0 || section->ntables == UINT16_MAX || nversions > ES_FINISH_MAX_VERSIONS)
		return ES_ERR_ARGUMENT;
	for (uint32_t i = 0; i < ninline; i++)
	{
		if (inline_batches[i].len % 8 != 0)
			return ES_ERR_ARGUMENT;
		if (len > MAX_PAYLOAD || inline_batches[i].len > MAX_PAYLOAD - len)
			return ES_ERR_TOO_LARGE;
		len += inline_batches[i].len;
	}
	t.table.reserved = 0;
	t.flags = flags & ~(uint32_t) ES_FINISH_NOT_TAKEN;
	if (not_taken != NULL)
	{
		if (nrows > (uint64_t) MAX_PAYLOAD * 8)
			return ES_ERR_TOO_LARGE;
		t.flags |= ES_FINISH_NOT_TAKEN;
		len += bitmap_len(nrows);
	}
	len += nversions * sizeof(EsFirstVersion);
	status = finish_room(f, len);
	if (status != ES_OK)
		return status;

	t.len = (uint32_t) len;
	finish_put(f, &t, sizeof(t));
	finish_put(f, batch_starts, nlogged * sizeof(uint64_t));
	for (uint32_t i = 0; i < ninline; i++)
		finish_put(f, inline_batches[i].data, inline_batches[i].len);
	if (not_taken != NULL)
	{
		size_t used = (nrows + 7) / 8;

		finish_put(f, not_taken, used);
		memset(f->buffer + f->len, 0, bitmap_len(nrows) - used);
		f->len += bitmap_len(nrows) - used;
	}
	finish_put(f, versions, nversions * sizeof(EsFirstVersion));

	section = (EsSectionHeader *) (f->buffer + f->section);
	section->ntables++;
	section->len += (uint32_t) len;
	return ES_OK;
}

EsStatus
es_finish_end(EsFinishBuilder *f, const void **payload, size_t *len)
{
	*payload = f->buffer;
	*len = f->len;
	return ES_OK;
}
