"""What holds for every collection of the shop; each service's tests take it over."""
import re
import tempfile
from pathlib import Path
from unittest import mock

from microshop.chassis.database import Database
from tests.helpers import ask, process, running


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
