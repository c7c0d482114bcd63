# Who saw a commit sees its events: a shard acts on a request only after everything that was sent before it,
# by whomever and wherever in the ready bitmap (PROTOCOL.md 2.3). And of two transactions that append to one
# context, the one that commits first has the lower versions, whatever the bitmap shows first.

use strict;
use warnings;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = PostgreSQL::Test::Cluster->new('order');
$node->init;
$node->append_conf('postgresql.conf', <<CONF);
shared_preload_libraries = 'event_store'
wal_level = replica
event_store.shards = 1
max_worker_processes = 16
max_connections = 70
CONF
$node->start;
$node->safe_psql('postgres', <<'SQL');
CREATE SCHEMA event_store_test;
CREATE EXTENSION event_store_test;
CREATE EXTENSION event_store;
CREATE TABLE ev (context_id text, n integer) USING event_store;
CREATE TABLE numbered (position bigint, context_id text, version bigint, n integer) USING event_store;
SQL
if ($node->safe_psql('postgres', 'SELECT event_store_test.fault_points_compiled()') eq 'f')
{
	plan skip_all => 'needs fault points';
}

# ---- by the letter: a writer whose bit is in the first word of the bitmap, a reader whose bit is in the second

# The number of a session is that of its PGPROC; versions differ in the order in which they are given out.
my (@sessions, $writer, $reader);
while (!($writer && $reader) && @sessions < 68)
{
	my $s = $node->background_psql('postgres');

	push @sessions, $s;
	# a channel and all caches, so that nothing else is asked of the shard later
	$s->query_safe("INSERT INTO ev VALUES ('warm', 0)");
	$s->query_safe("INSERT INTO numbered (context_id, n) VALUES ('warm', 0)");
	$s->query_safe("SELECT count(*) FROM ev WHERE context_id = 'a'");
	my $slot = $s->query_safe('SELECT slot FROM event_store_test.channel(0)');
	$writer //= $s if $slot < 64;
	$reader //= $s if $slot >= 64;
}
ok($writer && $reader, 'sessions in both words');
my $other = $node->background_psql('postgres');
$other->query_safe('SELECT event_store_test.echo(0, 1)');

for my $i (1 .. 5)
{
	$node->safe_psql('postgres', "SELECT event_store_test.inject_fault('server-between-words', 'sleep')");
	$other->query_until(qr/begin/, "\\echo begin\nSELECT event_store_test.echo(0, 1);\n\\echo end\n");
	ok($node->poll_query_until('postgres', "SELECT event_store_test.fault_hits('server-between-words') = 1"),
		'the shard has taken the first word');
	$writer->query_safe("INSERT INTO ev VALUES ('a', $i)");
	$reader->query_until(qr/begin/, "\\echo begin\nSELECT 'rows: ' || count(*) FROM ev WHERE context_id = 'a';\n\\echo end\n");
	select(undef, undef, undef, 0.2);
	$node->safe_psql('postgres', 'SELECT event_store_test.disarm_faults()');
	like($reader->query_until(qr/end/, ''), qr/rows: $i\n/, 'the reader has the rows that were committed before he asked');
	$other->query_until(qr/end/, '');
}

# The shard has taken the word with the first writer's bit; both commit; it finds the second one's FINISH alone.
for my $i (1 .. 5)
{
	$node->safe_psql('postgres', "SELECT event_store_test.inject_fault('server-between-words', 'sleep')");
	$other->query_until(qr/begin/, "\\echo begin\nSELECT event_store_test.echo(0, 1);\n\\echo end\n");
	ok($node->poll_query_until('postgres', "SELECT event_store_test.fault_hits('server-between-words') = 1"),
		'the shard has taken the first word');
	$writer->query_safe("INSERT INTO numbered (context_id, n) VALUES ('a', 2 * $i)");
	$reader->query_safe("INSERT INTO numbered (context_id, n) VALUES ('a', 2 * $i + 1)");
	$node->safe_psql('postgres', 'SELECT event_store_test.disarm_faults()');
	$other->query_until(qr/end/, '');
	is($other->query_safe("SELECT string_agg(n::text, ' ' ORDER BY version) FROM numbered WHERE context_id = 'a' AND n >= 2 * $i"),
		2 * $i . ' ' . (2 * $i + 1), 'versions in the order of commits');
}
is($other->query_safe("SELECT count(*) FROM (SELECT version, row_number() OVER (ORDER BY position) AS rank FROM numbered WHERE context_id = 'a') x WHERE version <> rank"),
	'0', 'and of positions');
$_->quit for @sessions, $other;
# room for the next 66: a session is not over when its psql is
ok($node->poll_query_until('postgres', q{SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'client backend'}), 'all are gone');

# ---- by chance: in one snapshot, a heap row and the event of the same transaction are both there or both not

$node->safe_psql('postgres', <<'SQL');
CREATE TABLE heap (c text);
CREATE INDEX ON heap (c);
CREATE TABLE differ (what text, heap bigint, events bigint);
CREATE TABLE ev2 (position bigint, context_id text, version bigint) USING event_store;
SQL
my $dir = PostgreSQL::Test::Utils::tempdir();
append_to_file("$dir/write.sql", <<'SQL');
\set c random(1, 8)
BEGIN;
INSERT INTO heap VALUES (:c);
INSERT INTO ev2 (context_id) VALUES (:c);
COMMIT;
SQL
append_to_file("$dir/one.sql", <<'SQL');
\set c random(1, 8)
INSERT INTO differ SELECT 'context', h, e
FROM (SELECT (SELECT count(*) FROM heap WHERE c = :c::text) AS h,
	(SELECT count(*) FROM ev2 WHERE context_id = :c::text) AS e OFFSET 0) x
WHERE h <> e;
SQL
append_to_file("$dir/all.sql", <<'SQL');
INSERT INTO differ SELECT 'all', h, e
FROM (SELECT (SELECT count(*) FROM heap) AS h, (SELECT count(*) FROM ev2) AS e OFFSET 0) x
WHERE h <> e;
SQL
my $seconds = $ENV{ES_LONG} ? 120 : 10;
$node->command_ok(
	[
		'pgbench', '-n', '-c', '66', '-j', '2', '-T', $seconds, '-f', "$dir/write.sql\@6", '-f', "$dir/one.sql\@6",
		'-f', "$dir/all.sql\@1", 'postgres'
	],
	'writers and readers');
is($node->safe_psql('postgres', 'SELECT what, count(*), min(heap - events), max(heap - events) FROM differ GROUP BY 1'),
	'', 'they never differ');
is( $node->safe_psql('postgres', 'SELECT count(*) - (SELECT count(*) FROM ev2) FROM heap'),
	'0', 'also at the end');
is( $node->safe_psql('postgres', 'SELECT count(*) - count(DISTINCT (context_id, version)), count(*) - count(DISTINCT position) FROM ev2'),
	'0|0', 'versions and positions are unique');

$node->stop;
done_testing();
