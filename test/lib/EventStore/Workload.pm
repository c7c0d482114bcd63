# Random transactions over event tables and a heap table, each with the list of rows that it will leave behind if it
# commits: what the oracle compares with.
#
# Every row is known by (table, tid, ord): tid numbers the transactions of a test, ord counts rows in statement order over
# all tables of the transaction. Contexts and contents follow from these by functions that both sides know, so that a
# torn, mixed up or foreign row shows.

package EventStore::Workload;

use strict;
use warnings;

# Tables: ev with versions and text contexts, pl with integer contexts and no version, st = event_store.events by
# append() with event ids, bg with values that need many messages, hp on the heap.
sub setup
{
	my ($node) = @_;

	$node->safe_psql('postgres', <<'SQL');
CREATE TABLE ev (position bigint, context_id text, version bigint, tid bigint, ord int, filler text) USING event_store;
CREATE TABLE pl (context_id int, tid bigint, ord int, filler text, position bigint) USING event_store;
CREATE TABLE bg (context_id text, tid bigint, ord int, filler text, position bigint) USING event_store;
CREATE TABLE hp (tid bigint, ord int, n int);
-- a megabyte that does not shrink
CREATE FUNCTION big_of(tid bigint, ord int) RETURNS text IMMUTABLE PARALLEL SAFE LANGUAGE sql AS
	$$ SELECT string_agg(translate(md5(tid || ':' || ord || ':' || g), '01234567', chr(65 + g % 26) || 'ghijklmn'), '') FROM generate_series(1, 33000) g $$;
CREATE FUNCTION context_of(tid bigint, ord int, contexts int) RETURNS int IMMUTABLE PARALLEL SAFE LANGUAGE sql AS
	$$ SELECT ((tid * 7919 + ord * 104729) % contexts)::int $$;
CREATE FUNCTION filler_of(tid bigint, ord int) RETURNS text IMMUTABLE PARALLEL SAFE LANGUAGE sql AS
	$$ SELECT repeat(chr((65 + (tid + ord) % 26)::int), ((tid * 7 + ord * 13) % 90)::int) $$;
CREATE FUNCTION id_of(tid bigint, ord int) RETURNS uuid IMMUTABLE PARALLEL SAFE LANGUAGE sql AS
	$$ SELECT md5(tid || ':' || ord)::uuid $$;
CREATE PROCEDURE fails() LANGUAGE plpgsql AS $$ BEGIN RAISE division_by_zero; END $$;
SQL
	return;
}

sub new
{
	my ($class, %self) = @_;
	# contexts: of each table; large: most rows of a bulk statement; no_append: nobody holds locks before COMMIT
	return bless { tid => 0, contexts => 200, large => 1500, weights => undef, %self }, $class;
}

sub context_of
{
	my ($self, $tid, $ord) = @_;
	return ($tid * 7919 + $ord * 104729) % $self->{contexts};
}

sub filler_of
{
	my ($tid, $ord) = @_;
	return chr(65 + ($tid + $ord) % 26) x (($tid * 7 + $ord * 13) % 90);
}

# ---- statements; each adds its rows to the unit ----

sub add_rows
{
	my ($unit, $table, $n) = @_;
	my $from = $unit->{ord} + 1;

	$unit->{ord} += $n;
	push @{ $unit->{rows} }, [ $table, $from, $unit->{ord} ];
	return ($from, $unit->{ord});
}

sub insert_ev
{
	my ($self, $unit, $n) = @_;
	my ($from, $to) = add_rows($unit, 'ev', $n);
	return "INSERT INTO ev (context_id, tid, ord, filler) SELECT 'c' || context_of($unit->{tid}, g, $self->{contexts}), "
	  . "$unit->{tid}, g, filler_of($unit->{tid}, g) FROM generate_series($from, $to) g;\n";
}

sub insert_pl
{
	my ($self, $unit, $n) = @_;
	my ($from, $to) = add_rows($unit, 'pl', $n);
	return "INSERT INTO pl (context_id, tid, ord, filler) SELECT context_of($unit->{tid}, g, $self->{contexts}), "
	  . "$unit->{tid}, g, filler_of($unit->{tid}, g) FROM generate_series($from, $to) g;\n";
}

# One row of a megabyte.
sub insert_bg
{
	my ($self, $unit) = @_;
	my ($from) = add_rows($unit, 'bg', 1);
	return "INSERT INTO bg (context_id, tid, ord, filler) SELECT 'b' || context_of($unit->{tid}, $from, $self->{contexts}), "
	  . "$unit->{tid}, $from, big_of($unit->{tid}, $from);\n";
}

sub insert_hp
{
	my ($self, $unit) = @_;
	my ($from) = add_rows($unit, 'hp', 1);
	return "INSERT INTO hp VALUES ($unit->{tid}, $from, 1);\n";
}

sub copy
{
	my ($self, $unit, $table, $n) = @_;
	my ($from, $to) = add_rows($unit, $table, $n);
	my $prefix = $table eq 'ev' ? 'c' : '';
	my $data = '';

	foreach my $ord ($from .. $to)
	{
		$data .= $prefix . $self->context_of($unit->{tid}, $ord) . "\t$unit->{tid}\t$ord\t" . filler_of($unit->{tid}, $ord) . "\n";
	}
	# \r: see EventStore::Clients
	return "COPY $table (context_id, tid, ord, filler) FROM STDIN;\n$data\\.\n\\r\n";
}

# append() with an event id; prints `APPENDED ord version outcome`.
sub append
{
	my ($self, $unit, %o) = @_;
	my ($ord) = add_rows($unit, 'st', 1);
	my $tid = $unit->{tid};
	my $context = $o{context} // 's' . $self->context_of($tid, $ord);
	my $expected = defined $o{expected} ? ", expected_version => $o{expected}" : '';
	return "SELECT 'APPENDED $ord ' || coalesce(version, 0) || ' ' || outcome FROM event_store.append('$context', 'type' || $ord % 5, "
	  . "jsonb_build_object('tid', $tid, 'ord', $ord, 'filler', filler_of($tid, $ord)), event_id => id_of($tid, $ord)$expected);\n";
}

# ---- units ----

sub begin_unit
{
	my ($self, $kind) = @_;
	return { tid => ++$self->{tid}, kind => $kind, ord => 0, rows => [], sql => '', wants => 'commit' };
}

sub some_statements
{
	my ($self, $unit) = @_;
	my $sql = '';

	foreach (0 .. int(rand(3)))
	{
		my $r = rand();
		$sql .=
			$r < 0.25 ? $self->insert_ev($unit, 1 + int(rand(4)))
		  : $r < 0.50 ? $self->insert_pl($unit, 1 + int(rand(4)))
		  : $r < 0.65 ? $self->insert_hp($unit)
		  : $r < 0.80 || $self->{no_append} ? $self->copy($unit, rand() < 0.5 ? 'ev' : 'pl', 1 + int(rand(8)))
		  :             $self->append($unit);
	}
	return $sql;
}

# A tree of savepoints: what was rolled back is taken out of the rows again.
sub savepoint_tree
{
	my ($self, $unit, $depth) = @_;
	my $sql = $self->some_statements($unit);

	foreach my $branch (0 .. int(rand(3)))
	{
		last if $depth >= 4;
		my $kept = [ @{ $unit->{rows} } ];
		# never a name twice: after an error in a branch, ROLLBACK TO must not find an older savepoint
		my $name = 's' . ++$unit->{savepoints};

		$sql .= "SAVEPOINT $name;\n" . $self->savepoint_tree($unit, $depth + 1);
		if (rand() < 0.45)
		{
			$sql .= "ROLLBACK TO $name;\n";
			$unit->{rows} = $kept;
			$sql .= $self->some_statements($unit) if rand() < 0.5;
			$sql .= "RELEASE $name;\n" if rand() < 0.5;
		}
		elsif (rand() < 0.6)
		{
			$sql .= "RELEASE $name;\n";
		}
	}
	return $sql;
}

my %makers = (
	single => sub {
		my ($self, $unit) = @_;
		$unit->{sql} = $self->insert_ev($unit, 1);
	},
	copy_alone => sub {
		my ($self, $unit) = @_;
		$unit->{sql} = $self->copy($unit, rand() < 0.5 ? 'ev' : 'pl', 1 + int(rand(300)));
	},
	append_alone => sub {
		my ($self, $unit) = @_;
		$unit->{sql} = $self->append($unit);
	},
	mixed => sub {
		my ($self, $unit) = @_;
		$unit->{block} = 1;
		$unit->{sql} .= $self->some_statements($unit) foreach 0 .. int(rand(2));
		$unit->{sql} .= $self->insert_hp($unit);
	},
	savepoints => sub {
		my ($self, $unit) = @_;
		$unit->{block} = 1;
		$unit->{sql} = $self->savepoint_tree($unit, 0) . $self->insert_hp($unit);
	},
	bulk => sub {
		my ($self, $unit) = @_;
		$unit->{block} = 1;
		$unit->{sql} = $self->insert_hp($unit);
		foreach (0 .. int(rand(3)))
		{
			my $n = 100 + int(rand($self->{large}));
			$unit->{sql} .= rand() < 0.5 ? $self->insert_ev($unit, $n) : $self->insert_pl($unit, $n);
		}
	},
	slow_bulk => sub {
		# there is time for its first rows to be spilled before it ends
		my ($self, $unit) = @_;
		$unit->{block} = 1;
		$unit->{sql} = $self->insert_hp($unit) . $self->insert_ev($unit, 3000) . $self->insert_pl($unit, 3000);
		$unit->{sql} .= "SELECT pg_sleep(0.5);\n" . $self->insert_ev($unit, 100) . $self->insert_pl($unit, 1);
		$unit->{wants} = 'rollback' if rand() < 0.3;
	},
	slow_plain => sub {
		# the same without versions: nobody asks the shard anything before FINISH
		my ($self, $unit) = @_;
		$unit->{block} = 1;
		$unit->{sql} = $self->insert_hp($unit) . $self->insert_pl($unit, 6000) . "SELECT pg_sleep(0.5);\n" . $self->insert_pl($unit, 5);
	},
	streams => sub {
		my ($self, $unit) = @_;
		$unit->{block} = 1;
		$unit->{sql} .= $self->append($unit) foreach 0 .. int(rand(25));
		$unit->{sql} .= $self->insert_hp($unit);
	},
	huge => sub {
		my ($self, $unit) = @_;
		$unit->{block} = 1;
		$unit->{sql} = $self->insert_bg($unit) . $self->insert_hp($unit);
	},
	many_streams => sub {
		# more contexts of one table than slots of a small transaction
		my ($self, $unit) = @_;
		$unit->{block} = 1;
		$unit->{sql} = $self->insert_ev($unit, 40 + int(rand(60))) . $self->insert_hp($unit);
	},
	race => sub {
		# everybody wants the same next version: one may have it
		my ($self, $unit) = @_;
		my $context = 'race' . int(rand(3));
		my $tid = $unit->{tid};
		my ($ord) = add_rows($unit, 'st', 1);
		$unit->{sql} =
			"SELECT 'APPENDED $ord ' || a.version || ' ' || outcome FROM coalesce((SELECT max(version) FROM event_store.replay('$context', "
		  . "backward => true, max_count => 1)), 0) AS head, LATERAL event_store.append('$context', 'race', "
		  . "jsonb_build_object('tid', $tid, 'ord', $ord, 'filler', filler_of($tid, $ord)), event_id => id_of($tid, $ord), "
		  . "expected_version => head) a;\n";
		$unit->{may_fail} = 1;
	},
	rollback => sub {
		my ($self, $unit) = @_;
		$unit->{block} = 1;
		$unit->{wants} = 'rollback';
		$unit->{sql} = rand() < 0.3 ? $self->insert_ev($unit, 100 + int(rand($self->{large}))) : $self->savepoint_tree($unit, 2);
	},
	failing => sub {
		my ($self, $unit) = @_;
		$unit->{block} = 1;
		$unit->{wants} = 'rollback';
		$unit->{error_expected} = 1;
		$unit->{sql} = $self->some_statements($unit) . "CALL fails();\n" . $self->some_statements($unit);
	});

my %default_weights = (
	single => 10, append_alone => 8, mixed => 14, savepoints => 10, copy_alone => 4, bulk => 2, streams => 4, race => 4,
	many_streams => 2,
	rollback => 4, failing => 2);

sub kinds { return sort keys %makers; }
sub tables { return qw(ev pl st bg hp); }
sub relation_of { return $_[0] eq 'st' ? 'event_store.events' : $_[0]; }

# Empties all tables; the oracle begins anew with them.
sub truncate_all
{
	my ($node) = @_;
	$node->safe_psql('postgres', 'TRUNCATE ' . join(', ', map { relation_of($_) } tables()));
	return;
}

# A random unit, or one of the given kind.
sub unit
{
	my ($self, $kind) = @_;

	if (!defined $kind)
	{
		my $weights = $self->{weights} // \%default_weights;
		my $sum = 0;
		$sum += $_ foreach values %$weights;
		my $r = rand($sum);
		foreach my $k (sort keys %$weights)
		{
			$kind = $k;
			$r -= $weights->{$k};
			last if $r < 0;
		}
	}
	my $unit = $self->begin_unit($kind);
	my $maker = $makers{$kind} or die "no kind $kind";
	$maker->($self, $unit);
	if ($unit->{block})
	{
		my $end = $unit->{wants} eq 'commit' ? 'COMMIT' : 'ROLLBACK';
		$end = 'COMMIT' if $unit->{error_expected} && rand() < 0.5;
		$unit->{sql} = 'BEGIN' . ($self->{isolation} ? " ISOLATION LEVEL $self->{isolation}" : '') . ";\n$unit->{sql}$end;\n";
	}
	return $unit;
}

# What became of it: committed, aborted or unknown, by what psql printed.
sub outcome
{
	my ($unit) = @_;
	my @errors = grep { /(ERROR|FATAL|PANIC): / } @{ $unit->{lines} };
	my $lines = $unit->{lines};

	if ($unit->{block})
	{
		return 'committed' if grep { $_ eq 'COMMIT' } @$lines;
		# the last tag, not that of ROLLBACK TO
		return 'aborted' if !$unit->{lost};
		# it had not come to COMMIT if something before it failed
		return 'aborted' if $unit->{wants} eq 'rollback';
		return 'unknown';
	}
	return 'committed' if grep { /^(INSERT 0 [1-9]|COPY [1-9]|APPENDED )/ } @$lines;
	# a time-out or cancel of the commit's own waiting would be a WARNING; an ERROR without loss is an abort
	return 'aborted' if !$unit->{lost} && @errors;
	return 'unknown';
}

1;
