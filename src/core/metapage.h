/*-------------------------------------------------------------------------
 *
 * metapage.h
 *	  Codec of a relation's metapage: which storage its file stands for.
 *
 * Block 0 of the main fork is an ordinary PostgreSQL page (PageInit, so that
 * checksums and base backups work); EsMetapage lies at PageGetContents(), and
 * pd_lower is set behind it.  The table access method writes it, maintenance
 * reads it when it looks for storages that no relation has any more.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_CORE_METAPAGE_H
#define ES_CORE_METAPAGE_H

#include "core/format.h"

#define ES_METAPAGE_MAGIC UINT32_C(0x50425345) /* "ESBP" */

typedef struct EsMetapage
{
	uint32_t magic;
	uint16_t version;	 /* ES_FORMAT_VERSION */
	uint16_t len;		 /* of this struct */
	uint64_t storage_id; /* never 0 */
	uint8_t	 store_uuid[ES_UUID_LEN];
	EsRoles	 roles;
	uint32_t crc; /* of this struct with crc = 0 */
} EsMetapage;

_Static_assert(sizeof(EsMetapage) == 48, "EsMetapage is on disk");

/* Fills magic, version, len and crc of *meta; storage_id, store_uuid and roles are the caller's. */
extern void es_metapage_seal(EsMetapage *meta);

/*
 * Reads the struct at buf (len bytes may be read).  Checks magic, version, CRC
 * and that the roles are possible ones; whether the uuid is this store's is the
 * caller's question.
 */
extern EsStatus es_metapage_decode(const void *buf, size_t len, EsMetapage *meta, EsError *err);

#endif /* ES_CORE_METAPAGE_H */
