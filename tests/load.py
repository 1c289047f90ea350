"""A load generator: keeps a number of connections busy with one prepared request and measures the answers.

    python -m tests.load PORT CONNECTIONS SECONDS TARGET

One thread and a selector instead of a thread per connection: threads of one process would fight for its
interpreter lock, and measure that. Prints requests per second, and p50 and p99 in milliseconds, as JSON.
"""
import json
import re
import selectors
import socket
import sys
import time

WARM_UP = 0.5  # seconds that are not counted


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
        if len(received) != self.size:
            head, end, body = received.partition(b"\r\n\r\n")
            if not end or len(body) < int(re.search(rb"(?i)\ncontent-length: ?([0-9]+)", head)[1]):
                self.received = received
                return False
            self.size = len(received)
        self.received = b""
        return True


def measure(port: int, connections: int, seconds: float, request: bytes) -> dict[str, float]:
    """Return what was measured in `seconds` after the warm-up."""
    selector = selectors.DefaultSelector()
    for _ in range(connections):
        connection = Connection(port)
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        connection.sent_at = time.perf_counter()
        connection.socket.sendall(request)
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
                connection.socket.send(request)
        if begin and now > begin:
            times, begin = [], 0.0
    times.sort()
    return {"rps": len(times) / seconds,
            "p50": times[len(times) // 2] * 1000, "p99": times[len(times) * 99 // 100] * 1000}


if __name__ == "__main__":
    port, connections, seconds, target = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    request = f"GET {target} HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode()
    print(json.dumps(measure(port, connections, seconds, request)))
