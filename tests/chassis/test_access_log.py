"""The log: the form of its lines, and that a service never stops because of its log."""
import io
import unittest
from unittest import mock

from microshop.chassis import access_log
from microshop.chassis.access_log import AccessLog, EventLimit
from tests.helpers import PATIENCE, wait_until

MOMENT = 1795379141.5  # 2026-11-22 20:25:41.5 UTC
TIME = "2026-11-22T20:25:41.500Z"


class BrokenPipe(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


class LogTest(unittest.TestCase):
    def setUp(self):
        self.printed = self.enterContext(mock.patch("sys.stderr", io.StringIO()))

    def logged(self, log, at=MOMENT):
        """Log a request and an event, and return the lines."""
        with mock.patch.object(access_log.time, "time", return_value=at):
            log.request("3f0c9a41", "GET", "/things/1", 200, 0.00041)
            log.event("- ready")
        log.flush()
        return self.printed.getvalue().splitlines()


class FormatTest(LogTest):
    def test_a_line_has_the_time_the_service_the_correlation_id_and_the_request(self):
        self.assertEqual([f"{TIME} things 3f0c9a41 GET /things/1 200 0.4ms",
                          f"{TIME} things - ready"],
                         self.logged(AccessLog("things", quiet=False)))

    def test_without_a_service_the_name_is_left_out_together_with_its_space(self):
        self.assertEqual([f"{TIME} 3f0c9a41 GET /things/1 200 0.4ms", f"{TIME} - ready"],
                         self.logged(AccessLog("", quiet=False)))

    def test_milliseconds_have_three_digits(self):
        line, _ = self.logged(AccessLog("things", quiet=False), at=MOMENT - 0.5 + 1 / 128)
        self.assertEqual("2026-11-22T20:25:41.007Z", line.split()[0])

    def test_a_quiet_log_leaves_out_requests_but_not_events(self):
        self.assertEqual([f"{TIME} things - ready"], self.logged(AccessLog("things", quiet=True)))

    def test_the_further_lines_of_an_event_cannot_be_taken_for_entries(self):
        log = AccessLog("things", quiet=False)
        log.event(f"- failed\n{TIME} things x GET / 200 1.0ms\r{TIME} things y")
        log.flush()
        first, *others = self.printed.getvalue().splitlines()
        self.assertRegex(first, "Z things - failed$")
        self.assertEqual([f"    {TIME} things x GET / 200 1.0ms", f"    {TIME} things y"], others)


class EventLimitTest(unittest.TestCase):
    """What is written of an event that happens often; the clock is moved by hand."""

    def setUp(self):
        self.now = 0.0
        self.limit = EventLimit(lambda: self.now)

    def admitted(self, count, kind="retry things"):
        """Return how many of `count` events at this moment may be written."""
        return [self.limit.admits(kind, f"event {n}") for n in range(count)].count(True)

    def test_a_long_outage_logs_ten_events_of_a_kind_and_then_a_line_a_minute(self):
        written, summaries = 0, []
        for _ in range(600):  # 225 events a second, for ten minutes
            written += self.admitted(225)
            self.now += 1
            summaries += self.limit.summaries()
        self.assertEqual((written, len(summaries)), (10, 10), summaries[:3])
        self.assertEqual(summaries[9], "- retry things: 13500 more in the last minute; "
                                       "the last one: event 224")

    def test_a_kind_begins_anew_after_a_minute_in_which_it_was_not_limited(self):
        self.admitted(12)
        self.now += 60
        self.assertEqual(len(self.limit.summaries()), 1, "two events were not written")
        self.assertEqual(self.admitted(1), 0, "the outage may go on: further events are counted")
        self.now += 60
        self.assertEqual(len(self.limit.summaries()), 1)
        self.now += 60
        self.assertEqual(self.limit.summaries(), [], "there was nothing to sum up")
        self.assertEqual(self.admitted(12), 10, "events that are written after a quiet minute")

    def test_each_kind_has_a_limit_of_its_own(self):
        self.admitted(1000, "retry things")
        self.assertEqual(self.admitted(1000, "breaker things"), 10)


class WritingTest(LogTest):
    def test_lines_are_written_without_anyone_asking_for_it(self):
        AccessLog("things", quiet=False).event("- ready")
        wait_until(lambda: self.printed.getvalue().endswith("- ready\n"))

    def test_events_of_a_kind_are_summed_up_when_their_minute_has_ended(self):
        self.enterContext(mock.patch.object(access_log, "LOOK", 0.01))
        log, clock = AccessLog("things", quiet=False), mock.Mock(return_value=0.0)
        log._limit = EventLimit(clock)
        for number in range(12):
            log.event(f"- event {number}\nwith details", "fault")
        clock.return_value = 60.0
        wait_until(lambda: "things - fault: 2 more in the last minute; the last one: - event 11\n"
                           "    with details\n" in self.printed.getvalue())

    def test_a_thread_that_adds_one_line_too_many_writes_them_all(self):
        with (mock.patch.object(access_log, "MAX_WAITING", 2),
              mock.patch.object(access_log, "GATHER", PATIENCE)):
            log = AccessLog("things", quiet=False)
            log.event("- first")
            wait_until(self.printed.getvalue)  # from now on, the log's own thread sleeps
            log.event("- second")
            log.event("- third")
            self.assertEqual(1, self.printed.getvalue().count("\n"), "two lines may wait")
            log.event("- fourth")
            self.assertEqual(4, self.printed.getvalue().count("\n"), "a third line may not wait")

    def test_a_log_that_cannot_be_written_does_not_stop_the_service(self):
        log = AccessLog("things", quiet=False)
        with mock.patch("sys.stderr", BrokenPipe()):
            log.event("- lost")
            log.flush()
        log.event("- found")
        log.flush()
        self.assertIn("- found\n", self.printed.getvalue())


if __name__ == "__main__":
    unittest.main()
