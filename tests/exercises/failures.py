"""Exercises that go with the chapters in microshop/tour/failures.py."""
from tests.exercises import Exercise

EXERCISES: list[Exercise] = [
]
