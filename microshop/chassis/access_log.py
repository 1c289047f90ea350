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
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

GATHER = 0.05          # seconds
AT_ONCE = 10           # events of a kind that are written as they happen
MINUTE = 60.0          # seconds after which the further events of a kind are summed up
LOOK = 1.0             # seconds between two looks whether a minute has ended
MAX_WAITING = 10_000   # lines; beyond that, a thread that adds one writes them all itself


def make_request_id() -> str:
    """Return a new id for a request that came without one."""
    return f"{random.getrandbits(64):016x}"


@dataclass(slots=True)
class _Kind:
    """What was counted of a kind of events; `last` is the text of the last one not written."""

    minute_ends: float
    written: int = 0
    unwritten: int = 0
    last: str = ""


class EventLimit:
    """Keeps the log short when something goes wrong again and again.

    The first AT_ONCE events of a kind are written. Further ones are counted, and summed up in one
    line a minute. After a minute without further ones, the kind begins anew. The `clock` is in
    seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._kinds: dict[str, _Kind] = {}
        self._lock = threading.Lock()

    def admits(self, kind: str, text: str) -> bool:
        """Return whether an event may be written now; if not, count it."""
        with self._lock:
            if kind not in self._kinds:
                self._kinds[kind] = _Kind(self._clock() + MINUTE)
            counted = self._kinds[kind]
            if counted.written < AT_ONCE:
                counted.written += 1
                return True
            counted.unwritten += 1
            counted.last = text
            return False

    def summaries(self) -> list[str]:
        """Return a text for each kind that has unwritten events and whose minute has ended."""
        now, texts = self._clock(), []
        with self._lock:
            for kind, counted in list(self._kinds.items()):
                if now < counted.minute_ends:
                    continue
                if counted.unwritten:
                    texts.append(f"- {kind}: {counted.unwritten} more in the last minute; "
                                 f"the last one: {counted.last}")
                    counted.unwritten, counted.minute_ends = 0, now + MINUTE
                else:
                    del self._kinds[kind]
        return texts


class AccessLog:
    """A log whose lines name the `service`, unless it is ""; if `quiet`, requests are left out."""

    def __init__(self, service: str, quiet: bool):
        self.quiet = quiet
        self._name = f"{service} " if service else ""
        self._lines: deque[str] = deque()
        self._limit = EventLimit()
        self._writing = threading.Lock()
        self._wake = threading.Event()
        threading.Thread(target=self._write_forever, daemon=True).start()

    def request(self, request_id: str, method: str, target: str, status: int,
                seconds: float) -> None:
        """Log an answered request. Its words must be printable ASCII without spaces."""
        if not self.quiet:
            self._add(f"{request_id} {method} {target} {status} {seconds * 1000:.1f}ms\n")

    def event(self, text: str, kind: str = "") -> None:
        """Log anything else. The text begins with a request id, or with "-" if there is none.

        All lines but the first are indented, so that none can be mistaken for an entry. A `kind`
        names events that may happen often: EventLimit limits how many of them are written.
        """
        if not kind or self._limit.admits(kind, text):
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
        while True:
            self._wake.wait(LOOK)
            self._wake.clear()
            for text in self._limit.summaries():
                self.event(text)
            self.flush()
            time.sleep(GATHER)


@lru_cache(maxsize=2)
def _format_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
