"""HTTP/1.1 as bytes (RFC 9112): read strictly, and by the same code at both ends of a hop.

If two servers disagree about where a message ends, an attacker can hide a request inside another
one (request smuggling, RFC 9112 section 11.2). They disagree because each repairs malformed input
in its own way. So this module refuses whatever does not match the grammar exactly, and repairs
nothing. It also replaces email.parser, with which http.server and http.client read heads: that
parser is lenient, and it would be the largest part of the cost of a forwarded request.

A *head* is a request line or status line together with the header fields after it.

Law: only bytes and grammar. No routes, no JSON, and no policy beyond the limits below.
"""
import math
import re
import socket
import struct
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from microshop.chassis.errors import (
    BadRequest, CodingNotImplemented, ContentTooLarge, FieldsTooLarge, TargetTooLong,
    VersionNotSupported)

MAX_LINE = 8 * 1024          # bytes of a request line or status line
MAX_HEAD = 32 * 1024         # bytes of a whole head
MAX_FIELDS = 100             # header fields in a head
ADDED_BYTES = 1024           # bytes beyond MAX_HEAD for what our gateway adds, such as Via
ADDED_FIELDS = 10            # header fields beyond MAX_FIELDS for the same
MAX_BODY = 1024 * 1024       # bytes of a request's body
MAX_CHUNK_LINE = 1024        # bytes of a chunk's size and extensions
RECEIVE_SIZE = 64 * 1024     # bytes to ask the kernel for at once
LINGER = 1.0                 # seconds for which a closing connection is still read
PRECISION = 0.01             # seconds by which a deadline may be missed, to save system calls

CHUNKED = -1                 # stands for the length of a body that comes in chunks
PSEUDONYM = "microshop"      # the name of our gateway in Via (RFC 9110 section 7.6.3)

NoteArrival = Callable[[int], None]

# Quantifiers with a + after them (possessive) and atomic groups, (?>...), never backtrack, so the
# time to match is linear in the length of the input. Possessive quantifiers after a group are not
# used: Python before 3.11.5 matches them wrongly (CPython gh-106052).

# RFC 9110 section 5.6.2
TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
# RFC 9112 section 3.2.1, but no fragment (#), incomplete escape (%, %4) or NUL (%00)
TARGET = re.compile(r'/[!"$&-~]*+(?>(?:%(?!00)[0-9A-Fa-f]{2}[!"$&-~]*+)*)')
# RFC 3986 sections 3.2.2 and 3.2.3: a name or an IPv4 address, or an IPv6 address; then a port.
# At most 260 characters: no name in the DNS is longer, and the gateway adds it to heads once more.
HOST = re.compile(
    r"(?![^/?]{261})"
    r"(?>(?:[!$&-.0-9;=A-Z_a-z~]++|%[0-9A-Fa-f]{2})+|\[[0-9A-Fa-f:.]++\])(?::[0-9]{0,5})?")
# RFC 9112 section 3.2.2
ABSOLUTE = re.compile(rf"(?i:http)://({HOST.pattern})((?:[/?].*)?)")
# RFC 9112 section 2.3
VERSION = re.compile(r"HTTP/[0-9]\.[0-9]")
# RFC 9112 section 4
STATUS_LINE = re.compile(r"(HTTP/1\.[0-9]) ([1-5][0-9]{2}) [\t -~\x80-\xff]*")
# RFC 9112 section 5
FIELD = re.compile(rf"^({TOKEN.pattern}):[ \t]*+([\t -~\x80-\xff]*+)\r\n", re.MULTILINE)
# RFC 9110 section 8.6; int() refuses more than 4,300 digits
LENGTH = re.compile(r"[0-9]{1,4000}")
# RFC 9112 sections 7.1 and 7.1.1
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t -~\x80-\xff]*)?\r\n")
# No head may contain these: control bytes, CR without LF, LF without CR (RFC 9112 section 2.2).
STRAY = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?=[^\n])|(?<!\r)\n")


class Fields(dict):
    """Header fields by lower-case name; `pairs` has names and values as they came.

    The values of a repeated field are joined by ", " (RFC 9110 section 5.3). So a repeated Host or
    Content-Length has an invalid value, and is refused.
    """

    __slots__ = ("pairs",)

    def __init__(self, pairs: list[tuple[str, str]]):
        self.pairs = pairs
        for name, value in pairs:
            name, value = name.lower(), value.rstrip(" \t")
            if name in self:
                separator = "; " if name == "cookie" else ", "
                value = self[name] + separator + value
            self[name] = value

    def tokens(self, name: str) -> set[str]:
        """Return the members of a list field in lower case (RFC 9110 section 5.6.1)."""
        return {member.strip(" \t") for member in self.get(name, "").lower().split(",")} - {""}


class Request(NamedTuple):
    """The head of a request.

    `length` is the length of the body in bytes, CHUNKED, or None if the head states none.
    """

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


# --- parsing and writing heads

def parse_request(head: str) -> Request:
    """Parse a request's head (RFC 9112 section 3), as read_head() returns it.

    The host of an absolute target, as in `GET http://shop/users`, replaces the Host field.
    Raises the ServiceError to answer with; then the connection cannot be used any more, since it
    is not known where the next request begins.
    """
    line, _, block = head.partition("\r\n")
    parts = line.split(" ")
    if len(parts) != 3 or not TOKEN.fullmatch(parts[0]):
        raise BadRequest("the request line must be a method, a target and a version, "
                         "separated by single spaces")
    method, target, version = parts
    if version not in ("HTTP/1.0", "HTTP/1.1"):
        version = parse_version(version)
    fields = parse_fields(block)
    check_request_size(head, fields)
    if "host" not in fields:
        if version == "HTTP/1.1":
            raise BadRequest("the Host header is missing")
    elif not HOST.fullmatch(fields["host"]):
        raise BadRequest("the Host header must appear once and be a host name, "
                         "optionally with a port")
    if absolute := ABSOLUTE.fullmatch(target):
        fields["host"], target = absolute[1], "/" + absolute[2].removeprefix("/")
    is_asterisk = target == "*" and method == "OPTIONS"  # RFC 9112 section 3.2.4
    if not is_asterisk and not TARGET.fullmatch(target):
        raise BadRequest("the request target is malformed")
    return Request(method, target, version, fields, parse_length(version, fields))


def parse_version(text: str) -> str:
    """Return the version as which to read a request that states a rare one.

    A later minor version is taken for the last one known, 1.1 (RFC 9110 section 2.5). Raises
    BadRequest and VersionNotSupported.
    """
    if not VERSION.fullmatch(text):
        raise BadRequest("the HTTP version is malformed")
    if not text.startswith("HTTP/1."):
        raise VersionNotSupported("only HTTP/1.0 and HTTP/1.1 are supported")
    return "HTTP/1.1"


def parse_response(head: str) -> Response:
    """Parse a response's head (RFC 9112 section 4), as read_head() returns it.

    Raises BadRequest, FieldsTooLarge or CodingNotImplemented.
    """
    line, _, block = head.partition("\r\n")
    match = STATUS_LINE.fullmatch(line)
    if not match:
        raise BadRequest("the status line is malformed")
    version, status = min(match[1], "HTTP/1.1"), int(match[2])
    fields = parse_fields(block)
    return Response(status, version, fields, parse_length(version, fields))


def parse_fields(block: str) -> Fields:
    """Parse header lines (RFC 9112 section 5).

    Raises BadRequest, also for a line that is folded or has a space before the colon, and
    FieldsTooLarge.
    """
    pairs = FIELD.findall(block)
    if len(pairs) != block.count("\n"):
        raise BadRequest("a header line is malformed: it must be a name, a colon and a value")
    if len(pairs) > MAX_FIELDS + ADDED_FIELDS:
        raise FieldsTooLarge("there are too many header fields")
    return Fields(pairs)


def parse_length(version: str, fields: Fields) -> int | None:
    """Return the length of the body (RFC 9112 section 6.3): bytes, CHUNKED, or None if not stated.

    Raises BadRequest, and CodingNotImplemented for a transfer coding other than chunked.
    """
    length = fields.get("content-length")
    if "transfer-encoding" in fields:
        if version == "HTTP/1.0" or length is not None:
            raise BadRequest("Transfer-Encoding is not allowed in HTTP/1.0, "
                             "nor together with Content-Length")
        codings = fields["transfer-encoding"].lower().split(",")
        codings = [coding.strip(" \t") for coding in codings]
        if "" in codings or "chunked" in codings[:-1]:
            raise BadRequest("the transfer coding chunked must appear once, and last")
        if codings != ["chunked"]:
            raise CodingNotImplemented("the only supported transfer coding is chunked")
        return CHUNKED
    if length is None:
        return None
    if not LENGTH.fullmatch(length):
        raise BadRequest("Content-Length must be a single number of bytes")
    return int(length)


def keeps_alive(version: str, fields: Fields) -> bool:
    """Return whether the connection stays open after this message (RFC 9112 section 9.3)."""
    if "connection" not in fields:
        return version == "HTTP/1.1"
    if fields["connection"] == "keep-alive":  # as almost every message says
        return True
    options = fields.tokens("connection")
    return "close" not in options and (version == "HTTP/1.1" or "keep-alive" in options)


def format_head(start_line: str, headers: Iterable[tuple[str, str]], lines: str = "") -> bytes:
    """Return a head as bytes; `lines` are the last ones of it, which are known to be valid.

    Raises ValueError for a line break, which would end a header or the head too early (response
    splitting), for NUL, and for characters that Latin-1 does not have.
    """
    first = [start_line, *[f"{name}: {value}" for name, value in headers], ""]
    head = "\r\n".join(first)
    has_only_our_line_breaks = head.count("\r") == head.count("\n") == len(first) - 1
    if not has_only_our_line_breaks or "\0" in head:
        raise ValueError(f"a header contains a line break or NUL: {headers!r}")
    return f"{head}{lines}\r\n".encode("latin-1")


# --- connections

def set_timeout(connection: socket.socket, option: int, seconds: float) -> None:
    """Let the kernel limit each recv (SO_RCVTIMEO) or each send (SO_SNDTIMEO) to `seconds`.

    socket.settimeout() would do the same with one more system call, a poll(), for each of them.
    """
    seconds = max(seconds, 0.001)  # the kernel takes zero for "no limit"
    timeval = struct.pack("@ll", int(seconds), int(seconds % 1 * 1_000_000))
    connection.setsockopt(socket.SOL_SOCKET, option, timeval)


class TimedConnection:
    """A connection on which no call waits past `deadline` (of time.monotonic).

    One deadline covers a whole message, so a peer cannot hold a thread longer by sending or
    reading a byte at a time. The methods that wait, here and in Stream, raise TimeoutError when
    the deadline has passed, EOFError when the peer has closed its side, and OSError when the
    connection is broken.
    """

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.deadline = 0.0
        self.note_arrival: NoteArrival | None = None  # gets the size of what receive() returns
        # The timeouts that the kernel applies now; it has none at first.
        self._timeouts = {socket.SO_RCVTIMEO: math.inf, socket.SO_SNDTIMEO: math.inf}

    def receive(self, size: int) -> bytes:
        """Wait for bytes, and return at most `size` of them."""
        self._set_timeout(socket.SO_RCVTIMEO)
        try:
            received = self.connection.recv(size)
        except BlockingIOError:  # the kernel's timeout is over
            raise TimeoutError from None
        if not received:
            raise EOFError
        if self.note_arrival:
            self.note_arrival(len(received))
        return received

    def send(self, message: bytes) -> None:
        """Send a whole message: with one system call, unless the kernel's timeout ends it."""
        while message:
            self._set_timeout(socket.SO_SNDTIMEO)
            try:
                message = message[self.connection.send(message):]
            except BlockingIOError:
                raise TimeoutError from None

    def linger(self) -> None:
        """Close our side, then read and discard what the peer still sends, for LINGER seconds.

        Closing a connection with unread input resets it, and the reset may destroy the answer
        before the peer has read it (RFC 9112 section 9.6).
        """
        try:
            self.connection.shutdown(socket.SHUT_WR)
            self.deadline = time.monotonic() + LINGER
            while True:
                self.receive(RECEIVE_SIZE)
        except (OSError, EOFError):
            pass

    def _set_timeout(self, option: int) -> None:
        """Let the next recv or send end at the deadline."""
        timeout = self.deadline - time.monotonic()
        if timeout <= 0:
            raise TimeoutError
        if abs(timeout - self._timeouts[option]) > PRECISION:
            set_timeout(self.connection, option, timeout)
            self._timeouts[option] = timeout


class Stream(TimedConnection):
    """A connection from which messages are read, one after another.

    A buffer holds bytes that have been received but not read yet.
    """

    def __init__(self, connection: socket.socket):
        super().__init__(connection)
        self._buffer = b""
        self._start = 0  # of what has not been read yet

    def has_bytes(self) -> bool:
        """Return whether bytes have been received that have not been read yet."""
        return self._start < len(self._buffer)

    def fill(self) -> None:
        """Wait for more bytes."""
        self._buffer = self._buffer[self._start:] + self.receive(RECEIVE_SIZE)
        self._start = 0

    def has_message(self) -> bool:
        """Return whether a message has begun to arrive.

        Empty lines before a message are skipped (RFC 9112 section 2.2).
        """
        while self._buffer.startswith(b"\r\n", self._start):
            self._start += 2
        return self._buffer[self._start:] not in (b"", b"\r")  # a CR may begin an empty line

    def has_head(self) -> bool:
        """Return whether read_head() need not wait."""
        return self._buffer.find(b"\r\n\r\n", self._start) >= 0

    def read_head(self) -> str:
        """Return the next head, without the empty line that ends it.

        Raises BadRequest, TargetTooLong or FieldsTooLarge.
        """
        return self.read_through(b"\r\n\r\n", check_head_size)[:-2].decode("latin-1")

    def read_body(self, length: int, limit: int,
                  note_arrival: NoteArrival | None = None) -> bytes:
        """Return a body of `length` bytes, or one that comes in chunks if `length` is CHUNKED.

        `note_arrival` is called with the number of bytes that have arrived already, then each time
        that more arrive; it may raise a ServiceError. Raises ContentTooLarge if there are more than
        `limit` bytes, before it reads them, and BadRequest.
        """
        if length > limit:
            raise body_too_large(limit)
        if note_arrival:
            note_arrival(len(self._buffer) - self._start)
        self.note_arrival = note_arrival
        try:
            return read_chunks(self, limit) if length == CHUNKED else self.read_exactly(length)
        finally:
            self.note_arrival = None

    def read_to_end(self, limit: int) -> bytes:
        """Return all that comes until the peer closes: the body of a response without a length.

        Raises ContentTooLarge if there are more than `limit` bytes.
        """
        body = bytearray(self.read_exactly(len(self._buffer) - self._start))
        try:
            while len(body) <= limit:
                body += self.receive(RECEIVE_SIZE)
        except EOFError:
            return bytes(body)
        raise body_too_large(limit)

    def read_exactly(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        part = self._buffer[self._start:self._start + size]
        self._start += len(part)
        if not self.has_bytes():
            self._buffer, self._start = b"", 0  # an idle connection should not hold memory
        if len(part) == size:
            return part
        body = bytearray(part)
        while len(body) < size:
            body += self.receive(min(size - len(body), RECEIVE_SIZE))
        return bytes(body)

    def read_through(self, mark: bytes, check_size: Callable[[bytes], None]) -> bytes:
        """Return the bytes up to `mark`, with it.

        `check_size` gets what has come so far, and raises a ServiceError if that is too large.
        Raises BadRequest as soon as there is a byte that makes the input invalid, since its end
        may never come.
        """
        checked = 0
        while (end := self._buffer.find(mark, self._start)) < 0:
            begun = self._buffer[self._start:]  # a copy, so that STRAY sees no CR before it
            check_size(begun)
            if STRAY.search(begun, checked):
                raise BadRequest("there is a control byte, or a CR or LF outside of a CRLF")
            checked = len(begun) - 1  # the last byte may be the CR of a CRLF
            self.fill()
        part = self._buffer[self._start:end + len(mark)]
        check_size(part)
        self._start += len(part)
        return part


# --- bodies in chunks (RFC 9112 section 7.1)

def read_chunks(stream: Stream, limit: int) -> bytes:
    """Decode a body that comes in chunks; their extensions and the trailers are dropped.

    Arguments and errors are those of Stream.read_body().
    """
    body = bytearray()
    framing = 0  # bytes around the chunks: limited too, since chunks of one byte cost much more
    while True:
        size_line = stream.read_through(b"\r\n", check_chunk_line_size)
        size = parse_chunk_size(size_line)
        framing += len(size_line) + len(b"\r\n")
        if len(body) + size > limit:
            raise body_too_large(limit)
        if framing > limit:
            raise ContentTooLarge(f"the body has too many chunks: {limit} bytes are around them")
        if size == 0:
            break
        chunk = stream.read_exactly(size + len(b"\r\n"))
        if not chunk.endswith(b"\r\n"):
            raise BadRequest("a chunk is longer than its size")
        body += chunk[:size]
    skip_trailers(stream)
    return bytes(body)


def parse_chunk_size(line: bytes) -> int:
    match = CHUNK_LINE.fullmatch(line)
    if not match:
        raise BadRequest("the size of a chunk is malformed")
    return int(match[1], 16)


def skip_trailers(stream: Stream) -> None:
    """Read the fields after the last chunk, and the empty line after them (section 7.1.2).

    Nothing uses them, but they must be valid, and are limited as those of a head are.
    """
    count = size = 0
    while (line := stream.read_through(b"\r\n", check_fields_size)) != b"\r\n":
        parse_fields(line.decode("latin-1"))
        count, size = count + 1, size + len(line)
        if count > MAX_FIELDS or size > MAX_HEAD:
            raise FieldsTooLarge("the trailers are larger than a head may be")


# --- limits

def check_head_size(head: bytes) -> None:
    """Raise TargetTooLong or FieldsTooLarge if a head, complete or not, is too large for anyone."""
    if len(head) > MAX_LINE and len(head.partition(b"\r")[0]) > MAX_LINE:
        raise TargetTooLong(f"the first line is longer than {MAX_LINE} bytes")
    if len(head) > MAX_HEAD + ADDED_BYTES:
        raise FieldsTooLarge(f"the head is larger than {MAX_HEAD} bytes")


def check_request_size(head: str, fields: Fields) -> None:
    """Raise FieldsTooLarge if a client sent too much.

    What our gateway adds does not count: a service accepts what the gateway accepts, and no more.
    """
    is_large = len(head) + len("\r\n") > MAX_HEAD or len(fields.pairs) > MAX_FIELDS
    if is_large and not fields.get("via", "").endswith(f" {PSEUDONYM}"):
        raise FieldsTooLarge(
            f"the head has more than {MAX_HEAD} bytes or {MAX_FIELDS} header fields")


def check_fields_size(line: bytes) -> None:
    if len(line) > MAX_HEAD:
        raise FieldsTooLarge(f"a header line is longer than {MAX_HEAD} bytes")


def check_chunk_line_size(line: bytes) -> None:
    if len(line) > MAX_CHUNK_LINE:
        raise BadRequest(f"the size line of a chunk is longer than {MAX_CHUNK_LINE} bytes")


def body_too_large(limit: int) -> ContentTooLarge:
    return ContentTooLarge(f"the body is larger than {limit} bytes")
