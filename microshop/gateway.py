"""The API gateway: the front door. Owns nothing.

A path's first segment names the service that it is for. Some resources name others, and can be asked for with those
inside (API composition). That is all that is known here about any; what to do when one fails is in chassis.client.
Law: the gateway knows prefixes, not business.
"""
import json
import math
import time
from argparse import Namespace
from threading import Thread

from microshop import GATEWAY_PORT, SERVICES
from microshop.chassis import config
from microshop.chassis.client import Client, Reply, Upstream
from microshop.chassis.content import encode, parse_query
from microshop.chassis.errors import BadGateway, BadRequest, TooManyRequests, Unauthorized, UpstreamError
from microshop.chassis.admission import RateLimit, client_of, is_bearer
from microshop.chassis.handler import Answer, Handler
from microshop.chassis.server import Service

KEEPS_KEYS = {"orders"}  # who honours an Idempotency-Key: a POST with one may be sent twice
EXPANSIONS = {"orders": {"user": "users", "product": "products"}}  # what ?expand= puts inside, and who has it, by its id
MAX_IDS = 100            # parts that are asked for at once: a page, unless told otherwise
HEALTH_TIME = 1.0        # seconds for a service to tell how it is
HEALTH = {200: "ok", 503: "draining"}  # how a service is that answers so
READS = {"GET", "HEAD", "OPTIONS", "TRACE"}  # RFC 9110 9.2.1: they ask for no change

# What concerns one hop alone is not passed on: RFC 9110 7.6.1, and the framing, which each hop makes anew.
HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization", "te",
              "trailer", "transfer-encoding", "upgrade"}
# What the gateway itself says to a service; a client's word for it does not count.
OWN = {"host", "content-length", "expect", "forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto",
       "x-request-id", "x-request-timeout", "traceparent", "tracestate"}
NOT_SENT = HOP_BY_HOP | OWN
# What a client says of the whole that it knows is compared with the whole, not with what it is put together from.
CONDITIONS = {"if-match", "if-none-match", "if-modified-since", "if-unmodified-since", "if-range", "range"}
NOT_ANSWERED = HOP_BY_HOP | {"x-request-id", "content-length"}

Parts = dict[str, dict[int, dict]]  # by name and id


def via(version: str) -> str:
    return f"{version.removeprefix('HTTP/')} microshop"


def finite(text: str) -> float:
    """Return the number that a JSON number, NaN or Infinity stands for. Raises ValueError if it is not finite."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} could not be passed on")
    return number


decode = json.JSONDecoder(parse_float=finite, parse_constant=finite).decode  # parse_json takes thrice the time


def read_rows(service: str, body: bytes, *ids: str) -> list[dict]:
    """Return the resources in a service's answer, each with these ids, which are integers. Raises BadGateway."""
    try:
        value = decode(body.decode())
        if b"\\u" in body:
            encode(value).encode()  # refuses lone surrogates, which could not be passed on
        rows = value if isinstance(value, list) else [value]
        if {type(row[name]) for row in rows for name in ids} <= {int}:
            return rows
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise BadGateway(service, "gave an answer that makes no sense")


def read_page(service: str, reply: Reply | UpstreamError) -> tuple[list[dict], int, str]:
    """Return the resources in a page, and the status and detail to tell of those that were wanted but are not there.

    A page that is well has all that there are: the others are 404, and have no detail but their ids.
    """
    if isinstance(reply, Reply) and reply.status == 200:
        try:
            return read_rows(service, reply.body, "id"), 404, ""
        except BadGateway as failure:
            reply = failure
    return [], reply.status, reply.detail


class GatewayHandler(Handler):
    server: "Gateway"

    def dispatch(self) -> Answer:
        path, _, query = self.path.partition("?")
        if not (upstream := self.server.upstreams.get(path.split("/")[1])):
            return super().dispatch()
        if query and upstream.name in EXPANSIONS and self.command in ("GET", "HEAD"):
            if (expand := parse_query(query).get("expand")) is not None:
                return self.compose(upstream, list(dict.fromkeys(expand.split(","))))
        return self.pass_back(self.forward(upstream, self.command))

    def check_client(self) -> None:
        """Raise TooManyRequests, or Unauthorized where a write comes without the token."""
        limit, token = self.server.limit, self.server.token
        wait = math.ceil(limit.take(client_of(self.client_address[0]))) if limit else 0
        if limit and wait:
            most, seconds = limit.rate
            raise TooManyRequests(f"more than {most} requests in {seconds} s; come back in {wait} s", [
                ("Retry-After", str(wait)), ("RateLimit", f'"client";r=0;t={wait}'),
                ("RateLimit-Policy", f'"client";q={most};w={seconds}')])
        if token and self.command not in READS and not is_bearer(self.headers.get("authorization", ""), token):
            raise Unauthorized("a write needs Authorization: Bearer with the shop's token",
                               [("WWW-Authenticate", 'Bearer realm="microshop"')])

    # --- forwarding

    def forward(self, upstream: Upstream, method: str, not_sent: set[str] = NOT_SENT) -> Reply:
        """Send the request on, and return what the service answers. Raises UpstreamError."""
        named = self.headers.tokens("connection")
        headers = {name: value for name, value in self.headers.items() if name not in not_sent and name not in named}
        headers["via"] = ", ".join(filter(None, (headers.get("via"), via(self.request_version))))
        headers["x-forwarded-for"] = self.client_address[0]
        headers["x-forwarded-proto"] = "http"
        if "host" in self.headers:
            headers["x-forwarded-host"] = self.headers["host"]
        if self.server.token:
            headers.pop("authorization", None)
        headers.update(self.trace())
        return self.server.client.call(upstream, method, self.path, headers, self.body, self.deadline)

    def pass_back(self, reply: Reply) -> Answer:
        named = reply.fields.tokens("connection")
        passed = [(name, value) for name, value in reply.fields.pairs
                  if (key := name.lower()) not in NOT_ANSWERED and key not in named]
        if self.command == "HEAD" and "content-length" in reply.fields and reply.status != 204:  # what GET would send
            passed.append(("Content-Length", reply.fields["content-length"]))
        return Answer(reply.body, reply.status, [*passed, ("Via", via(reply.version))])

    # --- composition

    def compose(self, upstream: Upstream, names: list[str]) -> Answer:
        """Answer with resources that have their parts of these names inside, by one call for each page of parts.

        A part that is not to be had is null, and the resource tells under `missing` why. X-Complete tells how
        many parts were found, of how many.
        """
        services = EXPANSIONS[upstream.name]
        for name in names:
            if name not in services:
                raise BadRequest(f"expand: {name!r} is none of {', '.join(services)}")
        reply = self.forward(upstream, "GET", NOT_SENT | CONDITIONS)
        if reply.status != 200:
            return self.pass_back(reply)
        keys = {name: f"{name}Id" for name in names}
        rows = read_rows(upstream.name, reply.body, *keys.values())
        wanted = {name: sorted({row[key] for row in rows}) for name, key in keys.items()}
        parts, reasons = self.find_parts(wanted, services)
        for name, key in keys.items():
            for row in rows:
                row[name] = parts[name].get(row[key])
        missing = 0
        for row in rows if any(reasons.values()) else []:
            if whys := [why for name, key in keys.items() if (why := reasons[name].get(row[key]))]:
                row["missing"] = whys
                missing += len(whys)
        total = len(rows) * len(names)
        links = [("Link", reply.fields["link"])] if "link" in reply.fields else []
        return Answer(rows if reply.body.lstrip().startswith(b"[") else rows[0], headers=[
            *links, ("X-Complete", f"{total - missing}/{total}"), ("Via", via(reply.version))])

    def find_parts(self, wanted: dict[str, list[int]], services: dict[str, str]) -> tuple[Parts, Parts]:
        """Return the parts that are found, each by its name and its id, and what to tell of each that is not."""
        pages = [(name, ids[first:first + MAX_IDS]) for name, ids in wanted.items()
                 for first in range(0, len(ids), MAX_IDS)]
        replies = self.ask_together([
            (self.server.upstreams[services[name]], f"/{services[name]}?ids={','.join(map(str, ids))}")
            for name, ids in pages], self.deadline)
        parts: Parts = {name: {} for name in wanted}
        reasons: Parts = {name: {} for name in wanted}
        for (name, ids), reply in zip(pages, replies, strict=True):
            rows, status, detail = read_page(services[name], reply)
            parts[name].update({row["id"]: row for row in rows})
            reasons[name].update({part: {"service": services[name], "status": status,
                                         "detail": detail or f"there is no {name} {part}"}
                                  for part in ids if part not in parts[name]})
        return parts, reasons

    def ask_together(self, questions: list[tuple[Upstream, str]], deadline: float) -> list[Reply | UpstreamError]:
        """Ask services side by side; return what each answers, or why it does not."""
        outcomes: dict[int, Reply | UpstreamError] = {}
        trace = self.trace()

        def ask(number: int, upstream: Upstream, target: str) -> None:
            try:
                outcomes[number] = self.server.client.call(upstream, "GET", target, trace, deadline=deadline)
            except UpstreamError as failure:
                outcomes[number] = failure

        threads = [Thread(target=ask, args=(number, *question), daemon=True)
                   for number, question in enumerate(questions)]
        for thread in threads[1:]:
            thread.start()
        for thread in threads[:1]:
            thread.run()  # the first needs no thread but this one
        for thread in threads[1:]:
            thread.join()
        return [outcomes[number] for number in range(len(questions))]

    # --- the gateway's own

    def greet(self) -> Answer:
        return Answer(b"API Gateway", headers=[("Content-Type", "text/html; charset=utf-8")])

    def health(self) -> Answer:
        """Tell how the gateway is, each service behind it, and the breaker of each instance of those."""
        upstreams = self.server.upstreams
        replies = self.ask_together([(upstream, "/health") for upstream in upstreams.values()],
                                    min(self.deadline, time.monotonic() + HEALTH_TIME))
        states = {name: HEALTH.get(reply.status, "away") if isinstance(reply, Reply) else "away"
                  for name, reply in zip(upstreams, replies, strict=True)}
        breakers = {name: [instance.breaker.state for instance in upstream.instances] for name, upstream in upstreams.items()}
        answer = super().health()
        if answer.status == 200 and set(states.values()) != {"ok"}:
            answer.body["status"] = "degraded"
        return answer._replace(body={**answer.body, "services": states, "breakers": breakers})

    routes = {"/": {"GET": greet}}


class Gateway(Service):
    name, title, port = "gateway", "API Gateway", GATEWAY_PORT
    handler = GatewayHandler
    options = [
        config.HOST, *config.FOR_GATEWAY, config.TOKEN, config.QUIET,
        *[config.service_url(name, port)
          for name, port in SERVICES.items()]]

    def __init__(self, settings: Namespace):
        super().__init__(settings)
        self.token = settings.token_file or settings.token or ""
        self.limit = RateLimit(settings.rate) if settings.rate else None
        self.client = Client(settings.timeout)
        self.upstreams = {name: Upstream(name, getattr(settings, f"{name}_url"), keeps_keys=name in KEEPS_KEYS,
                                         max_in_flight=settings.max_in_flight) for name in SERVICES}

    def close(self) -> None:
        self.client.close()
        super().close()


if __name__ == "__main__":
    Gateway.main()
