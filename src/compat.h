/*-------------------------------------------------------------------------
 *
 * compat.h
 *	  The only place that asks for PostgreSQL's version: 15 is the floor, 18 the
 *	  newest that is tested.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_COMPAT_H
#define ES_COMPAT_H

#include "postgres.h"

#if PG_VERSION_NUM < 150000
#error "event_store needs PostgreSQL 15 or later"
#endif

#include "access/htup_details.h"
#include "access/tableam.h"
#include "access/transam.h"
#include "catalog/pg_class.h"
#include "commands/vacuum.h"
#include "common/relpath.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "replication/slot.h"
#include "storage/proc.h"
#include "storage/smgr.h"
#if PG_VERSION_NUM >= 160000
#include "storage/relfilelocator.h"
#else
#include "storage/relfilenode.h"
#endif
#include "utils/acl.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/relmapper.h"
#include "utils/timestamp.h"
#include "utils/tuplesort.h"
#include "utils/wait_event.h"

/* Names that changed in 16. */
#if PG_VERSION_NUM < 160000
typedef RelFileNode RelFileLocator;
#define rd_locator									  rd_node
#define relation_set_new_filelocator				  relation_set_new_filenode
#define RelationSetNewRelfilenumber(rel, persistence) RelationSetNewRelfilenode(rel, persistence)
typedef bool EsUpdateIndexes;
#else
typedef TU_UpdateIndexes	 EsUpdateIndexes;
#endif

/* VacuumParams became const in 18; vac_update_relstats and pgstat_report_vacuum changed in 15 … 18. */
#if PG_VERSION_NUM >= 190000
typedef const VacuumParams *EsVacuumParams;
#else
typedef struct VacuumParams *EsVacuumParams;
#endif

static inline void
es_vac_update_relstats(Relation rel, BlockNumber pages, double tuples, TransactionId frozenxid,
					   MultiXactId minmulti)
{
#if PG_VERSION_NUM >= 180000
	vac_update_relstats(rel, pages, tuples, pages, pages, false, frozenxid, minmulti, NULL, NULL, false);
#else
	vac_update_relstats(rel, pages, tuples, pages, false, frozenxid, minmulti, NULL, NULL, false);
#endif
}

static inline void
es_pgstat_report_vacuum(Relation rel, PgStat_Counter livetuples)
{
#if PG_VERSION_NUM >= 180000
	pgstat_report_vacuum(RelationGetRelid(rel), rel->rd_rel->relisshared, livetuples, 0,
						 GetCurrentTimestamp());
#else
	pgstat_report_vacuum(RelationGetRelid(rel), rel->rd_rel->relisshared, livetuples, 0);
#endif
}

/* ExecutorRun_hook; 18 has no execute_once. */
#if PG_VERSION_NUM >= 180000
#define ES_EXECUTOR_RUN_PARAMS QueryDesc *query, ScanDirection direction, uint64 count
#define ES_EXECUTOR_RUN_ARGS   query, direction, count
#else
#define ES_EXECUTOR_RUN_PARAMS QueryDesc *query, ScanDirection direction, uint64 count, bool execute_once
#define ES_EXECUTOR_RUN_ARGS   query, direction, count, execute_once
#endif

/* tuplesort_getdatum of a by-value type, forward; 16 asks whether to copy. */
static inline bool
es_tuplesort_getdatum(Tuplesortstate *sort, Datum *value, bool *is_null)
{
#if PG_VERSION_NUM >= 160000
	return tuplesort_getdatum(sort, true, false, value, is_null, NULL);
#else
	return tuplesort_getdatum(sort, true, value, is_null, NULL);
#endif
}

/* heap_form_minimal_tuple; 18 asks for room in front of it. */
static inline MinimalTuple
es_form_minimal_tuple(TupleDesc desc, Datum *values, bool *isnull)
{
#if PG_VERSION_NUM >= 180000
	return heap_form_minimal_tuple(desc, values, isnull, 0);
#else
	return heap_form_minimal_tuple(desc, values, isnull);
#endif
}

/* 18 has pg_noreturn, which stands elsewhere in a declaration. */
#if PG_VERSION_NUM >= 180000
#define pg_attribute_noreturn() __attribute__((noreturn))
#endif

/* Number of a PGPROC in the array of all of them. */
static inline int
es_proc_number(PGPROC *proc)
{
#if PG_VERSION_NUM >= 170000
	return GetNumberFromPGProc(proc);
#else
	return proc->pgprocno;
#endif
}

/*
 * latestCompletedXid, widened.  It is changed under ProcArrayLock only, but a
 * 64-bit load is atomic and our callers need no more than "at least what it was when
 * my own transaction ended", so they take no lock that every commit wants.
 */
static inline uint64
es_latest_completed_fxid(void)
{
#if PG_VERSION_NUM >= 170000
	return ((volatile TransamVariablesData *) TransamVariables)->latestCompletedXid.value;
#else
	return ((volatile VariableCacheData *) ShmemVariableCache)->latestCompletedXid.value;
#endif
}

/*
 * Wait events of our own in pg_stat_activity; before 17 an extension has but
 * one name, "Extension".  `cache` is a static variable of the caller, 0 at first.
 */
static inline uint32
es_wait_event(uint32 *cache, const char *name)
{
#if PG_VERSION_NUM >= 170000
	if (*cache == 0)
		*cache = WaitEventExtensionNew(name);
	return *cache;
#else
	(void) cache;
	(void) name;
	return PG_WAIT_EXTENSION;
#endif
}

/* CLOG has nothing of xids before this one.  Caller holds XactTruncationLock. */
static inline TransactionId
es_oldest_clog_xid(void)
{
#if PG_VERSION_NUM >= 170000
	return TransamVariables->oldestClogXid;
#else
	return ShmemVariableCache->oldestClogXid;
#endif
}

/* A WaitEventSet that lives as long as the process. */
static inline WaitEventSet *
es_create_wait_event_set(int nevents)
{
#if PG_VERSION_NUM >= 170000
	return CreateWaitEventSet(NULL, nevents);
#else
	return CreateWaitEventSet(TopMemoryContext, nevents);
#endif
}

/* Does the current user own the table? */
static inline bool
es_owns_relation(Oid relid)
{
#if PG_VERSION_NUM >= 160000
	return object_ownercheck(RelationRelationId, relid, GetUserId());
#else
	return pg_class_ownercheck(relid, GetUserId());
#endif
}

/* ---- files of databases that the session is not connected to ---- */

static inline RelFileLocator
es_pg_class_locator(Oid database, Oid tablespace)
{
	char		  *path = GetDatabasePath(database, tablespace);
	RelFileLocator locator;

#if PG_VERSION_NUM >= 160000
	locator.spcOid = tablespace;
	locator.dbOid = database;
	locator.relNumber = RelationMapOidToFilenumberForDatabase(path, RelationRelationId);
#else
	locator.spcNode = tablespace;
	locator.dbNode = database;
	locator.relNode = RelationMapOidToFilenodeForDatabase(path, RelationRelationId);
#endif
	pfree(path);
	return locator;
}

static inline BlockNumber
es_nblocks(RelFileLocator locator)
{
#if PG_VERSION_NUM >= 170000
	SMgrRelation smgr = smgropen(locator, INVALID_PROC_NUMBER);
#else
	SMgrRelation smgr = smgropen(locator, InvalidBackendId);
#endif
	BlockNumber n = smgrnblocks(smgr, MAIN_FORKNUM);

	smgrclose(smgr);
	return n;
}

/* Path of a table's file, in the data directory; 18 gives it back by value. */
static inline char *
es_relation_path(Relation rel)
{
#if PG_VERSION_NUM >= 180000
	return pstrdup(relpathperm(rel->rd_locator, MAIN_FORKNUM).str);
#else
	return relpathperm(rel->rd_locator, MAIN_FORKNUM);
#endif
}

/* ---- replication slots ---- */

static inline void
es_slot_create(const char *name, ReplicationSlotPersistency persistency)
{
#if PG_VERSION_NUM >= 170000
	ReplicationSlotCreate(name, false, persistency, false, false, false);
#else
	ReplicationSlotCreate(name, false, persistency, false);
#endif
}

/* ERROR if another process holds it. */
static inline void
es_slot_acquire(const char *name)
{
#if PG_VERSION_NUM >= 180000
	ReplicationSlotAcquire(name, true, false);
#else
	ReplicationSlotAcquire(name, true);
#endif
}

/* Does the slot keep no WAL any more (max_slot_wal_keep_size), or not yet? */
static inline bool
es_slot_is_lost(const ReplicationSlot *slot)
{
#if PG_VERSION_NUM >= 160000
	if (slot->data.invalidated != RS_INVAL_NONE)
		return true;
#endif
	return XLogRecPtrIsInvalid(slot->data.restart_lsn);
}

#endif /* ES_COMPAT_H */
