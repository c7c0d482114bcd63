# Versions count 1, 2, 3 … in the order of positions, and each table holds what a heap table written by the same transactions
# holds, whatever comes between: loads that spill, savepoints, loads sent again, restores, rewrites, and the end of shards and
# of the server at any moment.
#
# ES_VERSIONS_SECONDS: how long (default 45; test/long/versions.pl: longer). ES_SEED: seed of the random numbers, as printed.

use strict;
use warnings;
use EventStore::Clients;
use EventStore::Crashes;
use EventStore::Server qw(new_server kill_all crash_restart wait_open set_conf seed sql try_sql);
use Test::More;
use Time::HiRes qw(sleep time);

seed();
my $seconds = $ENV{ES_VERSIONS_SECONDS} || 45;
my @memtables = ('1MB', '4MB', '64MB');

sub any { return $_[ int(rand(@_)) ]; }

my $node = new_server('versions', 'event_store.shards = 2', 'event_store.memtable_size = ' . any(@memtables),
	'event_store.spill_after = 64kB', 'event_store.wal_file_size = 1MB', 'event_store.memtable_age = ' . any('1s', '60s'),
	'max_wal_size = 256MB', 'fsync = off', 'jit = off', 'autovacuum_naptime = 1s');
sql($node, <<'SQL');
CREATE TABLE ev_text (context_id text, position bigint, version bigint, event_id uuid, n bigint, v text, x int DEFAULT 1) USING event_store;
CREATE TABLE ev_int (position bigint, context_id int, version bigint, event_id uuid, n bigint, v text, x int DEFAULT 1) USING event_store;
-- context, event id, number, number of the load, the version that append() has returned
CREATE TABLE twin_text (c text, e uuid, n bigint, load bigint, version bigint);
CREATE TABLE twin_int (LIKE twin_text);
CREATE TABLE twin_events (LIKE twin_text);
CREATE SEQUENCE ns CACHE 50;
CREATE VIEW all_text AS SELECT context_id, position, version, event_id, n, v FROM ev_text;
CREATE VIEW all_int AS SELECT context_id::text, position, version, event_id, n, v FROM ev_int;
CREATE VIEW all_events AS SELECT context_id, position, version, event_id, (payload->>'n')::bigint AS n, payload->>'v' AS v FROM event_store.events;
CREATE FUNCTION content(n bigint) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT repeat(md5(n::text), 1 + (n % 8)::int) $$;
-- waits until what was sent has gone to pending segments, but not for ever: less than 64 kB stays where it is
CREATE FUNCTION spilled(tenths int) RETURNS void LANGUAGE plpgsql AS $$
	BEGIN
		FOR i IN 1 .. tenths LOOP
			EXIT WHEN (SELECT sum(staged_rows) = 0 FROM event_store.stat_shards);
			PERFORM pg_sleep(0.03);
		END LOOP;
	END $$;
-- what is wrong in one snapshot; `quiet`: nobody writes
CREATE FUNCTION wrong(name text, store regclass, quiet boolean) RETURNS SETOF text LANGUAGE plpgsql AS $$
	DECLARE found text; other text; context text; last bigint; a bigint[]; b bigint[];
	BEGIN
		EXECUTE format('CREATE TEMP TABLE rows_now ON COMMIT DROP AS SELECT *, row_number() OVER (PARTITION BY context_id ORDER BY position) AS r FROM all_%s', name);
		ANALYZE rows_now;
		EXECUTE format('SELECT string_agg(t::text, '' '') FROM (SELECT event_id, context_id, n FROM rows_now EXCEPT ALL SELECT e, c, n FROM twin_%s LIMIT 5) t', name) INTO found;
		IF found IS NOT NULL THEN RETURN NEXT 'stored, but not in the twin: ' || found; END IF;
		EXECUTE format('SELECT string_agg(t::text, '' '') FROM (SELECT e, c, n FROM twin_%s EXCEPT ALL SELECT event_id, context_id, n FROM rows_now LIMIT 5) t', name) INTO found;
		IF found IS NOT NULL THEN RETURN NEXT 'lost: ' || found; END IF;
		SELECT string_agg(t::text, ' ') INTO found FROM (SELECT context_id, position, version, r, n FROM rows_now WHERE version IS DISTINCT FROM r ORDER BY position LIMIT 5) t;
		IF found IS NOT NULL THEN RETURN NEXT 'versions (context, position, version, rank, n): ' || found; END IF;
		EXECUTE format('SELECT string_agg(t::text, '' '') FROM (SELECT w.c, w.n, w.version, r.version FROM twin_%s w JOIN rows_now r ON r.n = w.n WHERE w.version <> r.version LIMIT 5) t', name) INTO found;
		IF found IS NOT NULL THEN RETURN NEXT 'not the version that append() told: ' || found; END IF;
		SELECT string_agg(t::text, ' ') INTO found FROM (SELECT n, v FROM rows_now WHERE v IS DISTINCT FROM content(n) LIMIT 2) t;
		IF found IS NOT NULL THEN RETURN NEXT 'content: ' || found; END IF;
		SELECT string_agg(t::text, ' ') INTO found FROM (SELECT position, count(*) FROM rows_now GROUP BY 1 HAVING count(*) > 1 OR position IS NULL LIMIT 5) t;
		IF found IS NOT NULL THEN RETURN NEXT 'positions: ' || found; END IF;
		FOR context IN SELECT context_id FROM (SELECT DISTINCT context_id FROM rows_now) t ORDER BY random() LIMIT 4 LOOP
			SELECT string_agg(version || '@' || position, ',') INTO found FROM event_store.replay(context, store => store);
			SELECT string_agg(version || '@' || position, ',' ORDER BY position) INTO other FROM rows_now WHERE context_id = context;
			IF found IS DISTINCT FROM other THEN RETURN NEXT format('replay of %s: %s is not %s', context, left(found, 1000), left(other, 1000)); END IF;
			SELECT max(r) / 2 INTO last FROM rows_now WHERE context_id = context;
			SELECT string_agg(version || '@' || position, ',') INTO found FROM event_store.replay(context, from_version => last, max_count => 5, store => store);
			SELECT string_agg(version || '@' || position, ',' ORDER BY position) INTO other FROM rows_now WHERE context_id = context AND version >= last AND version < greatest(last, 1) + 5;
			IF found IS DISTINCT FROM other THEN RETURN NEXT format('replay of %s from %s: %s is not %s', context, last, found, other); END IF;
		END LOOP;
		SELECT coalesce(array_agg(position), '{}') INTO a FROM event_store.read_all(store => store);
		last := CASE WHEN quiet THEN (SELECT max(position) FROM rows_now) ELSE a[array_length(a, 1)] END;
		SELECT coalesce(array_agg(position ORDER BY position), '{}') INTO b FROM rows_now WHERE position <= last;
		IF a <> b THEN RETURN NEXT format('read_all() gives %s rows of %s, or in another order', array_length(a, 1), array_length(b, 1)); END IF;
		IF quiet AND event_store.horizon(store) <= last THEN RETURN NEXT 'the horizon is behind the last event'; END IF;
		DROP TABLE rows_now;
	END $$;
SQL

# how each table is written from rows (c, e, n)
my %stores = (
	text => { table => 'ev_text', context => q{'c' || %s}, columns => 'context_id, event_id, n, v', values => 'c, e, n, content(n)' },
	int => { table => 'ev_int', context => '%s', columns => 'context_id, event_id, n, v', values => 'c::int, e, n, content(n)' },
	events => {
		table => 'event_store.events', context => q{'c' || %s}, columns => 'context_id, event_id, recorded_at, event_type, payload',
		values => q{c, e, to_timestamp(n), 't', jsonb_build_object('n', n, 'v', content(n))}
	});
my @names = sort keys %stores;
my $loads = 0;
my %counts;

sub context { return sprintf($stores{ $_[0] }{context}, "($_[1])"); }

# k rows in some of so many contexts
sub put
{
	my ($name, $k, $contexts) = @_;
	my $s = $stores{$name};
	my $c = context($name, int(rand(1_000_000)) . " + g * 7919) % ($contexts");

	$loads++;
	return "WITH x AS MATERIALIZED (SELECT ($c)::text AS c, gen_random_uuid() AS e, nextval('ns') AS n FROM generate_series(1, $k) g), "
	  . "w AS (INSERT INTO twin_$name SELECT c, e, n, $loads FROM x) INSERT INTO $s->{table} ($s->{columns}) SELECT $s->{values} FROM x;";
}

# a load sent again, the last one or any: none of its rows is stored
sub again
{
	my ($name) = @_;
	my $s = $stores{$name};
	my $which = rand() < 0.5 ? 'max(load)' : "(array_agg(load ORDER BY load))[1 + floor(random() * count(*))::int]";

	return "INSERT INTO $s->{table} ($s->{columns}) SELECT $s->{values} FROM twin_$name WHERE load = (SELECT $which FROM twin_$name WHERE load > 0);";
}

# append(), with the version that is expected or any
sub append_one
{
	my $c = 'c' . int(rand(any(3, 40)));
	my $version = "(SELECT coalesce(max(version), 0) FROM event_store.events WHERE context_id = '$c')";
	my $right = rand() < 0.5 ? ", expected_version => $version" : '';

	return "WITH x AS MATERIALIZED (SELECT nextval('ns') AS n, gen_random_uuid() AS e), a AS MATERIALIZED (SELECT n, e, (event_store.append('$c', 't', "
	  . "jsonb_build_object('n', n, 'v', content(n)), event_id => e$right)).* FROM x) INSERT INTO twin_events SELECT '$c', e, n, 0, version FROM a;";
}

# In a transaction of its own: behind many rows the check is made at COMMIT.
sub refused_unit
{
	my $c = 'c' . int(rand(40));

	return { kind => 'refused', sql => "DO \$\$ BEGIN PERFORM event_store.append('$c', 't', '{}', expected_version => (SELECT coalesce(max(version), 0) + 100000 "
		  . "FROM event_store.events WHERE context_id = '$c')); RAISE EXCEPTION 'WRONG: an expected version that is not there was taken'; "
		  . "EXCEPTION WHEN unique_violation THEN NULL; END \$\$;" };
}

# what sends the rows so far
sub send_rows { return "SELECT count(*) FROM $stores{$_[0]}{table} WHERE context_id = ($stores{$_[0]}{none});"; }
$stores{$_}{none} = $_ eq 'int' ? '-1' : q{'none'} foreach @names;

sub write_unit
{
	my $big = rand() < 0.4;
	my @sql = 'BEGIN;';

	foreach (1 .. 1 + int(rand(4)))
	{
		my $name = any(@names);
		my $r = rand();
		my $put = $r < 0.12 ? append_one() : $r < 0.2 ? again($name) : put($name, $big ? any(1, 3, 50, 1500, 3000) : any(1, 1, 2, 5), any(3, 40, 40, 1000));

		if (rand() < 0.3)
		{
			push @sql, 'SAVEPOINT s;', $put;
			push @sql, send_rows($name) if rand() < 0.5;
			push @sql, any('ROLLBACK TO s;', 'RELEASE s;');
		}
		else { push @sql, $put; }
		push @sql, map { send_rows($_) } @names if rand() < 0.4;
		push @sql, 'SELECT spilled(' . any(5, 15) . ');' if $big && rand() < 0.5;
	}
	push @sql, any(('COMMIT;') x 6, 'ROLLBACK;');
	return { kind => $big ? 'load' : 'small', sql => join("\n", @sql) };
}

# Small transactions around a load into the same contexts, all rows of which in one shard lie in pending segments, so that its
# FINISH does not ask for a flush: what follows meets their versions in own WAL only.
sub around_unit
{
	my $name = any(@names);
	my $contexts = any(3, 40, 40);
	my $load = put($name, 400, $contexts);
	my $send = send_rows($name) =~ s/^SELECT/PERFORM/r;
	my $sql = join("\n", map { put($name, 20, $contexts) } 1 .. any(1, 2));

	$sql .= "DO \$\$ BEGIN FOR i IN 1 .. 30 LOOP $load $send FOR j IN 1 .. 5 LOOP "
	  . 'IF EXISTS (SELECT FROM event_store.stat_shards WHERE pending_segments > 0 AND staged_rows = 0) THEN RETURN; END IF; '
	  . "PERFORM pg_sleep(0.02); END LOOP; END LOOP; END \$\$;\n";
	$sql .= join("\n", map { put($name, any(5, 40), $contexts) } 1 .. any(1, 3));
	return { kind => 'around', sql => $sql };
}

# Whole tables: they wait for all writers.
sub table_unit
{
	my $name = any(@names);
	my $table = $stores{$name}{table};
	my $r = rand();

	return { kind => 'rewrite', sql => $name ne 'events' && rand() < 0.7 ? "ALTER TABLE $table ALTER x TYPE " . any('int', 'bigint', 'numeric') . ';' : "VACUUM FULL $table;" } if $r < 0.3;
	if ($r < 0.45)
	{
		return { kind => 'truncate',
			sql => "BEGIN; TRUNCATE $table, twin_$name;" . put($name, any(5, 1500), 40) . any('COMMIT;', 'COMMIT;', 'ROLLBACK;') };
	}
	return restore_unit();
}

# Given positions and versions in any order, then new rows of the same contexts.
sub restore_unit
{
	my $name = any(@names);
	my $table = $stores{$name}{table};
	my @sql = ('BEGIN;', "LOCK TABLE $table IN ACCESS EXCLUSIVE MODE;", "CREATE TEMP TABLE kept ON COMMIT DROP AS SELECT * FROM $table;");
	push @sql, 'SAVEPOINT s;' if rand() < 0.3;
	push @sql, "TRUNCATE $table;", "INSERT INTO $table SELECT * FROM kept ORDER BY " . any('position', 'position DESC', 'random()') . ';';
	push @sql, send_rows($name), 'SELECT spilled(20);' if rand() < 0.8;
	push @sql, any('ROLLBACK TO s;', 'RELEASE s;') if @sql > 3 && $sql[3] eq 'SAVEPOINT s;';
	push @sql, put($name, any(20, 200, 1500), any(3, 40, 1000)) if rand() < 0.8;
	push @sql, any(('COMMIT;') x 6, 'ROLLBACK;');
	return { kind => 'restore', sql => join("\n", @sql) };
}

sub wrong_sql { return join("\n", map { "SELECT 'WRONG: $_: ' || w FROM wrong('$_', '$stores{$_}{table}', $_[0]) w;" } @names); }

sub unit
{
	my $r = rand();
	my @locks = map { "LOCK TABLE $stores{$_}{table} IN ACCESS SHARE MODE;" } @names;

	return write_unit() if $r < 0.77;
	return refused_unit() if $r < 0.80;
	return around_unit() if $r < 0.84;
	return table_unit() if $r < 0.91;
	# a rewritten table has nothing for older snapshots: locked first
	return { kind => 'check', sql => join("\n", 'BEGIN ISOLATION LEVEL REPEATABLE READ;', @locks, wrong_sql('false'), 'COMMIT;') } if $r < 0.94;
	return { kind => 'sync', sql => 'SELECT event_store.sync();' } if $r < 0.98;
	return { kind => 'flush', sql => 'SELECT event_store.flush();' };
}

my @problems;
my $round = 0;
my $sessions = 1;
my $clients = EventStore::Clients->new(
	node => $node, n => 3,
	settings => ["SET statement_timeout = '60s'", "SET client_min_messages = 'warning'"],
	next => sub {
		my ($c) = @_;
		# in many rounds one session is alone, and its transactions follow each other
		return if $c->{number} >= $sessions;
		return unit();
	},
	done => sub {
		my ($c, $unit) = @_;
		my @bad = grep { /WRONG|(ERROR|PANIC): +(XX|42)/ } @{ $unit->{lines} };

		$counts{ $unit->{lost} ? 'lost' : (grep { /^psql:.*ERROR/ } @{ $unit->{lines} }) ? "$unit->{kind} failed" : $unit->{kind} }++;
		push @problems, map { "round $round, $unit->{kind}: $_" } @bad;
	});

sub end_shard
{
	# it has ended then: who asks one that is about to may lose the answer
	try_sql($node, q{SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE backend_type LIKE 'event_store shard%' } . any('', 'ORDER BY random() LIMIT 1'));
	$counts{'shard ended'}++;
	return;
}

# How it is now; then the next versions follow, and a load sent again is not stored.
sub check
{
	my ($what) = @_;
	my @sql = ('BEGIN ISOLATION LEVEL REPEATABLE READ;', wrong_sql('true'), 'COMMIT;',
		q{SELECT 'WRONG: position ' || position || ' of several tables' FROM (SELECT position FROM ev_text UNION ALL SELECT position FROM ev_int UNION ALL SELECT position FROM event_store.events) p GROUP BY position HAVING count(*) > 1 LIMIT 5;});
	my $next = join("\n", map { put($_, 45, 40), again($_) } @names);

	foreach my $sql (join("\n", @sql), $next, join("\n", @sql))
	{
		my ($status, $out, $err) = try_sql($node, $sql);
		push @problems, "round $round, $what, exit status $status: $err" if $status != 0;
		push @problems, map { "round $round, $what: $_" } grep { /WRONG/ } split /\n/, $out;
		last if @problems;
	}
	return;
}

my $end = time() + $seconds;
my $log_from = EventStore::Server::log_offset($node);
while (time() < $end && !@problems)
{
	my $shard_ends = rand() < 0.15 ? time() + rand(1.5) : undef;
	my $what = $round == 0 ? 'kill -9' : any(('kill -9') x 5, ('shard ended') x 2, 'restart', 'nothing');
	# it dies under load or just behind it
	my $under_load = rand() < 0.3;

	$round++;
	$sessions = any(1, 1, 2, 3);
	$clients->run(
		seconds => 0.2 + rand(1.3),
		tick => sub {
			if (defined $shard_ends && time() > $shard_ends)
			{
				end_shard();
				$shard_ends = undef;
			}
			return 1;
		});
	unless ($under_load)
	{
		$clients->drain(seconds => 240);
		if (rand() < 0.8)
		{
			my $unit = any(\&around_unit, \&around_unit, \&restore_unit)->();
			try_sql($node, $unit->{sql});
			$counts{"$unit->{kind}, alone"}++;
		}
		try_sql($node, 'SELECT event_store.sync()') if rand() < 0.7;
		sleep 0.3 if rand() < 0.3;
	}
	$counts{$what}++;
	if ($what eq 'kill -9')
	{
		kill_all($node);
		$clients->abandon;
		set_conf($node, 'event_store.memtable_size = ' . any(@memtables), '') if rand() < 0.3;
		defined crash_restart($node) or BAIL_OUT('the shards do not open');
	}
	elsif ($what eq 'shard ended')
	{
		end_shard();
	}
	$clients->drain(seconds => 240);
	$clients->close_all;
	if ($what eq 'restart')
	{
		$node->restart;
	}
	wait_open($node) or BAIL_OUT('the shards do not open');
	check($what);
}
push @problems, EventStore::Crashes::unexplained($node->logfile, $log_from);
is(join("\n", @problems), '', "versions and rows are right after $round rounds");
cmp_ok($counts{'kill -9'} // 0, '>', 0, 'the server was killed') if $seconds >= 45;
is(sql($node, 'SELECT count(*) FROM event_store.verify()'), '0', 'no file is damaged');
diag(join(', ', map { "$_: $counts{$_}" } sort keys %counts), ', rows: ', join(' ', map { sql($node, "SELECT count(*) FROM $stores{$_}{table}") } @names));
$node->stop;
done_testing();
