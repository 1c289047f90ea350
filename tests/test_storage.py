"""Faults of the disk or the file: clients get a clear error, and nothing acknowledged is lost."""
import contextlib
import io
import json
import os
import re
import signal
import sqlite3
import tempfile
import unittest
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from microshop.chassis import database
from microshop.chassis.database import ConnectionPool, DatabaseUnusable
from microshop.users import Users
from tests.chassis.test_database import unprivileged
from tests.helpers import (
    PATIENCE, Answered, ask, flush, process, running, running_shop, wait_until)

JSON = {"Content-Type": "application/json"}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a database's write lock, as another process might."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


def damage(path: Path) -> None:
    """Overwrite all of a database but its first page."""
    pages = path.read_bytes()
    path.write_bytes(pages[:4096] + b"\xaa" * (len(pages) - 4096))


class StorageTest(unittest.TestCase):
    def setUp(self):
        self.log = self.enterContext(contextlib.redirect_stderr(io.StringIO()))

    def start_users(self) -> Path:
        """Start the users service, and return the path of its file."""
        self.users = self.enterContext(running(Users))
        return self.users.database.path

    def wait_briefly(self, **times: float) -> None:
        """Shorten the waits for locks, in a test where a wait is in vain."""
        self.enterContext(mock.patch.multiple(database, **times))

    def post(self, name: str = "Carol") -> Answered:
        body = json.dumps({"name": name}).encode()
        return ask(self.users.server_port, "POST", "/users", JSON, body)

    def put(self) -> Answered:
        return ask(self.users.server_port, "PUT", "/users/1", JSON, b'{"name":"Ann"}')

    def get(self, target: str = "/users") -> Answered:
        return ask(self.users.server_port, target=target)

    def assert_refused(self, answer: Answered, status: int, why: str) -> None:
        """Check that an answer and one line of the log name the file and the reason."""
        self.assertEqual(answer.status, status, answer.body)
        self.assertEqual(answer.headers["retry-after"], "1")
        self.assertRegex(answer.json["detail"], f"^users.db: {why}")
        flush(self.users.log)
        event = f" users [0-9a-f]{{16}} {self.users.database.path}: {why}"
        self.assertRegex(self.log.getvalue(), f"(?m)^.*{event}.*$")
        self.assertNotIn("Traceback", self.log.getvalue())

    def test_while_another_process_locks_the_file_writes_are_503_and_reads_are_answered(self):
        self.wait_briefly(BUSY_TIMEOUT=0.05)
        with locked(self.start_users()):
            self.assert_refused(self.post(), 503, "database is locked")
            self.assertEqual(self.get().status, 200)
        self.assertEqual(self.post().status, 201)
        self.assertEqual(len(self.get().json), 3)

    def test_a_transaction_that_waits_too_long_for_another_is_503(self):
        self.wait_briefly(QUEUE_TIMEOUT=0.05)
        self.start_users()
        with self.users.database.transaction():
            answer = self.put()
        self.assertEqual(answer.status, 503)
        self.assertEqual(
            answer.json["detail"], "users.db: timed out waiting for the database lock")
        self.assertEqual(self.put().status, 200)

    def test_a_full_disk_is_507_and_every_acknowledged_write_is_stored(self):
        def open_small(pool):
            connection = opened(pool)
            connection.execute("PRAGMA max_page_count = 8")
            return connection

        opened = ConnectionPool.open
        names = [f"{n:03}" * 30 for n in range(300)]
        with mock.patch.object(ConnectionPool, "open", open_small):
            self.start_users()
            answers = [self.post(name) for name in names]
            self.assert_refused(answers[-1], 507, "database or disk is full")
            stored = [user["name"] for user in self.get("/users?limit=1000").json]
        acknowledged = [
            name for name, answer in zip(names, answers, strict=True) if answer.status == 201]
        self.assertEqual(stored[2:], acknowledged)
        self.assertGreater(len(acknowledged), 10)

    def test_a_write_to_a_read_only_file_is_503(self):
        path = self.start_users()
        self.users.database.close()
        with unprivileged(path.parent):
            why = "(attempt to write a readonly|unable to open) database"
            self.assert_refused(self.post(), 503, why)
        self.assertEqual(self.post().status, 201)

    def test_a_file_that_cannot_be_opened_is_503_until_it_can(self):
        path = self.start_users()
        self.users.database.close()
        away = path.parent.rename(path.parent.with_suffix(".away"))
        try:
            for _ in range(database.CONNECTIONS + 1):  # a failure must not use up a connection
                self.assert_refused(self.get(), 503, "unable to open database file")
        finally:
            away.rename(path.parent)
        self.assertEqual(self.get().status, 200)

    def test_a_file_that_was_removed_is_503_for_all_until_it_is_put_back(self):
        path = self.start_users()
        self.assertEqual(self.post().status, 201)
        away = path.rename(path.with_suffix(".away"))
        wait_until(lambda: self.get().status == 503, "GET to notice that the file is gone")
        for answer in (self.get(), self.post(), self.put()):
            self.assert_refused(answer, 503, "users.db was removed or replaced")
        away.rename(path)
        self.assertEqual((self.post().status, len(self.get().json)), (201, 4))

    def test_a_damaged_file_is_503_and_the_next_start_says_what_to_do(self):
        path = self.start_users()
        self.users.database.close()
        damage(path)
        self.assert_refused(self.get(), 503, "database disk image is malformed")
        self.assert_refused(self.post(), 503, "database disk image is malformed")
        advice = "repair or move it, or choose another --data"
        message = f"cannot use {path}: it is damaged.*; {advice}"
        with self.assertRaisesRegex(DatabaseUnusable, message):
            Users(self.users.settings)

    def test_a_damaged_text_is_503(self):
        path = self.start_users()
        self.users.database.close()
        path.write_bytes(path.read_bytes().replace(b"Alice", b"\xfflice"))
        self.assert_refused(self.get(), 503, "Could not decode to UTF-8 column 'name'")

    def test_a_mistake_in_a_statement_is_500_and_not_blamed_on_the_file(self):
        def find_users(database, page):
            return database.rows("SELECT nothing FROM here")

        self.start_users()
        with mock.patch("microshop.users.find_users", find_users):
            self.assertEqual(self.get().status, 500)

    def test_an_order_that_could_not_be_stored_is_placed_once_by_a_retry(self):
        self.wait_briefly(BUSY_TIMEOUT=0.05)
        with running_shop() as shop:
            order = {"userId": 1, "productId": 101, "quantity": 3}
            with locked(shop.orders.database.path):
                refused = shop.ask("POST", "/orders", order, Idempotency_Key="k")
                self.assertEqual((refused.status, refused.headers["retry-after"]), (503, "1"))
            self.assertEqual(shop.stock(), 100)
            self.wait_briefly(BUSY_TIMEOUT=PATIENCE)
            placed = shop.ask("POST", "/orders", order, Idempotency_Key="k")
            self.assertEqual(placed.status, 201, placed.body)
            self.assertEqual((shop.stock(), len(shop.ask("GET", "/orders").json)), (97, 3))


class WithoutWalTest(unittest.TestCase):
    def test_a_service_works_where_no_wal_is_possible_and_its_log_says_so(self):
        without = ("import sqlite3\n"
                   "connect = sqlite3.connect\n"
                   "sqlite3.connect = lambda path, **options: connect(\n"
                   "    path + '&vfs=unix-dotfile', **options)\n"
                   "from microshop.users import Users\n"
                   "Users.main()")
        with tempfile.TemporaryDirectory() as folder:
            with process("tests.after", without, "--port", "0", "--data", folder) as users:
                port = users.port("Users service")
                users.wait_for(r"warning: .*/users\.db has no write-ahead log")
                self.assertEqual(ask(port, "POST", "/users", JSON, b'{"name":"Tom"}').status, 201)
                self.assertEqual(len(ask(port, target="/users").json), 3)


class KilledTest(unittest.TestCase):
    @unittest.skipUnless(hasattr(signal, "SIGXFSZ"), "this system has no limit of file sizes")
    def test_writes_acknowledged_before_the_disk_failed_survive_a_kill(self):
        limited = ("import resource\n"
                   "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
                   "from microshop.users import Users\n"
                   "Users.main()")
        with tempfile.TemporaryDirectory() as folder:
            names = self.fill(folder, limited)
            self.assertGreater(len(names), 10)
            self.assertIn("users.db-wal", os.listdir(folder), "the kill must leave a WAL")
            with process("microshop.users", "--port", "0", "--data", folder) as users:
                rows = ask(users.port("Users service"), target="/users?limit=1000").json
                self.assertEqual([row["name"] for row in rows], names)

    def fill(self, folder: str, program: str) -> list[str]:
        """Add users until the disk fails, then kill the service; return the names it stored."""
        names = ["Alice", "Bob"]
        with process("tests.after", program, "--port", "0", "--data", folder, "--quiet") as users:
            port = users.port("Users service")
            for number in range(1000):
                name = f"{number:04}" * 20
                body = json.dumps({"name": name}).encode()
                answer = ask(port, "POST", "/users", JSON, body)
                if answer.status != 201:
                    break
                names.append(name)
            self.assertIn(answer.status, (503, 507))
            self.assertEqual(len(ask(port, target="/users?limit=1000").json), len(names))
            users.wait_for(rf"users [0-9a-f]+ {re.escape(folder)}/users.db: ")
            users.popen.kill()
        return names


if __name__ == "__main__":
    unittest.main()
