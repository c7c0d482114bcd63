/*
 * A shard's own WAL, its control blocks and the store file: no changed byte and no hole goes unnoticed.
 */
#include <lz4.h>

#include "core/route.h"
#include "core/wal.h"

#include "tap.h"

/* Larger allocations fail: a frame's length must be found false before memory is asked for. */
const char *__asan_default_options(void);

const char *
__asan_default_options(void)
{
	return "allocator_may_return_null=1:max_allocation_size_mb=8";
}

#define SHARD			5
#define FILE_NUMBER		UINT64_C(7)
#define OWN_LSN(offset) (FILE_NUMBER << 32 | (offset))
#define ROOM			(64 * ES_WAL_BLOCK)

/* A log being written, as a shard does: frames behind each other, groups on block borders. */
typedef struct Log
{
	char		 *data;
	size_t		  len;
	uint32_t	  crc; /* of the last frame */
	uint32_t	  nframes;
	size_t		  offset[200];
	uint32_t	  crcs[200];
	EsFrameHeader headers[200];
} Log;

static void
log_frame(Log *log, EsFrameType type, const void *payload, uint32_t len)
{
	EsFrameHeader h = {.type = (uint8_t) type,
					   .payload_len = len,
					   .shard = SHARD,
					   .own_lsn = OWN_LSN(log->len),
					   .pg_start = 1000 + log->nframes,
					   .pg_end = 2000 + log->nframes,
					   .fxid = 3000 + log->nframes};

	log->crc = es_frame_encode(&h, payload, log->crc, log->data + log->len);
	CHECK(h.crc == log->crc);
	log->offset[log->nframes] = log->len;
	log->crcs[log->nframes] = log->crc;
	log->headers[log->nframes++] = h;
	log->len += es_frame_size(len);
}

static void
end_group(Log *log)
{
	log->len = (log->len + ES_WAL_BLOCK - 1) / ES_WAL_BLOCK * ES_WAL_BLOCK;
}

static Log
random_log(uint32_t nframes)
{
	Log				log = {.data = calloc(1, ROOM)};
	EsWalFileHeader file = {.identity = {.shard = SHARD, .nshards = 8}, .file_number = FILE_NUMBER};
	char			payload[3000];

	log_frame(&log, ES_FRAME_FILE, &file, sizeof(file));
	for (uint32_t i = 1; i < nframes; i++)
	{
		uint32_t len = (uint32_t) (rnd_below(5) ? rnd_below(200) : rnd_below(sizeof(payload)));

		rnd_bytes(payload, len);
		log_frame(&log, (EsFrameType) (ES_FRAME_BATCH + rnd_below(5)), payload, len);
		if (rnd_below(3) == 0)
			end_group(&log);
	}
	end_group(&log);
	return log;
}

/* Reads the log as recovery does; returns how many frames it gets and why it stops. */
static uint32_t
read_log(const Log *log, EsStatus *stopped, uint32_t *last_crc)
{
	size_t	 at = 0;
	uint32_t n = 0;
	uint32_t crc = 0;

	for (;;)
	{
		const EsFrameHeader *h;
		const void			*payload;
		EsError				 err;
		EsStatus			 status;

		status =
			es_frame_decode(log->data + at, ROOM - at, OWN_LSN(at), SHARD, crc, &h, &payload, &crc, &err);
		if (status == ES_OK)
		{
			CHECK(at == log->offset[n] && memcmp(h, &log->headers[n], sizeof(*h)) == 0);
			CHECK(payload == h + 1);
			at += es_frame_size(h->payload_len);
			n++;
			continue;
		}
		CHECK(err.status == status);
		if (status != ES_ERR_TRUNCATED || at == ROOM)
		{
			*stopped = status;
			break;
		}
		/* padding: at the next block */
		at = (at / ES_WAL_BLOCK + 1) * ES_WAL_BLOCK;
	}
	*last_crc = crc;
	return n;
}

static void
test_log(void)
{
	PROMISE("frames are read back in order, over the padding of their groups, and their CRCs chain");
	for (int i = 0; i < 100; i++)
	{
		Log		 log = random_log(1 + (uint32_t) rnd_below(60));
		EsStatus stopped;
		uint32_t crc;

		CHECK(read_log(&log, &stopped, &crc) == log.nframes);
		CHECK(stopped == ES_ERR_TRUNCATED && crc == log.crc);
		free(log.data);
	}
}

static void
test_every_byte(void)
{
	PROMISE("with any byte of the log changed no frame at or behind it is read");
	for (int i = 0; i < 4; i++)
	{
		Log log = random_log(12);

		for (size_t at = 0; at < log.len; at++)
		{
			uint32_t before = 0;
			uint32_t last_crc;
			EsStatus stopped;
			char	 saved;

			/* frames that are whole in front of the byte */
			while (before < log.nframes &&
				   log.offset[before] + es_frame_size(log.headers[before].payload_len) <= at)
				before++;
			saved = log.data[at];
			log.data[at] ^= (char) (1 << rnd_below(8));
			CHECK(read_log(&log, &stopped, &last_crc) == before);
			CHECK(stopped == ES_ERR_CORRUPT || stopped == ES_ERR_VERSION);
			log.data[at] = saved;
		}
		free(log.data);
	}
}

static void
test_hole(void)
{
	PROMISE("a block that reads as zeros, or as what another place held, ends the log there");
	for (int i = 0; i < 50; i++)
	{
		Log		 log = random_log(40);
		Log		 other = random_log(40);
		EsStatus stopped;
		uint32_t crc;
		uint32_t n;
		size_t	 block = rnd_below(log.len / ES_WAL_BLOCK) * ES_WAL_BLOCK;
		uint32_t before = 0;

		CHECK(log.len > 2 * ES_WAL_BLOCK && other.len > 2 * ES_WAL_BLOCK);
		while (before < log.nframes &&
			   log.offset[before] + es_frame_size(log.headers[before].payload_len) <= block)
			before++;
		if (i % 2)
		{
			memset(log.data + block, 0, ES_WAL_BLOCK);
			n = read_log(&log, &stopped, &crc);
			/* the last block is like one that was never written: the durable end knows better */
			if (before < log.nframes && log.offset[log.nframes - 1] >= block + ES_WAL_BLOCK)
				CHECK(n == before && stopped == ES_ERR_CORRUPT);
			else
				CHECK(n == before && (n == log.nframes || crc != log.crc));
		}
		else
		{
			/* good frames for this very place, but of another log; both logs begin alike */
			if (block == 0)
				block = ES_WAL_BLOCK;
			before = 0;
			while (log.offset[before] + es_frame_size(log.headers[before].payload_len) <= block)
				before++;
			memcpy(log.data + block, other.data + block, ES_WAL_BLOCK);
			CHECK(read_log(&log, &stopped, &crc) == before && stopped == ES_ERR_CORRUPT);
		}
		free(log.data);
		free(other.data);
	}
}

static void
test_every_length(void)
{
	char		  payload[100];
	EsFrameHeader h = {
		.type = ES_FRAME_BATCH, .payload_len = sizeof(payload), .shard = SHARD, .own_lsn = OWN_LSN(64)};
	size_t				 size = es_frame_size(sizeof(payload));
	char				*frame = malloc(size);
	const EsFrameHeader *found;
	const void			*found_payload;
	uint32_t			 crc;

	PROMISE("a frame that is cut off anywhere is refused, and no length makes the reader leave its buffer");
	rnd_bytes(payload, sizeof(payload));
	es_frame_encode(&h, payload, 17, frame);
	CHECK(size % 8 == 0 && size >= sizeof(h) + sizeof(payload));
	for (size_t len = 0; len <= size; len++)
	{
		char	*cut = exact_copy(frame, len);
		EsStatus expected = len == size ? ES_OK : len < 4 ? ES_ERR_TRUNCATED : ES_ERR_CORRUPT;

		/* the first bytes of a magic are no padding */
		if (len > 0 && len < 4)
			expected = ES_ERR_CORRUPT;
		CHECK(es_frame_decode(cut, len, OWN_LSN(64), SHARD, 17, &found, &found_payload, &crc, NULL) ==
			  expected);
		free(cut);
	}
	for (uint32_t len = 0; len < 200; len++)
	{
		char	*copy = exact_copy(frame, size);
		uint32_t claim = len < 150 ? len : UINT32_MAX - (len - 150);

		if (len >= 180)
			claim = ES_FRAME_MAX_PAYLOAD + 190 - len;
		((EsFrameHeader *) copy)->payload_len = claim;
		if (claim != sizeof(payload))
			CHECK(es_frame_decode(copy, size, OWN_LSN(64), SHARD, 17, &found, &found_payload, &crc, NULL) ==
				  ES_ERR_CORRUPT);
		free(copy);
	}
	free(frame);
}

/*
 * Reads the log as a starting shard does (shard/log_replay.c): all frames up to a durable end that a control block
 * knows, and the last one's checksum must be the one that it remembers.  len: what is there of the file.
 */
static bool
read_to_durable_end(const char *data, size_t len, size_t end, uint32_t end_crc, uint32_t *nframes)
{
	size_t	 at = 0;
	size_t	 last_end = 0;
	uint32_t crc = 0;

	*nframes = 0;
	while (at < end)
	{
		const EsFrameHeader *h;
		const void			*payload;
		size_t				 left = at < len ? (len < end ? len : end) - at : 0;
		EsStatus status = es_frame_decode(data + (at < len ? at : len), left, OWN_LSN(at), SHARD, crc, &h,
										  &payload, &crc, NULL);

		if (status == ES_ERR_TRUNCATED)
		{
			at = (at / ES_WAL_BLOCK + 1) * ES_WAL_BLOCK;
			continue;
		}
		if (status != ES_OK)
			return false;
		at += es_frame_size(h->payload_len);
		last_end = at;
		(*nframes)++;
	}
	return last_end == end && crc == end_crc;
}

static void
test_every_cut(void)
{
	PROMISE("a log cut at any length is whole if its durable end lies before the cut, and refused if not");
	for (int i = 0; i < 3; i++)
	{
		Log		 log = random_log(10);
		uint32_t ends[2] = {log.nframes, 1 + (uint32_t) rnd_below(log.nframes - 1)};
		char	*zeroed = calloc(1, log.len);

		/* the log's last frame is durable; or an earlier one, and nobody believes what follows */
		for (size_t cut = 0; cut <= log.len; cut++)
		{
			char *copy = exact_copy(log.data, cut);

			for (int k = 0; k < 2; k++)
			{
				uint32_t n = ends[k];
				size_t	 end = log.offset[n - 1] + es_frame_size(log.headers[n - 1].payload_len);
				uint32_t crc = log.crcs[n - 1];
				uint32_t found;
				bool	 same;

				CHECK(read_to_durable_end(copy, cut, end, crc, &found) == (cut >= end));
				CHECK(found <= n && (cut < end || found == n));

				/* the same with zeros where the rest was, as a file has that was filled ahead */
				memset(zeroed, 0, log.len);
				memcpy(zeroed, log.data, cut);
				same = memcmp(zeroed, log.data, end) == 0;
				CHECK(read_to_durable_end(zeroed, log.len, end, crc, &found) == same);
			}
			free(copy);
		}
		free(zeroed);
		free(log.data);
	}
}

static void
test_place(void)
{
	char		  payload[8] = "payload";
	EsFrameHeader h = {
		.type = ES_FRAME_FINISH, .payload_len = sizeof(payload), .shard = SHARD, .own_lsn = OWN_LSN(64)};
	char				*frame = malloc(es_frame_size(sizeof(payload)));
	const EsFrameHeader *found;
	const void			*found_payload;
	uint32_t			 crc;
#define DECODE(lsn, shard, prev)                                                                           \
	es_frame_decode(frame, es_frame_size(sizeof(payload)), lsn, shard, prev, &found, &found_payload, &crc, \
					NULL)

	PROMISE("a frame counts only at its own LSN, behind the frame it continues, and in its shard");
	es_frame_encode(&h, payload, 17, frame);
	CHECK(DECODE(OWN_LSN(64), SHARD, 17) == ES_OK && crc == h.crc);
	CHECK(DECODE(OWN_LSN(72), SHARD, 17) == ES_ERR_CORRUPT);
	CHECK(DECODE(OWN_LSN(64) + (UINT64_C(1) << 32), SHARD, 17) == ES_ERR_CORRUPT);
	CHECK(DECODE(OWN_LSN(64), SHARD, 18) == ES_ERR_CORRUPT);
	CHECK(DECODE(OWN_LSN(64), SHARD + 1, 17) == ES_ERR_FOREIGN);
	CHECK(DECODE(OWN_LSN(64) + 4, SHARD, 17) == ES_ERR_ARGUMENT);
	((EsFrameHeader *) frame)->version++;
	CHECK(DECODE(OWN_LSN(64), SHARD, 17) == ES_ERR_VERSION);

	/* written by us, but not of this version */
	h.type = ES_FRAME_CARRY_FINISH + 1;
	es_frame_encode(&h, payload, 17, frame);
	CHECK(DECODE(OWN_LSN(64), SHARD, 17) == ES_ERR_CORRUPT);
	h.type = ES_FRAME_FILE;
	h.flags = 2;
	es_frame_encode(&h, payload, 17, frame);
	CHECK(DECODE(OWN_LSN(64), SHARD, 17) == ES_ERR_CORRUPT);
#undef DECODE
	free(frame);
}

static void
test_unpack(void)
{
	char		  raw[5000];
	char		  payload[8 + LZ4_COMPRESSBOUND(sizeof(raw))];
	uint64_t	  raw_len = sizeof(raw);
	EsFrameHeader h = {.type = ES_FRAME_BATCH, .flags = ES_FRAME_LZ4};
	void		 *out;
	size_t		  out_len;

	PROMISE(
		"a compressed frame gives its payload, and a false length of it is refused before memory is asked for");
	for (size_t i = 0; i < sizeof(raw); i++)
		raw[i] = (char) (i / 100);
	memcpy(payload, &raw_len, 8);
	h.payload_len = 8 + (uint32_t) LZ4_compress_default(raw, payload + 8, sizeof(raw), sizeof(payload) - 8);
	CHECK(es_frame_unpack(&h, payload, &out, &out_len, NULL) == ES_OK);
	CHECK(out_len == sizeof(raw) && memcmp(out, raw, sizeof(raw)) == 0);
	free(out);
	for (uint64_t claim = 0; claim < 64; claim++)
	{
		raw_len = claim == 0 ? 0 : claim < 4 ? sizeof(raw) - 2 + claim : UINT64_C(1) << claim;
		memcpy(payload, &raw_len, 8);
		if (raw_len != sizeof(raw))
			CHECK(es_frame_unpack(&h, payload, &out, &out_len, NULL) == ES_ERR_CORRUPT);
	}
	h.payload_len = 7;
	{
		void *cut = exact_copy(payload, 7);

		CHECK(es_frame_unpack(&h, cut, &out, &out_len, NULL) == ES_ERR_CORRUPT);
		free(cut);
	}
	h.flags = 0;
	CHECK(es_frame_unpack(&h, payload, &out, &out_len, NULL) == ES_ERR_ARGUMENT);
}

/* ---- control blocks and the store file ---- */

static EsControl
make_control(uint64_t sequence)
{
	EsControl c = {.flags = ES_CONTROL_CLEAN,
				   .sequence = sequence,
				   .identity = {.system_identifier = 99, .timeline = 1, .shard = SHARD, .nshards = 8},
				   .incarnation = 4,
				   .durable_end = OWN_LSN(8192),
				   .durable_crc = 0xabcdef01,
				   .first_file = OWN_LSN(0),
				   .restart_lsn = 123456,
				   .reserved_below = 1 << 20,
				   .next_position = 77,
				   .manifest_generation = 3,
				   .manifest_len = 4096,
				   .written_at = 1700000000000000};

	memcpy(c.identity.store_uuid, "store uuid 16 by", ES_UUID_LEN);
	return c;
}

static EsStoreFile
make_store(void)
{
	EsStoreFile s = {.system_identifier = 99, .nshards = 8, .created_at = 1700000000000000};

	memcpy(s.store_uuid, "store uuid 16 by", ES_UUID_LEN);
	es_slot_map_init(s.slot_map, 8);
	return s;
}

static void
test_control(void)
{
	EsControl	   control = make_control(9);
	EsControl	   found;
	unsigned char *block = malloc(ES_WAL_BLOCK);

	PROMISE("a control block is read back, and refused with any of its 4096 bytes changed");
	memset(block, 0xee, ES_WAL_BLOCK);
	es_control_encode(&control, block);
	CHECK(es_control_decode(block, &found, NULL) == ES_OK && memcmp(&found, &control, sizeof(found)) == 0);
	for (size_t at = 0; at < ES_WAL_BLOCK; at++)
		for (int bit = 0; bit < 8; bit++)
		{
			EsError err;

			block[at] ^= (unsigned char) (1 << bit);
			/* there is no version 0 */
			CHECK(es_control_decode(block, &found, &err) ==
				  (at / 2 == 2 && (block[4] | block[5]) != 0 ? ES_ERR_VERSION : ES_ERR_CORRUPT));
			CHECK(err.what[0] != 0);
			block[at] ^= (unsigned char) (1 << bit);
		}
	/* what was written by us can still be wrong */
	control.identity.shard = control.identity.nshards;
	es_control_encode(&control, block);
	CHECK(es_control_decode(block, &found, NULL) == ES_ERR_CORRUPT);
	control = make_control(9);
	control.flags = 0x80;
	es_control_encode(&control, block);
	CHECK(es_control_decode(block, &found, NULL) == ES_ERR_CORRUPT);
	control = make_control(9);
	es_control_encode(&control, block);
	((EsControl *) block)->magic = ES_STORE_MAGIC;
	((EsControl *) block)->crc = es_crc32c(0, block, offsetof(EsControl, crc));
	CHECK(es_control_decode(block, &found, NULL) == ES_ERR_CORRUPT);
	memset(block, 0, ES_WAL_BLOCK);
	CHECK(es_control_decode(block, &found, NULL) == ES_ERR_CORRUPT);
	free(block);
}

static void
test_control_torn(void)
{
	EsControl	   older = make_control(8);
	EsControl	   newer = make_control(9);
	unsigned char *old_block = malloc(ES_WAL_BLOCK);
	unsigned char *new_block = malloc(ES_WAL_BLOCK);
	unsigned char *torn = malloc(ES_WAL_BLOCK);

	PROMISE("whichever byte a write of a control block stops at, the last complete one is current");
	older.durable_end++;
	es_control_encode(&older, old_block);
	es_control_encode(&newer, new_block);
	for (size_t at = 0; at <= ES_WAL_BLOCK; at++)
	{
		EsControl c0;
		EsControl c1;
		EsStatus  s0;
		EsStatus  s1;
		int		  current;

		/* control.1 holds the block of sequence 8; control.0 is being overwritten with 9 */
		memset(torn, 0, ES_WAL_BLOCK);
		memcpy(torn, new_block, at);
		s0 = es_control_decode(torn, &c0, NULL);
		s1 = es_control_decode(old_block, &c1, NULL);
		current = es_control_current(s0, &c0, s1, &c1);
		CHECK(current == (s0 == ES_OK ? 0 : 1));
		CHECK(s1 == ES_OK);
		CHECK(es_control_current(s1, &c1, s0, &c0) == 1 - current);
		CHECK((s0 == ES_OK) == (at >= offsetof(EsControl, crc) + 4));
	}
	free(old_block);
	free(new_block);
	free(torn);
}

static void
test_control_current(void)
{
	EsControl c8 = make_control(8);
	EsControl c9 = make_control(9);

	PROMISE(
		"the valid control block with the higher sequence is current; one of another version stops the shard");
	CHECK(es_control_current(ES_OK, &c8, ES_OK, &c9) == 1);
	CHECK(es_control_current(ES_OK, &c9, ES_OK, &c8) == 0);
	CHECK(es_control_current(ES_ERR_CORRUPT, &c9, ES_OK, &c8) == 1);
	CHECK(es_control_current(ES_OK, &c8, ES_ERR_CORRUPT, &c9) == 0);
	CHECK(es_control_current(ES_ERR_CORRUPT, &c8, ES_ERR_CORRUPT, &c9) == -1);
	CHECK(es_control_current(ES_ERR_VERSION, &c8, ES_OK, &c9) == -1);
	CHECK(es_control_current(ES_OK, &c8, ES_ERR_VERSION, &c9) == -1);
}

static void
test_store(void)
{
	EsStoreFile	   store = make_store();
	EsStoreFile	   found;
	unsigned char *block = malloc(ES_WAL_BLOCK);

	PROMISE(
		"the store file is read back, and refused with any of its 4096 bytes changed or a slot of no shard");
	es_store_encode(&store, block);
	CHECK(es_store_decode(block, &found, NULL) == ES_OK && memcmp(&found, &store, sizeof(found)) == 0);
	for (size_t at = 0; at < ES_WAL_BLOCK; at++)
	{
		unsigned char bit = (unsigned char) (1 << rnd_below(8));

		block[at] ^= bit;
		CHECK(es_store_decode(block, &found, NULL) ==
			  (at / 2 == 2 && (block[4] | block[5]) != 0 ? ES_ERR_VERSION : ES_ERR_CORRUPT));
		block[at] ^= bit;
	}
	store.slot_map[1023] = 8;
	es_store_encode(&store, block);
	CHECK(es_store_decode(block, &found, NULL) == ES_ERR_CORRUPT);
	store = make_store();
	store.nshards = 0;
	es_store_encode(&store, block);
	CHECK(es_store_decode(block, &found, NULL) == ES_ERR_CORRUPT);
	store.nshards = ES_MAX_SHARDS + 1;
	es_store_encode(&store, block);
	CHECK(es_store_decode(block, &found, NULL) == ES_ERR_CORRUPT);
	store = make_store();
	store.flags = 2;
	es_store_encode(&store, block);
	CHECK(es_store_decode(block, &found, NULL) == ES_ERR_CORRUPT);
	free(block);
}

static void
test_frozen(void)
{
	EsControl	  control = make_control(9);
	EsStoreFile	  store = make_store();
	EsFrameHeader h = {.type = ES_FRAME_RESOLVED,
					   .payload_len = sizeof(EsResolved),
					   .shard = SHARD,
					   .own_lsn = OWN_LSN(64),
					   .pg_start = 1,
					   .pg_end = 2,
					   .fxid = 3};
	EsResolved	  resolved = {.commit_lsn = 4, .committed = 1};
	char		  frame[128];
	char		  block[ES_WAL_BLOCK];

	PROMISE("the bytes of frames, control blocks and the store file are frozen with the format");
	es_frame_encode(&h, &resolved, 17, frame);
	es_control_encode(&control, block);
	es_store_encode(&store, block);
	if (!CHECK(h.crc == UINT32_C(0x390fa37c) && control.crc == UINT32_C(0xbdc1632e) &&
			   store.crc == UINT32_C(0x500d2bbf)))
		printf(
			"# h.crc == UINT32_C(0x%08x) && control.crc == UINT32_C(0x%08x) && store.crc == UINT32_C(0x%08x)\n",
			h.crc, control.crc, store.crc);
}

static void
test_crc(void)
{
	char text[] = "123456789";

	PROMISE("the checksum is CRC-32C, and chains");
	CHECK(es_crc32c(0, text, 9) == UINT32_C(0xe3069283));
	for (size_t i = 0; i <= 9; i++)
		CHECK(es_crc32c(es_crc32c(0, text, i), text + i, 9 - i) == UINT32_C(0xe3069283));
}

int
main(void)
{
	test_crc();
	test_log();
	test_every_byte();
	test_hole();
	test_every_length();
	test_every_cut();
	test_place();
	test_unpack();
	test_control();
	test_control_torn();
	test_control_current();
	test_store();
	test_frozen();
	return done();
}
