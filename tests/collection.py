"""Tests that every collection of the shop must pass; the tests of each service inherit them.

To test the collection of a new service, subclass WritableCollectionTests, or CollectionTests if
its clients cannot create, replace and delete items:

    class ReviewsTest(WritableCollectionTests, unittest.TestCase):
        service, path = Reviews, "/reviews"
        summaries = [{"id": 1, "userId": 1, "productId": 101, "text": "Quiet"},
                     {"id": 2, "userId": 2, "productId": 102, "text": "Too small"}]
        item = summaries[0]
        insert = "INSERT INTO reviews VALUES (?, 1, 101, 'Heavy')"
        content = {"userId": 1, "productId": 102, "text": "Good"}
        text, required = "text", ["productId", "text", "userId"]
        wrong = [({"userId": 0, "productId": 102, "text": "Good"}, ["userId"])]

The attributes are explained in the two classes. One that is missing, or does not fit the others,
fails each test with a sentence that names it.
"""
import contextlib
import re
import tempfile
import threading
from functools import partial
from pathlib import Path
from unittest import mock

from microshop.chassis import database
from microshop.chassis.database import Database
from tests.helpers import PATIENCE, ask, ask_json, exchange, process, running, together

LONGEST = 200  # characters of a text
ABOUT_TEXTS = (f"a text has 1 to {LONGEST} characters, not only spaces, and none of them is a "
               "control character")
TEXTS = (
    "Z", "x" * LONGEST, "ü" * LONGEST, "🐈" * LONGEST, "de la Cruz, María",
    "Robert'); DROP TABLE users;--", " \u3000Ann\xa0".ljust(LONGEST))
NOT_TEXTS = (
    "", " ", "\u3000\xa0", "x" * (LONGEST + 1), "🐈" * (LONGEST + 1), "Ann".ljust(LONGEST + 1),
    "An\nna", "\tAnna", "Anna\n", "\0Anna", "Anna\x1f", "\x7fAnna", "Anna\x85", "\x9fAnna", None,
    True, 5, 1.5, ["Anna"], {"first": "Anna"})
JSON = {"Content-Type": "application/json"}


@contextlib.contextmanager
def simultaneous_transactions(opened: Database, count: int):
    """Let `count` transactions wait for each other and begin at the same instant.

    So anything that a request has read before its transaction may be out of date in it.
    """
    barrier, begin = threading.Barrier(count), opened.transaction

    def transaction():
        barrier.wait(PATIENCE)
        return begin()

    with (mock.patch.object(opened, "transaction", transaction),
          mock.patch.object(database, "QUEUE_TIMEOUT", PATIENCE)):
        yield


class CollectionTests:
    """Tests of a collection that can be read. A subclass must give:

    service     the Service class
    path        of the collection, like "/users"
    summaries   the rows of the first start as the collection lists them, at least two
    item        one of them as the full resource
    insert      SQL that adds a row; its one placeholder is the id
    """

    attributes = ("service", "path", "summaries", "item", "insert")

    def setUp(self):
        if problems := list(self.faults_of_attributes()):
            self.fail("\n".join(problems))
        self.server = self.enterContext(running(self.service))
        self.one = f"{self.path}/{self.item['id']}"

    def faults_of_attributes(self):
        """Yield a sentence for each attribute that is missing or does not fit the others."""
        own = type(self).__name__
        missing = [name for name in self.attributes if not hasattr(self, name)]
        for name in missing:
            yield f"{own} has no attribute {name!r}: see tests/collection.py"
        if missing:
            return
        if self.path != f"/{self.service.name}":
            yield (f"{own}.path is {self.path!r}, but the name of {own}.service is "
                   f"{self.service.name!r}")
        if len(self.summaries) < 2:
            yield f"{own}.summaries needs two rows at least: {self.summaries}"
        if self.item.get("id") not in [row["id"] for row in self.summaries]:
            yield f"{own}.item must have the id of one of {own}.summaries: {self.item}"
        if self.insert.count("?") != 1:
            yield f"{own}.insert needs one placeholder, which is for the id: {self.insert}"

    def ask(self, method, target, content=None, **headers):
        """Ask the service, as ask_json() does."""
        return ask_json(self.server.server_port, method, target, content, **headers)

    def get(self, target):
        return self.ask("GET", target)

    def add_rows(self, count):
        """Add rows with the ids from 1001 on."""
        with self.server.database.transaction() as transaction:
            for number in range(1001, 1001 + count):
                transaction.write(self.insert, [number])

    def plan_of(self, target):
        """Return how SQLite executes the queries of a GET request, one line for each table."""
        plan, rows = [], Database.rows

        def explain(database, statement, values=()):
            explained = rows(database, f"EXPLAIN QUERY PLAN {statement}", values)
            plan.extend(row["detail"] for row in explained)
            return rows(database, statement, values)

        with mock.patch.object(Database, "rows", explain):
            self.get(target)
        return "\n".join(plan)

    def test_the_first_start_adds_the_demo_rows(self):
        self.assertEqual(self.get(self.path).json, self.summaries,
                         f"GET {self.path} of a new service; expected are the `summaries`")

    def test_an_item_is_the_full_resource_with_its_fields_in_order(self):
        answer = self.get(self.one)
        self.assertEqual((answer.status, answer.json), (200, self.item), f"GET {self.one}")
        self.assertEqual(list(answer.json), list(self.item), f"the fields of GET {self.one}")

    def test_an_item_that_does_not_exist_is_404_and_the_detail_names_its_id(self):
        for number in (999, 9007199254740993, 9999999999999999):
            answer = self.get(f"{self.path}/{number}")
            self.assertEqual(answer.status, 404, f"GET {self.path}/{number}")
            self.assertIn(str(number), answer.json["detail"])

    def test_following_the_next_links_yields_every_row_once(self):
        self.add_rows(25)
        seen, target = [], f"{self.path}?limit=7"
        while target:
            answer = self.get(target)
            seen += [row["id"] for row in answer.json]
            link = re.fullmatch('<(.+)>; rel="next"', answer.headers.get("link", ""))
            target = link and link[1]
        self.assertEqual(seen, [row["id"] for row in self.summaries] + list(range(1001, 1026)))

    def test_only_a_page_with_more_rows_behind_it_has_a_link(self):
        count = len(self.summaries)
        self.assertNotIn("link", self.get(f"{self.path}?limit={count}").headers)
        self.assertIn("link", self.get(f"{self.path}?limit={count - 1}").headers)

    def test_the_query_ids_chooses_rows(self):
        first, second, *_ = (row["id"] for row in self.summaries)
        chosen = self.summaries[:2]
        for query, expected in (
                (f"ids={second},{first},{second},77", chosen),
                (f"ids={second}", chosen[1:]),
                ("ids=77", []),
                (f"ids=0{first},{first}", chosen[:1]),
                (f"ids={first},{second}&after={first}", chosen[1:]),
                (f"ids={first},{second}&limit=1", chosen[:1])):
            with self.subTest(query):
                self.assertEqual(self.get(f"{self.path}?{query}").json, expected)

    def test_no_page_reads_or_sorts_the_whole_table(self):
        for query in ("", "?after=5", "?ids=1,2,3", "?ids=1&after=2"):
            with self.subTest(query):
                plan = self.plan_of(self.path + query)
                self.assertRegex(plan, "^SEARCH ")
                self.assertNotRegex(plan, "SCAN (?!json_each)|TEMP B-TREE")

    def test_the_service_runs_alone_and_keeps_its_data_in_one_file(self):
        name = self.service.name
        with tempfile.TemporaryDirectory() as folder:
            for start in ("first", "second"):
                with (self.subTest(start=start),
                      process(f"microshop.{name}", "--port", "0", "--data", folder) as child):
                    answer = ask(child.port(self.service.title), "GET", self.path)
                    self.assertEqual(answer.json, self.summaries)
                    self.assertEqual(child.stop(), 0, "its exit status after SIGTERM")
                self.assertEqual([path.name for path in Path(folder).iterdir()], [f"{name}.db"])


class WritableCollectionTests(CollectionTests):
    """Tests of a collection that can be changed, too. In addition, a subclass must give:

    content     a valid body to create or replace an item
    text        the name of a field in it that is a Text(), if it is not "name"
    required    the names of the fields that a POST may not leave out, if not only "name"
    replaced    the same of a PUT, if it needs more
    wrong       more invalid bodies, each with the names of the fields that are wrong
    """

    attributes = (*CollectionTests.attributes, "content")
    text = "name"
    required = ["name"]
    replaced = None
    wrong = ()

    def faults_of_attributes(self):
        if problems := list(super().faults_of_attributes()):
            yield from problems
            return
        own, fields = type(self).__name__, sorted(self.content)
        if not isinstance(self.content.get(self.text), str):
            yield (f"{own}.text is {self.text!r}, but it must name a text in {own}.content, which "
                   f"has the fields {fields}")
        for name in ("required", "replaced"):
            if strange := sorted({*(getattr(self, name) or ())} - {*fields}):
                yield (f"{own}.{name} names {strange}, but {own}.content has only the fields "
                       f"{fields}")

    def add(self):
        """Create an item; return its path."""
        return self.ask("POST", self.path, self.content).headers["location"]

    def stored(self):
        return self.server.database.rows(f"SELECT * FROM {self.service.name}")

    def with_text(self, text):
        return {**self.content, self.text: text}

    def wrong_bodies(self):
        """Yield bodies that are JSON, but invalid, each with the names of the fields at fault."""
        yield from self.wrong
        for text in NOT_TEXTS:
            yield self.with_text(text), [self.text]
        yield {**self.content, "id": 7, "hat": "red"}, ["hat", "id"]
        misspelt = self.with_text("Ann")
        misspelt[self.text.capitalize()] = misspelt[f"{self.text} "] = misspelt.pop(self.text)
        yield misspelt, sorted([self.text.capitalize(), f"{self.text} ", self.text])
        for value in ([1], [self.content], [], "Ann", 0, False):
            yield value, ["body"]

    def assert_refused(self, answer, status, before, why=""):
        """Check that an answer is a problem, and that the table is as it was before."""
        self.assertEqual(answer.status, status, why or answer.body)
        self.assertEqual(answer.headers["content-type"], "application/problem+json")
        self.assertEqual(self.stored(), before, "a refused request has changed the table")

    def about(self, method, target, content):
        """Say why a body is invalid: what is wrong with its text, if it has one."""
        text = content.get(self.text) if isinstance(content, dict) else None
        about = f"status of {method} {target} {content!r:.100}"
        if isinstance(text, str):
            about += f"; the {self.text} has {len(text)} characters, and {ABOUT_TEXTS}"
        return about

    def assert_is_current(self, answer, target):
        """Check that an answer has the body and the ETag that a GET of the item has."""
        found = self.get(target)
        self.assertEqual((answer.body, answer.headers.get("etag")),
                         (found.body, found.headers["etag"]),
                         f"body and ETag of the answer to a change; a GET {target} gets others")

    def test_a_created_item_is_found_at_its_location_and_in_the_collection(self):
        answer = self.ask("POST", self.path, self.content)
        number = answer.json["id"]
        self.assertEqual((answer.status, answer.json), (201, {"id": number, **self.content}),
                         f"POST {self.path} {self.content}")
        self.assertEqual(answer.headers["location"], f"{self.path}/{number}")
        self.assert_is_current(answer, answer.headers["location"])
        listed = [row["id"] for row in self.get(self.path).json]
        self.assertEqual(listed, [*(row["id"] for row in self.summaries), number])

    def test_put_replaces_one_item_and_changes_no_other(self):
        others = [row for row in self.stored() if row["id"] != self.item["id"]]
        answer = self.ask("PUT", self.one, self.content)
        replaced = {"id": self.item["id"], **self.content}
        self.assertEqual((answer.status, answer.json), (200, replaced),
                         f"PUT {self.one} {self.content}")
        self.assert_is_current(answer, self.one)
        self.assertEqual([row for row in self.stored() if row["id"] != self.item["id"]], others)

    def test_a_deleted_item_is_404_for_every_method(self):
        before = self.stored()
        target = self.add()
        answer = self.ask("DELETE", target)
        self.assertEqual((answer.status, answer.body), (204, b""))
        for method, content in (("GET", None), ("PUT", self.content), ("DELETE", None)):
            for headers in ({}, {"If_Match": '"old"'}, {"If_Match": "*"}):
                with self.subTest(method, **headers):
                    answer = self.ask(method, target, content, **headers)
                    self.assert_refused(answer, 404, before)
        self.assertEqual(self.get(self.path).json, self.summaries)

    def test_the_id_of_a_deleted_item_is_never_used_again(self):
        newest = self.add()
        self.ask("DELETE", newest)
        self.assertGreater(int(self.add().split("/")[2]), int(newest.split("/")[2]))

    def test_a_text_may_have_any_characters_and_is_stripped_of_spaces_around_it(self):
        for text in TEXTS:
            with self.subTest(text[:20]):
                answer = self.ask("POST", self.path, self.with_text(text))
                self.assertEqual((answer.status, answer.json.get(self.text)),
                                 (201, text.strip()), f"POST {self.path}: {self.text} "
                                 f"has {len(text)} characters; {ABOUT_TEXTS}")
                found = self.get(answer.headers["location"]).json[self.text]
                self.assertEqual(found, text.strip())

    def test_an_invalid_body_is_422_and_names_every_wrong_field_at_once(self):
        before = self.stored()
        for content, fields in self.wrong_bodies():
            source = f" (a body in {type(self).__name__}.wrong)" * ((content, fields) in self.wrong)
            for method, target in (("POST", self.path), ("PUT", self.one)):
                with self.subTest(method, content=f"{content!r:.60}"):
                    answer = self.ask(method, target, content)
                    self.assert_refused(answer, 422, before, self.about(method, target, content))
                    errors = answer.json["errors"]
                    self.assertEqual(sorted(error["field"] for error in errors), sorted(fields),
                                     f"the wrong fields of {method} {target} "
                                     f"{content!r:.200}{source}")
                    for error in errors:
                        self.assertRegex(error["detail"], "^(must be|is not)")

    def test_a_body_that_lacks_fields_is_422_and_names_them(self):
        for method, target, fields in (
                ("POST", self.path, self.required),
                ("PUT", self.one, self.replaced or self.required)):
            with self.subTest(method):
                before = self.stored()
                answer = self.ask(method, target, {})
                self.assert_refused(answer, 422, before)
                self.assertEqual(sorted(error["field"] for error in answer.json["errors"]),
                                 sorted(fields), f"the wrong fields of {method} {target} {{}}")

    def test_a_body_that_is_not_valid_json_is_refused(self):
        before = self.stored()
        for status, headers, body in (
                (400, JSON, b'{"name": "Ann"'),
                (400, JSON, b'{"name":"Ann","name":"Bea"}'),
                (400, JSON, b'{"name":"\xff"}'),
                (400, JSON, rb'{"name":"\ud800"}'),
                (415, {"Content-Type": "text/plain"}, b'{"name":"Ann"}'),
                (415, {}, b'{"name":"Ann"}'),
                (422, JSON, b"null")):
            for method, target in (("POST", self.path), ("PUT", self.one)):
                with self.subTest(method, body=body, headers=headers):
                    answer = ask(self.server.server_port, method, target, headers, body)
                    self.assert_refused(answer, status, before)

    def test_a_post_or_put_without_a_body_is_411(self):
        before = self.stored()
        for line in (f"POST {self.path}", f"PUT {self.one}"):
            with self.subTest(line):
                request = f"{line} HTTP/1.1\r\nHost: shop\r\n\r\n".encode()
                answer, = exchange(self.server.server_port, request)
                self.assert_refused(answer, 411, before)

    def test_an_outdated_if_match_is_412_and_changes_nothing(self):
        target = self.add()
        seen = self.get(target).headers["etag"]
        self.assertRegex(seen, '^"[0-9a-f]{16}"$')  # a strong one: If-Match takes no other
        changed = self.ask("PUT", target, self.with_text("Changed"), If_Match=seen)
        self.assertEqual(changed.status, 200)
        before = self.stored()
        for method, content in (("PUT", self.content), ("DELETE", None)):
            answer = self.ask(method, target, content, If_Match=seen)
            self.assertEqual(answer.status, 412, f"{method} {target} with If-Match: {seen}, which "
                             f"was its ETag before the last change, got {answer.body}")
            self.assert_refused(answer, 412, before)
        fresh = self.get(target).headers["etag"]
        self.assertNotEqual(fresh, seen)
        self.assertEqual(self.ask("DELETE", target, If_Match=fresh).status, 204)

    def test_a_change_that_if_none_match_excludes_is_412_and_changes_nothing(self):
        before, known = self.stored(), self.get(self.one).headers["etag"]
        for method, content in (("PUT", self.content), ("DELETE", None)):
            for excluded in ("*", known):
                with self.subTest(method, if_none_match=excluded):
                    answer = self.ask(method, self.one, content, If_None_Match=excluded)
                    self.assert_refused(answer, 412, before)

    def test_an_item_that_the_client_knows_is_304_until_it_changes(self):
        known = self.get(self.one).headers["etag"]
        for tag in (known, f"W/{known}"):
            answer = self.ask("GET", self.one, If_None_Match=tag)
            self.assertEqual((answer.status, answer.body), (304, b""))
            self.assertEqual(answer.headers["etag"], known)
        changed = self.ask("PUT", self.one, self.content)
        self.assertEqual(changed.status, 200, f"PUT {self.one} {self.content}: {changed.body!r}")
        answer = self.ask("GET", self.one, If_None_Match=known)
        self.assertEqual(answer.json, {"id": self.item["id"], **self.content})

    def test_of_ten_simultaneous_editors_with_the_same_etag_exactly_one_succeeds(self):
        target = self.add()
        seen = self.get(target).headers["etag"]
        edits = [partial(self.ask, "PUT", target, self.with_text(f"Editor {n}"), If_Match=seen)
                 for n in range(5)]
        deletions = [partial(self.ask, "DELETE", target, If_Match=seen)] * 5
        with simultaneous_transactions(self.server.database, 10):
            answers = together(*edits, *deletions)
        edited, deleted = answers[:5], answers[5:]
        if any(answer.status == 200 for answer in edited):
            statuses = sorted(answer.status for answer in answers)
            self.assertEqual(statuses, [200] + [412] * 9, f"5 PUTs and 5 DELETEs of {target}, all "
                             f"at once and with If-Match: {seen}. After the first change, this is "
                             "not its ETag any more, so all others must get 412")
            winner, = (answer for answer in edited if answer.status == 200)
            self.assertEqual(self.get(target).body, winner.body)
        else:
            self.assertEqual(sorted(answer.status for answer in deleted), [204] + [404] * 4)
            self.assertEqual([answer.status for answer in edited], [404] * 5)
            self.assertEqual(self.get(target).status, 404)
