# A damaged, missing or foreign file of the store is a refusal that names the file; what is wrong with one shard
# leaves the others open; the store never opens empty; and a file that is put back makes all well again.

use strict;
use warnings;
use File::Copy qw(copy);
use File::Path qw(remove_tree);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::RecursiveCopy;
use PostgreSQL::Test::Utils;
use Test::More;

my $conf = <<CONF;
shared_preload_libraries = 'event_store'
wal_level = replica
max_worker_processes = 16
event_store.startup_timeout = '120s'
event_store.wal_file_size = '1MB'
CONF

sub new_node
{
	my ($name, $shards) = @_;
	my $node = PostgreSQL::Test::Cluster->new($name);

	$node->init;
	$node->append_conf('postgresql.conf', $conf . "event_store.shards = $shards\n");
	$node->start;
	return $node;
}

my $node = new_node('files', 2);
my $dir  = $node->data_dir . '/event_store';

$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION event_store;
CREATE TABLE t (context_id text, position bigint, x int) USING event_store;
SQL

sub insert_rows
{
	$node->safe_psql('postgres',
		"INSERT INTO t SELECT 'c' || g % 100, NULL, g FROM generate_series(1, 1000) g; SELECT event_store.sync()");
	return;
}

# Result of a query, or "SQLSTATE message DETAIL … HINT …" on one line.
sub ask
{
	my ($query) = @_;
	my ($status, $out, $err) =
	  $node->psql('postgres', $query, extra_params => [ '-v', 'VERBOSITY=verbose' ]);

	return $out if $status == 0;
	$err =~ s/^psql:\S*\s*//;
	$err =~ s/\s+/ /g;
	return $err;
}

sub sum_of { return ask('SELECT count(*), sum(x), count(DISTINCT position) FROM t'); }

# Number of events of a context of that shard.
my @context;
sub replay { return ask("SELECT count(*) FROM event_store.replay('$context[$_[0]]', store => 't')"); }

sub change_byte
{
	my ($file, $offset) = @_;

	open(my $f, '+<:raw', $file) or die "$file: $!";
	seek($f, $offset, 0);
	read($f, my $byte, 1);
	seek($f, $offset, 0);
	print $f chr(ord($byte) ^ 0x10);
	close($f);
	return;
}

# Stops the server in the given way, does something to its files, starts it; afterwards the files are put back.
sub with_damage
{
	my ($name, $mode, $damage, $check) = @_;

	$node->stop($mode);
	remove_tree("$dir.saved");
	PostgreSQL::Test::RecursiveCopy::copypath($dir, "$dir.saved");
	$damage->();
	$node->start;
	subtest $name => $check;
	$node->stop('immediate');
	remove_tree($dir);
	rename("$dir.saved", $dir) or die "rename: $!";
	unlink("$dir.opened"); # or shards that were opened meanwhile notice that these are older files
	$node->start;
	return;
}

insert_rows();
my $expected = sum_of();
is($expected, '1000|500500|1000', 'rows are there');
# a context of each shard
@context = map {
	$node->safe_psql('postgres',
		"SELECT 'c' || g FROM generate_series(0, 99) g WHERE event_store.shard_of('c' || g, 't') = $_ LIMIT 1")
} (0, 1);

for my $mode ('immediate', 'fast')
{
	with_damage("$mode: a byte of the store file", $mode,
		sub { change_byte("$dir/store", 100) },
		sub {
			like(sum_of(), qr/XX001.*"event_store\/store" is damaged.*[Ee]xpected checksum [0-9A-F]{8}, found [0-9A-F]{8}/,
				'refused with checksums');
		});

	with_damage("$mode: store file cut", $mode,
		sub { truncate("$dir/store", 1000) or die "truncate: $!" },
		sub { like(sum_of(), qr/XX001.*"event_store\/store" is damaged at offset 1000/, 'refused'); });

	with_damage("$mode: store file missing", $mode,
		sub { unlink("$dir/store") or die "unlink: $!" },
		sub {
			like(sum_of(), qr/XX001.*"event_store\/store" is missing.*slot "event_store" says/, 'refused');
			ok(!-e "$dir/store", 'and not made anew');
		});

	with_damage("$mode: directory of a shard missing", $mode,
		sub { remove_tree("$dir/shard_1") },
		sub {
			like(replay(1),
				qr/XX001.*directory "event_store\/shard_1" of shard 1 is missing/, 'refused');
			is(replay(0), '10', 'the other shard answers');
			ok(!-e "$dir/shard_1", 'and not made anew');
		});

	with_damage("$mode: directory of a shard empty", $mode,
		sub { unlink(glob("$dir/shard_1/*")) },
		sub {
			like(replay(1),
				qr/XX001.*"event_store\/shard_1\/control.0" is damaged.*missing/, 'refused');
		});

	with_damage("$mode: one control block", $mode,
		sub { change_byte("$dir/shard_0/control.0", 40) },
		sub { is(sum_of(), $expected, 'all rows are there'); });
	with_damage("$mode: the other control block", $mode,
		sub { change_byte("$dir/shard_0/control.1", 40) },
		sub { is(sum_of(), $expected, 'all rows are there'); });

	with_damage("$mode: both control blocks", $mode,
		sub { change_byte("$dir/shard_0/control.$_", 40) for 0, 1 },
		sub {
			like(replay(0),
				qr/XX001.*"event_store\/shard_0\/control.0" is damaged at offset \d+.*checksum/, 'refused');
			is(replay(1), '10', 'the other shard answers');
		});

	with_damage("$mode: manifest", $mode,
		sub { change_byte("$dir/shard_0/manifest", 30) },
		sub {
			like(replay(0),
				qr/XX001.*"event_store\/shard_0\/manifest" is damaged at offset 0.*checksum/, 'refused');
		});

	with_damage("$mode: manifest missing", $mode,
		sub { unlink("$dir/shard_0/manifest") or die "unlink: $!" },
		sub {
			like(replay(0),
				qr/XX001.*"event_store\/shard_0\/manifest" is damaged.*missing/, 'refused');
		});

	with_damage("$mode: files of the other shard", $mode,
		sub { copy("$dir/shard_1/control.$_", "$dir/shard_0/control.$_") for 0, 1 },
		sub {
			like(replay(0),
				qr/55000.*"event_store\/shard_0\/control\.\d" belongs to another event store.*shard 1 of 2, not of shard 0 of 2/,
				'refused');
		});
	is(sum_of(), $expected, "$mode: put back, all rows are there");
}

# ---- files that nobody names

$node->stop;
for my $name ('pgsql_tmp.seg.0000000000000001', 'seg.00000000000fffff', 'pgsql_tmp.control.0', 'wal.000fffff')
{
	open(my $f, '>', "$dir/shard_0/$name") or die "$name: $!";
	close($f);
}
$node->start;
is(sum_of(), $expected, 'files that were never finished do no harm');
is(join(' ', grep { -e "$dir/shard_0/$_" } 'pgsql_tmp.seg.0000000000000001', 'seg.00000000000fffff', 'pgsql_tmp.control.0',
		'wal.000fffff'), '', 'and are gone');
ok((grep { /wal\.001[0-9a-f]{5}$/ } glob("$dir/shard_0/wal.*")), 'numbers of the log go on above what was there');

# ---- number of shards

$node->append_conf('postgresql.conf', 'event_store.shards = 3');
$node->restart;
like(sum_of(), qr/55000.*event_store.shards is 3, but the store has 2 shards.*event_store.shards = 2/, 'another number of shards');
$node->append_conf('postgresql.conf', 'event_store.shards = 0');
$node->restart;
is(sum_of(), $expected, 'with the default a store keeps its number');
is($node->safe_psql('postgres', 'SELECT count(*) FROM event_store.stat_shards'), '2', 'which is 2');

# ---- another cluster's store

my $other = new_node('other', 2);
my $other_dir = $other->data_dir . '/event_store';
my $sysid = $node->safe_psql('postgres', 'SELECT system_identifier FROM pg_control_system()');
$other->stop;
$node->stop('immediate');
remove_tree($other_dir);
PostgreSQL::Test::RecursiveCopy::copypath($dir, $other_dir);
$other->start;
my (undef, undef, $err) = $other->psql('postgres', 'CREATE EXTENSION event_store; SELECT event_store.sync()',
	extra_params => [ '-v', 'VERBOSITY=verbose' ]);
like($err, qr/55000.*belongs to another cluster.*system identifier is $sysid/s, 'a copied store is refused');
like($err, qr/event_store.adopt_system_id = '$sysid'/, 'with a hint');

foreach my $id ('abc', '-1', ' 1', "${sysid}x", '0', '99999999999999999999')
{
	(undef, undef, $err) = $other->psql('postgres', "ALTER SYSTEM SET event_store.adopt_system_id = '$id'");
	like($err, qr/invalid value for parameter "event_store\.adopt_system_id": "$id".*DETAIL:.*HINT:.*pg_controldata/s, "'$id' is no system identifier");
}
(undef, undef, $err) = $other->psql('postgres', "ALTER SYSTEM SET event_store.adopt_system_id = '$sysid'; ALTER SYSTEM RESET event_store.adopt_system_id");
is($err, '', 'this one is');
$other->append_conf('postgresql.conf', "event_store.adopt_system_id = '$sysid'");
$other->restart;
(undef, undef, $err) = $other->psql('postgres', 'CREATE EXTENSION event_store', extra_params => [ '-v', 'VERBOSITY=verbose' ]);
like($err, qr/55000.*cannot be adopted.*not stopped cleanly/s, 'one that was not stopped cleanly is not adopted');

$node->start;
is(sum_of(), $expected, 'the original goes on');
$node->stop;
$other->stop;
remove_tree($other_dir);
PostgreSQL::Test::RecursiveCopy::copypath($dir, $other_dir);
$other->start;
my $rows = 'SELECT sum(segment_rows) + sum(memtable_rows) FROM event_store.stat_shards';
$other->safe_psql('postgres', 'CREATE EXTENSION event_store; SELECT event_store.sync()');
is($other->safe_psql('postgres', $rows), '1000', 'one that was is adopted');
$other->append_conf('postgresql.conf', "event_store.adopt_system_id = ''");
$other->restart;
$other->safe_psql('postgres', 'SELECT event_store.sync()');
is($other->safe_psql('postgres', $rows), '1000', 'and is this cluster\'s from then on');
$other->stop;

done_testing();
