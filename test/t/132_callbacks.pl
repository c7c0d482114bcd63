# An error after this store's part of COMMIT, from NOTIFY or from the callback of another library, aborts all of the transaction.
# Events that another library's callback inserts before our part belong to the transaction; behind it they are an error, never lost.

use strict;
use warnings;
use EventStore::Server qw(new_server crash_restart wait_open set_conf sql try_sql);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = new_server('callbacks', 'event_store.shards = 2', 'event_store.spill_after = 64kB', 'max_prepared_transactions = 2');
sql($node, <<'SQL');
CREATE TABLE ev (position bigint, context_id text, version bigint, n int) USING event_store;
CREATE TABLE plain (context_id text, n int) USING event_store;
CREATE TABLE hp (n int);
SQL
my ($events, $heap) = (0, 0);

# Both sides have what was committed, nobody holds the horizon, versions have no gap, the next writer does not wait.
sub whole
{
	my ($name) = @_;
	my $begin = time();
	is( sql($node, <<'SQL'), $events . '|' . $heap, "$name: what is there is what was committed");
SELECT (SELECT count(*) FROM ev), (SELECT count(*) FROM hp)
SQL
	is( sql($node, q{INSERT INTO ev (context_id, n) VALUES ('a', 0), ('b', 0); SELECT event_store.horizon('ev') > max(position) FROM ev}), 't',
		"$name: the horizon passes");
	$events += 2;
	is( sql($node, q{SELECT count(*) FROM (SELECT version, row_number() OVER (PARTITION BY context_id ORDER BY position) AS n FROM ev) x WHERE n <> version}),
		'0', "$name: versions have no gap");
	cmp_ok(time() - $begin, '<', 60, "$name: nobody waits");
	return;
}

# A transaction that writes both, of a size, with something in it; its error.
sub both
{
	my ($size, $more) = @_;
	my (undef, undef, $err) = try_sql($node, <<"SQL");
BEGIN;
INSERT INTO ev (context_id, n) SELECT 'a' || g % 3, g FROM generate_series(1, $size) g;
INSERT INTO hp VALUES ($size);
$more
COMMIT;
SQL
	if ($err eq '')
	{
		$events += $size;
		$heap++;
	}
	return $err;
}

# ---- NOTIFY: its queue is written between our part and the commit record

is(both(3, q{NOTIFY channel, 'one';}), '', 'NOTIFY');
my $listener = $node->background_psql('postgres');
$listener->query_safe('LISTEN channel; BEGIN; SELECT 1');
is(both(1, q{SELECT pg_notify('channel', g::text) FROM generate_series(1, 1000) g;}), '', 'many notifications, while somebody listens');
$listener->query_safe('COMMIT');
$listener->quit;
whole('NOTIFY that works');

foreach my $size (2, 9000)
{
	# a serialization failure of PostgreSQL's own check, with a notification pending
	my @s = map { $node->background_psql('postgres', on_error_stop => 0) } 1, 2;
	$_->query_safe('BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT count(*) FROM hp; SELECT count(*) FROM ev') foreach @s;
	my $failed = 0;
	$s[$_]->query_safe("INSERT INTO hp VALUES ($_); INSERT INTO ev (context_id, n) SELECT 's$_' || g % 3, g FROM generate_series(1, $size) g; NOTIFY channel, 'serializable'")
	  foreach 0, 1;
	foreach my $s (@s)
	{
		$s->query('COMMIT');
		$failed++ if $s->{stderr} =~ /could not serialize/;
		$s->{stderr} = '';
		$s->quit;
	}
	is($failed, 1, "serialization failure of one of two, with NOTIFY, $size rows");
	$events += $size;
	$heap++;
	whole("serialization failure with NOTIFY, $size rows");
}

# the queue's file cannot be made
my $queue = $node->data_dir . '/pg_notify';
SKIP:
{
	skip 'the superuser may write everywhere', 1 if $> == 0;
	$node->restart;    # the first page is written anew
	is(both(1, q{NOTIFY channel, 'first page';}), '', 'NOTIFY after a restart');
	chmod(0500, $queue) or die "chmod: $!";
	unlink($_) foreach glob("$queue/*");
	my $err = '';
	# pages go from its buffers to files when others need the buffers
	foreach my $try (1 .. 40)
	{
		$err = both(2, q{SELECT pg_notify('channel', repeat('x', 7000) || g) FROM generate_series(1, 60) g;});
		last if $err ne '';
	}
	like($err, qr/pg_notify.*Permission denied|could not access status/, 'the queue of NOTIFY cannot be written');
	chmod(0700, $queue);
	whole('an error of NOTIFY');
	$node->restart;
	whole('an error of NOTIFY, after a restart');
}

# ---- another library

foreach my $order ('commit_callback, event_store', 'event_store, commit_callback')
{
	my $after = $order =~ /^commit/;
	my $when = $after ? 'behind our part' : 'before our part';
	set_conf($node, "shared_preload_libraries = '$order'");
	$node->restart;
	wait_open($node);

	foreach my $size (1, 9000)
	{
		my $err = both($size, q{SET LOCAL commit_callback.statement = 'SELECT 1 / 0';});
		like($err, qr/22012/, "a callback $when fails, $size rows");
		whole("a callback $when fails, $size rows");

		$err = both($size, q{SET LOCAL commit_callback.statement = 'INSERT INTO hp VALUES (-1)';});
		is($err, '', "a callback $when writes to the heap, $size rows");
		$heap++;
		whole("a callback $when writes to the heap, $size rows");

		$err = both($size, q{SET LOCAL commit_callback.statement = $$INSERT INTO ev (context_id, n) VALUES ('callback', 1), ('a1', 1)$$;});
		if ($after) { like($err, qr/25000: cannot insert into table "ev" while the transaction commits/, "a callback $when inserts events, $size rows: an error"); }
		else
		{
			is($err, '', "a callback $when inserts events, $size rows");
			$events += 2;
		}
		whole("a callback $when inserts events, $size rows");
	}

	# a transaction that had no events before
	my $insert = q{SET LOCAL commit_callback.statement = $$INSERT INTO ev (context_id, n) VALUES ('callback', 2)$$;};
	foreach my $end ('COMMIT', q{PREPARE TRANSACTION 'p'})
	{
		my (undef, undef, $err) = try_sql($node, "BEGIN; INSERT INTO hp VALUES (0); $insert $end");
		if ($after) { like($err, qr/25000: cannot insert into table "ev"/, "the first events of a transaction, $when, $end: an error"); }
		elsif ($end eq 'COMMIT')
		{
			is($err, '', "the first events of a transaction, $when");
			$events++;
			$heap++;
		}
		else { like($err, qr/0A000: cannot PREPARE/, "the first events of a transaction, $when, $end: refused as ever"); }
		whole("the first events of a transaction, $when, $end");
	}
	is(sql($node, 'SELECT count(*) FROM pg_prepared_xacts'), '0', 'nothing is left prepared');
	# one that only read
	my (undef, undef, $err) = try_sql($node, "BEGIN; SELECT count(*) FROM ev; $insert COMMIT");
	if ($after) { like($err, qr/25000/, "a transaction that only read, $when: an error"); }
	else
	{
		is($err, '', "a transaction that only read, $when");
		$events++;
	}
	whole("a transaction that only read, $when");
	# the session goes on after such an error
	is( sql($node, q{\set ON_ERROR_STOP 0
BEGIN; SET LOCAL commit_callback.statement = 'SELECT 1 / 0'; INSERT INTO plain VALUES ('a', 1); COMMIT;
INSERT INTO plain VALUES ('a', 2);
SELECT count(*) FROM plain WHERE n = 2; TRUNCATE plain}), '1', 'the session can be used after it');
}
sql($node, 'SELECT event_store.flush()');
whole('flushed');
crash_restart($node);
whole('after a crash');
$node->stop;
done_testing();
