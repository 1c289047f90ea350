"""The products service: what is for sale, how much is in stock, and what is reserved for orders.

Database per service: no other service opens products.db; the others ask this one over HTTP.
Read from top to bottom: the schema, the queries, the routes, the process.

Law: SQL appears only in the schema and the queries. Nothing here knows about users, or what an
order is: reservations are made and released under an id that the orders service chooses.
"""
from functools import partial

from microshop import SERVICES
from microshop.chassis.answer import Answer
from microshop.chassis.content import ID, MAX_INTEGER, FieldTable, Integer, Page, Text
from microshop.chassis.database import Database, Transaction
from microshop.chassis.errors import Conflict, NotFound, UnprocessableContent
from microshop.chassis.handler import Handler
from microshop.chassis.openapi import Operation, resource
from microshop.chassis.server import Service

# --- the schema

SCHEMA = [[  # the statements of version 1
    """CREATE TABLE products (
           id INTEGER PRIMARY KEY AUTOINCREMENT,
           name TEXT NOT NULL,
           stock INTEGER NOT NULL CHECK (stock >= 0),               -- units free to reserve
           supplied INTEGER NOT NULL CHECK (supplied >= stock))     -- units free or reserved""",
    """CREATE TABLE reservations (
           orderId INTEGER PRIMARY KEY,
           productId INTEGER REFERENCES products (id),              -- NULL: it was released
           quantity INTEGER)""",
    "CREATE INDEX reservations_by_product ON reservations (productId)",
    "INSERT INTO products VALUES (101, 'Laptop', 100, 101), (102, 'Mouse', 100, 101)",
    "INSERT INTO reservations VALUES (201, 101, 1), (202, 102, 1)",
], [  # version 2
    "ALTER TABLE reservations RENAME COLUMN orderId TO id",
]]

# What clients send: to replace a product, to create one, and to reserve units.
FIELDS: FieldTable = {"name": Text(), "stock": Integer(least=0)}
NEW_FIELDS: FieldTable = {**FIELDS, "stock": Integer(least=0, default=0)}
RESERVATION_FIELDS = {"productId": Integer(), "quantity": Integer()}


# --- the queries

def find_products(database: Database, page: Page) -> list[dict]:
    """Return the summaries on a page, plus one extra row if there is a next page."""
    chosen = "id IN (SELECT value FROM json_each(:ids)) AND" if page.ids else ""
    return database.rows(
        f"SELECT id, name FROM products WHERE {chosen} id > :after ORDER BY id LIMIT :limit + 1",
        vars(page))


def find_product(database: Database | Transaction, product_id: int) -> dict:
    """Return a product. Raises NotFound."""
    rows = database.rows("SELECT id, name, stock FROM products WHERE id = ?", [product_id])
    if not rows:
        raise NotFound(f"there is no product {product_id}")
    return rows[0]


def add_product(database: Database, fields: dict) -> dict:
    added = database.write(
        "INSERT INTO products (name, stock, supplied) VALUES (:name, :stock, :stock)", fields)
    return {"id": added.lastrowid, **fields}


def change_product(transaction: Transaction, product_id: int, fields: dict) -> dict:
    """Change a product, which must exist; return it. Raises UnprocessableContent."""
    reserved = count_reserved(transaction, product_id)
    most = MAX_INTEGER - reserved  # so that a release never makes the stock too large
    if fields["stock"] > most:
        raise UnprocessableContent(
            {"stock": f"must be at most {most} while {reserved} units are reserved"})
    product = {"id": product_id, **fields}
    transaction.write("UPDATE products SET name = :name, stock = :stock, "
                      "supplied = supplied - stock + :stock WHERE id = :id", product)
    return product


def delete_product(transaction: Transaction, product_id: int) -> None:
    """Delete a product, which must exist. Raises Conflict if units of it are reserved."""
    if reserved := count_reserved(transaction, product_id):
        raise Conflict(f"product {product_id} has reservations (units: {reserved})")
    transaction.write("DELETE FROM products WHERE id = ?", [product_id])


def count_reserved(transaction: Transaction, product_id: int) -> int:
    rows = transaction.rows(
        "SELECT supplied - stock AS reserved FROM products WHERE id = ?", [product_id])
    return rows[0]["reserved"]


def reserve(database: Database, reservation_id: int, product_id: int, quantity: int) -> bool:
    """Take units out of the stock; return False if that was done before.

    The reservation is stored under its id, so a repeated request changes nothing (idempotent
    receiver). Raises Conflict if there are too few units, or if the reservation with this id was
    released or is a different one; UnprocessableContent if there is no such product.
    """
    wanted = {"productId": product_id, "quantity": quantity}
    with database.transaction() as transaction:
        found = transaction.rows(
            "SELECT productId, quantity FROM reservations WHERE id = ?", [reservation_id])
        if found == [wanted]:
            return False
        if found and found[0]["productId"]:
            raise Conflict(f"reservation {reservation_id} was already made for something else")
        if found:
            raise Conflict(
                f"reservation {reservation_id} was released before and cannot be made again")
        take_units(transaction, product_id, quantity)
        transaction.write(
            "INSERT INTO reservations VALUES (?, ?, ?)", [reservation_id, product_id, quantity])
        return True


def take_units(transaction: Transaction, product_id: int, quantity: int) -> None:
    """Take units out of the stock. Raises UnprocessableContent, or Conflict with `available`.

    Only a Conflict with that member is about the stock; any other is about the reservation's id.
    """
    taken = transaction.write(
        "UPDATE products SET stock = stock - :quantity WHERE id = :id AND stock >= :quantity",
        {"id": product_id, "quantity": quantity})
    if taken.rowcount:
        return
    found = transaction.rows("SELECT stock FROM products WHERE id = ?", [product_id])
    if not found:
        raise UnprocessableContent({"productId": f"there is no product {product_id}"})
    available = found[0]["stock"]
    raise Conflict(f"product {product_id} has {available} of {quantity} units left",
                   available=available)


def release(database: Database, reservation_id: int) -> None:
    """Give back what is reserved under an id, if anything, and leave a marker, a tombstone.

    If a delayed request to reserve arrives after the release, the tombstone makes us refuse it.
    """
    with database.transaction() as transaction:
        transaction.write(
            "UPDATE products SET stock = stock + (SELECT quantity FROM reservations WHERE id = :id)"
            " WHERE id = (SELECT productId FROM reservations WHERE id = :id)",
            {"id": reservation_id})
        transaction.write(
            "INSERT OR REPLACE INTO reservations VALUES (?, NULL, NULL)", [reservation_id])


# --- the routes

class ProductsHandler(Handler):
    def list_products(self) -> Answer:
        return self.answer_page(partial(find_products, self.server.database))

    def get_product(self, product_id: int) -> Answer:
        return Answer(find_product(self.server.database, product_id))

    def create_product(self) -> Answer:
        product = add_product(self.server.database, self.read_fields(NEW_FIELDS))
        return Answer(product, 201, [("Location", f"/products/{product['id']}")])

    def replace_product(self, product_id: int) -> Answer:
        fields = self.read_fields(FIELDS)
        with self.changing(find_product, product_id) as transaction:
            product = change_product(transaction, product_id, fields)
        return Answer(product)

    def remove_product(self, product_id: int) -> Answer:
        with self.changing(find_product, product_id) as transaction:
            delete_product(transaction, product_id)
        return Answer(status=204)

    def create_reservation(self, reservation_id: int) -> Answer:
        fields = self.read_fields(RESERVATION_FIELDS)
        is_new = reserve(
            self.server.database, reservation_id, fields["productId"], fields["quantity"])
        return Answer({"id": reservation_id, **fields}, 201 if is_new else 200)

    def remove_reservation(self, reservation_id: int) -> Answer:
        release(self.server.database, reservation_id)
        return Answer(status=204)

    routes = {
        "/products": {"GET": list_products, "POST": create_product},
        "/products/{id}": {
            "GET": get_product, "PUT": replace_product, "DELETE": remove_product},
        "/reservations/{id}": {  # for the orders service; the gateway does not forward it
            "PUT": create_reservation, "DELETE": remove_reservation},
    }

    # What is published about them (see chassis/openapi.py)
    schemas = {"Product": resource({"id": ID, **FIELDS}),
               "ProductSummary": resource({"id": ID, "name": FIELDS["name"]})}
    reservation = resource({"id": ID, **RESERVATION_FIELDS})
    operations = {
        "GET /products": Operation("listProducts", {200: ["ProductSummary"]}),
        "POST /products": Operation("createProduct", {201: "Product"}, NEW_FIELDS),
        "GET /products/{id}": Operation("getProduct", {200: "Product"}),
        "PUT /products/{id}": Operation("replaceProduct", {200: "Product"}, FIELDS),
        "DELETE /products/{id}": Operation("deleteProduct", {204: None}, errors=[409]),
        "PUT /reservations/{id}": Operation(
            "reserve", {200: reservation, 201: reservation}, RESERVATION_FIELDS, [409]),
        "DELETE /reservations/{id}": Operation("release", {204: None}),
    }


# --- the process

class Products(Service):
    name, title, port = "products", "Products service", SERVICES["products"]
    handler, schema = ProductsHandler, SCHEMA


if __name__ == "__main__":
    Products.main()
