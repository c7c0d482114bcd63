/*-------------------------------------------------------------------------
 *
 * wal.h
 *	  Codecs of a shard's own WAL (frames) and of its two control blocks.
 *
 * A WAL file "wal.<number, 8 hex digits>" has a fixed size, is zero-filled
 * ahead, begins with an ES_FRAME_FILE frame (the file's identity) and holds frames
 * one behind the other, 8-byte aligned.  The CRC of a frame covers its header
 * with crc = 0, its payload and the CRC of the frame before it; the first
 * frame of a file takes 0.  A frame may not cross a file's end: a frame larger than
 * a file's room has a file of its own size (rounded up).
 * A group of frames is written at once, padded with zeros to ES_WAL_BLOCK; the
 * next group begins on the next block, so that O_DIRECT never rewrites one.
 * A zero magic at an 8-byte boundary means: padding, go on at the next block.
 *
 *-------------------------------------------------------------------------
 */
#ifndef ES_CORE_WAL_H
#define ES_CORE_WAL_H

#include "core/format.h"

#define ES_FRAME_MAGIC		 UINT32_C(0x57425345) /* "ESBW" */
#define ES_WAL_BLOCK		 4096
#define ES_FRAME_MAX_PAYLOAD UINT32_C(0x7ffff000)

typedef enum EsFrameType
{
	ES_FRAME_FILE = 1,		  /* payload: EsWalFileHeader */
	ES_FRAME_BATCH = 2,		  /* payload: a batch */
	ES_FRAME_FINISH = 3,	  /* payload: EsSectionHeader ... */
	ES_FRAME_RESOLVED = 4,	  /* payload: EsResolved; the transaction's verdict */
	ES_FRAME_CARRY_BATCH = 5, /* a batch logged again from an older file */
	ES_FRAME_CARRY_FINISH = 6 /* a FINISH logged again from an older file */
} EsFrameType;

#define ES_FRAME_LZ4 0x01 /* payload is uint64 raw_len, then one LZ4 block */

typedef struct EsFrameHeader
{
	uint32_t magic;
	uint16_t version;
	uint8_t	 type;
	uint8_t	 flags;
	uint32_t payload_len;
	uint16_t shard;
	uint16_t reserved;
	EsOwnLsn own_lsn;  /* of this frame: must match where it stands */
	EsLsn	 pg_start; /* of the message in PostgreSQL's WAL; 0 = none */
	EsLsn	 pg_end;
	EsFxid	 fxid;
	uint32_t crc;
	uint32_t reserved2;
} EsFrameHeader;

_Static_assert(sizeof(EsFrameHeader) == 56, "EsFrameHeader is on disk");

typedef struct EsFileIdentity
{
	uint8_t	 store_uuid[ES_UUID_LEN];
	uint64_t system_identifier;
	uint32_t timeline;
	uint16_t shard;
	uint16_t nshards;
} EsFileIdentity;

_Static_assert(sizeof(EsFileIdentity) == 32, "EsFileIdentity is on disk");

typedef struct EsWalFileHeader
{
	EsFileIdentity identity;
	uint64_t	   file_number;
	uint64_t	   incarnation;	 /* of the shard process that made the file */
	EsOwnLsn	   previous_end; /* byte after the last frame that counts before this file; 0 =
								 * none.  What stands behind it was never believed */
	uint32_t	   previous_crc; /* of that frame */
	uint32_t	   reserved;
} EsWalFileHeader;

_Static_assert(sizeof(EsWalFileHeader) == 64, "EsWalFileHeader is on disk");

typedef struct EsResolved
{
	EsLsn	 commit_lsn; /* end of the commit record, 0 if aborted */
	uint32_t committed;	 /* 1 or 0 */
	uint32_t reserved;
} EsResolved;

/* Bytes a frame takes on disk: header + payload, rounded up to 8. */
static inline size_t
es_frame_size(uint32_t payload_len)
{
	return ((size_t) sizeof(EsFrameHeader) + payload_len + 7) & ~(size_t) 7;
}

/*
 * Writes header and payload (parts joined) into buf, which has
 * es_frame_size() bytes; fills magic, version, crc.  Returns the frame's CRC.
 */
extern uint32_t es_frame_encode(EsFrameHeader *header, const void *payload, uint32_t prev_crc, void *buf);

/*
 * Reads the frame at buf (len bytes up to the end of what may be read).
 * own_lsn is where it stands, prev_crc the frame before it.  Results:
 *	 ES_OK				*header, *payload point into buf, *crc is the frame's
 *	 ES_ERR_TRUNCATED	zero magic (padding) or nothing left
 *	 ES_ERR_CORRUPT, ES_ERR_VERSION, ES_ERR_FOREIGN
 */
extern EsStatus
es_frame_decode(const void *buf, size_t len, EsOwnLsn own_lsn, uint16_t shard, uint32_t prev_crc,
				const EsFrameHeader **header, const void **payload, uint32_t *crc, EsError *err);

/*
 * Payload of a decoded frame with ES_FRAME_LZ4, decompressed; malloc'd, so
 * 8-byte aligned.
 */
extern EsStatus
es_frame_unpack(const EsFrameHeader *header, const void *payload, void **raw, size_t *raw_len, EsError *err);

/*
 * Control block: files "control.0" and "control.1", one ES_WAL_BLOCK each,
 * written in turn; the valid one with the higher sequence number is current.
 * If neither is valid the shard does not open.
 */
#define ES_CONTROL_MAGIC UINT32_C(0x43425345) /* "ESBC" */

#define ES_CONTROL_CLEAN	0x01 /* stopped cleanly; nothing to replay */
#define ES_CONTROL_RELEASED 0x02 /* release_wal: its gap was given up knowingly */

typedef struct EsControl
{
	uint32_t	   magic;
	uint16_t	   version;
	uint16_t	   flags;
	uint64_t	   sequence;
	EsFileIdentity identity;
	uint64_t	   incarnation;
	EsOwnLsn	   durable_end; /* byte after the last durable frame; 0 = no frame yet */
	uint32_t	   durable_crc; /* of that frame */
	uint32_t	   reserved;
	EsOwnLsn	   first_file; /* oldest WAL file still needed, as own LSN of its start; 0 = none */
	EsLsn		   restart_lsn;
	EsPosition	   reserved_below; /* RESERVE: positions below may be in use */
	EsPosition	   next_position;  /* exact value if CLEAN, else 0 */
	uint64_t	   manifest_generation;
	uint64_t	   manifest_len; /* bytes of the manifest known to be synced */
	uint64_t	   written_at;	 /* µs since 1970, for people */
	uint32_t	   crc;			 /* of all above */
	uint32_t	   reserved2;
} EsControl;

_Static_assert(sizeof(EsControl) == 136, "EsControl is on disk");

/* block is ES_WAL_BLOCK bytes; the rest is zeroed. */
extern void		es_control_encode(EsControl *control, void *block);
extern EsStatus es_control_decode(const void *block, EsControl *control, EsError *err);

/*
 * Of two decode results the current one: 0 or 1, or -1 if neither is valid or one
 * of them was written by another version (which then may be the newer one).
 */
extern int es_control_current(EsStatus status0, const EsControl *c0, EsStatus status1, const EsControl *c1);

/*
 * Store file: $PGDATA/event_store/store, one ES_WAL_BLOCK.
 */
#define ES_STORE_MAGIC	  UINT32_C(0x53425345) /* "ESBS" */
#define ES_STORE_DETACHED 0x01				   /* stopped by event_store.detach(): slot dropped knowingly */

typedef struct EsStoreFile
{
	uint32_t magic;
	uint16_t version;
	uint16_t flags;
	uint8_t	 store_uuid[ES_UUID_LEN];
	uint64_t system_identifier;
	uint32_t nshards;
	uint32_t reserved;
	uint64_t created_at;				 /* µs since 1970 */
	uint8_t	 slot_map[ES_ROUTING_SLOTS]; /* slot -> shard */
	uint32_t crc;
	uint32_t reserved2;
} EsStoreFile;

_Static_assert(sizeof(EsStoreFile) == 1080, "EsStoreFile is on disk");

extern void		es_store_encode(EsStoreFile *store, void *block);
extern EsStatus es_store_decode(const void *block, EsStoreFile *store, EsError *err);

#endif /* ES_CORE_WAL_H */
