"""The chapters about calls that fail."""
from microshop.tour.stage import Tour


def service_gone(tour: Tour) -> None:
    """A service is gone."""
    raise NotImplementedError


def service_hangs(tour: Tour) -> None:
    """A service hangs."""
    raise NotImplementedError


def deadline(tour: Tour) -> None:
    """Time is passed on."""
    raise NotImplementedError


def bulkhead(tour: Tour) -> None:
    """A bulkhead keeps the rest quick."""
    raise NotImplementedError


def retries(tour: Tour) -> None:
    """Retries only where a repeat is safe."""
    raise NotImplementedError
