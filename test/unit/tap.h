/*-------------------------------------------------------------------------
 *
 * tap.h
 *	  The little that a unit test needs: promises, checks, random numbers.
 *
 * A test is a function that begins with the promise it holds:
 *
 *	 static void
 *	 test_something(void)
 *	 {
 *		 PROMISE("what must be true");
 *		 CHECK(…);
 *	 }
 *
 * and main() calls them and ends with `return done();`.  A promise passes if
 * none of its checks fails.  The random numbers are the same in each run, unless
 * ES_SEED says otherwise.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_TEST_TAP_H
#define ES_TEST_TAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *tap_promise = NULL;
static unsigned	   tap_passed = 0;
static unsigned	   tap_failed = 0;
static unsigned	   tap_failed_checks = 0; /* of the current promise */

static inline void
tap_close(void)
{
	if (tap_promise == NULL)
		return;
	printf("%sok - %s\n", tap_failed_checks ? "not " : "", tap_promise);
	if (tap_failed_checks)
		tap_failed++;
	else
		tap_passed++;
	tap_promise = NULL;
	fflush(stdout);
}

#define PROMISE(text)          \
	do                         \
	{                          \
		tap_close();           \
		tap_promise = (text);  \
		tap_failed_checks = 0; \
	} while (0)

/* Returns the condition, so that a test can stop where going on makes no sense. */
#define CHECK(condition) tap_check((condition), #condition, __FILE__, __LINE__)

static inline bool
tap_check(bool condition, const char *text, const char *file, int line)
{
	/* a broken promise often fails in thousands of checks */
	if (!condition && tap_failed_checks++ < 5)
		printf("# %s:%d: %s\n", file, line, text);
	return condition;
}

static inline int
done(void)
{
	tap_close();
	printf("%u passed, %u failed\n", tap_passed, tap_failed);
	return tap_failed > 0;
}

/* ---- random numbers (xorshift64*) ---- */

static uint64_t tap_random_state = 0;

static inline uint64_t
rnd(void)
{
	if (tap_random_state == 0)
	{
		const char *seed = getenv("ES_SEED");

		tap_random_state = seed ? strtoull(seed, NULL, 10) | 1 : UINT64_C(0x9e3779b97f4a7c15);
	}
	tap_random_state ^= tap_random_state >> 12;
	tap_random_state ^= tap_random_state << 25;
	tap_random_state ^= tap_random_state >> 27;
	return tap_random_state * UINT64_C(0x2545f4914f6cdd1d);
}

/* From 0 to n - 1. */
static inline uint64_t
rnd_below(uint64_t n)
{
	return (rnd() >> 11) % n;
}

static inline void
rnd_bytes(void *buf, size_t len)
{
	uint8_t *p = buf;

	for (size_t i = 0; i < len; i++)
		p[i] = (uint8_t) (rnd() >> 56);
}

/*
 * A copy that ends where its memory ends, so that ASan sees a byte read behind
 * it.  To be freed.
 */
static inline void *
exact_copy(const void *buf, size_t len)
{
	void *copy = malloc(len > 0 ? len : 1);

	if (copy == NULL)
		abort();
	if (len > 0)
		memcpy(copy, buf, len);
	return copy;
}

#endif /* ES_TEST_TAP_H */
