"""Calls to other services: urllib, on kept-alive connections.

The OpenerDirector is bare but for our handler: so it follows no redirect, raises for no status and
ignores http_proxy, as it must between services. `Client.call` is all that other code sees; it decides what
is sent again. An Upstream is what is known of a service, and the policies that calls to it are subject to.
"""
import errno
import math
import random
import threading
import time
import urllib.request
from collections.abc import Sequence

from microshop.chassis.connections import KeepAliveHandler, Reply, Request
from microshop.chassis.errors import (
    BadGateway, Broken, GatewayTimeout, ServiceError, Unreachable, UpstreamError, UpstreamUnavailable)
from microshop.chassis.resilience import CircuitBreaker, Clock, RetryBudget, Bulkhead

BULKHEAD_TIME = 0.5                # seconds to wait for a slot of a service that has its fill of calls
MAX_RETRIES = 2
BACKOFF = 0.05                 # seconds before the first retry at most; it doubles before the next
REPEATABLE = {"GET", "HEAD", "OPTIONS", "PUT", "DELETE"}  # RFC 9110 9.2.2: twice does what once does
SICK = {500, 502, 503, 504}    # answers of a service that fails; a 4xx is about its client


class Instance:
    """One of the processes that are the same service."""

    def __init__(self, base_url: str, clock: Clock):
        self.base_url, self.breaker = base_url, CircuitBreaker(clock)
        self.in_flight = 0
        self.turn = 0  # of Upstream's choices, the last that fell on it


class Upstream:
    """A service to call, at one or more base URLs, and the policies that calls to it are subject to.

    One that `keeps_keys` does what comes with an Idempotency-Key once, however often that comes.
    """

    def __init__(self, name: str, base_urls: list[str], *, keeps_keys: bool = False, max_in_flight: int = 64,
                 clock: Clock = time.monotonic):
        self.name, self.keeps_keys, self.max_in_flight = name, keeps_keys, max_in_flight
        self.instances = [Instance(base_url, clock) for base_url in base_urls]
        self._bulkhead = Bulkhead(max_in_flight)  # a bulkhead: a service that hangs holds so many, no more
        self._retries = RetryBudget(clock)
        self._turns = 0
        self._lock = threading.Lock()  # of what changes; a mere look may be a moment old

    def enter(self, wait: float) -> None:
        """Take a slot within `wait` seconds. Raises UpstreamUnavailable if there is none, or no instance to be asked."""
        if not self.admits():
            raise self._spared()
        if not self._bulkhead.acquire(timeout=min(wait, BULKHEAD_TIME)):
            raise UpstreamUnavailable(self.name, f"has its fill of requests already: {self.max_in_flight}",
                                      [("Retry-After", "1")])
        with self._lock:
            self._retries.note_call()

    def leave(self) -> None:
        """Give the slot back."""
        self._bulkhead.release()

    def choose(self, tried: list[Instance]) -> tuple[Instance, int]:
        """Return the instance with the least in flight, if possible one not tried yet, and its breaker's ticket.

        Raises UpstreamUnavailable where every breaker is open.
        """
        with self._lock:
            admitting = [instance for instance in self.instances if instance.breaker.admits()]
            if not admitting:
                raise self._spared()
            instance = min(admitting, key=lambda instance: (instance in tried, instance.in_flight, instance.turn))
            self._turns += 1
            instance.turn, instance.in_flight = self._turns, instance.in_flight + 1
            return instance, instance.breaker.begin()

    def note_end(self, instance: Instance, ticket: int, succeeded: bool | None) -> None:
        """Take note of how a call to a chosen instance ended; None where that shows nothing of the instance."""
        with self._lock:
            instance.in_flight -= 1
            instance.breaker.end(ticket, succeeded)

    def admits(self, but: Sequence[Instance] = ()) -> bool:
        """Tell whether any instance may be asked, but for these."""
        return any(instance not in but and instance.breaker.admits() for instance in self.instances)

    def take_retry(self) -> bool:
        """Tell whether any instance may be asked once more, within the budget for retries."""
        with self._lock:
            return self.admits() and self._retries.take()

    def _spared(self) -> UpstreamUnavailable:
        wait = min(instance.breaker.remaining() for instance in self.instances)
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
        what once does. Where an instance is out of reach the next one is asked at once; any other retry waits,
        at random within a time that doubles (full jitter), and needs the budget's leave.
        Raises UpstreamUnavailable where the service is not asked, BadGateway where no connection or no valid
        answer is had, GatewayTimeout where it is not whole in time: nobody knows then whether it was carried out.
        """
        deadline = min(deadline, time.monotonic() + self.timeout)
        headers = headers or {}
        repeatable = method in REPEATABLE or (
            method == "POST" and upstream.keeps_keys and bool(headers.get("idempotency-key")))
        tried: list[Instance] = []
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

    def _try(self, upstream: Upstream, tried: list[Instance], deadline: float, method: str, target: str,
             headers: dict[str, str], body: bytes | None) -> Reply:
        """Send a request once, to an instance that is then among the tried, and let its breaker know what came of it."""
        left = deadline - time.monotonic()
        is_fair = left > self.timeout / 2  # else an instance that fails may just have had too little time
        instance, ticket = upstream.choose(tried)
        succeeded = None
        try:
            request = Request(instance.base_url + target, body, headers, method=method,
                               origin_req_host="")  # for cookies, and costly to find out
            request.deadline, request.is_repeated = deadline, bool(tried)
            tried.append(instance)
            request.add_header("X-Request-Timeout", f"{max(left, 0):.3f}")
            reply: Reply = self._opener.open(request)
            if reply.status not in SICK:
                succeeded = True
            elif is_fair:
                succeeded = False
            return reply
        except (OSError, EOFError, ServiceError) as error:
            if getattr(error, "errno", 0) in (errno.EMFILE, errno.ENFILE):  # that is about us, and not about the instance
                raise UpstreamUnavailable(upstream.name, "cannot be asked now: too many files are open here",
                                          [("Retry-After", "1")]) from None
            if is_fair or not isinstance(error, TimeoutError):
                succeeded = False
            raise explain(error, upstream.name, request) from None
        finally:
            upstream.note_end(instance, ticket, succeeded)

    def close(self) -> None:
        """Close the connections that are kept for later."""
        self._connections.close()


def explain(error: Exception, service: str, request: "Request") -> UpstreamError:
    """Return what to raise for what went wrong on the way to a service and back."""
    if isinstance(error, ServiceError):
        return BadGateway(service, f"gave an answer that is not valid HTTP: {error.detail}")
    if isinstance(error, EOFError):
        return Broken(service, "closed the connection before its answer was whole")
    if isinstance(error, TimeoutError) and request.is_sent:
        return GatewayTimeout(service, "did not answer in time")
    kind = Broken if request.is_sent else Unreachable
    return kind(service, f"is out of reach: {getattr(error, 'strerror', None) or error}")
