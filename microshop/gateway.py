"""The API gateway: the front door of the shop. Owns no data.

The gateway is a reverse proxy: it forwards each request to the service that the first segment of
the path names. It also does API composition: it answers with data from several services. An order
contains only the ids of its user and its product; ?expand= adds the user and the product.
What to do when a service fails is decided in chassis.client. To see what happens to a request,
read GatewayHandler first.

Law: the gateway knows path prefixes and the links between resources, but no business rules.
"""
import json
import math
import time
from argparse import Namespace
from concurrent.futures import Future
from threading import Thread

from microshop import GATEWAY_PORT, SERVICES
from microshop.chassis import config, openapi, wire
from microshop.chassis.admission import (
    SAFE_METHODS, RateLimit, bearer_token, client_of, is_local, is_same)
from microshop.chassis.answer import NO_STORE, Answer
from microshop.chassis.client import Client, Reply, Upstream
from microshop.chassis.content import PAGE, encode, parse_query
from microshop.chassis.errors import (
    BadGateway, BadRequest, Forbidden, TooManyRequests, Unauthorized, UpstreamError, excerpt)
from microshop.chassis.handler import HEALTH_PATHS, Handler
from microshop.chassis.openapi import OBJECT, STRING, Operation, resource, schema_of
from microshop.chassis.server import Service
from microshop.chassis.tracing import Trace

IDEMPOTENT_RECEIVERS = {"orders"}  # services that honor an Idempotency-Key
# For each service: the names that ?expand= accepts, each with the service to fetch it from.
EXPANSIONS = {"orders": {"user": "users", "product": "products"}}
HEALTH_TIME = 0.2  # seconds for the services to answer: health checks often wait 1 s in all
# Paths that do not count for the rate: a monitor must not be refused.
MONITORED_PATHS = HEALTH_PATHS | {"/metrics", "/traces"}

# Headers about one connection, not the message, are not forwarded (RFC 9110 7.6.1).
HOP_BY_HOP = {
    "connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization",
    "te", "trailer", "transfer-encoding", "upgrade"}
# Headers of which the client's values are never forwarded. (Origin and Sec-Fetch-* have been
# checked already, against the client's Host.)
SET_BY_GATEWAY = {
    "host", "content-length", "expect", "origin", "forwarded", "x-real-ip", "x-request-id",
    "x-request-timeout", "traceparent", "tracestate"}
PREFIXES_SET_BY_GATEWAY = ("x-forwarded", "sec-fetch-")
NOT_FORWARDED = HOP_BY_HOP | SET_BY_GATEWAY
# Headers of a service's answer that the gateway writes itself.
NOT_PASSED_BACK = HOP_BY_HOP | {"x-request-id", "content-length", "server-timing"}
# Headers that apply to the composed response, not to its parts.
ABOUT_THE_WHOLE = {
    "if-match", "if-none-match", "if-modified-since", "if-unmodified-since", "if-range", "range",
    "accept-encoding"}

# What is published about a composed row: why a part of it is missing (see chassis/openapi.py)
MISSING = resource({"service": STRING, "status": {"type": "integer"}, "detail": STRING})


def via(version: str) -> str:
    """Return the gateway's entry in a Via header (RFC 9110 section 7.6.3)."""
    return f"{version.removeprefix('HTTP/')} {wire.PSEUDONYM}"


def with_named(left_out: set[str], fields: wire.Fields) -> set[str]:
    """Add to `left_out` the headers that Connection names: they are about one connection, too."""
    if fields.get("connection", "keep-alive") == "keep-alive":  # it is in every such set already
        return left_out
    return left_out | fields.tokens("connection")


def get_all(client: Client, requests: list[tuple[Upstream, str]], trace: Trace,
            deadline: float) -> list[Reply | UpstreamError]:
    """Send a GET to each service and target; return the replies, or the errors.

    All are sent in parallel: the first in this thread, which otherwise would only wait, and each
    other in a thread of its own. The threads are daemons: a call that hangs must not keep the
    process from ending, as a concurrent.futures pool would.
    """
    futures: list[Future] = [Future() for _ in requests]

    def get(future: Future, upstream: Upstream, target: str) -> None:
        try:
            future.set_result(client.call(upstream, "GET", target, trace, deadline=deadline))
        except UpstreamError as error:
            future.set_result(error)
        except Exception as error:  # raised again below, in the thread that waits
            future.set_exception(error)

    calls = [(future, *request) for future, request in zip(futures, requests, strict=True)]
    for call in calls[1:]:
        try:
            Thread(target=get, args=call, daemon=True).start()
        except RuntimeError:  # the system has no room for another thread
            get(*call)
    if calls:
        get(*calls[0])
    return [future.result() for future in futures]


# --- what a composed response is made of

def finite(text: str) -> float:
    """Return a JSON number as a float. Raises ValueError for NaN, Infinity and the like."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} cannot be represented in JSON")
    return number


# Three times as fast as content.parse_json, which also looks for repeated names.
decode = json.JSONDecoder(parse_float=finite, parse_constant=finite).decode


def read_rows(service: str, body: bytes, *keys: str) -> list[dict]:
    """Return the resources in a response body: a list of them, or a single one.

    Raises BadGateway if it is anything else, or if any of them lacks an integer for one of `keys`.
    """
    try:
        value = decode(body.decode())
        if b"\\u" in body:
            encode(value).encode()  # fails for a lone surrogate, which cannot be sent again
        rows = value if isinstance(value, list) else [value]
        if all(type(row[key]) is int for row in rows for key in keys):
            return rows
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise BadGateway(service, "returned an invalid response")


def read_page(service: str, reply: Reply | UpstreamError) -> tuple[list[dict], int, str]:
    """Return the resources in a reply, and the status and detail to report for those not in it.

    A reply with status 200 has every resource that exists, so the others get 404; their detail is
    empty here, and Expansion.add() fills it in.
    """
    if isinstance(reply, Reply) and reply.status == 200:
        try:
            return read_rows(service, reply.body, "id"), 404, ""
        except BadGateway as error:
            return [], error.status, error.detail
    return [], reply.status, reply.detail


def first_segment(path: str) -> str:
    """Return the first segment of a path: if it names a service, that is where the path leads."""
    return path.removeprefix("/").partition("/")[0]


def key_of(name: str) -> str:
    """Return the key under which a row holds the id of the resource with this name."""
    return f"{name}Id"


class Expansion:
    """What one name in ?expand= stands for: the resources to put into the rows, by their ids."""

    def __init__(self, name: str, service: str, rows: list[dict]):
        self.name, self.service = name, service
        self.key = key_of(name)
        self.ids = sorted({row[self.key] for row in rows})
        self.found: dict[int, dict] = {}
        self.missing: dict[int, dict] = {}  # the reason, for each that was not found

    def batches(self) -> list[list[int]]:
        """Return the ids in lists of at most PAGE: what one request can get without a limit."""
        return [self.ids[start:start + PAGE] for start in range(0, len(self.ids), PAGE)]

    def add(self, ids: list[int], reply: Reply | UpstreamError) -> None:
        """Record the service's reply to a request for these ids."""
        rows, status, detail = read_page(self.service, reply)
        for row in rows:
            self.found[row["id"]] = row
        for item_id in ids:
            if item_id not in self.found:
                self.missing[item_id] = {
                    "service": self.service, "status": status,
                    "detail": detail or f"there is no {self.name} {item_id}"}


def expand(row: dict, expansions: list[Expansion]) -> int:
    """Put the expansions into a row; return how many are missing. Its `missing` says why."""
    reasons = []
    for expansion in expansions:
        wanted = row[expansion.key]
        row[expansion.name] = expansion.found.get(wanted)
        if wanted in expansion.missing:
            reasons.append(expansion.missing[wanted])
    if reasons:
        row["missing"] = reasons
    return len(reasons)


# --- the published API

def publish_expansions(document: dict, service: str) -> None:
    """Add ?expand= to the GETs of a service in an OpenAPI document, and its parts to the rows."""
    names = EXPANSIONS[service]
    added = {"missing": schema_of([MISSING])}
    for name, other in names.items():
        page = document["paths"][f"/{other}"]["get"]["responses"]["200"]
        row = page["content"]["application/json"]["schema"]["items"]
        added[name] = {"oneOf": [row, {"type": "null"}]}
    for schema in document["components"]["schemas"].values():
        if all(key_of(name) in schema.get("properties", ()) for name in names):
            schema["properties"] |= added
    for path, operations in document["paths"].items():
        if first_segment(path) == service and "get" in operations:
            wanted = {**schema_of([{**STRING, "enum": list(names)}]), "minItems": 1}
            operations["get"].setdefault("parameters", []).append(openapi.parameter(
                "query", "expand", wanted, "add these; X-Complete says how many were found"))


# --- requests

class GuardedHandler(Handler):
    """Checks who sends a request before it is answered (see chassis/admission.py)."""

    server: "Gateway"

    def check_client(self) -> None:
        """Raise TooManyRequests above the rate, Forbidden as in Handler, or Unauthorized.

        Health checks do not count for the rate: to answer them with 429 would take the gateway out.
        """
        if self.server.limit and self.path.partition("?")[0].rstrip("/") not in MONITORED_PATHS:
            self.check_rate(self.server.limit)
        super().check_client()
        if not self.server.token or self.command in SAFE_METHODS or self.has_token():
            return
        given = bearer_token(self.headers.get("authorization", ""))
        code = ', error="invalid_token"' if given else ""  # RFC 6750 section 3
        raise Unauthorized("a write needs Authorization: Bearer followed by the shop's token",
                           [("WWW-Authenticate", f'Bearer realm="microshop"{code}')])

    def check_rate(self, limit: RateLimit) -> None:
        wait = math.ceil(limit.take(client_of(self.client_address[0])))
        if not wait:
            return
        requests, seconds = limit.rate
        raise TooManyRequests(f"more than {requests} requests in {seconds} s; retry in {wait} s", [
            ("Retry-After", str(wait)),
            ("RateLimit", f'"client";r=0;t={wait}'),
            ("RateLimit-Policy", f'"client";q={requests};w={seconds}')])

    def check_observer(self) -> None:
        """Raise Forbidden unless the client is on this machine, not behind a proxy, or has a token.

        Traces show what others have asked for.
        """
        own = self.connection.getsockname()[0]
        if not (is_local(self.client_address[0], own, self.headers) or self.has_token()):
            raise Forbidden("metrics and traces are for clients on this machine that use no proxy, "
                            "and for those that send the shop's token")
        super().check_observer()

    def has_token(self) -> bool:
        """Return whether the client has sent the shop's token. If there is none, it has not."""
        given = bearer_token(self.headers.get("authorization", ""))
        return bool(self.server.token) and is_same(given, self.server.token)


class GatewayHandler(GuardedHandler):
    def dispatch(self) -> Answer:
        """Compose or forward. A path that names no service is one of the gateway's own."""
        path, _, query = self.path.partition("?")
        upstream = self.server.upstreams.get(first_segment(path))
        if not upstream:
            return super().dispatch()
        self.route = f"/{upstream.name}/*"
        if query and upstream.name in EXPANSIONS and self.command in ("GET", "HEAD"):
            names = parse_query(query, ["expand"]).get("expand")
            if names is not None:
                return self.compose(upstream, list(dict.fromkeys(names.split(","))))
        return self.pass_back(self.forward(upstream, self.command))

    def known_paths(self) -> list[str]:
        return [*(f"/{name}" for name in SERVICES), "/health"]

    # --- forwarding

    def forward(self, upstream: Upstream, method: str,
                left_out: set[str] = NOT_FORWARDED) -> Reply:
        """Forward the request, and return the service's reply. Raises UpstreamError.

        The request's correlation id is sent along as X-Request-Id, so that all logs have the same.
        """
        left_out = with_named(left_out, self.headers)
        headers = {name: value for name, value in self.headers.items()
                   if name not in left_out and not name.startswith(PREFIXES_SET_BY_GATEWAY)}
        own_via = via(self.request_version)
        headers["via"] = f"{headers['via']}, {own_via}" if headers.get("via") else own_via
        headers["x-forwarded-for"] = self.client_address[0]
        headers["x-forwarded-proto"] = "http"
        if "host" in self.headers:
            headers["x-forwarded-host"] = self.headers["host"]
        if self.server.token:  # the token is not for the services
            headers.pop("authorization", None)
        has_body = "content-length" in self.headers or "transfer-encoding" in self.headers
        body = self.receive_body() if has_body else None
        return self.server.client.call(
            upstream, method, self.path, self.trace(), headers, body, self.deadline)

    def pass_back(self, reply: Reply) -> Answer:
        """Return the service's reply as the answer to the client."""
        left_out = with_named(NOT_PASSED_BACK, reply.fields)
        headers = [(name, value) for name, value in reply.fields.pairs
                   if name.lower() not in left_out]
        if self.command == "HEAD" and "content-length" in reply.fields and reply.status != 204:
            # the length that a GET would have
            headers.append(("Content-Length", reply.fields["content-length"]))
        return Answer(reply.body, reply.status, [*headers, ("Via", via(reply.version))])

    # --- composition

    def compose(self, upstream: Upstream, names: list[str]) -> Answer:
        """Answer with resources of a service, and expand these names in each of them.

        For instance, expanding `user` adds to each order its user. What cannot be fetched is null,
        and `missing` says why. X-Complete: 3/4 means that 3 of 4 were found.
        """
        services = EXPANSIONS[upstream.name]
        for name in names:
            if name not in services:
                raise BadRequest(f"expand: {excerpt(name)!r} is not one of {', '.join(services)}")
        reply = self.forward(upstream, "GET", NOT_FORWARDED | ABOUT_THE_WHOLE)
        if reply.status != 200:
            return self.pass_back(reply)
        rows = read_rows(upstream.name, reply.body, *[key_of(name) for name in names])
        expansions = [Expansion(name, services[name], rows) for name in names]
        self.fetch(expansions)
        missing = sum(expand(row, expansions) for row in rows)
        total = len(rows) * len(names)
        headers = [("X-Complete", f"{total - missing}/{total}"), ("Via", via(reply.version))]
        if "link" in reply.fields:
            headers.insert(0, ("Link", reply.fields["link"]))
        if missing:
            headers.append(NO_STORE)
        is_page = reply.body.lstrip().startswith(b"[")  # else read_rows() made a list of one
        return Answer(rows if is_page else rows[0], headers=headers)

    def fetch(self, expansions: list[Expansion]) -> None:
        """Fetch the resources of all expansions in parallel, at most PAGE with each request."""
        batches = [(expansion, ids) for expansion in expansions for ids in expansion.batches()]
        requests = []
        for expansion, ids in batches:
            target = f"/{expansion.service}?ids={','.join(map(str, ids))}"
            requests.append((self.server.upstreams[expansion.service], target))
        replies = get_all(self.server.client, requests, self.trace(), self.deadline)
        for (expansion, ids), reply in zip(batches, replies, strict=True):
            expansion.add(ids, reply)

    # --- the gateway's own resources

    def greet(self) -> Answer:
        return Answer(b"API Gateway", headers=[("Content-Type", "text/html; charset=utf-8")])

    def health(self) -> Answer:
        """Answer a health check with the state of each service, and of its circuit breakers."""
        answer = super().health()
        upstreams = self.server.upstreams
        requests = [(upstream, "/health") for upstream in upstreams.values()]
        deadline = min(self.deadline, time.monotonic() + HEALTH_TIME)
        replies = get_all(self.server.client, requests, self.trace(), deadline)
        breakers = {name: [instance.breaker.state for instance in upstream.instances]
                    for name, upstream in upstreams.items()}
        states = {name: state_of(reply, breakers[name])
                  for name, reply in zip(upstreams, replies, strict=True)}
        body = {**answer.body, "services": states, "breakers": breakers}
        if answer.status == 200 and any(state != "ok" for state in states.values()):
            body["status"] = "degraded"
        return Answer(body, answer.status, answer.headers)

    def describe_api(self) -> Answer:
        """Answer with the OpenAPI document of the shop: our routes, and those that we forward.

        Each service publishes its own at the same path. If one does not answer, this fails as a
        forwarded request would: an incomplete document would look complete. Writes need a
        token; if the gateway has none, an empty requirement makes it optional.
        """
        document = super().describe_api().body
        document["components"]["securitySchemes"] = {"token": openapi.BEARER}
        security: list[dict] = [{"token": []}, *([] if self.server.token else [{}])]
        for name, upstream in self.server.upstreams.items():
            reply = self.server.client.call(
                upstream, "GET", "/openapi.json", self.trace(), deadline=self.deadline)
            if reply.status != 200:
                return self.pass_back(reply)
            try:
                [published] = read_rows(name, reply.body)
                openapi.add_service(document, name, published, security)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise BadGateway(name, "returned an invalid response") from None
        for name in EXPANSIONS:
            publish_expansions(document, name)
        return Answer(document)

    routes = {"/": {"GET": greet}}
    schemas = {"ShopHealth": resource({
        **openapi.HEALTH["properties"], "services": OBJECT, "breakers": OBJECT})}
    operations = {
        "GET /": Operation("greet", {200: STRING}, errors=[429], media_type="text/html"),
        "GET /health": Operation("getHealth", {200: "ShopHealth", 503: "ShopHealth"}),
        "GET /openapi.json": Operation("getApi", {200: OBJECT}, errors=[429, 502, 504])}


def state_of(reply: Reply | UpstreamError, breakers: list[str]) -> str:
    """Return the state of a service from its health check, and those of its circuit breakers.

    A service that has no room or no time for a health check is busy; that alone is no fault.
    """
    if reply.status == 200:
        return "ok"
    if isinstance(reply, Reply) and b'"draining"' in reply.body:
        return "draining"
    return "busy" if reply.status in (503, 504) and "closed" in breakers else "away"


# --- the process

class Gateway(Service):
    name, title, port = "gateway", "API Gateway", GATEWAY_PORT
    handler = GatewayHandler
    turn_count = 4  # most requests wait for a service meanwhile, in less than TURN_TIME
    client: Client
    options = [
        config.HOST, *config.FOR_GATEWAY, config.TOKEN, config.QUIET,
        *[config.service_url(name, port) for name, port in SERVICES.items()]]

    def __init__(self, settings: Namespace):
        super().__init__(settings)
        self.token = config.find_token(settings)
        self.limit = RateLimit(settings.rate) if settings.rate else None
        self.client = Client(settings.timeout, self.log.event, self.telemetry.record)
        self.upstreams = {}
        for name in SERVICES:
            self.upstreams[name] = Upstream(
                name, getattr(settings, f"{name}_url"), max_in_flight=settings.max_in_flight,
                idempotent_receiver=name in IDEMPOTENT_RECEIVERS)


if __name__ == "__main__":
    Gateway.main()
