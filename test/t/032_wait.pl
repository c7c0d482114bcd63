# wait_for_events returns as soon as there is something to read, and never before: not for an uncommitted row, not
# for one of another context, not above the horizon; whatever ends the writer that was the horizon wakes the waiters.

use strict;
use warnings;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = PostgreSQL::Test::Cluster->new('wait');
$node->init;
$node->append_conf('postgresql.conf', <<'CONF');
shared_preload_libraries = 'event_store'
wal_level = replica
event_store.shards = 2
max_worker_processes = 16
max_connections = 60
CONF
$node->start;
$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION event_store;
CREATE SCHEMA event_store_test;
CREATE EXTENSION event_store_test;
CREATE TABLE e (position bigint, context_id text, n int) USING event_store;
CREATE TABLE other (position bigint, context_id text, n int) USING event_store;
INSERT INTO e VALUES (NULL, 'a', 0);
INSERT INTO other VALUES (NULL, 'a', 0);
SQL

# A session that waits; result() gives what it found and after how long.
sub waiter
{
	my ($arguments) = @_;
	my $w = { out => '', err => '', start => time() };
	$w->{run} = IPC::Run::start(
		[ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-c',
			"CALL event_store.wait_for_events($arguments, store => 'e')" ],
		'>', \$w->{out}, '2>', \$w->{err}, IPC::Run::timeout(300));
	return $w;
}

sub result
{
	my ($w) = @_;
	$w->{run}->finish;
	$w->{seconds} = time() - $w->{start};
	chomp($w->{out});
	return $w->{out} . $w->{err};
}

sub waiting
{
	my ($n) = @_;
	return $node->poll_query_until('postgres', "SELECT sum(waiters) >= $n FROM event_store.stat_shards");
}

sub newest { return $node->safe_psql('postgres', 'SELECT max(position) FROM e'); }

# ---- one writer ----

my $after = newest();
my @w = (waiter("after => $after, timeout => '150 s'"), waiter("after => $after, context_id => 'b', timeout => '150 s'"));
ok(waiting(2), 'both wait');
sleep 0.3;
$node->safe_psql('postgres', q{INSERT INTO other VALUES (NULL, 'b', 1)});
$node->safe_psql('postgres', q{BEGIN; INSERT INTO e VALUES (NULL, 'b', 1); ROLLBACK});
sleep 0.7;
is($w[0]{out} . $w[1]{out}, '', 'nobody is woken by another table or by an abort');
$node->safe_psql('postgres', q{INSERT INTO e VALUES (NULL, 'b', 1)});
is(result($_), 't', 'woken by a commit') for @w;
cmp_ok($w[1]{seconds}, '<', 60, 'soon');

$after = newest();
is(result(waiter("after => $after - 1, timeout => '10 s'")), 't', 'a row that is there already');
is(result(waiter("after => $after - 1, context_id => 'b', timeout => '10 s'")), 't', 'of the context, too');
$node->safe_psql('postgres', 'SELECT event_store.flush()');
is(result(waiter("after => $after - 1, timeout => '10 s'")), 't', 'in a segment');
is(result(waiter("after => $after - 1, context_id => 'b', timeout => '10 s'")), 't', 'of the context in a segment');

my $timed = waiter("after => $after, context_id => 'a', timeout => '1 s'");
$node->safe_psql('postgres', q{INSERT INTO e VALUES (NULL, 'b', 2)});
is(result($timed), 'f', 'time-out, although another context got a row');
cmp_ok($timed->{seconds}, '>', 0.9, 'not before its time');
cmp_ok($timed->{seconds}, '<', 30, 'and not long after it');

# ---- the horizon ----

SKIP:
{
	skip 'built without fault points', 6
	  if $node->safe_psql('postgres', 'SELECT event_store_test.fault_points_compiled()') ne 't';

	foreach my $end ('commit', 'terminate')
	{
		# a writer stands still with positions taken, another one commits behind it
		$node->safe_psql('postgres', q{SELECT event_store_test.inject_fault('reserve-after-take', 'sleep')});
		my $slow = IPC::Run::start(
			[ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-c', q{SET application_name = 'slow'},
				'-c', q{INSERT INTO e VALUES (NULL, 'slow', 1)} ],
			'>', \my $out, '2>', \my $err, IPC::Run::timeout(300));
		$node->poll_query_until('postgres', q{SELECT event_store_test.fault_hits('reserve-after-take') > 0});
		$after = newest();
		my @held = (waiter("after => $after, timeout => '150 s'"),
			waiter("after => $after, context_id => 'fast', timeout => '150 s'"));
		waiting(2);
		$node->safe_psql('postgres', q{INSERT INTO e VALUES (NULL, 'fast', 1)});
		sleep 1;
		is($held[0]{out} . $held[1]{out}, '', "nobody is woken above the horizon ($end)");
		if ($end eq 'terminate')
		{
			$node->safe_psql('postgres',
				q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'slow'});
		}
		$node->safe_psql('postgres', 'SELECT event_store_test.disarm_faults()');
		is(result($_), 't', "woken when the writer is gone ($end)") for @held;
		eval { $slow->finish };
	}
}

# ---- many ----

$after = newest();
@w = map { waiter("after => $after, context_id => 'm$_', timeout => '150 s'") } 1 .. 20;
ok(waiting(20), 'twenty wait');
$node->safe_psql('postgres', "INSERT INTO e SELECT NULL, 'm' || g, g FROM generate_series(1, 20) g");
is(join('', map { result($_) } @w), 't' x 20, 'all are woken');
ok($node->poll_query_until('postgres', 'SELECT sum(waiters) = 0 FROM event_store.stat_shards'), 'nobody is left');

# ---- one that goes away ----

my $gone = waiter("after => $after + 1000, timeout => '150 s'");
waiting(1);
$node->safe_psql('postgres',
	q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'CALL event_store.wait%' AND pid <> pg_backend_pid()});
eval { $gone->{run}->finish };
ok($node->poll_query_until('postgres', 'SELECT sum(waiters) = 0 FROM event_store.stat_shards'),
	'a waiter that is terminated leaves nothing behind');

# a follower sees every event once, in order, while six sessions write
my $script = $node->basedir . '/w.sql';
append_to_file($script, "\\set c random(1, 20)\nINSERT INTO e VALUES (NULL, 'f' || :c, :c);\n");
my $start = newest();
my $bench = IPC::Run::start([ 'pgbench', '-n', '-f', $script, '-c', 6, '-t', 300, $node->connstr('postgres') ],
	'>', \my $bout, '2>', \my $berr, IPC::Run::timeout(300));
my ($last, $seen, $rounds) = ($start, 0, 0);
my $follower = $node->background_psql('postgres');
while ($seen < 1800 && $rounds++ < 5000)
{
	my $found = $follower->query_safe("CALL event_store.wait_for_events(after => $last, timeout => '60 s', store => 'e')");
	last if $found ne 't';
	my $answer = $follower->query_safe(
		"SELECT count(*) || ' ' || coalesce(max(position), $last) FROM e, (SELECT event_store.horizon('e') AS h OFFSET 0) x WHERE position > $last AND position < h");
	my ($n, $max) = split(/ /, $answer);
	$seen += $n;
	$last = $max;
}
$bench->finish;
is($seen, 1800, 'a follower has seen every event once');
$follower->quit;

$node->stop;
done_testing();
