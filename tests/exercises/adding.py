"""Exercises in which the learner adds something, each with a model solution."""
from tests.exercises import Addition

EXERCISES: list[Addition] = [
]
