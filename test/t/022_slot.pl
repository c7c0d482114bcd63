# PostgreSQL's WAL is kept for shards that need it. Without the slot a store that was not stopped cleanly is
# refused; one that was gets its slot back. A slot that is lost while shards live costs nothing.

use strict;
use warnings;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = PostgreSQL::Test::Cluster->new('slot');
$node->init;
$node->append_conf('postgresql.conf', <<CONF);
shared_preload_libraries = 'event_store'
wal_level = replica
max_worker_processes = 16
event_store.shards = 2
event_store.startup_timeout = '120s'
min_wal_size = '32MB'
max_wal_size = '64MB'
CONF
$node->start;
my $slot_dir = $node->data_dir . '/pg_replslot/event_store';

$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION event_store;
CREATE SCHEMA event_store_test;
CREATE EXTENSION event_store_test;
CREATE TABLE t (context_id text, position bigint, x int) USING event_store;
CREATE TABLE h (a int, b text);
SQL

my $rows = 0;

my $insert = "INSERT INTO t SELECT 'c' || g % 100, NULL, 1 FROM generate_series(1, 100) g";

sub insert_rows
{
	$node->safe_psql('postgres', $insert);
	$rows += 100;
	return;
}

# Leaves a shard paused that has something in a queue (only a session it has seen before can send).
sub insert_and_pause
{
	my ($shard) = @_;

	$node->safe_psql('postgres', "$insert; SELECT event_store.pause_shard($shard); $insert");
	$rows += 200;
	return;
}

sub ask
{
	my ($query) = @_;
	my ($status, $out, $err) = $node->psql('postgres', $query // 'SELECT count(*), sum(x), count(DISTINCT position) FROM t',
		extra_params => [ '-v', 'VERBOSITY=verbose' ]);

	return $out if $status == 0;
	$err =~ s/\s+/ /g;
	return $err;
}

sub is_complete { is(ask(), "$rows|$rows|$rows", $_[0]); return; }

sub remove_slot
{
	my ($stop) = @_;

	$node->stop($stop);
	PostgreSQL::Test::Utils::system_log('rm', '-rf', $slot_dir);
	return;
}

# ---- it moves

insert_rows();
$node->safe_psql('postgres', 'SELECT event_store.sync()');
ok( $node->poll_query_until('postgres',
		"SELECT active AND pg_current_wal_flush_lsn() - restart_lsn < 100000 FROM pg_replication_slots WHERE slot_name = 'event_store'"),
	'the slot is held, and follows');
my $lag = "SELECT pg_current_wal_lsn() - restart_lsn FROM pg_replication_slots WHERE slot_name = 'event_store'";
$node->safe_psql('postgres', "INSERT INTO h SELECT g, repeat('x', 500) FROM generate_series(1, 100000) g");
ok($node->poll_query_until('postgres', "SELECT ($lag) < 20 * 1024 * 1024"), 'also when nobody writes events');

# a shard that takes nothing holds it
insert_and_pause(1);
$node->safe_psql('postgres', "INSERT INTO h SELECT g, repeat('x', 500) FROM generate_series(1, 100000) g");
sleep(2);
cmp_ok($node->safe_psql('postgres', $lag), '>', 50 * 1024 * 1024, 'a shard that is behind holds the slot');
$node->safe_psql('postgres', 'CHECKPOINT; CHECKPOINT');
$node->stop('immediate');
$node->start;
is_complete('and finds its events in PostgreSQL\'s WAL after a crash');
ok($node->poll_query_until('postgres', "SELECT ($lag) < 20 * 1024 * 1024"), 'then the slot moves on');

# ---- lost while stopped

insert_rows();
remove_slot('fast');
$node->start;
is_complete('clean store without slot: opens');
is(ask("SELECT slot_type FROM pg_replication_slots WHERE slot_name = 'event_store'"), 'physical', 'with a new slot');

insert_rows();
remove_slot('immediate');
$node->start;
like(ask(), qr/55000: replication slot "event_store" is missing, but shard \d was not stopped cleanly.*HINT: .*release_wal/,
	'a crashed store without slot: refused with a hint');
$node->restart;
like(ask(), qr/55000: replication slot "event_store" is missing/, 'again at the next start');
is(ask('SELECT event_store.release_wal(0), event_store.release_wal(1)'), '|', 'release_wal works while the store is refused');
ok($node->poll_query_until('postgres', 'SELECT count(*) = 2 FROM event_store.stat_shards WHERE state = \'open\''),
	'the shards open then');
is_complete('with what their files and the WAL that is left hold');

# ---- the keeper

my $keeper = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'event_store keeper'";
my $pid    = $node->safe_psql('postgres', $keeper);
$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
insert_rows();
is_complete('without the keeper');
ok($node->poll_query_until('postgres', "SELECT count(*) = 1 FROM ($keeper) k WHERE pid <> $pid"), 'the keeper comes again');
ok( $node->poll_query_until('postgres',
		"SELECT count(*) = 1 FROM pg_replication_slots WHERE slot_name = 'event_store' AND active"),
	'and holds the slot');
like(ask("SELECT pg_drop_replication_slot('event_store')"), qr/55006.*is active/, 'nobody can drop a slot that is held');

# dropped in the moment between two keepers
my $dropped = 0;
for (1 .. 10)
{
	last if $dropped;
	$dropped = 1 if $node->psql('postgres', <<'SQL') == 0;
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
}
ok($dropped, 'a slot can be dropped between two keepers');
insert_rows();
ok( $node->poll_query_until('postgres',
		"SELECT count(*) = 1 FROM pg_replication_slots WHERE slot_name = 'event_store' AND active"),
	'a slot that was dropped comes again');
ok($node->wait_for_log(qr/WARNING: .*replication slot "event_store" was lost/), 'with a warning');
insert_rows();
$node->safe_psql('postgres', 'SELECT event_store.sync()');
$node->stop('immediate');
$node->start;
is_complete('and nothing is missing');

# ---- max_slot_wal_keep_size

$node->append_conf('postgresql.conf', "max_slot_wal_keep_size = '48MB'");
$node->restart;
like(slurp_file($node->logfile), qr/WARNING: .*max_slot_wal_keep_size is 48 MB/, 'a small max_slot_wal_keep_size is warned about');
insert_and_pause(0);
my $offset = -s $node->logfile;
$node->safe_psql('postgres', "INSERT INTO h SELECT g, repeat('x', 500) FROM generate_series(1, 250000) g; CHECKPOINT");
$node->wait_for_log(qr/replication slot "event_store" was lost/, $offset);
$node->safe_psql('postgres', 'SELECT event_store.resume_shard(0)');
insert_rows();
is_complete('slot invalidated under load: nothing is missing');
$node->safe_psql('postgres', 'SELECT event_store.sync()');
$node->stop('immediate');
$node->start;
is_complete('nor after a crash');

# ---- no slot to be had

$node->stop;
PostgreSQL::Test::Utils::system_log('rm', '-rf', $slot_dir);
$node->append_conf('postgresql.conf', 'max_replication_slots = 1');
$node->start;
is_complete('one slot is enough');
$node->stop;
PostgreSQL::Test::Utils::system_log('rm', '-rf', $slot_dir);
$node->append_conf('postgresql.conf', "shared_preload_libraries = ''");
$node->start;
$node->safe_psql('postgres', "SELECT pg_create_physical_replication_slot('another')");
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'event_store'");
$node->restart;
like(ask(), qr/55000: event_store needs a replication slot, but all of them are in use.*max_replication_slots is 1\..*Set "max_replication_slots = 2" in postgresql\.conf/,
	'no free slot: the reason reaches the client');
$node->safe_psql('postgres', "SELECT pg_drop_replication_slot('another')");
ok($node->poll_query_until('postgres', 'SELECT count(*) = 2 FROM event_store.stat_shards WHERE state = \'open\''),
	'once there is one the store opens by itself');
is_complete('with all rows');
$node->stop;

done_testing();
