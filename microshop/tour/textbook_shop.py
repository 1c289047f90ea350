"""The chapter about the version of the shop that textbooks show.

That version is tests/textbook.py. It is not part of an installed package, so it may be missing.
"""
import signal
import subprocess
import sys
from pathlib import Path

from microshop.tour.drawing import draw_kill
from microshop.tour.own_shop import (
    ENDINGS, PATIENCE, Different, plain_environment, send_signal)
from microshop.tour.stage import Tour, send

TOP = Path(__file__).parents[2]
TIMEOUT = 2  # seconds: the shop's --timeout


class Textbook:
    """A service or a gateway of the textbook version, for a `with` statement."""

    def __init__(self, tour: Tour, name: str, what: str):
        self.tour, self.name = tour, name
        self.arguments = ["-m", "tests.textbook", what, "0"]

    def __enter__(self) -> "Textbook":
        """Start it, and wait until it listens. Raises Different."""
        self.tour.print(f"$ python {' '.join(self.arguments)} &    # {self.name}")
        # Until we can end the process, no signal may end us.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
        self.process = subprocess.Popen(
            [sys.executable, *self.arguments], cwd=TOP, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=plain_environment())
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            line = self.process.stdout.readline() if self.process.stdout else ""
            if not line:
                raise Different(f"{self.name} starts", "it has ended")
        except BaseException:
            self.__exit__()
            raise
        self.port = int(line.rpartition(":")[2])
        self.tour.also[self.name] = self.port
        return self

    def __exit__(self, *_: object) -> None:
        with self.process:
            self.process.kill()

    def signal(self, number: signal.Signals) -> None:
        send_signal(self.process.pid, number)
        self.tour.print(draw_kill(self.process.pid, number, self.name))


def textbook(tour: Tour) -> None:
    """The textbook version."""
    if not (TOP / "tests" / "textbook.py").exists():
        tour.say("This chapter needs tests/textbook.py. That is part of the source of microshop, "
                 "but not of an installed package: run this chapter in a checkout.")
        return
    tour.say("""
        Most introductions show a service and a gateway in some thirty lines. tests/textbook.py is
        such a version: http.server answers, urlopen forwards, and that is all. Here it runs beside
        the shop. Both get the same requests, and the same faults.
        """)
    tour.start_shop(f"--timeout={TIMEOUT}")
    with (Textbook(tour, "textbook users", "users") as users,
          Textbook(tour, "textbook gateway", f"http://localhost:{users.port}") as gateway):
        tour.print()
        alike = [tour.curl("/users", to=name).body for name in (gateway.name, "gateway")]
        tour.expect("As long as nothing goes wrong, both answer the same", *alike)
        show_mistakes(tour, gateway)
        show_pause(tour, users, gateway)
        show_kill(tour, users, gateway)
    tour.trade_off("""
        Thirty lines are read in a minute, and for a first look that is right. They work as long as
        every client, every process and the network do. Most of the shop's code is for the other
        times: it refuses in a form that programs can read, stops waiting, tries again where that is
        safe, and starts what has died. All processes have to agree on this, so it is hard to add
        later.
        """)


def show_mistakes(tour: Tour, gateway: Textbook) -> None:
    """Send what clients send by mistake."""
    tour.predict("There is no user 9. What will the textbook gateway answer to GET /users/9, and "
                 "what will the shop answer?")
    wrong = tour.curl("/users/9", to=gateway.name)
    right = tour.curl("/users/9")
    tour.expect("The textbook version answers 200, the shop 404",
                (wrong.status, right.status), (200, 404))
    tour.say("""
        The textbook service ignores the rest of the path, and answers with all users: nothing has
        reminded its author of that case. A client now believes that it has user 9. The next client
        misspells a field of a new user:
        """)
    carol = {"nmae": "Carol"}
    wrong = tour.curl("/users", data=carol, to=gateway.name, show=("Content-Type",))
    right = tour.curl("/users", data=carol, show=("Content-Type",))
    found = [answer.headers.get("content-type", "").partition(";")[0] for answer in (wrong, right)]
    fields = {error["field"] for error in right.json["errors"]}
    tour.expect("The textbook version answers with HTML, for people; the shop answers with a "
                "problem document (RFC 9457), for programs: it names the fields",
                [*found, fields], ["text/html", "application/problem+json", {"name", "nmae"}])


def show_pause(tour: Tour, users: Textbook, gateway: Textbook) -> None:
    """Pause both services: connections to them are accepted, but no answer comes."""
    tour.predict("Now both users services hang. How long will a client of each gateway wait?")
    users.signal(signal.SIGSTOP)
    tour.pause("users")
    waiting = tour.begin_curl("/users", to=gateway.name)
    refused = tour.curl("/users")
    tour.expect(f"The client of the shop gets 504 after its --timeout, {TIMEOUT} s",
                refused.status, 504)
    tour.expect("The client of the textbook version still waits: urlopen has no timeout unless "
                "you give it one", waiting.is_answered(), False)
    users.signal(signal.SIGCONT)
    tour.resume("users")
    late = tour.finish_curl(waiting)
    tour.expect("It waits until the service goes on, however long that takes", late.status, 200)


def show_kill(tour: Tour, users: Textbook, gateway: Textbook) -> None:
    """Kill both services."""
    tour.predict("Now both users services are killed. What will the clients get?")
    users.signal(signal.SIGKILL)
    users.process.wait(PATIENCE)
    tour.kill("users")
    lost = [tour.curl("/users", to=gateway.name).status]
    tour.curl("/users")
    tour.expect("The shop has started its service again: it answers 200",
                lambda: send(tour.port(), "GET", "/users").status, 200)
    lost.append(tour.curl("/users", to=gateway.name).status)
    tour.expect("The gateway of the textbook version closes the connection without an answer, now "
                "and later: urlopen has raised an exception, and no process starts users again",
                lost, [0, 0])
