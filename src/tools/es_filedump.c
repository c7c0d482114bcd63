/*-------------------------------------------------------------------------
 *
 * es_filedump.c
 *	  Prints any file of an event store in words: store, control.0 and .1, wal.*,
 *	  manifest, seg.*.  Reads only; a server may be running.
 *
 * What a file is says its magic, not its name.  Everything is checked on the way
 * as a shard would check it, segments page by page.  How much of a log or a
 * manifest must be there is known only to the control blocks: if they lie in the
 * same directory they are asked, so that an end too early is told from one
 * that is just the end.
 *
 * Exit status: 0 = all good, 1 = damage found, 2 = a file could not be read.
 *
 *-------------------------------------------------------------------------
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "core/batch.h"
#include "core/manifest.h"
#include "core/message.h"
#include "core/segment.h"
#include "core/wal.h"

static bool verbose = false;
static int	exit_status = 0;

/* A file to be printed; data is all of it, or its beginning (segments). */
typedef struct Input
{
	const char *path;
	int			fd;
	uint64_t	size;
	char	   *data;
	size_t		len;
} Input;

/* of: what the offset counts from, "" = the file. */
static void
damaged_part(const EsError *err, const char *of)
{
	exit_status = exit_status > 1 ? exit_status : 1;
	printf("  DAMAGED at offset %" PRIu64 "%s: %s", err->offset, of, err->what);
	if (err->expected_crc != 0 || err->found_crc != 0)
		printf(" (expected %08x, found %08x)", err->expected_crc, err->found_crc);
	printf("\n");
}

static void
damaged(const EsError *err)
{
	damaged_part(err, "");
}

/* ---- small things in words ---- */

static const char *
uuid_text(const uint8_t *uuid)
{
	static char text[40];
	char	   *p = text;

	for (int i = 0; i < ES_UUID_LEN; i++)
		p += sprintf(p, "%s%02x", i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", uuid[i]);
	return text;
}

/* Several in one printf each need their own buffer. */
static const char *
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

static const char *
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

static const char *
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

static void
print_identity(const EsFileIdentity *i)
{
	printf("  store %s, shard %u of %u, system identifier %" PRIu64 ", timeline %u\n",
		   uuid_text(i->store_uuid), i->shard, i->nshards, i->system_identifier, i->timeline);
}

static const char *
table_text(const EsTableKey *t)
{
	static char text[64];

	snprintf(text, sizeof(text), "storage %" PRIu64 " of database %u", t->storage_id, t->database);
	return text;
}

static void
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

/* ---- store and control ---- */

/* The one block of these files; false if the file is too short for it. */
static bool
one_block(const Input *in)
{
	EsError err;

	if (in->len >= ES_WAL_BLOCK)
		return true;
	es_fail(&err, ES_ERR_TRUNCATED, in->len, "file of %zu bytes should have %d", in->len, ES_WAL_BLOCK);
	damaged(&err);
	return false;
}

static void
print_store(const Input *in)
{
	EsStoreFile s;
	EsError		err;

	printf("store file\n");
	if (!one_block(in))
		return;
	if (es_store_decode(in->data, &s, &err) != ES_OK)
	{
		damaged(&err);
		return;
	}
	printf("  store %s, %u shards, system identifier %" PRIu64 ", created %s%s\n", uuid_text(s.store_uuid),
		   s.nshards, s.system_identifier, time_text(s.created_at),
		   s.flags & ES_STORE_DETACHED ? ", DETACHED: its slot was dropped knowingly" : "");
	for (int slot = 0; slot < ES_ROUTING_SLOTS;)
	{
		int first = slot;

		while (slot < ES_ROUTING_SLOTS && s.slot_map[slot] == s.slot_map[first])
			slot++;
		printf("  slots %d to %d: shard %u\n", first, slot - 1, s.slot_map[first]);
	}
}

static void
print_control_body(const EsControl *c)
{
	print_identity(&c->identity);
	printf("  sequence %" PRIu64 ", incarnation %" PRIu64 ", written %s, %s%s\n", c->sequence, c->incarnation,
		   time_text(c->written_at), c->flags & ES_CONTROL_CLEAN ? "stopped cleanly" : "not stopped cleanly",
		   c->flags & ES_CONTROL_RELEASED ? ", PostgreSQL's WAL was RELEASED knowingly" : "");
	printf("  own WAL durable up to %s (checksum %08x), needed from %s\n", own_lsn_text(c->durable_end),
		   c->durable_crc, own_lsn_text(c->first_file));
	printf("  PostgreSQL's WAL needed from %s\n", lsn_text(c->restart_lsn));
	printf("  positions below %" PRIu64 " may be in use", c->reserved_below);
	if (c->flags & ES_CONTROL_CLEAN)
		printf(", the next is %" PRIu64, c->next_position);
	printf("\n  manifest generation %" PRIu64 ", %" PRIu64 " bytes of it durable\n", c->manifest_generation,
		   c->manifest_len);
}

static void
print_control(const Input *in)
{
	EsControl c;
	EsError	  err;

	printf("control block\n");
	if (!one_block(in))
		return;
	if (es_control_decode(in->data, &c, &err) != ES_OK)
		damaged(&err);
	else
		print_control_body(&c);
}

/* The current control block in the directory of path; false if there is none. */
static bool
find_control(const char *path, EsControl *control)
{
	const char *slash = strrchr(path, '/');
	EsControl	c[2];
	EsStatus	status[2];
	int			current;

	for (int i = 0; i < 2; i++)
	{
		char	 name[4096];
		uint64_t block[ES_WAL_BLOCK / 8];
		FILE	*f;

		status[i] = ES_ERR_IO;
		snprintf(name, sizeof(name), "%.*scontrol.%d", slash ? (int) (slash - path + 1) : 0, path, i);
		f = fopen(name, "rb");
		if (f == NULL)
			continue;
		if (fread(block, sizeof(block), 1, f) == 1)
			status[i] = es_control_decode(block, &c[i], NULL);
		fclose(f);
	}
	current = es_control_current(status[0], &c[0], status[1], &c[1]);
	if (current < 0)
		return false;
	*control = c[current];
	return true;
}

/* ---- own WAL ---- */

static void
print_batch(const void *buf, size_t len, const char *indent)
{
	EsBatchView v;
	EsError		err;

	if (es_batch_open(buf, len, &v, &err) != ES_OK)
	{
		damaged_part(&err, " of this payload");
		return;
	}
	printf("%s%u rows of %s (relation %u), %u bytes, ordinals %" PRIu64 " to %" PRIu64
		   ", subtransaction %u\n",
		   indent, v.header->nrows, table_text(&v.header->table), v.header->relid, v.header->total_len,
		   v.header->nrows ? es_batch_ordinal(&v, 0) : 0,
		   v.header->nrows ? es_batch_ordinal(&v, v.header->nrows - 1) : 0, v.header->subid);
	if (!verbose)
		return;
	printf("%s", indent);
	print_roles(&v.header->roles);
	printf(", flags %04x\n", v.header->flags);
	for (int col = 0; col < v.header->ncols; col++)
	{
		const EsBatchColumn *c = &v.columns[col];

		printf("%scolumn %d: width %d, alignment %u, ", indent, col + 1, c->desc.len, c->desc.align);
		if (c->flags & ES_BATCH_COLUMN_ABSENT)
			printf("absent\n");
		else if (c->flags & ES_BATCH_COLUMN_ALL_NULL)
			printf("all NULL\n");
		else
			printf("%u bytes%s\n", c->data_len, c->off_nulls ? ", some NULL" : "");
	}
}

static void
print_section(const void *buf, size_t len)
{
	const EsSectionHeader *s = buf;
	EsError				   err;

	if (es_section_check(buf, len, &err) != ES_OK)
	{
		damaged_part(&err, " of this payload");
		return;
	}
	printf("    positions from %" PRIu64 ", %" PRIu64 " of them\n", s->base, s->npositions);
	for (const EsFinishTable *t = es_section_first(s); t != NULL; t = es_section_next(s, t))
	{
		EsFinishTableView v;
		const char		 *batch;

		es_finish_table_view(t, &v);
		printf("    %" PRIu64 " rows of %s: %u batches logged before, %u here, %u first versions%s%s%s\n",
			   t->nrows, table_text(&t->table), t->nlogged, t->ninline, t->nversions,
			   t->flags & ES_FINISH_GIVEN_POSITIONS ? ", given positions" : "",
			   t->flags & ES_FINISH_GIVEN_VERSIONS ? ", given versions" : "",
			   v.not_taken ? ", some rows not taken" : "");
		for (uint32_t i = 0; i < t->nlogged && verbose; i++)
			printf("      batch at %s\n", lsn_text(v.batch_starts[i]));
		batch = v.inline_batches;
		for (uint32_t i = 0; i < t->ninline; i++)
		{
			size_t batch_len = ((const EsBatchHeader *) batch)->total_len;

			print_batch(batch, batch_len, "      ");
			batch += batch_len;
		}
		for (uint32_t i = 0; i < t->nversions && verbose; i++)
			printf("      context %016" PRIx64 " from version %" PRId64 "\n", v.versions[i].context_hash,
				   v.versions[i].first_version);
	}
}

static void
print_payload(int type, const void *payload, size_t len)
{
	switch (type)
	{
		case ES_FRAME_FILE:
		{
			EsWalFileHeader h;

			if (len < sizeof(h))
				break;
			memcpy(&h, payload, sizeof(h));
			print_identity(&h.identity);
			printf("  file number %" PRIu64 ", made by incarnation %" PRIu64 "\n", h.file_number,
				   h.incarnation);
			return;
		}
		case ES_FRAME_BATCH:
		case ES_FRAME_CARRY_BATCH:
			print_batch(payload, len, "    ");
			return;
		case ES_FRAME_FINISH:
		case ES_FRAME_CARRY_FINISH:
			print_section(payload, len);
			return;
		case ES_FRAME_RESOLVED:
		{
			EsResolved r;

			if (len < sizeof(r))
				break;
			memcpy(&r, payload, sizeof(r));
			if (r.committed)
				printf("    committed, commit record up to %s\n", lsn_text(r.commit_lsn));
			else
				printf("    aborted\n");
			return;
		}
	}
	printf("    payload of %zu bytes is too short for its type\n", len);
	exit_status = exit_status > 1 ? exit_status : 1;
}

static const char *
frame_name(int type)
{
	static const char *const names[] = {
		"?", "FILE", "BATCH", "FINISH", "RESOLVED", "BATCH carried over", "FINISH carried over"};

	return type > 0 && type < (int) (sizeof(names) / sizeof(names[0])) ? names[type] : "?";
}

static void
print_frame(const EsFrameHeader *h, const void *payload)
{
	void   *raw = NULL;
	size_t	len = h->payload_len;
	EsError err;

	printf("  offset %u: %s", (unsigned) h->own_lsn, frame_name(h->type));
	if (h->fxid != 0)
		printf(" of transaction %" PRIu64, h->fxid);
	if (h->pg_start != 0)
		printf(", message %s to %s", lsn_text(h->pg_start), lsn_text(h->pg_end));
	printf(", %u bytes%s\n", h->payload_len, h->flags & ES_FRAME_LZ4 ? " (LZ4)" : "");
	if (h->flags & ES_FRAME_LZ4)
	{
		if (es_frame_unpack(h, payload, &raw, &len, &err) != ES_OK)
		{
			damaged(&err);
			return;
		}
		payload = raw;
	}
	print_payload(h->type, payload, len);
	free(raw);
}

/* The number in the name of a WAL file; false if it has another name. */
static bool
wal_number(const char *path, uint32_t *number)
{
	const char *slash = strrchr(path, '/');
	int			end = 0;

	return sscanf(slash ? slash + 1 : path, "wal.%8" SCNx32 "%n", number, &end) == 1 &&
		   (slash ? slash + 1 : path)[end] == '\0';
}

/*
 * A file that was made ahead holds zeros, or frames of its former life, until its
 * turn comes.  Is this one, unless the control blocks know better?
 */
static bool
print_unused_wal(const Input *in)
{
	uint32_t	  number;
	EsFrameHeader first = {0};
	EsControl	  control;

	memcpy(&first, in->data, in->len < sizeof(first) ? in->len : sizeof(first));
	if (!wal_number(in->path, &number) || (first.magic != 0 && first.magic != ES_FRAME_MAGIC) ||
		(first.magic == ES_FRAME_MAGIC && first.own_lsn >> 32 == number))
		return false;
	if (find_control(in->path, &control) && control.durable_end >> 32 >= number)
		return false;
	printf("own WAL of a shard, made ahead and not yet used");
	if (first.magic != 0)
		printf("; it was wal.%08X before", (unsigned) (first.own_lsn >> 32));
	printf("\n");
	return true;
}

static void
print_wal(const Input *in)
{
	EsFrameHeader first;
	EsControl	  control;
	uint64_t	  durable = 0; /* bytes of this file that must be there; 0 = not known */
	uint32_t	  number;
	EsOwnLsn	  start;
	size_t		  at = 0;
	size_t		  end = 0;
	uint32_t	  crc = 0;
	uint32_t	  nframes = 0;
	EsError		  err;
	EsStatus	  status;

	printf("own WAL of a shard\n");
	if (in->len < sizeof(first))
	{
		es_fail(&err, ES_ERR_TRUNCATED, in->len, "file ends in its first frame");
		damaged(&err);
		return;
	}
	memcpy(&first, in->data, sizeof(first));
	start = wal_number(in->path, &number) ? (EsOwnLsn) number << 32 : first.own_lsn;
	if (find_control(in->path, &control) && control.durable_end >> 32 == start >> 32)
		durable = control.durable_end & UINT32_MAX;
	for (;;)
	{
		const EsFrameHeader *h;
		const void			*payload;

		status = es_frame_decode(in->data + at, in->len - at, start + at, first.shard, crc, &h, &payload,
								 &crc, &err);
		if (status == ES_OK)
		{
			print_frame(h, payload);
			at += es_frame_size(h->payload_len);
			end = at;
			nframes++;
			continue;
		}
		/* padding: on the next block */
		if (status != ES_ERR_TRUNCATED || (at / ES_WAL_BLOCK + 1) * ES_WAL_BLOCK >= in->len)
			break;
		at = (at / ES_WAL_BLOCK + 1) * ES_WAL_BLOCK;
	}

	printf("  %u frames end at offset %zu of %zu", nframes, end, in->len);
	if (durable != 0)
		printf(", durable up to %" PRIu64, durable);
	printf("\n");
	if (nframes == 0 || end < durable)
		damaged(&err);
	else if (status != ES_ERR_TRUNCATED)
		printf("  what follows does not count%s: offset %" PRIu64 ", %s\n",
			   durable != 0 ? "" : " if the control blocks do not say otherwise", err.offset, err.what);
}

/* ---- manifest ---- */

static void
print_segment_entry(const EsManifestSegment *s)
{
	printf("seg.%016" PRIx64 ", %s, %" PRIu64 " rows, %" PRIu64 " bytes, positions %" PRIu64 " to %" PRIu64
		   ", transactions %" PRIu64 " to %" PRIu64,
		   s->id, table_text(&s->table), s->nrows, s->file_len, s->min_position, s->max_position, s->min_fxid,
		   s->max_fxid);
}

/* The record was applied, so its parts have the lengths that they should. */
static void
print_part(const EsManifestPart *part)
{
	const void *body = part + 1;

	printf("    ");
	switch ((EsManifestPartType) part->type)
	{
		case ES_PART_HEAD:
		{
			const EsManifestHead *h = body;

			printf("head: generation %" PRIu64 ", next segment id %" PRIx64 "\n  ", h->generation,
				   h->next_segment_id);
			print_identity(&h->identity);
			return;
		}
		case ES_PART_SEGMENT:
			printf("segment: ");
			print_segment_entry(body);
			break;
		case ES_PART_PENDING:
		{
			const EsManifestPending *p = body;

			printf("pending: ");
			print_segment_entry(&p->segment);
			printf(", %u batches", p->nstarts);
			break;
		}
		case ES_PART_ADOPT:
		{
			const EsManifestAdopt *a = body;

			printf("adopted: seg.%016" PRIx64 " of transaction %" PRIu64 ", base %" PRIu64 ", %" PRIu64
				   " rows live, positions %" PRIu64 " to %" PRIu64 ", %u first versions",
				   a->id, a->fxid, a->base, a->nlive, a->min_position, a->max_position, a->nfirst_versions);
			break;
		}
		case ES_PART_DROP:
			printf("dropped: seg.%016" PRIx64, ((const EsManifestDrop *) body)->id);
			break;
		case ES_PART_FLUSHED:
			printf("flushed: up to %s", own_lsn_text(((const EsManifestFlushed *) body)->up_to));
			break;
		case ES_PART_DROP_STORAGE:
			printf("dropped: all of %s", table_text(body));
			break;
	}
	printf("\n");
}

static void
print_manifest(const Input *in)
{
	EsManifestState state;
	EsControl		control;
	uint64_t		durable = 0;
	uint64_t		valid_len = 0;
	uint32_t		crc;
	EsError			err;
	EsStatus		status;

	printf("manifest\n");
	es_manifest_state_init(&state);
	status = es_manifest_read(&state, in->data, in->len, 0, &valid_len, &crc, &err);
	if (status == ES_OK && find_control(in->path, &control) &&
		control.manifest_generation == state.head.generation && control.manifest_len > valid_len)
	{
		durable = control.manifest_len;
		es_manifest_state_free(&state);
		status = es_manifest_read(&state, in->data, in->len, durable, &valid_len, &crc, &err);
	}
	if (status != ES_OK)
	{
		damaged(&err);
		es_manifest_state_free(&state);
		return;
	}
	for (uint64_t at = 0; at < valid_len;)
	{
		const EsManifestRecord *r = (const EsManifestRecord *) (in->data + at);
		const char			   *part = (const char *) (r + 1);

		printf("  offset %" PRIu64 ": record of %u parts, %u bytes\n", at, r->nparts, r->len);
		for (int i = 0; i < r->nparts; i++)
		{
			print_part((const EsManifestPart *) part);
			part += ((const EsManifestPart *) part)->len;
		}
		at += r->len;
	}
	if (valid_len < in->len)
		printf("  %" PRIu64 " bytes behind offset %" PRIu64 " do not count\n", in->len - valid_len,
			   valid_len);
	printf("  so %u segments live, own WAL is in them up to %s\n", state.nentries,
		   own_lsn_text(state.flushed_up_to));
	for (uint32_t i = 0; i < state.nentries; i++)
	{
		const EsManifestEntry *e = &state.entries[i];

		printf("    ");
		print_segment_entry(&e->segment);
		if (e->pending)
			printf(", pending");
		else if (e->adopted)
			printf(", adopted at base %" PRIu64 ", %" PRIu64 " rows live", e->base, e->nlive);
		printf("\n");
	}
	es_manifest_state_free(&state);
}

/* ---- segments ---- */

static EsStatus
read_segment(void *arg, void *buf, size_t len, uint64_t offset, EsError *err)
{
	const Input *in = arg;
	size_t		 done = 0;

	while (done < len)
	{
		ssize_t n = pread(in->fd, (char *) buf + done, len - done, (off_t) (offset + done));

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return es_fail(err, ES_ERR_IO, offset + done, "cannot read: %s", strerror(errno));
		if (n == 0)
			return es_fail(err, ES_ERR_TRUNCATED, offset + done, "file ends");
		done += (size_t) n;
	}
	return ES_OK;
}

static void
report_damage(void *arg, const EsError *err)
{
	(*(unsigned *) arg)++;
	damaged(err);
}

static void
print_zone(const EsSegment *seg, const EsSegmentInfo *info, uint32_t zone)
{
	EsZoneInfo z = es_segment_zone(seg, zone);

	printf("  zone %u: rows from %" PRIu64 ", %u of them, positions %" PRIu64 " to %" PRIu64
		   ", transactions %" PRIu64 " to %" PRIu64 ", context hashes %016" PRIx64 " to %016" PRIx64 "\n",
		   zone, z.first_row, z.nrows, z.min_position, z.max_position, z.min_fxid, z.max_fxid, z.first_hash,
		   z.last_hash);
	if (!verbose)
		return;
	for (int col = 0; col < info->ncols; col++)
	{
		EsZoneColumnStats s = es_segment_column_stats(seg, zone, col);

		printf("    column %d: %u NULL", col + 1, s.nnulls);
		if (s.has_minmax)
			printf(", %" PRId64 " to %" PRId64, s.min, s.max);
		printf("\n");
	}
}

static void
print_segment(Input *in)
{
	EsSegment			*seg;
	const EsSegmentInfo *info;
	unsigned			 ndamaged = 0;
	EsError				 err;

	printf("segment\n");
	if (es_segment_open(&seg, read_segment, in, in->size, &err) != ES_OK)
	{
		damaged(&err);
		return;
	}
	info = es_segment_info(seg);
	print_identity(&info->identity);
	printf("  segment %016" PRIx64 " of %s (relation %u)%s, ", info->id, table_text(&info->table),
		   info->relid, info->flags & ES_SEGMENT_PENDING ? ", with ordinals in the place of positions" : "");
	print_roles(&info->roles);
	printf("\n  %" PRIu64 " rows of %" PRIu64 " contexts in %u zones, %" PRIu64 " bytes of %" PRIu64
		   " uncompressed\n",
		   info->summary.nrows, info->summary.ncontexts, info->nzones, info->summary.file_len,
		   info->summary.raw_bytes);
	printf("  positions %" PRIu64 " to %" PRIu64 ", transactions %" PRIu64 " to %" PRIu64
		   ", footer's checksum %08x\n",
		   info->summary.min_position, info->summary.max_position, info->summary.min_fxid,
		   info->summary.max_fxid, info->summary.footer_crc);
	printf("  %d columns%s:", info->ncols, info->has_content_hash ? " and content hashes" : "");
	for (int col = 0; col < info->ncols; col++)
	{
		const EsColumnDesc *d = &info->columns[col];

		if (d->flags & ES_COLUMN_DROPPED)
			printf(" dropped");
		else if (d->len < 0)
			printf(" varlena");
		else
			printf(" %d", d->len);
	}
	printf("\n");
	for (uint32_t zone = 0; zone < info->nzones; zone++)
		print_zone(seg, info, zone);
	if (es_segment_verify(seg, report_damage, &ndamaged) == ES_OK && ndamaged == 0)
		printf("  every page is good\n");
	else
		exit_status = exit_status > 1 ? exit_status : 1;
	es_segment_close(seg);
}

/* ---- files ---- */

static void
cannot(const char *what, const char *path)
{
	fprintf(stderr, "es_filedump: could not %s file \"%s\": %s\n", what, path, strerror(errno));
	exit_status = 2;
}

/* Reads up to len bytes from the start of the file. */
static bool
load(Input *in, uint64_t len)
{
	EsError err;

	if (len > in->size)
		len = in->size;
	in->data = realloc(in->data, len ? len : 1);
	if (in->data == NULL)
	{
		errno = ENOMEM;
		cannot("read", in->path);
		return false;
	}
	in->len = len;
	if (read_segment(in, in->data, len, 0, &err) == ES_OK)
		return true;
	fprintf(stderr, "es_filedump: file \"%s\", offset %" PRIu64 ": %s\n", in->path, err.offset, err.what);
	exit_status = 2;
	return false;
}

static void
dump(const char *path)
{
	Input		in = {.path = path};
	struct stat st;
	uint32_t	magic = 0;
	uint64_t	long_magic = 0;

	in.fd = open(path, O_RDONLY);
	if (in.fd < 0)
	{
		cannot("open", path);
		return;
	}
	if (fstat(in.fd, &st) != 0)
		cannot("stat", path);
	else
	{
		in.size = (uint64_t) st.st_size;
		if (load(&in, sizeof(long_magic)))
		{
			memcpy(&magic, in.data, in.len < sizeof(magic) ? in.len : sizeof(magic));
			memcpy(&long_magic, in.data, in.len);
			printf("%s: ", path);
			if (long_magic == ES_SEGMENT_MAGIC)
				print_segment(&in);
			else if (load(&in, sizeof(EsFrameHeader)) && print_unused_wal(&in))
				;
			else if (magic != ES_STORE_MAGIC && magic != ES_CONTROL_MAGIC && magic != ES_FRAME_MAGIC &&
					 magic != ES_MANIFEST_MAGIC)
			{
				printf("not a file of an event store, or its first bytes are damaged\n");
				exit_status = exit_status > 1 ? exit_status : 1;
			}
			else if (load(&in, in.size))
			{
				if (magic == ES_STORE_MAGIC)
					print_store(&in);
				else if (magic == ES_CONTROL_MAGIC)
					print_control(&in);
				else if (magic == ES_FRAME_MAGIC)
					print_wal(&in);
				else
					print_manifest(&in);
			}
		}
	}
	free(in.data);
	close(in.fd);
}

static void
usage(void)
{
	printf("es_filedump prints and checks files of an event store.\n\n"
		   "Usage:\n  es_filedump [-v] FILE...\n\n"
		   "  -v, --verbose  also columns of batches, batch lists, versions, statistics of zones\n\n"
		   "Files are $PGDATA/event_store/store and, in $PGDATA/event_store/shard_N/, control.0, control.1,\n"
		   "wal.*, manifest and seg.*.  Exit status: 0 = all good, 1 = damage found, 2 = cannot read.\n");
}

int
main(int argc, char **argv)
{
	static const struct option options[] = {
		{"verbose", no_argument, NULL, 'v'}, {"help", no_argument, NULL, 'h'}, {NULL, 0, NULL, 0}};
	int c;

	while ((c = getopt_long(argc, argv, "vh", options, NULL)) != -1)
	{
		if (c == 'v')
			verbose = true;
		else if (c == 'h')
		{
			usage();
			return 0;
		}
		else
		{
			fprintf(stderr, "Try \"es_filedump --help\".\n");
			return 2;
		}
	}
	if (optind == argc)
	{
		usage();
		return 2;
	}
	for (int i = optind; i < argc; i++)
		dump(argv[i]);
	return exit_status;
}
