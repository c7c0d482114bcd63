# pg_upgrade takes event tables along, whatever hangs on them: with the old cluster's store, adopted, the new one has every row,
# version and position, and goes on with the next ones. Without the store it says what is missing.

use strict;
use warnings;
use EventStore::Server qw(new_server sql try_sql crash_restart);
use File::Path qw(remove_tree);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::RecursiveCopy;
use PostgreSQL::Test::Utils;
use Test::More;

my $old = new_server('old', 'event_store.shards = 2', "autovacuum = off");
my $bindir = $old->config_data('--bindir');

plan(skip_all => 'pg_upgrade is not installed') if !-x "$bindir/pg_upgrade";

my @conf = ("shared_preload_libraries = 'event_store'", 'wal_level = replica', 'max_worker_processes = 24', "event_store.startup_timeout = '120s'",
	'autovacuum = off');
push(@conf, "event_store.io_method = '$ENV{ES_IO_METHOD}'") if $ENV{ES_IO_METHOD};

# A cluster that was never started.
sub new_cluster
{
	my ($name, @lines) = @_;
	my $node = PostgreSQL::Test::Cluster->new($name);

	$node->init;
	$node->append_conf('postgresql.conf', join("\n", @lines, ''));
	return $node;
}

sub upgrade
{
	my ($to, @options) = @_;

	return (
		'pg_upgrade', '--no-sync', '-d', $old->data_dir, '-D', $to->data_dir, '-b', $bindir, '-B', $bindir, '-s', $to->host,
		'-p', $old->port, '-P', $to->port, @options);
}

# They are removed when it succeeds.
sub show_logs
{
	my ($node) = @_;

	diag("$_:\n" . slurp_file($_)) foreach glob($node->data_dir . '/pg_upgrade_output.d/*/log/*.log');
	return;
}

sub set_store
{
	my ($node) = @_;

	remove_tree($node->data_dir . '/event_store');
	PostgreSQL::Test::RecursiveCopy::copypath($old->data_dir . '/event_store', $node->data_dir . '/event_store');
	return;
}

sql($old, <<'SQL');
CREATE TYPE mood AS ENUM ('low', 'high');
CREATE ROLE reader;
CREATE TABLE customer (name text PRIMARY KEY);
INSERT INTO customer VALUES ('ann'), ('bob');
CREATE TABLE fired (n bigint);

CREATE TABLE ev (position bigint, gone int, context_id text NOT NULL, version bigint, event_id uuid, event_type mood,
	customer text REFERENCES customer DEFERRABLE, n int CHECK (n > 0), twice int GENERATED ALWAYS AS (n * 2) STORED) USING event_store;
INSERT INTO ev (gone, context_id, event_id, event_type, customer, n)
	SELECT g, 'c' || g % 50, md5(g::text)::uuid, (ARRAY['low', 'high'])[g % 2 + 1]::mood, (ARRAY['ann', 'bob'])[g % 2 + 1], g FROM generate_series(1, 3000) g;
SELECT event_store.flush();
ALTER TABLE ev DROP COLUMN gone;
ALTER TABLE ev ADD COLUMN late text DEFAULT 'then';
CREATE FUNCTION fire() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO fired VALUES (NEW.n); RETURN NEW; END $$;
CREATE TRIGGER before_row BEFORE INSERT ON ev FOR EACH ROW WHEN (NEW.n > 5000) EXECUTE FUNCTION fire();
CREATE TRIGGER after_row AFTER INSERT ON ev FOR EACH ROW WHEN (NEW.n > 5000) EXECUTE FUNCTION fire();
CREATE CONSTRAINT TRIGGER at_end AFTER INSERT ON ev DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (NEW.n > 5000) EXECUTE FUNCTION fire();
ALTER TABLE ev ENABLE ROW LEVEL SECURITY;
CREATE POLICY mine ON ev FOR SELECT USING (customer = 'ann');
GRANT SELECT ON ev TO reader;
INSERT INTO ev (context_id, event_type, customer, n) SELECT 'c' || g % 60, 'low', 'bob', g FROM generate_series(1, 700) g;

CREATE TABLE parts (context_id int, position bigint, n int, customer text REFERENCES customer) PARTITION BY LIST (context_id);
CREATE TABLE part0 PARTITION OF parts FOR VALUES IN (0, 1, 2) USING event_store;
CREATE TABLE part1 (customer text, n int, context_id int, position bigint) USING event_store;
ALTER TABLE parts ATTACH PARTITION part1 FOR VALUES IN (3, 4);
CREATE TABLE part_else PARTITION OF parts DEFAULT;
INSERT INTO parts (context_id, n, customer) SELECT g % 6, g, 'ann' FROM generate_series(1, 500) g;

CREATE TABLE parent (context_id text, position bigint) USING event_store;
CREATE TABLE child (extra text) INHERITS (parent) USING event_store;
INSERT INTO parent VALUES ('p');
INSERT INTO child VALUES ('q', NULL, repeat('long', 20000));
CREATE TABLE bare (context_id mood, a int[]) USING event_store;
SQL
sql($old, <<'SQL');
INSERT INTO bare SELECT (ARRAY['low', 'high'])[g % 2 + 1]::mood, ARRAY[g, NULL] FROM generate_series(1, 100) g;
CREATE TABLE nothing (context_id uuid, version bigint) USING event_store;
CREATE MATERIALIZED VIEW counts AS SELECT context_id, count(*) FROM ev GROUP BY 1;
ALTER ROLE reader SET event_store.enqueue_timeout = '5s';
SELECT count(event_store.append('order-' || g % 30, 'placed', jsonb_build_object('n', g), event_id => md5(g::text)::uuid)) FROM generate_series(1, 900) g;
CREATE DATABASE other TEMPLATE template0;
SQL
sql($old, q{CREATE EXTENSION event_store; SELECT event_store.append('one', 'x', '{}')}, 'other');
# its warning is for who makes it
try_sql($old, 'CREATE PUBLICATION pub FOR ALL TABLES');

my %contents = (
	ev => 'SELECT * FROM ev ORDER BY position',
	parts => 'SELECT tableoid::regclass, * FROM parts ORDER BY position, context_id, n',
	parent => 'SELECT p.tableoid::regclass, p.context_id, p.position, md5(extra) FROM parent p LEFT JOIN child c USING (position) ORDER BY position',
	bare => 'SELECT * FROM bare ORDER BY a',
	nothing => 'SELECT count(*) FROM nothing',
	counts => 'SELECT * FROM counts ORDER BY 1',
	events => 'SELECT * FROM event_store.events ORDER BY position',
	replay => q{SELECT version, payload FROM event_store.replay('order-7')},
	backward => q{SELECT version, event_type, payload FROM event_store.replay('c7', store => 'ev', backward => true, max_count => 5)},
	seen => 'SET ROLE reader; SELECT count(*), min(customer), max(customer) FROM ev',
	files => q{SELECT relname, relfilenode, oid FROM pg_class WHERE relkind = 'r' AND relam = (SELECT oid FROM pg_am WHERE amname = 'event_store') ORDER BY 1});
my %before = map { $_ => sql($old, $contents{$_}) } keys %contents;
my $last = sql($old, 'SELECT greatest((SELECT max(position) FROM ev), (SELECT max(position) FROM event_store.events))');
my $sysid = sql($old, 'SELECT system_identifier FROM pg_control_system()');

sub same
{
	my ($node, $when) = @_;

	foreach my $name (sort keys %contents)
	{
		my $is = sql($node, $contents{$name});

		ok($is eq $before{$name}, "$when: $name") or diag('was: ' . substr($before{$name}, 0, 300) . "\nis: " . substr($is, 0, 300));
	}
	is(sql($node, 'SELECT context_id, version FROM event_store.events', 'other'), 'one|1', "$when: another database");
	is(sql($node, 'SELECT count(*) FROM event_store.verify()'), '0', "$when: verify() finds nothing");
	return;
}

$old->stop;
chdir(PostgreSQL::Test::Utils::tempdir()) or die 'chdir';

# ---- the library must be preloaded there, too: said before anything is changed

my $bare = new_cluster('bare', 'autovacuum = off');
command_fails([ upgrade($bare, '--check') ], 'pg_upgrade --check without preload');
my ($missing) = glob($bare->data_dir . '/pg_upgrade_output.d/*/loadable_libraries.txt');
like(slurp_file($missing // '/dev/null'), qr/event_store is not loaded/, 'it says why');

# ---- the upgrade

my $new = new_cluster('new', @conf);
command_ok([ upgrade($new) ], 'pg_upgrade');
show_logs($new);
ok(!-d $new->data_dir . '/event_store', 'it makes no store');

# ---- forgotten: an empty store is made, and says that it is not the right one

my $forgotten = PostgreSQL::Test::Cluster->new('forgotten');
PostgreSQL::Test::RecursiveCopy::copypath($new->data_dir, $forgotten->data_dir);
chmod(0700, $forgotten->data_dir) or die 'chmod';
$forgotten->append_conf('postgresql.conf', 'port = ' . $forgotten->port);
$forgotten->start;
my (undef, undef, $err) = $forgotten->psql('postgres', 'SELECT count(*) FROM ev', extra_params => [ '-v', 'VERBOSITY=verbose' ]);
like($err, qr/55000.*belongs to another event store.*HINT:.*pg_upgrade.*"event_store".*event_store\.adopt_system_id/s, 'without the store: a hint');
$forgotten->stop;
set_store($forgotten);
$forgotten->append_conf('postgresql.conf', "event_store.adopt_system_id = '$sysid'");
$forgotten->start;
same($forgotten, 'the store came late');
$forgotten->stop;

# ---- in time

set_store($new);
$new->append_conf('postgresql.conf', "event_store.adopt_system_id = '$sysid'");
$new->start;
same($new, 'after the upgrade');
sql($new, 'VACUUM FREEZE; ANALYZE');
$new->append_conf('postgresql.conf', "event_store.adopt_system_id = ''");
$new->restart;
same($new, 'after a restart');

# what comes next
is( sql($new, q{SELECT version, outcome FROM event_store.append('order-5', 'placed', '{"n": 5}', event_id => md5('5')::uuid)}),
	'1|already_there', 'event ids are known');
is(sql($new, q{SELECT version FROM event_store.append('order-5', 'paid', '{}', expected_version => 30)}), '31', 'append gives the next version');
is( sql($new, "INSERT INTO ev (context_id, event_type, customer, n) VALUES ('c7', 'high', 'ann', 6000); SELECT version - (SELECT max(version) FROM ev WHERE context_id = 'c7' AND position <= $last), late FROM ev WHERE position > $last"),
	'1|then', 'so does an INSERT, at a position behind all');
is(sql($new, 'SELECT count(*), min(n), max(n) FROM fired'), '3|6000|6000', 'triggers fire');
like((try_sql($new, "INSERT INTO ev (context_id, customer, n) VALUES ('c7', 'eve', 1)"))[2], qr/foreign key/, 'foreign keys hold');
sql($new, 'INSERT INTO parts (context_id, n) VALUES (1, -1), (4, -1), (5, -1)');
is(sql($new, 'SELECT string_agg(tableoid::regclass::text, \',\' ORDER BY context_id) FROM parts WHERE n = -1'), 'part0,part1,part_else', 'rows find their partitions');
is(sql($new, q{INSERT INTO nothing (context_id) VALUES (md5('1')::uuid); SELECT version FROM nothing}), '1', 'an empty table takes rows');
is(sql($new, q{SELECT version FROM event_store.append('one', 'y', '{}')}, 'other'), '2', 'and so does another database');
sql($new, 'ALTER TABLE ev DROP COLUMN customer CASCADE; VACUUM FULL ev; SELECT event_store.flush()');
my %ev = map { $_ => sql($new, $_) } ('SELECT * FROM ev ORDER BY position', 'SELECT * FROM event_store.events ORDER BY position');
crash_restart($new);
is(sql($new, $_), $ev{$_}, 'after a crash') foreach sort keys %ev;
is(sql($new, 'SELECT count(*) FROM event_store.verify()'), '0', 'verify() finds nothing');
$new->stop;

# ---- the same with hard links, into a cluster that was started before and so has a store and a slot of its own

$bare->append_conf('postgresql.conf', join("\n", @conf, "event_store.adopt_system_id = '$sysid'", ''));
$bare->start;
ok($bare->poll_query_until('postgres', q{SELECT count(*) = 1 FROM pg_replication_slots WHERE slot_name = 'event_store'}), 'a slot of its own');
$bare->stop;
remove_tree($bare->data_dir . '/pg_upgrade_output.d');
command_ok([ upgrade($bare, '--link') ], 'pg_upgrade --link');
show_logs($bare);
set_store($bare);
$bare->start;
same($bare, 'after an upgrade with links');
is(sql($bare, q{SELECT version FROM event_store.append('order-5', 'paid', '{}', expected_version => 30)}), '31', 'the next version');
crash_restart($bare);
is(sql($bare, q{SELECT version FROM event_store.append('order-5', 'paid', '{}', expected_version => 31)}), '32', 'and after a crash');
$bare->stop;

done_testing();
