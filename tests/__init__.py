"""The tests, which mirror the house. `python -m unittest` finds them all, and runs them in three processes at once.

Most of their time goes into waiting, for processes and for deadlines, so three at once take hardly more than a third.
The tests of a class stay together, and all is reported as ever. `python -m unittest tests.test_users` has one process.
"""
import contextlib
import os
import unittest
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path

LANES = 3
KINDS = ("failures", "errors", "skipped")  # of what a TestResult keeps, and each is (test, text)


def load_tests(loader: unittest.TestLoader, tests: unittest.TestSuite, pattern: str | None) -> unittest.TestSuite:
    """Find all tests (unittest's load_tests protocol)."""
    found = loader.discover(str(Path(__file__).parent), pattern or "test*.py")
    return Lanes(classes_of(found)) if hasattr(os, "fork") else found


def classes_of(suite: unittest.TestSuite) -> Iterator[unittest.TestSuite]:
    """Yield the suites that hold the tests of one class each."""
    parts = list(suite)
    if any(isinstance(part, unittest.TestSuite) for part in parts):
        for part in parts:
            yield from classes_of(part)
    elif parts:
        yield suite


class Lanes(unittest.TestSuite):
    """Runs suites in LANES forks of this process: whichever is free takes the next."""

    def run(self, result: unittest.TestResult, debug: bool = False) -> unittest.TestResult:
        suites, fork, lanes = list(self), get_context("fork"), {}
        for number in range(LANES):
            ours, theirs = fork.Pipe()
            lanes[ours] = fork.Process(target=run_suites, args=(suites, theirs, number))
            lanes[ours].start()
            theirs.close()
        try:
            hand_out(suites, list(lanes), result)
        finally:
            for connection, lane in lanes.items():
                lane.terminate()
                lane.join()
                connection.close()
        return result


def hand_out(suites: list[unittest.TestSuite], free: list[Connection], result: unittest.TestResult) -> None:
    """Give each lane that is free the next suite, until there are no more and each has told what became of its last."""
    waiting, running = iter(range(len(suites))), {}
    while True:
        for connection in free:
            if not result.shouldStop and (chosen := next(waiting, None)) is not None:
                running[connection] = suites[chosen]
                connection.send(chosen)
        if not running:
            return
        free = wait(list(running))
        for connection in free:
            report(connection, list(running.pop(connection)), result)


def run_suites(suites: list[unittest.TestSuite], connection: Connection, number: int) -> None:
    """Run the suites whose numbers come, and send back what became of each, until we are terminated."""
    os.environ["TEST_LANE"] = str(number)
    with contextlib.suppress(KeyboardInterrupt):  # who started us tells of it
        while True:
            outcome = unittest.TestResult()
            suites[connection.recv()].run(outcome)
            connection.send([(kind, test.id(), text) for kind in KINDS for test, text in getattr(outcome, kind)])


def report(connection: Connection, tests: list[unittest.TestCase], result: unittest.TestResult) -> None:
    """Tell a result what became of tests: they are as good as any for what went wrong outside of them."""
    try:
        troubles = connection.recv()
    except (EOFError, ConnectionError):
        raise SystemExit(f"the process that ran {tests[0].id()} has died") from None
    for test in tests:
        result.startTest(test)
        own = [trouble for trouble in troubles if trouble[1].partition(" ")[0] == test.id()]
        troubles = [trouble for trouble in troubles if trouble not in own]
        if test is tests[-1]:
            own += troubles  # of the class, then
        for kind, name, text in own:
            if kind == "skipped":
                result.addSkip(test, text)
            else:
                add = result.addFailure if kind == "failures" else result.addError
                add(test, (AssertionError, AssertionError(f"{name}\n{text}"), None))
        if not own:
            result.addSuccess(test)
        result.stopTest(test)
