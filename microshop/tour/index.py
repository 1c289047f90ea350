"""The index: each pattern, with its place in the code, its test, its chapter and its exercise.

Places are stored as names, like "orders:Saga.release", never as line numbers; where they are is
found out when they are printed. tests/test_tour_index.py resolves every name.
"""
import importlib
import inspect
from pathlib import Path
from typing import NamedTuple

from microshop.tour.chapters import number_of

TOP = Path(__file__).resolve().parent.parent.parent


class Pattern(NamedTuple):
    """A row of the index."""

    name: str
    place: str         # module:name, below microshop
    test: str          # below tests
    chapter: str = ""  # the name of the function of the chapter that shows it
    exercise: int = 0  # of tests/exercise.py; 0: there is none

    def file(self) -> str:
        """Return the file of the place, like "microshop/orders.py"."""
        return f"microshop/{self.place.partition(':')[0].replace('.', '/')}.py"

    def symbol(self) -> str:
        """Return the name within the file; "" for the whole file."""
        return self.place.partition(":")[2]

    def location(self) -> str:
        """Return where it is now, like "microshop/orders.py:196 Saga"."""
        module, _, symbol = self.place.partition(":")
        found = importlib.import_module(f"microshop.{module}")
        for part in filter(None, symbol.split(".")):
            found = getattr(found, part)
        line = inspect.getsourcelines(found)[1]
        return f"{self.file()}:{max(line, 1)} {symbol}".rstrip()

    def test_command(self) -> str:
        return f"python -m unittest tests.{self.test}"


INDEX = [
    Pattern("API gateway", "gateway:GatewayHandler.forward",
            "test_gateway.ForwardingTest.test_x", "one_request"),
]


def rows_of(chapter: str) -> list[Pattern]:
    """Return the rows of a chapter."""
    return [row for row in INDEX if row.chapter == chapter]


def as_text() -> str:
    """Return the index for a terminal."""
    blocks = []
    for row in INDEX:
        also = [f"chapter {number_of(row.chapter)}"] if row.chapter else []
        also += [f"exercise {row.exercise}"] if row.exercise else []
        head = f"{row.name} ({', '.join(also)})" if also else row.name
        blocks.append(f"{head}\n    {row.location()}\n    {row.test_command()}")
    return "\n".join(blocks)


def as_markdown() -> str:
    """Return the index as a table for the README."""
    lines = ["| pattern | in `microshop/` | test, in `tests/` | chapter | exercise |",
             "|---|---|---|---|---|"]
    for row in INDEX:
        file = row.file().removeprefix("microshop/")
        place = f"`{file}`: `{row.symbol()}`" if row.symbol() else f"`{file}`"
        chapter = str(number_of(row.chapter)) if row.chapter else ""
        lines.append(f"| {row.name} | {place} | `{row.test}` | {chapter} | {row.exercise or ''} |")
    return "\n".join(lines)
