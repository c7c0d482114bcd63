/*-------------------------------------------------------------------------
 *
 * template.h
 *	  CREATE DATABASE from a template whose event tables hold rows is refused.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_TAM_TEMPLATE_H
#define ES_TAM_TEMPLATE_H

#include "postgres.h"

#include "nodes/parsenodes.h"

/* Around the statement: notes which template it names. */
extern void es_template_begin(const CreatedbStmt *stmt);
extern void es_template_end(void);

/* When the row of the new database was made, before the copy; ERROR if the template cannot be copied. */
extern void es_template_check(void);

#endif /* ES_TAM_TEMPLATE_H */
