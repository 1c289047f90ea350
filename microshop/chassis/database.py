"""One SQLite file per service; who reads or writes is lent one of a few connections for it.

Law: how to open, read and write a database, never what is in it; SQL about rows stands in the
service that owns them.
"""
import contextlib
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from microshop.chassis.errors import InsufficientStorage, ServiceError, ServiceUnavailable

TURN_TIME = 1.5      # seconds that a thread waits for others here
BUSY_TIMEOUT = 1.5   # seconds that it then waits for other processes: both together are less than callers wait
MAX_CHECKED = 2**26  # bytes of a file that is looked through for damage at the start: a second or less
CONNECTIONS = 16     # to a file: each holds two descriptors and 100 KiB, and a read takes microseconds
LOOK = 0.001         # seconds until the next look for one, when all are lent

# SQLite's primary result codes that blame the file, and not what was asked of it.
FAULTS: dict[int, type[ServiceError]] = {
    sqlite3.SQLITE_FULL: InsufficientStorage,
    **dict.fromkeys((sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR,
                     sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOTADB), ServiceUnavailable)}


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
        # The one given back last is lent first: its pages are at hand. A None stands for one that is not open yet.
        self._idle: list[sqlite3.Connection | None] = [None] * CONNECTIONS
        self._writer = threading.RLock()  # of this process; others are kept out by the file's lock
        self._waiting: deque[tuple[str, Sequence | dict, list]] = deque()  # statements, and where their outcome goes
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.connection().execute("PRAGMA journal_mode = WAL")
            if path.stat().st_size <= MAX_CHECKED:
                self._check()
            self._upgrade(versions)
        except (OSError, sqlite3.Error, DatabaseUnusable) as error:
            self.close()
            reason = f"{path.parent} is not a folder" if isinstance(error, FileExistsError) else error
            raise DatabaseUnusable(f"cannot use {path}: {reason}; mend or move it, or choose another --data") from error

    def connection(self) -> sqlite3.Connection:
        """Return the connection that this thread has, or is lent until release(). Raises ServiceUnavailable."""
        if connection := getattr(self._local, "connection", None):
            return connection
        lent = self._take()
        try:
            self._local.connection = connection = lent or self._open()
        except sqlite3.Error:
            self._idle.append(None)
            raise
        return connection

    def release(self) -> None:
        """Give this thread's connection back, if it has one."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection:
            self._local.connection = None
            if connection.in_transaction:  # which could not even be rolled back, but by this
                connection.close()
                connection = None
            self._idle.append(connection)

    def close(self) -> None:
        """Write what the WAL holds into the file, and close every connection that nobody is using."""
        self.release()
        idle, self._idle = self._idle, [None] * CONNECTIONS
        for connection in filter(None, idle):
            with contextlib.closing(connection), contextlib.suppress(sqlite3.Error):
                connection.execute("PRAGMA wal_checkpoint")  # closing does so too, unless a thread hangs

    def rows(self, statement: str, values: Sequence | dict = ()) -> list[dict]:
        """Return what a query finds, each row as a dict by column."""
        connection = self.connection()
        try:
            return [dict(row) for row in connection.execute(statement, values)]
        finally:
            if not connection.in_transaction:
                self.release()

    def write(self, statement: str, values: Sequence | dict = ()) -> Written:
        """Carry out one statement, durably.

        A commit costs more than most statements, so those that wait for their turn at the same time share one
        (group commit): whoever is first in line does it for all. One that breaks a constraint fails alone.
        """
        outcome: list[Written | Exception] = []
        self._waiting.append((statement, values, outcome))
        with self._writer:
            if not outcome:  # else who had the lock before has done it
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
        if not self._writer.acquire(timeout=TURN_TIME):
            raise self._busy()
        try:
            connection = self.connection()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        finally:
            self.release()
            self._writer.release()

    def explain(self, error: Exception) -> ServiceError | None:
        """Return what to tell a client where the file is at fault; None where something else is."""
        if isinstance(error, ServiceError):
            return error
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if isinstance(error, sqlite3.OperationalError) and "decode" in str(error):  # damaged text comes without a code
            code = sqlite3.SQLITE_CORRUPT
        kind = FAULTS.get(code)
        return kind(f"{self.path.name}: {error}", [("Retry-After", "1")]) if kind else None

    def _take(self) -> sqlite3.Connection | None:
        deadline = time.monotonic() + TURN_TIME
        while True:
            try:
                return self._idle.pop()
            except IndexError:
                if time.monotonic() > deadline:
                    raise self._busy() from None
            time.sleep(LOOK)

    def _busy(self) -> ServiceError:
        return ServiceUnavailable(f"{self.path.name}: it is busy for too long", [("Retry-After", "1")])

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
        try:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA synchronous = FULL")  # WAL with less may lose a commit at power loss
            connection.execute("PRAGMA foreign_keys = ON")
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _check(self) -> None:
        found = self.connection().execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise DatabaseUnusable(f"it is damaged ({found.splitlines()[-1]})")

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
