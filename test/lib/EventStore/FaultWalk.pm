# Walks fault points: arms one, runs a load that reaches it until it has fired, waits until the server is back, and asks
# the oracle. Which load reaches which point is one table here; test/t/11*_fault_walk_*.pl take a part each.
#
# A kill has fired when the log says that the point killed a process and that this process, and no other, was terminated by a
# signal; an error when its pass was counted. Each action of a walk must fire at least once, in up to ten tries of 10 s.

package EventStore::FaultWalk;

use strict;
use warnings;
use EventStore::Clients;
use EventStore::Crashes;
use EventStore::Oracle;
use EventStore::Server qw(sql try_sql wait_open new_server crash_restart kill_all faults_compiled);
use EventStore::Workload;
use Test::More;
use Time::HiRes qw(sleep time);

# Points by the name's beginning => [part, what the load needs beside random transactions]. The first that fits counts.
my @plan = (
	[ qr/^append-|^commit-|^abort/, 'backend', [] ],
	[ qr/^channel-mid-message|^log-between-pieces/, 'backend', ['huge'] ],
	[ qr/^channel-/, 'backend', ['reconnect'] ],
	[ qr/^reserve-(before|after)-(log|flush)/, 'backend', ['reserve'] ],
	[ qr/^reserve-before-id/, 'backend', ['drop'] ],
	[ qr/^reserve-|^horizon-/, 'backend', [] ],
	[ qr/^server-before-attach/, 'backend', ['reconnect'] ],
	[ qr/^scan-before/, 'backend', ['scan'] ],
	[ qr/^server-|^prepare-/, 'backend', [] ],
	[ qr/^recovery-reading/, 'start', ['unsynced'] ],
	[ qr/^recovery-|^control-replaced|^log-(before-)?unclean|^wal-first|^manifest-(before-)?rewri|^pgwal/, 'start', ['restart'] ],
	[ qr/^file-|^directory-sync|^uring-/, 'start', ['restart'] ],
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
	# files are used again: only a shard that has just started is sure to make one
	[ qr/^wal-(prepare|next)/, 'shard', [ 'bulk', 'sync', 'restart' ] ],
	[ qr/^wal-file/, 'shard', [ 'bulk', 'sync' ] ],
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
		node => $node, walked => 0, wanted => {}, fired => {}, workload => EventStore::Workload->new(large => 4000),
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
	# passed only where io_uring is asked for
	@all = grep { $_->[0] !~ /^uring-/ } @all if sql($self->{node}, 'SHOW event_store.io_method') eq 'sync';
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

# Processes that passed the point with this action, by the log from $offset on.
sub firings
{
	my ($node, $point, $action, $offset) = @_;
	my ($word) = $action =~ /^(\w+)/;
	my @pids = PostgreSQL::Test::Utils::slurp_file($node->logfile, $offset) =~ /^.*fault point \Q$point\E: $word in process (\d+) at /mg;
	return @pids;
}

# When that happened first.
sub fired_when
{
	my ($node, $point, $action, $offset) = @_;
	my ($word) = $action =~ /^(\w+)/;
	my ($when) = PostgreSQL::Test::Utils::slurp_file($node->logfile, $offset) =~ /^.*fault point \Q$point\E: $word in process \d+ at ([\d.]+)$/m;
	return $when;
}

# Since $offset the point has killed one process, the postmaster has seen that one end by signal 9, and nothing else
# has crashed.
sub killed_once
{
	my ($self, $node, $point, $offset, $name) = @_;
	my @pids = firings($node, $point, 'kill', $offset);
	my @ended;
	my $end = time() + 60;

	while (1)
	{
		@ended = PostgreSQL::Test::Utils::slurp_file($node->logfile, $offset) =~ /\(PID (\d+)\) was terminated by signal 9/g;
		last if @ended || time() > $end;
		sleep 0.05;
	}
	# others may be killed by the postmaster after five seconds in which they did not quit
	is(join(' ', scalar(@pids), grep { $_ == ($ended[0] // 0) } @pids), "1 " . ($pids[0] // 'process'), "$name: one process was killed there");
	is(join("\n", EventStore::Crashes::unexplained($node->logfile, $offset)), '', "$name: nothing else has crashed");
	return;
}

# Runs the load with the point armed. True if it fired. $o{seconds}: how long it may take; $o{synchronous}.
sub under_load
{
	my ($self, $point, $action, $nth, $needs, %o) = @_;
	my $node = $self->{node};
	my $oracle = $self->{oracle};
	my $kill = $action eq 'kill';
	my $logged = $action !~ /^(error|fatal)/;
	my ($lost, $fired_at, $polled, $committed_after) = (0, undef, 0, 0);
	my $reconnect = grep { $_ eq 'reconnect' } @$needs;
	my $overtaken = grep { $_ eq 'overtaken' } @$needs;
	my $asleep = 0;
	my $offset = -s $node->logfile;
	my $until;
	my $clients;

	$self->{synchronous} = $o{synchronous} // (rand() < 0.6 ? 1 : 0);
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
				$oracle->synced($unit->{sent}, $unit->{ended}) unless $unit->{lost} || grep { /ERROR|FATAL/ } @{ $unit->{lines} };
			}
			elsif ($unit->{tid})
			{
				$oracle->ends($unit);
				$committed_after++ if defined $fired_at && $unit->{state} eq 'committed' && $unit->{sent} > $fired_at;
			}
		});
	$until = time() + ($o{seconds} // 10);
	$clients->run(
		# what goes on after it has fired may take longer
		seconds => 180,
		tick => sub {
			return 0 if $lost && has_crashed($node, $offset);
			return 0 if !defined $fired_at && time() > $until;
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
				if ($logged) { $fired_at = time() if firings($node, $point, $action, $offset); }
				else
				{
					my ($status, $out) = try_sql($node, "SELECT event_store_test.fault_hits('$point')");
					$fired_at = time() if $status == 0 && $out >= $nth;
				}
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
	wait_for_crash($node, $offset) if $kill && firings($node, $point, $action, $offset);
	if (!has_crashed($node, $offset))
	{
		try_sql($node, 'SELECT event_store_test.disarm_faults()');
		$clients->drain(seconds => 240);
		$clients->close_all;
	}
	wait_for_crash($node, $offset) if $kill && firings($node, $point, $action, $offset);
	# also: while it was disarmed
	my $crashed = has_crashed($node, $offset);
	if ($crashed)
	{
		$clients->abandon;
		$oracle->crashed(fired_when($node, $point, $action, $offset));
	}
	$oracle->problem('lost', "$lost connections were lost, but the server has not crashed") if $lost && !$crashed && $action !~ /fatal/;
	$self->{recovered} = $committed_after >= 5 || $crashed unless $kill;
	$self->{offset} = $offset;
	# one that fired after the load had ended, and ended nothing, shows nothing of what goes on
	return $kill || ($logged && $crashed) ? firings($node, $point, $action, $offset) > 0 : defined $fired_at;
}

sub has_crashed
{
	my ($node, $offset) = @_;
	return PostgreSQL::Test::Utils::slurp_file($node->logfile, $offset) =~ /terminating any other active server processes/;
}

# The postmaster hears of it a moment later than the log says that a process was killed.
sub wait_for_crash
{
	my ($node, $offset) = @_;
	my $end = time() + 60;

	sleep 0.02 until has_crashed($node, $offset) || time() > $end;
	return;
}

# A postmaster with ES_FAULTS in its environment dies on the way, or some seconds after its shards are open; true if it did.
sub at_start
{
	my ($self, $node, $point, $action, $nth) = @_;
	local $ENV{ES_FAULTS} = "$point:$action:$nth";
	my $offset = -s $node->logfile // 0;
	my $end = time() + 180;
	my ($died, $open) = (0, 0);

	$node->append_conf('postgresql.conf', 'restart_after_crash = off');
	# not $node->start: it gives up when the server is gone before it has looked for its pid
	PostgreSQL::Test::Utils::system_log('pg_ctl', '-W', '-D', $node->data_dir, '-l', $node->logfile,
		'-o', '--cluster-name=' . $node->name, 'start');
	while (time() < $end && !$died)
	{
		$died = -e $node->logfile && firings($node, $point, $action, $offset) > 0;
		my @opened = -e $node->logfile ? PostgreSQL::Test::Utils::slurp_file($node->logfile, $offset) =~ /LOG:  event_store shard \d+ is open/g : ();
		$end = time() + 15 if @opened >= 2 && !$open++;
		sleep 0.05 unless $died;
	}
	# the postmaster ends by itself
	$end = time() + 120;
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

# One point, one action; adds the test's results. $o{synchronous}: synchronous_commit, else by chance; $o{tries}.
sub walk
{
	my ($self, $point, $action, $nth, %o) = @_;
	my ($part, $needs) = plan_of($point);
	my $name = "$action at $point" . ($nth > 1 ? " ($nth)" : '') . (defined $o{synchronous} ? ', ' . ($o{synchronous} ? 'synchronous' : 'asynchronous') : '');
	my $node = $self->{node};
	my $begin = time();
	my $fired;

	foreach my $try (1 .. $o{tries} // 10)
	{
		if (++$self->{walked} % 8 == 0 || $try > 1)
		{
			EventStore::Workload::truncate_all($node);
			$self->{oracle}->forget;
		}
		if ($needs->[0] && $needs->[0] eq 'stop') { $fired = $self->at_stop($point, $nth); }
		else { $fired = $self->under_load($point, $action, $try > 1 ? 1 : $nth, $needs, %o); }
		$self->{fired}{"$action at $point"}++ if $fired;
		my $open = wait_open($node);
		ok($open, "$name: the shards are open" . ($fired ? '' : ' (it did not fire)'))
		  or BAIL_OUT("$name: the shards do not open");
		is($self->{oracle}->check($node), '', "$name: the oracle agrees");
		last if $fired;
	}
	if ($action eq 'kill') { $self->killed_once($node, $point, $self->{offset}, $name) if $fired; }
	else { ok($self->{recovered}, "$name: work goes on") if $fired; }
	note sprintf('%s: %.1f s%s', $name, time() - $begin, $fired ? '' : ', silent');
	return $fired;
}

# The same, and finish() wants it to have fired.
sub walk_surely
{
	my ($self, $point, $action, $nth, %o) = @_;
	$self->{wanted}{"$action at $point"} = 1;
	return $self->walk($point, $action, $nth, %o);
}

# What a test of its own has done with a point: finish() wants that it fired.
sub note_firing
{
	my ($self, $point, $fired) = @_;
	$self->{wanted}{"kill at $point"} = 1;
	$self->{fired}{"kill at $point"}++ if $fired;
	return;
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
	$clients->drain(seconds => 240);
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
	my $fired = firings($node, $point, 'kill', $offset);
	$self->{offset} = $offset;
	my $end = time() + 120;
	sleep 0.05 while -e $node->data_dir . '/postmaster.pid' && time() < $end;
	$node->{_pid} = undef;
	$node->append_conf('postgresql.conf', 'restart_after_crash = on');
	$self->{oracle}->crashed if $fired;
	$node->start;
	return $fired;
}

# Points that need a situation of their own, which walk_part does not make.
sub is_special
{
	my ($point) = @_;
	my (undef, $needs) = plan_of($point);
	return scalar grep { /^(first|adopt|lost_slot|detach|unsynced)$/ } @$needs;
}

# Walks a part: kill at the first and at a later pass, and the errors that may happen. What decides about a commit is walked with
# synchronous_commit on and off.
sub walk_part
{
	my ($self, $part) = @_;

	foreach my $entry ($self->points($part))
	{
		my ($point, $may_throw, $may_fail, $process) = @$entry;
		my (undef, $needs) = plan_of($point);
		my $stop = grep { $_ eq 'stop' } @$needs;
		next if is_special($point);

		foreach my $synchronous ($point =~ /^(append|commit|reserve|horizon)-|^abort/ ? (1, 0) : (undef))
		{
			my %o = (synchronous => $synchronous);
			$self->walk_surely($point, 'kill', 1, %o);
			$self->walk($point, 'kill', 2 + int(rand(6)), %o, tries => 1) if $ENV{ES_LONG} && !$stop;
			$self->walk_surely($point, 'error', 1, %o) if $may_throw eq 't';
			$self->walk_surely($point, 'fatal', 1 + int(rand(3)), %o) if $may_throw eq 't' && $ENV{ES_LONG};
			$self->walk_surely($point, 'enospc always', 1, %o) if $may_fail eq 't';
			$self->walk_surely($point, 'eio', 1, %o) if $may_fail eq 't' && $ENV{ES_LONG};
		}
	}
	return;
}

# All parts, each with a server of its own.
sub walk_all
{
	my ($io_method) = @_;

	foreach my $part (qw(backend shard flush start))
	{
		my $walk = EventStore::FaultWalk->new("long_${part}_$io_method", conf => ["event_store.io_method = $io_method"]);
		die 'no fault points in this build' unless faults_compiled($walk->{node});
		$walk->walk_part($part);
		$walk->finish($part);
	}
	return;
}

# Everything that was walked surely has fired; with $o{all}: every point of the part was.
sub finish
{
	my ($self, $part, %o) = @_;
	my @never = grep { !$self->{fired}{$_} } sort keys %{ $self->{wanted} };
	my @left_out = grep { !$self->{wanted}{"kill at $_"} && ($o{all} || !is_special($_)) } map { $_->[0] } $self->points($part);
	my $node = $self->{node};

	is(join(', ', @never), '', 'every action at every point of this part has fired');
	is(join(', ', @left_out), '', 'no point was left out');
	is(sql($node, 'SELECT count(*) FROM event_store.verify()'), '0', 'no file is damaged');
	sql($node, 'SELECT event_store.flush()');
	is($self->{oracle}->check($node), '', 'all flushed: the oracle agrees');
	$node->stop;
	return;
}

1;
