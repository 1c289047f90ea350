"""Which requests are let in: a rate limit for each client, and the bearer token that writes need.

Law: nothing here knows HTTP requests, only addresses and header values; the gateway does the rest.
"""
import hmac
import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple


class Rate(NamedTuple):
    """How many requests are allowed in how many seconds."""

    requests: int
    seconds: int


class RateLimit:
    """A token bucket for each client: `rate` on average, in bursts of up to `rate.requests`.

    A bucket is stored as one number, the time when it will be full again (the generic cell rate
    algorithm). At 5 requests an hour, each request moves that time by 720 s. The bucket is empty
    when the time is an hour ahead, and no request may move it further.
    Only the MOST_CLIENTS seen last are remembered: so a million addresses need no more memory.
    """

    MOST_CLIENTS = 10_000

    def __init__(self, rate: Rate, clock: Callable[[], float] = time.monotonic):
        self.rate = rate
        self._clock = clock
        self._full_at: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, client: str) -> float:
        """Take a token from a client's bucket; return 0, or the seconds until there will be one."""
        seconds_per_token = self.rate.seconds / self.rate.requests
        with self._lock:
            now = self._clock()
            full_at = max(self._full_at.get(client, now), now) + seconds_per_token
            wait = full_at - now - self.rate.seconds
            if wait <= 1e-6:  # the rounding error of a sum of many tokens
                self._full_at[client], wait = full_at, 0.0
            self._full_at.move_to_end(client)
            if len(self._full_at) > self.MOST_CLIENTS:
                self._full_at.popitem(last=False)
            return wait


def client_of(address: str) -> str:
    """Return the client that an IP address belongs to.

    For IPv6 that is the /64 network, since a single host may use all addresses in one.
    """
    if ":" not in address:
        return address
    host = ipaddress.IPv6Address(address)
    return str(host.ipv4_mapped or ipaddress.IPv6Network((int(host) >> 64 << 64, 64)))


def is_bearer(authorization: str, token: str) -> bool:
    """Return whether an Authorization header carries the token (RFC 6750 section 2.1).

    The comparison takes the same time however many characters are right.
    """
    scheme, _, given = authorization.partition(" ")
    is_equal = hmac.compare_digest(given.strip(" ").encode(), token.encode())
    return scheme.lower() == "bearer" and is_equal
