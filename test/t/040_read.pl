# What a scan sees is what a heap table with the same rows shows, in every session and isolation level, wherever the
# rows lie: staged, spilled, in MemTables or in segments. Replay and read_all are in order of position, complete, and
# versions count 1, 2, 3 … within a context.

use strict;
use warnings;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $steps = $ENV{ES_READ_STEPS} || 400;
my $seed  = $ENV{ES_SEED}       || time();
srand($seed);
note("ES_SEED=$seed");

my $node = PostgreSQL::Test::Cluster->new('read');
$node->init;
$node->append_conf('postgresql.conf', <<CONF);
shared_preload_libraries = 'event_store'
wal_level = replica
fsync = off
event_store.shards = 2
event_store.memtable_size = '1MB'
event_store.spill_after = '64kB'
event_store.segment_rows = 8192
event_store.cache_size = '1MB'
max_worker_processes = 16
CONF
$node->start;
$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION event_store;
CREATE TABLE ev (context_id text, position bigint, version bigint, k int, v text) USING event_store;
CREATE TABLE hp (context_id text, k int, v text);
CREATE SEQUENCE ks;
-- the same rows into both, by one command
CREATE FUNCTION put(n int, contexts int, width int) RETURNS void LANGUAGE sql AS $$
	WITH r AS MATERIALIZED (
		SELECT 'c' || (random() * contexts)::int AS c, nextval('ks')::int AS k, repeat(chr(65 + i % 26), (random() * width)::int) AS v
		FROM generate_series(1, n) i),
	a AS (INSERT INTO ev (context_id, k, v) SELECT c, k, v FROM r)
	INSERT INTO hp SELECT c, k, v FROM r $$;
-- one snapshot for both
CREATE FUNCTION differs() RETURNS text LANGUAGE sql AS $$
	SELECT CASE WHEN e IS NOT DISTINCT FROM h THEN NULL ELSE 'ev ' || e::text || ' hp ' || h::text END FROM
		(SELECT ROW(count(*), sum(k), sum(hashtext(context_id || k || v)::bigint)) AS e FROM ev) x,
		(SELECT ROW(count(*), sum(k), sum(hashtext(context_id || k || v)::bigint)) AS h FROM hp) y $$;
CREATE FUNCTION cursor_rows(c refcursor) RETURNS TABLE (k int) LANGUAGE plpgsql AS $$
	BEGIN
		LOOP
			FETCH c INTO k;
			EXIT WHEN NOT FOUND;
			RETURN NEXT;
		END LOOP;
	END $$;
-- committed rows: versions without holes in the order of positions
CREATE FUNCTION versions_wrong() RETURNS text LANGUAGE sql AS $$
	SELECT context_id || ' ' || version || ' at ' || position || ' is number ' || n FROM
		(SELECT *, row_number() OVER (PARTITION BY context_id ORDER BY position) AS n FROM ev WHERE position IS NOT NULL) x
	WHERE n <> version LIMIT 1 $$;
-- replay: the context's rows in order of position, own ones last
CREATE FUNCTION replay_wrong(c text) RETURNS text LANGUAGE plpgsql AS $$
	DECLARE a text; b text; m int := (random() * 20)::int + 1; f bigint := (random() * 10)::int + 1;
	BEGIN
		SELECT string_agg(version || '@' || position, ',') INTO a FROM event_store.replay(c, store => 'ev');
		SELECT string_agg(version || '@' || position, ',' ORDER BY position) INTO b FROM ev WHERE context_id = c;
		IF a IS DISTINCT FROM b THEN RETURN 'forward ' || coalesce(a, '-') || ' is not ' || coalesce(b, '-'); END IF;
		SELECT count(*)::text INTO a FROM event_store.replay(c, store => 'ev');
		SELECT count(*)::text INTO b FROM ev WHERE context_id = c;
		IF a IS DISTINCT FROM b THEN RETURN 'count ' || a || ' is not ' || b; END IF;
		SELECT string_agg(coalesce(version || '@' || position, 'own'), ',') INTO a FROM event_store.replay(c, backward => true, max_count => m, store => 'ev');
		SELECT string_agg(coalesce(version || '@' || position, 'own'), ',' ORDER BY position DESC NULLS FIRST) INTO b FROM
			(SELECT * FROM ev WHERE context_id = c ORDER BY position DESC NULLS FIRST LIMIT m) x;
		IF a IS DISTINCT FROM b THEN RETURN 'backward ' || m || ': ' || coalesce(a, '-') || ' is not ' || coalesce(b, '-'); END IF;
		SELECT string_agg(version || '@' || position, ',') INTO a FROM event_store.replay(c, from_version => f, to_version => f + m, store => 'ev');
		SELECT string_agg(version || '@' || position, ',' ORDER BY position) INTO b FROM ev WHERE context_id = c AND version BETWEEN f AND f + m;
		IF a IS DISTINCT FROM b THEN RETURN 'versions ' || f || ' to ' || f + m || ': ' || coalesce(a, '-') || ' is not ' || coalesce(b, '-'); END IF;
		RETURN NULL;
	END $$;
-- read_all in pages: all committed rows below the horizon in order
CREATE FUNCTION read_all_wrong(page bigint) RETURNS text LANGUAGE plpgsql AS $$
	DECLARE a bigint[]; b bigint[]; p bigint[]; last bigint := 0; h bigint := event_store.horizon('ev');
	BEGIN
		a := '{}';
		LOOP
			SELECT array_agg(position) INTO p FROM event_store.read_all(after => last, max_count => page, store => 'ev');
			EXIT WHEN p IS NULL;
			IF array_length(p, 1) > page THEN RETURN 'page too large'; END IF;
			a := a || p;
			last := p[array_length(p, 1)];
		END LOOP;
		SELECT coalesce(array_agg(position ORDER BY position), '{}') INTO b FROM ev WHERE position <= last;
		IF a <> b THEN RETURN 'read_all gives ' || array_length(a, 1) || ' rows of ' || array_length(b, 1); END IF;
		RETURN NULL;
	END $$;
SQL

my @sessions = map { { name => "s$_", psql => $node->background_psql('postgres', on_error_stop => 0), open => 0, savepoints => 0, cursor => 0 } } 1 .. 4;
my $bad = 0;

sub run
{
	my ($s, $sql) = @_;
	my $out = $s->{psql}->query($sql);
	my $err = $s->{psql}->{stderr};

	$s->{psql}->{stderr} = '';
	if ($err =~ /ERROR|FATAL|PANIC/)
	{
		diag("$s->{name}: $sql: $err");
		$bad++;
	}
	return $out;
}

sub check
{
	my ($s, $what, $sql) = @_;
	my $out = run($s, $sql);

	if ($out ne '')
	{
		diag("$what in $s->{name} (open $s->{open}): $out");
		$bad++;
	}
	return;
}

for my $step (1 .. $steps)
{
	my $s = $sessions[ int(rand(@sessions)) ];
	my $r = rand();

	last if $bad > 3;
	if ($r < 0.10 && !$s->{open})
	{
		run($s, 'BEGIN ISOLATION LEVEL ' . (rand() < 0.5 ? 'READ COMMITTED' : 'REPEATABLE READ'));
		run($s, 'SELECT 1');
		$s->{open} = 1;
	}
	elsif ($r < 0.35)
	{
		run($s, 'SELECT put(' . (1 + int(rand(5))) . ', 20, 30)');
	}
	elsif ($r < 0.42)
	{
		run($s, 'SELECT put(' . (500 + int(rand(3000))) . ', ' . (rand() < 0.5 ? 20 : 2000) . ', 60)');
	}
	elsif ($r < 0.47 && $s->{open})
	{
		run($s, 'SAVEPOINT p' . ++$s->{savepoints});
	}
	elsif ($r < 0.51 && $s->{open} && $s->{savepoints} > 0)
	{
		run($s, 'ROLLBACK TO p' . $s->{savepoints} . '; CLOSE ALL');
		$s->{cursor} = 0;
	}
	elsif ($r < 0.53 && $s->{open} && $s->{savepoints} > 0)
	{
		run($s, 'RELEASE p' . $s->{savepoints}--);
	}
	elsif ($r < 0.58 && $s->{open})
	{
		run($s, rand() < 0.7 ? 'COMMIT' : 'ROLLBACK');
		$s->{open} = $s->{savepoints} = $s->{cursor} = 0;
	}
	elsif ($r < 0.61)
	{
		run($sessions[0], 'SELECT event_store.flush()') unless $sessions[0]->{open};
	}
	elsif ($r < 0.64 && $s->{open})
	{
		# a cursor keeps the snapshot, command id included, of the moment it was declared
		if ($s->{cursor})
		{
			check($s, 'cursor', <<'SQL');
SELECT * FROM (SELECT count(*), sum(k) FROM cursor_rows('ce')) a, (SELECT count(*), sum(k) FROM cursor_rows('ch')) b WHERE a IS DISTINCT FROM b
SQL
			run($s, 'CLOSE ce; CLOSE ch');
			$s->{cursor} = 0;
		}
		else
		{
			run($s, 'DECLARE ce CURSOR FOR SELECT k FROM ev');
			run($s, 'DECLARE ch CURSOR FOR SELECT k FROM hp');
			$s->{cursor} = 1;
		}
	}
	elsif ($r < 0.85)
	{
		check($s, 'rows', 'SELECT differs() WHERE differs() IS NOT NULL');
	}
	elsif ($r < 0.92)
	{
		check($s, 'replay', "SELECT r FROM replay_wrong('c" . int(rand(20)) . "') r WHERE r IS NOT NULL");
	}
	elsif ($r < 0.95)
	{
		check($s, 'versions', 'SELECT v FROM versions_wrong() v WHERE v IS NOT NULL');
	}
	elsif (!$s->{open})
	{
		my $page = (10, 100, 1000, 100000)[ int(rand(4)) ];

		$page = 1000 if $step > 100 && $page < 1000;
		check($s, 'read_all', "SELECT r FROM read_all_wrong($page) r WHERE r IS NOT NULL");
	}
}

for my $s (@sessions)
{
	run($s, 'COMMIT') if $s->{open};
	$s->{open} = 0;
}
is($bad, 0, 'random reads and writes');

my $final = $sessions[1];
for my $state ('as it is', 'flushed', 'restarted')
{
	if ($state eq 'flushed')
	{
		run($final, 'SELECT event_store.flush()');
	}
	elsif ($state eq 'restarted')
	{
		$_->{psql}->quit for @sessions;
		$node->restart;
		$final = { name => 'last', open => 0, psql => $node->background_psql('postgres', on_error_stop => 0) };
	}
	is(run($final, 'SELECT differs()'), '', "rows, $state");
	is(run($final, 'SELECT versions_wrong()'), '', "versions, $state");
	is(run($final, 'SELECT read_all_wrong(777)'), '', "read_all, $state");
	is(run($final, "SELECT count(replay_wrong('c' || i)) FROM generate_series(0, 30) i"), '0', "replay, $state");
}
is($node->safe_psql('postgres', 'SELECT count(*) FROM event_store.verify()'), '0', 'no damage');
$final->{psql}->quit;

# The transaction's rows are sent by shards: those of the savepoint in shard 0 before older ones in shard 1.
is($node->safe_psql('postgres', <<'SQL'), "t\n40|820\n40|820", 'a savepoint is rolled back whose rows were sent before older ones');
CREATE TABLE parted (context_id text, n int) USING event_store;
BEGIN;
INSERT INTO parted SELECT 'p' || g, g FROM generate_series(1, 40) g;
SAVEPOINT s;
INSERT INTO parted SELECT 'p' || g, -g FROM generate_series(1, 40) g WHERE event_store.shard_of('p' || g) = 0;
SELECT count(*) FILTER (WHERE n < 0) BETWEEN 1 AND 39 FROM parted;
ROLLBACK TO s;
SELECT count(*), sum(n) FROM parted;
COMMIT;
SELECT count(*), sum(n) FROM parted;
SQL
$node->stop;
done_testing();
