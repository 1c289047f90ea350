"""A shop on four hosts (hosts.py): what happens when the network between them fails."""
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from microshop import GATEWAY_PORT, SERVICES
from microshop.audit import find_violations
from tests.helpers import TOP, Answered, ask_json, together, wait_until
from tests.hosts import Hosts
from tests.peers import Absent
from tests.test_run_all import is_running

TIMEOUT = 3       # seconds: more than orders waits for products, and soon over
FAILED = (502, 503, 504)
ORDER = {"userId": 1, "productId": 101}
STOCK = 100       # of product 101, at first
FIRST_ORDERS = [201, 202]

RUN = """if True:  # a run of these tests
    from tests.hosts import Hosts
    from tests.peers import Absent
    try:
        with Hosts("gateway") as hosts:
            gateway = hosts.run("gateway", "microshop.gateway")
            gateway.wait_for("listening")
            hosts.way_to("gateway", 3000)
            print("pids", *[popen.pid for popen in [gateway.popen, *hosts.started]], flush=True)
            input()
    except Absent as absent:
        print(absent)
"""


class ShopOnHosts(Hosts):
    """Each service and the gateway on a host of its own; `folder` has a folder for each."""

    def __init__(self, folder: Path):
        super().__init__("gateway", *SERVICES)
        self.folder = folder

    def open(self) -> None:
        """Start the shop, and wait until it is ready."""
        urls = {f"MICROSHOP_{name.upper()}_URL": f"http://{self.addresses[name]}:{port}"
                for name, port in SERVICES.items()}
        everywhere = ("--host", "0.0.0.0", "--quiet")
        self.processes = {
            name: self.run(name, f"microshop.{name}", *everywhere,
                           "--data", str(self.folder / name), **urls)
            for name in SERVICES}
        self.processes["gateway"] = self.run(
            "gateway", "microshop.gateway", *everywhere, "--timeout", str(TIMEOUT), **urls)
        self.gateway = self.way_to("gateway", GATEWAY_PORT)
        for process in self.processes.values():
            process.wait_for("listening at")

    def ask(self, method: str, target: str, content: object = None, **headers: str) -> Answered:
        """Ask the gateway, as a client that is connected with the switch."""
        return ask_json(self.gateway, method, target, content, **headers)

    def place(self, key: str) -> Answered:
        return self.ask("POST", "/orders", ORDER, Idempotency_Key=key)

    def breaker(self) -> str:
        """Return the state of the gateway's circuit breaker for products."""
        return self.ask("GET", "/health").json["breakers"]["products"][0]

    def stock(self) -> int:
        wait_until(lambda: self.ask("GET", "/products/101").status == 200, "products to be back")
        return self.ask("GET", "/products/101").json["stock"]

    def audit(self) -> list[str]:
        """End the services, and audit copies of their databases, which are on different hosts."""
        for process in self.processes.values():
            process.stop()
        copies = self.folder / "copies"
        copies.mkdir()
        for name in SERVICES:
            shutil.copy(self.folder / name / f"{name}.db", copies)
        return find_violations(copies)


class ShopTestCase(unittest.TestCase):
    def setUp(self):
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        try:
            self.shop = self.enterContext(ShopOnHosts(folder))
        except Absent as absent:
            self.skipTest(f"there cannot be several hosts: {absent}")
        self.shop.open()

    def assert_orders(self, *placed: str) -> None:
        """Check that there are these orders and no others, all confirmed, and that stock agrees."""
        confirmed = [order["id"] for order in self.shop.ask("GET", "/orders?status=confirmed").json]
        expected = [*FIRST_ORDERS, *sorted(int(place.rpartition("/")[2]) for place in placed)]
        self.assertEqual(confirmed, expected, "the orders that are confirmed")
        self.assertEqual(len(self.shop.ask("GET", "/orders").json), len(confirmed), "all orders")
        self.assertEqual(self.shop.stock(), STOCK - len(placed), f"stock after {placed}")
        self.assertEqual(self.shop.audit(), [], "violations that the audit has found")


class CutHostTest(ShopTestCase):
    def test_while_the_host_of_products_is_cut_off_orders_wait_and_then_none_is_lost(self):
        shop = self.shop
        before = shop.place("before")
        self.assertEqual(before.status, 201, before)
        shop.cut("products")
        during = self.assert_that_products_alone_is_away()
        shop.join("products")
        wait_until(lambda: shop.ask("GET", during).json["status"] == "confirmed",
                   f"{during} to be confirmed, as products can be reached again")
        wait_until(lambda: shop.ask("GET", "/products").status == 200, "products to be back")
        self.assertEqual(shop.breaker(), "closed", "after an answer of products")
        self.assertEqual(shop.ask("GET", "/health").json["status"], "ok")
        self.assert_orders(before.headers["location"], during)

    def assert_that_products_alone_is_away(self) -> str:
        """Ask for everything; return the place of an order that was accepted."""
        shop = self.shop
        order, *answers = together(
            lambda: shop.place("during"), *[lambda: shop.ask("GET", "/products")] * 5)
        self.assertEqual((order.status, order.json["status"]), (202, "pending"), order)
        self.assertLessEqual({answer.status for answer in answers}, {*FAILED}, answers)
        self.assertTrue({answer.status for answer in answers} & {502, 504},
                        f"until the breaker opens, products cannot be reached: {answers}")
        wait_until(lambda: shop.ask("GET", "/products").status == 503,
                   "GET /products to get 503 at once, as the circuit breaker is open")
        wait_until(lambda: shop.breaker() == "open", "/health to say that it is open")
        self.assertEqual(shop.ask("GET", "/health").json["status"], "degraded")
        self.assertEqual(shop.ask("GET", "/users").status, 200, "users must not suffer")
        return order.headers["location"]


class CutBetweenTest(ShopTestCase):
    """The gateway and orders cannot reach each other, but both reach all others."""

    def test_clients_that_repeat_their_orders_meanwhile_get_one_order_each(self):
        shop, keys = self.shop, ("ann", "ben", "cat")
        self.statuses = {key: [] for key in keys}
        orders = shop.way_to("orders", SERVICES["orders"])

        def count(status: str) -> int:
            return len(ask_json(orders, "GET", f"/orders?status={status}").json)

        def break_and_join() -> None:
            wait_until(lambda: count("pending") == len(keys), "the orders to be stored")
            shop.cut("gateway", "orders")
            shop.processes["products"].popen.send_signal(signal.SIGCONT)
            wait_until(lambda: count("confirmed") == len(FIRST_ORDERS) + len(keys),
                       "orders, which can reach products, to finish them")
            wait_until(lambda: all(set(seen) & {*FAILED} for seen in self.statuses.values()),
                       "every client to get an error")
            shop.join("gateway", "orders")

        shop.processes["products"].popen.send_signal(signal.SIGSTOP)  # so that orders are pending
        _, *answers = together(break_and_join, *[lambda key=key: self.insist(key) for key in keys])
        self.assertEqual([answer.status for answer in answers], [201] * len(keys), answers)
        self.assert_orders(*(answer.headers["location"] for answer in answers))

    def insist(self, key: str) -> Answered:
        """Place an order again and again until it is decided."""
        while (answer := self.shop.place(key)).status in (202, *FAILED):
            self.statuses[key].append(answer.status)
        return answer


class KilledRunTest(unittest.TestCase):
    def test_a_run_that_is_killed_leaves_no_process_behind(self):
        run = subprocess.Popen([sys.executable, "-c", RUN], cwd=TOP, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with run:
            said = run.stdout.readline()
            run.kill()
        if not said.startswith("pids "):
            self.skipTest(f"there cannot be several hosts: {said.strip()}")
        pids = [int(pid) for pid in said.split()[1:]]
        self.assertEqual(len(pids), 3, said)
        wait_until(lambda: not any(map(is_running, pids)),
                   f"the switch, a relay and a process of a host to end: {pids}")


if __name__ == "__main__":
    unittest.main()
