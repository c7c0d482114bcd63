/*-------------------------------------------------------------------------
 *
 * publication.h
 *	  WARNINGs about publications, which carry no rows of event tables.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_TAM_PUBLICATION_H
#define ES_TAM_PUBLICATION_H

#include "postgres.h"

#include "nodes/primnodes.h"

/* A publication was made or changed. */
extern void es_publication_made(const char *name);

/* A table was made, became a partition, or got another access method: it, and what inherits from it. */
extern void es_publication_table_made(const RangeVar *table);

/* ALTER TABLE `table` SET SCHEMA `schema` was done. */
extern void es_publication_table_moved(const RangeVar *table, const char *schema);

#endif /* ES_TAM_PUBLICATION_H */
