# From memory to segments: what is flushed, spilled, adopted or carried, over crashes and restarts: each event that was
# committed is there once, and none that was not. (053_flush_faults.pl kills it at each step.)

use strict;
use warnings;
use EventStore::FlushLoad qw(flush_server work wrong consistent flush scripts);
use EventStore::Server qw(wait_open);
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = flush_server('flush');

# ---- plain flushes ----

$node->safe_psql('postgres', work('a', 100) . 'COMMIT;');
consistent($node, 'in memory');
flush($node);
consistent($node, 'in segments');
is($node->safe_psql('postgres', 'SELECT sum(memtable_rows) FROM event_store.stat_shards'), '0',
	'after a flush no row is left in memory');
is($node->safe_psql('postgres', 'SELECT sum(segment_rows) FROM event_store.stat_shards'), '200',
	'and all are in segments, but those of a rolled-back savepoint');
$node->safe_psql('postgres', work('b', 10000) . 'COMMIT;');
consistent($node, 'spilled');
$node->safe_psql('postgres', work('c', 10000) . 'ROLLBACK;');
consistent($node, 'spilled and rolled back');
flush($node);
ok($node->poll_query_until('postgres', 'SELECT sum(pending_segments) = 0 FROM event_store.stat_shards'),
	'no pending segment is left');
consistent($node, 'spilled and flushed');
$node->restart;
consistent($node, 'restarted');

# Files are those of the manifest and no more.
sub segment_files { return scalar(glob_all($node->data_dir . '/event_store/shard_*/*seg.*')); }
sub glob_all { my @files = glob($_[0]); return @files; }
is(segment_files(), $node->safe_psql('postgres', 'SELECT sum(segments) FROM event_store.stat_shards'),
	'no file is left of what was rolled back');

# ---- transactions that are under way while others are flushed ----

my $open = $node->background_psql('postgres', on_error_stop => 0);
$open->query_safe(work('open', 300));
my $own = $node->background_psql('postgres', on_error_stop => 0);
$own->query_safe(work('spilling', 4000));
# Own WAL and PostgreSQL's forget what came before: only what was logged again is left of the open ones.
foreach my $round (1 .. 6)
{
	$node->safe_psql('postgres', work("round$round", 2000) . 'COMMIT;');
	flush($node);
	$node->safe_psql('postgres', 'SELECT event_store.sync(); SELECT pg_switch_wal(); CHECKPOINT');
}
is($open->query_safe(q{SELECT count(*) FROM plain WHERE context_id LIKE 'open%'}), '300',
	'a transaction sees its rows after flushes of others');
is($own->query_safe(q{SELECT count(*) FROM plain WHERE context_id LIKE 'spilling%'}), '4000',
	'also those in pending segments');
$open->query_safe('COMMIT');
consistent($node, 'staged while others were flushed');
$own->query_safe('COMMIT');
consistent($node, 'spilled while others were flushed');
$open->query_safe(work('open2', 300));
$own->query_safe(work('spilling2', 4000));
foreach my $round (1 .. 6)
{
	$node->safe_psql('postgres', work("round2$round", 2000) . 'COMMIT;');
	flush($node);
	$node->safe_psql('postgres', 'SELECT event_store.sync(); SELECT pg_switch_wal(); CHECKPOINT');
}
# The shards alone are restarted: what is staged comes from carried frames and PostgreSQL's WAL.
$node->safe_psql('postgres',
	q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type LIKE 'event_store shard%'});
ok(wait_open($node), 'shards come back');
$open->query_safe('COMMIT');
$own->query_safe('ROLLBACK');
consistent($node, 'staged while others were flushed, and the shards were restarted');
flush($node);
consistent($node, 'and flushed');
$open->quit;
$own->quit;

# ---- transactions that have finished but are not decided: synchronous replication holds them ----

$node->safe_psql('postgres', q{ALTER SYSTEM SET synchronous_standby_names = 'nobody'});
# (a reload reaches the checkpointer, who tells everybody, some time later)
$node->restart;
my @held;
foreach my $i (1 .. 3)
{
	my $rows = $i == 2 ? 4000 : 40;
	my ($out, $err) = ('', '');
	my $sql = work("held$i", $rows);
	$sql =~ s/'c' \|\|/'held$i' ||/g;
	push @held, IPC::Run::start([ 'psql', '-X', '-d', $node->connstr('postgres'), '-c', "$sql COMMIT;" ],
		'<', \'', '>', \$out, '2>', \$err, IPC::Run::timeout(600));
}
ok($node->poll_query_until('postgres',
	q{SELECT count(*) = 3 FROM pg_stat_activity WHERE wait_event = 'SyncRep'}), 'three transactions wait');
foreach my $round (1 .. 5)
{
	$node->safe_psql('postgres', 'SET synchronous_commit = local;' . work("local$round", 2000) . 'COMMIT;');
	$node->safe_psql('postgres', 'SET synchronous_commit = local; SELECT event_store.flush()');
	$node->safe_psql('postgres', 'SET synchronous_commit = local; SELECT event_store.sync(); SELECT pg_switch_wal(); CHECKPOINT');
}
is($node->safe_psql('postgres', q{SELECT count(*) FROM plain WHERE context_id LIKE 'held%'}), '0',
	'nobody sees what is not decided');
$node->stop('immediate');
eval { $_->finish } foreach @held;
$node->append_conf('postgresql.conf', q{synchronous_standby_names = ''});
unlink($node->data_dir . '/postgresql.auto.conf');
append_to_file($node->data_dir . '/postgresql.auto.conf', '');
$node->start;
ok(wait_open($node), 'open after the crash');
consistent($node, 'undecided transactions carried over several flushes, and a crash');
is($node->safe_psql('postgres', q{SELECT count(*) FROM plain WHERE context_id LIKE 'held%'}), '4080',
	'their commit records were in the log, so they are committed');
flush($node);
consistent($node, 'and flushed');

# ---- flushes in a loop: nobody dies ----

my ($script, $flushes) = scripts($node);

# pgbench: small transactions by $clients, and flushes by one, for $seconds.
sub start_load
{
	my ($clients, $seconds) = @_;
	my ($out, $err) = ('', '');

	return map {
		IPC::Run::start([ 'pgbench', '-n', '-f', $_->[0], '-c', $_->[1], '-T', $seconds, $node->connstr('postgres') ],
			'<', \'', '>', \$out, '2>', \$err, IPC::Run::timeout($seconds + 300))
	} ([ $script, $clients ], [ $flushes, 1 ]);
}

{
	my $seconds = $ENV{ES_LONG} ? 120 : 10;
	my $end = time() + $seconds;
	my $looks = 0;

	$node->safe_psql('postgres', 'TRUNCATE plain, versioned, heap');
	consistent($node, 'before flushes in a loop');
	my @load = start_load(5, $seconds);
	while (time() < $end)
	{
		# one snapshot: it may be asked while they write
		last unless wrong($node) eq '';
		$looks++;
		sleep 0.2;
	}
	ok($_->finish, 'the load has no errors') foreach @load;
	consistent($node, "after flushes in a loop, and $looks looks meanwhile");
	cmp_ok($looks, '>', 1, 'looks while flushes were going on found nothing wrong');
	flush($node);
	consistent($node, 'and all flushed');
}

# ---- the same, and kill -9 ----

foreach my $round (1 .. ($ENV{ES_LONG} ? 20 : 4))
{
	my @load = start_load(5, 30);

	sleep 1 + rand(2);
	my @pids = split /\n/, $node->safe_psql('postgres',
		q{SELECT pid FROM pg_stat_activity WHERE backend_type LIKE 'event_store %' ORDER BY random()});
	kill 'KILL', $pids[0];
	eval { $_->finish } foreach @load;
	ok(wait_open($node), "open after kill -9, round $round");
	consistent($node, "kill -9 while flushing, round $round");
}

# ---- maintenance workers come and go ----

{
	my @load = start_load(4, 5);
	foreach (1 .. 10)
	{
		sleep 0.5;
		$node->safe_psql('postgres',
			q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type LIKE 'event_store maintenance%'});
	}
	$_->finish foreach @load;
	flush($node);
	consistent($node, 'maintenance workers terminated while they were needed');
}

is($node->safe_psql('postgres', 'SELECT count(*) FROM event_store.verify()'), '0', 'no file is damaged');
is($node->safe_psql('postgres', q{SELECT sum(corruptions) FROM event_store.stat_shards}), '0', 'no shard met damage');
$node->stop;
done_testing();
