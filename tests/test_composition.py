"""API composition: orders that contain their user and product, or say why one is missing."""
import json
import re
import socket
import threading
import unittest
from collections.abc import Callable
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, urlsplit

from microshop.chassis.resilience import CircuitBreaker
from microshop.gateway import Gateway
from tests.helpers import (
    NOBODY, PATIENCE, Answered, ask, read_request, running, running_shop, upstream)

ORDER = {"id": 201, "userId": 1, "productId": 101, "quantity": 1, "status": "confirmed"}
ALICE, BOB = {"id": 1, "name": "Alice"}, {"id": 2, "name": "Bob"}
LAPTOP, MOUSE = {"id": 101, "name": "Laptop"}, {"id": 102, "name": "Mouse"}


def response(body: bytes, status: int = 200) -> bytes:
    return b"HTTP/1.1 %d Phrase\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


class Stub:
    """A service whose response, a JSON value or bytes, is made from each target."""

    def __init__(self, respond: Callable[[str], Any]):
        self.respond = respond
        self.targets: list[str] = []  # of the requests that came
        self.heads: list[str] = []    # likewise, in lower case

    def __call__(self, connection: socket.socket) -> None:
        while request := read_request(connection):
            target = request.split()[1].decode()
            self.targets.append(target)
            self.heads.append(request.decode().lower())
            answer = self.respond(target)
            if not isinstance(answer, bytes):
                answer = response(json.dumps(answer).encode())
            connection.sendall(answer)


def always(answer: Any) -> Callable[[str], Any]:
    """Return a function for a Stub that gives the same answer to every request."""
    return lambda target: answer


def ids_of(target: str) -> list[int]:
    return [int(text) for text in parse_qs(urlsplit(target).query)["ids"][0].split(",")]


def people(target: str) -> list[dict]:
    """Answer as the users service does, if there are users 1 to 9,000."""
    return [{"id": number, "name": f"User {number}"} for number in ids_of(target) if number <= 9000]


def things(target: str) -> list[dict]:
    """Answer as the products service does, if every product exists."""
    return [{"id": number, "name": f"Thing {number}"} for number in ids_of(target)]


class CompositionTest(unittest.TestCase):
    def open(self, orders: Any, users: Callable = people, products: Callable = things,
             **settings: Any) -> None:
        """Start a gateway in front of stubs; that of orders gives the same answer to everything."""
        stubs = {"users": Stub(users), "products": Stub(products), "orders": Stub(always(orders))}
        self.users, self.products, self.orders = stubs.values()
        urls = {f"{name}_url": [self.enterContext(upstream(stub))] for name, stub in stubs.items()}
        self.gateway = self.enterContext(running(Gateway, **{**urls, **settings}))

    def ask(self, target: str, method: str = "GET", **headers: str) -> Answered:
        """Send a request to the gateway; Some_Header="x" becomes the header Some-Header."""
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        return ask(self.gateway.server_port, method, target, fields)


class RealShopTest(CompositionTest):
    def setUp(self) -> None:
        self.shop = self.enterContext(running_shop())
        urls = {f"{name}_url": [service.url] for name, service in self.shop._asdict().items()}
        self.gateway = self.enterContext(running(Gateway, **urls))

    def test_an_order_contains_the_expansions_that_the_query_names(self):
        for expand, inside in (("user,product", {"user": ALICE, "product": LAPTOP}),
                               ("user", {"user": ALICE}),
                               ("product", {"product": LAPTOP}),
                               ("product,user,user", {"product": LAPTOP, "user": ALICE})):
            with self.subTest(expand):
                answer = self.ask(f"/orders/201?expand={expand}")
                self.assertEqual((answer.status, answer.json), (200, {**ORDER, **inside}))
                self.assertEqual(answer.headers["x-complete"], f"{len(inside)}/{len(inside)}")
                self.assertEqual(answer.headers["content-type"], "application/json; charset=utf-8")

    def test_each_order_of_a_page_contains_its_expansions(self):
        answer = self.ask("/orders?expand=user%2Cproduct")
        self.assertEqual(answer.json, [
            {"id": 201, "userId": 1, "productId": 101, "user": ALICE, "product": LAPTOP},
            {"id": 202, "userId": 2, "productId": 102, "user": BOB, "product": MOUSE}])
        self.assertEqual(answer.headers["x-complete"], "4/4")

    def test_the_link_to_the_next_page_keeps_the_expansions(self):
        answer = self.ask("/orders?limit=1&expand=user")
        link = '</orders?limit=1&expand=user&after=201>; rel="next"'
        self.assertEqual(answer.headers["link"], link)
        self.assertEqual(self.ask("/orders?limit=1&expand=user&after=201").json[0]["user"], BOB)

    def test_head_has_the_headers_of_get_and_no_body(self):
        get = self.ask("/orders?expand=user")
        head = self.ask("/orders?expand=user", "HEAD")
        self.assertEqual((head.status, head.body), (200, b""))
        for name in ("x-complete", "etag", "content-length", "content-type"):
            self.assertEqual(head.headers[name], get.headers[name], name)

    def test_conditional_requests_apply_to_the_composed_response(self):
        plain, composed = self.ask("/orders/201"), self.ask("/orders/201?expand=user")

        def ask_again(known: Answered) -> Answered:
            return self.ask("/orders/201?expand=user", If_None_Match=known.headers["etag"])

        self.assertEqual(ask_again(plain).status, 200, "the ETag of the order alone must not match")
        self.assertEqual(ask_again(composed).status, 304)
        self.shop.ask("PUT", "/users/1", {"name": "Alicia"})
        changed = ask_again(composed)
        self.assertEqual((changed.status, changed.json["user"]["name"]), (200, "Alicia"),
                         "the order is the same, but its user has changed")

    def test_a_deleted_user_is_missing(self):
        self.shop.ask("DELETE", "/users/2")
        gone = [{"service": "users", "status": 404, "detail": "there is no user 2"}]
        answer = self.ask("/orders?expand=user,product")
        second = {"id": 202, "userId": 2, "productId": 102, "user": None, "product": MOUSE}
        self.assertEqual(answer.json, [
            {"id": 201, "userId": 1, "productId": 101, "user": ALICE, "product": LAPTOP},
            {**second, "missing": gone}])
        self.assertEqual(answer.headers["x-complete"], "3/4")
        self.assertEqual(self.ask("/orders/202?expand=user").json["missing"], gone)

    def test_an_error_of_the_orders_service_is_passed_on(self):
        for target, status in (("/orders/999?expand=user", 404),
                               ("/orders?limit=0&expand=user", 400),
                               ("/orders/201/cancel?expand=user", 405),
                               ("/orders/x?expand=user", 404)):
            with self.subTest(target):
                answer = self.ask(target)
                self.assertEqual((answer.status, answer.json["status"]), (status, status))
                self.assertNotIn("x-complete", answer.headers)

    def test_an_unknown_expansion_is_rejected_by_name(self):
        for expand, unknown in (("users", "'users'"), ("user,stock", "'stock'"), ("", "''"),
                                ("user,", "''"), ("User", "'User'"), ("userId", "'userId'")):
            with self.subTest(expand):
                answer = self.ask(f"/orders?expand={expand}")
                self.assertEqual(answer.status, 400)
                self.assertEqual(answer.json["detail"],
                                 f"expand: {unknown} is not one of user, product")
        self.assertEqual(self.ask("/orders?expand=user&expand=product").status, 400)

    def test_a_service_without_expansions_ignores_the_parameter(self):
        self.assertEqual(self.ask("/users?expand=orders").json, [ALICE, BOB])


class CallTest(CompositionTest):
    def test_each_service_is_called_once_for_up_to_a_hundred_orders(self):
        for count in (1, 7, 100):
            with self.subTest(count):
                self.open([{"id": n, "userId": n % 50 + 1, "productId": n}
                           for n in range(1, count + 1)])
                answer = self.ask("/orders?expand=user,product")
                self.assertEqual(answer.headers["x-complete"], f"{2 * count}/{2 * count}")
                calls = [len(stub.targets) for stub in (self.orders, self.users, self.products)]
                self.assertEqual(calls, [1, 1, 1], "calls to orders, users and products")
                for order in answer.json:
                    user, product = order["userId"], order["id"]
                    self.assertEqual(order["user"], {"id": user, "name": f"User {user}"})
                    self.assertEqual(order["product"], {"id": product, "name": f"Thing {product}"})

    def test_a_service_whose_expansion_is_not_named_is_not_called(self):
        self.open([ORDER])
        self.ask("/orders?expand=user")
        self.assertEqual(self.products.targets, [])

    def test_a_write_is_forwarded_without_composition(self):
        self.open({"id": 203})
        self.assertEqual(self.ask("/orders?expand=user", "POST").body, b'{"id": 203}')
        self.assertEqual(self.users.targets, [])

    def test_a_page_without_orders_needs_no_further_call(self):
        self.open([])
        answer = self.ask("/orders?expand=user,product")
        self.assertEqual((answer.json, answer.headers["x-complete"]), ([], "0/0"))
        self.assertEqual(self.users.targets + self.products.targets, [])

    def test_ids_are_fetched_once_each_and_a_hundred_with_each_request(self):
        self.open([{"id": n, "userId": n % 250 + 1, "productId": 7} for n in range(1, 1001)])
        answer = self.ask("/orders?expand=user,product")
        self.assertEqual(answer.headers["x-complete"], "2000/2000")
        batches = [ids_of(target) for target in self.users.targets]
        self.assertEqual(sorted(map(len, batches)), [50, 100, 100])
        self.assertCountEqual(sum(batches, []), range(1, 251))
        self.assertEqual(self.products.targets, ["/products?ids=7"])

    def test_services_are_called_in_parallel(self):
        all_have_been_called = threading.Barrier(5)

        def wait_and(respond: Callable[[str], list]) -> Callable[[str], list]:
            def wait(target: str) -> list:
                all_have_been_called.wait(PATIENCE)
                return respond(target)
            return wait

        orders = [{"id": n, "userId": n, "productId": n} for n in range(1, 201)]
        orders.append({"id": 201, "userId": 201, "productId": 1})
        self.open(orders, wait_and(people), wait_and(things), timeout=2 * PATIENCE)
        self.assertEqual(self.ask("/orders?expand=user,product").headers["x-complete"], "402/402",
                         "3 requests to users and 2 to products must be in flight together")

    def test_all_calls_have_the_same_trace_and_correlation_id(self):
        self.open([ORDER])
        request_id = self.ask("/orders?expand=user,product").headers["x-request-id"]
        heads = self.orders.heads + self.users.heads + self.products.heads
        counts = [head.count(f"\r\nx-request-id: {request_id}\r\n") for head in heads]
        self.assertEqual(counts, [1, 1, 1], f"the client's answer has X-Request-Id: {request_id}. "
                         "How many calls to orders, to users, to products carried it?")
        parents = [re.search("traceparent: 00-(.{32})-(.{16})-01\r", head) for head in heads]
        self.assertEqual(len({match[1] for match in parents}), 1, "traces")
        self.assertEqual(len({match[2] for match in parents}), 3, "spans, one for each call")

    def test_headers_about_the_composed_response_are_not_forwarded(self):
        self.open([ORDER])
        self.ask("/orders?expand=user", If_None_Match='"a"', If_Modified_Since="x",
                 Range="bytes=0-1", Accept_Encoding="gzip", X_Kept="1")
        self.assertIn("\r\nx-kept: 1\r\n", self.orders.heads[0])
        for name in ("if-none-match", "if-modified-since", "range", "accept-encoding"):
            self.assertNotIn(f"\r\n{name}: ", self.orders.heads[0] + self.users.heads[0])


class MissingTest(CompositionTest):
    """If a call fails, the order still comes, and says what is missing and why."""

    def assert_user_is_missing(self, status: int, detail: str) -> None:
        target = "/orders/201?expand=user,product"
        answer = self.ask(target)
        self.assertEqual(answer.status, 200, f"GET {target}, of which only the user cannot be "
                         f"fetched, was answered with {answer.body}")
        order = answer.json
        self.assertEqual(order["user"], None)
        self.assertEqual(order["product"], {"id": 101, "name": "Thing 101"})
        [missing] = order["missing"]
        self.assertEqual((missing["service"], missing["status"]), ("users", status))
        self.assertRegex(missing["detail"], detail)
        self.assertEqual(answer.headers["x-complete"], "1/2")

    def test_a_user_is_missing_if_the_response_is_invalid(self):
        texts = (b"[\xff", b'[{"id":1,"x":NaN}]', b'[{"id":1,"x":-Infinity}]',
                 b'[{"id":1,"x":1e999}]', b'[{"id":1,"x":"\\udc00"}]', b"\xef\xbb\xbf[]",
                 b"[" * 100_000, "[]".encode("utf-16"))
        values = ({"users": []}, [{"name": "Alice"}], [1], None, [{"id": "1"}])
        for answer in (*values, *map(response, texts)):
            with self.subTest(str(answer)[:100]):
                self.open(ORDER, always(answer))
                self.assert_user_is_missing(502, "^the users service returned an invalid response$")

    def test_a_user_is_missing_if_the_response_is_not_http(self):
        self.open(ORDER, always(b"SSH-2.0\r\n\r\n"))
        self.assert_user_is_missing(502, "a response that cannot be used")

    def test_a_user_is_missing_if_the_response_is_an_error_whose_detail_is_repeated(self):
        self.open(ORDER, always(response(b'{"detail": "no"}', 500)))
        self.assert_user_is_missing(500, "^no$")
        for body, status in ((b'{"detail":""}', 500), (b'{"detail":null}', 500), (b"[]", 500),
                             (b"{", 500), (b"", 400)):
            with self.subTest(body):
                self.open(ORDER, always(response(body, status)))
                self.assert_user_is_missing(status, f"^the response status was {status}$")

    def test_a_user_is_missing_if_the_service_cannot_be_reached(self):
        self.open(ORDER, users_url=[NOBODY])
        self.assert_user_is_missing(502, "cannot be reached")

    def test_a_user_is_missing_if_the_service_does_not_respond_in_time(self):
        over = threading.Event()
        self.addCleanup(over.set)

        def hang_the_second_time(target: str) -> list[dict]:
            if len(self.users.targets) > 1:
                over.wait(PATIENCE)
            return people(target)

        self.open(ORDER, hang_the_second_time)
        self.ask("/orders/201?expand=user,product")  # so that connections are open already
        self.gateway.settings.timeout = 1.0  # the stubs of orders and products need a millisecond
        self.assert_user_is_missing(504, "did not respond in time")

    def test_a_user_is_missing_while_the_circuit_breaker_is_open(self):
        self.enterContext(mock.patch.object(CircuitBreaker, "FIRST_PAUSE", PATIENCE))
        self.open(ORDER, always(response(b"", 500)))
        for _ in range(5):
            self.assert_user_is_missing(500, "^the response status was 500$")
        self.assert_user_is_missing(503, "its circuit breaker is open")
        self.assertEqual(len(self.users.targets), 5, "the sixth time, users must not be called")

    def test_no_cache_may_store_an_order_without_what_is_missing(self):
        self.open(ORDER, users_url=[NOBODY])
        whole, incomplete = [self.ask(f"/orders/201?expand={name}").headers.get("cache-control")
                             for name in ("product", "user")]
        self.assertEqual((whole, incomplete), ("no-cache", "no-store"))

    def test_everything_that_is_missing_is_listed(self):
        self.open([ORDER, {**ORDER, "id": 202}], users_url=[NOBODY], products_url=[NOBODY])
        answer = self.ask("/orders?expand=product,user")
        self.assertEqual(answer.headers["x-complete"], "0/4")
        for order in answer.json:
            services = [missing["service"] for missing in order["missing"]]
            self.assertEqual(services, ["products", "users"])

    def test_only_the_users_of_the_request_that_failed_are_missing(self):
        def fail_on_the_second_batch(target: str) -> Any:
            return people(target) if 1 in ids_of(target) else b"SSH-2.0\r\n\r\n"

        orders = [{"id": n, "userId": n, "productId": n} for n in range(1, 151)]
        self.open(orders, fail_on_the_second_batch)
        answer = self.ask("/orders?expand=user,product")
        self.assertEqual(answer.headers["x-complete"], "250/300")
        for order in answer.json:
            is_in_second_batch = order["id"] > 100
            self.assertEqual("missing" in order, is_in_second_batch, order)
            self.assertEqual(order["user"] is None, is_in_second_batch, order)
            self.assertIsNotNone(order["product"])

    def test_the_answer_is_502_if_the_response_of_orders_is_invalid(self):
        for orders in ([{"id": 201}], {"orders": []}, 7, b"SSH-2.0\r\n\r\n"):
            with self.subTest(orders):
                self.open(orders)
                answer = self.ask("/orders?expand=user")
                self.assertEqual((answer.status, answer.json["service"]), (502, "orders"))
        self.assertEqual(self.users.targets, [])


class ContentTest(CompositionTest):
    def test_fields_that_a_service_adds_are_passed_on(self):
        more = {"price": 9.99, "note": "\x07 \N{SNOWMAN}", "big": 1e300}
        self.open(ORDER, always([{**ALICE, **more}]))
        self.assertEqual(self.ask("/orders/201?expand=user").json["user"], {**ALICE, **more})

    def test_white_space_before_the_json_does_not_matter(self):
        composed = {"id": 1, "userId": 1, "user": {"id": 1, "name": "User 1"}}
        for body, expected in ((b" []", []), (b"\n [\t]", []),
                               (b"\r\n{\"id\":1,\"userId\":1}", composed)):
            with self.subTest(body):
                self.open(response(body))
                self.assertEqual(self.ask("/orders?expand=user").json, expected)


if __name__ == "__main__":
    unittest.main()
