"""The saga of an order when a service it needs fails, and when several workers process one order.

The services are real. A Moody proxy in front of users or products makes them fail, or something
happens at a chosen moment of a call. Each shop must pass the audit when a test ends.
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
from microshop.chassis.tracing import Trace
from microshop.orders import Orders, Saga
from microshop.products import Products
from microshop.users import Users
from tests.helpers import (
    PATIENCE, Wire, ask, flush, patient_services, read_request, running, running_moody_shop,
    running_shop, together, upstream, wait_until)

LAPTOPS = {"userId": 1, "productId": 101, "quantity": 3}
NO_SUCH_USER = {**LAPTOPS, "userId": 9}
NEVER = 24 * 3600.0  # seconds; no test takes so long


def status(number):
    return f"HTTP/1.1 {number} Whatever\r\nContent-Length: 0\r\n\r\n".encode()


INDEFINITE = {  # answers, and other moods of a Moody proxy, that leave open what has happened
    "closes the connection": b"",
    "never answers": "silent",
    "does it, but the answer is lost": "lossy",
    "answers 500": status(500),
    "answers 503": status(503),
    "answers 400": status(400),
    "answers 301": status(301),
    "answers 429": status(429),
    "does not speak HTTP": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "closes in the middle of the answer": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nHalf"}


class SagaTest(unittest.TestCase):
    """What the tests share: short waits between retries, and requests to the shop."""

    def setUp(self):
        self.enterContext(patient_services())
        self.set_times(TAKE_OVER=NEVER, RETRY_FIRST=0.01, RETRY_LAST=0.03, POLL=0.005)
        self.enterContext(
            mock.patch.multiple(CircuitBreaker, FIRST_PAUSE=0.01, LAST_PAUSE=0.01))
        self.enterContext(mock.patch.object(client, "BACKOFF", 0.002))

    def set_times(self, **times):
        self.enterContext(mock.patch.multiple(orders, **times))

    def post(self, content=LAPTOPS, **headers):
        return self.shop.ask("POST", "/orders", content, **headers)

    def cancel(self, order=203):
        return self.shop.ask("POST", f"/orders/{order}/cancel")

    def wait_for(self, status, order=203):
        wait_until(lambda: self.shop.status(order) == status, f"order {order} to be {status}")

    def wait_until_finished(self, order):
        wait_until(lambda: self.due(order) is None, f"order {order} to need no more steps")

    def due(self, order):
        rows = self.shop.orders.database.rows("SELECT due FROM orders WHERE id = ?", [order])
        return rows[0]["due"]

    def reservation(self, order):
        """Return the path of an order's reservation."""
        _, number = orders.find_order(self.shop.orders.database, order)
        return f"/reservations/{number}"

    def add(self, fields=LAPTOPS, key=None):
        """Store a pending order, as if its request had been cut off then; return its id."""
        order, _ = orders.add_order(self.shop.orders.database, fields, key)
        return order

    def advance(self, order, deadline=float("inf")):
        """Do what another worker does: take an order as far as it gets."""
        trace = Trace("another-worker")
        Saga(self.shop.orders, order, trace, deadline).advance()

    def assert_accepted(self, answer, status):
        """Check that an answer is 202 and says where and when to look again."""
        self.assertEqual((answer.status, answer.json["status"]), (202, status), answer.body)
        self.assertEqual(answer.headers["location"], f"/orders/{answer.json['id']}")
        self.assertRegex(answer.headers["retry-after"], "^[1-9][0-9]*$")


class DeadlineTest(SagaTest):
    """Nothing happens in the background here."""

    def setUp(self):
        super().setUp()
        self.set_times(POLL=NEVER)

    def test_a_saga_has_nine_tenths_of_the_time_that_its_client_gives(self):
        deadlines = []

        def note(service, order_id, trace, deadline):
            deadlines.append(deadline)
            return Saga(service, order_id, trace, deadline)

        with (running_moody_shop() as (self.shop, _, products),
              mock.patch.object(orders, "Saga", note)):
            products.mood = "silent"
            began = time.monotonic()
            answer = self.post(X_Request_Timeout="0.5")
            ended = time.monotonic()
        self.assert_accepted(answer, "pending")
        self.assertEqual(len(deadlines), 1)
        received = deadlines[0] - 0.9 * 0.5
        self.assertTrue(began <= received <= ended, (began, received, ended))

    def test_an_order_whose_client_gives_no_time_is_503_and_not_stored(self):
        with running_moody_shop() as (self.shop, _, _):
            self.assertEqual(self.post(X_Request_Timeout="0").status, 503)
            self.assertEqual(self.shop.ask("GET", "/orders/203").status, 404)

    def test_after_the_deadline_no_service_is_called(self):
        with running_moody_shop() as (self.shop, users, products):
            order = self.add()
            self.advance(order, deadline=time.monotonic())
            self.assertEqual((users.calls, products.calls), ([], []))
            self.assertEqual(self.shop.status(order), "pending")

    def test_a_service_that_shuts_down_finishes_only_what_a_client_waits_for(self):
        with running_moody_shop() as (self.shop, users, products):
            order = self.add()
            self.shop.orders.ending.set()
            self.advance(order)
            self.assertEqual((users.calls, products.calls), ([], []))
            self.assertEqual(self.shop.status(order), "pending")
            self.advance(order, deadline=time.monotonic() + PATIENCE)
            self.assertEqual(self.shop.status(order), "confirmed")

    def test_the_time_that_is_left_is_passed_on_to_each_service(self):
        left = []

        def note_time(connection):
            while request := read_request(connection):
                found = re.search(rb"(?i)\nx-request-timeout: ([0-9.]+)\r", request)
                left.append(float(found[1]))
                connection.sendall(status(200))

        self.set_times(CALL_TIME=NEVER)
        with (upstream(note_time) as url,
              running(Orders, users_url=[url], products_url=[url], timeout=NEVER) as service):
            headers = {"Content-Type": "application/json", "X-Request-Timeout": "1000"}
            began = time.monotonic()
            ask(service.server_port, "POST", "/orders", headers, json.dumps(LAPTOPS).encode())
            passed = time.monotonic() - began
        self.assertEqual(len(left), 2, "calls, of users and of products")
        for_users, for_products = left
        rounded = 0.001  # it is sent in milliseconds
        self.assertLessEqual(for_users, 900 + rounded, "seconds that orders gave to users: its "
                             "client gave 1000, of which a tenth is for the answer")
        self.assertLessEqual(for_products, for_users, "seconds that orders gave to products, after "
                             "it had called users")
        self.assertGreaterEqual(for_products, 900 - passed - rounded, "seconds that orders gave to "
                                f"products, when at most {passed} had passed")


class DatabaseFaultTest(SagaTest):
    def test_after_a_fault_of_the_database_the_background_waits_before_it_tries_again(self):
        for query in ("make_old_due", "find_due"):
            with self.subTest(query):
                self.check_wait_after_a_fault_of(query)

    def check_wait_after_a_fault_of(self, query):
        waits, has_waited_long = [], threading.Event()

        class RecordingEvent(threading.Event):
            def wait(self, timeout=None):
                waits.append(timeout)
                if timeout == NEVER:
                    has_waited_long.set()
                return super().wait(timeout)

        self.set_times(POLL=0.001, RETRY_LAST=NEVER)
        fault = sqlite3.OperationalError("disk I/O error")
        fault.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
        patched = mock.Mock(wraps=threading, Event=RecordingEvent)
        with (mock.patch.object(orders, "threading", patched),
              mock.patch.object(orders, query, side_effect=fault) as failing,
              contextlib.redirect_stderr(io.StringIO()) as log, running(Orders) as service):
            self.assertTrue(has_waited_long.wait(PATIENCE), waits)
            self.assertEqual((waits, failing.call_count), ([0.001, NEVER], 1))
            flush(service.log)
        self.assertIn(f"cannot resume orders; next attempt in {NEVER} s\n", log.getvalue())
        self.assertEqual(log.getvalue().count("disk I/O error"), 1, log.getvalue())
        self.assertNotIn("Traceback", log.getvalue())

    def test_orders_are_resumed_although_the_file_could_not_be_written_at_the_start(self):
        locked = sqlite3.OperationalError("database is locked")
        outcomes = [locked, locked, mock.DEFAULT]
        with running_shop() as self.shop:
            self.shop.orders.ending.set()  # it resumes nothing any more
            order = self.add()
            with (mock.patch.object(orders, "make_old_due", wraps=orders.make_old_due,
                                    side_effect=outcomes),
                  self.shop.with_orders_restarted() as self.shop):
                self.wait_for("confirmed", order)

    def test_an_order_that_cannot_be_read_holds_up_no_other(self):
        damage = "UPDATE orders SET due = 0, reason = CAST(x'ff' AS TEXT) WHERE id = ?"
        with (contextlib.redirect_stderr(io.StringIO()) as log,
              running_shop(quiet=True) as self.shop):
            damaged, *others = (self.add() for _ in range(3))
            self.shop.orders.database.write(damage, [damaged])
            for order in others:
                self.shop.orders.database.write(
                    "UPDATE orders SET due = 1 WHERE id = ?", [order])
                self.wait_for("confirmed", order)
            self.shop.orders.database.write(
                "UPDATE orders SET reason = NULL WHERE id = ?", [damaged])
            self.wait_for("confirmed", damaged)
            flush(self.shop.orders.log)
        self.assertRegex(log.getvalue(), f"cannot resume order {damaged}\n.*Could not decode")
        self.assertNotIn("Traceback", log.getvalue())


class IndefiniteAnswerTest(SagaTest):
    """No answer, or a failure, decides nothing; the order is finished when the service recovers."""

    def setUp(self):
        super().setUp()
        self.shop, self.users, self.products = self.enterContext(running_moody_shop())
        self.shop.orders.settings.timeout = PATIENCE

    @contextlib.contextmanager
    def mood(self, service, mood):
        """Put a service in a mood until the background has called it twice; then it is well."""
        service.mood = mood
        yield
        enough = len(service.calls) + 2
        wait_until(lambda: len(service.calls) >= enough, "calls in the background")
        service.mood = "well"

    @contextlib.contextmanager
    def trying(self, service, what, mood):
        """Put a service in a mood. Orders left unfinished by earlier moods meet it as well."""
        service.mood = mood
        seconds = 0.05 if mood == "silent" else PATIENCE
        with self.subTest(what), mock.patch.object(self.shop.orders.client, "timeout", seconds):
            yield

    def test_an_order_stays_pending_until_both_services_have_accepted_it(self):
        for service, odd in ((self.users, 422), (self.products, 404)):
            before, pending = self.shop.stock(), []
            moods = {**INDEFINITE, f"answers {odd}": status(odd), "answers 204": status(204)}
            for what, mood in moods.items():
                with self.trying(service, what, mood):
                    answer = self.post()
                    self.assert_accepted(answer, "pending")
                    pending.append(answer.json["id"])
            service.mood = "well"
            for order in pending:
                self.wait_for("confirmed", order)
            self.assertEqual(self.shop.stock(), before - 3 * len(pending))

    def test_an_order_whose_reservation_gets_no_answer_stays_pending(self):
        self.products.mood = b""
        answer = self.post()
        self.assertEqual((answer.status, self.shop.status(203)), (202, "pending"),
                         "POST /orders, while products closes each connection without an answer")
        self.products.mood = "well"
        self.wait_for("confirmed")

    def test_an_order_is_not_cancelled_before_its_units_are_released(self):
        self.post()
        self.products.mood = b""
        answer = self.cancel()
        self.assertEqual(
            (answer.status, self.shop.status(203)), (202, "cancelling"),
            "POST /orders/203/cancel, while products closes each connection without an answer")
        self.products.mood = "well"
        self.wait_for("cancelled")

    def test_an_order_stays_in_cancelling_until_products_has_released_its_units(self):
        cancelling = []
        moods = {**INDEFINITE, "answers 404": status(404), "answers 409": status(409)}
        for what, mood in moods.items():
            self.products.mood = "well"
            order = self.post().json["id"]
            cancelling.append(order)
            self.wait_for("confirmed", order)
            with self.trying(self.products, what, mood):
                self.assert_accepted(self.cancel(order), "cancelling")
                self.assert_accepted(self.cancel(order), "cancelling")
        self.products.mood = "well"
        for order in cancelling:
            self.wait_for("cancelled", order)
            self.assertEqual(self.cancel(order).status, 200)
        self.assertEqual(self.shop.stock(), 100)

    def test_an_order_that_must_stay_pending_cannot_be_cancelled_until_it_is_confirmed(self):
        with self.mood(self.users, b""):
            self.post()
            answer = self.cancel()
            self.assertEqual((answer.status, answer.headers["retry-after"]), (409, "1"))
            self.assertIn("is pending", answer.json["detail"])
            self.assertNotIn(f"PUT {self.reservation(203)}", self.products.calls)
        self.wait_for("confirmed")
        self.assertEqual((self.cancel().status, self.shop.stock()), (200, 100))

    def test_cancelling_a_pending_order_decides_it_first_without_the_background(self):
        self.set_times(RETRY_FIRST=NEVER, RETRY_LAST=NEVER)
        self.users.mood = b""
        self.assert_accepted(self.post(), "pending")
        self.users.mood = "well"
        self.assertEqual((self.cancel().status, self.shop.stock()), (200, 100))

    def test_cancelling_an_order_that_is_just_being_confirmed_works_now_or_on_a_retry(self):
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

            with (self.subTest(f"confirmed before access {moment} to the database"),
                  mock.patch.object(database, "rows", partial(overtaken, database.rows)),
                  mock.patch.object(database, "write", partial(overtaken, database.write))):
                answer = self.cancel(order)
                is_retried = "retry-after" in answer.headers
                self.assertTrue(answer.status in (200, 202) or is_retried, answer)

    def test_a_repeated_key_resumes_an_order_that_has_no_stored_response(self):
        order = self.add(key="k")
        answer = self.post(Idempotency_Key="k")
        self.assertEqual((answer.status, answer.json["status"]), (201, "confirmed"))
        self.assertEqual(answer.json["id"], order)
        self.assertEqual(answer.headers["idempotency-replayed"], "true")

    def test_a_final_response_is_replayed_without_asking_any_service(self):
        for content, key in ((LAPTOPS, "good"), (NO_SUCH_USER, "bad")):
            first = self.post(content, Idempotency_Key=key)
            self.wait_until_finished(int(first.headers["location"].rpartition("/")[2]))
            before = self.users.calls + self.products.calls
            again = self.post(content, Idempotency_Key=key)
            self.assertEqual((again.status, again.body), (first.status, first.body))
            self.assertEqual(self.users.calls + self.products.calls, before)

    def test_a_client_gets_its_rejection_although_the_release_must_wait(self):
        with self.mood(self.products, b""):
            self.assertEqual(self.post(NO_SUCH_USER).status, 422)
            self.assertIsNotNone(self.due(203))
        self.wait_until_finished(203)
        late = self.shop.ask("PUT", self.reservation(203), {"productId": 101, "quantity": 3})
        self.assertEqual((late.status, self.shop.stock()), (409, 100))

    def test_an_order_is_decided_by_the_user_and_the_stock_of_that_moment(self):
        with self.mood(self.users, b""):
            self.assert_accepted(self.post({**LAPTOPS, "userId": 2}), "pending")
            self.assert_accepted(self.post({**LAPTOPS, "productId": 102}), "pending")
            self.shop.ask("DELETE", "/users/2")
            self.shop.set_stock(102, 2)
        self.wait_for("rejected", 203)
        self.wait_for("rejected", 204)
        reasons = [self.shop.ask("GET", f"/orders/{order}").json["reason"] for order in (203, 204)]
        self.assertEqual(
            reasons, ["userId: there is no user 2", "product 102 has 2 of 3 units left"])

    def test_a_restart_resumes_every_unfinished_order_at_once(self):
        self.set_times(RETRY_FIRST=NEVER, RETRY_LAST=NEVER)
        self.post()
        self.products.mood = b""
        self.assert_accepted(self.cancel(), "cancelling")
        self.assert_accepted(self.post(), "pending")
        self.assertEqual(self.post(NO_SUCH_USER).status, 422)
        self.products.mood = "well"
        with self.shop.with_orders_restarted() as self.shop:
            self.wait_for("cancelled", 203)
            self.wait_for("confirmed", 204)
            self.wait_until_finished(205)
            self.assertIn(f"DELETE {self.reservation(205)}", self.products.calls)
        self.assertEqual(self.shop.stock(), 97)

    def test_the_background_takes_over_orders_that_no_request_has_finished(self):
        self.set_times(TAKE_OVER=0.05)
        self.add()
        self.wait_for("confirmed")
        orders.move_order(self.shop.orders.database, 203, "cancelling")
        self.wait_for("cancelled")
        self.assertEqual(self.shop.stock(), 100)

    def test_the_background_logs_the_moves_that_it_makes_and_requests_log_why_they_stop(self):
        with mock.patch.object(self.shop.orders.log, "event") as event:
            self.users.mood = status(500)
            self.post(X_Request_Id="place")
            self.users.mood = "well"
            self.wait_for("confirmed")
        logged = [call.args[0] for call in event.call_args_list]
        self.assertIn(
            "place order 203 stays pending: the users service answered 500", logged)
        moves = [line for line in logged if "order 203 pending ->" in line]
        self.assertEqual(moves, ["order-203 order 203 pending -> confirmed"])


class ServiceAwayTest(SagaTest):
    def test_an_order_is_confirmed_once_the_service_that_it_waits_for_is_started(self):
        for service, name in ((Users, "users"), (Products, "products")):
            with (self.subTest(name), socket.socket() as reserved,
                  contextlib.redirect_stderr(io.StringIO())):
                reserved.bind(("127.0.0.1", 0))
                port = reserved.getsockname()[1]
                url = f"http://127.0.0.1:{port}"
                with running_shop(**{f"{name}_url": [url]}) as self.shop:
                    self.assert_accepted(self.post(), "pending")
                    self.assertEqual((self.shop.status(203), self.shop.stock()), ("pending", 100))
                    reserved.close()
                    data = self.shop.orders.settings.data
                    with running(service, port=port, data=data):
                        self.wait_for("confirmed")
                    self.assertEqual(self.shop.stock(), 97)


class QueriesTest(unittest.TestCase):
    """What the tests share: the orders database alone, without any service."""

    def setUp(self):
        folder = self.enterContext(tempfile.TemporaryDirectory())
        self.database = Database(Path(folder) / "orders.db", orders.SCHEMA)
        self.addCleanup(self.database.close)

    def add(self):
        order, _ = orders.add_order(self.database, LAPTOPS, None)
        return self.find(order)

    def find(self, order):
        found, _ = orders.find_order(self.database, order)
        return found

    def reservation(self, order):
        _, number = orders.find_order(self.database, order)
        return number


class BackoffTest(QueriesTest):
    """How long an order waits until it is resumed, on a clock that the tests set."""

    def setUp(self):
        super().setUp()
        self.now = 1000.0
        self.enterContext(mock.patch.object(orders, "time", mock.Mock(time=lambda: self.now)))

    def postpone(self, order):
        """Return the seconds that an order has to wait."""
        orders.postpone_order(self.database, order["id"])
        return round(self.due(order) - self.now, 6)

    def due(self, order):
        return self.database.rows("SELECT due FROM orders WHERE id = ?", [order["id"]])[0]["due"]

    def test_waits_grow_from_the_first_to_the_last(self):
        first, last = orders.RETRY_FIRST, orders.RETRY_LAST
        for jitter in (min, max):
            with (self.subTest(jitter),
                  mock.patch.object(orders.random, "uniform", jitter)):
                order, waits = self.add(), []
                for _ in range(30):
                    waits.append(self.postpone(order))
                    self.now += waits[-1]
                for wait in waits:
                    self.assertTrue(first / 2 <= wait <= last, waits)
                self.assertLessEqual(waits[0], 2 * first)
                self.assertGreaterEqual(waits[-1], last / 2)
                for wait, following in itertools.pairwise(waits):
                    self.assertGreaterEqual(following, wait)
                self.assertLess(sum(waits[:10]), 60, "they grow too fast")
                self.assertGreater(sum(waits[:20]), 30, "they grow too slowly")

    def test_waits_differ_from_order_to_order(self):
        self.assertEqual(len({self.postpone(self.add()) for _ in range(10)}), 10)

    def test_waits_start_again_with_the_first_after_each_move(self):
        order = self.add()
        orders.move_order(self.database, order["id"], "confirmed")
        self.now += 500
        orders.move_order(self.database, order["id"], "cancelling")
        wait = self.postpone(order)
        self.assertLessEqual(wait, 2 * orders.RETRY_FIRST)

    def test_an_order_is_due_when_its_wait_is_over(self):
        order = self.add()
        self.assertEqual(orders.find_due(self.database), [], "its request may still finish it")
        self.now += orders.TAKE_OVER
        self.assertEqual(orders.find_due(self.database), [order["id"]])
        self.postpone(order)
        self.assertEqual(orders.find_due(self.database), [])
        self.now = self.due(order)
        self.assertEqual(orders.find_due(self.database), [order["id"]])

    def test_a_slow_worker_changes_nothing_of_an_order_that_another_has_moved(self):
        order = self.add()
        orders.move_order(self.database, order["id"], "confirmed")
        orders.postpone_order(self.database, order["id"])
        self.assertIsNone(self.due(order))
        orders.move_order(self.database, order["id"], "cancelling")
        due = self.due(order)
        orders.finish_rejected(self.database, order["id"])
        self.assertEqual(self.due(order), due)

    def test_a_finished_order_is_never_due_again(self):
        order = self.add()
        orders.move_order(self.database, order["id"], "rejected")
        orders.finish_rejected(self.database, order["id"])
        orders.postpone_order(self.database, order["id"])
        self.assertIsNone(self.due(order))

    def test_the_order_that_has_been_due_longest_is_resumed_first(self):
        first, second = self.add(), self.add()
        self.now += orders.TAKE_OVER
        self.postpone(first)
        self.now += orders.RETRY_LAST
        self.assertEqual(orders.find_due(self.database), [second["id"], first["id"]])

    def test_a_clock_that_is_set_back_delays_no_order(self):
        new, failed, finished = self.add(), self.add(), self.add()
        orders.move_order(self.database, finished["id"], "confirmed")
        self.now += orders.RETRY_LAST
        self.postpone(failed)
        self.now -= 3600
        self.assertEqual(orders.find_due(self.database), [new["id"], failed["id"]])
        for _ in range(3):
            wait = self.postpone(new)
            self.assertTrue(orders.RETRY_LAST / 2 <= wait <= orders.RETRY_LAST, wait)
            self.assertEqual(orders.find_due(self.database), [failed["id"]])
            self.now = self.due(new)
            self.assertEqual(orders.find_due(self.database), [new["id"], failed["id"]])

    def test_a_clock_that_is_set_forward_makes_unfinished_orders_due_and_no_other(self):
        order, finished = self.add(), self.add()
        orders.move_order(self.database, finished["id"], "confirmed")
        self.now += 25 * 3600
        self.assertEqual(orders.find_due(self.database), [order["id"]])

    def test_a_start_makes_due_what_an_earlier_process_has_left_and_nothing_else(self):
        old, finished = self.add(), self.add()
        orders.move_order(self.database, finished["id"], "confirmed")
        self.now += 1
        started = self.now
        self.now += 1
        self.add()  # a worker of this process has it
        orders.make_old_due(self.database, started)
        self.assertEqual(orders.find_due(self.database), [old["id"]])


class ReservationIdTest(QueriesTest):
    def test_no_two_orders_have_the_same_reservation(self):
        ids = {self.reservation(self.add()["id"]) for _ in range(100)}
        self.assertEqual(len(ids), 100)
        self.assertTrue(all(1 <= number < 2**53 for number in ids), ids)

    def test_of_two_workers_that_renew_a_reservation_one_succeeds(self):
        order = self.add()["id"]
        first = self.reservation(order)
        orders.renew_reservation(self.database, order, first)
        second = self.reservation(order)
        self.assertNotEqual(second, first)
        orders.renew_reservation(self.database, order, first)
        self.assertEqual(self.reservation(order), second)

    def test_only_a_pending_order_gets_another_reservation(self):
        for path in (["confirmed", "cancelling", "cancelled"], ["rejected"]):
            order = self.add()["id"]
            reservation = self.reservation(order)
            for status in path:
                orders.move_order(self.database, order, status)
                orders.renew_reservation(self.database, order, reservation)
                with self.subTest(status):
                    self.assertEqual(self.reservation(order), reservation)


class StatusTest(QueriesTest):
    def test_an_order_moves_only_along_the_arrows_of_the_diagram(self):
        arrows = {("pending", "confirmed"), ("pending", "rejected"),
                  ("confirmed", "cancelling"), ("cancelling", "cancelled")}
        for before, after in itertools.product(orders.STATES, orders.STATES):
            with self.subTest(f"{before} -> {after}"):
                order = self.add()["id"]
                self.database.write("UPDATE orders SET status = ? WHERE id = ?", [before, order])
                stored = self.database.rows("SELECT * FROM orders WHERE id = ?", [order])
                moved = False
                with contextlib.suppress(KeyError):  # no arrow leads to pending
                    moved = orders.move_order(
                        self.database, order, after, (201, {}), "because")
                self.assertEqual(moved, (before, after) in arrows)
                if moved:
                    self.assertEqual(self.find(order)["status"], after)
                else:
                    rows = self.database.rows("SELECT * FROM orders WHERE id = ?", [order])
                    self.assertEqual(rows, stored)

    def test_the_response_that_is_stored_stays_whatever_becomes_of_the_order(self):
        order = self.add()["id"]
        self.assertIsNone(orders.find_response(self.database, order))
        orders.move_order(self.database, order, "confirmed", (201, "confirmed"))
        for status in ("cancelling", "cancelled"):
            orders.move_order(self.database, order, status)
            self.assertEqual(orders.find_response(self.database, order), [201, "confirmed"])


class InterleavingTest(SagaTest):
    """What may happen between two steps of a saga. All services run: the background is idle."""

    def setUp(self):
        super().setUp()
        self.shop = self.enterContext(running_shop(timeout=PATIENCE))

    @contextlib.contextmanager
    def interrupted(self, moment, method, action):
        """Call an action "before" or "after" the next call of a method that orders makes."""
        client, actions = self.shop.orders.client, [action]
        call = client.call

        def act(now):
            if actions and now == (moment, method):
                actions.pop()()

        def call_interrupted(upstream, called, *rest):
            act(("before", called))
            reply = call(upstream, called, *rest)
            act(("after", called))
            return reply

        with mock.patch.object(client, "call", call_interrupted):
            yield
        self.assertEqual(actions, [], f"orders made no {method} call")

    def newest(self):
        return self.shop.orders.database.rows("SELECT max(id) AS id FROM orders")[0]["id"]

    # Each of these may happen to an order between two steps.

    def another_worker_is_faster(self, order):
        self.advance(self.newest())

    def the_user_is_deleted(self, order):
        answer = self.shop.ask("DELETE", f"/users/{order['userId']}")
        self.assertEqual(answer.status, 204)

    def the_user_is_deleted_and_another_worker_rejects(self, order):
        self.the_user_is_deleted(order)
        self.advance(self.newest())

    def the_stock_is_emptied_and_another_worker_is_faster(self, order):
        self.shop.set_stock(order["productId"], 0)
        self.advance(self.newest())

    def another_worker_confirms_and_the_client_cancels(self, order):
        self.assertEqual(self.cancel(self.newest()).status, 200)

    def another_worker_rejects_and_is_killed(self, order):
        problem = (409, {"status": 409, "detail": "no"})
        orders.move_order(self.shop.orders.database, self.newest(), "rejected", problem, "no")

    def test_whatever_happens_between_two_steps_of_an_order_it_is_finished_correctly(self):
        moments = ("before", "GET"), ("after", "GET"), ("after", "PUT")
        confirmed, no_user, no_stock = (201, "confirmed"), (422, "rejected"), (409, "rejected")
        cancelled = (201, "cancelled")
        for action, *outcomes in (  # with what it leads to at each of the moments
                (self.another_worker_is_faster, confirmed, confirmed, confirmed),
                (self.the_user_is_deleted, no_user, confirmed, confirmed),
                (self.the_user_is_deleted_and_another_worker_rejects, no_user, no_user, no_user),
                (self.the_stock_is_emptied_and_another_worker_is_faster,
                 no_stock, no_stock, confirmed),
                (self.another_worker_confirms_and_the_client_cancels,
                 cancelled, cancelled, cancelled),
                (self.another_worker_rejects_and_is_killed, no_stock, no_stock, no_stock)):
            for moment, outcome in zip(moments, outcomes, strict=True):
                with self.subTest(f"{action.__name__} {' '.join(moment)}"):
                    self.check_interruption(action, moment, outcome)

    def check_interruption(self, action, moment, outcome):
        user = self.shop.ask("POST", "/users", {"name": "Carol"}).json["id"]
        lamp = self.shop.ask("POST", "/products", {"name": "Lamp", "stock": 5}).json["id"]
        order = {"userId": user, "productId": lamp, "quantity": 2}
        with self.interrupted(*moment, partial(action, order)):
            answer = self.post(order)
        status = self.shop.status(self.newest())
        self.assertEqual((answer.status, status), outcome)
        reserved = self.shop.products.database.rows(
            "SELECT supplied - stock AS units FROM products WHERE id = ?", [lamp])[0]["units"]
        self.assertEqual(reserved, 2 if status == "confirmed" else 0, "units reserved")
        self.assertIsNone(self.due(self.newest()), "it needs no more steps")

    def test_a_worker_that_is_too_late_does_not_confirm_a_cancelled_order(self):
        confirm_and_cancel = partial(self.another_worker_confirms_and_the_client_cancels, LAPTOPS)
        with self.interrupted("after", "PUT", confirm_and_cancel):
            self.post()
        self.assertEqual(
            self.shop.status(203), "cancelled",
            "order 203: while one worker waited for products, another one confirmed the order, and "
            "the client cancelled it; then the first worker went on")

    def test_whatever_happens_between_two_steps_of_a_cancellation_units_come_back_once(self):
        for action in (self.another_worker_is_faster,
                       self.another_worker_confirms_and_the_client_cancels):
            for moment in ("before", "after"):
                with self.subTest(f"{action.__name__} {moment} DELETE"):
                    order = self.post().json["id"]
                    with self.interrupted(moment, "DELETE", partial(action, LAPTOPS)):
                        answer = self.cancel(order)
                    self.assertEqual((answer.status, answer.json["status"]), (200, "cancelled"))
                    self.assertEqual(self.shop.stock(), 100)

    def test_an_order_whose_reservation_id_was_used_before_is_confirmed_under_another(self):
        for method, content in (("DELETE", None), ("PUT", {"productId": 102, "quantity": 1})):
            with self.subTest(method):
                order, before = self.add(), self.shop.stock()
                used = self.reservation(order)
                self.shop.ask(method, used, content)
                self.advance(order)
                self.assertEqual(self.shop.status(order), "pending", "this decides nothing")
                self.assertNotEqual(self.reservation(order), used)
                self.wait_for("confirmed", order)
                self.assertEqual(self.shop.stock(), before - LAPTOPS["quantity"])
        self.assertEqual(self.shop.stock(102), 99, "the units of the other reservation")
        self.shop.ask("DELETE", used)

    def test_a_rejected_order_releases_what_another_worker_reserved_under_a_new_id(self):
        user = self.shop.ask("POST", "/users", {"name": "Carol"}).json["id"]
        order = {**LAPTOPS, "userId": user}
        units = {"productId": order["productId"], "quantity": order["quantity"]}

        def renew_reserve_and_delete_the_user():
            _, refused = orders.find_order(self.shop.orders.database, self.newest())
            orders.renew_reservation(self.shop.orders.database, self.newest(), refused)
            reserved = self.shop.ask("PUT", self.reservation(self.newest()), units)
            self.assertEqual(reserved.status, 201)
            self.the_user_is_deleted(order)

        with self.interrupted("before", "GET", renew_reserve_and_delete_the_user):
            self.assertEqual(self.post(order).status, 422)
        self.assertEqual(self.shop.stock(), 100,
                         "laptops that are free, after the only order for them was rejected")

    def test_an_order_is_in_the_file_before_any_service_is_called(self):
        def look():
            uri = self.shop.orders.database.path.absolute().as_uri() + "?mode=ro"
            with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
                query = "SELECT id, status, key FROM orders WHERE id > 202"
                seen.extend(connection.execute(query))

        seen = []
        with self.interrupted("before", "GET", look):
            self.post(Idempotency_Key="k")
        self.assertEqual(seen, [(203, "pending", "k")],
                         "new rows in orders.db when orders calls the first other service")

    def test_an_order_is_confirmed_although_its_client_hangs_up(self):
        body = json.dumps(LAPTOPS).encode()
        head = ("POST /orders HTTP/1.1\r\nHost: shop\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n")
        with Wire(self.shop.orders.server_port) as wire:
            def hang_up():
                wire.file.close()
                wire.socket.close()

            with self.interrupted("before", "GET", hang_up):
                wire.send(head.encode() + body)
                wait_until(lambda: self.newest() == 203, "order 203 to be stored")
                self.wait_for("confirmed")
        self.assertEqual(self.shop.stock(), 97)

    def test_of_eight_simultaneous_buyers_of_the_last_unit_one_gets_it(self):
        self.shop.set_stock(102, 1)
        answers = together(*[partial(self.post, {"userId": 2, "productId": 102})] * 8)
        self.assertEqual(sorted(answer.status for answer in answers), [201] + [409] * 7)
        self.assertEqual(self.shop.stock(102), 0)

    def test_two_simultaneous_workers_on_one_order_do_no_harm(self):
        for fields, end in ((LAPTOPS, "confirmed"), (NO_SUCH_USER, "rejected"),
                            ({**LAPTOPS, "quantity": 200}, "rejected")):
            for _ in range(5):
                order = self.add(fields)
                self.assertEqual(together(*[partial(self.advance, order)] * 2), [None, None])
                self.assertEqual(self.shop.status(order), end)
        self.assertEqual(self.shop.stock(), 85)
        for order in range(203, 208):
            orders.move_order(self.shop.orders.database, order, "cancelling")
            self.assertEqual(together(*[partial(self.advance, order)] * 2), [None, None])
            self.assertEqual(self.shop.status(order), "cancelled")
        self.assertEqual(self.shop.stock(), 100)


class TwoInstancesTest(SagaTest):
    """Two instances of the orders service that share one database."""

    def setUp(self):
        super().setUp()
        self.shop, self.users, _ = self.enterContext(running_moody_shop())
        self.shop.orders.settings.timeout = PATIENCE
        settings = {**vars(self.shop.orders.settings), "port": 0}
        self.other = self.enterContext(running(Orders, **settings))

    def test_two_instances_place_each_order_once_and_cancel_it_once(self):
        there = self.shop._replace(orders=self.other)
        for key in "abcde":
            answers = together(*[
                partial(shop.ask, "POST", "/orders", LAPTOPS, Idempotency_Key=key)
                for shop in (self.shop, there)] * 2)
            self.assertEqual([answer.status for answer in answers], [201] * 4)
            self.assertEqual(len({answer.body for answer in answers}), 1)
        self.assertEqual(self.shop.stock(), 85)
        answers = together(*[
            partial(shop.ask, "POST", "/orders/203/cancel") for shop in (self.shop, there)] * 2)
        self.assertLessEqual({answer.status for answer in answers}, {200, 202})
        self.wait_for("cancelled")
        self.assertEqual(self.shop.stock(), 88)

    def test_two_instances_resume_each_pending_order_once(self):
        self.users.mood = b""
        for _ in range(5):
            self.assert_accepted(self.post(), "pending")
        self.users.mood = "well"
        for order in range(203, 208):
            self.wait_for("confirmed", order)
        self.assertEqual(self.shop.stock(), 85)


if __name__ == "__main__":
    unittest.main()
