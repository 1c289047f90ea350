"""The chapters about requests and data, before anything fails."""
from microshop.chassis.config import TIMEOUT
from microshop.tour.drawing import Answer
from microshop.tour.stage import Tour

CLIENT_TIME = 2  # seconds that a client is willing to wait


def one_request(tour: Tour) -> None:
    """One request, two processes."""
    tour.say("""
        A client talks only to the gateway. The gateway owns no data: it forwards the request to the
        service that the first segment of the path names, here to the users service.
        """)
    tour.start_shop()
    tour.predict("Which processes of the shop work on GET /users/1, and how do they know that it "
                 "is the same request?")
    answer = tour.curl("/users/1", show=("X-Request-Id",))
    tour.expect("The answer is 200", answer.status, 200)
    tour.say("""
        (Of an answer's headers, only those are shown that matter here; your own curl prints more.)

        The gateway has given the request an id, a correlation id. It sends the id on, in the header
        X-Request-Id, and each process writes it into its log.
        """)
    logged = tour.shop.await_line(r"^users .*Z (\S+) GET /users/1 ")[1]
    tour.expect(f"The users service has logged the same id, {answer.id}", logged, answer.id)
    tour.say("So one search finds the request in the lines of both processes:")
    tour.show_log(answer.id, "gateway", "users")
    tour.say("""
        A trace tells more: when each process began, and how long it took. Each line below is a
        span. The gateway's call to users is a span of its own: part of it is on the way.
        """)
    spans = tour.show_trace(answer.id, "users")
    known = {span["id"] for span in spans}
    tour.expect("All three spans belong to one trace, and two name the span that caused them",
                (len({span["traceId"] for span in spans}),
                 sum(span.get("parentId") in known for span in spans)), (1, 2))
    tour.trade_off("""
        A client could call users directly, which saves one step (a hop). But then each client must
        know where every service is. And what the gateway does for all services (count how often a
        client asks, check its token) each service would have to do itself. The price of a gateway
        is one more hop: the time in the trace that is not in the bar of users.
        """)


def own_data(tour: Tour) -> None:
    """Each service owns its data."""
    tour.say("""
        An order contains only the ids of its user and its product, for their names belong to other
        services. Each service has a database of its own (database per service), and no other
        process opens it. So there is no JOIN over all three.
        """)
    tour.start_shop()
    tour.predict("A client wants an order together with the names of its user and its product. "
                 "Which process puts them together, and how many calls does that take?")
    answer = tour.curl("/orders/201?expand=user,product", show=("X-Complete",))
    tour.expect("The order contains its user and its product, with their names",
                (answer.json["user"]["name"], answer.json["product"]["name"]), ("Alice", "Laptop"))
    tour.say("""
        The gateway has called three services: first orders, then users and products in parallel.
        This is API composition. X-Complete says that it has found both parts. The trace shows the
        calls:
        """)
    tour.show_trace(answer.id, "orders", "users", "products")
    expand_without_users(tour)
    audit_files(tour)
    tour.trade_off("""
        One database for all would give us the JOIN, foreign keys and one transaction. But then each
        service depends on the tables of the others: no service can change its schema alone, any of
        them can write what another owns, and one long lock stops them all. The price is what you
        saw: calls instead of a JOIN, answers that may lack a part, and an audit instead of
        constraints.
        """)


def expand_without_users(tour: Tour) -> None:
    tour.say(f"""
        Now the users service hangs. A client asks again. Its X-Request-Timeout says that it waits
        for {CLIENT_TIME} s, not longer.
        """)
    tour.predict("What does the client get: nothing, an error, or the order without its user?")
    tour.pause("users")
    answer = tour.curl("/orders/201?expand=user,product", show=("X-Complete", "Cache-Control"),
                       headers={"X-Request-Timeout": str(CLIENT_TIME)})
    tour.resume("users")
    tour.expect(f"It does not have to wait for the gateway's own limit, {TIMEOUT.default} s",
                answer.seconds, lambda seconds: seconds < float(TIMEOUT.default or 0))
    tour.expect("The order comes all the same, but not complete",
                (answer.status, answer.headers.get("x-complete")), (200, "1/2"))
    tour.expect("Its product is there, and its user is null",
                (answer.json["product"]["name"], answer.json["user"]), ("Laptop", None))
    tour.expect("`missing` says which service has failed",
                [part["service"] for part in answer.json.get("missing", [])], ["users"])


def audit_files(tour: Tour) -> None:
    tour.say("""
        Without a common database, there are no foreign keys between services either. Instead, the
        shop has an audit. It reads the files of all services and reports contradictions, such as
        units that have vanished, or an order whose units are not reserved.
        """)
    tour.expect("The files agree", tour.show_audit(), True)
    tour.predict("For each order, the products service keeps a reservation: units that it has set "
                 "aside. Someone on this machine deletes that of order 201, past the gateway. Does "
                 "any process notice?")
    released = tour.curl("/reservations/201", method="DELETE", to="products")
    tour.expect("The products service does it, since it knows nothing of orders",
                released.status, 204)
    tour.expect("The audit finds the contradiction", tour.show_audit(), False)


def two_editors(tour: Tour) -> None:
    """Two editors."""
    tour.say("""
        Ann and Ben both edit product 101. A PUT replaces the whole product. So each of them sends
        its name and its stock, even to change only one of the two.
        """)
    tour.start_shop()
    seen = tour.curl("/products/101", show=("ETag",))
    name, stock, counted = seen.json["name"], seen.json["stock"], seen.json["stock"] - 10
    tour.predict(f"Both have this answer on their screens. Ann has counted {counted} units, and "
                 f"sends that. Then Ben sends another name, '{name} 14'. What is stored now?")
    put(tour, name, counted)
    seen = put(tour, f"{name} 14", stock)
    tour.expect("Ann's count is lost: Ben has overwritten it, and neither of them knows",
                seen.json["stock"], stock)
    tour.say("""
        This is a lost update. The ETag of an answer can prevent it: it is a fingerprint of the
        product. A client that sends it back in If-Match says: change the product only if it is
        still the one that I have seen.
        """)
    tour.predict(f"Both start from the last answer, with {stock} units. Ann sends her count "
                 "again, then Ben another name, and both send the ETag that they have seen. What "
                 "does Ben get?")
    put(tour, f"{name} 14", counted, seen.headers["etag"])
    refused = put(tour, f"{name} 15", stock, seen.headers["etag"])
    tour.expect("Ben gets 412 Precondition Failed", refused.status, 412)
    tour.say("Ben fetches the product again, and repeats his change with the new ETag:")
    seen = tour.curl("/products/101", show=("ETag",))
    tour.expect("Ann's count is stored", seen.json["stock"], counted)
    last = put(tour, f"{name} 15", seen.json["stock"], seen.headers["etag"])
    tour.expect("Both changes are stored",
                (last.json["name"], last.json["stock"]), (f"{name} 15", counted))
    tour.trade_off("""
        A lock could keep Ben out while Ann edits. But when does it end if Ann goes home? With
        optimistic concurrency, nothing is locked while people think. The service compares when they
        write, and the later one has to try again, which is cheap where conflicts are rare. The
        comparison and the write are one transaction, so no other write comes between them.
        """)


def put(tour: Tour, name: str, stock: int, tag: str = "") -> Answer:
    """Replace product 101; with a tag, only if that is still its ETag."""
    return tour.curl("/products/101", method="PUT", data={"name": name, "stock": stock},
                     headers={"If-Match": tag} if tag else {}, show=("ETag",))
