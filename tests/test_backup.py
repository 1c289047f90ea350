"""The backup: whatever the shop does meanwhile, the copies fit together and can be restored."""
import contextlib
import shutil
import sqlite3
import tempfile
import threading
import unittest
from functools import partial
from pathlib import Path
from unittest import mock

from microshop import SERVICES, audit, backup, orders
from tests.helpers import process, together, wait_until
from tests.test_audit import LAPTOPS, contents, trade, trading, write_letter

FILES = {f"{name}.db" for name in SERVICES}


def run_backup(*arguments):
    """Return the exit status, and the lines that were printed."""
    with process("microshop.backup", *map(str, arguments)) as child:
        return child.status(), child.lines


def dump(path):
    """Return the statements that would make a database like this one."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


class BackupTest(unittest.TestCase):
    """What the tests share: a folder for the shop, and one that does not exist yet for copies."""

    def setUp(self):
        parent = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.folder, self.target = parent / "100% what? #1", parent / "copies" / "today"

    def assert_is_backup(self, folder):
        self.assertEqual({path.name for path in folder.iterdir()}, FILES)
        self.assertEqual(audit.find_violations(folder), [])


class CopyTest(BackupTest):
    def test_the_copies_of_a_busy_shop_fit_together(self):
        def back_up_often():
            targets = [self.target / str(number) for number in range(5)]
            for target in targets:
                backup.back_up(self.folder, target)
            return targets

        with trading(self.folder) as shop:
            *_, targets = together(*[partial(trade, shop, 6)] * 4, back_up_often)
        for target in targets:
            self.assert_is_backup(target)

    def test_the_copies_are_of_one_moment_whatever_is_written_while_they_are_made(self):
        def buy():
            shop.ask("POST", "/orders", LAPTOPS)

        class Overtaken(sqlite3.Connection):
            def execute(self, statement, values=()):
                if "user_version" in statement:  # a file is about to be read for the first time
                    buyer = threading.Thread(target=buy)
                    buyer.start()
                    buyers.append(buyer)
                    buyer.join(0.05)  # an order that nothing holds up is placed by then
                return super().execute(statement, values)

            def backup(self, *arguments, **settings):
                buy()
                super().backup(*arguments, **settings)

        buyers = []
        connect = partial(sqlite3.connect, factory=Overtaken)
        with (trading(self.folder) as shop,
              mock.patch.object(backup, "sqlite3", mock.Mock(connect=connect))):
            backup.back_up(self.folder, self.target)
            for buyer in buyers:
                buyer.join()
            self.assertEqual(shop.stock(), 100 - 2 * 2 * len(SERVICES), "all orders were placed")
        self.assert_is_backup(self.target)
        with contextlib.closing(sqlite3.connect(self.target / "orders.db")) as copy:
            self.assertEqual(copy.execute("SELECT id FROM orders").fetchall(), [(201,), (202,)])

    def test_a_backup_of_a_shop_that_does_not_run_leaves_its_files_as_they_are(self):
        with trading(self.folder):
            pass
        before = contents(self.folder)
        backup.back_up(self.folder, self.target)
        self.assertEqual(contents(self.folder), before)
        self.assert_is_backup(self.target)
        for name in FILES:
            self.assertEqual(dump(self.target / name), dump(self.folder / name))

    def test_a_shop_that_is_started_on_a_copy_finishes_its_orders_and_takes_new_ones(self):
        with trading(self.folder) as shop:
            trade(shop, 1)
            shop.orders.ending.set()  # so that nothing finishes the next order before the backup
            pending, _ = orders.add_order(shop.orders.database, LAPTOPS, "k")
            status, lines = run_backup("--data", self.folder, "--to", self.target)
            trade(shop, 2)  # these are lost
        self.assertEqual((status, len(lines)), (0, 1), lines)
        self.assertIn("to restore: stop the shop, replace the whole folder", lines[0])
        self.assert_is_backup(self.target)
        shutil.rmtree(self.folder)
        shutil.copytree(self.target, self.folder)
        with mock.patch.object(orders, "POLL", 0.005), trading(self.folder) as shop:
            wait_until(lambda: shop.status(pending) == "confirmed", "the order to be confirmed")
            self.assertEqual(trade(shop, 1), [201, 200])
            self.assertEqual(shop.stock(), 98)
        self.assertEqual(audit.find_violations(self.folder), [])


class RefusalTest(BackupTest):
    def setUp(self):
        super().setUp()
        with trading(self.folder):
            pass

    def test_a_bad_setting_is_one_line_and_exit_status_2(self):
        empty = self.folder.parent / "empty"
        empty.mkdir()
        file = self.folder / "users.db"
        for data, to, why in (
                (self.folder, [], "--to is missing"),
                (self.folder, ["--to", ""], "--to: '' is not a folder"),
                (self.folder, ["--to", file], f"--to: '{file}' is not a folder"),
                (self.folder, ["--to", self.folder], f"--to: {self.folder} is not empty"),
                (self.folder, ["--to", self.folder / "copies"], "copies is inside "),
                (empty, ["--to", self.target], "--data: there is no users.db, no ")):
            with self.subTest(why):
                status, lines = run_backup("--data", data, *to)
                self.assertEqual((status, len(lines)), (2, 1), lines)
                self.assertIn(why, lines[0])

    def test_a_file_that_cannot_be_read_is_one_line_and_leaves_no_copy(self):
        write_letter(self.folder / "orders.db")
        status, lines = run_backup("--data", self.folder, "--to", self.target)
        self.assertEqual((status, len(lines)), (1, 1), lines)
        self.assertRegex(lines[0], "^backup: cannot copy .*: file is not a database$")
        self.assertFalse(self.target.exists())

    def test_a_backup_that_cannot_be_completed_leaves_no_copy(self):
        def connect(path, *more, **settings):
            if str(path).endswith("orders.partial"):
                raise sqlite3.OperationalError("database or disk is full")
            return sqlite3.connect(path, *more, **settings)

        with (mock.patch.object(backup, "sqlite3", mock.Mock(connect=connect)),
              self.assertRaisesRegex(sqlite3.OperationalError, "disk is full")):
            backup.back_up(self.folder, self.target)
        self.assertEqual(list(self.target.iterdir()), [])

    def test_a_lock_that_another_process_holds_is_not_waited_for_long(self):
        with contextlib.closing(sqlite3.connect(self.folder / "orders.db")) as other:
            other.execute("BEGIN IMMEDIATE")
            with (mock.patch.object(backup, "LOCK_TIME", 0.01),
                  self.assertRaisesRegex(sqlite3.OperationalError, "is locked")):
                backup.back_up(self.folder, self.target)
        with contextlib.closing(sqlite3.connect(self.folder / "users.db", timeout=0)) as service:
            service.execute("BEGIN IMMEDIATE")  # this file is not locked any more
        self.assertFalse(self.target.exists())


if __name__ == "__main__":
    unittest.main()
