"""The chapters about requests and data, before anything fails."""
from microshop.tour.stage import Tour


def one_request(tour: Tour) -> None:
    """One request, two processes."""
    tour.say("""
        A client talks only to the gateway. The gateway owns no data: it forwards the request to
        the service that the first segment of the path names, here to users.
        """)
    tour.start_shop()
    tour.predict("Which processes of the shop work on GET /users/1, and how do they know that it "
                 "is the same request?")
    answer = tour.curl("/users/1", show=("X-Request-Id", "Server-Timing"))
    tour.expect("The answer is 200", answer.status, 200)
    tour.say("""
        The gateway has given the request an id. It sends the id on as X-Request-Id, and each
        process writes it into its log. So one search finds the request in both logs:
        """)
    tour.show_log(answer.id, "gateway", "users")
    tour.say("""
        A trace tells more: when each process began, and how long it took. Each line below is a
        span. The gateway's call is a span of its own, since a call may need several tries.
        """)
    spans = tour.show_trace(answer.id, "users")
    tour.expect("All three spans belong to one trace",
                len({span["traceId"] for span in spans}), 1)
    tour.trade_off("""
        A client could call users directly, which saves a hop. But then each client must know
        where every service is, and each service needs its own rate limit and token check. The
        price of a gateway is the time between the first two lines of the trace.
        """)


def own_data(tour: Tour) -> None:
    """Each service owns its data."""
    raise NotImplementedError


def two_editors(tour: Tour) -> None:
    """Two editors."""
    raise NotImplementedError
