"""Orders and products are killed before and after each step: no order is lost, doubled or stuck."""
import contextlib
import itertools
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import unittest
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from microshop import SERVICES, audit, orders
from microshop.chassis import server
from microshop.chassis.access_log import AccessLog
from microshop.chassis.resilience import CircuitBreaker
from microshop.chassis.server import Service
from microshop.orders import Orders
from microshop.products import Products
from microshop.users import Users
from tests.helpers import (
    NOBODY, PATIENCE, TOP, Answered, Shop, make_databases, patient_services, running, wait_until)

ORDER = {"userId": 1, "productId": 101, "quantity": 3}
TOO_MANY = {**ORDER, "quantity": 10**9}

# What is done for an order, step by step, as tests/crash.py names it: by orders,
PLACED = ["write: INSERT orders", "call: GET users"]
CONFIRMED = ["call: PUT products", "write: UPDATE orders SET status = confirmed"]
REJECTED = [
    "write: UPDATE orders SET status = rejected", "call: DELETE products",
    "write: UPDATE orders SET due"]
POSTPONED = ["call: PUT products", "write: UPDATE orders SET due"]
RESUMED = ["write: UPDATE orders SET due", "call: GET users", *CONFIRMED]
CANCELLED = [
    "write: UPDATE orders SET status = cancelling", "call: DELETE products",
    "write: UPDATE orders SET status = cancelled"]
# and by products.
RESERVED = [
    "BEGIN", "SELECT reservations", "UPDATE products SET stock", "INSERT reservations", "COMMIT"]
REFUSED = [
    "BEGIN", "SELECT reservations", "UPDATE products SET stock", "SELECT products", "ROLLBACK"]
RELEASED = ["BEGIN", "UPDATE products SET stock", "INSERT reservations", "COMMIT"]


class Journey(NamedTuple):
    """The way of an order until it is finished, and what its client gets for it."""

    steps: list[str]           # all those of the service under test
    end: str                   # the status of the order when it is finished
    answer: int                # the status that the client gets if no process is killed,
    order: dict
    other_answer: int = 0      # and may get instead if one is
    is_cancelled: bool = False
    is_postponed: bool = False  # products cannot be reached from the service under test
    skipped: int = 0            # the first steps, since another journey has these, too
    is_resumed: bool = False    # the service under test finds the order pending when it starts


class CrashTests:
    """Give `doomed`, the class of the service to kill; `start_others()` starts what it needs."""

    @classmethod
    def setUpClass(cls):
        cls.enterClassContext(patient_services())
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        make_databases(cls.folder)
        cls.machine = cls.enterClassContext(subprocess.Popen(
            # -E ignores PYTHONUNBUFFERED, which would print lines in pieces
            [sys.executable, "-E", "-m", "tests.crash"],
            cwd=TOP, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        cls.names = map("key {}".format, itertools.count())
        cls.enterClassContext(mock.patch.multiple(orders, POLL=0.002, RETRY_FIRST=0.01))
        # The background asks a service again and again while it is away: no breaker may open, or
        # the client that comes back next would not be answered at once.
        cls.enterClassContext(mock.patch.multiple(CircuitBreaker, IN_A_ROW=1000, RECENT=1000))
        cls.enterClassContext(mock.patch.object(AccessLog, "event"))
        cls.enterClassContext(mock.patch.object(Service, "allow_reuse_port", True))
        cls.enterClassContext(mock.patch.object(server, "LAST_LOOK", 0))
        cls.users = cls.enterClassContext(running(Users, data=cls.folder))
        with running(Products, data=cls.folder) as products:
            Shop(cls.users, products, None).set_stock(101, 10**6)
        cls.settings = {
            "port": cls.enterClassContext(held_port()), "users_url": [cls.users.url],
            "timeout": PATIENCE}
        cls.shop = cls.start_others()

    def survive(self, journey: Journey) -> None:
        """Take the journey undisturbed, then with a kill before and after each step.

        A kill after a step leaves the same behind as one before the next step. So in one case the
        client comes back at once, while the order is unfinished, and in the other when the order
        has been finished without it.
        """
        self.assertEqual(self.take(journey, None, False), journey.answer)
        for number in range(journey.skipped, len(journey.steps)):
            for side, is_patient in (("before", True), ("after", False)):
                with self.subTest(side, step=journey.steps[number], number=number):
                    answer = self.take(journey, [number, side], is_patient)
                    self.assertIn(answer, (journey.answer, journey.other_answer))

    def take(self, journey: Journey, death: list | None, is_patient: bool) -> int:
        """Take a journey, and check that all is well then; return the client's final status."""
        key, before = next(self.names), self.rows("SELECT max(id) AS last FROM orders")[0]["last"]
        first = self.run_doomed(journey, death, key)
        with self.restarted():
            if is_patient:
                self.wait_until_finished()
            placed, *cancelled = self.visit(journey, key)
            self.wait_until_finished()
        added = self.rows("SELECT id, key, status FROM orders WHERE id > ?", [before])
        found = [(order["key"], order["status"]) for order in added]
        self.assertEqual(found, [(key, journey.end)], "the orders of this client")
        self.assertEqual(audit.find_violations(self.folder), [], "found by the audit")
        if first and first[0].status != 202:  # a final response is replayed
            self.assertEqual((placed.status, placed.body), (first[0].status, first[0].body))
        described = placed.json.get("order", placed.json)  # a problem contains its order
        self.assertLessEqual({"id": added[0]["id"], **journey.order}.items(), described.items())
        expected = {201: "confirmed", 202: "pending"}.get(placed.status, "rejected")
        self.assertEqual(described["status"], expected)
        self.assertEqual([answer.status for answer in cancelled], [200] * journey.is_cancelled)
        return placed.status

    def run_doomed(self, journey: Journey, death: list | None, key: str) -> list[Answered]:
        """Let the client visit a service that is killed; return the answers that it gets."""
        answers = []
        if journey.is_resumed:
            with self.restarted(products_url=[NOBODY]):
                answers = self.visit(journey, key)
        run = {"service": self.doomed.name, "data": str(self.folder), "death": death,
               "resumes": journey.is_resumed, **self.settings}
        if journey.is_postponed:
            run["products_url"] = [NOBODY]
        print(json.dumps(run), file=self.machine.stdin, flush=True)
        self.printed = ""
        self.wait_for("listening at|^ended")
        answers = answers or self.visit(journey, key)
        if journey.is_resumed:
            self.wait_for(f"^step {re.escape(journey.steps[-1])}$|^ended")
        if not death:
            with contextlib.suppress(ProcessLookupError):  # it may have ended itself
                os.kill(int(self.wait_for(r"^runs as (\d+)$")[1]), signal.SIGTERM)
        self.check_run(journey, death)
        return answers

    def check_run(self, journey: Journey, death: list | None) -> None:
        """Check that the run took the steps of the journey and ended where it should."""
        status = int(self.wait_for(r"^ended (-?\d+)$")[1])
        steps = re.findall("^step (.*)$", self.printed, re.M)
        expected = (journey.steps, 0)
        if death:
            expected = (journey.steps[:death[0] + 1], -signal.SIGKILL)
        self.assertEqual((steps, status), expected, self.printed)

    def visit(self, journey: Journey, key: str) -> list[Answered]:
        """Do what the client does, until the connection breaks; return the answers."""
        answers = []
        with contextlib.suppress(ConnectionError):
            answers.append(
                self.shop.ask("POST", "/orders", journey.order, Idempotency_Key=key))
            if journey.is_cancelled:
                location = answers[0].headers["location"]
                answers.append(self.shop.ask("POST", f"{location}/cancel"))
        return answers

    def restarted(self, **settings):
        """Run the service that was killed again, undisturbed."""
        return running(self.doomed, data=self.folder, **{**self.settings, **settings})

    def wait_for(self, pattern: str) -> re.Match:
        """Wait until the run has printed a line that matches."""
        while not (match := re.search(pattern, self.printed, re.M)):
            line = self.machine.stdout.readline()
            self.assertTrue(line, f"no line like {pattern!r} in:\n{self.printed}")
            self.printed += line
        return match

    def wait_until_finished(self) -> None:
        unfinished = "SELECT id FROM orders WHERE due IS NOT NULL"
        wait_until(lambda: not self.rows(unfinished), "every order to be finished")

    def rows(self, query: str, values: tuple | list = ()) -> list[sqlite3.Row]:
        path = self.folder / "orders.db"
        with contextlib.closing(sqlite3.connect(path, timeout=PATIENCE)) as connection:
            connection.row_factory = sqlite3.Row
            return connection.execute(query, values).fetchall()


class OrdersCrashTest(CrashTests, unittest.TestCase):
    doomed = Orders

    @classmethod
    def start_others(cls):
        products = cls.enterClassContext(running(Products, data=cls.folder))
        cls.settings["products_url"] = [products.url]
        with running(Orders, data=cls.folder):
            pass  # its first start, which makes the file
        return Shop(cls.users, products, Namespace(server_port=cls.settings["port"]))

    def test_orders_is_killed_at_each_step_of_an_order_that_is_confirmed(self):
        self.survive(Journey([*PLACED, *CONFIRMED], "confirmed", 201, ORDER))

    def test_orders_is_killed_at_each_step_of_an_order_without_a_user(self):
        self.survive(Journey(
            [*PLACED, *REJECTED], "rejected", 422, {**ORDER, "userId": 999}))

    def test_orders_is_killed_at_each_step_of_an_order_beyond_the_stock(self):
        self.survive(Journey(
            [*PLACED, "call: PUT products", *REJECTED], "rejected", 409, TOO_MANY))

    def test_orders_is_killed_at_each_step_of_a_cancellation(self):
        begun = [*PLACED, *CONFIRMED]
        self.survive(Journey(
            [*begun, *CANCELLED], "cancelled", 201, ORDER, is_cancelled=True,
            skipped=len(begun)))

    def test_orders_is_killed_at_each_step_of_an_order_while_products_is_away(self):
        self.survive(Journey(
            [*PLACED, *POSTPONED], "confirmed", 201, ORDER, is_postponed=True))

    def test_orders_is_killed_at_each_step_of_an_order_that_it_resumes_at_its_start(self):
        self.survive(Journey(RESUMED, "confirmed", 201, ORDER, is_resumed=True))


class ProductsCrashTest(CrashTests, unittest.TestCase):
    doomed = Products

    @classmethod
    def start_others(cls):
        products = Namespace(server_port=cls.settings["port"])
        urls = {"users_url": [cls.users.url],
                "products_url": [f"http://127.0.0.1:{products.server_port}"]}
        orders = cls.enterClassContext(
            running(Orders, data=cls.folder, timeout=PATIENCE, **urls))
        return Shop(cls.users, products, orders)

    def test_products_is_killed_at_each_step_of_a_reservation(self):
        self.survive(Journey(RESERVED, "confirmed", 201, ORDER, other_answer=202))

    def test_products_is_killed_at_each_step_of_a_refusal(self):
        self.survive(Journey(
            [*REFUSED, *RELEASED], "rejected", 409, TOO_MANY, other_answer=202))

    def test_products_is_killed_at_each_step_of_a_release(self):
        self.survive(Journey(
            [*RESERVED, *RELEASED], "cancelled", 201, ORDER, is_cancelled=True,
            skipped=len(RESERVED)))


class StepsTest(unittest.TestCase):
    """No step is overlooked: what outlives a process passes one of those that are watched."""

    def test_services_write_and_call_only_through_what_the_crash_tests_watch(self):
        for service in SERVICES:
            source = (TOP / "microshop" / f"{service}.py").read_text()
            with self.subTest(service):
                self.assertNotRegex(source, r"sqlite3|urllib|http\.client|socket")
                self.assertNotRegex(source, r"\bbegin\(|commit\(|\bBEGIN\b|\bCOMMIT\b|execut")
                statements = re.findall(r'\.rows\(\s*f?"?(\w+)', source)
                self.assertEqual(set(statements), {"SELECT"}, "rows() must only read")
                writers = set(re.findall(r"([\w.]+)\.write\(", source))
                self.assertLessEqual(writers, {"database", "transaction"})
                opened = re.findall(r"\bTransaction\(", source)
                self.assertEqual(opened, [], "only Database.transaction() may begin one")

    def test_a_database_commits_in_one_place(self):
        source = (TOP / "microshop/chassis/database.py").read_text()
        self.assertEqual(re.findall(r"\bCOMMIT|\bcommit\(", source), ["COMMIT"])


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """Keep a port for a service that is restarted: the system gives a bound port to no other."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


if __name__ == "__main__":
    unittest.main()
