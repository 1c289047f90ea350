"""The tour: its command, its verbs, its index, and that nothing is left of a chapter's shop."""
import ast
import contextlib
import io
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import unittest
import unittest.mock
from pathlib import Path

from microshop import GATEWAY_PORT, LIVE_PORT
from microshop.tour import __main__ as command
from microshop.tour import drawing, index
from microshop.tour.chapters import Chapter, all_chapters
from microshop.tour.own_shop import Different
from microshop.tour.stage import Stage, Tour
from tests.exercise import EXERCISES
from tests.helpers import PATIENCE, TOP, Process, clean_environment, wait_until
from tests.source import SOURCES

CHAPTER_FILES = [name for name in SOURCES if name.startswith("tour/")
                 and re.search(r"\(tour: Tour", SOURCES[name])]
# What may be wider than the page: it is meant to be copied.
COPIED = re.compile(r"^(\$ |\(the answer to |\(a shop of |.*python -m unittest |.*http://)")
# A number with its unit, in words: it must come from the constant that it belongs to.
FIXED_NUMBER = re.compile(
    r"\b\d+(\.\d+)? ?(s|ms|seconds?|minutes?|times|failures|calls|requests|retries|%)\b")
VERBS = {"say", "predict", "trade_off", "expect"}


@contextlib.contextmanager
def own_folder():
    """Make a folder to run the tour in, where it may leave its notes. Its name has a space."""
    with tempfile.TemporaryDirectory(prefix="a folder-") as name:
        yield Path(name)


def run_tour(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run `python -m microshop.tour`, with its output in a pipe."""
    return subprocess.run(
        [sys.executable, "-m", "microshop.tour", *arguments], cwd=folder, text=True,
        capture_output=True, stdin=subprocess.DEVNULL, timeout=PATIENCE,
        env=clean_environment(PYTHONPATH=str(TOP), TMPDIR=str(folder)))


def shops_of(folder: Path) -> list[str]:
    """Return the processes that chapters have started with this folder for temporary files."""
    if not Path("/proc/self/environ").exists():
        raise unittest.SkipTest("no /proc on this system, so processes that are left are not seen")
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"TMPDIR={folder}\0".encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_bytes().decode().replace("\0", " "))
    return [line for line in found if re.search(r"microshop\.|tests\.textbook", line)]


class OnTerminal:
    """The tour on a terminal of its own, as a learner runs it."""

    def __init__(self, folder: Path, *arguments: str):
        self.terminal, other = pty.openpty()
        self.printed = b""
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "microshop.tour", *arguments], cwd=folder,
            preexec_fn=lambda: os.login_tty(other),  # so that its Ctrl-C reaches the tour
            env=clean_environment(PYTHONPATH=str(TOP), TMPDIR=str(folder)))
        os.close(other)

    def __enter__(self) -> "OnTerminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()
        self.popen.wait()
        self.close_terminal()

    def close_terminal(self) -> None:
        """Close the terminal, whose processes get a SIGHUP."""
        with contextlib.suppress(OSError):  # that was done before
            os.close(self.terminal)

    def read_until(self, text: str) -> None:
        """Read what it prints until a text comes. Raises AssertionError if it ends before."""
        begin = len(self.printed)
        while text.encode() not in self.printed[begin:]:
            try:
                self.printed += os.read(self.terminal, 4096)
            except OSError:  # it has ended
                raise AssertionError(f"the tour ended without printing {text!r}: "
                                     + self.printed.decode()[-500:]) from None

    def press(self, key: bytes) -> None:
        os.write(self.terminal, key)


class PipedChapterTest(unittest.TestCase):
    """A chapter that has no standard input, and whose output goes into a file, as in CI."""

    @classmethod
    def setUpClass(cls):
        cls.folder = cls.enterClassContext(own_folder())
        cls.done = subprocess.run(
            ["sh", "-c", f"{shlex.quote(sys.executable)} -m microshop.tour 1 <&-"],
            cwd=cls.folder, capture_output=True, text=True, timeout=PATIENCE,
            env=clean_environment(PYTHONPATH=str(TOP), TMPDIR=str(cls.folder)))
        cls.lines = cls.done.stdout.splitlines()

    def test_it_comes_out_as_it_says(self):
        self.assertEqual((self.done.returncode, self.done.stderr), (0, ""), self.done.stdout)
        self.assertIn("[ok]", self.done.stdout)

    def test_it_ends_with_the_code_the_test_the_next_chapter_and_the_live_picture(self):
        end = "\n".join(self.lines[-12:])
        for pattern in (r"microshop/gateway\.py:\d+ GatewayHandler\.forward",
                        r"python -m unittest tests\.\S+", r"Next +python -m microshop\.tour 2\n",
                        r"http://localhost:\d+/#trace=[0-9a-f]{32}"):
            self.assertRegex(end, pattern, "the last lines of a chapter")

    def test_prose_fits_on_80_columns_and_is_plain_ascii_without_colours(self):
        wide = [line for line in self.lines if len(line) > 80 and not COPIED.search(line)]
        self.assertEqual(wide, [])
        self.assertTrue(self.done.stdout.isascii())
        self.assertNotIn("\x1b", self.done.stdout)

    def test_it_uses_neither_the_usual_ports_nor_the_folder_of_a_shop(self):
        ports = {int(port) for port in re.findall(r"localhost:(\d+)", self.done.stdout)}
        self.assertEqual(ports & set(range(GATEWAY_PORT, LIVE_PORT + 1)), set())
        self.assertEqual([path.name for path in self.folder.iterdir()], [".tour"])

    def test_no_process_is_left(self):
        self.assertEqual(shops_of(self.folder), [])

    def test_the_list_tells_which_chapter_was_done_and_which_is_next(self):
        listed = run_tour(self.folder).stdout
        self.assertRegex(listed, r"(?m)^  x  1  ")
        self.assertIn("The last one you did is chapter 1.", listed)
        self.assertIn("python -m microshop.tour 2\n", listed)


class TerminalTest(unittest.TestCase):
    def test_a_question_waits_for_enter_and_the_shop_for_another_one(self):
        with own_folder() as folder, OnTerminal(folder, "1") as tour:
            tour.read_until("Enter goes on")
            self.assertNotIn(b"HTTP/1.1 200", tour.printed, "the answer comes after the question")
            tour.press(b"\n")
            tour.read_until("Enter ends this shop")
            self.assertNotEqual(shops_of(folder), [], "the shop must run while it can be watched")
            tour.press(b"\n")
            self.assertEqual(tour.popen.wait(PATIENCE), 0)
            self.assertEqual(shops_of(folder), [])

    def test_ctrl_c_ends_the_shop_and_all_its_processes(self):
        with own_folder() as folder, OnTerminal(folder, "1") as tour:
            tour.read_until("Enter goes on")
            tour.press(b"\x03\n")  # Enter, in case it comes before input() reads
            tour.read_until("(stopped; the shop of the chapter has ended)")
            self.assertEqual(tour.popen.wait(PATIENCE), 128 + signal.SIGINT)
            self.assertEqual(shops_of(folder), [])
            self.assertFalse((folder / ".tour").exists(), "the chapter was not done")

    def test_the_shop_of_a_tour_that_is_killed_ends_by_itself(self):
        with own_folder() as folder, OnTerminal(folder, "1") as tour:
            tour.read_until("Enter goes on")
            tour.popen.kill()
            wait_until(lambda: not shops_of(folder), "the shop of a killed tour to end")


    def test_a_terminal_that_is_closed_ends_the_chapter_and_all_that_it_has_made(self):
        with own_folder() as folder, OnTerminal(folder, "14") as tour:
            tour.read_until("Enter goes on")
            tour.close_terminal()
            tour.popen.wait(PATIENCE)
            wait_until(lambda: not shops_of(folder), "the shop to end")  # there were two SIGHUPs
            self.assertEqual([path.name for path in folder.iterdir()], [], "files that are left")

    def test_a_signal_while_a_process_is_started_leaves_none(self):
        with own_folder() as folder, contextlib.closing(Process(
                "microshop.tour", "15", folder=folder, PYTHONPATH=str(TOP),
                TMPDIR=str(folder))) as tour:  # without a terminal, which would end them too
            wait_until(lambda: any("tests.textbook" in line for line in shops_of(folder)),
                       "the textbook version to be started")
            self.assertEqual(tour.stop(), 128 + signal.SIGTERM)
            self.assertEqual(shops_of(folder), [])


class CommandTest(unittest.TestCase):
    def test_output_that_cannot_be_written_is_one_line(self):
        with own_folder() as folder, open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "microshop.tour", "index"], cwd=folder, stdout=full,
                stderr=subprocess.PIPE, text=True, env=clean_environment(PYTHONPATH=str(TOP)))
        self.assertEqual((done.returncode, done.stderr), (
            1, "python -m microshop.tour: No space left on device\n"))

    def test_what_it_does_not_know_is_refused_with_status_2(self):
        with own_folder() as folder:
            for word in ("0", "99", "chapter"):
                done = run_tour(folder, word)
                self.assertEqual(done.returncode, 2, f"tour {word}: {done.stdout}")
                self.assertIn(f"invalid choice: '{word}'", done.stderr)
            done = run_tour(folder, "3", "--all")
            self.assertEqual(done.returncode, 2, done.stdout)
            self.assertIn("--all runs all chapters; it takes no number", done.stderr)

    def test_the_plans_for_a_class_name_every_chapter_and_every_exercise(self):
        with own_folder() as folder:
            printed = run_tour(folder, "class").stdout
        for chapter in all_chapters():
            self.assertRegex(printed, rf"(?m)^ *{chapter.number} +{chapter.title}  +\w")
        for number, exercise in enumerate(EXERCISES, start=1):
            self.assertRegex(
                printed, rf"(?m)^ *{number} +{exercise.title} +{exercise.minutes} min  \w")
        self.assertIn(f"{len(all_chapters())} of {len(all_chapters())} chapters", printed)
        self.assertEqual([line for line in printed.splitlines() if len(line) > 80], [])


class DifferentTest(unittest.TestCase):
    """A chapter that does not come out as it says, without a shop."""

    def run_command(self, *functions) -> tuple[bool, str]:
        chapters = [Chapter(number, function.__name__, "A title", function)
                    for number, function in enumerate(functions, start=1)]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            return command.run_all_chapters(chapters), printed.getvalue()

    def test_it_says_what_was_expected_and_what_came_and_the_others_go_on(self):
        def wrong(tour: Tour) -> None:
            tour.expect("The answer is 201", 500, 201)

        def right(tour: Tour) -> None:
            tour.expect("The answer is 200", 200, 200)

        is_right, printed = self.run_command(wrong, right)
        self.assertFalse(is_right)
        self.assertRegex(printed, r"\[!!\] .*differently.*\n +expected: The answer is 201\n"
                                  r" +came: 500\n")
        self.assertIn("[ok] The answer is 200", printed)
        self.assertIn("1 of 2 chapters came out as they say; not so: 1", printed)

    def test_an_answer_that_lacks_something_is_different_too(self):
        def wrong(tour: Tour) -> None:
            tour.expect("It is order 203", {"status": 500}["id"], 203)

        is_right, printed = self.run_command(wrong)
        self.assertFalse(is_right)
        self.assertRegex(printed, r"\[!!\] [^@]*came: KeyError\('id'\)")

    def test_all_that_come_out_right_are_counted(self):
        def right(tour: Tour) -> None:
            tour.expect("The answer is below 300", 200, lambda status: status < 300)

        self.assertEqual(self.run_command(right)[0], True)

    def test_what_is_polled_for_and_never_comes_is_different(self):
        with (unittest.mock.patch("microshop.tour.own_shop.PATIENCE", 0.0),
              self.assertRaisesRegex(Different, "order 203 is confirmed") as caught):
            Stage(contextlib.ExitStack(), is_interactive=False).expect(
                "order 203 is confirmed", lambda: "pending", "confirmed")
        self.assertEqual(caught.exception.came, "pending")


class DrawingTest(unittest.TestCase):
    def test_a_command_can_be_copied_as_it_is(self):
        drawn = drawing.draw_curl("localhost:4000/orders?status=a&limit=1", "PUT",
                                  {"If-Match": '"a tag"'}, '{"name":"It\'s"}')
        self.assertEqual(shlex.split(drawn), [
            "curl", "-i", "-X", "PUT", "localhost:4000/orders?status=a&limit=1",
            "-H", 'If-Match: "a tag"', "-d", '{"name":"It\'s"}'])

    def test_a_long_body_is_broken_after_commas_and_never_within_a_word(self):
        lines = drawing.draw_body('{"user":null,' * 8 + '"detail":"the users service is away"}')
        self.assertEqual(lines, ['{"user":null,' * 6, '  {"user":null,{"user":null,"detail":"the '
                                                      'users service is away"}'])

    def span(self, number: str, parent: str, begin: int, duration: int, kind: str) -> dict:
        return {"id": number, "parentId": parent, "timestamp": begin, "duration": duration,
                "kind": kind, "name": f"get /{number}", "localEndpoint": {"serviceName": "shop"},
                "tags": {"http.status_code": "200", "try": "1"}}

    def test_the_bars_of_a_waterfall_show_when_each_span_began_and_how_long_it_took(self):
        drawn = drawing.draw_trace([self.span("a", "", 1000, 2000, "SERVER"),
                                    self.span("b", "a", 2000, 1000, "CLIENT")]).splitlines()
        self.assertRegex(drawn[0], r"0 ms +2\.0 ms$")
        self.assertRegex(drawn[1], rf"^shop get /a +200 +={{{drawing.BAR}}}$")
        half = drawing.BAR // 2
        self.assertRegex(drawn[2], rf"^  shop get /b \(call\) +200 +={{{half}}}$")
        self.assertEqual(len(drawn[2]), len(drawn[1]), "it ends when the whole request ends")

    def test_each_span_of_a_waterfall_is_below_its_parent_and_orphans_are_at_the_left(self):
        spans = [self.span("d", "c", 4000, 1, "SERVER"), self.span("a", "", 1000, 9000, "SERVER"),
                 self.span("c", "a", 2000, 1, "CLIENT"), self.span("b", "a", 3000, 1, "CLIENT"),
                 self.span("x", "unknown", 5000, 1, "SERVER")]
        names = [line.partition(" 200")[0].rstrip()
                 for line in drawing.draw_trace(spans).splitlines()[1:]]
        self.assertEqual(names, ["shop get /a", "  shop get /c (call)", "    shop get /d",
                                 "  shop get /b (call)", "shop get /x"])


class IndexTest(unittest.TestCase):
    def test_every_place_is_in_the_code(self):
        for row in index.INDEX:
            with self.subTest(row.name):
                place = row.location().partition(" ")[0]
                file, _, line = place.partition(":")
                self.assertTrue((TOP / file).exists(), f"{row.name}: there is no {file}")
                if line:
                    source = (TOP / file).read_text().splitlines()
                    name = row.symbol().rpartition(".")[2]
                    self.assertRegex("\n".join(source[int(line) - 1:int(line) + 3]),
                                     rf"(def|class) {name}\b", f"{row.name}: {place}")

    def test_every_test_exists(self):
        for row in index.INDEX:
            with self.subTest(row.name):
                loader = unittest.TestLoader()
                [test] = loader.loadTestsFromName(f"tests.{row.test}")
                self.assertEqual((test.id(), loader.errors), (f"tests.{row.test}", []))

    def test_every_chapter_has_a_pattern_and_every_pattern_a_chapter_that_exists(self):
        chapters = {chapter.name for chapter in all_chapters()}
        shown = {row.chapter for row in index.INDEX if row.chapter}
        self.assertLessEqual(shown, chapters, "chapters in the index that do not exist")
        self.assertLessEqual(chapters - shown, {"textbook"}, "chapters that the index lacks")

    def test_the_readme_has_the_index(self):
        readme = (TOP / "README.md").read_text()
        missing = [line for line in index.as_markdown().splitlines() if line not in readme]
        self.assertEqual(missing, [], "README.md must contain what `python -m microshop.tour index "
                                      "--markdown` prints: copy it there")
        self.assertTrue(index.as_markdown() in readme, "README.md has all of the index, but not as "
                                                       "one block in this order")


class ChapterLawTest(unittest.TestCase):
    def test_nothing_waits_for_a_fixed_time(self):
        for name in SOURCES:
            if name.startswith("tour/"):
                count = len(re.findall(r"\bsleep\(", SOURCES[name]))
                self.assertEqual(count, name == "tour/own_shop.py",
                                 f"microshop/{name}: wait for what must come, with expect()")

    def test_every_number_in_prose_comes_from_a_constant(self):
        for name in CHAPTER_FILES:
            for call in ast.walk(ast.parse(SOURCES[name])):
                if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in VERBS:
                    words = [part.value for part in ast.walk(call)
                             if isinstance(part, ast.Constant) and isinstance(part.value, str)]
                    found = [text for text in words if FIXED_NUMBER.search(text)]
                    self.assertEqual(found, [], f"microshop/{name}, line {call.lineno}: take the "
                                                "number from the class or constant it belongs to")


if __name__ == "__main__":
    unittest.main()
