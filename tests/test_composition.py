"""Composition: orders with their user and product inside, and what is said where one of them is not to be had."""
import json
import socket
import threading
import unittest
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

from microshop.gateway import Gateway
from tests.helpers import NOBODY, PATIENCE, Answered, ask, read_request, running, running_shop, upstream

ORDER = {"id": 201, "userId": 1, "productId": 101, "quantity": 1, "status": "confirmed"}
ALICE, BOB = {"id": 1, "name": "Alice"}, {"id": 2, "name": "Bob"}
LAPTOP, MOUSE = {"id": 101, "name": "Laptop"}, {"id": 102, "name": "Mouse"}


class Stub:
    """A service whose answer, JSON or bytes, is made from each target; it keeps the targets and the heads."""

    def __init__(self, answer: Callable[[str], Any]):
        self.answer = answer
        self.targets: list[str] = []
        self.heads: list[str] = []

    def __call__(self, connection: socket.socket) -> None:
        while request := read_request(connection):
            self.targets.append(target := request.split()[1].decode())
            self.heads.append(request.decode().lower())
            answer = self.answer(target)
            if not isinstance(answer, bytes):
                body = json.dumps(answer).encode()
                answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            connection.sendall(answer)


def ids_of(target: str) -> list[int]:
    return [int(text) for text in parse_qs(urlsplit(target).query)["ids"][0].split(",")]


def people(target: str) -> list[dict]:
    """Answer as users does, where all there is are numbers up to 9,000."""
    return [{"id": number, "name": f"User {number}"} for number in ids_of(target) if number <= 9000]


def things(target: str) -> list[dict]:
    return [{"id": number, "name": f"Thing {number}"} for number in ids_of(target)]


class CompositionTest(unittest.TestCase):
    def open(self, orders: Any, users: Callable = people, products: Callable = things, **settings: Any) -> None:
        """Open a gateway before stubs; orders answers what is given, whatever it is asked."""
        self.orders, self.users, self.products = Stub(lambda _: orders), Stub(users), Stub(products)
        urls = {f"{name}_url": [self.enterContext(upstream(stub))] for name, stub in
                (("orders", self.orders), ("users", self.users), ("products", self.products))}
        self.gateway = self.enterContext(running(Gateway, **{**urls, **settings}))

    def ask(self, target: str, method: str = "GET", **headers: str) -> Answered:
        return ask(self.gateway.server_port, method, target,
                   {name.replace("_", "-"): value for name, value in headers.items()})


class RealShop(CompositionTest):
    def setUp(self) -> None:
        self.shop = self.enterContext(running_shop())
        urls = {f"{name}_url": [getattr(self.shop, name).url] for name in ("users", "products", "orders")}
        self.gateway = self.enterContext(running(Gateway, **urls))

    def test_an_order_has_what_is_asked_for_inside(self):
        for expand, inside in (("user,product", {"user": ALICE, "product": LAPTOP}), ("user", {"user": ALICE}),
                               ("product", {"product": LAPTOP}),
                               ("product,user,user", {"product": LAPTOP, "user": ALICE})):
            answer = self.ask(f"/orders/201?expand={expand}")
            self.assertEqual((answer.status, answer.json), (200, {**ORDER, **inside}))
            self.assertEqual(answer.headers["x-complete"], f"{len(inside)}/{len(inside)}")
            self.assertEqual(answer.headers["content-type"], "application/json; charset=utf-8")

    def test_so_has_each_of_a_page(self):
        answer = self.ask("/orders?expand=user%2Cproduct")
        self.assertEqual(answer.json, [
            {"id": 201, "userId": 1, "productId": 101, "user": ALICE, "product": LAPTOP},
            {"id": 202, "userId": 2, "productId": 102, "user": BOB, "product": MOUSE}])
        self.assertEqual(answer.headers["x-complete"], "4/4")

    def test_a_page_links_to_the_next_with_the_same_inside(self):
        answer = self.ask("/orders?limit=1&expand=user")
        self.assertEqual(answer.headers["link"], '</orders?limit=1&expand=user&after=201>; rel="next"')
        self.assertEqual(self.ask("/orders?limit=1&expand=user&after=201").json[0]["user"], BOB)

    def test_head_is_get_without_its_body(self):
        get, head = self.ask("/orders?expand=user"), self.ask("/orders?expand=user", "HEAD")
        self.assertEqual((head.status, head.body), (200, b""))
        for name in ("x-complete", "etag", "content-length", "content-type"):
            self.assertEqual(head.headers[name], get.headers[name])

    def test_what_the_client_knows_already_is_compared_with_the_whole(self):
        plain, whole = self.ask("/orders/201"), self.ask("/orders/201?expand=user")
        self.assertEqual(self.ask("/orders/201?expand=user", If_None_Match=plain.headers["etag"]).status, 200)
        self.assertEqual(self.ask("/orders/201?expand=user", If_None_Match=whole.headers["etag"]).status, 304)
        self.shop.ask("PUT", "/users/1", {"name": "Alicia"})
        again = self.ask("/orders/201?expand=user", If_None_Match=whole.headers["etag"])
        self.assertEqual((again.status, again.json["user"]["name"]), (200, "Alicia"))

    def test_a_row_that_is_gone_is_missing(self):
        self.shop.ask("DELETE", "/users/2")
        gone = [{"service": "users", "status": 404, "detail": "there is no user 2"}]
        answer = self.ask("/orders?expand=user,product")
        self.assertEqual(answer.json, [
            {"id": 201, "userId": 1, "productId": 101, "user": ALICE, "product": LAPTOP},
            {"id": 202, "userId": 2, "productId": 102, "user": None, "product": MOUSE, "missing": gone}])
        self.assertEqual(answer.headers["x-complete"], "3/4")
        self.assertEqual(self.ask("/orders/202?expand=user").json["missing"], gone)

    def test_what_orders_says_is_passed_on(self):
        for target, status in (("/orders/999?expand=user", 404), ("/orders?limit=0&expand=user", 400),
                               ("/orders/201/cancel?expand=user", 405), ("/orders/x?expand=user", 404)):
            answer = self.ask(target)
            self.assertEqual((answer.status, answer.json["status"]), (status, status))
            self.assertNotIn("x-complete", answer.headers)

    def test_what_cannot_be_inside_is_refused_by_its_name(self):
        for expand, named in (("users", "'users'"), ("user,stock", "'stock'"), ("", "''"), ("user,", "''"),
                              ("User", "'User'"), ("userId", "'userId'")):
            answer = self.ask(f"/orders?expand={expand}")
            self.assertEqual(answer.status, 400)
            self.assertEqual(answer.json["detail"], f"expand: {named} is none of user, product")
        self.assertEqual(self.ask("/orders?expand=user&expand=product").status, 400)

    def test_elsewhere_it_is_a_parameter_that_nobody_knows(self):
        self.assertEqual(self.ask("/users?expand=orders").json, [ALICE, BOB])


class Calls(CompositionTest):
    def test_each_service_is_called_once_however_many_orders_there_are(self):
        for count in (1, 7, 100):
            self.open([{"id": n, "userId": n % 50 + 1, "productId": n} for n in range(1, count + 1)])
            answer = self.ask("/orders?expand=user,product")
            self.assertEqual(answer.headers["x-complete"], f"{2 * count}/{2 * count}")
            self.assertEqual([len(stub.targets) for stub in (self.orders, self.users, self.products)], [1, 1, 1])
            for order in answer.json:
                self.assertEqual(order["user"], {"id": order["userId"], "name": f"User {order['userId']}"})
                self.assertEqual(order["product"], {"id": order["id"], "name": f"Thing {order['id']}"})

    def test_who_is_not_asked_for_is_not_called(self):
        self.open([ORDER])
        self.ask("/orders?expand=user")
        self.assertEqual(self.products.targets, [])

    def test_what_is_no_read_is_passed_on(self):
        self.open({"id": 203})
        self.assertEqual(self.ask("/orders?expand=user", "POST").body, b'{"id": 203}')
        self.assertEqual(self.users.targets, [])

    def test_no_order_needs_no_call(self):
        self.open([])
        answer = self.ask("/orders?expand=user,product")
        self.assertEqual((answer.json, answer.headers["x-complete"]), ([], "0/0"))
        self.assertEqual(self.users.targets + self.products.targets, [])

    def test_long_lists_are_split_at_a_hundred_and_nobody_is_asked_for_twice(self):
        self.open([{"id": n, "userId": n % 250 + 1, "productId": 7} for n in range(1, 1001)])
        answer = self.ask("/orders?expand=user,product")
        self.assertEqual(answer.headers["x-complete"], "2000/2000")
        asked_for = [ids_of(target) for target in self.users.targets]
        self.assertEqual(sorted(map(len, asked_for)), [50, 100, 100])
        self.assertCountEqual(sum(asked_for, []), range(1, 251))
        self.assertEqual(self.products.targets, ["/products?ids=7"])

    def test_the_calls_run_side_by_side(self):
        together = threading.Barrier(5)

        def wait_and(answer: Callable[[str], list]) -> Callable[[str], list]:
            def wait(target: str) -> list:
                together.wait(PATIENCE)  # none answers before all have been called
                return answer(target)
            return wait
        self.open([{"id": n, "userId": n, "productId": n} for n in range(1, 201)] + [
                   {"id": 201, "userId": 201, "productId": 1}], wait_and(people), wait_and(things))
        self.assertEqual(self.ask("/orders?expand=user,product").headers["x-complete"], "402/402")

    def test_all_calls_are_one_trace_under_one_id(self):
        self.open([ORDER])
        request_id = self.ask("/orders?expand=user,product").headers["x-request-id"]
        heads = self.orders.heads + self.users.heads + self.products.heads
        self.assertEqual([head.count(f"\r\nx-request-id: {request_id}\r\n") for head in heads], [1, 1, 1])
        traces = {line for head in heads for line in head.split("\r\n") if line.startswith("traceparent: ")}
        self.assertEqual(len(traces), 1)

    def test_conditions_on_the_whole_are_not_for_the_parts(self):
        self.open([ORDER])
        self.ask("/orders?expand=user", If_None_Match='"a"', If_Modified_Since="x", Range="bytes=0-1", X_Kept="1")
        self.assertIn("\r\nx-kept: 1\r\n", self.orders.heads[0])
        for name in ("if-none-match", "if-modified-since", "range"):
            self.assertNotIn(f"\r\n{name}: ", self.orders.heads[0] + self.users.heads[0])


class Missing(CompositionTest):
    """Never silent, never fatal."""

    def assert_missing(self, status: int, detail: str) -> None:
        answer = self.ask("/orders/201?expand=user,product")
        self.assertEqual(answer.status, 200)
        order = answer.json
        self.assertEqual((order["user"], order["product"]), (None, {"id": 101, "name": "Thing 101"}))
        [missing] = order["missing"]
        self.assertEqual((missing["service"], missing["status"]), ("users", status))
        self.assertRegex(missing["detail"], detail)
        self.assertEqual(answer.headers["x-complete"], "1/2")

    def test_a_part_whose_service_is_away_fails_or_makes_no_sense(self):
        problem = b'{"detail": "no"}'
        for what, status, detail in (
                (lambda _: b"SSH-2.0\r\n\r\n", 502, "not valid HTTP"), (lambda _: {"users": []}, 502, "no sense"),
                (lambda _: [{"name": "Alice"}], 502, "no sense"), (lambda _: [1], 502, "no sense"),
                (lambda _: None, 502, "no sense"), (lambda _: [{"id": "1"}], 502, "no sense"),
                *[(lambda _, body=body: b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body),
                   502, "no sense") for body in (b"[\xff", b'[{"id":1,"x":NaN}]', b'[{"id":1,"x":-Infinity}]',
                                                b'[{"id":1,"x":1e999}]', b'[{"id":1,"x":"\\udc00"}]',
                                                b"\xef\xbb\xbf[]", b"[" * 100_000, "[]".encode("utf-16"))],
                (lambda _: b"HTTP/1.1 500 No\r\nContent-Length: %d\r\n\r\n%s" % (len(problem), problem), 500, "^no$"),
                *[(lambda _, body=body: b"HTTP/1.1 500 No\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body),
                   500, "the answer was 500") for body in (b'{"detail":""}', b'{"detail":null}', b"[]", b"{")],
                (lambda _: b"HTTP/1.1 400 No\r\nContent-Length: 0\r\n\r\n", 400, "the answer was 400")):
            with self.subTest(what(""), status=status):
                self.open(ORDER, what)
                self.assert_missing(status, detail)
        self.open(ORDER, users_url=[NOBODY])
        self.assert_missing(502, "out of reach")

    def test_a_part_whose_service_is_late(self):
        over = threading.Event()
        self.addCleanup(over.set)

        def hang(target: str) -> list[dict]:
            over.wait(PATIENCE)
            return people(target)
        self.open(ORDER, hang, timeout=0.3)
        self.assert_missing(504, "did not answer in time")

    def test_a_part_whose_service_is_spared(self):
        self.open(ORDER, lambda _: b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")
        for _ in range(5):
            self.assert_missing(500, "the answer was 500")
        self.assert_missing(503, "is not asked")
        self.assertEqual(len(self.users.targets), 5)

    def test_all_that_is_missing_is_told(self):
        self.open([ORDER, {**ORDER, "id": 202}], users_url=[NOBODY], products_url=[NOBODY])
        answer = self.ask("/orders?expand=product,user")
        self.assertEqual(answer.headers["x-complete"], "0/4")
        for order in answer.json:
            self.assertEqual([missing["service"] for missing in order["missing"]], ["products", "users"])

    def test_only_those_of_a_page_that_could_not_be_had(self):
        def half(target: str) -> Any:
            return people(target) if 1 in ids_of(target) else b"SSH-2.0\r\n\r\n"
        self.open([{"id": n, "userId": n, "productId": n} for n in range(1, 151)], half)
        answer = self.ask("/orders?expand=user,product")
        self.assertEqual(answer.headers["x-complete"], "250/300")
        for order in answer.json:
            self.assertEqual("missing" in order, order["id"] > 100)
            self.assertEqual(order["user"] is None, order["id"] > 100)
            self.assertIsNotNone(order["product"])

    def test_what_a_service_adds_is_passed_on(self):
        more = {"price": 9.99, "note": "\x07 \N{SNOWMAN}", "big": 1e300}
        self.open(ORDER, lambda _: [{**ALICE, **more}])
        self.assertEqual(self.ask("/orders/201?expand=user").json["user"], {**ALICE, **more})

    def test_a_page_is_a_page_whatever_its_white_space(self):
        for body, expected in ((b" []", []), (b"\n [\t]", []), (b"\r\n{\"id\":1,\"userId\":1}", None)):
            self.open(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            answer = self.ask("/orders?expand=user").json
            self.assertEqual(answer, expected if expected is not None else {
                "id": 1, "userId": 1, "user": {"id": 1, "name": "User 1"}})

    def test_without_orders_there_is_nothing_to_put_together(self):
        for orders in ([{"id": 201}], {"orders": []}, 7, b"SSH-2.0\r\n\r\n"):
            self.open(orders)
            answer = self.ask("/orders?expand=user")
            self.assertEqual((answer.status, answer.json["service"]), (502, "orders"), answer.body)
        self.assertEqual(self.users.targets, [])


if __name__ == "__main__":
    unittest.main()
