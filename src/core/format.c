/*-------------------------------------------------------------------------
 *
 * format.c
 *	  What all of core/ shares: filling an EsError, and the checksum.
 *
 * The CRC is PostgreSQL's own CRC-32C.  Its macro only asks for the types of
 * c.h, and the function behind it is exported by the server as well as by
 * libpgport, so that this file is the same object in the extension and in an
 * ordinary program.
 *
 *-------------------------------------------------------------------------
 */
/*
 * c.h wants to know whose program this is; it makes no difference to what is used here.  Headers of a
 * server built with gcc name a format attribute that clang does not know.
 */
#ifndef FRONTEND
#define FRONTEND 1
#endif
#ifdef __clang__
#pragma clang diagnostic ignored "-Wignored-attributes"
#endif
#include "postgres_fe.h"

#include "port/pg_crc32c.h"

#include "core/format.h"

EsStatus
es_fail(EsError *err, EsStatus status, uint64_t offset, const char *fmt, ...)
{
	va_list args;

	if (err == NULL)
		return status;

	err->status = status;
	err->offset = offset;
	err->expected_crc = 0;
	err->found_crc = 0;
	va_start(args, fmt);
	vsnprintf(err->what, sizeof(err->what), fmt, args);
	va_end(args);
	return status;
}

EsStatus
es_fail_crc(EsError *err, uint64_t offset, uint32_t expected, uint32_t found, const char *what)
{
	es_fail(err, ES_ERR_CORRUPT, offset, "wrong checksum of %s", what);
	if (err != NULL)
	{
		err->expected_crc = expected;
		err->found_crc = found;
	}
	return ES_ERR_CORRUPT;
}

/*
 * PostgreSQL keeps the register inverted while it runs; we hand out finished
 * values and invert on the way in, which is what makes calls chain from 0.
 */
uint32_t
es_crc32c(uint32_t crc, const void *buf, size_t len)
{
	pg_crc32c state = crc ^ 0xFFFFFFFF;

	COMP_CRC32C(state, buf, len);
	FIN_CRC32C(state);
	return state;
}
