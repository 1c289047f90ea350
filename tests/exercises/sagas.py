"""Exercises that go with the chapters in microshop/tour/sagas.py."""
from tests.exercises import Exercise

EXERCISES: list[Exercise] = [
]
