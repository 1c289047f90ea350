"""The products service, as its clients see it."""
import unittest
from functools import partial

from microshop.products import Products
from tests.collection import WritableCollectionTests, meeting
from tests.helpers import Shop, running, together

MOST = 2**53 - 1  # the largest integer that every JSON client can hold
NO_INTEGERS = (True, 1.0, 1e2, "1", None, [1], {}, -1, MOST + 1)


class ProductsTest(WritableCollectionTests, unittest.TestCase):
    service, path = Products, "/products"
    summaries = [{"id": 101, "name": "Laptop"}, {"id": 102, "name": "Mouse"}]
    item = {"id": 101, "name": "Laptop", "stock": 100}
    content = {"name": "Lamp", "stock": 5}
    wrong = [*(({"name": "Lamp", "stock": stock}, ["stock"]) for stock in NO_INTEGERS),
             ({"name": "", "stock": -1, "colour": "red"}, ["colour", "name", "stock"])]
    insert = "INSERT INTO products VALUES (?, 'Lamp', 5, 5)"

    def test_stock_is_zero_unless_told(self):
        self.assertEqual(self.ask("POST", "/products", {"name": "Lamp"}).json["stock"], 0)
        self.assertEqual(self.ask("PUT", "/products/101", {"name": "Laptop"}).json["stock"], 0)
        self.assertEqual(self.get("/products/101").json["stock"], 0)

    def test_stock_goes_up_to_what_a_client_can_hold(self):
        for stock in (0, MOST):
            answer = self.ask("POST", "/products", {"name": "Sand", "stock": stock})
            self.assertEqual((answer.status, self.get(answer.headers["location"]).json["stock"]), (201, stock))

    def test_fields_come_in_the_same_order_whatever_the_clients(self):
        answer = self.ask("POST", "/products", {"stock": 5, "name": "Lamp"})
        self.assertEqual(list(answer.json), ["id", "name", "stock"])


class ReservationTest(unittest.TestCase):
    """Whatever is done to them, what was supplied is free or reserved."""

    def setUp(self):
        self.server = self.enterContext(running(Products))
        self.shop = Shop(None, self.server, None)

    def tearDown(self):
        self.assertEqual(self.server.database.rows("""
            SELECT id, stock, supplied, (SELECT total(quantity) FROM reservations WHERE productId = id) AS reserved
            FROM products WHERE stock < 0 OR supplied != stock + reserved"""), [])

    def reserve(self, order, quantity=1, product=101):
        return self.shop.ask("PUT", f"/reservations/{order}", {"productId": product, "quantity": quantity})

    def release(self, order):
        return self.shop.ask("DELETE", f"/reservations/{order}")

    def add(self, stock):
        return self.shop.ask("POST", "/products", {"name": "Lamp", "stock": stock}).json["id"]

    def put_stock(self, stock, **headers):
        return self.shop.ask("PUT", "/products/101", {"name": "Laptop", "stock": stock}, **headers)

    def assert_refused(self, answer, status, detail, stock):
        self.assertEqual((answer.status, answer.headers["content-type"]), (status, "application/problem+json"))
        self.assertIn(detail, answer.json["detail"])
        self.assertEqual(self.shop.stock(), stock)

    def test_the_seeds_orders_have_their_reservations(self):
        for order, product in ((201, 101), (202, 102)):
            self.assertEqual(self.shop.stock(product), 100)
            self.assertEqual(self.reserve(order, 1, product).status, 200)
            self.release(order)
            self.assertEqual(self.shop.stock(product), 101)

    def test_units_are_taken_once_however_often_it_is_said(self):
        for status in (201, 200, 200):
            answer = self.reserve(7, 30)
            self.assertEqual((answer.status, answer.json), (status, {"orderId": 7, "productId": 101, "quantity": 30}))
            self.assertEqual(self.shop.stock(), 70)

    def test_an_order_reserves_one_thing(self):
        self.reserve(7, 30)
        for quantity, product in ((29, 101), (31, 101), (30, 102), (30, 999)):
            with self.subTest(quantity=quantity, product=product):
                self.assert_refused(self.reserve(7, quantity, product), 409, "something else", 70)
        self.assertEqual(self.shop.stock(102), 100)

    def test_a_short_stock_is_not_touched_and_less_may_be_asked_for(self):
        self.assert_refused(self.reserve(7, 101), 409, "has 100 of 101 units left", 100)
        self.assert_refused(self.reserve(7, MOST), 409, "units left", 100)
        self.assertEqual(self.reserve(7, 100).status, 201)
        self.assert_refused(self.reserve(8, 1), 409, "has 0 of 1 units left", 0)

    def test_a_product_that_is_not_there_is_422_and_named(self):
        answer = self.reserve(7, 1, 999)
        self.assert_refused(answer, 422, "there is no product 999", 100)
        self.assertEqual(answer.json["errors"], [{"field": "productId", "detail": "there is no product 999"}])
        self.assertEqual(self.reserve(7).status, 201)  # nothing was noted

    def test_units_are_given_back_once_however_often_it_is_said(self):
        self.reserve(7, 30)
        for _ in range(3):
            answer = self.release(7)
            self.assertEqual((answer.status, answer.body, self.shop.stock()), (204, b"", 100))

    def test_what_was_released_is_not_reserved_again(self):
        self.reserve(7, 30)
        self.release(7)
        for quantity in (30, 1):
            self.assert_refused(self.reserve(7, quantity), 409, "released before", 100)

    def test_a_release_that_comes_before_its_reserve_wins(self):
        self.assertEqual(self.release(7).status, 204)
        self.assert_refused(self.reserve(7), 409, "released before", 100)
        self.release(7)
        self.assertEqual(self.shop.stock(), 100)

    def test_a_product_with_reservations_cannot_be_deleted(self):
        lamp = self.add(5)
        self.reserve(7, 2, lamp)
        self.assert_refused(self.shop.ask("DELETE", f"/products/{lamp}"), 409, f"product {lamp} has reservations", 100)
        self.assertEqual(self.shop.stock(lamp), 3)
        self.release(7)
        self.assertEqual(self.shop.ask("DELETE", f"/products/{lamp}").status, 204)
        self.assertEqual(self.release(7).status, 204)
        self.assertEqual(self.reserve(8, 1, lamp).status, 422)

    def test_a_reservation_changes_the_products_tag(self):
        seen = self.shop.ask("GET", "/products/101").headers["etag"]
        self.reserve(7, 30)
        self.assert_refused(self.put_stock(150, If_Match=seen), 412, "get it again", 70)
        self.assertEqual(self.shop.ask("GET", "/products/101", If_None_Match=seen).status, 200)

    def test_new_stock_leaves_what_is_reserved_alone(self):
        self.reserve(7, 30)
        self.assertEqual(self.put_stock(5).json["stock"], 5)
        self.assert_refused(self.reserve(8, 6), 409, "has 5 of 6 units left", 5)
        self.release(7)
        self.assertEqual(self.shop.stock(), 35)

    def test_there_is_always_room_for_what_is_released(self):
        self.reserve(7, 30)  # and order 201 has one
        answer = self.put_stock(MOST - 30)
        self.assert_refused(answer, 422, f"{MOST - 31} at most while 31 units are reserved", 70)
        self.assertEqual([error["field"] for error in answer.json["errors"]], ["stock"])
        self.assertEqual(self.put_stock(MOST - 31).status, 200)
        for order in (7, 201):
            self.release(order)
        self.assertEqual(self.shop.stock(), MOST)

    def test_every_field_that_is_wrong_is_named_at_once(self):
        for wrong in (0, *NO_INTEGERS):
            with self.subTest(wrong):
                for quantity, product, fields in ((wrong, 101, ["quantity"]), (1, wrong, ["productId"]),
                                                  (wrong, wrong, ["productId", "quantity"])):
                    answer = self.reserve(7, quantity, product)
                    self.assert_refused(answer, 422, "must be an integer from 1 to", 100)
                    self.assertEqual([error["field"] for error in answer.json["errors"]], fields)
        answer = self.shop.ask("PUT", "/reservations/7", {"orderId": 7})
        self.assertEqual([error["field"] for error in answer.json["errors"]], ["orderId", "productId", "quantity"])

    def test_an_orders_id_is_one_that_every_client_can_hold(self):
        self.assertEqual(self.reserve(MOST).status, 201)
        self.assert_refused(self.reserve(MOST + 1), 404, f"/reservations/{MOST + 1}", 99)
        self.assertEqual(self.release(MOST + 1).status, 404)

    def test_twenty_buyers_of_the_last_units_get_no_more_than_there_are(self):
        lamp = self.add(7)
        with meeting(self.server.database, 20):
            answers = together(*(partial(self.reserve, order, 1, lamp) for order in range(1001, 1021)))
        self.assertEqual(sorted(answer.status for answer in answers), [201] * 7 + [409] * 13)
        self.assertEqual(self.shop.stock(lamp), 0)

    def test_twenty_that_reserve_for_one_order_take_its_units_once(self):
        with meeting(self.server.database, 20):
            answers = together(*[partial(self.reserve, 7, 30)] * 20)
        self.assertEqual(sorted(answer.status for answer in answers), [200] * 19 + [201])
        self.assertEqual(self.shop.stock(), 70)

    def test_reserves_and_releases_of_one_order_that_race_end_released(self):
        orders = (7, 8, 9, 10)
        for order in orders[:2]:
            self.reserve(order, 30)
        with meeting(self.server.database, 24):
            answers = together(*[partial(self.reserve, order, 30) for order in orders] * 3,
                               *[partial(self.release, order) for order in orders] * 3)
        self.assertLessEqual({answer.status for answer in answers[:12]}, {200, 201, 409})
        self.assertEqual([answer.status for answer in answers[12:]], [204] * 12)
        self.assertEqual(self.shop.stock(), 100)
        for order in orders:
            self.assert_refused(self.reserve(order, 30), 409, "released before", 100)

    def test_a_product_is_deleted_or_reserved_but_not_both(self):
        lamps = [self.add(5) for _ in range(8)]
        with meeting(self.server.database, 16):
            answers = together(*(partial(self.shop.ask, "DELETE", f"/products/{lamp}") for lamp in lamps),
                               *(partial(self.reserve, 1000 + lamp, 2, lamp) for lamp in lamps))
        for deleted, reserved in zip(answers[:8], answers[8:], strict=True):
            self.assertIn((deleted.status, reserved.status), {(204, 422), (409, 201)})


if __name__ == "__main__":
    unittest.main()
