# A shard that cannot open holds back PostgreSQL's WAL, and says so: in the log each minute with the bytes, and in stat_shards.

use strict;
use warnings;
use EventStore::Server qw(new_server wait_open sql log_offset server_log_since);
use Test::More;
use Time::HiRes qw(sleep time);

my $node = new_server('held', 'event_store.shards = 2', 'autovacuum = off');
sql($node, 'CREATE TABLE ev (context_id text, n int) USING event_store; CREATE TABLE hp (v text)');
sql($node, q{INSERT INTO ev SELECT 'c' || g, g FROM generate_series(1, 1000) g});

# a directory in the place of a control block: neither is missing, nor can it be read
my $shard = $node->data_dir . '/event_store/shard_1';
sql($node, 'SELECT event_store.sync()');
$node->stop('immediate');
foreach (0, 1)
{
	rename("$shard/control.$_", "$shard/away.$_") or die "rename: $!";
	open(my $f, '>', "$shard/control.$_") or die $!;
	print $f 'x' x 4096;
	close($f);
}
my $offset = log_offset($node);
$node->start;
ok($node->poll_query_until('postgres', q{SELECT state = 'failed' FROM event_store.stat_shards WHERE shard = 1}), 'a shard that cannot open');
sql($node, q{INSERT INTO hp SELECT repeat('x', 1000) FROM generate_series(1, 20000)});

my @told;
my $end = time() + 400;
while (time() < $end && @told < 2)
{
	sleep 2;
	@told = server_log_since($node, $offset) =~ /^(\S+ \S+) .*event_store shard 1 is not open and holds back (\d+) bytes of write-ahead log/mg;
	@told = map { { at => $told[ 2 * $_ ], bytes => $told[ 2 * $_ + 1 ] } } 0 .. @told / 2 - 1;
}
is(scalar(@told), 2, 'the log tells it, and again');
cmp_ok($told[0]{bytes}, '>', 20_000_000, "with the bytes ($told[0]{bytes})");
like(server_log_since($node, $offset), qr/HINT: .*release_wal\(1\)/, 'and what can be done');
my ($first, $second) = map { my ($h, $m, $s) = $_->{at} =~ / (\d+):(\d+):([\d.]+)/; $h * 3600 + $m * 60 + $s } @told;
my $apart = $second - $first;
$apart += 86400 if $apart < 0;
ok($apart >= 55 && $apart < 115, "once a minute ($apart s)");
unlike(server_log_since($node, $offset), qr/shard 0 is not open/, 'nothing is said of the other shard');
my $held = sql($node, 'SELECT held_wal_bytes FROM event_store.stat_shards WHERE shard = 1');
cmp_ok($held, '>=', $told[1]{bytes}, "stat_shards.held_wal_bytes shows it ($held)");
cmp_ok($held - $told[1]{bytes}, '<', 5_000_000, 'the same');
is(sql($node, q{SELECT pg_current_wal_lsn() - restart_lsn > 20000000 FROM pg_replication_slots WHERE slot_name = 'event_store'}), 't', 'and the slot holds it');
rename("$shard/away.$_", "$shard/control.$_") foreach 0, 1;
ok(wait_open($node), 'open again when the files are back');
is(sql($node, 'SELECT count(*), sum(n) FROM ev'), '1000|500500', 'nothing is missing');
ok($node->poll_query_until('postgres', 'SELECT max(held_wal_bytes) < 20000000 FROM event_store.stat_shards'), 'and no more is held');
$node->stop;
done_testing();
