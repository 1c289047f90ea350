"""The supervisor: starts the services and the gateway, shows what they print, and ends them all.

Threads only read the children's pipes; what they read becomes an Event in one queue, and one loop decides.
A child that dies is started again. Every child watches a pipe that only the supervisor holds, its standard
input, and ends with it: so none outlives the supervisor, even one that is killed.
"""
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

KILL_WAIT = 5.0      # seconds from the wish to end until what still runs is killed
RESTART_WAIT = 0.5   # seconds before a child that died is started again
TICK = 0.1           # seconds between looks at the clock and the signals
MAX_LINE = 2**20     # bytes of a line that are shown without waiting for its end
SERVICE_HOST = "127.0.0.1"

LISTENING = re.compile(rb"listening at (http://\S+:([0-9]+))$", re.M)
COLOURS = {"users": 32, "products": 33, "orders": 35}  # of a terminal; the others are cyan

OPTIONS = [
    config.Setting("host", config.host, "127.0.0.1", f"address for the gateway; the services keep to {SERVICE_HOST}"),
    config.Setting("port", config.port, "3000", "port of the gateway, the services take the next three; 0 takes free ones"),
    config.DATA,
    config.Setting("fresh", config.switch, "", "keep the data in a temporary folder that goes at the end"),
    config.Setting("workers", config.count, "1", "gateway processes that share the one port"),
    config.QUIET,
]


class Child:
    """A process of the shop. Its port may be 0 until its listening line has told the real one."""

    def __init__(self, name: str, module: str, host: str, port: int, needs: "list[Child]"):
        self.name, self.module, self.host, self.port, self.needs = name, module, host, port, needs
        self.process: subprocess.Popen | None = None  # while it runs
        self.url = ""           # once it listens, as it tells
        self.start_at = 0.0     # not before this time
        self.told_to_end = False


class Event(NamedTuple):
    """A child wrote `output`, whole lines; or, without any, it ended with `status`."""

    child: Child
    output: bytes
    status: int = 0


class Supervisor:
    """Runs the shop until a signal or until it cannot be run."""

    def __init__(self, settings: Namespace):
        self.settings = settings
        first = settings.port
        self.services = [Child(name, name, SERVICE_HOST, first and first + n, [])
                         for n, name in enumerate(("users", "products", "orders"), start=1)]
        self.gateways = [Child("gateway", "gateway", settings.host, first, self.services)]
        for n in range(2, settings.workers + 1):  # they need the port that the first one took
            self.gateways.append(Child(f"gateway{n}", "gateway", settings.host, first, self.services + self.gateways[:1]))
        self.children = self.services + self.gateways
        self.events: queue.Queue[Event] = queue.Queue(maxsize=1000)  # a child that prints faster than we waits
        self.signals = 0
        self.status = 0
        self.stop_by = 0.0  # when what still runs is killed; 0 as long as the shop is to run
        self.began = time.monotonic()

    def run(self) -> int:
        """Start all, serve, stop all; return the exit status."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        try:
            while not self.stop_by or any(child.process for child in self.children):
                self._turn()
        except KeyboardInterrupt:
            self.status = 128 + signal.SIGINT
        finally:
            for child in self.children:
                if child.process:
                    child.process.kill()
                    child.process.wait()
        return self.status

    def _turn(self) -> None:
        if self.signals and not self.stop_by:
            self._say("stopping")
            self._stop()
        if self.stop_by:
            self._end_children()
        else:
            self._start_children()
        try:
            event = self.events.get(timeout=TICK)
        except queue.Empty:
            return
        if event.output:
            self._show(event.child.name, event.output)
            self._notice_listening(event.child, event.output)
        else:
            self._notice_end(event.child, event.status)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.signals += 1
        if self.signals > 1:
            raise KeyboardInterrupt  # who asks twice does not want to wait

    # --- starting

    def _start_children(self) -> None:
        for child in self.children:
            if not child.process and time.monotonic() >= child.start_at and all(need.port for need in child.needs):
                self._start(child)

    def _start(self, child: Child) -> None:
        flags = ["--host", child.host, "--port", str(child.port), "--supervised"]
        if child in self.services:
            flags += ["--data", str(self.settings.data)]
        elif self.settings.workers > 1:
            flags += ["--reuse-port"]
        if self.settings.quiet:
            flags += ["--quiet"]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        for service in self.services:
            environment.setdefault(f"MICROSHOP_{service.name.upper()}_URL", f"http://{SERVICE_HOST}:{service.port}")
        child.process = subprocess.Popen(
            [sys.executable, "-m", f"microshop.{child.module}", *flags], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True)  # else a Ctrl-C would reach it past us
        self._bind_to_core(child)
        threading.Thread(target=self._read, args=(child, child.process), daemon=True).start()

    def _bind_to_core(self, child: Child) -> None:
        """Keep a child's threads on one core, where the system can.

        They take turns at the interpreter's lock, so they never need two cores; but on two, each turn is an
        interrupt from one to the other, and 16 connections get half as many answers.
        """
        if not hasattr(os, "sched_setaffinity"):
            return
        cores = sorted(os.sched_getaffinity(0))
        if child in self.services:  # beside the gateways as long as there is room
            cores = cores[len(self.gateways):] or cores
        group = self.services if child in self.services else self.gateways
        os.sched_setaffinity(child.process.pid, {cores[group.index(child) % len(cores)]})

    def _read(self, child: Child, process: subprocess.Popen) -> None:
        """Put what a child prints into the queue, in whole lines, and then its end."""
        rest = b""
        while chunk := os.read(process.stdout.fileno(), 2**16):
            lines, newline, rest = (rest + chunk).rpartition(b"\n")
            if len(rest) > MAX_LINE:
                lines, newline, rest = lines + newline + rest, b"\n", b""
            if newline:
                self.events.put(Event(child, lines))
        if rest:
            self.events.put(Event(child, rest))
        process.stdout.close()
        process.stdin.close()
        self.events.put(Event(child, b"", process.wait()))

    # --- noticing

    def _notice_listening(self, child: Child, output: bytes) -> None:
        if child.url or not (match := LISTENING.search(output)):
            return
        child.url, child.port = match[1].decode(), int(match[2])
        if all(child.url for child in self.children) and self.began:
            took, self.began = time.monotonic() - self.began, 0.0
            self._say(f"ready in {took:.2f} s: open {self.gateways[0].url} (Ctrl-C ends it)")

    def _notice_end(self, child: Child, status: int) -> None:
        child.process = None
        if self.stop_by:
            return
        ended = f"{child.name} ended with status {status if status >= 0 else 128 - status}"
        if not child.url:
            self._say(f"{ended} before it listened; stopping")
            self.status = 1
            self._stop()
        else:
            self._say(f"{ended}; starting it again")
            child.start_at = time.monotonic() + RESTART_WAIT

    # --- stopping

    def _stop(self) -> None:
        self.stop_by = time.monotonic() + KILL_WAIT

    def _end_children(self) -> None:
        """Tell the gateways to end and then, when they have, the services that their last requests need."""
        running = [child for child in self.gateways if child.process] or [child for child in self.services if child.process]
        for child in running:
            if not child.told_to_end:
                child.process.terminate()
                child.told_to_end = True
        if time.monotonic() > self.stop_by:
            for child in self.children:
                if child.process:
                    child.process.kill()

    # --- showing

    def _say(self, text: str) -> None:
        self._show("run_all", text.encode())

    def _show(self, name: str, lines: bytes) -> None:
        prefix = f"{name:<8} | "
        if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
            prefix = f"\33[{COLOURS.get(name, 36)}m{prefix}\33[0m"
        try:
            sys.stdout.buffer.write(b"".join([prefix.encode() + line + b"\n" for line in lines.split(b"\n")]))
            sys.stdout.flush()
        except BrokenPipeError:  # nobody reads any more
            self.signals = max(self.signals, 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def refuse_taken_ports(children: list[Child]) -> None:
    """Exit with status 1 where a child's port cannot be had, before any is started."""
    for child in children:
        try:
            socket.create_server((child.host, child.port), family=socket.AF_INET6 if ":" in child.host else socket.AF_INET).close()
        except OSError as error:
            sys.exit(f"run_all: {child.name} cannot have port {child.port} of {child.host}: {error.strerror} "
                     "(see --port)")


def main() -> None:
    """Read the settings and run the shop."""
    settings = config.read("microshop.run_all", OPTIONS)
    if settings.port > 65532:
        sys.exit("x")
    with tempfile.TemporaryDirectory(prefix="microshop-") as folder:
        if settings.fresh:
            settings.data = Path(folder)
        supervisor = Supervisor(settings)
        refuse_taken_ports(supervisor.services + supervisor.gateways[:1])
        status = supervisor.run()
    sys.exit(status)


if __name__ == "__main__":
    main()
