"""What the exercises in adding.py check. No part of the suite: they fail until something is added.

    python -m unittest tests.exercises.checks.ReviewsTest
"""
import contextlib
import importlib
import sqlite3
import tempfile
import unittest
from pathlib import Path
from typing import Any

from microshop import SERVICES
from microshop.products import SCHEMA, Products
from tests.collection import WritableCollectionTests
from tests.helpers import Answered, ask_json, process, running
from tests.test_laws import missing_parts

OLD_VERSION = 2
OLD_PRODUCTS = f"""
    CREATE TABLE products (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL,
        stock INTEGER NOT NULL CHECK (stock >= 0),
        supplied INTEGER NOT NULL CHECK (supplied >= stock));
    CREATE TABLE reservations (
        id INTEGER PRIMARY KEY,
        productId INTEGER REFERENCES products (id),
        quantity INTEGER);
    CREATE INDEX reservations_by_product ON reservations (productId);
    INSERT INTO products VALUES (101, 'Laptop', 40, 45), (107, 'Kettle', 5, 5);
    INSERT INTO reservations VALUES (4711, 101, 5);
    PRAGMA user_version = {OLD_VERSION}"""  # a file as the shop has written it until now


def sent(request: tuple) -> str:
    """Return a request, that is method, target and content, as a message shows it."""
    return " ".join(str(part) for part in request)


class AskingTestCase(unittest.TestCase):
    port: int

    def assert_answer(self, request: tuple, status: int, content: Any = None,
                      when: str = "") -> Answered:
        """Send a request: method, target, content. Check what is answered."""
        answer = ask_json(self.port, *request)
        asked = f"{sent(request)} {when}".rstrip()
        self.assertEqual(answer.status, status,
                         f"status of {asked}; the body was {answer.body.decode()}")
        if content is not None:
            self.assertEqual(answer.json, content, f"body of the answer to {asked}")
        return answer


class ReviewsTest(AskingTestCase):
    """A fourth service, that keeps what users say about products."""

    def require_parts(self) -> None:
        """Fail if the service lacks a part."""
        self.assertIn("reviews", SERVICES, "microshop.SERVICES does not name reviews yet: add "
                                           "its line, with port 3004, in microshop/__init__.py")
        if missing := list(missing_parts("reviews")):
            self.fail("\n".join(["these parts of the service are missing:", *missing]))

    def start_shop(self) -> None:
        self.require_parts()
        shop = self.enterContext(process("microshop.run_all", "--fresh", "--port", "0"))
        shop.wait_for("ready in")
        self.port = shop.port("API Gateway")

    def test_reviews_are_written_and_read_through_the_gateway(self):
        self.start_shop()
        before = self.assert_answer(("GET", "/reviews"), 200).json
        review = {"userId": 2, "productId": 101, "text": "Quiet, and light."}
        created = self.assert_answer(("POST", "/reviews", review), 201)
        stored = {"id": created.json["id"], **review}
        self.assertEqual(created.json, stored, f"body of the answer to POST /reviews {review}")
        location = f"/reviews/{stored['id']}"
        self.assertEqual(created.headers.get("location"), location, "Location of the new review")
        self.assert_answer(("GET", location), 200, stored)
        self.assert_answer(("GET", "/reviews"), 200, [*before, stored])
        self.assert_answer(("GET", f"/reviews?ids={stored['id']}"), 200, [stored])
        replaced = {"id": stored["id"], "userId": 1, "productId": 102, "text": "Loud by now."}
        put = ("PUT", location, {name: replaced[name] for name in review})
        self.assert_answer(put, 200, replaced)
        self.assert_answer(("GET", location), 200, replaced, "after " + sent(put))
        self.assert_answer(("GET", "/reviews"), 200, [*before, replaced], "after " + sent(put))
        self.assert_answer(("DELETE", location), 204)
        self.assert_answer(("GET", location), 404)

    def test_the_tests_of_every_collection_that_can_be_changed_run_for_reviews_too(self):
        self.require_parts()
        module = importlib.import_module("tests.test_reviews")
        loaded = unittest.defaultTestLoader.loadTestsFromModule(module)
        names = [getattr(case.service, "name", "") for cases in loaded for case in cases
                 if isinstance(case, WritableCollectionTests) and hasattr(case, "service")]
        if "reviews" not in names:
            self.fail("tests/test_reviews.py has no class that unittest runs for reviews. It must "
                      "begin like this one, and have service = Reviews:\n"
                      "class ReviewsTest(WritableCollectionTests, unittest.TestCase)")

    def test_an_invalid_review_is_refused_and_the_answer_names_the_wrong_fields(self):
        self.start_shop()
        good = {"userId": 2, "productId": 101, "text": "Quiet."}
        for wrong, fields in (({"text": " "}, ["text"]), ({"userId": "Bob"}, ["userId"]),
                              ({"productId": 0, "text": None}, ["productId", "text"]),
                              ({"stars": 5}, ["stars"])):
            answer = self.assert_answer(("POST", "/reviews", {**good, **wrong}), 422)
            self.assertEqual(sorted(error["field"] for error in answer.json["errors"]), fields,
                             f"wrong fields of POST /reviews {({**good, **wrong})}")


class PriceTest(AskingTestCase):
    """Products have a price in cents, from version 3 of their schema on."""

    def setUp(self):
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        with contextlib.closing(sqlite3.connect(folder / "products.db")) as old:
            old.executescript(OLD_PRODUCTS)
        self.port = self.enterContext(running(Products, data=folder)).server_port

    def test_the_products_of_an_old_database_are_kept_and_cost_0_until_they_get_a_price(self):
        kettle = {"id": 107, "name": "Kettle", "stock": 5, "price": 0}
        self.assert_answer(("GET", "/products/107"), 200, kettle)
        priced = {"name": "Kettle", "stock": 5, "price": 2499}
        self.assert_answer(("PUT", "/products/107", priced), 200, {"id": 107, **priced})
        self.assert_answer(("GET", "/products/107"), 200, {"id": 107, **priced})
        reservation = {"productId": 101, "quantity": 5}
        self.assert_answer(("PUT", "/reservations/4711", reservation), 200)
        self.assert_answer(("DELETE", "/reservations/4711"), 204)
        laptop = {"id": 101, "name": "Laptop", "stock": 45, "price": 0}
        self.assert_answer(("GET", "/products/101"), 200, laptop)

    def test_the_schema_has_one_more_version_and_the_old_versions_are_unchanged(self):
        self.assertEqual(len(SCHEMA), OLD_VERSION + 1, "versions in SCHEMA of products.py")
        old = " ".join(statement for version in SCHEMA[:-1] for statement in version)
        self.assertNotIn("price", old, "an old version must stay as it is: it has been executed "
                                       "already in every file that exists")

    def test_a_new_product_costs_0_unless_its_price_is_given(self):
        lamp = {"name": "Lamp", "stock": 5}
        answer = self.assert_answer(("POST", "/products", lamp), 201)
        self.assertEqual(answer.json.get("price"), 0, f"price after POST /products {lamp}")
        lamp["price"] = 1999
        answer = self.assert_answer(("POST", "/products", lamp), 201)
        self.assertEqual(answer.json.get("price"), 1999, f"price after POST /products {lamp}")

    def test_a_put_without_a_price_is_refused_since_it_would_set_the_price_to_0(self):
        for price in ({}, {"price": -1}, {"price": "19.99"}, {"price": 19.99}):
            request = ("PUT", "/products/107", {"name": "Kettle", "stock": 5, **price})
            answer = self.assert_answer(request, 422)
            self.assertEqual([error["field"] for error in answer.json["errors"]], ["price"],
                             f"wrong fields of {request}")

    def test_summaries_stay_as_they_are(self):
        summaries = [{"id": 101, "name": "Laptop"}, {"id": 107, "name": "Kettle"}]
        self.assert_answer(("GET", "/products"), 200, summaries)

    def test_the_published_api_knows_the_price(self):
        schemas = self.assert_answer(("GET", "/openapi.json"), 200).json["components"]["schemas"]
        price = schemas["Product"]["properties"].get("price", {})
        self.assertEqual((price.get("type"), price.get("minimum")), ("integer", 0),
                         f"type and minimum of price in the schema Product: {price}")
        self.assertNotIn("price", schemas["ProductSummary"]["properties"],
                         "a summary has no price")
