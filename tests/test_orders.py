"""The orders service, as its clients see it while all it needs is there. When it is not: test_saga.py."""
import time
import unittest
from functools import partial
from unittest import mock

from microshop import orders
from microshop.orders import Orders
from tests.collection import CollectionTests
from tests.helpers import ask, running_moody_shop, running_shop, together, wait_until

MOST = 2**53 - 1  # the largest integer that every JSON client can hold
NO_INTEGERS = (True, 1.0, 1e2, "1", None, [1], {}, 0, -1, MOST + 1)
LAPTOPS = {"userId": 1, "productId": 101, "quantity": 3}
SHORT = {"userId": 2, "productId": 102, "quantity": 101}
NOBODYS = {"userId": 9, "productId": 101, "quantity": 1}
NO_KEYS = ("", " ", "k" * 256, "caf\xe9", "a\tb", "a\x7fb")


class OrdersTest(CollectionTests, unittest.TestCase):
    service, path = Orders, "/orders"
    summaries = [{"id": 201, "userId": 1, "productId": 101}, {"id": 202, "userId": 2, "productId": 102}]
    item = {"id": 201, "userId": 1, "productId": 101, "quantity": 1, "status": "confirmed"}
    insert = ("INSERT INTO orders (id, userId, productId, quantity, status, placed, since) "
              "VALUES (?, 1, 101, 3, 'pending', 0, 0)")

    def reject(self, order_id, reason):
        with self.server.database.transaction() as connection:
            connection.execute("UPDATE orders SET status = 'rejected', reason = ? WHERE id = ?", [reason, order_id])

    def test_a_rejected_order_is_listed_only_when_asked_for(self):
        self.reject(201, "stock is short")
        self.assertEqual(self.get("/orders").json, self.summaries[1:])
        self.assertEqual(self.get("/orders?ids=201,202").json, self.summaries[1:])
        self.assertEqual(self.get("/orders?status=rejected").json, self.summaries[:1])
        self.assertEqual(self.get("/orders/201").json, {**self.item, "status": "rejected", "reason": "stock is short"})

    def test_a_status_chooses_orders_page_by_page(self):
        self.add_rows(3)
        answer = self.get("/orders?status=pending&limit=2")
        self.assertEqual([order["id"] for order in answer.json], [1001, 1002])
        self.assertEqual(answer.headers["link"], '</orders?status=pending&limit=2&after=1002>; rel="next"')
        self.assertEqual(self.get("/orders?status=confirmed").json, self.summaries)

    def test_no_page_reads_past_the_orders_of_another_status(self):
        self.assertIn("orders_by_status (status=? AND rowid>?)", self.plan_of("/orders?status=pending&after=5"))
        self.assertIn("orders_not_rejected (", self.plan_of("/orders?after=5"))

    def test_an_unknown_status_is_400_and_named(self):
        for status in ("lost", "", "CONFIRMED"):
            answer = self.get(f"/orders?status={status}")
            self.assertEqual(answer.status, 400)
            self.assertIn("status", answer.json["detail"])


class ShopTest(unittest.TestCase):
    def setUp(self):
        self.shop = self.enterContext(running_shop())

    def post(self, content, **headers):
        return self.shop.ask("POST", "/orders", content, **headers)

    def cancel(self, order):
        return self.shop.ask("POST", f"/orders/{order}/cancel")

    def listed(self, query=""):
        return [order["id"] for order in self.shop.ask("GET", f"/orders{query}").json]

    def stored(self):
        """Return all that was written for orders."""
        return self.shop.orders.database.rows("SELECT * FROM orders")

    def assert_is_problem(self, answer, status, *fields):
        self.assertEqual((answer.status, answer.json["status"]), (status, status))
        self.assertEqual(answer.headers["content-type"], "application/problem+json")
        self.assertEqual([error["field"] for error in answer.json.get("errors", [])], list(fields))


class Placing(ShopTest):
    def test_an_order_is_confirmed_and_its_units_are_taken(self):
        answer = self.post(LAPTOPS)
        self.assertEqual((answer.status, answer.json), (201, {"id": 203, **LAPTOPS, "status": "confirmed"}))
        self.assertEqual(answer.headers["location"], "/orders/203")
        self.assertNotIn("retry-after", answer.headers)
        self.assertEqual(self.shop.ask("GET", "/orders/203").body, answer.body)
        self.assertEqual(self.listed(), [201, 202, 203])
        self.assertEqual((self.shop.stock(101), self.shop.stock(102)), (97, 100))

    def test_one_unit_is_ordered_where_no_quantity_is_said(self):
        self.assertEqual(self.post({"userId": 2, "productId": 102}).json["quantity"], 1)
        self.assertEqual(self.shop.stock(102), 99)

    def test_the_last_unit_can_be_ordered_and_then_no_more(self):
        self.assertEqual(self.post({**LAPTOPS, "quantity": 100}).status, 201)
        self.assertEqual(self.post({**LAPTOPS, "quantity": 1}).status, 409)
        self.assertEqual(self.shop.stock(), 0)

    def test_without_a_key_each_is_a_new_order(self):
        self.assertEqual([self.post(LAPTOPS).headers["location"] for _ in range(3)],
                         ["/orders/203", "/orders/204", "/orders/205"])
        self.assertEqual(self.shop.stock(), 91)

    def test_every_field_that_is_wrong_is_named_at_once_and_nothing_is_written(self):
        before = self.stored()
        for content, *fields in (
                ({}, "userId", "productId"), ({"userId": 1, "quantity": 0, "id": 7}, "id", "productId", "quantity"),
                ({"userid": 1, "status": "confirmed", **LAPTOPS}, "userid", "status"),
                ({"userId": "1", "productId": 1.5, "quantity": []}, "userId", "productId", "quantity"),
                *(({**LAPTOPS, name: value}, name) for name in LAPTOPS for value in NO_INTEGERS),
                *((content, "body") for content in ([LAPTOPS], [], "order", 1, False))):
            with self.subTest(content=content):
                self.assert_is_problem(self.post(content), 422, *fields)
                self.assertEqual(self.stored(), before)

    def test_the_largest_numbers_make_sense(self):
        self.assertEqual(self.post({**LAPTOPS, "quantity": MOST}).status, 409)
        self.assert_is_problem(self.post({**LAPTOPS, "productId": MOST}), 422, "productId")
        self.assert_is_problem(self.post({**LAPTOPS, "userId": MOST}), 422, "userId")

    def test_an_order_that_cannot_be_met_is_rejected_and_says_why(self):
        for order, status, reason, *fields in (
                (SHORT, 409, "product 102 has 100 of 101 units left"),
                ({**LAPTOPS, "productId": 999}, 422, "productId: there is no product 999", "productId"),
                (NOBODYS, 422, "userId: there is no user 9", "userId"),
                ({"userId": 9, "productId": 999}, 422, "userId: there is no user 9", "userId")):
            with self.subTest(order=order):
                answer = self.post(order)
                self.assert_is_problem(answer, status, *fields)
                self.assertEqual((answer.json["detail"], answer.json["type"]), (reason, "about:blank"))
                self.assertEqual(answer.json["requestId"], answer.headers["x-request-id"])
                kept = self.shop.ask("GET", answer.headers["location"]).json
                self.assertEqual(kept, {"quantity": 1, **order, "id": kept["id"], "status": "rejected",
                                        "reason": reason})
                self.assertEqual(answer.json["order"], kept)
        self.assertEqual((self.listed(), self.listed("?status=rejected")), ([201, 202], [203, 204, 205, 206]))
        self.assertEqual((self.shop.stock(101), self.shop.stock(102)), (100, 100))


class Cancelling(ShopTest):
    def test_a_confirmed_order_is_cancelled_and_its_units_come_back_once(self):
        self.post(LAPTOPS)
        for _ in range(3):
            answer = self.cancel(203)
            self.assertEqual((answer.status, answer.json), (200, {"id": 203, **LAPTOPS, "status": "cancelled"}))
            self.assertEqual(self.shop.stock(), 100)
        self.assertEqual((self.listed(), self.listed("?status=cancelled")), ([201, 202, 203], [203]))

    def test_an_order_of_the_seed_can_be_cancelled_too(self):
        self.assertEqual(self.cancel(201).status, 200)
        self.assertEqual(self.shop.stock(), 101)

    def test_a_rejected_order_cannot_be_cancelled(self):
        self.post(SHORT)
        answer = self.cancel(203)
        self.assert_is_problem(answer, 409)
        self.assertIn("rejected", answer.json["detail"])
        self.assertNotIn("retry-after", answer.headers)
        self.assertEqual(self.shop.status(203), "rejected")

    def test_what_was_never_ordered_cannot_be_cancelled(self):
        for order in (203, 999, MOST, MOST + 1):
            self.assert_is_problem(self.cancel(order), 404)

    def test_twenty_cancel_at_once_and_the_units_come_back_once(self):
        self.post(LAPTOPS)
        answers = together(*[partial(self.cancel, 203)] * 20)
        self.assertLessEqual({answer.status for answer in answers}, {200, 202})
        wait_until(lambda: self.shop.status(203) == "cancelled")
        self.assertEqual(self.shop.stock(), 100)


class IdempotencyKeys(ShopTest):
    def assert_replayed(self, again, first):
        self.assertEqual((again.status, again.body), (first.status, first.body))
        for name in ("location", "content-type", "retry-after"):
            self.assertEqual(again.headers.get(name), first.headers.get(name))
        self.assertEqual(again.headers.get("idempotency-replayed"), "true")
        self.assertNotIn("idempotency-replayed", first.headers)

    def test_the_same_key_is_told_the_same_whatever_became_of_the_order_and_after_a_restart_too(self):
        contents = {"confirmed": LAPTOPS, "short": SHORT, "nobody's": NOBODYS}
        first = {key: self.post(content, Idempotency_Key=key) for key, content in contents.items()}
        self.assertEqual([answer.status for answer in first.values()], [201, 409, 422])

        def assert_all_are_replayed():
            for key, content in contents.items():
                with self.subTest(key):
                    self.assert_replayed(self.post(content, Idempotency_Key=key), first[key])

        assert_all_are_replayed()
        self.assertEqual((len(self.stored()), self.shop.stock()), (5, 97))
        self.shop.ask("PUT", "/products/102", {"name": "Mouse", "stock": 1000})
        self.cancel(203)
        assert_all_are_replayed()
        with self.shop.with_orders_restarted() as self.shop:
            assert_all_are_replayed()
            self.assertEqual((self.shop.status(203), len(self.stored())), ("cancelled", 5))

    def test_who_was_told_pending_is_told_so_again_whatever_became_of_the_order(self):
        with running_moody_shop() as (self.shop, users, _):
            users.mood = b""
            first = self.post(LAPTOPS, Idempotency_Key="k")
            self.assertEqual((first.status, first.json["status"]), (202, "pending"))
            self.assert_replayed(self.post(LAPTOPS, Idempotency_Key="k"), first)
            users.mood = "well"
            wait_until(lambda: self.shop.status(203) == "confirmed")
            self.assert_replayed(self.post(LAPTOPS, Idempotency_Key="k"), first)
            self.assertEqual(self.cancel(203).status, 200)
            self.assert_replayed(self.post(LAPTOPS, Idempotency_Key="k"), first)
            self.assertEqual(self.listed(), [201, 202, 203])
            with self.shop.with_orders_restarted() as self.shop:
                self.assert_replayed(self.post(LAPTOPS, Idempotency_Key="k"), first)

    def test_another_body_is_refused(self):
        first = self.post(LAPTOPS, Idempotency_Key="k")
        before = self.stored()
        for name in LAPTOPS:
            answer = self.post({**LAPTOPS, name: 2}, Idempotency_Key="k")
            self.assert_is_problem(answer, 422, "Idempotency-Key")
            self.assertNotIn("idempotency-replayed", answer.headers)
        self.assertEqual((self.stored(), self.shop.stock()), (before, 97))
        self.assert_replayed(self.post(LAPTOPS, Idempotency_Key="k"), first)

    def test_the_same_order_is_the_same_however_it_is_written(self):
        first = self.post({"userId": 1, "productId": 101}, Idempotency_Key="k")
        for body in (b'{"userId":1,"productId":101}', b' {"userId": 1,\r\n\t"productId": 101 }\n',
                     b'{"productId":101,"userId":1}', b'{"quantity":1,"userId":1,"productId":101}',
                     b'{"user\\u0049d":1,"productId":101}'):
            with self.subTest(body):
                headers = {"Content-Type": "application/json", "Idempotency-Key": "k"}
                self.assert_replayed(ask(self.shop.orders.server_port, "POST", "/orders", headers, body), first)

    def test_a_key_is_any_printable_text_of_1_to_255_characters(self):
        for key in ("k", "K", "k k", "~" * 255, "k" * 255, '"8e03978e-40d5-43dd-bc93-6894a57f9324"', "k,k;k=\\'%00"):
            with self.subTest(key):
                first = self.post(LAPTOPS, Idempotency_Key=key)
                self.assertEqual(first.status, 201)
                self.assert_replayed(self.post(LAPTOPS, Idempotency_Key=key), first)

    def test_what_is_no_key_is_refused_and_nothing_is_written(self):
        before = self.stored()
        for key in NO_KEYS:
            with self.subTest(key):
                self.assert_is_problem(self.post(LAPTOPS, Idempotency_Key=key), 400)
        self.assertEqual((self.stored(), self.shop.stock()), (before, 100))

    def test_a_key_that_came_with_nonsense_first_can_still_be_used(self):
        self.assertEqual(self.post({**LAPTOPS, "quantity": 0}, Idempotency_Key="k").status, 422)
        self.assertEqual(self.post([], Idempotency_Key="k").status, 422)
        answer = self.post(LAPTOPS, Idempotency_Key="k")
        self.assertEqual(answer.status, 201)
        self.assertNotIn("idempotency-replayed", answer.headers)

    def test_a_key_is_free_again_after_a_day(self):
        def post_later(seconds, content):
            with mock.patch.object(orders, "time", mock.Mock(wraps=time, time=lambda: time.time() + seconds)):
                return self.post(content, Idempotency_Key="k")

        first = self.post(LAPTOPS, Idempotency_Key="k")
        almost, day = 24 * 3600 - 60, 24 * 3600 + 60
        self.assert_replayed(post_later(almost, LAPTOPS), first)
        self.assert_is_problem(post_later(almost, SHORT), 422, "Idempotency-Key")
        second = post_later(day, {**LAPTOPS, "quantity": 5})
        self.assertEqual((second.status, second.json["id"]), (201, 204))
        self.assert_replayed(post_later(day + almost, {**LAPTOPS, "quantity": 5}), second)
        self.assertEqual((self.shop.status(203), self.shop.stock()), ("confirmed", 92))

    def test_twenty_twins_at_the_same_instant_are_one_order(self):
        for key, content, status in (("k", LAPTOPS, 201), ("short", SHORT, 409), ("nobody's", NOBODYS, 422)):
            before = len(self.stored())
            answers = together(*[partial(self.post, content, Idempotency_Key=key)] * 20)
            with self.subTest(key):
                self.assertEqual({(answer.status, answer.body) for answer in answers}, {(status, answers[0].body)})
                replayed = [answer.headers.get("idempotency-replayed") for answer in answers]
                self.assertEqual((replayed.count(None), replayed.count("true")), (1, 19))
                self.assertEqual(len(self.stored()), before + 1)
        self.assertEqual((self.shop.stock(101), self.shop.stock(102)), (97, 100))


if __name__ == "__main__":
    unittest.main()
