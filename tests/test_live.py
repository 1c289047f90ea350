"""The live picture: what it shows of stubs and of a real shop, and who may see it."""
import contextlib
import os
import re
import signal
import threading
import time
import unittest
from unittest import mock

from microshop import SERVICES, live
from microshop import gateway as gateway_module
from microshop.gateway import Gateway
from microshop.live import Live, Observer, content_security_policy, draw_traces, summarize
from microshop.watching import watch
from microshop.watching.watch import Node
from tests.helpers import (
    NOBODY, PATIENCE, ask, exchange, process, read_request, running, together, upstream, wait_until)
from tests.test_run_all import Shop, port_of
from tests.watching.told import Stage, metrics, span

NUMBER = (int, float)
SUMMARY = {"id": str, "name": str, "path": str, "at": float, "duration": float, "whole": bool,
           "status": str, "error": str, "tries": int, "services": [str], "request": str,
           "orders": [str]}
PICTURE = {  # what live.html relies on; a list has one example
    "at": float,
    "nodes": [{"name": str, "url": str, "state": str, "processes": [
        {"pid": int, "uptime": float, "restarts": int, "memory": int, "cpu": NUMBER}]}],
    "edges": [{"from": str, "to": str, "asked": NUMBER, "tried": NUMBER, "errors": float,
               "p50": (float, type(None)), "p99": (float, type(None))}],
    "upstreams": [{"from": str, "to": str, "in_flight": int, "limit": int, "retries": int,
                   "retry_limit": int, "rejected": {"breaker": NUMBER, "bulkhead": NUMBER},
                   "instances": [{"server": str, "state": str, "seconds": NUMBER}]}],
    "saga": {"boxes": {"pending": int, "rejected": int, "cancelling": int},
             "arrows": [{"from": str, "to": str, "count": int}],
             "last": [{"at": float, "order": str, "from": str, "to": str, "trace": str}]},
    "events": [{"at": float, "node": str, "kind": str, "text": str}],
    "traces": {"last": [SUMMARY], "slowest": [SUMMARY], "failed": [SUMMARY]}}
FETCH = watch.fetch  # that the tests replace


def differences(value, shape, path="picture"):
    """Yield a sentence for each place where a JSON value has another shape."""
    if isinstance(shape, dict) and isinstance(value, dict):
        if set(value) - {"silent"} != set(shape):
            yield f"{path} has {sorted(value)} instead of {sorted(shape)}"
        for name in shape.keys() & value.keys():
            yield from differences(value[name], shape[name], f"{path}.{name}")
    elif isinstance(shape, list) and isinstance(value, list):
        for number, item in enumerate(value):
            yield from differences(item, shape[0], f"{path}[{number}]")
    elif isinstance(shape, (dict, list)) or not isinstance(value, shape):
        yield f"{path} is {value!r}"


class PolicyTest(unittest.TestCase):
    def test_the_scripts_and_styles_of_the_page_are_allowed_by_their_hashes_and_nothing_else(self):
        # The hash is that of the example in https://www.w3.org/TR/CSP2/#script-src-hash-usage.
        policy = content_security_policy(
            "<style>\np {\n}\n</style><p>"
            "<script>alert('Hello, world.');</script>")
        rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
        self.assertEqual(rules["default-src"], "'none'")
        self.assertEqual(rules["script-src"],
                         "'sha256-qznLcsROx4GACP2dm0UCKCzCG+HiZ1guq6ZZDob/Tng='")
        self.assertEqual(rules["style-src"],
                         "'sha256-CbhTQn8VNUZ6GiB/CuB3ysutfXqgIIY12ABgwdZIXCk='")
        self.assertEqual([rules[name] for name in ("connect-src", "base-uri", "form-action",
                                                   "frame-ancestors")],
                         ["'self'", "'none'", "'none'", "'none'"])
        self.assertEqual(rules["img-src"], "data:", "only images that the page itself contains")
        self.assertNotIn("unsafe", policy)

    def test_the_page_has_nothing_that_the_policy_forbids(self):
        page = live.PAGE.read_text("utf-8")
        elements = re.sub(r"(?s)<!--.*?-->|<(script|style)>.*?</\1>", "", page)
        for what, pattern in {
                "an event handler": r"(?i)<[a-z][^>]*\son[a-z]+\s*=",
                "a style attribute": r"(?i)<[a-z][^>]*\sstyle\s*=",
                "a script or style that is not allowed by its hash": "<(script|style)",
                "something from another host":
                    r"""(?i)\s(?:src|href)\s*=\s*["']?(?:https?:)?//"""}.items():
            self.assertIsNone(re.search(pattern, elements), f"live.html has {what}")


class SummaryTest(unittest.TestCase):
    def test_a_trace_is_summed_up_by_its_root_whatever_order_its_spans_came_in(self):
        tags = {"http.path": "/orders", "http.status_code": "201", "request.id": "abc", "pid": "1"}
        spans = [
            span(7, 1, parent=99, at=1000.0, duration=5000, name="post /orders/*", tags=tags),
            span(7, 2, parent=1, at=1000.001, kind="CLIENT", tags={"try": "1", "error": "refused"}),
            span(7, 3, parent=1, at=1000.002, kind="CLIENT", tags={"try": "2"}),
            span(7, 4, parent=3, at=1000.003, localEndpoint={"serviceName": "orders"},
                 tags={"order": "203"})]
        self.assertEqual(summarize(spans), {
            "id": f"{7:032x}", "name": "post /orders/*", "path": "/orders", "at": 1000.0,
            "duration": 0.005, "whole": True, "status": "201", "error": "", "tries": 1,
            "services": ["gateway", "orders"], "request": "abc", "orders": ["203"]})

    def test_the_root_is_a_span_without_a_known_parent_even_if_its_child_begins_earlier(self):
        summary = summarize([span(7, 2, parent=1, at=999.9), span(7, 1, parent=99, name="root")])
        self.assertEqual(summary["name"], "root")

    def test_a_trace_is_not_whole_while_the_span_that_is_taken_for_its_root_has_a_parent(self):
        users = {"localEndpoint": {"serviceName": "users"}}
        for what, spans, whole in [
                ("work that nothing called", [span(7, 1, kind="", **users)], True),
                ("an answer of the gateway to a client with a span", [span(7, 1, parent=99)], True),
                ("an answer of users alone", [span(7, 3, parent=2, **users)], False),
                ("a call of the gateway, and what it asked for",
                 [span(7, 2, parent=1, kind="CLIENT"), span(7, 3, parent=2, **users)], False)]:
            with self.subTest(what):
                self.assertIs(summarize(spans)["whole"], whole, f"{what}: is the trace whole?")

    def test_spans_that_are_each_others_parents_are_summed_up_all_the_same(self):
        self.assertEqual(summarize([span(7, 1, parent=2), span(7, 2, parent=1)])["id"], f"{7:032x}")

    def test_the_lists_have_the_last_the_slowest_and_the_failed_traces(self):
        summaries = []
        for number in range(1, 101):
            tags = {"error": "502"} if number % 2 else {}
            summaries.append(summarize([span(number, number, at=float(number), tags=tags,
                                             duration=number * 7 % 101)]))
        lists = draw_traces(summaries)
        self.assertEqual([trace["at"] for trace in lists["last"]], list(range(100, 70, -1)))
        self.assertEqual([trace["duration"] for trace in lists["slowest"]],
                         [duration / 1e6 for duration in range(100, 70, -1)])
        self.assertEqual([trace["at"] for trace in lists["failed"]], list(range(99, 39, -2)))

    def test_the_lists_leave_out_health_checks(self):
        summaries = [summarize([span(number, number, tags={"http.path": path})])
                     for number, path in enumerate(("/health", "/health/live", "/users"), start=1)]
        self.assertEqual([trace["path"] for trace in draw_traces(summaries)["last"]], ["/users"])


class ObserverTest(unittest.TestCase):
    """What is drawn of answers that were written by hand."""

    def setUp(self):
        self.stage = Stage()
        self.enterContext(self.stage.patch())
        self.enterContext(mock.patch.object(live, "PAUSE", 0.0))
        self.observer = self.observe()
        self.stage.answer("http://g:1", metrics(1))

    def observe(self):
        return Observer([Node("gateway", ["http://g:1"]), Node("orders", ["http://o:1"])])

    def hear(self, *lines, spans=()):
        self.stage.answer("http://o:1", metrics(2, *lines), spans=list(spans))
        self.observer.look()
        return self.observer.picture

    def moved(self, number, *moves, name="post /orders", order="203"):
        return span(number, number, at=999.5 + number, name=name, tags={"order": order},
                    localEndpoint={"serviceName": "orders"}, annotations=[
            {"timestamp": int((1000.0 + number + index / 10) * 1e6), "value": move}
            for index, move in enumerate(moves)])

    def test_unfinished_orders_and_the_moves_of_all_are_counted(self):
        saga = self.hear('microshop_unfinished_orders{status="pending"} 3',
                         'microshop_saga_moves_total{from="pending",to="confirmed"} 4',
                         'microshop_saga_moves_total{from="new",to="pending"} 7')["saga"]
        self.assertEqual(saga["boxes"], {"pending": 3, "rejected": 0, "cancelling": 0})
        self.assertCountEqual(saga["arrows"], [{"from": "new", "to": "pending", "count": 7},
                                          {"from": "pending", "to": "confirmed", "count": 4}])

    def test_the_last_moves_are_shown_newest_first_and_once_each(self):
        spans = [self.moved(1, "new -> pending", "pending -> confirmed")]
        for _ in range(2):
            saga = self.hear(spans=spans)["saga"]
        self.assertEqual(saga["last"], [
            {"at": 1001.1, "order": "203", "from": "pending", "to": "confirmed",
             "trace": f"{1:032x}"},
            {"at": 1001.0, "order": "203", "from": "new", "to": "pending", "trace": f"{1:032x}"}])

    def test_no_more_than_twenty_moves_are_remembered(self):
        saga = self.hear(spans=[self.moved(number, "a -> b") for number in range(1, 50)])["saga"]
        self.assertEqual([move["at"] for move in saga["last"]],
                         [1000.0 + number for number in range(49, 29, -1)])

    def test_an_order_that_was_taken_up_again_is_told_of_if_that_moved_it(self):
        spans = [self.moved(1, name="resume order"),
                 self.moved(2, "pending -> rejected", name="resume order"),
                 self.moved(3, "new -> pending")]
        self.assertEqual(self.hear(spans=spans)["events"], [
            {"at": 1002.0, "node": "orders", "kind": "resumed",
             "text": "order 203 was resumed: pending -> rejected"}])

    def test_notes_that_are_no_moves_are_not_shown_as_such(self):
        spans = [self.moved(1, "something happened"), span(2, 2, annotations=[
            {"timestamp": 1, "value": "a -> b"}])]
        self.assertEqual(self.hear(spans=spans)["saga"]["last"], [])

    def test_a_process_that_answers_something_else_is_shown_as_down(self):
        for answer in ({"metrics": ["<html>"]}, {"metrics": [metrics(2)], "traces": '[{"a":1}]'}):
            with self.subTest(str(answer)):
                self.stage.answer("http://o:1", *answer.pop("metrics"), **answer)
                observer = self.observe()
                observer.look()
                self.assertEqual([node.get("silent") for node in observer.picture["nodes"]],
                                 [None, "unintelligible"])


class LiveTest(unittest.TestCase):
    """The process, with stubs for the gateway and the services."""

    def setUp(self):
        self.stage = Stage()
        self.enterContext(self.stage.patch())
        for name in ("gateway", *SERVICES):
            self.stage.answer(f"http://{name}:1", metrics(1, service=name))
        self.live = self.enterContext(running(
            Live, **{f"{name}_url": [f"http://{name}:1"] for name in ("gateway", *SERVICES)}))
        self.port = self.live.server_port

    def get(self, target, **headers):
        return ask(self.port, "GET", target, headers)

    def rounds(self):
        """Return how often the gateway was asked for its metrics."""
        return self.stage.asked.count("http://gateway:1/metrics")

    def test_the_page_is_sent_with_its_policy(self):
        answer = self.get("/")
        self.assertEqual((answer.status, answer.body), (200, live.PAGE.read_bytes()))
        self.assertEqual(answer.headers["content-type"], "text/html; charset=utf-8")
        self.assertEqual(answer.headers["content-security-policy"],
                         content_security_policy(live.PAGE.read_text("utf-8")))

    def test_no_answer_is_stored_sniffed_or_shared_with_other_sites(self):
        self.stage.answer("http://gateway:1", metrics(1), spans=[span(7, 1)])
        expected = {"cache-control": "no-store", "x-content-type-options": "nosniff",
                    "referrer-policy": "no-referrer", "cross-origin-resource-policy": "same-origin"}
        for target in ("/", "/picture", f"/trace?id={7:032x}", "/search?q=r1"):
            with self.subTest(target):
                answer = self.get(target)
                self.assertEqual(answer.status, 200)
                self.assertEqual({name: answer.headers.get(name) for name in expected}, expected)

    def test_only_requests_to_a_name_of_this_machine_are_answered(self):
        for host, status in {
                "localhost": 200, "localhost:3004": 200, "LOCALHOST:1": 200, "127.0.0.1": 200,
                "127.0.0.1:3004": 200, "[::1]": 200, "[::1]:3004": 200,
                "evil.example": 403, "evil.example:3004": 403, "localhost.evil.example": 403,
                "127.0.0.1.evil.example": 403, "127.0.0.2": 403, "10.0.0.1": 403,
                "evil-localhost": 403, "[::2]": 403}.items():
            for target in ("/", "/picture"):
                with self.subTest(f"GET {target} of {host}"):
                    self.assertEqual(self.get(target, Host=host).status, status)
        [answer] = exchange(self.port, b"GET /picture HTTP/1.0\r\n\r\n")
        self.assertEqual(answer.status, 403, "without a Host header")

    def test_the_picture_has_the_shape_that_the_page_relies_on(self):
        picture = self.get("/picture").json
        self.assertEqual(list(differences(picture, PICTURE)), [])
        self.assertEqual([node["name"] for node in picture["nodes"]], ["gateway", *SERVICES])

    def test_nobody_is_asked_while_nobody_looks_and_all_are_when_somebody_does(self):
        self.get("/")
        self.get("/health")
        self.assertEqual(self.stage.asked, [])
        self.get("/picture")
        self.assertCountEqual(self.stage.asked, [
            f"http://{name}:1/{path}" for name in ("gateway", *SERVICES)
            for path in ("metrics", "traces")])

    def test_thirty_people_who_look_at_the_same_time_cause_one_round(self):
        is_open = threading.Event()
        fetch = self.stage.fetch

        def wait(*arguments):
            is_open.wait(PATIENCE)
            return fetch(*arguments)

        with mock.patch.object(watch, "fetch", wait), mock.patch.object(live, "PAUSE", PATIENCE):
            threading.Timer(0.2, is_open.set).start()
            answers = together(*[lambda: self.get("/picture").json] * 30)
        self.assertEqual(answers, [answers[0]] * 30)
        self.assertEqual(self.rounds(), 1)

    def test_one_who_looks_again_at_once_sees_the_same_picture_and_a_little_later_another_one(self):
        first = self.get("/picture").json
        self.assertEqual(self.get("/picture").json, first)
        self.assertEqual(self.rounds(), 1)
        self.live.observer._look_at = time.monotonic()
        self.assertGreater(self.get("/picture").json["at"], first["at"])
        self.assertEqual(self.rounds(), 2)
        self.assertLess(live.PAUSE, 1.0, "the page asks every second")

    def test_a_trace_is_found_by_its_id(self):
        spans = [span(7, 1), span(7, 2, parent=1, kind="CLIENT")]
        self.stage.answer("http://gateway:1", metrics(1), spans=spans)
        found = self.get(f"/trace?id={7:032x}").json
        self.assertEqual(found["id"], f"{7:032x}")
        self.assertEqual([one["id"] for one in found["spans"]], [one["id"] for one in spans])

    def test_a_trace_that_is_not_known_gets_404(self):
        for query in (f"?id={8:032x}", "?id=x", "?id=", "", "?other=1"):
            with self.subTest(query):
                answer = self.get(f"/trace{query}")
                self.assertEqual((answer.status, answer.json["status"]), (404, 404))

    def test_traces_are_searched_by_trace_id_request_id_and_order(self):
        self.stage.answer("http://gateway:1", metrics(1), spans=[
            span(7, 1, at=1.0, tags={"request.id": "abc", "order": "203"}),
            span(8, 2, at=2.0, tags={"request.id": "order-203", "order": "203"}),
            span(9, 3, at=3.0, tags={"request.id": "203x"})])
        for text, found in {f"{7:032x}": [7], "abc": [7], "203": [8, 7], "order-203": [8],
                            "%20abc%20": [7], "20": [], "": [], "nothing": []}.items():
            with self.subTest(text):
                traces = self.get(f"/search?q={text}").json["traces"]
                self.assertEqual([int(trace["id"], 16) for trace in traces], found)
                self.assertEqual(list(differences(traces, [SUMMARY])), [])

    def test_requests_with_the_same_trace_id_are_told_apart(self):
        self.stage.answer("http://gateway:1", metrics(1), spans=[
            span(7, 1, at=1.0, tags={"request.id": "first", "http.status_code": "200"}),
            span(7, 2, at=2.0, tags={"request.id": "second", "http.status_code": "504",
                                     "error": "504"})])
        traces = self.get("/picture").json["traces"]
        self.assertEqual([trace["status"] for trace in traces["last"]], ["504", "200"])
        self.assertEqual([trace["request"] for trace in traces["failed"]], ["second"])
        self.assertEqual(len(self.get("/search?q=second").json["traces"]), 1)

    def test_a_hostile_path_stays_text(self):
        path = '/<img src=x onerror="alert(1)">'
        self.stage.answer("http://gateway:1", metrics(1), spans=[span(7, 1, tags={
            "http.path": path})])
        answer = self.get("/picture")
        self.assertEqual(answer.json["traces"]["last"][0]["path"], path)
        self.assertEqual(answer.headers["content-type"], "application/json; charset=utf-8")

    def test_a_shop_that_is_not_there_is_shown_as_down(self):
        with (running(Live, gateway_url=[NOBODY]) as alone,
              mock.patch.object(watch, "fetch", FETCH)):
            picture = ask(alone.server_port, "GET", "/picture").json
        self.assertEqual([(node["state"], node["silent"]) for node in picture["nodes"]],
                         [("down", "refused")] * len(picture["nodes"]))


class TokenTest(unittest.TestCase):
    """A gateway on another machine shows its telemetry only to those that send its token."""

    def setUp(self):
        self.enterContext(mock.patch.object(watch, "ASK_TIME", PATIENCE))

    def picture(self, **settings):
        """Return what live draws of a gateway that takes it for a client on another machine."""
        with (mock.patch.object(gateway_module, "is_local", return_value=False),
              running(Gateway, token="s3cret") as gateway,
              running(Live, gateway_url=[gateway.url], **settings) as live):
            return ask(live.server_port, "GET", "/picture").json["nodes"][0]

    def test_with_the_token_live_shows_the_gateway(self):
        for name in ("token", "token_file"):
            with self.subTest(name):
                node = self.picture(**{name: "s3cret"})
                self.assertEqual((node["state"], node.get("silent")), ("up", None))

    def test_without_it_the_picture_says_what_to_set(self):
        for token in ("", "wrong"):
            with self.subTest(token=token):
                node = self.picture(token=token)
                self.assertEqual((node["state"], node["silent"]), (
                    "down", "answered 403 (set --token-file or MICROSHOP_TOKEN to the shop's "
                            "token)"))

    def test_no_other_process_gets_the_token(self):
        requests = {}

        def listen(connection):
            request = read_request(connection).decode().lower()
            requests[re.search("host: (.*)", request)[1].strip()] = request

        with contextlib.ExitStack() as stack:
            urls = {name: stack.enter_context(upstream(listen)) for name in live.NODES}
            settings = {f"{name}_url": [url] for name, url in urls.items()}
            observer = stack.enter_context(running(Live, token="s3cret", **settings))
            ask(observer.server_port, "GET", "/picture")
        got_it = {name: "authorization: bearer s3cret\r\n" in requests[url.partition("//")[2]]
                  for name, url in urls.items()}
        self.assertEqual(got_it, {name: name == "gateway" for name in urls})


class SettingsTest(unittest.TestCase):
    def test_it_listens_only_where_no_other_machine_can_reach_it(self):
        for host in ("0.0.0.0", "::", "192.0.2.2", "shop.example"):
            with self.subTest(host), process("microshop.live", "--host", host) as live:
                self.assertEqual(live.status(), 2)
                self.assertEqual(live.lines, [
                    f"python -m microshop.live: --host: {host!r} is not an address of this machine "
                    "alone, like 127.0.0.1 (see --help)"])


class RealShopTest(unittest.TestCase):
    """One real shop, and what live shows of it while processes are killed and stopped."""

    @classmethod
    def setUpClass(cls):
        cls.shop = Shop("--fresh", "--timeout", "1")
        cls.addClassCleanup(cls.shop.kill)
        cls.shop.wait_until_ready()
        cls.live = cls.shop.port(r"^live +\| Live picture")

    def picture(self):
        answer = ask(self.live, "GET", "/picture")
        self.assertEqual(answer.status, 200, answer.body)
        self.assertEqual(list(differences(answer.json, PICTURE)), [])
        return answer.json

    def wait_for(self, find, what):
        """Look until something is found in the picture; return that."""
        found = []

        def look():
            found[:] = [find(self.picture())]
            return found[0]

        wait_until(look, what)
        return found[0]

    def place_order(self):
        return ask(self.shop.first, "POST", "/orders", {"Content-Type": "application/json"},
                   b'{"userId":1,"productId":101}')

    def events(self, kind, node):
        return lambda picture: [event for event in picture["events"]
                                if (event["kind"], event["node"]) == (kind, node)]

    def test_an_order_is_followed_through_all_processes(self):
        self.picture()
        answer = self.place_order()
        self.assertEqual(answer.status, 201)
        order, request_id = str(answer.json["id"]), answer.headers["x-request-id"]

        def search(text):
            return ask(self.live, "GET", f"/search?q={text}").json["traces"]

        wait_until(lambda: len(search(request_id)) == 1 and
                   set(search(request_id)[0]["services"]) == {
                       "gateway", "users", "products", "orders"},
                   "the spans of all four processes")
        [summary] = search(request_id)
        self.assertEqual((summary["name"], summary["path"], summary["status"], summary["orders"]),
                         ("post /orders/*", "/orders", "201", [order]))
        self.assertEqual(search(order), [summary])
        self.assertEqual(search(summary["id"]), [summary])
        spans = ask(self.live, "GET", f"/trace?id={summary['id']}").json["spans"]
        self.assertEqual([one["kind"] for one in spans].count("SERVER"), 4)
        ids = {one["id"] for one in spans}
        self.assertEqual(sum(one.get("parentId") not in ids for one in spans), 1, "one root")
        saga = self.picture()["saga"]
        self.assertIn((order, "pending", "confirmed", summary["id"]),
                      [(move["order"], move["from"], move["to"], move["trace"])
                       for move in saga["last"]])
        self.assertIn(("new", "pending"),
                      [(arrow["from"], arrow["to"]) for arrow in saga["arrows"]])

    def test_every_call_direction_has_its_edge_with_traffic_on_it(self):
        seen = set()

        def busy(picture):
            if picture["at"] not in seen:
                seen.add(picture["at"])
                for name in SERVICES:
                    self.assertEqual(ask(self.shop.first, "GET", f"/{name}").status, 200)
                self.assertEqual(self.place_order().status, 201)
            is_busy = [edge["asked"] and edge["tried"] and edge["p50"] for edge in picture["edges"]]
            return picture if all(is_busy) else None

        picture = self.wait_for(busy, "traffic on all edges")
        self.assertEqual([(edge["from"], edge["to"]) for edge in picture["edges"]], [
            ("client", "gateway"), *(("gateway", name) for name in SERVICES),
            ("orders", "users"), ("orders", "products")])
        self.assertEqual([(one["from"], one["to"]) for one in picture["upstreams"]],
                         [(edge["from"], edge["to"]) for edge in picture["edges"][1:]])
        for guards in picture["upstreams"]:
            port = self.shop.port(f"{guards['to'].capitalize()} service")
            self.assertEqual(guards["instances"], [
                {"server": f"http://127.0.0.1:{port}", "state": "closed", "seconds": 0.0}])

    def test_looking_is_no_traffic(self):
        first = self.picture()["at"]
        self.wait_for(lambda picture: picture["at"] > first, "another picture")
        for name in ("gateway", *SERVICES):
            text = ask(port_of(name, self.shop.first), "GET", "/metrics").body.decode()
            self.assertNotRegex(text, 'http_route="/(metrics|traces)"', f"requests that {name} "
                                "counts: those of live must not be among them")

    def test_a_service_that_is_killed_is_shown_as_started_again(self):
        self.picture()
        killed = self.shop.child("users")
        os.kill(killed, signal.SIGKILL)

        def successor(picture):
            [process] = picture["nodes"][1]["processes"] or [{"pid": killed}]
            return picture["nodes"][1]["state"] == "up" and process["pid"] != killed and process

        process = self.wait_for(successor, "the next process of users")
        self.assertEqual((process["pid"], process["restarts"]), (self.shop.child("users"), 1))
        [event] = self.events("restarted", "users")(self.picture())
        self.assertRegex(event["text"], rf"users was started again \(pid {process['pid']}\)")
        self.assertLess(abs(time.time() - event["at"]), PATIENCE)

    def test_a_service_that_hangs_is_shown_as_down_and_its_breaker_as_open(self):
        self.picture()
        products = self.shop.child("products")
        os.kill(products, signal.SIGSTOP)
        try:
            node = self.wait_for(lambda picture: picture["nodes"][2]["state"] == "down"
                                 and picture["nodes"][2], "products to be down")
            self.assertEqual(node["silent"], "no answer in time")
            answers = together(*[lambda: ask(self.shop.first, "GET", "/products")] * 5)
            self.assertLessEqual({answer.status for answer in answers}, {503, 504})
            [instance] = self.wait_for(
                lambda picture: [one for upstream in picture["upstreams"]
                                 for one in upstream["instances"]
                                 if upstream["to"] == "products" and one["state"] != "closed"],
                "an open breaker")
            self.assertIn(instance["state"], ("open", "half-open"))
            failed = self.wait_for(lambda picture: picture["traces"]["failed"], "a failed trace")
            self.assertIn(failed[0]["error"], ("503", "504"))
            self.assertEqual(failed[0]["path"], "/products")
        finally:
            with contextlib.suppress(ProcessLookupError):  # it was replaced after 10 s without a
                os.kill(products, signal.SIGCONT)          # heartbeat, if this machine is slow
        self.wait_for(self.events("died", "products"), "the event that products fell silent")
        self.wait_for(self.events("up", "products"), "the event that products answers again")
        breaker = self.wait_for(self.events("breaker", "gateway"), "the events of the breaker")
        self.assertRegex(breaker[-1]["text"],
                         "the circuit breaker for products at http://127.0.0.1:[0-9]+ opened")
        wait_until(lambda: ask(self.shop.first, "GET", "/products").status == 200,
                   "the breaker to be closed again")


if __name__ == "__main__":
    unittest.main()
