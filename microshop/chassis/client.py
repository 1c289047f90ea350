"""Calls to other services: urllib, on kept-alive connections.

The OpenerDirector is bare but for our handler: so it follows no redirect, raises for no status and
ignores http_proxy, as it must between services. `Client.call` is all that other code sees.
"""
import contextlib
import itertools
import select
import socket
import time
import urllib.request
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import urlsplit

from microshop.chassis import wire
from microshop.chassis.content import parse_json
from microshop.chassis.errors import BadGateway, BadRequest, GatewayTimeout, ServiceError

MAX_ANSWER = 8 * 1024 * 1024   # bytes of an answer's body
MAX_IDLE = 128                 # connections kept for later, per address
IDLE_TIME = 30.0               # seconds one is kept: less than a service keeps its end (server.IDLE_TIME)
REPEATABLE = {"GET", "HEAD", "OPTIONS", "PUT", "DELETE"}  # RFC 9110 9.2.2: twice does what once does


class Reply(NamedTuple):
    """What a service answered."""

    status: int
    version: str
    fields: wire.Fields
    body: bytes

    @property
    def detail(self) -> str:
        """What went wrong, as far as a problem document tells."""
        with contextlib.suppress(BadRequest, KeyError, TypeError):
            return str(parse_json(self.body)["detail"])
        return f"the answer was {self.status}"


class Upstream:
    """A service to call, at one or more base URLs: its copies, taken in turn.

    One that `keeps_keys` does what comes with an Idempotency-Key once, however often that comes.
    """

    def __init__(self, name: str, base_urls: list[str], *, keeps_keys: bool = False):
        self.name, self.keeps_keys = name, keeps_keys
        self.copies = itertools.cycle(base_urls)


class Client:
    """Calls services, and gives up after `timeout` seconds."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self._connections = KeepAliveHandler()
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(self._connections)

    def call(self, upstream: Upstream, method: str, target: str, headers: dict[str, str] | None = None,
             body: bytes | None = None, timeout: float | None = None) -> Reply:
        """Send a request and return whatever is answered, errors too.

        `target` is a path and query as on the wire. Raises BadGateway where no connection or no valid
        answer is to be had, GatewayTimeout where it is not whole within `timeout` seconds: then nobody
        knows whether the request was carried out.
        """
        request = _Request(next(upstream.copies) + target, body, headers or {}, method=method,
                           origin_req_host="")  # for cookies, and costly to find out
        request.repeatable = method in REPEATABLE or upstream.keeps_keys and request.has_header("Idempotency-key")
        try:
            return self._opener.open(request, timeout=timeout or self.timeout)
        except TimeoutError:
            raise GatewayTimeout(f"the {upstream.name} service did not answer in time", service=upstream.name) from None
        except EOFError:
            reason = "closed the connection before its answer was whole"
        except OSError as error:
            reason = f"is out of reach: {error.strerror or error}"
        except ServiceError as error:
            reason = f"gave an answer that is not valid HTTP: {error.detail}"
        raise BadGateway(f"the {upstream.name} service {reason}", service=upstream.name)

    def close(self) -> None:
        """Close the connections that are kept for later."""
        self._connections.close()


class _Request(urllib.request.Request):
    repeatable = False  # whether twice does what once does


class KeepAliveHandler(urllib.request.BaseHandler):
    """Opens http: URLs as urllib's HTTPHandler does, but keeps the connections for the next requests."""

    def __init__(self) -> None:
        self._idle: defaultdict[str, deque[_Connection]] = defaultdict(deque)

    def http_open(self, request: _Request) -> Reply:
        deadline = time.monotonic() + (request.timeout or 0)
        if connection := self._take_idle(request.host):
            try:
                connection.ask(request, deadline)
            except (ConnectionError, EOFError):  # not a byte of an answer came: the other end closed just now
                if not request.repeatable:
                    raise
            else:
                return self._finish(connection, request)
        connection = _Connection(request.host, max(deadline - time.monotonic(), 0.001))
        connection.ask(request, deadline)
        return self._finish(connection, request)

    def close(self) -> None:
        for idle in self._idle.values():
            while idle:
                idle.pop().close()

    def _finish(self, connection: "_Connection", request: urllib.request.Request) -> Reply:
        reply, reusable = connection.read_reply(request.get_method())
        idle = self._idle[request.host]
        if reusable and len(idle) < MAX_IDLE:
            connection.idle_since = time.monotonic()
            idle.append(connection)
        else:
            connection.close()
        return reply

    def _take_idle(self, address: str) -> "_Connection | None":
        """Return the connection used last that still serves, or None; drop those idle for too long."""
        idle, oldest = self._idle[address], time.monotonic() - IDLE_TIME
        try:
            while idle[0].idle_since < oldest:
                idle.popleft().close()
            while (connection := idle.pop()).has_news():
                connection.close()
            return connection
        except IndexError:  # none is left; another thread may have taken it meanwhile
            return None


class _Connection:
    """A connection to an address; it is closed when it fails."""

    def __init__(self, address: str, timeout: float):
        url = urlsplit(f"//{address}")
        self.socket = socket.create_connection((url.hostname, url.port or 80), timeout)
        self.socket.settimeout(None)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.stream = wire.Stream(self.socket)
        self.idle_since = 0.0

    def close(self) -> None:
        self.socket.close()

    def has_news(self) -> bool:
        """Tell whether an idle connection was closed, or holds bytes that would pass for the next answer."""
        if not hasattr(socket, "MSG_DONTWAIT"):  # Windows
            return bool(select.select([self.socket], [], [], 0)[0])
        try:
            self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def ask(self, request: urllib.request.Request, deadline: float) -> None:
        """Send a request, and wait for the first bytes of its answer."""
        method = request.get_method()
        body: bytes = request.data or b""  # type: ignore[assignment]
        headers = [("Host", request.host), *request.header_items()]
        if body or method not in ("GET", "HEAD", "DELETE", "OPTIONS"):
            headers.append(("Content-Length", str(len(body))))
        self.stream.deadline = deadline
        with self._closed_on_failure():
            self.stream.send(wire.format_head(f"{method} {request.selector} HTTP/1.1", headers) + body)
            self.stream.fill()

    def read_reply(self, method: str) -> tuple[Reply, bool]:
        """Return the answer to what was asked, and whether the connection can be used again."""
        with self._closed_on_failure():
            while (response := wire.parse_response(self.stream.read_head())).status < 200:  # interim, RFC 9110 15.2
                if response.status == 101:
                    raise BadRequest("it switches protocols, which nobody asked for")
            status, version, fields, length = response
            ends_itself = True
            if method == "HEAD" or status in (204, 304):
                body = b""
            elif length is not None:
                body = self.stream.read_body(length, MAX_ANSWER)
            else:
                body, ends_itself = self.stream.read_to_end(MAX_ANSWER), False
        reusable = ends_itself and wire.keeps_alive(version, fields) and not self.stream.has_bytes()
        return Reply(status, version, fields, body), reusable

    @contextlib.contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise
