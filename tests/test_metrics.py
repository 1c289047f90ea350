"""GET /metrics: what Prometheus can learn from each process, and what it must not be told."""
import math
import os
import signal
import socket
import struct
import unittest
from collections import Counter
from unittest import mock

from microshop import SERVICES
from microshop.chassis.admission import Rate
from microshop.chassis.resilience import CircuitBreaker
from microshop.gateway import Gateway
from microshop.orders import Orders
from microshop.users import Users
from tests.formats import Metrics, parse_metrics
from tests.helpers import (
    NOBODY, PATIENCE, Wire, ask, exchange, running, running_moody_shop, together, upstream,
    wait_until)
from tests.observing import (
    METRICS_TYPE, SERVED, TRIED, Late, Stub, await_metrics, await_served, metrics_of, real_shop,
    spans_of)

BOUNDS = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5,
          5.0, 7.5, 10.0, math.inf]  # of the buckets, in seconds
OF_ALL = {  # families of every process: the type of each, and its labels
    SERVED: ("histogram", {"http_request_method", "http_route", "http_response_status_code",
                           "error_type"}),
    "process_start_time_seconds": ("gauge", set()),
    "process_cpu_seconds_total": ("counter", set()),
    "process_resident_memory_bytes": ("gauge", set()),
    "process_open_fds": ("gauge", set()),
    "microshop_process_info": ("gauge", {"service", "pid"}),
    "microshop_process_restarts_total": ("counter", set()),
    "microshop_draining": ("gauge", set())}
OF_CALLERS = {
    TRIED: ("histogram", {"http_request_method", "server_address", "server_port", "peer_service",
                          "http_response_status_code", "error_type"}),
    "microshop_calls_total": ("counter", {"upstream"}),
    "microshop_retries_total": ("counter", {"upstream"}),
    "microshop_rejected_calls_total": ("counter", {"upstream", "reason"}),
    "microshop_breaker_state": ("gauge", {"upstream", "server", "state"}),
    "microshop_breaker_open_seconds": ("gauge", {"upstream", "server"}),
    "microshop_breaker_changes_total": ("counter", {"upstream", "server", "state"}),
    "microshop_bulkhead_in_use": ("gauge", {"upstream"}),
    "microshop_bulkhead_limit": ("gauge", {"upstream"}),
    "microshop_retry_budget_used": ("gauge", {"upstream"}),
    "microshop_retry_budget_limit": ("gauge", {"upstream"})}
OF_ORDERS = {
    "microshop_saga_moves_total": ("counter", {"from", "to"}),
    "microshop_unfinished_orders": ("gauge", {"status"})}
FAMILIES = {"gateway": {**OF_ALL, **OF_CALLERS}, "users": OF_ALL, "products": OF_ALL,
            "orders": {**OF_ALL, **OF_CALLERS, **OF_ORDERS}, "live": OF_ALL}

BOUGHT = {"userId": 1, "productId": 101}
GET_USERS = b"GET /users HTTP/1.1\r\nHost: shop\r\n\r\n"
HOSTILE = "h0stile"  # part of every path and method that must not become a label
Served = dict[tuple[str, str, str], float]


def served(metrics: Metrics) -> Served:
    """Return how many requests were counted, by method, route and status."""
    return {(labels["http_request_method"], labels.get("http_route", ""),
             labels["http_response_status_code"]): value
            for labels, value in metrics.find(f"{SERVED}_count")}


def await_in_flight(port: int) -> None:
    """Wait until a gateway has one call in flight."""
    await_metrics(port, lambda metrics: metrics.total("microshop_bulkhead_in_use") == 1,
                  "one call in flight")


class WholeShopTest(unittest.TestCase):
    """A shop in which all kinds of things have happened: answers, errors, a kill, a stop."""

    @classmethod
    def setUpClass(cls):
        cls.shop = shop = cls.enterClassContext(real_shop())
        shop.ask("POST", "/orders", BOUGHT)
        shop.ask("POST", "/orders", {**BOUGHT, "quantity": 100_000})
        shop.ask("POST", "/orders/203/cancel")
        shop.ask("GET", "/orders?expand=user,product")
        shop.ask("GET", f'/users/"{HOSTILE}\\"<img/src=x/onerror=alert(1)>')
        exchange(shop.gateway, b"BREW /%s HTTP/1.1\r\nHost: shop\r\n\r\n" % HOSTILE.encode())
        os.kill(shop.pid("users"), signal.SIGKILL)
        shop.run_all.wait_for(r"started users \(pid", times=2)
        wait_until(lambda: shop.ask("GET", "/users/1").status == 200, "users to be back")
        os.kill(shop.pid("products"), signal.SIGSTOP)
        try:
            shop.ask("POST", "/orders", BOUGHT)
        finally:
            os.kill(shop.pid("products"), signal.SIGCONT)

    def test_every_process_answers_in_the_format_of_prometheus(self):
        for name, port in self.shop.ports.items():
            for method in ("GET", "HEAD"):
                answer = ask(port, method, "/metrics")
                self.assertEqual((answer.status, answer.headers.get("content-type")),
                                 (200, METRICS_TYPE), f"{method} /metrics of {name}")
            self.assertGreater(len(parse_metrics(ask(port, target="/metrics").body)), 0)

    def test_each_process_has_the_families_of_its_kind_with_their_types(self):
        for name, families in FAMILIES.items():
            found = metrics_of(self.shop.ports[name])
            self.assertEqual({family.name: family.type for family in found.values()},
                             {family: kind for family, (kind, _) in families.items()},
                             f"families of {name}")

    def test_samples_have_no_other_labels_than_those_agreed(self):
        for name, families in FAMILIES.items():
            for family in metrics_of(self.shop.ports[name]).values():
                found = {label for _, labels in family.samples for label, _ in labels} - {"le"}
                self.assertLessEqual(found, families[family.name][1], f"{family.name} of {name}")

    def test_buckets_are_those_of_opentelemetry_after_three_smaller_ones(self):
        for name in ("gateway", *SERVICES):  # live has answered no request
            ask(self.shop.ports[name], target="/no-such-path")
            found: dict[tuple, list[float]] = {}
            for labels, _ in metrics_of(self.shop.ports[name]).find(f"{SERVED}_bucket"):
                bound = float(labels.pop("le"))
                found.setdefault(tuple(labels.items()), []).append(bound)
            self.assertTrue(found, f"{name} has counted no request")
            for labels, bounds in found.items():
                self.assertEqual(bounds, BOUNDS, f"{name}: {labels}")

    def test_every_answer_names_its_process(self):
        for name, port in self.shop.ports.items():
            metrics = metrics_of(port)
            self.assertEqual(metrics.find("microshop_process_info"),
                             [({"service": name, "pid": str(self.shop.pid(name))}, 1)])
            self.assertGreater(metrics.total("process_start_time_seconds"), 1.7e9, name)
            self.assertGreater(metrics.total("process_resident_memory_bytes"), 1e6, name)
            self.assertGreater(metrics.total("process_cpu_seconds_total"), 0, name)
            self.assertGreater(metrics.total("process_open_fds"), 2, name)
            self.assertEqual(metrics.total("microshop_draining"), 0, name)

    def test_the_restarts_of_a_process_are_counted(self):
        found = {name: metrics_of(self.shop.ports[name]).total("microshop_process_restarts_total")
                 for name in FAMILIES}
        self.assertEqual(found, {**dict.fromkeys(FAMILIES, 0), "users": 1})

    def test_nothing_that_a_client_has_made_up_becomes_a_label(self):
        for name, port in self.shop.ports.items():
            self.assertNotIn(HOSTILE, ask(port, target="/metrics").body.decode(), name)

    def test_an_order_that_waits_for_a_service_is_counted_as_a_try_that_timed_out(self):
        metrics = metrics_of(self.shop.ports["orders"])
        found = metrics.total(f"{TRIED}_count", peer_service="products", error_type="timeout")
        self.assertGreaterEqual(found, 1)


class CountTest(unittest.TestCase):
    """What is counted is what was sent, and nothing else."""

    def setUp(self):
        self.shop = self.enterContext(real_shop())

    def send(self, port: int, method: str, target: str) -> int:
        """Send a request as it is, even if no client would; return the status."""
        head = f"{method} {target} HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n"
        [answer] = exchange(port, head.encode())
        return answer.status

    def test_requests_are_counted_by_method_route_and_status(self):
        port, expected = self.shop.ports["users"], Counter()
        for method, target, counted, route, status in (
                ("GET", "/users", "GET", "/users", 200),
                ("GET", "/users/", "GET", "/users", 200),
                ("GET", "/users?limit=1", "GET", "/users", 200),
                ("GET", "/users?limit=x", "GET", "/users", 400),
                ("GET", "/users/1", "GET", "/users/{id}", 200),
                ("GET", "/users/2", "GET", "/users/{id}", 200),
                ("HEAD", "/users/2", "HEAD", "/users/{id}", 200),
                ("GET", "/users/999", "GET", "/users/{id}", 404),
                ("DELETE", "/users/2", "DELETE", "/users/{id}", 204),
                ("PATCH", "/users/1", "PATCH", "/users/{id}", 405),
                ("OPTIONS", "/users", "OPTIONS", "/users", 204),
                ("POST", "/users", "POST", "/users", 411),
                ("GET", "/nowhere", "GET", "", 404),
                ("GET", "/users/x", "GET", "", 404),
                ("BREW", "/", "_OTHER", "", 501),
                ("get", "/", "_OTHER", "", 501),
                ("GET", "/health", "GET", "/health", 200),
                ("GET", "/health/live", "GET", "/health/live", 200)):
            self.assertEqual(self.send(port, method, target), status, f"{method} {target}")
            expected[counted, route, str(status)] += 1
        self.assertEqual(served(await_served(port, expected.total())), expected)

    def test_the_gateway_counts_what_it_forwards_by_the_name_of_the_service(self):
        for target in ("/users", "/users/1", "/users/1?x", "/products/101", "/orders/201", "/",
                       "/nowhere"):
            self.shop.ask("GET", target)
        metrics = await_served(self.shop.gateway, 7)
        self.assertEqual(served(metrics), {
            ("GET", "/users/*", "200"): 3, ("GET", "/products/*", "200"): 1,
            ("GET", "/orders/*", "200"): 1, ("GET", "/", "200"): 1, ("GET", "", "404"): 1})
        for name, count in (("users", 3), ("products", 1), ("orders", 1)):
            self.assertEqual(metrics.find(f"{TRIED}_count", peer_service=name), [({
                "http_request_method": "GET", "server_address": "127.0.0.1",
                "server_port": str(self.shop.ports[name]), "peer_service": name,
                "http_response_status_code": "200"}, count)])
            self.assertEqual(metrics.total("microshop_calls_total", upstream=name), count)

    def test_a_request_that_cannot_be_read_is_counted_without_its_method(self):
        [answer] = exchange(self.shop.gateway, b"GET /users\r\n\r\n")
        self.assertEqual(served(await_served(self.shop.gateway, 1)),
                         {("_OTHER", "", str(answer.status)): 1})

    def test_made_up_paths_and_methods_make_no_new_series(self):
        def ask_for(number: int) -> None:
            for method in ("GET", "BREW{}"):
                for target in ("/nowhere-{}", "/users/{}", "/users/1/{}", "/orders?{}", "/{0}/{0}"):
                    self.send(
                        self.shop.gateway, method.format(number), target.format(number))

        def count_series() -> dict[str, int]:
            return {name: sum(len(family.samples) for family in metrics_of(port).values())
                    for name, port in self.shop.ports.items()}

        ask_for(7001)
        await_served(self.shop.gateway, 10)
        before = count_series()
        for number in range(7002, 7022):
            ask_for(number)
        await_served(self.shop.gateway, 210)
        self.assertEqual(count_series(), before, "the number of samples has grown")

    def test_asking_for_metrics_and_traces_is_not_counted_and_leaves_no_span(self):
        for name, port in self.shop.ports.items():
            for target in ("/metrics", "/traces", "/metrics/", "/traces?x=1"):
                for method in ("GET", "HEAD"):
                    self.assertEqual(self.send(port, method, target), 200, f"{target} of {name}")
            self.assertEqual(self.send(port, "GET", "/health/live"), 200)
            self.assertEqual(served(await_served(port, 1)), {("GET", "/health/live", "200"): 1})
            self.assertEqual([span["name"] for span in spans_of(port)], ["get /health/live"])

    def test_a_client_that_did_not_wait_for_its_answer_is_counted_as_499(self):
        late = Late()
        with upstream(late) as url, running(Gateway, users_url=[url]) as gateway:
            with Wire(gateway.server_port) as client:
                client.send(GET_USERS)
                await_in_flight(gateway.server_port)
                # Closing it resets the connection, so the gateway cannot send its answer.
                client.socket.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            late.go_on.set()
            self.assertEqual(served(await_served(gateway.server_port, 1)),
                             {("GET", "/users/*", "499"): 1})

    def test_requests_are_counted_with_and_without_an_access_log(self):
        for quiet in (True, False):
            with self.subTest(quiet=quiet), running(Users, quiet=quiet) as users:
                ask(users.server_port, target="/users")
                self.assertEqual(served(await_served(users.server_port, 1)),
                                 {("GET", "/users", "200"): 1})


class CallTest(unittest.TestCase):
    """Calls to other services: how often each was asked and tried, and what went wrong."""

    def open(self, settings: dict | None = None, **urls: str) -> int:
        """Start a gateway; return its port."""
        urls = {f"{name}_url": [url] for name, url in urls.items()}
        return self.enterContext(running(Gateway, **urls, **(settings or {}))).server_port

    def tried(self, metrics: Metrics) -> dict[tuple[str, str], float]:
        """Return how many tries were counted, by status and error."""
        return {(labels.get("http_response_status_code", ""), labels.get("error_type", "")): value
                for labels, value in metrics.find(f"{TRIED}_count")}

    def test_a_call_that_is_refused_is_asked_once_and_tried_three_times(self):
        port = self.open({"timeout": PATIENCE})
        self.assertEqual(ask(port, target="/users").status, 502)
        metrics = await_served(port, 1)
        self.assertEqual(self.tried(metrics), {("", "refused"): 3})
        self.assertEqual(metrics.find(f"{SERVED}_count"), [({
            "http_request_method": "GET", "http_route": "/users/*", "error_type": "502",
            "http_response_status_code": "502"}, 1)])
        for name, value in (("calls_total", 1), ("retries_total", 2), ("retry_budget_used", 2),
                            ("retry_budget_limit", 3), ("bulkhead_in_use", 0),
                            ("bulkhead_limit", 64)):
            found = metrics.find(f"microshop_{name}", upstream="users")
            self.assertEqual(found, [({"upstream": "users"}, value)], name)

    def test_counters_are_there_before_anything_has_happened(self):
        metrics = metrics_of(self.open())
        for name in SERVICES:
            for counter in ("calls", "retries", "rejected_calls"):
                found = metrics.find(f"microshop_{counter}_total", upstream=name)
                self.assertEqual([value for _, value in found],
                                 [0] * (2 if counter == "rejected_calls" else 1), counter)
            self.assertEqual(sum(value for _, value in metrics.find(
                "microshop_breaker_state", upstream=name, state="closed")), 1)

    def test_each_way_to_fail_has_an_error_type(self):
        for response, expected in (
                (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", ("500", "500")),
                (b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", ("404", "")),
                (b"garbage\r\n\r\n", ("", "invalid")), (b"", ("", "broken")),
                (None, ("", "timeout"))):
            answer, timeout = (Late(), 0.5) if response is None else (Stub(response), PATIENCE)
            with (self.subTest(expected), upstream(answer) as url,
                  running(Gateway, users_url=[url], timeout=timeout) as gateway):
                ask(gateway.server_port, "POST", "/users")
                found = self.tried(await_served(gateway.server_port, 1))
                self.assertEqual(found, {expected: 1})

    def test_an_open_breaker_shows_its_state_its_changes_and_what_it_rejects(self):
        self.enterContext(mock.patch.object(CircuitBreaker, "FIRST_PAUSE", PATIENCE))
        port = self.open({"timeout": PATIENCE}, users=NOBODY)
        for _ in range(5):
            ask(port, target="/users")
        answer = ask(port, target="/users")
        self.assertEqual(answer.status, 503, answer)
        metrics = await_served(port, 6)
        labels = {"upstream": "users", "server": NOBODY}
        states = {found["state"]: value
                  for found, value in metrics.find("microshop_breaker_state", upstream="users")}
        self.assertEqual(states, {"closed": 0, "open": 1, "half-open": 0})
        self.assertGreater(metrics.total("microshop_breaker_open_seconds", **labels), 0)
        self.assertGreater(metrics.total("microshop_rejected_calls_total", upstream="users",
                                         reason="breaker"), 0)
        self.assertEqual(
            metrics.total("microshop_breaker_changes_total", **labels, state="open"), 1)
        self.assertEqual(metrics.total("microshop_calls_total", upstream="users"), 6)

    def test_a_full_bulkhead_rejects_calls_but_not_those_who_look_at_it(self):
        late = Late()
        with upstream(late) as url:
            port = self.open({"max_in_flight": 1, "timeout": PATIENCE}, users=url)
            with Wire(port) as client:
                client.send(GET_USERS)
                await_in_flight(port)
                self.assertEqual(ask(port, target="/users").status, 503)
                metrics = await_served(port, 1)
                [span] = spans_of(port)[:1]
                late.go_on.set()
                self.assertEqual(client.read().status, 200)
        self.assertEqual(metrics.total("microshop_bulkhead_limit", upstream="users"), 1)
        rejected = {labels["reason"]: value for labels, value in
                    metrics.find("microshop_rejected_calls_total", upstream="users")}
        self.assertEqual(rejected, {"breaker": 0, "bulkhead": 1})
        self.assertEqual((span["name"], span["tags"]["error"]), ("get users", "bulkhead"))


class SagaTest(unittest.TestCase):
    def test_the_moves_of_orders_are_counted_and_those_that_are_unfinished(self):
        with running_moody_shop() as (shop, users, products):
            port = shop.orders.server_port
            products.mood = "lossy"
            self.assertEqual(shop.ask("POST", "/orders", BOUGHT).status, 202)
            found = metrics_of(port).find("microshop_unfinished_orders")
            self.assertEqual({labels["status"]: value for labels, value in found},
                             {"pending": 1, "rejected": 0, "cancelling": 0})
            products.mood = "well"
            wait_until(lambda: shop.status(203) == "confirmed", "order 203 to be confirmed")
            shop.ask("POST", "/orders", {**BOUGHT, "quantity": 100_000})
            shop.ask("POST", "/orders/203/cancel")
            metrics = await_metrics(
                port, lambda found: found.total("microshop_saga_moves_total") >= 6, "six moves")
        moves = {(labels["from"], labels["to"]): value
                 for labels, value in metrics.find("microshop_saga_moves_total") if value}
        self.assertEqual(moves, {
            ("new", "pending"): 2, ("pending", "confirmed"): 1, ("pending", "rejected"): 1,
            ("confirmed", "cancelling"): 1, ("cancelling", "cancelled"): 1})
        self.assertEqual(metrics.total("microshop_unfinished_orders"), 0)


    def test_a_service_that_has_lost_its_database_still_answers(self):
        with running(Orders) as orders:
            orders.database.path.rename(orders.database.path.with_suffix(".away"))
            wait_until(lambda: ask(orders.server_port, target="/orders").status == 503,
                       "the loss to be noticed")
            metrics = await_metrics(
                orders.server_port, lambda found: found.total(f"{SERVED}_count", error_type="503"),
                "a request that failed with 503")
        self.assertEqual(metrics.find("microshop_unfinished_orders"), [],
                         "what cannot be known is left out")


class AccessTest(unittest.TestCase):
    """Who may see metrics and traces at the gateway."""

    PROXIED = ({"X-Forwarded-For": "192.0.2.1"}, {"Forwarded": "for=192.0.2.1"},
               {"X-Forwarded-For": ""}, {"x-forwarded-for": "127.0.0.1"},
               {"Via": "1.1 nginx"}, {"Host": "shop.example"})

    def statuses(self, port: int, headers: dict[str, str]) -> set[int]:
        return {ask(port, method, target, headers).status for method in ("GET", "HEAD")
                for target in ("/metrics", "/traces", "/metrics/", "/traces?x=1")}

    def test_without_a_token_only_clients_that_were_not_proxied_see_them(self):
        with running(Gateway) as gateway:
            self.assertEqual(self.statuses(gateway.server_port, {}), {200})
            for headers in self.PROXIED:
                for token in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer x"}):
                    self.assertEqual(self.statuses(gateway.server_port, {**headers, **token}),
                                     {403}, {**headers, **token})

    def test_with_a_token_those_that_send_it_see_them_too(self):
        with running(Gateway, token="s3cret") as gateway:
            self.assertEqual(self.statuses(gateway.server_port, {}), {200})
            for headers in self.PROXIED:
                for token, status in (("s3cret", 200), ("s3cre", 403), ("", 403)):
                    sent = {**headers, "Authorization": f"Bearer {token}"}
                    self.assertEqual(self.statuses(gateway.server_port, sent), {status}, sent)
                self.assertEqual(self.statuses(gateway.server_port, headers), {403}, headers)

    def test_whoever_is_refused_sees_nothing(self):
        with running(Gateway) as gateway:
            answer = ask(gateway.server_port, target="/traces", headers=self.PROXIED[0])
        self.assertEqual(answer.headers["content-type"], "application/problem+json")
        self.assertEqual(answer.json["title"], "Forbidden")

    def test_they_do_not_count_for_the_rate(self):
        with running(Gateway, rate=Rate(1, 3600)) as gateway:
            self.assertEqual(ask(gateway.server_port).status, 200)
            self.assertEqual(ask(gateway.server_port).status, 429)
            self.assertEqual(self.statuses(gateway.server_port, {}), {200})

    def test_a_rate_that_is_exceeded_is_counted(self):
        with running(Gateway, rate=Rate(1, 3600)) as gateway:
            for _ in range(3):
                ask(gateway.server_port)
            counted = served(await_served(gateway.server_port, 3))
        self.assertEqual(sorted(status for _, _, status in counted), ["200", "429"])


class WorkersTest(unittest.TestCase):
    def test_each_of_several_gateways_answers_for_itself_and_says_which_it_is(self):
        with real_shop("--workers", "2") as shop:
            pids = {str(shop.pid(name)) for name in ("gateway", "gateway2")}
            found: set[str] = set()

            def see_more() -> bool:
                for metrics in together(*[lambda: metrics_of(shop.gateway)] * 8):
                    [(labels, _)] = metrics.find("microshop_process_info")
                    self.assertEqual(labels["service"], "gateway")
                    found.add(labels["pid"])
                return found >= pids

            wait_until(see_more, f"answers of the gateways {pids}")
            self.assertEqual(found, pids)


if __name__ == "__main__":
    unittest.main()
