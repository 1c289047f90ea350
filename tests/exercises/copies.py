"""Copies of the project in which exercises are done, and what the tests in them say."""
import difflib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

from microshop.tour.drawing import draw_lines, draw_text
from tests.exercises import Addition, Exercise
from tests.helpers import TOP
from tests.source import COPIED, copy_project

NOTES = "exercise.json"  # in a copy: what its learner has done
MESSAGE_LINES = 14       # of a failure that are shown
PATIENCE = "20"          # seconds that a test waits in vain: a learner is watching
TEST_TIME = 300.0        # seconds that a test, or a module of tests, may take
END_TIME = 30.0          # seconds that an interrupted test has to end its processes


class Failure:
    """The first problem in what unittest has printed: its kind (FAIL, ERROR), test and message."""

    def __init__(self, printed: str):
        block = re.search(r"(?ms)^(FAIL|ERROR): (\S+) \((\S+)\)([^\n]*)\n"
                          r"(.*?)(?=^={70}$|^-{70}\nRan |\Z)", printed)
        self.kind, test, name, self.case, text = (
            block.groups() if block else ("ERROR", "", "", "", printed))
        self.test = name if name.startswith("tests.") else ""  # unless a module cannot be imported
        self.sentence = test.rpartition(".")[2].removeprefix("test_").replace("_", " ")
        text, _, journal = text.partition("\nWhat happened last:")
        self.raised_in_a_process = last_raised(journal)
        last = re.split(r"(?m)^(?:During handling|The above exception) .*$", text)[-1]
        raised = re.search(r"(?ms)^[\w.]*(?:Error|Exception|Exit|Interrupt)\b.*", last)
        message = raised[0] if raised else last
        if self.kind == "FAIL":
            message = message.removeprefix("AssertionError: ")
        else:
            message = last_raised(last) or message
        self.message = message.strip()

    def lines(self) -> list[str]:
        """Return the lines of the message. What the test itself says is the first."""
        compared, _, own = self.message.rpartition(" : ")  # unittest puts it last, after a diff
        return [*own.splitlines(), *compared.splitlines()]

    def shortened(self) -> str:
        """Return the test's sentence and the message, for a page 80 columns wide."""
        lines = draw_lines("\n".join(self.lines()), "    ").splitlines()
        if len(lines) > MESSAGE_LINES:
            lines[MESSAGE_LINES:] = ["    ..."]
        if self.raised_in_a_process:
            lines += ["  A process has logged:", draw_lines(self.raised_in_a_process, "    ")]
        title = [draw_text(f"{self.sentence}{self.case}:", "  ")] if self.sentence else []
        return "\n".join([*title, *lines])


def last_raised(text: str) -> str:
    """Return the last exception in a text that has tracebacks, with the line that raised it."""
    found = re.findall(
        r'(?m)^ *(File "[^"\n]+", line \d+.*\n(?:^ +(?!File )\S.*\n)*?^ *[\w.]*Error\b.*)', text)
    lines = [line.strip() for line in found[-1].splitlines()] if found else []
    return "\n".join(re.sub(r'^File ".*?((?:microshop|tests)/)', r'File "\1', line)
                     for line in lines if line.strip("^~"))


class Copy:
    """A copy of the project in which one exercise is done."""

    def __init__(self, number: int, exercise: Exercise | Addition, folder: Path):
        self.number, self.exercise, self.folder = number, exercise, folder
        self.is_interrupted = False
        self.running: subprocess.Popen | None = None

    # --- the notes

    def notes(self) -> dict[str, Any]:
        """Return how many hints were given, and whether the exercise is done."""
        try:
            notes = json.loads((self.folder / NOTES).read_text())
            return {"hints": max(int(notes["hints"]), 0), "done": notes["done"] is True}
        except (OSError, ValueError, TypeError, KeyError):  # a learner may have edited it
            return {"hints": 0, "done": False}

    def note(self, **notes: Any) -> None:
        (self.folder / NOTES).write_text(json.dumps({**self.notes(), **notes}) + "\n")

    def state(self) -> str:
        if not self.folder.exists():
            return ""
        return "done" if self.notes()["done"] else "started"

    # --- the files

    def make(self, change: Callable[[Path], None]) -> None:
        """Copy the project here and change it, or leave nothing that looks like a copy."""
        draft = self.folder.with_name(f"{self.folder.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)  # of a start that was killed
        draft.mkdir(parents=True)
        try:
            copy_project(draft)
            change(draft)
            draft.rename(self.folder)
        except BaseException:
            shutil.rmtree(draft)
            raise

    def changed_tests(self) -> list[str]:
        """Return the files of tests/ that differ from the original, or are gone, but should not."""
        return [name for name, original in files_below(TOP / "tests", TOP).items()
                if name not in self.exercise.may_change
                and (not (self.folder / name).is_file()
                     or (self.folder / name).read_bytes() != original.read_bytes())]

    def difference(self, solution: Path, title: str) -> str:
        """Return a diff from a solution to this copy, of all that was added or changed."""
        names = {name for top in (self.folder, solution) for part in COPIED
                 for name in files_below(top / part, top)}
        return "".join(
            line for name in sorted(names) for line in difflib.unified_diff(
                lines_of(solution / name), lines_of(self.folder / name), f"{title}/{name}",
                f"yours/{name}"))

    # --- what runs in it

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run `python -m` with these arguments; return its exit status and what it has printed.

        If this is interrupted, so is what runs: it gets time to end its own processes.
        """
        with subprocess.Popen([sys.executable, "-m", *arguments], cwd=self.folder, text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, errors="replace",
                              env={"TEST_PATIENCE": PATIENCE, **os.environ},
                              start_new_session=True) as self.running:  # Ctrl-C: once, from us
            try:
                if self.is_interrupted:
                    self.interrupt()
                printed, _ = self.running.communicate(timeout=TEST_TIME)
            except BaseException:
                print(f"(ending the test, up to {END_TIME:g} s; Ctrl-C again: at once)",
                      file=sys.stderr, flush=True)
                self.interrupt()
                raise
        return self.running.returncode, printed

    def interrupt(self) -> None:
        """End what runs, as Ctrl-C would; kill it if it does not end, or at a second Ctrl-C."""
        self.is_interrupted = True
        if self.running and self.running.poll() is None:
            self.running.send_signal(signal.SIGINT)
            try:
                self.running.wait(END_TIME)
            except BaseException as error:
                os.killpg(self.running.pid, signal.SIGKILL)  # it began a session
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise

    def find_failure(self, test: str) -> Failure | None:
        """Run a test, or a module of tests, with a name below tests.

        It has also failed if fewer tests have run than the original has.
        """
        try:
            status, printed = self.run("unittest", f"tests.{test}")
        except subprocess.TimeoutExpired:
            return Failure(f"tests.{test} did not end within {TEST_TIME:g} s")
        if status:
            return Failure(printed)
        ran = re.search(r"(?m)^Ran (\d+) tests? ", printed)
        count, expected = int(ran[1]) if ran else 0, count_tests(test)
        return None if count >= expected else Failure(
            f"of {expected} tests in tests.{test}, only {count} have run")


def count_tests(test: str) -> int:
    """Return how many tests the original has under a name below tests; 1 if it has no such name."""
    return unittest.defaultTestLoader.loadTestsFromName(f"tests.{test}").countTestCases()


def files_below(folder: Path, top: Path) -> dict[str, Path]:
    """Return the files in a folder, or the one that it is, by their paths below `top`."""
    paths = [folder] if folder.is_file() else folder.rglob("*")
    return {path.relative_to(top).as_posix(): path for path in paths
            if path.is_file() and "__pycache__" not in path.parts}


def lines_of(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
