# PostgreSQL's WAL is gone with rows that a bulk load's versions follow: given up knowingly, the shard opens, and the load has the
# versions that it was promised.

use strict;
use warnings;
use EventStore::FlushLoad qw(flush_server);
use EventStore::Server qw(sql try_sql faults_compiled seed);
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

seed();
my $node = flush_server('release_bulk', 'event_store.shards = 1', 'event_store.wal_sync_interval = 20s');
plan skip_all => 'no fault points in this build' unless faults_compiled($node);

sub insert { return "INSERT INTO versioned (context_id, n) SELECT 'c' || g % 10, g FROM generate_series(1, $_[0]) g"; }

my $load = $node->background_psql('postgres', on_error_stop => 0);
$load->query_safe('BEGIN; ' . insert(20000) . q{; SELECT spilled()});
# what is left in memory is little, so that FINISH logs it in the shard's own WAL
my ($rows, $left) = (20000, 'unknown');
for (my $i = 0; $i < 200 && !($left =~ /^\d+$/ && $left <= 200); $i++)
{
	$load->query_safe(insert(100) . q{; SELECT count(*) FROM versioned WHERE context_id = ''});
	$rows += 100;
	# as it is when the shard is at rest: a spill, once begun, comes to its end
	for (my ($was, $same) = ('', 0); $same < 2; )
	{
		sleep 0.05;
		$left = sql($node, q{SELECT staged_rows FROM event_store.stat_shards});
		last if $left eq '0';
		$same = $left eq $was ? $same + 1 : 0;
		$was = $left;
	}
}
cmp_ok($left, '<=', 200, 'almost all rows of a load are spilled');
cmp_ok(sql($node, 'SELECT pending_segments FROM event_store.stat_shards'), '>', 0, 'it has pending segments');

# rows that are in PostgreSQL's WAL only: nobody writes segments
sql($node, q{SELECT pg_switch_wal()});
sql($node, q{SELECT inject_fault('job-after-take', 'sleep always')});
my $segment = sql($node, 'SELECT pg_walfile_name(pg_current_wal_insert_lsn())');
sql($node, insert(20000));
sql($node, q{SELECT event_store.sync()});
sql($node, q{SELECT pg_switch_wal()});
sql($node, 'CHECKPOINT');

# the load commits behind them; the shard dies before its segments are adopted
sql($node, 'ALTER SYSTEM SET restart_after_crash = off');
sql($node, 'SELECT pg_reload_conf()');
sql($node, q{SELECT inject_fault('adopt-before-manifest', 'kill')});
# an expected version: so all of them are asked for
$load->query(q{INSERT INTO versioned (context_id, version, n) VALUES ('x', 1, 0); COMMIT});
my $pid_file = $node->data_dir . '/postmaster.pid';
my $end = time() + 180;
sleep 0.05 while -e $pid_file && time() < $end;
ok(!-e $pid_file, 'the server has ended');
eval { $load->{run}->kill_kill };
$node->{_pid} = undef;
unlink($node->data_dir . "/pg_wal/$segment") or die "unlink $segment: $!";
$node->start;
my (undef, undef, $error) = try_sql($node, 'SELECT count(*) FROM versioned');
like($error, qr/PostgreSQL's write-ahead log that shard 0 needs is gone/, 'refused');
sql($node, 'SELECT event_store.release_wal(0)');
ok($node->poll_query_until('postgres', q{SELECT state = 'open' FROM event_store.stat_shards}), 'given up: it opens');
is(sql($node, q{SELECT count(*), min(version), max(version) FROM versioned WHERE context_id <> 'x'}),
	join('|', $rows, 2001, 2000 + $rows / 10), 'the load has its versions');
sql($node, insert(10));
is(sql($node, 'SELECT max(version) FROM versioned'), 2001 + $rows / 10, 'the next one follows');
$node->stop;
done_testing();
