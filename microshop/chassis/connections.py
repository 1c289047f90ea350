"""Kept-alive connections for urllib: its own http_open() opens a new connection for every request."""
import contextlib
import socket
import time
import urllib.request
from collections import defaultdict, deque
from typing import NamedTuple
from urllib.parse import urlsplit

from microshop.chassis import wire
from microshop.chassis.content import parse_json
from microshop.chassis.errors import BadRequest

MAX_ANSWER = 8 * 1024 * 1024   # bytes of an answer's body
MAX_IDLE = 128                 # connections kept for later, per address
IDLE_TIME = 30.0               # seconds one is kept: less than a service keeps its end (server.IDLE_TIME)
CONNECT_TIME = 1.0             # seconds to connect, so that there is time left for another instance


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
            if isinstance(detail := parse_json(self.body)["detail"], str) and detail:
                return detail
        return f"the answer was {self.status}"


class Request(urllib.request.Request):
    deadline = 0.0       # of time.monotonic
    is_repeated = False  # then it needs a new connection: one that was kept may be the reason
    is_sent = False      # whether a byte of it may have been


class KeepAliveHandler(urllib.request.BaseHandler):
    """Opens http: URLs as urllib's HTTPHandler does, but keeps the connections for the next requests."""

    def __init__(self) -> None:
        self._idle: defaultdict[str, deque[Connection]] = defaultdict(deque)

    def http_open(self, request: Request) -> Reply:
        connection = None if request.is_repeated else self._take_idle(request.host)
        if not connection:
            timeout = min(request.deadline - time.monotonic(), CONNECT_TIME)
            connection = Connection(request.host, max(timeout, 0.001))
        reusable = False
        try:
            connection.ask(request)
            reply, reusable = connection.read_reply(request.get_method())
            return reply
        finally:
            idle = self._idle[request.host]
            if reusable and len(idle) < MAX_IDLE:
                connection.idle_since = time.monotonic()
                idle.append(connection)
            else:
                connection.close()

    def close(self) -> None:
        for idle in self._idle.values():
            while idle:
                idle.pop().close()

    def _take_idle(self, address: str) -> "Connection | None":
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


class Connection:
    """A connection to an address."""

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
        try:
            self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:  # it is broken
            pass
        return True  # also where it was closed: recv() returns b"" then

    def ask(self, request: Request) -> None:
        """Send a request."""
        method = request.get_method()
        body: bytes = request.data or b""  # type: ignore[assignment]
        headers = [("Host", request.host), *request.header_items()]
        if body or method not in ("GET", "HEAD", "DELETE", "OPTIONS"):
            headers.append(("Content-Length", str(len(body))))
        self.stream.deadline = request.deadline
        message = wire.format_head(f"{method} {request.selector} HTTP/1.1", headers) + body
        request.is_sent = True
        self.stream.send(message)

    def read_reply(self, method: str) -> tuple[Reply, bool]:
        """Return the answer to what was asked, and whether the connection can be used again."""
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
