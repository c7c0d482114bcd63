/*-------------------------------------------------------------------------
 *
 * print_log.c
 *	  The store file, control blocks, and a shard's own WAL.
 *
 *-------------------------------------------------------------------------
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/batch.h"
#include "core/message.h"
#include "tools/filedump.h"

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

void
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

void
print_control(const Input *in)
{
	EsControl c;
	EsError	  err;

	printf("control block\n");
	if (!one_block(in))
		return;
	/* event_store.opened has one for each shard */
	for (size_t at = 0; at + ES_WAL_BLOCK <= in->len; at += ES_WAL_BLOCK)
		if (es_control_decode(in->data + at, &c, &err) == ES_OK)
			print_control_body(&c);
		else
		{
			err.offset += at;
			damaged(&err);
		}
}

bool
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

bool
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

void
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
