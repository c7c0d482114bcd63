/*-------------------------------------------------------------------------
 *
 * arena.c
 *	  The shard's DSA area (see arena.h).
 *
 * A transaction of one row is the common case, and dsa_allocate takes a lock and a
 * search per object.  So pieces of up to a quarter of a chunk are carved
 * from the current chunk by moving a pointer; a chunk only counts its live
 * pieces.  Larger ones are allocated by themselves.
 *
 * The area is not pinned: it lives as long as a process is attached.  When a
 * shard ends, whatever a maintenance worker still reads stays until the worker lets
 * go, and the next incarnation begins with an empty area of its own.
 *
 * When the system has no shared memory left, dsm_create raises an ERROR even for
 * DSA_ALLOC_NO_OOM, while DSA holds its lock.  es_arena_alloc turns that
 * into "no memory": it drops the lock as the end of a transaction would, which is right
 * because make_new_segment changes nothing before dsm_create has returned.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "storage/lwlock.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "ipc/fault.h"
#include "shard/arena.h"
#include "shard/shard.h"

#define CHUNK_SIZE	   (64 * 1024)
#define CARVE_MAX	   (CHUNK_SIZE / 4)
#define PROBE_SIZE	   (256 * 1024) /* bytes that must be there before memory is no longer short */
#define PROBE_INTERVAL 100			/* ms */
#define PATIENCE	   10000		/* ms until writers are refused */
#define PATIENCE_IDLE  1000			/* ... when nothing is under way that could free memory */

struct EsArenaChunk
{
	dsa_pointer pointer;
	char	   *address;
	uint32		used;
	uint32		live; /* pieces not released, +1 while it is the current chunk */
};

dsa_area *es_arena = NULL;
bool	  es_arena_short = false;
uint64	  es_arena_private = 0;

static EsArenaChunk *current_chunk[2];
static MemoryContext chunk_context;
static MemoryContext private_context;
static TimestampTz	 last_complaint;
static TimestampTz	 short_since; /* or since memory was freed last */
static TimestampTz	 short_until; /* when it was over last */
static TimestampTz	 probe_at;
static Size			 wanted;  /* largest piece that waits, as far as it was tried since the last probe */
static bool			 gave_up; /* until there is memory again */
static dsa_pointer	 reserve;
static bool			 reserve_lent;

void
es_arena_init(void)
{
	/* The locks' tranche is the one that all our locks have. */
	es_arena = dsa_create(es_shared->ring_lock->tranche);
	dsa_pin_mapping(es_arena);
	chunk_context = SlabContextCreate(TopMemoryContext, "event_store arena chunks", SLAB_DEFAULT_BLOCK_SIZE,
									  sizeof(EsArenaChunk));
	private_context =
		AllocSetContextCreate(TopMemoryContext, "event_store rows outside the arena", ALLOCSET_DEFAULT_SIZES);
	/* most of the area's first segment */
	reserve = dsa_allocate_extended(es_arena, ES_ARENA_RESERVE, DSA_ALLOC_NO_OOM);
	pg_atomic_write_u32(&es_shard->arena, dsa_get_handle(es_arena));
}

static void
note_short(void)
{
	TimestampTz now;

	if (es_arena_short)
		return;
	es_arena_short = true;
	now = GetCurrentTimestamp();
	probe_at = TimestampTzPlusMilliseconds(now, PROBE_INTERVAL);
	/* a probe that succeeded although more is needed is no relief */
	if (TimestampDifferenceExceeds(short_until, now, PATIENCE_IDLE))
		short_since = now;
}

dsa_pointer
es_arena_alloc(Size size)
{
	MemoryContext		 caller = CurrentMemoryContext;
	volatile dsa_pointer result = InvalidDsaPointer;

	if (ES_FAULT_IO("arena-alloc") != 0)
	{
		note_short();
		return InvalidDsaPointer;
	}

	PG_TRY();
	{
		result = dsa_allocate_extended(es_arena, size, DSA_ALLOC_NO_OOM | DSA_ALLOC_HUGE);
	}
	PG_CATCH();
	{
		TimestampTz now = GetCurrentTimestamp();

		/* See above: the only lock that can be held here is DSA's. */
		MemoryContextSwitchTo(caller);
		LWLockReleaseAll();
		if (TimestampDifferenceExceeds(last_complaint, now, 60 * 1000))
		{
			ErrorData *error = CopyErrorData();

			ereport(
				LOG,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("shard %d has no shared memory for %zu bytes of rows: %s", es_shard_id, size,
						error->message),
				 errdetail(
					 "It writes rows to segments to make room.  While that does not help, inserts are refused."),
				 errhint(
					 "Give the server more shared memory (in a container /dev/shm), or lower event_store.memtable_size and event_store.staging_size.")));
			FreeErrorData(error);
			last_complaint = now;
		}
		FlushErrorState();
		result = InvalidDsaPointer;
	}
	PG_END_TRY();

	if (!DsaPointerIsValid(result))
		note_short();
	return result;
}

static EsArenaChunk *
new_chunk(void)
{
	dsa_pointer	  pointer = es_arena_short ? InvalidDsaPointer : es_arena_alloc(CHUNK_SIZE);
	EsArenaChunk *chunk;

	if (!DsaPointerIsValid(pointer))
		return NULL;
	chunk = MemoryContextAlloc(chunk_context, sizeof(EsArenaChunk));
	chunk->pointer = pointer;
	chunk->address = dsa_get_address(es_arena, pointer);
	chunk->used = 0;
	chunk->live = 1;
	return chunk;
}

static inline void
chunk_unref(EsArenaChunk *chunk)
{
	Assert(chunk->live > 0);
	if (--chunk->live == 0)
	{
		dsa_free(es_arena, chunk->pointer);
		pfree(chunk);
	}
}

/*
 * A piece for whose copy the reserve is too small waits for a flush or spill of what came before it, as
 * long as there is hope: once in the same MemTable it would keep that from being flushed.
 */
static void *
private_memory(Size size, dsa_pointer *pointer, EsArenaChunk **chunk)
{
	void *p;

	*pointer = InvalidDsaPointer;
	*chunk = NULL;
	if (size > ES_ARENA_RESERVE / 2 && pg_atomic_read_u32(&es_shard->state) == ES_SHARD_OPEN &&
		!es_arena_stuck(false))
	{
		wanted = Max(wanted, size);
		return NULL;
	}
	p = MemoryContextAllocExtended(private_context, size, MCXT_ALLOC_HUGE | MCXT_ALLOC_NO_OOM);
	if (p != NULL)
		es_arena_private++;
	return p;
}

void *
es_arena_carve(EsArenaKind kind, Size size, dsa_pointer *pointer, EsArenaChunk **chunk)
{
	EsArenaChunk *c = current_chunk[kind];

	size = MAXALIGN(size);
	if (size > CARVE_MAX)
	{
		*chunk = NULL;
		*pointer = es_arena_short ? InvalidDsaPointer : es_arena_alloc(size);
		return DsaPointerIsValid(*pointer) ? dsa_get_address(es_arena, *pointer)
										   : private_memory(size, pointer, chunk);
	}
	if (c == NULL || size > CHUNK_SIZE - c->used)
	{
		EsArenaChunk *fresh = new_chunk();

		if (fresh == NULL)
			return private_memory(size, pointer, chunk);
		if (c != NULL)
			chunk_unref(c);
		c = current_chunk[kind] = fresh;
	}
	*pointer = c->pointer + c->used;
	*chunk = c;
	c->live++;
	c->used += size;
	return c->address + (c->used - size);
}

void
es_arena_release(void *address, dsa_pointer pointer, EsArenaChunk *chunk)
{
	if (chunk != NULL)
	{
		chunk_unref(chunk);
		/* The last piece of the current chunk went: begin it anew. */
		for (int k = 0; k < 2; k++)
			if (chunk == current_chunk[k] && chunk->live == 1)
				chunk->used = 0;
	}
	else if (DsaPointerIsValid(pointer))
		dsa_free(es_arena, pointer);
	else
	{
		pfree(address);
		es_arena_private--;
	}
}

dsa_pointer
es_arena_job_alloc(Size size)
{
	dsa_pointer pointer = es_arena_short && size <= ES_ARENA_RESERVE && !reserve_lent ? InvalidDsaPointer
																					  : es_arena_alloc(size);

	if (DsaPointerIsValid(pointer) || size > ES_ARENA_RESERVE || reserve_lent)
		return pointer;
	reserve_lent = DsaPointerIsValid(reserve);
	return reserve;
}

void
es_arena_job_free(dsa_pointer pointer)
{
	if (pointer == reserve)
		reserve_lent = false;
	else
		dsa_free(es_arena, pointer);
}

void
es_arena_tick(TimestampTz now)
{
	dsa_pointer probe;

	if (!es_arena_short || now < probe_at)
		return;
	probe_at = TimestampTzPlusMilliseconds(now, PROBE_INTERVAL);
	probe = es_arena_alloc(Max(PROBE_SIZE, wanted));
	wanted = 0;
	if (!DsaPointerIsValid(probe))
		return;
	dsa_free(es_arena, probe);
	es_arena_short = gave_up = false;
	short_until = now;
}

void
es_arena_freed(void)
{
	short_since = GetCurrentTimestamp();
}

bool
es_arena_stuck(bool idle)
{
	if (es_arena_short && !gave_up)
		gave_up =
			TimestampDifferenceExceeds(short_since, GetCurrentTimestamp(), idle ? PATIENCE_IDLE : PATIENCE);
	return gave_up;
}
