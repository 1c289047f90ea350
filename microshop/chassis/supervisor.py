"""A group of child processes: started, watched, replaced one after another, and stopped.

A Child is a role, and a Process is an instance of it (child.py). Threads do nothing but read what
the processes print. Each piece of output becomes an Event in a queue, and a single loop,
Supervisor.run(), decides what to do:

  start     RestartPolicy says "start". Child.start() runs a Process, and its line "listening at
            ..." makes the child ready.
  crash     The end of a process is an Event. RestartPolicy chooses a pause, after which it says
            "start" again.
  SIGHUP    RollingRestart chooses one child after another for a second Process. Once that is
            ready, the former one is asked to end.
  Ctrl-C    Shutdown asks the last tier of children to end, then the tier before it. When no
            process is left, the loop returns.

Law: this module does not know what its children serve.
"""
import contextlib
import math
import os
import queue
import signal
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from microshop.chassis.child import BAD_SETTING, Child, Event, Process
from microshop.chassis.console import Console

TICK = 0.05        # seconds between two checks of the clock, the signals and the heartbeats
PAUSED_TIME = 1.0  # seconds; a longer gap between ticks means that we were paused (Ctrl-Z)
KILL_SHARE = 0.75  # of the grace period: when to kill a tier other than the first


class RollingRestart:
    """Chooses the child that gets a new process next: one at a time, all in turn.

    If another SIGHUP arrives during a rolling restart, a second one follows the first.
    """

    def __init__(self, children: Sequence[Child]):
        self.is_requested = False
        self._children = children
        self._waiting: deque[Child] = deque()
        self._tried: Child | None = None

    def begin(self) -> bool:
        """Begin if a restart is requested and none is under way. Return whether it has begun."""
        if not self.is_requested or self._waiting:
            return False
        self.is_requested = False
        self._waiting.extend(child for child in self._children if child.policy.state != "down")
        self._tried = None
        return True

    def next_child(self) -> Child | None:
        """Return the child that must get a new process now, or None.

        If the new process of a child has failed, end the rolling restart. A child that is down is
        skipped: its next process will be new anyway, and may take long to start.
        """
        child = self._waiting[0] if self._waiting else None
        if not child or child.policy.state not in ("up", "down") or child.former:
            return None
        if child is self._tried:
            self._waiting.clear()
            return None
        if child.policy.state == "down":
            self._waiting.popleft()
            return None
        self._tried = child
        return child

    def note_ready(self, child: Child) -> bool:
        """Record that a new process is ready. Return True if no other child is waiting for one."""
        if not self._waiting or child is not self._waiting[0]:
            return False
        self._waiting.popleft()
        return not self._waiting


class Shutdown:
    """Ends tiers of children within a grace period: the last tier first, the others in turn.

    The requests that the last tier still answers need the tiers before it.
    """

    def __init__(self, tiers: Sequence[Sequence[Child]], grace: float):
        self.grace = grace            # seconds
        self.signals: list[int] = []  # SIGINT or SIGTERM, as received so far
        self.is_unwatched = False     # the terminal was closed, or nothing reads our output
        self._tiers = tiers
        self._end_by = math.inf       # when every process must have ended (time.monotonic)

    @property
    def has_begun(self) -> bool:
        return self._end_by < math.inf

    @property
    def is_requested(self) -> bool:
        return bool(self.signals) or self.is_unwatched

    @property
    def is_urgent(self) -> bool:
        """Return whether there was a second signal, which means: stop immediately."""
        return len(self.signals) > 1

    def begin(self) -> None:
        self._end_by = time.monotonic() + self.grace

    def end_next_tier(self) -> None:
        """Ask the last tier that still runs to end."""
        for tier in reversed(self._tiers):
            share = 1.0 if tier is self._tiers[0] else KILL_SHARE
            for child in tier:
                child.listener.close()
                for process in child.processes():
                    process.end(self._end_by - (1 - share) * self.grace)
            if any(child.processes() for child in tier):
                return


class Supervisor:
    """Keeps tiers of children running until a signal comes or one of them is given up.

    A tier may need the tiers before it. The URL of the last tier's first child is shown to people.
    """

    def __init__(self, tiers: Sequence[Sequence[Child]], grace: float, console: Console):
        self.children = [child for tier in tiers for child in tier]
        self.front = tiers[-1][0]
        self.console = console
        # An optional child is the last to be replaced: if that fails, the others have been.
        self.rolling_restart = RollingRestart(
            sorted(self.children, key=lambda child: child.policy.is_optional))
        self.shutdown = Shutdown(tiers, grace)
        self.events: queue.Queue[Event] = queue.Queue()  # SimpleQueue may miss its timeout
        self.status = 0
        self.was_ready = False
        self.began_at = time.monotonic()
        self._ticked_at = -math.inf
        assign_cores(tiers)

    def run(self) -> int:
        """Start every child, keep them running, end them; return the exit status."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        self.console.say(f"started {self.console.title} (pid {os.getpid()})")
        while not self.shutdown.has_begun or self.processes():
            self._tick()
            self._take_event()
        self.console.say("stopped")
        return self.status

    def processes(self) -> list[Process]:
        return [process for child in self.children for process in child.processes()]

    def _on_signal(self, number: int, frame: Any) -> None:
        """Record a signal; the loop decides what to do about it."""
        if number != signal.SIGHUP:
            self.shutdown.signals.append(number)
        elif self.console.has_lost_terminal():  # the shell and the kernel may both send SIGHUP
            self.shutdown.is_unwatched = True
        else:
            self.rolling_restart.is_requested = True

    # --- on every tick

    def _tick(self) -> None:
        """Do what is due, at most once in a TICK."""
        now = time.monotonic()
        if now < self._ticked_at + TICK:
            return
        was_paused = now > self._ticked_at + PAUSED_TIME
        self._ticked_at = now
        if os.getpid() == 1:
            reap_orphans([process.popen.pid for process in self.processes()])
        self._watch_processes(now, was_paused)
        self._obey_signals()
        if self.shutdown.has_begun:
            self.shutdown.end_next_tier()
            return
        for child in self.children:
            self._obey_policy(child)
        self._continue_rolling_restart()

    def _watch_processes(self, now: float, was_paused: bool) -> None:
        for child in self.children:
            child.look_for_heartbeat()
            if was_paused:  # the child is not to blame for heartbeats that we have not read
                child.policy.note_heartbeat()
            for process in child.processes():
                if process.kill_if_late(now):
                    self.console.say(f"{child.name} did not end in time; killing it")
                elif process.kill_rest(now):
                    self._note_end(child, process, process.popen.returncode)

    def _obey_signals(self) -> None:
        if self.console.has_lost_reader():
            self.shutdown.is_unwatched = True
        if self.shutdown.is_requested and not self.shutdown.has_begun:
            self._stop(f"stopping within {self.shutdown.grace:g} s "
                       "(a second signal kills every process at once)")
        if self.shutdown.is_urgent:
            self.status = 128 + self.shutdown.signals[-1]
            for process in self.processes():
                process.kill()

    def _obey_policy(self, child: Child) -> None:
        if self.shutdown.has_begun:  # because another child was given up
            return
        action = child.policy.next_action()
        if action == "start":
            self.console.say(child.start(self.events.put))
        elif action == "kill":
            if time.monotonic() < self._ticked_at + PAUSED_TIME:  # not paused since this tick began
                self.console.say(child.kill())
        elif action == "give up":
            self._give_up(child)

    def _give_up(self, child: Child) -> None:
        if child.policy.is_final:
            self.status = BAD_SETTING  # it was given to us, and we have passed it on
            self._stop(f"{child.name} cannot start with these settings; stopping")
            return
        self.status = 1
        self._stop(f"{child.name} failed to start {child.policy.failed_starts} times in a row; "
                   "stopping. Its last output was:")
        self.console.show(child.name, b"\n".join(child.last_lines) or b"(nothing)")

    def _stop(self, why: str) -> None:
        self.console.say(why)
        self.shutdown.begin()

    def _continue_rolling_restart(self) -> None:
        if self.was_ready and self.rolling_restart.begin():
            self.console.say("replacing every process, one after another")
        if child := self.rolling_restart.next_child():
            self.console.say(child.start(self.events.put))

    # --- on events from the processes

    def _take_event(self) -> None:
        """Wait for an event, but no longer than a TICK, and handle it."""
        try:
            child, process, output, status = self.events.get(timeout=TICK)
        except queue.Empty:
            return
        if status is not None:
            self._note_end(child, process, status)
            return
        self.console.show(child.name, output, process.unshown.release)
        if child.note_output(process, output):
            self._note_ready(child)

    def _note_end(self, child: Child, process: Process, status: int) -> None:
        if process not in child.processes():  # its end was noted before the end of its output
            return
        sentence = child.note_end(process, status)
        if sentence and not self.shutdown.is_requested and not self.shutdown.has_begun:
            self.console.say(sentence)

    def _note_ready(self, child: Child) -> None:
        if child.former:
            child.former.replace(time.monotonic() + self.shutdown.grace)
        if self.rolling_restart.note_ready(child):
            self.console.say("every process has been replaced")
        is_ready = all(one.policy.state == "up" or one.policy.is_optional for one in self.children)
        if is_ready and not self.was_ready and not self.shutdown.has_begun:
            self.was_ready = True
            took = time.monotonic() - self.began_at
            self.console.say(f"ready in {took:.2f} s: {self.front.url} (Ctrl-C stops it)")


def assign_cores(tiers: Sequence[Sequence[Child]]) -> None:
    """Choose a CPU core for each child, where the system allows that; the last tier chooses first.

    Only one thread of a process runs Python code at a time: the one that holds the interpreter's
    lock (GIL). If the threads are on several cores, each handover of the lock has to wake a thread
    on another core, by an interrupt, and a busy process answers as little as a quarter of the
    requests. On a single core, a handover is cheap.

    Each child gets the core that has the least load so far. We count every tier as equally busy,
    since a request passes through all of them, and its children as sharing its load. So on two
    cores, a single gateway has one for itself, while two gateways share both with the services.
    """
    try:
        load = dict.fromkeys(sorted(os.sched_getaffinity(0)), 0.0)
    except (AttributeError, OSError):  # the system has no such call, or does not allow it
        return
    for tier in reversed(tiers):
        for child in tier:
            child.core = min(load, key=lambda core: load[core])  # of equal ones, the first
            load[child.core] += 1 / len(tier)


def reap_orphans(own_children: Sequence[int]) -> None:
    """Collect ended processes whose parents have ended, as PID 1 of a container has to."""
    with contextlib.suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid in own_children:
                return  # which is for Popen to collect
            os.waitpid(ended.si_pid, 0)
