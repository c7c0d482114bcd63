/*-------------------------------------------------------------------------
 *
 * xact.h
 *	  A transaction's events in the backend: batches being filled, logged and
 *	  sent; savepoints; the commit protocol (PROTOCOL.md 2 and 3).
 *
 * xact.c	state of the transaction, inserting, savepoints
 * send.c	logging and sending batches
 * commit.c	PRE_COMMIT, COMMIT, ABORT
 * locks.c	context locks
 * given.c	positions that rows bring along
 * own.c	rows of the own transaction per context
 * dead.c	dead batches, for scans (dead.h)
 * kept.c	rows that triggers come back for
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_TAM_XACT_H
#define ES_TAM_XACT_H

#include "postgres.h"

#include "executor/tuptable.h"
#include "lib/ilist.h"
#include "utils/relcache.h"

#include "core/batch.h"
#include "core/message.h"
#include "ipc/protocol.h"
#include "tam/tam.h"

#define ES_BATCH_TARGET	   (48 * 1024) /* bytes at which a batch leaves the backend */
#define ES_INLINE_LIMIT	   (64 * 1024) /* bytes of batches that FINISH carries itself */
#define ES_LOCK_SLOTS	   16383	   /* context lock slots 1 … 16383; 0 is the gate */
#define ES_TABLE_MAX_SLOTS 16
#define ES_XACT_MAX_SLOTS  256

/* A batch that left its builder. */
typedef struct EsXactBatch
{
	dlist_node		 node;	/* in EsXactTable.pending, then .batches; in both in the order of
								 * ordinals per shard */
	EsLsn			 start; /* if logged */
	EsLsn			 end;
	char			*bytes; /* until it is sent */
	uint32			 size;
	uint32			 nrows;
	SubTransactionId subid;
	SubTransactionId newest; /* highest subid of its list up to here, at least */
	uint8			 shard;
	bool			 dead; /* its subtransaction was rolled back */
	bool			 logged;
	bool			 sent;
} EsXactBatch; /* 64 bytes: one stays until COMMIT for each savepoint that wrote */

StaticAssertDecl(sizeof(EsXactBatch) <= 64 && ES_MAX_SHARDS <= PG_UINT8_MAX &&
					 ES_BATCH_MAX_BYTES <= PG_UINT32_MAX,
				 "a batch that was sent takes little memory");

/* Rows of the own transaction in a context, for versions that append() promises. */
typedef struct EsOwnCount
{
	SubTransactionId subid;
	int32			 rows;	 /* negative: append() has found out that so many are not taken */
	int32			 unsure; /* rows with event ids that no append() has looked for */
} EsOwnCount;

typedef struct EsOwnContext
{
	uint64		hash;
	uint64		changes; /* grows with each row, whatever is rolled back */
	uint32		ncounts;
	uint32		allocated;
	EsOwnCount *counts;
} EsOwnContext;

/* A storage that the transaction has inserted into. */
typedef struct EsXactTable
{
	dlist_node		 node;
	EsTableKey		 key;
	Oid				 relid;
	uint64			 serial; /* of the EsTableInfo that roles and columns were taken from */
	EsRoles			 roles;
	int				 natts;
	int				 ncols;
	EsColumnDesc	*columns;
	SubTransactionId created; /* subtransaction of its first row (for nothing but debugging) */

	EsBatchBuilder	**builders; /* per shard; NULL = never used */
	SubTransactionId *builder_subids;
	dlist_head		  pending; /* EsXactBatch: closed, not logged */
	dlist_head		  batches; /* EsXactBatch: logged */
	uint32			 *ndead;   /* per shard: dead batches that were sent */

	bool			 given;			 /* some rows come with positions (restore, rewrite) */
	bool			 assigned;		 /* some do not */
	bool			 given_versions; /* those that come with positions come with versions, too */
	EsPosition		 given_lowest;
	EsPosition		 given_highest;
	SubTransactionId given_subid; /* of the first such row; valid if given */
	SubTransactionId assigned_subid;
	struct EsGiven	*positions; /* given ones (given.c), or NULL */
	bool			 unchecked; /* some row has an expected version or an event id that no
								 * append() has checked under the lock */

	/* context locks, for tables with version or event_id */
	bool			 locking;
	bool			 big; /* more contexts than slots: takes the gate instead */
	SubTransactionId big_subid;
	uint64			*slot_bitmap; /* ES_LOCK_SLOTS + 1 bits; NULL unless big */
	uint32			 nslots;
	uint16			 slots[ES_TABLE_MAX_SLOTS];
	SubTransactionId slot_subids[ES_TABLE_MAX_SLOTS]; /* that noted them first */
	uint32			 ncontexts;
	EsOwnContext	 contexts[ES_TABLE_MAX_SLOTS];

	struct EsKeptRows *kept; /* rows for AFTER ROW triggers (kept.c), or NULL */
} EsXactTable;

typedef struct EsXact
{
	MemoryContext context;
	EsFxid		  fxid;
	uint64		  next_ordinal;
	dlist_head	  tables;
	uint32		  ntables;
	Size		  pending_bytes; /* batches that are closed and not logged */
	uint32		  nunsent;		 /* logged and not sent */
	uint32		  nslots;		 /* context slots in all tables */
	uint32		  shards_used;	 /* bit = something was sent there */
	bool		  finished;		 /* FINISH is logged: no more inserts */
	bool		  has_slot;		 /* horizon slot is published */
} EsXact;

extern EsXact *es_xact; /* NULL = no events in this transaction */

/* ---- xact.c ---- */

extern void es_xact_init(void); /* callbacks; from es_tam_init */

/*
 * What append() has checked under the context's lock before it inserts: the first row
 * of this table and context with this version needs no PREPARE.  If it has an event id that append() has not
 * looked for, append() does so behind it.
 */
typedef struct EsPromise
{
	bool		 active;
	bool		 probe; /* append() rolls the row back: it wants to know its content only */
	Oid			 relid;
	uint64		 hash;
	int64		 head;	   /* version of the context before the transaction */
	int64		 version;  /* 0 = none is given; triggers that append to the context raise it */
	int			 depth;	   /* of triggers */
	const uint8 *event_id; /* NULL = none */

	uint32 own_rows; /* of the transaction in the context, before */

	/* the row that came */
	bool   inserted;
	uint64 ordinal;
	bool   look_again;			/* is its event id there already? */
	uint8  row_id[ES_UUID_LEN]; /* if look_again */
	uint64 changes;				/* of the context, with it */
	uint64 content[2];			/* hash of its content, if it has an event id */
} EsPromise;

extern EsPromise es_promise;

/* Inserts a row.  `checked`: it is a copy of a row that was checked once (rewrites).  Returns its
 * ordinal; sets slot->tts_tid and tts_tableOid. */
extern uint64 es_xact_insert(Relation rel, TupleTableSlot *slot, CommandId cid, bool checked);

/* Content hash of a row of the table (16 bytes), as es_xact_insert stores it. */
extern void es_content_hash(Relation rel, TupleTableSlot *slot, uint64 result[2]);

/* The same of values as es_batch_add takes them (content.c). */
extern void es_hash_content(TupleDesc desc, const EsTableInfo *info, const EsColumnDesc *columns,
							const void *const *values, uint64 result[2]);
/* Has a value of the type composite values in it?  (Those in ranges are not looked at.) */
extern bool es_type_has_rows(Oid type);

extern EsXactTable *es_xact_table(const EsTableKey *key); /* NULL if nothing was inserted */
extern EsXactTable *es_xact_table_get(Relation rel);

/* Full xid of the own transaction if it has events, else 0 (for scans); works in
 * parallel workers too. */
extern EsFxid es_xact_own_fxid(void);

/*
 * Before the transaction's own scan of a table: logs and sends what is pending.
 */
extern void es_xact_send_table(const EsTableKey *key);
/* Before a parallel plan: all tables. */
extern void es_xact_send_all(void);

/* ---- own.c ---- */

extern EsOwnContext *es_xact_context(EsXactTable *t, uint64 hash); /* NULL: beyond the limit */
/* Rows of the transaction that will be taken, but for those with event ids that nobody has looked for. */
extern uint32 es_own_rows(const EsOwnContext *c);
extern uint32 es_own_unsure(const EsOwnContext *c);
/* `unsure` of them have been looked for, under the context's lock: so many are not taken. */
extern void es_own_settle(EsXactTable *t, EsOwnContext *c, uint32 unsure, uint32 not_taken);
/* Rows of the current subtransaction come in. */
extern void es_own_count(EsOwnContext *c, int32 rows, int32 unsure);

/* ---- send.c ---- */

extern void es_close_builder(EsXactTable *t, int shard); /* builder -> EsXactBatch */
extern void es_send_shard(EsXactTable *t, int shard);	 /* all that is pending for it */
extern void es_send_pending(void);						 /* all that is closed, for all shards */
extern void es_send_unsent(void);						 /* logged ones that an ERROR kept from being sent */
extern void es_send_wait_writable(int shard);			 /* before anything is logged for it */
extern void es_floor_set(void);
extern void es_floor_clear(void);

/* ---- locks.c ---- */

extern uint16 es_lock_slot_of(uint64 context_hash); /* 1 … ES_LOCK_SLOTS */

/*
 * Statement: takes the context's lock to the end of the transaction (gate shared only
 * meanwhile).  False if the transaction has too many contexts: the check is made at COMMIT.
 */
extern bool es_lock_context(EsXactTable *t, uint64 context_hash);
extern void es_note_context(EsXactTable *t, uint64 context_hash); /* at insert */
/* Subtransaction subid and all that began after it are rolled back, with their locks.  Does not throw. */
extern void es_locks_rollback(EsXactTable *t, SubTransactionId subid);
extern void es_lock_precommit(void); /* all contexts of the transaction */

/* ---- commit.c ---- */

extern void es_xact_precommit(void);
/* ERROR unless the positions given so far are above all that the table holds. */
extern void es_check_given(const EsXactTable *t);
extern void es_xact_commit(void);
extern void es_xact_abort(void);

/* ---- given.c ---- */

/* A row of a table with the position role: throws if it must not come here. */
extern void es_given_note(EsXactTable *t, Relation rel, bool given, int64 position, bool has_version);
/* Subtransaction subid and all that began after it are rolled back.  Does not throw. */
extern void es_given_rollback(EsXactTable *t, SubTransactionId subid);
/* Throws if a position was given twice.  At PRE_COMMIT: no row may be noted behind it. */
extern void es_given_check_unique(const EsXactTable *t);
extern void es_given_free(EsXactTable *t); /* in the callbacks of COMMIT and ABORT; does not throw */

/* ---- kept.c: the backend's own copy of rows that AFTER ROW triggers refetch ---- */

extern void es_kept_add(EsXactTable *t, uint64 ordinal, TupleTableSlot *slot);
extern bool es_kept_fetch(EsXactTable *t, uint64 ordinal, TupleTableSlot *slot);
/* As es_given_rollback: nobody will come for those rows. */
extern void es_kept_rollback(EsXactTable *t, SubTransactionId subid);
extern void es_kept_free(EsXactTable *t); /* as es_given_free */

#endif /* ES_TAM_XACT_H */
