/*-------------------------------------------------------------------------
 *
 * logmsg.c
 *	  Writes messages into PostgreSQL's WAL (PROTOCOL.md 1).
 *
 * The record is that of pg_logical_emit_message(), made by hand for the sake of
 * two fields: the prefix has NUL bytes inside and a length of 14, which no SQL function
 * can produce, and the database is 0, so that logical decoding of any database
 * skips it.  Redo ignores it; whoever recovers needs no library.
 *
 * A message of several records is known by the start of its first.  It may
 * end half-way, by cancel or crash: a reader that does not find all of its pieces
 * forgets it, and no FINISH names it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "access/xloginsert.h"
#include "miscadmin.h"
#include "replication/message.h"
#include "utils/memutils.h"

#include "ipc/fault.h"
#include "ipc/logmsg.h"
#include "ipc/shmem.h"

/* Where a record is put together; of the process, made on first use. */
static char *record_buffer = NULL;

static XLogRecPtr
insert_record(bool transactional, char *data, size_t len)
{
	xl_logical_message record;
	char			   prefix[] = ES_MESSAGE_PREFIX; /* and one NUL more, which is not written */

	record.dbId = InvalidOid;
	record.transactional = transactional;
	record.prefix_size = ES_MESSAGE_PREFIX_LEN;
	record.message_size = len;

	XLogBeginInsert();
	XLogRegisterData((char *) &record, SizeOfLogicalMessage);
	XLogRegisterData(prefix, ES_MESSAGE_PREFIX_LEN);
	XLogRegisterData(data, len);
	return XLogInsert(RM_LOGICALMSG_ID, XLOG_LOGICAL_MESSAGE);
}

/* core/ reports by status; what can go wrong here is memory and the size. */
static void
check_status(EsStatus status)
{
	if (status == ES_OK)
		return;
	if (status == ES_ERR_TOO_LARGE)
		ereport(ERROR, (errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
						errmsg("event_store cannot write a message of 4 GB or more"),
						errhint("Write fewer events in one transaction, or smaller ones.")));
	if (status == ES_ERR_NOMEM)
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
	elog(ERROR, "event_store: message could not be built (status %d)", (int) status);
}

void
es_log_message(EsMessageKind kind, EsFxid fxid, uint16 shard, const EsPart *parts, int nparts, EsLsn *start,
			   EsLsn *end)
{
	bool			 transactional = kind == ES_MESSAGE_BATCH || kind == ES_MESSAGE_FINISH;
	EsMessageWriter *writer;

	/*
	 * The xid of the current subtransaction goes into the record, and with it into
	 * WAL: after a crash it is not handed out again.
	 */
	if (transactional)
	{
		Assert(IsTransactionState() && fxid != 0);
		(void) GetCurrentTransactionId();
	}
	if (record_buffer == NULL)
		record_buffer = MemoryContextAlloc(TopMemoryContext, ES_MESSAGE_MAX_RECORD);

	check_status(es_message_begin(&writer, kind, es_shared->store_uuid, fxid, shard, parts, nparts));
	PG_TRY();
	{
		uint32 npieces = es_message_npieces(writer);

		*start = 0;
		for (uint32 i = 0; i < npieces; i++)
		{
			size_t len;

			if (i > 0)
			{
				ES_FAULT_ERROR("log-between-pieces");
				CHECK_FOR_INTERRUPTS();
			}
			check_status(es_message_piece(writer, i, *start, record_buffer, &len));
			*end = insert_record(transactional, record_buffer, len);
			if (i == 0)
				*start = ProcLastRecPtr;
		}
	}
	PG_FINALLY();
	{
		es_message_end(writer);
	}
	PG_END_TRY();
}
