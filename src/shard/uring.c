/*-------------------------------------------------------------------------
 *
 * uring.c
 *	  Asynchronous file writes and syncs for a shard's event loop.
 *
 * An operation is a struct in a pool that lives until its callback has run.  With
 * io_uring it becomes one submission at a time: a short write comes back as the same
 * operation, moved on by what was written, and so does one that the kernel
 * interrupted; the owner sees the whole length or an error.  Operations that find the
 * ring full wait in a list and go when others complete, so that the owners need no
 * rule of their own for a full ring.
 *
 * With the sync method an operation is done when it is asked for and put into
 * the list of completed ones; the process's own latch is set, so that the loop comes round
 * once more and calls back from es_uring_reap, as with the ring.  The same list takes
 * results that were not asked of the kernel at all (injected faults, operations that a
 * broken ring refused).
 *
 * Completions are announced through an eventfd, which the loop's WaitEventSet watches
 * together with the latch.  io_uring_enter is only called to submit, never
 * to wait, except in es_uring_shutdown: there buffers and files are about to go and
 * what is in flight must be over.
 *
 * The ring is made after fork and used by one thread.  The setup flags are the
 * plain ones, so that every kernel that knows write and fsync (5.6) will do.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <fcntl.h>
#include <limits.h>
#include <liburing.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "lib/ilist.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "storage/fd.h"
#include "storage/latch.h"
#include "utils/memutils.h"
#include "utils/wait_event.h"

#include "guc.h"
#include "ipc/fault.h"
#include "shard/shard.h"
#include "shard/uring.h"

#define QUEUE_DEPTH 64

typedef enum OpKind
{
	OP_WRITE,
	OP_FDATASYNC,
	OP_FSYNC
} OpKind;

typedef struct Op
{
	dlist_node	node; /* in free_ops, waiting or completed; none while in the ring */
	OpKind		kind;
	int			fd;
	const char *buf;
	size_t		len;
	size_t		written;
	uint64		offset;
	int			result; /* valid in the list of completed ones */
	EsIoDone	done;
	void	   *arg;
} Op;

static bool			   initialized = false;
static bool			   use_ring = false;
static struct io_uring ring;
static int			   event_fd = -1;

static dlist_head free_ops = DLIST_STATIC_INIT(free_ops);
static dlist_head waiting = DLIST_STATIC_INIT(waiting);		/* for room in the ring */
static dlist_head completed = DLIST_STATIC_INIT(completed); /* for their callback */
static int		  in_ring = 0;								/* submissions the kernel has not answered */
static bool		  unsubmitted = false; /* the submission queue holds entries for the next submit */
static int		  in_flight = 0;	   /* operations without callback so far */

/* ---- start and end ---- */

/*
 * What a refusal of the kernel means and what the administrator can do about it.
 */
static const char *
ring_failure_hint(int err)
{
	switch (err)
	{
		case EPERM:
		case EACCES:
			return "io_uring is forbidden here: see /proc/sys/kernel/io_uring_disabled and the seccomp profile of the container, or set \"event_store.io_method = sync\".";
		case ENOSYS:
			return "This kernel has no io_uring: set \"event_store.io_method = sync\".";
		case ENOMEM:
			return "Raise the limit on locked memory (ulimit -l), or set \"event_store.io_method = sync\".";
		case EMFILE:
		case ENFILE:
			return "Raise the limit on open files (ulimit -n), or set \"event_store.io_method = sync\".";
		default:
			return "Set \"event_store.io_method = sync\".";
	}
}

/* Makes ring and eventfd; returns 0 or an errno with nothing left behind. */
static int
make_ring(void)
{
	struct io_uring_probe *probe;
	bool				   supported;
	int					   rc = ES_FAULT_IO("uring-setup");

	if (rc != 0)
		return rc;
	rc = io_uring_queue_init(QUEUE_DEPTH, &ring, 0);
	if (rc < 0)
		return -rc;

	probe = io_uring_get_probe_ring(&ring);
	supported = probe != NULL && io_uring_opcode_supported(probe, IORING_OP_WRITE) &&
				io_uring_opcode_supported(probe, IORING_OP_FSYNC);
	if (probe != NULL)
		io_uring_free_probe(probe);
	if (!supported)
	{
		io_uring_queue_exit(&ring);
		return ENOSYS;
	}

	event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (event_fd < 0)
	{
		rc = errno;
		io_uring_queue_exit(&ring);
		return rc;
	}
	rc = io_uring_register_eventfd(&ring, event_fd);
	if (rc < 0)
	{
		close(event_fd);
		event_fd = -1;
		io_uring_queue_exit(&ring);
		return -rc;
	}
	ReserveExternalFD();
	ReserveExternalFD();
	return 0;
}

void
es_uring_init(void)
{
	int err;

	Assert(!initialized);
	initialized = true;
	if (es_shard != NULL)
		pg_atomic_write_u32(&es_shard->uses_uring, 0);
	if (es_guc_io_method == ES_IO_SYNC)
		return;

	err = make_ring();
	if (err == 0)
	{
		use_ring = true;
		if (es_shard != NULL)
			pg_atomic_write_u32(&es_shard->uses_uring, 1);
		return;
	}
	errno = err;
	ereport(
		es_guc_io_method == ES_IO_AUTO ? LOG : ERROR,
		(errcode(err == ENOMEM ? ERRCODE_OUT_OF_MEMORY : ERRCODE_SYSTEM_ERROR),
		 errmsg("could not set up io_uring: %m"),
		 es_guc_io_method == ES_IO_AUTO ? errdetail("Files are written with io_method \"sync\" instead.") : 0,
		 errhint("%s", ring_failure_hint(err))));
}

pgsocket
es_uring_event_fd(void)
{
	return use_ring ? event_fd : PGINVALID_SOCKET;
}

const char *
es_uring_method(void)
{
	return use_ring ? "io_uring" : "sync";
}

int
es_uring_in_flight(void)
{
	return in_flight;
}

/* ---- operations ---- */

static Op *
new_op(OpKind kind, int fd, EsIoDone done, void *arg)
{
	Op *op;

	Assert(initialized);
	if (dlist_is_empty(&free_ops))
		op = MemoryContextAlloc(TopMemoryContext, sizeof(Op));
	else
		op = dlist_container(Op, node, dlist_pop_head_node(&free_ops));
	memset(op, 0, sizeof(Op));
	op->kind = kind;
	op->fd = fd;
	op->done = done;
	op->arg = arg;
	in_flight++;
	return op;
}

static void
complete(Op *op, int result)
{
	op->result = result;
	dlist_push_tail(&completed, &op->node);
	/* completions that no eventfd announces must not be slept over */
	SetLatch(MyLatch);
}

static void
run_sync(Op *op)
{
	int rc = 0;

	pgstat_report_wait_start(PG_WAIT_EXTENSION);
	switch (op->kind)
	{
		case OP_WRITE:
			while (op->written < op->len)
			{
				ssize_t n = pwrite(op->fd, op->buf + op->written, op->len - op->written,
								   (off_t) (op->offset + op->written));

				if (n < 0 && errno == EINTR)
					continue;
				if (n <= 0)
				{
					/* a write of nothing without a reason is a full disk */
					rc = n < 0 ? errno : ENOSPC;
					break;
				}
				op->written += n;
			}
			break;
		case OP_FDATASYNC:
			while ((rc = fdatasync(op->fd)) != 0 && errno == EINTR)
				;
			rc = rc != 0 ? errno : 0;
			break;
		case OP_FSYNC:
			while ((rc = fsync(op->fd)) != 0 && errno == EINTR)
				;
			rc = rc != 0 ? errno : 0;
			break;
	}
	pgstat_report_wait_end();
	complete(op, rc != 0 ? -rc : (int) op->written);
}

/* Puts an operation into the submission queue; false if that is full. */
static bool
prepare(Op *op)
{
	struct io_uring_sqe *sqe;

	if (in_ring >= QUEUE_DEPTH)
		return false;
	sqe = io_uring_get_sqe(&ring);
	if (sqe == NULL)
		return false;
	switch (op->kind)
	{
		case OP_WRITE:
			io_uring_prep_write(sqe, op->fd, op->buf + op->written,
								(unsigned) Min(op->len - op->written, (size_t) 1 << 30),
								op->offset + op->written);
			break;
		case OP_FDATASYNC:
			io_uring_prep_fsync(sqe, op->fd, IORING_FSYNC_DATASYNC);
			break;
		case OP_FSYNC:
			io_uring_prep_fsync(sqe, op->fd, 0);
			break;
	}
	io_uring_sqe_set_data(sqe, op);
	in_ring++;
	unsubmitted = true;
	return true;
}

/*
 * Tells the kernel.  What it does not take now (EAGAIN, EBUSY: it is short of
 * something) stays in the queue for the next call; the latch brings the loop back.
 */
static void
submit(void)
{
	int rc;

	while (unsubmitted)
	{
		rc = io_uring_submit(&ring);
		if (rc == -EINTR)
			continue;
		if (rc < 0 && rc != -EAGAIN && rc != -EBUSY)
		{
			errno = -rc;
			ereport(FATAL, (errcode(ERRCODE_IO_ERROR), errmsg("could not submit to io_uring: %m"),
							errhint("%s", ring_failure_hint(-rc))));
		}
		unsubmitted = io_uring_sq_ready(&ring) > 0;
		if (unsubmitted)
		{
			SetLatch(MyLatch);
			break;
		}
	}
}

static void
start(Op *op)
{
	if (!use_ring)
	{
		run_sync(op);
		return;
	}
	if (!dlist_is_empty(&waiting) || !prepare(op))
		dlist_push_tail(&waiting, &op->node);
	submit();
}

void
es_uring_write(int fd, const void *buf, size_t len, uint64 offset, EsIoDone done, void *arg)
{
	Op *op = new_op(OP_WRITE, fd, done, arg);

	Assert(len <= INT_MAX);
	op->buf = buf;
	op->len = len;
	op->offset = offset;
	start(op);
}

void
es_uring_fdatasync(int fd, EsIoDone done, void *arg)
{
	if (enableFsync)
		start(new_op(OP_FDATASYNC, fd, done, arg));
	else
		es_uring_result(0, done, arg);
}

void
es_uring_fsync(int fd, EsIoDone done, void *arg)
{
	if (enableFsync)
		start(new_op(OP_FSYNC, fd, done, arg));
	else
		es_uring_result(0, done, arg);
}

void
es_uring_result(int result, EsIoDone done, void *arg)
{
	complete(new_op(OP_WRITE, -1, done, arg), result);
}

/* ---- completions ---- */

/* Takes what the kernel answered into the list of completed operations. */
static void
collect(void)
{
	struct io_uring_cqe *cqe;
	uint64				 count;

	/* first the bell, then the box: a completion that comes between rings again */
	while (read(event_fd, &count, sizeof(count)) < 0 && errno == EINTR)
		;
	while (io_uring_peek_cqe(&ring, &cqe) == 0)
	{
		Op *op = io_uring_cqe_get_data(cqe);
		int res = cqe->res;

		io_uring_cqe_seen(&ring, cqe);
		in_ring--;
		if (res == -EINTR || res == -EAGAIN)
		{
			dlist_push_head(&waiting, &op->node);
			continue;
		}
		if (op->kind == OP_WRITE && res >= 0)
		{
			if (res == 0 && op->len > op->written)
				res = -ENOSPC;
			else
			{
				op->written += res;
				if (op->written < op->len)
				{
					dlist_push_head(&waiting, &op->node);
					continue;
				}
				res = (int) op->written;
			}
		}
		op->result = res;
		dlist_push_tail(&completed, &op->node);
	}
	while (!dlist_is_empty(&waiting))
	{
		Op *op = dlist_container(Op, node, dlist_head_node(&waiting));

		/* off the list first: its links are in the operation */
		dlist_pop_head_node(&waiting);
		if (!prepare(op))
		{
			dlist_push_head(&waiting, &op->node);
			break;
		}
	}
	submit();
}

int
es_uring_reap(void)
{
	int n = 0;
	int limit;

	if (use_ring)
		collect();

	/*
	 * With the sync method a callback that starts its successor completes it at once;
	 * those come with the next call, or one loop could go on for ever.
	 */
	limit = in_flight;
	while (n < limit && !dlist_is_empty(&completed))
	{
		Op		*op = dlist_container(Op, node, dlist_pop_head_node(&completed));
		EsIoDone done = op->done;
		void	*arg = op->arg;
		int		 result = op->result;

		in_flight--;
		dlist_push_head(&free_ops, &op->node);
		n++;
		done(arg, result);
	}
	return n;
}

void
es_uring_shutdown(void)
{
	if (!initialized)
		return;
	while (in_flight > 0)
	{
		if (use_ring && in_ring > 0 && dlist_is_empty(&completed))
		{
			int rc = io_uring_submit_and_wait(&ring, 1);

			if (rc < 0 && rc != -EINTR && rc != -EAGAIN && rc != -EBUSY)
				break;
			unsubmitted = io_uring_sq_ready(&ring) > 0;
		}
		es_uring_reap();
	}
	if (use_ring)
	{
		io_uring_queue_exit(&ring);
		close(event_fd);
		ReleaseExternalFD();
		ReleaseExternalFD();
		event_fd = -1;
		use_ring = false;
	}
	initialized = false;
}
