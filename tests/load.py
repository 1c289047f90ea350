"""A load generator: keeps a number of connections busy with one kind of request, and measures.

    python -m tests.load PORT CONNECTIONS SECONDS TARGET [JSON]

It sends GET; or POST, if there is JSON, with a new Idempotency-Key each time.

It uses one thread and a selector. With a thread per connection, the threads would wait for each
other's interpreter lock, and it would measure that. It prints requests per second, and three
percentiles of the answers' times in milliseconds (p50, p99, p99.9), as JSON.
"""
import contextlib
import itertools
import json
import re
import secrets
import selectors
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator

LATENCIES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}  # which share of the answers took less
WARM_UP = 0.5        # seconds that are not counted
LAST_ANSWERS = 10.0  # seconds to wait for answers after the last request of an offer
OFFERS = 1500        # connections that offer() opens at most: more than a process keeps open


class Connection:
    """A kept-alive connection with at most one request under way."""

    def __init__(self, port: int):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent_at = 0.0
        self.received = b""
        self.size = -1  # of the last answer

    def receive(self) -> bool:
        """Read what has arrived; tell whether the answer is complete.

        Raises ValueError if it is not a success, and OSError if the connection fails.
        """
        received = self.received + self.socket.recv(65536)
        if not received.startswith(b"HTTP/1.1 20"):
            raise ValueError(f"not a success: {received!r}")
        if len(received) != self.size:  # an answer as long as the last one is complete
            head, end, body = received.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)\ncontent-length: ?([0-9]+)", head)
            if not end or len(body) < int(length[1]):
                self.received = received
                return False
            self.size = len(received)
        self.received = b""
        return True

    def send(self, request: bytes) -> None:
        self.sent_at = time.perf_counter()
        self.socket.sendall(request)


def requests(port: int, target: str, body: str = "") -> Iterator[bytes]:
    """Yield requests to send, without end."""
    host = f"Host: localhost:{port}\r\n"
    if not body:
        yield from itertools.repeat(f"GET {target} HTTP/1.1\r\n{host}\r\n".encode())
    run = secrets.token_hex(8)
    for number in itertools.count():
        yield (f"POST {target} HTTP/1.1\r\n{host}Content-Type: application/json\r\n"
               f"Idempotency-Key: {run}-{number}\r\n"
               f"Content-Length: {len(body)}\r\n\r\n{body}").encode()


def measure(port: int, connections: int, seconds: float,
            to_send: Iterator[bytes]) -> dict[str, float]:
    """Send requests for `seconds` after a warm-up: on each connection, the next after an answer.

    Return requests per second ("rps"), and "p50", "p99" and "p99.9" in milliseconds.
    """
    selector = selectors.DefaultSelector()
    for _ in range(connections):
        connection = Connection(port)
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        connection.send(next(to_send))
    times = []
    warm_at = time.perf_counter() + WARM_UP
    end, is_warm = warm_at + seconds, False
    while (now := time.perf_counter()) < end:
        for key, _ in selector.select(1):
            connection = key.data
            if connection.receive():
                now = time.perf_counter()
                times.append(now - connection.sent_at)
                connection.send(next(to_send))
        if not is_warm and now > warm_at:
            times, is_warm = [], True
    return {"rps": len(times) / seconds, **latencies(sorted(times))}


def latencies(times: list[float]) -> dict[str, float]:
    """Return the percentiles of sorted times in seconds, in milliseconds."""
    return {name: times[int(len(times) * share)] * 1000 for name, share in LATENCIES.items()}


class Offer:
    """An open loop: requests are sent when they are due, whether or not others were answered.

    The time of an answer is counted from when its request was due. So nothing is hidden if all
    connections are in use, or if this process is late.
    """

    def __init__(self, port: int, rate: float, to_send: Iterator[bytes]):
        self.port, self.rate, self.to_send = port, rate, to_send
        self.failures: Counter[str] = Counter()  # by status, or what happened instead
        self.times: list[float] = []             # seconds that each success took
        self.sent = 0
        self._selector = selectors.DefaultSelector()
        self._idle: list[Connection] = []
        self._due: dict[Connection, float] = {}  # connections in use: when their request was due

    def run(self, seconds: float) -> None:
        began = time.perf_counter()
        while (now := time.perf_counter() - began) < seconds or (
                self._due and now < seconds + LAST_ANSWERS):
            while self.sent < min(now, seconds) * self.rate:
                self.sent += 1
                self._send(self.sent / self.rate)
            for key, _ in self._selector.select(0.001):
                self._receive(key.data, began)
        self.failures["unanswered"] = len(self._due)

    def _send(self, due: float) -> None:
        if not self._idle and len(self._due) < OFFERS:
            self._idle.append(Connection(self.port))
            self._selector.register(self._idle[-1].socket, selectors.EVENT_READ, self._idle[-1])
        if not self._idle:
            self.failures["not sent"] += 1
            return
        connection = self._idle.pop()
        self._due[connection] = due
        with contextlib.suppress(OSError):  # _receive() will see that it is closed
            connection.socket.sendall(next(self.to_send))

    def _receive(self, connection: Connection, began: float) -> None:
        answer = "HTTP"
        try:
            if not connection.receive():
                return
            self.times.append(time.perf_counter() - began - self._due[connection])
        except (OSError, ValueError) as failure:  # a ValueError has the answer in its text
            answer, connection.received = str(failure), b""
            status = re.search("HTTP/1.1 (...)", answer)
            self.failures[status[1] if status else "closed"] += connection in self._due
        if self._due.pop(connection, None) is None:
            self._idle.remove(connection)
        if "HTTP" in answer and "Connection: close" not in answer:
            self._idle.append(connection)
        else:
            self._selector.unregister(connection.socket)
            connection.socket.close()


def offer(port: int, rate: float, seconds: float,
          to_send: Iterator[bytes]) -> tuple[Counter[str], list[float]]:
    """Send `rate` requests per second, on at most OFFERS connections, whatever is answered.

    Return how often each failure occurred, and the sorted seconds that each success took.
    """
    offered = Offer(port, rate, to_send)
    offered.run(seconds)
    return offered.failures, sorted(offered.times)


if __name__ == "__main__":
    port, connections, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    print(json.dumps(measure(port, connections, seconds, requests(port, *sys.argv[4:]))))
