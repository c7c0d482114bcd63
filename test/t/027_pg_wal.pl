# A shard recovers from PostgreSQL's WAL what its own files have not. WAL that is gone is a refusal that names LSN,
# file and slot; put back, nothing is missing; given up knowingly, the shard opens with what it has. Records that only
# look like ours are not taken for ours. Shards also work where the kernel refuses io_uring.

use strict;
use warnings;
use File::Copy qw(move);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = PostgreSQL::Test::Cluster->new('wal');
$node->init;
$node->append_conf('postgresql.conf', <<CONF);
shared_preload_libraries = 'event_store'
wal_level = replica
max_worker_processes = 16
event_store.shards = 2
event_store.startup_timeout = '120s'
CONF
$node->start;
$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION event_store;
CREATE TABLE t (context_id text, position bigint, x int) USING event_store;
CREATE TABLE h (a int, b text);
SQL
my $insert = "INSERT INTO t SELECT 'c' || g % 100, NULL, 1 FROM generate_series(1, 1000) g";

sub ask
{
	my ($query) = @_;
	my ($status, $out, $err) = $node->psql('postgres', $query // 'SELECT count(*), sum(x), count(DISTINCT position) FROM t',
		extra_params => [ '-v', 'VERBOSITY=verbose' ]);

	return $out if $status == 0;
	$err =~ s/\s+/ /g;
	return $err;
}

# The slot follows once a second: where the paused shard needs PostgreSQL's WAL from.
sub slot_at_rest
{
	my $slot = q{SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'event_store'};
	$node->poll_query_until('postgres', "SELECT ($slot) = (SELECT restart_lsn FROM event_store.stat_shards WHERE shard = 1)")
	  or diag('the slot does not follow');
	return $node->safe_psql('postgres', $slot);
}

# ---- forged records

for my $prefix ("'event_store'", "E'event_store\\x01'", "'event_storeX'", "''")
{
	$node->safe_psql('postgres', "SELECT pg_logical_emit_message($_, $prefix, repeat('ESBM', 1000)) IS NULL")
	  for 'true', 'false';
}
# as long as ours, and ours in the parts that can be written
$node->safe_psql('postgres', "SELECT pg_logical_emit_message(true, 'event_store12', 'ESBM')");

# ---- a shard that has much to recover, over several files

$node->safe_psql('postgres', "$insert; SELECT event_store.sync()");
$node->safe_psql('postgres', "$insert; SELECT event_store.pause_shard(1); $insert; $insert");
for (1 .. 4)
{
	$node->safe_psql('postgres', "INSERT INTO h SELECT g, repeat('x', 500) FROM generate_series(1, 50000) g; SELECT pg_switch_wal()");
}
$node->safe_psql('postgres', 'CHECKPOINT');
my $before = slot_at_rest();
my $segment = $node->safe_psql('postgres', "SELECT pg_walfile_name('$before'::pg_lsn)");
ok($node->poll_query_until('postgres', "SELECT pg_walfile_name(restart_lsn) > '$segment' FROM event_store.stat_shards WHERE shard = 0"), 'the other shard does not need that file');
my $path    = $node->data_dir . "/pg_wal/$segment";
ok(-e $path, 'the file is kept');
$node->safe_psql('postgres', 'CREATE DATABASE bare');
$node->safe_psql('bare', 'CREATE EXTENSION event_store');
$node->stop('immediate');

move($path, "$path.away");
$node->start;
my $answer = ask();
like($answer,
	qr/58P01: PostgreSQL's write-ahead log that shard 1 needs is gone.*from [0-9A-F]+\/[0-9A-F]+ on, but file "pg_wal\/$segment".*slot "event_store".*HINT: .*release_wal\(1\)/,
	'a file that is gone: refused');
ok($node->poll_query_until('postgres', "SELECT string_agg(shard || state, ' ' ORDER BY shard) FROM event_store.stat_shards", '0open 1failed'), 'by that shard only');
is(ask('CREATE DATABASE other'), '', 'databases can be made of templates without event tables');
like(ask('CREATE DATABASE another TEMPLATE bare'), qr/55000: cannot tell.*Shard 1 could not open/, 'and of no other');

move("$path.away", $path);
$node->restart;
is(ask(), '4000|4000|4000', 'put back: nothing is missing');

# ---- given up

# what was recovered is in the shard's files before it is paused, and what comes then is not
$node->safe_psql('postgres', "$insert; SELECT event_store.sync(); SELECT event_store.pause_shard(1); $insert");
for (1 .. 4)
{
	$node->safe_psql('postgres', "INSERT INTO h SELECT g, repeat('x', 500) FROM generate_series(1, 50000) g; SELECT pg_switch_wal()");
}
$node->safe_psql('postgres', 'CHECKPOINT');
$before = slot_at_rest();
$segment = $node->safe_psql('postgres', "SELECT pg_walfile_name('$before'::pg_lsn)");
ok($node->poll_query_until('postgres', "SELECT pg_walfile_name(restart_lsn) > '$segment' FROM event_store.stat_shards WHERE shard = 0"), 'the other shard does not need that file');
$node->stop('immediate');
unlink($node->data_dir . "/pg_wal/$segment") or die "unlink: $!";
$node->start;
like(ask(), qr/58P01.*is gone/, 'refused again');
like(ask('SELECT event_store.release_wal(0)'), qr/55000.*shard 0 does not need to/, 'nothing to give up for a shard that is open');
is(ask('SELECT event_store.release_wal(1)'), '', 'given up');
ok($node->poll_query_until('postgres', "SELECT bool_and(state = 'open') FROM event_store.stat_shards"), 'the shard opens');
like(slurp_file($node->logfile), qr/WARNING: .*shard 1 opens without PostgreSQL's WAL from/, 'and the log says what it costs');
my ($count) = split(/\|/, ask());
cmp_ok($count, '>=', 5000, 'what is in the files is there');
$node->safe_psql('postgres', $insert);
$node->stop('immediate');
$node->start;
is(ask(), join('|', ($count + 1000) x 3), 'and it goes on from there');

# ---- no io_uring

$node->safe_psql('postgres', 'CREATE SCHEMA event_store_test; CREATE EXTENSION event_store_test');
SKIP:
{
	skip 'built without fault points', 4
	  unless $node->safe_psql('postgres', 'SELECT event_store_test.fault_points_compiled()') eq 't';
	skip 'io_uring is not available here', 4
	  unless $node->safe_psql('postgres', 'SELECT bool_and(io_method = \'io_uring\') FROM event_store.stat_shards') eq 't';

	$node->safe_psql('postgres', "SELECT event_store_test.inject_fault('uring-setup', 'eio')");
	$node->safe_psql('postgres',
		"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'event_store shard 0'");
	ok( $node->poll_query_until('postgres',
			"SELECT io_method = 'sync' AND state = 'open' FROM event_store.stat_shards WHERE shard = 0"),
		'falls back');
	my @said = slurp_file($node->logfile) =~ /LOG: .*could not set up io_uring/g;
	is(scalar(@said), 1, 'with one line in the log');
	$node->safe_psql('postgres', "$insert; SELECT event_store.sync(); SELECT event_store.flush()");
	is(ask(), join('|', ($count + 2000) x 3), 'and works');
	$node->stop('immediate');
	$node->start;
	is(ask(), join('|', ($count + 2000) x 3), 'also after a crash');
}
for my $method ('sync', 'io_uring')
{
	$node->append_conf('postgresql.conf', "event_store.io_method = '$method'");
  SKIP:
	{
		skip 'io_uring is not available here', 2
		  if $method eq 'io_uring' && slurp_file($node->logfile) =~ /could not set up io_uring: (?!Input)/;
		$node->restart;
		is(ask("SELECT string_agg(DISTINCT io_method, ' ') FROM event_store.stat_shards"), $method, "io_method = $method");
		my $was = ask('SELECT count(*) FROM t');
		$node->safe_psql('postgres', "$insert; SELECT event_store.sync()");
		is(ask('SELECT count(*) FROM t'), $was + 1000, 'writes and reads');
	}
}
SKIP:
{
	skip 'no fault points or no io_uring', 3
	  unless $node->safe_psql('postgres',
		q{SELECT event_store_test.fault_points_compiled() AND bool_and(io_method = 'io_uring') FROM event_store.stat_shards}) eq 't';

	# asked for by name there is nothing to fall back to: whoever waits for the shard is told why it does not open
	$node->safe_psql('postgres', "SELECT event_store_test.inject_fault('uring-setup', 'eio always')");
	$node->safe_psql('postgres',
		"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'event_store shard 0'");
	ok( $node->poll_query_until('postgres',
			"SELECT state = 'failed' AND reason LIKE 'could not set up io_uring: %io_method = sync%' FROM event_store.stat_shards WHERE shard = 0"),
		'io_method = io_uring, and none to be had: stat_shards says so');
	like(ask(), qr/58000: could not set up io_uring: .*HINT: .*Set "event_store\.io_method = sync"/, 'so do statements');
	$node->safe_psql('postgres', 'SELECT event_store_test.disarm_faults()');
	ok($node->poll_query_until('postgres', "SELECT bool_and(state = 'open') FROM event_store.stat_shards"), 'it opens when it can');
}
$node->stop;

done_testing();
