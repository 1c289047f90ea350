"""Database on real files: versions, durability settings, transactions, and files that cannot serve."""
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
from microshop.chassis.database import Database, DatabaseUnusable, Written
from microshop.chassis.errors import ServiceUnavailable
from tests.helpers import PATIENCE, together

VERSION_1 = ("CREATE TABLE cats (id INTEGER PRIMARY KEY, name TEXT NOT NULL)", "INSERT INTO cats VALUES (1, 'Mia')")
VERSION_2 = ("ALTER TABLE cats ADD lives INTEGER NOT NULL DEFAULT 9",)


class DatabaseTest(unittest.TestCase):
    def setUp(self):
        self.path = Path(self.enterContext(tempfile.TemporaryDirectory())) / "deep" / "cats.db"

    def open(self, *versions):
        opened = Database(self.path, versions or [VERSION_1])
        self.addCleanup(opened.close)
        return opened

    def test_the_first_start_fills_the_tables_and_the_second_keeps_them(self):
        with self.open().transaction() as connection:
            connection.execute("INSERT INTO cats VALUES (2, 'Tom')")
        self.assertEqual(self.open().rows("SELECT name FROM cats"), [{"name": "Mia"}, {"name": "Tom"}])

    def test_an_older_file_is_brought_up_to_date(self):
        self.open(VERSION_1).close()
        newer = self.open(VERSION_1, VERSION_2)
        self.assertEqual(newer.rows("SELECT * FROM cats"), [{"id": 1, "name": "Mia", "lives": 9}])
        self.assertEqual(newer.rows("PRAGMA user_version"), [{"user_version": 2}])

    def test_an_upgrade_that_fails_leaves_the_file_as_it_was(self):
        self.open(VERSION_1).close()
        with self.assertRaises(DatabaseUnusable):
            Database(self.path, [VERSION_1, ("INSERT INTO cats VALUES (7, 'x')", "nonsense")])
        self.assertEqual(self.open(VERSION_1).rows("SELECT id FROM cats"), [{"id": 1}])

    def test_two_first_starts_at_once_fill_the_tables_once(self):
        threads = [threading.Thread(target=lambda: Database(self.path, [VERSION_1]).close()) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(self.open().rows("SELECT count(*) AS cats FROM cats"), [{"cats": 1}])

    def test_commits_are_durable_and_foreign_keys_hold(self):
        cats = self.open()
        for pragma, value in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1), ("busy_timeout", 1500)):
            with self.subTest(pragma):
                self.assertEqual([*cats.connection().execute(f"PRAGMA {pragma}").fetchone()], [value])

    def test_each_thread_at_work_has_a_connection_of_its_own_with_the_same_settings(self):
        cats = self.open()

        def look():
            connection = cats.connection()
            return connection, *(connection.execute(f"PRAGMA {name}").fetchone()[0]
                                 for name in ("foreign_keys", "synchronous"))

        [(one, *settings), (other, *_)] = together(look, look)
        self.assertEqual(settings, [1, 2])
        self.assertIsNot(one, other)

    def test_only_so_many_connections_are_opened_however_many_want_one(self):
        cats, seen = self.open(), set()

        def look():
            for _ in range(20):
                seen.add(cats.connection())
                self.assertEqual(len(cats.rows("SELECT * FROM cats")), 1)  # which gives it back

        self.assertEqual(together(*[look] * 30), [None] * 30)
        self.assertTrue(1 <= len(seen) <= database.CONNECTIONS)

    def test_one_that_is_left_within_a_transaction_is_not_lent_again(self):
        cats = self.open()
        spoilt = cats.connection()
        spoilt.execute("BEGIN IMMEDIATE")
        cats.release()
        self.assertIsNot(cats.connection(), spoilt)
        cats.write("INSERT INTO cats VALUES (2, 'Tom')")
        self.assertEqual(len(cats.rows("SELECT * FROM cats")), 2)

    def test_who_gets_none_in_time_is_told_to_come_back(self):
        cats, held = self.open(), threading.Barrier(database.CONNECTIONS + 1)

        def hold():
            cats.connection()
            held.wait(PATIENCE)
            held.wait(PATIENCE)
            cats.release()

        def want():
            held.wait(PATIENCE)
            try:
                with mock.patch.object(database, "TURN_TIME", 0.01):
                    cats.rows("SELECT * FROM cats")
            finally:
                held.wait(PATIENCE)

        *holders, refused = together(*[hold] * database.CONNECTIONS, want)
        self.assertEqual(holders, [None] * database.CONNECTIONS)
        self.assertIsInstance(refused, ServiceUnavailable)
        self.assertEqual(len(cats.rows("SELECT * FROM cats")), 1)

    def test_closing_writes_the_wal_into_the_file_although_a_thread_hangs(self):
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

    def test_a_transaction_is_undone_when_it_raises(self):
        cats = self.open()
        with self.assertRaises(ZeroDivisionError), cats.transaction() as connection:
            connection.execute("DELETE FROM cats")
            1 / 0  # noqa: B018
        self.assertEqual(len(cats.rows("SELECT * FROM cats")), 1)

    def test_writers_that_read_first_wait_for_each_other(self):
        cats = self.open(VERSION_1, VERSION_2)

        def lose_lives():
            for _ in range(20):
                with cats.transaction() as connection:
                    lives, = connection.execute("SELECT lives FROM cats").fetchone()
                    connection.execute("UPDATE cats SET lives = ?", [lives - 1])
            cats.close()

        threads = [threading.Thread(target=lose_lives) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(cats.rows("SELECT lives FROM cats"), [{"lives": 9 - 80}])

    def test_closing_tidies_up(self):
        self.open().close()
        self.assertEqual([path.name for path in self.path.parent.iterdir()], ["cats.db"])


class Door:
    """A lock that tells of each thread that comes to it."""

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


class WriteTest(unittest.TestCase):
    open = DatabaseTest.open

    def setUp(self):
        # Threads wait for each other here, each on a connection of its own; SQLite would refuse at once.
        self.enterContext(mock.patch.multiple(database, BUSY_TIMEOUT=0, CONNECTIONS=20))
        DatabaseTest.setUp(self)
        self.cats = self.open()

    def names(self):
        return [row["name"] for row in self.cats.rows("SELECT name FROM cats ORDER BY id")]

    def as_visitor(self, function):
        """Call a function in a thread that is served by the database, and leave as a handler does."""
        try:
            return function()
        finally:
            self.cats.release()

    def queue(self, *writes, prepare="PRAGMA user_version"):
        """Let writers come while a transaction goes on; return what became of them, and how many commits it took."""
        door, begun, commits = Door(), threading.Event(), []

        def hold():
            with self.cats.transaction() as connection:
                begun.set()
                for _ in range(len(writes) + 1):  # the transaction itself came to the door too
                    self.assertTrue(door.arrived.acquire(timeout=PATIENCE))
                connection.execute("INSERT INTO cats (name) VALUES ('Last')")

        def write(*statement):
            begun.wait(PATIENCE)
            connection = self.cats.connection()
            connection.execute(prepare)
            connection.set_trace_callback(lambda line: commits.append(line) if line == "COMMIT" else None)
            return self.cats.write(*statement)

        calls = (hold, *(partial(write, *statement) for statement in writes))
        with mock.patch.object(self.cats, "_writer", door):
            held, *outcomes = together(*(partial(self.as_visitor, call) for call in calls))
        self.assertIsNone(held)
        return outcomes, len(commits)

    def test_a_write_tells_what_it_did(self):
        for statement, values, written in (
                ("INSERT INTO cats VALUES (7, ?)", ["Tom"], Written(1, 7)),
                ("INSERT INTO cats (name) VALUES (:name), ('Kim')", {"name": "Ben"}, Written(2, 9))):
            self.assertEqual(self.cats.write(statement, values), written)
        for statement, values, count in (("UPDATE cats SET name = 'Leo' WHERE id > ?", [6], 3),
                                         ("DELETE FROM cats WHERE id = ?", [5], 0)):
            self.assertEqual(self.cats.write(statement, values).rowcount, count)
        self.assertEqual(self.names(), ["Mia", "Leo", "Leo", "Leo"])

    def test_a_write_that_fails_raises_and_the_next_one_goes_through(self):
        for statement, error in (("INSERT INTO cats VALUES (1, 'Twin')", sqlite3.IntegrityError),
                                 ("INSERT INTO dogs VALUES (1, 'Rex')", sqlite3.OperationalError)):
            with self.subTest(statement), self.assertRaises(error):
                self.cats.write(statement)
        self.cats.write("INSERT INTO cats VALUES (2, 'Tom')")
        self.assertEqual(self.names(), ["Mia", "Tom"])

    def test_what_is_written_is_in_the_file_at_once(self):
        self.cats.write("INSERT INTO cats VALUES (2, 'Tom')")
        with contextlib.closing(sqlite3.connect(self.path)) as other:
            self.assertEqual(other.execute("SELECT count(*) FROM cats").fetchall(), [(2,)])

    def test_writers_and_transactions_that_come_at_once_lose_nothing(self):
        def write(name):
            return [(self.cats.write("INSERT INTO cats (name) VALUES (?)", [name]).lastrowid, name) for _ in range(20)]

        def transact(name):
            ids = []
            for _ in range(20):
                with self.cats.transaction() as connection:
                    ids.append((connection.execute("INSERT INTO cats (name) VALUES (?)", [name]).lastrowid, name))
            return ids

        outcomes = together(*(partial(self.as_visitor, partial(way, name)) for way, name in (
            (write, "Tom"), (write, "Kim"), (write, "Ben"), (write, "Leo"), (transact, "Ida"), (transact, "Eva"))))
        told = sorted(row for rows in outcomes for row in rows)
        self.assertEqual([(row["id"], row["name"]) for row in self.cats.rows("SELECT * FROM cats WHERE id > 1")], told)
        self.assertEqual(len(told), 6 * 20)

    def test_writers_wait_for_a_transaction_and_then_share_a_commit(self):
        outcomes, commits = self.queue(*[("INSERT INTO cats (name) VALUES (?)", [f"Kitten {n}"]) for n in range(10)])
        self.assertEqual([outcome.rowcount for outcome in outcomes], [1] * 10)
        self.assertEqual(commits, 1)
        self.assertEqual(self.names()[:2], ["Mia", "Last"])
        self.assertEqual([self.names()[outcome.lastrowid - 1] for outcome in outcomes],
                         [f"Kitten {n}" for n in range(10)])

    def test_a_write_that_breaks_a_constraint_fails_alone(self):
        outcomes, commits = self.queue(
            ("INSERT INTO cats VALUES (7, 'Tom')",), ("INSERT INTO cats VALUES (8, NULL)",),
            ("INSERT INTO cats VALUES (9, 'Kim')",), ("INSERT INTO cats VALUES (10, 'Half'), (1, 'Mia')",))
        self.assertEqual(outcomes[::2], [Written(1, 7), Written(1, 9)])
        for outcome, told in zip(outcomes[1::2], ("NOT NULL", "UNIQUE"), strict=True):
            self.assertIsInstance(outcome, sqlite3.IntegrityError)
            self.assertIn(told, str(outcome))
        self.assertEqual(commits, 1)
        self.assertEqual(self.names(), ["Mia", "Last", "Tom", "Kim"])

    def test_a_full_disk_is_told_to_all_who_share_the_commit(self):
        small, large = "INSERT INTO cats (name) VALUES ('Tom')", "INSERT INTO cats (name) VALUES (hex(zeroblob(9999)))"
        outcomes, _ = self.queue(*[(small,)] * 5, (large,), prepare="PRAGMA max_page_count = 1")
        for outcome in outcomes:
            self.assertIsInstance(outcome, sqlite3.OperationalError)
            self.assertIn("full", str(outcome))
        self.assertEqual(self.names(), ["Mia", "Last"])
        self.assertEqual(self.cats.write("INSERT INTO cats (name) VALUES ('Kim')").rowcount, 1)


class UnusableTest(unittest.TestCase):
    setUp, open = DatabaseTest.setUp, DatabaseTest.open

    def refuse(self):
        with self.assertRaises(DatabaseUnusable) as caught:
            Database(self.path, [VERSION_1])
        message = str(caught.exception)
        self.assertIn(str(self.path), message)
        self.assertNotIn("\n", message)
        return message

    def test_a_file_that_is_no_database(self):
        self.path.parent.mkdir()
        self.path.write_text("Dear diary, " * 100)
        self.assertIn("not a database", self.refuse())
        self.assertEqual(self.path.read_text(), "Dear diary, " * 100)

    def test_a_file_that_a_newer_version_wrote(self):
        self.open(VERSION_1, VERSION_2).close()
        self.assertRegex(self.refuse(), "newer microshop wrote it .schema 2, this one knows 1")

    def test_a_file_that_is_read_only(self):
        self.open().close()
        with unprivileged(self.path.parent):
            self.assertIn("readonly", self.refuse())

    def test_a_folder_that_is_a_file(self):
        self.path.parent.write_text("")
        self.assertIn(f"{self.path.parent} is not a folder", self.refuse())

    def test_a_file_that_is_a_folder(self):
        self.path.mkdir(parents=True)
        self.assertIn("unable to open", self.refuse())

    def test_a_file_that_another_holds_for_too_long(self):
        self.open().close()
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            with mock.patch.object(database, "BUSY_TIMEOUT", 0.05):
                self.assertIn("locked", self.refuse())


@contextlib.contextmanager
def unprivileged(folder):
    """Take the right to write in a folder, from the superuser too."""
    for path in (folder, *folder.iterdir()):
        path.chmod(0o555)
    folder.parent.chmod(0o755)
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
