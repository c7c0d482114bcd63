# detach() on a full disk waits, says what it waits for, and is over when there is room.  It waits for who takes the id
# of a storage, lest that is given out again after the restart.

use strict;
use warnings;
use EventStore::Server qw(new_server wait_open sql try_sql faults_compiled seed);
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

seed();
my $node = new_server('detach_disk_full', 'event_store.shards = 2', 'autovacuum = off');
plan skip_all => 'no fault points in this build' unless faults_compiled($node);

sql($node, 'CREATE TABLE e (context_id text, n int) USING event_store');
sql($node, "INSERT INTO e SELECT 'c' || g, g FROM generate_series(1, 100) g");
sql($node, q{SELECT event_store_test.inject_fault('control-write', 'enospc always')});
my (undef, undef, $error) = try_sql($node, q{SET statement_timeout = '3s'; SELECT event_store.detach()});
like($error, qr/will be detached all the same/, 'who does not wait is told that it goes on');
$node->wait_for_log(qr/shard \d cannot write what is to be durable before it is detached/);
sql($node, 'SELECT event_store_test.disarm_faults()');
ok($node->poll_query_until('postgres', q{SELECT count(*) = 0 FROM pg_replication_slots}), 'with room again it is detached');
$node->wait_for_log(qr/the event store is detached/);
$node->restart;
ok(wait_open($node), 'open after a restart');
is(sql($node, 'SELECT count(*) FROM e'), '100', 'all is there');

sql($node, q{SELECT event_store_test.inject_fault('reserve-before-id', 'sleep')});
my $making = IPC::Run::start([ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-c', 'CREATE TABLE a (context_id text) USING event_store' ],
	'>', \my $made, '2>&1', IPC::Run::timeout(100));
$node->poll_query_until('postgres', q{SELECT event_store_test.fault_hits('reserve-before-id') > 0});
try_sql($node, q{SET statement_timeout = '3s'; SELECT event_store.detach()});
sql($node, 'SELECT event_store_test.disarm_faults()');
$making->finish;
is($made, '', 'a table is made while a detach waits for it');
sql($node, 'SELECT event_store.detach()') if sql($node, q{SELECT count(*) FROM pg_replication_slots}) == 1;
$node->restart;
ok(wait_open($node), 'open again');
sql($node, 'CREATE TABLE b (context_id text) USING event_store');
sql($node, "INSERT INTO a SELECT 'a' || g FROM generate_series(1, 7) g");
is(sql($node, 'SELECT (SELECT count(*) FROM a), (SELECT count(*) FROM b)'), '7|0', 'and is another one than that made after it');
$node->stop;
done_testing();
