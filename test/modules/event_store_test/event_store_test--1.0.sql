\echo Use "CREATE EXTENSION event_store_test" to load this file. \quit

-- All functions are for superusers only: they can stop the server.

-- ---- fault points (only in builds with ES_FAULT_POINTS) ----

CREATE FUNCTION fault_points_compiled() RETURNS boolean
	AS 'MODULE_PATHNAME', 'est_fault_points_compiled' LANGUAGE C STRICT;
COMMENT ON FUNCTION fault_points_compiled() IS 'was event_store_test built with fault points?';

CREATE FUNCTION inject_fault(point text, action text, nth integer DEFAULT 1) RETURNS void
	AS 'MODULE_PATHNAME', 'est_inject_fault' LANGUAGE C STRICT;
COMMENT ON FUNCTION inject_fault(text, text, integer) IS
	'arms a fault point: kill, sleep, error, fatal, enospc or eio, once at the nth hit, or from then on ("error always")';

CREATE FUNCTION disarm_faults() RETURNS void
	AS 'MODULE_PATHNAME', 'est_disarm_faults' LANGUAGE C STRICT;
COMMENT ON FUNCTION disarm_faults() IS 'disarms all fault points and ends their sleeps';

CREATE FUNCTION fault_points() RETURNS SETOF text
	AS 'MODULE_PATHNAME', 'est_fault_points' LANGUAGE C STRICT;
COMMENT ON FUNCTION fault_points() IS 'names of all fault points';

CREATE FUNCTION fault_point_info(OUT name text, OUT may_throw boolean, OUT may_fail boolean, OUT process text)
	RETURNS SETOF record
	AS 'MODULE_PATHNAME', 'est_fault_point_info' LANGUAGE C STRICT;
COMMENT ON FUNCTION fault_point_info() IS 'all fault points: whether error, enospc/eio may happen there, and in which process';

CREATE FUNCTION fault_hits(point text) RETURNS bigint
	AS 'MODULE_PATHNAME', 'est_fault_hits' LANGUAGE C STRICT;
COMMENT ON FUNCTION fault_hits(text) IS 'how often the point was passed since it was armed';

-- ---- channels ----

CREATE FUNCTION echo(shard integer, bytes bigint, times integer DEFAULT 1) RETURNS double precision
	AS 'MODULE_PATHNAME', 'est_echo' LANGUAGE C STRICT;
COMMENT ON FUNCTION echo(integer, bigint, integer) IS
	'sends a message with so many bytes to the shard, checks that the same come back; microseconds per round trip';

CREATE FUNCTION echo_window(shard integer, bytes bigint, times integer, under_way integer) RETURNS double precision
	AS 'MODULE_PATHNAME', 'est_echo_window' LANGUAGE C STRICT;
COMMENT ON FUNCTION echo_window(integer, bigint, integer, integer) IS
	'the same with several messages under way at once; messages per second';

CREATE FUNCTION send_only(shard integer, bytes bigint, times integer DEFAULT 1) RETURNS double precision
	AS 'MODULE_PATHNAME', 'est_send_only' LANGUAGE C STRICT;
COMMENT ON FUNCTION send_only(integer, bigint, integer) IS
	'sends messages that have no answer (hints about unknown transactions); messages per second';

CREATE FUNCTION send_without_waiting(shard integer, bytes bigint, times integer DEFAULT 1) RETURNS void
	AS 'MODULE_PATHNAME', 'est_send_without_waiting' LANGUAGE C STRICT;
COMMENT ON FUNCTION send_without_waiting(integer, bigint, integer) IS
	'the same, and does not care whether they are taken';

CREATE FUNCTION hint(shard integer) RETURNS boolean
	AS 'MODULE_PATHNAME', 'est_hint' LANGUAGE C STRICT;
COMMENT ON FUNCTION hint(integer) IS 'sends a hint if there is a channel and room; whether it was sent';

CREATE FUNCTION reconnect(shard integer) RETURNS bigint
	AS 'MODULE_PATHNAME', 'est_reconnect' LANGUAGE C STRICT;
COMMENT ON FUNCTION reconnect(integer) IS 'lets go of the channel and builds it anew; its generation';

CREATE FUNCTION channel(shard integer, OUT slot integer, OUT generation bigint, OUT shard_generation bigint, OUT usable boolean,
		OUT half_sent boolean, OUT sent_messages bigint, OUT sent_bytes bigint, OUT taken_bytes bigint,
		OUT closed bigint, OUT parked integer)
	AS 'MODULE_PATHNAME', 'est_channel' LANGUAGE C STRICT;
COMMENT ON FUNCTION channel(integer) IS 'state of this session''s channel to the shard';

CREATE FUNCTION pause_shard(shard integer, paused boolean) RETURNS void
	AS 'MODULE_PATHNAME', 'est_pause_shard' LANGUAGE C STRICT;
COMMENT ON FUNCTION pause_shard(integer, boolean) IS 'makes the shard take nothing from its queues';

CREATE FUNCTION clog_lock_is_free() RETURNS boolean
	AS 'MODULE_PATHNAME', 'est_clog_lock_is_free' LANGUAGE C STRICT VOLATILE;
COMMENT ON FUNCTION clog_lock_is_free() IS 'does nobody hold PostgreSQL''s XactTruncationLock now?';

CREATE FUNCTION shard_pid(shard integer) RETURNS integer
	AS 'MODULE_PATHNAME', 'est_shard_pid' LANGUAGE C STRICT;
COMMENT ON FUNCTION shard_pid(integer) IS 'process of the shard, 0 = none';

CREATE FUNCTION shard_counter(shard integer, name text) RETURNS bigint
	AS 'MODULE_PATHNAME', 'est_shard_counter' LANGUAGE C STRICT VOLATILE;
COMMENT ON FUNCTION shard_counter(integer, text) IS
	'messages, last_drain, queue_high_water, queue_full_waits, queue_full_wait_us or queue_timeouts';

-- ---- positions and horizon ----

CREATE FUNCTION reserve_positions(n bigint, tables bigint[] DEFAULT '{}') RETURNS bigint
	AS 'MODULE_PATHNAME', 'est_reserve_positions' LANGUAGE C STRICT;
COMMENT ON FUNCTION reserve_positions(bigint, bigint[]) IS
	'takes positions as a transaction with events does at PRE_COMMIT; the first one. Published until the transaction ends';

CREATE FUNCTION given_positions(lowest bigint, highest bigint, tables bigint[] DEFAULT '{}') RETURNS void
	AS 'MODULE_PATHNAME', 'est_given_positions' LANGUAGE C STRICT;
COMMENT ON FUNCTION given_positions(bigint, bigint, bigint[]) IS 'the same for positions that are restored';

CREATE FUNCTION horizon(storage_id bigint DEFAULT 0) RETURNS bigint
	AS 'MODULE_PATHNAME', 'est_horizon' LANGUAGE C STRICT VOLATILE;
COMMENT ON FUNCTION horizon(bigint) IS 'horizon of the statement''s snapshot';

CREATE FUNCTION newest_horizon(storage_id bigint DEFAULT 0) RETURNS bigint
	AS 'MODULE_PATHNAME', 'est_newest_horizon' LANGUAGE C STRICT VOLATILE;
COMMENT ON FUNCTION newest_horizon(bigint) IS 'the horizon as a shard sees it';

CREATE FUNCTION position_state(OUT counter bigint, OUT reserved_below bigint, OUT announced bigint,
		OUT ring_entries bigint, OUT overflow_base bigint)
	AS 'MODULE_PATHNAME', 'est_position_state' LANGUAGE C STRICT VOLATILE;
COMMENT ON FUNCTION position_state() IS 'the counter and what surrounds it';

CREATE FUNCTION log_message(bytes bigint, OUT start pg_lsn, OUT "end" pg_lsn)
	AS 'MODULE_PATHNAME', 'est_log_message' LANGUAGE C STRICT;
COMMENT ON FUNCTION log_message(bigint) IS 'writes a BATCH message with so many bytes (no batch) into PostgreSQL''s WAL; roll back after it';

-- ---- scans ----

CREATE FUNCTION scan(store regclass, filters text[] DEFAULT '{}', ord text DEFAULT 'any', after bigint DEFAULT 0, below bigint DEFAULT 0,
		max_rows bigint DEFAULT 0, context text DEFAULT NULL, batch_bytes integer DEFAULT 0, wanted integer[] DEFAULT NULL,
		count_only boolean DEFAULT false, OUT "position" bigint, OUT version bigint, OUT own boolean) RETURNS SETOF record
	AS 'MODULE_PATHNAME', 'est_scan' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION scan(regclass, text[], text, bigint, bigint, bigint, text, integer, integer[], boolean) IS
	'rows as the shards answer them, one shard behind the other; a filter is "column op kind value ...", op eq in lt le gt ge isnull notnull, kind i or b (hex)';

CREATE FUNCTION scan_stats(store regclass, filters text[] DEFAULT '{}', ord text DEFAULT 'any', after bigint DEFAULT 0, below bigint DEFAULT 0,
		max_rows bigint DEFAULT 0, context text DEFAULT NULL, batch_bytes integer DEFAULT 0, wanted integer[] DEFAULT NULL,
		count_only boolean DEFAULT false, times integer DEFAULT 1,
		OUT rows bigint, OUT answers bigint, OUT scanned bigint, OUT pruned bigint, OUT largest bigint, OUT us float8)
	AS 'MODULE_PATHNAME', 'est_scan_stats' LANGUAGE C VOLATILE;
COMMENT ON FUNCTION scan_stats(regclass, text[], text, bigint, bigint, bigint, text, integer, integer[], boolean, integer) IS
	'the same without the rows: what was answered, looked at and left out, and the time of one scan';

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA event_store_test FROM PUBLIC;
