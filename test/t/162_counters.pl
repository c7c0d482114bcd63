# No counter is always 0: for each column of stat_shards, stat_tables and stat_segments something is done that moves it, and
# nothing else than what was done is shown. A column that is not looked at here fails the test.

use strict;
use warnings;
use EventStore::Server qw(new_server wait_open sql try_sql set_conf faults_compiled log_offset server_log_since);
use JSON::PP qw(decode_json);
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = new_server('counters',
	'event_store.shards = 2', 'event_store.memtable_age = 0', 'autovacuum = off', 'wal_writer_delay = 10s');
sql($node, <<'SQL');
ALTER DATABASE postgres SET search_path = public, event_store_test;
CREATE TABLE ev (context_id text, position bigint, version bigint, event_id uuid, event_type text, v text) USING event_store;
CREATE TABLE plain (context_id text, n int, v text, position bigint) USING event_store;
CREATE TABLE hp (v text);
-- the highest value that a counter shows for a while
CREATE FUNCTION highest(counter text, shard int, ms int) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE most bigint := 0; now bigint; until timestamptz := clock_timestamp() + ms * interval '1 ms';
BEGIN
	WHILE clock_timestamp() < until LOOP
		EXECUTE format('SELECT %I FROM event_store.stat_shards_fn() WHERE shard = $1', counter) INTO now USING shard;
		most := greatest(most, now);
	END LOOP;
	RETURN most;
END $$;
SQL
my @context = map { sql($node, "SELECT 'c' || g FROM generate_series(1, 100) g WHERE event_store.shard_of('c' || g) = $_ LIMIT 1") } 0, 1;
my $a = $context[0];
my $shard_dir = $node->data_dir . '/event_store/shard_0';
my %seen;

# One row of a view, by names.
sub row
{
	my ($view, $where) = @_;
	return decode_json(sql($node, "SELECT row_to_json(x) FROM event_store.$view x WHERE $where"));
}

sub shard { return row('stat_shards', 'shard = ' . ($_[0] // 0)); }

# The columns of a view that what follows is about.
sub about
{
	my ($view, @columns) = @_;
	$seen{"$view.$_"} = 1 foreach @columns;
	return;
}

# What shard 0 counts comes a moment later than what a client sees.
sub grows
{
	my ($before, $column, $n, $name, $others) = @_;
	about('stat_shards', $column);
	my $end = time() + 120;
	my $row;
	do { $row = shard(); } until $row->{$column} - $before->{$column} >= $n || time() > $end || !sleep 0.02;
	my $grown = $row->{$column} - $before->{$column};
	ok($grown >= $n && $grown <= $n + ($others // 0), "stat_shards.$column: $name") or diag("it grew by $grown");
	return;
}

sub moves
{
	my ($before, $column, $name) = @_;
	about('stat_shards', $column);
	my $end = time() + 120;
	my $is;
	do { $is = shard()->{$column}; } until $is > $before->{$column} || time() > $end || !sleep 0.02;
	cmp_ok($is, '>', $before->{$column}, "stat_shards.$column: $name");
	return;
}

sub comes_to
{
	my ($column, $value, $name) = @_;
	about('stat_shards', $column);
	my $end = time() + 120;
	my $is;
	do { $is = shard()->{$column} // ''; } until $is eq $value || time() > $end || !sleep 0.02;
	is($is, $value, "stat_shards.$column: $name");
	return;
}

# ---- queues, to the byte

about('stat_shards', qw(shard paused queue_depth queue_high_water));
is(sql($node, 'SELECT string_agg(shard::text, \',\' ORDER BY shard) FROM event_store.stat_shards'), '0,1', 'one row for each shard');
my $s = $node->background_psql('postgres', on_error_stop => 0);
$s->query_safe('SELECT echo(0, 1), echo(1, 1)');
my $before = shard();
sql($node, 'SELECT event_store.pause_shard(0)');
ok(shard()->{paused} && !shard(1)->{paused}, 'stat_shards.paused: shard 0');
# each message: its length, a request of 24 bytes at least, the body
my $bytes = $s->query_safe('WITH b AS MATERIALIZED (SELECT sent_bytes FROM channel(0)), s AS MATERIALIZED (SELECT send_without_waiting(0, 3000, 40) FROM b)
	SELECT a.sent_bytes - a.taken_bytes FROM s, LATERAL (SELECT * FROM channel(0) WHERE s IS NOT NULL) a');
cmp_ok($bytes, '>=', 40 * (8 + 24 + 3000), 'bytes wait in the queue of a paused shard');
cmp_ok($bytes, '<=', 40 * (8 + 64 + 3000), 'no more than were sent');
is(shard()->{queue_high_water}, $bytes, 'stat_shards.queue_high_water: the bytes that wait');
is(shard(1)->{queue_high_water} < $bytes, 1, 'of this shard only');
is(shard()->{queue_depth} . ' ' . shard(1)->{queue_depth}, '40 0', 'stat_shards.queue_depth: all of them, and none for the other shard');
sql($node, 'SELECT event_store.resume_shard(0)');
comes_to('queue_depth', 0, 'taken');
# a worker may ask for something, too
grows($before, 'messages', 40, 'each one', 3);
ok(!shard()->{paused}, 'stat_shards.paused: no more');
$before = shard();
$s->query_safe('SELECT echo(0, 100, 7)');
grows($before, 'messages', 7, 'seven calls', 3);

# no room: one wait, one time-out
$before = shard();
my $other = shard(1);
sql($node, 'SELECT event_store.pause_shard(0)');
$s->query_safe(q{SET event_store.enqueue_timeout = '200ms'});
my $begin = time();
$s->query("INSERT INTO plain SELECT '$a', g, repeat(md5(g::text), 30) FROM generate_series(1, 2000) g");
my $took = time() - $begin;
like($s->{stderr}, qr/shard 0 is busy/, 'a full queue');
$s->{stderr} = '';
$s->query_safe('RESET event_store.enqueue_timeout');
grows($before, 'queue_full_waits', 1, 'one wait for room');
grows($before, 'queue_timeouts', 1, 'which ran out of time');
about('stat_shards', 'queue_full_wait_us');
my $us = shard()->{queue_full_wait_us} - $before->{queue_full_wait_us};
ok($us >= 190_000 && $us < 1e6 * $took, "stat_shards.queue_full_wait_us: the time of it ($us us)");
is(shard(1)->{$_}, $other->{$_}, "nothing of it for the other shard: $_") foreach qw(queue_full_waits queue_timeouts queue_full_wait_us);
sql($node, 'SELECT event_store.resume_shard(0)');

# ---- what is staged, and what becomes of it

comes_to('staged_rows', 0, 'nothing is open');
$before = shard();
about('stat_tables', qw(staged_rows memtable_rows memtable_bytes min_position max_position));
$s->query_safe("BEGIN; INSERT INTO plain SELECT '$a', g, repeat('x', 20) FROM generate_series(1, 100) g");
is($s->query_safe('SELECT count(*) FROM plain'), '100', 'a transaction has sent 100 rows');
grows($before, 'staged_transactions', 1, 'one');
grows($before, 'staged_rows', 100, 'of 100 rows');
moves($before, 'staged_bytes', 'with their bytes');
cmp_ok(shard()->{staged_bytes}, '>=', 100 * 24, 'all of them');
grows($before, 'batches', 1, 'in one batch');
is(row('stat_tables', "store = 'plain'::regclass")->{staged_rows}, 100, 'stat_tables.staged_rows');
$s->query_safe('ROLLBACK');
comes_to($_, 0, 'gone after a rollback') foreach qw(staged_transactions staged_rows staged_bytes);
grows($before, 'aborts', 1, 'one');
grows($before, 'rows', 100, 'those of the batch');

sql($node, 'SELECT event_store.flush()');
comes_to('memtable_rows', 0, 'after a flush');
$before = shard();
my $table = row('stat_tables', "store = 'plain'::regclass");
is($table->{min_position}, undef, 'stat_tables.min_position: none in an empty table');
$s->query_safe("INSERT INTO plain SELECT '$a', g, repeat('x', 20) FROM generate_series(1, 9000) g");
my ($min, $max) = split /\|/, sql($node, 'SELECT min(position), max(position) FROM plain');
grows($before, 'commits', 1, 'one');
grows($before, 'rows', 9000, 'all');
comes_to('memtable_rows', 9000, 'all');
moves($before, 'memtable_bytes', 'with their bytes');
cmp_ok(shard()->{memtable_bytes}, '>=', 9000 * 24, 'all of them');
comes_to('last_position', $max, 'of the last row');
$table = row('stat_tables', "store = 'plain'::regclass");
is($table->{memtable_rows}, 9000, 'stat_tables.memtable_rows');
cmp_ok($table->{memtable_bytes}, '>=', 9000 * 24, 'stat_tables.memtable_bytes');
is("$table->{min_position} $table->{max_position}", "$min $max", 'stat_tables.min_position, max_position');
sql($node, 'SELECT event_store.sync()');
comes_to('durable_position', $max, 'after sync()');

# ---- segments

sql($node, 'SELECT event_store.flush()');
grows($before, 'flushes', 1, 'one');
moves($before, 'manifest_records', 'a segment is named');
grows($before, 'segments', 1, 'one');
grows($before, 'segment_rows', 9000, 'all');
comes_to('memtable_rows', 0, 'after the flush');
about('stat_shards', 'segment_bytes');
my @files = glob("$shard_dir/seg.*");
is(scalar(@files), 1, 'one file');
my $size = -s $files[0];
is(shard()->{segment_bytes}, $size, 'stat_shards.segment_bytes: the length of the file');
about('stat_tables', qw(store storage_id segments segment_rows segment_bytes raw_bytes));
$table = row('stat_tables', "store = 'plain'::regclass");
is("$table->{segments} $table->{segment_rows} $table->{segment_bytes} $table->{memtable_rows}", "1 9000 $size 0",
	'stat_tables.segments, segment_rows, segment_bytes');
cmp_ok($table->{raw_bytes}, '>=', 9000 * 24, 'stat_tables.raw_bytes');
is($table->{store}, 'plain', 'stat_tables.store');
cmp_ok($table->{storage_id}, '>', 0, 'stat_tables.storage_id');
isnt($table->{storage_id}, row('stat_tables', "store = 'ev'::regclass")->{storage_id}, 'another one for each table');
is("$table->{min_position} $table->{max_position}", "$min $max", 'stat_tables.min_position, max_position of segments');
about('stat_segments', qw(store storage_id shard segment rows contexts zones bytes raw_bytes min_position max_position pending));
my $segment = row('stat_segments', 'true');
(my $name = $files[0]) =~ s/.*\///;
is(join(' ', @$segment{qw(store storage_id shard segment rows contexts zones bytes raw_bytes min_position max_position)}),
	"plain $table->{storage_id} 0 $name 9000 1 2 $size $table->{raw_bytes} $min $max", 'stat_segments: all that there is about one segment');
ok(!$segment->{pending}, 'stat_segments.pending: it is not');

sql($node, "INSERT INTO plain SELECT (ARRAY['$context[0]', '$context[1]'])[1 + g % 2] || '-' || g % 60, g FROM generate_series(1, 6000) g; SELECT event_store.flush()");
is( sql($node, q{SELECT count(DISTINCT shard), sum(rows), sum(contexts), min(min_position) = } . ($max + 1) . q{ FROM event_store.stat_segments WHERE min_position > } . $max),
	'2|6000|60|t', 'stat_segments: one in each shard, with what is in it');

# a transaction that is larger than memory
about('stat_tables', 'pending_rows');
sql($node, 'ALTER SYSTEM SET event_store.spill_after = 64');
$node->reload;
comes_to('pending_segments', 0, 'none yet');
$s->query_safe("BEGIN; INSERT INTO plain SELECT '$a', g, repeat('y', 80) FROM generate_series(1, 20000) g");
moves({ pending_segments => 0 }, 'pending_segments', 'rows of a large transaction');
$table = row('stat_tables', "store = 'plain'::regclass");
ok($table->{pending_rows} > 0 && $table->{pending_rows} <= 20000, "stat_tables.pending_rows ($table->{pending_rows})");
ok(row('stat_segments', 'pending ORDER BY segment LIMIT 1')->{rows} > 0, 'stat_segments.pending: there are some');
$s->query_safe('ROLLBACK');
comes_to('pending_segments', 0, 'gone after a rollback');
is(row('stat_tables', "store = 'plain'::regclass")->{pending_rows}, 0, 'stat_tables.pending_rows: none');

# ---- roles

about('stat_tables', qw(context_column position_column version_column event_id_column event_type_column));
$table = row('stat_tables', "store = 'ev'::regclass");
is(join(' ', @$table{qw(context_column position_column version_column event_id_column event_type_column)}),
	'context_id position version event_id event_type', 'stat_tables: columns that have a role');
is(row('stat_tables', "store = 'plain'::regclass")->{version_column}, undef, 'and none that have not');

# ---- PostgreSQL's own: scans and their rows count as those of a heap with the same rows

sql($node, "CREATE TABLE scanned (position bigint, context_id text, n int) USING event_store; CREATE TABLE scanned_heap (n int);
	INSERT INTO scanned SELECT NULL, 'c' || g % 60, g FROM generate_series(1, 6000) g; INSERT INTO scanned_heap SELECT generate_series(1, 6000)");
sub scans
{
	my ($of) = @_;
	return sql($node, "SELECT seq_scan, seq_tup_read FROM pg_stat_user_tables WHERE relname = '$of'");
}
foreach my $case (
	[ 'a scan', 'SELECT count(*) FROM %s' ],
	[ 'with LIMIT', 'SELECT n FROM %s LIMIT 10' ],
	[ 'started over', 'SET enable_material = off; SELECT (SELECT count(*) FROM %s WHERE n < g) FROM generate_series(1, 3) g' ],
	[ 'parallel', 'SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0; SET parallel_leader_participation = off;
		SET max_parallel_workers_per_gather = 1; SELECT count(*) FROM %s' ],
	[ 'a cursor', 'BEGIN; DECLARE c SCROLL CURSOR FOR SELECT n FROM %s; MOVE 5 c; MOVE 7 c; CLOSE c; COMMIT' ],
	[ 'only explained', 'EXPLAIN SELECT * FROM %s' ])
{
	my ($name, $query) = @$case;
	foreach my $of ('scanned', 'scanned_heap') { sql($node, sprintf($query, $of) . '; SELECT pg_stat_force_next_flush()'); }
	# a backend may still be about to report when psql has ended
	my $end = time() + 20;
	sleep 0.1 while scans('scanned') ne scans('scanned_heap') && time() < $end;
	is(scans('scanned'), scans('scanned_heap'), "pg_stat_user_tables, $name");
}
sql($node, 'DROP TABLE scanned, scanned_heap');

# ---- duplicates, one by one

my $id = '00000000-0000-0000-0000-000000000001';
my $append = "SELECT outcome FROM event_store.append('$a', 'happened', '{}', event_id => '$id')";
is($s->query_safe($append), 'appended', 'an event with an id');
my $insert = "INSERT INTO ev (context_id, event_id, v) VALUES ('$a', '$id', 'x')";
$s->query_safe($insert);
$before = shard();
foreach my $n (1 .. 3)
{
	is($s->query_safe($append), 'already_there', 'the same again');
	grows($before, 'duplicates', $n, "$n by append");
}
foreach my $n (4 .. 6)
{
	$s->query_safe($insert);
	grows($before, 'duplicates', $n, "$n with those by INSERT");
}
$s->query_safe("BEGIN; INSERT INTO ev (context_id, event_id, v) VALUES ('$a', '00000000-0000-0000-0000-000000000002', 'x'), ('$a', '$id', 'x'); COMMIT");
grows($before, 'duplicates', 7, 'and one among new ones');
is(sql($node, 'SELECT (SELECT count(*) FROM ev), (SELECT count(*) FROM event_store.events)'), '2|1', 'nothing is there twice');

# ---- reading

$before = shard();
is(sql($node, "SELECT count(*) FROM (SELECT * FROM plain WHERE n > 8000 OFFSET 0) x"), '1000', 'a query');
grows($before, 'scans', 1, 'one');
moves($before, 'rows_sent', 'what was sent');
cmp_ok(shard()->{rows_sent} - $before->{rows_sent}, '>=', 1000, 'all that it wanted');
$before = shard();
is(sql($node, "SELECT count(*) FROM event_store.replay('$a', store => 'plain')"), '9000', 'a replay');
grows($before, 'replays', 1, 'one');
grows($before, 'rows_sent', 9000, 'its rows');
is(shard()->{scans}, $before->{scans}, 'it is no scan');

my $waiter = $node->background_psql('postgres', on_error_stop => 0);
$waiter->query_until(qr/go/, "\\echo go\nCALL event_store.wait_for_events(after => 1000000, context_id => '$a', timeout => '300s');\n\\echo done\n");
comes_to('waiters', 1, 'one');
sql($node, q{SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE query LIKE 'CALL event_store.wait_for_events%' AND pid <> pg_backend_pid()});
$waiter->query_until(qr/done/, '');
$waiter->{stderr} = '';
comes_to('waiters', 0, 'no more');
$waiter->quit;

# ---- the shard's own log

about('stat_shards', qw(wal_direct_writes wal_staged_writes wal_groups wal_frames wal_bytes wal_files fsyncs fsync_us fsync_histogram));
sql($node, 'SELECT event_store.sync()');
$before = shard();
$s->query_safe("INSERT INTO plain VALUES ('$a', 0, 'x')");
moves($before, 'wal_direct_writes', 'an idle log is written at once');
moves($before, 'wal_groups', 'in a group');
moves($before, 'wal_frames', 'of frames');
moves($before, 'wal_bytes', 'of bytes');
sql($node, 'SELECT event_store.sync()');
moves($before, $_, 'sync()') foreach qw(fsyncs fsync_us control_writes);

my $load = PostgreSQL::Test::Utils::tempdir() . '/load.sql';
append_to_file($load, "INSERT INTO plain VALUES ('$a', 0, repeat('x', 500))");
foreach my $try (1 .. 10)
{
	IPC::Run::run([ 'pgbench', '-n', '-f', $load, '-c', 8, '-t', 200, $node->connstr('postgres') ], '>', \my $out, '2>', \my $err, IPC::Run::timeout(300));
	last if shard()->{wal_staged_writes} > $before->{wal_staged_writes};
}
moves($before, 'wal_staged_writes', 'what comes while one is written is gathered');
sql($node, 'SELECT event_store.sync()');
my $now = shard();
my ($sum, $files);
# one row is not one moment
foreach (1 .. 400)
{
	$now = shard();
	$sum = 0;
	$sum += $_ foreach @{ $now->{fsync_histogram} };
	$files = grep { /wal\.[0-9A-F]{8}$/ } glob("$shard_dir/wal.*");
	last if $now->{wal_groups} == $now->{wal_direct_writes} + $now->{wal_staged_writes} && $now->{fsyncs} == $sum && $now->{wal_files} == $files;
	sleep 0.05;
}
is($now->{wal_direct_writes} + $now->{wal_staged_writes}, $now->{wal_groups}, 'direct and staged writes are all groups');
cmp_ok($now->{wal_frames}, '>', $now->{wal_groups}, 'a group has one frame or more');
cmp_ok($now->{wal_bytes}, '>=', 512 * $now->{wal_groups}, 'and whole sectors');
is(scalar(@{ $now->{fsync_histogram} }), 16, 'stat_shards.fsync_histogram: 16 buckets');
is($sum, $now->{fsyncs}, 'that hold all of them');
is($now->{wal_files}, $files, 'stat_shards.wal_files: what lies in the directory');

# ---- distance to PostgreSQL's flush pointer, and what is held

about('stat_shards', qw(flush_distance restart_lsn held_wal_bytes));
comes_to('flush_distance', 0, 'all is flushed');
my ($walwriter) = split /\n/, sql($node, q{SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'});
kill 'STOP', $walwriter;
$s->query_safe("SET synchronous_commit = off; INSERT INTO plain SELECT '$a', g, repeat(md5(g::text), 10) FROM generate_series(1, 40) g; SET synchronous_commit = on");
my $far = sql($node, q{SELECT highest('flush_distance', 0, 700)});
kill 'CONT', $walwriter;
ok($far > 1000 && $far < 1000000, "stat_shards.flush_distance: bytes of an asynchronous commit ($far)");
sql($node, 'SELECT event_store.sync()');
comes_to('flush_distance', 0, 'after sync()');

my $lsn = shard()->{restart_lsn};
sql($node, "SELECT event_store.pause_shard(0); INSERT INTO hp SELECT repeat('x', 1000) FROM generate_series(1, 5000)");
my $held = 0;
foreach (1 .. 300)
{
	$held = shard()->{held_wal_bytes};
	last if $held >= 5_000_000;
	sleep 0.2;
}
cmp_ok($held, '>=', 5_000_000, 'stat_shards.held_wal_bytes: a paused shard holds back what was written since');
cmp_ok(abs($held - sql($node, "SELECT pg_current_wal_insert_lsn() - '" . shard()->{restart_lsn} . "'")), '<', 1_000_000, 'counted from its restart_lsn');
sql($node, "SELECT event_store.resume_shard(0); INSERT INTO plain VALUES ('$a', 0, 'x'); SELECT event_store.sync()");
ok($node->poll_query_until('postgres', "SELECT held_wal_bytes < 100000 AND restart_lsn - '$lsn' > 5000000 FROM event_store.stat_shards WHERE shard = 0"),
	'stat_shards.restart_lsn: moves on');

# ---- damage

about('stat_shards', qw(io_errors corruptions pid generation state reason io_method));
is(shard()->{corruptions}, 0, 'no damage yet');
$before = shard();
SKIP:
{
	skip 'no fault points in this build', 1 unless faults_compiled($node);
	sql($node, q{SELECT inject_fault('wal-write', 'eio')});
	$s->query_safe("INSERT INTO plain VALUES ('$a', 0, 'x')");
	grows($before, 'io_errors', 1, 'one');
	sql($node, 'SELECT event_store.sync()');
	ok(1, 'and it is written after all');
}
my $last = sql($node, "SELECT max(position) FROM plain WHERE context_id = '$a'");

sub flip
{
	my ($file, $at) = @_;
	open(my $f, '+<:raw', $file) or die "$file: $!";
	seek($f, $at, 0);
	read($f, my $byte, 1);
	seek($f, $at, 0);
	print $f chr(ord($byte) ^ 0x20);
	close($f);
	return;
}

# ---- another process

my ($pid, $generation) = @{ shard() }{qw(pid generation)};
sql($node, "SELECT pg_terminate_backend($pid)");
ok($node->poll_query_until('postgres', "SELECT generation = $generation + 1 AND pid <> $pid AND state = 'open' FROM event_store.stat_shards WHERE shard = 0"),
	'stat_shards.pid, generation: another process');
is(sql($node, "SELECT count(*) FROM pg_stat_activity WHERE pid = " . shard()->{pid} . " AND backend_type = 'event_store shard 0'"), '1', 'the one that runs');
comes_to('last_position', $last, 'is known to the new process');
comes_to('durable_position', $last, 'too');

$s->quit;
sql($node, 'SELECT event_store.flush()');
$node->stop;
set_conf($node, "event_store.io_method = 'sync'");
$node->start;
wait_open($node);
is(shard()->{io_method}, 'sync', 'stat_shards.io_method: sync');
comes_to('last_position', $last, 'is known after a clean stop, when all is in segments');
comes_to('durable_position', $last, 'too');
$node->stop;
set_conf($node, "event_store.io_method = 'auto'");
my $offset = log_offset($node);
$node->start;
wait_open($node);
my $method = shard()->{io_method};
ok($method eq 'io_uring' || server_log_since($node, $offset) =~ /io_uring/, "stat_shards.io_method: $method, or the log says why not");

flip($files[0], 100);
foreach my $try (1 .. 2)
{
	$before = shard();
	my (undef, undef, $err) = try_sql($node, 'SELECT count(v) FROM plain');
	like($err, qr/XX001/, 'a damaged file');
	moves($before, 'corruptions', 'is counted');
}
flip($files[0], 100);

# ---- a shard that does not open says why

is(shard()->{state}, 'open', 'stat_shards.state: open');
is(shard()->{reason}, undef, 'stat_shards.reason: none');
$node->stop;
flip("$shard_dir/control.$_", 40) foreach 0, 1;
$node->start;
comes_to('state', 'failed', 'control blocks are damaged');
like(shard()->{reason}, qr/control/, 'stat_shards.reason: names the file');
is(shard(1)->{state}, 'open', 'the other shard is open');
flip("$shard_dir/control.$_", 40) foreach 0, 1;
comes_to('state', 'open', 'when the files are good again');
is(shard()->{reason}, undef, 'stat_shards.reason: none');
is(sql($node, "SELECT max(position) FROM plain WHERE context_id = '$a'"), $last, 'all is there');

# ---- was that all?

my @columns = split /\n/, sql($node, <<'SQL');
SELECT c.relname || '.' || a.attname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
WHERE c.relnamespace = 'event_store'::regnamespace AND c.relname LIKE 'stat\_%' AND c.relkind = 'v' AND a.attnum > 0 ORDER BY c.relname, a.attnum
SQL
is(join(', ', grep { !$seen{$_} } @columns), '', 'every column of every view was moved');
is(join(', ', grep { my $c = $_; !grep { $_ eq $c } @columns } sort keys %seen), '', 'and there are no others');
$node->stop;
done_testing();
