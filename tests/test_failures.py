"""The failure contract: what a client gets when a service fails, as a table in the README says."""
import contextlib
import os
import re
import selectors
import signal
import socket
import threading
import time
import unittest
from collections.abc import Callable, Iterator
from statistics import median
from unittest import mock

from microshop import SERVICES
from microshop.chassis import client
from microshop.chassis.errors import UpstreamUnavailable
from microshop.chassis.resilience import CircuitBreaker
from microshop.chassis.tracing import Trace
from microshop.gateway import Gateway
from tests import load
from tests.chassis.calls import reset_when_closed
from tests.helpers import (
    NOBODY, PATIENCE, TOP, Answered, ask, read_request, running, upstream, wait_until)
from tests.test_run_all import SmallShop

OK = b"HTTP/1.1 200 OK\r\n"
WELL = OK + b"Content-Length: 4\r\n\r\nwell"
TIMES = {"never": 0, "once": 1, "3 times": 3}
TRIED = "(?: (?:3 times|once|never) \\|){2}"  # the last two columns
TABLE = re.findall(rf"^\| .* \|{TRIED}$", (TOP / "README.md").read_text(), re.M)
ROWS = [[cell.strip() for cell in row.split("|")[1:-1]] for row in TABLE]


class Stub:
    """A service that sends the same for each request, and then may close, reset or hang.

    One that hangs answers its first request well, so that later requests find an open connection.
    """

    def __init__(self, sent: bytes, end: str = ""):
        self.sent, self.end = sent, end
        self.over = threading.Event()
        self.count = 0  # of requests

    def __call__(self, connection: socket.socket) -> None:
        while read_request(connection):
            self.count += 1
            if self.end == "hang" and self.count == 1:
                connection.sendall(WELL)
                continue
            connection.sendall(self.sent)
            if self.end == "hang":
                self.over.wait(PATIENCE)
            if self.end == "reset":
                reset_when_closed(connection)
            if self.end:
                return


def status(number: int) -> bytes:
    return b"HTTP/1.1 %d Phrase\r\nContent-Length: 2\r\n\r\n{}" % number


TWO_LENGTHS = OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}\n"
FAULTS: dict[str, Callable[[], Stub | None]] = {
    "refuses the connection": lambda: None,
    "closes before it answers": lambda: Stub(b"", "close"),
    "resets in the middle of the head": lambda: Stub(OK + b"Content-Le", "reset"),
    "resets in the middle of the body": lambda: Stub(OK + b"Content-Length: 9\r\n\r\n{", "reset"),
    "answers garbage": lambda: Stub(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"),
    "answers with two lengths": lambda: Stub(TWO_LENGTHS),
    "answers more than 8 MiB": lambda: Stub(OK + b"Content-Length: 8388609\r\n\r\n"),
    "is slow with the head": lambda: Stub(OK + b"Content-Le", "hang"),
    "is slow with the body": lambda: Stub(OK + b"Content-Length: 9\r\n\r\n{", "hang"),
    "answers 404": lambda: Stub(status(404)),
    "answers 500": lambda: Stub(status(500)),
    "has failed too often": lambda: Stub(status(500)),
    "is at its limit of requests": lambda: Stub(b"", "hang"),
}


class FailureTest(unittest.TestCase):
    def setUp(self) -> None:
        self.enterContext(mock.patch.object(client, "BULKHEAD_TIME", 0.02))
        self.enterContext(mock.patch.object(CircuitBreaker, "FIRST_PAUSE", PATIENCE))

    @contextlib.contextmanager
    def faulty_shop(self, what: str) -> Iterator[tuple[Gateway, Stub | None]]:
        """Open a gateway in front of a users service with this fault; products is well."""
        stub = FAULTS[what]()
        with contextlib.ExitStack() as stack:
            users = stack.enter_context(upstream(stub)) if stub else NOBODY
            products = stack.enter_context(upstream(Stub(WELL)))
            gateway = stack.enter_context(running(
                Gateway, users_url=[users], products_url=[products], max_in_flight=1,
                timeout=PATIENCE / 2))
            if stub:
                stack.callback(stub.over.set)
            self.prepare(what, gateway.server_port, stub, stack)
            yield gateway, stub

    def prepare(self, what: str, port: int, stub: Stub | None, stack: contextlib.ExitStack) -> None:
        """Send the requests that come before the one under test."""
        if stub and stub.end == "hang":
            self.assertEqual(ask(port, "GET", "/users").body, b"well")
        if what == "has failed too often":
            for _ in range(5):
                ask(port, "POST", "/users")
        if what == "is at its limit of requests":
            other = threading.Thread(target=ask, args=(port, "GET", "/users"))
            other.start()
            stack.callback(other.join)
            wait_until(lambda: stub.count == 2)

    def assert_failure(self, what: str, method: str, status: int, is_named: bool,
                       times: int) -> None:
        with self.faulty_shop(what) as (gateway, stub):
            users = gateway.upstreams["users"]
            tries_before, count_before = users.choices, stub and stub.count
            patience = {"X-Request-Timeout": "0.3"} if "slow" in what else {}
            answer = ask(gateway.server_port, method, "/users", patience)
            self.assertEqual(answer.status, status, answer.body)
            self.assertEqual(users.choices - tries_before, times, "tries of the gateway")
            if stub:
                self.assertEqual(stub.count - count_before, times, "requests that came to users")
            if is_named:
                self.assert_is_problem(answer)
            else:
                self.assertEqual(answer.body, b"{}", "the service's own response is passed on")
            products = ask(gateway.server_port, method, "/products")
            self.assertEqual(products.body, b"well", "products must not suffer from it")
            if stub:
                stub.over.set()

    def assert_is_problem(self, answer: Answered) -> None:
        self.assertEqual(answer.headers["content-type"], "application/problem+json")
        self.assertEqual((answer.json["service"], answer.json["status"]),
                         ("users", answer.status))
        self.assertEqual(answer.json["requestId"], answer.headers["x-request-id"])
        self.assertEqual("retry-after" in answer.headers, answer.status == 503, answer.headers)

    def test_the_table_in_the_readme_has_a_row_for_each_fault_and_no_other(self):
        self.assertEqual([row[0] for row in ROWS], list(FAULTS))
        for _, _, named, *times in ROWS:
            self.assertIn(named, ("yes", "no"))
            self.assertLessEqual(set(times), set(TIMES))

    def test_while_the_circuit_breaker_is_open_a_call_fails_faster_than_any_call_succeeds(self):
        def call(name: str) -> float:
            began = time.perf_counter()
            gateway.client.call(gateway.upstreams[name], "GET", f"/{name}", Trace("-"))
            return time.perf_counter() - began

        def call_in_vain(name: str) -> float:
            began = time.perf_counter()
            self.assertRaises(UpstreamUnavailable, gateway.client.call, gateway.upstreams[name],
                              "GET", f"/{name}", Trace("-"))
            return time.perf_counter() - began

        with self.faulty_shop("has failed too often") as (gateway, _):
            rejected = median(call_in_vain("users") for _ in range(100))
            answered = median(call("products") for _ in range(100))
            self.assertLess(rejected, answered, "seconds, as the median of 100 calls each")

    def test_health_shows_the_state_of_each_circuit_breaker(self):
        with self.faulty_shop("has failed too often") as (gateway, _):
            health = ask(gateway.server_port, "GET", "/health").json
        expected = {**{name: ["closed"] for name in SERVICES}, "users": ["open"]}
        self.assertEqual(health["breakers"], expected)
        self.assertEqual((health["status"], health["services"]["users"]), ("degraded", "away"))


class DeathTest(unittest.TestCase):
    """A service is killed under load. The supervisor keeps its port open, so that clients wait."""

    def exchange(self, connections: list[load.Connection], answers: int) -> None:
        """Send a GET after each answer, until `answers` came. Raises ValueError for a failure."""
        with selectors.DefaultSelector() as selector:
            for connection in connections:
                selector.register(connection.socket, selectors.EVENT_READ, connection)
            while answers > 0:
                ready = selector.select(PATIENCE)
                self.assertTrue(ready, f"no answer came; {answers} are still to come")
                for connection in (key.data for key, _ in ready):
                    if connection.receive():
                        connection.send(self.request)
                        answers -= 1

    def test_no_get_fails_when_the_process_of_its_service_is_killed(self):
        shop = SmallShop("--fresh", "--quiet", "--timeout", str(PATIENCE))
        self.addCleanup(shop.kill)
        shop.wait_until_ready()
        self.request = next(load.requests(shop.first, "/users/1"))
        for clients in (16, 64):
            connections = [load.Connection(shop.first) for _ in range(clients)]
            for connection in connections:
                self.addCleanup(connection.socket.close)
                connection.send(self.request)
            with self.subTest(clients=clients):
                self.exchange(connections, 10 * clients)  # so many that retries are affordable
                os.kill(shop.child("users"), signal.SIGKILL)
                self.exchange(connections, 10 * clients)
        self.assertFalse(shop.has_said("circuit breaker"), shop.last_lines())


def test_of(row: tuple[str, str, int, bool, int]) -> Callable[[FailureTest], None]:
    return lambda case: case.assert_failure(*row)


for what, number, named, of_get, of_post in ROWS:
    for method, times in (("GET", of_get), ("POST", of_post)):
        name = f"test_{method}_to_a_service_that_{what}_fails_as_the_readme_says"
        row = (what, method, int(number), named == "yes", TIMES[times])
        setattr(FailureTest, name.replace(" ", "_").lower(), test_of(row))


if __name__ == "__main__":
    unittest.main()
