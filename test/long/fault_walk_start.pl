# A shard, keeper or server that dies at any step of its start, of recovery, of the making of a store or of its stop, and does
# so again and again, comes back with each transaction whole or absent, as it was acknowledged.

use strict;
use warnings;
use EventStore::FaultWalk;
use EventStore::Server qw(seed faults_compiled kill_all crash_restart wait_open sql try_sql new_server set_conf);
use EventStore::Workload;
use PostgreSQL::Test::RecursiveCopy;
use PostgreSQL::Test::Utils;
use File::Path qw(remove_tree);
use Test::More;
use Time::HiRes qw(sleep time);

seed();
my $walk = EventStore::FaultWalk->new('walk_start');
my $node = $walk->{node};
plan skip_all => 'no fault points in this build' unless faults_compiled($node);
my @unknown = map { $_->[0] } $walk->points('unknown');
$walk->walk_part('start');

sub points_that_need
{
	my ($what) = @_;
	return grep { my (undef, $needs) = EventStore::FaultWalk::plan_of($_); ($needs->[0] // '') eq $what }
	  map { $_->[0] } $walk->points('start');
}

# ---- killed in recovery, five times in a row: never the same place

my @steps = qw(recovery-files-open recovery-own-wal-read recovery-log-open recovery-pg-wal-read control-synced);
foreach my $round (1 .. ($ENV{ES_LONG} ? 5 : 1))
{
	$walk->load(1.5);
	kill_all($node);
	$walk->{oracle}->crashed;
	foreach my $step (@steps)
	{
		ok($walk->at_start($node, $step, 'kill', 1), "killed in recovery at $step");
	}
	crash_restart($node);
	is($walk->{oracle}->check($node), '', 'killed five times during recovery: the oracle agrees');
}

# ---- killed while it reads PostgreSQL's WAL: there is much of it when shards have not synced for long

foreach my $point (points_that_need('unsynced'))
{
	sql($node, 'ALTER SYSTEM SET event_store.wal_sync_interval = 60000; SELECT pg_reload_conf()');
	$walk->load(3);
	kill_all($node);
	$walk->{oracle}->crashed;
	$walk->{fired}{$point}++ if $walk->at_start($node, $point, 'kill', 1);
	crash_restart($node);
	is($walk->{oracle}->check($node), '', "killed at $point: the oracle agrees");
	sql($node, 'ALTER SYSTEM RESET event_store.wal_sync_interval; SELECT pg_reload_conf()');
}

# ---- the first start of a cluster

my $fresh = PostgreSQL::Test::Cluster->new('first');
$fresh->init;
$fresh->append_conf('postgresql.conf', <<'CONF');
shared_preload_libraries = 'event_store'
wal_level = replica
max_worker_processes = 24
event_store.shards = 2
fsync = on
CONF
my $empty = $fresh->data_dir . '.empty';
PostgreSQL::Test::RecursiveCopy::copypath($fresh->data_dir, $empty);
my @first = points_that_need('first');
foreach my $point (@first)
{
	remove_tree($fresh->data_dir);
	PostgreSQL::Test::RecursiveCopy::copypath($empty, $fresh->data_dir);
	chmod(0700, $fresh->data_dir);
	my $fired = $walk->at_start($fresh, $point, 'kill', 1);
	$walk->{fired}{$point}++ if $fired;
	$fresh->start;
	my ($status, $out, $err) = try_sql($fresh, 'CREATE EXTENSION event_store');
	is($err, '', "$point: the extension can be made");
	ok(wait_open($fresh, 30), "killed at $point of the first start: open at the second") or next;
	sql($fresh, q{SELECT event_store.append('a', 't', '1'); SELECT event_store.append('b', 't', '2')});
	crash_restart($fresh);
	is(sql($fresh, 'SELECT count(*), min(version), max(version) FROM event_store.events'), '2|1|1', "$point: and it keeps events");
	$fresh->stop;
}

# ---- a store that a cluster takes over from another one

my $adopter = PostgreSQL::Test::Cluster->new('adopter');
$adopter->init;
$adopter->append_conf('postgresql.conf', <<'CONF');
shared_preload_libraries = 'event_store'
wal_level = replica
max_worker_processes = 24
event_store.shards = 2
fsync = on
CONF
my $without_store = $adopter->data_dir . '.empty';
PostgreSQL::Test::RecursiveCopy::copypath($adopter->data_dir, $without_store);
my @adopt = points_that_need('adopt');
if (@adopt)
{
	sql($node, 'SELECT event_store.flush()');
	my $rows = sql($node, 'SELECT sum(segment_rows) FROM event_store.stat_shards');
	my $sysid = sql($node, 'SELECT system_identifier FROM pg_control_system()');
	$node->stop;
	foreach my $point (@adopt)
	{
		remove_tree($adopter->data_dir);
		PostgreSQL::Test::RecursiveCopy::copypath($without_store, $adopter->data_dir);
		chmod(0700, $adopter->data_dir);
		PostgreSQL::Test::RecursiveCopy::copypath($node->data_dir . '/event_store', $adopter->data_dir . '/event_store');
		set_conf($adopter, "event_store.adopt_system_id = '$sysid'");
		foreach my $nth (1, 2)
		{
			$walk->{fired}{$point}++ if $walk->at_start($adopter, $point, 'kill', $nth);
		}
		$adopter->start;
		try_sql($adopter, 'CREATE EXTENSION event_store');
		ok(wait_open($adopter, 30), "killed at $point: adopted at the next start") or next;
		is(sql($adopter, 'SELECT sum(segment_rows) FROM event_store.stat_shards'), $rows, "$point: with all rows");
		$adopter->stop;
	}
	$node->start;
}

# ---- the slot is lost while the shards live

foreach my $point (points_that_need('lost_slot'))
{
	set_conf($node, 'max_slot_wal_keep_size = 32MB');
	$node->restart;
	sql($node, "SELECT event_store.pause_shard(0)");
	sql($node, "SELECT event_store_test.inject_fault('$point', 'kill')");
	my $offset = -s $node->logfile;
	my $killed = 0;
	foreach (1 .. 8)
	{
		try_sql($node, q{CREATE TABLE IF NOT EXISTS ballast (v text); ALTER TABLE ballast ALTER v SET STORAGE external;
			INSERT INTO ballast SELECT repeat(md5(g::text), 100) FROM generate_series(1, 2000) g; SELECT pg_switch_wal(); CHECKPOINT});
		sleep 0.3;
		$killed = slurp_file($node->logfile, $offset) =~ /terminated by signal 9/;
		last if $killed;
	}
	$walk->{fired}{$point}++ if $killed;
	try_sql($node, "SELECT event_store.resume_shard(0); SELECT event_store_test.disarm_faults()") unless $killed;
	# The WAL that the paused shard needed is gone for good: nobody opens the store as if nothing had been there.
	my (undef, undef, $err) = try_sql($node, 'SET event_store.startup_timeout = 5000; SELECT count(*) FROM ev');
	for (1 .. 50)
	{
		last if $err =~ /55000/;
		sleep 0.2;
		(undef, undef, $err) = try_sql($node, 'SET event_store.startup_timeout = 5000; SELECT count(*) FROM ev');
	}
	like($err, qr/55000.*slot "event_store" is missing.*needs PostgreSQL's write-ahead log from [0-9A-F]+\/.*release_wal\(0\)/s,
		"killed at $point: refused");
	sql($node, 'SELECT event_store.release_wal(0), event_store.release_wal(1)');
	ok(wait_open($node), "killed at $point: opens when somebody who may has said so") or BAIL_OUT('the shards do not open');
	is($walk->{oracle}->check($node), '', "$point: what was durable in the shards' own files is there");
	set_conf($node, 'max_slot_wal_keep_size = -1');
	$node->restart;
	ok(wait_open($node), 'and again without limit');
}

# ---- detach(): stopped cleanly, the slot dropped

foreach my $point (points_that_need('detach'))
{
	my ($status) = try_sql($node, q{SELECT 'event_store.detach'::regproc});
	if ($status == 0)
	{
		my $offset = -s $node->logfile;
		sql($node, "SELECT event_store_test.inject_fault('$point', 'kill')");
		try_sql($node, 'SELECT event_store.detach()');
		sleep 0.5;
		$walk->{fired}{$point}++ if slurp_file($node->logfile, $offset) =~ /terminated by signal 9/;
		ok(wait_open($node), "killed at $point: open") or BAIL_OUT('the shards do not open');
		is($walk->{oracle}->check($node), '', "$point: the oracle agrees");
	}
}

$walk->finish('start');

# ---- the plan of the walk has a part for every point

is(join(' ', @unknown), '', 'the walk knows how to reach each point');
done_testing();
