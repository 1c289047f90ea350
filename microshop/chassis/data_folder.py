"""The data folder: one shop at a time, and the files that were opened in it.

Two shops on one folder would change the same data without knowing of each other. And what is
written to a file that was removed while it was open is lost when it is closed.

Law: nothing here knows what is in the files.
"""
import fcntl
import os
from pathlib import Path


class FolderUnusable(Exception):
    """The folder cannot be used; the message says why and what to do, in one line."""


Identity = tuple[int, int]  # of a file: its device and its inode number


def identify(path: str) -> Identity | None:
    """Return what tells the file at a path from any other; None if there is none.

    A file that is removed keeps its inode number while it is open, so no other file gets that.
    """
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


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
    except OSError:  # this file system has no such locks, which are a help and no condition
        pass
    return descriptor
