# Storages that no table has any more leave the shards, and no other does.

use strict;
use warnings;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep);

my $node = PostgreSQL::Test::Cluster->new('collect');
$node->init;
$node->append_conf('postgresql.conf', <<'CONF');
shared_preload_libraries = 'event_store'
wal_level = replica
event_store.shards = 2
event_store.spill_after = 256kB
max_worker_processes = 16
max_prepared_transactions = 4
autovacuum = off
CONF
$node->start;
my $space = $node->basedir . '/space';
mkdir($space);

$node->safe_psql('postgres', <<"SQL");
CREATE EXTENSION event_store;
CREATE TABLESPACE other LOCATION '$space';
CREATE DATABASE other;
SQL
$node->safe_psql('other', 'CREATE EXTENSION event_store');

# Live segments of all shards, and files of segments on the disk.
sub segments { return $node->safe_psql('postgres', 'SELECT sum(segments) FROM event_store.stat_shards'); }
sub files { my @f = glob($node->data_dir . '/event_store/shard_*/seg.*'); return scalar(@f); }

my $faults = $node->safe_psql('postgres', 'CREATE SCHEMA event_store_test; CREATE EXTENSION event_store_test; SELECT event_store_test.fault_points_compiled()') eq 't';

sub fill
{
	my ($database, $table, $rows) = @_;
	$node->safe_psql($database, <<"SQL");
CREATE TABLE IF NOT EXISTS $table (position bigint, context_id text, n int) USING event_store;
INSERT INTO $table SELECT NULL, 'c' || g % 10, g FROM generate_series(1, $rows) g;
SELECT event_store.flush();
SQL
	return;
}

sub goes_to
{
	my ($wanted, $name) = @_;
	ok($node->poll_query_until('postgres', "SELECT sum(segments) = $wanted FROM event_store.stat_shards"), $name)
	  or diag('segments: ' . segments());
	foreach (1 .. 600)
	{
		last if files() == $wanted;
		sleep 0.2;
	}
	is(files(), $wanted, "$name: and their files");
	return;
}

fill('postgres', 'kept', 100);
fill('postgres', 'moved', 100);
fill('postgres', 'dropped', 100);
fill('postgres', 'truncated', 100);
fill('other', 'kept', 100);
my $all = segments();
is($all, 10, 'each table has a segment in each shard');

# Rolled back, nothing goes; a table that is locked is no reason to believe it gone.
$node->safe_psql('postgres', 'BEGIN; DROP TABLE dropped; TRUNCATE truncated; ROLLBACK');
$node->safe_psql('postgres', 'ALTER TABLE moved SET TABLESPACE other');
# the collector has looked when a table beside them is gone
fill('postgres', 'beside', 100);
$node->safe_psql('postgres', 'DROP TABLE beside');
goes_to($all, 'nothing else is collected after a rollback and SET TABLESPACE');
is($node->safe_psql('postgres', 'SELECT (SELECT count(*) FROM moved), (SELECT count(*) FROM dropped)'), '100|100',
	'all rows are there');

$node->safe_psql('postgres', 'DROP TABLE dropped');
goes_to($all - 2, 'DROP');
$node->safe_psql('postgres', 'TRUNCATE truncated');
goes_to($all - 4, 'TRUNCATE');
$node->safe_psql('postgres', 'ALTER TABLE moved ALTER n TYPE bigint');
$node->safe_psql('postgres', 'SELECT event_store.flush()');
goes_to($all - 4, 'a rewrite leaves the new segments only');
is($node->safe_psql('postgres', 'SELECT count(*) FROM moved'), '100', 'and all rows');

# A table of a transaction that was rolled back, spilled and committed rows of a dropped one.
$node->safe_psql('postgres', <<'SQL');
BEGIN;
CREATE TABLE never (context_id text, n int) USING event_store;
INSERT INTO never SELECT 'c' || g % 100, g FROM generate_series(1, 50000) g;
ROLLBACK;
BEGIN;
CREATE TABLE soon (context_id text, n int) USING event_store;
INSERT INTO soon SELECT 'c' || g % 100, g FROM generate_series(1, 50000) g;
COMMIT;
SELECT event_store.flush();
DROP TABLE soon;
SQL
goes_to($all - 4, 'tables that came and went');

# A snapshot that is older than the look holds everything up.
my $old = $node->background_psql('postgres', on_error_stop => 0);
$old->query_safe('BEGIN ISOLATION LEVEL REPEATABLE READ');
$old->query_safe('SELECT count(*) FROM kept');
fill('postgres', 'held', 10);
# no kill: only its hits count
$node->safe_psql('postgres', "SELECT event_store_test.inject_fault('collect-' || p, 'kill', 1000000) FROM unnest(ARRAY['between-looks', 'before-drop']) p") if $faults;
$node->safe_psql('postgres', 'DROP TABLE held');
SKIP:
{
	skip 'no fault points in this build', 2 unless $faults;
	ok($node->poll_query_until('postgres', "SELECT event_store_test.fault_hits('collect-between-looks') > 0"), 'a collector has looked once');
	# it asks each second whether it may look again
	sleep 3;
	is($node->safe_psql('postgres', "SELECT event_store_test.fault_hits('collect-before-drop')"), '0', 'and waits');
}
is(segments(), $all - 2, 'nothing is collected while a snapshot is older');
$old->query_safe('COMMIT');
goes_to($all - 4, 'it is when that has ended');

# A lock on one table: the look at its database says nothing at all; that at another one does, when the transaction
# that holds the lock is over.
fill('postgres', 'held', 10);
fill('other', 'beside', 10);
my $there = $node->background_psql('other', on_error_stop => 0);
$there->query_safe('SELECT 1');
$old->query_safe('BEGIN');
$old->query_safe('LOCK TABLE kept IN ACCESS EXCLUSIVE MODE');
$node->safe_psql('postgres', "SELECT event_store_test.inject_fault('collect-between-looks', 'kill', 1000000)") if $faults;
my $offset = -s $node->logfile;
$there->query_safe('DROP TABLE beside');
$node->safe_psql('postgres', 'DROP TABLE held');
$there->quit;
if ($faults) { $node->poll_query_until('postgres', "SELECT event_store_test.fault_hits('collect-between-looks') > 0"); }
else { sleep 8; }
is(segments(), $all, 'nothing is collected while a table cannot be looked at');
$old->query_safe('ROLLBACK');
$old->quit;
$node->wait_for_log(qr/event_store dropped \d+ storages?/, $offset);
my ($dropped) = slurp_file($node->logfile, $offset) =~ /event_store dropped (\d+) storages?/;
is($dropped, 1, 'then what the look has found in another database');
fill('postgres', 'hint', 10);
$node->safe_psql('postgres', 'DROP TABLE hint');
goes_to($all - 4, 'it is when the lock is gone');

# A template's tables have the same storage ids in another database, but no rows.
$node->safe_psql('other', 'TRUNCATE kept');
goes_to($all - 6, 'TRUNCATE in another database');
fill('other', 'kept', 10);
is(segments(), $all - 4, 'rows again');
$node->safe_psql('postgres', 'DROP DATABASE other');
fill('postgres', 'hint', 10);
$node->safe_psql('postgres', 'DROP TABLE hint');
goes_to($all - 6, 'DROP DATABASE');

# It does not come back.
$node->restart;
$node->poll_query_until('postgres', q{SELECT count(*) = 2 FROM event_store.stat_shards WHERE state = 'open'});
is(segments(), $all - 6, 'after a restart');
$node->stop('immediate');
$node->start;
$node->poll_query_until('postgres', q{SELECT count(*) = 2 FROM event_store.stat_shards WHERE state = 'open'});
is(segments(), $all - 6, 'and after a crash');
is($node->safe_psql('postgres', 'SELECT (SELECT count(*) FROM kept), (SELECT count(*) FROM moved)'), '100|100',
	'what was kept is there');
$node->stop;
done_testing();
