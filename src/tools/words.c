/*-------------------------------------------------------------------------
 *
 * words.c
 *	  Damage, and small things that several kinds of files hold, in words.
 *
 *-------------------------------------------------------------------------
 */
#include <inttypes.h>
#include <stdio.h>
#include <time.h>

#include "tools/filedump.h"

bool verbose = false;
int	 exit_status = 0;

void
damaged_part(const EsError *err, const char *of)
{
	exit_status = exit_status > 1 ? exit_status : 1;
	printf("  DAMAGED at offset %" PRIu64 "%s: %s", err->offset, of, err->what);
	if (err->expected_crc != 0 || err->found_crc != 0)
		printf(" (expected %08x, found %08x)", err->expected_crc, err->found_crc);
	printf("\n");
}

void
damaged(const EsError *err)
{
	damaged_part(err, "");
}

const char *
uuid_text(const uint8_t *uuid)
{
	static char text[40];
	char	   *p = text;

	for (int i = 0; i < ES_UUID_LEN; i++)
		p += sprintf(p, "%s%02x", i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", uuid[i]);
	return text;
}

const char *
lsn_text(EsLsn lsn)
{
	static char texts[4][32];
	static int	next = 0;
	char	   *text = texts[next++ % 4];

	if (lsn == 0)
		return "none";
	snprintf(text, sizeof(texts[0]), "%X/%X", (unsigned) (lsn >> 32), (unsigned) lsn);
	return text;
}

const char *
own_lsn_text(EsOwnLsn lsn)
{
	static char texts[4][48];
	static int	next = 0;
	char	   *text = texts[next++ % 4];

	if (lsn == 0)
		return "none";
	snprintf(text, sizeof(texts[0]), "wal.%08X offset %u", (unsigned) (lsn >> 32), (unsigned) lsn);
	return text;
}

const char *
time_text(uint64_t microseconds)
{
	static char text[64];
	time_t		seconds = (time_t) (microseconds / 1000000);
	struct tm	tm;
	size_t		n;

	if (gmtime_r(&seconds, &tm) == NULL)
		return "?";
	n = strftime(text, sizeof(text), "%Y-%m-%d %H:%M:%S", &tm);
	snprintf(text + n, sizeof(text) - n, ".%06u UTC", (unsigned) (microseconds % 1000000));
	return text;
}

void
print_identity(const EsFileIdentity *i)
{
	printf("  store %s, shard %u of %u, system identifier %" PRIu64 ", timeline %u\n",
		   uuid_text(i->store_uuid), i->shard, i->nshards, i->system_identifier, i->timeline);
}

const char *
table_text(const EsTableKey *t)
{
	static char text[64];

	snprintf(text, sizeof(text), "storage %" PRIu64 " of database %u", t->storage_id, t->database);
	return text;
}

void
print_roles(const EsRoles *r)
{
	static const char *const classes[] = {"?",	  "string",		 "bytea", "integer", "uuid",
										  "date", "timestamptz", "bool",  "enum"};

	printf("context is column %d (%s)", r->context,
		   r->context_class < sizeof(classes) / sizeof(classes[0]) ? classes[r->context_class] : "?");
	if (r->position)
		printf(", position %d", r->position);
	if (r->version)
		printf(", version %d", r->version);
	if (r->event_id)
		printf(", event_id %d", r->event_id);
	if (r->event_type)
		printf(", event_type %d", r->event_type);
}
