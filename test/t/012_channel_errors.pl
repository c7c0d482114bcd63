# Whatever ends a message early (cancel, time-out, an error, the end of the session or of the shard), nothing is
# half-sent, the session stays usable, and nobody waits for ever.

use strict;
use warnings;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

my $node = PostgreSQL::Test::Cluster->new('errors');
$node->init;
$node->append_conf('postgresql.conf', <<CONF);
shared_preload_libraries = 'event_store'
wal_level = replica
event_store.shards = 2
max_worker_processes = 16
max_connections = 100
CONF
$node->start;
$node->safe_psql('postgres', 'CREATE SCHEMA event_store_test; CREATE EXTENSION event_store_test');

my $faults = $node->safe_psql('postgres', 'SELECT event_store_test.fault_points_compiled()') eq 't';
my $long   = 3_000_000;                                                    # bytes: more than ten rings

sub run { return $node->safe_psql('postgres', "SET search_path = event_store_test, public; $_[0]"); }

# Output and error of a command in a session, without context lines.
sub attempt
{
	my ($session, $sql) = @_;
	my $out = $session->query($sql) // '';
	my $err = $session->{stderr};

	$session->{stderr} = '';
	return $err =~ /(ERROR|FATAL): +([0-9A-Z]{5}: )?(.*)/ ? "$2$3" : $out;
}

sub session
{
	my $s = $node->background_psql('postgres', on_error_stop => 0);

	$s->query_safe('\set VERBOSITY verbose');
	$s->query_safe('SET search_path = event_store_test, public');
	$s->query_safe('SELECT echo(0, 10), echo(1, 10)');
	return $s;
}

sub wait_for_wait
{
	my ($pid) = @_;

	return $node->poll_query_until('postgres',
		"SELECT wait_event_type = 'Extension' FROM pg_stat_activity WHERE pid = $pid");
}

my $s   = session();
my $pid = $s->query_safe('SELECT pg_backend_pid()');

sub is_usable
{
	my ($name) = @_;

	is(attempt($s, "SELECT echo(0, $long) > 0 AND echo(1, 1000) > 0"), 't', "$name: the session goes on");
	is(attempt($s, 'SELECT half_sent FROM channel(0)'), 'f', "$name: nothing is half-sent");
}

# A few milliseconds may be too short for RESET as well.
sub reset_timeout
{
	for (1 .. 1000)
	{
		attempt($s, 'RESET statement_timeout');
		last if attempt($s, 'SHOW statement_timeout') eq '0';
	}
	return;
}

# ---- cancel in the middle of a message

run('SELECT pause_shard(0, true)');
$s->query_until(qr/begin/, "\\echo begin\nSELECT echo(0, $long);\n\\echo end\n");
ok(wait_for_wait($pid), 'a sender without room waits');
is(run("SELECT pg_cancel_backend($pid)"), 't', 'cancelled');
$s->query_until(qr/end/, '');
like($s->{stderr}, qr/57014: canceling statement due to user request/, 'cancel is taken while a message streams');
$s->{stderr} = '';
is(attempt($s, 'SELECT half_sent FROM channel(0)'), 'f', 'the shard will be told to forget it');
run('SELECT pause_shard(0, false)');
is_usable('cancel');

# ---- the same by statement_timeout, and again and again, so that pieces of many messages follow each other

run('SELECT pause_shard(0, true)');
for my $i (1 .. 20)
{
	my $size = $long + $i * 1000;

	attempt($s, "SET statement_timeout = ${\(10 + $i)}; SELECT echo(0, $size)");
}
run('SELECT pause_shard(0, false)');
reset_timeout();
is_usable('many time-outs');
attempt($s, "SET statement_timeout = 3; SELECT echo(0, $long)") for 1 .. 50;
reset_timeout();
is_usable('many time-outs while the shard takes');

# ---- enqueue_timeout: with nothing half-sent

run('SELECT pause_shard(0, true)');
my $start = time;
is( attempt($s, "SET event_store.enqueue_timeout = '300ms'; SELECT echo(0, $long)"),
	'53000: shard 0 is busy', 'no room for enqueue_timeout');
cmp_ok(time - $start, '<', 25, 'in time, which is not the default of 30 s');
is(attempt($s, 'SELECT send_without_waiting(0, 100000, 10)'), '53000: shard 0 is busy', 'small messages, too');
is(attempt($s, 'SELECT hint(1)'), 't', 'another shard takes hints');
is(attempt($s, "SELECT count(*) FROM generate_series(1, 20000) WHERE NOT hint(0)") > 0, 1, 'a hint without room is not sent');
is(attempt($s, 'SELECT echo(1, 1000) > 0'), 't', 'another shard is not concerned');
my $t = $node->background_psql('postgres', on_error_stop => 0);
$t->query_safe('\set VERBOSITY verbose');
$t->query_safe("SET search_path = event_store_test, public; SET event_store.enqueue_timeout = '300ms'");
is(attempt($t, 'SELECT hint(0)'), 'f', 'a hint makes no connection');
is(attempt($t, 'SELECT echo(0, 1)'), '53000: shard 0 is busy', 'no connection to a shard that takes nothing');
run('SELECT pause_shard(0, false)');
attempt($t, 'RESET event_store.enqueue_timeout');
is(attempt($t, 'SELECT echo(0, 1) > 0'), 't', 'and then one');
$t->quit;
attempt($s, 'RESET event_store.enqueue_timeout');
is_usable('enqueue_timeout');
cmp_ok(run("SELECT shard_counter(0, 'queue_timeouts')"), '>=', 3, 'time-outs are counted');
cmp_ok(run("SELECT shard_counter(0, 'queue_full_wait_us')"), '>', 600000, 'and the time');

# ---- the end of a session in the middle of a message

run('SELECT pause_shard(0, true)');
my $victim = session_that_streams();
is(run("SELECT pg_terminate_backend($victim)"), 't', 'a session ends while it streams');
ok($node->poll_query_until('postgres', "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $victim"), 'gone');
run('SELECT pause_shard(0, false)');
is_usable('end of another session');

sub session_that_streams
{
	run('SELECT pause_shard(0, false)');
	my $v = session();
	my $p = $v->query_safe('SELECT pg_backend_pid()');

	run('SELECT pause_shard(0, true)');
	$v->query_until(qr/begin/, "\\echo begin\nSELECT echo(0, $long);\n");
	wait_for_wait($p);
	return $p;
}

# ---- the end of the shard while others wait for it

sub restart_shard
{
	my ($generation, $old) = split(/\|/, run('SELECT shard_generation, shard_pid(0) FROM channel(0), echo(0, 1)') =~ s/.*\n//sr);

	run("SELECT pg_terminate_backend($old)");
	return $node->poll_query_until('postgres',
		"SELECT event_store_test.shard_pid(0) NOT IN (0, $old) AND event_store_test.echo(0, 1) > 0");
}

my @waiting = map { session() } 1 .. 8;
run('SELECT pause_shard(0, true)');
for my $i (1 .. 8)
{
	# half of them wait for an answer, the others for room
	my $bytes = $i % 2 ? 100 : $long;

	$waiting[ $i - 1 ]->query_until(qr/begin/, "\\echo begin\nSELECT echo(0, $bytes);\n\\echo end\n");
}
my $old = run('SELECT shard_pid(0)');
ok( $node->poll_query_until('postgres',
		"SELECT count(*) = 8 FROM pg_stat_activity WHERE backend_type = 'client backend' AND wait_event_type = 'Extension' AND query LIKE '%echo(0, %'"),
	'eight sessions wait');
run("SELECT pg_terminate_backend($old)");
run('SELECT pause_shard(0, false)');
ok($node->poll_query_until('postgres', "SELECT event_store_test.shard_pid(0) NOT IN (0, $old)"), 'a new incarnation');
for my $i (1 .. 8)
{
	my $w = $waiting[ $i - 1 ];

	$w->query_until(qr/end/, '');
	if ($i % 2)
	{
		like($w->{stderr}, qr/57P03: shard 0 was restarted/, "session $i is told that its answer is lost");
	}
	else
	{
		is($w->{stderr} =~ s/WARNING.*\n//r, '', "session $i sends its message to the new incarnation");
	}
	$w->{stderr} = '';
	is(attempt($w, 'SELECT echo(0, 1000) > 0'), 't', "session $i goes on");
	$w->quit;
}
is_usable('restart');

# several times, under load
my $dir = PostgreSQL::Test::Utils::tempdir();
run(<<'SQL');
CREATE FUNCTION public.echo_or_restart(bytes bigint) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	PERFORM event_store_test.echo(0, bytes, 5);
	RETURN 'ok';
EXCEPTION WHEN cannot_connect_now THEN
	RETURN sqlerrm;
END $$
SQL
append_to_file("$dir/load.sql", "\\set bytes random(0, 600000)\nSELECT public.echo_or_restart(:bytes);\n");
my $load = IPC::Run::start([ 'pgbench', '-n', '-c', '16', '-j', '2', '-T', '6', '-f', "$dir/load.sql",
	$node->connstr('postgres') ], '>', \my $out, '2>', \my $err);
for (1 .. 3)
{
	select(undef, undef, undef, 1);
	ok(restart_shard(), 'restart under load');
}
$load->finish;
is($load->result(0), 0, 'sessions come through three restarts') or diag($err);

# ---- no shared memory

$node->append_conf('postgresql.conf', "event_store.result_queue_size = '256MB'");
$node->restart;
{
	local $ENV{PGOPTIONS} = '';
	# files, and so segments, of this server cannot grow beyond 64 MB
	$node->stop;
	my $limited = "ulimit -f 65536; exec pg_ctl -w -D '${\$node->data_dir}' -l '${\$node->logfile}' start";
	PostgreSQL::Test::Utils::system_or_bail('bash', '-c', $limited);
	$node->_update_pid(1);
	my ($status, $stdout, $stderr) = $node->psql('postgres', "\\set VERBOSITY verbose\nSELECT event_store_test.echo(0, 1)");
	like($stderr, qr/ERROR:  53200: no shared memory for the queues .*: \d+ bytes are needed/, 'no shared memory: 53200 and the size');
	like($stderr, qr/HINT: .*event_store.result_queue_size/, 'the hint names the settings');
	($status, $stdout, $stderr) = $node->psql('postgres', "SELECT event_store_test.echo(0, 1);\nSELECT 'alive'",
		on_error_stop => 0);
	is($stdout, 'alive', 'the session goes on');
}
$node->stop;
$node->adjust_conf('postgresql.conf', 'event_store.result_queue_size', "'1MB'");
$node->start;

# ---- errors at each step of connecting and sending

SKIP:
{
	skip 'no fault points in this build', 1 unless $faults;
	$s = session();
	for my $point ('channel-before-publish', 'channel-before-attach')
	{
		attempt($s, "SELECT inject_fault('$point', 'error')");
		is(attempt($s, 'SELECT reconnect(0)'), "XX000: fault injected at \"$point\"", $point);
		is_usable($point);
		run('SELECT disarm_faults()');
	}
	for my $n (1, 2, 10)
	{
		attempt($s, "SELECT inject_fault('channel-mid-message', 'error', $n)");
		is(attempt($s, "SELECT echo(0, $long)"), 'XX000: fault injected at "channel-mid-message"', "error after $n pieces");
		is_usable("error after $n pieces");
		run('SELECT disarm_faults()');
	}
	run("SELECT inject_fault('channel-before-flush', 'sleep')");
	$s->query_until(qr/begin/, "\\echo begin\nSELECT echo(0, 10) > 0;\n\\echo end\n");
	$node->poll_query_until('postgres', "SELECT event_store_test.fault_hits('channel-before-flush') > 0");
	is(run("SELECT fault_hits('channel-before-flush')"), 1, 'a session sleeps between the ready bit and the flush');
	is(run('SELECT echo(0, 100, 100) > 0'), 't', 'others do not notice');
	run('SELECT disarm_faults()');
	like($s->query_until(qr/end/, ''), qr/^t$/m, 'and it goes on');
	$s->quit;
}

unlike(slurp_file($node->logfile), qr/broken request|TRAP|PANIC|was terminated by signal/, 'no complaints in the log');
$node->stop;
done_testing();
