"""What the tests share: start services and processes, send requests, and wait for events.

All requests go over real sockets. Each request, each answer and each line of a log is noted in the
journal (journal.py), which the runner shows with a failure.
"""
import contextlib
import importlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from microshop import SERVICES
from microshop import orders as orders_module
from microshop.audit import find_violations
from microshop.chassis import access_log, database, wire
from microshop.chassis.server import Service
from microshop.orders import Orders
from microshop.products import Products
from microshop.users import Users
from tests import journal

TOP = Path(__file__).resolve().parent.parent
# Seconds: the bound on waits, reached only if what a test waits for does not come.
PATIENCE = float(os.environ.get("TEST_PATIENCE", 60))
NOBODY = "http://127.0.0.1:1"  # a base URL where no process listens
SHOWN = 20  # lines that a failure shows of a process's output


class Answered(NamedTuple):
    """An answer as a client sees it; `headers` by lower-case name."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """A raw connection: sends bytes unchanged, and reads answers one by one."""

    def __init__(self, port: int):
        self.port = port
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.file = self.socket.makefile("rb")

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        journal.note(f"to port {self.port}: {data[:300]!r}")
        with contextlib.suppress(ConnectionError):  # the server may close before it has read all
            self.socket.sendall(data)

    def end(self) -> None:
        """Half-close: nothing more will be sent."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def read(self, method: str = "GET") -> Answered | None:
        """Read the next answer; None if the connection was closed instead."""
        line = self.file.readline()
        if not line:
            journal.note(f"port {self.port} closed the connection")
            return None
        headers = {}
        while (field := self.file.readline()) not in (b"\r\n", b""):
            name, _, value = field.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        status, body = int(line.split()[1]), b""
        if method != "HEAD" and status >= 200:
            body = self.file.read(int(headers.get("content-length", 0)))
        journal.note(f"port {self.port} answered {status} {body[:300]!r}")
        return Answered(status, headers, body)

    def is_closed(self) -> bool:
        """Wait for the other end to close; False if it sends something instead."""
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


def await_message(stream: wire.Stream) -> bool:
    """Wait for a message to begin; return False if the stream ends instead."""
    try:
        while not stream.has_message():
            stream.deadline = time.monotonic() + PATIENCE
            stream.fill()
    except (OSError, EOFError):
        return False
    return True


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
    """Send one request with the standard library's client."""
    sent = " ".join(f"{part!r}" for part in (headers, body) if part)
    journal.note(f"to port {port}: {method} {target} {sent}")
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request(method, target, body, headers or {})
        response = connection.getresponse()
        received = {name.lower(): value for name, value in response.getheaders()}
        answered = Answered(response.status, received, response.read())
    finally:
        connection.close()
    journal.note(f"port {port} answered {answered.status} {answered.body[:300]!r}")
    return answered


def ask_json(port: int, method: str, target: str, content: Any = None,
             **headers: str) -> Answered:
    """Send one request, with JSON if there is `content`.

    A header is given as a keyword: Idempotency_Key="k".
    """
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    if content is None:
        return ask(port, method, target, fields)
    fields = {"Content-Type": "application/json", **fields}
    return ask(port, method, target, fields, json.dumps(content).encode())


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """Let logs in this process use sys.stderr, which a test may have redirected."""
    def write(descriptor: int, content: bytes) -> None:
        sys.stderr.write(content.decode())

    with mock.patch.object(access_log, "write_whole", write):
        yield


def flush(log: access_log.AccessLog) -> None:
    """Wait until a log has written its lines."""
    wait_until(lambda: not log._lines, "a log to be written")


@contextlib.contextmanager
def running(service: type, **settings: Any) -> Iterator[Any]:
    """Serve in a thread of this process, on a free port and a temporary folder."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if sys.stderr is sys.__stderr__:  # else a test reads the log
            stack.enter_context(journal.captured_log())
        stack.enter_context(log_to_stderr())
        values = {
            "host": "127.0.0.1", "port": 0, "data": Path(folder), "timeout": 5.0, "quiet": True,
            "supervised": None, "grace": 4.0, "max_connections": 1024, "max_in_flight": 64,
            "token": "", "token_file": "", "rate": None,
            **{f"{name}_url": [NOBODY] for name in SERVICES}, **settings}
        server = service(Namespace(**values))
        server.accept_thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        server.accept_thread.start()
        try:
            yield server
        finally:
            stop_accepting(server)
            if server.socket.fileno() >= 0:  # a test may have drained it
                server.drain()
            server.close()


def stop_accepting(server: Any) -> None:
    """End the accept loop of a service that is `running`, and wait for its end."""
    server.shutdown()
    server.accept_thread.join()


def service_of(name: str) -> type[Service]:
    """Import the module of a service, and return its class, like Users for "users"."""
    module = importlib.import_module(f"microshop.{name}")
    [service] = [value for value in vars(module).values()
                 if isinstance(value, type) and issubclass(value, Service) and value.name == name]
    return service


class Shop(NamedTuple):
    """The three services of one shop, without a gateway."""

    users: Any
    products: Any
    orders: Any

    def ask(self, method: str, target: str, content: Any = None, **headers: str) -> Answered:
        """Ask the service that owns the target, as ask_json() does."""
        owners = {"users": self.users, "orders": self.orders}
        server = owners.get(re.split("[/?]", target)[1], self.products)
        return ask_json(server.server_port, method, target, content, **headers)

    def stock(self, product: int = 101) -> int:
        return self.ask("GET", f"/products/{product}").json["stock"]

    def set_stock(self, product: int, stock: int) -> None:
        """Replace a product by the same with another stock."""
        fields = self.ask("GET", f"/products/{product}").json
        del fields["id"]
        self.ask("PUT", f"/products/{product}", {**fields, "stock": stock})

    def status(self, order: int) -> str:
        return self.ask("GET", f"/orders/{order}").json["status"]

    @contextlib.contextmanager
    def with_orders_restarted(self) -> Iterator["Shop"]:
        """End the orders service, and run another one on its database."""
        stop_accepting(self.orders)
        self.orders.drain()
        self.orders.close()
        with running(Orders, **{**vars(self.orders.settings), "port": 0}) as orders:
            yield self._replace(orders=orders)


@contextlib.contextmanager
def running_shop(**settings: Any) -> Iterator[Shop]:
    """Run users, products and orders in threads of this process; `settings` are those of orders.

    Their databases are in one folder, and must pass the audit at the end.
    """
    with (tempfile.TemporaryDirectory() as name, running(Users, data=Path(name)) as users,
          running(Products, data=Path(name)) as products):
        make_databases(Path(name))
        urls = {"users_url": [users.url], "products_url": [products.url]}
        with running(Orders, **{**urls, "data": Path(name), **settings}) as orders:
            yield Shop(users, products, orders)
            if violations := find_violations(Path(name)):
                raise AssertionError("the audit found:\n" + "\n".join(violations))


def together(*functions: Callable[[], Any]) -> list[Any]:
    """Call each function in a thread of its own, all at once; return their results in order.

    The result of a function that raises is its exception.
    """
    start, outcomes = threading.Barrier(len(functions)), {}

    def call(number: int, function: Callable[[], Any]) -> None:
        start.wait(PATIENCE)
        try:
            outcomes[number] = function()
        except Exception as error:
            outcomes[number] = error

    threads = [threading.Thread(target=call, args=numbered, daemon=True)
               for numbered in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    if len(outcomes) < len(functions):
        hung = len(functions) - len(outcomes)
        raise AssertionError(
            f"{hung} of {len(functions)} threads did not finish within {PATIENCE:g} s")
    return [outcomes[number] for number in range(len(functions))]


def fill(pipe: int) -> int:
    """Fill a pipe, as if nothing had read it for a while; return how many bytes it took."""
    size = 0
    os.set_blocking(pipe, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            size += os.write(pipe, b"\n" * 4096)
    os.set_blocking(pipe, True)
    return size


def clean_environment(**changes: str) -> dict[str, str]:
    """Return the environment without settings of microshop, and with changes."""
    clean = {name: value for name, value in os.environ.items()
             if not name.startswith("MICROSHOP_")}
    return {**clean, **changes}


@contextlib.contextmanager
def process(*arguments: str, **environment: str) -> Iterator["Process"]:
    """Run `python -m ...` as a person would; it is ended at the end if it still runs."""
    child = Process(*arguments, **environment)
    try:
        yield child
    finally:
        child.close()


class Process:
    """A subprocess whose output, both streams together, is read in the background.

    `within` is a command that runs another one in surroundings of its own, like nsenter.
    """

    def __init__(self, *arguments: str, folder: Path = TOP, within: Sequence[str] = (),
                 user: int | None = None, **environment: str):
        self.command = " ".join(["python -m", *arguments])
        self.popen = subprocess.Popen(
            [*within, sys.executable, "-m", *arguments], cwd=folder, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, user=user,
            env=clean_environment(**{"PYTHONUNBUFFERED": "1", **environment}))
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for output in self.popen.stdout:
            line = output.decode().rstrip("\n")
            journal.note(line)
            with self._news:
                self.lines.append(line)
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def wait_for(self, pattern: str, times: int = 1) -> re.Match:
        """Wait until a line matches for the `times`th time. Raises AssertionError if none does."""
        def find() -> re.Match | None:
            matches = [match for line in self.lines if (match := re.search(pattern, line))]
            return matches[times - 1] if len(matches) >= times else None

        with self._news:
            self._news.wait_for(lambda: find() or self._ended, PATIENCE)
            if match := find():
                return match
        end = "before it ended" if self._ended else f"within {PATIENCE:g} s"
        count = f"{times} lines" if times > 1 else "a line"
        raise AssertionError(f"{self.command} did not print {count} like {pattern!r} {end}; "
                             + self.last_lines())

    def last_lines(self) -> str:
        """Say what it printed last."""
        return "its last lines:\n" + "\n".join(f"  {line}" for line in self.lines[-SHOWN:])

    def port(self, title: str) -> int:
        """Wait for a process to listen, and return its port."""
        return int(self.wait_for(rf"{title}(?: listening)? at http://\S+:(\d+)$")[1])

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.popen.send_signal(number)
        return self.status()

    def status(self) -> int:
        """Wait for its end, and for the end of its output; return the exit status."""
        try:
            status = self.popen.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.command} was still running after {PATIENCE:g} s; "
                                 + self.last_lines()) from None
        self._reader.join(PATIENCE)
        return status

    def close(self) -> None:
        """End it, by force if it does not end by itself."""
        try:
            self.stop()
        except AssertionError:
            self.popen.kill()
            self.status()
        self.popen.stdout.close()


@contextlib.contextmanager
def upstream(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Run a stub for a service that misbehaves; yield its base URL.

    `answer` is called with each accepted connection, in a thread of its own.
    """
    listener = socket.create_server(("127.0.0.1", 0), backlog=100)

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(PATIENCE)
            answer(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

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
    """A proxy in front of a service; its `mood` decides what becomes of each request.

    "well"    the request is passed on, and the answer is passed back
    "lossy"   the request is passed on, but the answer is lost: the connection is closed
    "silent"  no answer ever comes
    bytes     they are sent instead of an answer, and the connection is closed
    """

    def __init__(self) -> None:
        self.port = 0
        self.mood: str | bytes = "well"
        self.calls: list[str] = []  # method and target of each request

    def __call__(self, connection: socket.socket) -> None:
        while request := read_request(connection):
            self.calls.append(request.partition(b" HTTP/")[0].decode())
            if self.mood == "well":
                connection.sendall(self.pass_on(request))
                continue
            if self.mood == "silent":
                while self.mood == "silent" and not select.select([connection], [], [], 0.01)[0]:
                    pass  # until the mood changes, or the other end gives up
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
    """Run a shop whose orders service reaches users and products only through two Moody proxies.

    The services must not log a failure of their own.
    """
    users, products = Moody(), Moody()
    with (journal.captured_log() as log, upstream(users) as users_url,
          upstream(products) as products_url,
          running_shop(users_url=[users_url], products_url=[products_url]) as shop):
        users.port, products.port = shop.users.server_port, shop.products.server_port
        yield shop, users, products
    if re.search(r"(?m)^\S+Z \w+ .* failed\b", log.getvalue()):
        raise AssertionError(f"a service logged a failure:\n{log.getvalue()}")


@contextlib.contextmanager
def patient_services() -> Iterator[None]:
    """Let services wait as long as tests do: on a slow machine no answer may become a 503 or 202.

    This holds for services that are started within; the time for a request is their `timeout`.
    """
    with (mock.patch.object(orders_module, "CALL_TIME", PATIENCE),
          mock.patch.multiple(database, QUEUE_TIMEOUT=PATIENCE, BUSY_TIMEOUT=PATIENCE)):
        yield


def make_databases(folder: Path) -> None:
    """Make the database of each service that has none yet, empty: the audit reads them all."""
    for name in SERVICES:
        (folder / f"{name}.db").touch()
