# Wherever the first start is interrupted, the next one goes on or begins again; and what only looks like an
# interrupted first start is refused.

use strict;
use warnings;
use File::Path qw(remove_tree);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::RecursiveCopy;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(usleep);

my $node = PostgreSQL::Test::Cluster->new('first');
$node->init;
$node->append_conf('postgresql.conf', <<CONF);
wal_level = replica
max_worker_processes = 16
max_replication_slots = 1
event_store.shards = 2
event_store.startup_timeout = '120s'
CONF
my $dir = $node->data_dir . '/event_store';

sub ask
{
	my ($status, $out, $err) = $node->psql('postgres', 'CREATE EXTENSION event_store; SELECT event_store.sync()',
		extra_params => [ '-v', 'VERBOSITY=verbose' ]);

	$node->psql('postgres', 'DROP EXTENSION IF EXISTS event_store CASCADE') if $status == 0;
	return 'good' if $status == 0;
	$err =~ s/\s+/ /g;
	return $err;
}

# A cluster whose only slot is taken: the keeper makes the store and cannot make its slot.
$node->start;
$node->safe_psql('postgres', "SELECT pg_create_physical_replication_slot('another')");
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'event_store'");
$node->restart;
like(ask(), qr/55000: event_store needs a replication slot, but all of them are in use.*max_replication_slots is 1\..*Set "max_replication_slots = 2" in postgresql\.conf/,
	'store made, no slot');
ok(-e "$dir/store", 'the store file is there');
$node->stop('immediate');
PostgreSQL::Test::RecursiveCopy::copypath($dir, "$dir.new");
remove_tree($node->data_dir . '/pg_replslot/another');

sub uuid { open(my $f, '<:raw', "$dir/store") or return ''; local $/; return unpack('x8 H32', <$f>); }
my $uuid = uuid();

# Starts with the files as they are; then everything is as after the interrupted first start again.
sub try_start
{
	my ($name, $change, $check) = @_;

	$change->();
	$node->start;
	$check->(ask(), $name);
	$node->stop('immediate');
	remove_tree($dir, $node->data_dir . '/pg_replslot/event_store');
	PostgreSQL::Test::RecursiveCopy::copypath("$dir.new", $dir);
	return;
}

try_start('crash between store file and slot: goes on', sub { },
	sub { is($_[0], 'good', $_[1]); is(uuid(), $uuid, 'with that store'); });
try_start('crash before the store file: begins again', sub { unlink("$dir/store") },
	sub { is($_[0], 'good', $_[1]); isnt(uuid(), $uuid, 'with a new store'); });
try_start(
	'crash with one shard made',
	sub { unlink("$dir/store"); rename("$dir/shard_1", "$dir/pgsql_tmp.shard_1"); },
	sub { is($_[0], 'good', $_[1]); ok(!-e "$dir/pgsql_tmp.shard_1", 'nothing is left of it'); });
try_start(
	'crash within a shard',
	sub {
		unlink("$dir/store", "$dir/shard_0/control.1");
		rename("$dir/shard_0", "$dir/pgsql_tmp.shard_0");
		remove_tree("$dir/shard_1");
	},
	sub { is($_[0], 'good', $_[1]); });
try_start('crash with nothing but a directory', sub { remove_tree($dir); mkdir($dir) }, sub { is($_[0], 'good', $_[1]); });
try_start('crash before anything', sub { remove_tree($dir) }, sub { is($_[0], 'good', $_[1]); });
try_start(
	'a store file that is not finished',
	sub { rename("$dir/store", "$dir/pgsql_tmp.store"); truncate("$dir/pgsql_tmp.store", 100); },
	sub { is($_[0], 'good', $_[1]); });

# ---- this is no first start

$node->start;
is(ask(), 'good', 'in use');
$node->stop('immediate');
rename("$dir/store", "$dir.store");
my $slot = $node->data_dir . '/pg_replslot/event_store';
$node->start;
like(ask(), qr/XX001: .*"event_store\/store" is missing DETAIL: Replication slot/,
	'store file missing, slot there');
$node->stop('immediate');
remove_tree($slot);
$node->start;
like(ask(), qr/XX001: .*"event_store\/store" is missing DETAIL: Directory "event_store\/shard_\d" holds files of an event store/,
	'store file and slot missing, shards there');
ok(-e "$dir/shard_$_/manifest", "shard $_ is untouched") for 0, 1;
$node->stop('immediate');
remove_tree($dir);
$node->start;
is(ask(), 'good', 'everything removed: a new store');
$node->stop;
remove_tree($dir);
$node->start;
like(ask(), qr/XX001: .*is missing.*drop the slot/, 'everything but the slot removed: refused');
is($node->safe_psql('postgres', "SELECT pg_drop_replication_slot('event_store')"), '', 'the slot can be dropped');
ok($node->poll_query_until('postgres', 'SELECT count(*) = 1 FROM pg_replication_slots'), 'then a new store is made');
# The slot can be seen a moment before the store opens.
my ($answer, $until) = (ask(), time + $PostgreSQL::Test::Utils::timeout_default);
while ($answer ne 'good' && time < $until)
{
	usleep(100_000);
	$answer = ask();
}
is($answer, 'good', 'which works');
$node->stop;

done_testing();
