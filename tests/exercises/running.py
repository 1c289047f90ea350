"""Exercises that go with the chapters in microshop/tour/running.py."""
from tests.exercises import Exercise

EXERCISES: list[Exercise] = [
]
