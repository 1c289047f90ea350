"""What a person sees of the processes: labels and colours, and every line if it is read."""
import contextlib
import os
import socket
import tempfile
import threading
import unittest
from unittest import mock

from microshop.chassis import console
from microshop.chassis.console import COLOURS, Console, make_labels
from tests.helpers import PATIENCE, fill, wait_until


class LabelTest(unittest.TestCase):
    def test_labels_are_as_wide_as_the_longest_name(self):
        labels = make_labels("run_all", ["users", "recommendations"], coloured=False)
        self.assertEqual(labels, {
            "run_all": b"run_all         | ",
            "users": b"users           | ",
            "recommendations": b"recommendations | ",
        })

    def test_labels_are_of_equal_width_with_colours_too(self):
        labels = make_labels("run_all", ["users", "products"], coloured=True)
        self.assertEqual(labels["users"], f"\33[{COLOURS[0]}musers    | \33[0m".encode())
        self.assertEqual(labels["products"], f"\33[{COLOURS[1]}mproducts | \33[0m".encode())

    def test_a_name_that_is_added_later_changes_no_other_colour(self):
        three = make_labels("run_all", ["users", "products", "orders"], coloured=True)
        five = make_labels("run_all", ["users", "products", "orders", "a", "b"], coloured=True)
        self.assertEqual(three, {name: five[name] for name in three})

    def test_each_name_has_a_colour_of_its_own(self):
        names = [f"service{number}" for number in range(len(COLOURS))]
        labels = make_labels("run_all", names, coloured=True)
        colours = {label.partition(b"m")[0] for label in labels.values()}
        self.assertEqual(len(colours), len(names) + 1)

    def test_more_names_than_colours_use_the_colours_again(self):
        names = [f"service{number}" for number in range(len(COLOURS) + 1)]
        labels = make_labels("run_all", names, coloured=True)
        first, last = labels[names[0]], labels[names[-1]]
        self.assertEqual(first.partition(b"m")[0], last.partition(b"m")[0])


class ReaderTest(unittest.TestCase):
    """What a console that prints nothing knows of the reader of its output."""

    def make_idle(self, writer: int) -> Console:
        with mock.patch.object(console, "STDOUT", writer):
            idle = Console("run_all", ["users"], wants_colours=False)
        self.addCleanup(idle.close)
        return idle

    def has_lost_reader(self, writer: int) -> bool:
        return self.make_idle(writer).has_lost_reader()

    def test_the_end_of_a_pipes_reader_is_noticed_although_nothing_is_printed(self):
        reader, writer = os.pipe()
        self.addCleanup(os.close, writer)
        self.assertFalse(self.has_lost_reader(writer), "the pipe still has a reader")
        fill(writer)
        self.assertFalse(self.has_lost_reader(writer), "the pipe is full, but it has a reader")
        os.close(reader)
        self.assertTrue(self.has_lost_reader(writer), "nothing can read the pipe any more")

    def test_a_file_and_a_terminal_are_always_read_and_a_datagram_needs_no_reader(self):
        with (open(os.devnull, "wb") as null, tempfile.TemporaryFile() as file,
              socket.socket(type=socket.SOCK_DGRAM) as datagrams):
            datagrams.connect(("127.0.0.1", 1))
            for _ in range(2):
                with contextlib.suppress(ConnectionRefusedError):
                    datagrams.send(b"refused")
            ours, theirs = os.openpty()
            for output in (null.fileno(), file.fileno(), theirs, datagrams.fileno()):
                self.assertFalse(self.has_lost_reader(output))
            idle = self.make_idle(theirs)
            os.close(ours)
            self.assertTrue(idle.has_lost_reader(), "the terminal was closed")
            os.close(theirs)


class UnreadTest(unittest.TestCase):
    """A console whose output is a full pipe, which is read only when a test has finished."""

    def setUp(self):
        self.reader, self.writer = os.pipe()
        self.enterContext(mock.patch.object(console, "STDOUT", self.writer))
        self.size = fill(self.writer)
        self.console = Console("run_all", ["users"], wants_colours=False)

    def finish(self):
        """Close the console, and return the lines that it has printed."""
        def close():
            self.console.close()
            self.console._printer.join(PATIENCE)
            os.close(self.writer)

        closing = threading.Thread(target=close)
        closing.start()
        with open(self.reader) as pipe:
            lines = pipe.read().split("\n")
        closing.join()
        return [line for line in lines if line]

    def test_a_pipe_in_non_blocking_mode_that_is_read_late_gets_every_line_whole(self):
        os.set_blocking(self.writer, False)
        texts = [f"line {number}" for number in range(self.size // 10)]
        self.console.show("users", "\n".join(texts).encode())
        self.assertEqual(self.finish(), [f"users   | {text}" for text in texts])

    def test_lines_that_nothing_reads_are_lost_in_the_end_and_counted(self):
        self.enterContext(mock.patch.object(console, "MAX_WAITING", 2))
        shown = threading.Semaphore(0)
        self.console.say("one")
        wait_until(lambda: not self.console._items.qsize(), "the printer to print, which blocks it")
        for text in (b"two", b"three", b"lost\nlost", b"lost"):
            self.console.show("users", text, shown.release)
        waits = "a child waits until its lines are shown, but they are lost"
        self.assertTrue(shown.acquire(blocking=False) and shown.acquire(blocking=False), waits)
        os.read(self.reader, self.size)
        wait_until(lambda: not self.console._items.qsize(), "the printer to go on")
        self.console.say("four")
        self.assertEqual(self.finish(), [
            "run_all | one", "users   | two", "users   | three",
            "run_all | lines lost here because they could not be printed: 3", "run_all | four"])

    def test_lines_that_a_full_disk_did_not_take_are_counted(self):
        os.read(self.reader, self.size)
        with open("/dev/full", "wb") as full:
            with mock.patch.object(console, "STDOUT", full.fileno()):
                self.console.show("users", b"lost\nlost")
                wait_until(lambda: self.console._lost, "the printer to count what it lost")
        self.console.say("found")
        self.assertEqual(self.finish(), [
            "run_all | lines lost here because they could not be printed: 2", "run_all | found"])


if __name__ == "__main__":
    unittest.main()
