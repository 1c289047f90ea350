"""Imported by each process of a shop under chaos, at its start: its wall clock can then jump.

SIGUSR1 sets the clock ahead by JUMP, and SIGUSR2 sets it right again.
"""
import signal
import time
from typing import Any

JUMP = 25 * 3600.0  # seconds

real_time = time.time


def jump(number: int, frame: Any) -> None:
    ahead = JUMP if number == signal.SIGUSR1 else 0.0
    time.time = lambda: real_time() + ahead


for number in (signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, jump)
