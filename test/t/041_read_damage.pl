# A damaged byte anywhere in a segment file is either met by a query, which then fails with XX001 and names file and
# offset, or lies where nothing was read and the result is right; it never changes a result. verify() finds it, queries
# that do not need the file go on, and with the byte put back everything is as before.

use strict;
use warnings;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $seed = $ENV{ES_SEED} || time();
srand($seed);
note("ES_SEED=$seed");

my $node = PostgreSQL::Test::Cluster->new('damage');
$node->init;
$node->append_conf('postgresql.conf', <<CONF);
shared_preload_libraries = 'event_store'
wal_level = replica
fsync = off
event_store.shards = 1
event_store.cache_size = 0
max_worker_processes = 16
CONF
$node->start;
$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION event_store;
CREATE TABLE ev (context_id text, position bigint, version bigint, event_id uuid, k int, v text, big bytea) USING event_store;
CREATE TABLE other (context_id text, k int) USING event_store;
ALTER TABLE ev ALTER big SET STORAGE EXTERNAL;
INSERT INTO ev (context_id, event_id, k, v, big)
	SELECT 'c' || i % 300, gen_random_uuid(), i, md5(i::text),
		CASE WHEN i % 1000 = 0 THEN decode(repeat(md5(i::text), 6000), 'hex') END FROM generate_series(1, 20000) i;
INSERT INTO other SELECT 'c' || i % 300, i FROM generate_series(1, 1000) i;
SELECT event_store.flush();
SQL

my %queries = (
	all    => 'SELECT count(*), sum(k), sum(hashtext(v)::bigint), sum(hashtext(event_id::text)::bigint), sum(length(big)), sum(version), max(position) FROM ev',
	order  => q{SELECT md5(string_agg(position::text, ',')) FROM event_store.read_all(store => 'ev')},
	replay => q{SELECT sum(version), max(position) FROM event_store.replay('c17', store => 'ev')});
my %right = map { $_ => $node->safe_psql('postgres', $queries{$_}) } keys %queries;

my $dir = $node->data_dir . '/event_store/shard_0';
opendir(my $d, $dir) or die "$dir: $!";
my @segments = sort { -s "$dir/$b" <=> -s "$dir/$a" } grep { /^seg\./ } readdir($d);
closedir($d);
is(scalar(@segments), 2, 'two segments');
my $file = "$dir/$segments[0]";
my $size = -s $file;

sub flip
{
	my ($offset, $mask) = @_;

	open(my $f, '+<:raw', $file) or die "$file: $!";
	seek($f, $offset, 0);
	read($f, my $byte, 1);
	seek($f, $offset, 0);
	print $f chr(ord($byte) ^ $mask);
	close($f);
	return;
}

my @offsets = (0, 8, 95, $size - 1, $size - 20, $size - 41, $size - 60, map { int(rand($size)) } 1 .. 20);
my ($met, $missed) = (0, 0);

for my $offset (@offsets)
{
	my $mask = 1 << int(rand(8));

	flip($offset, $mask);
	# a footer that is in memory is not read again
	$node->safe_psql('postgres', q{SELECT count(*) FROM event_store.read_all(store => 'other')}) for 1 .. 1;
	my $named = 0;
	my $wrong = '';

	for my $q (sort keys %queries)
	{
		my ($status, $out, $err) = $node->psql('postgres', "\\set VERBOSITY verbose\n$queries{$q}");

		if ($status == 0)
		{
			$wrong .= " $q: $out instead of $right{$q}" if $out ne $right{$q};
		}
		else
		{
			$wrong .= " $q: $err" unless $err =~ /ERROR:  XX001: file "event_store\/shard_0\/\Q$segments[0]\E" is damaged/ && $err =~ /offset \d+/;
			$named++;
		}
	}
	is($wrong, '', "offset $offset of $size, bit $mask");
	$named ? $met++ : $missed++;
	is( $node->safe_psql('postgres', q{SELECT count(DISTINCT file) FROM event_store.verify()}),
		'1', "verify finds it");
	is($node->safe_psql('postgres', 'SELECT count(*), sum(k) FROM other'), '1000|500500', 'another table is read');
	flip($offset, $mask);
}
note("$met met by a query, $missed not read");
ok($met > 0, 'some damage was met');
for my $q (sort keys %queries)
{
	is($node->safe_psql('postgres', $queries{$q}), $right{$q}, "put back: $q");
}
cmp_ok($node->safe_psql('postgres', q{SELECT corruptions FROM event_store.stat_shards}), '>', 0, 'counted');

# a missing file, a file cut short, one file in place of another
rename($file, "$file.away") or die;
my ($status, $out, $err) = $node->psql('postgres', "\\set VERBOSITY verbose\n$queries{all}");
$node->restart;
($status, $out, $err) = $node->psql('postgres', "\\set VERBOSITY verbose\n$queries{all}");
like($err, qr/XX001.*missing/s, 'a missing file is named');
is($node->safe_psql('postgres', 'SELECT count(*) FROM other'), '1000', 'another table is read');
link("$dir/$segments[1]", $file) or die;
($status, $out, $err) = $node->psql('postgres', "\\set VERBOSITY verbose\n$queries{all}");
like($err, qr/XX001/, 'a file in place of another is damage');
unlink($file);
rename("$file.away", $file) or die;

# a file of a later version, whose header may be longer, is not damaged
open(my $segment, '+<:raw', $file) or die "$file: $!";
seek($segment, 8, 0);
read($segment, my $header, 4);
my ($version, $len) = unpack('vv', $header);
seek($segment, 8, 0);
print $segment pack('vv', $version + 1, $len + 8);
close($segment);
$node->restart;
($status, $out, $err) = $node->psql('postgres', "\\set VERBOSITY verbose\n$queries{all}");
my $later = $version + 1;
like($err, qr/55000: file "event_store\/shard_0\/\Q$segments[0]\E" was made by another version.*format version $later, this is version $version.*HINT:.*Install the version/s,
	'a file of a later version: both are named');
is($node->safe_psql('postgres', 'SELECT count(*) FROM other'), '1000', 'another table is read');
open($segment, '+<:raw', $file) or die "$file: $!";
seek($segment, 8, 0);
print $segment $header;
close($segment);
$node->restart;
is($node->safe_psql('postgres', $queries{all}), $right{all}, 'all is well again');

# a table's metapage, in PostgreSQL's own file
my $path = $node->safe_psql('postgres', q{SELECT pg_relation_filepath('ev')});
$node->stop;
my $whole = slurp_file($node->data_dir . "/$path");
foreach my $case (
	[ 24, qr/XX001: metapage of table "ev" is damaged: not a metapage.*DETAIL:  File "\Q$path\E", offset 24\./s ],
	[ 28, qr/55000: table "ev" was made by another version.*DETAIL:  File "\Q$path\E": metapage has format version \d+, this program knows \d+/s ],
	[ 40, qr/XX001: metapage of table "ev" is damaged.*DETAIL:  File "\Q$path\E", offset 24: expected checksum [0-9A-F]{8}, found/s ])
{
	my ($offset, $message) = @$case;
	my $page = $whole;
	substr($page, $offset, 1) ^= "\x10";
	put($page);
	$node->start;
	($status, $out, $err) = $node->psql('postgres', "\\set VERBOSITY verbose\n$queries{all}");
	# with checksums of its own PostgreSQL finds it first
	like($err, qr/$message|XX001: invalid page in block 0 of relation \"?$path/, "metapage, byte $offset: file, offset and what is wrong");
	is($node->safe_psql('postgres', 'SELECT count(*) FROM other'), '1000', 'another table is read');
	$node->stop;
}
put($whole);
$node->start;
is($node->safe_psql('postgres', $queries{all}), $right{all}, 'all is well again');
$node->stop;

sub put
{
	open(my $f, '>:raw', $node->data_dir . "/$path") or die "$path: $!";
	print $f $_[0];
	close($f);
	return;
}
done_testing();
