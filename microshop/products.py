"""The products service: what is sold, how much of it is free, and what is reserved. Owns products.db.

Read from top to bottom: what is stored, how it is found and changed, what is answered, the process.
Law: SQL stands in the queries alone; nothing here knows of users, or why somebody orders.
"""
from functools import partial

from microshop import SERVICES
from microshop.chassis.content import MAX_INTEGER, FieldTable, Integer, Page, Text
from microshop.chassis.database import Database
from microshop.chassis.errors import Conflict, NotFound, UnprocessableContent
from microshop.chassis.handler import Answer, Handler
from microshop.chassis.server import Service

SCHEMA = [[  # the statements of version 1
    """CREATE TABLE products (
           id INTEGER PRIMARY KEY AUTOINCREMENT,
           name TEXT NOT NULL,
           stock INTEGER NOT NULL CHECK (stock >= 0),               -- units free to reserve
           supplied INTEGER NOT NULL CHECK (supplied >= stock))     -- free and reserved; people alone change it""",
    """CREATE TABLE reservations (
           orderId INTEGER PRIMARY KEY,
           productId INTEGER REFERENCES products (id),              -- NULL is a tombstone: it was released
           quantity INTEGER)""",
    "CREATE INDEX reservations_by_product ON reservations (productId)",
    "INSERT INTO products VALUES (101, 'Laptop', 100, 101), (102, 'Mouse', 100, 101)",
    "INSERT INTO reservations VALUES (201, 101, 1), (202, 102, 1)",
]]

FIELDS: FieldTable = {"name": Text(), "stock": Integer(least=0, default=0)}  # what a client says of a product
RESERVATION_FIELDS = {"productId": Integer(), "quantity": Integer()}         # and of a reservation


# --- queries

def find_products(database: Database, page: Page) -> list[dict]:
    """Return the summaries of a page, and one more where more follow."""
    chosen = "id IN (SELECT value FROM json_each(:ids)) AND" if page.ids else ""
    return database.rows(f"SELECT id, name FROM products WHERE {chosen} id > :after ORDER BY id LIMIT :limit + 1",
                         page._asdict())


def find_product(database: Database, product_id: int) -> dict:
    """Return a product. Raises NotFound."""
    rows = database.rows("SELECT id, name, stock FROM products WHERE id = ?", [product_id])
    if not rows:
        raise NotFound(f"there is no product {product_id}")
    return rows[0]


def count_reserved(database: Database, product_id: int) -> int:
    return database.rows("SELECT supplied - stock AS reserved FROM products WHERE id = ?", [product_id])[0]["reserved"]


def add_product(database: Database, fields: dict) -> dict:
    added = database.write("INSERT INTO products (name, stock, supplied) VALUES (:name, :stock, :stock)", fields)
    return {"id": added.lastrowid, **fields}


def change_product(database: Database, product_id: int, fields: dict) -> dict:
    """Change a product that is there, within a transaction. Raises UnprocessableContent."""
    room = MAX_INTEGER - count_reserved(database, product_id)  # so that what is released always fits
    if fields["stock"] > room:
        raise UnprocessableContent({"stock": f"must be {room} at most while {MAX_INTEGER - room} units are reserved"})
    database.connection().execute("UPDATE products SET name = :name, stock = :stock, "
                                  "supplied = supplied - stock + :stock WHERE id = :id", {"id": product_id, **fields})
    return {"id": product_id, **fields}


def delete_product(database: Database, product_id: int) -> None:
    """Delete a product, within a transaction. Raises Conflict."""
    if reserved := count_reserved(database, product_id):
        raise Conflict(f"product {product_id} has reservations (units: {reserved})")
    database.connection().execute("DELETE FROM products WHERE id = ?", [product_id])


def reserve(database: Database, order_id: int, product_id: int, quantity: int) -> bool:
    """Take units out of the free stock; False where this was done before. Raises Conflict, UnprocessableContent."""
    with database.transaction() as connection:
        before = database.rows("SELECT productId, quantity FROM reservations WHERE orderId = ?", [order_id])
        if before == [{"productId": product_id, "quantity": quantity}]:
            return False
        if before:
            raise Conflict(f"reservation {order_id} " + ("was made of something else" if before[0]["productId"] else
                                                         "was released before"))
        taken = connection.execute("UPDATE products SET stock = stock - :quantity "
                                   "WHERE id = :id AND stock >= :quantity", {"id": product_id, "quantity": quantity})
        if not taken.rowcount:
            for product in database.rows("SELECT stock FROM products WHERE id = ?", [product_id]):
                raise Conflict(f"product {product_id} has {product['stock']} of {quantity} units left")
            raise UnprocessableContent({"productId": f"there is no product {product_id}"})
        connection.execute("INSERT INTO reservations VALUES (?, ?, ?)", [order_id, product_id, quantity])
        return True


def release(database: Database, order_id: int) -> None:
    """Give back what is reserved, if anything, and leave a tombstone: a reserve that comes late then fails."""
    with database.transaction() as connection:
        connection.execute("UPDATE products SET stock = stock + quantity FROM reservations "
                           "WHERE orderId = ? AND productId = id", [order_id])
        connection.execute("INSERT OR REPLACE INTO reservations VALUES (?, NULL, NULL)", [order_id])


# --- routes

class ProductsHandler(Handler):
    def list_products(self) -> Answer:
        return self.answer_page(partial(find_products, self.server.database))

    def get_product(self, product_id: int) -> Answer:
        return Answer(find_product(self.server.database, product_id))

    def post_product(self) -> Answer:
        product = add_product(self.server.database, self.read_fields(FIELDS))
        return Answer(product, 201, [("Location", f"/products/{product['id']}")])

    def put_product(self, product_id: int) -> Answer:
        fields = self.read_fields(FIELDS)
        with self.changing(find_product, product_id):
            return Answer(change_product(self.server.database, product_id, fields))

    def delete_product(self, product_id: int) -> Answer:
        with self.changing(find_product, product_id):
            delete_product(self.server.database, product_id)
        return Answer(status=204)

    def put_reservation(self, order_id: int) -> Answer:
        fields = self.read_fields(RESERVATION_FIELDS)
        is_new = reserve(self.server.database, order_id, fields["productId"], fields["quantity"])
        return Answer({"orderId": order_id, **fields}, 201 if is_new else 200)

    def delete_reservation(self, order_id: int) -> Answer:
        release(self.server.database, order_id)
        return Answer(status=204)

    routes = {
        "/products": {"GET": list_products, "POST": post_product},
        "/products/{id}": {"GET": get_product, "PUT": put_product, "DELETE": delete_product},
        "/reservations/{order_id}": {"PUT": put_reservation, "DELETE": delete_reservation},  # not for the gateway
    }


# --- the process

class Products(Service):
    name, title, port = "products", "Products service", SERVICES["products"]
    handler, schema = ProductsHandler, SCHEMA


if __name__ == "__main__":
    Products.main()
