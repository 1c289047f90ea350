"""The log of a process: one line for each request and each event, on stderr.

    2026-11-22T20:25:41.123Z users 3f0c9a41d2b87e65 GET /users/1 200 0.4ms

The word before the method is the request's id. It is a *correlation id*: all processes that work on
a request log the same one, so a search for it finds every line about the request.

If each line were written at once, every request would cost a system call and would wake the process
that reads the pipe. So a separate thread writes. It writes the first line after a quiet time at
once, and the lines that follow together, every GATHER seconds.
"""
import random
import sys
import threading
import time
from collections import deque
from functools import lru_cache

GATHER = 0.05          # seconds
MAX_WAITING = 10_000   # lines; beyond that, a thread that adds one writes them all itself


def make_request_id() -> str:
    """Return a new id for a request that came without one."""
    return f"{random.getrandbits(64):016x}"


class AccessLog:
    """A log whose lines name the `service`, unless it is ""; if `quiet`, requests are left out."""

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
        """Log anything else. The text begins with a request id, or with "-" if there is none.

        All lines but the first are indented, so that none can be mistaken for an entry.
        """
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
