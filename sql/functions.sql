-- Promise: append, replay and read_all do what they say on any table and in any transaction.

-- event_store.events as users change it
SELECT event_store.append('fn-1', 'made', '{"a": 1}');
BEGIN;
DO $$ BEGIN FOR i IN 1..40 LOOP EXECUTE format('ALTER TABLE event_store.events ADD COLUMN c%s text', i); END LOOP; END $$;
INSERT INTO event_store.events (context_id, payload, c40) VALUES ('fn-1', '{"b": 2}', 'forty');
SELECT context_id, version, event_type, payload, c1, c40 FROM event_store.replay('fn-1');
ROLLBACK;
BEGIN;
ALTER TABLE event_store.events ADD COLUMN amount numeric DEFAULT 4.5;
SELECT payload, amount FROM event_store.replay('fn-1');
SELECT payload, amount FROM event_store.replay('fn-1', since => '-infinity');
ALTER TABLE event_store.events DROP COLUMN metadata;
SELECT payload, amount FROM event_store.replay('fn-1');
ROLLBACK;
BEGIN;
ALTER TABLE event_store.events ALTER payload TYPE json;
SELECT payload, pg_typeof(payload) FROM event_store.replay('fn-1');
ROLLBACK;
BEGIN;
CREATE TABLE fn_other (context_id text, event_type text, payload jsonb) USING event_store;
INSERT INTO fn_other VALUES ('a', 'paid', '{"c": 3}');
ALTER TABLE event_store.events ALTER recorded_at TYPE text;
SELECT payload, pg_typeof(recorded_at) FROM event_store.replay('fn-1');
SELECT event_type, payload, recorded_at FROM event_store.replay('a', store => 'fn_other');
ROLLBACK;

-- tables of another shape: what has no place comes as the payload
CREATE TABLE fn_shape (position bigint, context_id text, payload jsonb, amount float8, j json) USING event_store;
INSERT INTO fn_shape (context_id, payload, amount, j) VALUES ('a', '{"k": 1}', 4.5, '{"z": "\u0000 \\u0000 \ud83d\ude00 \ud83d \ude00x \u0041"}');
SELECT payload FROM event_store.replay('a', store => 'fn_shape');
SELECT payload->>'amount' AS amount FROM event_store.read_all(store => 'fn_shape');
BEGIN;
ALTER TABLE event_store.events ADD COLUMN amount float8, ADD COLUMN j json;
SELECT payload, amount FROM event_store.replay('a', store => 'fn_shape');
ROLLBACK;
CREATE TABLE fn_same (context_id text, payload jsonb) USING event_store;
INSERT INTO fn_same VALUES ('a', '{"k": 1}');
SELECT payload FROM event_store.replay('a', store => 'fn_same');

-- from the 17th context on
CREATE FUNCTION fn_append(n int) RETURNS bigint LANGUAGE sql VOLATILE AS $$
  SELECT count(*) FROM (SELECT event_store.append('fn-17-' || i, 'x', NULL) FROM generate_series(1, n) i OFFSET 0) s $$;
BEGIN;
SELECT fn_append(17);
SELECT * FROM event_store.append('fn-17-17', 'x', NULL, expected_version => -1);
SELECT * FROM event_store.append('fn-17-18', 'x', NULL, expected_version => -1);
ROLLBACK;
BEGIN;
SELECT fn_append(17);
SELECT * FROM event_store.append('fn-17-18', 'x', NULL, expected_version => 9223372036854775807);
ROLLBACK;
BEGIN;
SELECT fn_append(17);
SAVEPOINT s;
SELECT * FROM event_store.append('fn-17-18', 'x', NULL);
ROLLBACK TO s;
SELECT * FROM event_store.append('fn-17-18', 'x', NULL, expected_version => -1);
ROLLBACK;
BEGIN;
SELECT fn_append(17);
SELECT * FROM event_store.append('fn-17-17', 'x', NULL, expected_version => 1);
COMMIT;
SELECT * FROM event_store.append('fn-17-17', 'x', NULL, expected_version => 9223372036854775807);
SELECT * FROM event_store.append('fn-17-17', 'x', NULL, expected_version => 2);

-- row security changes which rows are seen, nothing else
CREATE TABLE fn_rls (position bigint, context_id text, payload jsonb, owner text) USING event_store;
CREATE TABLE fn_child () INHERITS (fn_rls) USING event_store;
INSERT INTO fn_rls (context_id, payload, owner) VALUES ('a', '1', 'fn_user'), ('a', '2', 'other');
INSERT INTO fn_child (context_id, payload, owner) VALUES ('a', '3', 'fn_user');
INSERT INTO fn_rls (context_id, payload, owner) SELECT 'b', to_jsonb(i), 'fn_user' FROM generate_series(1, 3000) i;
CREATE ROLE fn_user;
GRANT USAGE ON SCHEMA event_store TO fn_user;
GRANT SELECT ON fn_rls TO fn_user;
ALTER TABLE fn_rls ENABLE ROW LEVEL SECURITY;
CREATE POLICY p ON fn_rls USING (owner = current_user);
SELECT payload FROM event_store.replay('a', store => 'fn_rls');
SET ROLE fn_user;
SELECT payload FROM event_store.replay('a', store => 'fn_rls');
SELECT payload FROM event_store.read_all(store => 'fn_rls', max_count => 2);
SELECT count(*) FROM event_store.replay('b', store => 'fn_rls');
SELECT payload FROM event_store.replay('a', event_type => 'x', store => 'fn_rls');
RESET ROLE;
SELECT payload FROM event_store.replay('a', event_type => 'x', store => 'fn_rls');
DROP TABLE fn_child, fn_rls;
-- nor which operators are used: none of somebody who may make one for the type of a column
CREATE TYPE fn_kind AS ENUM ('good', 'bad');
CREATE FUNCTION fn_evil(fn_kind, fn_kind) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE WARNING 'called'; RETURN true; END $$;
CREATE OPERATOR = (LEFTARG = fn_kind, RIGHTARG = fn_kind, FUNCTION = fn_evil);
CREATE TABLE fn_rls (context_id fn_kind, version bigint, event_type fn_kind) USING event_store;
INSERT INTO fn_rls (context_id, event_type) VALUES ('good', 'good'), ('good', 'bad'), ('bad', 'good');
ALTER TABLE fn_rls ADD COLUMN recorded_at timestamptz DEFAULT '2026-01-01 00:00+00';
SELECT context_id, version, event_type FROM event_store.replay('good', event_type => 'good', since => '-infinity', store => 'fn_rls');
DROP TABLE fn_rls;
DROP OPERATOR = (fn_kind, fn_kind);
DROP FUNCTION fn_evil;
DROP TYPE fn_kind;
DROP OWNED BY fn_user;
DROP ROLE fn_user;

-- an event that is sent again is the same after ADD COLUMN
CREATE TABLE fn_id (position bigint, context_id text, version bigint, event_id uuid, event_type text, payload jsonb) USING event_store;
CREATE FUNCTION fn_retry(p jsonb DEFAULT '{"x": 1}') RETURNS text LANGUAGE sql VOLATILE AS $$
  SELECT outcome || ' ' || version FROM event_store.append('a', 't', p, event_id => '00000000-0000-0000-0000-000000000001', store => 'fn_id') $$;
SELECT fn_retry();
ALTER TABLE fn_id ADD COLUMN x text;
SELECT fn_retry();
ALTER TABLE fn_id ADD COLUMN y text DEFAULT 'why', ADD COLUMN z int DEFAULT 5, ADD COLUMN u uuid DEFAULT '00000000-0000-0000-0000-000000000002';
SELECT fn_retry();
INSERT INTO fn_id (context_id, event_type, payload, event_id) VALUES ('a', 't', '{"x": 1}', '00000000-0000-0000-0000-000000000001');
SELECT count(*) FROM fn_id;
\set VERBOSITY sqlstate
INSERT INTO fn_id (context_id, event_type, payload, event_id, z) VALUES ('a', 't', '{"x": 1}', '00000000-0000-0000-0000-000000000001', 6);
INSERT INTO fn_id (context_id, event_type, payload, event_id, z) VALUES ('a', 't', '{"x": 1}', '00000000-0000-0000-0000-000000000001', NULL);
INSERT INTO fn_id (context_id, event_type, payload, event_id, x) VALUES ('a', 't', '{"x": 1}', '00000000-0000-0000-0000-000000000001', '');
INSERT INTO fn_id (context_id, event_type, payload, event_id) VALUES ('a', NULL, '{"x": 1}', '00000000-0000-0000-0000-000000000001');
SELECT fn_retry('{"x": 2}');
\set VERBOSITY default
ALTER TABLE fn_id ALTER x TYPE varchar, ALTER z TYPE bigint;
SELECT fn_retry();
SELECT count(*) FROM fn_id;

-- an event that is sent again: triggers have their say, but its content is its own
CREATE TABLE fn_seen (context_id text, position bigint, event_id uuid, event_type text) USING event_store;
CREATE FUNCTION fn_see() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO fn_seen (context_id, event_id, event_type) VALUES ('a', gen_random_uuid(), NEW.payload ->> 'x');
  RETURN NULL;
END $$;
CREATE FUNCTION fn_refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
CREATE TRIGGER see AFTER INSERT ON fn_id FOR EACH ROW EXECUTE FUNCTION fn_see();
SELECT fn_retry();
SELECT fn_retry('{"x": 2}');
CREATE TRIGGER refuse BEFORE INSERT ON fn_id FOR EACH ROW EXECUTE FUNCTION fn_refuse();
SELECT * FROM event_store.append('a', 't', '{"x": 1}', event_id => '00000000-0000-0000-0000-000000000001', store => 'fn_id');
SELECT (SELECT count(*) FROM fn_id), (SELECT count(*) FROM fn_seen);
DROP TRIGGER see ON fn_id;
DROP TRIGGER refuse ON fn_id;
DROP TABLE fn_seen;
DROP FUNCTION fn_see, fn_refuse;

-- what is generated from a default that changes is no more content than the default
CREATE TABLE fn_gen (context_id text, version bigint, event_id uuid, event_type text, payload jsonb, at timestamptz DEFAULT clock_timestamp(),
  epoch numeric GENERATED ALWAYS AS (extract(epoch FROM at AT TIME ZONE 'UTC')) STORED,
  who text GENERATED ALWAYS AS (payload ->> 'who' || context_id) STORED) USING event_store;
SELECT a.* FROM event_store.append('a', 't', '{"who": "me"}', event_id => '00000000-0000-0000-0000-000000000001', store => 'fn_gen') a;
SELECT pg_sleep(0.001);
SELECT a.* FROM event_store.append('a', 't', '{"who": "me"}', event_id => '00000000-0000-0000-0000-000000000001', store => 'fn_gen') a;
SELECT a.* FROM event_store.append('a', 't', '{"who": "you"}', event_id => '00000000-0000-0000-0000-000000000001', store => 'fn_gen') a;
DROP TABLE fn_gen;

-- fields of a composite value keep the compression they came with: equal content is equal
CREATE TYPE fn_pair AS (n int, t text);
CREATE TABLE fn_pairs (context_id text, event_id uuid, p fn_pair, ps fn_pair[]) USING event_store;
CREATE TABLE fn_compressed (t text);
INSERT INTO fn_compressed VALUES (repeat('x', 5000));
INSERT INTO fn_pairs VALUES ('a', '00000000-0000-0000-0000-000000000001', (1, repeat('x', 5000)), ARRAY[NULL, (2, repeat('x', 5000))::fn_pair]);
INSERT INTO fn_pairs SELECT 'a', '00000000-0000-0000-0000-000000000001', (1, t)::fn_pair, ARRAY[NULL, (2, t)::fn_pair] FROM fn_compressed;
\set VERBOSITY sqlstate
INSERT INTO fn_pairs SELECT 'a', '00000000-0000-0000-0000-000000000001', (1, t)::fn_pair, ARRAY[NULL, (2, t || t)::fn_pair] FROM fn_compressed;
INSERT INTO fn_pairs SELECT 'a', '00000000-0000-0000-0000-000000000001', (3, t)::fn_pair, ARRAY[NULL, (2, t)::fn_pair] FROM fn_compressed;
\set VERBOSITY default
SELECT count(*), min(length((p).t)) FROM fn_pairs;
ALTER TABLE fn_pairs ADD COLUMN more fn_pair DEFAULT (5, repeat('x', 5000));
INSERT INTO fn_pairs SELECT 'a', '00000000-0000-0000-0000-000000000001', (1, t)::fn_pair, ARRAY[NULL, (2, t)::fn_pair], (5, t)::fn_pair FROM fn_compressed;
SELECT count(*) FROM fn_pairs;
DROP TABLE fn_pairs, fn_compressed;
DROP TYPE fn_pair;

-- event ids that triggers and defaults give are looked for like those that append() is given
CREATE TABLE fn_ids (context_id text, version bigint, event_id uuid, event_type text, payload jsonb) USING event_store;
CREATE FUNCTION fn_give_id() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN NEW.event_id = rpad(coalesce(NEW.payload ->> 'id', md5(NEW.payload::text)), 32, '0')::uuid; RETURN NEW; END $$;
CREATE TRIGGER id BEFORE INSERT ON fn_ids FOR EACH ROW EXECUTE FUNCTION fn_give_id();
SELECT * FROM event_store.append('a', 't', '{"n": 1}', store => 'fn_ids');
SELECT * FROM event_store.append('a', 't', '{"n": 1}', store => 'fn_ids');
SELECT * FROM event_store.append('a', 't', '{"n": 2}', event_id => '00000000-0000-0000-0000-000000000001', store => 'fn_ids');
SELECT * FROM event_store.append('a', 't', '{"n": 2}', event_id => '00000000-0000-0000-0000-000000000001', store => 'fn_ids');
SELECT * FROM event_store.append('a', 't', '{"id": "5"}', store => 'fn_ids');
SELECT * FROM event_store.append('a', 't', '{"id": "5", "n": 1}', store => 'fn_ids');
BEGIN;
SELECT * FROM event_store.append('a', 't', '{"n": 1}', store => 'fn_ids');
SELECT * FROM event_store.append('a', 't', '{"n": 3}', store => 'fn_ids');
SAVEPOINT s;
SELECT * FROM event_store.append('a', 't', '{"n": 3}', store => 'fn_ids');
SELECT * FROM event_store.append('a', 't', '{"n": 4}', expected_version => 4, store => 'fn_ids');
ROLLBACK TO s;
SELECT * FROM event_store.append('a', 't', '{"n": 5}', expected_version => 4, store => 'fn_ids');
SELECT * FROM event_store.append('a', 't', '{"n": 3}', store => 'fn_ids');
COMMIT;
SELECT version, payload, event_id FROM fn_ids ORDER BY version;
-- also those that a trigger inserts meanwhile, or a rule's function
CREATE FUNCTION fn_before() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF pg_trigger_depth() = 1 AND TG_ARGV[0] = 'append' THEN
    RAISE NOTICE 'inner: %', event_store.append(NEW.context_id, NEW.event_type, NEW.payload, event_id => NEW.event_id, store => 'fn_ids');
  ELSIF pg_trigger_depth() = 1 THEN
    INSERT INTO fn_ids SELECT NEW.*;
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER more BEFORE INSERT ON fn_ids FOR EACH ROW EXECUTE FUNCTION fn_before('append');
SELECT * FROM event_store.append('b', 't', '{}', event_id => '00000000-0000-0000-0000-000000000001', store => 'fn_ids');
DROP TRIGGER more ON fn_ids;
CREATE TRIGGER more AFTER INSERT ON fn_ids FOR EACH ROW EXECUTE FUNCTION fn_before('append');
SELECT * FROM event_store.append('c', 't', '{}', event_id => '00000000-0000-0000-0000-000000000001', store => 'fn_ids');
DROP TRIGGER more ON fn_ids;
CREATE TRIGGER more BEFORE INSERT ON fn_ids FOR EACH ROW EXECUTE FUNCTION fn_before('insert');
SELECT * FROM event_store.append('d', 't', '{}', event_id => '00000000-0000-0000-0000-000000000001', store => 'fn_ids');
DROP TRIGGER more ON fn_ids;
CREATE TRIGGER more AFTER INSERT ON fn_ids FOR EACH ROW EXECUTE FUNCTION fn_before('insert');
SELECT * FROM event_store.append('e', 't', '{}', event_id => '00000000-0000-0000-0000-000000000001', store => 'fn_ids');
SELECT context_id, count(*), max(version) FROM fn_ids WHERE context_id > 'a' GROUP BY 1 ORDER BY 1;
CREATE TABLE fn_rule (context_id text, event_id uuid, n int) USING event_store;
CREATE FUNCTION fn_twice(c text, id uuid) RETURNS void LANGUAGE sql AS 'INSERT INTO fn_rule VALUES (c, id, 1)';
INSERT INTO fn_rule VALUES ('a', '00000000-0000-0000-0000-000000000001', 1);
CREATE RULE twice AS ON INSERT TO fn_rule WHERE NEW.n IS NULL DO ALSO SELECT fn_twice(NEW.context_id, '00000000-0000-0000-0000-000000000001');
SELECT * FROM event_store.append('a', NULL, NULL, event_id => '00000000-0000-0000-0000-000000000002', store => 'fn_rule');
SELECT event_id, count(*) FROM fn_rule GROUP BY 1 ORDER BY 1;
DROP TABLE fn_ids, fn_rule;
DROP FUNCTION fn_give_id, fn_before, fn_twice;

-- INSERT of what is there already counts for nothing in the versions of append(), also before COMMIT finds that out
CREATE TABLE fn_dup (context_id text, position bigint, version bigint, event_id uuid, event_type text) USING event_store;
INSERT INTO fn_dup (context_id, event_id) SELECT 'a', lpad(i::text, 32, '0')::uuid FROM generate_series(1, 3) i;
BEGIN;
INSERT INTO fn_dup (context_id, event_id) VALUES ('a', '00000000-0000-0000-0000-000000000001');
SELECT * FROM event_store.append('a', 't', NULL, store => 'fn_dup');
INSERT INTO fn_dup (context_id, event_id) SELECT 'a', lpad((i / 2)::text, 32, '0')::uuid FROM generate_series(4, 11) i;
SAVEPOINT s;
SELECT * FROM event_store.append('a', 't', NULL, expected_version => 6, store => 'fn_dup');
INSERT INTO fn_dup (context_id, event_id) VALUES ('a', '00000000-0000-0000-0000-000000000003');
SELECT * FROM event_store.append('a', 't', NULL, expected_version => 7, store => 'fn_dup');
ROLLBACK TO s;
INSERT INTO fn_dup (context_id, event_id) VALUES ('a', '00000000-0000-0000-0000-000000000004');
SELECT * FROM event_store.append('a', 't', NULL, event_id => '00000000-0000-0000-0000-000000000006', store => 'fn_dup');
SELECT * FROM event_store.append('a', NULL, NULL, event_id => '00000000-0000-0000-0000-000000000003', store => 'fn_dup');
SELECT * FROM event_store.append('a', 't', NULL, store => 'fn_dup');
COMMIT;
SELECT version, event_type, event_id FROM fn_dup WHERE version > 3 ORDER BY position;
-- more than append() looks at: COMMIT does
BEGIN;
INSERT INTO fn_dup (context_id, event_id) SELECT 'b', lpad(i::text, 32, '0')::uuid FROM generate_series(1, 1500) i;
SELECT * FROM event_store.append('b', 't', NULL, store => 'fn_dup');
SELECT * FROM event_store.append('b', 't', NULL, expected_version => 1501, store => 'fn_dup');
COMMIT;
SELECT count(*), max(version) FILTER (WHERE event_type = 't') FROM fn_dup WHERE context_id = 'b';
DROP TABLE fn_dup;

-- triggers that change what append() does
CREATE TABLE fn_trigger (position bigint, context_id text, version bigint, event_type text) USING event_store;
INSERT INTO fn_trigger (context_id) VALUES ('a'), ('a'), ('other');
CREATE FUNCTION fn_redirect() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.context_id = 'other'; RETURN NEW; END $$;
CREATE FUNCTION fn_again() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.event_type = 'outer' THEN
    RAISE NOTICE 'inner: %', event_store.append(NEW.context_id, 'inner', NULL, store => 'fn_trigger');
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER t BEFORE INSERT ON fn_trigger FOR EACH ROW EXECUTE FUNCTION fn_redirect();
SELECT * FROM event_store.append('a', 'redirected', NULL, store => 'fn_trigger');
SELECT * FROM event_store.append('a', 'redirected', NULL, expected_version => 2, store => 'fn_trigger');
SELECT * FROM event_store.append('a', 'redirected', NULL, expected_version => 3, store => 'fn_trigger');
DROP TRIGGER t ON fn_trigger;
CREATE TRIGGER t BEFORE INSERT ON fn_trigger FOR EACH ROW EXECUTE FUNCTION fn_again();
SELECT * FROM event_store.append('a', 'outer', NULL, store => 'fn_trigger');
BEGIN;
SELECT * FROM event_store.append('a', 'outer', NULL, expected_version => 4, store => 'fn_trigger');
SELECT * FROM event_store.append('a', 'plain', NULL, expected_version => 6, store => 'fn_trigger');
COMMIT;
DROP TRIGGER t ON fn_trigger;
CREATE TRIGGER t AFTER INSERT ON fn_trigger FOR EACH ROW EXECUTE FUNCTION fn_again();
SELECT * FROM event_store.append('a', 'outer', NULL, store => 'fn_trigger');
SELECT context_id, version, event_type FROM fn_trigger ORDER BY position;

-- an OID that is no table's
SELECT event_store.flush(4294967295);
SELECT event_store.relation_size(4294967295);
SELECT event_store.shard_of('a', 4294967295);
SELECT event_store.horizon(4294967295);
SELECT event_store.replay('a', store => 4294967295);
SELECT event_store.append('a', 'x', NULL, store => 4294967295);

-- said clearly: what events do not have
SELECT xmin FROM fn_trigger;
SELECT cmax FROM fn_trigger;
SELECT count(ctid), min(tableoid::regclass::text) FROM fn_trigger;
CREATE TYPE fn_cstring;
\set VERBOSITY sqlstate
CREATE FUNCTION fn_cstring_in(cstring) RETURNS fn_cstring LANGUAGE internal IMMUTABLE STRICT AS 'cstring_in';
CREATE FUNCTION fn_cstring_out(fn_cstring) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'cstring_out';
\set VERBOSITY default
CREATE TYPE fn_cstring (INPUT = fn_cstring_in, OUTPUT = fn_cstring_out, LIKE = cstring);
CREATE TABLE fn_c (context_id text, c fn_cstring) USING event_store;
ALTER TABLE fn_same ADD COLUMN c fn_cstring;
SELECT * FROM fn_same;

SET client_min_messages = error;
DROP TYPE fn_cstring CASCADE;
DROP TABLE fn_shape, fn_same, fn_id, fn_trigger;
DROP FUNCTION fn_append, fn_retry, fn_redirect, fn_again;

-- everything that the extension brings says what it is
SELECT pg_describe_object(d.classid, d.objid, 0) FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
  WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e' AND e.extname = 'event_store' AND d.classid <> 'pg_type'::regclass AND obj_description(d.objid, d.classid::regclass::name) IS NULL;
SELECT a.attrelid::regclass, a.attname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
  WHERE c.relnamespace = 'event_store'::regnamespace AND c.relkind IN ('r', 'v') AND a.attnum > 0 AND NOT a.attisdropped AND col_description(a.attrelid, a.attnum) IS NULL;
