# A real event log: loaded, replayed context by context and compared with its file line by line, with the data in memory, in
# segments, in both, and after a crash.

package EventStore::RealLog;

use strict;
use warnings;
use EventStore::Server qw(new_server kill_all crash_restart sql try_sql);
use IPC::Run;
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

sub available
{
	my ($name) = @_;
	my $file = ($ENV{ES_DATA_DIR} // '') . "/$name.jsonl.gz";
	return $ENV{ES_DATA_DIR} && -r $file ? $file : undef;
}

# Lines of the file, and by context the numbers of its lines.
sub read_file
{
	my ($file) = @_;
	my (@lines, %contexts);
	my $json = JSON::PP->new->utf8;

	open(my $in, '-|', 'gzip', '-dc', $file) or die "gzip: $!";
	while (my $line = <$in>)
	{
		chomp $line;
		push @lines, $line;
		# cheap: the context is the first member of every line
		my $context = $line =~ /^\{"context_id": "((?:[^"\\]|\\.)*)"/ ? $1 : die "no context in line " . @lines;
		$context = $json->decode(qq{["$context"]})->[0] if $context =~ /\\/;
		push @{ $contexts{$context} }, $#lines;
	}
	close($in) or die "gzip: $?";
	return (\@lines, \%contexts);
}

# COPY escapes
sub escape
{
	my ($text) = @_;
	$text =~ s/\\/\\\\/g;
	return $text;
}

sub run_script
{
	my ($node, $script) = @_;
	my ($out, $err) = ('', '');

	IPC::Run::run([ 'psql', '-XAtq', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('postgres'), '-f', $script ], '<', '/dev/null', '>', \$out, '2>', \$err)
	  or die "psql: $err";
	unlink($script);
	return;
}

# Loads lines [from, to) through a staging table into event_store.events in their order.
sub load
{
	my ($node, $lines, $from, $to) = @_;
	my $script = PostgreSQL::Test::Utils::tempdir() . '/load.sql';

	open(my $out, '>', $script) or die "$script: $!";
	print $out "BEGIN;\nCREATE TEMP TABLE line (n serial, doc jsonb) ON COMMIT DROP;\nCOPY line (doc) FROM STDIN;\n";
	print $out escape($lines->[$_]), "\n" foreach $from .. $to - 1;
	print $out "\\.\nINSERT INTO event_store.events (context_id, event_type, recorded_at, payload, metadata)\n"
	  . "SELECT doc->>'context_id', doc->>'event_type', (doc->>'time')::timestamptz, doc->'data', doc->'meta' FROM line ORDER BY n;\nCOMMIT;\n";
	close($out);
	run_script($node, $script);
	return;
}

# The file's documents as the database understands them, to compare with: a heap table, line by line.
sub expect
{
	my ($node, $lines) = @_;
	my $script = PostgreSQL::Test::Utils::tempdir() . '/expect.sql';

	open(my $out, '>', $script) or die "$script: $!";
	print $out "CREATE TABLE expected (line serial, doc jsonb);\nCOPY expected (doc) FROM STDIN;\n";
	print $out escape($_), "\n" foreach @$lines;
	print $out "\\.\n";
	print $out <<'SQL';
CREATE TABLE per_context AS SELECT doc->>'context_id' AS context_id, count(*) AS n, array_agg(line ORDER BY line) AS lines FROM expected GROUP BY 1;
CREATE UNIQUE INDEX ON expected (line);
CREATE INDEX ON per_context (context_id);
ANALYZE expected, per_context;
SQL
	close($out);
	run_script($node, $script);
	return;
}

# Differences between replays of all contexts and the first $limit lines, '' = none; the number of events replayed.
sub compare
{
	my ($node, $limit) = @_;

	# Each context's k-th event is its k-th line: same type, time, data, meta; versions 1, 2, 3 …; positions ascend with lines over all.
	return sql($node, <<"SQL");
SET jit = off;
WITH replayed AS MATERIALIZED (
	SELECT p.context_id AS wanted, p.lines, r.*, r.n AS k FROM per_context p,
		LATERAL ROWS FROM (event_store.replay(p.context_id)) WITH ORDINALITY AS r(position, context_id, version, event_id, event_type, recorded_at, payload, metadata, n)
	WHERE p.lines[1] <= $limit),
compared AS (
	SELECT r.*, e.line, e.doc, lag(r.position) OVER (ORDER BY e.line) AS before FROM replayed r LEFT JOIN expected e ON e.line = r.lines[r.k])
SELECT 'lines', (SELECT count(*) FROM expected WHERE line <= $limit), 'replayed', count(*), 'different',
	count(*) FILTER (WHERE line IS NULL OR line > $limit OR context_id <> wanted OR version <> k OR event_id IS NOT NULL
		OR event_type IS DISTINCT FROM doc->>'event_type' OR recorded_at IS DISTINCT FROM (doc->>'time')::timestamptz
		OR payload IS DISTINCT FROM doc->'data' OR metadata IS DISTINCT FROM doc->'meta'), 'out of order', count(*) FILTER (WHERE before >= position)
FROM compared
SQL
}

# The whole story for one file, in a server of its own.
sub run
{
	my ($name, %o) = @_;
	my $file = available($name) or die;
	my ($lines, $contexts) = read_file($file);
	my $n = @$lines;
	my $half = int($n / 2);
	my $node = new_server("log_$name", 'event_store.shards = 2', 'event_store.memtable_age = 0', 'event_store.memtable_size = 256MB', 'autovacuum = off',
		'max_wal_size = 4GB');
	my $is = sub {
		my ($limit, $where) = @_;
		my $begin = time();
		is(compare($node, $limit), "lines|$limit|replayed|$limit|different|0|out of order|0", "$name: $where");
		note(sprintf('%.1f s', time() - $begin));
	};

	note("$name: $n events, " . keys(%$contexts) . ' contexts');
	expect($node, $lines);
	is(sql($node, 'SELECT count(*) FROM per_context'), scalar(keys %$contexts), "$name: as many contexts as in the file");
	load($node, $lines, 0, $half);
	ok($node->poll_query_until('postgres', 'SELECT sum(memtable_rows), sum(segment_rows) FROM event_store.stat_shards', "$half|0"), "$name: the first half lies in memory");
	$is->($half, 'half of it, in memory');
	crash_restart($node);
	$is->($half, 'half of it, in memory, after a crash');
	sql($node, 'SELECT event_store.flush()');
	is(sql($node, 'SELECT sum(memtable_rows), sum(segment_rows) FROM event_store.stat_shards'), "0|$half", "$name: the first half lies in segments");
	$is->($half, 'half of it, in segments');
	load($node, $lines, $half, $n);
	$is->($n, 'first half in segments, second in memory');
	crash_restart($node);
	$is->($n, 'both, after a crash');
	sql($node, 'SELECT event_store.flush()');
	$is->($n, 'all in segments');
	crash_restart($node);
	$is->($n, 'all in segments, after a crash');

	is(sql($node, q{SELECT count(*) FROM (SELECT event_type, count(*) FROM event_store.events GROUP BY 1 EXCEPT SELECT doc->>'event_type', count(*) FROM expected GROUP BY 1) x}),
		'0', "$name: as many events of each type");
	is( sql($node, q{SELECT count(*), count(*) FILTER (WHERE r.payload IS DISTINCT FROM e.doc->'data') FROM
			(SELECT *, row_number() OVER (ORDER BY position) AS line FROM event_store.read_all()) r JOIN expected e USING (line)}),
		"$n|0", "$name: read_all gives the file from its first line to its last");
	is(sql($node, 'SELECT count(*) FROM event_store.verify()'), '0', "$name: no damage");
	note(sql($node, 'SELECT sum(segment_bytes) / sum(segment_rows) FROM event_store.stat_shards') . ' bytes per event');
	$node->stop;
	return;
}

1;
