/*-------------------------------------------------------------------------
 *
 * page.h
 *	  Codec of a segment's pages: encodings, compression, checksum.  Private to
 *	  segment_*.c; knows nothing of files.
 *
 * Raw bytes of a data page with n rows:
 *
 *	 null bitmap	(n + 7) / 8 bytes padded to 8; only with ES_PAGE_HAS_NULLS; bit set = NULL
 *	 INTS		an integer vector (intvec.h): fixed width of 1, 2, 4, 8 bytes; NULLs repeat
 *				their neighbour
 *	 DECIMAL	EsDecimalHeader, exception rows uint16[] padded to 8, exception values
 *				uint64[], an integer vector: doubles that are integers / 10^exponent,
 *				bit for bit (after Afroozeh, Boncz: ALP, SIGMOD 2023)
 *	 PLAIN		the values that are not NULL, as they lie in memory: fixed width at multiples
 *				of the width rounded up to the alignment; varlena with 1-byte headers
 *				unaligned, with 4-byte headers at multiples of the alignment, zeros between.
 *				Where each begins is found by walking them, once
 *	 DICTIONARY uint32 entries, uint32 bytes of them (padded to 8), the entries as in
 *				PLAIN, an integer vector of entry numbers
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_CORE_PAGE_H
#define ES_CORE_PAGE_H

#include "core/intvec.h"
#include "core/segment_format.h"

typedef enum EsPageEncoding
{
	ES_ENCODING_NONE = 0, /* not a data page */
	ES_ENCODING_INTS = 1,
	ES_ENCODING_DECIMAL = 2,
	ES_ENCODING_PLAIN = 3,
	ES_ENCODING_DICTIONARY = 4
} EsPageEncoding;

#define ES_PAGE_HAS_NULLS 0x80
#define ES_PAGE_ENCODING  0x7f

typedef struct EsDecimalHeader
{
	uint32_t exponent; /* 0 to ES_DECIMAL_MAX */
	uint32_t nexceptions;
} EsDecimalHeader;

#define ES_DECIMAL_MAX 6

/* Columns of these widths are integers to the codec, whatever their type. */
static inline bool
es_page_is_int(const EsColumnDesc *desc)
{
	return desc->len == 1 || desc->len == 2 || desc->len == 4 || desc->len == 8;
}

/* Distance of fixed-width values in memory. */
static inline uint32_t
es_page_stride(const EsColumnDesc *desc)
{
	return ((uint32_t) desc->len + desc->align - 1) & ~((uint32_t) desc->align - 1);
}

/* Bytes of a varlena (or overflow reference) that was checked before. */
static inline uint32_t
es_page_varlena_size(const uint8_t *p)
{
	if (p[0] == ES_OVERFLOW_MARKER)
		return sizeof(EsOverflowRef);
	if (p[0] & 0x01)
		return p[0] >> 1;
	return ((uint32_t) p[0] | (uint32_t) p[1] << 8 | (uint32_t) p[2] << 16 | (uint32_t) p[3] << 24) >> 2;
}

/* ---- writing (page_encode.c) ---- */

typedef struct EsPageEncoder EsPageEncoder;

/* codec: see EsSegmentSpec.  NULL = no memory. */
extern EsPageEncoder *es_page_encoder_create(EsCodec codec, int zstd_level);
extern void			  es_page_encoder_free(EsPageEncoder *enc);

/* One column of a zone. */
typedef struct EsPageSource
{
	EsColumnDesc	desc;
	const uint8_t  *nulls;	 /* bitmap, NULL = none */
	const uint8_t  *data;	 /* fixed width: value of row i at i * len; else all values */
	const uint32_t *offsets; /* varlena: where row i's value begins in data */
} EsPageSource;

/* Points into the encoder until its next call. */
typedef struct EsEncodedPage
{
	uint32_t	   nrows;
	uint8_t		   encoding;
	uint8_t		   codec;
	uint32_t	   raw_len;
	uint32_t	   stored_len;
	const uint8_t *stored;
} EsEncodedPage;

/* Encodes rows from first on, as many before end as go into one page (at least one). */
extern EsStatus es_page_encode(EsPageEncoder *enc, const EsPageSource *source, uint32_t first, uint32_t end,
							   EsEncodedPage *page);

/*
 * Only compresses; raw must stay until page->stored was used.  Footers are of any
 * length and never use Zstandard, whose ratio has no bound that a reader could check.
 */
extern EsStatus
es_page_compress(EsPageEncoder *enc, const void *raw, uint32_t raw_len, bool footer, EsEncodedPage *page);

/* Fills header->crc. */
extern void es_page_seal(EsPageHeader *header, const void *stored, uint64_t segment_id, uint64_t offset);

/* ---- reading (page.c) ---- */

/* A page in memory, decompressed; counted references. */
typedef struct EsPage
{
	uint32_t		refs;
	uint32_t		raw_len;
	size_t			memory; /* heap bytes */
	uint64_t		offset; /* in the file */
	uint32_t		zone;	/* as in EsPageHeader */
	uint16_t		first_row;
	uint16_t		nrows;
	uint16_t		column;
	uint8_t			kind;		  /* EsPageKind */
	uint8_t			encoding;	  /* EsPageEncoding */
	bool			has_overflow; /* some value is an EsOverflowRef */
	EsColumnDesc	desc;
	const uint8_t  *raw;		/* aligned to 16, ES_INTVEC_SLACK bytes behind it */
	const uint8_t  *nulls;		/* NULL = no row is NULL */
	EsIntVec		ints;		/* INTS, DECIMAL, DICTIONARY; index page: hashes */
	EsIntVec		rows;		/* index page: first rows */
	const uint8_t  *values;		/* PLAIN, DICTIONARY; DECIMAL: exceptions' values */
	const uint16_t *starts;		/* varlena: in values, of row (PLAIN) or entry */
	const uint8_t  *exceptions; /* DECIMAL: uint16 rows */
	uint32_t		nentries;	/* DICTIONARY; DECIMAL: exceptions */
	uint32_t		exponent;
	/* the page cache's (segment_cache.c) */
	struct EsPage *hash_next;
	struct EsPage *newer;
	struct EsPage *older;
	bool		   used; /* since it became the newest */
} EsPage;

/* Decompression state, made when first needed. */
typedef struct EsPageDecoder
{
	void *zstd;
} EsPageDecoder;

extern void es_page_decoder_free(EsPageDecoder *d);

/*
 * Checks the len bytes of a page as read from offset: CRC, kind, lengths.  buf
 * need not be aligned.
 */
extern EsStatus es_page_check(const uint8_t *buf, size_t len, EsPageKind kind, uint64_t segment_id,
							  uint64_t offset, EsPageHeader *header, EsError *err);

/* Decompresses exactly header->raw_len bytes into raw. */
extern EsStatus es_page_decompress(EsPageDecoder *d, const EsPageHeader *header, const uint8_t *stored,
								   void *raw, uint64_t offset, EsError *err);

/*
 * Decodes a checked data page of a column (desc), index or filter page (desc NULL).
 * *page has one reference.
 */
extern EsStatus es_page_decode(EsPageDecoder *d, const EsPageHeader *header, const uint8_t *stored,
							   const EsColumnDesc *desc, uint64_t offset, EsPage **page, EsError *err);

static inline bool
es_page_is_null(const EsPage *p, uint32_t row)
{
	return p->nulls != NULL && ((p->nulls[row >> 3] >> (row & 7)) & 1) != 0;
}

/*
 * Rows [first, first + n) of an integer column, at out + i * stride; NULL rows
 * have some value.
 */
extern void es_page_ints(const EsPage *p, uint32_t first, uint32_t n, uint32_t stride, uint8_t *out);

/*
 * Pointers to the values of another column, NULL for NULL; they point into the
 * page.  false: the page is damaged in a way its CRC does not show.
 */
extern bool es_page_pointers(const EsPage *p, uint32_t first, uint32_t n, const void **out);

static inline void
es_page_ref(EsPage *p)
{
	p->refs++;
}

extern void es_page_unref(EsPage *p);

#endif /* ES_CORE_PAGE_H */
