"""What the tests of metrics, traces and Server-Timing share: they ask a process what it has seen.

A process records a request after it has sent the answer, so a test has to wait for the record.
"""
import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from microshop import SERVICES
from tests.formats import Metrics, Timing, parse_metrics, parse_server_timing, parse_spans
from tests.helpers import (
    PATIENCE, Answered, Process, ask, ask_json, process, read_request, wait_until)

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
JSON_TYPE = {"Content-Type": "application/json"}
SERVED = "http_server_request_duration_seconds"
TRIED = "http_client_request_duration_seconds"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]"

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


def metrics_of(port: int) -> Metrics:
    """Ask a process for its metrics; they must be correct to the letter."""
    answer = ask(port, target="/metrics")
    assert answer.status == 200, f"GET /metrics was answered {answer}"
    return parse_metrics(answer.body)


def spans_of(port: int, trace_id: str = "") -> list[dict[str, Any]]:
    """Ask a process for its spans, or for those of one trace; they must be correct."""
    answer = ask(port, target="/traces")
    assert answer.status == 200, f"GET /traces was answered {answer}"
    spans = parse_spans(answer.body)
    return [span for span in spans if not trace_id or span["traceId"] == trace_id]


def await_metrics(port: int, condition: Callable[[Metrics], Any], what: str) -> Metrics:
    """Wait until the metrics of a process meet a condition, and return them."""
    found = []

    def is_met() -> bool:
        found[:] = [metrics_of(port)]
        return condition(found[0])

    wait_until(is_met, f"metrics of port {port}: {what}")
    return found[0]


def await_served(port: int, count: int) -> Metrics:
    """Wait until a process has counted so many requests, and return its metrics."""
    return await_metrics(port, lambda metrics: metrics.total(f"{SERVED}_count") >= count,
                         f"{count} requests served")


def await_spans(count: int, *ports: int, trace_id: str = "") -> list[dict[str, Any]]:
    """Wait until the processes together have at least so many spans; return them."""
    found: list[dict[str, Any]] = []

    def are_there() -> bool:
        found[:] = [span for port in ports for span in spans_of(port, trace_id)]
        return len(found) >= count

    wait_until(are_there, f"{count} spans at the ports {ports}")
    return found


def timings(answer: Answered) -> list[Timing]:
    """Return the entries of an answer's Server-Timing."""
    return parse_server_timing(answer.headers.get("server-timing", ""))


class Stub:
    """A service that keeps the head of each request, as a dict, and sends the next response.

    The last response is repeated. An empty one closes the connection instead.
    """

    def __init__(self, *responses: bytes):
        self.responses = list(responses) or [OK]
        self.heads: list[dict[str, str]] = []

    def __call__(self, connection: socket.socket) -> None:
        while request := read_request(connection):
            lines = request.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
            self.heads.append({name.lower(): value.strip() for name, _, value in
                               (line.partition(":") for line in lines[1:])})
            response = self.responses[0]
            if len(self.responses) > 1:
                self.responses.pop(0)
            if not response:
                return
            connection.sendall(response)


class Late:
    """A service that reads requests, and answers them when the test sets `go_on`."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def __call__(self, connection: socket.socket) -> None:
        while read_request(connection) and self.go_on.wait(PATIENCE):
            connection.sendall(OK)


class RealShop:
    """A shop as run_all starts it."""

    def __init__(self, run_all: Process):
        self.run_all = run_all
        run_all.wait_for("ready in")
        run_all.wait_for(r"^live +\| .* at http://")  # the shop does not wait for it
        listening = [re.search(r"^(\w+) *\| .* at http://\S+:(\d+)$", line)
                     for line in run_all.lines]
        self.ports = {match[1]: int(match[2]) for match in listening if match}
        self.gateway = self.ports["gateway"]

    def pid(self, name: str) -> int:
        """Return the pid of a process, as run_all has said when it last started it."""
        return int([match[1] for line in self.run_all.lines
                    if (match := re.search(rf"started {name} \(pid (\d+)\)", line))][-1])

    def ask(self, method: str, target: str, content: Any = None, **headers: str) -> Answered:
        """Ask the gateway, as ask_json() does."""
        return ask_json(self.gateway, method, target, content, **headers)


@contextlib.contextmanager
def real_shop(*flags: str, **variables: str) -> Iterator[RealShop]:
    """Run a fresh shop, all of its processes, on free ports."""
    with process("microshop.run_all", "--fresh", "--quiet", "--port", "0", *flags,
                 **variables) as run_all:
        shop = RealShop(run_all)
        assert shop.ports.keys() >= {"gateway", *SERVICES}, f"these listen: {shop.ports}"
        yield shop
