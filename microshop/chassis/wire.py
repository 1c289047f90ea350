"""HTTP/1.1 as bytes (RFC 9112): read strictly, and by the same code at both ends.

Two hops that disagree on where a message ends are a security hole (request smuggling, RFC 9112
section 11.2), and what makes them disagree is leniency. So whatever is not exactly in the grammar
is refused, and nothing is repaired. http.server and http.client read heads with email.parser,
which is lenient and also the largest cost of a forwarded request: this module replaces it.

Law: bytes and grammar only. No routes, no JSON, no policy beyond the limits below.
"""
import math
import os
import re
import socket
import struct
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from microshop.chassis.errors import (
    BadRequest, CodingNotImplemented, ContentTooLarge, FieldsTooLarge, TargetTooLong, VersionNotSupported)

MAX_LINE = 8 * 1024          # bytes of a request line or status line
MAX_HEAD = 32 * 1024         # bytes of a whole head
MAX_FIELDS = 100             # header fields in a head
MAX_BODY = 1024 * 1024       # bytes of a request's body
MAX_CHUNK_LINE = 1024        # bytes of a chunk's size and extensions
MAX_EMPTY = 20               # reads that may bring nothing but empty lines before a message
RECEIVE_SIZE = 64 * 1024     # bytes asked of the kernel at once
LINGER = 1.0                 # seconds that a closing connection still reads
PRECISION = 0.01             # seconds by which a deadline may be missed, to spare a system call for each message

CHUNKED = -1                 # a body's length when it comes in chunks

TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")                                # RFC 9110 5.6.2
TARGET = re.compile(r'/[!"$&-~]*+(?:%(?!00)[0-9A-Fa-f]{2}[!"$&-~]*+)*+')          # no bare %, no NUL, no #
HOST = re.compile(r"(?:(?:[!$&-.0-9;=A-Z_a-z~]|%[0-9A-Fa-f]{2})++|\[[0-9A-Fa-f:.]++\])"
                  r"(?::[0-9]{0,5})?")                                            # RFC 3986 3.2.2
ABSOLUTE = re.compile(rf"(?i:http)://({HOST.pattern})((?:[/?].*)?)")              # RFC 9112 3.2.2
VERSION = re.compile(r"HTTP/[0-9]\.[0-9]")                                        # RFC 9112 2.3
STATUS_LINE = re.compile(r"(HTTP/1\.[01]) ([1-5][0-9]{2}) [\t -~\x80-\xff]*")     # RFC 9112 4
FIELD = re.compile(rf"^({TOKEN.pattern}):[ \t]*+([\t -~\x80-\xff]*+)\r\n", re.M)  # RFC 9112 5
LENGTH = re.compile(r"[0-9]{1,4000}")                                             # int() stops at 4,300 digits
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t -~\x80-\xff]*)?\r\n")  # RFC 9112 7.1
EMPTY_LINES = re.compile(rb"(?:\r\n)*+")
# What no head may hold anywhere: control bytes, a CR without its LF, an LF without its CR (RFC 9112 2.2).
STRAY = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?=[^\n])|(?<!\r)\n")


class Fields(dict):
    """Header fields by lower-case name.

    A field that came twice is joined by ", " (RFC 9110 5.3), which makes a second Host or
    Content-Length an invalid one. `pairs` has names and values as they came.
    """

    def __init__(self, pairs: list[tuple[str, str]]):
        super().__init__()
        self.pairs = pairs
        for name, value in pairs:
            name, value = name.lower(), value.rstrip(" \t")
            if name in self:
                value = f"{self[name]}{'; ' if name == 'cookie' else ', '}{value}"
            self[name] = value

    def tokens(self, name: str) -> list[str]:
        """Return the members of a list field in lower case (RFC 9110 5.6.1)."""
        return [token for part in self.get(name, "").split(",") if (token := part.strip(" \t").lower())]


class Request(NamedTuple):
    """The head of a request. `length` is its body's in bytes, CHUNKED, or None when it states none."""

    method: str
    target: str
    version: str
    fields: Fields
    length: int | None


class Response(NamedTuple):
    """The head of a response; `length` as in Request."""

    status: int
    version: str
    fields: Fields
    length: int | None


def parse_request(head: str) -> Request:
    """Parse a request's head (RFC 9112 section 3); an absolute target is split into Host and path.

    Raises the ServiceError whose status the client is to get. The connection is of no use after that.
    """
    line, _, block = head.partition("\r\n")
    parts = line.split(" ")
    if len(parts) != 3 or not TOKEN.fullmatch(parts[0]):
        raise BadRequest("the request line is not a method, a target and a version, one space between them")
    method, target, version = parts
    if not VERSION.fullmatch(version):
        raise BadRequest("the HTTP version is malformed")
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        raise VersionNotSupported("only HTTP/1.1 and HTTP/1.0 are spoken here")
    fields = parse_fields(block)
    host = fields.get("host")
    if not HOST.fullmatch(host) if host is not None else version == "HTTP/1.1":
        raise BadRequest("a request needs exactly one valid Host")
    if absolute := ABSOLUTE.fullmatch(target):
        fields["host"], target = absolute[1], "/" + absolute[2].removeprefix("/")
    if not TARGET.fullmatch(target):
        raise BadRequest("the request target is malformed")
    return Request(method, target, version, fields, parse_length(version, fields))


def parse_response(head: str) -> Response:
    """Parse a response's head (RFC 9112 section 4). Raises BadRequest, or as parse_length does."""
    line, _, block = head.partition("\r\n")
    match = STATUS_LINE.fullmatch(line)
    if not match:
        raise BadRequest("the status line is malformed")
    fields = parse_fields(block)
    return Response(int(match[2]), match[1], fields, parse_length(match[1], fields))


def parse_fields(block: str) -> Fields:
    """Parse the lines after the first (RFC 9112 section 5): no folding, no space before the colon."""
    pairs = FIELD.findall(block)
    if len(pairs) != block.count("\n"):
        raise BadRequest("a header line is not a name, a colon and a value")
    if len(pairs) > MAX_FIELDS:
        raise FieldsTooLarge(f"more than {MAX_FIELDS} header fields")
    return Fields(pairs)


def parse_length(version: str, fields: Fields) -> int | None:
    """Return the body's length as the fields state it (RFC 9112 section 6.3): bytes, CHUNKED or None."""
    length = fields.get("content-length")
    if "transfer-encoding" in fields:
        codings = [coding.strip(" \t").lower() for coding in fields["transfer-encoding"].split(",")]
        if version == "HTTP/1.0" or length is not None:
            raise BadRequest("Transfer-Encoding goes neither with HTTP/1.0 nor with Content-Length")
        if "" in codings or "chunked" in codings[:-1]:
            raise BadRequest("in Transfer-Encoding, chunked must come once and last")
        if codings != ["chunked"]:
            raise CodingNotImplemented("no Transfer-Encoding but chunked is understood here")
        return CHUNKED
    if length is not None and not LENGTH.fullmatch(length):
        raise BadRequest("Content-Length must be one number of bytes")
    return None if length is None else int(length)


def keeps_alive(version: str, fields: Fields) -> bool:
    """Tell whether the connection outlives this message (RFC 9112 section 9.3)."""
    if "connection" not in fields:
        return version == "HTTP/1.1"
    options = fields.tokens("connection")
    return "close" not in options and (version == "HTTP/1.1" or "keep-alive" in options)


def format_head(start_line: str, headers: Iterable[tuple[str, str]]) -> bytes:
    """Write a head. Raises ValueError where a value holds a line break or NUL, or is not Latin-1."""
    lines = [start_line, *[f"{name}: {value}" for name, value in headers], "", ""]
    head = "\r\n".join(lines)
    if not head.count("\r") == head.count("\n") == len(lines) - 1 or "\0" in head:
        raise ValueError(f"a header would break the message: {headers!r}")
    return head.encode("latin-1")


def set_timeout(connection: socket.socket, option: int, seconds: float) -> None:
    """Let the kernel bound each recv (SO_RCVTIMEO) or send (SO_SNDTIMEO); settimeout() would add a poll() to each."""
    seconds = max(seconds, 0.001)  # zero would mean for ever
    timeval = (struct.pack("@L", int(seconds * 1000)) if os.name == "nt"
               else struct.pack("@ll", int(seconds), int(seconds % 1 * 1_000_000)))
    connection.setsockopt(socket.SOL_SOCKET, option, timeval)


class Stream:
    """A connection, as the messages that come and go on it.

    `deadline` (of time.monotonic) bounds the message on its way as a whole, however slowly its bytes
    move. Every method that waits raises TimeoutError when it has passed, EOFError when the peer has
    ended its side, and OSError when the connection broke.
    """

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.deadline = 0.0
        self._buffer = b""
        self._start = 0       # what comes before it in the buffer has been read
        self._timeouts = {socket.SO_RCVTIMEO: math.inf, socket.SO_SNDTIMEO: math.inf}  # as the kernel knows them

    def has_bytes(self) -> bool:
        """Tell whether bytes have come that were not read yet."""
        return self._start < len(self._buffer)

    def fill(self) -> None:
        """Wait for more bytes."""
        self._buffer = self._buffer[self._start:] + self._receive(RECEIVE_SIZE)
        self._start = 0

    def await_message(self, timeout: float) -> bool:
        """Wait `timeout` seconds for a message to begin; False when the peer is gone or stays silent.

        Empty lines before it are skipped (RFC 9112 section 2.2).
        """
        self.deadline = time.monotonic() + timeout
        try:
            for _ in range(MAX_EMPTY):
                self._start = EMPTY_LINES.match(self._buffer, self._start).end()  # type: ignore[union-attr]
                if self._buffer[self._start:] not in (b"", b"\r"):
                    return True
                self.fill()
        except (OSError, EOFError):
            pass
        return False

    def read_head(self) -> str:
        """Return the next head without its empty line. Raises BadRequest, TargetTooLong, FieldsTooLarge."""
        return self._read_through(b"\r\n\r\n", check_head_size)[:-2].decode("latin-1")

    def read_body(self, length: int, limit: int, rate: float = math.inf) -> bytes:
        """Return a body of `length` bytes, or CHUNKED. Raises ContentTooLarge before reading past `limit`.

        The deadline moves on as the size of the body becomes known, by a second for each `rate` bytes.
        """
        if length == CHUNKED:
            return self._read_chunks(limit, rate)
        if length > limit:
            raise ContentTooLarge(f"a body may have {limit} bytes at most")
        self.deadline += length / rate
        return self._read_exactly(length)

    def read_to_end(self, limit: int) -> bytes:
        """Return all that comes until the peer closes, the end of an answer that states no length."""
        try:
            while len(self._buffer) - self._start <= limit:
                self.fill()
        except EOFError:
            return self._read_exactly(len(self._buffer) - self._start)
        raise ContentTooLarge(f"a body may have {limit} bytes at most")

    def linger(self) -> None:
        """Half-close, then read away what still comes, for LINGER seconds at most.

        Closing with unread input resets the connection, and the reset may overtake the answer
        (RFC 9112 section 9.6).
        """
        try:
            self.connection.shutdown(socket.SHUT_WR)
            self.deadline = time.monotonic() + LINGER
            while True:
                self._receive(RECEIVE_SIZE)
        except (OSError, EOFError):
            pass

    def send(self, message: bytes) -> None:
        """Send a whole message, in one piece if the kernel takes it."""
        rest = memoryview(message)
        while rest:
            self._bound(socket.SO_SNDTIMEO)
            try:
                rest = rest[self.connection.send(rest):]
            except BlockingIOError:
                raise TimeoutError from None

    def _bound(self, option: int) -> None:
        """Let the next recv or send end at the deadline."""
        timeout = self.deadline - time.monotonic()
        if timeout <= 0:
            raise TimeoutError
        if abs(timeout - self._timeouts[option]) > PRECISION:
            set_timeout(self.connection, option, timeout)
            self._timeouts[option] = timeout

    def _receive(self, size: int) -> bytes:
        self._bound(socket.SO_RCVTIMEO)
        try:
            received = self.connection.recv(size)
        except BlockingIOError:
            raise TimeoutError from None
        if not received:
            raise EOFError
        return received

    def _read_exactly(self, size: int) -> bytes:
        body = bytearray(self._buffer[self._start:self._start + size])
        self._start += len(body)
        if not self.has_bytes():
            self._buffer, self._start = b"", 0  # a connection that idles should hold nothing
        while len(body) < size:
            body += self._receive(min(size - len(body), RECEIVE_SIZE))
        return bytes(body)

    def _read_chunks(self, limit: int, rate: float) -> bytes:
        """Decode chunks (RFC 9112 section 7.1): extensions are skipped, trailers are dropped."""
        body = bytearray()
        framing = 0  # bytes of size lines: a body that comes in crumbs may not cost more than one at the limit
        while True:
            line = self._read_through(b"\r\n", check_chunk_line_size)
            match = CHUNK_LINE.fullmatch(line)
            if not match:
                raise BadRequest("a chunk's size is malformed")
            size, framing = int(match[1], 16), framing + len(line) + 2
            if len(body) + size > limit or framing > limit:
                raise ContentTooLarge(f"a body may have {limit} bytes at most")
            if size == 0:
                break
            self.deadline += size / rate
            body += self._read_exactly(size)
            if self._read_exactly(2) != b"\r\n":
                raise BadRequest("a chunk is longer than its size")
        self._start -= 2  # from the CRLF of that last size line on, trailers look like a head: CRLF, fields, CRLF
        parse_fields(self.read_head()[2:])
        return bytes(body)

    def _read_through(self, mark: bytes, check_size: Callable[[bytes], None]) -> bytes:
        """Return what comes up to and with `mark`. What can only be refused is refused before it has ended."""
        checked = 0
        while (end := self._buffer.find(mark, self._start)) < 0:
            begun = self._buffer[self._start:]  # alone: what was read before may end in a CR
            check_size(begun)
            if STRAY.search(begun, checked):
                raise BadRequest("a control byte, or a CR or LF that is not part of a CRLF")
            checked = len(begun) - 1  # whose last byte may be the first half of a CRLF
            self.fill()
        part = self._buffer[self._start:end + len(mark)]
        check_size(part)
        self._start += len(part)
        return part


def check_head_size(head: bytes) -> None:
    """Refuse a head, whole or begun, that is over a limit."""
    if len(head) > MAX_LINE and len(head.partition(b"\r")[0]) > MAX_LINE:
        raise TargetTooLong(f"the first line may have {MAX_LINE} bytes at most")
    if len(head) > MAX_HEAD:
        raise FieldsTooLarge(f"a head may have {MAX_HEAD} bytes at most")


def check_chunk_line_size(line: bytes) -> None:
    if len(line) > MAX_CHUNK_LINE:
        raise BadRequest("a chunk's size line is too long")
