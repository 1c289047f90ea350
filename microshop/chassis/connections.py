"""Kept-alive connections to other services, as a handler for urllib.

This module sends one request on one connection and reads the reply. It keeps connections for later
requests, since urllib's own HTTPHandler opens, and closes, a connection for every request.

Law: nothing here decides to send a request again, or to which instance. client.py does.
"""
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
from microshop.chassis.resolver import Resolver

MAX_REPLY = 8 * 1024 * 1024   # bytes of a reply's body, unless a request allows more
MAX_IDLE = 128                 # idle connections kept per address
IDLE_TIME = 30.0               # seconds to keep one: less than a service does (answer.IDLE_TIME)
MAX_AGE = 60.0                 # seconds to use one: then look up where the name leads by now
TRIM_PAUSE = 5.0               # seconds between two looks for idle connections of no use
CONNECT_TIME = 1.0             # seconds to look up and connect, so that time is left to retry


class Reply(NamedTuple):
    """The response of a service."""

    status: int
    version: str
    fields: wire.Fields
    body: bytes

    @property
    def problem(self) -> dict:
        """The problem document in the body (RFC 9457), or {} if there is none."""
        with contextlib.suppress(BadRequest):
            content = parse_json(self.body)
            if isinstance(content, dict):
                return content
        return {}

    @property
    def detail(self) -> str:
        """Why the request failed: the `detail` of its problem document, if any."""
        detail = self.problem.get("detail")
        if isinstance(detail, str) and detail:
            return detail
        return f"the response status was {self.status}"


class Request(urllib.request.Request):
    """A request for KeepAliveHandler, and how far it got."""

    deadline = 0.0       # of time.monotonic
    max_reply = MAX_REPLY
    is_retry = False     # then use a new connection: an old one may be why an attempt failed
    is_reuse = False     # whether it was sent on a connection that had been kept
    is_sent = False      # whether the service may have received any of it

    def to(self, method: str, target: str, headers: dict[str, str],
           body: bytes | None) -> "Request":
        """Return a request to the same server. It is copied: urllib would parse the URL again."""
        request = Request.__new__(Request)
        vars(request).update(vars(self))
        request.method, request.selector, request.headers = method, target, headers
        request.data = body  # type: ignore[assignment]
        return request


class KeepAliveHandler(urllib.request.BaseHandler):
    """Open http: URLs as urllib's HTTPHandler does, but keep connections for later requests."""

    def __init__(self) -> None:
        self._idle: defaultdict[str, deque[Connection]] = defaultdict(deque)  # by address
        self._trim_at = 0.0  # of time.monotonic
        self._resolver = Resolver()

    def http_open(self, request: Request) -> Reply:
        """Send a request and return the reply; urllib calls this.

        Raises OSError (TimeoutError at the deadline), EOFError if the connection was closed too
        early, and a ServiceError if the reply is not valid HTTP or too large.
        """
        connection = None if request.is_retry else self._take_idle(request.host)
        request.is_reuse = connection is not None
        if not connection:
            deadline = min(request.deadline, time.monotonic() + CONNECT_TIME)
            connection = Connection(request.host, self._resolver, deadline)
        is_reusable = False
        try:
            connection.send_request(request)
            reply, is_reusable = connection.read_reply(request.get_method(), request.max_reply)
            return reply
        finally:
            if is_reusable:
                self._keep(request.host, connection)
            else:
                connection.close()

    def trim(self) -> None:
        """Close the unusable idle connections, if the last look for them was some time ago."""
        now = time.monotonic()
        if now < self._trim_at:
            return
        self._trim_at = now + TRIM_PAUSE
        for idle in list(self._idle.values()):
            for connection in idle.copy():
                if not connection.is_usable():
                    with contextlib.suppress(ValueError):  # another thread has taken it meanwhile
                        idle.remove(connection)
                        connection.close()

    def close(self) -> None:
        """Close the idle connections."""
        for idle in list(self._idle.values()):  # a call that is still under way may add more
            with contextlib.suppress(IndexError):  # none is left
                while True:
                    idle.pop().close()

    def _keep(self, address: str, connection: "Connection") -> None:
        idle = self._idle[address]
        if len(idle) < MAX_IDLE:
            connection.idle_since = time.monotonic()
            idle.append(connection)
        else:
            connection.close()

    def _take_idle(self, address: str) -> "Connection | None":
        """Return the connection that was used last, or None; close those that are of no use.

        An IndexError ends the search when none is left: a test first would race other threads.
        """
        idle = self._idle[address]
        try:
            while not (connection := idle.pop()).is_usable():
                connection.close()
            return connection
        except IndexError:
            return None


def get(url: str, deadline: float, max_reply: int = MAX_REPLY, token: str = "") -> Reply:
    """Send a GET on a connection of its own, with a token if there is one; return the reply.

    Raises what KeepAliveHandler.http_open() raises.
    """
    credentials = {"Authorization": f"Bearer {token}"} if token else {}
    request = Request(url, headers={"Connection": "close", **credentials})
    request.deadline, request.max_reply = deadline, max_reply
    with contextlib.closing(KeepAliveHandler()) as handler:
        return handler.http_open(request)


def connect(hosts: list[str], port: int, deadline: float) -> socket.socket:
    """Connect to the first of these hosts that accepts. Raises the OSError of the last one tried.

    Each may take an equal share of the time left: one that is silent leaves time for the others.
    But of many, each takes 1 ms, and after the deadline none is tried.
    """
    while True:
        share = (deadline - time.monotonic()) / len(hosts)
        try:
            return socket.create_connection((hosts[0], port), max(share, 0.001))
        except OSError:
            if len(hosts) == 1 or time.monotonic() >= deadline:
                raise
        hosts = hosts[1:]


class Connection:
    """An open connection to an address. It serves one request at a time."""

    def __init__(self, address: str, resolver: Resolver, deadline: float):
        url = urlsplit(f"//{address}")
        hosts = resolver.find(url.hostname or "", deadline - time.monotonic())
        self.socket = connect(hosts, url.port or 80, deadline)
        self.socket.settimeout(None)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.stream = wire.Stream(self.socket)
        self.opened_at = time.monotonic()
        self.idle_since = 0.0  # of time.monotonic

    def close(self) -> None:
        self.socket.close()

    def is_usable(self) -> bool:
        """Return whether an idle connection is young enough, still open, and has no bytes unread.

        Such bytes belong to no request, and would be taken for the reply to the next one.
        """
        try:
            self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:  # open, and nothing has arrived
            return time.monotonic() < min(self.idle_since + IDLE_TIME, self.opened_at + MAX_AGE)
        except OSError:
            return False
        return False  # bytes, or b"" if the peer has closed it

    def send_request(self, request: Request) -> None:
        body: bytes = request.data or b""  # type: ignore[assignment]
        headers = [("Host", request.host), *request.header_items()]
        if request.data is not None:  # b"" is a body, too
            headers.append(("Content-Length", str(len(body))))
        line = f"{request.get_method()} {request.selector} HTTP/1.1"
        message = wire.format_head(line, headers) + body
        self.stream.deadline = request.deadline
        request.is_sent = True
        self.stream.send(message)

    def read_reply(self, method: str, limit: int) -> tuple[Reply, bool]:
        """Return the reply to a request, and whether the connection can be used again.

        `limit` is in bytes of its body.
        """
        status, version, fields, length = self._read_final_head()
        is_delimited = True
        if method == "HEAD" or status in (204, 304):
            body = b""
        elif length is not None:
            body = self.stream.read_body(length, limit)
        else:
            body, is_delimited = self.stream.read_to_end(limit), False
        is_reusable = (is_delimited and wire.keeps_alive(version, fields)
                       and not self.stream.has_bytes())
        return Reply(status, version, fields, body), is_reusable

    def _read_final_head(self) -> wire.Response:
        """Return the next head that is not an interim response (RFC 9110 section 15.2).

        Raises BadRequest if it is invalid, as wire.py does for both ends; client.to_upstream_error
        makes that a BadGateway.
        """
        while True:
            response = wire.parse_response(self.stream.read_head())
            if response.status >= 200:
                return response
            if response.status == 101:
                raise BadRequest("it switches protocols, although the request did not ask for that")
