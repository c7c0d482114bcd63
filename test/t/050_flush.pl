# From memory to segments: whatever kills a flush, a spill or an adoption, at whatever step, each event that was
# committed is there once, and none that was not.

use strict;
use warnings;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = PostgreSQL::Test::Cluster->new('flush');
$node->init;
$node->append_conf('postgresql.conf', <<'CONF');
shared_preload_libraries = 'event_store'
wal_level = replica
max_wal_senders = 4
event_store.shards = 2
event_store.spill_after = 256kB
event_store.memtable_size = 1MB
event_store.wal_file_size = 1MB
max_worker_processes = 16
restart_after_crash = on
log_checkpoints = off
autovacuum = off
min_wal_size = 32MB
max_wal_size = 48MB
wal_keep_size = 0
CONF
$node->start;

$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION event_store;
CREATE EXTENSION event_store_test;
ALTER DATABASE postgres SET search_path = public, event_store_test;
CREATE TABLE plain (position bigint, context_id text, n int, filler text) USING event_store;
CREATE TABLE versioned (position bigint, context_id text, version bigint, n int) USING event_store;
CREATE TABLE heap (kind text, context_id text, n int);
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
SQL

my $compiled = $node->safe_psql('postgres', 'SELECT fault_points_compiled()') eq 't';

# What is in the event tables is what is in the heap table; versions have no gap and agree with positions.
sub wrong
{
	return $node->safe_psql('postgres', <<'SQL');
SELECT 'plain differs: ' || (SELECT count(*) FROM plain) || ' <> ' || (SELECT count(*) FROM heap WHERE kind = 'plain')
WHERE (SELECT (count(*), count(DISTINCT position), sum(hashtext(context_id || n)::bigint))::text FROM plain)
   <> (SELECT (count(*), count(*), sum(hashtext(context_id || n)::bigint))::text FROM heap WHERE kind = 'plain')
UNION ALL
SELECT 'versioned differs: ' || (SELECT count(*) FROM versioned) || ' <> ' || (SELECT count(*) FROM heap WHERE kind = 'versioned')
WHERE (SELECT (count(*), count(DISTINCT position), sum(hashtext(context_id || n)::bigint))::text FROM versioned)
   <> (SELECT (count(*), count(*), sum(hashtext(context_id || n)::bigint))::text FROM heap WHERE kind = 'versioned')
UNION ALL
SELECT 'gap in ' || context_id FROM versioned GROUP BY context_id
HAVING count(*) <> max(version) OR min(version) <> 1 OR count(DISTINCT version) <> count(*)
UNION ALL
SELECT 'order in ' || context_id FROM (SELECT context_id, version,
	row_number() OVER (PARTITION BY context_id ORDER BY position) AS rank FROM versioned) x
WHERE version <> rank
UNION ALL
SELECT 'no position' FROM plain WHERE position IS NULL
SQL
}

sub consistent
{
	my ($name) = @_;
	is(wrong(), '', "$name: all that was committed is there, once and in order");
	return;
}

# Waits until the server takes connections again and its shards are open.
sub wait_open
{
	my $end = time() + 120;
	while (time() < $end)
	{
		my ($status, $out);

		# psql may end before it has read its query
		eval {
			($status, $out) = $node->psql('postgres',
				q{SELECT count(*) FROM event_store.stat_shards WHERE state = 'open'});
		};
		return 1 if defined $status && $status == 0 && $out eq '2';
		sleep 0.1;
	}
	return 0;
}

sub flush { return $node->safe_psql('postgres', 'SELECT event_store.flush()'); }

# A transaction with rows of both tables, some of them rolled back, $rows in all.
sub work
{
	my ($name, $rows) = @_;
	my $contexts = 13;
	my $wait = $rows >= 3000 ? 'SELECT spilled(3000);' : '';
	return <<"SQL";
BEGIN;
INSERT INTO plain SELECT NULL, '$name' || g % $contexts, g, repeat('x', 60) FROM generate_series(1, $rows) g;
INSERT INTO heap SELECT 'plain', '$name' || g % $contexts, g FROM generate_series(1, $rows) g;
SAVEPOINT s;
INSERT INTO plain SELECT NULL, '$name' || g % $contexts, g, repeat('y', 60) FROM generate_series(1, $rows) g;
INSERT INTO versioned (context_id, n) SELECT 'c' || g % $contexts, g FROM generate_series(1, $rows) g;
ROLLBACK TO s;
INSERT INTO versioned (context_id, n) SELECT 'c' || g % $contexts, g FROM generate_series(1, $rows) g;
INSERT INTO heap SELECT 'versioned', 'c' || g % $contexts, g FROM generate_series(1, $rows) g;
$wait
SQL
}

# ---- plain flushes ----

$node->safe_psql('postgres', work('a', 100) . 'COMMIT;');
consistent('in memory');
flush();
consistent('in segments');
is($node->safe_psql('postgres', 'SELECT sum(memtable_rows) FROM event_store.stat_shards'), '0',
	'after a flush no row is left in memory');
is($node->safe_psql('postgres', 'SELECT sum(segment_rows) FROM event_store.stat_shards'), '200',
	'and all are in segments, but those of a rolled-back savepoint');
$node->safe_psql('postgres', work('b', 20000) . 'COMMIT;');
consistent('spilled');
$node->safe_psql('postgres', work('c', 20000) . 'ROLLBACK;');
consistent('spilled and rolled back');
flush();
ok($node->poll_query_until('postgres', 'SELECT sum(pending_segments) = 0 FROM event_store.stat_shards'),
	'no pending segment is left');
consistent('spilled and flushed');
$node->restart;
consistent('restarted');

# Files are those of the manifest and no more.
sub segment_files { return scalar(glob_all($node->data_dir . '/event_store/shard_*/*seg.*')); }
sub glob_all { my @files = glob($_[0]); return @files; }
is(segment_files(), $node->safe_psql('postgres', 'SELECT sum(segments) FROM event_store.stat_shards'),
	'no file is left of what was rolled back');

# ---- transactions that are under way while others are flushed ----

my $open = $node->background_psql('postgres', on_error_stop => 0);
$open->query_safe(work('open', 300));
my $own = $node->background_psql('postgres', on_error_stop => 0);
$own->query_safe(work('spilling', 9000));
# Own WAL and PostgreSQL's forget what came before: only what was logged again is left of the open ones.
foreach my $round (1 .. 6)
{
	$node->safe_psql('postgres', work("round$round", 2500) . 'COMMIT;');
	flush();
	$node->safe_psql('postgres', 'SELECT event_store.sync(); SELECT pg_switch_wal(); CHECKPOINT');
}
is($open->query_safe(q{SELECT count(*) FROM plain WHERE context_id LIKE 'open%'}), '300',
	'a transaction sees its rows after flushes of others');
is($own->query_safe(q{SELECT count(*) FROM plain WHERE context_id LIKE 'spilling%'}), '9000',
	'also those in pending segments');
$open->query_safe('COMMIT');
consistent('staged while others were flushed');
$own->query_safe('COMMIT');
consistent('spilled while others were flushed');
$open->query_safe(work('open2', 300));
$own->query_safe(work('spilling2', 9000));
foreach my $round (1 .. 6)
{
	$node->safe_psql('postgres', work("round2$round", 2500) . 'COMMIT;');
	flush();
	$node->safe_psql('postgres', 'SELECT event_store.sync(); SELECT pg_switch_wal(); CHECKPOINT');
}
# The shards alone are restarted: what is staged comes from carried frames and PostgreSQL's WAL.
$node->safe_psql('postgres',
	q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type LIKE 'event_store shard%'});
ok(wait_open(), 'shards come back');
$open->query_safe('COMMIT');
$own->query_safe('ROLLBACK');
consistent('staged while others were flushed, and the shards were restarted');
flush();
consistent('and flushed');
$open->quit;
$own->quit;

# ---- transactions that have finished but are not decided: synchronous replication holds them ----

$node->safe_psql('postgres', q{ALTER SYSTEM SET synchronous_standby_names = 'nobody'});
$node->reload;
my @held;
foreach my $i (1 .. 3)
{
	my $rows = $i == 2 ? 9000 : 40;
	my ($out, $err) = ('', '');
	my $sql = work("held$i", $rows);
	$sql =~ s/'c' \|\|/'held$i' ||/g;
	push @held, IPC::Run::start([ 'psql', '-X', '-d', $node->connstr('postgres'), '-c', "$sql COMMIT;" ],
		'<', \'', '>', \$out, '2>', \$err, IPC::Run::timeout(600));
}
ok($node->poll_query_until('postgres',
	q{SELECT count(*) = 3 FROM pg_stat_activity WHERE wait_event = 'SyncRep'}), 'three transactions wait');
foreach my $round (1 .. 5)
{
	$node->safe_psql('postgres', 'SET synchronous_commit = local;' . work("local$round", 2500) . 'COMMIT;');
	$node->safe_psql('postgres', 'SET synchronous_commit = local; SELECT event_store.flush()');
	$node->safe_psql('postgres', 'SET synchronous_commit = local; SELECT event_store.sync(); SELECT pg_switch_wal(); CHECKPOINT');
}
is($node->safe_psql('postgres', q{SELECT count(*) FROM plain WHERE context_id LIKE 'held%'}), '0',
	'nobody sees what is not decided');
$node->stop('immediate');
eval { $_->finish } foreach @held;
$node->safe_psql('postgres', 'SELECT 1') if 0;
$node->append_conf('postgresql.conf', q{synchronous_standby_names = ''});
unlink($node->data_dir . '/postgresql.auto.conf');
append_to_file($node->data_dir . '/postgresql.auto.conf', '');
$node->start;
ok(wait_open(), 'open after the crash');
consistent('undecided transactions carried over several flushes, and a crash');
is($node->safe_psql('postgres', q{SELECT count(*) FROM plain WHERE context_id LIKE 'held%'}), '9080',
	'their commit records were in the log, so they are committed');
flush();
consistent('and flushed');

# ---- every step fails or dies ----

SKIP:
{
	skip 'no fault points in this build', 1 unless $compiled;

	my @points = split /\n/, $node->safe_psql('postgres',
		q{SELECT name || ' ' || may_fail FROM fault_point_info()
		  WHERE name ~ '^(job|segment|flush|spill|adopt)-' AND name <> 'segment-read' OR name ~ '^manifest-(before-)?(write|written|sync|synced)'});
	cmp_ok(scalar(@points), '>', 20, 'there are fault points');
	foreach my $entry (@points)
	{
		my ($point, $may_fail) = split / /, $entry;
		my $hits = 0;

		if ($may_fail eq 'true' && $point !~ /sync$/)
		{
			foreach my $error (qw(enospc eio))
			{
				$node->safe_psql('postgres', "SELECT inject_fault('$point', '$error')");
				$node->psql('postgres', work($point, 3000) . 'COMMIT; SELECT event_store.flush();');
				$node->safe_psql('postgres', 'SELECT disarm_faults()');
				ok(wait_open(), "open after $error at $point");
				flush();
				consistent("$error at $point");
			}
			next;
		}
		foreach my $nth (1, 2)
		{
			$node->safe_psql('postgres', "SELECT inject_fault('$point', 'kill', $nth)");
			my $end = time() + 20;
			my $killed = 0;
			while (!$killed && time() < $end)
			{
				my $commit = rand() < 0.7 ? 'COMMIT' : 'ROLLBACK';
				my $status = -1;
				eval {
					($status) = $node->psql('postgres', work($point, 6000) . "$commit;");
					($status) = $node->psql('postgres', 'SELECT event_store.flush();') if $status == 0;
				};
				$killed = $status != 0;
				last if !$killed && $nth == 2;
			}
			$hits += $killed;
			ok(wait_open(), "open after kill at $point ($nth)" . ($killed ? '' : ', not reached'));
			$node->safe_psql('postgres', 'SELECT disarm_faults()');
			consistent("kill at $point ($nth)");
		}
		flush();
		consistent("kill at $point, flushed");
		$node->safe_psql('postgres', 'TRUNCATE plain, versioned, heap');
	}
}

# ---- flushes in a loop, and kill -9 ----

my $script = $node->basedir . '/load.sql';
append_to_file($script, <<'SQL');
\set c random(1, 50)
\set n random(1, 1000000)
\set m random(1, 200)
BEGIN;
INSERT INTO plain SELECT NULL, 'l' || :c, :n + g, 'load' FROM generate_series(1, :m) g;
INSERT INTO heap SELECT 'plain', 'l' || :c, :n + g FROM generate_series(1, :m) g;
INSERT INTO versioned (context_id, n) VALUES ('l' || :c, :n);
INSERT INTO heap VALUES ('versioned', 'l' || :c, :n);
COMMIT;
SQL
my $flushes = $node->basedir . '/flush.sql';
append_to_file($flushes, "SELECT event_store.flush();\n");

foreach my $round (1 .. ($ENV{ES_LONG} ? 20 : 4))
{
	my ($out, $err) = ('', '');
	my @load = map {
		IPC::Run::start([ 'pgbench', '-n', '-f', $_->[0], '-c', $_->[1], '-T', 30, $node->connstr('postgres') ],
			'<', \'', '>', \$out, '2>', \$err, IPC::Run::timeout(300))
	} ([ $script, 5 ], [ $flushes, 1 ]);
	sleep 1 + rand(2);
	my @pids = split /\n/, $node->safe_psql('postgres',
		q{SELECT pid FROM pg_stat_activity WHERE backend_type LIKE 'event_store %' ORDER BY random()});
	kill 'KILL', $pids[0];
	eval { $_->finish } foreach @load;
	ok(wait_open(), "open after kill -9, round $round");
	consistent("kill -9 while flushing, round $round");
}

# ---- maintenance workers come and go ----

{
	my ($out, $err) = ('', '');
	my $load = IPC::Run::start([ 'pgbench', '-n', '-f', $script, '-c', 4, '-T', 5, $node->connstr('postgres') ],
		'<', \'', '>', \$out, '2>', \$err, IPC::Run::timeout(300));
	foreach (1 .. 10)
	{
		sleep 0.5;
		$node->safe_psql('postgres',
			q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type LIKE 'event_store maintenance%'});
	}
	$load->finish;
	flush();
	consistent('maintenance workers terminated while they were needed');
}

is($node->safe_psql('postgres', 'SELECT count(*) FROM event_store.verify()'), '0', 'no file is damaged');
is($node->safe_psql('postgres', q{SELECT sum(corruptions) FROM event_store.stat_shards}), '0', 'no shard met damage');
$node->stop;
done_testing();
