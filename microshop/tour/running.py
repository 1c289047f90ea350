"""The chapters about running a shop."""
from microshop.tour.stage import Tour


def overload(tour: Tour) -> None:
    """Overload and slow clients."""
    raise NotImplementedError


def rolling_restart(tour: Tour) -> None:
    """Replace everything while it runs."""
    raise NotImplementedError
