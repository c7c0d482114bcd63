# Whoever forges, floods or starves the WAL that the shards live from: forged messages of unprivileged roles are not believed,
# and max_slot_wal_keep_size makes writers of events wait rather than lose them.

use strict;
use warnings;
use EventStore::Server qw(new_server kill_all crash_restart wait_open sql try_sql);
use IPC::Run;
use Test::More;
use Time::HiRes qw(sleep time);

my $node = new_server('limits', 'event_store.shards = 2', 'max_slot_wal_keep_size = 64MB', 'event_store.spill_after = 64kB',
	'min_wal_size = 32MB', 'max_wal_size = 64MB');
sql($node, <<'SQL');
CREATE TABLE ev (position bigint, context_id text, version bigint, n int, v text) USING event_store;
INSERT INTO ev (context_id, n) SELECT 'c' || g % 5, g FROM generate_series(1, 100) g;
CREATE ROLE nobody_special LOGIN;
CREATE TABLE ballast (v text); ALTER TABLE ballast ALTER v SET STORAGE external;
SQL
my $what = 'SELECT count(*), sum(n), max(version), count(DISTINCT position) FROM ev';
my $expected = sql($node, $what);

# ---- forged messages

my @prefixes = ('event_store', 'event_store\0\1', "E'event_store\\\\000\\\\001'", 'event_store' . "\x01", 'event_store   ');
foreach my $prefix (@prefixes)
{
	foreach my $transactional ('true', 'false')
	{
		# real payloads are not at hand for a role like this; rubbish of all sizes and beginnings
		foreach my $payload ("decode('01000000', 'hex')", "decode(repeat('ff', 200), 'hex')", "decode(repeat('00', 3000), 'hex')", "''::bytea",
			"convert_to('EVST' || repeat('x', 100), 'UTF8')")
		{
			try_sql($node, "SET ROLE nobody_special; SELECT pg_logical_emit_message($transactional, '$prefix', $payload)");
		}
	}
}
# with bytes of true messages: copied by somebody who can read WAL files, emitted by one who may not write events
kill_all($node);
crash_restart($node);
is(sql($node, $what), $expected, 'forged messages have no effect at recovery of the server');
sql($node, q{SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE backend_type LIKE 'event_store shard%'});
sleep 0.3;
ok(wait_open($node), 'nor at that of a shard');
is(sql($node, $what), $expected, 'all is as it was');

# The same with the very bytes of our messages, prefix and all, as far as SQL can pass them.
my $waldir = $node->data_dir . '/pg_wal';
my @bodies;
foreach my $file (glob("$waldir/0000*"))
{
	open(my $f, '<:raw', $file) or next;
	local $/;
	my $wal = <$f>;
	while (@bodies < 50 && $wal =~ /event_store\0\x01\0(.{300})/gs) { push @bodies, unpack('H*', $1); }
}
cmp_ok(scalar(@bodies), '>', 0, scalar(@bodies) . ' true messages were found in WAL');
foreach my $body (@bodies)
{
	foreach my $len (100, 300)
	{
		my $hex = substr($body, 0, 2 * $len);
		try_sql($node, "SET ROLE nobody_special; SELECT pg_logical_emit_message(true, 'event_store', decode('00' || '$hex', 'hex'))") if $len == 300;
		try_sql($node, "SET ROLE nobody_special; SELECT pg_logical_emit_message(true, 'event_store', decode('$hex', 'hex'))");
	}
}
kill_all($node);
crash_restart($node);
is(sql($node, $what), $expected, 'copies of true messages under a prefix that SQL can pass are not believed');

# ---- max_slot_wal_keep_size: writers of events wait before they log, others do not

sql($node, 'SELECT event_store.pause_shard(0)');
my $ballast = 'INSERT INTO ballast SELECT repeat(md5(g::text), 100) FROM generate_series(1, 4000) g';
my $begin = time();
sql($node, $ballast) foreach 1 .. 4;
pass(sprintf('who writes no events does not wait (%.1f s)', time() - $begin));
my $distance = sql($node, q{SELECT pg_current_wal_lsn() - restart_lsn FROM pg_replication_slots WHERE slot_name = 'event_store'});
cmp_ok($distance, '>', 32 * 1024 * 1024, "the slot holds $distance bytes, more than half of the limit");
my $other = sql($node, q{SELECT 'c' || g FROM generate_series(1, 100) g WHERE event_store.shard_of('c' || g, 'ev') = 0 LIMIT 1});
my (undef, undef, $err) = try_sql($node, "SET statement_timeout = '2s'; INSERT INTO ev (context_id, n) VALUES ('$other', 1)");
like($err, qr/57014|53\d\d\d/, 'a writer of events waits, and can be cancelled');
my ($out, $errors) = ('', '');
my $waiting = IPC::Run::start([ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-c', "INSERT INTO ev (context_id, n) VALUES ('$other', 2)" ],
	'<', \'', '>', \$out, '2>', \$errors, IPC::Run::timeout(120));
sleep 1;
sql($node, 'SELECT event_store.resume_shard(0)');
$waiting->finish;
is($errors, '', 'and goes on when the shard has caught up');
is(sql($node, "SELECT count(*) FROM ev WHERE context_id = '$other' AND n IN (1, 2)"),
	sql($node, "SELECT count(*) FROM generate_series(1, 100) g WHERE 'c' || g % 5 = '$other' AND g IN (1, 2)") + 1, 'its event is there, once');

# the slot is lost while the shards live: a new one, everything forced to their files, nothing lost
$expected = sql($node, $what);
sql($node, 'SELECT event_store.pause_shard(0)');
foreach (1 .. 12)
{
	sql($node, "$ballast; CHECKPOINT; SELECT pg_switch_wal()");
	last if sql($node, q{SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'event_store' AND (restart_lsn IS NULL OR wal_status = 'lost')}) > 0;
}
sql($node, 'SELECT event_store.resume_shard(0)');
ok($node->poll_query_until('postgres', q{SELECT count(*) = 1 FROM pg_replication_slots WHERE slot_name = 'event_store' AND active AND restart_lsn IS NOT NULL}),
	'there is a slot again');
like(PostgreSQL::Test::Utils::slurp_file($node->logfile), qr/invalidating.*slot "event_store"/, 'the first one was lost');
sql($node, "INSERT INTO ev (context_id, n) VALUES ('after', 0)");
is(sql($node, "$what WHERE context_id <> 'after'"), $expected, 'the shards have everything');
ok($node->poll_query_until('postgres', q{SELECT bool_and(s.restart_lsn >= r.restart_lsn) FROM event_store.stat_shards s, pg_replication_slots r WHERE slot_name = 'event_store'}),
	'they need no WAL from before the new slot');
crash_restart($node);
is(sql($node, "$what WHERE context_id <> 'after'"), $expected, 'also after a crash');
is(sql($node, "SELECT version FROM ev WHERE context_id = 'after'"), '1', 'and what came later');
$node->stop;
done_testing();
