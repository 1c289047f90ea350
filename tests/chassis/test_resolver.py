"""Names of hosts: their look-ups end in time, share a thread, and may use what was found before."""
import errno
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

from microshop.chassis import resolver
from microshop.chassis.resolver import JOIN_TIME, STALE_TIME, LookUp, Resolver
from microshop.users import Users
from tests.chassis.things import StoppedClock
from tests.helpers import NOBODY, PATIENCE, Process, ask, process, running, wait_until

ADDRESSES = ["192.0.2.1", "192.0.2.2"]
MOMENT = 0.01  # seconds that a call waits for a look-up that stays silent


class NameService:
    """Stands for the system's look-up: finds `addresses`, or does as `mood` says.

    "silent": it answers no call before `go_on` is set.
    """

    def __init__(self) -> None:
        self.addresses = ADDRESSES
        self.mood: str | Exception = ""
        self.asked: list[str] = []
        self.go_on = threading.Event()

    def __call__(self, name: str) -> list[str]:
        self.asked.append(name)
        if isinstance(self.mood, Exception):
            raise self.mood
        if self.mood == "silent":
            self.go_on.wait(PATIENCE)
        return self.addresses


class ResolverTest(unittest.TestCase):
    def setUp(self) -> None:
        self.names, self.clock = NameService(), StoppedClock()
        self.resolver = Resolver(self.names, self.clock.monotonic)
        self.addCleanup(self.names.go_on.set)

    def find(self, timeout: float = PATIENCE) -> list[str]:
        return self.resolver.find("users", timeout)

    def find_at_most(self, seconds: float, known: bool) -> float:
        """Return how long a call waits for a silent look-up at most, as it tells LookUp.result."""
        with mock.patch.object(LookUp, "result", side_effect=TimeoutError) as result:
            if known:
                self.assertEqual(self.find(seconds), ADDRESSES, "the addresses found before")
            else:
                self.assertRaises(TimeoutError, self.find, seconds)
        return result.call_args.args[0]

    def test_an_address_needs_no_look_up_and_no_thread(self):
        with mock.patch.object(threading, "Thread", side_effect=AssertionError("a thread")):
            for address in ("127.0.0.1", "::1"):
                self.assertEqual(self.resolver.find(address, 0), [address])
        self.assertEqual(self.names.asked, [], "names that were looked up")

    def test_a_name_is_looked_up_for_each_call_so_that_a_moved_service_is_found(self):
        self.assertEqual([self.find(), self.find()], [ADDRESSES, ADDRESSES])
        self.assertEqual(self.names.asked, ["users", "users"])

    def test_calls_at_the_same_time_share_one_look_up_and_its_thread(self):
        self.names.mood = "silent"
        for _ in range(100):
            self.assertRaises(TimeoutError, self.find, 0)
        with ThreadPoolExecutor(8) as pool:
            calls = [pool.submit(self.find) for _ in range(8)]
            self.names.go_on.set()
            self.assertEqual([call.result(PATIENCE) for call in calls], [ADDRESSES] * 8)
        self.assertEqual(len(self.names.asked), 1, "look-ups, each in a thread, for 100 calls that "
                         "gave up a silent name server and 8 that waited for it")

    def test_no_call_joins_a_look_up_that_has_been_silent_for_join_time(self):
        self.names.mood = "silent"
        with mock.patch.object(threading, "Thread", wraps=threading.Thread) as thread:
            for passed, expected in ((0, 1), (JOIN_TIME - 0.01, 1), (0.02, 2), (0.02, 2)):
                self.clock.now += passed
                self.assertRaises(TimeoutError, self.find, 0)
                self.assertEqual(thread.call_count, expected, "look-ups: a new one when the last "
                                 "is JOIN_TIME old, as its packet may be lost, but not before")

    def test_while_the_addresses_found_before_are_used_there_is_one_silent_look_up(self):
        self.find()
        self.names.mood = "silent"
        with mock.patch.object(threading, "Thread", wraps=threading.Thread) as thread:
            for _ in range(10):
                self.assertEqual(self.find(0), ADDRESSES)
                self.clock.now += JOIN_TIME
        self.assertEqual(thread.call_count, 1, "look-ups: no call waits for the silent one, so "
                                               "there is no need for another")

    def test_a_silent_name_does_not_hold_up_another(self):
        self.names.mood = "silent"
        self.assertRaises(TimeoutError, self.find, 0)
        self.names.mood = ""
        self.assertEqual(self.resolver.find("products", PATIENCE), ADDRESSES)

    def test_a_silent_look_up_costs_the_time_of_the_call_and_is_named(self):
        self.names.mood = "silent"
        with self.assertRaisesRegex(TimeoutError, "^the name users was not resolved in time; "
                                                  "check the name server$"):
            self.find(MOMENT)
        self.assertEqual(self.find_at_most(0.2, known=False), 0.2, "seconds to wait, of 0.2")

    def test_the_addresses_found_before_are_used_if_a_look_up_is_silent_for_half_of_the_time(self):
        self.find()
        self.names.mood = "silent"
        self.assertEqual(self.find(MOMENT), ADDRESSES)
        self.assertAlmostEqual(self.find_at_most(0.2, known=True), 0.1,
                               msg="seconds to wait for a newer address, of 0.2")
        self.clock.now += 0.07
        self.assertAlmostEqual(self.find_at_most(0.2, known=True), 0.03,
                               msg="seconds to wait, if it has been silent for 0.07 s before")

    def test_when_a_look_up_fails_the_addresses_found_before_are_used(self):
        self.find()
        for error in (socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), TimeoutError(),
                      OSError(errno.EMFILE, "Too many open files")):
            with self.subTest(type(error).__name__):
                self.names.mood = error
                self.assertEqual(self.find(), ADDRESSES)

    def test_addresses_that_the_name_server_no_longer_gives_are_forgotten(self):
        for answer in (socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
                       socket.gaierror(socket.EAI_NODATA, "No address associated with hostname")):
            with self.subTest(answer.strerror):
                self.names.mood = ""
                self.find()
                for mood in (answer, socket.gaierror(socket.EAI_AGAIN, "Temporary failure")):
                    self.names.mood = mood
                    with self.assertRaises(OSError, msg="the addresses found before were used "
                                           f"after the name server had said: {answer.strerror}"):
                        self.find()

    def test_if_the_name_server_fails_the_addresses_used_are_those_found_last(self):
        self.find()
        self.names.addresses = ["192.0.2.9"]
        self.find()
        self.names.mood = socket.gaierror(socket.EAI_AGAIN, "Temporary failure")
        self.assertEqual(self.find(), ["192.0.2.9"], "the service has moved there")

    def test_addresses_found_before_are_used_no_longer_than_stale_time(self):
        self.find()
        self.names.mood = socket.gaierror(socket.EAI_AGAIN, "Temporary failure")
        self.clock.now += STALE_TIME - 1
        self.assertEqual(self.find(), ADDRESSES, "they are a second younger than STALE_TIME")
        self.clock.now += 2
        self.assertRaises(OSError, self.find)

    def test_a_name_that_is_unknown_is_named_with_what_to_check(self):
        self.names.mood = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        with self.assertRaisesRegex(
                OSError, r"^the name users cannot be resolved \(Name or service not known\); "
                "check the base URL and the name server$"):
            self.find()

    def test_an_odd_name_is_unknown_and_no_other_error(self):
        for name in ("x" * 64, "xn--" + "x" * 60, "a..b"):
            with self.subTest(name), self.assertRaises(socket.gaierror):
                resolver.look_up(name)

    def test_the_systems_look_up_finds_this_machine(self):
        self.assertIn("127.0.0.1", Resolver().find("localhost", PATIENCE))

    def test_where_no_thread_can_be_started_a_look_up_fails_at_once(self):
        no_room = mock.patch.object(threading.Thread, "start", side_effect=RuntimeError)
        with no_room, self.assertRaisesRegex(
                OSError, "^the name users was not looked up: there is no room for another thread$",
                msg="the caller has looked it up itself, which may take longer than it has time"):
            self.find()
        self.find()
        with no_room:
            self.assertEqual(self.find(), ADDRESSES, "the addresses found before")


class NameServer(socketserver.UDPServer):
    """A real one, which says of each name that it is 127.0.0.1, until it is silent."""

    ADDRESS = "127.83.0.53"  # of this machine, as all of 127.0.0.0/8; hardly used by another

    def __init__(self) -> None:
        super().__init__((self.ADDRESS, 53), socketserver.BaseRequestHandler)
        self.is_silent = False
        self.asked: list[bytes] = []

    def finish_request(self, request: tuple[bytes, socket.socket], client: tuple) -> None:
        query, own_socket = request
        self.asked.append(query)
        if not self.is_silent:
            own_socket.sendto(self._answer(query), client)

    def _answer(self, query: bytes) -> bytes:
        """Return the answer to a query (RFC 1035 section 4): one address, if it asks for IPv4."""
        end = query.index(0, 12) + 1  # of the name, which begins after the header
        is_ipv4 = query[end:end + 2] == b"\0\1"
        header = query[:2] + b"\x81\x80\0\1" + bytes([0, is_ipv4]) + b"\0\0\0\0"
        record = b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4\x7f\0\0\1" if is_ipv4 else b""
        return header + query[12:end + 4] + record


# Runs a command with other files in place of /etc/resolv.conf and /etc/nsswitch.conf: a mount
# namespace shows them to no other process.
MOUNT = """\
mount --bind "$0"/resolv.conf /etc/resolv.conf || exit
[ ! -e /etc/nsswitch.conf ] || mount --bind "$0"/nsswitch.conf /etc/nsswitch.conf || exit
exec "$@"
"""
RUN_MOUNTED = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
PLAIN_LOOK_UP = "import socket; socket.getaddrinfo('plain-name', None)"


class SilentNameServerTest(unittest.TestCase):
    """A gateway in a process of its own, which asks a name server of ours."""

    def setUp(self) -> None:
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        # A look-up without an answer takes 30 s, far longer than any answer of the gateway's.
        (folder / "resolv.conf").write_text(
            f"nameserver {NameServer.ADDRESS}\noptions timeout:30 attempts:1\n")
        (folder / "nsswitch.conf").write_text("hosts: files dns\n")
        self.mounted = ["unshare", "--mount", "sh", "-c", MOUNT, str(folder), sys.executable]
        try:
            self.name_server = self.enterContext(NameServer())
            subprocess.run([*self.mounted, "--version"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            self.skipTest("only root on Linux may run a name server and replace resolv.conf")
        threading.Thread(target=self.name_server.serve_forever, args=[0.01]).start()
        self.addCleanup(self.name_server.shutdown)

    def start(self, *arguments: str) -> Process:
        return self.enterContext(process("tests.after", RUN_MOUNTED, *self.mounted, *arguments))

    def test_no_request_waits_longer_for_a_silent_name_server_than_timeout_says(self):
        users = self.enterContext(running(Users))
        gateway = self.start(
            "-m", "microshop.gateway", "--port=0", "--timeout=2", f"--orders-url={NOBODY}",
            f"--users-url=http://users-name:{users.server_port}",
            "--products-url=http://products-name:3002")
        port = gateway.port("API Gateway")
        self.assertEqual(ask(port, target="/users").status, 200, "GET /users, by its name")

        self.name_server.is_silent = True
        users.connections.close_idle(-1)  # so the next request needs a new connection
        wait_until(lambda: not users.connections, "the gateway's connection to be closed")
        look_up = self.start("-c", PLAIN_LOOK_UP)
        wait_until(lambda: any(b"plain-name" in query for query in self.name_server.asked),
                   "a plain look-up to begin")
        answer = ask(port, target="/users")
        self.assertEqual(answer.status, 200, f"GET /users, whose address is known: {answer.body}")
        answer = ask(port, target="/products")
        self.assertEqual((answer.status, answer.json["detail"]), (
            502, "the products service cannot be reached: the name products-name was not resolved "
            "in time; check the name server"))
        wait_until(lambda: ask(port, target="/health").json["services"]["users"] == "ok",
                   "GET /health to find users")
        self.assertEqual(gateway.stop(), 0, "the gateway's exit status, with a look-up under way")
        self.assertIsNone(look_up.popen.poll(), "all of this took longer than a plain look-up, "
                                                "which began before and takes 30 s: some request "
                                                "has waited for one")


if __name__ == "__main__":
    unittest.main()
