-- Promise: triggers and foreign keys that come back for a row get what was inserted, however late they come, and
-- what cannot be kept for them is an error of the statement.
\set VERBOSITY sqlstate
CREATE TABLE tr_k (context_id text, position bigint, n int, v text, a text[]) USING event_store;
CREATE FUNCTION tr_check() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.n <> length(NEW.v) OR NEW.a IS DISTINCT FROM ARRAY[left(NEW.v, 1), 'y'] THEN
    RAISE WARNING 'row % came back as % %', NEW.n, length(NEW.v), NEW.a;
  END IF;
  PERFORM set_config('tr.seen', (current_setting('tr.seen')::int + 1)::text, false);
  RETURN NULL;
END $$;
CREATE FUNCTION tr_fill(letter text, first int, last int) RETURNS void LANGUAGE sql AS
  $$ INSERT INTO tr_k SELECT 'c', NULL, i, repeat(letter, i), ARRAY[letter, 'y'] FROM generate_series(first, last) i $$;
SET tr.seen = 0;

-- no temporary file may be written: few rows do not need one, whether or not the trigger comes for them
CREATE TRIGGER tr_check AFTER INSERT ON tr_k FOR EACH ROW WHEN (NEW.n > 10) EXECUTE FUNCTION tr_check();
SET temp_file_limit = 0;
SELECT tr_fill('a', 1, 20);
SELECT current_setting('tr.seen'), count(*) FROM tr_k;
-- many do
SELECT tr_fill('b', 1000, 1200);
BEGIN;
SELECT tr_fill('c', 10, 10);
SAVEPOINT s;
SELECT tr_fill('d', 1000, 1200);
ROLLBACK TO s;
SELECT tr_fill('e', 100000, 100000);
ROLLBACK TO s;
COMMIT;
SELECT current_setting('tr.seen'), count(*) FROM tr_k;
RESET temp_file_limit;
DROP TRIGGER tr_check ON tr_k;

-- deferred: what a savepoint could not keep leaves the others as they were
CREATE CONSTRAINT TRIGGER tr_check AFTER INSERT ON tr_k DEFERRABLE INITIALLY DEFERRED
  FOR EACH ROW EXECUTE FUNCTION tr_check();
SET tr.seen = 0;
BEGIN;
SET LOCAL temp_file_limit = '128kB';
SELECT tr_fill('f', 100, 200);
SAVEPOINT s;
SELECT tr_fill('g', 1000, 1300);
ROLLBACK TO s;
SAVEPOINT t;
SELECT tr_fill('i', 200000, 200000);
ROLLBACK TO t;
SET LOCAL temp_file_limit = -1;
SELECT tr_fill('h', 70000, 70000);
SELECT tr_fill('j', 100, 700);
SELECT tr_fill('k', 200000, 200000);
SELECT tr_fill('l', 100, 700);
COMMIT;
SELECT current_setting('tr.seen'), count(*), sum(length(v)) FROM tr_k WHERE a[1] > 'e';

-- a savepoint takes its rows along: their room is there for others
BEGIN;
SET LOCAL temp_file_limit = '160kB';
SELECT tr_fill('m', 100, 200);
SAVEPOINT s;
SELECT tr_fill('n', 1000, 1100);
ROLLBACK TO s;
SELECT tr_fill('o', 1000, 1100);
SAVEPOINT s;
SELECT tr_fill('p', 100, 200);
ROLLBACK TO s;
SET tr.seen = 0;
COMMIT;
SELECT current_setting('tr.seen'), count(*) FROM tr_k WHERE a[1] > 'l';

-- what a row's values were taken from may be gone when the trigger comes
CREATE TABLE tr_source (n int, v text, a text[]);
ALTER TABLE tr_source ALTER v SET STORAGE EXTERNAL;
INSERT INTO tr_source VALUES (100000, repeat('m', 100000), ARRAY['m', 'y']), (3, 'nnn', ARRAY['n', 'y']),
  (6000, repeat('o', 6000), ARRAY['o', 'y']);
SET tr.seen = 0;
BEGIN;
INSERT INTO tr_k SELECT 'toast', NULL, n, v, a FROM tr_source;
DROP TABLE tr_source;
COMMIT;
SELECT current_setting('tr.seen'), count(*), sum(length(v)) FROM tr_k WHERE context_id = 'toast';

-- given positions are noted likewise
CREATE TABLE tr_p (context_id text, position bigint, n int) USING event_store;
SET temp_file_limit = 0;
INSERT INTO tr_p SELECT 'c', i, 1 FROM generate_series(1, 1500) i;
INSERT INTO tr_p SELECT 'c', i, 1 FROM generate_series(1501, 20000) i;
SET temp_file_limit = '128kB';
INSERT INTO tr_p SELECT 'c', i, 1 FROM generate_series(1501, 20000) i;
RESET temp_file_limit;
SELECT count(*), min(position), max(position) FROM tr_p;
DROP TABLE tr_k, tr_p;
DROP FUNCTION tr_check, tr_fill;
