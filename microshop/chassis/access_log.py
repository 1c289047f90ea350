"""The log of a process: a line per request and per event, on stderr.

    2026-11-22T20:25:41.123Z users 3f0c9a41d2b87e65 GET /users/1 200 0.4ms

To write each line as it comes would cost a system call and wake the reader of the pipe. So one thread
writes: the first line after a quiet spell at once, and then what gathers in each GATHER seconds.
"""
import sys
import threading
import time
from collections import deque
from functools import lru_cache

GATHER = 0.05          # seconds
MAX_WAITING = 10_000   # lines; beyond that, who adds one waits until they are written


@lru_cache(maxsize=2)
def _timestamp(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


class AccessLog:
    """The log of `service`; when `quiet`, without its requests."""

    def __init__(self, service: str, quiet: bool):
        self.service, self.quiet = service, quiet
        self._lines: deque[str] = deque()
        self._writing, self._wake = threading.Lock(), threading.Event()
        threading.Thread(target=self._write_forever, daemon=True).start()

    def request(self, request_id: str, method: str, target: str, status: int, seconds: float) -> None:
        """Note an answered request. Its words must be printable ASCII without spaces."""
        if not self.quiet:
            self._add(f"{request_id} {method} {target} {status} {seconds * 1000:.1f}ms\n")

    def event(self, text: str) -> None:
        """Note anything else; its further lines are indented, so that none passes for an entry."""
        self._add("\n    ".join(text.splitlines()) + "\n")

    def flush(self) -> None:
        """Write what still waits."""
        with self._writing:
            try:
                sys.stderr.write("".join([self._lines.popleft() for _ in range(len(self._lines))]))
                sys.stderr.flush()
            except OSError:
                pass  # nobody reads it any more

    def _add(self, text: str) -> None:
        now = time.time()
        self._lines.append(f"{_timestamp(int(now))}.{int(now % 1 * 1000):03d}Z {self.service} {text}")
        if not self._wake.is_set():
            self._wake.set()
        if len(self._lines) > MAX_WAITING:
            self.flush()

    def _write_forever(self) -> None:
        while self._wake.wait():
            self._wake.clear()
            self.flush()
            time.sleep(GATHER)
