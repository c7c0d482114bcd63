# A committer that is slow between its reservation and its COMMIT holds the horizon of its table, and only of that: whoever reads below
# it misses nothing that becomes visible later, also when others commit higher positions meanwhile. When it ends, by COMMIT or
# not, the horizon goes on at once.

use strict;
use warnings;
use EventStore::Server qw(new_server sql faults_compiled);
use Test::More;
use Time::HiRes qw(sleep time);

my $node = new_server('slow', 'event_store.shards = 2', q{shared_preload_libraries = 'commit_callback, event_store'});
plan skip_all => 'no fault points in this build' unless faults_compiled($node);
sql($node, <<'SQL');
CREATE TABLE v (position bigint, context_id text, n int) USING event_store;
CREATE TABLE other (position bigint, context_id text, n int) USING event_store;
INSERT INTO v (context_id, n) VALUES ('a', 0);
INSERT INTO other (context_id, n) VALUES ('a', 0);
SQL
my $n = 0;

sub rows { return sql($node, q{SELECT coalesce(string_agg(n::text, ',' ORDER BY position), '') FROM v}); }
sub readable { return sql($node, q{SELECT coalesce(string_agg(payload->>'n', ','), '') FROM event_store.read_all(store => 'v')}); }
sub below { return sql($node, q{SELECT coalesce(string_agg(n::text, ',' ORDER BY position), '') FROM v WHERE position < event_store.horizon('v')}); }

my $all = '0';

foreach my $point (qw(reserve-after-publish reserve-after-take commit-after-reserve commit-after-log commit-after-send commit-after-commit horizon-before-push horizon-after-push))
{
	foreach my $end ('commits', 'fails')
	{
		my $committed = $point =~ /^commit-after-commit|^horizon/;
		next if $end ne 'commits' && $committed;

		my $s = $node->background_psql('postgres', on_error_stop => 0);
		$s->query_safe('SELECT count(*) FROM v');
		# another library's callback behind ours
		my $fails = $end eq 'commits' ? '' : q{SET LOCAL commit_callback.statement = 'SELECT 1 / 0';};
		my $slow = ++$n;
		my $quick = ++$n;
		my $name = "$point, $end";

		sql($node, "SELECT event_store_test.inject_fault('$point', 'sleep')");
		$s->query_until(qr/go/, "\\echo go\nBEGIN; $fails INSERT INTO v (context_id, n) VALUES ('slow', $slow); COMMIT;\n\\echo done\n");
		ok($node->poll_query_until('postgres', "SELECT event_store_test.fault_hits('$point') > 0"), "$name: a committer sleeps");

		# others commit; those of the same table are visible, but nobody passes the slow one
		my $begin = time();
		sql($node, "INSERT INTO v (context_id, n) VALUES ('quick', $quick); INSERT INTO other (context_id, n) VALUES ('quick', $quick)");
		cmp_ok(time() - $begin, '<', 60, "$name: others commit meanwhile");
		my $visible = rows();
		my $readable = readable();
		my $below = below();
		like($visible, qr/\b$quick$/, "$name: what they wrote is visible");
		# read_all takes its horizon before its snapshot, so it may know less
		is(index($below, $readable), 0, "$name: read_all gives nothing that is not below the horizon");
		# what is below the horizon now is a beginning of what there will be
		if ($point ne 'reserve-after-publish')
		{
			# visible to whom looks: then the horizon may pass it
			if ($visible =~ /\b$slow\b/) { is($below, "$all,$slow,$quick", "$name: committed, all is below"); }
			else { is("$readable $below", "$all $all", "$name: nothing behind the slow one is below the horizon"); }
		}
		is(sql($node, q{SELECT event_store.horizon('other') > max(position) FROM other}), 't', "$name: another table's horizon does not wait");

		sql($node, 'SELECT event_store_test.disarm_faults()');
		$s->query_until(qr/done/, '');
		eval { $s->quit };
		my $now = rows();
		$all = $now;
		like($now, $end eq 'commits' ? qr/\b$slow\b/ : qr/^(?!.*\b$slow\b)/, "$name: it is " . ($end eq 'commits' ? '' : 'not ') . 'there');
		ok($node->poll_query_until('postgres', q{SELECT event_store.horizon('v') > max(position) FROM v}), "$name: the horizon goes on");
		is(readable(), $now, "$name: all can be read");
		is(index($now, $below), 0, "$name: nothing came below what had been the horizon");
	}
}
$node->stop;
done_testing();
