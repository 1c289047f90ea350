"""Answers as bytes: what a client receives for a handler's answer, and for which request."""
import unittest
from dataclasses import replace
from http import HTTPStatus
from unittest import mock

from microshop.chassis import answer as answer_module
from microshop.chassis.answer import (
    Answer, RequestContext, check_preconditions, entity_tag, format_answer, format_date,
    problem_answer, represent)
from microshop.chassis.errors import (
    MethodNotAllowed, PreconditionFailed, ServiceError, ServiceUnavailable, UnprocessableContent)

KEPT = RequestContext("id-1", "GET", keeps_alive=True)
JSON = "application/json; charset=utf-8"
TEXT = [("Content-Type", "text/plain")]


def parse(message: bytes) -> tuple[str, dict[str, list[str]], bytes]:
    """Return a message's status line, its headers (all values of each name) and its body."""
    head, _, body = message.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers: dict[str, list[str]] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        headers.setdefault(name.lower(), []).append(value)
    return status_line, headers, body


class FormatTest(unittest.TestCase):
    """format_answer(): from an answer with a body of bytes to a whole message."""

    def test_an_answer_is_a_status_line_headers_an_empty_line_and_the_body(self):
        with mock.patch.object(answer_module, "time", mock.Mock(time=lambda: 0.9)):
            message = format_answer(Answer(b"hello", 200, TEXT), KEPT)
        self.assertEqual(message, (
            b"HTTP/1.1 200 OK\r\n"
            b"Content-Type: text/plain\r\n"
            b"X-Request-Id: id-1\r\n"
            b"Connection: keep-alive\r\n"
            b"Keep-Alive: timeout=60\r\n"
            b"Content-Length: 5\r\n"
            b"Date: Thu, 01 Jan 1970 00:00:00 GMT\r\n"
            b"Cache-Control: no-cache\r\n"
            b"\r\n"
            b"hello"))

    def test_the_status_line_has_the_phrase_of_its_status(self):
        for status, line in ((201, "HTTP/1.1 201 Created"),
                             (HTTPStatus.CONFLICT, "HTTP/1.1 409 Conflict"),
                             (413, "HTTP/1.1 413 Content Too Large"),
                             (503, "HTTP/1.1 503 Service Unavailable"),
                             (299, "HTTP/1.1 299 ")):  # RFC 9112 4: the space stays
            with self.subTest(status=int(status)):
                self.assertEqual(parse(format_answer(Answer(status=status), KEPT))[0], line)

    def test_content_length_is_left_out_where_an_answer_has_no_body(self):
        for method, status, body, length in (
                ("GET", 200, b"hello", ["5"]),
                ("GET", 200, b"", ["0"]),       # else a client would wait for the end of input
                ("HEAD", 200, b"hello", ["5"]),
                ("HEAD", 200, b"", None),       # the length that GET would have is not known
                ("DELETE", 204, b"", None),     # RFC 9110 8.6
                ("GET", 304, b"", None)):
            with self.subTest(f"{method}, {status}, {body!r}"):
                message = format_answer(Answer(body, status), replace(KEPT, method=method))
                _, headers, sent = parse(message)
                self.assertEqual(headers.get("content-length"), length, "Content-Length")
                self.assertEqual(sent, b"" if method == "HEAD" else body, "body")

    def test_headers_that_the_answer_has_already_are_not_added_again(self):
        given = [("content-length", "7"), ("date", "Sun, 06 Nov 1994 08:49:37 GMT"),
                 ("cache-control", "no-store")]
        context = replace(KEPT, method="HEAD")
        _, headers, _ = parse(format_answer(Answer(headers=given), context))
        for name, value in given:
            self.assertEqual(headers[name], [value])

    def test_a_client_learns_whether_the_connection_stays_open(self):
        for keeps_alive, connection, keep_alive in ((True, ["keep-alive"], ["timeout=60"]),
                                                    (False, ["close"], None)):
            with self.subTest(keeps_alive=keeps_alive):
                context = replace(KEPT, keeps_alive=keeps_alive)
                _, headers, _ = parse(format_answer(Answer(b"x"), context))
                self.assertEqual(headers.get("connection"), connection, "Connection")
                self.assertEqual(headers.get("keep-alive"), keep_alive, "Keep-Alive")

    def test_a_cache_asks_again_before_it_uses_an_answer_whatever_the_status(self):
        for status in (200, 201, 204, 304, 404, 503):
            with self.subTest(status=status):
                _, headers, _ = parse(format_answer(Answer(status=status), KEPT))
                self.assertEqual(headers.get("cache-control"), ["no-cache"])

    def test_a_header_that_would_break_the_message_is_refused(self):
        for name, value in (("Location", "/x\r\nSet-Cookie: a=b"), ("Location", "/x\nb"),
                            ("Location", "/x\rb"), ("Location", "/x\0"), ("Location", "/€"),
                            ("A\r\nB", "x"), ("Location", "/x\r\n\r\n<html>")):
            with self.subTest(f"{name}: {value}"):
                with self.assertRaises(ValueError):
                    format_answer(Answer(b"x", headers=[(name, value)]), KEPT)

    def test_a_date_is_an_http_date(self):
        self.assertEqual(format_date(784111777), "Sun, 06 Nov 1994 08:49:37 GMT")  # RFC 9110 5.6.7


class RepresentTest(unittest.TestCase):
    """represent(): from a JSON value to bytes, or to 304."""

    def test_a_json_value_becomes_compact_utf8(self):
        for value, body in (({"id": 1, "name": "Zoë"}, '{"id":1,"name":"Zoë"}'), ([], "[]"),
                            ("€", '"€"'), (None, "null"), (0.5, "0.5")):
            with self.subTest(value):
                answer = represent(Answer(value, 202), replace(KEPT, method="POST"))
                self.assertEqual(answer, Answer(body.encode(), 202, [("Content-Type", JSON)]))

    def test_bytes_and_their_headers_stay_as_they_are(self):
        answer = Answer(b"API Gateway", 200, TEXT)
        self.assertEqual(represent(answer, KEPT), answer)

    def test_a_content_type_that_is_given_is_kept(self):
        given = [("Content-Type", "application/problem+json")]
        self.assertEqual(represent(Answer({}, 404, given), KEPT).headers, given)

    def test_an_item_has_a_strong_etag_and_a_collection_a_weak_one(self):
        item, collection = {"id": 7}, [{"id": 7}]
        for method, status in (("GET", 200), ("HEAD", 200), ("PUT", 200), ("POST", 201)):
            with self.subTest(f"{method}, {status}"):
                context = replace(KEPT, method=method)
                strong = dict(represent(Answer(item, status), context).headers).get("ETag")
                weak = dict(represent(Answer(collection, status), context).headers).get("ETag")
                self.assertEqual(strong, entity_tag(b'{"id":7}'))
                self.assertEqual(weak, "W/" + entity_tag(b'[{"id":7}]'))

    def test_an_etag_names_exactly_one_body(self):
        self.assertRegex(entity_tag(b"a"), '^"[0-9a-f]{16}"$')
        self.assertEqual(entity_tag(b"a"), entity_tag(b"a"))
        self.assertNotEqual(entity_tag(b"a"), entity_tag(b"b"))

    def test_an_answer_that_is_not_what_a_get_would_return_has_no_etag(self):
        for method, status in (("POST", 200), ("POST", 202), ("PUT", 412), ("GET", 503)):
            with self.subTest(f"{method}, {status}"):
                answer = represent(Answer({"id": 7}, status), replace(KEPT, method=method))
                self.assertNotIn("ETag", dict(answer.headers))

    def test_a_client_that_has_the_body_already_gets_304_and_no_body(self):
        link = ("Link", '</things?after=7>; rel="next"')
        for value, tag in (({"id": 7}, entity_tag(b'{"id":7}')),
                           ([7], "W/" + entity_tag(b"[7]"))):
            strong = tag.removeprefix("W/")
            for known in (tag, strong, f"W/{strong}", f'"other", {tag}', f"{tag},W/{strong}", "*"):
                with self.subTest(value=value, if_none_match=known):
                    context = replace(KEPT, if_none_match=known)
                    answer = represent(Answer(value, headers=[link]), context)
                    self.assertEqual(answer, Answer(b"", 304, [link, ("ETag", tag)]))

    def test_a_client_that_has_another_body_gets_this_one(self):
        tag = entity_tag(b'{"id":7}')
        for method, known in (("GET", ""), ("GET", '"other"'), ("GET", tag.strip('"')),
                              ("GET", f'"{tag[1:-2]}"'), ("PUT", tag), ("PUT", "*")):
            with self.subTest(method, if_none_match=known):
                context = replace(KEPT, method=method, if_none_match=known)
                answer = represent(Answer({"id": 7}), context)
                self.assertEqual((answer.status, answer.body), (200, b'{"id":7}'))


class PreconditionsTest(unittest.TestCase):
    """check_preconditions(): If-Match first, then If-None-Match (RFC 9110 section 13.2.2)."""

    ITEM, PAGE, NOTHING = '"a"', 'W/"a"', ""  # the tags of targets

    def outcome(self, method: str, tag: str, if_match: str | None, if_none_match: str) -> int:
        """Return the status that the preconditions lead to: 200 where they change nothing."""
        context = RequestContext("id-1", method, if_match, if_none_match)
        try:
            return 304 if check_preconditions(context, tag) else 200
        except PreconditionFailed as error:
            return error.status

    def test_if_match_allows_a_request_only_if_it_has_the_strong_tag_of_the_target(self):
        for tag, if_match, status in (
                (self.ITEM, None, 200), (self.ITEM, "*", 200), (self.ITEM, '"a"', 200),
                (self.ITEM, '"b",\t"a"', 200), (self.ITEM, '"b"', 412), (self.ITEM, 'W/"a"', 412),
                (self.ITEM, "", 412), (self.PAGE, "*", 200), (self.PAGE, 'W/"a"', 412),
                (self.PAGE, '"a"', 412), (self.NOTHING, None, 200), (self.NOTHING, "*", 412),
                (self.NOTHING, '"a"', 412), (self.NOTHING, "", 412)):
            for method in ("GET", "PUT", "DELETE", "POST"):
                with self.subTest(f"{method}, If-Match: {if_match}, ETag: {tag}"):
                    self.assertEqual(self.outcome(method, tag, if_match, ""), status)

    def test_if_none_match_excludes_the_tag_of_the_target_whether_strong_or_weak(self):
        for tag, if_none_match, is_excluded in (
                (self.ITEM, '"a"', True), (self.ITEM, 'W/"a"', True), (self.ITEM, "*", True),
                (self.ITEM, '"b", "a"', True), (self.ITEM, '"b"', False), (self.ITEM, "", False),
                (self.PAGE, '"a"', True), (self.PAGE, 'W/"a"', True), (self.PAGE, "*", True),
                (self.NOTHING, "*", False), (self.NOTHING, '"a"', False)):
            for method, status in (("GET", 304), ("HEAD", 304), ("PUT", 412), ("POST", 412)):
                with self.subTest(f"{method}, If-None-Match: {if_none_match}, ETag: {tag}"):
                    expected = status if is_excluded else 200
                    self.assertEqual(self.outcome(method, tag, None, if_none_match), expected)

    def test_if_match_comes_before_if_none_match(self):
        for if_match, status in (('"b"', 412), ('"a"', 304)):
            with self.subTest(if_match=if_match):
                self.assertEqual(self.outcome("GET", '"a"', if_match, '"a"'), status)


class DescribeTest(unittest.TestCase):
    """problem_answer(): from an error to a problem document (RFC 9457)."""

    def test_an_error_is_a_problem_document_with_the_id_of_its_request(self):
        answer = problem_answer(ServiceUnavailable("it is full"), "id-1")
        self.assertEqual(answer.body, {
            "type": "about:blank", "title": "Service Unavailable", "status": 503,
            "detail": "it is full", "requestId": "id-1"})
        self.assertEqual(answer.status, 503)
        self.assertEqual(list(answer.headers), [("Content-Type", "application/problem+json")])

    def test_the_title_of_a_problem_is_the_name_of_its_status_whatever_the_version_of_python(self):
        names = {400: "Bad Request", 408: "Request Timeout", 413: "Content Too Large",
                 414: "URI Too Long", 415: "Unsupported Media Type", 416: "Range Not Satisfiable",
                 422: "Unprocessable Content", 505: "HTTP Version Not Supported"}  # RFC 9110 15
        for status, name in names.items():
            error = ServiceError("")
            error.status = HTTPStatus(status)
            answer = problem_answer(error, "id-1")
            status_line, _, _ = parse(format_answer(represent(answer, KEPT), KEPT))
            self.assertEqual((answer.body["title"], status_line),
                             (name, f"HTTP/1.1 {status} {name}"))

    def test_the_headers_of_an_error_are_in_its_answer(self):
        answer = problem_answer(MethodNotAllowed("not here", [("Allow", "OPTIONS")]), "id-1")
        self.assertIn(("Allow", "OPTIONS"), answer.headers)

    def test_each_invalid_field_is_named_in_the_problem_document(self):
        answer = problem_answer(UnprocessableContent({"name": "must be a text"}), "id-1")
        self.assertEqual(answer.body["errors"], [{"field": "name", "detail": "must be a text"}])

    def test_a_problem_document_is_sent_as_one(self):
        context = RequestContext("id-1", if_none_match="*")
        answer = represent(problem_answer(ServiceUnavailable("it is full"), "id-1"), context)
        status_line, headers, body = parse(format_answer(answer, context))
        self.assertEqual(status_line, "HTTP/1.1 503 Service Unavailable")
        self.assertEqual(headers["content-type"], ["application/problem+json"])
        self.assertEqual(body, b'{"type":"about:blank","title":"Service Unavailable","status":503,'
                               b'"detail":"it is full","requestId":"id-1"}')


if __name__ == "__main__":
    unittest.main()
