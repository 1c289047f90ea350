"""The exercises: their data fits the present source, and the runner does what learners are told.

That each exercise fails and can be solved takes minutes; `make prove` shows it (proofs.py).
"""
import ast
import contextlib
import importlib
import inspect
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from microshop.chassis.content import Text
from microshop.tour.chapters import all_chapters
from microshop.tour.index import INDEX
from microshop.users import Users
from tests import exercise, test_users
from tests.collection import WritableCollectionTests
from tests.exercise import COMMAND, EXERCISES
from tests.exercises import Addition, Exercise, edit
from tests.exercises.copies import Copy, Failure
from tests.helpers import PATIENCE, TOP, wait_until
from tests.proofs import BARE, Proof
from tests.source import COPIED

FAULT = Exercise(
    title="The doubled price", pattern="Addition", minutes=5,
    file="price.py", old="return a + b", new="return a + b + b",
    test="test_price.PriceTest.test_a_price_is_the_sum_of_its_parts",
    story="A customer has paid too much.",
    hints=("Look at the price.", "What does add() return?"))
FILES = [name for name in COPIED if (TOP / name).is_file()]
SHOP = {
    "microshop/__init__.py": "",
    "microshop/price.py": "def add(a, b):\n    return a + b\n",
    "tests/__init__.py": "",
    "tests/test_price.py": """\
import unittest
from microshop.price import add

class PriceTest(unittest.TestCase):
    def test_a_price_is_the_sum_of_its_parts(self):
        self.assertEqual(add(3, 4), 7, "the price of 3 and 4")

    def test_nothing_costs_nothing(self):
        self.assertEqual(add(0, 0), 0, "the price of 0 and 0")
"""}


NO_PYTHON = """\
======================================================================
ERROR: test_traces (unittest.loader._FailedTest.test_traces)
----------------------------------------------------------------------
ImportError: Failed to import test module: test_traces
Traceback (most recent call last):
  File "/usr/lib/python3.11/unittest/loader.py", line 162, in loadTestsFromName
    module = __import__(module_name)
             ^^^^^^^^^^^^^^^^^^^^^^^
  File "/x/.exercises/1/microshop/chassis/tracing.py", line 67
    headers = [
              ^
SyntaxError: '[' was never closed


----------------------------------------------------------------------
Ran 1 test in 0.000s
"""


def write(top: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)


def named_test(found: Exercise | Addition) -> tuple[type, str]:
    """Return the class of an exercise's test, and the name of the method."""
    module, case, method = f"tests.{found.test}".rsplit(".", 2)
    return getattr(importlib.import_module(module), case), method


class DataTest(unittest.TestCase):
    """What can be checked of each exercise at once."""

    def test_what_is_taken_out_occurs_once_and_the_rest_compiles(self):
        for number, found in enumerate(EXERCISES, start=1):
            with self.subTest(number=number, title=found.title), contextlib.ExitStack() as stack:
                if not isinstance(found, Exercise):
                    continue
                top = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                name = Path("microshop", found.file)
                write(top, {str(name): (TOP / name).read_text()})
                found.prepare(top)
                compile((top / name).read_text(), name, "exec")

    def test_a_model_solution_can_be_made_from_the_present_source(self):
        for number, found in enumerate(EXERCISES, start=1):
            with self.subTest(number=number, title=found.title), contextlib.ExitStack() as stack:
                if isinstance(found, Exercise):
                    continue
                top = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                shutil.copytree(TOP / "microshop", top / "microshop")
                shutil.copytree(TOP / "tests", top / "tests")
                found.solve(top)

    def test_its_test_exists_and_so_do_the_others_that_a_check_runs(self):
        for number, found in enumerate(EXERCISES, start=1):
            with self.subTest(number=number, title=found.title):
                case, method = named_test(found)
                self.assertTrue(hasattr(case, method), f"{case} has no {method}")

    def test_what_came_is_the_first_argument_of_each_comparison(self):
        modules = {inspect.getsourcefile(getattr(case, method))
                   for case, method in map(named_test, EXERCISES)}
        for path in sorted(modules):
            for node in ast.walk(ast.parse(Path(path).read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.assertEqual":
                    if not any(isinstance(part, ast.Name) for part in ast.walk(node.args[0])):
                        self.fail(f"{path}, line {node.lineno}: write assertEqual(what came, what "
                                  "was expected), as a check says to learners: "
                                  + ast.unparse(node))

    def test_its_pattern_is_in_the_index_and_its_chapter_in_the_tour(self):
        patterns = {row.name for row in INDEX}
        chapters = {chapter.name for chapter in all_chapters()}
        for number, found in enumerate(EXERCISES, start=1):
            with self.subTest(number=number, title=found.title):
                self.assertIn(found.pattern, patterns, "patterns in microshop/tour/index.py")
                self.assertIn(found.chapter, {"", *chapters}, "chapters of the tour")

    def test_it_tells_a_story_and_gives_two_or_three_hints(self):
        for number, found in enumerate(EXERCISES, start=1):
            with self.subTest(number=number, title=found.title):
                self.assertTrue(found.story.strip(), "it tells no story")
                self.assertIn(len(found.hints), (2, 3), "hints")
                self.assertIn(found.minutes, range(5, 46), "minutes")
                if isinstance(found, Exercise):
                    self.assertNotIn(found.file, found.story, "the story must not name the file")

    def test_hints_and_stories_name_files_by_their_path_from_the_top(self):
        for number, found in enumerate(EXERCISES, start=1):
            with tempfile.TemporaryDirectory() as folder:
                copy = Copy(number, found, Path(folder, "copy"))
                copy.make(found.solve)
                for name in re.findall(r"[\w/.-]+\.(?:py|json|md)\b",
                                       " ".join([found.story, *found.hints])):
                    with self.subTest(number=number, title=found.title, name=name):
                        self.assertTrue((copy.folder / name).is_file(),
                                        f"there is no {name} in the top folder")

    def test_the_index_gives_each_exercise_to_its_own_pattern(self):
        for row in INDEX:
            own = {number for number, found in enumerate(EXERCISES, start=1)
                   if found.pattern == row.name}
            with self.subTest(row.name):
                self.assertEqual(set(row.exercises), own,
                                 f"exercises of {row.name} in microshop/tour/index.py")

    def test_titles_are_different(self):
        titles = [found.title for found in EXERCISES]
        self.assertEqual(len(set(titles)), len(titles), f"titles: {sorted(titles)}")


class CollectionTest(unittest.TestCase):
    """What a learner reads whose tests of a new service are a copy that was not changed enough."""

    GOOD = {"service": Users, "path": "/users", "summaries": [{"id": 1}, {"id": 2}],
            "item": {"id": 1}, "insert": "INSERT INTO users VALUES (?)",
            "content": {"userId": 1, "text": "Good"}, "text": "text",
            "required": ["text", "userId"]}

    def run_copy(self, *left_out: str, **changed: object) -> unittest.TestResult:
        """Run one test of a class with these attributes."""
        attributes = {**self.GOOD, **changed}
        for name in left_out:
            del attributes[name]
        case = type("ReviewsTest", (WritableCollectionTests, unittest.TestCase), attributes)
        return case("test_the_first_start_adds_the_demo_rows").run()

    def test_an_attribute_that_is_missing_or_does_not_fit_is_named_in_a_sentence(self):
        for copied, expected in (
                (self.run_copy("text"), "ReviewsTest.text is 'name', but it must name a text in "
                 "ReviewsTest.content, which has the fields ['text', 'userId']"),
                (self.run_copy("required"), "ReviewsTest.required names ['name'], but "
                 "ReviewsTest.content has only the fields ['text', 'userId']"),
                (self.run_copy("insert"), "ReviewsTest has no attribute 'insert'"),
                (self.run_copy("content"), "ReviewsTest has no attribute 'content'"),
                (self.run_copy(path="/reviews"), "path is '/reviews', but the name of "
                 "ReviewsTest.service is 'users'"),
                (self.run_copy(summaries=[{"id": 1}]), "summaries needs two rows"),
                (self.run_copy(item={"id": 7}), "item must have the id of one of"),
                (self.run_copy(insert="INSERT INTO users VALUES (3)"), "needs one placeholder")):
            self.assertEqual(copied.errors, [], "exceptions instead of a sentence")
            [(_, printed)] = copied.failures
            self.assertIn(expected, printed, "what the test prints")

    def test_a_body_whose_wrong_fields_are_others_than_the_class_says_is_found_in_it(self):
        case = test_users.UsersTest(
            "test_an_invalid_body_is_422_and_names_every_wrong_field_at_once")
        case.wrong = [({"name": "Ann", "stock": 1}, ["price"])]
        [(_, printed), *_] = case.run().failures
        self.assertIn("the wrong fields of POST /users {'name': 'Ann', 'stock': 1} "
                      "(a body in UsersTest.wrong)", printed)

    def test_a_text_that_is_too_long_is_refused_with_a_message_that_says_how_long_it_may_be(self):
        case = test_users.UsersTest(
            "test_an_invalid_body_is_422_and_names_every_wrong_field_at_once")
        with mock.patch.object(Text, "check", lambda field, value: value):
            found = case.run()
        self.assertIn("the name has 201 characters, and a text has 1 to 200 characters",
                      "\n".join(printed for _, printed in found.failures))


class SmallProject(unittest.TestCase):
    """A project that consists of one function and its tests."""

    def setUp(self):
        self.top = Path(self.enterContext(tempfile.TemporaryDirectory()))
        write(self.top, {**{name: "" for name in FILES}, **SHOP})
        self.enterContext(contextlib.chdir(self.top))
        for module in ("exercise", "exercises.copies", "source"):
            self.enterContext(mock.patch(f"tests.{module}.TOP", self.top))


class RunnerTest(SmallProject):
    """The commands."""

    def setUp(self):
        super().setUp()
        self.enterContext(mock.patch("tests.exercise.EXERCISES", [FAULT]))
        self.code = self.top / ".exercises/1/microshop/price.py"

    def run_command(self, *arguments: str) -> tuple[int, str]:
        """Return the exit status and what was printed, as `python -m tests.exercise` would."""
        status, printed = 0, io.StringIO()
        with (mock.patch.object(sys, "argv", ["exercise", *arguments]),
              mock.patch("microshop.chassis.surroundings.prepare"),
              contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed)):
            try:
                exercise.main()
            except SystemExit as end:
                status = end.code
        return status, printed.getvalue()

    def assert_prints(self, arguments: str, status: int, *expected: str) -> str:
        found, printed = self.run_command(*arguments.split())
        self.assertEqual(found, status, f"exit status of {arguments!r}, which printed:\n{printed}")
        for text in expected:
            self.assertIn(text, printed, f"what {arguments!r} prints")
        return printed

    def assert_is_one_line(self, arguments: str, expected: str) -> None:
        printed = self.assert_prints(arguments, 2, expected)
        self.assertEqual(printed.count("\n"), 1, f"lines of {printed!r}")

    def repair(self) -> None:
        self.code.write_text(SHOP["microshop/price.py"].replace("a + b", "b + a"))

    def test_start_makes_a_copy_with_the_fault_and_says_what_to_do(self):
        printed = self.assert_prints(
            "start 1", 0, "A customer has paid too much.", f"tests.{FAULT.test}",
            "check 1", "hint 1")
        self.assertNotIn("price.py", printed, "it must not name the file of the fault")
        self.assertIn("a + b + b", self.code.read_text())
        self.assertNotIn("a + b + b", (self.top / "microshop/price.py").read_text())

    def test_a_second_start_is_refused_and_changes_nothing(self):
        self.run_command("start", "1")
        self.code.write_text("# my work")
        self.assert_is_one_line("start 1", "delete that folder to begin again")
        self.assertEqual(self.code.read_text(), "# my work")

    def test_check_shows_the_message_of_the_test_until_the_fault_is_repaired(self):
        self.run_command("start", "1")
        self.assert_prints("check 1", 1, "Not yet", "a price is the sum of its parts",
                           "    the price of 3 and 4\n    11 != 7\n")
        self.assert_prints("diff 1", 2, "is not done yet")
        self.repair()
        self.assert_prints("check 1", 0, "Done", "All exercises are done.")
        self.assert_prints("", 0, "[done]")
        self.assert_prints("diff 1", 0, "-    return a + b\n+    return b + a")

    def test_check_also_runs_the_rest_of_the_module(self):
        self.run_command("start", "1")
        self.code.write_text("def add(a, b):\n    return 7\n")
        self.assert_prints("check 1", 1, "Almost", "nothing costs nothing", "7 != 0")
        self.assert_prints("", 0, "[started]")

    def test_a_mistake_in_python_is_shown_as_such(self):
        self.run_command("start", "1")
        self.code.write_text("def add(a, b)\n    return a\n")
        self.assert_prints("check 1", 1, "SyntaxError")

    def test_which_value_came_is_explained_of_a_comparison_but_not_of_an_exception(self):
        self.run_command("start", "1")
        explanation = "(In `this != that`, this is what came"
        self.assert_prints("check 1", 1, explanation)
        self.code.write_text("def add(a, b):\n    return total if a != b else a\n")
        printed = self.assert_prints("check 1", 1, "return total if a != b else a")
        self.assertNotIn(explanation, printed)

    def test_an_edited_or_deleted_test_does_not_count(self):
        self.run_command("start", "1")
        test = self.top / ".exercises/1/tests/test_price.py"
        test.write_text(SHOP["tests/test_price.py"].replace("7", "11"))
        command = "cp tests/test_price.py .exercises/1/tests/test_price.py"
        self.assert_prints("check 1", 1, "not its tests", command)
        test.unlink()
        self.assert_prints("check 1", 1, "not its tests", command)

    def test_a_test_that_does_not_run_to_its_end_does_not_count(self):
        self.run_command("start", "1")
        write(self.top / ".exercises/1", {"microshop/__init__.py": "import os; os._exit(0)"})
        self.assert_prints("check 1", 1, "    of 1 tests in")

    def test_fewer_tests_than_in_the_original_do_not_count(self):
        self.run_command("start", "1")
        copy = Copy(1, FAULT, self.top / ".exercises/1")
        with mock.patch("tests.exercises.copies.count_tests", return_value=3):
            self.repair()
            self.assertRegex(copy.find_failure("test_price").message, "of 3 tests .* only 2 have")

    def test_a_test_that_never_ends_is_told_of(self):
        self.run_command("start", "1")
        self.code.write_text("while True: pass\n")
        with mock.patch("tests.exercises.copies.TEST_TIME", 0.5):
            self.assert_prints("check 1", 1, "ending the test", "within 0.5 s")

    def test_a_start_that_was_killed_can_be_repeated(self):
        write(self.top, {".exercises/1.draft/microshop/old.py": "half of a copy"})
        self.assert_prints("start 1", 0, FAULT.story)
        self.assertEqual([path.name for path in (self.top / ".exercises").iterdir()], ["1"])
        self.assertFalse((self.code.parent / "old.py").exists(), "the rest of the first start")

    def test_notes_that_are_damaged_count_as_none(self):
        self.run_command("start", "1")
        for text in ('{"hints": null, "done": true}', '{"done": "no"}', "[]", "7", "",
                     '{"hints": -9, "done": false}', '{"hints": "x", "done": 1}'):
            write(self.top, {".exercises/1/exercise.json": text})
            self.assert_prints("hint 1", 0, "Hint 1 of 2")
            self.assert_prints("diff 1", 2, "is not done yet")

    def test_what_the_system_refuses_is_one_line(self):
        write(self.top, {".exercises": "a file"})
        self.assert_is_one_line("start 1", "Not a directory")

    def test_an_addition_is_compared_with_the_model_solution(self):
        def solve(top: Path) -> None:
            write(top, {"microshop/price.py": SHOP["microshop/price.py"] + "# the model\n"})

        addition = Addition(title=FAULT.title, pattern=FAULT.pattern, minutes=5, test=FAULT.test,
                            further=(), may_change=(), solution=solve, story="", hints=(), look="/")
        with mock.patch("tests.exercise.EXERCISES", [addition]):
            self.run_command("start", "1")
            write(self.top, {".exercises/1/tests/.swap": ""})
            (self.top / ".exercises/1/tests/.swap").write_bytes(b"\xff\x00")  # an editor's
            self.run_command("check", "1")
            self.assert_prints("diff 1", 0, "model/microshop/price.py", "-# the model")

    def test_help_prints_how_to_use_it_and_list_prints_the_list(self):
        for word in ("-h", "--help", "help"):
            self.assert_prints(word, 0, "python -m tests.exercise start 3", "To begin again")
        self.assert_prints("list", 0, " 1  The doubled price\n    Addition, about 5 minutes\n")

    def test_a_bare_number_is_answered_with_the_command_that_was_meant(self):
        self.assert_is_one_line("1", "did you mean: python -m tests.exercise start 1")
        self.run_command("start", "1")
        self.assert_is_one_line("1", "did you mean: python -m tests.exercise check 1")
        self.assert_is_one_line("2", "there is no exercise 2; there are 1 to 1")

    def test_after_an_exercise_comes_the_next_one_that_is_not_done(self):
        with mock.patch("tests.exercise.EXERCISES", [FAULT] * 3):
            for number, offered in (("2", "start 3"), ("3", "start 1"), ("1", "")):
                self.run_command("start", number)
                copy = self.top / f".exercises/{number}/microshop/price.py"
                copy.write_text(SHOP["microshop/price.py"])
                self.assert_prints(f"check {number}", 0, f"Next: {COMMAND} {offered}"
                                   if offered else "All exercises are done.")

    def test_the_chapter_is_named_even_if_the_fault_does_not_show_in_it(self):
        for field, listed, told in (
                ("chapter", "5 minutes, chapter 7", "1 && python -m microshop.tour 7)\n"),
                ("related", "5 minutes, related: chapter 7", "  python -m microshop.tour 7\n")):
            shutil.rmtree(self.top / ".exercises", ignore_errors=True)
            with mock.patch("tests.exercise.EXERCISES", [FAULT._replace(**{field: "retries"})]):
                self.assert_prints("list", 0, listed)
                self.assert_prints("start 1", 0, told)

    def test_what_was_added_can_be_looked_at_once_it_is_done(self):
        addition = Addition(
            title=FAULT.title, pattern=FAULT.pattern, minutes=5, test=FAULT.test, further=(),
            may_change=(), solution=lambda top: None, story="", hints=(), look="/prices")
        with mock.patch("tests.exercise.EXERCISES", [addition]):
            self.run_command("start", "1")
            self.assert_prints(
                "check 1", 0,
                "  (cd .exercises/1 && python -m microshop.run_all --fresh --port 0)\n"
                "  curl localhost:PORT/prices\n")

    def test_a_test_in_a_copy_waits_20_s_in_vain_unless_the_environment_says_another_time(self):
        write(self.top, {"tests/test_price.py": "import os\nprint(os.environ['TEST_PATIENCE'])"})
        self.run_command("start", "1")
        others = {name: value for name, value in os.environ.items() if name != "TEST_PATIENCE"}
        for given, expected in (({}, "20"), ({"TEST_PATIENCE": "7"}, "7")):
            with mock.patch.dict("os.environ", {**others, **given}, clear=True):
                _, printed = Copy(1, FAULT, self.top / ".exercises/1").run("tests.test_price")
            self.assertEqual(printed.strip(), expected, f"TEST_PATIENCE, if a learner has {given}")

    def test_hints_come_one_by_one_and_the_last_one_stays(self):
        self.run_command("start", "1")
        self.assert_prints("hint 1", 0, "Hint 1 of 2: Look at the price.")
        for _ in range(2):
            self.assert_prints("hint 1", 0, "Hint 2 of 2: What does add() return?", "diff 1")

    def test_a_wrong_command_is_answered_with_one_line_and_status_2(self):
        self.assert_is_one_line("begin 1", "start, check, hint, diff")
        self.assert_is_one_line("start", "start, check, hint, diff")
        self.assert_is_one_line("start 2", "there is no exercise 2")
        self.assert_is_one_line("check 1", "was not started")

    def test_inside_a_copy_it_says_where_to_go(self):
        self.run_command("start", "1")
        with mock.patch("tests.exercise.TOP", self.top / ".exercises/1"):
            self.assert_is_one_line("check 1", "go to the top folder first")

    def interrupt_check(self, *interrupted: str, ignores: str = "") -> int:
        """Interrupt these methods of Popen while a test runs; return how the test has ended."""
        write(self.top, {"tests/test_price.py":
                         f"import signal, time\n{ignores}\nopen('begun', 'w')\ntime.sleep(600)"})
        self.run_command("start", "1")
        copy = Copy(1, FAULT, self.top / ".exercises/1")

        def interrupt(popen: subprocess.Popen, *_: object, **__: object) -> None:
            wait_until((copy.folder / "begun").exists, "the test to begin")
            raise KeyboardInterrupt

        with (mock.patch.multiple(subprocess.Popen, **dict.fromkeys(interrupted, interrupt)),
              contextlib.redirect_stderr(io.StringIO()) as printed,
              self.assertRaises(KeyboardInterrupt)):
            copy.find_failure(FAULT.test)
        self.assertIn("ending the test, up to 30 s", printed.getvalue())
        return copy.running.wait(PATIENCE)

    def test_an_interrupted_check_leaves_no_process(self):
        self.assertEqual(self.interrupt_check("communicate"), -signal.SIGINT)

    def test_a_second_ctrl_c_kills_a_test_that_does_not_end(self):
        ignores = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
        self.assertEqual(self.interrupt_check("communicate", "wait", ignores=ignores),
                         -signal.SIGKILL)


class ProofTest(SmallProject):
    """What the proofs find."""

    def problems_of(self, **changes) -> str:
        """Prove the exercise with these changes; return the problems."""
        with mock.patch("tests.proofs.EXERCISES", [FAULT._replace(**changes)]):
            return "\n".join(Proof(1, self.top / "proofs").run().problems)

    def test_an_exercise_whose_test_fails_and_whose_solution_passes_is_proven(self):
        self.assertEqual(self.problems_of(), "")

    def test_a_fault_that_its_test_does_not_find_is_a_problem(self):
        self.assertRegex(self.problems_of(new="return b + a"), "passes, but should fail")

    def test_an_exception_in_place_of_a_failure_is_a_problem(self):
        self.assertRegex(self.problems_of(new="return a + c"),
                         r"must fail, not raise: [^:]*NameError")

    def test_a_message_that_says_nothing_is_a_problem(self):
        test = SHOP["tests/test_price.py"]
        write(self.top, {"tests/test_price.py": test.replace(', "the price of 3 and 4"', "")})
        self.assertRegex(self.problems_of(), "should say more than: 11 != 7")

    def test_a_chapter_that_differs_because_no_shop_starts_is_a_problem(self):
        write(self.top, {"microshop/tour/__init__.py": "", "microshop/tour/__main__.py":
                         "print('[!!]\\n  expected: the shop runs'); raise SystemExit(1)"})
        self.assertRegex(self.problems_of(chapter="one_request"), "does not come out differently")

    def test_a_chapter_that_shows_the_fault_is_proof(self):
        write(self.top, {"microshop/tour/__init__.py": "", "microshop/tour/__main__.py":
                         "print('(a shop was started\\n[!!] differently'); raise SystemExit(1)"})
        self.assertEqual(self.problems_of(chapter="one_request"), "")

    def test_a_test_that_fails_without_the_fault_is_a_problem(self):
        test = SHOP["tests/test_price.py"]
        write(self.top, {"tests/test_price.py": test.replace("4), 7", "4), 8")})
        self.assertRegex(self.problems_of(), "with the solution, .* fails: 7 != 8")

    def test_an_edit_that_does_not_fit_the_source_is_a_problem(self):
        self.assertRegex(self.problems_of(old="return a - b"), "has this 0 times instead of once")


class ReviewsCheckTest(unittest.TestCase):
    """What the check of the exercise about reviews finds in a solution that lacks something."""

    def failure_of(self, test: str, name: str, old: str, new: str) -> str:
        """Run a test of the check on the model solution with one edit; return its message."""
        number = next(number for number, found in enumerate(EXERCISES, start=1)
                      if found.look == "/reviews")
        with tempfile.TemporaryDirectory() as folder:
            copy = Copy(number, EXERCISES[number - 1], Path(folder, "copy"))
            copy.make(copy.exercise.solve)
            edit(copy.folder / name, old, new)
            failure = copy.find_failure(f"exercises.checks.ReviewsTest.{test}")
        self.assertTrue(failure, f"{test} passes although {old!r} is {new!r} in {name}")
        return failure.message

    def test_a_put_that_does_not_write_one_of_the_fields_is_found(self):
        message = self.failure_of(
            "test_reviews_are_written_and_read_through_the_gateway",
            "microshop/reviews.py", "productId = :productId,", "")
        self.assertRegex(message, "'productId': 101.* != .*'productId': 102")
        self.assertRegex(message, "body of the answer to GET /reviews/3 after PUT /reviews/3 {")

    def test_tests_that_unittest_does_not_run_are_found(self):
        for old, new in (("(WritableCollectionTests, unittest.TestCase):",
                          "(unittest.TestCase):\n    def test_nothing(self):\n        pass\n"),
                         ("(WritableCollectionTests, unittest.TestCase)",
                          "(WritableCollectionTests)"),
                         ("microshop.reviews import Reviews",
                          "microshop.users import Users as Reviews")):
            message = self.failure_of(
                "test_the_tests_of_every_collection_that_can_be_changed_run_for_reviews_too",
                "tests/test_reviews.py", old, new)
            self.assertRegex(message, "has no class that unittest runs for reviews")


class FailureTest(unittest.TestCase):
    def failure_of(self, test) -> Failure:
        """Return what is found in the output of a test."""
        printed = io.StringIO()
        case = type("ShopTest", (unittest.TestCase,), {"test_the_shop_is_open": test})
        unittest.TextTestRunner(printed).run(case("test_the_shop_is_open"))
        return Failure(printed.getvalue())

    def test_a_failed_assertion_has_the_kind_fail_and_its_message(self):
        failure = self.failure_of(lambda case: case.assertEqual(404, 200, "status of GET /users"))
        self.assertEqual((failure.kind, failure.sentence, failure.message),
                         ("FAIL", "the shop is open", "404 != 200 : status of GET /users"))

    def test_what_the_test_says_comes_before_a_long_comparison(self):
        failure = self.failure_of(
            lambda case: case.assertEqual(list(range(50)), [], "users in GET /users"))
        first, second = failure.shortened().splitlines()[1:3]
        self.assertEqual(first, "    users in GET /users")
        self.assertTrue(second.startswith("    Lists differ: [0, 1, 2"), f"then comes {second}")

    def test_any_other_exception_has_the_kind_error_and_its_name(self):
        failure = self.failure_of(lambda case: {}["users"])
        self.assertEqual(failure.kind, "ERROR")
        self.assertRegex(failure.message, r"""File "tests/test_exercise.py", line \d+, in .*
.*\{\}\["users"\].*
KeyError: 'users'""")

    def test_a_module_that_is_no_python_is_shown_with_the_line(self):
        failure = Failure(NO_PYTHON)
        self.assertEqual(failure.message, """File "microshop/chassis/tracing.py", line 67
headers = [
SyntaxError: '[' was never closed""")

    def test_what_a_process_of_the_shop_has_raised_is_shown_too(self):
        def test(case):
            error = AssertionError("GET /users: 500")
            error.add_note("What happened last:\n  gateway failed\n  Traceback ...\n"
                           '    File "/x/microshop/users.py", line 7, in f\n      name\n'
                           "  NameError: name 'name' is not defined\n  port 1 answered 500")
            raise error

        self.assertEqual(self.failure_of(test).shortened().splitlines()[1:], [
            "    GET /users: 500", "  A process has logged:",
            '    File "microshop/users.py", line 7, in f', "    name",
            "    NameError: name 'name' is not defined"])

    def test_the_last_of_several_exceptions_counts(self):
        def test(case):
            try:
                raise ConnectionError("refused")
            except ConnectionError:
                case.fail("GET /users: no answer")

        self.assertEqual(self.failure_of(test).message, "GET /users: no answer")

    def test_a_subtest_is_named(self):
        def test(case):
            with case.subTest(status=500):
                case.fail("GET /users: 500")

        self.assertIn("the shop is open (status=500):", self.failure_of(test).shortened())

    def test_a_message_that_says_nothing_is_not_proof_enough(self):
        for assertion in (lambda case: case.assertTrue(False), lambda case: case.assertIsNone(7),
                          lambda case: case.assertFalse([1]), lambda case: case.fail(),
                          lambda case: case.assertIsNotNone(None),
                          lambda case: case.assertEqual(1, 2)):
            message = self.failure_of(assertion).message
            self.assertTrue(BARE.fullmatch(message), f"this should not do: {message!r}")
        self.assertFalse(BARE.fullmatch("404 != 200 : status of GET /users"))


if __name__ == "__main__":
    unittest.main()
