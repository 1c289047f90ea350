"""Which spans a process keeps, in how much memory, and that counting them disturbs nothing."""
import sys
import threading
import time
import unittest
from unittest import mock

from microshop.chassis import access_log
from microshop.chassis.metrics import format_metrics
from microshop.chassis.telemetry import (
    LAST, LAST_FAILED, LAST_NOTED, MAX_WAITING, SLOW_TIME, SLOWEST, Telemetry)
from microshop.chassis.tracing import ClientSpan, ServerSpan, Trace, format_span
from tests.chassis.things import Things
from tests.formats import parse_metrics
from tests.helpers import PATIENCE, ask, running, wait_until

UNSAMPLED = f"00-{'a' * 32}-{'b' * 16}-00"
TARGET = "/" + "x" * 300


def served(target="/things", status=200, seconds=0.001, trace=None, ended=None):
    """Return the span of a request that was answered."""
    return ServerSpan(trace or Trace("id"), "GET", target, "/things", status,
                      ended or time.time(), seconds)


class KeptTest(unittest.TestCase):
    def setUp(self):
        self.telemetry = Telemetry()

    def record(self, *spans):
        for span in spans:
            self.telemetry.record(span)

    def flush(self):
        """Record so many ordinary spans that none before them is among the last."""
        self.record(*[served("/ordinary") for _ in range(LAST)])

    def assert_kept(self, *targets):
        missing = set(targets) - set(self.targets())
        self.assertFalse(missing, "these spans were not kept")

    def assert_not_kept(self, target):
        self.assertFalse(target in self.targets(), f"{target} was kept")

    def fill_slowest(self):
        """Record so many slow spans that no other one is among the slowest."""
        self.record(*[served("/slowest", seconds=99) for _ in range(SLOWEST)])

    def targets(self):
        return [span.target for span in self.telemetry.spans()]

    def test_the_last_spans_are_kept_the_oldest_first(self):
        # So slow that the first ones are not the slowest.
        self.record(*[served(f"/{number}", seconds=number, ended=number + time.time())
                      for number in range(LAST + SLOWEST + 10)])
        numbers = [int(target[1:]) for target in self.targets()]
        self.assertEqual(numbers, list(range(SLOWEST + 10, LAST + SLOWEST + 10)))

    def test_load_does_not_push_out_a_span_that_failed(self):
        self.fill_slowest()
        self.record(served("/failed", status=503))
        self.flush()
        self.assert_kept("/failed")

    def test_load_does_not_push_out_a_span_in_which_something_was_noted(self):
        trace = Trace("id")
        trace.note("pending -> confirmed")
        self.fill_slowest()
        self.record(served("/noted", trace=trace))
        self.flush()
        self.assert_kept("/noted")

    def test_load_does_not_push_out_the_slowest_spans(self):
        self.record(*[served(f"/slow/{number}", seconds=1 + number) for number in range(SLOWEST)])
        self.record(served("/slower", seconds=1.5))
        self.flush()
        kept = {target for target in self.targets() if target.startswith("/slow")}
        expected = {"/slower", *[f"/slow/{number}" for number in range(1, SLOWEST)]}
        self.assertEqual(kept, expected, "the fastest of 51 slow spans must have made room")

    def test_a_slow_span_does_not_stay_among_the_slowest_forever(self):
        long_ago = time.time() - SLOW_TIME - 1
        self.record(*[served("/old", seconds=9, ended=long_ago) for _ in range(SLOWEST)])
        self.flush()
        self.telemetry.digest()
        self.record(served("/new", seconds=8))
        self.flush()
        self.assert_not_kept("/old")
        self.assert_kept("/new")

    def test_a_client_may_ask_for_its_spans_not_to_be_kept(self):
        self.fill_slowest()
        self.record(served("/unsampled", trace=Trace("id", UNSAMPLED)))
        self.assert_not_kept("/unsampled")

    def test_a_client_cannot_hide_that_its_request_failed_or_was_slow(self):
        self.record(served("/failed", status=500, trace=Trace("id", UNSAMPLED)),
                    served("/slow", seconds=9, trace=Trace("id", UNSAMPLED)))
        self.flush()
        self.assert_kept("/failed", "/slow")

    def test_each_span_is_shown_once_though_it_may_be_kept_for_several_reasons(self):
        trace = Trace("id")
        trace.note("pending -> confirmed")
        self.record(served("/once", status=500, seconds=9, trace=trace))
        self.assertEqual(self.targets(), ["/once"])


class MemoryTest(unittest.TestCase):
    def test_no_more_spans_are_kept_than_stated_however_many_are_recorded(self):
        observed = Telemetry()
        for _ in range(10):
            for status in (200, 503):
                for seconds in (0.001, 9):
                    trace = Trace("id")
                    trace.note("moved")
                    for _ in range(LAST):
                        observed.record(served(TARGET, status, seconds, trace))
            observed.digest()
        most = LAST + LAST_FAILED + LAST_NOTED + SLOWEST
        self.assertLessEqual(len(observed.spans()), most)
        self.assertEqual(most, 750, "the number that the module's docstring states")

    def test_a_span_is_below_the_stated_2_kib(self):
        trace = Trace("i" * 64, f"00-{'a' * 32}-{'b' * 16}-01", "s" * 512)
        span = served("t" * 200, trace=trace)
        parts = [span, trace, *span, *[getattr(trace, name) for name in Trace.__slots__]]
        self.assertLess(sum(map(sys.getsizeof, {id(part): part for part in parts}.values())), 2048)

    def test_long_targets_are_recorded_only_to_the_200th_character(self):
        with running(Things) as service:
            ask(service.server_port, target=TARGET)
            wait_until(service.telemetry.spans, "a span to be recorded")
            [span] = service.telemetry.spans()
        self.assertEqual(span.target, TARGET[:200])

    def test_spans_are_counted_even_while_the_thread_of_the_log_is_stuck(self):
        is_stuck, go_on = threading.Event(), threading.Event()

        def write(descriptor, content):
            is_stuck.set()
            go_on.wait(PATIENCE)

        with (running(Things, quiet=False) as service,
              mock.patch.object(access_log, "write_whole", write)):
            self.addCleanup(go_on.set)
            ask(service.server_port, target="/things")
            self.assertTrue(is_stuck.wait(PATIENCE), "the log's thread has nothing to write")
            for _ in range(MAX_WAITING + 1):
                service.telemetry.record(served())
            wait_until(lambda: not service.telemetry._waiting,
                       "the accept loop to count what the log's thread does not")
            go_on.set()


class CountTest(unittest.TestCase):
    def test_the_thread_of_the_log_counts_soon_even_if_no_request_is_logged(self):
        for quiet in (True, False):
            with self.subTest(quiet=quiet), running(Things, quiet=quiet) as service:
                ask(service.server_port, target="/things")
                wait_until(lambda: service.telemetry._last, "a span to be counted by that thread")

    def test_recording_is_one_append_and_nothing_else(self):
        observed = Telemetry()
        self.assertIs(observed.record.__self__, observed._waiting)
        self.assertEqual(observed.record.__name__, "append")

    def test_no_span_is_counted_twice_or_lost_by_threads_that_record_and_count_at_once(self):
        observed, span = Telemetry(), served()

        def work():
            for _ in range(200):
                observed.record(span)
                observed.digest()

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        metrics = parse_metrics(format_metrics(observed.families([])).encode())
        self.assertEqual(metrics.total("http_server_request_duration_seconds_count"), 1600)

    def test_a_call_with_a_method_that_a_client_made_up_is_counted_as_other(self):
        observed = Telemetry()
        for number in range(100):
            observed.record(ClientSpan(Trace("id"), "a" * 16, "things", "http://127.0.0.1:1",
                                       f"BREW{number}", "/", 1, 501, "", time.time(), 0.1))
        observed.digest()
        self.assertEqual(len(observed._tries._rows), 1, "rows of the histogram")


class FormatTest(unittest.TestCase):
    def test_a_span_that_took_no_time_lasts_a_microsecond_since_zipkin_wants_more_than_zero(self):
        self.assertEqual(format_span(served(seconds=0.0), "things", "1")["duration"], 1)


if __name__ == "__main__":
    unittest.main()
