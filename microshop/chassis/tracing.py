"""Traces: what several processes do for one request, as a tree of spans.

A *span* is one piece of work: a request that a process answers, one try of a call to another
service, or a task in the background. A *trace* is all spans that belong together. The header
`traceparent` carries the trace's id, and the id of the span that the receiver's work is part of
(W3C Trace Context, https://www.w3.org/TR/trace-context/).

    gateway  ServerSpan a  ---------------------------------     its parent: none
    gateway    ClientSpan b  ----------------------------        its parent: a
    users        ServerSpan c  ----------------------            its parent: b, from traceparent

Law: ids, and spans as values. Nothing here sends, counts or keeps anything.
"""
import random
import re
import time
from collections.abc import Mapping
from typing import NamedTuple

CLIENT_GONE = 499      # a status, as in nginx: the client did not wait for its answer
MAX_METHOD = 20        # characters of a request's method that are recorded
MAX_TARGET = 200       # characters of its target
MAX_TIMINGS = 2000     # characters about other processes in a Server-Timing header
MAX_STATE = 512        # characters of a tracestate; longer ones need not be passed on
KNOWN_FLAGS = 0b11     # sampled, and random (level 2); others must not be passed on
SAMPLED = 0b01         # the caller wants the trace to be kept
NO_TAGS: Mapping[str, str] = {}
# A version later than 00 may have more fields after these four; ff is not a valid version.
TRACEPARENT = re.compile(
    "(?!ff|00.{54})[0-9a-f]{2}-"
    "(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")


def make_span_id() -> str:
    return random.randbytes(8).hex()


class Trace:
    """This process's position in a trace, while it works on one request or one task.

    `span_id` is the id of this work, `parent_id` that of the span it is part of, "" if the trace
    begins here. An invalid traceparent begins a new trace.
    """

    __slots__ = ("request_id", "trace_id", "span_id", "parent_id", "flags", "state",
                 "timings", "tags", "notes")

    def __init__(self, request_id: str, traceparent: str = "", tracestate: str = ""):
        self.request_id = request_id
        self.span_id = make_span_id()
        if match := TRACEPARENT.fullmatch(traceparent):
            self.trace_id, self.parent_id, flags = match.groups()
            self.flags = int(flags, 16) & KNOWN_FLAGS
            self.state = tracestate if len(tracestate) <= MAX_STATE else ""
        else:
            self.trace_id, self.parent_id = random.randbytes(16).hex(), ""
            self.flags, self.state = SAMPLED, ""
        self.timings: list[str] = []  # entries for Server-Timing, about other processes and tries
        self.tags: Mapping[str, str] = NO_TAGS
        self.notes: tuple[tuple[float, str], ...] = ()  # Unix times, and what happened then

    def headers(self, span_id: str) -> dict[str, str]:
        """Return the headers of a request that is sent as the span with this id."""
        headers = {"x-request-id": self.request_id,
                   "traceparent": f"00-{self.trace_id}-{span_id}-{self.flags:02x}"}
        if self.state:
            headers["tracestate"] = self.state
        return headers

    def add_timing(self, text: str) -> None:
        """Add entries about other processes, or other tries, to Server-Timing, if they fit in."""
        if text and sum(map(len, self.timings)) + len(text) <= MAX_TIMINGS:
            self.timings.append(text)

    def tag(self, name: str, value: str) -> None:
        """Add a tag to every span of this work, so that people can search for it."""
        self.tags = {**self.tags, name: value}

    def note(self, text: str) -> None:
        """Note that something has happened now."""
        self.notes = (*self.notes, (time.time(), text))


class ServerSpan(NamedTuple):
    """A request that this process has answered."""

    trace: Trace
    method: str
    target: str
    route: str       # the template of its path, or "" if there is nothing at that path
    status: int
    ended: float     # a Unix time
    seconds: float

    @property
    def error(self) -> str:
        """What went wrong, in a word; "" for success, and for errors of the client (4xx)."""
        if self.status < CLIENT_GONE:
            return ""
        return "client gone" if self.status == CLIENT_GONE else str(self.status)

    def name(self) -> str:
        return f"{self.method} {self.route}"

    def tags(self) -> dict[str, str]:
        return {"http.method": self.method, "http.path": self.target, "http.route": self.route,
                "http.status_code": str(self.status)}


class ClientSpan(NamedTuple):
    """A try of a call to another service, or a call that was rejected before its first try."""

    trace: Trace
    span_id: str
    upstream: str    # the name of the service
    server: str      # the base URL of the instance, or "" if none was called
    method: str
    target: str
    attempt: int     # 1 for the first try
    status: int      # 0 if there was no valid response
    failure: str     # why there was none: the `kind` of an UpstreamError
    ended: float     # a Unix time
    seconds: float

    @property
    def error(self) -> str:
        """What went wrong, in a word; "" for success, and for errors of this client (4xx)."""
        return self.failure or (str(self.status) if self.status >= 500 else "")

    def name(self) -> str:
        return f"{self.method} {self.upstream}"

    def tags(self) -> dict[str, str]:
        return {"http.method": self.method, "http.path": self.target, "server": self.server,
                "http.status_code": str(self.status or ""), "try": str(self.attempt)}


class TaskSpan(NamedTuple):
    """A task that this process has carried out in the background."""

    trace: Trace
    task: str
    error: str
    ended: float     # a Unix time
    seconds: float

    def name(self) -> str:
        return self.task

    def tags(self) -> dict[str, str]:
        return {}


Span = ServerSpan | ClientSpan | TaskSpan
KINDS = {ServerSpan: "SERVER", ClientSpan: "CLIENT", TaskSpan: ""}  # in Zipkin's words


def format_span(span: Span, service: str, pid: str) -> dict:
    """Return a span of a process in Zipkin's format (version 2 of its JSON), for JSON."""
    trace = span.trace
    is_part = isinstance(span, ClientSpan)  # of this process's work; the others are all of it
    tags = {**trace.tags, **span.tags(), "error": span.error,
            "request.id": trace.request_id, "pid": pid}
    formatted = {
        "traceId": trace.trace_id,
        "parentId": trace.span_id if is_part else trace.parent_id,
        "id": span.span_id if isinstance(span, ClientSpan) else trace.span_id,
        "kind": KINDS[type(span)],
        "name": span.name().strip().lower(),
        "timestamp": int((span.ended - span.seconds) * 1e6),   # both in microseconds
        "duration": max(int(span.seconds * 1e6), 1),
        "localEndpoint": {"serviceName": service},
        "remoteEndpoint": {"serviceName": span.upstream} if isinstance(span, ClientSpan) else {},
        "tags": {name: value for name, value in tags.items() if value},
        "annotations": [] if is_part else [
            {"timestamp": int(at * 1e6), "value": text} for at, text in trace.notes],
    }
    return {name: value for name, value in formatted.items() if value}
