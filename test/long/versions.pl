# test/t/121_versions.pl for half an hour: versions and rows are right whatever comes between.

use strict;
use warnings;
use FindBin;

$ENV{ES_VERSIONS_SECONDS} ||= 1800;
my $test = "$FindBin::RealBin/../t/121_versions.pl";
defined do $test or die $@ || "$test: $!";
