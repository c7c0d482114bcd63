/*-------------------------------------------------------------------------
 *
 * tam.h
 *	  The table access method: what its files share, and what plan/ and sqlfn/
 *	  call.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_TAM_TAM_H
#define ES_TAM_TAM_H

#include "postgres.h"

#include "access/tableam.h"
#include "utils/relcache.h"

#include "core/batch.h"
#include "core/format.h"

/*
 * What the access method knows of a relation: its metapage and the shape of its
 * columns.  Kept in rd_amcache (one chunk), so valid until the next
 * relcache invalidation only: copy what must outlive a call into PostgreSQL.
 */
typedef struct EsTableInfo
{
	EsTableKey	 key;
	uint64		 serial; /* of this backend: no two that were ever made have the same */
	EsRoles		 roles;
	bool		 has_content_hash; /* there is an event_id: hidden column behind the last */
	bool		 keep_rows;		   /* AFTER ROW triggers refetch rows: the backend keeps its own */
	int			 natts;
	int			 ncols;							 /* natts, + 1 with the hidden column */
	EsColumnDesc columns[FLEXIBLE_ARRAY_MEMBER]; /* ncols; then natts bytes: hashed */
} EsTableInfo;

/* What of the column is part of the content hash? */
#define ES_HASHED_NOT \
	0 /* roles, dropped, non-immutable defaults and what is generated from them or from version */
#define ES_HASHED	   1
#define ES_HASHED_ROWS 2 /* with composite values in it */

static inline const uint8 *
es_table_hashed(const EsTableInfo *info)
{
	return (const uint8 *) &info->columns[info->ncols];
}

extern const EsTableInfo *es_table_info(Relation rel);

/* Why there are no indexes. */
#define ES_HINT_INDEX \
	"Contexts are found without an index, and scans are columnar: drop indexes before SET ACCESS METHOD, keep unique keys in a heap table, or use \"event_id\" for idempotency within a context."

extern bool es_is_event_table(Relation rel);
extern bool es_relid_is_event_table(Oid relid);

/* OID of the access method; InvalidOid if the extension is not in this database. */
extern Oid es_am_oid(void);

/* Opens a table by OID and makes sure that it is there (42P01) and an event_store table (42809). */
extern Relation es_table_open(Oid relid, LOCKMODE lockmode);

/* Roles from names and types of columns; ERROR if there is no usable context_id, or a
 * column of a type that cannot be stored. */
extern void es_roles_from_desc(TupleDesc desc, EsRoles *roles);
/* ERROR if position or version is NOT NULL. */
extern void es_check_not_null(TupleDesc desc, const EsRoles *roles);

/* ERROR if the column is not there any more. */
extern void es_check_has_context(Relation rel);

/* A rewrite fills a transient table: the one that the user knows, and its name for messages. */
extern Oid		   es_visible_relid(Relation rel);
extern const char *es_visible_name(Relation rel);

/* Metapage: written by relation_set_new_filelocator with a fresh storage id. */
extern void es_metapage_create(Relation rel, void *newrlocator, char persistence);

/* The transaction made a storage or dropped an event table: when it ends, either way, some storage
 * may be dead, and maintenance gets a hint to look. */
extern bool es_storages_changed;

/* A new storage in the same file, for TRUNCATE of what this transaction made. */
extern void es_metapage_renew(Relation rel);

/* `to` stands for the storage of `from`, which is about to lose its file to it (VACUUM FULL). */
extern void es_metapage_copy(Relation from, Relation to);

/* Positions to TIDs and back: block = n / 65535, offset = n % 65535 + 1; the block's
 * top bit marks a row of the own transaction, n is its ordinal then. */
extern void	  es_tid_encode(ItemPointer tid, uint64 n, bool own);
extern uint64 es_tid_decode(const ItemPointerData *tid, bool *own);

/* Physical description of an attribute. */
extern EsColumnDesc es_column_desc(Form_pg_attribute att);

/* Gives an event table that becomes a heap a TOAST table: a rewrite makes one only if there was one. */
extern void es_make_toast_table(Oid relid);

extern void					 es_tam_init(void);
extern const TableAmRoutine *es_tam_routine(void);

#endif /* ES_TAM_TAM_H */
