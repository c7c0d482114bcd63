# Whoever forges, floods or starves the WAL that the shards live from: forged messages of unprivileged roles are not believed,
# and max_slot_wal_keep_size makes writers of events wait rather than lose them.

use strict;
use warnings;
use EventStore::Clients;
use EventStore::Oracle;
use EventStore::Server qw(new_server kill_all crash_restart wait_open sql try_sql seed);
use EventStore::Workload;
use IPC::Run;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

seed();
my $node = new_server('limits', 'event_store.shards = 2', 'max_slot_wal_keep_size = 64MB', 'event_store.spill_after = 64kB',
	'min_wal_size = 32MB', 'max_wal_size = 64MB');
sql($node, <<'SQL');
CREATE TABLE mine (position bigint, context_id text, version bigint, n int, v text) USING event_store;
INSERT INTO mine (context_id, n) SELECT 'c' || g % 5, g FROM generate_series(1, 100) g;
CREATE ROLE nobody_special LOGIN;
CREATE TABLE ballast (v text); ALTER TABLE ballast ALTER v SET STORAGE external;
SQL
EventStore::Workload::setup($node);
my $what = 'SELECT count(*), sum(n), max(version), count(DISTINCT position) FROM mine';

# ---- forged messages: behind restart_lsn, so that recovery reads each of them

# sessions that have their queues: paused shards leave what these send to PostgreSQL's WAL
my $writer = $node->background_psql('postgres', on_error_stop => 0);
$writer->query_safe(q{CREATE TABLE plain (context_id text, n int) USING event_store});
$writer->query_safe(q{INSERT INTO plain SELECT 'p' || g, g FROM generate_series(1, 50) g});
my $from = sql($node, 'SELECT event_store.sync(), pg_current_wal_insert_lsn()') =~ s/^\|//r;
$writer->query_safe(q{SELECT event_store.pause_shard(0), event_store.pause_shard(1)});
$writer->query_safe("INSERT INTO plain SELECT 'p' || g, g FROM generate_series($_, $_ + 49) g") foreach 51, 101;
$writer->query_safe("BEGIN; INSERT INTO plain SELECT 'aborted' || g, g FROM generate_series(1, 50) g; ROLLBACK");
my $plain = q{SELECT count(*), sum(n), count(*) FILTER (WHERE context_id LIKE 'aborted%') FROM plain};

# PostgreSQL's WAL without the headers of its pages, so that what crosses a page is whole. A page that does not say where it lies is
# what a file that is used again held before: WAL ends there.
sub wal_of
{
	my ($page_size, $size) = split /\|/, sql($node, q{SELECT current_setting('wal_block_size'), setting FROM pg_settings WHERE name = 'wal_segment_size'});
	my $wal = '';

	foreach my $file (sort glob($node->data_dir . '/pg_wal/' . '[0-9A-F]' x 24))
	{
		my ($log, $segment) = map { hex } $file =~ /(.{8})(.{8})$/;
		my $bytes = slurp_file($file);
		for (my $at = 0; $at < length($bytes); $at += $page_size)
		{
			my ($magic, $info, $timeline, $address) = unpack('vvVQ<', substr($bytes, $at, 16));
			return $wal if $magic == 0 || $address != ($log << 32) + $segment * $size + $at;
			my $header = $info & 0x0002 ? 40 : 24;
			$wal .= substr($bytes, $at + $header, $page_size - $header);
		}
	}
	return $wal;
}

# True messages with their exact length, as somebody has them who can read WAL files: 72 bytes of header, whose 15th word is the
# length of what follows.
my @true;
my $wal = wal_of();
while ($wal =~ /event_store\0\x01\0(?=ESBM)/g)
{
	my $at = pos($wal);
	my $len = 72 + unpack('V', substr($wal, $at + 56, 4));
	push @true, substr($wal, $at, $len) if $len < 8000;
}
my %kinds = map { ord(substr($_, 6, 1)) => 1 } @true;
is(join(' ', sort keys %kinds), '2 3 4', scalar(@true) . ' true messages are in WAL: FINISH, RESERVE and MARK') or diag(join(' ', %kinds));

# Prefixes that SQL can pass, and what then stands before the true payload so that the record has the very bytes of ours. One of
# 13 characters makes a prefix_size of 14, as ours has.
my @prefixes = (
	[ q{'event_store'}, "\x01\0" ], [ q{'event_store'}, '' ], [ q{E'event_store\x01'}, "\0" ], [ q{E'event_store\x01'}, '' ],
	[ q{E'event_store\x01\x01'}, '' ], [ q{'event_store12'}, '' ], [ q{'event_store\000\001'}, '' ], [ q{'event_store   '}, '' ], [ q{''}, "event_store\0\x01\0" ]);
my @rubbish = ("\x01\0\0\0", "\xff" x 200, "\0" x 3000, '', 'ESBM' . 'x' x 100, 'ESBM' x 1000);
my $begin_forged = sql($node, 'SELECT pg_current_wal_insert_lsn()');
my $forged = 0;
my $script = "SET ROLE nobody_special;\n";
foreach my $entry (@prefixes)
{
	my ($prefix, $before) = @$entry;
	foreach my $payload (@rubbish, (@true > 40 ? @true[ -40 .. -1 ] : @true))
	{
		foreach my $transactional ('true', 'false')
		{
			$script .= sprintf("SELECT pg_logical_emit_message(%s, %s, decode('%s', 'hex'));\n", $transactional, $prefix, unpack('H*', $before . $payload));
			$forged++;
		}
	}
}
my $file = PostgreSQL::Test::Utils::tempdir() . '/forged.sql';
append_to_file($file, $script);
command_ok([ 'psql', '-XAtq', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('postgres'), '-o', '/dev/null', '-f', $file ], "$forged messages are forged by a role that may do nothing else");
my $end_forged = sql($node, 'SELECT pg_current_wal_insert_lsn()');
sql($node, 'CREATE TABLE flushes (n int)');
my ($dump) = run_command([ 'pg_waldump', '-p', $node->data_dir . '/pg_wal', '-r', 'LogicalMessage', '-s', $begin_forged, '-e', $end_forged ]);
my @records = $dump =~ /^rmgr: LogicalMessage.*prefix "event_store/mg;
my $others = 2 * (@rubbish + (@true > 40 ? 40 : @true));
cmp_ok(scalar(@records), '>=', $forged - $others, scalar(@records) . ' of them with our name are in WAL');
is(sql($node, "SELECT restart_lsn <= '$begin_forged' FROM pg_replication_slots WHERE slot_name = 'event_store'"), 't', 'where recovery will read them');
my $expected = '100|5050|20|100';
kill_all($node);
eval { $writer->quit };
crash_restart($node);
is(sql($node, $what), $expected, 'they have no effect at recovery of the server');
is(sql($node, $plain), '150|11325|0', 'nor on the messages that were copied');
my $generations = sql($node, 'SELECT sum(generation) FROM event_store.stat_shards');
sql($node, q{SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE backend_type LIKE 'event_store shard%'});
ok($node->poll_query_until('postgres', qq{SELECT bool_and(state = 'open') AND sum(generation) = $generations + 2 FROM event_store.stat_shards}), 'open');
is(sql($node, $what), $expected, 'nor at recovery of a shard');
is(sql($node, $plain), '150|11325|0', 'nor there');
is(sql($node, q{SELECT count(*) FROM event_store.verify()}), '0', 'no damage');

# ---- max_slot_wal_keep_size: writers of events wait before they log, others do not

sql($node, 'SELECT event_store.sync()');
sql($node, 'SELECT event_store.pause_shard(0)');
my $ballast = 'INSERT INTO ballast SELECT repeat(md5(g::text), 100) FROM generate_series(1, 4000) g';
my $begin = time();
sql($node, $ballast) foreach 1 .. 4;
pass(sprintf('who writes no events does not wait (%.1f s)', time() - $begin));
my $distance = sql($node, q{SELECT pg_current_wal_lsn() - restart_lsn FROM pg_replication_slots WHERE slot_name = 'event_store'});
cmp_ok($distance, '>', 32 * 1024 * 1024, "the slot holds $distance bytes, more than half of the limit");
my $other = sql($node, q{SELECT 'c' || g FROM generate_series(1, 100) g WHERE event_store.shard_of('c' || g, 'mine') = 0 LIMIT 1});
my (undef, undef, $err) = try_sql($node, "SET statement_timeout = '2s'; INSERT INTO mine (context_id, n) VALUES ('$other', 1)");
like($err, qr/57014|53\d\d\d/, 'a writer of events waits, and can be cancelled');
my ($out, $errors) = ('', '');
my $waiting = IPC::Run::start([ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-c', "INSERT INTO mine (context_id, n) VALUES ('$other', 2)" ],
	'<', \'', '>', \$out, '2>', \$errors, IPC::Run::timeout(120));
sleep 1;
sql($node, 'SELECT event_store.resume_shard(0)');
$waiting->finish;
is($errors, '', 'and goes on when the shard has caught up');
is(sql($node, "SELECT count(*) FROM mine WHERE context_id = '$other' AND n IN (1, 2)"),
	sql($node, "SELECT count(*) FROM generate_series(1, 100) g WHERE 'c' || g % 5 = '$other' AND g IN (1, 2)") + 1, 'its event is there, once');

# The slot is lost while clients write, some with transactions open: a new one, everything forced to the shards' files, nothing lost.

$expected = sql($node, $what);
my $workload = EventStore::Workload->new(large => 4000);
my $oracle = EventStore::Oracle->new;
my $open = $node->background_psql('postgres', on_error_stop => 0);
my $unit = $workload->begin_unit('open');
$unit->{block} = 1;
$unit->{sql} = "BEGIN;\n" . $workload->insert_hp($unit) . $workload->insert_pl($unit, 3000);
$oracle->begins($unit, 1);
$unit->{sent} = time();
$open->query_safe($unit->{sql});
my $starve = PostgreSQL::Test::Utils::tempdir() . '/starve.sql';
append_to_file($starve, "SELECT event_store.pause_shard(0);\n" . "$ballast;\nCHECKPOINT;\nSELECT pg_switch_wal();\n" x 12 . "SELECT event_store.resume_shard(0);\n");
my ($committed_before, $lost_at, $committed_lost) = (0, undef, 0);
my $clients = EventStore::Clients->new(
	node => $node, n => 4,
	next => sub { my $u = $workload->unit; $oracle->begins($u, 1); return $u; },
	done => sub { my ($c, $u) = @_; $oracle->ends($u); });
$clients->run(seconds => 120, tick => sub { return ($oracle->{counts}{committed} // 0) <= 20; });
$committed_before = $oracle->{counts}{committed};
my $log = -s $node->logfile;
my $starving = IPC::Run::start([ 'psql', '-XAtq', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('postgres'), '-f', $starve ],
	'<', '/dev/null', '>', \$out, '2>', \$errors, IPC::Run::timeout(300));
my $stop_at;
my $invalid = qr/invalidating.*slot "event_store"/;
my $looked = 0;
$clients->run(seconds => 240, tick => sub {
	return 1 if time() < $looked + 0.2;
	$looked = time();
	if (!defined $lost_at && slurp_file($node->logfile, $log) =~ $invalid)
	{
		$lost_at = time();
		$committed_lost = $oracle->{counts}{committed};
	}
	eval { $starving->pump_nb };
	$stop_at //= time() + 2 if !$starving->pumpable;
	return !defined $stop_at || time() < $stop_at || $oracle->{counts}{committed} - $committed_lost <= 20;
});
$starving->finish;
is($errors, '', 'WAL is written until the slot is lost');
ok(defined $lost_at, 'it is, while clients write');
$clients->drain(seconds => 240);
cmp_ok($committed_before, '>', 20, 'clients committed before that');
cmp_ok($oracle->{counts}{committed} - $committed_lost, '>', 20, 'and after it');
ok($node->poll_query_until('postgres', q{SELECT count(*) = 1 FROM pg_replication_slots WHERE slot_name = 'event_store' AND active AND restart_lsn IS NOT NULL}),
	'there is a slot again');
$open->query('COMMIT');
$unit->{ended} = time();
$unit->{lines} = [ $open->{stderr} =~ /ERROR|FATAL/ ? 'ERROR' : 'COMMIT' ];
is($open->{stderr} =~ /ERROR|FATAL/ ? $open->{stderr} : '', '', 'a transaction that was open all the while commits');
$oracle->ends($unit);
$open->quit;
is($oracle->check($node), '', 'the oracle agrees');
is(sql($node, $what), $expected, 'the shards have everything that was there before');
ok($node->poll_query_until('postgres', q{SELECT bool_and(s.restart_lsn >= r.restart_lsn) FROM event_store.stat_shards s, pg_replication_slots r WHERE slot_name = 'event_store'}),
	'they need no WAL from before the new slot');
$clients->run(seconds => 1);
kill_all($node);
$clients->abandon;
$oracle->crashed;
crash_restart($node);
is($oracle->check($node), '', 'after a crash: the oracle agrees');
is(sql($node, $what), $expected, 'and the rest is there');
$clients->close_all;
$node->stop;
done_testing();
