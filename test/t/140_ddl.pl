# DROP, TRUNCATE, rewrites, moves to another tablespace and CREATE or DROP DATABASE, each committed, rolled back, failed midway or
# cut off by a crash, do to events what they do to a heap table's rows; what belongs to nobody any more is collected.

use strict;
use warnings;
use EventStore::Server qw(new_server kill_all crash_restart wait_open sql try_sql);
use File::Path qw(remove_tree);
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = new_server('ddl', 'event_store.shards = 2', 'event_store.memtable_size = 1MB', 'autovacuum = off', 'allow_in_place_tablespaces = on');
sql($node, q{CREATE TABLESPACE other LOCATION ''});

my $rows = 300;
my $sum = "count(*), sum(n), max(version), count(DISTINCT position), bool_and(v = 'v' || n)";

# The same again in a fresh table: half in segments, half in memory.
sub make
{
	my ($table, $dbname) = @_;
	sql($node, "CREATE TABLE $table (position bigint, context_id text, version bigint, n int, v text) USING event_store", $dbname);
	sql($node, "INSERT INTO $table (context_id, n, v) SELECT 'c' || g % 10, g, 'v' || g FROM generate_series(1, $rows / 2) g; "
		  . "SELECT event_store.flush(); "
		  . "INSERT INTO $table (context_id, n, v) SELECT 'c' || g % 10, g, 'v' || g FROM generate_series($rows / 2 + 1, $rows) g", $dbname);
	return;
}

sub content { my ($table, $dbname) = @_; return sql($node, "SELECT $sum FROM $table", $dbname); }

my $full = join('|', $rows, $rows * ($rows + 1) / 2, $rows / 10, $rows, 't');
my $none = '0||||';
$none = '0|||0|';

# name, statement, what the table TT holds afterwards (undef: there is none)
my @changes = (
	[ 'truncate', 'TRUNCATE TT', $none ],
	[ 'drop', 'DROP TABLE TT', undef ],
	[ 'to heap', 'ALTER TABLE TT SET ACCESS METHOD heap', $full ],
	[ 'rewrite', 'ALTER TABLE TT ALTER COLUMN n TYPE bigint', $full ],
	[ 'vacuum full', 'VACUUM FULL TT', $full, 'alone' ],
	[ 'tablespace', 'ALTER TABLE TT SET TABLESPACE other', $full ],
	[ 'truncate and insert', q{TRUNCATE TT; INSERT INTO TT (context_id, n, v) SELECT 'c' || g % 10, g, 'v' || g FROM generate_series(1, 300) g}, $full ],
	[ 'rewrite and insert', q{ALTER TABLE TT ALTER COLUMN n TYPE bigint; INSERT INTO TT (context_id, n, v) VALUES ('c0', 301, 'v301')},
		join('|', $rows + 1, ($rows + 1) * ($rows + 2) / 2, $rows / 10 + 1, $rows + 1, 't') ],
	[ 'savepoint', q{SAVEPOINT a; TRUNCATE TT; ROLLBACK TO a; SAVEPOINT b; ALTER TABLE TT ALTER COLUMN n TYPE bigint; RELEASE b}, $full ],
	[ 'drop and make again', q{DROP TABLE TT; CREATE TABLE TT (position bigint, context_id text, version bigint, n int, v text) USING event_store}, $none ]);

# Each has a table of its own, t0, t1 …, so that one crash is a crash for all.
sub each_change
{
	my ($do, $with_alone) = @_;

	foreach my $i (0 .. $#changes)
	{
		my ($name, $statement, $after, $alone) = @{ $changes[$i] };
		next if $alone && !$with_alone;
		$do->("t$i", $name, $statement =~ s/\bTT\b/t$i/gr, $after, $alone);
	}
	return;
}

sub is_content
{
	my ($table, $expected, $name) = @_;
	if (defined $expected) { is(content($table), $expected, $name); }
	else { is(sql($node, "SELECT to_regclass('$table') IS NULL"), 't', $name); }
	return;
}

make("t$_") foreach 0 .. $#changes;
each_change(sub {
	my ($table, $name, $statement) = @_;
	sql($node, "BEGIN; $statement; ROLLBACK");
	is_content($table, $full, "$name: rolled back");
	my (undef, undef, $err) = try_sql($node, "BEGIN; $statement; SELECT 1 / 0; COMMIT");
	like($err, qr/22012/, "$name: a later statement fails");
	is_content($table, $full, "$name: failed");
});

# a crash before the end of the transaction
my @sessions;
each_change(sub {
	my ($table, $name, $statement) = @_;
	push @sessions, $node->background_psql('postgres', on_error_stop => 0);
	$sessions[-1]->query_safe("BEGIN; $statement");
});
sql($node, 'SELECT pg_switch_wal()');
kill_all($node);
eval { $_->quit } foreach @sessions;
crash_restart($node);
each_change(sub {
	my ($table, $name) = @_;
	is_content($table, $full, "$name: a crash before its commit");
});
# and it goes on
each_change(sub {
	my ($table, $name) = @_;
	sql($node, "INSERT INTO $table (context_id, n, v) VALUES ('c1', 0, 'v0')");
	is(sql($node, "SELECT count(*), max(version) FROM $table"), ($rows + 1) . '|' . ($rows / 10 + 1), "$name: and it goes on");
	sql($node, "DROP TABLE $table");
	make($table);
});

foreach my $checkpoint (0, 1)
{
	each_change(sub {
		my ($table, $name, $statement, $after, $alone) = @_;
		sql($node, $alone ? $statement : "BEGIN; $statement; COMMIT");
		is_content($table, $after, "$name: committed");
	}, 1);
	sql($node, 'CHECKPOINT') if $checkpoint;
	kill_all($node);
	crash_restart($node);
	each_change(sub {
		my ($table, $name, $statement, $after) = @_;
		is_content($table, $after, "$name: a crash after its commit");
		sql($node, "DROP TABLE IF EXISTS $table");
		make($table) if !$checkpoint;
	}, 1);
}

# ---- a statement that fails in its middle

make('t');
my (undef, undef, $err) = try_sql($node, 'ALTER TABLE t ALTER COLUMN v TYPE int USING (CASE WHEN n < 250 THEN n ELSE 1 / (n - n) END)');
like($err, qr/22012/, 'a rewrite fails at its 250th row');
is_content('t', $full, 'rewrite that failed midway');
(undef, undef, $err) = try_sql($node, 'CREATE TABLE half USING event_store AS SELECT context_id, 1 / (n - 200) AS q FROM t ORDER BY n');
like($err, qr/22012/, 'CREATE TABLE AS fails in its middle');
is(sql($node, q{SELECT to_regclass('half') IS NULL}), 't', 'and leaves no table');

# ---- SET ACCESS METHOD both ways keeps positions and versions

my $before = sql($node, 'SELECT md5(string_agg(t::text, chr(10) ORDER BY position)) FROM t');
sql($node, 'ALTER TABLE t SET ACCESS METHOD heap');
is(sql($node, 'SELECT md5(string_agg(t::text, chr(10) ORDER BY position)) FROM t'), $before, 'to heap: all the same');
sql($node, 'ALTER TABLE t SET ACCESS METHOD event_store');
is(sql($node, 'SELECT md5(string_agg(t::text, chr(10) ORDER BY position)) FROM t'), $before, 'and back: all the same');
sql($node, q{INSERT INTO t (context_id, n, v) VALUES ('c0', 1000, 'v1000')});
is(sql($node, 'SELECT version = 31 AND position = (SELECT max(position) FROM t) FROM t WHERE n = 1000'), 't', 'it goes on behind them');

# ---- databases

sql($node, 'CREATE DATABASE d1');
sql($node, 'CREATE EXTENSION event_store', 'd1');
make('t', 'd1');
sql($node, 'CREATE DATABASE empty_one');
sql($node, 'CREATE EXTENSION event_store; CREATE TABLE t (context_id text, version bigint, n int) USING event_store', 'empty_one');

(undef, undef, $err) = try_sql($node, 'CREATE DATABASE d2 TEMPLATE d1');
like($err, qr/ERROR:  0A000:.*d1/s, 'a template whose event tables hold rows is refused');
# PostgreSQL's own refusals come first, and a shard that cannot answer is asked only if there are event tables
sql($node, 'CREATE ROLE clerk; CREATE ROLE builder CREATEDB');
(undef, undef, $err) = try_sql($node, 'SET ROLE clerk; CREATE DATABASE d2 TEMPLATE d1');
like($err, qr/ERROR:  42501:.*permission denied to create database/s, 'not before privileges are checked');
(undef, undef, $err) = try_sql($node, 'SET ROLE builder; CREATE DATABASE d2 TEMPLATE d1');
like($err, qr/ERROR:  42501:.*permission denied to copy database/s, 'of the template, too');
sql($node, 'SELECT event_store.pause_shard(1)');
{
	local $ENV{PGOPTIONS} = '-c statement_timeout=120s';
	(undef, undef, $err) = try_sql($node, 'CREATE DATABASE d2');
}
is($err, '', 'a paused shard is not waited for');
sql($node, 'DROP DATABASE d2');
(undef, undef, $err) = try_sql($node, "CREATE DATABASE d2 TEMPLATE empty_one");
like($err, qr/ERROR:  55000:.*cannot tell.*empty_one.*Shard 1 is paused/s, 'if the template has event tables it is said which one');
sql($node, 'SELECT event_store.resume_shard(1)');
# rows that come while CREATE DATABASE waits for others to leave the template
{
	my $other = $node->background_psql('empty_one', on_error_stop => 0);
	$other->query_safe('CREATE TABLE late (context_id text) USING event_store');
	my $run = IPC::Run::start([ 'psql', '-Xq', '-d', $node->connstr('postgres'), '-c', 'CREATE DATABASE d2 TEMPLATE empty_one' ],
		'>', \my $out, '2>', \my $refusal, IPC::Run::timeout(180));
	ok($node->poll_query_until('postgres', q{SELECT count(*) > 0 FROM pg_locks WHERE locktype = 'object' AND classid = 'pg_database'::regclass AND mode = 'ShareLock' AND granted}),
		'CREATE DATABASE waits');
	$other->query_safe(q{INSERT INTO late VALUES ('x')});
	$other->quit;
	$run->finish;
	like($refusal, qr/ERROR:  cannot create a database from template "empty_one"/, 'and refuses then');
	sql($node, 'DROP DATABASE empty_one');
	sql($node, 'CREATE DATABASE empty_one');
	sql($node, 'CREATE EXTENSION event_store; CREATE TABLE t (context_id text, version bigint, n int) USING event_store', 'empty_one');
}
sql($node, 'CREATE DATABASE d2 TEMPLATE empty_one');
sql($node, q{INSERT INTO t VALUES ('x', NULL, 1), ('x', NULL, 2)}, 'd2');
is(sql($node, 'SELECT count(*), max(version) FROM t', 'd2'), '2|2', 'a copy of an empty one has storages of its own');
is(sql($node, 'SELECT count(*) FROM t', 'empty_one'), '0', 'the template stays empty');
sql($node, q{INSERT INTO t VALUES ('x', NULL, 1)}, 'empty_one');
is(sql($node, 'SELECT count(*), max(version) FROM t', 'd2'), '2|2', 'and each has its own rows');

sql($node, 'ALTER DATABASE d1 SET TABLESPACE other');
is(content('t', 'd1'), $full, 'ALTER DATABASE SET TABLESPACE');
kill_all($node);
crash_restart($node);
is(content('t', 'd1'), $full, 'and a crash');
sql($node, q{INSERT INTO t (context_id, n, v) VALUES ('c1', 0, 'v0')}, 'd1');
is(sql($node, 'SELECT count(*) FROM t', 'd1'), $rows + 1, 'it goes on');
sql($node, 'ALTER DATABASE d1 RENAME TO d3');
is(sql($node, 'SELECT count(*) FROM t', 'd3'), $rows + 1, 'RENAME');
sql($node, 'DROP DATABASE d3');
sql($node, 'DROP DATABASE empty_one');
kill_all($node);
crash_restart($node);
is(sql($node, 'SELECT count(*) FROM t', 'd2'), '2', 'other databases keep theirs');

# DROP DATABASE that fails: somebody is connected
my $guest = $node->background_psql('d2', on_error_stop => 0);
(undef, undef, $err) = try_sql($node, 'DROP DATABASE d2');
like($err, qr/55006/, 'DROP DATABASE fails while somebody is connected');
is($guest->query_safe('SELECT count(*) FROM t'), '2', 'and nothing has happened');
$guest->quit;

# ---- statements about databases that are cut off in their middle, by a cancel or by a crash

sub files_are_named
{
	my ($name) = @_;
	my ($files, $named) = (0, -1);
	foreach (1 .. 300)
	{
		$files = () = glob($node->data_dir . '/event_store/shard_*/seg.*');
		$named = sql($node, 'SELECT sum(segments) FROM event_store.stat_shards');
		last if $files == $named;
		sleep 0.2;
	}
	is($files, $named, "$name: no file is left over");
	return;
}

# Runs a statement until $reached->(), and ends it there. What it said. $undo: before it is tried again if it was quicker than we.
sub cut_off
{
	my ($how, $statement, $reached, $undo) = @_;
	my ($s, $pid);

	foreach my $try (1 .. 10)
	{
		$s = $node->background_psql('postgres', on_error_stop => 0);
		$pid = $s->query_safe('SELECT pg_backend_pid()');
		my $end = time() + 60;
		$s->query_until(qr/begins/, "\\echo begins\n$statement;\n\\echo ended\n");
		sleep 0.002 until $reached->() || time() > $end;
		kill 'STOP', $pid;
		last unless $undo;
		foreach (1 .. 20) { $s->{run}->pump_nb; sleep 0.01; }
		last unless $s->{stdout} =~ /^ended/m;
		kill 'CONT', $pid;
		$s->quit;
		sql($node, $undo);
	}
	if ($how eq 'crash')
	{
		kill_all($node);
		eval { $s->quit };
		crash_restart($node);
		return '';
	}
	# nothing is asked of the server meanwhile: who stands still may hold any lock
	kill 'INT', $pid;
	kill 'CONT', $pid;
	$s->query_until(qr/ended/, '');
	my $said = $s->{stderr};
	$s->{stderr} = '';
	$s->quit;
	return $said;
}

sub directories { my @d = map { glob($node->data_dir . "/$_") } 'base/[0-9]*', 'pg_tblspc/*/PG_*/[0-9]*'; return scalar(@d); }

sub database { my ($name) = @_; return sql($node, "SELECT count(*) || coalesce(max(spcname), '') FROM pg_database d JOIN pg_tablespace s ON s.oid = d.dattablespace WHERE datname = '$name'"); }

# enough for the copy to take a while
sql($node, 'CREATE DATABASE mould');
sql($node, 'CREATE EXTENSION event_store; CREATE TABLE t (position bigint, context_id text, version bigint, n int, v text) USING event_store', 'mould');
sql($node, q{CREATE TABLE ballast AS SELECT repeat(md5(g::text), 60) AS v FROM generate_series(1, 1) g; ALTER TABLE ballast ALTER v SET STORAGE external;
	INSERT INTO ballast SELECT repeat(md5(g::text), 60) FROM generate_series(1, 80000) g}, 'mould');
sub fill { my ($dbname) = @_; sql($node, q{INSERT INTO t (context_id, n, v) SELECT 'c' || g % 10, g, 'v' || g FROM generate_series(1, 300) g}, $dbname); return; }

foreach my $how ('cancel', 'crash')
{
	foreach my $strategy ('file_copy', 'wal_log')
	{
		my $name = "CREATE DATABASE, $strategy, $how";
		sql($node, 'CHECKPOINT');
		my $directories = directories();
		my $said = cut_off($how, "CREATE DATABASE big TEMPLATE mould STRATEGY $strategy", sub { directories() > $directories }, 'DROP DATABASE big');
		like($said, qr/canceling statement/, "$name: it ended in its middle") if $how eq 'cancel';
		is(database('big'), '0', "$name: there is no database");
		is(sql($node, 'SELECT count(*) FROM t', 'mould'), '0', "$name: the template is empty");
		sql($node, "CREATE DATABASE big TEMPLATE mould STRATEGY $strategy");
		fill('big');
		is(content('t', 'big'), $full, "$name: made again, it takes events");
		is(sql($node, 'SELECT count(*) FROM t', 'mould'), '0', "$name: which are its own");
		sql($node, 'DROP DATABASE big');
	}
	sql($node, 'CREATE DATABASE big TEMPLATE mould');
	sql($node, q{INSERT INTO t (context_id, n, v) SELECT 'c' || g % 10, g, 'v' || g FROM generate_series(1, 150) g; SELECT event_store.flush();
		INSERT INTO t (context_id, n, v) SELECT 'c' || g % 10, g, 'v' || g FROM generate_series(151, 300) g}, 'big');

	my $name = "ALTER DATABASE SET TABLESPACE, $how";
	my $directories = directories();
	my $said = cut_off($how, 'ALTER DATABASE big SET TABLESPACE other', sub { directories() > $directories }, 'ALTER DATABASE big SET TABLESPACE pg_default');
	like($said, qr/canceling statement/, "$name: it ended in its middle") if $how eq 'cancel';
	is(database('big'), '1pg_default', "$name: the database is where it was");
	is(content('t', 'big'), $full, "$name: with its events");
	# what PostgreSQL leaves of a copy that was cut off by a crash is in the way of the next
	remove_tree($_) foreach $how eq 'crash' ? glob($node->data_dir . '/pg_tblspc/*/PG_*/' . sql($node, q{SELECT oid FROM pg_database WHERE datname = 'big'})) : ();
	sql($node, 'ALTER DATABASE big SET TABLESPACE other');
	is(content('t', 'big'), $full, "$name: again, and it is moved");
	is(database('big'), '1other', "$name: to the other one");

	# DROP DATABASE waits for a checkpoint in its middle: the database is there, but nobody can connect to it
	$name = "DROP DATABASE, $how";
	my $checkpointer = sql($node, q{SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'});
	# what was dropped before is collected first, also if a crash made the hint forgotten: from then on only what somebody has is there
	sql($node, 'CREATE TABLE hint (context_id text) USING event_store; DROP TABLE hint');
	my $left = sql($node, 'SELECT count(*) FROM t') + sql($node, 'SELECT count(*) FROM t', 'd2') + $rows;
	ok($node->poll_query_until('postgres', "SELECT sum(memtable_rows + segment_rows) = $left FROM event_store.stat_shards"), "$name: what was dropped before is collected")
	  or diag(sql($node, 'SELECT * FROM event_store.stat_shards'));
	kill 'STOP', $checkpointer;
	$said = cut_off($how, 'DROP DATABASE big',
		sub { sql($node, q{SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'DROP DATABASE big%' AND wait_event LIKE 'Checkpoint%'}) });
	kill 'CONT', $checkpointer;
	like($said, qr/canceling statement/, "$name: it ended in its middle") if $how eq 'cancel';
	is(database('big'), '1other', "$name: the database is still named");
	my (undef, undef, $err) = try_sql($node, 'SELECT 1', dbname => 'big');
	like($err, qr/cannot connect to invalid database/, "$name: but cannot be used");
	is(sql($node, 'SELECT sum(memtable_rows + segment_rows) FROM event_store.stat_shards'), $left, "$name: its events are kept");
	is(sql($node, 'SELECT count(*) FROM event_store.verify()'), '0', "$name: no damage");
	sql($node, 'DROP DATABASE big');
	is(database('big'), '0', "$name: again, and it is gone");
	files_are_named($name);
}
sql($node, 'DROP DATABASE mould');
is(sql($node, 'SELECT count(*) FROM t', 'd2'), '2', 'other databases keep theirs');

# ---- VACUUM FULL that is cut off when the new file is the table's already: missing values are next

make('vf');
sql($node, 'ALTER TABLE vf ADD COLUMN late int DEFAULT 7');
my $late = "SELECT $sum, min(late), max(late) FROM vf";
foreach my $how ('cancel', 'crash')
{
	my $holder = $node->background_psql('postgres', on_error_stop => 0);
	$holder->query_safe(q{BEGIN; SELECT attnum FROM pg_attribute WHERE attrelid = 'vf'::regclass AND attname = 'late' FOR UPDATE});
	my $said = cut_off($how, 'VACUUM FULL vf',
		sub { sql($node, q{SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'VACUUM FULL vf%' AND wait_event = 'transactionid'}) });
	like($said, qr/canceling statement/, 'VACUUM FULL is cancelled') if $how eq 'cancel';
	eval { $holder->quit };
	is(sql($node, $late), "$full|7|7", "VACUUM FULL, $how: the table is as it was");
}
sql($node, 'VACUUM FULL vf');
is(sql($node, $late), "$full|7|7", 'and again, to its end');
sql($node, 'DROP TABLE vf');

# ---- what belongs to nobody is collected, soon after a hint; the rest stays

sql($node, 'DROP DATABASE d2');
sql($node, 'DROP TABLE t');
make('keep');
my $kept_id = sql($node, q{SELECT storage_id FROM event_store.stat_tables WHERE store = 'keep'::regclass});
sql($node, 'ALTER TABLE keep SET TABLESPACE other');
sql($node, 'VACUUM FULL keep');
make('gone');
# half of it lies in segments, half in memory: own WAL has what continues the versions in the segments
sql($node, 'DROP TABLE gone');
ok($node->poll_query_until('postgres', "SELECT sum(segment_rows) + sum(memtable_rows) = $rows FROM event_store.stat_shards"), 'dropped storages are collected')
  or diag(sql($node, 'SELECT * FROM event_store.stat_segments'));
is(content('keep'), $full, 'what was moved to another tablespace and to another file is not');
is(sql($node, q{SELECT storage_id FROM event_store.stat_tables WHERE store = 'keep'::regclass}), $kept_id, 'and has the same storage');
files_are_named('collected');
crash_restart($node);
is(content('keep'), $full, 'also after a crash');
is(sql($node, 'SELECT count(*) FROM event_store.verify()'), '0', 'no damage');
$node->stop;
done_testing();
