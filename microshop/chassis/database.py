"""Database per service: each service owns one SQLite file, and no other service opens it.

    ConnectionPool   a few connections to the file, each lent to one thread at a time
    Transaction      statements that are committed together or not at all
    Database         what a service works with: opens, checks, reads and writes the file

The file is in WAL mode: SQLite appends commits to a second file, the write-ahead log, so that
readers and the writer do not wait for each other. Where a folder does not support that, they wait;
and a folder that cannot be written to can still be read.

Law: this module opens, reads and writes databases and knows nothing of what is in them. SQL about
rows appears only in the service that owns them.
"""
import contextlib
import os
import sqlite3
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from microshop.chassis.data_folder import OpenFiles
from microshop.chassis.errors import (
    RETRY_SOON, InsufficientStorage, ServiceError, ServiceUnavailable)

QUEUE_TIMEOUT = 1.5  # seconds to wait for a lock or a connection that another thread holds
BUSY_TIMEOUT = 1.5   # seconds to wait after that for a lock that another process holds
MAX_CHECKED = 2**14  # pages of 4 KiB; to check more for damage would take over a second
MAX_COPY = 64 * 1024 * 1024  # bytes of a copy; until it is sent, it may take twice that memory
OLDEST = (3, 25, 0)  # version of SQLite: older ones cannot rename a column
CONNECTIONS = 16     # in a pool: each holds two file descriptors and about 100 KiB of memory
LOOK = 0.05          # seconds between two checks by readers that the files are still at their paths
POLL = 0.001         # seconds between two attempts to get a connection when all are in use

# SQLite's primary result codes that blame the file and not the statement.
FAULTS: dict[int, type[ServiceError]] = {
    sqlite3.SQLITE_FULL: InsufficientStorage,
    sqlite3.SQLITE_NOLFS: InsufficientStorage,
    sqlite3.SQLITE_PERM: ServiceUnavailable,
    sqlite3.SQLITE_BUSY: ServiceUnavailable,
    sqlite3.SQLITE_LOCKED: ServiceUnavailable,
    sqlite3.SQLITE_READONLY: ServiceUnavailable,
    sqlite3.SQLITE_IOERR: ServiceUnavailable,
    sqlite3.SQLITE_CORRUPT: ServiceUnavailable,
    sqlite3.SQLITE_CANTOPEN: ServiceUnavailable,
    sqlite3.SQLITE_PROTOCOL: ServiceUnavailable,
    sqlite3.SQLITE_NOTADB: ServiceUnavailable,
}

Values = Sequence | dict  # for a statement's placeholders, by position or by name


class DatabaseUnusable(Exception):
    """The file cannot be used; the message says why and what to do, in one line."""


class FileReplaced(sqlite3.OperationalError):
    """The open file is no longer the one at its path, so what is written to it would be lost."""

    sqlite_errorcode = sqlite3.SQLITE_READONLY_DBMOVED  # SQLite's own code for this


class Written(NamedTuple):
    """What a statement did: how many rows it changed, and the id of the last row it inserted."""

    rowcount: int
    lastrowid: int


class ConnectionPool:
    """A few connections to one file: `with pool.lend() as connection:` borrows one.

    Last in, first out: the page cache of the connection that was used last is warm.
    """

    def __init__(self, path: Path):
        self.path = path
        self._is_read_only = is_read_only(path)
        self._files: OpenFiles | None = None
        self._look_at = 0.0  # of time.monotonic
        self._places = [PooledConnection(self) for _ in range(CONNECTIONS)]
        self.idle = self._places.copy()

    def lend(self) -> "PooledConnection":
        """Return a free place, to be used with `with`.

        Raises ServiceUnavailable on a timeout, and FileReplaced.
        """
        now = time.monotonic()
        if now > self._look_at:
            self.check()
            self._look_at = now + LOOK
        while True:
            try:
                return self.idle.pop()
            except IndexError:  # rare, so we poll: a lock would make every read slower
                if time.monotonic() > now + QUEUE_TIMEOUT:
                    raise timed_out(self.path, "a free connection") from None
            time.sleep(POLL)

    def check(self) -> None:
        """Raise FileReplaced if a file is no longer the one that the connections have open."""
        if self._files and self._is_open() and (replaced := self._files.find_replaced()):
            raise FileReplaced(f"{replaced} was removed or replaced while it was open; put it back "
                               "or restart the shop")

    def open(self) -> sqlite3.Connection:
        """Return a new connection to the files that the others have open."""
        self.check()
        uri = f"{self.path.absolute().as_uri()}?immutable={self._is_read_only:d}"
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT, isolation_level=None,
                                     check_same_thread=False)
        try:
            connection.row_factory = sqlite3.Row
            set_wal_mode(connection)
            connection.execute("PRAGMA synchronous = FULL")  # less may lose commits (power failure)
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA schema_version")  # opens the WAL and its index
        except sqlite3.Error:
            connection.close()
            raise
        if not self._is_open():  # this one is the first, or the first again
            self._files = OpenFiles(self.path.parent, [
                self.path.name, f"{self.path.name}-wal", f"{self.path.name}-shm"])
        return connection

    def _is_open(self) -> bool:
        return any(place.connection for place in self._places)

    def close(self) -> None:
        """Write the WAL back into the file, and close every connection that is not in use."""
        idle, self.idle = self.idle, []  # so that no thread borrows one while it is closed
        for pooled in idle:
            pooled.close()
        self.idle.extend(idle)


class PooledConnection:
    """A place in the pool: `with` lends its connection, opened at first use, and takes it back.

    It is a class because contextlib.contextmanager would make every read a fifth slower.
    """

    __slots__ = ("connection", "pool")

    def __init__(self, pool: ConnectionPool):
        self.pool = pool
        self.connection: sqlite3.Connection | None = None

    def __enter__(self) -> sqlite3.Connection:
        try:
            if not self.connection:
                self.connection = self.pool.open()
        except BaseException:
            self.pool.idle.append(self)
            raise
        return self.connection

    def __exit__(self, *_: object) -> None:
        if self.connection and self.connection.in_transaction:  # even its rollback has failed
            self.connection.close()
            self.connection = None
        self.pool.idle.append(self)

    def close(self) -> None:
        if self.connection:
            with contextlib.closing(self.connection), contextlib.suppress(sqlite3.Error):
                # SQLite does this when the last connection closes, but a thread that hangs may
                # still hold one.
                self.connection.execute("PRAGMA wal_checkpoint")
            self.connection = None


class Transaction:
    """A transaction that has begun; its reads see its own writes. See Database.transaction()."""

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection

    def rows(self, statement: str, values: Values = ()) -> list[dict]:
        """Return the rows that a query finds, each as a dict by column."""
        return [dict(row) for row in self._connection.execute(statement, values)]

    def write(self, statement: str, values: Values = ()) -> Written:
        """Execute one statement; return what it did."""
        cursor = self._connection.execute(statement, values)
        return Written(cursor.rowcount, cursor.lastrowid or 0)


@contextlib.contextmanager
def begin(connection: sqlite3.Connection, check: Callable[[], None]) -> Iterator[Transaction]:
    """Commit what is written in the `with` block, durably; roll it back if the block raises.

    IMMEDIATE takes the file's write lock at once. Without it, a transaction that reads first and
    then writes fails at once with SQLITE_BUSY_SNAPSHOT if another one has written in between.

    If `check` raises FileReplaced, nothing is committed. If the WAL alone is gone, earlier commits
    are in no file that has a name: we write them into the database.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield Transaction(connection)
        check()
        connection.execute("COMMIT")
    except BaseException as error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        if isinstance(error, FileReplaced):
            connection.execute("PRAGMA wal_checkpoint")
        raise


class Database:
    """The database file at `path`, in a folder that exists, with the newest version of its schema.

    `versions` holds the statements of each version of the schema, oldest first; `user_version` in
    the file says how many versions have been executed. `has_wal` says whether the folder allows a
    write-ahead log. Raises DatabaseUnusable.
    """

    def __init__(self, path: Path, versions: Sequence[Sequence[str]]):
        self.path = path
        self._pool = ConnectionPool(path)
        self._write_lock = threading.RLock()  # between threads; SQLite has one between processes
        self.copying = threading.Lock()  # held until a copy is sent: each takes much memory
        self._queue: deque[tuple[str, Values, Future[Written]]] = deque()  # writes that wait
        if sqlite3.sqlite_version_info < OLDEST:
            raise DatabaseUnusable(f"microshop needs SQLite {'.'.join(map(str, OLDEST))} or newer; "
                                   f"this Python has {sqlite3.sqlite_version}")
        try:
            self._check()
            self._upgrade(versions)
            self.has_wal = self.rows("PRAGMA journal_mode") == [{"journal_mode": "wal"}]
        except (OSError, sqlite3.Error, DatabaseUnusable) as error:
            self.close()
            advice = "repair or move it, or choose another --data"
            raise DatabaseUnusable(f"cannot use {path}: {error}; {advice}") from error

    def rows(self, statement: str, values: Values = ()) -> list[dict]:
        """Return the rows that a query finds, each as a dict by column."""
        with self._pool.lend() as connection:
            return [dict(row) for row in connection.execute(statement, values)]

    def write(self, statement: str, values: Values = ()) -> Written:
        """Execute one statement, durably; return what it did.

        Writes that wait for the lock at the same time share one commit (group commit), since a
        commit costs more than most statements: the first thread that gets the lock executes them
        all. A statement that breaks a constraint fails alone. Raises ServiceUnavailable on a
        timeout.
        """
        outcome: Future[Written] = Future()
        self._queue.append((statement, values, outcome))
        if self._write_lock.acquire(timeout=QUEUE_TIMEOUT):
            try:
                if not outcome.done():  # else a thread that had the lock before us has executed it
                    self._write_queued()
            finally:
                self._write_lock.release()
        elif outcome.cancel():  # else the thread that has the lock is executing it
            raise timed_out(self.path, "the database lock")
        return outcome.result()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Commit what is written in the `with` block, durably; roll it back if the block raises.

        Raises ServiceUnavailable on a timeout. Threads wait for a lock of ours, which wakes the
        next one at once; if they waited in SQLite, they would sleep and poll.
        """
        if not self._write_lock.acquire(timeout=QUEUE_TIMEOUT):
            raise timed_out(self.path, "the database lock")
        try:
            with (self._pool.lend() as connection,
                  begin(connection, self._pool.check) as transaction):
                yield transaction
        finally:
            self._write_lock.release()

    def copy(self) -> bytes:
        """Return the bytes of a copy: what the file and the WAL hold at this moment, in one file.

        Writes go on meanwhile. Raises InsufficientStorage if there are more bytes than MAX_COPY, or
        no room for them.
        """
        size = pragma(self, "page_count") * pragma(self, "page_size")
        if size > MAX_COPY:
            raise InsufficientStorage(f"{self.path.name} has {size} bytes, more than the {MAX_COPY}"
                                      " that are sent: audit the file itself, with --data")
        try:  # through a file, since some builds of SQLite lack serialize()
            with (self._pool.lend() as connection, tempfile.NamedTemporaryFile() as file,
                  contextlib.closing(sqlite3.connect(file.name)) as copy):
                copy.execute("PRAGMA synchronous = OFF")  # the file need not survive anything
                connection.backup(copy)
                return file.read()
        except (OSError, sqlite3.OperationalError) as error:
            if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_FULL) != sqlite3.SQLITE_FULL:
                raise
            raise InsufficientStorage(
                "there is no room for a copy among the temporary files") from None

    def close(self) -> None:
        """Write the WAL back into the file, and close every connection that is not in use."""
        self._pool.close()

    def to_service_error(self, error: Exception) -> ServiceError | None:
        """Return the error for the client, or None if something else than the file is at fault."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if isinstance(error, sqlite3.OperationalError) and "decode" in str(error):
            code = sqlite3.SQLITE_CORRUPT  # damaged text: sqlite3 gives that error no code
        fault = FAULTS.get(code)
        return fault(f"{self.path.name}: {error}", [RETRY_SOON]) if fault else None

    def _write_queued(self) -> None:
        """Execute every queued write in one transaction; then tell the waiting threads."""
        queued = [self._queue.popleft() for _ in range(len(self._queue))]
        writes = [write for write in queued if write[2].set_running_or_notify_cancel()]
        results: list[Written | Exception]
        try:
            with self.transaction() as transaction:
                results = [attempt(transaction, statement, values)
                           for statement, values, _ in writes]
        except Exception as error:
            results = [error] * len(writes)
        for (_, _, outcome), result in zip(writes, results, strict=True):
            if isinstance(result, Exception):
                outcome.set_exception(result)
            else:
                outcome.set_result(result)

    def _check(self) -> None:
        if pragma(self, "page_count") > MAX_CHECKED:
            return
        found = self.rows("PRAGMA quick_check(1)")[0]["quick_check"]
        if found != "ok":
            raise DatabaseUnusable(f"it is damaged ({found.splitlines()[-1]})")

    def _upgrade(self, versions: Sequence[Sequence[str]]) -> None:
        if pragma(self, "user_version") == len(versions):  # then the start has nothing to write
            return
        with self.transaction() as transaction:
            version = pragma(transaction, "user_version")  # another process may have been faster
            if version > len(versions):
                raise DatabaseUnusable(f"it was written by a newer microshop (its schema version "
                                       f"is {version}, this one knows {len(versions)})")
            for statements in versions[version:]:
                for statement in statements:
                    transaction.write(statement)
            transaction.write(f"PRAGMA user_version = {len(versions)}")


def is_read_only(path: Path) -> bool:
    """Return whether a file cannot change: its folder cannot be written to, and it has no WAL.

    SQLite makes a WAL even to read, unless it is told that the file is immutable.
    """
    has_files = [os.path.exists(file) for file in (path, f"{path}-wal")]
    by_effective_ids = os.access in os.supports_effective_ids
    may_write = os.access(path.parent, os.W_OK, effective_ids=by_effective_ids)
    return has_files == [True, False] and not may_write


def set_wal_mode(connection: sqlite3.Connection) -> None:
    """Choose WAL mode, which writes to the file only if it has another mode. Raises sqlite3.Error.

    SQLite does not wait if another process is changing the mode, as at a first start: so we do.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not is_busy or time.monotonic() > deadline:
                raise
        time.sleep(POLL)


def pragma(database: Database | Transaction, name: str) -> int:
    return database.rows(f"PRAGMA {name}")[0][name]


def attempt(transaction: Transaction, statement: str, values: Values) -> Written | Exception:
    """Execute a statement and return its result.

    If it breaks a constraint, return the error: SQLite has undone only this statement.
    """
    try:
        return transaction.write(statement, values)
    except sqlite3.IntegrityError as error:
        return error


def timed_out(path: Path, what: str) -> ServiceUnavailable:
    return ServiceUnavailable(f"{path.name}: timed out waiting for {what}", [RETRY_SOON])
