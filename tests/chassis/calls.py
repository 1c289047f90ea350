"""What test_client.py and test_connections.py share: stub services, a fake clock, a client."""
import socket
import struct
import threading
import time
import unittest
from collections.abc import Callable
from unittest import mock

from microshop.chassis import client
from microshop.chassis.client import Client, Reply, Upstream
from microshop.chassis.errors import BadGateway, UpstreamError
from microshop.chassis.resilience import CircuitBreaker, Outcome
from microshop.chassis.tracing import ClientSpan, Trace
from tests.helpers import PATIENCE, read_request, upstream

TIMEOUT = PATIENCE / 2  # of a client: it gives up before the stub does, which fails more clearly
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ALICE = OK + b"Content-Length: 5\r\n\r\nAlice"
BOB = CHUNKED + b"1;a=b\r\nB\r\n2\r\nob\r\n0\r\nT: x\r\n\r\n"
CLOSING = OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nAlice"
MALLORY = OK + b"Content-Length: 7\r\n\r\nMallory"


def status(number: int) -> bytes:
    """Return a response with this status and no body."""
    return b"HTTP/1.1 %d Phrase\r\nContent-Length: 0\r\n\r\n" % number


class Last(bytes):
    """A response after which a stub closes the connection."""


class Reset(Last):
    """A response after which a stub resets the connection."""


# What a service may have sent of a response when the connection breaks.
BROKEN = [
    kind(sent)
    for sent in (b"", OK + b"Content-Le", OK + b"Content-Length: 5\r\n\r\nAli",
                 CHUNKED + b"5\r\nAlice\r\n")
    for kind in (Last, Reset)]


class Stub:
    """A service that sends these responses one after another, and then repeats the last of them."""

    def __init__(self, *responses: bytes):
        self.responses = list(responses)
        self.connections: list[list[bytes]] = []  # the requests that came on each
        self.ended = threading.Semaphore(0)       # released once for each connection that ended

    def __call__(self, connection: socket.socket) -> None:
        requests: list[bytes] = []
        self.connections.append(requests)
        try:
            while request := read_request(connection):
                requests.append(request)
                response = self.responses[0]
                if len(self.responses) > 1:
                    self.responses.pop(0)
                connection.sendall(response)
                if isinstance(response, Reset):
                    reset_when_closed(connection)
                if isinstance(response, Last):
                    return
        finally:
            self.ended.release()

    def requests(self) -> list[bytes]:
        return [request for requests in self.connections for request in requests]


def reset_when_closed(connection: socket.socket) -> None:
    """Let close() send a reset instead of an orderly end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class FakeTime:
    """Replaces the time module inside client.py: its time passes only in sleep()."""

    def __init__(self) -> None:
        self.now = time.monotonic()  # of the real clock, since connections.py knows that one only
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def open_breaker(breaker: CircuitBreaker) -> None:
    """Let so many calls fail that the circuit breaker opens."""
    for _ in range(breaker.IN_A_ROW):
        breaker.end(breaker.begin(), Outcome.FAILED)


class ClientTest(unittest.TestCase):
    """A client whose time stands still, and that keeps what it logs."""

    def setUp(self) -> None:
        self.time = self.enterContext(mock.patch.object(client, "time", FakeTime()))
        self.log: list[str] = []
        self.kinds: set[str] = set()
        self.spans: list[ClientSpan] = []
        self.client = Client(TIMEOUT, self.note_event, self.spans.append)
        self.addCleanup(self.client.close)

    def note_event(self, text: str, kind: str) -> None:
        self.log.append(text)
        self.kinds.add(kind)

    def serve(self, *instances: Callable[[socket.socket], None] | str, **settings: int) -> Upstream:
        """Return a users service with these instances: stubs, or base URLs."""
        urls = [instance if isinstance(instance, str) else self.enterContext(upstream(instance))
                for instance in instances]
        return Upstream("users", urls, clock=self.time.monotonic, **settings)

    def make_hanging_stub(self) -> tuple[threading.Event, Callable[[socket.socket], None]]:
        """Return an event, and a stub that answers ALICE once the event is set."""
        go_on, stub = threading.Event(), Stub(ALICE)
        self.addCleanup(go_on.set)

        def hang(connection: socket.socket) -> None:
            go_on.wait(PATIENCE)
            stub(connection)

        return go_on, hang

    def refusing_url(self) -> str:
        """Return a base URL whose port is taken, but refuses connections."""
        taken = self.enterContext(socket.socket())
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"

    def call(self, users: Upstream, method: str = "GET", **more: object) -> Reply:
        return self.client.call(users, method, "/users", **{"trace": Trace("-"), **more})

    def call_in_turn(self, responses: list[bytes], *methods: str) -> tuple[list, list[int]]:
        """Call a service that sends these responses, once with each method.

        Returns the body or the kind of error of each call, and the number of requests that came on
        each connection.
        """
        stub, outcomes = Stub(*responses), []
        users = self.serve(stub)
        for method in methods:
            try:
                outcomes.append(self.call(users, method).body)
            except UpstreamError as error:
                kind = BadGateway if isinstance(error, BadGateway) else type(error)
                outcomes.append(kind)
        return outcomes, [len(requests) for requests in stub.connections]
