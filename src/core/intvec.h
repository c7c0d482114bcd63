/*-------------------------------------------------------------------------
 *
 * intvec.h
 *	  Vectors of 64-bit integers in few bits, readable at any index: columns
 *	  of integers, indexes into a page's dictionary, entries of the context index.
 *
 * Arithmetic is modulo 2^64, so signed and unsigned values and deltas that
 * overflow all come back exactly.  Layout (all parts padded to 8 bytes):
 *
 *	 EsIntVecHeader
 *	 FRAME	value[i] = base + packed[i]
 *	 DELTA	uint64 anchors[one per ES_INTVEC_BLOCK values], packed: inside a block
 *			value[i] = value[i - 1] + base + packed[i], its first is the anchor
 *	 RUNS	uint16 ends[nruns] (ascending, the last one is n), packed[nruns]:
 *			value[i] = base + packed[run] + step * (i - first index of the run)
 *
 * packed[] holds width-bit numbers, lowest bit first, without gaps.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_CORE_INTVEC_H
#define ES_CORE_INTVEC_H

#include "core/format.h"

#define ES_INTVEC_BLOCK 256
#define ES_INTVEC_MAX	65535 /* values in one vector */

/* Readers load 8 bytes at a time: so many readable bytes must follow the vector. */
#define ES_INTVEC_SLACK 8

typedef enum EsIntVecMode
{
	ES_INTVEC_FRAME = 0,
	ES_INTVEC_DELTA = 1,
	ES_INTVEC_RUNS = 2
} EsIntVecMode;

typedef struct EsIntVecHeader
{
	uint8_t	 mode;
	uint8_t	 width; /* bits: 0 to 56, or 64 */
	uint8_t	 step;	/* RUNS: 0 or 1 */
	uint8_t	 reserved;
	uint32_t nruns;
	uint64_t base;
} EsIntVecHeader;

_Static_assert(sizeof(EsIntVecHeader) == 16, "EsIntVecHeader is on disk");

/*
 * What encoding n values takes.  whole_bytes rounds the width up to bytes,
 * which is larger but which LZ4 and Zstandard find repetitions in.
 */
typedef struct EsIntVecPlan
{
	EsIntVecHeader header;
	uint32_t	   n;
	size_t		   size; /* encoded bytes, multiple of 8 */
} EsIntVecPlan;

extern void es_intvec_plan(const uint64_t *values, uint32_t n, bool whole_bytes, EsIntVecPlan *plan);

/* Writes plan->size bytes. */
extern void es_intvec_encode(const uint64_t *values, const EsIntVecPlan *plan, uint8_t *out);

/* Opened vector: points into the caller's buffer. */
typedef struct EsIntVec
{
	uint8_t		   mode;
	uint8_t		   width;
	uint8_t		   step;
	uint32_t	   n;
	uint32_t	   nruns;
	uint64_t	   base;
	const uint8_t *packed;
	const uint8_t *side; /* anchors or ends */
	size_t		   size; /* encoded bytes */
} EsIntVec;

/*
 * Checks the structure; false if it does not fit in len bytes.  Afterwards every
 * index below n may be read, whatever the bytes say.
 */
extern bool es_intvec_open(EsIntVec *iv, const uint8_t *buf, size_t len, uint32_t n);

extern uint64_t es_intvec_get(const EsIntVec *iv, uint32_t i);
extern void		es_intvec_decode(const EsIntVec *iv, uint32_t first, uint32_t n, uint64_t *out);

#endif /* ES_CORE_INTVEC_H */
