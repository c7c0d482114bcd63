# As long as own WAL is replayed for a FINISH, what it names is there, also when none of its rows was taken (a load that is sent
# again) and when its table is dropped: transactions behind it survive a crash, a shard's end and a clean restart, with their
# versions.

use strict;
use warnings;
use EventStore::Server qw(new_server sql wait_open crash_restart);
use Test::More;
use Time::HiRes qw(sleep);

my $node = new_server('needs', 'event_store.shards = 1', 'event_store.spill_after = 64kB', 'event_store.memtable_size = 64MB',
	'autovacuum = off');
my $committed = 0;

sql($node, 'CREATE TABLE loads (context_id int, event_id uuid, v text) USING event_store; CREATE TABLE other (context_id int) USING event_store;');

sub rows
{
	my ($chunk) = @_;
	return "SELECT g % 50, md5(g::text)::uuid, repeat('x', 200) FROM generate_series($chunk * 100 + 1, $chunk * 100 + 100) g";
}

# Commits a transaction all rows of which lie in pending segments, so that its FINISH does not ask for a flush.
sub load_spilled
{
	my ($table, $name) = @_;
	my $session = $node->background_psql('postgres');
	my $state = '';

	$session->query_safe('BEGIN');
	foreach my $chunk (1 .. 100)
	{
		$session->query_safe("INSERT INTO $table " . rows($chunk));
		# sends what is pending
		$session->query_safe("SELECT count(*) FROM $table WHERE context_id = -1");
		# the more patient the slower the shard spills
		foreach (1 .. ($chunk <= 20 ? 10 : 100))
		{
			$state = sql($node, 'SELECT pending_segments > 0, staged_rows FROM event_store.stat_shards');
			last if $state eq 't|0';
			sleep 0.03;
		}
		last if $state eq 't|0';
	}
	is($state, 't|0', "$name: all is spilled");
	$session->query_safe('COMMIT');
	$session->quit;
	$node->poll_query_until('postgres', 'SELECT pending_segments = 0 FROM event_store.stat_shards') or die;
	return;
}

sub commit_others
{
	foreach (1 .. 20)
	{
		sql($node, 'INSERT INTO other VALUES (1)');
		$committed++;
	}
	return;
}

my %ends = (
	'a crash' => sub { crash_restart($node); },
	'the end of the shard' => sub {
		sql($node, q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE backend_type = 'event_store shard 0'});
	},
	'a clean restart' => sub { $node->restart; });

sub survives
{
	my ($end, $what) = @_;

	# behind the FINISH, and durable in own WAL: PostgreSQL's is not asked for them
	commit_others();
	sql($node, 'SELECT event_store.sync()');
	sleep 0.5;
	commit_others();
	$ends{$end}->();
	ok(wait_open($node), "$what, then $end: the shard opens");
	is(sql($node, 'SELECT count(*) FROM other'), $committed, "$what, then $end: nothing that was committed behind it is lost");
	return;
}

foreach my $end (sort keys %ends)
{
	sql($node, join(';', map { 'INSERT INTO loads ' . rows($_) } 1 .. 100));
	sql($node, 'SELECT event_store.flush()');
	load_spilled('loads', "a load again, then $end");
	is(sql($node, 'SELECT count(*), count(DISTINCT event_id) FROM loads'), '10000|10000', "a load again, then $end: nothing is stored twice");
	survives($end, 'a load again');
	is(sql($node, 'SELECT count(*), count(DISTINCT event_id) FROM loads'), '10000|10000', "a load again, then $end: still nothing twice");
	sql($node, 'INSERT INTO other VALUES (1); SELECT event_store.flush()');
	$committed++;
	ok($node->poll_query_until('postgres', q{SELECT count(*) = 0 FROM event_store.stat_segments WHERE rows = 0}), "a load again, then $end: the empty segments go with a flush");
	sql($node, 'TRUNCATE loads');

	sql($node, 'CREATE TABLE dropped (LIKE loads) USING event_store');
	sql($node, 'SELECT event_store.flush()');
	load_spilled('dropped', "a load, DROP, then $end");
	my $storage = sql($node, q{SELECT storage_id FROM event_store.stat_tables WHERE store = 'dropped'::regclass});
	cmp_ok(sql($node, "SELECT count(*) FROM event_store.stat_segments WHERE storage_id = $storage"), '>', 0, "a load, DROP, then $end: there are segments");
	commit_others();
	sql($node, 'DROP TABLE dropped');
	ok($node->poll_query_until('postgres', "SELECT count(*) = 0 FROM event_store.stat_segments WHERE storage_id = $storage"), "a load, DROP, then $end: the segments go");
	survives($end, 'a load and DROP');
}
# contexts written to by a load, before it and behind it: the versions behind go on where the load's end
sql($node, 'CREATE TABLE versions (context_id int, event_id uuid, v text, version bigint) USING event_store');
foreach my $end (sort keys %ends)
{
	my $versions = q{SELECT md5(string_agg(context_id || v || version, ',' ORDER BY context_id, version)) FROM versions};
	my $before;

	sql($node, 'TRUNCATE versions');
	sql($node, 'SELECT event_store.flush()');
	sql($node, q{INSERT INTO versions SELECT g, NULL, 'before' FROM generate_series(0, 49) g});
	load_spilled('versions', "a load with versions, then $end");
	sql($node, "INSERT INTO versions VALUES ($_, NULL, 'behind')") foreach 0 .. 49;
	$before = sql($node, $versions);
	survives($end, 'a load with versions');
	is(sql($node, $versions), $before, "a load with versions, then $end: all are what they were");
	sql($node, "INSERT INTO versions VALUES ($_, NULL, 'next')") foreach 0 .. 49;
	is(sql($node, 'SELECT count(*) FROM (SELECT FROM versions GROUP BY context_id HAVING max(version) <> count(*) OR count(DISTINCT version) <> count(*)) x'),
		'0', "a load with versions, then $end: the next ones follow");
}
is(sql($node, 'SELECT count(*) FROM event_store.verify()'), '0', 'no file is damaged');
$node->stop;
done_testing();
