/*-------------------------------------------------------------------------
 *
 * metapage.c
 *	  Codec of a relation's metapage.
 *
 * The page's own checksum is PostgreSQL's business and may be switched off, so
 * the struct has one of its own: a storage id that is off by a bit would make a
 * table look empty, or its storage look like nobody's.
 *
 *-------------------------------------------------------------------------
 */
#include <string.h>

#include "core/metapage.h"

void
es_metapage_seal(EsMetapage *meta)
{
	meta->magic = ES_METAPAGE_MAGIC;
	meta->version = ES_FORMAT_VERSION;
	meta->len = sizeof(*meta);
	meta->crc = 0;
	meta->crc = es_crc32c(0, meta, sizeof(*meta));
}

static bool
role_valid(int16_t attno)
{
	return attno >= 0 && attno <= ES_MAX_COLUMNS;
}

EsStatus
es_metapage_decode(const void *buf, size_t len, EsMetapage *meta, EsError *err)
{
	EsMetapage copy;
	uint32_t   found;

	if (len < sizeof(*meta))
		return es_fail(err, ES_ERR_TRUNCATED, 0, "metapage has %zu bytes of %zu", len, sizeof(*meta));
	memcpy(&copy, buf, sizeof(copy));
	if (copy.magic != ES_METAPAGE_MAGIC)
		return es_fail(err, ES_ERR_CORRUPT, 0, "not a metapage: magic number is %08x", copy.magic);
	/* magic, version, len and storage_id stay where they are; a newer version may have a longer struct */
	if (copy.version != ES_FORMAT_VERSION)
		return es_fail(err, ES_ERR_VERSION, 0, "metapage has format version %u, this program knows %u",
					   copy.version, ES_FORMAT_VERSION);
	found = copy.crc;
	copy.crc = 0;
	copy.crc = es_crc32c(0, &copy, sizeof(copy));
	if (copy.crc != found)
		return es_fail_crc(err, 0, found, copy.crc, "metapage");
	if (copy.len != sizeof(copy) || copy.storage_id == 0 || copy.roles.context_class < ES_CONTEXT_STRING ||
		copy.roles.context_class > ES_CONTEXT_ENUM || copy.roles.context <= 0 ||
		!role_valid(copy.roles.context) || !role_valid(copy.roles.position) ||
		!role_valid(copy.roles.version) || !role_valid(copy.roles.event_id) ||
		!role_valid(copy.roles.event_type))
		return es_fail(err, ES_ERR_CORRUPT, 0, "metapage holds impossible values");
	*meta = copy;
	return ES_OK;
}
