"""When to say no, and when to begin anew: policies of the gateway and the supervisor, small state machines all.

Law: a policy counts and decides; it sends nothing and waits for nothing. Time comes from the `clock` that it is given,
in seconds, so that a test can replay a history. Breaker and RetryBudget are locked by who uses them, client.Upstream.
"""
import hmac
import ipaddress
import random
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple

Clock = Callable[[], float]


class Breaker:
    """A circuit breaker: spares a copy of a service that fails, and its callers the wait.

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


class Slots:
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


class Rate(NamedTuple):
    """So many requests in so many seconds."""

    requests: int
    seconds: int


class RateLimit:
    """A token bucket for each client: `rate` on average, and `rate.requests` at once.

    A bucket is one number, the time at which it is full again (the generic cell rate algorithm): at 5 an hour each
    token moves that by 720 s, and it may lie an hour ahead, when the bucket is empty, but no further.
    Of more than MOST_CLIENTS who was not seen for longest is forgotten, so a million addresses cost no more memory.
    """

    MOST_CLIENTS = 10_000

    def __init__(self, rate: Rate, clock: Clock = time.monotonic):
        self.rate = rate
        self._clock = clock
        self._full_at: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, client: str) -> float:
        """Take a token out of a client's bucket; return 0, or the seconds until there is one."""
        with self._lock:
            now = self._clock()
            full_at = max(self._full_at.get(client, now), now) + self.rate.seconds / self.rate.requests
            too_far = full_at - now - self.rate.seconds
            if too_far <= 1e-6:  # by which a sum of many tokens may be off
                self._full_at[client], too_far = full_at, 0.0
            self._full_at.move_to_end(client)
            if len(self._full_at) > self.MOST_CLIENTS:
                self._full_at.popitem(last=False)
            return too_far


def client_of(address: str) -> str:
    """Return whom an address stands for: of IPv6 its first 64 bits, since one host has all the rest to choose from."""
    if ":" not in address:
        return address
    host = ipaddress.IPv6Address(address)
    return str(host.ipv4_mapped or ipaddress.IPv6Network((int(host) >> 64 << 64, 64)))


def is_bearer(authorization: str, token: str) -> bool:
    """Tell whether an Authorization field shows the token (RFC 6750 2.1), in a time that tells nothing about it."""
    scheme, _, shown = authorization.partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(shown.strip(" ").encode(), token.encode())


class Life:
    """The life of a supervised child: when it is to be started, when killed, and when to give it up.

    down       for a pause that doubles from one end to the next; after HEALTHY seconds of life it is short again
    starting   until it is ready; START_TIME is the limit, and FAILED_STARTS in a row, or one that is `final`, the end
    up         as long as it shows signs of life; after HANG_TIME without any it hangs
    dying      after it was killed
    """

    FIRST_PAUSE, LAST_PAUSE = 0.1, 10.0  # seconds: 0.1 to 0.2, then 0.2 to 0.4, and 5 to 10 at last
    HEALTHY = 10.0                       # seconds
    START_TIME, HANG_TIME = 10.0, 10.0   # seconds
    FAILED_STARTS = 5

    def __init__(self, clock: Clock = time.monotonic, jitter: Callable[[float, float], float] = random.uniform):
        self._clock, self._jitter = clock, jitter
        self.state = "down"
        self.since = clock()      # when it came into its state
        self.pause = 0.0          # seconds to be down
        self.failed_starts = 0
        self.is_final = False     # then it is not to be started again
        self._ends = 0            # without a healthy spell between them
        self._seen = 0.0          # when it last showed a sign of life

    def order(self) -> str:
        """Return what is to be done now: "start", "kill", "give up", or nothing."""
        now = self._clock()
        if self.state == "down":
            if self.is_final or self.failed_starts >= self.FAILED_STARTS:
                return "give up"
            return "start" if now >= self.since + self.pause else ""
        if self.state == "starting" and now > self.since + self.START_TIME:
            return "kill"
        if self.state == "up" and now > self._seen + self.HANG_TIME:
            return "kill"
        return ""

    def note_start(self) -> None:
        self._change("starting")

    def note_ready(self) -> None:
        self._change("up")
        self._seen, self.failed_starts = self.since, 0

    def note_sign(self) -> None:
        """Take note of a sign of life, or of a time in which nobody could have seen one."""
        self._seen = self._clock()

    def note_kill(self) -> None:
        self.failed_starts += self.state == "starting"
        self._change("dying")

    def note_end(self, is_final: bool = False) -> None:
        """Take note of its end. Where it ends before it is ready, `is_final` tells that it always would."""
        if self.state == "starting":
            self.failed_starts, self.is_final = self.failed_starts + 1, is_final
        self._change("down")
        longest = min(self.FIRST_PAUSE * 2 ** (self._ends + 1), self.LAST_PAUSE)
        self.pause, self._ends = self._jitter(longest / 2, longest), self._ends + 1

    def _change(self, state: str) -> None:
        if self.state == "up" and self._seen - self.since >= self.HEALTHY:
            self._ends = 0
        self.state, self.since = state, self._clock()
