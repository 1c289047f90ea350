"""Fair turns: which request is answered next, and by which thread.

CPython lets only one thread of a process run at a time: the one that holds the interpreter lock
(GIL). Threads that want this lock do not stand in line: whoever is fastest has it, so with a thread
for each connection, some requests lose again and again. So we make the line ourselves. A connection
has no thread while it waits for a request; the kernel lists, in order of arrival, the connections
that have something to read; and a few threads take turns at them, most often a single one.

A turn is the permission to take the next connection. A thread whose action takes longer than
TURN_TIME loses its turn to another thread; Python cannot stop it, so it goes on with that action
and then waits for a turn. So if a request waits, be it for a slow client, for a service that hangs
or for the disk, it does not hold up the others. Code that waits need not say so; where it is known
beforehand, handler.py does (give_up), which saves the time until that is noticed.

The accept loop in listener.py calls end_overdue: every TURN_TIME while turns are used, else every
listener.POLL. Service.turn_count says how many turns a process has.

Measured with 64 connections on two cores, beside a thread for each connection, at about the same
throughput: one request in a hundred takes longer than 5 ms instead of 13 ms (directly), and than
9 ms instead of 26 ms (through the gateway); one in a thousand, than 6 and 17 ms instead of 34 and
53 ms.

Law: nothing here knows what a connection is, or what an action does.
"""
import contextlib
import os
import select
import sys
import threading
import time
from collections.abc import Callable

TURN_TIME = 0.005  # seconds that an action may use a turn
MAX_SPARE = 16     # threads that wait for a turn; further ones end

Action = Callable[[], None]


if sys.platform == "linux":

    class Arrivals:
        """A queue in the kernel: the descriptors on which something has arrived, in that order."""

        def __init__(self) -> None:
            self._queue = select.epoll()

        def watch(self, descriptor: int) -> None:
            """Have take() return a descriptor when there is something to read on it.

            Once (ONESHOT): so no two threads serve the same connection.
            """
            try:
                self._queue.modify(descriptor, select.EPOLLIN | select.EPOLLONESHOT)
            except FileNotFoundError:  # it is new
                self._queue.register(descriptor, select.EPOLLIN | select.EPOLLONESHOT)

        def take(self) -> int:
            """Wait for a descriptor on which something has arrived, and return it."""
            [(descriptor, _)] = self._queue.poll(maxevents=1)
            return descriptor

        def close(self) -> None:
            self._queue.close()

else:  # the same for macOS and BSD

    class Arrivals:
        def __init__(self) -> None:
            self._queue = select.kqueue()

        def watch(self, descriptor: int) -> None:
            flags = select.KQ_EV_ADD | select.KQ_EV_ONESHOT
            self._queue.control([select.kevent(descriptor, select.KQ_FILTER_READ, flags)], 0)

        def take(self) -> int:
            [event] = self._queue.control(None, 1)
            return event.ident

        def close(self) -> None:
            self._queue.close()


class Turns:
    """`count` turns, and the threads that take them.

    Raises RuntimeError if the system has no room for the threads.
    """

    def __init__(self, count: int):
        self._arrivals = Arrivals()
        # Several threads use these, without a lock: each single operation on them is atomic.
        self._actions: dict[int, Action] = {}   # by the descriptor for which each waits
        self._busy: dict[int, float] = {}       # when each thread began the action in its turn
        # Each spare thread sleeps on a lock of its own; releasing that lock gives it a turn.
        self._spare: list[threading.Lock] = []
        self._alive = 0                         # how many threads there are
        self._was_used = False                  # since the last call of was_used()
        self._is_closed = False
        self._lock = threading.Lock()           # held to count threads, and to become spare
        for _ in range(count):
            self._find_spare().release()

    def when_readable(self, descriptor: int, action: Action) -> None:
        """Call the action, in a turn, once something has arrived on a descriptor."""
        self._actions[descriptor] = action  # first, since take() may return at once
        self._arrivals.watch(descriptor)

    def was_used(self) -> bool:
        """Return whether a turn is in use, or has been in use since the last call of this."""
        used, self._was_used = self._was_used, False
        return used or bool(self._busy)

    def give_up(self) -> None:
        """Let another thread have the turn of the calling one, which is about to wait."""
        self._pass_on(threading.get_ident())

    def end_overdue(self) -> None:
        """Let other threads have the turns of those whose action takes longer than TURN_TIME."""
        latest = time.monotonic() - TURN_TIME
        for thread, since in self._busy.copy().items():
            if since < latest:
                self._pass_on(thread)

    def close(self) -> None:
        """End the threads, each after what it is doing."""
        if self._is_closed:
            return
        self._pipe, other = os.pipe()
        os.close(other)  # so there is always something to read from the pipe: the end of file
        self._wake_next()  # first, since once it is closed, the last thread may end at any moment
        with self._lock:
            self._is_closed = True
        while self._spare:
            self._spare.pop().release()

    def _wake_next(self) -> None:
        """Wake a thread that waits for arrivals. Its action is this again: it wakes the next."""
        self.when_readable(self._pipe, self._wake_next)

    def _pass_on(self, thread: int) -> None:
        """Give a thread's turn to another. It keeps the turn if there is no room for another."""
        if thread not in self._busy:  # it has none, as a write that has given it up before
            return
        with contextlib.suppress(RuntimeError):
            other = self._find_spare()
            if self._busy.pop(thread, None) or self._is_closed:
                other.release()
            else:  # meanwhile, it has lost its turn or ended its action
                self._spare.append(other)

    def _find_spare(self) -> threading.Lock:
        """Return the lock of a thread that waits for a turn; start one if there is none."""
        with contextlib.suppress(IndexError):
            return self._spare.pop()
        turn = threading.Lock()
        turn.acquire()
        with self._lock:
            self._alive += 1
        try:
            threading.Thread(target=self._work, args=[turn], daemon=True).start()
        except RuntimeError:
            self._note_end()
            raise
        return turn

    def _work(self, turn: threading.Lock) -> None:
        """Wait for a turn, use it until it is lost, and wait again, as long as that is needed."""
        is_needed = True
        while is_needed:
            turn.acquire()
            self._use_turn()
            is_needed = self._become_spare(turn)
        self._note_end()

    def _use_turn(self) -> None:
        me = threading.get_ident()
        has_turn = True
        while has_turn and not self._is_closed:
            action = self._actions.pop(self._arrivals.take())
            self._busy[me] = time.monotonic()
            self._was_used = True
            with contextlib.suppress(Exception):  # which the action has logged, if memory was left
                action()
            has_turn = bool(self._busy.pop(me, None))

    def _become_spare(self, turn: threading.Lock) -> bool:
        """Add a thread to those that wait for a turn; return False if it must end instead."""
        with self._lock:
            if self._is_closed or len(self._spare) >= MAX_SPARE:
                return False
            self._spare.append(turn)
            return True

    def _note_end(self) -> None:
        """Count a thread that ends. After close(), the last one closes what they waited on."""
        with self._lock:
            self._alive -= 1
            is_last = self._is_closed and not self._alive
        if is_last:
            os.close(self._pipe)
            self._arrivals.close()
