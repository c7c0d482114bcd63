# A shard, keeper or server that dies at any step of its start, of recovery, of the making of a store or of its stop comes back
# with each transaction whole or absent, as it was acknowledged. (test/long/fault_walk_start.pl does it for longer.)

use strict;
use warnings;
use EventStore::FaultWalk;
use EventStore::FaultWalkStart qw(killed_in_recovery killed_while_reading killed_at_first_start);
use EventStore::Server qw(seed faults_compiled);
use Test::More;

seed();
my $walk = EventStore::FaultWalk->new('walk_start');
plan skip_all => 'no fault points in this build' unless faults_compiled($walk->{node});
is(join(' ', map { $_->[0] } $walk->points('unknown')), '', 'the walk knows how to reach each point');
$walk->walk_part('start');
killed_in_recovery($walk, 1);
killed_while_reading($walk);
killed_at_first_start($walk);
$walk->finish('start');
done_testing();
