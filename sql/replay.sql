-- Promise: replay gives one context in order, read_all gives everything in the global order up to the horizon, both with rows in
-- memory, in segments and in both.
CREATE TABLE r (position bigint, context_id int, version bigint, event_type text, recorded_at timestamptz, payload jsonb) USING event_store;
INSERT INTO r (context_id, event_type, recorded_at, payload)
  SELECT i % 10, (ARRAY['a','b','c'])[1 + i % 3], '2026-01-01 00:00+00'::timestamptz + i * interval '1 min', jsonb_build_object('i', i)
  FROM generate_series(0, 999) i;
CREATE FUNCTION check_all() RETURNS TABLE (what text, ok boolean) LANGUAGE sql AS $$
  SELECT 'replay in order', bool_and(version = rn AND (payload->>'i')::int = 3 + (rn - 1) * 10) FROM (SELECT *, row_number() OVER () AS rn FROM event_store.replay('3', store => 'r')) s WHERE rn <= 100
  UNION ALL SELECT 'replay backward', (SELECT array_agg(version) FROM event_store.replay('3', backward => true, store => 'r')) = (SELECT array_agg(version ORDER BY version DESC) FROM r WHERE context_id = 3)
  UNION ALL SELECT 'versions', (SELECT array_agg(version) FROM event_store.replay('3', from_version => 5, to_version => 7, store => 'r')) = '{5,6,7}'
  UNION ALL SELECT 'max_count', (SELECT array_agg(version) FROM event_store.replay('3', max_count => 2, store => 'r')) = '{1,2}'
  UNION ALL SELECT 'backward max_count', (SELECT count(*) = 2 AND max(version) = (SELECT max(version) FROM r WHERE context_id = 3) FROM event_store.replay('3', backward => true, max_count => 2, store => 'r'))
  UNION ALL SELECT 'event_type', (SELECT count(*) FROM event_store.replay('3', event_type => 'a', store => 'r')) = (SELECT count(*) FROM r WHERE context_id = 3 AND event_type = 'a')
  UNION ALL SELECT 'since', (SELECT count(*) FROM event_store.replay('3', since => '2026-01-01 10:00+00', store => 'r')) = (SELECT count(*) FROM r WHERE context_id = 3 AND recorded_at >= '2026-01-01 10:00+00')
  UNION ALL SELECT 'no such context', (SELECT count(*) FROM event_store.replay('77', store => 'r')) = 0
  UNION ALL SELECT 'no rows wanted', (SELECT count(*) FROM event_store.replay('3', max_count => 0, store => 'r')) = 0
  UNION ALL SELECT 'read_all in order', (SELECT array_agg(position) FROM event_store.read_all(store => 'r')) = (SELECT array_agg(position ORDER BY position) FROM r)
  UNION ALL SELECT 'read_all after', (SELECT count(*) FROM event_store.read_all(after => (SELECT position FROM r ORDER BY position OFFSET 99 LIMIT 1), store => 'r')) = (SELECT count(*) - 100 FROM r)
  UNION ALL SELECT 'read_all in pages', (WITH RECURSIVE p(n, last) AS (
      SELECT 0::bigint, 0::bigint UNION ALL
      SELECT p.n + x.n, x.last FROM p CROSS JOIN LATERAL (SELECT count(*) AS n, max(position) AS last FROM event_store.read_all(after => p.last, max_count => 37, store => 'r')) x WHERE x.n > 0)
      SELECT max(n) FROM p) = (SELECT count(*) FROM r)
  UNION ALL SELECT 'read_all types', (SELECT count(*) FROM event_store.read_all(event_types => '{a,c}', store => 'r')) = (SELECT count(*) FROM r WHERE event_type IN ('a', 'c'))
  UNION ALL SELECT 'read_all no type', (SELECT count(*) FROM event_store.read_all(event_types => '{}', store => 'r')) = 0
$$;
SELECT * FROM check_all() WHERE ok IS NOT TRUE;
SELECT event_store.flush('r');
SELECT segment_rows, memtable_rows FROM event_store.stat_tables WHERE store = 'r'::regclass;
SELECT * FROM check_all() WHERE ok IS NOT TRUE;
INSERT INTO r (context_id, event_type, recorded_at, payload)
  SELECT i % 10, (ARRAY['a','b','c'])[1 + i % 3], '2026-01-01 00:00+00'::timestamptz + i * interval '1 min', jsonb_build_object('i', i)
  FROM generate_series(1000, 1999) i;
SELECT * FROM check_all() WHERE ok IS NOT TRUE;
SELECT event_store.flush();
SELECT * FROM check_all() WHERE ok IS NOT TRUE;
-- read_all leaves own uncommitted rows out, replay shows them last
BEGIN;
INSERT INTO r (context_id, event_type, payload) VALUES (3, 'own', '{"i": -1}');
SELECT count(*) FROM event_store.read_all(store => 'r');
SELECT version, event_type FROM event_store.replay('3', store => 'r') OFFSET 199;
SELECT version, event_type FROM event_store.replay('3', backward => true, max_count => 2, store => 'r');
ROLLBACK;
-- the same shard for the same context, whatever the type's width
CREATE TABLE r8 (context_id bigint) USING event_store;
SELECT count(*) FROM generate_series(1, 100) i WHERE event_store.shard_of(i::text, 'r') <> event_store.shard_of(i::text, 'r8');
CALL event_store.wait_for_events(after => 0, store => 'r', found => NULL);
CALL event_store.wait_for_events(after => 0, context_id => '3', store => 'r', found => NULL);
CALL event_store.wait_for_events(context_id => '3', timeout => '10 ms', store => 'r', found => NULL);
CALL event_store.wait_for_events(timeout => '10 ms', store => 'r', found => NULL);
DROP FUNCTION check_all;
DROP TABLE r, r8;

-- under row security own rows, which have no position yet, lie behind all others, backward before them
CREATE TABLE rp_own (position bigint, context_id text, n int) USING event_store;
ALTER TABLE rp_own ENABLE ROW LEVEL SECURITY;
ALTER TABLE rp_own FORCE ROW LEVEL SECURITY;
CREATE POLICY rp_all ON rp_own USING (true);
CREATE ROLE rp_reader;
GRANT SELECT, INSERT ON rp_own TO rp_reader;
GRANT USAGE ON SCHEMA event_store TO rp_reader;
INSERT INTO rp_own (context_id, n) SELECT 'a', g FROM generate_series(1, 3) g;
SET ROLE rp_reader;
BEGIN;
INSERT INTO rp_own (context_id, n) SELECT 'a', g FROM generate_series(4, 9) g;
SELECT string_agg(payload ->> 'n', ' ') FROM event_store.replay('a', store => 'rp_own');
SELECT string_agg(payload ->> 'n', ' ') FROM event_store.replay('a', backward => true, store => 'rp_own');
SELECT string_agg(payload ->> 'n', ' ') FROM event_store.replay('a', backward => true, max_count => 2, store => 'rp_own');
COMMIT;
RESET ROLE;
DROP TABLE rp_own;
REVOKE USAGE ON SCHEMA event_store FROM rp_reader;
DROP ROLE rp_reader;
