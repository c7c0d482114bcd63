# Connecting, sending and disconnecting leaves nothing behind: no shared memory, no mapping, no memory in the
# shard, and nothing that was sent before the end of a session is lost.

use strict;
use warnings;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $sessions = $ENV{ES_LONG} ? 10000 : 1000;
my $node     = PostgreSQL::Test::Cluster->new('cycles');
$node->init;
$node->append_conf('postgresql.conf', <<CONF);
shared_preload_libraries = 'event_store'
wal_level = replica
event_store.shards = 4
max_worker_processes = 16
max_connections = 40
# whoever comes by himself is mapped, too
autovacuum = off
CONF
$node->start;
$node->safe_psql('postgres', <<'SQL');
CREATE SCHEMA event_store_test;
CREATE EXTENSION event_store_test;
CREATE EXTENSION event_store;
CREATE TABLE t (context_id int, position bigint, version bigint, v text) USING event_store;
SQL

my @pids = map { $node->safe_psql('postgres', "SELECT event_store_test.shard_pid($_)") } 0 .. 3;

# Mapped DSM segments and resident kilobytes of a process; of mmap'ed files only those of this server show.
sub mappings
{
	return scalar(grep { m{/dev/shm/PostgreSQL\.|/pg_dynshmem/} } split(/\n/, slurp_file("/proc/$_[0]/maps")));
}

sub resident
{
	return slurp_file("/proc/$_[0]/status") =~ /^RssAnon:\s+(\d+) kB/m ? $1 : die "no RssAnon";
}

# Number of mappings of each shard, when it has come to what is wanted, or after 60 s.
sub settle
{
	my ($want) = @_;
	my $now;

	for (1 .. 600)
	{
		$now = join(' ', map { mappings($_) } @pids);
		last if $now eq $want;
		select(undef, undef, undef, 0.1);
	}
	return $now;
}

# The same when it has not changed for five seconds: nobody is on his way out, nor a collector at work.
sub at_rest
{
	my ($now, $since) = ('', 0);

	for (1 .. 600)
	{
		my $was = $now;
		$now = join(' ', map { mappings($_) } @pids);
		$since = $now eq $was ? $since + 1 : 0;
		last if $since >= 50;
		select(undef, undef, undef, 0.1);
	}
	return $now;
}

my $all = "SELECT event_store_test.echo(s, 100) FROM generate_series(0, 3) s;\n";
my $dir = PostgreSQL::Test::Utils::tempdir();
append_to_file("$dir/all.sql",  $all);
# four contexts: most shards; now and then a transaction that does not commit
append_to_file("$dir/write.sql", <<'SQL');
\set c random(1, 1000000)
\set r random(1, 10)
INSERT INTO t (context_id, v) SELECT :c + g, 'v' || :c FROM generate_series(0, 3) g;
\if :r = 1
BEGIN;
INSERT INTO t (context_id, v) VALUES (:c, 'dead');
SELECT count(*) FROM t WHERE context_id = :c;
ROLLBACK;
\endif
SQL

# ---- sessions

$node->command_ok([ 'pgbench', '-n', '-C', '-c', '8', '-t', '20', '-f', "$dir/all.sql", 'postgres' ], 'warm up');
my $idle   = at_rest();
my @before = map { resident($_) } @pids;

$node->command_ok(
	[ 'pgbench', '-n', '-C', '-c', '8', '-t', $sessions / 8, '-f', "$dir/all.sql", 'postgres' ],
	"$sessions sessions connect, send and disconnect");
is(settle($idle), $idle, 'no segment stays mapped');
sub has_not_grown
{
	my ($by) = @_;

	for my $i (0 .. 3)
	{
		my $grown = resident($pids[$i]) - $before[$i];

		cmp_ok($grown, '<', $by, "shard $i has not grown ($grown kB)");
	}
	return;
}
has_not_grown(2000);

# the same with events: what is mapped for the MemTables and in memory for their contexts goes with a flush
sub written { return $node->safe_psql('postgres', "SELECT count(*), count(DISTINCT position), count(*) FILTER (WHERE v = 'dead') FROM t"); }
my $writers = "pgbench -n -C -c 8 -f $dir/write.sql";
$node->command_ok([ split(/ /, $writers), '-t', 20, 'postgres' ], 'warm up');
$node->safe_psql('postgres', 'SELECT event_store.flush()');
$idle = at_rest();
@before = map { resident($_) } @pids;
$node->command_ok([ split(/ /, $writers), '-t', $sessions / 8, 'postgres' ], "$sessions sessions connect, write and disconnect");
my $events = 4 * ($sessions + 160);
is(written(), "$events|$events|0", 'all of their events are there, once');
$node->safe_psql('postgres', 'SELECT event_store.flush()');
is(settle($idle), $idle, 'no segment stays mapped');
has_not_grown($ENV{ES_LONG} ? 8000 : 4000);
# hints of an abort may be lost: each second the shard asks
ok($node->poll_query_until('postgres', 'SELECT sum(staged_transactions) = 0 FROM event_store.stat_shards'), 'nothing is staged');
is(written(), "$events|$events|0", 'flushed');

# ---- a backend takes five segments at most, and slots are used again

my $one = $node->background_psql('postgres');
$one->query_safe($all);
my $one_more = join(' ', map { $_ + 1 } split(/ /, $idle));
is(settle($one_more), $one_more, 'each shard maps one segment of a session');
$one->quit;
is(settle($idle), $idle, 'until it ends');
is($node->safe_psql('postgres', $all . 'SELECT count(*) FROM generate_series(0, 3) s WHERE (event_store_test.channel(s)).usable')
	=~ s/.*\n//sr, '4', 'one session with all shards');

# ---- 10,000 generations of one channel

is( $node->safe_psql(
		'postgres', "SELECT max(event_store_test.reconnect(1)) - min(event_store_test.reconnect(2)) <> 0 FROM generate_series(1, 5000)"),
	't', '10,000 reconnects of one session');
is(settle($idle), $idle, 'no segment stays mapped');

# ---- what was sent before a session ended is taken although nobody waits for it

# every message is counted: the collector, who has messages too, does not come in the first minute
$node->restart;
$node->safe_psql('postgres', $all);
@pids = map { $node->safe_psql('postgres', "SELECT event_store_test.shard_pid($_)") } 0 .. 3;
$idle = at_rest();
$node->safe_psql('postgres', 'SELECT event_store_test.pause_shard(0, true)');
my $messages = $node->safe_psql('postgres', "SELECT event_store_test.shard_counter(0, 'messages')");

# a channel cannot be made while the shard takes nothing: it is made before
my @sessions = map { $node->background_psql('postgres') } 1 .. 5;
$node->safe_psql('postgres', 'SELECT event_store_test.pause_shard(0, false)');
$_->query_safe('SELECT event_store_test.echo(0, 1)') for @sessions;
$node->safe_psql('postgres', 'SELECT event_store_test.pause_shard(0, true)');
$_->query_safe('SELECT event_store_test.send_without_waiting(0, 500, 100)') for @sessions;
$_->quit for @sessions;
is($node->safe_psql('postgres', "SELECT event_store_test.shard_counter(0, 'messages') - $messages"),
	'5', 'the shard is paused');
$node->safe_psql('postgres', 'SELECT event_store_test.pause_shard(0, false)');
$node->poll_query_until('postgres', "SELECT event_store_test.shard_counter(0, 'messages') >= $messages + 505");
is($node->safe_psql('postgres', "SELECT event_store_test.shard_counter(0, 'messages') - $messages"),
	'505', 'everything that they had sent was taken after they were gone');
is(settle($idle), $idle, 'no segment stays mapped');

$node->stop;
done_testing();
