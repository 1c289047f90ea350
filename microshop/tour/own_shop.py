"""The shop of a chapter: run_all as a subprocess, on free ports and in a temporary folder.

It ends with the tour, however that ends: when nothing reads the shop's output any more, run_all
stops.
"""
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

PATIENCE = 60.0  # seconds: the bound on waits; reached only if what a chapter waits for never comes
PAUSE = 0.01     # seconds between two looks
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that end the tour


class Different(Exception):
    """Something came out differently than the chapter says."""

    def __init__(self, expected: str, came: Any):
        super().__init__(expected)
        self.expected, self.came = expected, came


def is_wanted(came: Any, wanted: Any) -> bool:
    """Return whether what came is what is wanted: a value, or a function that says yes to it."""
    return bool(wanted(came)) if callable(wanted) else came == wanted


def poll(expected: str, find: Callable[[], Any], wanted: Any) -> Any:
    """Call find() until it returns what is wanted (see is_wanted); return that.

    Raises Different if that takes longer than PATIENCE.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        came = find()
        if is_wanted(came, wanted):
            return came
        if time.monotonic() > deadline:
            raise Different(expected, came)
        time.sleep(PAUSE)


class OwnShop:
    """A shop that belongs to one chapter. `lines` are what run_all has printed so far."""

    def __init__(self, *flags: str):
        self.lines: list[str] = []
        self._paused: set[int] = set()
        self.run_all = subprocess.Popen(
            [sys.executable, "-m", "microshop.run_all", "--fresh", "--port=0", *flags],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=plain_environment(), start_new_session=True, text=True, errors="replace")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "OwnShop":
        return self

    def __exit__(self, *_: object) -> None:
        """End the shop; kill it if it does not end by itself."""
        for pid in self._paused:
            send_signal(pid, signal.SIGCONT)
        self.run_all.terminate()
        try:
            self.run_all.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.run_all.kill()
        self._reader.join(PATIENCE)

    def _read(self) -> None:
        with self.run_all as run_all:
            for line in run_all.stdout or ():
                self.lines.append(line.rstrip("\n"))

    def await_line(self, pattern: str) -> re.Match:
        """Return the last line that matches, as soon as there is one. Raises Different."""
        def find() -> re.Match | None:
            if self.run_all.poll() is not None and not self.find(pattern):
                raise Different(f"the shop runs, and prints a line like {pattern!r}",
                                "it ended; its last lines:\n" + "\n".join(self.lines[-5:]))
            return self.find(pattern)

        return poll(f"the shop prints a line like {pattern!r}", find, bool)

    def find(self, pattern: str) -> re.Match | None:
        """Return the last line that matches, or None."""
        matches = (re.search(pattern, line) for line in reversed(self.lines))
        return next(filter(None, matches), None)

    def port(self, name: str) -> int:
        """Return the port of a process, like "gateway"."""
        return int(self.await_line(rf"^{name} +\| [^:]* at http://\S+:(\d+)$")[1])

    def pid(self, name: str) -> int:
        """Return the pid of a process, or that of run_all."""
        return int(self.await_line(rf"\bstarted {name} \(pid (\d+)\)")[1])

    def folder(self) -> str:
        """Return the folder of the databases."""
        return self.await_line(r"the data is in (.+?) until the shop stops")[1]

    def signal(self, name: str, number: signal.Signals) -> int:
        """Send a signal to a process, and return its pid."""
        pid = self.pid(name)
        send_signal(pid, number)
        if number == signal.SIGSTOP:
            self._paused.add(pid)
            poll(f"{name} stops", lambda: is_stopped(pid), True)
        return pid


def plain_environment() -> dict[str, str]:
    """Return our environment without settings of a shop, and without proxies."""
    return {name: value for name, value in os.environ.items()
            if not name.startswith("MICROSHOP_") and not name.lower().endswith("_proxy")}


def send_signal(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process, if it still runs."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped, which takes a moment after SIGSTOP, or has ended."""
    try:
        found = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True)
    except FileNotFoundError:  # a system without ps: assume that the moment is over
        return True
    return found.stdout.strip()[:1] in (b"T", b"")
