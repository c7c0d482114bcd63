# A hundred clients at once, ten thousand that come and go, and a scan that races commits a hundred thousand times: every
# acknowledged event is there once, in order, and no reader sees half a transaction.

use strict;
use warnings;
use EventStore::Clients;
use EventStore::Oracle;
use EventStore::Server qw(new_server kill_all crash_restart wait_open sql try_sql seed);
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
my @segments = grep { -o $_ } glob('/dev/shm/PostgreSQL.*');
cmp_ok(scalar(@segments), '<', 60, scalar(@segments) . ' shared memory segments are left');

# ---- a scan races a commit over several shards

sql($node, 'CREATE TABLE pairs (context_id int, t bigint, position bigint) USING event_store; CREATE SEQUENCE t');
my $dir = PostgreSQL::Test::Utils::tempdir();
append_to_file("$dir/write.sql", "INSERT INTO pairs SELECT g, t FROM (SELECT nextval('t') AS t) x, generate_series(0, 7) g;\n");
# every transaction writes eight rows in several shards: none is ever seen in part
append_to_file("$dir/groups.sql", <<'SQL');
SELECT CASE WHEN count(*) = 0 THEN 1 ELSE 1 / (count(*) - count(*)) END FROM (SELECT t FROM pairs GROUP BY t HAVING count(*) <> 8) x;
SQL
my $transactions = $ENV{ES_RACES} // 100000;
my $rounds = 20;
my $each = int($transactions / $rounds / 4) * 4;
my ($reads, $wrong, $failed) = (0, '', '');
foreach my $round (1 .. $rounds)
{
	my ($out, $err, $write_out, $write_err) = ('', '', '', '');
	my $writers = IPC::Run::start([ 'pgbench', '-n', '-f', "$dir/write.sql", '-c', 4, '-t', $each / 4, $node->connstr('postgres') ],
		'<', '/dev/null', '>', \$write_out, '2>', \$write_err, IPC::Run::timeout(7200));
	while ($writers->pumpable && $wrong eq '')
	{
		IPC::Run::run([ 'pgbench', '-n', '-f', "$dir/groups.sql", '-c', 2, '-T', 1, $node->connstr('postgres') ], '<', '/dev/null', '>', \$out, '2>', \$err);
		$reads += $1 if $out =~ /number of transactions actually processed: (\d+)/;
		$wrong .= $err if $err =~ /ERROR/;
		eval { $writers->pump_nb };
	}
	$writers->finish;
	$failed .= $write_err if $write_err =~ /ERROR/;
	is(sql($node, 'SELECT count(*), count(DISTINCT position), count(DISTINCT t) FROM pairs'), join('|', 8 * $each, 8 * $each, $each), "round $round: all are there");
	sql($node, 'TRUNCATE pairs');
}
is($wrong, '', "$reads scans while $transactions transactions committed: none saw half of one");
is($failed, '', 'all were written');
crash_restart($node);
is($oracle->check($node), '', 'after a crash: the oracle agrees');
$node->stop;
done_testing();
