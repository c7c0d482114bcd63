/*-------------------------------------------------------------------------
 *
 * manifest_edit.c
 *	  Building manifest records.
 *
 * An edit is the record itself, growing: room for its header, then the parts.
 * Each part is checked when it is added by the functions that check it when it is
 * read, so that no record is written which a later start would refuse.
 *
 *-------------------------------------------------------------------------
 */
#include <stdlib.h>
#include <string.h>

#include "core/manifest_internal.h"

struct EsManifestEdit
{
	char	*buffer;
	size_t	 len;
	size_t	 cap;
	uint32_t nparts;
};

void
es_manifest_edit_restart(EsManifestEdit *e)
{
	e->len = sizeof(EsManifestRecord);
	e->nparts = 0;
}

EsManifestEdit *
es_manifest_edit_create(void)
{
	EsManifestEdit *e = calloc(1, sizeof(*e));

	if (e == NULL)
		return NULL;
	e->cap = 512;
	e->buffer = malloc(e->cap);
	if (e->buffer == NULL)
	{
		free(e);
		return NULL;
	}
	es_manifest_edit_restart(e);
	return e;
}

void
es_manifest_edit_free(EsManifestEdit *e)
{
	if (e == NULL)
		return;
	free(e->buffer);
	free(e);
}

EsStatus
es_manifest_edit_part(EsManifestEdit *e, EsManifestPartType type, const void *fixed, size_t fixed_len,
					  const void *array1, size_t len1, const void *array2, size_t len2)
{
	EsManifestPart part = {.type = type};
	size_t		   len = sizeof(part) + fixed_len + len1 + len2;

	if (e->nparts == UINT16_MAX || len > ES_MANIFEST_MAX_RECORD - e->len)
		return ES_ERR_TOO_LARGE;
	if (e->len + len > e->cap)
	{
		size_t cap = e->cap * 2 > e->len + len ? e->cap * 2 : e->len + len;
		char  *grown = realloc(e->buffer, cap);

		if (grown == NULL)
			return ES_ERR_NOMEM;
		e->buffer = grown;
		e->cap = cap;
	}
	part.len = (uint32_t) len;
	memcpy(e->buffer + e->len, &part, sizeof(part));
	e->len += sizeof(part);
	memcpy(e->buffer + e->len, fixed, fixed_len);
	e->len += fixed_len;
	if (len1 > 0)
		memcpy(e->buffer + e->len, array1, len1);
	e->len += len1;
	if (len2 > 0)
		memcpy(e->buffer + e->len, array2, len2);
	e->len += len2;
	e->nparts++;
	return ES_OK;
}

EsStatus
es_manifest_edit_segment(EsManifestEdit *e, const EsManifestSegment *s)
{
	if (!es_manifest_segment_valid(s))
		return ES_ERR_ARGUMENT;
	return es_manifest_edit_part(e, ES_PART_SEGMENT, s, sizeof(*s), NULL, 0, NULL, 0);
}

EsStatus
es_manifest_edit_pending(EsManifestEdit *e, const EsManifestPending *p, const uint64_t *starts)
{
	if (!es_manifest_pending_valid(&p->segment) || p->reserved != 0)
		return ES_ERR_ARGUMENT;
	return es_manifest_edit_part(e, ES_PART_PENDING, p, sizeof(*p), starts, p->nstarts * sizeof(uint64_t),
								 NULL, 0);
}

EsStatus
es_manifest_edit_adopt(EsManifestEdit *e, const EsManifestAdopt *a, const uint8_t *dead_bitmap,
					   const uint8_t *first_versions)
{
	if (!es_manifest_adopt_valid(a))
		return ES_ERR_ARGUMENT;
	return es_manifest_edit_part(e, ES_PART_ADOPT, a, sizeof(*a), dead_bitmap, a->dead_bitmap_len,
								 first_versions,
								 es_manifest_versions_len(a->nfirst_versions, a->version_width));
}

EsStatus
es_manifest_edit_drop(EsManifestEdit *e, uint64_t id)
{
	EsManifestDrop d = {.id = id};

	if (id == 0)
		return ES_ERR_ARGUMENT;
	return es_manifest_edit_part(e, ES_PART_DROP, &d, sizeof(d), NULL, 0, NULL, 0);
}

EsStatus
es_manifest_edit_flushed(EsManifestEdit *e, EsOwnLsn up_to)
{
	EsManifestFlushed f = {.up_to = up_to};

	return es_manifest_edit_part(e, ES_PART_FLUSHED, &f, sizeof(f), NULL, 0, NULL, 0);
}

EsStatus
es_manifest_edit_drop_storage(EsManifestEdit *e, const EsTableKey *table)
{
	if (table->reserved != 0)
		return ES_ERR_ARGUMENT;
	return es_manifest_edit_part(e, ES_PART_DROP_STORAGE, table, sizeof(*table), NULL, 0, NULL, 0);
}

uint32_t
es_manifest_record_crc(const char *record, size_t len, uint32_t prev_crc)
{
	EsManifestRecord h;
	uint32_t		 crc;

	memcpy(&h, record, sizeof(h));
	h.crc = 0;
	crc = es_crc32c(0, &h, sizeof(h));
	crc = es_crc32c(crc, record + sizeof(h), len - sizeof(h));
	return es_crc32c(crc, &prev_crc, sizeof(prev_crc));
}

EsStatus
es_manifest_edit_record(EsManifestEdit *e, uint32_t prev_crc, const void **record, size_t *len, uint32_t *crc)
{
	EsManifestRecord h = {.magic = ES_MANIFEST_MAGIC,
						  .version = ES_FORMAT_VERSION,
						  .nparts = (uint16_t) e->nparts,
						  .len = (uint32_t) e->len};

	if (e->nparts == 0)
		return ES_ERR_ARGUMENT;
	memcpy(e->buffer, &h, sizeof(h));
	h.crc = es_manifest_record_crc(e->buffer, e->len, prev_crc);
	memcpy(e->buffer, &h, sizeof(h));
	*record = e->buffer;
	*len = e->len;
	*crc = h.crc;
	return ES_OK;
}

/* ---- first versions ---- */

EsStatus
es_manifest_pack_versions(EsManifestEntry *entry, const int64_t *versions, uint32_t n)
{
	int64_t	 lowest = n > 0 ? versions[0] : 0;
	uint64_t most = 0;
	uint32_t width = 0;
	uint8_t *bytes;

	if (n == 0)
		return ES_OK;
	for (uint32_t i = 1; i < n; i++)
		if (versions[i] < lowest)
			lowest = versions[i];
	for (uint32_t i = 0; i < n; i++)
		if ((uint64_t) versions[i] - (uint64_t) lowest > most)
			most = (uint64_t) versions[i] - (uint64_t) lowest;
	if (most > 0)
		for (width = 1; width < 8 && most >> (8 * width) != 0;)
			width *= 2;
	bytes = calloc(1, es_manifest_versions_len(n, width));
	if (bytes == NULL)
		return ES_ERR_NOMEM;
	/* little-endian: the lowest bytes come first */
	for (uint32_t i = 0; i < n; i++)
	{
		uint64_t more = (uint64_t) versions[i] - (uint64_t) lowest;

		memcpy(bytes + (size_t) i * width, &more, width);
	}
	entry->first_versions = bytes;
	entry->nfirst_versions = n;
	entry->version_base = lowest;
	entry->version_width = width;
	return ES_OK;
}
