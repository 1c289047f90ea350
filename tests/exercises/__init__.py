"""The exercises: one protection taken out of the product each, for a learner to repair.

Each is one small edit of the present source, so the present source is its solution. Those in
adding.py go the other way: the learner adds something, and a model solution comes with them.
tests/exercise.py runs the exercises, and tests/proofs.py checks that each does what it says.
"""
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


def edit(path: Path, old: str, new: str) -> None:
    """Change a file. Raises ValueError if `old` does not occur exactly once in it."""
    before = path.read_text()
    if (count := before.count(old)) != 1:
        raise ValueError(f"{path} has this {count} times instead of once: {old}")
    path.write_text(before.replace(old, new))


class Exercise(NamedTuple):
    """An exercise: what is taken out, the test that finds it, and what the learner is told."""

    title: str
    pattern: str            # a name in the tour's index
    minutes: int            # that a learner needs, from 5 to 45
    file: str               # in microshop/
    old: str                # occurs once in that file
    new: str                # what it is replaced by
    test: str               # fails with `new`; below tests, like "test_saga.SagaTest.test_x"
    story: str              # what users notice, in a few sentences; not where the fault is
    hints: tuple[str, ...]  # two or three, each says more than the one before
    chapter: str = ""       # the tour's chapter (its function's name) that shows the fault
    related: str = ""       # else one about the same pattern, in which the fault does not show

    task = "Find the fault in that folder, and repair it"
    answer = "The original is in the top folder."
    may_change = ()  # files of tests/ that the learner may edit
    look = ""

    def prepare(self, top: Path) -> None:
        """Make the learner's copy out of a fresh copy of the project: take the protection out."""
        edit(top / "microshop" / self.file, self.old, self.new)

    def solve(self, top: Path) -> None:
        """Solve the exercise in a fresh copy of the project, which is right as it is."""

    def further_tests(self) -> tuple[str, ...]:
        """Return what must pass besides the test: the rest of its module."""
        return (self.test.rsplit(".", 2)[0],)


class Addition(NamedTuple):
    """An exercise in which the learner adds something. What Exercise has, too, means the same."""

    title: str
    pattern: str
    minutes: int
    test: str                          # fails until it is added
    further: tuple[str, ...]           # tests that must pass then, besides
    may_change: tuple[str, ...]
    solution: Callable[[Path], None]   # adds it to a fresh copy of the project
    story: str
    hints: tuple[str, ...]
    look: str                          # a target at the gateway that shows it, like "/reviews"
    chapter: str = ""

    related = ""
    task = "Add it in that folder"
    answer = "A model solution is in tests/exercises/adding.py."

    def prepare(self, top: Path) -> None:
        """Leave a fresh copy of the project as it is."""

    def solve(self, top: Path) -> None:
        self.solution(top)

    def further_tests(self) -> tuple[str, ...]:
        return self.further
