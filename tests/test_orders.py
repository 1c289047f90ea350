"""The orders service, as its clients see it."""
import unittest

from microshop.orders import Orders
from tests.collection import CollectionTests


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


if __name__ == "__main__":
    unittest.main()
