"""The metrics of a process, read from the text that it answers (as metrics.py writes it).

What a process answers may be wrong, or hostile. So it is read strictly, and its size is limited.

Law: no metric is known here by its name.
"""
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from microshop.chassis.content import MAX_INTEGER

MAX_SAMPLES = 10_000  # in the answer of one process
MAX_LABELS = 2_000    # characters of all labels of a sample
MAX_TEXT = 256        # characters of a label's value
NAME = "[a-zA-Z_:][a-zA-Z0-9_:]*"
SAMPLE = re.compile(rf"({NAME})(?:\{{(.{{0,{MAX_LABELS}}})\}})? ([0-9.e+-]+)(?: -?[0-9]+)?")
LABEL = re.compile(rf'({NAME})="((?:[^"\\]|\\[\\"n]){{0,{MAX_TEXT}}})",?')
ESCAPED = re.compile(r"\\(.)")

Labels = frozenset[tuple[str, str]]


class Sample(NamedTuple):
    """A value, and the labels that tell it from others of the same name."""

    labels: dict[str, str]
    value: float


class Metrics(dict[str, dict[Labels, float]]):
    """Values by name and labels. All of them count or measure something, so none is negative."""

    def select(self, name: str, /, **labels: str) -> Iterator[Sample]:
        """Yield the samples with this name and these labels."""
        for pairs, value in self.get(name, {}).items():
            if labels.items() <= pairs:
                yield Sample(dict(pairs), value)

    def total(self, name: str, /, **labels: str) -> float:
        """Return the sum of the samples with this name and these labels."""
        return sum(sample.value for sample in self.select(name, **labels))

    def add(self, other: "Metrics", factor: float = 1.0) -> None:
        """Add the values of another process to these."""
        for name, values in other.items():
            own = self.setdefault(name, {})
            for labels, value in values.items():
                own[labels] = own.get(labels, 0.0) + factor * value

    def increase_since(self, earlier: "Metrics") -> "Metrics":
        """Return how much each value has grown, if it has; a new one began at zero."""
        grown = Metrics()
        for name, values in self.items():
            before = earlier.get(name, {})
            grown[name] = {labels: value - before.get(labels, 0.0)
                           for labels, value in values.items() if value > before.get(labels, 0.0)}
        return grown


def parse_metrics(text: str) -> Metrics:
    """Parse what GET /metrics answers. Raises ValueError if that is not valid or too large."""
    metrics = Metrics()
    lines = [line for line in text.split("\n") if line and not line.startswith("#")]
    if len(lines) > MAX_SAMPLES:
        raise ValueError(f"there are more than {MAX_SAMPLES} samples")
    for line in lines:
        match = SAMPLE.fullmatch(line)
        value = float(match[3]) if match else -1.0
        if not match or not 0 <= value <= MAX_INTEGER:
            raise ValueError("a line is not a sample that can be used")
        metrics.setdefault(match[1], {})[parse_labels(match[2] or "")] = value
    return metrics


@lru_cache(maxsize=5_000)  # they are the same in each answer, so they need no more memory then
def parse_labels(text: str) -> Labels:
    """Parse what is between the braces of a sample. Raises ValueError."""
    labels = {name: ESCAPED.sub(unescape, value) for name, value in LABEL.findall(text)}
    if LABEL.sub("", text) or not float(labels.get("le", 0)) >= 0:  # the bound of a bucket
        raise ValueError("the labels of a sample are malformed")
    return frozenset(labels.items())


def unescape(match: re.Match) -> str:
    return "\n" if match[1] == "n" else match[1]


def quantile(share: float, buckets: Iterable[Sample]) -> float | None:
    """Return the value that this share of a histogram's observations do not exceed, or None.

    A histogram says only how many observations are in each bucket. As usual, we assume that those
    in one bucket are spread evenly over it. Above the last finite bound, that bound is returned.
    """
    counts: dict[float, float] = {}  # observations up to each bound; several series are added up
    for labels, value in buckets:
        bound = float(labels.get("le", "inf"))
        counts[bound] = counts.get(bound, 0.0) + value
    wanted = share * max(counts.values(), default=0.0)
    lower, below = 0.0, 0.0
    for bound, count in sorted(counts.items()):
        if count > below and count >= wanted:
            width = 0.0 if bound == float("inf") else bound - lower
            return lower + width * (wanted - below) / (count - below)
        lower, below = bound, count
    return None
