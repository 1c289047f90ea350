"""Fair turns: which request is answered next, and by which thread.

CPython lets only one thread of a process run at a time: the one that holds the interpreter lock
(GIL). Nobody queues for that lock: with a thread for each of 64 busy connections, the slowest
request in a hundred waits four times as long as most. So here a connection that waits for its
next request has no thread. The kernel keeps the connections on which something has arrived in
order, and a few threads take turns: each takes the first connection, answers it, and takes the
next.

A turn that lasts longer than PATIENCE is taken away: the thread goes on without it, and another
thread takes the next connection. So if a request waits, be it for a slow client, for a service that
hangs or for the disk, the others do not wait for it; and the code that waits need not know of
turns.

    when_readable ──> Arrivals ──> a thread with a turn ──> the action, in at most PATIENCE
                                       │ give_up, end_overdue
                                       └─> a spare or new thread has the turn now

Law: nothing here knows what a connection is, or what is done in a turn.
"""
import contextlib
import os
import select
import sys
import threading
import time
from collections.abc import Callable

PATIENCE = 0.005  # seconds that a turn may last
MAX_SPARE = 16    # threads that wait for a turn; further ones end

Action = Callable[[], None]


if sys.platform == "linux":

    class Arrivals:
        """A queue in the kernel: the descriptors on which something has arrived, in that order."""

        def __init__(self) -> None:
            self._queue = select.epoll()

        def watch(self, descriptor: int) -> None:
            """Have take() return a descriptor, once, when there is something to read on it."""
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
        self._actions: dict[int, Action] = {}   # by the descriptor for which each waits
        self._busy: dict[int, float] = {}       # since when each thread with a turn has used it
        self._spare: list[threading.Lock] = []  # releasing one of these gives its thread a turn
        self._threads: set[int] = set()
        self._is_closed = False
        for _ in range(count):
            self._find_spare().release()

    def when_readable(self, descriptor: int, action: Action) -> None:
        """Call the action, in a turn, once something has arrived on a descriptor."""
        self._actions[descriptor] = action
        self._arrivals.watch(descriptor)

    def is_busy(self) -> bool:
        """Return whether a turn is in use."""
        return bool(self._busy)

    def give_up(self) -> None:
        """Let another thread have the turn of this one, which is about to wait."""
        self._pass_on(threading.get_ident())

    def end_overdue(self) -> None:
        """Let other threads have the turns that have lasted longer than PATIENCE."""
        latest = time.monotonic() - PATIENCE
        for thread, since in self._busy.copy().items():
            if since < latest:
                self._pass_on(thread)

    def close(self) -> None:
        """End the threads, each after what it is doing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._end, other = os.pipe()
        os.close(other)  # now _end can be read, for ever: there is its end to read
        self._wake_next()
        while self._spare:
            self._spare.pop().release()

    def _wake_next(self) -> None:
        """Wake a thread that waits for arrivals; that one wakes the next."""
        self.when_readable(self._end, self._wake_next)

    def _pass_on(self, thread: int) -> None:
        """Give a thread's turn to another. It keeps the turn if there is no room for another."""
        with contextlib.suppress(RuntimeError):
            other = self._find_spare()
            if self._busy.pop(thread, None):
                other.release()
            else:  # it has no turn: it was faster, and has given it up or has ended its action
                self._spare.append(other)

    def _find_spare(self) -> threading.Lock:
        """Return the lock of a thread that waits for a turn; start one if there is none."""
        with contextlib.suppress(IndexError):
            return self._spare.pop()
        turn = threading.Lock()
        turn.acquire()
        threading.Thread(target=self._work, args=[turn], daemon=True).start()
        return turn

    def _work(self, turn: threading.Lock) -> None:
        """Use a turn for as long as it is ours, then wait for another, as long as we are needed."""
        me = threading.get_ident()
        self._threads.add(me)
        while turn.acquire():
            self._use_turn(me)
            if self._is_closed or len(self._spare) >= MAX_SPARE:
                break
            self._spare.append(turn)
        self._threads.remove(me)
        if self._is_closed and not self._threads:
            os.close(self._end)
            self._arrivals.close()

    def _use_turn(self, me: int) -> None:
        has_turn = True
        while has_turn and not self._is_closed:
            action = self._actions.pop(self._arrivals.take())
            self._busy[me] = time.monotonic()
            with contextlib.suppress(Exception):  # it reports its errors, if memory is left for it
                action()
            has_turn = bool(self._busy.pop(me, None))
