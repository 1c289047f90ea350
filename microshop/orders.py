"""The orders service: who ordered what, and what became of it. Owns orders.db.

An order needs three services, and no transaction spans them. So it is a saga: it is written down first, and
then taken through steps that each may be done twice, by anybody, until it has come to an end.

                  user and stock are there            its client cancels it             units given back
        pending --------------------------> confirmed ------------------> cancelling ------------------> cancelled
           |
           +--> rejected: a service said no

Read from top to bottom: what is stored, how it is found and changed, the saga, what is answered, the process.
Law: SQL stands in the queries alone; users and products are ids here, and no more.
"""
import json
import math
import random
import re
import threading
import time
import traceback
from argparse import Namespace
from functools import partial
from typing import Any

from microshop import SERVICES
from microshop.chassis import config
from microshop.chassis.client import Client, Reply, Upstream
from microshop.chassis.content import Integer, Page, encode, parse_query
from microshop.chassis.database import Database
from microshop.chassis.errors import (
    BadGateway, BadRequest, Conflict, NotFound, UnprocessableContent, UpstreamError, UpstreamUnavailable)
from microshop.chassis.handler import Answer, Handler
from microshop.chassis.server import Service

CALL_TIME = 2.0          # seconds for a service to answer, if the client's patience lasts
TAKE_OVER = 5.0          # seconds after which the background goes on with what a request left undone
RETRY_FIRST = 0.2        # seconds until the first retry, and
RETRY_LAST = 10.0        # between any two at most; jitter takes up to half of them off
LOOK = 0.1               # seconds between looks for orders that are due
KEY_LIFE = 24 * 3600.0   # seconds that an Idempotency-Key is remembered

KEY = re.compile("[ -~]{1,255}")
COME_BACK = ("Retry-After", "1")
PROBLEM = ("Content-Type", "application/problem+json")

FOLLOWS = {"confirmed": "pending", "rejected": "pending", "cancelling": "confirmed", "cancelled": "cancelling"}
STATES = ("pending", *FOLLOWS)

SCHEMA = [[  # the statements of version 1; times are in seconds since 1970
    f"""CREATE TABLE orders (
            id INTEGER PRIMARY KEY,    -- no order is ever deleted, so none comes twice
            userId INTEGER NOT NULL,
            productId INTEGER NOT NULL,
            quantity INTEGER NOT NULL CHECK (quantity > 0),
            status TEXT NOT NULL CHECK (status IN {STATES}),
            reason TEXT,               -- why it was rejected
            key TEXT UNIQUE,           -- the Idempotency-Key that it came with
            placed REAL NOT NULL,      -- when it came
            since REAL NOT NULL,       -- when it came into its state
            due REAL,                  -- when the saga goes on with it; NULL when nothing is left to do
            answer TEXT)               -- [status, body] that its client was told first""",
    "CREATE INDEX orders_by_status ON orders (status)",
    "CREATE INDEX orders_not_rejected ON orders (id) WHERE status != 'rejected'",
    "CREATE INDEX orders_due ON orders (due) WHERE due IS NOT NULL",
    "INSERT INTO orders (id, userId, productId, quantity, status, placed, since) "
    "VALUES (201, 1, 101, 1, 'confirmed', 0, 0), (202, 2, 102, 1, 'confirmed', 0, 0)",
]]

FIELDS = {"userId": Integer(), "productId": Integer(), "quantity": Integer(default=1)}  # what a client says of it


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


def add_order(database: Database, fields: dict, key: str | None) -> tuple[int, bool]:
    """Write an order down, pending, with its key; return its id, and whether it is new.

    A known key returns the order that came with it first. Raises UnprocessableContent where that was another order.
    """
    now = time.time()
    added = database.write(
        "INSERT INTO orders (userId, productId, quantity, status, key, placed, since, due) "
        "VALUES (:userId, :productId, :quantity, 'pending', :key, :now, :now, :due) ON CONFLICT (key) DO NOTHING",
        {**fields, "key": key, "now": now, "due": now + TAKE_OVER})
    if added.rowcount:
        return added.lastrowid, True
    database.write("UPDATE orders SET key = NULL WHERE key = ? AND placed < ?", [key, now - KEY_LIFE])
    for known in database.rows("SELECT id, userId, productId, quantity FROM orders WHERE key = ?", [key]):
        if not fields.items() <= known.items():
            raise UnprocessableContent({"Idempotency-Key": f"came with another body before, as order {known['id']}"})
        return known["id"], False
    return add_order(database, fields, key)


def move_order(database: Database, order_id: int, status: str, answer: tuple[int, Any] | None = None,
               reason: str | None = None) -> bool:
    """Move an order on to a state; False where it is not in the one before: then another worker was quicker.

    `answer` is what its client is told if nothing was told before.
    """
    now = time.time()
    return database.write(
        "UPDATE orders SET status = :status, since = :now, due = :due, reason = :reason, "
        "answer = coalesce(answer, :answer) WHERE id = :id AND status = :before",
        {"id": order_id, "status": status, "before": FOLLOWS[status], "now": now,
         "due": None if status in ("confirmed", "cancelled") else now + TAKE_OVER,
         "reason": reason, "answer": answer and encode(answer)}).rowcount == 1


def postpone_order(database: Database, order: dict) -> None:
    """Make an order due after as long again as it is in its state: so the waits grow exponentially, with jitter."""
    database.write(
        "UPDATE orders SET due = :now + :jitter * min(max(:now - since, :first), :last) "
        "WHERE id = :id AND status = :status AND due IS NOT NULL",
        {"id": order["id"], "status": order["status"], "now": time.time(), "jitter": random.uniform(0.5, 1),
         "first": RETRY_FIRST, "last": RETRY_LAST})


def finish_rejected(database: Database, order_id: int) -> None:
    """Note that a rejected order holds nothing and never will."""
    database.write("UPDATE orders SET due = NULL WHERE id = ? AND status = 'rejected'", [order_id])


def find_due(database: Database) -> list[int]:
    """Return the ids of orders that the saga should go on with now."""
    rows = database.rows("SELECT id FROM orders WHERE due <= ? ORDER BY due LIMIT 100", [time.time()])
    return [row["id"] for row in rows]


def resume_all(database: Database) -> None:
    """Make every order due that is not at its end: after a start, nobody is at work on any."""
    database.write("UPDATE orders SET due = 0 WHERE due IS NOT NULL")


def find_response(database: Database, order_id: int) -> tuple[int, Any] | None:
    """Return what an order's client was told first: status and body; None if nothing yet."""
    answer = database.rows("SELECT answer FROM orders WHERE id = ?", [order_id])[0]["answer"]
    return answer and json.loads(answer)


def store_response(database: Database, order_id: int, answer: tuple[int, Any]) -> tuple[int, Any]:
    """Keep what an order's client is to be told, unless something was told before; return what holds."""
    database.write("UPDATE orders SET answer = coalesce(answer, ?) WHERE id = ?", [encode(answer), order_id])
    return find_response(database, order_id) or answer


# --- the saga

class Saga:
    """Takes one order on from where it is, as far as the other services let it.

    It starts from what the order's row says, whoever was at work on it before, and wherever that was cut off.
    What another service says for certain decides. Silence and failures decide nothing: the order stays as it
    is, and is due again later. Two at work on one order do no harm: each call may be repeated, and only the
    first of them can move the row on.
    """

    def __init__(self, service: "Orders", order_id: int, trace: dict[str, str], deadline: float = math.inf):
        self.service, self.database, self.trace, self.deadline = service, service.database, trace, deadline
        self.order = find_order(self.database, order_id)

    def advance(self) -> None:
        """Do all that can be done now, and until the deadline."""
        try:
            if self.order["status"] == "pending":
                self.decide()
            if self.order["status"] == "rejected":
                self.release()
                finish_rejected(self.database, self.order["id"])
            if self.order["status"] == "cancelling":
                self.release()
                self.move("cancelled")
        except UpstreamError as silence:
            postpone_order(self.database, self.order)
            self.service.log.event(f"{self.trace['x-request-id']} leaves order {self.order['id']} "
                                   f"{self.order['status']}: {silence.detail}")

    def decide(self) -> None:
        """Confirm the order if the user is there and the stock suffices; else reject it."""
        try:
            self.check_user()
            self.reserve()
        except (Conflict, UnprocessableContent) as refusal:
            rejected = {**self.order, "status": "rejected", "reason": refusal.detail}
            problem = {**refusal.problem(), "requestId": self.trace["x-request-id"], "order": rejected}
            self.move("rejected", (refusal.status, problem), refusal.detail)
        else:
            self.move("confirmed", (201, {**self.order, "status": "confirmed"}))

    def check_user(self) -> None:
        """Raise UnprocessableContent where there is no such user."""
        user_id = self.order["userId"]
        if self.ask(self.service.users, "GET", f"/users/{user_id}", {200, 404}).status == 404:
            raise UnprocessableContent({"userId": f"there is no user {user_id}"})

    def reserve(self) -> None:
        """Take the units out of the stock. Raises Conflict, UnprocessableContent."""
        content = {name: self.order[name] for name in ("productId", "quantity")}
        reply = self.ask(self.service.products, "PUT", f"/reservations/{self.order['id']}", {200, 201, 409, 422},
                         content)
        if reply.status == 409:
            raise Conflict(reply.detail)
        if reply.status == 422:
            raise UnprocessableContent({"productId": f"there is no product {content['productId']}"})

    def release(self) -> None:
        """Give the units back. A rejected order has some too where two workers were told different things."""
        self.ask(self.service.products, "DELETE", f"/reservations/{self.order['id']}", {204})

    def ask(self, upstream: Upstream, method: str, target: str, certain: set[int],
            content: dict | None = None) -> Reply:
        """Call a service. Raises UpstreamError where it says nothing that is certain."""
        if self.deadline == math.inf and self.service.ending.is_set():  # nobody waits: stop between two steps
            raise UpstreamUnavailable(self.service.name, "is about to end")
        headers = {**self.trace, "content-type": "application/json"}
        body = encode(content).encode() if content else None
        reply = self.service.client.call(upstream, method, target, headers, body, self.deadline)
        if reply.status not in certain:
            raise BadGateway(upstream.name, f"answered {reply.status}")
        return reply

    def move(self, status: str, answer: tuple[int, Any] | None = None, reason: str | None = None) -> None:
        """Move the order on, or see where another has moved it."""
        if move_order(self.database, self.order["id"], status, answer, reason):
            self.order = {**self.order, "status": status}
        else:
            self.order = find_order(self.database, self.order["id"])


# --- routes

class OrdersHandler(Handler):
    server: "Orders"

    def list_orders(self) -> Answer:
        status = parse_query(self.query_string).get("status")
        if status not in (None, *STATES):
            raise BadRequest(f"status: {status!r} is none of {', '.join(STATES)}")
        return self.answer_page(partial(find_orders, self.server.database, status))

    def get_order(self, order_id: int) -> Answer:
        return Answer(find_order(self.server.database, order_id))

    def post_order(self) -> Answer:
        """Write an order down, take it as far as it goes now, and tell.

        What comes with a known Idempotency-Key is told what was told first, whatever became of the order since
        (draft-ietf-httpapi-idempotency-key-header). A twin of a request in flight helps it to its end.
        """
        database, key = self.server.database, self.headers.get("idempotency-key")
        if key is not None and not KEY.fullmatch(key):
            raise BadRequest("Idempotency-Key: must be 1 to 255 printable ASCII characters")
        order_id, is_new = add_order(database, self.read_fields(FIELDS), key)
        if is_new or not find_response(database, order_id):
            Saga(self.server, order_id, self.trace(), self.deadline).advance()
        status, body = find_response(database, order_id) or (
            store_response(database, order_id, (202, find_order(database, order_id))))
        headers = [("Location", f"/orders/{order_id}")]
        if status == 202:
            headers.append(COME_BACK)
        if status >= 400:
            headers.append(PROBLEM)
        if not is_new:
            headers.append(("Idempotency-Replayed", "true"))
        return Answer(body, status, headers)

    def cancel_order(self, order_id: int) -> Answer:
        """Cancel an order, or go on with it; one that is pending is decided first, if that can be done now."""
        Saga(self.server, order_id, self.trace(), self.deadline).advance()
        while (order := find_order(self.server.database, order_id))["status"] == "confirmed":
            move_order(self.server.database, order_id, "cancelling")
            Saga(self.server, order_id, self.trace(), self.deadline).advance()
        if order["status"] == "cancelled":
            return Answer(order)
        if order["status"] == "cancelling":
            return Answer(order, 202, [("Location", f"/orders/{order_id}"), COME_BACK])
        raise Conflict(f"order {order_id} is {order['status']}; only a confirmed one can be cancelled",
                       [COME_BACK] if order["status"] == "pending" else [])

    routes = {
        "/orders": {"GET": list_orders, "POST": post_order},
        "/orders/{id}": {"GET": get_order},
        "/orders/{id}/cancel": {"POST": cancel_order},
    }


# --- the process

class Orders(Service):
    name, title, port = "orders", "Orders service", SERVICES["orders"]
    handler, schema = OrdersHandler, SCHEMA
    options = [
        *Service.options,
        config.service_url("users", SERVICES["users"]),
        config.service_url("products", SERVICES["products"])]

    def __init__(self, settings: Namespace):
        super().__init__(settings)
        self.client = Client(CALL_TIME)
        self.users, self.products = Upstream("users", settings.users_url), Upstream("products", settings.products_url)
        resume_all(self.database)
        self.ending = threading.Event()
        self._background = threading.Thread(target=self._advance_forever, daemon=True)
        self._background.start()

    def _advance_forever(self) -> None:
        """Advance every order that is due, again and again."""
        while not self.ending.wait(LOOK):
            try:
                for order_id in find_due(self.database):
                    if not self.ending.is_set():
                        Saga(self, order_id, {"x-request-id": f"order-{order_id}"}).advance()
            except Exception as error:  # the disk may be full for a while
                why = f"{self.database.path}: {error}" if self.database.explain(error) else traceback.format_exc()
                self.log.event(f"- the saga failed, and goes on in {RETRY_LAST} s\n{why}")
                self.ending.wait(RETRY_LAST)

    def drain(self) -> None:
        self.ending.set()  # what the background leaves undone is done after the next start
        super().drain()
        self._background.join(min(CALL_TIME, self.settings.grace))

    def close(self) -> None:
        self.client.close()
        super().close()


if __name__ == "__main__":
    Orders.main()
