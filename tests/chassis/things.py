"""A small service that the tests of the chassis start: it knows things, and does as a test says.

The base classes of those tests are here too, and a clock that a test moves by hand.
"""
import contextlib
import threading
import time
import unittest
from argparse import Namespace
from collections.abc import Iterator
from types import ModuleType
from unittest import mock

from microshop.chassis import handler
from microshop.chassis.answer import Answer
from microshop.chassis.handler import Handler
from microshop.chassis.server import Service
from tests.helpers import PATIENCE, Answered, Wire, ask, running

GET = b"GET /things HTTP/1.1\r\nHost: shop\r\n\r\n"
GET_WAIT = b"GET /wait HTTP/1.1\r\nHost: shop\r\n\r\n"
POST = b"POST /things HTTP/1.1\r\nHost: shop\r\nContent-Type: application/json\r\n"
THINGS = '[{"id":1,"name":"Zoë"}]'.encode()  # the body of the answer to GET


class ThingsHandler(Handler):
    def setup(self) -> None:
        super().setup()
        self.server.handlers.append(self)

    def list_things(self) -> Answer:
        return Answer([{"id": 1, "name": "Zoë"}])

    def echo(self) -> Answer:
        return Answer(self.read_json(), 201)

    def get_thing(self, thing_id: int) -> Answer:
        return Answer({"id": thing_id})

    def remove_thing(self, thing_id: int) -> Answer:
        return Answer(status=204)

    def list_page(self) -> Answer:
        """Answer with a page of a collection that has every id."""
        def find(page):
            first = page.after + 1
            return [{"id": number} for number in range(first, first + page.limit + 1)]

        return self.answer_page(find)

    def show_deadline(self) -> Answer:
        """Answer with the seconds that remain for this request."""
        return Answer(self.deadline - handler.time.monotonic())

    def show_deadline_after_body(self) -> Answer:
        self.read_json()
        return self.show_deadline()

    def fail(self) -> Answer:
        raise RuntimeError("secret\n2026-01-01T00:00:00.000Z things forged GET /")

    def split_head(self) -> Answer:
        """Try to add a header to the answer by a line break in the value of another."""
        return Answer({}, headers=[("Location", "/x\r\nSet-Cookie: a=b")])

    def answer_large(self) -> Answer:
        """Answer with more than the buffers of both ends take."""
        return Answer("x" * 20_000_000)

    def wait(self) -> Answer:
        """Tell the test that this request is being worked on, and answer it when the test says."""
        self.server.waiting.release()
        self.server.go_on.wait(PATIENCE)
        return Answer("waited")

    routes = {
        "/things": {"GET": list_things, "POST": echo},
        "/things/{id}": {"GET": get_thing, "DELETE": remove_thing},
        "/deadline": {"GET": show_deadline, "POST": show_deadline_after_body},
        "/pages": {"GET": list_page},
        "/large": {"GET": answer_large},
        "/fail": {"GET": fail},
        "/split": {"GET": split_head},
        "/wait": {"GET": wait},
    }


class Things(Service):
    name, handler = "things", ThingsHandler

    def __init__(self, settings: Namespace):
        self.handlers: list[ThingsHandler] = []  # of each connection, in the order of arrival
        self.waiting, self.go_on = threading.Semaphore(0), threading.Event()
        super().__init__(settings)


class StoredThingsHandler(ThingsHandler):
    def change_thing(self, thing_id: int) -> Answer:
        with self.changing(lambda _, number: {"id": number}, thing_id):
            return Answer(status=204)

    routes = {
        "/things": ThingsHandler.routes["/things"],
        "/things/{id}": {"GET": ThingsHandler.get_thing, "PUT": change_thing},
        "/echo": {"POST": ThingsHandler.echo},
    }


class StoredThings(Things):
    """Things with a database, which is empty: a change needs a transaction."""

    handler, schema = StoredThingsHandler, [[]]


class StoppedClock:
    """Replaces the module `time` in a room: its monotonic clock moves when a test moves it."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def __getattr__(self, name: str):
        return getattr(time, name)

    def monotonic(self) -> float:
        return self.now


@contextlib.contextmanager
def stopped_clock(*rooms: ModuleType) -> Iterator[StoppedClock]:
    """Give these modules a clock that a test moves by hand.

    The kernel still measures the timeouts of connections in real seconds.
    """
    clock = StoppedClock()
    with contextlib.ExitStack() as stack:
        for room in rooms:
            stack.enter_context(mock.patch.object(room, "time", clock))
        yield clock


class ConnectionsTest(unittest.TestCase):
    """Base of tests that hold several connections to a service."""

    def connect(self, service: Things) -> Wire:
        """Return a new connection, which is closed after the test."""
        return self.enterContext(Wire(service.server_port))

    def read(self, connection: Wire, request: str) -> Answered:
        """Return the next answer; fail if the connection ends without one."""
        try:
            answer = connection.read()
        except OSError as error:  # a timeout, or a reset
            raise AssertionError(f"{request} got no answer: {error}") from None
        self.assertIsNotNone(answer, f"{request} got no answer: the connection was closed")
        return answer

    def assert_closed(self, connection: Wire, which: str) -> None:
        """Check that a service closes a connection, and sends nothing before it does."""
        try:
            is_closed = connection.is_closed()
        except TimeoutError:
            raise AssertionError(f"{which} is still open after {PATIENCE:g} s") from None
        self.assertTrue(is_closed, f"{which} got an answer instead of the end")

    def get_things(self, connection: Wire, client: str) -> None:
        """Ask for the things, and check that they come."""
        connection.send(GET)
        request = f"GET /things of {client}"
        self.assertEqual(self.read(connection, request).status, 200, request)

    def keep(self, service: Things, number: int) -> list[Wire]:
        """Return connections that were answered once, and are idle or about to be so."""
        connections = [self.connect(service) for _ in range(number)]
        for connection in connections:
            self.get_things(connection, "a client that has just connected")
        return connections

    def hold(self, service: Things) -> Wire:
        """Return a connection with a request that is worked on until `service.go_on` is set."""
        connection = self.connect(service)
        self.addCleanup(service.go_on.set)
        connection.send(GET_WAIT)
        self.assertTrue(service.waiting.acquire(timeout=PATIENCE),
                        f"GET /wait did not reach its route within {PATIENCE:g} s")
        return connection


class ThingsTest(ConnectionsTest):
    """Base of tests that share one running service."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.service = cls.enterClassContext(running(Things))
        cls.port = cls.service.server_port

    def ask(self, *request, **more) -> Answered:
        return ask(self.port, *request, **more)
