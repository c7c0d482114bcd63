/*-------------------------------------------------------------------------
 *
 * manifest_internal.h
 *	  What manifest_edit.c and manifest.c share: who writes a part and who
 *	  reads it hold it to the same rules.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_CORE_MANIFEST_INTERNAL_H
#define ES_CORE_MANIFEST_INTERNAL_H

#include "core/manifest.h"
#include "core/segment.h"

#define ES_MANIFEST_MAX_RECORD UINT32_C(0x7fffffff)

/* Adds a part that consists of a struct and up to two arrays. */
extern EsStatus
es_manifest_edit_part(EsManifestEdit *e, EsManifestPartType type, const void *fixed, size_t fixed_len,
					  const void *array1, size_t len1, const void *array2, size_t len2);

/* Makes the edit empty again. */
extern void es_manifest_edit_restart(EsManifestEdit *e);

/* CRC of a record, its own field taken as 0, and of the CRC before it. */
extern uint32_t es_manifest_record_crc(const char *record, size_t len, uint32_t prev_crc);

/* Bytes of a bitmap of rows that are not live. */
static inline uint64_t
es_manifest_bitmap_len(uint64_t nrows)
{
	return (nrows + 63) / 64 * 8;
}

/* A segment that never was pending. */
static inline bool
es_manifest_segment_valid(const EsManifestSegment *s)
{
	return s->id != 0 && s->table.reserved == 0 && (s->flags & ES_SEGMENT_PENDING) == 0 &&
		   s->nrows <= ES_MAX_POSITION && s->min_position <= s->max_position &&
		   s->max_position <= ES_MAX_POSITION && s->min_fxid <= s->max_fxid;
}

static inline bool
es_manifest_pending_valid(const EsManifestSegment *s)
{
	return s->id != 0 && s->table.reserved == 0 && (s->flags & ES_SEGMENT_PENDING) != 0 &&
		   s->nrows <= ES_MAX_POSITION && s->min_position == 0 && s->max_position == 0 &&
		   s->min_fxid == s->max_fxid && s->min_fxid != 0;
}

static inline bool
es_manifest_adopt_valid(const EsManifestAdopt *a)
{
	return a->id != 0 && a->dead_bitmap_len % 8 == 0 && a->reserved == 0 &&
		   (a->version_width <= 2 || a->version_width == 4 || a->version_width == 8) &&
		   a->base <= ES_MAX_POSITION && a->min_position <= a->max_position &&
		   a->max_position <= ES_MAX_POSITION;
}

#endif /* ES_CORE_MANIFEST_INTERNAL_H */
