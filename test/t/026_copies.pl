# Whatever is a copy of one moment opens; whatever is not (a base backup of a running server, a promoted standby, a
# recovery from an archive) is refused with a hint rather than opened with events missing.

use strict;
use warnings;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $conf = <<CONF;
shared_preload_libraries = 'event_store'
wal_level = replica
max_wal_senders = 4
max_worker_processes = 16
event_store.shards = 2
event_store.startup_timeout = '20s'
CONF

my $node = PostgreSQL::Test::Cluster->new('primary');
$node->init(allows_streaming => 1, has_archiving => 1);
$node->append_conf('postgresql.conf', $conf);
$node->start;
$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION event_store;
CREATE TABLE t (context_id text, position bigint, x int) USING event_store;
SQL

my $rows = 0;

sub insert_rows
{
	$node->safe_psql('postgres', "INSERT INTO t SELECT 'c' || g % 100, NULL, 1 FROM generate_series(1, 100) g");
	$rows += 100;
	return;
}

sub ask
{
	my ($on, $query) = @_;
	my ($status, $out, $err) = $on->psql('postgres', $query // 'SELECT count(*), sum(x), count(DISTINCT position) FROM t',
		extra_params => [ '-v', 'VERBOSITY=verbose' ]);

	return $out if $status == 0;
	$err =~ s/\s+/ /g;
	return $err;
}

my $missing = qr/55000: replication slot "event_store" is missing, but shard \d was not stopped cleanly.*promoted standby/;

# ---- a base backup of a running server

insert_rows();
$node->backup('running');
insert_rows();

my $restored = PostgreSQL::Test::Cluster->new('restored');
$restored->init_from_backup($node, 'running');
$restored->start;
like(ask($restored), $missing, 'restored base backup: refused');
like(ask($restored, 'SELECT 1'), qr/^1$/, 'the rest of the cluster works');
$restored->stop;

my $pitr = PostgreSQL::Test::Cluster->new('pitr');
$pitr->init_from_backup($node, 'running', has_restoring => 1, standby => 0);
$node->safe_psql('postgres', 'SELECT pg_switch_wal()');
$pitr->start;
ok($pitr->poll_query_until('postgres', 'SELECT NOT pg_is_in_recovery()'), 'recovered from the archive');
like(ask($pitr), qr/$missing|55000: the event store was written on timeline 1/, 'recovered from the archive: refused');
$pitr->stop;

# ---- a standby

my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($node, 'running', has_streaming => 1);
$standby->start;
insert_rows();
$node->wait_for_catchup($standby);
like(ask($standby), qr/57P03: event tables are not available while the server is a standby/, 'standby: says so');
like(ask($standby, 'EXPLAIN SELECT count(*) FROM t WHERE x = 1'), qr/^Aggregate.*\n.*Seq Scan on t /, 'but a query can be explained');
like(ask($standby, 'EXPLAIN (ANALYZE) SELECT * FROM t'), qr/57P03: event tables are not available while the server is a standby/, 'unless that runs it');
$standby->promote;
like(ask($standby), qr/$missing|55000: the event store was written on timeline 1/, 'promoted standby: refused');
$standby->stop;

# ---- copies of one moment

$node->stop('immediate');
$node->backup_fs_cold('crashed');
my $crashed = PostgreSQL::Test::Cluster->new('crashed');
$crashed->init_from_backup($node, 'crashed');
$crashed->start;
is(ask($crashed), "$rows|$rows|$rows", 'a snapshot of a crashed server opens');
$crashed->stop;

$node->start;
insert_rows();
$node->stop;
$node->backup_fs_cold('clean');
my $clean = PostgreSQL::Test::Cluster->new('clean');
$clean->init_from_backup($node, 'clean');
$clean->start;
is(ask($clean), "$rows|$rows|$rows", 'a copy of a server that was stopped cleanly opens');
$clean->stop;

# the same copy becomes a standby that sees later events only in PostgreSQL's WAL
my $late = PostgreSQL::Test::Cluster->new('late');
$late->init_from_backup($node, 'clean', has_streaming => 1);
$node->start;
$late->start;
insert_rows();
$node->wait_for_catchup($late);
$late->promote;
my $sysid = $node->safe_psql('postgres', 'SELECT system_identifier FROM pg_control_system()');
like(ask($late), qr/55000: the event store was written on timeline 1, but the cluster is on timeline 2.*adopt_system_id = '$sysid'/,
	'clean copy, then a standby, promoted: refused');
$late->stop;

# ---- detach

is(ask($node, 'SELECT event_store.detach()'), '', 'detach');
is(ask($node, "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'event_store'"), '0', 'the slot is gone');
like(ask($node), qr/55000: the event store is detached.*HINT: Restart the server/, 'statements are told');
$node->restart;
is(ask($node), "$rows|$rows|$rows", 'after a restart it is in use again');
is(ask($node, "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'event_store' AND active"), '1', 'with its slot');
insert_rows();
$node->stop('immediate');
$node->start;
is(ask($node), "$rows|$rows|$rows", 'and recovers as before');
$node->stop;

done_testing();
