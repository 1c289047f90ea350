"""What a caller gets from services that answer well, badly, late or not at all, and what those get to see of it."""
import os
import select
import socket
import struct
import threading
import time
import unittest
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

from microshop.chassis import client
from microshop.chassis.client import Client, Reply, Upstream
from microshop.chassis.errors import BadGateway, GatewayTimeout
from microshop.users import Users
from tests.helpers import PATIENCE, read_request, running, upstream

TIMEOUT = PATIENCE / 2  # so that a client that waits for nothing gives up before the stub does
OK, CHUNKED = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ALICE, BOB = OK + b"Content-Length: 5\r\n\r\nAlice", CHUNKED + b"1;a=b\r\nB\r\n2\r\nob\r\n0\r\nT: x\r\n\r\n"
CLOSING = OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nAlice"
MALLORY = OK + b"Content-Length: 7\r\n\r\nMallory"


class Last(bytes):
    """An answer after which a stub closes the connection."""


class Reset(Last):
    """An answer after which a stub resets the connection."""


class Stub:
    """A service that gives its answers in turn, and the last of them ever after."""

    def __init__(self, *answers: bytes):
        self.answers = list(answers)
        self.connections: list[list[bytes]] = []  # the requests that came on each
        self.ended = threading.Semaphore(0)       # released for each connection that is over

    def __call__(self, connection: socket.socket) -> None:
        requests: list[bytes] = []
        self.connections.append(requests)
        try:
            while request := read_request(connection):
                requests.append(request)
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                connection.sendall(answer)
                if isinstance(answer, Reset):
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                if isinstance(answer, Last):
                    return
        finally:
            self.ended.release()


class ClientTest(unittest.TestCase):
    def setUp(self) -> None:
        self.client = Client(timeout=TIMEOUT)
        self.addCleanup(self.client.close)

    def serve(self, *copies: Callable[[socket.socket], None]) -> Upstream:
        """Start a users service of these copies."""
        return Upstream("users", [self.enterContext(upstream(copy)) for copy in copies])

    def call(self, users: Upstream, method: str = "GET", **more: object) -> Reply:
        return self.client.call(users, method, "/users", **more)

    def call_in_turn(self, answers: list[bytes], *methods: str) -> tuple[list, list[int]]:
        """Call a service that gives these answers; return what came of each call, and the requests per connection."""
        stub, outcomes = Stub(*answers), []
        users = self.serve(stub)
        for method in methods:
            try:
                outcomes.append(self.call(users, method).body)
            except BadGateway:
                outcomes.append(BadGateway)
        return outcomes, [len(requests) for requests in stub.connections]


class Answers(ClientTest):
    def test_an_answer_ends_where_its_framing_says(self):
        interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        for what, method, answer, expected in [
            ("Content-Length", "GET", ALICE, (200, b"Alice")),
            ("chunks", "GET", BOB, (200, b"Bob")),
            ("close", "GET", Last(OK + b"\r\nAlice"), (200, b"Alice")),
            ("close, HTTP/1.0", "POST", Last(b"HTTP/1.0 200 OK\r\n\r\nAlice"), (200, b"Alice")),
            ("204", "DELETE", b"HTTP/1.1 204 No Content\r\n\r\n", (204, b"")),
            ("304", "GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", (304, b"")),
            ("HEAD", "HEAD", OK + b"Content-Length: 5\r\n\r\n", (200, b"")),
            ("HEAD of chunks", "HEAD", CHUNKED, (200, b"")),
            ("interim answers", "PUT", interim + ALICE, (200, b"Alice")),
        ]:
            with self.subTest(what):
                reply = self.call(self.serve(Stub(answer)), method)
                self.assertEqual((reply.status, reply.body), expected)

    def test_no_status_is_raised_and_no_redirect_followed(self):
        for status in (302, 307, 401, 404, 407, 409, 500, 503):
            with self.subTest(status):
                stub = Stub(b"HTTP/1.1 %d Well\r\nLocation: /elsewhere\r\nContent-Length: 5\r\n\r\nAlice" % status)
                reply = self.call(self.serve(stub))
                self.assertEqual((reply.status, reply.fields["location"], reply.body), (status, "/elsewhere", b"Alice"))
                self.assertEqual(len(stub.connections), 1)

    def test_a_request_goes_out_as_asked_for_with_nothing_added_but_host_and_length(self):
        stub, target = Stub(CLOSING), "//users/../%2F?a=%20&b"
        users = self.serve(stub)
        host = f"Host: {next(users.copies).removeprefix('http://')}"
        for method, headers, body, fields in [
            ("GET", {"Accept": "*/*"}, None, ["Accept: */*", host]),
            ("PUT", {"Etag": "x"}, b"\0\xff", ["Content-Length: 2", "Etag: x", host]),
            ("POST", {}, None, ["Content-Length: 0", host]),
        ]:
            self.client.call(users, method, target, headers, body)
            head, _, content = stub.connections[-1][0].partition(b"\r\n\r\n")
            line, *lines = head.decode().split("\r\n")
            self.assertEqual((line, sorted(lines), content), (f"{method} {target} HTTP/1.1", fields, body or b""))

    def test_a_line_break_in_a_header_is_refused_before_anything_is_sent(self):
        stub = Stub(ALICE)
        for value in ("1\r\nX-Admin: yes", "1\nX-Admin: yes", "1\rX-Admin: yes", "\r\n\r\nGET /users HTTP/1.1", "1\0"):
            with self.subTest(value):
                self.assertRaises(ValueError, self.call, self.serve(stub), headers={"X-Note": value})
                self.assertTrue(stub.ended.acquire(timeout=PATIENCE))
        self.assertEqual(stub.connections, [[]] * 5)

    def test_a_proxy_in_the_environment_is_ignored(self):
        proxy = self.enterContext(upstream(Stub(MALLORY)))
        with mock.patch.dict(os.environ, http_proxy=proxy, HTTP_PROXY=proxy, all_proxy=proxy, no_proxy="", NO_PROXY=""):
            self.client = Client(timeout=TIMEOUT)
            self.addCleanup(self.client.close)
            self.assertEqual(self.call(self.serve(Stub(ALICE))).body, b"Alice")

    def test_several_copies_are_taken_in_turn(self):
        users = self.serve(Stub(ALICE), Stub(BOB))
        self.assertEqual([self.call(users).body for _ in range(4)], [b"Alice", b"Bob", b"Alice", b"Bob"])

    def test_calls_at_once_each_get_their_own_answer(self):
        def echo(connection: socket.socket) -> None:
            while request := read_request(connection):
                target = request.split()[1]
                connection.sendall(b"%sContent-Length: %d\r\n\r\n%s" % (OK, len(target), target))
        users, targets = self.serve(echo), [f"/users/{number}" for number in range(200)]
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda target: self.client.call(users, "GET", target), targets))
        self.assertEqual([reply.body.decode() for reply in replies], targets)


class KeptConnections(ClientTest):
    def test_a_connection_is_kept_for_the_next_call(self):
        missing = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        self.assertEqual(self.call_in_turn([ALICE, BOB, missing, BOB], "GET", "PUT", "DELETE", "GET"),
                         ([b"Alice", b"Bob", b"", b"Bob"], [4]))

    def test_a_real_service_answers_every_call_on_one_connection(self):
        with running(Users) as users:
            address = Upstream("users", [f"http://127.0.0.1:{users.server_port}"])
            replies = [self.client.call(address, method, target) for method, target in [
                ("GET", "/users/1"), ("HEAD", "/users/1"), ("GET", "/users/999")]]
            self.assertEqual([reply.status for reply in replies], [200, 200, 404])
            self.assertEqual([reply.body for reply in replies[:2]], [b'{"id":1,"name":"Alice"}', b""])
            self.assertEqual(len(users.connections), 1)

    def test_a_connection_is_closed_when_idle_for_too_long_or_when_enough_are_kept(self):
        for limit in ("IDLE_TIME", "MAX_IDLE"):
            with self.subTest(limit), mock.patch.object(client, limit, 0):
                stub = Stub(ALICE)
                users = self.serve(stub)
                self.call(users)
                self.call(users)
                self.assertTrue(stub.ended.acquire(timeout=PATIENCE))
                self.assertEqual(len(stub.connections), 2)

    def test_closing_lets_go_of_every_kept_connection(self):
        stub = Stub(ALICE)
        self.call(self.serve(stub))
        self.client.close()
        self.assertTrue(stub.ended.acquire(timeout=PATIENCE))

    def test_a_connection_is_not_used_again_where_it_cannot_be(self):
        for what, answer in {
            "close": CLOSING,
            "close in a list": CLOSING.replace(b"close", b"keep-alive, Close"),
            "HTTP/1.0": ALICE.replace(b"1.1", b"1.0"),
            "more than the answer": ALICE + MALLORY,
            "more than the chunks": CHUNKED + b"5\r\nAlice\r\n0\r\n\r\n" + MALLORY,
        }.items():
            with self.subTest(what):
                self.assertEqual(self.call_in_turn([answer, BOB], "GET", "GET"), ([b"Alice", b"Bob"], [1, 1]))

    def test_an_answer_that_has_no_body_leaves_the_connection_for_the_next(self):
        for method, answer in (("GET", b"HTTP/1.1 304 Not Modified\r\n\r\n"),
                               ("DELETE", b"HTTP/1.1 204 No Content\r\n\r\n"), ("HEAD", CHUNKED)):
            with self.subTest(method):
                self.assertEqual(self.call_in_turn([answer, BOB], method, "GET"), ([b"", b"Bob"], [2]))

    def test_what_comes_unasked_on_an_idle_connection_never_passes_for_the_next_answer(self):
        stub, go_on = Stub(ALICE), threading.Event()

        def answer(connection: socket.socket) -> None:
            read_request(connection)
            connection.sendall(ALICE)
            go_on.wait(PATIENCE)
            connection.sendall(MALLORY)
            stub(connection)
        users = self.serve(answer)
        self.call(users)
        [idle] = [kept.socket for connections in self.client._connections._idle.values() for kept in connections]
        go_on.set()
        self.assertEqual(select.select([idle], [], [], PATIENCE)[0], [idle])
        self.assertEqual(self.call(users).body, b"Alice")

    def test_what_may_be_sent_twice_is_when_a_kept_connection_turns_out_dead(self):
        for method in ("GET", "PUT", "DELETE"):
            for death in (Last(b""), Reset(b"")):
                with self.subTest(method, death=type(death).__name__):
                    self.assertEqual(self.call_in_turn([ALICE, death, BOB], "GET", method),
                                     ([b"Alice", b"Bob"], [2, 1]))

    def test_it_is_sent_twice_at_most_and_not_once_an_answer_has_begun(self):
        cut_body = Last(OK + b"Content-Length: 5\r\n\r\nAli")
        for answer, counts in [(Last(b""), [2, 1]), (Last(OK), [2]), (cut_body, [2])]:
            with self.subTest(answer):
                self.assertEqual(self.call_in_turn([ALICE, answer], "GET", "GET"), ([b"Alice", BadGateway], counts))

    def test_a_post_is_never_sent_twice(self):
        for method in ("POST", "PATCH"):
            for death in (Last(b""), Reset(b"")):
                with self.subTest(method, death=type(death).__name__):
                    self.assertEqual(self.call_in_turn([ALICE, BOB, death], "GET", method, method),
                                     ([b"Alice", b"Bob", BadGateway], [3]))


class Trouble(ClientTest):
    def assert_bad_gateway(self, users: Upstream, reason: str) -> None:
        with self.assertRaisesRegex(BadGateway, f"^the users service .*{reason}") as raised:
            self.call(users)
        self.assertEqual(raised.exception.members, {"service": "users"})

    def test_an_answer_that_is_not_http_is_a_bad_gateway(self):
        for what, answer in {
            "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
            "bytes": b"\x15\x03\x01\0\x02",
            "lines that end in LF": ALICE.replace(b"\r", b""),
            "two lengths": OK + b"Content-Length: 5\r\nContent-Length: 7\r\n\r\nMallory",
            "a length and chunks": OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "a chunk longer than its size": CHUNKED + b"2\r\nAlice\r\n0\r\n\r\n",
            "a chunk without a size": CHUNKED + b"\r\nAlice\r\n0\r\n\r\n",
            "a chunk of size 0x5": CHUNKED + b"0x5\r\nAlice\r\n0\r\n\r\n",
            "an upgrade": b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        }.items():
            with self.subTest(what):
                self.assert_bad_gateway(self.serve(Stub(answer)), "not valid HTTP")

    def test_an_answer_cut_short_is_a_bad_gateway(self):
        for what, answer in {
            "no head": b"", "half a head": OK + b"Content-Le", "half a body": ALICE[:-2],
            "no last chunk": CHUNKED + b"5\r\nAlice\r\n", "nothing after 100": b"HTTP/1.1 100 Continue\r\n\r\n",
        }.items():
            with self.subTest(what):
                self.assert_bad_gateway(self.serve(Stub(Last(answer))), "closed the connection")

    def test_a_service_out_of_reach_is_a_bad_gateway(self):
        self.assert_bad_gateway(self.serve(Stub(Reset(b""))), "out of reach")
        with socket.socket() as deaf:  # bound, but does not listen
            deaf.bind(("127.0.0.1", 0))
            self.assert_bad_gateway(Upstream("users", [f"http://127.0.0.1:{deaf.getsockname()[1]}"]), "out of reach")

    @mock.patch.object(client, "MAX_ANSWER", 1000)
    def test_an_answer_may_not_be_longer_than_allowed(self):
        for what, frame in {
            "declared": lambda size: OK + b"Content-Length: %d\r\n\r\n" % size + b"x" * min(size, 1000),
            "chunked": lambda size: CHUNKED + b"1\r\nx\r\n%x\r\n" % (size - 1) + b"x" * (size - 1) + b"\r\n0\r\n\r\n",
            "until close": lambda size: Last(OK + b"\r\n" + b"x" * size),
        }.items():
            with self.subTest(what):
                self.assertEqual(self.call(self.serve(Stub(frame(1000)))).body, b"x" * 1000)
                self.assert_bad_gateway(self.serve(Stub(frame(1001))), "1000 bytes at most")

    def trickle(self, beginning: bytes, crumb: bytes) -> Upstream:
        """Start a service whose answer goes on for ever, crumb by crumb."""
        over = threading.Event()

        def answer(connection: socket.socket) -> None:
            read_request(connection)
            connection.sendall(beginning)
            while not over.wait(0.005):
                connection.sendall(crumb)
        users = self.serve(answer)
        self.addCleanup(over.set)
        return users

    def test_an_answer_that_is_not_whole_in_time_is_a_gateway_timeout(self):
        for what, beginning, crumb in [
            ("silence", b"", b""),
            ("a slow head", OK + b"X-Slow: ", b"x"),
            ("interim answers for ever", b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
            ("a slow body", OK + b"Content-Length: 1000000\r\n\r\n", b"x"),
            ("slow chunks", CHUNKED, b"1\r\nx\r\n"),
            ("a slow body until close", OK + b"\r\n", b"x"),
        ]:
            with self.subTest(what):
                users, started = self.trickle(beginning, crumb), time.monotonic()
                with self.assertRaisesRegex(GatewayTimeout, "^the users service ") as raised:
                    Client(timeout=0.15).call(users, "GET", "/users")
                self.assertEqual(raised.exception.members, {"service": "users"})
                self.assertTrue(0.12 < time.monotonic() - started < 1.5)

    def test_a_request_that_is_not_taken_in_time_is_a_gateway_timeout(self):
        over = threading.Event()
        self.addCleanup(over.set)

        def take_nothing(connection: socket.socket) -> None:
            over.wait(PATIENCE)

        def take_crumbs(connection: socket.socket) -> None:
            while connection.recv(65536) and not over.wait(0.1):
                pass
        for taker in (take_nothing, take_crumbs):
            with self.subTest(taker.__name__):
                users, started = self.serve(taker), time.monotonic()
                self.assertRaises(GatewayTimeout, self.call, users, "POST", body=bytes(2**24), timeout=0.15)
                self.assertLess(time.monotonic() - started, 1.5)

    def test_a_call_may_have_a_timeout_of_its_own(self):
        users, started = self.trickle(b"", b""), time.monotonic()
        self.assertRaises(GatewayTimeout, self.call, users, timeout=0.1)
        self.assertLess(time.monotonic() - started, 1.5)
