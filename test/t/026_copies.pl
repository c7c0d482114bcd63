# Whatever is a copy of one moment opens; whatever is not (a base backup of a running server, a promoted standby, a
# recovery from an archive, an older copy of the store or of one shard beside a newer cluster) is refused with a hint
# rather than opened with events missing.

use strict;
use warnings;
use File::Copy qw(copy);
use File::Path qw(remove_tree);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::RecursiveCopy;
use PostgreSQL::Test::Utils;
use Test::More;

my $conf = <<CONF;
shared_preload_libraries = 'event_store'
wal_level = replica
max_wal_senders = 4
max_worker_processes = 16
event_store.shards = 2
event_store.startup_timeout = '120s'
CONF

my $node = PostgreSQL::Test::Cluster->new('primary');
$node->init(allows_streaming => 1, has_archiving => 1);
$node->append_conf('postgresql.conf', $conf);
$node->start;
$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION event_store;
CREATE TABLE t (context_id text, position bigint, x int) USING event_store;
SQL

my $rows = 0;

sub insert_rows
{
	$node->safe_psql('postgres', "INSERT INTO t SELECT 'c' || g % 100, NULL, 1 FROM generate_series(1, 100) g");
	$rows += 100;
	return;
}

sub ask
{
	my ($on, $query) = @_;
	my ($status, $out, $err) = $on->psql('postgres', $query // 'SELECT count(*), sum(x), count(DISTINCT position) FROM t',
		extra_params => [ '-v', 'VERBOSITY=verbose' ]);

	return $out if $status == 0;
	$err =~ s/\s+/ /g;
	return $err;
}

my $missing = qr/55000: replication slot "event_store" is missing, but shard \d was not stopped cleanly.*promoted standby/;

# ---- a base backup of a running server

insert_rows();
$node->backup('running');
insert_rows();

my $restored = PostgreSQL::Test::Cluster->new('restored');
$restored->init_from_backup($node, 'running');
$restored->start;
like(ask($restored), $missing, 'restored base backup: refused');
like(ask($restored, 'SELECT 1'), qr/^1$/, 'the rest of the cluster works');
$restored->stop;

my $pitr = PostgreSQL::Test::Cluster->new('pitr');
$pitr->init_from_backup($node, 'running', has_restoring => 1, standby => 0);
$node->safe_psql('postgres', 'SELECT pg_switch_wal()');
$pitr->start;
ok($pitr->poll_query_until('postgres', 'SELECT NOT pg_is_in_recovery()'), 'recovered from the archive');
like(ask($pitr), qr/$missing|55000: the event store was written on timeline 1/, 'recovered from the archive: refused');
$pitr->stop;

# ---- a standby

my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($node, 'running', has_streaming => 1);
$standby->start;
insert_rows();
$node->wait_for_catchup($standby);
like(ask($standby), qr/57P03: event tables are not available while the server is a standby/, 'standby: says so');
is(ask($standby, 'SELECT DISTINCT state, reason FROM event_store.stat_shards'),
	'absent|event tables are not available while the server is a standby or recovers', 'stat_shards as well');
like(ask($standby, 'EXPLAIN SELECT count(*) FROM t WHERE x = 1'), qr/^Aggregate.*\n.*Seq Scan on t /, 'but a query can be explained');
like(ask($standby, 'EXPLAIN (ANALYZE) SELECT * FROM t'), qr/57P03: event tables are not available while the server is a standby/, 'unless that runs it');
$standby->promote;
like(ask($standby), qr/$missing|55000: the event store was written on timeline 1/, 'promoted standby: refused');
$standby->stop;

# ---- copies of one moment

$node->stop('immediate');
$node->backup_fs_cold('crashed');
my $crashed = PostgreSQL::Test::Cluster->new('crashed');
$crashed->init_from_backup($node, 'crashed');
$crashed->start;
is(ask($crashed), "$rows|$rows|$rows", 'a snapshot of a crashed server opens');
$crashed->stop;

$node->start;
insert_rows();
$node->stop;
$node->backup_fs_cold('clean');
my $clean = PostgreSQL::Test::Cluster->new('clean');
$clean->init_from_backup($node, 'clean');
$clean->start;
is(ask($clean), "$rows|$rows|$rows", 'a copy of a server that was stopped cleanly opens');
$clean->stop;

# the same copy becomes a standby that sees later events only in PostgreSQL's WAL
my $late = PostgreSQL::Test::Cluster->new('late');
$late->init_from_backup($node, 'clean', has_streaming => 1);
$node->start;
$late->start;
insert_rows();
$node->wait_for_catchup($late);
$late->promote;
my $sysid = $node->safe_psql('postgres', 'SELECT system_identifier FROM pg_control_system()');
like(ask($late), qr/55000: the event store was written on timeline 1, but the cluster is on timeline 2.*adopt_system_id = '$sysid'/,
	'clean copy, then a standby, promoted: refused');
$late->stop;

# ---- detach

is(ask($node, 'SELECT event_store.detach()'), '', 'detach');
is(ask($node, "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'event_store'"), '0', 'the slot is gone');
like(ask($node), qr/55000: the event store is detached.*HINT: Restart the server/, 'statements are told');
$node->restart;
is(ask($node), "$rows|$rows|$rows", 'after a restart it is in use again');
ok($node->poll_query_until('postgres', "SELECT count(*) = 1 FROM pg_replication_slots WHERE slot_name = 'event_store' AND active"), 'with its slot');
insert_rows();
$node->stop('immediate');
$node->start;
is(ask($node), "$rows|$rows|$rows", 'and recovers as before');
$node->stop;

# ---- an older copy of the store alone, of a clean stop

my $dir = $node->data_dir . '/event_store';
my $note = "$dir.opened";
my $older = qr/55000: the files of shard \d are older than those it had last DETAIL: They are of a clean stop at \w+\/\w+, but .*opened again at \w+\/\w+\. HINT: .*put the newer directory back.*release_wal/;

sub put { my ($from, $to) = @_; remove_tree($to); PostgreSQL::Test::RecursiveCopy::copypath($from, $to); return; }
sub opens { my ($name) = @_; $node->start; is(ask($node), "$rows|$rows|$rows", $name); return; }

put($dir, "$dir.old");
my $old_rows = $rows;
$node->start;
insert_rows();
$node->stop;
put($dir, "$dir.new");
put("$dir.old", $dir);
$node->start;
like(ask($node), $older, 'an older copy of the store: refused');
$node->restart;
like(ask($node), $older, 'again at the next start');
$node->stop('immediate');
put("$dir.new", $dir);
opens('the newer one put back: opens');

# the slot may not have moved since the copy was made
insert_rows();
$node->stop('immediate');
put($dir, "$dir.crashed");
put("$dir.new", $dir);
$node->start;
like(ask($node), $older, 'beside a cluster that has crashed: refused');
$node->stop('immediate');
put("$dir.crashed", $dir);
opens('the files of the crash put back: opens');

$node->stop;
put($dir, "$dir.new");
put("$dir.old/shard_1", "$dir/shard_1");
$node->start;
like(ask($node), $older, 'older files of one shard: refused');
is(ask($node, "SELECT state || coalesce(' ' || (reason ~ 'older than those')::text, '') FROM event_store.stat_shards ORDER BY shard"),
	"open\nfailed true", 'by that shard alone');
$node->stop;
put("$dir.new/shard_1", "$dir/shard_1");
opens('its newer files put back: opens');

# ---- nothing is older about these

# a shard that was stopped cleanly and does not open for long: the slot moves on without it
my $elsewhere = ask($node, q{SELECT 'z' || g FROM generate_series(1, 100) g WHERE event_store.shard_of('z' || g, 't') = 0 LIMIT 1});
$node->stop;
rename("$dir/shard_1/manifest", "$dir.manifest") or die "rename: $!";
$node->start;
is(ask($node, "INSERT INTO t SELECT '$elsewhere', NULL, 1 FROM generate_series(1, 100)"),
	'', 'the other shard takes events');
$rows += 100;
my $moved = 'SELECT restart_lsn > (SELECT restart_lsn FROM event_store.stat_shards WHERE shard = 1) FROM pg_replication_slots';
$node->safe_psql('postgres', 'SELECT pg_switch_wal()');
ok($node->poll_query_until('postgres', "$moved WHERE slot_name = 'event_store'"), 'and the slot moves past one that is clean');
$node->safe_psql('postgres', 'CHECKPOINT');
$node->stop('immediate');
rename("$dir.manifest", "$dir/shard_1/manifest") or die "rename: $!";
opens('which opens when it can again');

# the slot is made behind the clean stop, and the server crashes before anything else
$node->stop;
remove_tree($node->data_dir . '/pg_replslot/event_store');
rename("$dir/shard_$_/manifest", "$dir.manifest.$_") or die "rename: $!" for 0, 1;
$node->start;
$node->poll_query_until('postgres', "SELECT count(*) = 2 FROM event_store.stat_shards WHERE state = 'failed'");
$node->safe_psql('postgres', 'CHECKPOINT');
$node->stop('immediate');
rename("$dir.manifest.$_", "$dir/shard_$_/manifest") or die "rename: $!" for 0, 1;
opens('a slot made anew, and a crash before the shards open');

# the library was not there for a while
$node->stop;
$node->append_conf('postgresql.conf', "shared_preload_libraries = ''");
$node->start;
$node->safe_psql('postgres', "SELECT pg_switch_wal(); CHECKPOINT; SELECT pg_replication_slot_advance('event_store', pg_current_wal_lsn())");
$node->stop;
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'event_store'");
opens('a slot that somebody has moved while the library was not loaded');

# the note itself
$node->stop;
open(my $f, '+<:raw', $note) or die "$note: $!";
seek($f, 4096 + 50, 0);
print $f 'xxxx';
close($f);
my $log = -s $node->logfile;
opens('a note that is damaged');
like(slurp_file($node->logfile, $log), qr/"event_store.opened" does not tell whether the files of shard 1 are/, 'is told of in the log');
$node->stop;
unlink($note);
opens('a note that is missing');
ok(-e $note, 'comes again');
$node->stop;

# a whole data directory that is older, put over one that held a newer note
my $whole = PostgreSQL::Test::Cluster->new('whole');
$whole->init_from_backup($node, 'clean');
copy($note, $whole->data_dir . '/event_store.opened') or die "copy: $!";
$whole->start;
like(ask($whole), qr/^(\d+)\|\1\|\1$/, 'a whole data directory that is older: opens');
$whole->stop;

# ---- the older one is wanted

put("$dir.old", $dir);
$node->start;
like(ask($node), $older, 'the older copy once more');
is(ask($node, 'SELECT event_store.release_wal(0), event_store.release_wal(1)'), '|', 'release_wal');
ok($node->poll_query_until('postgres', 'SELECT count(*) = 2 FROM event_store.stat_shards WHERE state = \'open\''), 'the shards open then');
is(ask($node), "$old_rows|$old_rows|$old_rows", 'with what they had');
is(ask($node, "INSERT INTO t VALUES ('new', NULL, 1); SELECT position > 1::bigint << 40 FROM t WHERE context_id = 'new'"), 't', 'and no position is given again');
$rows = $old_rows + 1;
$node->stop;
opens('it is this cluster\'s from then on');

# ---- given up, as README says, and made anew

$node->safe_psql('postgres', 'SELECT event_store.detach(); DROP TABLE t; DROP EXTENSION event_store');
$node->stop;
remove_tree($dir);
$node->start;
$node->safe_psql('postgres', 'CREATE EXTENSION event_store; CREATE TABLE t (context_id text, position bigint, x int) USING event_store');
$rows = 0;
insert_rows();
$node->stop('immediate');
opens('a new store in the place of one that was given up');
$node->stop;

done_testing();
