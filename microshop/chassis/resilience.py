"""Resilience policies for calls to other services, as small state machines.

    CircuitBreaker  stops calls to an instance that keeps failing, and probes it from time to time
    Bulkhead        limits how many calls to one service are in flight
    RetryBudget     limits how many of the calls to one service may be retries

Law: a policy counts and decides; it sends nothing and logs nothing. Time comes from the `clock`
that is passed in, in seconds, so that a test can replay a history. Only Bulkhead is thread-safe:
client.Upstream holds its lock when it changes the others.
"""
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

Clock = Callable[[], float]


class Outcome(Enum):
    """How a call ended, for the circuit breaker of the instance that was called."""

    SUCCEEDED = "it was answered"
    FAILED = "the answer showed a failing instance, or none came"
    BROKE = "its connection broke, perhaps together with others"
    UNKNOWN = "its end says nothing about the instance"


class CircuitBreaker:
    """Stop calling an instance that keeps failing: it can recover, and callers need not wait.

    closed     calls pass; the breaker opens after IN_A_ROW failures in a row, or if half of the
               last RECENT calls have failed
    open       no call passes until the pause is over
    half-open  one call passes, the probe: if it succeeds, the breaker closes; if it fails, the
               breaker opens for twice the pause

    Each call gets a ticket, its number, since two kinds of ends must not count:
    - a call that begins in one state and ends in another says nothing about the new state;
    - a process that dies breaks all its connections: of the calls in flight then, one counts.
    """

    STATES = ("closed", "open", "half-open")
    IN_A_ROW = 5
    RECENT = 20
    FIRST_PAUSE, LAST_PAUSE = 0.5, 10.0  # seconds

    def __init__(self, clock: Clock = time.monotonic):
        self._clock = clock
        self._outcomes: deque[bool] = deque(maxlen=self.RECENT)  # of calls since it last closed
        self._pause = 0.0    # seconds; zero while closed
        self._until = 0.0    # when the pause ends
        self._is_probing = False
        self.probes = 0      # since the breaker opened
        self.changes = dict.fromkeys(self.STATES, 0)  # how often each state has begun
        self._calls = 0      # that have begun
        self._last_change = self._last_break = 0  # how many calls had begun then

    @property
    def state(self) -> str:
        """The state as a word: closed, open or half-open."""
        if not self._pause:
            return "closed"
        return "open" if self.remaining() else "half-open"

    def remaining(self) -> float:
        """Return the seconds until the breaker may let a call pass."""
        return max(self._until - self._clock(), 0.0) if self._pause else 0.0

    def admits(self) -> bool:
        """Return whether a call may begin now."""
        if not self._pause:  # closed
            return True
        return not self._is_probing and not self.remaining()

    def begin(self) -> int:
        """Begin a call, which the breaker must admit; return its ticket, for end()."""
        if self._pause:
            self._is_probing = True
            self.probes += 1
            self.changes["half-open"] += 1
        self._calls += 1
        return self._calls

    def end(self, ticket: int, outcome: Outcome) -> str:
        """Record how a call ended.

        Returns how the breaker's state has changed, in words for the log, or "" if it has not.
        """
        if ticket <= self._last_change:
            return ""
        was_probe, self._is_probing = self._is_probing, False
        was_counted = outcome is Outcome.BROKE and ticket <= self._last_break
        if was_counted or outcome is Outcome.UNKNOWN:
            return ""
        if outcome is Outcome.BROKE:
            self._last_break = self._calls
        succeeded = outcome is Outcome.SUCCEEDED
        if was_probe and succeeded:
            self._change(pause=0.0)
            return "closed: the probe succeeded"
        if was_probe:
            self._change(min(self._pause * 2, self.LAST_PAUSE))
            return f"opened again for {self._pause:g} s: another failure"
        self._outcomes.append(succeeded)
        if succeeded or not (failures := self._too_many_failures()):
            return ""
        self._change(self.FIRST_PAUSE)
        return f"opened for {self._pause:g} s after {failures}"

    def _too_many_failures(self) -> str:
        """Describe the recent failures if they are enough to open the breaker; else return ""."""
        outcomes = list(self._outcomes)
        if outcomes[-self.IN_A_ROW:] == [False] * self.IN_A_ROW:
            return f"{self.IN_A_ROW} failures in a row"
        failures = outcomes.count(False)
        if len(outcomes) == self.RECENT and failures * 2 >= self.RECENT:
            return f"{failures} failures in {self.RECENT} calls"
        return ""

    def _change(self, pause: float) -> None:
        """Open for `pause` seconds, or close if that is zero."""
        self._pause, self._until = pause, self._clock() + pause
        self._last_change = self._calls
        self.changes["open" if pause else "closed"] += 1
        self.probes = 0
        self._outcomes.clear()


class Bulkhead:
    """Limit calls in flight, so that a service that hangs cannot occupy every thread of its caller.

    A fair semaphore: at most `count` calls at a time; waiters are served first come, first served.
    (threading.Semaphore lets newcomers overtake waiters: under load, some would never be served.)
    """

    def __init__(self, count: int):
        self.count = self._free = count
        self._waiters: deque[threading.Lock] = deque()  # releasing a lock serves its waiter
        self._lock = threading.Lock()

    @property
    def in_use(self) -> int:
        return self.count - self._free

    def acquire(self, timeout: float) -> bool:
        """Take a slot, waiting up to `timeout` seconds for one; return whether there was one."""
        with self._lock:
            if self._free:
                self._free -= 1
                return True
            waiter = threading.Lock()
            waiter.acquire()
            self._waiters.append(waiter)
        if waiter.acquire(timeout=max(timeout, 0)):
            return True
        with self._lock:
            if waiter not in self._waiters:  # served just after its timeout
                return True
            self._waiters.remove(waiter)
            return False

    def release(self) -> None:
        """Give a slot back, to the waiter that has waited longest if there is one."""
        with self._lock:
            if self._waiters:
                self._waiters.popleft().release()
            else:
                self._free += 1


@dataclass(slots=True)
class _Second:
    """What was counted in one second of the clock."""

    number: int
    calls: int = 0
    retries: int = 0


class RetryBudget:
    """Keep retries from overloading a service that is already in trouble.

    In any WINDOW seconds, there may be at most a tenth (SHARE) as many retries as calls. AT_LEAST
    retries are always allowed, since a tenth of a few calls would be none.
    """

    SHARE, AT_LEAST, WINDOW = 0.1, 3, 10

    def __init__(self, clock: Clock = time.monotonic):
        self._clock = clock
        self._seconds = deque([_Second(0)])  # those of the last WINDOW seconds that saw a call

    def note_call(self) -> None:
        """Count a call, which is not a retry."""
        self._this_second().calls += 1

    def take(self) -> bool:
        """Count one more retry if the budget allows it; return whether it does."""
        used, limit = self.usage()
        if used >= limit:
            return False
        self._this_second().retries += 1
        return True

    def usage(self) -> tuple[int, int]:
        """Return how many retries the last WINDOW seconds had, and how many they may have."""
        self._this_second()  # forgets what is older
        calls = sum(second.calls for second in self._seconds)
        retries = sum(second.retries for second in self._seconds)
        return retries, max(self.AT_LEAST, int(calls * self.SHARE))

    def _this_second(self) -> _Second:
        now = int(self._clock())
        if self._seconds[-1].number != now:
            self._seconds.append(_Second(now))
            while self._seconds[0].number <= now - self.WINDOW:
                self._seconds.popleft()
        return self._seconds[-1]
