"""The metrics of a process, read from the text that it answers (as metrics.py writes it).

Law: no metric is known here by its name.
"""
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

NAME = "[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = rf'({NAME})="((?:[^"\\]|\\.)*)"'
SAMPLE = re.compile(  # the value is neither NaN nor infinite
    rf"(?P<name>{NAME})(?:\{{(?P<labels>(?:{LABEL},?)*)\}})? (?P<value>[0-9.e+-]+)")


class Sample(NamedTuple):
    """A value, and the labels that tell it from others of the same name."""

    labels: Mapping[str, str]
    value: float


class Metrics(dict[str, dict[str, float]]):
    """Values by name and by the text of their labels, which every process writes alike."""

    def select(self, name: str, /, **labels: str) -> list[Sample]:
        """Return the samples with this name and these labels."""
        samples = [Sample(parse_labels(text), value) for text, value in self.get(name, {}).items()]
        return [sample for sample in samples if labels.items() <= sample.labels.items()]

    def total(self, name: str, /, **labels: str) -> float:
        """Return the sum of the samples with this name and these labels."""
        return sum(sample.value for sample in self.select(name, **labels))

    def growth_since(self, earlier: "Metrics", seconds: float = 1.0) -> "Metrics":
        """Return how much each value has grown per second, if it has; a new one began at zero."""
        growth = Metrics()
        for name, values in self.items():
            before = earlier.get(name, {})
            growth[name] = {labels: (value - before.get(labels, 0.0)) / seconds
                            for labels, value in values.items() if value > before.get(labels, 0.0)}
        return growth


def add_up(several: Iterable[Metrics]) -> Metrics:
    """Return the sums of the values of several processes."""
    sums = Metrics()
    for metrics in several:
        for name, values in metrics.items():
            own = sums.setdefault(name, {})
            for labels, value in values.items():
                own[labels] = own.get(labels, 0.0) + value
    return sums


def parse_metrics(text: str) -> Metrics:
    """Parse what GET /metrics answers. Raises ValueError if that is not valid."""
    metrics = Metrics()
    for line in text.split("\n"):
        if line and not line.startswith("#"):
            match = SAMPLE.fullmatch(line)
            if not match:
                raise ValueError(f"a line is not a sample: {line}")
            metrics.setdefault(match["name"], {})[match["labels"] or ""] = float(match["value"])
    return metrics


@lru_cache(maxsize=5_000)  # they are the same in each answer
def parse_labels(text: str) -> Mapping[str, str]:
    """Parse what is between the braces of a sample."""
    return {name: re.sub(r"\\(.)", unescape, value) for name, value in re.findall(LABEL, text)}


def unescape(match: re.Match) -> str:
    return "\n" if match[1] == "n" else match[1]


def quantile(share: float, buckets: Iterable[Sample], mean: float) -> float | None:
    """Return the value that this share of a histogram's observations do not exceed, or None.

    It is an estimate, since a histogram says only how many observations are in each bucket. As
    usual, we assume that those in one bucket are spread evenly over it; above the last finite
    bound, that bound is returned. But if all are in one bucket, their mean says more.
    """
    counts: dict[float, float] = {}  # observations up to each bound; several series are added up
    for labels, value in buckets:
        bound = float(labels["le"])
        counts[bound] = counts.get(bound, 0.0) + value
    total = max(counts.values(), default=0.0)
    wanted = share * total
    lower, below = 0.0, 0.0
    for bound, count in sorted(counts.items()):
        if count == total and not below and total:
            return mean
        if count > below and count >= wanted:
            width = 0.0 if bound == float("inf") else bound - lower
            return lower + width * (wanted - below) / (count - below)
        lower, below = bound, count
    return None
