"""Answers: what a handler returns, and how it becomes the bytes of an HTTP response.

Law: nothing here touches a socket or remembers anything. Bytes depend on the arguments alone,
and on the time of day, which goes into Date.
"""
import hashlib
import time
from collections.abc import Sequence
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Any, NamedTuple

from microshop.chassis import wire
from microshop.chassis.content import encode
from microshop.chassis.errors import ServiceError

IDLE_TIME = 60.0  # seconds that a connection may wait for its next request; Keep-Alive says so
PHRASES = {status.value: status.phrase for status in HTTPStatus}


class Answer(NamedTuple):
    """What a handler returns: a JSON value, or bytes whose Content-Type is among the headers."""

    body: Any = b""
    status: int = 200
    headers: Sequence[tuple[str, str]] = ()


class Asked(NamedTuple):
    """What an answer's bytes depend on besides the answer: the request and its connection."""

    request_id: str
    method: str = "-"
    version: str = "HTTP/1.1"
    if_none_match: str = ""
    keeps_alive: bool = False  # whether the connection stays open after this answer


def entity_tag(body: bytes) -> str:
    """Return the strong ETag of a body: a short name for exactly these bytes (RFC 9110 8.8.3)."""
    return f'"{hashlib.blake2b(body, digest_size=8).hexdigest()}"'


def describe(error: ServiceError, request_id: str) -> Answer:
    """Return the answer to a request that failed: a problem document (RFC 9457)."""
    headers = [("Content-Type", "application/problem+json"), *error.headers]
    return Answer({**error.problem(), "requestId": request_id}, error.status, headers)


def represent(answer: Answer, asked: Asked) -> Answer:
    """Turn a JSON body into bytes, or into 304 if the client has them already (RFC 9110 13.1.2)."""
    if isinstance(answer.body, bytes):
        return answer
    body = encode(answer.body).encode()
    headers = list(answer.headers)
    if answer.status == 200 and asked.method in ("GET", "HEAD"):
        tag = entity_tag(body)
        is_item = isinstance(answer.body, dict)  # its tag is strong, since If-Match takes no other
        headers.append(("ETag", tag if is_item else f"W/{tag}"))
        if tag in asked.if_none_match or asked.if_none_match == "*":
            return Answer(b"", 304, headers)
    if all(name != "Content-Type" for name, _ in headers):
        headers.append(("Content-Type", "application/json; charset=utf-8"))
    return Answer(body, answer.status, headers)


def format_answer(answer: Answer, asked: Asked) -> bytes:
    """Return the bytes of an answer whose body is bytes.

    Raises ValueError if a header would break the message, such as one with a line break in it.
    """
    status, body, headers = int(answer.status), answer.body, list(answer.headers)
    names = [name.lower() for name, _ in headers]
    is_head = asked.method == "HEAD"
    may_have_body = status not in (204, 304) and (body or not is_head)
    if may_have_body and "content-length" not in names:
        headers.append(("Content-Length", str(len(body))))
    if "date" not in names:
        headers.append(("Date", format_date(int(time.time()))))
    headers.append(("X-Request-Id", asked.request_id))
    if not asked.keeps_alive:
        headers.append(("Connection", "close"))
    else:
        headers.append(("Keep-Alive", f"timeout={IDLE_TIME:.0f}"))
        if asked.version == "HTTP/1.0":
            headers.append(("Connection", "keep-alive"))
    head = wire.format_head(f"HTTP/1.1 {status} {PHRASES.get(status, '')}", headers)
    return head if is_head else head + body


@lru_cache(maxsize=2)
def format_date(second: int) -> str:
    """Return a Unix time as an HTTP date (RFC 9110 5.6.7)."""
    return formatdate(second, usegmt=True)
