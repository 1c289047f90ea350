"""The chapters about running a shop, and about the version that textbooks show."""
from microshop.tour.stage import Tour


def overload(tour: Tour) -> None:
    """Overload and slow clients."""
    raise NotImplementedError


def rolling_restart(tour: Tour) -> None:
    """Replace everything while it runs."""
    raise NotImplementedError


def textbook(tour: Tour) -> None:
    """The textbook version."""
    raise NotImplementedError
