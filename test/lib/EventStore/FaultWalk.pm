# Walks fault points: arms one, runs a load that reaches it until it has fired, waits until the server is back, and asks
# the oracle. Which load reaches which point is one table here; test/t/11*_fault_walk_*.pl take a part each.

package EventStore::FaultWalk;

use strict;
use warnings;
use EventStore::Clients;
use EventStore::Oracle;
use EventStore::Server qw(sql try_sql wait_open new_server crash_restart kill_all);
use EventStore::Workload;
use Test::More;
use Time::HiRes qw(sleep time);

# Points by the name's beginning => [part, what the load needs beside random transactions]. The first that fits counts.
my @plan = (
	[ qr/^append-|^commit-|^abort/, 'backend', [] ],
	[ qr/^channel-mid-message|^log-between-pieces/, 'backend', ['huge'] ],
	[ qr/^channel-/, 'backend', ['reconnect'] ],
	[ qr/^reserve-(before|after)-(log|flush)/, 'backend', ['reserve'] ],
	[ qr/^reserve-|^horizon-/, 'backend', [] ],
	[ qr/^server-before-attach/, 'backend', ['reconnect'] ],
	[ qr/^scan-before/, 'backend', ['scan'] ],
	[ qr/^server-|^prepare-/, 'backend', [] ],
	[ qr/^recovery-reading/, 'start', ['unsynced'] ],
	[ qr/^recovery-|^control-replaced|^log-(before-)?unclean|^wal-first|^manifest-(before-)?rewri|^pgwal/, 'start', ['restart'] ],
	[ qr/^file-|^directory-sync/, 'start', ['restart'] ],
	[ qr/^stop-|^log-(before-)?clean|^keeper-before-exit/, 'start', ['stop'] ],
	[ qr/^store-shard-adopted/, 'start', ['adopt'] ],
	[ qr/^store-|^slot-(created|reserved|persisted)/, 'start', ['first'] ],
	[ qr/^slot-dropped/, 'start', ['lost_slot'] ],
	[ qr/^slot-before-move/, 'start', ['sync'] ],
	[ qr/^detach-/, 'start', ['detach'] ],
	[ qr/^spill-before-take-back/, 'flush', [ 'overtaken', 'slow_plain' ] ],
	[ qr/^spill-|^adopt-/, 'flush', ['slow_bulk'] ],
	[ qr/^flush-finished-carried/, 'flush', [ 'stuck', 'flush' ] ],
	[ qr/^(collect|drop)-|^segment-unlink/, 'flush', ['drop'] ],
	[ qr/^segment-read/, 'flush', [ 'flush', 'scan' ] ],
	[ qr/^job-|^segment-|^flush-|^manifest-/, 'flush', ['flush'] ],
	[ qr/^wal-(prepare|next|file)/, 'shard', [ 'bulk', 'sync' ] ],
	[ qr/^arena-|^apply-|^finish-|^verdict-|^wal-|^sync-|^restart-|^control-/, 'shard', ['sync'] ],);

sub plan_of
{
	my ($point) = @_;
	foreach my $entry (@plan)
	{
		return ($entry->[1], $entry->[2]) if $point =~ $entry->[0];
	}
	return ('unknown', []);
}

sub new
{
	my ($class, $name, %self) = @_;
	my $node = new_server($name, 'event_store.shards = 2', 'event_store.memtable_size = 1MB', 'event_store.spill_after = 64kB',
		'event_store.wal_file_size = 1MB', 'autovacuum = off', 'max_wal_size = 256MB', @{ $self{conf} // [] });
	my $self = bless {
		node => $node, walked => 0, silent => [], workload => EventStore::Workload->new(large => 4000),
		oracle => EventStore::Oracle->new(allow => qr/fault injected/), %self
	}, $class;

	EventStore::Workload::setup($node);
	return $self;
}

# [name, may_throw, may_fail, process] of the points of one part, and of all.
sub points
{
	my ($self, $part) = @_;
	my @all = map { [ split /\|/ ] } split /\n/, sql($self->{node}, 'SELECT * FROM event_store_test.fault_point_info()');
	my @named = grep { $_->[0] =~ /$ENV{ES_POINTS}/ } @all if $ENV{ES_POINTS};

	@all = @named if $ENV{ES_POINTS};
	return grep { (plan_of($_->[0]))[0] eq $part } @all;
}

# ---- units that lead to a point ----

my $drops = 0;
my %boosters = (
	flush => sub { return { sql => 'SELECT event_store.flush();' } },
	sync => sub { return { sql => 'SELECT event_store.sync();', sync => 1 } },
	scan => sub { return { sql => 'SELECT count(*), max(filler) FROM ev; SELECT count(*) FROM event_store.events WHERE payload IS NULL;' } },
	reserve => sub { return { sql => 'SELECT event_store_test.reserve_positions(400000);' } },
	restart => sub {
		return { sql => 'SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity WHERE backend_type = '
			  . "'event_store " . (rand() < 0.15 ? 'keeper' : 'shard ' . int(rand(2))) . "';" }
	},
	drop => sub {
		$drops++;
		return { sql => "CREATE TABLE dead$drops (context_id int, v text) USING event_store; "
			  . "INSERT INTO dead$drops SELECT g, 'v' || g FROM generate_series(1, 200) g; "
			  . ($drops % 2 ? 'SELECT event_store.flush();' : '') . "DROP TABLE dead$drops;" }
	});

sub next_unit
{
	my ($self, $c, $needs) = @_;
	my @special = grep { !/^(reconnect|stuck|overtaken)$/ } @$needs;
	my $unit;

	if ($c->{number} == 0 && @special && (rand() < 0.7 || grep { /^(stuck|overtaken)$/ } @$needs))
	{
		my $kind = $special[ int(rand(@special)) ];
		return $boosters{$kind}->() if $boosters{$kind};
		$kind = 'rollback' if $kind eq 'bulk' && rand() < 0.3;
		$unit = $self->{workload}->unit($kind);
	}
	else
	{
		$unit = $self->{workload}->unit;
	}
	$self->{oracle}->begins($unit, $self->{synchronous});
	return $unit;
}

# Runs the load with the point armed. True if it fired. $o{seconds}: how long it may take.
sub under_load
{
	my ($self, $point, $action, $nth, $needs, %o) = @_;
	my $node = $self->{node};
	my $oracle = $self->{oracle};
	my $kill = $action eq 'kill';
	my ($lost, $fired_at, $polled, $committed_after) = (0, undef, 0, 0);
	my $reconnect = grep { $_ eq 'reconnect' } @$needs;
	my $overtaken = grep { $_ eq 'overtaken' } @$needs;
	my $asleep = 0;
	my $offset = -s $node->logfile;
	my $clients;

	$self->{synchronous} = rand() < 0.6 ? 1 : 0;
	sql($node, "SELECT event_store_test.inject_fault('$point', '$action', $nth)");
	# one transaction stays between FINISH and its commit record
	sql($node, "SELECT event_store_test.inject_fault('commit-after-send', 'sleep', 3)") if grep { $_ eq 'stuck' } @$needs;
	$clients = EventStore::Clients->new(
		node => $node, n => 4, settings => $self->{synchronous} ? [] : ['SET synchronous_commit = off'],
		next => sub {
			my ($c) = @_;
			$clients->disconnect_client($c) if $reconnect && rand() < 0.5;
			return $self->next_unit($c, $needs);
		},
		done => sub {
			my ($c, $unit) = @_;
			$lost++ if $unit->{lost};
			if ($unit->{sync})
			{
				$oracle->synced($unit->{sent}) unless $unit->{lost} || grep { /ERROR|FATAL/ } @{ $unit->{lines} };
			}
			elsif ($unit->{tid})
			{
				$oracle->ends($unit);
				$committed_after++ if defined $fired_at && $unit->{state} eq 'committed' && $unit->{sent} > $fired_at;
			}
		});
	$clients->run(
		seconds => $o{seconds} // 10,
		tick => sub {
			return 0 if $kill && $lost;
			if ($overtaken && time() > $polled + 1)
			{
				# the shard sleeps before it names a spill, while the transaction sends its FINISH
				my $action = $asleep ? "'kill', 1000000" : "'sleep', 1";
				$polled = time();
				$asleep = !$asleep;
				try_sql($node, "SELECT event_store_test.inject_fault('spill-before-manifest', $action)");
			}
			return 1 if $kill || time() < $polled + 0.1;
			$polled = time();
			if (!defined $fired_at)
			{
				my ($status, $out) = try_sql($node, "SELECT event_store_test.fault_hits('$point')");
				$fired_at = time() if $status != 0 || $out >= $nth;
				if (defined $fired_at && $action =~ /always/)
				{
					sleep 0.5;
					try_sql($node, 'SELECT event_store_test.disarm_faults()');
					$fired_at = time();
				}
			}
			# and life goes on
			return 0 if defined $fired_at && $committed_after >= 5;
			return 1;
		});
	if ($kill ? $lost : has_crashed($node, $offset))
	{
		$clients->abandon;
		$oracle->crashed;
	}
	else
	{
		try_sql($node, 'SELECT event_store_test.disarm_faults()');
		$clients->drain(seconds => 60);
		$clients->close_all;
	}
	$self->{recovered} = $committed_after >= 5 unless $kill;
	return $kill ? $lost > 0 : defined $fired_at;
}

sub has_crashed
{
	my ($node, $offset) = @_;
	return PostgreSQL::Test::Utils::slurp_file($node->logfile, $offset) =~ /terminating any other active server processes/;
}

# A postmaster with ES_FAULTS in its environment dies on the way; true if it did.
sub at_start
{
	my ($self, $node, $point, $action, $nth) = @_;
	local $ENV{ES_FAULTS} = "$point:$action:$nth";
	my $offset = -s $node->logfile // 0;
	my $end = time() + 15;
	my $died = 0;

	$node->append_conf('postgresql.conf', 'restart_after_crash = off');
	# not $node->start: it gives up when the server is gone before it has looked for its pid
	PostgreSQL::Test::Utils::system_log('pg_ctl', '-W', '-D', $node->data_dir, '-l', $node->logfile,
		'-o', '--cluster-name=' . $node->name, 'start');
	while (time() < $end && !$died)
	{
		$died = -e $node->logfile
		  && PostgreSQL::Test::Utils::slurp_file($node->logfile, $offset) =~ /terminated by signal 9/;
		sleep 0.05 unless $died;
	}
	# the postmaster ends by itself
	$end = time() + 30;
	my $pid_file = $node->data_dir . '/postmaster.pid';
	sleep 0.05 while $died && -e $pid_file && time() < $end;
	if (!$died && -e $pid_file)
	{
		($node->{_pid}) = PostgreSQL::Test::Utils::slurp_file($pid_file) =~ /^(\d+)/;
		kill_all($node) if $node->{_pid};
	}
	$node->{_pid} = undef;
	$node->append_conf('postgresql.conf', 'restart_after_crash = on');
	return $died;
}

# One point, one action; adds the test's results.
sub walk
{
	my ($self, $point, $action, $nth) = @_;
	my ($part, $needs) = plan_of($point);
	my $name = "$action at $point" . ($nth > 1 ? " ($nth)" : '');
	my $node = $self->{node};
	my $fired;

	if (++$self->{walked} % 8 == 0)
	{
		EventStore::Workload::truncate_all($node);
		$self->{oracle}->forget;
	}
	if ($needs->[0] && $needs->[0] eq 'stop') { $fired = $self->at_stop($point, $nth); }
	else { $fired = $self->under_load($point, $action, $nth, $needs); }

	$self->{fired}{$point}++ if $fired;
	push @{ $self->{silent} }, $name unless $fired;
	my $open = wait_open($node);
	ok($open, "$name: the shards are open" . ($fired ? '' : ' (it did not fire)'))
	  or BAIL_OUT("$name: the shards do not open");
	is($self->{oracle}->check($node), '', "$name: the oracle agrees");
	ok($self->{recovered}, "$name: work goes on") if $action ne 'kill' && $fired;
	return $fired;
}

# Random transactions for some seconds, all of them ended.
sub load
{
	my ($self, $seconds) = @_;
	my $clients = EventStore::Clients->new(
		node => $self->{node}, n => 4,
		next => sub { my ($c) = @_; return $self->next_unit($c, []); },
		done => sub { my ($c, $unit) = @_; $self->{oracle}->ends($unit); });

	$self->{synchronous} = 1;
	$clients->run(seconds => $seconds);
	$clients->drain(seconds => 60);
	$clients->close_all;
	return;
}

# A server that is stopped in peace has one of its processes killed on the way.
sub at_stop
{
	my ($self, $point, $nth) = @_;
	my $node = $self->{node};
	my $offset = -s $node->logfile;

	$self->load(0.5);
	sql($node, "SELECT event_store_test.inject_fault('$point', 'kill', $nth)");
	$node->append_conf('postgresql.conf', 'restart_after_crash = off');
	$node->stop('fast', fail_ok => 1);
	my $fired = PostgreSQL::Test::Utils::slurp_file($node->logfile, $offset) =~ /terminated by signal 9/;
	my $end = time() + 30;
	sleep 0.05 while -e $node->data_dir . '/postmaster.pid' && time() < $end;
	$node->{_pid} = undef;
	$node->append_conf('postgresql.conf', 'restart_after_crash = on');
	$self->{oracle}->crashed if $fired;
	$node->start;
	return $fired;
}

# Walks a part: kill at the first and at a later pass, and the errors that may happen.
sub walk_part
{
	my ($self, $part) = @_;

	foreach my $entry ($self->points($part))
	{
		my ($point, $may_throw, $may_fail, $process) = @$entry;
		my (undef, $needs) = plan_of($point);
		next if grep { /^(first|adopt|lost_slot|detach|unsynced)$/ } @$needs;

		$self->walk($point, 'kill', 1);
		$self->walk($point, 'kill', 2 + int(rand(6))) if $ENV{ES_LONG} && !grep { $_ eq 'stop' } @$needs;
		$self->walk($point, 'error', 1) if $may_throw eq 't';
		$self->walk($point, 'fatal', 1 + int(rand(3))) if $may_throw eq 't' && $ENV{ES_LONG};
		$self->walk($point, 'enospc always', 1) if $may_fail eq 't';
		$self->walk($point, 'eio', 1) if $may_fail eq 't' && $ENV{ES_LONG};
	}
	return;
}

# Every point of the part has fired at least once.
sub finish
{
	my ($self, $part) = @_;
	my @never = grep { !$self->{fired}{$_} } map { $_->[0] } $self->points($part);
	my $node = $self->{node};

	is(join(' ', @never), '', 'every point of this part has fired');
	note 'did not fire: ' . join(', ', @{ $self->{silent} }) if @{ $self->{silent} };
	is(sql($node, 'SELECT count(*) FROM event_store.verify()'), '0', 'no file is damaged');
	sql($node, 'SELECT event_store.flush()');
	is($self->{oracle}->check($node), '', 'all flushed: the oracle agrees');
	$node->stop;
	return;
}

1;
