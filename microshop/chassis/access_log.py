"""The log of a process: one line for each request and each event, on stderr.

    2026-11-22T20:25:41.123Z users 3f0c9a41d2b87e65 GET /users/1 200 0.4ms

The word before the method is the request's id. It is a *correlation id*: all processes that work on
a request log the same one, so a search for it finds every line about the request.

If each line were written at once, every request would cost a system call and would wake the process
that reads the pipe. So a separate thread writes. It writes the first line after a quiet time at
once, and the lines that follow together, every GATHER seconds.

Law: only that thread writes. It may block for hours, when nothing reads the log: then lines are
lost, and counted, but no request and no accept loop waits for them.
"""
import os
import random
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache

GATHER = 0.05          # seconds
AT_ONCE = 10           # events of a kind that are written as they happen, in a minute
MINUTE = 60.0          # seconds after which further events are summed up
MAX_WAITING = 10_000   # lines; further ones are lost
CLOSE_TIME = 1.0       # seconds that a process waits at its end for its last lines to be written

STDERR = 2


def make_request_id() -> str:
    """Return a new id for a request that came without one."""
    return random.randbytes(8).hex()


class EventLimit:
    """Keeps the log short when something goes wrong again and again.

    The first AT_ONCE events of a kind are written. Further ones are counted, and summed up in one
    line a minute. After a minute without further ones, the kind begins anew.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}  # of the events in this minute, by kind
        self._last: dict[str, str] = {}    # the text of the last event, by kind
        self._lock = threading.Lock()

    def admits(self, kind: str, text: str) -> bool:
        """Count an event; return whether it may be written."""
        with self._lock:
            self._last[kind] = text
            count = self._counts[kind] = self._counts.get(kind, 0) + 1
        return count <= AT_ONCE

    def end_minute(self) -> list[str]:
        """Begin another minute; return a text for each kind of which not all were written."""
        with self._lock:
            further = {kind: count - AT_ONCE for kind, count in self._counts.items()
                       if count > AT_ONCE}
            self._counts = dict.fromkeys(further, AT_ONCE)
            return [f"- {kind}: {count} more in the last minute; the last one: {self._last[kind]}"
                    for kind, count in further.items()]


class AccessLog:
    """A log whose lines name the `service`, unless it is ""; if `quiet`, requests are left out.

    Its thread also calls `digest` (of telemetry.py) soon after a request. The log does not use
    sys.stderr, whose lock a thread that is blocked in a write would keep.
    """

    def __init__(self, service: str, quiet: bool, digest: Callable[[], None]):
        self.quiet, self._digest = quiet, digest
        self._name = f"{service} " if service else ""
        self._lines: deque[str] = deque()
        self._lost = 0
        self._losing = threading.Lock()  # held to change _lost
        self._limit = EventLimit()
        self._wake = threading.Event()     # there is something to write
        self._closing = threading.Event()  # nothing more will come
        self._writer = threading.Thread(target=self._write_forever, daemon=True)
        self._writer.start()

    def request(self, request_id: str, method: str, target: str, status: int,
                seconds: float) -> None:
        """Log an answered request. Its words must be printable ASCII without spaces."""
        if not self.quiet:
            self._add(f"{request_id} {method} {target} {status} {seconds * 1000:.1f}ms")
        elif not self._wake.is_set():
            self._wake.set()

    def event(self, text: str, kind: str = "") -> None:
        """Log anything else. The text begins with a request id, or with "-" if there is none.

        All lines but the first are indented, so that none can be mistaken for an entry. A `kind`
        names events that may happen often: EventLimit limits how many of them are written.
        """
        if not kind or self._limit.admits(kind, text):
            self._add("\n    ".join(text.splitlines()))

    def close(self) -> None:
        """Write what is left, if that takes no longer than CLOSE_TIME."""
        self._closing.set()
        self._wake.set()
        self._writer.join(CLOSE_TIME)

    def _add(self, text: str) -> None:
        if len(self._lines) < MAX_WAITING:
            self._lines.append(self._entry(text))
        else:
            self._note_lost(1)
        if not self._wake.is_set():
            self._wake.set()

    def _entry(self, text: str) -> str:
        now = time.time()
        milliseconds = int(now % 1 * 1000)
        return f"{_format_second(int(now))}.{milliseconds:03d}Z {self._name}{text}\n"

    def _note_lost(self, count: int) -> None:
        with self._losing:
            self._lost += count

    def _write_forever(self) -> None:
        minute_ends = time.monotonic() + MINUTE
        is_last = False
        while not is_last:
            self._wake.wait(minute_ends - time.monotonic())
            self._wake.clear()
            is_last = self._closing.is_set()
            if is_last or time.monotonic() >= minute_ends:
                minute_ends = time.monotonic() + MINUTE
                for text in self._limit.end_minute():
                    self.event(text)
            self._digest()
            self._write_waiting()
            self._closing.wait(GATHER)

    def _write_waiting(self) -> None:
        """Write the lines that are waiting, and how many further ones were lost."""
        count, lost = len(self._lines), self._lost
        text = "".join([self._lines[number] for number in range(count)])
        if lost:
            text += self._entry(f"- lines lost here because they could not be written: {lost}")
        try:
            write_whole(STDERR, text.encode(errors="backslashreplace"))
            self._note_lost(-lost)
        except NotWritten as failure:  # a service does not stop because its log cannot be written
            unwritten = failure.rest.count(b"\n")
            self._note_lost(unwritten - bool(lost))  # the last one told only of those before
        for _ in range(count):
            self._lines.popleft()


class NotWritten(OSError):
    """A write failed, with the error of os.write(); `rest` is the part that was not written."""

    rest = b""


def write_whole(descriptor: int, content: bytes) -> None:
    """Write all of the content, however long that takes. Raises NotWritten.

    A descriptor may be in non-blocking mode, which it shares with other processes: a parent that
    has set it for its own end of a terminal or socket has set it for us. Then we wait for room.
    """
    rest = memoryview(content)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest):]
        except BlockingIOError:
            select.select([], [descriptor], [])
        except OSError as error:
            failure = NotWritten(error.errno, error.strerror)
            failure.rest = bytes(rest)
            raise failure from error


@lru_cache(maxsize=2)
def _format_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
