"""What becomes of requests when the disk or the file fails: a clear refusal, and nothing acknowledged is lost."""
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
from microshop.chassis.database import Database, DatabaseUnusable
from microshop.users import Users
from tests.chassis.test_database import unprivileged
from tests.helpers import Answered, ask, process, running, running_shop

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


@mock.patch.object(database, "BUSY_TIMEOUT", 0.05)
class StorageTest(unittest.TestCase):
    def setUp(self):
        self.log = self.enterContext(contextlib.redirect_stderr(io.StringIO()))

    def run_users(self) -> Path:
        """Start users, and return the path of its file."""
        self.users = self.enterContext(running(Users))
        return self.users.database.path

    def post(self, name: str = "Carol") -> Answered:
        return ask(self.users.server_port, "POST", "/users", JSON, json.dumps({"name": name}).encode())

    def get(self, target: str = "/users") -> Answered:
        return ask(self.users.server_port, target=target)

    def assert_refused(self, answer: Answered, status: int, why: str) -> None:
        """See that the client is told and the log names the file, in one line."""
        self.assertEqual((answer.status, answer.headers["retry-after"]), (status, "1"))
        self.assertRegex(answer.json["detail"], f"^users.db: {why}")
        self.users.log.flush()
        self.assertRegex(self.log.getvalue(), f"(?m)^.* users [0-9a-f]{{16}} {self.users.database.path}: {why}.*$")
        self.assertNotIn("Traceback", self.log.getvalue())

    def test_a_file_that_another_has_locked_is_503_for_who_writes_alone_and_only_meanwhile(self):
        with locked(self.run_users()):
            self.assert_refused(self.post(), 503, "database is locked")
            self.assertEqual(self.get().status, 200)
        self.assertEqual(self.post().status, 201)
        self.assertEqual(len(self.get().json), 3)

    def test_a_transaction_that_does_not_get_its_turn_is_503(self):
        self.run_users()
        with mock.patch.object(database, "TURN_TIME", 0.05), self.users.database.transaction():
            answer = ask(self.users.server_port, "PUT", "/users/1", JSON, b'{"name":"Ann"}')
        self.assertEqual((answer.status, answer.json["detail"]), (503, "users.db: it is busy for too long"))
        self.assertEqual(ask(self.users.server_port, "PUT", "/users/1", JSON, b'{"name":"Ann"}').status, 200)

    def test_a_disk_that_is_full_is_507_and_what_was_acknowledged_is_there(self):
        def open_small(self):
            connection = opened(self)
            connection.execute("PRAGMA max_page_count = 8")
            return connection

        opened = Database._open
        with mock.patch.object(Database, "_open", open_small):
            self.run_users()
            told = {name: self.post(name) for name in (f"{n:03}" * 30 for n in range(300))}
            self.assert_refused(list(told.values())[-1], 507, "database or disk is full")
            known = [user["name"] for user in self.get("/users?limit=1000").json]
        self.assertEqual(known[2:], [name for name, answer in told.items() if answer.status == 201])
        self.assertGreater(len(known), 10)

    def test_a_file_that_may_only_be_read_is_503(self):
        path = self.run_users()
        self.users.database.close()
        with unprivileged(path.parent):
            self.assert_refused(self.post(), 503, "(attempt to write a readonly|unable to open) database")
        self.assertEqual(self.post().status, 201)

    def test_a_file_that_cannot_be_opened_is_503(self):
        path = self.run_users()
        self.users.database.close()
        away = path.parent.rename(path.parent.with_suffix(".away"))
        try:
            for _ in range(database.CONNECTIONS + 1):
                self.assert_refused(self.get(), 503, "unable to open database file")
        finally:
            away.rename(path.parent)
        self.assertEqual(self.get().status, 200)

    def test_a_damaged_file_is_503_and_then_refuses_to_start_and_says_what_to_do(self):
        path = self.run_users()
        self.users.database.close()
        damage(path)
        self.assert_refused(self.get(), 503, "database disk image is malformed")
        self.assert_refused(self.post(), 503, "database disk image is malformed")
        with self.assertRaisesRegex(DatabaseUnusable, f"cannot use {path}: it is damaged.*; mend or move it, or cho"):
            Users(self.users.settings)

    def test_a_text_that_is_damaged_is_503(self):
        path = self.run_users()
        self.users.database.close()
        path.write_bytes(path.read_bytes().replace(b"Alice", b"\xfflice"))
        self.assert_refused(self.get(), 503, "Could not decode to UTF-8 column 'name'")

    def test_a_fault_in_a_statement_is_still_a_fault(self):
        self.run_users()
        with mock.patch("microshop.users.find_users", lambda database, page: database.rows("SELECT nothing FROM here")):
            self.assertEqual(self.get().status, 500)

    def test_an_order_that_could_not_be_written_down_is_placed_once_by_its_retry(self):
        with running_shop() as shop:
            order = {"userId": 1, "productId": 101, "quantity": 3}
            with locked(shop.orders.database.path):
                refused = shop.ask("POST", "/orders", order, Idempotency_Key="k")
                self.assertEqual((refused.status, refused.headers["retry-after"]), (503, "1"))
            self.assertEqual(shop.stock(), 100)
            self.assertEqual(shop.ask("POST", "/orders", order, Idempotency_Key="k").status, 201)
            self.assertEqual((shop.stock(), len(shop.ask("GET", "/orders").json)), (97, 3))


class KilledTest(unittest.TestCase):
    @unittest.skipUnless(hasattr(signal, "SIGXFSZ"), "this system has no limits for a file")
    def test_what_was_acknowledged_before_the_disk_failed_outlives_a_kill(self):
        limited = ("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
                   "from microshop.users import Users; Users.main()")
        with tempfile.TemporaryDirectory() as folder:
            with process("tests.after", limited, "--port", "0", "--data", folder, "--quiet") as users:
                port, kept = users.port("Users service"), ["Alice", "Bob"]
                for number in range(1000):
                    name = f"{number:04}" * 20
                    answer = ask(port, "POST", "/users", JSON, json.dumps({"name": name}).encode())
                    if answer.status != 201:
                        break
                    kept.append(name)
                self.assertIn(answer.status, (503, 507))
                self.assertEqual(len(ask(port, target="/users?limit=1000").json), len(kept))
                users.wait_for(rf"users [0-9a-f]+ {re.escape(folder)}/users.db: ")
                users.popen.kill()
            self.assertGreater(len(kept), 10)
            self.assertIn("users.db-wal", os.listdir(folder))
            with process("microshop.users", "--port", "0", "--data", folder) as users:
                rows = ask(users.port("Users service"), target="/users?limit=1000").json
                self.assertEqual([row["name"] for row in rows], kept)


if __name__ == "__main__":
    unittest.main()
