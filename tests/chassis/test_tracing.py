"""The place of a process's work in a trace: what is taken from its caller, and what is sent on."""
import unittest

from microshop.chassis.tracing import MAX_TIMINGS, Trace, make_span_id
from tests.formats import parse_server_timing, parse_traceparent

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GIVEN = f"00-{TRACE_ID}-{PARENT_ID}-01"


class TraceTest(unittest.TestCase):
    def test_a_trace_that_the_caller_began_is_continued(self):
        trace = Trace("id", GIVEN, "shop=1")
        self.assertEqual((trace.trace_id, trace.parent_id, trace.state),
                         (TRACE_ID, PARENT_ID, "shop=1"))
        self.assertNotEqual(trace.span_id, PARENT_ID)

    def test_without_a_valid_traceparent_a_new_trace_begins(self):
        for given in ("", GIVEN[:-1], GIVEN.upper(), f"{GIVEN}-x", f"ff{GIVEN[2:]}",
                      f"00-{'0' * 32}-{PARENT_ID}-01", f"00-{TRACE_ID}-{'0' * 16}-01",
                      f"{GIVEN}, {GIVEN}", f"cc{GIVEN[2:]}x", f"{GIVEN}\n"):
            with self.subTest(given):
                trace = Trace("id", given, "shop=1")
                self.assertNotEqual(trace.trace_id, TRACE_ID)
                self.assertEqual((trace.parent_id, trace.state), ("", ""))
                parse_traceparent(trace.headers(make_span_id())["traceparent"])

    def test_a_later_version_is_read_by_its_first_four_fields_and_sent_on_as_00(self):
        for given in (f"01{GIVEN[2:]}", f"cc{GIVEN[2:]}-more-fields"):
            with self.subTest(given):
                sent = Trace("id", given).headers("1" * 16)["traceparent"]
                self.assertEqual(sent, f"00-{TRACE_ID}-{'1' * 16}-01")

    def test_the_known_flags_are_sent_on_and_no_others(self):
        for given, expected in (("00", "00"), ("01", "01"), ("02", "02"), ("03", "03"),
                                ("04", "00"), ("ff", "03")):
            sent = Trace("id", GIVEN[:-2] + given).headers("1" * 16)["traceparent"]
            self.assertEqual(sent[-2:], expected, f"flags sent on for {given}")

    def test_every_try_sends_its_own_id_and_the_request_id(self):
        trace = Trace("id-1", GIVEN, "shop=1")
        for span_id in ("1" * 16, "2" * 16):
            self.assertEqual(trace.headers(span_id), {
                "x-request-id": "id-1", "traceparent": f"00-{TRACE_ID}-{span_id}-01",
                "tracestate": "shop=1"})


class ServerTimingTest(unittest.TestCase):
    def test_the_entries_about_others_never_make_a_head_large(self):
        trace = Trace("id")
        for number in range(1000):
            trace.add_timing(f"things-{number};dur=1.234")
        self.assertLessEqual(sum(map(len, trace.timings)), MAX_TIMINGS)
        self.assertGreater(len(parse_server_timing(", ".join(trace.timings))), 50)

    def test_a_service_without_the_header_adds_nothing(self):
        trace = Trace("id")
        trace.add_timing("")
        self.assertEqual(trace.timings, [])


if __name__ == "__main__":
    unittest.main()
