# kill -9 of the whole server in the middle of a load: what was acknowledged is there exactly once, what was refused or
# rolled back is not, everything else is there whole or not at all, heap rows included; versions, positions and horizon agree.

use strict;
use warnings;
use EventStore::Clients;
use EventStore::Oracle;
use EventStore::Server qw(new_server kill_all crash_restart set_conf io_methods seed sql try_sql);
use EventStore::Workload;
use Test::More;
use Time::HiRes qw(sleep time);

seed();
my $long = $ENV{ES_LONG};
my $rounds = $long ? 6 : 1;
my $seconds = $long ? 4 : 1.5;

foreach my $shards (1, 3)
{
	my $node = new_server("crash$shards", "event_store.shards = $shards", 'event_store.memtable_size = 1MB',
		'event_store.spill_after = 64kB', 'event_store.wal_file_size = 1MB');
	EventStore::Workload::setup($node);
	my $workload = EventStore::Workload->new;
	my $oracle = EventStore::Oracle->new;
	my $total = 0;

	foreach my $round (1 .. $rounds)
	{
		foreach my $io_method (io_methods())
		{
			foreach my $synchronous (1, 0)
			{
				my $name = "$shards shard(s), $io_method, synchronous_commit = " . ($synchronous ? 'on' : 'off');
				set_conf($node, "event_store.io_method = $io_method");
				$node->restart if sql($node, 'SHOW event_store.io_method') ne $io_method;
				$oracle->{lossy} = 1 if !$synchronous;

				my $turns = 0;
				my $clients = EventStore::Clients->new(
					node => $node, n => 6,
					settings => $synchronous ? [] : ['SET synchronous_commit = off'],
					next => sub {
						my ($c) = @_;
						# with synchronous_commit = off: sync() now and then, whose return makes durable what was before
						if (!$synchronous && $c->{number} == 0 && ++$turns % 10 == 3)
						{
							return { sync => 1, sql => 'SELECT event_store.sync();', tid => 0 };
						}
						my $unit = $workload->unit;
						$oracle->begins($unit, $synchronous);
						return $unit;
					},
					done => sub {
						my ($c, $unit) = @_;
						if ($unit->{sync})
						{
							my $failed = $unit->{lost} || grep { /ERROR|FATAL/ } @{ $unit->{lines} };
							$oracle->synced($unit->{sent}) unless $failed;
							$total++ unless $failed;
							return;
						}
						$oracle->ends($unit);
					});
				# longer where little happens
				my $until = time() + $seconds + rand(1);
				my $before = $oracle->{counts}{committed} // 0;
				my $synced = $total;
				$clients->run(seconds => 120, tick => sub {
					return time() < $until || $oracle->{counts}{committed} - $before <= 50 || ($oracle->{counts}{aborted} // 0) <= 10 || (!$synchronous && $total == $synced);
				});
				kill_all($node);
				$clients->abandon;
				$oracle->crashed;
				my $open = crash_restart($node);
				ok(defined $open, "$name: open again") or BAIL_OUT('the shards do not open');
				is($oracle->check($node), '', "$name: the oracle agrees");
			}
		}
	}
	$oracle->check_append_versions($node);
	is($oracle->verdict, '', 'versions are those that append() had returned');
	is(sql($node, 'SELECT event_store.flush(); SELECT count(*) FROM event_store.verify()'), "\n0", 'no damage');
	is($oracle->check($node), '', 'all in segments: the oracle agrees');
	cmp_ok($oracle->{counts}{committed}, '>', 100, 'transactions were acknowledged');
	cmp_ok($oracle->{counts}{aborted}, '>', 10, 'some were rolled back');
	cmp_ok($total, '>', 0, 'sync() returned while others wrote');
	note join(', ', map { "$_: $oracle->{counts}{$_}" } sort keys %{ $oracle->{counts} }), ", rows: $oracle->{rows}";
	$node->stop;
}
done_testing();
