# Rows of a transaction that is between FINISH and its commit record when MemTables are flushed are carried over: whoever
# reads before, in the middle and after sees them exactly once if their transaction committed for his snapshot, else not
# at all, and so does who opened his cursor before the flush.

use strict;
use warnings;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = PostgreSQL::Test::Cluster->new('carry');
$node->init;
$node->append_conf('postgresql.conf', <<CONF);
shared_preload_libraries = 'event_store'
wal_level = replica
fsync = off
event_store.shards = 1
max_worker_processes = 16
CONF
$node->start;
$node->safe_psql('postgres', 'CREATE SCHEMA event_store_test; CREATE EXTENSION event_store_test SCHEMA event_store_test; CREATE EXTENSION event_store');
plan skip_all => 'needs fault points'
  if $node->safe_psql('postgres', 'SELECT event_store_test.fault_points_compiled()') ne 't';
$node->safe_psql('postgres', 'CREATE TABLE ev (context_id text, position bigint, version bigint, k int) USING event_store');

my $total = 0;
my $query = q{SELECT count(*) || ' ' || count(DISTINCT position) || ' ' || count(DISTINCT k) FROM ev};

sub see
{
	my ($what) = @_;

	is($node->safe_psql('postgres', $query), "$total $total $total", $what);
	is($node->safe_psql('postgres', q{SELECT count(*) || ' ' || count(DISTINCT position) FROM event_store.read_all(store => 'ev')}) =~ s/ .*//r <= $total ? 1 : 0,
		1, "$what, in order");
	is($node->safe_psql('postgres', q{SELECT sum((SELECT count(*) FROM event_store.replay('c' || i, store => 'ev'))) FROM generate_series(0, 2) i}),
		$total, "$what, by context");
	return;
}

sub put
{
	my ($n) = @_;

	$node->safe_psql('postgres', "INSERT INTO ev (context_id, k) SELECT 'c' || i % 3, $total + i FROM generate_series(1, $n) i");
	$total += $n;
	return;
}

for my $end ('commit', 'terminate', 'commit')
{
	put(10);
	$node->safe_psql('postgres', q{SELECT event_store_test.inject_fault('commit-after-send', 'sleep')});
	my $writer = $node->background_psql('postgres', on_error_stop => 0);
	my $pid    = $writer->query('SELECT pg_backend_pid()');
	# contexts of its own: others write to c0 to c2 meanwhile
	$writer->query_until(qr/begun/, "\\echo begun\nINSERT INTO ev (context_id, k) SELECT 'own', 100000 + $total + i FROM generate_series(1, 7) i;\n");
	ok($node->poll_query_until('postgres', q{SELECT event_store_test.fault_hits('commit-after-send') > 0}), "$end: the writer sleeps before its commit");

	my @readers;
	for my $stage ('before', 'carried', 'carried twice')
	{
		my $r = $node->background_psql('postgres', on_error_stop => 0);

		$r->query('BEGIN; DECLARE c CURSOR FOR SELECT k FROM ev');
		$r->query('FETCH 1 FROM c');
		push @readers, [ $r, $total - 1, $stage ];
		see("$end, $stage");
		$node->safe_psql('postgres', 'SELECT event_store.flush()');
		see("$end, $stage, flushed");
		put(3);
	}
	if ($end eq 'commit')
	{
		$node->safe_psql('postgres', 'SELECT event_store_test.disarm_faults()');
		$writer->query('SELECT 1');
	}
	else
	{
		$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
		$node->safe_psql('postgres', 'SELECT event_store_test.disarm_faults()');
		ok($node->poll_query_until('postgres', "SELECT NOT EXISTS (SELECT 1 FROM pg_stat_activity WHERE pid = $pid)"), 'it is gone');
	}
	eval { $writer->quit };
	# the terminated one may have been past the point of no return
	my $own = $node->safe_psql('postgres', q{SELECT count(*) FROM ev WHERE context_id = 'own' AND k > 100000 + } . ($total - 19));
	like($own, $end eq 'commit' ? qr/^7$/ : qr/^[07]$/, "$end: its rows, all or none");
	for my $x (@readers)
	{
		my ($r, $left, $stage) = @$x;
		my @rows = split /\n/, $r->query('FETCH ALL FROM c');

		is(scalar(@rows), $left, "$end: cursor opened $stage");
		$r->query('COMMIT');
		$r->quit;
	}
	my $all = $node->safe_psql('postgres', $query);
	for my $state ('decided', 'flushed', 'restarted')
	{
		$node->safe_psql('postgres', 'SELECT event_store.flush()') if $state eq 'flushed';
		$node->restart if $state eq 'restarted';
		is($node->safe_psql('postgres', $query), $all, "$end, $state");
	}
	my ($n, $positions, $ks) = split / /, $all;
	is("$positions $ks", "$n $n", 'nothing twice');
	$node->safe_psql('postgres', 'SELECT event_store.flush()');
	$total = $n;
	# keep the counts simple for the next round
	$node->safe_psql('postgres', 'TRUNCATE ev');
	$total = 0;
}
# While the segment is being written the rows are in two MemTables. The writer waits for a standby that never comes:
# PostgreSQL says committed in its log and in progress to everybody.
$node->append_conf('postgresql.conf', "max_wal_senders = 4\nsynchronous_commit = local\nsynchronous_standby_names = 'nobody'\n");
$node->restart;
put(20);
my $writer = $node->background_psql('postgres', on_error_stop => 0);
$writer->query('SET synchronous_commit = on');
$writer->query_until(qr/begun/, "\\echo begun\nINSERT INTO ev (context_id, k) SELECT 'own', 100000 + i FROM generate_series(1, 7) i;\n");
ok($node->poll_query_until('postgres', q{SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'SyncRep'}), 'the writer waits for a standby');
$node->safe_psql('postgres', q{SELECT event_store_test.inject_fault('segment-before-sync', 'sleep')});
my $early = $node->background_psql('postgres', on_error_stop => 0);
$early->query('BEGIN ISOLATION LEVEL REPEATABLE READ; DECLARE c CURSOR FOR SELECT k FROM ev');
$early->query('FETCH 1 FROM c');
my $flusher = $node->background_psql('postgres', on_error_stop => 0);
$flusher->query_until(qr/begun/, "\\echo begun\nSELECT event_store.flush();\n");
ok($node->poll_query_until('postgres', q{SELECT event_store_test.fault_hits('segment-before-sync') > 0}), 'a segment is being written');
see('two MemTables, undecided');
$node->append_conf('postgresql.conf', "synchronous_standby_names = ''\n");
$node->reload;
$writer->query('SELECT 1');
$total += 7;
is($node->safe_psql('postgres', $query), "$total $total $total", 'two MemTables, committed');
is($node->safe_psql('postgres', q{SELECT count(*) || ' ' || count(DISTINCT position) FROM event_store.read_all(store => 'ev')}), "$total $total", 'in order');
is($node->safe_psql('postgres', q{SELECT count(*) FROM event_store.replay('own', store => 'ev')}), 7, 'by context');
is($node->safe_psql('postgres', q{SELECT sum(memtable_rows) FROM event_store.stat_tables_fn() WHERE store = 'ev'::regclass}), $total, 'counted once');
is($early->query('SELECT count(*) FROM ev'), '20', 'not by an older snapshot');
is(scalar(split /\n/, $early->query('FETCH ALL FROM c')), 19, 'nor by an older cursor');
$node->safe_psql('postgres', 'SELECT event_store_test.disarm_faults()');
$flusher->query('SELECT 1');
is($node->safe_psql('postgres', $query), "$total $total $total", 'flushed');
is($early->query('SELECT count(*) FROM ev'), '20', 'not by an older snapshot, flushed');
$early->query('COMMIT');
eval { $_->quit } for $early, $writer, $flusher;
$node->safe_psql('postgres', 'SELECT event_store.flush()');
is($node->safe_psql('postgres', $query), "$total $total $total", 'flushed again');
$node->stop;
done_testing();
