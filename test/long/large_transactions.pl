# A transaction of 5 million rows that is rolled back, crashes or commits costs bounded memory, leaves nothing behind when it
# does not commit, and is all there when it does; the server is ready again within seconds.

use strict;
use warnings;
use EventStore::Server qw(new_server kill_all children crash_restart wait_open sql try_sql processes);
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $rows = $ENV{ES_ROWS} // 5_000_000;
my $node = new_server('transactions', 'event_store.shards = 2', 'event_store.memtable_size = 64MB', 'max_wal_size = 4GB',
	'event_store.staging_size = 64MB', 'autovacuum = off', 'shared_buffers = 128MB');
sql($node, <<'SQL');
CREATE TABLE ev (position bigint, context_id text, version bigint, n int, v text) USING event_store;
CREATE TABLE plain (context_id int, n int, v text) USING event_store;
INSERT INTO ev (context_id, n) SELECT 'before' || g % 10, g FROM generate_series(1, 1000) g;
SQL
my $insert_ev = "INSERT INTO ev (context_id, n, v) SELECT 'c' || g % 100000, g, md5(g::text) FROM generate_series(1, $rows) g";
my $insert_plain = "INSERT INTO plain SELECT g % 100000, g, md5(g::text) FROM generate_series(1, $rows) g";

# Memory of all of our processes that is theirs alone, and the shared segments that processes of this server map: kB.
sub memory
{
	my $sum = 0;
	my %segments;
	foreach my $pid (processes($node, 'event_store %'))
	{
		my $status = eval { slurp_file("/proc/$pid/status") } // '';
		$sum += $1 if $status =~ /^RssAnon:\s+(\d+)/m;
	}
	foreach my $pid (children($node->{_pid}))
	{
		my $maps = eval { slurp_file("/proc/$pid/maps") } // '';
		$segments{$_} = 1 foreach $maps =~ m{(/dev/shm/PostgreSQL\.\d+)}g;
	}
	foreach my $file (keys %segments)
	{
		my $blocks = (stat($file))[12];
		$sum += int($blocks / 2) if defined $blocks;
	}
	return $sum;
}

# Runs a statement in the background and looks at memory all the while.
sub watch
{
	my ($sql) = @_;
	my ($out, $err, $most) = ('', '', 0);
	my $run = IPC::Run::start([ 'psql', '-XAtq', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('postgres'), '-c', $sql ],
		'<', '/dev/null', '>', \$out, '2>', \$err, IPC::Run::timeout(1800));
	my $begin = time();
	while ($run->pumpable)
	{
		my $now = memory();
		$most = $now if $now > $most;
		eval { $run->pump_nb };
		sleep 0.2;
	}
	$run->finish;
	note(sprintf('%.0f s, %.0f MB at most', time() - $begin, $most / 1024));
	return ($err, $most);
}

my $state = 'SELECT count(*), count(DISTINCT position), max(version) FROM ev';
my $before = sql($node, $state);
sub nothing_left
{
	my ($name) = @_;
	is(sql($node, $state), $before, "$name: not a row is there");
	is(sql($node, 'SELECT count(*) FROM plain'), '0', "$name: nor there");
	ok($node->poll_query_until('postgres', 'SELECT sum(staged_transactions) = 0 AND sum(pending_segments) = 0 FROM event_store.stat_shards'), "$name: nothing is staged");
	my ($files, $named) = (-1, 0);
	foreach (1 .. 100)
	{
		$files = () = glob($node->data_dir . '/event_store/shard_*/seg.*');
		$named = sql($node, 'SELECT sum(segments) FROM event_store.stat_shards');
		last if $files == $named;
		sleep 0.2;
	}
	is($files, $named, "$name: no file is left");
	return;
}

my $idle = memory();
cmp_ok($idle, '>', 0, 'memory can be measured');
foreach my $case ([ 'with versions', $insert_ev ], [ 'plain', $insert_plain ])
{
	my ($name, $insert) = @$case;
	my ($err, $most) = watch("BEGIN; $insert; ROLLBACK");
	is($err, '', "$name: $rows rows rolled back");
	cmp_ok($most, '<', 600 * 1024, sprintf('%s: %.0f MB of memory (%.0f when idle)', $name, $most / 1024, $idle / 1024));
	nothing_left("$name, rolled back");
	($err) = watch("BEGIN; SAVEPOINT a; $insert; ROLLBACK TO a; COMMIT");
	is($err, '', "$name: to a savepoint");
	nothing_left("$name, savepoint");

	# crashed in the middle, and just before its COMMIT
	foreach my $share (0.3, 1)
	{
		my $s = $node->background_psql('postgres', on_error_stop => 0);
		$s->query_safe('BEGIN');
		$s->query_safe($insert =~ s/generate_series\(1, (\d+)\)/'generate_series(1, ' . int($1 * $share) . ')'/re);
		kill_all($node);
		eval { $s->quit };
		my $begin = time();
		ok(defined crash_restart($node), "$name: open after a crash");
		note(sprintf('ready after %.1f s', time() - $begin));
		nothing_left("$name, crashed at $share");
	}
}

my ($err, $most) = watch("BEGIN; $insert_ev; COMMIT");
is($err, '', "$rows rows committed");
cmp_ok($most, '<', 600 * 1024, sprintf('%.0f MB of memory', $most / 1024));
my $after = join('|', $rows + 1000, $rows + 1000, int($rows / 100000) > 100 ? int($rows / 100000) : 100);
is(sql($node, $state), $after, 'all rows are there');
crash_restart($node);
is(sql($node, $state), $after, 'after a crash');
is(sql($node, q{SELECT count(*) FROM (SELECT version, row_number() OVER (PARTITION BY context_id ORDER BY position) AS r FROM ev) x WHERE r <> version}), '0', 'with their versions');
sql($node, 'SELECT event_store.flush()');
is(sql($node, $state), $after, 'flushed');

# ---- a million events unflushed: ready within 3 s of a crash

sql($node, q{ALTER SYSTEM SET event_store.memtable_size = '1GB'; SELECT pg_reload_conf()});
sql($node, q{INSERT INTO ev (context_id, n, v) SELECT 'm' || g % 1000 + 1000 * $1, g, md5(g::text) FROM generate_series(1, 100000) g} =~ s/\$1/$_/r) foreach 1 .. 10;
kill_all($node);
$node->start;
my $begin = time();
wait_open($node);
my $took = time() - $begin;
cmp_ok($took, '<', 3 + 0.2, sprintf('ready %.1f s after PostgreSQL, with a million events unflushed', $took));
is(sql($node, 'SELECT count(*) FROM ev'), $rows + 1_001_000, 'all rows are there');
$node->stop;
done_testing();
