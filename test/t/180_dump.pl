# pg_dump | psql gives back the same positions and versions, by COPY and, in one transaction, by INSERT; what comes next has the
# next version and a position behind all. A store that was stopped cleanly replays nothing.

use strict;
use warnings;
use EventStore::Server qw(new_server wait_open sql try_sql log_offset server_log_since crash_restart);
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('dump', 'event_store.shards = 2');
my $schema = <<'SQL';
CREATE TABLE ev (position bigint, context_id text, version bigint, event_id uuid, event_type text, at timestamptz, v jsonb) USING event_store;
CREATE TABLE plain (n int, context_id int, v text, a int[]) USING event_store;
CREATE TABLE parts (context_id int, position bigint, n int) PARTITION BY LIST (context_id);
CREATE TABLE part0 PARTITION OF parts FOR VALUES IN (0, 1, 2) USING event_store;
CREATE TABLE part1 PARTITION OF parts FOR VALUES IN (3, 4) USING event_store;
CREATE TABLE hp (n int);
SQL
sql($node, $schema);
sql($node, <<'SQL');
INSERT INTO ev (context_id, event_type, event_id, at, v) SELECT 'c' || g % 50, 't' || g % 3, md5(g::text)::uuid, '2024-01-01'::timestamptz + g * interval '1 s', jsonb_build_object('n', g, 'o', E'it''s "\\x"\n') FROM generate_series(1, 3000) g;
INSERT INTO plain SELECT g, g % 20, CASE WHEN g % 7 > 0 THEN repeat('x', g % 100) || E'\t\n\\' END, ARRAY[g, NULL, -g] FROM generate_series(1, 2000) g;
INSERT INTO parts (context_id, n) SELECT g % 5, g FROM generate_series(1, 500) g;
SELECT event_store.flush();
INSERT INTO ev (context_id, event_type, v) SELECT 'c' || g % 60, 'later', '{}' FROM generate_series(1, 700) g;
INSERT INTO parts (context_id, n) SELECT g % 5, -g FROM generate_series(1, 50) g;
SELECT count(event_store.append('order-' || g % 30, 'placed', jsonb_build_object('n', g), event_id => md5(g::text)::uuid, metadata => '{"who": "me"}')) FROM generate_series(1, 900) g;
SQL

# What there is, in words, so that two databases can be compared.
my %contents = (
	ev => 'SELECT * FROM ev ORDER BY position',
	plain => 'SELECT * FROM plain ORDER BY n',
	parts => 'SELECT tableoid::regclass, * FROM parts ORDER BY position',
	events => 'SELECT * FROM event_store.events ORDER BY position');

sub contents
{
	my ($database, $name) = @_;
	return sql($node, $contents{$name}, $database);
}

sub tells { my ($n) = @_; return scalar(my @lines = split /\n/, $n); }

foreach my $way ([ 'COPY', [], [] ], [ '--inserts in one transaction', ['--inserts'], ['-1'] ],
	[ '--column-inserts with --rows-per-insert', [ '--column-inserts', '--rows-per-insert=100' ], ['-1'] ])
{
	my ($name, $dump, $restore) = @$way;
	my $database = 'restored' . ($restore->[0] // '') . scalar(@$dump);
	$database =~ tr/-//d;
	my $file = PostgreSQL::Test::Utils::tempdir() . "/$database.sql";

	$node->command_ok([ 'pg_dump', '-d', $node->connstr('postgres'), @$dump, '-f', $file ], "pg_dump, $name");
	sql($node, "CREATE DATABASE $database");
	my ($out, $err) = ('', '');
	my $ok = IPC::Run::run([ 'psql', '-XAtq', '-v', 'ON_ERROR_STOP=1', @$restore, '-d', $node->connstr($database), '-f', $file ],
		'<', \'', '>', \$out, '2>', \$err, IPC::Run::timeout(600));
	ok($ok, "psql, $name") or diag($err);
	foreach my $table (sort keys %contents)
	{
		my ($was, $is) = (contents('postgres', $table), contents($database, $table));
		ok($was eq $is && $was ne '', "$name: $table is the same, " . tells($was) . ' rows with positions and versions') or diag(substr($is, 0, 300));
	}
	is( sql($node, q{SELECT string_agg(amname, ',') FROM (SELECT DISTINCT amname FROM pg_class c JOIN pg_am a ON a.oid = relam WHERE relname IN ('ev', 'plain', 'part0', 'part1')) x}, $database),
		'event_store', "$name: in the same kind of tables");

	# what comes next
	my $last = sql($node, 'SELECT greatest((SELECT max(position) FROM ev), (SELECT max(position) FROM event_store.events), (SELECT max(position) FROM parts))', $database);
	is( sql($node, "INSERT INTO ev (context_id) VALUES ('c7'), ('new'); SELECT string_agg(context_id || version, ',' ORDER BY position), min(position) > $last FROM ev WHERE position > $last", $database),
		'c7' . (sql($node, q{SELECT max(version) FROM ev WHERE context_id = 'c7'}) + 1) . ',new1|t', "$name: the next version and a position behind all");
	is( sql($node, q{SELECT version, outcome FROM event_store.append('order-5', 'placed', '{}')}, $database), '31|appended', "$name: append gives the next version");
	is( sql($node, q{SELECT version, outcome FROM event_store.append('order-5', 'placed', '{"n": 5}', event_id => md5('5')::uuid, metadata => '{"who": "me"}')}, $database),
		'1|already_there', "$name: event ids are known");
	is( sql($node, 'SELECT event_store.horizon(\'ev\') > max(position) FROM ev', $database), 't', "$name: the horizon is above");
	is( sql($node, q{SELECT string_agg(version::text, ',') FROM event_store.replay('order-7')}, $database), join(',', 1 .. 30), "$name: replay");
	# and the same after a crash
	my $before = contents($database, 'ev');
	crash_restart($node);
	is(contents($database, 'ev'), $before, "$name: after a crash");
	sql($node, "DROP DATABASE $database");
}

# ---- a clean stop leaves nothing to replay

foreach my $flushed (0, 1)
{
	foreach my $mode ('fast', 'smart')
	{
		my $name = "$mode stop" . ($flushed ? ', all in segments' : ', rows in memory');
		sql($node, q{INSERT INTO ev (context_id) SELECT 'c' || g FROM generate_series(1, 100) g});
		sql($node, q{SET synchronous_commit = off; INSERT INTO plain SELECT g, g FROM generate_series(1, 100) g});
		sql($node, 'SELECT event_store.flush()') if $flushed;
		my $before = contents('postgres', 'ev');
		my $offset = log_offset($node);
		$node->stop($mode);
		$node->start;
		ok(wait_open($node), "$name: open");
		my $log = server_log_since($node, $offset);
		my @opened = $log =~ /event_store shard (\d+) is open\n.*DETAIL:  (.*)\n/g;
		is(scalar(@opened), 4, "$name: both shards say so");
		while (my ($shard, $detail) = splice(@opened, 0, 2))
		{
			my ($done, $of, $from, $to, $rows) = $detail =~ /(\d+) of (\d+) FINISH frames; PostgreSQL's WAL: (\S+) to (\S+); rows in memory: (\d+)/;
			is($from, $to, "$name: shard $shard reads nothing of PostgreSQL's WAL");
			is($done, $of, "$name: shard $shard knows all that its own log holds");
			is($rows, 0, "$name: shard $shard has nothing in memory") if $flushed;
		}
		is(contents('postgres', 'ev'), $before, "$name: all is there");
	}
}
# an immediate stop shows that the line would tell
sql($node, q{INSERT INTO ev (context_id) SELECT 'c' || g FROM generate_series(1, 100) g});
my $offset = log_offset($node);
$node->stop('immediate');
$node->start;
ok(wait_open($node), 'immediate stop: open');
my @ranges = server_log_since($node, $offset) =~ /PostgreSQL's WAL: (\S+ to \S+);/g;
ok(scalar(grep { !/^(\S+) to \1$/ } @ranges), 'immediate stop: PostgreSQL\'s WAL is read: ' . join(', ', @ranges));
$node->stop;
done_testing();
