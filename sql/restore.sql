-- Promise: rewrites, dumps and restores keep the order of events, their positions and versions, or are refused.
-- A restore's positions are small here: in an empty table any will do.

-- without a position role an event's place is the order in which it is stored again
CREATE TABLE rs_v (context_id text, version bigint, n int) USING event_store;
INSERT INTO rs_v (context_id, n) SELECT 'c' || i % 3, i FROM generate_series(1, 12) i;
SELECT event_store.flush('rs_v');
INSERT INTO rs_v (context_id, n) SELECT 'c' || i % 3, i FROM generate_series(13, 18) i;
CREATE FUNCTION rs_order(tab regclass) RETURNS text LANGUAGE plpgsql AS $$
DECLARE r text;
BEGIN
  EXECUTE format('CREATE TEMP TABLE rs_stored ON COMMIT DROP AS SELECT n FROM %s', tab);
  SELECT string_agg(n::text, ' ' ORDER BY ctid) INTO r FROM rs_stored;
  RETURN r;
END $$;
SELECT rs_order('rs_v');
VACUUM FULL rs_v;
SELECT rs_order('rs_v');
SELECT event_store.flush('rs_v');
INSERT INTO rs_v (context_id, n) SELECT 'c' || i % 3, i FROM generate_series(19, 21) i;
ALTER TABLE rs_v ALTER n TYPE bigint;
SELECT rs_order('rs_v');
SELECT count(*) FROM (SELECT version, row_number() OVER (PARTITION BY context_id ORDER BY n) AS v FROM rs_v) s WHERE v <> version;
-- what a dump writes: each version is the next one
CREATE TABLE rs_copy (context_id text, version bigint, n bigint) USING event_store;
INSERT INTO rs_copy SELECT * FROM rs_v;
SELECT rs_order('rs_copy');
COPY rs_copy (n) TO STDOUT;
COPY (SELECT n FROM rs_copy WHERE n > 18) TO STDOUT;
CREATE TABLE rs_neither (context_id text, n int) USING event_store;
INSERT INTO rs_neither SELECT 'a', i FROM generate_series(1, 5) i;
SELECT event_store.flush('rs_neither');
INSERT INTO rs_neither SELECT 'a', i FROM generate_series(6, 8) i;
BEGIN;
INSERT INTO rs_neither VALUES ('a', 9);
ALTER TABLE rs_neither ALTER n TYPE bigint;
COMMIT;
SELECT string_agg(payload->>'n', ' ') FROM event_store.replay('a', store => 'rs_neither');
-- a column that gets its role by the rewrite
CREATE TABLE rs_late (context_id text, position bigint, n int) USING event_store;
INSERT INTO rs_late (context_id, n) SELECT 'a', i FROM generate_series(1, 5) i;
SELECT event_store.flush('rs_late');
INSERT INTO rs_late (context_id, n) SELECT 'a', i FROM generate_series(6, 8) i;
\set VERBOSITY sqlstate
ALTER TABLE rs_late ADD COLUMN version bigint;
\set VERBOSITY default
ALTER TABLE rs_late ALTER n TYPE bigint;
SELECT n, version FROM rs_late ORDER BY position;

-- no two events have the same position
CREATE TABLE rs_p (context_id text, position bigint, n int) USING event_store;
INSERT INTO rs_p VALUES ('a', 5, 1), ('b', 5, 2);
INSERT INTO rs_p VALUES ('a', 7, 1), ('b', 6, 2), ('c', 7, 3);
INSERT INTO rs_p SELECT 'c' || i, 10000 - i % 4000, i FROM generate_series(0, 4000) i;
SELECT count(*) FROM rs_p;
BEGIN;
INSERT INTO rs_p SELECT 'c' || i, 2000 + i, i FROM generate_series(1, 1500) i;
SAVEPOINT s;
INSERT INTO rs_p SELECT 'c' || i, 4000 + i, i FROM generate_series(1, 1500) i;
SAVEPOINT t;
INSERT INTO rs_p SELECT 'c' || i, 6000 + i, i FROM generate_series(1, 10) i;
RELEASE t;
ROLLBACK TO s;
-- again, the other way round
INSERT INTO rs_p SELECT 'c' || i, 5501 - i, i FROM generate_series(1, 1500) i;
INSERT INTO rs_p SELECT 'c' || i, 6000 + i, i FROM generate_series(1, 10) i;
COMMIT;
SELECT count(*), count(DISTINCT position), min(position), max(position) FROM rs_p;
BEGIN;
SAVEPOINT s;
INSERT INTO rs_p VALUES ('a', 7001), ('b', 7000);
RELEASE s;
INSERT INTO rs_p VALUES ('a', 7001);
COMMIT;
SELECT max(position) FROM rs_p;
CREATE TABLE rs_heap (context_id text, position bigint, n int);
INSERT INTO rs_heap VALUES ('a', 5, 1), ('b', 4, 1), ('a', 5, 2);
ALTER TABLE rs_heap SET ACCESS METHOD event_store;
UPDATE rs_heap SET position = 6 WHERE n = 2;
ALTER TABLE rs_heap SET ACCESS METHOD event_store;
SELECT * FROM rs_heap ORDER BY position;

-- in a context versions grow with positions, without gaps
CREATE TABLE rs (context_id text, position bigint, version bigint, n int) USING event_store;
INSERT INTO rs VALUES ('a', 10, 2, 1), ('a', 11, 1, 2), ('a', 12, 9, 3);
INSERT INTO rs VALUES ('a', 10, 2, 1);
INSERT INTO rs VALUES ('a', 10, 1, 1), ('a', 11, 1, 1);
INSERT INTO rs VALUES ('a', 10, 1, 1), ('a', 11, 3, 1);
INSERT INTO rs VALUES ('b', 13, 1, 4), ('a', 12, 3, 3), ('a', 11, 2, 2), ('a', 10, 1, 1);
SELECT * FROM rs ORDER BY position;
INSERT INTO rs VALUES ('a', 20, 3, 5);
INSERT INTO rs VALUES ('a', 20, 5, 5);
INSERT INTO rs VALUES ('a', 12, 4, 5);
INSERT INTO rs VALUES ('a', 20, 4, 5);
-- without versions they are numbered as they come
INSERT INTO rs VALUES ('a', 32, NULL, 6), ('a', 31, NULL, 7);
INSERT INTO rs VALUES ('a', 32, NULL, 6), ('b', 31, NULL, 7), ('a', 33, NULL, 8);
INSERT INTO rs VALUES ('a', 40, NULL, 9), ('a', 41, 8, 9);
INSERT INTO rs VALUES ('a', 40, 7, 9), ('a', 41, NULL, 9);
SELECT * FROM rs ORDER BY position;
-- new events of the same transaction come behind restored ones
BEGIN;
INSERT INTO rs (context_id, n) VALUES ('a', 9);
INSERT INTO rs VALUES ('a', 50, 7, 10);
ROLLBACK;
BEGIN;
SAVEPOINT s;
INSERT INTO rs (context_id, n) VALUES ('a', 9);
ROLLBACK TO s;
INSERT INTO rs VALUES ('a', 50, 7, 10);
INSERT INTO rs (context_id, n) VALUES ('a', 11), ('b', 12);
INSERT INTO rs (context_id, version, n) VALUES ('a', 9, 13);
COMMIT;
SELECT context_id, CASE WHEN position <= 50 THEN position END AS position, version, n FROM rs ORDER BY rs.position;
BEGIN;
INSERT INTO rs VALUES ('c', (SELECT max(position) + 1 FROM rs), 1, 14);
INSERT INTO rs (context_id, version, n) VALUES ('c', 3, 15);
COMMIT;
SELECT event_store.flush('rs');
BEGIN;
INSERT INTO rs (context_id, n) VALUES ('a', 14), ('c', 15);
ALTER TABLE rs ALTER n TYPE bigint;
INSERT INTO rs (context_id, n) VALUES ('a', 16);
COMMIT;
SELECT context_id, version, n FROM rs ORDER BY position;
VACUUM FULL rs;
SELECT context_id, version, n FROM rs ORDER BY position;

-- the same when a transaction's events do not fit into memory: restored ones and new ones
CREATE TABLE rs_big (context_id text, position bigint, version bigint, n int, filler text) USING event_store;
INSERT INTO rs_big (context_id, n, filler) SELECT 'c' || i % 100, i, repeat(md5(i::text), 40) FROM generate_series(1, 20000) i;
BEGIN;
INSERT INTO rs_big (context_id, n, filler) SELECT 'c' || i % 150, i, repeat(md5(i::text), 40) FROM generate_series(20001, 40000) i;
SAVEPOINT s;
INSERT INTO rs_big (context_id, n) VALUES ('c1', -1);
ROLLBACK TO s;
ALTER TABLE rs_big ALTER n TYPE bigint;
INSERT INTO rs_big (context_id, n) SELECT 'c' || i, 40000 + i FROM generate_series(1, 200) i;
COMMIT;
CREATE FUNCTION rs_check(tab regclass) RETURNS text LANGUAGE plpgsql AS $$
DECLARE r text;
BEGIN
  EXECUTE format('SELECT concat_ws('' '', count(*), count(DISTINCT position), count(DISTINCT (context_id, version)),
      count(*) FILTER (WHERE v <> version OR w <> version))
    FROM (SELECT *, row_number() OVER (PARTITION BY context_id ORDER BY position) AS v,
      row_number() OVER (PARTITION BY context_id ORDER BY n) AS w FROM %s) s', tab) INTO r;
  RETURN r;
END $$;
SELECT rs_check('rs_big');
INSERT INTO rs_big (context_id, n) SELECT 'c' || i, 50000 + i FROM generate_series(1, 200) i;
SELECT rs_check('rs_big');
-- large restores in any order
CREATE TABLE rs_big2 (LIKE rs_big) USING event_store;
INSERT INTO rs_big2 SELECT * FROM rs_big ORDER BY md5(n::text);
SELECT rs_check('rs_big2');
BEGIN;
TRUNCATE rs_big2;
INSERT INTO rs_big2 SELECT * FROM rs_big ORDER BY md5(n::text);
\set VERBOSITY sqlstate
INSERT INTO rs_big2 SELECT * FROM rs_big WHERE n = 1234;
COMMIT;
\set VERBOSITY default
SELECT rs_check('rs_big2');
DROP TABLE rs_big, rs_big2;

-- to heap, with values that need a TOAST table
CREATE TABLE rs_toast (context_id text, n int, t text) USING event_store;
INSERT INTO rs_toast SELECT 'a', i, (SELECT string_agg(md5(k::text), '') FROM generate_series(i, i + 3000) k) FROM generate_series(1, 3) i;
CREATE TABLE rs_saved AS SELECT * FROM rs_toast;
BEGIN;
ALTER TABLE rs_toast SET ACCESS METHOD heap;
ROLLBACK;
SELECT amname, reltoastrelid <> 0 AS toast FROM pg_class c JOIN pg_am a ON a.oid = relam WHERE relname = 'rs_toast';
ALTER TABLE rs_toast SET ACCESS METHOD heap;
SELECT amname, reltoastrelid <> 0 AS toast FROM pg_class c JOIN pg_am a ON a.oid = relam WHERE relname = 'rs_toast';
SELECT count(*) FROM rs_toast JOIN rs_saved USING (context_id, n, t);
ALTER TABLE rs_toast SET ACCESS METHOD event_store;
SELECT amname, reltoastrelid <> 0 AS toast FROM pg_class c JOIN pg_am a ON a.oid = relam WHERE relname = 'rs_toast';
SELECT count(*) FROM rs_toast JOIN rs_saved USING (context_id, n, t);
ALTER TABLE rs_toast SET ACCESS METHOD heap;
SELECT count(*) FROM rs_toast JOIN rs_saved USING (context_id, n, t);
CREATE ROLE rs_other;
SET ROLE rs_other;
ALTER TABLE rs SET ACCESS METHOD heap;
RESET ROLE;
DROP ROLE rs_other;
-- a savepoint takes along what one that was released into it had noted, also when it notes some itself
CREATE TABLE rs_nested (position bigint, context_id text, n int) USING event_store;
BEGIN;
SAVEPOINT outer_one;
SAVEPOINT inner_one;
INSERT INTO rs_nested SELECT event_store.horizon('rs_nested') + i, 'a', i FROM generate_series(1, 2) i;
RELEASE inner_one;
INSERT INTO rs_nested SELECT event_store.horizon('rs_nested') + 3, 'a', 3;
ROLLBACK TO outer_one;
INSERT INTO rs_nested SELECT event_store.horizon('rs_nested') + i, 'a', i FROM generate_series(1, 3) i;
COMMIT;
SELECT n FROM rs_nested ORDER BY position;
-- nor does COMMIT look at a position that it has taken along
BEGIN;
INSERT INTO rs_nested SELECT event_store.horizon('rs_nested') + 1, 'a', 4;
SAVEPOINT s;
INSERT INTO rs_nested VALUES (1, 'a', 5);
ROLLBACK TO s;
INSERT INTO rs_nested VALUES ((1::bigint << 46) - 1, 'a', 6);
ROLLBACK TO s;
COMMIT;
SELECT n FROM rs_nested WHERE n > 3;
SELECT event_store.horizon('rs_nested') < (1::bigint << 46) AS not_moved;
DROP TABLE rs_nested;
DROP TABLE rs_v, rs_copy, rs_neither, rs_late, rs_p, rs_heap, rs, rs_toast, rs_saved;
DROP FUNCTION rs_order, rs_check;
