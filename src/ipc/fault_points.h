/*-------------------------------------------------------------------------
 *
 * fault_points.h
 *	  Every fault point, by module and in the order in which they are passed.
 *
 * ES_FAULT_POINT(name, flags, process): flags is 0 for ES_FAULT (kill and sleep only),
 * ES_FAULT_MAY_THROW for ES_FAULT_ERROR, ES_FAULT_MAY_FAIL for ES_FAULT_IO.
 * Included by fault.c only, with ES_FAULT_POINT defined.
 *
 *-------------------------------------------------------------------------
 */

/* ---- ipc: sending ---- */
ES_FAULT_POINT("channel-before-publish", ES_FAULT_MAY_THROW, "backend")	/* queues made, shard not told */
ES_FAULT_POINT("channel-before-attach", ES_FAULT_MAY_THROW, "backend")	/* shard told, not waited for */
ES_FAULT_POINT("channel-mid-message", ES_FAULT_MAY_THROW, "backend")	/* between pieces of a long message */
ES_FAULT_POINT("channel-before-ready", 0, "backend")	/* in the queue, ready bit not set */
ES_FAULT_POINT("log-between-pieces", ES_FAULT_MAY_THROW, "backend")

/* ---- ipc: positions and horizon ---- */
ES_FAULT_POINT("reserve-after-publish", ES_FAULT_MAY_THROW, "backend")	/* slot set, no position taken */
ES_FAULT_POINT("reserve-after-take", ES_FAULT_MAY_THROW, "backend") /* positions taken */
ES_FAULT_POINT("reserve-before-log", ES_FAULT_MAY_THROW, "backend") /* new H announced */
ES_FAULT_POINT("reserve-before-flush", ES_FAULT_MAY_THROW, "backend")	/* RESERVE logged */
ES_FAULT_POINT("reserve-after-flush", ES_FAULT_MAY_THROW, "backend")	/* RESERVE durable, H not raised */
ES_FAULT_POINT("horizon-before-push", 0, "backend") /* visible, slot set */
ES_FAULT_POINT("horizon-after-push", 0, "backend")	/* in the ring, slot still set */

/* ---- ipc: the shard's end ---- */
ES_FAULT_POINT("server-before-attach", 0, "shard")	/* a backend waits for the shard to attach */
ES_FAULT_POINT("server-before-message", 0, "shard") /* taken from the queue, not handled */

/* ---- ipc: jobs ---- */
ES_FAULT_POINT("job-after-take", ES_FAULT_MAY_THROW, "maintenance")
ES_FAULT_POINT("job-before-finish", ES_FAULT_MAY_THROW, "maintenance")

/* ---- shard: recovery ---- */
ES_FAULT_POINT("recovery-files-open", 0, "shard")	/* manifest rewritten, own WAL not read */
ES_FAULT_POINT("recovery-own-wal-read", 0, "shard")
ES_FAULT_POINT("recovery-log-open", 0, "shard") /* "not clean" is synced, MARK not logged */
ES_FAULT_POINT("recovery-reading", 0, "shard")	/* in the middle of PostgreSQL's WAL */
ES_FAULT_POINT("recovery-pg-wal-read", 0, "shard")	/* all applied, positions not recovered */

/* ---- shard: applying ---- */
ES_FAULT_POINT("arena-alloc", ES_FAULT_MAY_FAIL, "shard")	/* no shared memory */
ES_FAULT_POINT("apply-batch", 0, "shard")	/* staged, frame queued */
ES_FAULT_POINT("finish-before-frame", 0, "shard")
ES_FAULT_POINT("finish-applied", 0, "shard")	/* in the MemTable, undecided */
ES_FAULT_POINT("verdict-logged", 0, "shard")	/* RESOLVED queued */
ES_FAULT_POINT("stop-before-clean", 0, "shard") /* all durable, control block not clean */
