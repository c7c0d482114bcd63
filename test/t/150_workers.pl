# Shards, keeper and maintenance workers may end at any time: transactions under way go on and commit whole, sessions stay usable,
# PostgreSQL keeps the WAL that is needed, and a slot that somebody dropped is made anew or, when that is too late, missed.

use strict;
use warnings;
use EventStore::Clients;
use EventStore::Oracle;
use EventStore::Server qw(new_server kill_all crash_restart wait_open set_conf sql try_sql processes faults_compiled seed);
use EventStore::Workload;
use Test::More;
use Time::HiRes qw(sleep time);

seed();
my $node = new_server('workers', 'event_store.shards = 2', 'event_store.memtable_size = 1MB', 'event_store.spill_after = 64kB',
	'event_store.wal_file_size = 1MB', 'wal_writer_delay = 10s');
EventStore::Workload::setup($node);
my $workload = EventStore::Workload->new(large => 4000);
my $oracle = EventStore::Oracle->new;

# Ends processes, and waits until they are gone: who asks one that is about to end may lose the answer.
sub end_of
{
	my ($type) = @_;
	return sql($node, "SELECT count(pg_terminate_backend(pid, 60000)) FROM pg_stat_activity WHERE backend_type LIKE '$type'");
}

# A unit's transaction, statement by statement, with something happening before its COMMIT; which returns who may
# not have ended yet; $may_fail: what it may be told instead.
sub in_the_middle
{
	my ($name, $kind, $do, $may_fail) = @_;
	# append() would hold locks that the others' COMMIT waits for
	local $workload->{no_append} = 1;
	my @units;
	while (@units < 3)
	{
		my $unit = $workload->unit($kind);
		push @units, $unit if $unit->{wants} eq 'commit';
	}
	my @sessions = map { $node->background_psql('postgres', on_error_stop => 0) } @units;

	foreach my $i (0 .. $#units)
	{
		my $body = $units[$i]{sql} =~ s/COMMIT;\n$//r;
		$oracle->begins($units[$i], 1);
		$units[$i]{sent} = time();
		$sessions[$i]->query_safe($body);
	}
	my @ending = $do->();
	foreach my $i (0 .. $#units)
	{
		my $s = $sessions[$i];
		my $n = $s->query('SELECT count(*) FROM ev');
		$s->query('COMMIT');
		my $failed = $s->{stderr} =~ /ERROR|FATAL/;
		is($failed && !($may_fail && $s->{stderr} =~ $may_fail) ? $s->{stderr} : '', '',
			"$name: transaction $i commits" . ($may_fail ? ', or is told that the answer is lost' : ''));
		$units[$i]{lines} = [ $failed ? 'ERROR: ' : 'COMMIT' ];
		$s->{stderr} = '';
		$units[$i]{ended} = time();
		$oracle->ends($units[$i]);
		is($s->query('SELECT 1'), '1', "$name: session $i can be used");
		$s->quit;
	}
	my $end = time() + 60;
	sleep 0.05 while time() < $end && grep { -d "/proc/$_" } @ending;
	ok(wait_open($node), "$name: shards are open");
	is($oracle->check($node), '', "$name: the oracle agrees");
	return;
}

# ---- shards

foreach my $kind (qw(savepoints slow_bulk many_streams huge))
{
	$workload->{weights} = undef;
	in_the_middle("$kind, shards terminated", $kind, sub { end_of('event_store shard%'); return (); });
}
in_the_middle('shards terminated five times', 'savepoints', sub { foreach (1 .. 5) { end_of('event_store shard%'); sleep 0.2; } return (); });
in_the_middle('shards terminated, committed at once', 'mixed', sub {
	my @pids = processes($node, 'event_store shard%');
	kill 'TERM', @pids;
	return @pids;
}, qr/ERROR: .*shard \d was restarted/);

# under load, with large transactions open meanwhile
my $clients = EventStore::Clients->new(
	node => $node, n => 5,
	next => sub { my $unit = $workload->unit; $oracle->begins($unit, 1); return $unit; },
	done => sub { my ($c, $unit) = @_; $oracle->ends($unit); });
my $next = time() + 0.5;
my $ended = 0;
my $until = time() + 6;
$clients->run(seconds => 120, tick => sub {
	return 0 if time() > $until && $ended > 5;
	if (time() > $next)
	{
		$ended += end_of(rand() < 0.7 ? 'event_store shard ' . int(rand(2)) : rand() < 0.5 ? 'event_store maintenance%' : 'event_store keeper');
		$next = time() + 0.4;
	}
	return 1;
});
$clients->drain(seconds => 240);
$clients->close_all;
ok(wait_open($node), 'open after the load');
cmp_ok($ended, '>', 5, "$ended workers were terminated");
is($oracle->check($node), '', 'workers terminated under load: the oracle agrees');
my $lost = grep { $_->{lost} } values %{ $oracle->{units} };
is($lost, 0, 'no session was lost');

# ---- a shard that stands still holds up only those who need it

my ($stopped) = processes($node, 'event_store shard 0');
my @contexts = map { sql($node, "SELECT 'c' || g FROM generate_series(1, 100) g WHERE event_store.shard_of('c' || g, 'ev') = $_ LIMIT 1") } 0, 1;
kill 'STOP', $stopped;
my $begin = time();
my ($status, $out, $err) = try_sql($node, "BEGIN; INSERT INTO ev (context_id, tid, ord) VALUES ('$contexts[1]', 0, 1); ROLLBACK; "
	  . "SELECT count(*) FROM event_store.replay('$contexts[1]', store => 'ev')");
is($err, '', 'the other shard takes and answers');
cmp_ok(time() - $begin, '<', 60, 'at once');
($status, $out, $err) = try_sql($node, "SET statement_timeout = '1s'; SELECT count(*) FROM ev WHERE context_id = '$contexts[0]'");
like($err, qr/57014/, 'who needs the one that stands still waits, and can be cancelled');
kill 'CONT', $stopped;
is($oracle->check($node), '', 'and on it goes');

# ---- a backend that stands still between logging and sending: the WAL that it logged is kept, however much comes behind it, and
# it commits whole when it goes on, although its shards are others by then

sub restart_lsn_below { my ($lsn) = @_; return sql($node, "SELECT restart_lsn < '$lsn' FROM pg_replication_slots WHERE slot_name = 'event_store'"); }

SKIP:
{
	skip 'no fault points in this build', 1 unless faults_compiled($node);
	foreach my $point (qw(append-after-log commit-after-log channel-before-flush))
	{
		# without versions: nobody is asked, and nobody waits for a lock of the one that stands still
		my $unit = $workload->begin_unit('stopped');
		my $s = $node->background_psql('postgres', on_error_stop => 0);
		my $look = $point eq 'append-after-log' ? "SELECT count(*) FROM pl;\n" : '';
		$unit->{block} = 1;
		$unit->{sql} = "BEGIN;\n" . $workload->insert_hp($unit) . $workload->insert_pl($unit, 40) . $look . $workload->insert_pl($unit, 3) . "COMMIT;\n";
		$s->query_safe('SELECT count(*) FROM pl');
		my $pid = $s->query_safe('SELECT pg_backend_pid()');
		$oracle->begins($unit, 1);
		$unit->{sent} = time();
		sql($node, "SELECT event_store_test.inject_fault('$point', 'sleep')");
		$s->query_until(qr/started/, "\\echo started\n$unit->{sql}\n\\echo finished\n");
		ok($node->poll_query_until('postgres', "SELECT event_store_test.fault_hits('$point') > 0"), "it has come to $point");
		kill 'STOP', $pid;
		# its message ends before
		my $lsn = sql($node, 'SELECT event_store_test.disarm_faults(), pg_current_wal_insert_lsn()') =~ s/^\|//r;
		my $load = EventStore::Clients->new(
			node => $node, n => 2,
			next => sub { my $u = $workload->unit('single'); $oracle->begins($u, 1); return $u; },
			done => sub { my ($c, $u) = @_; $oracle->ends($u); });
		my $done = $oracle->{counts}{committed};
		$load->run(seconds => 120, tick => sub { return $oracle->{counts}{committed} - $done <= 20; });
		$load->drain(seconds => 240);
		$load->close_all;
		cmp_ok($oracle->{counts}{committed} - $done, '>', 20, "stopped at $point: others commit");
		sql($node, 'SELECT event_store.sync()');
		sql($node, 'SELECT pg_switch_wal()');
		sql($node, 'CHECKPOINT');
		is(restart_lsn_below($lsn), 't', "stopped at $point: what it logged is kept");
		end_of('event_store shard%');
		ok(wait_open($node), "stopped at $point: shards that were terminated are open");
		sql($node, 'SELECT event_store.sync()');
		is(restart_lsn_below($lsn), 't', "stopped at $point: it is kept by new shards, too");
		kill 'CONT', $pid;
		$s->query_until(qr/finished/, '');
		$unit->{ended} = time();
		$unit->{lines} = [ $s->{stderr} =~ /ERROR|FATAL/ ? 'ERROR' : 'COMMIT' ];
		$oracle->ends($unit);
		is($s->{stderr} =~ /ERROR|FATAL/ ? $s->{stderr} : '', '', "stopped at $point: it commits when it goes on");
		$s->quit;
		is($oracle->check($node), '', "stopped at $point: the oracle agrees");
		ok($node->poll_query_until('postgres', "SELECT restart_lsn >= '$lsn' FROM pg_replication_slots WHERE slot_name = 'event_store'"),
			"stopped at $point: then the WAL is let go");
		kill_all($node);
		$oracle->crashed;
		crash_restart($node);
		is($oracle->check($node), '', "stopped at $point: the oracle agrees after a crash");
	}
}

# ---- the slot

sub slot { return sql($node, q{SELECT count(*), bool_or(active), bool_or(restart_lsn IS NOT NULL) FROM pg_replication_slots WHERE slot_name = 'event_store'}); }

is(slot(), '1|t|t', 'the slot is there, and held');
$err = (try_sql($node, q{SELECT pg_drop_replication_slot('event_store')}))[2];
like($err, qr/55006/, 'it cannot be dropped while it is held');
# in the second between two keepers
my $dropped = 0;
foreach (1 .. 10)
{
	($status) = try_sql($node, <<'SQL');
DO $$
BEGIN
	PERFORM pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'event_store keeper';
	FOR i IN 1 .. 2000 LOOP
		BEGIN
			PERFORM pg_drop_replication_slot('event_store');
			RETURN;
		EXCEPTION WHEN object_in_use THEN
			PERFORM pg_sleep(0.001);
		END;
	END LOOP;
	RAISE 'the keeper was quicker';
END $$;
SQL
	if ($status == 0) { $dropped = 1; last; }
}
ok($dropped, 'it can be between two keepers');
ok($node->poll_query_until('postgres', q{SELECT count(*) = 1 FROM pg_replication_slots WHERE slot_name = 'event_store' AND active}),
	'dropped while the server runs: there is a new one');
ok($node->poll_query_until('postgres', q{SELECT bool_and(restart_lsn >= (SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'event_store')) FROM event_store.stat_shards}),
	'which keeps what the shards need');
crash_restart($node);
is($oracle->check($node), '', 'after the slot was dropped, and a crash: the oracle agrees');

# dropped while the server was down, after a clean stop: a clean shard needs no WAL
$node->stop;
rename($node->data_dir . '/pg_replslot/event_store', $node->data_dir . '/event_store.slot') or die "rename: $!";
$node->start;
ok(wait_open($node), 'slot gone after a clean stop: open');
is(slot(), '1|t|t', 'with a new slot');
is($oracle->check($node), '', 'the oracle agrees');

# and after a crash: refused, for WAL may be gone; it is not yet, so the slot put back makes all well
set_conf($node, "wal_keep_size = '2GB'");
$clients->run(seconds => 1);
kill_all($node);
$clients->abandon;
$oracle->crashed;
rename($node->data_dir . '/pg_replslot/event_store', $node->data_dir . '/event_store.slot2') or die "rename: $!";
$node->start;
for (1 .. 50)
{
	($status, $out, $err) = try_sql($node, "SET event_store.startup_timeout = '2s'; SELECT count(*) FROM ev");
	last if $err =~ /55000/;
	sleep 0.1;
}
like($err, qr/55000.*slot "event_store" is missing.*HINT:/s, 'slot gone after a crash: refused');
is(sql($node, 'SELECT count(*) > 0 FROM hp'), 't', 'the rest of the database works');
is(sql($node, q{SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'event_store'}), '0', 'and no slot is made that would hide it');
$node->stop('immediate');
rename($node->data_dir . '/event_store.slot2', $node->data_dir . '/pg_replslot/event_store') or die "rename: $!";
$node->start;
ok(wait_open($node), 'slot put back: open');
is($oracle->check($node), '', 'and nothing is lost');

# ---- WAL that is held back: no more than its own last second when events flow, 16 MB when quiet

# Bytes that the slot holds; and while events flow, those that are older than a second: where WAL ended a second ago.
sub held { return sql($node, q{SELECT pg_current_wal_lsn() - restart_lsn FROM pg_replication_slots WHERE slot_name = 'event_store'}); }
my $watch = $node->background_psql('postgres', on_error_stop => 0);
my @sorted;
# a machine that is busy with other things may make groups late: then once more
foreach (1 .. 5)
{
	my (@ends, @older);
	my $look = 0;
	$clients->run(seconds => 6, tick => sub {
		return 1 if time() < $look + 0.1;
		$look = time();
		my ($end, $restart) = split /\|/, $watch->query_safe(
			q{SELECT pg_current_wal_lsn() - '0/0'::pg_lsn, restart_lsn - '0/0'::pg_lsn FROM pg_replication_slots WHERE slot_name = 'event_store'});
		push @ends, [ $look, $end ];
		shift @ends while @ends > 1 && $ends[1][0] < $look - 1;
		push @older, $ends[0][1] - $restart if $ends[0][0] < $look - 1;
		return 1;
	});
	$clients->drain(seconds => 240);
	@sorted = sort { $a <=> $b } @older;
	last if @sorted > 10 && $sorted[ int(@sorted * 0.75) ] <= 0;
}
$watch->quit;
cmp_ok(scalar(@sorted), '>', 10, scalar(@sorted) . ' looks during the load');
cmp_ok($sorted[ int(@sorted * 0.75) ], '<=', 0, "three of four times nothing is held that is older than a second; at most $sorted[-1] bytes");
my $held = 1e12;
foreach (1 .. 300)
{
	$held = held();
	last if $held < 1024 * 1024;
	sleep 0.2;
}
cmp_ok($held, '<', 1024 * 1024, "after the load $held bytes are held");
sql($node, q{CREATE TABLE ballast (v text); ALTER TABLE ballast ALTER v SET STORAGE external; INSERT INTO ballast SELECT repeat(md5(g::text), 60) FROM generate_series(1, 30000) g});
$held = 1e12;
foreach (1 .. 300)
{
	$held = held();
	last if $held < 17 * 1024 * 1024;
	sleep 0.2;
}
cmp_ok($held, '<', 17 * 1024 * 1024, "a quiet store holds $held bytes after 60 MB of others' WAL");
$clients->close_all;
is($oracle->check($node), '', 'the oracle agrees');
$node->stop;
done_testing();
