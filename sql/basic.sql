-- Promise: what is inserted is what is read, in the order of commit, with versions 1, 2, 3 ... per context;
-- what is rolled back never happened.
-- who made the schema before owns what is called in it
CREATE SCHEMA event_store;
CREATE FUNCTION event_store.theirs(regclass, oid) RETURNS boolean LANGUAGE sql AS 'SELECT true';
CREATE OPERATOR event_store.= (LEFTARG = regclass, RIGHTARG = oid, FUNCTION = event_store.theirs);
\set VERBOSITY terse
CREATE EXTENSION event_store;
\set VERBOSITY default
SET client_min_messages = warning;
DROP SCHEMA event_store CASCADE;
RESET client_min_messages;
CREATE EXTENSION event_store;
CREATE TABLE ev (position bigint, context_id text NOT NULL, version bigint, event_type text, n int, payload jsonb) USING event_store;

INSERT INTO ev (context_id, event_type, n, payload) VALUES
  ('a', 'opened', 1, '{"x": 1}'), ('b', 'opened', 2, NULL), ('a', 'changed', 3, '{"x": 2}')
RETURNING position, context_id, version, n;
SELECT context_id, version, event_type, n, payload FROM ev ORDER BY position;
-- positions grow with the order of statements
SELECT bool_and(ok) FROM (SELECT position > lag(position, 1, 0::bigint) OVER (ORDER BY n) AS ok FROM ev) s;

-- own rows are visible to later commands, without position and version
BEGIN;
INSERT INTO ev (context_id, event_type, n) VALUES ('a', 'closed', 4);
SELECT context_id, version, position, n FROM ev WHERE n = 4;
ROLLBACK;
SELECT count(*) FROM ev WHERE n = 4;

-- a command does not see its own rows
BEGIN;
INSERT INTO ev (context_id, n) SELECT 'self', count(*) FROM ev;
INSERT INTO ev (context_id, n) SELECT 'self', count(*) FROM ev;
SELECT n FROM ev WHERE context_id = 'self' ORDER BY n;
COMMIT;

-- savepoints: a tree in which only some branches live
BEGIN;
INSERT INTO ev (context_id, n) VALUES ('tree', 1);
SAVEPOINT a;
INSERT INTO ev (context_id, n) VALUES ('tree', 2);
SAVEPOINT b;
INSERT INTO ev (context_id, n) VALUES ('tree', 3);
SELECT count(*) FROM ev WHERE context_id = 'tree';
ROLLBACK TO b;
INSERT INTO ev (context_id, n) VALUES ('tree', 4);
RELEASE a;
SAVEPOINT c;
INSERT INTO ev (context_id, n) VALUES ('tree', 5);
SELECT array_agg(n ORDER BY n) FROM ev WHERE context_id = 'tree';
ROLLBACK TO c;
SAVEPOINT d;
INSERT INTO ev (context_id, n) VALUES ('tree', 6);
SELECT array_agg(n ORDER BY n) FROM ev WHERE context_id = 'tree';
ROLLBACK TO d;
INSERT INTO ev (context_id, n) VALUES ('tree', 7);
COMMIT;
SELECT version, n FROM ev WHERE context_id = 'tree' ORDER BY position;

-- everything rolled back to a savepoint: nothing is left, and the transaction commits
BEGIN;
SAVEPOINT s;
INSERT INTO ev (context_id, n) VALUES ('gone', 1);
SELECT count(*) FROM ev WHERE context_id = 'gone';
ROLLBACK TO s;
COMMIT;
SELECT count(*) FROM ev WHERE context_id = 'gone';

-- PL/pgSQL: an exception block is a savepoint
DO $$
BEGIN
  FOR i IN 1..5 LOOP
    BEGIN
      INSERT INTO ev (context_id, n) VALUES ('plpgsql', i);
      IF i % 2 = 0 THEN RAISE EXCEPTION 'no'; END IF;
    EXCEPTION WHEN raise_exception THEN NULL;
    END;
  END LOOP;
END $$;
SELECT version, n FROM ev WHERE context_id = 'plpgsql' ORDER BY version;

-- heap and events in one transaction
CREATE TABLE side (n int);
BEGIN;
INSERT INTO side VALUES (1);
INSERT INTO ev (context_id, n) VALUES ('mixed', 1);
ROLLBACK;
SELECT (SELECT count(*) FROM side), (SELECT count(*) FROM ev WHERE context_id = 'mixed');
BEGIN;
INSERT INTO side VALUES (1);
INSERT INTO ev (context_id, n) VALUES ('mixed', 1);
COMMIT;
SELECT (SELECT count(*) FROM side), (SELECT count(*) FROM ev WHERE context_id = 'mixed');

-- expected versions through INSERT: head + 1 or 23505
INSERT INTO ev (context_id, version, n) VALUES ('exp', 1, 1);
INSERT INTO ev (context_id, version, n) VALUES ('exp', 1, 2);
INSERT INTO ev (context_id, version, n) VALUES ('exp', 3, 2);
INSERT INTO ev (context_id, version, n) VALUES ('exp', 2, 2), ('exp', 3, 3);
INSERT INTO ev (context_id, version, n) VALUES ('exp', 0, 2);
SELECT version, n FROM ev WHERE context_id = 'exp' ORDER BY version;
\set VERBOSITY terse

-- the same after a flush, with rows in segments and in memory
SELECT event_store.flush('ev');
SELECT segment_rows, memtable_rows FROM event_store.stat_tables WHERE store = 'ev'::regclass;
INSERT INTO ev (context_id, version, n) VALUES ('exp', 3, 4);
INSERT INTO ev (context_id, version, n) VALUES ('exp', 4, 4);
SELECT version, n FROM ev WHERE context_id = 'exp' ORDER BY version;
SELECT context_id, array_agg(version ORDER BY position) FROM ev GROUP BY 1 ORDER BY context_id COLLATE "C";
SELECT bool_and(ok) FROM (SELECT position > lag(position, 1, 0::bigint) OVER (PARTITION BY context_id ORDER BY version) AS ok FROM ev) s;

-- the horizon is above everything that is committed and visible
SELECT event_store.horizon('ev') > max(position) FROM ev;

-- TRUNCATE begins anew: versions too
TRUNCATE ev;
SELECT count(*) FROM ev;
INSERT INTO ev (context_id, n) VALUES ('a', 1);
SELECT version, n FROM ev;
BEGIN;
TRUNCATE ev;
SELECT count(*) FROM ev;
ROLLBACK;
SELECT count(*) FROM ev;
DROP TABLE ev;
DROP TABLE side;
