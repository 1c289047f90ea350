"""The log: the form of its lines, and that nothing but its own thread waits for its reader."""
import errno
import os
import select
import threading
import unittest
from unittest import mock

from microshop.chassis import access_log
from microshop.chassis.access_log import AT_ONCE, AccessLog, EventLimit
from tests.helpers import PATIENCE, fill, flush

MOMENT = 1795379141.5  # 2026-11-22 20:25:41.5 UTC
TIME = "2026-11-22T20:25:41.500Z"


class LogTest(unittest.TestCase):
    """A log that writes to a pipe, which is read only when a test has finished with the log."""

    def setUp(self):
        self.digested = threading.Event()

    def digest(self):
        self.digested.set()

    def open(self, service="things", quiet=False):
        self.reader, self.writer = os.pipe()
        self.enterContext(mock.patch.object(access_log, "STDERR", self.writer))
        return AccessLog(service, quiet, self.digest)

    def finish(self, log):
        """Close a log, and return the lines that it has written."""
        def close():
            log.close()
            log._writer.join(PATIENCE)
            os.close(self.writer)

        closing = threading.Thread(target=close)
        closing.start()
        with open(self.reader, encoding="utf-8") as pipe:
            lines = pipe.read().splitlines()
        closing.join()
        return lines


class FormatTest(LogTest):
    def logged(self, log, at=MOMENT):
        """Log a request and an event, and return the lines."""
        with mock.patch.object(access_log.time, "time", return_value=at):
            log.request("3f0c9a41", "GET", "/things/1", 200, 0.00041)
            log.event("- ready")
        return self.finish(log)

    def test_a_line_has_the_time_the_service_the_correlation_id_and_the_request(self):
        self.assertEqual([f"{TIME} things 3f0c9a41 GET /things/1 200 0.4ms",
                          f"{TIME} things - ready"],
                         self.logged(self.open()))

    def test_without_a_service_the_name_is_left_out_together_with_its_space(self):
        self.assertEqual([f"{TIME} 3f0c9a41 GET /things/1 200 0.4ms", f"{TIME} - ready"],
                         self.logged(self.open(service="")))

    def test_milliseconds_have_three_digits(self):
        line, _ = self.logged(self.open(), at=MOMENT - 0.5 + 1 / 128)
        self.assertEqual("2026-11-22T20:25:41.007Z", line.split()[0])

    def test_a_quiet_log_leaves_out_requests_but_not_events(self):
        self.assertEqual([f"{TIME} things - ready"], self.logged(self.open(quiet=True)))

    def test_the_further_lines_of_an_event_cannot_be_taken_for_entries(self):
        log = self.open()
        log.event(f"- failed\n{TIME} things x GET / 200 1.0ms\r{TIME} things y")
        first, *others = self.finish(log)
        self.assertRegex(first, "Z things - failed$")
        self.assertEqual([f"    {TIME} things x GET / 200 1.0ms", f"    {TIME} things y"], others)

    def test_text_that_is_not_unicode_does_not_end_the_log(self):
        log = self.open()
        log.event("- cannot open /data/\udcff.db")
        self.assertRegex("".join(self.finish(log)), r"- cannot open /data/\\udcff.db$")


class EventLimitTest(unittest.TestCase):
    """What is written of an event that happens often."""

    def setUp(self):
        self.limit = EventLimit()

    def admitted(self, count, kind="retry things"):
        """Return how many of `count` events may be written."""
        return [self.limit.admits(kind, f"event {n}") for n in range(count)].count(True)

    def test_a_long_outage_logs_ten_events_of_a_kind_and_then_a_line_a_minute(self):
        written, summaries = 0, []
        for _ in range(3):
            written += self.admitted(13500)
            summaries += self.limit.end_minute()
        text = "- retry things: {} more in the last minute; the last one: event 13499"
        self.assertEqual(summaries, [text.format(13490), text.format(13500), text.format(13500)])
        self.assertEqual(written, 10)

    def test_a_kind_begins_anew_after_a_minute_in_which_it_was_not_limited(self):
        self.admitted(12)
        self.assertEqual(len(self.limit.end_minute()), 1, "two events were not written")
        self.assertEqual(self.admitted(1), 0, "the outage may go on: further events are counted")
        self.assertEqual(len(self.limit.end_minute()), 1)
        self.assertEqual(self.limit.end_minute(), [], "there was nothing to sum up")
        self.assertEqual(self.admitted(12), 10, "events that are written after a quiet minute")

    def test_each_kind_has_a_limit_of_its_own(self):
        self.admitted(1000, "retry things")
        self.assertEqual(self.admitted(1000, "breaker things"), 10)


class WritingTest(LogTest):
    def test_lines_are_written_without_anyone_asking_for_it(self):
        log = self.open()
        log.event("- ready")
        self.assertIn(b"- ready", os.read(self.reader, 1000))
        self.finish(log)

    def test_the_further_events_of_a_minute_are_summed_up_although_nothing_else_is_logged(self):
        self.enterContext(mock.patch.object(access_log, "MINUTE", 0.05))
        log = self.open()
        for number in range(1000):
            log.event(f"- event {number}", "fault")
        output = b""
        while b" more in the last minute; " not in output:
            has_more, _, _ = select.select([self.reader], [], [], PATIENCE)
            self.assertTrue(has_more, "the log did not sum up the events of a minute")
            output += os.read(self.reader, 1000)
        self.finish(log)

    def test_what_was_counted_of_a_kind_of_events_is_summed_up_when_the_log_is_closed(self):
        log = self.open()
        for number in range(AT_ONCE + 2):
            log.event(f"- event {number}\nwith details", "fault")
        lines = self.finish(log)
        self.assertEqual(len(lines), 2 * (AT_ONCE + 1), lines)
        self.assertRegex(lines[-2], "- fault: 2 more in the last minute; the last one: - event 11$")
        self.assertEqual(lines[-1], "    with details")

    def test_a_log_that_nothing_reads_loses_lines_and_counts_them_but_delays_nothing(self):
        self.enterContext(mock.patch.multiple(access_log, MAX_WAITING=3, CLOSE_TIME=0.01))
        log = self.open()
        fill(self.writer)

        def use_log():
            for number in range(8):
                log.event(f"- line {number}")
            log.close()

        using = threading.Thread(target=use_log, daemon=True)
        using.start()
        using.join(PATIENCE)
        self.assertFalse(using.is_alive(), "a thread that used the log waits for its reader")
        texts = [line.partition(" things - ")[2] for line in self.finish(log) if line]
        self.assertEqual(texts, ["line 0", "line 1", "line 2",
                                 "lines lost here because they could not be written: 5"])

    def test_a_pipe_in_non_blocking_mode_that_is_read_late_gets_every_line_whole(self):
        log = self.open()
        count = fill(self.writer) // 10  # lines; each has more than ten bytes
        os.set_blocking(self.writer, False)
        for number in range(count):
            log.event(f"- {number}")
        numbers = [line.rpartition(" ")[2] for line in self.finish(log) if line]
        self.assertEqual(numbers, [str(number) for number in range(count)])

    def test_a_log_whose_reader_has_gone_does_not_end_its_thread(self):
        log = self.open()
        reader, gone = os.pipe()
        os.close(reader)
        with mock.patch.object(access_log, "STDERR", gone):
            log.event("- lost")
            flush(log)
        os.close(gone)
        log.event("- found")
        texts = [line.partition(" things - ")[2] for line in self.finish(log)]
        self.assertEqual(texts, ["found", "lines lost here because they could not be written: 1"])

    def test_of_lines_that_were_written_in_part_only_the_others_count_as_lost(self):
        log = self.open()
        disk = mock.Mock(side_effect=[60, OSError(errno.ENOSPC, "No space left on device")])
        with mock.patch.object(access_log.os, "write", disk):
            log._lines.extend(["a" * 40 + "\n", "b" * 40 + "\n", "c" * 40 + "\n"])
            log._wake.set()
            flush(log)
        log.event("- found")
        texts = [line.partition(" things - ")[2] for line in self.finish(log)]
        self.assertEqual(texts, ["found", "lines lost here because they could not be written: 2"])


if __name__ == "__main__":
    unittest.main()
