"""A load generator: keeps a number of connections busy with one kind of request and measures the answers.

    python -m tests.load PORT CONNECTIONS SECONDS TARGET [JSON]

It asks with GET, or sends the JSON with POST, and an Idempotency-Key that is new each time.

One thread and a selector instead of a thread per connection: threads of one process would fight for its
interpreter lock, and measure that. Prints requests per second, and p50 and p99 in milliseconds, as JSON.
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

WARM_UP = 0.5    # seconds that are not counted
PATIENCE = 10.0  # seconds in which what was offered must be answered
OFFERS = 1500    # connections at most for what is offered: more than a process keeps open


class Connection:
    """A kept-alive connection with one request under way."""

    def __init__(self, port: int):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent_at = 0.0
        self.received = b""
        self.size = -1  # of an answer, known after the first

    def receive(self) -> bool:
        """Take what has come; tell whether the answer is whole. Raises ValueError where it is no success."""
        received = self.received + self.socket.recv(65536)
        if not received.startswith(b"HTTP/1.1 20"):
            raise ValueError(f"no success: {received!r}")
        if len(received) != self.size:  # an answer that is as long as the last is whole
            head, end, body = received.partition(b"\r\n\r\n")
            if not end or len(body) < int(re.search(rb"(?i)\ncontent-length: ?([0-9]+)", head)[1]):
                self.received = received
                return False
            self.size = len(received)
        self.received = b""
        return True


def requests(port: int, target: str, body: str = "") -> Iterator[bytes]:
    """Yield the requests to send, for ever."""
    if not body:
        yield from itertools.repeat(f"GET {target} HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode())
    run = secrets.token_hex(8)
    for number in itertools.count():
        yield (f"POST {target} HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\n"
               f"Idempotency-Key: {run}-{number}\r\nContent-Length: {len(body)}\r\n\r\n{body}").encode()


def measure(port: int, connections: int, seconds: float, to_send: Iterator[bytes]) -> dict[str, float]:
    """Return what was measured in `seconds` after the warm-up."""
    selector = selectors.DefaultSelector()
    for _ in range(connections):
        connection = Connection(port)
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        connection.sent_at = time.perf_counter()
        connection.socket.sendall(next(to_send))
    times = []
    begin = time.perf_counter() + WARM_UP
    end = begin + seconds
    while (now := time.perf_counter()) < end:
        for key, _ in selector.select(1):
            connection = key.data
            if connection.receive():
                now = time.perf_counter()
                times.append(now - connection.sent_at)
                connection.sent_at = now
                connection.socket.send(next(to_send))
        if begin and now > begin:
            times, begin = [], 0.0
    times.sort()
    return {"rps": len(times) / seconds,
            "p50": times[len(times) // 2] * 1000, "p99": times[len(times) * 99 // 100] * 1000}


def offer(port: int, rate: float, seconds: float, to_send: Iterator[bytes]) -> tuple[Counter, list[float]]:
    """Send so many requests a second whatever comes back (an open loop), on OFFERS connections at most.

    Return how often each status came, and the sorted seconds that each success took, counted from when its request was
    due: so nothing is hidden where all connections are taken, or this process is late.
    """
    selector, told, times, number = selectors.DefaultSelector(), Counter(), [], 0
    idle: list[Connection] = []
    due: dict[Connection, float] = {}  # of those that are busy: when the request was
    began = time.perf_counter()
    while (now := time.perf_counter() - began) < seconds or due and now < seconds + PATIENCE:
        while number < min(now, seconds) * rate:
            number += 1
            if not idle and len(due) < OFFERS:
                idle.append(Connection(port))
                selector.register(idle[-1].socket, selectors.EVENT_READ, idle[-1])
            if idle:
                due[idle[-1]] = number / rate
                with contextlib.suppress(OSError):  # that it is closed will be read
                    idle.pop().socket.sendall(next(to_send))
            else:
                told["not sent"] += 1
        for key, _ in selector.select(0.001):
            connection, came = key.data, "HTTP"
            try:
                if not connection.receive():
                    continue
                times.append(time.perf_counter() - began - due[connection])
            except (OSError, ValueError) as failure:  # which shows what came
                came, connection.received = str(failure), b""
                told[(re.search("HTTP/1.1 (...)", came) or ["", "closed"])[1]] += connection in due
            if due.pop(connection, None) is None:
                idle.remove(connection)
            if "HTTP" in came and "Connection: close" not in came:
                idle.append(connection)
            else:
                selector.unregister(connection.socket)
                connection.socket.close()
    told["unanswered"] = len(due)
    return told, sorted(times)


if __name__ == "__main__":
    port, connections, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    print(json.dumps(measure(port, connections, seconds, requests(port, *sys.argv[4:]))))
