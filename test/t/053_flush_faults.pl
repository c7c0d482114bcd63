# From memory to segments: whatever kills a flush, a spill, an adoption or what is carried over, at whatever step, or fails there,
# each event that was committed is there once, and none that was not.

use strict;
use warnings;
use EventStore::Crashes;
use EventStore::FaultWalk;
use EventStore::FlushLoad qw(flush_server work consistent flush);
use EventStore::Server qw(wait_open try_sql sql faults_compiled log_offset seed);
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

seed();
my $node = flush_server('flush_faults');
plan skip_all => 'no fault points in this build' unless faults_compiled($node);

sub inject { return try_sql($node, "SELECT inject_fault('$_[0]', '$_[1]', " . ($_[2] // 1) . ')'); }

# A statement, or several, in a session of its own that may lose its server.
sub start_sql
{
	my ($sql) = @_;
	my ($out, $err) = ('', '');
	return IPC::Run::start([ 'psql', '-X', '-d', $node->connstr('postgres'), '-c', $sql ],
		'<', \'', '>', \$out, '2>', \$err, IPC::Run::timeout(120));
}

# Waits until a point was passed: while the server lives, and at most $seconds.
sub wait_hit
{
	my ($point, $seconds) = @_;
	my $end = time() + $seconds;

	while (time() < $end)
	{
		my ($status, $out) = try_sql($node, "SELECT fault_hits('$point')");
		return 0 if $status != 0;
		return 1 if $out > 0;
		sleep 0.02;
	}
	return 0;
}

# ---- what leads to a point; the server may end at any moment of it ----

sub spill_and_flush
{
	my ($name) = @_;
	my ($status) = try_sql($node, work($name, 2000) . (rand() < 0.7 ? 'COMMIT;' : 'ROLLBACK;'));
	try_sql($node, 'SELECT event_store.flush()') if $status == 0;
	return;
}

# A flush while a transaction stands between FINISH and its commit record.
sub flush_beside_finished
{
	my ($name) = @_;
	inject('commit-after-send', 'sleep');
	my $finished = start_sql(work($name, 60) . 'COMMIT;');
	wait_hit('commit-after-send', 60);
	# FINISH is applied when the shard has answered
	try_sql($node, 'SELECT count(*) FROM plain; SELECT event_store.flush()');
	inject('commit-after-send', 'kill', 1000000);
	eval { $finished->finish };
	return;
}

# FINISH comes while a spill of its transaction has not been named: the shard sleeps there until it was sent. Nothing may be asked of
# the shard meanwhile: a table without versions.
sub overtake_spill
{
	my ($name) = @_;
	inject('spill-before-manifest', 'sleep');
	my $writer = start_sql(<<"SQL");
BEGIN;
INSERT INTO plain SELECT NULL, '$name' || g % 13, g, repeat('x', 60) FROM generate_series(1, 4000) g;
INSERT INTO heap SELECT 'plain', '$name' || g % 13, g FROM generate_series(1, 4000) g;
DO \$\$ BEGIN FOR i IN 1 .. 250 LOOP EXIT WHEN fault_hits('spill-before-manifest') > 0; PERFORM pg_sleep(0.02); END LOOP; END \$\$;
COMMIT;
SQL
	eval { $writer->finish };
	inject('spill-before-manifest', 'kill', 1000000);
	try_sql($node, 'SELECT count(*) FROM plain');
	return;
}

my %loads = (
	'flush-finished-carried' => \&flush_beside_finished,
	'spill-before-take-back' => \&overtake_spill);

my @points = split /\n/, sql($node,
	q{SELECT name || ' ' || may_fail FROM fault_point_info()
	  WHERE name ~ '^(job|segment|flush|spill|adopt)-' AND name <> 'segment-read'
	  OR name ~ '^manifest-(before-)?(write|written|sync|synced)'});
cmp_ok(scalar(@points), '>', 20, 'there are fault points');
@points = grep { /$ENV{ES_POINTS}/ } @points if $ENV{ES_POINTS};

foreach my $entry (@points)
{
	my ($point, $may_fail) = split / /, $entry;
	my $load = $loads{$point} // \&spill_and_flush;

	if ($may_fail eq 'true' && $point !~ /sync$/)
	{
		foreach my $error (qw(enospc eio))
		{
			my $offset = log_offset($node);
			my $end = time() + 300;
			inject($point, $error);
			$load->($point) while time() < $end && !EventStore::FaultWalk::firings($node, $point, $error, $offset);
			ok(scalar EventStore::FaultWalk::firings($node, $point, $error, $offset), "$error at $point: it fired");
			sql($node, 'SELECT disarm_faults()');
			ok(wait_open($node), "open after $error at $point");
			flush($node);
			consistent($node, "$error at $point");
		}
		next;
	}
	foreach my $nth (1, 2)
	{
		my $offset = log_offset($node);
		my $end = time() + 300;

		inject($point, 'kill', $nth);
		while (time() < $end && !EventStore::FaultWalk::firings($node, $point, 'kill', $offset))
		{
			$load->($point);
			# the server says that it has crashed a moment later
			sleep 0.02;
		}
		EventStore::FaultWalk->killed_once($node, $point, $offset, "kill at $point ($nth)");
		ok(wait_open($node), "open after kill at $point ($nth)");
		consistent($node, "kill at $point ($nth)");
	}
	flush($node);
	consistent($node, "kill at $point, flushed");
	sql($node, 'TRUNCATE plain, versioned, heap');
}

is(sql($node, 'SELECT count(*) FROM event_store.verify()'), '0', 'no file is damaged');
is(sql($node, 'SELECT sum(corruptions) FROM event_store.stat_shards'), '0', 'no shard met damage');
$node->stop;
done_testing();
