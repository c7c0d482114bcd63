/*-------------------------------------------------------------------------
 *
 * manifest.c
 *	  Reading manifest records and the state that they build; manifest_edit.c makes them.
 *
 * Applying.  Parts change the state one after the other, because a later part of a
 * record may need an earlier one (a segment in the place of those it was merged
 * from, a pending segment adopted at once).  Before a part changes an entry, the
 * entry as it was goes to a list; a part that does not fit takes all of them back in
 * reverse order, and only when the last part was applied is freed what the old
 * entries owned.  An entry in the list and the one in the state never own the
 * same memory.
 *
 * Reading.  A record counts if its checksum, which includes the one before it, is right.
 * Where the first record fails is decided by durable_len; but a file
 * without a good first record is damaged wherever that is, because it only ever comes
 * into being complete, by rename.
 *
 *-------------------------------------------------------------------------
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "core/manifest_internal.h"

/* Does the adoption fit the segment that it is for? */
static bool
adopt_fits(const EsManifestAdopt *a, const uint8_t *dead_bitmap, const EsManifestEntry *e)
{
	uint64_t ndead = 0;

	if (!e->pending || e->segment.min_fxid != a->fxid || a->nfirst_versions > e->segment.nrows)
		return false;
	if (a->dead_bitmap_len == 0)
		return a->nlive == e->segment.nrows;
	if (a->dead_bitmap_len != es_manifest_bitmap_len(e->segment.nrows))
		return false;
	for (uint64_t row = 0; row < e->segment.nrows; row++)
		ndead += (dead_bitmap[row / 8] >> (row % 8)) & 1;
	return a->nlive == e->segment.nrows - ndead;
}

/* ---- the state ---- */

void
es_manifest_state_init(EsManifestState *state)
{
	memset(state, 0, sizeof(*state));
}

static void
entry_free(EsManifestEntry *entry)
{
	free(entry->dead_bitmap);
	free(entry->first_versions);
	free(entry->starts);
}

void
es_manifest_state_free(EsManifestState *state)
{
	for (uint32_t i = 0; i < state->nentries; i++)
		entry_free(&state->entries[i]);
	free(state->entries);
	es_manifest_state_init(state);
}

void
es_manifest_state_slim(EsManifestState *state)
{
	for (uint32_t i = 0; i < state->nentries; i++)
	{
		EsManifestEntry *e = &state->entries[i];

		entry_free(e);
		e->dead_bitmap = NULL;
		e->first_versions = NULL;
		e->nfirst_versions = 0;
		e->starts = NULL;
		e->nstarts = 0;
	}
	state->slim = true;
}

/* Index of the first entry whose id is not below id. */
static uint32_t
lower_bound(const EsManifestState *state, uint64_t id)
{
	uint32_t low = 0;
	uint32_t high = state->nentries;

	/* ids grow, so new ones mostly go to the end */
	if (high > 0 && state->entries[high - 1].segment.id < id)
		return high;
	while (low < high)
	{
		uint32_t mid = low + (high - low) / 2;

		if (state->entries[mid].segment.id < id)
			low = mid + 1;
		else
			high = mid;
	}
	return low;
}

EsManifestEntry *
es_manifest_find(EsManifestState *state, uint64_t id)
{
	uint32_t i = lower_bound(state, id);

	return i < state->nentries && state->entries[i].segment.id == id ? &state->entries[i] : NULL;
}

static EsStatus
reserve_entry(EsManifestState *state)
{
	if (state->nentries == state->allocated)
	{
		uint32_t		 n = state->allocated < 16 ? 16 : state->allocated * 2;
		EsManifestEntry *grown = realloc(state->entries, n * sizeof(*grown));

		if (grown == NULL)
			return ES_ERR_NOMEM;
		state->entries = grown;
		state->allocated = n;
	}
	return ES_OK;
}

/* There is room: reserve_entry() was called. */
static void
insert_entry(EsManifestState *state, const EsManifestEntry *entry)
{
	uint32_t i = lower_bound(state, entry->segment.id);

	memmove(&state->entries[i + 1], &state->entries[i], (state->nentries - i) * sizeof(*state->entries));
	state->entries[i] = *entry;
	state->nentries++;
}

static void
remove_entry(EsManifestState *state, uint32_t i)
{
	state->nentries--;
	memmove(&state->entries[i], &state->entries[i + 1], (state->nentries - i) * sizeof(*state->entries));
}

/* ---- applying a record ---- */

/* One change of the state: what stood at this id before it. */
typedef struct Change
{
	bool			existed; /* else before.segment.id is all that counts */
	EsManifestEntry before;
} Change;

typedef struct Applier
{
	EsManifestState *state;
	EsManifestHead	 old_head;
	EsOwnLsn		 old_flushed_up_to;
	Change			*changes;
	uint32_t		 nchanges;
	uint32_t		 allocated;
	EsError			*err;
	uint64_t		 where; /* of the part at hand */
} Applier;

static EsStatus
no_memory(Applier *a)
{
	return es_fail(a->err, ES_ERR_NOMEM, a->where, "no memory for the manifest");
}

static EsStatus
reserve_change(Applier *a)
{
	if (a->nchanges == a->allocated)
	{
		uint32_t n = a->allocated == 0 ? 8 : a->allocated * 2;
		Change	*grown = realloc(a->changes, n * sizeof(*grown));

		if (grown == NULL)
			return no_memory(a);
		a->changes = grown;
		a->allocated = n;
	}
	return ES_OK;
}

static void
revert(Applier *a)
{
	while (a->nchanges > 0)
	{
		Change			*change = &a->changes[--a->nchanges];
		EsManifestEntry *now = es_manifest_find(a->state, change->before.segment.id);

		if (now != NULL)
		{
			entry_free(now);
			remove_entry(a->state, (uint32_t) (now - a->state->entries));
		}
		/* the array never shrank, so what was there has its place */
		if (change->existed)
			insert_entry(a->state, &change->before);
	}
	a->state->head = a->old_head;
	a->state->flushed_up_to = a->old_flushed_up_to;
}

static void
commit(Applier *a)
{
	for (uint32_t i = 0; i < a->nchanges; i++)
		if (a->changes[i].existed)
			entry_free(&a->changes[i].before);
}

/* Adds *entry, whose memory becomes the state's or is freed. */
static EsStatus
apply_add(Applier *a, EsManifestEntry *entry)
{
	EsManifestState *state = a->state;
	EsStatus		 status;

	if (es_manifest_find(state, entry->segment.id) != NULL)
	{
		entry_free(entry);
		return es_fail(a->err, ES_ERR_CORRUPT, a->where, "segment %016" PRIx64 " is added twice",
					   entry->segment.id);
	}
	status = reserve_change(a);
	if (status == ES_OK && reserve_entry(state) != ES_OK)
		status = no_memory(a);
	if (status != ES_OK)
	{
		entry_free(entry);
		return status;
	}
	a->changes[a->nchanges++] = (Change){.existed = false, .before.segment.id = entry->segment.id};
	insert_entry(state, entry);
	if (entry->segment.id >= state->head.next_segment_id)
		state->head.next_segment_id = entry->segment.id + 1;
	return ES_OK;
}

static EsStatus
apply_drop(Applier *a, uint64_t id)
{
	EsManifestEntry *e = es_manifest_find(a->state, id);
	EsStatus		 status;

	if (e == NULL)
		return es_fail(a->err, ES_ERR_CORRUPT, a->where, "segment %016" PRIx64 " is dropped but not there",
					   id);
	status = reserve_change(a);
	if (status != ES_OK)
		return status;
	a->changes[a->nchanges++] = (Change){.existed = true, .before = *e};
	remove_entry(a->state, (uint32_t) (e - a->state->entries));
	return ES_OK;
}

static EsStatus
apply_drop_storage(Applier *a, const EsTableKey *table)
{
	EsManifestState *state = a->state;
	EsStatus		 status;

	for (uint32_t i = state->nentries; i-- > 0;)
	{
		if (!es_table_key_equal(&state->entries[i].segment.table, table))
			continue;
		status = apply_drop(a, state->entries[i].segment.id);
		if (status != ES_OK)
			return status;
	}
	return ES_OK;
}

/* Copy of an array from a record; *ok becomes false if there is no memory. */
static void *
copy_array(const void *array, size_t len, bool *ok)
{
	void *copy;

	if (len == 0)
		return NULL;
	copy = malloc(len);
	if (copy == NULL)
		*ok = false;
	else
		memcpy(copy, array, len);
	return copy;
}

static EsStatus
apply_pending(Applier *a, const EsManifestPending *p)
{
	bool			ok = true;
	EsManifestEntry entry = {.segment = p->segment,
							 .pending = true,
							 .starts = copy_array(p + 1, p->nstarts * sizeof(uint64_t), &ok),
							 .nstarts = p->nstarts};

	if (!ok)
		return no_memory(a);
	return apply_add(a, &entry);
}

static EsStatus
apply_adopt(Applier *a, const EsManifestAdopt *adopt)
{
	const uint8_t	*bitmap = (const uint8_t *) (adopt + 1);
	EsManifestEntry *e = es_manifest_find(a->state, adopt->id);
	EsManifestEntry	 after;
	bool			 ok = true;
	EsStatus		 status;

	if (e == NULL || !adopt_fits(adopt, bitmap, e))
		return es_fail(a->err, ES_ERR_CORRUPT, a->where,
					   "adoption of segment %016" PRIx64 " does not fit what is there", adopt->id);
	status = reserve_change(a);
	if (status != ES_OK)
		return status;

	after = *e;
	after.pending = false;
	after.adopted = true;
	after.base = adopt->base;
	after.nlive = adopt->nlive;
	after.segment.min_position = adopt->min_position;
	after.segment.max_position = adopt->max_position;
	/* recovery may see the FINISH again and must find its batches: the copy is the new entry's */
	after.starts = copy_array(e->starts, e->nstarts * sizeof(uint64_t), &ok);
	after.dead_bitmap = copy_array(bitmap, adopt->dead_bitmap_len, &ok);
	after.first_versions =
		copy_array(bitmap + adopt->dead_bitmap_len,
				   es_manifest_versions_len(adopt->nfirst_versions, adopt->version_width), &ok);
	after.nfirst_versions = adopt->nfirst_versions;
	after.version_base = adopt->version_base;
	after.version_width = adopt->version_width;
	if (!ok)
	{
		entry_free(&after);
		return no_memory(a);
	}
	a->changes[a->nchanges++] = (Change){.existed = true, .before = *e};
	*e = after;
	return ES_OK;
}

/* Applies one part; what follows its header are `len` bytes at `body`. */
static EsStatus
apply_part(Applier *a, uint32_t type, const void *body, size_t len, bool head_allowed)
{
	EsManifestState *state = a->state;

	switch (type)
	{
		case ES_PART_HEAD:
		{
			const EsManifestHead *head = body;

			if (len != sizeof(*head) || !head_allowed)
				break;
			state->head = *head;
			return ES_OK;
		}
		case ES_PART_SEGMENT:
		{
			const EsManifestSegment *s = body;
			EsManifestEntry			 entry = {0};

			if (len != sizeof(*s) || !es_manifest_segment_valid(s))
				break;
			entry.segment = *s;
			entry.nlive = s->nrows;
			return apply_add(a, &entry);
		}
		case ES_PART_PENDING:
		{
			const EsManifestPending *p = body;

			if (len < sizeof(*p) || !es_manifest_pending_valid(&p->segment) || p->reserved != 0 ||
				len - sizeof(*p) != p->nstarts * sizeof(uint64_t))
				break;
			return apply_pending(a, p);
		}
		case ES_PART_ADOPT:
		{
			const EsManifestAdopt *adopt = body;

			if (len < sizeof(*adopt) || !es_manifest_adopt_valid(adopt) ||
				len - sizeof(*adopt) !=
					adopt->dead_bitmap_len +
						es_manifest_versions_len(adopt->nfirst_versions, adopt->version_width))
				break;
			return apply_adopt(a, adopt);
		}
		case ES_PART_DROP:
		{
			const EsManifestDrop *drop = body;

			if (len != sizeof(*drop))
				break;
			return apply_drop(a, drop->id);
		}
		case ES_PART_FLUSHED:
		{
			const EsManifestFlushed *f = body;

			if (len != sizeof(*f) || f->up_to < state->flushed_up_to)
				break;
			state->flushed_up_to = f->up_to;
			return ES_OK;
		}
		case ES_PART_DROP_STORAGE:
		{
			const EsTableKey *table = body;

			if (len != sizeof(*table) || table->reserved != 0)
				break;
			return apply_drop_storage(a, table);
		}
		default:
			break;
	}
	return es_fail(a->err, ES_ERR_CORRUPT, a->where,
				   "manifest part of type %u and %zu bytes is not valid here", type, len);
}

/* first: this is the first record of a file, which must begin with the head. */
static EsStatus
apply_record(EsManifestState *state, const char *record, size_t len, bool first, uint64_t where, EsError *err)
{
	const EsManifestRecord *h = (const EsManifestRecord *) record;
	size_t					at = sizeof(*h);
	EsStatus				status = ES_OK;
	Applier					a = {
						.state = state, .old_head = state->head, .old_flushed_up_to = state->flushed_up_to, .err = err};

	for (uint32_t i = 0; i < h->nparts && status == ES_OK; i++)
	{
		const EsManifestPart *part = (const EsManifestPart *) (record + at);

		a.where = where + at;
		if (len - at < sizeof(*part) || part->len < sizeof(*part) || part->len % 8 != 0 ||
			part->len > len - at)
			status = es_fail(err, ES_ERR_CORRUPT, a.where, "manifest part %u does not fit its record", i);
		else if (first && i == 0 && part->type != ES_PART_HEAD)
			status = es_fail(err, ES_ERR_CORRUPT, a.where, "manifest does not begin with its head");
		else
		{
			status = apply_part(&a, part->type, part + 1, part->len - sizeof(*part), first && i == 0);
			at += part->len;
		}
	}
	if (status == ES_OK && at != len)
		status = es_fail(err, ES_ERR_CORRUPT, where + at, "manifest record has %zu bytes behind its parts",
						 len - at);
	if (status == ES_OK)
		commit(&a);
	else
		revert(&a);
	free(a.changes);
	return status;
}

/* Is there a record's header at buf, of which len bytes are left, with a length that fits? */
static bool
header_fits(const char *buf, size_t len)
{
	const EsManifestRecord *h = (const EsManifestRecord *) buf;

	return len >= sizeof(*h) && h->magic == ES_MANIFEST_MAGIC && h->len >= sizeof(*h) &&
		   h->len <= ES_MANIFEST_MAX_RECORD && h->len % 8 == 0 && h->len <= len;
}

/*
 * On failure the state is as before.  The record's checksum is the business of who
 * read it.  A head is accepted by a state that has none.
 */
EsStatus
es_manifest_apply(EsManifestState *state, const void *record, size_t len, EsError *err)
{
	const EsManifestRecord *h = record;
	const EsManifestPart   *part;
	bool					first = false;

	if ((uintptr_t) record % 8 != 0)
		return es_fail(err, ES_ERR_ARGUMENT, 0, "manifest record is not aligned");
	if (!header_fits(record, len) || h->len != len)
		return es_fail(err, ES_ERR_CORRUPT, 0, "manifest record is malformed");
	if (h->version != ES_FORMAT_VERSION)
		return es_fail(err, ES_ERR_VERSION, 0, "manifest record has format version %u, this program knows %u",
					   h->version, ES_FORMAT_VERSION);
	if (state->head.generation == 0 && state->nentries == 0 && len >= sizeof(*h) + sizeof(*part))
	{
		part = (const EsManifestPart *) (h + 1);
		first = part->type == ES_PART_HEAD;
	}
	return apply_record(state, record, len, first, 0, err);
}

/* state must be empty.  After a failure it is only good for es_manifest_state_free. */
EsStatus
es_manifest_read(EsManifestState *state, const void *file, size_t len, uint64_t durable_len,
				 uint64_t *valid_len, uint32_t *last_crc, EsError *err)
{
	const char *base = file;
	size_t		at = 0;
	uint32_t	prev_crc = 0;
	EsStatus	status;

	if ((uintptr_t) file % 8 != 0 || state->nentries != 0)
		return es_fail(err, ES_ERR_ARGUMENT, 0, "manifest image is not aligned, or the state not empty");
	for (;;)
	{
		const EsManifestRecord *h = (const EsManifestRecord *) (base + at);
		uint32_t				crc = 0;
		bool					fits = header_fits(base + at, len - at);

		if (fits)
			crc = es_manifest_record_crc(base + at, h->len, prev_crc);
		if (!fits || crc != h->crc)
		{
			if (at > 0 && at >= durable_len)
				break;
			if (at == len)
				return es_fail(err, ES_ERR_CORRUPT, at,
							   "manifest ends before %" PRIu64 " bytes that were durable", durable_len);
			if (fits)
				return es_fail_crc(err, at, h->crc, crc, "manifest record");
			return es_fail(err, ES_ERR_CORRUPT, at, "manifest record is malformed");
		}
		if (h->version != ES_FORMAT_VERSION)
			return es_fail(err, ES_ERR_VERSION, at,
						   "manifest record has format version %u, this program knows %u", h->version,
						   ES_FORMAT_VERSION);
		status = apply_record(state, base + at, h->len, at == 0, at, err);
		if (status != ES_OK)
			return status;
		prev_crc = crc;
		at += h->len;
	}
	*valid_len = at;
	*last_crc = prev_crc;
	return ES_OK;
}

/* ---- rewriting ---- */

typedef struct Image
{
	char	*data;
	size_t	 len;
	size_t	 cap;
	uint32_t crc;
} Image;

/* Appends the edit as a record and starts it anew. */
static EsStatus
image_append(Image *image, EsManifestEdit *e)
{
	const void *record;
	size_t		len;
	EsStatus	status;

	status = es_manifest_edit_record(e, image->crc, &record, &len, &image->crc);
	if (status != ES_OK)
		return status;
	if (image->len + len > image->cap)
	{
		size_t cap = image->cap * 2 > image->len + len ? image->cap * 2 : image->len + len;
		char  *grown = realloc(image->data, cap);

		if (grown == NULL)
			return ES_ERR_NOMEM;
		image->data = grown;
		image->cap = cap;
	}
	memcpy(image->data + image->len, record, len);
	image->len += len;
	es_manifest_edit_restart(e);
	return ES_OK;
}

/* An adopted segment is written as what it was, pending, and its adoption. */
static EsStatus
edit_entry(EsManifestEdit *e, const EsManifestEntry *entry)
{
	EsManifestPending p = {.segment = entry->segment, .nstarts = entry->nstarts};
	EsStatus		  status;

	if (!entry->pending && !entry->adopted)
		return es_manifest_edit_segment(e, &entry->segment);

	p.segment.min_position = 0;
	p.segment.max_position = 0;
	status = es_manifest_edit_pending(e, &p, entry->starts);
	if (status == ES_OK && entry->adopted)
	{
		EsManifestAdopt a = {.id = entry->segment.id,
							 .fxid = entry->segment.min_fxid,
							 .base = entry->base,
							 .min_position = entry->segment.min_position,
							 .max_position = entry->segment.max_position,
							 .nlive = entry->nlive,
							 .dead_bitmap_len = entry->dead_bitmap
													? (uint32_t) es_manifest_bitmap_len(entry->segment.nrows)
													: 0,
							 .nfirst_versions = entry->nfirst_versions,
							 .version_base = entry->version_base,
							 .version_width = entry->version_width};

		status = es_manifest_edit_adopt(e, &a, entry->dead_bitmap, entry->first_versions);
	}
	return status;
}

EsStatus
es_manifest_rewrite(const EsManifestState *state, void **file, size_t *len, uint32_t *last_crc)
{
	EsManifestEdit *e = es_manifest_edit_create();
	Image			image = {0};
	EsStatus		status;

	if (state->slim)
	{
		es_manifest_edit_free(e);
		return ES_ERR_ARGUMENT;
	}
	if (e == NULL)
		return ES_ERR_NOMEM;
	status = es_manifest_edit_part(e, ES_PART_HEAD, &state->head, sizeof(state->head), NULL, 0, NULL, 0);
	if (status == ES_OK && state->flushed_up_to != 0)
		status = es_manifest_edit_flushed(e, state->flushed_up_to);
	if (status == ES_OK)
		status = image_append(&image, e);
	for (uint32_t i = 0; i < state->nentries && status == ES_OK; i++)
	{
		status = edit_entry(e, &state->entries[i]);
		if (status == ES_OK)
			status = image_append(&image, e);
	}
	es_manifest_edit_free(e);
	if (status != ES_OK)
	{
		free(image.data);
		return status;
	}
	*file = image.data;
	*len = image.len;
	*last_crc = image.crc;
	return ES_OK;
}
