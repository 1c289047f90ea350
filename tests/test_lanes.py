"""Lanes report what a single process would: each problem once, and a lane that dies."""
import io
import json
import os
import subprocess
import sys
import unittest

from tests import journal
from tests.helpers import TOP
from tests.lanes import Lanes


class Mixed(unittest.TestCase):
    def passes(self):
        pass

    def fails(self):
        self.fail("as expected")

    def breaks(self):
        raise ZeroDivisionError("as expected")

    def is_skipped(self):
        self.skipTest("today")

    def fails_in_part(self):
        for number in (1, 2):
            with self.subTest(number=number):
                self.assertEqual(number, 1)

    def fails_after_a_log_line(self):
        journal.note("the service said so")
        self.fail("as expected")


class BrokenFixture(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        raise OSError("the fixture is broken")

    def passes(self):
        pass


class Deadly(unittest.TestCase):
    def dies(self):
        os._exit(1)


def run_in_lanes(*suites: str) -> None:
    """Run suites, each like "Mixed: passes fails", and print what became of them as JSON."""
    kinds = {kind.__name__: kind for kind in (Mixed, BrokenFixture, Deadly)}
    parts = [suite.partition(": ") for suite in suites]
    lanes = Lanes(unittest.TestSuite(map(kinds[name], tests.split())) for name, _, tests in parts)
    result = unittest.TextTestRunner(sys.stdout).run(lanes)
    counts = (result.testsRun, len(result.failures), len(result.errors), len(result.skipped))
    sys.exit(json.dumps({"counts": counts, "passed": result.wasSuccessful()}))


class LanesTest(unittest.TestCase):
    def run_in_lanes(self, *suites: str) -> tuple[str, str]:
        """Return what the lanes print, and the outcome.

        They run in a process of their own: to fork one with threads, like this, is not safe.
        """
        code = f"from tests.test_lanes import run_in_lanes; run_in_lanes(*{suites!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True)
        return done.stdout, done.stderr

    def test_each_problem_is_reported_once_with_its_reason(self):
        printed, outcome = self.run_in_lanes(
            "Mixed: passes fails breaks is_skipped fails_in_part",
            "BrokenFixture: passes", "Mixed: passes")
        self.assertEqual(json.loads(outcome), {"counts": [7, 2, 2, 1], "passed": False},
                         f"tests, failures, errors, skipped in:\n{printed}")
        for reason in ("AssertionError: as expected", "ZeroDivisionError: as expected",
                       "fails_in_part (number=2)", "OSError: the fixture is broken"):
            self.assertEqual(printed.count(reason), 1, f"times {reason!r} is in:\n{printed}")

    def test_when_all_tests_pass_the_runner_prints_its_usual_dots(self):
        printed, outcome = self.run_in_lanes(*["Mixed: passes"] * 9)
        self.assertEqual(json.loads(outcome), {"counts": [9, 0, 0, 0], "passed": True}, printed)
        self.assertIn(".........\n", printed)

    def test_a_lane_that_dies_fails_the_whole_run(self):
        printed, outcome = self.run_in_lanes("Deadly: dies")
        self.assertRegex(outcome, "the process that ran .*Deadly.dies has died", printed)


class JournalTest(unittest.TestCase):
    def test_a_service_under_test_does_not_log_between_the_dots_of_the_runner(self):
        code = ("from tests.helpers import running\n"
                "from microshop.users import Users\n"
                "with running(Users) as users: users.log.event('an event')\n")
        done = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))

    def run_alone(self, name: str) -> str:
        printed = io.StringIO()
        unittest.TextTestRunner(printed).run(Mixed(name))
        return printed.getvalue()

    def test_a_failure_shows_what_was_logged_last(self):
        self.assertIn("What happened last:\n  the service said so\n",
                      self.run_alone("fails_after_a_log_line"))

    def test_a_failure_does_not_show_what_an_earlier_test_has_logged(self):
        self.run_alone("fails_after_a_log_line")
        self.assertNotIn("the service said so", self.run_alone("fails"))


if __name__ == "__main__":
    unittest.main()
