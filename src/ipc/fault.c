/*-------------------------------------------------------------------------
 *
 * fault.c
 *	  Fault points of test builds: which are armed lies in shared memory, so that
 *	  one session breaks another process.
 *
 * A point that is passed while nothing is armed costs a call and a load.  A killed
 * process takes the server down and with it the table: after that nothing is armed, but for
 * what the environment of the postmaster says: ES_FAULTS="point:action:nth,...", for what is
 * passed before anybody can connect.  (A test that uses it sets restart_after_crash = off.)
 *
 * A kill and a failed system call are told to the server's log, so that a test that reads it
 * tells a death that was asked for from one that was not (test/lib/EventStore/Crashes.pm).
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "ipc/fault.h"

#ifdef ES_FAULT_POINTS

#include <signal.h>
#include <sys/time.h>
#include <unistd.h>

#include "miscadmin.h"
#include "port/atomics.h"
#include "storage/ipc.h"
#include "storage/shmem.h"
#include "storage/spin.h"

#define MAX_ARMED	 32
#define NAME_LEN	 64
#define MAX_SLEEP_MS 60000

typedef enum FaultAction
{
	FAULT_NONE = 0,
	FAULT_KILL,
	FAULT_SLEEP,
	FAULT_ERROR,
	FAULT_FATAL,
	FAULT_ENOSPC,
	FAULT_EIO
} FaultAction;

static const struct
{
	const char *name;
	FaultAction action;
	int			needs; /* flag that the point must have */
} actions[] = {{"kill", FAULT_KILL, 0},
			   {"sleep", FAULT_SLEEP, 0},
			   {"error", FAULT_ERROR, ES_FAULT_MAY_THROW},
			   {"fatal", FAULT_FATAL, ES_FAULT_MAY_THROW},
			   {"enospc", FAULT_ENOSPC, ES_FAULT_MAY_FAIL},
			   {"eio", FAULT_EIO, ES_FAULT_MAY_FAIL}};

#define ES_FAULT_POINT(name, flags, process) {name, flags, process},
const EsFaultPoint es_fault_points[] = {
#include "ipc/fault_points.h"
	{NULL, 0, NULL}};
#undef ES_FAULT_POINT

typedef struct Armed
{
	char		point[NAME_LEN]; /* "" = free entry */
	FaultAction action;			 /* FAULT_NONE = it has fired; hits still count */
	bool		always;
	uint64		nth;
	uint64		hits;
} Armed;

typedef struct FaultTable
{
	pg_atomic_uint32 narmed; /* 0 = nothing to look for */
	slock_t			 mutex;	 /* guards the entries */
	Armed			 armed[MAX_ARMED];
} FaultTable;

static FaultTable *faults = NULL;

void
es_fault_shmem_request(void)
{
	RequestAddinShmemSpace(sizeof(FaultTable));
}

static void
arm_from_environment(void)
{
	const char *setting = getenv("ES_FAULTS");
	char	   *copy;
	char	   *rest = NULL;

	if (setting == NULL)
		return;
	copy = pstrdup(setting);
	for (char *item = strtok_r(copy, ",", &rest); item != NULL; item = strtok_r(NULL, ",", &rest))
	{
		char *action = strchr(item, ':');
		char *nth = action ? strchr(action + 1, ':') : NULL;

		if (nth == NULL)
			ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
							errmsg("ES_FAULTS has \"%s\" where point:action:nth should be", item)));
		*action++ = '\0';
		*nth++ = '\0';
		es_fault_arm(item, action, atoi(nth));
	}
	pfree(copy);
}

void
es_fault_shmem_startup(void)
{
	bool found;

	faults = ShmemInitStruct("event_store faults", sizeof(FaultTable), &found);
	if (!found)
	{
		memset(faults, 0, sizeof(FaultTable));
		pg_atomic_init_u32(&faults->narmed, 0);
		SpinLockInit(&faults->mutex);
		arm_from_environment();
	}
}

static Armed *
find(const char *point)
{
	for (int i = 0; i < MAX_ARMED; i++)
	{
		if (strcmp(faults->armed[i].point, point) == 0)
			return &faults->armed[i];
	}
	return NULL;
}

static FaultAction
parse_action(const char *text, bool *always, int *needs)
{
	for (int i = 0; i < (int) lengthof(actions); i++)
	{
		size_t len = strlen(actions[i].name);

		if (strncmp(text, actions[i].name, len) != 0)
			continue;
		*needs = actions[i].needs;
		*always = strcmp(text + len, " always") == 0;
		if (*always || text[len] == '\0')
			return actions[i].action;
	}
	ereport(
		ERROR,
		(errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("there is no action \"%s\"", text),
		 errhint(
			 "Actions are kill, sleep, error, fatal, enospc and eio, each also with \" always\" behind it.")));
}

static const EsFaultPoint *
known_point(const char *point)
{
	for (const EsFaultPoint *p = es_fault_points; p->name != NULL; p++)
	{
		if (strcmp(p->name, point) == 0)
			return p;
	}
	ereport(ERROR, (errcode(ERRCODE_UNDEFINED_OBJECT), errmsg("there is no fault point \"%s\"", point),
					errhint("They are listed in src/ipc/fault_points.h.")));
}

void
es_fault_arm(const char *point, const char *action_text, int nth)
{
	const EsFaultPoint *known = known_point(point);
	bool				always;
	int					needs;
	FaultAction			action = parse_action(action_text, &always, &needs);
	Armed			   *a;

	if (needs != (needs & known->flags))
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						errmsg("fault point \"%s\" cannot do \"%s\"", point, action_text)));
	if (nth < 1 || strlen(point) >= NAME_LEN)
		ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("nth must be positive")));

	SpinLockAcquire(&faults->mutex);
	a = find(point);
	if (a == NULL)
		a = find("");
	if (a != NULL)
	{
		if (a->point[0] == '\0')
			pg_atomic_fetch_add_u32(&faults->narmed, 1);
		strcpy(a->point, point);
		a->action = action;
		a->always = always;
		a->nth = nth;
		a->hits = 0;
	}
	SpinLockRelease(&faults->mutex);
	if (a == NULL)
		ereport(ERROR, (errcode(ERRCODE_INSUFFICIENT_RESOURCES),
						errmsg("%d fault points are armed already", MAX_ARMED)));
}

void
es_fault_disarm_all(void)
{
	SpinLockAcquire(&faults->mutex);
	memset(faults->armed, 0, sizeof(faults->armed));
	pg_atomic_write_u32(&faults->narmed, 0);
	SpinLockRelease(&faults->mutex);
}

uint64
es_fault_hits(const char *point)
{
	uint64 hits;
	Armed *a;

	(void) known_point(point);
	SpinLockAcquire(&faults->mutex);
	a = find(point);
	hits = a != NULL ? a->hits : 0;
	SpinLockRelease(&faults->mutex);
	return hits;
}

/* Counts the hit and says what is to be done now. */
static FaultAction
pass(const char *point)
{
	FaultAction action = FAULT_NONE;
	Armed	   *a;

	if (faults == NULL || pg_atomic_read_u32(&faults->narmed) == 0)
		return FAULT_NONE;

	SpinLockAcquire(&faults->mutex);
	a = find(point);
	if (a != NULL)
	{
		a->hits++;
		if (a->hits >= a->nth)
		{
			action = a->action;
			/* a sleeper stays armed: disarming it is what ends its sleep */
			if (!a->always && action != FAULT_SLEEP)
				a->action = FAULT_NONE;
		}
		if (action == FAULT_SLEEP && !a->always && a->hits > a->nth)
			action = FAULT_NONE;
	}
	SpinLockRelease(&faults->mutex);
	return action;
}

static bool
still_sleeping(const char *point)
{
	Armed *a;
	bool   sleeping;

	SpinLockAcquire(&faults->mutex);
	a = find(point);
	sleeping = a != NULL && a->action == FAULT_SLEEP;
	SpinLockRelease(&faults->mutex);
	return sleeping;
}

/*
 * "fault point NAME: ACTION in process PID at SECONDS" to the server's log, but once for the same in a row.
 * Straight to stderr: this may be a critical section, or the postmaster may wait for nothing else.
 */
static void
tell(const char *point, const char *action)
{
	static char	   told[NAME_LEN + 16];
	char		   what[NAME_LEN + 16];
	char		   line[NAME_LEN + 96];
	struct timeval now;
	int			   len;

	snprintf(what, sizeof(what), "%s: %s", point, action);
	if (strcmp(told, what) == 0)
		return;
	strlcpy(told, what, sizeof(told));
	gettimeofday(&now, NULL);
	len = snprintf(line, sizeof(line), "fault point %s in process %d at %ld.%06ld\n", what, MyProcPid,
				   (long) now.tv_sec, (long) now.tv_usec);
	if (write(STDERR_FILENO, line, len) != len)
	{
		/* a test will miss the line */
	}
}

static void
kill_myself(const char *point)
{
	tell(point, "kill");
	kill(MyProcPid, SIGKILL);
	pause();
}

void
es_fault_hit(const char *point, bool may_throw)
{
	switch (pass(point))
	{
		case FAULT_KILL:
			kill_myself(point);
			break;
		case FAULT_SLEEP:
			for (int ms = 0; ms < MAX_SLEEP_MS && still_sleeping(point); ms += 5)
				pg_usleep(5000);
			break;
		case FAULT_ERROR:
			if (may_throw)
				ereport(ERROR, (errcode(ERRCODE_INTERNAL_ERROR), errmsg("fault injected at \"%s\"", point)));
			break;
		case FAULT_FATAL:
			if (may_throw)
				ereport(FATAL, (errcode(ERRCODE_INTERNAL_ERROR), errmsg("fault injected at \"%s\"", point)));
			break;
		default:
			break;
	}
}

int
es_fault_io(const char *point)
{
	switch (pass(point))
	{
		case FAULT_ENOSPC:
			tell(point, "enospc");
			return ENOSPC;
		case FAULT_EIO:
			tell(point, "eio");
			return EIO;
		case FAULT_KILL:
			kill_myself(point);
			return 0;
		case FAULT_SLEEP:
			for (int ms = 0; ms < MAX_SLEEP_MS && still_sleeping(point); ms += 5)
				pg_usleep(5000);
			return 0;
		default:
			return 0;
	}
}

#endif /* ES_FAULT_POINTS */
