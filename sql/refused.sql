-- Promise: what an event table cannot do is refused with feature_not_supported and a hint, whether or not it has rows.
CREATE TABLE refuse_me (position bigint, context_id text, version bigint, event_id uuid, event_type text, n int) USING event_store;
UPDATE refuse_me SET n = 1;
DELETE FROM refuse_me;
INSERT INTO refuse_me (context_id) VALUES ('a') ON CONFLICT DO NOTHING;
SELECT * FROM refuse_me FOR UPDATE;
SELECT * FROM refuse_me FOR SHARE;
CREATE INDEX ON refuse_me (n);
CREATE UNIQUE INDEX ON refuse_me (n);
ALTER TABLE refuse_me ADD PRIMARY KEY (context_id);
-- (its message names a transient table)
\set VERBOSITY sqlstate
ALTER TABLE refuse_me SET UNLOGGED;
\set VERBOSITY default
ALTER TABLE refuse_me ALTER COLUMN position SET NOT NULL;
ALTER TABLE refuse_me ALTER COLUMN version SET NOT NULL;
ALTER TABLE refuse_me DROP COLUMN context_id;
MERGE INTO refuse_me r USING (VALUES (1)) v(n) ON r.n = v.n WHEN MATCHED THEN UPDATE SET n = 2;
CREATE TEMP TABLE t (context_id text) USING event_store;
CREATE UNLOGGED TABLE t (context_id text) USING event_store;
CREATE TABLE t (id text) USING event_store;
CREATE TABLE t (context_id numeric) USING event_store;
CREATE TABLE t (context_id jsonb) USING event_store;
CREATE TABLE t (context_id text, position bigint NOT NULL) USING event_store;
CREATE TABLE t (context_id text, n int UNIQUE) USING event_store;
CREATE MATERIALIZED VIEW t USING event_store AS SELECT 'a'::text AS context_id;
INSERT INTO refuse_me (context_id) VALUES (NULL);
INSERT INTO refuse_me (context_id, position) VALUES ('a', -1);
INSERT INTO refuse_me (context_id, n) VALUES ('a', 1);
UPDATE refuse_me SET n = 1;
DELETE FROM refuse_me;
ALTER TABLE refuse_me RENAME COLUMN version TO v;
ALTER TABLE refuse_me RENAME COLUMN n TO m;
-- positions only above what is there
\set VERBOSITY sqlstate
INSERT INTO refuse_me (context_id, position) SELECT 'b', max(position) FROM refuse_me;
\set VERBOSITY default
BEGIN;
INSERT INTO refuse_me (context_id, m) VALUES ('a', 2);
PREPARE TRANSACTION 'p';
SELECT count(*) FROM refuse_me;
SELECT event_store.append('a', 'x', '{}', store => 'pg_class');
SELECT event_store.append(NULL, 'x', '{}');
SELECT event_store.append('a', 'x', '{}', expected_version => -2);
SELECT event_store.append('a', 'x', '{}', store => 'refuse_me');
SELECT event_store.replay('a', since => now(), store => 'refuse_me');
SELECT event_store.pause_shard(99);
BEGIN;
CALL event_store.wait_for_events(timeout => '1 s');
ROLLBACK;
DROP TABLE refuse_me;
