"""One connection's requests: read each, find its route, answer it.

A subclass of Handler has methods and a table, `routes`, that says which path each method serves. A
method returns an Answer or raises a ServiceError; answer.py turns either into bytes. Where
http.server is too lenient or too slow, this module replaces it; the comments say why.

When something has arrived on a connection, a thread that has a turn calls answer_arrived. For each
request: handle_one_request -> respond -> read_request, then find_answer -> check_client, then
dispatch -> the route's method; when the answer is sent, note_end logs and records the request. The
gateway overrides check_client and dispatch.

Law: routes write to no socket; they return or raise. Nothing here knows what a route is about.
"""
import contextlib
import re
import time
import traceback
from collections.abc import Callable, Iterator
from http import HTTPMethod
from http.server import BaseHTTPRequestHandler
from typing import Any

from microshop.chassis import config, openapi, wire
from microshop.chassis.access_log import make_request_id
from microshop.chassis.admission import SAFE_METHODS, is_cross_origin
from microshop.chassis.answer import (
    NO_STORE, Answer, RequestContext, check_preconditions, entity_tag, format_answer,
    problem_answer, represent)
from microshop.chassis.content import (
    MAX_INTEGER, FieldTable, Page, encode, next_query, parse_json, parse_page, validate)
from microshop.chassis.database import Transaction
from microshop.chassis.errors import (
    RETRY_SOON, BadRequest, ExpectationFailed, Forbidden, LengthRequired, MethodNotAllowed,
    MethodNotImplemented, NotFound, RequestTimeout, ServiceError, ServiceUnavailable,
    UnsupportedMediaType, excerpt)
from microshop.chassis.metrics import CONTENT_TYPE, format_metrics
from microshop.chassis.server import Service
from microshop.chassis.tracing import CLIENT_GONE, MAX_METHOD, MAX_TARGET, ServerSpan, Trace

HEAD_TIME = 10.0     # seconds for a whole head, from its first byte
BODY_TIME = 10.0     # seconds for which a body may arrive more slowly than at BODY_RATE
BODY_RATE = 1024     # bytes per second
SEND_TIME = 10.0     # seconds for a client to take a whole answer
ANSWER_SHARE = 0.1   # of the caller's timeout: reserved for sending the answer back

ID_PATTERN = "([1-9][0-9]{0,15})"
REQUEST_ID = re.compile("[A-Za-z0-9._-]{1,64}")
# RFC 9110 section 5.6.6: a parameter may be missing after its semicolon
JSON_TYPE = re.compile(r'application/json(?>[ \t]*;[ \t]*(?:charset="?utf-8"?)?)*', re.I)
# With an unknown method, the answer is 501, not 405. Python does not know QUERY yet.
KNOWN_METHODS = {*HTTPMethod, "QUERY"}
LIVE_PATH = "/health/live"
# The first line of a liveness check, which may have a query
LIVE_CHECK = re.compile(
    b"(GET|HEAD) " + LIVE_PATH.encode() + rb'/?(?:\?[!"$&-~]*)? HTTP/1\.[01]\r\n')
HEALTH_PATHS = {"/health", LIVE_PATH}  # of every process; asked by monitors
DATABASE = "/database"  # of every process that owns data; asked by the audit
NO_FIELDS = wire.Fields([])
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

Methods = dict[str, Callable[..., Answer]]  # the functions of a path, by HTTP method


class ConnectionLost(OSError):
    """The connection broke, or we have closed it: nothing can be answered on it."""


class RequestReader(BaseHTTPRequestHandler):
    """Reads the requests of a connection, one after another."""

    server: Service
    headers: wire.Fields  # type: ignore[assignment]
    body = b""
    body_size = 0         # bytes that have arrived of it, and are taken from the body_memory
    deadline = 0.0        # of time.monotonic: when the work on the request must end
    rbufsize = 0          # no buffer here: wire.Stream has its own

    def setup(self) -> None:
        super().setup()
        self.stream = wire.Stream(self.connection)

    def begin_request(self) -> None:
        """Replace what is known of the last request: another one begins."""
        self.command, self.path, self.request_id = "-", "-", make_request_id()
        self.request_version, self.headers = "HTTP/1.1", NO_FIELDS
        self.is_read = False
        self.started = time.perf_counter()
        self.route = ""              # the template of its path, once that is known
        self.is_unrecorded = False   # whether it is left out of log, metrics and traces
        self._trace: Trace | None = None

    def read_request(self) -> None:
        """Read a head, and the body as well, unless the client waits to be asked for it.

        The body is read whatever the route, so that it is never taken for the next request. Raises
        ServiceError and ConnectionLost.
        """
        self.stream.deadline = time.monotonic() + HEAD_TIME
        if not self.stream.has_head():  # the client sends slowly
            self.server.turns.give_up()
        head = self.attempt(self.stream.read_head)
        try:
            request = wire.parse_request(head)
        except ServiceError:  # the log shows the first line, escaped
            line = head.partition("\r\n")[0]
            self.path = ascii(line[:200])[1:-1].replace(" ", r"\x20") or "-"
            raise
        self.command, self.path, self.request_version, self.headers, length = request
        self.length = length or 0
        # A body may come slowly, and a write waits for a commit, which several may share.
        if self.length or self.command not in SAFE_METHODS:
            self.server.turns.give_up()
        given = self.headers.get("x-request-id")
        if given and REQUEST_ID.fullmatch(given):
            self.request_id = given
        expects = "expect" in self.headers and self.request_version == "HTTP/1.1"
        if expects and self.headers["expect"].lower() != "100-continue":
            raise ExpectationFailed("the only expectation supported is 100-continue")
        if not (expects and self.length):
            self._read_body()

    def receive_body(self) -> bytes:
        """Return the body. If the client waits to be asked for it, ask, and wait for it.

        So a request with `Expect: 100-continue` that is refused for its head gets the refusal
        before it sends its body (RFC 9110 section 10.1.1). Raises ServiceError and ConnectionLost.
        """
        if not self.is_read:
            began = time.monotonic()
            if self.length <= wire.MAX_BODY:  # a larger one is refused without being sent
                self.stream.deadline = began + SEND_TIME
                self.attempt(self.stream.send, CONTINUE)
            self._read_body()
            self.deadline += time.monotonic() - began  # the work waits meanwhile
        return self.body

    def _read_body(self) -> None:
        if self.length:
            self.stream.deadline = time.monotonic() + BODY_TIME
            self.body = self.attempt(
                self.stream.read_body, self.length, wire.MAX_BODY, self.note_arrival)
        self.is_read = True

    def attempt(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Return what an action on the stream returns. Raises ServiceError and ConnectionLost."""
        try:
            return action(*arguments)
        except TimeoutError:
            raise RequestTimeout("the request was not received in time") from None
        except EOFError:
            if self.server.connections.has_closed(self.connection):
                raise ConnectionLost from None  # no answer: the client may retry the request
            raise BadRequest("the connection ended before the whole request was received") from None
        except OSError as error:
            raise ConnectionLost from error

    def note_arrival(self, size: int) -> None:
        """Find room for a part of the body that has arrived, and give the rest more time."""
        self.server.body_memory.take(size)
        self.body_size += size
        self.stream.deadline = min(
            self.stream.deadline + size / BODY_RATE, time.monotonic() + BODY_TIME)


class ConnectionHandler(RequestReader):
    """What is done with each request of a connection: read it, answer it, log and record it."""

    disable_nagle_algorithm = True  # Nagle's algorithm may delay an answer by 40 ms

    def handle(self) -> None:
        """Do nothing: socketserver calls this too early; listener calls answer_arrived()."""

    def answer_arrived(self) -> bool:
        """Answer the requests that have arrived; return whether the connection stays open."""
        self.stream.deadline = time.monotonic() + HEAD_TIME
        try:
            self.stream.fill()
        except (OSError, EOFError):  # the end has arrived
            return False
        self.close_connection = False
        while self.stream.has_message() and not self.close_connection:
            self.handle_one_request()
        return not self.close_connection

    def handle_one_request(self) -> None:
        """Read a request and answer it; then close_connection says whether it was the last."""
        self.server.connections.note_busy(self.connection)
        self.begin_request()
        try:
            status, message = self.respond()
            self.stream.deadline = time.monotonic() + SEND_TIME
            self.stream.send(message)  # head and body in one piece: one system call
        except OSError:
            self.close_connection, status = True, CLIENT_GONE
        self.note_end(status)
        self.server.connections.note_idle(self.connection)
        if self.close_connection and status != CLIENT_GONE:
            self.server.turns.give_up()
            self.stream.linger()  # meanwhile, it counts as idle and may be closed to make room

    def respond(self) -> tuple[int, bytes]:
        """Return the status and the bytes of the answer to the request that has begun to arrive."""
        try:
            self.read_request()
            return self.format(self.find_answer())
        except ConnectionLost:
            raise
        except Exception as error:
            return self.format(problem_answer(self.to_service_error(error), self.request_id))
        finally:
            if self.body_size:
                self.server.body_memory.release(self.body_size)
                self.body, self.body_size = b"", 0

    def find_answer(self) -> Answer:
        """Return the answer to the request that was read. Raises ServiceError."""
        raise NotImplementedError

    def format(self, answer: Answer) -> tuple[int, bytes]:
        """Return an answer's status and bytes.

        The connection is closed after it if the process drains, or if it is not known where the
        next request begins, since this one was not read to its end. Raises PreconditionFailed, and
        ValueError if the answer cannot be written safely.
        """
        is_kept = self.is_read and wire.keeps_alive(self.request_version, self.headers)
        self.close_connection = not is_kept or self.server.draining
        context = self.context()
        answer = represent(answer, context)
        context.server_timing = self.server_timing()
        return answer.status, format_answer(answer, context)

    def context(self) -> RequestContext:
        return RequestContext(
            self.request_id, self.command, self.headers.get("if-match"),
            self.headers.get("if-none-match", ""), not self.close_connection)

    def to_service_error(self, error: Exception) -> ServiceError:
        """Return the error to send to the client; log the details that it must not see."""
        if isinstance(error, ServiceError):
            return error
        server = self.server
        failure = server.database.to_service_error(error) if server.schema else None
        if failure:
            server.log.event(f"{self.request_id} {server.database.path}: {error}", "database")
            return failure
        server.log.event(f"{self.request_id} failed\n{traceback.format_exc()}", "failure")
        return ServiceError("an internal error occurred; the log of the service has the details")

    # --- following a request through the services

    def trace(self) -> Trace:
        """Return the place of this request in its trace, which calls to other services need."""
        if not self._trace:
            self._trace = Trace(self.request_id, self.headers.get("traceparent", ""),
                                self.headers.get("tracestate", ""))
        return self._trace

    def server_timing(self) -> str:
        """Return the value of Server-Timing: the milliseconds that each process has taken."""
        own = f"{self.server.name};dur={(time.perf_counter() - self.started) * 1000:.3f}"
        return ", ".join([*self._trace.timings, own]) if self._trace else own

    def note_end(self, status: int) -> None:
        """Log the request, and record it as a span: unless it asked for metrics or traces."""
        if self.is_unrecorded:
            return
        seconds, ended = time.perf_counter() - self.started, time.time()
        self.server.log.request(self.request_id, self.command, self.path, status, seconds)
        self.server.telemetry.record(ServerSpan(
            self.trace(), self.command[:MAX_METHOD], self.path[:MAX_TARGET], self.route, status,
            ended, seconds))


class RouteHelpers(ConnectionHandler):
    """Helpers for the methods that routes call."""

    query_string = ""

    def read_json(self) -> Any:
        """Return the JSON value in the body.

        Raises LengthRequired, UnsupportedMediaType, BadRequest.
        """
        if "content-length" not in self.headers and "transfer-encoding" not in self.headers:
            raise LengthRequired("this request needs a body")
        if not JSON_TYPE.fullmatch(self.headers.get("content-type", "")):
            raise UnsupportedMediaType("the body must have Content-Type: application/json",
                                       [("Accept", "application/json")])
        if self.headers.get("content-encoding", "identity").lower() != "identity":
            raise UnsupportedMediaType("the body must not have a Content-Encoding",
                                       [("Accept-Encoding", "identity")])
        return parse_json(self.receive_body())

    def read_fields(self, fields: FieldTable) -> dict[str, Any]:
        """Return the valid fields of the JSON object in the body.

        Raises UnprocessableContent, or as read_json does.
        """
        return validate(self.read_json(), fields)

    @contextlib.contextmanager
    def changing(self, find: Callable[[Transaction, int], dict],
                 item_id: int) -> Iterator[Transaction]:
        """Yield a transaction in which an item may be changed, if it still matches If-Match.

        Raises what `find` raises if there is no such item, and PreconditionFailed if the client's
        preconditions are not met (see check_preconditions).
        """
        with self.server.database.transaction() as transaction:
            item = find(transaction, item_id)
            check_preconditions(self.context(), entity_tag(encode(item).encode()))
            yield transaction

    def answer_page(self, find: Callable[[Page], list[dict]]) -> Answer:
        """Answer with the page of a collection that the query asks for.

        `find` takes a Page and returns its rows in order of id, and one more if there are more:
        then a Link leads to the next page (RFC 8288).
        """
        page = parse_page(self.query_string)
        rows = find(page)
        if len(rows) <= page.limit:
            return Answer(rows)
        rows = rows[:page.limit]
        path = self.path.partition("?")[0]
        target = f"{path}?{next_query(self.query_string, rows[-1]['id'])}"
        return Answer(rows, headers=[("Link", f'<{target}>; rel="next"')])


class OwnRoutes(RouteHelpers):
    """Answers the routes that every process has, such as /health; Handler adds them to its own.

    (Only a process that owns data has /database.)
    """

    is_copying = False  # whether this request holds database.copying

    def health(self) -> Answer:
        """Answer a health check: 503 while the process drains, so that it gets no new work.

        A process that is replaced answers 200 all the same: its successor accepts on its port.
        """
        if self.server.draining and not self.server.is_replaced:
            body = {"status": "draining", "service": self.server.name}
            return Answer(body, 503, [RETRY_SOON, NO_STORE])
        return self.live()

    def live(self) -> Answer:
        """Answer that the process is alive, whatever the state of anything else."""
        return Answer({"status": "ok", "service": self.server.name}, headers=[NO_STORE])

    def answer_unread(self, beginning: bytes) -> bytes:
        """Return the message to send on a connection for which there is no room; log the request.

        The request is not read, but its first line tells whether it is a liveness check. That gets
        200: otherwise, Kubernetes would restart a process for being busy.
        """
        self.begin_request()
        if beginning.startswith(b"HEAD "):  # no body may follow (RFC 9110 section 9.3.2)
            self.command = "HEAD"
        if check := LIVE_CHECK.match(beginning):
            self.command, self.path, self.route = check[1].decode(), LIVE_PATH, LIVE_PATH
            answer = self.live()
        else:
            error = ServiceUnavailable("too many connections are open", [RETRY_SOON])
            answer = problem_answer(error, self.request_id)
        status, message = self.format(answer)
        self.note_end(status)
        return message

    def metrics(self) -> Answer:
        """Answer with the metrics of this process, for Prometheus."""
        self.check_observer()
        text = format_metrics(self.server.families())
        return Answer(text.encode(), headers=[("Content-Type", CONTENT_TYPE), NO_STORE])

    def traces(self) -> Answer:
        """Answer with the spans of this process that are kept, for Zipkin or Jaeger."""
        self.check_observer()
        return Answer(self.server.telemetry.format_spans(self.server.name), headers=[NO_STORE])

    def copy_database(self) -> Answer:
        """Answer with a copy of the database of this service, for the audit.

        There is one copy at a time, until it is sent. Raises ServiceUnavailable if the others take
        too long, and InsufficientStorage.
        """
        self.server.turns.give_up()  # it takes much longer than a turn
        database = self.server.database
        left = max(self.deadline - time.monotonic(), 0)
        self.is_copying = database.copying.acquire(timeout=left)
        if not self.is_copying:
            raise ServiceUnavailable("other copies are being sent", [RETRY_SOON])
        return Answer(database.copy(), headers=[("Content-Type", openapi.SQLITE), NO_STORE])

    def note_end(self, status: int) -> None:
        if self.is_copying:
            self.is_copying = False
            self.server.database.copying.release()
        super().note_end(status)

    def check_observer(self) -> None:
        """Leave this request out of log, metrics and traces: observers would see mostly themselves.

        The gateway also checks who asks, and raises Forbidden.
        """
        self.is_unrecorded = True


class Handler(OwnRoutes):
    """Finds the route of each request.

    `routes` maps each path, in which `{id}` stands for an id, to its methods: {"GET": function}.
    The function is called with the handler and the ids. HEAD, OPTIONS, 404 and 405 follow from the
    table. What is published about each route is in `operations` and `schemas` (see openapi.py).
    """

    routes: dict[str, Methods] = {}
    operations: dict[str, openapi.Operation] = {}
    schemas: dict[str, dict] = {}
    all_routes: dict[str, Methods]
    _table: list[tuple[re.Pattern, str, Methods]]

    def __init_subclass__(cls) -> None:
        """Compile the routes when a subclass is defined.

        A trailing slash names the same resource, as in the Express demo.
        """
        cls._table = []
        own: dict[str, Methods] = {
            "/health": {"GET": cls.health}, LIVE_PATH: {"GET": cls.live},
            "/openapi.json": {"GET": cls.describe_api},
            "/metrics": {"GET": cls.metrics}, "/traces": {"GET": cls.traces},
            DATABASE: {"GET": cls.copy_database}}
        cls.all_routes = {**cls.routes, **own}
        for path, methods in cls.all_routes.items():
            pattern = re.sub("{[a-z_]+}", ID_PATTERN, path.rstrip("/")) + "/?"
            cls._table.append((re.compile(pattern), path, methods))

    def find_answer(self) -> Answer:
        self.check_client()
        given = self.headers.get("x-request-timeout")
        self.deadline = find_deadline(given, self.server.settings.timeout)
        return self.dispatch()

    def check_client(self) -> None:
        """Raise Forbidden for a write that a web page of another origin made a browser send.

        The gateway checks more.
        """
        if self.command not in SAFE_METHODS and is_cross_origin(self.headers):
            raise Forbidden("a web page of another origin must not write here")

    def dispatch(self) -> Answer:
        """Call the route's function.

        Raises NotFound, MethodNotAllowed with Allow, or MethodNotImplemented.
        """
        if self.command not in KNOWN_METHODS:
            raise MethodNotImplemented(f"the method {excerpt(self.command)} is not supported")
        path, _, self.query_string = self.path.partition("?")
        if path == "*":  # OPTIONS asks about the server in general (RFC 9110 section 9.3.7)
            return Answer(status=204, headers=[("Allow", "OPTIONS, GET, HEAD, POST, PUT, DELETE")])
        methods, ids = self._find_route(path)
        function = methods.get("GET" if self.command == "HEAD" else self.command)
        if function:
            if self.command == "POST":
                self._check_target(methods.get("GET"), ids)
            return function(self, *ids)
        names = ["OPTIONS", *["GET, HEAD" if name == "GET" else name for name in methods]]
        allow = ("Allow", ", ".join(names))
        if self.command == "OPTIONS":
            return Answer(status=204, headers=[allow])
        raise MethodNotAllowed(
            f"{excerpt(path)} does not support {self.command}; it supports {allow[1]}", [allow])

    def _check_target(self, get: Callable[..., Answer] | None, ids: list[int]) -> None:
        """Check the preconditions of a POST: they are about what `get` returns for its target.

        changing() checks those of PUT and DELETE.
        """
        if "if-match" in self.headers or "if-none-match" in self.headers:
            seen = represent(get(self, *ids) if get else Answer(), RequestContext("", "GET"))
            check_preconditions(self.context(), dict(seen.headers).get("ETag", ""))

    def _find_route(self, path: str) -> tuple[Methods, list[int]]:
        for pattern, route, methods in self._table:
            if (match := pattern.fullmatch(path)) and self._has_route(route):
                ids = list(map(int, match.groups()))
                if not ids or max(ids) <= MAX_INTEGER:
                    self.route = route
                    return methods, ids
        raise NotFound(f"there is nothing at {excerpt(path)}; try {', '.join(self.known_paths())}")

    def _has_route(self, route: str) -> bool:
        """Return whether this process has a route: it has DATABASE only if it owns data."""
        return route != DATABASE or bool(self.server.schema)

    def known_paths(self) -> list[str]:
        """Return the paths to suggest to a client that asked for one that does not exist."""
        return [*self.routes, "/health"]

    def describe_api(self) -> Answer:
        """Answer with the OpenAPI document of this process."""
        routes = {path: methods for path, methods in self.all_routes.items()
                  if self._has_route(path)}
        return Answer(openapi.make_document(
            self.server.title, self.server.name, routes, self.operations, self.schemas))


def find_deadline(given: str | None, timeout: float) -> float:
    """Return the time (of time.monotonic) by which the work on a request must end.

    That is after `timeout` seconds, or earlier if X-Request-Timeout tells that the caller waits for
    fewer. Raises BadRequest, or ServiceUnavailable if the caller has given up already.
    """
    now = time.monotonic()
    if given is None:
        return now + timeout
    if not config.SECONDS.fullmatch(given):
        raise BadRequest(f"X-Request-Timeout: {excerpt(given)!r} is not a number of seconds")
    if float(given) == 0:
        raise ServiceUnavailable("the caller's deadline has already passed", [RETRY_SOON])
    return now + min(timeout, float(given) * (1 - ANSWER_SHARE))
