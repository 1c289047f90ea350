"""The orders service: who ordered what, and the state of each order.

Database per service: no other service opens orders.db. To confirm an order it must ask users and
products, and no transaction spans three databases. So an order is a saga: it is stored first, and
then taken through small steps, each of which may be repeated safely, until it is finished.

             user exists, units reserved          client cancels            units released
    pending -------------------------> confirmed --------------> cancelling -------------> cancelled
       |
       +--> rejected: a service said no

The saga is orchestrated: this service calls the others, one step after another. Until it has
finished, the three databases may disagree; then they agree again (eventual consistency).

Read from top to bottom: the schema, the queries, the saga, the routes, the process.
Law: SQL appears only in the schema and the queries. Users and products are nothing but ids here.
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
from microshop.chassis.answer import Answer
from microshop.chassis.client import Client, Reply, Upstream
from microshop.chassis.content import ID, MAX_INTEGER, Integer, Page, encode, parse_query
from microshop.chassis.database import Database
from microshop.chassis.errors import (
    RETRY_SOON, BadGateway, BadRequest, Conflict, NotFound, ServiceError, UnprocessableContent,
    UpstreamError, UpstreamUnavailable, excerpt)
from microshop.chassis.handler import Handler
from microshop.chassis.metrics import Family, counters
from microshop.chassis.openapi import STRING, Operation, parameter, resource
from microshop.chassis.server import Service
from microshop.chassis.tracing import TaskSpan, Trace

CALL_TIME = 2.0    # seconds for another service to answer; fewer if the deadline comes first
TAKE_OVER = 5.0    # seconds for a request to finish an order before the background tries
RETRY_FIRST = 0.2  # seconds of the shortest wait before a retry; jitter may halve it
RETRY_LAST = 10.0  # seconds of the longest wait; jitter may halve it
POLL = 0.1         # seconds between two searches for orders that are due

KEY = re.compile("[ -~]{1,255}")
# As a schema: spaces around it are not part of a header's value.
KEY_SCHEMA = {**STRING, "maxLength": 255, "pattern": "^[!-~]([ -~]*[!-~])?$"}
PROBLEM = ("Content-Type", "application/problem+json")

PREVIOUS = {  # the status that an order must have to get this one
    "confirmed": "pending", "rejected": "pending",
    "cancelling": "confirmed", "cancelled": "cancelling"}
STATES = ("pending", *PREVIOUS)
STATUS = {**STRING, "enum": STATES}
UNFINISHED = ("pending", "rejected", "cancelling")  # a rejected one may still hold units

Response = tuple[int, Any]  # a status and a JSON value


# --- the schema

SCHEMA = [[  # the statements of version 1; times are in seconds since 1970
    """CREATE TABLE orders (
            id INTEGER PRIMARY KEY,    -- orders are never deleted, so no id is used twice
            userId INTEGER NOT NULL,
            productId INTEGER NOT NULL,
            quantity INTEGER NOT NULL CHECK (quantity > 0),
            status TEXT NOT NULL CHECK (status IN
                ('pending', 'confirmed', 'rejected', 'cancelling', 'cancelled')),
            reason TEXT,               -- why it was rejected
            key TEXT UNIQUE,           -- the Idempotency-Key of its request
            placed REAL NOT NULL,      -- when it was placed
            since REAL NOT NULL,       -- when it got its status
            due REAL,                  -- when to resume it; NULL if it needs no more steps
            answer TEXT)               -- the final response: [status, body]""",
    "CREATE INDEX orders_by_status ON orders (status)",
    "CREATE INDEX orders_not_rejected ON orders (id) WHERE status != 'rejected'",
    "CREATE INDEX orders_due ON orders (due) WHERE due IS NOT NULL",
    "INSERT INTO orders (id, userId, productId, quantity, status, placed, since) "
    "VALUES (201, 1, 101, 1, 'confirmed', 0, 0), (202, 2, 102, 1, 'confirmed', 0, 0)",
], [  # version 2
    # The id of the order's reservation; NULL: its own id, as it was in version 1.
    "ALTER TABLE orders ADD COLUMN reservation INTEGER",
    "UPDATE orders SET answer = NULL WHERE answer LIKE '[202,%'",  # these were not final
]]

# What a client sends to place an order.
FIELDS = {"userId": Integer(), "productId": Integer(), "quantity": Integer(default=1)}


# --- the queries
#
# Each step of a saga is one statement that also checks the status it starts from, so write() makes
# it atomic; products needs a transaction, since there a step reads and changes two tables.

def find_orders(database: Database, status: str | None, page: Page) -> list[dict]:
    """Return the summaries on a page, plus one extra row if there is a next page.

    Only orders with this status are returned; if it is None, all except the rejected ones.
    """
    # The + keeps SQLite from using the index on status: it is faster to look up the ids.
    chosen = "id IN (SELECT value FROM json_each(:ids)) AND +" if page.ids else ""
    listed = "status = :status" if status else "status != 'rejected'"
    return database.rows(
        f"SELECT id, userId, productId FROM orders WHERE {chosen}{listed} AND id > :after "
        "ORDER BY id LIMIT :limit + 1", {**vars(page), "status": status})


def find_order(database: Database, order_id: int) -> tuple[dict, int]:
    """Return an order, with the reason if it was rejected, and the id of its reservation.

    Raises NotFound.
    """
    rows = database.rows(
        "SELECT id, userId, productId, quantity, status, reason,"
        " coalesce(reservation, id) AS reservation FROM orders WHERE id = ?", [order_id])
    if not rows:
        raise NotFound(f"there is no order {order_id}")
    reservation = rows[0].pop("reservation")
    return {column: value for column, value in rows[0].items() if value is not None}, reservation


def add_order(database: Database, fields: dict, key: str | None) -> tuple[int, bool]:
    """Store a new order as pending, with its key; return its id and True.

    If the key was used before, return the id of that order and False. Raises UnprocessableContent
    if that request had a different body.
    """
    now = time.time()
    added = database.write(
        "INSERT INTO orders"
        " (userId, productId, quantity, status, key, placed, since, due, reservation) "
        "VALUES (:userId, :productId, :quantity, 'pending', :key, :now, :now, :due, :reservation) "
        "ON CONFLICT (key) DO NOTHING",
        {**fields, "key": key, "now": now, "due": now + TAKE_OVER,
         "reservation": choose_reservation()})
    if added.rowcount:
        return added.lastrowid, True
    [known] = database.rows(
        "SELECT id, userId, productId, quantity FROM orders WHERE key = ?", [key])
    if not fields.items() <= known.items():
        raise UnprocessableContent({
            "Idempotency-Key": f"was already used with a different body (order {known['id']})"})
    return known["id"], False


def choose_reservation() -> int:
    """Return an id for a reservation. It is random, so that no other order ever has the same.

    The orders' own ids would come twice if orders.db were lost, or restored from an older copy, and
    products would take a new order for one that it knows.
    """
    return random.randint(1, MAX_INTEGER)


def renew_reservation(database: Database, order_id: int, reservation: int) -> None:
    """Give a pending order another reservation, unless another worker has done so."""
    database.write(
        "UPDATE orders SET reservation = :new "
        "WHERE id = :id AND status = 'pending' AND coalesce(reservation, id) = :old",
        {"id": order_id, "old": reservation, "new": choose_reservation()})


def move_order(database: Database, order_id: int, status: str,
               response: Response | None = None, reason: str | None = None) -> bool:
    """Move an order to a status; if that decides it, store the final response for the client.

    Return False if the order is not in the previous status: another worker was faster.
    """
    now = time.time()
    is_finished = status in ("confirmed", "cancelled")  # a rejected order must still release units
    moved = database.write(
        "UPDATE orders SET status = :status, since = :now, due = :due, reason = :reason, "
        "answer = coalesce(:answer, answer) WHERE id = :id AND status = :previous",
        {"id": order_id, "status": status, "previous": PREVIOUS[status], "now": now,
         "due": None if is_finished else now + TAKE_OVER, "reason": reason,
         "answer": response and encode(response)})
    return moved.rowcount == 1


def postpone_order(database: Database, order_id: int) -> None:
    """Put off an unfinished order: if it has had its status for 3 s, for 3 s more.

    So the waits double (exponential backoff), up to RETRY_LAST. A random part is taken off
    (jitter), so that orders that failed together are not all retried together.
    """
    # If the clock was set back, `since` is in the future: hence abs().
    database.write(
        "UPDATE orders SET due = :now + :jitter * min(max(abs(:now - since), :first), :last) "
        "WHERE id = :id AND due IS NOT NULL",
        {"id": order_id, "now": time.time(), "jitter": random.uniform(0.5, 1),
         "first": RETRY_FIRST, "last": RETRY_LAST})


def finish_rejected(database: Database, order_id: int) -> None:
    """Record that a rejected order holds no units and never will, so it needs no more steps."""
    database.write(
        "UPDATE orders SET due = NULL WHERE id = ? AND status = 'rejected'", [order_id])


def find_due(database: Database) -> list[int]:
    """Return the ids of orders that should be resumed now, up to 100.

    A due time further ahead than the longest wait means that the clock was set back: it counts as
    now.
    """
    now = time.time()
    rows = database.rows(
        "SELECT id FROM orders WHERE due <= ? OR due > ? ORDER BY due LIMIT 100",
        [now, now + max(TAKE_OVER, RETRY_LAST)])
    return [row["id"] for row in rows]


def count_unfinished(database: Database) -> dict[str, int]:
    """Return how many orders need further steps, by status. This reads no finished order."""
    rows = database.rows(
        "SELECT status, count(*) AS count FROM orders WHERE due IS NOT NULL GROUP BY +status")
    return {row["status"]: row["count"] for row in rows}


def make_old_due(database: Database, started: float) -> None:
    """Make every unfinished order due now whose status is older than this process.

    Its worker ended together with an earlier process.
    """
    database.write("UPDATE orders SET due = 0 WHERE due IS NOT NULL AND since < ?", [started])


def find_response(database: Database, order_id: int) -> Response | None:
    """Return the final response of an order, or None while it is pending."""
    answer = database.rows("SELECT answer FROM orders WHERE id = ?", [order_id])[0]["answer"]
    return answer and json.loads(answer)


# --- the saga

class Saga:
    """Takes one order from step to step, as far as the other services let it.

    It starts from the status in the order's row, so any worker can resume an order, wherever the
    last one stopped. Only a definite answer of another service decides; no answer, or a failure,
    leaves the order as it is, to be resumed later. Two workers on one order do no harm: each call
    may be repeated, and only one worker can move the row on.
    """

    def __init__(self, service: "Orders", order_id: int, trace: Trace,
                 deadline: float = math.inf):
        self.service, self.trace, self.deadline = service, trace, deadline
        self.database, self.order_id = service.database, order_id
        trace.tag("order", str(order_id))
        self.load()

    def load(self) -> None:
        """Read the order and the id of its reservation: another worker may have changed them."""
        self.order, self.reservation = find_order(self.database, self.order_id)

    def advance(self) -> None:
        """Take every step that can be taken now, before the deadline."""
        try:
            if self.order["status"] == "pending":
                self.decide()
            if self.order["status"] == "rejected":
                self.release()
                finish_rejected(self.database, self.order_id)
            if self.order["status"] == "cancelling":
                self.release()
                self.move("cancelled")
        except UpstreamError as failure:
            self.load()
            self.log(f"stays {self.order['status']}: {failure.detail}", "order")
            postpone_order(self.database, self.order_id)

    def decide(self) -> None:
        """Confirm the order if its user exists and the stock suffices; reject it otherwise."""
        try:
            self.check_user()
            self.reserve()
        except (Conflict, UnprocessableContent) as refusal:
            order = {**self.order, "status": "rejected", "reason": refusal.detail}
            request_id = self.trace.request_id
            problem = {**refusal.problem(), "requestId": request_id, "order": order}
            self.move("rejected", (refusal.status, problem), refusal.detail)
        else:
            self.move("confirmed", (201, {**self.order, "status": "confirmed"}))

    def check_user(self) -> None:
        """Raise UnprocessableContent if there is no such user."""
        user_id = self.order["userId"]
        reply = self.ask(self.service.users, "GET", f"/users/{user_id}", {200, 404})
        if reply.status == 404:
            raise UnprocessableContent({"userId": f"there is no user {user_id}"})

    def reserve(self) -> None:
        """Take the units out of the stock. Raises Conflict, UnprocessableContent, BadGateway.

        The reservation has an id, by which products recognizes a repeated request. A refusal that
        says how many units are available is about the stock, and decides. Any other rejects only
        the id: the order stays pending, and is tried again with a new one.
        """
        content = {"productId": self.order["productId"], "quantity": self.order["quantity"]}
        reply = self.ask(self.service.products, "PUT", f"/reservations/{self.reservation}",
                         {200, 201, 409, 422}, content)
        if reply.status == 422:
            raise UnprocessableContent(
                {"productId": f"there is no product {content['productId']}"})
        if reply.status == 409 and "available" in reply.problem:
            raise Conflict(reply.detail)
        if reply.status == 409:
            renew_reservation(self.database, self.order_id, self.reservation)
            raise BadGateway(self.service.products.name, f"refused an id: {reply.detail}")

    def release(self) -> None:
        """Give the units back: the compensating transaction, which undoes reserve().

        A rejected order releases too, since another worker may have reserved units for it before
        this one got its refusal.
        """
        self.load()  # another worker may have reserved under another id
        self.ask(self.service.products, "DELETE", f"/reservations/{self.reservation}", {204})

    def ask(self, upstream: Upstream, method: str, target: str, definite: set[int],
            content: dict | None = None) -> Reply:
        """Call a service. Raises UpstreamError if the status of its reply is not in `definite`."""
        is_background = self.deadline == math.inf  # then no client waits for the answer
        if is_background and self.service.ending.is_set():
            raise UpstreamUnavailable(self.service.name, "is shutting down")
        headers = {"content-type": "application/json"}
        body = encode(content).encode() if content else None
        reply = self.service.client.call(
            upstream, method, target, self.trace, headers, body, self.deadline)
        if reply.status not in definite:
            raise BadGateway(upstream.name, f"answered {reply.status}")
        return reply

    def move(self, status: str, response: Response | None = None,
             reason: str | None = None) -> None:
        """Move the order to a status. If another worker has moved it already, read where to."""
        if move_order(self.database, self.order_id, status, response, reason):
            self.log(f"{self.order['status']} -> {status}")
            self.note_move(self.order["status"], status)
            self.order = {**self.order, "status": status}
        else:
            self.load()

    def note_move(self, status: str, new_status: str) -> None:
        """Note in the trace, and count, that the order has a new status."""
        self.trace.note(f"{status} -> {new_status}")
        with self.service.counting:
            self.service.moves[status, new_status] += 1

    def log(self, text: str, kind: str = "") -> None:
        self.service.log.event(f"{self.trace.request_id} order {self.order_id} {text}", kind)


# --- the routes

class OrdersHandler(Handler):
    server: "Orders"

    def list_orders(self) -> Answer:
        status = parse_query(self.query_string, ["status"]).get("status")
        if status is not None and status not in STATES:
            raise BadRequest(f"status: {excerpt(status)!r} is not one of {', '.join(STATES)}")
        return self.answer_page(partial(find_orders, self.server.database, status))

    def get_order(self, order_id: int) -> Answer:
        order, _ = find_order(self.server.database, order_id)
        return Answer(order)

    def create_order(self) -> Answer:
        """Store an order, take it as far as possible now, and answer with its state.

        An idempotent receiver: a repeated Idempotency-Key makes no second order
        (draft-ietf-httpapi-idempotency-key-header). If the order was decided, its final response is
        replayed, whatever has become of the order since; if it is pending, it is resumed.
        """
        database, key = self.server.database, self.headers.get("idempotency-key")
        if key is not None and not KEY.fullmatch(key):
            raise BadRequest("Idempotency-Key: must be 1 to 255 printable ASCII characters")
        order_id, is_new = add_order(database, self.read_fields(FIELDS), key)
        response = None if is_new else find_response(database, order_id)
        if not response:
            saga = self.load_saga(order_id)
            if is_new:
                saga.note_move("new", saga.order["status"])
            saga.advance()
            response = find_response(database, order_id) or (202, saga.order)
        status, body = response
        headers = [("Location", f"/orders/{order_id}")]
        if body["status"] == "pending":
            headers.append(RETRY_SOON)
        if status >= 400:
            headers.append(PROBLEM)
        if not is_new:
            headers.append(("Idempotency-Replayed", "true"))
        return Answer(body, status, headers)

    def cancel_order(self, order_id: int) -> Answer:
        """Cancel a confirmed order; a pending one is decided first, if that can be done now."""
        saga = self.load_saga(order_id)
        saga.advance()
        if saga.order["status"] == "confirmed":
            saga.move("cancelling")
            saga.advance()
        order, status = saga.order, saga.order["status"]
        if status == "cancelled":
            return Answer(order)
        if status == "cancelling":
            return Answer(order, 202, [("Location", f"/orders/{order_id}"), RETRY_SOON])
        raise Conflict(f"order {order_id} is {status}; only a confirmed order can be cancelled",
                       [RETRY_SOON] if status == "pending" else [])

    def load_saga(self, order_id: int) -> Saga:
        return Saga(self.server, order_id, self.trace(), self.deadline)

    routes = {
        "/orders": {"GET": list_orders, "POST": create_order},
        "/orders/{id}": {"GET": get_order},
        "/orders/{id}/cancel": {"POST": cancel_order},
    }

    # What is published about them (see chassis/openapi.py)
    schemas = {"OrderSummary": resource({"id": ID, "userId": ID, "productId": ID}),
               "Order": resource({"id": ID, **FIELDS, "status": STATUS, "reason": STRING},
                                 optional=["reason"])}
    operations = {
        "GET /orders": Operation("listOrders", {200: ["OrderSummary"]}, parameters=[
            parameter("query", "status", STATUS, "only these; default: all except rejected")]),
        "POST /orders": Operation(
            "placeOrder", {201: "Order", 202: "Order"}, FIELDS, [409],
            [parameter("header", "Idempotency-Key", KEY_SCHEMA, "repeated, it makes no new order")],
            "201: it is confirmed; 202: it is still pending; 409 or 422: it is rejected"),
        "GET /orders/{id}": Operation("getOrder", {200: "Order"}),
        "POST /orders/{id}/cancel": Operation(
            "cancelOrder", {200: "Order", 202: "Order"}, errors=[409],
            summary="200: it is cancelled; 202: it will be soon; 409: it is not confirmed"),
    }


# --- the process

class Orders(Service):
    name, title, port = "orders", "Orders service", SERVICES["orders"]
    handler, schema = OrdersHandler, SCHEMA
    client: Client
    options = [
        *Service.options,
        config.service_url("users", SERVICES["users"]),
        config.service_url("products", SERVICES["products"])]

    def __init__(self, settings: Namespace):
        super().__init__(settings)
        self.client = Client(CALL_TIME, self.log.event, self.telemetry.record)
        self.users = Upstream("users", settings.users_url)
        self.products = Upstream("products", settings.products_url)
        self.upstreams = {"users": self.users, "products": self.products}
        # How often orders have moved from one status to another, for the metrics.
        self.moves = dict.fromkeys([("new", "pending"), *(
            (previous, status) for status, previous in PREVIOUS.items())], 0)
        self.counting = threading.Lock()  # held to change them
        self.ending = threading.Event()
        self._background = threading.Thread(
            target=self._resume_orders, args=[time.time()], daemon=True)
        self._background.start()

    def families(self) -> list[Family]:
        families = [*super().families(), counters(
            "microshop_saga_moves_total", "Orders that changed their status.", ["from", "to"],
            self.moves)]
        try:
            unfinished = {**dict.fromkeys(UNFINISHED, 0), **count_unfinished(self.database)}
        except Exception as error:  # without the file, all the others matter even more
            if not self.database.to_service_error(error):
                raise
            return families
        return [*families, Family(
            "microshop_unfinished_orders", "gauge", "Orders that need further steps.",
            [("", {"status": status}, count) for status, count in unfinished.items()])]

    def _resume_orders(self, started: float) -> None:
        """Resume every order that is due, until the process ends."""
        old_are_due = False
        while not self.ending.wait(POLL):
            try:
                if not old_are_due:
                    make_old_due(self.database, started)
                    old_are_due = True
                self._resume_due_orders()
            except Exception as error:  # the cause may go away: a disk may be full for a while
                self.log.event(f"- cannot resume orders; next attempt in {RETRY_LAST} s\n"
                               + self._explain(error), "background")
                self.ending.wait(RETRY_LAST)

    def _resume_due_orders(self) -> None:
        """Resume every order that is due now. One that cannot be resumed holds up no other."""
        for order_id in find_due(self.database):
            if self.ending.is_set():
                break
            try:
                self._resume_order(order_id)
            except Exception as error:
                postpone_order(self.database, order_id)  # raises if the file itself is the cause
                self.log.event(
                    f"- cannot resume order {order_id}\n{self._explain(error)}", "order")

    def _resume_order(self, order_id: int) -> None:
        """Resume an order, and record that as a trace of its own."""
        trace, began, error = Trace(f"order-{order_id}"), time.perf_counter(), "failed"
        try:
            Saga(self, order_id, trace).advance()
            error = ""
        finally:
            self.telemetry.record(TaskSpan(
                trace, "resume order", error, time.time(), time.perf_counter() - began))

    def _explain(self, error: Exception) -> str:
        """Describe an error that is being handled: in a line if its cause is the file."""
        is_file = self.database.to_service_error(error) is not None
        is_known = is_file or isinstance(error, ServiceError)
        return f"{self.database.path}: {error}" if is_known else traceback.format_exc()

    def drain(self) -> None:
        self.ending.set()  # the orders that are unfinished now are resumed at the next start
        super().drain()
        self._background.join(min(CALL_TIME, self.settings.grace))


if __name__ == "__main__":
    Orders.main()
