"""Malformed requests through real sockets, to a service and through the gateway.

Each gets exactly one refusal. A valid request follows each of them: a server that mistook where
the malformed one ends would answer that request too, or take it for a part of another.
"""
import unittest
from unittest import mock

from microshop import SERVICES
from microshop.chassis import wire
from microshop.gateway import Gateway
from microshop.users import Users
from tests.helpers import PATIENCE, Wire, ask, exchange, running

VALID = b"GET /users HTTP/1.1\r\nHost: shop\r\n\r\n"
LINE = b"GET /users HTTP/1.1\r\n"
HEAD = LINE + b"Host: shop\r\n"
POST = b"POST /users HTTP/1.1\r\nHost: shop\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"

MALFORMED = {  # what is wrong: the status of the refusal, and the bytes
    # the request line, RFC 9112 3
    "no version": (400, b"GET /users\r\nHost: shop\r\n\r\n"),
    "four parts": (400, b"GET /users x HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "two spaces": (400, b"GET  /users HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "tab between": (400, b"GET\t/users HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "space in front": (400, b" GET /users HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "method with parentheses": (400, b"GE(T) /users HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "lower-case http": (400, b"GET /users http/1.1\r\nHost: shop\r\n\r\n"),
    "version 1.10": (400, b"GET /users HTTP/1.10\r\nHost: shop\r\n\r\n"),
    "version 3.0": (505, b"GET /users HTTP/3.0\r\nHost: shop\r\n\r\n"),
    "version 2.0": (505, b"GET /users HTTP/2.0\r\nHost: shop\r\n\r\n"),
    "http/2 preface": (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "tls hello": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    # the target, RFC 9112 3.2
    "asterisk": (400, b"GET * HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "authority": (400, b"CONNECT shop:80 HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "https": (400, b"GET https://shop/users HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "file": (400, b"GET file:///etc/passwd HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "userinfo": (400, b"GET http://me@shop/users HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "no authority": (400, b"GET http:///users HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "no slash": (400, b"GET users HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "fragment": (400, b"GET /users#top HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "bare percent": (400, b"GET /users% HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "half percent": (400, b"GET /users%2 HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "percent zz": (400, b"GET /users%zz HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "encoded NUL": (400, b"GET /users%00 HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "NUL": (400, b"GET /users\0 HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "escape": (400, b"GET /users\x1b[2J HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "not ASCII": (400, b"GET /us\xc3\xa9rs HTTP/1.1\r\nHost: shop\r\n\r\n"),
    # field lines, RFC 9112 5
    "space before colon": (400, HEAD + b"Content-Length : 0\r\n\r\n"),
    "folded": (400, HEAD + b"A: b\r\n c\r\n\r\n"),
    "folded first": (400, LINE + b" Host: shop\r\n\r\n"),
    "no colon": (400, HEAD + b"Content-Length\r\n\r\n"),
    "no name": (400, HEAD + b": x\r\n\r\n"),
    "name with parentheses": (400, HEAD + b"A(b): c\r\n\r\n"),
    "bare CR": (400, HEAD + b"A: b\rTransfer-Encoding: chunked\r\n\r\n"),
    "bare LF": (400, HEAD + b"A: b\nTransfer-Encoding: chunked\r\n\r\n"),
    "LF alone": (400, b"GET /users HTTP/1.1\nHost: shop\n\n"),
    "NUL in a value": (400, HEAD + b"A: b\0c\r\n\r\n"),
    "DEL in a value": (400, HEAD + b"A: b\x7f\r\n\r\n"),
    # Host, RFC 9112 3.2
    "no Host": (400, LINE + b"\r\n"),
    "two Hosts": (400, HEAD + b"Host: shop\r\n\r\n"),
    "empty Host": (400, LINE + b"Host: \r\n\r\n"),
    "Host with path": (400, LINE + b"Host: shop/x\r\n\r\n"),
    "Host with user": (400, LINE + b"Host: me@shop\r\n\r\n"),
    "Host with space": (400, LINE + b"Host: sh op\r\n\r\n"),
    "Host with port name": (400, LINE + b"Host: shop:http\r\n\r\n"),
    # framing, RFC 9112 6
    "two lengths": (400, POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc"),
    "two other lengths": (400, POST + b"Content-Length: 0\r\nContent-Length: 36\r\n\r\n"),
    "list of lengths": (400, POST + b"Content-Length: 3, 3\r\n\r\nabc"),
    "length +3": (400, POST + b"Content-Length: +3\r\n\r\nabc"),
    "length -1": (400, POST + b"Content-Length: -1\r\n\r\n"),
    "length 0_3": (400, POST + b"Content-Length: 0_3\r\n\r\nabc"),
    "length 0x3": (400, POST + b"Content-Length: 0x3\r\n\r\nabc"),
    "length squared": (400, POST + b"Content-Length: \xb2\r\n\r\nabc"),
    "empty length": (400, POST + b"Content-Length:\r\n\r\n"),
    "length and chunked": (
        400, POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "chunked on 1.0": (
        400, b"POST /users HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "chunked twice": (
        400, POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"),
    "chunked in two fields": (
        400, POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "chunked not last": (400, POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n"),
    "no coding": (400, POST + b"Transfer-Encoding:\r\n\r\n0\r\n\r\n"),
    "gzip": (501, POST + b"Transfer-Encoding: gzip\r\n\r\n0\r\n\r\n"),
    "gzip, chunked": (501, POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    "xchunked": (501, POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
    "identity": (501, POST + b"Transfer-Encoding: identity\r\n\r\n"),
    "chunk without size": (400, CHUNKED + b"\r\nabc\r\n0\r\n\r\n"),
    "chunk of size -1": (400, CHUNKED + b"-1\r\n\r\n"),
    "chunk of size 0x3": (400, CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n"),
    "chunk too long": (400, CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n"),
    "chunk with bare LF": (400, CHUNKED + b"3\nabc\r\n0\r\n\r\n"),
    "bad trailer": (400, CHUNKED + b"0\r\nA b\r\n\r\n"),
    # limits, and an expectation
    "line over 8 KiB": (414, b"GET /" + b"u" * 8192 + b" HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "endless line": (414, b"GET /" + b"u" * 100_000),
    "head over 32 KiB": (431, HEAD + b"A: " + b"b" * 32768 + b"\r\n\r\n"),
    "101 fields": (431, HEAD + b"A: b\r\n" * 100 + b"\r\n"),
    "body over 1 MiB": (413, POST + b"Content-Length: 1048577\r\n\r\n"),
    "length of 30 digits": (413, POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n"),
    "chunk over 1 MiB": (413, CHUNKED + b"100001\r\n"),
    "chunk of 16 digits": (413, CHUNKED + b"ffffffffffffffff\r\n"),
    "expectation": (417, HEAD + b"Expect: the-unexpected\r\n\r\n"),
}


NOT_FOUND = [
    b"/users/../users", b"/./users", b"/users/.", b"/x/../users", b"/users/%2e%2e/users",
    b"/%75sers", b"/users%2f1", b"/users%2F..%2Fusers", b"//users", b"/users//1", b"/users;x",
    b"/Users", b"/users\\..\\users", b"/users/1/..", b"/users/%31"]
ABSOLUTE = [b"http://elsewhere/users", b"HTTP://elsewhere:80/users", b"http://[::1]:80/users"]


def largest(start: bytes, more_fields: int, more_bytes: int) -> bytes:
    """Return a head with as many fields and bytes as are allowed, or with more of them."""
    names = range(start.count(b"\r\n"), wire.MAX_FIELDS + more_fields)
    fields = b"".join(b"F%d:\r\n" % number for number in names)
    return (start + fields + b"F:").ljust(wire.MAX_HEAD - 4 + more_bytes, b"x") + b"\r\n\r\n"


class HostileTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        # A client that is slow to read must not lose its refusal to a reset.
        cls.enterClassContext(mock.patch.object(wire, "LINGER", PATIENCE))
        users = cls.enterClassContext(running(Users))
        urls = {f"{name}_url": [f"http://127.0.0.1:{users.server_port}"] for name in SERVICES}
        gateway = cls.enterClassContext(running(Gateway, timeout=PATIENCE, **urls))
        cls.ports = {"service": users.server_port, "gateway": gateway.server_port}

    def test_each_malformed_request_gets_exactly_one_refusal(self):
        for at, port in self.ports.items():
            for name, (status, data) in MALFORMED.items():
                with self.subTest(name, at=at):
                    answers = exchange(port, data + VALID)
                    shown = f"the {at} got {data[:200]!r} and answered {answers}"
                    self.assertEqual([status], [answer.status for answer in answers], shown)
                    headers, problem = answers[0].headers, answers[0].json
                    self.assertEqual("application/problem+json", headers["content-type"], shown)
                    self.assertEqual("close", headers["connection"], shown)
                    self.assertEqual(status, problem["status"], shown)
                    self.assertEqual(headers["x-request-id"], problem["requestId"], shown)

    def test_an_invalid_request_is_refused_before_its_end_has_come(self):
        for at, port in self.ports.items():
            for name in ("tls hello", "LF alone", "endless line", "body over 1 MiB",
                         "chunk over 1 MiB"):
                with self.subTest(name, at=at), Wire(port) as connection:
                    status, data = MALFORMED[name]
                    connection.send(data)
                    self.assertEqual(status, connection.read().status, f"{data[:200]!r} at {at}")

    def test_a_head_is_as_large_at_a_service_as_it_may_be_at_the_gateway(self):
        for start in (HEAD, b"GET /users HTTP/1.0\r\n", LINE + b"Host:" + b"h" * 260 + b"\r\n",
                      HEAD + b"Via: 1.0 a\r\nX-Request-Timeout: 5\r\n"):
            for more, status in (((0, 0), 200), ((1, 0), 431), ((0, 1), 431)):
                for at, port in self.ports.items():
                    with self.subTest(start, more=more, at=at):
                        answer, = exchange(port, largest(start, *more))
                        self.assertEqual(status, answer.status, f"{start!r} at {at}: {answer}")

    def test_a_path_that_is_not_literally_a_resource_gets_404(self):
        for at, port in self.ports.items():
            for target in NOT_FOUND:
                with self.subTest(target, at=at):
                    answer, = exchange(port, b"GET " + target + b" HTTP/1.1\r\nHost: shop\r\n\r\n")
                    self.assertEqual(404, answer.status, f"{target!r} at {at}: {answer}")

    def test_only_the_path_of_an_absolute_target_counts(self):
        for at, port in self.ports.items():
            for target in ABSOLUTE:
                with self.subTest(target, at=at):
                    answer, = exchange(port, b"GET " + target + b" HTTP/1.1\r\nHost: shop\r\n\r\n")
                    self.assertEqual([{"id": 1, "name": "Alice"}, {"id": 2, "name": "Bob"}],
                                     answer.json, f"{target!r} at {at}")

    def test_no_web_page_of_another_origin_can_make_a_browser_write(self):
        for at, port in self.ports.items():
            for status, headers in (
                    (403, {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}),
                    (403, {"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:1"}),
                    (403, {"Origin": "null"}),
                    (200, {"Sec-Fetch-Site": "same-origin", "Origin": f"http://127.0.0.1:{port}"}),
                    (200, {"Origin": f"http://127.0.0.1:{port}"}),
                    (200, {})):
                with self.subTest(headers, at=at):
                    own = {"Content-Type": "application/json", **headers}
                    answer = ask(port, "PUT", "/users/1", own, b'{"name":"Alice"}')
                    self.assertEqual(answer.status, status, f"PUT of a page at the {at}: {answer}")
                    read = ask(port, "GET", "/users/1", headers)
                    self.assertEqual(read.status, 200, "a browser itself protects what is read")

    def test_two_valid_requests_on_one_connection_are_both_answered(self):
        for at, port in self.ports.items():
            answers = exchange(port, VALID + b"\r\n" + VALID)
            self.assertEqual([200, 200], [answer.status for answer in answers], f"at {at}")


if __name__ == "__main__":
    unittest.main()
