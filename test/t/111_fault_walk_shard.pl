# A shard that dies or cannot write at any step of applying, of its own WAL and control blocks leaves each transaction whole
# or absent, as it was acknowledged; when there is room again, work goes on.

use strict;
use warnings;
use EventStore::FaultWalk;
use EventStore::Server qw(seed faults_compiled);
use Test::More;

seed();
my $walk = EventStore::FaultWalk->new('walk_shard');
plan skip_all => 'no fault points in this build' unless faults_compiled($walk->{node});
$walk->walk_part('shard');
$walk->finish('shard');
done_testing();
