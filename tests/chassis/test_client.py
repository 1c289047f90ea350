"""What a caller gets from services that answer well, badly, late or not at all, and what those get to see of it."""
import contextlib
import errno
import os
import re
import select
import socket
import struct
import threading
import time
import unittest
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

from microshop.chassis import client, connections
from microshop.chassis.client import Client, Reply, Upstream
from microshop.chassis.errors import BadGateway, Broken, GatewayTimeout, Unreachable, UpstreamError, UpstreamUnavailable
from microshop.chassis.resilience import CircuitBreaker, RetryBudget
from microshop.users import Users
from tests.helpers import PATIENCE, read_request, running, upstream, wait_until

TIMEOUT = PATIENCE / 2  # so that a client that waits for nothing gives up before the stub does
OK, CHUNKED = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ALICE, BOB = OK + b"Content-Length: 5\r\n\r\nAlice", CHUNKED + b"1;a=b\r\nB\r\n2\r\nob\r\n0\r\nT: x\r\n\r\n"
CLOSING = OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nAlice"
MALLORY = OK + b"Content-Length: 7\r\n\r\nMallory"


def status(number: int) -> bytes:
    return b"HTTP/1.1 %d Well\r\nContent-Length: 0\r\n\r\n" % number


class Last(bytes):
    """An answer after which a stub closes the connection."""


class Reset(Last):
    """An answer after which a stub resets the connection."""


# What a service may send of an answer when the connection breaks.
BROKEN = [kind(sent) for sent in (b"", OK + b"Content-Le", OK + b"Content-Length: 5\r\n\r\nAli",
                                  CHUNKED + b"5\r\nAlice\r\n") for kind in (Last, Reset)]


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

    def serve(self, *instances: Callable[[socket.socket], None]) -> Upstream:
        """Start a users service of these instances."""
        return Upstream("users", [self.enterContext(upstream(instance)) for instance in instances])

    def call(self, users: Upstream, method: str = "GET", **more: object) -> Reply:
        return self.client.call(users, method, "/users", **more)

    def call_in_turn(self, answers: list[bytes], *methods: str) -> tuple[list, list[int]]:
        """Call a service that gives these answers; return what came of each call, and the requests per connection."""
        stub, outcomes = Stub(*answers), []
        users = self.serve(stub)
        for method in methods:
            try:
                outcomes.append(self.call(users, method).body)
            except UpstreamError as error:
                outcomes.append(BadGateway if isinstance(error, BadGateway) else type(error))
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

    def test_a_request_goes_out_as_asked_for_with_nothing_added_but_host_length_and_the_time_left(self):
        stub, target = Stub(CLOSING), "//users/../%2F?a=%20&b"
        users = self.serve(stub)
        host = f"Host: {users.instances[0].base_url.removeprefix('http://')}"
        for method, headers, body, fields in [
            ("GET", {"Accept": "*/*"}, None, ["Accept: */*", host]),
            ("PUT", {"Etag": "x"}, b"\0\xff", ["Content-Length: 2", "Etag: x", host]),
            ("POST", {}, None, ["Content-Length: 0", host]),
        ]:
            self.client.call(users, method, target, headers, body)
            head, _, content = stub.connections[-1][0].partition(b"\r\n\r\n")
            line, *lines = re.sub(r"\r\nX-request-timeout: \d+\.\d{3}\b", "", head.decode()).split("\r\n")
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
            with self.subTest(limit), mock.patch.object(connections, limit, 0):
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


class Retries(ClientTest):
    """What broke is sent again where that is safe. Pauses are as long as they may be, and noted instead of waited."""

    def setUp(self) -> None:
        super().setUp()
        self.pauses: list[float] = []
        self.enterContext(mock.patch.object(client.random, "uniform", lambda least, most: most))
        self.enterContext(mock.patch.object(client.time, "sleep", self.pauses.append))

    def test_what_does_twice_what_it_does_once_is_sent_three_times_at_most_each_on_a_new_connection(self):
        for method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE"):
            for end in BROKEN if method == "GET" else BROKEN[:1]:
                with self.subTest(method, end=end):
                    self.pauses.clear()
                    self.assertEqual(self.call_in_turn([end], method), ([BadGateway], [1, 1, 1]))
                    self.assertEqual(self.pauses, [0.05, 0.1])

    def test_a_retry_trusts_no_connection_that_was_kept(self):
        both, connections = threading.Barrier(2), []

        def answer_once(connection: socket.socket) -> None:
            connections.append(requests := [read_request(connection)])
            if len(connections) <= 2:
                both.wait(PATIENCE)  # so that both are kept
            connection.sendall(ALICE)
            requests.append(read_request(connection))
        users = self.serve(answer_once)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _: self.call(users), range(2)))
        self.assertEqual(self.call(users).body, b"Alice")
        self.assertCountEqual([len(list(filter(None, requests))) for requests in connections[:2]], [2, 1])

    def test_one_retry_may_be_enough(self):
        for end in BROKEN:
            self.assertEqual(self.call_in_turn([end, ALICE], "GET"), ([b"Alice"], [1, 1]))

    def test_a_pause_is_drawn_from_all_between_nothing_and_the_most(self):
        with mock.patch.object(client.random, "uniform") as draw:
            draw.return_value = 0.01
            self.call_in_turn([BROKEN[0]], "GET")
        self.assertEqual([call.args for call in draw.call_args_list[:2]], [(0, 0.05), (0, 0.1)])
        self.assertEqual(self.pauses, [0.01, 0.01])

    def test_what_may_have_been_carried_out_is_not_repeated_where_that_would_do_it_twice(self):
        for method in ("POST", "PATCH"):
            for end in BROKEN:
                with self.subTest(method, end=end):
                    self.assertEqual(self.call_in_turn([end], method), ([BadGateway], [1]))

    def test_a_post_with_a_key_is_repeated_where_keys_are_kept(self):
        key = {"idempotency-key": "k"}
        for method, keeps_keys, headers, times in (
                ("POST", True, key, 3), ("POST", True, {}, 1), ("POST", False, key, 1),
                ("POST", True, {"idempotency-key": ""}, 1), ("PATCH", True, key, 1)):
            stub = Stub(BROKEN[0])
            orders = Upstream("orders", [self.enterContext(upstream(stub))], keeps_keys=keeps_keys)
            self.assertRaises(Broken, self.client.call, orders, method, "/orders", headers, b"{}")
            self.assertEqual(len(stub.connections), times)

    def test_an_answer_is_no_reason_for_a_retry_nor_is_lack_of_time(self):
        for what, answer in {"404": status(404), "500": status(500), "503": status(503), "garbage": b"SSH-2.0\r\n\r\n",
                             "two lengths": OK + b"Content-Length: 5\r\nContent-Length: 7\r\n\r\nMallory",
                             "too long": OK + b"Content-Length: 999999999\r\n\r\n"}.items():
            with self.subTest(what):
                self.assertEqual(self.call_in_turn([answer], "GET")[1], [1])
        self.client.timeout = 0.1
        stub = Stub(b"")
        self.assertRaises(GatewayTimeout, self.call, self.serve(stub))
        self.assertEqual(len(stub.connections), 1)

    def test_whatever_was_not_sent_at_all_is_sent_again(self):
        stub = Stub(ALICE)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            users = Upstream("users", [f"http://127.0.0.1:{listener.getsockname()[1]}"])
            self.assertRaises(Unreachable, self.call, users, "POST")
            self.assertEqual(len(self.pauses), 2)

            def serve_one() -> None:
                with listener.accept()[0] as connection:
                    stub(connection)

            def open_late(_: float) -> None:
                listener.listen()
                threading.Thread(target=serve_one, daemon=True).start()
            with mock.patch.object(client.time, "sleep", open_late):
                self.assertEqual(self.call(users, "POST", body=b"{}").body, b"Alice")
        self.assertEqual([len(requests) for requests in stub.connections], [1])

    def test_what_is_told_is_that_it_may_have_been_carried_out(self):
        with contextlib.ExitStack() as stack:
            users = Upstream("users", [stack.enter_context(upstream(Stub(BROKEN[0])))])
            with mock.patch.object(client.time, "sleep", lambda _: stack.close()):  # from then on nobody listens
                self.assertRaises(Broken, self.call, users)

    def test_no_retry_waits_past_the_deadline(self):
        with mock.patch.object(client, "BACKOFF", 3600.0):
            self.assertEqual(self.call_in_turn([BROKEN[0]], "GET"), ([BadGateway], [1]))
        self.assertEqual(self.pauses, [])

    def test_retries_stop_at_their_budget(self):
        with mock.patch.multiple(CircuitBreaker, IN_A_ROW=1000, RECENT=1000):
            _, counts = self.call_in_turn([BROKEN[0]], *["GET"] * 20)
            self.assertEqual(len(counts), 20 + 3)
            _, counts = self.call_in_turn([CLOSING] * 80 + [BROKEN[0]], *["GET"] * 100)
        self.assertEqual(len(counts), 100 + 10)

    def test_there_is_no_retry_where_the_breaker_has_opened(self):
        with mock.patch.object(RetryBudget, "AT_LEAST", 100):
            outcomes, counts = self.call_in_turn([BROKEN[0]], "GET", "GET", "GET")
        self.assertEqual((outcomes, len(counts)), ([BadGateway, BadGateway, UpstreamUnavailable], 5))


class Instances(ClientTest):
    def setUp(self) -> None:
        super().setUp()
        self.now = 0.0
        self.sleep = self.enterContext(mock.patch.object(client.time, "sleep"))

    def serve(self, *instances: Callable[[socket.socket], None] | str) -> Upstream:
        urls = [instance if isinstance(instance, str) else self.enterContext(upstream(instance)) for instance in instances]
        return Upstream("users", urls, clock=lambda: self.now)

    def refusing(self) -> str:
        listener = self.enterContext(socket.socket())
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    def test_one_out_of_reach_is_passed_over_at_once_whatever_the_method(self):
        users = self.serve(self.refusing(), self.refusing(), Stub(ALICE))
        for _ in range(20):
            self.assertEqual(self.call(users, "POST").body, b"Alice")
        self.sleep.assert_not_called()

    def test_one_out_of_reach_is_not_tried_again_before_its_pause(self):
        users = self.serve(self.refusing(), Stub(ALICE))
        for pause in (0.0, 0.5, 1.0, 2.0):
            self.now += pause
            for _ in range(20):
                self.call(users)
            self.assertEqual([instance.breaker.state for instance in users.instances], ["open", "closed"])
            tried = users.instances[0].turn
            self.call(users)
            self.assertEqual(users.instances[0].turn, tried)

    def test_one_that_fails_gets_nothing_until_its_pause_is_over_and_then_its_share_again(self):
        users = self.serve(Stub(*[status(500)] * 5, ALICE), Stub(BOB))
        self.assertCountEqual([self.call(users).body for _ in range(10)], [b""] * 5 + [b"Bob"] * 5)
        self.assertEqual([self.call(users).body for _ in range(10)], [b"Bob"] * 10)
        self.now += 0.5
        self.assertCountEqual([self.call(users).body for _ in range(10)], [b"Alice"] * 5 + [b"Bob"] * 5)

    def test_a_retry_goes_to_another_copy(self):
        broken, well = Stub(BROKEN[0]), Stub(ALICE)
        users = self.serve(broken, well)
        users.instances[1].turn = 1
        with mock.patch.object(users.instances[1], "in_flight", 0):
            self.sleep.side_effect = lambda _: setattr(users.instances[1], "in_flight", 7)
            self.assertEqual(self.call(users).body, b"Alice")
        self.assertEqual((len(broken.connections), len(well.connections)), (1, 1))
        self.sleep.assert_called_once()

    def test_what_may_have_been_carried_out_by_one_is_not_repeated_by_another(self):
        broken, well = Stub(BROKEN[0]), Stub(ALICE)
        users = self.serve(broken, well)
        self.assertRaises(Broken, self.call, users, "POST")
        self.assertEqual((len(broken.connections), len(well.connections)), (1, 0))

    def test_one_that_lets_nobody_in_is_passed_over_after_a_while(self):
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as crowd:
            for _ in range(3):  # the system drops who comes when as many wait as may
                waiting = crowd.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(full.getsockname())
            url, began = f"http://127.0.0.1:{full.getsockname()[1]}", time.monotonic()
            with mock.patch.object(connections, "CONNECT_TIME", 0.1):
                self.assertEqual(self.call(self.serve(url, Stub(ALICE)), "POST").body, b"Alice")
            self.assertRaises(Unreachable, self.call, self.serve(url), deadline=time.monotonic() + 0.1)
            self.assertLess(time.monotonic() - began, 0.9)

    def test_who_has_the_least_in_flight_is_asked(self):
        go_on, busy, idle = threading.Event(), Stub(ALICE), Stub(BOB)
        self.addCleanup(go_on.set)

        def hang(connection: socket.socket) -> None:
            go_on.wait(PATIENCE)
            busy(connection)
        users = self.serve(hang, idle)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(self.call, users)
            wait_until(lambda: users.instances[0].in_flight)
            self.assertEqual({self.call(users).body for _ in range(5)}, {b"Bob"})
            go_on.set()
            self.assertEqual(first.result(PATIENCE).body, b"Alice")
        self.assertEqual({self.call(users).body for _ in range(2)}, {b"Alice", b"Bob"})
        self.assertEqual([instance.in_flight for instance in users.instances], [0, 0])


class Sparing(ClientTest):
    """The breaker and the bulkhead."""

    def setUp(self) -> None:
        super().setUp()
        self.now = 0.0

    def serve(self, stub: Callable[[socket.socket], None], **limits: int) -> Upstream:
        return Upstream("users", [self.enterContext(upstream(stub))], clock=lambda: self.now, **limits)

    def fail(self, users: Upstream, times: int = 5) -> None:
        for _ in range(times):
            self.call(users, "POST")

    def test_a_service_that_fails_is_not_asked_until_it_had_a_pause(self):
        stub = Stub(*[status(500)] * 5, ALICE)
        users = self.serve(stub)
        self.fail(users)
        for wait, retry_after in ((0.0, "1"), (0.499, "1")):
            self.now = wait
            with self.assertRaisesRegex(UpstreamUnavailable, "^the users service is not asked") as raised:
                self.call(users)
            self.assertEqual(raised.exception.members, {"service": "users"})
            self.assertEqual(raised.exception.headers, [("Retry-After", retry_after)])
        self.now = 0.5
        self.assertEqual(self.call(users).body, b"Alice")
        self.assertEqual(users.instances[0].breaker.state, "closed")
        self.assertEqual([len(requests) for requests in stub.connections], [6])

    def test_retry_after_tells_when_the_pause_is_over(self):
        users = self.serve(Stub(status(503)))
        self.fail(users)
        for pause in (0.5, 1, 2, 4):
            self.now += pause
            self.fail(users, 1)
        self.now += 0.5
        with self.assertRaises(UpstreamUnavailable) as raised:
            self.call(users)
        self.assertEqual(raised.exception.headers, [("Retry-After", "8")])

    def test_what_is_about_the_client_does_not_open_the_breaker_and_what_is_about_the_service_does(self):
        for number, state in ((400, "closed"), (404, "closed"), (409, "closed"), (429, "closed"), (501, "closed"),
                              (500, "open"), (502, "open"), (503, "open"), (504, "open")):
            users = self.serve(Stub(status(number)))
            self.fail(users)
            self.assertEqual(users.instances[0].breaker.state, state, number)
        for answer in (*BROKEN, b"SSH-2.0\r\n\r\n", OK + b"Content-Length: 999999999\r\n\r\n"):
            users = self.serve(Stub(answer))
            for _ in range(5):
                self.assertRaises(BadGateway, self.call, users, "POST")
            self.assertEqual(users.instances[0].breaker.state, "open", answer)

    def test_a_service_that_is_late_is_spared_unless_it_had_no_fair_chance(self):
        self.client.timeout = 0.1
        for share, state in ((1.0, "open"), (0.3, "closed")):
            users = self.serve(Stub(b""))
            for _ in range(5):
                self.assertRaises(GatewayTimeout, self.call, users, deadline=time.monotonic() + 0.1 * share)
            self.assertEqual(users.instances[0].breaker.state, state)
        self.client.timeout = TIMEOUT
        users = self.serve(Stub(status(503)))
        for _ in range(5):
            self.call(users, deadline=time.monotonic() + TIMEOUT * 0.3)
        self.assertEqual(users.instances[0].breaker.state, "closed")

    def test_a_lack_of_descriptors_here_says_nothing_about_the_service(self):
        users = self.serve(Stub(ALICE))
        for number in (errno.EMFILE, errno.ENFILE):
            with mock.patch.object(socket, "create_connection", side_effect=OSError(number, "Too many open files")):
                for _ in range(CircuitBreaker.RECENT):
                    with self.assertRaises(UpstreamUnavailable) as caught:
                        self.call(users)
            self.assertEqual(caught.exception.detail,
                             "the users service cannot be asked now: too many files are open here")
            self.assertEqual(dict(caught.exception.headers), {"Retry-After": "1"})
        self.assertEqual(self.call(users).body, b"Alice")

    def test_a_fault_of_the_caller_costs_the_service_nothing(self):
        users = self.serve(Stub(ALICE), max_in_flight=1)
        for _ in range(10):
            self.assertRaises(ValueError, self.call, users, headers={"X-Note": "1\n"})
        self.assertEqual(self.call(users).body, b"Alice")

    def test_a_service_that_hangs_holds_so_many_calls_and_no_more(self):
        go_on, stub = threading.Event(), Stub(ALICE)
        self.addCleanup(go_on.set)

        def hang(connection: socket.socket) -> None:
            go_on.wait(PATIENCE)
            stub(connection)
        users = self.serve(hang, max_in_flight=2)
        with ThreadPoolExecutor(3) as pool:
            hung = [pool.submit(self.call, users) for _ in range(2)]
            wait_until(lambda: users.instances[0].in_flight == 2)
            began = time.monotonic()
            with self.assertRaisesRegex(UpstreamUnavailable, "^the users .* its fill of .* already: 2$") as raised:
                self.call(users)
            self.assertTrue(0.2 < time.monotonic() - began < 2)
            self.assertEqual(raised.exception.members, {"service": "users"})
            self.assertEqual(raised.exception.headers, [("Retry-After", "1")])
            with mock.patch.object(client, "BULKHEAD_TIME", PATIENCE):
                hung.append(pool.submit(self.call, users))
                self.assertEqual(users.instances[0].in_flight, 2)
                go_on.set()  # who waits gets the slot that becomes free
                self.assertEqual([call.result(PATIENCE).body for call in hung], [b"Alice"] * 3)
        self.assertEqual(users.instances[0].breaker.state, "closed")

    def test_no_slot_is_waited_for_past_the_deadline_nor_for_a_service_that_is_spared(self):
        users = self.serve(Stub(status(500)), max_in_flight=1)
        self.fail(users, 4)
        users.enter(0)
        with mock.patch.object(client, "BULKHEAD_TIME", 3600.0):
            self.assertRaises(UpstreamUnavailable, self.call, users, deadline=time.monotonic() + 0.05)
            users.leave()
            self.fail(users, 1)
            users._bulkhead.acquire(0)
            with self.assertRaisesRegex(UpstreamUnavailable, "is not asked"):
                self.call(users)


class Deadlines(ClientTest):
    def left(self, stub: Stub) -> list[float]:
        """Return the time that each request came with."""
        return [float(re.search(rb"(?i)\nx-request-timeout: ([0-9.]+)\r", request)[1])
                for requests in stub.connections for request in requests]

    def test_each_request_tells_what_is_left_of_the_time(self):
        stub = Stub(BROKEN[0], BROKEN[0], ALICE)
        users = self.serve(stub)
        with mock.patch.object(client.random, "uniform", lambda *_: 0.02):
            self.call(users, deadline=time.monotonic() + 2)
        first, second, third = self.left(stub)
        self.assertTrue(2 >= first > second + 0.015 > third + 0.03 > 0, self.left(stub))
        self.call(users, deadline=time.monotonic() + 3600)
        self.assertTrue(TIMEOUT - 0.5 < self.left(stub)[-1] <= TIMEOUT)

    def test_nothing_is_sent_when_the_time_is_spent(self):
        stub = Stub(ALICE)
        users = self.serve(stub)
        for _ in range(10):
            self.assertRaises(GatewayTimeout, self.call, users, deadline=time.monotonic())
        self.assertEqual(self.call(users).body, b"Alice")
        self.assertEqual(sum(map(len, stub.connections)), 1)


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

    @mock.patch.object(connections, "MAX_ANSWER", 1000)
    def test_an_answer_may_not_be_longer_than_allowed(self):
        for what, frame in {
            "declared": lambda size: OK + b"Content-Length: %d\r\n\r\n" % size + b"x" * min(size, 1000),
            "chunked": lambda size: CHUNKED + b"1\r\nx\r\n%x\r\n" % (size - 1) + b"x" * (size - 1) + b"\r\n0\r\n\r\n",
            "until close": lambda size: Last(OK + b"\r\n" + b"x" * size),
        }.items():
            with self.subTest(what):
                self.assertEqual(self.call(self.serve(Stub(frame(1000)))).body, b"x" * 1000)
                self.assert_bad_gateway(self.serve(Stub(frame(1001))), "1000 bytes")

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
                deadline = started + 0.15
                self.assertRaises(GatewayTimeout, self.call, users, "POST", body=bytes(2**24), deadline=deadline)
                self.assertLess(time.monotonic() - started, 1.5)

    def test_a_call_may_have_an_earlier_deadline_but_no_later_one(self):
        users, started = self.trickle(b"", b""), time.monotonic()
        self.assertRaises(GatewayTimeout, self.call, users, deadline=started + 0.1)
        self.client.timeout = 0.1
        self.assertRaises(GatewayTimeout, self.call, users, deadline=started + 60)
        self.assertLess(time.monotonic() - started, 1.5)
