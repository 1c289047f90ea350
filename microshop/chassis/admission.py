"""Which requests are let in: rate limit, bearer token, and writes that a browser sends.

Law: nothing here answers a request; it judges addresses and header values. handler.py and the
gateway do the rest.
"""
import hmac
import ipaddress
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import NamedTuple

SAFE_METHODS = {"GET", "HEAD", "OPTIONS", "TRACE"}  # they change nothing: RFC 9110 9.2.1

OWN_NAMES = {"localhost", "127.0.0.1", "::1"}  # of any machine, for itself
ADDED_BY_PROXIES = {"forwarded", "via", "x-real-ip"}  # besides x-forwarded-for and the like


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


def host_name(host: str) -> str:
    """Return the name in a Host header: without the port, and an IPv6 address without brackets."""
    return re.sub(":[0-9]*$", "", host).strip("[]").lower()


def is_local(client: str, own: str, headers: Mapping[str, str]) -> bool:
    """Return whether a request came from this machine, not through a proxy, and for this machine.

    `client` is the client's address, and `own` the one at which it has reached us. A request for
    another name comes from a proxy, or from a web page that lets its own name lead here (DNS
    rebinding). `headers` have lower-case names.
    """
    is_here = client == own or ipaddress.ip_address(client).is_loopback
    is_proxied = any(name in ADDED_BY_PROXIES or name.startswith("x-forwarded") for name in headers)
    return is_here and not is_proxied and (
        host_name(headers.get("host", "localhost")) in {own, *OWN_NAMES})


def bearer_token(authorization: str) -> str:
    """Return the token in an Authorization header, or "" (RFC 6750 section 2.1)."""
    scheme, _, token = authorization.partition(" ")
    return token.strip(" ") if scheme.lower() == "bearer" else ""


def is_same(given: str, token: str) -> bool:
    """Compare two tokens; it takes the same time however many characters are right."""
    return hmac.compare_digest(given.encode(), token.encode())


def is_cross_origin(headers: Mapping[str, str]) -> bool:
    """Return whether a web page of another origin made a browser send a request.

    Any page that a person visits can send a POST to localhost. It cannot read the answer, but the
    write would be done: cross-site request forgery. Browsers send Sec-Fetch-Site to localhost and
    over https, and Origin with every write; other clients, such as curl, send neither. Go's
    http.CrossOriginProtection decides in the same way. `headers` have lower-case names.
    """
    if site := headers.get("sec-fetch-site"):
        return site not in ("same-origin", "none")  # none: a person typed the address
    origin = headers.get("origin", "")
    return bool(origin) and origin.partition("://")[1:] != ("://", headers.get("host"))
