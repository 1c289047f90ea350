"""Lanes report what one would: each kind of trouble, once, and a process that dies."""
import io
import os
import unittest

from tests import Lanes


class Mixed(unittest.TestCase):
    def well(self):
        pass

    def fails(self):
        self.fail("as it should")

    def breaks(self):
        raise ZeroDivisionError("as it should")

    def is_skipped(self):
        self.skipTest("today")

    def fails_in_part(self):
        for number in (1, 2):
            with self.subTest(number=number):
                self.assertEqual(number, 1)


class Unready(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        raise OSError("no ground to stand on")

    def well(self):
        pass


class Deadly(unittest.TestCase):
    def dies(self):
        os._exit(1)


@unittest.skipUnless(hasattr(os, "fork"), "this system cannot fork: there is one lane")
class LanesTest(unittest.TestCase):
    def run_in_lanes(self, *suites: unittest.TestSuite) -> tuple[unittest.TestResult, str]:
        printed = io.StringIO()
        return unittest.TextTestRunner(printed).run(Lanes(suites)), printed.getvalue()

    def test_each_trouble_is_told_once_with_its_reason(self):
        names = ("well", "fails", "breaks", "is_skipped", "fails_in_part")
        result, printed = self.run_in_lanes(unittest.TestSuite(map(Mixed, names)),
                                            unittest.TestSuite([Unready("well")]), unittest.TestSuite([Mixed("well")]))
        self.assertEqual((result.testsRun, len(result.failures), len(result.errors), len(result.skipped)), (7, 2, 2, 1))
        for reason in ("AssertionError: as it should", "ZeroDivisionError: as it should", "fails_in_part (number=2)",
                       "OSError: no ground to stand on"):
            self.assertEqual(printed.count(reason), 1, printed)
        self.assertFalse(result.wasSuccessful())

    def test_all_that_is_well_is_told_as_ever(self):
        result, printed = self.run_in_lanes(*[unittest.TestSuite([Mixed("well")]) for _ in range(9)])
        self.assertEqual((result.testsRun, result.wasSuccessful()), (9, True))
        self.assertIn(".........\n", printed)

    def test_a_process_that_dies_is_no_success(self):
        with self.assertRaisesRegex(SystemExit, "Deadly.dies has died"):
            self.run_in_lanes(unittest.TestSuite([Deadly("dies")]))


if __name__ == "__main__":
    unittest.main()
