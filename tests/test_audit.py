"""The audit: it finds what is wrong and nothing else, and changes no file."""
import contextlib
import itertools
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import unittest
from functools import partial
from pathlib import Path
from unittest import mock

from microshop import SERVICES, audit
from microshop import orders as orders_module
from microshop.chassis import database
from microshop.orders import Orders
from microshop.products import Products
from microshop.users import Users
from tests.helpers import (
    NOBODY, PATIENCE, TOP, Shop, make_databases, patient_services, process, running, together,
    upstream)
from tests.test_composition import Stub, always, response

LAPTOPS = {"userId": 1, "productId": 101, "quantity": 2}
CONFIRMED, NO_USER, NO_STOCK, CANCELLED = 203, 204, 205, 206  # the orders of a shop that traded
RESERVATION = 7203  # of the order that was confirmed

VIOLATIONS = {  # each line, with the file and the SQL that cause it
    "product 101: 101 units were supplied, but 102 are free or reserved": (
        "products", "UPDATE products SET stock = stock + 1 WHERE id = 101"),
    "product 102: 102 units were supplied, but 101 are free or reserved": (
        "products", "UPDATE products SET supplied = supplied + 1 WHERE id = 102"),
    f"order {CONFIRMED} is confirmed for 2 units of product 101, "
    "but 0 of product 101 are reserved": (
        "products", f"DELETE FROM reservations WHERE id = {RESERVATION};"
                    "UPDATE products SET stock = stock + 2 WHERE id = 101"),
    f"order {CONFIRMED} is confirmed for 3 units of product 101, "
    "but 2 of product 101 are reserved": (
        "orders", f"UPDATE orders SET quantity = 3 WHERE id = {CONFIRMED}"),
    f"order {CONFIRMED} is confirmed for 2 units of product 102, "
    "but 2 of product 101 are reserved": (
        "orders", f"UPDATE orders SET productId = 102 WHERE id = {CONFIRMED}"),
    f"order {CANCELLED} is confirmed for 2 units of product 101, "
    "but 0 of product 101 are reserved": (  # its reservation is a tombstone
        "orders", f"UPDATE orders SET status = 'confirmed' WHERE id = {CANCELLED}"),
    f"order {CONFIRMED} is cancelled, but 2 units of product 101 are reserved for it": (
        "orders", f"UPDATE orders SET status = 'cancelled' WHERE id = {CONFIRMED}"),
    f"order {CONFIRMED} is rejected, but 2 units of product 101 are reserved for it": (
        "orders", f"UPDATE orders SET status = 'rejected' WHERE id = {CONFIRMED}"),
    f"reservation {RESERVATION} is for 2 units of product 101, but for no order": (
        "orders", f"DELETE FROM orders WHERE id = {CONFIRMED}"),
}


@contextlib.contextmanager
def trading(folder):
    """Run a shop on the databases in a folder, which is made if it does not exist."""
    folder.mkdir(exist_ok=True)
    with (patient_services(), running(Users, data=folder) as users,
          running(Products, data=folder) as products):
        make_databases(folder)
        urls = {"users_url": [users.url], "products_url": [products.url]}
        with running(Orders, data=folder, timeout=PATIENCE, **urls) as orders:
            yield Shop(users, products, orders)


def run_audit(*arguments, **environment):
    """Return the exit status, and the lines that were printed."""
    with process("microshop.audit", *map(str, arguments), **environment) as child:
        return child.status(), child.lines


def flags_of(urls):
    """Return the flags for the audit of services at these base URLs, which are by name."""
    return ["--remote", "--timeout", PATIENCE, *(f"--{name}-url={urls[name]}" for name in urls)]


def trade(shop, times):
    """Place orders and cancel each; return the statuses of the answers."""
    answers = []
    for _ in range(times):
        placed = shop.ask("POST", "/orders", LAPTOPS)
        cancelled = shop.ask("POST", placed.headers["location"] + "/cancel")
        answers += [placed.status, cancelled.status]
    return answers


def urls_of(shop):
    return {server.name: server.url for server in shop}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class AuditTest(unittest.TestCase):
    """What the tests share: the folder of a shop that has traded."""

    @classmethod
    def setUpClass(cls):
        """Let a shop trade: an order is confirmed, two are rejected, and one is cancelled."""
        cls.top = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        numbers = itertools.count(RESERVATION)
        with (trading(cls.top / "traded") as shop,
              mock.patch.object(orders_module, "choose_reservation", numbers.__next__)):
            answers = [shop.ask("POST", "/orders", {**LAPTOPS, **other})
                       for other in ({}, {"userId": 999}, {"quantity": 1000}, {})]
            answers.append(shop.ask("POST", f"/orders/{CANCELLED}/cancel"))
            assert [answer.status for answer in answers] == [201, 422, 409, 201, 200], answers

    def setUp(self):
        self.copy_folder()

    def copy_folder(self):
        parent = self.enterContext(tempfile.TemporaryDirectory())
        self.folder = Path(parent) / "100% what? #1"
        shutil.copytree(self.top / "traded", self.folder)

    def change(self, name, script):
        with contextlib.closing(sqlite3.connect(self.folder / f"{name}.db")) as connection:
            connection.executescript(script)

    def assert_agrees(self, folder=None):
        folder = folder or self.folder
        expected = (0, [f"the databases in {folder} agree"])
        self.assertEqual(run_audit("--data", folder), expected)

    def assert_disagrees(self, folder, violations):
        verdict = f"the databases in {folder} do not agree:"
        expected = (1, [verdict, *(f"  {line}" for line in violations)])
        self.assertEqual(run_audit("--data", folder), expected)


class ViolationTest(AuditTest):
    def test_the_databases_of_a_fresh_shop_agree(self):
        with trading(self.top / "fresh"):
            pass
        self.assert_agrees(self.top / "fresh")

    def test_the_databases_of_a_shop_that_has_traded_agree_running_or_not(self):
        self.assert_agrees()
        with trading(self.folder):
            self.assert_agrees()

    def test_each_kind_of_violation_is_found(self):
        for line, (name, script) in VIOLATIONS.items():
            with self.subTest(line):
                self.copy_folder()
                self.change(name, script)
                self.assertEqual(audit.find_violations(self.folder), [line])

    def test_each_violation_is_found_although_another_order_is_placed_between_the_looks(self):
        run_queries = audit.run_queries

        def look_and_order(*arguments):
            lines = run_queries(*arguments)
            number = 9000 + len(looks)
            looks.append(lines)
            for product in (101, 102):
                self.change("products", f"""
                    UPDATE products SET stock = stock - 1 WHERE id = {product};
                    INSERT INTO reservations VALUES ({number * product}, {product}, 1)""")
                self.change("orders", f"""
                    INSERT INTO orders (userId, productId, quantity, status, placed, since,
                                        reservation)
                    VALUES (1, {product}, 1, 'confirmed', 0, 0, {number * product})""")
            return lines

        for line, (name, script) in VIOLATIONS.items():
            with self.subTest(line):
                self.copy_folder()
                looks = []
                self.change(name, script)
                with mock.patch.object(audit, "run_queries", look_and_order):
                    self.assertEqual(audit.find_violations(self.folder), [line])

    def test_the_time_for_many_violations_grows_with_their_number(self):
        compared = []

        class Line(str):
            __slots__ = ()
            __hash__ = str.__hash__

            def __eq__(self, other):
                compared.append(other)
                return super().__eq__(other)

        lines = [f"product {number} is wrong" for number in range(1000)]
        with mock.patch.object(audit, "run_queries", lambda *_: [Line(line) for line in lines]):
            self.assertEqual(audit.find_violations(self.folder), lines)
        self.assertLess(len(compared), 10 * len(lines))

    def test_all_breaches_are_printed(self):
        lines = [line for line in VIOLATIONS
                 if line.startswith("product") or f"{CANCELLED} is" in line]
        self.assertEqual(len(lines), 3)
        for name, script in map(VIOLATIONS.get, lines):
            self.change(name, script)
        self.assert_disagrees(self.folder, lines)

    def test_an_order_must_be_finished_within_a_minute(self):
        now = int(time.time())
        statuses = ("pending", "rejected", "cancelling")
        for status, seconds in itertools.product(statuses, (59, 60, 61)):
            since = now - seconds
            moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(since))
            late = [f"order {CONFIRMED} has been {status} since {moment} (UTC), "
                    "and is still not finished"] if seconds > 60 else []
            with self.subTest(status, seconds=seconds):
                self.change("orders", f"UPDATE orders SET status = '{status}', since = {since}, "
                                      f"due = {since + 1000} WHERE id = {CONFIRMED}")
                self.stop_at(now)
                self.assertEqual(audit.find_violations(self.folder), late)
        self.assert_disagrees(self.folder, late)

    def test_the_minute_ends_with_the_shop_so_that_a_backup_may_be_checked_later(self):
        self.change("orders", "UPDATE orders SET status = 'pending', since = 1000, due = 2000 "
                              f"WHERE id = {CONFIRMED}")
        self.stop_at(1059)
        self.assert_agrees()
        with contextlib.closing(sqlite3.connect(self.folder / "users.db")) as users:
            users.execute("UPDATE users SET name = name")  # a shop that runs has a -wal file
            self.assertEqual(len(audit.find_violations(self.folder)), 1)

    def stop_at(self, moment):
        """Make the files as old as those of a shop that stopped at this moment."""
        for path in self.folder.iterdir():
            os.utime(path, (moment, moment))


class UnreadableTest(AuditTest):
    def assert_unreadable(self, folder, why=""):
        status, lines = run_audit("--data", folder)
        self.assertEqual((status, len(lines)), (1, 1), lines)
        expected = f"audit: cannot read the databases in {folder}: {why}"
        self.assertTrue(lines[0].startswith(expected), lines)

    def test_a_folder_that_does_not_exist_is_reported_and_not_made(self):
        missing = self.folder / "nowhere"
        self.assert_unreadable(missing, "there is no such folder")
        self.assertFalse(missing.exists())

    def test_a_missing_file_is_named(self):
        for name in SERVICES:
            with self.subTest(name):
                self.copy_folder()
                (self.folder / f"{name}.db").unlink()
                self.assert_unreadable(self.folder, f"there is no {name}.db")
                self.assertFalse((self.folder / f"{name}.db").exists())

    def test_a_shop_that_has_not_made_its_tables_yet_is_told_kindly(self):
        for name in ("products", "orders"):
            with self.subTest(name):
                self.copy_folder()
                (self.folder / f"{name}.db").write_bytes(b"")
                self.assert_unreadable(self.folder, "the tables are not there yet; start the shop")

    def test_a_file_that_cannot_be_read_is_reported_in_one_line(self):
        for damage, name in DAMAGES:
            with self.subTest(damage.__name__, file=name):
                self.copy_folder()
                damage(self.folder / name)
                before = set(self.folder.iterdir())
                self.assert_unreadable(self.folder)
                self.assertEqual(set(self.folder.iterdir()), before)

    def test_a_wrong_flag_is_refused_with_exit_status_2(self):
        for arguments in (["--date", "x"], ["--data", ""]):
            with self.subTest(arguments):
                status, lines = run_audit(*arguments)
                self.assertEqual((status, len(lines)), (2, 1), lines)


class FolderTest(AuditTest):
    """Which folders are audited if none is named; each test has its own temporary folder."""

    def setUp(self):
        super().setUp()
        self.working = self.folder.parent / "working"
        self.temporary = self.folder.parent / "temporary"
        self.working.mkdir()
        self.temporary.mkdir()

    def copy_to(self, folder):
        shutil.copytree(self.folder, folder)

    def run_audit(self, **environment):
        """Return the exit status, and the lines that were printed."""
        done = subprocess.run(
            [sys.executable, "-m", "microshop.audit"], cwd=self.working, timeout=PATIENCE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(TOP),
                 "TMPDIR": str(self.temporary), **environment})
        return done.returncode, done.stdout.splitlines()

    def test_the_default_folder_and_every_complete_temporary_one_are_audited(self):
        self.copy_to(self.working / "data")
        for name in ("microshop-b", "microshop-a", "microshop-half", "other"):
            self.copy_to(self.temporary / name)
        (self.temporary / "microshop-half" / "users.db").unlink()
        self.assertEqual(self.run_audit(), (0, [
            "the databases in data agree",
            f"the databases in {self.temporary}/microshop-a agree",
            f"the databases in {self.temporary}/microshop-b agree"]))

    def test_one_violation_makes_the_exit_status_1_and_the_other_folders_are_audited(self):
        line, (name, script) = next(iter(VIOLATIONS.items()))
        self.copy_to(self.temporary / "microshop-b")
        self.change(name, script)
        self.copy_to(self.temporary / "microshop-a")
        self.assertEqual(self.run_audit(), (1, [
            f"the databases in {self.temporary}/microshop-a do not agree:",
            f"  {line}",
            f"the databases in {self.temporary}/microshop-b agree"]))

    def test_a_default_folder_that_lacks_a_file_is_reported(self):
        self.copy_to(self.working / "data")
        (self.working / "data" / "orders.db").unlink()
        self.assertEqual(self.run_audit(), (
            1, ["audit: cannot read the databases in data: there is no orders.db; "
                "choose another --data"]))

    def test_a_folder_that_the_environment_names_is_audited_alone(self):
        self.copy_to(self.working / "data")
        self.copy_to(self.temporary / "microshop-a")
        verdict = f"the databases in {self.folder} agree"
        self.assertEqual(self.run_audit(MICROSHOP_DATA=str(self.folder)), (0, [verdict]))

    def test_an_empty_variable_counts_as_not_set(self):
        self.copy_to(self.working / "data")
        self.assertEqual(self.run_audit(MICROSHOP_DATA=""), (0, ["the databases in data agree"]))

    def test_without_any_database_it_says_what_to_do(self):
        self.assertEqual(self.run_audit(), (2, [
            "audit: there is no database in data; start the shop with python -m "
            "microshop.run_all, or give the folder of its databases with --data"]))

    def test_the_folder_of_a_shop_that_runs_with_fresh_is_found(self):
        flags = ("--fresh", "--port", "0")
        with process("microshop.run_all", *flags, TMPDIR=str(self.temporary)) as shop:
            shop.wait_for("ready in")
            status, lines = self.run_audit()
        self.assertEqual((status, len(lines)), (0, 1), lines)
        self.assertRegex(lines[0], f"^the databases in {self.temporary}/microshop-[^/]+ agree$")


class LossTest(AuditTest):
    def test_orders_after_the_loss_of_orders_db_are_good_and_the_old_reservations_are_named(self):
        (self.folder / "orders.db").unlink()
        with trading(self.folder) as shop:
            answers = [shop.ask("POST", "/orders", LAPTOPS) for _ in range(4)]
            self.assertEqual([answer.status for answer in answers], [201] * 4)
            self.assertEqual(shop.stock(101), 90, "the units of order 203 are reserved as before")
        self.assert_disagrees(self.folder, [
            f"reservation {RESERVATION} is for 2 units of product 101, but for no order"])

    def test_after_the_loss_of_products_db_each_confirmed_order_is_named(self):
        (self.folder / "products.db").unlink()
        with trading(self.folder):
            pass
        self.assert_disagrees(self.folder, [
            f"order {CONFIRMED} is confirmed for 2 units of product 101, "
            "but 0 of product 101 are reserved"])


class ReadOnlyTest(AuditTest):
    def test_the_files_of_a_shop_that_does_not_run_stay_as_they_are(self):
        before = contents(self.folder)
        self.assertEqual(set(before), {f"{name}.db" for name in SERVICES})
        self.assert_agrees()
        self.assertEqual(contents(self.folder), before)

    def test_the_wal_that_a_killed_shop_has_left_is_read_and_not_changed(self):
        killed = self.folder.with_name("killed")
        line, (name, script) = next(iter(VIOLATIONS.items()))
        with trading(self.folder):
            self.change(name, script)
            shutil.copytree(self.folder, killed)
        before = contents(killed)
        self.assertTrue(before[f"{name}.db-wal"])
        self.assert_disagrees(killed, [line])
        # A -shm is only an index of the WAL; the first reader makes it anew.
        kept = {name: content for name, content in before.items() if not name.endswith("-shm")}
        self.assertLessEqual(kept.items(), contents(killed).items())


class RunningShopTest(AuditTest):
    def test_a_busy_shop_has_no_violations(self):
        with trading(self.folder) as shop:
            answers = together(*[partial(trade, shop, 12)] * 4, *[self.assert_agrees] * 2)
        self.assertEqual(answers, [[201, 200] * 12] * 4 + [None] * 2)

    def test_a_change_between_looks_at_two_files_is_not_a_breach(self):
        for seen_first in ("products_file.reservations", "orders_file.orders"):
            with self.subTest(seen_first), trading(self.folder) as shop:
                placed = [shop.ask("POST", "/orders", LAPTOPS)]
                connection = overtaken(seen_first, partial(move_on, shop, placed))
                connect = partial(sqlite3.connect, factory=connection)
                with mock.patch.object(audit, "sqlite3", mock.Mock(connect=connect)):
                    self.assertEqual(audit.find_violations(self.folder), [])
                self.assertGreaterEqual(len(placed), 2 * len(audit.VIOLATIONS))


def move_on(shop, placed):
    """Cancel the order that was confirmed last, and place another."""
    shop.ask("POST", placed[-1].headers["location"] + "/cancel")
    placed.append(shop.ask("POST", "/orders", LAPTOPS))


def overtaken(seen_first, move):
    """Return a class of connections whose queries see one table before a move, others after it."""
    class Overtaken(sqlite3.Connection):
        def execute(self, query, values=()):
            if "SELECT" not in query:
                return super().execute(query, values)
            super().execute("BEGIN")
            super().execute(f"SELECT count(*) FROM {seen_first}").fetchone()
            move()
            rows = super().execute(query, values).fetchall()
            super().execute("COMMIT")
            return rows
    return Overtaken


class RemoteTest(AuditTest):
    """The audit of copies for which it asks the services."""

    def assert_found(self, shop, *violations):
        """Check which lines the audit of a running shop prints."""
        urls = ", ".join(urls_of(shop).values())
        verdict = f"the databases of {urls} {'do not agree:' if violations else 'agree'}"
        expected = (int(bool(violations)), [verdict, *(f"  {line}" for line in violations)])
        self.assertEqual(run_audit(*flags_of(urls_of(shop))), expected)

    def test_the_databases_of_a_running_shop_agree(self):
        with trading(self.folder) as shop:
            self.assert_found(shop)
            shop.ask("POST", "/orders", LAPTOPS)
            self.assert_found(shop)

    def test_what_was_broken_while_the_shop_was_stopped_is_found(self):
        lines = [line for line in VIOLATIONS
                 if line.startswith("product") or f"{CANCELLED} is" in line]
        for name, script in map(VIOLATIONS.get, lines):
            self.change(name, script)
        with trading(self.folder) as shop:
            self.assert_found(shop, *lines)

    def test_a_change_that_only_the_wal_has_is_found(self):
        line, (name, script) = next(iter(VIOLATIONS.items()))
        with trading(self.folder) as shop:
            self.change(name, script)
            self.assert_found(shop, line)

    def test_an_order_that_has_not_been_finished_for_a_minute_is_found(self):
        self.change("orders", "UPDATE orders SET status = 'pending', since = 1000, due = 2000 "
                              f"WHERE id = {CONFIRMED}")
        with (running(Users, data=self.folder) as users,
              running(Products, data=self.folder) as products,
              running(Orders, data=self.folder) as orders):  # it cannot reach the others
            self.assert_found(Shop(users, products, orders), f"order {CONFIRMED} has been pending "
                              "since 1970-01-01 00:16:40 (UTC), and is still not finished")

    def test_the_addresses_come_from_the_environment_too(self):
        with trading(self.folder) as shop:
            urls = {f"MICROSHOP_{name.upper()}_URL": url for name, url in urls_of(shop).items()}
            status, lines = run_audit(MICROSHOP_REMOTE="1", **urls)
        verdict = f"the databases of {', '.join(urls.values())} agree"
        self.assertEqual((status, lines), (0, [verdict]))

    def test_a_busy_shop_has_no_violations(self):
        with trading(self.folder) as shop:
            find = partial(audit.find_remote_violations, urls_of(shop), PATIENCE)
            audits = [lambda: [find() for _ in range(12)]] * 2
            *answers, first, second = together(*[partial(trade, shop, 12)] * 4, *audits)
        self.assertEqual(answers, [[201, 200] * 12] * 4)
        self.assertEqual(first + second, [[]] * 24, "what two audits found, 12 times each")

    def test_orders_that_move_on_between_two_copies_are_no_violation(self):
        copied, fetch_copy = [], audit.fetch_copy

        def fetch_then_move_on(service, url, timeout):
            copy = fetch_copy(service, url, timeout)
            if service != "users":  # which the queries do not need
                copied.append(service)
            if len(copied) % 2:
                move_on(shop, placed)
            return copy

        with (trading(self.folder) as shop,
              mock.patch.object(audit, "fetch_copy", fetch_then_move_on)):
            placed = [shop.ask("POST", "/orders", LAPTOPS)]
            look = partial(audit.look_at_copies, urls_of(shop), PATIENCE)
            self.assertEqual(len(look()), 2, "differences in one look: an order that was placed "
                                             "meanwhile, and one that was cancelled")
            self.assertEqual(audit.seen_twice(look), [], "differences in two looks")

    def test_the_copies_are_removed(self):
        temporary = self.folder.with_name("temporary")
        temporary.mkdir()
        with trading(self.folder) as shop, mock.patch.object(tempfile, "tempdir", str(temporary)):
            audit.look_at_copies(urls_of(shop), PATIENCE)
        self.assertEqual(list(temporary.iterdir()), [])


class UnreadableRemoteTest(AuditTest):
    """A service that sends no copy: one line says which one, why, and what to do."""

    BROKEN = "start the service there, or give another --users-url"
    OTHER = "another service is there, or an older version; give another --users-url"

    def setUp(self):
        super().setUp()
        self.shop = self.enterContext(trading(self.folder))

    def assert_line(self, url, why, *flags):
        """Check what the audit prints if users, which is asked first, is at another URL."""
        urls = {**urls_of(self.shop), "users": url}
        self.assertEqual(run_audit(*flags_of(urls), *flags), (1, [
            f"audit: cannot copy the database of users from {url}/database: {why}"]))

    def test_a_service_that_does_not_answer_is_named(self):
        self.assert_line(NOBODY, f"Connection refused; {self.BROKEN}")
        nowhere = "http://no-such-host.invalid:3001"
        status, [line] = run_audit(*flags_of({**urls_of(self.shop), "users": nowhere}))
        self.assertEqual(status, 1)
        self.assertRegex(line, rf"{nowhere}/database: the name no-such-host.invalid ")
        with upstream(lambda connection: connection.makefile("rb").read()) as url:  # to its end
            self.assert_line(url, "no answer (--timeout is 0.2 s); is the service running, and "
                             "not paused?", "--timeout", "0.2")

    def test_a_service_that_has_no_such_path_is_named(self):
        with upstream(Stub(always(response(b"{}", 404)))) as url:
            self.assert_line(url, f"answered 404: {self.OTHER}")

    def test_an_answer_that_is_not_a_database_is_named(self):
        for answer in (b"<html>", b"", b"SQLite format 2\0"):
            with self.subTest(answer), upstream(Stub(always(response(answer)))) as url:
                self.assert_line(url, f"this is no database: {self.OTHER}")
        with upstream(Stub(always(b"SSH-2.0-OpenSSH\r\n\r\n"))) as url:
            self.assert_line(url, f"the status line is malformed: {self.OTHER}")

    def test_more_than_a_service_sends_is_not_received(self):
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (database.MAX_COPY + 1)
        with upstream(Stub(always(head))) as url:
            self.assert_line(url, f"the body is larger than {database.MAX_COPY} bytes: "
                                  f"{self.OTHER}")

    def test_a_database_that_is_too_large_to_be_sent_is_to_be_audited_as_a_file(self):
        with mock.patch.object(database, "MAX_COPY", 4096):
            size = (self.folder / "users.db").stat().st_size
            self.assert_line(self.shop.users.url, f"users.db has {size} bytes, more than the "
                             "4096 that are sent: audit the file itself, with --data")

    def test_a_database_of_another_service_is_reported(self):
        for name, other in (("orders", self.shop.users.url), ("users", self.shop.products.url)):
            with self.subTest(name):
                urls = {**urls_of(self.shop), name: other}
                self.assertEqual(run_audit(*flags_of(urls)), (1, [
                    f"audit: {other}/database is not the database of {name}; check which service "
                    "is at which URL"]))

    def test_a_url_without_remote_is_refused_since_a_folder_would_be_checked(self):
        self.assertEqual(run_audit("--users-url", self.shop.users.url), (2, [
            "python -m microshop.audit: --users-url has no effect without --remote; add that "
            "(see --help)"]))

    def test_a_damaged_database_is_reported(self):
        damaged = self.folder / "damaged.db"
        damaged.write_bytes(self.shop.users.database.copy())
        damage_page(damaged)
        with upstream(Stub(always(response(damaged.read_bytes())))) as url:
            status, lines = run_audit(*flags_of({**urls_of(self.shop), "users": url}))
        self.assertEqual((status, len(lines)), (1, 1), lines)
        self.assertRegex(lines[0], "^audit: cannot read the databases of http://.*: users.db: ")

    def test_a_folder_and_remote_contradict_each_other(self):
        self.assertEqual(run_audit("--remote", "--data", self.folder), (2, [
            "python -m microshop.audit: --remote and --data contradict each other; choose one "
            "(see --help)"]))


# --- damages

def write_letter(path):
    path.write_text("Dear diary, " * 1000)


def damage_page(path):
    """Overwrite part of the second page, which belongs to a table."""
    with path.open("r+b") as file:
        file.seek(4096 + 8)
        file.write(b"\xff" * 500)


def damage_schema(path):
    """Make the text of the schema invalid UTF-8."""
    damaged = path.read_bytes().replace(b"CREATE TABLE", b"CREATE \xf6\xff\xff\xff\xff")
    path.write_bytes(damaged)


def make_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = [
    (make_folder, "users.db"), (write_letter, "users.db"), (damage_page, "users.db"),
    (damage_page, "orders.db"), (damage_schema, "products.db")]


if __name__ == "__main__":
    unittest.main()
