"""Run a shop of one service, with clocks that a test can move: `python -m tests.moved_clock FLAGS`.

SIGUSR1 moves the clock of the restart policy of users, and SIGUSR2 every clock of the supervisor.
So a test can let ten seconds pass for a process that hangs, and for no other.
"""
import signal
import time
from types import SimpleNamespace
from typing import Any

from microshop import run_all
from microshop.chassis import child, supervisor

STEP = 11.0  # seconds: more than a child may take to start, or to send a heartbeat
added = {"users": 0.0, "all": 0.0}


def clock() -> float:
    return time.monotonic() + added["all"]


class Child(child.Child):
    def __init__(self, name: str, *more: Any, **still_more: Any):
        super().__init__(name, *more, **still_more)
        self.policy = child.RestartPolicy(lambda: clock() + added.get(self.name, 0.0))
        if name == "users":
            signal.signal(signal.SIGUSR1, self.move_clock)

    def move_clock(self, *_: object) -> None:
        self.look_for_heartbeat()  # one that came before does not count after
        added["users"] += STEP


def move_all_clocks(*_: object) -> None:
    added["all"] += STEP


if __name__ == "__main__":
    run_all.SERVICES = {"users": 3001}
    run_all.Child = Child
    supervisor.time = SimpleNamespace(monotonic=clock)
    signal.signal(signal.SIGUSR2, move_all_clocks)
    run_all.main()
