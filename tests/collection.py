"""What holds for every collection of the shop; each service's tests take it over."""
import contextlib
import re
import tempfile
import threading
from functools import partial
from pathlib import Path
from unittest import mock

from microshop.chassis.database import Database
from tests.helpers import PATIENCE, Shop, ask, exchange, process, running, together

LONGEST = 200  # characters of a name
NAMES = ("Z", "x" * LONGEST, "ü" * LONGEST, "🐈" * LONGEST, "de la Cruz, María", "Robert'); DROP TABLE users;--",
         " \u3000Ann\xa0" + " " * LONGEST)
NO_NAMES = ("", " ", "\u3000\xa0", "x" * (LONGEST + 1), "🐈" * (LONGEST + 1), "An\nna", "\tAnna", "Anna\n", "\0Anna",
            "Anna\x1f", "\x7fAnna", "Anna\x85", "\x9fAnna", None, True, 5, 1.5, ["Anna"], {"first": "Anna"})


@contextlib.contextmanager
def meeting(database, count):
    """Let `count` transactions begin at the same instant: what anybody looked at before is old by then."""
    door, begin = threading.Barrier(count), database.transaction

    def transaction():
        door.wait(PATIENCE)
        return begin()

    with mock.patch.object(database, "transaction", transaction):
        yield


class CollectionTests:
    """Give `service`, `path`, the seed's `summaries` and `item`, and `insert`, SQL that adds the row with an id."""

    def setUp(self):
        self.server = self.enterContext(running(self.service))

    def get(self, target):
        return ask(self.server.server_port, "GET", target)

    def add_rows(self, count):
        """Add rows with the ids from 1001 on."""
        with self.server.database.transaction() as connection:
            connection.executemany(self.insert, ((1000 + n,) for n in range(1, count + 1)))

    def test_the_first_start_has_the_seeds_rows(self):
        self.assertEqual(self.get(self.path).json, self.summaries)

    def test_an_item_is_the_full_resource(self):
        answer = self.get(f"{self.path}/{self.item['id']}")
        self.assertEqual((answer.status, answer.json), (200, self.item))
        self.assertEqual(list(answer.json), list(self.item))

    def test_an_item_that_is_not_there_is_404_and_named(self):
        for number in (999, 9007199254740993, 9999999999999999):
            answer = self.get(f"{self.path}/{number}")
            self.assertEqual(answer.status, 404)
            self.assertIn(str(number), answer.json["detail"])

    def test_every_row_comes_once_when_links_are_followed(self):
        self.add_rows(25)
        seen, target = [], f"{self.path}?limit=7"
        while target:
            answer = self.get(target)
            seen += [row["id"] for row in answer.json]
            link = re.fullmatch('<(.+)>; rel="next"', answer.headers.get("link", ""))
            target = link and link[1]
        self.assertEqual(seen, [row["id"] for row in self.summaries] + list(range(1001, 1026)))

    def test_a_page_that_holds_all_has_no_link(self):
        self.assertNotIn("link", self.get(f"{self.path}?limit=2").headers)
        self.assertIn("link", self.get(f"{self.path}?limit=1").headers)

    def test_ids_choose_rows(self):
        first, second = (row["id"] for row in self.summaries)
        self.assertEqual(self.get(f"{self.path}?ids={second},{first},{second},77").json, self.summaries)
        self.assertEqual(self.get(f"{self.path}?ids={second}").json, self.summaries[1:])
        self.assertEqual(self.get(f"{self.path}?ids=77").json, [])
        self.assertEqual(self.get(f"{self.path}?ids=1,0{first}").json, [row for row in self.summaries
                                                                       if row["id"] in (1, first)])
        self.assertEqual(self.get(f"{self.path}?ids={first},{second}&after={first}").json, self.summaries[1:])
        self.assertEqual(self.get(f"{self.path}?ids={first},{second}&limit=1").json, self.summaries[:1])

    def plan_of(self, target):
        """Return how SQLite finds what an answer needs, a line per table."""
        plan, original = [], Database.rows

        def rows(database, statement, values=()):
            plan.extend(row["detail"] for row in original(database, f"EXPLAIN QUERY PLAN {statement}", values))
            return original(database, statement, values)

        with mock.patch.object(Database, "rows", rows):
            self.get(target)
        return "\n".join(plan)

    def test_no_page_reads_or_sorts_the_whole_table(self):
        for query in ("", "?after=5", "?ids=1,2,3", "?ids=1&after=2"):
            plan = self.plan_of(self.path + query)
            self.assertRegex(plan, "^SEARCH ")
            self.assertNotRegex(plan, "SCAN (?!json_each)|TEMP B-TREE")

    def test_it_runs_alone_and_keeps_its_data(self):
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(2):
                with process(f"microshop.{self.service.name}", "--port", "0", "--data", folder) as child:
                    answer = ask(child.port(self.service.title), "GET", self.path)
                    self.assertEqual(answer.json, self.summaries)
                    self.assertEqual(child.stop(), 0)
                self.assertEqual([path.name for path in Path(folder).iterdir()], [f"{self.service.name}.db"])


class WritableCollectionTests(CollectionTests):
    """Give `content` too, all that a client says of one, and `wrong`, more content, each with the fields at fault."""

    wrong = ()

    def setUp(self):
        super().setUp()
        self.one = f"{self.path}/{self.item['id']}"

    def ask(self, method, target, content=None, **headers):
        return Shop(self.server, self.server, self.server).ask(method, target, content, **headers)

    def add(self):
        return self.ask("POST", self.path, self.content).headers["location"]

    def stored(self):
        return self.server.database.rows(f"SELECT * FROM {self.service.name}")

    def assert_refused(self, answer, status, before):
        """It is a problem, and nothing was written."""
        self.assertEqual((answer.status, answer.headers["content-type"]), (status, "application/problem+json"))
        self.assertEqual(self.stored(), before)

    def test_a_new_one_stands_where_its_location_says(self):
        answer = self.ask("POST", self.path, self.content)
        number = answer.json["id"]
        self.assertEqual((answer.status, answer.json), (201, {"id": number, **self.content}))
        self.assertEqual(answer.headers["location"], f"{self.path}/{number}")
        self.assertEqual(self.get(answer.headers["location"]).body, answer.body)
        self.assertEqual([row["id"] for row in self.get(self.path).json][2:], [number])

    def test_a_put_replaces_one_and_no_other(self):
        others = [row for row in self.stored() if row["id"] != self.item["id"]]
        answer = self.ask("PUT", self.one, self.content)
        self.assertEqual((answer.status, answer.json), (200, {"id": self.item["id"], **self.content}))
        self.assertEqual(self.get(self.one).body, answer.body)
        self.assertEqual([row for row in self.stored() if row["id"] != self.item["id"]], others)

    def test_what_is_deleted_is_gone_for_every_method(self):
        target, before = self.add(), self.stored()[:2]
        answer = self.ask("DELETE", target)
        self.assertEqual((answer.status, answer.body), (204, b""))
        for method, content in (("GET", None), ("PUT", self.content), ("DELETE", None)):
            for headers in ({}, {"If_Match": '"old"'}, {"If_Match": "*"}):
                with self.subTest(method, **headers):
                    self.assert_refused(self.ask(method, target, content, **headers), 404, before)
        self.assertEqual(self.get(self.path).json, self.summaries)

    def test_an_id_is_never_used_again(self):
        newest = self.add()
        self.ask("DELETE", newest)
        self.assertGreater(int(self.add().split("/")[2]), int(newest.split("/")[2]))

    def test_a_name_is_any_text_and_spaces_around_it_do_not_count(self):
        for name in NAMES:
            with self.subTest(name[:20]):
                answer = self.ask("POST", self.path, {**self.content, "name": name})
                self.assertEqual((answer.status, answer.json["name"]), (201, name.strip()))
                self.assertEqual(self.get(answer.headers["location"]).json["name"], name.strip())

    def test_every_field_that_is_wrong_is_named_at_once(self):
        before = self.stored()
        for content, fields in (
                *(({"name": name}, ["name"]) for name in NO_NAMES), *self.wrong, ({}, ["name"]),
                ({"name": "Ann", "id": 7, "colour": "red"}, ["colour", "id"]),
                ({"Name": "Ann", "name ": "Ann"}, ["Name", "name", "name "]),
                *((value, ["body"]) for value in ([1], [{"name": "Ann"}], [], "Ann", 0, False))):
            for method, target in (("POST", self.path), ("PUT", self.one)):
                with self.subTest(method, content=content):
                    answer = self.ask(method, target, content)
                    self.assert_refused(answer, 422, before)
                    self.assertEqual(sorted(error["field"] for error in answer.json["errors"]), fields)
                    for error in answer.json["errors"]:
                        self.assertRegex(error["detail"], "^(must be|is not)")

    def test_a_body_that_cannot_be_read_is_refused(self):
        before, json_type = self.stored(), {"Content-Type": "application/json"}
        for status, headers, body in (
                (400, json_type, b'{"name": "Ann"'), (400, json_type, b'{"name":"Ann","name":"Bea"}'),
                (400, json_type, b'{"name":"\xff"}'), (400, json_type, rb'{"name":"\ud800"}'),
                (415, {"Content-Type": "text/plain"}, b'{"name":"Ann"}'), (415, {}, b'{"name":"Ann"}'),
                (422, json_type, b"null")):
            for method, target in (("POST", self.path), ("PUT", self.one)):
                with self.subTest(method, body=body, headers=headers):
                    self.assert_refused(ask(self.server.server_port, method, target, headers, body), status, before)

    def test_a_body_is_needed(self):
        before = self.stored()
        for line in (f"POST {self.path}", f"PUT {self.one}"):
            answer, = exchange(self.server.server_port, f"{line} HTTP/1.1\r\nHost: shop\r\n\r\n".encode())
            self.assert_refused(answer, 411, before)

    def test_what_was_changed_meanwhile_is_neither_changed_nor_deleted(self):
        target = self.add()
        seen = self.get(target).headers["etag"]
        self.assertRegex(seen, '^"[0-9a-f]{16}"$')  # a strong one: If-Match takes no other
        self.assertEqual(self.ask("PUT", target, {**self.content, "name": "Changed"}, If_Match=seen).status, 200)
        before = self.stored()
        for method, content in (("PUT", self.content), ("DELETE", None)):
            with self.subTest(method):
                self.assert_refused(self.ask(method, target, content, If_Match=seen), 412, before)
        fresh = self.get(target).headers["etag"]
        self.assertNotEqual(fresh, seen)
        self.assertEqual(self.ask("DELETE", target, If_Match=fresh).status, 204)

    def test_a_known_item_is_304_until_it_changes(self):
        known = self.get(self.one).headers["etag"]
        for tag in (known, f"W/{known}"):
            answer = self.ask("GET", self.one, If_None_Match=tag)
            self.assertEqual((answer.status, answer.body, answer.headers["etag"]), (304, b"", known))
        self.ask("PUT", self.one, self.content)
        self.assertEqual(self.ask("GET", self.one, If_None_Match=known).json, {"id": self.item["id"], **self.content})

    def test_of_editors_who_saw_the_same_one_wins(self):
        target = self.add()
        seen = self.get(target).headers["etag"]
        names = [f"Editor {n}" for n in range(5)]
        edits = [partial(self.ask, "PUT", target, {**self.content, "name": name}, If_Match=seen) for name in names]
        deletions = [partial(self.ask, "DELETE", target, If_Match=seen)] * 5
        with meeting(self.server.database, 10):
            edited, deleted = (answers := together(*edits, *deletions))[:5], answers[5:]
        if [answer.status for answer in edited].count(200):
            self.assertEqual(sorted(answer.status for answer in answers), [200] + [412] * 9)
            winner, = (answer for answer in edited if answer.status == 200)
            self.assertEqual(self.get(target).body, winner.body)
        else:
            self.assertEqual(sorted(answer.status for answer in deleted), [204] + [404] * 4)
            self.assertEqual([answer.status for answer in edited], [404] * 5)
            self.assertEqual(self.get(target).status, 404)
