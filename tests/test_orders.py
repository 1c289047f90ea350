"""The orders service while all services run. When one does not: see test_saga.py."""
import contextlib
import io
import json
import tempfile
import time
import unittest
from functools import partial
from pathlib import Path
from unittest import mock

from microshop import orders
from microshop.chassis.database import Database
from microshop.orders import Orders
from tests.collection import JSON, CollectionTests
from tests.helpers import (
    PATIENCE, ask, flush, patient_services, running, running_moody_shop, running_shop, together,
    wait_until)

MOST = 2**53 - 1  # the largest integer that every JSON client can hold
NOT_NUMBERS = (True, 1.5, 1e-2, "1", None, [1], {}, 0, -1, MOST + 1)  # of units, or as an id
LAPTOPS = {"userId": 1, "productId": 101, "quantity": 3}
TOO_MANY = {"userId": 2, "productId": 102, "quantity": 101}
NO_SUCH_USER = {"userId": 9, "productId": 101, "quantity": 1}
NOT_KEYS = ("", " ", "k" * 256, "caf\xe9", "a\tb", "a\x7fb")


class OrdersTest(CollectionTests, unittest.TestCase):
    service, path = Orders, "/orders"
    summaries = [
        {"id": 201, "userId": 1, "productId": 101}, {"id": 202, "userId": 2, "productId": 102}]
    item = {"id": 201, "userId": 1, "productId": 101, "quantity": 1, "status": "confirmed"}
    insert = ("INSERT INTO orders (id, userId, productId, quantity, status, placed, since) "
              "VALUES (?, 1, 101, 3, 'pending', 0, 0)")

    def reject(self, order_id, reason):
        self.server.database.write(
            "UPDATE orders SET status = 'rejected', reason = ? WHERE id = ?", [reason, order_id])

    def test_counting_unfinished_orders_reads_no_finished_one(self):
        queries = []

        class Noting:
            def rows(self, query):
                queries.append(query)
                return []

        orders.count_unfinished(Noting())
        plan = self.server.database.rows(f"EXPLAIN QUERY PLAN {queries[0]}")
        self.assertIn("USING INDEX orders_due", plan[0]["detail"], "the plan of SQLite")

    def test_a_rejected_order_is_listed_only_if_its_status_is_asked_for(self):
        self.reject(201, "stock is short")
        self.assertEqual(self.get("/orders").json, self.summaries[1:])
        self.assertEqual(self.get("/orders?ids=201,202").json, self.summaries[1:])
        self.assertEqual(self.get("/orders?status=rejected").json, self.summaries[:1])
        rejected = {**self.item, "status": "rejected", "reason": "stock is short"}
        self.assertEqual(self.get("/orders/201").json, rejected)

    def test_the_query_status_chooses_orders_page_by_page(self):
        self.add_rows(3)
        answer = self.get("/orders?status=pending&limit=2")
        self.assertEqual([order["id"] for order in answer.json], [1001, 1002])
        self.assertEqual(
            answer.headers["link"], '</orders?status=pending&limit=2&after=1002>; rel="next"')
        self.assertEqual(self.get("/orders?status=confirmed").json, self.summaries)

    def test_a_page_of_one_status_reads_no_orders_of_another(self):
        plan = self.plan_of("/orders?status=pending&after=5")
        self.assertIn("orders_by_status (status=? AND rowid>?)", plan)
        self.assertIn("orders_not_rejected (", self.plan_of("/orders?after=5"))

    def test_ids_are_looked_up_one_by_one_whatever_their_status(self):
        for query in ("status=pending&ids=1,2", "status=rejected&ids=1,2&after=1", "ids=1,2"):
            with self.subTest(query):
                self.assertRegex(self.plan_of(f"/orders?{query}"),
                                 r"SEARCH orders USING INTEGER PRIMARY KEY \(rowid=\?\)")

    def test_an_unknown_status_is_400(self):
        for status in ("lost", "", "CONFIRMED"):
            with self.subTest(status):
                answer = self.get(f"/orders?status={status}")
                self.assertEqual(answer.status, 400)
                self.assertTrue(answer.json["detail"].startswith(
                    f"status: {status!r} is not one of pending, confirmed, "), answer.body)


class ShopTest(unittest.TestCase):
    """What the tests share: a running shop, and requests to it."""

    def setUp(self):
        self.enterContext(patient_services())
        self.shop = self.enterContext(running_shop(timeout=PATIENCE))

    def post(self, content, **headers):
        return self.shop.ask("POST", "/orders", content, **headers)

    def cancel(self, order):
        return self.shop.ask("POST", f"/orders/{order}/cancel")

    def listed(self, query=""):
        return [order["id"] for order in self.shop.ask("GET", f"/orders{query}").json]

    def stored(self):
        """Return every column of every order."""
        return self.shop.orders.database.rows("SELECT * FROM orders")

    def assert_is_problem(self, answer, status, *fields):
        """Check that an answer is a problem, and which fields are wrong."""
        self.assertEqual(answer.status, status, answer.body)
        self.assertEqual(answer.json["status"], status)
        self.assertEqual(answer.headers["content-type"], "application/problem+json")
        errors = answer.json.get("errors", [])
        self.assertEqual([error["field"] for error in errors], list(fields))


class PlacingTest(ShopTest):
    def test_an_order_is_confirmed_and_its_units_leave_the_stock(self):
        answer = self.post(LAPTOPS)
        confirmed = {"id": 203, **LAPTOPS, "status": "confirmed"}
        self.assertEqual((answer.status, answer.json), (201, confirmed))
        self.assertEqual(answer.headers["location"], "/orders/203")
        self.assertNotIn("retry-after", answer.headers)
        self.assertEqual(self.shop.ask("GET", "/orders/203").body, answer.body)
        self.assertEqual(self.listed(), [201, 202, 203])
        self.assertEqual((self.shop.stock(101), self.shop.stock(102)), (97, 100))

    def test_the_quantity_is_1_if_it_is_left_out(self):
        self.assertEqual(self.post({"userId": 2, "productId": 102}).json["quantity"], 1)
        self.assertEqual(self.shop.stock(102), 99)

    def test_the_last_unit_can_be_ordered_and_then_no_more(self):
        self.assertEqual(self.post({**LAPTOPS, "quantity": 100}).status, 201)
        self.assertEqual(self.post({**LAPTOPS, "quantity": 1}).status, 409)
        self.assertEqual(self.shop.stock(), 0)

    def test_without_a_key_every_post_is_a_new_order(self):
        locations = [self.post(LAPTOPS).headers["location"] for _ in range(3)]
        self.assertEqual(locations, ["/orders/203", "/orders/204", "/orders/205"])
        self.assertEqual(self.shop.stock(), 91)

    def test_an_invalid_order_is_422_names_every_wrong_field_and_is_not_stored(self):
        before = self.stored()
        wrong_fields = [
            ({**LAPTOPS, name: value}, name) for name in LAPTOPS for value in NOT_NUMBERS]
        for content, *fields in (
                *wrong_fields,
                ({}, "userId", "productId"),
                ({"userId": 1, "quantity": 0, "id": 7}, "productId", "quantity", "id"),
                ({"userid": 1, "status": "confirmed", **LAPTOPS}, "userid", "status"),
                ({"userId": "1", "productId": 1.5, "quantity": []},
                 "userId", "productId", "quantity"),
                *((content, "body") for content in ([LAPTOPS], [], "order", 1, False))):
            with self.subTest(content=content):
                self.assert_is_problem(self.post(content), 422, *fields)
                self.assertEqual(self.stored(), before)

    def test_the_largest_numbers_are_accepted_as_ids_and_quantities(self):
        self.assertEqual(self.post({**LAPTOPS, "quantity": MOST}).status, 409)
        self.assert_is_problem(self.post({**LAPTOPS, "productId": MOST}), 422, "productId")
        self.assert_is_problem(self.post({**LAPTOPS, "userId": MOST}), 422, "userId")

    def test_an_order_that_cannot_be_met_is_rejected_with_a_reason(self):
        no_product, no_user = "productId: there is no product 999", "userId: there is no user 9"
        for order, status, reason, *fields in (
                (TOO_MANY, 409, "product 102 has 100 of 101 units left"),
                ({**LAPTOPS, "productId": 999}, 422, no_product, "productId"),
                (NO_SUCH_USER, 422, no_user, "userId"),
                ({"userId": 9, "productId": 999}, 422, no_user, "userId")):
            with self.subTest(order=order):
                answer = self.post(order)
                self.assert_is_problem(answer, status, *fields)
                self.assertEqual(answer.json["detail"], reason)
                self.assertEqual(answer.json["type"], "about:blank")
                self.assertEqual(answer.json["requestId"], answer.headers["x-request-id"])
                stored = self.shop.ask("GET", answer.headers["location"]).json
                self.assertEqual(stored, {"quantity": 1, **order, "id": stored["id"],
                                          "status": "rejected", "reason": reason})
                self.assertEqual(answer.json["order"], stored)
        self.assertEqual(self.listed(), [201, 202])
        self.assertEqual(self.listed("?status=rejected"), [203, 204, 205, 206])
        self.assertEqual((self.shop.stock(101), self.shop.stock(102)), (100, 100))


class CancellingTest(ShopTest):
    def test_a_repeated_cancellation_gives_the_units_back_once(self):
        self.post(LAPTOPS)
        cancelled = {"id": 203, **LAPTOPS, "status": "cancelled"}
        for _ in range(3):
            answer = self.cancel(203)
            self.assertEqual((answer.status, answer.json), (200, cancelled))
            self.assertEqual(self.shop.stock(), 100)
        self.assertEqual(self.listed(), [201, 202, 203])
        self.assertEqual(self.listed("?status=cancelled"), [203])

    def test_a_demo_order_can_be_cancelled_too(self):
        self.assertEqual(self.cancel(201).status, 200)
        self.assertEqual(self.shop.stock(), 101)

    def test_a_rejected_order_cannot_be_cancelled(self):
        self.post(TOO_MANY)
        answer = self.cancel(203)
        self.assert_is_problem(answer, 409)
        self.assertEqual(
            answer.json["detail"],
            "order 203 is rejected; only a confirmed order can be cancelled")
        self.assertNotIn("retry-after", answer.headers)
        self.assertEqual(self.shop.status(203), "rejected")

    def test_cancelling_an_order_that_does_not_exist_is_404(self):
        for order in (203, 999, MOST, MOST + 1):
            self.assert_is_problem(self.cancel(order), 404)

    def test_twenty_simultaneous_cancellations_give_the_units_back_once(self):
        self.post(LAPTOPS)
        answers = together(*[partial(self.cancel, 203)] * 20)
        self.assertLessEqual({answer.status for answer in answers}, {200, 202})
        wait_until(lambda: self.shop.status(203) == "cancelled", "order 203 to be cancelled")
        self.assertEqual(self.shop.stock(), 100)


class LogTest(ShopTest):
    def setUp(self):
        self.log = self.enterContext(contextlib.redirect_stderr(io.StringIO()))
        super().setUp()

    def assert_logged(self, *events):
        """Check all events that were logged, without their times."""
        flush(self.shop.orders.log)
        lines = self.log.getvalue().splitlines()
        self.assertEqual([line.partition(" orders ")[2] for line in lines], list(events))

    def test_each_move_of_an_order_is_one_line_with_the_id_of_its_request(self):
        self.post(LAPTOPS, X_Request_Id="place")
        self.post(TOO_MANY, X_Request_Id="fail")
        self.shop.ask("POST", "/orders/203/cancel", X_Request_Id="cancel")
        self.assert_logged(
            "place order 203 pending -> confirmed",
            "fail order 204 pending -> rejected",
            "cancel order 203 confirmed -> cancelling",
            "cancel order 203 cancelling -> cancelled")

    def test_repeated_requests_log_no_move(self):
        self.post(LAPTOPS, Idempotency_Key="k", X_Request_Id="place")
        self.post(LAPTOPS, Idempotency_Key="k", X_Request_Id="again")
        self.assert_logged("place order 203 pending -> confirmed")


class IdempotencyKeyTest(ShopTest):
    def assert_replayed(self, again, first):
        """Check that an answer repeats the first one, and says so."""
        self.assertEqual((again.status, again.body), (first.status, first.body))
        for name in ("location", "content-type", "retry-after"):
            self.assertEqual(again.headers.get(name), first.headers.get(name))
        self.assertEqual(again.headers.get("idempotency-replayed"), "true")
        self.assertNotIn("idempotency-replayed", first.headers)

    def test_a_repeated_key_makes_no_second_order(self):
        places = [self.post(LAPTOPS, Idempotency_Key="k").headers["location"] for _ in range(2)]
        self.assertEqual(places, ["/orders/203", "/orders/203"],
                         "Location of two equal POST /orders with Idempotency-Key: k")

    def test_a_repeated_key_replays_the_response_after_changes_and_a_restart_too(self):
        contents = {"confirmed": LAPTOPS, "short": TOO_MANY, "absent": NO_SUCH_USER}
        first = {key: self.post(content, Idempotency_Key=key)
                 for key, content in contents.items()}
        self.assertEqual([answer.status for answer in first.values()], [201, 409, 422])

        def assert_all_are_replayed():
            for key, content in contents.items():
                with self.subTest(key):
                    self.assert_replayed(self.post(content, Idempotency_Key=key), first[key])

        assert_all_are_replayed()
        self.assertEqual((len(self.stored()), self.shop.stock()), (5, 97))
        self.shop.set_stock(102, 1000)
        self.cancel(203)
        assert_all_are_replayed()
        with self.shop.with_orders_restarted() as self.shop:
            assert_all_are_replayed()
            self.assertEqual((self.shop.status(203), len(self.stored())), ("cancelled", 5))

    def test_a_repeated_key_gets_the_present_state_of_a_pending_order_then_its_final_response(self):
        contents = {"confirmed": LAPTOPS, "rejected": TOO_MANY}
        with running_moody_shop() as (self.shop, users, _):
            users.mood = b""
            first = {key: self.post(content, Idempotency_Key=key)
                     for key, content in contents.items()}
            for key, answer in first.items():
                self.assertEqual((answer.status, answer.json["status"]), (202, "pending"))
                self.assert_replayed(self.post(contents[key], Idempotency_Key=key), answer)
            users.mood = "well"
            for key, answer in first.items():
                order = answer.json["id"]
                wait_until(lambda order=order, key=key: self.shop.status(order) == key,
                           f"order {order} to be {key}")
            final = {key: self.post(content, Idempotency_Key=key)
                     for key, content in contents.items()}
            self.assertEqual([answer.status for answer in final.values()], [201, 409])
            for key, answer in final.items():
                self.assertNotIn("retry-after", answer.headers)
                self.assertEqual(answer.headers["location"], first[key].headers["location"])
            self.assertEqual(self.cancel(first["confirmed"].json["id"]).status, 200)
            with self.shop.with_orders_restarted() as self.shop:
                for key, answer in final.items():
                    again = self.post(contents[key], Idempotency_Key=key)
                    self.assertEqual((again.status, again.body), (answer.status, answer.body))

    def test_a_key_that_was_used_with_a_different_body_is_422(self):
        first = self.post(LAPTOPS, Idempotency_Key="k")
        before = self.stored()
        for name in LAPTOPS:
            answer = self.post({**LAPTOPS, name: 2}, Idempotency_Key="k")
            self.assert_is_problem(answer, 422, "Idempotency-Key")
            self.assertNotIn("idempotency-replayed", answer.headers)
        self.assertEqual((self.stored(), self.shop.stock()), (before, 97))
        self.assert_replayed(self.post(LAPTOPS, Idempotency_Key="k"), first)

    def test_a_body_is_the_same_however_its_json_is_written(self):
        first = self.post({"userId": 1, "productId": 101}, Idempotency_Key="k")
        headers = {**JSON, "Idempotency-Key": "k"}
        for body in (
                b'{"userId":1,"productId":101}',
                b' {"userId": 1,\r\n\t"productId": 101 }\n',
                b'{"productId":101,"userId":1}',
                b'{"quantity":1,"userId":1,"productId":101}',
                b'{"user\\u0049d":1,"productId":101}'):
            with self.subTest(body):
                again = ask(self.shop.orders.server_port, "POST", "/orders", headers, body)
                self.assert_replayed(again, first)

    def test_a_key_may_be_any_printable_ascii_of_1_to_255_characters(self):
        for key in ("k", "K", "k k", "~" * 255, "k" * 255,
                    '"8e03978e-40d5-43dd-bc93-6894a57f9324"', "k,k;k=\\'%00"):
            with self.subTest(key):
                first = self.post(LAPTOPS, Idempotency_Key=key)
                self.assertEqual(first.status, 201)
                self.assert_replayed(self.post(LAPTOPS, Idempotency_Key=key), first)

    def test_an_invalid_key_is_400_and_no_order_is_stored(self):
        before = self.stored()
        for key in NOT_KEYS:
            with self.subTest(key):
                self.assert_is_problem(self.post(LAPTOPS, Idempotency_Key=key), 400)
        self.assertEqual((self.stored(), self.shop.stock()), (before, 100))

    def test_a_key_that_came_with_an_invalid_body_can_still_be_used(self):
        invalid = {**LAPTOPS, "quantity": 0}
        self.assertEqual(self.post(invalid, Idempotency_Key="k").status, 422)
        self.assertEqual(self.post([], Idempotency_Key="k").status, 422)
        answer = self.post(LAPTOPS, Idempotency_Key="k")
        self.assertEqual(answer.status, 201)
        self.assertNotIn("idempotency-replayed", answer.headers)

    def test_a_key_belongs_to_its_order_forever_whatever_the_clock_says(self):
        first = self.post(LAPTOPS, Idempotency_Key="k")
        for days in (-400, -1, 1, 400):
            moment = time.time() + days * 24 * 3600
            clock = mock.Mock(wraps=time, time=lambda moment=moment: moment)
            with self.subTest(days=days), mock.patch.object(orders, "time", clock):
                self.assert_replayed(self.post(LAPTOPS, Idempotency_Key="k"), first)
        self.assertEqual(self.shop.stock(), 97)

    def test_twenty_simultaneous_requests_with_one_key_are_one_order(self):
        for key, content, status in (
                ("k", LAPTOPS, 201), ("short", TOO_MANY, 409), ("absent", NO_SUCH_USER, 422)):
            with self.subTest(key):
                before = len(self.stored())
                answers = together(*[partial(self.post, content, Idempotency_Key=key)] * 20)
                responses = {(answer.status, answer.body) for answer in answers}
                self.assertEqual(responses, {(status, answers[0].body)})
                replayed = [answer.headers.get("idempotency-replayed") for answer in answers]
                self.assertEqual((replayed.count(None), replayed.count("true")), (1, 19))
                self.assertEqual(len(self.stored()), before + 1)
        self.assertEqual((self.shop.stock(101), self.shop.stock(102)), (97, 100))


class UpgradeTest(unittest.TestCase):
    """A database of version 1, in which a reservation has the id of its order."""

    def setUp(self):
        self.path = Path(self.enterContext(tempfile.TemporaryDirectory())) / "orders.db"
        self.old = Database(self.path, orders.SCHEMA[:1])
        self.addCleanup(self.old.close)

    def add(self, status, answer):
        added = self.old.write(
            "INSERT INTO orders (userId, productId, quantity, status, key, placed, since, answer) "
            "VALUES (1, 101, 3, ?, ?, 0, 0, ?)", [status, status, answer])
        return added.lastrowid

    def test_the_reservation_of_an_old_order_has_its_id(self):
        order = self.add("confirmed", None)
        with running(Orders, data=self.path.parent) as service:
            _, reservation = orders.find_order(service.database, order)
            self.assertEqual(reservation, order)

    def test_a_repeated_key_gets_the_present_state_of_an_order_whose_response_was_a_202(self):
        accepted = '[202,{"id":203,"status":"pending"}]'
        found = {self.add(status, accepted): status for status in ("pending", "cancelled")}
        with running(Orders, data=self.path.parent) as service:
            for order, status in found.items():
                answer = ask(service.server_port, "POST", "/orders",
                             {**JSON, "Idempotency-Key": status}, json.dumps(LAPTOPS).encode())
                self.assertEqual((answer.status, answer.json),
                                 (202, {"id": order, **LAPTOPS, "status": status}))
                self.assertEqual("retry-after" in answer.headers, status == "pending")


if __name__ == "__main__":
    unittest.main()
