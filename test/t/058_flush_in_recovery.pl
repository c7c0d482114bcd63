# A flush while recovery reads PostgreSQL's WAL does not count for the FINISHes of own WAL that were left to it: a crash behind
# that flush loses none of them.

use strict;
use warnings;
use EventStore::Server qw(new_server sql wait_open faults_compiled log_offset server_log_since);
use IPC::Run;
use Test::More;
use Time::HiRes qw(sleep);

my $node = new_server('flush_in_recovery', 'event_store.shards = 1', 'event_store.spill_after = 256kB', 'event_store.memtable_size = 1MB',
	'autovacuum = off');

if (!faults_compiled($node))
{
	$node->stop;
	plan skip_all => 'built without fault points';
}
sql($node, 'CREATE TABLE e (context_id text, version bigint, n int, filler text) USING event_store; CREATE TABLE h (context_id text, n int)');

sub both
{
	my ($context, $n, $size) = @_;
	return "INSERT INTO h SELECT $context, g FROM generate_series(1, $n) g;
		INSERT INTO e (context_id, n, filler) SELECT $context, g, repeat('f', $size) FROM generate_series(1, $n) g;";
}

sub is_consistent
{
	my ($name) = @_;
	is(sql($node, <<'SQL'), '', $name);
SELECT context_id, n FROM (SELECT context_id, n FROM h EXCEPT ALL SELECT context_id, n FROM e) lost
UNION ALL (SELECT context_id, n FROM e EXCEPT ALL SELECT context_id, n FROM h)
UNION ALL SELECT context_id, count(*)::int FROM e GROUP BY context_id HAVING count(*) <> max(version) OR count(DISTINCT version) <> count(*)
LIMIT 5
SQL
	return;
}

# staged, some of it without frames; it holds back where PostgreSQL's WAL is read from, so that there is much to read
my $load = $node->background_psql('postgres');
$load->query_safe('BEGIN');
my $staged = 0;
foreach my $chunk (1 .. 100)
{
	$load->query_safe(both("'load'", 100, 70));
	# sends what is pending
	$load->query_safe(q{SELECT count(*) FROM e WHERE context_id = 'none'});
	$staged = sql($node, 'SELECT staged_bytes FROM event_store.stat_shards');
	last if $staged > 1.75 * 256 * 1024;
}
cmp_ok($staged, '>', 1.75 * 256 * 1024, 'a transaction is staged');
is(sql($node, 'SELECT pending_segments FROM event_store.stat_shards'), '0', 'and not spilled');
sql($node, 'SET synchronous_commit = off; DO $$ BEGIN FOR i IN 1 .. 10000 LOOP
	INSERT INTO h VALUES (i % 100, i); INSERT INTO e (context_id, n) VALUES (i % 100, i); COMMIT; END LOOP; END $$');
sql($node, 'SELECT event_store.flush()');

# nothing more is flushed: rows for a MemTable, the FINISH that lacks batches, and one behind it
sql($node, q{SELECT event_store_test.inject_fault('job-after-take', 'sleep')});
sql($node, 'BEGIN; ' . both("'memtable$_'", 50, 500) . ' COMMIT;') foreach 1 .. 50;
my $xid = $load->query_safe('SELECT pg_current_xact_id()');
$load->query_safe('COMMIT');
$load->quit;
sql($node, 'BEGIN; ' . both("'behind'", 3, 3) . ' COMMIT;');
# also the verdict, which a shard asks for once a second
sleep 1.5;
sql($node, 'SELECT event_store.sync()');

# a crash; the shard is killed when what was in own WAL before that FINISH is flushed, of which the boundary came before it
my $offset = log_offset($node);
$node->stop('immediate');
{
	local $ENV{ES_FAULTS} = 'recovery-reading:sleep:1';
	$node->start;
}
ok($node->poll_query_until('postgres', q{SELECT event_store_test.fault_hits('recovery-reading') > 0}), 'the shard reads');
sleep 1;
sql($node, q{SELECT event_store_test.disarm_faults(), event_store_test.inject_fault('flush-manifest-durable', 'kill')});
$node->wait_for_log(qr/all server processes terminated; reinitializing/, $offset);
like(server_log_since($node, $offset), qr/^fault point flush-manifest-durable: kill/m, 'the shard was killed behind a flush');
ok($node->poll_query_until('postgres', q{SELECT event_store_test.fault_hits('recovery-reading') > 0}), 'it reads again');
sql($node, 'SELECT event_store_test.disarm_faults()');
ok(wait_open($node), 'the shard opens after a flush and a crash');
is_consistent('nothing is lost or doubled');

# its verdict is in own WAL behind its FINISH, not only in a file that goes earlier: VACUUM may have CLOG truncated
sleep 1.5;
sql($node, 'SELECT event_store.sync()');
$node->stop('immediate');
my @wal = map {
	my $out = '';
	IPC::Run::run([ 'es_filedump', $_ ], '<', \'', '>', \$out, IPC::Run::timeout(60));
	[ $out =~ /^  offset \d+: (\w+).*\b$xid\b/mg ];
} sort glob($node->data_dir . '/event_store/shard_0/wal.*');
is((map { @$_ } @wal)[-1], 'RESOLVED', 'the verdict is behind the FINISH');
$node->start;
ok(wait_open($node), 'the shard opens');
sql($node, 'SELECT event_store_test.disarm_faults()');
is_consistent('still nothing is lost');

sql($node, 'BEGIN; ' . both("'load'", 3, 3) . both("'behind'", 3, 3) . ' COMMIT;');
is_consistent('the next versions follow');
sql($node, 'SELECT event_store.flush()');
is_consistent('flushed');
$node->stop;
done_testing();
