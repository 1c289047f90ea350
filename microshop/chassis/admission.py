"""Who may ask: a rate limit for each client, and the bearer token that writes need."""
import hmac
import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple


class Rate(NamedTuple):
    """So many requests in so many seconds."""

    requests: int
    seconds: int


class RateLimit:
    """A token bucket for each client: `rate` on average, and `rate.requests` at once.

    A bucket is one number, the time at which it is full again (the generic cell rate algorithm): at 5 an hour each
    token moves that by 720 s, and it may lie an hour ahead, when the bucket is empty, but no further.
    Of more than MOST_CLIENTS who was not seen for longest is forgotten, so a million addresses cost no more memory.
    """

    MOST_CLIENTS = 10_000

    def __init__(self, rate: Rate, clock: Callable[[], float] = time.monotonic):
        self.rate = rate
        self._clock = clock
        self._full_at: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, client: str) -> float:
        """Take a token out of a client's bucket; return 0, or the seconds until there is one."""
        with self._lock:
            now = self._clock()
            full_at = max(self._full_at.get(client, now), now) + self.rate.seconds / self.rate.requests
            too_far = full_at - now - self.rate.seconds
            if too_far <= 1e-6:  # by which a sum of many tokens may be off
                self._full_at[client], too_far = full_at, 0.0
            self._full_at.move_to_end(client)
            if len(self._full_at) > self.MOST_CLIENTS:
                self._full_at.popitem(last=False)
            return too_far


def client_of(address: str) -> str:
    """Return whom an address stands for: of IPv6 its first 64 bits, since one host has all the rest to choose from."""
    if ":" not in address:
        return address
    host = ipaddress.IPv6Address(address)
    return str(host.ipv4_mapped or ipaddress.IPv6Network((int(host) >> 64 << 64, 64)))


def is_bearer(authorization: str, token: str) -> bool:
    """Tell whether an Authorization field shows the token (RFC 6750 2.1), in a time that tells nothing about it."""
    scheme, _, shown = authorization.partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(shown.strip(" ").encode(), token.encode())
