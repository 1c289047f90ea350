"""The life of a process: a Service starts, serves until it is told to stop, drains and closes.

How connections are admitted is in listener.py, and what happens on one in handler.py.

Law: nothing here knows what a request is about.
"""
import contextlib
import gc
import ipaddress
import os
import select
import signal
import socket
import socketserver
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from typing import Any

from microshop.chassis import config, surroundings
from microshop.chassis.access_log import AccessLog
from microshop.chassis.client import Client, Upstream
from microshop.chassis.data_folder import FolderUnusable, claim
from microshop.chassis.database import Database, DatabaseUnusable
from microshop.chassis.listener import Listener
from microshop.chassis.metrics import Family
from microshop.chassis.telemetry import Telemetry, service_families
from microshop.chassis.turns import Turns

LAST_LOOK = 0.25      # seconds at shutdown in which an idle connection may still bring a request
HEARTBEAT = 0.25      # seconds between two heartbeats to the supervisor
ROOM_TIME = 0.5       # seconds that the first line may wait for room in a full pipe
STDOUT = 1
STACK_SIZE = 2**21    # bytes of a thread's stack; the deepest JSON needs more than half of it


def announce(line: str) -> None:
    """Print a line, unless standard output is a full pipe that nothing reads for ROOM_TIME."""
    with contextlib.suppress(OSError):  # the output may be closed, or on a full disk
        if select.select([], [STDOUT], [], ROOM_TIME)[1]:
            os.write(STDOUT, line.encode())


class Heartbeat:
    """Shows the supervisor that the accept loop runs, and notices when the supervisor is gone.

    While the process starts, a thread shows that it does.
    """

    def __init__(self, descriptor: int):
        self._supervisor = socket.socket(fileno=descriptor)
        self._supervisor.setblocking(False)
        self._due_at = 0.0
        self._has_started = threading.Event()

    def begin(self) -> None:
        """Start the thread, which sends heartbeats until beat() is called."""
        with contextlib.suppress(RuntimeError):  # the system has no room for another thread
            threading.Thread(target=self._beat_at_start, daemon=True).start()

    def beat(self) -> bool:
        """Send a heartbeat if one is due; return False if the supervisor is gone."""
        self._has_started.set()
        now = time.monotonic()
        if now < self._due_at:
            return True
        self._due_at = now + HEARTBEAT
        return self._send()

    def is_replaced(self) -> bool:
        """Return whether the supervisor has said that another process takes this one's place."""
        try:
            return bool(self._supervisor.recv(1))
        except OSError:
            return False

    def _beat_at_start(self) -> None:
        while not self._has_started.wait(HEARTBEAT):
            self._send()

    def _send(self) -> bool:
        try:
            self._supervisor.send(b".")
        except BlockingIOError:  # the supervisor is stopped, as after Ctrl-Z
            pass
        except OSError:
            return False
        return True

    def close(self) -> None:
        self._has_started.set()
        self._supervisor.close()


class Service(Listener):
    """An HTTP server that is a process of its own. A subclass names it and gives it a handler.

    A service that owns data also sets `schema`: the versions of its schema (see Database).
    """

    name, title, port = "service", "Service", 0
    announcement = "{title} listening at"  # what is printed before the URL (see child.LISTENING)
    handler: type[BaseHTTPRequestHandler]
    schema: Sequence[Sequence[str]] = ()
    turn_count = 1  # threads that work on requests at a time; more pay off if requests wait
    client: Client | None = None  # for calls to other services
    upstreams: dict[str, Upstream] = {}  # those services, by name
    token = ""  # the bearer token that writes must carry; only the gateway has one
    options: Sequence[config.Setting] = (config.HOST, config.DATA, config.TIMEOUT, config.QUIET)

    def __init__(self, settings: Namespace):
        self.settings = settings
        self.draining = False
        self.is_replaced = False  # whether another process takes over while this one drains
        self.restarts = settings.supervised[2] if settings.supervised else 0  # of its role
        self.heartbeat: Heartbeat | None = None
        self.address_family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        # This calls server_bind(), which needs what was set above.
        super().__init__((settings.host, settings.port), self.handler, settings.max_connections)
        try:
            if self.schema:
                self.database = Database(settings.data / f"{self.name}.db", self.schema)
        except DatabaseUnusable:
            self.server_close()
            raise
        self.turns = Turns(self.turn_count)
        # Under run_all, the label in front of each line names the process already.
        self.telemetry = Telemetry()
        self.log = AccessLog(
            "" if settings.supervised else self.name, settings.quiet, self.telemetry.digest)

    def families(self) -> list[Family]:
        """Return the metrics of this process. A subclass may add more."""
        return service_families(self)

    # --- start

    @classmethod
    def main(cls) -> None:
        """Serve until SIGTERM, SIGHUP or Ctrl-C.

        Exits with 1 if it cannot start, and with 2 if a setting is bad.
        """
        surroundings.prepare()
        settings = config.read(f"microshop.{cls.name}", [
            config.own_port(cls.port), *cls.options, *config.SHARED, config.SUPERVISED],
            purpose=f"Run the {cls.name} process of a shop alone.")
        threading.stack_size(STACK_SIZE)
        try:
            if cls.schema and not settings.supervised:
                claim(settings.data, shared=True)  # until the process ends
            service = cls(settings)
        except (FolderUnusable, DatabaseUnusable, RuntimeError) as error:  # or no room for a thread
            # Under run_all, a label names the process already.
            sys.exit(str(error) if settings.supervised else f"{cls.name}: {error}")
        except OSError as error:
            address = f"port {settings.port} of {settings.host}"
            sys.exit(f"{cls.name}: cannot listen on {address}: {error.strerror}")
        service.run()

    def server_bind(self) -> None:
        if self.settings.supervised:
            self.socket.close()
            listener, supervisor, _ = self.settings.supervised
            self.socket = socket.socket(fileno=listener)
            self.socket.setblocking(False)  # another process that shares it may be faster to accept
            self.heartbeat = Heartbeat(supervisor)
            self.heartbeat.begin()
            self.server_address = self.socket.getsockname()
        else:
            # HTTPServer.server_bind() looks up the host's name, which may take seconds.
            socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    @property
    def url(self) -> str:
        """The address to show to people."""
        is_local = self.server_name in ("127.0.0.1", "0.0.0.0", "::")
        name = "localhost" if is_local else self.server_name
        host = f"[{name}]" if ":" in name else name
        return f"http://{host}:{self.server_port}"

    def run(self) -> None:
        """Serve until a signal tells the process to stop, then drain and close."""
        signal.signal(signal.SIGINT, self._stop_on_signal)
        signal.signal(signal.SIGTERM, self._stop_on_signal)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # else nohup or run_all started us
            signal.signal(signal.SIGHUP, self._stop_on_signal)
        for warning in find_warnings(self):
            self.log.event(f"- warning: {warning}")
        announce(f"{self.announcement.format(title=self.title)} {self.url}\n")
        gc.freeze()  # what exists by now stays: the garbage collector need not look at it again
        self.serve_forever()
        self.drain()
        self.close()

    def service_actions(self) -> None:
        """Send a heartbeat if one is due; stop if the supervisor is gone.

        This is called in each round of the accept loop, so a beat shows that it runs.
        """
        super().service_actions()
        self.telemetry.digest_overdue()
        if self.client:
            self.client.trim()
        if self.heartbeat and not self.heartbeat.beat():
            self.shutdown()

    # --- end

    def _stop_on_signal(self, number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
        self.shutdown()

    def drain(self) -> None:
        """Stop accepting, let requests in flight finish, and close idle connections."""
        self.is_replaced = bool(self.heartbeat and self.heartbeat.is_replaced())
        self.draining = True
        began = time.monotonic()
        while select.select([self], [], [], 0)[0] and time.monotonic() < began + LAST_LOOK:
            self.handle_request()  # accept a client from the kernel's queue: closing would reset it
        self.server_close()
        while self.connections and time.monotonic() < began + self.settings.grace:
            self.connections.close_idle(LAST_LOOK)
            self.turns.end_overdue()
            if self.heartbeat:
                self.heartbeat.beat()
            time.sleep(0.01)
        if unfinished := self.connections.count_busy():
            requests = "1 request" if unfinished == 1 else f"{unfinished} requests"
            self.log.event(f"- shutting down with {requests} unfinished: "
                           f"the {self.settings.grace:g} s grace period is over")

    def close(self) -> None:
        """Close what the process holds besides its listening socket."""
        if self.heartbeat:
            self.heartbeat.close()
        self.rejected.close()
        self.turns.close()
        if self.client:
            self.client.close()
        if self.schema:
            self.database.close()
        self.log.close()


def find_warnings(service: Service) -> Iterator[str]:
    """Yield what a person should know about the settings and the file of a service."""
    if not service.token and not ipaddress.ip_address(service.server_name).is_loopback:
        checks_tokens = config.TOKEN in service.options
        yield f"other machines can reach port {service.server_port}, " + (
            "and any client may write; set MICROSHOP_TOKEN or --token-file to require a token"
            if checks_tokens else
            "and this process checks no token; let only the gateway and the services reach it")
    if service.schema and not service.database.has_wal:
        yield (f"{service.database.path} has no write-ahead log: its folder is read-only (when "
               "that changes, restart), or supports none (then reads wait for writes)")
