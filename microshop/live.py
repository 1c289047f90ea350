"""The live picture: a page that shows the running shop (live.html). The shop works without it.

The page asks for /picture once a second. Then this process asks the gateway and the services for
their /metrics and /traces (watching.watch), and puts what they answer together; as long as nobody
looks, it asks nothing. What it shows is meant for the person at this machine: so it listens on
127.0.0.1, and answers only requests that were sent to a name of this machine.

Read from top to bottom: the picture, the page, the routes, the process.

Law: the services are known here by name only; all else is what they answer.
"""
import base64
import contextlib
import hashlib
import ipaddress
import re
import threading
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from microshop import GATEWAY_PORT, LIVE_PORT, SERVICES
from microshop.chassis import config
from microshop.chassis.admission import OWN_NAMES, host_name
from microshop.chassis.answer import NO_STORE, Answer
from microshop.chassis.content import parse_query
from microshop.chassis.errors import Forbidden, NotFound, excerpt
from microshop.chassis.handler import HEALTH_PATHS, Handler
from microshop.chassis.server import Service
from microshop.watching.exposition import add_up
from microshop.watching.topology import draw_topology
from microshop.watching.trace_memory import Span
from microshop.watching.watch import Node, Watch

NODES = {"gateway": GATEWAY_PORT, **SERVICES}  # the names and the ports of what is watched
PAUSE = 0.9           # seconds between two rounds: the page asks every second, give or take some
MAX_LISTED = 30       # traces in a list
MAX_MOVES = 20        # changes of an order's status

PAGE = Path(__file__).with_name("live.html")
INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.S)  # the page has one of each
SAFE = [NO_STORE, ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"),
        ("Cross-Origin-Resource-Policy", "same-origin")]


# --- the picture; live.html reads it

def draw_saga(nodes: list[Node], moves: list[dict]) -> dict:
    metrics = add_up(node.metrics for node in nodes)
    return {"boxes": {status: int(metrics.total("microshop_unfinished_orders", status=status))
                      for status in ("pending", "rejected", "cancelling")},
            "arrows": [{**labels, "count": int(count)}
                       for labels, count in metrics.select("microshop_saga_moves_total")],
            "last": newest(moves, MAX_MOVES)}


def moves_in(span: Span) -> Iterator[dict]:
    """Yield each change of an order's status that a span tells of."""
    for note in span.get("annotations", []):
        before, arrow, after = note["value"].partition(" -> ")
        if arrow and "order" in span["tags"]:
            yield {"at": note["timestamp"] / 1e6, "order": span["tags"]["order"],
                   "from": before, "to": after, "trace": span["traceId"]}


def requests_in(trace: list[Span]) -> Iterable[list[Span]]:
    """Return the spans of each request in a trace: a client may send several with one trace id."""
    requests: dict[str, list[Span]] = {}
    for span in trace:
        requests.setdefault(span["tags"].get("request.id", ""), []).append(span)
    return requests.values()


def summarize(spans: list[Span]) -> dict:
    """Return what the lists show of a request. Its root is the first span without a known parent.

    A root ends last; until then another span is taken for it, and the request is not whole. The
    gateway's answer is a root even if it has a parent: that is a span of the client's.
    """
    known = {span["id"] for span in spans}
    root = next((span for span in spans if span.get("parentId") not in known), spans[0])
    tags = root["tags"]
    is_entry = root.get("kind") == "SERVER" and root["localEndpoint"]["serviceName"] == "gateway"
    services = dict.fromkeys(span["localEndpoint"]["serviceName"] for span in spans)
    return {"id": root["traceId"], "name": root["name"], "path": tags.get("http.path", ""),
            "at": root["timestamp"] / 1e6, "duration": root["duration"] / 1e6,
            "whole": is_entry or "parentId" not in root,
            "status": tags.get("http.status_code", ""), "error": tags.get("error", ""),
            "tries": sum(span["tags"].get("try", "1") != "1" for span in spans),
            "services": list(services), "request": tags.get("request.id", ""),
            "orders": sorted({span["tags"]["order"] for span in spans if "order" in span["tags"]})}


def newest(items: list[dict], limit: int = MAX_LISTED) -> list[dict]:
    return sorted(items, key=lambda item: item["at"], reverse=True)[:limit]


def draw_traces(summaries: list[dict]) -> dict:
    """Return what the lists show: no health checks, which would soon fill them in a cluster."""
    summaries = [one for one in summaries if one["path"].partition("?")[0] not in HEALTH_PATHS]
    slowest = sorted(summaries, key=lambda summary: summary["duration"], reverse=True)
    failed = [summary for summary in summaries if summary["error"]]
    return {"last": newest(summaries), "slowest": slowest[:MAX_LISTED], "failed": newest(failed)}


class Observer:
    """Looks at the shop, and draws the picture of it.

    It looks at most once in PAUSE seconds, however many people do: they share what it saw.
    """

    def __init__(self, nodes: list[Node]):
        self.watch = Watch(nodes)
        self.picture: dict = {}
        self.traces: dict[str, list[Span]] = {}  # by their ids
        self.summaries: list[dict] = []          # of all requests in them
        self._look_at = 0.0                      # of time.monotonic
        self._lock = threading.Lock()            # held by the one who looks

    def look(self) -> None:
        """Look, unless that was done a moment ago; what was drawn before is never changed."""
        with self._lock:
            if time.monotonic() >= self._look_at:
                self._look_at = time.monotonic() + PAUSE
                now = time.time()
                self.watch.ask_all(now)
                self._draw(now)

    def _draw(self, now: float) -> None:
        self.traces = self.watch.memory.traces()
        self.summaries = [summarize(spans) for trace in self.traces.values()
                          for spans in requests_in(trace)]
        moves = []
        for span in chain.from_iterable(self.traces.values()):
            for move in moves_in(span):
                moves.append(move)
                if span["name"] == "resume order":
                    text = "order {order} was resumed: {from} -> {to}".format(**move)
                    self.watch.tell(move["at"], span["localEndpoint"]["serviceName"], "resumed",
                                    text)
        self.picture = {"at": now, **draw_topology(self.watch.nodes, now),
                        "saga": draw_saga(self.watch.nodes, moves), "events": self.watch.events,
                        "traces": draw_traces(self.summaries)}


# --- the page

def content_security_policy(page: str) -> str:
    """Return the policy under which nothing but the page's own script and style is applied.

    They are named by their hashes. So if a client's text became part of the page as HTML by
    mistake, a script in it would not run, and nothing could be sent to another host.
    """
    rules = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'",
             "form-action 'none'", "frame-ancestors 'none'"]
    for kind, text in INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        rules.append(f"{kind}-src 'sha256-{digest}'")
    return "; ".join(rules)


# --- the routes

class LiveHandler(Handler):
    server: "Live"

    def check_client(self) -> None:
        """Raise Forbidden if the request was sent to another name than this machine's own.

        A web page of another site may let its own name lead to 127.0.0.1 (DNS rebinding). To the
        browser, what is here would be part of that site, and its scripts could read it.
        """
        if host_name(self.headers.get("host", "")) not in OWN_NAMES:
            raise Forbidden("the live picture is shown only at localhost, 127.0.0.1 or [::1]")
        super().check_client()

    def show_page(self) -> Answer:
        return Answer(self.server.page, headers=[
            *SAFE, ("Content-Type", "text/html; charset=utf-8"),
            ("Content-Security-Policy", self.server.policy)])

    def show_picture(self) -> Answer:
        return Answer(self.look().picture, headers=SAFE)

    def show_trace(self) -> Answer:
        trace_id = parse_query(self.query_string, ["id"]).get("id", "")
        spans = self.look().traces.get(trace_id)
        if not spans:
            raise NotFound(f"no trace {excerpt(trace_id)!r} is known here, or not any more")
        return Answer({"id": trace_id, "spans": spans}, headers=SAFE)

    def search(self) -> Answer:
        """Answer the traces with this trace id or request id, or those of an order."""
        wanted = parse_query(self.query_string, ["q"]).get("q", "").strip()
        found = [summary for summary in self.look().summaries
                 if wanted in (summary["id"], summary["request"], *summary["orders"])]
        return Answer({"traces": newest(found)}, headers=SAFE)

    def look(self) -> Observer:
        self.server.turns.give_up()  # it waits for the answers of others
        self.server.observer.look()
        return self.server.observer

    routes = {"/": {"GET": show_page}, "/picture": {"GET": show_picture},
              "/trace": {"GET": show_trace}, "/search": {"GET": search}}


# --- the process

def loopback(text: str) -> str:
    """Return an address that other machines cannot reach. Raises ValueError."""
    with contextlib.suppress(ValueError):
        if text == "localhost" or ipaddress.ip_address(text).is_loopback:
            return text
    raise ValueError(f"{text!r} is not an address of this machine alone, like 127.0.0.1")


class Live(Service):
    name, title, port = "live", "Live picture", LIVE_PORT
    announcement = "{title} at"
    handler = LiveHandler
    options = [config.HOST._replace(parse=loopback), config.TIMEOUT, config.QUIET,
               config.TOKEN_FILE, config.TOKEN,
               *[config.service_url(name, port) for name, port in NODES.items()]]

    def __init__(self, settings: Namespace):
        super().__init__(settings)
        page = PAGE.read_text("utf-8")
        self.page, self.policy = page.encode(), content_security_policy(page)
        # The gateway shows its telemetry to other machines only if they send its token; the others
        # have no use for it.
        tokens = {"gateway": config.find_token(settings)}
        self.observer = Observer([
            Node(name, getattr(settings, f"{name}_url"), tokens.get(name, "")) for name in NODES])


if __name__ == "__main__":
    Live.main()
