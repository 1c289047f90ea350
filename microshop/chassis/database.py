"""One SQLite file per service, each thread on a connection of its own.

Law: how to open, read and write a database, never what is in it; SQL about rows stands in the
service that owns them.
"""
import contextlib
import sqlite3
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

BUSY_TIMEOUT = 5.0  # seconds that a writer waits for another


class DatabaseUnusable(Exception):
    """The file cannot serve; says which, why and what to do, in one line."""


class Written(NamedTuple):
    """What a statement did: how many rows it changed or added, and the id of the last added if it was any."""

    rowcount: int
    lastrowid: int


class Database:
    """The database at `path`, brought to the newest version of its schema.

    `versions` holds the statements of each version of the schema, oldest first; a file's
    `user_version` counts those that it has had. Raises DatabaseUnusable.
    """

    def __init__(self, path: Path, versions: Sequence[Sequence[str]]):
        self.path = path
        self._local = threading.local()
        self._writer = threading.RLock()  # of this process; others are kept out by the file's lock
        self._waiting: deque[tuple[str, Sequence | dict, list]] = deque()  # statements, and where their outcome goes
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.connection().execute("PRAGMA journal_mode = WAL")
            self._upgrade(versions)
        except (OSError, sqlite3.Error, DatabaseUnusable) as error:
            self.close()
            reason = f"{path.parent} is not a folder" if isinstance(error, FileExistsError) else error
            raise DatabaseUnusable(f"cannot use {path}: {reason}; mend or move it, or choose another --data") from error

    def connection(self) -> sqlite3.Connection:
        """Return this thread's connection, opened at its first use."""
        try:
            return self._local.connection
        except AttributeError:
            connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT, isolation_level=None)
        try:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA synchronous = FULL")  # WAL with less may lose a commit at power loss
            connection.execute("PRAGMA foreign_keys = ON")
        except sqlite3.Error:
            connection.close()
            raise
        self._local.connection = connection
        return connection

    def close(self) -> None:
        """Close this thread's connection, if it has one; the last to close tidies the file up."""
        if connection := self._local.__dict__.pop("connection", None):
            connection.close()

    def rows(self, statement: str, values: Sequence | dict = ()) -> list[dict]:
        """Return what a query finds, each row as a dict by column."""
        return [dict(row) for row in self.connection().execute(statement, values)]

    def write(self, statement: str, values: Sequence | dict = ()) -> Written:
        """Carry out one statement, durably.

        A commit costs more than most statements, so those that wait for their turn at the same time share one
        (group commit): whoever is first in line does it for all. One that breaks a constraint fails alone.
        """
        outcome: list[Written | Exception] = []
        self._waiting.append((statement, values, outcome))
        with self._writer:
            if not outcome:
                self._write_waiting()
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Commit what is done within, durably; undo it all where it raises.

        Threads queue at a lock of our own: SQLite would let them sleep between one try and the next.
        IMMEDIATE takes the file's write lock at once: a transaction that reads first and then writes would
        fail with SQLITE_BUSY_SNAPSHOT when another has written meanwhile, busy_timeout or not.
        """
        connection = self.connection()
        with self._writer:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def _write_waiting(self) -> None:
        waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        results: list[Written | Exception] = []
        try:
            with self.transaction() as connection:
                for statement, values, _ in waiting:
                    try:
                        cursor = connection.execute(statement, values)
                        results.append(Written(cursor.rowcount, cursor.lastrowid or 0))
                    except sqlite3.IntegrityError as error:  # which has undone this statement alone
                        results.append(error)
        except Exception as error:
            results = [error] * len(waiting)
        for (_, _, outcome), result in zip(waiting, results, strict=True):
            outcome.append(result)

    def _upgrade(self, versions: Sequence[Sequence[str]]) -> None:
        with self.transaction() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > len(versions):
                raise DatabaseUnusable(f"a newer microshop wrote it (schema {version}, this one knows {len(versions)})")
            for statement in (statement for statements in versions[version:] for statement in statements):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {len(versions)}")
