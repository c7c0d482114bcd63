/*-------------------------------------------------------------------------
 *
 * scan.h
 *	  What the files of a scan share (scan*.c); nobody else includes it.
 *
 * A scan has a view (what it reads), streams or a plain iteration over the view that
 * fill chunks, filters that thin out chunks, and an output that turns chunks into
 * answers.  A chunk is the unit in between: rows of one batch, of one block
 * of a segment, or of a window of a segment in position order.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_SHARD_SCAN_H
#define ES_SHARD_SCAN_H

#include "postgres.h"

#include "core/arith.h"
#include "core/segment.h"
#include "ipc/protocol.h"
#include "shard/memtable.h"
#include "shard/segments.h"
#include "shard/task.h"

#define ES_CHUNK_ROWS ES_ZONE_ROWS

typedef struct EsScan EsScan;

/* A segment of the view. */
typedef struct EsScanSegment
{
	EsSegmentRef *ref;			/* one reference */
	bool		  own;			/* pending, of the reader's own transaction: judged by cid and batch */
	bool		  own_finished; /* the same after its FINISH: by cid */
	bool		  all_visible;	/* else each row by its fxid (or as own) */
	bool		 *dead_batches; /* own: by number of the batch */

	/* filled when it is opened */
	EsSegment			*segment;
	const EsSegmentInfo *info;
	int					 ncols;		/* the table's columns in it */
	bool				*wanted;	/* info->ncols */
	uint32				 hidden;	/* ES_WANT_* */
	uint32				 read_rows; /* rows to read at once, by their size */
} EsScanSegment;

/* Batches of the view: of one MemTable, or the own staged ones. */
typedef struct EsScanMem
{
	EsMemTable	*memtable; /* one reference; NULL = own staged ones */
	EsMemStore	*store;
	EsMemBatch **own; /* each with a reference */
	uint32		 nbatches;
	bool		 carried; /* its batches with moved_to are in a newer MemTable of the view */
} EsScanMem;

typedef struct EsScanFilter
{
	int			 column;
	EsFilterOp	 op;
	EsFilterKind kind;
	uint32		 nvalues;
	int64		*ints; /* ascending */
	struct EsFilterBytes
	{
		const char *data;
		Size		len;
	} * bytes; /* ascending by length, then memcmp */
} EsScanFilter;

typedef enum EsChunkKind
{
	ES_CHUNK_MEM,
	ES_CHUNK_SEGMENT,
	ES_CHUNK_WINDOW
} EsChunkKind;

typedef struct EsWindow EsWindow;

typedef struct EsChunk
{
	EsChunkKind	   kind;
	bool		   own;	  /* own uncommitted rows: ordinals, no positions */
	int			   ncols; /* columns the source has; those beyond are NULL */
	const EsRoles *roles;
	uint32		   relid;

	const EsMemBatch *batch; /* MEM */

	EsScanSegment	 *segment;	 /* SEGMENT, WINDOW */
	const EsRowBlock *block;	 /* SEGMENT */
	uint64			  first_row; /* SEGMENT: of the block */
	const EsWindow	 *window;	 /* WINDOW */

	uint32	n; /* rows left, from next on */
	uint32	next;
	uint32 *rows; /* ES_CHUNK_ROWS: in the batch, block or window */
} EsChunk;

/* Rows of a segment in the order of positions, values copied (scan_window.c). */
typedef struct EsWindowRow
{
	EsPosition	 position;
	int64		 version; /* 0 = none */
	const void **values;  /* by scan->columns[] */
} EsWindowRow;

struct EsWindow
{
	MemoryContext context;
	EsWindowRow	 *rows; /* only those that are visible and pass the filters */
	uint32		  nrows;
	uint32		  next;
};

/* A source of chunks in ascending order of keys: positions, or their complement when descending. */
typedef struct EsStream EsStream;

struct EsStream
{
	uint64 key; /* of its next row, or below it; UINT64_MAX = at its end */
	/*
	 * Fills the chunk with rows whose keys are <= limit (at least one row was there, which need
	 * not survive visibility and filters), and moves on.  MORE: the time is up.
	 */
	EsTaskState (*fill)(EsScan *scan, EsStream *stream, uint64 limit, EsChunk *chunk);
	void (*release)(EsStream *stream);
};

struct EsScan
{
	EsTask task;	 /* first */
	int64  deadline; /* of the slice */

	/* the request */
	EsTableKey	  table;
	uint16		  flags;
	bool		  ordered;
	bool		  descending;
	bool		  bounded; /* after or below given */
	EsPosition	  after;
	EsPosition	  below;	/* UINT64_MAX = none */
	uint64		  max_rows; /* UINT64_MAX = all */
	uint64		  batch_bytes;
	uint32		  credit;
	EsSnapshot	  snapshot;
	uint64		  context_hash;
	const void	 *context;
	Size		  context_len;
	const EsLsn	 *dead;
	uint32		  ndead;
	EsScanFilter *filters;
	int			  nfilters;
	int			  natts;  /* of the request */
	bool		 *wanted; /* natts: to be sent */
	bool		 *needed; /* natts: or filtered by */

	/* the view */
	EsScanMem	  *mems; /* oldest first; the own staged ones last */
	int			   nmems;
	bool		   has_own; /* the last of mems is */
	EsScanSegment *segments;
	int			   nsegments;

	/* phases: committed rows and own ones, in the order that the request wants */
	int	 phase;
	bool own_phase;
	bool phase_ready;

	/* ordered: streams of this phase */
	EsStream		**streams;
	int				  nstreams;
	struct EsCollect *collect; /* context: rows of MemTables being gathered */

	/* any order: where it stands */
	int			at_mem;
	uint32		at_batch;
	uint32		at_row;
	int			at_segment;
	uint64		at_segment_row;
	EsRowBlock *block;

	EsChunk chunk;

	/* transactions asked last */
	const EsTxn *asked;
	bool		 asked_visible;

	/* xids of rows skipped, if wanted */
	EsFxid *skipped;
	uint32	nskipped;
	uint32	skipped_allocated;

	/* output */
	int			   *columns; /* numbers of the wanted columns */
	int				ncolumns;
	const void	  **values; /* natts */
	EsBatchBuilder *builder;
	EsBatchMeta		builder_meta;
	EsColumnDesc   *descs;	/* natts: of the builder */
	int				ndescs; /* its columns: those of the rows' source */
	bool			builder_own;
	uint32			next_check; /* rows at which the size is looked at again */
	uint64			counted;	/* count only: rows not sent */
	uint64			ordinal;
	uint64			rows_out;
	uint64			rows_scanned;
	uint64			rows_pruned;
	bool			full;	/* what is built goes out before anything else */
	bool			failed; /* an error was sent */
};

/* ---- scan_view.c ---- */

extern void es_scan_open_view(EsScan *scan);
extern void es_scan_close_view(EsScan *scan);
/* Opens the file; false = failed. */
extern bool es_scan_open_segment(EsScan *scan, EsScanSegment *s);
/* Damage: sends the error, scan->failed. */
extern void es_scan_damage(EsScan *scan, EsSegmentRef *ref, const EsError *err);
/* Are the rows of this batch (of a MemTable) visible?  Own ones: to be judged by cid. */
extern bool es_scan_batch_visible(EsScan *scan, const EsMemBatch *b);
/* Is the batch read from this MemTable, not from a newer one that it was carried over to? */
static inline bool
es_scan_batch_here(const EsScanMem *m, const EsMemBatch *b)
{
	return !m->carried || b->moved_to == 0;
}
extern void es_scan_skip(EsScan *scan, EsFxid fxid);
/* Sorts and uniques scan->skipped. */
extern void es_scan_skip_sort(EsScan *scan);

static inline EsMemBatch *
es_scan_mem_batch(const EsScanMem *m, uint32 i)
{
	return m->own != NULL ? m->own[i] : m->store->batches[i];
}

/* ---- scan_filter.c ---- */

/* Takes the filters of the request; false = malformed. */
extern bool es_scan_parse_filters(EsScan *scan, const char *p, Size len, uint32 n);
/* Leaves the rows that are visible, live, within the bounds and pass the filters. */
extern void es_scan_thin_chunk(EsScan *scan, EsChunk *chunk);
/* Has the zone no row that passes? */
extern bool		  es_scan_zone_excluded(EsScan *scan, const EsScanSegment *s, uint32 zone);
extern EsPosition es_chunk_position(const EsScan *scan, const EsChunk *chunk, uint32 row);
extern int64	  es_chunk_version(const EsScan *scan, const EsChunk *chunk, uint32 row);
/* Value of the role position or version as readers see it; false = NULL. */
extern bool
es_chunk_role_value(const EsScan *scan, const EsChunk *c, bool is_position, uint32 row, int64 *value);
/* Value of a column that is neither position nor version. */
static inline const void *
es_chunk_value(const EsChunk *c, int column, uint32 row)
{
	if (column >= c->ncols)
		return NULL;
	if (c->kind == ES_CHUNK_MEM)
		return es_batch_is_null(&c->batch->view, column, row) ? NULL
															  : es_batch_value(&c->batch->view, column, row);
	return es_block_value(c->block, column, row);
}
extern void es_chunk_of_batch(EsChunk *chunk, const EsMemBatch *b, bool own);
extern void es_chunk_of_block(EsChunk *chunk, EsScanSegment *s, const EsRowBlock *block, uint64 first_row);

/* ---- scan_any.c ---- */

/* Next chunk in no particular order: MORE = chunk filled or time is up (then it is empty). */
extern EsTaskState es_scan_any_next(EsScan *scan, EsChunk *chunk);

/* ---- scan_order.c: the merge; scan_mem.c, scan_window.c, scan_context.c: its streams ---- */

extern EsTaskState es_scan_ordered_next(EsScan *scan, EsChunk *chunk);
extern void		   es_scan_close_streams(EsScan *scan);
extern void		   es_scan_add_stream(EsScan *scan, EsStream *stream);

static inline uint64
es_scan_key(const EsScan *scan, EsPosition position)
{
	return scan->descending ? ~position : position;
}

extern EsStream *es_stream_of_mem(EsScan *scan, EsScanMem *m);
extern EsStream *es_stream_of_segment(EsScan *scan, EsScanSegment *s);
/* Adds the streams of one context; MORE = time is up, call again. */
extern EsTaskState es_scan_context_streams(EsScan *scan);

/* ---- scan_output.c ---- */

/* Moves rows from the chunk to the batch being built until it is full or the chunk is empty. */
typedef enum EsOutput
{
	ES_OUTPUT_ROOM, /* chunk is empty */
	ES_OUTPUT_FULL	/* send before going on */
} EsOutput;

extern EsOutput es_scan_put_chunk(EsScan *scan, EsChunk *chunk);
extern bool		es_scan_output_pending(const EsScan *scan);
/* Sends what was built (perhaps nothing). */
extern void es_scan_send(EsScan *scan, bool last);
extern void es_scan_output_free(EsScan *scan);

#endif /* ES_SHARD_SCAN_H */
