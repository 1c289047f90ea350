"""What the gateway forwards and what it leaves out, both ways, and what it answers by itself."""
import contextlib
import io
import socket
import threading
import time
import unittest
from collections.abc import Callable
from http.client import HTTPMessage, parse_headers
from typing import Any
from unittest import mock

from microshop import SERVICES, gateway
from microshop.chassis.admission import Rate
from microshop.chassis.resilience import CircuitBreaker
from microshop.gateway import Gateway
from microshop.users import Users
from tests.helpers import (
    PATIENCE, Answered, Wire, ask, flush, read_request, running, upstream, wait_until)

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Stub:
    """A service that keeps each request and sends the same response to each."""

    def __init__(self, response: bytes = OK + b"Alice"):
        self.response = response
        self.requests: list[bytes] = []

    def __call__(self, connection: socket.socket) -> None:
        while request := read_request(connection):
            self.requests.append(request)
            connection.sendall(self.response)


def fields(message: bytes) -> HTTPMessage:
    """Parse the headers of a request or a response as the standard library does."""
    return parse_headers(io.BytesIO(message.partition(b"\r\n")[2]))


def hang(connection: socket.socket) -> None:
    """Read everything and answer nothing."""
    while connection.recv(65536):
        pass


def answer_once(connection: socket.socket) -> None:
    """Answer the first request on a connection, and hang at the next."""
    read_request(connection)
    connection.sendall(OK + b"Alice")
    hang(connection)


class GatewayTest(unittest.TestCase):
    def open(self, settings: dict[str, Any] | None = None,
             **services: Callable[[socket.socket], None] | str) -> None:
        """Start a gateway in front of stubs or base URLs; services not given refuse connections."""
        taken = self.enterContext(socket.socket())
        taken.bind(("127.0.0.1", 0))
        refusing = f"http://127.0.0.1:{taken.getsockname()[1]}"
        urls = {}
        for name in SERVICES:
            service = services.get(name, refusing)
            url = service if isinstance(service, str) else self.enterContext(upstream(service))
            urls[f"{name}_url"] = [url]
        self.users_url = urls["users_url"][0]
        self.gateway = self.enterContext(running(Gateway, **urls, **(settings or {})))

    def ask(self, *request: Any) -> Answered:
        return ask(self.gateway.server_port, *request)

    def send(self, *lines: str, body: bytes = b"") -> bytes:
        """Send a request with this head, half-close, and return the bytes of the answer."""
        head = "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")
        with Wire(self.gateway.server_port) as wire:
            wire.send(head + body)
            wire.end()
            return wire.file.read()


class RouteTest(GatewayTest):
    def setUp(self) -> None:
        self.stubs = {name: Stub(OK + name[:5].encode()) for name in SERVICES}
        self.open(**self.stubs)

    def test_the_first_segment_of_a_path_names_the_service_and_the_target_arrives_unchanged(self):
        for name in self.stubs:
            for rest in ("", "/", "?", "/1", "?limit=2&after=%2F&a=//b/../c?d", "/1/cancel", "//x",
                         "/../orders", "/./%2e%2e/%2E%2E%2forders", "/a%2Fb%5C", "/a;b=c,d"):
                with self.subTest(name + rest):
                    self.assertEqual(self.ask("GET", f"/{name}{rest}").body, name[:5].encode())
                    line = self.stubs[name].requests[-1].partition(b"\r\n")[0]
                    self.assertEqual(line.decode(), f"GET /{name}{rest} HTTP/1.1")

    def test_a_path_of_no_service_is_not_found(self):
        for target in ("/reservations/1", "/usersx", "/user", "/Users", "//users", "/./users",
                       "/../users", "/x/users", "/users%2f..", "/..%2fusers", "/%75sers",
                       "/users;x", "/users%3F", "/users%20"):
            for method in ("GET", "POST", "DELETE"):
                with self.subTest(method + target):
                    answer = self.ask(method, target)
                    self.assertEqual((answer.status, answer.json["status"]), (404, 404))
                    self.assertEqual(answer.headers["content-type"], "application/problem+json")
        requests = [stub.requests for stub in self.stubs.values()]
        self.assertEqual(requests, [[] for _ in SERVICES], "a request arrived at a service")

    def test_a_path_that_is_not_found_is_answered_with_those_that_exist(self):
        detail = self.ask("GET", "/user").json["detail"]
        self.assertRegex(detail, "^there is nothing at /user; try ")
        for name in SERVICES:
            self.assertIn(f"/{name}", detail)

    def test_the_gateway_greets_at_its_root(self):
        answer, head = self.ask("GET", "/"), self.ask("HEAD", "/")
        self.assertEqual((answer.status, answer.body), (200, b"API Gateway"))
        self.assertEqual((head.status, head.body), (200, b""))
        for one in (answer, head):
            self.assertEqual(one.headers["content-type"], "text/html; charset=utf-8")
            self.assertEqual(one.headers["content-length"], "11")


class ForwardingTest(GatewayTest):
    def setUp(self) -> None:
        self.stub = Stub()
        self.open(users=self.stub)

    def arrive(self, *lines: str, request: str = "GET /users HTTP/1.1",
               body: bytes = b"") -> HTTPMessage:
        """Send a request with these headers, and return the headers that arrive at the service."""
        self.send(request, "Host: shop.example", *lines, body=body)
        return fields(self.stub.requests[-1])

    def come_back(self, *lines: str, status: str = "200 OK", body: bytes = b"Alice") -> bytes:
        """Let the service respond with these headers, and return what the client gets."""
        head = "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""])
        self.stub.response = head.encode() + body
        return self.send("GET /users HTTP/1.1", "Host: shop.example")

    # --- headers about one connection

    def test_hop_by_hop_headers_are_not_forwarded_to_the_service(self):
        arrived = self.arrive(
            "Connection: X-Secret, close ,x-OTHER", "connection: X-Third", "X-Secret: 1",
            "X-Other: 2", "x-third: 3", "Keep-Alive: timeout=5", "Proxy-Connection: keep-alive",
            "Proxy-Authorization: Basic Og==", "TE: trailers", "Trailer: X-Sum", "Upgrade: h2c",
            "Expect: 100-continue", "X-Kept: 4", "Cookie: a=1")
        self.assertEqual((arrived["X-Kept"], arrived["Cookie"]), ("4", "a=1"))
        for name in ("Connection", "X-Secret", "X-Other", "X-Third", "Keep-Alive",
                     "Proxy-Connection", "Proxy-Authorization", "TE", "Trailer", "Upgrade",
                     "Expect"):
            self.assertNotIn(name, arrived)

    def test_hop_by_hop_headers_are_not_passed_back_to_the_client(self):
        answer = self.come_back(
            "Connection: X-Secret, close", "connection: x-OTHER", "X-Secret: 1", "X-Other: 2",
            "Keep-Alive: timeout=5", "Proxy-Connection: close", "Proxy-Authenticate: Basic",
            "Trailer: X-Sum", "Upgrade: h2c", "X-Kept: 4", "Transfer-Encoding: chunked",
            body=b"5\r\nAlice\r\n0\r\nX-Sum: 9\r\n\r\n")
        got = fields(answer)
        self.assertEqual((got["X-Kept"], got.get_all("Content-Length")), ("4", ["5"]))
        for name, own in (("Connection", "keep-alive"), ("Keep-Alive", "timeout=60")):
            self.assertEqual(got.get_all(name), [own], f"only the gateway's own {name}")
        for name in ("X-Secret", "X-Other", "Proxy-Connection", "Proxy-Authenticate",
                     "Trailer", "Upgrade", "Transfer-Encoding", "X-Sum"):
            self.assertNotIn(name, got)
        self.assertTrue(answer.endswith(b"\r\n\r\nAlice"), answer)

    # --- headers about who talks to whom

    def test_the_service_gets_its_own_address_as_host(self):
        for request in ("GET /users HTTP/1.1", "GET http://other.example/users HTTP/1.1"):
            arrived = self.arrive(request=request)
            self.assertEqual(arrived.get_all("Host"), [self.users_url.removeprefix("http://")])
        self.assertEqual(arrived["X-Forwarded-Host"], "other.example")

    def test_a_client_cannot_forge_where_it_comes_from(self):
        arrived = self.arrive(
            "X-Forwarded-For: 6.6.6.6", "x-forwarded-for: 7.7.7.7", "X-Forwarded-Proto: https",
            "X-Forwarded-Host: evil.example", "Forwarded: for=6.6.6.6", "X-Real-IP: 6.6.6.6",
            "X-Forwarded-Port: 443", "x-forwarded-prefix: /evil", "X-Forwarded: for=6.6.6.6")
        got = {name.lower(): arrived.get_all(name) for name in arrived
               if "forwarded" in name.lower() or "real" in name.lower()}
        self.assertEqual(got, {"x-forwarded-for": ["127.0.0.1"], "x-forwarded-proto": ["http"],
                               "x-forwarded-host": ["shop.example"]})
        self.send("GET /users HTTP/1.0", "X-Forwarded-Host: evil.example")
        self.assertNotIn("X-Forwarded-Host", fields(self.stub.requests[-1]))

    def test_the_gateway_adds_itself_to_via_both_ways(self):
        self.assertEqual(self.arrive().get_all("Via"), ["1.1 microshop"])
        self.assertEqual(self.arrive("Via: 1.0 fred").get_all("Via"), ["1.0 fred, 1.1 microshop"])
        old = self.arrive(request="GET /users HTTP/1.0")
        self.assertEqual(old.get_all("Via"), ["1.0 microshop"])
        back = fields(self.come_back("Content-Length: 5"))
        self.assertEqual(back.get_all("Via"), ["1.1 microshop"])
        back = fields(self.come_back("Via: 1.1 cache", "Content-Length: 5"))
        self.assertEqual(back.get_all("Via"), ["1.1 cache", "1.1 microshop"])

    def test_what_the_gateway_has_judged_of_a_browser_is_not_forwarded(self):
        arrived = self.arrive("Origin: http://shop.example", "Sec-Fetch-Site: same-origin",
                              "Sec-Fetch-Mode: cors", "Sec-CH-UA: x", request="PUT /users HTTP/1.1")
        self.assertEqual((arrived["Origin"], arrived["Sec-Fetch-Site"], arrived["Sec-Fetch-Mode"]),
                         (None, None, None), "at the service, Host is another than in the browser")
        self.assertEqual(arrived["Sec-CH-UA"], "x")

    # --- correlation id and trace

    def follow(self, *lines: str) -> str:
        """Return the X-Request-Id that both the service and the client got, each once."""
        answer = fields(self.send("GET /users HTTP/1.1", "Host: shop.example", *lines))
        [request_id] = answer.get_all("X-Request-Id")
        self.assertEqual(fields(self.stub.requests[-1]).get_all("X-Request-Id"), [request_id])
        return request_id

    def test_a_valid_request_id_of_the_client_is_kept(self):
        for given in ("7", "A.z_0-9", "x" * 64):
            self.assertEqual(self.follow(f"X-Request-Id: {given}"), given)

    def test_an_invalid_request_id_is_replaced(self):
        made = []
        for lines in ([], ["X-Request-Id: " + "x" * 65], ["X-Request-Id: two words"],
                      ["X-Request-Id:"], ["X-Request-Id: a,b"], ["X-Request-Id: \xe9"],
                      ["X-Request-Id: a", "x-request-id: b"]):
            with self.subTest(lines):
                made.append(self.follow(*lines))
                self.assertRegex(made[-1], "^[0-9a-f]{16}$")
        self.assertEqual(len(set(made)), 7, "each request must get an id of its own")

    def test_the_service_cannot_change_the_request_id(self):
        answer = fields(self.come_back("X-Request-Id: theirs", "Content-Length: 5"))
        sent = fields(self.stub.requests[-1])
        self.assertEqual(answer.get_all("X-Request-Id"), sent.get_all("X-Request-Id"))

    def test_a_valid_traceparent_is_forwarded_with_the_id_of_the_gateways_span(self):
        trace, parent = TRACEPARENT[3:35], TRACEPARENT[36:52]
        later = f"cc-{trace}-{parent}-0d-later"  # a version that has one more field and flags
        for given in (TRACEPARENT, later, f"00-{trace}-{parent}-00"):
            with self.subTest(given):
                [sent] = self.arrive(f"traceparent: {given}").get_all("traceparent")
                self.assertRegex(sent, f"^00-{trace}-[0-9a-f]{{16}}-0{int(given[54], 16) & 3}$")
                self.assertNotIn(parent, sent, "the id of another span")

    def test_an_invalid_traceparent_is_replaced(self):
        trace, parent = TRACEPARENT[3:35], TRACEPARENT[36:52]
        for given in ("", f"00-{'0' * 32}-{parent}-01", f"00-{trace}-{'0' * 16}-01",
                      TRACEPARENT.upper(), f"ff-{trace}-{parent}-01", TRACEPARENT[:-1],
                      f"{TRACEPARENT}-x", f"{TRACEPARENT}, {TRACEPARENT}"):
            with self.subTest(given):
                [made] = self.arrive(f"traceparent: {given}").get_all("traceparent")
                self.assertRegex(made, "^00-[0-9a-f]{32}-[0-9a-f]{16}-01$")
                self.assertNotIn(made, given.lower())

    def test_a_tracestate_is_forwarded_only_with_its_traceparent(self):
        for given, expected in ((TRACEPARENT, ["shop=1"]), ("00-none", None)):
            arrived = self.arrive(f"traceparent: {given}", "tracestate: shop=1")
            self.assertEqual(arrived.get_all("tracestate"), expected)

    def test_a_tracestate_that_would_make_heads_large_is_not_forwarded(self):
        for given, expected in (("a=" + "b" * 510, 512), ("a=" + "b" * 511, 0)):
            arrived = self.arrive(f"traceparent: {TRACEPARENT}", f"tracestate: {given}")
            self.assertEqual(len(arrived.get("tracestate", "")), expected)

    # --- methods, bodies and statuses

    def test_method_and_body_arrive_unchanged(self):
        body = b"\0\xff\r\n\r\nGET /users HTTP/1.1\r\n" * 1000
        for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PURGE"):
            with self.subTest(method):
                line = f"{method} /users?a=1 HTTP/1.1"
                arrived = self.arrive(f"Content-Length: {len(body)}", "Content-Type: a/b",
                                      body=body, request=line)
                self.assertEqual(arrived.get_all("Content-Length"), [str(len(body))])
                self.assertEqual(arrived["Content-Type"], "a/b")
                head, _, content = self.stub.requests[-1].partition(b"\r\n\r\n")
                self.assertEqual(content, body)
                self.assertEqual(head.partition(b"\r\n")[0], line.encode())

    def test_a_request_without_a_body_arrives_without_one(self):
        for lines, length in (([], None), (["Content-Length: 0"], "0")):
            for method in ("POST", "PUT", "DELETE", "GET"):
                arrived = self.arrive(*lines, request=f"{method} /users HTTP/1.1")
                self.assertEqual(arrived["Content-Length"], length, f"{method} with {lines}")

    def test_a_body_that_its_client_holds_back_is_asked_for_and_forwarded(self):
        with Wire(self.gateway.server_port) as connection:
            connection.send(b"POST /users HTTP/1.1\r\nHost: shop\r\n"
                            b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
            self.assertEqual(connection.read().status, 100)
            connection.send(b"Alice")
            self.assertEqual(connection.read().status, 200)
        self.assertEqual(self.stub.requests[-1].partition(b"\r\n\r\n")[2], b"Alice")

    def test_a_body_in_chunks_arrives_with_a_content_length(self):
        arrived = self.arrive("Transfer-Encoding: chunked", request="POST /users HTTP/1.1",
                              body=b"3;a=b\r\nAli\r\n2\r\nce\r\n0\r\nX-Trailer: 1\r\n\r\n")
        self.assertEqual(arrived.get_all("Content-Length"), ["5"])
        self.assertEqual(self.stub.requests[-1].partition(b"\r\n\r\n")[2], b"Alice")
        self.assertNotIn("Transfer-Encoding", arrived)
        self.assertNotIn("X-Trailer", arrived)

    def test_a_response_is_passed_back_unchanged_whatever_its_status(self):
        given = {"Content-Type": "text/x-shop", "Location": "/users/7", "ETag": '"a"',
                 "Retry-After": "3", "Date": "Sun, 06 Nov 1994 08:49:37 GMT", "Server": "stub",
                 "Content-Length": "5"}
        lines = [f"{name}: {value}" for name, value in given.items()]
        for status in (200, 201, 302, 404, 409, 422, 500, 502, 503):
            with self.subTest(status):
                answer = self.come_back(*lines, "Set-Cookie: a=1; Path=/", "Set-Cookie: b=2",
                                        status=f"{status} Phrase")
                got = fields(answer)
                self.assertEqual({name: got.get_all(name) for name in given},
                                 {name: [value] for name, value in given.items()})
                self.assertEqual(got.get_all("Set-Cookie"), ["a=1; Path=/", "b=2"])
                self.assertTrue(answer.startswith(b"HTTP/1.1 %d " % status), answer)
                self.assertTrue(answer.endswith(b"\r\n\r\nAlice"), answer)

    def test_a_response_without_a_body_is_passed_back_without_one(self):
        answer = self.come_back("Content-Length: 0", status="204 No Content", body=b"")
        self.assertTrue(answer.startswith(b"HTTP/1.1 204 "), answer)
        self.assertTrue(answer.endswith(b"\r\n\r\n"), answer)
        self.assertNotIn("Content-Length", fields(answer))

    def test_two_cookie_headers_become_one_list_of_cookies(self):
        arrived = self.arrive("Cookie: a=1", "Cookie: b=2")
        self.assertEqual(arrived.get_all("cookie"), ["a=1; b=2"])

    def test_the_answer_to_head_has_no_length_that_the_service_did_not_send(self):
        for self.stub.response in (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
                                   b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\n"):
            answer = self.send("HEAD /users HTTP/1.1", "Host: shop")
            self.assertNotIn("Content-Length", fields(answer))


class RetryTest(GatewayTest):
    """The service closes a kept connection without an answer, as it may when it is restarted."""

    def post_twice(self, service: str, **headers: str) -> tuple[list[int], int]:
        """Post twice, the second time on the kept connection.

        Returns the statuses, and how often a post arrived at the service.
        """
        requests = []

        def close_at_the_second(connection: socket.socket) -> None:
            requests.append(read_request(connection))
            connection.sendall(OK + b"Alice")
            requests.append(read_request(connection))

        self.open(**{service: close_at_the_second})
        statuses = [self.ask("POST", f"/{service}", headers, b"{}").status for _ in range(2)]
        return statuses, len([request for request in requests if request])

    def test_a_post_to_orders_with_an_idempotency_key_is_retried(self):
        outcome = self.post_twice("orders", **{"Idempotency-Key": "k"})
        self.assertEqual(outcome, ([200, 200], 3))

    def test_no_other_post_is_retried(self):
        key = {"Idempotency-Key": "k"}
        for service, headers in (("orders", {}), ("users", key), ("users", {})):
            with self.subTest(service, headers=headers):
                self.assertEqual(self.post_twice(service, **headers), ([200, 502], 2))


class RealServiceTest(GatewayTest):
    JSON = {"Content-Type": "application/json"}

    def setUp(self) -> None:
        users = self.enterContext(running(Users))
        self.open(users=f"http://127.0.0.1:{users.server_port}")

    def test_a_resource_that_the_client_knows_is_not_sent_again(self):
        answer = self.ask("GET", "/users/1")
        self.assertEqual((answer.status, answer.json), (200, {"id": 1, "name": "Alice"}))
        tag = answer.headers["etag"]
        again = self.ask("GET", "/users/1", {"If-None-Match": tag})
        self.assertEqual((again.status, again.body, again.headers["etag"]), (304, b"", tag))

    def test_writes_are_forwarded_with_their_conditions_and_locations(self):
        tag = self.ask("GET", "/users/1").headers["etag"]
        posted = self.ask("POST", "/users", self.JSON, b'{"name":"Carol"}')
        self.assertEqual(posted.status, 201)
        self.assertEqual(self.ask("GET", posted.headers["location"]).json["name"], "Carol")
        headers = {**self.JSON, "If-Match": tag}
        statuses = [self.ask("PUT", "/users/1", headers, b'{"name":"Al"}').status
                    for _ in range(2)]
        self.assertEqual(statuses, [200, 412], f"two PUTs of /users/1, both with If-Match: {tag}, "
                         "which is not its ETag any more after the first")
        self.assertEqual(self.ask("DELETE", "/users/1").status, 204)
        self.assertEqual(self.ask("GET", "/users/1").status, 404)

    def test_the_answer_to_head_has_the_length_of_the_body_but_no_body(self):
        with Wire(self.gateway.server_port) as wire:
            wire.send(b"HEAD /users HTTP/1.1\r\nHost: shop\r\n\r\n"
                      b"GET /users HTTP/1.1\r\nHost: shop\r\n\r\n")
            head, answer = wire.read("HEAD"), wire.read()
        self.assertEqual((head.status, answer.status), (200, 200))
        self.assertEqual(head.headers["content-length"], str(len(answer.body)))


class DeadlineTest(GatewayTest):
    def test_the_service_gets_what_is_left_of_the_time_and_a_client_can_only_shorten_it(self):
        stub = Stub()
        self.open({"timeout": 1000.0}, users=stub)
        for given, most in ((None, 1000), ("500", 450), ("7200", 1000)):
            self.ask("GET", "/users", {"X-Request-Timeout": given} if given else {})
            [left] = fields(stub.requests[-1]).get_all("X-Request-Timeout")
            self.assertTrue(most - PATIENCE < float(left) <= most,
                            f"X-Request-Timeout: {given} became {left}, not nearly {most}")

    def test_a_request_ends_at_the_deadline_of_its_client(self):
        self.open({"timeout": 10 * PATIENCE}, users=answer_once)
        self.ask("GET", "/users")  # so that a connection is open already
        answer = self.ask("GET", "/users", {"X-Request-Timeout": "0.5"})
        self.assertEqual(answer.status, 504, answer.body)

    def test_a_request_whose_deadline_has_passed_is_rejected(self):
        self.open(users=Stub())
        answer = self.ask("GET", "/users", {"X-Request-Timeout": "0"})
        self.assertEqual(answer.status, 503, answer.body)


class TokenTest(GatewayTest):
    RIGHT = {"Authorization": "Bearer s3cret"}
    INVALID = ', error="invalid_token"'

    def setUp(self) -> None:
        self.stub, self.log = Stub(), io.StringIO()
        self.enterContext(contextlib.redirect_stderr(self.log))
        self.open({"token": "s3cret", "quiet": False}, users=self.stub)

    def assert_unauthorized(self, answer: Answered, code: str = "") -> None:
        self.assertEqual((answer.status, answer.json["status"]), (401, 401))
        self.assertEqual(answer.headers["www-authenticate"], f'Bearer realm="microshop"{code}')

    def test_every_write_needs_the_token_whatever_its_path(self):
        for method in ("POST", "PUT", "DELETE", "PATCH", "PURGE"):
            for target in ("/users", "/users/1", "/nowhere", "/", "/health"):
                for given in ("", "Bearer secret", "s3cret", "Basic Og=="):
                    with self.subTest(f"{method} {target}", given=given):
                        headers = {"Authorization": given} if given else {}
                        code = self.INVALID if given == "Bearer secret" else ""
                        answer = self.ask(method, target, headers, b"{}")
                        self.assert_unauthorized(answer, code)
        self.assertEqual(self.stub.requests, [], "a write without the token was forwarded")
        self.assertEqual(self.ask("DELETE", "/users/1", self.RIGHT).status, 200)
        self.assertEqual(self.ask("DELETE", "/nowhere", self.RIGHT).status, 404)

    def test_the_connection_can_be_used_after_a_401(self):
        with Wire(self.gateway.server_port) as wire:
            wire.send(b"POST /users HTTP/1.1\r\nHost: shop\r\nContent-Length: 2\r\n\r\n{}"
                      b"GET /users HTTP/1.1\r\nHost: shop\r\n\r\n")
            self.assertEqual([wire.read().status, wire.read().status], [401, 200])

    def test_a_client_without_the_token_is_not_asked_for_the_body_that_it_holds_back(self):
        with Wire(self.gateway.server_port) as connection:
            connection.send(b"POST /users HTTP/1.1\r\nHost: shop\r\n"
                            b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
            self.assert_unauthorized(connection.read())
            connection.end()
            self.assertTrue(connection.is_closed(), "a connection whose body was not read")

    def test_two_authorization_headers_are_not_accepted(self):
        twice = b"Authorization: Bearer s3cret\r\n" * 2
        with Wire(self.gateway.server_port) as wire:
            wire.send(b"DELETE /users/1 HTTP/1.1\r\nHost: shop\r\n" + twice + b"\r\n")
            self.assert_unauthorized(wire.read(), self.INVALID)

    def test_reads_need_no_token(self):
        for method in ("GET", "HEAD", "OPTIONS"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, self.RIGHT):
                with self.subTest(method, headers=headers):
                    self.assertEqual(self.ask(method, "/users", headers).status, 200)

    def test_the_token_is_neither_forwarded_nor_logged(self):
        self.ask("GET", "/users", self.RIGHT)
        self.ask("POST", "/users", self.RIGHT, b"{}")
        self.ask("POST", "/users", {"Authorization": "Bearer guessed"})

        def all_three_are_logged() -> bool:
            flush(self.gateway.log)
            return self.log.getvalue().count(" /users ") == 3

        wait_until(all_three_are_logged)
        for text in (*map(bytes.decode, self.stub.requests), self.log.getvalue()):
            self.assertNotRegex(text, "(?i)authorization|s3cret|guessed")

    def test_without_a_token_the_gateway_forwards_authorization(self):
        self.open(users=self.stub)
        basic = "Basic Og=="
        self.assertEqual(self.ask("POST", "/users", {"Authorization": basic}).status, 200)
        self.assertEqual(fields(self.stub.requests[-1])["Authorization"], basic)

    def test_the_token_in_a_file_wins(self):
        self.open({"token": "other", "token_file": "s3cret"}, users=self.stub)
        self.assertEqual(self.ask("DELETE", "/users/1", self.RIGHT).status, 200)
        wrong = {"Authorization": "Bearer other"}
        self.assert_unauthorized(self.ask("DELETE", "/users/1", wrong), self.INVALID)


class RateLimitTest(GatewayTest):
    def test_a_client_above_the_rate_gets_429_and_other_clients_do_not(self):
        stub = Stub()
        self.open({"rate": Rate(3, 3600)}, users=stub)
        targets = ("/users", "/nowhere", "/users", "/users", "/users")
        answers = [self.ask("GET", target) for target in targets]
        self.assertEqual([answer.status for answer in answers], [200, 404, 200, 429, 429])
        self.assertEqual(len(stub.requests), 2, "requests that were forwarded")
        limited = answers[-1]
        self.assertEqual(limited.json["status"], 429)
        wait = int(limited.headers["retry-after"])
        self.assertTrue(1200 - PATIENCE < wait <= 1200, f"Retry-After: {wait}")
        self.assertEqual(limited.headers["ratelimit"], f'"client";r=0;t={wait}')
        self.assertEqual(limited.headers["ratelimit-policy"], '"client";q=3;w=3600')
        gateway_address = ("127.0.0.1", self.gateway.server_port)
        with socket.create_connection(gateway_address, PATIENCE, ("127.0.0.2", 0)) as other:
            other.sendall(b"GET /users HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n")
            self.assertEqual(other.recv(65536).split()[1], b"200", "from another address")

    def test_the_rate_is_checked_before_the_token(self):
        self.open({"rate": Rate(2, 3600), "token": "s3cret"}, users=Stub())
        statuses = [self.ask("POST", "/users").status for _ in range(3)]
        self.assertEqual(statuses, [401, 401, 429])

    def test_requests_that_fail_for_other_reasons_count_as_well(self):
        self.open({"rate": Rate(1, 3600), "token": "s3cret"}, users=Stub())
        statuses = [self.ask(method, "/users", {"X-Request-Timeout": left}).status
                    for method, left in (("POST", "0"), ("GET", "0"), ("GET", "soon"))]
        self.assertEqual(statuses, [401, 429, 429])

    def test_health_checks_do_not_count(self):
        self.open({"rate": Rate(1, 3600)}, users=Stub())
        for target in ("/health", "/health/", "/health?verbose", "/health/live"):
            statuses = [self.ask("GET", target).status for _ in range(2)]
            self.assertEqual(statuses, [200, 200], f"GET {target}, twice, of a client that may "
                             "send 1 request an hour")
        self.assertEqual([self.ask("GET", "/users").status for _ in range(2)], [200, 429])

    def test_there_is_no_limit_unless_one_is_set(self):
        self.open(users=Stub())
        self.assertEqual({self.ask("GET", "/users").status for _ in range(200)}, {200})


class FailureTest(GatewayTest):
    def assert_problem(self, answer: Answered, status: int) -> None:
        self.assertEqual(answer.status, status, answer.body)
        self.assertEqual((answer.json["status"], answer.json["service"]), (status, "users"))
        self.assertEqual(answer.headers["content-type"], "application/problem+json")
        self.assertEqual(answer.json["requestId"], answer.headers["x-request-id"])

    def test_a_failing_service_is_a_502_that_affects_neither_connection_nor_other_services(self):
        def cut_short(connection: socket.socket) -> None:
            read_request(connection)
            connection.sendall(OK + b"Al")

        garbage = Stub(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
        for what, users in {"refused": {}, "garbage": {"users": garbage},
                            "cut short": {"users": cut_short},
                            "closed": {"users": read_request}}.items():
            with self.subTest(what):
                self.open(products=Stub(), **users)
                with Wire(self.gateway.server_port) as wire:
                    for _ in range(2):
                        wire.send(b"POST /users HTTP/1.1\r\nHost: shop\r\n"
                                  b"Content-Length: 3\r\n\r\nBob")
                        self.assert_problem(wire.read(), 502)
                        wire.send(b"GET /products HTTP/1.1\r\nHost: shop\r\n\r\n")
                        self.assertEqual(wire.read().body, b"Alice")

    def test_a_service_that_hangs_does_not_delay_the_others(self):
        release = threading.Event()
        self.addCleanup(release.set)

        def wait_for_release(connection: socket.socket) -> None:
            read_request(connection)
            release.wait(PATIENCE)
            connection.sendall(OK + b"Alice")

        self.open({"timeout": 2 * PATIENCE}, users=wait_for_release, products=Stub())
        with Wire(self.gateway.server_port) as wire:
            wire.send(b"GET /users HTTP/1.1\r\nHost: shop\r\n\r\n")
            self.assertEqual(self.ask("GET", "/products").body, b"Alice")
            release.set()  # only now, after the answer of products
            self.assertEqual(wire.read().body, b"Alice")

    def test_a_service_that_does_not_respond_in_time_is_a_504_and_the_connection_goes_on(self):
        self.open(users=answer_once, products=Stub())
        with Wire(self.gateway.server_port) as wire:
            wire.send(b"GET /users HTTP/1.1\r\nHost: shop\r\n\r\n")
            self.assertEqual(wire.read().body, b"Alice")
            began, self.gateway.settings.timeout = time.monotonic(), 0.3
            wire.send(b"GET /users HTTP/1.1\r\nHost: shop\r\n\r\n")
            self.assert_problem(wire.read(), 504)
            self.assertGreater(time.monotonic() - began, 0.25, "seconds: it gave up too early")
            self.gateway.settings.timeout = PATIENCE
            wire.send(b"GET /products HTTP/1.1\r\nHost: shop\r\n\r\n")
            self.assertEqual(wire.read().body, b"Alice")


class LogTest(GatewayTest):
    def test_the_log_shows_retries_and_circuit_breakers_with_the_id_of_the_request(self):
        log = io.StringIO()
        self.enterContext(contextlib.redirect_stderr(log))
        self.open()
        for _ in range(2):
            self.ask("GET", "/users", {"X-Request-Id": "my-request"})
        flush(self.gateway.log)
        events = [line.partition(" gateway ")[2] for line in log.getvalue().splitlines()]
        self.assertEqual(events[0], f"my-request retrying GET /users at {self.users_url}: "
                                    "the users service cannot be reached: Connection refused")
        failures = CircuitBreaker.IN_A_ROW
        self.assertEqual(events[-1], f"my-request circuit breaker for users at {self.users_url} "
                                     f"opened for 0.5 s after {failures} failures in a row")


class HealthTest(GatewayTest):
    def setUp(self) -> None:
        self.enterContext(mock.patch.object(gateway, "HEALTH_TIME", PATIENCE))

    def assert_health(self, status: str, code: int = 200, **services: str) -> None:
        """Check the answer to a health check. Services that are not given must be away."""
        answer = self.ask("GET", "/health")
        self.assertEqual(answer.json, {
            "status": status, "service": "gateway",
            "services": {**dict.fromkeys(SERVICES, "away"), **services},
            "breakers": {name: ["closed"] for name in SERVICES}})
        self.assertEqual(answer.status, code)

    def test_health_is_ok_if_every_service_is(self):
        stub = Stub()
        self.open(**dict.fromkeys(SERVICES, stub))
        self.assert_health("ok", **dict.fromkeys(SERVICES, "ok"))
        self.assertEqual({request.split()[1] for request in stub.requests}, {b"/health"})

    def test_health_is_degraded_if_a_service_is_not_ok(self):
        def respond(status: str, body: bytes) -> Stub:
            return Stub(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b"
                        % (status.encode(), len(body), body))

        for state, service in {
                "draining": respond("503 Draining", b'{"status":"draining","service":"users"}'),
                "busy": respond("503 Busy", b'{"status":503,"detail":"too many clients"}'),
                "away": respond("500 Oops", b'{"status":500}')}.items():
            with self.subTest(state):
                self.open(users=service, products=Stub())
                self.assert_health("degraded", users=state, products="ok")

    def test_health_is_unavailable_while_the_gateway_itself_drains(self):
        self.open(users=Stub())
        self.gateway.draining = True
        self.assert_health("draining", 503, users="ok")

    def test_health_checks_of_the_services_run_in_parallel(self):
        all_are_asked = threading.Barrier(len(SERVICES))

        def wait_for_the_others(connection: socket.socket) -> None:
            read_request(connection)
            all_are_asked.wait(PATIENCE)
            connection.sendall(OK + b"Alice")

        self.open({"timeout": PATIENCE}, **dict.fromkeys(SERVICES, wait_for_the_others))
        self.assert_health("ok", **dict.fromkeys(SERVICES, "ok"))


    def test_the_gateway_is_alive_while_a_service_hangs_and_clients_take_all_connections(self):
        over = threading.Event()
        self.open({"timeout": 10 * PATIENCE, "max_connections": 4},
                  users=lambda connection: over.wait(PATIENCE))
        self.addCleanup(over.set)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Wire(self.gateway.server_port)) for _ in range(4)]
            for client in clients:
                client.send(b"GET /users HTTP/1.1\r\nHost: shop\r\n\r\n")
            wait_until(lambda: self.gateway.connections.count_busy() == 4, "all four to hang")
            for _ in range(10):
                statuses = [self.ask("GET", target).status for target in ("/users", "/health/live")]
                self.assertEqual(statuses, [503, 200], "GET /users and GET /health/live, while as "
                                 "many clients wait for users as may have a connection")
            over.set()


class ImpatientHealthTest(GatewayTest):
    """Health is answered with what is known in time, since a check may wait for a second only."""

    def test_a_service_that_does_not_answer_in_time_is_busy(self):
        self.assertLess(gateway.HEALTH_TIME, 0.3, "seconds")
        self.open({"timeout": 10 * PATIENCE}, users=answer_once, products=answer_once)
        for target in ("/users", "/products"):
            self.ask("GET", target)  # so that a connection is open already
        answer = self.ask("GET", "/health")
        self.assertEqual((answer.status, answer.json["status"]), (200, "degraded"))
        self.assertEqual(answer.json["services"], {
            **dict.fromkeys(SERVICES, "away"), "users": "busy", "products": "busy"})

    def test_a_service_at_the_limit_of_its_bulkhead_is_busy(self):
        over, is_asked = threading.Event(), threading.Event()

        def hold(connection: socket.socket) -> None:
            read_request(connection)
            is_asked.set()
            over.wait(PATIENCE)

        self.open({"timeout": 10 * PATIENCE, "max_in_flight": 1}, users=hold)
        self.addCleanup(over.set)  # before the gateway ends, which waits for its requests
        with Wire(self.gateway.server_port) as wire:
            wire.send(b"GET /users HTTP/1.1\r\nHost: shop\r\n\r\n")
            is_asked.wait(PATIENCE)
            self.assertEqual(self.ask("GET", "/health").json["services"]["users"], "busy")
