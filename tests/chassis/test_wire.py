"""HTTP/1.1 as bytes: what is refused, what is accepted, and that no input has two meanings."""
import contextlib
import io
import random
import re
import socket
import threading
import time
import unittest
from collections import Counter
from http.client import HTTPResponse, parse_headers
from unittest import mock

from microshop.chassis import wire
from microshop.chassis.errors import ServiceError
from tests.helpers import PATIENCE, await_message

LIMIT = 100          # bytes of a body, where a test needs a limit
LARGE = 1_000_000    # bytes of a body that never arrives completely
SOON = 0.1           # seconds until a deadline that is to pass
LONG = PATIENCE / 2  # seconds; a call that takes longer did not end because of its deadline


class NarrowSocket(socket.socket):
    """A socket that receives and sends one byte at a time."""

    def recv(self, size):
        return super().recv(1)

    def send(self, data):
        return super().send(data[:1])


@contextlib.contextmanager
def connected(kind=socket.socket):
    """Yield the socket of a peer, and a Stream of what the peer sends."""
    peer, own = socket.socketpair()
    with peer, kind(fileno=own.detach()) as own:
        peer.settimeout(PATIENCE)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            wire.set_timeout(own, option, PATIENCE)  # a Stream that sets none should fail, not hang
        reader = wire.Stream(own)
        reader.deadline = time.monotonic() + PATIENCE
        yield peer, reader


@contextlib.contextmanager
def incoming(data, kind=socket.socket, ended=True):
    """Yield a Stream of a peer that has sent `data`, and closed its side if `ended`."""
    with connected(kind) as (peer, reader):
        peer.sendall(data)
        if ended:
            peer.shutdown(socket.SHUT_WR)
        yield reader


@contextlib.contextmanager
def trickling(peer, data):
    """Let the peer send `data` every few milliseconds until the block ends.

    If the block does not end, the peer closes its side after PATIENCE, so that no reader hangs.
    """
    def send():
        end = time.monotonic() + PATIENCE
        with contextlib.suppress(OSError):
            while time.monotonic() < end:
                if stop.wait(0.005):
                    return
                peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)

    stop = threading.Event()
    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def head(*lines, host="Host: shop"):
    """Return a head: its first line, Host, and the other lines."""
    return "\r\n".join([lines[0], *([host] if host else []), *lines[1:], "", ""]).encode("latin-1")


def post(framing, body=b"", version="HTTP/1.1"):
    return head(f"POST /orders {version}", framing) + body


def chunks(*parts):
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in [*parts, b""])


def receive(reader):
    """Read a request and its body as a server does; return both."""
    request = wire.parse_request(reader.read_head())
    return request, reader.read_body(request.length, wire.MAX_BODY) if request.length else b""


def read_response(reader):
    return wire.parse_response(reader.read_head())


def read_body(reader):
    return reader.read_body(LIMIT, LIMIT)


def read_chunks(reader):
    return reader.read_body(wire.CHUNKED, LIMIT)


def read_to_end(reader):
    return reader.read_to_end(LIMIT)


def parse(data):
    with incoming(data) as reader:
        return wire.parse_request(reader.read_head())


class WireTest(unittest.TestCase):
    def assert_refused(self, status, messages, read=receive, **peer):
        """Check that `read` raises a ServiceError with this status for each of the messages."""
        for message in messages:
            with self.subTest(message=message[:80], **peer), incoming(message, **peer) as reader:
                shown = f"{message[:200]!r} should be refused with {status}"
                with self.assertRaises(ServiceError, msg=shown) as refusal:
                    read(reader)
                self.assertEqual(status, refusal.exception.status, shown)

    @contextlib.contextmanager
    def assert_takes(self, seconds):
        """Check that a block takes at least `seconds`, and ends long before PATIENCE ends it."""
        began = time.monotonic()
        yield
        took = time.monotonic() - began
        shown = f"it should have ended after {seconds} s, and did after {took:.3f} s"
        self.assertGreaterEqual(took, seconds - wire.PRECISION, shown)
        self.assertLess(took, LONG, shown)


class RefusedHeadTest(WireTest):
    def test_a_malformed_request_line_is_refused(self):
        self.assert_refused(400, map(head, [
            "", "GET /", "GET / HTTP/1.1 now", "GET  / HTTP/1.1", "GET /  HTTP/1.1",
            " GET / HTTP/1.1", " / HTTP/1.1", "GET / HTTP/1.1 ", "GET\t/\tHTTP/1.1",
            "GET /\tHTTP/1.1", "G(T / HTTP/1.1", "GÈT / HTTP/1.1", "G\0T / HTTP/1.1",
            "GET / http/1.1", "GET / HTTP/1", "GET / HTTP/1.10", "GET / HTTP/1.²",
            "GET / HTTP/1.1\0"]))

    def test_a_version_other_than_1_x_is_refused_with_505(self):
        self.assert_refused(505, map(head, [
            "GET / HTTP/2.0", "GET / HTTP/0.9", "GET / HTTP/3.1", "PRI * HTTP/2.0"]))

    def test_a_malformed_target_is_refused(self):
        self.assert_refused(400, (head(f"GET {target} HTTP/1.1") for target in [
            "*", "users", "?q=1", "shop:80", "https://shop/", "http:/users", "http:///users",
            "http://eve@shop/", "http://shop:80:80/", "http://shop:http/", "http://shop#top",
            "http://shop/%00", "/#top", "/%", "/%4", "/%zz", "/%00", "/?q=%0", "/\x01", "/\x7f",
            "/\0", "/\r", "/\n", "/ü", "/\xa0"]))

    def test_an_asterisk_is_a_target_of_options_alone(self):
        self.assert_refused(400, map(head, [
            "HEAD * HTTP/1.1", "POST * HTTP/1.1", "OPTIONS *? HTTP/1.1", "OPTIONS ** HTTP/1.1",
            "OPTIONS /* */ HTTP/1.1", "options * HTTP/1.1"]))
        self.assertEqual(("OPTIONS", "*"), parse(head("OPTIONS * HTTP/1.1"))[:2])

    def test_a_malformed_field_is_refused(self):
        self.assert_refused(400, (head("GET / HTTP/1.1", field) for field in [
            "Name : Ada", "Name\t: Ada", "Name: Ada\r\n Lovelace", "Name: Ada\r\n\tLovelace",
            " Name: Ada", "Name", ": Ada", ":", "Na me: Ada", "Na(me: Ada", "Namè: Ada",
            "Na\0me: Ada", "Name: A\0da", "Name: A\x01da", "Name: A\x0bda", "Name: A\x7fda",
            "Name: A\rda", "Name: Ada\r", "Name: A\nda", "Name: Ada\n", "\nName: Ada",
            "\rName: Ada"]))
        self.assert_refused(400, [head("GET / HTTP/1.1\r\n Folded: first"),
                                  b"GET / HTTP/1.1\nHost: shop\n\n"])

    def test_a_missing_or_malformed_host_is_refused(self):
        for line in ["GET / HTTP/1.1", "GET http://shop/ HTTP/1.1"]:
            self.assert_refused(400, (head(line, host=host) for host in [
                None, "Host:", "Host: a b", "Host: eve@shop", "Host: shop/users", "Host: shop?",
                "Host: shop#", "Host: shop:http", "Host: shop:80:80", "Host: [::1", "Host: %zz",
                "Host: shöp", "Host: shop, shop", f"Host: {'a' * 261}"]))

    def test_a_second_host_is_refused(self):
        for line in ["GET / HTTP/1.1", "GET / HTTP/1.0"]:
            self.assert_refused(400, (head(line, host) for host in [
                "Host: shop", "Host: evil", "host: shop", "Host:"]))

    def test_a_content_length_that_is_not_a_single_number_is_refused(self):
        self.assert_refused(400, (post(f"Content-Length: {length}", b"hello") for length in [
            "", "5, 5", "5,5", "5,", "5 5", "+5", "-1", "-0", "5_0", "²", "0x10", "5.0", "5e0",
            "five", "1" * 5000, "5\r\nContent-Length: 5", "5\r\ncontent-length: 6",
            "\r\nContent-Length: 5", "5\r\nContent-Length:"]))

    def test_chunked_is_refused_if_it_is_not_last_or_repeated_or_in_http_1_0_or_with_a_length(self):
        self.assert_refused(400, (post(f"Transfer-Encoding: {coding}", chunks()) for coding in [
            "chunked, gzip", "chunked, chunked", "chunked\r\nTransfer-Encoding: chunked",
            "chunked\r\nContent-Length:", "chunked\r\nContent-Length: 5",
            "xchunked\r\nContent-Length: 5"]))
        self.assert_refused(400, [
            post("Content-Length: 5\r\nTransfer-Encoding: chunked", chunks()),
            post("Transfer-Encoding: chunked", chunks(), "HTTP/1.0")])

    def test_an_empty_transfer_coding_is_refused(self):
        # A server that ignores the empty coding might see no body, and take it for a request.
        self.assert_refused(400, (post(f"Transfer-Encoding: {coding}", chunks()) for coding in [
            "", ",", ", chunked", "chunked,", "\r\nTransfer-Encoding: chunked",
            "chunked\r\nTransfer-Encoding:"]))

    def test_a_transfer_coding_other_than_chunked_is_refused_with_501(self):
        self.assert_refused(501, (post(f"Transfer-Encoding: {coding}", chunks()) for coding in [
            "gzip", "gzip, chunked", "xchunked", "x chunked", "chunked;q=1", '"chunked"',
            "\xa0chunked", "identity"]))

    def test_one_byte_or_field_over_a_limit_is_refused_and_the_limit_itself_is_not(self):
        line = wire.MAX_LINE - len("GET / HTTP/1.1")
        field = wire.MAX_HEAD - len(head("GET / HTTP/1.1", "Name: "))
        fields = wire.MAX_FIELDS - len(["Host: shop"])
        for status, make in [
                (414, lambda excess: head(f"GET /{'a' * (line + excess)} HTTP/1.1")),
                (431, lambda excess: head("GET / HTTP/1.1", f"Name: {'a' * (field + excess)}")),
                (431, lambda excess: head("GET / HTTP/1.1", *["A: b"] * (fields + excess)))]:
            parse(make(0))
            self.assert_refused(status, [make(1)])

    def test_what_our_gateway_adds_to_a_head_does_not_count_and_what_others_add_does(self):
        for forwarder, more_fields, more_bytes in [
                ("Via: 1.1 microshop", wire.ADDED_FIELDS, wire.ADDED_BYTES),
                ("via: 1.0 other, 1.1 microshop", wire.ADDED_FIELDS, wire.ADDED_BYTES),
                ("Via: 1.1 microshop, 1.1 other", 0, 0),
                ("Via: 1.1 microshop\r\nVia: 1.1 other", 0, 0),
                ("X: 1.1 microshop", 0, 0)]:
            start = ["GET / HTTP/1.1", forwarder]
            fields = wire.MAX_FIELDS + more_fields - len(["Host: shop", *forwarder.split("\r\n")])
            size = wire.MAX_HEAD + more_bytes - len(head(*start, "Name: "))
            with self.subTest(forwarder):
                parse(head(*start, *["A: b"] * fields))
                parse(head(*start, "Name: " + "a" * size))
                self.assert_refused(431, [head(*start, *["A: b"] * (fields + 1)),
                                          head(*start, "Name: " + "a" * (size + 1))])

    def test_a_malformed_status_line_is_refused(self):
        self.assert_refused(400, (head(line, "Content-Length: 0") for line in [
            "", "HTTP/1.1 200", "HTTP/1.1  200 OK", "HTTP/1.1 20 OK", "HTTP/1.1 2000 OK",
            "HTTP/1.1 099 Low", "HTTP/1.1 600 High", "HTTP/1.1 ²00 OK", "http/1.1 200 OK",
            "HTTP/2.0 200 OK", "HTTP/1.1 200 O\0K"]), read_response)


class AcceptedHeadTest(WireTest):
    def test_the_host_of_an_absolute_target_replaces_the_field_and_the_query_stays(self):
        for target, host, path in [
                ("http://Shop:80/users?limit=2", "Shop:80", "/users?limit=2"),
                ("http://a", "a", "/"),
                ("HTTP://a?q=http://b/", "a", "/?q=http://b/"),
                ("http://[::1]//b", "[::1]", "//b")]:
            with self.subTest(target=target):
                request = parse(head(f"GET {target} HTTP/1.1", host="Host: other"))
                self.assertEqual((host, path), (request.fields["host"], request.target))

    def test_every_form_of_host_is_accepted(self):
        for host in ["shop", "SHOP.example", "shop:", "shop:65535", "127.0.0.1:80",
                     "[2001:db8::1]:80", "a_b~c", "%41", "a" * 260]:
            with self.subTest(host=host):
                request = parse(head("GET / HTTP/1.1", host=f"Host: {host}"))
                self.assertEqual(host, request.fields["host"])

    def test_http_1_0_does_not_need_a_host(self):
        self.assertNotIn("host", parse(head("GET / HTTP/1.0", host=None)).fields)

    def test_a_later_minor_version_is_read_as_http_1_1(self):
        for version, known in [("HTTP/1.0", "HTTP/1.0"), ("HTTP/1.1", "HTTP/1.1"),
                               ("HTTP/1.2", "HTTP/1.1"), ("HTTP/1.9", "HTTP/1.1")]:
            with self.subTest(version), incoming(head(f"{version} 200 OK")) as reader:
                self.assertEqual(known, parse(head(f"GET / {version}")).version)
                self.assertEqual(known, read_response(reader).version)

    def test_escapes_and_every_character_of_a_target_are_accepted(self):
        for target in ["/", "//", "/%41", "/%c3%BC?q=%20", "/%0a%7F", "/%10", "/a%01b",
                       "/!\"$&'()+*,-./0:;<=>?@A[\\]^_`a{|}~"]:
            with self.subTest(target=target):
                self.assertEqual(target, parse(head(f"GET {target} HTTP/1.1")).target)

    def test_names_ignore_case_and_values_are_trimmed_and_joined_and_pairs_are_kept(self):
        request = parse(head("GET / HTTP/1.1", "naME:Ada", "Empty: \t ", "NAME: \tRené of\tx \t"))
        self.assertEqual({"host": "shop", "name": "Ada, René of\tx", "empty": ""}, request.fields)
        pairs = [(name, value.rstrip(" \t")) for name, value in request.fields.pairs]
        self.assertEqual([("Host", "shop"), ("naME", "Ada"), ("Empty", ""),
                          ("NAME", "René of\tx")], pairs)

    def test_the_length_of_the_body_is_what_the_fields_state(self):
        for field, length in [
                ("Name: Ada", None), ("Content-Length: 0", 0), ("content-length:\t0017 ", 17),
                (f"Content-Length: {'9' * 4000}", 10 ** 4000 - 1),
                ("Transfer-Encoding: Chunked", wire.CHUNKED)]:
            with self.subTest(field=field[:40]):
                self.assertEqual(length, parse(post(field)).length)

    def test_connection_is_a_list_of_options_that_decides_whether_it_stays_open(self):
        for version, value, alive in [
                ("HTTP/1.1", None, True), ("HTTP/1.1", "close, Foo", False),
                ("HTTP/1.1", "foo ,\tCLOSE", False), ("HTTP/1.1", "\xa0close", True),
                ("HTTP/1.1", "keep-alive, close", False), ("HTTP/1.0", None, False),
                ("HTTP/1.0", "Keep-Alive", True), ("HTTP/1.0", "foo,keep-alive", True),
                ("HTTP/1.0", "foo", False)]:
            with self.subTest(version=version, value=value):
                fields = wire.Fields([("Connection", value)] if value else [])
                self.assertIs(alive, wire.keeps_alive(version, fields),
                              f"{version} with Connection: {value}")


class StandardLibraryTest(WireTest):
    def test_heads_are_read_as_the_standard_library_reads_them(self):
        chance = random.Random(9110)
        token = "!#$%&'*+-.^_`|~09AZaz"
        visible = [chr(number) for number in [*range(0x21, 0x7f), *range(0xa0, 0x100)]]
        targets = ["a", "/", "?", "%20", "%C3%bc", "=", "&", "'", "http://b/"]

        def text(alphabet):
            return "".join(chance.choices(alphabet, k=chance.randint(1, 9)))

        def field():
            name = chance.choice([text(token), "Accept", "ACCEPT"])
            words = " ".join([text(visible) for _ in range(3)][:chance.randint(0, 3)])
            start, end = chance.choice(["", " ", " \t"]), chance.choice(["", " ", "\t "])
            return f"{name}:{start}{words}{end}\r\n"

        def join(values):
            return ", ".join(value.strip(" \t") for value in values)

        for _ in range(300):
            method, target = text(token), "/" + text(targets)
            fields = "".join(field() for _ in range(chance.randint(0, 12)))
            block = f"Host: shop\r\n{fields}\r\n"
            with self.subTest(block=block):
                request = parse(f"{method} {target} HTTP/1.1\r\n{block}".encode("latin-1"))
                theirs = parse_headers(io.BytesIO(block.encode("latin-1")))
                self.assertEqual((method, target), request[:2])
                self.assertEqual({name.lower(): join(theirs.get_all(name)) for name in theirs},
                                 request.fields)

    def test_responses_are_read_as_the_standard_library_reads_them(self):
        chance = random.Random(9112)
        for _ in range(150):
            parts = [chance.randbytes(chance.randint(1, 900)) for _ in range(3)]
            body = b"".join(parts)
            status = chance.choice([200, 201, 404, 503])
            framing, content = chance.choice([
                (f"Content-Length: {len(body)}", body), ("Until: close", body),
                ("Transfer-Encoding: chunked", chunks(*parts))])
            data = head(f"HTTP/1.1 {status} As you like it", framing) + content
            with self.subTest(data=data), incoming(data) as reader:
                status, _, _, length = read_response(reader)
                if length is None:
                    ours = reader.read_to_end(len(body))
                else:
                    ours = reader.read_body(length, len(body))
                theirs = HTTPResponse(mock.Mock(makefile=lambda mode, data=data: io.BytesIO(data)))
                theirs.begin()
                self.assertEqual((theirs.status, theirs.read()), (status, ours))


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
EXTENDED = b'0A;a="b"\r\n0123456789\r\n'  # a chunk with an extension
REQUESTS = [
    head("GET /products?limit=2 HTTP/1.1", "Accept: */*", "Cookie: a=b; c=d"),
    head("GET http://shop:8000/users/1 HTTP/1.1", "Connection: close, Foo"),
    head("HEAD / HTTP/1.0", host=None),
    head("PUT /users/1 HTTP/1.1", "Content-Length: 0"),
    post("Content-Type: application/json\r\nContent-Length: 14", b'{"name":"Ada"}'),
    post(f"Content-Length: {len(SMUGGLED)}", SMUGGLED),
    post(f"content-length:{len(SMUGGLED) + 2}\r\nConnection: keep-alive", b"\r\n" + SMUGGLED,
         "HTTP/1.0"),
    post(f"Content-Length: {len(SMUGGLED)}\r\nName: René", SMUGGLED),
    post("Transfer-Encoding: chunked", chunks(SMUGGLED)),
    post("A: b\r\ntransfer-encoding: Chunked",
         EXTENDED + chunks(SMUGGLED)[:-2] + b"C: d\r\n\r\n"),
]
FRAMING = re.compile(rb"([\r\n][^!-~]*)(content-length|transfer-encoding)([^!-~]*:)([^\r\n]*)")


def damage(data, chance):
    """Damage a message in one or two places, mostly at line ends and colons: its framing."""
    for _ in range(chance.randint(1, 2)):
        joints = [match.end() for match in re.finditer(rb"^|\r\n|(?=:)|: ?", data)]
        first, second = sorted(
            chance.choice([chance.randint(0, len(data)), chance.choice(joints)]) for _ in range(2))
        before, middle, after = data[:first], data[first:second], data[second:]
        flipped = bytes(byte ^ 1 << chance.randrange(8) for byte in middle[:1]) + middle[1:]
        inserted = chance.choice([
            b"\r", b"\n", b"\r\n", b"\0", b":", b" ", b",", b"5", b"x", chance.randbytes(1),
            b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"])
        data = chance.choice([
            before + flipped + after,
            before + inserted + middle + after,
            before + middle + inserted + after,
            before + middle + middle + after,
            before + after[:9] + middle + after[9:],
            before + after,
            before + middle])
    return data


def loose_end(data):
    """Return where the first message ends for a lenient server; None where two might disagree."""
    end = data.index(b"\r\n\r\n", re.match(rb"(\r\n)*", data).end()) + 4
    match FRAMING.findall(data[:end].lower()):
        case []:
            return end
        case [(b"\r\n", b"content-length", b":", value)] if value.strip(b" \t").isdigit():
            return end + int(value)
        case [(b"\r\n", b"transfer-encoding", b":", value)] if value.strip(b" \t") == b"chunked":
            while size := int(re.match(rb"[0-9A-Fa-f]*", data[end:])[0], 16):
                end = data.index(b"\r\n", end) + 2 + size + 2
            return data.index(b"\r\n\r\n", end) + 4
    return None


class DamagedRequestTest(WireTest):
    def test_a_request_inside_a_body_is_not_read_as_a_request(self):
        for data in REQUESTS:
            with self.subTest(data=data), incoming(data + b"the next") as reader:
                self.assertEqual(SMUGGLED in data, SMUGGLED in receive(reader)[1])
                self.assertEqual(b"the next", read_to_end(reader))

    def test_a_damaged_request_is_refused_or_ends_where_every_server_sees_its_end(self):
        # The damage may move a request out of the body around it. That is no fault, unless some
        # servers see that request and others do not. So what is accepted may have at most one
        # framing field, found by a lenient search and in its plainest form, and must end exactly
        # where that field says. The same holds for each message after it.
        chance, outcomes = random.Random(2024), Counter()
        for _ in range(6000):
            rest = damage(chance.choice(REQUESTS), chance)
            while rest:
                data, rest = rest, b""
                with incoming(data) as reader:
                    try:
                        if await_message(reader):
                            receive(reader)
                            rest = reader.read_to_end(len(data))
                            self.assertEqual(loose_end(data), len(data) - len(rest), data)
                            outcomes["accepted"] += 1
                    except ServiceError as error:
                        self.assertIn(error.status, range(400, 506), data)
                        outcomes["refused"] += 1
                    except EOFError:
                        outcomes["short"] += 1
        for name in ("accepted", "refused", "short"):
            self.assertGreater(outcomes[name], 200, f"the inputs show too little: {outcomes}")


class StreamTest(WireTest):
    def test_pipelined_requests_are_read_one_after_another_even_byte_by_byte(self):
        for kind in (socket.socket, NarrowSocket):
            with incoming(b"".join(REQUESTS), kind) as reader:
                for data in REQUESTS:
                    with self.subTest(kind=kind, data=data), incoming(data) as alone:
                        self.assertEqual(receive(alone), receive(reader))
                self.assertRaises(EOFError, reader.read_head)

    def test_one_deadline_bounds_a_whole_message_however_slowly_its_bytes_arrive(self):
        for start, drop, read in [
                (b"GET / HTTP/1.1\r\nHost: ", b"a", receive),
                (b"", b"a", lambda reader: reader.read_body(LARGE, LARGE)),
                (b"", b"a", lambda reader: reader.read_to_end(LARGE)),
                (b"f4240\r\n", b"a", lambda reader: reader.read_body(wire.CHUNKED, LARGE)),
                (b"0\r\na:", b"a", read_chunks),
                (b"", b"", receive)]:
            with self.subTest(start=start, drop=drop), connected() as (peer, reader):
                peer.sendall(start)
                with trickling(peer, drop), self.assert_takes(SOON):
                    reader.deadline = time.monotonic() + SOON
                    self.assertRaises(TimeoutError, read, reader)

    def test_a_deadline_that_has_passed_ends_calls_that_need_not_wait_too(self):
        with incoming(REQUESTS[0]) as reader:
            reader.deadline = time.monotonic() - 1
            self.assertRaises(TimeoutError, reader.read_head)
            self.assertRaises(TimeoutError, reader.send, b"HTTP/1.1 200 OK")

    def test_a_body_is_reported_as_it_arrives_and_nothing_else_is(self):
        for framing, body, length in [
                ("Content-Length: 50", b"a" * 50, 50),
                ("Transfer-Encoding: chunked", chunks(b"a" * 30, b"a" * 20), wire.CHUNKED)]:
            for kind, expected in [(socket.socket, [len(body)]),  # it came together with the head
                                   (NarrowSocket, [0] + [1] * len(body))]:
                counts = []
                with self.subTest(length=length, kind=kind), connected(kind) as (peer, reader):
                    peer.sendall(post(framing, body))
                    reader.read_head()
                    reader.read_body(length, LIMIT, counts.append)
                    peer.sendall(REQUESTS[0])
                    receive(reader)
                    self.assertEqual(expected, counts, "bytes of the body that were reported")

    def test_empty_lines_before_a_message_are_skipped_even_byte_by_byte(self):
        for kind in (socket.socket, NarrowSocket):
            with (self.subTest(kind=kind),
                  incoming(b"\r\n\r\n" + REQUESTS[0], kind) as reader):
                self.assertTrue(await_message(reader))
                self.assertEqual("/products?limit=2", receive(reader)[0].target)

    def test_empty_lines_alone_are_no_message(self):
        for data in (b"", b"\r\n\r\n", b"\r\n\r"):
            with self.subTest(data), incoming(data) as reader:
                self.assertFalse(await_message(reader), "a message seems to have begun")

    def test_invalid_input_is_refused_before_its_end_has_come(self):
        for kind in (socket.socket, NarrowSocket):
            self.assert_refused(400, [
                b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\rHost", b"GET /\0", b"\x16\x03\x01"],
                kind=kind, ended=False)
            self.assert_refused(400, [
                b"1;" + b"x" * wire.MAX_CHUNK_LINE, b"1\n", b"1\r;", b"1\r\nab\r", b"0\r\n\0",
                b"0\r\nA: b\nc\r\n", b"0\r\nno colon\r\n"],
                read_chunks, kind=kind, ended=False)
        for status, read, start in [
                (414, receive, b"a" * (wire.MAX_LINE + 1)),
                (431, receive, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 6000),
                (431, read_chunks, b"0\r\n" + b"A: b\r\n" * 6000),
                (431, read_chunks, b"0\r\n" + b"A: b\r\n" * (wire.MAX_FIELDS + 1)),
                (431, read_chunks, b"0\r\nA: " + b"b" * wire.MAX_HEAD),
                (431, read_chunks, b"0\r\n" + (b"A: " + b"b" * 9000 + b"\r\n") * 4),
                (413, read_to_end, b"a" * (LIMIT + 1)),
                (413, lambda reader: reader.read_body(LIMIT + 1, LIMIT), b"")]:
            self.assert_refused(status, [start], read, ended=False)

    def test_a_message_that_ends_too_early_raises_eof_error(self):
        whole = post("Transfer-Encoding: chunked", chunks(b"hello"))
        for data in [b"", whole[:30], post("Content-Length: 6", b"hello"),
                     *(whole[:-cut] for cut in (1, 3, 6, 9))]:
            with self.subTest(data=data), incoming(data) as reader:
                self.assertRaises(EOFError, receive, reader)

    def test_a_body_at_the_limit_is_read_and_nothing_after_it(self):
        body = b"a" * LIMIT
        for data, read, rest in [(body, read_body, b"the next"),
                                 (chunks(body), read_chunks, b"the next"),
                                 (body, read_to_end, b"")]:
            with self.subTest(read=read), incoming(data + rest) as reader:
                self.assertEqual((body, rest), (read(reader), read_to_end(reader)))

    def test_chunks_are_joined_and_extensions_and_trailers_dropped(self):
        for data, body in [
                (b"0\r\n\r\n", b""),
                (b"5\r\nhello\r\n000\r\n\r\n", b"hello"),
                (b"2\r\n\r\n\r\n0\r\n\r\n", b"\r\n"),
                (b"A\r\n0123456789\r\na\r\nabcdefghij\r\n0\r\n\r\n", b"0123456789abcdefghij"),
                (b"0" * 15 + b'2;a="\xe9;"\r\nhi\r\n0 ;b\r\n\r\n', b"hi"),
                (b"2\r\nhi\r\n0\r\nContent-Length: 9\r\nEmpty:\r\n\r\n", b"hi"),
                (b"0\r\n" + b"A: b\r\n" * wire.MAX_FIELDS + b"\r\n", b"")]:
            with self.subTest(data=data), incoming(data + b"the next") as reader:
                self.assertEqual((body, b"the next"), (read_chunks(reader), read_to_end(reader)))

    def test_malformed_chunks_are_refused(self):
        self.assert_refused(400, (size + b"\r\nhello\r\n0\r\n\r\n" for size in [
            b"", b";a", b"-1", b"+5", b"0x5", b"5 5", b" 5", b"5 ", b"5_", b"\xb2", b"g",
            b"0" * 16 + b"5", b"5,5", b"5;\0", b"5;a\nb", b"5;a\rb", b"5\n",
            b"5;" + b"x" * wire.MAX_CHUNK_LINE, b"4", b"1"]), read_chunks)
        self.assert_refused(400, [
            b"2\r\nhi0\r\n\r\n", b"2\r\nhi\n0\r\n\r\n", b"2\r\nhi\r0\r\n\r\n",
            b"2\nhi\n0\n\n"], read_chunks)

    def test_malformed_trailers_are_refused(self):
        self.assert_refused(400, (b"0\r\n" + trailer + b"\r\n\r\n" for trailer in [
            b"Name", b"Name : Ada", b": Ada", b" Name: Ada", b"Name: A\0da", b"Name: A\nda",
            SMUGGLED]), read_chunks)

    def test_chunks_over_the_limit_are_refused_by_their_bytes_and_by_their_framing(self):
        self.assert_refused(413, [
            b"65\r\n", b"f" * 16 + b"\r\n", chunks(b"a" * 60, b"a" * 41), chunks(*[b"a"] * 20),
            b"0;" + b"x" * LIMIT + b"\r\n\r\n"], read_chunks)
        with incoming(chunks(*[b"a"] * 20)) as reader, self.assertRaises(ServiceError) as refusal:
            read_chunks(reader)
        self.assertEqual(refusal.exception.detail,
                         f"the body has too many chunks: {LIMIT} bytes are around them")

    def test_a_closing_connection_is_read_until_linger_is_over(self):
        with (mock.patch.object(wire, "LINGER", SOON), connected() as (peer, reader),
              trickling(peer, b"a"), self.assert_takes(SOON)):
            reader.linger()
            self.assertEqual(b"", peer.recv(1), "the peer should see that this side is closed")


class WritingTest(WireTest):
    def test_a_head_is_read_as_it_was_written(self):
        pairs = [("Host", "shop"), ("Name", "René"), ("Content-Length", "5")]
        request = parse(wire.format_head("POST /orders HTTP/1.1", pairs))
        self.assertEqual(("POST", "/orders", "HTTP/1.1", pairs, 5),
                         (*request[:3], request.fields.pairs, request.length))

    def test_a_head_with_a_line_break_nul_or_a_character_outside_latin_1_is_not_written(self):
        for text in ["a\r\nX: y", "a\rb", "a\nb", "a\n\rb", "a\r\n", "\0", "a\0b", "Zoe\u0308",
                     "\u010a", "\u20ac"]:
            for target, field in [("/", ("Name", text)), ("/", (text, "Ada")),
                                  (f"/{text}", ("Name", "Ada"))]:
                with (self.subTest(target=target, field=field), self.assertRaises(ValueError)):
                    wire.format_head(f"GET {target} HTTP/1.1", [field])

    def test_a_message_is_sent_completely_even_byte_by_byte(self):
        with connected(NarrowSocket) as (peer, stream):
            stream.send(REQUESTS[0])
            stream.connection.shutdown(socket.SHUT_WR)
            self.assertEqual(REQUESTS[0], peer.makefile("rb").read())

    def test_sending_to_a_peer_that_reads_nothing_ends_at_the_deadline(self):
        with connected() as (_, stream), self.assert_takes(SOON):
            stream.deadline = time.monotonic() + SOON
            self.assertRaises(TimeoutError, stream.send, bytes(1 << 24))

    def test_a_timeout_ends_a_call_and_zero_does_not_mean_forever(self):
        for seconds in (0.01, 0):
            with (self.subTest(seconds=seconds), connected() as (peer, reader),
                  trickling(peer, b"")):
                wire.set_timeout(reader.connection, socket.SO_RCVTIMEO, seconds)
                self.assertRaises((BlockingIOError, TimeoutError), reader.connection.recv, 1)


if __name__ == "__main__":
    unittest.main()
