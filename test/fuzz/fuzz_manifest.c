/*
 * fuzz_manifest: whatever a manifest says that is accepted can be said again by its rewritten form, and a
 * record that does not fit changes nothing.
 *
 * The first byte: bit 0 = checksums are made right so that what is behind them is reached, bit 1 = the whole
 * file was durable.
 */
#include <stdlib.h>
#include <string.h>

#include "core/manifest.h"

static void
reseal(char *file, size_t len)
{
	uint32_t prev = 0;

	for (size_t at = 0; len - at >= sizeof(EsManifestRecord);)
	{
		EsManifestRecord *r = (EsManifestRecord *) (file + at);

		r->magic = ES_MANIFEST_MAGIC;
		r->version = ES_FORMAT_VERSION;
		if (r->len < sizeof(*r) || r->len > len - at || r->len % 8 != 0)
			break;
		r->crc = 0;
		prev = es_crc32c(es_crc32c(0, r, r->len), &prev, sizeof(prev));
		r->crc = prev;
		at += r->len;
	}
}

static void *
image_of(const EsManifestState *state, size_t *len)
{
	void	*image;
	uint32_t crc;

	if (es_manifest_rewrite(state, &image, len, &crc) != ES_OK)
		abort();
	return image;
}

/* Applies the records one by one, as a running shard does. */
static void
apply_records(const char *file, size_t len)
{
	EsManifestState state;

	es_manifest_state_init(&state);
	for (size_t at = 0; len - at >= sizeof(EsManifestRecord);)
	{
		const EsManifestRecord *r = (const EsManifestRecord *) (file + at);
		size_t					len1;
		size_t					len2;
		void				   *before;
		void				   *after;

		if (r->len < sizeof(*r) || r->len > len - at || r->len % 8 != 0)
			break;
		before = image_of(&state, &len1);
		if (es_manifest_apply(&state, r, r->len, NULL) != ES_OK)
		{
			after = image_of(&state, &len2);
			if (len1 != len2 || memcmp(before, after, len1) != 0)
				abort();
			free(after);
		}
		free(before);
		at += r->len;
	}
	es_manifest_state_free(&state);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	EsManifestState state;
	uint64_t		valid_len;
	uint32_t		crc;
	char		   *file;
	uint8_t			mode;

	if (size == 0)
		return 0;
	mode = data[0];
	size--;
	file = malloc(size ? size : 1);
	memcpy(file, data + 1, size);
	if (mode & 1)
		reseal(file, size);
	es_manifest_state_init(&state);
	if (es_manifest_read(&state, file, size, mode & 2 ? size : 0, &valid_len, &crc, NULL) == ES_OK)
	{
		EsManifestState again;
		size_t			len1;
		size_t			len2;
		void		   *image1 = image_of(&state, &len1);
		void		   *image2;

		if (valid_len > size)
			abort();
		es_manifest_state_init(&again);
		if (es_manifest_read(&again, image1, len1, len1, &valid_len, &crc, NULL) != ES_OK ||
			valid_len != len1)
			abort();
		image2 = image_of(&again, &len2);
		if (len1 != len2 || memcmp(image1, image2, len1) != 0)
			abort();
		free(image1);
		free(image2);
		es_manifest_state_free(&again);
	}
	es_manifest_state_free(&state);
	if (mode & 1)
		apply_records(file, size);
	free(file);
	return 0;
}
