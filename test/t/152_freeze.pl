# VACUUM lets relfrozenxid of event tables advance and PostgreSQL forget old transactions, with quiet tables, undecided transactions
# and dropped tables about; no event is lost or comes back when the commit log before it has gone.

use strict;
use warnings;
use EventStore::Server qw(new_server kill_all crash_restart wait_open sql try_sql set_conf);
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = new_server('freeze', 'event_store.shards = 2', 'event_store.spill_after = 64kB', 'autovacuum = off',
	'event_store.memtable_age = 0', 'max_prepared_transactions = 0');
sql($node, <<'SQL');
CREATE TABLE quiet (position bigint, context_id text, version bigint, n int) USING event_store;
CREATE TABLE busy (position bigint, context_id text, version bigint, n int) USING event_store;
CREATE TABLE gone (context_id text, n int) USING event_store;
CREATE TABLE hp (n int);
SQL

# Lets many transaction ids go by: the server is stopped, and starts with a later one.
my $burned = 0;
sub burn
{
	my ($mode) = @_;
	my $xid = sql($node, 'SELECT pg_current_xact_id()') % 4294967296;
	my $to = (int($xid / 1048576) + 3) * 1048576;

	$node->stop($mode // 'fast');
	# the commit log of the ids that were jumped over
	foreach my $segment (int($xid / 1048576) .. int($to / 1048576))
	{
		my $file = sprintf('%s/pg_xact/%04X', $node->data_dir, $segment);
		next if -e $file;
		append_to_file($file, "\0" x 262144);
		chmod(0600, $file);
	}
	command_ok([ 'pg_resetwal', '-x', $to, '-D', $node->data_dir ], "transaction ids go on at $to");
	$node->start;
	$burned = $to;
	return wait_open($node);
}

sub clog_segments { my @files = glob($node->data_dir . '/pg_xact/*'); return scalar(@files); }

sub frozen
{
	my ($table) = @_;
	return sql($node, "SELECT age(relfrozenxid) FROM pg_class WHERE oid = '$table'::regclass");
}

my $quiet = 'SELECT count(*), sum(n), max(version), count(DISTINCT position) FROM quiet';
sql($node, q{INSERT INTO quiet (context_id, n) SELECT 'q' || g % 7, g FROM generate_series(1, 700) g});
# a row of a rolled-back savepoint, an aborted transaction, one that was spilled
sql($node, q{BEGIN; INSERT INTO quiet (context_id, n) VALUES ('q1', 1); SAVEPOINT a; INSERT INTO quiet (context_id, n) VALUES ('dead', 1); ROLLBACK TO a; COMMIT});
sql($node, q{BEGIN; INSERT INTO quiet (context_id, n) SELECT 'dead' || g % 5, g FROM generate_series(1, 9000) g; ROLLBACK});
sql($node, q{INSERT INTO gone SELECT 'g', g FROM generate_series(1, 100) g});
my $expected = sql($node, $quiet);

# ---- in memory only: no flush has happened, and the table stays quiet

ok(burn(), 'open after three million transaction ids');
is(sql($node, $quiet), $expected, 'all is there');
my $before = clog_segments();
my $age = frozen('quiet');
cmp_ok($age, '>', 1_000_000, "relfrozenxid of the quiet table is $age ids old");
sql($node, 'DROP TABLE gone');
sql($node, 'VACUUM (FREEZE) quiet');
cmp_ok(frozen('quiet'), '<', 100_000, 'VACUUM FREEZE moves it');
foreach my $dbname ('template1', 'postgres')
{
	sql($node, 'VACUUM (FREEZE)', $dbname);
}
sql($node, q{UPDATE pg_database SET datallowconn = true WHERE datname = 'template0'});
sql($node, 'VACUUM (FREEZE)', 'template0');
sql($node, q{UPDATE pg_database SET datallowconn = false WHERE datname = 'template0'});
cmp_ok(clog_segments(), '<', $before, 'PostgreSQL has forgotten old transactions');
is(sql($node, $quiet), $expected, 'all is there');
kill_all($node);
crash_restart($node);
is(sql($node, $quiet), $expected, 'after a crash');
sql($node, q{INSERT INTO quiet (context_id, n) VALUES ('q1', 0)});
is(sql($node, q{SELECT count(*), max(version) FROM quiet WHERE context_id = 'q1'}), '102|102', 'versions go on');
$expected = sql($node, $quiet);
sql($node, 'SELECT event_store.flush()');
is(sql($node, $quiet), $expected, 'flushed');
is(sql($node, q{SELECT count(*) FROM quiet WHERE context_id LIKE 'dead%'}), '0', 'what was rolled back stays dead');

# ---- a transaction that is under way holds relfrozenxid back; so does one that is not decided

my $open = $node->background_psql('postgres', on_error_stop => 0);
$open->query_safe('BEGIN');
$open->query_safe(q{INSERT INTO busy (context_id, n) SELECT 'b' || g % 5, g FROM generate_series(1, 9000) g});
my $xid = $open->query_safe('SELECT pg_current_xact_id()');
sql($node, "INSERT INTO hp VALUES ($_)") foreach 1 .. 30;
sql($node, 'VACUUM (FREEZE) busy');
is(sql($node, "SELECT relfrozenxid::text::bigint <= $xid FROM pg_class WHERE relname = 'busy'"), 't', 'VACUUM FREEZE does not pass a transaction under way');
$open->query_safe('COMMIT');
$open->quit;
is(sql($node, 'SELECT count(*), max(version) FROM busy'), '9000|1800', 'which commits');
my $moved = 0;
foreach (1 .. 30)
{
	sql($node, 'VACUUM (FREEZE) busy');
	$moved = sql($node, "SELECT relfrozenxid::text::bigint > $xid FROM pg_class WHERE relname = 'busy'") eq 't';
	last if $moved;
	sleep 0.2;
}
ok($moved, 'then VACUUM FREEZE passes it');
kill_all($node);
crash_restart($node);
is(sql($node, 'SELECT count(*), max(version) FROM busy'), '9000|1800', 'its rows survive a crash');

# ---- the same when a shard was not there to answer: VACUUM must not guess

my ($pid) = split /\n/, sql($node, q{SELECT pid FROM pg_stat_activity WHERE backend_type = 'event_store shard 0'});
sql($node, q{INSERT INTO busy (context_id, n) SELECT 'c' || g % 50, g FROM generate_series(1, 500) g});
my $was = sql($node, q{SELECT relfrozenxid FROM pg_class WHERE relname = 'busy'});
kill 'STOP', $pid;
my ($status, $out, $err) = try_sql($node, q{SET statement_timeout = '2s'; VACUUM (FREEZE) busy});
kill 'CONT', $pid;
is(sql($node, q{SELECT relfrozenxid FROM pg_class WHERE relname = 'busy'}), $was, 'a shard that does not answer: relfrozenxid stays');
is(sql($node, 'SELECT count(*) FROM busy'), '9500', 'and all is well afterwards');

# ---- once more all the way, after a crash with everything in own WAL

sql($node, q{INSERT INTO busy (context_id, n) SELECT 'd' || g % 50, g FROM generate_series(1, 500) g; SELECT event_store.sync()});
ok(burn(), 'open after another three million ids');
sql($node, 'VACUUM (FREEZE)', $_) foreach 'template1', 'postgres';
kill_all($node);
crash_restart($node);
is(sql($node, 'SELECT count(*) FROM busy'), '10000', 'all rows are there');
is(sql($node, $quiet), $expected, 'also of the quiet table');
is(sql($node, q{SELECT count(*) FROM (SELECT version, row_number() OVER (PARTITION BY context_id ORDER BY position) AS n FROM busy) x WHERE n <> version}), '0', 'versions are right');
is(sql($node, 'SELECT count(*) FROM event_store.verify()'), '0', 'no damage');
$node->stop;
done_testing();
