/*-------------------------------------------------------------------------
 *
 * fault.h
 *	  Fault points, compiled in only with ES_FAULT_POINTS (test builds).
 *
 * ES_FAULT("name") does nothing unless event_store_test's inject_fault('name', action,
 * nth) armed it; then the nth time it
 *		kill	kills this process with SIGKILL
 *		sleep	sleeps until the point is disarmed (at most 60 s)
 *		error	elog(ERROR) (only where ERROR may happen: ES_FAULT_ERROR)
 *		fatal	elog(FATAL): this process exits alone (ES_FAULT_ERROR)
 * and ES_FAULT_IO("name") returns ENOSPC or EIO to be treated as the result of the
 * system call that follows, else 0.  An action fires once, or with " always" behind it
 * ("enospc always") from the nth time on until it is disarmed.  Every point is listed
 * in fault_points.h, so that a test can walk them all.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_IPC_FAULT_H
#define ES_IPC_FAULT_H

/* What may happen at a point. */
#define ES_FAULT_MAY_THROW 0x01 /* ES_FAULT_ERROR */
#define ES_FAULT_MAY_FAIL  0x02 /* ES_FAULT_IO */

#ifdef ES_FAULT_POINTS

extern void es_fault_hit(const char *point, bool may_throw);
extern int	es_fault_io(const char *point);

#define ES_FAULT(point)		  es_fault_hit(point, false)
#define ES_FAULT_ERROR(point) es_fault_hit(point, true)
#define ES_FAULT_IO(point)	  es_fault_io(point)

/* ---- for event_store_test ---- */

typedef struct EsFaultPoint
{
	const char *name;
	int			flags;	 /* ES_FAULT_MAY_* */
	const char *process; /* which one hits it: "backend", "shard", "maintenance", "keeper" */
} EsFaultPoint;

/* All points, ended by a NULL name. */
extern const EsFaultPoint es_fault_points[];

extern void es_fault_shmem_request(void);
extern void es_fault_shmem_startup(void);

/* Arms a point, whatever it was armed with before.  ERROR if there is no such point or
 * action, or if the action may not happen there. */
extern void es_fault_arm(const char *point, const char *action, int nth);
extern void es_fault_disarm_all(void);
/* How often an armed point was passed since it was armed; 0 if it never was. */
extern uint64 es_fault_hits(const char *point);

#else

#define ES_FAULT(point)		  ((void) 0)
#define ES_FAULT_ERROR(point) ((void) 0)
#define ES_FAULT_IO(point)	  0

#endif

#endif /* ES_IPC_FAULT_H */
