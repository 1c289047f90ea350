"""Service and Handler over real sockets, with a little service of the tests' own."""
import contextlib
import io
import math
import os
import select
import signal
import socket
import tempfile
import threading
import time
import unittest
from pathlib import Path
from unittest import mock

from microshop.chassis import database, handler, listener, server, wire
from microshop.chassis.handler import Answer, Handler
from microshop.chassis.server import Service
from tests.helpers import PATIENCE, Wire, ask, exchange, process, running, wait_until

GET = b"GET /things HTTP/1.1\r\nHost: shop\r\n\r\n"
POST = b"POST /things HTTP/1.1\r\nHost: shop\r\nContent-Type: application/json\r\n"
TRY = "try /things, /things/{id}, /deadline, /pages, /large, /fail, /split, /wait, /health"


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has taken; nothing on a system that does not tell in this way."""
    with contextlib.suppress(FileNotFoundError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


class ThingsHandler(Handler):
    def list_things(self) -> Answer:
        return Answer([{"id": 1, "name": "Zoë"}])

    def echo(self) -> Answer:
        return Answer(self.read_json(), 201)

    def get_thing(self, thing_id: int) -> Answer:
        return Answer({"id": thing_id})

    def remove_thing(self, thing_id: int) -> Answer:
        return Answer(status=204)

    def page(self) -> Answer:
        return self.answer_page(lambda page: [{"id": n} for n in range(page.after + 1, page.after + page.limit + 2)])

    def fail(self) -> Answer:
        raise RuntimeError("secret\n2026-01-01T00:00:00.000Z things forged GET /")

    def tell_deadline(self) -> Answer:
        return Answer(self.deadline - time.monotonic())

    def split(self) -> Answer:
        return Answer({}, headers=[("Location", "/x\r\nSet-Cookie: a=b")])

    def tell_a_lot(self) -> Answer:
        return Answer("x" * 20_000_000)

    def wait(self) -> Answer:
        self.server.waiting.release()
        self.server.go_on.wait(PATIENCE)
        return Answer("waited")

    routes = {
        "/things": {"GET": list_things, "POST": echo},
        "/things/{id}": {"GET": get_thing, "DELETE": remove_thing},
        "/deadline": {"GET": tell_deadline}, "/pages": {"GET": page},
        "/large": {"GET": tell_a_lot}, "/fail": {"GET": fail}, "/split": {"GET": split}, "/wait": {"GET": wait},
    }


class Things(Service):
    name, handler = "things", ThingsHandler

    def __init__(self, settings):
        super().__init__(settings)
        self.waiting, self.go_on = threading.Semaphore(0), threading.Event()


class ServerTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.service = cls.enterClassContext(running(Things))
        cls.port = cls.service.server_port

    def ask(self, *request, **more):
        return ask(self.port, *request, **more)


class RouteTest(ServerTest):
    def test_json_is_compact_utf8_and_says_so(self):
        answer = self.ask("GET", "/things")
        self.assertEqual(answer.body, '[{"id":1,"name":"Zoë"}]'.encode())
        self.assertEqual(answer.headers["content-type"], "application/json; charset=utf-8")

    def test_a_trailing_slash_is_the_same_resource_and_two_are_not(self):
        self.assertEqual(self.ask("GET", "/things/").body, self.ask("GET", "/things").body)
        self.assertEqual(self.ask("GET", "/things/7/").json, {"id": 7})
        self.assertEqual(self.ask("GET", "/things//").status, 404)

    def test_an_id_is_an_integer_above_zero_without_ornament(self):
        for text in ("0", "01", "-1", "+1", "1.0", "x", "1e3", "%31", "99999999999999999", "²"):
            with self.subTest(text):
                self.assertEqual(self.ask("GET", f"/things/{text}" if text != "²" else "/things/%C2%B2").status, 404)

    def test_an_id_is_one_that_every_client_can_hold(self):
        self.assertEqual(self.ask("GET", "/things/9007199254740991").json, {"id": 2**53 - 1})
        for number in (2**53, 2**53 + 1, 2**63, 10**16 - 1):
            with self.subTest(number):
                answer = self.ask("GET", f"/things/{number}")
                self.assertEqual((answer.status, answer.json["detail"]),
                                 (404, f"there is nothing at /things/{number}; {TRY}"))

    def test_head_is_get_without_its_body(self):
        got, headed = self.ask("GET", "/things"), self.ask("HEAD", "/things")
        self.assertEqual((headed.status, headed.body), (200, b""))
        for name in ("content-length", "content-type", "etag"):
            self.assertEqual(headed.headers[name], got.headers[name])

    def test_a_method_without_a_route_is_405_with_allow(self):
        for method in ("PUT", "BREW", "TRACE", "get"):
            with self.subTest(method):
                answer = self.ask(method, "/things")
                self.assertEqual((answer.status, answer.headers["allow"]), (405, "OPTIONS, GET, HEAD, POST"))

    def test_options_tells_the_methods(self):
        answer = self.ask("OPTIONS", "/things/5")
        self.assertEqual((answer.status, answer.headers["allow"], answer.body),
                         (204, "OPTIONS, GET, HEAD, DELETE", b""))
        self.assertNotIn("content-length", answer.headers)

    def test_an_unknown_path_is_a_problem_that_names_it(self):
        answer = self.ask("GET", "/nothing")
        self.assertEqual(answer.headers["content-type"], "application/problem+json")
        self.assertEqual(answer.json, {"type": "about:blank", "title": "Not Found", "status": 404,
                                       "detail": f"there is nothing at /nothing; {TRY}",
                                       "requestId": answer.headers["x-request-id"]})

    def test_health_is_ok(self):
        answer = self.ask("GET", "/health")
        self.assertEqual((answer.status, answer.json), (200, {"status": "ok", "service": "things"}))

    def test_an_answer_tells_no_versions(self):
        self.assertNotIn("server", self.ask("GET", "/things").headers)

    def test_an_etag_that_is_known_is_304_without_body(self):
        etag = self.ask("GET", "/things").headers["etag"]
        self.assertRegex(etag, 'W/"[0-9a-f]{16}"')
        for known in (etag, etag[2:], f'"other", {etag}', "*"):
            with self.subTest(known):
                answer = self.ask("GET", "/things", {"If-None-Match": known})
                self.assertEqual((answer.status, answer.body, answer.headers["etag"]), (304, b"", etag))
        self.assertEqual(self.ask("GET", "/things", {"If-None-Match": '"other"'}).status, 200)

    def test_a_fault_is_a_500_whose_traceback_goes_to_the_log_alone(self):
        with mock.patch("sys.stderr", io.StringIO()) as log:
            answer = self.ask("GET", "/fail")
            self.service.log.flush()
        self.assertEqual(answer.status, 500)
        self.assertNotIn(b"secret", answer.body)
        self.assertIn("RuntimeError: secret", log.getvalue())
        self.assertIn(answer.headers["x-request-id"], log.getvalue())
        self.assertNotIn("\n2026-01-01", log.getvalue())  # a line of the traceback passes for no entry

    def test_a_header_value_cannot_split_an_answer(self):
        with mock.patch("sys.stderr", io.StringIO()):
            answers = exchange(self.port, b"GET /split HTTP/1.1\r\nHost: shop\r\n\r\n")
            self.service.log.flush()
        self.assertEqual([answer.status for answer in answers], [500])
        self.assertNotIn("set-cookie", answers[0].headers)


class KeptThingsHandler(ThingsHandler):
    def change_thing(self, thing_id: int) -> Answer:
        with self.changing(lambda database, number: {"id": number}, thing_id):
            return Answer(status=204)

    routes = {"/things/{id}": {"GET": ThingsHandler.get_thing, "PUT": change_thing}}


class KeptThings(Things):
    handler, schema = KeptThingsHandler, [[]]  # changes take a database, though nothing is in it


class MatchTest(unittest.TestCase):
    def test_if_match_takes_strong_tags_alone(self):
        service = self.enterContext(running(KeptThings))
        tag = ask(service.server_port, "GET", "/things/7").headers["etag"]
        self.assertRegex(tag, '^"[0-9a-f]{16}"$')
        for wanted, status in (
                (tag, 204), ("*", 204), (f'"old", {tag}', 204), (f'{tag},"old"', 204), (f'W/"old", {tag}', 204),
                (f'"old"\r\nIf-Match: {tag}', 204), (f'"a, b" , {tag}', 204),
                (f"W/{tag}", 412), (f'W/{tag}, "old"', 412), ('"old"', 412), ("", 412), ('"*"', 412), ('""', 412),
                (tag.strip('"'), 412), (f'"{tag[1:-1]}0"', 412), (tag.replace('"', "'"), 412)):
            with self.subTest(wanted):
                head = f"PUT /things/7 HTTP/1.1\r\nHost: shop\r\nIf-Match: {wanted}\r\n\r\n"
                answer, = exchange(service.server_port, head.encode())
                self.assertEqual(answer.status, status)
        self.assertEqual(ask(service.server_port, "PUT", "/things/7").status, 204)


class BodyTest(ServerTest):
    def post(self, body, **headers):
        return self.ask("POST", "/things", {"Content-Type": "application/json", **headers}, body)

    def test_json_comes_back_as_it_was(self):
        for text in ('{"a":[1,2.5,null,true,"ü€😀"]}', "[]", "0", '"x"', "9007199254740993"):
            with self.subTest(text):
                answer = self.post(text.encode())
                self.assertEqual((answer.status, answer.body.decode()), (201, text))

    def test_what_is_no_json_is_400(self):
        for body in (b"", b"{", b"{'a':1}", b"NaN", b"[Infinity]", b"-Infinity", b"1e999", b'{"a":1,"a":2}',
                     b'"\\ud800"', b'{"\\udfff":1}', b"\xff", b'"\xc3"', b"[" * 100_000, b'{"a":' * 100_000,
                     b"9" * 5000, b"\xef\xbb\xbf{}", '{"a":1}'.encode("utf-16"), b"{} {}", b"01", b'"\n"'):
            with self.subTest(body[:20]):
                answer = self.post(body)
                self.assertEqual((answer.status, answer.headers["content-type"]), (400, "application/problem+json"))
                self.assertRegex(answer.json["detail"], "^the body is not valid JSON: ")

    def test_the_media_type_must_be_json(self):
        for given in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx",
                      "application/json; charset=latin-1"):
            with self.subTest(given):
                self.assertEqual(self.ask("POST", "/things", {"Content-Type": given}, b"{}").status, 415)
        self.assertEqual(self.ask("POST", "/things", {}, b"{}").status, 415)
        self.assertEqual(self.post(b"{}", **{"Content-Encoding": "gzip"}).status, 415)
        for given in ("application/json", "Application/JSON;charset=UTF-8", 'application/json; charset="utf-8"'):
            with self.subTest(given):
                self.assertEqual(self.ask("POST", "/things", {"Content-Type": given}, b"{}").status, 201)

    def test_a_body_is_needed_where_one_is_read(self):
        answer, = exchange(self.port, POST + b"\r\n")
        self.assertEqual(answer.status, 411)

    def test_a_chunked_body_is_read(self):
        answer, = exchange(self.port, POST + b"Transfer-Encoding: chunked\r\n\r\n"
                           b"3;x=y\r\n[1,\r\n2\r\n2]\r\n0\r\nA: b\r\n\r\n")
        self.assertEqual((answer.status, answer.body), (201, b"[1,2]"))

    def test_a_body_that_ends_short_is_not_acted_on(self):
        answer, = exchange(self.port, POST + b"Content-Length: 5\r\n\r\n[1]")
        self.assertEqual(answer.status, 400)

    def test_a_body_nobody_reads_never_passes_for_a_request(self):
        smuggled = b"GET /things/666 HTTP/1.1\r\nHost: shop\r\n\r\n"
        framings = (b"Content-Length: %d\r\n\r\n%b" % (len(smuggled), smuggled),
                    b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(smuggled), smuggled))
        for line in (b"GET /things", b"POST /nothing", b"PUT /things", b"DELETE /things/1", b"HEAD /things"):
            for framing in framings:
                with self.subTest(line + framing[:8]):
                    head = line + b" HTTP/1.1\r\nHost: shop\r\n"
                    with Wire(self.port) as connection:
                        connection.send(head + framing + GET)
                        first, second = connection.read(line[:4].decode().strip()), connection.read()
                    self.assertEqual(second.body, '[{"id":1,"name":"Zoë"}]'.encode(), first)

    def test_a_body_too_large_is_refused_before_it_is_sent(self):
        with Wire(self.port) as connection:
            connection.send(POST + b"Content-Length: 1048577\r\nExpect: 100-continue\r\n\r\n")
            self.assertEqual(connection.read().status, 413)
            self.assertTrue(connection.is_closed())

    def test_the_answer_arrives_although_the_client_still_sends(self):
        body = b"x" * 4_000_000
        answer, = exchange(self.port, POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self.assertEqual(answer.status, 413)

    def test_the_largest_body_is_read(self):
        body = b'"' + b"x" * (wire.MAX_BODY - 2) + b'"'
        self.assertEqual(self.post(body).status, 201)
        self.assertEqual(self.post(body + b" ").status, 413)

    def test_a_client_that_asks_is_told_to_go_on(self):
        with Wire(self.port) as connection:
            connection.send(POST + b"Content-Length: 3\r\nExpect: 100-Continue\r\n\r\n")
            self.assertEqual(connection.read().status, 100)
            connection.send(b"[1]")
            self.assertEqual(connection.read().status, 201)

    def test_another_expectation_is_417_and_http_1_0_has_none(self):
        for line, status in ((b"GET /things HTTP/1.1", 417), (b"GET /things HTTP/1.0", 200)):
            answer, = exchange(self.port, line + b"\r\nHost: shop\r\nExpect: miracles\r\n\r\n")
            self.assertEqual(answer.status, status)


class PageTest(ServerTest):
    def test_a_page_has_a_link_to_the_next(self):
        answer = self.ask("GET", "/pages?limit=2&after=5&ids=6,7,8")
        self.assertEqual(answer.json, [{"id": 6}, {"id": 7}])
        self.assertEqual(answer.headers["link"], '</pages?limit=2&after=7&ids=6,7,8>; rel="next"')

    def test_a_hundred_rows_come_unless_told_otherwise(self):
        self.assertEqual(len(self.ask("GET", "/pages").json), 100)
        self.assertEqual(len(self.ask("GET", "/pages?limit=1000").json), 1000)

    def test_a_bad_parameter_is_400_and_named(self):
        for query, name in (("limit=0", "limit"), ("limit=1001", "limit"), ("limit=x", "limit"), ("limit=", "limit"),
                            ("after=-1", "after"), ("after=9007199254740992", "after"), ("after=1.0", "after"),
                            ("ids=", "ids"), ("ids=1,,2", "ids"), ("ids=0", "ids"), ("ids=1%202", "ids"),
                            ("ids=1,0", "ids"), ("ids=9007199254740992", "ids"), ("ids=1,9007199254740992", "ids"),
                            ("ids=" + "1," * 1000 + "1", "ids"), ("limit=1&limit=2", "twice"), ("a=%ff", "query"),
                            ("limit=%D9%A3", "limit"), ("&".join(f"a{n}=1" for n in range(101)), "query")):
            with self.subTest(query[:30]):
                answer = self.ask("GET", f"/pages?{query}")
                self.assertEqual(answer.status, 400)
                self.assertIn(name, answer.json["detail"])


class DeadlineTest(ServerTest):
    def test_a_request_may_be_worked_on_for_less_than_its_caller_waits(self):
        for given, most in (("2", 1.8), ("1.000", 0.9), ("0.5", 0.45), ("3600", 5), ("999999.999999", 5), (None, 5)):
            left = self.ask("GET", "/deadline", {"X-Request-Timeout": given} if given else {}).json
            self.assertTrue(most - 0.3 < left <= most, given)

    def test_one_whose_time_is_spent_is_not_worked_on(self):
        for given in ("0", "0.000"):
            answer = self.ask("POST", "/things", {"X-Request-Timeout": given, "Content-Type": "application/json"}, b"1")
            self.assertEqual((answer.status, answer.headers["retry-after"]), (503, "1"))

    def test_a_time_that_makes_no_sense_is_refused_and_the_connection_goes_on(self):
        for given in ("soon", "-1", "1e3", "", "1 s", "nan", "1234567", "1, 2", "."):
            with self.subTest(given):
                one, two = exchange(self.port, GET[:-2] + f"X-Request-Timeout: {given}\r\n\r\n".encode() + GET)
                self.assertEqual((one.status, two.status), (400, 200))
                self.assertEqual(one.json["detail"], f"X-Request-Timeout: {given!r} is not a number of seconds")


class WarningTest(unittest.TestCase):
    def test_who_listens_to_all_the_world_without_a_token_is_warned(self):
        for host, token, warnings in (("127.0.0.1", "", 0), ("localhost", "", 0), ("0.0.0.0", "", 1),
                                      ("0.0.0.0", "t", 0)):
            with (self.subTest(host, token=token), contextlib.redirect_stderr(io.StringIO()) as log,
                  contextlib.redirect_stdout(io.StringIO()), running(Things, host=host) as things,
                  mock.patch.object(things, "serve_forever"), mock.patch.object(things, "drain"),
                  mock.patch.object(signal, "signal")):
                things.token = token
                things.run()
            self.assertEqual(log.getvalue().count(f"warning: other machines can reach port {things.server_port}"), warnings)


class ConnectionTest(ServerTest):
    def test_a_connection_is_kept_and_pipelined_requests_are_answered_in_order(self):
        requests = [b"GET /things/%d HTTP/1.1\r\nHost: shop\r\n\r\n" % n for n in range(1, 30)]
        answers = exchange(self.port, b"".join(requests))
        self.assertEqual([answer.json["id"] for answer in answers], list(range(1, 30)))

    def test_connection_close_is_obeyed_and_answered(self):
        for field in (b"close", b"Close", b"keep-alive, close", b"x\r\nConnection: close"):
            with self.subTest(field):
                answers = exchange(self.port, GET[:-2] + b"Connection: " + field + b"\r\n\r\n" + GET)
                self.assertEqual([answer.headers.get("connection") for answer in answers], ["close"])

    def test_http_1_0_closes_unless_told_to_keep_alive(self):
        plain = b"GET /things HTTP/1.0\r\n\r\n"
        kept = b"GET /things HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
        self.assertEqual(len(exchange(self.port, plain + GET)), 1)
        answers = exchange(self.port, kept + kept + plain)
        self.assertEqual([answer.headers["connection"] for answer in answers], ["keep-alive", "keep-alive", "close"])

    def test_an_answer_is_one_write(self):
        writes = []

        class Spy(ThingsHandler):
            def setup(self):
                super().setup()
                send = self.stream.send
                self.stream.send = lambda data: writes.append(data) or send(data)

        with mock.patch.object(self.service, "RequestHandlerClass", Spy):
            exchange(self.port, GET + GET)
        self.assertEqual(len(writes), 2)

    def test_nagle_is_off(self):
        with running(Things) as service, Wire(service.server_port) as connection:  # others may still linger elsewhere
            connection.send(GET)
            connection.read()
            served, = [*service.connections._busy, *service.connections._idle_since]
            self.assertTrue(served.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    def test_two_hundred_clients_that_come_at_once_are_all_served(self):
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(Wire(self.port)) for _ in range(200)]
            for connection in connections:
                connection.send(GET)
            self.assertEqual({connection.read().status for connection in connections}, {200})
        self.assertGreaterEqual(Service.request_queue_size, 1024)

    def test_a_request_that_does_not_come_whole_is_408(self):
        for begun in (GET[:-2], POST + b"Content-Length: 5\r\n\r\n[1"):
            with self.subTest(begun[-10:]), mock.patch.multiple(handler, HEAD_TIME=0.05, BODY_TIME=0.05):
                with Wire(self.port) as connection:
                    connection.send(begun)
                    self.assertEqual(connection.read().status, 408)
                    self.assertTrue(connection.is_closed())

    def test_a_body_has_time_by_its_size_whether_told_at_once_or_in_chunks(self):
        slowly = [b"Content-Length: 8\r\n\r\n", *[b"%d" % n for n in range(10, 50, 10)]]
        in_chunks = [b"Transfer-Encoding: chunked\r\n\r\n", *[b"2\r\n%d\r\n" % n for n in range(10, 50, 10)]]
        for rate, statuses in ((10, {201}), (10_000, {408})):
            with mock.patch.multiple(handler, BODY_TIME=0.1, BODY_RATE=rate):
                for first, *parts in (slowly, [in_chunks[0], *in_chunks[1:-1], in_chunks[-1] + b"0\r\n\r\n"]):
                    with self.subTest(first, rate=rate), Wire(self.port) as connection:
                        connection.send(POST + first)
                        for part in parts:
                            threading.Event().wait(0.06)  # 0.24 s in all, and 8 bytes
                            connection.send(part)
                        self.assertIn(connection.read().status, statuses)

    def test_bytes_that_trickle_do_not_prolong_the_time_for_a_head(self):
        with mock.patch.object(handler, "HEAD_TIME", 0.2), Wire(self.port) as connection:
            began = time.monotonic()
            while not select.select([connection.socket], [], [], 0.03)[0]:
                connection.send(b"G")
            self.assertEqual(connection.read().status, 408)
            self.assertLess(time.monotonic() - began, 1)

    def test_a_client_that_does_not_read_is_given_up(self):
        with (mock.patch.object(handler, "SEND_TIME", 0.2), mock.patch.object(wire, "LINGER", 2 * PATIENCE),
              running(Things) as service, Wire(service.server_port) as connection):
            connection.send(b"GET /large HTTP/1.1\r\nHost: shop\r\n\r\n")
            wait_until(lambda: service.connections)
            wait_until(lambda: not service.connections)

    def test_how_long_a_connection_may_idle_is_announced(self):
        kept, closed = exchange(self.port, GET + GET[:-2] + b"Connection: close\r\n\r\n")
        self.assertEqual(kept.headers["keep-alive"], "timeout=60")
        self.assertNotIn("keep-alive", closed.headers)

    def test_a_silent_connection_just_closes(self):
        with mock.patch.object(handler, "IDLE_TIME", 0.05), Wire(self.port) as connection:
            self.assertTrue(connection.is_closed())

    def test_a_name_server_is_never_asked(self):
        lookup = mock.Mock(side_effect=AssertionError)
        with mock.patch.multiple(socket, getfqdn=lookup, gethostbyaddr=lookup), running(Things) as service:
            self.assertEqual(ask(service.server_port, "GET", "/things").status, 200)

    def test_a_client_that_is_gone_before_it_is_served_leaves_no_traceback(self):
        with mock.patch("sys.stderr", io.StringIO()) as log:
            for fault, told in ((OSError, False), (RuntimeError, True)):
                with mock.patch.object(wire, "Stream", side_effect=fault), Wire(self.port) as connection:
                    self.assertTrue(connection.is_closed())
                self.service.log.flush()
                self.assertEqual("Traceback" in log.getvalue(), told)

    def test_a_client_that_resets_leaves_no_traceback(self):
        with mock.patch("sys.stderr", io.StringIO()) as log:
            for data in (b"", GET[:10], GET * 50, POST + b"Content-Length: 9\r\n\r\n"):
                with Wire(self.port) as connection:
                    connection.send(data)
                    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            ask(self.port, "GET", "/things")
            self.service.log.flush()
        self.assertNotIn("Traceback", log.getvalue())


class RoomTest(unittest.TestCase):
    """A service whose connections are counted."""

    def keep(self, service: Things, number: int) -> list[Wire]:
        """Return connections that have been answered once, and wait."""
        wires = [self.enterContext(Wire(service.server_port)) for _ in range(number)]
        for wire_ in wires:
            wire_.send(GET)
            self.assertEqual(wire_.read().status, 200)
        return wires

    def hold(self, service: Things) -> Wire:
        """Return a connection whose request is being worked on."""
        busy = self.enterContext(Wire(service.server_port))
        busy.send(b"GET /wait HTTP/1.1\r\nHost: shop\r\n\r\n")
        self.assertTrue(service.waiting.acquire(timeout=PATIENCE))
        return busy

    def test_the_connection_that_has_idled_for_longest_makes_room(self):
        service = self.enterContext(running(Things, max_connections=3))
        busy, (first, second) = self.hold(service), self.keep(service, 2)
        wait_until(lambda: service.connections.count_busy() == 1)
        first.send(GET)
        self.assertEqual(first.read().status, 200)  # now it is the second that has waited for longest
        wait_until(lambda: service.connections.count_busy() == 1)
        newcomer = self.enterContext(Wire(service.server_port))
        newcomer.send(GET)
        self.assertEqual(newcomer.read().status, 200)
        self.assertTrue(second.is_closed())
        first.send(GET)
        self.assertEqual(first.read().status, 200)
        service.go_on.set()
        self.assertEqual(busy.read().status, 200)

    def test_where_none_idles_the_newcomer_is_turned_away_at_once_and_without_a_thread(self):
        service = self.enterContext(running(Things, max_connections=2))
        busy = [self.hold(service) for _ in range(2)]
        threads = threading.active_count()
        with mock.patch.object(wire, "LINGER", 0.1):
            newcomers = [self.enterContext(Wire(service.server_port)) for _ in range(5)]
            for newcomer in newcomers:
                newcomer.send(GET)  # it reads nothing of that, but must not reset the connection for it
                answer = newcomer.read()
                self.assertEqual((answer.status, answer.headers["retry-after"], answer.headers["connection"]),
                                 (503, "1", "close"))
                self.assertEqual(answer.json["requestId"], answer.headers["x-request-id"])
                self.assertTrue(newcomer.is_closed())
                for _ in range(3):
                    newcomer.socket.sendall(GET)  # as one would that has not read the answer yet
                    threading.Event().wait(0.001)
            self.assertEqual(threading.active_count(), threads)
            wait_until(lambda: not service.rejected)
        service.go_on.set()
        self.assertEqual([wire_.read().status for wire_ in busy], [200, 200])
        wait_until(lambda: not service.connections.count_busy())  # a client may be told before that is noted
        self.keep(service, 2)

    def test_a_connection_that_idles_holds_nothing_of_what_came(self):
        handlers = []

        class Spy(ThingsHandler):
            def setup(self):
                super().setup()
                handlers.append(self)

        service = self.enterContext(running(Things))
        with mock.patch.object(service, "RequestHandlerClass", Spy):
            client, body = self.enterContext(Wire(service.server_port)), b'"%s"' % (b"x" * 500_000)
            client.send(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            self.assertEqual(client.read().status, 201)
            wait_until(lambda: (handlers[0].body, handlers[0].stream._buffer) == (b"", b""))

    def test_those_turned_away_hold_only_so_many_descriptors(self):
        service = self.enterContext(running(Things, max_connections=1))
        self.hold(service)
        with mock.patch.object(listener, "MAX_REJECTED", 5), mock.patch.object(wire, "LINGER", 2 * PATIENCE):
            for _ in range(20):
                self.enterContext(Wire(service.server_port)).read()
            wait_until(lambda: len(service.rejected) <= 5)
        service.go_on.set()

    def test_who_only_lingers_makes_room(self):
        service = self.enterContext(running(Things, max_connections=1))
        with mock.patch.object(wire, "LINGER", PATIENCE):
            lingering = self.enterContext(Wire(service.server_port))
            lingering.send(b"nonsense\r\n\r\n")
            self.assertEqual(lingering.read().status, 400)
            wait_until(lambda: not service.connections.count_busy())
            began = time.monotonic()
            self.keep(service, 1)
            self.assertLess(time.monotonic() - began, PATIENCE / 2)

    def test_where_no_thread_is_to_be_had_the_newcomer_is_turned_away(self):
        with contextlib.redirect_stderr(io.StringIO()) as log:
            service = self.enterContext(running(Things))
            with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
                self.assertEqual(self.enterContext(Wire(service.server_port)).read().status, 503)
            self.assertEqual(len(service.connections), 0)
            self.keep(service, 1)
            service.log.flush()
        self.assertEqual(log.getvalue().count("no room for another connection: can't start new thread"), 1)

    def test_many_slow_clients_leave_nothing_behind(self):
        service = self.enterContext(running(KeptThings))
        threads, descriptors = threading.active_count(), len(os.listdir("/dev/fd"))
        for _ in range(3):
            wires = [Wire(service.server_port) for _ in range(100)]
            one = GET.replace(b"things", b"things/7")
            for part in (one[:9], one[9:], one + one[:20], one[20:] + one[:5]):
                for wire_ in wires:
                    wire_.send(part)
            for wire_ in wires:
                self.assertEqual([wire_.read().status for _ in range(3)], [200, 200, 200])
                wire_.__exit__()
            wait_until(lambda: threading.active_count() == threads and not service.connections)
        self.assertLessEqual(len(os.listdir("/dev/fd")), descriptors + 2 * database.CONNECTIONS)


@unittest.skipUnless(server.resource, "this system has no limits for a process")
class NoDescriptorsTest(unittest.TestCase):
    """A service, in a process of its own, that may have only so many descriptors."""

    @contextlib.contextmanager
    def running_users(self, least, most):
        """Yield a service that begins with `least` descriptors and may have `most`, and its port."""
        limited = (f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({least}, {most}))\n"
                   "from microshop.users import Users; Users.main()")
        with (tempfile.TemporaryDirectory() as folder,
              process("tests.after", limited, "--port", "0", "--data", folder) as users):
            yield users, users.port("Users service")

    def test_the_accept_loop_neither_spins_nor_dies_and_goes_on_when_there_is_room(self):
        with self.running_users(60, 60) as (users, port):
            with contextlib.ExitStack() as stack:
                busy = [stack.enter_context(Wire(port)) for _ in range(60)]
                for wire_ in busy:
                    wire_.send(GET[:20])  # a request that has begun: none of them may be closed to make room
                users.wait_for("no room for another connection: Too many open files")
                spent = cpu_seconds(users.popen.pid)
                threading.Event().wait(0.5)
                self.assertLess(cpu_seconds(users.popen.pid) - spent, 0.2)
                self.assertEqual(sum("no room" in line for line in users.lines), 1)
            self.assertEqual(ask(port, target="/users").status, 200)
            with contextlib.ExitStack() as stack:
                idle = [stack.enter_context(Wire(port)) for _ in range(60)]
                newcomer = stack.enter_context(Wire(port))  # those that idle make room for it
                newcomer.send(b"GET /health HTTP/1.1\r\nHost: shop\r\n\r\n")  # which needs no file
                self.assertEqual(newcomer.read().status, 200)
                self.assertTrue(idle[0].is_closed())
            self.assertEqual(users.stop(), 0)

    def test_a_process_takes_as_many_descriptors_as_it_may(self):
        with self.running_users(60, 200) as (users, port):
            with contextlib.ExitStack() as stack:
                wires = [stack.enter_context(Wire(port)) for _ in range(100)]
                for wire_ in reversed(wires):
                    wire_.send(b"GET /users HTTP/1.1\r\nHost: shop\r\n\r\n")
                    self.assertEqual(wire_.read().status, 200)
            self.assertEqual([line for line in users.lines if "no room" in line], [])


class SupervisedTest(unittest.TestCase):
    """A service that serves on a socket of its supervisor's."""

    def setUp(self):
        self.listener = self.enterContext(socket.create_server(("127.0.0.1", 0)))
        self.ours, theirs = socket.socketpair()
        self.enterContext(self.ours)
        self.ours.settimeout(PATIENCE)
        self.handles = [os.dup(self.listener.fileno()), theirs.detach()]
        self.port = self.listener.getsockname()[1]

    def test_it_serves_there_shows_life_and_ends_when_nobody_looks(self):
        service = self.enterContext(running(Things, supervised=self.handles))
        self.assertEqual(ask(self.port, target="/things").status, 200)
        with mock.patch.object(server, "HEARTBEAT", 0.01), mock.patch.object(service, "shutdown") as shutdown:
            self.assertEqual([self.ours.recv(1) for _ in range(3)], [b"."] * 3)
            self.ours.close()
            wait_until(lambda: shutdown.called)

    def test_a_supervisor_that_stands_still_does_not_hold_it_up(self):
        with mock.patch.object(server, "HEARTBEAT", 0):
            service = self.enterContext(running(Things, supervised=self.handles))
            beats = mock.Mock(wraps=service.heart._supervisor)
            beats.send.side_effect = BlockingIOError
            with mock.patch.object(service.heart, "_supervisor", beats):
                wait_until(lambda: beats.send.call_count > 3)
                self.assertEqual(ask(self.port, target="/things").status, 200)

    def test_who_comes_between_two_services_on_one_socket_waits_for_the_second(self):
        with running(Things, supervised=self.handles) as first:
            first.shutdown()
            first.drain()
            with Wire(self.port) as waiting:
                waiting.send(GET)
                handles = [os.dup(self.listener.fileno()), self.ours.detach()]
                self.enterContext(running(Things, supervised=handles))
                self.assertEqual(waiting.read().status, 200)

    def test_two_services_on_one_socket_do_not_hold_each_other_up(self):
        others = [os.dup(self.listener.fileno()), self.ours.detach()]
        with running(Things, supervised=self.handles), running(Things, supervised=others):
            for _ in range(50):
                self.assertEqual(ask(self.port, target="/things").status, 200)


class LogTest(unittest.TestCase):
    LINE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z things [A-Za-z0-9._-]{1,64} \S+ \S+ \d{3} \d+\.\dms"

    def logged(self, *requests):
        with mock.patch("sys.stderr", io.StringIO()) as log:
            with running(Things, quiet=False) as service:
                for request in requests:
                    exchange(service.server_port, request)
            service.log.flush()
        return log.getvalue().splitlines()

    def test_each_request_is_a_line(self):
        first, second = self.logged(GET[:-2] + b"X-Request-Id: order-7\r\n\r\n", b"HEAD /nothing?a=b HTTP/1.0\r\n\r\n")
        self.assertRegex(first, f"^{self.LINE}$")
        self.assertIn(" order-7 GET /things 200 ", first)
        self.assertRegex(second, f"^{self.LINE}$")
        self.assertIn(" HEAD /nothing?a=b 404 ", second)

    def test_no_request_can_forge_a_line(self):
        forged = "2026-01-01T00:00:00.000Z things x GET / 200 1.0ms"
        lines = self.logged(
            b"GET /\r" + forged.encode() + b" HTTP/1.1\r\n\r\n", b"GET /a\x1b[2J HTTP/1.1\r\n\r\n",
            b"GET /a\x85\xa0b HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\r\n\r\n", b" \r\n\r\n", b"a b c d e\r\n\r\n",
            GET[:-2] + b"X-Request-Id: a b\r\n\r\n", GET[:-2] + b"X-Request-Id: " + b"x" * 65 + b"\r\n\r\n")
        self.assertEqual(len(lines), 8)
        for line in lines:
            self.assertRegex(line, f"^{self.LINE}$")
            self.assertTrue(line.isascii() and line.isprintable(), line)

    def test_quiet_leaves_requests_out(self):
        with mock.patch("sys.stderr", io.StringIO()) as log, running(Things, quiet=True) as service:
            exchange(service.server_port, GET)
            service.log.flush()
        self.assertEqual(log.getvalue(), "")

    def test_a_request_id_is_answered_or_made(self):
        with running(Things) as service:
            given = ask(service.server_port, "GET", "/things", {"X-Request-Id": "a.B-c_9"})
            made = [ask(service.server_port, "GET", "/things", {"X-Request-Id": bad}).headers["x-request-id"]
                    for bad in ("", "a b", "x" * 65, "ü", "a,b")]
        self.assertEqual(given.headers["x-request-id"], "a.B-c_9")
        self.assertEqual(len(set(made)), 5)
        for request_id in made:
            self.assertRegex(request_id, "^[0-9a-f]{16}$")


class EndTest(unittest.TestCase):
    def test_what_is_in_flight_is_finished_and_idle_connections_are_closed(self):
        with running(Things) as service, Wire(service.server_port) as busy, Wire(service.server_port) as idle:
            idle.send(GET)
            idle.read()
            busy.send(b"GET /wait HTTP/1.1\r\nHost: shop\r\n\r\n")
            self.assertTrue(service.waiting.acquire(timeout=PATIENCE))
            service.shutdown()
            draining = threading.Thread(target=service.drain)
            draining.start()
            self.assertTrue(idle.is_closed())
            self.assertTrue(draining.is_alive())
            service.go_on.set()
            answer = busy.read()
            self.assertEqual((answer.json, answer.headers["connection"]), ("waited", "close"))
            self.assertTrue(busy.is_closed())
            draining.join(PATIENCE)
            self.assertFalse(draining.is_alive())

    def test_who_asks_again_and_again_is_told_that_the_connection_closes(self):
        with running(Things) as service, Wire(service.server_port) as connection:
            connection.send(GET)
            connection.read()
            service.shutdown()
            draining = threading.Thread(target=service.drain)
            draining.start()
            wait_until(lambda: service.draining)
            threading.Event().wait(server.LAST_LOOK / 5)
            connection.send(GET)
            answer = connection.read()
            self.assertEqual((answer.status, answer.headers["connection"]), (200, "close"))
            draining.join(PATIENCE)

    def test_a_client_that_the_kernel_has_let_in_is_served(self):
        with running(Things) as service, contextlib.ExitStack() as stack:
            service.shutdown()  # from here on nobody accepts
            waiting = [stack.enter_context(Wire(service.server_port)) for _ in range(20)]
            for connection in waiting:
                connection.send(GET)
            service.drain()
            self.assertEqual([connection.read().status for connection in waiting], [200] * 20)

    def test_a_client_whose_thread_has_hardly_begun_is_served(self):
        class LateHandler(ThingsHandler):
            def setup(self):
                self.server.waiting.release()
                self.server.go_on.wait(PATIENCE)
                super().setup()

        with running(Things) as service, mock.patch.object(service, "RequestHandlerClass", LateHandler):
            with Wire(service.server_port) as connection:
                connection.send(GET)
                self.assertTrue(service.waiting.acquire(timeout=PATIENCE))
                service.shutdown()
                draining = threading.Thread(target=service.drain)
                draining.start()
                draining.join(0.1)
                self.assertTrue(draining.is_alive())
                service.go_on.set()
                self.assertEqual(connection.read().status, 200)
                draining.join(PATIENCE)

    def test_health_is_503_while_it_drains(self):
        with running(Things) as service, Wire(service.server_port) as connection:
            connection.send(GET)
            connection.read()
            service.draining = True
            connection.send(b"GET /health HTTP/1.1\r\nHost: shop\r\n\r\n")
            answer = connection.read()
            self.assertEqual((answer.status, answer.json["status"]), (503, "draining"))
            self.assertEqual(answer.headers["content-type"], "application/json; charset=utf-8")

    def test_a_request_that_never_ends_does_not_hold_the_end_up_for_ever(self):
        with running(Things, grace=0.05) as service, Wire(service.server_port) as connection:
            connection.send(b"GET /wait HTTP/1.1\r\nHost: shop\r\n\r\n")
            self.assertTrue(service.waiting.acquire(timeout=PATIENCE))
        service.go_on.set()


if __name__ == "__main__":
    unittest.main()
