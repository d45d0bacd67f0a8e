"""The exit status of commands, and of jobs that run in a worker process."""

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2  # bad input
EXIT_BUSY = 3  # in use by another process
EXIT_INTERRUPTED = 130
EXIT_STOPPED = 143  # by a signal, to be gone on with; as a shell has it for SIGTERM
