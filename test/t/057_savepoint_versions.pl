# Versions of a context go on where the transaction's last live row left them, whatever of it was spilled and rolled back to a
# savepoint, and are the same after a crash.

use strict;
use warnings;
use EventStore::Server qw(new_server sql wait_open crash_restart);
use Test::More;
use Time::HiRes qw(sleep);

my $node = new_server('versions', 'event_store.shards = 1', 'event_store.spill_after = 64kB', 'event_store.memtable_size = 64MB',
	'autovacuum = off');

sub rows { my ($from, $to) = @_; return "INSERT INTO v (context_id, n, p) SELECT 'c', g, repeat(md5(g::text), 5) FROM generate_series($from, $to) g"; }

my $few = rows(1, 600);
my $many = rows(1001, 4000);
my %cases = (
	'rows before and behind, the spill rolled back' => [ $few, 'SAVEPOINT s', $many, 'spill', 'ROLLBACK TO s', rows(5001, 5010) ],
	'live rows spilled first' => [ $many, 'spill', 'SAVEPOINT s', rows(5001, 9000), 'spill', 'ROLLBACK TO s', rows(9001, 9010) ],
	'the spill rolled back comes first' => [ 'SAVEPOINT s', $many, 'spill', 'ROLLBACK TO s', rows(5001, 5010) ],
	'live rows spilled behind' => [ 'SAVEPOINT s', $many, 'spill', 'ROLLBACK TO s', rows(5001, 9000), 'spill', rows(9001, 9010) ],
	'between two that live' => [ $many, 'spill', 'SAVEPOINT s', rows(5001, 9000), 'spill', 'ROLLBACK TO s', rows(9001, 12000), 'spill', rows(12001, 12010) ],
	'nothing rolled back' => [ $few, 'SAVEPOINT s', $many, 'spill', rows(5001, 5010) ]);

# Wrong versions, and how many rows there are.
my $look = q{SELECT count(*) FILTER (WHERE version <> rank), count(*) FROM (SELECT version, row_number() OVER (ORDER BY position) AS rank FROM v) x};

foreach my $name (sort keys %cases)
{
	my $session = $node->background_psql('postgres');
	my $spilled = 0;

	sql($node, q{CREATE TABLE v (context_id text, n int, p text, position bigint, version bigint) USING event_store; INSERT INTO v (context_id, n) VALUES ('c', 0)});
	$session->query_safe('BEGIN');
	foreach my $step (@{ $cases{$name} })
	{
		if ($step ne 'spill') { $session->query_safe($step); next; }
		# sends what is pending
		$session->query_safe('SELECT count(*) FROM v');
		foreach (1 .. 1200)
		{
			last if sql($node, "SELECT pending_segments > $spilled FROM event_store.stat_shards") eq 't';
			sleep 0.05;
		}
		sleep 0.2;
		my $now = sql($node, 'SELECT pending_segments FROM event_store.stat_shards');
		cmp_ok($now, '>', $spilled, "$name: spilled");
		$spilled = $now;
	}
	my $rows = $session->query_safe('SELECT count(*) FROM v');
	$session->query_safe('COMMIT');
	$session->quit;
	sql($node, q{INSERT INTO v (context_id, n) VALUES ('c', 99999)});
	is(sql($node, $look), '0|' . ($rows + 1), "$name: versions have no gap");
	crash_restart($node);
	ok(wait_open($node), "$name: the shard opens after a crash");
	is(sql($node, $look), '0|' . ($rows + 1), "$name: the versions are the same after a crash");
	sql($node, 'SELECT event_store.flush()');
	is(sql($node, $look), '0|' . ($rows + 1), "$name: and in segments");
	sql($node, 'DROP TABLE v');
}
$node->stop;
done_testing();
