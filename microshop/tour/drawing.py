"""How commands, answers, traces and rows look on a page that is 80 columns wide. Plain ASCII.

What is meant to be copied (a command, the name of a test) is never broken.
"""
import json
import re
import shlex
import signal
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

WIDTH = 80
BAR = 30          # columns of a waterfall's bars
BODY_LINES = 6    # of an answer that are shown


class Answer(NamedTuple):
    """What a request was answered; `headers` by lower-case name. Status 0: there was no answer."""

    status: int
    reason: str
    headers: dict[str, str]
    body: str
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def id(self) -> str:
        """The request id."""
        return self.headers.get("x-request-id", "")


def draw_text(text: str, indent: str = "") -> str:
    """Return paragraphs, broken into lines. Their line breaks do not count, blank lines do."""
    paragraphs = [" ".join(part.split()) for part in textwrap.dedent(text).split("\n\n")]
    return "\n\n".join(
        textwrap.fill(part, WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent),
                      break_long_words=False, break_on_hyphens=False) for part in paragraphs)


def draw_lines(text: str, indent: str = "") -> str:
    """Return a text with each line broken where the page ends, even within a word."""
    return "\n".join(
        textwrap.fill(line, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ",
                      break_on_hyphens=False) for line in text.splitlines())


def draw_curl(url: str, method: str, headers: dict[str, str], body: str | None) -> str:
    """Return a curl command that can be copied as it is."""
    words = ["curl", "-i"]
    if method == "HEAD":
        words.append("--head")
    elif method != ("GET" if body is None else "POST"):
        words += ["-X", method]
    words.append(shlex.quote(url))
    for name, value in headers.items():
        words += ["-H", shlex.quote(f"{name}: {value}")]
    if body is not None:
        words += ["-d", shlex.quote(body)]
    return " ".join(words)


def draw_kill(pid: int, number: signal.Signals, name: str) -> str:
    """Return the command that sends a signal to a process."""
    return f"$ kill -{number.name.removeprefix('SIG')} {pid}    # {name}"


def draw_answer(answer: Answer, shown: tuple[str, ...]) -> str:
    """Return an answer as `curl -i` prints it, with only the headers that are to be shown."""
    if not answer.status:
        return f"curl: {answer.body}"
    lines = [f"HTTP/1.1 {answer.status} {answer.reason}"]
    lines += [f"{name}: {answer.headers[name.lower()]}" for name in shown
              if name.lower() in answer.headers]
    body = draw_body(answer.body)
    if len(body) > BODY_LINES:
        body[BODY_LINES:] = ["..."]
    return "\n".join([draw_lines("\n".join(lines)), "", *body]).rstrip()


def draw_body(text: str) -> list[str]:
    """Return a text in lines that end, where it is too wide, after a comma or a space."""
    lines = []
    for line in text.splitlines():
        lines.append("")
        for piece in re.split("(?<=[, ])", line):
            if lines[-1] and len(lines[-1] + piece) > WIDTH:
                lines.append("  ")
            lines[-1] += piece
    return [line.rstrip() for line in lines]


def draw_trace(spans: list[dict]) -> str:
    """Return the spans of a trace as a waterfall: where each began, and how long it took.

    `spans` are in Zipkin's format; timestamps and durations in it are microseconds.
    """
    begin = min(span["timestamp"] for span in spans)
    scale = BAR / max(span["timestamp"] + span["duration"] - begin for span in spans)
    lines = [f"{'':45} {'0 ms':<{BAR - 8}}{BAR / scale / 1000:>8.1f} ms"[:WIDTH]]
    for depth, span in as_tree(spans):
        left = min(int((span["timestamp"] - begin) * scale), BAR - 1)
        width = max(round(span["duration"] * scale), 1)
        tags = span["tags"]
        outcome = tags.get("error") or tags.get("http.status_code", "")
        what = f"{'  ' * depth}{span['localEndpoint']['serviceName']} {span['name']}"
        if span.get("kind") == "CLIENT":
            what += f" (try {tags['try']})" if tags["try"] != "1" else " (call)"
        bar = (" " * left + "=" * width)[:BAR]
        lines.append(f"{what:<36.36} {outcome:<8.8} {bar}".rstrip())
    return "\n".join(lines)


def as_tree(spans: list[dict], parent: str = "", depth: int = 0) -> Iterator[tuple[int, dict]]:
    """Yield each span with its depth: below its parent, and in the order in which they began."""
    known = {span["id"] for span in spans}
    for span in sorted(spans, key=lambda span: span["timestamp"]):
        own_parent = span.get("parentId", "")
        if own_parent == parent or not parent and own_parent not in known:
            yield depth, span
            yield from as_tree(spans, span["id"], depth + 1)


def draw_row(row: dict[str, Any]) -> str:
    """Return a row of a table, with the names of its columns."""
    return draw_lines("\n".join(f"{name}: {value}" for name, value in row.items()), "  ")
