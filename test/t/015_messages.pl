# Messages of any size are in PostgreSQL's WAL as records of at most 256 KB of their transaction;
# and every fault point in the sources is in the list, with its kind.

use strict;
use warnings;
use File::Find;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = PostgreSQL::Test::Cluster->new('messages');
$node->init;
$node->append_conf('postgresql.conf', <<CONF);
shared_preload_libraries = 'event_store'
wal_level = replica
event_store.shards = 2
max_worker_processes = 16
autovacuum = off
CONF
$node->start;
$node->safe_psql('postgres', 'CREATE SCHEMA event_store_test; CREATE EXTENSION event_store_test');

# a shard that starts logs messages of its own
$node->safe_psql('postgres', 'SELECT event_store_test.echo(0, 1), event_store_test.echo(1, 1)');

# ---- records

sub records
{
	my ($bytes) = @_;
	my ($start, $end) =
	  split(/\|/, $node->safe_psql('postgres', "BEGIN; SELECT * FROM event_store_test.log_message($bytes); ROLLBACK") =~ s/^\n|\n$//gr);
	$node->safe_psql('postgres', 'SELECT pg_switch_wal()');
	my ($out) = run_command([ 'pg_waldump', '-p', $node->data_dir . '/pg_wal', '-s', $start, '-e', $end, '-r', 'LogicalMessage' ]);
	my @records = split(/\n/, $out);

	like($records[0], qr{lsn: \Q@{[ sprintf('%X/%08X', map { hex } split('/', $start)) ]}\E}i, "$bytes bytes: start is the first record's");
	for (@records)
	{
		like($_, qr/transactional, prefix "event_store"/, 'its prefix');
		my ($len) = m{len \(rec/tot\): +\d+/ *(\d+)};
		cmp_ok($len, '<=', 256 * 1024 + 100, 'its length');
		like($_, qr/tx: +[1-9]/, 'it has an xid');
	}
	return scalar(@records);
}

is(records(10),          1, 'a small message');
is(records(256 * 1024),  2, 'one that does not fit into a record');
is(records(3_000_000),  12, 'a long one');

# ---- fault points

my $root = $ENV{ES_SOURCE} // '.';
my $list = slurp_file("$root/src/ipc/fault_points.h");
my (%listed, %used, @twice, @unlisted, @wrong);
while ($list =~ /^ES_FAULT_POINT\("([^"]+)",\s*([^,]+?),\s*"([^"]+)"\)/mg)
{
	my ($point, $flags, $processes) = ($1, $2, $3);

	push @twice, $point if exists $listed{$point};
	push @wrong, "$point: $processes" if $processes !~ /^((backend|shard|maintenance|keeper|collector)(, |$))+$/;
	$listed{$point} = $flags;
}
my %kind = ('ES_FAULT' => qr/./, 'ES_FAULT_ERROR' => qr/ES_FAULT_MAY_THROW/, 'ES_FAULT_IO' => qr/ES_FAULT_MAY_FAIL/);
find(
	{
		no_chdir => 1,
		wanted   => sub {
			return unless /\.c$/;
			my $file = $_;
			my $text = slurp_file($file);

			while ($text =~ /\b(ES_FAULT(?:_ERROR|_IO)?)\("([^"]+)"\)/g)
			{
				my ($macro, $point) = ($1, $2);

				$used{$point} = 1;
				push @unlisted, "$point ($file)" unless exists $listed{$point};
				push @wrong, "$point is $macro ($file)" if exists $listed{$point} && $listed{$point} !~ $kind{$macro};
			}
		}
	},
	"$root/src");
cmp_ok(scalar(keys %used), '>', 15, 'there are fault points');
is_deeply(\@unlisted, [], 'every point in the sources is in fault_points.h');
is_deeply(\@twice,    [], 'once');
is_deeply(\@wrong,    [], 'with its kind and process');
is_deeply([ grep { !$used{$_} } sort keys %listed ], [], 'every point in fault_points.h is in the sources');

SKIP:
{
	skip 'no fault points in this build', 1
	  if $node->safe_psql('postgres', 'SELECT event_store_test.fault_points_compiled()') eq 'f';
	is( $node->safe_psql('postgres', 'SELECT string_agg(p, \' \' ORDER BY p COLLATE "C") FROM event_store_test.fault_points() p'),
		join(' ', sort keys %listed),
		'fault_points() lists them');
	for my $bad ([ 'nowhere', 'kill' ], [ 'channel-before-flush', 'error' ], [ 'channel-mid-message', 'enospc' ], [ 'channel-mid-message', 'explode' ])
	{
		my ($status, $out, $err) = $node->psql('postgres', "SELECT event_store_test.inject_fault('$bad->[0]', '$bad->[1]')");

		like($err, qr/ERROR/, "$bad->[1] at $bad->[0] is refused");
	}
	is($node->safe_psql('postgres', "SELECT event_store_test.fault_hits('channel-mid-message')"), '0', 'not armed: no hits');
	$node->safe_psql('postgres', "SELECT event_store_test.inject_fault('channel-mid-message', 'error', 1000)");
	$node->safe_psql('postgres', 'SELECT event_store_test.echo(0, 1000000)');
	cmp_ok($node->safe_psql('postgres', "SELECT event_store_test.fault_hits('channel-mid-message')"), '>', 5, 'hits are counted');
	$node->safe_psql('postgres', 'CREATE ROLE somebody');
	my ($status, $out, $err) = $node->psql('postgres', 'SET ROLE somebody; SELECT event_store_test.disarm_faults()');
	like($err, qr/permission denied/, 'only a superuser may');
}

$node->stop;
done_testing();
