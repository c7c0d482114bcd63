/* sql/event_store--1.0.sql */

\echo Use "CREATE EXTENSION event_store" to load this file. \quit

-- The schema is the extension's own: nobody can have put functions and operators into it before, and
-- whoever owns a database cannot add any later.  With "schema = pg_catalog" in the control file the script
-- runs with a search path of nothing else.
CREATE SCHEMA event_store;
COMMENT ON SCHEMA event_store IS 'event store: the table of events, functions to append, replay and follow them, and statistics';

-- ---------------------------------------------------------------------------
-- The access method
-- ---------------------------------------------------------------------------

CREATE FUNCTION event_store.event_store_handler(internal)
RETURNS table_am_handler
AS 'MODULE_PATHNAME'
LANGUAGE C STRICT;
COMMENT ON FUNCTION event_store.event_store_handler(internal) IS 'handler of the table access method event_store';

CREATE ACCESS METHOD event_store TYPE TABLE HANDLER event_store.event_store_handler;
COMMENT ON ACCESS METHOD event_store IS 'immutable events, routed by context to shards that keep them in columnar segments';

-- ---------------------------------------------------------------------------
-- The table of events
-- ---------------------------------------------------------------------------

CREATE TABLE event_store.events (
    position    bigint,
    context_id  text COLLATE "C" NOT NULL,
    version     bigint,
    event_id    uuid,
    event_type  text,
    recorded_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    payload     jsonb,
    metadata    jsonb
) USING event_store;

COMMENT ON TABLE event_store.events IS 'events of all contexts; append() and INSERT write it, replay(), read_all() and SELECT read it';
COMMENT ON COLUMN event_store.events.position IS 'place in the one order of all events of the cluster; filled at commit';
COMMENT ON COLUMN event_store.events.context_id IS 'stream, aggregate or case that the event belongs to; routes it to its shard';
COMMENT ON COLUMN event_store.events.version IS '1, 2, 3 ... within the context; filled at commit; a given value is the expected version';
COMMENT ON COLUMN event_store.events.event_id IS 'idempotency key: stored once within the context';
COMMENT ON COLUMN event_store.events.event_type IS 'what happened';
COMMENT ON COLUMN event_store.events.recorded_at IS 'when it was written, by the writer''s clock';
COMMENT ON COLUMN event_store.events.payload IS 'the event''s data';
COMMENT ON COLUMN event_store.events.metadata IS 'about the event: who, why, correlation';

SELECT pg_catalog.pg_extension_config_dump('event_store.events', '');

-- ---------------------------------------------------------------------------
-- Writing
-- ---------------------------------------------------------------------------

CREATE FUNCTION event_store.append(
    context_id       text,
    event_type       text,
    payload          jsonb,
    expected_version bigint DEFAULT NULL,
    event_id         uuid DEFAULT NULL,
    metadata         jsonb DEFAULT NULL,
    store            regclass DEFAULT 'event_store.events',
    OUT version      bigint,
    OUT outcome      text)
RETURNS record
AS 'MODULE_PATHNAME', 'es_append'
LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION event_store.append(text, text, jsonb, bigint, uuid, jsonb, regclass) IS
'appends one event; expected_version is the context''s version before it (0 = no event yet, -1 = some event, NULL = any), else 23505; returns the new version and "appended", or the version of the event with the same event_id and "already_there"; "not_stored" means that a trigger or a rule said no; under row security the version is NULL unless the policies show the event or expected_version named it';

-- ---------------------------------------------------------------------------
-- Reading
-- ---------------------------------------------------------------------------

CREATE FUNCTION event_store.replay(
    context_id   text,
    event_type   text DEFAULT NULL,
    from_version bigint DEFAULT NULL,
    to_version   bigint DEFAULT NULL,
    since        timestamptz DEFAULT NULL,
    backward     boolean DEFAULT false,
    max_count    bigint DEFAULT NULL,
    store        regclass DEFAULT 'event_store.events')
RETURNS SETOF event_store.events
AS 'MODULE_PATHNAME', 'es_replay'
LANGUAGE C STABLE PARALLEL RESTRICTED ROWS 50;
COMMENT ON FUNCTION event_store.replay(text, text, bigint, bigint, timestamptz, boolean, bigint, regclass) IS
'events of one context in order, from its shard; in a table that has columns which event_store.events has not, all its plain columns come as jsonb payload';

CREATE FUNCTION event_store.read_all(
    after       bigint DEFAULT 0,
    max_count   bigint DEFAULT NULL,
    event_types text[] DEFAULT NULL,
    store       regclass DEFAULT 'event_store.events')
RETURNS SETOF event_store.events
AS 'MODULE_PATHNAME', 'es_read_all'
LANGUAGE C VOLATILE PARALLEL UNSAFE ROWS 1000;
COMMENT ON FUNCTION event_store.read_all(bigint, bigint, text[], regclass) IS
'events with position > after in order of position, up to the horizon: what is returned is never followed by an event before it';

CREATE FUNCTION event_store.horizon(store regclass DEFAULT 'event_store.events')
RETURNS bigint
AS 'MODULE_PATHNAME', 'es_horizon_fn'
LANGUAGE C VOLATILE PARALLEL RESTRICTED;
COMMENT ON FUNCTION event_store.horizon(regclass) IS
'every event of the table with a smaller position is visible to the caller''s snapshot or will never be';

CREATE PROCEDURE event_store.wait_for_events(
    after       bigint DEFAULT NULL,
    context_id  text DEFAULT NULL,
    timeout     interval DEFAULT NULL,
    store       regclass DEFAULT 'event_store.events',
    INOUT found boolean DEFAULT NULL)
AS 'MODULE_PATHNAME', 'es_wait_for_events'
LANGUAGE C;
COMMENT ON PROCEDURE event_store.wait_for_events(bigint, text, interval, regclass, boolean) IS
'waits until an event with position > after (default: the newest there is) can be read, of one context or of the whole table; ends its transaction; found is false after timeout (default: none); under row security an event must be one that the policies show; goes on when the table is truncated or rewritten';

CREATE FUNCTION event_store.shard_of(
    context_id text,
    store      regclass DEFAULT 'event_store.events')
RETURNS integer
AS 'MODULE_PATHNAME', 'es_shard_of'
LANGUAGE C STABLE STRICT PARALLEL RESTRICTED;
COMMENT ON FUNCTION event_store.shard_of(text, regclass) IS 'number of the shard that holds a context';

-- ---------------------------------------------------------------------------
-- Operating
-- ---------------------------------------------------------------------------

CREATE FUNCTION event_store.flush(store regclass DEFAULT NULL)
RETURNS void
AS 'MODULE_PATHNAME', 'es_flush'
LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION event_store.flush(regclass) IS
'returns when everything that was committed before lies in segments; of one table, or of all';

CREATE FUNCTION event_store.sync()
RETURNS void
AS 'MODULE_PATHNAME', 'es_sync'
LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION event_store.sync() IS
'returns when everything that was acknowledged is durable in PostgreSQL''s WAL and in the shards'' own files, also with synchronous_commit = off';

CREATE FUNCTION event_store.relation_size(store regclass)
RETURNS bigint
AS 'MODULE_PATHNAME', 'es_relation_size_fn'
LANGUAGE C VOLATILE STRICT PARALLEL RESTRICTED;
COMMENT ON FUNCTION event_store.relation_size(regclass) IS
'bytes of the table in the shards'' segment files and MemTables, and its metapage';

CREATE FUNCTION event_store.pause_shard(shard integer)
RETURNS void
AS 'MODULE_PATHNAME', 'es_pause_shard'
LANGUAGE C VOLATILE STRICT PARALLEL RESTRICTED;
COMMENT ON FUNCTION event_store.pause_shard(integer) IS 'the shard takes nothing from its queues until resume_shard; superuser';

CREATE FUNCTION event_store.resume_shard(shard integer)
RETURNS void
AS 'MODULE_PATHNAME', 'es_resume_shard'
LANGUAGE C VOLATILE STRICT PARALLEL RESTRICTED;
COMMENT ON FUNCTION event_store.resume_shard(integer) IS 'ends pause_shard; superuser';

CREATE FUNCTION event_store.release_wal(shard integer)
RETURNS void
AS 'MODULE_PATHNAME', 'es_release_wal'
LANGUAGE C VOLATILE STRICT PARALLEL RESTRICTED;
COMMENT ON FUNCTION event_store.release_wal(integer) IS
'gives up the part of PostgreSQL''s WAL that a shard which cannot open still needs: events in it are lost; superuser';

CREATE FUNCTION event_store.detach()
RETURNS void
AS 'MODULE_PATHNAME', 'es_detach'
LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION event_store.detach() IS
'stops the store cleanly and drops its replication slot, until the server''s restart: before a copy of the data directory, pg_upgrade, or removing the extension for good; waits for transactions with events, and is taken back if it is cancelled till then; superuser';

CREATE FUNCTION event_store.verify(
    OUT shard integer, OUT file text, OUT "offset" bigint, OUT problem text,
    OUT expected_checksum text, OUT found_checksum text)
RETURNS SETOF record
AS 'MODULE_PATHNAME', 'es_verify'
LANGUAGE C VOLATILE PARALLEL UNSAFE ROWS 10;
COMMENT ON FUNCTION event_store.verify() IS 'reads every page of every segment and lists all damage; no row = no damage; superuser, and who is granted EXECUTE';

REVOKE ALL ON FUNCTION event_store.pause_shard(integer), event_store.resume_shard(integer),
    event_store.release_wal(integer), event_store.detach(), event_store.verify() FROM PUBLIC;

-- ---------------------------------------------------------------------------
-- Statistics
-- ---------------------------------------------------------------------------

CREATE FUNCTION event_store.stat_shards_fn(
    OUT shard integer, OUT pid integer, OUT state text, OUT reason text, OUT paused boolean,
    OUT generation bigint, OUT io_method text,
    OUT messages bigint, OUT batches bigint, OUT rows bigint, OUT commits bigint, OUT aborts bigint, OUT duplicates bigint,
    OUT queue_depth bigint, OUT queue_high_water bigint, OUT queue_full_waits bigint, OUT queue_full_wait_us bigint, OUT queue_timeouts bigint,
    OUT staged_transactions bigint, OUT staged_rows bigint, OUT staged_bytes bigint,
    OUT memtable_rows bigint, OUT memtable_bytes bigint,
    OUT segments bigint, OUT segment_rows bigint, OUT segment_bytes bigint, OUT pending_segments bigint, OUT flushes bigint,
    OUT wal_direct_writes bigint, OUT wal_staged_writes bigint, OUT wal_groups bigint, OUT wal_frames bigint, OUT wal_bytes bigint, OUT wal_files bigint,
    OUT fsyncs bigint, OUT fsync_us bigint, OUT fsync_histogram bigint[], OUT control_writes bigint, OUT manifest_records bigint,
    OUT last_position bigint, OUT durable_position bigint, OUT flush_distance bigint,
    OUT restart_lsn pg_lsn, OUT held_wal_bytes bigint,
    OUT scans bigint, OUT replays bigint, OUT rows_sent bigint, OUT waiters bigint, OUT io_errors bigint, OUT corruptions bigint)
RETURNS SETOF record
AS 'MODULE_PATHNAME', 'es_stat_shards'
LANGUAGE C VOLATILE PARALLEL RESTRICTED ROWS 4;
COMMENT ON FUNCTION event_store.stat_shards_fn() IS 'what stat_shards shows, to those who may read it';

CREATE VIEW event_store.stat_shards AS SELECT * FROM event_store.stat_shards_fn();
COMMENT ON VIEW event_store.stat_shards IS 'one row per shard: state, queues, memory, files, own WAL; counters since the server''s start';
COMMENT ON COLUMN event_store.stat_shards.shard IS 'number of the shard, from 0';
COMMENT ON COLUMN event_store.stat_shards.pid IS 'its process; NULL = none runs';
COMMENT ON COLUMN event_store.stat_shards.state IS 'absent, starting, recovering, open, stopping, stopped, failed (it cannot open) or refused (the whole store must not be opened); reason says why';
COMMENT ON COLUMN event_store.stat_shards.reason IS 'why it cannot open, or why nobody may use the store';
COMMENT ON COLUMN event_store.stat_shards.paused IS 'it takes nothing from its queues (pause_shard)';
COMMENT ON COLUMN event_store.stat_shards.generation IS 'grows by one with each process of the shard';
COMMENT ON COLUMN event_store.stat_shards.io_method IS 'how it writes its files: io_uring or sync';
COMMENT ON COLUMN event_store.stat_shards.messages IS 'taken from its queues';
COMMENT ON COLUMN event_store.stat_shards.batches IS 'row batches taken';
COMMENT ON COLUMN event_store.stat_shards.rows IS 'rows in them';
COMMENT ON COLUMN event_store.stat_shards.commits IS 'transactions known to have committed';
COMMENT ON COLUMN event_store.stat_shards.aborts IS 'transactions known to have aborted';
COMMENT ON COLUMN event_store.stat_shards.duplicates IS 'events not stored, since their event_id was in the context already';
COMMENT ON COLUMN event_store.stat_shards.queue_depth IS 'messages that wait in its queues now; a long one counts as its pieces';
COMMENT ON COLUMN event_store.stat_shards.queue_high_water IS 'most bytes that ever waited in one queue';
COMMENT ON COLUMN event_store.stat_shards.queue_full_waits IS 'times that a session waited for room in a queue';
COMMENT ON COLUMN event_store.stat_shards.queue_full_wait_us IS 'microseconds of these waits';
COMMENT ON COLUMN event_store.stat_shards.queue_timeouts IS 'waits that ended with an error (event_store.enqueue_timeout)';
COMMENT ON COLUMN event_store.stat_shards.staged_transactions IS 'transactions that have sent rows and are not over';
COMMENT ON COLUMN event_store.stat_shards.staged_rows IS 'their rows in memory';
COMMENT ON COLUMN event_store.stat_shards.staged_bytes IS 'bytes of these';
COMMENT ON COLUMN event_store.stat_shards.memtable_rows IS 'rows in memory that are in no segment yet';
COMMENT ON COLUMN event_store.stat_shards.memtable_bytes IS 'bytes of these';
COMMENT ON COLUMN event_store.stat_shards.segments IS 'segment files';
COMMENT ON COLUMN event_store.stat_shards.segment_rows IS 'rows in them';
COMMENT ON COLUMN event_store.stat_shards.segment_bytes IS 'bytes of them';
COMMENT ON COLUMN event_store.stat_shards.pending_segments IS 'segment files of large transactions that are not adopted yet';
COMMENT ON COLUMN event_store.stat_shards.flushes IS 'MemTables that became segments';
COMMENT ON COLUMN event_store.stat_shards.wal_direct_writes IS 'writes to its own log that found it idle';
COMMENT ON COLUMN event_store.stat_shards.wal_staged_writes IS 'writes to its own log that were gathered behind one under way';
COMMENT ON COLUMN event_store.stat_shards.wal_groups IS 'groups of frames written to its own log';
COMMENT ON COLUMN event_store.stat_shards.wal_frames IS 'frames in them';
COMMENT ON COLUMN event_store.stat_shards.wal_bytes IS 'bytes of them';
COMMENT ON COLUMN event_store.stat_shards.wal_files IS 'files of its own log';
COMMENT ON COLUMN event_store.stat_shards.fsyncs IS 'syncs of its files';
COMMENT ON COLUMN event_store.stat_shards.fsync_us IS 'microseconds of these';
COMMENT ON COLUMN event_store.stat_shards.fsync_histogram IS 'syncs by time: element i (from 1) below 32 * 2^i microseconds, the last one all longer ones';
COMMENT ON COLUMN event_store.stat_shards.control_writes IS 'control blocks written';
COMMENT ON COLUMN event_store.stat_shards.manifest_records IS 'manifest records written';
COMMENT ON COLUMN event_store.stat_shards.last_position IS 'highest position that it holds';
COMMENT ON COLUMN event_store.stat_shards.durable_position IS 'highest position that is durable in its own files';
COMMENT ON COLUMN event_store.stat_shards.flush_distance IS 'bytes by which what it took lies ahead of PostgreSQL''s flushed WAL';
COMMENT ON COLUMN event_store.stat_shards.restart_lsn IS 'from here on it needs PostgreSQL''s WAL; NULL = not known';
COMMENT ON COLUMN event_store.stat_shards.held_wal_bytes IS 'bytes of PostgreSQL''s WAL behind that';
COMMENT ON COLUMN event_store.stat_shards.scans IS 'scans of tables';
COMMENT ON COLUMN event_store.stat_shards.replays IS 'scans of one context';
COMMENT ON COLUMN event_store.stat_shards.rows_sent IS 'rows sent to sessions';
COMMENT ON COLUMN event_store.stat_shards.waiters IS 'sessions in wait_for_events that it would wake';
COMMENT ON COLUMN event_store.stat_shards.io_errors IS 'failed reads and writes of its files';
COMMENT ON COLUMN event_store.stat_shards.corruptions IS 'damages found in its files';

CREATE FUNCTION event_store.stat_tables_fn(
    OUT store regclass, OUT storage_id bigint, OUT shard integer, OUT segments bigint, OUT segment_rows bigint, OUT segment_bytes bigint,
    OUT raw_bytes bigint, OUT memtable_rows bigint, OUT memtable_bytes bigint, OUT staged_rows bigint, OUT pending_rows bigint,
    OUT min_position bigint, OUT max_position bigint)
RETURNS SETOF record
AS 'MODULE_PATHNAME', 'es_stat_tables'
LANGUAGE C VOLATILE PARALLEL RESTRICTED ROWS 10;
COMMENT ON FUNCTION event_store.stat_tables_fn() IS 'what the shards hold of the tables of this database; stat_tables sums it up, and who may read it may call this';

CREATE FUNCTION event_store.table_roles(store regclass,
    OUT context_id name, OUT "position" name, OUT version name, OUT event_id name, OUT event_type name, OUT storage_id bigint, OUT locked boolean)
RETURNS record
AS 'MODULE_PATHNAME', 'es_table_roles'
LANGUAGE C VOLATILE STRICT PARALLEL RESTRICTED;
COMMENT ON FUNCTION event_store.table_roles(regclass) IS 'names of the columns that have a role in an event_store table, NULL = none, and its storage id; all are NULL, and locked is true, while another session changes the table; for those who may read stat_tables';

CREATE VIEW event_store.stat_tables AS
SELECT c.oid::pg_catalog.regclass AS store,
       r.storage_id,
       r.context_id AS context_column, r."position" AS position_column, r.version AS version_column,
       r.event_id AS event_id_column, r.event_type AS event_type_column,
       coalesce(pg_catalog.sum(s.segments), 0)::bigint AS segments,
       coalesce(pg_catalog.sum(s.segment_rows), 0)::bigint AS segment_rows,
       coalesce(pg_catalog.sum(s.segment_bytes), 0)::bigint AS segment_bytes,
       coalesce(pg_catalog.sum(s.raw_bytes), 0)::bigint AS raw_bytes,
       coalesce(pg_catalog.sum(s.memtable_rows), 0)::bigint AS memtable_rows,
       coalesce(pg_catalog.sum(s.memtable_bytes), 0)::bigint AS memtable_bytes,
       coalesce(pg_catalog.sum(s.staged_rows), 0)::bigint AS staged_rows,
       coalesce(pg_catalog.sum(s.pending_rows), 0)::bigint AS pending_rows,
       pg_catalog.min(s.min_position) AS min_position,
       pg_catalog.max(s.max_position) AS max_position
FROM pg_catalog.pg_class c
     JOIN pg_catalog.pg_am a
         ON a.oid OPERATOR(pg_catalog.=) c.relam AND a.amname OPERATOR(pg_catalog.=) 'event_store'::pg_catalog.name
     CROSS JOIN LATERAL event_store.table_roles(c.oid::pg_catalog.regclass) r
     LEFT JOIN event_store.stat_tables_fn() s
         ON s.storage_id OPERATOR(pg_catalog.=) r.storage_id
            OR (r.locked AND s.store::pg_catalog.oid OPERATOR(pg_catalog.=) c.oid)
WHERE c.relkind OPERATOR(pg_catalog.=) 'r'::pg_catalog."char" AND (r.storage_id IS NOT NULL OR r.locked)
GROUP BY c.oid, r.storage_id, r.context_id, r."position", r.version, r.event_id, r.event_type;
COMMENT ON VIEW event_store.stat_tables IS 'one row per event_store table of this database: role columns, segments, rows in memory; storage and roles are NULL while another session holds an exclusive lock on the table, and a paused shard is left out with a warning';
COMMENT ON COLUMN event_store.stat_tables.store IS 'the table';
COMMENT ON COLUMN event_store.stat_tables.storage_id IS 'its storage, another one after TRUNCATE and rewrites; NULL = the table is locked';
COMMENT ON COLUMN event_store.stat_tables.context_column IS 'column that routes events';
COMMENT ON COLUMN event_store.stat_tables.position_column IS 'column with the place in the order of all events; NULL = none';
COMMENT ON COLUMN event_store.stat_tables.version_column IS 'column with the place in the context; NULL = none';
COMMENT ON COLUMN event_store.stat_tables.event_id_column IS 'column with the idempotency key; NULL = none';
COMMENT ON COLUMN event_store.stat_tables.event_type_column IS 'column with the event type; NULL = none';
COMMENT ON COLUMN event_store.stat_tables.segments IS 'segment files';
COMMENT ON COLUMN event_store.stat_tables.segment_rows IS 'rows in them';
COMMENT ON COLUMN event_store.stat_tables.segment_bytes IS 'bytes of them, pending ones too';
COMMENT ON COLUMN event_store.stat_tables.raw_bytes IS 'bytes of the segments'' values before compression';
COMMENT ON COLUMN event_store.stat_tables.memtable_rows IS 'rows in memory that are in no segment yet';
COMMENT ON COLUMN event_store.stat_tables.memtable_bytes IS 'bytes of these';
COMMENT ON COLUMN event_store.stat_tables.staged_rows IS 'rows in memory of transactions that are not over';
COMMENT ON COLUMN event_store.stat_tables.pending_rows IS 'rows in segment files of large transactions that are not adopted yet';
COMMENT ON COLUMN event_store.stat_tables.min_position IS 'lowest position of a row; NULL = there are none';
COMMENT ON COLUMN event_store.stat_tables.max_position IS 'highest position of a row; NULL = there are none';

CREATE FUNCTION event_store.stat_segments_fn(
    OUT store regclass, OUT storage_id bigint, OUT shard integer, OUT segment text, OUT rows bigint, OUT contexts bigint,
    OUT zones integer, OUT bytes bigint, OUT raw_bytes bigint, OUT min_position bigint, OUT max_position bigint, OUT pending boolean)
RETURNS SETOF record
AS 'MODULE_PATHNAME', 'es_stat_segments'
LANGUAGE C VOLATILE PARALLEL RESTRICTED ROWS 100;
COMMENT ON FUNCTION event_store.stat_segments_fn() IS 'what stat_segments shows, to those who may read it';

CREATE VIEW event_store.stat_segments AS SELECT * FROM event_store.stat_segments_fn();
COMMENT ON VIEW event_store.stat_segments IS 'one row per segment file of this database; a paused shard is left out with a warning';
COMMENT ON COLUMN event_store.stat_segments.store IS 'the table, by the OID that its rows came with';
COMMENT ON COLUMN event_store.stat_segments.storage_id IS 'its storage';
COMMENT ON COLUMN event_store.stat_segments.shard IS 'number of the shard that the file belongs to';
COMMENT ON COLUMN event_store.stat_segments.segment IS 'name of the file';
COMMENT ON COLUMN event_store.stat_segments.rows IS 'rows in it';
COMMENT ON COLUMN event_store.stat_segments.contexts IS 'contexts in it';
COMMENT ON COLUMN event_store.stat_segments.zones IS 'zones of rows in it';
COMMENT ON COLUMN event_store.stat_segments.bytes IS 'size of the file';
COMMENT ON COLUMN event_store.stat_segments.raw_bytes IS 'bytes of its values before compression';
COMMENT ON COLUMN event_store.stat_segments.min_position IS 'lowest position in it; NULL = not known yet';
COMMENT ON COLUMN event_store.stat_segments.max_position IS 'highest position in it; NULL = not known yet';
COMMENT ON COLUMN event_store.stat_segments.pending IS 'of a large transaction, and not adopted yet';

GRANT USAGE ON SCHEMA event_store TO PUBLIC;
-- The functions ask for SELECT on their views themselves (es_check_view_acl).  pg_monitor is a member.
GRANT SELECT ON event_store.stat_shards, event_store.stat_tables, event_store.stat_segments TO pg_read_all_stats;
