"""The chapters about orders."""
from microshop.tour.stage import Tour


def saga(tour: Tour) -> None:
    """An order is a saga."""
    raise NotImplementedError


def crash(tour: Tour) -> None:
    """A crash in the middle of an order."""
    raise NotImplementedError


def nobody_knows(tour: Tour) -> None:
    """Nobody knows yet."""
    raise NotImplementedError


def tombstone(tour: Tour) -> None:
    """The release that overtakes its reservation."""
    raise NotImplementedError
