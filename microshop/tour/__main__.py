"""`python -m microshop.tour`: lists the chapters, and runs them.

What was done is remembered in the file .tour of the current folder.
"""
import argparse
import contextlib
import signal
import sqlite3
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from microshop.chassis import surroundings
from microshop.tour import class_plan, index
from microshop.tour.chapters import Chapter, all_chapters
from microshop.tour.drawing import draw_lines, draw_text
from microshop.tour.own_shop import ENDINGS, Different
from microshop.tour.stage import Tour

COMMAND = "python -m microshop.tour"
NOTES = Path(".tour")  # the numbers of the chapters that were done here, one on a line


def done_before() -> list[int]:
    """Return the numbers of the chapters that were done, the last one last."""
    try:
        return [int(line) for line in NOTES.read_text().split()]
    except (OSError, ValueError):
        return []


def note_done(number: int) -> None:
    """Remember that a chapter was done, if files can be written here."""
    with contextlib.suppress(OSError), NOTES.open("a") as notes:
        notes.write(f"{number}\n")


def list_chapters(chapters: list[Chapter]) -> None:
    done = done_before()
    print("Each chapter starts a shop of its own, shows one thing in it, and ends it.\n")
    for chapter in chapters:
        print(f"  {'x' if chapter.number in done else ' '} {chapter.number:>2}  {chapter.title}")
    if done:
        print(f"\nThe last one you did is chapter {done[-1]}.")
    following = next((each.number for each in chapters if each.number not in done), 1)
    print(f"\nNext:                            {COMMAND} {following}")
    print(f"All chapters, without questions: {COMMAND} --all")
    print(f"Where each pattern is:           {COMMAND} index")
    print(f"For teachers:                    {COMMAND} class")


def run_chapter(chapter: Chapter, chapters: list[Chapter], *, is_interactive: bool) -> bool:
    """Run one chapter in a shop of its own; return whether all came out as it says."""
    title = f"Chapter {chapter.number}: {chapter.title}"
    print(f"{title}\n{'=' * len(title)}\n")
    with contextlib.ExitStack() as stack:
        tour = Tour(stack, is_interactive=is_interactive)
        try:
            chapter.function(tour)
        except Different as different:
            return tell_difference(different.expected, different.came)
        except (LookupError, ValueError, sqlite3.Error) as error:
            return tell_difference("what the chapter needs is in each answer", repr(error))
        print("\n".join(closing_lines(chapter)))
        if tour.watch:
            print(f"Watch     http://localhost:{tour.port('live')}/{tour.watch}")
            if is_interactive:
                input("          (open it in a browser now; Enter ends this shop) ")
    if chapter is not chapters[-1]:
        print(f"Next      {COMMAND} {chapter.number + 1}")
        print(f"          {chapters[chapter.number].title}")
    return True


def tell_difference(expected: str, came: Any) -> bool:
    """Say that a chapter came out differently; return False."""
    print(draw_text("This came out differently.", "[!!] "))
    print(draw_text(f"expected: {expected}", "     "))
    print(draw_lines(f"came: {came}", "     "))
    return False


def closing_lines(chapter: Chapter) -> Iterable[str]:
    """Yield where to go from a chapter: to the code, the tests and the exercises."""
    for row in index.rows_of(chapter.name):
        yield f"Pattern   {row.name}"
        yield f"  code    {row.location()}"
        yield f"  test    {row.test_command()}"
        for number in row.exercises:
            yield f"  repair  python -m tests.exercise start {number}"


def run_all_chapters(chapters: list[Chapter]) -> bool:
    """Run all chapters without questions; return whether all came out as they say."""
    outcomes = []
    for chapter in chapters:
        began = time.monotonic()
        is_right = run_chapter(chapter, chapters, is_interactive=False)
        outcomes.append(is_right)
        print(f"({time.monotonic() - began:.1f} s)\n\n")
    different = [chapter.number for chapter, right in zip(chapters, outcomes, strict=True)
                 if not right]
    print(f"{len(chapters) - len(different)} of {len(chapters)} chapters came out as they say"
          + (f"; not so: {', '.join(map(str, different))}" if different else ""))
    return not different


def parse_arguments(chapters: list[Chapter]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description="See each pattern at work in a running shop.")
    choices = [*(str(chapter.number) for chapter in chapters), "index", "class"]
    parser.add_argument(
        "what", nargs="?", choices=choices, metavar="NUMBER | index | class",
        help="the chapter to run; index: each pattern with its place in the code, its test, "
             "chapter and exercise; class: plans for teachers; without it: the list of chapters")
    parser.add_argument("--all", action="store_true",
                        help="all chapters, without questions; exit status 1 if anything comes out "
                             "differently")
    parser.add_argument("--markdown", action="store_true", help="the index as a table in Markdown")
    arguments = parser.parse_args()
    if arguments.all and arguments.what:
        parser.error("--all runs all chapters; it takes no number")
    return arguments


def run() -> bool:
    """Do what the arguments say; return whether all came out as it should."""
    chapters = all_chapters()
    arguments = parse_arguments(chapters)
    if arguments.all:
        return run_all_chapters(chapters)
    if arguments.what == "index":
        print(index.as_markdown() if arguments.markdown else index.as_text())
    elif arguments.what == "class":
        print(class_plan.__doc__)
    elif arguments.what:
        chapter = chapters[int(arguments.what) - 1]
        is_terminal = all(stream and stream.isatty() for stream in (sys.stdin, sys.stdout))
        is_right = run_chapter(chapter, chapters, is_interactive=is_terminal)
        if is_right:
            note_done(chapter.number)
        return is_right
    else:
        list_chapters(chapters)
    return True


def main() -> None:
    surroundings.prepare()
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # else it is ignored, as after nohup
        signal.signal(signal.SIGHUP, surroundings.exit_at_once)
    try:
        sys.exit(0 if run() else 1)
    except SystemExit as end:
        if end.code in [128 + number for number in ENDINGS]:
            with contextlib.suppress(OSError):  # the terminal may be gone
                print("\n(stopped; the shop of the chapter has ended)", file=sys.stderr)
        raise
    except EOFError:  # instead of Enter
        sys.exit(0)
    except OSError as error:  # our output cannot be written
        surroundings.discard_output()
        if not isinstance(error, BrokenPipeError):
            print(f"{COMMAND}: {error.strerror}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
