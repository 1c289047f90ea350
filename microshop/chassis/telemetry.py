"""Telemetry: what this process can tell about its work, as metrics and as spans.

A request costs one tuple, appended to a queue (Telemetry.record). The thread of the access log
empties the queue: it counts the spans, and keeps some of them. /metrics and /traces answer with the
result. Nothing is sent anywhere: a monitoring system asks when it wants to know.

Memory: the queue holds at most MAX_WAITING spans, and those kept are at most 750. A span is well
below 2 KiB, because only the start of a target is recorded, so all together are below 12 MiB.

Law: nothing here has an effect on how a request is answered.
"""
import os
import resource
import threading
import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Sequence
from http import HTTPMethod
from operator import attrgetter
from typing import Any
from urllib.parse import urlsplit

from microshop.chassis.client import Upstream
from microshop.chassis.metrics import Family, Histogram, counter, counters, gauge
from microshop.chassis.resilience import CircuitBreaker
from microshop.chassis.tracing import SAMPLED, ClientSpan, ServerSpan, Span, format_span

MAX_WAITING = 5_000    # spans that wait to be counted
LAST = 500             # spans that are kept because they are the last ones
LAST_FAILED = 100      # spans that are kept because they failed
LAST_NOTED = 100       # spans that are kept because something was noted in them
SLOWEST = 50           # spans that are kept because they took longest
SLOW_TIME = 600.0      # seconds for which one of the slowest is kept
REJECTIONS = ("breaker", "bulkhead")  # the `kind` of an UpstreamError if a policy rejects a call
KNOWN_METHODS = frozenset(HTTPMethod)


class Telemetry:
    """Counts and keeps the spans of a process."""

    def __init__(self) -> None:
        self.started = time.time()
        self._waiting: deque[Span] = deque()
        self.record = self._waiting.append  # takes a span; any thread may call it at any time
        self._lock = threading.Lock()  # held while spans are counted, or read
        self._last: deque[Span] = deque(maxlen=LAST)
        self._failed: deque[Span] = deque(maxlen=LAST_FAILED)
        self._noted: deque[Span] = deque(maxlen=LAST_NOTED)
        self._slowest: list[Span] = []  # the fastest of them first
        self._requests = Histogram(
            "http_server_request_duration_seconds", "Duration of the requests answered.",
            labels_of_request)
        self._tries = Histogram(
            "http_client_request_duration_seconds", "Duration of each try of a call.",
            labels_of_try)
        self._calls: Counter[str] = Counter()  # by name of the upstream, as are the retries
        self._retries: Counter[str] = Counter()
        self._rejections: Counter[tuple[str, str]] = Counter()  # by upstream and reason

    def digest_overdue(self) -> None:
        """Call digest() if the log's thread does not, because nothing reads the log."""
        if len(self._waiting) > MAX_WAITING:
            self.digest()

    def digest(self) -> None:
        """Count the spans that were recorded since the last call, and choose those to keep."""
        with self._lock:
            horizon = time.time() - SLOW_TIME
            self._slowest = [span for span in self._slowest if span.ended > horizon]
            for _ in range(len(self._waiting)):
                span = self._waiting.popleft()
                if isinstance(span, ServerSpan):
                    key = bounded(span.method), span.route, span.status
                    self._requests.observe(key, span.seconds)
                elif isinstance(span, ClientSpan):
                    self._count_try(span)
                self._keep(span)

    def _count_try(self, span: ClientSpan) -> None:
        if span.attempt == 1:
            self._calls[span.upstream] += 1
        elif span.server:
            self._retries[span.upstream] += 1
        if span.failure in REJECTIONS:
            self._rejections[span.upstream, span.failure] += 1
        else:
            key = bounded(span.method), span.server, span.upstream, span.status, span.failure
            self._tries.observe(key, span.seconds)

    def _keep(self, span: Span) -> None:
        if span.trace.flags & SAMPLED:
            self._last.append(span)
        # A client must not be able to hide these by clearing the sampled flag.
        if span.error:
            self._failed.append(span)
        if span.trace.notes:
            self._noted.append(span)
        if len(self._slowest) < SLOWEST or span.seconds > self._slowest[0].seconds:
            insort(self._slowest, span, key=attrgetter("seconds"))
            del self._slowest[:-SLOWEST]

    def spans(self) -> list[Span]:
        """Return the spans that are kept, in the order in which they ended."""
        self.digest()
        with self._lock:
            kept = [*self._last, *self._failed, *self._noted, *self._slowest]
        return sorted({id(span): span for span in kept}.values(), key=attrgetter("ended"))

    def format_spans(self, service: str) -> list[dict]:
        """Return the spans that are kept, for JSON as Zipkin reads it."""
        pid = str(os.getpid())
        return [format_span(span, service, pid) for span in self.spans()]

    def families(self, upstreams: Sequence[Upstream]) -> list[Family]:
        """Return the metrics in which spans are counted.

        The counters of an upstream are there from the beginning, since Prometheus cannot see how
        much a counter has grown before it first appears.
        """
        self.digest()
        names = [upstream.name for upstream in upstreams]
        with self._lock:
            if not names:
                return [self._requests.family()]
            return [
                self._requests.family(), self._tries.family(),
                counters("microshop_calls_total", "Calls to a service.", ["upstream"],
                         {(name,): self._calls[name] for name in names}),
                counters("microshop_retries_total", "Tries of calls beyond the first.",
                         ["upstream"], {(name,): self._retries[name] for name in names}),
                counters("microshop_rejected_calls_total", "Calls that a policy has rejected.",
                         ["upstream", "reason"],
                         {(name, reason): self._rejections[name, reason]
                          for name in names for reason in REJECTIONS})]


def bounded(method: str) -> str:
    """Return the label for a method: clients may invent as many as they like."""
    return method if method in KNOWN_METHODS else "_OTHER"


def labels_of_request(method: str, route: str, status: int) -> dict[str, str]:
    return {"http_request_method": method, "http_route": route,
            "http_response_status_code": str(status),
            "error_type": str(status) if status >= 500 else ""}


def labels_of_try(method: str, server: str, upstream: str, status: int,
                  failure: str) -> dict[str, str]:
    address = urlsplit(server)
    return {"http_request_method": method, "server_address": address.hostname or "",
            "server_port": str(address.port or 80), "peer_service": upstream,
            "http_response_status_code": str(status or ""),
            "error_type": failure or (str(status) if status >= 500 else "")}


# --- metrics that are looked up when somebody asks for them

def service_families(service: Any) -> list[Family]:
    """Return all metrics that a Service has, whatever it serves."""
    labels = {"service": service.name, "pid": str(os.getpid())}
    upstreams = list(service.upstreams.values())
    return [
        Family("microshop_process_info", "gauge", "Always 1; the labels name the process.",
               [("", labels, 1)]),
        counter("microshop_process_restarts_total", "How often this process was restarted.",
                service.restarts),
        gauge("microshop_draining", "1 while the process finishes its last requests.",
              int(service.draining)),
        gauge("process_start_time_seconds", "When the process started, as a Unix time.",
              service.telemetry.started),
        *process_families(),
        *service.telemetry.families(upstreams),
        *(upstream_families(upstreams) if upstreams else []),
    ]


def process_families() -> list[Family]:
    """Return what Prometheus expects to know about a process."""
    return [
        counter("process_cpu_seconds_total", "CPU time used, user and system.",
                time.process_time()),
        gauge("process_resident_memory_bytes", "Memory in use.", resident_memory()),
        gauge("process_open_fds", "Open file descriptors.", len(os.listdir("/dev/fd")) - 1),
    ]


def resident_memory() -> int:
    """Return the memory that this process uses, in bytes; where /proc is missing, its maximum."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def upstream_families(upstreams: Sequence[Upstream]) -> list[Family]:
    """Return the state of the policies for calls to other services (resilience.py)."""
    def of_each(name: str, help: str, value: Callable[[Upstream], float]) -> Family:
        samples = [("", {"upstream": upstream.name}, value(upstream)) for upstream in upstreams]
        return Family(name, "gauge", help, samples)

    breakers = [({"upstream": upstream.name, "server": instance.base_url}, instance.breaker)
                for upstream in upstreams for instance in upstream.instances]
    return [
        of_each("microshop_bulkhead_in_use", "Calls in flight.", lambda one: one.bulkhead.in_use),
        of_each("microshop_bulkhead_limit", "Calls that may be in flight.",
                lambda one: one.bulkhead.count),
        of_each("microshop_retry_budget_used", "Retries made in the last 10 s.",
                lambda one: one.retry_budget()[0]),
        of_each("microshop_retry_budget_limit", "Retries allowed in 10 s.",
                lambda one: one.retry_budget()[1]),
        Family("microshop_breaker_state", "gauge", "1 for the present state, 0 for the others.", [
            ("", {**labels, "state": state}, int(breaker.state == state))
            for labels, breaker in breakers for state in CircuitBreaker.STATES]),
        Family("microshop_breaker_open_seconds", "gauge", "Seconds until a probe may pass.", [
            ("", labels, breaker.remaining()) for labels, breaker in breakers]),
        Family("microshop_breaker_changes_total", "counter", "Changes to each state.", [
            ("", {**labels, "state": state}, breaker.changes[state])
            for labels, breaker in breakers for state in CircuitBreaker.STATES]),
    ]
