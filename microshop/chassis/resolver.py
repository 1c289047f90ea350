"""From the name of a host to its addresses, in time.

The system's look-up, socket.getaddrinfo, has no timeout: if no name server answers, it takes 10 s
or more. So it runs in a thread, and a caller waits for it only as long as it has time.

Law: nothing here opens a connection.
"""
import errno
import ipaddress
import math
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from microshop.chassis.resilience import Clock

# Seconds for which addresses are used while no newer ones can be found. Kubernetes moves a name
# server from a lost machine after 5 minutes, so this bridges it; after much longer, the address
# may belong to another service. RFC 8767 discusses such stale addresses.
STALE_TIME = 600.0
# Seconds for which calls join a look-up that is silent, if they know no address: its packet may be
# lost, although the name server answers again.
JOIN_TIME = 2.0
# Errors that are answers of a name server: there is no such name, or it has no address. After
# all others, addresses that were found before may be used.
ANSWERS = (socket.EAI_NONAME, socket.EAI_NODATA)


def look_up(name: str) -> list[str]:
    """Return the addresses of a host as the system finds them, however long that takes.

    The system gets bytes: Python encodes a str by IDNA, whose errors are not OSErrors.
    """
    found = socket.getaddrinfo(name.encode(), None, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def is_address(host: str) -> bool:
    """Return whether a host is given by its IP address instead of its name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class LookUp(Future):
    """A look-up of a name. Any number of threads may wait for its result."""

    def __init__(self, began: float):
        super().__init__()
        self.began = began


class Resolver:
    """Finds the addresses of hosts, and remembers the last ones of each name.

    Calls that need the same name share one look-up, so a silent name server costs one thread for
    each name; for a name without a known address, one every JOIN_TIME, until the system gives up
    the first one. The threads are daemons: they do not keep the process from ending.
    """

    def __init__(self, look_up: Callable[[str], list[str]] = look_up,
                 clock: Clock = time.monotonic):
        self._look_up, self._clock = look_up, clock
        self._last: dict[str, LookUp] = {}                    # by name
        self._known: dict[str, tuple[list[str], float]] = {}  # by name: addresses, and until when
        self._lock = threading.Lock()                         # held to begin a look-up

    def find(self, host: str, timeout: float) -> list[str]:
        """Return the addresses of a host, after waiting up to `timeout` seconds for them.

        If the look-up fails, or has been silent for half of that time, these are the addresses that
        were found last, for up to STALE_TIME. If there are none, or if the name no longer
        exists, raises OSError, which is a TimeoutError if the time is over.
        """
        if is_address(host):
            return [host]
        known = self._recall(host)
        look_up = self._begin(host, math.inf if known else JOIN_TIME)
        if known:  # calls that come later wait less: the silence counts from its beginning
            timeout = look_up.began + timeout / 2 - self._clock()
        try:
            return look_up.result(timeout)
        except TimeoutError:
            problem: OSError = TimeoutError(
                f"the name {host} was not resolved in time; check the name server")
        except socket.gaierror as error:
            problem = OSError(f"the name {host} cannot be resolved ({error.strerror}); "
                              "check the base URL and the name server")
        except OSError as error:  # this machine lacks something
            problem = OSError(f"the name {host} was not looked up: {error.strerror}")
        if known := self._recall(host):
            return known
        raise problem

    def _recall(self, name: str) -> list[str]:
        """Return the addresses that were found last, unless that was too long ago."""
        known, until = self._known.get(name, ([], 0.0))
        return known if self._clock() < until else []

    def _begin(self, name: str, join_time: float) -> LookUp:
        """Return the look-up of a name that began within `join_time` seconds and is under way.

        If there is none, begin one.
        """
        with self._lock:
            look_up, now = self._last.get(name), self._clock()
            if look_up and not look_up.done() and now < look_up.began + join_time:
                return look_up
            look_up = self._last[name] = LookUp(now)
        try:
            threading.Thread(target=self._finish, args=(name, look_up), daemon=True).start()
        except RuntimeError:  # to look it up here would take longer than the caller has time
            look_up.set_exception(OSError(errno.EAGAIN, "there is no room for another thread"))
        return look_up

    def _finish(self, name: str, look_up: LookUp) -> None:
        """Look a name up, and give the result to the calls that wait for it."""
        try:
            found = self._look_up(name)
            self._known[name] = found, self._clock() + STALE_TIME
            look_up.set_result(found)
        except Exception as error:  # raised in the threads that wait
            if isinstance(error, socket.gaierror) and error.errno in ANSWERS:
                self._known.pop(name, None)
            look_up.set_exception(error)
