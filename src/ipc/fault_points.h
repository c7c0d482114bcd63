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
ES_FAULT_POINT("channel-before-publish", ES_FAULT_MAY_THROW, "backend") /* queues made, shard not told */
ES_FAULT_POINT("channel-before-attach", ES_FAULT_MAY_THROW, "backend")	/* shard told, not waited for */
ES_FAULT_POINT("channel-mid-message", ES_FAULT_MAY_THROW, "backend")	/* between pieces of a long message */
ES_FAULT_POINT("channel-before-flush", 0, "backend") /* ready bit set, nothing in the queue yet */
ES_FAULT_POINT("log-between-pieces", ES_FAULT_MAY_THROW, "backend")

/* ---- tam: sending batches ---- */
ES_FAULT_POINT("append-before-log", ES_FAULT_MAY_THROW, "backend") /* there is room in the queue */
ES_FAULT_POINT("append-after-log", ES_FAULT_MAY_THROW, "backend")  /* logged, not sent */
ES_FAULT_POINT("append-after-send", ES_FAULT_MAY_THROW, "backend") /* sent, floor not cleared */

/* ---- tam: the end of a transaction ---- */
ES_FAULT_POINT("commit-before-locks", ES_FAULT_MAY_THROW, "backend") /* all batches are sent */
ES_FAULT_POINT("commit-after-locks", ES_FAULT_MAY_THROW, "backend")
ES_FAULT_POINT("commit-after-prepare", ES_FAULT_MAY_THROW, "backend") /* versions checked */
ES_FAULT_POINT("commit-after-reserve", ES_FAULT_MAY_THROW, "backend") /* slot set, positions taken */
ES_FAULT_POINT("commit-after-log", ES_FAULT_MAY_THROW, "backend")	  /* FINISH logged, not sent */
ES_FAULT_POINT("commit-between-sends", ES_FAULT_MAY_THROW, "backend") /* one shard has FINISH, others not */
ES_FAULT_POINT("commit-after-send", ES_FAULT_MAY_THROW, "backend")	  /* all have it; no commit record */
ES_FAULT_POINT("commit-after-commit", 0, "backend")					  /* committed, no hint sent, slot set */
ES_FAULT_POINT("abort", 0, "backend")								  /* in the abort callback */

/* ---- ipc: positions and horizon ---- */
ES_FAULT_POINT("reserve-after-publish", ES_FAULT_MAY_THROW, "backend") /* slot set, no position taken */
ES_FAULT_POINT("reserve-after-take", ES_FAULT_MAY_THROW, "backend")	   /* positions taken */
ES_FAULT_POINT("reserve-before-id", ES_FAULT_MAY_THROW, "backend")	   /* no storage id taken */
ES_FAULT_POINT("reserve-before-log", ES_FAULT_MAY_THROW, "backend")	   /* new H announced */
ES_FAULT_POINT("reserve-before-flush", ES_FAULT_MAY_THROW, "backend")  /* RESERVE logged */
ES_FAULT_POINT("reserve-after-flush", ES_FAULT_MAY_THROW, "backend")   /* RESERVE durable, H not raised */
ES_FAULT_POINT("horizon-before-push", 0, "backend")					   /* visible, slot set */
ES_FAULT_POINT("horizon-after-push", 0, "backend")					   /* in the ring, slot still set */

/* ---- ipc: the shard's end ---- */
ES_FAULT_POINT("server-between-words", 0, "shard")			/* a part of the ready bitmap is taken */
ES_FAULT_POINT("server-before-attach", 0, "shard")			/* a backend waits for the shard to attach */
ES_FAULT_POINT("server-before-message", 0, "shard")			/* taken from the queue, not handled */
ES_FAULT_POINT("server-answer", ES_FAULT_MAY_FAIL, "shard") /* no room for it, and no memory to park it */

/* ---- ipc: jobs ---- */
ES_FAULT_POINT("job-after-take", ES_FAULT_MAY_THROW, "maintenance")
ES_FAULT_POINT("job-before-finish", ES_FAULT_MAY_THROW, "maintenance")

/* ---- shard: recovery ---- */
ES_FAULT_POINT("recovery-files-open", 0, "shard") /* manifest rewritten, own WAL not read */
ES_FAULT_POINT("recovery-own-wal-read", 0, "shard")
ES_FAULT_POINT("recovery-log-open", 0, "shard")	   /* "not clean" is synced, MARK not logged */
ES_FAULT_POINT("recovery-reading", 0, "shard")	   /* in the middle of PostgreSQL's WAL */
ES_FAULT_POINT("recovery-pg-wal-read", 0, "shard") /* all applied, positions not recovered */

/* ---- shard: segment files ---- */
ES_FAULT_POINT("segment-unlink", 0, "shard")
ES_FAULT_POINT("segment-read", ES_FAULT_MAY_FAIL, "shard")

/* ---- shard: answering ---- */
ES_FAULT_POINT("scan-before-slice", ES_FAULT_MAY_THROW, "shard") /* of a scan, PREPARE or VERIFY */
ES_FAULT_POINT("prepare-before-answer", 0, "shard")				 /* checked, the backend does not know */

/* ---- shard: applying ---- */
ES_FAULT_POINT("arena-alloc", ES_FAULT_MAY_FAIL, "shard") /* no shared memory */
ES_FAULT_POINT("apply-batch", 0, "shard")				  /* staged, frame queued */
ES_FAULT_POINT("finish-before-frame", 0, "shard")
ES_FAULT_POINT("finish-applied", 0, "shard") /* in the MemTable, undecided */
ES_FAULT_POINT("verdict-asked", ES_FAULT_MAY_THROW,
			   "shard")							/* CLOG cannot be read, XactTruncationLock held */
ES_FAULT_POINT("verdict-logged", 0, "shard")	/* RESOLVED queued */
ES_FAULT_POINT("stop-before-clean", 0, "shard") /* all durable, control block not clean */

/* ---- maintenance: writing a segment ---- */
ES_FAULT_POINT("segment-create", ES_FAULT_MAY_FAIL, "maintenance")
ES_FAULT_POINT("segment-write", ES_FAULT_MAY_FAIL, "maintenance")
ES_FAULT_POINT("segment-rows-written", ES_FAULT_MAY_THROW, "maintenance") /* no footer yet */
ES_FAULT_POINT("segment-before-sync", 0, "maintenance")
ES_FAULT_POINT("segment-sync", ES_FAULT_MAY_FAIL, "maintenance")
ES_FAULT_POINT("segment-synced", 0, "maintenance")
ES_FAULT_POINT("segment-built", 0, "maintenance") /* closed, the shard not told */

/* ---- shard: from a MemTable to segments ---- */
ES_FAULT_POINT("flush-before-boundary", 0, "shard")
ES_FAULT_POINT("flush-staged-carried", 0, "shard")	 /* staged batches logged again */
ES_FAULT_POINT("flush-after-boundary", 0, "shard")	 /* passive, the next one is active */
ES_FAULT_POINT("flush-finished-carried", 0, "shard") /* undecided transactions logged again */
ES_FAULT_POINT("flush-before-post", 0, "shard")		 /* segment id taken */
ES_FAULT_POINT("flush-before-rename", 0, "shard")
ES_FAULT_POINT("flush-rename", ES_FAULT_MAY_FAIL, "shard")
ES_FAULT_POINT("flush-dir-sync", ES_FAULT_MAY_FAIL, "shard") /* a failure ends the server */
ES_FAULT_POINT("flush-before-manifest", 0, "shard")			 /* files durable, nobody names them */
ES_FAULT_POINT("flush-manifest-durable", 0, "shard")		 /* named, MemTable still there */
ES_FAULT_POINT("flush-retired", 0, "shard")

/* ---- shard: pending segments ---- */
ES_FAULT_POINT("spill-begun", 0, "shard")
ES_FAULT_POINT("spill-before-manifest", 0, "shard")
ES_FAULT_POINT("spill-manifest-durable", 0, "shard")		  /* named, batches still staged */
ES_FAULT_POINT("spill-too-large", ES_FAULT_MAY_FAIL, "shard") /* as many pending segments as may be */
ES_FAULT_POINT("spill-before-take-back", 0, "shard")		  /* named, overtaken by FINISH */
ES_FAULT_POINT("adopt-finishing", 0, "shard")				  /* a slice of FINISH, undecided */
ES_FAULT_POINT("adopt-finished", 0, "shard")				  /* FINISH applied, undecided */
ES_FAULT_POINT("adopt-before-manifest", 0, "shard")			  /* verdict durable */
ES_FAULT_POINT("adopt-manifest-durable", 0, "shard")

/* ---- dead storages ---- */
ES_FAULT_POINT("collect-between-looks", 0, "collector")
ES_FAULT_POINT("collect-before-drop", 0, "collector")
ES_FAULT_POINT("drop-before-manifest", 0, "shard")
ES_FAULT_POINT("drop-manifest-durable", 0, "shard")

/* ---- shard: own WAL ---- */
ES_FAULT_POINT("uring-setup", ES_FAULT_MAY_FAIL, "shard")
ES_FAULT_POINT("log-before-unclean", 0, "shard") /* first file made, control blocks still say clean */
ES_FAULT_POINT("log-unclean", 0, "shard")		 /* both control blocks say "not clean" */
ES_FAULT_POINT("wal-before-write", 0, "shard")	 /* a group is encoded */
ES_FAULT_POINT("wal-write", ES_FAULT_MAY_FAIL, "shard")
ES_FAULT_POINT("wal-written", 0, "shard")
ES_FAULT_POINT("sync-begun", 0, "shard") /* F and floors read, queues not drained */
ES_FAULT_POINT("sync-fixed", 0, "shard")
ES_FAULT_POINT("wal-before-sync", 0, "shard")
ES_FAULT_POINT("wal-sync", ES_FAULT_MAY_FAIL, "shard")
ES_FAULT_POINT("wal-synced", 0, "shard")		/* durable, but no control block says so */
ES_FAULT_POINT("restart-published", 0, "shard") /* files not retired */
ES_FAULT_POINT("wal-file-retired", 0, "shard")
ES_FAULT_POINT("log-before-clean", 0, "shard")
ES_FAULT_POINT("log-clean", 0, "shard")
ES_FAULT_POINT("wal-first-made", 0, "shard") /* has no name yet */
ES_FAULT_POINT("wal-first-renamed", 0, "shard")
ES_FAULT_POINT("wal-prepare-write", ES_FAULT_MAY_FAIL, "shard") /* zeros of the next file */
ES_FAULT_POINT("wal-next-filled", 0, "shard")
ES_FAULT_POINT("wal-prepare-sync", ES_FAULT_MAY_FAIL, "shard")
ES_FAULT_POINT("wal-next-renamed", 0, "shard")
ES_FAULT_POINT("wal-next-ready", 0, "shard")

/* ---- shard: control blocks ---- */
ES_FAULT_POINT("control-replaced", 0, "shard") /* one of the two at start */
ES_FAULT_POINT("control-before-write", 0, "shard")
ES_FAULT_POINT("control-write", ES_FAULT_MAY_FAIL, "shard")
ES_FAULT_POINT("control-written", 0, "shard")
ES_FAULT_POINT("control-sync", ES_FAULT_MAY_FAIL, "shard")
ES_FAULT_POINT("control-synced", 0, "shard")

/* ---- shard: manifest ---- */
ES_FAULT_POINT("manifest-before-rewrite", 0, "shard")
ES_FAULT_POINT("manifest-rewritten", 0, "shard")
ES_FAULT_POINT("manifest-before-write", 0, "shard")
ES_FAULT_POINT("manifest-write", ES_FAULT_MAY_FAIL, "shard")
ES_FAULT_POINT("manifest-written", 0, "shard")
ES_FAULT_POINT("manifest-sync", ES_FAULT_MAY_FAIL, "shard")
ES_FAULT_POINT("manifest-synced", 0, "shard")

/* ---- shard and keeper: files that are made at once ---- */
ES_FAULT_POINT("file-write", ES_FAULT_MAY_FAIL, "shard, keeper")
ES_FAULT_POINT("file-written", 0, "shard, keeper")
ES_FAULT_POINT("file-sync", ES_FAULT_MAY_FAIL, "shard, keeper")
ES_FAULT_POINT("file-synced", 0, "shard, keeper")  /* under its temporary name */
ES_FAULT_POINT("file-renamed", 0, "shard, keeper") /* directory not synced */
ES_FAULT_POINT("directory-sync", ES_FAULT_MAY_FAIL, "shard, keeper")

/* ---- shard: PostgreSQL's WAL ---- */
ES_FAULT_POINT("pgwal-message", ES_FAULT_MAY_THROW, "shard")

/* ---- keeper ---- */
ES_FAULT_POINT("store-shard-made", 0, "keeper")	 /* first start: one shard's directory is there */
ES_FAULT_POINT("store-before-file", 0, "keeper") /* all are, but no store file */
ES_FAULT_POINT("store-made", 0, "keeper")		 /* store file, but no slot */
ES_FAULT_POINT("store-shard-adopted", 0, "keeper")
ES_FAULT_POINT("slot-created", 0, "keeper")
ES_FAULT_POINT("slot-reserved", 0, "keeper")
ES_FAULT_POINT("slot-persisted", 0, "keeper")
ES_FAULT_POINT("slot-dropped", 0, "keeper") /* a lost one, new one not made */
ES_FAULT_POINT("slot-before-move", 0, "keeper")
ES_FAULT_POINT("detach-before-drop", 0, "keeper") /* store file says detached */
ES_FAULT_POINT("keeper-before-exit", 0, "keeper")
