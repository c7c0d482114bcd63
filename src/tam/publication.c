/*-------------------------------------------------------------------------
 *
 * publication.c
 *	  Publications carry no rows of event tables, because decoders do not see
 *	  events: whoever makes one for them, or makes an event table that one takes in, or moves it
 *	  there, is warned.
 *
 * Leaf partitions count, whatever table of their tree is named, and also when the publication shows
 * its root only (publish_via_partition_root).
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/namespace.h"
#include "catalog/partition.h"
#include "catalog/pg_class.h"
#include "catalog/pg_inherits.h"
#include "catalog/pg_publication.h"
#include "utils/lsyscache.h"

#include "tam/publication.h"
#include "tam/tam.h"

#define HINT "Followers read events with event_store.read_all() and wait_for_events()."

void
es_publication_made(const char *name)
{
	Publication *pub = GetPublicationByName(name, true);
	List		*relids;
	ListCell	*lc;

	if (pub == NULL)
		return;
	if (pub->alltables)
		relids = GetAllTablesPublicationRelations(false);
	else
		relids = list_concat(GetPublicationRelations(pub->oid, PUBLICATION_PART_LEAF),
							 GetAllSchemaPublicationRelations(pub->oid, PUBLICATION_PART_LEAF));
	foreach(lc, relids)
	{
		if (!es_relid_is_event_table(lfirst_oid(lc)))
			continue;
		ereport(
			WARNING,
			(errmsg("publication \"%s\" contains event_store tables, and carries none of their rows", name),
			 errhint(HINT)));
		return;
	}
}

/* Some publication that takes the table in, or InvalidOid. */
static Oid
publication_of(Oid relid)
{
	List	 *pubs = GetAllTablesPublications();
	List	 *relids = get_rel_relispartition(relid) ? get_partition_ancestors(relid) : NIL;
	ListCell *lc;

	relids = lappend_oid(relids, relid);
	foreach(lc, relids)
	{
		pubs = list_concat(pubs, GetRelationPublications(lfirst_oid(lc)));
		pubs = list_concat(pubs, GetSchemaPublications(get_rel_namespace(lfirst_oid(lc))));
	}
	return pubs == NIL ? InvalidOid : linitial_oid(pubs);
}

static void
warn_of(Oid pub, Oid relid)
{
	ereport(WARNING,
			(errmsg("publication \"%s\" takes in event_store table \"%s\", and carries none of its rows",
					get_publication_name(pub, false), get_rel_name(relid)),
			 errhint(HINT)));
}

void
es_publication_table_made(const RangeVar *table)
{
	Oid		  relid = RangeVarGetRelid(table, NoLock, true);
	char	  kind = OidIsValid(relid) ? get_rel_relkind(relid) : '\0';
	List	 *relids;
	ListCell *lc;

	if (kind != RELKIND_RELATION && kind != RELKIND_PARTITIONED_TABLE)
		return;
	relids = find_all_inheritors(relid, NoLock, NULL);
	foreach(lc, relids)
	{
		Oid pub;

		if (!es_relid_is_event_table(lfirst_oid(lc)) || !OidIsValid(pub = publication_of(lfirst_oid(lc))))
			continue;
		warn_of(pub, lfirst_oid(lc));
		return;
	}
}

void
es_publication_table_moved(const RangeVar *table, const char *schema)
{
	Oid		  schema_id = get_namespace_oid(schema, true);
	List	 *pubs = OidIsValid(schema_id) ? GetSchemaPublications(schema_id) : NIL;
	Oid		  relid = pubs != NIL ? get_relname_relid(table->relname, schema_id) : InvalidOid;
	List	 *relids;
	ListCell *lc;

	/* none with IF EXISTS */
	if (!OidIsValid(relid))
		return;
	/* partitions are taken in with their root, and stay in their own schemas */
	relids = get_rel_relkind(relid) == RELKIND_PARTITIONED_TABLE ? find_all_inheritors(relid, NoLock, NULL)
																 : list_make1_oid(relid);
	foreach(lc, relids)
	{
		if (!es_relid_is_event_table(lfirst_oid(lc)))
			continue;
		warn_of(linitial_oid(pubs), lfirst_oid(lc));
		return;
	}
}
