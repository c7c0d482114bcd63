# A backend that dies or fails at any step of append, commit, abort, sending and reserving leaves each transaction whole or
# absent, as it was acknowledged, and holds nobody up.

use strict;
use warnings;
use EventStore::FaultWalk;
use EventStore::Server qw(seed faults_compiled);
use Test::More;

seed();
my $walk = EventStore::FaultWalk->new('walk_backend');
plan skip_all => 'no fault points in this build' unless faults_compiled($walk->{node});
$walk->walk_part('backend');
$walk->finish('backend');
done_testing();
