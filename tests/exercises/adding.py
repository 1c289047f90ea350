"""Exercises in which the learner adds something, each with a model solution.

A model solution is made from the present source, too. What is checked is in checks.py.
"""
import json
from pathlib import Path

from tests.exercises import Addition, edit

# --- a fourth service, made from the users service

REVIEWS = [{"id": 1, "userId": 1, "productId": 101, "text": "Quiet"},
           {"id": 2, "userId": 2, "productId": 102, "text": "Too small"}]
REVIEWS_IN_TWO_LINES = "[\n        {},\n        {}]".format(*REVIEWS)
NEW_REVIEW = {"userId": 1, "productId": 102, "text": "Good"}
MODULE_EDITS = {
    "the people who may order": "what users say about products",
    "about products or orders": "about users or orders",
    "AUTOINCREMENT, name TEXT NOT NULL)":
        'AUTOINCREMENT,"\n    " userId INTEGER, productId INTEGER, text TEXT NOT NULL)',
    "(1, 'Alice'), (2, 'Bob')": "(1, 1, 101, 'Quiet'), (2, 2, 102, 'Too small')",
    '{"name": Text()}  # what a client sends to create or replace a review':
        '{"userId": Integer(), "productId": Integer(), "text": Text()}',
    "import ID, Page": "import ID, Integer, Page",
    "SELECT id, name FROM reviews WHERE {chosen} id > :after":
        'SELECT id, userId, productId, text FROM reviews"\n        f" WHERE {chosen} id > :after',
    '"SELECT id, name FROM reviews WHERE id = ?"':
        '\n        "SELECT id, userId, productId, text FROM reviews WHERE id = ?"',
    '"INSERT INTO reviews (name) VALUES (:name)"':
        '\n        "INSERT INTO reviews (userId, productId, text)"\n'
        '        " VALUES (:userId, :productId, :text)"',
    'UPDATE reviews SET name = :name WHERE':
        'UPDATE reviews SET userId = :userId, productId = :productId,"\n'
        '                      " text = :text WHERE'}
TEST_EDITS = {
    '[{"id": 1, "name": "Alice"}, {"id": 2, "name": "Bob"}]': REVIEWS_IN_TWO_LINES,
    'item = {"id": 1, "name": "Alice"}': "item = summaries[0]",
    "(?, 'Carol')": "(?, 1, 101, 'Heavy')",
    '{"name": "Zoë"}':
        f'{NEW_REVIEW}\n    text, required = "text", ["productId", "text", "userId"]',
    '({"name": "Ann", "stock": 1}, ["stock"])': '({**content, "userId": 0}, ["userId"])',
    '({"name": "", "age": 7, "sex": "?"}, ["age", "name", "sex"])':
        '({**content, "productId": "101", "stars": 5}, ["productId", "stars"])'}
ANSWERS_IN_CONTRACT = {
    "The collection is found at the prefix.": REVIEWS,
    "Rows are found by their ids; ids without a row are left out.": REVIEWS[:1],
    "The link to the next page has the prefix too.": REVIEWS[:1],
    "An item is found below the prefix.": REVIEWS[0],
    "A new item has a location with the prefix.": {"id": 3, **NEW_REVIEW}}


def add_reviews(top: Path) -> None:
    edit(top / "microshop/__init__.py", '    "orders": 3003,\n',
         '    "orders": 3003,\n    "reviews": 3004,\n')
    with (top / "README.md").open("a") as readme:
        readme.write("\nThe reviews service listens at `localhost:3004`.\n")
    copy_for_reviews(top, "microshop/users.py", MODULE_EDITS)
    copy_for_reviews(top, "tests/test_users.py", TEST_EDITS)
    contract = copy_for_reviews(top, "tests/contracts/gateway-users.json", {})
    contract.write_text(json.dumps(agree_on_reviews(json.loads(contract.read_text()))))


def copy_for_reviews(top: Path, name: str, edits: dict[str, str]) -> Path:
    """Make a file about reviews out of one about users; return its path."""
    text = (top / name).read_text()
    for old, new in (("users", "reviews"), ("Users", "Reviews"), ("user", "review")):
        text = text.replace(old, new)
        name = name.replace(old, new)
    path = top / name
    path.write_text(text.replace("User", "Review"))
    for old, new in edits.items():
        edit(path, old, new)
    return path


def agree_on_reviews(contract: dict) -> dict:
    """Return a contract with reviews in place of users."""
    for interaction in contract["interactions"]:
        if "content" in interaction["request"]:
            interaction["request"]["content"] = NEW_REVIEW
        if interaction["what"] in ANSWERS_IN_CONTRACT:
            interaction["answer"]["content"] = ANSWERS_IN_CONTRACT[interaction["what"]]
        if "schemas" in interaction["what"]:
            schemas = interaction["answer"]["content"]["components"]["schemas"]
            schemas["Review"]["properties"] = {"text": {"type": "string"}}
    return contract


# --- a field that needs a new version of the schema

PRICE_EDITS = {
    'COLUMN orderId TO id",\n]]':
        'COLUMN orderId TO id",\n], [  # version 3\n'
        '    "ALTER TABLE products ADD COLUMN price INTEGER NOT NULL DEFAULT 0",  # in cents\n]]',
    '{"name": Text(), "stock": Integer(least=0)}':
        '{\n    "name": Text(), "stock": Integer(least=0), "price": Integer(least=0)}',
    '{**FIELDS, "stock": Integer(least=0, default=0)}':
        '{\n    **FIELDS, "stock": Integer(least=0, default=0),'
        ' "price": Integer(least=0, default=0)}',
    '("SELECT id, name, stock FROM products WHERE id = ?", [product_id])':
        '(\n        "SELECT id, name, stock, price FROM products WHERE id = ?", [product_id])',
    '(name, stock, supplied) VALUES (:name, :stock, :stock)", fields)':
        '(name, stock, supplied, price)"\n'
        '        " VALUES (:name, :stock, :stock, :price)", fields)',
    "SET name = :name, stock = :stock, ": "SET name = :name, stock = :stock, price = :price, "}
PRICE_TEST_EDITS = {
    'item = {"id": 101, "name": "Laptop", "stock": 100}':
        'item = {"id": 101, "name": "Laptop", "stock": 100, "price": 0}',
    "(?, 'Lamp', 5, 5)": "(?, 'Lamp', 5, 5, 1999)",
    'content = {"name": "Lamp", "stock": 5}':
        'content = {"name": "Lamp", "stock": 5, "price": 1999}',
    'replaced = ["name", "stock"]': 'replaced = ["name", "price", "stock"]',
    '*(({"name": "Lamp", "stock": stock}, ["stock"])':
        '*(({"name": "Lamp", "stock": stock, "price": 1}, ["stock"])',
    '({"name": "", "stock": -1, "colour": "red"}, ["colour", "name", "stock"])':
        '({"name": "", "stock": 1, "price": -1, "colour": ""}, ["colour", "name", "price"])',
    '"/products/101", {"name": "Laptop"})': '"/products/101", {"name": "Laptop", "price": 1})',
    '["id", "name", "stock"])': '["id", "name", "stock", "price"])',
    'laptop = {"name": "Laptop", "stock": stock}':
        'laptop = {"name": "Laptop", "stock": stock, "price": 1}'}
PRICE_API_EDITS = {
    ' "replaceProduct": {"name": "Lamp", "stock": 5}':
        '\n    "replaceProduct": {"name": "Lamp", "stock": 5, "price": 1}',
    'lamp = {"name": "Lamp", "stock": 5}': 'lamp = {"name": "Lamp", "stock": 5, "price": 1}'}


def add_price(top: Path) -> None:
    for name, edits in (("microshop/products.py", PRICE_EDITS),
                        ("tests/test_products.py", PRICE_TEST_EDITS),
                        ("tests/test_openapi.py", PRICE_API_EDITS)):
        for old, new in edits.items():
            edit(top / name, old, new)


EXERCISES: list[Addition] = [
    Addition(
        title="A fourth service: reviews",
        pattern="Microservice chassis",
        minutes=40,
        test="exercises.checks.ReviewsTest."
             "test_reviews_are_written_and_read_through_the_gateway",
        further=("exercises.checks.ReviewsTest", "test_laws", "test_reviews", "test_contracts",
                 "test_readme"),
        may_change=(),
        solution=add_reviews,
        look="/reviews",
        story="""
            Users want to say what they think of a product. A review has three fields: userId,
            productId and text, which has 1 to 200 characters like every text in this shop. Add a
            service of its own for them, with its own database, at /reviews: a collection that can
            be read and changed like /users.

            Do not check whether the user and the product exist: other services own them. If
            reviews asked them, users could not write a review while one of them is down. And the
            answer would not last: a user can be deleted a moment later. (The orders service does
            ask, since an order reserves units, and can stay pending until the answer comes.)

            Reviews takes port 3004, and the live picture moves to the next one by itself. The
            gateway and run_all need no change either: they take the services from one table. What
            else a service needs, the failing test says, in one sentence each; run it again after
            each step. README.md needs only one line, anywhere, with the name and the port.
            """,
        hints=("Begin in microshop/__init__.py, with one line in SERVICES. Then run the test "
               "again; it says what is missing. \"To add a service\" in README.md says which "
               "files to copy.",
               "Make microshop/reviews.py from microshop/users.py, with other names. What differs "
               "is the table in SCHEMA, FIELDS, and the columns in the queries: all three fields "
               "in each SELECT, INSERT and UPDATE. The ids are Integer(), the text is Text(), "
               "which takes up to 200 characters; both are in microshop/chassis/content.py.",
               "Make tests/test_reviews.py from tests/test_users.py. The docstring of "
               "tests/collection.py shows its attributes for reviews; `text` and `required` must "
               "be given, too. Make tests/contracts/gateway-reviews.json from "
               "tests/contracts/gateway-users.json, with your demo rows and your schema. In "
               "README.md a line such as this one is enough: The reviews service listens at "
               "`localhost:3004`.")),
    Addition(
        title="A new field: what a product costs",
        pattern="Schema version",
        minutes=40,
        test="exercises.checks.PriceTest."
             "test_the_products_of_an_old_database_are_kept_and_cost_0_until_they_get_a_price",
        further=("exercises.checks.PriceTest", "test_products", "test_laws", "test_openapi",
                 "test_contracts"),
        may_change=("tests/test_products.py", "tests/test_openapi.py"),
        solution=add_price,
        look="/products/101",
        story="""
            Products get a field `price`, in cents: an integer from 0 on, which GET /products/101
            shows. Shops that run already have databases without it. A database file knows the
            version of its tables; a newer program upgrades an older file when it starts. After the
            update they must start as before, with all their products and reservations; the old
            products cost 0 until someone sets their price.

            POST /products may leave the price out: then it is 0. PUT must name it, as it must name
            the stock: a client that does not know prices must not set one to 0 by accident. The
            list of products stays as it is, and the published API knows the new field.

            The tests of products know all fields of a product, so you may change them here:
            tests/test_products.py and tests/test_openapi.py. Lines are at most 100 columns wide.
            (The commands in README.md show products, too, and run as tests. Leave them as they are
            in this exercise.)
            """,
        hints=("Everything is in microshop/products.py: SCHEMA, the two tables of fields, and the "
               "queries that read, insert and update a product. SCHEMA is a list of versions: what "
               "does Database._upgrade in microshop/chassis/database.py do with them?",
               "Never edit an old version: files that exist have executed it already. Add version "
               "3, with an ALTER TABLE products ADD COLUMN that has a DEFAULT.",
               "FIELDS is for PUT, NEW_FIELDS for POST, where stock shows how a field gets a "
               "default. SELECT, INSERT and UPDATE name the columns: find_product, add_product, "
               "change_product. Then the tests: item, insert, content, replaced and wrong in "
               "tests/test_products.py, and the bodies that it and tests/test_openapi.py send.")),
]
