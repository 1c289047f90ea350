"""What the gateway passes on and what it does not, both ways, and what it says when a service fails."""
import contextlib
import io
import socket
import time
import unittest
from collections.abc import Callable
from http.client import HTTPMessage, parse_headers
from typing import Any
from unittest import mock

from microshop import gateway
from microshop.chassis.admission import Rate
from microshop.gateway import Gateway
from microshop.users import Users
from tests.helpers import PATIENCE, Answered, Wire, ask, read_request, running, upstream, wait_until

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Stub:
    """A service that keeps each request and gives each the same answer."""

    def __init__(self, answer: bytes = OK + b"Alice"):
        self.answer = answer
        self.requests: list[bytes] = []

    def __call__(self, connection: socket.socket) -> None:
        while request := read_request(connection):
            self.requests.append(request)
            connection.sendall(self.answer)


def fields(message: bytes) -> HTTPMessage:
    """Parse the fields of a request or an answer as the standard library does."""
    return parse_headers(io.BytesIO(message.partition(b"\r\n")[2]))


def silence(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


class GatewayTest(unittest.TestCase):
    def open(self, settings: dict[str, Any] | None = None, **services: Callable[[socket.socket], None] | str) -> None:
        """Start a gateway in front of these, each a stub or a base URL; where none is given, nobody listens."""
        deaf = self.enterContext(socket.socket())
        deaf.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        urls = {f"{name}_url": [service if isinstance(service, str) else self.enterContext(upstream(service))]
                for name, service in {**dict.fromkeys(["users", "products", "orders"], nowhere), **services}.items()}
        self.users_url = urls["users_url"][0]
        self.gateway = self.enterContext(running(Gateway, **urls, **(settings or {})))

    def ask(self, *request: Any) -> Answered:
        return ask(self.gateway.server_port, *request)

    def send(self, *lines: str, body: bytes = b"") -> bytes:
        """Send a request of these lines, half-close, and return all that comes back, as it comes."""
        with Wire(self.gateway.server_port) as wire:
            wire.send("".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1") + body)
            wire.end()
            return wire.file.read()


class Routes(GatewayTest):
    def setUp(self) -> None:
        self.stubs = {name: Stub(OK + name[:5].encode()) for name in ("users", "products", "orders")}
        self.open(**self.stubs)

    def test_the_first_segment_of_a_path_names_the_service_and_the_target_arrives_as_sent(self):
        for name in self.stubs:
            for rest in ("", "/", "?", "/1", "?limit=2&after=%2F&a=//b/../c?d", "/1/cancel", "//x", "/../orders",
                         "/./%2e%2e/%2E%2E%2forders", "/a%2Fb%5C", "/a;b=c,d"):
                with self.subTest(name + rest):
                    self.assertEqual(self.ask("GET", f"/{name}{rest}").body, name[:5].encode())
                    line = self.stubs[name].requests[-1].partition(b"\r\n")[0]
                    self.assertEqual(line.decode(), f"GET /{name}{rest} HTTP/1.1")

    def test_everything_else_is_not_found(self):
        for target in ("/reservations/1", "/usersx", "/user", "/Users", "//users", "/./users", "/../users", "/x/users",
                       "/users%2f..", "/..%2fusers", "/%75sers", "/users;x", "/users%3F", "/users%20"):
            for method in ("GET", "POST", "DELETE"):
                with self.subTest(method + target):
                    answer = self.ask(method, target)
                    self.assertEqual((answer.status, answer.json["status"]), (404, 404))
                    self.assertEqual(answer.headers["content-type"], "application/problem+json")
        self.assertEqual([stub.requests for stub in self.stubs.values()], [[], [], []])

    def test_the_gateway_greets(self):
        answer, head = self.ask("GET", "/"), self.ask("HEAD", "/")
        self.assertEqual((answer.status, answer.body), (200, b"API Gateway"))
        self.assertEqual((head.status, head.body), (200, b""))
        for one in (answer, head):
            self.assertEqual((one.headers["content-type"], one.headers["content-length"]),
                             ("text/html; charset=utf-8", "11"))


class Passing(GatewayTest):
    def setUp(self) -> None:
        self.stub = Stub()
        self.open(users=self.stub)

    def arrive(self, *lines: str, request: str = "GET /users HTTP/1.1", body: bytes = b"") -> HTTPMessage:
        """Send a request with these fields, and return the fields that the service got."""
        self.send(request, "Host: shop.example", *lines, body=body)
        return fields(self.stub.requests[-1])

    def come_back(self, *lines: str, status: str = "200 OK", body: bytes = b"Alice") -> bytes:
        """Let the service answer with these lines and return what a client gets."""
        self.stub.answer = "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode() + body
        return self.send("GET /users HTTP/1.1", "Host: shop.example")

    # --- what concerns one hop alone

    def test_fields_of_one_hop_are_not_passed_on_to_the_service(self):
        arrived = self.arrive(
            "Connection: X-Secret, close ,x-OTHER", "connection: X-Third", "X-Secret: 1", "X-Other: 2",
            "x-third: 3", "Keep-Alive: timeout=5", "Proxy-Connection: keep-alive", "Proxy-Authorization: Basic Og==",
            "TE: trailers", "Trailer: X-Sum", "Upgrade: h2c", "Expect: 100-continue", "X-Kept: 4", "Cookie: a=1")
        self.assertEqual((arrived["X-Kept"], arrived["Cookie"]), ("4", "a=1"))
        for name in ("Connection", "X-Secret", "X-Other", "X-Third", "Keep-Alive", "Proxy-Connection",
                     "Proxy-Authorization", "TE", "Trailer", "Upgrade", "Expect"):
            self.assertNotIn(name, arrived)

    def test_fields_of_one_hop_are_not_passed_on_to_the_client(self):
        answer = self.come_back(
            "Connection: X-Secret, close", "connection: x-OTHER", "X-Secret: 1", "X-Other: 2", "Keep-Alive: timeout=5",
            "Proxy-Connection: close", "Proxy-Authenticate: Basic", "Trailer: X-Sum", "Upgrade: h2c", "X-Kept: 4",
            "Transfer-Encoding: chunked", body=b"5\r\nAlice\r\n0\r\nX-Sum: 9\r\n\r\n")
        self.assertEqual((fields(answer)["X-Kept"], fields(answer).get_all("Content-Length")), ("4", ["5"]))
        self.assertEqual(fields(answer).get_all("Keep-Alive"), ["timeout=60"])  # its own
        for name in ("Connection", "X-Secret", "X-Other", "Proxy-Connection", "Proxy-Authenticate", "Trailer",
                      "Upgrade", "Transfer-Encoding", "X-Sum"):
            self.assertNotIn(name, fields(answer))
        self.assertTrue(answer.endswith(b"\r\n\r\nAlice"))

    # --- who speaks to whom

    def test_the_service_sees_its_own_address_as_host(self):
        for request in ("GET /users HTTP/1.1", "GET http://other.example/users HTTP/1.1"):
            arrived = self.arrive(request=request)
            self.assertEqual(arrived.get_all("Host"), [self.users_url.removeprefix("http://")])
        self.assertEqual(arrived["X-Forwarded-Host"], "other.example")

    def test_a_client_cannot_forge_where_it_comes_from(self):
        arrived = self.arrive("X-Forwarded-For: 6.6.6.6", "x-forwarded-for: 7.7.7.7", "X-Forwarded-Host: evil.example",
                              "X-Forwarded-Proto: https", "Forwarded: for=6.6.6.6")
        self.assertEqual([arrived.get_all(f"X-Forwarded-{name}") for name in ("For", "Host", "Proto")],
                         [["127.0.0.1"], ["shop.example"], ["http"]])
        self.assertNotIn("Forwarded", arrived)
        self.send("GET /users HTTP/1.0", "X-Forwarded-Host: evil.example")
        self.assertNotIn("X-Forwarded-Host", fields(self.stub.requests[-1]))

    def test_the_gateway_adds_itself_to_via_both_ways(self):
        self.assertEqual(self.arrive().get_all("Via"), ["1.1 microshop"])
        self.assertEqual(self.arrive("Via: 1.0 fred").get_all("Via"), ["1.0 fred, 1.1 microshop"])
        self.assertEqual(self.arrive(request="GET /users HTTP/1.0").get_all("Via"), ["1.0 microshop"])
        self.assertEqual(fields(self.come_back("Content-Length: 5")).get_all("Via"), ["1.1 microshop"])
        self.assertEqual(fields(self.come_back("Via: 1.1 cache", "Content-Length: 5")).get_all("Via"),
                         ["1.1 cache", "1.1 microshop"])

    # --- what a request can be followed by

    def follow(self, *lines: str) -> str:
        """Return the X-Request-Id that both the service and the client got, each once."""
        answer = fields(self.send("GET /users HTTP/1.1", "Host: shop.example", *lines))
        [request_id] = answer.get_all("X-Request-Id")
        self.assertEqual(fields(self.stub.requests[-1]).get_all("X-Request-Id"), [request_id])
        return request_id

    def test_a_valid_request_id_is_taken(self):
        for given in ("7", "A.z_0-9", "x" * 64):
            self.assertEqual(self.follow(f"X-Request-Id: {given}"), given)

    def test_an_invalid_request_id_is_replaced(self):
        made = []
        for lines in ([], ["X-Request-Id: " + "x" * 65], ["X-Request-Id: two words"], ["X-Request-Id:"],
                      ["X-Request-Id: a,b"], ["X-Request-Id: \xe9"], ["X-Request-Id: a", "x-request-id: b"]):
            with self.subTest(lines):
                made.append(self.follow(*lines))
                self.assertRegex(made[-1], "^[0-9a-f]{16}$")
        self.assertEqual(len(set(made)), 7)

    def test_the_service_cannot_change_the_request_id(self):
        answer = self.come_back("X-Request-Id: theirs", "Content-Length: 5")
        self.assertEqual(fields(answer).get_all("X-Request-Id"), fields(self.stub.requests[-1]).get_all("X-Request-Id"))

    def test_a_valid_traceparent_is_passed_on_unchanged(self):
        self.assertEqual(self.arrive(f"traceparent: {TRACEPARENT}").get_all("traceparent"), [TRACEPARENT])

    def test_an_invalid_traceparent_is_made_anew(self):
        trace, parent = TRACEPARENT[3:35], TRACEPARENT[36:52]
        for given in ("", f"00-{'0' * 32}-{parent}-01", f"00-{trace}-{'0' * 16}-01", TRACEPARENT.upper(),
                      f"ff-{trace}-{parent}-01", TRACEPARENT[:-1], f"{TRACEPARENT}-x", f"{TRACEPARENT}, {TRACEPARENT}"):
            with self.subTest(given):
                [made] = self.arrive(f"traceparent: {given}").get_all("traceparent")
                self.assertRegex(made, "^00-[0-9a-f]{32}-[0-9a-f]{16}-01$")
                self.assertNotIn(made, given.lower())

    def test_a_tracestate_goes_with_its_traceparent_alone(self):
        for given, arrives in ((TRACEPARENT, ["shop=1"]), ("00-none", None)):
            arrived = self.arrive(f"traceparent: {given}", "tracestate: shop=1")
            self.assertEqual(arrived.get_all("tracestate"), arrives)

    # --- what is said

    def test_method_and_body_arrive_unchanged(self):
        body = b"\0\xff\r\n\r\nGET /users HTTP/1.1\r\n" * 1000
        for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PURGE"):
            with self.subTest(method):
                arrived = self.arrive(f"Content-Length: {len(body)}", "Content-Type: a/b", body=body,
                                      request=f"{method} /users?a=1 HTTP/1.1")
                self.assertEqual(arrived.get_all("Content-Length"), [str(len(body))])
                self.assertEqual(arrived["Content-Type"], "a/b")
                self.assertEqual(self.stub.requests[-1].partition(b"\r\n\r\n")[2], body)
                self.assertTrue(self.stub.requests[-1].startswith(f"{method} /users?a=1 HTTP/1.1\r\n".encode()))

    def test_a_body_in_chunks_arrives_with_its_length(self):
        arrived = self.arrive("Transfer-Encoding: chunked", request="POST /users HTTP/1.1",
                              body=b"3;a=b\r\nAli\r\n2\r\nce\r\n0\r\nX-Trailer: 1\r\n\r\n")
        self.assertEqual(arrived.get_all("Content-Length"), ["5"])
        self.assertEqual(self.stub.requests[-1].partition(b"\r\n\r\n")[2], b"Alice")
        self.assertNotIn("Transfer-Encoding", arrived)
        self.assertNotIn("X-Trailer", arrived)

    def test_an_answer_passes_unchanged_whatever_its_status(self):
        given = {"Content-Type": "text/x-shop", "Location": "/users/7", "ETag": '"a"', "Retry-After": "3",
                 "Date": "Sun, 06 Nov 1994 08:49:37 GMT", "Server": "stub", "Content-Length": "5"}
        for status in (200, 201, 302, 404, 409, 422, 500, 502, 503):
            with self.subTest(status):
                answer = self.come_back(*[f"{name}: {value}" for name, value in given.items()],
                                        "Set-Cookie: a=1; Path=/", "Set-Cookie: b=2", status=f"{status} Well")
                self.assertEqual({name: fields(answer).get_all(name) for name in given},
                                 {name: [value] for name, value in given.items()})
                self.assertEqual(fields(answer).get_all("Set-Cookie"), ["a=1; Path=/", "b=2"])
                self.assertTrue(answer.startswith(b"HTTP/1.1 %d " % status) and answer.endswith(b"\r\n\r\nAlice"))

    def test_an_answer_without_a_body_stays_without_one(self):
        answer = self.come_back("Content-Length: 0", status="204 No Content", body=b"")
        self.assertTrue(answer.startswith(b"HTTP/1.1 204 ") and answer.endswith(b"\r\n\r\n"))
        self.assertNotIn("Content-Length", fields(answer))

    def test_cookies_in_two_fields_become_one_list_of_cookies(self):
        self.assertEqual(self.arrive("Cookie: a=1", "Cookie: b=2").get_all("cookie"), ["a=1; b=2"])

    def test_head_tells_no_length_that_the_service_did_not_tell(self):
        for self.stub.answer in (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
                                 b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\n"):
            self.assertNotIn("Content-Length", fields(self.send("HEAD /users HTTP/1.1", "Host: shop")))


class Repeats(GatewayTest):
    """A kept connection on which the service ends without a word, as one does that is being restarted."""

    def post_twice(self, service: str, **headers: str) -> tuple[list[int], int]:
        """Post on a connection that is kept and then on it again; return the statuses and how often a post came."""
        requests = []

        def answer_once(connection: socket.socket) -> None:
            requests.append(read_request(connection))
            connection.sendall(OK + b"Alice")
            requests.append(read_request(connection))

        self.open(**{service: answer_once})
        statuses = [self.ask("POST", f"/{service}", headers, b"{}").status for _ in range(2)]
        return statuses, len([request for request in requests if request])

    def test_an_order_with_a_key_is_sent_again(self):
        self.assertEqual(self.post_twice("orders", **{"Idempotency-Key": "k"}), ([200, 200], 3))

    def test_no_other_post_is_sent_twice(self):
        for service, headers in (("orders", {}), ("users", {"Idempotency-Key": "k"}), ("users", {})):
            with self.subTest(service, headers=headers):
                self.assertEqual(self.post_twice(service, **headers), ([200, 502], 2))


class RealService(GatewayTest):
    def setUp(self) -> None:
        users = self.enterContext(running(Users))
        self.open(users=f"http://127.0.0.1:{users.server_port}")

    def test_what_a_client_knows_already_is_not_sent_again(self):
        answer = self.ask("GET", "/users/1")
        self.assertEqual((answer.status, answer.json), (200, {"id": 1, "name": "Alice"}))
        again = self.ask("GET", "/users/1", {"If-None-Match": answer.headers["etag"]})
        self.assertEqual((again.status, again.body, again.headers["etag"]), (304, b"", answer.headers["etag"]))

    def test_writes_pass_with_their_conditions_and_locations(self):
        json_type, tag = {"Content-Type": "application/json"}, self.ask("GET", "/users/1").headers["etag"]
        posted = self.ask("POST", "/users", json_type, b'{"name":"Carol"}')
        self.assertEqual((posted.status, self.ask("GET", posted.headers["location"]).json["name"]), (201, "Carol"))
        statuses = [self.ask("PUT", "/users/1", {**json_type, "If-Match": tag}, b'{"name":"Al"}').status
                    for _ in range(2)]
        self.assertEqual(statuses, [200, 412])
        self.assertEqual(self.ask("DELETE", "/users/1").status, 204)
        self.assertEqual(self.ask("GET", "/users/1").status, 404)

    def test_head_tells_the_length_and_sends_no_body(self):
        with Wire(self.gateway.server_port) as wire:
            wire.send(b"HEAD /users HTTP/1.1\r\nHost: shop\r\n\r\nGET /users HTTP/1.1\r\nHost: shop\r\n\r\n")
            head, answer = wire.read("HEAD"), wire.read()
        self.assertEqual((head.status, answer.status), (200, 200))
        self.assertEqual(head.headers["content-length"], str(len(answer.body)))


class Deadlines(GatewayTest):
    def test_what_is_left_of_the_time_travels_upstream_and_a_client_can_only_shorten_it(self):
        stub = Stub()
        self.open(users=stub)
        for given, most in ((None, 5), ("2", 1.8), ("7200", 5)):
            self.ask("GET", "/users", {"X-Request-Timeout": given} if given else {})
            [left] = fields(stub.requests[-1]).get_all("X-Request-Timeout")
            self.assertTrue(most - 0.5 < float(left) <= most, left)

    def test_a_client_without_patience_gets_its_answer_before_it_goes(self):
        self.open(users=silence)
        started = time.monotonic()
        answer = self.ask("GET", "/users", {"X-Request-Timeout": "0.5"})
        self.assertEqual(answer.status, 504)
        self.assertLess(time.monotonic() - started, 0.5)
        self.assertEqual(self.ask("GET", "/users", {"X-Request-Timeout": "0"}).status, 503)


class Token(GatewayTest):
    SHOWN = {"Authorization": "Bearer s3cret"}

    def setUp(self) -> None:
        self.stub, self.log = Stub(), io.StringIO()
        self.enterContext(contextlib.redirect_stderr(self.log))
        self.open({"token": "s3cret", "quiet": False}, users=self.stub)

    def assert_refused(self, answer: Answered) -> None:
        self.assertEqual((answer.status, answer.json["status"]), (401, 401))
        self.assertEqual(answer.headers["www-authenticate"], 'Bearer realm="microshop"')

    def test_a_write_needs_it_whatever_it_is_for(self):
        for method in ("POST", "PUT", "DELETE", "PATCH", "PURGE"):
            for target in ("/users", "/users/1", "/nowhere", "/", "/health"):
                for headers in ({}, {"Authorization": "Bearer secret"}, {"Authorization": "s3cret"}):
                    self.assert_refused(self.ask(method, target, headers, b"{}"))
        self.assertEqual(self.stub.requests, [])
        self.assertEqual(self.ask("DELETE", "/users/1", self.SHOWN).status, 200)
        self.assertEqual(self.ask("DELETE", "/nowhere", self.SHOWN).status, 404)

    def test_the_connection_goes_on_after_a_refusal(self):
        with Wire(self.gateway.server_port) as wire:
            wire.send(b"POST /users HTTP/1.1\r\nHost: shop\r\nContent-Length: 2\r\n\r\n{}"
                      b"GET /users HTTP/1.1\r\nHost: shop\r\n\r\n")
            self.assertEqual([wire.read().status, wire.read().status], [401, 200])

    def test_two_of_them_are_none(self):
        request = b"DELETE /users/1 HTTP/1.1\r\nHost: shop\r\n" + b"Authorization: Bearer s3cret\r\n" * 2 + b"\r\n"
        with Wire(self.gateway.server_port) as wire:
            wire.send(request)
            self.assert_refused(wire.read())

    def test_reads_stay_open(self):
        for method in ("GET", "HEAD", "OPTIONS"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, self.SHOWN):
                self.assertEqual(self.ask(method, "/users", headers).status, 200)

    def test_it_goes_no_further_than_the_gateway_nor_into_its_log(self):
        for method in ("GET", "POST"):
            self.ask(method, "/users", self.SHOWN, b"{}" if method == "POST" else None)
        self.ask("POST", "/users", {"Authorization": "Bearer guessed"})
        wait_until(lambda: self.gateway.log.flush() or self.log.getvalue().count(" /users ") == 3)
        for text in (*map(bytes.decode, self.stub.requests), self.log.getvalue()):
            self.assertNotRegex(text, "(?i)authorization|s3cret|guessed")

    def test_without_one_the_gateway_minds_nobodys(self):
        self.open(users=self.stub)
        self.assertEqual(self.ask("POST", "/users", {"Authorization": "Basic Og=="}).status, 200)
        self.assertEqual(fields(self.stub.requests[-1])["Authorization"], "Basic Og==")

    def test_a_file_may_hold_it(self):
        self.open({"token": "other", "token_file": "s3cret"}, users=self.stub)
        self.assertEqual(self.ask("DELETE", "/users/1", self.SHOWN).status, 200)
        self.assert_refused(self.ask("DELETE", "/users/1", {"Authorization": "Bearer other"}))


class Limit(GatewayTest):
    def test_who_sends_too_much_is_told_when_to_come_back_and_nobody_else(self):
        stub = Stub()
        self.open({"rate": Rate(3, 3600)}, users=stub)
        answers = [self.ask("GET", target) for target in ("/users", "/nowhere", "/users", "/users", "/users")]
        self.assertEqual([answer.status for answer in answers], [200, 404, 200, 429, 429])
        self.assertEqual(len(stub.requests), 2)
        limited = answers[-1]
        self.assertEqual(limited.json["status"], 429)
        wait = int(limited.headers["retry-after"])
        self.assertTrue(1100 < wait <= 1200)
        self.assertEqual(limited.headers["ratelimit"], f'"client";r=0;t={wait}')
        self.assertEqual(limited.headers["ratelimit-policy"], '"client";q=3;w=3600')
        with socket.create_connection(("127.0.0.1", self.gateway.server_port), PATIENCE, ("127.0.0.2", 0)) as other:
            other.sendall(b"GET /users HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n")
            self.assertEqual(other.recv(65536).split()[1], b"200")

    def test_it_comes_before_the_question_for_the_token(self):
        self.open({"rate": Rate(2, 3600), "token": "s3cret"}, users=Stub())
        self.assertEqual([self.ask("POST", "/users").status for _ in range(3)], [401, 401, 429])

    def test_no_request_gets_past_it(self):
        self.open({"rate": Rate(1, 3600), "token": "s3cret"}, users=Stub())
        statuses = [self.ask(method, "/users", {"X-Request-Timeout": left}).status
                    for method, left in (("POST", "0"), ("GET", "0"), ("GET", "soon"))]
        self.assertEqual(statuses, [401, 429, 429])

    def test_there_is_none_unless_asked_for(self):
        self.open(users=Stub())
        self.assertEqual({self.ask("GET", "/users").status for _ in range(200)}, {200})


class Failures(GatewayTest):
    def assert_tells(self, answer: Answered, status: int) -> None:
        self.assertEqual((answer.status, answer.json["status"], answer.json["service"]), (status, status, "users"))
        self.assertEqual(answer.headers["content-type"], "application/problem+json")
        self.assertEqual(answer.json["requestId"], answer.headers["x-request-id"])

    def test_a_service_that_fails_is_a_bad_gateway_while_the_others_and_the_connection_go_on(self):
        def cut(connection: socket.socket) -> None:
            read_request(connection)
            connection.sendall(OK + b"Al")

        for what, users in {"refused": {}, "garbage": {"users": Stub(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")},
                            "cut short": {"users": cut}, "closed": {"users": read_request}}.items():
            with self.subTest(what):
                self.open(products=Stub(), **users)
                with Wire(self.gateway.server_port) as wire:
                    for _ in range(2):
                        wire.send(b"POST /users HTTP/1.1\r\nHost: shop\r\nContent-Length: 3\r\n\r\nBob")
                        self.assert_tells(wire.read(), 502)
                        wire.send(b"GET /products HTTP/1.1\r\nHost: shop\r\n\r\n")
                        self.assertEqual(wire.read().body, b"Alice")

    def test_a_service_that_is_late_is_a_gateway_timeout_and_holds_up_nobody_else(self):
        self.open({"timeout": 0.3}, users=silence, products=Stub())
        started = time.monotonic()
        with Wire(self.gateway.server_port) as wire:
            wire.send(b"GET /users HTTP/1.1\r\nHost: shop\r\n\r\n")
            self.assertEqual(self.ask("GET", "/products").body, b"Alice")
            self.assert_tells(wire.read(), 504)
            self.assertTrue(0.25 < time.monotonic() - started < 1.5)
            wire.send(b"GET /products HTTP/1.1\r\nHost: shop\r\n\r\n")
            self.assertEqual(wire.read().body, b"Alice")


class Health(GatewayTest):
    def assert_health(self, status: str, code: int = 200, **services: str) -> None:
        answer = self.ask("GET", "/health")
        self.assertEqual(answer.json, {"status": status, "service": "gateway", "services": services,
                                       "breakers": {name: ["closed"] for name in services}})
        self.assertEqual(answer.status, code)

    def test_it_is_ok_when_every_service_is(self):
        stub = Stub()
        self.open(users=stub, products=stub, orders=stub)
        self.assert_health("ok", users="ok", products="ok", orders="ok")
        self.assertEqual({request.split()[1] for request in stub.requests}, {b"/health"})

    def test_it_is_degraded_when_a_service_is_away_or_drains(self):
        self.open(users=Stub(), products=Stub(b"HTTP/1.1 503 Draining\r\nContent-Length: 0\r\n\r\n"))
        self.assert_health("degraded", users="ok", products="draining", orders="away")
        self.open(users=Stub(), products=Stub(), orders=Stub(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"))
        self.assert_health("degraded", users="ok", products="ok", orders="away")

    def test_it_is_unavailable_while_the_gateway_itself_drains(self):
        self.open(users=Stub())
        self.gateway.draining = True
        self.assert_health("draining", 503, users="ok", products="away", orders="away")

    def test_it_is_told_although_services_hang(self):
        self.assertLessEqual(gateway.HEALTH_TIME, 1)
        self.enterContext(mock.patch.object(gateway, "HEALTH_TIME", 0.5))
        self.open(users=silence, products=silence, orders=Stub())
        started = time.monotonic()
        self.assert_health("degraded", users="away", products="away", orders="ok")
        self.assertLess(time.monotonic() - started, 0.95)  # both at once, not one after the other
