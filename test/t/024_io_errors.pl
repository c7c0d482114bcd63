# A full disk or a failing device costs no event: what could not be written is written again at the same place,
# the reason is told, and all resumes by itself. A failed sync is never asked again.

use strict;
use warnings;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = PostgreSQL::Test::Cluster->new('errors');
$node->init;
$node->append_conf('postgresql.conf', <<CONF);
shared_preload_libraries = 'event_store'
wal_level = replica
fsync = on
max_worker_processes = 16
restart_after_crash = on
event_store.shards = 1
event_store.wal_file_size = '1MB'
event_store.memtable_size = '2MB'
event_store.startup_timeout = '120s'
CONF
$node->append_conf('postgresql.conf', "event_store.io_method = '$ENV{ES_IO_METHOD}'") if $ENV{ES_IO_METHOD};
$node->start;
$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION event_store;
CREATE SCHEMA event_store_test;
CREATE EXTENSION event_store_test;
SQL
if ($node->safe_psql('postgres', 'SELECT event_store_test.fault_points_compiled()') ne 't')
{
	plan skip_all => 'built without fault points';
}
$node->safe_psql('postgres', 'CREATE TABLE t (context_id text, position bigint, x int, filler text) USING event_store');

my $rows = 0;

# Returns 1 if it committed.
sub insert_rows
{
	my ($n) = @_;
	my ($status) = $node->psql('postgres',
		"SET statement_timeout = '30s'; INSERT INTO t SELECT 'c' || g % 100, NULL, 1, md5(random()::text) FROM generate_series(1, $n) g");

	$rows += $n if $status == 0;
	return $status == 0;
}

sub ask
{
	my ($status, $out, $err) = $node->psql('postgres',
		"SET statement_timeout = '120s'; SELECT count(*), sum(x), count(DISTINCT position) FROM t");

	return $status == 0 ? $out : $err;
}

sub is_complete { is(ask(), "$rows|$rows|$rows", $_[0]); return; }

sub crash
{
	$node->stop('immediate');
	$node->start;
	is_complete($_[0]);
	return;
}

sub inject { $node->safe_psql('postgres', "SELECT event_store_test.inject_fault('$_[0]', '$_[1]')"); return; }
sub disarm { $node->safe_psql('postgres', 'SELECT event_store_test.disarm_faults()'); return; }

sub hits { return $node->safe_psql('postgres', "SELECT event_store_test.fault_hits('$_[0]')"); }

# Waits until the armed point was passed, with something for the shard to do meanwhile.
sub is_hit
{
	my ($point, $test) = @_;
	for (1 .. 40)
	{
		last if hits($point) > 0;
		insert_rows(3000);
		try_sql("SET statement_timeout = '500ms'; SELECT event_store.flush()") if hits($point) == 0;
	}
	cmp_ok(hits($point), '>', 0, $test);
	return;
}

# A fault that fires is told to the log, once by each process.
sub has_fired
{
	my ($offset, $point, $error, $test) = @_;
	like(slurp_file($node->logfile, $offset), qr/^fault point \Q$point\E: $error in process/m, $test);
	return;
}

ok(insert_rows(1000), 'a table with rows');

# psql that may find no server, or lose it: the harness's own functions do not survive that.
sub try_sql
{
	my ($sql) = @_;

	my $out = `psql -XAtq -d "@{[$node->connstr('postgres')]}" -c "$sql" 2>&1`;
	chomp($out);
	return $out;
}

# ---- writes

for my $point ('wal-write', 'control-write', 'manifest-write', 'wal-prepare-write', 'wal-prepare-sync', 'directory-sync')
{
	for my $error ('enospc', 'eio')
	{
		my $name   = "$point $error";
		my $offset = -s $node->logfile;

		# once
		inject($point, $error);
		insert_rows(3000);
		is_complete("$name: once");
		$node->safe_psql('postgres', 'SELECT event_store.sync(), event_store.flush()');
		is_complete("$name: durable after all");

		# for a while; writers may be refused meanwhile, readers never are
		inject($point, "$error always");
		# files of the log that nobody needs any more would be taken instead of new ones
		inject('job-after-take', 'sleep') if $point =~ /prepare|directory/;
		insert_rows(20000) for 1 .. 3;
		is_complete("$name: what was committed can be read");
		is_hit($point, "$name: it has happened");
		disarm();
		insert_rows(100);
		my $took = time();
		$node->safe_psql('postgres', 'SELECT event_store.sync(), event_store.flush()');
		cmp_ok(time() - $took, '<', 60, "$name: resumes by itself");
		ok(insert_rows(1000), "$name: takes writes again");

		# and a crash while nothing can be written
		inject($point, "$error always");
		insert_rows(20000);
		is_hit($point, "$name: again") if $point !~ /prepare|directory/;
		crash("$name: crash meanwhile");
		has_fired($offset, $point, $error, "$name: it was told");
		if ($point =~ /^(wal|control|manifest)-write$/)
		{
			my $says = $error eq 'enospc' ? 'No space left on device' : 'Input/output error';
			like(substr(slurp_file($node->logfile), $offset), qr/could not write file "event_store\/shard_0\/\S+": $says/,
				"$name: said in the log");
		}
	}
}

# ---- files that are made at start

for my $point ('file-write', 'file-sync')
{
	for my $error ('enospc', 'eio')
	{
		# the first of them, and one of the next
		for my $nth (1, 2)
		{
			my $name = "$point $error at start ($nth)";
			my $offset = -s $node->logfile;

			insert_rows(500);
			$node->stop('immediate');
			{
				local $ENV{ES_FAULTS} = "$point:$error:$nth";
				$node->start;
			}
			for (1 .. 1200)
			{
				last if slurp_file($node->logfile, $offset) =~ /^fault point /m;
				select(undef, undef, undef, 0.1);
			}
			has_fired($offset, $point, $error, "$name: it has happened");
			# the file is thrown away and made anew, also when it was its sync that failed
			# a shard tries again every ten seconds, and when settings are read
			for (1 .. 240)
			{
				last if ask() !~ /ERROR/;
				$node->reload;
				select(undef, undef, undef, 0.5);
			}
			is_complete("$name: nothing is missing");
			ok(insert_rows(100), "$name: takes writes");
		}
	}
}

# the postmaster has them in its environment
$node->restart;

# ---- syncs

$node->safe_psql('postgres', 'CREATE TABLE other (context_id text) USING event_store');
for my $point ('wal-sync', 'control-sync', 'manifest-sync')
{
	my $offset = -s $node->logfile;

	insert_rows(2000);
	inject($point, 'eio');
	# a sync that began by itself may have left nothing to sync
	for (1 .. 300)
	{
		try_sql(q{INSERT INTO other VALUES ('x')});
		try_sql('SELECT event_store.sync(), event_store.flush()');
		last if slurp_file($node->logfile, $offset) =~ /PANIC: .*could not fsync file/;
		select(undef, undef, undef, 0.2);
	}
	like(slurp_file($node->logfile, $offset), qr/PANIC: .*could not fsync file/, "$point: it has happened");
	for (1 .. 300)
	{
		last if try_sql('SELECT count(*) FROM t') eq $rows;
		select(undef, undef, undef, 0.2);
	}
	is_complete("$point: nothing is missing");
	ok(insert_rows(1000), "$point: and goes on");
}
crash('at the end');
$node->stop;

done_testing();
