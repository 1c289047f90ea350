"""Admitting connections: at most `max_connections` of them.

Where socketserver does not fit, this module replaces it; the comments say why. What happens on a
connection is in handler.py.

The accept loop is serve_forever. For each connection, socketserver calls get_request and then
process_request. ThreadingHTTPServer would start a thread there; here, the connection waits in
turns.py until a request arrives and a thread has a turn. That thread calls _serve, which answers
the request and lets the connection wait again, or calls shutdown_request. A connection for which
there is no room is answered here, in the accept loop.

Law: nothing here reads a request, or knows what its first line means: handler.py does.
"""
import contextlib
import errno
import os
import select
import socket
import sys
import threading
import time
import traceback
from collections import deque
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from operator import itemgetter
from typing import Any

from microshop.chassis import wire
from microshop.chassis.access_log import AccessLog
from microshop.chassis.answer import IDLE_TIME
from microshop.chassis.errors import RETRY_SOON, ServiceUnavailable
from microshop.chassis.telemetry import Telemetry
from microshop.chassis.turns import TURN_TIME, Turns

IDLE_LOOK = 1.0       # seconds between two looks for connections that have been idle too long
POLL = 0.05           # seconds between two rounds of the accept loop, if no client comes
BODY_MEMORY = 64 * 1024 * 1024  # bytes of the request bodies that are held at a time
MAX_CLOSING = 64      # connections whose input was ended to make room, and that are still open
MAX_REJECTED = 64     # connections without room that are not answered yet, or not closed yet
ARRIVAL_TIME = 0.25   # seconds after which the request on a new connection is late
PEEK_SIZE = 256       # bytes of the first line of a rejected request that are looked at
NO_ROOM_PAUSE = 0.1   # seconds without accepting when the system has no room for a connection
NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class BodyMemory:
    """The memory for request bodies: all together hold at most `size` bytes at a time."""

    def __init__(self, size: int):
        self._free = size
        self._lock = threading.Lock()

    def take(self, size: int) -> None:
        """Take this many bytes. Raises ServiceUnavailable if they are not free."""
        with self._lock:
            if size > self._free:
                raise ServiceUnavailable("too many request bodies are being received", [RETRY_SOON])
            self._free -= size

    def release(self, size: int) -> None:
        with self._lock:
            self._free += size


class OpenConnections:
    """The open connections: each is busy with a request, or has been idle since some moment.

    A lock keeps a connection from turning busy, or from ending, while it is being closed as idle.
    """

    def __init__(self) -> None:
        self._idle_since: dict[socket.socket, float | None] = {}  # None: it is busy
        self._closed: set[socket.socket] = set()  # those whose input we have ended
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._idle_since)

    def note_busy(self, connection: socket.socket) -> None:
        with self._lock:
            self._idle_since[connection] = None

    def note_new(self, connection: socket.socket) -> None:
        """Count a connection as idle from the moment at which its first request is late.

        If it could be closed before, its client would get no answer at all, not even 503.
        """
        self._idle_since[connection] = time.monotonic() + ARRIVAL_TIME

    def note_idle(self, connection: socket.socket) -> None:
        self._idle_since[connection] = time.monotonic()

    def forget(self, connection: socket.socket) -> None:
        with self._lock:
            self._idle_since.pop(connection, None)
            self._closed.discard(connection)

    def has_closed(self, connection: socket.socket) -> bool:
        """Return whether we have ended a connection's input, so that its client is not to blame."""
        return connection in self._closed

    def count_busy(self) -> int:
        return list(self._idle_since.copy().values()).count(None)

    def close_oldest(self) -> bool:
        """Close the longest-idle connection.

        Return False if none is idle, or if MAX_CLOSING connections are still being closed.
        """
        with self._lock:
            idle = self._idle_at(time.monotonic())
            if not idle or len(self._closed) >= MAX_CLOSING:
                return False
            _, oldest = min(idle, key=itemgetter(0))
            del self._idle_since[oldest]
            self._close(oldest)
        return True

    def close_idle(self, seconds: float) -> None:
        """Close the connections that have been idle for these seconds or longer."""
        with self._lock:
            for _, connection in self._idle_at(time.monotonic() - seconds):
                self._close(connection)

    def _idle_at(self, moment: float) -> list[tuple[float, socket.socket]]:
        """Return what has been idle since that moment or longer, each after its own moment."""
        return [(since, connection) for connection, since in self._idle_since.copy().items()
                if since is not None and since <= moment]

    def _close(self, connection: socket.socket) -> None:
        """End the input. So there is an end to read, and who reads it closes the connection."""
        self._closed.add(connection)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RD)


def peek(connection: socket.socket) -> bytes:
    """Return the first bytes that have arrived on a connection, and leave them there.

    Empty lines before a request do not count (RFC 9112 section 2.2).
    """
    with contextlib.suppress(OSError):  # nothing has arrived, or the connection is broken
        return connection.recv(PEEK_SIZE, socket.MSG_PEEK | socket.MSG_DONTWAIT).lstrip(b"\r\n")
    return b""


class RejectedConnections:
    """Connections for which there is no room.

    Each is answered when the first line of its request has arrived, or after ARRIVAL_TIME, and is
    closed a little later: closing it while its client still sends would reset it, and the client
    might never see the answer. Only the thread of the accept loop uses this, so rejecting a client
    costs no thread.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[float, Any]] = deque()             # (accepted at, handler)
        self._answered: deque[tuple[float, socket.socket]] = deque()  # (answered at, connection)

    def __len__(self) -> int:
        return len(self._waiting) + len(self._answered)

    def has_unanswered(self) -> bool:
        return bool(self._waiting)

    def add(self, handler: Any) -> None:
        """Reject the connection of a handler."""
        self._waiting.append((time.monotonic(), handler))
        self.answer_due()

    def answer_due(self) -> None:
        """Answer those whose first line is there or late; if too many wait, the oldest, too."""
        latest = time.monotonic() - ARRIVAL_TIME
        for _ in range(len(self._waiting)):  # those that go on waiting end where they began
            accepted_at, handler = self._waiting.popleft()
            beginning = peek(handler.connection)
            has_line = b"\n" in beginning or len(beginning) == PEEK_SIZE
            if has_line or accepted_at < latest or len(self._waiting) >= MAX_REJECTED:
                self.answer(handler.connection, handler.answer_unread(beginning))
            else:
                self._waiting.append((accepted_at, handler))

    def answer(self, connection: socket.socket, message: bytes) -> None:
        """Send the message and half-close; this does not block, since nothing was sent before."""
        with contextlib.suppress(OSError):
            connection.send(message)
            connection.shutdown(socket.SHUT_WR)
        self._answered.append((time.monotonic(), connection))

    def close_due(self) -> None:
        """Close those that have lingered long enough, and the oldest if there are too many."""
        latest = time.monotonic() - wire.LINGER
        while self._answered:
            answered_at, connection = self._answered[0]
            if answered_at > latest and len(self._answered) <= MAX_REJECTED:
                return
            connection.close()
            self._answered.popleft()

    def close(self) -> None:
        while self._waiting:
            self._waiting.popleft()[1].connection.close()
        while self._answered:
            self._answered.popleft()[1].close()


class Listener(ThreadingHTTPServer):
    """A ThreadingHTTPServer that stays within its limits and says so when it cannot take more."""

    request_queue_size = 1024  # with socketserver's 5, clients that connect at once get no answer
    timeout = 0                # handle_request() must not wait if another process took the client
    is_stopping = False        # the accept loop must end
    name: str
    log: AccessLog
    telemetry: Telemetry
    turns: Turns

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler],
                 max_connections: int):
        self.max_connections = max_connections
        self.connections = OpenConnections()
        self.rejected = RejectedConnections()
        self.body_memory = BodyMemory(BODY_MEMORY)
        self._close_idle_at = 0.0  # of time.monotonic
        super().__init__(address, handler)

    def serve_forever(self, poll_interval: float = POLL) -> None:
        """Accept connections until shutdown() is called."""
        while not self.is_stopping:
            # end_overdue() must be called in time, and a rejected client gets its answer at once.
            is_hurried = self.turns.was_used() or self.rejected.has_unanswered()
            pause = TURN_TIME if is_hurried else poll_interval
            if select.select([self], [], [], pause)[0]:
                self.handle_request()
            self.service_actions()

    def shutdown(self) -> None:
        """Let the accept loop end soon.

        socketserver's own method waits for that end. So it would block in a signal handler, and
        there may be no room for another thread to call it in.
        """
        self.is_stopping = True

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            connection, address = self.socket.accept()
        except OSError as error:
            if error.errno in NO_ROOM:  # the client stays in the queue: do not spin
                self._log_no_room(os.strerror(error.errno))
                has_closed = self.connections.close_oldest()
                time.sleep(NO_ROOM_PAUSE / 10 if has_closed else NO_ROOM_PAUSE)
            raise
        if sys.platform != "linux":
            connection.setblocking(True)  # on BSD and macOS, it inherits the listener's mode
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Let a connection wait for its first request; reject it if there is no room for it."""
        handler = self.RequestHandlerClass(request, client_address, self)  # type: ignore[arg-type]
        is_full = len(self.connections) >= self.max_connections
        if is_full and not self.connections.close_oldest():
            self.rejected.add(handler)
            return
        self.connections.note_new(request)
        self._await_request(handler)

    def _await_request(self, handler: Any) -> None:
        """Call _serve() in a turn, once something has arrived on a connection."""
        self.turns.when_readable(handler.connection.fileno(), partial(self._serve, handler))

    def _serve(self, handler: Any) -> None:
        """Answer what has arrived on a connection; then let it wait for more, or close it."""
        try:
            if handler.answer_arrived():
                self._await_request(handler)
                return
        except Exception:
            self.handle_error(handler.connection, handler.client_address)
        self.shutdown_request(handler.connection)

    def _log_no_room(self, why: str) -> None:
        self.log.event(f"- no room for another connection: {why}", "no room")

    def service_actions(self) -> None:
        """Do what is due, in each round of the accept loop."""
        self.turns.end_overdue()
        self.rejected.answer_due()
        self.rejected.close_due()
        now = time.monotonic()
        if now >= self._close_idle_at:
            self._close_idle_at = now + IDLE_LOOK
            self.connections.close_idle(IDLE_TIME)

    def shutdown_request(self, request: Any) -> None:
        self.connections.forget(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that goes away is normal
            trace = traceback.format_exc()
            self.log.event(f"- a connection from {client_address[0]} failed\n{trace}", "connection")
