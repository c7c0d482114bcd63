-- Promise: roles and refusals hold whatever way a statement takes to a table, and functions take no more than they need.
CREATE TYPE mood AS ENUM ('good', 'bad');
-- a role is not lost by a new type: no rewrite, and with one
CREATE TABLE g (position bigint, context_id text, version bigint, event_id uuid, event_type text, n int) USING event_store;
INSERT INTO g (context_id, event_type, n) VALUES ('a', 'x', 1);
ALTER TABLE g ALTER event_type TYPE varchar;
ALTER TABLE g ALTER event_type TYPE varchar(20);
ALTER TABLE g ALTER version TYPE int;
ALTER TABLE g ALTER position TYPE numeric;
ALTER TABLE g ALTER event_id TYPE text;
ALTER TABLE g ALTER n TYPE bigint, ALTER version TYPE int;
SELECT context_id, "position", version, event_id, event_type FROM event_store.table_roles('g');
-- what keeps it, or takes the column along, works
ALTER TABLE g ALTER context_id TYPE varchar(10);
ALTER TABLE g ALTER event_type TYPE mood USING 'good';
ALTER TABLE g DROP COLUMN event_id;
ALTER TABLE g ALTER version TYPE int, SET ACCESS METHOD heap;
ALTER TABLE g ALTER version TYPE bigint, SET ACCESS METHOD event_store;
SELECT event_type, version, n FROM event_store.replay('a', event_type => 'good', store => 'g') r, LATERAL (SELECT r.payload ->> 'n' AS n) p;
SELECT context_id, "position", version, event_id, event_type FROM event_store.table_roles('g');
DROP TABLE g;
-- without rows the new type decides
CREATE TABLE g (context_id text, version bigint) USING event_store;
ALTER TABLE g ALTER version TYPE int;
INSERT INTO g VALUES ('a', 77);
SELECT * FROM g;
DROP TABLE g;
-- a column's type goes with all that has it
CREATE TABLE g (context_id mood, n int) USING event_store;
INSERT INTO g VALUES ('good', 1);
DROP TYPE mood CASCADE;
SELECT * FROM g;
CREATE SCHEMA gs;
CREATE TYPE gs.mood AS ENUM ('good', 'bad');
CREATE TABLE gs.g (context_id gs.mood, event_type gs.mood) USING event_store;
INSERT INTO gs.g VALUES ('good', 'bad');
CREATE TABLE gs_g (context_id text, event_type gs.mood, n int) USING event_store;
INSERT INTO gs_g VALUES ('a', 'bad', 1);
SET client_min_messages = warning;
DROP SCHEMA gs CASCADE;
RESET client_min_messages;
SELECT * FROM gs_g;
SELECT context_id, "position", version, event_id, event_type FROM event_store.table_roles('gs_g');
DROP TABLE gs_g, g;
-- typed tables
CREATE TYPE comp AS (context_id text, event_type text, n int);
CREATE TABLE g OF comp USING event_store;
INSERT INTO g VALUES ('a', 'x', 1);
ALTER TYPE comp RENAME ATTRIBUTE context_id TO ctx CASCADE;
ALTER TYPE comp RENAME ATTRIBUTE event_type TO kind CASCADE;
ALTER TYPE comp ALTER ATTRIBUTE event_type TYPE varchar CASCADE;
ALTER TYPE comp DROP ATTRIBUTE context_id CASCADE;
ALTER TYPE comp RENAME ATTRIBUTE n TO m CASCADE;
ALTER TYPE comp ADD ATTRIBUTE version bigint CASCADE;
SELECT * FROM g;
SELECT context_id, "position", version, event_id, event_type FROM event_store.table_roles('g');
TRUNCATE g;
ALTER TYPE comp RENAME ATTRIBUTE event_type TO kind CASCADE;
SELECT context_id, "position", version, event_id, event_type FROM event_store.table_roles('g');
DROP TABLE g;
DROP TYPE comp;
-- parents
CREATE TABLE p (context_id text, event_type text, n int) PARTITION BY LIST (context_id);
CREATE TABLE p1 PARTITION OF p FOR VALUES IN ('a') USING event_store;
CREATE TABLE p2 PARTITION OF p FOR VALUES IN ('b');
INSERT INTO p VALUES ('a', 'x', 1), ('b', 'x', 2);
ALTER TABLE p ALTER event_type TYPE varchar;
ALTER TABLE p RENAME event_type TO kind;
-- ON CONFLICT by way of a partitioned table
INSERT INTO p VALUES ('a', 'x', 1) ON CONFLICT DO NOTHING;
WITH i AS (INSERT INTO p VALUES ('a', 'x', 1) ON CONFLICT DO NOTHING RETURNING n) SELECT * FROM i;
SELECT * FROM p ORDER BY n;
DROP TABLE p;
-- an index that is refused leaves nothing behind
CREATE TABLE g (context_id text, n int) USING event_store;
CREATE INDEX CONCURRENTLY ON g (n);
CREATE INDEX g_n ON g (n);
SELECT count(*) FROM pg_index WHERE indrelid = 'g'::regclass;
DROP TABLE g;
-- unlogged: the table is named, and what can be done
CREATE UNLOGGED TABLE g (context_id text, n int);
INSERT INTO g VALUES ('a', 1);
ALTER TABLE g SET ACCESS METHOD event_store;
ALTER TABLE g SET LOGGED;
ALTER TABLE g SET ACCESS METHOD event_store;
ALTER TABLE g SET UNLOGGED;
DROP TABLE g;
CREATE TABLE g (context_id text, n int);
INSERT INTO g VALUES ('a', 1), (NULL, 2);
ALTER TABLE g SET ACCESS METHOD event_store;
DROP TABLE g;
-- 23505 at COMMIT names the context as the session writes it
SET timezone = 'UTC';
SET datestyle = iso, ymd;
CREATE TABLE d (context_id date, version bigint, event_id uuid, n int) USING event_store;
CREATE TABLE s (context_id timestamptz, version bigint) USING event_store;
CREATE TABLE b (context_id bool, version bigint) USING event_store;
CREATE TABLE m (context_id mood, version bigint) USING event_store;
CREATE TABLE y (context_id bytea, version bigint) USING event_store;
CREATE TABLE u (context_id uuid, version bigint) USING event_store;
CREATE TABLE i (context_id smallint, version bigint) USING event_store;
CREATE TABLE t (context_id text, version bigint) USING event_store;
INSERT INTO d VALUES ('1996-01-02', 3);
INSERT INTO s VALUES ('2026-01-02 03:04:05', 3);
INSERT INTO b VALUES (true, 3);
INSERT INTO m VALUES ('bad', 3);
INSERT INTO y VALUES ('\x00ff', 3);
INSERT INTO y VALUES (convert_to(repeat('x', 1000000), 'UTF8'), 3);
INSERT INTO u VALUES ('00000000-0000-0000-0000-00000000000a', 3);
INSERT INTO i VALUES (-7, 3);
INSERT INTO t VALUES (repeat('ä', 1000000), 3);
SELECT event_store.append(repeat('ä', 1000000), NULL, NULL, expected_version => 3, store => 't');
INSERT INTO d VALUES ('1996-01-02', NULL, '00000000-0000-0000-0000-000000000001', 1);
\set VERBOSITY terse
INSERT INTO d VALUES ('1996-01-02', NULL, '00000000-0000-0000-0000-000000000001', 2);
\set VERBOSITY default
SET datestyle = german;
INSERT INTO d VALUES ('1996-01-02', 3);
RESET datestyle;
RESET timezone;
INSERT INTO t VALUES ('a', 7);
-- a version that row security hides is not told
CREATE ROLE regress_es_writer;
INSERT INTO t VALUES ('hidden', 1), ('hidden', 2);
ALTER TABLE t ENABLE ROW LEVEL SECURITY;
CREATE POLICY p ON t FOR INSERT TO regress_es_writer WITH CHECK (true);
GRANT INSERT, SELECT ON t TO regress_es_writer;
SET ROLE regress_es_writer;
SELECT event_store.append('hidden', NULL, NULL, expected_version => 0, store => 't');
INSERT INTO t VALUES ('hidden', 1);
RESET ROLE;
SELECT event_store.append('hidden', NULL, NULL, expected_version => 0, store => 't');
DROP TABLE d, s, b, m, y, u, i, t;
DROP TYPE mood;
DROP ROLE regress_es_writer;
-- publications: their root shows, or they were there before the table
SET client_min_messages = error;
CREATE TABLE p (context_id text, n int) PARTITION BY LIST (context_id);
CREATE TABLE p1 PARTITION OF p FOR VALUES IN ('a') USING event_store;
CREATE PUBLICATION root WITH (publish_via_partition_root);
SET client_min_messages = warning;
ALTER PUBLICATION root ADD TABLE p;
CREATE TABLE p2 PARTITION OF p FOR VALUES IN ('b') USING event_store;
CREATE TABLE p3 (context_id text, n int);
ALTER TABLE p ATTACH PARTITION p3 FOR VALUES IN ('c');
ALTER TABLE p3 SET ACCESS METHOD event_store;
CREATE TABLE p4 (context_id text, n int) USING event_store;
ALTER TABLE p ATTACH PARTITION p4 FOR VALUES IN ('d');
DROP PUBLICATION root;
SET client_min_messages = error; -- also of wal_level
CREATE PUBLICATION everything FOR ALL TABLES;
SET client_min_messages = warning;
CREATE TABLE g (context_id text, n int) USING event_store;
CREATE TABLE g2 USING event_store AS SELECT * FROM g;
CREATE TABLE g3 AS SELECT * FROM g;
DROP PUBLICATION everything;
CREATE SCHEMA gs;
SET client_min_messages = error;
CREATE PUBLICATION one FOR TABLES IN SCHEMA gs;
SET client_min_messages = warning;
CREATE TABLE gs.g (context_id text, n int) USING event_store;
CREATE TABLE g4 (context_id text, n int) USING event_store;
ALTER TABLE g4 SET SCHEMA gs;
ALTER TABLE gs.g4 SET SCHEMA public;
ALTER TABLE g3 SET SCHEMA gs;
ALTER TABLE p SET SCHEMA gs;
ALTER TABLE gs.p SET SCHEMA public;
ALTER TABLE IF EXISTS g5 SET SCHEMA nowhere;
DROP PUBLICATION one;
ALTER TABLE g2 SET SCHEMA gs;
ALTER TABLE gs.g2 SET SCHEMA public;
ALTER TABLE gs.g3 SET SCHEMA public;
DROP SCHEMA gs CASCADE;
DROP TABLE p, g, g2, g3, g4;
RESET client_min_messages;
-- ANALYZE of a parent draws from each partition what it is worth
CREATE TABLE p (context_id text, n int, filler text) PARTITION BY LIST (context_id);
CREATE TABLE p1 PARTITION OF p FOR VALUES IN ('a') USING event_store;
CREATE TABLE p2 PARTITION OF p FOR VALUES IN ('b') USING event_store;
CREATE TABLE p3 PARTITION OF p FOR VALUES IN ('c') USING event_store;
INSERT INTO p SELECT CASE WHEN i % 50 = 0 THEN 'a' WHEN i % 50 < 10 THEN 'b' ELSE 'c' END, i, repeat('x', 100) FROM generate_series(1, 50000) i;
SELECT event_store.flush('p2');
ANALYZE p;
SELECT v, round(f::numeric, 1) IN (0.0, 0.2, 0.8) AND round(f::numeric, 2) <> 0.33 AS right_share FROM
  (SELECT unnest(most_common_vals::text::text[]) v, unnest(most_common_freqs) f FROM pg_stats WHERE tablename = 'p' AND attname = 'context_id') x ORDER BY v;
SELECT reltuples FROM pg_class WHERE relname = 'p';
ANALYZE p1;
SELECT reltuples, relpages FROM pg_class WHERE relname = 'p1';
DROP TABLE p;
