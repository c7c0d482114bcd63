# Many psql processes at once, driven from one loop: each gets a unit of SQL, and the lines that come back are
# given to whoever asked, also when the connection or the whole server ends in between.

package EventStore::Clients;

use strict;
use warnings;
use Fcntl;
use IO::Select;
use POSIX ();
use Time::HiRes qw(sleep time);

# new(node => …, n => clients, settings => ['SET …'], next => sub, done => sub)
#
# next($client) gives the next unit, a hash with `sql`, or undef when the client has no more to do. done($client,
# $unit) is called when it has ended: $unit->{lines} is what psql printed (command tags among it), {lost} is true if the
# connection ended before the end of the unit, {sent} and {ended} are the times.
sub new
{
	my ($class, %self) = @_;
	my $self = bless { dbname => 'postgres', settings => [], clients => [], serial => 0, %self }, $class;

	$self->{clients} = [ map { { number => $_ } } 0 .. $self->{n} - 1 ];
	return $self;
}

sub connect_client
{
	my ($self, $c) = @_;
	my @command = (
		'psql', '-X', '-A', '-t', '-d', $self->{node}->connstr($c->{dbname} // $self->{dbname}),
		'-v', 'VERBOSITY=verbose', '-v', 'ON_ERROR_STOP=0', '-f', '-');

	pipe(my $in_read, my $in_write) or die "pipe: $!";
	pipe(my $out_read, my $out_write) or die "pipe: $!";
	my $pid = fork() // die "fork: $!";
	if ($pid == 0)
	{
		# file descriptors of the other clients are close-on-exec
		POSIX::dup2(fileno($in_read), 0);
		POSIX::dup2(fileno($out_write), 1);
		POSIX::dup2(fileno($out_write), 2);
		$ENV{PGCONNECT_TIMEOUT} = 60;
		exec(@command) or POSIX::_exit(127);
	}
	close($in_read);
	close($out_write);
	foreach my $handle ($in_write, $out_read)
	{
		my $flags = fcntl($handle, F_GETFL, 0);
		fcntl($handle, F_SETFL, $flags | O_NONBLOCK) or die "fcntl: $!";
	}
	@$c{qw(pid in out to_write buffer unit)} = ($pid, $in_write, $out_read, '', '', undef);
	$c->{to_write} .= "$_;\n" foreach @{ $self->{settings} };
	return;
}

sub disconnect_client
{
	my ($self, $c) = @_;
	return unless $c->{pid};
	close($c->{in});
	close($c->{out});
	waitpid($c->{pid}, 0);
	delete @$c{qw(pid in out to_write buffer unit)};
	return;
}

sub give
{
	my ($self, $c, $unit) = @_;
	$unit->{serial} = ++$self->{serial};
	$unit->{lines} = [];
	$unit->{sent} = time();
	$c->{unit} = $unit;
	# \r: what a failed COPY left in psql's buffer is not the beginning of the next statement
	$c->{to_write} .= "$unit->{sql}\n\\r\n\\echo ==END $unit->{serial}==\n";
	return;
}

sub end_unit
{
	my ($self, $c, $lost) = @_;
	my $unit = $c->{unit} or return;
	$c->{unit} = undef;
	$unit->{ended} = time();
	$unit->{lost} = $lost;
	$self->{done}->($c, $unit) if $self->{done};
	return;
}

# One client's psql has ended, with its connection or without.
sub lost
{
	my ($self, $c) = @_;
	$self->end_unit($c, 1);
	$self->disconnect_client($c);
	$c->{not_before} = time() + 0.2;
	return;
}

sub read_from
{
	my ($self, $c) = @_;
	my $n = sysread($c->{out}, my $data, 65536);

	return if !defined $n && $!{EAGAIN};
	if (!$n)
	{
		$self->lost($c);
		return;
	}
	$c->{buffer} .= $data;
	while ($c->{buffer} =~ s/^(.*)\n//)
	{
		my $line = $1;
		if ($line =~ /^==END (\d+)==$/)
		{
			$self->end_unit($c, 0) if $c->{unit} && $c->{unit}{serial} == $1;
		}
		elsif ($c->{unit})
		{
			push @{ $c->{unit}{lines} }, $line;
		}
	}
	return;
}

# Lets the clients work: for(seconds => …) or until they have no more units. During it, tick->() is called about 50
# times a second; when it returns false, work ends at once, units under way stay under way.
sub run
{
	my ($self, %o) = @_;
	my $end = defined $o{seconds} ? time() + $o{seconds} : undef;
	local $SIG{PIPE} = 'IGNORE';

	while (1)
	{
		my $late = defined $end && time() >= $end;
		my $busy = 0;
		my ($readers, $writers) = (IO::Select->new, IO::Select->new);

		foreach my $c (@{ $self->{clients} })
		{
			if (!$c->{unit} && !$late && !$o{drain} && time() >= ($c->{not_before} // 0))
			{
				my $unit = $self->{next}->($c);
				if ($unit)
				{
					$self->connect_client($c) unless $c->{pid};
					$self->give($c, $unit);
				}
			}
			next unless $c->{pid};
			$busy++ if $c->{unit};
			$readers->add($c->{out});
			$writers->add($c->{in}) if $c->{to_write} ne '';
		}
		last if $late && !$o{finish};
		last if $busy == 0 && ($late || $o{drain} || !defined $end);
		die 'clients do not end' if defined $end && time() > $end + 300;

		my ($r, $w) = IO::Select->select($readers, $writers, undef, 0.02);
		my %by_handle = map { $_->{pid} ? (fileno($_->{out}) => $_, fileno($_->{in}) => $_) : () } @{ $self->{clients} };
		foreach my $handle (@{ $w // [] })
		{
			my $c = $by_handle{ fileno($handle) };
			my $n = syswrite($handle, $c->{to_write});
			substr($c->{to_write}, 0, $n) = '' if defined $n;
			# broken: reading tells
			$c->{to_write} = '' if !defined $n && !$!{EAGAIN};
		}
		foreach my $handle (@{ $r // [] })
		{
			my $c = $by_handle{ fileno($handle) };
			$self->read_from($c);
		}
		return 0 if $o{tick} && !$o{tick}->();
	}
	return 1;
}

# Waits for what is under way, and starts nothing more.
sub drain
{
	my ($self, %o) = @_;
	return $self->run(drain => 1, %o);
}

# The server is gone: whatever was under way is lost, but what had been printed counts.
sub abandon
{
	my ($self) = @_;
	my $end = time() + 60;

	foreach my $c (@{ $self->{clients} })
	{
		while ($c->{pid} && time() < $end)
		{
			IO::Select->new($c->{out})->can_read(1) or last;
			$self->read_from($c);
		}
		if ($c->{pid})
		{
			kill 'KILL', $c->{pid};
			$self->lost($c);
		}
		delete $c->{not_before};
	}
	return;
}

sub close_all
{
	my ($self) = @_;
	$self->disconnect_client($_) foreach @{ $self->{clients} };
	return;
}

sub DESTROY
{
	my ($self) = @_;
	local $?;
	foreach my $c (@{ $self->{clients} })
	{
		next unless $c->{pid};
		kill 'KILL', $c->{pid};
		waitpid($c->{pid}, 0);
	}
	return;
}

1;
