"""Calls to other services: which instance to call, when to retry, and when not to call at all.

`Client.call` is what a service or the gateway uses. An Upstream is a service's instances, together
with the policies for calling it (resilience.py). How bytes travel is in connections.py and wire.py.

Service discovery, how a caller finds the instances of a service, is configuration here: the base
URLs in MICROSHOP_USERS_URL and its like. Client-side load balancing, in Upstream.choose, means that
the caller itself spreads its calls over those instances, without a load balancer in between.

urllib's opener makes each request although connections.py does the work: it is the standard
library's place to plug in how a URL is opened. With our handler alone it follows no redirect,
raises for no status and ignores http_proxy, as it must between services.

Law: no service is known here by name, and no response body is looked into.
"""
import errno
import math
import random
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from microshop.chassis.connections import KeepAliveHandler, Reply, Request
from microshop.chassis.errors import (
    BadGateway, Broken, GatewayTimeout, ServiceError, Unreachable, UpstreamError,
    UpstreamUnavailable)
from microshop.chassis.resilience import Bulkhead, CircuitBreaker, Clock, LogLimit, RetryBudget

BULKHEAD_TIME = 0.5   # seconds to wait for one of the calls in flight to finish
MAX_RETRIES = 2
BACKOFF = 0.05        # seconds to wait at most before the first retry; doubles for the next one
IDEMPOTENT = {"GET", "HEAD", "OPTIONS", "PUT", "DELETE"}  # harmless to repeat: RFC 9110 9.2.2
FAILING = {500, 502, 503, 504}  # statuses that show a failing instance; a 4xx is about the request
OUT_OF_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}
COME_BACK = ("Retry-After", "1")

Tell = Callable[[str], None]  # writes one line to the log


def drop(text: str) -> None:
    """Log nothing."""


class Instance:
    """One of the processes that provide a service."""

    def __init__(self, base_url: str, clock: Clock):
        self.base_url = base_url
        self.breaker = CircuitBreaker(clock)
        self.in_flight = 0
        self.last_choice = 0  # the number of the choice that last fell on it


class Upstream:
    """A service to call: its instances, and the policies for calling it.

    An `idempotent_receiver` carries out a request with an Idempotency-Key only once, however often
    it arrives, so a POST with a key may be retried.
    """

    def __init__(self, name: str, base_urls: list[str], *, idempotent_receiver: bool = False,
                 max_in_flight: int = 64, clock: Clock = time.monotonic):
        self.name = name
        self.idempotent_receiver = idempotent_receiver
        self.max_in_flight = max_in_flight
        self.instances = [Instance(base_url, clock) for base_url in base_urls]
        self.choices = 0
        self._bulkhead = Bulkhead(max_in_flight)
        self._rejections = LogLimit(clock)
        self._retries = RetryBudget(clock)
        self._lock = threading.Lock()  # for changes; admits() may read what is a moment old

    def enter(self, wait: float, tell: Tell = drop) -> None:
        """Begin a call, after waiting up to `wait` seconds for its place in the bulkhead.

        Raises UpstreamUnavailable if the bulkhead stays full, or if every circuit breaker is open.
        """
        if not self.admits():
            raise self._breaker_is_open()
        if not self._bulkhead.acquire(timeout=min(wait, BULKHEAD_TIME)):
            self._tell_rejection(tell)
            reason = f"is at its limit of {self.max_in_flight} concurrent requests"
            raise UpstreamUnavailable(self.name, reason, [COME_BACK])
        with self._lock:
            self._retries.note_call()

    def leave(self) -> None:
        """End a call."""
        self._bulkhead.release()

    def choose(self, tried: list[Instance], tell: Tell = drop) -> tuple[Instance, int]:
        """Return the instance for the next try, and the ticket of its circuit breaker.

        It is one with the fewest tries in flight, and one not tried yet if there is any.
        Raises UpstreamUnavailable if every circuit breaker is open.
        """
        with self._lock:
            candidates = [one for one in self.instances if one.breaker.admits()]
            if not candidates:
                raise self._breaker_is_open()
            instance = min(
                candidates, key=lambda one: (one in tried, one.in_flight, one.last_choice))
            self.choices += 1
            instance.last_choice = self.choices
            instance.in_flight += 1
            ticket = instance.breaker.begin()
            is_first_probe = instance.breaker.is_first_probe(ticket)
        if is_first_probe:
            tell(f"{self._breaker_of(instance)} is half-open: this request probes the service")
        return instance, ticket

    def note_end(self, instance: Instance, ticket: int, succeeded: bool | None,
                 tell: Tell = drop) -> None:
        """Record how a try ended; None means that its end says nothing about the instance."""
        with self._lock:
            instance.in_flight -= 1
            change = instance.breaker.end(ticket, succeeded)
        if change:
            tell(f"{self._breaker_of(instance)} {change}")

    def admits(self, besides: Sequence[Instance] = ()) -> bool:
        """Return whether any instance may be called, besides these."""
        return any(one not in besides and one.breaker.admits() for one in self.instances)

    def take_retry(self) -> bool:
        """Return whether a retry may be made; if so, it is counted."""
        with self._lock:
            return self.admits() and self._retries.take()

    def _tell_rejection(self, tell: Tell) -> None:
        with self._lock:
            count = self._rejections.note()
        if count:
            tell(f"bulkhead for {self.name} is full (limit: {self.max_in_flight} requests in "
                 f"flight): {count} rejected since this was last logged")

    def _breaker_of(self, instance: Instance) -> str:
        return f"circuit breaker for {self.name} at {instance.base_url}"

    def _breaker_is_open(self) -> UpstreamUnavailable:
        wait = min(instance.breaker.remaining() for instance in self.instances)
        reason = "is temporarily unavailable: its circuit breaker is open"
        return UpstreamUnavailable(
            self.name, reason, [("Retry-After", str(max(math.ceil(wait), 1)))])


@dataclass(slots=True)
class Call:
    """One call: the request, and what came of the tries so far."""

    upstream: Upstream
    method: str
    target: str
    headers: dict[str, str]
    body: bytes | None
    deadline: float  # of time.monotonic
    log: Tell
    tried: list[Instance] = field(default_factory=list)
    failures: list[Broken | Unreachable] = field(default_factory=list)
    retries: int = 0

    def is_idempotent(self) -> bool:
        """Return whether sending the request twice does what sending it once does."""
        if self.method == "POST" and self.upstream.idempotent_receiver:
            return bool(self.headers.get("idempotency-key"))
        return self.method in IDEMPOTENT

    def error(self) -> UpstreamError:
        """Return the failure to report: the last after which the request may have been carried out.

        Without one, it is the last failure.
        """
        broken = [failure for failure in self.failures if isinstance(failure, Broken)]
        return (broken or self.failures)[-1]

    def tell(self, text: str) -> None:
        """Log an event of this call, with its request id."""
        self.log(f"{self.headers.get('x-request-id', '-')} {text}")


class Client:
    """Calls services, and gives up after `timeout` seconds. `tell` logs one event."""

    def __init__(self, timeout: float, tell: Tell = drop):
        self.timeout = timeout
        self._tell = tell
        self._connections = KeepAliveHandler()
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(self._connections)

    def call(self, upstream: Upstream, method: str, target: str,
             headers: dict[str, str] | None = None, body: bytes | None = None,
             deadline: float = math.inf) -> Reply:
        """Send a request and return the response, whatever its status.

        `target` is a path and query as in the request line; `headers` have lower-case names;
        `deadline` (of time.monotonic) may shorten the timeout. Raises
        - UpstreamUnavailable if the service was not called,
        - BadGateway if no connection could be made, or if it broke, or the response was invalid,
        - GatewayTimeout if the response was not complete in time.
        After BadGateway or GatewayTimeout, the request may have been carried out all the same
        (but not after Unreachable).
        """
        deadline = min(deadline, time.monotonic() + self.timeout)
        call = Call(upstream, method, target, headers or {}, body, deadline, self._tell)
        upstream.enter(deadline - time.monotonic(), call.tell)
        try:
            while True:
                try:
                    return self._try(call)
                except (Broken, Unreachable) as failure:
                    call.failures.append(failure)
                pause = find_pause(call)
                if pause is None:
                    raise call.error()
                if pause:
                    time.sleep(pause)
        finally:
            upstream.leave()

    def close(self) -> None:
        """Close the idle connections."""
        self._connections.close()

    def _try(self, call: Call) -> Reply:
        """Send the request to one instance, and tell its circuit breaker how that ended."""
        left = call.deadline - time.monotonic()
        had_fair_time = left > self.timeout / 2  # with less, a timeout may be its caller's fault
        instance, ticket = call.upstream.choose(call.tried, call.tell)
        succeeded = None
        try:
            request = make_request(call, instance, left)
            call.tried.append(instance)
            reply: Reply = self._opener.open(request)
            if reply.status not in FAILING:
                succeeded = True
            elif had_fair_time:
                succeeded = False
            return reply
        except (OSError, EOFError, ServiceError) as error:
            failure = explain(error, call.upstream.name, request)
            is_about_instance = had_fair_time or not isinstance(error, TimeoutError)
            if is_about_instance and not isinstance(failure, UpstreamUnavailable):
                succeeded = False
            raise failure from None
        finally:
            call.upstream.note_end(instance, ticket, succeeded, call.tell)


def find_pause(call: Call) -> float | None:
    """Decide whether to send a call again after its last failure.

    Returns the seconds to wait before, or None if it must not be sent again. That is
    - 0 if the instance could not be reached, and there is another one that was not tried yet;
    - a random time below a limit that doubles (exponential backoff with full jitter) if a retry
      does no harm, and if attempts, time and the retry budget allow it.
    """
    failure = call.failures[-1]
    if isinstance(failure, Unreachable) and call.upstream.admits(besides=call.tried):
        call.tell(f"retrying {call.method} {call.target} at another instance: {failure.detail}")
        return 0.0
    is_harmless = isinstance(failure, Unreachable) or call.is_idempotent()
    pause = random.uniform(0, BACKOFF * 2**call.retries)
    is_in_time = time.monotonic() + pause <= call.deadline
    may_retry = is_harmless and is_in_time and call.retries < MAX_RETRIES
    if not (may_retry and call.upstream.take_retry()):
        return None
    call.retries += 1
    call.tell(f"retrying {call.method} {call.target} in {pause * 1000:.0f} ms: {failure.detail}")
    return pause


def make_request(call: Call, instance: Instance, left: float) -> Request:
    """Return the request of a call for urllib. X-Request-Timeout says how many seconds are left."""
    request = Request(instance.base_url + call.target, call.body, call.headers, method=call.method,
                      origin_req_host="")  # needed for cookies only, and slow to find out
    request.add_header("X-Request-Timeout", f"{max(left, 0):.3f}")
    request.deadline = call.deadline
    request.is_retry = bool(call.tried)
    return request


def explain(error: Exception, service: str, request: Request) -> UpstreamError:
    """Return the error to raise for what went wrong between here and a service."""
    if getattr(error, "errno", 0) in OUT_OF_DESCRIPTORS:  # about this process, not the instance
        reason = "cannot be called now: too many files are open in this process"
        return UpstreamUnavailable(service, reason, [COME_BACK])
    if isinstance(error, ServiceError):
        return BadGateway(service, f"returned a response that is not valid HTTP: {error.detail}")
    if isinstance(error, EOFError):
        return Broken(service, "closed the connection before its response was complete")
    if isinstance(error, TimeoutError) and request.is_sent:
        return GatewayTimeout(service, "did not respond in time")
    cause = getattr(error, "strerror", None) or error
    if request.is_sent:
        return Broken(service, f"broke the connection: {cause}")
    return Unreachable(service, f"cannot be reached: {cause}")
