"""What a process finds when it starts, and repairs: standard streams, signals and limits.

A process inherits them from its parent, which may be a cron job, an init system or a bare exec().
Each main() calls prepare() first.

Law: what only helps is not required: if the system refuses it, the process goes on without it.
"""
import contextlib
import os
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any

MOST_FILES = 10_240


def prepare() -> None:
    """Repair what this process has inherited."""
    open_missing_streams()
    accept_any_text()
    reset_signals()
    raise_file_limit()


def open_missing_streams() -> None:
    """Open /dev/null in place of each closed standard stream, so that no socket gets its number."""
    while (stream := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(stream)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # None: it was closed when Python began
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


def accept_any_text() -> None:
    """Let our streams write what their encoding does not have as an escape, like \\xe9.

    A message may name a folder whose letters the user's locale does not know.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # it is no text file, as in a test
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def discard_output() -> None:
    """Discard what could not be printed: else Python would try it again at its end, and fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def reset_signals() -> None:
    """Undo what a parent has set and exec() keeps: ignored and blocked signals.

    An ignored SIGCHLD would lose the exit status of our children; a blocked SIGTERM never comes.
    SIGHUP is left ignored, as after nohup, and becomes so if it was blocked.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if signal.SIGHUP in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, exit_at_once)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def exit_at_once(number: int, frame: Any) -> None:
    """End a process that has not begun its work yet; later it sets its own handlers.

    Without a handler, Ctrl-C would print a traceback, and SIGTERM would be lost where the process
    is the first of a container.
    """
    sys.exit(128 + number)


@contextlib.contextmanager
def hangup_blocked() -> Iterator[None]:
    """Block SIGHUP: a process that is started within ignores it from its first moment."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def raise_file_limit() -> None:
    """Allow as many open files as the system does: the usual 1,024 are too few, but will do.

    macOS says that there is no limit, and then refuses more than MOST_FILES.
    """
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (hard_limit, max(soft_limit, MOST_FILES)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard_limit))
            return
