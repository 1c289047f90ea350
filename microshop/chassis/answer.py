"""Answers: what a handler returns, and how it becomes the bytes of an HTTP response.

Law: nothing here touches a socket or remembers anything. The bytes depend only on the arguments and
on the current time, which goes into the Date header.
"""
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import formatdate
from functools import lru_cache
from typing import Any

from microshop.chassis import wire
from microshop.chassis.content import encode
from microshop.chassis.errors import PHRASES, PreconditionFailed, ServiceError

IDLE_TIME = 60.0  # seconds to wait for the next request; the Keep-Alive header announces it
# Lines of a head. Keep-Alive is about one hop, so Connection must name it (RFC 9110 7.6.1).
KEPT = f"Connection: keep-alive\r\nKeep-Alive: timeout={IDLE_TIME:.0f}\r\n"
CLOSED = "Connection: close\r\n"
NO_STORE = ("Cache-Control", "no-store")  # a header, for what may be false a moment later
# Methods and statuses of the answers that hold what a GET would return; these have an ETag.
TAGGED = {("GET", 200), ("HEAD", 200), ("PUT", 200), ("POST", 201)}


@dataclass(slots=True)
class Answer:
    """What a handler returns: a JSON value, or bytes whose Content-Type is among the headers."""

    body: Any = b""
    status: int = 200
    headers: Sequence[tuple[str, str]] = ()


@dataclass(slots=True)
class RequestContext:
    """What format_answer() must know about the request and its connection."""

    request_id: str
    method: str = "-"
    if_match: str | None = None
    if_none_match: str = ""
    keeps_alive: bool = False  # whether the connection stays open after this answer
    server_timing: str = ""    # who has worked on it for how long: the header's value


def entity_tag(body: bytes) -> str:
    """Return the strong ETag of a body: a fingerprint of these bytes (RFC 9110 section 8.8.3)."""
    return f'"{hashlib.blake2b(body, digest_size=8).hexdigest()}"'


def problem_answer(error: ServiceError, request_id: str) -> Answer:
    """Return the answer to a request that failed: a problem document (RFC 9457)."""
    headers = [("Content-Type", "application/problem+json"), *error.headers]
    return Answer({**error.problem(), "requestId": request_id}, error.status, headers)


def represent(answer: Answer, context: RequestContext) -> Answer:
    """Turn a JSON body into bytes; into a 304 if the client of a GET has them already.

    Raises PreconditionFailed if the client of a GET wants another state of the resource.
    """
    if isinstance(answer.body, bytes):
        return answer
    body = encode(answer.body).encode()
    headers = list(answer.headers)
    if (context.method, answer.status) in TAGGED:
        is_item = isinstance(answer.body, dict)  # its tag is strong, since If-Match takes no other
        tag = entity_tag(body) if is_item else f"W/{entity_tag(body)}"
        headers.append(("ETag", tag))
        if context.method in ("GET", "HEAD") and check_preconditions(context, tag):
            return Answer(b"", 304, headers)
    if "Content-Type" not in dict(headers):
        headers.append(("Content-Type", "application/json; charset=utf-8"))
    return Answer(body, answer.status, headers)


def check_preconditions(context: RequestContext, tag: str) -> bool:
    """Compare If-Match, then If-None-Match, with the ETag of the target (RFC 9110 section 13.2.2).

    `tag` is empty if the target has no representation. Return whether the client has this
    representation already: then a GET gets 304. Raises PreconditionFailed if the request must not
    be carried out.
    """
    if context.if_match is not None:
        wanted = [known.strip(" \t") for known in context.if_match.split(",")]
        is_strong = tag.startswith('"')  # If-Match never matches a weak tag
        is_met = bool(tag) if wanted == ["*"] else is_strong and tag in wanted
        if not is_met:
            raise PreconditionFailed("the resource does not match If-Match: it may have changed "
                                     "since you fetched it; fetch it again and retry")
    # If-None-Match is a list of tags, some with W/ before them: searching its text is enough.
    known = context.if_none_match
    has_it = bool(tag) and (known == "*" or tag.removeprefix("W/") in known)
    if has_it and context.method not in ("GET", "HEAD"):
        raise PreconditionFailed("the resource exists, in a state that If-None-Match excludes")
    return has_it


def format_answer(answer: Answer, context: RequestContext) -> bytes:
    """Return the bytes of the HTTP response for an answer that represent() has prepared.

    Raises ValueError if a header would break the message, such as one with a line break in it.
    """
    status, body = int(answer.status), answer.body
    names = [name.lower() for name, _ in answer.headers]
    lines = f"X-Request-Id: {context.request_id}\r\n{KEPT if context.keeps_alive else CLOSED}"
    if context.server_timing:
        lines += f"Server-Timing: {context.server_timing}\r\n"
    is_head = context.method == "HEAD"
    # A HEAD answer without a body states no length: that of the GET is not known here.
    states_length = status not in (204, 304) and (body or not is_head)
    if states_length and "content-length" not in names:
        lines += f"Content-Length: {len(body)}\r\n"
    if "date" not in names:
        lines += f"Date: {format_date(int(time.time()))}\r\n"
    if "cache-control" not in names:  # no cache may choose a lifetime: the ETag is cheap to check
        lines += "Cache-Control: no-cache\r\n"
    start_line = f"HTTP/1.1 {status} {PHRASES.get(status, '')}"
    head = wire.format_head(start_line, answer.headers, lines)
    return head if is_head else head + body


@lru_cache(maxsize=2)
def format_date(second: int) -> str:
    """Return a Unix time as an HTTP date (RFC 9110 section 5.6.7)."""
    return formatdate(second, usegmt=True)
