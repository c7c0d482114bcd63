/*-------------------------------------------------------------------------
 *
 * idle.c
 *	  The moment after a turn of the shard's loop, before it sleeps.
 *
 * Sleeping and waking cost two system calls and two switches of context, more than the shard takes for a
 * commit or a short replay.  Two kinds of traffic are spared them.
 *
 *	 - Only commits, which need no answer: the shard naps a moment without its latch, so that those who
 *	   commit meanwhile find a latch that is set or that nobody sleeps on; the next turn takes all of them.
 *	   es_wake_shard ends a nap with a signal.
 *	 - One session that asks again and again, with a core for each side: the shard spins until the next
 *	   question, for SPIN µs at most.  If it does not come the session must ask many times again before
 *	   the shard spins for it once more.
 *
 * With several sessions neither side spins: their work fills the cores.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <unistd.h>

#include "storage/s_lock.h"

#include "shard/idle.h"
#include "shard/shard.h"
#include "shard/task.h"

#define NAP		  1000L /* µs between two looks at the queues while only commits come */
#define SPIN	  150	/* µs */
#define LOOKS	  50	/* at `urgent` between two looks at the clock */
#define QUESTIONS 16	/* of one session, and nothing of any other, before it is spun for */

static int	  last_slot = -1; /* of the session whose message came last */
static uint32 in_a_row;

void
es_idle_message(int slot)
{
	if (slot == last_slot)
		in_a_row++;
	else
	{
		last_slot = slot;
		in_a_row = 0;
	}
}

void
es_idle_nap(long timeout)
{
	pg_atomic_write_u32(&es_shard->napping, 1);
	pg_memory_barrier();
	if (pg_atomic_read_u32(&es_shard->urgent) == 0)
		pg_usleep(Min(timeout * 1000L, NAP));
	pg_atomic_write_u32(&es_shard->napping, 0);
}

bool
es_idle_spin(void)
{
	static int cores = 0;
	int64	   end;
	bool	   asked = false;

	if (cores == 0)
		cores = (int) sysconf(_SC_NPROCESSORS_ONLN);
	if (cores < 2 || in_a_row < QUESTIONS)
		return false;
	if (pg_atomic_fetch_add_u32(&es_shared->spinning_shards, 1) == 0)
	{
		end = es_task_clock() + SPIN;
		do
		{
			for (int i = 0; i < LOOKS && !asked; i++)
			{
				SPIN_DELAY();
				asked = pg_atomic_read_u32(&es_shard->urgent) != 0;
			}
		} while (!asked && es_task_clock() < end);
		if (!asked)
			in_a_row = 0;
	}
	pg_atomic_fetch_sub_u32(&es_shared->spinning_shards, 1);
	return asked;
}
