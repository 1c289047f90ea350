"""The exercises: one protection taken out of the product each, for a learner to repair.

Each is one small edit of the present source, so the present source is its solution. Those in
adding.py go the other way: the learner adds something, and a model solution comes with them.
tests/exercise.py runs the exercises, and tests/proofs.py checks that each does what it says.
"""
from pathlib import Path
from typing import NamedTuple


class Edit(NamedTuple):
    """A change in a copy of the project: `old` becomes `new`; without `old`, a new file."""

    file: str  # below the top folder
    old: str   # occurs once in the file
    new: str

    def apply(self, top: Path) -> None:
        """Make the change. Raises ValueError if `old` does not occur exactly once."""
        path = top / self.file
        before = path.read_text() if self.old else self.old
        if self.old and (count := before.count(self.old)) != 1:
            raise ValueError(f"{self.file} has this {count} times instead of once: {self.old}")
        path.write_text(before.replace(self.old, self.new) if self.old else self.new)


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

    task = "Find the fault in that folder, and repair it"
    may_change = ()  # files of tests/ that the learner may edit
    solution = ()    # edits of the present source: none, it is right

    def edits(self) -> tuple[Edit, ...]:
        """Return what makes the learner's copy out of the present source."""
        return (Edit(f"microshop/{self.file}", self.old, self.new),)

    def further_tests(self) -> tuple[str, ...]:
        """Return what must pass besides the test: the rest of its module."""
        return (self.test.rsplit(".", 2)[0],)


class Addition(NamedTuple):
    """An exercise in which the learner adds something. What Exercise has, too, means the same."""

    title: str
    pattern: str
    minutes: int
    test: str                    # fails until it is added
    further: tuple[str, ...]     # tests that must pass then, besides
    may_change: tuple[str, ...]
    solution: tuple[Edit, ...]   # a model solution
    story: str
    hints: tuple[str, ...]
    chapter: str = ""

    task = "Add it in that folder"

    def edits(self) -> tuple[Edit, ...]:
        return ()

    def further_tests(self) -> tuple[str, ...]:
        return self.further
