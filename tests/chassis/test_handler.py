"""One connection's requests over real sockets: routes, bodies, deadlines, and the log of them."""
import contextlib
import io
import socket
import time
import unittest
from unittest import mock

from microshop.chassis import database, handler, listener, wire
from tests.chassis.things import (
    GET, POST, THINGS, ConnectionsTest, StoredThings, Things, ThingsTest, stopped_clock)
from tests.helpers import PATIENCE, Wire, ask, exchange, flush, running, wait_until

TRY = "try /things, /things/{id}, /deadline, /pages, /large, /fail, /split, /wait, /health"
PROBLEM = "application/problem+json"


class RouteTest(ThingsTest):
    def test_json_is_sent_as_compact_utf8_with_its_content_type(self):
        answer = self.ask("GET", "/things")
        self.assertEqual(answer.body, THINGS)
        self.assertEqual(answer.headers["content-type"], "application/json; charset=utf-8")

    def test_one_trailing_slash_is_ignored_and_two_are_404(self):
        self.assertEqual(self.ask("GET", "/things/").body, self.ask("GET", "/things").body)
        self.assertEqual(self.ask("GET", "/things/7/").json, {"id": 7})
        self.assertEqual(self.ask("GET", "/things//").status, 404)

    def test_an_id_in_a_path_that_is_not_a_plain_positive_integer_is_404(self):
        for text in ("0", "01", "-1", "+1", "1.0", "x", "1e3", "%31", "99999999999999999",
                     "%C2%B2"):  # a superscript two, for which str.isdigit() is true
            with self.subTest(f"GET /things/{text}"):
                self.assertEqual(self.ask("GET", f"/things/{text}").status, 404)

    def test_an_id_in_a_path_that_some_json_clients_cannot_hold_is_404(self):
        self.assertEqual(self.ask("GET", "/things/9007199254740991").json, {"id": 2**53 - 1})
        for number in (2**53, 2**53 + 1, 2**63, 10**16 - 1):
            with self.subTest(f"GET /things/{number}"):
                answer = self.ask("GET", f"/things/{number}")
                detail = f"there is nothing at /things/{number}; {TRY}"
                self.assertEqual((answer.status, answer.json["detail"]), (404, detail))

    def test_head_has_the_headers_of_get_and_no_body(self):
        got, headed = self.ask("GET", "/things"), self.ask("HEAD", "/things")
        self.assertEqual((headed.status, headed.body), (200, b""))
        for name in ("content-length", "content-type", "etag"):
            self.assertEqual(headed.headers[name], got.headers[name], name)

    def test_a_method_that_a_path_does_not_support_is_405_with_allow(self):
        for method in ("PUT", "PATCH", "TRACE", "QUERY"):
            with self.subTest(f"{method} /things"):
                answer = self.ask(method, "/things")
                self.assertEqual(answer.status, 405)
                self.assertEqual(answer.headers.get("allow"), "OPTIONS, GET, HEAD, POST")
                self.assertEqual(answer.json["detail"], f"/things does not support {method}; "
                                                        "it supports OPTIONS, GET, HEAD, POST")

    def test_a_method_that_http_does_not_have_is_501_on_every_path(self):
        for method in ("BREW", "get"):
            for path in ("/things", "/nothing"):
                with self.subTest(f"{method} {path}"):
                    self.assertEqual(self.ask(method, path).status, 501)

    def test_options_about_the_whole_server_lists_every_method(self):
        [answer] = exchange(self.port, b"OPTIONS * HTTP/1.1\r\nHost: shop\r\n\r\n")
        self.assertEqual((answer.status, answer.headers.get("allow")),
                         (204, "OPTIONS, GET, HEAD, POST, PUT, DELETE"))

    def test_options_lists_the_methods_of_a_path(self):
        answer = self.ask("OPTIONS", "/things/5")
        self.assertEqual((answer.status, answer.body), (204, b""))
        self.assertEqual(answer.headers.get("allow"), "OPTIONS, GET, HEAD, DELETE")
        self.assertNotIn("content-length", answer.headers)

    def test_an_answer_repeats_no_more_than_a_hundred_characters_of_what_a_client_sent(self):
        long = "x" * 4000
        for method, target, name, value in (
                ("GET", f"/{long}", "Accept", "*/*"), (long, "/things", "Accept", "*/*"),
                ("GET", f"/pages?limit={long}", "Accept", "*/*"),
                ("GET", "/things", "X-Request-Timeout", long)):
            with self.subTest(f"{method} {target} {name}: {value}"[:60]):
                answer = self.ask(method, target, {name: value})
                self.assertGreaterEqual(answer.status, 400)
                self.assertLess(len(answer.body), 500, answer.json["detail"][:200])
                self.assertIn("xxx...", answer.json["detail"])

    def test_an_unknown_path_is_404_with_a_problem_document_that_names_the_known_paths(self):
        answer = self.ask("GET", "/nothing")
        self.assertEqual(answer.status, 404)
        self.assertEqual(answer.headers["content-type"], PROBLEM)
        self.assertEqual(answer.json, {
            "type": "about:blank", "title": "Not Found", "status": 404,
            "detail": f"there is nothing at /nothing; {TRY}",
            "requestId": answer.headers["x-request-id"]})

    def test_a_health_check_is_answered_with_ok_and_never_from_a_cache(self):
        for path in ("/health", "/health/live"):
            with self.subTest(path):
                answer = self.ask("GET", path)
                self.assertEqual((answer.status, answer.json),
                                 (200, {"status": "ok", "service": "things"}))
                self.assertEqual(answer.headers.get("cache-control"), "no-store")

    def test_only_the_health_of_a_service_that_drains_without_a_successor_is_503(self):
        for path, is_replaced, status in (("/health", False, 503), ("/health", True, 200),
                                          ("/health/live", False, 200)):
            with (self.subTest(f"GET {path}", is_replaced=is_replaced), running(Things) as service,
                  Wire(service.server_port) as connection):
                self.get_things(connection, "a client before the drain")
                service.draining, service.is_replaced = True, is_replaced
                connection.send(f"GET {path} HTTP/1.1\r\nHost: shop\r\n\r\n".encode())
                answer = self.read(connection, f"GET {path} during the drain")
                state = "draining" if status == 503 else "ok"
                self.assertEqual((answer.status, answer.json["status"]), (status, state))
                self.assertEqual(answer.headers["content-type"], "application/json; charset=utf-8")
                self.assertEqual(answer.headers.get("cache-control"), "no-store")
                self.assertEqual(answer.headers.get("connection"), "close")

    def test_an_answer_does_not_tell_versions_of_software(self):
        self.assertNotIn("server", self.ask("GET", "/things").headers)

    def test_a_client_that_has_the_etag_of_a_resource_gets_304_without_body(self):
        etag = self.ask("GET", "/things").headers["etag"]
        self.assertRegex(etag, 'W/"[0-9a-f]{16}"')
        for known in (etag, etag[2:], f'"other", {etag}', "*"):
            with self.subTest(if_none_match=known):
                answer = self.ask("GET", "/things", {"If-None-Match": known})
                self.assertEqual((answer.status, answer.body), (304, b""))
                self.assertEqual(answer.headers.get("etag"), etag)
        answer = self.ask("GET", "/things", {"If-None-Match": '"other"'})
        self.assertEqual(answer.status, 200, 'If-None-Match: "other"')

    def test_an_unexpected_exception_is_500_and_its_traceback_is_only_in_the_log(self):
        with contextlib.redirect_stderr(io.StringIO()) as log:
            answer = self.ask("GET", "/fail")
            flush(self.service.log)
        self.assertEqual(answer.status, 500)
        self.assertNotIn(b"secret", answer.body)
        self.assertIn("RuntimeError: secret", log.getvalue())
        self.assertIn(answer.headers["x-request-id"], log.getvalue())
        self.assertNotIn("\n2026-01-01", log.getvalue(),
                         "a line of a traceback looks like an entry of the log")

    def test_a_line_break_in_a_header_value_cannot_split_an_answer(self):
        with contextlib.redirect_stderr(io.StringIO()):
            answers = exchange(self.port, b"GET /split HTTP/1.1\r\nHost: shop\r\n\r\n")
            flush(self.service.log)
        self.assertEqual([answer.status for answer in answers], [500], "GET /split")
        self.assertNotIn("set-cookie", answers[0].headers)


class DatabaseTest(unittest.TestCase):
    def test_a_service_that_owns_data_answers_with_a_copy_of_its_database(self):
        with running(StoredThings) as service:
            answer = ask(service.server_port, "GET", "/database")
            self.assertEqual(answer.status, 200)
            self.assertEqual(answer.headers["content-type"], "application/vnd.sqlite3")
            self.assertEqual(answer.headers["cache-control"], "no-store")
            self.assertEqual(answer.body, service.database.copy())
            with mock.patch.object(database, "MAX_COPY", len(answer.body) - 1):
                self.assertEqual(ask(service.server_port, "GET", "/database").status, 507,
                                 "the status when there are more bytes than MAX_COPY")

    def test_there_is_one_copy_at_a_time_until_it_is_sent_since_each_takes_memory(self):
        with running(StoredThings, timeout=0.3) as service:
            self.assertEqual(ask(service.server_port, "GET", "/database").status, 200)
            with service.database.copying:  # as if another client were still receiving one
                waiting = ask(service.server_port, "GET", "/database")
                self.assertEqual((waiting.status, waiting.json["detail"]),
                                 (503, "other copies are being sent"))
            self.assertEqual(ask(service.server_port, "HEAD", "/database").status, 200)
            wait_until(lambda: not service.database.copying.locked(), "the last copy to be sent")

    def test_a_process_without_data_has_no_such_path(self):
        with running(Things) as service:
            for method in ("GET", "OPTIONS", "DELETE"):
                answer = ask(service.server_port, method, "/database")
                self.assertEqual(answer.status, 404, f"{method} /database of {service.name}")
            published = ask(service.server_port, "GET", "/openapi.json").json["paths"]
            self.assertNotIn("/database", published)


class PreconditionsTest(unittest.TestCase):
    def setUp(self):
        self.service = self.enterContext(running(StoredThings))
        self.tag = self.ask("GET", "/things/7").headers["etag"]

    def ask(self, method, target, **headers):
        """Send a request; If_Match="x" sends a header."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        fields = {"Content-Type": "application/json", **headers}
        return ask(self.service.server_port, method, target, fields, b"[]")

    def test_a_change_is_made_only_if_if_match_has_the_strong_etag_of_the_item(self):
        tag = self.tag
        self.assertRegex(tag, '^"[0-9a-f]{16}"$')
        made = (tag, "*", f'"old", {tag}', f'{tag},"old"', f'W/"old", {tag}',
                f'"old"\r\nIf-Match: {tag}', f'"a, b" , {tag}')
        refused = (f"W/{tag}", f'W/{tag}, "old"', '"old"', "", '"*"', '""',
                   tag.strip('"'), f'"{tag[1:-1]}0"', tag.replace('"', "'"))
        for status, values in ((204, made), (412, refused)):
            for wanted in values:
                with self.subTest(if_match=wanted):
                    head = f"PUT /things/7 HTTP/1.1\r\nHost: shop\r\nIf-Match: {wanted}\r\n\r\n"
                    [answer] = exchange(self.service.server_port, head.encode())
                    self.assertEqual(answer.status, status)
        self.assertEqual(self.ask("PUT", "/things/7").status, 204, "PUT without If-Match")

    def test_a_change_is_not_made_if_if_none_match_excludes_the_state_of_the_item(self):
        for excluded, status in (("*", 412), (self.tag, 412), (f'"old", W/{self.tag}', 412),
                                 ('"old"', 204)):
            with self.subTest(if_none_match=excluded):
                answer = self.ask("PUT", "/things/7", If_None_Match=excluded)
                self.assertEqual(answer.status, status)

    def test_a_get_with_an_outdated_if_match_is_412(self):
        for wanted, status in ((self.tag, 200), ('"old"', 412)):
            with self.subTest(if_match=wanted):
                self.assertEqual(self.ask("GET", "/things/7", If_Match=wanted).status, status)

    def test_the_preconditions_of_a_post_are_about_what_a_get_of_its_target_returns(self):
        page = self.ask("GET", "/things").headers["etag"]
        for target, headers, status in (
                ("/things", {"If_Match": "*"}, 201),
                ("/things", {"If_Match": page}, 412),  # a weak tag, which If-Match never takes
                ("/things", {"If_None_Match": '"old"'}, 201),
                ("/things", {"If_None_Match": page}, 412),
                ("/things", {"If_None_Match": "*"}, 412),
                ("/echo", {"If_Match": "*"}, 412),     # a GET finds nothing, so nothing matches
                ("/echo", {"If_Match": '"old"'}, 412),
                ("/echo", {"If_None_Match": "*"}, 201)):
            with self.subTest(f"POST {target}", **headers):
                self.assertEqual(self.ask("POST", target, **headers).status, status)


class BodyTest(ThingsTest):
    def post(self, body, **headers):
        fields = {"Content-Type": "application/json", **headers}
        return self.ask("POST", "/things", fields, body)

    def test_a_route_gets_the_json_value_that_was_sent(self):
        for text in ('{"a":[1,2.5,null,true,"ü€😀"]}', "[]", "0", '"x"', "9007199254740993"):
            with self.subTest(text):
                answer = self.post(text.encode())
                self.assertEqual((answer.status, answer.body.decode()), (201, text))

    def test_a_body_that_is_not_valid_json_is_400(self):
        for body in (b"", b"{", b"{'a':1}", b"NaN", b"[Infinity]", b"-Infinity", b"1e999",
                     b'{"a":1,"a":2}', b'"\\ud800"', b'{"\\udfff":1}', b"\xff", b'"\xc3"',
                     b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\xef\xbb\xbf{}",
                     '{"a":1}'.encode("utf-16"), b"{} {}", b"01", b'"\n"'):
            with self.subTest(body[:20]):
                answer = self.post(body)
                self.assertEqual((answer.status, answer.headers["content-type"]), (400, PROBLEM))
                self.assertRegex(answer.json["detail"], "^the body is not valid JSON: ")

    def test_a_body_without_the_media_type_of_json_is_415(self):
        for given in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx",
                      "application/json; charset=latin-1"):
            with self.subTest(given):
                answer = self.ask("POST", "/things", {"Content-Type": given}, b"{}")
                self.assertEqual(answer.status, 415)
        answer = self.ask("POST", "/things", {}, b"{}")
        self.assertEqual(answer.status, 415, "no Content-Type")
        self.assertEqual(answer.headers.get("accept"), "application/json")

    def test_a_body_with_a_content_coding_is_415_and_the_answer_says_that_none_is_accepted(self):
        answer = self.post(b"{}", **{"Content-Encoding": "gzip"})
        self.assertEqual(answer.status, 415, "Content-Encoding: gzip")
        self.assertEqual(answer.headers.get("accept-encoding"), "identity")
        answer = self.post(b"{}", **{"Content-Encoding": "Identity"})
        self.assertEqual(answer.status, 201, "Content-Encoding: Identity")

    def test_the_media_type_of_json_is_accepted_in_every_spelling(self):
        for given in ("application/json", "Application/JSON;charset=UTF-8",
                      'application/json; charset="utf-8"', "application/json;",
                      "application/json ;; charset=utf-8 ;"):  # RFC 9110 5.6.6
            with self.subTest(given):
                answer = self.ask("POST", "/things", {"Content-Type": given}, b"{}")
                self.assertEqual(answer.status, 201)

    def test_a_request_without_the_body_that_its_route_needs_is_411(self):
        [answer] = exchange(self.port, POST + b"\r\n")
        self.assertEqual(answer.status, 411)

    def test_a_chunked_body_is_read(self):
        body = b"3;x=y\r\n[1,\r\n2\r\n2]\r\n0\r\nA: b\r\n\r\n"
        [answer] = exchange(self.port, POST + b"Transfer-Encoding: chunked\r\n\r\n" + body)
        self.assertEqual((answer.status, answer.body), (201, b"[1,2]"))

    def test_a_body_shorter_than_its_content_length_is_400_even_if_it_is_valid_json(self):
        [answer] = exchange(self.port, POST + b"Content-Length: 5\r\n\r\n[1]")
        self.assertEqual(answer.status, 400)

    def test_a_body_that_no_route_reads_is_never_taken_for_the_next_request(self):
        hidden = b"GET /things/666 HTTP/1.1\r\nHost: shop\r\n\r\n"
        size = len(hidden)
        framings = (b"Content-Length: %d\r\n\r\n%b" % (size, hidden),
                    b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (size, hidden))
        for line in (b"GET /things", b"POST /nothing", b"PUT /things", b"DELETE /things/1",
                     b"HEAD /things"):
            for framing in framings:
                with self.subTest(line + b", " + framing[:8]), Wire(self.port) as connection:
                    head = line + b" HTTP/1.1\r\nHost: shop\r\n"
                    connection.send(head + framing + GET)
                    method = line.split()[0].decode()
                    first = connection.read(method)
                    second = self.read(connection, "GET /things, the second request")
                    self.assertEqual(second.body, THINGS, f"the first answer was {first}")

    def test_a_body_that_is_announced_as_too_large_is_refused_before_it_is_sent(self):
        with Wire(self.port) as connection:
            connection.send(POST + b"Content-Length: 1048577\r\nExpect: 100-continue\r\n\r\n")
            self.assertEqual(self.read(connection, "POST of 1 MiB and a byte").status, 413)
            self.assert_closed(connection, "a connection on which a body was refused")

    def test_an_error_reaches_a_client_that_is_still_sending_its_body(self):
        body = b"x" * 4_000_000
        head = POST + b"Content-Length: %d\r\n\r\n" % len(body)
        [answer] = exchange(self.port, head + body)
        self.assertEqual(answer.status, 413)

    def test_a_body_of_the_largest_allowed_size_is_read_and_a_larger_one_is_413(self):
        body = b'"' + b"x" * (wire.MAX_BODY - 2) + b'"'
        self.assertEqual(self.post(body).status, 201, f"a body of {wire.MAX_BODY} bytes")
        self.assertEqual(self.post(body + b" ").status, 413, "one byte more")

    def test_a_client_that_expects_100_continue_gets_it_before_it_sends_the_body(self):
        with Wire(self.port) as connection:
            connection.send(POST + b"Content-Length: 3\r\nExpect: 100-Continue\r\n\r\n")
            self.assertEqual(self.read(connection, "POST, the head only").status, 100)
            connection.send(b"[1]")
            self.assertEqual(self.read(connection, "POST, now with its body").status, 201)

    def test_a_client_that_expects_100_continue_and_is_refused_gets_only_the_refusal(self):
        for line, status in ((b"POST /nothing", 404), (b"PUT /things", 405),
                             (b"POST /things", 415), (b"GET /things", 200)):
            with self.subTest(line), Wire(self.port) as connection:
                connection.send(line + b" HTTP/1.1\r\nHost: shop\r\nContent-Type: text/plain\r\n"
                                b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(GET))
                request = f"{line}, whose body is not wanted,"
                self.assertEqual(self.read(connection, request).status, status, request)
                connection.send(GET)  # the body, which must not be taken for a request
                self.assert_closed(connection, f"the connection of {request}")

    def test_the_time_to_send_a_body_that_was_asked_for_is_no_time_of_the_work(self):
        with stopped_clock(handler, wire) as clock, Wire(self.port) as connection:
            connection.send(POST.replace(b"/things", b"/deadline")
                            + b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\n")
            self.assertEqual(self.read(connection, "POST /deadline, the head").status, 100)
            clock.now += 7
            connection.send(b"[1]")
            remaining = self.read(connection, "POST /deadline, the body").json
        self.assertAlmostEqual(remaining, 5, 3, "of 5 s, when the body has come after 7 s")

    def test_an_http_1_0_client_does_not_get_100_continue(self):
        request = POST.replace(b"HTTP/1.1", b"HTTP/1.0")
        [answer] = exchange(
            self.port, request + b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\n[1]")
        self.assertEqual(answer.status, 201)

    def test_an_unknown_expectation_is_417_except_from_an_http_1_0_client(self):
        for line, status in ((b"GET /things HTTP/1.1", 417), (b"GET /things HTTP/1.0", 200)):
            with self.subTest(line):
                head = line + b"\r\nHost: shop\r\nExpect: miracles\r\n\r\n"
                [answer] = exchange(self.port, head)
                self.assertEqual(answer.status, status)


class PageTest(ThingsTest):
    def test_a_page_of_a_collection_links_to_the_next_page(self):
        answer = self.ask("GET", "/pages?limit=2&after=5&ids=6,7,8&x=%E9&x=>")
        self.assertEqual(answer.json, [{"id": 6}, {"id": 7}])
        link = '</pages?limit=2&ids=6,7,8&x=%E9&x=%3E&after=7>; rel="next"'
        self.assertEqual(answer.headers["link"], link)

    def test_a_page_has_a_hundred_rows_unless_limit_says_otherwise(self):
        self.assertEqual(len(self.ask("GET", "/pages").json), 100)
        self.assertEqual(len(self.ask("GET", "/pages?limit=1000").json), 1000)

    def test_an_invalid_query_parameter_is_400_and_named_in_the_detail(self):
        for name, queries in (
                ("limit", ("limit=0", "limit=1001", "limit=x", "limit=", "limit=%D9%A3")),
                ("after", ("after=-1", "after=9007199254740992", "after=1.0")),
                ("ids", ("ids=", "ids=1,,2", "ids=0", "ids=1%202", "ids=1,0",
                         "ids=9007199254740992", "ids=1,9007199254740992",
                         "ids=" + "1," * 1000 + "1")),
                ("limit", ("limit=1&limit=2", "limit=1&%6cimit=1", "limit=%ff"))):
            for query in queries:
                with self.subTest(f"GET /pages?{query[:30]}"):
                    answer = self.ask("GET", f"/pages?{query}")
                    self.assertEqual(answer.status, 400)
                    self.assertIn(name, answer.json["detail"])


    def test_a_parameter_that_a_route_does_not_know_is_ignored_whatever_it_contains(self):
        for query in ("a=1&a=2", "a=%ff", "%ff=a", "&".join(f"a{n}=1" for n in range(101))):
            for path in ("/pages?limit=1&", "/things?", "/things/7?limit=x&"):
                with self.subTest(f"GET {path}{query[:30]}"):
                    self.assertEqual(self.ask("GET", path + query).status, 200)


class DeadlineTest(ThingsTest):
    """How long work on a request may take: at most `--timeout`, and less than its caller waits."""

    def test_work_on_a_request_ends_a_tenth_earlier_than_its_caller_stops_waiting(self):
        with stopped_clock(handler, wire):
            for given, expected in (("2", 1.8), ("1.000", 0.9), ("0.5", 0.45), ("3600", 5),
                                    ("999999.999999", 5), (None, 5)):
                with self.subTest(x_request_timeout=given):
                    headers = {"X-Request-Timeout": given} if given else {}
                    remaining = self.ask("GET", "/deadline", headers).json
                    self.assertAlmostEqual(remaining, expected, 3, "seconds for the request")

    def test_a_request_whose_caller_has_stopped_waiting_is_503(self):
        for given in ("0", "0.000"):
            with self.subTest(x_request_timeout=given):
                headers = {"X-Request-Timeout": given, "Content-Type": "application/json"}
                answer = self.ask("POST", "/things", headers, b"1")
                self.assertEqual((answer.status, answer.headers.get("retry-after")), (503, "1"))

    def test_an_invalid_x_request_timeout_is_400_and_the_connection_stays_open(self):
        for given in ("soon", "-1", "1e3", "", "1 s", "nan", "1234567", "1, 2", "."):
            with self.subTest(x_request_timeout=given):
                invalid = GET[:-2] + f"X-Request-Timeout: {given}\r\n\r\n".encode()
                answers = exchange(self.port, invalid + GET)
                self.assertEqual([answer.status for answer in answers], [400, 200])
                self.assertEqual(answers[0].json["detail"],
                                 f"X-Request-Timeout: {given!r} is not a number of seconds")


class KeptConnectionTest(ThingsTest):
    """When a connection is kept for another request, and when it is closed."""

    def test_pipelined_requests_are_answered_in_order_on_one_connection(self):
        request = b"GET /things/%d HTTP/1.1\r\nHost: shop\r\n\r\n"
        answers = exchange(self.port, b"".join([request % number for number in range(1, 30)]))
        self.assertEqual([answer.json["id"] for answer in answers], list(range(1, 30)))

    def test_a_connection_closes_after_the_answer_to_connection_close(self):
        for value in (b"close", b"Close", b"keep-alive, close", b"x\r\nConnection: close"):
            with self.subTest(connection=value):
                closing = GET[:-2] + b"Connection: " + value + b"\r\n\r\n"
                answers = exchange(self.port, closing + GET)
                connections = [answer.headers.get("connection") for answer in answers]
                self.assertEqual(connections, ["close"], "Connection of each answer")

    def test_an_http_1_0_connection_closes_unless_its_client_asks_to_keep_it(self):
        plain = b"GET /things HTTP/1.0\r\n\r\n"
        kept = b"GET /things HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
        self.assertEqual(len(exchange(self.port, plain + GET)), 1, "answers on one connection")
        answers = exchange(self.port, kept + kept + plain)
        connections = [answer.headers.get("connection") for answer in answers]
        self.assertEqual(connections, ["keep-alive", "keep-alive", "close"])

    def test_an_answer_tells_how_long_its_connection_may_be_idle(self):
        kept, closed = exchange(self.port, GET + GET[:-2] + b"Connection: close\r\n\r\n")
        self.assertEqual(kept.headers["keep-alive"], "timeout=60")
        self.assertNotIn("keep-alive", closed.headers)

    def test_a_connection_that_stays_idle_is_closed_without_an_answer(self):
        with (mock.patch.multiple(listener, IDLE_TIME=0.01, IDLE_LOOK=0.01),
              Wire(self.port) as connection):
            self.assert_closed(connection, "an idle connection")

    def test_empty_lines_do_not_keep_an_idle_connection_open(self):
        with (mock.patch.multiple(listener, IDLE_TIME=0.1, IDLE_LOOK=0.01),
              running(Things) as service, Wire(service.server_port) as connection):
            def is_closed() -> bool:
                connection.send(b"\r\n")
                return not service.connections

            wait_until(lambda: service.connections, "the connection to be accepted")
            wait_until(is_closed, "a connection with nothing but empty lines to be closed as idle")

    def test_an_answer_is_sent_with_one_call(self):
        sent = []

        class Stream(wire.Stream):
            def send(self, message):
                sent.append(message)
                super().send(message)

        with mock.patch.object(wire, "Stream", Stream):
            exchange(self.port, GET + GET)
        self.assertEqual([message[:15] for message in sent], [b"HTTP/1.1 200 OK"] * 2)
        self.assertTrue(all(message.endswith(THINGS) for message in sent), sent)

    def test_nagles_algorithm_is_off_since_it_delays_answers(self):
        with running(Things) as service, Wire(service.server_port) as connection:
            self.get_things(connection, "a client")
            [served] = service.handlers
            no_delay = served.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            self.assertTrue(no_delay, "TCP_NODELAY of the service's end")

    def test_an_idle_connection_does_not_keep_the_last_body_in_memory(self):
        body = b'"%b"' % (b"x" * 500_000)
        with running(Things) as service, Wire(service.server_port) as connection:
            connection.send(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            self.assertEqual(self.read(connection, "POST of 500 kB").status, 201)
            [served] = service.handlers
            wait_until(lambda: (served.body, served.stream._buffer) == (b"", b""),
                       "the body to be forgotten")


class SlowClientTest(ConnectionsTest):
    """The limits in time that every client has to meet."""

    def test_a_request_that_is_not_received_in_time_is_408(self):
        service = self.enterContext(running(Things))
        for begun in (GET[:-2], POST + b"Content-Length: 5\r\n\r\n[1"):
            with (self.subTest(begun[-10:]), Wire(service.server_port) as connection,
                  mock.patch.multiple(handler, HEAD_TIME=0.01, BODY_TIME=0.01)):
                connection.send(begun)
                self.assertEqual(self.read(connection, "a part of a request").status, 408)
                self.assert_closed(connection, "a connection after 408")

    def test_the_time_for_a_head_does_not_grow_with_each_byte(self):
        self.enterContext(mock.patch.object(handler, "HEAD_TIME", PATIENCE))
        clock = self.enterContext(stopped_clock(handler, wire))
        service = self.enterContext(running(Things))
        connection = self.connect(service)

        def send_byte(number: int) -> None:
            connection.send(GET[number:number + 1])
            received = GET[:number + 1]
            wait_until(lambda: service.handlers and service.handlers[0].stream._buffer == received,
                       f"the service to receive {received}")

        send_byte(0)
        wait_until(service.connections.count_busy, "the request to begin")
        send_byte(1)  # when this one has been received, the deadline has been set
        for number in (2, 3):
            clock.now += 0.6 * PATIENCE
            send_byte(number)
        connection.send(GET[4:])
        answer = self.read(connection, "GET /things, a byte each 0.6 times the limit")
        self.assertEqual(answer.status, 408)

    def await_body(self, service: Things, size: int) -> None:
        wait_until(lambda: service.handlers and service.handlers[0].body_size == size,
                   f"the service to receive {size} bytes of a body")

    def test_the_time_for_a_body_grows_with_what_has_arrived_not_with_what_was_announced(self):
        self.enterContext(mock.patch.multiple(handler, BODY_TIME=1000, BODY_RATE=0.1))
        clock = self.enterContext(stopped_clock(handler, wire))

        def send_slowly(begin: bytes, *parts: tuple[float, bytes]) -> int:
            """Send each part after a pause of some seconds; return the status of the answer."""
            with running(Things) as service, Wire(service.server_port) as connection:
                connection.send(POST + begin)
                sent = len(begin.partition(b"\r\n\r\n")[2])
                for seconds, part in parts:
                    self.await_body(service, sent)
                    clock.now += seconds
                    connection.send(part)
                    sent += len(part)
                return self.read(connection, "POST, sent slowly,").status

        for begin, end in ((b'Content-Length: 100\r\n\r\n"', b'"'),
                           (b'Transfer-Encoding: chunked\r\n\r\n64\r\n"', b'"\r\n0\r\n\r\n')):
            with self.subTest(begin):
                slowly = send_slowly(begin, (900, b"x" * 20), (250, b"x" * 78), (0, end))
                self.assertEqual(slowly, 201, "20 bytes in 900 s should have brought 200 s more")
                silent = send_slowly(begin, (1100, b"x"))
                self.assertEqual(silent, 408, "a byte after 1100 s of silence is too late")
                silent = send_slowly(begin + b"x" * 97, (1100, b"x"))
                self.assertEqual(silent, 408, "so it is if much came before the silence")

    def test_the_time_for_a_body_does_not_begin_again_with_each_byte(self):
        self.enterContext(mock.patch.multiple(handler, BODY_TIME=1000, BODY_RATE=1))
        clock = self.enterContext(stopped_clock(handler, wire))
        service = self.enterContext(running(Things))
        connection = self.connect(service)
        connection.send(POST + b"Content-Length: 5\r\n\r\n[")
        for size in (1, 2):
            self.await_body(service, size)
            clock.now += 600
            connection.send(b"1")
        wait_until(lambda: service.handlers[0].body_size in (3, 0),  # 0: it was given up
                   "the service to receive the third byte")
        connection.send(b"1]")
        status = self.read(connection, "POST, with a byte every 600 s,").status
        self.assertEqual(status, 408, "answer to a POST whose body came in 1200 s, although there "
                         "are 1000 s for it, and 1 s more for each byte")

    def test_a_client_that_does_not_read_its_answer_is_given_up(self):
        with (contextlib.redirect_stderr(io.StringIO()) as log,
              mock.patch.object(handler, "SEND_TIME", 0.05),
              mock.patch.object(wire, "LINGER", 10 * PATIENCE),  # which is not for such a client
              running(Things, quiet=False) as service,
              Wire(service.server_port) as connection):
            connection.send(b"GET /large HTTP/1.1\r\nHost: shop\r\n\r\n")
            wait_until(lambda: service.handlers, "the connection to be accepted")
            wait_until(lambda: not service.connections, "the connection to be given up")
            flush(service.log)
        self.assertIn(" GET /large 499 ", log.getvalue())


class LogTest(unittest.TestCase):
    """The line that the access log has for each request."""

    TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    LINE = rf"^{TIME} things [A-Za-z0-9._-]{{1,64}} \S+ \S+ \d{{3}} \d+\.\dms$"

    def lines_for(self, *requests: bytes, quiet: bool = False) -> list[str]:
        """Return the lines that a service logs about these requests."""
        with contextlib.redirect_stderr(io.StringIO()) as log:
            with running(Things, quiet=quiet) as service:
                for request in requests:
                    exchange(service.server_port, request)
            flush(service.log)
        return log.getvalue().splitlines()

    def test_each_request_is_one_line_in_the_log(self):
        lines = self.lines_for(GET[:-2] + b"X-Request-Id: order-7\r\n\r\n",
                               b"HEAD /nothing?a=b HTTP/1.0\r\n\r\n")
        self.assertEqual(len(lines), 2, lines)
        self.assertRegex(lines[0], self.LINE)
        self.assertIn(" order-7 GET /things 200 ", lines[0])
        self.assertRegex(lines[1], self.LINE)
        self.assertIn(" HEAD /nothing?a=b 404 ", lines[1])

    def test_no_request_can_add_a_line_of_its_own_to_the_log(self):
        lines = self.lines_for(
            b"GET /\r2026-01-01T00:00:00.000Z things x GET / 200 1.0ms HTTP/1.1\r\n\r\n",
            b"GET /a\x1b[2J HTTP/1.1\r\n\r\n",
            b"GET /a\x85\xa0b HTTP/1.1\r\n\r\n",
            b"\x16\x03\x01\x02\x00\r\n\r\n",
            b" \r\n\r\n",
            b"a b c d e\r\n\r\n",
            GET[:-2] + b"X-Request-Id: a b\r\n\r\n",
            GET[:-2] + b"X-Request-Id: " + b"x" * 65 + b"\r\n\r\n")
        self.assertEqual(len(lines), 8, lines)
        for line in lines:
            self.assertRegex(line, self.LINE)
            self.assertTrue(line.isascii() and line.isprintable(), line)

    def test_a_quiet_service_logs_no_requests(self):
        self.assertEqual(self.lines_for(GET, quiet=True), [])

    def test_a_valid_request_id_is_kept_and_an_invalid_one_is_replaced(self):
        def id_of_answer(port: int, request_id: str) -> str:
            answer = ask(port, "GET", "/things", {"X-Request-Id": request_id})
            return answer.headers["x-request-id"]

        with running(Things) as service:
            kept = id_of_answer(service.server_port, "a.B-c_9")
            made = [id_of_answer(service.server_port, invalid)
                    for invalid in ("", "a b", "x" * 65, "ü", "a,b")]
        self.assertEqual(kept, "a.B-c_9")
        self.assertEqual(len(set(made)), 5, f"each new id should be another: {made}")
        for request_id in made:
            self.assertRegex(request_id, "^[0-9a-f]{16}$")

    def test_the_time_to_log_a_request_is_not_part_of_its_span(self):
        with running(Things) as service:
            logged = []

            def log(*_: object) -> None:
                logged.append(time.time())
                wait_until(lambda: time.time() > logged[0], "the clock to go on")

            with mock.patch.object(service.log, "request", log):
                ask(service.server_port, "GET", "/things")
                wait_until(service.telemetry.spans, "a span to be recorded")
            [span] = service.telemetry.spans()
        self.assertLessEqual(span.ended, logged[0], "the span of GET /things ended before its log "
                                                    "line was written, but says: later")


if __name__ == "__main__":
    unittest.main()
