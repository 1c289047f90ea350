"""The failure contract: what the README's table says of each fault of a service, cell by cell."""
import contextlib
import re
import socket
import struct
import threading
import time
import unittest
from collections.abc import Callable, Iterator
from unittest import mock

from microshop.chassis import client
from microshop.gateway import Gateway
from tests.helpers import NOBODY, PATIENCE, TOP, Answered, ask, read_request, running, upstream, wait_until

OK = b"HTTP/1.1 200 OK\r\n"
TIMES = {"never": 0, "once": 1, "3 times": 3}
ROWS = [[cell.strip() for cell in row.split("|")[1:-1]]
        for row in re.findall(r"^\| .* (?:times|once|never) \|$", (TOP / "README.md").read_text(), re.M)]


class Stub:
    """A service that sends the same for each request, and then resets the connection or hangs on to it."""

    def __init__(self, sent: bytes, end: str = ""):
        self.sent, self.end = sent, end
        self.over = threading.Event()
        self.count = 0

    def __call__(self, connection: socket.socket) -> None:
        while read_request(connection):
            self.count += 1
            connection.sendall(self.sent)
            if self.end == "hang":
                self.over.wait(PATIENCE)
            if self.end == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if self.end:
                return


def status(number: int) -> bytes:
    return b"HTTP/1.1 %d Well\r\nContent-Length: 2\r\n\r\n{}" % number


FAULTS: dict[str, Callable[[], Stub | None]] = {
    "refuses the connection": lambda: None,
    "closes before it answers": lambda: Stub(b"", "close"),
    "resets in the middle of the head": lambda: Stub(OK + b"Content-Le", "reset"),
    "resets in the middle of the body": lambda: Stub(OK + b"Content-Length: 9\r\n\r\n{", "reset"),
    "answers garbage": lambda: Stub(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"),
    "answers with two lengths": lambda: Stub(OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}\n"),
    "answers more than 8 MiB": lambda: Stub(OK + b"Content-Length: 8388609\r\n\r\n"),
    "is slow with the head": lambda: Stub(OK + b"Content-Le", "hang"),
    "is slow with the body": lambda: Stub(OK + b"Content-Length: 9\r\n\r\n{", "hang"),
    "answers 404": lambda: Stub(status(404)),
    "answers 500": lambda: Stub(status(500)),
    "has failed too often": lambda: Stub(status(500)),
    "has its fill of requests": lambda: Stub(b"", "hang"),
}


class FailureTest(unittest.TestCase):
    def setUp(self) -> None:
        self.enterContext(mock.patch.object(client, "BULKHEAD_TIME", 0.02))

    @contextlib.contextmanager
    def faulty_shop(self, what: str) -> Iterator[tuple[Gateway, Stub | None]]:
        """Open a gateway before a users service that has a fault; products is well."""
        stub, well = FAULTS[what](), Stub(OK + b"Content-Length: 4\r\n\r\nwell")
        with contextlib.ExitStack() as stack:
            url = stack.enter_context(upstream(stub)) if stub else NOBODY
            products = stack.enter_context(upstream(well))
            gateway = stack.enter_context(running(
                Gateway, users_url=[url], products_url=[products], max_in_flight=1,
                timeout=0.25 if "slow" in what else PATIENCE / 2))
            if stub:
                stack.callback(stub.over.set)
            if what == "has failed too often":
                for _ in range(5):
                    ask(gateway.server_port, "POST", "/users")
            if what == "has its fill of requests":
                other = threading.Thread(target=ask, args=(gateway.server_port, "GET", "/users"))
                other.start()
                stack.callback(other.join)
                wait_until(lambda: stub.count)
            yield gateway, stub

    def assert_failure(self, what: str, method: str, status: int, is_named: bool, times: int) -> None:
        with self.faulty_shop(what) as (gateway, stub):
            turns, count = gateway.upstreams["users"]._turns, stub and stub.count
            answer = ask(gateway.server_port, method, "/users")
            self.assertEqual(answer.status, status, answer.body)
            self.assertEqual(gateway.upstreams["users"]._turns - turns, times)
            if stub:
                self.assertEqual(stub.count - count, times)
            if is_named:
                self.assert_is_problem(answer)
            else:
                self.assertEqual(answer.body, b"{}")
            self.assertEqual(ask(gateway.server_port, method, "/products").body, b"well")
            if stub:
                stub.over.set()

    def assert_is_problem(self, answer: Answered) -> None:
        self.assertEqual(answer.headers["content-type"], "application/problem+json")
        self.assertEqual((answer.json["service"], answer.json["status"]), ("users", answer.status))
        self.assertEqual(answer.json["requestId"], answer.headers["x-request-id"])
        self.assertEqual("retry-after" in answer.headers, answer.status == 503)

    def test_every_fault_is_in_the_table_and_nothing_else(self):
        self.assertEqual([row[0] for row in ROWS], list(FAULTS))
        for _, _, named, *times in ROWS:
            self.assertIn(named, ("yes", "no"))
            self.assertLessEqual(set(times), set(TIMES))

    def test_while_the_breaker_is_open_the_answer_comes_at_once(self):
        with self.faulty_shop("has failed too often") as (gateway, _):
            users, times = gateway.upstreams["users"], []
            for _ in range(100):
                began = time.perf_counter()
                self.assertRaises(client.UpstreamUnavailable, gateway.client.call, users, "GET", "/users")
                times.append(time.perf_counter() - began)
            self.assertLess(sorted(times)[50], 0.001)

    def test_health_tells_the_state_of_each_breaker(self):
        with self.faulty_shop("has failed too often") as (gateway, _):
            health = ask(gateway.server_port, "GET", "/health").json
        self.assertEqual(health["breakers"], {"users": ["open"], "products": ["closed"], "orders": ["closed"]})
        self.assertEqual((health["status"], health["services"]["users"]), ("degraded", "away"))


def test_of(cell: tuple[str, str, int, bool, int]) -> Callable[[FailureTest], None]:
    return lambda case: case.assert_failure(*cell)


for what, number, named, of_get, of_post in ROWS:
    for method, times in (("GET", of_get), ("POST", of_post)):
        name = f"test_a_service_that_{what}_on_{method}".replace(" ", "_").lower()
        setattr(FailureTest, name, test_of((what, method, int(number), named == "yes", TIMES[times])))


if __name__ == "__main__":
    unittest.main()
