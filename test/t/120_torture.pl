# Random load of 16 clients, random deaths of clients, shards, workers and the whole server, round after round: the oracle
# agrees after each, and a follower misses nothing.
#
# ES_ROUNDS: rounds (default 5; `make torture ROUNDS=n`). ES_SEED: seed of the random numbers, as printed.

use strict;
use warnings;
use EventStore::Clients;
use EventStore::Crashes;
use EventStore::Oracle;
use EventStore::Server qw(new_server kill_all crash_restart wait_open set_conf io_methods seed sql try_sql processes);
use EventStore::Workload;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

seed();
my $rounds = $ENV{ES_ROUNDS} || 5;
my $node = new_server('torture', 'event_store.shards = ' . (2 + int(rand(3))), 'event_store.memtable_size = 1MB',
	'event_store.spill_after = 64kB', 'event_store.wal_file_size = 1MB', 'event_store.memtable_age = 1s',
	'max_wal_size = 128MB', 'checkpoint_timeout = 30s');
EventStore::Workload::setup($node);
my $workload = EventStore::Workload->new(large => 2000);
my $oracle = EventStore::Oracle->new;
my %events;
my $side_tables = 0;

# What a client does when it writes nothing: reads that must not fail, and DDL on tables beside.
sub other_unit
{
	my $r = rand();
	my $n = ++$side_tables;

	return { sql => 'SELECT event_store.flush();', kind => 'flush' } if $r < 0.15;
	return { sql => 'SELECT event_store.sync();', kind => 'sync' } if $r < 0.25;
	return { sql => "SELECT count(*), count(position), max(filler) FROM ev; SELECT count(*) FROM pl WHERE context_id < 50;", kind => 'scan' } if $r < 0.40;
	return { sql => "SELECT count(*) FROM event_store.replay('s" . int(rand(200)) . "'); SELECT count(*) FROM event_store.replay('c"
		  . int(rand(200)) . "', store => 'ev', backward => true, max_count => 5);", kind => 'replay' } if $r < 0.60;
	# nothing is asked a second time if the first answer did not come
	return { sql => "\\unset acount\nBEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM ev \\gset a\n\\if :{?acount}\nSELECT pg_sleep(0.05); "
		  . "SELECT CASE WHEN count(*) = :acount THEN 'stable' ELSE 'UNSTABLE ' || count(*) || ' ' || :acount END FROM ev;\n\\endif\nCOMMIT;", kind => 'snapshot' } if $r < 0.70;
	return { sql => "CREATE TABLE side$n (context_id text, version bigint, v int) USING event_store; "
		  . "INSERT INTO side$n SELECT 'x' || g % 10, NULL, g FROM generate_series(1, 300) g; "
		  . ($r < 0.75 ? "BEGIN; TRUNCATE side$n; ROLLBACK; " : '')
		  . ($r < 0.80 ? "ALTER TABLE side$n SET ACCESS METHOD heap; ALTER TABLE side$n SET ACCESS METHOD event_store; " : '')
		  . ($r < 0.85 ? "ALTER TABLE side$n ADD COLUMN w text DEFAULT 'w'; " : '')
		  . "SELECT CASE WHEN count(*) = 300 AND sum(v) = 45150 AND max(version) = 30 THEN 'stable' ELSE 'UNSTABLE ' || count(*) || ' ' || sum(v) || ' ' || coalesce(max(version), -1) END FROM side$n; DROP TABLE side$n;",
		kind => 'ddl' } if $r < 0.90;
	return { sql => 'SELECT count(*) FROM event_store.stat_tables; SELECT count(*) FROM event_store.stat_shards; SELECT count(*) FROM event_store.stat_segments;', kind => 'stat' };
}

# The follower asks for more from where it was; what it gets is noted if the whole answer came.
sub follow_unit
{
	my ($table) = @_;
	my $last = $oracle->{followed}{$table}{last} // 0;

	return { kind => 'follow', table => $table, sql => $table eq 'st'
		? "SELECT 'F', position, payload->>'tid', payload->>'ord' FROM event_store.read_all(after => $last);"
		: "SELECT 'F', position, payload->>'tid', payload->>'ord' FROM event_store.read_all(after => $last, store => '$table');" };
}

sub random_death
{
	my $r = rand();
	my ($what, $sql);

	if ($r < 0.35)
	{
		($what, $sql) = ('client', q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() ORDER BY random() LIMIT 1});
	}
	elsif ($r < 0.45)
	{
		($what, $sql) = ('cancel', q{SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND random() < 0.4});
	}
	elsif ($r < 0.85)
	{
		($what, $sql) = ('shard', q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE backend_type LIKE 'event_store shard%' ORDER BY random() LIMIT 1});
	}
	else
	{
		($what, $sql) = ('worker', q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type IN ('event_store keeper', 'event_store maintenance 0') ORDER BY random() LIMIT 1});
	}
	$events{$what}++;
	try_sql($node, $sql);
	return;
}

foreach my $round (1 .. $rounds)
{
	my $synchronous = rand() < 0.6;
	my $io_method = (io_methods())[ int(rand(scalar(io_methods()))) ];
	my $seconds = 3 + rand(5);
	my $server_dies = rand();
	my $next_death = time() + 1 + rand(1);
	my $clients;

	$oracle->{lossy} = 1 if !$synchronous;
	if (sql($node, 'SHOW event_store.io_method') ne $io_method)
	{
		set_conf($node, "event_store.io_method = $io_method");
		$node->restart;
		wait_open($node) or BAIL_OUT('the shards do not open');
	}
	my $log_from = -s $node->logfile;
	$clients = EventStore::Clients->new(
		node => $node, n => 16, settings => [ $synchronous ? () : 'SET synchronous_commit = off', 'SET lock_timeout = 5000' ],
		next => sub {
			my ($c) = @_;
			return follow_unit((qw(ev st))[ int(rand(2)) ]) if $c->{number} == 0;
			return other_unit() if $c->{number} <= 3 || rand() < 0.05;
			$workload->{isolation} = (undef, undef, undef, 'REPEATABLE READ', 'SERIALIZABLE')[ int(rand(5)) ];
			my $unit = $workload->unit;
			$oracle->begins($unit, $synchronous);
			return $unit;
		},
		done => sub {
			my ($c, $unit) = @_;
			my $failed = $unit->{lost} || grep { /ERROR|FATAL|PANIC/ } @{ $unit->{lines} };
			foreach my $line (@{ $unit->{lines} })
			{
				$oracle->problem('a read changed its mind', "$unit->{sql}: $line") if $line =~ /^UNSTABLE/ && !$failed;
				$oracle->problem('error', "$unit->{sql}: $line") if $line =~ /(ERROR|PANIC): +(XX\w{3}|42\w{3})/ && !$unit->{tid};
			}
			if ($unit->{kind} eq 'sync') { $oracle->synced($unit->{sent}, $unit->{ended}) unless $failed; }
			elsif ($unit->{kind} eq 'follow')
			{
				my @rows = map { [ (split /\|/)[ 1 .. 3 ] ] } grep { /^F\|/ } @{ $unit->{lines} };
				$oracle->followed($unit->{table}, \@rows) unless $failed;
			}
			elsif ($unit->{tid}) { $oracle->ends($unit); }
			$events{'units'}++;
		});
	$clients->run(
		seconds => $seconds,
		tick => sub {
			if (time() > $next_death)
			{
				random_death();
				$next_death = time() + 0.3 + rand(1.5);
			}
			return 1;
		});

	if ($server_dies < 0.6)
	{
		$events{'kill -9'}++;
		kill_all($node);
		$clients->abandon;
		$oracle->crashed;
		ok(defined crash_restart($node), "round $round: open again") or BAIL_OUT('the shards do not open');
	}
	elsif ($server_dies < 0.75)
	{
		# one process dies: all restart
		$events{'process killed'}++;
		my @pids = split /\n/, sql($node, q{SELECT pid FROM pg_stat_activity WHERE (backend_type LIKE 'event_store %' OR backend_type = 'client backend') AND pid <> pg_backend_pid() ORDER BY random()});
		my $offset = -s $node->logfile;
		my $when = time();
		# one that ends by itself just now is no crash
		foreach my $pid (@pids)
		{
			next unless kill 'KILL', $pid;
			my $end = time() + 20;
			my $crashed = 0;
			sleep 0.05 until ($crashed = slurp_file($node->logfile, $offset) =~ /terminating any other active server processes/) || time() > $end;
			last if $crashed;
		}
		$clients->abandon;
		$oracle->crashed($when);
		ok(wait_open($node), "round $round: open again") or BAIL_OUT('the shards do not open');
	}
	else
	{
		$events{'nothing'}++;
		$clients->drain(seconds => 240);
		$clients->close_all;
		ok(wait_open($node), "round $round: open") or BAIL_OUT('the shards do not open');
		if ($server_dies < 0.9)
		{
			my $mode = (qw(fast immediate))[ int(rand(2)) ];
			$events{"stop $mode"}++;
			$node->stop($mode);
			$oracle->crashed if $mode eq 'immediate';
			$node->start;
			wait_open($node) or BAIL_OUT('the shards do not open');
		}
	}
	# the round and the recovery after it
	$oracle->problem('the server crashed', $_) foreach EventStore::Crashes::unexplained($node->logfile, $log_from);
	my $problems = $oracle->check($node);
	is($problems, '', "round $round: the oracle agrees") or BAIL_OUT('files are kept');
	is(sql($node, 'SELECT count(*) FROM event_store.verify()'), '0', "round $round: no damage");
	if ($round % 10 == 0)
	{
		$oracle->check_append_versions($node);
		is($oracle->verdict, '', "round $round: versions are those that append() had returned");
		EventStore::Workload::truncate_all($node);
		$oracle->forget;
	}
}
$oracle->check_append_versions($node);
is($oracle->verdict, '', 'versions are those that append() had returned');
diag(join(', ', map { "$_: $events{$_}" } sort keys %events));
diag(join(', ', map { "$_: $oracle->{counts}{$_}" } sort keys %{ $oracle->{counts} }), ", rows: $oracle->{rows}");
$node->stop;
done_testing();
