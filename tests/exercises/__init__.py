"""The exercises: one protection taken out of the product each, for a learner to repair.

Each is one small edit of the present source, so the present source is its solution. exercise.py
runs them, and proofs.py checks that each does what its story says.
"""
from typing import NamedTuple


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
