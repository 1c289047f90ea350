"""A child: a module that serves on a listening socket, in one process after another.

RestartPolicy decides when to start a process, when to kill it, and when to give the child up.
Process is one process of the operating system. Child combines the two, and reports in a sentence
for the log what has happened.

A process inherits two sockets. One is the listening socket. It stays open in the supervisor, so
clients wait in its queue while a process is replaced. Through the other, the process sends
heartbeats, and the supervisor tells a process that another takes its place. When the supervisor's
side of it is closed, the process stops. So no process outlives the supervisor, not even when the
supervisor is killed.

Law: this module does not know what a child serves.
"""
import contextlib
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from microshop.chassis.surroundings import hangup_blocked

DRAIN_TIME = 1.0   # seconds that the output of an ended process may stay open
MAX_LINE = 2**20   # bytes of a line that are shown without waiting for its end
MAX_UNSHOWN = 4    # blocks of output that may wait to be shown; beyond that, the process waits
LAST_LINES = 5     # lines that are shown again when a child is given up

BAD_SETTING = 2    # the exit status for a bad setting: starting again would not help
# What a process prints when it is ready: no line of its log begins without a time.
LISTENING = re.compile(rb"^[^:\n]+ at (http://\S+)$", re.M)


class RestartPolicy:
    """Decides when to start, to kill and to give up a child (exponential backoff with jitter).

    down      no process runs. One is started after a pause, which doubles each time a process
              ends; it is short again once a process has been up for HEALTHY_TIME
    starting  a process runs, but is not ready
    up        the process is ready
    dying     the process has been killed, but has not ended yet

    A process is killed after HANG_TIME without a heartbeat. A child that has never been ready is
    given up after FAILED_STARTS in a row, or after one that is final. Once it has been ready, it is
    never given up: what keeps it from starting now may go away. A child that `is_optional` is never
    given up either, since the others work without it.
    """

    FIRST_PAUSE, LAST_PAUSE = 0.1, 10.0  # seconds: first 0.1 to 0.2, then 0.2 to 0.4, ..., 5 to 10
    HEALTHY_TIME = 10.0                  # seconds
    HANG_TIME = 10.0                     # seconds
    FAILED_STARTS = 5

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[float, float], float] = random.uniform,
        *,
        is_optional: bool = False,
    ):
        self._clock, self._jitter = clock, jitter
        self.is_optional = is_optional
        self.state = "down"
        self.pause = 0.0          # seconds to stay down
        self.has_been_ready = False
        self.failed_starts = 0    # in a row; ignored once it has been ready
        self.is_final = False     # another start would fail too
        self._since = clock()     # when the present state began
        self._heartbeat_at = 0.0  # when the last heartbeat came
        self._longest = self.FIRST_PAUSE  # the longest that the last pause could be, in seconds

    def next_action(self) -> str:
        """Return what to do now: "start", "kill", "give up", or "" for nothing."""
        now = self._clock()
        if self.state == "down":
            has_failed = self.is_final or self.failed_starts >= self.FAILED_STARTS
            if has_failed and not (self.has_been_ready or self.is_optional):
                return "give up"
            return "start" if now >= self._since + self.pause else ""
        is_silent = now > self._heartbeat_at + self.HANG_TIME
        return "kill" if is_silent and self.state != "dying" else ""

    def note_start(self) -> None:
        self._enter("starting")

    def note_ready(self) -> None:
        self._enter("up")
        self.has_been_ready = True

    def note_heartbeat(self) -> None:
        self._heartbeat_at = self._clock()

    def note_kill(self) -> None:
        if self.state == "starting":
            self.failed_starts += 1
        self._enter("dying")

    def note_end(self, is_final: bool = False) -> None:
        """Record that the process has ended.

        `is_final` (another start would fail too) counts only if it was still starting.
        """
        if self.state == "starting":
            self.failed_starts += 1
            self.is_final = is_final
        self._enter("down")
        self._longest = min(self._longest * 2, self.LAST_PAUSE)
        self.pause = self._jitter(self._longest / 2, self._longest)

    def _enter(self, state: str) -> None:
        if self.state == "up" and self._heartbeat_at - self._since >= self.HEALTHY_TIME:
            self._longest = self.FIRST_PAUSE
        self.state, self._since = state, self._clock()
        self._heartbeat_at = self._since


class Process:
    """One process of a child.

    It has a session of its own, so that a Ctrl-C at the terminal reaches only the supervisor.
    """

    def __init__(self, child: "Child"):
        self.unshown = threading.Semaphore(MAX_UNSHOWN)  # a block holds one until it is shown
        self.is_ending = False
        self.kill_at = math.inf         # when it must have ended (time.monotonic)
        self.output_ends_by = math.inf  # when its output must have ended
        host, port, *_ = child.listener.getsockname()
        self._heartbeats, theirs = socket.socketpair()
        self._heartbeats.setblocking(False)
        with theirs, hangup_blocked():  # only the supervisor obeys a SIGHUP
            sockets = [child.listener.fileno(), theirs.fileno()]
            supervised = ",".join(map(str, [*sockets, child.starts]))
            self.popen = subprocess.Popen(
                [sys.executable, "-m", child.module, "--supervised", supervised,
                 "--host", host, "--port", str(port), *child.flags],
                env={**child.environment, "PYTHONUNBUFFERED": "1"},
                pass_fds=sockets, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if child.core is not None:
            with contextlib.suppress(OSError):  # the system may not allow it
                os.sched_setaffinity(self.popen.pid, {child.core})

    def has_sent_heartbeat(self) -> bool:
        """Return whether a heartbeat has come since the last call."""
        try:
            return bool(self._heartbeats.recv(4096))
        except OSError:
            return False

    def end(self, kill_at: float) -> None:
        """Ask the process to end. The supervisor kills it at `kill_at`."""
        self.kill_at = min(self.kill_at, kill_at)
        if not self.is_ending:
            self.is_ending = True
            self.popen.terminate()

    def replace(self, kill_at: float) -> None:
        """Tell the process that another one takes its place, and then ask it to end.

        So its health checks stay good: only this process ends, not what it is part of.
        """
        with contextlib.suppress(OSError):  # it has ended already
            self._heartbeats.send(b".")
        self.end(kill_at)

    def kill(self) -> None:
        """Kill the process, and all that it has started in its process group."""
        with contextlib.suppress(OSError):
            os.killpg(self.popen.pid, signal.SIGKILL)

    def kill_if_late(self, now: float) -> bool:
        """Kill the process if it still runs after its `kill_at`; return whether it did."""
        if self.popen.poll() is not None or now <= self.kill_at:
            return False
        self.kill()
        self.kill_at = now + DRAIN_TIME  # the kill needs a moment
        return True

    def kill_rest(self, now: float) -> bool:
        """Kill what the process has started, if it has ended itself.

        Return whether its output, which one of those may hold open, is open DRAIN_TIME after that.
        """
        if self.popen.poll() is None:
            return False
        self.kill()
        self.output_ends_by = min(self.output_ends_by, now + DRAIN_TIME)
        return now > self.output_ends_by

    def close(self) -> None:
        self._heartbeats.close()

    def read_output(self) -> Iterator[bytes]:
        """Yield its output in blocks of whole lines, then wait until the process has ended.

        A line of more than MAX_LINE bytes comes in pieces.
        """
        rest = b""
        with self.popen as popen:
            while chunk := os.read(popen.stdout.fileno(), 2**16):  # type: ignore[union-attr]
                lines, newline, rest = (rest + chunk).rpartition(b"\n")
                if newline:
                    yield lines
                if len(rest) > MAX_LINE:
                    yield rest
                    rest = b""
            if rest:
                yield rest


class Event(NamedTuple):
    """A process of a child has printed `output`, or has ended with `status`."""

    child: "Child"
    process: Process
    output: bytes = b""
    status: int | None = None


class Child:
    """A module that serves on a listening socket, in one process after another.

    `flags` and `environment` are those of its processes. The other children need no child that
    `is_optional`. Most methods return a sentence for the log, or "" if there is nothing to tell.
    """

    def __init__(
        self,
        name: str,
        module: str,
        listener: socket.socket,
        flags: Sequence[str],
        environment: dict[str, str],
        *,
        is_optional: bool = False,
    ):
        self.name, self.module, self.listener = name, module, listener
        self.flags, self.environment = flags, environment
        self.core: int | None = None         # the CPU core to run on (supervisor.assign_cores)
        self.policy = RestartPolicy(is_optional=is_optional)
        self.starts = 0                      # processes that were started so far
        self.current: Process | None = None  # the newest
        self.former: Process | None = None   # the one that it replaces, until that has ended
        self.url = ""                        # as the newest has printed it
        self.last_lines: deque[bytes] = deque(maxlen=LAST_LINES)

    def processes(self) -> list[Process]:
        return [process for process in (self.current, self.former) if process]

    def start(self, emit: Callable[[Event], None]) -> str:
        """Start a process and emit its events. A process that runs already becomes `former`."""
        self.last_lines.clear()
        try:
            process = Process(self)
        except OSError as error:
            return self._note_failed_start(f"could not be started: {error.strerror}")
        self.starts += 1
        self.former, self.current = self.current or self.former, process
        self.policy.note_start()
        try:
            threading.Thread(target=self._read, args=(process, emit), daemon=True).start()
        except RuntimeError:  # the system has no thread left to read its output
            process.kill()
        return f"started {self.name} (pid {process.popen.pid})"

    def look_for_heartbeat(self) -> None:
        if self.current and self.current.has_sent_heartbeat():
            self.policy.note_heartbeat()

    def kill(self) -> str:
        """Kill the current process, as the policy demands."""
        self.policy.note_kill()
        if self.current:
            self.current.kill()
        return f"{self.name} has sent no heartbeat for {self.policy.HANG_TIME:g} s; killing it"

    def note_output(self, process: Process, output: bytes) -> bool:
        """Record what a process has printed. Return True if that makes the child ready."""
        self.last_lines.extend(output.rsplit(b"\n", LAST_LINES)[-LAST_LINES:])
        match = LISTENING.search(output)
        if not match or process is not self.current or self.policy.state != "starting":
            return False
        self.url = match[1].decode()
        self.policy.note_ready()
        return True

    def note_end(self, process: Process, status: int) -> str:
        """Record that a process has ended. `status` is its Popen.returncode."""
        process.kill()  # it has ended, but processes that it started may still run
        process.close()
        if process is self.former:
            self.former = None
            return ""
        how = describe_end(status)
        if self.policy.state == "starting":
            how += " before it was ready"
        self.current = None
        if self.former and not self.former.is_ending:  # its replacement has failed
            self.current, self.former = self.former, None
            self.policy.note_ready()
            return (f"{self.name} {how}; the old process keeps running, and no further process is "
                    "replaced")
        self.policy.note_end(is_final=status == BAD_SETTING)
        if self.policy.next_action() == "give up":
            return ""
        return f"{self.name} {how}; starting it again in {self.policy.pause:.1f} s"

    def _note_failed_start(self, problem: str) -> str:
        self.last_lines.append(problem.encode())
        if self.current:
            return f"a new process of {self.name} {problem}; the old one keeps running"
        self.policy.note_start()  # for the policy, it started and failed at once
        self.policy.note_end()
        return f"{self.name} {problem}; trying again in {self.policy.pause:.1f} s"

    def _read(self, process: Process, emit: Callable[[Event], None]) -> None:
        for lines in process.read_output():
            process.unshown.acquire()
            emit(Event(self, process, lines))
        emit(Event(self, process, status=process.popen.returncode))


def describe_end(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status}"
    return f"was killed by signal {-status} (exit status {128 - status})"
