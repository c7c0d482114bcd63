/*
 * reaper COMMAND ARGUMENT...
 *
 * Runs the command and exits with its status, and stays behind, unseen, to collect the exit status of
 * whatever the command left running, until the last of it is gone.
 *
 * Why: a server that is killed with SIGKILL is a child of process 1, and where that does not collect its
 * children (many containers), it stays a zombie for good. PostgreSQL takes the pid in postmaster.pid for a
 * running server then and refuses to start again.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

/* Exit status as a shell would show it. */
static int
shell_status(int status)
{
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* Becomes the parent of all orphans below it; writes the command's exit status to `report`. */
static void
reap(char **command, int report)
{
	pid_t		main_child;
	pid_t		pid;
	int			status;

	if (prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0)
		perror("reaper: prctl");
	main_child = fork();
	if (main_child == 0)
	{
		close(report);
		execvp(command[0], command);
		fprintf(stderr, "reaper: %s: %s\n", command[0], strerror(errno));
		_exit(127);
	}
	/* A Ctrl-C is for the command. */
	signal(SIGINT, SIG_IGN);
	signal(SIGTERM, SIG_IGN);
	signal(SIGHUP, SIG_IGN);
	while ((pid = wait(&status)) > 0 || errno == EINTR)
	{
		unsigned char code = (unsigned char) shell_status(status);

		if (pid != main_child)
			continue;
		if (write(report, &code, 1) != 1)
			_exit(1);
		/* Whoever reads our output must see its end. */
		for (int fd = 0; fd < 256; fd++)
			close(fd);
	}
}

int
main(int argc, char **argv)
{
	int			fds[2];
	unsigned char code = 127;

	if (argc < 2 || pipe(fds) != 0)
	{
		fprintf(stderr, "usage: reaper COMMAND ARGUMENT...\n");
		return 2;
	}
	switch (fork())
	{
		case -1:
			perror("reaper: fork");
			return 1;
		case 0:
			close(fds[0]);
			reap(argv + 1, fds[1]);
			_exit(0);
	}
	close(fds[1]);
	while (read(fds[0], &code, 1) < 0 && errno == EINTR)
		;
	return code;
}
