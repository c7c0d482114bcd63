# A shard's filters leave exactly the rows for which all conditions are true, in any order of answers, with any bounds on
# positions, limits and answer sizes; positions come in the order that was asked for; zones that cannot have a row are
# not looked at.

use strict;
use warnings;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $rounds = $ENV{ES_READ_ROUNDS} || 150;
my $seed   = $ENV{ES_SEED}        || time();
srand($seed);
note("ES_SEED=$seed");

my $node = PostgreSQL::Test::Cluster->new('filters');
$node->init;
$node->append_conf('postgresql.conf', <<CONF);
shared_preload_libraries = 'event_store'
wal_level = replica
fsync = off
event_store.shards = 2
event_store.memtable_size = '8MB'
event_store.spill_after = '256kB'
event_store.segment_rows = 20000
event_store.cache_size = '4MB'
max_worker_processes = 16
CONF
$node->start;
$node->safe_psql('postgres', <<'SQL');
CREATE SCHEMA event_store_test;
CREATE EXTENSION event_store;
CREATE EXTENSION event_store_test SCHEMA event_store_test;
CREATE TABLE f (context_id text, position bigint, version bigint, s int2, i int4, b int8, t timestamptz, d date, o bool, x text, u uuid, w varchar) USING event_store;
CREATE FUNCTION fill(n int) RETURNS void LANGUAGE sql AS $$
	INSERT INTO f (context_id, s, i, b, t, d, o, x, u, w)
	SELECT 'c' || (random() * 50)::int, CASE WHEN random() < 0.9 THEN (random() * 100)::int - 50 END,
		CASE WHEN random() < 0.9 THEN g END, CASE WHEN random() < 0.9 THEN (random() * 10)::int * 10000000000 END,
		'2020-01-01'::timestamptz + g * interval '1 second', '2020-01-01'::date + g / 1000,
		CASE WHEN random() < 0.9 THEN random() < 0.5 END, CASE WHEN random() < 0.9 THEN 'x' || (random() * 5)::int END,
		('00000000-0000-0000-0000-00000000000' || (random() * 7)::int)::uuid, repeat('w', (random() * 60)::int)
	FROM generate_series(1, n) g $$;
SELECT fill(30000);                       -- adopted from pending segments
SELECT event_store.flush();
SELECT fill(1000) FROM generate_series(1, 12);
SELECT event_store.flush();
ALTER TABLE f ADD COLUMN later int;
SELECT fill(700) FROM generate_series(1, 5);
SQL

# column number, its name, kind, how to make a literal for the filter and for SQL
my %columns = (
	s  => [ 4,  'i', sub { int(rand(100)) - 50 } ],
	i  => [ 5,  'i', sub { int(rand(30000)) } ],
	b  => [ 6,  'i', sub { int(rand(11)) * 10000000000 } ],
	t  => [ 7,  'i', sub { int(rand(30000)) } ],
	d  => [ 8,  'i', sub { int(rand(30)) } ],
	o  => [ 9,  'i', sub { int(rand(2)) } ],
	x  => [ 10, 'b', sub { 'x' . int(rand(7)) } ],
	u  => [ 11, 'b', sub { '0' x 31 . int(rand(8)) } ],
	w  => [ 12, 'b', sub { 'w' x int(rand(60)) } ],
	context_id => [ 1, 'b', sub { 'c' . int(rand(52)) } ],
	later    => [ 13, 'i', sub { 1 } ],
	position => [ 2, 'i', sub { 1 + int(rand(46000)) } ],
	version  => [ 3, 'i', sub { 1 + int(rand(900)) } ]);
my %sql_op = (eq => '=', lt => '<', le => '<=', gt => '>', ge => '>=');

sub literals
{
	my ($c, $v) = @_;

	return ($v, "$v") if $c =~ /^(s|i|b|later|position|version)$/;
	# 2020-01-01 is 631152000 s and 7305 days after 2000-01-01 (UTC)
	return (($v + 631152000) * 1000000, "'2020-01-01 00:00:00+00'::timestamptz + $v * interval '1 second'") if $c eq 't';
	return ($v + 7305, "'2020-01-01'::date + $v") if $c eq 'd';
	return ($v, $v ? 'true' : 'false') if $c eq 'o';
	return ($v, "'$v'::uuid") if $c eq 'u';
	return (length($v) ? unpack('H*', $v) : '-', "'$v'");
}

sub condition
{
	my $c = (sort keys %columns)[ int(rand(keys %columns)) ];
	my ($number, $kind, $make) = @{ $columns{$c} };
	my $r = rand();

	return ("$number isnull $kind",  "$c IS NULL")     if $r < 0.07;
	return ("$number notnull $kind", "$c IS NOT NULL") if $r < 0.15;
	if ($r < 0.35)
	{
		my @v = map { [ literals($c, $make->()) ] } 1 .. int(rand(12)) + 1;

		return ("$number in $kind " . join(' ', map { $_->[0] } @v), "$c IN (" . join(', ', map { $_->[1] } @v) . ')');
	}
	my ($f, $s) = literals($c, $make->());
	my $op = $kind eq 'b' ? 'eq' : (sort keys %sql_op)[ int(rand(5)) ];

	return ("$number $op $kind $f", "$c $sql_op{$op} $s");
}

my $wrong = 0;
my $psql  = $node->background_psql('postgres', on_error_stop => 0);

sub one
{
	my ($own) = @_;
	my @c     = map { [ condition() ] } 1 .. int(rand(3)) + (rand() < 0.3 ? 0 : 1);
	my $order = (qw(any asc desc))[ int(rand(3)) ];
	my $after = rand() < 0.3 ? int(rand(46000)) : 0;
	my $below = rand() < 0.3 ? 1 + int(rand(50000)) : 0;
	my $max   = rand() < 0.3 ? 1 + int(rand(300)) : 0;
	my $bytes = (0, 1, 500, 20000, 1000000)[ int(rand(5)) ];
	my $ctx   = rand() < 0.3 ? 'c' . int(rand(52)) : undef;
	my $count = rand() < 0.2 ? 'true' : 'false';
	my $wanted = (('NULL', "'{}'", "'{5}'", "'{2,3}'", "'{1,2,3,4,5,6,7,8,9,10,11,12,13}'")[ int(rand(5)) ]);
	my $f = join(',', map { "\"$_->[0]\"" } @c);
	my $where = join(' AND ', map { "($_->[1])" } @c, ['', defined $ctx ? "context_id = '$ctx'" : 'true']);
	my $context = defined $ctx ? "'$ctx'" : 'NULL';
	my $args = "'f', '{$f}', '$order', $after, $below, %d, $context, $bytes, $wanted, $count";
	my $committed = "position > $after" . ($below ? " AND position < $below" : '');
	my $ownrows   = $below ? 'false' : 'position IS NULL';
	my $query;

	if ($count eq 'true')
	{
		$query = sprintf("SELECT a.rows, b.n FROM event_store_test.scan_stats($args) a, ", 0)
		  . "(SELECT count(*) AS n FROM f WHERE $where AND ($committed OR $ownrows)) b WHERE a.rows <> b.n";
	}
	else
	{
		# all of them
		$query = sprintf("WITH a AS MATERIALIZED (SELECT row_number() OVER () AS r, * FROM event_store_test.scan($args)), ", 0)
		  . "b AS MATERIALIZED (SELECT position FROM f WHERE $where AND ($committed OR $ownrows)), "
		  # and the first ones of each shard
		  . sprintf("c AS MATERIALIZED (SELECT row_number() OVER () AS r, * FROM event_store_test.scan($args)) ", $max)
		  . "SELECT 'rows ' || (SELECT count(*) FROM a) || ' of ' || (SELECT count(*) FROM b) WHERE (SELECT ROW(count(*), sum(position)) FROM a WHERE NOT own) IS DISTINCT FROM (SELECT ROW(count(*), sum(position)) FROM b WHERE position IS NOT NULL) "
		  . "UNION ALL SELECT 'own rows' WHERE (SELECT count(*) FROM a WHERE own) <> (SELECT count(*) FROM b WHERE position IS NULL) "
		  . "UNION ALL SELECT 'not all of the first $max: ' || (SELECT count(*) FROM c) WHERE $max > 0 AND (SELECT count(*) FROM c) < least($max, (SELECT count(*) FROM a))";
		if ($order ne 'any')
		{
			my $less = $order eq 'asc' ? '<' : '>';

			# one shard behind the other: one descent per shard at most, and between own and committed rows
			$query .= " UNION ALL SELECT 'order' WHERE (SELECT count(*) FROM (SELECT position $less lag(position) OVER (ORDER BY r) AS wrong, own, lag(own) OVER (ORDER BY r) AS last_own FROM a) x WHERE wrong AND own = last_own) > 1";
		}
	}
	$query =~ s/position > 0 AND/position > 0 AND/g;
	my $out = $psql->query($query);
	my $err = $psql->{stderr};
	$psql->{stderr} = '';
	if ($out ne '' || $err =~ /ERROR/)
	{
		diag("$query\n-> $out $err");
		$wrong++;
	}
	return;
}

for my $round (1 .. $rounds)
{
	last if $wrong > 3;
	one(0);
}
is($wrong, 0, 'committed rows');

# own rows: staged, in a pending segment, of a savepoint that was rolled back
$psql->query('BEGIN');
$psql->query('SELECT fill(2000)');
$psql->query('SAVEPOINT a; SELECT fill(3000); ROLLBACK TO a');
$psql->query('SELECT fill(1500)');
$psql->query('SELECT fill(30)');
for my $round (1 .. $rounds)
{
	last if $wrong > 3;
	one(1);
}
is($wrong, 0, 'own rows');
$psql->query('COMMIT');
for my $round (1 .. $rounds / 3)
{
	last if $wrong > 3;
	one(0);
}
is($wrong, 0, 'after the commit');
$psql->quit;

# pruning by zones: i ascends with the position in each load, but rows are sorted by context; d, t the same; positions
# prune by segment
my ($rows, $scanned, $pruned) = split /\|/, $node->safe_psql('postgres', q{SELECT event_store.flush()}) ? ('', '', '') : (0, 0, 0);
my $stats = $node->safe_psql('postgres', q{SELECT rows, scanned, pruned FROM event_store_test.scan_stats('f', '{"5 gt i 100000"}')});
($rows, $scanned, $pruned) = split /\|/, $stats;
is("$rows $scanned", '0 0', 'no zone has it');
cmp_ok($pruned, '>', 40000, 'all rows are left out');
$stats = $node->safe_psql('postgres', q{SELECT rows, scanned FROM event_store_test.scan_stats('f', after => (SELECT max(position) - 100 FROM f))});
($rows, $scanned) = split /\|/, $stats;
is($rows, 100, 'the last hundred');
cmp_ok($scanned, '<', 20000, 'older segments are left out');
$stats = $node->safe_psql('postgres', q{SELECT rows, scanned, answers FROM event_store_test.scan_stats('f', count_only => true)});
is($stats =~ s/\|.*//r, $node->safe_psql('postgres', 'SELECT count(*) FROM f'), 'count only');
$node->stop;
done_testing();
