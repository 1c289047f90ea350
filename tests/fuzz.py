"""Fuzzing: requests made from a grammar and damaged with knowledge of it.

    python -m tests.fuzz [--seconds 60] [--seed N]

In the first half of the time, wire.py reads them in this process. Whatever the damage:
- it may raise only the errors that it documents, and the same ones wherever the bytes are cut;
- an accepted message must end where its framing says, must mean the same when it is written in the
  plainest way, and must be what http.server sees in it.

In the second half, a running gateway gets them. It must answer exactly the messages that wire.py
has read, and must work afterwards as if nothing had happened.

The first input that breaks a rule ends its half and is printed, to be added to CASES; the exit
status is 1 then. The same seed gives the same inputs; how many are tried depends on the time.
"""
import argparse
import contextlib
import io
import itertools
import json
import math
import random
import re
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

from microshop.chassis import wire
from microshop.chassis.errors import ServiceError
from microshop.chassis.handler import REQUEST_ID
from microshop.gateway import Gateway
from tests.chassis.test_wire import loose_end
from tests.helpers import PATIENCE, Wire, ask, await_message, running, running_shop

Dice = random.Random

CASES = {  # inputs that once showed a fault, and the right outcome of each message in them
    "a lone LF after a body that ends in CR": (  # they were taken for a CRLF
        b"POST / HTTP/1.1\r\nHost: shop\r\nContent-Length: 3\r\n\r\nab\r\n",
        ["accepted", "refused"]),
    "a CR in the head of an unsupported version": (
        b"GET / HTTP/2.0\r\nHost: shop\r\r\n\r\n", ["refused"]),
    "a NUL in a trailer that is too large": (
        b"POST / HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\0: " + b"x" * 32768 + b"\r\n\r\n", ["refused"]),
    "two empty fields": (b"GET / HTTP/1.1\r\nHost: shop\r\nX:\r\nX:\r\n\r\n", ["accepted"]),
    "the greatest number of fields": (
        b"GET / HTTP/1.1\r\nHost: shop" + b"\r\nX:" * 99 + b"\r\n\r\n", ["accepted"]),
    "a target of slashes": (b"GET //// HTTP/1.1\r\nHost: shop\r\n\r\n", ["accepted"]),
}


class Fault(Exception):
    """Something that must never happen, described in words."""

    __repr__ = Exception.__str__


# --- the grammar

METHODS = [b"GET", b"GET", b"HEAD", b"POST", b"POST", b"POST", b"PUT", b"DELETE", b"OPTIONS",
           b"M-SEARCH"]
ORIGINS = [b"", b"", b"", b"http://shop:8000", b"HTTP://[::1]"]
TARGETS = [b"/", b"/health", b"/users", b"/users/1", b"/products?limit=2&after=101",
           b"/products/101", b"/orders", b"/orders/201", b"/orders/201/cancel",
           b"/orders?expand=user,product", b"/%75sers/%C3%BC?q=%20", b"//users"]
FIELDS = [b"Accept: */*", b"Cookie: a=b; c=d", b"Cookie: e=f", b"Connection: close",
          b"Connection: Foo, keep-alive", b"Idempotency-Key: key", b"If-None-Match: *",
          b'If-Match: "x"', b"Expect: 100-continue", b"Empty:", b"Name:\tRen\xe9 \t",
          b"Via: 1.0 a, 1.1 b"]
VERSIONS = [b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0"]
SMUGGLED = b"GET /orders HTTP/1.1\r\nHost: shop\r\nX-Request-Id: smuggled\r\n\r\n"
VISIBLE = bytes([0x09, *range(0x20, 0x7f), *range(0x80, 0x100)])  # allowed in a head besides CRLF
BODIES = [b"", b"{}", b'{"name":"Ada"}', b'{"name":"Ada","stock":5}',
          b'{"userId":2,"productId":102}', SMUGGLED, b"\r\n" + SMUGGLED,
          b"0\r\n\r\n" + SMUGGLED, b"\0\r\xff\n\r"]
JSON = b"Content-Type: application/json"


def write_request(dice: Dice) -> bytes:
    """Return a valid request."""
    method, target = dice.choice(METHODS), dice.choice(ORIGINS) + dice.choice(TARGETS)
    version, body = dice.choice(VERSIONS), dice.choice(BODIES)
    request_id = b"X-Request-Id: fuzz-%d" % dice.getrandbits(32)
    fields = [b"Host: shop", request_id, *dice.sample(FIELDS, dice.randint(0, 4))]
    if method not in (b"POST", b"PUT") and dice.random() < 0.7:
        body = b""
    elif version == b"HTTP/1.1" and dice.random() < 0.5:
        body = write_chunks(body, dice)
        fields += [b"Transfer-Encoding: chunked", JSON]
    else:
        fields += [b"Content-Length: %d" % len(body), JSON]
    dice.shuffle(fields)
    return b"\r\n".join([b" ".join([method, target, version]), *fields, b"", body])


def write_chunks(body: bytes, dice: Dice) -> bytes:
    """Return a body in chunks, with extensions and trailers."""
    zeros = dice.choice([b"", b"0", b"00"])
    extension = dice.choice([b"", b"", b";a", b' ;a="\xe9;"'])
    trailers = dice.choice([b"", b"", b"Digest: x\r\n", b"Content-Length: 5\r\nEmpty:\r\n"])
    parts = [*cut(body, dice.choices(range(len(body) + 1), k=2)), b""]
    return b"".join(b"%b%x%b\r\n%b\r\n" % (zeros, len(part), extension, part or trailers)
                    for part in parts)


def cut(data: bytes, points: list[int]) -> list[bytes]:
    """Return the pieces of data between these points; no piece is empty."""
    return [data[start:end] for start, end in itertools.pairwise(sorted({0, *points, len(data)}))]


# --- the damage

Operator = Callable[[bytes, Dice], bytes]


def sub(pattern: bytes, *changes: bytes | Callable[[bytes], bytes]) -> Operator:
    """Return an operator that makes one of the changes at one of the places that match."""
    def operate(data: bytes, dice: Dice) -> bytes:
        places = [*re.finditer(pattern, data[:2000])]
        if not places:
            return data
        place, change = dice.choice(places), dice.choice(changes)
        new = place.expand(change) if isinstance(change, bytes) else change(place[0])
        return data[:place.start()] + new + data[place.end():]
    return operate


def enlarge(data: bytes, dice: Dice) -> bytes:
    """Bring a part of a request to about its limit: the line, the head, its fields, or the body."""
    head, _, body = data.partition(b"\r\n\r\n")
    line, _, fields = head.partition(b"\r\n")
    rest, excess = data[len(line):], dice.choice([-1, 0, 1, 100])
    unframed = re.sub(rb"(?i)\r\n(content-length|transfer-encoding):[^\r\n]*", b"", head)
    body_size = wire.MAX_BODY + excess

    def pad(size: int) -> bytes:
        return b"x" * (size + excess)

    def extend_chunk_line(chunk: re.Match) -> bytes:
        return b"\r\n%b;%b\r\n" % (chunk[1], pad(wire.MAX_CHUNK_LINE - len(chunk[1]) - 3))

    return dice.choice([
        lambda: line.replace(b" HTTP", pad(wire.MAX_LINE - len(line)) + b" HTTP", 1) + rest,
        lambda: line + b"\r\nX:" + pad(wire.MAX_HEAD - len(line + fields) - 8) + rest,
        lambda: line + b"\r\nX:" * (wire.MAX_FIELDS + excess - fields.count(b"\r\n") - 1) + rest,
        lambda: unframed + b"\r\nContent-Length: %d\r\n\r\n" % body_size + body.ljust(body_size),
        lambda: (unframed + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
                 + write_chunks(body.ljust(body_size), dice)),
        lambda: re.sub(rb"\r\n([0-9A-Fa-f]+)\r\n", extend_chunk_line, data, count=1)])()


def flip(data: bytes, dice: Dice) -> bytes:
    """Flip one bit."""
    point = dice.randrange(len(data) + 1)
    flipped = bytes(byte ^ 1 << dice.randrange(8) for byte in data[point:point + 1])
    return data[:point] + flipped + data[point + 1:]


def splice(data: bytes, dice: Dice) -> bytes:
    """Continue one request with the end of another."""
    other = write_request(dice)
    return data[:dice.randint(0, len(data))] + other[dice.randint(0, len(other)):]


def truncate(data: bytes, dice: Dice) -> bytes:
    return data[:dice.randint(0, len(data))]


FIELD, LENGTH = rb"(?<=\r\n)[^\r\n:]+:[^\r\n]*\r\n", rb"(?i)(content-length:) ?([0-9]+)"
OPERATORS: dict[str, Operator] = {
    "line": sub(
        rb"^(\S+) (\S+) HTTP/(1..)", rb"\1  \2 HTTP/\3", rb"\1\t\2 HTTP/\3", rb"\1 \2",
        rb" \1 \2 HTTP/\3", rb"\1 \2 HTTP/1.0", rb"\1 \2 HTTP/1.10", rb"\1 \2 HTTP/2.0",
        rb"\1 \2 HTTP/1.2", rb"\1 \2 http/\3", rb"\1( \2 HTTP/\3", rb"\1 * HTTP/\3",
        rb"OPTIONS * HTTP/\3", rb"\1 /\2 HTTP/\3",
        rb"\1 \2# HTTP/\3", rb"\1 \2%00 HTTP/\3", b"\\1 \\2\xa0 HTTP/\\3", rb"\1 http:// HTTP/\3",
        rb"\1 http://me@shop\2 HTTP/\3", rb"\1 file://\2 HTTP/\3", rb"\1 \2 HTTP/\3 \2"),
    "end": sub(rb"\r\n", b"\n", b"\r", b"\n\r", b"\r\r\n", b"\n\n", b"\r\n\r\n"),
    "insert": sub(rb"^|\r\n|\r|(?=:)|: ?| |$", *(b"\\g<0>" + byte for byte in (
        b"\r", b"\n", b"\0", b" ", b"\t", b"\x7f", b"\x85", b"\x0b"))),
    "duplicate": sub(FIELD, rb"\g<0>\g<0>"),
    "drop": sub(FIELD, b""),
    "swap": sub(rb"(?<=\r\n)([^\r\n]+\r\n)([^\r\n]+\r\n)", rb"\2\1"),
    "case": sub(FIELD, bytes.swapcase, bytes.upper, bytes.lower),
    "rename": sub(
        rb"(?<=\r\n)[^\r\n:]+(?=:)", b"Content-Length", b"Transfer-Encoding", b"Content_Length",
        b"Host", b"", b"Connection", b"Cookie", b"X-Request-Id", b"Idempotency-Key", b"Expect",
        b"N(me", b"R\xe9n"),
    "space": sub(rb": ?", b" :", b"\t:", b":\t ", b":", b"\xa0:", b"", b"::", b":\x0b"),
    "fold": sub(
        rb"\r\n(?=[^\r\n])", rb"\g<0> chunked\r\n", rb"\g<0>\tx\r\n", rb"\g<0> \r\n",
        rb"\g<0> Host: shop\r\n"),
    "length": sub(
        LENGTH, rb"\1 +\2", rb"\1 -\2", rb"\1 0\2", rb"\1 \2 ", rb"\1\t\2", rb"\1 0x\2",
        rb"\1 \2.0", rb"\1 \2,", rb"\1", rb"\1 0_\2", rb"\1 \2 0", b"\\1 \xb2\\2", rb"\1 1\2",
        rb"\1 \g<2>99999999", rb"\1 0", rb"\1 3", b"\\1 " + b"0" * 5000 + b"\\2"),
    "lengths": sub(
        LENGTH, rb"\1 \2\r\n\1 \2", rb"\1 0\r\n\1 \2", rb"\1 \2\r\n\1 0", rb"\1 \2, \2",
        rb"\1 \2\r\n\1"),
    "coding": sub(rb"(?i)(transfer-encoding:) chunked", *(b"\\1 " + coding for coding in (
        b"Chunked", b"chunked, chunked", b"gzip, chunked", b"chunked, gzip", b"xchunked",
        b"chunked;a", b'"chunked"', b"", b"identity", b",chunked", b"\x0bchunked",
        b"chunked\r\nTransfer-Encoding:", b"chunked\r\n , identity"))),
    "both": sub(
        rb"(?i)(content-length|transfer-encoding):[^\r\n]*\r\n",
        rb"\g<0>Transfer-Encoding: chunked\r\n", rb"\g<0>Content-Length: 5\r\n",
        rb"Content-Length: 0\r\n\g<0>"),
    "chunks": sub(
        rb"(?<=\r\n)([0-9A-Fa-f]+)(?=[;\r])", rb"+\1", rb"-\1", rb"0x\1", rb"1\1", rb"\g<1>1",
        rb"\1 ", rb" \1", rb"\1_0", rb"\1g", rb"\1,\1", b"0" * 16 + b"\\1", b"f" * 15 + b"\\1",
        rb"\1;\n", b"", b"0", b"4"),
    "enlarge": enlarge, "flip": flip, "splice": splice, "truncate": truncate,
}
# Not every request has a place for these, so they are tried more often.
FAVOURED = [*OPERATORS, *("length", "lengths", "coding", "chunks") * 2]


class Input(NamedTuple):
    """Bytes to send, the operators that damaged them, and their outcomes if those are known."""

    data: bytes
    damage: list[str]
    expected: list[str]


def write_inputs(dice: Dice) -> Iterator[Input]:
    """Yield the cases, then damaged and undamaged requests without end."""
    for data, outcomes in CASES.values():
        yield Input(data, [], outcomes)
    while True:
        data, used, count = b"", [], dice.choice([1, 1, 2, 3])
        for _ in range(count):
            request = write_request(dice)
            for name in dice.choices(FAVOURED, k=dice.choice([0, 1, 1, 2, 3])):
                before, request = request, OPERATORS[name](request, dice)
                if before != request:
                    used.append(name)
            data += request
        yield Input(data, used, [] if used else ["accepted"] * count)


def write_literal(data: bytes) -> str:
    """Return bytes as Python code, with long runs of the same byte as a product."""
    runs = re.finditer(rb"(?s)(.)\1{63,}|(?:(?!(.)\2{63}).)+", data)
    literals = [f"{run[1]!r} * {len(run[0])}" if run[1] else repr(run[0]) for run in runs]
    return " + ".join(literals) or "b''"


# --- in this process

class Feed:
    """A connection for a Stream, whose bytes come in given pieces."""

    def __init__(self, pieces: list[bytes]):
        self.pieces = pieces[::-1]

    def setsockopt(self, *_: Any) -> None:
        pass

    def recv(self, size: int) -> bytes:
        piece = self.pieces.pop() if self.pieces else b""
        if len(piece) > size:
            self.pieces.append(piece[size:])
        return piece[:size]


class Seen(NamedTuple):
    """The outcome of a message on a connection.

    `outcome` is "accepted", "short" or "refused 400"; it is "refused" if the status depends on
    where the bytes are cut, because more than one thing is wrong.
    """

    start: int
    end: int                      # 0 unless it is accepted
    outcome: str
    request: wire.Request | None  # None if its head is not accepted
    body: bytes


def read(data: bytes, points: list[int]) -> list[Seen]:
    """Read messages as a server does, from bytes that are cut at these points. Raises Fault."""
    seen: list[Seen] = []
    feed = Feed(cut(data, points))
    stream = wire.Stream(feed)

    def position() -> int:
        return len(data) - sum(map(len, feed.pieces)) - len(stream._buffer) + stream._start

    while (not seen or seen[-1].outcome == "accepted") and await_message(stream):
        start, end, request, body = position(), 0, None, b""
        try:
            request = wire.parse_request(stream.read_head())
            if request.length:
                body = stream.read_body(request.length, wire.MAX_BODY)
            outcome, end = "accepted", position()
        except ServiceError as error:
            is_certain = error.status in (413, 501) or not (request or find_stray(data[start:]))
            outcome = f"refused {error.status:d}" if is_certain else "refused"
        except (EOFError, TimeoutError):
            outcome = "short"
        except Exception as error:
            raise Fault(f"it raises {error!r}") from error
        seen.append(Seen(start, end, outcome, request, body))
    return seen


def find_stray(data: bytes) -> bytes:
    """Return the bytes that no head may contain, from the head that `data` begins with."""
    head, end, _ = data.partition(b"\r\n\r\n")
    if not end:
        head = head.removesuffix(b"\r")  # an LF may follow
    return head.replace(b"\r\n", b"").translate(None, VISIBLE)


def check(data: bytes, dice: Dice) -> list[Seen]:
    """Read an input in this process, and return its messages. Raises Fault."""
    seen = read(data, [])
    joints = [match.start() + 1 for match in re.finditer(b"\r\n", data[:9000])]
    points = dice.choices([*joints, dice.randint(0, len(data))], k=3)
    if len(data) < 500 and dice.random() < 0.2:
        points = [*range(len(data))]
    if read(data, points) != seen:
        raise Fault(f"it depends on where it is cut: {points}")
    for message in seen:
        if message.outcome == "accepted":
            judge(message, data[message.start:])
        elif message.outcome == "short" and not message.request:
            if find_stray(data[message.start:]):
                raise Fault("more of it is awaited, although it can only be refused")
    return seen


RULES: dict[str, Callable[[Seen, bytes], Any]] = {  # broken if true, for an accepted message's head
    "bytes in its head that no head may contain": lambda seen, head: find_stray(head),
    "a first line over the limit": lambda seen, head: head.index(b"\r\n") > wire.MAX_LINE,
    "a head over the limit": lambda seen, head: len(head) > wire.MAX_HEAD,
    "fields over the limit": lambda seen, head: head.count(b"\r\n") - 2 > wire.MAX_FIELDS,
    "a body over the limit": lambda seen, head: len(seen.body) > wire.MAX_BODY,
    "chunks in HTTP/1.0": lambda seen, head: (
        seen.request.version == "HTTP/1.0" and seen.request.length == wire.CHUNKED),
    "no Host, or two": lambda seen, head: (
        head.lower().count(b"\r\nhost:") not in (1, seen.request.version[-1] == "1")),
}


def merge_slashes(request: wire.Request, head: bytes) -> wire.Request:
    if b" //" in head.partition(b"\r")[0]:
        return request._replace(target="/" + request.target.lstrip("/"))
    return request


def refuse_hundred_fields(request: wire.Request, head: bytes) -> wire.Request | None:
    return request if head.count(b"\r\n") - 2 < 100 else None


def keep_version(request: wire.Request, head: bytes) -> wire.Request:
    return request._replace(version=head.partition(b"\r")[0][-8:].decode())


KNOWN_DIFFERENCES: dict[str, Callable[[wire.Request, bytes], wire.Request | None]] = {
    # what http.server sees instead of a request
    "gh-87389: slashes at the start of a target become one, against open redirects": merge_slashes,
    "HTTP/1.2 is kept as the version, and not replaced by HTTP/1.1": keep_version,
    "the empty line counts as one of the 100 fields that are allowed": refuse_hundred_fields,
}


def judge(seen: Seen, data: bytes) -> None:
    """Check that the message at the start of `data` was accepted rightly. Raises Fault."""
    head, end = data[:data.index(b"\r\n\r\n") + 4], 0
    if broken := [name for name, is_broken in RULES.items() if is_broken(seen, head)]:
        raise Fault(f"it is accepted with {' and '.join(broken)}")
    with contextlib.suppress(ValueError):
        end = loose_end(data)
    if seen.end - seen.start != end:
        raise Fault(f"it ends after {seen.end - seen.start} bytes here, and elsewhere after {end}")
    plain = write_plainly(seen)
    again = read(plain, [])
    if [message.outcome for message in again] != ["accepted"] or write_plainly(again[0]) != plain:
        raise Fault(f"it is another when it is written plainly: {again}")
    expected: wire.Request | None = seen.request
    for differ in KNOWN_DIFFERENCES.values():
        expected = expected and differ(expected, head)
    theirs = LibraryParser(head).view()
    if (expected and expected[:4]) != theirs:
        raise Fault(f"http.server sees {theirs}, where {expected} was expected")


def write_plainly(seen: Seen) -> bytes:
    """Return an accepted request written in the plainest way."""
    method, target, version, fields, length = seen.request
    plain = {name: value.rstrip() for name, value in fields.items() if name != "transfer-encoding"}
    if length is not None:
        plain["content-length"] = str(len(seen.body))
    lines = [f"{method} {target} {version}", *(f"{name}:{value}" for name, value in plain.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + seen.body


class LibraryParser(BaseHTTPRequestHandler):
    """The parser of http.server, without its server."""

    def __init__(self, head: bytes):
        self.rfile = io.BytesIO(head)
        self.raw_requestline = self.rfile.readline()

    def send_error(self, *_: Any) -> None:
        pass

    def view(self) -> tuple | None:
        """Return method, target, version and fields as in wire.Request; None if it is refused."""
        if not self.parse_request():
            return None
        fields = {}
        for name in map(str.lower, self.headers):
            values = [value.strip(" \t") for value in self.headers.get_all(name)]
            fields[name] = ("; " if name == "cookie" else ", ").join(values)
        if absolute := re.fullmatch("[A-Za-z]+://([^/?]*)/?(.*)", self.path):
            fields["host"], self.path = absolute[1], "/" + absolute[2]
        return self.command, self.path, self.request_version, fields


# --- in a shop

ANSWERS = {200, 201, 204, 304, 400, 404, 405, 409, 411, 412, 415, 422, 501}
OUTCOMES = {"accepted": ANSWERS, "short": {400}, "refused": {400, 414, 431, 505}}


class Expected(NamedTuple):
    """An answer that has to come."""

    method: str
    request_id: str     # "" if the request has none
    statuses: set[int]


def may_stay_unread(request: wire.Request | None) -> bool:
    """Return whether the body comes only if it is asked for: if not, the connection closes."""
    return bool(request and request.length and request.version == "HTTP/1.1"
                and request.fields.get("expect", "").lower() == "100-continue")


def foresee(seen: list[Seen]) -> tuple[list[Expected], bool]:
    """Return the answers that have to come, and whether the connection stays open after them."""
    answers = []
    stays_open = True
    for _, _, outcome, request, _ in seen:
        statuses, method, name = OUTCOMES.get(outcome) or {int(outcome[-3:])}, "-", ""
        stays_open = outcome == "accepted"
        if request:
            method, name = request.method, request.fields.get("x-request-id", "")
            stays_open = stays_open and wire.keeps_alive(request.version, request.fields)
            expectation = request.fields.get("expect", "100-continue").lower()
            if request.version == "HTTP/1.1" and expectation != "100-continue":
                statuses, stays_open = {417}, False
        if may_stay_unread(request):
            statuses, stays_open = statuses | ANSWERS, False
        answers.append(Expected(method, name if REQUEST_ID.fullmatch(name) else "", statuses))
        if not stays_open:
            break
    return answers, stays_open


def converse(port: int, data: bytes, dice: Dice) -> list[Seen]:
    """Send an input to a gateway, and check its answers and the next request. Raises Fault."""
    seen = check(data, dice)
    for message in seen:
        if may_stay_unread(message.request) and message.end:
            data = data[:message.end]  # the gateway may read on after it, or close the connection
            break
    manner = dice.choice(["at once", "in pieces", "open", "reset"])
    try:
        with Wire(port) as connection:
            connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            step = 1 + len(data) // 500 if manner == "in pieces" else len(data) + 1
            for piece in cut(data, [*range(0, len(data), step)]):
                connection.send(piece)
            if manner == "reset":
                linger = struct.pack("ii", 1, 0)  # zero seconds: closing resets the connection
                connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            else:
                see_answers(connection, seen, manner == "open", len(data), dice)
        with Wire(port) as connection:
            see_marker(connection, dice)
    except (Fault, OSError, HTTPException, ValueError) as error:
        raise Fault(f"sent {manner}: {error!r}") from error
    return seen


def see_answers(connection: Wire, seen: list[Seen], is_open: bool, size: int, dice: Dice) -> None:
    """Check the answers to an input; if `is_open`, the client does not close its side first."""
    answers, stays_open = foresee(seen)
    if not is_open or seen and seen[-1].outcome == "short":
        connection.end()
    for answer in answers:
        see_answer(connection, *answer)
    if is_open and stays_open and seen and seen[-1].end == size:
        see_marker(connection, dice)
    connection.end()
    if not connection.is_closed():
        raise Fault("there are more answers than messages")


def see_marker(connection: Wire, dice: Dice) -> None:
    """Send a valid request; check that exactly this one reaches the service and is answered."""
    name = f"marker-{dice.getrandbits(64)}"
    connection.send(f"GET /orders?limit=1&name={name} HTTP/1.1\r\nHost: shop\r\n"
                    f"X-Request-Id: {name}\r\nConnection: close\r\n\r\n".encode())
    response = see_answer(connection, "GET", name, {200})
    if f"&name={name}&" not in response.getheader("Link", ""):  # which the service writes
        raise Fault(f"{name} is answered with another's page: {response.getheaders()}")


def see_answer(connection: Wire, method: str, name: str, statuses: set[int]) -> HTTPResponse:
    """Read the next answer and check it. Raises Fault, HTTPException or OSError."""
    file = SimpleNamespace(readline=connection.file.readline, read=connection.file.read,
                           flush=bool, close=bool)
    response = HTTPResponse(SimpleNamespace(makefile=lambda _: file), method=method)
    response.begin()
    body, status = response.read(), response.status
    answer = f"{status} {response.getheaders()} {body[:300]!r}"
    request_id = response.getheader("X-Request-Id", "")
    has_right_id = request_id == name if name else re.fullmatch("[0-9a-f]{16}", request_id)
    if status not in statuses or not has_right_id:
        raise Fault(f"{method} {name} is answered {answer}, not {statuses}")
    if status >= 400:
        is_problem = response.getheader("Content-Type") == "application/problem+json"
        if not is_problem or method != "HEAD" and json.loads(body)["status"] != status:
            raise Fault(f"an error is answered with {answer}, which is not its problem document")
    return response


@contextlib.contextmanager
def running_gateway() -> Iterator[int]:
    """Run a shop and its gateway in threads of this process, and yield the gateway's port.

    Raises Fault if the gateway does not reach every service of the shop at the end, or if its log
    reports a failure.
    """
    with (mock.patch.object(wire, "LINGER", PATIENCE),  # on a slow machine, 1 s may be too short
          mock.patch("microshop.gateway.HEALTH_TIME", PATIENCE),  # likewise
          contextlib.redirect_stderr(io.StringIO()) as log,
          running_shop(timeout=PATIENCE) as shop):
        urls = {f"{service.name}_url": [service.url] for service in shop}
        with running(Gateway, timeout=PATIENCE, **urls) as gateway:
            yield gateway.server_port
            health = ask(gateway.server_port, "GET", "/health").json
            if {health["services"][service.name] for service in shop} != {"ok"}:
                raise Fault(f"the health of the gateway is {health}")
    if re.search(r"(?m)^\S+Z \w+ .* failed\b", log.getvalue()):
        raise Fault(log.getvalue())


# --- a run

@dataclass
class Report:
    """What was tried, what its outcomes were, and what was wrong."""

    seed: int
    inputs: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def by(counts: Counter) -> str:
            each = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
            return f"{counts.total():8}  ({each})"
        return "\n".join([
            f"seed      {self.seed:8}", f"inputs    {by(self.inputs)}",
            f"messages  {by(self.outcomes)}", f"damages   {by(self.operators)}",
            *(f"WRONG: {line}" for line in self.wrong)])

    def fuzz(self, place: str, check: Callable[[bytes, Dice], list[Seen]],
             seconds: float = math.inf, inputs: float = math.inf) -> None:
        """Check inputs until the time is over, or their number is reached, or one is wrong."""
        dice, end = Dice(f"{self.seed} {place}"), time.monotonic() + seconds
        for data, damage, expected in write_inputs(dice):
            if time.monotonic() > end or self.inputs[place] >= inputs:
                return
            self.inputs[place] += 1
            self.operators.update(damage)
            try:
                outcomes = [seen.outcome for seen in check(data, dice)]
                if expected and outcomes != expected:
                    raise Fault(f"it is {outcomes}, and should be {expected}")
            except Exception as fault:
                found = f"{place}, seed {self.seed}: {fault!r}\n    {write_literal(data)}"
                self.wrong.append(found)
                return
            self.outcomes.update(outcomes)


def run(seed: int, seconds: float = math.inf, wire_inputs: float = math.inf,
        gateway_inputs: float = math.inf) -> Report:
    """Spend half of the time in this process and half in a shop, or stop after so many inputs."""
    report = Report(seed)
    report.fuzz("wire.py", check, seconds / 2, wire_inputs)
    try:
        with running_gateway() as port:
            report.fuzz("gateway", partial(converse, port), seconds / 2, gateway_inputs)
    except (Fault, AssertionError) as fault:
        report.wrong.append(f"at the end: {fault}")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description="Send damaged requests to wire.py and to a running gateway.")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000),
                        help="of the inputs (default: at random)")
    options = parser.parse_args()
    report = run(options.seed, options.seconds)
    print(report)
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
