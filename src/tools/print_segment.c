/*-------------------------------------------------------------------------
 *
 * print_segment.c
 *	  A segment: what it says of itself, its zones, and whether every page is good.
 *
 *-------------------------------------------------------------------------
 */
#include <inttypes.h>
#include <stdio.h>

#include "core/segment.h"
#include "tools/filedump.h"

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

void
print_segment(Input *in)
{
	EsSegment			*seg;
	const EsSegmentInfo *info;
	unsigned			 ndamaged = 0;
	EsError				 err;

	printf("segment\n");
	if (es_segment_open(&seg, read_file, in, in->size, &err) != ES_OK)
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
