"""Orders and products are killed before and after each step they take, and no order is lost, doubled or stuck."""
import ast
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

from microshop import audit, orders
from microshop.chassis import server
from microshop.chassis.access_log import AccessLog
from microshop.chassis.server import Service
from microshop.orders import Orders
from microshop.products import Products
from microshop.users import Users
from tests.helpers import NOBODY, PATIENCE, TOP, Answered, Shop, running, wait_until

ORDER = {"userId": 1, "productId": 101, "quantity": 3}

# What is done for an order, step by step, as tests/crash.py names it: by orders,
PLACED = ["write: INSERT orders", "call: GET users"]
CONFIRMED = ["call: PUT products", "write: UPDATE orders SET status = confirmed"]
REJECTED = ["write: UPDATE orders SET status = rejected", "call: DELETE products", "write: UPDATE orders SET due"]
POSTPONED = ["call: PUT products", "write: UPDATE orders SET due", "write: UPDATE orders SET answer"]
RESUMED = ["BEGIN", "PRAGMA", "PRAGMA", "COMMIT", "write: UPDATE orders SET due", "call: GET users", *CONFIRMED]
CANCELLED = ["write: UPDATE orders SET status = cancelling", "call: DELETE products",
             "write: UPDATE orders SET status = cancelled"]
# and by products.
RESERVED = ["BEGIN", "SELECT reservations", "UPDATE products SET stock", "INSERT reservations", "COMMIT"]
REFUSED = ["BEGIN", "SELECT reservations", "UPDATE products SET stock", "SELECT products", "ROLLBACK"]
RELEASED = ["BEGIN", "UPDATE products SET stock", "INSERT reservations", "COMMIT"]


class Journey(NamedTuple):
    """An order's way to its end: all the steps that the service under test takes for it, and what comes of it."""

    steps: list[str]
    end: str                   # the state that it comes to
    answer: int                # what its client is told when nobody dies
    order: dict
    other_answer: int = 0      # what its client may be told instead when somebody does
    is_cancelled: bool = False
    is_postponed: bool = False  # products is away from the service under test
    died_at: int = 0            # how many of its first steps are those of another journey, and were died at there
    is_resumed: bool = False    # products was away, and the service under test finds the order pending at its start


class CrashTests:
    """Give `doomed`, the class of the service that is killed, and start in `start_others()` what it needs."""

    @classmethod
    def setUpClass(cls):
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.machine = cls.enterClassContext(subprocess.Popen(
            [sys.executable, "-E", "-m", "tests.crash"],  # -E: with PYTHONUNBUFFERED, lines would come in pieces
            cwd=TOP, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        cls.names = map("key {}".format, itertools.count())
        cls.enterClassContext(mock.patch.multiple(orders, LOOK=0.002, RETRY_FIRST=0.01))
        cls.enterClassContext(mock.patch.object(AccessLog, "event"))
        cls.enterClassContext(mock.patch.object(Service, "allow_reuse_port", True))
        cls.enterClassContext(mock.patch.object(server, "LAST_LOOK", 0))
        cls.users = cls.enterClassContext(running(Users, data=cls.folder))
        with running(Products, data=cls.folder) as products:
            Shop(cls.users, products, None).ask("PUT", "/products/101", {"name": "Laptop", "stock": 10**6})
        cls.settings = {"port": cls.enterClassContext(held_port()), "users_url": [cls.users.url]}
        cls.shop = cls.start_others()

    def survive(self, journey: Journey) -> None:
        """Take the journey undisturbed, then with a death before and after each step.

        To die after a step or before the next leaves the same behind. So in one case the client comes back at
        once, while the order is on its way, and in the other when the order has come to its end without it.
        """
        self.assertEqual(self.take(journey, None, False), journey.answer)
        for number in range(journey.died_at, len(journey.steps)):
            for side, is_patient in (("before", True), ("after", False)):
                with self.subTest(side, step=journey.steps[number], number=number):
                    answer = self.take(journey, [number, side], is_patient)
                    self.assertIn(answer, (journey.answer, journey.other_answer))

    def take(self, journey: Journey, death: list | None, is_patient: bool) -> int:
        """Take a journey, and see all well at its end; return the status that the client was told of its order."""
        key, before = next(self.names), self.rows("SELECT max(id) AS last FROM orders")[0]["last"]
        told = self.run_doomed(journey, death, key)
        with self.restarted():
            if is_patient:
                self.wait_for_ends()
            placed, *cancelled = self.visit(journey, key)
            self.wait_for_ends()
        added = self.rows("SELECT id, key, status FROM orders WHERE id > ?", [before])
        self.assertEqual([(order["key"], order["status"]) for order in added], [(key, journey.end)])
        self.assertEqual(audit.find_breaches(self.folder), [])
        if told:
            self.assertEqual((placed.status, placed.body), (told[0].status, told[0].body))
        described = placed.json.get("order", placed.json)  # a refusal is about an order, too
        self.assertLessEqual({"id": added[0]["id"], **journey.order}.items(), described.items())
        self.assertEqual(described["status"], {201: "confirmed", 202: "pending"}.get(placed.status, "rejected"))
        self.assertEqual([answer.status for answer in cancelled], [200] * journey.is_cancelled)
        return placed.status

    def run_doomed(self, journey: Journey, death: list | None, key: str) -> list[Answered]:
        """Let the client visit a service that dies on the way, and return its answers as far as they came."""
        told = []
        if journey.is_resumed:
            with self.restarted(products_url=[NOBODY]):
                told = self.visit(journey, key)
        run = {"service": self.doomed.name, "data": str(self.folder), "death": death, "resumes": journey.is_resumed,
               **self.settings, **({"products_url": [NOBODY]} if journey.is_postponed else {})}
        print(json.dumps(run), file=self.machine.stdin, flush=True)
        self.printed = ""
        self.wait_for("listening at|^ended")
        told = told or self.visit(journey, key)
        if journey.is_resumed:
            self.wait_for(f"^step {re.escape(journey.steps[-1])}$|^ended")
        if not death:
            with contextlib.suppress(ProcessLookupError):  # it hung, and ended itself
                os.kill(int(self.wait_for(r"^runs as (\d+)$")[1]), signal.SIGTERM)
        status = int(self.wait_for(r"^ended (-?\d+)$")[1])
        steps = re.findall("^step (.*)$", self.printed, re.M)
        self.assertEqual((steps, status), (journey.steps[:death[0] + 1], -signal.SIGKILL) if death else
                         (journey.steps, 0), self.printed)
        return told

    def visit(self, journey: Journey, key: str) -> list[Answered]:
        """Do what the client does, until the connection breaks; return the answers."""
        answers = []
        with contextlib.suppress(ConnectionError):
            answers.append(self.shop.ask("POST", "/orders", journey.order, Idempotency_Key=key))
            if journey.is_cancelled:
                answers.append(self.shop.ask("POST", answers[0].headers["location"] + "/cancel"))
        return answers

    def restarted(self, **settings):
        """Run the service that died once more, as it is."""
        return running(self.doomed, data=self.folder, **{**self.settings, **settings})

    def wait_for(self, pattern: str) -> re.Match:
        """Wait until the run has printed a line that matches."""
        while not (match := re.search(pattern, self.printed, re.M)):
            line = self.machine.stdout.readline()
            self.assertTrue(line, f"no line like {pattern!r} in:\n{self.printed}")
            self.printed += line
        return match

    def wait_for_ends(self) -> None:
        """Wait until every order has come to its end."""
        wait_until(lambda: not self.rows("SELECT id FROM orders WHERE due IS NOT NULL"))

    def rows(self, query: str, values: tuple | list = ()) -> list[sqlite3.Row]:
        with contextlib.closing(sqlite3.connect(self.folder / "orders.db", timeout=PATIENCE)) as connection:
            connection.row_factory = sqlite3.Row
            return connection.execute(query, values).fetchall()


class OrdersCrashTest(CrashTests, unittest.TestCase):
    doomed = Orders

    @classmethod
    def start_others(cls):
        products = cls.enterClassContext(running(Products, data=cls.folder))
        cls.settings["products_url"] = [products.url]
        with running(Orders, data=cls.folder):
            pass  # but for its first start
        return Shop(cls.users, products, Namespace(server_port=cls.settings["port"]))

    def test_an_order_that_is_confirmed(self):
        self.survive(Journey([*PLACED, *CONFIRMED], "confirmed", 201, ORDER))

    def test_an_order_that_is_rejected_for_its_user(self):
        self.survive(Journey([*PLACED, *REJECTED], "rejected", 422, {**ORDER, "userId": 999}))

    def test_an_order_that_is_rejected_for_its_quantity(self):
        self.survive(Journey([*PLACED, "call: PUT products", *REJECTED], "rejected", 409, {**ORDER, "quantity": 10**9}))

    def test_an_order_that_is_cancelled(self):
        begun = [*PLACED, *CONFIRMED]
        self.survive(Journey([*begun, *CANCELLED], "cancelled", 201, ORDER, is_cancelled=True, died_at=len(begun)))

    def test_an_order_that_is_postponed_while_products_is_away(self):
        self.survive(Journey([*PLACED, *POSTPONED], "confirmed", 202, ORDER, other_answer=201, is_postponed=True))

    def test_an_order_that_is_resumed_at_the_start(self):
        self.survive(Journey(RESUMED, "confirmed", 202, ORDER, is_resumed=True))


class ProductsCrashTest(CrashTests, unittest.TestCase):
    doomed = Products

    @classmethod
    def start_others(cls):
        products = Namespace(server_port=cls.settings["port"])
        urls = {"users_url": [cls.users.url], "products_url": [f"http://127.0.0.1:{products.server_port}"]}
        return Shop(cls.users, products, cls.enterClassContext(running(Orders, data=cls.folder, **urls)))

    def test_units_that_are_reserved(self):
        self.survive(Journey(RESERVED, "confirmed", 201, ORDER, other_answer=202))

    def test_units_that_are_refused(self):
        self.survive(Journey([*REFUSED, *RELEASED], "rejected", 409, {**ORDER, "quantity": 10**9}, other_answer=202))

    def test_units_that_are_released(self):
        self.survive(Journey([*RESERVED, *RELEASED], "cancelled", 201, ORDER, is_cancelled=True, died_at=len(RESERVED)))


class StepsTest(unittest.TestCase):
    """No step is forgotten: what outlives a process goes through the three methods that tests/crash.py watches."""

    def test_services_write_and_call_in_no_other_way(self):
        for service in ("orders", "products"):
            source = (TOP / "microshop" / f"{service}.py").read_text()
            with self.subTest(service):
                self.assertNotRegex(source, r"sqlite3|urllib|http\.client|socket|commit\(|\bBEGIN\b|\bCOMMIT\b")
                self.assertEqual(set(re.findall(r'\.rows\(\s*f?"?(\w+)', source)), {"SELECT"})
                self.assertEqual(writes_outside_transactions(ast.parse(source)), [])

    def test_a_database_commits_in_one_place(self):
        source = (TOP / "microshop/chassis/database.py").read_text()
        self.assertEqual(re.findall(r"\bCOMMIT|\bcommit\(", source), ["COMMIT"])


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """Keep a port for a service that comes and goes: nobody else is given one that somebody has bound."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def writes_outside_transactions(tree: ast.AST) -> list[str]:
    """Return what is executed neither within a transaction nor in a function that says it is called within one."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inner = [function for function in functions if "within a transaction" in (ast.get_docstring(function) or "")]
    writers, found = {"execute", "executemany", "executescript", *(function.name for function in inner)}, []

    def look(node: ast.AST) -> None:
        if isinstance(node, ast.With) and re.search(r"\.(transaction|changing)\(", ast.unparse(node.items[0])):
            return
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in writers:
            found.append(ast.unparse(node))
        for child in ast.iter_child_nodes(node):
            look(child)

    for function in functions:
        if function not in inner:
            look(function)
    return found


if __name__ == "__main__":
    unittest.main()
