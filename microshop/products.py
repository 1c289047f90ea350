"""The products service: what is sold and how much of it is left. Owns products.db.

Read from top to bottom: what is stored, how it is found, what is answered, the process.
Law: SQL stands in the queries alone; nothing here knows of users, or why somebody orders.
"""
from functools import partial

from microshop.chassis.content import Page
from microshop.chassis.database import Database
from microshop.chassis.errors import NotFound
from microshop.chassis.server import Answer, Handler, Service

SCHEMA = [[  # the statements of version 1; stock: units free to reserve
    """CREATE TABLE products (
           id INTEGER PRIMARY KEY AUTOINCREMENT,
           name TEXT NOT NULL,
           stock INTEGER NOT NULL DEFAULT 0 CHECK (stock >= 0))""",
    "INSERT INTO products VALUES (101, 'Laptop', 100), (102, 'Mouse', 100)",
]]


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


# --- routes

class ProductsHandler(Handler):
    def list_products(self) -> Answer:
        return self.answer_page(partial(find_products, self.server.database))

    def get_product(self, product_id: int) -> Answer:
        return Answer(find_product(self.server.database, product_id))

    routes = {
        "/products": {"GET": list_products},
        "/products/{id}": {"GET": get_product},
    }


# --- the process

class Products(Service):
    name, title, port = "products", "Products service", 3002
    handler, schema = ProductsHandler, SCHEMA


if __name__ == "__main__":
    Products.main()
