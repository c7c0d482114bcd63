# A paused shard stalls only those who need it; what waits, times out and piles up is counted exactly; nothing is half-sent, and
# sessions stay usable.

use strict;
use warnings;
use EventStore::Server qw(new_server wait_open sql try_sql);
use IPC::Run;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = new_server('pressure', 'event_store.shards = 2', 'event_store.queue_size = 64kB');
sql($node, 'CREATE TABLE ev (position bigint, context_id text, version bigint, n int, v text) USING event_store; CREATE TABLE plain (context_id text, n int, v text) USING event_store');
my @context = map { sql($node, "SELECT 'c' || g FROM generate_series(1, 100) g WHERE event_store.shard_of('c' || g) = $_ LIMIT 1") } 0, 1;

sub counters
{
	my ($shard) = @_;
	my %c;
	@c{qw(full waits_us timeouts depth high)} = split /\|/,
	  sql($node, "SELECT queue_full_waits, queue_full_wait_us, queue_timeouts, queue_depth, queue_high_water FROM event_store.stat_shards WHERE shard = $shard");
	return \%c;
}

# Sessions that have their queues already: a paused shard would not answer a first call.
my @s = map { $node->background_psql('postgres', on_error_stop => 0) } 1 .. 4;
foreach my $s (@s)
{
	$s->query_safe("INSERT INTO plain VALUES ('$_', 0, '')") foreach @context;
}
my $count = 2 * @s;
my $before = counters(0);
my $other = counters(1);

sql($node, 'SELECT event_store.pause_shard(0)');
is(sql($node, 'SELECT string_agg(paused::text, \',\' ORDER BY shard) FROM event_store.stat_shards'), 'true,false', 'paused, and shown so');

# ---- small transactions have room: they commit although the shard takes nothing

my $begin = time();
$s[0]->query_safe("INSERT INTO plain VALUES ('$context[0]', $_, 'small')") foreach 1 .. 5;
$count += 5;
cmp_ok(time() - $begin, '<', 60, 'writers with room in the queue do not wait');
is(counters(0)->{full} - $before->{full}, 0, 'and no wait is counted');

# the other shard
$begin = time();
$s[1]->query_safe("INSERT INTO plain VALUES ('$context[1]', $_, repeat('x', 1000))") foreach 1 .. 50;
is($s[1]->query_safe("SELECT count(*) FROM event_store.replay('$context[1]', store => 'plain')"), 50 + @s, 'those of the other shard write and read');
$count += 50;
cmp_ok(time() - $begin, '<', 60, 'at once');

# ---- room runs out: time-outs, counted one by one

my $rows = "SELECT '$context[0]', g, repeat(md5(g::text), 30) FROM generate_series(1, 2000) g";
$begin = time();
foreach my $i (0 .. 2)
{
	my $s = $s[$i];
	$s->query_safe("SET event_store.enqueue_timeout = '300ms'");
	$s->query("INSERT INTO plain $rows");
	like($s->{stderr}, qr/ERROR:  shard 0 is busy/, "session $i: time-out when the queue is full");
	$s->{stderr} = '';
	is($s->query_safe('SELECT 1'), '1', "session $i can be used");
}
my $took = time() - $begin;
my $now = counters(0);
is($now->{timeouts} - $before->{timeouts}, 3, 'three time-outs are counted');
is($now->{full} - $before->{full}, 3, 'three waits for room are counted');
cmp_ok($now->{waits_us} - $before->{waits_us}, '>=', 3 * 290_000, 'with their times');
cmp_ok($now->{waits_us} - $before->{waits_us}, '<', 1e6 * $took, 'and no more');
cmp_ok($now->{high}, '>=', $before->{high}, 'the high-water mark does not fall');
cmp_ok($now->{high}, '>', 30_000, "and shows a full queue ($now->{high} bytes)");
my $o = counters(1);
is($o->{full} - $other->{full} + $o->{timeouts} - $other->{timeouts}, 0, 'nothing of it is counted for the other shard');

# ---- cancel while waiting for room

my $c = $s[3];
my $pid = $c->query_safe('SELECT pg_backend_pid()');
$c->query_safe('SET event_store.enqueue_timeout = 0');
$c->query_until(qr/go/, "\\echo go\nINSERT INTO plain $rows;\n\\echo ended\n");
ok($node->poll_query_until('postgres', "SELECT count(*) = 1 FROM event_store.stat_shards WHERE shard = 0 AND queue_full_waits - $now->{full} = 1"), 'a fourth waits');
sql($node, "SELECT pg_cancel_backend($pid)");
$c->query_until(qr/ended/, '');
like($c->{stderr}, qr/canceling statement due to user request/, 'and can be cancelled');
$c->{stderr} = '';
is($c->query_safe('SELECT 2'), '2', 'the session can be used');
is(counters(0)->{timeouts} - $now->{timeouts}, 0, 'a cancel is no time-out');

# ---- a client that dies while it waits, and one that waits until there is room

my ($out, $err) = ('', '');
my $file = PostgreSQL::Test::Utils::tempdir() . '/insert.sql';
append_to_file($file, "SET event_store.enqueue_timeout = 0; INSERT INTO plain VALUES ('$context[1]', 0, ''); INSERT INTO plain $rows;\n");
my $dies = IPC::Run::start([ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-f', $file ], '<', '/dev/null', '>', \$out, '2>', \$err, IPC::Run::timeout(300));
my $waits = q{FROM pg_stat_activity WHERE query LIKE 'INSERT INTO plain SELECT%' AND state = 'active' AND wait_event_type = 'Extension'};
ok($node->poll_query_until('postgres', "SELECT count(*) = 1 $waits"), 'a client waits for room');
is(sql($node, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'INSERT INTO plain SELECT%' AND state = 'active'"), 't', 'and is terminated');
eval { $dies->finish };
ok($node->poll_query_until('postgres', "SELECT count(*) = 0 $waits"), 'it has gone');
$count += 1;
$c->query_until(qr/go/, "\\echo go\nINSERT INTO plain $rows;\n\\echo ended\n");
ok($node->poll_query_until('postgres', "SELECT count(*) = 1 $waits"), 'another waits for room');
sql($node, 'SELECT event_store.resume_shard(0)');
$c->query_until(qr/ended/, '');
is($c->{stderr} =~ /ERROR/ ? $c->{stderr} : '', '', 'who waited goes on when the shard is resumed');
$count += 2000;
is(sql($node, 'SELECT count(*) FROM plain'), $count, 'what was refused or cancelled is not there, the rest is, once');
ok($node->poll_query_until('postgres', 'SELECT max(queue_depth) < 1000 FROM event_store.stat_shards'), 'queues are empty again');
foreach my $s (@s)
{
	$s->query_safe("INSERT INTO ev (context_id, n) VALUES ('$context[0]', 1)");
	$s->quit;
}
is(sql($node, "SELECT count(*), max(version) FROM ev"), '4|4', 'all sessions go on');

# ---- the high-water mark is exact: a shard that takes nothing has in its queue what was sent to it

my $sender = $node->background_psql('postgres', on_error_stop => 0);
$sender->query_safe('SELECT event_store_test.echo(1, 1)');
sql($node, 'SELECT event_store.pause_shard(1)');
sub sent
{
	my ($bytes, $times) = @_;
	$sender->query_safe("SELECT event_store_test.send_without_waiting(1, $bytes, $times)") if $times > 0;
	return $sender->query_safe('SELECT sent_bytes - taken_bytes FROM event_store_test.channel(1)');
}
my $base = sent(0, 0);
my $twenty = sent(1000, 20);
my $one = ($twenty - $base) / 20;
cmp_ok($one, '>', 1000, "a message of 1000 bytes takes $one");
cmp_ok($one, '<', 1100, 'and little more');
is(counters(1)->{high}, $twenty, 'twenty of them are the high-water mark');
sent(1000, 5);
is(counters(1)->{high}, $base + 25 * $one, 'then twenty-five');
sent(1800, 5);
is(counters(1)->{high}, $base + 30 * $one + 5 * 800, 'and five longer ones');
sql($node, 'SELECT event_store.resume_shard(1)');
ok($node->poll_query_until('postgres', q{SELECT paused = false FROM event_store.stat_shards WHERE shard = 1}), 'resumed');
sent(1000, 3);
is(counters(1)->{high}, $base + 30 * $one + 5 * 800, 'it does not fall');
$sender->quit;

# ---- who may

sql($node, 'CREATE ROLE clerk LOGIN; GRANT USAGE ON SCHEMA event_store TO clerk');
foreach my $call ('pause_shard(0)', 'resume_shard(0)', 'release_wal(0)', 'detach()')
{
	my (undef, undef, $e) = try_sql($node, "SET ROLE clerk; SELECT event_store.$call");
	like($e, qr/42501/, "$call is not for everybody");
}
my (undef, undef, $e) = try_sql($node, 'SELECT event_store.pause_shard(7)');
like($e, qr/ERROR:  \w{5}:/, 'a shard that does not exist is an error');
$node->stop;
done_testing();
