# A hundred clients at once, ten thousand that come and go, and a scan that races commits a hundred thousand times: every
# acknowledged event is there once, in order, and no reader sees half a transaction.

use strict;
use warnings;
use EventStore::Clients;
use EventStore::Oracle;
use EventStore::Server qw(new_server kill_all children crash_restart wait_open sql try_sql seed);
use EventStore::Workload;
use IPC::Run;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

seed();
my $node = new_server('many', 'event_store.shards = 4', 'event_store.memtable_size = 4MB', 'event_store.spill_after = 256kB', 'max_wal_size = 1GB');
EventStore::Workload::setup($node);
my $workload = EventStore::Workload->new;
my $oracle = EventStore::Oracle->new;

sub load
{
	my ($n, $seconds, %o) = @_;
	my $sessions = 0;
	my $clients;
	$clients = EventStore::Clients->new(
		node => $node, n => $n,
		next => sub {
			my ($c) = @_;
			return undef if $o{sessions} && $sessions >= $o{sessions};
			if ($o{reconnect}) { $clients->disconnect_client($c); $sessions++; }
			my $unit = $workload->unit($o{reconnect} ? (qw(single append_alone mixed rollback))[ int(rand(4)) ] : undef);
			$oracle->begins($unit, 1);
			return $unit;
		},
		done => sub { my ($c, $unit) = @_; $oracle->ends($unit); });
	if ($seconds) { $clients->run(seconds => $seconds); $clients->drain(seconds => 120); }
	else { $clients->run; }
	$clients->close_all;
	return $sessions;
}

load(100, 60);
is($oracle->check($node), '', '100 clients: the oracle agrees');
my $sessions = load(16, undef, reconnect => 1, sessions => 10000);
is($oracle->check($node), '', "$sessions sessions that connect, write and disconnect: the oracle agrees");
is(sql($node, 'SELECT count(*) FROM pg_replication_slots'), '1', 'one slot');
my %segments;
# the last ones may not have ended yet
foreach (1 .. 100)
{
	%segments = ();
	foreach my $pid (children($node->{_pid}))
	{
		my $maps = eval { slurp_file("/proc/$pid/maps") } // '';
		$segments{$_} = 1 foreach $maps =~ m{(/dev/shm/PostgreSQL\.\d+)}g;
	}
	last if keys %segments < 60;
	sleep 0.2;
}
cmp_ok(scalar(keys %segments), '<', 60, scalar(keys %segments) . ' shared memory segments are left');

# ---- a scan races a commit over several shards: reads of what is being committed just now, a hundred thousand times

sql($node, 'CREATE TABLE octets (context_id bigint, t bigint, position bigint) USING event_store; CREATE TABLE marks (t bigint PRIMARY KEY); CREATE SEQUENCE t');
my $dir = PostgreSQL::Test::Utils::tempdir();
# every transaction writes eight rows in several shards, and one on the heap: none is ever seen in part
append_to_file("$dir/write.sql", <<'SQL');
WITH x AS MATERIALIZED (SELECT nextval('t') AS t), m AS (INSERT INTO marks SELECT t FROM x) INSERT INTO octets SELECT 8 * t + g, t FROM x, generate_series(0, 7) g;
SQL
# the newest number may be under way, committed just now, or not begun
append_to_file("$dir/read.sql", <<'SQL');
\set back random(0, 3)
SELECT 1 / (n = 8 * h)::int FROM (SELECT last_value - :back AS t FROM t) x,
	LATERAL (SELECT count(*) AS h FROM marks m WHERE m.t = x.t) m,
	LATERAL (SELECT count(*) AS n FROM generate_series(0, 7) g, event_store.replay((8 * x.t + g)::text, store => 'octets')) o;
SQL
my $races = $ENV{ES_RACES} // 100000;
my ($reads, $written, $wrong, $failed) = (0, 0, '', '');
foreach my $round (1 .. 60)
{
	my ($out, $err, $write_out, $write_err) = ('', '', '', '');
	my @bench = ('pgbench', '-n', '-T', 20, '-c', 3);
	my $writers = IPC::Run::start([ @bench, '-f', "$dir/write.sql", $node->connstr('postgres') ], '<', '/dev/null', '>', \$write_out, '2>', \$write_err, IPC::Run::timeout(600));
	IPC::Run::run([ @bench, '-f', "$dir/read.sql", $node->connstr('postgres') ], '<', '/dev/null', '>', \$out, '2>', \$err);
	$writers->finish;
	$reads += $1 if $out =~ /number of transactions actually processed: (\d+)/;
	$written += $1 if $write_out =~ /number of transactions actually processed: (\d+)/;
	$wrong .= $err if $err =~ /ERROR/;
	$failed .= $write_err if $write_err =~ /ERROR/;
	is(sql($node, 'SELECT count(*) = 8 * (SELECT count(*) FROM marks), count(DISTINCT position) = count(*), count(DISTINCT t) = (SELECT count(*) FROM marks) FROM octets'), 't|t|t', "round $round: all are there");
	sql($node, 'TRUNCATE octets, marks');
	last if $reads >= $races || $wrong ne '';
}
is($wrong, '', "$reads reads while $written transactions committed: none saw half of one");
cmp_ok($reads, '>=', $races, 'as many as there should be');
cmp_ok($written, '>=', $races / 20, 'against commits that came all the while');
is($failed, '', 'all were written');
crash_restart($node);
is($oracle->check($node), '', 'after a crash: the oracle agrees');
$node->stop;
done_testing();
