"""The log of a process: one line for each request and each event, on stderr.

    2026-11-22T20:25:41.123Z users 3f0c9a41d2b87e65 GET /users/1 200 0.4ms

The third word is the request's id. It is a *correlation id*: all processes that work on a request
log the same one, so that searching for it finds the whole story.

Writing each line at once would cost a system call per request, and wake the reader of the pipe. So
one thread writes: the first line after a quiet time immediately, then every GATHER seconds the
lines that have come meanwhile.
"""
import sys
import threading
import time
from collections import deque
from functools import lru_cache

GATHER = 0.05          # seconds
MAX_WAITING = 10_000   # lines; beyond that, a thread that adds one waits until they are written


class AccessLog:
    """A log whose lines name the `service`, unless that is ""; `quiet` leaves out the requests."""

    def __init__(self, service: str, quiet: bool):
        self.quiet = quiet
        self._name = f"{service} " if service else ""
        self._lines: deque[str] = deque()
        self._writing = threading.Lock()
        self._wake = threading.Event()
        threading.Thread(target=self._write_forever, daemon=True).start()

    def request(self, request_id: str, method: str, target: str, status: int,
                seconds: float) -> None:
        """Log an answered request. Its words must be printable ASCII without spaces."""
        if not self.quiet:
            self._add(f"{request_id} {method} {target} {status} {seconds * 1000:.1f}ms\n")

    def event(self, text: str) -> None:
        """Log anything else. All lines but the first are indented, so they cannot fake an entry."""
        self._add("\n    ".join(text.splitlines()) + "\n")

    def flush(self) -> None:
        """Write the lines that are waiting."""
        with self._writing:
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            try:
                sys.stderr.write("".join(lines))
                sys.stderr.flush()
            except OSError:
                pass  # the reader has gone; a service does not stop because its log cannot be read

    def _add(self, text: str) -> None:
        now = time.time()
        milliseconds = int(now % 1 * 1000)
        self._lines.append(f"{_format_second(int(now))}.{milliseconds:03d}Z {self._name}{text}")
        if not self._wake.is_set():
            self._wake.set()
        if len(self._lines) > MAX_WAITING:
            self.flush()

    def _write_forever(self) -> None:
        while self._wake.wait():
            self._wake.clear()
            self.flush()
            time.sleep(GATHER)


@lru_cache(maxsize=2)
def _format_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
