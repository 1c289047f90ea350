"""The journal: what happened last before a test failed.

The helpers note each request that a test sends, its answer, and each line that a service or a
process under test logs. When a test fails, the runner shows the last of those lines below the
traceback. As long as the tests pass, nothing is printed.
"""
import contextlib
import io
import unittest
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Any

LENGTH = 20   # lines that are shown
WIDTH = 400   # characters of a line that are shown

Failure = tuple[type[BaseException], BaseException, TracebackType | None]

_lines: deque[str] = deque(maxlen=LENGTH)


def note(line: str) -> None:
    """Add a line to the journal."""
    _lines.append(line if len(line) <= WIDTH else f"{line[:WIDTH]}...")


class Capture(io.StringIO):
    """A stream that keeps what is written to it, and notes each line in the journal."""

    def write(self, text: str) -> int:
        for line in text.splitlines():
            note(line)
        return super().write(text)


@contextlib.contextmanager
def captured_log() -> Iterator[Capture]:
    """Send what this process writes to stderr into the journal, and yield the stream."""
    with contextlib.redirect_stderr(Capture()) as log:
        yield log


class ShowsJournal:
    """A mixin for test results: empties the journal before a test, and shows it after a failure."""

    def startTest(self, test: unittest.TestCase) -> None:
        _lines.clear()
        super().startTest(test)

    def addFailure(self, test: unittest.TestCase, failure: Failure) -> None:
        super().addFailure(test, with_journal(failure))

    def addError(self, test: unittest.TestCase, failure: Failure) -> None:
        super().addError(test, with_journal(failure))

    def addSubTest(self, test: unittest.TestCase, subtest: Any, failure: Failure | None) -> None:
        super().addSubTest(test, subtest, failure and with_journal(failure))


class TextResult(ShowsJournal, unittest.TextTestResult):
    """A result that prints, for the runner of `python -m unittest`."""


class Result(ShowsJournal, unittest.TestResult):
    """A result that only keeps what happened, for one lane."""


def with_journal(failure: Failure) -> Failure:
    """Add the journal's lines to an exception, as a note (PEP 678); tracebacks end with those."""
    if _lines:
        failure[1].add_note("What happened last:\n" + "\n".join(f"  {line}" for line in _lines))
    return failure
