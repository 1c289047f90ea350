"""The live picture: a page that shows the running shop (live.html). The shop works without it.

The page asks for /picture once a second. Then this process asks the gateway and the services for
their /metrics and /traces (chassis.watch), and puts what they answer together; as long as nobody
looks, it asks nothing. What it shows is meant for the person at this machine: so it listens on
127.0.0.1, and answers only requests that were sent to a name of this machine.

Read from top to bottom: the picture, the page, the routes, the process.

Law: the services are known here by name only; all else is what they answer, and none is trusted.
"""
import base64
import contextlib
import hashlib
import re
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from microshop import GATEWAY_PORT, LIVE_PORT, SERVICES
from microshop.chassis import config
from microshop.chassis.answer import NO_STORE, Answer
from microshop.chassis.content import parse_query
from microshop.chassis.errors import Forbidden, NotFound, excerpt
from microshop.chassis.exposition import Metrics
from microshop.chassis.handler import Handler
from microshop.chassis.server import Service
from microshop.chassis.topology import draw_topology
from microshop.chassis.trace_memory import Span, TraceMemory
from microshop.chassis.watch import Node, Watch

NODES = {"gateway": GATEWAY_PORT, **SERVICES}  # the names and the ports of what is watched
PAUSE = 0.9           # seconds between two rounds: the page asks every second, give or take some
MAX_LISTED = 30       # traces in a list
MAX_MOVES = 20        # changes of an order's status

PAGE = Path(__file__).with_name("live.html")
OWN_HOST = re.compile(r"(?:localhost|127\.0\.0\.1|\[::1\])(?::[0-9]{0,5})?", re.I)
INLINE = re.compile(r"<(script|style)\b[^>]*>(.*?)</\1>", re.S)
SAFE = [NO_STORE, ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"),
        ("Cross-Origin-Resource-Policy", "same-origin")]

UNFINISHED = ("pending", "rejected", "cancelling")


# --- the picture; live.html reads it

def draw_saga(nodes: list[Node], moves: list[dict]) -> dict:
    metrics = Metrics()
    for node in nodes:
        metrics.add(node.metrics)
    boxes = {status: int(metrics.total("microshop_unfinished_orders", status=status))
             for status in UNFINISHED}
    arrows = [{"from": labels.get("from", ""), "to": labels.get("to", ""), "count": int(count)}
              for labels, count in metrics.select("microshop_saga_moves_total")]
    return {"boxes": boxes, "last": moves,
            "arrows": sorted(arrows, key=lambda arrow: (arrow["from"], arrow["to"]))[:MAX_LISTED]}


def moves_in(span: Span) -> Iterator[dict]:
    """Yield each change of an order's status that a span tells of."""
    for annotation in span["annotations"]:
        before, arrow, after = annotation["value"].partition(" -> ")
        if arrow and "order" in span["tags"]:
            yield {"at": annotation["timestamp"] / 1e6, "order": span["tags"]["order"],
                   "from": before, "to": after, "trace": span["traceId"]}


def summarize(spans: list[Span]) -> dict:
    """Return what the lists show of a trace. Its root is the first span without a known parent."""
    known = {span["id"] for span in spans}
    root = next((span for span in spans if span.get("parentId") not in known), spans[0])
    tags = root["tags"]
    services = dict.fromkeys(span["localEndpoint"]["serviceName"] for span in spans)
    return {"id": root["traceId"], "name": root["name"], "path": tags.get("http.path", ""),
            "at": root["timestamp"] / 1e6, "duration": root["duration"] / 1e6,
            "status": tags.get("http.status_code", ""), "error": tags.get("error", ""),
            "tries": sum(span["tags"].get("try", "1") != "1" for span in spans),
            "services": list(services), "request": tags.get("request.id", ""),
            "orders": sorted({span["tags"]["order"] for span in spans if "order" in span["tags"]})}


def newest(items: list[dict], limit: int = MAX_LISTED) -> list[dict]:
    return sorted(items, key=lambda item: item["at"], reverse=True)[:limit]


def draw_traces(summaries: list[dict]) -> dict:
    slowest = sorted(summaries, key=lambda summary: summary["duration"], reverse=True)
    failed = [summary for summary in summaries if summary["error"]]
    return {"last": newest(summaries), "slowest": slowest[:MAX_LISTED], "failed": newest(failed)}


class Observer:
    """Looks at the shop, and draws the picture of it.

    It looks at most once in PAUSE seconds, however many people do: they share what it saw.
    """

    def __init__(self, urls: dict[str, list[str]]):
        nodes = [Node(name, addresses) for name, addresses in urls.items()]
        self.watch = Watch(nodes, TraceMemory(summarize))
        self.picture: dict[str, Any] = {}
        self._moves: list[dict] = []
        self._look_at = 0.0  # of time.monotonic
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def looking(self) -> Iterator[TraceMemory]:
        """Look, unless that was done a moment ago, and let nobody else look meanwhile."""
        with self._lock:
            now = time.monotonic()
            if now >= self._look_at:
                self._look_at = now + PAUSE
                self._note(self.watch.ask_all(now))
                self.picture = self._draw(time.time())
            yield self.watch.traces

    def _note(self, spans: list[Span]) -> None:
        for span in spans:
            moves = list(moves_in(span))
            self._moves = newest([*self._moves, *(m for m in moves if m not in self._moves)],
                                 MAX_MOVES)
            if moves and span["name"] == "resume order":
                told = ", ".join(f"{move['from']} -> {move['to']}" for move in moves)
                self.watch.tell(
                    moves[0]["at"], span["localEndpoint"]["serviceName"], "resumed",
                    f"order {moves[0]['order']} was taken up again: {told}")

    def _draw(self, at: float) -> dict:
        return {"at": at, **draw_topology(self.watch.nodes, at),
                "saga": draw_saga(self.watch.nodes, self._moves), "events": self.watch.events,
                "traces": draw_traces(self.watch.traces.summaries())}


# --- the page

def content_security_policy(page: str) -> str:
    """Return the policy under which nothing but the page's own script and style is applied.

    They are named by their hashes. So if a client's text became part of the page as HTML by
    mistake, a script in it would not run, and nothing could be sent to another host.
    """
    rules = ["default-src 'none'", "connect-src 'self'", "base-uri 'none'", "form-action 'none'",
             "frame-ancestors 'none'"]
    if "data:" in page:
        rules.append("img-src data:")
    inline: dict[str, list[str]] = {}
    for kind, text in INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        inline.setdefault(kind, []).append(f"'sha256-{digest}'")
    return "; ".join(rules + [f"{kind}-src {' '.join(found)}" for kind, found in inline.items()])


# --- the routes

class LiveHandler(Handler):
    server: "Live"

    def check_client(self) -> None:
        """Raise Forbidden if the request was sent to another name than this machine's own.

        A web page of another site may let its own name lead to 127.0.0.1 (DNS rebinding). To the
        browser, what is here would be part of that site, and its scripts could read it.
        """
        if not OWN_HOST.fullmatch(self.headers.get("host", "")):
            raise Forbidden("the live picture is shown only at localhost, 127.0.0.1 or [::1]")
        super().check_client()

    def show_page(self) -> Answer:
        return Answer(self.server.page, headers=[
            *SAFE, ("Content-Type", "text/html; charset=utf-8"),
            ("Content-Security-Policy", self.server.policy)])

    def show_picture(self) -> Answer:
        with self.looking():
            return Answer(self.server.observer.picture, headers=SAFE)

    def show_trace(self) -> Answer:
        trace_id = parse_query(self.query_string, ["id"]).get("id", "")
        with self.looking() as traces:
            spans = traces.find(trace_id)
        if not spans:
            raise NotFound(f"no trace {excerpt(trace_id)!r} is known here, or not any more")
        return Answer({"id": trace_id, "spans": spans}, headers=SAFE)

    def search(self) -> Answer:
        """Answer the traces with this trace id or request id, or those of an order."""
        wanted = parse_query(self.query_string, ["q"]).get("q", "").strip()
        with self.looking() as traces:
            found = [summary for summary in traces.summaries()
                     if wanted in (summary["id"], summary["request"], *summary["orders"])]
        return Answer({"traces": newest(found)}, headers=SAFE)

    def looking(self) -> contextlib.AbstractContextManager[TraceMemory]:
        self.server.turns.give_up()  # it waits for the answers of others
        return self.server.observer.looking()

    routes = {"/": {"GET": show_page}, "/picture": {"GET": show_picture},
              "/trace": {"GET": show_trace}, "/search": {"GET": search}}


# --- the process

class Live(Service):
    name, title, port = "live", "Live picture", LIVE_PORT
    announcement = "{title} at"
    handler = LiveHandler
    options = [config.HOST, config.TIMEOUT, config.QUIET,
               *[config.service_url(name, port) for name, port in NODES.items()]]

    def __init__(self, settings: Namespace):
        super().__init__(settings)
        page = PAGE.read_text("utf-8")
        self.page, self.policy = page.encode(), content_security_policy(page)
        self.observer = Observer({name: getattr(settings, f"{name}_url") for name in NODES})


if __name__ == "__main__":
    Live.main()
