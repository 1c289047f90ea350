"""The wire: what is refused, what is understood, and that nothing can be understood in two ways."""
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

PATIENCE = 2.0  # seconds after which a reader that waits has failed
LIMIT = 100     # bytes of a body, where a test needs a limit


class Narrow(socket.socket):
    """A socket on which bytes come and go one by one."""

    def recv(self, size):
        return super().recv(1)

    def send(self, data):
        return super().send(data[:1])


@contextlib.contextmanager
def connected(kind=socket.socket):
    """Yield a peer's socket, and a Stream of what it sends."""
    peer, own = socket.socketpair()
    with peer, kind(fileno=own.detach()) as own:
        peer.settimeout(PATIENCE)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            wire.set_timeout(own, option, PATIENCE)  # a Stream that sets none shall fail, not hang
        reader = wire.Stream(own)
        reader.deadline = time.monotonic() + PATIENCE
        yield peer, reader


@contextlib.contextmanager
def incoming(data, kind=socket.socket, ended=True):
    """Yield a Stream of a peer that has sent `data`, and half-closed unless more is to be expected."""
    with connected(kind) as (peer, reader):
        peer.sendall(data)
        if ended:
            peer.shutdown(socket.SHUT_WR)
        yield reader


@contextlib.contextmanager
def trickling(peer, data, times=400):
    """Let the peer send `data` every few milliseconds, then half-close, unless the block ends first."""
    def send():
        for _ in range(times):
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
    """Write a head: its first line, Host, its other fields."""
    return "\r\n".join([lines[0], *([host] if host else []), *lines[1:], "", ""]).encode("latin-1")


def post(framing, body=b"", version="HTTP/1.1"):
    return head(f"POST /orders {version}", framing) + body


def chunks(*parts):
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in [*parts, b""])


def receive(reader):
    """Read a request and its body as a server does."""
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
        for message in messages:
            with self.subTest(message=message[:80], **peer), incoming(message, **peer) as reader:
                with self.assertRaises(ServiceError) as refusal:
                    read(reader)
                self.assertEqual(status, refusal.exception.status)


class RefusedHeadTest(WireTest):
    def test_a_malformed_request_line_is_refused(self):
        self.assert_refused(400, map(head, [
            "", "GET /", "GET / HTTP/1.1 now", "GET  / HTTP/1.1", "GET /  HTTP/1.1", " GET / HTTP/1.1", " / HTTP/1.1",
            "GET / HTTP/1.1 ", "GET\t/\tHTTP/1.1", "GET /\tHTTP/1.1", "G(T / HTTP/1.1", "GÈT / HTTP/1.1",
            "G\0T / HTTP/1.1", "GET / http/1.1", "GET / HTTP/1", "GET / HTTP/1.10", "GET / HTTP/1.²",
            "GET / HTTP/1.1\0"]))

    def test_a_version_not_spoken_here_is_refused_as_such(self):
        self.assert_refused(505, map(head, [
            "GET / HTTP/2.0", "GET / HTTP/1.2", "GET / HTTP/0.9", "GET / HTTP/3.1", "PRI * HTTP/2.0"]))

    def test_a_malformed_target_is_refused(self):
        self.assert_refused(400, (head(f"GET {target} HTTP/1.1") for target in [
            "*", "users", "?q=1", "shop:80", "https://shop/", "http:/users", "http:///users", "http://eve@shop/",
            "http://shop:80:80/", "http://shop:http/", "http://shop#top", "http://shop/%00", "/#top", "/%", "/%4",
            "/%zz", "/%00", "/?q=%0", "/\x01", "/\x7f", "/\0", "/\r", "/\n", "/ü", "/\xa0"]))

    def test_a_malformed_field_is_refused(self):
        self.assert_refused(400, (head("GET / HTTP/1.1", field) for field in [
            "Name : Ada", "Name\t: Ada", "Name: Ada\r\n Lovelace", "Name: Ada\r\n\tLovelace", " Name: Ada", "Name",
            ": Ada", ":", "Na me: Ada", "Na(me: Ada", "Namè: Ada", "Na\0me: Ada", "Name: A\0da", "Name: A\x01da",
            "Name: A\x0bda", "Name: A\x7fda", "Name: A\rda", "Name: Ada\r", "Name: A\nda", "Name: Ada\n", "\nName: Ada",
            "\rName: Ada"]))
        self.assert_refused(400, [head("GET / HTTP/1.1\r\n Folded: first"), b"GET / HTTP/1.1\nHost: shop\n\n"])

    def test_all_but_one_valid_host_is_refused(self):
        for line in ["GET / HTTP/1.1", "GET http://shop/ HTTP/1.1"]:
            self.assert_refused(400, (head(line, host=host) for host in [
                None, "Host:", "Host: a b", "Host: eve@shop", "Host: shop/users", "Host: shop?", "Host: shop#",
                "Host: shop:http", "Host: shop:80:80", "Host: [::1", "Host: %zz", "Host: shöp", "Host: shop, shop"]))

    def test_a_second_host_is_refused(self):
        for line in ["GET / HTTP/1.1", "GET / HTTP/1.0"]:
            self.assert_refused(400, (head(line, host) for host in ["Host: shop", "Host: evil", "host: shop", "Host:"]))

    def test_a_content_length_that_is_not_one_number_is_refused(self):
        self.assert_refused(400, (post(f"Content-Length: {length}", b"hello") for length in [
            "", "5, 5", "5,5", "5,", "5 5", "+5", "-1", "-0", "5_0", "²", "0x10", "5.0", "5e0", "five", "1" * 5000,
            "5\r\nContent-Length: 5", "5\r\ncontent-length: 6", "\r\nContent-Length: 5", "5\r\nContent-Length:"]))

    def test_a_transfer_encoding_that_is_malformed_or_meets_a_length_is_refused(self):
        self.assert_refused(400, (post(f"Transfer-Encoding: {coding}", chunks()) for coding in [
            "chunked, gzip", "chunked, chunked", "chunked\r\nTransfer-Encoding: chunked",
            "chunked\r\nContent-Length:", "chunked\r\nContent-Length: 5", "xchunked\r\nContent-Length: 5"]))
        self.assert_refused(400, [post("Content-Length: 5\r\nTransfer-Encoding: chunked", chunks()),
                                  post("Transfer-Encoding: chunked", chunks(), "HTTP/1.0")])

    def test_an_empty_transfer_coding_is_refused_as_who_reads_it_alone_sees_no_body(self):
        self.assert_refused(400, (post(f"Transfer-Encoding: {coding}", chunks()) for coding in [
            "", ",", ", chunked", "chunked,", "\r\nTransfer-Encoding: chunked", "chunked\r\nTransfer-Encoding:"]))

    def test_a_transfer_coding_not_understood_is_refused_as_such(self):
        self.assert_refused(501, (post(f"Transfer-Encoding: {coding}", chunks()) for coding in [
            "gzip", "gzip, chunked", "xchunked", "x chunked", "chunked;q=1", '"chunked"', "\xa0chunked", "identity"]))

    def test_each_limit_is_kept_to_the_byte(self):
        line, field = wire.MAX_LINE - len("GET / HTTP/1.1"), wire.MAX_HEAD - len(head("GET / HTTP/1.1", "Name: "))
        for status, fill in [(414, lambda excess: head(f"GET /{'a' * (line + excess)} HTTP/1.1")),
                             (431, lambda excess: head("GET / HTTP/1.1", f"Name: {'a' * (field + excess)}")),
                             (431, lambda excess: head("GET / HTTP/1.1", *["A: b"] * (wire.MAX_FIELDS - 1 + excess)))]:
            parse(fill(0))
            self.assert_refused(status, [fill(1)])

    def test_a_malformed_status_line_is_refused(self):
        self.assert_refused(400, (head(line, "Content-Length: 0") for line in [
            "", "HTTP/1.1 200", "HTTP/1.1  200 OK", "HTTP/1.1 20 OK", "HTTP/1.1 2000 OK", "HTTP/1.1 099 Low",
            "HTTP/1.1 600 High", "HTTP/1.1 ²00 OK", "http/1.1 200 OK", "HTTP/1.2 200 OK", "HTTP/1.1 200 O\0K"]),
            read_response)


class UnderstoodHeadTest(WireTest):
    def test_an_absolute_target_replaces_host_and_keeps_its_query(self):
        for target, host, path in [
                ("http://Shop:80/users?limit=2", "Shop:80", "/users?limit=2"), ("http://a", "a", "/"),
                ("HTTP://a?q=http://b/", "a", "/?q=http://b/"), ("http://[::1]//b", "[::1]", "//b")]:
            with self.subTest(target=target):
                request = parse(head(f"GET {target} HTTP/1.1", host="Host: other"))
                self.assertEqual((host, path), (request.fields["host"], request.target))

    def test_every_form_of_host_is_accepted(self):
        for host in ["shop", "SHOP.example", "shop:", "shop:65535", "127.0.0.1:80", "[2001:db8::1]:80", "a_b~c", "%41"]:
            with self.subTest(host=host):
                self.assertEqual(host, parse(head("GET / HTTP/1.1", host=f"Host: {host}")).fields["host"])
        self.assertNotIn("host", parse(head("GET / HTTP/1.0", host=None)).fields)

    def test_values_are_found_in_any_case_trimmed_and_joined_and_kept_as_pairs(self):
        fields = parse(head("GET / HTTP/1.1", "naME:Ada", "Empty: \t ", "NAME: \tRené of\tx \t")).fields
        self.assertEqual({"host": "shop", "name": "Ada, René of\tx", "empty": ""}, fields)
        self.assertEqual([("Host", "shop"), ("naME", "Ada"), ("Empty", ""), ("NAME", "René of\tx")],
                         [(name, value.rstrip(" \t")) for name, value in fields.pairs])

    def test_the_length_is_what_the_fields_state(self):
        for field, length in [
                ("Name: Ada", None), ("Content-Length: 0", 0), ("content-length:\t0017 ", 17),
                (f"Content-Length: {'9' * 4000}", 10 ** 4000 - 1), ("Transfer-Encoding: Chunked", wire.CHUNKED)]:
            with self.subTest(field=field[:40]):
                self.assertEqual(length, parse(post(field)).length)

    def test_connection_is_a_list_of_options(self):
        for version, value, alive in [
                ("HTTP/1.1", None, True), ("HTTP/1.1", "close, Foo", False), ("HTTP/1.1", "foo ,\tCLOSE", False),
                ("HTTP/1.1", "\xa0close", True), ("HTTP/1.1", "keep-alive, close", False), ("HTTP/1.0", None, False),
                ("HTTP/1.0", "Keep-Alive", True), ("HTTP/1.0", "foo,keep-alive", True), ("HTTP/1.0", "foo", False)]:
            with self.subTest(version=version, value=value):
                fields = wire.Fields([("Connection", value)] if value else [])
                self.assertIs(alive, wire.keeps_alive(version, fields))


class StandardLibraryTest(WireTest):
    def test_heads_are_read_as_the_standard_library_reads_them(self):
        chance, token = random.Random(9110), "!#$%&'*+-.^_`|~09AZaz"
        visible = [chr(number) for number in [*range(0x21, 0x7f), *range(0xa0, 0x100)]]

        def text(alphabet):
            return "".join(chance.choices(alphabet, k=chance.randint(1, 9)))

        def field():
            name, words = chance.choice([text(token), "Accept", "ACCEPT"]), [text(visible) for _ in range(3)]
            start, end = chance.choice(["", " ", " \t"]), chance.choice(["", " ", "\t "])
            return f"{name}:{start}{' '.join(words[:chance.randint(0, 3)])}{end}\r\n"

        for _ in range(300):
            method, target = text(token), "/" + text(["a", "/", "?", "%20", "%C3%bc", "=", "&", "'", "http://b/"])
            block = "Host: shop\r\n" + "".join(field() for _ in range(chance.randint(0, 12))) + "\r\n"
            with self.subTest(block=block):
                request = parse(f"{method} {target} HTTP/1.1\r\n{block}".encode("latin-1"))
                theirs = parse_headers(io.BytesIO(block.encode("latin-1")))
                self.assertEqual((method, target), request[:2])
                self.assertEqual({name.lower(): ", ".join(value.strip(" \t") for value in theirs.get_all(name))
                                  for name in theirs}, request.fields)

    def test_responses_are_read_as_the_standard_library_reads_them(self):
        chance = random.Random(9112)
        for _ in range(150):
            parts = [chance.randbytes(chance.randint(1, 900)) for _ in range(3)]
            body, status = b"".join(parts), chance.choice([200, 201, 404, 503])
            framing, content = chance.choice([(f"Content-Length: {len(body)}", body), ("Until: close", body),
                                              ("Transfer-Encoding: chunked", chunks(*parts))])
            data = head(f"HTTP/1.1 {status} As you like it", framing) + content
            with self.subTest(data=data), incoming(data) as reader:
                status, _, _, length = read_response(reader)
                ours = reader.read_to_end(len(body)) if length is None else reader.read_body(length, len(body))
                theirs = HTTPResponse(mock.Mock(makefile=lambda mode, data=data: io.BytesIO(data)))
                theirs.begin()
                self.assertEqual((theirs.status, theirs.read()), (status, ours))


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
REQUESTS = [
    head("GET /products?limit=2 HTTP/1.1", "Accept: */*", "Cookie: a=b; c=d"),
    head("GET http://shop:8000/users/1 HTTP/1.1", "Connection: close, Foo"),
    head("HEAD / HTTP/1.0", host=None),
    head("PUT /users/1 HTTP/1.1", "Content-Length: 0"),
    post("Content-Type: application/json\r\nContent-Length: 14", b'{"name":"Ada"}'),
    post(f"Content-Length: {len(SMUGGLED)}", SMUGGLED),
    post(f"content-length:{len(SMUGGLED) + 2}\r\nConnection: keep-alive", b"\r\n" + SMUGGLED, "HTTP/1.0"),
    post(f"Content-Length: {len(SMUGGLED)}\r\nName: René", SMUGGLED),
    post("Transfer-Encoding: chunked", chunks(SMUGGLED)),
    post("A: b\r\ntransfer-encoding: Chunked", b'0A;a="b"\r\n0123456789\r\n' + chunks(SMUGGLED)[:-2] + b"C: d\r\n\r\n"),
]
FRAMING = re.compile(rb"([\r\n][^!-~]*)(content-length|transfer-encoding)([^!-~]*:)([^\r\n]*)")


def spoil(data, chance):
    """Damage a message in one or two places. Its joints are favoured, for there is the framing."""
    for _ in range(chance.randint(1, 2)):
        joints = [match.end() for match in re.finditer(rb"^|\r\n|(?=:)|: ?", data)]
        first, second = sorted(chance.choice([chance.randint(0, len(data)), chance.choice(joints)]) for _ in range(2))
        before, middle, after = data[:first], data[first:second], data[second:]
        flipped = bytes(byte ^ 1 << chance.randrange(8) for byte in middle[:1]) + middle[1:]
        inserted = chance.choice([b"\r", b"\n", b"\r\n", b"\0", b":", b" ", b",", b"5", b"x", chance.randbytes(1),
                                  b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"])
        data = chance.choice([
            before + flipped + after, before + inserted + middle + after, before + middle + inserted + after,
            before + middle + middle + after, before + after[:9] + middle + after[9:], before + after, before + middle])
    return data


def loose_end(data):
    """Return where the first message ends for the loosest of servers, or None where two might disagree."""
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


class SpoiltRequestTest(WireTest):
    def test_a_request_within_a_body_is_not_a_request(self):
        for data in REQUESTS:
            with self.subTest(data=data), incoming(data + b"the next") as reader:
                self.assertEqual(SMUGGLED in data, SMUGGLED in receive(reader)[1])
                self.assertEqual(b"the next", read_to_end(reader))

    def test_a_spoilt_request_is_refused_or_ends_where_every_server_sees_its_end(self):
        # A request within a body may come out if the damage has put it behind the declared end. What it may
        # never do is come out for one server and not for another. So whatever is accepted must have one
        # framing field at most, however loosely one looks for it, in its plainest form, and must end exactly
        # where that says. The same then goes for what follows.
        chance, outcomes = random.Random(2024), Counter()
        for _ in range(6000):
            rest = spoil(chance.choice(REQUESTS), chance)
            while rest:
                data, rest = rest, b""
                with incoming(data) as reader:
                    try:
                        if reader.await_message(PATIENCE):
                            receive(reader)
                            rest = reader.read_to_end(len(data))
                            self.assertEqual(loose_end(data), len(data) - len(rest), data)
                            outcomes["accepted"] += 1
                    except ServiceError as error:
                        self.assertIn(error.status, range(400, 506), data)
                        outcomes["refused"] += 1
                    except EOFError:
                        outcomes["short"] += 1
        self.assertTrue(all(outcomes[name] > 200 for name in ("accepted", "refused", "short")), outcomes)


class StreamTest(WireTest):
    def test_pipelined_requests_come_out_one_after_another_even_byte_by_byte(self):
        for kind in (socket.socket, Narrow):
            with incoming(b"".join(REQUESTS), kind) as reader:
                for data in REQUESTS:
                    with self.subTest(kind=kind, data=data), incoming(data) as alone:
                        self.assertEqual(receive(alone), receive(reader))
                self.assertRaises(EOFError, reader.read_head)

    def test_what_trickles_is_cut_by_the_deadline_of_the_whole(self):
        for start, drop, read in [
                (b"GET / HTTP/1.1\r\nHost: ", b"a", receive), (b"", b"a", read_body), (b"", b"a", read_to_end),
                (b"64\r\n", b"a", read_chunks), (b"0\r\n", b"a:\r\n", read_chunks), (b"", b"", receive)]:
            with self.subTest(start=start, read=read), connected() as (peer, reader), trickling(peer, drop):
                peer.sendall(start)
                began = time.monotonic()
                reader.deadline = began + 0.1
                self.assertRaises(TimeoutError, read, reader)
                self.assertTrue(0.05 < time.monotonic() - began < 1.0)

    def test_empty_lines_before_a_message_are_skipped_even_byte_by_byte(self):
        for kind in (socket.socket, Narrow):
            with self.subTest(kind=kind), incoming(b"\r\n\r\n" + REQUESTS[0], kind) as reader:
                self.assertTrue(reader.await_message(PATIENCE))
                self.assertEqual("/products?limit=2", receive(reader)[0].target)

    def test_empty_lines_do_not_prolong_the_wait_for_a_message(self):
        with connected() as (peer, reader), trickling(peer, b"\r\n", times=60):
            began = time.monotonic()
            self.assertFalse(reader.await_message(0.05))
            self.assertLess(time.monotonic() - began, 0.25)  # they come for 0.3 seconds at least

    def test_nothing_but_empty_lines_is_not_listened_to_for_long(self):
        with connected() as (peer, reader), trickling(peer, b"\r\n" * 3000):
            began = time.monotonic()
            self.assertFalse(reader.await_message(PATIENCE))
            self.assertLess(time.monotonic() - began, PATIENCE / 2)

    def test_a_peer_that_is_silent_or_gone_sends_no_message(self):
        with connected() as (peer, reader):
            for start in [b"", b"\r\n\r\n"]:
                peer.sendall(start)
                began = time.monotonic()
                self.assertFalse(reader.await_message(0.001))
                self.assertLess(time.monotonic() - began, 1.0)
            peer.close()
            self.assertFalse(reader.await_message(PATIENCE))

    def test_what_can_only_be_refused_is_refused_although_it_never_ends(self):
        for kind in (socket.socket, Narrow):
            self.assert_refused(400, [
                b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\rHost", b"GET /\0", b"\x16\x03\x01"], kind=kind, ended=False)
            self.assert_refused(400, [b"1;" + b"x" * wire.MAX_CHUNK_LINE, b"1\n", b"1\r;", b"1\r\nab\r", b"0\r\n\0"],
                                read_chunks, kind=kind, ended=False)
        for status, read, start in [
                (414, receive, b"a" * (wire.MAX_LINE + 1)), (431, receive, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 6000),
                (431, read_chunks, b"0\r\n" + b"A: b\r\n" * 6000), (413, read_to_end, b"a" * (LIMIT + 1)),
                (413, lambda reader: reader.read_body(LIMIT + 1, LIMIT), b"")]:
            self.assert_refused(status, [start], read, ended=False)

    def test_a_message_that_ends_short_raises_eof_error(self):
        whole = post("Transfer-Encoding: chunked", chunks(b"hello"))
        for data in [b"", whole[:30], post("Content-Length: 6", b"hello"), *(whole[:-cut] for cut in (1, 3, 6, 9))]:
            with self.subTest(data=data), incoming(data) as reader:
                self.assertRaises(EOFError, receive, reader)

    def test_a_body_at_the_limit_is_read_and_nothing_behind_it(self):
        body = b"a" * LIMIT
        for data, read, rest in [(body, read_body, b"the next"), (chunks(body), read_chunks, b"the next"),
                                 (body, read_to_end, b"")]:
            with self.subTest(read=read), incoming(data + rest) as reader:
                self.assertEqual((body, rest), (read(reader), read_to_end(reader)))

    def test_chunks_become_a_body(self):
        for data, body in [
                (b"0\r\n\r\n", b""), (b"5\r\nhello\r\n000\r\n\r\n", b"hello"), (b"2\r\n\r\n\r\n0\r\n\r\n", b"\r\n"),
                (b"A\r\n0123456789\r\na\r\nabcdefghij\r\n0\r\n\r\n", b"0123456789abcdefghij"),
                (b"0" * 15 + b'2;a="\xe9;"\r\nhi\r\n0 ;b\r\n\r\n', b"hi"),
                (b"2\r\nhi\r\n0\r\nContent-Length: 9\r\nEmpty:\r\n\r\n", b"hi")]:
            with self.subTest(data=data), incoming(data + b"the next") as reader:
                self.assertEqual((body, b"the next"), (read_chunks(reader), read_to_end(reader)))

    def test_malformed_chunks_are_refused(self):
        self.assert_refused(400, (size + b"\r\nhello\r\n0\r\n\r\n" for size in [
            b"", b";a", b"-1", b"+5", b"0x5", b"5 5", b" 5", b"5 ", b"5_", b"\xb2", b"g", b"0" * 16 + b"5", b"5,5",
            b"5;\0", b"5;a\nb", b"5;a\rb", b"5\n", b"5;" + b"x" * wire.MAX_CHUNK_LINE, b"4", b"1"]), read_chunks)
        self.assert_refused(400, [
            b"2\r\nhi0\r\n\r\n", b"2\r\nhi\n0\r\n\r\n", b"2\r\nhi\r0\r\n\r\n", b"2\nhi\n0\n\n"], read_chunks)

    def test_malformed_trailers_are_refused(self):
        self.assert_refused(400, (b"0\r\n" + trailer + b"\r\n\r\n" for trailer in [
            b"Name", b"Name : Ada", b": Ada", b" Name: Ada", b"Name: A\0da", b"Name: A\nda", SMUGGLED]), read_chunks)

    def test_chunks_over_the_limit_are_refused_for_their_bytes_and_for_their_framing(self):
        self.assert_refused(413, [
            b"65\r\n", b"f" * 16 + b"\r\n", chunks(b"a" * 60, b"a" * 41), chunks(*[b"a"] * 20),
            b"0;" + b"x" * LIMIT + b"\r\n\r\n"], read_chunks)

    def test_a_closing_connection_reads_on_for_a_while_and_no_longer(self):
        with mock.patch.object(wire, "LINGER", 0.1), connected() as (peer, reader), trickling(peer, b"a"):
            began = time.monotonic()
            reader.linger()
            self.assertTrue(0.05 < time.monotonic() - began < 1.0)
            self.assertEqual(b"", peer.recv(1))


class WritingTest(WireTest):
    def test_a_head_is_read_as_it_was_written(self):
        pairs = [("Host", "shop"), ("Name", "René"), ("Content-Length", "5")]
        request = parse(wire.format_head("POST /orders HTTP/1.1", pairs))
        self.assertEqual(("POST", "/orders", "HTTP/1.1", pairs, 5),
                         (*request[:3], request.fields.pairs, request.length))

    def test_a_head_that_would_break_is_not_written(self):
        for text in ["a\r\nX: y", "a\rb", "a\nb", "a\n\rb", "a\r\n", "\0", "a\0b", "Zoe\u0308", "\u010a", "\u20ac"]:
            for line, field in [("/", ("Name", text)), ("/", (text, "Ada")), (f"/{text}", ("Name", "Ada"))]:
                with self.subTest(line=line, field=field), self.assertRaises(ValueError):
                    wire.format_head(f"GET {line} HTTP/1.1", [field])

    def test_a_message_is_sent_whole_even_byte_by_byte(self):
        with connected(Narrow) as (peer, stream):
            stream.send(REQUESTS[0])
            stream.connection.shutdown(socket.SHUT_WR)
            self.assertEqual(REQUESTS[0], peer.makefile("rb").read())

    def test_sending_to_a_peer_that_takes_nothing_is_cut_by_the_deadline(self):
        with connected() as (_, stream):
            began = time.monotonic()
            stream.deadline = began + 0.1
            self.assertRaises(TimeoutError, stream.send, bytes(1 << 24))
            self.assertTrue(0.05 < time.monotonic() - began < 1.0)

    def test_a_timeout_bounds_a_call_and_zero_is_not_for_ever(self):
        for seconds in (0.01, 0):
            with self.subTest(seconds=seconds), connected() as (peer, reader), trickling(peer, b""):
                wire.set_timeout(reader.connection, socket.SO_RCVTIMEO, seconds)
                self.assertRaises((BlockingIOError, TimeoutError), reader.connection.recv, 1)
