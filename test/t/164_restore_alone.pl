# A position is given once, also where a restore and a writer commit at the same moment: neither gets what the other has
# checked or reserved, with versions or without, and what a follower has passed stays as it was.

use strict;
use warnings;
use EventStore::Server qw(new_server sql faults_compiled);
use Test::More;

my $node = new_server('alone', 'event_store.shards = 2');
plan skip_all => 'no fault points in this build' unless faults_compiled($node);

# the position that the next writer would get
my $next = q{SELECT event_store.horizon('%s')};
my %tables = (plain => '', versioned => ', version bigint');
my %writes = (
	writer => q{INSERT INTO %s (context_id, n) VALUES ('w', 1)},
	restore => q{INSERT INTO %s (position, context_id, n) VALUES (%s, 'r', 2)});

# A session starts a statement; it waits for another one, or is done.
sub start
{
	my ($session, $sql) = @_;
	$session->{stdin} .= "$sql\n\\echo done\n";
	$session->{run}->pump_nb while length $session->{stdin};
	return;
}

sub waits
{
	my $state = q{SELECT wait_event_type FROM pg_stat_activity WHERE datname = 'postgres' AND query LIKE 'INSERT%'};
	$node->poll_query_until('postgres', "SELECT EXISTS ($state AND wait_event_type = 'Lock') OR (SELECT count(*) FROM ($state AND state LIKE 'idle%') s) > 0");
	return sql($node, "SELECT EXISTS ($state AND wait_event_type = 'Lock')") eq 't';
}

sub below { return sql($node, sprintf(q{SELECT coalesce(string_agg(n::text, ',' ORDER BY position), '') FROM %1$s WHERE position < event_store.horizon('%1$s')}, $_[0])); }

foreach my $table (sort keys %tables)
{
	# who sleeps in its COMMIT, where, and who comes then
	foreach my $case ([ 'restore', 'commit-after-prepare', 'writer' ], [ 'restore', 'commit-after-reserve', 'writer' ],
		[ 'writer', 'commit-after-reserve', 'restore' ], [ 'writer', 'commit-after-log', 'restore' ])
	{
		my ($first, $point, $second) = @$case;
		my $name = "$table: a $first sleeps at $point";
		my %session;

		sql($node, "CREATE TABLE $table (position bigint, context_id text, n int$tables{$table}) USING event_store; INSERT INTO $table (context_id, n) VALUES ('a', 0)");
		my $position = sql($node, sprintf($next, $table));
		foreach my $who ($first, $second)
		{
			$session{$who} = $node->background_psql('postgres', on_error_stop => 0);
			$session{$who}->query_safe("SELECT count(*) FROM $table");
		}
		sql($node, "SELECT event_store_test.inject_fault('$point', 'sleep')");
		start($session{$first}, sprintf("$writes{$first};", $table, $position));
		ok($node->poll_query_until('postgres', "SELECT event_store_test.fault_hits('$point') > 0"), $name);
		my $visible = below($table);

		start($session{$second}, sprintf("$writes{$second};", $table, $position));
		ok(waits(), "$name: a $second waits for it");
		is(below($table), $visible, "$name: readers do not wait, and see nothing new");
		sql($node, 'SELECT event_store_test.disarm_faults()');
		$session{$first}->query_until(qr/done/, '');
		$session{$second}->query_until(qr/done/, '');
		my $refused = $session{$second}->{stderr} // '';
		eval { $_->quit } foreach values %session;

		is(sql($node, "SELECT count(*) - count(DISTINCT position) FROM $table"), '0', "$name: no position is there twice");
		is(below($table), $first eq 'restore' ? '0,2,1' : '0,1', "$name: " . ($first eq 'restore' ? 'the writer comes behind it' : 'the restore is refused'));
		if ($second eq 'restore')
		{
			like($refused, qr/position \d+ is not above the last one of the table, \d+/, "$name: with the reason");
		}
		sql($node, "DROP TABLE $table");
	}
}

# two that each write where the other restores
sql($node, "CREATE TABLE d$_ (position bigint, context_id text) USING event_store") foreach 1, 2;
my ($x, $y) = map { $node->background_psql('postgres', on_error_stop => 0) } 1, 2;
$x->query_safe(q{BEGIN; INSERT INTO d1 VALUES (event_store.horizon('d1') + 100, 'a')});
$y->query_safe(q{BEGIN; INSERT INTO d2 VALUES (event_store.horizon('d2') + 100, 'b')});
start($x, q{INSERT INTO d2 (context_id) VALUES ('a');});
ok(waits(), 'a writer waits for a restore');
start($y, q{INSERT INTO d1 (context_id) VALUES ('b');});
$_->query_until(qr/done/, '') foreach $x, $y;
like($x->{stderr} . $y->{stderr}, qr/deadlock detected/, 'a deadlock is detected');
$_->{stderr} = '' foreach $x, $y;
eval { $_->query_safe('COMMIT') } foreach $x, $y;
eval { $_->quit } foreach $x, $y;
is(sql($node, 'SELECT (SELECT count(*) FROM d1) + (SELECT count(*) FROM d2)'), '2', 'and one of the two commits');
$node->stop;
done_testing();
