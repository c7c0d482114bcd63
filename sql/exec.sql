-- Promise: whatever the executor does with a table it does with an event table: cursors, triggers, foreign keys, COPY, prepared
-- statements, parallel plans, joins that come back for rows.
CREATE TABLE x (position bigint, context_id text, version bigint, n int) USING event_store;
INSERT INTO x (context_id, n) SELECT 'c' || i % 5, i FROM generate_series(1, 100) i;
-- cursors, also backwards, also over a flush
BEGIN;
DECLARE c SCROLL CURSOR FOR SELECT n FROM x;
FETCH 3 FROM c;
FETCH BACKWARD 2 FROM c;
SELECT event_store.flush('x');
FETCH FORWARD 2 FROM c;
MOVE FORWARD ALL IN c;
FETCH BACKWARD 2 FROM c;
FETCH FIRST FROM c;
FETCH ABSOLUTE 50 FROM c;
FETCH LAST FROM c;
FETCH NEXT FROM c;
FETCH PRIOR FROM c;
COMMIT;
BEGIN;
DECLARE h CURSOR WITH HOLD FOR SELECT n FROM x ORDER BY n;
FETCH 2 FROM h;
COMMIT;
FETCH 2 FROM h;
CLOSE h;
-- triggers
CREATE TABLE log (what text, n int, has_version bool);
CREATE FUNCTION trig() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_LEVEL = 'STATEMENT' THEN INSERT INTO log SELECT TG_WHEN || ' ' || TG_LEVEL || ' ' || (SELECT count(*) FROM new_rows); RETURN NULL; END IF;
  IF TG_WHEN = 'BEFORE' THEN
    IF NEW.n = -1 THEN RETURN NULL; END IF;
    NEW.n := NEW.n + 1000;
  END IF;
  INSERT INTO log VALUES (TG_WHEN || ' ' || TG_LEVEL, NEW.n, NEW.version IS NOT NULL);
  RETURN NEW;
END $$;
CREATE TRIGGER b BEFORE INSERT ON x FOR EACH ROW EXECUTE FUNCTION trig();
CREATE TRIGGER a AFTER INSERT ON x FOR EACH ROW EXECUTE FUNCTION trig();
CREATE TRIGGER s AFTER INSERT ON x REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION trig();
CREATE CONSTRAINT TRIGGER d AFTER INSERT ON x DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION trig();
BEGIN;
INSERT INTO x (context_id, n) VALUES ('t', 1), ('t', -1), ('t', 2) RETURNING n, version;
SELECT * FROM log;
COMMIT;
SELECT * FROM log;
SELECT version, n FROM x WHERE context_id = 't' ORDER BY version;
TRUNCATE log;
BEGIN;
SAVEPOINT s;
INSERT INTO x (context_id, n) VALUES ('t', 5);
ROLLBACK TO s;
INSERT INTO x (context_id, n) VALUES ('t', 6);
COMMIT;
SELECT * FROM log;
DROP TRIGGER b ON x; DROP TRIGGER a ON x; DROP TRIGGER s ON x; DROP TRIGGER d ON x;
-- foreign keys to heap tables
CREATE TABLE customer (id int PRIMARY KEY);
INSERT INTO customer VALUES (1), (2);
CREATE TABLE fk (context_id text, customer int REFERENCES customer, later int REFERENCES customer DEFERRABLE INITIALLY DEFERRED) USING event_store;
INSERT INTO fk VALUES ('a', 1, 2);
INSERT INTO fk VALUES ('a', 3, 2);
INSERT INTO fk VALUES ('a', 1, 3);
BEGIN;
INSERT INTO fk VALUES ('a', 1, 3);
INSERT INTO customer VALUES (3);
COMMIT;
DELETE FROM customer WHERE id = 1;
SELECT * FROM fk ORDER BY later;
-- COPY both ways
COPY (SELECT context_id, n FROM x WHERE n <= 3 ORDER BY n) TO STDOUT;
COPY x (context_id, n) FROM STDIN;
copied	1
copied	2
\.
SELECT version, n FROM x WHERE context_id = 'copied' ORDER BY version;
-- prepared statements
PREPARE ins (text, int) AS INSERT INTO x (context_id, n) VALUES ($1, $2);
EXECUTE ins ('prep', 1);
EXECUTE ins ('prep', 2);
PREPARE sel (text) AS SELECT n, version FROM x WHERE context_id = $1 ORDER BY version;
EXECUTE sel ('prep');
-- joins that refetch a row by its ctid; own and committed
CREATE TABLE target (n int, v text);
INSERT INTO target VALUES (1, 'old'), (2, 'old');
UPDATE target SET v = x.context_id FROM x WHERE x.n = target.n AND x.context_id <> 'copied' AND x.context_id <> 'prep' RETURNING target.n, target.v;
SELECT n FROM x WHERE ctid = (SELECT ctid FROM x WHERE n = 42);
-- parallel plans see the transaction's own rows, also inside a savepoint
SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0;
SET max_parallel_workers_per_gather = 2;
BEGIN;
INSERT INTO x (context_id, n) SELECT 'par', 10000 + i FROM generate_series(1, 1000) i;
SAVEPOINT s1;
INSERT INTO x (context_id, n) SELECT 'par', 20000 + i FROM generate_series(1, 1000) i;
SELECT count(*), sum(n) FROM x WHERE n >= 10000;
ROLLBACK TO s1;
SAVEPOINT s2;
INSERT INTO x (context_id, n) SELECT 'par', 30000 + i FROM generate_series(1, 10) i;
SELECT count(*), sum(n) FROM x WHERE n >= 10000;
COMMIT;
SELECT count(*), sum(n), max(version) FROM x WHERE context_id = 'par';
-- so do workers in scans that know of no others: the inner side of a join, a query in a function
CREATE TABLE outer_side (id int);
INSERT INTO outer_side SELECT generate_series(1, 20000);
ANALYZE outer_side;
CREATE TABLE inner_side (context_id text, k int) USING event_store WITH (parallel_workers = 0);
CREATE TABLE inner_side2 (context_id text, k int) USING event_store WITH (parallel_workers = 0);
INSERT INTO inner_side SELECT 'c' || i, i FROM generate_series(1, 5) i;
ANALYZE inner_side;
CREATE FUNCTION rows_in_function(tab text) RETURNS bigint LANGUAGE plpgsql STABLE PARALLEL SAFE AS $$
DECLARE r bigint;
BEGIN
  EXECUTE format('SELECT count(*) FROM %I', tab) INTO r;
  RETURN r;
END $$;
SET enable_parallel_hash = off; SET enable_mergejoin = off; SET enable_nestloop = off;
SET parallel_leader_participation = off;
BEGIN;
INSERT INTO inner_side VALUES ('own', 1);
SAVEPOINT s;
INSERT INTO inner_side SELECT 'd' || i, i FROM generate_series(1, 200) i;
INSERT INTO inner_side2 SELECT 'd' || i, i FROM generate_series(1, 200) i;
SELECT count(*) FROM outer_side JOIN inner_side ON id = k;
ROLLBACK TO s;
INSERT INTO inner_side2 VALUES ('own', 2), ('own', 3);
EXPLAIN (COSTS OFF) SELECT count(*) FROM outer_side JOIN inner_side ON id = k;
SELECT count(*) FROM outer_side JOIN inner_side ON id = k;
SELECT count(*) FROM outer_side JOIN inner_side2 ON id = k;
SELECT rows_in_function('inner_side') AS one, rows_in_function('inner_side2') AS two, count(*) FROM outer_side
  WHERE id <= 20 AND id % 2 = rows_in_function('inner_side') % 2 GROUP BY 1, 2;
-- a query that fails leaves nothing behind for the next
SAVEPOINT s;
SELECT count(*) FROM outer_side JOIN inner_side ON id = k WHERE 1 / (id - 3) > 7;
ROLLBACK TO s;
SAVEPOINT s;
INSERT INTO inner_side SELECT 'd' || i, i FROM generate_series(1, 200) i;
SELECT count(*) FROM outer_side JOIN inner_side ON id = k;
ROLLBACK TO s;
SELECT count(*) FROM outer_side JOIN inner_side ON id = k;
COMMIT;
SELECT count(*) FROM outer_side JOIN inner_side ON id = k;
DROP TABLE outer_side, inner_side, inner_side2;
DROP FUNCTION rows_in_function;
RESET ALL;
-- own rows by their ctid, in workers too: those that the query's snapshot sees
CREATE TABLE byplace (context_id text, k int) USING event_store WITH (parallel_workers = 0);
INSERT INTO byplace SELECT 'c' || i, i FROM generate_series(1, 5000) i;
ANALYZE byplace;
CREATE TABLE places (place tid);
BEGIN;
INSERT INTO byplace VALUES ('own', 6), ('own', 7);
INSERT INTO places SELECT ctid FROM byplace WHERE k < 8;
ANALYZE places;
SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off; SET LOCAL enable_material = off;
SET LOCAL parallel_setup_cost = 0; SET LOCAL parallel_tuple_cost = 0; SET LOCAL min_parallel_table_scan_size = 0;
EXPLAIN (COSTS OFF) SELECT k FROM places JOIN byplace ON byplace.ctid = place;
SELECT count(*), sum(k) FROM places JOIN byplace ON byplace.ctid = place;
SET LOCAL parallel_leader_participation = off;
SELECT count(*), sum(k) FROM places JOIN byplace ON byplace.ctid = place;
WITH w AS (INSERT INTO byplace VALUES ('cte', 9) RETURNING ctid) SELECT b.* FROM w JOIN byplace b ON b.ctid = w.ctid;
COMMIT;
DROP TABLE places, byplace;
-- what is dead costs no memory for each scan of a query
CREATE TABLE rescanned (context_id text, n int) USING event_store;
BEGIN;
DO $$
BEGIN
  FOR i IN 1 .. 300 LOOP
    BEGIN
      INSERT INTO rescanned VALUES ('c', i);
      IF (SELECT count(*) FROM rescanned) <> 1 THEN RAISE WARNING 'other rows'; END IF;
      RAISE EXCEPTION 'rolled back';
    EXCEPTION WHEN raise_exception THEN NULL;
    END;
  END LOOP;
END $$;
INSERT INTO rescanned VALUES ('c', 1);
SET LOCAL enable_material = off; SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off;
SELECT scans, (SELECT max(total_bytes) FROM pg_backend_memory_contexts WHERE name = 'ExecutorState' AND scans > 0) < 1000000 AS little
  FROM (SELECT count(*) AS scans FROM generate_series(1, 2000) g, LATERAL (SELECT n FROM rescanned WHERE n <> g OFFSET 0) r) s;
ROLLBACK;
DROP TABLE rescanned;
-- sampling, counting, statistics
ANALYZE x;
SELECT reltuples = (SELECT count(*) FROM x) AS reltuples FROM pg_class WHERE relname = 'x';
SELECT n_distinct FROM pg_stats WHERE tablename = 'x' AND attname = 'context_id';
SELECT count(*) BETWEEN 1 AND 1300 AS sampled FROM x TABLESAMPLE BERNOULLI (50) REPEATABLE (1);
SELECT count(*) = (SELECT count(*) FROM x) AS all_sampled FROM x TABLESAMPLE SYSTEM (100);
EXPLAIN (COSTS OFF) SELECT * FROM x WHERE n = 1;
SELECT event_store.relation_size('x') > 8192 AS has_size;
-- writable CTEs, INSERT ... SELECT from itself, self joins, correlated subqueries
WITH w AS (INSERT INTO x (context_id, n) VALUES ('cte', 1), ('cte', 2) RETURNING n) SELECT sum(n) FROM w;
INSERT INTO x (context_id, n) SELECT context_id, n + 10 FROM x WHERE context_id = 'cte';
SELECT a.n, (SELECT max(b.n) FROM x b WHERE b.context_id = a.context_id) AS m FROM x a WHERE a.context_id = 'cte' ORDER BY 1;
-- an error in a deferred constraint at COMMIT
CREATE TABLE uniq (n int UNIQUE DEFERRABLE INITIALLY DEFERRED);
BEGIN;
INSERT INTO x (context_id, n) VALUES ('deferred', 1);
INSERT INTO uniq VALUES (1), (1);
COMMIT;
SELECT count(*) FROM x WHERE context_id = 'deferred';
DROP TABLE x, log, fk, customer, target, uniq;
DROP FUNCTION trig;

-- who stores again what a cursor or a function reads finds it in its order, also in a table without position
CREATE TABLE ex_v (context_id text, version bigint, n int) USING event_store;
INSERT INTO ex_v (context_id, n) SELECT 'a', g FROM generate_series(1, 7) g;
SELECT event_store.flush();
INSERT INTO ex_v (context_id, n) SELECT 'a', g FROM generate_series(8, 9) g;
BEGIN;
DECLARE ex_c NO SCROLL CURSOR FOR SELECT * FROM ONLY ex_v;
FETCH 8 FROM ex_c;
FETCH 8 FROM ex_c;
ROLLBACK;
CREATE FUNCTION ex_rows() RETURNS SETOF ex_v LANGUAGE plpgsql AS $$ BEGIN RETURN QUERY SELECT * FROM ex_v; END $$;
CREATE TABLE ex_v2 (LIKE ex_v) USING event_store;
INSERT INTO ex_v2 (context_id, n) SELECT context_id, n FROM ex_rows();
DO $$
DECLARE r record;
BEGIN
	FOR r IN SELECT * FROM ex_v LOOP
		INSERT INTO ex_v2 (context_id, n) VALUES ('b', r.n);
	END LOOP;
END $$;
SELECT context_id, string_agg(n::text, ' ' ORDER BY version) FROM ex_v2 GROUP BY 1 ORDER BY 1;
DROP FUNCTION ex_rows;
DROP TABLE ex_v, ex_v2;
-- a cursor that goes back row by row over more than work_mem takes a step for each, not all from the beginning
CREATE TABLE scroll_far (context_id text, n int) USING event_store;
INSERT INTO scroll_far SELECT 'a', i FROM generate_series(1, 60000) i;
SET work_mem = '64kB';
SET statement_timeout = '30s';
DO $$
DECLARE
  c SCROLL CURSOR FOR SELECT n FROM scroll_far;
  r int;
  expected int := 60000;
BEGIN
  OPEN c;
  MOVE LAST IN c;
  LOOP
    FETCH PRIOR FROM c INTO r;
    EXIT WHEN NOT FOUND;
    expected := expected - 1;
    IF r <> expected THEN RAISE 'row % instead of %', r, expected; END IF;
  END LOOP;
  RAISE NOTICE 'first: %', expected;
END $$;
RESET statement_timeout;
RESET work_mem;
DROP TABLE scroll_far;
