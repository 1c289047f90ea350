"""What a person sees of a group of processes: their output, each line labelled with a name.

Law: this module prints, and decides nothing.
"""
import errno
import os
import queue
import select
import stat
import threading
from collections.abc import Callable, Sequence

from microshop.chassis.access_log import NotWritten, write_whole

STDIN, STDOUT = 0, 1
MAX_WAITING = 1000  # items to print; further ones are lost
CLOSE_TIME = 1.0    # seconds that close() waits for the last lines to be printed
BOLD = 1            # the supervisor's own label
COLOURS = (32, 33, 35, 36, 34, 92, 93, 95, 96, 94)  # of a terminal; no red, which means an error

Item = tuple[str, bytes, Callable[[], None] | None]  # name, lines, when_shown


class Console:
    """Prints lines to standard output as `name | line`, in a thread of its own.

    A terminal that is paused, or a pipe that is not read, blocks only that thread: the supervisor
    keeps working. `title` is the supervisor's own name, `names` are those of its children.
    """

    def __init__(self, title: str, names: Sequence[str], wants_colours: bool):
        self.title = title
        self._is_broken = False  # a line could not be printed: the reader of our output is gone
        self._output = select.poll()
        if stat.S_ISFIFO(os.fstat(STDOUT).st_mode) or os.isatty(STDOUT):  # others have no reader
            self._output.register(STDOUT, 0)  # with 0, it tells only of what has gone
        self._lost = 0           # lines that were not printed, and not told of yet
        self._losing = threading.Lock()  # held to change _lost
        self._labels = make_labels(title, names, wants_colours and os.isatty(STDOUT))
        self._terminals = [stream for stream in (STDIN, STDOUT) if os.isatty(stream)]
        self._items: queue.Queue[Item | None] = queue.Queue()
        self._printer = threading.Thread(target=self._print_items, daemon=True)
        self._printer.start()

    def say(self, text: str) -> None:
        """Print a line of the supervisor's own."""
        self.show(self.title, os.fsencode(text))  # which may name a file

    def show(
        self, name: str, lines: bytes, when_shown: Callable[[], None] | None = None
    ) -> None:
        """Queue lines to print after a label; call `when_shown` once they are printed.

        If nothing reads our output, a child that fails again and again must not fill the memory:
        then its lines are lost.
        """
        if self._items.qsize() >= MAX_WAITING:
            self._note_lost(lines.count(b"\n") + 1)
            if when_shown:
                when_shown()
            return
        if lost := self._lost:
            text = f"lines lost here because they could not be printed: {lost}"
            self._items.put((self.title, text.encode(), None))
            self._note_lost(-lost)
        self._items.put((name, lines, when_shown))

    def has_lost_terminal(self) -> bool:
        """Return whether we had a terminal that has been closed."""
        return not all(map(os.isatty, self._terminals))

    def has_lost_reader(self) -> bool:
        """Return whether the reader of our output is gone, even if there is nothing to print."""
        # macOS cannot poll some devices, which says nothing: POLLNVAL
        has_gone = any(event & (select.POLLERR | select.POLLHUP)
                       for _, event in self._output.poll(0))
        return self._is_broken or has_gone

    def close(self) -> None:
        """Print what is left, if that takes no longer than CLOSE_TIME."""
        self._items.put(None)
        self._printer.join(CLOSE_TIME)

    def _note_lost(self, count: int) -> None:
        with self._losing:
            self._lost += count

    def _print_items(self) -> None:
        while item := self._items.get():
            name, lines, when_shown = item
            label = self._labels[name]
            self._write(b"".join([label + line + b"\n" for line in lines.split(b"\n")]))
            if when_shown:
                when_shown()

    def _write(self, lines: bytes) -> None:
        try:
            write_whole(STDOUT, lines)
        except NotWritten as failure:
            self._note_lost(failure.rest.count(b"\n"))
            if failure.errno in (errno.EPIPE, errno.EIO):  # with others (a full disk), we go on
                self._is_broken = True


def make_labels(title: str, names: Sequence[str], coloured: bool) -> dict[str, bytes]:
    """Return the label of each name: the name, padded, and a bar, in a colour of its own."""
    width = max(map(len, [title, *names]))
    colours = {title: BOLD}
    for number, name in enumerate(names):
        colours[name] = COLOURS[number % len(COLOURS)]
    labels = {}
    for name, colour in colours.items():
        label = f"{name:<{width}} | "
        labels[name] = (f"\33[{colour}m{label}\33[0m" if coloured else label).encode()
    return labels
