# Transactions larger than memory: rows go to pending segments while the transaction runs, and mean the same as
# rows that stayed in memory: for itself, for others, for versions and event ids, after COMMIT and after ROLLBACK.

use strict;
use warnings;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = PostgreSQL::Test::Cluster->new('spill');
$node->init;
$node->append_conf('postgresql.conf', <<'CONF');
shared_preload_libraries = 'event_store'
wal_level = replica
event_store.shards = 2
event_store.spill_after = 256kB
event_store.staging_size = 4MB
event_store.memtable_size = 2MB
max_worker_processes = 16
restart_after_crash = on
autovacuum = off
CONF
$node->start;

$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION event_store;
CREATE EXTENSION event_store_test;
ALTER DATABASE postgres SET search_path = public, event_store_test;
CREATE TABLE plain (position bigint, context_id text, n int, filler text) USING event_store;
CREATE TABLE versioned (position bigint, context_id text, version bigint, n int) USING event_store;
CREATE TABLE ids (position bigint, context_id text, version bigint, event_id uuid, n int) USING event_store;
-- Waits until what the transaction has sent is in pending segments, but for a rest.
CREATE FUNCTION spilled(rest int) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
	PERFORM count(*) FROM plain WHERE context_id = '';	-- sends what is pending
	PERFORM count(*) FROM versioned WHERE context_id = '';
	FOR i IN 1 .. 200 LOOP
		EXIT WHEN (SELECT sum(staged_rows) FROM event_store.stat_shards) <= rest;
		PERFORM pg_sleep(0.02);
	END LOOP;
END $$;
CREATE FUNCTION uuid_of(n int) RETURNS uuid IMMUTABLE LANGUAGE sql AS 'SELECT md5(n::text)::uuid';
SQL
my $compiled = $node->safe_psql('postgres', 'SELECT fault_points_compiled()') eq 't';

sub pending { return $node->safe_psql('postgres', 'SELECT sum(pending_segments) FROM event_store.stat_shards'); }

sub ask
{
	my ($sql, $wanted, $name) = @_;
	is($node->safe_psql('postgres', $sql), $wanted, $name);
	return;
}

my $big = 40000;

# ---- the transaction itself, and others ----

my $session = $node->background_psql('postgres', on_error_stop => 0);
$session->query_safe('BEGIN');
$session->query_safe("INSERT INTO plain SELECT NULL, 'a' || g % 20, g, repeat('x', 80) FROM generate_series(1, $big) g");
$session->query_safe(q{DECLARE before CURSOR FOR SELECT count(*) FROM plain});
$session->query_safe("INSERT INTO plain SELECT NULL, 'b' || g % 20, g, repeat('x', 80) FROM generate_series(1, $big) g");
ok($node->poll_query_until('postgres',
	"SELECT sum(pending_segments) > 0 AND sum(staged_rows) < $big / 4 FROM event_store.stat_shards"),
	'a large transaction has most of its rows in pending segments before it ends');
is($session->query_safe('SELECT count(*), count(position), sum(n) FROM plain'),
	2 * $big . '|0|' . $big * ($big + 1), 'it sees its own rows, without positions');
is($session->query_safe('FETCH ALL FROM before'), $big, 'a cursor does not see what was inserted behind it');
is($session->query_safe(q{SELECT count(*) FROM plain WHERE context_id = 'a7'}), $big / 20, 'it sees a context');
ask('SELECT count(*) FROM plain', 0, 'nobody else sees a row');
$session->query_safe('SAVEPOINT s');
$session->query_safe("INSERT INTO plain SELECT NULL, 'c' || g % 20, g, repeat('x', 80) FROM generate_series(1, $big) g");
$session->query_safe('ROLLBACK TO s');
$session->query_safe("INSERT INTO plain SELECT NULL, 'd', g, '' FROM generate_series(1, 10) g");
is($session->query_safe('SELECT count(*) FROM plain'), 2 * $big + 10, 'nor its own of a rolled-back savepoint');
$session->query_safe('COMMIT');
ask('SELECT count(*), count(DISTINCT position), sum(n) FROM plain', join('|', 2 * $big + 10, 2 * $big + 10, $big * ($big + 1) + 55),
	'after COMMIT everybody sees all that live');
ask(q{SELECT count(*) FROM (SELECT n, lag(n) OVER (PARTITION BY context_id ORDER BY position) AS before FROM plain) x
	WHERE n < before}, 0, 'in their order');
ask('SELECT count(*) FROM plain WHERE position < event_store.horizon(\'plain\')', 2 * $big + 10, 'below the horizon');
$node->safe_psql('postgres', 'SELECT event_store.flush()');
is(pending(), 0, 'after a flush none is pending');
$node->restart;
ask('SELECT count(*), count(DISTINCT position), sum(n) FROM plain', join('|', 2 * $big + 10, 2 * $big + 10, $big * ($big + 1) + 55),
	'after a restart, too');

# ---- versions ----

foreach my $round (1 .. 3)
{
	$node->safe_psql('postgres', <<"SQL");
BEGIN;
INSERT INTO versioned (context_id, n) SELECT 'c' || g % 3000, g FROM generate_series(1, $big) g;
SAVEPOINT s;
INSERT INTO versioned (context_id, n) SELECT 'c' || g % 4000, -1 FROM generate_series(1, $big) g;
ROLLBACK TO s;
SELECT spilled(4000);
INSERT INTO versioned (context_id, n) SELECT 'c' || g % 5000, $big + g FROM generate_series(1, $big) g;
SELECT spilled(4000);
COMMIT;
INSERT INTO versioned (context_id, n) SELECT 'c' || g, 3 * $big FROM generate_series(1, 4999, 7) g;
SQL
	ask(q{SELECT count(*) FROM (SELECT version, n, row_number() OVER w AS rank, lag(n) OVER w AS before FROM versioned
		WINDOW w AS (PARTITION BY context_id ORDER BY position)) x WHERE version <> rank}, 0,
		"versions have no gap and are in order, round $round");
	ask('SELECT count(*), min(n) FROM versioned', join('|', $round * (2 * $big + 715), 1), "all rows, round $round");
}
ask(q{SELECT count(*) FROM event_store.replay('c3', store => 'versioned')},
	$node->safe_psql('postgres', q{SELECT max(version) FROM versioned WHERE context_id = 'c3'}), 'replay sees them')
  if $node->safe_psql('postgres', q{SELECT count(*) FROM pg_proc WHERE proname = 'replay' AND prosrc = 'es_replay'}) ne '0';
my ($status, undef, $error) = $node->psql('postgres', <<"SQL");
BEGIN;
INSERT INTO versioned (context_id, n) SELECT 'e' || g % 300, g FROM generate_series(1, $big) g;
INSERT INTO versioned (context_id, version, n) VALUES ('e7', 3, 0);
COMMIT;
SQL
isnt($status, 0, 'a wrong expected version behind spilled rows is refused');
ask(q{SELECT count(*) FROM versioned WHERE context_id LIKE 'e%'}, 0, 'with the whole transaction');
$node->poll_query_until('postgres', 'SELECT sum(pending_segments) = 0 FROM event_store.stat_shards');
is(pending(), 0, 'and its pending segments');

# ---- event ids ----

$node->safe_psql('postgres', <<"SQL");
INSERT INTO ids (context_id, event_id, n) SELECT 'c' || g % 10, uuid_of(g), g FROM generate_series(1, 5000) g;
BEGIN;
INSERT INTO ids (context_id, event_id, n) SELECT 'c' || g % 10, uuid_of(g), g FROM generate_series(1, $big) g;
SELECT count(*) FROM ids WHERE context_id = '';
SELECT spilled(4000);
COMMIT;
SQL
ask('SELECT count(*), count(DISTINCT n), count(DISTINCT event_id), count(DISTINCT (context_id, version)) FROM ids',
	join('|', ($big) x 4), 'rows with event ids that are there already are not taken');
ask('SELECT count(*) FROM (SELECT context_id FROM ids GROUP BY 1 HAVING max(version) <> count(*)) x', 0,
	'and leave no gap in the versions');

# ---- restored positions ----

$node->safe_psql('postgres', <<'SQL');
CREATE TABLE restored (LIKE versioned) USING event_store;
CREATE TABLE reversed (LIKE versioned) USING event_store;
BEGIN;
INSERT INTO restored SELECT * FROM versioned;
SELECT count(*) FROM restored WHERE context_id = '';
SELECT spilled(4000);
COMMIT;
BEGIN;
INSERT INTO reversed SELECT * FROM versioned ORDER BY position DESC;
SELECT count(*) FROM reversed WHERE context_id = '';
SELECT spilled(4000);
INSERT INTO reversed (context_id, n) SELECT 'c' || g, 0 FROM generate_series(0, 2999) g;
COMMIT;
SQL
foreach my $table (qw(restored reversed))
{
	ask("SELECT count(*) FROM ((SELECT * FROM versioned EXCEPT SELECT * FROM $table)
		UNION ALL (SELECT * FROM $table WHERE n > 0 EXCEPT SELECT * FROM versioned)) x", 0, "$table: positions and versions are those given");
	$node->safe_psql('postgres', "INSERT INTO $table (context_id, n) VALUES ('c1', 0)");
	ask("SELECT count(*) FROM (SELECT version, row_number() OVER (PARTITION BY context_id ORDER BY position) AS rank
		FROM $table) x WHERE version <> rank", 0, "$table: the next version follows");
}
$node->safe_psql('postgres', 'ALTER TABLE versioned ADD COLUMN more int DEFAULT (random() * 10)::int');
ask('SELECT count(*) FROM versioned v JOIN restored r USING (position, context_id, version, n)', 3 * (2 * $big + 715),
	'a rewrite keeps both');

# ---- rolled-back shapes of the table ----

sub io_errors { return $node->safe_psql('postgres', 'SELECT sum(io_errors) FROM event_store.stat_shards'); }

$node->safe_psql('postgres', <<'SQL');
CREATE TABLE shaped (context_id text, n int, filler text) USING event_store;
CREATE TABLE unversioned (position bigint, context_id text, version bigint, n int, filler text) USING event_store;
SQL
my $io_errors = io_errors();
$session->quit;
$session = $node->background_psql('postgres', on_error_stop => 0);
$session->query_safe(q{BEGIN; SAVEPOINT s; ALTER TABLE shaped ADD COLUMN x int; INSERT INTO shaped SELECT 'a', g, '', g FROM generate_series(1, 20) g});
is($session->query_safe('SELECT sum(x) FROM shaped'), 210, 'rows with a column that a savepoint adds');
$session->query_safe(q{ROLLBACK TO s; ALTER TABLE shaped ADD COLUMN x text});
$session->query_safe("INSERT INTO shaped SELECT 'b' || g % 20, g, repeat('x', 80), 't' || g FROM generate_series(1, $big) g");
is($session->query_safe(q{SELECT count(*), count(DISTINCT x), min(x) FROM shaped}), "$big|$big|t1", 'and with another column in its place');
ok($node->poll_query_until('postgres',
	"SELECT sum(pending_segments) > 0 AND sum(staged_rows) < $big / 4 FROM event_store.stat_shards"),
	'go to pending segments');
is(io_errors(), $io_errors, 'without an error');
is($session->query_safe(q{SELECT count(*), min(n) FROM shaped WHERE x = 't7'}), '1|7', 'where they are found');
$session->query_safe('COMMIT');
$session->query_safe(q{BEGIN; SAVEPOINT s; ALTER TABLE unversioned DROP COLUMN version});
$session->query_safe("INSERT INTO unversioned SELECT 1000000 + g, 'a' || g % 20, g, '' FROM generate_series(1, 100) g");
is($session->query_safe('SELECT count(*) FROM unversioned'), 100, 'rows without the version column that a savepoint drops');
$session->query_safe('ROLLBACK TO s');
$session->query_safe("INSERT INTO unversioned SELECT g, 'a' || g % 20, NULL, g, repeat('x', 80) FROM generate_series(1, $big) g");
is($session->query_safe('SELECT count(*), count(version) FROM unversioned'), "$big|0", 'and before them in position rows with it');
ok($node->poll_query_until('postgres',
	"SELECT sum(pending_segments) > 0 AND sum(staged_rows) < $big / 4 FROM event_store.stat_shards"),
	'go to pending segments, too');
is(io_errors(), $io_errors, 'and without an error');
$session->query_safe('COMMIT');
$session->quit;
my @shaped = (
	[ 'SELECT count(*), count(DISTINCT n), min(x) FROM shaped', "$big|$big|t1", 'the rows of the last shape' ],
	[ q{SELECT count(*) FROM shaped WHERE x = 't' || n}, $big, 'with their values' ],
	[ 'SELECT count(*), min(version), max(version), count(DISTINCT (context_id, version)) FROM unversioned', join('|', $big, 1, $big / 20, $big),
		'versions as if none had been dropped' ]);
ask($_->[0], $_->[1], "$_->[2], after COMMIT") foreach @shaped;
$node->kill9;
$node->start;
ask($_->[0], $_->[1], "$_->[2], after a crash") foreach @shaped;
$node->safe_psql('postgres', q{INSERT INTO unversioned (context_id, n) VALUES ('a7', 0)});
ask(q{SELECT max(version) FROM unversioned WHERE context_id = 'a7'}, $big / 20 + 1, 'the next version follows');

# ---- many tables at once ----

$node->safe_psql('postgres', <<"SQL");
CREATE TABLE parted (context_id text, n int, filler text) PARTITION BY HASH (context_id);
SELECT format('CREATE TABLE parted_%s PARTITION OF parted FOR VALUES WITH (MODULUS 60, REMAINDER %s) USING event_store', i, i)
FROM generate_series(0, 59) i \\gexec
INSERT INTO parted SELECT 'c' || g % 1000, g, repeat('z', 50) FROM generate_series(1, $big) g;
SQL
ask('SELECT count(*), count(DISTINCT n) FROM parted', "$big|$big", 'one transaction, sixty partitions');

# ---- rollback of very much ----

my $many = $ENV{ES_LONG} ? 5_000_000 : 300_000;
$node->safe_psql('postgres',
	"BEGIN; INSERT INTO plain SELECT NULL, 'r' || g % 20, g, repeat('x', 80) FROM generate_series(1, $many) g; ROLLBACK");
ok($node->poll_query_until('postgres', 'SELECT sum(pending_segments) = 0 AND sum(staged_bytes) = 0 FROM event_store.stat_shards'),
	"nothing is left of $many rows that were rolled back");
$node->safe_psql('postgres',
	"INSERT INTO plain SELECT NULL, 'm' || g % 20, g, repeat('x', 80) FROM generate_series(1, $many) g");
ask(q{SELECT count(*), count(DISTINCT position) FROM plain WHERE context_id LIKE 'm%'}, "$many|$many",
	"$many rows are all there");
cmp_ok($node->safe_psql('postgres', 'SELECT max(staged_bytes + memtable_bytes) FROM event_store.stat_shards'), '<',
	20 * 1024 * 1024, 'memory is what the settings say');
$node->stop('immediate');
$node->start;
$node->poll_query_until('postgres', q{SELECT count(*) = 2 FROM event_store.stat_shards WHERE state = 'open'});
ask(q{SELECT count(*), count(DISTINCT position) FROM plain WHERE context_id LIKE 'm%'}, "$many|$many",
	'also after a crash');

# ---- a flush waits for what has committed, also if the shard has not been told ----

SKIP:
{
	skip 'no fault points in this build', 1 unless $compiled;
	my $left = 0;
	$node->safe_psql('postgres', 'CREATE TABLE flushed (context_id text, n int, filler text) USING event_store');
	my $writer = $node->background_psql('postgres', on_error_stop => 0);
	foreach my $round (1 .. 5)
	{
		$writer->query_safe("BEGIN; INSERT INTO flushed SELECT 'f$round', g, repeat('x', 80) FROM generate_series(1, $big) g; "
			  . "SELECT count(*) FROM flushed WHERE context_id = ''; SELECT spilled(4000)");
		$node->safe_psql('postgres', q{SELECT inject_fault('commit-after-commit', 'sleep')});
		$writer->query_until(qr/begun/, "\\echo begun\nCOMMIT;\n");
		$node->poll_query_until('postgres', q{SELECT fault_hits('commit-after-commit') > 0});
		$left += $node->safe_psql('postgres', q{SELECT FROM event_store.flush(); SELECT sum(pending_segments) FROM event_store.stat_shards});
		$node->safe_psql('postgres', 'SELECT disarm_faults()');
		$writer->query_safe('SELECT 1');
	}
	is($left, 0, 'none of its segments is pending after the flush');
	$writer->quit;
}

# ---- more than one commit can adopt ----

SKIP:
{
	skip 'no fault points in this build', 4 unless $compiled;
	my $load = "INSERT INTO plain SELECT NULL, 'l' || g % 20, g, repeat('x', 80) FROM generate_series(1, $big) g";
	my $rows = $node->safe_psql('postgres', 'SELECT count(*) FROM plain');

	foreach my $more ("$load; $load; COMMIT", 'COMMIT')
	{
		$node->safe_psql('postgres', q{SELECT inject_fault('spill-too-large', 'enospc')});
		my (undef, undef, $error) = $node->psql('postgres', "BEGIN; $load; SELECT spilled(4000); INSERT INTO plain VALUES (NULL, 'l', 0, ''); $more",
			extra_params => [ '-v', 'VERBOSITY=verbose' ]);
		like($error, qr/54000: the transaction has too many events.*HINT:  .*event_store.spill_after/s, 'a transaction of too many files is refused');
	}
	$node->safe_psql('postgres', 'SELECT disarm_faults()');
	ask('SELECT count(*) FROM plain', $rows, 'nothing of it is left');
	$node->safe_psql('postgres', $load);
	ask('SELECT count(*) FROM plain', $rows + $big, 'others go on');
	$node->safe_psql('postgres', 'TRUNCATE plain');
}

# ---- full disks ----

SKIP:
{
	skip 'no fault points in this build', 1 unless $compiled;

	# Segments cannot be written: what fits into memory is taken, then writers are told why.
	$node->safe_psql('postgres', q{SELECT inject_fault('segment-write', 'enospc always')});
	my $taken = 0;
	my $refused = '';
	foreach my $i (1 .. 400)
	{
		my ($status, undef, $error) = $node->psql('postgres',
			"INSERT INTO plain SELECT NULL, 'f' || g % 20, g, repeat('x', 80) FROM generate_series(1, 1000) g",
			on_error_stop => 1);
		if ($status != 0)
		{
			$refused = $error;
			last;
		}
		$taken++;
	}
	like($refused, qr/cannot write its files/, "after $taken transactions writers are refused");
	ask(q{SELECT count(*) FROM plain WHERE context_id LIKE 'f%'}, $taken * 1000, 'reads go on');
	my ($status, undef, $error) = $node->psql('postgres', 'SELECT event_store.flush()');
	like($error, qr/cannot write its events to segments/, 'FLUSH says what is wrong');
	$node->safe_psql('postgres', 'SELECT disarm_faults()');
	ok($node->poll_query_until('postgres', 'SELECT sum(memtable_bytes) < 5000000 FROM event_store.stat_shards'),
		'when there is room again it goes on');
	$node->safe_psql('postgres', 'SELECT event_store.flush()');
	ask(q{SELECT count(*), count(DISTINCT position) FROM plain WHERE context_id LIKE 'f%'},
		join('|', ($taken * 1000) x 2), 'with all rows');

	# A large transaction meets a full disk.
	$node->safe_psql('postgres', q{SELECT inject_fault('segment-write', 'enospc always')});
	($status, undef, $error) = $node->psql('postgres',
		"INSERT INTO plain SELECT NULL, 'g' || g % 20, g, repeat('x', 80) FROM generate_series(1, 20000) g");
	is($status, 0, 'a transaction that memory can hold commits');
	($status, undef, $error) = $node->psql('postgres',
		"INSERT INTO plain SELECT NULL, 'h' || g % 20, g, repeat('x', 80) FROM generate_series(1, 400000) g");
	isnt($status, 0, 'a larger one does not');
	like($error, qr/cannot write its files/, 'and says why');
	$node->safe_psql('postgres', 'SELECT disarm_faults()');
	ask(q{SELECT (SELECT count(*) FROM plain WHERE context_id LIKE 'g%'), (SELECT count(*) FROM plain WHERE context_id LIKE 'h%')},
		'20000|0', 'one is there, the other is not');
	$node->safe_psql('postgres', 'SELECT event_store.flush()');
	ask(q{SELECT count(*) FROM plain WHERE context_id LIKE 'g%'}, 20000, 'all goes on when there is room');
}

# ---- a savepoint for each row ----

# CPU time of the shards, in ticks of 10 ms
sub shard_ticks
{
	my $ticks = 0;
	for my $pid (split /\n/, $node->safe_psql('postgres', 'SELECT pid FROM event_store.stat_shards'))
	{
		my @stat = split / /, (slurp_file("/proc/$pid/stat") =~ s/^.*\) //sr);
		$ticks += $stat[11] + $stat[12];
	}
	return $ticks;
}

# A transaction of that many rows: the session's memory before COMMIT, and the shards' CPU time.
sub savepoints
{
	my ($n) = @_;
	my $before = shard_ticks();
	my $s = $node->background_psql('postgres', on_error_stop => 0);
	$s->query_safe("BEGIN; DO \$\$ BEGIN FOR i IN 1 .. $n LOOP BEGIN INSERT INTO plain VALUES (NULL, 's' || i % 10, i, 'x'); EXCEPTION WHEN division_by_zero THEN NULL; END; END LOOP; END \$\$");
	my $memory = $s->query_safe(q{SELECT sum(total_bytes) FROM pg_backend_memory_contexts WHERE name LIKE 'event_store%'});
	$s->query_safe('COMMIT');
	$s->quit;
	ask(q{SELECT count(*), count(DISTINCT position), count(DISTINCT n) FROM plain WHERE context_id LIKE 's%'}, "$n|$n|$n", "$n savepoints: all rows are there");
	my $ticks = shard_ticks() - $before;
	$node->safe_psql('postgres', 'TRUNCATE plain');
	return ($memory, $ticks);
}

my ($few_memory, $few_ticks) = savepoints(15000);
my ($many_memory, $many_ticks) = savepoints(150000);
cmp_ok($many_memory, '<', 150000 * 200, 'rows do not wait for COMMIT in the session\'s memory');
cmp_ok($many_ticks, '<', 12 * ($few_ticks + 5), 'ten times as many are not a hundred times the work of the shards');

ask('SELECT count(*) FROM event_store.verify()', 0, 'no file is damaged');
ask('SELECT sum(corruptions) FROM event_store.stat_shards', 0, 'no shard met damage');
$node->stop;
done_testing();
