# Real event logs with hundreds of thousands of events come back from replay line by line as they are in their files, from
# memory, from segments, from both and after crashes.

use strict;
use warnings;
use EventStore::RealLog;
use Test::More;

my @names = qw(receipt bpic2013_incidents bpic2012);
my @there = grep { EventStore::RealLog::available($_) } @names;
plan skip_all => 'no real logs here (ES_DATA_DIR)' unless @there;
foreach my $name (@names)
{
	SKIP:
	{
		skip "$name is not there", 1 unless EventStore::RealLog::available($name);
		EventStore::RealLog::run($name);
	}
}
done_testing();
