"""The exercises, for learners: find what was taken out of the shop, and put it back.

    python -m tests.exercise            the list
    python -m tests.exercise start 3    make a copy of the project with one fault in it, and say
                                        what users notice and which test fails
    python -m tests.exercise check 3    run that test, then the rest of its module
    python -m tests.exercise hint 3     the next of two or three hints
    python -m tests.exercise diff 3     once it is done: your code beside the original

The copy is in the folder .exercises/3. What happens in it changes nothing else. To begin again,
delete that folder.
"""
import difflib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from microshop.chassis import surroundings
from microshop.tour.chapters import number_of
from microshop.tour.drawing import WIDTH, draw_lines, draw_text
from tests.exercises import Addition, Exercise, adding, failures, first_steps, running, sagas
from tests.helpers import TOP
from tests.source import COPIED, copy_project

COMMAND = "python -m tests.exercise"
EXERCISES: list[Exercise | Addition] = [
    *first_steps.EXERCISES, *failures.EXERCISES, *sagas.EXERCISES, *running.EXERCISES,
    *adding.EXERCISES]
FOLDER = Path(".exercises")
NOTES = "exercise.json"  # in a copy: what its learner has done
MESSAGE_LINES = 14       # of a failure that are shown
END_TIME = 30.0          # seconds that an interrupted test has to end its processes


class Refused(Exception):
    """What the learner wants is not possible; the message says why, and what to do."""


class NotDone(Exception):
    """A check has found something; what that is has been printed."""


class Failure:
    """The first problem in what unittest has printed: its kind (FAIL, ERROR), test and message."""

    def __init__(self, printed: str):
        block = re.search(r"(?ms)^(FAIL|ERROR): (\w+) \(\S+\)([^\n]*)\n"
                          r"(.*?)(?=^={70}$|^-{70}\nRan |\Z)", printed)
        self.kind, test, self.case, text = block.groups() if block else ("ERROR", "", "", printed)
        self.sentence = test.removeprefix("test_").replace("_", " ")
        text = text.partition("\nWhat happened last:")[0]  # the journal
        last = re.split(r"(?m)^(?:During handling|The above exception) .*$", text)[-1]
        raised = re.search(r"(?ms)^[\w.]*(?:Error|Exception|Exit|Interrupt)\b.*", last)
        message = raised[0] if raised else last
        if self.kind == "FAIL":
            message = message.removeprefix("AssertionError: ")
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
        return "\n".join([draw_text(f"{self.sentence}{self.case}:", "  "), *lines])


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
            return {"hints": 0, "done": False, **json.loads((self.folder / NOTES).read_text())}
        except (OSError, ValueError, TypeError):
            return {"hints": 0, "done": False}

    def note(self, **notes: Any) -> None:
        (self.folder / NOTES).write_text(json.dumps({**self.notes(), **notes}) + "\n")

    def state(self) -> str:
        if not self.folder.exists():
            return ""
        return "done" if self.notes()["done"] else "started"

    # --- the files

    def make(self, change: Callable[[Path], None]) -> None:
        """Copy the project here and change it, or leave nothing behind."""
        self.folder.mkdir(parents=True)
        try:
            copy_project(self.folder)
            change(self.folder)
        except BaseException:
            shutil.rmtree(self.folder)
            raise

    def changed_tests(self) -> list[str]:
        """Return the files of tests/ that differ from the original, or are gone, but should not."""
        return [name for name, original in files_below(TOP / "tests", TOP).items()
                if name not in self.exercise.may_change
                and (not (self.folder / name).is_file()
                     or (self.folder / name).read_bytes() != original.read_bytes())]

    def difference(self) -> str:
        """Return a diff from the original to this copy, of all that was added or changed."""
        names = {name for top in (self.folder, TOP) for part in COPIED
                 for name in files_below(top / part, top)}
        return "".join(
            line for name in sorted(names) for line in difflib.unified_diff(
                lines_of(TOP / name), lines_of(self.folder / name), f"original/{name}",
                f"yours/{name}"))

    # --- what runs in it

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run `python -m` with these arguments; return its exit status and what it has printed.

        If this is interrupted, so is what runs: it gets time to end its own processes.
        """
        with subprocess.Popen([sys.executable, "-m", *arguments], cwd=self.folder, text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, errors="replace",
                              start_new_session=True) as self.running:  # Ctrl-C: once, from us
            try:
                if self.is_interrupted:
                    self.interrupt()
                printed, _ = self.running.communicate()
            except BaseException:
                self.interrupt()
                raise
        return self.running.returncode, printed

    def interrupt(self) -> None:
        """End what runs, as Ctrl-C would; kill it if it does not end."""
        self.is_interrupted = True
        if self.running and self.running.poll() is None:
            self.running.send_signal(signal.SIGINT)
            try:
                self.running.wait(END_TIME)
            except subprocess.TimeoutExpired:
                self.running.kill()

    def find_failure(self, test: str) -> Failure | None:
        """Run a test, or a module of tests, with a name below tests."""
        status, printed = self.run("unittest", f"tests.{test}")
        return Failure(printed) if status else None


def files_below(folder: Path, top: Path) -> dict[str, Path]:
    """Return the files in a folder, or the one that it is, by their paths below `top`."""
    paths = [folder] if folder.is_file() else folder.rglob("*")
    return {path.relative_to(top).as_posix(): path for path in paths
            if path.is_file() and "__pycache__" not in path.parts}


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True) if path.exists() else []


# --- the commands

def list_exercises() -> Iterator[str]:
    yield "Each exercise is a copy of the shop in which something is missing. Put it back.\n"
    for number, exercise in enumerate(EXERCISES, start=1):
        chapter = f", chapter {number_of(exercise.chapter)}" if exercise.chapter else ""
        state = copy_of(number).state()
        yield f"{number:>2}  {exercise.title}{f'  [{state}]' if state else ''}"
        yield f"    {exercise.pattern}, about {exercise.minutes} minutes{chapter}"
    yield f"\n{next_step()}"


def start(copy: Copy) -> Iterator[str]:
    number, exercise, folder = copy.number, copy.exercise, copy.folder
    if folder.exists():
        raise Refused(f"exercise {number} was started before: go on in {folder}, or delete that "
                      "folder to begin again")
    copy.make(exercise.prepare)
    copy.note()
    title = f"Exercise {number}: {exercise.title}"
    yield f"{title}\n{'=' * len(title)}\n"
    yield draw_text(exercise.story) + "\n"
    yield f"Your copy of the shop is in {folder}. This test fails in it now:\n"
    yield in_copy(folder, f"unittest tests.{exercise.test}")
    if exercise.chapter:
        yield "\nTo see what users see:\n"
        yield in_copy(folder, f"microshop.tour {number_of(exercise.chapter)}")
    yield "\n" + draw_text(f"{exercise.task} (about {exercise.minutes} minutes). Then:") + "\n"
    yield f"  {COMMAND} check {number}    says what is still wrong"
    yield f"  {COMMAND} hint {number}     the first of {len(exercise.hints)} hints"


def in_copy(folder: Path, command: str) -> str:
    """Return a shell command that runs `python -m` in a copy, and can be copied as it is."""
    line = f"  (cd {folder} && python -m {command})"
    return line if len(line) <= WIDTH else line.replace("unittest ", "unittest \\\n    ")


def check(copy: Copy) -> Iterator[str]:
    number, exercise = copy.number, copy.exercise
    copy.note(done=False)
    if changed := copy.changed_tests():
        yield draw_text(f"Not yet. Repair the shop, not its tests: {', '.join(changed)} must be "
                        "as in the original. To get that back:") + "\n"
        for name in changed:
            yield f"  cp {name} {copy.folder / name}"
        raise NotDone
    for test in (exercise.test, *exercise.further_tests()):
        if failure := copy.find_failure(test):
            first = "Not yet. This test fails:" if test == exercise.test else (
                f"Almost: the first test passes, but one of tests.{test} fails:")
            yield f"{first}\n\n{failure.shortened()}\n"
            if " != " in failure.message:
                yield "(In `this != that`, this is what came, and that is what was expected.)\n"
            yield f"To run it yourself:\n\n{in_copy(copy.folder, f'unittest tests.{test}')}\n"
            yield f"A hint: {COMMAND} hint {number}"
            raise NotDone
    copy.note(done=True)
    yield f"Done: exercise {number}, {exercise.title}. All its tests pass."
    yield f"Your code beside the original: {COMMAND} diff {number}"
    yield next_step()


def hint(copy: Copy) -> Iterator[str]:
    hints = copy.exercise.hints
    given = min(copy.notes()["hints"] + 1, len(hints))
    copy.note(hints=given)
    yield draw_text(f"Hint {given} of {len(hints)}: {hints[given - 1]}")
    if given == len(hints):
        yield draw_text(f"That was the last hint. The original is in the top folder; when your "
                        f"check passes, {COMMAND} diff {copy.number} shows both.")


def diff(copy: Copy) -> Iterator[str]:
    if not copy.notes()["done"]:
        raise Refused(f"exercise {copy.number} is not done yet: {COMMAND} check {copy.number}")
    yield copy.difference().rstrip() or "Your code is the same as the original."


COMMANDS = {"start": start, "check": check, "hint": hint, "diff": diff}


def copy_of(number: int) -> Copy:
    return Copy(number, EXERCISES[number - 1], FOLDER / str(number))


def next_step() -> str:
    """Return what to do next: the first exercise that is not done."""
    for number in range(1, len(EXERCISES) + 1):
        if (state := copy_of(number).state()) != "done":
            return f"Next: {COMMAND} {'check' if state else 'start'} {number}"
    return "All exercises are done."


def run(arguments: list[str]) -> Iterator[str]:
    """Do what the arguments say; yield what to print. Raises Refused."""
    if (TOP / NOTES).exists():
        raise Refused("this is the copy of an exercise; go to the top folder first: cd ../..")
    if not arguments:
        yield from list_exercises()
        return
    word, *rest = arguments
    if word not in COMMANDS or len(rest) != 1:
        raise Refused(f"expected one of {', '.join(COMMANDS)} with a number: {COMMAND} start 1")
    if rest[0] not in map(str, range(1, len(EXERCISES) + 1)):
        raise Refused(f"there is no exercise {rest[0]}; there are 1 to {len(EXERCISES)}")
    copy = copy_of(int(rest[0]))
    if word != "start" and not copy.folder.exists():
        raise Refused(f"exercise {copy.number} was not started: {COMMAND} start {copy.number}")
    yield from COMMANDS[word](copy)


def main() -> None:
    surroundings.prepare()
    try:
        for text in run(sys.argv[1:]):
            print(text, flush=True)
    except Refused as refused:
        print(refused, file=sys.stderr)
        sys.exit(2)
    except NotDone:
        sys.exit(1)
    except BrokenPipeError:  # what read our output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
