# A real event log comes back from replay line by line as it is in its file, from memory, from segments, from both and after
# crashes.

use strict;
use warnings;
use EventStore::RealLog;
use Test::More;

# the larger ones: test/long/real_logs.pl
plan skip_all => 'no real logs here (ES_DATA_DIR)' unless EventStore::RealLog::available('receipt');
EventStore::RealLog::run('receipt');
done_testing();
