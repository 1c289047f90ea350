"""The saga of an order, when not all it needs is there, and when it is not alone.

The services are real. Between orders and the others stands a Moody one, or a moment of a call is chosen for something
else to happen. Each shop must pass the audit at its end.
"""
import contextlib
import io
import itertools
import json
import re
import socket
import sqlite3
import tempfile
import threading
import time
import unittest
from functools import partial
from pathlib import Path
from unittest import mock

from microshop import orders
from microshop.chassis import client
from microshop.chassis.database import Database
from microshop.chassis.resilience import CircuitBreaker
from microshop.orders import Orders, Saga
from microshop.products import Products
from microshop.users import Users
from tests.helpers import (
    PATIENCE, Wire, ask, read_request, running, running_moody_shop, running_shop, together, upstream, wait_until)

LAPTOPS = {"userId": 1, "productId": 101, "quantity": 3}
NEVER = 3600.0


def status(number):
    return f"HTTP/1.1 {number} Whatever\r\nContent-Length: 0\r\n\r\n".encode()


UNCERTAIN = {  # what a service may do that tells nothing for certain
    "closes": b"", "silent": "silent", "done, but the answer is lost": "lossy", "fails": status(500),
    "drains": status(503), "misunderstands": status(400), "is moved": status(301), "is overrun": status(429),
    "speaks no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "stops in the middle": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nHalf"}


class SagaTest(unittest.TestCase):
    def setUp(self):
        self.set_times(TAKE_OVER=NEVER, RETRY_FIRST=0.01, RETRY_LAST=0.03, LOOK=0.005)
        self.enterContext(mock.patch.multiple(CircuitBreaker, FIRST_PAUSE=0.01, LAST_PAUSE=0.01))
        self.enterContext(mock.patch.object(client, "BACKOFF", 0.002))

    def set_times(self, **times):
        self.enterContext(mock.patch.multiple(orders, **times))

    def post(self, content=LAPTOPS, **headers):
        return self.shop.ask("POST", "/orders", content, **headers)

    def cancel(self, order=203):
        return self.shop.ask("POST", f"/orders/{order}/cancel")

    def wait_for(self, status, order=203):
        wait_until(lambda: self.shop.status(order) == status)

    def read_row(self, order, column):
        return self.shop.orders.database.rows(f"SELECT {column} AS it FROM orders WHERE id = ?", [order])[0]["it"]

    def advance(self, order):
        """What another worker does: it goes on with an order, as far as that goes."""
        Saga(self.shop.orders, order, {"x-request-id": "another-worker"}).advance()

    def assert_is_to_come(self, answer, status):
        """It is accepted, and its client is told where and when to look again."""
        self.assertEqual((answer.status, answer.json["status"]), (202, status), answer.body)
        self.assertEqual(answer.headers["location"], f"/orders/{answer.json['id']}")
        self.assertRegex(answer.headers["retry-after"], "^[1-9][0-9]*$")


class Deadlines(SagaTest):
    """A request has so much time, and its saga too; what that leaves undone is done in the background."""

    def setUp(self):
        super().setUp()
        self.set_times(LOOK=NEVER)

    def test_a_client_is_told_before_its_patience_ends(self):
        with running_moody_shop() as (self.shop, _, products):
            products.mood = "silent"
            started = time.monotonic()
            self.assert_is_to_come(self.post(X_Request_Timeout="0.5"), "pending")
            self.assertLess(time.monotonic() - started, 0.5)
            self.assertEqual(self.post(X_Request_Timeout="0").status, 503)
            self.assertEqual(self.shop.ask("GET", "/orders/204").status, 404)

    def test_nobody_is_asked_when_the_time_is_spent(self):
        with running_moody_shop() as (self.shop, users, products):
            order, _ = orders.add_order(self.shop.orders.database, LAPTOPS, None)
            Saga(self.shop.orders, order, {"x-request-id": "late"}, deadline=time.monotonic()).advance()
            self.assertEqual((users.calls, products.calls, self.shop.status(order)), ([], [], "pending"))

    def test_when_the_service_ends_only_what_a_client_waits_for_goes_on(self):
        with running_moody_shop() as (self.shop, users, products):
            order, _ = orders.add_order(self.shop.orders.database, LAPTOPS, None)
            self.shop.orders.ending.set()
            self.advance(order)
            self.assertEqual((users.calls, products.calls, self.shop.status(order)), ([], [], "pending"))
            Saga(self.shop.orders, order, {"x-request-id": "a-client"}, deadline=time.monotonic() + PATIENCE).advance()
            self.assertEqual(self.shop.status(order), "confirmed")

    def test_a_book_that_cannot_be_read_is_not_asked_for_again_and_again(self):
        self.set_times(LOOK=0.001, RETRY_LAST=NEVER)
        fault = sqlite3.OperationalError("disk I/O error")
        fault.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
        with (mock.patch.object(orders, "find_due", side_effect=fault) as asked,
              contextlib.redirect_stderr(io.StringIO()) as log, running(Orders) as service):
            wait_until(lambda: asked.called)
            threading.Event().wait(0.05)
            service.log.flush()
        self.assertEqual(log.getvalue().count("disk I/O error"), 1)
        self.assertNotIn("Traceback", log.getvalue())

    def test_what_is_left_of_the_time_is_passed_on(self):
        left = []

        def note_time(connection):
            while request := read_request(connection):
                left.append(float(re.search(rb"(?i)\nx-request-timeout: ([0-9.]+)\r", request)[1]))
                connection.sendall(status(200))
        with upstream(note_time) as url, running(Orders, users_url=[url], products_url=[url]) as service:
            ask(service.server_port, "POST", "/orders", {"Content-Type": "application/json", "X-Request-Timeout": "1"},
                json.dumps(LAPTOPS).encode())
        self.assertEqual(len(left), 2)
        self.assertTrue(0.9 >= left[0] >= left[1] > 0.5, left)


class Uncertain(SagaTest):
    """Silence and failures decide nothing; the saga goes on by itself when they end."""

    def setUp(self):
        super().setUp()
        self.shop, self.users, self.products = self.enterContext(running_moody_shop())

    @contextlib.contextmanager
    def mood(self, service, mood):
        """Let a service be in a mood for a while, until it has been asked again in the background."""
        service.mood = mood
        yield
        enough = len(service.calls) + 2
        wait_until(lambda: len(service.calls) >= enough)
        service.mood = "well"

    @contextlib.contextmanager
    def trying(self, service, what, mood):
        """Put a service in a mood; in the background it meets what was left undone in all the moods before."""
        service.mood = mood
        with self.subTest(what), mock.patch.object(
                self.shop.orders.client, "timeout", 0.05 if mood == "silent" else 2.0):
            yield

    def test_an_order_stays_pending_until_both_services_have_said_yes(self):
        for service, strange in ((self.users, 422), (self.products, 404)):
            before, pending = self.shop.stock(), []
            for what, mood in {**UNCERTAIN, "answers strangely": status(strange), "is dumb": status(204)}.items():
                with self.trying(service, what, mood):
                    answer = self.post()
                    self.assert_is_to_come(answer, "pending")
                    pending.append(answer.json["id"])
            service.mood = "well"
            for order in pending:
                self.wait_for("confirmed", order)
            self.assertEqual(self.shop.stock(), before - 3 * len(pending))

    def test_an_order_stays_in_cancelling_until_products_has_said_yes(self):
        cancelling = []
        for what, mood in {**UNCERTAIN, "knows no reservations": status(404), "refuses": status(409)}.items():
            self.products.mood = "well"
            cancelling.append(order := self.post().json["id"])
            self.wait_for("confirmed", order)
            with self.trying(self.products, what, mood):
                self.assert_is_to_come(self.cancel(order), "cancelling")
                self.assert_is_to_come(self.cancel(order), "cancelling")
        self.products.mood = "well"
        for order in cancelling:
            self.wait_for("cancelled", order)
            self.assertEqual(self.cancel(order).status, 200)
        self.assertEqual(self.shop.stock(), 100)

    def test_a_pending_order_cannot_be_cancelled_but_soon(self):
        with self.mood(self.users, b""):
            self.post()
            answer = self.cancel()
            self.assertEqual((answer.status, answer.headers["retry-after"]), (409, "1"))
            self.assertIn("pending", answer.json["detail"])
            self.assertNotIn("PUT /reservations/203", self.products.calls)
        self.wait_for("confirmed")
        self.assertEqual((self.cancel().status, self.shop.stock()), (200, 100))

    def test_who_cancels_a_pending_order_need_not_wait_for_the_background(self):
        self.set_times(RETRY_FIRST=NEVER, RETRY_LAST=NEVER)
        self.users.mood = b""
        self.assert_is_to_come(self.post(), "pending")
        self.users.mood = "well"
        self.assertEqual((self.cancel().status, self.shop.stock()), (200, 100))

    def test_who_cancels_an_order_just_when_it_is_confirmed_is_never_told_never(self):
        self.set_times(RETRY_FIRST=NEVER, RETRY_LAST=NEVER)
        database = self.shop.orders.database
        for moment in range(6):
            self.users.mood, accesses = b"", itertools.count()
            order = self.post().json["id"]

            def overtaken(access, *arguments, order=order, accesses=accesses, moment=moment):
                if next(accesses) == moment:
                    self.users.mood = "well"
                    self.advance(order)
                return access(*arguments)

            with (self.subTest(f"before access {moment} to the book"),
                  mock.patch.object(database, "rows", partial(overtaken, database.rows)),
                  mock.patch.object(database, "write", partial(overtaken, database.write))):
                answer = self.cancel(order)
                self.assertTrue(answer.status in (200, 202) or "retry-after" in answer.headers, answer)

    def test_who_comes_with_the_key_of_an_order_that_nobody_answered_for_helps_it_on(self):
        order, _ = orders.add_order(self.shop.orders.database, LAPTOPS, "k")
        answer = self.post(Idempotency_Key="k")
        self.assertEqual((answer.status, answer.json["status"]), (201, "confirmed"))
        self.assertEqual((answer.json["id"], answer.headers["idempotency-replayed"]), (order, "true"))

    def test_a_client_is_told_no_at_once_although_the_release_must_wait(self):
        with self.mood(self.products, b""):
            self.assertEqual(self.post({**LAPTOPS, "userId": 9}).status, 422)
            self.assertIsNotNone(self.read_row(203, "due"))
        wait_until(lambda: self.read_row(203, "due") is None)
        late = self.shop.ask("PUT", "/reservations/203", {"productId": 101, "quantity": 3})
        self.assertEqual((late.status, self.shop.stock()), (409, 100))

    def test_an_order_is_decided_by_what_holds_when_it_is(self):
        with self.mood(self.users, b""):
            self.assert_is_to_come(self.post({**LAPTOPS, "userId": 2}), "pending")
            self.assert_is_to_come(self.post({**LAPTOPS, "productId": 102}), "pending")
            self.shop.ask("DELETE", "/users/2")
            self.shop.ask("PUT", "/products/102", {"name": "Mouse", "stock": 2})
        self.wait_for("rejected", 203)
        self.wait_for("rejected", 204)
        reasons = [self.shop.ask("GET", f"/orders/{order}").json["reason"] for order in (203, 204)]
        self.assertEqual(reasons, ["userId: there is no user 2", "product 102 has 2 of 3 units left"])

    def test_what_the_saga_left_undone_it_goes_on_with_after_a_restart_at_once(self):
        self.set_times(RETRY_FIRST=NEVER, RETRY_LAST=NEVER)
        self.post()
        self.products.mood = b""
        self.assert_is_to_come(self.cancel(), "cancelling")
        self.assert_is_to_come(self.post(), "pending")
        self.assertEqual(self.post({**LAPTOPS, "userId": 9}).status, 422)
        self.products.mood = "well"
        with self.shop.with_orders_restarted() as self.shop:
            self.wait_for("cancelled", 203)
            self.wait_for("confirmed", 204)
            wait_until(lambda: self.read_row(205, "due") is None)
        self.assertIn("DELETE /reservations/205", self.products.calls)
        self.assertEqual(self.shop.stock(), 97)

    def test_what_a_request_left_undone_the_background_takes_over(self):
        self.set_times(TAKE_OVER=0.05)
        orders.add_order(self.shop.orders.database, LAPTOPS, None)
        self.wait_for("confirmed")
        orders.move_order(self.shop.orders.database, 203, "cancelling")
        self.wait_for("cancelled")
        self.assertEqual(self.shop.stock(), 100)


class Away(SagaTest):
    def test_an_order_finishes_by_itself_when_the_service_it_waits_for_is_started(self):
        for service, name in ((Users, "users"), (Products, "products")):
            with self.subTest(name), socket.socket() as deaf, contextlib.redirect_stderr(io.StringIO()):
                deaf.bind(("127.0.0.1", 0))
                port = deaf.getsockname()[1]
                with running_shop(**{f"{name}_url": [f"http://127.0.0.1:{port}"]}) as self.shop:
                    self.assert_is_to_come(self.post(), "pending")
                    self.assertEqual((self.shop.status(203), self.shop.stock()), ("pending", 100))
                    deaf.close()
                    with running(service, port=port, data=self.shop.orders.settings.data):
                        self.wait_for("confirmed")
                    self.assertEqual(self.shop.stock(), 97)


class BookTest(unittest.TestCase):
    """The book of orders alone, without any service."""

    def setUp(self):
        folder = self.enterContext(tempfile.TemporaryDirectory())
        self.database = Database(Path(folder) / "orders.db", orders.SCHEMA)
        self.addCleanup(self.database.close)

    def add(self):
        order, _ = orders.add_order(self.database, LAPTOPS, None)
        return orders.find_order(self.database, order)


class Waits(BookTest):
    """How long an order that must wait is left alone, told by a clock that is set by hand."""

    def setUp(self):
        super().setUp()
        self.now = 1000.0
        self.enterContext(mock.patch.object(orders, "time", mock.Mock(time=lambda: self.now)))

    def postpone(self, order):
        """Return how long an order has to wait."""
        orders.postpone_order(self.database, order)
        return round(self.due(order) - self.now, 6)

    def due(self, order):
        return self.database.rows("SELECT due FROM orders WHERE id = ?", [order["id"]])[0]["due"]

    def test_they_grow_from_the_first_to_the_last(self):
        for jitter in (min, max):
            with self.subTest(jitter), mock.patch.object(orders, "random", mock.Mock(uniform=jitter)):
                order, waits = self.add(), []
                for _ in range(30):
                    waits.append(self.postpone(order))
                    self.now += waits[-1]
                for wait in waits:
                    self.assertTrue(orders.RETRY_FIRST / 2 <= wait <= orders.RETRY_LAST, waits)
                self.assertLessEqual(waits[0], 2 * orders.RETRY_FIRST)
                self.assertGreaterEqual(waits[-1], orders.RETRY_LAST / 2)
                for wait, following in itertools.pairwise(waits):
                    self.assertGreaterEqual(following, wait)
                self.assertLess(sum(waits[:10]), 60, "they grow too fast")
                self.assertGreater(sum(waits[:20]), 30, "they grow too slowly")

    def test_they_differ_from_order_to_order(self):
        self.assertEqual(len({self.postpone(self.add()) for _ in range(10)}), 10)

    def test_they_begin_anew_in_each_state(self):
        order = self.add()
        orders.move_order(self.database, order["id"], "confirmed")
        self.now += 500
        orders.move_order(self.database, order["id"], "cancelling")
        self.assertLessEqual(self.postpone({**order, "status": "cancelling"}), 2 * orders.RETRY_FIRST)

    def test_an_order_is_due_when_its_time_has_come(self):
        order = self.add()
        self.assertEqual(orders.find_due(self.database), [])  # the request is at work on it
        self.now += orders.TAKE_OVER
        self.assertEqual(orders.find_due(self.database), [order["id"]])
        self.postpone(order)
        self.assertEqual(orders.find_due(self.database), [])
        self.now = self.due(order)
        self.assertEqual(orders.find_due(self.database), [order["id"]])

    def test_a_worker_that_comes_late_does_not_change_what_another_has_done(self):
        order = self.add()
        orders.move_order(self.database, order["id"], "confirmed")
        orders.postpone_order(self.database, order)
        self.assertIsNone(self.due(order))
        orders.move_order(self.database, order["id"], "cancelling")
        due = self.due(order)
        orders.postpone_order(self.database, order)
        orders.finish_rejected(self.database, order["id"])
        self.assertEqual(self.due(order), due)

    def test_an_order_that_came_to_its_end_is_never_due_again(self):
        order = self.add()
        orders.move_order(self.database, order["id"], "rejected")
        orders.finish_rejected(self.database, order["id"])
        orders.postpone_order(self.database, {**order, "status": "rejected"})
        self.assertIsNone(self.due(order))

    def test_the_order_that_is_due_longest_comes_first(self):
        first, second = self.add(), self.add()
        self.now += orders.TAKE_OVER
        orders.postpone_order(self.database, first)
        self.now += orders.RETRY_LAST
        self.assertEqual(orders.find_due(self.database), [second["id"], first["id"]])


class States(BookTest):
    def test_an_order_moves_only_along_the_arrows(self):
        arrows = {("pending", "confirmed"), ("pending", "rejected"), ("confirmed", "cancelling"),
                  ("cancelling", "cancelled")}
        for before, after in itertools.product(orders.STATES, orders.STATES):
            with self.subTest(f"{before} -> {after}"):
                order = self.add()["id"]
                self.database.write("UPDATE orders SET status = ? WHERE id = ?", [before, order])
                as_it_was = self.database.rows("SELECT * FROM orders WHERE id = ?", [order])
                moved = False
                with contextlib.suppress(KeyError):  # nothing leads back to pending
                    moved = orders.move_order(self.database, order, after, (201, {}), "because")
                self.assertEqual(moved, (before, after) in arrows)
                if moved:
                    self.assertEqual(orders.find_order(self.database, order)["status"], after)
                else:
                    self.assertEqual(self.database.rows("SELECT * FROM orders WHERE id = ?", [order]), as_it_was)

    def test_what_a_client_is_told_first_stands(self):
        quick, slow = self.add()["id"], self.add()["id"]
        orders.move_order(self.database, quick, "confirmed", (201, "confirmed"))
        self.assertEqual([*orders.store_response(self.database, quick, (202, "pending"))], [201, "confirmed"])
        self.assertEqual([*orders.store_response(self.database, slow, (202, "pending"))], [202, "pending"])
        orders.move_order(self.database, slow, "confirmed", (201, "confirmed"))
        self.assertEqual([*orders.find_response(self.database, slow)], [202, "pending"])


class Interleavings(SagaTest):
    """What may happen between any two steps of a saga. Nothing is away: so the background has nothing to do."""

    def setUp(self):
        super().setUp()
        self.shop = self.enterContext(running_shop())

    @contextlib.contextmanager
    def interrupted(self, moment, method, happens):
        """Let something happen "before" or "after" the next call with a method that the orders service makes."""
        client, to_come = self.shop.orders.client, [happens]
        call = client.call

        def look(this):
            if to_come and this == (moment, method):
                to_come.pop()()

        def call_and_look(upstream, asked, *rest):
            look(("before", asked))
            reply = call(upstream, asked, *rest)
            look(("after", asked))
            return reply

        with mock.patch.object(client, "call", call_and_look):
            yield
        self.assertEqual(to_come, [], f"no {method} was asked")

    def newest(self):
        return self.shop.orders.database.rows("SELECT max(id) AS id FROM orders")[0]["id"]

    def another_worker_is_quicker(self, order):
        self.advance(self.newest())

    def the_user_goes_and_another_worker_says_no(self, order):
        self.assertEqual(self.shop.ask("DELETE", f"/users/{order['userId']}").status, 204)
        self.advance(self.newest())

    def the_user_goes(self, order):
        self.assertEqual(self.shop.ask("DELETE", f"/users/{order['userId']}").status, 204)

    def all_is_sold_and_another_worker_sees_it(self, order):
        self.shop.ask("PUT", f"/products/{order['productId']}", {"name": "Lamp", "stock": 0})
        self.advance(self.newest())

    def another_worker_says_yes_and_the_client_cancels(self, order):
        self.assertEqual(self.cancel(self.newest()).status, 200)

    def another_worker_says_no_and_dies(self, order):
        orders.move_order(self.shop.orders.database, self.newest(), "rejected", (409, {"detail": "no"}), "no")

    def test_whatever_comes_between_the_steps_of_an_order_it_ends_well(self):
        moments = ("before", "GET"), ("after", "GET"), ("after", "PUT")
        confirmed, absent, short = (201, "confirmed"), (422, "rejected"), (409, "rejected")
        for happens, *ends in (
                (self.another_worker_is_quicker, confirmed, confirmed, confirmed),
                (self.the_user_goes_and_another_worker_says_no, absent, absent, absent),
                (self.the_user_goes, absent, confirmed, confirmed),
                (self.all_is_sold_and_another_worker_sees_it, short, short, confirmed),
                (self.another_worker_says_yes_and_the_client_cancels, *[(201, "cancelled")] * 3),
                (self.another_worker_says_no_and_dies, short, short, short)):
            for moment, (told, end) in zip(moments, ends, strict=True):
                with self.subTest(f"{happens.__name__} {' '.join(moment)}"):
                    user = self.shop.ask("POST", "/users", {"name": "Carol"}).json["id"]
                    lamp = self.shop.ask("POST", "/products", {"name": "Lamp", "stock": 5}).json["id"]
                    order = {"userId": user, "productId": lamp, "quantity": 2}
                    with self.interrupted(*moment, partial(happens, order)):
                        answer = self.post(order)
                    self.assertEqual((answer.status, self.shop.status(self.newest())), (told, end))
                    reserved, = self.shop.products.database.rows(
                        "SELECT supplied - stock AS units FROM products WHERE id = ?", [lamp])
                    self.assertEqual(reserved["units"], 2 if end == "confirmed" else 0)
                    self.assertIsNone(self.read_row(self.newest(), "due"))

    def test_whatever_comes_between_the_steps_of_a_cancellation_the_units_come_back_once(self):
        for happens in (self.another_worker_is_quicker, self.another_worker_says_yes_and_the_client_cancels):
            for moment in ("before", "after"):
                with self.subTest(f"{happens.__name__} {moment} DELETE"):
                    order = self.post().json["id"]
                    with self.interrupted(moment, "DELETE", partial(happens, LAPTOPS)):
                        answer = self.cancel(order)
                    self.assertEqual((answer.status, answer.json["status"]), (200, "cancelled"))
                    self.assertEqual(self.shop.stock(), 100)

    def test_the_order_is_written_down_before_anybody_is_asked(self):
        def look():
            file = self.shop.orders.database.path.absolute().as_uri()
            with contextlib.closing(sqlite3.connect(f"{file}?mode=ro", uri=True)) as connection:
                seen.extend(connection.execute("SELECT id, status, key FROM orders WHERE id > 202"))

        seen = []
        with self.interrupted("before", "GET", look):
            self.post(Idempotency_Key="k")
        self.assertEqual(seen, [(203, "pending", "k")])

    def test_a_client_that_hangs_up_does_not_stop_it(self):
        body = b'{"userId":1,"productId":101,"quantity":3}'
        head = "POST /orders HTTP/1.1\r\nHost: shop\r\nContent-Type: application/json\r\nContent-Length:"
        with Wire(self.shop.orders.server_port) as wire, self.interrupted("before", "GET", lambda: (
                wire.file.close(), wire.socket.close())):
            wire.send(f"{head} {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: self.newest() == 203 and self.shop.status(203) == "confirmed")
        self.assertEqual(self.shop.stock(), 97)

    def test_of_eight_buyers_of_the_last_unit_one_gets_it(self):
        self.shop.ask("PUT", "/products/102", {"name": "Mouse", "stock": 1})
        answers = together(*[partial(self.post, {"userId": 2, "productId": 102})] * 8)
        self.assertEqual(sorted(answer.status for answer in answers), [201] + [409] * 7)
        self.assertEqual(self.shop.stock(102), 0)

    def test_two_workers_at_once_on_each_order_do_no_harm(self):
        database = self.shop.orders.database

        for fields, end in ((LAPTOPS, "confirmed"), ({**LAPTOPS, "userId": 9}, "rejected"),
                            ({**LAPTOPS, "quantity": 200}, "rejected")):
            for _ in range(5):
                order, _ = orders.add_order(database, fields, None)
                self.assertEqual(together(*[partial(self.advance, order)] * 2), [None, None])
                self.assertEqual(self.shop.status(order), end)
        self.assertEqual(self.shop.stock(), 85)
        for order in range(203, 208):
            orders.move_order(database, order, "cancelling")
            self.assertEqual(together(*[partial(self.advance, order)] * 2), [None, None])
            self.assertEqual(self.shop.status(order), "cancelled")
        self.assertEqual(self.shop.stock(), 100)


class TwoOrdersServices(SagaTest):
    def setUp(self):
        super().setUp()
        self.shop, self.users, _ = self.enterContext(running_moody_shop())
        self.other = self.enterContext(running(Orders, **{**vars(self.shop.orders.settings), "port": 0}))

    def test_they_keep_one_book(self):
        there = self.shop._replace(orders=self.other)
        for key in "abcde":
            answers = together(*[partial(shop.ask, "POST", "/orders", LAPTOPS, Idempotency_Key=key)
                                 for shop in (self.shop, there)] * 2)
            self.assertEqual([answer.status for answer in answers], [201] * 4)
            self.assertEqual(len({answer.body for answer in answers}), 1)
        self.assertEqual(self.shop.stock(), 85)
        answers = together(*[partial(ask, orders.server_port, "POST", "/orders/203/cancel")
                             for orders in (self.shop.orders, self.other)] * 2)
        self.assertLessEqual({answer.status for answer in answers}, {200, 202})
        self.wait_for("cancelled")
        self.assertEqual(self.shop.stock(), 88)

    def test_both_go_on_with_what_is_pending_and_do_it_once(self):
        self.users.mood = b""
        for _ in range(5):
            self.assert_is_to_come(self.post(), "pending")
        self.users.mood = "well"
        for order in range(203, 208):
            self.wait_for("confirmed", order)
        self.assertEqual(self.shop.stock(), 85)


if __name__ == "__main__":
    unittest.main()
