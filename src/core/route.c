/*-------------------------------------------------------------------------
 *
 * route.c
 *	  From a context to its shard: canonical bytes, hash, slot, shard.
 *
 * A context is routed by its class and bytes, never by its type: all strings
 * give their characters (without varlena header, without name's padding), all
 * integers their value as int64, and so on.  So a change of the column's type
 * within its class leaves every row where it is.
 *
 * The class is the seed of the hash and never 0, since hash_bytes_extended
 * leaves its seed out when it is 0.
 *
 *-------------------------------------------------------------------------
 */
/* hashfn.h wants Datum otherwise; for the pragma see format.c */
#ifndef FRONTEND
#define FRONTEND 1
#endif
#ifdef __clang__
#pragma clang diagnostic ignored "-Wignored-attributes"
#endif
#include "postgres_fe.h"

#include "common/hashfn.h"

#include "core/route.h"

uint64_t
es_context_hash(EsContextClass klass, const void *bytes, size_t len)
{
	return hash_bytes_extended(bytes, (int) len, (uint64_t) klass);
}

void
es_slot_map_init(uint8_t map[ES_ROUTING_SLOTS], int nshards)
{
	for (int slot = 0; slot < ES_ROUTING_SLOTS; slot++)
		map[slot] = (uint8_t) (slot * nshards / ES_ROUTING_SLOTS);
}

size_t
es_varlena_size(const void *value)
{
	uint32_t header;

	if (es_varlena_is_short(value))
		return *(const uint8_t *) value >> 1;
	memcpy(&header, value, sizeof(header));
	return header >> 2;
}

void
es_varlena_data(const void *value, const char **data, size_t *len)
{
	size_t header_len = es_varlena_is_short(value) ? 1 : 4;

	*data = (const char *) value + header_len;
	*len = es_varlena_size(value) - header_len;
}

/* The signed integer of 1, 2, 4 or 8 bytes at value. */
static int64_t
read_integer(const void *value, int16_t attlen)
{
	int16_t i2;
	int32_t i4;
	int64_t i8;

	switch (attlen)
	{
		case 1:
			return *(const int8_t *) value;
		case 2:
			memcpy(&i2, value, sizeof(i2));
			return i2;
		case 4:
			memcpy(&i4, value, sizeof(i4));
			return i4;
		default:
			memcpy(&i8, value, sizeof(i8));
			return i8;
	}
}

void
es_context_bytes(EsContextClass klass, int16_t attlen, const void *value, int64_t *scratch,
				 const void **bytes, size_t *len)
{
	const char *data;
	const void *nul;

	switch (klass)
	{
		case ES_CONTEXT_STRING:
			if (attlen > 0)
			{
				/* name: up to its padding */
				nul = memchr(value, 0, (size_t) attlen);
				*bytes = value;
				*len = nul ? (size_t) ((const char *) nul - (const char *) value) : (size_t) attlen;
				return;
			}
			/* FALLTHROUGH */
		case ES_CONTEXT_BYTEA:
			es_varlena_data(value, &data, len);
			*bytes = data;
			return;
		case ES_CONTEXT_UUID:
			*bytes = value;
			*len = ES_UUID_LEN;
			return;
		case ES_CONTEXT_ENUM:
		{
			uint32_t oid;

			/* an OID is unsigned */
			memcpy(&oid, value, sizeof(oid));
			*scratch = oid;
			break;
		}
		case ES_CONTEXT_INTEGER:
		case ES_CONTEXT_DATE:
		case ES_CONTEXT_TIMESTAMPTZ:
		case ES_CONTEXT_BOOL:
			*scratch = read_integer(value, attlen);
			break;
	}
	*bytes = scratch;
	*len = sizeof(*scratch);
}
