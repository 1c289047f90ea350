"""Exercises that go with the chapters in microshop/tour/first_steps.py."""
from tests.exercises import Exercise

EXERCISES: list[Exercise] = [
]
