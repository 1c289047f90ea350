"""What conformance.py and cluster.py share: they run tools of others, and print a line a check."""
import subprocess
import textwrap
from collections.abc import Callable
from typing import Any

from tests.formats import FormatError
from tests.helpers import Answered
from tests.peers import finish

TOOL_TIME = 120.0         # seconds after which a tool is ended; schemathesis takes about 17
LINES, WIDTH = 60, 300    # of what a tool says, that are shown


class Failed(Exception):
    """A check has failed; the text says why."""


class Report:
    """Prints a line for each check, and counts those that failed."""

    def __init__(self) -> None:
        self.failures = 0

    def check(self, what: str, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a function that raises Failed, FormatError or AssertionError if something is wrong.

        What it returns, if anything, is added to the line.
        """
        try:
            remark = function(*arguments)
        except (Failed, FormatError, AssertionError) as failure:
            self.failures += 1
            print(f"FAILED  {what}:\n{textwrap.indent(str(failure), '        ')}", flush=True)
        else:
            print(f"ok      {what}{f': {remark}' if remark else ''}", flush=True)


def run_tool(command: list[str], content: bytes = b"", folder: str | None = None) -> str:
    """Run a tool with `content` as its input; return its output.

    Raises Failed if its exit status is not 0, or if it takes longer than TOOL_TIME.
    """
    child = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, start_new_session=True)
    try:
        output = finish(child, TOOL_TIME, content)
    except subprocess.TimeoutExpired as late:
        output = late.output + f"ended, since it took longer than {TOOL_TIME:g} s\n".encode()
    text = output.decode(errors="replace")
    if child.returncode:
        lines = [line[:WIDTH] for line in text.splitlines()[-LINES:]]
        raise Failed("\n".join(lines) or f"exit status {child.returncode}")
    return text


def expect(answer: Answered, status: int) -> None:
    if answer.status != status:
        raise Failed(f"status {answer.status}, expected {status}: {answer.body[:300]!r}")
