# Locks of contexts never make a writer wait for one who is idle without need, never deadlock silently and never give a version
# twice; partitions, parallel readers and serializable transactions see what they must.

use strict;
use warnings;
use EventStore::Clients;
use EventStore::Server qw(new_server crash_restart wait_open sql try_sql);
use IO::Socket::UNIX;
use IPC::Run;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = new_server('concurrency', 'event_store.shards = 3', 'event_store.spill_after = 64kB');
sql($node, <<'SQL');
CREATE TABLE ev (position bigint, context_id text, version bigint, n int) USING event_store;
CREATE TABLE doctors (position bigint, context_id text, version bigint, on_call int) USING event_store;
SQL

# psql with a script, in the background at once; $r->finish and the texts in @$r later.
sub start_psql
{
	my ($sql) = @_;
	my $file = PostgreSQL::Test::Utils::tempdir() . '/script.sql';
	my %r = (out => '', err => '');

	PostgreSQL::Test::Utils::append_to_file($file, $sql);
	$r{run} = IPC::Run::start([ 'psql', '-XAtq', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('postgres'), '-f', $file ],
		'<', '/dev/null', '>', \$r{out}, '2>', \$r{err}, IPC::Run::timeout(120));
	return \%r;
}

sub gaps
{
	my ($table) = @_;
	return sql($node, "SELECT count(*) FROM (SELECT version, row_number() OVER (PARTITION BY context_id ORDER BY position) AS n FROM $table) x WHERE n IS DISTINCT FROM version");
}

# ---- two transactions of 100 contexts each by append(): other contexts, the same in the same order, the same in reverse

sub hundred
{
	my ($prefix, $reverse) = @_;
	my $order = $reverse ? 'DESC' : 'ASC';
	return join(';', map { "SELECT version FROM event_store.append('$prefix' || $_, 't', '{}')" } $reverse ? reverse(1 .. 100) : 1 .. 100) . ';';
}

foreach my $case ([ 'other contexts', 'a', 'b', 0 ], [ 'the same contexts', 'c', 'c', 0 ], [ 'the same, in reverse', 'd', 'd', 1 ])
{
	my ($name, $first, $second, $reverse) = @$case;
	my $begin = time();
	my @runs = map { start_psql('BEGIN;' . hundred($_ ? $second : $first, $_ && $reverse) . 'COMMIT;') } (0, 1);
	$_->{run}->finish foreach @runs;
	my @out = map { $_->{out} } @runs;
	my @err = map { $_->{err} } @runs;
	cmp_ok(time() - $begin, '<', 100, "$name: two transactions of 100 contexts end");
	my $failed = grep { $_ ne '' } @err;
	my $deadlocks = grep { /deadlock detected/ } @err;
	is($failed, $deadlocks, "$name: whoever fails does so by a deadlock that was detected") or diag(@err);
	is($failed, 0, "$name: nobody fails") if !$reverse && $first ne $second;
	cmp_ok($failed, '<', 2, "$name: one at least gets through");
	is( sql($node, "SELECT count(*), count(DISTINCT context_id) FROM event_store.events WHERE context_id ~ '^[$first$second]'"),
		(200 - 100 * $failed) . '|' . ($first eq $second ? 100 : 200), "$name: all events are there");
	# the first sixteen contexts have their versions at once, the rest at COMMIT
	my @versions = split /\n/, $out[0] // '';
	is(join(' ', map { $_ eq '' ? 'null' : 'known' } @versions[ 0 .. 15 ]), join(' ', ('known') x 16), "$name: versions of the first 16 contexts are told")
	  if $err[0] eq '';
}
is(gaps('event_store.events'), '0', 'versions have no gap');

# ---- a COPY of many contexts against an idle append

my $idle = $node->background_psql('postgres', on_error_stop => 0);
$idle->query_safe('BEGIN');
is($idle->query_safe(q{SELECT version FROM event_store.append('idle', 't', '{}')}), '1', 'append() in a transaction that goes on');
my $copy = 'COPY event_store.events (context_id, event_type) FROM STDIN;' . "\n" . join('', map { "many$_\tt\n" } 1 .. 1000) . "\\.\n";
my $begin = time();
my ($status, $out, $err) = try_sql($node, $copy, psql => { timeout => 180 });
is($err, '', 'a COPY of 1000 other contexts does not wait for it');
cmp_ok(time() - $begin, '<', 60, 'but is done at once');
(undef, undef, $err) = try_sql($node, q{SELECT version FROM event_store.append('another', 't', '{}')});
is($err, '', 'nor does an append to another context');
(undef, undef, $err) = try_sql($node, q{SET lock_timeout = '300ms'; SELECT version FROM event_store.append('idle', 't', '{}')});
like($err, qr/55P03/, 'who wants the same context waits: lock_timeout');

# a COPY with that context waits for it, and nobody waits behind the COPY but those who want its contexts
my $with_idle = 'COPY event_store.events (context_id, event_type) FROM STDIN;' . "\n" . join('', map { "many$_\tt\n" } 1 .. 500) . "idle\tt\n\\.\n";
my $waiting = start_psql($with_idle);
ok($node->poll_query_until('postgres', q{SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'COPY%'}), 'a COPY that has that context waits');
(undef, undef, $err) = try_sql($node, q{SET lock_timeout = '60s'; SELECT version FROM event_store.append('yet another', 't', '{}')});
is($err, '', 'and an append to a third context does not wait behind the two');
$idle->query_safe('COMMIT');
$waiting->{run}->finish;
is($waiting->{err}, '', 'the COPY goes on when the append has committed');
is(sql($node, q{SELECT string_agg(version::text, ',' ORDER BY position) FROM event_store.events WHERE context_id = 'idle'}), '1,2', 'and has the next version');
is(gaps('event_store.events'), '0', 'versions have no gap');
is(sql($node, q{SELECT count(*) FROM pg_locks WHERE locktype = 'object' AND objid = 'event_store.events'::regclass}), '0', 'no lock is left');

# who asks for the holders of all slots keeps nothing of the answers
sub high_water { my ($pid) = @_; return PostgreSQL::Test::Utils::slurp_file("/proc/$pid/status") =~ /^VmHWM:\s+(\d+) kB/m ? $1 : die; }
my $many = $node->background_psql('postgres', on_error_stop => 0);
my $many_pid = $many->query_safe('SELECT pg_backend_pid()');
$many->query_safe(q{BEGIN; INSERT INTO event_store.events (context_id, event_type) SELECT 'slot' || i, 't' FROM generate_series(1, 60000) i});
my $water = high_water($many_pid);
$many->query_safe('COMMIT');
cmp_ok(high_water($many_pid) - $water, '<', 8000, 'COMMIT of contexts in all slots takes little memory (kB)');
$many->quit;

# ---- all kinds of writers at once in few contexts of two tables: whoever takes his locks at COMMIT meets no deadlock

sql($node, <<'SQL');
CREATE TABLE crowd_a (position bigint, context_id text, version bigint, n int) USING event_store;
CREATE TABLE crowd_b (position bigint, context_id text, version bigint, n int) USING event_store;
CREATE PROCEDURE crowd(seconds float8) LANGUAGE plpgsql AS $$
DECLARE
	ends timestamptz := clock_timestamp() + make_interval(secs => seconds);
	kind int;
BEGIN
	WHILE clock_timestamp() < ends LOOP
		kind := random() * 5;
		IF kind = 0 THEN
			PERFORM event_store.append('c' || (random() * 30)::int, NULL, NULL, store => 'crowd_a');
			PERFORM pg_sleep(random() * 0.002);
		ELSE
			IF kind IN (1, 2, 3) THEN	-- few contexts, in 3 with more than slots of the other table
				INSERT INTO crowd_a (context_id) SELECT 'c' || (random() * 30)::int FROM generate_series(1, 3);
			ELSE
				INSERT INTO crowd_a (context_id) SELECT 'c' || i FROM generate_series(1, 25) i;
			END IF;
			IF kind IN (2, 4) THEN
				INSERT INTO crowd_b (context_id) SELECT 'c' || (random() * 30)::int FROM generate_series(1, 3);
			ELSIF kind IN (3, 5) THEN
				INSERT INTO crowd_b (context_id) SELECT 'c' || i FROM generate_series(5, 30) i;
			END IF;
		END IF;
		COMMIT;
	END LOOP;
END $$;
SQL
my @crowd = map { start_psql('CALL crowd(6)') } 1 .. 6;
$_->{run}->finish foreach @crowd;
is(join('', map { $_->{err} } @crowd), '', 'a crowd of writers of two tables: nobody fails');
foreach my $table ('crowd_a', 'crowd_b')
{
	cmp_ok(sql($node, "SELECT count(*) FROM $table"), '>', 100, "they have written into $table");
	is(gaps($table), '0', 'versions have no gap, and none is there twice');
}

# ---- COPY into 100 partitions

sql($node, q{CREATE TABLE parts (context_id int, p int, position bigint, version bigint, v text) PARTITION BY LIST (p)});
sql($node, join(';', map { "CREATE TABLE part_$_ PARTITION OF parts FOR VALUES IN ($_) USING event_store" } 0 .. 99));
my $data = join('', map { ($_ % 50) . "\t" . ($_ % 100) . "\tv$_\n" } 1 .. 20000);
(undef, undef, $err) = try_sql($node, "COPY parts (context_id, p, v) FROM STDIN;\n$data\\.\n");
is($err, '', 'COPY into 100 partitions');
my $parts = q{SELECT count(*), count(DISTINCT position), count(DISTINCT part), min(n), max(n), bool_and(n = v) FROM
	(SELECT position, tableoid AS part, count(*) OVER w AS n, max(version) OVER w AS v FROM parts WINDOW w AS (PARTITION BY tableoid, context_id)) x};
is(sql($node, $parts), '20000|20000|100|200|200|t', 'all rows are there, each partition with versions of its own');
(undef, undef, $err) = try_sql($node, "BEGIN; COPY parts (context_id, p, v) FROM STDIN;\n$data\\.\nROLLBACK;");
is(sql($node, $parts), '20000|20000|100|200|200|t', 'and none of a COPY that was rolled back');
crash_restart($node);
is(sql($node, $parts), '20000|20000|100|200|200|t', 'also after a crash');

# ---- write skew

sql($node, q{INSERT INTO doctors (context_id, on_call) VALUES ('alice', 1), ('bob', 1)});
foreach my $level ('REPEATABLE READ', 'SERIALIZABLE')
{
	foreach my $how ('scan', 'replay', 'aggregate')
	{
		my @s = map { $node->background_psql('postgres', on_error_stop => 0) } 1, 2;
		my $look = $how eq 'scan' ? 'SELECT context_id FROM doctors'
		  : $how eq 'aggregate' ? 'SELECT sum(on_call) FROM doctors'
		  : q{SELECT count(*) FROM event_store.replay('alice', store => 'doctors') a, event_store.replay('bob', store => 'doctors') b};
		my @failed;
		foreach my $i (0, 1)
		{
			$s[$i]->query_safe("BEGIN ISOLATION LEVEL $level");
			$s[$i]->query_safe($look);
		}
		$s[0]->query_safe(q{INSERT INTO doctors (context_id, on_call) VALUES ('alice', -1)});
		$s[1]->query(q{INSERT INTO doctors (context_id, on_call) VALUES ('bob', -1)});
		foreach my $i (0, 1)
		{
			$s[$i]->query('COMMIT');
			push @failed, $i if $s[$i]->{stderr} =~ /could not serialize access/;
			$s[$i]->{stderr} = '';
			$s[$i]->quit;
		}
		is(scalar(@failed), $level eq 'SERIALIZABLE' ? 1 : 0, "write skew by $how, $level");
	}
}

# the second has its snapshot when the first commits, and looks only at the first row: what it does not see was skipped
sql($node, q{CREATE TABLE lights (position bigint, context_id text, version bigint, event_type text) USING event_store;
	INSERT INTO lights (context_id, event_type) SELECT c, 'on' FROM generate_series(1, 3000) i, unnest(ARRAY['x', 'y']) c});
my %last = (
	'replay with max_count' => q{SELECT event_type FROM event_store.replay('%s', backward => true, max_count => 1, store => 'lights')},
	'a replay that its caller ends' => q{SELECT event_store.replay('%s', backward => true, store => 'lights') LIMIT 1},
	'a cursor that is closed' => q{DECLARE c%1$s CURSOR FOR SELECT event_store.replay('%1$s', backward => true, store => 'lights'); FETCH 1 FROM c%1$s; CLOSE c%1$s});
foreach my $how (sort keys %last)
{
	my @s = map { $node->background_psql('postgres', on_error_stop => 0) } 1, 2;
	$s[0]->query_safe('BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT FROM pg_class LIMIT 1');
	$s[1]->query_safe('BEGIN ISOLATION LEVEL SERIALIZABLE;' . sprintf($last{$how}, 'x'));
	$s[1]->query_safe(q{INSERT INTO lights (context_id, event_type) VALUES ('y', 'off'); COMMIT});
	$s[0]->query(sprintf($last{$how}, 'y'));
	$s[0]->query(q{INSERT INTO lights (context_id, event_type) VALUES ('x', 'off')});
	$s[0]->query('COMMIT');
	like($s[0]->{stderr}, qr/could not serialize access/, "write skew by $how");
	$s[0]->{stderr} = '';
	$_->quit foreach @s;
}
is(gaps('doctors'), '0', 'versions have no gap');

# ---- a parallel SELECT in a savepoint, after INSERTs in this transaction

sql($node, 'INSERT INTO ev (context_id, n) SELECT g % 100, g FROM generate_series(1, 20000) g; ANALYZE ev');
my $parallel = join(' ', map { "SET $_;" } 'max_parallel_workers_per_gather = 2', 'parallel_setup_cost = 0', 'parallel_tuple_cost = 0',
	'min_parallel_table_scan_size = 0', 'parallel_leader_participation = off');
my $plan = sql($node, "$parallel BEGIN; INSERT INTO ev (context_id, n) VALUES ('planned', 1); SAVEPOINT a; EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF) SELECT count(*), sum(n) FROM ev; ROLLBACK");
like($plan, qr/Gather.*Workers Launched: [12]\b/s, 'in a transaction that has written, in a savepoint, a plan is parallel');
$out = sql($node, "$parallel BEGIN; INSERT INTO ev (context_id, n) VALUES ('own', 1); SELECT count(*), sum(n) FROM ev; "
	  . "SAVEPOINT a; INSERT INTO ev (context_id, n) VALUES ('own', 2); SELECT count(*), sum(n) FROM ev; "
	  . "SAVEPOINT b; INSERT INTO ev (context_id, n) VALUES ('own', 3); ROLLBACK TO b; SELECT count(*), sum(n) FROM ev; "
	  . "INSERT INTO ev (context_id, n) SELECT 'own' || g, 4 FROM generate_series(1, 3000) g; SELECT count(*), sum(n) FROM ev; ROLLBACK TO a; "
	  . "SELECT count(*), sum(n) FROM ev; COMMIT; SELECT count(*), sum(n) FROM ev");
my $base = 20000 * 20001 / 2;
is($out, join("\n", map { (20000 + $_->[0]) . '|' . ($base + $_->[1]) } [ 1, 1 ], [ 2, 3 ], [ 2, 3 ], [ 3002, 12003 ], [ 1, 1 ], [ 1, 1 ]),
	'parallel SELECTs in savepoints see what was inserted before, and no more');
$plan = sql($node, "$parallel EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF) CREATE TABLE planned USING event_store AS SELECT context_id, n FROM ev; DROP TABLE planned");
like($plan, qr/Gather.*Workers Launched: [12]\b/s, 'so is that of CREATE TABLE AS');
$out = sql($node, "$parallel CREATE TABLE copied USING event_store AS SELECT context_id, n FROM ev; SELECT count(*), sum(n) FROM copied");
is($out, '20001|' . ($base + 1), 'CREATE TABLE AS from a parallel plan');

# ---- a parallel SELECT that is bound, then an INSERT, then the SELECT is executed: a pipeline in libpq's protocol

sub pipeline
{
	my ($settings, @messages) = @_;
	my $socket = IO::Socket::UNIX->new(Peer => $node->host . '/.s.PGSQL.' . $node->port) or die "cannot connect: $!";
	my ($last, @rows) = ('');
	my $until_ready = sub {
		while ($last ne 'Z')
		{
			read($socket, my $head, 5) == 5 or die 'the server has closed the connection';
			($last, my $len) = unpack('aN', $head);
			$len == 4 or read($socket, my $body, $len - 4) == $len - 4 or die 'the server has closed the connection';
			push @rows, join('|', unpack('n/(N/a)', $body)) if $last eq 'D';
			push @rows, join(' ', grep { /^[CM]/ } split(/\0/, $body)) if $last eq 'E';
		}
		$last = '';
	};

	my $startup = pack('N', 196608) . join("\0", user => scalar(getpwuid($>)), database => 'postgres') . "\0\0";
	print $socket pack('N', 4 + length($startup)), $startup;
	$socket->flush;
	$until_ready->();
	foreach my $text ($settings, undef)
	{
		my @out = defined($text) ? ([ 'Q', "$text\0" ]) : (@messages, [ 'S', '' ]);
		print $socket map { $_->[0], pack('N', 4 + length($_->[1])), $_->[1] } @out;
		$socket->flush;
		$until_ready->();
	}
	close($socket);
	return join("\n", @rows);
}

# Parse and Bind; Execute.
sub bound { my ($name, $sql) = @_; return ([ 'P', "$name\0$sql\0\0\0" ], [ 'B', "$name\0$name\0" . "\0" x 6 ]); }
sub executed { return [ 'E', "$_[0]\0" . pack('N', 0) ]; }

$out = pipeline($parallel, bound('begin', 'BEGIN'), executed('begin'), bound('select', 'SELECT count(*), sum(n) FROM ev'),
	bound('insert', q{INSERT INTO ev (context_id, n) VALUES ('pipeline', 1)}), executed('insert'), executed('select'),
	bound('again', 'SELECT count(*), sum(n) FROM ev'), executed('again'));
is($out, '20001|' . ($base + 1) . "\n20002|" . ($base + 2), 'a pipeline may insert between the Bind of a parallel SELECT and its execution');

# ---- 32 writers of one context: each wants the next version

my %state = (won => 0, refused => 0, other => 0);
my $race = EventStore::Clients->new(node => $node, n => 32,
	next => sub { return { sql => "SELECT 'WON' FROM coalesce((SELECT max(version) FROM event_store.replay('race', backward => true, max_count => 1)), 0) AS head, "
				. "LATERAL event_store.append('race', 't', '{}', expected_version => head);" } },
	done => sub {
		my ($c, $unit) = @_;
		if (grep { $_ eq 'WON' } @{ $unit->{lines} }) { $state{won}++; }
		elsif (grep { /23505/ } @{ $unit->{lines} }) { $state{refused}++; }
		else { $state{other}++; diag(@{ $unit->{lines} }); }
	});
$race->run(seconds => 3);
$race->drain;
is($state{other}, 0, "$state{won} writers got the version that they expected, $state{refused} were refused, none failed otherwise");
is(sql($node, q{SELECT count(*), max(version), count(DISTINCT version) FROM event_store.events WHERE context_id = 'race'}), "$state{won}|$state{won}|$state{won}",
	'each version was given once');
$node->stop;
done_testing();
