"""A process of the shop: a Service listens, and a Handler answers on each connection.

A subclass of Handler has a table of routes beside its methods. Such a method returns an Answer or
raises a ServiceError, and format_answer() alone turns either into bytes. What http.server does wrongly
or slowly is replaced here; the comments say why.

Law: routes write to no socket; they return. Nothing here knows what a route is about.
"""
import contextlib
import errno
import ipaddress
import math
import os
import random
import select
import signal
import socket
import socketserver
import sys
import threading
import time
import traceback
from argparse import Namespace
from collections import deque
from collections.abc import Sequence
from http.server import ThreadingHTTPServer
from operator import itemgetter
from typing import Any

from microshop.chassis import config, wire
from microshop.chassis.access_log import AccessLog
from microshop.chassis.database import Database, DatabaseUnusable
from microshop.chassis.errors import (
    ServiceUnavailable)

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

IDLE_TIME = 60.0     # seconds that a connection may wait for its next request; Keep-Alive announces them
LAST_LOOK = 0.25     # seconds in which a request may still come on an idle connection when the process ends
POLL = 0.05          # seconds after which the accept loop notices that it should end
HEARTBEAT = 0.25          # seconds between two signs of life to the supervisor
MAX_AWAY = 64        # connections that were turned away and are not closed yet
NO_ROOM_PAUSE = 0.1  # seconds without accepting when the system has no room for another connection
NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
STACK_SIZE = 2**21   # bytes of a thread's stack: as deep as the interpreter lets JSON be nested takes over half of it


def _inherit(handle: int) -> socket.socket:
    """Return a socket that the supervisor has handed on."""
    inherited = socket.socket(fileno=handle)
    inherited.setblocking(False)  # who shares it may be quicker to accept
    return inherited


def _end_input(connection: socket.socket) -> None:
    """Wake the thread that waits on a connection: it sees the end, after what has come before, and closes."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RD)


def make_id() -> str:
    return f"{random.getrandbits(64):016x}"


class Service(ThreadingHTTPServer):
    """An HTTP server that is a process of its own; subclasses name it, and bring handler and schema."""

    name = "service"
    title = "Service"
    port = 0
    handler: type[Any]
    schema: Sequence[Sequence[str]] = ()     # its versions, see Database; none where a process owns no data
    token = ""                               # what writes must show; only the gateway has one
    options: Sequence[config.Setting] = (config.HOST, config.DATA, config.TIMEOUT, config.QUIET)

    request_queue_size = 1024                # the default, 5, turns clients away that come together
    allow_reuse_address = os.name != "nt"    # there it would let two processes have one port
    timeout = 0                              # of handle_request(): another process may have been quicker

    def __init__(self, settings: Namespace):
        self.settings = settings
        self.draining = False
        self.connections: dict[socket.socket, float] = {}  # those open, by when each became idle; inf where it is busy
        self.rejected: deque[tuple[float, socket.socket]] = deque()  # when, and who
        self.supervisor: socket.socket | None = None
        self._heartbeat_at = self._told_at = -math.inf
        self.address_family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        super().__init__((settings.host, settings.port), self.handler)
        try:
            if self.schema:
                self.database = Database(settings.data / f"{self.name}.db", self.schema)
        except DatabaseUnusable:
            self.server_close()
            raise
        self.log = AccessLog(self.name, settings.quiet)

    def server_bind(self) -> None:
        if self.settings.supervised:
            self.socket.close()
            self.socket, self.supervisor = map(_inherit, self.settings.supervised)
            self.server_address = self.socket.getsockname()
        else:
            socketserver.TCPServer.server_bind(self)  # HTTPServer's looks up the host's name: that may take seconds
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    @property
    def url(self) -> str:
        """The address to tell people."""
        name = "localhost" if self.server_name in ("127.0.0.1", "0.0.0.0", "::") else self.server_name
        return f"http://[{name}]:{self.server_port}" if ":" in name else f"http://{name}:{self.server_port}"

    @classmethod
    def main(cls) -> None:
        """Read the settings, then serve until SIGTERM or Ctrl-C. Exits with status 1 if it cannot begin."""
        settings = config.read(f"microshop.{cls.name}", [
            config.Setting("port", config.port, str(cls.port), "port to listen on; 0 takes a free one"), *cls.options,
            *config.SHARED, config.Setting("supervised", config.handles, None, "for run_all alone: what it hands on")])
        threading.stack_size(STACK_SIZE)
        if resource:
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the usual 1,024 would be used up too soon
        try:
            service = cls(settings)
        except DatabaseUnusable as error:
            sys.exit(f"{cls.name}: {error}")
        except OSError as error:
            sys.exit(f"{cls.name}: cannot listen on port {settings.port} of {settings.host}: {error.strerror}")
        service.run()

    def run(self) -> None:
        """Serve until told to stop, then end cleanly."""
        signal.signal(signal.SIGINT, self._stop_on_signal)
        signal.signal(signal.SIGTERM, self._stop_on_signal)
        if not self.token and not ipaddress.ip_address(self.server_name).is_loopback:
            self.log.event(f"warning: port {self.server_port} is open to other machines, and whoever reaches it may "
                           "write; the gateway can ask for a token (MICROSHOP_TOKEN or --token-file)")
        sys.stdout.write(f"{self.title} listening at {self.url}\n")  # print() may write a line in two pieces
        sys.stdout.flush()
        self.serve_forever(POLL)
        self.drain()
        self.close()

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            connection, address = self.socket.accept()
        except OSError as error:
            if error.errno in NO_ROOM:  # the client stays in the queue, and the loop would spin
                self._tell_no_room(os.strerror(error.errno))
                time.sleep(NO_ROOM_PAUSE / 10 if self._close_oldest() else NO_ROOM_PAUSE)
            raise
        if sys.platform != "linux":
            connection.setblocking(True)  # BSD hands the listener's mode on
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own; 503 where no idle one can be closed to make room for it."""
        if len(self.connections) >= self.settings.max_connections and not self._close_oldest():
            self._reject(request)
            return
        self.connections[request] = time.monotonic()  # noted here, not in its thread, so that drain() overlooks none
        try:
            super().process_request(request, client_address)
        except RuntimeError as error:  # no thread is to be had
            del self.connections[request]
            self._tell_no_room(str(error))
            self._reject(request)

    def _close_oldest(self) -> bool:
        """Close the connection that has been idle for longest; False if none is."""
        connections = self.connections.copy()
        oldest = min(connections, key=connections.__getitem__, default=None)
        if oldest is None or connections[oldest] == math.inf:
            return False
        self.connections.pop(oldest, None)
        _end_input(oldest)
        return True

    def _reject(self, connection: socket.socket) -> None:
        """Answer 503 at once, from the accept loop; service_actions() closes it, when the client has read that."""
        handler: Any = self.handler.__new__(self.handler)  # type: ignore[call-overload]  # without a connection: it only puts the answer into words
        handler.server, handler.request_id, handler.command = self, make_id(), "-"
        handler.close_connection = True
        status, message = handler.describe(ServiceUnavailable("too many connections are open", [("Retry-After", "1")]))
        with contextlib.suppress(OSError):
            connection.send(message)  # which does not block: nothing was sent before
            connection.shutdown(socket.SHUT_WR)
        self.rejected.append((time.monotonic(), connection))
        self.log.request(handler.request_id, "-", "-", status, 0)

    def _tell_no_room(self, why: str) -> None:
        if time.monotonic() > self._told_at + IDLE_TIME:
            self._told_at = time.monotonic()
            self.log.event(f"- no room for another connection: {why}; goes on when others have ended")

    def service_actions(self) -> None:
        """Do what is due on each turn of the accept loop: close who was turned away, and show that the loop turns."""
        now = time.monotonic()
        while self.rejected and (self.rejected[0][0] < now - wire.LINGER or len(self.rejected) > MAX_AWAY):
            self.rejected.popleft()[1].close()
        if self.supervisor and now > self._heartbeat_at + HEARTBEAT:
            self._heartbeat_at = now
            try:
                self.supervisor.send(b".")
            except BlockingIOError:  # it stands still, as after Ctrl-Z
                pass
            except OSError:  # it is gone
                self.supervisor.close()
                self.supervisor = None
                threading.Thread(target=self.shutdown).start()

    def shutdown_request(self, request: Any) -> None:
        self.connections.pop(request, None)  # of one that came to no handler; else finish() did
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # that a client went away is no news
            self.log.event(f"- a connection from {client_address[0]} failed\n{traceback.format_exc()}")

    def _stop_on_signal(self, number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
        # shutdown() waits for the accept loop, which may be what this handler has interrupted.
        threading.Thread(target=self.shutdown).start()

    def drain(self) -> None:
        """Stop accepting, let requests in flight finish within the grace period, and close what idles."""
        self.draining = True
        began = time.monotonic()
        while select.select([self], [], [], 0)[0] and time.monotonic() < began + LAST_LOOK:
            self.handle_request()  # of a client that the kernel has let in: closing would reset it
        self.server_close()
        while self.connections and (now := time.monotonic()) < began + self.settings.grace:
            for connection, idle_since in self.connections.copy().items():
                if idle_since < now - LAST_LOOK:
                    _end_input(connection)
            time.sleep(0.01)
        if cut := list(self.connections.values()).count(math.inf):
            self.log.event(f"- ends although {cut} requests are under way: {self.settings.grace:g} s are over")

    def close(self) -> None:
        """Let go of what the process holds besides its socket."""
        for connection in filter(None, [self.supervisor, *map(itemgetter(1), self.rejected)]):
            connection.close()
        if self.schema:
            self.database.close()
        self.log.flush()
