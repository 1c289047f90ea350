"""GET /traces: what each process did for a request, and how these pieces belong together."""
import time
import unittest
from typing import Any
from unittest import mock

from microshop import SERVICES
from microshop.chassis.resilience import CircuitBreaker
from microshop.gateway import Gateway
from microshop.orders import Orders, Saga, add_order
from microshop.users import Users
from tests.formats import parse_traceparent, parse_tracestate
from tests.helpers import (
    NOBODY, PATIENCE, ask, exchange, running, running_moody_shop, upstream, wait_until)
from tests.observing import (
    OK, PARENT_ID, TRACE_ID, TRACEPARENT, Late, Stub, await_spans, real_shop, spans_of)

TRACESTATE = "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"
GET = b"GET /users HTTP/1.1\r\nHost: shop\r\n"
SLOWEST = 50                 # spans that are kept for being slow
KEPT = 500 + SLOWEST + 100 + 100  # spans at most: the last, the slowest, the failed, the annotated
CUT = 200                    # characters of a path that are kept
BOUGHT = {"userId": 1, "productId": 101}
Span = dict[str, Any]

CONTINUED = [  # a traceparent that is valid, and the flags that must be sent on
    (f"00-{TRACE_ID}-{PARENT_ID}-01", 1), (f"00-{TRACE_ID}-{PARENT_ID}-00", 0),
    (f"00-{TRACE_ID}-{PARENT_ID}-03", 3), (f"00-{TRACE_ID}-{PARENT_ID}-ff", 3),
    (f"01-{TRACE_ID}-{PARENT_ID}-01", 1), (f"cc-{TRACE_ID}-{PARENT_ID}-00-what.the=future", 0),
    (f"fe-{TRACE_ID}-{PARENT_ID}-01-", 1)]
MALFORMED = [
    "", "00", "traceparent", f"00-{TRACE_ID}-{PARENT_ID}", f"00-{TRACE_ID}-{PARENT_ID}-1",
    f"00-{TRACE_ID}-{PARENT_ID}-01-more", f"00-{TRACE_ID}-{PARENT_ID}-01-",
    f"01-{TRACE_ID}-{PARENT_ID}-01more", f"ff-{TRACE_ID}-{PARENT_ID}-01",
    f"0-{TRACE_ID}-{PARENT_ID}-01", f"00-{TRACE_ID.upper()}-{PARENT_ID}-01",
    f"00-{TRACE_ID}-{PARENT_ID.upper()}-01", f"00-{TRACE_ID}-{PARENT_ID}-0A",
    f"00-{'0' * 32}-{PARENT_ID}-01", f"00-{TRACE_ID}-{'0' * 16}-01",
    f"00-{TRACE_ID[1:]}-{PARENT_ID}-01", f"00-{TRACE_ID}x-{PARENT_ID}-01",
    f"00_{TRACE_ID}_{PARENT_ID}_01", f"{TRACEPARENT}, {TRACEPARENT}"]


def select(spans: list[Span], service: str, kind: str) -> list[Span]:
    """Return the spans of a service that have this kind."""
    return [span for span in spans
            if span["localEndpoint"]["serviceName"] == service and span.get("kind") == kind]


class OneTraceTest(unittest.TestCase):
    """One order, placed at the gateway, is one trace through all four processes."""

    @classmethod
    def setUpClass(cls):
        cls.shop = cls.enterClassContext(real_shop())
        cls.began = time.time()
        cls.answer = cls.shop.ask("POST", "/orders", BOUGHT, traceparent=TRACEPARENT,
                                  x_request_id="my-order")
        ports = [cls.shop.ports[name] for name in ("gateway", *SERVICES)]
        cls.spans = await_spans(7, *ports, trace_id=TRACE_ID)
        cls.ended = time.time()

    def test_each_process_has_a_span_for_its_request_and_one_for_each_call(self):
        self.assertEqual(self.answer.status, 201, self.answer)
        found = sorted((span["localEndpoint"]["serviceName"], span["kind"],
                        span.get("remoteEndpoint", {}).get("serviceName", ""))
                       for span in self.spans)
        self.assertEqual(found, [
            ("gateway", "CLIENT", "orders"), ("gateway", "SERVER", ""),
            ("orders", "CLIENT", "products"), ("orders", "CLIENT", "users"),
            ("orders", "SERVER", ""), ("products", "SERVER", ""), ("users", "SERVER", "")])

    def test_the_id_of_a_try_is_the_parent_of_what_the_called_service_does(self):
        by_id = {span["id"]: span for span in self.spans}
        self.assertEqual(len(by_id), 7, "two spans have the same id")
        for span in self.spans:
            own, parent = span["localEndpoint"]["serviceName"], by_id.get(span["parentId"])
            if (own, span["kind"]) == ("gateway", "SERVER"):
                self.assertEqual(span["parentId"], PARENT_ID, "the client's span is its parent")
            elif span["kind"] == "SERVER":
                self.assertEqual((parent["kind"], parent["remoteEndpoint"]["serviceName"]),
                                 ("CLIENT", own), f"parent of {span}")
            else:
                self.assertEqual((parent["kind"], parent["localEndpoint"]["serviceName"]),
                                 ("SERVER", own), f"parent of {span}")

    def test_spans_have_the_agreed_names_and_tags(self):
        for service, kind, name, path, more in (
                ("gateway", "SERVER", "post /orders/*", "/orders",
                 {"http.status_code": "201", "http.route": "/orders/*"}),
                ("gateway", "CLIENT", "post orders", "/orders",
                 {"http.status_code": "201", "try": "1", "server": self.url("orders")}),
                ("orders", "SERVER", "post /orders", "/orders",
                 {"http.status_code": "201", "http.route": "/orders", "order": "203"}),
                ("users", "SERVER", "get /users/{id}", "/users/1",
                 {"http.status_code": "200", "http.route": "/users/{id}"})):
            [span] = select(self.spans, service, kind)
            tags = {"http.method": name.partition(" ")[0].upper(), "http.path": path,
                    "request.id": "my-order", "pid": str(self.shop.pid(service)), **more}
            self.assertEqual((span["name"], span.get("tags")), (name, tags), f"{service} {kind}")

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.shop.ports[name]}"

    def test_calls_about_an_order_have_its_id_as_a_tag(self):
        for span in select(self.spans, "orders", "CLIENT"):
            self.assertEqual(span["tags"].get("order"), "203", span)

    def test_each_move_of_the_order_is_an_annotation(self):
        [span] = select(self.spans, "orders", "SERVER")
        found = [annotation["value"] for annotation in span.get("annotations", [])]
        self.assertEqual(found[-1:], ["pending -> confirmed"], found)

    def test_times_are_in_microseconds_since_1970(self):
        for span in self.spans:
            times = [span["timestamp"], span["timestamp"] + span["duration"],
                     *[one["timestamp"] for one in span.get("annotations", [])]]
            for at in times:
                self.assertTrue(self.began - 0.1 < at / 1e6 < self.ended + 0.1, span)

    def test_no_span_has_failed(self):
        self.assertEqual([span for span in self.spans if "error" in span["tags"]], [])


class PropagationTest(unittest.TestCase):
    """What of a client's trace headers reaches the next process."""

    def open(self, *responses: bytes, **settings: Any) -> tuple[Stub, int]:
        """Start a gateway in front of a stub; return the stub, and the gateway's port."""
        stub = Stub(*responses)
        url = self.enterContext(upstream(stub))
        return stub, self.enterContext(running(Gateway, users_url=[url], **settings)).server_port

    def test_a_valid_trace_is_continued_as_version_00_with_its_state(self):
        stub, port = self.open()
        for given, flags in CONTINUED:
            ask(port, "GET", "/users", {"traceparent": given, "tracestate": TRACESTATE})
            sent = parse_traceparent(stub.heads[-1]["traceparent"])
            self.assertEqual((sent.trace_id, sent.flags), (TRACE_ID, flags), given)
            self.assertNotEqual(sent.parent_id, PARENT_ID, f"{given}: the gateway's own id is sent")
            self.assertEqual(stub.heads[-1].get("tracestate"), TRACESTATE, given)

    def test_a_malformed_one_begins_a_new_trace_without_a_state(self):
        stub, port = self.open()
        for given in MALFORMED:
            ask(port, "GET", "/users", {"traceparent": given, "tracestate": TRACESTATE})
            sent = parse_traceparent(stub.heads[-1]["traceparent"])
            self.assertNotEqual(sent.trace_id, TRACE_ID, given)
            self.assertEqual(sent.flags & 1, 1, f"{given}: a trace that begins here is sampled")
            self.assertNotIn("tracestate", stub.heads[-1], given)
        ids = {parse_traceparent(head["traceparent"]).trace_id for head in stub.heads}
        self.assertEqual(len(ids), len(MALFORMED), "each request has a trace of its own")

    def test_two_headers_with_a_state_are_sent_on_as_one(self):
        stub, port = self.open()
        exchange(port, GET + f"traceparent: {TRACEPARENT}\r\ntracestate: a=1\r\n"
                             "tracestate: b=2\r\n\r\n".encode())
        self.assertEqual(parse_tracestate(stub.heads[0]["tracestate"]), {"a": "1", "b": "2"})
        self.assertEqual(parse_traceparent(stub.heads[0]["traceparent"]).trace_id, TRACE_ID)

    def test_two_traceparents_do_not_continue_any_trace(self):
        stub, port = self.open()
        twice = f"traceparent: {TRACEPARENT}\r\n" * 2
        [answer] = exchange(port, GET + f"{twice}\r\n".encode())
        self.assertEqual(answer.status, 200)
        self.assertNotEqual(parse_traceparent(stub.heads[0]["traceparent"]).trace_id, TRACE_ID)

    def test_every_try_has_a_span_and_sends_its_id(self):
        stub, port = self.open(OK, b"", b"", OK, timeout=PATIENCE)
        ask(port, "GET", "/users", {"traceparent": TRACEPARENT})  # its connection is kept
        self.assertEqual(ask(port, "GET", "/users", {"traceparent": TRACEPARENT}).status, 200)
        spans = await_spans(2 + 4, port, trace_id=TRACE_ID)
        tries = select(spans, "gateway", "CLIENT")
        sent = [parse_traceparent(head["traceparent"]).parent_id for head in stub.heads]
        self.assertEqual(sorted(span["id"] for span in tries), sorted(sent))
        self.assertEqual(len(set(sent)), 4, "each try has an id of its own")
        second = [span for span in tries if span["id"] != sent[0]]
        self.assertEqual(len({span["parentId"] for span in second}), 1,
                         "the tries of a call have the same parent")
        self.assertEqual([(span["tags"]["try"], span["tags"].get("error"),
                           span["tags"].get("http.status_code")) for span in second],
                         [("1", "broken", None), ("2", "broken", None), ("3", None, "200")])

    def test_the_orders_service_passes_the_state_on(self):
        stub = Stub(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        with upstream(stub) as url, running(Orders, users_url=[url]) as orders:
            ask(orders.server_port, "POST", "/orders", {
                "traceparent": TRACEPARENT, "tracestate": TRACESTATE,
                "Content-Type": "application/json"}, b'{"userId": 1, "productId": 101}')
        self.assertEqual(parse_traceparent(stub.heads[0]["traceparent"]).trace_id, TRACE_ID)
        self.assertEqual(stub.heads[0]["tracestate"], TRACESTATE)


class FailureTest(unittest.TestCase):
    def test_each_way_to_fail_has_a_name_and_only_failures_have_the_tag(self):
        for response, error in (
                (b"garbage\r\n\r\n", "invalid"), (b"", "broken"), (None, "timeout"),
                (b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", "503"),
                (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", None)):
            stub, timeout = (Late(), 0.5) if response is None else (Stub(response), PATIENCE)
            with (self.subTest(error), upstream(stub) as url,
                  running(Gateway, users_url=[url], timeout=timeout) as gateway):
                status = str(ask(gateway.server_port, "POST", "/users").status)
                spans = await_spans(2, gateway.server_port)
                [tried] = select(spans, "gateway", "CLIENT")
                [served] = select(spans, "gateway", "SERVER")
                self.assertEqual(tried["tags"].get("error"), error, tried)
                self.assertEqual(served["tags"].get("error"), error and status, served)
                self.assertEqual(served["tags"]["http.status_code"], status, served)

    def test_a_call_that_the_breaker_rejects_has_a_span_without_a_server(self):
        with (mock.patch.object(CircuitBreaker, "FIRST_PAUSE", PATIENCE),
              running(Gateway, users_url=[NOBODY], timeout=PATIENCE) as gateway):
            for _ in range(6):
                ask(gateway.server_port, "GET", "/users")
            await_spans(6 + 5, gateway.server_port)
            spans = spans_of(gateway.server_port)
        rejected = [span for span in spans if span["tags"].get("error") == "breaker"]
        self.assertTrue(rejected, "no span has the error breaker")
        for span in rejected:
            self.assertEqual((span["kind"], span["remoteEndpoint"]["serviceName"]),
                             ("CLIENT", "users"), span)
            self.assertNotIn("server", span["tags"], span)
        refused = [span for span in spans if span["tags"].get("error") == "refused"]
        self.assertEqual({span["tags"]["server"] for span in refused}, {NOBODY})

    def test_an_error_of_the_client_is_no_failure(self):
        with running(Users) as users:
            ask(users.server_port, "GET", "/users/999")
            [span] = await_spans(1, users.server_port)
        self.assertEqual(span["tags"]["http.status_code"], "404")
        self.assertNotIn("error", span["tags"])


class BackgroundTest(unittest.TestCase):
    def test_work_in_the_background_is_a_trace_of_its_own_that_names_its_order(self):
        with running_moody_shop() as (shop, users, products):
            products.mood = "lossy"
            self.assertEqual(shop.ask("POST", "/orders", BOUGHT).status, 202)
            products.mood = "well"
            wait_until(lambda: shop.status(203) == "confirmed", "order 203 to be confirmed")
            port = shop.orders.server_port
            wait_until(lambda: [span for span in spans_of(port) if "kind" not in span],
                       "a span of the work in the background")
            spans = spans_of(port)
            placed = next(span for span in spans if span["name"] == "post /orders")
            resumed = [span for span in spans if "kind" not in span][-1]
            calls = [span for span in spans if span.get("parentId") == resumed["id"]]
        self.assertEqual((resumed["name"], resumed["tags"]["order"], resumed.get("parentId")),
                         ("resume order", "203", None))
        self.assertNotEqual(resumed["traceId"], placed["traceId"])
        self.assertEqual([one["value"] for one in resumed["annotations"]],
                         ["pending -> confirmed"])
        self.assertEqual({span["remoteEndpoint"]["serviceName"] for span in calls},
                         {"users", "products"})
        self.assertEqual({span["traceId"] for span in calls}, {resumed["traceId"]})


    def test_work_in_the_background_that_fails_has_the_tag(self):
        with (mock.patch.object(Saga, "advance", side_effect=RuntimeError("a bug")),
              running(Orders) as service):
            add_order(service.database, {**BOUGHT, "quantity": 1}, None)
            service.database.write("UPDATE orders SET due = 0 WHERE status = 'pending'")
            wait_until(lambda: spans_of(service.server_port), "a span of the work")
            span = spans_of(service.server_port)[0]
        self.assertEqual((span["name"], span["tags"].get("error")), ("resume order", "failed"))


class KeptTest(unittest.TestCase):
    """Which spans a process keeps, and how much of what a client sends."""

    def send(self, port: int, count: int, headers: str = "") -> None:
        """Send requests on one connection."""
        self.assertEqual(len(exchange(port, (GET + f"{headers}\r\n".encode()) * count)), count)

    def test_those_that_failed_are_kept_when_many_others_follow(self):
        failing = mock.patch("microshop.users.find_users", side_effect=RuntimeError)
        with running(Users) as users:
            with failing:
                self.send(users.server_port, SLOWEST + 10)  # some of them may be kept as slow
            self.send(users.server_port, 1000)
            wait_until(lambda: len(spans_of(users.server_port)) > 500, "spans")
            spans = spans_of(users.server_port)
        failed = [span for span in spans if span["tags"].get("error") == "500"]
        self.assertEqual(len(failed), SLOWEST + 10)
        self.assertLessEqual(len(spans), KEPT)

    def test_without_the_sampled_flag_only_the_slowest_and_the_failed_are_kept(self):
        failing = mock.patch("microshop.users.find_users", side_effect=RuntimeError)
        unsampled = f"traceparent: 00-{TRACE_ID}-{PARENT_ID}-00\r\n"
        with running(Users) as users:
            with failing:
                self.send(users.server_port, 3, unsampled)
            self.send(users.server_port, 200, unsampled)
            spans = await_spans(3, users.server_port)
            self.send(users.server_port, 1)  # when it is there, the others have been counted
            wait_until(lambda: any(span["traceId"] != TRACE_ID
                                   for span in spans_of(users.server_port)), "the last span")
            spans = spans_of(users.server_port, TRACE_ID)
        self.assertLessEqual(len(spans), SLOWEST + 3)
        self.assertEqual(sum("error" in span["tags"] for span in spans), 3)

    def test_the_newest_come_last(self):
        with running(Users) as users:
            self.send(users.server_port, 600)
            ask(users.server_port, "GET", "/users/1")
            wait_until(lambda: spans_of(users.server_port)[-1]["name"] == "get /users/{id}",
                       "the newest span at the end of the list")

    def test_a_path_is_cut_and_stays_text(self):
        path = '/users/"<img/src=x/onerror=alert(1)>\\\'' + "x" * 4000
        with running(Users) as users:
            ask(users.server_port, "GET", path)
            [span] = await_spans(1, users.server_port)
        self.assertEqual(span["tags"]["http.path"], path[:CUT])
        self.assertEqual(span["name"], "get")

    def test_nothing_that_a_client_sends_makes_a_span_large(self):
        long = {"traceparent": TRACEPARENT, "tracestate": "a=" + "x" * 4000,
                "X-Request-Id": "x" * 4000, "User-Agent": "x" * 4000}
        with running(Users) as users, running(Gateway, users_url=[users.url]) as gateway:
            ask(gateway.server_port, "B" * 4000, "/users", long)
            ask(gateway.server_port, "GET", "/nowhere/" + "x" * 4000, long)
            ask(gateway.server_port, "GET", "/users/" + "x" * 4000, long)
            exchange(gateway.server_port, b"\x16\x03" * 2000 + b"\r\n\r\n")
            spans = await_spans(6, gateway.server_port) + await_spans(2, users.server_port)
        for span in spans:
            for name, text in [("name", span["name"]), *span["tags"].items()]:
                self.assertLessEqual(len(text), CUT, f"{name} of a span: {text[:50]}...")

    def test_a_request_id_of_the_client_can_be_searched_for(self):
        with running(Users) as users:
            given = ask(users.server_port, "GET", "/users", {"X-Request-Id": "lesson-7"})
            own = ask(users.server_port, "GET", "/users")
            spans = await_spans(2, users.server_port)
        self.assertEqual([span["tags"]["request.id"] for span in spans],
                         [given.headers["x-request-id"], own.headers["x-request-id"]])

    def test_spans_are_json_for_zipkin(self):
        with running(Users) as users:
            answer = ask(users.server_port, "GET", "/traces")
        self.assertEqual((answer.status, answer.headers["content-type"], answer.body),
                         (200, "application/json; charset=utf-8", b"[]"))


if __name__ == "__main__":
    unittest.main()
