"""Proofs of the exercises: each fails as its learners are told, and its solution passes.

    python -m tests.proofs          all of them, three at once (about a minute)
    python -m tests.proofs 3 4      these

In a copy as a learner gets it, the test must fail with a message that can be read, and the chapter
that shows the fault must come out differently. In a copy with the solution, everything that a
check runs must pass. It prints a line for each exercise; the exit status is 1 if one is not proven.
"""
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from microshop.chassis import surroundings
from microshop.tour.chapters import number_of
from tests.exercise import EXERCISES
from tests.exercises import Exercise
from tests.exercises.copies import Copy, Failure

AT_ONCE = 3  # most of the time they wait
WIDTH = 150  # of a message that is shown
# Messages that say neither what was sent nor what was expected. A message of the test's own follows
# after a colon.
BARE = re.compile(r"[^:]* is not (true|false|None)|unexpectedly None|\d+ != \d+|None|")


class Proof:
    """The proof of one exercise, in a temporary folder; its problems, and what was seen."""

    def __init__(self, number: int, folder: Path):
        self.number, self.exercise = number, EXERCISES[number - 1]
        self.copies = {name: Copy(number, self.exercise, folder / f"{number}-{name}")
                       for name in ("start", "solution")}
        self.problems: list[str] = []
        self.seen = ""
        self.seconds = 0.0

    def run(self) -> "Proof":
        began = time.monotonic()
        try:
            self.problems += [*self.faults_of_start(), *self.faults_of_solution()]
        except ValueError as error:  # an edit does not fit the source any more
            self.problems.append(str(error))
        self.seconds = time.monotonic() - began
        return self

    def faults_of_start(self) -> Iterator[str]:
        """Yield what is wrong with the copy that a learner gets."""
        copy = self.copies["start"]
        copy.make(self.exercise.prepare)
        failure = copy.find_failure(self.exercise.test)
        if failure is None:
            yield f"{self.exercise.test} passes, but should fail"
        else:
            yield from self.faults_of_message(failure)
        if self.exercise.chapter:
            status, printed = copy.run("microshop.tour", str(number_of(self.exercise.chapter)))
            was_open = "(a shop was started" in printed and "expected: the shop" not in printed
            if status != 1 or "[!!]" not in printed or not was_open:
                last = printed.strip().rpartition("\n")[2]
                yield (f"chapter {self.exercise.chapter} does not come out differently: its exit "
                       f"status is {status}; it ends with: {last}")

    def faults_of_message(self, failure: Failure) -> Iterator[str]:
        self.seen = " / ".join(failure.lines())
        if failure.kind != "FAIL":
            yield f"{self.exercise.test} must fail, not raise: {failure.message}"
        elif BARE.fullmatch(failure.message):
            yield f"{self.exercise.test} should say more than: {failure.message}"

    def faults_of_solution(self) -> Iterator[str]:
        """Yield what fails in a copy with the solution."""
        copy = self.copies["solution"]
        copy.make(self.exercise.solve)
        tests = [self.exercise.test]
        if not isinstance(self.exercise, Exercise):  # else the suite proves the rest
            tests += self.exercise.further_tests()
        for test in tests:
            if failure := copy.find_failure(test):
                yield f"with the solution, {test} fails: {failure.message}"

    def interrupt(self) -> None:
        for copy in self.copies.values():
            copy.interrupt()

    def __str__(self) -> str:
        seen = self.seen if len(self.seen) <= WIDTH else f"{self.seen[:WIDTH]}..."
        lines = [f"{self.number:>2}  {'FAIL' if self.problems else 'ok  '} {self.seconds:5.1f} s  "
                 f"{self.exercise.title}", f"    {seen}"]
        lines += [f"    {problem}" for problem in self.problems]
        return "\n".join(line.rstrip() for line in lines)


def prove(numbers: list[int]) -> bool:
    """Prove these exercises, and print each proof; return whether all are proven."""
    with tempfile.TemporaryDirectory(prefix="proofs-") as folder:
        proofs = [Proof(number, Path(folder)) for number in numbers]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                for proof in pool.map(Proof.run, proofs):
                    print(proof, flush=True)
            except BaseException:  # such as Ctrl-C
                pool.shutdown(wait=False, cancel_futures=True)
                for proof in proofs:
                    proof.interrupt()
                raise
    failed = [proof.number for proof in proofs if proof.problems]
    print(f"{len(proofs) - len(failed)} of {len(proofs)} exercises are proven"
          + (f"; not these: {', '.join(map(str, failed))}" if failed else ""))
    return not failed


def main() -> None:
    surroundings.prepare()
    known = range(1, len(EXERCISES) + 1)
    if wrong := [text for text in sys.argv[1:] if text not in map(str, known)]:
        print(f"there is no exercise {wrong[0]}; there are 1 to {len(EXERCISES)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if prove([int(text) for text in sys.argv[1:]] or list(known)) else 1)


if __name__ == "__main__":
    main()
