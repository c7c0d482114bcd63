# Wherever a shard or the keeper dies while it works on its files, nothing that was committed is missing or
# doubled afterwards, and nothing that was not appears.

use strict;
use warnings;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

# every fault point of the files' modules that a running shard or keeper passes
my @while_running = qw(
  wal-before-write wal-written sync-begun sync-fixed wal-before-sync wal-synced
  control-before-write control-written control-synced restart-published
  wal-next-filled wal-next-renamed wal-next-ready wal-file-retired
  manifest-before-write manifest-written manifest-synced
  slot-before-move);
# and those of a shard that starts, or stops
my @at_start = qw(
  manifest-before-rewrite manifest-rewritten file-written file-synced file-renamed control-replaced
  wal-first-made wal-first-renamed log-before-unclean log-unclean pgwal-message);
my @at_stop = qw(log-before-clean log-clean keeper-before-exit);

my $node = PostgreSQL::Test::Cluster->new('kill');
$node->init;
$node->append_conf('postgresql.conf', <<CONF);
shared_preload_libraries = 'event_store'
wal_level = replica
fsync = on
max_worker_processes = 16
restart_after_crash = on
event_store.shards = 2
event_store.wal_file_size = '1MB'
event_store.memtable_size = '1MB'
event_store.startup_timeout = '60s'
log_statement = none
CONF
$node->append_conf('postgresql.conf', "event_store.io_method = '$ENV{ES_IO_METHOD}'") if $ENV{ES_IO_METHOD};
$node->start;
$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION event_store;
CREATE SCHEMA event_store_test;
CREATE EXTENSION event_store_test;
SQL
if ($node->safe_psql('postgres', 'SELECT event_store_test.fault_points_compiled()') ne 't')
{
	plan skip_all => 'built without fault points';
}
$node->safe_psql('postgres', <<'SQL');
CREATE TABLE t (context_id text, position bigint, version bigint, x int, filler text) USING event_store;
CREATE TABLE h (x int);
SQL

# psql that may find no server, or lose it: the harness's own functions do not survive that.
sub try_sql
{
	my ($sql) = @_;
	my $file = "$PostgreSQL::Test::Utils::tmp_check/try.sql";

	open(my $f, '>', $file) or die "$file: $!";
	print $f $sql;
	close($f);
	my $out = `psql -XAtq -v ON_ERROR_STOP=1 -d "@{[$node->connstr('postgres')]}" -f "$file" 2>&1`;
	chomp($out);
	return ($? == 0, $out);
}

my $round = 0;

# One transaction that writes to both tables: the heap says what must be there.
sub write_rows
{
	$round++;
	try_sql(<<SQL);
BEGIN;
INSERT INTO t SELECT 'c' || g % 50, NULL, NULL, $round * 10000 + g, md5(random()::text) FROM generate_series(1, 3000) g;
INSERT INTO h SELECT $round * 10000 + g FROM generate_series(1, 3000) g;
COMMIT;
BEGIN;
INSERT INTO t SELECT 'c' || g % 50, NULL, NULL, 0, 'never there' FROM generate_series(1, 100) g;
ROLLBACK;
SQL
	return;
}

sub check
{
	my ($name) = @_;

	is($node->safe_psql('postgres', <<'SQL'), '0|0|0|0', $name);
SELECT (SELECT count(*) FROM (SELECT x FROM t EXCEPT ALL SELECT x FROM h) a),
	(SELECT count(*) FROM (SELECT x FROM h EXCEPT ALL SELECT x FROM t) b),
	(SELECT count(*) - count(DISTINCT position) FROM t),
	(SELECT count(*) FROM (SELECT context_id FROM t GROUP BY 1
			HAVING min(version) <> 1 OR max(version) <> count(*) OR count(DISTINCT version) <> count(*)) d)
SQL
	return;
}

sub wait_until_up
{
	my ($good, $out);

	for (1 .. 300)
	{
		($good, $out) = try_sql('SELECT event_store.sync()');
		last if $good;
		select(undef, undef, undef, 0.2);
	}
	ok($good, "$_[0]: up again") or diag($out);
	return;
}

write_rows() for 1 .. 2;
check('before');

for my $point (@while_running)
{
	my $offset = -s $node->logfile;
	my $n      = $point =~ /written|synced|write|fixed|begun|published|move/ ? 3 : 1;

	$node->safe_psql('postgres', "SELECT event_store_test.inject_fault('$point', 'kill', $n)");
	for (1 .. 20)
	{
		write_rows();
		try_sql('SELECT event_store.flush()');
		last if slurp_file($node->logfile, $offset) =~ /terminated by signal 9/;
	}
	like(slurp_file($node->logfile, $offset), qr/terminated by signal 9/, "$point: killed");
	wait_until_up($point);
	check("$point: nothing is missing");
}

# a shard alone that starts: terminated, so that shared memory, and with it the fault, stays
for my $point (@at_start)
{
	my $offset = -s $node->logfile;

	write_rows();
	$node->safe_psql('postgres', "SELECT event_store_test.inject_fault('$point', 'kill')");
	for (1 .. 10)
	{
		last if slurp_file($node->logfile, $offset) =~ /terminated by signal 9/;
		try_sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'event_store shard 1'");
		for (1 .. 100)
		{
			last if slurp_file($node->logfile, $offset) =~ /terminated by signal 9/;
			select(undef, undef, undef, 0.1);
			write_rows() if $point eq 'pgwal-message' && $_ == 30;
		}
	}
	like(slurp_file($node->logfile, $offset), qr/terminated by signal 9/, "$point: killed");
	wait_until_up($point);
	check("$point: nothing is missing");
}

for my $point (@at_stop)
{
	my $offset = -s $node->logfile;

	write_rows();
	$node->safe_psql('postgres', "SELECT event_store_test.inject_fault('$point', 'kill')");
	$node->stop('fast', fail_ok => 1);
	like(slurp_file($node->logfile, $offset), qr/terminated by signal 9/, "$point: killed");
	$node->start;
	wait_until_up($point);
	check("$point: nothing is missing");
}

# again and again, without any fault
for my $i (1 .. 3)
{
	write_rows();
	$node->stop($i == 2 ? 'fast' : 'immediate');
	$node->start;
	check("start $i");
}
$node->stop;

done_testing();
