# A shard that has no memory to answer a session still takes what the session has sent: a commit that was acknowledged is there, the
# session is told and goes on.

use strict;
use warnings;
use EventStore::Server qw(new_server wait_open crash_restart sql faults_compiled seed);
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep);

seed();
my $node = new_server('failed_connection', 'event_store.shards = 1', 'autovacuum = off');
plan skip_all => 'no fault points in this build' unless faults_compiled($node);

sub inject { return sql($node, "SELECT event_store_test.inject_fault('$_[0]', '$_[1]')"); }

sub hits { return sql($node, "SELECT event_store_test.fault_hits('$_[0]')"); }

sql($node, q{CREATE TABLE e (context_id text, n int, filler text) USING event_store;
	INSERT INTO e SELECT 'c' || g % 100, g, md5(g::text) FROM generate_series(1, 100000) g});

my $s = $node->background_psql('postgres', on_error_stop => 0);
$s->query_safe(q{BEGIN; INSERT INTO e VALUES ('mine', 0, ''); DECLARE c CURSOR FOR SELECT * FROM e; FETCH 1 FROM c});

# the shard sleeps over rows that the session has not asked to see yet
inject('scan-before-slice', 'sleep');
for (my $i = 0; $i < 100 && hits('scan-before-slice') == 0; $i++)
{
	$s->query_safe('MOVE 200 FROM c');
	# longer than the shard needs: who moves beyond what was read ahead would wait for it
	sleep 0.3;
}
is(hits('scan-before-slice'), '1', 'the shard reads ahead');
$s->query_safe('COMMIT');
inject('server-answer', 'enospc');
sql($node, q{SELECT event_store_test.inject_fault('scan-before-slice', 'kill', 1000000)});
ok($node->poll_query_until('postgres', q{SELECT event_store_test.fault_hits('server-answer') > 0}), 'no memory for its answer');
sleep 0.5;
is(sql($node, q{SELECT count(*) FROM e WHERE context_id = 'mine'}), '1', 'what the session has committed is there');
sql($node, 'SELECT event_store_test.disarm_faults()');

# it need not notice, if it waits for nothing
is($s->query_safe(q{SELECT count(*) FROM e}), '100001', 'the session goes on');
$s->query_safe(q{INSERT INTO e VALUES ('mine', 1, '')});

# ---- one that waits for the answer ----

inject('server-answer', 'enospc');
$s->query('SELECT count(*) FROM e');
like($s->{stderr}, qr/shard 0 has dropped the connection of this session/, 'it is told');
$s->{stderr} = '';
is($s->query_safe(q{SELECT count(*) FROM e WHERE context_id = 'mine'}), '2', 'and goes on');
$s->query_safe(q{INSERT INTO e VALUES ('mine', 2, '')});
$s->quit;
sql($node, 'SELECT event_store.sync()');
crash_restart($node);
ok(wait_open($node), 'open after a crash');
is(sql($node, q{SELECT count(*), count(DISTINCT n) FROM e WHERE context_id = 'mine'}), '3|3', 'all is there, once');
$node->stop;
done_testing();
