"""The supervisor: starts the services and the gateway, shows what they print, and ends them all.

Threads only read the children's pipes; what they read becomes an Event in one queue, and one loop decides.
A child that dies is started again. Every child watches a pipe that only the supervisor holds, its standard
input, and ends with it: so none outlives the supervisor, even one that is killed.
"""
import contextlib
import errno
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from microshop.chassis import config

KILL_WAIT = 5.0      # seconds after the order to stop in which a child must end, or is killed
SERVICE_WAIT = 1.0   # seconds of these that are left to the services even if a gateway hangs
RESTART_WAIT = 0.5   # seconds before a child that died is started again
TICK = 0.05          # seconds between looks at the clock and the signals
MAX_LINE = 2**20     # bytes of a line that are shown without waiting for its end
SERVICE_HOST = "127.0.0.1"

LISTENING = re.compile(rb"listening at (http://\S+:([0-9]+))$", re.M)
COLOURS = {"users": 32, "products": 33, "orders": 35}  # of a terminal; the others are cyan, 36

OPTIONS = [
    config.Setting("host", config.host, "127.0.0.1", f"address of the gateway; the services stay on {SERVICE_HOST}"),
    config.Setting("port", config.port, "3000",
                   "port of the gateway, the services have the next three; 0 picks free ones"),
    config.DATA,
    config.Setting("fresh", config.switch, "",
                   "use a temporary data folder, whatever --data says; it goes at the end"),
    config.Setting("workers", config.count, "1", "gateway processes that share the one port"),
    *config.OF_THE_GATEWAY,
    config.QUIET,
]


class Child:
    """A process of the shop. It is started when each that it `needs` has a port; 0 is none yet."""

    def __init__(self, name: str, module: str, host: str, port: int, needs: "list[Child]", flags: list[str]):
        self.name, self.module, self.host, self.port, self.needs, self.flags = name, module, host, port, needs, flags
        self.process: subprocess.Popen | None = None  # from its start until its end was noticed
        self.url = ""            # as its listening line tells
        self.start_at = 0.0      # not before
        self.told_to_end = False

    def command(self) -> list[str]:
        return [sys.executable, "-m", f"microshop.{self.module}", "--supervised",
                "--host", self.host, "--port", str(self.port), *self.flags]


class Event(NamedTuple):
    """A child wrote `output`, whole lines, or ended with `status`."""

    child: Child
    output: bytes = b""
    status: int | None = None


def plan_children(settings: Namespace) -> tuple[list[Child], list[Child]]:
    """Return the services and the gateways that the settings ask for."""
    first, quiet = settings.port, ["--quiet"] if settings.quiet else []  # port 0 is 0 for all
    services = [Child(name, name, SERVICE_HOST, first and first + n, [], ["--data", str(settings.data), *quiet])
                for n, name in enumerate(("users", "products", "orders"), start=1)]
    services[-1].needs = services[:-1]  # orders calls the two others
    flags = [*quiet, *config.hand_on(settings, config.OF_THE_GATEWAY), *["--reuse-port"] * (settings.workers > 1)]
    gateways = [Child("gateway", "gateway", settings.host, first, services, flags)]
    for n in range(2, settings.workers + 1):  # these need the port that the first one took
        gateways.append(Child(f"gateway{n}", "gateway", settings.host, first, [*services, gateways[0]], flags))
    return services, gateways


class Supervisor:
    """Runs the shop until a signal comes or a child cannot be started."""

    def __init__(self, services: list[Child], gateways: list[Child]):
        self.services, self.gateways, self.children = services, gateways, services + gateways
        self.events: queue.Queue[Event] = queue.Queue(maxsize=1000)  # a child that prints faster than we do blocks
        self.signals = 0
        self.status = 0
        self.stop_by = 0.0  # when what still runs is killed; 0 until the shop is to end
        self.began_at = time.monotonic()
        self.was_ready = False

    def run(self) -> int:
        """Start all, serve, stop all; return the exit status."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._on_signal)
        try:
            while not self.stop_by or any(child.process for child in self.children):
                self._decide()
                self._take_event()
        finally:
            self._kill_children()
        self._say("stopped")
        return self.status

    def _on_signal(self, number: int, frame: Any) -> None:
        self.signals += 1
        if self.signals > 1:  # who asks twice does not want to wait
            self.status = 128 + number
            self._kill_children()

    def _decide(self) -> None:
        if self.signals and not self.stop_by:
            self._stop("stopping")
        if not self.stop_by:
            for child in self.children:
                if not child.process and time.monotonic() >= child.start_at and all(need.port for need in child.needs):
                    self._start(child)
        elif time.monotonic() > self.stop_by:
            self._kill_children()
        else:
            self._end_children()

    def _take_event(self) -> None:
        try:
            child, output, status = self.events.get(timeout=TICK)
        except queue.Empty:
            return
        if status is not None:
            self._notice_end(child, status)
            return
        self._show(child.name, output)
        if not child.url and (match := LISTENING.search(output)):
            self._notice_listening(child, match[1].decode(), int(match[2]))

    def _notice_listening(self, child: Child, url: str, port: int) -> None:
        child.url, child.port = url, port
        if child is self.gateways[0]:
            for other in self.gateways:
                other.port = port
        if all(child.url for child in self.children) and not self.was_ready:
            self.was_ready = True
            self._say(f"ready in {time.monotonic() - self.began_at:.2f} s: {self.gateways[0].url} (Ctrl-C ends it)")

    def _notice_end(self, child: Child, status: int) -> None:
        child.process = None
        if self.stop_by:
            return
        ended = f"{child.name} ended with exit status {status}" if status >= 0 else (
            f"{child.name} was killed by signal {-status} (exit status {128 - status})")
        if not child.url:
            self.status = 2 if status == 2 else 1  # a bad setting is one of ours, handed on
            self._stop(f"{ended} before it listened; stopping")
        else:
            child.start_at = time.monotonic() + RESTART_WAIT
            self._say(f"{ended}; starting it again")

    # --- the life of a child

    def _start(self, child: Child) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        for service in self.services:
            environment.setdefault(f"MICROSHOP_{service.name.upper()}_URL", f"http://{SERVICE_HOST}:{service.port}")
        if child in self.services:
            environment.pop("MICROSHOP_TOKEN", None)  # the gateway's alone
        child.process = subprocess.Popen(
            child.command(), env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True)  # else a Ctrl-C would reach it past us
        self._bind_to_core(child, child.process.pid)
        threading.Thread(target=self._read, args=(child, child.process), daemon=True).start()

    def _bind_to_core(self, child: Child, pid: int) -> None:
        """Keep a child's threads on one core, where the system lets us choose.

        The interpreter's lock lets one of them run at a time anyway. On several cores each change of turn is
        an interrupt from one to another, and a busy service answers less than half of what it answers on one.
        """
        if hasattr(os, "sched_setaffinity"):
            cores, group = sorted(os.sched_getaffinity(0)), self.gateways
            if child in self.services:
                cores, group = cores[len(self.gateways):], self.services
            if cores:  # the gateways may have left none
                os.sched_setaffinity(pid, {cores[group.index(child) % len(cores)]})

    def _read(self, child: Child, process: subprocess.Popen) -> None:
        """Put what a child prints into the queue, in whole lines, and then its end."""
        rest = b""
        with process:  # which at its end closes the pipes and waits
            while chunk := os.read(process.stdout.fileno(), 2**16):  # type: ignore[union-attr]
                lines, newline, rest = (rest + chunk).rpartition(b"\n")
                if len(rest) > MAX_LINE:
                    lines, newline, rest = lines + newline + rest, b"\n", b""
                if newline:
                    self.events.put(Event(child, lines))
            if rest:
                self.events.put(Event(child, rest))
        self.events.put(Event(child, status=process.returncode))

    def _stop(self, why: str) -> None:
        self._say(why)
        self.stop_by = time.monotonic() + KILL_WAIT

    def _end_children(self) -> None:
        """Tell the gateways to end; and when they have, the services, which their last requests needed."""
        for group in (self.gateways, self.services):
            for child in group:
                if child.process and not child.told_to_end:
                    child.told_to_end = True
                    child.process.terminate()
            if any(child.process for child in group) and time.monotonic() < self.stop_by - SERVICE_WAIT:
                return

    def _kill_children(self) -> None:
        for child in self.children:
            if child.process:
                child.process.kill()

    # --- what a person sees

    def _say(self, text: str) -> None:
        self._show("run_all", text.encode())

    def _show(self, name: str, lines: bytes) -> None:
        prefix = f"{name:<8} | "
        if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
            prefix = f"\33[{COLOURS.get(name, 36)}m{prefix}\33[0m"
        try:
            sys.stdout.buffer.write(b"".join([prefix.encode() + line + b"\n" for line in lines.split(b"\n")]))
            sys.stdout.flush()
        except OSError:  # nobody can read us any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.signals = max(self.signals, 1)


def try_port(child: Child) -> None:
    """Listen for a moment where a child will. Exits with status 1 if that fails: before any child is started."""
    family = socket.AF_INET6 if ":" in child.host else socket.AF_INET
    try:
        socket.create_server((child.host, child.port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            sys.exit(f"run_all: port {child.port}, which {child.name} needs on {child.host}, is already in use; "
                     "stop what holds it, or choose another --port")
        sys.exit(f"run_all: {child.name} cannot listen on port {child.port} of {child.host}: {error.strerror}")


def main() -> None:
    """Read the settings, then run the shop; exit with its status."""
    settings = config.read("microshop.run_all", OPTIONS, check)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it was closed
    with contextlib.ExitStack() as stack:
        if settings.fresh:
            settings.data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="microshop-")))
        services, gateways = plan_children(settings)
        for child in [gateways[0], *services]:
            try_port(child)
        status = Supervisor(services, gateways).run()
    sys.exit(status)


def check(settings: Namespace) -> None:
    """Raise ValueError for what is wrong only here: with the numbers together, or with this system."""
    if settings.port > 65532:
        raise ValueError(f"--port: {settings.port} leaves no room for the services' three above it")
    if settings.workers > 1 and not hasattr(socket, "SO_REUSEPORT"):
        raise ValueError("--workers: this system cannot share a port among processes (SO_REUSEPORT)")


if __name__ == "__main__":
    main()
