# Fault points of the start and the stop of shards, keeper and server that need a situation of their own: recovery killed again
# and again, the first start of a cluster, a store that is taken over, a slot that was lost.

package EventStore::FaultWalkStart;

use strict;
use warnings;
use EventStore::FaultWalk;
use EventStore::Server qw(kill_all crash_restart wait_open sql try_sql set_conf);
use Exporter 'import';
use File::Path qw(remove_tree);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::RecursiveCopy;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

our @EXPORT_OK = qw(killed_in_recovery killed_while_reading killed_at_first_start killed_while_adopting
  killed_with_lost_slot killed_while_detaching);

sub points_that_need
{
	my ($walk, $what) = @_;
	return grep { my (undef, $needs) = EventStore::FaultWalk::plan_of($_); ($needs->[0] // '') eq $what }
	  map { $_->[0] } $walk->points('start');
}

# Killed in recovery, five times in a row: never the same place.
sub killed_in_recovery
{
	my ($walk, $rounds) = @_;
	my $node = $walk->{node};
	my @steps = qw(recovery-files-open recovery-own-wal-read recovery-log-open recovery-pg-wal-read control-synced);

	# recovery has something to make durable: shards do not come to it before they are killed
	sql($node, 'ALTER SYSTEM SET event_store.wal_sync_interval = 3000; SELECT pg_reload_conf()');
	foreach my $round (1 .. $rounds)
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
	sql($node, 'ALTER SYSTEM RESET event_store.wal_sync_interval; SELECT pg_reload_conf()');
	return;
}

# Killed while it reads PostgreSQL's WAL: there is much of it when shards have not synced for long.
sub killed_while_reading
{
	my ($walk) = @_;
	my $node = $walk->{node};

	foreach my $point (points_that_need($walk, 'unsynced'))
	{
		my $fired = 0;

		sql($node, 'ALTER SYSTEM SET event_store.wal_sync_interval = 60000; SELECT pg_reload_conf()');
		sql($node, 'CREATE TABLE unread (context_id int, n int) USING event_store');
		foreach my $try (1 .. 5)
		{
			$walk->load(1.5);
			# what counts is the number of messages
			sql($node, 'DO $$ BEGIN FOR i IN 1 .. 3000 LOOP INSERT INTO unread VALUES (i, i); COMMIT; END LOOP; END $$');
			kill_all($node);
			$walk->{oracle}->crashed;
			$fired = $walk->at_start($node, $point, 'kill', 1);
			crash_restart($node);
			is($walk->{oracle}->check($node), '', "killed at $point: the oracle agrees");
			last if $fired;
		}
		sql($node, 'DROP TABLE unread');
		$walk->note_firing($point, $fired);
		sql($node, 'ALTER SYSTEM RESET event_store.wal_sync_interval; SELECT pg_reload_conf()');
	}
	return;
}

# A cluster without a store, and a copy of its files.
sub empty_cluster
{
	my ($name) = @_;
	my $node = PostgreSQL::Test::Cluster->new($name);

	$node->init;
	$node->append_conf('postgresql.conf', <<'CONF');
shared_preload_libraries = 'event_store'
wal_level = replica
max_worker_processes = 24
event_store.shards = 2
fsync = on
CONF
	$node->append_conf('postgresql.conf', "event_store.io_method = '$ENV{ES_IO_METHOD}'") if $ENV{ES_IO_METHOD};
	PostgreSQL::Test::RecursiveCopy::copypath($node->data_dir, $node->data_dir . '.empty');
	return $node;
}

sub make_empty
{
	my ($node) = @_;
	remove_tree($node->data_dir);
	PostgreSQL::Test::RecursiveCopy::copypath($node->data_dir . '.empty', $node->data_dir);
	chmod(0700, $node->data_dir);
	return;
}

# The first start of a cluster.
sub killed_at_first_start
{
	my ($walk) = @_;
	my $fresh = empty_cluster('first');

	foreach my $point (points_that_need($walk, 'first'))
	{
		make_empty($fresh);
		$walk->note_firing($point, $walk->at_start($fresh, $point, 'kill', 1));
		$fresh->start;
		my ($status, $out, $err) = try_sql($fresh, 'CREATE EXTENSION event_store');
		is($err, '', "$point: the extension can be made");
		ok(wait_open($fresh), "killed at $point of the first start: open at the second") or next;
		sql($fresh, q{SELECT event_store.append('a', 't', '1'); SELECT event_store.append('b', 't', '2')});
		crash_restart($fresh);
		is(sql($fresh, 'SELECT count(*), min(version), max(version) FROM event_store.events'), '2|1|1', "$point: and it keeps events");
		$fresh->stop;
	}
	return;
}

# A store that a cluster takes over from another one.
sub killed_while_adopting
{
	my ($walk) = @_;
	my $node = $walk->{node};
	my @points = points_that_need($walk, 'adopt') or return;
	my $adopter = empty_cluster('adopter');

	sql($node, 'SELECT event_store.flush()');
	my $rows = sql($node, 'SELECT sum(segment_rows) FROM event_store.stat_shards');
	my $sysid = sql($node, 'SELECT system_identifier FROM pg_control_system()');
	$node->stop;
	foreach my $point (@points)
	{
		make_empty($adopter);
		PostgreSQL::Test::RecursiveCopy::copypath($node->data_dir . '/event_store', $adopter->data_dir . '/event_store');
		set_conf($adopter, "event_store.adopt_system_id = '$sysid'");
		foreach my $nth (1, 2)
		{
			$walk->note_firing($point, $walk->at_start($adopter, $point, 'kill', $nth));
		}
		$adopter->start;
		try_sql($adopter, 'CREATE EXTENSION event_store');
		ok(wait_open($adopter), "killed at $point: adopted at the next start") or next;
		is(sql($adopter, 'SELECT sum(segment_rows) FROM event_store.stat_shards'), $rows, "$point: with all rows");
		$adopter->stop;
	}
	$node->start;
	return;
}

# The slot is lost while the shards live.
sub killed_with_lost_slot
{
	my ($walk) = @_;
	my $node = $walk->{node};

	foreach my $point (points_that_need($walk, 'lost_slot'))
	{
		set_conf($node, 'max_slot_wal_keep_size = 32MB');
		$node->restart;
		sql($node, 'SELECT event_store.pause_shard(0)');
		sql($node, "SELECT event_store_test.inject_fault('$point', 'kill')");
		my $offset = -s $node->logfile;
		my $killed = 0;
		foreach (1 .. 100)
		{
			try_sql($node, q{CREATE TABLE IF NOT EXISTS ballast (v text); ALTER TABLE ballast ALTER v SET STORAGE external;
				INSERT INTO ballast SELECT repeat(md5(g::text), 100) FROM generate_series(1, 2000) g; SELECT pg_switch_wal(); CHECKPOINT});
			sleep 0.3;
			$killed = EventStore::FaultWalk::firings($node, $point, 'kill', $offset);
			last if $killed;
		}
		$walk->note_firing($point, $killed);
		try_sql($node, 'SELECT event_store.resume_shard(0); SELECT event_store_test.disarm_faults()') unless $killed;
		# The WAL that the paused shard needed is gone for good: nobody opens the store as if nothing had been there.
		my $err = '';
		my $end = time() + 180;
		while ($err !~ /55000/ && time() < $end)
		{
			(undef, undef, $err) = try_sql($node, 'SET event_store.startup_timeout = 5000; SELECT count(*) FROM ev');
			sleep 0.2;
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
	return;
}

# detach(): stopped cleanly, the slot dropped. A crash before the store file says so, or after, and the store is in use again.
sub killed_while_detaching
{
	my ($walk) = @_;
	my $node = $walk->{node};

	foreach my $point (points_that_need($walk, 'detach'))
	{
		my $offset = -s $node->logfile;
		sql($node, "SELECT event_store_test.inject_fault('$point', 'kill')");
		try_sql($node, 'SELECT event_store.detach()');
		my $end = time() + 120;
		sleep 0.1 until EventStore::FaultWalk::has_crashed($node, $offset) || time() > $end;
		$walk->note_firing($point, scalar EventStore::FaultWalk::firings($node, $point, 'kill', $offset));
		$end = time() + 120;
		sleep 0.1 until (try_sql($node, 'SELECT 1'))[0] == 0 || time() > $end;
		ok(wait_open($node), "killed at $point: in use again after the crash") or BAIL_OUT('the shards do not open');
		is($walk->{oracle}->check($node), '', "$point: the oracle agrees");
	}
	return;
}

1;
