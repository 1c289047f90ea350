"""The orders service: who ordered what, and what became of it. Owns orders.db.

Read from top to bottom: what is stored, how it is found, what is answered, the process.
Law: SQL stands in the queries alone; users and products are ids here, and no more.
"""
from functools import partial

from microshop.chassis.content import Page, parse_query
from microshop.chassis.database import Database
from microshop.chassis.errors import BadRequest, NotFound
from microshop.chassis.server import Answer, Handler, Service

STATES = ("pending", "confirmed", "rejected", "cancelling", "cancelled")

SCHEMA = [[  # the statements of version 1; `listed` is what a collection shows when no status is asked for
    f"""CREATE TABLE orders (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            userId INTEGER NOT NULL,
            productId INTEGER NOT NULL,
            quantity INTEGER NOT NULL CHECK (quantity > 0),
            status TEXT NOT NULL CHECK (status IN {STATES}),
            reason TEXT)""",
    "CREATE INDEX orders_by_status ON orders (status)",
    "CREATE INDEX orders_not_rejected ON orders (id) WHERE status != 'rejected'",
    "INSERT INTO orders VALUES (201, 1, 101, 1, 'confirmed', NULL), (202, 2, 102, 1, 'confirmed', NULL)",
]]


# --- queries

def find_orders(database: Database, status: str | None, page: Page) -> list[dict]:
    """Return the summaries of a page, and one more where more follow: all but the rejected, or those of a status."""
    chosen = "id IN (SELECT value FROM json_each(:ids)) AND" if page.ids else ""
    listed = "status = :status" if status else "status != 'rejected'"
    return database.rows(f"SELECT id, userId, productId FROM orders WHERE {chosen} {listed} AND id > :after "
                         "ORDER BY id LIMIT :limit + 1", {**page._asdict(), "status": status})


def find_order(database: Database, order_id: int) -> dict:
    """Return an order, with a reason where it has one. Raises NotFound."""
    rows = database.rows("SELECT id, userId, productId, quantity, status, reason FROM orders WHERE id = ?", [order_id])
    if not rows:
        raise NotFound(f"there is no order {order_id}")
    return {column: value for column, value in rows[0].items() if value is not None}


# --- routes

class OrdersHandler(Handler):
    def list_orders(self) -> Answer:
        status = parse_query(self.query_string).get("status")
        if status not in (None, *STATES):
            raise BadRequest(f"status: {status!r} is none of {', '.join(STATES)}")
        return self.answer_page(partial(find_orders, self.server.database, status))

    def get_order(self, order_id: int) -> Answer:
        return Answer(find_order(self.server.database, order_id))

    routes = {
        "/orders": {"GET": list_orders},
        "/orders/{id}": {"GET": get_order},
    }


# --- the process

class Orders(Service):
    name, title, port = "orders", "Orders service", 3003
    handler, schema = OrdersHandler, SCHEMA


if __name__ == "__main__":
    Orders.main()
