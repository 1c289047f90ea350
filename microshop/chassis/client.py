"""Calls to other services: urllib, on kept-alive connections.

The OpenerDirector is bare but for our handler: so it follows no redirect, raises for no status and
ignores http_proxy, as it must between services. `Client.call` is all that other code sees; it decides what
is sent again. An Upstream is what is known of a service, and the policies that calls to it are subject to.
"""
import contextlib
import errno
import math
import random
import select
import socket
import threading
import time
import urllib.request
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from microshop.chassis import wire
from microshop.chassis.content import parse_json
from microshop.chassis.errors import (
    BadGateway, BadRequest, Broken, GatewayTimeout, ServiceError, Unreachable, UpstreamError, UpstreamUnavailable)
from microshop.chassis.policies import Breaker, Clock, RetryBudget, Slots

MAX_ANSWER = 8 * 1024 * 1024   # bytes of an answer's body
MAX_IDLE = 128                 # connections kept for later, per address
IDLE_TIME = 30.0               # seconds one is kept: less than a service keeps its end (server.IDLE_TIME)
CONNECT_TIME = 1.0             # seconds to connect, so that there is time left for another copy
SLOT_TIME = 0.5                # seconds to wait for a slot of a service that has its fill of calls
MAX_RETRIES = 2
BACKOFF = 0.05                 # seconds before the first retry at most; it doubles before the next
REPEATABLE = {"GET", "HEAD", "OPTIONS", "PUT", "DELETE"}  # RFC 9110 9.2.2: twice does what once does
SICK = {500, 502, 503, 504}    # answers of a service that fails; a 4xx is about its client


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


class Copy:
    """One of the processes that are the same service."""

    def __init__(self, base_url: str, clock: Clock):
        self.base_url, self.breaker = base_url, Breaker(clock)
        self.in_flight = 0
        self.turn = 0  # of Upstream's choices, the last that fell on it


class Upstream:
    """A service to call, at one or more base URLs, and the policies that calls to it are subject to.

    One that `keeps_keys` does what comes with an Idempotency-Key once, however often that comes.
    """

    def __init__(self, name: str, base_urls: list[str], *, keeps_keys: bool = False, max_in_flight: int = 64,
                 clock: Clock = time.monotonic):
        self.name, self.keeps_keys, self.max_in_flight = name, keeps_keys, max_in_flight
        self.copies = [Copy(base_url, clock) for base_url in base_urls]
        self._slots = Slots(max_in_flight)  # a bulkhead: a service that hangs holds so many, no more
        self._retries = RetryBudget(clock)
        self._turns = 0
        self._lock = threading.Lock()  # of what changes; a mere look may be a moment old

    def enter(self, wait: float) -> None:
        """Take a slot within `wait` seconds. Raises UpstreamUnavailable if there is none, or no copy to be asked."""
        if not self.admits():
            raise self._spared()
        if not self._slots.acquire(timeout=min(wait, SLOT_TIME)):
            raise UpstreamUnavailable(self.name, f"has its fill of requests already: {self.max_in_flight}",
                                      [("Retry-After", "1")])
        with self._lock:
            self._retries.note_call()

    def leave(self) -> None:
        """Give the slot back."""
        self._slots.release()

    def choose(self, tried: list[Copy]) -> tuple[Copy, int]:
        """Return the copy with the least in flight, if possible one not tried yet, and its breaker's ticket.

        Raises UpstreamUnavailable where every breaker is open.
        """
        with self._lock:
            admitting = [copy for copy in self.copies if copy.breaker.admits()]
            if not admitting:
                raise self._spared()
            copy = min(admitting, key=lambda copy: (copy in tried, copy.in_flight, copy.turn))
            self._turns += 1
            copy.turn, copy.in_flight = self._turns, copy.in_flight + 1
            return copy, copy.breaker.begin()

    def note_end(self, copy: Copy, ticket: int, succeeded: bool | None) -> None:
        """Take note of how a call to a chosen copy ended; None where that shows nothing of the copy."""
        with self._lock:
            copy.in_flight -= 1
            copy.breaker.end(ticket, succeeded)

    def admits(self, but: Sequence[Copy] = ()) -> bool:
        """Tell whether any copy may be asked, but for these."""
        return any(copy not in but and copy.breaker.admits() for copy in self.copies)

    def take_retry(self) -> bool:
        """Tell whether any copy may be asked once more, within the budget for retries."""
        with self._lock:
            return self.admits() and self._retries.take()

    def _spared(self) -> UpstreamUnavailable:
        wait = min(copy.breaker.remaining() for copy in self.copies)
        return UpstreamUnavailable(self.name, "is not asked for a moment, since too many calls to it went wrong",
                                   [("Retry-After", str(max(math.ceil(wait), 1)))])


class Client:
    """Calls services, and gives up after `timeout` seconds."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self._connections = KeepAliveHandler()
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(self._connections)

    def call(self, upstream: Upstream, method: str, target: str, headers: dict[str, str] | None = None,
             body: bytes | None = None, deadline: float = math.inf) -> Reply:
        """Send a request and return whatever is answered, errors too.

        `target` is a path and query as on the wire; `deadline` (of time.monotonic) may shorten the timeout.
        What brought no answer is sent again where that is safe: not a byte of it had been sent, or twice does
        what once does. Where a copy is out of reach the next one is asked at once; any other retry waits,
        at random within a time that doubles (full jitter), and needs the budget's leave.
        Raises UpstreamUnavailable where the service is not asked, BadGateway where no connection or no valid
        answer is had, GatewayTimeout where it is not whole in time: nobody knows then whether it was carried out.
        """
        deadline = min(deadline, time.monotonic() + self.timeout)
        headers = headers or {}
        repeatable = method in REPEATABLE or (
            method == "POST" and upstream.keeps_keys and bool(headers.get("idempotency-key")))
        tried: list[Copy] = []
        retries = 0
        broken: Broken | None = None  # of a try that was sent: what happened last says less
        upstream.enter(deadline - time.monotonic())
        try:
            while True:
                try:
                    return self._try(upstream, tried, deadline, method, target, headers, body)
                except Broken as failure:
                    broken, is_safe = failure, repeatable
                except Unreachable as failure:
                    unreachable, is_safe = failure, True
                    if upstream.admits(but=tried):
                        continue
                pause = random.uniform(0, BACKOFF * 2**retries)
                is_in_time = time.monotonic() + pause <= deadline
                if not (is_safe and retries < MAX_RETRIES and is_in_time and upstream.take_retry()):
                    raise broken or unreachable
                retries += 1
                time.sleep(pause)
        finally:
            upstream.leave()

    def _try(self, upstream: Upstream, tried: list[Copy], deadline: float, method: str, target: str,
             headers: dict[str, str], body: bytes | None) -> Reply:
        """Send a request once, to a copy that is then among the tried, and let its breaker know what came of it."""
        left = deadline - time.monotonic()
        is_fair = left > self.timeout / 2  # else a copy that fails may just have had too little time
        copy, ticket = upstream.choose(tried)
        succeeded = None
        try:
            request = _Request(copy.base_url + target, body, headers, method=method,
                               origin_req_host="")  # for cookies, and costly to find out
            request.deadline, request.is_repeated = deadline, bool(tried)
            tried.append(copy)
            request.add_header("X-Request-Timeout", f"{max(left, 0):.3f}")
            reply: Reply = self._opener.open(request)
            if reply.status not in SICK:
                succeeded = True
            elif is_fair:
                succeeded = False
            return reply
        except (OSError, EOFError, ServiceError) as error:
            if getattr(error, "errno", 0) in (errno.EMFILE, errno.ENFILE):  # that is about us, and not about the copy
                raise UpstreamUnavailable(upstream.name, "cannot be asked now: too many files are open here",
                                          [("Retry-After", "1")]) from None
            if is_fair or not isinstance(error, TimeoutError):
                succeeded = False
            raise explain(error, upstream.name, request) from None
        finally:
            upstream.note_end(copy, ticket, succeeded)

    def close(self) -> None:
        """Close the connections that are kept for later."""
        self._connections.close()


def explain(error: Exception, service: str, request: "_Request") -> UpstreamError:
    """Return what to raise for what went wrong on the way to a service and back."""
    if isinstance(error, ServiceError):
        return BadGateway(service, f"gave an answer that is not valid HTTP: {error.detail}")
    if isinstance(error, EOFError):
        return Broken(service, "closed the connection before its answer was whole")
    if isinstance(error, TimeoutError) and request.is_sent:
        return GatewayTimeout(service, "did not answer in time")
    kind = Broken if request.is_sent else Unreachable
    return kind(service, f"is out of reach: {getattr(error, 'strerror', None) or error}")


class _Request(urllib.request.Request):
    deadline = 0.0       # of time.monotonic
    is_repeated = False  # then it needs a new connection: one that was kept may be the reason
    is_sent = False      # whether a byte of it may have been


class KeepAliveHandler(urllib.request.BaseHandler):
    """Opens http: URLs as urllib's HTTPHandler does, but keeps the connections for the next requests."""

    def __init__(self) -> None:
        self._idle: defaultdict[str, deque[_Connection]] = defaultdict(deque)

    def http_open(self, request: _Request) -> Reply:
        connection = None if request.is_repeated else self._take_idle(request.host)
        if not connection:
            timeout = min(request.deadline - time.monotonic(), CONNECT_TIME)
            connection = _Connection(request.host, max(timeout, 0.001))
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
        if not hasattr(socket, "MSG_DONTWAIT"):  # Windows
            return bool(select.select([self.socket], [], [], 0)[0])
        try:
            self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:  # it is broken
            pass
        return True  # also where it was closed: recv() returns b"" then

    def ask(self, request: _Request) -> None:
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
