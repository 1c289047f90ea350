"""How child processes are kept alive."""
import random
import time
from collections.abc import Callable


class RestartPolicy:
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

    def __init__(self, clock: Callable[[], float] = time.monotonic, jitter: Callable[[float, float], float] = random.uniform):
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

    def note_heartbeat(self) -> None:
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
