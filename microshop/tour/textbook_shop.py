"""The chapter about the version of the shop that textbooks show."""
from microshop.tour.stage import Tour


def textbook(tour: Tour) -> None:
    """The textbook version."""
    raise NotImplementedError
