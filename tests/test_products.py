"""The products service, as its clients see it."""
import tempfile
import unittest
from functools import partial
from pathlib import Path

from microshop.chassis.database import Database
from microshop.products import SCHEMA, Products
from tests.collection import WritableCollectionTests, simultaneous_transactions
from tests.helpers import Shop, running, together

MOST = 2**53 - 1  # the largest integer that every JSON client can hold
NOT_STOCKS = (True, 1.5, 1e-2, "1", None, [1], {}, -1, MOST + 1)


class ProductsTest(WritableCollectionTests, unittest.TestCase):
    service, path = Products, "/products"
    summaries = [{"id": 101, "name": "Laptop"}, {"id": 102, "name": "Mouse"}]
    item = {"id": 101, "name": "Laptop", "stock": 100}
    insert = "INSERT INTO products VALUES (?, 'Lamp', 5, 5)"
    content = {"name": "Lamp", "stock": 5}
    replaced = ["name", "stock"]
    wrong = [
        *(({"name": "Lamp", "stock": stock}, ["stock"]) for stock in NOT_STOCKS),
        ({"name": "", "stock": -1, "colour": "red"}, ["colour", "name", "stock"])]

    def test_the_stock_of_a_new_product_is_0_if_it_is_left_out(self):
        self.assertEqual(self.ask("POST", "/products", {"name": "Lamp"}).json["stock"], 0)

    def test_a_product_is_not_replaced_if_the_stock_is_left_out(self):
        answer = self.ask("PUT", "/products/101", {"name": "Laptop"})
        self.assertEqual(answer.status, 422, answer.body)
        self.assertEqual([error["field"] for error in answer.json["errors"]], ["stock"])
        self.assertEqual(self.get("/products/101").json, self.item)

    def test_the_stock_may_be_any_integer_that_json_clients_can_hold(self):
        for stock in (0, MOST):
            with self.subTest(stock=stock):
                answer = self.ask("POST", "/products", {"name": "Sand", "stock": stock})
                self.assertEqual(answer.status, 201)
                self.assertEqual(self.get(answer.headers["location"]).json["stock"], stock)

    def test_the_fields_of_an_answer_are_in_order_whatever_the_order_in_the_request(self):
        answer = self.ask("POST", "/products", {"stock": 5, "name": "Lamp"})
        self.assertEqual(list(answer.json), ["id", "name", "stock"])


class ReservationTest(unittest.TestCase):
    """Each test ends with a check that every unit supplied is either free or reserved."""

    def setUp(self):
        self.server = self.enterContext(running(Products))
        self.shop = Shop(None, self.server, None)

    def tearDown(self):
        wrong = self.server.database.rows("""
            SELECT products.id, stock, supplied, total(quantity) AS reserved
            FROM products LEFT JOIN reservations ON productId = products.id
            GROUP BY products.id HAVING stock < 0 OR supplied != stock + reserved""")
        self.assertEqual(wrong, [], "products whose supply is not stock plus reservations")

    def reserve(self, reservation, quantity=1, product=101):
        content = {"productId": product, "quantity": quantity}
        return self.shop.ask("PUT", f"/reservations/{reservation}", content)

    def release(self, reservation):
        return self.shop.ask("DELETE", f"/reservations/{reservation}")

    def delete(self, product):
        return self.shop.ask("DELETE", f"/products/{product}")

    def add_lamp(self, stock):
        """Add a product; return its id."""
        return self.shop.ask("POST", "/products", {"name": "Lamp", "stock": stock}).json["id"]

    def put_stock(self, stock, **headers):
        laptop = {"name": "Laptop", "stock": stock}
        return self.shop.ask("PUT", "/products/101", laptop, **headers)

    def assert_refused(self, answer, status, detail, stock):
        """Check that an answer is a problem, and the stock of product 101."""
        self.assertEqual(answer.status, status, answer.body)
        self.assertEqual(answer.headers["content-type"], "application/problem+json")
        self.assertIn(detail, answer.json["detail"])
        self.assertEqual(self.shop.stock(), stock, "the stock of product 101")

    def assert_statuses(self, answers, expected):
        self.assertEqual(sorted(answer.status for answer in answers), expected)

    def test_the_demo_orders_have_their_reservations(self):
        for reservation, product in ((201, 101), (202, 102)):
            with self.subTest(reservation=reservation):
                self.assertEqual(self.shop.stock(product), 100)
                self.assertEqual(self.reserve(reservation, 1, product).status, 200)
                self.release(reservation)
                self.assertEqual(self.shop.stock(product), 101)

    def test_a_repeated_reserve_takes_the_units_once(self):
        for status in (201, 200, 200):
            answer = self.reserve(7, 30)
            reservation = {"id": 7, "productId": 101, "quantity": 30}
            self.assertEqual((answer.status, answer.json), (status, reservation),
                             "PUT /reservations/7, sent three times: 201, then 200")
            self.assertEqual(self.shop.stock(), 70)

    def test_a_reservation_cannot_be_changed_to_another_product_or_quantity(self):
        self.reserve(7, 30)
        for quantity, product in ((29, 101), (31, 101), (30, 102), (30, 999)):
            with self.subTest(quantity=quantity, product=product):
                answer = self.reserve(7, quantity, product)
                self.assert_refused(answer, 409, "was already made for something else", 70)
        self.assertEqual(self.shop.stock(102), 100)

    def test_a_reserve_beyond_the_stock_is_refused_and_a_smaller_one_may_follow(self):
        self.assert_refused(self.reserve(7, 101), 409, "has 100 of 101 units left", 100)
        self.assert_refused(self.reserve(7, MOST), 409, "units left", 100)
        self.assertEqual(self.reserve(7, 100).status, 201)
        self.assert_refused(self.reserve(8, 1), 409, "has 0 of 1 units left", 0)

    def test_only_a_refusal_for_the_stock_says_how_many_units_are_available(self):
        self.assertEqual(self.reserve(7, 101).json["available"], 100)
        self.reserve(7, 1)
        self.release(8)
        for reservation, quantity in ((7, 2), (7, 1000), (8, 1), (8, 1000)):
            with self.subTest(reservation=reservation, quantity=quantity):
                answer = self.reserve(reservation, quantity)
                self.assertEqual(answer.status, 409)
                self.assertNotIn("available", answer.json, "this is about the reservation's id")

    def test_a_reserve_of_a_product_that_does_not_exist_is_422(self):
        answer = self.reserve(7, 1, 999)
        detail = "there is no product 999"
        self.assert_refused(answer, 422, detail, 100)
        self.assertEqual(answer.json["errors"], [{"field": "productId", "detail": detail}])
        self.assertEqual(self.reserve(7).status, 201, "the refused one must leave no trace")

    def test_a_repeated_release_gives_the_units_back_once(self):
        self.reserve(7, 30)
        for _ in range(3):
            answer = self.release(7)
            self.assertEqual((answer.status, answer.body, self.shop.stock()), (204, b"", 100))

    def test_a_released_reservation_cannot_be_made_again(self):
        self.reserve(7, 30)
        self.release(7)
        for quantity in (30, 1):
            self.assert_refused(self.reserve(7, quantity), 409, "was released before", 100)

    def test_a_reserve_that_arrives_after_its_release_is_refused(self):
        self.assertEqual(self.release(7).status, 204)
        late = self.reserve(7)
        self.assertEqual(late.status, 409, "PUT /reservations/7, after DELETE /reservations/7")
        self.assert_refused(late, 409, "was released before", 100)
        self.release(7)
        self.assertEqual(self.shop.stock(), 100)

    def test_a_product_with_reservations_cannot_be_deleted(self):
        lamp = self.add_lamp(5)
        self.reserve(7, 2, lamp)
        self.assert_refused(self.delete(lamp), 409, f"product {lamp} has reservations", 100)
        self.assertEqual(self.shop.stock(lamp), 3)
        self.release(7)
        self.assertEqual(self.delete(lamp).status, 204)
        self.assertEqual(self.release(7).status, 204)
        self.assertEqual(self.reserve(8, 1, lamp).status, 422)

    def test_a_reservation_changes_the_etag_of_its_product(self):
        seen = self.shop.ask("GET", "/products/101").headers["etag"]
        self.reserve(7, 30)
        answer = self.put_stock(150, If_Match=seen)
        self.assert_refused(answer, 412, "fetch it again and retry", 70)
        self.assertEqual(self.shop.ask("GET", "/products/101", If_None_Match=seen).status, 200)

    def test_a_new_stock_leaves_reserved_units_alone(self):
        self.reserve(7, 30)
        self.assertEqual(self.put_stock(5).json["stock"], 5)
        self.assert_refused(self.reserve(8, 6), 409, "has 5 of 6 units left", 5)
        self.release(7)
        self.assertEqual(self.shop.stock(), 35)

    def test_the_stock_is_limited_so_that_released_units_always_fit(self):
        self.reserve(7, 30)  # and one unit is reserved already
        answer = self.put_stock(MOST - 30)
        detail = f"must be at most {MOST - 31} while 31 units are reserved"
        self.assert_refused(answer, 422, detail, 70)
        self.assertEqual([error["field"] for error in answer.json["errors"]], ["stock"])
        self.assertEqual(self.put_stock(MOST - 31).status, 200)
        for reservation in (7, 201):
            self.release(reservation)
        self.assertEqual(self.shop.stock(), MOST)

    def test_an_invalid_reservation_is_422_and_names_every_wrong_field_at_once(self):
        for wrong in (0, *NOT_STOCKS):
            for quantity, product, fields in (
                    (wrong, 101, ["quantity"]), (1, wrong, ["productId"]),
                    (wrong, wrong, ["productId", "quantity"])):
                with self.subTest(quantity=quantity, product=product):
                    answer = self.reserve(7, quantity, product)
                    self.assert_refused(answer, 422, "must be an integer from 1 to", 100)
                    self.assertEqual([error["field"] for error in answer.json["errors"]], fields)
        answer = self.shop.ask("PUT", "/reservations/7", {"id": 7})
        fields = [error["field"] for error in answer.json["errors"]]
        self.assertEqual(fields, ["productId", "quantity", "id"])

    def test_the_id_of_a_reservation_may_be_any_that_json_clients_can_hold(self):
        self.assertEqual(self.reserve(MOST).status, 201)
        self.assert_refused(self.reserve(MOST + 1), 404, f"/reservations/{MOST + 1}", 99)
        self.assertEqual(self.release(MOST + 1).status, 404)

    def test_twenty_simultaneous_buyers_get_no_more_units_than_there_are(self):
        lamp = self.add_lamp(7)
        with simultaneous_transactions(self.server.database, 20):
            answers = together(
                *[partial(self.reserve, number, 1, lamp) for number in range(1001, 1021)])
        self.assert_statuses(answers, [201] * 7 + [409] * 13)
        self.assertEqual(self.shop.stock(lamp), 0)

    def test_twenty_simultaneous_reserves_with_one_id_take_the_units_once(self):
        with simultaneous_transactions(self.server.database, 20):
            answers = together(*[partial(self.reserve, 7, 30)] * 20)
        self.assert_statuses(answers, [200] * 19 + [201])
        self.assertEqual(self.shop.stock(), 70)

    def test_simultaneous_reserves_and_releases_with_one_id_leave_it_released(self):
        ids = (7, 8, 9, 10)
        for number in ids[:2]:
            self.reserve(number, 30)
        with simultaneous_transactions(self.server.database, 24):
            answers = together(*[partial(self.reserve, number, 30) for number in ids] * 3,
                               *[partial(self.release, number) for number in ids] * 3)
        reserved, released = answers[:12], answers[12:]
        self.assertLessEqual({answer.status for answer in reserved}, {200, 201, 409})
        self.assert_statuses(released, [204] * 12)
        self.assertEqual(self.shop.stock(), 100)
        for number in ids:
            self.assert_refused(self.reserve(number, 30), 409, "was released before", 100)

    def test_a_product_is_never_both_deleted_and_reserved_by_simultaneous_requests(self):
        lamps = [self.add_lamp(5) for _ in range(8)]
        with simultaneous_transactions(self.server.database, 16):
            answers = together(
                *[partial(self.delete, lamp) for lamp in lamps],
                *[partial(self.reserve, 1000 + lamp, 2, lamp) for lamp in lamps])
        for deleted, reserved in zip(answers[:8], answers[8:], strict=True):
            self.assertIn((deleted.status, reserved.status), {(204, 422), (409, 201)})


class UpgradeTest(unittest.TestCase):
    def test_reservations_of_version_1_are_kept(self):
        with tempfile.TemporaryDirectory() as folder:
            Database(Path(folder) / "products.db", SCHEMA[:1]).close()
            with running(Products, data=Path(folder)) as server:
                content = {"productId": 101, "quantity": 1}
                answer = Shop(None, server, None).ask("PUT", "/reservations/201", content)
                self.assertEqual((answer.status, answer.json), (200, {"id": 201, **content}))


if __name__ == "__main__":
    unittest.main()
