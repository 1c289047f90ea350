"""Metrics: numbers that count what happens, in the text format of Prometheus (version 0.0.4).

https://prometheus.io/docs/instrumenting/exposition_formats/ describes the format. Names and labels
follow the semantic conventions of OpenTelemetry where these have any.

Law: nothing here knows what is counted.
"""
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Upper bounds in seconds: those of OpenTelemetry, after three for services on the same machine.
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5,
           5.0, 7.5, 10.0)

Labels = Mapping[str, str]


class Family(NamedTuple):
    """All samples of a metric. The suffix of a sample is added to the name, as in `_bucket`."""

    name: str
    kind: str  # counter, gauge or histogram
    help: str
    samples: Iterable[tuple[str, Labels, float]]

    def lines(self) -> list[str]:
        described = [f"# HELP {self.name} {self.help}", f"# TYPE {self.name} {self.kind}"]
        return described + [f"{self.name}{suffix}{format_labels(labels)} {value}"
                            for suffix, labels, value in self.samples]


def gauge(name: str, help: str, value: float) -> Family:
    """Return a metric that has a single value and may go up and down."""
    return Family(name, "gauge", help, [("", {}, value)])


def counter(name: str, help: str, value: float) -> Family:
    """Return a metric that has a single value and only goes up."""
    return Family(name, "counter", help, [("", {}, value)])


def format_labels(labels: Labels) -> str:
    """Return labels in braces. A label without a value is left out: it means the same."""
    pairs = [f'{name}="{escape(value)}"' for name, value in labels.items() if value]
    return f"{{{','.join(pairs)}}}" if pairs else ""


def escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def format_metrics(families: Iterable[Family]) -> str:
    return "".join(f"{line}\n" for family in families for line in family.lines())


def counters(name: str, help: str, label_names: Sequence[str],
             counts: Mapping[Any, float]) -> Family:
    """Return a metric that only goes up, with a count for each tuple of values of its labels."""
    return Family(name, "counter", help, [
        ("", dict(zip(label_names, values, strict=True)), count)
        for values, count in counts.items()])


class Histogram:
    """Counts durations in buckets, one row of buckets for each `key`.

    `labels_of` returns the labels that a key stands for. One thread at a time may use it.
    """

    def __init__(self, name: str, help: str, labels_of: Callable[..., Labels]):
        self.name, self.help, self.labels_of = name, help, labels_of
        # For each key: a count for each bucket, one for longer durations, and the sum of all.
        self._rows: dict[tuple, list] = defaultdict(lambda: [0] * (len(BUCKETS) + 1) + [0.0])

    def observe(self, key: tuple, seconds: float) -> None:
        row = self._rows[key]
        row[bisect_left(BUCKETS, seconds)] += 1
        row[-1] += seconds

    def family(self) -> Family:
        samples: list[tuple[str, Labels, float]] = []
        for key, (*counts, total_seconds) in self._rows.items():
            labels, total = self.labels_of(*key), 0
            for bound, count in zip([*BUCKETS, "+Inf"], counts, strict=True):
                total += count  # a bucket counts what is in those before it, too
                samples.append(("_bucket", {**labels, "le": format(bound)}, total))
            samples.append(("_sum", labels, total_seconds))
            samples.append(("_count", labels, total))
        return Family(self.name, "histogram", self.help, samples)
