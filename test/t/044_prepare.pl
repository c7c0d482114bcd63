# Versions and event ids: what was acknowledged is there once, with the version that was promised; what was refused
# or rolled back is not; versions of a context are 1, 2, 3 … in the order of positions. So it is with four sessions at
# once, savepoints, large transactions, flushes, and after crashes.

use strict;
use warnings;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $steps = $ENV{ES_READ_STEPS} || 400;
my $seed  = $ENV{ES_SEED}       || time();
srand($seed);
note("ES_SEED=$seed");

my $node = PostgreSQL::Test::Cluster->new('prepare');
$node->init;
$node->append_conf('postgresql.conf', <<CONF);
shared_preload_libraries = 'event_store'
wal_level = replica
fsync = off
event_store.shards = 2
event_store.memtable_size = '1MB'
event_store.spill_after = '64kB'
max_worker_processes = 16
deadlock_timeout = '50ms'
restart_after_crash = on
CONF
$node->start;
$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION event_store;
CREATE TABLE ev (context_id text, position bigint, version bigint, event_id uuid, k int, v text) USING event_store;
-- what is certain: one row per committed event, in the same transaction
CREATE TABLE truth (context_id text, version bigint, event_id uuid, k int, v text);
CREATE FUNCTION wrong() RETURNS SETOF text LANGUAGE sql AS $$
	SELECT 'version ' || version || ' of ' || context_id || ' is number ' || n FROM
		(SELECT *, row_number() OVER (PARTITION BY context_id ORDER BY position) AS n FROM ev) x WHERE n IS DISTINCT FROM version
	UNION ALL
	SELECT 'event id twice: ' || context_id || ' ' || event_id FROM ev WHERE event_id IS NOT NULL GROUP BY context_id, event_id HAVING count(*) > 1
	UNION ALL
	SELECT 'too much: ' || x::text FROM (SELECT context_id, event_id, k, v FROM ev EXCEPT ALL SELECT context_id, event_id, k, v FROM truth) x
	UNION ALL
	SELECT 'missing: ' || x::text FROM (SELECT context_id, event_id, k, v FROM truth EXCEPT ALL SELECT context_id, event_id, k, v FROM ev) x
	UNION ALL
	SELECT 'promised: ' || t::text FROM truth t LEFT JOIN ev e USING (context_id, k) WHERE t.version IS NOT NULL AND t.version IS DISTINCT FROM e.version
	LIMIT 5 $$;
SQL

my @sessions = map { { name => "s$_", psql => undef, open => 0, savepoints => 0, failed => 0 } } 1 .. 4;
my $bad  = 0;
my $k    = 0;
my %seen = (ok => 0, refused => 0, duplicate => 0, conflict => 0);
my @ids;    # [context, id, k, v] of events that may have been stored

sub connect_all
{
	for my $s (@sessions)
	{
		$s->{psql} = $node->background_psql('postgres', on_error_stop => 0);
		$s->{psql}->query("SET lock_timeout = '300ms'");
		$s->{open} = $s->{savepoints} = $s->{failed} = 0;
	}
	return;
}

# returns SQLSTATE or ''
sub run
{
	my ($s, $sql, @expected) = @_;
	my $out = $s->{psql}->query("\\set VERBOSITY verbose\n$sql");
	my $err = $s->{psql}->{stderr};

	$s->{psql}->{stderr} = '';
	return ('', $out) unless $err =~ /(?:ERROR|FATAL|PANIC):  (\w+):/;
	my $state = $1;
	$s->{failed} = 1 if $s->{open};
	# a wait for a session that waits for us at this prompt ends by lock_timeout
	if (!grep { $state eq $_ } @expected, '55P03', '40P01', '25P02')
	{
		diag("$s->{name}: $sql: $err");
		$bad++;
	}
	return ($state, $out);
}

sub context { return 'c' . int(rand(6)); }
sub uuid { return sprintf('00000000-0000-0000-0000-%012d', $_[0]); }

sub check
{
	my ($when) = @_;
	my $out = $node->safe_psql('postgres', 'SELECT * FROM wrong()');

	if ($out ne '')
	{
		diag("$when: $out");
		$bad++;
	}
	return;
}

sub step
{
	my ($s) = @_;
	my $r = rand();

	if ($s->{failed})
	{
		run($s, 'ROLLBACK');
		$s->{open} = $s->{savepoints} = $s->{failed} = 0;
	}
	elsif ($r < 0.10 && !$s->{open})
	{
		run($s, 'BEGIN');
		$s->{open} = 1;
	}
	elsif ($r < 0.30)
	{
		# any version
		my ($c, $n) = (context(), ++$k);
		my ($state) = run($s, "WITH a AS (INSERT INTO ev (context_id, k, v) VALUES ('$c', $n, 'plain')) INSERT INTO truth VALUES ('$c', NULL, NULL, $n, 'plain')");

		$seen{ok}++ if $state eq '';
	}
	elsif ($r < 0.55)
	{
		# expected version: what this session sees, own rows included, mostly right
		my ($c, $n) = (context(), ++$k);
		my $off = rand() < 0.7 ? 0 : int(rand(5)) - 2;
		my ($state) = run($s, "DO \$\$ DECLARE n bigint; BEGIN SELECT count(*) + 1 + $off INTO n FROM ev WHERE context_id = '$c'; "
			  . "INSERT INTO ev (context_id, version, k, v) VALUES ('$c', n, $n, 'expected'); INSERT INTO truth VALUES ('$c', n, NULL, $n, 'expected'); END \$\$", '23505', '22023');

		$seen{ $state eq '' ? 'ok' : 'refused' }++;
	}
	elsif ($r < 0.70)
	{
		# an event id: new, or one that was sent before, perhaps with other content; the truth has it once
		my $old = rand() < 0.5 && @ids;
		my ($c, $id, $n, $v) = $old ? @{ $ids[ int(rand(@ids)) ] } : (context(), uuid(++$k), $k, 'id');
		my $other = $old && rand() < 0.3;

		$v = 'other ' . ++$k if $other;
		push @ids, [ $c, $id, $n, $v ] unless $old;
		# who sends the same twice at once waits for the other: the lock makes the truth's row unique too
		my ($state) = run($s, "DO \$\$ BEGIN PERFORM pg_advisory_xact_lock(hashtext('$c$id')); INSERT INTO ev (context_id, event_id, k, v) VALUES ('$c', '$id', $n, '$v'); "
			  . "IF NOT EXISTS (SELECT 1 FROM truth WHERE context_id = '$c' AND event_id = '$id') THEN INSERT INTO truth VALUES ('$c', NULL, '$id', $n, '$v'); END IF; END \$\$", '23505');

		$seen{ $state eq '' ? ($old ? 'duplicate' : 'ok') : 'conflict' }++;
	}
	elsif ($r < 0.74)
	{
		# many rows, some of them twice
		my $n = 500 + int(rand(1500));
		my $from = $k + 1;

		$k += $n;
		run($s, "WITH r AS MATERIALIZED (SELECT 'c' || (i / 2) % 8 AS c, i / 2 AS k, ('00000000-0000-0000-0001-' || lpad((i / 2)::text, 12, '0'))::uuid AS id FROM generate_series(2 * $from, 2 * $k + 1) i), "
			  . "a AS (INSERT INTO ev (context_id, event_id, k, v) SELECT c, id, k, repeat('m', 80) FROM r) INSERT INTO truth SELECT DISTINCT ON (k) c, NULL::bigint, id, k, repeat('m', 80) FROM r");
	}
	elsif ($r < 0.78 && $s->{open})
	{
		run($s, 'SAVEPOINT p' . ++$s->{savepoints});
	}
	elsif ($r < 0.82 && $s->{open} && $s->{savepoints} > 0)
	{
		run($s, 'ROLLBACK TO p' . $s->{savepoints});
		$s->{failed} = 0;
	}
	elsif ($r < 0.92 && $s->{open})
	{
		my ($state) = run($s, rand() < 0.75 ? 'COMMIT' : 'ROLLBACK', '23505');

		$seen{refused}++ if $state ne '';
		$s->{open} = $s->{savepoints} = $s->{failed} = 0;
	}
	elsif ($r < 0.94 && !$s->{open})
	{
		run($s, 'SELECT event_store.flush()');
	}
	return;
}

connect_all();
for my $crash ('none', 'shard', 'server', 'end')
{
	for my $n (1 .. 2000)
	{
		# at the end: until there was some of each kind
		last if $bad > 3 || $n > $steps / 4 && ($crash ne 'end' || !grep { $_ == 0 } values %seen);
		step($sessions[ int(rand(@sessions)) ]);
		check("step $n before $crash") if $n % 25 == 0;
	}
	if ($crash eq 'shard')
	{
		my $pid = $node->safe_psql('postgres', 'SELECT pid FROM event_store.stat_shards WHERE shard = ' . int(rand(2)));

		# a worker that dies by a signal takes the server through a crash restart
		my $offset = -s $node->logfile;
		kill('KILL', $pid);
		eval { $_->{psql}->quit } for @sessions;
		# a first answer may come before the postmaster has noticed
		$node->wait_for_log(qr/all server processes terminated; reinitializing/, $offset);
		$node->poll_query_until('postgres', 'SELECT true') or die;
		connect_all();
	}
	elsif ($crash eq 'server')
	{
		$node->stop('immediate');
		eval { $_->{psql}->quit } for @sessions;
		$node->start;
		connect_all();
	}
	check("after $crash");
}
eval { $_->{psql}->quit } for @sessions;
is($bad, 0, 'random transactions');
cmp_ok($seen{$_}, '>', 0, "some were $_: $seen{$_}") for sort keys %seen;
$node->safe_psql('postgres', 'SELECT event_store.flush()');
is($node->safe_psql('postgres', 'SELECT * FROM wrong()'), '', 'flushed');
$node->restart;
is($node->safe_psql('postgres', 'SELECT * FROM wrong()'), '', 'restarted');
is($node->safe_psql('postgres', 'SELECT count(*) FROM event_store.verify()'), '0', 'no damage');
$node->stop;
done_testing();
