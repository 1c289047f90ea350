"""Malformed requests through real sockets, to a service and through the gateway: one clear refusal each.

Behind every case comes a valid request: had a case been taken for something else than it is, that
request would be answered too, or as a part of another.
"""
import unittest

from microshop.gateway import Gateway
from microshop.users import Users
from tests.helpers import Wire, exchange, running

VALID = b"GET /users HTTP/1.1\r\nHost: shop\r\n\r\n"
LINE = b"GET /users HTTP/1.1\r\n"
HEAD = LINE + b"Host: shop\r\n"
POST = b"POST /users HTTP/1.1\r\nHost: shop\r\n"

MALFORMED = {  # name: (status, bytes)
    # the request line, RFC 9112 3
    "no version": (400, b"GET /users\r\nHost: shop\r\n\r\n"),
    "four parts": (400, b"GET /users x HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "two spaces": (400, b"GET  /users HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "tab between": (400, b"GET\t/users HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "space in front": (400, b" GET /users HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "method no token": (400, b"GE(T) /users HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "lower-case http": (400, b"GET /users http/1.1\r\nHost: shop\r\n\r\n"),
    "version 1.10": (400, b"GET /users HTTP/1.10\r\nHost: shop\r\n\r\n"),
    "version 1.2": (505, b"GET /users HTTP/1.2\r\nHost: shop\r\n\r\n"),
    "version 2.0": (505, b"GET /users HTTP/2.0\r\nHost: shop\r\n\r\n"),
    "http/2 preface": (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "tls hello": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    # the target, RFC 9112 3.2
    "asterisk": (400, b"OPTIONS * HTTP/1.1\r\nHost: shop\r\n\r\n"),
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
    "name no token": (400, HEAD + b"A(b): c\r\n\r\n"),
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
    "length and chunked": (400, POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "chunked on 1.0": (400, b"POST /users HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "chunked twice": (400, POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"),
    "chunked in two fields": (400, POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "chunked not last": (400, POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n"),
    "no coding": (400, POST + b"Transfer-Encoding:\r\n\r\n0\r\n\r\n"),
    "gzip": (501, POST + b"Transfer-Encoding: gzip\r\n\r\n0\r\n\r\n"),
    "gzip, chunked": (501, POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    "xchunked": (501, POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
    "identity": (501, POST + b"Transfer-Encoding: identity\r\n\r\n"),
    "chunk without size": (400, POST + b"Transfer-Encoding: chunked\r\n\r\n\r\nabc\r\n0\r\n\r\n"),
    "chunk of size -1": (400, POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n"),
    "chunk of size 0x3": (400, POST + b"Transfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n"),
    "chunk too long": (400, POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n"),
    "chunk with bare LF": (400, POST + b"Transfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n"),
    "bad trailer": (400, POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nA b\r\n\r\n"),
    # limits, and what is not meant
    "line over 8 KiB": (414, b"GET /" + b"u" * 8192 + b" HTTP/1.1\r\nHost: shop\r\n\r\n"),
    "endless line": (414, b"GET /" + b"u" * 100_000),
    "head over 32 KiB": (431, HEAD + b"A: " + b"b" * 32768 + b"\r\n\r\n"),
    "101 fields": (431, HEAD + b"A: b\r\n" * 100 + b"\r\n"),
    "body over 1 MiB": (413, POST + b"Content-Length: 1048577\r\n\r\n"),
    "length of 30 digits": (413, POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n"),
    "chunk over 1 MiB": (413, POST + b"Transfer-Encoding: chunked\r\n\r\n100001\r\n"),
    "chunk of 16 digits": (413, POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n"),
    "expectation": (417, HEAD + b"Expect: the-unexpected\r\n\r\n"),
}


class HostileTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        users = cls.enterClassContext(running(Users))
        urls = {f"{name}_url": [f"http://127.0.0.1:{users.server_port}"] for name in ("users", "products", "orders")}
        gateway = cls.enterClassContext(running(Gateway, timeout=5.0, **urls))
        cls.ports = {"service": users.server_port, "gateway": gateway.server_port}

    def test_each_malformed_request_gets_its_one_refusal(self):
        for at, port in self.ports.items():
            for name, (status, data) in MALFORMED.items():
                with self.subTest(name, at=at):
                    answers = exchange(port, data + VALID)
                    self.assertEqual([answer.status for answer in answers], [status])
                    self.assertEqual(answers[0].headers["content-type"], "application/problem+json")
                    self.assertEqual(answers[0].headers["connection"], "close")
                    self.assertEqual(answers[0].json["status"], status)
                    self.assertEqual(answers[0].json["requestId"], answers[0].headers["x-request-id"])

    def test_what_can_only_be_refused_is_refused_before_it_ends(self):
        for at, port in self.ports.items():
            for name in ("tls hello", "LF alone", "endless line", "body over 1 MiB", "chunk over 1 MiB"):
                with self.subTest(name, at=at), Wire(port) as connection:
                    status, data = MALFORMED[name]
                    connection.send(data)
                    self.assertEqual(connection.read().status, status)

    def test_no_path_reaches_another_resource_than_its_text(self):
        for at, port in self.ports.items():
            for target in (b"/users/../users", b"/./users", b"/users/.", b"/x/../users", b"/users/%2e%2e/users",
                           b"/%75sers", b"/users%2f1", b"/users%2F..%2Fusers", b"//users", b"/users//1", b"/users;x",
                           b"/Users",
                           b"/users\\..\\users", b"/users/1/..", b"/users/%31"):
                with self.subTest(target, at=at):
                    answer, = exchange(port, b"GET " + target + b" HTTP/1.1\r\nHost: shop\r\n\r\n")
                    self.assertEqual(answer.status, 404)

    def test_an_absolute_target_is_its_path(self):
        for at, port in self.ports.items():
            for target in (b"http://elsewhere/users", b"HTTP://elsewhere:80/users", b"http://[::1]:80/users"):
                with self.subTest(target, at=at):
                    answer, = exchange(port, b"GET " + target + b" HTTP/1.1\r\nHost: shop\r\n\r\n")
                    self.assertEqual(answer.json, [{"id": 1, "name": "Alice"}, {"id": 2, "name": "Bob"}])

    def test_a_service_outlives_it_all(self):
        for port in self.ports.values():
            self.assertEqual([answer.status for answer in exchange(port, VALID + b"\r\n" + VALID)], [200, 200])


if __name__ == "__main__":
    unittest.main()
