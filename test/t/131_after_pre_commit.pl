# An error that comes after this store's part of COMMIT, from a serialization failure or at the last steps of PostgreSQL, aborts
# all of the transaction: no event of it is seen, nobody is held up, versions go on without a gap.

use strict;
use warnings;
use EventStore::Server qw(new_server crash_restart faults_compiled sql try_sql);
use Test::More;
use Time::HiRes qw(sleep time);

my $node = new_server('late', 'event_store.shards = 2', 'event_store.spill_after = 64kB');
sql($node, <<'SQL');
CREATE TABLE ev (position bigint, context_id text, version bigint, n int) USING event_store;
CREATE TABLE hp (n int);
CREATE TABLE parent (id int PRIMARY KEY);
CREATE TABLE child (id int REFERENCES parent DEFERRABLE INITIALLY DEFERRED);
CREATE TABLE ev_child (context_id text, version bigint, parent int REFERENCES parent DEFERRABLE INITIALLY DEFERRED) USING event_store;
CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
	INSERT INTO ev (context_id, n) VALUES ('late', NEW.n);
	IF NEW.n < 0 THEN RAISE 'deferred refusal'; END IF;
	RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER late AFTER INSERT ON hp DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION late();
SQL

my $expected = 0;    # events in ev

sub whole
{
	my ($name) = @_;
	is(sql($node, 'SELECT count(*) FROM ev'), $expected, "$name: what is there is what was committed");
	# nobody holds the horizon, the next writer gets the next version, at once
	my $begin = time();
	is( sql($node, q{INSERT INTO ev (context_id, n) VALUES ('a', 0), ('b', 0);
			SELECT event_store.horizon('ev') > max(position) FROM ev}), 't', "$name: the horizon passes all that is there");
	cmp_ok(time() - $begin, '<', 60, "$name: nobody waits");
	$expected += 2;
	is( sql($node, q{SELECT count(*) FROM (SELECT version, row_number() OVER (PARTITION BY context_id ORDER BY position) AS n FROM ev) x WHERE n <> version}),
		'0', "$name: versions have no gap");
	return;
}

# ---- deferred triggers: they run before, and write more events

sql($node, 'INSERT INTO hp VALUES (1)');
$expected += 1;
whole('events written by a deferred trigger');
my (undef, undef, $err) = try_sql($node, q{BEGIN; INSERT INTO ev (context_id, n) VALUES ('a', 1); INSERT INTO hp VALUES (2), (-1); COMMIT});
like($err, qr/deferred refusal/, 'a deferred trigger refuses');
whole('deferred trigger');
(undef, undef, $err) = try_sql($node, q{BEGIN; INSERT INTO ev (context_id, n) SELECT 'a' || g % 5, g FROM generate_series(1, 5000) g; INSERT INTO child VALUES (7); COMMIT});
like($err, qr/23503/, 'a deferred foreign key refuses');
whole('deferred foreign key');
(undef, undef, $err) = try_sql($node, q{BEGIN; INSERT INTO ev_child VALUES ('c', NULL, 8); COMMIT});
like($err, qr/23503/, 'a deferred foreign key of an event table refuses');
is(sql($node, q{BEGIN; INSERT INTO ev_child VALUES ('c', NULL, 9); INSERT INTO parent VALUES (9); COMMIT; SELECT version FROM ev_child}), '1',
	'and accepts what is right at the end');

# ---- serialization failure: PostgreSQL checks after our part

foreach my $size (1, 20000)
{
	foreach my $round (1 .. 4)
	{
		my @s = map { $node->background_psql('postgres', on_error_stop => 0) } 1, 2;
		$_->query_safe('BEGIN ISOLATION LEVEL SERIALIZABLE') foreach @s;
		$_->query_safe('SELECT count(*) FROM hp; SELECT count(*) FROM ev') foreach @s;
		$s[0]->query_safe("INSERT INTO ev (context_id, n) SELECT 'x' || g % 3, g FROM generate_series(1, $size) g");
		$s[1]->query_safe("INSERT INTO ev (context_id, n) SELECT 'y' || g % 3, g FROM generate_series(1, $size) g");
		my @errors;
		foreach my $s (@s)
		{
			$s->query('COMMIT');
			push @errors, $s->{stderr} =~ /ERROR:\s+could not serialize/ ? 1 : 0;
			$s->{stderr} = '';
		}
		is($errors[0] + $errors[1], 1, "write skew over $size rows: one of two fails");
		$expected += $size;
		$_->quit foreach @s;
	}
	whole("serialization failure, $size rows");
}

# ---- NOTIFY in the same transaction, LISTEN and its lock

sql($node, q{BEGIN; INSERT INTO ev (context_id, n) VALUES ('n', 1); NOTIFY channel, 'text'; COMMIT});
$expected += 1;
whole('NOTIFY');

# ---- an error at each step between our FINISH and the end of PRE_COMMIT, and FATAL

SKIP:
{
	skip 'no fault points in this build', 1 unless faults_compiled($node);
	foreach my $point (qw(commit-after-reserve commit-after-log commit-between-sends commit-after-send))
	{
		foreach my $action (qw(error fatal))
		{
			foreach my $size (4, 9000)
			{
				sql($node, "SELECT event_store_test.inject_fault('$point', '$action')");
				my ($status, $out, $err) = try_sql($node,
					"BEGIN; INSERT INTO hp VALUES (5); INSERT INTO ev (context_id, n) SELECT 'z' || g % 4, g FROM generate_series(1, $size) g; COMMIT");
				like($err, qr/fault injected/, "$action at $point, $size rows");
				sql($node, 'SELECT event_store_test.disarm_faults()');
			}
		}
		whole("after $point");
	}
}
is(sql($node, 'SELECT count(*) FROM hp'), '1', 'heap rows went with the events');
sql($node, 'SELECT event_store.flush()');
whole('flushed');
crash_restart($node);
whole('after a crash');
$node->stop;
done_testing();
