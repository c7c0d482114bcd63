# Every fault point, killed at its first pass and at a later one, and with every error that may happen there, with io_method = sync.

use strict;
use warnings;
use EventStore::FaultWalk;
use EventStore::Server qw(seed);
use Test::More;

$ENV{ES_LONG} = 1;
seed();
EventStore::FaultWalk::walk_all('sync');
done_testing();
