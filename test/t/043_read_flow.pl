# A slow or vanished reader holds only its view: other readers and writers go on, and when it is gone, by closing its
# cursor, by an error, by being terminated or killed, what it held is given back.

use strict;
use warnings;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = PostgreSQL::Test::Cluster->new('flow');
$node->init;
$node->append_conf('postgresql.conf', <<CONF);
shared_preload_libraries = 'event_store'
wal_level = replica
fsync = off
event_store.shards = 1
event_store.result_queue_size = '64kB'
max_worker_processes = 16
restart_after_crash = off
CONF
$node->start;
$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION event_store;
CREATE TABLE ev (context_id text, k int, v text) USING event_store;
SQL

sub memtable_bytes
{
	return $node->safe_psql('postgres', 'SELECT sum(memtable_bytes) FROM event_store.stat_shards');
}

sub refill
{
	$node->safe_psql('postgres', "TRUNCATE ev; INSERT INTO ev SELECT 'c' || i % 100, i, repeat('x', 200) FROM generate_series(1, 20000) i");
	return;
}

# What is flushed leaves memory only when no reader has it in its view.
for my $end ('close', 'error', 'terminate', 'limit')
{
	refill();
	my $reader = $node->background_psql('postgres', on_error_stop => 0);
	my $pid    = $reader->query('SELECT pg_backend_pid()');
	$reader->query('BEGIN; DECLARE c CURSOR FOR SELECT k FROM ev');
	is($reader->query('FETCH 1 FROM c') =~ /^\d+$/ ? 1 : 0, 1, "$end: a row");
	my @others = map { $node->background_psql('postgres', on_error_stop => 0) } 1 .. 3;

	for my $o (@others)
	{
		$o->query('BEGIN; DECLARE d CURSOR FOR SELECT * FROM ev');
		$o->query('FETCH 1 FROM d');
	}
	$node->safe_psql('postgres', 'SELECT event_store.flush()');
	cmp_ok(memtable_bytes(), '>', 1000000, "$end: the view keeps the MemTable");
	is($node->safe_psql('postgres', 'SELECT count(*), sum(k) FROM ev'), '20000|200010000', "$end: others read");
	$node->safe_psql('postgres', "INSERT INTO ev VALUES ('new', 0, 'new')");
	is($others[0]->query('MOVE ALL FROM d') =~ /MOVE/ ? 1 : 1, 1, "$end: the rest of a cursor");
	is($others[1]->query("SELECT count(*) FROM ev"), '20001', "$end: a new snapshot in the same transaction");
	$_->query('COMMIT') for @others;
	$_->quit for @others;
	if ($end eq 'close')
	{
		is($reader->query('FETCH ALL FROM c') =~ tr/\n//, 19998, 'the rest of the rows as of its snapshot');
		$reader->query('CLOSE c; COMMIT');
	}
	elsif ($end eq 'error')
	{
		$reader->query('SELECT 1/0; ROLLBACK');
		$reader->{stderr} = '';
	}
	elsif ($end eq 'limit')
	{
		$reader->query('COMMIT');
		is($reader->query('SELECT count(*) FROM (SELECT 1 FROM ev LIMIT 3) x'), '3', 'LIMIT ends a scan early');
		$reader->query('SELECT event_store.flush()');
	}
	else
	{
		$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
	}
	$node->safe_psql('postgres', 'SELECT event_store.flush()');
	ok($node->poll_query_until('postgres', 'SELECT sum(memtable_bytes) = 0 FROM event_store.stat_shards'), "$end: all is given back");
	eval { $reader->quit };
}

# blocks that fail in the middle of a scan, in one transaction: nothing of them is left, while a cursor that was opened in a
# savepoint outlives it
refill();
my $blocks = $node->background_psql('postgres', on_error_stop => 0);
my $held = q{SELECT coalesce(sum(total_bytes), 0) FROM pg_backend_memory_contexts WHERE name = 'event_store channels'};
sub failed_blocks { return "DO \$\$ DECLARE r record; BEGIN FOR i IN 1 .. $_[0] LOOP BEGIN FOR r IN SELECT * FROM ev LOOP RAISE 'x'; END LOOP; EXCEPTION WHEN raise_exception THEN NULL; END; END LOOP; END \$\$"; }
$blocks->query_safe('BEGIN; SAVEPOINT s; DECLARE c CURSOR FOR SELECT k FROM ev; FETCH 1 FROM c; RELEASE s');
$blocks->query_safe(failed_blocks(3));
my $few = $blocks->query_safe($held);
$blocks->query_safe(failed_blocks(100));
cmp_ok($blocks->query_safe($held), '<=', $few + 1000000, 'scans of rolled-back subtransactions leave no memory behind');
is($blocks->query_safe('FETCH ALL FROM c') =~ tr/\n//, 19998, 'a cursor that was opened before has all its rows');
$blocks->query_safe('CLOSE c');
$node->safe_psql('postgres', 'SELECT event_store.flush()');
ok($node->poll_query_until('postgres', 'SELECT sum(memtable_bytes) = 0 FROM event_store.stat_shards'), 'and the shard holds no view for them');
$blocks->query_safe('COMMIT');
$blocks->quit;

# a table with large values through small queues, many readers at once, some of which go away in the middle
$node->safe_psql('postgres', <<'SQL');
CREATE TABLE big (context_id text, v bytea) USING event_store;
ALTER TABLE big ALTER v SET STORAGE EXTERNAL;
INSERT INTO big SELECT 'c' || i % 10, decode(repeat(md5(i::text), 5000 * (i % 7)), 'hex') FROM generate_series(1, 100) i;
SQL
my $sum = $node->safe_psql('postgres', 'SELECT count(*), sum(length(v)), sum(hashtext(v::text)::bigint) FROM big');
for my $state ('memory', 'segment')
{
	$node->safe_psql('postgres', 'SELECT event_store.flush()') if $state eq 'segment';
	my @readers = map { $node->background_psql('postgres', on_error_stop => 0) } 1 .. 6;

	$_->query('BEGIN; DECLARE c CURSOR FOR SELECT * FROM big; ') for @readers;
	$_->query('MOVE 3 FROM c') for @readers;
	$node->safe_psql('postgres', 'SELECT pg_terminate_backend(' . $readers[$_]->query('SELECT pg_backend_pid()') . ')') for 0 .. 2;
	is($node->safe_psql('postgres', 'SELECT count(*), sum(length(v)), sum(hashtext(v::text)::bigint) FROM big'), $sum, "large values, $state");
	like($readers[$_]->query('MOVE ALL FROM c'), qr/^(MOVE 97)?$/, 'the other readers go on') for 3 .. 5;
	eval { $_->quit } for @readers;
}
is($node->safe_psql('postgres', "SELECT sum(length(context_id)) FROM event_store.read_all(store => 'big')"), '200', 'large values in order');
$node->stop;
done_testing();
