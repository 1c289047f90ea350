"""Lanes report what a single process would: each problem once, and a lane that dies."""
import io
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


class LanesTest(unittest.TestCase):
    def run_in_lanes(self, *suites: unittest.TestSuite) -> tuple[unittest.TestResult, str]:
        printed = io.StringIO()
        return unittest.TextTestRunner(printed).run(Lanes(suites)), printed.getvalue()

    def test_each_problem_is_reported_once_with_its_reason(self):
        names = ("passes", "fails", "breaks", "is_skipped", "fails_in_part")
        result, printed = self.run_in_lanes(
            unittest.TestSuite(map(Mixed, names)),
            unittest.TestSuite([BrokenFixture("passes")]),
            unittest.TestSuite([Mixed("passes")]))
        counts = (result.testsRun, len(result.failures), len(result.errors), len(result.skipped))
        self.assertEqual(counts, (7, 2, 2, 1), f"tests, failures, errors, skipped in:\n{printed}")
        for reason in ("AssertionError: as expected", "ZeroDivisionError: as expected",
                       "fails_in_part (number=2)", "OSError: the fixture is broken"):
            self.assertEqual(printed.count(reason), 1, f"times {reason!r} is in:\n{printed}")
        self.assertFalse(result.wasSuccessful())

    def test_when_all_tests_pass_the_runner_prints_its_usual_dots(self):
        suites = [unittest.TestSuite([Mixed("passes")]) for _ in range(9)]
        result, printed = self.run_in_lanes(*suites)
        self.assertEqual((result.testsRun, result.wasSuccessful()), (9, True), printed)
        self.assertIn(".........\n", printed)

    def test_a_lane_that_dies_fails_the_whole_run(self):
        with self.assertRaisesRegex(SystemExit, "Deadly.dies has died"):
            self.run_in_lanes(unittest.TestSuite([Deadly("dies")]))


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
