-- Promise: DDL means on an event table what it means on any other; positions and versions survive rewrites.
CREATE TABLE h (position bigint, context_id text, version bigint, event_type text, n int);
CREATE TABLE e (LIKE h) USING event_store;
INSERT INTO e (context_id, event_type, n) SELECT 'c' || i % 3, 't', i FROM generate_series(1, 30) i;
CREATE TABLE saved AS SELECT * FROM e;
CREATE FUNCTION same(tab regclass) RETURNS text LANGUAGE plpgsql AS $$
DECLARE r bigint;
BEGIN
  EXECUTE format('SELECT count(*) FROM (SELECT position, context_id, version, n FROM %s) a FULL JOIN saved s USING (position) WHERE a.n IS DISTINCT FROM s.n OR a.version IS DISTINCT FROM s.version OR a.context_id IS DISTINCT FROM s.context_id', tab) INTO r;
  RETURN CASE WHEN r = 0 THEN 'same' ELSE r || ' rows differ' END;
END $$;
-- to heap and back
ALTER TABLE e SET ACCESS METHOD heap;
SELECT amname FROM pg_class c JOIN pg_am a ON a.oid = c.relam WHERE c.relname = 'e';
SELECT same('e');
ALTER TABLE e SET ACCESS METHOD event_store;
SELECT same('e');
INSERT INTO e (context_id, n) VALUES ('c1', 100);
SELECT max(version), (SELECT version FROM e WHERE n = 100), (SELECT position FROM e WHERE n = 100) > (SELECT max(position) FROM saved) FROM saved WHERE context_id = 'c1';
DELETE FROM saved;
INSERT INTO saved SELECT * FROM e;
-- rewrites
ALTER TABLE e ALTER COLUMN n TYPE bigint;
SELECT same('e');
ALTER TABLE e ADD COLUMN r float8 DEFAULT random();
SELECT same('e'), (SELECT count(DISTINCT r) > 20 FROM e);
VACUUM FULL e;
SELECT same('e');
-- VACUUM FULL leaves the rows where they are: what columns that were added later have for them stays
ALTER TABLE e ADD COLUMN late int DEFAULT 7, ADD COLUMN later text DEFAULT 'x', DROP COLUMN r;
VACUUM FULL e;
VACUUM FULL e;
SELECT same('e'), (SELECT min(late) = 7 AND max(late) = 7 AND min(later) = 'x' AND count(later) = count(*) FROM e);
ALTER TABLE e DROP COLUMN late, DROP COLUMN later;
SELECT event_store.flush('e');
SELECT same('e');
VACUUM e;
VACUUM (FREEZE) e;
ANALYZE e;
SELECT reltuples FROM pg_class WHERE relname = 'e';
-- a rewrite of the transaction's own rows
BEGIN;
INSERT INTO e (context_id, n) VALUES ('c1', 101);
ALTER TABLE e ALTER COLUMN n TYPE int;
INSERT INTO e (context_id, n) VALUES ('c1', 102);
COMMIT;
SELECT version - (SELECT max(version) FROM saved WHERE context_id = 'c1') AS version, n FROM e WHERE n > 100 ORDER BY version;
-- rolled back
BEGIN;
ALTER TABLE e SET ACCESS METHOD heap;
ROLLBACK;
BEGIN;
SAVEPOINT s;
TRUNCATE e;
INSERT INTO e (context_id, n) VALUES ('c1', 1);
SELECT count(*) FROM e;
ROLLBACK TO s;
SELECT count(*) FROM e;
COMMIT;
BEGIN;
DROP TABLE e;
ROLLBACK;
SELECT count(*) FROM e;
-- TRUNCATE of a table made in the same transaction
BEGIN;
CREATE TABLE fresh (context_id text, n int) USING event_store;
INSERT INTO fresh VALUES ('a', 1);
TRUNCATE fresh;
INSERT INTO fresh VALUES ('a', 2);
COMMIT;
SELECT * FROM fresh;
-- roles: with rows a new role column is a plain one; without it gets the role
ALTER TABLE fresh ADD COLUMN position bigint;
INSERT INTO fresh (context_id, n) VALUES ('a', 3);
SELECT n, position FROM fresh ORDER BY n;
-- which keeps nobody from renaming other columns
\set VERBOSITY sqlstate
ALTER TABLE fresh RENAME COLUMN n TO m;
ALTER TABLE fresh RENAME COLUMN m TO n;
\set VERBOSITY default
TRUNCATE fresh;
INSERT INTO fresh (context_id, n) VALUES ('a', 4);
SELECT n, position IS NOT NULL AS has_position FROM fresh;
CREATE TABLE empty (context_id text, v bigint) USING event_store;
ALTER TABLE empty RENAME COLUMN v TO version;
INSERT INTO empty (context_id) VALUES ('a'), ('a');
SELECT version FROM empty ORDER BY 1;
SELECT context_id, "position", version, event_id, event_type FROM event_store.table_roles('fresh');
-- partitions: of event tables, and mixed with heap
CREATE TABLE p (position bigint, context_id text, version bigint, at date, n int) PARTITION BY RANGE (at);
CREATE TABLE p1 PARTITION OF p FOR VALUES FROM ('2026-01-01') TO ('2026-02-01') USING event_store;
CREATE TABLE p2 PARTITION OF p FOR VALUES FROM ('2026-02-01') TO ('2026-03-01');
CREATE TABLE p3 (LIKE p) USING event_store;
ALTER TABLE p ATTACH PARTITION p3 FOR VALUES FROM ('2026-03-01') TO ('2026-04-01');
INSERT INTO p (context_id, at, n) SELECT 'x', '2026-01-01'::date + i, i FROM generate_series(0, 89) i;
SELECT tableoid::regclass, count(*), max(version) FROM p GROUP BY 1 ORDER BY 1;
UPDATE p SET n = 1 WHERE at >= '2026-03-01';
UPDATE p2 SET n = 1;
ALTER TABLE p DETACH PARTITION p1;
SELECT count(*) FROM p1;
-- inheritance
CREATE TABLE parent (context_id text, n int) USING event_store;
CREATE TABLE child (extra text) INHERITS (parent) USING event_store;
INSERT INTO parent VALUES ('a', 1);
INSERT INTO child VALUES ('a', 2, 'e');
SELECT tableoid::regclass, n FROM parent ORDER BY n;
SELECT count(*) FROM ONLY parent;
-- CTAS, LIKE, views, constraints, defaults, generated columns
CREATE TABLE ctas USING event_store AS SELECT 'c' || i % 2 AS context_id, i AS n FROM generate_series(1, 10) i;
SELECT context_id, count(*) FROM ctas GROUP BY 1 ORDER BY 1;
CREATE TABLE con (context_id text, n int CHECK (n > 0), d int DEFAULT 5, g int GENERATED ALWAYS AS (n * 2) STORED) USING event_store;
INSERT INTO con (context_id, n) VALUES ('a', 0);
INSERT INTO con (context_id, n) VALUES ('a', 3);
SELECT * FROM con;
ALTER TABLE con ADD CONSTRAINT more CHECK (n > 2), ALTER COLUMN n SET NOT NULL;
ALTER TABLE con ADD CONSTRAINT even_more CHECK (n > 5);
-- a transaction that drops what it wrote to
BEGIN;
CREATE TABLE dropped (context_id text, version bigint) USING event_store;
INSERT INTO dropped VALUES ('a');
DROP TABLE dropped;
COMMIT;
-- privileges and row security
CREATE ROLE regress_reader;
GRANT SELECT ON e TO regress_reader;
SET ROLE regress_reader;
SELECT count(*) > 0 AS can_read FROM e;
SELECT count(*) > 0 AS can_replay FROM event_store.replay('c1', store => 'e');
INSERT INTO e (context_id) VALUES ('a');
SELECT event_store.append('a', 'x', NULL, store => 'e');
SELECT event_store.flush();
SELECT count(*) FROM event_store.events;
SELECT count(*) FROM event_store.stat_shards;
RESET ROLE;
ALTER TABLE e ENABLE ROW LEVEL SECURITY;
CREATE POLICY only_c1 ON e FOR SELECT TO regress_reader USING (context_id = 'c1');
SET ROLE regress_reader;
SELECT DISTINCT context_id FROM e;
SELECT count(*) FROM event_store.replay('c2', store => 'e');
SELECT count(*) = (SELECT count(*) FROM e) AS replayed FROM event_store.replay('c1', store => 'e');
SELECT DISTINCT context_id FROM event_store.read_all(store => 'e');
RESET ROLE;
DROP POLICY only_c1 ON e;
REVOKE ALL ON e FROM regress_reader;
DROP ROLE regress_reader;
-- a publication carries none of the rows
SET client_min_messages = error; -- PostgreSQL's own about wal_level
CREATE PUBLICATION pub;
CREATE PUBLICATION pub_heap;
SET client_min_messages = warning;
ALTER PUBLICATION pub ADD TABLE e, h;
ALTER PUBLICATION pub_heap ADD TABLE h;
DROP PUBLICATION pub, pub_heap;
RESET client_min_messages;
DROP FUNCTION same;
DROP TABLE h, e, saved, fresh, empty, p, p1, parent, child, ctas, con;
