# A disk that is full, under PostgreSQL's WAL, under the shards' files, under both, costs no event and tears none: writes are
# refused with 53100 (or PostgreSQL ends, as it does without us when its WAL has no room), reads go on, and all resumes by itself
# when there is room. The disks are real: tmpfs, mounted in a namespace of this test's own.

use strict;
use warnings;

# Once more, with mounts of its own: before the test's libraries take hold of standard output.
my $forbidden;
BEGIN
{
	if (!$ENV{ES_OWN_MOUNTS})
	{
		my @alone = qw(unshare --map-current-user --keep-caps --mount);
		$forbidden = system("@alone mount -t tmpfs -o size=1m none /tmp >/dev/null 2>&1") != 0;
		$ENV{ES_OWN_MOUNTS} = 1;
		exec(@alone, $^X, '-w', '-MEventStore::Crashes', $0) or die "unshare: $!" unless $forbidden;
	}
}

use EventStore::Clients;
use EventStore::Crashes;
use EventStore::Oracle;
use EventStore::Server qw(new_server kill_all crash_restart wait_open seed sql try_sql log_offset server_log_since);
use EventStore::Workload;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

plan skip_all => 'user namespaces, in which one may mount a tmpfs, are forbidden here' if $forbidden;
EventStore::Crashes::expect(qr/PANIC: .*No space left on device/);
seed();

my ($node, $disk, $oracle, $workload);    # $disk: where the small disk is mounted

sub disk
{
	my ($where, $size) = @_;
	mkdir($where);
	system_or_bail('mount', '-t', 'tmpfs', '-o', "size=$size,mode=0700", 'none', $where);
	return;
}

sub free_kb
{
	my ($kb) = `df -k --output=avail $disk` =~ /(\d+)\s*\z/;
	return $kb;
}

# Leaves so much room, or all that there is.
sub room
{
	my ($kb) = @_;
	my $ballast = "$disk/ballast";

	unlink($ballast);
	return unless defined $kb;
	my $n = free_kb() - $kb;
	return if $n <= 0;
	# shards write meanwhile: if there is less room than there was, what is left is taken
	system("fallocate -l ${n}k $ballast 2>/dev/null || head -c ${n}k /dev/zero > $ballast 2>/dev/null");
	-s $ballast or die 'no ballast';
	return;
}

# Takes what has become free, and gives nothing back meanwhile.
sub fill
{
	system("cat /dev/zero >> $disk/ballast 2>/dev/null");
	return;
}

my %refused;    # SQLSTATE => how often

sub load
{
	my ($seconds, $enough) = @_;
	my $crashed = 0;
	my $clients;

	%refused = ();
	$clients = EventStore::Clients->new(
		node => $node, n => 4, settings => [ q{SET event_store.enqueue_timeout = '5s'}, 'SET lock_timeout = 5000' ],
		next => sub { my $unit = $workload->unit; $oracle->begins($unit, 1); return $unit; },
		done => sub {
			my ($c, $unit) = @_;
			$oracle->ends($unit);
			foreach (@{ $unit->{lines} }) { $refused{$1}++ if /ERROR: +(\w{5}):/; }
			$refused{lost}++ if $unit->{lost};
		});
	$clients->run(seconds => $seconds, tick => sub { return !$enough || !$enough->(); });
	return $clients;
}

# Ends what is under way.
sub finish
{
	my ($clients) = @_;
	$clients->drain(seconds => 240);
	$clients->close_all;
	return;
}

sub agrees
{
	my ($name) = @_;
	is($oracle->check($node), '', "$name: the oracle agrees");
	return;
}

# Did the server end? Then what clients did not hear of may be lost, and it must be started if it could not restart.
sub server_ended
{
	my ($offset) = @_;
	return server_log_since($node, $offset) =~ /PANIC: /;
}

# Waits until it is up again, behind its last PANIC.
sub bring_up
{
	my ($offset) = @_;
	my $end = time() + 180;
	while (time() < $end)
	{
		my $pid = $node->{_pid};
		last if server_log_since($node, $offset) =~ /PANIC: (?!.*PANIC: ).*database system is ready to accept connections/s;
		# the postmaster has given up if recovery found no room
		if (!-d "/proc/$pid" || (eval { slurp_file("/proc/$pid/stat") } // ') Z ') =~ /\) Z /)
		{
			$node->{_pid} = undef;
			unlink($node->data_dir . '/postmaster.pid');
			$node->start;
		}
		sleep 0.2;
	}
	return wait_open($node);
}

foreach my $where ('event_store', 'pg_wal', 'both')
{
	$node = PostgreSQL::Test::Cluster->new("full_$where");
	$node->init(extra => [ '--wal-segsize=1' ]);
	$node->append_conf('postgresql.conf', <<'CONF');
shared_preload_libraries = 'event_store'
wal_level = replica
max_worker_processes = 16
max_connections = 40
restart_after_crash = on
fsync = on
log_line_prefix = '%m [%p] %b '
max_wal_size = 8MB
min_wal_size = 2MB
max_slot_wal_keep_size = -1
event_store.shards = 2
event_store.wal_file_size = 1MB
event_store.memtable_size = 1MB
event_store.spill_after = 256kB
CONF
	$node->append_conf('postgresql.conf', "event_store.io_method = '$ENV{ES_IO_METHOD}'") if $ENV{ES_IO_METHOD};
	my $data = $node->data_dir;
	if ($where eq 'event_store')
	{
		$disk = "$data/event_store";
		disk($disk, '64m');
	}
	else
	{
		$disk = PostgreSQL::Test::Utils::tempdir() . "/disk_$where";
		disk($disk, '96m');
		system_or_bail('mv', "$data/pg_wal", "$disk/pg_wal");
		symlink("$disk/pg_wal", "$data/pg_wal") or die "symlink: $!";
	}
	if ($where eq 'both')
	{
		mkdir($_, 0700) foreach "$disk/event_store", "$data/event_store";
		system_or_bail('mount', '--bind', "$disk/event_store", "$data/event_store");
	}
	$node->start;
	sql($node, 'CREATE EXTENSION event_store');
	EventStore::Workload::setup($node);
	sql($node, 'CREATE TABLE side (context_id text, n int) USING event_store');
	my $side = 0;
	$workload = EventStore::Workload->new(large => 600, weights => { single => 6, append_alone => 4, mixed => 8, copy_alone => 6, bulk => 3, streams => 1, rollback => 2 });
	$oracle = EventStore::Oracle->new;

	finish(load(0.5));
	agrees("$where, with room");

	# ---- full

	foreach my $round (1, 2)
	{
		my $name = "$where full, round $round";
		my $offset = log_offset($node);
		my $units = $workload->{tid};

		room(500);
		my $fat;
		my $clients = load(180, sub {
			# much of PostgreSQL's WAL at once, more than a checkpoint gives back, and once more if it was not
			if ($fat && !eval { $fat->pump_nb; $fat->pumpable })
			{
				eval { $fat->finish };
				$fat = undef;
				fill();
			}
			$fat //= IPC::Run::start([ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-c',
				"CREATE TABLE fat AS SELECT repeat(md5(g::text), 55) FROM generate_series(1, 20000) g; DROP TABLE fat" ],
				'<', \'', '>', \my $out, '2>', \my $err, IPC::Run::timeout(120)) if $where eq 'pg_wal';
			return ($refused{'53100'} // 0) >= 20 || server_ended($offset); });
		eval { $fat->finish } if $fat;
		# the server may also end later, wherever its own WAL has no room
		my $ended = server_ended($offset);
		ok($ended || ($refused{'53100'} // 0) > 0, "$name: " . join(', ', map { "$_: $refused{$_}" } sort keys %refused) . ($ended ? ', the server ended' : ''));
		ok(!$ended || $where ne 'event_store', "$name: the server goes on") if $where eq 'event_store';
		if (!$ended && $round == 1)
		{
			finish($clients);
			my $problems = $oracle->check($node);
			# a flush may have made room meanwhile
			my ($out, $err);
			my $until = time() + 180;
			do
			{
				fill() if defined $err;
				(undef, $out, $err) = try_sql($node, q{BEGIN; INSERT INTO side SELECT 'no' || g, 0 FROM generate_series(1, 20000) g; ROLLBACK; SELECT 'usable', count(*) FROM side},
					psql => { on_error_stop => 0 });
			} until $err =~ /53100/ || server_ended($offset) || time() > $until;
			$ended = server_ended($offset);
			if (!$ended || $where eq 'event_store')
			{
				is($problems, '', "$name: reads go on: the oracle agrees");
				like($err, qr/53100: shard \d cannot write its files: No space left on device.*HINT/s, "$name: a statement is refused with the reason");
				is($out, "usable|$side", "$name: and the session can be used");
			}
			room();
			$ended = server_ended($offset);
		}
		elsif (!$ended)
		{
			# everything dies while there is no room
			kill_all($node);
			$clients->abandon;
			$oracle->crashed;
			if ($where eq 'event_store')
			{
				# and comes back while there is none
				$node->start;
				sleep 2;
				room();
				ok(wait_open($node), "$name: after kill -9 the shards open by themselves when there is room");
			}
			else
			{
				room();
				ok(defined crash_restart($node), "$name: after kill -9 the shards open");
			}
		}
		if ($ended)
		{
			$clients->abandon;
			$oracle->crashed;
			room();
			ok(bring_up($offset), "$name: with room the server is there again");
		}
		# writes resume by themselves
		my $begin = time();
		my $status;
		do { ($status) = try_sql($node, q{SET event_store.enqueue_timeout = '5s'; INSERT INTO side SELECT 'c' || g, 1 FROM generate_series(1, 10) g}); }
		  until $status == 0 || time() - $begin > 120 || !sleep 0.1;
		$side += 10 if $status == 0;
		is($status, 0, sprintf("%s: writes go on after %.1f s", $name, time() - $begin));
		is(sql($node, 'SELECT count(*), sum(n) FROM side'), "$side|$side", "$name: once");
		finish(load(0.5));
		agrees("$name, and after it");
	}

	# ---- and in the end

	sql($node, 'SELECT event_store.sync(), event_store.flush()');
	kill_all($node);
	$oracle->crashed;
	ok(defined crash_restart($node), "$where: open after a crash");
	agrees("$where, at the end");
	is(sql($node, 'SELECT count(*) FROM event_store.verify()'), '0', "$where: no damage");
	$node->stop;
}
done_testing();
