"""The parsers of formats.py: they read what is correct, and refuse what breaks a rule.

Each wrong sample breaks one rule, and is listed with a part of the message that says so.
"""
import json
import math
import unittest
from collections.abc import Callable
from typing import Any

from tests.formats import (
    FormatError, Timing, parse_metrics, parse_server_timing, parse_spans, parse_traceparent,
    parse_tracestate)

REQUESTS = "# HELP requests_total Requests.\n# TYPE requests_total counter\n"
SECONDS = "# HELP wait_seconds Waits.\n# TYPE wait_seconds histogram\n"
WAITS = SECONDS + (
    'wait_seconds_bucket{le="0.1"} 1\n'
    'wait_seconds_bucket{le="1"} 3\n'
    'wait_seconds_bucket{le="+Inf"} 3\n'
    "wait_seconds_sum 0.75\n"
    "wait_seconds_count 3\n")

WRONG_METRICS = [  # a text, and what the message says of it
    ("", "does not end with a line feed"),
    (REQUESTS + "requests_total 1", "does not end with a line feed"),
    (REQUESTS + "requests_total 1\r\n", "'1\\r' is not a number"),
    (REQUESTS + 'requests_total{path="\udcff"} 1\n', "not UTF-8"),
    ("# TYPE requests_total counter\nrequests_total 1\n", "has no HELP line"),
    ("# HELP requests_total Requests.\nrequests_total 1\n", "has no TYPE line"),
    ("requests_total 1\n" + REQUESTS, "HELP of requests_total comes after its first sample"),
    (REQUESTS + "requests_total 1\n# HELP requests_total Requests.\n", "comes after its first"),
    (REQUESTS + "# HELP requests_total Requests.\n", "a second HELP line"),
    (REQUESTS + "# TYPE requests_total counter\n", "a second TYPE line"),
    ("# TYPE requests_total count\n", "'count' is not one of the types"),
    ("# TYPE requests_total\n", "'' is not one of the types"),
    ("# HELP 1x Requests.\n", "'1x' is not the name of a metric"),
    ("# HELP requests_total A tab: \\t.\n", "is not an escape"),
    (REQUESTS + "requests_total 1\n" + WAITS + 'requests_total{a="b"} 1\n', "are not together"),
    (REQUESTS + WAITS + "requests_total 1\n", "are not together"),
    (REQUESTS + "requests-total 1\n", "'requests-total' is not the name of a metric"),
    (REQUESTS + "shop:requests_total 1\n", "is not the name of a metric"),
    (REQUESTS + "requests_total\n", "'' is not a number"),
    (REQUESTS + "requests_total 1_000\n", "'1_000' is not a number"),
    (REQUESTS + "requests_total ١\n", "is not a number"),
    (REQUESTS + "requests_total nan\n", "'nan' is not a number"),
    (REQUESTS + "requests_total 1 now\n", "is not a time"),
    (REQUESTS + "requests_total 1 2 3\n", "is not a time"),
    (REQUESTS + 'requests_total{path="/"} 1\nrequests_total{path="/"} 2\n', "a second sample"),
    (REQUESTS + 'requests_total{a="1",b="2"} 1\nrequests_total{b="2",a="1"} 2\n', "second sample"),
    (REQUESTS + 'requests_total{a="1",a="2"} 1\n', "the label a twice"),
    (REQUESTS + 'requests_total{1a="1"} 1\n', "'1a' is not the name of a label"),
    (REQUESTS + 'requests_total{__a="1"} 1\n', "'__a' is not the name of a label"),
    (REQUESTS + 'requests_total{a:b="1"} 1\n', "'a:b' is not the name of a label"),
    (REQUESTS + 'requests_total{a="1" b="2"} 1\n', "expected label="),
    (REQUESTS + 'requests_total{,a="1"} 1\n', "expected label="),
    (REQUESTS + 'requests_total{a="1",,b="2"} 1\n', "expected label="),
    (REQUESTS + "requests_total{a=1} 1\n", "expected label="),
    (REQUESTS + 'requests_total{a="1} 1\n', "expected label="),
    (REQUESTS + 'requests_total{a="say "hi""} 1\n', "expected label="),
    (REQUESTS + 'requests_total{a="two\nlines"} 1\n', "expected label="),
    (REQUESTS + 'requests_total{a="C:\\temp"} 1\n', "is not an escape"),
    (REQUESTS + "requests_total -1\n", "a counter is a number >= 0"),
    (REQUESTS + "requests_total NaN\n", "a counter is a number >= 0"),
    (REQUESTS + 'requests_total{le="1"} 1\n', "le is for the buckets of histograms"),
    (REQUESTS.replace("_total", "") + "requests 1\n", "end in _total"),
    (REQUESTS.replace("counter", "gauge") + "requests_total 1\n", "end in _total"),
    (REQUESTS.replace("_total", "_count").replace("counter", "gauge"), "like a part of a histo"),
    (WAITS.replace("_seconds", "_milliseconds"), "milliseconds is not a base unit"),
    (WAITS.replace("_seconds", "_ms"), "ms is not a base unit"),
    (SECONDS + "wait_seconds 3\n", "has only the samples wait_seconds_bucket"),
    (WAITS.replace("wait_seconds_sum 0.75\n", ""), "has no wait_seconds_sum"),
    (WAITS.replace("wait_seconds_count 3\n", ""), "has no wait_seconds_count"),
    (WAITS.replace('wait_seconds_bucket{le="+Inf"} 3\n', ""), 'no last bucket le="+Inf"'),
    (WAITS.replace("_count 3", "_count 4"), "but wait_seconds_count is 4"),
    (WAITS.replace('"1"} 3', '"1"} 4'), "a bucket holds less than the one before it"),
    (WAITS.replace('"0.1"', '"2"'), "not in the order of le"),
    (WAITS.replace('"0.1"', '"1.0"'), "not in the order of le"),
    (WAITS.replace('"0.1"} 1', '"0.1"} 0.5'), "does not hold a whole number"),
    (WAITS.replace('{le="0.1"}', ""), "a bucket needs le"),
    (WAITS.replace('"0.1"', '"low"'), "a bucket needs le"),
    (WAITS + 'wait_seconds_count{a="b"} 0\nwait_seconds_sum{a="b"} 0\n', 'no last bucket le="+I'),
]


class WrongSamples:
    """A mixin: the assertion that all of the tests of wrong samples share."""

    def assert_refused(self, parse: Callable[[Any], object],
                       samples: list[tuple[Any, str]]) -> None:
        for sample, message in samples:
            with self.subTest(sample):
                try:
                    parsed = parse(sample)
                except FormatError as error:
                    self.assertIn(message, str(error))
                else:
                    self.fail(f"{sample!r} was accepted, as {parsed!r}; expected: {message}")


class MetricsTest(WrongSamples, unittest.TestCase):
    def test_what_breaks_a_rule_is_refused(self):
        self.assert_refused(
            lambda text: parse_metrics(text.encode(errors="surrogateescape")), WRONG_METRICS)

    def test_a_message_says_in_which_line_the_error_is(self):
        with self.assertRaisesRegex(FormatError, "line 3, 'requests_total one': the value 'one'"):
            parse_metrics((REQUESTS + "requests_total one\n").encode())

    def test_families_have_their_type_their_help_and_their_samples(self):
        metrics = parse_metrics((WAITS + REQUESTS + "requests_total 5 1700000000000\n").encode())
        family = metrics["wait_seconds"]
        self.assertEqual((family.type, family.help), ("histogram", "Waits."))
        self.assertEqual(family.samples["wait_seconds_bucket", (("le", "1"),)], 3)
        self.assertEqual(metrics["requests_total"].samples, {("requests_total", ()): 5})

    def test_escapes_blanks_comments_and_empty_lines_are_read(self):
        text = (REQUESTS.replace("Requests.", r"Back\\slash\nnew line") + "\n# a comment\n#\n"
                'requests_total { b = "\\"\\\\n\\n}{,\\"" , a="" , }\t+1.5e+03\n')
        family = parse_metrics(text.encode())["requests_total"]
        self.assertEqual(family.help, "Back\\slash\nnew line")
        labels = (("a", ""), ("b", '"\\n\n}{,"'))
        self.assertEqual(family.samples, {("requests_total", labels): 1500})

    def test_a_gauge_may_be_negative_infinite_or_no_number(self):
        for text, value in (("-1", -1), ("-Inf", -math.inf), ("NaN", math.nan), (".5", 0.5)):
            lines = f"# HELP level Level.\n# TYPE level gauge\nlevel {text}\n"
            found = parse_metrics(lines.encode())["level"].samples["level", ()]
            self.assertEqual(str(found), str(float(value)), text)

    def test_samples_are_found_by_their_labels(self):
        metrics = parse_metrics((REQUESTS + 'requests_total{path="/",status="200"} 1\n'
                                 'requests_total{path="/",status="404"} 2\n'
                                 'requests_total{status="404"} 4\n').encode())
        self.assertEqual(metrics.total("requests_total"), 7)
        self.assertEqual(metrics.total("requests_total", status="404"), 6)
        self.assertEqual(metrics.find("requests_total", status="404", path=""),
                         [({"status": "404"}, 4)])
        self.assertEqual(metrics.total("other_total"), 0)


WRONG_TIMINGS = [
    ("", "expected the name of an entry"),
    (",users", "expected the name of an entry"),
    ("users,", "expected the name of an entry"),
    ("users,,gateway", "expected the name of an entry"),
    (" users", "expected the name of an entry"),
    ("the users", "expected a comma or a semicolon"),
    ("users ", "expected a comma or a semicolon"),
    ("users;dur=1 2", "expected a comma or a semicolon"),
    ('users;desc="a"b', "expected a comma or a semicolon"),
    ("users;", "expected dur or desc"),
    ("users;dur", "expected = after dur"),
    ("users;dur=", "expected a token or a quoted string"),
    ('users;desc="a', "expected a token or a quoted string"),
    ('users;desc="a\nb"', "expected a token or a quoted string"),
    ("users;dur=1ms", "dur=1ms is not a number"),
    ("users;dur=-1", "dur=-1 is not a number"),
    ("users;dur=1e-05", "dur=1e-05 is not a number"),
    ("users;dur=nan", "dur=nan is not a number"),
    ("users;dur=1;dur=2", "dur twice"),
    ("users;duration=1", "'duration' is not one of the parameters"),
]


class ServerTimingTest(WrongSamples, unittest.TestCase):
    def test_what_breaks_a_rule_is_refused(self):
        self.assert_refused(parse_server_timing, WRONG_TIMINGS)

    def test_entries_have_a_name_a_duration_and_a_description(self):
        for text, entries in (
                ("users;dur=0.412, gateway;dur=1",
                 [Timing("users", 0.412), Timing("gateway", 1.0)]),
                ("miss,db ; DUR = 53 ;desc=\"a \\\"b\\\", c;d\"\t,x;desc=token;dur=\"2\"",
                 [Timing("miss"), Timing("db", 53.0, 'a "b", c;d'), Timing("x", 2.0, "token")])):
            self.assertEqual(parse_server_timing(text), entries, text)


SPAN = {
    "traceId": "5af7183fb1d4cf5f5af7183fb1d4cf5f", "id": "6b221d5bc9e6496c",
    "parentId": "352bff9a74ca9ad2", "kind": "CLIENT", "name": "get /users/{id}",
    "timestamp": 1764193000000000, "duration": 412, "localEndpoint": {"serviceName": "gateway"},
    "remoteEndpoint": {"serviceName": "users", "port": 3001}, "tags": {"http.path": "/users/1"},
    "annotations": [{"timestamp": 1764193000000001, "value": "sent"}]}

WRONG_SPANS = [  # members that replace those of SPAN; None: without it
    ({"traceId": None}, "a span has no traceId"),
    ({"id": None}, "a span has no id"),
    ({"name": None}, "a span has no name"),
    ({"timestamp": None}, "a span has no timestamp"),
    ({"duration": None}, "a span has no duration"),
    ({"localEndpoint": None}, "a span has no localEndpoint"),
    ({"traceId": "5AF7183FB1D4CF5F"}, "traceId is not 16 or 32 lower-case hex digits"),
    ({"traceId": "5af7183fb1d4cf5f5af7183f"}, "traceId is not 16 or 32"),
    ({"traceId": "0" * 32}, "traceId is not 16 or 32 lower-case hex digits, or all are 0"),
    ({"id": "0" * 16}, "id is not 16 lower-case hex digits, or all are 0"),
    ({"id": "6b221d5bc9e6496"}, "id is not 16"),
    ({"id": "6b221d5bc9e6496c\n"}, "id is not 16"),
    ({"id": 12}, "id of a span is 12: expected a value of type str"),
    ({"parentId": ""}, "parentId is not 16"),
    ({"parentId": "0" * 16}, "parentId is not 16"),
    ({"parentId": SPAN["id"]}, "the span is its own parent"),
    ({"kind": "LOCAL"}, "the kind 'LOCAL' is not one of"),
    ({"kind": "client"}, "the kind 'client' is not one of"),
    ({"name": ""}, "name is ''"),
    ({"name": "GET /users"}, "a lower-case text is needed"),
    ({"timestamp": 0}, "timestamp is 0: at least 1 microsecond"),
    ({"timestamp": 1764193000.5}, "expected a value of type int"),
    ({"timestamp": "1764193000"}, "expected a value of type int"),
    ({"duration": 0}, "duration is 0: at least 1 microsecond"),
    ({"duration": True}, "duration of a span is true: expected a value of type int"),
    ({"localEndpoint": {}}, "localEndpoint has no serviceName"),
    ({"localEndpoint": {"serviceName": ""}}, "serviceName of localEndpoint is ''"),
    ({"localEndpoint": {"serviceName": "gateway", "host": "a"}}, "unknown member 'host'"),
    ({"remoteEndpoint": {"serviceName": "users", "port": "3001"}}, 'port of remoteEndpoint is "3'),
    ({"tags": {"status": 200}}, "the tag status is 200, not a string"),
    ({"tags": {"status": [None]}}, "the tag status is [null], not a string"),
    ({"tags": []}, "tags of a span is []"),
    ({"annotations": {}}, "annotations of a span is {}"),
    ({"annotations": ["sent"]}, "an annotation is not an object"),
    ({"annotations": [{"value": "sent"}]}, "an annotation has no timestamp"),
    ({"annotations": [{"timestamp": 1.5, "value": "sent"}]}, "timestamp of an annotation is 1.5"),
    ({"annotations": [{"timestamp": 0, "value": "sent"}]}, "timestamp of an annotation is 0"),
    ({"annotations": [{"timestamp": 1, "value": "sent", "key": "a"}]}, "unknown member 'key'"),
    ({"status": "200"}, "a span has an unknown member 'status'"),
]

WRONG_SPAN_LISTS = [
    ("", "not JSON"),
    ("{}", "the spans are not in a list"),
    ("[1]", "span 0, 1: a span is not an object"),
    ('[{"kind": null}]', "kind of a span is null"),
    ('[{"id": "a", "id": "b"}]', "a member twice"),
    ('[{"duration": NaN}]', "NaN is not JSON"),
    ('["\udcff"]', "not JSON"),
    (json.dumps([{**SPAN, "tags": {"http.path": "/\ud800"}}]), "is half a character"),
    (json.dumps([SPAN, SPAN]), "span 1, "),
    (json.dumps([SPAN, SPAN]), "another span has the same id"),
]


def with_changes(changes: dict) -> bytes:
    """Return the JSON of a list with SPAN, after these members were replaced."""
    span = {**SPAN, **changes}
    return json.dumps([{name: value for name, value in span.items() if value is not None}]).encode()


class SpansTest(WrongSamples, unittest.TestCase):
    def test_what_breaks_a_rule_is_refused(self):
        self.assert_refused(lambda changes: parse_spans(with_changes(changes)), WRONG_SPANS)
        self.assert_refused(lambda text: parse_spans(text.encode(errors="surrogateescape")),
                            WRONG_SPAN_LISTS)

    def test_correct_spans_are_returned(self):
        for changes in ({}, {"traceId": "5af7183fb1d4cf5f"}, {"parentId": None}, {"kind": None},
                        {"tags": None}, {"annotations": None}, {"remoteEndpoint": None},
                        {"tags": {"http.path": "/\U0001f6d2"}}):
            content = with_changes(changes)
            self.assertEqual(parse_spans(content), json.loads(content), changes)
        self.assertEqual(parse_spans(b"[]"), [])


TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

WRONG_PARENTS = [
    ("", "is not four fields"),
    (f"00-{TRACE_ID}-{PARENT_ID}", "is not four fields"),
    (f"00-{TRACE_ID}-{PARENT_ID}-01-x", "is not four fields"),
    (f"00-{TRACE_ID.upper()}-{PARENT_ID}-01", "is not four fields"),
    (f"00-{TRACE_ID}-{PARENT_ID[1:]}-01", "is not four fields"),
    (f"00-{TRACE_ID}-{PARENT_ID}-1", "is not four fields"),
    (f" 00-{TRACE_ID}-{PARENT_ID}-01", "is not four fields"),
    (f"00-{TRACE_ID}-{PARENT_ID}-01\n", "is not four fields"),
    (f"01-{TRACE_ID}-{PARENT_ID}-01", "the version is 01, not 00"),
    (f"ff-{TRACE_ID}-{PARENT_ID}-01", "the version is ff, not 00"),
    (f"00-{'0' * 32}-{PARENT_ID}-01", "all digits of the trace-id are 0"),
    (f"00-{TRACE_ID}-{'0' * 16}-01", "all digits of the parent-id are 0"),
    (f"00-{TRACE_ID}-{PARENT_ID}-09", "bits that version 00 does not define"),
]

WRONG_STATES = [
    ("vendor", "does not begin with a key and ="),
    ("=1", "does not begin with a key and ="),
    ("Vendor=1", "does not begin with a key and ="),
    ("1vendor=1", "does not begin with a key and ="),
    ("a b=1", "does not begin with a key and ="),
    ("a@1b=1", "does not begin with a key and ="),
    (f"{'a' * 257}=1", "does not begin with a key and ="),
    ("vendor=", "'' is not a value"),
    ("vendor=a=b", "'a=b' is not a value"),
    ("vendor=é", "is not a value"),
    (f"vendor={'a' * 257}", "is not a value"),
    ("a=1,b=2,a=3", "the key 'a' twice"),
    (",".join(f"a{number}=1" for number in range(33)), "33 members; 32 are allowed"),
]


class TraceContextTest(WrongSamples, unittest.TestCase):
    def test_what_breaks_a_rule_is_refused(self):
        self.assert_refused(parse_traceparent, WRONG_PARENTS)
        self.assert_refused(parse_tracestate, WRONG_STATES)

    def test_a_traceparent_has_the_ids_of_trace_and_parent_and_flags(self):
        for flags in (0, 1, 3):
            self.assertEqual(parse_traceparent(f"00-{TRACE_ID}-{PARENT_ID}-0{flags}"),
                             (TRACE_ID, PARENT_ID, flags))

    def test_a_tracestate_has_members_in_order(self):
        found = parse_tracestate("rojo=00f067aa0ba902b7 ,\t, 1t@congo=a b")
        self.assertEqual(list(found.items()),
                         [("rojo", "00f067aa0ba902b7"), ("1t@congo", "a b")])


if __name__ == "__main__":
    unittest.main()
