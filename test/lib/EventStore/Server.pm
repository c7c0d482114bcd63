# A server with event_store in it, ways to end it that no signal handler sees, and waiting until it is back.

package EventStore::Server;

use strict;
use warnings;
use EventStore::Crashes;
use Exporter 'import';
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

our @EXPORT_OK = qw(new_server kill_all children crash_restart wait_open processes signal_processes sql try_sql
  set_conf io_methods faults_compiled seed server_log_since log_offset backend_pid);

# new_server('name', 'postgresql.conf line', …): initialised, started, with both extensions in database postgres.
sub new_server
{
	my ($name, @conf) = @_;
	my $node = PostgreSQL::Test::Cluster->new($name);

	$node->init;
	$node->append_conf('postgresql.conf', join("\n", <<CONF, @conf));
shared_preload_libraries = 'event_store'
wal_level = replica
max_worker_processes = 24
max_connections = 120
restart_after_crash = on
fsync = on
log_checkpoints = off
log_statement = none
deadlock_timeout = 20ms
log_line_prefix = '%m [%p] %b '
# a server under valgrind or on a busy machine is slow, not broken
event_store.startup_timeout = '120s'
CONF
	$node->append_conf('postgresql.conf', "event_store.io_method = '$ENV{ES_IO_METHOD}'") if $ENV{ES_IO_METHOD};
	$node->append_conf('postgresql.conf', '');
	$node->start;
	$node->safe_psql('postgres', 'CREATE EXTENSION event_store; CREATE EXTENSION event_store_test');
	return $node;
}

# Appends settings; they count from the next start or reload.
sub set_conf
{
	my ($node, @lines) = @_;
	$node->append_conf('postgresql.conf', join("\n", @lines));
	return;
}

# Both io methods, or the one that this run is about. Where the host forbids io_uring, sync alone, and one test is skipped
# visibly. Found out once in a run: with io_method = auto a shard says what it could get.
sub io_methods
{
	our @methods;
	return @methods if @methods;

	if ($ENV{ES_IO_METHOD}) { return @methods = ($ENV{ES_IO_METHOD}); }
	my $known = ($ENV{ES_LOGS} // PostgreSQL::Test::Utils::tempdir()) . '/io_method';
	if (!-s $known)
	{
		my $node = new_server('io_method', "event_store.io_method = 'auto'", 'event_store.shards = 1', 'fsync = off');
		wait_open($node) or BAIL_OUT('the shard does not open');
		my $method = sql($node, 'SELECT io_method FROM event_store.stat_shards');
		$node->stop;
		append_to_file("$known.$$", "$method\n");
		rename("$known.$$", $known) or die "rename: $!";
	}
	chomp(my $method = slurp_file($known));
	@methods = $method eq 'sync' ? qw(sync) : qw(io_uring sync);
	if ($method eq 'sync')
	{
	  SKIP:
		{
			skip 'this host forbids io_uring: only io_method sync is tested', 1;
		}
	}
	return @methods;
}

# False if the build has no fault points, which is an error where test/run-check says that it has.
sub faults_compiled
{
	my ($node) = @_;
	return 1 if $node->safe_psql('postgres', 'SELECT event_store_test.fault_points_compiled()') eq 't';
	die 'fault points were compiled in, but the server has none' if $ENV{ES_FAULT_POINTS};
	return 0;
}

# Seeds rand with ES_SEED or something new, and says with what.
sub seed
{
	my $seed = $ENV{ES_SEED} // int(time() * 1000) % 1_000_000_000;
	srand($seed);
	diag("ES_SEED=$seed");
	return $seed;
}

# Processes whose parent is $pid.
sub children
{
	my ($pid) = @_;
	my @found;

	foreach my $dir (glob('/proc/[0-9]*'))
	{
		open(my $f, '<', "$dir/stat") or next;
		my $stat = <$f>;
		close($f);
		# the name, in parentheses, may hold anything
		push @found, $1 if defined $stat && $stat =~ /^(\d+) .*\) \S (\d+) /s && $2 == $pid;
	}
	return @found;
}

# kill -9 of postmaster and all its children at one moment: nobody has a chance to do anything more.
sub kill_all
{
	my ($node) = @_;
	my $pid = $node->{_pid} or die 'the server does not run';

	kill 'STOP', $pid;    # or it would start new children meanwhile
	my @pids = ($pid, children($pid));
	kill 'KILL', @pids;
	# a postmaster that is a zombie still counts as running: wait until it was reaped
	my $end = time() + 30;
	sleep 0.01 while time() < $end && grep { -d "/proc/$_" } @pids;
	$node->{_pid} = undef;
	return;
}

# Kills the server if it runs, starts it, waits for the shards; how long the shards took, in seconds.
sub crash_restart
{
	my ($node) = @_;
	kill_all($node) if $node->{_pid};
	$node->start;
	my $begin = time();
	wait_open($node) or return;
	return time() - $begin;
}

# Runs a statement; (status, output, error text). Never dies: the server may be down.
sub try_sql
{
	my ($node, $sql, %params) = @_;
	my ($out, $err) = ('', '');
	# psql() dies if psql ends before it has read its standard input
	my $status = eval {
		$node->psql(
			$params{dbname} // 'postgres', $sql,
			stdout => \$out, stderr => \$err, on_error_die => 0,
			extra_params => [ '-v', 'VERBOSITY=verbose', @{ $params{extra_params} // [] } ],
			%{ $params{psql} // {} });
	};
	return ($status // 2, $out // '', $err // '');
}

sub sql
{
	my ($node, $sql, $dbname) = @_;
	return $node->safe_psql($dbname // 'postgres', $sql);
}

# Waits until the server takes connections and all its shards are open.
sub wait_open
{
	my ($node, $seconds) = @_;
	my $end = time() + ($seconds // 120);
	my $last = '';

	while (time() < $end)
	{
		my ($status, $out, $err) = try_sql($node,
			q{SELECT string_agg(shard || ' is ' || state || coalesce(' (' || reason || ')', ''), ', ')
			  FROM event_store.stat_shards WHERE state <> 'open'});
		return 1 if $status == 0 && $out eq '';
		$last = $status == 0 ? $out : $err;
		sleep 0.1;
	}
	diag("not open after " . ($seconds // 120) . " s: $last");
	return 0;
}

# Pids of this server's processes of a type: processes($node, 'event_store shard %').
sub processes
{
	my ($node, $type) = @_;
	return split /\n/, $node->safe_psql('postgres', "SELECT pid FROM pg_stat_activity WHERE backend_type LIKE '$type'");
}

sub signal_processes
{
	my ($node, $signal, $type) = @_;
	return kill $signal, processes($node, $type);
}

sub backend_pid
{
	my ($session) = @_;
	return $session->query_safe('SELECT pg_backend_pid()');
}

# Where the server's log ends now, and what came behind it.
sub log_offset
{
	my ($node) = @_;
	return -s $node->logfile // 0;
}

sub server_log_since
{
	my ($node, $offset) = @_;
	return slurp_file($node->logfile, $offset);
}

1;
