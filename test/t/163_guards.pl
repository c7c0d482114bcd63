# Waiting ends when it should: a follower goes on behind a TRUNCATE or a rewrite and stops at a DROP, statement_timeout
# holds in COMMIT too, detach() waits for who has events, and a cancelled one is none. And nobody without rights takes
# locks or the cluster's positions.

use strict;
use warnings;
use FindBin;
use lib "$FindBin::RealBin/../lib";
use EventStore::Server qw(new_server sql);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = new_server('guards', 'event_store.shards = 2', "event_store.enqueue_timeout = '60s'");
$node->safe_psql('postgres', <<'SQL');
CREATE TABLE e (position bigint, context_id text, version bigint, n int) USING event_store;
CREATE TABLE plain (context_id text, n int) USING event_store;
CREATE ROLE nobody LOGIN;
CREATE ROLE maker LOGIN;
GRANT ALL ON SCHEMA public TO maker;
SQL

# What psql printed, results and errors.
sub both
{
	my ($sql) = @_;
	my ($out, $err) = ('', '');
	$node->psql('postgres', $sql, stdout => \$out, stderr => \$err, on_error_die => 0, on_error_stop => 0);
	chomp(my $all = join "\n", grep { $_ ne '' } $out, $err);
	return $all;
}

# ---- followers

my $waiters = 0;

sub waiter
{
	my ($arguments, $options) = @_;
	my $w = { out => '', err => '', start => time() };
	my $name = 'waiter ' . ++$waiters;
	$w->{run} = IPC::Run::start(
		[ 'psql', '-XAtq', '-d', $node->connstr('postgres') . " application_name='$name'" . ($options // ''), '-c', "CALL event_store.wait_for_events($arguments)" ],
		'>', \$w->{out}, '2>', \$w->{err}, IPC::Run::timeout(100));
	$node->poll_query_until('postgres',
		"SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = '$name' AND query LIKE 'CALL event_store.wait%' AND wait_event IN ('Extension', 'EventStoreWaitForEvents')")
	  or die 'nobody waits';
	return $w;
}

sub result
{
	my ($w) = @_;
	$w->{run}->finish;
	$w->{seconds} = time() - $w->{start};
	chomp(my $all = $w->{out} . $w->{err});
	return $all;
}

for my $case (
	[ 'TRUNCATE', 'TRUNCATE e' ],
	[ 'VACUUM FULL', 'VACUUM FULL e' ],
	[ 'a rewrite', 'ALTER TABLE e ALTER n TYPE bigint' ],
	[ 'a rewrite that gives contexts another type', 'ALTER TABLE e ALTER context_id TYPE int USING 42' ],
	[ 'and back', 'ALTER TABLE e ALTER context_id TYPE text' ])
{
	my ($name, $ddl) = @$case;
	sql($node, "INSERT INTO e VALUES (NULL, '42', NULL, 1)") if $name ne 'TRUNCATE';
	my @w = map { waiter("store => 'e', timeout => '60 s'$_") } '', ", context_id => '42'";
	sql($node, $ddl);
	sleep 0.2;
	is($w[0]{out} . $w[0]{err} . $w[1]{out} . $w[1]{err}, '', "$name wakes nobody") unless $name eq 'TRUNCATE';
	sql($node, "INSERT INTO e VALUES (NULL, '42', NULL, 2)");
	is(result($_), 't', "a follower goes on behind $name") for @w;
	cmp_ok($w[1]{seconds}, '<', 55, 'soon');
}

my $w = waiter("store => 'e', timeout => '5 s'");
sql($node, 'TRUNCATE e');
is(result($w), 'f', 'the deadline stays');
cmp_ok($w->{seconds}, '<', 30, 'where it was');

$w = waiter("store => 'plain'");
sql($node, 'DROP TABLE plain');
like(result($w), qr/ERROR:  the table whose events were waited for was dropped/, 'DROP ends a wait that has no deadline');
sql($node, 'CREATE TABLE plain (context_id text, n int) USING event_store');
$w = waiter("store => 'plain'");
sql($node, 'ALTER TABLE plain SET ACCESS METHOD heap');
like(result($w), qr/ERROR:  "plain" is not an event_store table any more/, 'so does another access method');
sql($node, 'ALTER TABLE plain SET ACCESS METHOD event_store');

# a follower holds nothing back, also behind a look at its table
$w = waiter("store => 'e', timeout => '4 s'");
sleep 2.5;
is(sql($node, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'CALL event_store.wait%' AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)"),
	'0', 'no snapshot');
is(sql($node, "SELECT count(*) FROM pg_locks WHERE relation = 'e'::regclass"), '0', 'no lock');
is(result($w), 'f', 'nothing came');

# '' is a context as any other
$w = waiter("store => 'e', context_id => '', timeout => '20 s'");
sql($node, "INSERT INTO e SELECT NULL, 'c' || i, NULL, i FROM generate_series(1, 50) i");
sleep 1;
is($w->{out}, '', "other contexts do not wake who waits for ''");
sql($node, "INSERT INTO e VALUES (NULL, '', NULL, 1)");
is(result($w), 't', 'its own does');
is(sql($node, "CALL event_store.wait_for_events(store => 'e', context_id => '', after => 0, timeout => '20 s')"), 't', 'what is there already, too');

# under row security only what the policies show wakes; what they hide is left behind, whatever the isolation level
sql($node, <<'SQL');
CREATE TABLE rls (position bigint, context_id text, n int) USING event_store;
ALTER TABLE rls ENABLE ROW LEVEL SECURITY;
CREATE POLICY shown ON rls USING (n > 0);
GRANT SELECT ON rls TO nobody;
SQL
for my $isolation ('read committed', 'repeatable read')
{
	my $options = " options='-c role=nobody -c default_transaction_isolation=" . ($isolation =~ s/ /\\\\ /gr) . "'";
	my @w = map { waiter("store => 'rls', timeout => '60 s'$_", $options) } '', ", context_id => 'a'", ", context_id => 'b'";
	my $timed = waiter("store => 'rls', context_id => 'c', timeout => '2 s'", $options);
	sql($node, "INSERT INTO rls VALUES (NULL, 'a', 0), (NULL, 'b', 0), (NULL, 'c', 0)") for 1 .. 3;
	sleep 0.5;
	$_->{run}->pump_nb for @w;
	is(join('', map { $_->{out} . $_->{err} } @w), '', "hidden events wake nobody, $isolation");
	is(sql($node, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'CALL event_store.wait%' AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)"),
		'0', 'and leave no snapshot');
	is(result($timed), 'f', 'nor hold up a deadline');
	sql($node, 'VACUUM FULL rls');
	sleep 1.5;
	sql($node, "INSERT INTO rls VALUES (NULL, 'a', 0), (NULL, 'a', 1), (NULL, 'b', 0)");
	is(result($w[$_]), 't', 'one that is shown does') for 0, 1;
	$w[2]{run}->pump_nb;
	is($w[2]{out} . $w[2]{err}, '', 'those of its context');
	sql($node, "INSERT INTO rls VALUES (NULL, 'b', 1)");
	is(result($w[2]), 't', 'at last');
}
$w = waiter("store => 'rls', timeout => '60 s'");
sql($node, 'DROP TABLE rls');
like(result($w), qr/ERROR:  the table whose events were waited for was dropped/, 'and DROP ends it');

# ---- statement_timeout in COMMIT

my $holder = $node->background_psql('postgres', on_error_stop => 0);
$holder->query_safe(q{BEGIN; SELECT event_store.append('lk', NULL, NULL, store => 'event_store.events')});

# How a statement ended, and after how many seconds.
sub timed
{
	my ($sql, $settings) = @_;
	my $start = time();
	my $out = both(($settings // "SET statement_timeout = '500ms'; SET event_store.enqueue_timeout = '60s';") . $sql);
	return ($out, time() - $start);
}

for my $case (
	[ 'a statement of its own', "INSERT INTO event_store.events (context_id) VALUES ('lk')" ],
	[ 'COMMIT', "BEGIN; INSERT INTO event_store.events (context_id) VALUES ('lk'); COMMIT" ],
	[ 'many contexts', "INSERT INTO event_store.events (context_id) SELECT 'lk' FROM generate_series(1, 2) UNION ALL SELECT 'c' || i FROM generate_series(1, 100) i" ],
	[ 'COMMIT in a procedure', "DO \$\$BEGIN INSERT INTO event_store.events (context_id) VALUES ('lk'); COMMIT; END\$\$" ])
{
	my ($out, $seconds) = timed($case->[1]);
	like($out, qr/canceling statement due to statement timeout/, "$case->[0] behind a context's lock: statement_timeout");
	cmp_ok($seconds, '<', 50, 'soon');
}
is(sql($node, "SELECT count(*) FROM event_store.events WHERE context_id = 'lk'"), '0', 'nothing is stored');

# the time is the statement's, not the transaction's; the session can go on; later statements have their own time
my $session = $node->background_psql('postgres', on_error_stop => 0);
$session->query_safe(q{SET statement_timeout = '2s'});
# 2 s where it is so, 3.2 s if it is not; a busy machine may add to it
my $shortest = 1000;
foreach (1 .. 5)
{
	my $start = time();
	$session->query(q{INSERT INTO event_store.events (context_id) SELECT 'lk' FROM pg_sleep(1.2)});
	$session->{stderr} = '';
	$shortest = time() - $start if time() - $start < $shortest;
	last if $shortest < 2.9;
}
cmp_ok($shortest, '<', 2.9, 'what a statement has used up is not given to its commit again');
is($session->query_safe(q{BEGIN; INSERT INTO event_store.events (context_id) VALUES ('free'); COMMIT; SELECT pg_sleep(1); SELECT 1}),
	"\n1", 'the session goes on');
$session->query_safe(q{SET statement_timeout = 0});
$session->query_safe(q{INSERT INTO event_store.events (context_id) VALUES ('free'); SELECT pg_sleep(2.5)});
pass('no timer is left behind');
$session->quit;

sql($node, 'SELECT event_store.pause_shard(s) FROM generate_series(0, 1) s');
my ($out, $seconds) = timed("INSERT INTO plain VALUES ('a', 1)");
like($out, qr/canceling statement due to statement timeout/, 'a paused shard: statement_timeout');
cmp_ok($seconds, '<', 50, 'soon');
sql($node, 'SELECT event_store.resume_shard(s) FROM generate_series(0, 1) s');
$holder->query_safe('COMMIT');
$holder->quit;
is(sql($node, 'SELECT count(*) FROM plain'), '0', 'nothing is stored');

my $refusal = q{};
$node->psql('postgres', "INSERT INTO e VALUES (NULL, 'w', 9, 1)", stderr => \$refusal, on_error_die => 0, extra_params => [ '-v', 'VERBOSITY=verbose' ]);
like($refusal, qr/ERROR:  23505: version 9 is not the next.*SCHEMA NAME:  public\nTABLE NAME:  e\n/s, 'a refusal at COMMIT names its table');

# ---- locks of those without rights

sub locks_of
{
	my ($role, $sql) = @_;
	my $got = both("SET ROLE $role; BEGIN; SAVEPOINT s; $sql; SELECT 'locks ' || count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND relation = 'e'::regclass; ROLLBACK");
	return $got;
}

like(locks_of('nobody', "SELECT event_store.shard_of('x', 'e')"), qr/locks 0/, 'shard_of keeps no lock');
like(locks_of('nobody', "SELECT event_store.relation_size('e')"), qr/locks 0/, 'relation_size keeps no lock');
like(locks_of('nobody', "SELECT event_store.horizon('e')"), qr/permission denied for table e/, 'horizon is refused');

my $ddl = $node->background_psql('postgres', on_error_stop => 0);
$ddl->query_safe('BEGIN; LOCK TABLE e IN ACCESS EXCLUSIVE MODE');
for my $call ("SELECT event_store.append('a', 'x', '{}', store => 'e')", "SELECT event_store.replay('a', store => 'e')",
	"SELECT event_store.read_all(store => 'e')", "SELECT event_store.flush('e')", "CALL event_store.wait_for_events(store => 'e')")
{
	my $got = both("SET ROLE nobody; SET lock_timeout = '2s'; $call");
	like($got, qr/permission denied for table e|must be owner of table e/, "no rights, no queueing for the lock: $call");
}
# views of an administrator do not queue either
my $got = both("SET lock_timeout = '2s'; SELECT store, storage_id IS NULL, context_column IS NULL, segment_rows + memtable_rows > 0 FROM event_store.stat_tables WHERE store IN ('e'::regclass, 'plain'::regclass) ORDER BY 1");
is($got, "e|t|t|t\nplain|f|f|f", 'stat_tables shows a locked table without its roles');
$ddl->query_safe('COMMIT');
$ddl->quit;

sql($node, 'SELECT event_store.pause_shard(1)');
$got = both("SET statement_timeout = '60s'; SELECT count(*) > 0 FROM event_store.stat_tables; SELECT count(*) >= 0 FROM event_store.stat_segments; EXPLAIN (COSTS OFF) SELECT * FROM e");
like($got, qr/^t\nt\nSeq Scan on e\n.*WARNING:  shard 1 is paused/s, 'views and plans do not wait for a paused shard');
sql($node, 'SELECT event_store.resume_shard(1)');

# ---- the cluster's positions

sub as_maker { return both("SET ROLE maker; $_[0]"); }
sub counter { return sql($node, 'SELECT event_store.horizon()'); }

is(as_maker('CREATE TABLE mine (position bigint, context_id text) USING event_store'), '', 'an owner without rights');
my $next = counter();
is(as_maker("INSERT INTO mine VALUES ($next + (1::bigint << 32) - 10, 'x')"), '', 'may restore what lies up to 2^32 above');
$next = counter();
like(as_maker("INSERT INTO mine VALUES ($next + (1::bigint << 32) + 1000, 'x')"),
	qr/permission denied to skip.*more than 4294967296 above/s, 'more is refused');
sql($node, 'CREATE TABLE theirs (position bigint, context_id text) USING event_store');
sql($node, "INSERT INTO theirs VALUES ((1::bigint << 46) - 1000, 'x')");
is(as_maker("INSERT INTO mine VALUES ((1::bigint << 46) - 10, 'x')"), '', 'up to half of all positions');
like(as_maker("INSERT INTO mine VALUES ((1::bigint << 46) + 1, 'x')"),
	qr/ERROR:  permission denied to skip.*DETAIL:.*upper half.*HINT:.*superuser/s, 'not beyond, however small the step');
is(as_maker("INSERT INTO mine (context_id) SELECT 'y' FROM generate_series(1, 100)"), '', 'events go on');
sql($node, "INSERT INTO theirs VALUES ((1::bigint << 46) + 1000, 'x')");
is(as_maker("INSERT INTO mine (context_id) VALUES ('y')"), '', 'and on, beyond it');
is(as_maker("VACUUM FULL mine; SELECT count(*) FROM mine"), '103', 'rewrites keep what is there');

# ---- detach

$holder = $node->background_psql('postgres', on_error_stop => 0);
$holder->query_safe(q{BEGIN; INSERT INTO e SELECT NULL, 'd' || i, NULL, i FROM generate_series(1, 20000) i});
my $caller = IPC::Run::start([ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-c', "SET statement_timeout = '3s'",
	'-c', 'SELECT event_store.detach()', '-c', 'RESET statement_timeout', '-c', "SELECT 'now ' || count(*) FROM mine" ],
	'>', \my $detach_out, '2>', \my $detach_err, IPC::Run::timeout(100));
$node->poll_query_until('postgres', "SELECT bool_or(reason LIKE 'the event store is being detached%') FROM event_store.stat_shards");
# the keeper is slow to hear of it
my $keeper = sql($node, "SELECT pid FROM pg_stat_activity WHERE backend_type = 'event_store keeper'");
kill 'STOP', $keeper;
sleep 5;
kill 'CONT', $keeper;
$caller->finish;
like($detach_err, qr/canceling statement due to statement timeout/, 'detach waits for a transaction with events; cancelled');
unlike($detach_err, qr/detached/, 'the next statement is not told of it any more');
is($detach_out, "now 103\n", 'but waits for the keeper');
is(as_maker("INSERT INTO mine (context_id) VALUES ('z')"), '', 'then the store is not detached');
$holder->query_safe('COMMIT');
is(sql($node, "SELECT count(*) FROM e WHERE context_id LIKE 'd%'"), '20000', 'and that transaction commits');

# the caller dies
$holder->query_safe(q{BEGIN; INSERT INTO e SELECT NULL, 'f' || i, NULL, i FROM generate_series(1, 20000) i});
$caller = IPC::Run::start([ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-c', 'SELECT event_store.detach()' ],
	'>', \$detach_out, '2>', \$detach_err, IPC::Run::timeout(100));
$node->poll_query_until('postgres', "SELECT bool_or(reason LIKE 'the event store is being detached%') FROM event_store.stat_shards");
$got = both('SELECT count(*) FROM mine');
like($got, qr/55000|the event store is being detached/, 'statements are told that a detach is under way');
sql($node, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query = 'SELECT event_store.detach()'");
$caller->finish;
$node->poll_query_until('postgres', "SELECT bool_and(state = 'open' AND reason IS NULL) FROM event_store.stat_shards");
is(as_maker("INSERT INTO mine (context_id) VALUES ('z')"), '', 'a caller that dies takes it back as well');
$holder->query_safe('ROLLBACK');
$holder->quit;

# who has events, sent or not, goes on: reads, appends, commits; and so does who waits in append() for one of them
my $rows = sql($node, 'SELECT count(*) FROM e');
my %open = map { $_ => $node->background_psql('postgres', on_error_stop => 0) } qw(small append large queue none gone back);
$open{small}->query_safe(q{BEGIN; INSERT INTO e VALUES (NULL, 'small', NULL, 1)});
$open{append}->query_safe(q{BEGIN; SELECT event_store.append('own', 'x', '{}')});
$open{large}->query_safe(q{BEGIN; INSERT INTO e SELECT NULL, 'g' || i, NULL, i FROM generate_series(1, 20000) i});
$open{back}->query_safe(q{BEGIN; INSERT INTO e VALUES (NULL, 'back', NULL, 1)});
$open{gone}->query_safe(q{BEGIN; INSERT INTO e VALUES (NULL, 'gone', NULL, 1)});
$open{none}->query_safe(q{BEGIN; SELECT txid_current(), count(*) FROM e});
$open{queue}->query_until(qr/asks/, qq{BEGIN;\n\\echo asks\nSELECT event_store.append('own', 'y', '{}');\nCOMMIT;\n});
$node->poll_query_until('postgres', "SELECT count(*) = 1 FROM pg_stat_activity WHERE query LIKE '%''y''%' AND wait_event_type = 'Lock'");
like(both(q{SET statement_timeout = '5s'; BEGIN; INSERT INTO e VALUES (NULL, 'own', NULL, 1); SELECT event_store.detach()}),
	qr/cannot detach the event store in a transaction that has inserted events/, 'a transaction does not wait for itself');

$caller = IPC::Run::start([ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-c', 'SELECT event_store.detach()' ],
	'>', \$detach_out, '2>', \$detach_err, IPC::Run::timeout(100));
$node->poll_query_until('postgres', "SELECT bool_or(reason LIKE 'the event store is being detached%') FROM event_store.stat_shards");

# What the session says.
sub goes_on
{
	my ($who, $sql) = @_;
	$open{$who}->{stderr} = '';
	my $said = $open{$who}->query($sql);
	return $said . $open{$who}->{stderr};
}
sub waits { return sql($node, "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT event_store.detach()' AND state = 'active'"); }

like(goes_on('none', "INSERT INTO e VALUES (NULL, 'none', NULL, 1);"), qr/the event store is being detached/, 'not without events');
like(both("INSERT INTO e VALUES (NULL, 'new', NULL, 1)"), qr/55000|the event store is being detached/, 'nor in a new transaction');
is(goes_on('large', q{SELECT count(*) FROM e WHERE context_id LIKE 'g%';}), '20000', 'own events are read');
goes_on('large', q{SET LOCAL parallel_setup_cost = 0; SET LOCAL parallel_tuple_cost = 0;
	SET LOCAL min_parallel_table_scan_size = 0; SET LOCAL parallel_leader_participation = off;});
my $count = q{SELECT count(*) FROM e WHERE n > 0 AND context_id LIKE 'g%';};
like(goes_on('large', "EXPLAIN $count"), qr/Gather/, 'parallel workers');
is(goes_on('large', $count), '20000', 'read them');
is(goes_on('small', q{INSERT INTO e VALUES (NULL, 'small', NULL, 2);}), '', 'more is inserted');
my $pid = sql($node, 'SELECT pid FROM event_store.stat_shards WHERE shard = 0');
sql($node, "SELECT pg_terminate_backend($pid)");
$node->poll_query_until('postgres', "SELECT pid <> $pid AND state = 'open' FROM event_store.stat_shards WHERE shard = 0");
is(goes_on('large', 'COMMIT;'), '', 'COMMIT of what was sent, by way of a shard that restarts');
is(goes_on('small', 'COMMIT;'), '', 'COMMIT of what was not');
sleep 1;
is(waits(), '1', 'detach waits for rows in a backend');
is(goes_on('back', 'ROLLBACK;'), '', 'ROLLBACK');
is(goes_on('append', 'COMMIT;'), '', 'COMMIT of an append');
like(goes_on('queue', q{SELECT 'over';}), qr/^\(2,appended\)\nover$/, 'and of who waited for it');
is(waits(), '1', 'a session is left');
$_->quit for values %open;
$caller->finish;
is($detach_out . $detach_err, "\n", 'detached');
is(sql($node, "SELECT DISTINCT state, reason FROM event_store.stat_shards"),
	"stopped|the event store is detached: event_store.detach() was called.\nRestart the server to use it again.",
	'stat_shards says why nothing works');
$got = both('SELECT count(*) FROM mine');
like($got, qr/ERROR:  the event store is detached\nDETAIL:  event_store.detach\(\) was called.\nHINT:  Restart the server/, 'so does the error');
$node->restart;
is(sql($node, 'SELECT count(*) FROM mine'), '105', 'all is there after a restart');
is(sql($node, 'SELECT count(*) FROM e'), $rows + 20002, 'also what was committed meanwhile');
is(sql($node, "SELECT string_agg(event_type, '' ORDER BY version) FROM event_store.replay('own')"), 'xy', 'and appended');

# a refusal of the whole store
$node->append_conf('postgresql.conf', 'event_store.shards = 3');
$node->restart;
$node->poll_query_until('postgres', q{SELECT bool_and(state = 'refused') FROM event_store.stat_shards});
like(sql($node, "SELECT DISTINCT state, reason FROM event_store.stat_shards"),
	qr/^refused\|event_store.shards is 3, but the store has 2 shards: The number.*\nSet "event_store.shards = 2"/,
	'stat_shards says why the store is refused');

$node->stop;
done_testing();
