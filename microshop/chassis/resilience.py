"""Resilience policies for calls to other services, as small state machines.

Law: a policy counts and decides; it sends nothing. Time comes from the `clock` passed in, in seconds,
so that a test can replay a history. client.Upstream holds the lock around CircuitBreaker and RetryBudget.
"""
import threading
import time
from collections import deque
from collections.abc import Callable

Clock = Callable[[], float]


class CircuitBreaker:
    """A circuit breaker: spares an instance of a service that fails, and its callers the wait.

    closed     calls pass; IN_A_ROW failures, or half of the last RECENT, open it
    open       none passes until the pause is over
    half-open  one does, the probe: its outcome closes the breaker, or opens it for twice the pause

    A call that begins in one state and ends in another shows nothing of that: its ticket is of an earlier term.
    """

    IN_A_ROW = 5
    RECENT = 20
    FIRST_PAUSE, LAST_PAUSE = 0.5, 10.0  # seconds

    def __init__(self, clock: Clock = time.monotonic):
        self._clock = clock
        self._outcomes: deque[bool] = deque(maxlen=self.RECENT)
        self._pause = 0.0    # seconds; zero while it is closed
        self._until = 0.0    # when the pause is over
        self._is_probing = False
        self._term = 1       # counts the changes of state

    @property
    def state(self) -> str:
        if not self._pause:
            return "closed"
        return "open" if self.remaining() else "half-open"

    def remaining(self) -> float:
        """Return the seconds until it may let a call pass."""
        return max(self._until - self._clock(), 0.0) if self._pause else 0.0

    def admits(self) -> bool:
        """Tell whether a call may begin now."""
        return not self._pause or not self._is_probing and not self.remaining()

    def begin(self) -> int:
        """Let a call begin that it admits; return a ticket, with which its outcome is to be told."""
        self._is_probing = self._pause > 0
        return self._term

    def end(self, ticket: int, succeeded: bool | None) -> None:
        """Take note of a call's outcome; None where it shows nothing."""
        if ticket != self._term:
            return
        if self._is_probing:
            self._is_probing = False
            if succeeded:
                self._change(0.0)
            elif succeeded is not None:
                self._change(min(self._pause * 2, self.LAST_PAUSE))
        elif succeeded is not None:
            self._outcomes.append(succeeded)
            if not succeeded and self._is_failing():
                self._change(self.FIRST_PAUSE)

    def _is_failing(self) -> bool:
        outcomes = list(self._outcomes)
        return (outcomes[-self.IN_A_ROW:] == [False] * self.IN_A_ROW
                or len(outcomes) == self.RECENT and outcomes.count(False) * 2 >= self.RECENT)

    def _change(self, pause: float) -> None:
        """Open for a pause, or close, where that is zero."""
        self._pause, self._until, self._term = pause, self._clock() + pause, self._term + 1
        self._outcomes.clear()


class Bulkhead:
    """So many may be under way at a time; who comes later waits in line.

    A Semaphore lets newcomers pass those that wait: under load some never get their turn.
    """

    def __init__(self, count: int):
        self._free = count
        self._line: deque[threading.Lock] = deque()  # one that is released has its turn
        self._lock = threading.Lock()

    def acquire(self, timeout: float) -> bool:
        """Take a slot, within so many seconds; False where there was none."""
        with self._lock:
            if self._free:
                self._free -= 1
                return True
            turn = threading.Lock()
            turn.acquire()
            self._line.append(turn)
        if turn.acquire(timeout=max(timeout, 0)):
            return True
        with self._lock:
            if turn not in self._line:  # it came just now
                return True
            self._line.remove(turn)
            return False

    def release(self) -> None:
        with self._lock:
            if self._line:
                self._line.popleft().release()
            else:
                self._free += 1


class RetryBudget:
    """Keeps retries from finishing off a service that is sick already.

    They add at most a tenth (SHARE) to the calls of the last WINDOW seconds; but AT_LEAST so many are
    allowed, or a quiet shop could never retry.
    """

    SHARE, AT_LEAST, WINDOW = 0.1, 3, 10

    def __init__(self, clock: Clock = time.monotonic):
        self._clock = clock
        self._seconds: deque[list[int]] = deque([[0, 0, 0]])  # each second with its calls and its retries

    def note_call(self) -> None:
        self._this_second()[1] += 1

    def take(self) -> bool:
        """Tell whether one more retry is within the budget; if so, it is counted."""
        second = self._this_second()
        _, calls, retries = map(sum, zip(*self._seconds, strict=True))
        if retries + 1 > max(self.AT_LEAST, calls * self.SHARE):
            return False
        second[2] += 1
        return True

    def _this_second(self) -> list[int]:
        now = int(self._clock())
        if self._seconds[-1][0] != now:
            self._seconds.append([now, 0, 0])
            while self._seconds[0][0] <= now - self.WINDOW:
                self._seconds.popleft()
        return self._seconds[-1]
