"""Fuzz: requests out of a grammar, damaged with knowledge of it, for wire.py alone and for a shop that runs.

    python -m tests.fuzz [--seconds 60] [--seed N]

Half of the time wire.py reads them in this process. Whatever the damage, only its own errors may come out, the same
however the bytes are cut; and what it accepts must end where its framing says, mean the same when it is written
plainly, and be what http.server sees in it. For the other half a gateway gets them, which must answer just what wire.py
has read, and go on as if nothing had been. The first input that shows otherwise ends its half and is printed, to become
one of CASES; then the exit status is 1. A seed repeats the inputs, but not how many of them a second has room for.
"""
import argparse
import contextlib
import io
import itertools
import json
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
from tests.helpers import PATIENCE, Wire, ask, running, running_shop

Dice = random.Random

CASES = {  # what was found so far: the bytes, and what becomes of each message in them
    "a lone LF behind a body that ends in CR": (  # it passed for a part of a CRLF, and was waited for
        b"POST / HTTP/1.1\r\nHost: shop\r\nContent-Length: 3\r\n\r\nab\r\n", ["accepted", "refused"]),
    "a CR in the head of a version not spoken": (b"GET / HTTP/2.0\r\nHost: shop\r\r\n\r\n", ["refused"]),
    "a NUL in a trailer that is too large": (
        b"POST / HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\0: " + b"x" * 32768 + b"\r\n\r\n",
        ["refused"]),
    "two empty fields": (b"GET / HTTP/1.1\r\nHost: shop\r\nX:\r\nX:\r\n\r\n", ["accepted"]),
    "as many fields as may be": (b"GET / HTTP/1.1\r\nHost: shop" + b"\r\nX:" * 99 + b"\r\n\r\n", ["accepted"]),
    "a target of slashes": (b"GET //// HTTP/1.1\r\nHost: shop\r\n\r\n", ["accepted"]),
}


class Fault(Exception):
    """Something that must never happen, in words."""

    __repr__ = Exception.__str__


# --- the grammar

METHODS = [b"GET", b"GET", b"HEAD", b"POST", b"POST", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"M-SEARCH"]
ORIGINS = [b"", b"", b"", b"http://shop:8000", b"HTTP://[::1]"]
TARGETS = [b"/", b"/health", b"/users", b"/users/1", b"/products?limit=2&after=101", b"/products/101", b"/orders",
           b"/orders/201", b"/orders/201/cancel", b"/orders?expand=user,product", b"/%75sers/%C3%BC?q=%20", b"//users"]
FIELDS = [b"Accept: */*", b"Cookie: a=b; c=d", b"Cookie: e=f", b"Connection: close", b"Connection: Foo, keep-alive",
          b"Idempotency-Key: key", b"If-None-Match: *", b'If-Match: "x"', b"Expect: 100-continue", b"Empty:",
          b"Name:\tRen\xe9 \t", b"Via: 1.0 a, 1.1 b"]
SMUGGLED = b"GET /orders HTTP/1.1\r\nHost: shop\r\nX-Request-Id: smuggled\r\n\r\n"
VISIBLE = bytes([0x09, *range(0x20, 0x7f), *range(0x80, 0x100)])  # what a head may hold besides CRLF
BODIES = [b"", b"{}", b'{"name":"Ada"}', b'{"name":"Ada","stock":5}', b'{"userId":2,"productId":102}', SMUGGLED,
          b"\r\n" + SMUGGLED, b"0\r\n\r\n" + SMUGGLED, b"\0\r\xff\n\r"]


def write_request(dice: Dice) -> bytes:
    """Write a valid request."""
    method, target = dice.choice(METHODS), dice.choice(ORIGINS) + dice.choice(TARGETS)
    version, body = dice.choice([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0"]), dice.choice(BODIES)
    fields = [b"Host: shop", b"X-Request-Id: fuzz-%d" % dice.getrandbits(32), *dice.sample(FIELDS, dice.randint(0, 4))]
    if method not in (b"POST", b"PUT") and dice.random() < 0.7:
        body, framing = b"", []
    elif version == b"HTTP/1.1" and dice.random() < 0.5:
        body, framing = write_chunks(body, dice), [b"Transfer-Encoding: chunked", b"Content-Type: application/json"]
    else:
        framing = [b"Content-Length: %d" % len(body), b"Content-Type: application/json"]
    fields = dice.sample(fields + framing, len(fields + framing))
    return b"\r\n".join([b" ".join([method, target, version]), *fields, b"", body])


def write_chunks(body: bytes, dice: Dice) -> bytes:
    """Encode a body in chunks, with extensions and trailers."""
    zeros, extension = dice.choice([b"", b"0", b"00"]), dice.choice([b"", b"", b";a", b' ;a="\xe9;"'])
    trailers = dice.choice([b"", b"", b"Digest: x\r\n", b"Content-Length: 5\r\nEmpty:\r\n"])
    return b"".join(b"%b%x%b\r\n%b\r\n" % (zeros, len(part), extension, part or trailers)
                    for part in [*cut(body, dice.choices(range(len(body) + 1), k=2)), b""])


def cut(data: bytes, points: list[int]) -> list[bytes]:
    """Return the pieces of data between these points, none of which is empty."""
    return [data[start:end] for start, end in itertools.pairwise(sorted({0, *points, len(data)}))]


# --- the damage

Operator = Callable[[bytes, Dice], bytes]


def sub(pattern: bytes, *changes: bytes | Callable[[bytes], bytes]) -> Operator:
    """Return an operator that makes one of these changes at one of the places that match, if there is any."""
    def operate(data: bytes, dice: Dice) -> bytes:
        if not (places := [*re.finditer(pattern, data[:2000])]):
            return data
        place, change = dice.choice(places), dice.choice(changes)
        new = place.expand(change) if isinstance(change, bytes) else change(place[0])
        return data[:place.start()] + new + data[place.end():]
    return operate


def enlarge(data: bytes, dice: Dice) -> bytes:
    """Bring the first line, the head, the number of its fields, a chunk's line or the body about to its limit."""
    (head, _, body), excess = data.partition(b"\r\n\r\n"), dice.choice([-1, 0, 1, 100])
    line, _, fields = head.partition(b"\r\n")
    head, size = re.sub(rb"(?i)\r\n(content-length|transfer-encoding):[^\r\n]*", b"", head), wire.MAX_BODY + excess
    return dice.choice([
        lambda: line.replace(b" HTTP", b"a" * (wire.MAX_LINE + excess - len(line)) + b" HTTP", 1) + data[len(line):],
        lambda: line + b"\r\nX:" + b"x" * (wire.MAX_HEAD + excess - len(line + fields) - 8) + data[len(line):],
        lambda: line + b"\r\nX:" * (wire.MAX_FIELDS + excess - fields.count(b"\r\n") - 1) + data[len(line):],
        lambda: head + b"\r\nContent-Length: %d\r\n\r\n" % size + body.ljust(size),
        lambda: head + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + write_chunks(body.ljust(size), dice),
        lambda: re.sub(rb"\r\n([0-9A-Fa-f]+)\r\n", lambda chunk: b"\r\n%b;%b\r\n" % (chunk[1], b"x" * (
            wire.MAX_CHUNK_LINE + excess - len(chunk[1]) - 3)), data, count=1)])()


def flip(data: bytes, dice: Dice) -> bytes:
    point = dice.randrange(len(data) + 1)
    return data[:point] + bytes(byte ^ 1 << dice.randrange(8) for byte in data[point:point + 1]) + data[point + 1:]


def splice(data: bytes, dice: Dice) -> bytes:
    other = write_request(dice)
    return data[:dice.randint(0, len(data))] + other[dice.randint(0, len(other)):]


FIELD, LENGTH = rb"(?<=\r\n)[^\r\n:]+:[^\r\n]*\r\n", rb"(?i)(content-length:) ?([0-9]+)"
OPERATORS: dict[str, Operator] = {
    "line": sub(
        rb"^(\S+) (\S+) HTTP/(1..)", rb"\1  \2 HTTP/\3", rb"\1\t\2 HTTP/\3", rb"\1 \2", rb" \1 \2 HTTP/\3",
        rb"\1 \2 HTTP/1.0", rb"\1 \2 HTTP/1.10", rb"\1 \2 HTTP/2.0", rb"\1 \2 http/\3", rb"\1( \2 HTTP/\3",
        rb"\1 * HTTP/\3", rb"\1 /\2 HTTP/\3", rb"\1 \2# HTTP/\3", rb"\1 \2%00 HTTP/\3", b"\\1 \\2\xa0 HTTP/\\3",
        rb"\1 http:// HTTP/\3", rb"\1 http://me@shop\2 HTTP/\3", rb"\1 file://\2 HTTP/\3", rb"\1 \2 HTTP/\3 \2"),
    "end": sub(rb"\r\n", b"\n", b"\r", b"\n\r", b"\r\r\n", b"\n\n", b"\r\n\r\n"),
    "insert": sub(rb"^|\r\n|\r|(?=:)|: ?| |$", *(b"\\g<0>" + byte for byte in (
        b"\r", b"\n", b"\0", b" ", b"\t", b"\x7f", b"\x85", b"\x0b"))),
    "duplicate": sub(FIELD, rb"\g<0>\g<0>"),
    "drop": sub(FIELD, b""),
    "swap": sub(rb"(?<=\r\n)([^\r\n]+\r\n)([^\r\n]+\r\n)", rb"\2\1"),
    "case": sub(FIELD, bytes.swapcase, bytes.upper, bytes.lower),
    "rename": sub(rb"(?<=\r\n)[^\r\n:]+(?=:)", b"Content-Length", b"Transfer-Encoding", b"Content_Length", b"Host", b"",
                  b"Connection", b"Cookie", b"X-Request-Id", b"Idempotency-Key", b"Expect", b"N(me", b"R\xe9n"),
    "space": sub(rb": ?", b" :", b"\t:", b":\t ", b":", b"\xa0:", b"", b"::", b":\x0b"),
    "fold": sub(rb"\r\n(?=[^\r\n])", rb"\g<0> chunked\r\n", rb"\g<0>\tx\r\n", rb"\g<0> \r\n", rb"\g<0> Host: shop\r\n"),
    "length": sub(
        LENGTH, rb"\1 +\2", rb"\1 -\2", rb"\1 0\2", rb"\1 \2 ", rb"\1\t\2", rb"\1 0x\2", rb"\1 \2.0", rb"\1 \2,",
        rb"\1", rb"\1 0_\2", rb"\1 \2 0", b"\\1 \xb2\\2", rb"\1 1\2", rb"\1 \g<2>99999999", rb"\1 0", rb"\1 3",
        b"\\1 " + b"0" * 5000 + b"\\2"),
    "lengths": sub(LENGTH, rb"\1 \2\r\n\1 \2", rb"\1 0\r\n\1 \2", rb"\1 \2\r\n\1 0", rb"\1 \2, \2", rb"\1 \2\r\n\1"),
    "coding": sub(rb"(?i)(transfer-encoding:) chunked", *(b"\\1 " + coding for coding in (
        b"Chunked", b"chunked, chunked", b"gzip, chunked", b"chunked, gzip", b"xchunked", b"chunked;a", b'"chunked"',
        b"", b"identity", b",chunked", b"\x0bchunked", b"chunked\r\nTransfer-Encoding:", b"chunked\r\n , identity"))),
    "both": sub(rb"(?i)(content-length|transfer-encoding):[^\r\n]*\r\n", rb"\g<0>Transfer-Encoding: chunked\r\n",
                rb"\g<0>Content-Length: 5\r\n", rb"Content-Length: 0\r\n\g<0>"),
    "chunks": sub(
        rb"(?<=\r\n)([0-9A-Fa-f]+)(?=[;\r])", rb"+\1", rb"-\1", rb"0x\1", rb"1\1", rb"\g<1>1", rb"\1 ", rb" \1",
        rb"\1_0", rb"\1g", rb"\1,\1", b"0" * 16 + b"\\1", b"f" * 15 + b"\\1", rb"\1;\n", b"", b"0", b"4"),
    "enlarge": enlarge, "flip": flip, "splice": splice,
    "truncate": lambda data, dice: data[:dice.randint(0, len(data))],
}
FAVOURED = [*OPERATORS, *("length", "lengths", "coding", "chunks") * 2]  # since not every request has a place for them


def write_inputs(dice: Dice) -> Iterator[tuple[bytes, list[str], list[str]]]:
    """Yield bytes, how they were damaged, and, if not at all, what must become of them: cases, then requests."""
    for data, outcomes in CASES.values():
        yield data, [], outcomes
    while True:
        data, used, count = b"", [], dice.choice([1, 1, 2, 3])
        for _ in range(count):
            request = write_request(dice)
            for name in dice.choices(FAVOURED, k=dice.choice([0, 1, 1, 2, 3])):
                before, request = request, OPERATORS[name](request, dice)
                used += [name] * (before != request)
            data += request
        yield data, used, [] if used else ["accepted"] * count


def write_literal(data: bytes) -> str:
    """Write bytes as Python does, long runs of the same byte shortly."""
    runs = re.finditer(rb"(?s)(.)\1{63,}|(?:(?!(.)\2{63}).)+", data)
    return " + ".join(f"{run[1]!r} * {len(run[0])}" if run[1] else repr(run[0]) for run in runs) or "b''"


# --- in this process

class Feed:
    """What a Stream takes for a connection: its bytes come in pieces."""

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
    """What became of a message on a connection."""

    start: int
    end: int                      # 0 where it is not accepted
    outcome: str                  # "accepted", "short", "refused 400"; "refused" if its cuts decide what is wrong first
    request: wire.Request | None  # what was understood of it
    body: bytes


def read(data: bytes, points: list[int]) -> list[Seen]:
    """Read messages off a connection as a server does, their bytes cut at these points. Raises Fault."""
    seen: list[Seen] = []
    stream = wire.Stream(feed := Feed(cut(data, points)))

    def position() -> int:
        return len(data) - sum(map(len, feed.pieces)) - len(stream._buffer) + stream._start

    while (not seen or seen[-1].outcome == "accepted") and stream.await_message(PATIENCE):
        start, end, request, body = position(), 0, None, b""
        try:
            request = wire.parse_request(stream.read_head())
            body = stream.read_body(request.length, wire.MAX_BODY) if request.length else b""
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
    """Return what may not be in a head, or in what there is of it."""
    head, end, _ = data.partition(b"\r\n\r\n")
    return (head if end else head.removesuffix(b"\r")).replace(b"\r\n", b"").translate(None, VISIBLE)


def check(data: bytes, dice: Dice) -> list[Seen]:
    """Read an input in this process, and return what becomes of its messages. Raises Fault."""
    seen, joints = read(data, []), [match.start() + 1 for match in re.finditer(b"\r\n", data[:9000])]
    points = dice.choices([*joints, dice.randint(0, len(data))], k=3)
    if len(data) < 500 and dice.random() < 0.2:
        points = [*range(len(data))]
    if read(data, points) != seen:
        raise Fault(f"it depends on where it is cut: {points}")
    for message in seen:
        if message.outcome == "accepted":
            judge(message, data[message.start:])
        elif message.outcome == "short" and not message.request and find_stray(data[message.start:]):
            raise Fault("more of it is awaited, although it can only be refused")
    return seen


RULES: dict[str, Callable[[Seen, bytes], Any]] = {  # what no accepted message may have, told by its head
    "bytes in its head that no head may hold": lambda seen, head: find_stray(head),
    "a first line over the limit": lambda seen, head: head.index(b"\r\n") > wire.MAX_LINE,
    "a head over the limit": lambda seen, head: len(head) > wire.MAX_HEAD,
    "fields over the limit": lambda seen, head: head.count(b"\r\n") - 2 > wire.MAX_FIELDS,
    "a body over the limit": lambda seen, head: len(seen.body) > wire.MAX_BODY,
    "chunks in HTTP/1.0": lambda seen, head: seen.request.version == "HTTP/1.0" and seen.request.length == wire.CHUNKED,
    "no Host, or two": lambda seen, head: head.lower().count(b"\r\nhost:") not in (1, seen.request.version[-1] == "1"),
}


KNOWN_DIFFERENCES: dict[str, Callable[[wire.Request, bytes], wire.Request | None]] = {  # what http.server sees instead
    "gh-87389: slashes that a target begins with become one, lest a redirect leads elsewhere": lambda request, head:
        request._replace(target="/" + request.target.lstrip("/")) if b" //" in head.partition(b"\r")[0] else request,
    "of the 100 fields that it takes, the empty line counts as one": lambda request, head:
        request if head.count(b"\r\n") - 2 < 100 else None,
}


def judge(seen: Seen, data: bytes) -> None:
    """See whether the message that `data` begins with was accepted rightly. Raises Fault."""
    head, end = data[:data.index(b"\r\n\r\n") + 4], 0
    if breaches := [name for name, is_broken in RULES.items() if is_broken(seen, head)]:
        raise Fault(f"it is accepted with {' and '.join(breaches)}")
    with contextlib.suppress(ValueError):
        end = loose_end(data)
    if seen.end - seen.start != end:
        raise Fault(f"it ends after {seen.end - seen.start} bytes here, and elsewhere after {end}")
    again = read(plain := write_plainly(seen), [])
    if [message.outcome for message in again] != ["accepted"] or write_plainly(again[0]) != plain:
        raise Fault(f"it is another when it is written plainly: {again}")
    expected: wire.Request | None = seen.request
    for differ in KNOWN_DIFFERENCES.values():
        expected = expected and differ(expected, head)
    if (expected and expected[:4]) != (theirs := Library(head).view()):
        raise Fault(f"http.server sees {theirs}, where {expected} was expected")


def write_plainly(seen: Seen) -> bytes:
    """Write an accepted request again, in the one plain way."""
    method, target, version, fields, length = seen.request
    plain = {name: value.rstrip() for name, value in fields.items() if name != "transfer-encoding"}
    if length is not None:
        plain["content-length"] = str(len(seen.body))
    lines = [f"{method} {target} {version}", *(f"{name}:{value}" for name, value in plain.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + seen.body


class Library(BaseHTTPRequestHandler):
    """The parser of http.server, without its server."""

    def __init__(self, head: bytes):
        self.rfile = io.BytesIO(head)
        self.raw_requestline = self.rfile.readline()

    def send_error(self, *_: Any) -> None:
        pass

    def view(self) -> tuple | None:
        """Return what it sees, with an absolute target split as wire.py does; None if it refuses that."""
        if not self.parse_request():
            return None
        fields = {name.lower(): ("; " if name.lower() == "cookie" else ", ").join(
            value.strip(" \t") for value in self.headers.get_all(name)) for name in self.headers}
        if absolute := re.fullmatch("[A-Za-z]+://([^/?]*)/?(.*)", self.path):
            fields["host"], self.path = absolute[1], "/" + absolute[2]
        return self.command, self.path, self.request_version, fields


# --- in a shop

ANSWERS = {200, 201, 204, 304, 400, 404, 405, 409, 411, 412, 415, 422, 431}  # the last from behind: a hop adds fields
OUTCOMES = {"accepted": ANSWERS, "short": {400}, "refused": {400, 414, 431, 505}}


def foresee(seen: list[Seen]) -> tuple[list[tuple[str, str, set[int]]], bool]:
    """Return the answers that must come: the method, any X-Request-Id, the statuses; and if the connection stays open.
    """
    answers = []
    stays_open = True
    for _, _, outcome, request, _ in seen:
        statuses, method, name = OUTCOMES.get(outcome) or {int(outcome[-3:])}, "-", ""
        stays_open = outcome == "accepted"
        if request:
            method, name = request.method, request.fields.get("x-request-id", "")
            stays_open = stays_open and wire.keeps_alive(request.version, request.fields)
            if request.version == "HTTP/1.1" and request.fields.get("expect", "100-continue").lower() != "100-continue":
                statuses, stays_open = {417}, False
        answers.append((method, name if REQUEST_ID.fullmatch(name) else "", statuses))
        if not stays_open:
            break
    return answers, stays_open


def converse(port: int, data: bytes, dice: Dice) -> list[Seen]:
    """Send an input to a gateway, and see it answered as it must be, and a request after it. Raises Fault."""
    seen, manner = check(data, dice), dice.choice(["at once", "in pieces", "open", "reset"])
    answers, stays_open = foresee(seen)
    try:
        with Wire(port) as connection:
            connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in cut(data, [*range(0, len(data), 1 + len(data) // 500)]) if manner == "in pieces" else [data]:
                connection.send(piece)
            if manner == "reset":
                connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                if manner != "open" or seen and seen[-1].outcome == "short":
                    connection.end()
                for answer in answers:
                    see_answer(connection, *answer)
                if manner == "open" and stays_open and seen and seen[-1].end == len(data):
                    see_marker(connection, dice)
                connection.end()
                if not connection.is_closed():
                    raise Fault("there are more answers than messages")
        with Wire(port) as connection:
            see_marker(connection, dice)
    except (Fault, OSError, HTTPException, ValueError) as error:
        raise Fault(f"sent {manner}: {error!r}") from error
    return seen


def see_marker(connection: Wire, dice: Dice) -> None:
    """Send a valid request, and see that this very one comes to the service behind and is answered."""
    name = f"marker-{dice.getrandbits(64)}"
    connection.send(f"GET /orders?limit=1&name={name} HTTP/1.1\r\nHost: shop\r\nX-Request-Id: {name}\r\n"
                    "Connection: close\r\n\r\n".encode())
    response = see_answer(connection, "GET", name, {200})
    if f"&name={name}&" not in response.getheader("Link", ""):  # the service writes that
        raise Fault(f"{name} is answered with another's page: {response.getheaders()}")


def see_answer(connection: Wire, method: str, name: str, statuses: set[int]) -> HTTPResponse:
    """Read the next answer, and see that it is the one that must come. Raises Fault, HTTPException, OSError."""
    file = SimpleNamespace(readline=connection.file.readline, read=connection.file.read, flush=bool, close=bool)
    response = HTTPResponse(SimpleNamespace(makefile=lambda _: file), method=method)
    response.begin()
    body, status, told = response.read(), response.status, response.getheader("X-Request-Id", "")
    if status not in statuses or told != name and (name or not re.fullmatch("[0-9a-f]{16}", told)):
        raise Fault(f"{method} {name} is answered {status} {response.getheaders()} {body[:300]!r}, not {statuses}")
    if status >= 400 and (response.getheader("Content-Type") != "application/problem+json"
                          or method != "HEAD" and json.loads(body)["status"] != status):
        raise Fault(f"{status} is told as {response.getheaders()} {body!r}")
    return response


@contextlib.contextmanager
def running_gateway() -> Iterator[int]:
    """Run a shop and its gateway in threads of this process, and yield its port. Raises Fault if they do not end well.
    """
    with (mock.patch.object(wire, "LINGER", PATIENCE),  # else a slow machine may see a refusal overtaken by a reset
          contextlib.redirect_stderr(io.StringIO()) as log, running_shop() as shop):
        with running(Gateway, **{f"{service.name}_url": [service.url] for service in shop}) as gateway:
            yield gateway.server_port
            if (health := ask(gateway.server_port, "GET", "/health").json)["status"] != "ok":
                raise Fault(f"in the end its health is {health}")
    if re.search(r"(?m)^\S+Z \w+ .* failed\b", log.getvalue()):
        raise Fault(log.getvalue())


# --- a run

@dataclass
class Report:
    """What was tried, what came of it, and what was wrong."""

    seed: int
    inputs: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def by(counts: Counter) -> str:
            return f"{counts.total():8}  ({', '.join(f'{name} {count}' for name, count in sorted(counts.items()))})"
        return "\n".join([f"seed      {self.seed:8}", f"inputs    {by(self.inputs)}", f"messages  {by(self.outcomes)}",
                          f"damages   {by(self.operators)}", *(f"WRONG: {line}" for line in self.wrong)])

    def fuzz(self, place: str, check: Callable[[bytes, Dice], list[Seen]], seconds: float, least: int = 0) -> None:
        """Check inputs for so long, and so many at least, or until one shows that something is wrong."""
        dice, end = Dice(f"{self.seed} {place}"), time.monotonic() + seconds
        for data, used, expected in write_inputs(dice):
            self.inputs[place] += 1
            self.operators.update(used)
            try:
                outcomes = [seen.outcome for seen in check(data, dice)]
                if expected and outcomes != expected:
                    raise Fault(f"it is {outcomes}, and should be {expected}")
            except Exception as fault:
                self.wrong.append(f"{place}, seed {self.seed}: {fault!r}\n    {write_literal(data)}")
                return
            self.outcomes.update(outcomes)
            if time.monotonic() > end and self.inputs[place] >= least:
                return


def run(seconds: float, seed: int, least: int = 0) -> Report:
    """Spend half of the time in this process and half in a shop, on `least` inputs at least."""
    report = Report(seed)
    report.fuzz("wire.py", check, seconds / 2, least)
    try:
        with running_gateway() as port:
            report.fuzz("gateway", partial(converse, port), seconds / 2, least)
    except (Fault, AssertionError) as fault:
        report.wrong.append(f"after it all: {fault}")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000), help="of the inputs")
    options = parser.parse_args()
    report = run(options.seconds, options.seed)
    print(report)
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
