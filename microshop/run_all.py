"""The supervisor: starts the services and the gateway, shows what they print, and ends them all.

It opens every port itself and hands the listening sockets on. So a port is never closed while the shop runs: who
connects while a child is started again, or replaced by a new one, waits in the socket's queue.

Threads only read what children print; it becomes an Event in one queue, and one loop decides, by policies.RestartPolicy.
Each child sends signs of life through a socket of its own, its lifeline, and ends when nobody holds the other end:
so none outlives the supervisor, even one that is killed.
"""
import contextlib
import errno
import math
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
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from microshop import SERVICES
from microshop.chassis import config
from microshop.chassis.supervisor import RestartPolicy

END_SHARE = 0.7      # of the grace period, after which a child ends by itself, whatever is in flight
KILL_SHARE = 0.75    # of the grace period, after which a gateway is killed that still runs; then the services end
TICK = 0.05          # seconds between looks at the clock, the signals and the lifelines
MAX_LINE = 2**20     # bytes of a line that are shown without waiting for its end
AHEAD = 4            # outputs of one child that may wait to be shown: who prints more waits, but nobody else
LAST_WORDS = 1.0     # seconds for output to be read and shown, when who wrote it has ended
LAST_LINES = 5       # that are shown again where a child is given up
SERVICE_HOST = "127.0.0.1"

LISTENING = re.compile(rb"listening at (http://\S+)$", re.M)
COLOURS = {"users": 32, "products": 33, "orders": 35}  # of a terminal; the others are cyan, 36

OPTIONS = [
    config.Setting("host", config.host, "127.0.0.1", f"address of the gateway; the services stay on {SERVICE_HOST}"),
    config.Setting("port", config.port, "3000",
                   "port of the gateway, the services have the next three; 0 picks free ones"),
    config.DATA,
    config.Setting("fresh", config.switch, "",
                   "use a temporary data folder, whatever --data says; it goes at the end"),
    config.Setting("workers", config.count, "1", "gateway processes that share the one port"),
    *config.FOR_GATEWAY,
    *config.SHARED,
    config.QUIET,
]


class Child:
    """A part of the shop: a module that serves on a listening socket, in one process after another."""

    def __init__(self, name: str, module: str, listener: socket.socket, flags: list[str]):
        self.name, self.module, self.listener, self.flags = name, module, listener, flags
        self.life = RestartPolicy()
        self.current: Process | None = None  # the newest
        self.former: Process | None = None   # the one that it replaces, until that has ended
        self.url = ""                        # as the listening line tells
        self.last_lines: deque[bytes] = deque(maxlen=LAST_LINES)

    def processes(self) -> "list[Process]":
        return [process for process in (self.current, self.former) if process]


class Process:
    """A process of a child. It has a session of its own, so that a Ctrl-C at the terminal reaches us alone."""

    def __init__(self, child: Child, environment: dict[str, str]):
        self._heartbeat, theirs = socket.socketpair()
        self._heartbeat.setblocking(False)
        self.unshown = threading.Semaphore(AHEAD)  # taken for each output until it is shown
        self.is_ending = False
        self.kill_at = math.inf   # when it must have ended
        self.heard_by = math.inf  # when its output must have ended
        handed_on = (child.listener, theirs)
        for end in handed_on:
            end.set_inheritable(True)
        host, port, *_ = child.listener.getsockname()
        self.popen = subprocess.Popen(
            [sys.executable, "-m", f"microshop.{child.module}",
             "--supervised", ",".join(str(end.fileno()) for end in handed_on),
             "--host", host, "--port", str(port), *child.flags],
            env=environment, close_fds=False,  # nothing else is inheritable, and Windows knows no other way
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        for end in handed_on:
            end.set_inheritable(False)
        theirs.close()

    def shows_heartbeat(self) -> bool:
        """Tell whether a sign of life has come since the last look."""
        try:
            return bool(self._heartbeat.recv(4096))
        except OSError:
            return False

    def end(self, kill_at: float) -> None:
        """Tell it to end, once, and by when (of time.monotonic)."""
        self.kill_at = min(self.kill_at, kill_at)
        if not self.is_ending:
            self.is_ending = True
            self.popen.terminate()

    def kill(self) -> None:
        """Kill it, and all that it has started: its process group."""
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self.popen.pid, signal.SIGKILL)
            else:
                self.popen.kill()

    def close(self) -> None:
        self._heartbeat.close()


class Event(NamedTuple):
    """A process wrote `output`, whole lines, or ended with `status`."""

    child: Child
    process: Process
    output: bytes = b""
    status: int | None = None


def open_listener(name: str, host: str, port: int) -> socket.socket:
    """Return a socket that listens for a child. Exits with status 1 if there can be none: before any is started."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if os.name != "nt":  # there it would let two processes have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            sys.exit(f"run_all: port {port}, which {name} needs on {host}, is already in use; "
                     "stop what holds it, or choose another --port")
        sys.exit(f"run_all: {name} cannot listen on port {port} of {host}: {error.strerror}")
    return listener


def plan_children(settings: Namespace) -> tuple[list[Child], list[Child]]:
    """Return the services and the gateways that the settings ask for."""
    port, flags = settings.port, [f"--grace={settings.grace * END_SHARE:f}", *["--quiet"] * settings.quiet]
    flags += config.as_flags(settings, [setting for setting in config.SHARED if setting.name != "grace"])
    listener = open_listener("gateway", settings.host, port)
    services = [
        Child(name, name, open_listener(name, SERVICE_HOST, port and port + n), [f"--data={settings.data}", *flags])
        for n, name in enumerate(SERVICES, start=1)]
    flags += config.as_flags(settings, config.FOR_GATEWAY)
    gateways = [Child(f"gateway{n}" if n > 1 else "gateway", "gateway", listener, flags)
                for n in range(1, settings.workers + 1)]
    return services, gateways


class Supervisor:
    """Runs the shop until a signal comes or a child is given up."""

    def __init__(self, services: list[Child], gateways: list[Child], grace: float):
        self.services, self.gateways, self.children = services, gateways, services + gateways
        self.grace = grace
        self.events: queue.Queue[Event] = queue.Queue()  # a SimpleQueue's get() may miss its timeout at a signal
        self.to_show: queue.Queue[tuple[str, bytes, Process | None] | None] = queue.Queue()
        self.signals: list[int] = []       # that ask for the end
        self.renewal_asked = False         # by SIGHUP
        self.to_renew: deque[Child] = deque()
        self.terminals = [stream for stream in (sys.stdin, sys.stdout) if stream and stream.isatty()]
        self.status = 0
        self.stop_by = math.inf            # when what still runs is killed
        self.began_at = self.looked_at = time.monotonic()
        self.was_ready = False

    def run(self) -> int:
        """Start all, serve, stop all; return the exit status."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._on_signal)
        printer = threading.Thread(target=self._print, daemon=True)
        printer.start()
        while not self.is_stopping or self._running():
            self._look()
            self._take_event()
        self._say("stopped")
        self.to_show.put(None)
        printer.join(LAST_WORDS)
        return self.status

    @property
    def is_stopping(self) -> bool:
        return self.stop_by < math.inf

    def _on_signal(self, number: int, frame: Any) -> None:
        has_lost_terminal = not all(stream.isatty() for stream in self.terminals)  # SIGHUP may tell that, too
        if number not in (signal.SIGINT, signal.SIGTERM) and not has_lost_terminal:
            self.renewal_asked = True
            return
        self.signals.append(number)
        if len(self.signals) > 1:  # who asks twice does not want to wait
            self.status = 128 + number
            for process in self._running():
                process.kill()

    def _running(self) -> list[Process]:
        return [process for child in self.children for process in child.processes()]

    # --- deciding

    def _look(self) -> None:
        """See how the children are, let each life know, and do what those then ask for."""
        now, before = time.monotonic(), self.looked_at
        if now < before + TICK:
            return
        self.looked_at = now
        self._reap_orphans()
        for child in self.children:
            if child.current and child.current.shows_heartbeat():
                child.life.note_heartbeat()
            if now > before + 1:  # it is we who stood still, and nobody can be blamed
                child.life.note_heartbeat()
            for process in child.processes():
                if process.popen.poll() is not None:  # but somebody that it has started may keep its output open
                    process.kill()
                    process.heard_by = min(process.heard_by, now + LAST_WORDS)
                    if now > process.heard_by:
                        self._notice_end(child, process, process.popen.returncode)
                elif now > process.kill_at:
                    process.kill_at = now + LAST_WORDS
                    self._say(f"{child.name} did not end in time; killing it")
                    process.kill()
        if self.signals and not self.is_stopping:
            self._stop(f"stopping, which may take {self.grace:g} s (another signal ends it at once)")
        if self.is_stopping:
            self._end_children()
        else:
            for child in self.children:
                self._obey(child)
            self._renew()

    def _obey(self, child: Child) -> None:
        """Do what a child's life demands."""
        life, order = child.life, child.life.order()
        if order == "start":
            self._start(child)
        elif order == "kill" and child.current:
            self._say(f"{child.name} was not ready in {life.START_TIME:.0f} s; killing it" if life.state == "starting"
                      else f"{child.name} has shown no sign of life for {life.HANG_TIME:.0f} s; killing it")
            life.note_kill()
            child.current.kill()
        elif order == "give up" and not self.is_stopping:
            self.status = 2 if life.is_final else 1  # a bad setting is one of ours, handed on
            if life.is_final:
                self._stop(f"{child.name} cannot start like this; stopping")
                return
            self._stop(f"{child.name} failed to start {life.failed_starts} times in a row: stopping. It said last:")
            self._show(child.name, b"\n".join(child.last_lines) or b"(nothing)")

    def _renew(self) -> None:
        """Replace the process of one child after another, each when the new one before it listens."""
        if self.renewal_asked and not self.to_renew and self.was_ready:
            self.renewal_asked = False
            self.to_renew.extend(self.children)
            self._say("replacing every process by a new one")
        if self.to_renew and self.to_renew[0].life.state == "up" and not self.to_renew[0].former:
            self._start(self.to_renew[0])

    def _end_children(self) -> None:
        """Tell the gateways to end; and when they have, the services, which their last requests needed."""
        for group, share in ((self.gateways, KILL_SHARE), (self.services, 1)):
            for child in group:
                child.listener.close()
                for process in child.processes():
                    process.end(self.stop_by - (1 - share) * self.grace)
            if any(child.processes() for child in group):
                return

    def _stop(self, why: str) -> None:
        self._say(why)
        self.stop_by = time.monotonic() + self.grace

    # --- what happens

    def _take_event(self) -> None:
        try:
            child, process, output, status = self.events.get(timeout=TICK)
        except queue.Empty:
            return
        if status is not None:
            if process in child.processes():  # else nobody waited for the end of its output
                self._notice_end(child, process, status)
            return
        self._show(child.name, output, process)
        child.last_lines.extend(output.rsplit(b"\n", LAST_LINES)[-LAST_LINES:])
        if process is child.current and child.life.state == "starting" and (match := LISTENING.search(output)):
            child.url = match[1].decode()
            self._notice_listening(child)

    def _notice_listening(self, child: Child) -> None:
        child.life.note_ready()
        if child.former:
            child.former.end(time.monotonic() + self.grace)
        if self.to_renew and self.to_renew[0] is child:
            self.to_renew.popleft()
            if not self.to_renew:
                self._say("every process is a new one")
        if all(child.life.state == "up" for child in self.children) and not self.was_ready:
            self.was_ready = True
            self._say(f"ready in {time.monotonic() - self.began_at:.2f} s: {self.gateways[0].url} (Ctrl-C ends it)")

    def _notice_end(self, child: Child, process: Process, status: int) -> None:
        process.kill()  # what it has started
        process.close()
        if process is child.former:
            child.former = None
            return
        child.current = None
        if self.is_stopping:
            return
        ended = f"{child.name} ended with exit status {status}" if status >= 0 else (
            f"{child.name} was killed by signal {-status} (exit status {128 - status})")
        if child.life.state == "starting":
            ended += " before it listened"
        if child.former and not child.former.is_ending:  # what was to replace it has failed
            child.current, child.former = child.former, None
            child.life.note_ready()
            self.to_renew.clear()
            self._say(f"{ended}; the one that it was to replace goes on")
            return
        child.life.note_end(is_final=status == 2)
        if child.life.order() != "give up":
            self._say(f"{ended}; starting it again in {child.life.pause:.1f} s")

    def _reap_orphans(self) -> None:
        """As PID 1 of a container, collect those whose parents have ended; nobody else would."""
        with contextlib.suppress(ChildProcessError):
            while os.getpid() == 1 and (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
                if ended.si_pid in [process.popen.pid for process in self._running()]:
                    return  # that is for Popen
                os.waitpid(ended.si_pid, 0)

    # --- the start of a process

    def _start(self, child: Child) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        for service in self.services:
            url = "http://{}:{}".format(*service.listener.getsockname())
            environment.setdefault(f"MICROSHOP_{service.name.upper()}_URL", url)
        if child in self.services:
            environment.pop("MICROSHOP_TOKEN", None)  # the gateway's alone
        child.last_lines.clear()
        try:
            process = Process(child, environment)
        except OSError as error:
            child.last_lines.append(f"cannot start it: {error.strerror}".encode())
            if not child.current:  # else that one goes on
                child.life.note_start()
                child.life.note_end()
            self.to_renew.clear()
            self._say(f"{child.name} cannot be started now: {error.strerror}")
            return
        child.former, child.current = child.current or child.former, process
        child.life.note_start()
        self._bind_to_core(child, process.popen.pid)
        threading.Thread(target=self._read, args=(child, process), daemon=True).start()

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

    def _read(self, child: Child, process: Process) -> None:
        """Put what a process prints into the queue, in whole lines, and then its end."""
        rest = b""
        with process.popen as popen:  # which at its end closes the pipe and waits
            while chunk := os.read(popen.stdout.fileno(), 2**16):  # type: ignore[union-attr]
                lines, newline, rest = (rest + chunk).rpartition(b"\n")
                if len(rest) > MAX_LINE:
                    lines, newline, rest = lines + newline + rest, b"\n", b""
                if newline:
                    process.unshown.acquire()
                    self.events.put(Event(child, process, lines))
            if rest:
                self.events.put(Event(child, process, rest))
        self.events.put(Event(child, process, status=popen.returncode))

    # --- what a person sees

    def _say(self, text: str) -> None:
        self._show("run_all", text.encode())

    def _show(self, name: str, lines: bytes, process: Process | None = None) -> None:
        self.to_show.put((name, lines, process))

    def _print(self) -> None:
        """Print what is to be shown, in a thread of its own: who does not read it must not keep us from deciding."""
        while item := self.to_show.get():
            name, lines, process = item
            self._print_lines(name, lines)
            if process:
                process.unshown.release()

    def _print_lines(self, name: str, lines: bytes) -> None:
        prefix = f"{name:<8} | "
        if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
            prefix = f"\33[{COLOURS.get(name, 36)}m{prefix}\33[0m"
        rest = b"".join([prefix.encode() + line + b"\n" for line in lines.split(b"\n")])
        try:
            while rest:
                rest = rest[os.write(sys.stdout.fileno(), rest):]
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a full disk, say, which may pass
                return
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody can read us any more
            self.signals = self.signals or [signal.SIGTERM]


def main() -> None:
    """Read the settings, then run the shop; exit with its status."""
    settings = config.read("microshop.run_all", OPTIONS, check)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it was closed
    with contextlib.ExitStack() as stack:
        if settings.fresh:
            settings.data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="microshop-")))
        status = Supervisor(*plan_children(settings), settings.grace).run()
    sys.exit(status)


def check(settings: Namespace) -> None:
    """Raise ValueError for what is wrong with the settings only together."""
    if settings.port > 65535 - len(SERVICES):
        raise ValueError(f"--port: {settings.port} leaves no room for the services' three above it")


if __name__ == "__main__":
    main()
