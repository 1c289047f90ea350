"""The data folder: one shop at a time, and the files that were opened in it.

Two shops on one folder would change the same data without knowing of each other. And what is
written to a file that was removed while it was open is lost when it is closed.

Law: nothing here knows what is in the files.
"""
import fcntl
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

RESOLUTION = 2.0  # seconds: the coarsest of the times that file systems keep


class FolderUnusable(Exception):
    """The folder cannot be used; the message says why and what to do, in one line."""


Identity = tuple[int, int]  # of a file: its device and its inode number


class OpenFiles:
    """Files of a folder that are open; notices when one is no longer at its path.

    A folder is changed whenever a file in it is made, renamed or removed. As long as it is not, its
    files are still those that were found last, and one system call tells.
    """

    def __init__(self, folder: Path, names: Sequence[str]):
        self._folder = str(folder)
        self._opened = {name: identify(f"{folder}/{name}") for name in names}
        self._changed: tuple[Identity, int] | None = None

    def find_replaced(self) -> str:
        """Return the name of a file that was removed or replaced, or "" if there is none."""
        changed = last_changed(self._folder)
        if changed and changed == self._changed:
            return ""
        for name, opened in self._opened.items():
            if identify(f"{self._folder}/{name}") != opened:
                return name
        self._changed = changed
        return ""


def identify(path: str) -> Identity | None:
    """Return what tells the file at a path from any other; None if there is none.

    A file that is removed keeps its inode number while it is open, so no other file gets that.
    """
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def last_changed(folder: str) -> tuple[Identity, int] | None:
    """Return which folder is at a path, and when it was changed, in nanoseconds.

    None if there is none, or if that was so recently that a further change may get the same time.
    It is the ctime, since tools that copy a folder back may set the time of its modification back.
    """
    try:
        found = os.stat(folder)
    except OSError:
        return None
    if time.time() - found.st_ctime < RESOLUTION:
        return None
    return (found.st_dev, found.st_ino), found.st_ctime_ns


def missing_files(folder: Path, services: Iterable[str]) -> list[str]:
    """Return the names of the services' databases that a folder lacks, or that we may not see."""
    names = [f"{service}.db" for service in services]
    return [name for name in names if not os.path.exists(folder / name)]


def claim(folder: Path, shared: bool) -> int:
    """Claim a folder, which is made if it does not exist; return a descriptor to keep open.

    Any number of processes may hold a shared claim, or one process a claim that is not shared. It
    ends when the descriptor is closed, so also with the process. Raises FolderUnusable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise FolderUnusable(
            f"cannot use the folder {folder}: {error.strerror}; choose another --data") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))
    except BlockingIOError:
        os.close(descriptor)
        raise FolderUnusable(f"another shop, or a service that runs alone, uses the folder "
                             f"{folder}; stop it, or choose another --data") from None
    except OSError:  # this file system has no such locks: go on without
        pass
    return descriptor
