"""Traces, put together from the spans of several processes (Zipkin v2 JSON), and remembered.

What a process answers may be wrong, or hostile. So only what is known of the format is taken over,
and no more of it than the limits below allow.

Law: the meaning of a tag is not known here.
"""
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from microshop.chassis.content import MAX_INTEGER

MAX_SPANS = 5_000      # that are remembered, at most some 10 KiB each
MAX_SPANS_EACH = 200   # in one trace: a client may send the same trace id with every request
MAX_TAGS = 12          # of a span
MAX_ANNOTATIONS = 8    # of a span
MAX_TEXT = 256         # characters

TRACE_ID = re.compile("[0-9a-f]{32}")
SPAN_ID = re.compile("[0-9a-f]{16}")
KINDS = {"SERVER", "CLIENT"}

Span = dict[str, Any]


class Trace:
    """The spans of one trace by their ids, and a summary of them."""

    def __init__(self) -> None:
        self._spans: dict[str, Span] = {}
        self.summary: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._spans)

    def add(self, raw: Any) -> list[Span]:
        """Add a span as a process answered it; return it in a list, or [] if it is not taken."""
        if raw["id"] in self._spans or len(self) >= MAX_SPANS_EACH:
            return []
        span = self._spans[raw["id"]] = clean(raw)
        return [span]

    def spans(self) -> list[Span]:
        """Return the spans in the order of their beginnings."""
        return sorted(self._spans.values(), key=lambda span: span["timestamp"])


class TraceMemory:
    """The traces that were seen last. `summarize` turns the spans of one into its summary."""

    def __init__(self, summarize: Callable[[list[Span]], dict[str, Any]]):
        self._summarize = summarize
        self._traces: OrderedDict[str, Trace] = OrderedDict()  # that seen last is the last one
        self._size = 0  # of all, in spans

    def note(self, answer: Any) -> list[Span]:
        """Remember the spans that a process has answered; return those that were not known yet.

        A process answers its last spans again and again, so the traces that are forgotten first are
        those that no process remembers any more. Raises ValueError if what it answered is invalid.
        """
        if not isinstance(answer, list):
            raise ValueError("the answer is not a list of spans")
        added: list[Span] = []
        try:
            for raw in answer:
                trace = self._traces.get(raw["traceId"]) or Trace()
                added += trace.add(raw)
                self._traces[raw["traceId"]] = trace
                self._traces.move_to_end(raw["traceId"])
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"a span is invalid: {error!r}") from None
        finally:
            for trace_id in {span["traceId"] for span in added}:
                self._traces[trace_id].summary = self._summarize(self._traces[trace_id].spans())
            self._size += len(added)
            while self._size > MAX_SPANS:
                self._size -= len(self._traces.popitem(last=False)[1])
        return added

    def summaries(self) -> list[dict[str, Any]]:
        """Return the summaries of all traces."""
        return [trace.summary for trace in self._traces.values()]

    def find(self, trace_id: str) -> list[Span]:
        """Return the spans of a trace in the order of their beginnings; [] if it is not known."""
        trace = self._traces.get(trace_id)
        return trace.spans() if trace else []


def clean(raw: Any) -> Span:
    """Return a span with what is known of its format, cut to size.

    Raises ValueError, TypeError, KeyError or AttributeError if it is invalid.
    """
    span: Span = {"traceId": match(TRACE_ID, raw["traceId"]), "id": match(SPAN_ID, raw["id"])}
    if "parentId" in raw:
        span["parentId"] = match(SPAN_ID, raw["parentId"])
    if raw.get("kind") in KINDS:
        span["kind"] = raw["kind"]
    span |= {"name": text(raw["name"]), "timestamp": microseconds(raw["timestamp"]),
             "duration": microseconds(raw["duration"]),
             "localEndpoint": {"serviceName": text(raw["localEndpoint"]["serviceName"])}}
    if "remoteEndpoint" in raw:
        span["remoteEndpoint"] = {"serviceName": text(raw["remoteEndpoint"]["serviceName"])}
    tags = list(raw.get("tags", {}).items())[:MAX_TAGS]
    span["tags"] = {text(name): text(value) for name, value in tags}
    span["annotations"] = [
        {"timestamp": microseconds(each["timestamp"]), "value": text(each["value"])}
        for each in raw.get("annotations", [])[:MAX_ANNOTATIONS]]
    return span


def match(pattern: re.Pattern, value: Any) -> str:
    if not pattern.fullmatch(value):
        raise ValueError(f"an id does not match {pattern.pattern}")
    return value


def text(value: Any) -> str:
    """Return a text, cut, and without surrogates, which cannot be sent."""
    return value[:MAX_TEXT].encode("utf-8", "replace").decode()


def microseconds(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_INTEGER:
        raise ValueError("a time is not a number of microseconds")
    return value
