# An ERROR while a shard answers a question ends the question and nothing else: no lock of PostgreSQL's stays behind.

use strict;
use warnings;
use EventStore::Server qw(new_server wait_open sql try_sql faults_compiled seed log_offset server_log_since);
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

seed();
my $node = new_server('slice_errors', 'event_store.shards = 1', 'autovacuum = off');
plan skip_all => 'no fault points in this build' unless faults_compiled($node);

sql($node, 'CREATE TABLE e (context_id text, n int) USING event_store');
my $writer = $node->background_psql('postgres', on_error_stop => 0);
my ($failed, $tries) = (0, 0);

# The question has to come before the shard's own poll, once a second: that one's ERROR ends the process.
while (!$failed && $tries++ < 30)
{
	my $offset = log_offset($node);
	sql($node, q{SELECT event_store_test.inject_fault('commit-after-commit', 'sleep')});
	$writer->query_until(qr/begun/, "\\echo begun\nINSERT INTO e VALUES ('a', $tries);\n");
	$node->poll_query_until('postgres', q{SELECT event_store_test.fault_hits('commit-after-commit') > 0});
	sql($node, q{SELECT event_store_test.inject_fault('verdict-asked', 'error')});
	try_sql($node, 'SELECT count(*) FROM e');
	sql($node, 'SELECT event_store_test.disarm_faults()');
	$failed = server_log_since($node, $offset) =~ /could not answer a request: fault injected at "verdict-asked"/;
	$writer->query('SELECT 1');
	ok(wait_open($node), 'open') or last;
}
ok($failed, 'a question has failed with the lock held');

# whoever truncates CLOG takes it, and then everybody waits who asks for an old transaction
ok($node->poll_query_until('postgres', 'SELECT event_store_test.clog_lock_is_free()'), 'the lock is free');
is(sql($node, 'SELECT count(*) FROM e'), $tries > 30 ? 30 : $tries, 'all is there');
$writer->quit;
$node->stop('immediate');
done_testing();
