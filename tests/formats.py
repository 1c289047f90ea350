"""Strict parsers for the formats in which the shop shows what it does.

Each is written from the specification that its section names, and refuses whatever that forbids,
with a FormatError that says what is wrong and where. (The real tools are more lenient: they read
what they can. `make conformance` asks them, too.)

    parse_metrics()         what GET /metrics answers
    parse_spans()           what GET /traces answers
    parse_server_timing()   the value of the header Server-Timing
    parse_traceparent(), parse_tracestate()    the headers by which a trace goes on

Law: nothing here knows the shop. What its metrics and spans must be is asserted by the tests.
"""
import json
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple


class FormatError(ValueError):
    """A text breaks a rule of its format; the message says which one, and where."""


# --- Prometheus text format 0.0.4
#     https://prometheus.io/docs/instrumenting/exposition_formats/
#     https://prometheus.io/docs/practices/naming/ (what `promtool check metrics` asks for)

Labels = tuple[tuple[str, str], ...]  # the labels of a sample, sorted by name
Samples = dict[tuple[str, Labels], float]

TYPES = ("counter", "gauge", "histogram", "summary", "untyped")
PARTS = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("", "_sum", "_count")}
METRIC_NAME = re.compile("[a-zA-Z_][a-zA-Z0-9_]*")  # colons are for the rules of a Prometheus
LABEL = re.compile(r'[ \t]*([^=,{}" \t]*)[ \t]*=[ \t]*"((?:[^"\\]|\\.)*)"[ \t]*(,?)', re.S)
LABEL_NAME = re.compile("(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?|NaN|[+-]Inf")
WHOLE = re.compile("-?[0-9]+")
NOT_BASE_UNITS = re.compile(
    "(?:^|_)(milliseconds?|microseconds?|nanoseconds?|ms|us|ns|minutes?|hours?|days?"
    "|kilobytes?|megabytes?|gigabytes?|kib|mib|gib|kb|mb|gb|bits?|percent)(?:_|$)")


class Family(NamedTuple):
    """A metric: its samples, and what HELP and TYPE say about it."""

    name: str
    type: str
    help: str
    samples: Samples


class Metrics(dict[str, Family]):
    """The families of one process, by name."""

    def find(self, sample: str, **wanted: str) -> list[tuple[dict[str, str], float]]:
        """Return labels and value of each sample with this name that has the wanted labels.

        `sample` is the name as it is in the text, like "x_seconds_count". A label that must be
        absent is wanted to be "".
        """
        found = [(dict(labels), value) for family in self.values()
                 for (name, labels), value in family.samples.items() if name == sample]
        return [(labels, value) for labels, value in found
                if all(labels.get(name, "") == text for name, text in wanted.items())]

    def total(self, sample: str, **wanted: str) -> float:
        """Return the sum of the samples that find() returns; 0 if there are none."""
        return sum(value for _, value in self.find(sample, **wanted))


def parse_metrics(content: bytes) -> Metrics:
    """Return the families in a text of the format 0.0.4. Raises FormatError."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"the text is not UTF-8: {error}") from None
    if not text.endswith("\n"):
        raise FormatError("the last line does not end with a line feed")
    reader = MetricsReader()
    for number, line in enumerate(text[:-1].split("\n"), start=1):
        try:
            reader.read_line(line.strip(" \t"))
        except FormatError as error:
            raise FormatError(f"line {number}, {line[:200]!r}: {error}") from None
    for family in reader.families.values():
        check_family(family)
    return reader.families


class MetricsReader:
    """Reads line after line, and knows which families have ended."""

    def __init__(self) -> None:
        self.families = Metrics()
        self.current = ""  # the family whose lines are being read

    def read_line(self, line: str) -> None:
        if line.startswith("#"):
            words = re.split("[ \t]+", line, maxsplit=3)
            kind = words[1] if words[0] == "#" and len(words) > 1 else ""
            if kind in ("HELP", "TYPE"):
                self.read_comment(kind, *words[2:])
        elif line:
            self.read_sample(line)

    def read_comment(self, kind: str, name: str = "", text: str = "") -> None:
        """Read the name and the text of a HELP or TYPE line."""
        if not METRIC_NAME.fullmatch(name):
            raise FormatError(f"{name!r} is not the name of a metric")
        family = self.open_family(name)
        if family.samples:
            raise FormatError(f"{kind} of {name} comes after its first sample")
        if getattr(family, kind.lower()):
            raise FormatError(f"a second {kind} line for {name}")
        if kind == "TYPE" and text not in TYPES:
            raise FormatError(f"{text!r} is not one of the types {', '.join(TYPES)}")
        if kind == "HELP":
            text = unescape(text, {"\\": "\\", "n": "\n"})
        self.families[name] = family._replace(**{kind.lower(): text})

    def open_family(self, name: str) -> Family:
        """Return the family of this name, to which lines are added now."""
        if name != self.current and name in self.families:
            raise FormatError(f"the lines of {name} are not together: others are between them")
        self.current = name
        return self.families.setdefault(name, Family(name, "", "", {}))

    def family_of(self, sample: str) -> str:
        """Return the name of the family to which a sample belongs."""
        for name, family in self.families.items():
            for part in PARTS.get(family.type, ()):
                if part and sample == name + part:
                    return name
        return sample

    def read_sample(self, line: str) -> None:
        name = re.match("[^{ \t]*", line)[0]
        if not METRIC_NAME.fullmatch(name):
            raise FormatError(f"{name!r} is not the name of a metric")
        rest = line[len(name):].lstrip(" \t")
        labels: Labels = ()
        if rest.startswith("{"):
            labels, rest = parse_labels(rest[1:])
        value, *time = re.split("[ \t]+", rest.lstrip(" \t"))
        if not NUMBER.fullmatch(value):
            raise FormatError(f"the value {value!r} is not a number")
        if len(time) > 1 or time and not WHOLE.fullmatch(time[0]):
            raise FormatError(f"{' '.join(time)!r} after the value is not a time in milliseconds")
        family = self.open_family(self.family_of(name))
        parts = [family.name + part for part in PARTS.get(family.type, ("",))]
        if name not in parts:
            raise FormatError(f"a {family.type} has only the samples {', '.join(parts)}")
        if (name, labels) in family.samples:
            raise FormatError("a second sample with the same name and labels")
        family.samples[name, labels] = float(value)


def parse_labels(text: str) -> tuple[Labels, str]:
    """Return the labels that a text begins with, after the brace, and the rest of the text."""
    labels: dict[str, str] = {}
    comma = ","
    while not text.lstrip(" \t").startswith("}"):
        label = LABEL.match(text)
        if not (label and comma):
            raise FormatError(f'expected label="value", a comma or }} at {text[:40]!r}')
        name, value, comma = label.groups()
        if not LABEL_NAME.fullmatch(name):
            raise FormatError(f"{name!r} is not the name of a label")
        if name in labels:
            raise FormatError(f"the label {name} twice")
        labels[name] = unescape(value, {"\\": "\\", '"': '"', "n": "\n"})
        text = text[label.end():]
    return tuple(sorted(labels.items())), text.lstrip(" \t")[1:]


def unescape(text: str, characters: dict[str, str]) -> str:
    """Return a text without its escapes: a backslash and one of the characters."""
    def character(escape: re.Match) -> str:
        if escape[1] not in characters:
            raise FormatError(f"{escape[0]!r} is not an escape")
        return characters[escape[1]]

    return re.sub(r"\\(.?)", character, text, flags=re.S)


def check_family(family: Family) -> None:
    """Raise FormatError if a family breaks a rule about all of its samples, or about names."""
    name, kind, help_text, samples = family
    for what, text in (("TYPE", kind), ("HELP", help_text)):
        if not text:
            raise FormatError(f"{name} has no {what} line")
    if (kind == "counter") != name.endswith("_total"):
        raise FormatError(f"{name} is a {kind}: names of counters, and no others, end in _total")
    if kind in ("counter", "gauge", "untyped") and re.search("_(bucket|count|sum)$", name):
        raise FormatError(f"{name} ends like a part of a histogram, but is a {kind}")
    if unit := NOT_BASE_UNITS.search(name):
        raise FormatError(f"{name}: {unit[1]} is not a base unit like seconds, bytes or ratio")
    for (sample, labels), value in samples.items():
        if kind == "counter" and not 0 <= value < math.inf:
            raise FormatError(f"{show(sample, labels)} is {value:g}: a counter is a number >= 0")
        if "le" in dict(labels) and sample != f"{name}_bucket":
            raise FormatError(f"{show(sample, labels)}: le is for the buckets of histograms")
    if kind == "histogram":
        check_histogram(family)


def check_histogram(family: Family) -> None:
    """Raise FormatError if the samples of a histogram contradict each other, or if one is missing.

    The samples with the same labels, apart from `le`, are one series. Its buckets are cumulative.
    """
    name, series = family.name, {}
    for (sample, labels), value in family.samples.items():
        others = tuple(pair for pair in labels if pair[0] != "le")
        buckets, sums = series.setdefault(others, ([], {}))
        if sample != f"{name}_bucket":
            sums[sample] = value
        elif "le" not in dict(labels) or not NUMBER.fullmatch(dict(labels)["le"]):
            raise FormatError(f"{show(sample, labels)}: a bucket needs le, a number")
        else:
            buckets.append((float(dict(labels)["le"]), value))
    for labels, (buckets, sums) in series.items():
        where = show(name, labels)
        for part in ("_sum", "_count"):
            if name + part not in sums:
                raise FormatError(f"{where} has no {name}{part}")
        bounds, counts = [bound for bound, _ in buckets], [count for _, count in buckets]
        if bounds[-1:] != [math.inf]:
            raise FormatError(f'{where} has no last bucket le="+Inf"')
        if not is_sorted(bounds) or len(set(bounds)) < len(bounds):
            raise FormatError(f"{where}: its buckets are not in the order of le: {bounds}")
        if not is_sorted(counts):
            raise FormatError(f"{where}: a bucket holds less than the one before it: {counts}")
        if counts[-1] != sums[f"{name}_count"]:
            raise FormatError(f'{where}: le="+Inf" holds {counts[-1]:g}, but {name}_count is '
                              f"{sums[f'{name}_count']:g}")
        if any(count < 0 or count % 1 for count in counts):
            raise FormatError(f"{where}: a bucket does not hold a whole number: {counts}")


def is_sorted(numbers: list[float]) -> bool:
    return all(first <= second for first, second in zip(numbers, numbers[1:], strict=False))


def show(name: str, labels: Labels) -> str:
    """Return a sample's name and labels as text for a message."""
    return name + "{" + ",".join(f'{label}="{text}"' for label, text in labels) + "}"


# --- Server-Timing
#     https://www.w3.org/TR/server-timing/ (token and quoted-string: RFC 9110 section 5.6)

TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
QUOTED = re.compile(r'"((?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*)"')
SEPARATOR = re.compile(r"[ \t]*([;,])[ \t]*")
EQUALS = re.compile(r"[ \t]*=[ \t]*")
DURATION = re.compile(r"[0-9]+(\.[0-9]+)?")


class Timing(NamedTuple):
    """An entry of Server-Timing; the duration is in milliseconds."""

    name: str
    duration: float | None = None
    description: str | None = None


def parse_server_timing(text: str) -> list[Timing]:
    """Return the entries of a Server-Timing header. Raises FormatError."""
    words = Words(text)
    entries = []
    while True:
        entries.append(read_timing(words))
        if words.is_at_end():
            return entries
        words.take(SEPARATOR, "a comma or a semicolon")


def read_timing(words: "Words") -> Timing:
    name = words.take(TOKEN, "the name of an entry")[0]
    parameters: dict[str, str] = {}
    while words.next(SEPARATOR) == ";":
        words.take(SEPARATOR, "a semicolon")
        key = words.take(TOKEN, "dur or desc")[0].lower()
        if key not in ("dur", "desc"):
            raise FormatError(f"{name}: {key!r} is not one of the parameters dur and desc")
        if key in parameters:
            raise FormatError(f"{name}: {key} twice")
        words.take(EQUALS, f"= after {key}")
        if quoted := words.match(QUOTED):
            parameters[key] = re.sub(r"\\(.)", r"\1", quoted[1], flags=re.S)
        else:
            parameters[key] = words.take(TOKEN, "a token or a quoted string")[0]
    duration = parameters.get("dur")
    if duration is not None and not DURATION.fullmatch(duration):
        raise FormatError(f"{name}: dur={duration} is not a number of milliseconds")
    return Timing(name, None if duration is None else float(duration), parameters.get("desc"))


class Words:
    """A text that is read from left to right."""

    def __init__(self, text: str):
        self.text, self.place = text, 0

    def is_at_end(self) -> bool:
        return self.place == len(self.text)

    def next(self, pattern: re.Pattern) -> str:
        """Return what the first group of a pattern matches next, and do not go on."""
        found = pattern.match(self.text, self.place)
        return found[1] if found else ""

    def match(self, pattern: re.Pattern) -> re.Match | None:
        """Go on past what the pattern matches, if it does."""
        if found := pattern.match(self.text, self.place):
            self.place = found.end()
        return found

    def take(self, pattern: re.Pattern, what: str) -> re.Match:
        if not (found := self.match(pattern)):
            raise FormatError(f"expected {what} at {self.text[self.place:][:40]!r}")
        return found


# --- Zipkin v2 JSON
#     https://github.com/openzipkin/zipkin-api/blob/master/zipkin2-api.yaml

TRACE_ID = re.compile("[0-9a-f]{16}(?:[0-9a-f]{16})?")
SPAN_ID = re.compile("[0-9a-f]{16}")
KINDS = ("CLIENT", "SERVER", "PRODUCER", "CONSUMER")
MEMBERS = {  # of a span: the types that json.loads() returns for them
    "traceId": str, "id": str, "parentId": str, "kind": str, "name": str, "timestamp": int,
    "duration": int, "debug": bool, "shared": bool, "localEndpoint": dict, "remoteEndpoint": dict,
    "annotations": list, "tags": dict}
ENDPOINT_MEMBERS = {"serviceName": str, "ipv4": str, "ipv6": str, "port": int}
ANNOTATION_MEMBERS = {"timestamp": int, "value": str}


def parse_spans(content: bytes) -> list[dict[str, Any]]:
    """Return the spans in a JSON text. Raises FormatError.

    The shop's spans must be complete: name, timestamp, duration and the name of their service are
    needed, which Zipkin does not demand. No two spans may have the same id.
    """
    try:
        text = content.decode("utf-8")
        spans = json.loads(text, object_pairs_hook=to_object, parse_constant=refuse_constant)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"not JSON: {error}") from None
    if "\\u" in text and re.search("[\ud800-\udfff]", json.dumps(spans, ensure_ascii=False)):
        raise FormatError("an escape like \\ud800 is half a character")
    if not isinstance(spans, list):
        raise FormatError("the spans are not in a list")
    known: set[str] = set()
    for number, span in enumerate(spans):
        try:
            check_span(span)
            if span["id"] in known:
                raise FormatError("another span has the same id")
        except FormatError as error:
            raise FormatError(f"span {number}, {json.dumps(span)[:200]}: {error}") from None
        known.add(span["id"])
    return spans


def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of its members. Raises FormatError if two have the same name."""
    members = dict(pairs)
    if len(members) < len(pairs):
        raise FormatError(f"a member twice in one object: {[name for name, _ in pairs]}")
    return members


def refuse_constant(text: str) -> None:
    raise FormatError(f"{text} is not JSON")


def check_members(what: str, value: Any, types: dict[str, type], needed: Iterable[str]) -> None:
    """Raise FormatError if a value is not an object with the needed members, of their types."""
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not an object")
    for name, member in value.items():
        if name not in types:
            raise FormatError(f"{what} has an unknown member {name!r}")
        if type(member) is not types[name]:  # not isinstance(): True is an int, too
            raise FormatError(f"{name} of {what} is {json.dumps(member)}: "
                              f"expected a value of type {types[name].__name__}")
    for name in needed:
        if name not in value:
            raise FormatError(f"{what} has no {name}")


def check_span(span: Any) -> None:
    """Raise FormatError if a value is not a span."""
    check_members("a span", span, MEMBERS,
                  ("traceId", "id", "name", "timestamp", "duration", "localEndpoint"))
    for name, pattern in (("traceId", TRACE_ID), ("id", SPAN_ID), ("parentId", SPAN_ID)):
        value = span.get(name, "1" * 16)
        if not pattern.fullmatch(value) or not value.strip("0"):
            digits = "16 or 32" if name == "traceId" else "16"
            raise FormatError(f"{name} is not {digits} lower-case hex digits, or all are 0")
    if span["id"] == span.get("parentId"):
        raise FormatError("the span is its own parent")
    if span.get("kind", KINDS[0]) not in KINDS:
        raise FormatError(f"the kind {span['kind']!r} is not one of {', '.join(KINDS)}")
    for name in ("timestamp", "duration"):
        if span[name] < 1:
            raise FormatError(f"{name} is {span[name]}: at least 1 microsecond is needed")
    check_name("name", span["name"])
    for name in ("localEndpoint", "remoteEndpoint"):
        if name in span:
            check_members(name, span[name], ENDPOINT_MEMBERS, ["serviceName"])
            check_name(f"serviceName of {name}", span[name]["serviceName"])
    for name, value in span.get("tags", {}).items():
        if not isinstance(value, str):
            raise FormatError(f"the tag {name} is {json.dumps(value)}, not a string")
    for annotation in span.get("annotations", []):
        check_members("an annotation", annotation, ANNOTATION_MEMBERS, ANNOTATION_MEMBERS)
        if annotation["timestamp"] < 1:
            raise FormatError(f"timestamp of an annotation is {annotation['timestamp']}")


def check_name(what: str, name: str) -> None:
    if not name or name != name.lower():
        raise FormatError(f"{what} is {name!r}: a lower-case text is needed")


# --- W3C Trace Context, version 00
#     https://www.w3.org/TR/trace-context/

TRACEPARENT = re.compile("([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
KNOWN_FLAGS = 0x01 | 0x02  # sampled; random trace id (Level 2)
STATE_KEY = re.compile(
    "[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13}")
STATE_VALUE = re.compile(r"[ -+\--<>-~]{0,255}[!-+\--<>-~]")
MAX_STATES = 32


class TraceParent(NamedTuple):
    trace_id: str
    parent_id: str
    flags: int


def parse_traceparent(text: str) -> TraceParent:
    """Return what a traceparent header of version 00 says. Raises FormatError."""
    fields = TRACEPARENT.fullmatch(text)
    if not fields:
        raise FormatError(f"{text!r} is not four fields of 2, 32, 16 and 2 lower-case hex digits")
    version, trace_id, parent_id, flags = fields.groups()
    if version != "00":
        raise FormatError(f"the version is {version}, not 00")
    for what, value in (("trace-id", trace_id), ("parent-id", parent_id)):
        if not value.strip("0"):
            raise FormatError(f"all digits of the {what} are 0")
    if int(flags, 16) & ~KNOWN_FLAGS:
        raise FormatError(f"the flags {flags} have bits that version 00 does not define")
    return TraceParent(trace_id, parent_id, int(flags, 16))


def parse_tracestate(text: str) -> dict[str, str]:
    """Return the members of a tracestate header, in order. Raises FormatError."""
    members: dict[str, str] = {}
    for member in text.split(","):
        if not member.strip(" \t"):
            continue  # the specification allows empty members
        key, equals, value = member.strip(" \t").partition("=")
        if not equals or not STATE_KEY.fullmatch(key):
            raise FormatError(f"{member!r} does not begin with a key and =")
        if not STATE_VALUE.fullmatch(value):
            raise FormatError(f"{value!r} is not a value")
        if key in members:
            raise FormatError(f"the key {key!r} twice")
        members[key] = value
    if len(members) > MAX_STATES:
        raise FormatError(f"{len(members)} members; {MAX_STATES} are allowed")
    return members
