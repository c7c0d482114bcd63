# VACUUM lets relfrozenxid of event tables advance and PostgreSQL forget old transactions, with quiet tables, undecided transactions
# and dropped tables about; no event is lost or comes back when the commit log before it has gone.

use strict;
use warnings;
use EventStore::Server qw(new_server kill_all crash_restart wait_open sql try_sql set_conf faults_compiled);
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = new_server('freeze', 'event_store.shards = 2', 'event_store.spill_after = 64kB', 'autovacuum = off',
	'event_store.memtable_age = 0', 'max_prepared_transactions = 0', 'max_wal_senders = 3');
sql($node, <<'SQL');
CREATE TABLE quiet (position bigint, context_id text, version bigint, n int) USING event_store;
CREATE TABLE busy (position bigint, context_id text, version bigint, n int) USING event_store;
CREATE TABLE gone (context_id text, n int) USING event_store;
CREATE TABLE hp (n int);
SQL

# Lets many transaction ids go by: the server is stopped, and starts with a later one, so many before a new segment of the commit log.
my $burned = 0;
sub burn
{
	my ($before, $segments) = @_;
	my $xid = sql($node, 'SELECT pg_current_xact_id()') % 4294967296;
	my $to = (int($xid / 1048576) + ($segments // 3)) * 1048576 - ($before // 0);

	$node->stop;
	# the commit log of the ids that were jumped over
	foreach my $segment (defined $segments ? int($to / 1048576) : int($xid / 1048576) .. int($to / 1048576))
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

# Every table of every database, so that PostgreSQL can forget what it may.
sub freeze_all
{
	sql($node, 'VACUUM (FREEZE)', $_) foreach 'template1', 'postgres';
	sql($node, q{UPDATE pg_database SET datallowconn = true WHERE datname = 'template0'});
	sql($node, 'VACUUM (FREEZE)', 'template0');
	sql($node, q{UPDATE pg_database SET datallowconn = false WHERE datname = 'template0'});
	return;
}

# Numbers of the oldest and of the newest segment of the commit log.
sub clog_range
{
	# a new one is written by a checkpoint
	sql($node, 'CHECKPOINT');
	my @files = sort map { s/.*\///r } glob($node->data_dir . '/pg_xact/*');
	return (hex($files[0]), hex($files[-1]));
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
freeze_all();
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
foreach (1 .. 300)
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

# ---- a backend that waits for a synchronous standby, against VACUUM FREEZE: it is committed and durable, but nobody may know

set_conf($node, "synchronous_standby_names = 'nobody'", 'synchronous_commit = local');
$node->restart;
ok(wait_open($node), 'open with a synchronous standby that is not there');
my $stuck = $node->background_psql('postgres', on_error_stop => 0);
$stuck->query_safe('SET synchronous_commit = on');
$stuck->query_safe('BEGIN');
$stuck->query_safe(q{INSERT INTO busy (context_id, n) SELECT 's' || g % 5, g FROM generate_series(1, 500) g});
$xid = $stuck->query_safe('SELECT pg_current_xact_id()');
my $stuck_pid = $stuck->query_safe('SELECT pg_backend_pid()');
$stuck->query_until(qr/commits/, "\\echo commits\nCOMMIT;\n\\echo finished\n");
ok($node->poll_query_until('postgres', "SELECT wait_event = 'SyncRep' FROM pg_stat_activity WHERE pid = $stuck_pid"), 'a committer waits for a standby');
sql($node, "INSERT INTO hp VALUES ($_)") foreach 1 .. 30;
sql($node, "VACUUM (FREEZE) busy");
is(sql($node, "SELECT relfrozenxid::text::bigint <= $xid FROM pg_class WHERE relname = 'busy'"), 't', 'VACUUM FREEZE does not pass it');
is(sql($node, 'SELECT count(*) FROM busy'), '9500', 'nobody sees its rows');
sql($node, "SELECT pg_cancel_backend($stuck_pid)");
$stuck->query_until(qr/finished/, '');
like($stuck->{stderr}, qr/WARNING.*canceling wait for synchronous replication/s, 'cancelled, it has committed');
$stuck->{stderr} = '';
is(sql($node, 'SELECT count(*) FROM busy'), '10000', 'and its rows are there');
$moved = 0;
foreach (1 .. 300)
{
	sql($node, "VACUUM (FREEZE) busy");
	$moved = sql($node, "SELECT relfrozenxid::text::bigint > $xid FROM pg_class WHERE relname = 'busy'") eq 't';
	last if $moved;
	sleep 0.2;
}
ok($moved, 'then VACUUM FREEZE passes it');
# another is stuck when the server crashes
$stuck->query_safe('BEGIN');
$stuck->query_safe(q{INSERT INTO busy (context_id, n) SELECT 's' || g % 5, g FROM generate_series(501, 1000) g});
$stuck->query_until(qr/commits/, "\\echo commits\nCOMMIT;\n\\echo finished\n");
ok($node->poll_query_until('postgres', "SELECT wait_event = 'SyncRep' FROM pg_stat_activity WHERE pid = $stuck_pid"), 'one more waits');
sql($node, "VACUUM (FREEZE) busy");
kill_all($node);
eval { $stuck->quit };
set_conf($node, "synchronous_standby_names = ''", 'synchronous_commit = on');
crash_restart($node);
is(sql($node, q{SELECT count(*), max(version) FROM busy WHERE context_id LIKE 's%'}), '1000|200', 'and is committed after a crash');
is(sql($node, 'SELECT count(*) FROM busy'), '10500', 'as all others');

# ---- a crash after the commit log was truncated, with everything in own WAL: FINISHes without a verdict, of a dropped table; batches of
# transactions that were aborted, of dropped tables and of others

set_conf($node, "event_store.wal_sync_interval = '60s'", "event_store.spill_after = '8MB'");
ok(burn(1500), 'open after another three million ids, near the end of a segment of the commit log');
sql($node, q{INSERT INTO busy (context_id, n) SELECT 'd' || g % 50, g FROM generate_series(1, 500) g});
sql($node, 'CREATE TABLE gone (context_id text, version bigint, n int) USING event_store');
SKIP:
{
	skip 'no fault points in this build', 4 unless faults_compiled($node);
	# what the shards keep of the dropped table stays
	sql($node, q{SELECT event_store_test.inject_fault('collect-before-drop', 'sleep')});
	my @aborted = map { $node->background_psql('postgres', on_error_stop => 0) } 1, 2;
	foreach my $i (0, 1)
	{
		my $table = (qw(gone busy))[$i];
		$aborted[$i]->query_safe('BEGIN');
		$aborted[$i]->query_safe("INSERT INTO $table (context_id, n) SELECT 'aborted' || g % 20, g FROM generate_series(1, 500) g");
		$aborted[$i]->query_safe("SELECT count(*) FROM $table");
	}
	# undecided while own WAL is made durable: FINISH is in it, the verdict is not
	my $committer = $node->background_psql('postgres', on_error_stop => 0);
	$committer->query_safe('BEGIN');
	$committer->query_safe(q{INSERT INTO gone (context_id, n) SELECT 'g' || g % 20, g FROM generate_series(1, 500) g});
	my $old = $committer->query_safe('SELECT pg_current_xact_id()');
	sql($node, q{SELECT event_store_test.inject_fault('commit-after-send', 'sleep')});
	$committer->query_until(qr/commits/, "\\echo commits\nCOMMIT;\n\\echo finished\n");
	ok($node->poll_query_until('postgres', q{SELECT event_store_test.fault_hits('commit-after-send') > 0}), 'a transaction is undecided');
	sql($node, 'SELECT event_store.sync()');
	sql($node, q{SELECT event_store_test.inject_fault('commit-after-send', 'kill', 1000000)});
	$committer->query_until(qr/finished/, '');
	$committer->quit;
	foreach my $s (@aborted) { $s->query_safe('ROLLBACK'); $s->quit; }
	is(sql($node, 'SELECT count(*) FROM gone'), '500', 'it has committed');
	sql($node, 'DROP TABLE gone');
	# into the next segment of the commit log
	sql($node, 'DO $$ BEGIN FOR i IN 1 .. 2500 LOOP BEGIN INSERT INTO hp VALUES (i); EXCEPTION WHEN division_by_zero THEN NULL; END; END LOOP; END $$');
	freeze_all();
	my $segment = int($old / 1048576);
	is((clog_range())[0], $segment, 'the verdict is in no file of the shards: the commit log is kept');
	kill_all($node);
	ok(defined crash_restart($node), 'the shards open after a crash');
	is(sql($node, 'SELECT count(*) FROM busy'), '11000', 'what was committed is there, what was aborted is not');
	sql($node, 'SELECT event_store.sync()');
	freeze_all();
	cmp_ok((clog_range())[0], '>', $segment, 'then it is: the commit log is forgotten');
	kill_all($node);
	ok(defined crash_restart($node), 'the shards open with batches of aborted transactions that are older than the commit log');
	is(sql($node, 'SELECT count(*) FROM busy'), '11000', 'what was committed is there, what was aborted is not');
	sql($node, 'SELECT event_store.flush()');
	is(sql($node, 'SELECT count(*) FROM busy'), '11000', 'also flushed');
	ok($node->poll_query_until('postgres', q{SELECT sum(staged_rows + pending_segments) = 0 FROM event_store.stat_shards}), 'nothing is kept of the aborted');
}

# ---- once more with all databases

ok(burn(), 'open after another three million ids');
$before = clog_segments();
freeze_all();
cmp_ok(clog_segments(), '<', $before, 'PostgreSQL has forgotten old transactions');
kill_all($node);
crash_restart($node);
is(sql($node, 'SELECT count(*) FROM busy'), '11000', 'all rows are there');
is(sql($node, $quiet), $expected, 'also of the quiet table');
is(sql($node, q{SELECT count(*) FROM (SELECT version, row_number() OVER (PARTITION BY context_id ORDER BY position) AS n FROM busy) x WHERE n <> version}), '0', 'versions are right');
is(sql($node, 'SELECT count(*) FROM event_store.verify()'), '0', 'no damage');
$node->stop;

# ---- an event that is more than 2^31 transaction ids old is not one that a snapshot cannot see yet

$node = new_server('old', 'event_store.shards = 2', 'autovacuum = off');
sql($node, q{SELECT event_store.append('a', 't', NULL, event_id => '00000000-0000-0000-0000-000000000001')});
sql($node, 'SELECT event_store.flush()');
foreach (1, 2)
{
	ok(burn(0, 1200), 'open after a billion ids');
	freeze_all();
}
foreach my $level ('REPEATABLE READ', 'SERIALIZABLE')
{
	is(sql($node, "BEGIN ISOLATION LEVEL $level; SELECT outcome || version FROM event_store.append('a', 't', NULL); ROLLBACK"), 'appended2', "append() to its context, $level");
	is(sql($node, "BEGIN ISOLATION LEVEL $level; SELECT outcome || version FROM event_store.append('a', 't', NULL, event_id => '00000000-0000-0000-0000-000000000001'); ROLLBACK"), 'already_there1', 'and once more the same event');
}
$node->stop;

# ---- all event tables are dropped: nothing holds the commit log back, and own WAL has FINISHes of transactions that are older

SKIP:
{
	$node = new_server('dropped', 'event_store.shards = 2', 'autovacuum = off', 'event_store.memtable_age = 0', "event_store.wal_sync_interval = '60s'");
	skip 'no fault points in this build', 1 unless faults_compiled($node);
	ok(burn(1500), 'open near the end of a segment of the commit log');
	sql($node, 'CREATE TABLE gone (context_id text, version bigint, n int) USING event_store; CREATE TABLE hp (n int)');
	sql($node, q{INSERT INTO gone (context_id, n) SELECT 'g' || g % 20, g FROM generate_series(1, 500) g});
	my $committer = $node->background_psql('postgres', on_error_stop => 0);
	$committer->query_safe('BEGIN');
	$committer->query_safe(q{INSERT INTO gone (context_id, n) SELECT 'g' || g % 20, g FROM generate_series(1, 500) g});
	my $old = $committer->query_safe('SELECT pg_current_xact_id()');
	sql($node, q{SELECT event_store_test.inject_fault('collect-before-drop', 'sleep'), event_store_test.inject_fault('commit-after-send', 'sleep')});
	$committer->query_until(qr/commits/, "\\echo commits\nCOMMIT;\n\\echo finished\n");
	ok($node->poll_query_until('postgres', q{SELECT event_store_test.fault_hits('commit-after-send') > 0}), 'a transaction is undecided');
	sql($node, 'SELECT event_store.sync()');
	sql($node, q{SELECT event_store_test.inject_fault('commit-after-send', 'kill', 1000000)});
	$committer->query_until(qr/finished/, '');
	$committer->quit;
	sql($node, 'DROP TABLE gone; DROP EXTENSION event_store CASCADE');
	sql($node, 'DO $$ BEGIN FOR i IN 1 .. 2500 LOOP BEGIN INSERT INTO hp VALUES (i); EXCEPTION WHEN division_by_zero THEN NULL; END; END LOOP; END $$');
	freeze_all();
	cmp_ok((clog_range())[0], '>', int($old / 1048576), 'the commit log is forgotten with a FINISH in own WAL that has no verdict there');
	my $offset = -s $node->logfile;
	kill_all($node);
	$node->start;
	foreach my $shard (0, 1)
	{
		$node->wait_for_log(qr/event_store shard $shard is open/, $offset);
	}
	my @held = slurp_file($node->logfile, $offset) =~ /Own write-ahead log: \d+ of (\d+) FINISH/g;
	cmp_ok($held[0] + $held[1], '>', 0, "the shards open; own WAL held @held FINISHes");
	like(slurp_file($node->logfile, $offset), qr/leaves out transaction $old, which is older than the commit log/, 'one of them too old');
	sql($node, 'CREATE EXTENSION event_store; CREATE TABLE gone (context_id text, version bigint, n int) USING event_store');
	sql($node, q{INSERT INTO gone (context_id, n) SELECT 'g' || g % 20, g FROM generate_series(1, 500) g});
	is(sql($node, 'SELECT count(*), max(version) FROM gone'), '500|25', 'and work');
	sql($node, 'SELECT event_store.flush()');
	is(sql($node, 'SELECT count(*), max(version) FROM gone'), '500|25', 'also flushed');
	is(sql($node, 'SELECT count(*) FROM event_store.verify()'), '0', 'no damage');
	$node->stop;
}
done_testing();
