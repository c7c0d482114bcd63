# Every fault point, killed at its first pass and at a later one, and with every error that may happen there, in both io methods.

use strict;
use warnings;
use EventStore::FaultWalk;
use EventStore::Server qw(seed faults_compiled io_methods);
use Test::More;

$ENV{ES_LONG} = 1;
seed();
foreach my $io_method (io_methods())
{
	foreach my $part (qw(backend shard flush start))
	{
		my $walk = EventStore::FaultWalk->new("long_${part}_$io_method", conf => ["event_store.io_method = $io_method"]);
		plan skip_all => 'no fault points in this build' unless faults_compiled($walk->{node});
		$walk->walk_part($part);
		$walk->finish($part);
	}
}
done_testing();
