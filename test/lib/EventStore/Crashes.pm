# A server that crashed by itself fails the test, whatever else the test looked at: restart_after_crash would hide it.
#
# test/lib/run_tap loads this into every test. Each PostgreSQL::Test::Cluster is noted when it is made; done_testing first
# reads the logs of all, from the start, and finds
#
#	TRAP:                               never allowed
#	PANIC:                              allowed if a fault point made a sync of that process fail
#	was terminated by signal N          9: of a process that a fault point or the test itself has killed; 6: after an
#	                                    allowed PANIC
#
# What a test brings about in another way it declares: EventStore::Crashes::expect(qr/PANIC: .*No space left/).
#
# And poll_query_until goes on where the server turns psql away before it has read its input, for which IPC::Run dies.

package EventStore::Crashes;

use strict;
use warnings;

my @nodes;
my @expected;
my %killed;    # processes to which the test itself sent SIGKILL

BEGIN
{
	no warnings 'once';
	*CORE::GLOBAL::kill = sub {
		my ($signal, @pids) = @_;
		if ($signal =~ /^(?:SIG)?KILL$/ || $signal eq '9') { $killed{$_} = 1 foreach @pids; }
		return CORE::kill($signal, @pids);
	};
}

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::Builder;

sub expect
{
	push @expected, @_;
	return;
}

# What a server's log tells of crashes that nobody asked for, one line each; $from: where reading begins.
sub unexplained
{
	my ($logfile, $from) = @_;
	my (%killed_by, %panics, %may_panic, @lines);
	my $recalcitrant = 0;

	return () unless -e $logfile;
	foreach my $line (split /\n/, slurp_file($logfile, $from // 0))
	{
		if ($line =~ /fault point (\S+): (\w+) in process (\d+)/)
		{
			my ($point, $action, $pid) = ($1, $2, $3);
			$killed_by{$pid} = 1 if $action eq 'kill';
			$may_panic{$pid} = 1 if $action ne 'kill' && $point =~ /sync$/;
		}
		elsif ($line =~ /issuing \w+ to recalcitrant children/) { $recalcitrant = 1; }
		elsif ($line =~ /database system was (?:shut down|interrupted|not properly)/) { $recalcitrant = 0; }
		elsif ($line =~ /TRAP:/) { push @lines, $line; }
		elsif ($line =~ /\[(\d+)\].*?PANIC: /)
		{
			$panics{$1} = 1;
			push @lines, $line unless $may_panic{$1} || grep { $line =~ $_ } @expected;
		}
		elsif ($line =~ /\(PID (\d+)\) was terminated by signal (\d+)/)
		{
			next if $2 == 9 && ($killed_by{$1} || $killed{$1} || $recalcitrant);
			# the PANIC itself was judged above
			next if $2 == 6 && $panics{$1};
			push @lines, $line unless grep { $line =~ $_ } @expected;
		}
	}
	return @lines;
}

sub check
{
	my $test = Test::Builder->new;
	my @found;

	foreach my $node (@nodes)
	{
		push @found, map { $node->name . ": $_" } unexplained($node->logfile);
	}
	$test->ok(@found == 0, 'no server crashed by itself');
	splice(@found, 20);
	$test->diag($_) foreach @found;
	return;
}

{
	no warnings 'redefine';

	my $new = \&PostgreSQL::Test::Cluster::new;
	*PostgreSQL::Test::Cluster::new = sub {
		my $node = $new->(@_);
		push @nodes, $node;
		return $node;
	};
	my $poll = \&PostgreSQL::Test::Cluster::poll_query_until;
	*PostgreSQL::Test::Cluster::poll_query_until = sub {
		my @args = @_;
		my $end = time() + $PostgreSQL::Test::Utils::timeout_default;
		while (1)
		{
			my $found = eval { $poll->(@args) };
			return $found if defined $found;
			die $@ if $@ !~ /Broken pipe/ || time() > $end;
			select(undef, undef, undef, 0.1);
		}
	};
	my $done = \&Test::Builder::done_testing;
	*Test::Builder::done_testing = sub {
		my ($self, @plan) = @_;
		# a subtest's end is not the file's
		if (@nodes && !$self->parent)
		{
			check();
			$plan[0]++ if @plan;
		}
		@_ = ($self, @plan);
		goto &$done;
	};
}

1;
