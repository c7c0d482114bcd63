# Before the durable end of a shard's own WAL every byte is checked, and so is every byte of its control blocks and of its
# manifest: damage is a refusal with file and offset, and never a shorter log. Behind the durable end nothing is believed, and
# nothing there is called damage.

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
event_store.startup_timeout = '120s'
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

# its first frame, which says what the file is; others are sampled below
for my $at (0, 20, 70)
{
	my $file = $files[ $at % 2 ];
	(my $name = $file) =~ s/.*\///;

	with_damage(
		"$name: byte $at",
		sub { write_at($file, $at, chr(ord(substr(slurp($file), $at, 1)) ^ 1)) },
		sub { like($_[0], qr/XX001: file "event_store\/shard_0\/\Q$name\E" is damaged at offset 0/, $_[1]); });
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

# ---- sampled offsets: sixteen shards, each with damage of its own, are sixteen samples a start

my $shards = 16;
$node = PostgreSQL::Test::Cluster->new('sampled');
$node->init;
$node->append_conf('postgresql.conf', <<CONF);
shared_preload_libraries = 'event_store'
wal_level = replica
max_worker_processes = 32
event_store.shards = $shards
event_store.wal_file_size = '1MB'
event_store.memtable_age = 0
event_store.startup_timeout = '120s'
CONF
$node->start;
$dir = $node->data_dir . '/event_store';
$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION event_store;
CREATE TABLE t (context_id text, position bigint, x int, filler text) USING event_store;
SQL
# the manifest has records, the log has two files or more
for my $part (1 .. 3)
{
	$node->safe_psql('postgres', "INSERT INTO t SELECT 'c' || g, NULL, g, md5(g::text) FROM generate_series(1, 1000) g; SELECT event_store.flush()");
}
for my $part (1 .. 16)
{
	$node->safe_psql('postgres', "INSERT INTO t SELECT 'c' || g, NULL, g, md5(random()::text) || md5(random()::text) FROM generate_series(1, 16000) g; SELECT event_store.sync()");
}
$expected = ask();
$node->stop('immediate');
PostgreSQL::Test::RecursiveCopy::copypath($dir, "$dir.saved");

# What is known of each shard: its current control block and its files up to the durable end.
my @shard = map {
	my $d = "$dir/shard_$_";
	my ($current) = sort { unpack('x8 Q<', $b) <=> unpack('x8 Q<', $a) } map { slurp("$d/control.$_") } 0, 1;
	my ($durable, $manifest_len) = unpack('x56 Q< x48 Q<', $current);
	my $last = sprintf('wal.%08x', $durable >> 32);
	{ dir => $d, last => $last, end => $durable & 0xffffffff, manifest_len => $manifest_len,
		wal => [ grep { $_ le $last } map { s/.*\///r } sort glob("$d/wal.*") ] };
} 0 .. $shards - 1;
cmp_ok(scalar(grep { @{ $_->{wal} } > 1 } @shard), '>', $shards / 2, 'the logs have several files');

# The state and the reason of each shard, when all have made up their minds.
sub verdicts
{
	my %found;

	$node->poll_query_until('postgres', "SELECT bool_and(state IN ('open', 'failed')) FROM event_store.stat_shards");
	for my $line (split(/\n/, $node->safe_psql('postgres', "SELECT shard, state, replace(coalesce(reason, ''), chr(10), ' ') FROM event_store.stat_shards")))
	{
		my ($number, $state, $reason) = split(/\|/, $line, 3);
		$found{$number} = [ $state, $reason ];
	}
	return \%found;
}

# $damage->($shard) does something to each shard's files and says what; $check->($state, $reason, $what) is the judge.
sub each_shard
{
	my ($name, $damage, $check) = @_;
	my @what = map { $damage->($_) } @shard;

	$node->start;
	my $found = verdicts();
	my @wrong = grep { !$check->(@{ $found->{$_} }, $what[$_]) } 0 .. $shards - 1;
	is(scalar(@wrong), 0, "$name: $shards samples") or diag(map { "shard $_, $what[$_]{text}: $found->{$_}[0] $found->{$_}[1]\n" } @wrong);
	is(ask(), $expected, "$name: and all rows are there") if !grep { $_->[0] ne 'open' } values %$found;
	$node->stop('immediate');
	remove_tree($dir);
	PostgreSQL::Test::RecursiveCopy::copypath("$dir.saved", $dir);
	return;
}

sub flip
{
	my ($file, $at) = @_;
	write_at($file, $at, chr(ord(substr(slurp($file), $at, 1)) ^ (1 << int(rand(8)))));
	return;
}

# [offset, length] of the frames of a file up to $limit; what is between two groups is padding
sub frames
{
	my ($content, $limit) = @_;
	my ($at, @found) = (0);

	while ($at < $limit)
	{
		my ($magic, $len) = unpack('V x4 V', substr($content, $at, 12));
		if ($magic == 0)
		{
			$at = (int($at / 4096) + 1) * 4096;
			next;
		}
		push @found, [ $at, 56 + $len ];
		$at += ($len + 56 + 7) & ~7;
	}
	return @found;
}

my $seed = $ENV{ES_SEED} // time();
srand($seed);
diag("ES_SEED=$seed");
sub is_refused
{
	my ($state, $reason, $what) = @_;
	return $state eq 'failed' && $reason =~ /file "event_store\/shard_\d+\/$what->{file}" (?:is damaged at offset (\d+)|.*version)/
	  && (!defined $1 || !defined $what->{at} || $1 <= $what->{at});
}

for my $round (1, 2)
{
	each_shard(
		"a byte of the log ($round)",
		sub {
			my ($s) = @_;
			my $file = $s->{wal}[ int(rand(@{ $s->{wal} })) ];
			my $content = slurp("$s->{dir}/$file");
			my @frames = frames($content, $file eq $s->{last} ? $s->{end} : length($content));
			my $frame = $frames[ int(rand(@frames)) ];
			# half of them in a header
			my $at = $frame->[0] + int(rand(rand() < 0.5 ? 56 : $frame->[1]));
			flip("$s->{dir}/$file", $at);
			return { file => quotemeta($file), at => $at, text => "$file byte $at" };
		},
		\&is_refused);
	each_shard(
		"the same byte of both control blocks ($round)",
		sub {
			my ($s) = @_;
			my $at = int(rand(136));
			flip("$s->{dir}/control.$_", $at) for 0, 1;
			return { file => 'control\.[01]', text => "control blocks byte $at" };
		},
		\&is_refused);
	each_shard(
		"a byte of the manifest ($round)",
		sub {
			my ($s) = @_;
			my $at = int(rand($s->{manifest_len}));
			flip("$s->{dir}/manifest", $at);
			return { file => 'manifest', at => $at, text => "manifest byte $at of $s->{manifest_len}" };
		},
		\&is_refused);
	each_shard(
		"the log cut before its durable end ($round)",
		sub {
			my ($s) = @_;
			# the last bytes, and any
			my $length = $s->{end} - 1 - int(rand() < 0.5 ? rand(100) : rand($s->{end} - 1));
			truncate("$s->{dir}/$s->{last}", $length) or die "truncate: $!";
			return { file => quotemeta($s->{last}), text => "$s->{last} cut at $length of $s->{end}" };
		},
		\&is_refused);
	each_shard(
		"the log cut behind its durable end ($round)",
		sub {
			my ($s) = @_;
			my $all = -s "$s->{dir}/$s->{last}";
			my $length = $s->{end} + int(rand() < 0.5 ? rand(100) : rand($all - $s->{end}));
			truncate("$s->{dir}/$s->{last}", $length) or die "truncate: $!";
			return { text => "$s->{last} cut at $length, its end is $s->{end}" };
		},
		sub { return $_[0] eq 'open'; });
	each_shard(
		"a byte of one of the control blocks ($round)",
		sub {
			my ($s) = @_;
			# a version that is not ours may be a newer one: that is refused
			my $at = (0 .. 3, 6 .. 135)[ int(rand(134)) ];
			my $i = int(rand(2));
			flip("$s->{dir}/control.$i", $at);
			return { text => "control.$i byte $at" };
		},
		sub { return $_[0] eq 'open'; });
}
$node->start;
is(ask(), $expected, 'all put back: all is there');
$node->stop;

done_testing();
