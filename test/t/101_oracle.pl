# The oracle that the crash tests believe sees each kind of damage: a row lost, doubled, torn, altered or foreign, a version or
# position out of order or used twice, a follower who missed something, an acknowledgement without an event.

use strict;
use warnings;
use EventStore::Clients;
use EventStore::Oracle;
use EventStore::Server qw(new_server sql);
use EventStore::Workload;
use Test::More;

srand(42);
my $node = new_server('oracle', 'event_store.shards = 2', 'fsync = off');
EventStore::Workload::setup($node);
my $workload = EventStore::Workload->new(large => 200);
my $oracle = EventStore::Oracle->new;
my $clients = EventStore::Clients->new(
	node => $node, n => 4,
	next => sub { return undef if $workload->{tid} > 150; my $unit = $workload->unit; $oracle->begins($unit, 1); return $unit; },
	done => sub { my ($c, $unit) = @_; $oracle->ends($unit); });
$clients->run;
$clients->close_all;
is($oracle->check($node), '', 'all is well');
$oracle->followed('ev', [ map { [ split /\|/ ] } split /\n/, sql($node, q{SELECT position, tid, ord FROM ev ORDER BY position}) ]);
$oracle->check_append_versions($node);
is($oracle->verdict, '', 'still');

# The same rows in heap tables, where they can be damaged.
sql($node, 'ALTER TABLE ev SET ACCESS METHOD heap; ALTER TABLE pl SET ACCESS METHOD heap; ALTER TABLE event_store.events SET ACCESS METHOD heap');
$oracle->{without_horizon} = 1;
is($oracle->check($node), '', 'all is well on the heap');

# Does something in the database, looks, undoes it.
sub sees
{
	my ($what, $expected, $damage) = @_;
	sql($node, 'CREATE TABLE save_ev AS TABLE ev; CREATE TABLE save_pl AS TABLE pl; CREATE TABLE save_hp AS TABLE hp');
	sql($node, $damage);
	like($oracle->check($node), $expected, $what);
	sql($node, 'TRUNCATE ev, pl, hp; INSERT INTO ev TABLE save_ev; INSERT INTO pl TABLE save_pl; INSERT INTO hp TABLE save_hp; DROP TABLE save_ev, save_pl, save_hp');
	return;
}

my $one = '(SELECT tid, ord FROM ev ORDER BY tid, ord LIMIT 1)';
sees('a lost row', qr/acknowledged but not there/, "DELETE FROM ev WHERE (tid, ord) = $one");
sees('a lost transaction', qr/acknowledged but not there/, 'DELETE FROM pl WHERE tid = (SELECT min(tid) FROM pl)');
sees('a lost heap row', qr/acknowledged but not there/, 'DELETE FROM hp WHERE tid = (SELECT min(tid) FROM hp)');
sees('a doubled row', qr/doubled/, "INSERT INTO ev SELECT position + 1000000, context_id, version, tid, ord, filler FROM ev WHERE (tid, ord) = $one");
sees('altered content', qr/content/, "UPDATE ev SET filler = filler || 'x' WHERE (tid, ord) = $one");
sees('another context', qr/content/, "UPDATE ev SET context_id = context_id || 'x' WHERE (tid, ord) = $one");
sees('a foreign row', qr/nobody wrote/, q{INSERT INTO pl (context_id, tid, ord, filler, position) VALUES (context_of(99999, 1, 200), 99999, 1, filler_of(99999, 1), 99999999)});
sees('a row of a rolled-back savepoint', qr/rows too many/,
	'INSERT INTO pl (context_id, tid, ord, filler, position) SELECT context_of(tid, 9999, 200), tid, 9999, filler_of(tid, 9999), 99999999 FROM pl LIMIT 1');
sees('a gap in versions', qr/version: ev/, 'UPDATE ev SET version = version + 1 WHERE version = 1');
sees('a version twice', qr/version: ev/, 'UPDATE ev SET version = 1 WHERE version = 2');
sees('no position', qr/no position/, "UPDATE ev SET position = NULL WHERE (tid, ord) = $one");
sees('a position that meant something else before', qr/position reused/, "UPDATE pl SET position = (SELECT min(position) FROM ev) WHERE (tid, ord) = (SELECT tid, ord FROM pl LIMIT 1)");
sees('positions against statement order', qr/order in transaction/,
	'UPDATE pl SET position = 90000000 - position WHERE tid = (SELECT tid FROM pl GROUP BY tid HAVING count(*) > 1 LIMIT 1)');
sees('positions against commit order', qr/commit order/, 'UPDATE ev SET position = position + 50000000 WHERE tid = (SELECT min(tid) FROM ev)');
my ($aborted) = grep { $_->{state} eq 'aborted' && $_->{rows}[0] && $_->{rows}[0][0] eq 'pl' } values %{ $oracle->{units} };
sees('a row of an aborted transaction', qr/aborted but there/,
	"INSERT INTO pl SELECT context_of($aborted->{tid}, $aborted->{rows}[0][1], 200), $aborted->{tid}, $aborted->{rows}[0][1], filler_of($aborted->{tid}, $aborted->{rows}[0][1]), 99999999");

# what clients were told
my ($committed) = grep { $_->{state} eq 'committed' && @{ $_->{rows} } > 2 && $_->{rows}[0][0] =~ /ev|pl|hp/ } values %{ $oracle->{units} };
$committed->{state} = 'unknown';
is($oracle->check($node), '', 'a lost connection: all of it is there');
$committed->{state} = 'unknown';
my ($table, $ord) = @{ $committed->{rows}[0] };
sees('a lost connection: not all of it is there', qr/torn/, 'DELETE FROM ' . EventStore::Workload::relation_of($table) . " WHERE tid = $committed->{tid} AND ord = $ord");
$committed->{state} = 'committed';
delete $oracle->{followed}{ev}{seen}{ (keys %{ $oracle->{followed}{ev}{seen} })[0] };
like($oracle->check($node), qr/missed by the follower/, 'a follower missed something');
$oracle->followed('ev', [ [ 5, 1, 1 ] ]);
like($oracle->verdict, qr/follower: ev: position 5 after/, 'a follower went back');
$oracle->{units}{70000} = { tid => 70000, kind => 'forged', state => 'committed', rows => [ [ 'ev', 1, 1 ] ], sent => 1, ended => 2 };
like($oracle->check($node), qr/acknowledged but not there: transaction 70000/, 'an acknowledgement of nothing');

# and how it reads psql's lines
foreach my $case (
	[ { block => 1, wants => 'commit', lines => [ 'BEGIN', 'INSERT 0 1', 'COMMIT' ] }, 'committed' ],
	[ { block => 1, wants => 'commit', lines => [ 'BEGIN', 'ERROR:  x', 'ROLLBACK' ] }, 'aborted' ],
	[ { block => 1, wants => 'commit', lines => [ 'BEGIN', 'INSERT 0 1' ], lost => 1 }, 'unknown' ],
	[ { block => 1, wants => 'rollback', lines => [ 'BEGIN', 'INSERT 0 1' ], lost => 1 }, 'aborted' ],
	[ { block => 1, wants => 'commit', lines => [ 'BEGIN', 'ROLLBACK', 'COMMIT' ] }, 'committed' ],
	[ { lines => ['INSERT 0 1'] }, 'committed' ],
	[ { lines => ['psql: ERROR:  23505: no'] }, 'aborted' ],
	[ { lines => [], lost => 1 }, 'unknown' ],
	[ { lines => ['APPENDED 1 5 appended'], lost => 1 }, 'committed' ])
{
	is(EventStore::Workload::outcome($case->[0]), $case->[1], join(' / ', @{ $case->[0]{lines} }) . ($case->[0]{lost} ? ' lost' : ''));
}
$node->stop;
done_testing();
