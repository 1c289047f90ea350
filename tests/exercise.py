"""The exercises, for learners: find what was taken out of the shop, and put it back.

    python -m tests.exercise            the list (-h shows this text)
    python -m tests.exercise start 3    make a copy of the project with one fault in it, and say
                                        what users notice and which test fails
    python -m tests.exercise check 3    run that test, then the rest of its module
    python -m tests.exercise hint 3     the next of two or three hints
    python -m tests.exercise diff 3     once it is done: your code beside the original

The copy is in the folder .exercises/3. What happens in it changes nothing else. To begin again,
delete that folder.
"""
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from microshop.chassis import surroundings
from microshop.tour.chapters import number_of
from microshop.tour.drawing import WIDTH, draw_text
from tests.exercises import Addition, Exercise, adding, failures, first_steps, running, sagas
from tests.exercises.copies import NOTES, Copy
from tests.helpers import TOP

COMMAND = "python -m tests.exercise"
EXERCISES: list[Exercise | Addition] = [
    *first_steps.EXERCISES, *failures.EXERCISES, *sagas.EXERCISES, *running.EXERCISES,
    *adding.EXERCISES]
FOLDER = Path(".exercises")


class Refused(Exception):
    """What the learner wants is not possible; the message says why, and what to do."""


class NotDone(Exception):
    """A check has found something; what that is has been printed."""


# --- the commands

def list_exercises() -> Iterator[str]:
    yield "Each exercise is a copy of the shop in which something is missing. Put it back.\n"
    for number, exercise in enumerate(EXERCISES, start=1):
        state = copy_of(number).state()
        yield f"{number:>2}  {exercise.title}{f'  [{state}]' if state else ''}"
        yield (f"    {exercise.pattern}, about {exercise.minutes} minutes"
               f"{chapter_of(exercise)}")
    yield f"\n{next_step()}"


def chapter_of(exercise: Exercise | Addition) -> str:
    """Return the end of a line that names the chapter of the tour, if there is one."""
    if exercise.chapter:
        return f", chapter {number_of(exercise.chapter)}"
    if exercise.related:
        return f", related: chapter {number_of(exercise.related)}"
    return ""


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
    elif exercise.related:
        yield "\nRelated (this fault does not show there):\n"
        yield f"  python -m microshop.tour {number_of(exercise.related)}"
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
        yield f"(running tests.{test})"
        if failure := copy.find_failure(test):
            first = "Not yet. This test fails:" if test == exercise.test else (
                f"Almost: the first test passes, but one of tests.{test} fails:")
            yield f"\n{first}\n\n{failure.shortened()}\n"
            if failure.kind == "FAIL" and " != " in failure.message:
                yield "(In `this != that`, this is what came, and that is what was expected.)\n"
            own = failure.test or f"tests.{test}"
            yield f"To run it yourself:\n\n{in_copy(copy.folder, f'unittest {own}')}\n"
            yield f"A hint: {COMMAND} hint {number}"
            raise NotDone
    copy.note(done=True)
    yield f"\nDone: exercise {number}, {exercise.title}. All its tests pass."
    yield f"Your code beside a solution: {COMMAND} diff {number}"
    if exercise.look:
        yield "\n" + draw_text(
            "To see it, start your shop, and ask its gateway in another terminal. For PORT, write "
            "the port that the gateway prints:") + "\n"
        yield in_copy(copy.folder, "microshop.run_all --fresh --port 0")
        yield f"  curl localhost:PORT{exercise.look}\n"
    yield next_step(after=number)


def hint(copy: Copy) -> Iterator[str]:
    hints = copy.exercise.hints
    given = min(copy.notes()["hints"] + 1, len(hints))
    copy.note(hints=given)
    yield draw_text(f"Hint {given} of {len(hints)}: {hints[given - 1]}")
    if given == len(hints):
        yield draw_text(f"That was the last hint. {copy.exercise.answer} When your check passes, "
                        f"{COMMAND} diff {copy.number} shows your code beside a solution.")


def diff(copy: Copy) -> Iterator[str]:
    if not copy.notes()["done"]:
        raise Refused(f"exercise {copy.number} is not done yet: {COMMAND} check {copy.number}")
    with tempfile.TemporaryDirectory() as folder:
        solution, title = TOP, "original"
        if isinstance(copy.exercise, Addition):
            solution, title = Path(folder, "model"), "model"
            Copy(copy.number, copy.exercise, solution).make(copy.exercise.solve)
        yield copy.difference(solution, title).rstrip() or f"Your code is the same as the {title}."


COMMANDS = {"start": start, "check": check, "hint": hint, "diff": diff}


def copy_of(number: int) -> Copy:
    return Copy(number, EXERCISES[number - 1], FOLDER / str(number))


def next_step(after: int = 0) -> str:
    """Return what to do next: the first exercise that is not done, after this one or from 1 on."""
    count = len(EXERCISES)
    for number in (*range(after + 1, count + 1), *range(1, after + 1)):
        if (state := copy_of(number).state()) != "done":
            return f"Next: {COMMAND} {'check' if state else 'start'} {number}"
    return "All exercises are done."


def run(arguments: list[str]) -> Iterator[str]:
    """Do what the arguments say; yield what to print. Raises Refused."""
    if (TOP / NOTES).exists():
        raise Refused("this is the copy of an exercise; go to the top folder first: cd ../..")
    word, *rest = arguments or ["list"]
    if word in ("-h", "--help", "help"):
        yield __doc__.rstrip()
        return
    if word == "list" and not rest:
        yield from list_exercises()
        return
    is_bare_number = word.isdecimal() and not rest
    if not is_bare_number and (word not in COMMANDS or len(rest) != 1):
        raise Refused(f"expected one of {', '.join(COMMANDS)} with a number: {COMMAND} start 1")
    number = word if is_bare_number else rest[0]
    if number not in map(str, range(1, len(EXERCISES) + 1)):
        raise Refused(f"there is no exercise {number}; there are 1 to {len(EXERCISES)}")
    copy = copy_of(int(number))
    if is_bare_number:
        wanted = "check" if copy.folder.exists() else "start"
        raise Refused(f"did you mean: {COMMAND} {wanted} {number}")
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
        surroundings.discard_output()
        sys.exit(1)
    except OSError as error:  # such as a full disk, or a file where there should be a folder
        print(f"{COMMAND}: {error.filename}: {error.strerror}" if error.filename
              else f"{COMMAND}: {str(error)[:200]}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
