/*-------------------------------------------------------------------------
 *
 * memindex.h
 *	  From context hash to the rows of one table in one MemTable.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_MEMINDEX_H
#define ES_SHARD_MEMINDEX_H

#include "postgres.h"

typedef struct EsMemIndex EsMemIndex;

extern EsMemIndex *es_memindex_create(MemoryContext context);
extern void		   es_memindex_add(EsMemIndex *index, uint64 hash, uint32 batch, uint32 row);

/* Rows of a hash in the order in which they were added; *cursor = 0 to begin.  Rows added
 * after the end was reached are found by the same cursor. */
extern bool es_memindex_next(EsMemIndex *index, uint64 hash, uint64 *cursor, uint32 *batch, uint32 *row);
extern Size es_memindex_bytes(const EsMemIndex *index);

#endif /* ES_SHARD_MEMINDEX_H */
