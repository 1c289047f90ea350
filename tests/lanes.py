"""Lanes: several processes that run the test suite together.

The tests spend most of their time waiting for processes and deadlines, so four lanes take little
more than a third of the time of one. A lane that is free takes the next class of tests; the tests
of one class stay together. The runner prints the same as without lanes.
"""
import contextlib
import os
import unittest
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tests import journal

LANES = 4
KINDS = ("failures", "errors", "skipped")  # attributes of a TestResult: each a list of (test, text)


def load_tests(loader: unittest.TestLoader, tests: unittest.TestSuite,
               pattern: str | None) -> unittest.TestSuite:
    """Find all tests; unittest calls this for the whole package (its load_tests protocol)."""
    found = loader.discover(str(Path(__file__).parent), pattern or "test*.py")
    return Lanes(classes_of(found))


def classes_of(suite: unittest.TestSuite) -> Iterator[unittest.TestSuite]:
    """Yield the suites that hold the tests of one class each."""
    parts = list(suite)
    if any(isinstance(part, unittest.TestSuite) for part in parts):
        for part in parts:
            yield from classes_of(part)
    elif parts:
        yield suite


class Lanes(unittest.TestSuite):
    """A suite that runs its parts in LANES child processes."""

    def run(self, result: unittest.TestResult, debug: bool = False) -> unittest.TestResult:
        suites, lanes = list(self), {}
        fork = get_context("fork")  # so that a lane has imported everything already
        for number in range(LANES):
            ours, theirs = fork.Pipe()
            lanes[ours] = fork.Process(target=run_lane, args=(suites, theirs, number))
            lanes[ours].start()
            theirs.close()
        try:
            distribute(suites, list(lanes), result)
        finally:
            for connection, lane in lanes.items():
                lane.terminate()
                lane.join()
                connection.close()
        return result


def distribute(suites: list[unittest.TestSuite], free: list[Connection],
               result: unittest.TestResult) -> None:
    """Send each free lane the number of the next suite, until all suites have been run."""
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


def run_lane(suites: list[unittest.TestSuite], connection: Connection, number: int) -> None:
    """Run the suites whose numbers arrive, and send back the problems of each, until terminated."""
    os.environ["TEST_LANE"] = str(number)
    with contextlib.suppress(KeyboardInterrupt):  # the parent process reports it
        while True:
            outcome = journal.Result()
            suites[connection.recv()].run(outcome)
            connection.send([(kind, test.id(), text)
                             for kind in KINDS for test, text in getattr(outcome, kind)])


def report(connection: Connection, tests: list[unittest.TestCase],
           result: unittest.TestResult) -> None:
    """Receive the problems of a suite, and add its tests to the result."""
    try:
        problems = connection.recv()
    except (EOFError, ConnectionError):
        raise SystemExit(f"the process that ran {tests[0].id()} has died") from None
    for test in tests:
        own = [problem for problem in problems if is_about(problem, test)]
        problems = [problem for problem in problems if problem not in own]
        if test is tests[-1]:
            own += problems  # the rest is about the class, as when its setUpClass() failed
        result.startTest(test)
        add_outcome(result, test, own)
        result.stopTest(test)


def is_about(problem: tuple[str, str, str], test: unittest.TestCase) -> bool:
    _, name, _ = problem  # that of a subtest goes on: "tests.test_x.Class.test_y (number=2)"
    return name.partition(" ")[0] == test.id()


def add_outcome(result: unittest.TestResult, test: unittest.TestCase,
                problems: list[tuple[str, str, str]]) -> None:
    if not problems:
        result.addSuccess(test)
    for kind, name, text in problems:
        if kind == "skipped":
            result.addSkip(test, text)
        else:
            add = result.addFailure if kind == "failures" else result.addError
            add(test, (AssertionError, AssertionError(f"{name}\n{text}"), None))
