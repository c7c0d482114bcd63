/*-------------------------------------------------------------------------
 *
 * batch_layout.h
 *	  What batch_build.c and batch.c have to agree on about the layout of a batch.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_CORE_BATCH_LAYOUT_H
#define ES_CORE_BATCH_LAYOUT_H

#include "core/batch.h"

/* Alignment of a column's data in the batch. */
static inline size_t
es_batch_data_align(const EsColumnDesc *desc)
{
	return desc->len > 0 || desc->align >= 4 ? desc->align : 4;
}

static inline size_t
es_batch_bitmap_len(uint32_t nrows)
{
	return ((size_t) nrows + 7) / 8;
}

static inline bool
es_column_desc_valid(const EsColumnDesc *desc)
{
	if (desc->len < -1 || desc->len == 0)
		return false;
	return desc->align == 1 || desc->align == 2 || desc->align == 4 || desc->align == 8;
}

#endif /* ES_CORE_BATCH_LAYOUT_H */
