"""Connections to services: reading responses, invalid ones, and keeping connections."""
import os
import select
import socket
import threading
import time
import unittest
from collections.abc import Callable
from unittest import mock

from microshop.chassis import client, connections
from microshop.chassis.client import Client, Upstream
from microshop.chassis.errors import BadGateway, ContentTooLarge, GatewayTimeout, Unreachable
from microshop.chassis.resilience import RetryBudget
from microshop.chassis.resolver import Resolver
from microshop.chassis.tracing import Trace
from microshop.users import Users
from tests.chassis.calls import (
    ALICE, BOB, CHUNKED, CLOSING, MALLORY, OK, TIMEOUT, ClientTest, Last, Reset, Stub)
from tests.chassis.things import stopped_clock
from tests.helpers import PATIENCE, read_request, running, upstream


class ResponseTest(ClientTest):
    def test_a_response_ends_where_its_framing_says(self):
        interim = (b"HTTP/1.1 100 Continue\r\n\r\n"
                   b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
        for what, method, response, expected in [
            ("Content-Length", "GET", ALICE, (200, b"Alice")),
            ("chunks", "GET", BOB, (200, b"Bob")),
            ("close", "GET", Last(OK + b"\r\nAlice"), (200, b"Alice")),
            ("close, HTTP/1.0", "POST", Last(b"HTTP/1.0 200 OK\r\n\r\nAlice"), (200, b"Alice")),
            ("204", "DELETE", b"HTTP/1.1 204 No Content\r\n\r\n", (204, b"")),
            ("304", "GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", (304, b"")),
            ("HEAD", "HEAD", OK + b"Content-Length: 5\r\n\r\n", (200, b"")),
            ("HEAD of chunks", "HEAD", CHUNKED, (200, b"")),
            ("interim responses", "PUT", interim + ALICE, (200, b"Alice")),
        ]:
            with self.subTest(what):
                reply = self.call(self.serve(Stub(response)), method)
                self.assertEqual((reply.status, reply.body), expected,
                                 f"the whole response to {method}, and no more: {response!r}")

    def test_no_status_is_raised_and_no_redirect_is_followed(self):
        for status in (302, 307, 401, 404, 407, 409, 500, 503):
            with self.subTest(status):
                head = b"HTTP/1.1 %d Phrase\r\nLocation: /elsewhere\r\n" % status
                stub = Stub(head + b"Content-Length: 5\r\n\r\nAlice")
                reply = self.call(self.serve(stub))
                self.assertEqual((reply.status, reply.fields["location"], reply.body),
                                 (status, "/elsewhere", b"Alice"))
                self.assertEqual(len(stub.connections), 1, "a second request followed the first")

    def test_a_proxy_in_the_environment_is_ignored(self):
        proxy = self.enterContext(upstream(Stub(MALLORY)))
        variables = {"http_proxy": proxy, "HTTP_PROXY": proxy, "all_proxy": proxy,
                     "no_proxy": "", "NO_PROXY": ""}
        with mock.patch.dict(os.environ, variables):
            self.client = Client(TIMEOUT)
            self.addCleanup(self.client.close)
            self.assertEqual(self.call(self.serve(Stub(ALICE))).body, b"Alice",
                             "the proxy answered, not the service")


class KeepAliveTest(ClientTest):
    def test_a_connection_is_kept_for_the_next_call(self):
        missing = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        outcome = self.call_in_turn([ALICE, BOB, missing, BOB], "GET", "PUT", "DELETE", "GET")
        self.assertEqual(outcome, ([b"Alice", b"Bob", b"", b"Bob"], [4]),
                         "all four requests must come on one connection")

    def test_a_real_service_answers_every_call_on_one_connection(self):
        with running(Users) as users:
            address = Upstream("users", [f"http://127.0.0.1:{users.server_port}"])
            requests = [("GET", "/users/1"), ("HEAD", "/users/1"), ("GET", "/users/999")]
            replies = [self.client.call(address, method, target, Trace("-"))
                       for method, target in requests]
            self.assertEqual([reply.status for reply in replies], [200, 200, 404])
            self.assertEqual([reply.body for reply in replies[:2]],
                             [b'{"id":1,"name":"Alice"}', b""])
            self.assertEqual(len(users.connections), 1, "the client opened a second connection")

    def test_a_connection_is_closed_if_it_was_idle_for_too_long_or_if_enough_are_kept(self):
        for limit, value in (("IDLE_TIME", -1.0), ("MAX_IDLE", 0)):
            with self.subTest(limit), mock.patch.object(connections, limit, value):
                stub = Stub(ALICE)
                users = self.serve(stub)
                self.call(users)
                self.call(users)
                self.assertTrue(stub.ended.acquire(timeout=PATIENCE),
                                "the client did not close the connection")
                self.assertEqual(len(stub.connections), 2, "the closed connection was used again")

    def test_a_connection_is_used_no_longer_than_max_age_so_that_a_moved_service_is_found(self):
        clock = self.enterContext(stopped_clock(connections))
        self.client.timeout = 10 * PATIENCE  # this clock moves on; that of the client does not
        stub = Stub(ALICE)
        users = self.serve(stub)
        for _ in range(4):  # never idle for long
            self.call(users)
            clock.now += connections.MAX_AGE / 3 + 0.01
        self.assertEqual([len(requests) for requests in stub.connections], [3, 1],
                         "requests on each connection, one every 20 s: none is used after 60 s")

    def test_trimming_closes_the_idle_connections_that_are_of_no_use(self):
        for what, response, idle_time, is_closed in (
                ("a young one", ALICE, 30.0, False), ("an old one", ALICE, -1.0, True),
                ("one that the service closed", Last(ALICE), 30.0, True)):
            users = self.serve(Stub(response))
            self.client = Client(TIMEOUT)
            self.addCleanup(self.client.close)
            self.call(users)
            [connection] = self.idle_connections()
            if response is not ALICE:
                select.select([connection.socket], [], [], PATIENCE)
            with self.subTest(what), mock.patch.object(connections, "IDLE_TIME", idle_time):
                self.client.trim()
                self.assertEqual(connection.socket.fileno() == -1, is_closed, "it is closed")
                self.assertEqual(self.idle_connections(), [] if is_closed else [connection])

    def test_trimming_looks_at_the_connections_only_from_time_to_time(self):
        self.enterContext(mock.patch.object(connections, "time", self.time))
        self.call(self.serve(Stub(ALICE)))
        self.client.trim()
        with mock.patch.object(connections, "IDLE_TIME", -1.0):  # it is too old from now on
            for passed, expected in ((0.0, 1), (4.9, 1), (0.1, 0)):
                self.time.now += passed
                self.client.trim()
                self.assertEqual(len(self.idle_connections()), expected, "idle connections")

    def idle_connections(self) -> list[connections.Connection]:
        kept = self.client._connections._idle.values()
        return [connection for one in kept for connection in one]

    def test_closing_the_client_closes_every_kept_connection(self):
        stub = Stub(ALICE)
        self.call(self.serve(stub))
        self.client.close()
        self.assertTrue(stub.ended.acquire(timeout=PATIENCE), "the connection is still open")

    def test_a_call_under_way_may_take_and_keep_connections_while_the_client_is_closed(self):
        idle = self.client._connections._idle
        kept = [mock.Mock(), mock.Mock()]
        kept[1].close.side_effect = lambda: idle["another"].append(idle["one"].pop())
        idle["one"].extend(kept)
        self.client.close()  # it takes them from the right
        self.assertEqual(list(idle["another"]), [kept[0]], "it was of no more concern to close()")

    def test_a_connection_is_not_used_again_after_a_response_that_rules_it_out(self):
        for what, response in {
            "close": CLOSING,
            "close in a list": CLOSING.replace(b"close", b"keep-alive, Close"),
            "HTTP/1.0": ALICE.replace(b"1.1", b"1.0"),
            "bytes after the body": ALICE + MALLORY,
            "bytes after the chunks": CHUNKED + b"5\r\nAlice\r\n0\r\n\r\n" + MALLORY,
        }.items():
            with self.subTest(what):
                self.assertEqual(self.call_in_turn([response, BOB], "GET", "GET"),
                                 ([b"Alice", b"Bob"], [1, 1]),
                                 "the second request must come on a connection of its own")

    def test_after_a_response_without_a_body_the_connection_is_used_again(self):
        for method, response in (("GET", b"HTTP/1.1 304 Not Modified\r\n\r\n"),
                                 ("DELETE", b"HTTP/1.1 204 No Content\r\n\r\n"),
                                 ("HEAD", CHUNKED)):
            with self.subTest(method):
                self.assertEqual(self.call_in_turn([response, BOB], method, "GET"),
                                 ([b"", b"Bob"], [2]), "both requests must come on one connection")

    def test_bytes_that_arrive_on_an_idle_connection_are_not_taken_for_the_next_response(self):
        stub, go_on = Stub(ALICE), threading.Event()

        def send_a_response_nobody_asked_for(connection: socket.socket) -> None:
            read_request(connection)
            connection.sendall(ALICE)
            go_on.wait(PATIENCE)
            connection.sendall(MALLORY)
            stub(connection)

        users = self.serve(send_a_response_nobody_asked_for)
        self.call(users)
        [idle] = self.idle_connections()
        go_on.set()
        readable, _, _ = select.select([idle.socket], [], [], PATIENCE)
        self.assertEqual(readable, [idle.socket], "the unwanted response did not arrive")
        self.assertEqual(self.call(users).body, b"Alice")

    def test_an_idempotent_request_is_retried_if_the_kept_connection_is_dead(self):
        for method in ("GET", "PUT", "DELETE"):
            for death in (Last(b""), Reset(b"")):
                with self.subTest(method, death=type(death).__name__):
                    self.assertEqual(self.call_in_turn([ALICE, death, BOB], "GET", method),
                                     ([b"Alice", b"Bob"], [2, 1]))

    def test_a_kept_connection_that_breaks_says_nothing_about_the_service(self):
        for method, body in (("GET", b"Alice"), ("POST", BadGateway)):
            deaths = [ALICE, Last(b"")] * 20
            with self.subTest(method), mock.patch.object(RetryBudget, "AT_LEAST", 0):
                bodies, _ = self.call_in_turn([*deaths, ALICE], *["GET", method] * 20)
                self.assertEqual(bodies, [b"Alice", body] * 20,
                                 "each second request came on a kept connection, which broke")
        self.assertEqual(self.time.pauses, [], "a retry on a new connection needs no pause")

    def test_a_retry_does_not_use_a_kept_connection(self):
        both_are_open, requests = threading.Barrier(2), []

        def answer_once(connection: socket.socket) -> None:
            own = [read_request(connection)]
            requests.append(own)
            if len(requests) <= 2:
                both_are_open.wait(PATIENCE)  # so that the client opens two, and keeps both
            connection.sendall(ALICE)
            own.append(read_request(connection))

        users = self.serve(answer_once)
        calls = [threading.Thread(target=self.call, args=(users,)) for _ in range(2)]
        for call in calls:
            call.start()
        for call in calls:
            call.join(PATIENCE)
        self.assertEqual(self.call(users).body, b"Alice")
        self.assertCountEqual([len([one for one in own if one]) for own in requests[:2]], [2, 1],
                              "the failed request was sent again on the other kept connection")


class NameTest(ClientTest):
    """Services whose base URLs have a name in place of an address."""

    def serve_by_name(self, look_up: Callable[[str], list[str]]) -> Upstream:
        """Return a service that ALICE answers, at what a function finds for the name users-name."""
        self.client._connections._resolver = Resolver(look_up)
        _, _, port = self.enterContext(upstream(Stub(ALICE))).rpartition(":")
        return self.serve(f"http://Users-Name:{port}")

    def test_a_service_is_found_by_its_name(self):
        users = self.serve_by_name(lambda name: {"users-name": ["127.0.0.1"]}[name])
        self.assertEqual(self.call(users).body, b"Alice")

    def test_an_address_that_refuses_is_passed_over_for_the_next_of_the_same_name(self):
        users = self.serve_by_name(lambda name: ["127.0.0.2", "127.0.0.3", "127.0.0.1"])
        self.assertEqual(self.call(users, "POST").body, b"Alice", "of the third address")
        self.assertEqual(len(self.spans), 1, "attempts: the addresses are all of one instance")

    def test_a_name_that_cannot_be_resolved_is_a_bad_gateway_and_nothing_was_sent(self):
        for error, reason in (
                (TimeoutError(), "was not resolved in time"),
                (socket.gaierror(socket.EAI_NONAME, "Unknown"), r"cannot be resolved \(Unknown\)")):
            with self.subTest(reason):
                users = self.serve_by_name(mock.Mock(side_effect=error))
                with self.assertRaisesRegex(
                        Unreachable, f"^the users service cannot be reached: the name users-name "
                        f"{reason}; check the "):
                    self.call(users, "POST")
                self.assertEqual(len(self.time.pauses), 2, "retries: a POST that was not sent")
                self.time.pauses.clear()

    def test_looking_up_and_connecting_share_one_deadline(self):
        clock = self.enterContext(stopped_clock(connections))
        timeouts = []

        def look_up(_: str) -> list[str]:
            clock.now += 0.4 * connections.CONNECT_TIME
            return ["192.0.2.1", "192.0.2.2", "192.0.2.3"]

        def hang(address: tuple[str, int], timeout: float) -> None:
            timeouts.append(round(timeout / connections.CONNECT_TIME, 6))
            clock.now += timeout
            raise TimeoutError

        users = self.serve_by_name(look_up)
        with (mock.patch.object(socket, "create_connection", hang),
              mock.patch.object(client, "MAX_RETRIES", 0)):
            self.assertRaises(Unreachable, self.call, users)
        self.assertEqual(timeouts, [0.2, 0.2, 0.2], "shares of CONNECT_TIME for three addresses "
                         "that are silent, after a look-up that took 0.4 of it")

    def test_many_silent_addresses_take_no_longer_than_connect_time(self):
        clock = self.enterContext(stopped_clock(connections))
        began = clock.now

        def hang(address: tuple[str, int], timeout: float) -> None:
            clock.now += timeout
            raise TimeoutError

        users = self.serve_by_name(lambda name: ["192.0.2.1"] * 3000)
        with (mock.patch.object(socket, "create_connection", hang),
              mock.patch.object(client, "MAX_RETRIES", 0)):
            self.assertRaises(Unreachable, self.call, users)
        self.assertAlmostEqual(clock.now - began, connections.CONNECT_TIME, delta=0.01,
                               msg="seconds to try 3000 silent addresses")


class InvalidResponseTest(ClientTest):
    def assert_bad_gateway(self, users: Upstream, reason: str) -> None:
        with self.assertRaisesRegex(BadGateway, f"^the users service .*{reason}") as raised:
            self.call(users)
        self.assertEqual(raised.exception.members, {"service": "users"})

    def test_a_response_that_is_not_http_is_a_bad_gateway(self):
        two_lengths = b"Content-Length: 5\r\nContent-Length: 7\r\n\r\nMallory"
        length_and_chunks = b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        for what, response in {
            "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
            "bytes": b"\x15\x03\x01\0\x02",
            "lines that end in LF": ALICE.replace(b"\r", b""),
            "two lengths": OK + two_lengths,
            "a length and chunks": OK + length_and_chunks,
            "a chunk longer than its size": CHUNKED + b"2\r\nAlice\r\n0\r\n\r\n",
            "a chunk without a size": CHUNKED + b"\r\nAlice\r\n0\r\n\r\n",
            "a chunk of size 0x5": CHUNKED + b"0x5\r\nAlice\r\n0\r\n\r\n",
            "an upgrade": b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        }.items():
            with self.subTest(what):
                self.assert_bad_gateway(self.serve(Stub(response)), "that cannot be used")

    def test_a_response_that_is_cut_short_is_a_bad_gateway(self):
        for what, response in {
            "no head": b"",
            "half a head": OK + b"Content-Le",
            "half a body": ALICE[:-2],
            "no last chunk": CHUNKED + b"5\r\nAlice\r\n",
            "nothing after 100": b"HTTP/1.1 100 Continue\r\n\r\n",
        }.items():
            with self.subTest(what):
                self.assert_bad_gateway(self.serve(Stub(Last(response))), "closed the connection")

    def test_a_connection_that_is_refused_or_reset_is_a_bad_gateway(self):
        self.assert_bad_gateway(self.serve(Stub(Reset(b""))), "broke the connection: .*reset")
        self.assert_bad_gateway(self.serve(self.refusing_url()), "cannot be reached: .*refused")

    @mock.patch.object(connections.Request, "max_reply", 1000)
    def test_a_response_that_is_too_large_is_a_bad_gateway(self):
        def declared(size: int) -> bytes:
            return OK + b"Content-Length: %d\r\n\r\n" % size + b"x" * min(size, 1000)

        def chunked(size: int) -> bytes:
            rest = b"%x\r\n%s\r\n" % (size - 1, b"x" * (size - 1))
            return CHUNKED + b"1\r\nx\r\n" + rest + b"0\r\n\r\n"

        def until_close(size: int) -> bytes:
            return Last(OK + b"\r\n" + b"x" * size)

        for frame in (declared, chunked, until_close):
            with self.subTest(frame.__name__):
                largest = self.call(self.serve(Stub(frame(1000)))).body
                self.assertEqual(largest, b"x" * 1000, "a body of exactly max_reply is allowed")
                self.assert_bad_gateway(self.serve(Stub(frame(1001))), "1000 bytes")


class GetTest(unittest.TestCase):
    """One request on a connection of its own."""

    def test_a_larger_body_is_read_if_the_caller_allows_that(self):
        size = connections.MAX_REPLY + 1
        message = OK + b"Content-Length: %d\r\n\r\n%b" % (size, b"x" * size)
        with upstream(Stub(message)) as url:
            reply = connections.get(url, time.monotonic() + PATIENCE, size)
            self.assertEqual(len(reply.body), size)
            with self.assertRaises(ContentTooLarge):
                connections.get(url, time.monotonic() + PATIENCE, size - 1)


class TimeoutTest(ClientTest):
    """Each call but the first has a short deadline, and a connection that is open already."""

    def serve_once(self, then: Callable[[socket.socket], None]) -> Upstream:
        """Return a service that sends one good response on a connection, and then misbehaves."""
        def answer(connection: socket.socket) -> None:
            read_request(connection)
            connection.sendall(ALICE)
            then(connection)

        users = self.serve(answer)
        self.call(users)
        return users

    def assert_times_out(self, users: Upstream, method: str = "GET",
                         body: bytes | None = None) -> None:
        deadline = time.monotonic() + 0.1
        with self.assertRaisesRegex(GatewayTimeout, "^the users service ") as raised:
            self.call(users, method, body=body, deadline=deadline)
        self.assertEqual(raised.exception.members, {"service": "users"})
        self.assertGreater(time.monotonic(), deadline - 0.05, "it gave up before the deadline")

    def test_a_response_that_is_not_complete_in_time_is_a_gateway_timeout(self):
        for what, beginning, piece in [
            ("silence", b"", b""),
            ("a slow head", OK + b"X-Slow: ", b"x"),
            ("interim responses without end", b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
            ("a slow body", OK + b"Content-Length: 1000000\r\n\r\n", b"x"),
            ("slow chunks", CHUNKED, b"1\r\nx\r\n"),
            ("a slow body until close", OK + b"\r\n", b"x"),
        ]:
            over = threading.Event()
            self.addCleanup(over.set)

            def trickle(connection: socket.socket, beginning: bytes = beginning,
                        piece: bytes = piece, over: threading.Event = over) -> None:
                read_request(connection)
                connection.sendall(beginning)
                end = time.monotonic() + PATIENCE  # then it closes, which is not a timeout
                while time.monotonic() < end and not over.wait(0.005):
                    connection.sendall(piece)

            with self.subTest(what):
                self.assert_times_out(self.serve_once(trickle))
            over.set()

    def test_a_request_that_is_not_taken_in_time_is_a_gateway_timeout(self):
        over = threading.Event()
        self.addCleanup(over.set)

        def take_nothing(connection: socket.socket) -> None:
            over.wait(PATIENCE)

        def take_little(connection: socket.socket) -> None:
            while connection.recv(65536) and not over.wait(0.1):
                pass

        for taker in (take_nothing, take_little):
            with self.subTest(taker.__name__):
                self.assert_times_out(self.serve_once(taker), "POST", bytes(2**24))

    def test_connecting_takes_no_longer_than_the_deadline_and_connect_time_allow(self):
        self.enterContext(mock.patch.object(connections, "time", self.time))
        refuse = mock.patch.object(socket, "create_connection", side_effect=TimeoutError)
        for left, expected in ((60.0, connections.CONNECT_TIME), (0.25, 0.25)):
            self.client.timeout = left
            with refuse as connect:
                self.assertRaises(Unreachable, self.call, self.serve("http://127.0.0.1:1"))
            first = connect.call_args_list[0]
            self.assertAlmostEqual(first.args[1], expected,
                                   msg=f"the timeout to connect with {left} s left")
