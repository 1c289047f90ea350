"""One SQLite file per service, each thread on a connection of its own.

Law: how to open, read and write a database, never what is in it; SQL about rows stands in the
service that owns them.
"""
import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

BUSY_TIMEOUT = 5.0  # seconds that a writer waits for another


class DatabaseUnusable(Exception):
    """The file cannot serve; says which, why and what to do, in one line."""


class Database:
    """The database at `path`, brought to the newest version of its schema.

    `versions` holds the statements of each version of the schema, oldest first; a file's
    `user_version` counts those that it has had. Raises DatabaseUnusable.
    """

    def __init__(self, path: Path, versions: Sequence[Sequence[str]]):
        self.path = path
        self._local = threading.local()
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

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Commit what is done within, durably; undo it all where it raises.

        IMMEDIATE takes the write lock at once: a transaction that reads first and then writes would
        fail with SQLITE_BUSY_SNAPSHOT when another has written meanwhile, busy_timeout or not.
        """
        connection = self.connection()
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _upgrade(self, versions: Sequence[Sequence[str]]) -> None:
        with self.transaction() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > len(versions):
                raise DatabaseUnusable(f"a newer microshop wrote it (schema {version}, this one knows {len(versions)})")
            for statement in (statement for statements in versions[version:] for statement in statements):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {len(versions)}")
