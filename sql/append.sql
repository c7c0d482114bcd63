-- Promise: append() settles version and idempotency before it returns; what it returns is what replay shows.
SELECT * FROM event_store.append('order-1', 'placed', '{"amount": 42.5}');
SELECT * FROM event_store.append('order-1', 'paid', '{"by": "card"}', expected_version => 1);
SELECT * FROM event_store.append('order-1', 'paid', '{"by": "card"}', expected_version => 1);
SELECT * FROM event_store.append('order-1', 'shipped', '{}', expected_version => -1, metadata => '{"who": "me"}');
SELECT * FROM event_store.append('order-2', 'shipped', '{}', expected_version => -1);
SELECT * FROM event_store.append('order-2', 'placed', '{}', expected_version => 0);
SELECT * FROM event_store.append('order-2', 'placed', '{}', expected_version => 0);
SELECT version, event_type, payload, metadata FROM event_store.replay('order-1');

-- idempotency: the same content under the same id is stored once, other content is refused
SELECT * FROM event_store.append('order-3', 'placed', '{"n": 1}', event_id => '00000000-0000-0000-0000-000000000001');
SELECT * FROM event_store.append('order-3', 'paid', '{}');
SELECT * FROM event_store.append('order-3', 'placed', '{"n": 1}', event_id => '00000000-0000-0000-0000-000000000001');
SELECT * FROM event_store.append('order-3', 'placed', '{"n": 1}', event_id => '00000000-0000-0000-0000-000000000001', expected_version => 0);
SELECT * FROM event_store.append('order-3', 'placed', '{"n": 2}', event_id => '00000000-0000-0000-0000-000000000001');
-- the id is unique within its context only
SELECT * FROM event_store.append('order-4', 'placed', '{"n": 2}', event_id => '00000000-0000-0000-0000-000000000001');
SELECT version, event_type, payload FROM event_store.replay('order-3');
-- through INSERT: not stored twice
INSERT INTO event_store.events (context_id, event_type, payload, event_id) VALUES ('order-3', 'placed', '{"n": 1}', '00000000-0000-0000-0000-000000000001');
SELECT count(*) FROM event_store.replay('order-3');
INSERT INTO event_store.events (context_id, event_type, payload, event_id) VALUES ('order-3', 'placed', '{"n": 3}', '00000000-0000-0000-0000-000000000001');
-- twice in one statement
INSERT INTO event_store.events (context_id, event_type, payload, event_id)
  SELECT 'order-5', 'placed', '{"n": 1}', '00000000-0000-0000-0000-000000000005' FROM generate_series(1, 3);
SELECT version, event_type FROM event_store.replay('order-5');

-- several in one transaction
BEGIN;
SELECT * FROM event_store.append('order-6', 'placed', '{}');
SELECT * FROM event_store.append('order-6', 'paid', '{}');
SAVEPOINT s;
SELECT * FROM event_store.append('order-6', 'cancelled', '{}');
ROLLBACK TO s;
SELECT * FROM event_store.append('order-6', 'shipped', '{}', expected_version => 2);
SELECT * FROM event_store.append('order-6', 'x', '{}', event_id => '00000000-0000-0000-0000-000000000006');
SELECT * FROM event_store.append('order-6', 'x', '{}', event_id => '00000000-0000-0000-0000-000000000006');
COMMIT;
SELECT version, event_type FROM event_store.replay('order-6');

-- from the 17th context on the version is settled at COMMIT
BEGIN;
SELECT count(v), bool_and(v = 1) FROM (SELECT (event_store.append('many-' || i, 'x', '{}')).version AS v FROM generate_series(1, 40) i) s;
COMMIT;
SELECT count(*), min(version), max(version) FROM event_store.events WHERE context_id LIKE 'many-%';
-- contexts of rolled-back savepoints are none of the 16
BEGIN;
DO $$
BEGIN
  FOR i IN 1 .. 20 LOOP
    BEGIN
      PERFORM event_store.append('back-' || i, 'x', '{}');
      RAISE division_by_zero;
    EXCEPTION WHEN division_by_zero THEN NULL;
    END;
  END LOOP;
END $$;
SELECT * FROM event_store.append('back-1', 'x', '{}');
SAVEPOINT s;
SELECT count((event_store.append('back-' || i, 'x', '{}')).version) FROM generate_series(1, 20) i;
ROLLBACK TO s;
SELECT * FROM event_store.append('back-1', 'x', '{}', expected_version => 1);
SELECT * FROM event_store.append('back-20', 'x', '{}');
COMMIT;
SELECT context_id, version FROM event_store.events WHERE context_id LIKE 'back-%' ORDER BY position;

-- a conflict can be caught
DO $$
BEGIN
  PERFORM event_store.append('order-1', 'x', '{}', expected_version => 1);
EXCEPTION WHEN unique_violation THEN RAISE NOTICE 'caught: %', SQLERRM;
END $$;

-- tables of other shapes
CREATE TABLE clicks (context_id uuid, event_type text, at timestamptz, url text, ms float8) USING event_store;
INSERT INTO clicks VALUES ('00000000-0000-0000-0000-00000000000a', 'click', '2026-01-01 00:00+00', '/a', 1.5),
  ('00000000-0000-0000-0000-00000000000a', 'leave', '2026-01-01 00:01+00', '/b', NULL);
SET timezone = 'UTC';
SELECT context_id, version, event_type, payload FROM event_store.replay('00000000-0000-0000-0000-00000000000a', store => 'clicks');
SELECT * FROM event_store.append('00000000-0000-0000-0000-00000000000a', 'click', NULL, store => 'clicks');
SELECT * FROM event_store.append('not a uuid', 'click', NULL, store => 'clicks');
SELECT * FROM event_store.append('00000000-0000-0000-0000-00000000000a', 'click', NULL, expected_version => 1, store => 'clicks');
DROP TABLE clicks;

-- a trigger that appends in more shapes than there are plans of INSERT kept: the outer call's plan stays
CREATE SCHEMA plans;
CREATE FUNCTION plans.append_all() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM event_store.append('c', CASE WHEN i & 1 > 0 THEN 'x' END, CASE WHEN i & 2 > 0 THEN '{}'::jsonb END,
    metadata => CASE WHEN i & 4 > 0 THEN '{}'::jsonb END, store => format('plans.e%s', t)::regclass)
  FROM generate_series(1, 9) t, generate_series(0, 7) i;
  RETURN NEW;
END $$;
DO $$ BEGIN
  FOR t IN 0 .. 9 LOOP
    EXECUTE format('CREATE TABLE plans.e%s (context_id text, version bigint, event_type text, payload jsonb, metadata jsonb) USING event_store', t);
  END LOOP;
END $$;
CREATE TRIGGER all_plans BEFORE INSERT ON plans.e0 FOR EACH ROW EXECUTE FUNCTION plans.append_all();
SELECT * FROM event_store.append('c', 'x', '{}', store => 'plans.e0');
SELECT * FROM event_store.append('c', 'x', '{}', store => 'plans.e0');
SELECT count(*), max(version) FROM plans.e0;
SELECT count(*), max(version) FROM plans.e9;
-- rules that put something else in the place of the event
CREATE TABLE plans.other (n text);
CREATE RULE instead AS ON INSERT TO plans.e9 DO INSTEAD NOTHING;
SELECT * FROM event_store.append('c', 'x', '{}', store => 'plans.e9');
CREATE OR REPLACE RULE instead AS ON INSERT TO plans.e9 DO INSTEAD SELECT 1;
SELECT * FROM event_store.append('c', 'x', '{}', store => 'plans.e9');
CREATE OR REPLACE RULE instead AS ON INSERT TO plans.e9 DO INSTEAD UPDATE plans.other SET n = NEW.context_id;
SELECT * FROM event_store.append('c', 'x', '{}', store => 'plans.e9');
SELECT count(*), max(version) FROM plans.e9;
SET client_min_messages = warning;
DROP SCHEMA plans CASCADE;
RESET client_min_messages;
