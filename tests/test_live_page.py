"""The page of the live picture, in a real browser: what it shows, and what it never does.

StubLive serves the page with made-up answers, so a test can put the shop into any state.
"""
import contextlib
import json
import os
import re
import signal
import threading
import time
import unittest
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from microshop.live import PAGE, content_security_policy
from microshop.users import Users
from tests.browser import Page, find_browser, running_browser
from tests.helpers import (
    NOBODY, PATIENCE, ask, exchange, process, running, together, wait_until)

EVIL = "/<img src=x onerror=alert(1)><script>alert(2)</script>"
NODES = {"gateway": 3000, "users": 3001, "products": 3002, "orders": 3003}
CALLS = [("gateway", "users"), ("gateway", "products"), ("gateway", "orders"),
         ("orders", "users"), ("orders", "products")]
SCREENS = [(1280, 800), (1920, 1080)]
FAST = "pause = milliseconds => new Promise(done => setTimeout(done, milliseconds / 50))"
# A turn of the page's timers, which run only once a second while it is hidden; a page that does not
# stop asking has asked again after two of them.
TURN = "new Promise(done => setTimeout(done, 30))"
TURNS = f"{TURN}.then(() => {TURN})"
needs_browser = unittest.skipUnless(
    find_browser(), "no chromium, google-chrome or chrome is installed: the page is not tested")


# --- a made-up shop

def make_picture() -> dict[str, Any]:
    """Return what /picture says of a shop that is well, and has no requests."""
    process = {"uptime": 12.0, "restarts": 0, "memory": 31457280, "cpu": 0.02}
    return {
        "at": time.time(),
        "nodes": [{"name": name, "url": f"http://127.0.0.1:{port}", "state": "up",
                   "processes": [{"pid": 1000 + port, **process}]}
                  for name, port in NODES.items()],
        "edges": [{"from": caller, "to": called, "asked": 0.0, "tried": 0.0, "errors": 0.0,
                   "p50": None, "p99": None} for caller, called in [("client", "gateway"), *CALLS]],
        "upstreams": [{
            "from": caller, "to": called, "in_flight": 0, "limit": 64, "retries": 0,
            "retry_limit": 3, "rejected": {"breaker": 0, "bulkhead": 0},
            "instances": [{"server": f"http://127.0.0.1:{NODES[called]}", "state": "closed",
                           "seconds": 0.0}]} for caller, called in CALLS],
        "saga": {"boxes": {"pending": 0, "rejected": 0, "cancelling": 0}, "arrows": [], "last": []},
        "events": [], "traces": {"last": [], "slowest": [], "failed": []}}


def summary(number: int, path: str, **changes: Any) -> dict[str, Any]:
    return {"id": f"{number:032x}", "name": "get", "path": path, "at": time.time(),
            "duration": 0.0013, "whole": True, "status": "200", "error": "", "tries": 0,
            "services": ["gateway"], "request": f"request-{number}", "orders": [], **changes}


def span(number: int, parent: int, kind: str, service: str, begin: int, end: int,
         **tags: str) -> dict[str, Any]:
    """Return a span in Zipkin's format; `begin` and `end` are in microseconds."""
    shared = {"request.id": "request-7", "http.method": "GET", "http.path": "/orders/203",
              "http.status_code": "200"}
    tags = {**shared, **{name.replace("_", "."): value for name, value in tags.items()}}
    if tags.get("error"):
        del tags["http.status_code"]
    return {"traceId": f"{7:032x}", "id": f"{number:016x}", "kind": kind, "name": "get orders",
            **({"parentId": f"{parent:016x}"} if parent else {}),
            "timestamp": 1_700_000_000_000_000 + begin, "duration": end - begin,
            "localEndpoint": {"serviceName": service}, "tags": tags,
            **({"remoteEndpoint": {"serviceName": "orders"}} if kind == "CLIENT" else {})}


# A request whose first try was refused; the second one took most of the time.
RETRIED = [
    span(1, 0, "SERVER", "gateway", 0, 100_000),
    span(2, 1, "CLIENT", "gateway", 1_000, 2_000, **{"try": "1"}, server="http://127.0.0.1:3003",
         error="refused"),
    span(3, 1, "CLIENT", "gateway", 32_000, 99_000, **{"try": "2"}, server="http://127.0.0.1:3003"),
    {**span(4, 3, "SERVER", "orders", 33_000, 98_000, order="203"), "annotations": [
        {"timestamp": 1_700_000_000_040_000, "value": "new -> pending"},
        {"timestamp": 1_700_000_000_090_000, "value": "pending -> confirmed"}]}]


class StubLive(ThreadingHTTPServer):
    """Serves the page with the policy that live.py sends, and answers that a test has set."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.picture = make_picture()
        self.traces: dict[str, list[dict]] = {}  # spans by trace id
        self.found: dict[str, list[dict]] = {}   # summaries by what is searched for
        self.may_answer = threading.Event()      # until then, /picture waits
        self.may_answer.set()
        self.is_broken = False                   # if so, connections close without an answer
        self.asked = self.asking = self.most_at_once = 0  # requests for /picture
        self.lock = threading.Lock()

    def edge(self, caller: str, called: str, **changes: Any) -> None:
        for edge in self.picture["edges"]:
            if (edge["from"], edge["to"]) == (caller, called):
                edge.update(changes)

    def node(self, name: str, **changes: Any) -> None:
        for node in self.picture["nodes"]:
            if node["name"] == name:
                node.update(changes)

    def open_breaker(self, caller: str, called: str) -> None:
        for upstream in self.picture["upstreams"]:
            if (upstream["from"], upstream["to"]) == (caller, called):
                upstream["instances"][0].update(state="open", seconds=2.4)
                upstream["rejected"]["breaker"] = 3.2

    def handle_error(self, *_: object) -> None:
        """Say nothing: a page that is closed drops its connection."""


class StubHandler(BaseHTTPRequestHandler):
    server: StubLive

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if parts.path == "/":
            self.answer(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif parts.path == "/picture":
            self.show_picture()
        elif parts.path == "/trace" and query["id"] in self.server.traces:
            self.answer_json({"id": query["id"], "spans": self.server.traces[query["id"]]})
        elif parts.path == "/search":
            known = [summary(0, "", id=query["q"])] if query["q"] in self.server.traces else []
            self.answer_json({"traces": self.server.found.get(query["q"], known)})
        else:
            self.answer(404, b'{"status":404}', "application/problem+json")

    def show_picture(self) -> None:
        live = self.server
        with live.lock:
            live.asked, live.asking = live.asked + 1, live.asking + 1
            live.most_at_once = max(live.most_at_once, live.asking)
        live.may_answer.wait(PATIENCE)
        with live.lock:
            live.asking -= 1
        if not live.is_broken:
            self.answer_json({**live.picture, "at": time.time()})

    def answer_json(self, content: Any) -> None:
        self.answer(200, json.dumps(content).encode(), "application/json")

    def answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", content_security_policy(PAGE.read_text()))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


# --- the file

class SourceTest(unittest.TestCase):
    """What holds for live.html without a browser."""

    source = PAGE.read_text()

    def test_the_page_is_one_file_of_at_most_60_kb_that_loads_nothing(self):
        self.assertLessEqual(len(self.source.encode()), 60_000, "microshop/live.html in bytes")
        for tag in ("script", "style"):
            self.assertEqual(len(re.findall(rf"<{tag}\b", self.source)), 1,
                             f"live.py allows one <{tag}> by its hash")
        loads = re.findall(r"<link\b(?!.*\bhref=\"data:).*|\bsrc=\"?\w+:.*|@import.*|url\(.*",
                           self.source)
        self.assertEqual(loads, [], "the page must load nothing")

    def test_no_text_of_a_client_can_become_html(self):
        self.assertNotRegex(
            self.source, r"innerHTML|outerHTML|insertAdjacent|document\.write|srcdoc|DOMParser"
            r"|\beval\b|new Function|setHTML", "use textContent and createElement")

    def test_no_attribute_needs_unsafe_inline(self):
        markup = re.sub(r"(?s)<!--.*?-->|<(script|style)\b.*?</\1>", "", self.source)
        self.assertEqual(re.findall(r"\s(?:style|on\w+)=", markup), [],
                         "the Content-Security-Policy forbids style=\"\" and onclick=\"\"")

    def test_lines_are_not_wider_than_100_columns(self):
        wide = [number for number, line in enumerate(self.source.splitlines(), 1)
                if len(line) > 100]
        self.assertEqual(wide, [], "lines of microshop/live.html")

    def test_every_text_colour_can_be_read_on_its_background_in_both_schemes(self):
        light, dark = re.findall(r":root \{(.*?)\}", self.source, re.S)
        for scheme, text in {"light": light, "dark": dark}.items():
            colours = dict(re.findall(r"--([\w-]+): (#\w{6})", text))
            for name in ("ink", "soft", "good", "warn", "bad"):
                with self.subTest(scheme, colour=name):
                    ratio = contrast(colours[name], colours["panel"])
                    self.assertGreaterEqual(ratio, 5.5, "the contrast of text (WCAG: 4.5)")
            for name in NODES:
                with self.subTest(scheme, colour=name):
                    self.assertGreaterEqual(contrast(colours[name], colours["panel"]), 4.5)


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours like #00ff00 (WCAG 2.2, 1.4.3)."""
    def luminance(colour: str) -> float:
        parts = [int(colour[start:start + 2], 16) / 255 for start in (1, 3, 5)]
        red, green, blue = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
                            for part in parts]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    darker, lighter = sorted([luminance(one), luminance(other)])
    return (lighter + 0.05) / (darker + 0.05)


# --- the page in a browser

@needs_browser
class PageTestCase(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.browser = cls.enterClassContext(running_browser())

    def setUp(self):
        self.live = StubLive()
        thread = threading.Thread(target=self.live.serve_forever, args=(0.01,))
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(self.live.server_close)
        self.addCleanup(self.live.shutdown)
        self.addCleanup(self.live.may_answer.set)

    @contextlib.contextmanager
    def opened(self, address: str = "") -> Iterator[Page]:
        """Open the page; at the end it must have caused no error, dialog or violation."""
        page = self.browser.open(self.live.url + address)
        try:
            page.wait_until("document.querySelector('#clock')?.textContent > ''", "a first picture")
            yield page
            self.assertEqual(page.complaints(), [], "the browser complains about the page")
        finally:
            page.close()


class ShownTest(PageTestCase):
    """What a learner sees."""

    def test_an_empty_shop_says_what_to_do_first_with_the_gateways_own_address(self):
        self.live.node("gateway", url="http://127.0.0.1:8765")
        with self.opened() as page:
            page.shows("#no-trace", "curl http://127.0.0.1:8765/users")
            page.shows("#no-move", "http://127.0.0.1:8765/orders")
            page.shows("#no-event", "kill -9 4001")
            page.shows("#findings", "all processes are up; no requests now")
            labels = "[...document.querySelectorAll('.edge')].map(one => one.textContent).join('')"
            self.assertEqual(page.evaluate(labels), "", "arrows have no labels without calls")

    def test_a_request_appears_as_a_row_and_in_the_figures_of_the_edges(self):
        self.live.picture["traces"]["last"] = [summary(1, "/users/1")]
        self.live.edge("client", "gateway", asked=1204.4, tried=1204.4, p50=0.0042, p99=0.031)
        with self.opened() as page:
            page.shows("#trace-list", "GET /users/1")
            for text in ("asked 1,204/s", "p50 4.2 ms", "p99 31 ms", "no errors"):
                page.shows("[data-edge=client-gateway]", text)
            page.shows("#findings", "1,204 requests/s")

    def test_a_service_that_is_down_is_named_first_and_its_box_says_why(self):
        for silent, shown, in_box in (
                ("refused", "connection refused", "connection refused"),
                ("no answer in time", "no answer in time", "no answer in time"),
                ("answered 403 (set a token)", "answered 403 (set a token)", "answered 403")):
            self.live.node("users", state="down", processes=[], silent=silent)
            with self.subTest(silent), self.opened() as page:
                page.shows("#findings li:first-child", f"✕ users is down: {shown}")
                page.shows("[data-box=users].bad", in_box)
                line = "document.querySelector('[data-box=users] text:last-child').textContent"
                self.assertEqual(page.evaluate(line), in_box, "the last line in the box")
                self.assertIn("users is down", page.evaluate("document.title"))

    def test_restarts_and_draining_are_shown_at_the_box(self):
        process = {"pid": 1, "uptime": 130.0, "restarts": 2, "memory": 0, "cpu": 0.5}
        self.live.node("orders", state="draining", processes=[process])
        with self.opened() as page:
            page.shows("[data-box=orders].warn", "◐ draining 2 min")
            page.shows("[data-box=orders]", "2 restarts")

    def test_the_service_that_causes_slowness_is_named_not_the_one_that_waits_for_it(self):
        self.live.edge("gateway", "orders", asked=1.0, tried=1.0, p50=2.0, p99=2.5)
        self.live.edge("orders", "products", asked=1.0, tried=1.0, p50=2.0, p99=2.4)
        with self.opened() as page:
            page.shows("#findings", "▲ products slow in the last 10 s: p50 2.0 s")
            self.assertNotIn("orders slow", page.text("#findings"))
            page.shows("[data-edge=orders-products]", "▲ p99 2.4 s")

    def test_an_open_breaker_makes_its_edge_dashed_and_says_how_long(self):
        self.live.edge("gateway", "users", asked=4.0, tried=1.0, errors=1.0, p50=0.1, p99=0.1)
        self.live.open_breaker("gateway", "users")
        with self.opened() as page:
            page.shows("[data-edge=gateway-users].bad", "breaker open")
            page.shows("#limit-rows", "✕ open 3 s")
            page.shows("#limit-rows", "▲ 3.2/s")
            dashes = "getComputedStyle(document.querySelector('[data-edge={}] path'))"
            self.assertNotEqual(
                page.evaluate(f"{dashes.format('gateway-users')}.strokeDasharray"), "none",
                "the edge of an open breaker must be dashed")
            self.assertEqual(
                page.evaluate(f"{dashes.format('gateway-orders')}.strokeDasharray"), "none",
                "the edge of a closed breaker must not be dashed")

    def test_a_half_open_breaker_says_that_the_next_request_tests_the_service(self):
        self.live.open_breaker("gateway", "users")
        for upstream in self.live.picture["upstreams"]:
            if upstream["to"] == "products":
                upstream["instances"][0].update(state="half-open")
        with self.opened() as page:
            page.shows("#findings", "✕ breaker to users: open in gateway")
            page.shows("#findings", "◐ breaker half-open: next request tests products")

    def test_retries_show_as_more_requests_sent_than_calls_asked_for(self):
        self.live.edge("gateway", "products", asked=10.0, tried=12.5, errors=0.2, p50=0, p99=0)
        with self.opened() as page:
            page.shows("[data-edge=gateway-products] .warn", "↻ sent 13/s")
            page.shows("[data-edge=gateway-products]", "✕ 20% errors")

    def test_the_saga_has_counts_on_boxes_and_arrows_and_its_last_moves(self):
        self.live.picture["saga"] = {
            "boxes": {"pending": 3, "rejected": 0, "cancelling": 0},
            "arrows": [{"from": "new", "to": "pending", "count": 12},
                       {"from": "pending", "to": "confirmed", "count": 9}],
            "last": [{"at": time.time(), "order": "203", "from": "pending", "to": "confirmed",
                      "trace": f"{7:032x}"}]}
        with self.opened() as page:
            page.shows("[data-box=pending]", "3 now")
            page.shows("[data-box=confirmed]", "9 so far")
            page.shows("[data-move=new-pending]", "12")
            page.shows("#move-list", "order 203")
            page.shows("#move-list", "pending → confirmed")

    def test_an_order_that_moved_is_not_denied_while_no_trace_tells_of_its_move(self):
        for saga in ({"boxes": {"pending": 1, "rejected": 0, "cancelling": 0}, "arrows": []},
                     {"boxes": {"pending": 0, "rejected": 0, "cancelling": 0},
                      "arrows": [{"from": "new", "to": "pending", "count": 1}]}):
            self.live.picture["saga"] = {**saga, "last": []}
            with self.subTest(saga), self.opened() as page:
                page.shows("#no-move", "A move is listed here when its request has finished.")
                self.assertNotIn("No order has moved", page.text("#saga"))

    def test_a_part_of_a_request_is_marked_until_the_request_has_finished(self):
        part = summary(1, "/users/1", whole=False)
        self.live.picture["traces"]["last"] = [part]
        with self.opened() as page:
            page.evaluate(FAST)
            page.shows("#trace-list", "… not finished")
            self.live.picture["traces"]["last"] = [{**part, "whole": True}]
            page.wait_until("!document.querySelector('#trace-list').textContent"
                            ".includes('not finished')", "that the request has finished")

    def test_the_signs_of_events_do_not_look_like_slow_requests(self):
        now = time.time()
        self.live.picture["events"] = [
            {"at": now, "node": "users", "kind": "died", "text": "users died"}]
        self.live.picture["traces"]["last"] = [summary(1, "/users/1", at=now, duration=99.0)]
        with self.opened() as page:
            page.shows("#line .mark", "✕")
            bottom, top = page.evaluate(
                "[['.mark text', 'bottom'], ['.dots', 'top']].map(([what, edge]) =>"
                " document.querySelector('#line ' + what).getBoundingClientRect()[edge])")
            self.assertLess(bottom, top, "an event must be above a request of 10 s, not beside it")

    def test_events_and_traces_show_times_in_the_same_format(self):
        at = 1_700_000_000.0
        self.live.picture["traces"]["last"] = [summary(1, "/users/1", at=at)]
        self.live.picture["events"] = [
            {"at": at, "node": "users", "kind": "died", "text": "users died"}]
        with self.opened() as page:
            page.shows("#event-list", "users died")
            times = page.evaluate("[...document.querySelectorAll('ol time')]"
                                  ".map(one => one.textContent)")
            self.assertEqual(times[0], times[1], "the time of a trace, and of an event")
            self.assertRegex(times[0], r"^\d\d:\d\d:\d\d$")

    def test_everything_fits_on_one_screen_in_letters_of_16_pixels(self):
        self.live.picture["traces"]["last"] = [summary(n, "/users/1") for n in range(30)]
        self.live.picture["events"] = [
            {"at": n, "node": "users", "kind": "died", "text": f"event {n}"} for n in range(99)]
        for width, height in SCREENS:
            for scheme in ("light", "dark"):
                with self.subTest(f"{width} x {height}, {scheme}"), self.opened() as page:
                    page.look_like(width, height, scheme)
                    page.shows("#event-list", "event 98")
                    hidden = page.evaluate(OUTSIDE)
                    self.assertEqual(hidden, [], "panels that are not whole on the screen")
                    self.assertGreaterEqual(page.evaluate(
                        "parseFloat(getComputedStyle(document.body).fontSize)"), 16)
                    panel = page.evaluate(
                        "getComputedStyle(document.querySelector('section')).backgroundColor")
                    self.assertEqual(panel == "rgb(255, 255, 255)", scheme == "light", panel)


OUTSIDE = """[...document.querySelectorAll("section, svg")].filter(element => {
    const { left, top, right, bottom, height } = element.getBoundingClientRect();
    return left < 0 || top < 0 || right > innerWidth || bottom > innerHeight || height < 60;
}).map(element => element.id)"""


class DetailsTest(PageTestCase):
    """One trace, or the story of one order."""

    def setUp(self):
        super().setUp()
        self.trace = summary(7, "/orders/203", tries=1, orders=["203"], duration=0.1)
        self.live.picture["traces"]["last"] = [self.trace]
        self.live.traces = {self.trace["id"]: RETRIED}
        self.live.found = {"203": [self.trace], "request-7": [self.trace]}

    def assert_waterfall(self, page: Page) -> None:
        page.shows("dialog[open] h2", "GET /orders/203")
        bars = "[...document.querySelectorAll('.waterfall .track > :not(.dot):not(.wait)')]"
        page.wait_until(f"{bars}.length === 9", "five ticks, and a bar for each of four spans")

    def test_a_click_on_a_trace_shows_every_try_and_the_wait_between_them(self):
        with self.opened() as page:
            page.shows("#trace-list", "↻1")
            page.click("#trace-list a")
            self.assert_waterfall(page)
            page.shows(".waterfall", "→ orders, try 1")
            page.shows(".waterfall .bad", "✕ connection refused")
            page.shows(".waterfall", "200 67 ms, after 30 ms")
            self.assertEqual(page.evaluate("document.querySelectorAll('.wait').length"), 3,
                             "the wait: in the waterfall, in the sum, and in its legend")
            page.shows("dialog p", "↻ orders: 1 more try.")
            page.shows(".legend", "orders 65 ms (65%)")
            page.shows(".legend", "waits between tries 30 ms (30%)")

    def test_escape_closes_the_waterfall_and_the_focus_returns_to_its_row(self):
        with self.opened() as page:
            page.shows("#trace-list", "GET /orders/203")
            page.evaluate("document.querySelector('#trace-list a').focus()")
            page.press("Enter")
            self.assert_waterfall(page)
            self.assertEqual(page.evaluate("location.hash"), f"#trace={self.trace['id']}")
            page.press("Escape")
            page.wait_until("!document.querySelector('dialog').open", "no waterfall any more")
            page.wait_until("location.hash === ''", "an address without the trace")
            self.assertTrue(page.evaluate("document.activeElement.matches('#trace-list a')"),
                            "the row must have the focus again")

    def test_a_shared_link_opens_the_trace_or_the_order(self):
        with self.opened(f"#trace={self.trace['id']}") as page:
            self.assert_waterfall(page)
        with self.opened("#order=203") as page:
            page.shows("dialog[open] h2", "Order 203")

    def test_the_story_of_an_order_says_where_it_is_now_and_how_it_got_there(self):
        with self.opened() as page:
            page.evaluate("document.querySelector('#query').focus()")
            for digit in "203":
                page.press(digit)
            page.press("Enter")
            page.shows("dialog[open] p", "Now: confirmed")
            page.shows(".story", "new → pending")
            self.assertEqual(page.evaluate("location.hash"), "#order=203")

    def test_an_order_that_moves_on_is_seen_to_move_while_its_story_is_open(self):
        confirmed = RETRIED[3]["annotations"]
        pending = {**RETRIED[3], "annotations": confirmed[:1]}
        self.live.traces = {self.trace["id"]: [*RETRIED[:3], pending]}
        with self.opened("#order=203") as page:
            page.shows("dialog[open] p", "Now: pending")
            self.live.traces = {self.trace["id"]: RETRIED}
            page.shows("dialog[open] p", "Now: confirmed")

    def test_a_search_for_a_request_id_leads_to_its_trace(self):
        with self.opened("#request=request-7") as page:
            self.assert_waterfall(page)

    def test_what_is_not_known_is_said_so_and_asked_for_without_an_error_in_the_console(self):
        for address, what in {"#trace=00": "00", "#order=999": "of order 999",
                              "#request=%3Cb%3E": "of request <b>"}.items():
            with self.subTest(address), self.opened(address) as page:
                page.shows("dialog[open]", f"There is no trace {what}.")

    def test_a_trace_stays_on_the_screen_when_the_shop_has_forgotten_it(self):
        with self.opened(f"#trace={self.trace['id']}") as page:
            self.assert_waterfall(page)
            page.evaluate(FAST)
            self.live.found = {self.trace["id"]: []}
            before = self.live.asked
            wait_until(lambda: self.live.asked > before + 2, "the page to go on asking")
            self.assert_waterfall(page)

    def test_the_sum_says_where_the_time_went_between_services_and_that_parallel_calls_count(self):
        spans = [span(1, 0, "SERVER", "gateway", 0, 100_000)]
        for call in (2, 4):
            spans += [span(call, 1, "CLIENT", "gateway", 0, 100_000, http_path=f"/{call}",
                           server="http://127.0.0.1:3003", **{"try": "1"}),
                      span(call + 1, call, "SERVER", "orders", 60_000, 100_000)]
        rejected = span(9, 1, "CLIENT", "gateway", 0, 50_000, http_path="/c", error="bulkhead")
        self.live.traces = {self.trace["id"]: spans[:3]}
        with self.opened(f"#trace={self.trace['id']}") as page:
            page.evaluate(FAST)
            page.shows(".legend", "between gateway and orders (network or queue) 60 ms (60%)")
            self.assertNotIn("parallel", page.text("dialog"), "there is one call")
            self.live.traces = {self.trace["id"]: [*spans, rejected]}
            page.shows(".legend", "call to orders rejected 50 ms")
            page.shows("dialog h3", "Where the time was spent (calls in parallel count each)")
            page.shows("dialog p", "No call was retried.")

    def test_all_of_it_can_be_used_with_the_keyboard(self):
        with self.opened() as page:
            page.shows("#trace-list", "GET /orders/203")
            reached = []
            for _ in range(5):
                page.press("Tab")
                reached.append(page.evaluate("document.activeElement.textContent.slice(-6)"
                                             " || document.activeElement.id"))
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                self.assertEqual(outline, "solid", f"the focus on {reached[-1]} must be visible")
            self.assertEqual(reached[:4], ["last", "lowest", "failed", "query"])
            self.assertIn("100 ms", reached, "the row of the trace")


class HostileTest(PageTestCase):
    """Paths, and all else that clients send, are shown as text."""

    def assert_nothing_ran(self, page: Page) -> None:
        self.assertEqual(page.evaluate("document.querySelectorAll('img, script').length"), 1,
                         "the page's own script is the only one, and there is no image")

    def test_a_path_with_html_is_shown_and_does_nothing(self):
        trace = summary(7, EVIL, status="404", request=EVIL, orders=[EVIL], services=[EVIL])
        evil = {"http_path": EVIL, "http_method": EVIL, "error": EVIL, "order": EVIL,
                "server": EVIL, "try": "2"}
        self.live.picture["traces"] = {"last": [trace], "slowest": [trace], "failed": [trace]}
        self.live.picture["events"] = [{"at": 0, "node": EVIL, "kind": EVIL, "text": EVIL}]
        self.live.traces = {trace["id"]: [
            {**span(1, 0, "CLIENT", "gateway", 0, 9, **evil),
             "annotations": [{"timestamp": 1_700_000_000_000_000, "value": EVIL}]}]}
        self.live.node("users", state="down", processes=[], silent=EVIL)
        with self.opened() as page:
            page.shows("#trace-list", EVIL)
            page.shows("#event-list", EVIL)
            page.click("#trace-list a")
            page.shows(".waterfall", EVIL)
            self.assert_nothing_ran(page)

    def test_spans_that_are_each_others_parents_are_shown_all_the_same(self):
        trace = summary(7, "/circle")
        self.live.picture["traces"]["last"] = [trace]
        self.live.traces = {trace["id"]: [span(1, 2, "SERVER", "gateway", 0, 9),
                                          span(2, 1, "SERVER", "users", 1, 8)]}
        with self.opened(f"#trace={trace['id']}") as page:
            page.shows(".waterfall", "gateway")
            page.shows(".waterfall", "users")

    def test_a_very_long_path_does_not_push_anything_off_the_screen(self):
        self.live.picture["traces"]["last"] = [summary(1, "/" + "long" * 5000)]
        with self.opened() as page:
            page.look_like(*SCREENS[0], "light")
            page.shows("#trace-list", "longlong")
            self.assertEqual(page.evaluate(OUTSIDE), [])
            self.assertEqual(page.evaluate(
                "getComputedStyle(document.querySelector('#trace-list span')).overflowX"), "hidden",
                "what is too long for its column must be cut, not written over the next one")

    def test_a_character_that_turns_text_around_is_shown_by_its_number(self):
        self.live.picture["traces"]["last"] = [summary(1, "/\u202egnp.exe")]
        with self.opened() as page:
            page.shows("#trace-list", "GET /\\u{202e}gnp.exe")

    def test_an_address_with_html_or_half_an_escape_does_nothing(self):
        for address in ("#order=<img src=x onerror=alert(1)>", "#trace=%", "#__proto__=1"):
            with self.subTest(address), self.opened(address) as page:
                self.assert_nothing_ran(page)

    def test_the_policy_stops_a_script_that_got_into_the_page_all_the_same(self):
        page = self.browser.open(self.live.url)
        self.addCleanup(page.close)
        page.shows("#findings", "all processes are up")
        page.evaluate("document.body.append(Object.assign(document.createElement('script'),"
                      " {textContent: 'ran = true'}))")
        self.assertEqual(page.evaluate("typeof ran"), "undefined")
        self.assertIn("Content Security Policy", str(page.complaints()),
                      "complaints() must see a violation, or the other tests prove nothing")


class AskingTest(PageTestCase):
    """When the page asks, and when it does not."""

    def test_it_asks_again_and_again_but_never_for_two_pictures_at_once(self):
        with self.opened() as page:
            page.evaluate(FAST)
            self.live.may_answer.clear()
            before = self.live.asked
            wait_until(lambda: self.live.asked > before, "the page to ask again")
            page.evaluate("new Promise(done => setTimeout(done, 300))")  # 15 times its pause
            self.assertEqual(self.live.asked, before + 1, "it must wait for the answer")
            self.live.may_answer.set()
            wait_until(lambda: self.live.asked > before + 5, "the page to go on asking")
            self.assertEqual(self.live.most_at_once, 1)

    def test_it_asks_about_once_a_second(self):
        with self.opened() as page:
            pauses = page.evaluate(
                "new Promise(done => { const own = pause;"
                " pause = time => { done(time); return own(time); } })")
            self.assertTrue(200 <= pauses <= 1000, f"a pause of {pauses} ms")

    def test_a_hidden_tab_stops_asking_and_goes_on_when_it_is_seen_again(self):
        with self.opened() as page:
            page.evaluate(FAST)
            other = self.browser.open("about:blank")  # in front of the page
            self.addCleanup(other.close)
            page.wait_until("document.hidden", "that it is hidden")
            page.evaluate(TURN)
            wait_until(lambda: not self.live.asking, "the last answer")
            before = self.live.asked
            page.evaluate(TURNS)
            self.assertEqual(self.live.asked, before, "requests of a hidden tab")
            page.send("Page.bringToFront")
            wait_until(lambda: self.live.asked > before, "the page to ask again")

    def test_a_lost_connection_is_announced_and_found_again(self):
        page = self.browser.open(self.live.url)  # the browser complains of the lost connection
        self.addCleanup(page.close)
        page.shows("#findings", "all processes are up")
        page.evaluate(FAST)
        self.live.is_broken = True
        page.shows("#lost", "the live picture is not answering; trying again")
        self.assertEqual(page.evaluate("document.querySelector('#lost').ariaLive"), "polite")
        self.assertIn("not answering", page.evaluate("document.title"))
        page.shows("#clock", "as of")
        self.live.is_broken = False
        page.wait_until("!document.querySelector('#lost').textContent", "no such line any more")
        page.shows("#findings", "all processes are up")

    def test_a_picture_that_the_page_cannot_draw_does_not_stop_it(self):
        page = self.browser.open(self.live.url)  # the browser complains of the mistake
        self.addCleanup(page.close)
        page.shows("#findings", "all processes are up")
        page.evaluate(FAST)
        whole, self.live.picture = self.live.picture, {}
        before = self.live.asked
        wait_until(lambda: self.live.asked > before + 2, "the page to go on asking")
        self.assertIn("TypeError", str(page.complaints()), "the mistake must not be hidden")
        self.live.picture = whole
        self.live.node("users", state="down", processes=[], silent="refused")
        page.shows("#findings", "users is down")

    def test_a_row_keeps_the_focus_while_others_come(self):
        with self.opened() as page:
            page.evaluate(FAST)
            self.live.picture["traces"]["last"] = [summary(1, "/users/1")]
            page.shows("#trace-list", "/users/1")
            page.evaluate("document.querySelector('#trace-list a').focus()")
            rows = [summary(2, "/users/2"), *self.live.picture["traces"]["last"]]
            self.live.picture["traces"]["last"] = rows
            page.shows("#trace-list", "/users/2")
            focused = page.evaluate("document.activeElement.matches('a')"
                                    " && document.activeElement.textContent")
            self.assertIn("/users/1", focused or "nothing has the focus")


@needs_browser
class BrowserTest(unittest.TestCase):
    def test_the_browser_and_its_profile_are_gone_afterwards(self):
        with running_browser() as browser:
            browser.open("about:blank")
            self.assertGreater(len(browser.processes()), 1, "a browser has several processes")
            self.assertTrue(Path(browser.profile).exists())
        self.assertEqual(browser.processes(), [], "processes of the browser that are left")
        self.assertFalse(Path(browser.profile).exists(), f"the profile {browser.profile} is left")


@needs_browser
class RealShopTest(unittest.TestCase):
    """The page over a whole shop, in which processes are killed and stopped."""

    def setUp(self):
        self.browser = self.enterContext(running_browser())

    def start_shop(self, **environment: str) -> Page:
        """Start a shop and return the page of its live picture."""
        self.shop = self.enterContext(
            process("microshop.run_all", "--fresh", "--port=0", "--timeout=1", **environment))
        self.shop.wait_for(r"^run_all +\| ready in ")
        self.gateway = self.shop.port("API Gateway")
        page = self.browser.open(self.shop.wait_for(r"Live picture at (http://\S+)$")[1])
        page.shows("#findings", "all processes are up")
        self.addCleanup(self.check, page)
        return page

    def check(self, page: Page) -> None:
        self.assertEqual(page.complaints(), [], "the browser complains about the page")

    def pid(self, name: str) -> int:
        return int(self.shop.wait_for(rf"^run_all .* started {name} \(pid (\d+)\)")[1])

    def ask(self, target: str) -> int:
        return ask(self.gateway, "GET", target).status

    def order(self) -> int:
        content = json.dumps({"userId": 1, "productId": 101}).encode()
        return ask(self.gateway, "POST", "/orders", {"Content-Type": "application/json"},
                   content).status

    def test_a_killed_service_is_seen_to_be_started_again(self):
        page = self.start_shop()
        os.kill(self.pid("users"), signal.SIGKILL)
        page.shows("[data-box=users] .warn", "1 restart")
        page.shows("#event-list", "users")

    def test_a_stopped_service_is_down_its_breaker_opens_and_an_order_waits_for_it(self):
        page = self.start_shop()
        products = self.pid("products")
        os.kill(products, signal.SIGSTOP)
        try:
            # On a slow machine, the answer misses --timeout; the order waits all the same.
            self.assertIn(self.order(), (202, 504))
            together(*[lambda: self.ask("/products/101")] * 6)
            page.shows("#findings li:first-child", "products is down: no answer in time")
            page.shows("[data-box=products].bad", "no answer in time")
            page.shows("[data-edge=gateway-products].open", "breaker")
            page.shows("[data-box=pending]", "1 now")
            page.click("[data-tab=failed]")
            page.shows("#trace-list", "GET /products/101")
            page.click("#trace-list a")
            page.shows(".waterfall .bad", "no answer in time")
            page.press("Escape")
        finally:
            with contextlib.suppress(ProcessLookupError):  # its heartbeat was missed for too long
                os.kill(products, signal.SIGCONT)
        page.shows("[data-box=products].good", "up")
        page.evaluate("location.hash = '#order=203'")
        page.shows("dialog[open] p", "Now: confirmed")
        page.shows(".story", "resume order")

    def test_a_call_that_was_retried_shows_both_tries(self):
        with running(Users) as users:
            page = self.start_shop(MICROSHOP_USERS_URL=f"{NOBODY},{users.url}")
            self.assertEqual([self.ask("/users/1"), self.ask("/users/1")], [200, 200])
            page.shows("#trace-list", "↻1")  # the instances take turns
            page.evaluate("[...document.querySelectorAll('#trace-list a')]"
                          ".find(row => row.textContent.includes('↻1')).click()")
            page.shows(".waterfall", f"→ users, try 1 ({NOBODY.removeprefix('http://')})")
            page.shows(".waterfall .bad", "connection refused")
            page.shows(".waterfall", f"→ users, try 2 ({users.url.removeprefix('http://')})")

    def test_a_hostile_path_is_text_from_end_to_end(self):
        page = self.start_shop()
        path = "/<img/src=x/onerror=alert(1)>"
        exchange(self.gateway, f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        page.shows("#trace-list", path)
        page.click("#trace-list a")
        page.shows("dialog[open] h2", path)
        self.assertEqual(page.evaluate("document.querySelectorAll('img').length"), 0)


if __name__ == "__main__":
    unittest.main()
