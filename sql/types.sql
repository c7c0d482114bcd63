-- Promise: any column type and shape comes back as it went in, from memory and from segments.
CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
CREATE TYPE pair AS (a int, b text);
CREATE DOMAIN posint AS int CHECK (VALUE > 0);
CREATE TABLE src (id int, b bool, i2 int2, i4 int4, i8 int8, f4 float4, f8 float8, n numeric, t text, v varchar(40), c char(7), nm name,
  by bytea, u uuid, d date, tm time, tmtz timetz, ts timestamp, tstz timestamptz, iv interval, j json, jb jsonb, x xml, pt point, bx box,
  ip inet, cd cidr, mc macaddr, bt bit(5), vb varbit, ia int[], ta text[], r int4range, mr int4multirange, md mood, pr pair, dm posint, ch "char", o oid, tsv tsvector, mo money);
INSERT INTO src
SELECT i, i % 2 = 0, i, i, i * 1000000000::bigint, i / 3.0, i / 7.0, i * 1.0000000001::numeric ^ 30, repeat('t', i * 13), 'v' || i, 'c' || i, 'name' || i,
  decode(md5(i::text), 'hex'), md5(i::text)::uuid, '2020-01-01'::date + i, '12:00'::time + i * interval '1 s', '12:00+02'::timetz, '2020-01-01'::timestamp + i * interval '1 day',
  '2020-01-01 00:00+00'::timestamptz + i * interval '1 h', i * interval '1 month 2 days', '{"a" : 1}', jsonb_build_object('i', i, 'long', repeat('x', i * 50)), NULL, point(i, -i), box(point(0,0), point(i, i)),
  '10.0.0.1'::inet + i, '10.1.0.0/16', '08:00:2b:01:02:03', i::bit(5), '101'::varbit, ARRAY[i, NULL, i + 1], ARRAY['a', repeat('b', i), NULL], int4range(i, i + 5), '{[1,3),[5,7)}',
  (ARRAY['sad', 'ok', 'happy'])[1 + i % 3]::mood, ROW(i, 'p' || i)::pair, i + 1, 'q', i, to_tsvector('simple', 'word' || i), i::numeric::money
FROM generate_series(0, 59) i;
INSERT INTO src (id) SELECT i FROM generate_series(60, 69) i;
CREATE TABLE dst (context_id text, LIKE src) USING event_store;
INSERT INTO dst SELECT 'ctx' || id % 7, * FROM src;
CREATE FUNCTION diff() RETURNS bigint LANGUAGE sql AS $$
  SELECT count(*) FROM src s FULL JOIN dst d USING (id) WHERE s::text IS DISTINCT FROM
    (SELECT q::text FROM (SELECT d.id, d.b, d.i2, d.i4, d.i8, d.f4, d.f8, d.n, d.t, d.v, d.c, d.nm, d.by, d.u, d.d, d.tm, d.tmtz, d.ts, d.tstz, d.iv, d.j, d.jb, d.x, d.pt, d.bx,
      d.ip, d.cd, d.mc, d.bt, d.vb, d.ia, d.ta, d.r, d.mr, d.md, d.pr, d.dm, d.ch, d.o, d.tsv, d.mo) q) $$;
SELECT diff();
SELECT event_store.flush('dst');
SELECT diff();
DROP FUNCTION diff;

-- columns added and dropped: old rows show the default that the column came with
ALTER TABLE dst ADD COLUMN added int DEFAULT 7, ADD COLUMN added_text text DEFAULT 'seven';
INSERT INTO dst (context_id, id, added) VALUES ('new', 1000, 8);
INSERT INTO dst (context_id, id, added) VALUES ('new', 1001, NULL);
SELECT added, added_text, count(*) FROM dst GROUP BY 1, 2 ORDER BY 1, 2;
ALTER TABLE dst DROP COLUMN added, DROP COLUMN jb;
SELECT count(*), count(added_text), count(t) FROM dst;
SELECT event_store.flush('dst');
SELECT added_text, count(*), sum(length(t)) FROM dst GROUP BY 1;
ALTER TABLE dst ADD COLUMN again text;
INSERT INTO dst (context_id, id, again) VALUES ('new', 1002, 'x');
SELECT again, count(*) FROM dst GROUP BY 1 ORDER BY 1;

-- large values: inline, larger than a page, than a batch, than a queue
CREATE TABLE large (context_id text, n int, v text, b bytea) USING event_store;
INSERT INTO large SELECT 'c' || n % 3, n, repeat(chr(97 + n), size), decode(repeat(to_hex(160 + n), size), 'hex')
FROM (VALUES (1, 1), (2, 126), (3, 127), (4, 8000), (5, 16384), (6, 70000), (7, 300000), (8, 3000000)) s(n, size);
CREATE FUNCTION check_large() RETURNS TABLE (n int, length int, ok boolean) LANGUAGE sql AS $$
  SELECT n, length(v), v = repeat(chr(97 + n), length(v)) AND length(b) = length(v) AND b = decode(repeat(to_hex(160 + n), length(b)), 'hex') FROM large ORDER BY n $$;
SELECT * FROM check_large();
SELECT event_store.flush('large');
SELECT * FROM check_large();
DROP FUNCTION check_large;

-- contexts of every type that can be one
CREATE PROCEDURE context_type(typ text, value text) LANGUAGE plpgsql AS $$
DECLARE replayed bigint; versions bigint[];
BEGIN
  EXECUTE format('CREATE TABLE ctx (context_id %s, version bigint, n int) USING event_store', typ);
  EXECUTE format('INSERT INTO ctx (context_id, n) VALUES (%L, 1), (%L, 2)', value, value);
  COMMIT;
  PERFORM event_store.flush('ctx');
  EXECUTE format('INSERT INTO ctx (context_id, n) VALUES (%L, 3)', value);
  COMMIT;
  EXECUTE format('SELECT (SELECT count(*) FROM event_store.replay(%L, store => ''ctx'')), array_agg(version ORDER BY version) FROM ctx', value) INTO replayed, versions;
  RAISE NOTICE '% %: % events, versions %', typ, value, replayed, versions;
  DROP TABLE ctx;
END $$;
CALL context_type('text', ''); CALL context_type('text', 'x'); CALL context_type('varchar(10)', 'ä'); CALL context_type('name', 'n'); CALL context_type('bytea', '\x00ff');
CALL context_type('int2', '-1'); CALL context_type('int4', '7'); CALL context_type('int8', '9000000000'); CALL context_type('uuid', '00000000-0000-0000-0000-00000000000b');
CALL context_type('date', '2026-01-01'); CALL context_type('timestamptz', '2026-01-01 00:00+00'); CALL context_type('bool', 't'); CALL context_type('mood', 'happy'); CALL context_type('posint', '5');
DROP PROCEDURE context_type;

-- 1600 columns
DO $$ BEGIN EXECUTE 'CREATE TABLE wide (context_id text, ' || (SELECT string_agg('c' || i || ' int', ', ') FROM generate_series(1, 1599) i) || ') USING event_store'; END $$;
INSERT INTO wide (context_id, c1, c1599) VALUES ('w', 1, 1599);
SELECT event_store.flush('wide');
INSERT INTO wide (context_id, c2, c1598) VALUES ('w', 2, 1598);
SELECT c1, c2, c1598, c1599 FROM wide ORDER BY c1;
DROP TABLE src, dst, large, wide;
DROP TYPE mood, pair;
DROP DOMAIN posint;
