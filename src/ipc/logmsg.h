/*-------------------------------------------------------------------------
 *
 * logmsg.h
 *	  Writing our messages into PostgreSQL's WAL (PROTOCOL.md 1).
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_IPC_LOGMSG_H
#define ES_IPC_LOGMSG_H

#include "postgres.h"

#include "core/message.h"

/*
 * Writes a message of one or more records.  Transactional kinds (BATCH, FINISH)
 * assign the current (sub)transaction's xid first.  *start is the first byte of the first
 * record, *end the byte after the last.  Between pieces of a long message it takes
 * interrupts.  Throws on cancel, disk full in PostgreSQL's WAL is PostgreSQL's
 * PANIC as for any record.
 */
extern void es_log_message(EsMessageKind kind, EsFxid fxid, uint16 shard, const EsPart *parts, int nparts,
						   EsLsn *start, EsLsn *end);

#endif /* ES_IPC_LOGMSG_H */
