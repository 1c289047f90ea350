"""The chapters about orders: what can happen between two steps of an order.

Questions come before a process is paused: a reader may think for longer than run_all waits for a
process that hangs.
"""
from microshop.orders import CALL_TIME, RETRY_LAST
from microshop.tour.drawing import draw_row
from microshop.tour.own_shop import poll
from microshop.tour.stage import Pending, Tour

LAPTOP, UNITS = 101, 3
OWN_ID = 7    # of a reservation that no order has
RESERVATION = {"productId": LAPTOP, "quantity": UNITS}
ORDER = {"userId": 1, **RESERVATION}
KEY = "monday-7"
WITH_KEY = {"Idempotency-Key": KEY}
MOVES = """\
    pending ---> confirmed ---> cancelling ---> cancelled
       |
       +-------> rejected
"""
TIMEOUT = 20  # seconds for a request: the gateway waits longer than orders on a slow machine, too


def saga(tour: Tour) -> None:
    """An order is a saga."""
    tour.say("""
        An order needs three services: one knows whether the user exists, one has the stock, and one
        stores the order. Each has a database of its own, and no transaction spans them.

        So an order is a saga: a sequence of small steps, each of them a transaction in one
        database. If the order cannot be completed, or is cancelled, a compensating transaction
        undoes what an earlier step has done.
        """)
    tour.start_shop()
    tour.predict(f"A client orders {UNITS} laptops. Which services does the orders service call, "
                 "and what has changed in which database when the answer comes?")
    before = stock(tour)

    placed = tour.curl("/orders", data=ORDER)
    tour.show_trace(placed.id, "orders", "users", "products")
    tour.say("""
        First, the orders service has stored the order, with the status pending. The GET asks
        whether the user exists, and changes nothing. The PUT reserves: the products service takes
        the units out of its stock, and stores a reservation. Then the orders service has moved the
        order to confirmed. These are all the moves of an order:
        """)
    tour.print(MOVES)
    tour.expect(f"The answer is 201, and {before - UNITS} of {before} laptops are free",
                (placed.status, stock(tour)), (201, before - UNITS))
    reject(tour, before)
    cancel_slowly(tour, placed.json["id"])
    tour.expect(f"All {before} laptops are free again, and the databases agree",
                (tour.show_audit(), stock(tour)), (True, before))
    tour.trade_off("""
        A transaction over three databases (two-phase commit) would never show an order between two
        steps. But then all three keep the rows locked until the slowest one has answered, and if
        the process that leads the transaction fails, they stay locked. A saga holds no lock while
        it waits. Its price: clients see statuses like cancelling, and a step that changes another
        service needs one that undoes it.
        """)


def reject(tour: Tour, quantity: int) -> None:
    """Order more laptops than there are."""
    before = stock(tour)
    tour.say("If a service refuses, the order is rejected. It is stored, too, with the reason:")
    rejected = tour.curl("/orders", data={**ORDER, "quantity": quantity})
    row = tour.show_order(rejected.json["order"]["id"], "id", "quantity", "status", "reason")
    tour.expect("The answer is 409, the stock has not changed, and the reason is stored",
                (rejected.status, stock(tour), row["status"], bool(row["reason"])),
                (409, before, "rejected", True))


def cancel_slowly(tour: Tour, order_id: int) -> None:
    """Cancel an order while products is paused, so that the reader sees it between two steps."""
    tour.say("""
        Cancelling takes two steps: the products service gives the units back (this is the
        compensating transaction), and the orders service marks the order as cancelled. To look
        between the two, we pause the products service, so that the other has to wait for it.
        """)
    tour.predict("What is the status of the order during that wait: confirmed, "
                 "cancelled, or another one?")
    tour.pause("products")
    pending = tour.begin_curl(f"/orders/{order_id}/cancel", method="POST")
    await_call(tour, pending)
    row = tour.show_order(order_id, "id", "quantity", "status")
    tour.expect("Its status is cancelling, until the units are given back",
                row["status"], "cancelling")
    tour.resume("products")
    tour.finish_curl(pending)
    tour.expect("Now it is cancelled", lambda: status(tour, order_id), "cancelled")


def crash(tour: Tour) -> None:
    """A crash in the middle of an order."""
    tour.say("""
        A process can end at any moment: it runs out of memory, or the power fails. What was in its
        memory is lost. What matters is what is on disk, and what other services have done already.
        """)
    tour.start_shop()
    order_id, before = kill_between_steps(tour)
    tour.expect(f"Order {order_id} is confirmed", lambda: status(tour, order_id), "confirmed")
    tour.expect(f"{UNITS} laptops have left the stock, not {2 * UNITS}",
                before - stock(tour), UNITS)
    tour.say("A client that got no answer can send its request again, with the same key:")
    again = tour.curl("/orders", data=ORDER, headers=WITH_KEY, show=("Idempotency-Replayed",))
    tour.expect("It gets the same order, and not a second one",
                (again.status, again.json["id"], "idempotency-replayed" in again.headers),
                (201, order_id, True))
    tour.expect("The databases agree", tour.show_audit(), True)
    tour.trade_off("""
        The orders service could call the others first, and store an order only when all have
        agreed. Then no order would ever be pending. But after a crash units would be reserved, and
        no database would say for which order. And instead of asking for a key, the service could
        recognize a repeat by its content. But a client may want two equal orders.
        """)


def kill_between_steps(tour: Tour) -> tuple[int, int]:
    """Place an order, and kill orders while it waits for products.

    Return the order's id, and how many laptops were free before.
    """
    tour.say("""
        We kill the orders service at the worst moment: it has asked the products service to reserve
        units, and has no answer yet. To have time for that, we pause the products service first.

        The client has given its order a name that it has made up, the Idempotency-Key. If it sends
        the request once more, it will use the same key.
        """)
    tour.predict(f"The client orders {UNITS} laptops. Will they be reserved, though the orders "
                 "service is gone? What finishes the order? How many units leave the stock?")
    before = stock(tour)
    tour.pause("products")
    pending = tour.begin_curl("/orders", data=ORDER, headers=WITH_KEY)
    await_call(tour, pending)
    stored = tour.find("orders", "orders", status="pending")
    for row in stored:
        tour.show_order(row["id"], "id", "key", "status", "reservation", "due")
    tour.expect("The order is on disk (pending: not decided yet), with its key, before the "
                "products service has answered; it is due to be resumed if that takes too long",
                [(row["key"], row["due"] is not None) for row in stored], [(KEY, True)])
    tour.kill("orders")
    tour.resume("products")
    answer = tour.finish_curl(pending, ("Idempotency-Replayed",))
    tour.expect("The client gets its order, from the new process", answer.status, 201)
    tour.say("""
        The connection to the orders service broke. The request has a key, so the gateway may send
        it again. The new orders process finds the key in its database, and resumes the order.
        Without a repeated request, it resumes each unfinished order as well: the column due says
        when (in seconds since 1970).
        """)
    show_two_reserves(tour, answer.id)
    return stored[0]["id"], before


def show_two_reserves(tour: Tour, request_id: str) -> None:
    """Show the calls of the killed process, and those of the new one."""
    calls = [span["tags"]["http.status_code"]
             for span in tour.show_trace(request_id, "products")
             if span["name"] == "put /reservations/{id}"]
    tour.expect("The reservation was sent twice, and made once", calls, ["201", "200"])
    tour.say("""
        Two lines of the trace are not indented: their caller is missing, since the killed process
        took the record of its calls with it. (Idempotency-Replayed says that the order was stored
        already when the request came.) Compare the two PUTs. The killed process sent the first: the
        products service reserved the units (201), but no process was left to read the answer. The
        new one sent the same again, with the same reservation id, and nothing changed (200).
        """)


def no_answer(tour: Tour) -> None:
    """A call without an answer."""
    tour.say(f"""
        The orders service asks the products service to reserve units, and no answer comes within
        {CALL_TIME:g} s. Was the request lost? Was it carried out, and only the answer was lost? Or
        will it be carried out later? It cannot know. To see this, we pause the products service.
        """)
    tour.start_shop(f"--timeout={TIMEOUT}")
    tour.predict("Which answer to the client is true then: 201 (confirmed), 409 (refused), 504 (no "
                 "answer in time), or another one?")
    before = stock(tour)
    tour.pause("products")
    answer = tour.curl("/orders", data=ORDER, headers=WITH_KEY, show=("Location", "Retry-After"))
    tour.expect("The answer is 202: the order is accepted, but not decided", answer.status, 202)
    row = tour.show_order(answer.json["id"], "id", "status", "reservation", "due")
    tour.resume("products")
    tour.say("The products service runs again, finds the request, and carries it out. No process "
             "waits for the answer any more.")
    target = f"PUT /reservations/{row['reservation']}"
    tour.expect("The units are reserved, and the orders service does not know it",
                lambda: log_lines(tour, f"{target} 201"), bool)
    tour.say(f"""
        The orders service asks again in the background, after a wait that grows with each attempt,
        up to {RETRY_LAST:g} s (backoff). It sends the same reservation id, so the products service
        recognizes the repeat. (No client has asked for this, so the request id is made from the
        order's.)
        """)
    tour.expect(f"Order {row['id']} is confirmed, without any request from the client",
                lambda: status(tour, row["id"]), "confirmed")
    tour.show_log(target, "products")
    tour.expect(f"It was asked twice, and {UNITS} laptops have left the stock, not {2 * UNITS}: it "
                "is an idempotent receiver", before - stock(tour), UNITS)
    repeat_order(tour, row["id"])
    tour.trade_off("""
        The orders service could take silence as a refusal, and answer 504. That is simple, but
        whenever the units were reserved all the same, they are lost to the shop. Or it could let
        the client wait until the answer comes, which may take hours. 202 is true at once. Its
        price: the client has to ask again.
        """)


def repeat_order(tour: Tour, order_id: int) -> None:
    """Send the same order again, with its key."""
    again = tour.curl("/orders", data=ORDER, headers=WITH_KEY, show=("Idempotency-Replayed",))
    tour.expect("The client repeats its request, and gets the final answer of its order: 201",
                (again.status, again.json["id"]), (201, order_id))


def tombstone(tour: Tour) -> None:
    """The release that overtakes its reservation."""
    tour.say("""
        Requests can overtake each other on their way. Here the products service is paused, so that
        a PUT, which reserves units, is late. Meanwhile the orders service rejects the order, and
        sends a DELETE, which releases what was reserved for it. When the products service goes on,
        it gets both, in any order.
        """)
    tour.start_shop(f"--timeout={TIMEOUT}")
    tour.predict("What must the products service do if the DELETE comes first?")
    before = stock(tour)
    tour.pause("products")
    answer = tour.curl("/orders", data={**ORDER, "userId": 2})
    tour.expect("No answer came, so the order is pending (202): it is not decided yet",
                answer.status, 202)
    tour.say("Now the user is deleted. The orders service tries unfinished orders again in the "
             "background, and so finds that out:")
    tour.curl("/users/2", method="DELETE")
    order_id = answer.json["id"]
    tour.expect(f"Order {order_id} is rejected", lambda: status(tour, order_id), "rejected")
    row = tour.show_order(order_id, "id", "status", "reason", "reservation")
    tour.resume("products")
    target = f"/reservations/{row['reservation']}"
    poll("products logs the late PUT", lambda: log_lines(tour, f"PUT {target} "), bool)
    poll(f"order {order_id} needs no more steps",
         lambda: tour.find("orders", "orders", id=order_id)[0]["due"], None)
    tour.expect(f"All {before} laptops are free", stock(tour), before)
    poll("products logs the DELETE", lambda: log_lines(tour, f"DELETE {target} "), bool)
    tour.show_log(target, "products")
    release_first(tour)
    tour.expect("The databases agree", tour.show_audit(), True)
    tour.trade_off("""
        A release could delete the reservation, and the table would stay small. But then a late PUT
        looks like a new one, and takes units for an order that has ended: no process would ever
        release them. The price of tombstones: one small row for each release, kept forever.
        """)


def release_first(tour: Tour) -> None:
    """Send a DELETE, and then the PUT that it has overtaken."""
    tour.say(f"""
        Which of the two came first was a matter of chance. Now the DELETE comes first for certain:
        we send both ourselves, with an id of our own, {OWN_ID}, directly to the products service
        (the gateway does not forward reservations).
        """)
    target = f"/reservations/{OWN_ID}"
    released = tour.curl(target, method="DELETE", to="products")
    tour.expect("Nothing was reserved, and yet the answer is 204", released.status, 204)
    late = tour.curl(target, method="PUT", data=RESERVATION, to="products")
    tour.expect("The late PUT is refused (409), although there are enough laptops",
                late.status, 409)
    tour.say("A release leaves a marker, called a tombstone, even if nothing was reserved yet. It "
             "is a row with the reservation's id, and without a product or a quantity:")
    [marker] = tour.find("products", "reservations", id=OWN_ID)
    tour.print(draw_row(marker) + "\n")


def await_call(tour: Tour, pending: Pending) -> None:
    """Wait until orders is calling products, or the request is answered (on a slow machine)."""
    def is_calling() -> bool:
        return tour.in_flight("products", of="orders") > 0 or pending.is_answered()

    poll("orders calls products", is_calling, True)
    tour.print()


def log_lines(tour: Tour, text: str) -> list[str]:
    """Return the log lines of products that contain a text."""
    return [line for line in list(tour.shop.lines) if line.startswith("products") and text in line]


def status(tour: Tour, order_id: int) -> str:
    [order] = tour.find("orders", "orders", id=order_id)
    return order["status"]


def stock(tour: Tour) -> int:
    """Return how many laptops are free to reserve."""
    [laptop] = tour.find("products", "products", id=LAPTOP)
    return laptop["stock"]
