# A shard or maintenance worker that dies or fails at any step of a flush, a spill, an adoption, a manifest edit or the dropping
# of a dead storage leaves each transaction whole or absent, as it was acknowledged, and once.

use strict;
use warnings;
use EventStore::FaultWalk;
use EventStore::Server qw(seed faults_compiled);
use Test::More;

seed();
my $walk = EventStore::FaultWalk->new('walk_flush');
plan skip_all => 'no fault points in this build' unless faults_compiled($walk->{node});
$walk->walk_part('flush');
$walk->finish('flush');
done_testing();
