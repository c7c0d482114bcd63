# Nothing waits for PostgreSQL's walwriter: with one that sleeps, what was committed asynchronously becomes durable by sync(),
# flush() or a fast stop, and the replication slot moves on.

use strict;
use warnings;
use EventStore::Server qw(new_server wait_open io_methods set_conf sql try_sql);
use Test::More;
use Time::HiRes qw(sleep time);

my $node = new_server('walwriter', 'event_store.shards = 2', 'wal_writer_delay = 10s', 'autovacuum = off', 'checkpoint_timeout = 1h');
sql($node, 'CREATE TABLE ev (position bigint, context_id text, version bigint, n int) USING event_store');
my $rows = 0;
my $asleep = 0;

END
{
	kill 'CONT', $asleep if $asleep;
}

sub sleeps
{
	$asleep = sql($node, q{SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'});
	kill('STOP', $asleep) == 1 or die 'no walwriter';
	return;
}

sub wakes
{
	kill 'CONT', $asleep;
	$asleep = 0;
	return;
}

sub commits
{
	my ($n) = @_;
	sql($node, "SET synchronous_commit = off; INSERT INTO ev (context_id, n) SELECT 'c' || g % 20, g FROM generate_series(1, $n) g");
	$rows += $n;
	return;
}

sub quick
{
	my ($name, $what) = @_;
	my $begin = time();
	$what->();
	my $took = time() - $begin;
	ok($took < 60, sprintf('%s: %.1f s', $name, $took));
	return;
}

my $slot = q{SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'event_store'};

foreach my $method (io_methods())
{
	set_conf($node, "event_store.io_method = '$method'");
	$node->restart;
	wait_open($node);
	sql($node, 'SELECT event_store.sync()');
	sleeps();

	foreach my $n (1, 5000)
	{
		commits($n);
		my $end = sql($node, 'SELECT pg_current_wal_insert_lsn()');
		quick("$method, sync() after $n rows", sub { sql($node, 'SELECT event_store.sync()') });
		ok($node->poll_query_until('postgres', 'SELECT max(durable_position) = (SELECT max(position) FROM ev) FROM event_store.stat_shards'),
			"$method, sync() after $n rows: the last one is durable");
		is(sql($node, "SELECT pg_current_wal_flush_lsn() >= '$end', durable_position FROM event_store.stat_shards ORDER BY durable_position DESC LIMIT 1"),
			't|' . sql($node, 'SELECT max(position) FROM ev'), "$method, sync() after $n rows: it is durable in PostgreSQL's WAL and in the shards' files");
		quick("$method, the slot moves past it", sub { ok($node->poll_query_until('postgres', "SELECT ($slot) >= '$end'"), "$method, the slot moves") });

		commits($n);
		quick("$method, flush() after $n rows", sub { sql($node, 'SELECT event_store.flush()') });
		is(sql($node, 'SELECT sum(memtable_rows), sum(segment_rows) FROM event_store.stat_shards'), "0|$rows", "$method, flush(): all is in segments");
	}

	wakes();

	# a fast stop
	commits(100);
	quick("$method, fast stop", sub {
		sleeps();
		# the postmaster waits for the walwriter itself, which has to hear of it
		my $pid = fork() // die "fork: $!";
		if ($pid == 0)
		{
			sleep 2;
			kill 'CONT', $asleep;
			require POSIX;
			POSIX::_exit(0);
		}
		$node->stop('fast');
		waitpid($pid, 0);
		$asleep = 0;
	});
	$node->start;
	wait_open($node);
	is(sql($node, 'SELECT count(*), count(DISTINCT position) FROM ev'), "$rows|$rows", "$method, after it all is there");
}

# a commit that nobody flushes is lost whole or not at all, and nothing is when sync() has returned
sleeps();
commits(50);
sql($node, 'SELECT event_store.sync()');
$node->stop('immediate');
$asleep = 0;
$node->start;
wait_open($node);
is(sql($node, 'SELECT count(*), count(DISTINCT position) FROM ev'), "$rows|$rows", 'after sync() and an immediate stop all is there');
$node->stop;
done_testing();
