# A configuration with which the store cannot work stops the server start, or the statement, with a message that
# says what to write into postgresql.conf.

use strict;
use warnings;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = PostgreSQL::Test::Cluster->new('start');
$node->init;
my $conf = $node->data_dir . '/postgresql.conf';
$node->append_conf('postgresql.conf', "wal_level = replica\nmax_worker_processes = 8\nevent_store.shards = 2\n");

# ---- without preload

$node->start;
my ($status, $out, $err) = $node->psql('postgres', "\\set VERBOSITY verbose\nCREATE EXTENSION event_store");
like(
	$err,
	qr/ERROR:  55000: event_store is not loaded\nHINT:  Set "shared_preload_libraries = 'event_store'" in postgresql.conf and restart the server\./,
	'CREATE EXTENSION without preload');
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'auto_explain'\n");
$node->restart;
($status, $out, $err) = $node->psql('postgres', 'CREATE EXTENSION event_store');
like($err, qr/HINT:  Set "shared_preload_libraries = 'auto_explain, event_store'" in/, 'the line keeps what is preloaded already');
is($node->safe_psql('postgres', "LOAD 'event_store'; SELECT count(*) FROM pg_settings WHERE name LIKE 'event_store.%'"),
	$node->safe_psql('postgres', "SELECT count(*) FROM pg_settings WHERE name LIKE 'event_store.%'"),
	'loading it late defines nothing');
$node->stop;
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'event_store'\n");

# ---- start errors

sub start_fails
{
	my ($name, $lines, @patterns) = @_;
	my $offset = -s $node->logfile;

	append_to_file($conf, "$lines\n");
	is($node->start(fail_ok => 1), 0, "$name: the server does not start");
	my $log = substr(slurp_file($node->logfile), $offset);
	like($log, $_, $name) for @patterns;
	# later lines win
	append_to_file($conf,
		"wal_level = replica\nmax_wal_senders = 10\nmax_replication_slots = 10\nmax_worker_processes = 8\nevent_store.shards = 2\n");
	return;
}

start_fails(
	'wal_level',
	"wal_level = minimal\nmax_wal_senders = 0",
	qr/FATAL:  event_store needs wal_level to be "replica" or "logical"/,
	qr/HINT:  Set "wal_level = replica" in postgresql\.conf\./);
start_fails(
	'max_replication_slots',
	'max_replication_slots = 0',
	qr/FATAL:  event_store needs a replication slot, but max_replication_slots is 0/,
	qr/HINT:  Set "max_replication_slots = 10" in postgresql\.conf\./);
start_fails(
	'max_worker_processes',
	"event_store.shards = 7\nmax_worker_processes = 8",
	qr/FATAL:  event_store needs 9 background workers, but max_worker_processes is 8/,
	qr/DETAIL:  One is its keeper; event_store\.shards is 7 and event_store\.maintenance_workers is 1\./,
	qr/HINT:  Set "max_worker_processes = \d+" in postgresql\.conf/);
# ---- warnings, and what runs

my $offset = -s $node->logfile;
append_to_file($conf, "synchronous_standby_names = 'standby'\nsynchronous_commit = local\nmax_slot_wal_keep_size = '100MB'\nevent_store.shard = 7\n");
$node->start;
my $log = substr(slurp_file($node->logfile), $offset);
like($log, qr/WARNING:  event_store does not run on standbys/, 'synchronous_standby_names');
like($log, qr/WARNING:  max_slot_wal_keep_size is 100 MB/,     'max_slot_wal_keep_size');
like($log, qr/WARNING:  invalid configuration parameter name "event_store\.shard"/, 'a setting that does not exist');
# connections are taken while they start
ok( $node->poll_query_until('postgres',
		"SELECT string_agg(backend_type, ', ' ORDER BY backend_type) FROM pg_stat_activity WHERE backend_type ~ 'event_store'",
		'event_store keeper, event_store maintenance 0, event_store shard 0, event_store shard 1'),
	'the processes show in pg_stat_activity');
$node->safe_psql('postgres', 'CREATE EXTENSION event_store');
$node->safe_psql('postgres', 'CREATE DATABASE other');
$node->safe_psql('postgres', 'DROP DATABASE other');
pass('DROP DATABASE is not held up by them');

# half of the processors, between 1 and 16, unless there are files already
$node->stop;
append_to_file($conf, "event_store.shards = 0\nmax_worker_processes = 30\n");
$node->start;
ok( $node->poll_query_until('postgres',
		"SELECT (SELECT count(*) FROM pg_stat_activity WHERE backend_type ~ 'event_store shard') || ' ' || string_agg(state, ' ') FROM event_store.stat_shards",
		'2 open open'),
	'event_store.shards = 0 takes what the store has');
$node->stop;

# ---- without workers

my $single = $node->data_dir;
my $stdout = '';
my $stderr = '';
IPC::Run::run(
	[ 'postgres', '--single', '-D', $single, 'postgres' ],
	'<', \"SELECT 1 AS one;\nSELECT count(*) FROM event_store.events;\n",
	'>', \$stdout, '2>', \$stderr);
like($stdout, qr/one = "1"/, 'single-user mode works');
like($stdout . $stderr, qr/ERROR:  events are not available in single-user mode/, 'without events');

PostgreSQL::Test::Utils::system_or_bail('pg_ctl', '-w', '-D', $node->data_dir, '-l', $node->logfile, '-o', "-b -k ${\$node->host}", 'start');
$node->_update_pid(1);
is($node->safe_psql('postgres', "SELECT count(*) FROM pg_stat_activity WHERE backend_type ~ 'event_store'"),
	'0', 'no workers in binary upgrade mode');
$node->stop;

done_testing();
