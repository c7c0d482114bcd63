# The judge: knows what every client asked for and was told, looks at what is there, and says what must not be.
#
#	acknowledged: there exactly once, all of it, in every table, the heap's included
#	refused, rolled back: nothing of it is there
#	neither (the connection was lost): all of it or nothing, and from then on that
#	versions of each context are 1 … n in order of position
#	positions are unique, in statement order within a transaction, in commit order between transactions of which
#	one was acknowledged before the other began, below the horizon, and never mean two things, also over crashes
#	whoever followed a table by read_all has seen everything below the last position that he saw

package EventStore::Oracle;

use strict;
use warnings;
use EventStore::Workload;
use PostgreSQL::Test::Utils;
use Time::HiRes qw(time);

my @tables = EventStore::Workload::tables();
my $most = 8;    # problems of one kind that are told

sub new
{
	my ($class, %self) = @_;
	return bless {
		units => {},        # tid => unit
		positions => {},    # position => "table tid ord"
		followed => {},     # table => { last => position, seen => { position => "tid ord" } }
		contexts => 200,
		checked => 0,
		%self
	}, $class;
}

# All tables were emptied: what was in them is over, but positions stay used.
sub forget
{
	my ($self) = @_;
	$self->{units} = {};
	$self->{followed} = {};
	return;
}

# A unit that is given to a client. $synchronous: an acknowledgement promises that it outlives a crash.
sub begins
{
	my ($self, $unit, $synchronous) = @_;
	$self->{units}{ $unit->{tid} } = $unit;
	$unit->{state} = 'unknown';
	$unit->{synchronous} = $synchronous;
	return;
}

# A unit has ended, with its connection or without.
sub ends
{
	my ($self, $unit) = @_;

	$unit->{state} = EventStore::Workload::outcome($unit);
	$unit->{durable} = $unit->{state} eq 'committed' && $unit->{synchronous};
	$self->{counts}{ $unit->{state} }++;
	$self->synced($unit->{sent}, $unit->{ended}) if $unit->{durable};
	foreach my $line (@{ $unit->{lines} })
	{
		$unit->{versions}{$1} = $2 if $line =~ /^APPENDED (\d+) ([1-9]\d*) appended$/;
		$self->problem('unexpected outcome', "unit $unit->{tid}: $line")
		  if $line =~ /^APPENDED \d+ \d+ (.*)$/ && $1 ne 'appended';
		# SQLSTATEs that no load may produce
		$self->problem('error', "unit $unit->{tid} ($unit->{kind}): $line")
		  if $line =~ /(ERROR|PANIC): +(XX\w{3}|42\w{3})/ && !($self->{allow} && $line =~ $self->{allow});
	}
	return;
}

# sync(), or a synchronous commit, was called at $sent and has returned at $ended: what had been acknowledged before the call is
# durable.
sub synced
{
	my ($self, $sent, $ended) = @_;
	push @{ $self->{durable_since} }, [ $sent, $ended // time() ];
	return;
}

# The server ended without a clean stop. What was acknowledged before a durable commit was sent is durable as
# well: one log. The rest may be lost, whole. The next check() must come before any new unit.
#
# $when: a server that restarts by itself may have answered a sync() that was sent to it before it died: what was answered
# later than this proves nothing about what was before.
sub crashed
{
	my ($self, $when) = @_;
	my $since = 0;

	foreach my $proof (@{ delete $self->{durable_since} // [] })
	{
		next if defined $when && $proof->[1] >= $when;
		$since = $proof->[0] if $proof->[0] > $since;
	}
	foreach my $unit (values %{ $self->{units} })
	{
		next if $unit->{state} ne 'committed' || $unit->{durable};
		if (!$unit->{lost} && $unit->{ended} < $since) { $unit->{durable} = 1; }
		else { $unit->{state} = 'unknown'; }
	}
	$self->{after_crash} = 1;
	return;
}

# What a follower read: rows of [position, tid, ord] in the order in which they came.
sub followed
{
	my ($self, $table, $rows) = @_;
	my $f = $self->{followed}{$table} //= { last => 0, seen => {} };

	foreach my $row (@$rows)
	{
		my ($position, $tid, $ord) = @$row;
		$self->problem('follower', "$table: position $position after $f->{last}") if $position <= $f->{last};
		$f->{last} = $position;
		$f->{seen}{$position} = "$tid $ord";
		$self->know_position($table, $position, $tid, $ord);
	}
	return;
}

sub know_position
{
	my ($self, $table, $position, $tid, $ord) = @_;
	my $is = "$table $tid $ord";
	my $was = $self->{positions}{$position} //= $is;

	$self->problem('position reused', "$position was ($was), is ($is)") if $was ne $is;
	return;
}

sub problem
{
	my ($self, $kind, $text) = @_;
	my $list = $self->{problems}{$kind} //= [];
	push @$list, $text;
	return;
}

# All problems since the last call, one a line; '' = none.
sub verdict
{
	my ($self) = @_;
	my $problems = delete $self->{problems} // {};
	my @lines;

	foreach my $kind (sort keys %$problems)
	{
		my @list = @{ $problems->{$kind} };
		my $more = @list > $most ? ' and ' . (@list - $most) . ' more' : '';
		push @lines, map { "$kind: $_" } splice(@list, 0, $most);
		push @lines, "$kind$more" if $more;
	}
	return join("\n", @lines);
}

# ---- looking ----

sub query_of
{
	my ($self, $table) = @_;
	my $k = $self->{contexts};
	return {
		ev => "SELECT 'ev', tid, ord, position, version, context_id, context_id = 'c' || context_of(tid, ord, $k) AND filler = filler_of(tid, ord) FROM ev",
		pl => "SELECT 'pl', tid, ord, position, -1, context_id, context_id = context_of(tid, ord, $k) AND filler = filler_of(tid, ord) FROM pl",
		st => "SELECT 'st', (payload->>'tid')::bigint, (payload->>'ord')::int, position, version, context_id, "
		  . "(context_id LIKE 'race%' OR context_id = 's' || context_of((payload->>'tid')::bigint, (payload->>'ord')::int, $k)) "
		  . "AND event_id = id_of((payload->>'tid')::bigint, (payload->>'ord')::int) "
		  . "AND payload->>'filler' = filler_of((payload->>'tid')::bigint, (payload->>'ord')::int) FROM event_store.events",
		bg => "SELECT 'bg', tid, ord, position, -1, context_id, context_id = 'b' || context_of(tid, ord, $k) AND filler = big_of(tid, ord) FROM bg",
		hp => "SELECT 'hp', tid, ord, -1, -1, '', n = 1 FROM hp"
	}->{$table};
}

# Reads everything in one snapshot and compares. Units that are under way must be drained before, or lost.
sub check
{
	my ($self, $node) = @_;
	my $file = PostgreSQL::Test::Utils::tempdir() . '/rows';
	my %there;       # tid => { "table ord" => position }
	my %versions;    # table context => [ [position, version] … ]
	my %max;
	my $sql = "BEGIN ISOLATION LEVEL REPEATABLE READ;\n";

	$sql .= "COPY (" . $self->query_of($_) . ") TO STDOUT;\n" foreach @tables;
	$sql .= "SELECT 'horizon', '$_', event_store.horizon('" . EventStore::Workload::relation_of($_) . "');\n" foreach grep { $_ ne 'hp' && !$self->{without_horizon} } @tables;
	$sql .= "COMMIT;\n";
	open(my $in, '>', "$file.sql") or die $!;
	print $in $sql;
	close($in);
	my $err = '';
	IPC::Run::run([ 'psql', '-XAtq', '-v', 'ON_ERROR_STOP=1', '-F', "\t", '-d', $node->connstr('postgres'), '-f', "$file.sql" ],
		'<', \'', '>', $file, '2>', \$err, IPC::Run::timeout(300))
	  or do { $self->problem('cannot read', $err); return $self->verdict; };

	my %horizon;
	my $rows = 0;
	open(my $f, '<', $file) or die $!;
	while (my $line = <$f>)
	{
		chomp $line;
		if ($line =~ /^horizon\t(\w+)\t(\d+)$/)
		{
			$horizon{$1} = $2;
			next;
		}
		my ($table, $tid, $ord, $position, $version, $context, $ok) = split /\t/, $line;
		$rows++;
		$self->problem('content', "$table $tid $ord in context $context") if $ok ne 't';
		$self->problem('doubled', "$table $tid $ord") if exists $there{$tid}{"$table $ord"};
		$there{$tid}{"$table $ord"} = $position;
		next if $table eq 'hp';
		if ($position !~ /^\d+$/)
		{
			$self->problem('no position', "$table $tid $ord");
			next;
		}
		$self->know_position($table, $position, $tid, $ord);
		$max{$table} = $position if $position > ($max{$table} // 0);
		push @{ $versions{"$table $context"} }, [ $position, $version ] if $version ne '-1';
	}
	close($f);
	unlink($file);

	$self->check_units(\%there);
	foreach my $name (sort keys %versions)
	{
		my $expected = 0;
		foreach my $pair (sort { $a->[0] <=> $b->[0] } @{ $versions{$name} })
		{
			$expected++;
			next if $pair->[1] eq $expected;
			$self->problem('version', "$name: $pair->[1] at position $pair->[0], expected $expected");
			last;
		}
	}
	foreach my $table (sort keys %max)
	{
		$self->problem('horizon', "$table: $horizon{$table} is not above position $max{$table}")
		  if ($horizon{$table} // $max{$table} + 1) <= $max{$table};
	}
	$self->check_commit_order(\%there);
	$self->check_followers(\%there);
	$self->check_replay($node) unless $self->{without_horizon};
	$self->{checked}++;
	$self->{rows} = $rows;
	return $self->verdict;
}

sub check_units
{
	my ($self, $there) = @_;

	foreach my $tid (keys %$there)
	{
		$self->problem('nobody wrote', "transaction $tid") unless $self->{units}{$tid};
	}
	foreach my $tid (sort { $a <=> $b } keys %{ $self->{units} })
	{
		my $unit = $self->{units}{$tid};
		my $found = $there->{$tid} // {};
		my ($expected, $missing) = (0, 0);
		my ($last, @order) = (0);

		foreach my $range (@{ $unit->{rows} })
		{
			my ($table, $from, $to) = @$range;
			foreach my $ord ($from .. $to)
			{
				$expected++;
				my $position = $found->{"$table $ord"};
				if (!defined $position) { $missing++; next; }
				next if $table eq 'hp';
				$self->problem('order in transaction', "$tid: $table $ord has position $position, the row before it $last")
				  if $position <= $last;
				$last = $position;
			}
		}
		my $n = keys %$found;
		my $story = "transaction $tid ($unit->{kind}, " . ($unit->{synchronous} ? '' : 'asynchronous, ') . $unit->{state}
		  . ($unit->{seen} ? ', seen before' : '') . "): $n rows are there, expected $expected, missing $missing";

		if ($unit->{state} eq 'committed')
		{
			$self->problem('acknowledged but not there', $story) if $missing > 0;
			$self->problem('rows too many', $story) if $n > $expected - $missing;
		}
		elsif ($unit->{state} eq 'aborted')
		{
			$self->problem('aborted but there', $story) if $n > 0;
		}
		else
		{
			$self->problem('torn', $story) if $n > 0 && ($missing > 0 || $n != $expected);
			$self->{counts}{ $n > 0 ? 'unknown: there' : 'unknown: not there' }++;
			$unit->{state} = $n > 0 ? 'committed' : 'aborted';
		}
		# What recovery found is durable, and so is what others can see of a synchronous commit.
		$unit->{durable} = 1 if $unit->{state} eq 'committed' && ($self->{after_crash} || $unit->{synchronous});
		$unit->{seen} = 1;
	}
	$self->{after_crash} = 0;
	return;
}

# Acknowledged before the other was sent: lower positions.
sub check_commit_order
{
	my ($self, $there) = @_;
	my @units = grep { $_->{state} eq 'committed' && $_->{sent} } values %{ $self->{units} };
	my @by_sent = sort { $a->{sent} <=> $b->{sent} } @units;
	my @by_ended = sort { $a->{ended} <=> $b->{ended} } grep { !$_->{lost} } @units;
	my ($max, $whose) = (0, 0);

	foreach my $unit (@by_sent)
	{
		while (@by_ended && $by_ended[0]{ended} < $unit->{sent})
		{
			my $earlier = shift @by_ended;
			foreach my $position (values %{ $there->{ $earlier->{tid} } // {} })
			{
				($max, $whose) = ($position, $earlier->{tid}) if $position > $max;
			}
		}
		foreach my $position (grep { $_ > 0 } values %{ $there->{ $unit->{tid} } // {} })
		{
			next if $position > $max;
			$self->problem('commit order', "transaction $unit->{tid} has position $position, $whose had been acknowledged before with $max");
			last;
		}
	}
	return;
}

sub check_followers
{
	my ($self, $there) = @_;

	foreach my $table (sort keys %{ $self->{followed} })
	{
		my $f = $self->{followed}{$table};
		foreach my $tid (keys %$there)
		{
			foreach my $key (keys %{ $there->{$tid} })
			{
				my ($t, $ord) = split / /, $key;
				my $position = $there->{$tid}{$key};
				next if $t ne $table || $position > $f->{last};
				$self->problem('missed by the follower', "$table $tid $ord at $position, it is at $f->{last}")
				  unless defined $f->{seen}{$position};
			}
		}
		next if $self->{lossy};
		foreach my $position (keys %{ $f->{seen} })
		{
			my ($tid, $ord) = split / /, $f->{seen}{$position};
			$self->problem('follower saw what is not there', "$table $tid $ord at $position")
			  unless ($there->{$tid}{"$table $ord"} // -1) == $position;
		}
	}
	return;
}

# replay() of some contexts is what a scan gives, in order, and nothing is in two contexts.
sub check_replay
{
	my ($self, $node) = @_;
	my $out = '';
	my ($status) = $node->psql('postgres', <<'SQL', stdout => \$out, stderr => \my $err);
WITH c AS MATERIALIZED (SELECT context_id, count(*) AS n, string_agg(version::text, ',' ORDER BY position) AS versions
	FROM event_store.events GROUP BY 1 ORDER BY hashtext(context_id || now()::text) LIMIT 10),
r AS (SELECT c.context_id, c.n, c.versions, x.n AS rn, x.versions AS rversions FROM c, LATERAL
	(SELECT count(*) AS n, string_agg(version::text, ',') AS versions FROM event_store.replay(c.context_id)) x)
SELECT context_id || ': ' || n || ' rows, replay gives ' || rn FROM r WHERE n <> rn OR versions IS DISTINCT FROM rversions
SQL
	if ($status != 0) { $self->problem('cannot replay', $err); }
	elsif ($out ne '') { $self->problem('replay', $out); }
	return;
}

# Versions that append() had returned are those of the rows.
sub check_append_versions
{
	my ($self, $node) = @_;
	my $out = $node->safe_psql('postgres',
		q{SELECT payload->>'tid', payload->>'ord', version FROM event_store.events});
	foreach my $line (split /\n/, $out)
	{
		my ($tid, $ord, $version) = split /\|/, $line;
		my $unit = $self->{units}{$tid} or next;
		my $told = $unit->{versions}{$ord} // next;
		$self->problem('version told', "transaction $tid row $ord: append() said $told, the row has $version")
		  if $told != $version;
	}
	return;
}

1;
