# A message of any size that is sent to a shard comes back as it was, from one session or from many, and what
# the two ends count of the ring is exact: nothing waits that has room.

use strict;
use warnings;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $ring = 256 * 1024;
my $node = PostgreSQL::Test::Cluster->new('channel');
$node->init;
$node->append_conf('postgresql.conf', <<CONF);
shared_preload_libraries = 'event_store'
wal_level = replica
event_store.shards = 2
event_store.queue_size = '256kB'
event_store.result_queue_size = '1MB'
max_worker_processes = 16
max_connections = 100
CONF
$node->start;
$node->safe_psql('postgres', 'CREATE SCHEMA event_store_test; CREATE EXTENSION event_store_test');

sub channel
{
	my ($column, $setup) = @_;
	return $node->safe_psql('postgres',
		"SET search_path = event_store_test; $setup; SELECT $column FROM channel(0)");
}

# ---- sizes around the edges: message = header (24 bytes) + bytes, ring bytes = message + length word (8)

for my $bytes (0, 1, 7, 8, 9, 1000, $ring - 33, $ring - 32, $ring - 31, $ring - 1, $ring, $ring + 1,
	$ring * 4 - 32, $ring * 4 - 31, $ring * 4 + 1, $ring * 10, 200 * 1000 * 1000)
{
	my ($status, $out, $err) = $node->psql('postgres', "SELECT event_store_test.echo(0, $bytes) > 0");

	is("$status $out $err", '0 t ', "$bytes bytes");
}

is($node->safe_psql('postgres', 'SELECT event_store_test.shard_counter(0, \'queue_timeouts\')'), '0', 'no time-outs');

# every size in a stretch, so that messages begin and end at every place of the ring
is( $node->safe_psql('postgres',
		"SELECT count(event_store_test.echo(1, 60000 + s * 13)) FROM generate_series(1, 3000) s"),
	'3000', 'messages that wrap at every place');
is( $node->safe_psql('postgres',
		"SELECT count(event_store_test.echo(1, 250000 + s * 97)) FROM generate_series(1, 300) s"),
	'300', 'messages of about the size of the ring');

# many under way, small and large, answers in pieces that are parked while we send
for my $case ([ 0, 20000, 5000 ], [ 1000, 10000, 500 ], [ 65536, 1000, 30 ], [ 300000, 300, 8 ], [ 3000000, 20, 3 ])
{
	my ($bytes, $times, $window) = @$case;
	my ($status, $out, $err) =
	  $node->psql('postgres', "SELECT event_store_test.echo_window(0, $bytes, $times, $window) > 0");

	is("$status $out $err", '0 t ', "$window messages of $bytes bytes under way");
}

# ---- counting

# 2000 messages of 24 + 8 ring bytes do not wait if the shard keeps up, and what it says to have taken is never
# more than what was sent; when the sender asks for the whole ring, it is exact
is( channel('sent_bytes - taken_bytes < 256 * 1024, sent_messages',
		"SELECT send_only(0, 0, 2000); SELECT echo(0, 0, 50)") =~ s/^[^|]*\n//gmr,
	't|2051', 'what lies in the ring');
my $room = $node->safe_psql('postgres', <<'SQL');
SET search_path = event_store_test;
DO $$ BEGIN
	PERFORM send_only(0, 1000, 1000);
	PERFORM echo(0, 256 * 1024);
END $$;
SELECT sent_bytes - taken_bytes <= 2 * 65536 FROM channel(0);
SQL
is($room, 't', 'the shard gives room back, all but a quarter of the ring and the last piece');

# room that was promised was there: otherwise shm_mq would have broken the channel
is( channel("generation - current_setting('test.generation')::bigint, half_sent", <<'SQL') =~ s/^[^|]*\n//gmr, '0|f', 'the channel was never broken');
SELECT echo(0, 1);
SELECT set_config('test.generation', generation::text, false) FROM channel(0);
SELECT send_only(0, 1000, 100000);
SELECT send_only(0, 48 * 1024, 5000);
SELECT echo_window(0, 100000, 500, 20);
SELECT echo(0, 1000000, 10)
SQL

my $before = $node->safe_psql('postgres', "SELECT event_store_test.shard_counter(1, 'queue_full_waits')");
$node->safe_psql('postgres', 'SELECT event_store_test.echo(1, 40000, 200)');
is($node->safe_psql('postgres', "SELECT event_store_test.shard_counter(1, 'queue_full_waits') - $before"),
	'0', 'a sender that waits for each answer never waits for room');

# ---- 64 sessions

my $script = PostgreSQL::Test::Utils::tempdir() . '/echo.sql';
append_to_file($script, <<'SQL');
\set shard random(0, 1)
\set bytes random_exponential(0, 400000, 10)
SELECT event_store_test.echo(:shard, :bytes, 3);
SQL
$node->command_ok(
	[ 'pgbench', '-n', '-c', '64', '-j', '2', '-t', '60', '-f', $script, 'postgres' ],
	'64 sessions with messages of all sizes');

is($node->safe_psql('postgres', 'SELECT event_store_test.echo(0, 1) > 0'), 't', 'the shard is well');
unlike(slurp_file($node->logfile), qr/drops the connection|broken request|TRAP|PANIC/, 'no complaints in the log');

$node->stop;
done_testing();
