# What PostgreSQL promises for a commit holds for an event-only transaction at an immediate stop, and what was in progress at a
# crash stays dead, also when its transaction ids are handed out again to transactions that commit.

use strict;
use warnings;
use EventStore::Server qw(new_server kill_all crash_restart wait_open sql try_sql set_conf signal_processes);
use Test::More;
use Time::HiRes qw(sleep);

my $node = new_server('edges', 'event_store.shards = 2', 'event_store.spill_after = 64kB', 'wal_writer_delay = 10s',
	'autovacuum = off', 'max_prepared_transactions = 5');
sql($node, <<'SQL');
CREATE TABLE ev (position bigint, context_id text, version bigint, n int, v text) USING event_store;
CREATE TABLE hp (n int);
SQL

# ---- an event-only transaction, acknowledged, and the server stops at once

foreach my $i (1 .. 3)
{
	sql($node, "INSERT INTO ev (context_id, n) SELECT 'only' || g % 7, g FROM generate_series(1, 50) g");
	if ($i == 2) { kill_all($node); }
	else { $node->stop('immediate'); }
	crash_restart($node);
	is( sql($node, q{SELECT sum(n), sum(p), bool_and(n = v) FROM (SELECT count(*) AS n, count(DISTINCT position) AS p, max(version) AS v
			FROM ev WHERE context_id LIKE 'only%' GROUP BY context_id) x}),
		join('|', 50 * $i, 50 * $i, 't'), "event-only commit, then an immediate stop ($i)");
}

# ---- transactions in progress at a crash: their ids come again, or do not, and their rows never do

my $dead = 0;
foreach my $how ('small', 'batches', 'spilled', 'savepoints', 'unflushed commit')
{
	# walwriter stands still and nobody else commits: what these log is not flushed
	signal_processes($node, 'STOP', 'walwriter') == 1 or die 'no walwriter';
	my @sessions = map { $node->background_psql('postgres', on_error_stop => 0) } 1 .. 3;
	my $highest = 0;
	foreach my $s (@sessions)
	{
		$s->query_safe('SET synchronous_commit = off');
		$s->query_safe('BEGIN');
		my $rows = $how eq 'batches' ? 3000 : $how eq 'spilled' ? 20000 : 5;
		$s->query_safe("INSERT INTO ev (context_id, n, v) SELECT 'dead' || g % 9, g, repeat('d', 30) FROM generate_series(1, $rows) g");
		$s->query_safe("SAVEPOINT s$_; INSERT INTO ev (context_id, n) VALUES ('dead$_', $_)") foreach $how eq 'savepoints' ? 1 .. 30 : ();
		my $xid = $s->query_safe('SELECT pg_current_xact_id()');
		$highest = $xid if $xid > $highest;
	}
	$sessions[0]->query_safe('COMMIT') if $how eq 'unflushed commit';
	my $seen = $how eq 'unflushed commit' ? 5 : 0;
	is($sessions[0]->query_safe(q{SELECT count(*) FROM ev WHERE context_id LIKE 'dead%'}) >= $seen ? 1 : 0, 1, "$how: rows are there before the crash");
	kill_all($node);
	eval { $_->quit } foreach @sessions;
	crash_restart($node);

	my $found = sql($node, q{SELECT count(*) FROM ev WHERE context_id LIKE 'dead%'}) - $dead;
	ok($found == 0 || ($how eq 'unflushed commit' && $found == 5), "$how: what was in progress is not there") or diag($found);
	$dead += $found;

	# ids go on; transactions that write no events, and others that do, take those that were in use
	my $first = sql($node, 'SELECT pg_current_xact_id()');
	sql($node, "INSERT INTO hp VALUES ($_)") foreach 1 .. 20;
	sql($node, "INSERT INTO ev (context_id, n) VALUES ('alive', $_); INSERT INTO hp VALUES ($_)") foreach 1 .. 20;
	my $last = sql($node, 'SELECT pg_current_xact_id()');
	note("$how: transaction ids up to $highest were in use, new ones are $first to $last");
	cmp_ok($first, '<=', $highest, "$how: ids that were in use are handed out again") if $how eq 'small' || $how eq 'unflushed commit';
	cmp_ok($last, '>', $highest, "$how: the ids have passed those of the crash");
	is(sql($node, q{SELECT count(*) FROM ev WHERE context_id LIKE 'dead%'}), $dead, "$how: dead rows stay dead");
	sql($node, 'SELECT event_store.flush()');
	is(sql($node, q{SELECT count(*) FROM ev WHERE context_id LIKE 'dead%'}), $dead, "$how: also after a flush");
	$node->stop('immediate');
	$node->start;
	is(sql($node, q{SELECT count(*) FROM ev WHERE context_id LIKE 'dead%'}), $dead, "$how: and after another crash");
	ok($node->poll_query_until('postgres', 'SELECT sum(staged_rows + pending_segments) = 0 FROM event_store.stat_shards'), "$how: nothing is kept of them");
}

# ---- positions are not handed out twice, whatever was lost

my $max = sql($node, 'SELECT max(position) FROM ev');
my $session = $node->background_psql('postgres', on_error_stop => 0);
$session->query_safe('SET synchronous_commit = off');
my %told;
foreach my $i (1 .. 30)
{
	$session->query_safe("INSERT INTO ev (context_id, n) VALUES ('told', $i)");
	$told{$_} = 1 foreach split /\n/, $session->query_safe("SELECT position FROM ev WHERE context_id = 'told' AND n = $i");
}
kill_all($node);
eval { $session->quit };
crash_restart($node);
sql($node, "INSERT INTO ev (context_id, n) SELECT 'new', g FROM generate_series(1, 100) g");
my @new = split /\n/, sql($node, q{SELECT position FROM ev WHERE context_id = 'new'});
is(scalar(grep { $told{$_} } @new), 0, 'no position that was seen before a crash is used again');
is(sql($node, q{SELECT count(*) FROM ev e WHERE position >= event_store.horizon('ev')}), '0', 'the horizon is above all');

# ---- PREPARE TRANSACTION with events is refused, and leaves nothing

my (undef, undef, $err) = try_sql($node, "BEGIN; INSERT INTO ev (context_id, n) VALUES ('prepared', 1); PREPARE TRANSACTION 'p'");
like($err, qr/ERROR:  0A000/, 'PREPARE TRANSACTION is refused');
is(sql($node, q{SELECT count(*) FROM ev WHERE context_id = 'prepared'; SELECT count(*) FROM pg_prepared_xacts}), "0\n0", 'and nothing is left');
$node->stop;
done_testing();
