"""What the tests say to the shop: start it, speak to it over real sockets, read what it answers."""
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

from microshop.audit import find_breaches
from microshop.orders import Orders
from microshop.products import Products
from microshop.users import Users

TOP = Path(__file__).resolve().parent.parent
PATIENCE = 10.0  # seconds after which a test that waits has failed
NOBODY = "http://127.0.0.1:1"  # a base URL at which nobody listens


class Answered(NamedTuple):
    """An answer as a client sees it; `headers` by lower-case name."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """A raw connection: what is sent is sent as it is, and answers are read one by one."""

    def __init__(self, port: int):
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.file = self.socket.makefile("rb")

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # the server may have closed before it had read all
            self.socket.sendall(data)

    def end(self) -> None:
        """Half-close: nothing more will be sent."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def read(self, method: str = "GET") -> Answered | None:
        """Read the next answer; None when the connection was closed instead."""
        line = self.file.readline()
        if not line:
            return None
        headers = {}
        while (field := self.file.readline()) not in (b"\r\n", b""):
            name, _, value = field.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        status = int(line.split()[1])
        body = b"" if method == "HEAD" or status < 200 else self.file.read(int(headers.get("content-length", 0)))
        return Answered(status, headers, body)

    def is_closed(self) -> bool:
        """Wait for the other end to close; False when it sends something instead."""
        with contextlib.suppress(ConnectionError):
            return self.file.read(1) == b""
        return True


def wait_until(condition: Callable[[], Any], what: str = "a condition") -> None:
    """Poll a condition that no event announces. Raises AssertionError if it does not come true.

    `what` says what is waited for, like "order 203 to be confirmed".
    """
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {PATIENCE:g} s in vain for {what}")
        threading.Event().wait(0.005)


def exchange(port: int, data: bytes) -> list[Answered]:
    """Send bytes on a new connection, half-close, and return every answer until it is closed."""
    with Wire(port) as wire:
        wire.send(data)
        wire.end()
        answers = []
        with contextlib.suppress(ConnectionError):
            while answer := wire.read():
                answers.append(answer)
        return answers


def ask(port: int, method: str = "GET", target: str = "/", headers: dict[str, str] | None = None,
        body: bytes | None = None) -> Answered:
    """Send one request through the standard library's client."""
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request(method, target, body, headers or {})
        response = connection.getresponse()
        received = {name.lower(): value for name, value in response.getheaders()}
        return Answered(response.status, received, response.read())
    finally:
        connection.close()


@contextlib.contextmanager
def running(service: type, **settings: Any) -> Iterator[Any]:
    """Serve in a thread of this process, on a free port and a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        values = {"host": "127.0.0.1", "port": 0, "data": Path(folder), "timeout": 5.0, "quiet": True,
                  "supervised": None, "grace": 4.0, "max_connections": 1024,
                  "users_url": [NOBODY], "products_url": [NOBODY], "orders_url": [NOBODY],
                  "token": "", "token_file": "", "rate": None, "max_in_flight": 64, **settings}
        server = service(Namespace(**values))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            if server.socket.fileno() >= 0:  # a test may have done it
                server.drain()
            server.close()


class Shop(NamedTuple):
    """Three services of one shop, without a gateway."""

    users: Any
    products: Any
    orders: Any

    def ask(self, method: str, target: str, content: Any = None, **headers: str) -> Answered:
        """Ask the service that the target is for, with JSON if there is content; Idempotency_Key="k" is a header."""
        server = {"users": self.users, "orders": self.orders}.get(re.split("[/?]", target)[1], self.products)
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        if content is None:
            return ask(server.server_port, method, target, fields)
        return ask(server.server_port, method, target, {"Content-Type": "application/json", **fields},
                   json.dumps(content).encode())

    def stock(self, product: int = 101) -> int:
        return self.ask("GET", f"/products/{product}").json["stock"]

    def status(self, order: int) -> str:
        return self.ask("GET", f"/orders/{order}").json["status"]

    @contextlib.contextmanager
    def with_orders_restarted(self) -> Iterator["Shop"]:
        """End the orders service, and run another on its database."""
        self.orders.shutdown()
        self.orders.drain()
        self.orders.close()
        with running(Orders, **{**vars(self.orders.settings), "port": 0}) as orders:
            yield self._replace(orders=orders)


@contextlib.contextmanager
def running_shop(**settings: Any) -> Iterator[Shop]:
    """Run users, products and orders in threads of this process, on one folder; `settings` are those of orders.

    What was done in the shop must pass the audit at the end.
    """
    with (tempfile.TemporaryDirectory() as name, running(Users, data=Path(name)) as users,
          running(Products, data=Path(name)) as products):
        urls = {"users_url": [users.url], "products_url": [products.url]}
        with running(Orders, **{**urls, "data": Path(name), **settings}) as orders:
            yield Shop(users, products, orders)
            if breaches := find_breaches(Path(name)):
                raise AssertionError("\n".join(breaches))


def together(*functions: Callable[[], Any]) -> list[Any]:
    """Call each in a thread of its own, all at once; return what each returned, or the exception that it raised."""
    start, outcomes = threading.Barrier(len(functions)), {}

    def call(number: int, function: Callable[[], Any]) -> None:
        start.wait(PATIENCE)
        try:
            outcomes[number] = function()
        except Exception as error:
            outcomes[number] = error

    threads = [threading.Thread(target=call, args=numbered, daemon=True) for numbered in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    if len(outcomes) < len(functions):
        raise AssertionError(f"{len(functions) - len(outcomes)} of {len(functions)} threads hang")
    return [outcomes[number] for number in range(len(functions))]


@contextlib.contextmanager
def process(*arguments: str, **environment: str) -> Iterator["Process"]:
    """Run `python -m ...` as a person would; it is ended at the end if it still runs."""
    child = Process(*arguments, **environment)
    try:
        yield child
    finally:
        child.close()


class Process:
    """A subprocess whose output, both streams together, is read in the background."""

    def __init__(self, *arguments: str, **environment: str):
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MICROSHOP_")}
        self.popen = subprocess.Popen(
            [sys.executable, "-m", *arguments], cwd=TOP, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env={**clean, "PYTHONUNBUFFERED": "1", **environment}, start_new_session=True)
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.popen.stdout:
            with self._news:
                self.lines.append(line.decode().rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wait_for(self, pattern: str, times: int = 1) -> re.Match:
        """Wait until a line matches for the `times`th time; fail with all that was printed if none does."""
        def find() -> re.Match | None:
            matches = [match for line in self.lines if (match := re.search(pattern, line))]
            return matches[times - 1] if len(matches) >= times else None
        with self._news:
            self._news.wait_for(lambda: find() or self._ended, PATIENCE)
            if not (match := find()):
                raise AssertionError(f"no line like {pattern!r} in:\n" + "\n".join(self.lines))
            return match

    def port(self, title: str) -> int:
        """Wait for a process to listen, and return its port."""
        return int(self.wait_for(rf"{title} listening at http://\S+:(\d+)$")[1])

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.popen.send_signal(number)
        return self.status()

    def status(self) -> int:
        """Wait for the end, of the output too."""
        status = self.popen.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status

    def close(self) -> None:
        """End it, by force if need be."""
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.status()
        self.popen.stdout.close()


@contextlib.contextmanager
def upstream(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A stub for a service that misbehaves: `answer` gets each accepted connection. Yields its base URL."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=100)

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(PATIENCE)
            answer(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(PATIENCE)


def read_request(connection: socket.socket) -> bytes:
    """Read one request's head, and its body if it states a length."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (chunk := connection.recv(65536)):
            return data
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\ncontent-length: *([0-9]+)", head)
    while length and len(body) < int(length[1]):
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


class Moody:
    """Stands before a service. Its `mood` is what it says and hangs up, or how it passes requests on.

    "well": as it should; "lossy": what is asked is done, but the answer is lost; "silent": nothing ever comes.
    """

    def __init__(self) -> None:
        self.port = 0
        self.mood: str | bytes = "well"
        self.calls: list[str] = []  # method and target of each

    def __call__(self, connection: socket.socket) -> None:
        while request := read_request(connection):
            self.calls.append(request.partition(b" HTTP/")[0].decode())
            if self.mood == "well":
                connection.sendall(self.pass_on(request))
                continue
            if self.mood == "silent":
                connection.recv(1)  # until the other end gives up
            elif self.mood == "lossy":
                self.pass_on(request)
            else:
                connection.sendall(self.mood)
            return

    def pass_on(self, request: bytes) -> bytes:
        with Wire(self.port) as wire:
            wire.send(request)
            wire.end()
            return wire.file.read()


@contextlib.contextmanager
def running_moody_shop() -> Iterator[tuple[Shop, Moody, Moody]]:
    """Run a shop whose orders service comes to users and products only through these two.

    Its log is not shown; it must tell of no failure but theirs.
    """
    users, products = Moody(), Moody()
    with (contextlib.redirect_stderr(io.StringIO()) as log, upstream(users) as users_url,
          upstream(products) as products_url, running_shop(users_url=[users_url], products_url=[products_url]) as shop):
        users.port, products.port = shop.users.server_port, shop.products.server_port
        yield shop, users, products
    if re.search(r"(?m)^\S+Z \w+ .* failed\b", log.getvalue()):
        raise AssertionError(log.getvalue())
