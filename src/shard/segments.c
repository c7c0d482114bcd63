/*-------------------------------------------------------------------------
 *
 * segments.c
 *	  The shard's live segments: by table, by id, opened when needed.
 *
 * The live set is what the durable manifest names, plus what a pending segment
 * learned from its FINISH.  It is an array in the order of ids, and one such array per
 * table.  A reader takes a reference to each segment of its table when it begins
 * and so keeps the files of its view: a segment that is dropped meanwhile stays readable
 * and leaves the disk only after the last reader, and after obsolete_retention, since
 * a base backup may still be copying it.  If the server dies before, the next
 * start removes it: no manifest names it.
 *
 * Opening reads header and footer and compares them with what the manifest says
 * of the file, so that one file cannot stand for another.  Files are opened through
 * fd.c, which closes and opens them again as descriptors become scarce.
 *
 * Memory.  An open segment holds its footer, decoded pages, and perhaps the order of its
 * rows by position (segment_rows.c).  All of it together is kept within cache_size: open
 * segments stand in a list, least recently used last, and what is beyond
 * the limit goes from there: a segment without readers is closed, one with readers gives
 * up its pages only.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <fcntl.h>
#include <unistd.h>

#include "storage/fd.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#include "guc.h"
#include "ipc/fault.h"
#include "shard/files.h"
#include "shard/segments.h"
#include "shard/shard.h"

const EsColumnDesc es_pending_columns[ES_PENDING_COLUMNS] = {[ES_PENDING_PLACE] = {8, 8, ES_COLUMN_BYVAL},
															 [ES_PENDING_CID] = {4, 4, ES_COLUMN_BYVAL},
															 [ES_PENDING_ORDINAL] = {8, 8, ES_COLUMN_BYVAL}};

typedef struct SegmentArray
{
	EsSegmentRef **refs; /* ascending id */
	uint32		   n;
	uint32		   allocated;
} SegmentArray;

typedef struct TableSegments
{
	EsTableKey	 key; /* hash key */
	SegmentArray segments;
} TableSegments;

static MemoryContext segments_context = NULL;
static HTAB			*tables = NULL;
static SegmentArray	 live;
static uint64		 last_number = 0;

static dlist_head dropped = DLIST_STATIC_INIT(dropped);
static dlist_head lru = DLIST_STATIC_INIT(lru); /* most recently used first */

static Size cache_limit = 64 * 1024 * 1024;
static Size cache_used = 0; /* sum of memory of all in lru */

/* ---- arrays in the order of ids ---- */

static uint32
array_search(const SegmentArray *a, uint64 id)
{
	uint32 low = 0;
	uint32 high = a->n;

	while (low < high)
	{
		uint32 mid = low + (high - low) / 2;

		if (a->refs[mid]->entry.segment.id < id)
			low = mid + 1;
		else
			high = mid;
	}
	return low;
}

static void
array_insert(SegmentArray *a, EsSegmentRef *ref)
{
	uint32 at = array_search(a, ref->entry.segment.id);

	if (a->n == a->allocated)
	{
		uint32 allocated = Max(8, a->allocated * 2);

		if (a->refs == NULL)
			a->refs = MemoryContextAlloc(segments_context, allocated * sizeof(EsSegmentRef *));
		else
			a->refs = repalloc(a->refs, allocated * sizeof(EsSegmentRef *));
		a->allocated = allocated;
	}
	memmove(a->refs + at + 1, a->refs + at, (a->n - at) * sizeof(EsSegmentRef *));
	a->refs[at] = ref;
	a->n++;
}

static void
array_remove(SegmentArray *a, EsSegmentRef *ref)
{
	uint32 at = array_search(a, ref->entry.segment.id);

	Assert(at < a->n && a->refs[at] == ref);
	a->n--;
	memmove(a->refs + at, a->refs + at + 1, (a->n - at) * sizeof(EsSegmentRef *));
}

static void
segments_init(void)
{
	HASHCTL ctl;

	if (tables != NULL)
		return;
	segments_context =
		AllocSetContextCreate(TopMemoryContext, "event_store segments", ALLOCSET_DEFAULT_SIZES);
	memset(&ctl, 0, sizeof(ctl));
	ctl.keysize = sizeof(EsTableKey);
	ctl.entrysize = sizeof(TableSegments);
	ctl.hcxt = segments_context;
	tables = hash_create("event_store segments of tables", 64, &ctl, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
}

static TableSegments *
table_segments(const EsTableKey *key, bool create)
{
	TableSegments *t;
	bool		   found;

	if (tables == NULL)
		return NULL;
	t = hash_search(tables, key, create ? HASH_ENTER : HASH_FIND, &found);
	if (create && !found)
		memset(&t->segments, 0, sizeof(t->segments));
	return t;
}

/* ---- the live set ---- */

static void *
copy_array(const void *from, Size len)
{
	void *to;

	if (from == NULL || len == 0)
		return NULL;
	to = malloc(len);
	if (to == NULL)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
	memcpy(to, from, len);
	return to;
}

void
es_segments_changed(void)
{
	uint64 rows = 0;
	uint64 bytes = 0;
	uint64 pending = 0;

	for (uint32 i = 0; i < live.n; i++)
	{
		const EsManifestEntry *e = &live.refs[i]->entry;

		bytes += e->segment.file_len;
		if (e->pending)
			pending++;
		else
			rows += e->adopted ? e->nlive : e->segment.nrows;
	}
	ES_SET(segments, live.n - pending);
	ES_SET(segment_rows, rows);
	ES_SET(segment_bytes, bytes);
	ES_SET(pending_segments, pending);
}

static EsSegmentRef *
add_segment(const EsManifestEntry *entry, EsTxn *txn)
{
	EsSegmentRef *ref;
	MemoryContext old;

	segments_init();
	old = MemoryContextSwitchTo(segments_context);
	ref = palloc0(sizeof(EsSegmentRef));
	ref->refs = 1;
	ref->number = ++last_number;
	ref->fd = -1;
	ref->entry = *entry;
	ref->entry.dead_bitmap = copy_array(entry->dead_bitmap, (entry->segment.nrows + 63) / 64 * 8);
	ref->entry.first_versions = copy_array(
		entry->first_versions, es_manifest_versions_len(entry->nfirst_versions, entry->version_width));
	ref->entry.starts = copy_array(entry->starts, entry->nstarts * sizeof(uint64));
	ref->starts = ref->entry.starts;
	ref->path = es_path_segment(es_shard_id, entry->segment.id);
	MemoryContextSwitchTo(old);

	if (txn != NULL)
	{
		es_txn_ref(txn);
		ref->txn = txn;
	}
	array_insert(&live, ref);
	array_insert(&table_segments(&entry->segment.table, true)->segments, ref);
	return ref;
}

void
es_segments_load(const EsManifestState *manifest)
{
	segments_init();
	for (uint32 i = 0; i < manifest->nentries; i++)
	{
		const EsManifestEntry *entry = &manifest->entries[i];
		EsTxn				  *txn = NULL;
		EsSegmentRef		  *ref;

		if (entry->pending)
			txn = es_txn_get(entry->segment.min_fxid);
		ref = add_segment(entry, txn);
		if (txn != NULL)
		{
			MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);

			txn->pending = lappend(txn->pending, ref);
			MemoryContextSwitchTo(old);
		}
	}
	es_segments_set_cache((Size) es_guc_cache_size * 1024);
	es_segments_changed();
}

EsSegmentRef *
es_segments_add(const EsManifestEntry *entry, EsTxn *txn)
{
	EsSegmentRef *ref = add_segment(entry, txn);

	es_segments_changed();
	return ref;
}

static void
drop_segment(EsSegmentRef *ref)
{
	array_remove(&live, ref);
	array_remove(&table_segments(&ref->entry.segment.table, false)->segments, ref);
	ref->dropped = true;
	ref->dropped_at = GetCurrentTimestamp();
	dlist_push_tail(&dropped, &ref->node);
	es_segment_unref(ref);
}

void
es_segments_drop(uint64 id)
{
	EsSegmentRef *ref = es_segments_find(id);

	if (ref == NULL)
		return;
	drop_segment(ref);
	es_segments_changed();
}

void
es_segments_drop_storage(const EsTableKey *table)
{
	TableSegments *t = table_segments(table, false);

	if (t == NULL)
		return;
	while (t->segments.n > 0)
		drop_segment(t->segments.refs[t->segments.n - 1]);
	if (t->segments.refs != NULL)
		pfree(t->segments.refs);
	hash_search(tables, table, HASH_REMOVE, NULL);
	es_segments_changed();
}

EsSegmentRef *
es_segments_find(uint64 id)
{
	uint32 at = array_search(&live, id);

	return at < live.n && live.refs[at]->entry.segment.id == id ? live.refs[at] : NULL;
}

EsSegmentRef **
es_segments_of(const EsTableKey *table, int *n)
{
	TableSegments *t = table_segments(table, false);
	EsSegmentRef **refs;

	*n = t != NULL ? (int) t->segments.n : 0;
	if (*n == 0)
		return NULL;
	refs = palloc(*n * sizeof(EsSegmentRef *));
	for (int i = 0; i < *n; i++)
	{
		refs[i] = t->segments.refs[i];
		refs[i]->refs++;
	}
	return refs;
}

EsSegmentRef *
es_segments_each(uint32 *state)
{
	return *state < live.n ? live.refs[(*state)++] : NULL;
}

void
es_segment_ref(EsSegmentRef *ref)
{
	ref->refs++;
}

void
es_segment_unref(EsSegmentRef *ref)
{
	Assert(ref->refs > 0);
	ref->refs--;
	if (ref->refs == 0)
		es_segment_forget_txn(ref);
}

void
es_segment_forget_txn(EsSegmentRef *ref)
{
	EsTxn *txn = ref->txn;

	if (txn == NULL)
		return;
	ref->txn = NULL;
	es_txn_unref(txn);
}

/* ---- the cache ---- */

static void
close_segment(EsSegmentRef *ref)
{
	es_segment_rows_free(ref);
	if (ref->segment != NULL)
		es_segment_close(ref->segment);
	ref->segment = NULL;
	if (ref->fd >= 0)
		FileClose(ref->fd);
	ref->fd = -1;
	if (ref->lru.next != NULL)
	{
		dlist_delete(&ref->lru);
		ref->lru.next = NULL;
		cache_used -= ref->memory;
	}
	ref->memory = 0;
}

static void
count_memory(EsSegmentRef *ref)
{
	Size memory = es_segment_memory(ref->segment) + es_segment_rows_memory(ref);

	cache_used = cache_used - ref->memory + memory;
	ref->memory = memory;
}

/* A single segment may use as much: the rest stays for others that are read along with it. */
static Size
pages_of_one(void)
{
	return cache_limit / 2;
}

/* Makes room, sparing keep. */
static void
shrink_cache(const EsSegmentRef *keep)
{
	dlist_node *at;
	dlist_node *next;

	for (at = lru.head.prev; cache_used > cache_limit && at != &lru.head; at = next)
	{
		EsSegmentRef *ref = dlist_container(EsSegmentRef, lru, at);

		next = at->prev;
		if (ref == keep)
			continue;
		/* the list of live segments has one; a dropped one is in it no more */
		if (ref->refs <= (ref->dropped ? 0 : 1))
			close_segment(ref);
		else
		{
			es_segment_set_cache(ref->segment, 0);
			es_segment_set_cache(ref->segment, pages_of_one());
			count_memory(ref);
		}
	}
}

void
es_segments_set_cache(Size bytes)
{
	dlist_iter iter;

	if (bytes == cache_limit)
		return;
	cache_limit = bytes;
	dlist_foreach(iter, &lru)
		es_segment_set_cache(dlist_container(EsSegmentRef, lru, iter.cur)->segment, pages_of_one());
	shrink_cache(NULL);
}

/* ---- files ---- */

static void
free_segment(EsSegmentRef *ref)
{
	close_segment(ref);
	es_segment_forget_txn(ref);
	free(ref->entry.dead_bitmap);
	free(ref->entry.first_versions);
	free(ref->entry.starts);
	pfree(ref->path);
	pfree(ref);
}

void
es_segments_tick(void)
{
	dlist_mutable_iter iter;
	TimestampTz		   now;

	if (dlist_is_empty(&dropped))
		return;

	now = GetCurrentTimestamp();
	dlist_foreach_modify(iter, &dropped)
	{
		EsSegmentRef *ref = dlist_container(EsSegmentRef, node, iter.cur);

		if (ref->refs > 0)
			continue;
		close_segment(ref);
		if (!TimestampDifferenceExceeds(ref->dropped_at, now,
										Min(es_guc_obsolete_retention, INT_MAX / 1000) * 1000))
			continue;
		ES_FAULT("segment-unlink");
		if (unlink(ref->path) != 0 && errno != ENOENT)
			ereport(LOG, (errcode_for_file_access(), errmsg("could not remove file \"%s\": %m", ref->path),
						  errhint("It is no longer needed; the next start of the server tries again.")));
		dlist_delete(&ref->node);
		free_segment(ref);
	}
}

static EsStatus
read_file(void *arg, void *buf, size_t len, uint64_t offset, EsError *err)
{
	EsSegmentRef *ref = arg;
	size_t		  done = 0;

	while (done < len)
	{
		int n;

		errno = ES_FAULT_IO("segment-read");
		if (errno != 0)
			n = -1;
		else
			n = FileRead(ref->fd, (char *) buf + done, (int) Min(len - done, 1 << 30),
						 (off_t) (offset + done), WAIT_EVENT_DATA_FILE_READ);
		if (n < 0)
		{
			if (errno == EINTR)
				continue;
			ES_COUNT(io_errors, 1);
			return es_fail(err, ES_ERR_IO, offset, "could not read: %s", strerror(errno));
		}
		if (n == 0)
			return es_fail(err, ES_ERR_TRUNCATED, offset + done, "file ends %zu bytes before it should",
						   len - done);
		done += n;
	}
	return ES_OK;
}

/* Is the file the one that the manifest means? */
static EsStatus
check_file(const EsSegmentRef *ref, EsError *err)
{
	const EsSegmentInfo		*info = es_segment_info(ref->segment);
	const EsManifestSegment *m = &ref->entry.segment;

	if (memcmp(info->identity.store_uuid, es_shared->store_uuid, ES_UUID_LEN) != 0 ||
		info->identity.shard != es_shard_id)
		return es_fail(err, ES_ERR_FOREIGN, 0, "file belongs to another store or shard");
	if (info->id != m->id || !es_table_key_equal(&info->table, &m->table) || info->summary.nrows != m->nrows)
		return es_fail(err, ES_ERR_CORRUPT, 0,
					   "file holds segment %llu of %llu rows, the manifest says segment %llu of %llu",
					   (unsigned long long) info->id, (unsigned long long) info->summary.nrows,
					   (unsigned long long) m->id, (unsigned long long) m->nrows);
	if (info->summary.footer_crc != m->footer_crc)
		return es_fail_crc(err, m->file_len, m->footer_crc, info->summary.footer_crc,
						   "footer is not the one that the manifest names");
	return ES_OK;
}

/* What is said of a file that cannot be used, as es_corruption() says it of other files. */
static int
refusal_of(const EsError *err, const char **what, const char **hint)
{
	switch (err->status)
	{
		case ES_ERR_IO:
			*what = "cannot be read";
			break;
		case ES_ERR_VERSION:
			*what = "was made by another version of event_store";
			*hint = "Install the version of event_store that made the file, or a newer one.";
			return ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
		case ES_ERR_FOREIGN:
			*what = "belongs to another event store";
			*hint = "Files of event_store cannot be copied from one cluster to another.";
			return ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
		default:
			*what = "is damaged";
			break;
	}
	*hint = "event_store.verify() lists all damage; what does not need this file goes on working.";
	return err->status == ES_ERR_IO ? ERRCODE_IO_ERROR : ERRCODE_DATA_CORRUPTED;
}

void
es_segment_damaged(EsSegmentRef *ref, const EsError *err)
{
	const char *what;
	const char *hint;
	int			code;

	if (err->status == ES_ERR_NOMEM)
		return;
	if (err->status != ES_ERR_IO)
		ES_COUNT(corruptions, 1);
	code = refusal_of(err, &what, &hint);
	ereport(LOG,
			(errcode(code), errmsg("file \"%s\" %s", ref->path, what),
			 err->expected_crc != 0 || err->found_crc != 0
				 ? errdetail("At offset %llu: %s; expected checksum %08X, found %08X.",
							 (unsigned long long) err->offset, err->what, err->expected_crc, err->found_crc)
				 : errdetail("At offset %llu: %s.", (unsigned long long) err->offset, err->what)));
}

void
es_segment_send_error(EsConn *conn, uint16 type, uint64 id, const char *path, const EsError *err)
{
	char		message[MAXPGPATH + 64];
	char		detail[256];
	const char *what;
	const char *hint;
	int			code;

	if (err->status == ES_ERR_NOMEM)
	{
		es_conn_send_error(conn, type, id, ERRCODE_OUT_OF_MEMORY,
						   "out of memory in a shard of the event store", "", "");
		return;
	}
	code = refusal_of(err, &what, &hint);
	snprintf(message, sizeof(message), "file \"%s\" %s", path, what);
	if (err->expected_crc != 0 || err->found_crc != 0)
		snprintf(detail, sizeof(detail), "At offset %llu: %s; expected checksum %08X, found %08X.",
				 (unsigned long long) err->offset, err->what, err->expected_crc, err->found_crc);
	else
		snprintf(detail, sizeof(detail), "At offset %llu: %s.", (unsigned long long) err->offset, err->what);
	es_conn_send_error(conn, type, id, code, message, detail, hint);
}

EsSegment *
es_segment_handle(EsSegmentRef *ref, EsError *err)
{
	EsStatus status;

	if (ref->segment != NULL)
	{
		if (lru.head.next != &ref->lru)
		{
			/* what the one used before has grown to is known only now */
			count_memory(dlist_head_element(EsSegmentRef, lru, &lru));
			dlist_move_head(&lru, &ref->lru);
			if (cache_used > cache_limit)
				shrink_cache(ref);
		}
		return ref->segment;
	}

	memset(err, 0, sizeof(*err));
	ref->fd = PathNameOpenFile(ref->path, O_RDONLY | PG_BINARY);
	if (ref->fd < 0)
	{
		if (errno == ENOENT)
			es_fail(err, ES_ERR_CORRUPT, 0, "file is missing");
		else
			es_fail(err, ES_ERR_IO, 0, "could not open: %s", strerror(errno));
		es_segment_damaged(ref, err);
		return NULL;
	}
	status = es_segment_open(&ref->segment, read_file, ref, ref->entry.segment.file_len, err);
	if (status != ES_OK)
		ref->segment = NULL;
	else
		status = check_file(ref, err);
	if (status != ES_OK)
	{
		err->status = status;
		close_segment(ref);
		es_segment_damaged(ref, err);
		return NULL;
	}
	es_segment_set_cache(ref->segment, pages_of_one());
	if (!dlist_is_empty(&lru))
		count_memory(dlist_head_element(EsSegmentRef, lru, &lru));
	dlist_push_head(&lru, &ref->lru);
	count_memory(ref);
	shrink_cache(ref);
	return ref->segment;
}

const char *
es_segment_path(const EsSegmentRef *ref)
{
	return ref->path;
}
