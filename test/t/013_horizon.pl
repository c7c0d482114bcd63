# Whoever reads the events of a table below the horizon of his snapshot never misses one that becomes visible
# later; and the horizon is held back by nobody but those between taking positions and the end of their commit.

use strict;
use warnings;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $seconds = $ENV{ES_LONG} ? 120 : 10;
my $node    = PostgreSQL::Test::Cluster->new('horizon');
$node->init;
$node->append_conf('postgresql.conf', <<CONF);
shared_preload_libraries = 'event_store'
wal_level = replica
event_store.shards = 2
max_worker_processes = 16
max_connections = 60
log_statement = none
synchronous_commit = off
# its snapshots would need folded entries
autovacuum = off
CONF
$node->start;
# A heap table plays the event table: its rows become visible exactly when the transaction does.
$node->safe_psql('postgres', <<'SQL');
CREATE SCHEMA event_store_test;
CREATE EXTENSION event_store_test;
CREATE TABLE events (storage bigint, position bigint);
CREATE TABLE observed (storage bigint, horizon bigint, rows bigint, isolation text);
CREATE INDEX ON events (storage, position);
SQL

sub run { return $node->safe_psql('postgres', "SET search_path = event_store_test, public; $_[0]"); }

# ---- many writers, many readers

my $dir = PostgreSQL::Test::Utils::tempdir();
# tables 1 to 6; a transaction with five of them counts for all
append_to_file("$dir/write.sql", <<'SQL');
\set a random(1, 6)
\set n random(1, 5)
\set kind random(1, 20)
\set pause random(0, 1500)
BEGIN;
SELECT txid_current();
\if :kind = 1
SELECT event_store_test.reserve_positions(:n * 5, '{1,2,3,4,5}') AS base \gset
INSERT INTO events SELECT 1 + i % 5, :base + i FROM generate_series(0, :n * 5 - 1) i;
\else
SELECT event_store_test.reserve_positions(:n, ARRAY[:a]) AS base \gset
INSERT INTO events SELECT :a, :base + i FROM generate_series(0, :n - 1) i;
\endif
\if :kind = 2
\sleep :pause us
\endif
\if :kind = 3
ROLLBACK;
\else
COMMIT;
\endif
SQL
append_to_file("$dir/read.sql", <<'SQL');
\set a random(1, 6)
INSERT INTO observed
SELECT :a, h, (SELECT count(*) FROM events WHERE storage = :a AND position < h), 'rc'
FROM (SELECT event_store_test.horizon(:a) AS h OFFSET 0) x;
SQL
# the horizon read first and the snapshot after, as functions do that take their own
append_to_file("$dir/read_first.sql", <<'SQL');
\set a random(1, 6)
SELECT event_store_test.newest_horizon(:a) AS h \gset
INSERT INTO observed
SELECT :a, :h, (SELECT count(*) FROM events WHERE storage = :a AND position < :h), 'first';
SQL
# a snapshot that is older than its horizon
append_to_file("$dir/read_old.sql", <<'SQL');
\set a random(1, 6)
\set pause random(0, 300)
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT count(*) FROM observed LIMIT 1;
\sleep :pause ms
SELECT h, (SELECT count(*) FROM events WHERE storage = :a AND position < h) AS n
FROM (SELECT event_store_test.horizon(:a) AS h OFFSET 0) x \gset
COMMIT;
INSERT INTO observed VALUES (:a, :h, :n, 'rr');
SQL
# one more in a single transaction that lasts until the ring has gone round many times
my $old = $node->background_psql('postgres');
$old->query_safe('BEGIN ISOLATION LEVEL REPEATABLE READ');
$old->query_safe('SELECT count(*) FROM events');

$node->command_ok(
	[
		'pgbench', '-n', '-c', '24', '-j', '2', '-T', $seconds,
		'-f', "$dir/write.sql\@12", '-f', "$dir/read.sql\@4", '-f', "$dir/read_first.sql\@4", '-f', "$dir/read_old.sql\@1",
		'postgres'
	],
	'writers and readers');

my ($h, $n) = split(/\|/, $old->query_safe(
	'SELECT h, (SELECT count(*) FROM events WHERE storage = 1 AND position < h) FROM (SELECT event_store_test.horizon(1) AS h OFFSET 0) x'));
$old->query_safe('COMMIT');
$old->quit;
is($n, 0, 'the oldest snapshot sees nothing');
run("INSERT INTO observed VALUES (1, $h, $n, 'oldest')");

note(run('SELECT isolation, count(*), count(DISTINCT horizon), max(rows) FROM observed GROUP BY 1'));
note(run('SELECT * FROM position_state()'));
for my $isolation ('rc', 'first', 'rr', 'oldest')
{
	is( run(qq{
		SELECT count(*) FROM observed o
		WHERE isolation = '$isolation'
		  AND rows <> (SELECT count(*) FROM events e WHERE e.storage = o.storage AND e.position < o.horizon)}),
		'0', "$isolation: nothing appeared below a horizon that somebody had read");
}
cmp_ok(run("SELECT count(*) FROM observed WHERE isolation = 'rc' AND rows > 0"), '>', 50, 'readers saw events');
cmp_ok(run('SELECT count(*) FROM events'), '>', 1024 * 2, 'the ring went round');
is(run('SELECT count(*) - count(DISTINCT position) FROM events'), '0', 'no position was given twice');

# ---- what holds the horizon back

sub counter { return run('SELECT counter FROM position_state()'); }

is(run('SELECT horizon(1)'), counter(), 'when nobody writes it is the counter');
my $idle = $node->background_psql('postgres');
$idle->query_safe('BEGIN; INSERT INTO events VALUES (9, 0)');
run('SELECT reserve_positions(10, ARRAY[2])');
is(run('SELECT horizon(1)'), counter(), 'an idle transaction does not hold it back');
my $base = $idle->query_safe('SELECT event_store_test.reserve_positions(10, ARRAY[2])');
run('SELECT reserve_positions(10, ARRAY[1])');
is(run('SELECT horizon(1)'), counter(), 'nor does a writer of another table');
is(run('SELECT horizon(2)'), $base, 'a writer between taking positions and COMMIT does');
is(run('SELECT horizon()'),  $base, 'also where all tables are asked for');
is(run('SELECT newest_horizon(2)'), $base, 'and for the shards');
$idle->query_safe('ROLLBACK');
is(run('SELECT horizon(2)'), counter(), 'until it ends');
$idle->query_safe('BEGIN');
$idle->query_safe('SELECT event_store_test.reserve_positions(10, ARRAY[2])');
my $pid = $idle->query_safe('SELECT pg_backend_pid()');
run("SELECT pg_terminate_backend($pid)");
$node->poll_query_until('postgres', "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $pid");
is(run('SELECT horizon(2)'), counter(), 'however it ends');

# restored positions, below and above the counter
my $restore = $node->background_psql('postgres');
$restore->query_safe('BEGIN');
$restore->query_safe("SELECT event_store_test.given_positions(5, ${\(counter() + 1000)}, ARRAY[3])");
is(run('SELECT horizon(3)'), '5',       'a restore holds it at its lowest position');
is(run('SELECT horizon(1)'), counter(), 'of that table');
$restore->query_safe('SELECT event_store_test.reserve_positions(10, ARRAY[4])');
is(run('SELECT horizon(3)'), '5', 'also if it takes new positions as well');
is(run('SELECT horizon(4)'), '5', 'which is careful for the second table');
$restore->query_safe('COMMIT');
is(run('SELECT horizon(3)'), counter(), 'until it is committed');
$restore->quit;

# a snapshot from before a commit: the ring
my $before = $node->background_psql('postgres');
$before->query_safe('BEGIN ISOLATION LEVEL REPEATABLE READ');
$before->query_safe('SELECT 1');
$base = run('SELECT reserve_positions(10, ARRAY[1])');
run('SELECT reserve_positions(1, ARRAY[2])') for 1 .. 3;
is($before->query_safe('SELECT event_store_test.horizon(1)'), $base, 'a snapshot does not see a later commit');
is(run('SELECT horizon(1)'), counter(), 'a later snapshot does');
append_to_file("$dir/turn.sql", "SELECT event_store_test.reserve_positions(1, ARRAY[2]);\n");
$node->command_ok([ 'pgbench', '-n', '-c', '4', '-t', '600', '-f', "$dir/turn.sql", 'postgres' ], 'two turns of the ring');
cmp_ok($before->query_safe('SELECT event_store_test.horizon(1)'), '<=', $base, 'nor when its entry was folded');
is(run('SELECT horizon(1)'), counter(), 'which does not hold later snapshots back');
$before->query_safe('COMMIT');
$before->quit;
$node->command_ok([ 'pgbench', '-n', '-c', '4', '-t', '600', '-f', "$dir/turn.sql", 'postgres' ], 'two more turns');
is(run('SELECT overflow_base FROM position_state()'), '0', 'and the folded entries are forgotten when no snapshot needs them');

# ---- limits

my ($status, $out, $err) = $node->psql('postgres', "\\set VERBOSITY verbose\nSELECT event_store_test.given_positions(1, 140737488355328)");
like($err, qr/ERROR:  22003: position 140737488355328 is out of range/, 'position beyond 2^47 - 1');
$node->safe_psql('postgres', <<'SQL');
CREATE ROLE somebody;
GRANT USAGE ON SCHEMA event_store_test TO somebody;
SQL
cmp_ok(run('SELECT reserved_below - counter FROM position_state()'), '>', 0, 'positions are below what is reserved');
my $first = run('SELECT reserve_positions(10000000)');
is(run("SELECT counter - $first, reserved_below >= counter, announced >= reserved_below FROM position_state()"),
	'10000000|t|t', 'ten steps of positions at once');

# ---- never twice, also not after a crash

my $highest = counter();
$node->stop('immediate');
$node->start;
cmp_ok(run('SELECT reserve_positions(1)'), '>=', $highest, 'after a crash positions go on above all that were handed out');
run('SELECT echo(0, 1), echo(1, 1)');    # a shard that is still recovering cannot stop cleanly
my $exact = counter();
$node->restart;
is(run('SELECT reserve_positions(1)'), $exact, 'after a clean stop at the exact value');

# ---- errors and crashes at each step

SKIP:
{
	skip 'no fault points in this build', 1
	  unless $node->safe_psql('postgres', 'SELECT event_store_test.fault_points_compiled()') eq 't';
	my $session = $node->background_psql('postgres', on_error_stop => 0);
	my @steps = qw(reserve-after-publish reserve-after-take reserve-before-log reserve-before-flush reserve-after-flush);

	for my $point (@steps)
	{
		run("SELECT inject_fault('$point', 'error')");
		# beyond what is reserved, so that a RESERVE is logged
		$session->query('SELECT event_store_test.reserve_positions(3000000, ARRAY[1])');
		like($session->{stderr}, qr/fault injected at "$point"/, "error at $point");
		$session->{stderr} = '';
		is(run('SELECT horizon(1)'), counter(), "the slot is clear after an error at $point");
		run('SELECT disarm_faults()');
		$session->query_safe('SELECT event_store_test.reserve_positions(10, ARRAY[1])');
		is(run('SELECT reserved_below >= counter FROM position_state()'), 't', 'and the session goes on');
	}
	$session->quit;

	# a writer who is visible, but whose slot is still set, holds nobody back who sees him
	for my $point ('horizon-before-push', 'horizon-after-push')
	{
		my $slow = $node->background_psql('postgres');

		$slow->query_safe('SELECT 1');
		run("SELECT inject_fault('$point', 'sleep')");
		$slow->query_until(qr/begin/, "\\echo begin\nSELECT event_store_test.reserve_positions(10, ARRAY[1]);\n\\echo end\n");
		$node->poll_query_until('postgres', "SELECT event_store_test.fault_hits('$point') = 1");
		is(run('SELECT horizon(1)'), counter(), "a writer at $point does not hold back who sees him");
		cmp_ok(run('SELECT newest_horizon(1)'), '<', counter(), 'but those who wait for all snapshots');
		run('SELECT disarm_faults()');
		$slow->query_until(qr/end/, '');
		$slow->quit;
	}

	$node->append_conf('postgresql.conf', 'restart_after_crash = on');
	$node->reload;
	for my $point (@steps, 'horizon-before-push', 'horizon-after-push')
	{
		my $handed_out = counter() - 1;
		my $offset = -s $node->logfile;

		$node->psql('postgres',
			"SELECT event_store_test.inject_fault('$point', 'kill'); SELECT event_store_test.reserve_positions(3000000, ARRAY[1])");
		# a first answer may come before the postmaster has noticed
		$node->wait_for_log(qr/all server processes terminated; reinitializing/, $offset);
		$node->poll_query_until('postgres', 'SELECT counter > 0 FROM event_store_test.position_state()');
		my $next = run('SELECT reserve_positions(1)');
		cmp_ok($next, '>', $handed_out, "no position twice after a crash at $point");
		# what the killed one had taken, if he could have used it
		cmp_ok($next, '>=', $handed_out + 3000001, 'nor what was taken by then') if $point =~ /after-flush|horizon/;
	}
}

$node->stop;
done_testing();
