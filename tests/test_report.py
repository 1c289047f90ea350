"""Tests of the report: it must notice a check that fails, and a tool that fails or hangs."""
import contextlib
import io
import sys
import unittest
from unittest import mock

from tests import report
from tests.formats import FormatError


class CheckTest(unittest.TestCase):
    def check(self, function, *arguments):
        """Return how many failures were counted, and what was printed."""
        checks = report.Report()
        with contextlib.redirect_stdout(io.StringIO()) as output:
            checks.check("/metrics", function, *arguments)
        return checks.failures, output.getvalue()

    def test_a_check_prints_a_line_and_more_only_if_it_failed(self):
        self.assertEqual(self.check(lambda: None), (0, "ok      /metrics\n"))
        self.assertEqual(self.check(str, 7), (0, "ok      /metrics: 7\n"))
        for error in (report.Failed("no\nHELP"), FormatError("no\nHELP")):
            self.assertEqual(self.check(mock.Mock(side_effect=error)),
                             (1, "FAILED  /metrics:\n        no\n        HELP\n"))

    def test_a_tool_that_fails_or_hangs_is_noticed(self):
        self.assertEqual(report.run_tool(["cat"], b"text"), "text")
        with self.assertRaisesRegex(report.Failed, "^wrong$"):
            report.run_tool([sys.executable, "-c", "print('wrong'); raise SystemExit(3)"])
        with (mock.patch.object(report, "TOOL_TIME", 0.1),
              self.assertRaisesRegex(report.Failed, "took longer than 0.1 s")):
            report.run_tool(["sleep", "60"])


if __name__ == "__main__":
    unittest.main()
