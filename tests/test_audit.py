"""The audit: it finds what is wrong, nothing else, and leaves all as it is."""
import contextlib
import itertools
import shutil
import sqlite3
import tempfile
import time
import unittest
from functools import partial
from pathlib import Path
from unittest import mock

from microshop import audit
from microshop.orders import Orders
from microshop.products import Products
from microshop.users import Users
from tests.helpers import Shop, process, running, together

LAPTOPS = {"userId": 1, "productId": 101, "quantity": 2}
CONFIRMED, NO_USER, NO_STOCK, CANCELLED = 203, 204, 205, 206  # what becomes of the orders in a shop that has traded

BREACHES = {  # the line that tells it: the file and the SQL that bring it about
    "product 101: 101 units were supplied, but 99 are free and 3 reserved": (
        "products", "UPDATE products SET stock = stock + 1 WHERE id = 101"),
    "product 102: 102 units were supplied, but 100 are free and 1 reserved": (
        "products", "UPDATE products SET supplied = supplied + 1 WHERE id = 102"),
    f"order {CONFIRMED} is confirmed for 2 units of product 101, but 0 of product 101 are reserved": (
        "products", f"DELETE FROM reservations WHERE orderId = {CONFIRMED};"
                    "UPDATE products SET stock = stock + 2 WHERE id = 101"),
    f"order {CONFIRMED} is confirmed for 3 units of product 101, but 2 of product 101 are reserved": (
        "orders", f"UPDATE orders SET quantity = 3 WHERE id = {CONFIRMED}"),
    f"order {CONFIRMED} is confirmed for 2 units of product 102, but 2 of product 101 are reserved": (
        "orders", f"UPDATE orders SET productId = 102 WHERE id = {CONFIRMED}"),
    f"order {CANCELLED} is confirmed for 2 units of product 101, but 0 of product 101 are reserved": (
        "orders", f"UPDATE orders SET status = 'confirmed' WHERE id = {CANCELLED}"),  # there is a tombstone
    f"order {CONFIRMED} is cancelled, but 2 units of product 101 are reserved for it": (
        "orders", f"UPDATE orders SET status = 'cancelled' WHERE id = {CONFIRMED}"),
    f"order {CONFIRMED} is rejected, but 2 units of product 101 are reserved for it": (
        "orders", f"UPDATE orders SET status = 'rejected' WHERE id = {CONFIRMED}"),
    f"order {CONFIRMED} is not there, but 2 units of product 101 are reserved for it": (
        "orders", f"DELETE FROM orders WHERE id = {CONFIRMED}"),
}


@contextlib.contextmanager
def trading(folder):
    """Run a shop on the databases in a folder."""
    with running(Users, data=folder) as users, running(Products, data=folder) as products:
        urls = {"users_url": [users.url], "products_url": [products.url]}
        with running(Orders, data=folder, **urls) as orders:
            yield Shop(users, products, orders)


def run_audit(*arguments):
    """Return the exit status, and the lines that were printed."""
    with process("microshop.audit", *map(str, arguments)) as child:
        return child.status(), child.lines


def trade(shop, times):
    """Place an order and cancel it, again and again; return what was answered."""
    answers = []
    for _ in range(times):
        placed = shop.ask("POST", "/orders", LAPTOPS)
        answers += [placed.status, shop.ask("POST", placed.headers["location"] + "/cancel").status]
    return answers


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class AuditTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        """Let a shop trade: an order is confirmed, one lacks its user, one stock, and one is cancelled."""
        cls.top = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        with trading(cls.top / "traded") as shop:
            answers = [shop.ask("POST", "/orders", {**LAPTOPS, **other})
                       for other in ({}, {"userId": 999}, {"quantity": 1000}, {})]
            answers.append(shop.ask("POST", f"/orders/{CANCELLED}/cancel"))
            assert [answer.status for answer in answers] == [201, 422, 409, 201, 200], answers

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory())) / "100% what? #1"
        shutil.copytree(self.top / "traded", self.folder)

    def change(self, name, script):
        with contextlib.closing(sqlite3.connect(self.folder / f"{name}.db")) as connection:
            connection.executescript(script)

    def assert_agrees(self, folder=None):
        folder = folder or self.folder
        self.assertEqual(run_audit("--data", folder), (0, [f"the databases in {folder} agree"]))

    # --- what it finds

    def test_a_fresh_shop_agrees(self):
        with trading(self.top / "fresh"):
            pass
        self.assert_agrees(self.top / "fresh")

    def test_a_shop_that_has_traded_agrees_closed_and_open(self):
        self.assert_agrees()
        with trading(self.folder):
            self.assert_agrees()

    def test_each_breach_is_told_in_a_line(self):
        for line, (name, script) in BREACHES.items():
            with self.subTest(line):
                self.setUp()
                self.change(name, script)
                self.assertEqual(audit.find_breaches(self.folder), [line])

    def test_all_breaches_are_printed(self):
        lines = [line for line in BREACHES if line.startswith("product") or f"{CANCELLED} is" in line]
        self.assertEqual(len(lines), 3)
        for name, script in map(BREACHES.get, lines):
            self.change(name, script)
        self.assertEqual(run_audit("--data", self.folder), (1, lines))

    def test_an_order_has_a_minute_to_come_to_its_end(self):
        for status, seconds in itertools.product(("pending", "rejected", "cancelling"), (50, 61)):
            since = int(time.time()) - seconds
            moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(since))
            late = [f"order {CONFIRMED} is {status} since {moment} (UTC), and not at its end"] if seconds > 60 else []
            with self.subTest(status, seconds=seconds):
                self.change("orders", f"UPDATE orders SET status = '{status}', since = {since}, due = {since + 1000} "
                                      f"WHERE id = {CONFIRMED}")
                self.assertEqual(audit.find_breaches(self.folder), late)
        self.assertEqual(run_audit("--data", self.folder), (1, late))

    # --- what it cannot read

    def test_a_folder_that_is_not_there_is_told_and_not_made(self):
        missing = self.folder / "nowhere"
        self.assert_unreadable(missing)
        self.assertFalse(missing.exists())

    def test_a_file_that_cannot_be_read_is_told_in_a_line(self):
        for damage, name in DAMAGES:
            with self.subTest(damage.__name__, file=name):
                self.setUp()
                damage(self.folder / name)
                before = set(self.folder.iterdir())
                self.assert_unreadable(self.folder)
                self.assertEqual(set(self.folder.iterdir()), before)

    def assert_unreadable(self, folder):
        status, lines = run_audit("--data", folder)
        self.assertEqual((status, len(lines)), (1, 1), lines)
        self.assertTrue(lines[0].startswith(f"audit: cannot read the databases in {folder}: "), lines)

    def test_a_wrong_flag_is_refused(self):
        for arguments in (["--date", "x"], ["--data", ""]):
            with self.subTest(arguments):
                status, lines = run_audit(*arguments)
                self.assertEqual((status, len(lines)), (2, 1), lines)

    # --- what it leaves

    def test_it_leaves_the_files_of_a_closed_shop_as_they_are(self):
        before = contents(self.folder)
        self.assertEqual(set(before), {"users.db", "products.db", "orders.db"})
        self.assert_agrees()
        self.assertEqual(contents(self.folder), before)

    def test_it_reads_what_a_killed_shop_has_left_in_its_logs_and_leaves_it_there(self):
        killed, (line, (name, script)) = self.folder.with_name("killed"), next(iter(BREACHES.items()))
        with trading(self.folder):
            self.change(name, script)
            shutil.copytree(self.folder, killed)
        before = contents(killed)
        self.assertTrue(before[f"{name}.db-wal"])
        self.assertEqual(run_audit("--data", killed), (1, [line]))
        self.assertLessEqual({name: kept for name, kept in before.items() if not name.endswith("-shm")}.items(),
                             contents(killed).items())  # -shm is an index of the log, made anew by who reads first

    # --- while the shop is open

    def test_a_busy_shop_has_no_breaches(self):
        with trading(self.folder) as shop:
            answers = together(*[partial(trade, shop, 12)] * 4, *[self.assert_agrees] * 2)
            self.assertEqual(answers, [[201, 200] * 12] * 4 + [None] * 2)

    def test_what_changes_between_a_look_at_one_file_and_at_the_next_is_no_breach(self):
        for seen_first in ("products_file.reservations", "orders_file.orders"):
            with self.subTest(seen_first), trading(self.folder) as shop:
                placed = [shop.ask("POST", "/orders", LAPTOPS)]
                connect = partial(sqlite3.connect, factory=hesitant(seen_first, partial(move_on, shop, placed)))
                with mock.patch.object(audit, "sqlite3", mock.Mock(connect=connect)):
                    self.assertEqual(audit.find_breaches(self.folder), [])
                self.assertGreaterEqual(len(placed), 2 * len(audit.BREACHES))


def move_on(shop, placed):
    """Cancel the order that was confirmed last, and place another."""
    shop.ask("POST", placed[-1].headers["location"] + "/cancel")
    placed.append(shop.ask("POST", "/orders", LAPTOPS))


def hesitant(seen_first, move):
    """Return a kind of connection whose queries see one table as it was before a move, and others as after."""
    class Hesitant(sqlite3.Connection):
        def execute(self, query, values=()):
            if "SELECT" not in query:
                return super().execute(query, values)
            super().execute("BEGIN")
            super().execute(f"SELECT count(*) FROM {seen_first}").fetchone()
            move()
            rows = super().execute(query, values).fetchall()
            super().execute("COMMIT")
            return rows
    return Hesitant


# --- what happens to files

def write_letter(path):
    path.write_text("Dear diary, " * 1000)


def spoil_page(path):
    """Spoil the page after the first: a table's."""
    with path.open("r+b") as file:
        file.seek(4096 + 8)
        file.write(b"\xff" * 500)


def spoil_schema(path):
    """Let what the tables are like be no text."""
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE", b"CREATE \xf6\xff\xff\xff\xff"))


def make_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = [(Path.unlink, "users.db"), (Path.unlink, "products.db"), (Path.unlink, "orders.db"),
           (make_folder, "users.db"), (write_letter, "users.db"), (spoil_page, "users.db"), (spoil_page, "orders.db"),
           (spoil_schema, "products.db")]  # of users.db, no more is asked than that it is sound


if __name__ == "__main__":
    unittest.main()
