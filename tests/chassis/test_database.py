"""Database: schema versions, durability, transactions, group commit, and unusable files."""
import contextlib
import os
import shutil
import sqlite3
import tempfile
import threading
import unittest
from functools import partial
from pathlib import Path
from unittest import mock

from microshop.chassis import database
from microshop.chassis.database import ConnectionPool, Database, DatabaseUnusable, Written
from microshop.chassis.errors import InsufficientStorage, ServiceUnavailable
from tests.helpers import PATIENCE, together, wait_until

VERSION_1 = (
    "CREATE TABLE cats (id INTEGER PRIMARY KEY, name TEXT NOT NULL)",
    "INSERT INTO cats VALUES (1, 'Mia')")
VERSION_2 = ("ALTER TABLE cats ADD lives INTEGER NOT NULL DEFAULT 9",)


class CatsTest(unittest.TestCase):
    """What the tests share: a path in a temporary folder, and a database of cats."""

    def setUp(self):
        folder = self.enterContext(tempfile.TemporaryDirectory())
        self.path = Path(folder) / "cats.db"

    def open(self, *versions):
        opened = Database(self.path, versions or [VERSION_1])
        self.addCleanup(opened.close)
        return opened

    def count_cats(self, cats):
        return cats.rows("SELECT count(*) AS cats FROM cats")[0]["cats"]

    def names(self, cats):
        return [row["name"] for row in cats.rows("SELECT name FROM cats ORDER BY id")]


class SchemaTest(CatsTest):
    def test_the_first_start_fills_the_tables_and_the_second_keeps_them(self):
        self.open().write("INSERT INTO cats VALUES (2, 'Tom')")
        self.assertEqual(self.names(self.open()), ["Mia", "Tom"])

    def test_an_older_file_is_upgraded(self):
        self.open(VERSION_1).close()
        newer = self.open(VERSION_1, VERSION_2)
        self.assertEqual(newer.rows("SELECT * FROM cats"), [{"id": 1, "name": "Mia", "lives": 9}])
        self.assertEqual(newer.rows("PRAGMA user_version"), [{"user_version": 2}])

    def test_a_failed_upgrade_leaves_the_file_as_it_was(self):
        self.open(VERSION_1).close()
        with self.assertRaises(DatabaseUnusable):
            Database(self.path, [VERSION_1, ("INSERT INTO cats VALUES (7, 'x')", "nonsense")])
        self.assertEqual(self.names(self.open(VERSION_1)), ["Mia"])

    def test_eight_first_starts_at_once_fill_the_tables_once(self):
        def start():
            Database(self.path, [VERSION_1]).close()

        with mock.patch.object(database, "BUSY_TIMEOUT", PATIENCE):
            self.assertEqual(together(*[start] * 8), [None] * 8, "a start failed")
        self.assertEqual(self.count_cats(self.open()), 1)

    def test_a_first_start_waits_while_another_process_writes_to_the_new_file(self):
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            other.execute("CREATE TABLE dogs (name)")  # the file is not in WAL mode yet
            other.execute("BEGIN IMMEDIATE")
            with mock.patch.object(database.time, "sleep", lambda seconds: other.rollback()):
                self.assertEqual(self.names(self.open()), ["Mia"])


class LockedTest(CatsTest):
    """Another process, like a backup, holds the write lock of the file."""

    def setUp(self):
        super().setUp()
        self.open().close()
        self.enterContext(mock.patch.object(database, "BUSY_TIMEOUT", 0.05))
        other = sqlite3.connect(self.path, isolation_level=None)
        self.enterContext(contextlib.closing(other))
        other.execute("BEGIN EXCLUSIVE")

    def test_a_locked_file_is_opened_and_read_since_a_start_does_not_write(self):
        self.assertEqual(self.names(self.open()), ["Mia"])

    def test_a_locked_file_that_must_be_upgraded_is_refused(self):
        with self.assertRaisesRegex(DatabaseUnusable, "locked"):
            Database(self.path, [VERSION_1, VERSION_2])


class SettingsTest(CatsTest):
    def test_commits_are_durable_and_foreign_keys_are_enforced(self):
        cats = self.open()
        for pragma, column, value in (
                ("journal_mode", "journal_mode", "wal"), ("synchronous", "synchronous", 2),
                ("foreign_keys", "foreign_keys", 1), ("busy_timeout", "timeout", 1500)):
            with self.subTest(pragma):
                self.assertEqual(cats.rows(f"PRAGMA {pragma}"), [{column: value}])

    def test_closing_writes_the_wal_into_the_file_although_another_connection_is_open(self):
        cats = self.open()
        reading = sqlite3.connect(self.path)
        self.addCleanup(reading.close)
        reading.execute("SELECT * FROM cats").fetchall()
        cats.write("INSERT INTO cats VALUES (2, 'Tom')")
        cats.close()
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(self.path, folder)  # without its -wal
            with contextlib.closing(sqlite3.connect(f"{folder}/cats.db")) as alone:
                self.assertEqual(alone.execute("SELECT count(*) FROM cats").fetchall(), [(2,)])

    def test_closing_leaves_no_other_file_than_the_database(self):
        self.open().close()
        self.assertEqual([path.name for path in self.path.parent.iterdir()], ["cats.db"])

    def test_a_closed_database_opens_its_file_again_when_it_is_used(self):
        cats = self.open()
        cats.close()
        self.assertEqual(self.names(cats), ["Mia"])


class ConnectionPoolTest(CatsTest):
    def setUp(self):
        super().setUp()
        self.cats = self.open()
        self.pool = ConnectionPool(self.path)
        self.addCleanup(self.pool.close)

    def lend_all(self):
        """Lend every connection until the stack that is returned is closed."""
        stack = self.enterContext(contextlib.ExitStack())
        for _ in range(database.CONNECTIONS):
            stack.enter_context(self.pool.lend())
        return stack

    def test_two_borrowers_get_two_connections_with_the_same_settings(self):
        with self.pool.lend() as one, self.pool.lend() as other:
            self.assertIsNot(one, other)
            for connection in (one, other):
                for pragma, value in (("foreign_keys", 1), ("synchronous", 2)):
                    found = connection.execute(f"PRAGMA {pragma}").fetchone()[0]
                    self.assertEqual(found, value, pragma)

    def test_the_connection_that_was_returned_last_is_lent_first(self):
        with self.pool.lend():
            with self.pool.lend() as returned_first:
                pass
            with self.pool.lend() as again:
                self.assertIs(again, returned_first)
        with self.pool.lend() as returned_last:
            self.assertIsNot(returned_last, returned_first)

    def test_thirty_threads_share_the_few_connections_of_a_pool(self):
        opened, open_connection = [], ConnectionPool.open

        def count(pool):
            opened.append(pool)
            return open_connection(pool)

        def read():
            for _ in range(20):
                self.assertEqual(self.count_cats(self.cats), 1)

        self.cats.close()
        with (mock.patch.object(database, "QUEUE_TIMEOUT", PATIENCE),
              mock.patch.object(ConnectionPool, "open", count)):
            self.assertEqual(together(*[read] * 30), [None] * 30)
        self.assertTrue(1 <= len(opened) <= database.CONNECTIONS,
                        f"{len(opened)} connections were opened")

    def test_a_connection_that_is_left_within_a_transaction_is_not_lent_again(self):
        with self.pool.lend() as spoilt:
            spoilt.execute("BEGIN IMMEDIATE")
        with self.pool.lend() as other:
            self.assertIsNot(other, spoilt)
        self.cats.write("INSERT INTO cats VALUES (2, 'Tom')")  # its lock is released
        self.assertEqual(self.count_cats(self.cats), 2)

    def test_a_borrower_waits_until_a_connection_is_returned(self):
        stack, waits = self.lend_all(), threading.Event()

        def read():
            with self.pool.lend() as connection:
                return connection.execute("SELECT name FROM cats").fetchone()["name"]

        def give_back():
            waits.wait(PATIENCE)
            stack.close()

        clock = mock.Mock(monotonic=lambda: 0.0, sleep=lambda _: waits.set())
        with mock.patch.object(database, "time", clock):
            self.assertEqual(together(read, give_back), ["Mia", None])

    def test_a_connection_that_cannot_be_opened_for_whatever_reason_uses_up_no_place(self):
        reason = FileNotFoundError("the working directory was removed")
        with mock.patch.object(ConnectionPool, "open", side_effect=reason):
            with self.assertRaises(FileNotFoundError), self.pool.lend():
                pass
        self.lend_all()

    def test_a_borrower_who_waits_too_long_gets_a_503_and_may_come_back(self):
        stack = self.lend_all()
        with mock.patch.object(database, "QUEUE_TIMEOUT", 0):
            with self.assertRaisesRegex(ServiceUnavailable, "waiting for a free connection"):
                self.pool.lend()
        stack.close()
        with self.pool.lend() as connection:
            self.assertEqual(len(connection.execute("SELECT * FROM cats").fetchall()), 1)


class TransactionTest(CatsTest):
    def test_a_transaction_reads_what_it_has_written_and_others_do_not_yet(self):
        cats = self.open()
        with cats.transaction() as transaction:
            transaction.write("INSERT INTO cats VALUES (2, 'Tom')")
            self.assertEqual(self.names(transaction), ["Mia", "Tom"])
            self.assertEqual(self.names(cats), ["Mia"])
        self.assertEqual(self.names(cats), ["Mia", "Tom"])

    def test_a_transaction_that_raises_is_rolled_back(self):
        cats = self.open()
        with self.assertRaises(ZeroDivisionError), cats.transaction() as transaction:
            transaction.write("DELETE FROM cats")
            1 / 0  # noqa: B018
        self.assertEqual(self.names(cats), ["Mia"])

    def test_transactions_that_read_first_and_then_write_lose_no_update(self):
        cats = self.open(VERSION_1, VERSION_2)

        def lose_lives():
            for _ in range(20):
                with cats.transaction() as transaction:
                    lives = transaction.rows("SELECT lives FROM cats")[0]["lives"]
                    transaction.write("UPDATE cats SET lives = ?", [lives - 1])

        with mock.patch.object(database, "QUEUE_TIMEOUT", PATIENCE):
            self.assertEqual(together(*[lose_lives] * 4), [None] * 4)
        self.assertEqual(cats.rows("SELECT lives FROM cats"), [{"lives": 9 - 80}])

    def test_a_single_write_within_a_transaction_fails_and_does_not_hang(self):
        def write_within():
            with cats.transaction():
                cats.write("INSERT INTO cats VALUES (2, 'Tom')")

        with mock.patch.object(database, "BUSY_TIMEOUT", 0):
            cats = self.open()
            error, = together(write_within)
        self.assertRegex(str(error), "locked")
        self.assertEqual(self.names(cats), ["Mia"])


class WatchedLock:
    """A lock that counts the threads which have come to it."""

    def __init__(self):
        self.lock, self.arrived = threading.RLock(), threading.Semaphore(0)

    def acquire(self, timeout=-1):
        self.arrived.release()
        return self.lock.acquire(timeout=timeout)

    def release(self):
        self.lock.release()

    def __enter__(self):
        self.acquire()

    def __exit__(self, *_):
        self.release()


class WriteTest(CatsTest):
    def setUp(self):
        # With no busy timeout, a write fails if SQLite's lock, and not ours, keeps threads apart.
        self.enterContext(mock.patch.multiple(
            database, BUSY_TIMEOUT=0, CONNECTIONS=20, QUEUE_TIMEOUT=PATIENCE))
        super().setUp()
        self.cats = self.open()

    def write_in_line(self, *writes):
        """Let writes wait for a transaction; return their outcomes, and how many commits they took.

        An outcome is what write() returned or raised.
        """
        lock, began, statements = WatchedLock(), threading.Event(), []

        def hold():
            with self.cats.transaction() as transaction:
                began.set()
                for _ in range(1 + len(writes)):  # this transaction has come to the lock as well
                    self.assertTrue(lock.arrived.acquire(timeout=PATIENCE), "a write did not come")
                transaction.write("INSERT INTO cats (name) VALUES ('Last')")

        def write(*write):
            began.wait(PATIENCE)
            return self.cats.write(*write)

        with self.cats._pool.lend() as connection:  # the only one that is open; all use it
            connection.set_trace_callback(statements.append)
        with mock.patch.object(self.cats, "_write_lock", lock):
            held, *outcomes = together(hold, *[partial(write, *each) for each in writes])
        self.assertIsNone(held)
        return outcomes, statements.count("COMMIT") - 1

    def test_a_write_returns_how_many_rows_it_changed_and_the_last_id(self):
        self.assertEqual(
            self.cats.write("INSERT INTO cats VALUES (7, ?)", ["Tom"]), Written(1, 7))
        self.assertEqual(
            self.cats.write("INSERT INTO cats (name) VALUES (:name), ('Kim')", {"name": "Ben"}),
            Written(2, 9))
        for statement, values, count in (
                ("UPDATE cats SET name = 'Leo' WHERE id > ?", [6], 3),
                ("DELETE FROM cats WHERE id = ?", [5], 0)):
            self.assertEqual(self.cats.write(statement, values).rowcount, count, statement)
        self.assertEqual(self.names(self.cats), ["Mia", "Leo", "Leo", "Leo"])

    def test_a_write_that_fails_raises_and_the_next_one_succeeds(self):
        for statement, error in (
                ("INSERT INTO cats VALUES (1, 'Mia again')", sqlite3.IntegrityError),
                ("INSERT INTO dogs VALUES (1, 'Rex')", sqlite3.OperationalError)):
            with self.subTest(statement), self.assertRaises(error):
                self.cats.write(statement)
        self.cats.write("INSERT INTO cats VALUES (2, 'Tom')")
        self.assertEqual(self.names(self.cats), ["Mia", "Tom"])

    def test_other_connections_see_a_write_as_soon_as_it_returns(self):
        self.cats.write("INSERT INTO cats VALUES (2, 'Tom')")
        with contextlib.closing(sqlite3.connect(self.path)) as other:
            self.assertEqual(other.execute("SELECT count(*) FROM cats").fetchall(), [(2,)])

    def test_concurrent_writes_and_transactions_lose_nothing(self):
        insert = "INSERT INTO cats (name) VALUES (?)"

        def write(name):
            return [(self.cats.write(insert, [name]).lastrowid, name) for _ in range(20)]

        def transact(name):
            added = []
            for _ in range(20):
                with self.cats.transaction() as transaction:
                    added.append((transaction.write(insert, [name]).lastrowid, name))
            return added

        outcomes = together(*[partial(write, name) for name in ("Tom", "Kim", "Ben", "Leo")],
                            *[partial(transact, name) for name in ("Ida", "Eva")])
        returned = sorted(row for rows in outcomes for row in rows)
        stored = self.cats.rows("SELECT * FROM cats WHERE id > 1")
        self.assertEqual([(row["id"], row["name"]) for row in stored], returned)
        self.assertEqual(len(returned), 6 * 20)

    def test_writes_that_wait_for_a_transaction_share_one_commit(self):
        kittens = [f"Kitten {n}" for n in range(10)]
        outcomes, commits = self.write_in_line(
            *[("INSERT INTO cats (name) VALUES (?)", [name]) for name in kittens])
        self.assertEqual([outcome.rowcount for outcome in outcomes], [1] * 10)
        self.assertEqual(commits, 1)
        names = self.names(self.cats)
        self.assertEqual(names[:2], ["Mia", "Last"])
        self.assertEqual([names[outcome.lastrowid - 1] for outcome in outcomes], kittens)

    def test_of_writes_that_share_a_commit_one_that_breaks_a_constraint_fails_alone(self):
        outcomes, commits = self.write_in_line(
            ("INSERT INTO cats VALUES (7, 'Tom')",),
            ("INSERT INTO cats VALUES (8, NULL)",),
            ("INSERT INTO cats VALUES (9, 'Kim')",),
            ("INSERT INTO cats VALUES (10, 'Half'), (1, 'Mia')",))
        self.assertEqual(outcomes[::2], [Written(1, 7), Written(1, 9)])
        for outcome, constraint in zip(outcomes[1::2], ("NOT NULL", "UNIQUE"), strict=True):
            self.assertIsInstance(outcome, sqlite3.IntegrityError)
            self.assertIn(constraint, str(outcome))
        self.assertEqual(commits, 1)
        self.assertEqual(self.names(self.cats), ["Mia", "Last", "Tom", "Kim"])

    def test_a_write_that_waits_too_long_for_a_transaction_is_503_and_is_not_done_later(self):
        with self.cats.transaction(), mock.patch.object(database, "QUEUE_TIMEOUT", 0.01):
            error, = together(
                partial(self.cats.write, "INSERT INTO cats (name) VALUES ('Late')"))
            self.assertIsInstance(error, ServiceUnavailable)
        self.cats.write("INSERT INTO cats (name) VALUES ('Tom')")  # executes what is queued
        self.assertEqual(self.names(self.cats), ["Mia", "Tom"])

    def test_of_writes_that_share_a_commit_all_fail_on_a_full_disk(self):
        small = "INSERT INTO cats (name) VALUES ('Tom')"
        large = "INSERT INTO cats (name) VALUES (hex(zeroblob(9999)))"
        self.cats.rows("PRAGMA max_page_count = 1")
        outcomes, _ = self.write_in_line(*[(small,)] * 5, (large,))
        for outcome in outcomes:
            self.assertIsInstance(outcome, sqlite3.OperationalError)
            self.assertIn("full", str(outcome))
        self.assertEqual(self.names(self.cats), ["Mia", "Last"])
        self.assertEqual(self.cats.write("INSERT INTO cats (name) VALUES ('Kim')").rowcount, 1)


class CopyTest(CatsTest):
    def names_in(self, copy):
        """Return the names of the cats in a copy, which is one file without a WAL."""
        path = self.path.with_name("copy.db")
        path.write_bytes(copy)
        uri = f"{path.as_uri()}?mode=ro&immutable=1"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            return [name for (name,) in connection.execute("SELECT name FROM cats ORDER BY id")]

    def test_a_copy_has_what_was_committed_last_which_is_only_in_the_wal(self):
        cats = self.open()
        cats.rows("PRAGMA wal_checkpoint")
        cats.write("INSERT INTO cats VALUES (2, 'Tom')")
        self.assertEqual(self.names_in(self.path.read_bytes()), ["Mia"], "the file without its WAL")
        self.assertEqual(self.names_in(cats.copy()), ["Mia", "Tom"], "the copy")

    def test_a_copy_neither_waits_for_a_transaction_nor_shows_what_that_has_written(self):
        cats = self.open()
        cats.rows("PRAGMA wal_checkpoint")
        with cats.transaction() as transaction:
            transaction.write("INSERT INTO cats VALUES (2, 'Tom')")
            [copy] = together(cats.copy)
            self.assertEqual(self.names_in(copy), ["Mia"])

    def test_a_file_that_is_too_large_to_be_copied_is_507_and_its_size_is_named(self):
        cats = self.open()
        size = len(cats.copy())
        with mock.patch.object(database, "MAX_COPY", size):
            self.assertEqual(len(cats.copy()), size)
        refusal = f"^cats.db has {size} bytes, more than the {size - 1} that are sent: "
        with (mock.patch.object(database, "MAX_COPY", size - 1),
              self.assertRaisesRegex(InsufficientStorage, refusal)):
            cats.copy()

    def test_a_copy_for_which_there_is_no_room_is_507(self):
        cats = self.open()
        full = sqlite3.OperationalError("database or disk is full")
        full.sqlite_errorcode = sqlite3.SQLITE_FULL
        for error in (full, FileNotFoundError("No usable temporary directory found")):
            with (self.subTest(error), mock.patch.object(
                    tempfile, "NamedTemporaryFile", side_effect=error),
                  self.assertRaisesRegex(InsufficientStorage, "no room for a copy")):
                cats.copy()

    def test_a_copy_gives_its_connection_back_and_leaves_no_other_file(self):
        cats = self.open()
        folder = self.path.with_name("temporary")
        folder.mkdir()
        with mock.patch.object(tempfile, "tempdir", str(folder)):
            cats.copy()
            with (mock.patch.object(database.sqlite3, "connect", side_effect=sqlite3.Error),
                  self.assertRaises(sqlite3.Error)):
                cats.copy()
        self.assertEqual(list(folder.iterdir()), [])
        self.assertEqual(len(cats._pool.idle), database.CONNECTIONS, "connections in the pool")


class UnusableTest(CatsTest):
    def refuse(self):
        """Check that the file cannot be opened; return the message, one line that names it."""
        with self.assertRaises(DatabaseUnusable) as caught:
            Database(self.path, [VERSION_1])
        message = str(caught.exception)
        self.assertNotIn("\n", message)
        self.assertTrue(message.startswith(f"cannot use {self.path}: "), message)
        self.assertTrue(
            message.endswith("; repair or move it, or choose another --data"), message)
        return message

    def test_a_file_that_is_not_a_database_is_refused_and_left_alone(self):
        self.path.write_text("Dear diary, " * 100)
        self.assertIn("not a database", self.refuse())
        self.assertEqual(self.path.read_text(), "Dear diary, " * 100)

    def test_a_file_of_a_newer_version_is_refused(self):
        self.open(VERSION_1, VERSION_2).close()
        self.assertIn("it was written by a newer microshop "
                      "(its schema version is 2, this one knows 1)", self.refuse())

    def test_no_empty_database_takes_the_place_of_one_whose_folder_was_removed(self):
        self.open().close()
        shutil.rmtree(self.path.parent)
        self.assertIn("unable to open", self.refuse())
        self.assertFalse(self.path.parent.exists())
        self.path.parent.mkdir()  # for the end of the test

    def test_a_folder_in_place_of_the_file_is_refused(self):
        self.path.mkdir()
        self.assertIn("unable to open", self.refuse())

    def test_an_sqlite_that_is_too_old_is_refused_and_the_needed_version_is_named(self):
        with mock.patch.multiple(
                sqlite3, sqlite_version="3.22.0", sqlite_version_info=(3, 22, 0)):
            with self.assertRaisesRegex(DatabaseUnusable, "3.25.0 or newer.* has 3.22.0"):
                self.open()
        self.assertFalse(self.path.exists())


class ReplacedTest(CatsTest):
    """Files of the database are removed or replaced while it is open."""

    def setUp(self):
        super().setUp()
        self.cats = self.open()
        self.write("Tom")

    def write(self, name):
        self.cats.write("INSERT INTO cats (name) VALUES (?)", [name])

    def transact(self, name):
        with self.cats.transaction() as transaction:
            transaction.write("INSERT INTO cats (name) VALUES (?)", [name])

    def file(self, suffix):
        return self.path.with_name(self.path.name + suffix)

    @contextlib.contextmanager
    def replaced(self, suffix, content=None):
        """Move a file away, put another in its place if there is content, and undo it at last."""
        file, away = self.file(suffix), self.path.parent / "away"
        file.rename(away)
        if content is not None:
            file.write_bytes(content)
        try:
            yield
        finally:
            away.rename(file)

    def assert_refused(self, function, *arguments):
        """Check that a call fails, that the client gets 503, and that the detail says why."""
        message = f"{function.__name__}{arguments} did not notice that a file is gone"
        with self.assertRaises(sqlite3.OperationalError, msg=message) as caught:
            function(*arguments)
        failure = self.cats.to_service_error(caught.exception)
        self.assertIsInstance(failure, ServiceUnavailable, caught.exception)
        self.assertRegex(failure.detail, "^cats.db: cats.db.* was removed or replaced")

    def test_writes_are_refused_while_a_file_is_gone_or_another_one_and_then_work_again(self):
        for suffix in ("", "-wal", "-shm"):
            for content in (None, self.file(suffix).read_bytes()):
                with self.subTest(suffix=suffix, is_replaced=bool(content)):
                    with self.replaced(suffix, content):
                        self.assert_refused(self.write, "Kim")
                        self.assert_refused(self.transact, "Kim")
                    self.write("Ben")
                    self.transact("Ben")
        self.assertEqual(self.names(self.cats), ["Mia", "Tom", *["Ben"] * 12])

    def test_reads_are_refused_and_no_new_file_is_made_while_the_file_is_gone(self):
        def is_refused() -> bool:
            with contextlib.suppress(sqlite3.OperationalError):
                self.names(self.cats)
                return False
            return True

        with self.replaced(""):
            wait_until(is_refused, "a read to notice that the file is gone")
            for _ in range(database.CONNECTIONS):  # a failure must not use up a connection
                self.assert_refused(self.names, self.cats)
            self.assertFalse(self.path.exists())
        self.assertEqual(self.names(self.cats), ["Mia", "Tom"])

    def test_a_new_connection_is_not_opened_to_other_files_than_the_first(self):
        for suffix in ("", "-wal", "-shm"):
            with self.subTest(suffix), self.cats._pool.lend(), self.replaced(suffix):
                self.assert_refused(self.names, self.cats)
                self.assertFalse(self.file(suffix).exists(), "it made a new file")

    def test_a_transaction_is_not_committed_if_the_file_was_removed_since_it_began(self):
        with contextlib.ExitStack() as stack:
            with self.assertRaisesRegex(sqlite3.OperationalError, "removed or replaced"):
                with self.cats.transaction() as transaction:
                    transaction.write("DELETE FROM cats")
                    stack.enter_context(self.replaced(""))
        self.assertEqual(self.names(self.cats), ["Mia", "Tom"])

    def test_commits_that_only_a_removed_wal_holds_are_written_into_the_file(self):
        self.file("-wal").unlink()
        self.assert_refused(self.write, "Kim")
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(self.path, folder)
            with contextlib.closing(sqlite3.connect(f"{folder}/cats.db")) as alone:
                names = alone.execute("SELECT name FROM cats").fetchall()
        self.assertEqual(names, [("Mia",), ("Tom",)])

    def test_files_that_sqlite_itself_removed_and_made_again_are_no_fault(self):
        with self.cats._pool.lend() as spoilt:  # the only one: with it, the WAL is closed
            spoilt.execute("BEGIN IMMEDIATE")
        self.assertFalse(self.file("-wal").exists())
        self.write("Kim")
        self.assertEqual(self.names(self.cats), ["Mia", "Tom", "Kim"])


class ReadOnlyTest(CatsTest):
    def test_a_folder_that_cannot_be_written_to_can_be_read(self):
        self.open().close()
        with unprivileged(self.path.parent):
            cats = self.open()
            self.assertEqual((self.names(cats), cats.has_wal), (["Mia"], False))
            with self.assertRaisesRegex(sqlite3.OperationalError, "readonly"):
                cats.write("INSERT INTO cats VALUES (2, 'Tom')")
            with self.assertRaisesRegex(DatabaseUnusable, "readonly"):
                Database(self.path, [VERSION_1, VERSION_2])


class FaultTest(CatsTest):
    def test_a_code_of_sqlite_that_blames_the_file_is_503_or_507_and_any_other_is_a_bug(self):
        cats = self.open()
        for code, status in (
                (sqlite3.SQLITE_PROTOCOL, 503), (sqlite3.SQLITE_PERM, 503),
                (sqlite3.SQLITE_IOERR_SHMMAP, 503), (sqlite3.SQLITE_BUSY_RECOVERY, 503),
                (sqlite3.SQLITE_FULL, 507), (sqlite3.SQLITE_ERROR, None),
                (sqlite3.SQLITE_TOOBIG, None), (sqlite3.SQLITE_MISUSE, None)):
            error = sqlite3.OperationalError("it went wrong")
            error.sqlite_errorcode = code
            failure = cats.to_service_error(error)
            self.assertEqual(failure and failure.status, status, f"SQLite's result code {code}")


@contextlib.contextmanager
def unprivileged(folder):
    """Take away the right to write in a folder, from the superuser too."""
    for path in (folder, *folder.iterdir()):
        path.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)


if __name__ == "__main__":
    unittest.main()
