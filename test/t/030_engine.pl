# The engine of a shard: what was committed is there after every way in which a shard or the server can end,
# once, with its versions and in its order; what was not committed never is.

use strict;
use warnings;
use EventStore::FlushLoad qw(flush_server);
use EventStore::Server qw(wait_open);
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep);

my $node = flush_server('engine', 'event_store.memtable_size = 64MB', 'event_store.wal_file_size = 16MB');

sub consistent
{
	my ($name) = @_;
	return EventStore::FlushLoad::consistent($node, $name);
}

# ---- every way to stop ----

my $one = <<'SQL';
BEGIN;
INSERT INTO plain SELECT NULL, 'c' || g % 7, g, repeat('x', 50) FROM generate_series(1, 500) g;
INSERT INTO heap SELECT 'plain', 'c' || g % 7, g FROM generate_series(1, 500) g;
INSERT INTO versioned (context_id, n) SELECT 'c' || g % 7, g FROM generate_series(1, 50) g;
INSERT INTO heap SELECT 'versioned', 'c' || g % 7, g FROM generate_series(1, 50) g;
COMMIT;
BEGIN;
INSERT INTO plain VALUES (NULL, 'no', 1, '');
INSERT INTO versioned (context_id, n) VALUES ('c1', 1);
ROLLBACK;
BEGIN;
INSERT INTO plain VALUES (NULL, 'savepoints', 1, '');
INSERT INTO heap VALUES ('plain', 'savepoints', 1);
SAVEPOINT s;
INSERT INTO plain VALUES (NULL, 'savepoints', 2, '');
INSERT INTO versioned (context_id, n) VALUES ('c2', -1);
ROLLBACK TO s;
INSERT INTO versioned (context_id, n) VALUES ('c2', 1000);
INSERT INTO heap VALUES ('versioned', 'c2', 1000);
COMMIT;
SQL

foreach my $mode (qw(immediate fast smart))
{
	$node->safe_psql('postgres', $one);
	consistent("before $mode");
	$node->stop($mode);
	$node->start;
	consistent("after $mode");
	$node->safe_psql('postgres', $one);
	$node->safe_psql('postgres', 'SELECT event_store.flush()');
	consistent("flushed after $mode");
	$node->stop($mode);
	$node->start;
	consistent("flushed and restarted, $mode");
}

# A clean stop leaves the counter where it was.
my $before = $node->safe_psql('postgres', 'SELECT max(position) FROM plain');
$node->restart;
$node->safe_psql('postgres', q{INSERT INTO plain VALUES (NULL, 'x', 1, ''); INSERT INTO heap VALUES ('plain', 'x', 1)});
cmp_ok($node->safe_psql('postgres', 'SELECT max(position) FROM plain'), '<', $before + 1000,
	'no positions are skipped by a clean stop');

# ---- a transaction that outlives its shard ----

my $session = $node->background_psql('postgres', on_error_stop => 0);
$session->query_safe(q{BEGIN});
$session->query_safe(q{INSERT INTO plain SELECT NULL, 'long' || g % 3, g, '' FROM generate_series(1, 2000) g});
$session->query_safe(q{INSERT INTO heap SELECT 'plain', 'long' || g % 3, g FROM generate_series(1, 2000) g});
is($session->query_safe(q{SELECT count(*) FROM plain WHERE context_id LIKE 'long%'}), '2000', 'own rows are visible');
$node->safe_psql('postgres',
	q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type LIKE 'event_store shard%'});
sleep 0.5;
ok(wait_open($node), 'terminated shards come back');
is($session->query_safe(q{SELECT count(*) FROM plain WHERE context_id LIKE 'long%'}), '2000',
	'own rows are visible after the restart of the shards');
$session->query_safe(q{INSERT INTO plain VALUES (NULL, 'long', 0, '')});
$session->query_safe(q{INSERT INTO heap VALUES ('plain', 'long', 0)});
$session->query_safe(q{COMMIT});
$session->quit;
consistent('a transaction under way while its shards were restarted');

# ---- shards end under load ----

my $script = $node->basedir . '/load.sql';
append_to_file($script, <<'SQL');
\set c random(1, 50)
\set n random(1, 1000000)
BEGIN;
INSERT INTO plain VALUES (NULL, 'l' || :c, :n, 'load');
INSERT INTO heap VALUES ('plain', 'l' || :c, :n);
INSERT INTO versioned (context_id, n) VALUES ('l' || :c, :n);
INSERT INTO heap VALUES ('versioned', 'l' || :c, :n);
COMMIT;
SQL

sub load
{
	my ($seconds, $during) = @_;
	my ($out, $err) = ('', '');
	my $pgbench = IPC::Run::start(
		[ 'pgbench', '-n', '-f', $script, '-c', 6, '-j', 2, '-T', $seconds,
			'--max-tries', '1000', $node->connstr('postgres') ],
		'>', \$out, '2>', \$err, IPC::Run::timeout(300));
	$during->();
	$pgbench->finish;
	return;
}

load(8, sub {
	for my $i (1 .. 3)
	{
		sleep 2;
		$node->safe_psql('postgres', 'SELECT pg_terminate_backend(pid) FROM pg_stat_activity '
			  . "WHERE backend_type = 'event_store shard " . ($i % 2) . "'");
	}
});
ok(wait_open($node), 'shards are open after the load');
consistent('shards terminated under load');

foreach my $mode (qw(immediate fast immediate))
{
	load(4, sub { sleep 2; $node->stop($mode); });
	$node->start;
	consistent("load, $mode");
}

# ---- large transactions ----

$node->safe_psql('postgres', 'ALTER SYSTEM SET event_store.memtable_size = 1024');
$node->reload;
my $large = <<'SQL';
BEGIN;
INSERT INTO plain SELECT NULL, 'big' || g % 100, g, repeat('y', 100) FROM generate_series(1, 20000) g;
INSERT INTO heap SELECT 'plain', 'big' || g % 100, g FROM generate_series(1, 20000) g;
SAVEPOINT s;
INSERT INTO plain SELECT NULL, 'big' || g % 100, g, repeat('z', 100) FROM generate_series(1, 20000) g;
INSERT INTO versioned (context_id, n) SELECT 'big' || g % 10, g FROM generate_series(1, 5000) g;
ROLLBACK TO s;
INSERT INTO versioned (context_id, n) SELECT 'big' || g % 10, g FROM generate_series(1, 20000) g;
INSERT INTO heap SELECT 'versioned', 'big' || g % 10, g FROM generate_series(1, 20000) g;
SQL

$node->safe_psql('postgres', "$large COMMIT;");
consistent('a large transaction');
$node->safe_psql('postgres', "$large ROLLBACK;");
consistent('a large transaction that was rolled back');
$node->stop('immediate');
$node->start;
consistent('large transactions after a crash');
$node->safe_psql('postgres', "$large COMMIT;");
$node->safe_psql('postgres', 'SELECT event_store.flush()');
$node->stop('immediate');
$node->start;
consistent('large transactions, flushed, after a crash');

$session = $node->background_psql('postgres', on_error_stop => 0);
$session->query_safe($large);
$node->stop('immediate');
eval { $session->quit };
$node->start;
consistent('a large transaction under way at a crash');

is($node->safe_psql('postgres', q{SELECT count(*) FROM event_store.stat_shards WHERE corruptions > 0}), '0',
	'no shard met damage');

$node->stop;
done_testing();
