# es_filedump prints every kind of our files in words, all of a store without a complaint, and tells damage with file and offset.

use strict;
use warnings;
use EventStore::Server qw(new_server sql);
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('filedump', 'event_store.shards = 2', 'event_store.wal_file_size = 1MB', 'event_store.spill_after = 64kB');
sql($node, <<'SQL');
CREATE TABLE ev (position bigint, context_id text, version bigint, event_type text, v text) USING event_store;
INSERT INTO ev (context_id, event_type, v) SELECT 'c' || g % 50, 'happened', md5(g::text) FROM generate_series(1, 20000) g;
SELECT event_store.flush();
INSERT INTO ev (context_id, event_type, v) SELECT 'c' || g % 50, 'later', md5(g::text) FROM generate_series(1, 500) g;
SELECT event_store.sync();
SQL
my $session = $node->background_psql('postgres');
$session->query_safe(q{BEGIN; INSERT INTO ev (context_id, event_type, v) SELECT 'c' || g % 50, 'open', md5(g::text) FROM generate_series(1, 20000) g});
$node->poll_query_until('postgres', 'SELECT sum(pending_segments) > 0 FROM event_store.stat_shards');
my $uuid_dir = $node->data_dir . '/event_store';
my $storage = sql($node, q{SELECT storage_id FROM event_store.stat_tables WHERE store = 'ev'::regclass});
my $segment = sql($node, q{SELECT segment FROM event_store.stat_segments WHERE NOT pending AND shard = 0 AND min_position > 0 ORDER BY 1 LIMIT 1});
$node->stop('immediate');
eval { $session->quit };

# (exit status, output)
sub dump_file
{
	my (@args) = @_;
	my $out = '';
	IPC::Run::run([ 'es_filedump', @args ], '<', \'', '>', \$out, '2>', \my $err, IPC::Run::timeout(60));
	return ($? >> 8, $out . $err);
}

# which files of the log are still there depends on when their rows came into segments
my @logs = sort glob("$uuid_dir/shard_0/wal.*");
my ($log) = grep { (dump_file($_))[1] =~ /FINISH/ } @logs;

my %kinds = (
	store => [ "$uuid_dir/store", qr/2 shards|shards.*\b2\b/ ],
	control => [ "$uuid_dir/shard_0/control.0", qr/PostgreSQL's WAL needed from [0-9A-F]+\/[0-9A-F]+/ ],
	manifest => [ "$uuid_dir/shard_0/manifest", qr/$segment|segment/i ],
	segment => [ "$uuid_dir/shard_0/$segment", qr/\b$storage\b/ ],
	wal => [ $log // $logs[0], qr/FINISH/ ]);

foreach my $kind (sort keys %kinds)
{
	my ($file, $says) = @{ $kinds{$kind} };
	ok(-e $file, "$kind: the file is there") or next;
	my ($status, $out) = dump_file($file);
	is($status, 0, "$kind: printed without a complaint");
	like($out, qr/$kind/i, "$kind: says what it is");
	like($out, $says, "$kind: says what is in it") or diag(substr($out, 0, 1500));
	unlike($out, qr/DAMAGED/, "$kind: no damage");
	diag(substr($out, 0, 900)) if $ENV{ES_SHOW};
}
my @all = grep { !/pgsql_tmp[^\/]*$/ && -f $_ } glob("$uuid_dir/* $uuid_dir/shard_*/*");
push(@all, "$uuid_dir.opened");
my ($status, $out) = dump_file(@all);
is($status, 0, 'all files of the store at once, ' . @all . ' files');
unlike($out, qr/DAMAGED/, 'none is damaged');

# ---- a flipped byte, in a copy of the directory: logs and manifests are read with the control blocks beside them

my $copy = PostgreSQL::Test::Utils::tempdir() . '/copy';
system_or_bail('cp', '-r', $uuid_dir, $copy);
foreach my $kind (sort keys %kinds)
{
	my $file = $kinds{$kind}[0] =~ s/^\Q$uuid_dir\E/$copy/r;
	my $size = -s $file;
	# in the header and behind it; what lies behind the end that the control block knows is not believed anyway
	my $end = $kind eq 'segment' ? $size : $kind eq 'manifest' ? 160 : 64;
	foreach my $at (4, int($end / 2), $end - 5)
	{
		open(my $f, '+<:raw', $file) or die "$file: $!";
		seek($f, $at, 0);
		read($f, my $byte, 1);
		seek($f, $at, 0);
		print $f chr(ord($byte) ^ 0x01);
		close($f);
		($status, $out) = dump_file($file);
		isnt($status, 0, "$kind, byte $at of $size flipped: exit status $status");
		like($out, qr/DAMAGED at offset \d+|not a file of|damaged|unknown|cannot/i, "$kind, byte $at flipped: told with the offset") or diag(substr($out, 0, 800));
		like($out, qr/\Q$file\E/, "$kind, byte $at flipped: and the file");
		open($f, '+<:raw', $file) or die "$file: $!";
		seek($f, $at, 0);
		print $f $byte;
		close($f);
	}
	($status, $out) = dump_file($file);
	is($status, 0, "$kind: whole again");
}
($status, $out) = dump_file("$copy/nothing");
is($status, 2, 'a file that is not there');
$node->start;
is(sql($node, 'SELECT count(*) FROM ev'), '20500', 'the store is as it was');
$node->stop;
done_testing();
