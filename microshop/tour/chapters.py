"""All chapters of the tour, in their order."""
from collections.abc import Callable
from typing import NamedTuple

from microshop.tour import failures, first_steps, running, sagas, textbook_shop
from microshop.tour.stage import Tour


class Chapter(NamedTuple):
    """A chapter: its number, its name (that of its function), its title, and the function."""

    number: int
    name: str
    title: str
    function: Callable[[Tour], None]


FUNCTIONS = [
    first_steps.one_request,
    first_steps.own_data,
    failures.service_gone,
    failures.service_hangs,
    failures.deadline,
    failures.bulkhead,
    failures.retries,
    sagas.saga,
    sagas.crash,
    sagas.no_answer,
    sagas.tombstone,
    first_steps.two_editors,
    running.overload,
    running.rolling_restart,
    textbook_shop.textbook,
]


def all_chapters() -> list[Chapter]:
    """Return the chapters; the title of each is the first line of its function's docstring."""
    return [Chapter(number, function.__name__, title_of(function), function)
            for number, function in enumerate(FUNCTIONS, start=1)]


def title_of(function: Callable) -> str:
    return (function.__doc__ or "").partition("\n")[0].rstrip(".")


def number_of(name: str) -> int:
    """Return the number of the chapter with this name."""
    return next(chapter.number for chapter in all_chapters() if chapter.name == name)
