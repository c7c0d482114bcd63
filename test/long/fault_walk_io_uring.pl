# Every fault point, killed at its first pass and at a later one, and with every error that may happen there, with io_uring.

use strict;
use warnings;
use EventStore::FaultWalk;
use EventStore::Server qw(seed io_methods);
use Test::More;

plan skip_all => 'io_uring is forbidden here' unless grep { $_ eq 'io_uring' } io_methods();
$ENV{ES_LONG} = 1;
seed();
EventStore::FaultWalk::walk_all('io_uring');
done_testing();
