/*-------------------------------------------------------------------------
 *
 * piece.c
 *	  Cutting long messages into pieces, and joining them again.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "ipc/piece.h"

Size
es_parts_len(const EsPart *parts, int nparts)
{
	Size len = 0;

	for (int i = 0; i < nparts; i++)
		len += parts[i].len;
	return MAXALIGN(len);
}

int
es_parts_slice(const EsPart *parts, int nparts, Size offset, Size len, shm_mq_iovec *iov)
{
	static const char zeros[MAXIMUM_ALIGNOF] = {0};
	int				  n = 0;

	for (int i = 0; i < nparts && len > 0; i++)
	{
		Size take;

		if (offset >= parts[i].len)
		{
			offset -= parts[i].len;
			continue;
		}
		take = Min(parts[i].len - offset, len);
		iov[n].data = (const char *) parts[i].data + offset;
		iov[n].len = take;
		n++;
		len -= take;
		offset = 0;
	}
	if (len > 0)
	{
		Assert(len < MAXIMUM_ALIGNOF);
		iov[n].data = zeros;
		iov[n].len = len;
		n++;
	}
	return n;
}

void
es_join_reset(EsJoin *join)
{
	if (join->data != NULL)
		pfree(join->data);
	memset(join, 0, sizeof(*join));
}

EsJoinResult
es_join_add(EsJoin *join, MemoryContext context, const EsPiece *piece, Size len)
{
	Size bytes;

	if (len < sizeof(EsPiece))
		return ES_JOIN_BROKEN;
	bytes = len - sizeof(EsPiece);

	if (piece->flags & (ES_PIECE_ABANDONED | ES_PIECE_FIRST))
		es_join_reset(join);
	if (piece->flags & ES_PIECE_ABANDONED)
		return ES_JOIN_MORE;
	if (piece->flags & ES_PIECE_FIRST)
	{
		if (piece->total > ES_MESSAGE_MAX_LEN || piece->total < sizeof(EsRequest))
			return ES_JOIN_BROKEN;
		join->data = MemoryContextAllocExtended(context, piece->total, MCXT_ALLOC_HUGE | MCXT_ALLOC_NO_OOM);
		if (join->data == NULL)
			return ES_JOIN_NO_MEMORY;
		join->total = piece->total;
	}

	if (join->data == NULL || piece->total != join->total || piece->offset != join->have ||
		bytes > join->total - join->have ||
		((piece->flags & ES_PIECE_LAST) != 0) != (join->have + bytes == join->total))
		return ES_JOIN_BROKEN;
	memcpy(join->data + join->have, piece + 1, bytes);
	join->have += bytes;
	return join->have == join->total ? ES_JOIN_WHOLE : ES_JOIN_MORE;
}
