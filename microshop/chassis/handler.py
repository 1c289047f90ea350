"""One connection's requests: read each, find its route, answer it.

A subclass of Handler has a table of routes beside its methods. Such a method returns an Answer or
raises a ServiceError, and format_answer() alone turns either into bytes. What http.server does wrongly
or slowly is replaced here; the comments say why.

Law: routes write to no socket; they return. Nothing here knows what a route is about.
"""
import contextlib
import hashlib
import math
import random
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from email.utils import formatdate
from functools import lru_cache
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple
from urllib.parse import urlencode

from microshop.chassis import config, wire
from microshop.chassis.content import (
    MAX_INTEGER, FieldTable, Page, encode, parse_json, parse_page, parse_query, validate)
from microshop.chassis.database import Database
from microshop.chassis.errors import (
    BadRequest, ExpectationFailed, LengthRequired, MethodNotAllowed, NotFound, PreconditionFailed, RequestTimeout,
    ServiceError, ServiceUnavailable, UnsupportedMediaType)
from microshop.chassis.server import IDLE_TIME, Service, make_id

HEAD_TIME = 10.0     # seconds for a whole head, from its first byte
BODY_TIME = 10.0     # seconds for a whole body, and more for a large one:
BODY_RATE = 1024     # bytes of it that have a second each
SEND_TIME = 10.0     # seconds for a client to take a whole answer
ANSWER_SHARE = 0.1   # of the time that a caller gives: kept back for the answer's way
ID = "([1-9][0-9]{0,15})"
REQUEST_ID = re.compile("[A-Za-z0-9._-]{1,64}")
TRACEPARENT = re.compile("(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
CLIENT_GONE = 499    # nginx's number, in the log alone, for a client that did not wait for its answer

http_date = lru_cache(maxsize=2)(lambda second: formatdate(second, usegmt=True))


Methods = dict[str, Callable[..., "Answer"]]  # of a path, by name


def entity_tag(body: bytes) -> str:
    return f'"{hashlib.blake2b(body, digest_size=8).hexdigest()}"'


class Answer(NamedTuple):
    """What a handler returns: a JSON value, or bytes whose Content-Type is among the headers."""

    body: Any = b""
    status: int = 200
    headers: Sequence[tuple[str, str]] = ()



class Handler(BaseHTTPRequestHandler):
    """The requests of one connection, one after another.

    `routes` maps each path, where `{id}` stands for an id, to its methods: {"GET": function}. The
    function is called with the handler and the ids; HEAD, OPTIONS and 405 follow from the table.
    """

    server: Service
    headers: wire.Fields  # type: ignore[assignment]
    routes: dict[str, Methods] = {}
    _table: list[tuple[re.Pattern, Methods]]
    disable_nagle_algorithm = True  # else an answer may wait 40 ms for the client's ACK
    rbufsize = 0                    # wire.Stream buffers

    def __init_subclass__(cls) -> None:
        """Make a table of patterns of the routes; a slash at the end is the same resource, as in the seed."""
        routes = {**cls.routes, "/health": {"GET": cls.health}}
        cls._table = [(re.compile(re.sub("{[a-z_]+}", ID, path.rstrip("/")) + "/?"), methods)
                      for path, methods in routes.items()]

    # --- the life of a connection

    def setup(self) -> None:
        super().setup()
        self.stream = wire.Stream(self.connection)

    def finish(self) -> None:
        self.server.connections.pop(self.connection, None)
        super().finish()

    def handle_one_request(self) -> None:
        """Read a request and answer it; handle() calls this until close_connection is true."""
        self.server.connections[self.connection], self.close_connection = time.monotonic(), True
        self.body = b""  # the last one may have been large, and this may wait for long
        if not self.stream.await_message(IDLE_TIME):
            return
        self.server.connections[self.connection], started = math.inf, time.perf_counter()
        self.command, self.path, self.request_id = "-", "-", make_id()
        try:
            status, message = self._find_answer()
            self.stream.deadline = time.monotonic() + SEND_TIME
            self.stream.send(message)  # in one piece: two would meet Nagle's delay
        except OSError:
            self.close_connection, status = True, CLIENT_GONE
        self.server.log.request(self.request_id, self.command, self.path, status, time.perf_counter() - started)
        if self.close_connection and status != CLIENT_GONE:
            self.server.connections[self.connection] = time.monotonic()  # who only lingers may have to make room
            self.stream.linger()

    def _find_answer(self) -> tuple[int, bytes]:
        try:
            self._read_request()
        except ServiceError as error:
            return self.describe(error)  # close_connection stays true: where a next request begins is not known
        self.close_connection = not wire.keeps_alive(self.request_version, self.headers)
        try:
            self.check_client()
            self.deadline = self._find_deadline(time.monotonic())
            return self.format_answer(self.dispatch())
        except ServiceError as error:
            return self.describe(error)
        except Exception as error:
            if self.server.schema and (failure := self.server.database.explain(error)):
                self.server.log.event(f"{self.request_id} {self.server.database.path}: {error}")
                return self.describe(failure)
            self.server.log.event(f"{self.request_id} failed\n{traceback.format_exc()}")
            return self.describe(ServiceError("a fault in the service; its log says more"))

    def _read_request(self) -> None:
        """Read head and body. The body is read whatever the route, so it never passes for a request."""
        self.stream.deadline = time.monotonic() + HEAD_TIME
        head = ""
        try:
            head = self.stream.read_head()
            self.command, self.path, self.request_version, self.headers, length = wire.parse_request(head)
            if REQUEST_ID.fullmatch(self.headers.get("x-request-id", "")):
                self.request_id = self.headers["x-request-id"]
            if "expect" in self.headers:
                self._meet_expectation(length)
            self.body = b""
            if length:
                self.stream.deadline = time.monotonic() + BODY_TIME
                self.body = self.stream.read_body(length, wire.MAX_BODY, BODY_RATE)
        except TimeoutError:
            raise RequestTimeout("the request did not come whole in time") from None
        except EOFError:
            raise BadRequest("the request ended before it was whole") from None
        finally:
            if self.command == "-" and head:  # malformed: what the log gets of it is escaped
                self.path = ascii(head.partition("\r\n")[0][:200])[1:-1].replace(" ", r"\x20") or "-"

    def _meet_expectation(self, length: int | None) -> None:
        if self.request_version == "HTTP/1.1":  # RFC 9110 10.1.1
            if self.headers["expect"].lower() != "100-continue":
                raise ExpectationFailed("the only expectation met here is 100-continue")
            if length and length <= wire.MAX_BODY:
                self.stream.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _find_deadline(self, now: float) -> float:
        """Return until when (of time.monotonic) the request may be worked on. Raises BadRequest, ServiceUnavailable.

        Its caller may give it less time than the process does: nobody should work for one that has gone.
        """
        given = self.headers.get("x-request-timeout")
        if given is None:
            return now + self.server.settings.timeout
        if not config.SECONDS.fullmatch(given):
            raise BadRequest(f"X-Request-Timeout: {given!r} is no number of seconds")
        if float(given) == 0:
            raise ServiceUnavailable("the time that the caller gave for this is spent", [("Retry-After", "1")])
        return now + min(self.server.settings.timeout, float(given) * (1 - ANSWER_SHARE))

    def describe(self, error: ServiceError) -> tuple[int, bytes]:
        """Return an error's status, and the bytes of the problem that tells of it."""
        headers = [("Content-Type", "application/problem+json"), *error.headers]
        return self.format_answer(Answer({**error.problem(), "requestId": self.request_id}, error.status, headers))

    def format_answer(self, answer: Answer) -> tuple[int, bytes]:
        """Return an answer's status and its bytes. Raises ValueError where it cannot be written."""
        if not isinstance(answer.body, bytes):
            answer = self._represent(answer)
        body, status, headers = answer.body, int(answer.status), list(answer.headers)
        names = [name.lower() for name, _ in headers]
        if status not in (204, 304) and "content-length" not in names and (body or self.command != "HEAD"):
            headers.append(("Content-Length", str(len(body))))
        if "date" not in names:
            headers.append(("Date", http_date(int(time.time()))))
        headers.append(("X-Request-Id", self.request_id))
        self.close_connection = self.close_connection or self.server.draining
        if self.close_connection:
            headers.append(("Connection", "close"))
        else:
            headers.append(("Keep-Alive", f"timeout={IDLE_TIME:.0f}"))
            if self.request_version == "HTTP/1.0":
                headers.append(("Connection", "keep-alive"))
        phrase = self.responses.get(status, ("",))[0]
        head = wire.format_head(f"HTTP/1.1 {status} {phrase}", headers)
        return status, head if self.command == "HEAD" else head + body

    def _represent(self, answer: Answer) -> Answer:
        """Turn a JSON value into bytes; into none if the client has the very same (RFC 9110 section 13.1.2)."""
        body, headers = encode(answer.body).encode(), list(answer.headers)
        if answer.status == 200 and self.command in ("GET", "HEAD"):
            tag = entity_tag(body)  # strong for an item, since If-Match takes no other
            headers.append(("ETag", tag if isinstance(answer.body, dict) else f"W/{tag}"))
            known = self.headers.get("if-none-match", "")
            if tag in known or known == "*":
                return Answer(b"", 304, headers)
        if all(name != "Content-Type" for name, _ in headers):
            headers.append(("Content-Type", "application/json; charset=utf-8"))
        return Answer(body, answer.status, headers)

    # --- from a request to a route

    def dispatch(self) -> Answer:
        """Call the route's function. Raises NotFound, or MethodNotAllowed with Allow."""
        path, _, self.query_string = self.path.partition("?")
        methods, ids = self._find_route(path)
        if function := methods.get("GET" if self.command == "HEAD" else self.command):
            return function(self, *ids)
        allow = ("Allow", ", ".join(["OPTIONS", *["GET, HEAD" if name == "GET" else name for name in methods]]))
        if self.command == "OPTIONS":
            return Answer(status=204, headers=[allow])
        raise MethodNotAllowed(f"{self.command} is not among the methods of {path}", [allow])

    def check_client(self) -> None:
        """Raise a ServiceError where the client may not ask this now. Everybody may, unless a subclass minds."""

    def _find_route(self, path: str) -> tuple[Methods, list[int]]:
        for pattern, methods in self._table:
            if match := pattern.fullmatch(path):
                ids = [int(text) for text in match.groups()]
                if max(ids, default=0) <= MAX_INTEGER:
                    return methods, ids
        raise NotFound(f"there is nothing at {path}")

    def health(self) -> Answer:
        state = "draining" if self.server.draining else "ok"
        answer = Answer({"status": state, "service": self.server.name})
        return answer if state == "ok" else answer._replace(status=503, headers=[("Retry-After", "1")])

    # --- what routes ask of a request

    def read_json(self) -> Any:
        """Return the JSON value that came. Raises LengthRequired, UnsupportedMediaType, BadRequest."""
        if "content-length" not in self.headers and "transfer-encoding" not in self.headers:
            raise LengthRequired("a body is needed here")
        if not re.fullmatch(r'application/json(\s*;\s*charset="?utf-8"?)?', self.headers.get("content-type", ""), re.I):
            raise UnsupportedMediaType("the body must have Content-Type: application/json")
        if "content-encoding" in self.headers:
            raise UnsupportedMediaType("the body must come without Content-Encoding")
        return parse_json(self.body)

    def read_fields(self, fields: FieldTable) -> dict[str, Any]:
        """Return the fields of the JSON object that came. Raises UnprocessableContent, or as read_json does."""
        return validate(self.read_json(), fields)

    @contextlib.contextmanager
    def changing(self, find: Callable[[Database, int], dict], item_id: int) -> Iterator[None]:
        """Let an item be changed within, in a transaction, so that it stays as it was found.

        Raises what `find` does where it is not there, and PreconditionFailed where If-Match names only other
        states of it (RFC 9110 section 13.1.1).
        """
        wanted = [tag.strip() for tag in self.headers.get("if-match", "*").split(",")]
        with self.server.database.transaction():
            item = find(self.server.database, item_id)
            if wanted != ["*"] and entity_tag(encode(item).encode()) not in wanted:
                raise PreconditionFailed("it is not as it was when you got it; get it again, then decide")
            yield

    def answer_page(self, find: Callable[[Page], list[dict]]) -> Answer:
        """Answer with the part of a collection that the query asks for, and a Link to the next (RFC 8288).

        `find` takes a Page and returns its rows in order of id, with one more if there is any.
        """
        query = parse_query(self.query_string)
        page = parse_page(query)
        rows = find(page)
        if len(rows) <= page.limit:
            return Answer(rows)
        rows = rows[:page.limit]
        target = f"{self.path.partition('?')[0]}?{urlencode({**query, 'after': rows[-1]['id']}, safe=',')}"
        return Answer(rows, headers=[("Link", f'<{target}>; rel="next"')])

    def trace(self) -> dict[str, str]:
        """Return the fields that let one request be followed through every service it reaches.

        A trace that came is continued, https://www.w3.org/TR/trace-context/; else one begins.
        """
        if not TRACEPARENT.fullmatch(self.headers.get("traceparent", "")):
            self.headers["traceparent"] = f"00-{random.getrandbits(128):032x}-{random.getrandbits(64):016x}-01"
            self.headers.pop("tracestate", None)
        fields = {name: self.headers[name] for name in ("traceparent", "tracestate") if name in self.headers}
        return {**fields, "x-request-id": self.request_id}
