"""A service that kills itself at a chosen step; tests/test_crash.py runs it.

A step is a durable write (Database.write), a statement of a transaction (Database.transaction) or a
call to another service (Client.call). Between two steps nothing happens that outlives the process.
So a process that was killed before and after each of its steps was killed at every point there is.

`python -m tests.crash` reads runs from standard input, one JSON object a line, and prints what
happens in each. A run is a fork of this process, which has imported everything already: this makes
hundreds of runs quick.
"""
import contextlib
import json
import os
import re
import signal
import sys
import threading
import traceback
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from microshop import orders
from microshop.chassis import database
from microshop.chassis.client import Client
from microshop.chassis.database import Database, Transaction
from microshop.chassis.server import Service
from microshop.orders import Orders
from microshop.products import Products
from tests.helpers import PATIENCE, patient_services

Service.allow_reuse_port = True  # the tests keep the port between two runs
CLASSES = {"orders": Orders, "products": Products}
STATEMENT = re.compile(
    r"(UPDATE) (\w+) (SET \w+)|(INSERT|SELECT|DELETE)\b.*?(?:INTO|FROM) (\w+)|(\w+)", re.S)


class Steps:
    """Counts the steps of a process, prints them, and kills the process at one of them.

    `death` is that one: its number, and "before" or "after".
    """

    def __init__(self, death: list | None):
        self.death = death
        self.count = 0
        self._thread = threading.local()

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        number, self.count = self.count, self.count + 1
        say(f"step {name}")
        self._die_if_chosen(number, "before")
        try:
            yield
        finally:  # a call that fails has an end, too
            self._die_if_chosen(number, "after")

    def _die_if_chosen(self, number: int, side: str) -> None:
        if [number, side] == self.death:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """From now on, make a step of everything that outlives this process."""
        write, begin, call = Database.write, database.begin, Client.call

        def watched_write(self_: Database, statement: str, values: dict | list = ()):
            with self.step(f"write: {name_of(statement, values)}"):
                self._thread.is_writing = True  # a write is one step, with the transaction in it
                try:
                    return write(self_, statement, values)
                finally:
                    self._thread.is_writing = False

        def watched_begin(connection, check):
            is_writing = getattr(self._thread, "is_writing", False)
            transaction = begin(connection, check)
            return transaction if is_writing else self.watch_statements(connection, transaction)

        def watched_call(client, upstream, method, *rest):
            with self.step(f"call: {method} {upstream.name}"):
                return call(client, upstream, method, *rest)

        Database.write, database.begin, Client.call = watched_write, watched_begin, watched_call

    @contextlib.contextmanager
    def watch_statements(self, connection, begun) -> Iterator[Transaction]:
        """Make a step of each statement of a transaction, BEGIN and COMMIT among them."""
        with contextlib.ExitStack() as current:  # the step of now; it ends where the next begins

            def go_on(statement: str) -> None:
                current.close()
                current.enter_context(self.step(name_of(statement)))

            connection.set_trace_callback(go_on)  # is called before each statement
            try:
                with begun as transaction:
                    yield transaction
            finally:
                connection.set_trace_callback(None)


def say(line: str) -> None:
    """Print a line in one piece, since several threads print."""
    os.write(1, f"{line}\n".encode())


def name_of(statement: str, values: dict | list | tuple = ()) -> str:
    """Name a statement by its verb, its table and the first column that it sets.

    If that column is the status, its new value is named, too.
    """
    name = " ".join(filter(None, STATEMENT.match(statement).groups()))
    return f"{name} = {values['status']}" if name.endswith("SET status") else name


def serve(service: str, data: str, death: list | None, resumes: bool, **settings) -> None:
    """Run a service.

    If it `resumes`, its steps are those it takes at its start, by itself. Otherwise they are those
    of the requests it gets; its start is not watched, and nothing happens in the background.
    """
    say(f"runs as {os.getpid()}")
    signal.alarm(int(PATIENCE))  # a run that hangs ends
    orders.POLL = 0.01 if resumes else 24 * 3600.0
    steps = Steps(death)
    if resumes:
        steps.watch()
    running = CLASSES[service](Namespace(
        host="127.0.0.1", data=Path(data), quiet=True, supervised=None, grace=4.0,
        max_connections=100, **settings))
    if not resumes:
        steps.watch()
    running.run()


def main() -> None:
    for line in sys.stdin:
        if child := os.fork():
            say(f"ended {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")
            continue
        try:
            with patient_services():
                serve(**json.loads(line))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)


if __name__ == "__main__":
    main()
