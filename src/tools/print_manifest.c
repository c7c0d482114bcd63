/*-------------------------------------------------------------------------
 *
 * print_manifest.c
 *	  A manifest: its records, and the segments that live after them.
 *
 *-------------------------------------------------------------------------
 */
#include <inttypes.h>
#include <stdio.h>

#include "core/manifest.h"
#include "tools/filedump.h"

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

void
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
