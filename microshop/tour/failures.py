"""The chapters about calls that fail."""
import re
from typing import Any

from microshop.chassis.child import RestartPolicy
from microshop.chassis.client import BULKHEAD_TIME, MAX_RETRIES
from microshop.chassis.config import TIMEOUT
from microshop.chassis.handler import ANSWER_SHARE
from microshop.chassis.resilience import CircuitBreaker, RetryBudget
from microshop.orders import CALL_TIME
from microshop.tour.drawing import Answer, draw_answer
from microshop.tour.own_shop import poll
from microshop.tour.stage import Pending, Tour, send

# Numbers of the chapters; some are given to the shop as flags. Times are in seconds.
KILLS = 3            # of users, one after another
HANG_TIMEOUT = 1.0   # how long a call may take when a service hangs
CALLERS = CircuitBreaker.IN_A_ROW
CLIENT_TIME = CALL_TIME / 2  # how long a client waits for an order
HURRY_TIME = 0.2     # how long a client in a hurry waits
LIMIT = 2            # calls in flight to each service, in the chapter about bulkheads
FULL_TIMEOUT = 2.0   # how long a call may take there
ORDER = {"userId": 1, "productId": 101}


# --- what the chapters share

def breaker_state(tour: Tour, service: str) -> str:
    """Return the state of the gateway's circuit breaker for a service."""
    states = tour.metrics().select("microshop_breaker_state", upstream=service)
    return next(labels["state"] for labels, is_present in states if is_present)


def statuses(answers: list[Answer]) -> list[int]:
    return sorted(answer.status for answer in answers)


def begin_at_paused(tour: Tour, service: str, target: str, *, data: Any = None,
                    headers: dict[str, str] | None = None) -> Pending:
    """Pause a service, and begin a request that is sent to it on a connection it has accepted."""
    tour.curl(f"/{service}?limit=1")  # it leaves such a connection, which the gateway keeps
    tour.pause(service)
    pending = tour.begin_curl(target, data=data, headers=headers)
    poll(f"the gateway sends the request to {service}",  # twice: time enough to send it
         lambda: [tour.in_flight(service) for _ in range(2)], [1, 1])
    return pending


def kill_and_wait(tour: Tour, service: str) -> None:
    """Kill a service, and wait until the supervisor has started it again."""
    pid = tour.shop.pid(service)
    tour.kill(service)
    poll(f"run_all starts {service} again", lambda: tour.shop.pid(service), lambda new: new != pid)


# --- the chapters

def service_gone(tour: Tour) -> None:
    """A service is gone."""
    tour.say("""
        Processes end: they have a bug, or the memory is full, or a person makes a mistake. The
        supervisor (run_all) starts a service again that has ended. It also holds the port of the
        service open. So meanwhile, new connections are not refused: they wait until the new process
        accepts them.

        Here the users service gets a request, and is killed before it can answer. To be sure that
        it has the request by then, we pause it first.
        """)
    tour.start_shop()
    tour.predict("What does the client that asks for a user get? And what does a client get that "
                 "asks for a product meanwhile?")
    pending = begin_at_paused(tour, "users", "/users/1")
    product = tour.curl("/products/101")
    tour.expect("The products service does not need users, and answers", product.status, 200)
    kill_and_wait(tour, "users")
    answer = tour.finish_curl(pending)
    tour.expect("The client gets the user: it has only waited longer", answer.status, 200)
    tour.say("The gateway noticed that the connection broke, and sent the request once more:")
    tour.shop.await_line(f"^gateway .*{answer.id} GET /users/1 200")
    tour.show_log(answer.id, "gateway", "users")
    show_backoff(tour)
    tour.trade_off(f"""
        The supervisor could start a service at once, each time. But some services fail whenever
        they start, for instance because of a damaged file. They would then start and fail without
        end, use a whole core, and fill the disk with their logs. So the range of the pause doubles,
        up to {RestartPolicy.LAST_PAUSE:g} s. A random part of it (jitter) keeps services that
        failed together from starting together. The price: after many failures, a service stays away
        for some seconds although it could run again.
        """)


def show_backoff(tour: Tour) -> None:
    """Show how long a service that is killed again and again stays away."""
    tour.predict(f"Now we kill the users service {KILLS} times more. How long does the supervisor "
                 "wait each time before it starts it again?")
    shown = len(tour.shop.lines)
    for _ in range(KILLS):
        kill_and_wait(tour, "users")
        tour.curl("/users/1")
    tour.show_lines("run_all", since=shown)
    first = RestartPolicy.FIRST_PAUSE
    tour.say(f"""
        Each pause is a random time in a range, and the range doubles: {first:g} to {2 * first:g} s
        after the first end of a process, then {2 * first:g} to {4 * first:g} s, and so on. After
        {RestartPolicy.HEALTHY_TIME:g} s without an end, it begins again.
        """)
    pauses = [float(pause) for line in tour.shop.lines[shown:]
              for pause in re.findall("^run_all .*again in ([0-9.]+) s", line)]
    least = min(RestartPolicy.FIRST_PAUSE * 2 ** (KILLS - 1), RestartPolicy.LAST_PAUSE / 2)
    tour.expect(f"The ranges double (backoff): the last pause is at least {least:g} s",
                pauses[-1], lambda pause: pause > least - 0.05)  # the log rounds it


def service_hangs(tour: Tour) -> None:
    """A service hangs."""
    tour.say(f"""
        A service that hangs is worse than one that is gone: it accepts requests and answers none.
        Its callers wait, and each request that waits holds memory and a thread. So every call has a
        timeout. Here it is {HANG_TIMEOUT:g} s (without the flag: {TIMEOUT.default} s).
        """)
    tour.start_shop(f"--timeout={HANG_TIMEOUT:g}")
    tour.predict(f"The users service hangs. {CALLERS} clients ask for a user at the same time, and "
                 f"then {CALLERS} more. How long do the first ones wait, and how long the others?")
    tour.pause("users")
    slow = tour.curl_at_once(CALLERS, "/users/1")
    tour.expect("Each of the first clients waits, and gets 504 (Gateway Timeout)",
                statuses(slow), [504] * CALLERS)
    tour.say(f"""
        The gateway has a circuit breaker for each service. It opens after {CircuitBreaker.IN_A_ROW}
        failures in a row, at first for {CircuitBreaker.FIRST_PAUSE:g} s. While it is open, calls to
        users fail at once. (If you do this by hand, you have to be as quick.)
        """)
    quick = tour.curl_at_once(CALLERS, "/users/1")
    tour.print("(one of these answers)")
    tour.print(draw_answer(quick[0], ("Retry-After",)) + "\n")
    # All but one, since one may come late, when the circuit breaker is half-open already.
    tour.expect("The others get 503, and the users service is not called",
                statuses(quick)[:CALLERS - 1], [503] * (CALLERS - 1))
    tour.expect("They learn when to try again", "retry-after" in quick[0].headers, True)
    product = tour.curl("/products/101")
    tour.expect("The circuit breaker for products is closed", product.status, 200)
    tour.expect("They wait less than the first ones", quick[CALLERS - 2].seconds,
                lambda seconds: seconds < slow[0].seconds)
    show_probe(tour)
    tour.choose_watch(f"#request={quick[0].id}")
    tour.trade_off("""
        Each call could just wait for its timeout. But then every client waits in vain, however
        often the service has failed. And if it hangs because it has too much to do, more requests
        make that worse. The price of a circuit breaker: while it is open, it also rejects calls
        that would have worked.
        """)


def show_probe(tour: Tour) -> None:
    """Show what a half-open circuit breaker lets pass, and how it closes."""
    tour.say(f"""
        (Retry-After is in whole seconds.) After {CircuitBreaker.FIRST_PAUSE:g} s, the circuit
        breaker is half-open: it lets a single request pass, the probe. Others wait for the result
        of the probe, but at most {BULKHEAD_TIME:g} s. The users service still hangs:
        """)
    tour.expect("The circuit breaker is half-open", lambda: breaker_state(tour, "users"),
                "half-open")
    answers = tour.curl_at_once(CALLERS, "/users/1")
    tour.expect("Only the probe was sent to users, and gets 504; the others get 503",
                statuses(answers), [503] * (CALLERS - 1) + [504])
    tour.say("""
        The probe has failed, so the circuit breaker is open for twice as long. Now we resume the
        users service, and the next probe succeeds:
        """)
    tour.resume("users")
    tour.print(f"$ until curl -sf localhost:{tour.port()}/users/1; do sleep 0.1; done\n")
    tour.expect("The users service answers again",
                lambda: send(tour.port(), "GET", "/users/1").status, 200)
    tour.shop.await_line("circuit breaker for users at .* closed")
    lines = tour.show_log("circuit breaker", "gateway")
    pauses = re.findall(r"opened (?:again )?for ([0-9.]+) s", "\n".join(lines))
    tour.expect("The second pause was twice as long as the first",
                float(pauses[1]), 2 * float(pauses[0]))


def deadline(tour: Tour) -> None:
    """Time is passed on."""
    tour.say(f"""
        A client does not wait forever. It can say for how long, in seconds, in the header
        X-Request-Timeout. Each process that works on the request keeps {ANSWER_SHARE:.0%} of its
        time for the answer, and says in each call to another service how much time is left. So the
        deadline comes earlier from hop to hop.

        Without such a header, the orders service waits up to {CALL_TIME:g} s for the products
        service. Here the products service is paused, and the client waits {CLIENT_TIME:g} s for its
        order.
        """)
    tour.start_shop()
    tour.predict("How long will the orders service wait for products, and how long will the "
                 "gateway wait for orders?")
    tour.pause("products")
    answer = tour.curl("/orders", data=ORDER, headers={"X-Request-Timeout": f"{CLIENT_TIME:g}"})
    tour.expect("The client gets an answer in time: 202, the order is not decided yet",
                answer.status, 202)
    tour.shop.await_line(f"^orders .*{answer.id} POST /orders")
    tour.resume("products")
    spans = tour.show_trace(answer.id, "orders", "products")
    waited = max(span["duration"] / 1e6 for span in spans if span["name"] == "put products")
    tour.expect(f"The orders service waited for clearly less than {CALL_TIME:g} s",
                waited, lambda seconds: seconds < CALL_TIME * 0.9)
    refuse_late(tour)
    show_hurry(tour)
    tour.trade_off("""
        The header could give the time of day at which the client stops waiting. But the clocks of
        two machines differ, often by more than a request takes. The price: a service does not know
        how long a request has been waiting to be read. In the trace above, the products service
        carried out a request after its caller had given up: it did not know that it had been
        paused.
        """)


def refuse_late(tour: Tour) -> None:
    """Show that a request whose time is over is not worked on."""
    tour.say("""
        The order is stored, and the orders service will try again later. A request whose time is
        over is not worked on at all. Here we send one to users directly, as the gateway would:
        """)
    late = tour.curl("/users/2", method="PUT", data={"name": "Robert"}, to="users",
                     headers={"X-Request-Timeout": "0"})
    tour.expect("The late request is refused", late.status, 503)
    name = tour.curl("/users/2").json["name"]
    tour.expect("The late request has changed nothing", name, "Bob")


def show_hurry(tour: Tour) -> None:
    """Show that clients in a hurry do not open the circuit breaker."""
    tour.predict(f"The users service stops for a moment, and {CALLERS} clients in a hurry get no "
                 f"answer within {HURRY_TIME:g} s. Should the gateway send no more requests to "
                 "users?")
    tour.pause("users")
    tour.curl_at_once(CALLERS, "/users/1", headers={"X-Request-Timeout": f"{HURRY_TIME:g}"})
    tour.resume("users")
    tour.expect("The circuit breaker is closed: the users service had no fair chance to answer",
                breaker_state(tour, "users"), "closed")


def bulkhead(tour: Tour) -> None:
    """A bulkhead keeps the rest quick."""
    tour.say(f"""
        Bulkheads divide a ship into parts: if one part is full of water, the ship still floats.
        Here a bulkhead limits how many calls to one service may be in flight. So if a service
        hangs, only a few requests of the gateway wait for it. In this shop the limit is {LIMIT},
        and a call may take {FULL_TIMEOUT:g} s.
        """)
    tour.start_shop(f"--max-in-flight={LIMIT}", f"--timeout={FULL_TIMEOUT:g}")
    tour.predict(f"The users service hangs, and {LIMIT} requests wait for it. What does the next "
                 "client that asks for a user get? And one that asks for a product?")
    tour.pause("users")
    pending = [tour.begin_curl("/users/1") for _ in range(LIMIT)]
    tour.print()
    tour.expect(f"{LIMIT} calls to users are in flight", lambda: tour.in_flight("users"), LIMIT)
    rejected = tour.curl("/users/1", show=("Retry-After",))
    tour.expect("The next request finds no place, and gets 503", rejected.status, 503)
    tour.expect(f"It has waited {BULKHEAD_TIME:g} s for one, since most calls are short",
                rejected.seconds, lambda seconds: seconds > BULKHEAD_TIME * 0.9)
    product = tour.curl("/products/101")
    tour.expect("The products service has a bulkhead of its own, and answers", product.status, 200)
    tour.say("The calls that hang keep their places until their time is over:")
    answers = [tour.finish_curl(each) for each in pending]
    tour.expect("They get 504", statuses(answers), [504] * LIMIT)
    tour.resume("users")
    tour.predict("These calls have failed. Are their places free again?")
    tour.expect("No call to users is in flight", tour.in_flight("users"), 0)
    tour.expect("The users service gets requests again", tour.curl("/users/1").status, 200)
    tour.trade_off("""
        There could be one limit for all services together. But then a service that hangs soon takes
        every place, and the whole shop hangs with it. The price of a limit for each service: a
        service that is popular gets no more places than the others, even if those are free.
        """)


def retries(tour: Tour) -> None:
    """Retries only where a repeat is safe."""
    tour.say(f"""
        When a connection breaks, the caller cannot know whether the request was carried out. A GET
        changes nothing, so the gateway sends it again: at once on a new connection if a kept one
        broke, otherwise up to {MAX_RETRIES} times, after short random pauses that grow (backoff
        with jitter). PUT and DELETE are sent again, too: done twice, they have the same effect as
        done once. But a POST that is carried out twice makes two orders. Here a client orders a
        laptop, and the orders service is killed before it can answer.
        """)
    tour.start_shop()
    tour.predict("What does the client get?")
    pending = begin_at_paused(tour, "orders", "/orders", data=ORDER)
    kill_and_wait(tour, "orders")
    answer = tour.finish_curl(pending)
    tour.expect("The gateway reports what happened, and has not tried again",
                answer.status, 502)
    tour.say("""
        Is there an order now? The gateway does not know, and neither does the client. (This time
        there is none: the orders service was paused before it read the request.) If the client
        tries again, it may get two laptops. So a client should choose a key for each order, and
        send it as Idempotency-Key. The orders service stores the key with the order, and carries
        out a request with this key only once. Then a repeat is safe, also for the gateway.
        """)
    show_key(tour)
    tour.trade_off("""
        The gateway could repeat every request. Mostly that works; but now and then a customer gets
        two laptops, and no database knows that it was one order. Or it could repeat none: then
        clients see errors whenever a service restarts. The price of keys: every client must send
        them, and orders must store them.
        """)


def show_key(tour: Tour) -> None:
    """Show that a request with a key may be repeated, by the gateway and by the client."""
    key = {"Idempotency-Key": "my-first-order"}
    tour.predict("The same happens to a POST with a key. What does the client get now?")
    pending = begin_at_paused(tour, "orders", "/orders", data=ORDER, headers=key)
    kill_and_wait(tour, "orders")
    answer = tour.finish_curl(pending, ("Location",))
    tour.expect("The order is placed: the gateway has tried again", answer.status, 201)
    tour.shop.await_line(f"^gateway .*{answer.id} POST /orders 201")
    tour.show_log(answer.id, "gateway", "orders")
    budget = RetryBudget
    tour.say(f"""
        A retry is more work for a service that may have too much of it already. So the gateway has
        a retry budget: it retries at most {budget.SHARE:.0%} of the calls of the last
        {budget.WINDOW} s ({budget.AT_LEAST} retries are always allowed, since a share of a few
        calls would be none). The client may repeat its request, too. It gets the same answer,
        marked as a replay:
        """)
    again = tour.curl("/orders", data=ORDER, headers=key, show=("Location", "Idempotency-Replayed"))
    tour.expect("It is the same order, and marked as a replay",
                (again.headers.get("location"), "idempotency-replayed" in again.headers),
                (answer.headers["location"], True))
    tour.expect("No other order came after it", tour.curl("/orders").json[-1]["id"],
                answer.json["id"])
