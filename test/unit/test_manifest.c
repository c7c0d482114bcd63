/*
 * The manifest: edits are atomic, what was durable is never lost in silence, a rewritten file says the same.
 */
#include "core/manifest.h"
#include "core/segment.h"

#include "tap.h"

/* ---- a model as simple as can be: what each id should be ---- */

#define MAX_IDS	 64
#define MAX_ROWS 200

typedef struct ModelEntry
{
	bool			  live;
	bool			  pending;
	bool			  adopted;
	EsManifestSegment segment;
	uint64_t		  base;
	uint64_t		  nlive;
	bool			  has_bitmap;
	uint8_t			  bitmap[(MAX_ROWS + 63) / 64 * 8];
	uint32_t		  nversions;
	int64_t			  versions[20];
	uint32_t		  nstarts;
	uint64_t		  starts[10];
} ModelEntry;

typedef struct Model
{
	ModelEntry entries[MAX_IDS]; /* index = id; 0 is none */
	uint64_t   next_id;
	EsOwnLsn   flushed;
} Model;

static EsTableKey
random_table(void)
{
	return (EsTableKey){.storage_id = 1 + rnd_below(4), .database = (uint32_t) rnd_below(2)};
}

static uint64_t
random_live(const Model *m, bool pending)
{
	for (int tries = 0; tries < 200; tries++)
	{
		uint64_t id = 1 + rnd_below(MAX_IDS - 1);

		if (m->entries[id].live && m->entries[id].pending == pending)
			return id;
	}
	return 0;
}

static EsManifestSegment
random_segment(uint64_t id, bool pending)
{
	EsManifestSegment s = {.id = id,
						   .table = random_table(),
						   .file_len = rnd(),
						   .nrows = 1 + rnd_below(MAX_ROWS),
						   .footer_crc = (uint32_t) rnd()};

	s.min_fxid = s.max_fxid = 3 + rnd_below(1000);
	if (pending)
		s.flags = ES_SEGMENT_PENDING;
	else
	{
		s.min_position = 1 + rnd_below(1000000);
		s.max_position = s.min_position + rnd_below(1000000);
		s.max_fxid += rnd_below(100);
	}
	return s;
}

/* Makes one random change to the model and adds the part that says so. */
static void
random_part(Model *m, EsManifestEdit *e)
{
	uint64_t id;

	switch (rnd_below(7))
	{
		case 0:
		case 1:
		case 2:
		{
			ModelEntry entry = {.live = true};

			/* mostly the next id; sometimes one that was given out before but comes late */
			id = rnd_below(5) ? m->next_id : 1 + rnd_below(MAX_IDS - 1);
			if (id >= MAX_IDS || m->entries[id].live)
				return;
			entry.pending = rnd_below(2);
			entry.segment = random_segment(id, entry.pending);
			if (entry.pending)
			{
				EsManifestPending p;

				entry.nstarts = (uint32_t) rnd_below(11);
				for (uint32_t i = 0; i < entry.nstarts; i++)
					entry.starts[i] = rnd();
				p = (EsManifestPending){.segment = entry.segment, .nstarts = entry.nstarts};
				CHECK(es_manifest_edit_pending(e, &p, entry.starts) == ES_OK);
			}
			else
			{
				entry.nlive = entry.segment.nrows;
				CHECK(es_manifest_edit_segment(e, &entry.segment) == ES_OK);
			}
			m->entries[id] = entry;
			if (id >= m->next_id)
				m->next_id = id + 1;
			break;
		}
		case 3:
		{
			ModelEntry	   *entry;
			EsManifestEntry packed;
			EsManifestAdopt a;

			id = random_live(m, true);
			if (id == 0)
				return;
			entry = &m->entries[id];
			entry->pending = false;
			entry->adopted = true;
			entry->base = 1 + rnd_below(1000000);
			entry->nlive = entry->segment.nrows;
			entry->has_bitmap = rnd_below(2);
			if (entry->has_bitmap)
			{
				rnd_bytes(entry->bitmap, sizeof(entry->bitmap));
				for (uint64_t row = 0; row < entry->segment.nrows; row++)
					entry->nlive -= (entry->bitmap[row / 8] >> (row % 8)) & 1;
			}
			entry->segment.min_position = entry->base;
			entry->segment.max_position = entry->base + entry->segment.nrows;
			entry->nversions =
				(uint32_t) rnd_below(entry->segment.nrows < 20 ? entry->segment.nrows + 1 : 21);
			for (uint32_t i = 0; i < entry->nversions; i++)
				entry->versions[i] = (int64_t) (rnd() >> (8 * rnd_below(8)));
			memset(&packed, 0, sizeof(packed));
			CHECK(es_manifest_pack_versions(&packed, entry->versions, entry->nversions) == ES_OK);
			a = (EsManifestAdopt){
				.id = id,
				.fxid = entry->segment.min_fxid,
				.base = entry->base,
				.min_position = entry->segment.min_position,
				.max_position = entry->segment.max_position,
				.nlive = entry->nlive,
				.dead_bitmap_len = entry->has_bitmap ? (uint32_t) ((entry->segment.nrows + 63) / 64 * 8) : 0,
				.nfirst_versions = entry->nversions,
				.version_base = packed.version_base,
				.version_width = packed.version_width};
			CHECK(es_manifest_edit_adopt(e, &a, entry->bitmap, packed.first_versions) == ES_OK);
			free(packed.first_versions);
			break;
		}
		case 4:
			id = random_live(m, rnd_below(2));
			if (id == 0)
				return;
			m->entries[id].live = false;
			CHECK(es_manifest_edit_drop(e, id) == ES_OK);
			break;
		case 5:
			m->flushed += rnd_below(1000);
			CHECK(es_manifest_edit_flushed(e, m->flushed) == ES_OK);
			break;
		case 6:
			if (rnd_below(4) == 0)
			{
				EsTableKey table = random_table();

				for (id = 1; id < MAX_IDS; id++)
					if (es_table_key_equal(&m->entries[id].segment.table, &table))
						m->entries[id].live = false;
				CHECK(es_manifest_edit_drop_storage(e, &table) == ES_OK);
			}
			break;
	}
}

static bool
versions_equal(const EsManifestEntry *got, const int64_t *want)
{
	for (uint32_t i = 0; i < got->nfirst_versions; i++)
		if (es_manifest_first_version(got, i) != want[i])
			return false;
	return true;
}

static bool
state_is(EsManifestState *state, const Model *m)
{
	uint32_t n = 0;

	for (uint64_t id = 1; id < MAX_IDS; id++)
	{
		const ModelEntry	  *want = &m->entries[id];
		const EsManifestEntry *got = es_manifest_find(state, id);

		if ((got != NULL) != want->live)
			return false;
		if (got == NULL)
			continue;
		if (got != &state->entries[n++]) /* ascending ids */
			return false;
		if (memcmp(&got->segment, &want->segment, sizeof(got->segment)) != 0 ||
			got->pending != want->pending || got->adopted != want->adopted ||
			(!got->pending && got->nlive != want->nlive) || (got->adopted && got->base != want->base) ||
			got->nstarts != want->nstarts || got->nfirst_versions != want->nversions ||
			(got->dead_bitmap != NULL) != want->has_bitmap)
			return false;
		if ((want->nstarts && memcmp(got->starts, want->starts, want->nstarts * 8) != 0) ||
			!versions_equal(got, want->versions) ||
			(want->has_bitmap && memcmp(got->dead_bitmap, want->bitmap, (want->segment.nrows + 7) / 8) != 0))
			return false;
	}
	return n == state->nentries && state->flushed_up_to == m->flushed &&
		   state->head.next_segment_id == m->next_id;
}

/* ---- a manifest file with a history ---- */

#define MAX_RECORDS 40

typedef struct History
{
	char	*file;
	size_t	 len;
	uint32_t crc;
	uint32_t nrecords;		   /* head included */
	size_t	 end[MAX_RECORDS]; /* of each record */
	uint32_t crcs[MAX_RECORDS];
	Model	 after[MAX_RECORDS];
} History;

static EsManifestHead
make_head(void)
{
	EsManifestHead head = {.identity = {.system_identifier = 99, .timeline = 1, .shard = 2, .nshards = 4},
						   .generation = 6,
						   .next_segment_id = 1};

	return head;
}

static void
history_append(History *h, const void *record, size_t len, uint32_t crc, const Model *m)
{
	h->file = realloc(h->file, h->len + len);
	memcpy(h->file + h->len, record, len);
	h->len += len;
	h->crc = crc;
	h->end[h->nrecords] = h->len;
	h->crcs[h->nrecords] = crc;
	h->after[h->nrecords++] = *m;
}

/* Applies each edit to a state as well, as a shard does that writes them. */
static History *
random_history(uint32_t nrecords)
{
	History		   *h = calloc(1, sizeof(*h));
	Model			m = {.next_id = 1};
	EsManifestState state;
	void		   *image;
	size_t			len;
	uint32_t		crc;

	es_manifest_state_init(&state);
	state.head = make_head();
	CHECK(es_manifest_rewrite(&state, &image, &len, &crc) == ES_OK);
	history_append(h, image, len, crc, &m);
	free(image);
	while (h->nrecords < nrecords)
	{
		EsManifestEdit *e = es_manifest_edit_create();
		const void	   *record;
		EsError			err;

		for (uint64_t parts = 1 + rnd_below(6); parts > 0; parts--)
			random_part(&m, e);
		if (es_manifest_edit_record(e, h->crc, &record, &len, &crc) == ES_OK)
		{
			if (!CHECK(es_manifest_apply(&state, record, len, &err) == ES_OK))
				printf("# %s\n", err.what);
			CHECK(state_is(&state, &m));
			history_append(h, record, len, crc, &m);
		}
		es_manifest_edit_free(e);
	}
	es_manifest_state_free(&state);
	return h;
}

static void
history_free(History *h)
{
	free(h->file);
	free(h);
}

static EsStatus
read_file(EsManifestState *state, const void *file, size_t len, uint64_t durable_len, uint64_t *valid_len,
		  uint32_t *crc, EsError *err)
{
	void	*copy = exact_copy(file, len);
	EsStatus status;

	es_manifest_state_init(state);
	status = es_manifest_read(state, copy, len, durable_len, valid_len, crc, err);
	free(copy);
	return status;
}

/* ---- promises ---- */

static void
test_history(void)
{
	PROMISE("a manifest read back says what its edits said, and so does the rewritten one");
	for (int i = 0; i < 100; i++)
	{
		History		   *h = random_history(2 + (uint32_t) rnd_below(MAX_RECORDS - 2));
		EsManifestState state;
		EsManifestState again;
		uint64_t		valid_len;
		uint32_t		crc;
		void		   *image;
		size_t			len;

		CHECK(read_file(&state, h->file, h->len, h->len, &valid_len, &crc, NULL) == ES_OK);
		CHECK(valid_len == h->len && crc == h->crc);
		CHECK(state_is(&state, &h->after[h->nrecords - 1]));
		CHECK(state.head.identity.shard == 2 && state.head.generation == 6);

		state.head.generation++;
		CHECK(es_manifest_rewrite(&state, &image, &len, &crc) == ES_OK);
		CHECK(read_file(&again, image, len, len, &valid_len, &crc, NULL) == ES_OK && valid_len == len);
		CHECK(state_is(&again, &h->after[h->nrecords - 1]));
		CHECK(again.head.generation == 7 && memcmp(&again.head, &state.head, sizeof(state.head)) == 0);
		free(image);
		es_manifest_state_free(&state);
		es_manifest_state_free(&again);
		history_free(h);
	}
}

static void
test_every_length(void)
{
	PROMISE("a manifest that ends early is valid up to its last whole record, unless more was durable");
	for (int i = 0; i < 4; i++)
	{
		History *h = random_history(8);
		uint32_t whole = 0;

		for (size_t len = 0; len <= h->len; len++)
		{
			EsManifestState state;
			uint64_t		valid_len;
			uint32_t		crc;
			EsStatus		status;

			while (whole < h->nrecords && h->end[whole] <= len)
				whole++;
			status = read_file(&state, h->file, len, 0, &valid_len, &crc, NULL);
			if (whole == 0)
				CHECK(status == ES_ERR_CORRUPT); /* never empty because it could not be read */
			else
			{
				CHECK(status == ES_OK && valid_len == h->end[whole - 1] && crc == h->crcs[whole - 1]);
				CHECK(state_is(&state, &h->after[whole - 1]));
			}
			es_manifest_state_free(&state);

			if (whole > 0)
			{
				CHECK(read_file(&state, h->file, len, h->end[whole - 1], &valid_len, &crc, NULL) == ES_OK);
				es_manifest_state_free(&state);
				CHECK(read_file(&state, h->file, len, h->end[whole - 1] + 1, &valid_len, &crc, NULL) ==
					  ES_ERR_CORRUPT);
				es_manifest_state_free(&state);
			}
		}
		history_free(h);
	}
}

static void
test_every_byte(void)
{
	PROMISE("with any byte changed the record, and all behind it, is damage if it was durable, else the end");
	for (int i = 0; i < 4; i++)
	{
		History *h = random_history(8);
		uint32_t before = 0;

		for (size_t at = 0; at < h->len; at++)
		{
			EsManifestState state;
			uint64_t		valid_len;
			uint32_t		crc;
			EsError			err;
			char			bit = (char) (1 << rnd_below(8));
			EsStatus		status;

			while (h->end[before] <= at)
				before++;
			h->file[at] ^= bit;
			status = read_file(&state, h->file, h->len, h->len, &valid_len, &crc, &err);
			CHECK(status == ES_ERR_CORRUPT && err.offset == (before ? h->end[before - 1] : 0));
			es_manifest_state_free(&state);

			status = read_file(&state, h->file, h->len, 0, &valid_len, &crc, NULL);
			if (before == 0)
				CHECK(status == ES_ERR_CORRUPT);
			else
				CHECK(status == ES_OK && valid_len == h->end[before - 1] && crc == h->crcs[before - 1] &&
					  state_is(&state, &h->after[before - 1]));
			es_manifest_state_free(&state);
			h->file[at] ^= bit;
		}
		history_free(h);
	}
}

static void
test_append_after_torn(void)
{
	PROMISE("a record written over a torn end is read, and what is left of the old end is not");
	for (int i = 0; i < 50; i++)
	{
		History		   *h = random_history(12);
		uint32_t		torn = 1 + (uint32_t) rnd_below(8); /* the record that is damaged */
		EsManifestEdit *e = es_manifest_edit_create();
		EsManifestState state;
		uint64_t		valid_len;
		uint32_t		crc;
		const void	   *record;
		size_t			len;
		EsOwnLsn		flushed;

		h->file[h->end[torn] - 1] ^= 1;
		CHECK(read_file(&state, h->file, h->len, 0, &valid_len, &crc, NULL) == ES_OK);
		flushed = state.flushed_up_to + 7;
		CHECK(es_manifest_edit_flushed(e, flushed) == ES_OK);
		CHECK(es_manifest_edit_record(e, crc, &record, &len, &crc) == ES_OK);
		es_manifest_state_free(&state);

		memcpy(h->file + valid_len, record, len);
		CHECK(read_file(&state, h->file, h->len, valid_len + len, &valid_len, &crc, NULL) == ES_OK);
		CHECK(valid_len == h->end[torn - 1] + len && state.flushed_up_to == flushed);
		es_manifest_state_free(&state);
		es_manifest_edit_free(e);
		history_free(h);
	}
}

/* What the state says, as bytes. */
static void *
image_of(const EsManifestState *state, size_t *len)
{
	void	*image = NULL;
	uint32_t crc;

	CHECK(es_manifest_rewrite(state, &image, len, &crc) == ES_OK);
	return image;
}

static void
test_atomic(void)
{
	PROMISE("a record of which one part does not fit changes nothing");
	for (int i = 0; i < 300; i++)
	{
		History		   *h = random_history(6);
		Model			m = h->after[h->nrecords - 1];
		EsManifestEdit *e = es_manifest_edit_create();
		EsManifestState state;
		uint64_t		valid_len;
		uint32_t		crc;
		const void	   *record;
		size_t			len;
		size_t			len1;
		size_t			len2;
		void		   *before;
		void		   *after;

		CHECK(read_file(&state, h->file, h->len, 0, &valid_len, &crc, NULL) == ES_OK);
		before = image_of(&state, &len1);
		for (int parts = 0; parts < 12; parts++)
			random_part(&m, e);
		/* good so far; then what cannot be */
		switch (rnd_below(4))
		{
			case 0:
				CHECK(es_manifest_edit_drop(e, MAX_IDS) == ES_OK);
				break;
			case 1:
			{
				EsManifestSegment s = random_segment(MAX_IDS, false);

				CHECK(es_manifest_edit_segment(e, &s) == ES_OK);
				CHECK(es_manifest_edit_segment(e, &s) == ES_OK);
				break;
			}
			case 2:
			{
				EsManifestSegment s = random_segment(MAX_IDS, false);
				EsManifestAdopt	  a = {.id = MAX_IDS, .fxid = s.min_fxid, .base = 1, .nlive = s.nrows};

				CHECK(es_manifest_edit_segment(e, &s) == ES_OK);
				CHECK(es_manifest_edit_adopt(e, &a, NULL, NULL) == ES_OK);
				break;
			}
			case 3:
				CHECK(es_manifest_edit_flushed(e, m.flushed + 1) == ES_OK);
				CHECK(es_manifest_edit_flushed(e, m.flushed) == ES_OK);
				break;
		}
		CHECK(es_manifest_edit_record(e, crc, &record, &len, &crc) == ES_OK);
		CHECK(es_manifest_apply(&state, record, len, NULL) == ES_ERR_CORRUPT);
		after = image_of(&state, &len2);
		CHECK(len1 == len2 && memcmp(before, after, len1) == 0);
		CHECK(state_is(&state, &h->after[h->nrecords - 1]));
		free(before);
		free(after);
		es_manifest_state_free(&state);
		es_manifest_edit_free(e);
		history_free(h);
	}
}

/* A record of one pending segment and what one may want to do with it. */
static void
test_adopt_refused(void)
{
	EsManifestSegment s = {.id = 1, .nrows = 70, .min_fxid = 9, .max_fxid = 9, .flags = ES_SEGMENT_PENDING};
	EsManifestPending p = {.segment = s};
	EsManifestAdopt	  good = {.id = 1,
							  .fxid = 9,
							  .base = 100,
							  .min_position = 100,
							  .max_position = 169,
							  .nlive = 67,
							  .dead_bitmap_len = 16};
	uint8_t			  bitmap[24] = {0x07};

	PROMISE(
		"an adoption is refused that is of another transaction or does not count the segment's rows right");
	bitmap[15] = 0xff; /* behind row 69 nothing counts */
#define TRY(expected, change)                                               \
	do                                                                      \
	{                                                                       \
		EsManifestAdopt a = good;                                           \
		EsManifestEdit *e = es_manifest_edit_create();                      \
		EsManifestState state;                                              \
		const void	   *record;                                             \
		size_t			len;                                                \
		uint32_t		crc;                                                \
		change;                                                             \
		es_manifest_state_init(&state);                                     \
		CHECK(es_manifest_edit_pending(e, &p, NULL) == ES_OK);              \
		CHECK(es_manifest_edit_adopt(e, &a, bitmap, NULL) == ES_OK);        \
		CHECK(es_manifest_edit_record(e, 0, &record, &len, &crc) == ES_OK); \
		CHECK(es_manifest_apply(&state, record, len, NULL) == (expected));  \
		es_manifest_state_free(&state);                                     \
		es_manifest_edit_free(e);                                           \
	} while (0)

	TRY(ES_OK, (void) 0);
	TRY(ES_ERR_CORRUPT, a.fxid = 10);
	TRY(ES_ERR_CORRUPT, a.nlive = 68);
	TRY(ES_ERR_CORRUPT, a.nlive = 66);
	TRY(ES_ERR_CORRUPT, a.dead_bitmap_len = 8);
	TRY(ES_ERR_CORRUPT, a.dead_bitmap_len = 24);
	TRY(ES_ERR_CORRUPT, a.dead_bitmap_len = 0);
	TRY(ES_OK, (a.dead_bitmap_len = 0, a.nlive = 70));
	TRY(ES_ERR_CORRUPT, a.id = 2);
#undef TRY
}

static void
test_edit_refused(void)
{
	EsManifestEdit	 *e = es_manifest_edit_create();
	EsManifestSegment good = {
		.id = 1, .nrows = 1, .min_position = 1, .max_position = 1, .min_fxid = 3, .max_fxid = 3};
	EsManifestSegment s;
	EsManifestPending p;
	const void		 *record;
	size_t			  len;
	uint32_t		  crc;

	PROMISE("no record is built that a later start would refuse to read");
#define SEGMENT(change) (s = good, change, es_manifest_edit_segment(e, &s))
	CHECK(SEGMENT(s.id = 0) == ES_ERR_ARGUMENT);
	CHECK(SEGMENT(s.flags = ES_SEGMENT_PENDING) == ES_ERR_ARGUMENT);
	CHECK(SEGMENT(s.min_position = 2) == ES_ERR_ARGUMENT);
	CHECK(SEGMENT(s.max_position = ES_MAX_POSITION + 1) == ES_ERR_ARGUMENT);
	CHECK(SEGMENT(s.min_fxid = 4) == ES_ERR_ARGUMENT);
	CHECK(SEGMENT(s.table.reserved = 1) == ES_ERR_ARGUMENT);
#undef SEGMENT
	good =
		(EsManifestSegment){.id = 1, .nrows = 1, .min_fxid = 3, .max_fxid = 3, .flags = ES_SEGMENT_PENDING};
#define PENDING(change) \
	(s = good, change, p = (EsManifestPending){.segment = s}, es_manifest_edit_pending(e, &p, NULL))
	CHECK(PENDING(s.flags = 0) == ES_ERR_ARGUMENT);
	CHECK(PENDING(s.max_position = 1) == ES_ERR_ARGUMENT);
	CHECK(PENDING(s.max_fxid = 4) == ES_ERR_ARGUMENT);
	CHECK(PENDING(s.min_fxid = s.max_fxid = 0) == ES_ERR_ARGUMENT);
#undef PENDING
	CHECK(es_manifest_edit_drop(e, 0) == ES_ERR_ARGUMENT);
	CHECK(es_manifest_edit_adopt(e, &(EsManifestAdopt){.id = 1, .dead_bitmap_len = 4}, NULL, NULL) ==
		  ES_ERR_ARGUMENT);
	CHECK(es_manifest_edit_adopt(e, &(EsManifestAdopt){.id = 1, .min_position = 1}, NULL, NULL) ==
		  ES_ERR_ARGUMENT);
	CHECK(es_manifest_edit_drop_storage(e, &(EsTableKey){.reserved = 1}) == ES_ERR_ARGUMENT);
	CHECK(es_manifest_edit_record(e, 0, &record, &len, &crc) == ES_ERR_ARGUMENT); /* nothing came in */
	for (int i = 0; i < UINT16_MAX; i++)
		if (!CHECK(es_manifest_edit_flushed(e, 1) == ES_OK))
			break;
	CHECK(es_manifest_edit_flushed(e, 1) == ES_ERR_TOO_LARGE);
	es_manifest_edit_free(e);
}

/* Makes the checksums of a file's records right again, as far as their lengths are. */
static void
reseal(char *file, size_t len)
{
	uint32_t prev = 0;

	for (size_t at = 0; len - at >= sizeof(EsManifestRecord);)
	{
		EsManifestRecord *r = (EsManifestRecord *) (file + at);

		if (r->len < sizeof(*r) || r->len > len - at || r->len % 8 != 0)
			break;
		r->crc = 0;
		prev = es_crc32c(es_crc32c(0, r, r->len), &prev, sizeof(prev));
		r->crc = prev;
		at += r->len;
	}
}

static void
test_resealed(void)
{
	unsigned taken = 0;
	unsigned refused = 0;

	PROMISE("a manifest whose checksums are right but whose bytes are not is refused or makes sense");
	for (int i = 0; i < 6; i++)
	{
		History *h = random_history(8);

		for (size_t at = 0; at < h->len; at++)
		{
			char		   *file = exact_copy(h->file, h->len);
			EsManifestState state;
			uint64_t		valid_len;
			uint32_t		crc;

			file[at] ^= (char) (1 << rnd_below(8));
			reseal(file, h->len);
			if (read_file(&state, file, h->len, h->len, &valid_len, &crc, NULL) == ES_OK)
			{
				/* whatever it says can be said again */
				EsManifestState again;
				size_t			len1;
				size_t			len2;
				void		   *image1 = image_of(&state, &len1);
				void		   *image2;

				CHECK(read_file(&again, image1, len1, len1, &valid_len, &crc, NULL) == ES_OK);
				image2 = image_of(&again, &len2);
				CHECK(len1 == len2 && memcmp(image1, image2, len1) == 0);
				free(image1);
				free(image2);
				es_manifest_state_free(&again);
				taken++;
			}
			else
				refused++;
			es_manifest_state_free(&state);
			free(file);
		}
		history_free(h);
	}
	CHECK(taken > 500 && refused > 500);
}

static void
test_lengths(void)
{
	uint64_t		  starts[2] = {1, 2};
	EsManifestPending p = {
		.segment = {.id = 1, .nrows = 1, .min_fxid = 3, .max_fxid = 3, .flags = ES_SEGMENT_PENDING},
		.nstarts = 2};
	EsManifestEdit *e = es_manifest_edit_create();
	const void	   *good;
	size_t			len;
	uint32_t		crc;

	PROMISE("parts fill their record exactly: none reaches behind its end, nothing is left over");
	CHECK(es_manifest_edit_flushed(e, 1) == ES_OK);
	CHECK(es_manifest_edit_pending(e, &p, starts) == ES_OK);
	CHECK(es_manifest_edit_record(e, 0, &good, &len, &crc) == ES_OK);
#define TRY(expected, change)                                                         \
	do                                                                                \
	{                                                                                 \
		EsManifestRecord  *r = exact_copy(good, len);                                 \
		EsManifestPart	  *first = (EsManifestPart *) (r + 1);                        \
		EsManifestPart	  *second = (EsManifestPart *) ((char *) first + first->len); \
		EsManifestPending *pending = (EsManifestPending *) (second + 1);              \
		EsManifestState	   state;                                                     \
		(void) second, (void) pending;                                                \
		change;                                                                       \
		es_manifest_state_init(&state);                                               \
		CHECK(es_manifest_apply(&state, r, len, NULL) == (expected));                 \
		es_manifest_state_free(&state);                                               \
		free(r);                                                                      \
	} while (0)

	TRY(ES_OK, (void) 0);
	TRY(ES_ERR_CORRUPT, (second->len += 80, pending->nstarts += 10));
	TRY(ES_ERR_CORRUPT, (second->len -= 8, pending->nstarts--));
	TRY(ES_ERR_CORRUPT, second->len = 0);
	TRY(ES_ERR_CORRUPT, r->nparts = 1);
	TRY(ES_ERR_CORRUPT, r->nparts = 0);
	TRY(ES_ERR_CORRUPT, r->nparts = 3);
	TRY(ES_ERR_CORRUPT, r->len -= 8);
	TRY(ES_ERR_CORRUPT, r->magic++);
	TRY(ES_ERR_VERSION, r->version++);
#undef TRY
	es_manifest_edit_free(e);
}

static void
test_version(void)
{
	History			 *h = random_history(3);
	EsManifestState	  state;
	uint64_t		  valid_len;
	uint32_t		  crc;
	EsManifestRecord *r = (EsManifestRecord *) (h->file + h->end[1]);

	PROMISE("a record of a newer format is named as such, durable or not");
	r->version = ES_FORMAT_VERSION + 1;
	reseal(h->file, h->len);
	CHECK(read_file(&state, h->file, h->len, h->len, &valid_len, &crc, NULL) == ES_ERR_VERSION);
	es_manifest_state_free(&state);
	CHECK(read_file(&state, h->file, h->len, 0, &valid_len, &crc, NULL) == ES_ERR_VERSION);
	es_manifest_state_free(&state);
	history_free(h);
}

static void
test_head(void)
{
	History		   *h = random_history(3);
	EsManifestState state;
	uint64_t		valid_len;
	uint32_t		crc;
	size_t			len;
	char		   *file;

	PROMISE("a manifest has one head, in front");
	/* without it */
	len = h->len - h->end[0];
	file = exact_copy(h->file + h->end[0], len);
	reseal(file, len);
	CHECK(read_file(&state, file, len, 0, &valid_len, &crc, NULL) == ES_ERR_CORRUPT);
	es_manifest_state_free(&state);
	free(file);
	/* twice */
	len = 2 * h->end[0];
	file = malloc(len);
	memcpy(file, h->file, h->end[0]);
	memcpy(file + h->end[0], h->file, h->end[0]);
	reseal(file, len);
	CHECK(read_file(&state, file, len, 0, &valid_len, &crc, NULL) == ES_ERR_CORRUPT);
	es_manifest_state_free(&state);
	free(file);
	history_free(h);
}

static void
test_frozen(void)
{
	EsManifestState	  state;
	EsManifestEdit	 *e = es_manifest_edit_create();
	EsManifestSegment s = {.id = 1,
						   .table = {.storage_id = 7, .database = 5},
						   .file_len = 100,
						   .nrows = 3,
						   .min_position = 10,
						   .max_position = 12,
						   .min_fxid = 3,
						   .max_fxid = 4,
						   .footer_crc = 5};
	EsManifestPending p = {.segment = s, .nstarts = 2};
	uint64_t		  starts[2] = {1, 2};
	EsManifestAdopt	  a = {.id = 2,
						   .fxid = 3,
						   .base = 20,
						   .min_position = 20,
						   .max_position = 22,
						   .nlive = 2,
						   .dead_bitmap_len = 8,
						   .nfirst_versions = 1,
						   .version_base = 5,
						   .version_width = 2};
	uint8_t			  bitmap[8] = {2};
	uint8_t			  versions[8] = {9, 1};
	EsTableKey		  table = {.storage_id = 1};
	const void		 *record;
	void			 *image;
	size_t			  len;
	size_t			  image_len;
	uint32_t		  crc;
	uint32_t		  image_crc;

	PROMISE("the bytes of a manifest are frozen with the format, and the frozen ones can be read");
	p.segment.id = 2;
	p.segment.flags = ES_SEGMENT_PENDING;
	p.segment.min_position = p.segment.max_position = 0;
	p.segment.max_fxid = 3;
	CHECK(es_manifest_edit_segment(e, &s) == ES_OK);
	CHECK(es_manifest_edit_pending(e, &p, starts) == ES_OK);
	CHECK(es_manifest_edit_adopt(e, &a, bitmap, versions) == ES_OK);
	CHECK(es_manifest_edit_drop(e, 1) == ES_OK);
	CHECK(es_manifest_edit_flushed(e, 8) == ES_OK);
	CHECK(es_manifest_edit_drop_storage(e, &table) == ES_OK);
	CHECK(es_manifest_edit_record(e, 17, &record, &len, &crc) == ES_OK);
	es_manifest_state_init(&state);
	state.head = make_head();
	CHECK(es_manifest_apply(&state, record, len, NULL) == ES_OK && state.nentries == 1);
	CHECK(es_manifest_rewrite(&state, &image, &image_len, &image_crc) == ES_OK);
	if (!CHECK(len == 368 && crc == UINT32_C(0x2036ea01) && image_len == 312 &&
			   image_crc == UINT32_C(0xdba82e91)))
		printf(
			"# len == %zu && crc == UINT32_C(0x%08x) && image_len == %zu && image_crc == UINT32_C(0x%08x)\n",
			len, crc, image_len, image_crc);
	free(image);
	es_manifest_state_free(&state);
	es_manifest_edit_free(e);
}

int
main(void)
{
	test_history();
	test_every_length();
	test_every_byte();
	test_append_after_torn();
	test_atomic();
	test_adopt_refused();
	test_edit_refused();
	test_resealed();
	test_lengths();
	test_version();
	test_head();
	test_frozen();
	return done();
}
