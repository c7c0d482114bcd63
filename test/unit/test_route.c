/*
 * Routing: a context goes to the same shard forever, whatever type of its class
 * it is stored in.
 */
#include "core/route.h"

#include "tap.h"

static uint64_t
hash_of(EsContextClass klass, int16_t attlen, const void *value)
{
	int64_t		scratch;
	const void *bytes;
	size_t		len;

	es_context_bytes(klass, attlen, value, &scratch, &bytes, &len);
	return es_context_hash(klass, bytes, len);
}

/* Builds a varlena with a 1-byte or 4-byte header in buf. */
static const void *
varlena(char *buf, const char *data, size_t len, bool short_header)
{
	uint32_t header = (uint32_t) (len + 4) << 2;

	if (short_header)
	{
		buf[0] = (char) ((len + 1) << 1 | 1);
		memcpy(buf + 1, data, len);
	}
	else
	{
		memcpy(buf, &header, 4);
		memcpy(buf + 4, data, len);
	}
	return buf;
}

static void
test_frozen_hashes(void)
{
	static const struct
	{
		EsContextClass klass;
		const char	  *bytes;
		size_t		   len;
		uint64_t	   hash;
		uint32_t	   slot;
	} vectors[] = {
		{ES_CONTEXT_STRING, "", 0, UINT64_C(0xfdead6847e4d66dd), 1015},
		{ES_CONTEXT_STRING, "a", 1, UINT64_C(0x2e25a4e2b5083c43), 184},
		{ES_CONTEXT_STRING, "order-17", 8, UINT64_C(0xc77aefc039105820), 797},
		{ES_CONTEXT_STRING, "a context of more than twelve bytes", 35, UINT64_C(0xcbfba0abeb64a2fe), 815},
		{ES_CONTEXT_BYTEA, "order-17", 8, UINT64_C(0x2be91f460a09519b), 175},
		{ES_CONTEXT_INTEGER, "\x11\0\0\0\0\0\0\0", 8, UINT64_C(0x0dff32f0bb6e55b0), 55},
		{ES_CONTEXT_INTEGER, "\xff\xff\xff\xff\xff\xff\xff\xff", 8, UINT64_C(0xfa203536f675c198), 1000},
		{ES_CONTEXT_UUID, "\0\1\2\3\4\5\6\7\x8\x9\xa\xb\xc\xd\xe\xf", 16, UINT64_C(0x16369aa7a7fecf95), 88},
		{ES_CONTEXT_DATE, "\x11\0\0\0\0\0\0\0", 8, UINT64_C(0x0e1af6ae4816dd06), 56},
		{ES_CONTEXT_TIMESTAMPTZ, "\x11\0\0\0\0\0\0\0", 8, UINT64_C(0x03b1420d720e12d3), 14},
		{ES_CONTEXT_BOOL, "\1\0\0\0\0\0\0\0", 8, UINT64_C(0xa909634f51490de4), 676},
		{ES_CONTEXT_ENUM, "\x11\0\0\0\0\0\0\0", 8, UINT64_C(0x346043deabfb922f), 209},
	};

	PROMISE("the hash of a context is frozen with the format");
	for (size_t i = 0; i < sizeof(vectors) / sizeof(vectors[0]); i++)
	{
		char	*odd = malloc(vectors[i].len + 1);
		uint64_t hash = es_context_hash(vectors[i].klass, vectors[i].bytes, vectors[i].len);

		if (!CHECK(hash == vectors[i].hash) || !CHECK(es_hash_slot(hash) == vectors[i].slot))
			printf("# vector %zu: UINT64_C(0x%016llx), %u\n", i, (unsigned long long) hash,
				   es_hash_slot(hash));

		/* and does not depend on where the bytes lie */
		memcpy(odd + 1, vectors[i].bytes, vectors[i].len);
		CHECK(es_context_hash(vectors[i].klass, odd + 1, vectors[i].len) == hash);
		free(odd);
	}
}

static void
test_same_class(void)
{
	char	 buf[256];
	char	 name[64] = "order-17";
	char	 full_name[64];
	int16_t	 i2 = -17;
	int32_t	 i4 = -17;
	int64_t	 i8 = -17;
	uint64_t expected = es_context_hash(ES_CONTEXT_STRING, "order-17", 8);

	PROMISE("a context keeps its hash when its column changes to another type of the same class");
	CHECK(hash_of(ES_CONTEXT_STRING, -1, varlena(buf, "order-17", 8, true)) == expected);
	CHECK(hash_of(ES_CONTEXT_STRING, -1, varlena(buf, "order-17", 8, false)) == expected);
	CHECK(hash_of(ES_CONTEXT_STRING, 64, name) == expected);
	memset(full_name, 'x', sizeof(full_name));
	CHECK(hash_of(ES_CONTEXT_STRING, 64, full_name) == es_context_hash(ES_CONTEXT_STRING, full_name, 64));

	expected = es_context_hash(ES_CONTEXT_INTEGER, &i8, 8);
	CHECK(hash_of(ES_CONTEXT_INTEGER, 2, &i2) == expected);
	CHECK(hash_of(ES_CONTEXT_INTEGER, 4, &i4) == expected);
	CHECK(hash_of(ES_CONTEXT_INTEGER, 8, &i8) == expected);
	CHECK(hash_of(ES_CONTEXT_DATE, 4, &i4) == es_context_hash(ES_CONTEXT_DATE, &i8, 8));
	CHECK(hash_of(ES_CONTEXT_TIMESTAMPTZ, 8, &i8) == es_context_hash(ES_CONTEXT_TIMESTAMPTZ, &i8, 8));
}

static void
test_widened_values(void)
{
	uint32_t	oid = UINT32_C(0xfffffff0);
	int64_t		oid8 = INT64_C(0xfffffff0);
	uint8_t		yes = 1;
	int64_t		one = 1;
	uint8_t		uuid[16];
	int64_t		scratch;
	const void *bytes;
	size_t		len;

	PROMISE("an OID is widened without its sign, a bool as 0 or 1, and a uuid stays as it is");
	CHECK(hash_of(ES_CONTEXT_ENUM, 4, &oid) == es_context_hash(ES_CONTEXT_ENUM, &oid8, 8));
	CHECK(hash_of(ES_CONTEXT_BOOL, 1, &yes) == es_context_hash(ES_CONTEXT_BOOL, &one, 8));
	rnd_bytes(uuid, sizeof(uuid));
	es_context_bytes(ES_CONTEXT_UUID, 16, uuid, &scratch, &bytes, &len);
	CHECK(bytes == uuid && len == 16);
}

static void
test_varlena(void)
{
	char		buf[1024];
	char		data[1000];
	const char *found;
	size_t		len;

	PROMISE("a varlena's data and size are read with both headers, at any address");
	rnd_bytes(data, sizeof(data));
	for (size_t n = 0; n <= sizeof(data); n++)
	{
		for (int at = 0; at < 4; at++)
		{
			varlena(buf + at, data, n, false);
			es_varlena_data(buf + at, &found, &len);
			CHECK(len == n && memcmp(found, data, n) == 0 && es_varlena_size(buf + at) == n + 4);
			if (n > 126)
				continue;
			varlena(buf + at, data, n, true);
			es_varlena_data(buf + at, &found, &len);
			CHECK(len == n && memcmp(found, data, n) == 0 && es_varlena_size(buf + at) == n + 1);
		}
	}
}

static void
test_slot_map(void)
{
	uint8_t map[ES_ROUTING_SLOTS];

	PROMISE("the first slot map gives each shard one run of slots, all of the same length within one");
	for (int nshards = 1; nshards <= ES_MAX_SHARDS; nshards++)
	{
		int count[ES_MAX_SHARDS] = {0};

		es_slot_map_init(map, nshards);
		for (int slot = 0; slot < ES_ROUTING_SLOTS; slot++)
		{
			if (!CHECK(map[slot] < nshards))
				return;
			CHECK(slot == 0 || map[slot] == map[slot - 1] || map[slot] == map[slot - 1] + 1);
			count[map[slot]]++;
		}
		for (int shard = 0; shard < nshards; shard++)
			CHECK(count[shard] == ES_ROUTING_SLOTS / nshards ||
				  count[shard] == ES_ROUTING_SLOTS / nshards + 1);
	}
}

static void
test_spread(void)
{
	static int count[ES_ROUTING_SLOTS];
	char	   context[32];

	PROMISE("contexts that count up spread over all slots");
	for (int i = 0; i < 100 * ES_ROUTING_SLOTS; i++)
	{
		int n = snprintf(context, sizeof(context), "order-%d", i);

		count[es_hash_slot(es_context_hash(ES_CONTEXT_STRING, context, (size_t) n))]++;
	}
	for (int slot = 0; slot < ES_ROUTING_SLOTS; slot++)
		CHECK(count[slot] > 40 && count[slot] < 180);
}

int
main(void)
{
	test_frozen_hashes();
	test_same_class();
	test_widened_values();
	test_varlena();
	test_slot_map();
	test_spread();
	return done();
}
