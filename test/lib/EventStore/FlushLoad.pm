# What the tests of flushes share: two event tables and a heap table that says what must be in them, transactions whose rows
# are spilled, rolled back to savepoints and carried, and the comparison.

package EventStore::FlushLoad;

use strict;
use warnings;
use EventStore::Server qw(new_server sql);
use Exporter 'import';
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

our @EXPORT_OK = qw(flush_server work wrong consistent flush scripts);

# Spills, flushes and changes of WAL files with as few rows as the settings allow.
sub flush_server
{
	my ($name, @conf) = @_;
	my $node = new_server($name, 'event_store.shards = 2', 'event_store.spill_after = 64kB', 'event_store.memtable_size = 1MB',
		'event_store.wal_file_size = 1MB', 'autovacuum = off', 'max_wal_senders = 4', 'min_wal_size = 32MB', 'max_wal_size = 48MB',
		'wal_keep_size = 0', @conf);

	$node->safe_psql('postgres', <<'SQL');
ALTER DATABASE postgres SET search_path = public, event_store_test;
CREATE TABLE plain (position bigint, context_id text, n int, filler text) USING event_store;
CREATE TABLE versioned (position bigint, context_id text, version bigint, n int) USING event_store;
CREATE TABLE heap (kind text, context_id text, n int);
-- Waits until the transaction has spilled and nothing more of it goes to pending segments: what is below spill_after stays.
CREATE FUNCTION spilled() RETURNS void LANGUAGE plpgsql AS $$
DECLARE
	before text := '';
	now text;
BEGIN
	PERFORM count(*) FROM plain WHERE context_id = '';	-- sends what is pending
	PERFORM count(*) FROM versioned WHERE context_id = '';
	FOR i IN 1 .. 80 LOOP
		SELECT string_agg(staged_rows || ' ' || pending_segments, ' ' ORDER BY shard) INTO now FROM event_store.stat_shards;
		EXIT WHEN now = before AND (SELECT min(pending_segments) > 0 FROM event_store.stat_shards);
		before := now;
		PERFORM pg_sleep(0.05);
	END LOOP;
END $$;
SQL
	return $node;
}

# What is in the event tables is what is in the heap table; versions have no gap and agree with positions. One statement, so
# that it is right to ask it at any time. '' = nothing is wrong.
sub wrong
{
	my ($node) = @_;
	return $node->safe_psql('postgres', <<'SQL');
SELECT 'plain differs: ' || (SELECT count(*) FROM plain) || ' <> ' || (SELECT count(*) FROM heap WHERE kind = 'plain')
WHERE (SELECT (count(*), count(DISTINCT position), sum(hashtext(context_id || n)::bigint))::text FROM plain)
   <> (SELECT (count(*), count(*), sum(hashtext(context_id || n)::bigint))::text FROM heap WHERE kind = 'plain')
UNION ALL
SELECT 'versioned differs: ' || (SELECT count(*) FROM versioned) || ' <> ' || (SELECT count(*) FROM heap WHERE kind = 'versioned')
WHERE (SELECT (count(*), count(DISTINCT position), sum(hashtext(context_id || n)::bigint))::text FROM versioned)
   <> (SELECT (count(*), count(*), sum(hashtext(context_id || n)::bigint))::text FROM heap WHERE kind = 'versioned')
UNION ALL
SELECT 'gap in ' || context_id FROM versioned GROUP BY context_id
HAVING count(*) <> max(version) OR min(version) <> 1 OR count(DISTINCT version) <> count(*)
UNION ALL
SELECT 'order in ' || context_id FROM (SELECT context_id, version,
	row_number() OVER (PARTITION BY context_id ORDER BY position) AS rank FROM versioned) x
WHERE version <> rank
UNION ALL
SELECT 'no position' FROM plain WHERE position IS NULL
SQL
}

# Shows what is behind a complaint: the contexts, row by row.
sub show
{
	my ($node, $wrong) = @_;
	my %contexts = map { $_ => 1 } $wrong =~ /^(?:gap|order) in (.+)$/mg;

	foreach my $context ((sort keys %contexts)[ 0 .. 2 ])
	{
		next unless defined $context;
		diag("versioned '$context': (position, version, n) and, at '<', the places where something is wrong:\n"
			  . sql($node, "SELECT position, version, n, CASE WHEN version <> rank THEN '<' ELSE '' END FROM (SELECT position, version, n, "
				  . "row_number() OVER (ORDER BY position) AS rank FROM versioned WHERE context_id = '$context') x ORDER BY position LIMIT 400"));
	}
	foreach my $table (qw(plain versioned))
	{
		next unless $wrong =~ /^$table differs/m;
		diag("$table: what only the heap has, what only the event table has (context_id, n, how often):\n" . sql($node, <<"SQL"));
(SELECT 'missing', context_id, n, count(*) FROM (SELECT context_id, n FROM heap WHERE kind = '$table' EXCEPT ALL SELECT context_id, n FROM $table) x GROUP BY 2, 3 LIMIT 50)
UNION ALL
(SELECT 'too many', context_id, n, count(*) FROM (SELECT context_id, n FROM $table EXCEPT ALL SELECT context_id, n FROM heap WHERE kind = '$table') x GROUP BY 2, 3 LIMIT 50)
UNION ALL
(SELECT 'position twice', context_id, n, position FROM $table WHERE position IN (SELECT position FROM $table GROUP BY 1 HAVING count(*) > 1) LIMIT 50)
SQL
	}
	return;
}

sub consistent
{
	my ($node, $name) = @_;
	my $wrong = wrong($node);

	is($wrong, '', "$name: all that was committed is there, once and in order") or show($node, $wrong);
	return $wrong eq '';
}

sub flush
{
	my ($node) = @_;
	return $node->safe_psql('postgres', 'SELECT event_store.flush()');
}

# A transaction with rows of both tables, some of them rolled back, $rows in all; it is left open. From 2000 rows on they spill.
sub work
{
	my ($name, $rows) = @_;
	my $contexts = 13;
	my $wait = $rows >= 2000 ? 'SELECT spilled();' : '';
	return <<"SQL";
BEGIN;
INSERT INTO plain SELECT NULL, '$name' || g % $contexts, g, repeat('x', 60) FROM generate_series(1, $rows) g;
INSERT INTO heap SELECT 'plain', '$name' || g % $contexts, g FROM generate_series(1, $rows) g;
SAVEPOINT s;
INSERT INTO plain SELECT NULL, '$name' || g % $contexts, g, repeat('y', 60) FROM generate_series(1, $rows) g;
INSERT INTO versioned (context_id, n) SELECT 'c' || g % $contexts, g FROM generate_series(1, $rows) g;
ROLLBACK TO s;
INSERT INTO versioned (context_id, n) SELECT 'c' || g % $contexts, g FROM generate_series(1, $rows) g;
INSERT INTO heap SELECT 'versioned', 'c' || g % $contexts, g FROM generate_series(1, $rows) g;
$wait
SQL
}

# pgbench scripts: (small transactions, a flush).
sub scripts
{
	my ($node) = @_;
	my $load = $node->basedir . '/load.sql';
	my $flush = $node->basedir . '/flush.sql';

	append_to_file($load, <<'SQL');
\set c random(1, 50)
\set n random(1, 1000000)
\set m random(1, 200)
BEGIN;
INSERT INTO plain SELECT NULL, 'l' || :c, :n + g, 'load' FROM generate_series(1, :m) g;
INSERT INTO heap SELECT 'plain', 'l' || :c, :n + g FROM generate_series(1, :m) g;
INSERT INTO versioned (context_id, n) VALUES ('l' || :c, :n);
INSERT INTO heap VALUES ('versioned', 'l' || :c, :n);
COMMIT;
SQL
	append_to_file($flush, "SELECT event_store.flush();\n");
	return ($load, $flush);
}

1;
