/*
 * Visibility, horizon and restart LSN: checked against models that enumerate every interleaving of writers,
 * readers and shards.
 *
 * A model is a small world (a struct without pointers) and actors that each take one atomic step at a
 * time.  From the first world on, every actor's next step is tried in every world that can be
 * reached; a world seen before is not gone into again.  Each model has switches that break one rule
 * of the protocol, and must then find the harm: so the models, too, are tests that can fail.
 */
#include "core/arith.h"

#include "tap.h"

#define FIRST_XID 3

static EsFxid
next_xid(EsFxid xid)
{
	xid++;
	while ((uint32_t) xid < FIRST_XID)
		xid++;
	return xid;
}

/* ---- exploring ---- */

#define MAX_WORLD 1024

typedef struct Explorer
{
	size_t world_size;
	int	   nactors;
	/* The actor's next step in the world; false if it has none. */
	bool (*step)(void *world, int actor);
	/* Called in each new world; terminal: nobody has a step.  Answers whether to go on from there. */
	bool (*visit)(const void *world, bool terminal);
	uint64_t *seen; /* open hash table of worlds' hashes, 0 = free */
	size_t	  nseen;
	size_t	  capacity;
} Explorer;

static uint64_t
world_hash(const void *world, size_t len)
{
	const uint64_t *p = world;
	uint64_t		h = UINT64_C(0x9e3779b97f4a7c15);

	for (size_t i = 0; i < len / 8; i++)
	{
		h = (h ^ p[i]) * UINT64_C(0xff51afd7ed558ccd);
		h ^= h >> 32;
	}
	return h | 1;
}

/* Was the hash new? */
static bool
remember(Explorer *e, uint64_t hash)
{
	if (e->nseen * 2 >= e->capacity)
	{
		uint64_t *old = e->seen;
		size_t	  old_capacity = e->capacity;

		e->capacity = old_capacity ? old_capacity * 2 : 1 << 16;
		e->seen = calloc(e->capacity, sizeof(*e->seen));
		e->nseen = 0;
		for (size_t i = 0; i < old_capacity; i++)
			if (old[i])
				remember(e, old[i]);
		free(old);
	}
	for (size_t i = hash & (e->capacity - 1);; i = (i + 1) & (e->capacity - 1))
	{
		if (e->seen[i] == hash)
			return false;
		if (e->seen[i] == 0)
		{
			e->seen[i] = hash;
			e->nseen++;
			return true;
		}
	}
}

static void
explore(Explorer *e, const void *world)
{
	uint64_t next[MAX_WORLD / 8];
	bool	 terminal = true;

	if (!e->visit(world, false))
		return;
	for (int actor = 0; actor < e->nactors; actor++)
	{
		memcpy(next, world, e->world_size);
		if (!e->step(next, actor))
			continue;
		terminal = false;
		if (remember(e, world_hash(next, e->world_size)))
			explore(e, next);
	}
	if (terminal)
		e->visit(world, true);
}

/* One random interleaving. */
static void
wander(const Explorer *e, void *world)
{
	int idle = 0;

	while (idle < 100)
	{
		if (!e->visit(world, false))
			return;
		if (e->step(world, (int) rnd_below((uint64_t) e->nactors)))
			idle = 0;
		else
			idle++;
	}
	e->visit(world, true);
}

/* Returns the number of worlds. */
static size_t
explore_from(const void *world, size_t size, int nactors, bool (*step)(void *, int),
			 bool (*visit)(const void *, bool))
{
	Explorer e = {.world_size = size, .nactors = nactors, .step = step, .visit = visit};

	if (size > MAX_WORLD || size % 8 != 0)
		abort();
	remember(&e, world_hash(world, size));
	explore(&e, world);
	free(e.seen);
	return e.nseen;
}

/* ---- the horizon ---- */

#define MAX_WRITERS 3
#define MAX_RING	4

typedef enum Breakage
{
	CORRECT,
	RESERVE_BEFORE_SLOT,
	CLEAR_BEFORE_PUSH,
	PUSH_BEFORE_COMMIT,
	RING_BEFORE_SLOTS,
	SLOTS_BEFORE_COUNTER,
	NO_OVERFLOW
} Breakage;

/* What does not change in a run. */
static struct
{
	Breakage broken;
	int		 nwriters;
	int		 rounds; /* transactions per writer */
	int		 ring_size;
	bool	 other;		  /* one more xid comes and goes, without events */
	bool	 other_stays; /* … or stays */
	bool	 reader;
	unsigned aborting; /* bit (writer * rounds + round): it aborts */
} setup;

typedef enum WriterStep
{
	W_BEGIN, /* gets its xid */
	W_SLOT,	 /* publishes the lower bound */
	W_RESERVE,
	W_COMMIT, /* or aborts; from here on snapshots see it */
	W_READ_L,
	W_PUSH,
	W_CLEAR,
	W_STEPS
} WriterStep;

typedef struct Writer
{
	EsFxid	   xid;
	EsPosition base;			 /* 0 = not yet */
	EsFxid	   latest_completed; /* as it read it */
	uint32_t   steps;			 /* taken in this transaction */
	uint32_t   round;
} Writer;

typedef struct Transaction
{
	EsFxid	   xid;
	EsPosition base;
	uint64_t   outcome; /* 0 = running, 1 = committed, 2 = aborted */
} Transaction;

typedef struct HorizonWorld
{
	EsFxid		   next;
	EsFxid		   latest_completed;
	EsPosition	   counter;
	EsHorizonSlot  slots[MAX_WRITERS];
	EsHorizonEntry ring[MAX_RING];
	EsHorizonEntry overflow;
	Writer		   writers[MAX_WRITERS];
	Transaction	   transactions[MAX_WRITERS * 2 + 1]; /* the last one is the other */
	uint32_t	   nring;
	uint32_t	   other_steps;

	/* the reader */
	uint32_t	   reader_steps;
	uint32_t	   nxip;
	EsFxid		   xmin;
	EsFxid		   xmax;
	EsFxid		   xip[MAX_WRITERS + 1];
	EsPosition	   read_counter;
	EsHorizonSlot  read_slots[MAX_WRITERS];
	uint64_t	   read_committed[MAX_WRITERS];
	EsHorizonEntry read_ring[MAX_RING];
	EsHorizonEntry read_overflow;
	uint64_t	   read_nring;
	EsPosition	   horizon; /* 0 = not yet */
} HorizonWorld;

static unsigned misses; /* events that the reader never gets to see */
static unsigned stuck;	/* terminal worlds where the horizon is behind */
static unsigned terminals;
static unsigned readings;
static unsigned held_back; /* readings whose horizon was below the counter */

static Transaction *
transaction_of(HorizonWorld *w, EsFxid xid)
{
	for (size_t i = 0; i < MAX_WRITERS * 2 + 1; i++)
		if (w->transactions[i].xid == xid)
			return &w->transactions[i];
	abort();
}

static void
begin_xid(HorizonWorld *w, Transaction *t)
{
	t->xid = w->next;
	w->next = next_xid(w->next);
}

static void
end_xid(HorizonWorld *w, EsFxid xid, bool commit)
{
	transaction_of(w, xid)->outcome = commit ? 1 : 2;
	if (xid > w->latest_completed)
		w->latest_completed = xid;
}

static void
take_snapshot(HorizonWorld *w)
{
	w->xmax = next_xid(w->latest_completed);
	w->xmin = w->xmax;
	w->nxip = 0;
	memset(w->xip, 0, sizeof(w->xip));
	for (size_t i = 0; i < MAX_WRITERS * 2 + 1; i++)
	{
		EsFxid	 xid = w->transactions[i].xid;
		uint32_t at = w->nxip;

		if (xid == 0 || w->transactions[i].outcome != 0 || xid >= w->xmax)
			continue;
		while (at > 0 && w->xip[at - 1] > xid)
		{
			w->xip[at] = w->xip[at - 1];
			at--;
		}
		w->xip[at] = xid;
		w->nxip++;
		if (xid < w->xmin)
			w->xmin = xid;
	}
}

static EsSnapshot
snapshot_of(const HorizonWorld *w)
{
	return (EsSnapshot){.xmin = w->xmin, .xmax = w->xmax, .nxip = w->nxip, .xip = w->xip};
}

static void
push(HorizonWorld *w, EsHorizonEntry entry)
{
	if (w->nring == (uint32_t) setup.ring_size)
	{
		if (setup.broken != NO_OVERFLOW)
			es_horizon_fold(&w->overflow, &w->ring[0]);
		memmove(&w->ring[0], &w->ring[1], sizeof(w->ring[0]) * (MAX_RING - 1));
		w->nring--;
	}
	w->ring[w->nring++] = entry;
}

/* The order of a writer's steps, as the setup breaks it. */
static WriterStep
writer_step(uint32_t n)
{
	static const WriterStep orders[][W_STEPS] = {
		[CORRECT] = {W_BEGIN, W_SLOT, W_RESERVE, W_COMMIT, W_READ_L, W_PUSH, W_CLEAR},
		[RESERVE_BEFORE_SLOT] = {W_BEGIN, W_RESERVE, W_SLOT, W_COMMIT, W_READ_L, W_PUSH, W_CLEAR},
		[CLEAR_BEFORE_PUSH] = {W_BEGIN, W_SLOT, W_RESERVE, W_COMMIT, W_READ_L, W_CLEAR, W_PUSH},
		[PUSH_BEFORE_COMMIT] = {W_BEGIN, W_SLOT, W_RESERVE, W_READ_L, W_PUSH, W_COMMIT, W_CLEAR},
	};

	return orders[setup.broken <= PUSH_BEFORE_COMMIT ? setup.broken : CORRECT][n];
}

static bool
step_writer(HorizonWorld *w, int i)
{
	Writer	*me = &w->writers[i];
	uint32_t number = (uint32_t) (i * setup.rounds) + me->round;
	bool	 aborts = (setup.aborting >> number) & 1;

	if (me->round == (uint32_t) setup.rounds)
		return false;
	switch (writer_step(me->steps))
	{
		case W_BEGIN:
			begin_xid(w, &w->transactions[number]);
			me->xid = w->transactions[number].xid;
			break;
		case W_SLOT:
			w->slots[i] = (EsHorizonSlot){.lower_bound = w->counter, .fxid = me->xid};
			break;
		case W_RESERVE:
			w->transactions[number].base = me->base = w->counter;
			w->counter += 2;
			break;
		case W_COMMIT:
			end_xid(w, me->xid, !aborts);
			break;
		case W_READ_L:
			me->latest_completed = w->latest_completed;
			break;
		case W_PUSH:
			if (!aborts)
				push(w, (EsHorizonEntry){me->latest_completed, me->xid, me->base});
			break;
		case W_CLEAR:
			w->slots[i] = (EsHorizonSlot){0};
			break;
		case W_STEPS:
			break;
	}
	if (++me->steps == W_STEPS)
	{
		uint32_t round = me->round + 1;

		memset(me, 0, sizeof(*me));
		me->round = round;
	}
	return true;
}

static EsPosition
compute_horizon(const HorizonWorld *w)
{
	EsSnapshot s = snapshot_of(w);
	bool	   committed[MAX_WRITERS];

	for (int i = 0; i < setup.nwriters; i++)
		committed[i] = w->read_committed[i] != 0;
	return es_horizon(&s, w->read_counter, w->read_slots, committed, (uint32_t) setup.nwriters, w->read_ring,
					  (uint32_t) w->read_nring, &w->read_overflow);
}

static void
read_slot(HorizonWorld *w, int i)
{
	w->read_slots[i] = w->slots[i];
	w->read_committed[i] = w->slots[i].fxid != 0 && transaction_of(w, w->slots[i].fxid)->outcome == 1;
}

static void
read_ring(HorizonWorld *w)
{
	memcpy(w->read_ring, w->ring, sizeof(w->ring));
	w->read_nring = w->nring;
	w->read_overflow = w->overflow;
}

/* Snapshot, then counter, each slot, the ring, one step each. */
static bool
step_reader(HorizonWorld *w)
{
	int n = setup.nwriters;
	int at = (int) w->reader_steps - 1;

	if (!setup.reader || w->horizon != 0)
		return false;
	w->reader_steps++;
	if (at == -1)
	{
		take_snapshot(w);
		return true;
	}
	switch (setup.broken)
	{
		case RING_BEFORE_SLOTS:
			if (at == 0)
				w->read_counter = w->counter;
			else if (at == 1)
				read_ring(w);
			else
				read_slot(w, at - 2);
			break;
		case SLOTS_BEFORE_COUNTER:
			if (at < n)
				read_slot(w, at);
			else if (at == n)
				w->read_counter = w->counter;
			else
				read_ring(w);
			break;
		default:
			if (at == 0)
				w->read_counter = w->counter;
			else if (at <= n)
				read_slot(w, at - 1);
			else
				read_ring(w);
	}
	if (at == n + 1)
		w->horizon = compute_horizon(w);
	return true;
}

static bool
step_horizon_world(void *world, int actor)
{
	HorizonWorld *w = world;

	if (actor < setup.nwriters)
		return step_writer(w, actor);
	if (actor == setup.nwriters)
		return step_reader(w);
	if (!setup.other || w->other_steps == (setup.other_stays ? 1 : 2))
		return false;
	if (w->other_steps++ == 0)
		begin_xid(w, &w->transactions[MAX_WRITERS * 2]);
	else
		end_xid(w, w->transactions[MAX_WRITERS * 2].xid, true);
	return true;
}

static bool
visit_horizon_world(const void *world, bool terminal)
{
	HorizonWorld w = *(const HorizonWorld *) world;
	EsSnapshot	 s = snapshot_of(&w);

	if (!setup.reader && terminal)
	{
		/* all writers are idle: who reads now reads everything */
		take_snapshot(&w);
		w.read_counter = w.counter;
		for (int i = 0; i < setup.nwriters; i++)
			read_slot(&w, i);
		read_ring(&w);
		terminals++;
		stuck += compute_horizon(&w) != w.counter;
	}
	if (w.horizon == 0)
		return true;
	readings++;
	held_back += w.horizon < w.read_counter;
	CHECK(w.horizon <= w.read_counter); /* so bases taken from now on are not below */
	for (int i = 0; i < setup.nwriters * setup.rounds; i++)
	{
		const Transaction *t = &w.transactions[i];
		bool			   aborts = (setup.aborting >> i) & 1;

		/* what commits below the horizon, sooner or later, is seen */
		if (t->base != 0 && t->base < w.horizon && !aborts && es_snapshot_running(&s, t->xid))
			misses++;
	}
	return false;
}

static HorizonWorld
first_world(EsFxid first_xid)
{
	HorizonWorld w = {.next = first_xid, .counter = 1, .latest_completed = first_xid - 1};

	while ((uint32_t) w.latest_completed < FIRST_XID)
		w.latest_completed--;
	return w;
}

/* Explores the setup, with each pattern of aborts if wanted; returns the number of worlds. */
static size_t
run_horizon(EsFxid first_xid, bool with_aborts)
{
	size_t	 worlds = 0;
	unsigned patterns = with_aborts ? 1u << (setup.nwriters * setup.rounds) : 1;

	misses = stuck = terminals = readings = held_back = 0;
	for (setup.aborting = 0; setup.aborting < patterns; setup.aborting++)
	{
		HorizonWorld w = first_world(first_xid);

		worlds += explore_from(&w, sizeof(w), setup.nwriters + 2, step_horizon_world, visit_horizon_world);
	}
	return worlds;
}

static void
set_up(Breakage broken, int nwriters, int rounds, int ring_size, bool other, bool reader)
{
	memset(&setup, 0, sizeof(setup));
	setup.broken = broken;
	setup.nwriters = nwriters;
	setup.rounds = rounds;
	setup.ring_size = ring_size;
	setup.other = other;
	setup.reader = reader;
}

/* Xids far from the end of an epoch, and such that it ends at each of the first ones. */
static const EsFxid first_xids[] = {1000, UINT64_C(0xfffffffd), UINT64_C(0xfffffffe), UINT64_C(0xffffffff),
									UINT64_C(0x100000003)};

#define for_each_first_xid(i) for (size_t i = 0; i < sizeof(first_xids) / sizeof(first_xids[0]); i++)

static void
test_horizon_safe(void)
{
	PROMISE("no reader misses an event below its horizon, in any interleaving of two writers");
	/* two transactions each: slots are used again, the ring overflows */
	set_up(CORRECT, 2, 2, 1, false, true);
	CHECK(run_horizon(1000, false) > 1000000);
	CHECK(misses == 0 && readings > 100000 && held_back > 100000);

	/* one each and somebody else's xid, where an epoch of xids ends; and all patterns of aborts */
	for_each_first_xid(i) for (int ring = 1; ring <= 2; ring++)
	{
		set_up(CORRECT, 2, 1, ring, true, true);
		CHECK(run_horizon(first_xids[i], i == 0 && ring == 1) > 10000);
		CHECK(misses == 0 && readings > 1000 && held_back > 1000);
	}
}

static void
test_horizon_random(void)
{
	PROMISE("nor in random ones of three writers, two transactions each, some of which abort");
	set_up(CORRECT, 3, 2, 1, true, true);
	misses = readings = held_back = 0;
	for (int i = 0; i < 300000; i++)
	{
		HorizonWorld w = first_world(first_xids[rnd_below(sizeof(first_xids) / sizeof(first_xids[0]))]);
		Explorer	 e = {
				.nactors = setup.nwriters + 2, .step = step_horizon_world, .visit = visit_horizon_world};

		setup.ring_size = 1 + (int) rnd_below(MAX_RING);
		setup.aborting = (unsigned) (rnd() & rnd() & 63);
		/* writers first, or the reader would mostly be done before they begin */
		for (uint64_t n = rnd_below(30); n > 0; n--)
			step_writer(&w, (int) rnd_below(3));
		wander(&e, &w);
	}
	CHECK(misses == 0 && readings == 300000 && held_back > 100000);
}

static void
test_horizon_advances(void)
{
	PROMISE("when all writers are idle the horizon is the counter, however small the ring");
	for_each_first_xid(i) for (int ring = 1; ring <= 3; ring++)
	{
		set_up(CORRECT, 2, 2, ring, false, false);
		run_horizon(first_xids[i], i == 0 && ring == 1);
		CHECK(stuck == 0 && terminals > 100);
	}

	PROMISE(
		"also while a transaction elsewhere stays open, if the ring holds more entries than there are writers");
	for_each_first_xid(i)
	{
		set_up(CORRECT, 2, 2, 3, true, false);
		setup.other_stays = true;
		run_horizon(first_xids[i], false);
		CHECK(stuck == 0 && terminals > 100);
	}
	/* the condition is not there for nothing */
	setup.ring_size = 1;
	run_horizon(1000, false);
	CHECK(stuck > 0);
}

static void
test_horizon_orders(void)
{
	static const Breakage broken[] = {RESERVE_BEFORE_SLOT, CLEAR_BEFORE_PUSH,	 PUSH_BEFORE_COMMIT,
									  RING_BEFORE_SLOTS,   SLOTS_BEFORE_COUNTER, NO_OVERFLOW};

	PROMISE("each order that the horizon's rules ask for is needed: without it a reader misses events");
	for (size_t i = 0; i < sizeof(broken) / sizeof(broken[0]); i++)
	{
		set_up(broken[i], 2, 1, 1, true, true);
		run_horizon(1000, false);
		if (!CHECK(misses > 0))
			printf("# breakage %d does no harm\n", (int) broken[i]);
	}
}

/* ---- the restart LSN ---- */

#define MAX_BACKENDS 2
#define MESSAGES	 2 /* per backend */

typedef enum RestartBreakage
{
	RESTART_CORRECT,
	FLOORS_BEFORE_FLUSHED,
	QUEUES_BEFORE_FLOORS,
	FLOOR_AFTER_LOG,
	CLEAR_BEFORE_SEND
} RestartBreakage;

static RestartBreakage restart_broken;

typedef enum BackendStep
{
	B_READ_FLUSHED,
	B_FLOOR,
	B_LOG,
	B_SEND,
	B_CLEAR,
	B_STEPS
} BackendStep;

typedef struct Message
{
	EsLsn	 start; /* 0 = not logged */
	EsLsn	 end;
	uint32_t sent;
	uint32_t known; /* by the shard */
	uint64_t durable;
} Message;

typedef struct RestartWorld
{
	EsLsn	 insert;
	EsLsn	 flushed;
	EsLsn	 floors[MAX_BACKENDS];
	EsLsn	 saw_flushed[MAX_BACKENDS];
	uint32_t steps[MAX_BACKENDS];
	uint32_t message[MAX_BACKENDS]; /* number of the one at hand */
	Message	 messages[MAX_BACKENDS][MESSAGES];

	/* the shard */
	uint32_t shard_steps;
	uint32_t rounds; /* restart LSNs computed */
	EsLsn	 read_flushed;
	EsLsn	 read_floors[MAX_BACKENDS];
	EsLsn	 restart_lsn;
} RestartWorld;

static unsigned lost; /* messages in front of restart_lsn that are nowhere else */
static unsigned went_back;
static unsigned advanced;

static bool
step_backend(RestartWorld *w, int i)
{
	static const BackendStep orders[][B_STEPS] = {
		{B_READ_FLUSHED, B_FLOOR, B_LOG, B_SEND, B_CLEAR},
		{B_READ_FLUSHED, B_LOG, B_FLOOR, B_SEND, B_CLEAR},
		{B_READ_FLUSHED, B_FLOOR, B_LOG, B_CLEAR, B_SEND},
	};
	int		 order = restart_broken == FLOOR_AFTER_LOG ? 1 : restart_broken == CLEAR_BEFORE_SEND ? 2 : 0;
	Message *m;

	if (w->message[i] == MESSAGES)
		return false;
	m = &w->messages[i][w->message[i]];
	switch (orders[order][w->steps[i]])
	{
		case B_READ_FLUSHED:
			w->saw_flushed[i] = w->flushed;
			break;
		case B_FLOOR:
			w->floors[i] = w->saw_flushed[i];
			break;
		case B_LOG:
			m->start = w->insert;
			m->end = w->insert += 10;
			break;
		case B_SEND:
			m->sent = 1;
			break;
		case B_CLEAR:
			w->floors[i] = 0;
			break;
		case B_STEPS:
			break;
	}
	if (++w->steps[i] == B_STEPS)
	{
		w->steps[i] = 0;
		w->message[i]++;
	}
	return true;
}

static void
drain(RestartWorld *w, int i)
{
	for (int k = 0; k < MESSAGES; k++)
		w->messages[i][k].known |= w->messages[i][k].sent;
}

static bool
step_shard(RestartWorld *w)
{
	EsLsn	 oldest = 0;
	uint32_t at = w->shard_steps;
	EsLsn	 before = w->restart_lsn;

	if (w->rounds == 2)
		return false;
	/* F, each floor, each queue, as the setup orders them */
	if (restart_broken == FLOORS_BEFORE_FLUSHED && at <= MAX_BACKENDS)
		at = at == MAX_BACKENDS ? 0 : at + 1;
	else if (restart_broken == QUEUES_BEFORE_FLOORS && at >= 1)
		at = at <= MAX_BACKENDS ? at + MAX_BACKENDS : at - MAX_BACKENDS;
	if (at == 0)
		w->read_flushed = w->flushed;
	else if (at <= MAX_BACKENDS)
		w->read_floors[at - 1] = w->floors[at - 1];
	else
		drain(w, (int) at - MAX_BACKENDS - 1);
	if (++w->shard_steps <= 2 * MAX_BACKENDS)
		return true;

	for (int i = 0; i < MAX_BACKENDS; i++)
		for (int k = 0; k < MESSAGES; k++)
		{
			const Message *m = &w->messages[i][k];

			if (m->known && !m->durable && (oldest == 0 || m->start < oldest))
				oldest = m->start;
		}
	w->restart_lsn = es_restart_lsn(before, w->read_flushed, w->read_floors, MAX_BACKENDS, oldest);
	went_back += w->restart_lsn < before;
	w->shard_steps = 0;
	w->rounds++;
	w->read_flushed = 0;
	memset(w->read_floors, 0, sizeof(w->read_floors));
	return true;
}

/* What the shard knows and PostgreSQL's WAL is flushed past goes to the shard's files. */
static bool
step_durable(RestartWorld *w)
{
	for (int i = 0; i < MAX_BACKENDS; i++)
		for (int k = 0; k < MESSAGES; k++)
		{
			Message *m = &w->messages[i][k];

			if (m->known && !m->durable && m->end <= w->flushed)
			{
				m->durable = 1;
				return true;
			}
		}
	return false;
}

static bool
step_restart_world(void *world, int actor)
{
	RestartWorld *w = world;

	if (actor < MAX_BACKENDS)
		return step_backend(w, actor);
	if (actor == MAX_BACKENDS)
		return step_shard(w);
	if (actor == MAX_BACKENDS + 1)
		return step_durable(w);
	if (w->flushed == w->insert)
		return false;
	w->flushed = w->insert;
	return true;
}

static bool
visit_restart_world(const void *world, bool terminal)
{
	const RestartWorld *w = world;

	(void) terminal;
	advanced += w->restart_lsn > 100;
	for (int i = 0; i < MAX_BACKENDS; i++)
		for (int k = 0; k < MESSAGES; k++)
			lost += w->messages[i][k].start != 0 && !w->messages[i][k].durable &&
					w->messages[i][k].start < w->restart_lsn;
	return true;
}

static void
run_restart(RestartBreakage broken)
{
	RestartWorld w = {.insert = 100, .flushed = 100, .restart_lsn = 100};

	lost = went_back = advanced = 0;
	restart_broken = broken;
	explore_from(&w, sizeof(w), MAX_BACKENDS + 3, step_restart_world, visit_restart_world);
}

static void
test_restart_lsn(void)
{
	PROMISE(
		"a message that is not durable in the shard's files starts at or behind restart_lsn, which moves on and never back");
	run_restart(RESTART_CORRECT);
	CHECK(lost == 0 && went_back == 0 && advanced > 1000);

	PROMISE("each order that restart_lsn's rules ask for is needed: without it a message is lost");
	for (int i = FLOORS_BEFORE_FLUSHED; i <= CLEAR_BEFORE_SEND; i++)
	{
		run_restart((RestartBreakage) i);
		if (!CHECK(lost > 0))
			printf("# breakage %d does no harm\n", i);
	}

	PROMISE("restart_lsn is the least of what it is given, zeros left out, and not below the previous one");
	CHECK(es_restart_lsn(0, 500, NULL, 0, 0) == 500);
	CHECK(es_restart_lsn(0, 500, (EsLsn[]){0, 300, 0, 400}, 4, 0) == 300);
	CHECK(es_restart_lsn(0, 500, (EsLsn[]){0, 300}, 2, 200) == 200);
	CHECK(es_restart_lsn(0, 500, (EsLsn[]){0, 600}, 2, 700) == 500);
	CHECK(es_restart_lsn(450, 500, (EsLsn[]){0, 300}, 2, 200) == 450);
}

/* ---- visibility ---- */

static void
test_snapshot(void)
{
	PROMISE(
		"a snapshot's running transactions are those of its list and all from xmax on, but never its own");
	for (int round = 0; round < 2000; round++)
	{
		EsFxid	   xip[20];
		uint64_t   in_list = 0;
		EsSnapshot s = {.xmin = 1000 + rnd_below(20), .xip = xip};

		s.xmax = s.xmin + rnd_below(60);
		for (EsFxid x = s.xmin; x < s.xmax && s.nxip < 20; x++)
			if (rnd_below(3) == 0)
			{
				in_list |= UINT64_C(1) << (x - s.xmin);
				xip[s.nxip++] = x;
			}
		s.own = rnd_below(2) ? s.xmin + rnd_below(70) : 0;
		for (EsFxid x = 990; x < 1100; x++)
		{
			bool running = x >= s.xmax || (x >= s.xmin && (in_list >> (x - s.xmin) & 1));
			bool all_visible = true;

			if (x == s.own)
				running = false;
			CHECK(es_snapshot_running(&s, x) == running);
			CHECK(es_row_visibility(&s, x, ES_VERDICT_COMMITTED) == (running ? ES_INVISIBLE : ES_VISIBLE));
			CHECK(es_row_visibility(&s, x, ES_VERDICT_ABORTED) == ES_INVISIBLE);
			CHECK(es_row_visibility(&s, x, ES_VERDICT_UNKNOWN) == (running ? ES_INVISIBLE : ES_ASK_VERDICT));

			for (EsFxid y = 990; y <= x; y++)
				all_visible = all_visible && !(y >= s.xmax || (y >= s.xmin && (in_list >> (y - s.xmin) & 1)));
			CHECK(es_all_visible(&s, x) == all_visible);
		}
	}
	CHECK(es_own_row_visible(&(EsSnapshot){.curcid = 3}, 2));
	CHECK(!es_own_row_visible(&(EsSnapshot){.curcid = 3}, 3));
}

static void
test_widen(void)
{
	PROMISE("a 32-bit xid is widened to the full xid nearest to the reference");
	for (int i = 0; i < 100000; i++)
	{
		EsFxid	reference = (rnd_below(2) ? UINT64_C(5) << 32 : UINT64_C(1) << 31) + (rnd() >> 33);
		int64_t distance = (int64_t) (rnd() >> 33) * (rnd_below(2) ? 1 : -1);
		EsFxid	full = reference + (uint64_t) distance;

		if ((uint32_t) full >= FIRST_XID)
			CHECK(es_widen_xid(reference, (uint32_t) full) == full);
	}
	CHECK(es_widen_xid(UINT64_C(0x100000005), UINT32_C(0xfffffff0)) == UINT32_C(0xfffffff0));
	CHECK(es_widen_xid(UINT64_C(0xfffffff0), 5) == UINT64_C(0x100000005));
	/* the permanent xids have no epoch, and before the first epoch is nothing */
	CHECK(es_widen_xid(UINT64_C(0x500000000), 2) == 2);
	CHECK(es_widen_xid(10, UINT32_C(0xfffffff0)) == UINT32_C(0xfffffff0));
}

int
main(void)
{
	test_snapshot();
	test_widen();
	test_horizon_safe();
	test_horizon_random();
	test_horizon_advances();
	test_horizon_orders();
	test_restart_lsn();
	return done();
}
