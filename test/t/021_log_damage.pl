# Before the durable end of a shard's own WAL every byte is checked: damage is a refusal with file and offset, and
# never a shorter log. Behind the durable end nothing is believed, and nothing there is called damage.

use strict;
use warnings;
use File::Path qw(remove_tree);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::RecursiveCopy;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = PostgreSQL::Test::Cluster->new('log');
$node->init;
$node->append_conf('postgresql.conf', <<CONF);
shared_preload_libraries = 'event_store'
wal_level = replica
max_worker_processes = 16
event_store.shards = 1
event_store.wal_file_size = '1MB'
event_store.memtable_age = 0
event_store.startup_timeout = '20s'
CONF
$node->start;
my $dir = $node->data_dir . '/event_store/shard_0';

$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION event_store;
CREATE TABLE t (context_id text, position bigint, x int, filler text) USING event_store;
SQL
# several files of the log, none of it in segments
for my $i (1 .. 5)
{
	$node->safe_psql('postgres', <<SQL);
INSERT INTO t SELECT 'c' || g % 100, NULL, g, md5(random()::text) || md5(random()::text) FROM generate_series(1, 8000) g;
SELECT event_store.sync();
SQL
}

sub ask
{
	my ($status, $out, $err) = $node->psql('postgres', 'SELECT count(*), sum(x), count(DISTINCT position) FROM t',
		extra_params => [ '-v', 'VERBOSITY=verbose' ]);

	return $out if $status == 0;
	$err =~ s/\s+/ /g;
	return $err;
}

sub slurp { open(my $f, '<:raw', $_[0]) or die "$_[0]: $!"; local $/; return <$f>; }

sub write_at
{
	my ($file, $offset, $bytes) = @_;

	open(my $f, '+<:raw', $file) or die "$file: $!";
	seek($f, $offset, 0);
	print $f $bytes;
	close($f);
	return;
}

my $expected = ask();
is($expected, '40000|160020000|40000', 'rows are there');
$node->stop('immediate');
PostgreSQL::Test::RecursiveCopy::copypath($dir, "$dir.saved");

my @files = sort glob("$dir/wal.*");
cmp_ok(scalar(@files), '>', 3, 'the log has several files');

# The durable end, as the newer control block says it.
my ($end, $sequence) = (0, -1);
for my $control (map { slurp("$dir/control.$_") } 0, 1)
{
	my ($seq) = unpack('x8 Q<', $control);
	($sequence, $end) = ($seq, unpack('x56 Q<', $control)) if $seq > $sequence;
}
my $end_file = sprintf('%s/wal.%08x', $dir, $end >> 32);
my $end_at   = $end & 0xffffffff;
ok(-e $end_file, 'the durable end lies in a file that is there');

sub with_damage
{
	my ($name, $damage, $check) = @_;

	$damage->();
	$node->start;
	$check->(ask(), $name);
	$node->stop('immediate');
	remove_tree($dir);
	PostgreSQL::Test::RecursiveCopy::copypath("$dir.saved", $dir);
	return;
}

# ---- before the end

srand(4711);
for my $case (1 .. 12)
{
	my $file = $files[ int(rand(@files)) ];
	next if $file gt $end_file;
	my $content = slurp($file);
	my $limit   = $file eq $end_file ? $end_at : length($content);
	my $at      = $case <= 3 ? [ 0, 20, 70 ]->[ $case - 1 ] : int(rand($limit));
	(my $name = $file) =~ s/.*\///;

	with_damage(
		"$name: byte $at",
		sub { write_at($file, $at, chr(ord(substr($content, $at, 1)) ^ 1)) },
		sub {
			my ($answer, $test) = @_;
			if ($answer eq $expected && substr($content, $at & ~4095, 4096) =~ /\0{8}/)
			{
				# a byte between the end of the last group and the end of a recycled file
				fail("$test was not noticed");
				return;
			}
			like($answer, qr/XX001: file "event_store\/shard_0\/\Q$name\E" is damaged at offset \d+/, $test);
			my ($offset) = $answer =~ /offset (\d+)/;
			cmp_ok($offset // -1, '<=', $at, "$test: offset $offset is that of its frame");
		});
}

for my $file (grep { $_ le $end_file } @files)
{
	(my $name = $file) =~ s/.*\///;
	with_damage(
		"$name missing",
		sub { unlink($file) or die "unlink: $!" },
		sub {
			like($_[0], qr/XX001: file "event_store\/shard_0\/\Q$name\E" is damaged at offset 0: the file is missing/, $_[1]);
		});
}
with_damage(
	'a file cut',
	sub { truncate($end_file, $end_at - 8) or die "truncate: $!" },
	sub { like($_[0], qr/XX001: file .* is damaged at offset \d+: the file ends before offset $end_at/, $_[1]); });
with_damage(
	'a group wiped out',
	sub { write_at($files[0], 4096, "\0" x 4096) },
	sub { like($_[0], qr/XX001: file .* is damaged at offset \d+/, $_[1]); });
with_damage(
	'the last frame wiped out',
	sub { write_at($end_file, $end_at - 8, "\0" x 8) },
	sub { like($_[0], qr/XX001: file .* is damaged at offset \d+/, $_[1]); });

# ---- behind the end

with_damage(
	'garbage behind the durable end',
	sub { write_at($end_file, $end_at + (-$end_at) % 4096, join('', map { chr(rand(256)) } 1 .. 20000)) },
	sub { is($_[0], $expected, $_[1]); });
with_damage(
	'a copy of a good group behind the durable end',
	sub { write_at($end_file, $end_at + (-$end_at) % 4096, substr(slurp($end_file), 0, 8192)) },
	sub { is($_[0], $expected, $_[1]); });
with_damage(
	'the prepared file damaged',
	sub { write_at($_, 0, 'x' x 8192) for grep { $_ gt $end_file } @files },
	sub { is($_[0], $expected, $_[1]); });

# what an incarnation left behind its durable end is not believed, or called damage, by any later one either
write_at($end_file, $end_at + (-$end_at) % 4096, 'garbage' x 1000);
for my $round (1 .. 3)
{
	$node->start;
	$node->safe_psql('postgres', "INSERT INTO t VALUES ('later', NULL, 0); SELECT event_store.sync()");
	is(ask(), join('|', 40000 + $round, 160020000, 40000 + $round), "start $round after that");
	$node->stop($round == 2 ? 'fast' : 'immediate');
}
$node->start;
is(ask(), '40003|160020000|40003', 'all is there');
$node->stop;

done_testing();
