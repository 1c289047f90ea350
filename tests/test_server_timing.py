"""Server-Timing: which processes have worked on an answer, and for how long."""
import unittest
from typing import Any
from unittest import mock

from microshop.chassis.admission import Rate
from microshop.chassis.resilience import CircuitBreaker
from microshop.gateway import Gateway
from microshop.orders import Orders
from microshop.users import Users
from tests.helpers import (
    NOBODY, PATIENCE, Answered, Wire, ask, exchange, running, running_shop, upstream, wait_until)
from tests.observing import JSON_TYPE, OK, Stub, real_shop, timings

CAROL = b'{"name":"Carol"}'
BOUGHT = {"userId": 1, "productId": 101}
GARBAGE = (b"GET /users\r\n\r\n", b"\x16\x03\x01\x00\xa5\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
           b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", b"POST /users HTTP/1.1\r\n\r\n",
           b"GET / HTTP/1.1\r\nHost: shop\r\nContent-Length: x\r\n\r\n")


def names(answer: Answered) -> list[str]:
    return [entry.name for entry in timings(answer)]


class EveryAnswerTest(unittest.TestCase):
    """Every answer of every process has the header."""

    def assert_timed(self, answer: Answered, status: int, *expected: str) -> None:
        """Check the status of an answer, and which entries it has, with which durations."""
        self.assertEqual((answer.status, names(answer)), (status, list(expected)), answer.headers)
        for entry in timings(answer):
            self.assertIsNotNone(entry.duration, answer.headers["server-timing"])

    def test_through_the_gateway_the_entries_of_both_processes_arrive(self):
        with real_shop() as shop:
            port = shop.gateway
            tag = ask(port, target="/users/1").headers["etag"]
            for status, *request in (
                    (200, "GET", "/users"), (200, "HEAD", "/users"), (200, "GET", "/users/1"),
                    (304, "GET", "/users/1", {"If-None-Match": tag}),
                    (412, "DELETE", "/users/1", {"If-Match": '"x"'}),
                    (201, "POST", "/users", JSON_TYPE, CAROL), (204, "DELETE", "/users/3"),
                    (204, "OPTIONS", "/users"), (404, "GET", "/users/3"),
                    (404, "HEAD", "/users/3"), (404, "GET", "/users/x"),
                    (400, "GET", "/users?limit=x"), (405, "PATCH", "/users/1"),
                    (422, "POST", "/users", JSON_TYPE, b"{}"), (415, "POST", "/users", {}, b"{}"),
                    (501, "BREW", "/users")):
                with self.subTest(request):
                    self.assert_timed(ask(port, *request), status, "users", "gateway")

    def test_what_a_process_answers_by_itself_has_its_own_entry(self):
        with real_shop() as shop:
            for name, port in shop.ports.items():
                for status, *request in (
                        (404, "GET", "/nowhere"), (404, "HEAD", "/nowhere"),
                        (200, "GET", "/health/live"), (405, "PUT", "/health"),
                        (204, "OPTIONS", "/health"), (204, "OPTIONS", "*"),
                        (200, "GET", "/metrics"), (200, "HEAD", "/traces"), (501, "BREW", "/")):
                    with self.subTest(f"{name}: {request}"):
                        self.assert_timed(ask(port, *request), status, name)
                for sent in GARBAGE:
                    with self.subTest(f"{name}: {sent[:40]}"):
                        [answer] = exchange(port, sent)
                        self.assertIn(answer.status, (400, 411, 414, 505), answer)
                        self.assert_timed(answer, answer.status, name)

    def test_all_entries_are_in_one_header(self):
        with real_shop() as shop, Wire(shop.gateway) as client:
            client.send(b"GET /users HTTP/1.1\r\nHost: shop\r\n\r\n")
            client.end()
            names = [line.partition(b":")[0].lower() for line in client.file.read().split(b"\r\n")]
        self.assertEqual(names.count(b"server-timing"), 1, names)

    def test_what_the_gateway_refuses_has_its_entry(self):
        with running(Gateway, token="s3cret", rate=Rate(2, 3600)) as gateway:
            port = gateway.server_port
            self.assert_timed(ask(port, "DELETE", "/users/1"), 401, "gateway")
            cross = {"Sec-Fetch-Site": "cross-site", "Origin": "http://other.example"}
            self.assert_timed(ask(port, "DELETE", "/users/1", cross), 403, "gateway")
            self.assert_timed(ask(port, "GET", "/"), 429, "gateway")

    def test_an_internal_error_has_it(self):
        with (running(Users) as users,
              mock.patch("microshop.users.find_users", side_effect=RuntimeError)):
            self.assert_timed(ask(users.server_port, "GET", "/users"), 500, "users")

    def test_a_connection_that_is_one_too_many_is_refused_with_it(self):
        with running(Users, max_connections=1) as users, Wire(users.server_port) as first:
            first.send(b"GET /users HTTP/1.1\r\nHost: shop\r\nContent-Length: 9\r\n\r\n")
            wait_until(lambda: users.connections.count_busy() == 1, "the first request")
            self.assert_timed(ask(users.server_port, target="/users"), 503, "users")
            wait_until(lambda: [span for span in users.telemetry.spans() if span.status == 503],
                       "the connection that was refused to be recorded")

    def test_health_checks_have_it_when_no_service_answers(self):
        with running(Gateway) as gateway:
            self.assert_timed(ask(gateway.server_port, "GET", "/health/live"), 200, "gateway")
            answer = ask(gateway.server_port, "GET", "/health")
            self.assertEqual((answer.status, names(answer)[-1]), (200, "gateway"))


class CallTest(unittest.TestCase):
    """An answer says what the calls for it have taken."""

    def open(self, *responses: bytes, **settings: Any) -> int:
        url = self.enterContext(upstream(Stub(*responses))) if responses else NOBODY
        return self.enterContext(running(Gateway, users_url=[url], **settings)).server_port

    def test_an_order_has_an_entry_of_each_process_that_worked_on_it(self):
        with real_shop() as shop:
            answer = shop.ask("POST", "/orders", BOUGHT)
            self.assertEqual((answer.status, names(answer)),
                             (201, ["users", "products", "orders", "gateway"]), answer.headers)
            answer = shop.ask("GET", "/orders/203?expand=user,product")
            self.assertEqual((answer.status, sorted(names(answer)[:-1]), names(answer)[-1]),
                             (200, ["orders", "products", "users"], "gateway"), answer.headers)

    def test_a_process_takes_no_longer_than_the_one_that_waits_for_it(self):
        with real_shop() as shop:
            for _ in range(20):
                durations = {entry.name: entry.duration for entry in
                             timings(shop.ask("POST", "/orders", BOUGHT))}
                self.assertGreater(durations["users"], 0, durations)
                self.assertGreater(durations["orders"], durations["users"], durations)
                self.assertGreater(durations["gateway"], durations["orders"], durations)

    def test_every_try_beyond_the_first_has_an_entry_that_says_how_it_ended(self):
        answer = ask(self.open(timeout=PATIENCE), target="/users")
        self.assertEqual((answer.status, [(entry.name, entry.description)
                                          for entry in timings(answer)]),
                         (502, [("users-try-2", "refused"), ("users-try-3", "refused"),
                                ("gateway", None)]))
        timed = OK.replace(b"\r\n\r\n", b"\r\nServer-Timing: users;dur=0.4\r\n\r\n")
        answer = ask(self.open(b"", timed, timeout=PATIENCE), target="/users")
        found = timings(answer)
        self.assertEqual(answer.status, 200, answer)
        self.assertEqual(sorted(names(answer)), ["gateway", "users", "users-try-2"])
        self.assertEqual([entry.duration for entry in found if entry.name == "users"], [0.4])

    def test_a_rejected_call_has_only_the_entry_of_the_gateway(self):
        self.enterContext(mock.patch.object(CircuitBreaker, "FIRST_PAUSE", PATIENCE))
        port = self.open(timeout=PATIENCE)
        for _ in range(5):
            ask(port, target="/users")
        answer = ask(port, target="/users")
        self.assertEqual((answer.status, names(answer)), (503, ["gateway"]))

    def test_the_tries_of_the_orders_service_arrive_at_the_client_too(self):
        with running_shop(users_url=[NOBODY]) as shop:
            with running(Gateway, orders_url=[shop.orders.url]) as gateway:
                answer = ask(gateway.server_port, "POST", "/orders", JSON_TYPE,
                             b'{"userId": 1, "productId": 101}')
        self.assertEqual((answer.status, names(answer)),
                         (202, ["users-try-2", "users-try-3", "orders", "gateway"]))

    def test_all_that_a_service_has_tried_arrives_however_often_it_had_to(self):
        tried = [f'{name}-try-{number};dur=1{number}.345;desc="refused"'
                 for name in ("users", "products") for number in (2, 3)]
        value = ", ".join([*tried, "users;dur=1.234", "products;dur=1.234", "orders;dur=123.456"])
        sent = OK.replace(b"\r\n\r\n", f"\r\nServer-Timing: {value}\r\n\r\n".encode())
        answer = ask(self.open(sent), target="/users")
        self.assertEqual(len(timings(answer)), 8, answer.headers)

    def test_what_a_service_sends_cannot_break_the_header(self):
        sent = b"\r\nServer-Timing: %s\r\n\r\n"
        for value in (b"x" * 5000, b", ".join([b"users;dur=1"] * 500)):
            port = self.open(OK.replace(b"\r\n\r\n", sent % value))
            answer = ask(port, target="/users")
            self.assertEqual((answer.status, names(answer)), (200, ["gateway"]), answer.headers)


class OrdersTest(unittest.TestCase):
    def test_a_service_that_calls_none_has_one_entry(self):
        with running(Orders) as orders:
            self.assertEqual(names(ask(orders.server_port, target="/orders")), ["orders"])


if __name__ == "__main__":
    unittest.main()
