"""The products service, as its clients see it."""
import unittest

from microshop.products import Products
from tests.collection import CollectionTests


class ProductsTest(CollectionTests, unittest.TestCase):
    service, path = Products, "/products"
    summaries = [{"id": 101, "name": "Laptop"}, {"id": 102, "name": "Mouse"}]
    item = {"id": 101, "name": "Laptop", "stock": 100}
    insert = "INSERT INTO products VALUES (?, 'Lamp', 5, 5)"


if __name__ == "__main__":
    unittest.main()
