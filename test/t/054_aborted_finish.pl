# A bulk load that aborts while its FINISH is applied in slices takes nothing from the one behind it: what was acknowledged is
# there, when the shard has recovered and after a restart.

use strict;
use warnings;
use EventStore::FlushLoad qw(flush_server);
use EventStore::Server qw(wait_open sql faults_compiled seed);
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep);

seed();
my $node = flush_server('aborted_finish', 'event_store.shards = 1', 'event_store.wal_sync_interval = 20s');
plan skip_all => 'no fault points in this build' unless faults_compiled($node);

my $rows = 4000;

sub session { return $node->background_psql('postgres', on_error_stop => 0); }

sub inject { return sql($node, "SELECT inject_fault('$_[0]', '$_[1]', " . ($_[2] // 1) . ')'); }

# Ends a sleep; nothing else is disarmed.
sub wake { return inject($_[0], 'kill', 1000000); }

sub wait_hit
{
	my ($point) = @_;
	return ok($node->poll_query_until('postgres', "SELECT fault_hits('$point') > 0"), "$point was passed");
}

# A transaction whose pending segments hold rows that are rolled back between others: FINISH has to read them.
sub load
{
	my ($name) = @_;
	my $s = session();
	my $before = sql($node, 'SELECT pending_segments FROM event_store.stat_shards');
	$s->query_safe(<<"SQL");
BEGIN;
DO \$\$ BEGIN
	FOR i IN 0 .. $rows / 100 - 1 LOOP
		INSERT INTO plain SELECT NULL, '$name' || g % 13, 100 * i + g, repeat('x', 60) FROM generate_series(1, 100) g;
		BEGIN
			INSERT INTO plain SELECT NULL, '$name' || g % 13, g, repeat('y', 60) FROM generate_series(1, 20) g;
			PERFORM count(*) FROM plain WHERE context_id = '';	-- sends them
			RAISE 'no';
		EXCEPTION WHEN raise_exception THEN NULL;
		END;
	END LOOP;
END \$\$;
SELECT count(*) FROM plain WHERE context_id = '';
SQL
	ok($node->poll_query_until('postgres', "SELECT pending_segments > $before FROM event_store.stat_shards"),
		"$name: its rows are in pending segments");
	return $s;
}

sub count { return sql($node, "SELECT count(*), count(position) FROM plain WHERE context_id LIKE '$_[0]%'"); }

sub both_are_right
{
	my ($aborted, $committed, $when) = @_;
	is(count($committed), "$rows|$rows", "$when: the acknowledged load is there");
	is(count($aborted), '0|0', "$when: the aborted one is not");
	return;
}

my $aborted = load('a');
my $committed = load('b');
# its FINISH is in PostgreSQL's WAL, and so is that of the one that commits behind it; the shard has neither
my $pid = $aborted->query_safe('SELECT pg_backend_pid()');
inject('commit-after-log', 'sleep');
$aborted->query_until(qr/begun/, "\\echo begun\nCOMMIT;\n");
wait_hit('commit-after-log');
sql($node, 'SELECT event_store.pause_shard(0)');
$committed->query_safe('COMMIT');
inject('adopt-finishing', 'sleep');
sql($node, q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE backend_type = 'event_store shard 0'});
wait_hit('adopt-finishing');
sql($node, "SELECT pg_terminate_backend($pid)");
wake('commit-after-log');
ok($node->poll_query_until('postgres', "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $pid"), 'it aborts while the shard recovers');
wake('adopt-finishing');
sql($node, 'SELECT event_store.resume_shard(0)');
ok(wait_open($node), 'the shard is open');
both_are_right('a', 'b', 'recovered');
eval { $aborted->quit };
$committed->quit;
sql($node, 'SELECT disarm_faults()');
$node->restart;
ok(wait_open($node), 'open after a restart');
both_are_right('a', 'b', 'restarted');
is(sql($node, 'SELECT count(*) FROM event_store.verify()'), '0', 'no file is damaged');
$node->stop;
done_testing();
