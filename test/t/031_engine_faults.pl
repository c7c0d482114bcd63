# A shard that dies at any step of recovery, of applying a message or of stopping loses nothing and doubles nothing;
# one that has no shared memory makes room, refuses writers while that does not help, and still answers; a paused one keeps its log durable.

use strict;
use warnings;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = PostgreSQL::Test::Cluster->new('faults');
$node->init;
$node->append_conf('postgresql.conf', <<'CONF');
shared_preload_libraries = 'event_store'
wal_level = replica
event_store.shards = 1
event_store.spill_after = 256kB
event_store.wal_sync_interval = 20s
max_worker_processes = 16
restart_after_crash = on
fsync = on
CONF
$node->start;
$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION event_store;
CREATE SCHEMA event_store_test;
CREATE EXTENSION event_store_test;
CREATE TABLE e (position bigint, context_id text, version bigint, n int, filler text) USING event_store;
CREATE TABLE h (context_id text, n int);
SQL

if ($node->safe_psql('postgres', 'SELECT event_store_test.fault_points_compiled()') ne 't')
{
	$node->stop;
	plan skip_all => 'built without fault points';
}

sub consistent
{
	my ($name) = @_;
	is($node->safe_psql('postgres', <<'SQL'), '', $name);
SELECT 'differs: ' || (SELECT count(*) FROM e) || ' <> ' || (SELECT count(*) FROM h)
WHERE (SELECT (count(*), count(DISTINCT position), sum(hashtext(context_id || n)::bigint))::text FROM e)
   <> (SELECT (count(*), count(*), sum(hashtext(context_id || n)::bigint))::text FROM h)
UNION ALL
SELECT 'versions of ' || context_id FROM e GROUP BY context_id
HAVING count(*) <> max(version) OR min(version) <> 1 OR count(DISTINCT version) <> count(*)
UNION ALL
SELECT 'order of ' || context_id FROM (SELECT context_id, version,
	row_number() OVER (PARTITION BY context_id ORDER BY position) AS rank FROM e) x
WHERE version <> rank
SQL
	return;
}

# A psql that is turned away while its input is written makes IPC::Run die: try again.
sub up
{
	for my $try (1 .. 1200)
	{
		my $state = eval {
			($node->psql('postgres', q{SELECT string_agg(state, ',') FROM event_store.stat_shards}))[1];
		};
		return 1 if defined $state && $state eq 'open';
		sleep 0.1;
	}
	return 0;
}

my $small = join("\n", map { "INSERT INTO h SELECT 's$_', g FROM generate_series(1, 3) g; "
	  . "INSERT INTO e (context_id, n) SELECT 's$_', g FROM generate_series(1, 3) g;" } 1 .. 20);
my $large = q{BEGIN; INSERT INTO h SELECT 'b' || g % 10, g FROM generate_series(1, 9000) g;
	INSERT INTO e (context_id, n, filler) SELECT 'b' || g % 10, g, repeat('f', 60) FROM generate_series(1, 9000) g; COMMIT;};
my $many = join("\n", map { "BEGIN; $_ COMMIT;" } split(/\n/, $small));
my $undecided = 'BEGIN; ' . ($large =~ s/^BEGIN;|COMMIT;$//gr);

# psql whose statements may fail: the server dies under it.  Each statement is a transaction of its own or in one.
sub attempt
{
	my ($sql) = @_;
	eval { $node->psql('postgres', $sql, timeout => 60, timed_out => \my $timed_out); };
	return;
}

# A fault that fires is told to the log.
sub has_fired
{
	my ($offset, $point, $test) = @_;
	like(slurp_file($node->logfile, $offset), qr/^fault point \Q$point\E: kill in process/m, $test);
	return;
}

consistent('nothing');

# ---- killed while applying ----

foreach my $point (qw(apply-batch finish-before-frame finish-applied verdict-logged))
{
	foreach my $nth (1, 7)
	{
		my $offset = -s $node->logfile;
		$node->safe_psql('postgres', "SELECT event_store_test.inject_fault('$point', 'kill', $nth)");
		attempt("BEGIN; $small COMMIT;") if $nth == 1;
		attempt($_) for ($large, "BEGIN; $small COMMIT;", map { "BEGIN; $_ COMMIT;" } split(/\n/, $small));
		# verdicts come when the shard asks for them, and the server says a moment later that it has crashed
		for (1 .. 60)
		{
			last if slurp_file($node->logfile, $offset) =~ /^fault point \Q$point\E: kill in process/m;
			attempt("BEGIN; $small COMMIT;");
			sleep 0.5;
		}
		has_fired($offset, $point, "killed at $point ($nth): it was");
		$node->wait_for_log(qr/all server processes terminated; reinitializing/, $offset);
		ok(up(), "up after a kill at $point ($nth)");
		$node->safe_psql('postgres', 'SELECT event_store_test.disarm_faults()');
		consistent("killed at $point ($nth)");
	}
}

# ---- killed while recovering ----

foreach my $point (qw(recovery-files-open recovery-own-wal-read recovery-log-open recovery-reading recovery-pg-wal-read))
{
	$node->safe_psql('postgres', $large);
	my $session = $node->background_psql('postgres', on_error_stop => 0);
	$session->query_safe($undecided);
	$node->poll_query_until('postgres', 'SELECT pending_segments > 0 FROM event_store.stat_shards');
	# nothing makes what comes now durable for 20 s: it is in PostgreSQL's WAL only
	$node->safe_psql('postgres', 'SELECT event_store.sync()');
	$node->safe_psql('postgres', $many) for 1 .. 15;
	my $offset = -s $node->logfile;
	$node->safe_psql('postgres', "SELECT event_store_test.inject_fault('$point', 'kill')");
	attempt(q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'event_store shard 0'});
	$node->wait_for_log(qr/all server processes terminated; reinitializing/, $offset);
	has_fired($offset, $point, "killed at $point: it was");
	ok(up(), "up after a kill at $point");
	eval { $session->quit };
	consistent("killed at $point");
	$node->safe_psql('postgres', "SELECT event_store.flush(); $small");
	consistent("flushed after a kill at $point");
}

# ---- a large transaction whose rows are in PostgreSQL's WAL only, and smaller ones behind it ----

foreach my $round (1 .. 2)
{
	$node->safe_psql('postgres', "SELECT event_store_test.inject_fault('job-after-take', 'sleep')");
	$node->safe_psql('postgres', $large =~ s/9000/40000/gr);
	$node->safe_psql('postgres', "$small SELECT event_store.sync(); $small");
	my $offset = -s $node->logfile;
	if ($round == 1)
	{
		$node->stop('immediate');
		$node->start;
	}
	else
	{
		$node->safe_psql('postgres',
			q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'event_store shard 0'});
	}
	$node->wait_for_log(qr/shard 0 is open/, $offset);
	my ($done, $held) = slurp_file($node->logfile, $offset) =~ /Own write-ahead log: (\d+) of (\d+) FINISH/;
	cmp_ok($done, '<', $held, "some FINISHes are left to PostgreSQL's WAL ($round)");
	ok(up(), 'up');
	$node->safe_psql('postgres', 'SELECT event_store_test.disarm_faults()');
	consistent("a large transaction without frames ($round)");
	$node->safe_psql('postgres', "$small SELECT event_store.flush()");
	consistent("and flushed ($round)");
}

# ---- killed just before the clean stop is noted ----

my $offset = -s $node->logfile;
$node->safe_psql('postgres', "$small SELECT event_store_test.inject_fault('stop-before-clean', 'kill')");
$node->stop('fast', fail_ok => 1);
has_fired($offset, 'stop-before-clean', 'killed at stop-before-clean: it was');
$node->stop('immediate', fail_ok => 1);
$node->start;
ok(up(), 'up after a kill at stop-before-clean');
consistent('killed at stop-before-clean');

# ---- no shared memory ----

$node->safe_psql('postgres', q{SELECT event_store_test.inject_fault('arena-alloc', 'enospc always')});
my $session = $node->background_psql('postgres', on_error_stop => 0);
$session->{stdin} .= "$large \\echo done\n";
$session->{run}->pump_nb();
ok($node->poll_query_until('postgres', q{SELECT event_store_test.fault_hits('arena-alloc') > 0}), 'memory is short');
sleep 1;
$node->safe_psql('postgres', 'SELECT event_store_test.disarm_faults()');
$session->query_safe('SELECT 1');
$session->quit;
consistent('went on after memory was short');

# it makes room by itself: a failed allocation has the MemTable flushed
$node->safe_psql('postgres', $many);
my $flushes = $node->safe_psql('postgres', 'SELECT flushes FROM event_store.stat_shards');
$node->safe_psql('postgres', q{SELECT event_store_test.inject_fault('arena-alloc', 'enospc')});
my $begin = time();
# (less than spill_after: FINISH of a large transaction has it flushed in any case)
$node->safe_psql('postgres', "SET statement_timeout = '60s'; " . ($large =~ s/9000/1500/gr) . $many);
ok($node->poll_query_until('postgres', "SELECT flushes > $flushes FROM event_store.stat_shards"),
	'without shared memory the MemTable is flushed');
consistent('room was made');

# it does not help: writers are refused in bounded time; whatever was committed is read, and can still be flushed
$node->safe_psql('postgres', q{SELECT event_store_test.inject_fault('arena-alloc', 'enospc always')});
my $refused = '';
my $slowest = 0;
my $rows = 0;
$session = $node->background_psql('postgres', on_error_stop => 0);
$session->query_safe("SET statement_timeout = '60s'");
$session->query_safe('\set VERBOSITY verbose');
$begin = time();
while ($refused eq '' && time() - $begin < 120)
{
	my $at = time();
	$session->{stderr} = '';
	$session->query("INSERT INTO e (context_id, n, filler) SELECT 'full', $rows + g, repeat('f', 1000) FROM generate_series(1, 100) g");
	$refused = $session->{stderr};
	$slowest = time() - $at if time() - $at > $slowest;
	$rows += 100 if $refused eq '';
}
like($refused, qr/ERROR:  53200: shard 0 has no shared memory for more events.*memtable_size/s, 'writers are refused');
cmp_ok($slowest, '<', 40, 'in bounded time');
$node->safe_psql('postgres', "INSERT INTO h SELECT 'full', g FROM generate_series(1, $rows) g") if $rows > 0;
$begin = time();
is($node->safe_psql('postgres', q{SET statement_timeout = '30s'; SELECT count(*) FROM e WHERE context_id = 'full'}),
	$rows, 'reads go on, with all that was committed');
cmp_ok(time() - $begin, '<', 25, 'without delay');
$session->{stderr} = '';
$session->query('SELECT event_store.flush()');
is($session->{stderr}, '', 'flush() needs no memory');
consistent('no memory');
is($session->query_safe('SELECT memtable_rows FROM event_store.stat_shards'), '0', 'all of it is in segments');
$node->safe_psql('postgres', 'SELECT event_store_test.disarm_faults()');
my $again = 0;
for (1 .. 300)
{
	$again = ($node->psql('postgres', q{BEGIN; INSERT INTO h VALUES ('again', 1); INSERT INTO e (context_id, n) VALUES ('again', 1); COMMIT;}))[0] == 0;
	last if $again;
	sleep 0.1;
}
ok($again, 'with memory writers go on');
$session->quit;
consistent('went on with memory');

# a value too large for what is kept for jobs: committed and read without memory, flush() says why it cannot go to a segment
$node->safe_psql('postgres', q{SELECT event_store_test.inject_fault('arena-alloc', 'enospc always')});
$node->safe_psql('postgres', q{BEGIN; INSERT INTO h VALUES ('large', 1);
	INSERT INTO e (context_id, n, filler) SELECT 'large', 1, string_agg(md5(g::text), '') FROM generate_series(1, 30000) g; COMMIT;});
consistent('a large value without memory');
my $why = '';
$node->psql('postgres', "\\set VERBOSITY verbose\nSET statement_timeout = '60s'; SELECT event_store.flush()", stderr => \$why);
like($why, qr/ERROR:  53200: .*DETAIL:  There is no shared memory for \d{6} bytes of rows/s, 'flush() says why');
$node->safe_psql('postgres', 'SELECT event_store_test.disarm_faults()');
sleep 1;
$node->safe_psql('postgres', "SET statement_timeout = '60s'; SELECT event_store.flush()");
consistent('a large value, in a segment');

# ---- paused ----

$node->safe_psql('postgres', 'SELECT event_store.pause_shard(0)');
my $writer = $node->background_psql('postgres', on_error_stop => 0);
$writer->{stdin} .= "BEGIN; INSERT INTO h SELECT 'paused', g FROM generate_series(1, 10) g;"
  . " INSERT INTO e (context_id, n) SELECT 'paused', g FROM generate_series(1, 10) g; COMMIT;\n";
$writer->{run}->pump_nb();
sleep 1;
is($node->safe_psql('postgres', q{SELECT count(*) FROM h WHERE context_id = 'paused'}), '0',
	'a commit with versions waits for a paused shard');
$node->safe_psql('postgres', 'SELECT event_store.resume_shard(0)');
$writer->query_safe('SELECT 1');
$writer->quit;
is($node->safe_psql('postgres', q{SELECT count(*) FROM h WHERE context_id = 'paused'}), '10', 'and goes on after it');
consistent('paused and resumed');

# ---- it must not open ----

$node->safe_psql('postgres', $small);
$node->stop('immediate');
my $control = $node->data_dir . '/event_store/shard_0/control';
foreach my $i (0, 1) { rename("$control.$i", "$control.$i.kept") or die; }
$node->start;
ok($node->poll_query_until('postgres', q{SELECT state = 'failed' FROM event_store.stat_shards}),
	'a shard without control blocks is failed');
my ($status, $out, $err) = $node->psql('postgres', 'SELECT count(*) FROM e');
like($err, qr/control/, 'and says why');
foreach my $i (0, 1) { rename("$control.$i.kept", "$control.$i") or die; }
$node->reload;
ok(up(), 'it opens when the reason is gone');
consistent('opened after a refusal');

$node->stop;
done_testing();
