"""Traces are put together from spans, and take no more memory than was promised."""
import unittest
from unittest import mock

from microshop.chassis import trace_memory as module
from microshop.chassis.content import encode
from microshop.chassis.trace_memory import TraceMemory
from tests.chassis.told import span


class TraceMemoryTest(unittest.TestCase):
    def setUp(self):
        self.memory = TraceMemory(lambda spans: {"count": len(spans), "id": spans[0]["traceId"]})

    def counts(self):
        """Return how many spans each trace has."""
        return [summary["count"] for summary in self.memory.summaries()]

    def test_spans_of_several_processes_become_one_trace_in_the_order_of_time(self):
        self.memory.note([span(7, 2, parent=1, at=1001.0), span(8, 9)])
        self.memory.note([span(7, 1, at=1000.0), span(7, 3, parent=2, at=1002.0)])
        found = self.memory.find(f"{7:032x}")
        self.assertEqual([one["id"] for one in found], [f"{number:016x}" for number in (1, 2, 3)])
        self.assertEqual(sorted(self.counts()), [1, 3])
        self.assertEqual(self.memory.find("f" * 32), [])

    def test_only_spans_that_were_not_known_are_returned(self):
        self.assertEqual(len(self.memory.note([span(1, 1), span(1, 2)])), 2)
        self.assertEqual([one["id"] for one in self.memory.note([span(1, 2), span(1, 3)])],
                         [f"{3:016x}"])

    def test_what_is_known_of_the_format_is_kept_and_nothing_else(self):
        told = span(1, 2, parent=1, kind="CLIENT", remoteEndpoint={"serviceName": "users", "x": 1},
                    annotations=[{"timestamp": 5, "value": "a -> b", "x": 1}])
        self.memory.note([{**told, "debug": True, "shared": {"deep": []}}])
        [kept] = self.memory.find(told["traceId"])
        self.assertEqual(kept, {**told, "remoteEndpoint": {"serviceName": "users"},
                                "annotations": [{"timestamp": 5, "value": "a -> b"}]})

    def test_what_is_not_valid_is_refused(self):
        without_name = span()
        del without_name["name"]
        for answer in (None, 5, {"a": 1}, "spans", [None], ["span"], [[]], [{}], [without_name],
                       [span(traceId="x")], [span(traceId=["a"])], [span(id=7)],
                       [span(id="F" * 16)], [span(parentId="")], [span(kind=[])],
                       [span(name=None)], [span(name=["a"])],
                       [span(timestamp="1")], [span(timestamp=1.5)], [span(timestamp=True)],
                       [span(duration=-1)], [span(duration=2**60)], [span(localEndpoint=None)],
                       [span(localEndpoint={})], [span(tags=[])], [span(tags={"a": 1})],
                       [span(annotations=[1])], [span(annotations={"a": 1})],
                       [span(annotations=[{"timestamp": 1}])], [span(remoteEndpoint="users")]):
            with self.subTest(answer), self.assertRaises(ValueError, msg=f"{answer} was accepted"):
                self.memory.note(answer)
        self.assertEqual(self.counts(), [], "nothing of it is remembered")

    def test_what_came_before_an_invalid_span_is_kept_with_a_summary(self):
        with self.assertRaises(ValueError):
            self.memory.note([span(1, 1), {}])
        self.assertEqual(self.counts(), [1])

    def test_an_unknown_kind_is_left_out(self):
        self.memory.note([span(kind="ODD")])
        self.assertNotIn("kind", self.memory.find(span()["traceId"])[0])

    def test_texts_are_cut_and_their_number_is_limited(self):
        long = "x" * 100_000
        self.memory.note([span(
            name=long, tags={f"{number}{long}"[:1000]: long for number in range(1000)},
            annotations=[{"timestamp": 1, "value": long}] * 1000,
            localEndpoint={"serviceName": long}, remoteEndpoint={"serviceName": long})])
        [kept] = self.memory.find(span()["traceId"])
        self.assertLess(len(encode(kept)), 10 * 1024, "a span as JSON")

    def test_lone_surrogates_are_replaced_since_they_cannot_be_sent(self):
        self.memory.note([span(name="a\ud800b")])
        self.assertEqual(self.memory.find(span()["traceId"])[0]["name"], "a?b")

    def test_the_traces_that_no_process_tells_of_any_more_are_forgotten_first(self):
        with mock.patch.object(module, "MAX_SPANS", 4):
            self.memory.note([span(1, 1), span(2, 2), span(3, 3), span(3, 4)])
            self.memory.note([span(1, 1), span(4, 5)])
        self.assertEqual([summary["id"][-1] for summary in self.memory.summaries()],
                         ["3", "1", "4"])

    def test_no_more_spans_are_remembered_than_was_promised(self):
        for first in range(0, 3 * module.MAX_SPANS, 500):
            self.memory.note([span(number, number) for number in range(first + 1, first + 501)])
        self.assertEqual(sum(self.counts()), module.MAX_SPANS)

    def test_a_client_that_uses_one_trace_id_for_all_cannot_make_the_others_forgotten(self):
        self.memory.note([span(1, 1)])
        for first in range(0, 2 * module.MAX_SPANS, 500):
            self.memory.note([span(2, number) for number in range(first + 1, first + 501)])
        self.assertEqual(self.counts(), [1, module.MAX_SPANS_EACH])


if __name__ == "__main__":
    unittest.main()
