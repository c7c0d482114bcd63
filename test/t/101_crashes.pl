# A process of a server that ends by a signal nobody sent on purpose, an assertion or a PANIC of its own fails the test it
# happens in; a death by a fault point, or by the test's own hand, does not.

use strict;
use warnings;
use EventStore::Crashes;
use EventStore::Server qw(new_server processes wait_open log_offset sql try_sql faults_compiled);
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

my $log = PostgreSQL::Test::Utils::tempdir() . '/log';

sub finds
{
	my ($n, $name, @lines) = @_;
	unlink($log);
	append_to_file($log, join("\n", @lines, ''));
	is(scalar(my @found = EventStore::Crashes::unexplained($log)), $n, $name);
	return;
}

my $at = '2026-01-01 00:00:00.000 UTC';
finds(0, 'a quiet log', "$at [1] LOG:  ready", "$at [1] ERROR:  no");
finds(1, 'an assertion', 'TRAP: FailedAssertion("x", File: "y.c", Line: 1, PID: 7)');
finds(1, 'a PANIC', "$at [7] PANIC:  could not fsync file", "$at [1] LOG:  server process (PID 7) was terminated by signal 6: Aborted");
finds(1, 'an abort', "$at [1] LOG:  server process (PID 7) was terminated by signal 6: Aborted");
finds(1, 'a kill by somebody else', "$at [1] LOG:  server process (PID 7) was terminated by signal 9: Killed");
finds(0, 'a kill by a fault point', 'fault point abort: kill in process 7 at 1.5', "$at [1] LOG:  server process (PID 7) was terminated by signal 9: Killed");
finds(1, 'a fault point that killed another', 'fault point abort: kill in process 8 at 1.5', "$at [1] LOG:  server process (PID 7) was terminated by signal 9: Killed");
finds(0, 'a PANIC that a failed sync asks for', 'fault point wal-sync: eio in process 7 at 1.5', "$at [7] PANIC:  could not fsync file",
	"$at [1] LOG:  server process (PID 7) was terminated by signal 6: Aborted");
finds(1, 'a PANIC after a failed write', 'fault point wal-write: eio in process 7 at 1.5', "$at [7] PANIC:  what");
finds(0, 'who did not quit', "$at [1] LOG:  issuing SIGKILL to recalcitrant children", "$at [1] LOG:  background worker (PID 7) was terminated by signal 9: Killed");

# The real thing; declared, since the end of this file looks as well.
my $node = new_server('crashes', 'event_store.shards = 1', 'fsync = off');
my $offset = log_offset($node);

sub dies
{
	my ($signal) = @_;
	my ($pid) = processes($node, 'event_store shard%');

	$offset = log_offset($node);
	kill $signal, $pid;
	my $end = time() + 120;
	sleep 0.05 until slurp_file($node->logfile, $offset) =~ /was terminated by signal/ || time() > $end;
	ok(wait_open($node), "$signal: open again");
	return EventStore::Crashes::unexplained($node->logfile, $offset);
}

like(join("\n", dies('SEGV')), qr/was terminated by signal 11/, 'a segmentation fault is seen');
is(join("\n", dies('KILL')), '', 'a kill by the test is none');
SKIP:
{
	skip 'no fault points in this build', 1 unless faults_compiled($node);
	$offset = log_offset($node);
	sql($node, "SELECT event_store_test.inject_fault('abort', 'kill')");
	try_sql($node, q{BEGIN; SELECT event_store.append('a', 't', '1'); ROLLBACK});
	$node->wait_for_log(qr/was terminated by signal/, $offset);
	ok(wait_open($node), 'abort: open again');
	like(slurp_file($node->logfile, $offset), qr/fault point abort: kill in process (\d+) at [\d.]+\n(?:.*\n)*?.*\(PID \1\) was terminated by signal 9/, 'a fault point says what it does');
	is(join("\n", EventStore::Crashes::unexplained($node->logfile, $offset)), '', 'and is none either');
}
EventStore::Crashes::expect(qr/signal 11/);
$node->stop;
done_testing();
