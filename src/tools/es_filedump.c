/*-------------------------------------------------------------------------
 *
 * es_filedump.c
 *	  Prints any file of an event store in words: store, control.0 and .1, wal.*,
 *	  manifest, seg.*, event_store.opened.  Reads only; a server may be running.
 *
 * What a file is says its magic, not its name.  Everything is checked on the way
 * as a shard would check it, segments page by page.  How much of a log or a
 * manifest must be there is known only to the control blocks: if they lie in the
 * same directory they are asked, so that an end too early is told from one
 * that is just the end.
 *
 * Exit status: 0 = all good, 1 = damage found, 2 = a file could not be read.
 *
 *-------------------------------------------------------------------------
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/manifest.h"
#include "core/segment.h"
#include "tools/filedump.h"

EsStatus
read_file(void *arg, void *buf, size_t len, uint64_t offset, EsError *err)
{
	const Input *in = arg;
	size_t		 done = 0;

	while (done < len)
	{
		ssize_t n = pread(in->fd, (char *) buf + done, len - done, (off_t) (offset + done));

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return es_fail(err, ES_ERR_IO, offset + done, "cannot read: %s", strerror(errno));
		if (n == 0)
			return es_fail(err, ES_ERR_TRUNCATED, offset + done, "file ends");
		done += (size_t) n;
	}
	return ES_OK;
}

static void
cannot(const char *what, const char *path)
{
	fprintf(stderr, "es_filedump: could not %s file \"%s\": %s\n", what, path, strerror(errno));
	exit_status = 2;
}

/* Reads up to len bytes from the start of the file. */
static bool
load(Input *in, uint64_t len)
{
	EsError err;

	if (len > in->size)
		len = in->size;
	in->data = realloc(in->data, len ? len : 1);
	if (in->data == NULL)
	{
		errno = ENOMEM;
		cannot("read", in->path);
		return false;
	}
	in->len = len;
	if (read_file(in, in->data, len, 0, &err) == ES_OK)
		return true;
	fprintf(stderr, "es_filedump: file \"%s\", offset %" PRIu64 ": %s\n", in->path, err.offset, err.what);
	exit_status = 2;
	return false;
}

static void
dump(const char *path)
{
	Input		in = {.path = path};
	struct stat st;
	uint32_t	magic = 0;
	uint64_t	long_magic = 0;

	in.fd = open(path, O_RDONLY);
	if (in.fd < 0)
	{
		cannot("open", path);
		return;
	}
	if (fstat(in.fd, &st) != 0)
		cannot("stat", path);
	else
	{
		in.size = (uint64_t) st.st_size;
		if (load(&in, sizeof(long_magic)))
		{
			memcpy(&magic, in.data, in.len < sizeof(magic) ? in.len : sizeof(magic));
			memcpy(&long_magic, in.data, in.len);
			printf("%s: ", path);
			if (long_magic == ES_SEGMENT_MAGIC)
				print_segment(&in);
			else if (load(&in, sizeof(EsFrameHeader)) && print_unused_wal(&in))
				;
			else if (magic != ES_STORE_MAGIC && magic != ES_CONTROL_MAGIC && magic != ES_FRAME_MAGIC &&
					 magic != ES_MANIFEST_MAGIC)
			{
				printf("not a file of an event store, or its first bytes are damaged\n");
				exit_status = exit_status > 1 ? exit_status : 1;
			}
			else if (load(&in, in.size))
			{
				if (magic == ES_STORE_MAGIC)
					print_store(&in);
				else if (magic == ES_CONTROL_MAGIC)
					print_control(&in);
				else if (magic == ES_FRAME_MAGIC)
					print_wal(&in);
				else
					print_manifest(&in);
			}
		}
	}
	free(in.data);
	close(in.fd);
}

static void
usage(void)
{
	printf(
		"es_filedump prints and checks files of an event store.\n\n"
		"Usage:\n  es_filedump [-v] FILE...\n\n"
		"  -v, --verbose  also columns of batches, batch lists, versions, statistics of zones\n\n"
		"Files are $PGDATA/event_store/store and, in $PGDATA/event_store/shard_N/, control.0, control.1,\n"
		"wal.*, manifest and seg.*, and $PGDATA/event_store.opened.  Exit status: 0 = all good, 1 = damage found, 2 = cannot read.\n");
}

int
main(int argc, char **argv)
{
	static const struct option options[] = {
		{"verbose", no_argument, NULL, 'v'}, {"help", no_argument, NULL, 'h'}, {NULL, 0, NULL, 0}};
	int c;

	while ((c = getopt_long(argc, argv, "vh", options, NULL)) != -1)
	{
		if (c == 'v')
			verbose = true;
		else if (c == 'h')
		{
			usage();
			return 0;
		}
		else
		{
			fprintf(stderr, "Try \"es_filedump --help\".\n");
			return 2;
		}
	}
	if (optind == argc)
	{
		usage();
		return 2;
	}
	for (int i = optind; i < argc; i++)
		dump(argv[i]);
	return exit_status;
}
