"""Calls to other services: which instance to call, when to retry, and when not to call at all.

`Client.call` is what a service or the gateway uses. An Upstream is a service's instances, together
with the policies for calling it (resilience.py). How bytes travel is in connections.py and wire.py.

Service discovery (how a caller finds the instances of a service) is configuration here: the base
URLs in MICROSHOP_USERS_URL and similar variables. Client-side load balancing (Upstream.choose)
means that the caller itself spreads its calls over those instances.

Requests go through urllib's opener, because that is where the standard library lets us plug in our
own way to open a URL (connections.py). Our handler is the only one, so the opener follows no
redirects, raises no error for a status, and ignores http_proxy. All three are wanted here.

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
    RETRY_SOON, BadGateway, BreakerOpen, Broken, BulkheadFull, GatewayTimeout, ServiceError, Stale,
    Unreachable, UpstreamError, UpstreamUnavailable)
from microshop.chassis.resilience import Bulkhead, CircuitBreaker, Clock, Outcome, RetryBudget
from microshop.chassis.tracing import MAX_METHOD, MAX_TARGET, ClientSpan, Trace, make_span_id

BULKHEAD_TIME = 0.5   # seconds to wait for a place in the bulkhead, and then for a probe to end
MAX_RETRIES = 2
BACKOFF = 0.05        # the longest wait before the first retry, in seconds; doubles for the next
IDEMPOTENT = {"GET", "HEAD", "OPTIONS", "PUT", "DELETE"}  # harmless to repeat: RFC 9110 9.2.2
FAILING = {500, 502, 504}  # show a failing instance; 503 comes from a live one that is busy
# Methods, and statuses that a retry may get because an earlier attempt was carried out.
OWN_EFFECTS = {("DELETE", 404), ("DELETE", 412), ("POST", 412), ("PUT", 412)}
OUT_OF_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}

Log = Callable[[str, str], None]  # logs an event: its text, and its kind (see AccessLog)
Record = Callable[[ClientSpan], None]


def log_nothing(text: str, kind: str) -> None:
    """Log nothing."""


def record_nothing(span: ClientSpan) -> None:
    """Record nothing."""


class Instance:
    """One of the processes that provide a service."""

    def __init__(self, base_url: str, clock: Clock):
        self.base_url = base_url
        # Without origin_req_host, which only cookies need, urllib would take time to find it out.
        self.request = Request(base_url, origin_req_host="")
        self.breaker = CircuitBreaker(clock)
        self.in_flight = 0
        self.last_choice = 0  # Upstream.choices when it was last chosen


class Upstream:
    """A service to call: its instances, and the policies for calling it.

    An `idempotent_receiver` carries out a request with an Idempotency-Key only once, however often
    it arrives, so a POST with a key may be retried.
    """

    def __init__(self, name: str, base_urls: list[str], *, idempotent_receiver: bool = False,
                 max_in_flight: int = 64, clock: Clock = time.monotonic):
        self.name = name
        self.idempotent_receiver = idempotent_receiver
        self.instances = [Instance(base_url, clock) for base_url in base_urls]
        self.choices = 0
        self.bulkhead = Bulkhead(max_in_flight)
        self._retries = RetryBudget(clock)
        self._lock = threading.Lock()  # held for changes; admits() and is_open() read without it
        self._probe_ended = threading.Condition(self._lock)

    def enter(self, wait: float, log: Log = log_nothing) -> None:
        """Begin a call, after waiting up to `wait` seconds for its place in the bulkhead.

        Raises BulkheadFull if it stays full, and BreakerOpen if every circuit breaker is open.
        """
        if self.is_open():
            raise self._breaker_is_open()
        if not self.bulkhead.acquire(timeout=min(wait, BULKHEAD_TIME)):
            limit = self.bulkhead.count
            log(f"bulkhead for {self.name} is full: {limit} requests are in flight",
                f"bulkhead {self.name}")
            reason = f"is at its limit of {limit} concurrent requests"
            raise BulkheadFull(self.name, reason, [RETRY_SOON])
        with self._lock:
            self._retries.note_call()

    def leave(self) -> None:
        """End a call."""
        self.bulkhead.release()

    def choose(self, tried: list[Instance], wait: float,
               log: Log = log_nothing) -> tuple[Instance, int]:
        """Return the instance for the next attempt, and the ticket of its circuit breaker.

        It is one that this call has not tried yet, if possible; of those, one with the fewest calls
        in flight; of those, the one not chosen for longest. If there is none because other calls
        are probing, it waits up to `wait` seconds for a probe to end. Raises BreakerOpen if every
        circuit breaker is open.
        """
        with self._lock:
            if not self.admits():
                self._probe_ended.wait_for(
                    lambda: self.admits() or self.is_open(), min(wait, BULKHEAD_TIME))
            candidates = [one for one in self.instances if one.breaker.admits()]
            if not candidates:
                raise self._breaker_is_open()
            instance = min(
                candidates, key=lambda one: (one in tried, one.in_flight, one.last_choice))
            self.choices += 1
            instance.last_choice = self.choices
            instance.in_flight += 1
            ticket = instance.breaker.begin()
            is_first_probe = instance.breaker.probes == 1
        if is_first_probe:
            self._log_breaker(instance, "is half-open: this request probes the instance", log)
        return instance, ticket

    def note_end(self, instance: Instance, ticket: int, outcome: Outcome,
                 log: Log = log_nothing) -> None:
        """Record how an attempt ended."""
        with self._lock:
            instance.in_flight -= 1
            change = instance.breaker.end(ticket, outcome)
            if change or outcome is Outcome.UNKNOWN:  # it may have been a probe
                self._probe_ended.notify_all()
        if change:
            self._log_breaker(instance, change, log)

    def admits(self, except_for: Sequence[Instance] = ()) -> bool:
        """Return whether any instance may be called now, except for these."""
        return any(one not in except_for and one.breaker.admits() for one in self.instances)

    def is_open(self) -> bool:
        """Return whether every circuit breaker is open."""
        return all(one.breaker.remaining() for one in self.instances)

    def take_retry(self) -> bool:
        """Return whether a retry may be made; if so, it is counted."""
        with self._lock:
            return not self.is_open() and self._retries.take()

    def retry_budget(self) -> tuple[int, int]:
        """Return how many retries were made lately, and how many may be (see RetryBudget)."""
        with self._lock:
            return self._retries.usage()

    def _log_breaker(self, instance: Instance, change: str, log: Log) -> None:
        log(f"circuit breaker for {self.name} at {instance.base_url} {change}",
            f"breaker {self.name}")

    def _breaker_is_open(self) -> BreakerOpen:
        wait = min(instance.breaker.remaining() for instance in self.instances)
        reason = "is temporarily unavailable: its circuit breaker is open"
        return BreakerOpen(self.name, reason, [("Retry-After", str(max(math.ceil(wait), 1)))])


@dataclass(slots=True)
class Call:
    """One call: the request, and what came of the attempts so far."""

    upstream: Upstream
    method: str
    target: str
    headers: dict[str, str]
    body: bytes | None
    deadline: float  # of time.monotonic
    trace: Trace
    log: Log
    began: float  # of time.monotonic: when the present try began
    tried: list[Instance] = field(default_factory=list)
    failures: list[UpstreamError] = field(default_factory=list)
    retries: int = 0

    def is_idempotent(self) -> bool:
        """Return whether sending the request twice does what sending it once does."""
        if self.method == "POST" and self.upstream.idempotent_receiver:
            return bool(self.headers.get("idempotency-key"))
        return self.method in IDEMPOTENT

    def may_be_own_effect(self, status: int) -> bool:
        """Return whether this status may be due to an earlier attempt whose response was lost.

        What that attempt deleted is not found, and what it changed no longer matches If-Match.
        """
        return (self.method, status) in OWN_EFFECTS and bool(self.broken())

    def error(self) -> UpstreamError:
        """Return the failure to report.

        A failure after which the request may have been carried out matters most: we report the last
        of those. If there is none, we report the last failure.
        """
        return (self.broken() or self.failures)[-1]

    def broken(self) -> list[Broken]:
        """Return the failures after which the request may have been carried out."""
        return [failure for failure in self.failures if isinstance(failure, Broken)]

    def end_try(self, server: str, span_id: str, status: int, failure: str) -> ClientSpan:
        """Return the span of the present try; add it to Server-Timing unless it is the first.

        Without a `server`, a policy has rejected it.
        """
        attempt = len(self.tried) + (not server)
        seconds = time.monotonic() - self.began
        if attempt > 1:
            self.trace.add_timing(f"{self.upstream.name}-try-{attempt};"
                                  f'dur={seconds * 1000:.3f};desc="{failure or status}"')
        return ClientSpan(
            self.trace, span_id, self.upstream.name, server, self.method[:MAX_METHOD],
            self.target[:MAX_TARGET], attempt, status, failure, time.time(), seconds)

    def end_rejected(self, rejection: UpstreamUnavailable) -> ClientSpan:
        """Return the span of a try that a policy has rejected."""
        return self.end_try("", make_span_id(), 0, rejection.kind)

    def log_event(self, text: str, kind: str) -> None:
        """Log an event of this call, with its request id."""
        self.log(f"{self.trace.request_id} {text}", kind)


class Client:
    """Calls services, and gives up after `timeout` seconds.

    `log` logs one event, and `record` records one try of a call.
    """

    def __init__(self, timeout: float, log: Log = log_nothing, record: Record = record_nothing):
        self.timeout = timeout
        self._log, self._record = log, record
        self._connections = KeepAliveHandler()
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(self._connections)

    def call(self, upstream: Upstream, method: str, target: str, trace: Trace,
             headers: dict[str, str] | None = None, body: bytes | None = None,
             deadline: float = math.inf) -> Reply:
        """Send a request and return the response, whatever its status.

        `target` is a path and query as in the request line; `trace` is what the call is part of;
        `headers` have lower-case names; `deadline` (of time.monotonic) may shorten the timeout.
        Raises
        - UpstreamUnavailable if the service was not called,
        - BadGateway if no connection could be made, or if it broke, or the response was invalid,
        - GatewayTimeout if the response was not complete in time.
        After GatewayTimeout or BadGateway, the request may have been carried out all the same; not
        after Unreachable, the kind of BadGateway for which no connection was made.
        """
        began = time.monotonic()
        deadline = min(deadline, began + self.timeout)
        call = Call(upstream, method, target, headers or {}, body, deadline, trace, self._log,
                    began)
        try:
            upstream.enter(deadline - began, call.log_event)
        except UpstreamUnavailable as rejection:
            self._record(call.end_rejected(rejection))
            raise
        try:
            return self._try_until_answered(call)
        finally:
            upstream.leave()

    def trim(self) -> None:
        """Close idle connections that are of no use any more; to be called from time to time."""
        self._connections.trim()

    def close(self) -> None:
        """Close the idle connections."""
        self._connections.close()

    def _try_until_answered(self, call: Call) -> Reply:
        """Try until there is a reply, or an error after which no retry is allowed."""
        while True:
            try:
                reply = self._try(call)
            except (Broken, Unreachable) as failure:
                call.failures.append(failure)
                pause = find_pause(call)
            except UpstreamUnavailable as failure:  # an earlier failure may say more
                call.failures.append(failure)
                pause = None
                if isinstance(failure, BreakerOpen):  # no instance was tried, so none recorded
                    self._record(call.end_rejected(failure))
            else:
                if call.may_be_own_effect(reply.status):
                    raise call.error()
                return reply
            if pause is None:
                raise call.error() from None
            if pause:
                time.sleep(pause)

    def _try(self, call: Call) -> Reply:
        """Send the request to one instance, and tell its circuit breaker how that ended."""
        call.began = time.monotonic()
        wait = call.deadline - call.began
        instance, ticket = call.upstream.choose(call.tried, wait, call.log_event)
        left = call.deadline - time.monotonic()
        had_fair_time = left > self.timeout / 2  # else the instance may not be to blame
        if call.failures:
            call.log_event(f"retrying {call.method} {call.target} at {instance.base_url}: "
                           f"{call.failures[-1].detail}", f"retry {call.upstream.name}")
        span_id, status, kind = make_span_id(), 0, ""
        outcome = Outcome.UNKNOWN
        try:
            request = make_request(call, instance, left, span_id)
            call.tried.append(instance)
            reply: Reply = self._opener.open(request)
            status = reply.status
            call.trace.add_timing(reply.fields.get("server-timing", ""))
            if status not in FAILING:
                outcome = Outcome.SUCCEEDED
            elif had_fair_time:
                outcome = Outcome.FAILED
            return reply
        except (OSError, EOFError, ServiceError) as error:
            failure = to_upstream_error(error, call.upstream.name, request)
            kind = failure.kind
            is_about_instance = had_fair_time or not isinstance(error, TimeoutError)
            if is_about_instance and not isinstance(failure, Stale | UpstreamUnavailable):
                outcome = Outcome.BROKE if isinstance(failure, Broken) else Outcome.FAILED
            raise failure from None
        finally:
            call.upstream.note_end(instance, ticket, outcome, call.log_event)
            self._record(call.end_try(instance.base_url, span_id, status, kind))


def find_pause(call: Call) -> float | None:
    """Decide whether to send a call again after its last failure.

    Returns None if it must not be sent again; otherwise how many seconds to wait first:
    - 0 if the instance could not be reached and there is another one not tried yet;
    - 0 if a kept connection broke and a retry does no harm: the next attempt makes a new one;
    - else a random time below a limit that doubles (exponential backoff with full jitter), if a
      retry does no harm and if the number of retries, the deadline and the retry budget allow it.
    """
    failure = call.failures[-1]
    if isinstance(failure, Unreachable) and call.upstream.admits(except_for=call.tried):
        return 0.0
    is_harmless = isinstance(failure, Unreachable) or call.is_idempotent()
    if is_harmless and isinstance(failure, Stale):
        return 0.0
    pause = random.uniform(0, BACKOFF * 2**call.retries)
    is_in_time = time.monotonic() + pause <= call.deadline
    may_retry = is_harmless and is_in_time and call.retries < MAX_RETRIES
    if not (may_retry and call.upstream.take_retry()):
        return None
    call.retries += 1
    return pause


def make_request(call: Call, instance: Instance, left: float, span_id: str) -> Request:
    """Return the request of a try for urllib. X-Request-Timeout says how many seconds are left."""
    headers = {**call.headers, **call.trace.headers(span_id),
               "x-request-timeout": f"{max(left, 0):.3f}"}
    request = instance.request.to(call.method, call.target, headers, call.body)
    request.deadline = call.deadline
    request.is_retry = bool(call.tried)
    return request


def to_upstream_error(error: Exception, service: str, request: Request) -> UpstreamError:
    """Return the error to raise for what went wrong between here and a service."""
    if getattr(error, "errno", 0) in OUT_OF_DESCRIPTORS:  # about this process, not the instance
        reason = "cannot be called now: too many files are open in this process"
        return UpstreamUnavailable(service, reason, [RETRY_SOON])
    if isinstance(error, ServiceError):
        return BadGateway(service, f"returned a response that cannot be used: {error.detail}")
    broken = Stale if request.is_reuse else Broken
    if isinstance(error, EOFError):
        return broken(service, "closed the connection before its response was complete")
    if isinstance(error, TimeoutError) and request.is_sent:
        return GatewayTimeout(service, "did not respond in time")
    cause = getattr(error, "strerror", None) or error
    if request.is_sent:
        return broken(service, f"broke the connection: {cause}")
    return Unreachable(service, f"cannot be reached: {cause}")
