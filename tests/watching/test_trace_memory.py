"""Traces are put together from spans, and take no more memory than was promised."""
import json
import unittest
from unittest import mock

from microshop.chassis.errors import BadRequest
from microshop.watching import trace_memory as module
from microshop.watching.trace_memory import TraceMemory, parse_spans
from tests.watching.told import span


class TraceMemoryTest(unittest.TestCase):
    def setUp(self):
        self.memory = TraceMemory()

    def counts(self):
        """Return how many spans each trace has."""
        return [len(spans) for spans in self.memory.traces().values()]

    def test_spans_of_several_processes_become_one_trace_in_the_order_of_time(self):
        self.memory.note([span(7, 2, parent=1, at=1001.0), span(8, 9)])
        self.memory.note([span(7, 1, at=1000.0), span(7, 3, parent=2, at=1002.0)])
        found = self.memory.traces()[f"{7:032x}"]
        self.assertEqual([one["id"] for one in found], [f"{number:016x}" for number in (1, 2, 3)])
        self.assertEqual(sorted(self.counts()), [1, 3])

    def test_a_span_that_is_answered_again_is_remembered_once(self):
        self.memory.note([span(1, 1), span(1, 2)])
        self.memory.note([span(1, 2), span(1, 3)])
        self.assertEqual(self.counts(), [3])

    def test_the_traces_that_no_process_tells_of_any_more_are_forgotten_first(self):
        with mock.patch.object(module, "MAX_SPANS", 4):
            self.memory.note([span(1, 1), span(2, 2), span(3, 3), span(3, 4)])
            self.memory.note([span(1, 1), span(4, 5)])
        self.assertEqual([trace_id[-1] for trace_id in self.memory.traces()], ["3", "1", "4"])

    def test_no_more_spans_are_remembered_than_was_promised(self):
        for first in range(0, 3 * module.MAX_SPANS, 500):
            self.memory.note([span(number, number) for number in range(first + 1, first + 501)])
        self.assertEqual(sum(self.counts()), module.MAX_SPANS)

    def test_a_client_that_uses_one_trace_id_for_all_cannot_make_the_others_forgotten(self):
        self.memory.note([span(1, 1)])
        for first in range(0, 2 * module.MAX_SPANS, 500):
            self.memory.note([span(2, number) for number in range(first + 1, first + 501)])
        self.assertEqual(self.counts(), [1, module.MAX_SPANS_EACH])

    def test_of_a_trace_with_many_spans_the_last_are_remembered(self):
        with mock.patch.object(module, "MAX_SPANS_EACH", 2):
            self.memory.note([span(1, 1, at=1001.0), span(1, 2, at=1003.0)])
            self.memory.note([span(1, 1, at=1001.0), span(1, 3, at=1002.0)])
        [spans] = self.memory.traces().values()
        self.assertEqual([one["id"][-1] for one in spans], ["3", "2"])


class ParseTest(unittest.TestCase):
    def test_spans_are_taken_as_they_were_answered(self):
        spans = [span(1, 1), span(1, 2, parent=1, annotations=[{"timestamp": 5, "value": "a"}])]
        self.assertEqual(parse_spans(json.dumps(spans).encode()), spans)

    def test_a_span_without_a_member_that_each_has_is_refused(self):
        for name in ("traceId", "id", "name", "timestamp", "duration", "localEndpoint", "tags"):
            incomplete = span()
            del incomplete[name]
            with self.subTest(name), self.assertRaisesRegex(ValueError, name):
                parse_spans(json.dumps([span(), incomplete]).encode())

    def test_what_could_not_be_sent_on_as_json_is_refused(self):
        for name in ('"\\ud800"', "NaN"):
            text = json.dumps([span(name="?")]).replace('"?"', name)
            with self.subTest(name), self.assertRaises(BadRequest):
                parse_spans(text.encode())


if __name__ == "__main__":
    unittest.main()
