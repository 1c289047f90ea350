"""Traces, put together from the spans of several processes (Zipkin v2 JSON), and remembered.

Law: the meaning of a tag is not known here.
"""
from collections import OrderedDict
from operator import itemgetter
from typing import Any

from microshop.chassis.content import parse_json

MAX_SPANS = 5_000      # that are remembered; each is below 2 KiB (see telemetry.py)
MAX_SPANS_EACH = 500   # in one trace, the last ones: a client may give all its requests one id

MEMBERS = {"traceId", "id", "name", "timestamp", "duration", "localEndpoint", "tags"}  # needed

STARTED = itemgetter("timestamp")

Span = dict[str, Any]


def parse_spans(body: bytes) -> list[Span]:
    """Parse what GET /traces answers. Raises one of several exceptions if it is not valid."""
    spans = parse_json(body)
    for span in spans:
        if not MEMBERS <= span.keys():
            raise ValueError(f"a span lacks {MEMBERS - span.keys()}")
    return spans


class TraceMemory:
    """The traces that were seen last: the spans of each by their ids."""

    def __init__(self) -> None:
        self._traces: OrderedDict[str, dict[str, Span]] = OrderedDict()  # that seen last is last

    def note(self, spans: list[Span]) -> None:
        """Remember the spans that a process has answered.

        A process answers its last spans again and again, so the traces that are forgotten first are
        those that no process remembers any more.
        """
        for span in spans:
            trace = self._traces.setdefault(span["traceId"], {})
            self._traces.move_to_end(span["traceId"])
            trace[span["id"]] = span
        for trace in self._traces.values():
            if len(trace) > MAX_SPANS_EACH:
                for oldest in sorted(trace.values(), key=STARTED)[:-MAX_SPANS_EACH]:
                    del trace[oldest["id"]]
        size = sum(map(len, self._traces.values()))
        while size > MAX_SPANS:
            size -= len(self._traces.popitem(last=False)[1])

    def traces(self) -> dict[str, list[Span]]:
        """Return the spans of each trace by its id, in the order of their beginnings."""
        return {trace_id: sorted(spans.values(), key=STARTED)
                for trace_id, spans in self._traces.items()}
